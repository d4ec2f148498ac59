"""Rows of an Excel workbook, read one at a time; the only module that imports openpyxl."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import IO, Any
from xml.etree.ElementTree import ParseError

from al_pipeline.data.inputs import LARGEST_RATIO, Source
from al_pipeline.errors import BadInput
from al_pipeline.records import shown_text

_SMALL = 64 * 1024 * 1024
_LARGEST_STRINGS = 256 * 1024 * 1024
"""Maximum unpacked bytes of the parts that openpyxl loads into memory: shared strings, styles and the like."""
_MOST_PARTS = 5000
_STRAY_COLUMNS = 50
"""Number of columns read beyond the header: a row with a cell there is rejected; cells further right are ignored."""


class ErrorCell:
    """A cell that shows an error, such as #N/A or #REF!."""

    def __init__(self, text: str) -> None:
        self.text = text


def read_sheet(source: Source, file: IO[bytes]) -> tuple[str, Iterator[tuple[int, tuple[Any, ...]]]]:
    """The title of the first sheet that is not empty, and its rows from the header on, each with its number.

    The title names further sheets that are not empty: `first (not read: second, third)`. Raises BadInput, also while
    the rows are read.
    """
    try:
        import openpyxl
    except ImportError:
        raise BadInput(
            f"{source} is an Excel workbook, which needs the package openpyxl: `pip install 'al-pipeline[xlsx]'`, or "
            "save the sheet as CSV (UTF-8)"
        ) from None
    _check_size(source, file)
    with warnings.catch_warnings(), _damage_as_bad_input(source):
        warnings.simplefilter("ignore")  # about styles and extensions, which do not affect values
        book = openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False)
        sheets = []
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # many programs write wrong ones
            if any(any(cell is not None for cell in row) for row in sheet.iter_rows(max_row=100, values_only=True)):
                sheets.append(sheet)
    if not sheets:
        book.close()
        raise BadInput(f"{source} has no sheet with a table in its first 100 rows")
    title = shown_text(sheets[0].title)
    if len(sheets) > 1:
        title += f" (not read: {', '.join(shown_text(sheet.title) for sheet in sheets[1:6])})"
    return title, _rows(source, book, sheets[0])


def _rows(source: Source, book: Any, sheet: Any) -> Iterator[tuple[int, tuple[Any, ...]]]:
    with closing(book), warnings.catch_warnings(), _damage_as_bad_input(source):
        warnings.simplefilter("ignore")
        width = None
        for number, cells in enumerate(sheet.iter_rows(), start=1):
            values = tuple(map(_value, cells if width is None else cells[: width + _STRAY_COLUMNS]))
            while values and values[-1] is None:
                values = values[:-1]
            if not values:
                continue
            width = len(values) if width is None else width
            yield number, values


def _value(cell: Any) -> Any:
    return ErrorCell(str(cell.value)) if cell.data_type == "e" else cell.value


def _check_size(source: Source, file: IO[bytes]) -> None:
    """Reject a workbook (a ZIP file) whose directory announces more unpacked bytes than allowed.

    The announced sizes can be trusted: `zipfile` reads no more of a part than its announced size.
    """
    try:
        with zipfile.ZipFile(file) as parts:
            infos = parts.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BadInput(f"{source} is a damaged ZIP archive or Excel workbook: {error}") from None
    names = {info.filename for info in infos}
    if "xl/workbook.xml" not in names:
        what = "an Excel workbook in binary form (.xlsb)" if "xl/workbook.bin" in names else "a ZIP archive"
        raise BadInput(f"{source} is {what}; unpack it, or save the sheet as .xlsx or CSV (UTF-8)")
    packed = file.seek(0, 2)
    file.seek(0)
    unpacked = sum(info.file_size for info in infos)
    strings = sum(info.file_size for info in infos if "worksheets/" not in info.filename)
    if len(infos) > _MOST_PARTS or unpacked > max(_SMALL, LARGEST_RATIO * packed) or strings > _LARGEST_STRINGS:
        raise BadInput(
            f"{source} unpacks to {unpacked:,} bytes in {len(infos):,} parts, too much for a workbook of {packed:,} "
            "bytes; save the sheet as CSV (UTF-8)"
        )


class _damage_as_bad_input:
    """Turns any exception that openpyxl raises on a damaged workbook into a BadInput."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        damaged = (
            ParseError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError, AttributeError,
            IndexError, OSError, NotImplementedError, RecursionError, OverflowError,
        )  # fmt: skip
        if isinstance(error, damaged) and not isinstance(error, BadInput):
            raise BadInput(
                f"{self._source} cannot be read as a workbook ({type(error).__name__}: {error}); open it and save it "
                "again, or save the sheet as CSV (UTF-8)"
            ) from None
