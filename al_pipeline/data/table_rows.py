"""The rows of a user's table (CSV, JSONL, Parquet, XLSX), good and bad, and what all its readers share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, Literal

from msgspec import Struct

from al_pipeline.data.inputs import Source
from al_pipeline.errors import BadInput
from al_pipeline.records import shown_text

Progress = Callable[[int, int], None]
"""Called from time to time with the bytes read so far and the size of the file."""

RECORD_LIMIT = 8 * 1024 * 1024
"""Maximum number of characters of a row, all columns together; a longer row is rejected without being parsed."""

BATCH_ROWS = 1000
BATCH_CHARACTERS = 4 * 1024 * 1024
EXCERPT_CHARACTERS = 300

Unit = Literal["line", "row"]


class Row(Struct, frozen=True):
    """A row with its columns' values as the file holds them (CSV: strings; JSONL and Parquet: plain Python values).

    `number` counts from 1: the line that the row begins on (CSV, JSONL), or the row (Parquet: from the first row;
    XLSX: as the sheet numbers it). `unit` says which of the two it is.
    """

    number: int
    values: Mapping[str, Any]
    unit: Unit = "line"


class BadRow(Struct, frozen=True):
    """A row that cannot be read. `reason` is one of a few fixed texts, `detail` is specific to this row, `excerpt` is
    the start of its text.
    """

    number: int
    reason: str
    detail: str
    excerpt: str
    unit: Unit = "line"


class Block(Struct, frozen=True):
    """Rows that follow each other, column by column: `rows()` gives the same rows one by one."""

    numbers: Sequence[int]
    """Shape (n,), as in `Row`."""
    columns: Mapping[str, Sequence[Any]]
    """The values of each column, (n,), as in `Row`."""
    unit: Unit = "line"

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, position: int) -> Row:
        """The row at a position."""
        values = {name: column[position] for name, column in self.columns.items()}
        return Row(self.numbers[position], values, self.unit)

    def rows(self) -> Iterator[Row]:
        """All rows, in order."""
        names = tuple(self.columns)
        cells_of = zip(*self.columns.values(), strict=True) if names else repeat(())
        for number, cells in zip(self.numbers, cells_of, strict=False):
            yield Row(number, dict(zip(names, cells, strict=True)), self.unit)

    def part(self, start: int, stop: int) -> Block:
        """The rows at positions from `start` to before `stop`."""
        columns = {name: column[start:stop] for name, column in self.columns.items()}
        return Block(self.numbers[start:stop], columns, self.unit)


Rows = Iterator[tuple["Row | BadRow | Block", int]]
"""Rows and blocks of rows, each with its size in characters."""


class TableFile(Struct, frozen=True):
    """A file to read: its first bytes, the required columns, the columns to keep (None: all), and the callbacks."""

    source: Source
    head: bytes
    required: tuple[str, ...]
    keep: frozenset[str] | None
    on_progress: Progress | None
    on_note: Callable[[str], None] | None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.source.path.stat().st_size

    def note(self, text: str) -> None:
        """Report a note for the user on how the file was read."""
        if self.on_note is not None:
            self.on_note(f"{self.source}: {text}")

    def report_progress(self, position: int) -> None:
        """Report that `position` bytes of the file have been read."""
        if self.on_progress is not None:
            self.on_progress(min(position, self.size), self.size)

    def kept(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """`values` without the columns that are not kept; also for a block's columns."""
        return values if self.keep is None else {name: value for name, value in values.items() if name in self.keep}


def excerpt(value: object) -> str:
    """The start of a value, safe to print on a terminal and to encode as UTF-8."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = f"({type(value).__name__})"
    return shown_text(text[:EXCERPT_CHARACTERS]) + ("…" if len(text) > EXCERPT_CHARACTERS else "")


def missing_column(source: Source, name: str, columns: Sequence[str]) -> BadInput:
    """The error that `source` has no column `name`, with the columns that it has."""
    shown = ", ".join(excerpt(column)[:60] for column in columns[:30]) + (", …" if len(columns) > 30 else "")
    return BadInput(
        f"{source} has no column `{name}`; it has: {shown or '(none)'}. Name the right column with --text-column, "
        "--id-column or --label-column"
    )


def column_names(source: Source, cells: Sequence[str], required: Sequence[str]) -> list[str]:
    """Distinct column names: an empty one becomes `column_3`, a repeated one `name.2`. Raises BadInput."""
    stripped = [cell.strip() for cell in cells]
    for name in required:
        if name not in stripped:
            raise missing_column(source, name, stripped)
        if stripped.count(name) > 1:
            raise BadInput(f"{source} has {stripped.count(name)} columns named `{name}`; rename all but one")
    taken = set(stripped)
    seen: dict[str, int] = {}
    names = []
    for position, name in enumerate(stripped, start=1):
        name = name or f"column_{position}"
        seen[name] = count = seen.get(name, 0) + 1
        while count > 1 and name in taken:
            name = f"{stripped[position - 1] or 'column'}.{count}"
            count += 1
        taken.add(name)
        names.append(name)
    return names


def row_too_long() -> str:
    """The reason for rejecting a row of more than RECORD_LIMIT characters."""
    return f"the row is longer than {RECORD_LIMIT:,} characters"


def wrong_number_of_fields(number: int, found: int, expected: int, excerpt: str, unit: Unit = "line") -> BadRow:
    """A row with another number of fields than the header."""
    return BadRow(number, "wrong number of fields", f"{found} where the header has {expected}", excerpt, unit)
