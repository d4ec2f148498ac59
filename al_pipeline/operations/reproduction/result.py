"""The result of reproducing a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cause = Literal["data", "features", "parameters", "engine"]
Source = Literal["dvc.lock", "round.json", "published"]


@dataclass(frozen=True, slots=True)
class Output:
    """One reproduced output: which published sources it equals, and from which it differs."""

    name: str
    stage: str
    """Empty for the plan."""
    sha256: str
    equal: tuple[Source, ...]
    different: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as recorded and as reproduced under another engine."""

    name: str
    recorded: float | None
    reproduced: float | None
    within_tolerance: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference. `stage` is empty if it does not belong to a stage."""

    stage: str
    cause: Cause
    message: str
    missing: bool = False
    """Whether the cause is an object that the remote does not provide."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """The reproduction of a round. It succeeded if `difference` is None."""

    round: int
    compared: Literal["bytes", "metrics"]
    engine: str
    """How the recorded engine differs from the one that ran, in words; empty if it does not."""
    outputs: tuple[Output, ...]
    metrics: tuple[Metric, ...]
    difference: Difference | None
    seconds: float
    folder: str | None
    """Path of the clone, if it was kept."""


class FoundDifference(Exception):
    """Ends a reproduction at a difference that makes further comparison pointless."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(difference.message)
        self.difference = difference
