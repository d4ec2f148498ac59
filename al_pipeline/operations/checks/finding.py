"""The result of a check of `al doctor`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check; `fix` says how to resolve it."""

    check: str
    level: Literal["ok", "warning", "error"]
    message: str
    fix: str = ""

    def to_row(self) -> dict[str, str]:
        """This finding as a JSON object."""
        return asdict(self)
