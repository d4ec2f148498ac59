"""CSV and JSONL files as rows."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from operator import itemgetter
from typing import Any

from msgspec.structs import replace

from al_pipeline.data import table_rows
from al_pipeline.data.inputs import WANTED
from al_pipeline.data.table_rows import (
    EXCERPT_CHARACTERS,
    BadRow,
    Block,
    Row,
    Rows,
    TableFile,
    column_names,
    excerpt,
    missing_column,
    row_too_long,
    wrong_number_of_fields,
)
from al_pipeline.data.text_lines import (
    MARK_UNDECODABLE,
    UNDECODABLE,
    DetectedEncoding,
    RecordTooLong,
    TextLines,
    detect_encoding,
    not_decodable,
)
from al_pipeline.errors import BadInput

_DELIMITERS = ",;\t|"
_NOT_ENDED = "unexpected end of data"
"""What `csv` says of a quoted field without its end."""
_ONE_IN = 1000
"""A file with more than one undecodable row in this many is rejected: its other rows would not be a random sample."""


def text_rows(table: TableFile, kind: str) -> Rows:
    """The rows of a CSV or JSONL file. Raises BadInput if its encoding, its header or its form is not usable."""
    detected = detect_encoding(table.source, table.head)
    start = _decoded_head(table, detected.encoding).lstrip("\ufeff \t\r\n")
    if kind == "csv" and table.source.format is None and start.startswith("{"):
        kind = "csv" if table.source.path.suffix.lower() in {".csv", ".tsv"} else "jsonl"
    if kind == "jsonl" and start.startswith("["):
        raise BadInput(
            f"{table.source} is one JSON list; JSONL has one object per line (`jq -c '.[]' FILE` converts it)"
        )
    rows = _jsonl_rows if kind == "jsonl" else _csv_rows
    if detected.undecodable:
        _reject_if_many_undecodable(table, rows, detected)
    if detected.note:
        table.note(detected.note)
    return rows(table, detected.encoding)


def _decoded_head(table: TableFile, encoding: str) -> str:
    return table.head.decode(encoding.partition("+")[0], MARK_UNDECODABLE)


def _reject_if_many_undecodable(
    table: TableFile, rows: Callable[[TableFile, str], Rows], detected: DetectedEncoding
) -> None:
    """Raise BadInput if more than one row in a thousand cannot be decoded; counts them before any row is read."""
    total, bad, first = 0, 0, 0
    reason = not_decodable(detected.encoding)
    counted = replace(table, required=(), keep=frozenset(), on_progress=None, on_note=None)
    for row, _ in rows(counted, detected.encoding):
        total += len(row) if isinstance(row, Block) else 1
        if isinstance(row, BadRow) and row.reason == reason:
            bad += 1
            first = first or row.number
    if bad * _ONE_IN > total:
        raise BadInput(
            f"{table.source}: {bad:,} of {total:,} rows are {reason}, the first in line {first:,}; leaving them out "
            f"would bias the data, so no row was used. {detected.advice()}"
        )


# CSV ---------------------------------------------------------------------------------------------------------------
def _csv_rows(table: TableFile, encoding: str) -> Rows:
    start = _decoded_head(table, encoding)
    named = _declared_delimiter(start)
    delimiter = named or _guessed_delimiter(table, start)
    csv.field_size_limit(max(csv.field_size_limit(), table_rows.RECORD_LIMIT + 1))
    lines = TextLines(table.source, encoding)
    try:
        if named:
            next(lines, None)
        header = next(_csv_records(lines, delimiter, encoding), None)
        if header is None:
            raise BadInput(f"{table.source} has only blank lines; it must be a table with a header ({WANTED})")
        _, cells, raw = header
        if isinstance(cells, str):
            raise BadInput(f"{table.source} has no usable header: {cells}; it begins with: {excerpt(raw)[:100]}")
        columns = column_names(table.source, cells, table.required)
        for records in _csv_blocks(lines, delimiter, encoding):
            table.report_progress(lines.position())
            yield from _checked_records(table, columns, records)
    finally:
        lines.close()
    table.report_progress(table.size)


_Record = tuple[int, list[str] | str, str]
"""The line on which a record of a CSV file begins, its fields (or why they cannot be parsed), and its text (or the
first line of it).
"""


def _checked_records(table: TableFile, columns: Sequence[str], records: Sequence[_Record]) -> Rows:
    """The rows of records that follow each other, in blocks between those that cannot be used."""
    fields_of = [fields for _, fields, _ in records]
    if set(map(type, fields_of)) == {list} and set(map(len, fields_of)) == {len(columns)}:
        yield from _csv_block(table, columns, records)
        return
    start = 0
    for position, (number, fields, raw) in enumerate(records):
        if not isinstance(fields, str) and len(fields) == len(columns):
            continue
        yield from _csv_block(table, columns, records[start:position])
        start = position + 1
        if isinstance(fields, str):
            yield BadRow(number, fields, "", excerpt(raw)), len(raw)
        else:
            yield wrong_number_of_fields(number, len(fields), len(columns), excerpt(raw)), len(raw)
    yield from _csv_block(table, columns, records[start:])


def _csv_block(table: TableFile, columns: Sequence[str], records: Sequence[_Record]) -> Rows:
    if records:
        numbers, rows, raw = zip(*records, strict=True)
        values = dict(zip(columns, zip(*rows, strict=True), strict=True))
        yield Block(numbers, table.kept(values)), sum(map(len, raw))


def _csv_blocks(lines: TextLines, delimiter: str, encoding: str) -> Iterator[list[_Record]]:
    """The records of a CSV file, many at a time; one by one where a record cannot be parsed, or is very long."""
    begun: list[str] = []
    """Lines of a record that may go on after them."""
    while read := begun + (more := lines.read_lines()):
        long = sum(map(len, read)) > table_rows.RECORD_LIMIT
        records, rest, unfinished = ([], read, False) if long else _parsed(read, lines.number, delimiter, encoding)
        if records:
            yield records
        if unfinished and more:
            begun = list(rest)
            continue
        begun = []
        lines.push_back(rest)
        for record in _csv_records(lines, delimiter, encoding) if rest else ():
            yield [record]
            if not long or not lines.has_pushed_back:
                break


def _parsed(
    lines: Sequence[str], last: int, delimiter: str, encoding: str
) -> tuple[list[_Record], Sequence[str], bool]:
    """The records of `lines` up to one that cannot be parsed; the lines from that one on; and whether it lacks its end.

    `last`: the number of the last line.
    """
    rows: list[list[str] | str] = []
    ends = [0]
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    unfinished = False
    try:
        for fields in reader:
            rows.append(fields)
            ends.append(reader.line_num)
    except csv.Error as error:
        unfinished = _NOT_ENDED in str(error)
    raw: Sequence[str] = lines
    if len(rows) < len(lines):
        raw = ["".join(lines[start:stop]) for start, stop in zip(ends, ends[1:], strict=False)]
    if UNDECODABLE in "".join(lines):
        bad = not_decodable(encoding)
        rows = [bad if UNDECODABLE in text else fields for fields, text in zip(rows, raw, strict=True)]
    first = last - len(lines) + 1
    records = zip(map(first.__add__, ends), rows, raw, strict=False)
    return list(filter(itemgetter(1), records)), lines[ends[-1] :], unfinished


def _csv_records(lines: TextLines, delimiter: str, encoding: str) -> Iterator[_Record]:
    """The records of a CSV file, one by one, without blank lines."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin()
        start = lines.number + 1
        try:
            fields, raw = _next_record(reader, lines)
        except StopIteration:
            return
        if UNDECODABLE in raw:
            fields = not_decodable(encoding)
        if fields:
            yield start, fields, raw


def _next_record(reader: Iterator[list[str]], lines: TextLines) -> tuple[list[str] | str, str]:
    """The next record's fields (or why they cannot be parsed) and its text. Raises StopIteration at the end."""
    try:
        fields = next(reader)
    except RecordTooLong:
        raw = lines.record[0]
        lines.skip_quoted()
        return row_too_long(), raw
    except csv.Error as error:
        raw = lines.record[0]
        lines.push_back_all_but_first()
        return _csv_problem(str(error)), raw
    return fields, lines.record[0] if len(lines.record) == 1 else "".join(lines.record)


def _csv_problem(message: str) -> str:
    if "expected after" in message:
        return "a quote inside a quoted field must be doubled"
    if _NOT_ENDED in message:
        return "a quoted field is never closed"
    return f"not valid CSV: {message}"


def _declared_delimiter(head: str) -> str | None:
    """The delimiter that Excel declares in a first line `sep=;`."""
    first = re.split(r"[\r\n]", head.removeprefix("\ufeff"), maxsplit=1)[0].strip(' "')
    found = re.fullmatch(r"sep=([^\w\s\"]|\t)", first, re.IGNORECASE)
    return found[1] if found else None


def _guessed_delimiter(table: TableFile, head: str) -> str:
    """The one of , ; tab | that yields the most required column names, then the most columns."""
    if table.source.path.suffix.lower() == ".tsv":
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
        return sum(name in names for name in table.required), line.count(delimiter)

    return max(_DELIMITERS, key=fit)


# JSONL -------------------------------------------------------------------------------------------------------------
def _jsonl_rows(table: TableFile, encoding: str) -> Rows:
    missing = set(table.required)
    columns: dict[str, None] = {}
    lines = TextLines(table.source, encoding)
    try:
        while read := lines.read_lines():
            table.report_progress(lines.position())
            for piece, size in _jsonl_pieces(read, lines.number - len(read) + 1, encoding):
                if isinstance(piece, BadRow):
                    yield piece, size
                    continue
                names = piece.columns if isinstance(piece, Block) else piece.values
                missing.difference_update(names)
                if len(columns) < 100:
                    columns.update(dict.fromkeys(names))
                kept = table.kept(names)
                if isinstance(piece, Block):
                    yield Block(piece.numbers, kept), size
                else:
                    yield Row(piece.number, kept), size
            if len(read[-1]) > table_rows.RECORD_LIMIT:
                lines.skip_line(read[-1])
    finally:
        lines.close()
    table.report_progress(table.size)
    if columns:
        for name in table.required:
            if name in missing:
                raise missing_column(table.source, name, list(columns))


def _jsonl_pieces(lines: Sequence[str], first: int, encoding: str) -> Rows:
    """The rows of some lines, in blocks between those that cannot be read; `first`: the number of the first line."""
    found = _parsed_lines(lines)
    start = 0
    for position in [position for position, pairs in enumerate(found) if pairs is None] if None in found else ():
        yield from _json_block(lines, found, first, range(start, position))
        start = position + 1
        number, raw = first + position, lines[position]
        if len(raw) > table_rows.RECORD_LIMIT:
            yield BadRow(number, row_too_long(), "", excerpt(raw)), EXCERPT_CHARACTERS
        elif raw.strip():
            yield _json_row(number, raw, encoding), len(raw)
    yield from _json_block(lines, found, first, range(start, len(lines)))


_Pairs = tuple[tuple[str, Any], ...]


def _parsed_lines(lines: Sequence[str]) -> Sequence[_Pairs | None]:
    """The keys and values of the object in each line; None for a line that must be read by itself."""
    stripped = list(map(str.strip, lines, repeat(_JSON_BLANKS)))
    plain = max(map(len, lines)) <= table_rows.RECORD_LIMIT and UNDECODABLE not in "".join(lines)
    try:
        found = list(map(_scan_pairs, stripped, repeat(0))) if plain else []  # StopIteration (no JSON) ends the list
    except (ValueError, RecursionError):
        found = []
    if len(found) == len(lines):
        values, ends = zip(*found, strict=True)
        if ends == tuple(map(len, stripped)) and set(map(type, values)) == {tuple}:
            return values
    return [_parsed_line(text) for text in stripped]


def _parsed_line(text: str) -> _Pairs | None:
    if len(text) > table_rows.RECORD_LIMIT or UNDECODABLE in text:
        return None
    try:
        pairs, end = _scan_pairs(text, 0)
    except (StopIteration, ValueError, RecursionError):
        return None
    return pairs if isinstance(pairs, tuple) and end == len(text) else None


def _json_block(lines: Sequence[str], found: Sequence[_Pairs | None], first: int, part: range) -> Rows:
    """The rows of the lines at the positions `part`: one block, or row by row if their keys differ."""
    if not part:
        return
    some, numbers = found[part.start : part.stop], range(first + part.start, first + part.stop)
    columns = _columns(some)
    if columns:
        yield Block(numbers, columns), sum(map(len, lines[part.start : part.stop]))
        return
    for position in part:
        raw = lines[position]
        yield _json_row(first + position, raw, ""), len(raw)


def _columns(found: Sequence[_Pairs | None]) -> dict[str, Sequence[Any]] | None:
    """The columns of rows that all have the same keys in the same order; None for others."""
    columns: dict[str, Sequence[Any]] = {}
    try:
        for pairs in zip(*found, strict=True):
            names, values = zip(*pairs, strict=True)
            if names[0] in columns or names.count(names[0]) < len(names):
                return None
            columns[names[0]] = values if _PLAIN.issuperset(map(type, values)) else tuple(map(_objects, values))
    except (ValueError, RecursionError):  # other keys, or a repeated one in an object within
        return None
    return columns


def _objects(value: Any) -> Any:
    """A value of `_scan_pairs` with dicts for its pairs. Raises ValueError on a repeated key."""
    if isinstance(value, tuple):
        return _distinct_keys([(name, _objects(inner)) for name, inner in value])
    return list(map(_objects, value)) if isinstance(value, list) else value


def _json_row(number: int, raw: str, encoding: str) -> Row | BadRow:
    if UNDECODABLE in raw:
        return BadRow(number, not_decodable(encoding), "", excerpt(raw))
    try:
        values = json.loads(raw, object_pairs_hook=_distinct_keys, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        return BadRow(number, "not valid JSON", f"{error.msg} at column {error.colno}", excerpt(raw))
    except ValueError as error:  # a repeated key, NaN, an integer of thousands of digits
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
        raise ValueError(f"the key `{next(name for name in names if names.count(name) > 1)}` is repeated")
    return values


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_JSON_BLANKS = " \t\r\n"
_PLAIN = frozenset({str, int, float, bool, type(None)})
_pairs_decoder: Any = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=_reject_constant)
_scan_pairs = _pairs_decoder.scan_once
"""Parse one JSON value of a text from a position on; an object becomes a tuple of pairs. Returns it with its end."""
