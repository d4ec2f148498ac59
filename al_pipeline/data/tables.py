"""Users' tables (CSV, JSONL, Parquet, XLSX), read in batches of rows within bounded memory.

A file that cannot be used (missing, empty, not a table, without a required column) is a BadInput. A row that cannot be
read is a BadRow among the others, with its place and the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from al_pipeline.data.inputs import Source, kind_of, read_head
from al_pipeline.data.table_rows import BATCH_CHARACTERS, BATCH_ROWS, BadRow, Block, Progress, Row, Rows, TableFile
from al_pipeline.data.text_tables import text_rows
from al_pipeline.data.typed_tables import excel_rows, parquet_rows
from al_pipeline.errors import BadInput


def read_table(
    source: Source | Path,
    required: Sequence[str] = (),
    keep: Sequence[str] | None = None,
    batch_rows: int = BATCH_ROWS,
    progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Iterator[list[Row | BadRow]]:
    """The rows of a CSV, JSONL, Parquet or XLSX file, in file order, in batches of bounded size.

    `required` columns must exist (JSONL: in at least one row, so a missing one is reported after the last row). With
    `keep`, only these columns are read. `on_note` receives notes for the user on how the file was read. Raises
    BadInput if the file cannot be used.
    """
    batch: list[Row | BadRow] = []
    characters = 0
    for piece, size in _pieces(source, required, keep, progress, on_note):
        rows, each = (piece.rows(), size // len(piece) + 1) if isinstance(piece, Block) else ((piece,), size)
        for row in rows:
            batch.append(row)
            characters += each
            if len(batch) >= batch_rows or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def read_blocks(
    source: Source | Path,
    required: Sequence[str] = (),
    progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Iterator[Row | BadRow | Block]:
    """The rows of `read_table`, most of them in blocks, which are an order of magnitude faster to work on."""
    for piece, _ in _pieces(source, required, None, progress, on_note):
        yield piece


def _pieces(
    source: Source | Path,
    required: Sequence[str],
    keep: Sequence[str] | None,
    progress: Progress | None,
    on_note: Callable[[str], None] | None,
) -> Rows:
    source = source if isinstance(source, Source) else Source(source)
    head = read_head(source)
    table = TableFile(source, head, tuple(required), None if keep is None else frozenset(keep), progress, on_note)
    try:
        yield from _rows_of(table)
    except OSError as error:
        raise BadInput(f"{source} cannot be read: {error.strerror or error}") from None
    except UnicodeError as error:  # --encoding utf-16 without a byte order mark: the byte order is unknown
        raise BadInput(
            f"{source} is not {source.encoding}: {error}; name its encoding, or omit --encoding to have it detected"
        ) from None


def check_readable(source: Source | Path) -> int:
    """The size in bytes of a file that can be read and is not empty. Raises BadInput."""
    source = source if isinstance(source, Source) else Source(source)
    read_head(source)
    return source.path.stat().st_size


def _rows_of(table: TableFile) -> Rows:
    kind = kind_of(table.source, table.head)
    if kind == "parquet":
        return parquet_rows(table)
    if kind == "xlsx":
        return excel_rows(table)
    return text_rows(table, kind)
