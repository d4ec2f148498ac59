"""Users' tables (CSV, JSONL, Parquet), row by row: never a whole file in memory, and a bad row never stops the rest.

What a file as a whole gets wrong (missing, empty, not a table, no such column) is a BadInput; what one row gets wrong
is a BadRow among the others, with its place and its reason.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

from al_pipeline.errors import BadInput
from al_pipeline.records import shown_text

Progress = Callable[[int, int], None]
"""Told from time to time how many bytes were read, and of how many."""

RECORD_LIMIT = 8 * 1024 * 1024
"""Characters of one row, all its columns together; a longer one is refused unread."""

_LARGEST_AVERAGE = 16 * RECORD_LIMIT
"""Bytes of a Parquet column's values on average: more, and a single one could fill the memory before it is refused."""
_MOST_VALUES = 1_000_000
"""Of one row in a column of lists."""
_BATCH_BYTES = 64 * 1024 * 1024
_NEXT_INTEGER, _DICTIONARY_PAGE = b"\x15", 2

BATCH_ROWS = 1000
BATCH_CHARACTERS = 4 * 1024 * 1024
EXCERPT_CHARACTERS = 300

_UNDECODABLE = "\udcff"
_ERROR_HANDLER = "al_pipeline.mark"
codecs.register_error(_ERROR_HANDLER, lambda error: (_UNDECODABLE, error.end))  # type: ignore[attr-defined]

_DELIMITERS = ",;\t|"
_NOT_TABLES = {
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"PK\x03\x04": "is a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook; save the sheet as CSV (UTF-8)",
    b"%PDF": "is a PDF; a table is wanted (CSV, JSONL or Parquet)",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns' values as the file holds them (CSV: strings; JSONL and Parquet: plain Python values).

    `number` is where an editor finds it: the line it begins on (CSV, JSONL) or the row (Parquet), from 1.
    """

    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read. `reason` is one of few, `detail` what is special here, `excerpt` how it begins."""

    number: int
    reason: str
    detail: str
    excerpt: str


def read_table(
    path: Path,
    required: Sequence[str] = (),
    keep: Sequence[str] | None = None,
    batch_rows: int = BATCH_ROWS,
    progress: Progress | None = None,
) -> Iterator[list[Row | BadRow]]:
    """The rows of a CSV, JSONL or Parquet file, in its order, in batches of bounded size.

    `required` columns must be there (in JSONL: in one row at least, so that the complaint comes after the last row);
    `keep` limits what is read to these columns. Raises BadInput where the file as a whole cannot be used.
    """
    head = _head(path)
    rows = _parquet_rows if _is_parquet(path, head) else _jsonl_rows if _is_jsonl(path, head) else _csv_rows
    batch: list[Row | BadRow] = []
    characters = 0
    try:
        for row, size in rows(path, head, tuple(required), None if keep is None else frozenset(keep), progress):
            batch.append(row)
            characters += size
            if len(batch) >= batch_rows or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from None
    if batch:
        yield batch


def check_readable(path: Path) -> int:
    """The size in bytes of a file that can be read and holds something. Raises BadInput."""
    _head(path)
    return path.stat().st_size


def excerpt(value: object) -> str:
    """How a value begins, fit for a terminal and for UTF-8."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = f"({type(value).__name__})"
    return shown_text(text[:EXCERPT_CHARACTERS]) + ("…" if len(text) > EXCERPT_CHARACTERS else "")


def no_column(path: Path, name: str, columns: Sequence[str]) -> BadInput:
    """The complaint that `path` has no column `name`, with those it has."""
    shown = ", ".join(excerpt(column)[:60] for column in columns[:30]) + (", …" if len(columns) > 30 else "")
    return BadInput(
        f"{path} has no column `{name}`; it has: {shown or '(none)'}. "
        "Name the right one with --text-column, --id-column or --label-column"
    )


# Files -----------------------------------------------------------------------------------------------------------
def _head(path: Path) -> bytes:
    """The first bytes of a file. Raises BadInput where there are none, or none of a table."""
    try:
        if path.is_dir():
            raise BadInput(f"{path} is a folder; name the files in it (CSV, JSONL or Parquet)")
        if path.exists() and not path.is_file():
            raise BadInput(f"{path} is not a regular file; save it to one first")
        with path.open("rb") as file:
            head = file.read(64 * 1024)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; check the name") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise BadInput(f"{excerpt(str(path))} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not head:
        raise BadInput(f"{path} is empty; a table with a header is wanted (CSV, JSONL or Parquet)")
    for magic, complaint in _NOT_TABLES.items():
        if head.startswith(magic):
            raise BadInput(f"{path} {complaint}")
    return head


def _is_parquet(path: Path, head: bytes) -> bool:
    return head.startswith(b"PAR1") or path.suffix.lower() in {".parquet", ".pq"}


def _is_jsonl(path: Path, head: bytes) -> bool:
    suffix = path.suffix.lower()
    if suffix in {".csv", ".tsv"}:
        return False
    start = head.decode(_encoding(head), _ERROR_HANDLER).lstrip()
    if start.startswith("[") and suffix in {".json", ".jsonl", ".ndjson"}:
        raise BadInput(
            f"{path} holds one JSON list; JSONL has one object a line (`jq -c '.[]' FILE` turns it into that)"
        )
    return suffix in {".json", ".jsonl", ".ndjson"} or start.startswith("{")


def _encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "utf-8-sig"


class _Lines(Iterator[str]):
    """The physical lines of a text file, each with its ending; remembers those of the present record.

    Bytes that the encoding does not know come as a lone surrogate, so that only their record is refused. Raises
    `_TooLong` once a record is over the limit, and can then be asked to skip it.
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self._path = path
        self._encoding = encoding
        self._file = self._open()
        self._given_back: deque[str] = deque()
        self.number = 0
        self.record: list[str] = []
        self.characters = 0

    def _open(self) -> TextIO:
        return self._path.open(encoding=self._encoding, errors=_ERROR_HANDLER, newline="")

    def begin(self) -> None:
        """A new record begins with the next line."""
        self.record = []
        self.characters = 0

    def __next__(self) -> str:
        line = self._given_back.popleft() if self._given_back else self._file.readline(RECORD_LIMIT + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.record.append(line)
        self.characters += len(line)
        if self.characters > RECORD_LIMIT:
            raise _TooLong
        return line

    def give_back_all_but_first(self) -> None:
        """The record was only its first line after all: a quote stood where none belongs."""
        rest = self.record[1:]
        self._given_back.extendleft(reversed(rest))
        self.number -= len(rest)

    def skip_line(self) -> None:
        """Read past the end of the physical line that was too long."""
        self._rest_of_line(self.record[-1])

    def skip_quoted(self) -> None:
        """Read past the end of the quoted field that was too long; if it has no end, only past its first line."""
        first = self.number - len(self.record) + 1
        quotes = sum(line.count('"') for line in self.record) + self._rest_of_line(self.record[-1])
        while quotes % 2:
            line = self._given_back.popleft() if self._given_back else self._file.readline(RECORD_LIMIT)
            if not line:
                self._go_to(first + 1)
                return
            self.number += 1
            quotes += line.count('"') + self._rest_of_line(line)

    def _rest_of_line(self, line: str) -> int:
        """Read up to the end of the physical line that begins with `line`; how many quotes there were."""
        quotes = 0
        while line and not line.endswith(("\n", "\r")) and not self._given_back:
            line = self._file.readline(RECORD_LIMIT)
            quotes += line.count('"')
        return quotes

    def _go_to(self, number: int) -> None:
        self._file.close()
        self._given_back.clear()
        self._file = self._open()
        for _ in range(number - 1):
            self._rest_of_line(self._file.readline(RECORD_LIMIT))
        self.number = number - 1

    def position(self) -> int:
        """Bytes read so far."""
        return self._file.buffer.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _TooLong(Exception):
    """The present record is longer than RECORD_LIMIT."""


_Rows = Iterator[tuple[Row | BadRow, int]]


# CSV ---------------------------------------------------------------------------------------------------------------
def _csv_rows(
    path: Path, head: bytes, required: tuple[str, ...], keep: frozenset[str] | None, progress: Progress | None
) -> _Rows:
    encoding = _encoding(head)
    records = _csv_records(path, encoding, _delimiter(path, head.decode(encoding, _ERROR_HANDLER)), progress)
    header = next(records, None)
    if header is None:
        raise BadInput(f"{path} holds only blank lines; a table with a header is wanted (CSV, JSONL or Parquet)")
    _, cells, raw = header
    if isinstance(cells, str):
        raise BadInput(f"{path} has no usable header: {cells}; it begins: {excerpt(raw)[:100]}")
    columns = _column_names(path, cells, required)
    for number, fields, raw in records:
        if isinstance(fields, str):
            yield BadRow(number, fields, "", excerpt(raw)), len(raw)
        elif len(fields) != len(columns):
            detail = f"{len(fields)} where the header has {len(columns)}"
            yield BadRow(number, "wrong number of fields", detail, excerpt(raw)), len(raw)
        else:
            values = dict(zip(columns, fields, strict=True))
            yield Row(number, _kept(values, keep)), sum(map(len, fields))


def _csv_records(
    path: Path, encoding: str, delimiter: str, progress: Progress | None
) -> Iterator[tuple[int, list[str] | str, str]]:
    """Each record of a CSV file: its first line, its fields (or why there are none), its text (or how it begins)."""
    csv.field_size_limit(max(csv.field_size_limit(), RECORD_LIMIT + 1))
    size = path.stat().st_size
    lines = _Lines(path, encoding)
    dialect: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    reader = csv.reader(lines, **dialect)
    try:
        while True:
            lines.begin()
            problem: str | None = None
            fields: list[str] = []
            start = lines.number + 1
            try:
                fields = next(reader)
            except StopIteration:
                break
            except _TooLong:
                problem = _too_long()
                raw = lines.record[0]
                lines.skip_quoted()
            except csv.Error as error:
                problem = _csv_problem(str(error))
                raw = lines.record[0]
                lines.give_back_all_but_first()
            else:
                raw = lines.record[0] if len(lines.record) == 1 else "".join(lines.record)
                if _UNDECODABLE in raw:
                    problem = _not_decodable(encoding)
            if problem is None and not fields:
                continue
            if progress is not None and start % 256 == 0:
                progress(min(lines.position(), size), size)
            yield start, fields if problem is None else problem, raw
    finally:
        lines.close()
    if progress is not None:
        progress(size, size)


def _csv_problem(message: str) -> str:
    if "expected after" in message:
        return "a quote inside a quoted field must be doubled"
    if "unexpected end of data" in message:
        return "a quoted field is never closed"
    return f"not valid CSV: {message}"


def _delimiter(path: Path, head: str) -> str:
    """Which of , ; tab | separates the header's names: the one that stands most often outside quotes."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    counts = dict.fromkeys(_DELIMITERS, 0)
    quoted = False
    for character in head.lstrip("\r\n"):
        if character == '"':
            quoted = not quoted
        elif not quoted and character in "\r\n":
            break
        elif not quoted and character in counts:
            counts[character] += 1
    return max(_DELIMITERS, key=lambda delimiter: counts[delimiter])


def _column_names(path: Path, cells: Sequence[str], required: Sequence[str]) -> list[str]:
    """Distinct names of all columns: nameless ones become `column_3`, repeated ones `name.2`. Raises BadInput."""
    stripped = [cell.strip() for cell in cells]
    for name in required:
        if name not in stripped:
            hint = "" if not any("\0" in cell for cell in cells) else " (it looks like UTF-16: save it as UTF-8)"
            complaint = no_column(path, name, stripped)
            raise BadInput(f"{complaint}{hint}")
        if stripped.count(name) > 1:
            raise BadInput(f"{path} has {stripped.count(name)} columns named `{name}`; rename all but one")
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


# JSONL -------------------------------------------------------------------------------------------------------------
def _jsonl_rows(
    path: Path, head: bytes, required: tuple[str, ...], keep: frozenset[str] | None, progress: Progress | None
) -> _Rows:
    encoding = _encoding(head)
    size = path.stat().st_size
    missing = set(required)
    columns: dict[str, None] = {}
    lines = _Lines(path, encoding)
    try:
        while True:
            lines.begin()
            try:
                raw = next(lines)
            except StopIteration:
                break
            except _TooLong:
                yield BadRow(lines.number, _too_long(), "", excerpt(lines.record[0])), EXCERPT_CHARACTERS
                lines.skip_line()
                continue
            if progress is not None and lines.number % 256 == 0:
                progress(min(lines.position(), size), size)
            if not raw.strip():
                continue
            row = _json_row(lines.number, raw, encoding)
            if isinstance(row, Row):
                missing.difference_update(row.values)
                if len(columns) < 100:
                    columns.update(dict.fromkeys(row.values))
                row = Row(row.number, _kept(row.values, keep))
            yield row, len(raw)
    finally:
        lines.close()
    if progress is not None:
        progress(size, size)
    if columns:
        for name in required:
            if name in missing:
                raise no_column(path, name, list(columns))


def _json_row(number: int, raw: str, encoding: str) -> Row | BadRow:
    if _UNDECODABLE in raw:
        return BadRow(number, _not_decodable(encoding), "", excerpt(raw))
    try:
        values = json.loads(raw, object_pairs_hook=_distinct_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        return BadRow(number, "not valid JSON", f"{error.msg} at column {error.colno}", excerpt(raw))
    except ValueError as error:  # a key twice, NaN, an integer of thousands of digits
        return BadRow(number, "not valid JSON", excerpt(str(error)), excerpt(raw))
    except RecursionError:
        return BadRow(number, "not valid JSON", "nested too deeply", excerpt(raw))
    if not isinstance(values, dict):
        return BadRow(number, "not a JSON object", "", excerpt(raw))
    return Row(number, values)


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key `{next(name for name in names if names.count(name) > 1)}` is there twice")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


# Parquet -----------------------------------------------------------------------------------------------------------
def _parquet_rows(
    path: Path, head: bytes, required: tuple[str, ...], keep: frozenset[str] | None, progress: Progress | None
) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = _column_names(path, schema.names, required)
            wanted = None if keep is None else [name for name in schema.names if name in keep]
            if wanted is not None:
                columns = [name for name in columns if name in keep] if keep is not None else columns
            total = file.metadata.num_rows
            largest = _largest_value(path, file.metadata, wanted)
            uncompressed = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
            rows = min(BATCH_ROWS, BATCH_CHARACTERS * max(total, 1) // max(uncompressed, 1))
            rows = max(1, min(rows, _BATCH_BYTES // max(largest, 1)))
            number = 0
            for batch in file.iter_batches(batch_size=rows, columns=wanted):
                values = [_python_values(batch.column(i)) for i in range(batch.num_columns)]
                for position in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(number, columns, [column[position] for column in values])
                if progress is not None:
                    progress(size * number // max(total, 1), size)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path} is not a Parquet file that can be read: {excerpt(str(error))}") from None


def _largest_value(path: Path, metadata: Any, wanted: Sequence[str] | None) -> int:
    """How many bytes one value of a text column may take once it is unpacked, at most; 0 where it takes its own room.

    A long text that stands in the file once can be the value of a million rows, as a place in a list of distinct
    values or as the beginning that it shares with the one before: a file of kilobytes that unpacks into gigabytes.
    Raises BadInput where values are so large on average, or so many in a row, that one could fill the memory.
    """
    largest = 0
    with path.open("rb") as file:
        for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
            for column in (group.column(number) for number in range(group.num_columns)):
                if wanted is not None and column.path_in_schema.split(".")[0] not in wanted:
                    continue
                size, name = column.total_uncompressed_size, excerpt(column.path_in_schema)[:60]
                if size > _LARGEST_AVERAGE * max(column.num_values, 1):
                    raise BadInput(
                        f"{path}: values of column `{name}` have {size // max(column.num_values, 1):,} bytes each, "
                        f"a row may have {RECORD_LIMIT:,} characters; leave the column out, or cut its values"
                    )
                if column.num_values > _MOST_VALUES * max(group.num_rows, 1):
                    raise BadInput(f"{path}: column `{name}` has over {_MOST_VALUES:,} values a row; leave it out")
                if column.physical_type == "BYTE_ARRAY":
                    shares = "DELTA_BYTE_ARRAY" in column.encodings
                    largest = max(largest, size if shares else _dictionary_bytes(file, column))
    return largest


def _dictionary_bytes(file: IO[bytes], column: Any) -> int:
    """The unpacked size of a column's list of distinct values; 0 where it has none.

    It stands in the header of the first page (Thrift's compact protocol: field 1 is the kind of page, field 2 the
    size), and a reader that finds another size there refuses the page.
    """
    file.seek(column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset)
    head, place = file.read(24), 0
    numbers: list[int] = []
    while len(numbers) < 2 and head[place : place + 1] == _NEXT_INTEGER:
        place, shift, number = place + 1, 0, 0
        while place < len(head):
            number |= (head[place] & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if not head[place - 1] & 0x80:
                break
        numbers.append(number >> 1)
    if len(numbers) < 2:
        return int(column.total_uncompressed_size)
    return numbers[1] if numbers[0] == _DICTIONARY_PAGE else 0


def _parquet_row(number: int, columns: Sequence[str], cells: Sequence[Any]) -> tuple[Row | BadRow, int]:
    values = dict(zip(columns, cells, strict=True))
    size = sum(len(cell) for cell in cells if isinstance(cell, str))
    bad = next((name for name, cell in values.items() if isinstance(cell, _Unreadable)), None)
    if bad is not None:
        readable = {name: cell for name, cell in values.items() if not isinstance(cell, _Unreadable)}
        detail = f"column `{excerpt(bad)}`: {values[bad].why}"
        return BadRow(number, "a value that cannot be read", detail, excerpt(readable)), size
    if size > RECORD_LIMIT:
        return BadRow(number, _too_long(), "", excerpt(values)), size
    return Row(number, values), size


@dataclass(frozen=True, slots=True)
class _Unreadable:
    why: str


def _python_values(column: Any) -> list[Any]:
    """An Arrow array as plain values; what has none (bytes that are not UTF-8, for one) as _Unreadable."""
    try:
        return [_plain(value) for value in column.to_pylist()]
    except (ValueError, OverflowError, ArithmeticError, RecursionError, ImportError):
        return [_python_value(scalar) for scalar in column]


def _python_value(scalar: Any) -> Any:
    try:
        return _plain(scalar.as_py())
    except (ValueError, OverflowError, ArithmeticError, RecursionError, ImportError) as error:
        return _Unreadable(excerpt(str(error)))


def _plain(value: Any) -> Any:
    """A value that JSON can hold: dates as ISO 8601, not-a-number as null, bytes as UTF-8. Raises ValueError."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


# Words -------------------------------------------------------------------------------------------------------------
def _kept(values: Mapping[str, Any], keep: frozenset[str] | None) -> Mapping[str, Any]:
    return values if keep is None else {name: value for name, value in values.items() if name in keep}


def _too_long() -> str:
    return f"the row is longer than {RECORD_LIMIT:,} characters"


def _not_decodable(encoding: str) -> str:
    return "not valid UTF-16" if encoding == "utf-16" else "not valid UTF-8"
