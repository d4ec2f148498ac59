"""How many questions are open: enough that nobody's queue runs empty, so few that none grows old."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from msgspec import Struct

AHEAD = 2
"""Questions that are open besides one for each person at work: Label Studio's page does not recover from an empty
queue."""
RECENT = 8
"""Questions asked just before, from which the next one must differ, besides the open ones."""
MOST_BUFFER = 500
"""Questions that are asked ahead, at most, when a round is about to close."""
_FADE = 0.95
"""What is left of the extra questions after a step in which nobody found the queue empty."""
HELD_SECONDS = 86_400.0
"""How long Label Studio keeps a task for somebody who opened it and went away."""


class AtWork(Struct, frozen=True):
    """Who is at work: the people who answered in the last minutes, and those who went away holding a task, perhaps."""

    present: tuple[str, ...]
    away: tuple[str, ...]


def at_work(seen: Mapping[str, float], now: float, away_minutes: float) -> AtWork:
    """Who is at work at time `now`. `seen`: when each person answered last, in the same seconds."""
    present = sorted(who for who, last in seen.items() if now - last <= 60 * away_minutes)
    away = sorted(who for who, last in seen.items() if 60 * away_minutes < now - last <= HELD_SECONDS)
    return AtWork(tuple(present), tuple(away))


def spare(answers_per_step: float) -> int:
    """The number of questions that nobody has taken yet: `AHEAD`, or as many as are hardly ever taken in one step.

    The number of answers in a step varies by about the root of its mean; this is two such deviations above it.
    """
    return max(AHEAD, math.ceil(answers_per_step + 2 * math.sqrt(answers_per_step)))


def adapted(extra: float, open_tasks: int, present: int, answers_per_step: float) -> float:
    """How many questions more are open, as the last steps were too slow for so many people.

    It grows as long as people may have found nothing: of the `open_tasks`, each of those `present` holds one. Where a
    step brings less than one answer, the questions ahead are enough.
    """
    if answers_per_step >= 1 and open_tasks <= present:
        return min(2.0 * present, extra + AHEAD)
    return _FADE * extra


def wanted_open(people: AtWork, least: int, answers_per_step: float = 0.0, extra: float = 0.0) -> int:
    """The number of open questions.

    One for each person at work (at least `least`), one for each who may hold one without being there, and the `spare`
    ones, of which each person takes no more than one in a step; and `extra` ones, see `adapted`.
    """
    present = max(least, len(people.present))
    return present + len(people.away) + min(spare(answers_per_step), max(AHEAD, present)) + round(extra)


def missing(
    open_tasks: Collection[str],
    answered_by: Mapping[str, Collection[str]],
    people: AtWork,
    least: int,
    answers_per_step: float = 0.0,
    extra: float = 0.0,
) -> int:
    """The number of questions to ask now, so that nobody's queue runs empty.

    `open_tasks`: their push keys. `answered_by`: the push keys of the open tasks that each person has answered or
    skipped, who is not asked them again.
    """
    own = [len(set(answered_by.get(who, ())) & set(open_tasks)) for who in people.present]
    return max(0, wanted_open(people, least, answers_per_step, extra) - len(open_tasks) + max(own, default=0))


def buffer_size(answers_per_second: float, build_seconds: float) -> int:
    """The number of questions to ask ahead before a round is built, which takes about `build_seconds`."""
    return min(MOST_BUFFER, math.ceil(1.5 * max(0.0, answers_per_second) * max(0.0, build_seconds)))
