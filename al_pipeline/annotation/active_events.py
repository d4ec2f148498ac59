"""Which events of the ledger count, those that no intervention in force excludes, and what they say in today's classes.

No clock is read; the only order is that of the ledger. The result is derived from the interventions in the ledger, and
nothing about it is stored.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from msgspec.structs import replace

from al_pipeline.annotation.answers import NOT_ANNOTATIONS
from al_pipeline.annotation.class_changes import Reopened, Schemas, State, mapped
from al_pipeline.annotation.gold import Gold, gold_items, is_below
from al_pipeline.errors import BadInput
from al_pipeline.records import Event, Selection, is_of_review, round_name

CONTROLS = ("quarantine", "restore", "schema")
"""Types of events about other events."""
_TYPE, _ID = attrgetter("type"), attrgetter("event_id")
_ROLLED_BACK = re.compile(r"rolled back to round-(\d{4,6}) by ")


class Counted(NamedTuple):
    """The events that count, see `active`, and the items that lost answers because a class is gone."""

    events: list[Event]
    reopened: Mapping[str, Reopened]
    schemas: Schemas | None = None
    """The schemas that the ledger has seen; None if its classes never changed."""


def active(events: Iterable[Event]) -> list[Event]:
    """The events that count, each once, in ledger order, in the present classes; without quarantines and the like.

    Each intervention in force takes effect at its place in the ledger:

    - A rollback takes out all events between its snapshot and itself, cancels the interventions among them, and keeps
      out later annotations for the rounds that it abandons. An undo that is in force cancels it. Reviewers' rulings are
      no annotations of a round: a rollback takes out none, nor does it cancel what is decided on them.
    - A revocation takes out the annotations that count at its place and match its selection, with all earlier events of
      the same annotation, so that no withdrawn or older version comes back.
    - A restoration brings back annotations that are out at its place and match its selection, with all that happened to
      them since: one that was deleted afterwards does not count again.
    - A hold keeps out the answers in its `targets` while gold says that their annotator was below its bound: by the
      answers to gold that it names and the known labels that count now. A restoration that selects one lets it count;
      a revocation takes out one that is held, too.
    - A change of classes maps earlier answers, and later ones that name its old classes (`class_changes`). Answers with
      a class that is gone are left out.

    Quarantine and restore events of earlier versions list their decisions in `targets`. Raises BadInput if the
    ledger lacks the snapshot of a rollback.
    """
    return counted(events).events


def counted(events: Iterable[Event]) -> Counted:
    """Like `active`, with the items that lost answers because a class is gone."""
    ledger = _each_once(events)
    if set(map(_TYPE, ledger)).isdisjoint(CONTROLS):
        return Counted(ledger, {})
    schemas = _schemas(ledger)
    found = _in_present_classes(ledger, _counts(ledger, schemas), schemas)
    if any(_kind(event) == "hold" for event in ledger):  # no answer that can be held is gold or a ruling
        holds = _standing_holds(ledger, schemas, gold_items(found.events))
        found = _in_present_classes(ledger, _counts(ledger, schemas, holds), schemas)
    return found


def _in_present_classes(ledger: Sequence[Event], counts: Sequence[bool], schemas: Schemas | None) -> Counted:
    if schemas is None:
        return Counted([event for event, yes in zip(ledger, counts, strict=True) if yes], {})
    return Counted(*mapped(ledger, counts, schemas), schemas)


def _standing_holds(ledger: Sequence[Event], schemas: Schemas | None, gold: Mapping[str, Gold]) -> frozenset[int]:
    """The places of the holds whose annotators were below the bound, by the known labels of now."""
    places = {event.event_id: place for place, event in enumerate(ledger)}
    found = set()
    for place, event in enumerate(ledger):
        if (asked := event.intervention) is None or asked.kind != "hold" or asked.bound is None:
            continue
        answers = [(ledger[places[one]], places[one]) for one in asked.gold if places.get(one, place) < place]
        right = [
            gold[answer.item_id].label == (answer.label if schemas is None else schemas.meaning(answer.label, at).label)
            for answer, at in answers
            if answer.item_id in gold and answer.label is not None
        ]
        if is_below(sum(right), len(right), asked.bound):
            found.add(place)
    return frozenset(found)


def schemas_of(events: Iterable[Event]) -> Schemas | None:
    """The schemas that a ledger has seen; None if its classes never changed by an intervention."""
    return _schemas(_each_once(events))


def _schemas(ledger: Sequence[Event]) -> Schemas | None:
    """See `schemas_of`; `ledger` holds each event once."""
    if not any(event.type == "schema" for event in ledger):
        return None
    controls = [place for place, event in enumerate(ledger) if event.type in CONTROLS]
    positions = {event.event_id: position for position, event in enumerate(ledger)}
    states: list[tuple[int, State]] = []
    for number, place in enumerate(controls, start=1):
        if _kind(ledger[place]) in ("schema", "undo", "rollback"):
            so_far = controls[:number]
            in_force = _in_force(ledger, positions, so_far)
            state = tuple(
                (one.event_id, one.intervention.change)
                for one in (ledger[position] for position in so_far if position in in_force)
                if one.intervention is not None and one.intervention.change is not None
            )
            if state != (states[-1][1] if states else ()):
                states.append((place, state))
    return Schemas(states)


def standing_answers(events: Iterable[Event]) -> dict[str, Event]:
    """The newest event of each annotation that counts, by annotation key."""
    now: dict[str, Event] = {}
    for event in active(events):
        if event.type == "delete":
            now.pop(event.annotation_key, None)
        elif event.type not in NOT_ANNOTATIONS:
            now[event.annotation_key] = event
    return now


def superseded(events: Iterable[Event]) -> dict[str, str]:
    """Items whose text was corrected, each with the item that has the corrected text; the former are no longer used.

    A correction that a rollback has cancelled supersedes nothing.
    """
    ledger = list(events)
    return corrected_items(active(ledger)) if "correct" in set(map(_TYPE, ledger)) else {}


def corrected_items(counted: Iterable[Event]) -> dict[str, str]:
    """Like `superseded`, for events that are already known to count."""
    events = list(counted)
    if "correct" not in set(map(_TYPE, events)):
        return {}
    newest = {event.annotation_key: event for event in events if event.type == "correct"}
    return {item: event.item_id for event in newest.values() for item in event.targets}


def changed_by(events: Sequence[Event]) -> dict[str, frozenset[str]]:
    """The ids of the items whose events each intervention excluded or restored, by the intervention's event id."""
    ledger = list({event.event_id: event for event in reversed(events)}.values())[::-1]
    found: dict[str, frozenset[str]] = {}
    for place, event in enumerate(ledger):
        if event.intervention is not None:
            before, after = _said(ledger[:place]), _said(ledger[: place + 1])
            found[event.event_id] = frozenset(
                item
                for one in ledger[:place]
                if before.get(one.event_id) != after.get(one.event_id)
                for item in items_of(one)
            )
    return found


def _said(ledger: Sequence[Event]) -> dict[str, tuple[str | None]]:
    """The label of each event that counts, by event id; a skip has none."""
    return {event.event_id: (event.label,) for event in active(ledger)}


def items_of(event: Event) -> frozenset[str]:
    """The ids of the items that an event names."""
    return frozenset({event.item_id, *event.targets} if event.type == "correct" else {event.item_id})


def intervention_key(number: int) -> str:
    """The annotation key of the quarantine and restore events of an intervention."""
    return f"ruling:{number}"


def _each_once(events: Iterable[Event]) -> list[Event]:
    ordered = list(events)
    if len(set(map(_ID, ordered))) == len(ordered):
        return ordered
    ledger: dict[str, Event] = {}
    for event in ordered:
        ledger.setdefault(event.event_id, event)
    return list(ledger.values())


def _kind(event: Event) -> str | None:
    return None if event.intervention is None else event.intervention.kind


def _counts(ledger: Sequence[Event], schemas: Schemas | None, holds: Collection[int] = ()) -> list[bool]:
    """Whether each event of `ledger`, which holds each event once, counts. `holds`: the places of those that stand."""
    counts = [event.type not in CONTROLS for event in ledger]
    if all(counts):
        return counts
    positions = {event.event_id: position for position, event in enumerate(ledger)}
    controls = [place for place, yes in enumerate(counts) if not yes]
    in_force = _in_force(ledger, positions, controls)
    of_rulings = _in_force(ledger, positions, controls, rollbacks=False) - in_force
    decisions: dict[str, bool] = {}
    abandoned: set[int] = set()
    by_annotation: defaultdict[str, list[int]] = defaultdict(list)
    held: set[int] = set()
    for position, event in enumerate(ledger):
        intervention = event.intervention
        if event.type not in CONTROLS:
            is_ruling = is_of_review(event.annotation_key)
            counts[position] = decisions.get(event.event_id, is_ruling or event.round not in abandoned)
            if event.type not in NOT_ANNOTATIONS:
                by_annotation[event.annotation_key].append(position)
        elif position in of_rulings and intervention is not None and intervention.selection is not None:
            rulings = {key: places for key, places in by_annotation.items() if is_of_review(key)}
            seen = _as_seen(ledger, schemas, position, intervention.selection)
            _apply_selection(intervention.selection, intervention.kind == "restore", seen, rulings, counts)
        elif position not in in_force:
            continue
        elif position in holds:
            held.update(place for one in event.targets if (place := positions.get(one, position)) < position)
        elif intervention is None:
            decided = _decisions(event, ledger, positions)
            decisions |= decided
            for target, yes in decided.items():
                if positions.get(target, position) < position and ledger[positions[target]].type not in CONTROLS:
                    counts[positions[target]] = yes
            abandoned |= _abandoned_before(event)
        elif intervention.kind == "rollback" and intervention.to is not None:
            first = _snapshot_end(event, positions)
            for place in range(first, position):
                counts[place] &= is_of_review(ledger[place].annotation_key)
            abandoned |= set(range(intervention.to + 1, event.round + 1))
        elif intervention.selection is not None:
            seen, restores = _as_seen(ledger, schemas, position, intervention.selection), intervention.kind == "restore"
            shown = [yes and place not in held for place, yes in enumerate(counts)] if held and restores else counts
            _apply_selection(intervention.selection, restores, seen, by_annotation, shown)
            if shown is not counts:
                held -= {place for place in held if shown[place]}
                counts = [yes or before for yes, before in zip(shown, counts, strict=True)]
    for place in held:
        counts[place] = False
    return counts


def _as_seen(ledger: Sequence[Event], schemas: Schemas | None, place: int, selection: Selection) -> Sequence[Event]:
    """The ledger up to `place`, in the classes that were in force there, if `selection` names one."""
    if schemas is None or selection.label is None:
        return ledger
    number = schemas.number_at(place)
    return [
        event if event.label is None else replace(event, label=schemas.meaning(event.label, earlier, number).label)
        for earlier, event in enumerate(ledger[:place])
    ]


def _in_force(
    ledger: Sequence[Event], positions: Mapping[str, int], controls: Sequence[int], *, rollbacks: bool = True
) -> frozenset[int]:
    """The positions of the interventions in force among those at `controls`.

    Runs newest first, since an undo or rollback cancels older ones. Without `rollbacks`, those that only a rollback
    cancels are among them.
    """
    found: set[int] = set()
    decided: dict[str, bool] = {}
    undone: set[str] = set()
    rolled_back = len(ledger)
    for position in reversed(controls):
        event, intervention = ledger[position], ledger[position].intervention
        if position >= rolled_back:
            continue
        if event.annotation_key in undone or not decided.get(event.event_id, True):
            continue
        found.add(position)
        if intervention is None:
            for target in event.targets:
                decided.setdefault(target, event.type == "restore")
        elif intervention.kind == "undo":
            undone.add(intervention_key(intervention.undoes or 0))
        elif intervention.kind == "rollback" and rollbacks:
            rolled_back = min(rolled_back, _snapshot_end(event, positions))
    return frozenset(found)


def _snapshot_end(rollback: Event, positions: Mapping[str, int]) -> int:
    """The number of events in the snapshot that a rollback returns to."""
    intervention = rollback.intervention
    if intervention is None or intervention.after is None:
        return 0
    last = intervention.after
    if last not in positions or positions[last] > positions[rollback.event_id]:
        raise BadInput(
            f"the ledger lacks event {last[:12]}, the last one of {round_name(intervention.to or 0)}, which "
            f"{rollback.annotation_key} rolled back to; `dvc checkout data/events` restores the published ledger"
        )
    return positions[last] + 1


def _apply_selection(
    selection: Selection,
    restores: bool,
    ledger: Sequence[Event],
    by_annotation: Mapping[str, Sequence[int]],
    counts: list[bool],
) -> None:
    """Set in `counts` whether the events of each annotation count, if a revocation or restoration selects it.

    `by_annotation`: the positions of each annotation's events so far.
    """
    for positions in by_annotation.values():
        if _selects(selection, restores, [(ledger[position], counts[position]) for position in positions]):
            for position in positions:
                counts[position] = restores


def _selects(selection: Selection, restores: bool, history: Sequence[tuple[Event, bool]]) -> bool:
    """Whether a revocation, or with `restores` a restoration, selects an annotation. `history`: its events, each with
    whether it counts.

    The selection is matched against the newest version: for a revocation, of the events that count; else of all.
    """
    if restores:
        given = [(event, yes) for event, yes in history if event.type != "delete"]
        return bool(given) and not given[-1][1] and selection.matches(given[-1][0])
    counting = [event for event, yes in history if yes]
    return bool(counting) and counting[-1].type != "delete" and selection.matches(counting[-1])


def _abandoned_before(event: Event) -> frozenset[int]:
    """The rounds abandoned by a rollback of an earlier version, which only its reason identifies as one."""
    found = _ROLLED_BACK.match(event.reason or "") if event.type == "quarantine" else None
    return frozenset(range(int(found[1]) + 1, event.round + 1)) if found else frozenset()


def _decisions(event: Event, ledger: Sequence[Event], positions: Mapping[str, int]) -> dict[str, bool]:
    """The events on which a quarantine (False) or restore event (True) of an earlier version decides, by event id.

    Revocations of earlier versions also listed deletions, which brought deleted annotations back; these are ignored.
    """
    targets = event.targets
    if (event.reason or "").startswith("revoked answers ("):
        deletions = ("delete", "task_gone")
        targets = tuple(t for t in targets if t not in positions or ledger[positions[t]].type not in deletions)
    return dict.fromkeys(targets, event.type == "restore")
