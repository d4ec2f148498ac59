"""Draw the test set at random: from the first items ingested, or, before the first round, again from all items."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from al_pipeline.annotation.active_events import superseded
from al_pipeline.data.catalog import draw_test, drawn_size
from al_pipeline.data.ledger import add_to_inbox, read_events
from al_pipeline.data.pool import iter_items, list_parts, write_items
from al_pipeline.errors import NothingToDo
from al_pipeline.operations.close import next_round
from al_pipeline.operations.ingestion.intake import Intake
from al_pipeline.operations.ingestion.staging import commit, drawn_parts, finish_ingest, staging_folder
from al_pipeline.records import Event, Item, Part
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

_GIVEN = b""
"""Placeholder digest for an item of a given test file, which is not drawn again."""


def draw_from_new(taken: Intake, size: int, seed: int) -> tuple[int, list[str]]:
    """Draw a test set of `size` from the new items if there is none; return its size and messages for the user."""
    known, first = taken.known, taken.first_new
    corrections = {number for number in taken.corrected.values() if number >= first}
    new = len(known) - first - len(corrections)
    if taken.had_test or not new or size == 0:
        return 0, []
    count = drawn_size(size, new)
    digests = (digest for number, digest in enumerate(known.digests(first), first) if number not in corrections)
    for number in known.find_contents(b"".join(draw_test(digests, count, seed))).tolist():
        known.move_to_test(number)
    if count == size:
        return count, []
    if count == 0:
        return 0, ["too few items to draw a test set from; the next ingest draws one from the items that it adds"]
    return count, [
        f"the test set has {count:,} items, not {size:,}: at most a fifth of {new:,} new items; add more with "
        "`al ingest --test FILE`"
    ]


def redraw_test(workspace: Workspace, test_size: int | None = None, *, again: bool = True) -> int:
    """Draw the test set again from all ingested items except those of given test files; return how many were drawn.

    With `again` False, also draw if none was drawn before. `test_size` defaults to `ingest.test_size`. Possible only
    before the first round, before anything was asked. Call it while holding the workspace's lock. Raises NothingToDo
    if the first round has begun, or if `again` and no test set was drawn before.
    """
    layout, params = workspace.layout, workspace.params
    finish_ingest(layout)
    before = _before(layout, again)
    with staging_folder(layout) as staging:
        drawn_before = staging / "before"
        drawn_before.mkdir()
        for path in before:
            shutil.copyfile(path, drawn_before / path.name)
        folders = [layout.inbox_pool, drawn_before]
        size = params.ingest.test_size if test_size is None else test_size
        redrawn = _Redrawn.draw(folders, read_events(layout.inbox_events), size, params.seed)
        written = [
            write_items(staging / part / "new.parquet", _only(folders, redrawn, part)) for part in redrawn.parts()
        ]
        assert sum(written) == sum(len(batch) for batch in iter_items(folders))
        add_to_inbox(staging / "events", [redrawn.moved(event) for event in read_events(layout.inbox_events)])
        old = [*list_parts([layout.inbox_pool]), *before, *layout.inbox_events.glob("pull-*.jsonl")]
        commit(layout, staging, drawn=True, drop=old)
    return len(redrawn.drawn)


@dataclass(frozen=True)
class _Redrawn:
    """Which items are in the test set after it was drawn again, by content digest."""

    drawn: frozenset[bytes]
    known: frozenset[bytes]
    corrected: dict[str, bytes]
    """Item with a corrected text -> digest of its correction, whose part it shares; _GIVEN if from a test file."""

    @classmethod
    def draw(cls, folders: list[Path], events: Iterable[Event], size: int, seed: int) -> _Redrawn:
        """Draw `size` of the items in `folders`. Items with corrected texts are not drawn but follow the correction."""
        corrected = superseded(events)
        right = set(corrected.values())
        items = partial(_items, folders)
        found = {item.item_id: _digest(item) for item in items() if item.item_id in right}
        moved = {item: found.get(now, _GIVEN) for item, now in corrected.items()}
        digests = [_digest(item) for item in items() if item.item_id not in moved]
        drawn = draw_test(digests, drawn_size(size, len(digests)), seed)
        return cls(frozenset(drawn), frozenset({*moved.values(), *digests}), moved)

    def parts(self) -> tuple[Part, ...]:
        """The parts that have items."""
        return ("pool", "test") if self.drawn or _GIVEN in self.corrected.values() else ("pool",)

    def part(self, item_id: str, digest: bytes) -> Part:
        """The part to which an item belongs."""
        digest = self.corrected.get(item_id, digest)
        return "test" if digest == _GIVEN or digest in self.drawn else "pool"

    def moved(self, event: Event) -> Event:
        """Return `event` with the part where its item is now."""
        digest = self.corrected.get(event.item_id, bytes.fromhex(event.content_hash))
        return replace(event, part=self.part(event.item_id, digest)) if digest in self.known else event


def _before(layout: Layout, again: bool) -> list[Path]:
    """The Parquet parts of the test set drawn before. Raises NothingToDo if it must not be drawn again."""
    if layout.closing.exists() or next_round(layout) is not None:
        raise NothingToDo(
            "the first round has begun, so the test set can no longer be redrawn; `al ingest --test FILE` adds to it"
        )
    before = drawn_parts(layout) or []
    if again and not before:
        raise NothingToDo("no test set has been drawn yet; the first `al ingest FILE` draws one")
    return before


def _items(folders: Collection[Path]) -> Iterator[Item]:
    for batch in iter_items(folders):
        yield from batch


def _only(folders: Collection[Path], redrawn: _Redrawn, part: Part) -> Iterator[list[Item]]:
    for batch in iter_items(folders):
        yield [item for item in batch if redrawn.part(item.item_id, _digest(item)) == part]


def _digest(item: Item) -> bytes:
    return bytes.fromhex(item.content_hash)
