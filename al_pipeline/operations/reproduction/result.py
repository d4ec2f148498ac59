"""What came of making a round again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cause = Literal["data", "features", "parameters", "engine"]
Source = Literal["dvc.lock", "round.json", "published"]


@dataclass(frozen=True, slots=True)
class Output:
    """One output, made again: which published accounts of it say the same, and which something else."""

    name: str
    stage: str
    """Empty for the plan."""
    sha256: str
    equal: tuple[Source, ...]
    different: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as recorded and as made again under another engine."""

    name: str
    recorded: float | None
    reproduced: float | None
    within_tolerance: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that differs. `stage` is empty where it shows before any stage has run."""

    stage: str
    cause: Cause
    message: str
    missing: bool = False
    """Whether the remote simply lacks it."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A round made again. It is reproduced where `difference` is None."""

    round: int
    compared: Literal["bytes", "metrics"]
    engine: str
    """How the recorded engine differs from the one that made it again, in words; empty where it does not."""
    outputs: tuple[Output, ...]
    metrics: tuple[Metric, ...]
    difference: Difference | None
    seconds: float
    folder: str | None
    """Where the clone lies, if it was kept."""


class FoundDifference(Exception):
    """Ends a reproduction at the first difference behind which nothing can be learnt."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(difference.message)
        self.difference = difference
