"""Close a round: what came in since the last one becomes part of the ledger, the pool and the test set.

Can be killed at any line and repeated: parts are added by content, and the marker that says 'closed' is written last.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from al_pipeline.engine import write_engine
from al_pipeline.errors import ForeignEdit
from al_pipeline.files import read_object, remove_leftovers, sha256_file, write_json
from al_pipeline.layout import Layout
from al_pipeline.ledger import append_inbox
from al_pipeline.repository import Dvc, Git


def next_round(layout: Layout) -> int | None:
    """The round that the build under way (or the latest one) selects for; None before the first build."""
    number = read_object(layout.overrides).get("round")
    if number is not None and (type(number) is not int or number < 0):
        raise ForeignEdit(f"{layout.overrides} names no round: {number!r}; `git checkout -- rounds/overrides.json`")
    return number


def close(layout: Layout, dvc: Dvc, selects_for: int, overrides: dict[str, Any] | None = None) -> None:
    """Move the inbox into `data/`, track it, and mark the round closed; the build then selects round `selects_for`.

    Raises ForeignEdit where somebody edited the ledger, the pool, the test set or the encoder.
    """
    if not layout.closing.exists():
        check_sources(layout, dvc)
        write_json(layout.closing, {"selects_for": selects_for})
    for folder in (layout.events, layout.pool, layout.test):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    _move_parts(layout.inbox_pool, layout.pool)
    _move_parts(layout.inbox_test, layout.test)
    consumed = append_inbox(layout.inbox_events, layout.events)
    dvc.add(layout.events, layout.pool, layout.test)
    write_engine(layout.engine)
    write_json(layout.overrides, {"round": selects_for, **(overrides or {})})
    for path in consumed:
        path.unlink(missing_ok=True)
    layout.closing.unlink(missing_ok=True)


def check_sources(layout: Layout, dvc: Dvc) -> None:
    """Raise ForeignEdit, naming the files, where data that only the engine writes is not as it left it."""
    edited, absent = _changes(layout, dvc)
    if edited:
        raise ForeignEdit(
            f"changed by somebody else: {', '.join(edited)}. "
            f"`dvc diff` in {layout.root} shows what; `dvc checkout --force FILE` discards the change"
        )
    if absent:
        raise ForeignEdit(f"not here: {', '.join(absent)}; `dvc pull` in {layout.root} brings it back")


def foreign_edits(layout: Layout, git: Git) -> list[str]:
    """Files that the engine owns and that differ from the last commit; meant for the time between builds.

    Connecting to Label Studio writes and commits its project by itself, and may be killed in between.
    """
    return [name for name in git.changed(layout.owned) if not name.endswith("project.json")]


def bring_sources(layout: Layout, dvc: Dvc) -> None:
    """Pull what is recorded and not here, as in a fresh clone; what somebody edited stays as it is."""
    if absent := _changes(layout, dvc)[1]:
        dvc.pull(*(f"{name}.dvc" for name in absent))


def _changes(layout: Layout, dvc: Dvc) -> tuple[list[str], list[str]]:
    """Which sources were edited, and which are gone."""
    tracked = [f"{path.relative_to(layout.root)}.dvc" for path in layout.sources if _pointer(path).exists()]
    changed = dvc.changed(*tracked) if tracked else {}
    gone = {name for name in changed if not (layout.root / name.removesuffix(".dvc")).exists()}
    return (
        sorted(name.removesuffix(".dvc") for name in changed.keys() - gone),
        sorted(name.removesuffix(".dvc") for name in gone),
    )


def _move_parts(inbox: Path, target: Path) -> None:
    known = {sha256_file(path) for path in target.glob("part-*.parquet")}
    first = 1 + max((int(path.stem.removeprefix("part-")) for path in target.glob("part-*.parquet")), default=0)
    for number, path in enumerate(_parts(inbox), start=first):
        if sha256_file(path) in known:
            path.unlink()
        else:
            path.replace(target / f"part-{number:06d}.parquet")


def _parts(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.parquet"))


def _pointer(path: Path) -> Path:
    return path.parent / f"{path.name}.dvc"
