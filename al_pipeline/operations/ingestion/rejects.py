"""Write rejected rows, each with its reason, to a file for the user."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import IO

from al_pipeline.data.inputs import Source
from al_pipeline.data.table_rows import BadRow, Row, excerpt
from al_pipeline.files import json_line, move, sha256_file

_MOST = 100_000
"""Maximum number of lines in a rejects file; further rejects are only counted."""


class Refused(Exception):
    """A row, or its label, is rejected. `reason` is one of a few fixed texts; `detail` is specific to the row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class Rejects:
    """Lines of a rejects file: file, line (CSV, JSONL) or row (Parquet, XLSX), reason, detail, start of the row."""

    def __init__(self, lines: IO[str]) -> None:
        self._lines = lines
        self._count = 0

    def add(self, source: Source, row: Row | BadRow, refused: Refused, text_column: str) -> None:
        """Add a line for a row that was refused, or whose label was."""
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
        """A message about the rejects that the file does not hold; None if it holds all."""
        if self._count <= _MOST:
            return None
        return f"the rejects file has the first {_MOST:,} of {self._count:,} rejects"

    def keep(self, staging: Path, folder: Path, first: Source) -> Path | None:
        """Move the lines to a file in `folder` named after the first source and the lines' hash; return its path.

        The same rejects give the same file name. Returns None if there are none.
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
