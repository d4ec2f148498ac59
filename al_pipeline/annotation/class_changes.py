"""Old answers in the present classes: renamed, merged, split, retired and added classes, and all of these taken back.

A change relates each class before it to the classes after it: a renamed class to its new name, classes that were merged
to the merged one, a split class to all its parts, a retired one to none. Taken back, it relates them the other way
round. An answer is mapped along all changes between the schema that it was given in and the present one; it counts if
exactly one class is left. So a rename can be taken back, and a split that is merged again gives the answers back.

No clock is read: an answer was given in the newest schema, up to its place in the ledger, that has its class. That is
how one is understood that arrives late, from a page which still showed the old classes.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from al_pipeline.annotation.answers import NOT_ANNOTATIONS, answers_of, resolve
from al_pipeline.records import ClassChange, Event, Part

State = tuple[tuple[str, ClassChange], ...]
"""A schema: the changes in force, oldest first, each with its event id. The first schema is empty."""

_LOST = ""
"""The class of an answer whose class is gone; no class has this name."""


class Meaning(NamedTuple):
    """A class in another schema: its name, or None with the reason why there is not exactly one."""

    label: str | None
    reason: str = ""
    ignored: bool = False
    """Whether an item of this class needs no answer any more, since the class was retired."""


class Reopened(Struct, frozen=True):
    """An item without a label because the class that it had is gone."""

    content_hash: str
    part: Part
    reason: str
    ignored: bool


def classes_after(change: ClassChange) -> tuple[str, ...]:
    """All classes after a change: new ones are in the place of the first old one, or at the end."""
    leaving = set(change.old) - set(change.new)
    coming = [name for name in change.new if name not in change.before]
    if not change.old:
        return (*change.before, *coming)
    first = min(map(change.before.index, change.old))
    kept = [(place, name) for place, name in enumerate(change.before) if name not in leaving]
    return (*(n for p, n in kept if p < first), *coming, *(n for p, n in kept if p >= first))


def related(change: ClassChange, name: str, *, back: bool = False) -> frozenset[str]:
    """The classes after `change` to which the class `name` of before is related; with `back`, the other way round."""
    if not back:
        return frozenset(change.new if name in change.old else (name,))
    if name not in change.new:
        return frozenset((name,))
    own = (name,) if name in change.before and name not in change.old else ()
    return frozenset((*change.old, *own))


class Schemas:
    """The schemas that a ledger has seen, in order."""

    def __init__(self, changes: Sequence[tuple[int, State]]) -> None:
        """`changes`: from which place in the ledger on which schema is in force, after the first, empty one."""
        first: State = ()
        self._states: list[State] = [first, *(state for _, state in changes)]
        self._places = [-1, *(place for place, _ in changes)]
        self._classes = [self._classes_of(state) for state in self._states]
        self._given: dict[tuple[str, int], int] = {}
        self._meanings: dict[tuple[str, int, int], Meaning] = {}

    @property
    def present(self) -> int:
        """The number of the present schema; the first has number 0."""
        return len(self._states) - 1

    def number_at(self, place: int) -> int:
        """The number of the schema in force at a place in the ledger."""
        return bisect_right(self._places, place) - 1

    def last_place(self, place: int) -> int:
        """The last place with the same schema as `place`; of the present one, a place that no ledger reaches."""
        following = self.number_at(place) + 1
        return self._places[following] - 1 if following <= self.present else sys.maxsize

    def former(self) -> frozenset[str]:
        """Classes of earlier schemas that the present one lacks."""
        return frozenset().union(*self._classes) - self._classes[-1]

    def meaning(self, label: str, place: int, number: int | None = None) -> Meaning:
        """What `label`, given at `place`, means in schema `number` (default: the present one)."""
        number = self.present if number is None else number
        key = (label, self._given_in(label, self.number_at(place)), number)
        if key not in self._meanings:
            self._meanings[key] = self._mapped(*key)
        return self._meanings[key]

    def relation(self, names: Iterable[str], place: int, later: int | None = None) -> dict[str, frozenset[str]]:
        """The classes in force at place `later` (default: now) to which each of `names`, in force at `place`, is
        related.
        """
        number, end = self.number_at(place), self.present if later is None else self.number_at(later)
        return {name: self._follow(name, number, end)[-1].names for name in names}

    def shares(self, proba: Mapping[str, float], place: int | None = None) -> dict[str, float]:
        """Probabilities of classes as those of present ones. They were told at `place`; None: that is not known.

        As with answers, a class is that of the newest schema up to there which has it. The probability of a split class
        falls evenly on its parts; what falls on no present class is left out.
        """
        number = self.present if place is None else self.number_at(place)
        found: dict[str, float] = {}
        for name, share in proba.items():
            names = self._follow(name, self._given_in(name, number), self.present)[-1].names
            for one in sorted(names):
                found[one] = found.get(one, 0.0) + share / len(names)
        return found

    def lost_at(self, label: str, place: int) -> int:
        """The place of the change since which `label`, given at `place`, has no single present class."""
        number = self.present
        while number > 0 and self.meaning(label, place, number - 1).label is None:
            number -= 1
        return self._places[number]

    def _classes_of(self, state: State) -> frozenset[str]:
        """The classes of a schema: those after its last change, and those before each change that follows it.

        The latter were perhaps added to `params.yaml` by hand in between.
        """
        after = classes_after(state[-1][1]) if state else ()
        following = [one[len(state)][1] for one in self._states if len(one) > len(state) and one[: len(state)] == state]
        return frozenset((*after, *(name for change in following for name in change.before)))

    def _given_in(self, label: str, present: int) -> int:
        key = (label, present)
        if key not in self._given:
            earlier = range(present, -1, -1)
            self._given[key] = next((number for number in earlier if label in self._classes[number]), present)
        return self._given[key]

    def _follow(self, name: str, begin: int, end: int) -> list[_Step]:
        """The steps from one schema to another; the first is the schema itself."""
        one, other = self._states[begin], self._states[end]
        equal = (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a[0] != b[0])
        common = next(equal, min(len(one), len(other)))
        names = frozenset((name,))
        found = [_Step(names, None, back=False)]
        steps = [*((change, True) for _, change in reversed(one[common:])), *((c, False) for _, c in other[common:])]
        for change, back in steps:
            names = frozenset(after for before in names for after in related(change, before, back=back))
            found.append(_Step(names, change, back))
        return found

    def _mapped(self, label: str, begin: int, end: int) -> Meaning:
        steps = self._follow(label, begin, end)
        if len(steps[-1].names) == 1:
            return Meaning(next(iter(steps[-1].names)))
        at = len(steps) - 1
        while len(steps[at - 1].names) != 1:
            at -= 1
        change, back = steps[at].change, steps[at].back
        assert change is not None
        what = f"somebody {change.sentence()}{', which was taken back' if back else ''}"
        ignored = not steps[-1].names and not back and change.kind == "retire" and not change.again
        return Meaning(None, f"its class {label!r} is gone: {what}", ignored)


def mapped(
    ledger: Sequence[Event], counts: Sequence[bool], schemas: Schemas
) -> tuple[list[Event], dict[str, Reopened]]:
    """The events of `ledger` that count, in the present classes, and the items that lost answers for lack of a class.

    An answer whose class is gone does not count. If that class was the item's label, or one of those tied, when it
    went, no earlier answer about the item counts either: the item is asked afresh. Otherwise the others still do.
    """
    found: dict[int, Event] = {}
    lost: defaultdict[str, dict[int, Meaning]] = defaultdict(dict)
    meanings: dict[str | None, Meaning] = {}
    until = -1
    for place, event in enumerate(ledger):
        if place > until:  # another schema
            until, meanings = schemas.last_place(place), {None: Meaning(None)}
        if not counts[place]:
            continue
        found[place] = event
        meaning = meanings.get(event.label)
        if meaning is None:
            meaning = meanings[event.label] = schemas.meaning(event.label or "", place)
        if meaning.label != event.label:
            if meaning.label is None:
                lost[event.item_id][place] = meaning
            else:
                found[place] = replace(event, label=meaning.label)
    if not lost:
        return list(found.values()), {}
    about: defaultdict[str, dict[int, Event]] = defaultdict(dict)
    for place, event in found.items():
        if event.item_id in lost and event.type not in NOT_ANNOTATIONS:
            about[event.item_id][place] = event
    reopened: dict[str, Reopened] = {}
    for item, whys in lost.items():
        lost_at = {place: schemas.lost_at(ledger[place].label or "", place) for place in whys}
        for place in _left_out(about[item], lost_at):
            del found[place]
        newest = max(whys)
        ignored = all(why.ignored for why in whys.values())
        event = ledger[newest]
        reopened[item] = Reopened(event.content_hash, event.part, whys[newest].reason, ignored)
    return list(found.values()), reopened


class _Step(NamedTuple):
    """The classes after one step from a schema to another, the change, and whether it was taken back."""

    names: frozenset[str]
    change: ClassChange | None
    back: bool


def _left_out(answers: Mapping[int, Event], lost_at: Mapping[int, int]) -> set[int]:
    """The places of an item's `answers` that do not count; `lost_at`: since when a place has no class."""
    out: set[int] = set()
    for change in sorted({since for place, since in lost_at.items() if since > place}):
        rest = {
            place: replace(event, label=_LOST) if lost_at.get(place, change + 1) <= change else event
            for place, event in answers.items()
            if place < change and place not in out
        }
        label = resolve(answers_of(rest.values()).values())
        out |= rest.keys() if _LOST in ((label,) if isinstance(label, str) else label) else _lost_votes(rest)
    left = {
        place: replace(event, label=_LOST) if place in lost_at else event
        for place, event in answers.items()
        if place not in out
    }
    return out | _lost_votes(left)


def _lost_votes(answers: Mapping[int, Event]) -> set[int]:
    """The places of annotations that now say a lost class, and of those that such a vote replaced."""
    now = answers_of(answers.values())
    newest: dict[str, int] = {}
    for answer in now.values():
        if answer.label == _LOST:
            newest[answer.annotator] = max(answer.order, newest.get(answer.annotator, -1))
    out = {
        key for key, a in now.items() if a.label == _LOST or (a.order < newest.get(a.annotator, -1) and not a.binding)
    }
    return {place for place, event in answers.items() if event.annotation_key in out}
