"""What a check of `al doctor` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `fix` says what to do about it."""

    check: str
    level: Literal["ok", "warning", "error"]
    message: str
    fix: str = ""

    def to_row(self) -> dict[str, str]:
        """This finding as a JSON object."""
        return asdict(self)
