"""The state of a round's tasks: answered, given up or open, and which of them can stay with the annotators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from al_pipeline.annotation.active_events import CONTROLS, active, corrected_items, standing_answers
from al_pipeline.annotation.aggregation import Folded, skips_to_give_up
from al_pipeline.annotation.answers import NOT_ANNOTATIONS, answers_of, votes_of
from al_pipeline.records import RELABEL, Event, PlannedTask

Standing = Literal["answered", "given_up", "open"]

NO_MORE: Mapping[str, int] = MappingProxyType({})


def standing(
    tasks: Sequence[PlannedTask],
    events: Sequence[Event],
    overlap: int,
    everybody: int | None = None,
    more: Mapping[str, int] = NO_MORE,
) -> dict[str, Standing]:
    """Whether each task, by push key, is answered, given up or open. Only annotations of the task itself count.

    Answered: `overlap` people gave a label (as many as `more` says for the push key, see `overlap.py`), or one gave a
    binding label (adjudication, gold). Given up: two people (or `everybody`, the number of possible annotators) skipped
    it. If all possible annotators have voted, nothing more can come: the task is answered if it has a label. A task
    about a text that has been corrected is given up.
    """
    return standing_of(tasks, active(events), overlap, everybody, more)


def standing_of(
    tasks: Sequence[PlannedTask],
    counted: Sequence[Event],
    overlap: int,
    everybody: int | None = None,
    more: Mapping[str, int] = NO_MORE,
    enough_skips: int | None = None,
) -> dict[str, Standing]:
    """`standing`, given the events that count, or with `enough_skips` (see `skips_to_give_up`) those of the tasks."""
    corrected = corrected_items(counted)
    if enough_skips is None:
        enough_skips = skips_to_give_up(counted, everybody)
    by_key: defaultdict[str, list[Event]] = defaultdict(list)
    items = {task.item_id for task in tasks}
    for event in counted:
        if event.item_id in items:
            by_key[event.push_key].append(event)
    found: dict[str, Standing] = {}
    for task in tasks:
        votes = votes_of(answers_of(by_key.get(task.push_key, ())).values())
        given = sum(vote.label is not None for vote in votes)
        all_voted = everybody is not None and len(votes) >= everybody
        if task.item_id in corrected:
            found[task.push_key] = "given_up"
        elif given >= more.get(task.push_key, overlap) or any(vote.binding for vote in votes) or (given and all_voted):
            found[task.push_key] = "answered"
        elif len(votes) - given >= enough_skips:
            found[task.push_key] = "given_up"
        else:
            found[task.push_key] = "open"
    return found


def worth_asking(
    tasks: Sequence[PlannedTask],
    events: Sequence[Event],
    folded: Folded,
    overlap: int,
    everybody: int | None = None,
    refused: Collection[str] = (),
    wanted: Collection[str] = (),
    more: Mapping[str, int] = NO_MORE,
) -> list[PlannedTask]:
    """The tasks that can stay with the annotators when an intervention closes their round, in their order.

    A task stays while it is open here and in Label Studio. Label Studio stops serving a task once `overlap` people have
    annotated it, and also counts annotations that are quarantined, were refused (`refused`: push keys of their tasks)
    or were followed by a skip of the same person. So all annotations that it holds count here, and fewer than `overlap`
    people may have given one. The item must not have been labelled or ignored through another task, unless the task
    asks a labelled item again or a person asked for it (`wanted`: item ids). `folded` is the aggregation of `events`.
    `more`: see `standing`.

    Whether the newest model would choose the item does not matter: an annotator may have the task on the screen.
    """
    found = standing(tasks, events, overlap, everybody, more)
    counting = standing_answers(events).keys()
    held = {key: event for key, event in _newest_events(events).items() if event.type != "delete"}
    invalidated = {event.push_key for key, event in held.items() if key not in counting} | set(refused)
    begun = {event.push_key for key, event in held.items() if key in counting}
    annotators: defaultdict[str, set[str]] = defaultdict(set)
    for event in held.values():
        if event.label is not None:
            annotators[event.push_key].add(event.annotator)
    labelled = {row.item_id for row in (*folded.labeled, *folded.test)}
    ignored = {row.item_id for row in folded.unresolved if row.kind == "ignored"}
    return [
        task
        for task in tasks
        if found[task.push_key] == "open"
        and task.push_key not in invalidated
        and len(annotators[task.push_key]) < more.get(task.push_key, overlap)
        and (task.item_id not in labelled or task.push_key in begun or task.strategy == RELABEL)
        and (task.item_id not in ignored or task.item_id in wanted)
    ]


def _newest_events(events: Iterable[Event]) -> dict[str, Event]:
    """The newest event of each annotation, by annotation key, whether it counts or not."""
    return {event.annotation_key: event for event in events if event.type not in (*CONTROLS, *NOT_ANNOTATIONS)}
