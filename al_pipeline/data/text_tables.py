"""CSV and JSONL files as rows."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from al_pipeline.data import table_rows
from al_pipeline.data.inputs import WANTED
from al_pipeline.data.table_rows import (
    EXCERPT_CHARACTERS,
    BadRow,
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
        total += 1
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
    records = _csv_records(table, encoding, delimiter, skip=1 if named else 0)
    header = next(records, None)
    if header is None:
        raise BadInput(f"{table.source} has only blank lines; it must be a table with a header ({WANTED})")
    _, cells, raw = header
    if isinstance(cells, str):
        raise BadInput(f"{table.source} has no usable header: {cells}; it begins with: {excerpt(raw)[:100]}")
    columns = column_names(table.source, cells, table.required)
    for number, fields, raw in records:
        if isinstance(fields, str):
            yield BadRow(number, fields, "", excerpt(raw)), len(raw)
        elif len(fields) != len(columns):
            yield wrong_number_of_fields(number, len(fields), len(columns), excerpt(raw)), len(raw)
        else:
            values = dict(zip(columns, fields, strict=True))
            yield Row(number, table.kept(values)), sum(map(len, fields))


def _csv_records(
    table: TableFile, encoding: str, delimiter: str, skip: int
) -> Iterator[tuple[int, list[str] | str, str]]:
    """The records of a CSV file: the line on which each begins, its fields (or why they cannot be parsed), and its text
    (or the first line of it).
    """
    csv.field_size_limit(max(csv.field_size_limit(), table_rows.RECORD_LIMIT + 1))
    lines = TextLines(table.source, encoding)
    dialect: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    reader = csv.reader(lines, **dialect)
    try:
        for _ in range(skip):
            next(lines, None)
        while True:
            lines.begin()
            start = lines.number + 1
            try:
                fields, raw = _next_record(reader, lines)
            except StopIteration:
                break
            if UNDECODABLE in raw:
                fields = not_decodable(encoding)
            if not fields:
                continue
            if start % 256 == 0:
                table.report_progress(lines.position())
            yield start, fields, raw
    finally:
        lines.close()
    table.report_progress(table.size)


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
    if "unexpected end of data" in message:
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
        while True:
            lines.begin()
            try:
                raw = next(lines)
            except StopIteration:
                break
            except RecordTooLong:
                yield BadRow(lines.number, row_too_long(), "", excerpt(lines.record[0])), EXCERPT_CHARACTERS
                lines.skip_line()
                continue
            if lines.number % 256 == 0:
                table.report_progress(lines.position())
            if not raw.strip():
                continue
            row = _json_row(lines.number, raw, encoding)
            if isinstance(row, Row):
                missing.difference_update(row.values)
                if len(columns) < 100:
                    columns.update(dict.fromkeys(row.values))
                row = Row(row.number, table.kept(row.values))
            yield row, len(raw)
    finally:
        lines.close()
    table.report_progress(table.size)
    if columns:
        for name in table.required:
            if name in missing:
                raise missing_column(table.source, name, list(columns))


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
