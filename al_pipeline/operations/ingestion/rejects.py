"""Rows that are not taken, each with its reason, kept in a file that their user can look at."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import IO

from al_pipeline.data.inputs import Source
from al_pipeline.data.table_rows import BadRow, Row, excerpt
from al_pipeline.files import json_line, move, sha256_file

_MOST = 100_000
"""Lines of a rejects file; what is rejected beyond them is counted alone."""


class Refused(Exception):
    """A row (or its label) that is not taken. The first argument is one of few reasons, the second what is special."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class Rejects:
    """The lines of a rejects file: file, line (CSV, JSONL) or row (Parquet, XLSX), reason, detail, the row's begin."""

    def __init__(self, lines: IO[str]) -> None:
        self._lines = lines
        self._count = 0

    def add(self, source: Source, row: Row | BadRow, refused: Refused, text_column: str) -> None:
        """Note that `row`, or its label, was refused."""
        self._count += 1
        if self._count <= _MOST:
            line = {
                "file": excerpt(source.name or source.path.name),
                row.unit: row.number,
                "reason": refused.reason,
                "detail": excerpt(refused.detail),
                "excerpt": _begin(row, text_column),
            }
            self._lines.write(json_line(line))

    def note(self) -> str | None:
        """What to say of rejects that the file does not hold."""
        if self._count <= _MOST:
            return None
        return f"the rejects file holds the first {_MOST:,} of {self._count:,} rejects"

    def keep(self, staging: Path, folder: Path, first: Source) -> Path | None:
        """Move them to a file whose name says which files and rows they are of: the same again, the same file.

        None where there are none.
        """
        if not self._count:
            return None
        self._lines.flush()
        self._lines.seek(0)
        staged = staging / "rejects.jsonl"
        with staged.open("w", encoding="utf-8", newline="\n") as out:
            shutil.copyfileobj(self._lines, out)
        stem = re.sub(r"[^\w.-]+", "_", Path(first.name or first.path.name).stem, flags=re.ASCII).strip("._")[:60]
        target = folder / f"{stem or 'rows'}-{sha256_file(staged)[:12]}.jsonl"
        move(staged, target)
        return target


def _begin(row: Row | BadRow, text_column: str) -> object:
    if isinstance(row, BadRow):
        return row.excerpt
    begins = {excerpt(name)[:100]: excerpt(row.values[name])[:100] for name in list(row.values)[:20]}
    begins[excerpt(text_column)] = excerpt(row.values.get(text_column, ""))
    return begins
