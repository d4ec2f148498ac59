"""Gold: items whose right label is known, asked like any other item to measure how accurate each annotator is.

A `gold` event says that an item is gold; its `origin` is TRAIN if its label is trained on too. Otherwise gold items are
no part of the labelled set, whatever people answer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct

from al_pipeline.annotation.answers import NOT_ANNOTATIONS, answers_of, by_item, resolve
from al_pipeline.records import Event, PlannedTask, event_digest

GOLD = "gold"
"""The strategy of planned tasks that ask gold items."""
TRAIN = "train"
"""The origin of a gold event whose label is trained on."""
REASON = "gold: its label is known, and not trained on"
"""Why a gold item is not queried."""
FIRST = 5
"""Somebody with fewer answers to gold is new: the next round begins with gold."""
_Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


class Gold(Struct, frozen=True):
    """A gold item: its known label, and whether it is trained on."""

    item_id: str
    content_hash: str
    label: str
    train: bool


def gold_key(content_hash: str) -> str:
    """The annotation key of the gold events of an item."""
    return f"gold:{content_hash}"


def gold_items(counted: Iterable[Event]) -> dict[str, Gold]:
    """The gold items of the pool among the events that count, by item id. A newer ruling on one is its known label."""
    events = [event for event in counted if event.type not in NOT_ANNOTATIONS]
    newest = {event.item_id: event for event in events if event.annotation_key.startswith("gold:")}
    standing = {item: event for item, event in newest.items() if event.type == "gold" and event.part == "pool"}
    if not standing:
        return {}
    about = by_item(event for event in events if event.item_id in standing)
    found = {}
    for item, event in standing.items():
        label = resolve([one for one in answers_of(about[item]).values() if one.binding])
        known = label if isinstance(label, str) else str(event.label)
        found[item] = Gold(item, event.content_hash, known, event.origin == TRAIN)
    return found


def set_apart(counted: Iterable[Event]) -> frozenset[str]:
    """The gold items that are no part of the labelled set."""
    return frozenset(one.item_id for one in gold_items(counted).values() if not one.train)


class Seen(Struct, frozen=True):
    """Somebody's first answer to a gold item."""

    item_id: str
    annotator: str
    label: str
    event_id: str = ""


def answers_to_gold(counted: Iterable[Event], keys: Collection[str]) -> list[Seen]:
    """The first answer of each person to each gold item, to tasks that asked it as gold (`keys`: their push keys).

    Skips are no answers; of an edited answer the newest version counts. An answer to an item that became gold later is
    not one: it may have been chosen because it was wrong.
    """
    now: dict[str, Event] = {}
    for event in counted:
        if event.push_key not in keys:
            continue
        if event.type == "delete":
            now.pop(event.annotation_key, None)
        elif event.type not in NOT_ANNOTATIONS:
            now[event.annotation_key] = event
    found: dict[tuple[str, str], Seen] = {}
    for event in now.values():
        if event.label is not None:
            one = Seen(event.item_id, event.annotator, event.label, event.event_id)
            found.setdefault((event.item_id, event.annotator), one)
    return list(found.values())


def right_and_all(seen: Iterable[Seen], gold: Mapping[str, Gold]) -> dict[str, tuple[int, int]]:
    """The number of right answers to gold and of all, by annotator; items that are no longer gold are left out."""
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for one in seen:
        if one.item_id in gold:
            counts[one.annotator][0] += one.label == gold[one.item_id].label
            counts[one.annotator][1] += 1
    return {who: (right, total) for who, (right, total) in sorted(counts.items())}


def is_below(right: int, answers: int, bound: float) -> bool:
    """Whether the whole 95 % interval of a share, Wilson's, is below `bound`; not with fewer than FIRST answers."""
    if answers < FIRST:
        return False
    return right / answers < bound - _Z * math.sqrt(bound * (1 - bound) / answers)  # the interval inverts this test


def unexpired(gold: Mapping[str, Gold], seen: Iterable[Seen], everybody: Collection[str]) -> dict[str, int]:
    """The number of people who have answered each gold item, without items that all of `everybody`, if any, have."""
    viewers: defaultdict[str, set[str]] = defaultdict(set)
    for one in seen:
        viewers[one.item_id].add(one.annotator)
    return {item: len(viewers[item]) for item in gold if not everybody or not viewers[item].issuperset(everybody)}


def choose_gold(gold: Mapping[str, Gold], viewers: Mapping[str, int], wanted: int, salt: str) -> list[Gold]:
    """At most `wanted` of the gold items in `viewers`, those that the fewest people have answered first.

    Among equals the order depends on `salt` and the contents alone.
    """
    order = sorted(viewers, key=lambda item: (viewers[item], event_digest(salt, gold[item].content_hash), item))
    return [gold[item] for item in order[:wanted]]


def mixed_in(tasks: Sequence[PlannedTask], gold: Sequence[PlannedTask], first: int) -> list[PlannedTask]:
    """The tasks with the gold ones: `first` of these in turn with the first tasks, the rest spread evenly."""
    begin, rest = list(gold[:first]), list(gold[first:])
    result: list[PlannedTask] = []
    left = list(tasks)
    while begin:
        if left:
            result.append(left.pop(0))
        result.append(begin.pop(0))
    places = {round((number + 0.5) * len(left) / len(rest)) for number in range(len(rest))} if rest else set()
    spread = iter(rest)
    for place, task in enumerate(left):
        if place in places and (one := next(spread, None)) is not None:
            result.append(one)
        result.append(task)
    return [*result, *spread]
