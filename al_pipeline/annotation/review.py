"""Review: which labels a reviewer checks, what is shown, and what the rulings say of the labels as people gave them.

A ruling is an `adjudicate` event: the newest one on an item is its label, whatever the votes. It belongs to a review,
not to a round, so that a rollback leaves it in force; `al labels revoke` takes it out.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from msgspec import Struct

from al_pipeline.annotation.answers import IMPORT, NOT_ANNOTATIONS, answers_of, by_item, resolve, votes_of
from al_pipeline.records import Event, Part, is_of_review

Reason = Literal["held", "conflict", "low confidence", "likely error", "sample"]
"""Why an item is reviewed. `sample`: it is part of the random sample that gives the error rate."""
SAMPLE = "sample"

_LEAST_DOUBT = 0.1
"""A label whose probability of being wrong is lower is reviewed only as part of a sample."""


class Candidate(Struct, frozen=True):
    """An item that could be reviewed, with all that speaks against its label."""

    item_id: str
    content_hash: str
    part: Part
    agreement: float
    """Share of the votes for the label; of a tie, for each of the tied classes."""
    confidence: float | None = None
    """The consensus' confidence in the label, where it has one."""
    held: bool = False
    """Whether it has no label because an answer to it is held."""
    error: float = 0.0
    """Probability that the label is wrong, by a model that does not know it."""

    def doubt(self) -> tuple[float, Reason]:
        """How probable it is that the label is wrong, by what speaks most against it."""
        found: list[tuple[float, Reason]] = [(1 - self.agreement, "conflict"), (self.error, "likely error")]
        if self.held:
            return 1.0, "held"
        if self.confidence is not None:
            found.append((1 - self.confidence, "low confidence"))
        return max(found, key=lambda one: one[0])


def sample_of(annotator: str) -> str:
    """The reason of an item that is part of a random sample of somebody's answers."""
    return f"{SAMPLE} of {annotator}"


class Chosen(Struct, frozen=True):
    """An item chosen for a review; `score`: the probability that its label is wrong, 0 for one of a sample."""

    candidate: Candidate
    reason: str
    """A Reason, or `sample_of` somebody."""
    score: float


def choose(candidates: Sequence[Candidate], sample: Sequence[str], size: int) -> list[Chosen]:
    """At most `size` of the candidates, those most in doubt and those of the random sample in turn.

    `sample`: ids of the sample's items that are not reviewed yet, in its order. Candidates hardly in doubt are chosen
    only as part of it.
    """
    by_id = {one.item_id: one for one in candidates}
    doubted = sorted((one for one in candidates), key=lambda one: (-one.doubt()[0], one.item_id))
    queues: list[list[Chosen]] = [
        [Chosen(one, one.doubt()[1], one.doubt()[0]) for one in doubted if one.doubt()[0] >= _LEAST_DOUBT],
        [Chosen(by_id[item], "sample", 0.0) for item in dict.fromkeys(sample) if item in by_id],
    ]
    found: dict[str, Chosen] = {}
    while len(found) < size and any(queues):
        for queue in queues:
            while queue and queue[0].candidate.item_id in found:
                queue.pop(0)
            if queue and len(found) < size:
                one = queue.pop(0)
                found[one.candidate.item_id] = one
    # Without an order that tells the reviewer which items are in doubt.
    return sorted(found.values(), key=lambda one: (one.candidate.content_hash, one.candidate.item_id))


def shown_answers(events: Iterable[Event]) -> dict[str, str]:
    """The answers to one item as a reviewer sees them: people as letters, so that rulings are about the item.

    Skips are shown as such, rulings and gold labels are not shown.
    """
    answers = [one for one in answers_of(events).values() if not one.binding]
    votes = sorted(votes_of(answers), key=lambda vote: vote.order)
    names = (*string.ascii_uppercase, *(f"{first}{second}" for first in "ABC" for second in string.ascii_uppercase))
    given = {
        name: vote.label or "(skipped)" for name, vote in zip(names, votes, strict=False) if vote.annotator != IMPORT
    }
    imported = next((vote.label for vote in votes if vote.annotator == IMPORT), None)
    return given if imported is None else {"imported": imported, **given}


class Ruling(Struct, frozen=True):
    """The review of an item in force."""

    item_id: str
    part: Part
    label: str
    by: str
    given: str | None
    """The label that people's answers give without rulings; None if they give none."""
    independent: bool
    """Whether somebody else than its reviewers answered it; one's own answers cannot be checked."""
    contradicts: tuple[str, ...]
    """Classes of other reviewers' rulings and of gold labels on the item that are another class."""


def rulings(counted: Sequence[Event]) -> list[Ruling]:
    """The rulings in force among the events that count, by item id."""
    reviewed = {event.item_id for event in counted if is_of_review(event.annotation_key)}
    about = by_item(event for event in counted if event.item_id in reviewed and event.type not in NOT_ANNOTATIONS)
    found = []
    for item in sorted(about):
        answers = answers_of(about[item])
        ruled = [one for key, one in answers.items() if is_of_review(key) and one.label is not None]
        if not ruled:
            continue
        newest = max(ruled, key=lambda one: one.order)
        plain = [one for one in answers.values() if not one.binding]
        given = resolve(plain)
        people = {vote.annotator for vote in votes_of(plain) if vote.label is not None}
        others = [one.label for one in answers.values() if one.binding and one.label not in (None, newest.label)]
        found.append(
            Ruling(
                item,
                about[item][0].part,
                str(newest.label),
                newest.annotator,
                given if isinstance(given, str) else None,
                bool(people - {one.annotator for one in ruled}),
                tuple(sorted({str(label) for label in others})),
            )
        )
    return found


def checked_answers(
    counted: Sequence[Event], found: Mapping[str, Ruling], reasons: Mapping[str, Collection[str]]
) -> dict[str, tuple[int, int]]:
    """The number of wrong answers of each annotator and of all that were drawn at random and reviewed.

    `found`: the rulings, `reasons`: why each item was reviewed, both by item id. Of a sample of somebody's answers only
    theirs count, and nobody's answer counts that the same person ruled on.
    """
    drawn = {item for item, why in reasons.items() if item in found and any(one.startswith(SAMPLE) for one in why)}
    about = by_item(event for event in counted if event.item_id in drawn)
    counts: dict[str, tuple[int, int]] = {}
    for item in sorted(about):
        ruling, why = found[item], reasons[item]
        for vote in votes_of(one for one in answers_of(about[item]).values() if not one.binding):
            who = vote.annotator
            if vote.label is None or who in (IMPORT, ruling.by) or not {SAMPLE, sample_of(who)} & set(why):
                continue
            wrong, total = counts.get(who, (0, 0))
            counts[who] = (wrong + (vote.label != ruling.label), total + 1)
    return dict(sorted(counts.items()))


def sample_drawn(order: Sequence[str], planned: Collection[str]) -> list[str]:
    """The part of the sample that was drawn: up to the last of its items, in `order`, that a review has for it."""
    last = max((place for place, item in enumerate(order) if item in planned), default=-1)
    return list(order[: last + 1])
