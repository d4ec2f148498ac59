"""The pool's items with people's answers: how many people gave each class, and whether another person may be asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from msgspec import Struct

from al_pipeline.annotation.active_events import active, corrected_items
from al_pipeline.annotation.answers import IMPORT, answers_of, by_item, votes_of
from al_pipeline.annotation.votes import people, times_asked
from al_pipeline.records import Event


class Answered(Struct, frozen=True):
    """An item with at least one person's label and no binding one."""

    votes: Mapping[str, int]
    """How many people gave each class."""
    open: bool
    """Whether somebody has not voted on it yet, and it was asked in fewer rounds than are allowed."""


def answered_items(
    events: Iterable[Event], labels: Collection[str], most_tasks: int, everybody: int | None = None
) -> dict[str, Answered]:
    """The pool's items with answers by people, by item id, without those that were adjudicated or corrected.

    `labels`: the schema's classes; answers with others do not count. `most_tasks`: an item is asked in at most so many
    rounds. `everybody`: the number of possible annotators; None: of those with a vote so far.
    """
    known = list(events)
    counted = active(known)
    heads = people(counted) if everybody is None else everybody
    corrected = corrected_items(counted)
    asked = times_asked(known)
    found = {}
    for item, about in by_item(counted).items():
        if about[0].part != "pool" or item in corrected:
            continue
        votes = [vote for vote in votes_of(answers_of(about).values()) if vote.annotator != IMPORT]
        given = Counter(vote.label for vote in votes if vote.label is not None and vote.label in labels)
        if given and not any(vote.binding and vote.label is not None for vote in votes):
            found[item] = Answered(given, len(votes) < heads and asked.get(item, 0) < most_tasks)
    return found
