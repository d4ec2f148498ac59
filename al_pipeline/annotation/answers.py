"""The answers about an item as they stand after edits and deletions, and the vote of each annotator."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from msgspec import Struct

from al_pipeline.errors import BadInput
from al_pipeline.records import Event

NOT_ANNOTATIONS = ("task_gone", "correct")
"""Types of events about tasks and items."""

IMPORT = "import"
"""The annotator of all imported labels; any person's label outweighs it."""
IMPORT_ROUND = -1

_NEEDS_LABEL = ("label", "gold", "import")


class Answer(Struct, frozen=True):
    """The current state of one annotation; `label` None is a skip, `order` the position of its newest event."""

    annotator: str
    label: str | None
    binding: bool
    """Whether it is an adjudication or a gold label."""
    round: int
    order: int


def answers_of(events: Iterable[Event]) -> dict[str, Answer]:
    """The annotations of one item (or task) after edits and deletions, by annotation key."""
    now: dict[str, Answer] = {}
    for order, event in enumerate(events):
        if event.type in _NEEDS_LABEL and event.label is None:
            raise BadInput(f"event {event.event_id} is of type {event.type!r} but names no label")
        if event.type == "delete":
            now.pop(event.annotation_key, None)
        elif event.type not in NOT_ANNOTATIONS:
            before = now.get(event.annotation_key)
            edit = event.type == "supersede"
            imported = event.type == "import" or (edit and before is not None and before.annotator == IMPORT)
            now[event.annotation_key] = Answer(
                annotator=IMPORT if imported else event.annotator,
                label=None if event.type == "skip" else event.label,
                binding=event.type in ("adjudicate", "gold") or (edit and before is not None and before.binding),
                round=IMPORT_ROUND if imported else event.round,
                order=order,
            )
    return now


def votes_of(answers: Iterable[Answer]) -> list[Answer]:
    """The vote of each annotator: a binding answer if there is one, else the newest.

    The import counts as a vote only if no person gave a label. A review without a ruling is no vote.
    """
    best: dict[str, Answer] = {}
    given = (answer for answer in answers if answer.label is not None or not answer.binding)
    for answer in sorted(given, key=lambda a: (a.binding, a.order)):
        best[answer.annotator] = answer
    imported = best.pop(IMPORT, None)
    if imported is not None and all(vote.label is None for vote in best.values()):
        best[IMPORT] = imported
    return list(best.values())


def resolve(answers: Iterable[Answer]) -> str | frozenset[str]:
    """The label, or the set of tied classes (empty if nobody gave a label)."""
    votes = votes_of(answers)
    binding = {vote.order: vote.label for vote in votes if vote.binding and vote.label is not None}
    if binding:
        return binding[max(binding)]
    counts = Counter(vote.label for vote in votes if vote.label is not None)
    most = max(counts.values(), default=0)
    leaders = [label for label, count in counts.items() if count == most]
    return leaders[0] if len(leaders) == 1 else frozenset(leaders)


def first_round(answers: Iterable[Answer]) -> int:
    """The first round such that the answers up to it give a label. All `answers` together must give one."""
    if any(vote.annotator == IMPORT for vote in votes_of(answers)):
        return IMPORT_ROUND
    given = [answer for answer in answers if answer.annotator != IMPORT]
    rounds = sorted({answer.round for answer in given})
    return next(number for number in rounds if isinstance(resolve([a for a in given if a.round <= number]), str))


def by_item(events: Iterable[Event]) -> dict[str, list[Event]]:
    """Events grouped by item id."""
    found: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        found[event.item_id].append(event)
    return found
