"""Scenarios of answers, losses and interventions: random histories, more and longer than in the test suite."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

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
        steps, how = steps_of(seed, LENGTH), course_of(seed)
        if error := fails(steps, **how):
            raise Failure(f"the history of seed {seed}, {how}, fails ({error!r}): {shortest(steps, **how)}")


def course_of(seed: int) -> dict[str, Any]:
    """How the history of a seed is played: half of them in a day, half over days.

    Over days a pull reads only what is new. An audit compares the rest by its totals, and reads 1 to 3 tasks of it in
    turn: fewer than there are, as in a workspace of thousands. In half of these histories every pull is an audit.
    """
    if seed % 2 == 0:
        return {}
    return {"pause": 3600, "rolling": 1 + seed // 4 % 3, "audits": seed % 4 == 3}
