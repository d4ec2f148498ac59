"""Stage what an ingest adds in a folder of the inbox; it takes effect once `commit.json` is written there, last."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from al_pipeline.data.ledger import add_to_inbox, read_events
from al_pipeline.data.pool import iter_chosen, list_parts, write_items
from al_pipeline.files import make_folder, move, read_json, read_object, remove_leftovers, write_json
from al_pipeline.operations.ingestion.intake import Intake
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import Layout

_STAGING = ".ingest"
_COMMIT = "commit.json"
_DRAWN = "drawn.json"
"""File in the inbox: which of its parts of the test set were drawn, not given."""


@contextmanager
def staging_folder(layout: Layout) -> Iterator[Path]:
    """Yield a folder in which an ingest stages what it adds; remove it afterwards unless `commit` was called."""
    folder = layout.inbox / _STAGING
    make_folder(layout.inbox.parent)
    private_folder(layout.inbox)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        if not (folder / _COMMIT).exists():
            shutil.rmtree(folder, ignore_errors=True)


def finish_ingest(layout: Layout) -> bool:
    """Finish an ingest that was killed after its commit, discard one that was killed before it.

    Returns whether an ingest was finished. Call it while holding the workspace's lock, before the inbox is closed.
    """
    remove_leftovers(layout.inbox, layout.inbox_pool, layout.inbox_test, layout.inbox_events, layout.rejects)
    staging = layout.inbox / _STAGING
    committed = (staging / _COMMIT).exists()
    if committed:
        _carry_out(layout, staging)
    elif staging.exists():
        shutil.rmtree(staging)
    return committed


def stage_parts(taken: Intake, staging: Path, staged: Path, *, draft: bool) -> None:
    """Split the new items in the file `staged` into a part of the pool and one of the test set.

    `draft`: as it was written.
    """
    in_test = taken.known.in_test(taken.first_new, len(taken.known))
    parts = [part for part, some in (("pool", not in_test.all()), ("test", in_test.any())) if some]
    if len(parts) == 1 and not draft:
        move(staged, staging / parts[0] / "new.parquet")
    else:
        for part in parts:
            chosen = in_test if part == "test" else ~in_test
            write_items(staging / part / "new.parquet", iter_chosen([staged], chosen))
    shutil.rmtree(staged.parent)


def stage_events(taken: Intake, staging: Path) -> int:
    """Stage corrections and labels; return the number of labels."""
    events = list(taken.events())
    add_to_inbox(staging / "events", events)
    return sum(event.type == "import" for event in events)


def commit(layout: Layout, staging: Path, *, drawn: bool = False, drop: Sequence[Path] = ()) -> None:
    """Make the staged data take effect and drop the inbox files `drop`; `drawn`: the staged test set was drawn."""
    moves: dict[str, Any] = {"drawn": drawn, "drop": [path.relative_to(layout.inbox).as_posix() for path in drop]}
    for name, inbox in (("test", layout.inbox_test), ("pool", layout.inbox_pool)):
        if (staging / name / "new.parquet").exists():
            names = [part.stem.removeprefix("part-") for part in list_parts([inbox])]
            last = max((int(number) for number in names if number.isdecimal()), default=0)
            moves[name] = f"part-{last + 1:06d}.parquet"
    write_json(staging / _COMMIT, moves)
    _carry_out(layout, staging)


def drawn_parts(layout: Layout) -> list[Path] | None:
    """The parts of the test set in the inbox that were drawn, not given; None if no ingest has drawn one."""
    drawn = read_object(layout.inbox / _DRAWN)
    if not drawn:
        return None
    return [path for name in drawn.get("parts", ()) if (path := layout.inbox_test / name).exists()]


def _carry_out(layout: Layout, staging: Path) -> None:
    """Move the staged data into the inbox, items before the labels that refer to them. Can be repeated."""
    moves = read_json(staging / _COMMIT, {})
    for name in moves.get("drop", ()):
        (layout.inbox / name).unlink(missing_ok=True)
    if moves.get("drawn"):
        write_json(layout.inbox / _DRAWN, {"parts": [moves["test"]] if "test" in moves else []})
    for name, inbox in (("test", layout.inbox_test), ("pool", layout.inbox_pool)):
        staged = staging / name / "new.parquet"
        if staged.exists():
            move(staged, inbox / moves[name])
    add_to_inbox(layout.inbox_events, read_events(staging / "events"), ledger=layout.events)
    (staging / _COMMIT).unlink()
    shutil.rmtree(staging)
