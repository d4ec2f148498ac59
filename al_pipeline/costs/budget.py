"""What answers have cost so far, and what the budget leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from al_pipeline.costs.answer_times import as_array, capped, filled
from al_pipeline.params import Budget

NEARLY = 0.9
"""The share of a budget at which people are told that it is nearly spent."""


class Spent(Struct, frozen=True):
    """What people's answers have cost."""

    labels: int
    """Answers with a label, of all annotators, to pool and test set."""
    answers: int
    """The same and skips, which take time too."""
    timed: int
    """Of these, the answers with a time."""
    seconds: float | None
    """The capped times of all answers; one without a time counts as the mean of the others. None without any time."""

    @property
    def mean_seconds(self) -> float | None:
        """The mean time of an answer."""
        return self.seconds / self.answers if self.seconds is not None and self.answers else None

    @property
    def hours(self) -> float | None:
        """`seconds` in hours."""
        return None if self.seconds is None else self.seconds / 3600


class Use(Struct, frozen=True):
    """One limit of the budget and what is spent of it."""

    what: str
    """labels, hours or money."""
    spent: float | None
    """None if it is not known: no answer has a time."""
    limit: float

    @property
    def left(self) -> float | None:
        """What is left; 0 once it is overspent."""
        return None if self.spent is None else max(0.0, self.limit - self.spent)

    @property
    def share(self) -> float:
        """The share that is spent; 0 if it is not known."""
        return 0.0 if self.spent is None else self.spent / self.limit

    def sentence(self) -> str:
        """The use in words."""
        if self.spent is None:
            limit = amount(self.what, self.limit)
            return f"{limit} {self.what}; what is spent is not known, since no answer has a time"
        return (
            f"{amount(self.what, self.spent)} of {amount(self.what, self.limit)} {self.what} spent, "
            f"{amount(self.what, self.left or 0.0)} left"
        )


def spent(seconds: Sequence[float | None], skips: Sequence[bool]) -> Spent:
    """Add up n answers: their times as Label Studio measured them, None for none, and whether each is a skip."""
    times = filled(seconds)
    timed = int(np.isfinite(capped(as_array(seconds))[0]).sum())
    return Spent(len(skips) - sum(skips), len(skips), timed, None if times is None else math.fsum(times))


def uses(budget: Budget, cost: Spent) -> tuple[Use, ...]:
    """The limits that are set, each with what is spent of it."""
    hours = cost.hours if cost.answers else 0.0
    found = (
        Use("labels", cost.labels, budget.labels),
        Use("hours", hours, budget.hours),
        Use("money", None if hours is None else hours * budget.hourly_rate, budget.money),
    )
    return tuple(one for one in found if one.limit > 0)


def exhausted(budget: Budget, cost: Spent) -> str:
    """Which limits leave no room for another answer, as a sentence; empty if all do."""
    over = [one for one in uses(budget, cost) if _room(one, budget, cost) == 0]
    if not over:
        return ""
    said = " and ".join(
        f"{one.what} ({amount(one.what, one.spent or 0.0)} of {amount(one.what, one.limit)})" for one in over
    )
    return f"the budget of {said} is spent"


def answers_left(budget: Budget, cost: Spent) -> int | None:
    """How many more answers the budget has room for, each as long as the mean so far; None: no limit is known."""
    rooms = [room for one in uses(budget, cost) if (room := _room(one, budget, cost)) is not None]
    return min(rooms, default=None)


def _room(one: Use, budget: Budget, cost: Spent) -> int | None:
    """The number of answers that fit into what is left of one limit; never rounded up."""
    if one.left is None or one.what == "labels" or one.left == 0:
        return None if one.left is None else int(one.left)
    if cost.mean_seconds is None:
        return None
    price = cost.mean_seconds / 3600 * (budget.hourly_rate if one.what == "money" else 1.0)
    return math.floor(min(one.left / price + 1e-9, 1e9))


def affordable(answers: Sequence[int], room: int) -> list[bool]:
    """Which tasks may be asked: one after the other, until the answers that they still need fill the room.

    `answers` (n,): how many answers each task still needs, in the order in which they are asked; 0: it is settled.
    """
    found, taken = [], 0
    for needed in answers:
        found.append(needed == 0 or taken < room)
        taken += needed
    return found


def amount(what: str, value: float) -> str:
    """A number of labels, hours or money in words."""
    return f"{value:,.0f}" if what == "labels" else f"{value:,.1f}" if what == "hours" else f"{value:,.2f}"
