"""Turn rows into items: check each row and compare its id and content with the known items."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

from al_pipeline.annotation.answers import IMPORT_ROUND
from al_pipeline.data.catalog import (
    HASH_ID_CHARACTERS,
    ID_CHARACTERS,
    Catalog,
    item_id_from,
    item_ids_from,
    text_from,
)
from al_pipeline.data.json_columns import json_object, json_objects
from al_pipeline.data.ledger import read_events
from al_pipeline.data.pool import item_batch, read_ids
from al_pipeline.data.table_rows import BadRow, Block, Row, excerpt
from al_pipeline.operations.ingestion.corrections import CORRECTION, PastCorrections
from al_pipeline.operations.ingestion.labels import IMPORT_ANNOTATOR, ImportedLabels
from al_pipeline.operations.ingestion.rejects import Refused
from al_pipeline.operations.schema import former_classes
from al_pipeline.records import Event, Item, Part, content_hash, event_digest
from al_pipeline.sanitize import storable
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_CHARACTERS = 1_000_000
_KNOWN_AT_ONCE = 10_000
ANOTHER_TEXT = "the id belongs to another text"
"""Reason for rejecting a row whose id is known with another text."""
TWO_TEXTS = "the id has another text in an earlier row"
"""Reason for rejecting a row of corrections: it is unknown which of the two texts is right."""
ANOTHERS_TEXT = "the corrected text is there already, under another id"
CORRECTED_TEXT = "the text is there, but was corrected under another id"
MOST_COMPARED = 1000
"""Maximum number of texts under a known id that are kept for comparison with the known text."""
_LONGEST_COMPARED = 20_000
"""Maximum length of such a text, in characters."""


class Columns(Struct, frozen=True):
    """The columns with text, id and label. `id` None: the column `id`, if there is one; `label` None: no labels."""

    text: str
    id: str | None
    label: str | None

    @property
    def required(self) -> list[str]:
        """The columns that every file must have."""
        return [name for name in (self.text, self.id, self.label) if name is not None]


@dataclass(slots=True)
class Intake:
    """Decides on one row after the other, given the known items and the earlier rows; writes no files."""

    workspace: Workspace
    columns: Columns
    part: Part
    corrections: bool = False
    rows: int = 0
    duplicates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    labels_rejected: Counter[str] = field(default_factory=Counter)
    known: Catalog = field(init=False)
    first_new: int = field(init=False)
    """Number of the first new item: those with a smaller one were known before."""
    had_test: bool = field(init=False)
    other_texts: dict[str, str] = field(default_factory=dict)
    """The first MOST_COMPARED texts under an id that is known with another text, by id."""
    corrected: dict[str, int] = field(default_factory=dict)
    """User's ids whose text these files correct -> number of the item with the new text."""
    new_corrections: int = 0
    """Number of items that are new because of a correction."""
    had_id: bool = False
    """Whether any row had an id."""
    _files: list[str] = field(default_factory=list)
    _labels: ImportedLabels = field(init=False)
    _past: PastCorrections = field(init=False)
    _given: bytearray = field(init=False)
    """For each item that was known before, whether these files gave its id a text."""

    def __post_init__(self) -> None:
        layout = self.workspace.layout
        self.known = known_items(layout)
        self.first_new = len(self.known)
        self.had_test = self.known.test_items > 0
        self._labels = ImportedLabels(self.workspace.params.schema_, former_classes(self.workspace.layout))
        self._labels.add_items(self.first_new)
        self._past = PastCorrections(read_events(layout.events, layout.inbox_events))
        self._given = bytearray(self.first_new)

    def open_file(self, name: str) -> None:
        """Start a file: the following rows are from it."""
        self._files.append(excerpt(name))

    def take(self, row: Row | BadRow) -> tuple[Item | None, Refused | None]:
        """Process a row; return the new item, if there is one, and why the row or its label was refused, if so."""
        self.rows += 1
        try:
            if isinstance(row, BadRow):
                raise Refused(row.reason, row.detail)
            corrected = len(self.corrected)
            number, item = self._item(row.values)
        except Refused as refused:
            self.rejected[refused.reason] += 1
            return None, refused
        if item is None and len(self.corrected) == corrected:
            self.duplicates += 1
        try:
            if self.columns.label is not None:
                self._labels.add(number, row.values.get(self.columns.label), len(self._files) - 1)
        except Refused as refused:
            self.labels_rejected[refused.reason] += 1
            return item, refused
        return item, None

    def take_block(self, block: Block) -> tuple[pa.RecordBatch, list[tuple[Row, Refused]]] | None:
        """Process a block as `take` does its rows: the new items, and the rows whose label was refused, each with why.

        None, and nothing is done, if a row needs a closer look: one that must be refused, perhaps, or a correction.
        """
        found = self._look_up(block)
        if found is None:
            return None
        numbers, new = found
        self.rows += len(block)
        self.duplicates += len(block) - len(new.item_ids)
        self.had_id |= any(map(operator.ne, new.item_ids, new.derived_ids))
        self.known.add_many(new.item_ids, bytes.fromhex("".join(new.content_hashes)), self.part)
        self._labels.add_items(len(new.item_ids))
        refused: list[tuple[Row, Refused]] = []
        if self.columns.label is not None and self.columns.label in block.columns:
            for row, (number, cell) in enumerate(zip(numbers, block.columns[self.columns.label], strict=True)):
                try:
                    self._labels.add(number, cell, len(self._files) - 1)
                except Refused as error:
                    self.labels_rejected[error.reason] += 1
                    refused.append((block.row(row), error))
        return item_batch(new.item_ids, new.content_hashes, new.texts, new.metadata), refused

    def _look_up(self, block: Block) -> tuple[list[int], _NewItems] | None:
        """The number of each row's item, and the items that are new; None if a row needs a closer look."""
        texts = block.columns.get(self.columns.text)
        if self.corrections or texts is None or not _are_texts(texts, self.workspace.params.ingest.max_characters):
            return None
        hashes = list(map(content_hash, texts))
        numbers: list[int] = self.known.find_contents(bytes.fromhex("".join(hashes))).tolist()
        if any(number >= 0 and self._needs_look(number) for number in set(numbers)):
            return None
        first_rows = dict(zip(reversed(hashes), reversed(range(len(hashes))), strict=True))
        fresh = sorted(row for row in first_rows.values() if numbers[row] < 0)
        new = _new_items(block, fresh, [hashes[row] for row in fresh], self.columns)
        if new is None or self.known.has_any_id(new.item_ids):
            return None
        numbered = dict(zip(new.content_hashes, count(len(self.known)), strict=False))
        return [known if known >= 0 else numbered[found] for known, found in zip(numbers, hashes, strict=True)], new

    def _needs_look(self, number: int) -> bool:
        """Whether a row with the text of a known item may be refused, or be more than a duplicate."""
        if self.part == "test" and self.known.part(number) == "pool":
            return True
        return bool(self._past.superseded) and self.known.item_id(number) in self._past.superseded

    def events(self) -> Iterator[Event]:
        """Yield an event per correction, then per new or changed label, in the order of the items."""
        yield from self._correction_events()
        if self.columns.label is not None:
            layout = self.workspace.layout
            events = read_events(layout.events, layout.inbox_events)
            latest = {event.annotation_key: event for event in events if event.type == "import"}
            yield from self._labels.events(self.known, latest, self._files)

    def _item(self, values: Mapping[str, Any]) -> tuple[int, Item | None]:
        """The number of a row's item, and the item if it is new. Raises Refused."""
        text = self._text(values)
        content = content_hash(text)
        digest = bytes.fromhex(content)
        number = self.known.find_content(digest)
        if number is not None:
            if self.part == "test" and self.known.part(number) == "pool":
                raise Refused("the same text is in the pool", f"as item {self.known.item_id(number)}")
            if not self.corrections and self.known.item_id(number) not in self._past.superseded:
                return number, None
        id_column = self.columns.id or "id"
        try:
            item_id = item_id_from(values.get(id_column), content)
        except ValueError as error:
            if number is not None:
                return number, None
            raise Refused(str(error)) from None
        has_id = item_id != item_id_from(None, content)
        self.had_id |= has_id
        metadata_of = partial(_metadata, values, {self.columns.text, id_column, self.columns.label})
        if self.corrections and has_id and (old := self.known.find_id(self._past.root(item_id))) is not None:
            return self._correct(old, number, digest, text, metadata_of)
        if number is not None:
            self._refuse_corrected(number, item_id, has_id)
            return number, None
        self._refuse_another_text(item_id, text)
        return self._new(item_id, digest, text, metadata_of(), self.part)

    def _text(self, values: Mapping[str, Any]) -> str:
        try:
            return text_from(values.get(self.columns.text), self.workspace.params.ingest.max_characters)
        except ValueError as error:
            raise Refused(*error.args) from None

    def _refuse_corrected(self, number: int, item_id: str, has_id: bool) -> None:
        """Raise Refused if a known text was corrected under another id than the row's."""
        known_as = self.known.item_id(number)
        if has_id and known_as in self._past.superseded and self._past.root(item_id) != self._past.root(known_as):
            raise Refused(CORRECTED_TEXT, f"as item {known_as}")

    def _refuse_another_text(self, item_id: str, text: str) -> None:
        """Raise Refused if the id is known with another text than the row's."""
        if self.known.find_id(item_id) is not None:
            if len(self.other_texts) < MOST_COMPARED and len(text) <= _LONGEST_COMPARED:
                self.other_texts.setdefault(item_id, text)
            raise Refused(ANOTHER_TEXT, item_id)

    def _new(self, item_id: str, digest: bytes, text: str, metadata: str, part: Part) -> tuple[int, Item]:
        number = self.known.add(item_id, digest, part)
        self._labels.add_items(1)
        return number, Item(item_id, digest.hex(), text, metadata)

    def _correct(
        self, old: int, number: int | None, digest: bytes, text: str, metadata: Callable[[], str]
    ) -> tuple[int, Item | None]:
        """Give the id of item `old` another text, that of item `number` if it is known; return number and new item.

        Raises Refused, also if these files give an id two texts: ingesting them again must change nothing.
        """
        root = self.known.item_id(old)
        if number == self._now(root, old):
            if old < self.first_new:
                self._given[old] = 1
            return number, None
        if old >= self.first_new or self._given[old]:
            raise Refused(TWO_TEXTS, root)
        family = self._past.families.get(root, {root: None})
        if number is not None and self.known.item_id(number) not in family:
            raise Refused(ANOTHERS_TEXT, f"as item {self.known.item_id(number)}")
        item = None
        if number is None:
            item_id = next(name for n in count(2) if self.known.find_id(name := f"{root}~{n}") is None)
            if len(item_id) > ID_CHARACTERS:
                raise Refused(
                    f"the id is too long for a correction: {item_id!r} has more than {ID_CHARACTERS} characters"
                )
            number, item = self._new(item_id, digest, text, metadata(), self.known.part(old))
            self.new_corrections += 1
        self._given[old] = 1
        self.corrected[root] = number
        return number, item

    def _now(self, root: str, old: int) -> int:
        """The number of the item with the current text of an id."""
        if root in self.corrected:
            return self.corrected[root]
        known = self.known.find_id(self._past.now.get(root, root))
        return old if known is None else known

    def _correction_events(self) -> Iterator[Event]:
        for root, number in self.corrected.items():
            item_id, content = self.known.item_id(number), self.known.digest(number).hex()
            family = {**self._past.families.get(root, {root: None}), item_id: None}
            previous = self._past.last.get(root)
            yield Event(
                event_id=event_digest("correct", root, content, previous),
                type="correct",
                item_id=item_id,
                content_hash=content,
                part=self.known.part(number),
                round=IMPORT_ROUND,
                annotation_key=f"{CORRECTION}{root}",
                annotator=IMPORT_ANNOTATOR,
                reason=f"the text of {root} was corrected",
                targets=tuple(name for name in family if name != item_id),
                previous=previous,
                origin=self._files[-1],
            )


class _NewItems(NamedTuple):
    """New items by column, (n,) each; `derived_ids`: those that they would have without the user's."""

    item_ids: Sequence[str]
    derived_ids: Sequence[str]
    content_hashes: Sequence[str]
    texts: Sequence[str]
    metadata: Sequence[str]


def _new_items(block: Block, rows: Sequence[int], hashes: Sequence[str], columns: Columns) -> _NewItems | None:
    """Some rows of a block as items, if all can be and their ids differ; else None."""
    if not rows:
        return _NewItems((), (), (), (), ())
    values = block.columns
    if len(rows) < len(block):
        values = {name: [column[row] for row in rows] for name, column in values.items()}
    id_column = columns.id or "id"
    derived = [found[:HASH_ID_CHARACTERS] for found in hashes]
    try:
        ids = item_ids_from(values[id_column], hashes) if id_column in values else derived
        apart = {columns.text, id_column, columns.label}
        metadata = json_objects({name: column for name, column in values.items() if name not in apart}, len(rows))
    except (ValueError, RecursionError):
        return None
    if len(set(ids)) < len(ids) or max(map(len, metadata)) > METADATA_CHARACTERS:
        return None
    return _NewItems(ids, derived, hashes, values[columns.text], metadata)


def _are_texts(values: Sequence[Any], longest: int) -> bool:
    """Whether `text_from` raises for none of the values."""
    return (
        set(map(type, values)) == {str}
        and max(map(len, values)) <= longest
        and all(map(str.strip, values))
        and storable("".join(values))
    )


def known_items(layout: Layout) -> Catalog:
    """The items of the pool, the test set and their inboxes."""
    known = Catalog()
    parts: tuple[tuple[Part, tuple[Any, Any]], ...] = (
        ("pool", (layout.pool, layout.inbox_pool)),
        ("test", (layout.test, layout.inbox_test)),
    )
    for part, folders in parts:
        keys = read_ids(folders)
        ids = keys.ids()
        for start in range(0, len(keys), _KNOWN_AT_ONCE):
            digests = keys.content_hashes[start : start + _KNOWN_AT_ONCE]
            names = list(islice(ids, len(digests)))
            if len(set(map(bytes, digests))) == len(digests) and (known.find_contents(digests.tobytes()) < 0).all():
                known.add_many(names, digests.tobytes(), part)
                continue
            for item_id, digest in zip(names, digests, strict=True):
                if known.find_content(digest.tobytes()) is None:
                    known.add(item_id, digest.tobytes(), part)
    return known


def _metadata(values: Mapping[str, Any], apart: set[str | None]) -> str:
    """Encode the columns that are not in `apart` as JSON. Raises Refused if that cannot be stored."""
    others = {name: value for name, value in values.items() if name not in apart}
    try:
        metadata = json_object(others)
    except (ValueError, RecursionError) as error:
        raise Refused("the other columns cannot be kept as JSON", excerpt(str(error))) from None
    if len(metadata) > METADATA_CHARACTERS:
        raise Refused(f"the other columns hold more than {METADATA_CHARACTERS:,} characters", f"{len(metadata):,}")
    if not storable(metadata):
        raise Refused("the other columns hold half a surrogate pair, which UTF-8 cannot store")
    return metadata
