"""Users' tables (CSV, JSONL, Parquet, XLSX), row by row: never a whole file in memory; a bad row stops no other.

What a file as a whole gets wrong (missing, empty, not a table, no such column) is a BadInput; what one row gets wrong
is a BadRow among the others, with its place and its reason.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from al_pipeline.data import encodings
from al_pipeline.data.inputs import WANTED, Source, kind_of, open_bytes, open_regular, read_head
from al_pipeline.errors import BadInput
from al_pipeline.records import shown_text

Progress = Callable[[int, int], None]
"""Called from time to time how many bytes were read, and of how many."""

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
_SAMPLE_BYTES = 200_000
_BLOCK_BYTES = 1024 * 1024
_ONE_IN = 1000
"""A file of which more than one row in so many cannot be decoded is refused: what drops out would be no random part."""

Unit = Literal["line", "row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns' values as the file holds them (CSV: strings; JSONL and Parquet: plain Python values).

    `number` is where an editor finds it, from 1: the line it begins on (CSV, JSONL), or the row (Parquet: from the
    first; XLSX: as the sheet numbers it). `unit` says which of the two it is.
    """

    number: int
    values: Mapping[str, Any]
    unit: Unit = "line"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read. `reason` is one of few, `detail` what is special here, `excerpt` how it begins."""

    number: int
    reason: str
    detail: str
    excerpt: str
    unit: Unit = "line"


def read_table(
    source: Source | Path,
    required: Sequence[str] = (),
    keep: Sequence[str] | None = None,
    batch_rows: int = BATCH_ROWS,
    progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Iterator[list[Row | BadRow]]:
    """The rows of a CSV, JSONL, Parquet or XLSX file, in its order, in batches of bounded size.

    `required` columns must be there (in JSONL: in one row at least, so that the complaint comes after the last row);
    `keep` limits what is read to these columns. `on_note` gets what a person should know of how the file was read.
    Raises BadInput where the file as a whole cannot be used.
    """
    source = source if isinstance(source, Source) else Source(source)
    head = read_head(source)
    job = _Job(source, head, tuple(required), None if keep is None else frozenset(keep), progress, on_note)
    batch: list[Row | BadRow] = []
    characters = 0
    try:
        for row, size in _rows_of(job):
            batch.append(row)
            characters += size
            if len(batch) >= batch_rows or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except OSError as error:
        raise BadInput(f"{source} cannot be read: {error.strerror or error}") from None
    except UnicodeError as error:  # UTF-16 is named, and the file has no mark: nothing says which of the two it is
        raise BadInput(
            f"{source} is not {source.encoding}: {error}; name its encoding, or leave --encoding out and have it found"
        ) from None
    if batch:
        yield batch


def check_readable(source: Source | Path) -> int:
    """The size in bytes of a file that can be read and holds something. Raises BadInput."""
    source = source if isinstance(source, Source) else Source(source)
    read_head(source)
    return source.path.stat().st_size


def excerpt(value: object) -> str:
    """How a value begins, fit for a terminal and for UTF-8."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = f"({type(value).__name__})"
    return shown_text(text[:EXCERPT_CHARACTERS]) + ("…" if len(text) > EXCERPT_CHARACTERS else "")


def no_column(source: Source, name: str, columns: Sequence[str]) -> BadInput:
    """The complaint that `source` has no column `name`, with those it has."""
    shown = ", ".join(excerpt(column)[:60] for column in columns[:30]) + (", …" if len(columns) > 30 else "")
    return BadInput(
        f"{source} has no column `{name}`; it has: {shown or '(none)'}. "
        "Name the right one with --text-column, --id-column or --label-column"
    )


# Files -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Job:
    """One file to read, and how."""

    source: Source
    head: bytes
    required: tuple[str, ...]
    keep: frozenset[str] | None
    progress: Progress | None
    on_note: Callable[[str], None] | None

    @property
    def size(self) -> int:
        return self.source.path.stat().st_size

    def note(self, text: str) -> None:
        if self.on_note is not None:
            self.on_note(f"{self.source}: {text}")


_Rows = Iterator[tuple["Row | BadRow", int]]


def _rows_of(job: _Job) -> _Rows:
    kind = kind_of(job.source, job.head)
    if kind == "parquet":
        return _parquet_rows(job)
    if kind == "xlsx":
        return _excel_rows(job)
    return _text_rows(job, kind)


def _text_rows(job: _Job, kind: str) -> _Rows:
    scan = _scan(job.source, job.head)
    encoding = scan.encoding
    start = job.head.decode(encoding.partition("+")[0], _ERROR_HANDLER).lstrip("\ufeff \t\r\n")
    if kind == "csv" and job.source.format is None and start.startswith("{"):
        kind = "csv" if job.source.path.suffix.lower() in {".csv", ".tsv"} else "jsonl"
    if kind == "jsonl" and start.startswith("["):
        raise BadInput(
            f"{job.source} holds one JSON list; JSONL has one object a line (`jq -c '.[]' FILE` turns it into that)"
        )
    rows = _jsonl_rows if kind == "jsonl" else _csv_rows
    if scan.undecodable:
        _refuse_if_many(job, rows, scan)
    if scan.note:
        job.note(scan.note)
    return rows(job, encoding)


def _refuse_if_many(job: _Job, rows: Callable[[_Job, str], _Rows], scan: _Scan) -> None:
    """Raise BadInput where more than a row in a thousand cannot be decoded; they are counted before any is given."""
    total, bad, first = 0, 0, 0
    reason = _not_decodable(scan.encoding)
    for row, _ in rows(replace(job, required=(), keep=frozenset(), progress=None, on_note=None), scan.encoding):
        total += 1
        if isinstance(row, BadRow) and row.reason == reason:
            bad += 1
            first = first or row.number
    if bad * _ONE_IN > total:
        raise BadInput(
            f"{job.source}: {bad:,} of {total:,} rows are {reason}, the first in line {first:,}; without them the data "
            f"would be biased, so nothing is taken. {_advice(scan)}"
        )


def _advice(scan: _Scan) -> str:
    """Which `--encoding` makes the file readable, with a few words that show whether it is the right one."""
    if scan.mixed:
        usual = scan.guess.encodings[:1] if scan.guess.sure else ()
        fits = next((encoding for encoding in usual if encoding in _SINGLE_BYTE), "cp1252")
        return (
            "Other rows are UTF-8 with accents: the file mixes two encodings. Convert it, or run this again with "
            f"`--encoding utf-8+{fits}`, which takes what is not UTF-8 as {fits}: {_shown(scan.sample, fits)}"
        )
    others = [encoding for encoding in scan.guess.encodings if encoding != scan.encoding]
    if not others:
        return "Run this again with `--encoding NAME` and the encoding that it was saved in, or save it as UTF-8"
    shown = "; ".join(f"`--encoding {encoding}`: {_shown(scan.sample, encoding)}" for encoding in others)
    if len(others) == 1:
        return f"Run this again with {shown}"
    return f"Run this again with the encoding that reads right: {shown}"


def _shown(sample: bytes, encoding: str) -> str:
    """A few words around the first character outside ASCII."""
    text = sample.decode(encoding, "replace")
    place = next((place for place, character in enumerate(text) if character > "\x7f"), 0)
    line = text[max(0, place - 20) : place + 30]
    return f"“{' '.join(shown_text(line).split())}”"


@dataclass(frozen=True, slots=True)
class _Scan:
    """What the bytes of a text file say about its encoding."""

    encoding: str
    undecodable: bool = False
    """Whether some bytes are none of the encoding's."""
    note: str = ""
    sample: bytes = b""
    """Lines that are not UTF-8."""
    mixed: bool = False
    guess: encodings.Guess = encodings.Guess((), False)


_SINGLE_BYTE = frozenset(name for name in encodings.USUAL if name.startswith(("cp125", "cp8", "iso", "koi8", "mac")))


def _scan(source: Source, head: bytes) -> _Scan:
    """Read a text file once as bytes and say which encoding it is in. Raises BadInput where that cannot be told."""
    chosen = source.encoding or encodings.mark(head)
    if chosen is not None and chosen != encodings.UTF_8:
        undecodable = not _decodes(source, chosen)
        if not undecodable or source.encoding is None:
            return _Scan(chosen, undecodable)
    elif _decodes(source, encodings.UTF_8):
        return _Scan(encodings.UTF_8)
    sample, bad, accented = _lines_not_utf_8(source)
    guess = encodings.guess(sample) if bad else encodings.Guess((encodings.UTF_8,), True)
    if chosen is not None:
        return _Scan(chosen, True, sample=sample, guess=guess, mixed=bad > 0 and accented * 50 > bad)
    if accented * 50 > bad:
        return _Scan(encodings.UTF_8, True, sample=sample, guess=guess, mixed=True)
    if not guess.sure:
        return _Scan(encodings.UTF_8, True, sample=sample, guess=guess)
    best = guess.encodings[0]
    return _Scan(
        best,
        not _decodes(source, best),
        f"is not UTF-8; read as {best}: {_shown(sample, best)}; `--encoding` chooses another",
        sample,
        guess=guess,
    )


def _decodes(source: Source, encoding: str) -> bool:
    """Whether every byte of a file is one of the encoding's."""
    first, _, second = encoding.partition("+")
    if second:
        return True
    decoder = codecs.getincrementaldecoder(first)()
    try:
        with open_bytes(source) as file:
            while block := file.read(_BLOCK_BYTES):
                decoder.decode(block)
            decoder.decode(b"", True)
    except UnicodeError:
        return False
    return True


def _lines_not_utf_8(source: Source) -> tuple[bytes, int, int]:
    """A sample from the whole file of its lines that are not UTF-8, how many they are, and how many others have
    characters outside ASCII."""
    kept: list[bytes] = []
    size, every, bad, accented = 0, 1, 0, 0
    for line in _byte_lines(source):
        if line.isascii():
            continue
        try:
            line.decode()
            accented += 1
            continue
        except UnicodeDecodeError:
            bad += 1
        if bad % every == 0:
            kept.append(line[:_SAMPLE_BYTES])
            size += len(kept[-1])
        while size > _SAMPLE_BYTES and len(kept) > 1:  # thinned out evenly
            kept, every = kept[::2], 2 * every
            size = sum(map(len, kept))
    return b"\n".join(kept), bad, accented


def _byte_lines(source: Source) -> Iterator[bytes]:
    rest = b""
    with open_bytes(source) as file:
        while block := file.read(_BLOCK_BYTES):
            *lines, rest = (rest + block).replace(b"\r", b"\n").split(b"\n")
            yield from lines
            if len(rest) > RECORD_LIMIT:
                yield rest
                rest = b""
    yield rest


class _Lines(Iterator[str]):
    """The physical lines of a text file, each with its ending; remembers those of the present record.

    Bytes that the encoding does not know come as a lone surrogate, so that only their record is refused. Raises
    `_TooLong` once a record is over the limit, and can then be asked to skip it.
    """

    def __init__(self, source: Source, encoding: str) -> None:
        self._source = source
        self._encoding, _, second = encoding.partition("+")
        self._errors = _second_choice(second) if second else _ERROR_HANDLER
        self._file = self._open()
        self._given_back: deque[str] = deque()
        self.number = 0
        self.record: list[str] = []
        self.characters = 0

    def _open(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(open_bytes(self._source), self._encoding, self._errors, newline="")

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
        buffer: Any = self._file.buffer
        return int(getattr(buffer, "raw", buffer).tell())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _TooLong(Exception):
    """The present record is longer than RECORD_LIMIT."""


def _second_choice(encoding: str) -> str:
    """The name of an error handler that decodes what is not UTF-8 in another encoding of one byte a character."""
    name = f"al_pipeline.{encoding}"

    def decode(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        return error.object[error.start : error.end].decode(encoding, _ERROR_HANDLER), error.end

    codecs.register_error(name, decode)
    return name


# CSV ---------------------------------------------------------------------------------------------------------------
def _csv_rows(job: _Job, encoding: str) -> _Rows:
    start = job.head.decode(encoding.partition("+")[0], _ERROR_HANDLER)
    named = _named_delimiter(start)
    delimiter = named or _delimiter(job, start)
    records = _csv_records(job, encoding, delimiter, skip=1 if named else 0)
    header = next(records, None)
    if header is None:
        raise BadInput(f"{job.source} holds only blank lines; a table with a header is wanted ({WANTED})")
    _, cells, raw = header
    if isinstance(cells, str):
        raise BadInput(f"{job.source} has no usable header: {cells}; it begins: {excerpt(raw)[:100]}")
    columns = _column_names(job.source, cells, job.required)
    for number, fields, raw in records:
        if isinstance(fields, str):
            yield BadRow(number, fields, "", excerpt(raw)), len(raw)
        elif len(fields) != len(columns):
            detail = f"{len(fields)} where the header has {len(columns)}"
            yield BadRow(number, "wrong number of fields", detail, excerpt(raw)), len(raw)
        else:
            values = dict(zip(columns, fields, strict=True))
            yield Row(number, _kept(values, job.keep)), sum(map(len, fields))


def _csv_records(job: _Job, encoding: str, delimiter: str, skip: int) -> Iterator[tuple[int, list[str] | str, str]]:
    """Each record of a CSV file: its first line, its fields (or why there are none), its text (or how it begins)."""
    csv.field_size_limit(max(csv.field_size_limit(), RECORD_LIMIT + 1))
    size, progress = job.size, job.progress
    lines = _Lines(job.source, encoding)
    dialect: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    reader = csv.reader(lines, **dialect)
    try:
        for _ in range(skip):
            next(lines, None)
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


def _named_delimiter(head: str) -> str | None:
    """What Excel's first line `sep=;` says."""
    first = re.split(r"[\r\n]", head.removeprefix("\ufeff"), maxsplit=1)[0].strip(' "')
    found = re.fullmatch(r"sep=([^\w\s\"]|\t)", first, re.IGNORECASE)
    return found[1] if found else None


def _delimiter(job: _Job, head: str) -> str:
    """Which of , ; tab | separates the header's names: the one that gives the required ones and the most others."""
    if job.source.path.suffix.lower() == ".tsv":
        return "\t"
    header, quoted = [], False
    for character in head.lstrip("\ufeff\r\n"):
        quoted ^= character == '"'
        if not quoted and character in "\r\n":
            break
        header.append("\0" if quoted and character in _DELIMITERS else character)
    line = "".join(header)

    def fit(delimiter: str) -> tuple[int, int]:
        names = {name.strip(' "') for name in line.split(delimiter)}
        return sum(name in names for name in job.required), line.count(delimiter)

    return max(_DELIMITERS, key=fit)


def _column_names(source: Source, cells: Sequence[str], required: Sequence[str]) -> list[str]:
    """Distinct names of all columns: nameless ones become `column_3`, repeated ones `name.2`. Raises BadInput."""
    stripped = [cell.strip() for cell in cells]
    for name in required:
        if name not in stripped:
            raise no_column(source, name, stripped)
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


# JSONL -------------------------------------------------------------------------------------------------------------
def _jsonl_rows(job: _Job, encoding: str) -> _Rows:
    size, progress = job.size, job.progress
    missing = set(job.required)
    columns: dict[str, None] = {}
    lines = _Lines(job.source, encoding)
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
                row = Row(row.number, _kept(row.values, job.keep))
            yield row, len(raw)
    finally:
        lines.close()
    if progress is not None:
        progress(size, size)
    if columns:
        for name in job.required:
            if name in missing:
                raise no_column(job.source, name, list(columns))


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
def _parquet_rows(job: _Job) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, path, keep, progress, size = job.source, job.source.path, job.keep, job.progress, job.size
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = _column_names(source, schema.names, job.required)
            wanted = None if keep is None else [name for name in schema.names if name in keep]
            if wanted is not None:
                columns = [name for name in columns if name in keep] if keep is not None else columns
            total = file.metadata.num_rows
            largest = _largest_value(source, file.metadata, wanted)
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
        raise BadInput(f"{source} is not a Parquet file that can be read: {excerpt(str(error))}") from None


def _largest_value(source: Source, metadata: Any, wanted: Sequence[str] | None) -> int:
    """How many bytes one value of a text column may take once it is unpacked, at most; 0 where it takes its own room.

    A long text that stands in the file once can be the value of a million rows, as a place in a list of distinct
    values or as the beginning that it shares with the one before: a file of kilobytes that unpacks into gigabytes.
    Raises BadInput where values are so large on average, or so many in a row, that one could fill the memory.
    """
    largest = 0
    with open_regular(source) as file:
        for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
            for column in (group.column(number) for number in range(group.num_columns)):
                if wanted is not None and column.path_in_schema.split(".")[0] not in wanted:
                    continue
                size, name = column.total_uncompressed_size, excerpt(column.path_in_schema)[:60]
                if size > _LARGEST_AVERAGE * max(column.num_values, 1):
                    raise BadInput(
                        f"{source}: values of column `{name}` have {size // max(column.num_values, 1):,} bytes each, "
                        f"a row may have {RECORD_LIMIT:,} characters; leave the column out, or cut its values"
                    )
                if column.num_values > _MOST_VALUES * max(group.num_rows, 1):
                    raise BadInput(f"{source}: column `{name}` has over {_MOST_VALUES:,} values a row; leave it out")
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
        return BadRow(number, "a value that cannot be read", detail, excerpt(readable), "row"), size
    if size > RECORD_LIMIT:
        return BadRow(number, _too_long(), "", excerpt(values), "row"), size
    return Row(number, values, "row"), size


# XLSX --------------------------------------------------------------------------------------------------------------
def _excel_rows(job: _Job) -> _Rows:
    from al_pipeline.data.excel import read_sheet

    with open_regular(job.source) as file:
        title, rows = read_sheet(job.source, file)
        job.note(f"sheet {title}")
        _, header = next(rows)
        cells = ["" if cell is None else str(cell) for cell in header]
        columns = _column_names(job.source, cells, job.required)
        for number, values in rows:
            if len(values) > len(columns):
                detail = f"{len(values)} where the header has {len(columns)}"
                yield BadRow(number, "wrong number of fields", detail, excerpt(str(values)), "row"), EXCERPT_CHARACTERS
                continue
            filled = (*values, *[None] * (len(columns) - len(values)))
            named = dict(zip(columns, map(_excel_value, filled), strict=True))
            kept = _kept(named, job.keep)
            yield _parquet_row(number, list(kept), list(kept.values()))
    if job.progress is not None:
        job.progress(job.size, job.size)


def _excel_value(value: Any) -> Any:
    from al_pipeline.data.excel import ErrorCell

    if isinstance(value, ErrorCell):
        return _Unreadable(f"the cell shows {value.text}")
    return _plain(value)


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
    shown = {encodings.UTF_8: "UTF-8", "utf-16": "UTF-16", "utf-32": "UTF-32"}.get(encoding, encoding)
    return f"not valid {shown}"
