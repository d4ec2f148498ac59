"""Take logged requests into the pool, at every tick (`traffic` in params.yaml), and keep their log in order.

Each tick considers the texts that were logged since the one before. What is chosen is first written to a file beside
the log, which the next tick takes in if this one is killed: known content is not added twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from al_pipeline.data.catalog import Catalog, text_from
from al_pipeline.data.inputs import Source
from al_pipeline.data.pool import count_items
from al_pipeline.data.served import SOURCE
from al_pipeline.errors import AlError
from al_pipeline.files import read_object, write_json, write_jsonl
from al_pipeline.operations.drift_looks import read_looks
from al_pipeline.records import content_hash, round_name
from al_pipeline.traffic.choice import Chosen, Policy, choose
from al_pipeline.traffic.rows import LoggedText
from al_pipeline.traffic.store import TrafficStore
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

TAKING = "taking-*.jsonl"
_SETTLED = 5_000_000
"""Microseconds after which no line with an earlier time is written any more."""
_AT_ONCE = 4096


def take_traffic(workspace: Workspace, now: float) -> tuple[int, list[str]]:
    """Take texts into the pool as `traffic` says; return the number of new items, and messages for the user.

    Also turns the journals of ended servers into segments, and deletes what is older than `serve.log.days`. `now`:
    seconds since 1970. Call it while holding the workspace's lock.
    """
    layout, settings = workspace.layout, workspace.params.serve.log
    store = TrafficStore(layout.traffic)
    try:
        store.convert()
        store.retain(settings.days, int(settings.max_mb * 1e6), now)
        _choose(workspace, store, int(now * 1e6) - _SETTLED)
        _choose_novel(workspace, store)
        return sum(_take(workspace, path) for path in sorted(layout.traffic.glob(TAKING))), []
    except (AlError, OSError) as error:
        return 0, [f"logged requests were not taken into the pool: {error}"]


def taken(layout: Layout) -> dict[str, int]:
    """How many texts were chosen so far, by policy."""
    found = read_object(_state(layout))
    return {policy: int(found.get(policy, 0)) for policy in get_args(Policy)}


def _state(layout: Layout) -> Path:
    return layout.traffic / "taken.json"


def _choose(workspace: Workspace, store: TrafficStore, until: int) -> None:
    """Choose texts of the time since the last choice, and write them to a file that is then taken in."""
    layout, settings = workspace.layout, workspace.params.traffic
    state = read_object(_state(layout))
    since = max([int(state.get("until", 0)), *(_until(path) for path in layout.traffic.glob(TAKING))])
    # a test set that is not there yet is drawn from the user's files, not from requests
    test = settings.test if settings.test and count_items([layout.test, layout.inbox_test]) else 0
    if until <= since or not (settings.random or settings.uncertain or test):
        return
    seed = f"{workspace.params.seed} {until} "
    rows = _new(store.rows(since, until), workspace)
    chosen = choose(rows, settings.random, settings.uncertain, seed, test)
    for part in ("test", "pool"):
        rows_of_part = [_row(one) for one in chosen if (one.policy == "test") == (part == "test")]
        if rows_of_part:
            write_jsonl(layout.traffic / f"taking-{until:016d}-{part}.jsonl", rows_of_part)
    _remember(layout, chosen, until=until)


def _choose_novel(workspace: Workspace, store: TrafficStore) -> None:
    """Choose the texts least like the pool by the newest look, once, if it gave an alarm; write them to such a file."""
    layout, most = workspace.layout, workspace.params.traffic.novel
    if not most or not layout.drift.exists():
        return
    found = read_looks(layout)
    look, state = None if found is None else found.look, read_object(_state(layout))
    if look is None or state.get("novel_of") == look.until:
        return
    names = frozenset(look.newest[:most])
    rows = store.rows(int(look.since * 1e6), int(look.until * 1e6)) if names else ()
    asked = (row for row in rows if f"{row.request_id}:{row.place}" in names)
    new = {digest: Chosen(row, "novel", 1) for digest, row in _new(asked, workspace)}
    if new:  # named by the last choice, of whose window it says nothing
        until = int(state.get("until", 0))
        write_jsonl(layout.traffic / f"taking-{until:016d}-novel.jsonl", map(_row, new.values()))
    _remember(layout, new.values(), novel_of=look.until)


def _remember(layout: Layout, chosen: Collection[Chosen], **more: float) -> None:
    """Count what was chosen, and note up to when."""
    counts = {policy: count + sum(one.policy == policy for one in chosen) for policy, count in taken(layout).items()}
    write_json(_state(layout), {**read_object(_state(layout)), **more, **counts}, 0o600)


def _until(path: Path) -> int:
    """The end of the window that a file of chosen texts is from."""
    with contextlib.suppress(ValueError):
        return int(path.stem.split("-")[1])
    return 0


def _new(rows: Iterable[LoggedText], workspace: Workspace) -> Iterator[tuple[bytes, LoggedText]]:
    """The rows whose text is neither in the pool nor in the test set and may be, each with its content's digest."""
    known: Catalog | None = None
    batch: list[tuple[bytes, LoggedText]] = []

    def unknown() -> Iterator[tuple[bytes, LoggedText]]:
        nonlocal known
        if batch:
            if known is None:
                from al_pipeline.operations.ingestion.intake import known_items

                known = known_items(workspace.layout)
            numbers = known.find_contents(b"".join(digest for digest, _ in batch)).tolist()
            yield from (found for found, number in zip(batch, numbers, strict=True) if number < 0)
            batch.clear()

    for row in rows:
        try:
            text = text_from(row.text, workspace.params.ingest.max_characters)
        except ValueError:
            continue
        batch.append((bytes.fromhex(content_hash(text)), row))
        if len(batch) == _AT_ONCE:
            yield from unknown()
    yield from unknown()


def _row(one: Chosen) -> dict[str, Any]:
    """The row that is ingested: the text, and columns that say where it is from."""
    row = one.row
    about = {
        "policy": one.policy,
        "request_id": row.request_id,
        "time": datetime.fromtimestamp(row.time / 1e6, UTC).isoformat(timespec="milliseconds"),
        "round": round_name(row.round),
        "predicted": row.label,
        "probability": row.probability,
        "times": one.times,
    }
    if one.propensity is not None:
        about["propensity"] = one.propensity
    return {"text": row.text, "source": SOURCE, "traffic": about}


def _take(workspace: Workspace, path: Path) -> int:
    """Ingest a file of chosen texts; return how many were new."""
    from al_pipeline.operations.ingest import ingest

    layout = workspace.layout
    added = 0
    if path.stat().st_size:  # else all of them were deleted meanwhile
        test = path.stem.endswith("-test")
        size = None if test or count_items([layout.test, layout.inbox_test]) else 0
        source = Source(path, name="serve.log", format="jsonl", encoding="utf-8")
        report = ingest(workspace, [source], test=test, test_size=size)
        added = report.added + report.test_added
    path.unlink()
    return added
