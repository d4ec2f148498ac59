"""Close a round: move what has arrived since the last one into the ledger, the pool and the test set.

Can be killed at any line and repeated: parts are deduplicated by content, and the 'closed' marker is written last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from msgspec.structs import asdict

from al_pipeline.annotation.active_events import CONTROLS, intervention_key
from al_pipeline.data.ledger import append_forecasts, append_inbox, append_part, part_ids, read_events
from al_pipeline.errors import RemoteIncomplete, RepositoryError, UnexpectedChange
from al_pipeline.files import read_object, remove_leftovers, sha256_file, write_json
from al_pipeline.integrations.git import Git
from al_pipeline.operations.checkout import converted
from al_pipeline.params import AnswerCost
from al_pipeline.records import CPU, RANDOM, RANDOM_SLICE, Event, ModelForecast, PlannedTask
from al_pipeline.rounds.interventions import Intervention, control_event
from al_pipeline.rounds.manifests import live_number
from al_pipeline.workspace.layout import Layout, pointer_of

if TYPE_CHECKING:  # `al status` needs neither DVC nor the engine's fingerprint
    from al_pipeline.integrations.dvc.defects import Different
    from al_pipeline.integrations.dvc.session import Dvc

NO_FORECASTS: Mapping[str, ModelForecast] = MappingProxyType({})


def next_round(layout: Layout) -> int | None:
    """The round whose batch the current (or latest) build selects; None before the first build."""
    number = read_object(layout.overrides).get("round")
    if number is not None and (type(number) is not int or number < 0):
        raise UnexpectedChange(
            f"{layout.overrides} names no round: {number!r}; `git checkout -- rounds/overrides.json`"
        )
    return number


def is_closed(layout: Layout, planned: int | None) -> bool:
    """Whether the planned round (None: the first build) is closed and its build has begun."""
    selected = next_round(layout)
    return selected is not None and selected == (0 if planned is None else planned + 1)


def close(
    layout: Layout,
    dvc: Dvc,
    selects_for: int,
    overrides: dict[str, Any] | None = None,
    interventions: Sequence[Intervention] = (),
    plans: Iterable[PlannedTask] = (),
    asked: Sequence[str] = (),
    kept: Sequence[PlannedTask] = (),
    device: str = CPU,
    plugins: Mapping[str, str] | None = None,
    forecasts: Mapping[str, ModelForecast] = NO_FORECASTS,
    cost: AnswerCost | None = None,
) -> None:
    """Move the inbox into `data/`, track it, and mark the round closed; the build then selects round `selects_for`.

    `interventions` about labels are carried out: their events are appended to the ledger, after all others. `plans`
    are all tasks ever planned: the items drawn at random are recorded for `train`. `overrides` are settings for this
    batch alone (params.Overrides); without any, those of a killed close stay in force. `asked` are the items that
    people requested for the batch, `kept` the tasks carried over into it. The build encodes on `device` and
    uses `plugins` (`operations.plugins`). `forecasts`: those that go into the ledger, for the consensus.
    `cost`: what answers take, if the batch is selected by it.
    Raises UnexpectedChange if somebody edited the ledger, the pool, the test set or the encoder.
    """
    from al_pipeline.workspace.fingerprint import write_engine

    if layout.closing.exists():
        check_kept(layout, dvc)
    else:
        check_sources(layout, dvc)
    overrides = overrides or read_object(layout.closing).get("overrides") or {}
    write_json(layout.closing, {"selects_for": selects_for, "overrides": overrides})
    consumed = _move_inbox(layout)
    append_part(layout.events, carry_out(interventions, layout.events))
    if forecasts:
        append_forecasts(layout.events, forecasts)
    check_kept(layout, dvc)
    dvc.add(layout.events, layout.pool, layout.test)  # even if unchanged: the cache may have been lost
    write_engine(layout.engine, device, plugins)
    write_json(layout.asked_at_random, {"items": drawn_at_random(plans)})
    along = {**_brought_along(interventions, asked, kept), **({} if cost is None else {"cost": asdict(cost)})}
    write_json(layout.overrides, {"round": selects_for, **overrides, **along})
    for path in consumed:
        path.unlink(missing_ok=True)
    layout.closing.unlink(missing_ok=True)


def _move_inbox(layout: Layout) -> list[Path]:
    """Move items into pool and test set, and copy events into the ledger. Returns the files of the copied events."""
    for folder in (layout.events, layout.pool, layout.test):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    _move_parts(layout.inbox_pool, layout.pool)
    _move_parts(layout.inbox_test, layout.test)
    return append_inbox(layout.inbox_events, layout.events)


def _brought_along(
    interventions: Sequence[Intervention], asked: Sequence[str], kept: Sequence[PlannedTask]
) -> dict[str, list[Any]]:
    """What the batch must take along, for `overrides.json`: only keys with something in them."""
    found: dict[str, list[Any]] = {
        "interventions": [intervention.number for intervention in interventions],
        "ask": list(asked),
        "kept": [task.item_id for task in kept if task.part == "pool"],
        "kept_test": [task.item_id for task in kept if task.part == "test"],
    }
    return {name: values for name, values in found.items() if values}


def carry_out(interventions: Sequence[Intervention], ledger: Path) -> list[Event]:
    """The events of `interventions` about labels that `ledger` lacks. A killed close can repeat this."""
    if not interventions:
        return []
    events = read_events(ledger)
    there = {event.annotation_key for event in events if event.type in CONTROLS}
    made: list[Event] = []
    for intervention in interventions:
        if intervention_key(intervention.number) not in there:
            known = frozenset() if intervention.parts is None else part_ids(ledger, intervention.parts)
            last = next((event.event_id for event in reversed(events) if event.event_id in known), None)
            made.append(control_event(intervention, last))
    return made


def drawn_at_random(plans: Iterable[PlannedTask]) -> list[str]:
    """Pool items that were drawn uniformly: in a seed round, in a random slice or by random sampling."""
    return sorted({task.item_id for task in plans if task.part == "pool" and task.strategy in (RANDOM, RANDOM_SLICE)})


def first_forecasts(plans: Iterable[PlannedTask], known: Mapping[int, int]) -> dict[str, ModelForecast]:
    """What a model said of pool items when it first chose them, by item id: before any answer, so it knows none.

    Items that were first chosen without a model have no forecast: a later one may know their answers. `known`: how many
    events of the ledger the model of a round's plan knew (`history.events_of_plans`).
    """
    first: dict[str, PlannedTask] = {}
    for task in plans:
        before = first.get(task.item_id)
        if task.part == "pool" and (before is None or task.first_round < before.first_round):
            first[task.item_id] = task
    return {
        item: ModelForecast(task.forecast, known.get(task.first_round))
        for item, task in sorted(first.items())
        if task.forecast
    }


def override(layout: Layout, overrides: dict[str, Any]) -> None:
    """Replace the settings of the batch being built; what depends on a changed setting is built again."""
    known = read_object(layout.overrides)
    wanted = {name: value for name, value in known.items() if name not in ("size", "strategy")} | overrides
    if known != wanted:
        write_json(layout.overrides, wanted)


def check_sources(layout: Layout, dvc: Dvc) -> None:
    """Raise UnexpectedChange, naming the files, if data that only the engine writes differ from git's records.

    Compares bytes; DVC's state is not trusted. Raises RemoteIncomplete if the data came damaged from the DVC remote.
    """
    unlike = _unlike(layout, dvc)
    if not unlike:
        return
    if here := [name for name in unlike if (layout.root / name).exists()]:
        _blame(layout, dvc, here)
    if absent := [name for name in unlike if name not in here]:
        raise UnexpectedChange(_not_here(layout, ", ".join(absent)))


def check_kept(layout: Layout, dvc: Dvc) -> None:
    """Raise UnexpectedChange if a recorded part was changed or removed; unrecorded parts are accepted.

    For use during a close, which may have been killed: the parts that it adds are not recorded yet. Raises
    RepositoryError if neither the cache nor the remote can tell.
    """
    changed = [one for one in _parts_unlike(layout, dvc) if one.here != "extra"]
    if unknown := [one.name for one in changed if one.here == "unknown"]:
        raise RepositoryError(
            f"neither DVC's cache nor the DVC remote has {', '.join(unknown)}, so new data cannot be told from "
            "changed data; `al doctor` checks the remote"
        )
    if changed:
        raise UnexpectedChange(
            f"changed while the round was being closed: {_listed(changed)}. `dvc checkout --force "
            f"{' '.join(one.name for one in changed)}` in {layout.root} restores what was recorded (after a `dvc "
            "fetch`, if the cache lacks it), and `al round` continues"
        )


def refuse_changed(layout: Layout, dvc: Dvc) -> None:
    """Raise, naming the files, if a recorded part of the ledger, the pool or the test set is missing or changed.

    For readers, perhaps while a tick adds parts. Raises UnexpectedChange if a part is absent or holds other bytes,
    RemoteIncomplete if it came damaged from the DVC remote, RepositoryError if neither cache nor remote can tell.
    """
    if gone := [name for name in absent_sources(layout) if layout.root / name != layout.encoder]:
        raise UnexpectedChange(_not_here(layout, ", ".join(gone)))
    unlike = _parts_unlike(layout, dvc)
    if changed := {PurePosixPath(one.name).parent for one in unlike if one.here == "other"}:
        _blame(layout, dvc, sorted(map(str, changed)))
    if absent := [one for one in unlike if one.here == "absent"]:
        raise UnexpectedChange(_not_here(layout, _listed(absent)))
    if unknown := [one.name for one in unlike if one.here == "unknown"]:
        raise RepositoryError(
            f"neither DVC's cache nor the DVC remote has {', '.join(unknown)}, so changes to the data cannot be "
            "detected; `al doctor` checks the remote"
        )


def _parts_unlike(layout: Layout, dvc: Dvc) -> list[Different]:
    """The files of ledger, pool and test set that differ from their records, in folders that exist here."""
    pointers = [pointer_of(path) for path in (layout.events, layout.pool, layout.test) if path.exists()]
    names = [str(pointer.relative_to(layout.root)) for pointer in pointers if pointer.exists()]
    return dvc.differences(*names) if names and dvc.unlike(*names) else []


def _not_here(layout: Layout, files: str) -> str:
    return f"missing here: {files}; `dvc pull` in {layout.root} fetches it"


def _blame(layout: Layout, dvc: Dvc, names: Sequence[str]) -> NoReturn:
    """Raise an error that names the cause of changed data (a local edit, the remote, this clone's disk) and a fix."""
    try:
        found = dvc.differences(*(f"{name}.dvc" for name in names))
    except RepositoryError:
        found = []
    files = ", ".join(names)
    again = f"delete {files} in {layout.root}, and the next `al round` fetches it again"
    if bad := [one for one in found if one.alike and one.remote == "other"]:
        raise RemoteIncomplete(
            f"{_listed(bad)} came damaged from the DVC remote: the content of object {bad[0].object} does not match "
            "git's records; nothing was built from it. `al remote repair` in a clone that has the right data repairs "
            f"the remote; then {again}"
        )
    if bad := [one for one in found if one.alike and one.cache == "other"]:
        raise UnexpectedChange(
            f"{_listed(bad)} is damaged here, and so is its copy in DVC's cache (a disk error, or an edit through a "
            f"link); the DVC remote {_has(bad)}. Copy what you want to keep, then {again}"
        )
    if found and all(one.here == "absent" for one in found):
        raise UnexpectedChange(_not_here(layout, _listed(found)))
    changed = [one for one in found if one.here in ("other", "extra")]
    raise UnexpectedChange(
        f"changed by somebody else: {_listed(changed) if changed else files}. After a `git pull`, `dvc pull` fetches "
        f"the matching data; otherwise `dvc diff` in {layout.root} shows the change, and `dvc checkout --force "
        f"{' '.join(names)}` discards it"
    )


def _listed(files: Sequence[Different]) -> str:
    names = [one.name for one in files]
    return ", ".join([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])])


def _has(files: Sequence[Different]) -> str:
    """Say whether the remote has the right bytes of all `files`."""
    if all(one.remote == "good" for one in files):
        return "has it undamaged"
    return "cannot be reached" if any(one.remote == "unknown" for one in files) else "no longer has it"


def foreign_edits(layout: Layout, git: Git) -> list[str]:
    """Files that the engine owns and that differ from the last commit; for use between builds.

    Excludes the Label Studio projects, interventions and reviews: each is written and then committed on its own, and a
    kill in between leaves it uncommitted. Of live plans, it excludes what was appended since the last commit.
    """
    alone = (layout.project, layout.interventions, layout.review_project, layout.reviews)
    own = {path.relative_to(layout.root).as_posix() for path in alone}
    found = [name for name in git.changed(layout.owned) if not own & {name, str(PurePosixPath(name).parent)}]
    found = [name for name in found if live_number(name) is None or not _only_appended(layout, git, name)]
    same = set(converted(layout, git, found)) if found else set()  # differ only by git's conversion of line endings
    return [name for name in found if name not in same]


def _only_appended(layout: Layout, git: Git, name: str) -> bool:
    """Whether a live plan is what was committed, and what was appended since."""
    try:
        now = (layout.root / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return now.startswith(git.show("HEAD", name) or "")


def refuse_edits(changed: Collection[str]) -> None:
    """Raise UnexpectedChange, naming the files, if there are any."""
    if changed:
        raise UnexpectedChange(
            f"changed by somebody else: {', '.join(sorted(changed)[:5])}. `git diff` shows the change; `git checkout "
            "-- FILE` (or deleting a file that git does not track) undoes it"
        )


def pull_missing_sources(layout: Layout, dvc: Dvc) -> None:
    """Pull sources that are recorded but missing, as in a fresh clone; edited ones stay as they are.

    Raises RemoteIncomplete if the remote lacks one or has other bytes under its name.
    """
    if absent := [name for name in _unlike(layout, dvc) if _is_absent(layout, dvc, name)]:
        dvc.pull(*(f"{name}.dvc" for name in absent))


def absent_sources(layout: Layout) -> list[str]:
    """Sources that are recorded but do not exist here, as in a fresh clone."""
    return [
        path.relative_to(layout.root).as_posix()
        for path in layout.sources
        if pointer_of(path).exists() and not path.exists()
    ]


def _is_absent(layout: Layout, dvc: Dvc, name: str) -> bool:
    """Whether files of a source are missing (all, or some after a killed pull) and none of the others differs."""
    if not (layout.root / name).exists():
        return True
    try:
        found = dvc.differences(f"{name}.dvc")
    except RepositoryError:
        return False
    return bool(found) and all(one.here == "absent" for one in found)


def _unlike(layout: Layout, dvc: Dvc) -> list[str]:
    """Sources that differ from git's records or are missing."""
    tracked = [str(pointer.relative_to(layout.root)) for pointer in layout.pointers if pointer.exists()]
    return dvc.unlike(*tracked) if tracked else []


def _move_parts(inbox: Path, target: Path) -> None:
    arrived = list(_parts(inbox))
    there = list(target.glob("part-*.parquet")) if arrived else []
    sizes = {path.stat().st_size for path in arrived}
    known = {sha256_file(path) for path in there if path.stat().st_size in sizes}  # others cannot be equal
    first = 1 + max((int(path.stem.removeprefix("part-")) for path in there), default=0)
    for number, path in enumerate(arrived, start=first):
        if sha256_file(path) in known:
            path.unlink()
        else:
            path.replace(target / f"part-{number:06d}.parquet")


def _parts(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.parquet"))
