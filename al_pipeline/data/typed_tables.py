"""Parquet and XLSX files as rows: formats whose cells have types."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from al_pipeline.data import table_rows
from al_pipeline.data.inputs import Source, open_regular
from al_pipeline.data.table_rows import (
    BATCH_CHARACTERS,
    EXCERPT_CHARACTERS,
    BadRow,
    Block,
    Row,
    Rows,
    TableFile,
    column_names,
    excerpt,
    row_too_long,
    wrong_number_of_fields,
)
from al_pipeline.errors import BadInput

_LARGEST_AVERAGE = 16 * table_rows.RECORD_LIMIT
"""Maximum average size in bytes of the values of a Parquet column. With larger ones, a single value could exhaust
memory before its row is rejected.
"""
_MOST_VALUES = 1_000_000
"""Maximum average number of values per row in a column of lists."""
_BATCH_BYTES = 64 * 1024 * 1024
_BLOCK_ROWS = 8192
_LENGTH_BYTES = 4
"""Bytes that a dictionary page takes for the length of each value."""
_NEXT_INTEGER, _DICTIONARY_PAGE = b"\x15", 2


@dataclass(frozen=True, slots=True)
class _Unreadable:
    reason: str


# Parquet -----------------------------------------------------------------------------------------------------------
def parquet_rows(table: TableFile) -> Rows:
    """The rows of a Parquet file. Raises BadInput if it is damaged, or if one value could exhaust memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, keep = table.source, table.keep
    try:
        with pq.ParquetFile(source.path, pre_buffer=False) as file:  # else it keeps what it has read
            schema = file.schema_arrow
            columns = column_names(source, schema.names, table.required)
            wanted = None if keep is None else [name for name in schema.names if name in keep]
            if keep is not None:
                columns = [name for name in columns if name in keep]
            number = 0
            for batch in file.iter_batches(batch_size=_batch_rows(source, file.metadata, wanted), columns=wanted):
                values = [_python_values(batch.column(i)) for i in range(batch.num_columns)]
                yield from _checked_rows(range(number + 1, number + 1 + batch.num_rows), columns, values)
                number += batch.num_rows
                table.report_progress(table.size * number // max(file.metadata.num_rows, 1))
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{source} cannot be read as Parquet: {excerpt(str(error))}") from None


def _batch_rows(source: Source, metadata: Any, wanted: Sequence[str] | None) -> int:
    """The number of rows to read at a time, so that a batch stays within BATCH_CHARACTERS and _BATCH_BYTES."""
    largest = _largest_value(source, metadata, wanted)
    uncompressed = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    rows = min(_BLOCK_ROWS, BATCH_CHARACTERS * max(metadata.num_rows, 1) // max(uncompressed, 1))
    return int(max(1, min(rows, _BATCH_BYTES // max(largest, 1))))


def _largest_value(source: Source, metadata: Any, wanted: Sequence[str] | None) -> int:
    """An upper bound on the unpacked bytes of one shared text value; 0 if no encoding shares values.

    A long text that a file stores once can be the value of a million rows, through a dictionary or as a common prefix
    (DELTA_BYTE_ARRAY): a file of kilobytes then unpacks into gigabytes. Raises BadInput if values are so large on
    average, or so many in a row, that one could fill the memory.
    """
    largest = 0
    with open_regular(source) as file:
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            for column in (group.column(number) for number in range(group.num_columns)):
                if wanted is not None and column.path_in_schema.split(".")[0] not in wanted:
                    continue
                _check_column(source, group, column)
                if column.physical_type == "BYTE_ARRAY":
                    shares = "DELTA_BYTE_ARRAY" in column.encodings
                    size = int(column.total_uncompressed_size) if shares else _dictionary_bytes(file, column)
                    if size * _BLOCK_ROWS > _BATCH_BYTES and not shares:
                        size = _longest_value(source, number, column, size)
                    largest = max(largest, size)
    return largest


def _longest_value(source: Source, group: int, column: Any, size: int) -> int:
    """The longest value of a dictionary page of `size` bytes; `size` if that is not known to be all of the page."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    name = column.path_in_schema
    with pq.ParquetFile(source.path, read_dictionary=[name]) as file:
        batch = next(file.iter_batches(batch_size=1, row_groups=[group], columns=[name]), None)
    if batch is None or batch.num_columns != 1 or not pa.types.is_dictionary(batch.column(0).type):
        return size
    lengths = pc.binary_length(batch.column(0).dictionary)
    if len(lengths) == 0 or pc.sum(lengths).as_py() + _LENGTH_BYTES * len(lengths) != size:
        return size
    return int(pc.max(lengths).as_py())


def _check_column(source: Source, group: Any, column: Any) -> None:
    size, name = column.total_uncompressed_size, excerpt(column.path_in_schema)[:60]
    if size > _LARGEST_AVERAGE * max(column.num_values, 1):
        raise BadInput(
            f"{source}: values of column `{name}` have {size // max(column.num_values, 1):,} bytes each, but a row "
            f"may have at most {table_rows.RECORD_LIMIT:,} characters; remove the column, or shorten its values"
        )
    if column.num_values > _MOST_VALUES * max(group.num_rows, 1):
        raise BadInput(f"{source}: column `{name}` has more than {_MOST_VALUES:,} values per row; remove it")


def _dictionary_bytes(file: IO[bytes], column: Any) -> int:
    """The unpacked size of a column's dictionary page; 0 if it has none.

    The header of the first page holds it (Thrift's compact protocol: field 1 is the page type, field 2 the size). A
    reader that finds another size there rejects the page.
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


def _checked_rows(numbers: range, columns: Sequence[str], values: Sequence[Sequence[Any]]) -> Rows:
    """Rows by column: one block if all are readable and short."""
    kinds = [set(map(type, column)) for column in values]
    if not any(_Unreadable in kind for kind in kinds):
        size = sum(map(_characters, values, kinds))
        if size <= table_rows.RECORD_LIMIT:
            yield Block(numbers, dict(zip(columns, values, strict=True)), "row"), size
            return
    for number, cells in zip(numbers, zip(*values, strict=True), strict=True):
        yield _checked_row(number, columns, cells)


def _characters(column: Sequence[Any], kinds: set[type]) -> int:
    texts = column if kinds == {str} else (value for value in column if isinstance(value, str))
    return sum(map(len, texts))


def _checked_row(number: int, columns: Sequence[str], cells: Sequence[Any]) -> tuple[Row | BadRow, int]:
    values = dict(zip(columns, cells, strict=True))
    size = sum(len(cell) for cell in cells if isinstance(cell, str))
    bad = next((name for name, cell in values.items() if isinstance(cell, _Unreadable)), None)
    if bad is not None:
        readable = {name: cell for name, cell in values.items() if not isinstance(cell, _Unreadable)}
        detail = f"column `{excerpt(bad)}`: {values[bad].reason}"
        return BadRow(number, "a value that cannot be read", detail, excerpt(readable), "row"), size
    if size > table_rows.RECORD_LIMIT:
        return BadRow(number, row_too_long(), "", excerpt(values), "row"), size
    return Row(number, values, "row"), size


# XLSX --------------------------------------------------------------------------------------------------------------
def excel_rows(table: TableFile) -> Rows:
    """The rows of a workbook's first sheet that is not empty. Raises BadInput if it is damaged."""
    from al_pipeline.data.excel import read_sheet

    with open_regular(table.source) as file:
        title, rows = read_sheet(table.source, file)
        table.note(f"sheet {title}")
        _, header = next(rows)
        cells = ["" if cell is None else str(cell) for cell in header]
        columns = column_names(table.source, cells, table.required)
        for number, values in rows:
            if len(values) > len(columns):
                bad = wrong_number_of_fields(number, len(values), len(columns), excerpt(str(values)), "row")
                yield bad, EXCERPT_CHARACTERS
                continue
            filled = (*values, *[None] * (len(columns) - len(values)))
            kept = table.kept(dict(zip(columns, map(_excel_value, filled), strict=True)))
            yield _checked_row(number, list(kept), list(kept.values()))
    table.report_progress(table.size)


def _excel_value(value: Any) -> Any:
    from al_pipeline.data.excel import ErrorCell

    if isinstance(value, ErrorCell):
        return _Unreadable(f"the cell shows {value.text}")
    return _plain(value)


_AS_THEY_ARE = frozenset({str, int, bool, type(None)})
"""Types of values that JSON can store."""


# Values ------------------------------------------------------------------------------------------------------------
def _python_values(column: Any) -> list[Any]:
    """An Arrow array as plain values; one without a Python value (such as bytes that are not UTF-8) as _Unreadable."""
    try:
        values: list[Any] = column.to_pylist()
        return values if _AS_THEY_ARE.issuperset(map(type, values)) else list(map(_plain, values))
    except (ValueError, OverflowError, ArithmeticError, RecursionError, ImportError):
        return [_python_value(scalar) for scalar in column]


def _python_value(scalar: Any) -> Any:
    try:
        return _plain(scalar.as_py())
    except (ValueError, OverflowError, ArithmeticError, RecursionError, ImportError) as error:
        return _Unreadable(excerpt(str(error)))


def _plain(value: Any) -> Any:
    """A value that JSON can store: dates as ISO 8601, NaN and infinities as null, bytes as UTF-8. Raises ValueError."""
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
