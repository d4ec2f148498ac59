"""Scenarios of answers, losses and interventions: random histories, more and longer than in the test suite."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from histories import fails, shortest, steps_of

from chaos.lab import FaultCount, Lab, Scenario
from chaos.sites import Failure

SEEDS = range(1000, 2000)
AT_ONCE = 50
LENGTH = 60
"""The number of steps in a history."""


def answer_scenarios() -> Iterator[Scenario]:
    """All of them."""
    for first in range(SEEDS.start, SEEDS.stop, AT_ONCE):
        yield Scenario(f"histories from {first}", "random history of answers", partial(_histories, first=first))


def _histories(lab: Lab, tally: FaultCount, first: int) -> None:
    """Each history is checked after each of its steps; the shortest failing one is reported."""
    for seed in range(first, first + AT_ONCE):
        tally.strike()
        steps = steps_of(seed, LENGTH)
        if error := fails(steps):
            raise Failure(f"the history of seed {seed} fails ({error!r}): {shortest(steps)}")
