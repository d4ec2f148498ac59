"""Take users' files into the inbox: new items, the test set, labels that they already have.

Everything is staged in a folder of its own; `commit.json` there, written last, is the moment from which all of it
counts. Killed before, nothing happened; killed after, the next ingest or tick finishes the moves. Dedupe by content
makes the same command harmless afterwards.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any, TypeVar

from al_pipeline.annotation.aggregation import IMPORT_ROUND, active, superseded
from al_pipeline.data.catalog import (
    ID_CHARACTERS,
    Catalog,
    draw_test,
    drawn_size,
    item_id_from,
    label_from,
    storable,
    text_from,
)
from al_pipeline.data.inputs import WANTED, Source, Stamp, open_inputs, stamp_of
from al_pipeline.data.ledger import add_to_inbox, read_events
from al_pipeline.data.pool import count_items, fetch, iter_items, list_parts, read_ids, write_items
from al_pipeline.data.tables import BadRow, Progress, Row, check_readable, excerpt, read_table
from al_pipeline.errors import BadInput, NothingToDo, UnusableFile, UsageError
from al_pipeline.files import (
    json_line,
    make_folder,
    move,
    read_json,
    read_object,
    remove_leftovers,
    sha256_file,
    write_json,
)
from al_pipeline.integrations.git import Git
from al_pipeline.operations.close import next_round
from al_pipeline.operations.history import read_history
from al_pipeline.operations.schema import check_schema
from al_pipeline.records import Event, Item, Part, content_hash, event_digest
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

_T = TypeVar("_T")

METADATA_CHARACTERS = 1_000_000
IMPORT_ANNOTATOR = "import"

_STAGING = ".ingest"
_COMMIT = "commit.json"
_DRAWN = "drawn.json"
"""In the inbox: which of its parts of the test set were drawn, and not given."""
_MOST_REJECTS = 100_000
"""Lines of a rejects file; what is rejected beyond them is counted alone."""
ANOTHER_TEXT = "the id belongs to another text"
"""Why a row is rejected whose id is known with a text that is not this one."""
TWO_TEXTS = "the id has another text in an earlier row"
"""Why a row of corrections is rejected: which of the two is right cannot be known."""
ANOTHERS_TEXT = "the corrected text is there already, under another id"
CORRECTED_TEXT = "the text is there, but was corrected under another id"
_MOST_COMPARED = 1000
_LONGEST_COMPARED = 20_000
"""Characters."""
_CORRECTION = "correction:"
_GIVEN = b""
"""Stands for the content of a test set that was given, and is not drawn again."""
_NO_LABEL = 0
_CONTRADICTION = 0xFFFF


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What became of the rows of one ingest: rows = added + test_added + corrected + duplicates + rejected."""

    rows: int
    added: int
    """New items of the pool."""
    test_added: int
    """New items of the test set, given or drawn."""
    drawn: bool
    """Whether the test set was drawn at random just now."""
    duplicates: int
    """Rows whose content was there already; the first one stays, with its id."""
    rejected: Mapping[str, int]
    """Rows that were not taken, by reason."""
    labels: int
    """Labels that are new, or differ from what was imported before."""
    labels_rejected: Mapping[str, int]
    """Labels that were not taken, by reason, though their items were."""
    rejects_file: Path | None
    """One JSON object for each of them: file, line (CSV, JSONL) or row (Parquet, XLSX), reason, detail, its begin."""
    corrected: int = 0
    """Ids that have another text now, in the pool or in the test set."""
    notes: tuple[str, ...] = ()
    """What a person should know besides."""
    about_corrections: tuple[str, ...] = ()
    """Those of them that speak of corrections."""
    about_test: tuple[str, ...] = ()
    """Those of them that speak of the test set, and not of a file."""

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "rows": self.rows,
            "added": self.added,
            "test_added": self.test_added,
            "test_drawn": self.drawn,
            "corrected": self.corrected,
            "duplicates": self.duplicates,
            "rejected": dict(self.rejected),
            "labels": self.labels,
            "labels_rejected": dict(self.labels_rejected),
            "rejects_file": None if self.rejects_file is None else str(self.rejects_file),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The report in words, a line each."""
        test = "drawn at random as the test set" if self.drawn else "new in the test set"
        said = [
            f"{self.rows:,} rows: {self.added:,} new in the pool, {self.test_added:,} {test}, "
            f"{self.duplicates:,} there already, {sum(self.rejected.values()):,} rejected"
        ]
        if self.corrected:
            texts = "1 text was" if self.corrected == 1 else f"{self.corrected:,} texts were"
            said.append(f"{texts} corrected; the old ones, with their labels, count no more from the next round on")
        if self.labels:
            said.append(f"{self.labels:,} labels imported; they count from the next round on")
        said += [f"rejected, {count:,}: {reason}" for reason, count in _by_count(self.rejected)]
        said += [f"label not taken, {count:,}: {reason}" for reason, count in _by_count(self.labels_rejected)]
        if self.rejects_file is not None:
            said.append(f"each of them, with its reason: {self.rejects_file}")
        return [*said, *self.notes]


def ingest(
    workspace: Workspace,
    files: Sequence[Path | Source],
    *,
    text_column: str = "text",
    id_column: str | None = None,
    label_column: str | None = None,
    test: bool = False,
    test_size: int | None = None,
    corrections: bool = False,
    format: str | None = None,
    encoding: str | None = None,
    progress: Progress | None = None,
) -> IngestReport:
    """Add the rows of CSV, JSONL, Parquet or XLSX files to the pool (or, `test`, to the test set), all or none.

    A folder stands for its files, `-` for standard input; `format` and `encoding` say what they are, where that is not
    to be found out.

    `id_column`: by default `id`, where there is such a column. Rows without an id get one from their content. The
    first items ever bring the test set with them: `test_size` of them (default: `ingest.test_size`), at most a fifth,
    drawn at random, unless there is a test set already. Labels become `import` events; a label that differs from the
    one imported before replaces it.

    `corrections`: a text that comes under a known id with another text takes its place. It becomes an item of its own,
    `ID~2` for the id `ID`, where the old one is, in the pool or in the test set; the old one is asked no more and its
    labels do not count, since they were given to another text. The text that an id had before can come back the same
    way. Call it while holding the workspace's lock.

    Raises UnusableFile where a file as a whole cannot be used, or changes while it is read; a row that cannot be used
    is kept aside with its reason.
    """
    if not files:
        raise BadInput(f"name at least one file ({WANTED})")
    if len({text_column, id_column, label_column} - {None}) < 1 + (id_column is not None) + (label_column is not None):
        raise BadInput("text, id and label must be three different columns")
    if corrections and test:
        raise UsageError(
            "a correction stays where the text that it replaces is, in the pool or in the test set: leave out either "
            "--test or --corrections"
        )
    with open_inputs(files, format, encoding) as inputs:
        columns = _Columns(text_column, id_column, label_column)
        return _take_in(
            workspace,
            inputs.sources,
            columns,
            "test" if test else "pool",
            inputs.notes,
            progress,
            test_size,
            corrections,
        )


def _take_in(
    workspace: Workspace,
    sources: Sequence[Source],
    columns: _Columns,
    part: Part,
    notes: list[str],
    progress: Progress | None,
    test_size: int | None,
    corrections: bool,
) -> IngestReport:
    stamps = [_stamp(source) for source in sources]
    sizes = [_usable(partial(check_readable, source)) for source in sources]
    layout = workspace.layout
    if columns.label is not None and (layout.root / ".git").exists():
        check_schema(workspace, read_history(layout, Git(layout.root)))  # labels are read by these classes
    finish_ingest(layout)
    taken = _Intake(workspace, columns, part, corrections)
    if test_size is not None and (part == "test" or taken.had_test):
        raise BadInput(
            "there is a test set already: `al ingest --redraw-test --test-size N` draws another until the "
            "first `al round`, and `al ingest --test FILE` adds to it"
        )
    size = workspace.params.ingest.test_size if test_size is None else test_size
    staging = layout.inbox / _STAGING
    make_folder(layout.inbox.parent)
    private_folder(layout.inbox)
    staging.mkdir(mode=0o700)
    try:
        staged = staging / "staged" / "new.parquet"
        with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as rejects:
            added = write_items(staged, _new_items(taken, sources, sizes, rejects, notes.append, progress))
            _refuse_changed(sources, stamps)
            notes += _cut_off(taken)
            about_corrections = _about_corrections(taken)
            rejects_file = _keep_rejects(rejects, staging, layout.rejects, sources[0]) if taken.refusals else None
        drawn, said = _draw(taken, size, workspace.params.seed) if part == "pool" else (0, [])
        if (
            added
            and part == "pool"
            and taken.had_test
            and next_round(layout) is None
            and read_object(layout.inbox / _DRAWN)
        ):
            said = [
                "the test set was drawn from earlier files alone, and measures on texts like theirs; `al ingest "
                "--redraw-test` draws it again from all of them, until the first `al round`"
            ]
        added -= taken.new_corrections
        test_added = added if part == "test" else drawn
        _stage_parts(taken, staging, staged)
        labels = _stage_events(taken, staging)
        if added or labels or taken.corrected:
            _commit(layout, staging, drawn=drawn > 0)
    finally:
        if not (staging / _COMMIT).exists():
            shutil.rmtree(staging, ignore_errors=True)
    return IngestReport(
        rows=taken.rows,
        added=added - test_added,
        test_added=test_added,
        drawn=drawn > 0,
        duplicates=taken.duplicates,
        rejected=taken.rejected,
        labels=labels,
        labels_rejected=taken.labels_rejected,
        rejects_file=rejects_file,
        corrected=len(taken.corrected),
        notes=(*notes, *about_corrections, *said),
        about_corrections=tuple(about_corrections),
        about_test=tuple(said),
    )


def _stamp(source: Source) -> Stamp | None:
    """What the file must look like once it is read; None where there is none, which is said in words later."""
    if source.stamp is not None:
        return source.stamp
    try:
        return stamp_of(source.path)
    except (OSError, ValueError):
        return None


def _refuse_changed(sources: Sequence[Source], stamps: Sequence[Stamp | None]) -> None:
    """Raise UnusableFile where a file is not what it was before it was read: what was read may be cut off."""
    for source, stamp in zip(sources, stamps, strict=True):
        if stamp is None or _stamp(replace(source, stamp=None)) != stamp:
            raise UnusableFile(
                f"{source} was written to while it was read; nothing was taken in. Run this again once it is complete"
            )


def redraw_test(workspace: Workspace, test_size: int | None = None, *, again: bool = True) -> int:
    """Draw the test set again from all items that were ingested, those of given test files apart; how many it has now.

    `again`: False draws one also where none could be drawn before. `test_size`: default `ingest.test_size`. Only before
    the first round, while nobody was asked anything. Call it while holding the workspace's lock. Raises NothingToDo
    where it is too late, or nothing was drawn.
    """
    layout = workspace.layout
    finish_ingest(layout)
    if layout.closing.exists() or next_round(layout) is not None:
        raise NothingToDo(
            "the first round has begun, and the test set stays what it is; `al ingest --test FILE` adds to it"
        )
    drawn_parts = [layout.inbox_test / name for name in read_object(layout.inbox / _DRAWN).get("parts", ())]
    drawn_parts = [path for path in drawn_parts if path.exists()]
    if again and not drawn_parts:
        raise NothingToDo("no test set was drawn yet; the first `al ingest FILE` draws one")
    staging = layout.inbox / _STAGING
    before = staging / "before"
    before.mkdir(parents=True)
    try:
        for path in drawn_parts:
            shutil.copyfile(path, before / path.name)

        def items() -> Iterator[list[Item]]:
            return iter_items([layout.inbox_pool, before])

        # A corrected text is not drawn; it goes where its correction goes. One that is not here is in a given test set.
        corrected = superseded(read_events(layout.inbox_events))
        right = set(corrected.values())
        found = {item.item_id: _digest(item) for batch in items() for item in batch if item.item_id in right}
        moved = {item: found.get(now, _GIVEN) for item, now in corrected.items()}
        digests = [_digest(item) for batch in items() for item in batch if item.item_id not in moved]
        size = drawn_size(workspace.params.ingest.test_size if test_size is None else test_size, len(digests))
        drawn = draw_test(digests, size, workspace.params.seed)
        of_test = drawn | {_GIVEN}

        def of(part: Part) -> Iterator[list[Item]]:
            for batch in items():
                yield [i for i in batch if (moved.get(i.item_id, _digest(i)) in of_test) == (part == "test")]

        parts: tuple[Part, ...] = ("pool", "test") if drawn or _GIVEN in moved.values() else ("pool",)
        written = [write_items(staging / part / "new.parquet", of(part)) for part in parts]
        assert sum(written) == sum(len(batch) for batch in items())
        known = {*moved.values(), *digests}
        events = [
            replace(e, part="test" if digest in of_test else "pool")
            if (digest := moved.get(e.item_id, bytes.fromhex(e.content_hash))) in known
            else e
            for e in read_events(layout.inbox_events)
        ]
        add_to_inbox(staging / "events", events)
        old = [*list_parts([layout.inbox_pool]), *drawn_parts, *layout.inbox_events.glob("pull-*.jsonl")]
        _commit(layout, staging, drawn=True, drop=old)
    finally:
        if not (staging / _COMMIT).exists():
            shutil.rmtree(staging, ignore_errors=True)
    return len(drawn)


def _digest(item: Item) -> bytes:
    return bytes.fromhex(item.content_hash)


def before_first_model(workspace: Workspace) -> str | None:
    """What people will be asked before there is a model, in words; None once a round was planned."""
    layout, params = workspace.layout, workspace.params
    if next_round(layout) is not None:
        return None
    labels = [e.label for e in read_events(layout.inbox_events) if e.part == "pool" and e.label is not None]
    if len(set(labels)) > 1 and len(labels) >= params.round.min_labels:
        return f"The next `al round` makes a model of {len(labels):,} labels, before anybody answers."
    pool, test = count_items([layout.inbox_pool]), count_items([layout.inbox_test])
    labelled = sum(e.part == "test" and e.label is not None for e in read_events(layout.inbox_events))
    seed, first = min(params.round.seed_size, pool), min(params.round.test_tasks, max(test - labelled, 0))
    return (
        f"Before the first model people label {seed + first:,} items: {seed:,} to learn from (round.seed_size) and "
        f"{first:,} of the test set (round.test_tasks), which grows by as many each round. Labels that you have "
        "already (--label-column) make a model at once."
    )


def finish_ingest(layout: Layout) -> bool:
    """Finish an ingest that was killed after it had begun to count, discard one that was killed before.

    Whether something was finished. Call it while holding the workspace's lock, before the inbox is closed.
    """
    remove_leftovers(layout.inbox, layout.inbox_pool, layout.inbox_test, layout.inbox_events, layout.rejects)
    staging = layout.inbox / _STAGING
    committed = (staging / _COMMIT).exists()
    if committed:
        _carry_out(layout, staging)
    elif staging.exists():
        shutil.rmtree(staging)
    return committed


# Rows --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Columns:
    text: str
    id: str | None
    label: str | None

    @property
    def required(self) -> list[str]:
        return [name for name in (self.text, self.id, self.label) if name is not None]


class _Refused(Exception):
    """A row (or its label) that is not taken. The first argument is one of few reasons, the second what is special."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class _Intake:
    """Decides row by row, remembering what is known; touches no file but to read what is known at the beginning."""

    workspace: Workspace
    columns: _Columns
    part: Part
    corrections: bool = False
    rows: int = 0
    duplicates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    labels_rejected: Counter[str] = field(default_factory=Counter)
    known: Catalog = field(default_factory=Catalog)
    first_new: int = 0
    had_test: bool = False
    _said: array[int] = field(default_factory=lambda: array("H"))
    """For each item its label in these files: its place in the schema from 1, 0 for none, or _CONTRADICTION."""
    _origins: array[int] = field(default_factory=lambda: array("L"))
    """For each item the place in `_files` of the file that named its label."""
    _files: list[str] = field(default_factory=list)
    other_texts: dict[str, str] = field(default_factory=dict)
    """Texts that came under a known id with another text, the first _MOST_COMPARED of them, by id."""
    corrected: dict[str, int] = field(default_factory=dict)
    """The user's ids that these files give another text, each with the number of the item that has it."""
    new_corrections: int = 0
    """Items that are new because of that."""
    had_id: bool = False
    """Whether any row had an id."""
    _past: _Corrections = field(init=False)
    _given: bytearray = field(init=False)
    """For each item that was known before: whether these files gave its id a text."""

    def __post_init__(self) -> None:
        layout = self.workspace.layout
        folders: tuple[tuple[Part, Path, Path], ...] = (
            ("pool", layout.pool, layout.inbox_pool),
            ("test", layout.test, layout.inbox_test),
        )
        for part, *places in folders:
            keys = read_ids(places)
            for item_id, digest in zip(keys.ids(), keys.content_hashes, strict=True):
                if self.known.find_content(digest.tobytes()) is None:
                    self.known.add(item_id, digest.tobytes(), part)
        self.first_new = len(self.known)
        self.had_test = self.known.test_items > 0
        self._said.extend([_NO_LABEL] * self.first_new)
        self._origins.extend([0] * self.first_new)
        self._past = _Corrections(read_events(layout.events, layout.inbox_events))
        self._given = bytearray(self.first_new)

    @property
    def refusals(self) -> int:
        return self.rejected.total() + self.labels_rejected.total()

    def open_file(self, name: str) -> None:
        """The rows that follow are of this file."""
        self._files.append(excerpt(name))

    def take(self, row: Row | BadRow) -> tuple[Item | None, _Refused | None]:
        """The new item that `row` brings, if any, and what is refused of it, if anything."""
        self.rows += 1
        try:
            if isinstance(row, BadRow):
                raise _Refused(row.reason, row.detail)
            corrected = len(self.corrected)
            number, item = self._item(row.values)
        except _Refused as refused:
            self.rejected[refused.reason] += 1
            return None, refused
        if item is None and len(self.corrected) == corrected:
            self.duplicates += 1
        try:
            self._record_label(number, row.values)
        except _Refused as refused:
            self.labels_rejected[refused.reason] += 1
            return item, refused
        return item, None

    def _item(self, values: Mapping[str, Any]) -> tuple[int, Item | None]:
        text = self._text(values)
        content = content_hash(text)
        digest = bytes.fromhex(content)
        number = self.known.find_content(digest)
        if number is not None:
            if self.part == "test" and self.known.part(number) == "pool":
                raise _Refused("the same text is in the pool", f"as item {self.known.item_id(number)}")
            if not self.corrections and self.known.item_id(number) not in self._past.superseded:
                return number, None
        id_column = self.columns.id or "id"
        try:
            item_id = item_id_from(values.get(id_column), content)
        except ValueError as error:
            if number is not None:
                return number, None
            raise _Refused(str(error)) from None
        has_id = item_id != item_id_from(None, content)
        self.had_id |= has_id
        metadata_of = partial(_metadata, values, {self.columns.text, id_column, self.columns.label})
        if self.corrections and has_id and (old := self.known.find_id(self._past.root(item_id))) is not None:
            return self._correct(old, number, digest, text, metadata_of)
        if number is not None:
            known_as = self.known.item_id(number)
            if has_id and known_as in self._past.superseded and self._past.root(item_id) != self._past.root(known_as):
                raise _Refused(CORRECTED_TEXT, f"as item {known_as}")
            return number, None
        if self.known.find_id(item_id) is not None:
            if len(self.other_texts) < _MOST_COMPARED and len(text) <= _LONGEST_COMPARED:
                self.other_texts.setdefault(item_id, text)
            raise _Refused(ANOTHER_TEXT, item_id)
        return self._new(item_id, digest, text, metadata_of(), self.part)

    def _new(self, item_id: str, digest: bytes, text: str, metadata: str, part: Part) -> tuple[int, Item]:
        number = self.known.add(item_id, digest, part)
        self._said.append(_NO_LABEL)
        self._origins.append(0)
        return number, Item(item_id, digest.hex(), text, metadata)

    def _correct(
        self, old: int, number: int | None, digest: bytes, text: str, metadata: Callable[[], str]
    ) -> tuple[int, Item | None]:
        """Give the id of item `old` a text, which item `number` has; that item, and whether it is new.

        These files may give an id one text, so that the same files again change nothing.
        """
        root = self.known.item_id(old)
        if number == self._now(root, old):
            if old < self.first_new:
                self._given[old] = 1
            return number, None
        if old >= self.first_new or self._given[old]:
            raise _Refused(TWO_TEXTS, root)
        family = self._past.families.get(root, {root: None})
        if number is not None and self.known.item_id(number) not in family:
            raise _Refused(ANOTHERS_TEXT, f"as item {self.known.item_id(number)}")
        item = None
        if number is None:
            item_id = next(name for n in count(2) if self.known.find_id(name := f"{root}~{n}") is None)
            if len(item_id) > ID_CHARACTERS:
                raise _Refused(
                    f"the id is too long for a correction: {item_id!r} has more than {ID_CHARACTERS} characters"
                )
            number, item = self._new(item_id, digest, text, metadata(), self.known.part(old))
            self.new_corrections += 1
        self._given[old] = 1
        self.corrected[root] = number
        return number, item

    def _now(self, root: str, old: int) -> int:
        """The number of the item that has the text of an id."""
        if root in self.corrected:
            return self.corrected[root]
        known = self.known.find_id(self._past.now.get(root, root))
        return old if known is None else known

    def _text(self, values: Mapping[str, Any]) -> str:
        try:
            return text_from(values.get(self.columns.text), self.workspace.params.ingest.max_characters)
        except ValueError as error:
            raise _Refused(*error.args) from None

    def _record_label(self, number: int, values: Mapping[str, Any]) -> None:
        if self.columns.label is None:
            return
        cell = values.get(self.columns.label)
        labels = self.workspace.params.schema_.labels
        try:
            label = label_from(cell)
        except ValueError:
            label = ""
        if label is None:
            return
        if label not in labels:
            raise _Refused("the label is not one of schema.labels in params.yaml", excerpt(cell)[:80])
        said = 1 + labels.index(label)
        before = self._said[number]
        if before not in (_NO_LABEL, said):
            self._said[number] = _CONTRADICTION
            raise _Refused("the same text has another label in an earlier row; neither is taken", label)
        self._said[number] = said
        self._origins[number] = len(self._files) - 1

    def _corrections(self) -> Iterator[Event]:
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
                annotation_key=f"{_CORRECTION}{root}",
                annotator=IMPORT_ANNOTATOR,
                reason=f"the text of {root} was corrected",
                targets=tuple(name for name in family if name != item_id),
                previous=previous,
                origin=self._files[-1],
            )

    def events(self) -> Iterator[Event]:
        """An event for each correction, and for each label that says something new, in the order of the items."""
        yield from self._corrections()
        if self.columns.label is None:
            return
        layout, schema = self.workspace.layout, self.workspace.params.schema_
        latest: dict[str, Event] = {}
        for event in read_events(layout.events, layout.inbox_events):
            if event.type == "import":
                latest[event.annotation_key] = event
        for number, said in enumerate(self._said):
            if said in (_NO_LABEL, _CONTRADICTION):
                continue
            label, content = schema.labels[said - 1], self.known.digest(number).hex()
            key = f"{IMPORT_ANNOTATOR}:{content}"
            before = latest.get(key)
            if before is not None and before.label == label:
                continue
            # The event before is part of what this one says, so that a label can change back.
            previous = None if before is None else before.event_id
            yield Event(
                event_id=event_digest("import", content, label, previous),
                type="import",
                item_id=self.known.item_id(number),
                content_hash=content,
                part=self.known.part(number),
                round=IMPORT_ROUND,
                annotation_key=key,
                annotator=IMPORT_ANNOTATOR,
                label=label,
                schema_version=schema.version,
                previous=previous,
                origin=self._files[self._origins[number]],
            )


class _Corrections:
    """What the ledger says of corrected texts."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.superseded = superseded(events)
        self.families: dict[str, dict[str, None]] = {}
        """For each of the user's ids that was ever corrected all items that had a text of it, the first one first."""
        self.now: dict[str, str] = {}
        """The item that has the text of an id, where a correction in force says so."""
        self.last: dict[str, str] = {}
        """The id of the last correction, in force or not."""
        self._roots: dict[str, str] = {}
        for event in events:
            if event.type == "correct":
                root = event.annotation_key.removeprefix(_CORRECTION)
                family = self.families.setdefault(root, {root: None})
                family.update(dict.fromkeys((*event.targets, event.item_id)))
                self._roots.update(dict.fromkeys(family, root))
                self.last[root] = event.event_id
        if self.families:
            counted = [event for event in active(events) if event.type == "correct"]
            self.now = {event.annotation_key.removeprefix(_CORRECTION): event.item_id for event in counted}

    def root(self, item_id: str) -> str:
        """The user's id that an item has a text of; an export names corrected texts by the ids that we gave them."""
        return self._roots.get(item_id, item_id)


def _metadata(values: Mapping[str, Any], apart: set[str | None]) -> str:
    others = {name: value for name, value in values.items() if name not in apart}
    try:
        metadata = json.dumps(others, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise _Refused("the other columns cannot be kept as JSON", excerpt(str(error))) from None
    if len(metadata) > METADATA_CHARACTERS:
        raise _Refused(f"the other columns hold more than {METADATA_CHARACTERS:,} characters", f"{len(metadata):,}")
    if not storable(metadata):
        raise _Refused("the other columns hold half a surrogate pair, which UTF-8 cannot store")
    return metadata


def _usable(read: Callable[[], _T]) -> _T:
    """What `read` gives; its complaint about a user's file as an UnusableFile, unlike one about our own data."""
    try:
        return read()
    except BadInput as error:
        raise UnusableFile(str(error)) from None


def _new_items(
    taken: _Intake,
    sources: Sequence[Source],
    sizes: Sequence[int],
    rejects: IO[str],
    on_note: Callable[[str], None],
    progress: Progress | None,
) -> Iterator[list[Item]]:
    total, before, kept = sum(sizes), 0, 0
    for source, size in zip(sources, sizes, strict=True):
        taken.open_file(source.name or source.path.name)

        def tell(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        batches = read_table(source, taken.columns.required, progress=tell, on_note=on_note)
        while (batch := _usable(partial(next, batches, None))) is not None:
            new = []
            for row in batch:
                item, refused = taken.take(row)
                if item is not None:
                    new.append(item)
                if refused is not None and (kept := kept + 1) <= _MOST_REJECTS:
                    rejects.write(_reject_line(source, row, refused, taken.columns))
            yield new
        before += size
    if kept > _MOST_REJECTS:
        on_note(f"the rejects file holds the first {_MOST_REJECTS:,} of {kept:,} rejects")


def _reject_line(source: Source, row: Row | BadRow, refused: _Refused, columns: _Columns) -> str:
    if isinstance(row, Row):
        begins = {excerpt(name)[:100]: excerpt(row.values[name])[:100] for name in list(row.values)[:20]}
        begins[excerpt(columns.text)] = excerpt(row.values.get(columns.text, ""))
        kept: object = begins
    else:
        kept = row.excerpt
    return json_line(
        {
            "file": excerpt(source.name or source.path.name),
            row.unit: row.number,
            "reason": refused.reason,
            "detail": excerpt(refused.detail),
            "excerpt": kept,
        }
    )


# Files -------------------------------------------------------------------------------------------------------------
def _keep_rejects(rejects: IO[str], staging: Path, folder: Path, first: Source) -> Path:
    """Move the rejects to a file whose name says which files and rows they are of: the same again, the same file."""
    rejects.flush()
    rejects.seek(0)
    staged = staging / "rejects.jsonl"
    with staged.open("w", encoding="utf-8", newline="\n") as out:
        shutil.copyfileobj(rejects, out)
    stem = re.sub(r"[^\w.-]+", "_", Path(first.name or first.path.name).stem, flags=re.ASCII).strip("._")[:60] or "rows"
    target = folder / f"{stem}-{sha256_file(staged)[:12]}.jsonl"
    move(staged, target)
    return target


def _cut_off(taken: _Intake) -> list[str]:
    """Say how many texts under a known id only go on where the known one ends: that one was read from half a file."""
    layout = taken.workspace.layout
    folders = [layout.pool, layout.test, layout.inbox_pool, layout.inbox_test]
    known = fetch(folders, taken.other_texts) if taken.other_texts else {}
    ends = {item_id: item.text.rstrip() for item_id, item in known.items()}
    cut = sum(taken.other_texts[item_id].startswith(text) for item_id, text in ends.items())
    if not cut:
        return []
    these = "1 text of a known id only goes on" if cut == 1 else f"{cut:,} texts of known ids only go on"
    least = "at least " if len(taken.other_texts) == _MOST_COMPARED else ""
    return [f"{least}{these} where the one in the pool ends, which was cut off: was its file read while it was copied?"]


def _about_corrections(taken: _Intake) -> list[str]:
    """Say how texts that came under a known id can be taken, or why none was."""
    if taken.corrections:
        if taken.had_id or not taken.rows:
            return []
        return [
            "no row has an id, so that nothing could be corrected; --id-column names the column that holds your ids"
        ]
    waiting = taken.rejected[ANOTHER_TEXT]
    if not waiting or taken.part == "test":
        return []
    texts = "1 text differs" if waiting == 1 else f"{waiting:,} texts differ"
    return [f"{texts} from what is known under the id; the same command with --corrections takes the new for the old"]


def _draw(taken: _Intake, size: int, seed: int) -> tuple[int, list[str]]:
    """Draw a test set of `size` from the new items, if there is none yet: how many, and what to tell."""
    corrections = set(taken.corrected.values())
    new = [number for number in range(taken.first_new, len(taken.known)) if number not in corrections]
    if taken.had_test or not new or size == 0:
        return 0, []
    count = drawn_size(size, len(new))
    drawn = draw_test((taken.known.digest(number) for number in new), count, seed)
    for number in new:
        if taken.known.digest(number) in drawn:
            taken.known.move_to_test(number)
    if count == size:
        return count, []
    if count == 0:
        return 0, ["too few items to draw a test set from; the next ingest draws one from what it adds"]
    return count, [
        f"the test set is {count:,} items, not {size:,}: at most a fifth of {len(new):,} new items; "
        "give it more with `al ingest --test FILE`"
    ]


def _stage_parts(taken: _Intake, staging: Path, staged: Path) -> None:
    """Sort what is new into a part of the pool and one of the test set."""
    parts = {taken.known.part(number) for number in range(taken.first_new, len(taken.known))}
    if len(parts) == 1:
        move(staged, staging / parts.pop() / "new.parquet")
    for part in sorted(parts):
        write_items(staging / part / "new.parquet", _only(taken, staged, part))
    shutil.rmtree(staged.parent)


def _only(taken: _Intake, staged: Path, part: Part) -> Iterator[list[Item]]:
    number = taken.first_new
    for batch in iter_items([staged.parent]):
        yield [item for n, item in enumerate(batch, start=number) if taken.known.part(n) == part]
        number += len(batch)


def _stage_events(taken: _Intake, staging: Path) -> int:
    """Stage corrections and labels; how many labels."""
    events = list(taken.events())
    add_to_inbox(staging / "events", events)
    return sum(event.type == "import" for event in events)


def _commit(layout: Layout, staging: Path, *, drawn: bool = False, drop: Sequence[Path] = ()) -> None:
    """Have what is staged count, and the files `drop` of the inbox no more."""
    moves: dict[str, Any] = {"drawn": drawn, "drop": [path.relative_to(layout.inbox).as_posix() for path in drop]}
    for name, inbox in (("test", layout.inbox_test), ("pool", layout.inbox_pool)):
        if (staging / name / "new.parquet").exists():
            names = [part.stem.removeprefix("part-") for part in list_parts([inbox])]
            last = max((int(number) for number in names if number.isdecimal()), default=0)
            moves[name] = f"part-{last + 1:06d}.parquet"
    write_json(staging / _COMMIT, moves)
    _carry_out(layout, staging)


def _carry_out(layout: Layout, staging: Path) -> None:
    """Move what is staged into the inbox; items before the labels that speak of them. Can be repeated."""
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


def _by_count(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
