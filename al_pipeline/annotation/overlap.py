"""Adaptive overlap: which tasks another person is to answer because their label is not sure enough yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from msgspec import Struct

from al_pipeline.annotation.active_events import active, corrected_items, schemas_of
from al_pipeline.annotation.aggregation import skips_to_give_up
from al_pipeline.annotation.answers import IMPORT, Answer, answers_of, by_item, votes_of
from al_pipeline.annotation.confidence import ConsensusRule, decide
from al_pipeline.annotation.votes import people
from al_pipeline.records import Event, PlannedTask


class Overlap(Struct, frozen=True):
    """How many people answer a task: `least`, and up to `most` while its label is less sure than `min_confidence`."""

    least: int
    most: int
    min_confidence: float

    @property
    def adaptive(self) -> bool:
        """Whether tasks differ in it."""
        return self.min_confidence > 0 and self.most > self.least


def wanted_answers(
    tasks: Sequence[PlannedTask],
    events: Sequence[Event],
    labels: Sequence[str],
    rule: ConsensusRule,
    overlap: Overlap,
    everybody: int | None = None,
) -> dict[str, int]:
    """The tasks that another person is to answer, by push key, with the number of answers that they then have.

    A task is among them if `overlap.least` people answered it, its item has answers of fewer than `overlap.most`
    people, and the most probable class is less probable than `overlap.min_confidence`. Not if the item has a binding
    answer or a corrected text, or as many people skipped the task as make others be given up, or nobody is left who has
    not seen it: of `everybody`, the number of possible annotators, or of those with a vote so far.
    """
    if not overlap.adaptive:
        return {}
    counted = active(events)
    corrected = corrected_items(counted)
    heads = people(counted) if everybody is None else everybody
    enough_skips = skips_to_give_up(counted, everybody)
    votes = {item: votes_of(answers_of(about).values()) for item, about in by_item(counted).items()}
    own: defaultdict[str, list[Event]] = defaultdict(list)
    for event in counted:
        own[event.push_key].append(event)
    open_: dict[str, tuple[str, int]] = {}
    for task in tasks:
        mine = votes_of(answers_of(own.get(task.push_key, ())).values())
        given = sum(vote.label is not None for vote in mine)
        of_item = _given(votes.get(task.item_id, ()))
        if (
            given >= overlap.least
            and len(of_item) < overlap.most
            and len(mine) < heads
            and len(mine) - given < enough_skips
            and task.item_id not in corrected
            and not any(vote.binding for vote in of_item)
        ):
            open_[task.push_key] = task.item_id, given + 1
    if not open_:
        return {}
    parts = {event.item_id: event.part for event in counted}
    test = [item for item, part in parts.items() if part == "test"]
    bound = {item for item, given_ in votes.items() if any(vote.binding for vote in given_)}
    rule = rule.in_present_classes(schemas_of(events), events)
    found = decide({item: _given(some) for item, some in votes.items() if item not in bound}, labels, rule, test)
    return {
        key: wanted
        for key, (item, wanted) in open_.items()
        if item in found and found[item].confidence < overlap.min_confidence
    }


def _given(votes: Sequence[Answer]) -> list[Answer]:
    return [vote for vote in votes if vote.label is not None and vote.annotator != IMPORT]
