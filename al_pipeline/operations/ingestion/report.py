"""The result of an ingest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class IngestReport:
    """The result of one ingest, where rows = added + test_added + corrected + duplicates + rejected."""

    rows: int
    added: int
    """New items in the pool."""
    test_added: int
    """New items in the test set, given or drawn."""
    drawn: bool
    """Whether this ingest drew the test set at random."""
    duplicates: int
    """Rows whose content was known already; the first item with it stays, with its id."""
    rejected: Mapping[str, int]
    """Number of rejected rows, by reason."""
    labels: int
    """Labels that are new or differ from the one imported before."""
    labels_rejected: Mapping[str, int]
    """Number of rejected labels of accepted rows, by reason."""
    rejects_file: Path | None
    """One JSON object per reject: file, line (CSV, JSONL) or row (Parquet, XLSX), reason, detail, start of the row."""
    corrected: int = 0
    """Ids whose text was corrected, in the pool or in the test set."""
    notes: tuple[str, ...] = ()
    """Further messages for the user."""
    about_corrections: tuple[str, ...] = ()
    """Those of `notes` about corrections."""
    about_test: tuple[str, ...] = ()
    """Those of `notes` about the test set rather than a file."""

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {
            "rows": self.rows,
            "added": self.added,
            "test_added": self.test_added,
            "test_drawn": self.drawn,
            "corrected": self.corrected,
            "duplicates": self.duplicates,
            "rejected": dict(self.rejected),
            "labels": self.labels,
            "labels_rejected": dict(self.labels_rejected),
            "rejects_file": None if self.rejects_file is None else str(self.rejects_file),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """Format the report as lines of text."""
        test = "drawn at random as the test set" if self.drawn else "new in the test set"
        said = [
            f"{self.rows:,} rows: {self.added:,} new in the pool, {self.test_added:,} {test}, "
            f"{self.duplicates:,} duplicates, {sum(self.rejected.values()):,} rejected"
        ]
        if self.corrected:
            texts = "1 text was" if self.corrected == 1 else f"{self.corrected:,} texts were"
            said.append(f"{texts} corrected; the old texts and their labels no longer count from the next round on")
        if self.labels:
            said.append(f"{self.labels:,} labels imported; they count from the next round on")
        said += [f"rejected, {count:,}: {reason}" for reason, count in _by_count(self.rejected)]
        said += [f"label not used, {count:,}: {reason}" for reason, count in _by_count(self.labels_rejected)]
        if self.rejects_file is not None:
            said.append(f"all of them, with the reasons: {self.rejects_file}")
        return [*said, *self.notes]


def _by_count(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
