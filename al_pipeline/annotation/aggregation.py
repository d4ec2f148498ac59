"""The fold: aggregates the ledger's events, in their order, into the labelled set.

No clock is read: the only order is that of the ledger. Events of different people may be interleaved in any way and
give the same result, adjudications apart, of which the newest wins. Which events count is derived from the
interventions that the ledger holds, and nothing about it is stored.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from al_pipeline.annotation.schema_change import missing_in_use
from al_pipeline.errors import BadInput, SchemaInUse
from al_pipeline.records import Event, LabeledItem, Part, PlannedTask, Selection, Unresolved, round_name

IMPORT = "import"
"""The one annotator that all imported labels count as; any person's label outweighs it."""
IMPORT_ROUND = -1
MAX_SKIPS = 2
"""After skips of so many people an item is no longer asked (of fewer only where there are fewer people)."""
MAX_ASKED = 2
"""A tie is asked in so many rounds, then ignored."""

Standing = Literal["answered", "given_up", "open"]

CONTROLS = ("quarantine", "restore")
"""Types of events about other events, not about an answer."""
_NO_ANSWERS = ("task_gone", "correct")
"""Types of events about tasks and items, not about an answer."""
_NEEDS_LABEL = ("label", "adjudicate", "gold", "import")


@dataclass(frozen=True, slots=True)
class Folded:
    """Result of the aggregation. An item in none of the three has no label yet and may be asked (again)."""

    labeled: tuple[LabeledItem, ...]
    """Items of the pool with their labels, by item_id."""
    test: tuple[LabeledItem, ...]
    """Items of the test set with their labels, by item_id."""
    unresolved: tuple[Unresolved, ...]
    """Items of both whose answers give no label, by item_id."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """The current state of one annotation: `label` None is a skip. `order`: place of its newest event in the ledger."""

    annotator: str
    label: str | None
    binding: bool
    round: int
    order: int


def active(events: Iterable[Event]) -> list[Event]:
    """The events that count, in the ledger's order: each once, none that is quarantined, no quarantine or restore.

    The interventions in force decide, each from its place in the ledger on:

    - A rollback is taken back by an undo that is in force. One that is in force takes out all events between its
      snapshot and itself, takes back the interventions among them, and keeps out later answers to the rounds that it
      abandons.
    - A revocation takes out the answers that stand at its place and that its selection names, with all that was said
      before under the same annotation: a withdrawn answer, or an older wording of it, does not come back by it.
    - A restoration brings back answers that are out at its place and that its selection names, with what became of
      them: one that was deleted afterwards does not count again.

    What quarantines and restores of earlier versions decide stands in their `targets`.
    """
    ledger: dict[str, Event] = {}
    for event in events:
        ledger.setdefault(event.event_id, event)
    ordered = list(ledger.values())
    counts = _counts(ordered)
    return [event for event, yes in zip(ordered, counts, strict=True) if yes]


def _counts(ledger: Sequence[Event]) -> list[bool]:
    """Whether each event of `ledger`, in which each stands once, counts."""
    counts = [event.type not in CONTROLS for event in ledger]
    if all(counts):
        return counts
    places = {event.event_id: place for place, event in enumerate(ledger)}
    in_force = _in_force(ledger, places)
    named: dict[str, bool] = {}
    abandoned: set[int] = set()
    said: defaultdict[str, list[int]] = defaultdict(list)
    for place, event in enumerate(ledger):
        asked = event.intervention
        if event.type not in CONTROLS:
            counts[place] = named.get(event.event_id, event.round not in abandoned)
            if event.type not in _NO_ANSWERS:
                said[event.annotation_key].append(place)
        elif place not in in_force:
            continue
        elif asked is None:
            decided = _named(event, ledger, places)
            named |= decided
            for target, yes in decided.items():
                if places.get(target, place) < place and ledger[places[target]].type not in CONTROLS:
                    counts[places[target]] = yes
            abandoned |= _abandoned_before(event)
        elif asked.kind == "rollback" and asked.to is not None:
            first = _snapshot_end(event, places)
            counts[first:place] = [False] * (place - first)
            abandoned |= set(range(asked.to + 1, event.round + 1))
        elif asked.selection is not None:
            for spoken in said.values():
                if _speaks_of(asked.selection, asked.kind == "restore", [(ledger[p], counts[p]) for p in spoken]):
                    for one in spoken:
                        counts[one] = asked.kind == "restore"
    return counts


def _in_force(ledger: Sequence[Event], places: Mapping[str, int]) -> frozenset[int]:
    """The places of the interventions that hold, newest first: an undo and a rollback take back older ones."""
    found: set[int] = set()
    decided: dict[str, bool] = {}
    undone: set[str] = set()
    rolled_back = len(ledger)
    for place in reversed(range(len(ledger))):
        event, asked = ledger[place], ledger[place].intervention
        if event.type not in CONTROLS or place >= rolled_back:
            continue
        if event.annotation_key in undone or not decided.get(event.event_id, True):
            continue
        found.add(place)
        if asked is None:
            for target in event.targets:
                decided.setdefault(target, event.type == "restore")
        elif asked.kind == "undo":
            undone.add(intervention_key(asked.undoes or 0))
        elif asked.kind == "rollback":
            rolled_back = min(rolled_back, _snapshot_end(event, places))
    return frozenset(found)


def _snapshot_end(rollback: Event, places: Mapping[str, int]) -> int:
    """Number of events in the snapshot that a rollback returns to."""
    asked = rollback.intervention
    if asked is None or asked.after is None:
        return 0
    if asked.after not in places or places[asked.after] > places[rollback.event_id]:
        raise BadInput(
            f"the ledger lacks event {asked.after[:12]}, the last one that {round_name(asked.to or 0)} knew, which "
            f"{rollback.annotation_key} went back to; `dvc checkout data/events` brings the ledger as it was published"
        )
    return places[asked.after] + 1


def _speaks_of(selection: Selection, restores: bool, spoken: Sequence[tuple[Event, bool]]) -> bool:
    """Whether a restoration (else a revocation) speaks of an annotation. `spoken`: its events, and which count.

    The newest answer is looked at: of those that count where it is revoked, of all where it is restored.
    """
    if restores:
        given = [(event, yes) for event, yes in spoken if event.type != "delete"]
        return bool(given) and not given[-1][1] and selection.matches(given[-1][0])
    counting = [event for event, yes in spoken if yes]
    return bool(counting) and counting[-1].type != "delete" and selection.matches(counting[-1])


_ROLLED_BACK = re.compile(r"rolled back to round-(\d{4,6}) by ")


def _abandoned_before(event: Event) -> frozenset[int]:
    """The rounds that a rollback of an earlier version abandons; its reason alone says that it is one."""
    found = _ROLLED_BACK.match(event.reason or "") if event.type == "quarantine" else None
    return frozenset(range(int(found[1]) + 1, event.round + 1)) if found else frozenset()


def _named(event: Event, ledger: Sequence[Event], places: Mapping[str, int]) -> dict[str, bool]:
    """What a quarantine or restore of an earlier version decides, by event id.

    Its revocations named withdrawals too, which brought the withdrawn answers back; a withdrawal is no answer.
    """
    targets = event.targets
    if (event.reason or "").startswith("revoked answers ("):
        targets = tuple(t for t in targets if t not in places or ledger[places[t]].type not in ("delete", "task_gone"))
    return dict.fromkeys(targets, event.type == "restore")


def quarantined(events: Iterable[Event]) -> frozenset[str]:
    """The ids of the events that are left out of the fold at present (quarantines and restores apart)."""
    events = list(events)
    counted = {event.event_id for event in active(events)}
    return frozenset(e.event_id for e in events if e.type not in CONTROLS and e.event_id not in counted)


def standing_answers(events: Iterable[Event]) -> dict[str, Event]:
    """The newest event of each annotation that currently counts, by annotation key."""
    now: dict[str, Event] = {}
    for event in active(events):
        if event.type == "delete":
            now.pop(event.annotation_key, None)
        elif event.type not in _NO_ANSWERS:
            now[event.annotation_key] = event
    return now


def superseded(events: Iterable[Event]) -> dict[str, str]:
    """The items whose text was corrected, each with the item that has the right text; they are neither asked nor used.

    A correction that is not in force, since a rollback went back to before it, supersedes nothing.
    """
    corrections = [event for event in events if event.type == "correct" or event.type in CONTROLS]
    if all(event.type in CONTROLS for event in corrections):
        return {}
    return _superseded(active(events))


def _superseded(counted: Iterable[Event]) -> dict[str, str]:
    newest = {event.annotation_key: event for event in counted if event.type == "correct"}
    return {item: event.item_id for event in newest.values() for item in event.targets}


def supporters(events: Iterable[Event], labels: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Who gave each item the label that `labels` (item id -> label) says: distinct people, sorted.

    Only answers that stand count, and of one person only the one that the fold counts.
    """
    said: defaultdict[str, list[Event]] = defaultdict(list)
    for event in active(events):
        if event.item_id in labels:
            said[event.item_id].append(event)
    return {
        item: tuple(sorted({v.annotator for v in _votes(_answers(said[item]).values()) if v.label == label}))
        for item, label in labels.items()
    }


def times_asked(events: Iterable[Event]) -> dict[str, int]:
    """How often each item was asked: in so many tasks with an answer, or a skip, that stands.

    A task that was kept for the next round is asked once, although its answers belong to two rounds.
    """
    tasks: defaultdict[str, set[str]] = defaultdict(set)
    for event in standing_answers(events).values():
        if event.round >= 0:
            tasks[event.item_id].add(event.push_key or round_name(event.round))
    return {item: len(keys) for item, keys in tasks.items()}


def changed_by(events: Sequence[Event]) -> dict[str, frozenset[str]]:
    """The items of the events that each intervention took out or brought back where it stands, by its event id."""
    ledger = list({event.event_id: event for event in reversed(events)}.values())[::-1]
    found: dict[str, frozenset[str]] = {}
    for place, event in enumerate(ledger):
        if event.intervention is not None:
            before, after = _counts(ledger[:place]), _counts(ledger[: place + 1])
            found[event.event_id] = frozenset(
                item
                for one, was, now in zip(ledger, before, after[:place], strict=False)
                if was != now
                for item in items_of(one)
            )
    return found


def items_of(event: Event) -> frozenset[str]:
    """The items that an event itself names."""
    return frozenset({event.item_id, *event.targets} if event.type == "correct" else {event.item_id})


def intervention_key(number: int) -> str:
    """What the quarantines and restores of an intervention bear in place of an annotation's name."""
    return f"ruling:{number}"


def people(events: Iterable[Event]) -> int:
    """Number of people who have answered or skipped anything (imports, adjudicators and gold apart)."""
    return len({event.annotator for event in active(events) if event.type in ("label", "skip", "supersede")})


def skips(events: Iterable[Event]) -> dict[str, int]:
    """How many people's newest answer to an item is a skip, by item; items that nobody skips are left out."""
    by_item: defaultdict[str, list[Event]] = defaultdict(list)
    for event in active(events):
        by_item[event.item_id].append(event)
    counts = {
        item: sum(vote.label is None for vote in _votes(_answers(said).values())) for item, said in by_item.items()
    }
    return {item: count for item, count in counts.items() if count}


def fold(
    events: Sequence[Event], labels: Sequence[str], everybody: int | None = None, asked: Mapping[str, int] | None = None
) -> Folded:
    """The labelled set, the labelled test set, and what is unresolved.

    `labels`: the schema's classes. `everybody`: how many people may answer, where that is known; else as many as have.
    `asked`: in how many rounds each item was asked.

    Each annotator's newest answer to an item counts, once. An adjudication or gold label wins (the newest of them);
    else the class with the most people; else, where no person gave a label, the imported label. Two or more classes
    with equally many people are a tie: unresolved, and ignored once it was asked in two rounds. Items that nobody
    labelled and two people (or everybody) skipped are ignored. So are items whose text was corrected: what people
    said of them was said of another text.

    Raises SchemaInUse where an answer names a class that the schema lacks, BadInput on events that contradict
    each other about what an item is.
    """
    counted = active(events)
    enough_skips = _enough_skips(counted, everybody)
    asked = asked or {}
    by_item: defaultdict[str, list[Event]] = defaultdict(list)
    for event in counted:
        by_item[event.item_id].append(event)
    labeled: list[LabeledItem] = []
    test: list[LabeledItem] = []
    unresolved: list[Unresolved] = []
    strangers: Counter[str] = Counter()
    corrected = _superseded(counted)
    parts: dict[str, Part] = {event.item_id: event.part for event in counted if event.type == "correct"}
    for item_id in sorted(by_item.keys() | corrected.keys()):
        if now := corrected.get(item_id):
            why = f"its text was corrected: {now}"
            unresolved.append(Unresolved(item_id, parts[now], "ignored", why, asked.get(item_id, 0)))
            continue
        content, part = _identity(item_id, by_item[item_id])
        answers = _answers(by_item[item_id]).values()
        strangers.update(a.label for a in answers if a.label is not None and a.label not in labels)
        result = _resolve(answers)
        if isinstance(result, str):
            votes = [vote for vote in _votes(answers) if vote.label is not None]
            agreement = sum(vote.label == result for vote in votes) / len(votes)
            row = LabeledItem(item_id, content, result, agreement, len(votes), _first_round(answers))
            (labeled if part == "pool" else test).append(row)
        elif row_of := _unresolved(item_id, part, result, labels, answers, enough_skips, asked.get(item_id, 0)):
            unresolved.append(row_of)
    if problem := missing_in_use(labels, {name: f"{count} answers" for name, count in sorted(strangers.items())}):
        raise SchemaInUse(problem)
    return Folded(tuple(labeled), tuple(test), tuple(unresolved))


def labels_in_use(events: Iterable[Event]) -> dict[str, Counter[Part]]:
    """How many answers that count now name each class, by the part that their items belong to."""
    by_item: defaultdict[str, list[Event]] = defaultdict(list)
    for event in active(events):
        by_item[event.item_id].append(event)
    found: defaultdict[str, Counter[Part]] = defaultdict(Counter)
    for about in by_item.values():
        for answer in _answers(about).values():
            if answer.label is not None:
                found[answer.label][about[0].part] += 1
    return dict(found)


def standing(
    tasks: Sequence[PlannedTask], events: Sequence[Event], overlap: int, everybody: int | None = None
) -> dict[str, Standing]:
    """Whether each task, by push key, is answered, given up or still open. Only answers under that very key count.

    Answered: `overlap` people gave a label, or one gave a binding one (adjudication, gold). Given up: two people
    (or everybody) skipped it. Where it is known who may answer and all of them have, nothing more can come: answered
    if there is a label. A task about a text that was corrected since is given up.
    """
    counted = active(events)
    corrected = _superseded(counted)
    enough_skips = _enough_skips(counted, everybody)
    by_key: defaultdict[str, list[Event]] = defaultdict(list)
    for event in counted:
        by_key[event.push_key].append(event)
    found: dict[str, Standing] = {}
    for task in tasks:
        votes = _votes(_answers(by_key.get(task.push_key, ())).values())
        given = sum(vote.label is not None for vote in votes)
        all_spoke = everybody is not None and len(votes) >= everybody
        if task.item_id in corrected:
            found[task.push_key] = "given_up"
        elif given >= overlap or any(vote.binding for vote in votes) or (given and all_spoke):
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
) -> list[PlannedTask]:
    """Of a round's tasks those that can stay with the annotators when an intervention closes the round, in their order.

    They are open, for Label Studio too: it serves a task to nobody that `overlap` people have answered, and counts
    answers that are quarantined, were refused (`refused`: the push keys of those) or were followed by their author's
    skip. So every answer that it holds counts here, and they are of fewer people than that. Nor has another task given
    the item a label, or enough skips, unless a person asked for it (`wanted`: items). `folded` is what `events` come
    to.

    Whether the newest model would choose them does not matter: somebody may have them on the screen.
    """
    found = standing(tasks, events, overlap, everybody)
    counting = standing_answers(events).keys()
    held = {key: event for key, event in _last_said(events).items() if event.type != "delete"}
    spoiled = {event.push_key for key, event in held.items() if key not in counting} | set(refused)
    begun = {event.push_key for key, event in held.items() if key in counting}
    givers: defaultdict[str, set[str]] = defaultdict(set)
    for event in held.values():
        if event.label is not None:
            givers[event.push_key].add(event.annotator)
    labelled = {row.item_id for row in (*folded.labeled, *folded.test)}
    ignored = {row.item_id for row in folded.unresolved if row.kind == "ignored"}
    return [
        task
        for task in tasks
        if found[task.push_key] == "open"
        and task.push_key not in spoiled
        and len(givers[task.push_key]) < overlap
        and (task.item_id not in labelled or task.push_key in begun)
        and (task.item_id not in ignored or task.item_id in wanted)
    ]


def _last_said(events: Iterable[Event]) -> dict[str, Event]:
    """The newest event of each annotation, whether it counts or not, by annotation key."""
    return {event.annotation_key: event for event in events if event.type not in (*CONTROLS, *_NO_ANSWERS)}


def _enough_skips(counted: Sequence[Event], everybody: int | None) -> int:
    return min(MAX_SKIPS, max(1, people(counted) if everybody is None else everybody))


def _identity(item_id: str, events: Sequence[Event]) -> tuple[str, Part]:
    seen = {(event.content_hash, event.part) for event in events}
    if len(seen) > 1:
        raise BadInput(
            f"the ledger contradicts itself about item {item_id!r}: "
            + " and ".join(f"{part} item with content {content[:12]}" for content, part in sorted(seen))
            + "; quarantine the wrong events with `al labels revoke`"
        )
    return seen.pop()


def _answers(events: Iterable[Event]) -> dict[str, _Answer]:
    """What the annotations of one item (or task) say, by annotation key, after edits and deletions."""
    now: dict[str, _Answer] = {}
    for order, event in enumerate(events):
        if event.type in _NEEDS_LABEL and event.label is None:
            raise BadInput(f"event {event.event_id} is of type {event.type!r} but names no label")
        if event.type == "delete":
            now.pop(event.annotation_key, None)
        elif event.type not in _NO_ANSWERS:
            before = now.get(event.annotation_key)
            edit = event.type == "supersede"
            imported = event.type == "import" or (edit and before is not None and before.annotator == IMPORT)
            now[event.annotation_key] = _Answer(
                annotator=IMPORT if imported else event.annotator,
                label=None if event.type == "skip" else event.label,
                binding=event.type in ("adjudicate", "gold") or (edit and before is not None and before.binding),
                round=IMPORT_ROUND if imported else event.round,
                order=order,
            )
    return now


def _votes(answers: Iterable[_Answer]) -> list[_Answer]:
    """The one answer of each annotator that counts: the newest, a binding one before all others.

    The import is among them only where no person gave a label.
    """
    best: dict[str, _Answer] = {}
    for answer in sorted(answers, key=lambda a: (a.binding and a.label is not None, a.order)):
        best[answer.annotator] = answer
    imported = best.pop(IMPORT, None)
    if imported is not None and all(vote.label is None for vote in best.values()):
        best[IMPORT] = imported
    return list(best.values())


def _resolve(answers: Iterable[_Answer]) -> str | frozenset[str]:
    """The label, or the classes that are tied (none where nobody gave a label)."""
    votes = _votes(answers)
    binding = {vote.order: vote.label for vote in votes if vote.binding and vote.label is not None}
    if binding:
        return binding[max(binding)]
    counts = Counter(vote.label for vote in votes if vote.label is not None)
    most = max(counts.values(), default=0)
    leaders = [label for label, count in counts.items() if count == most]
    return leaders[0] if len(leaders) == 1 else frozenset(leaders)


def _first_round(answers: Iterable[_Answer]) -> int:
    """The first round such that the answers up to it give a label. `answers` must give one."""
    if any(vote.annotator == IMPORT for vote in _votes(answers)):
        return IMPORT_ROUND
    given = [answer for answer in answers if answer.annotator != IMPORT]
    rounds = sorted({answer.round for answer in given})
    return next(number for number in rounds if isinstance(_resolve([a for a in given if a.round <= number]), str))


def _unresolved(
    item_id: str,
    part: Part,
    tied: frozenset[str],
    labels: Sequence[str],
    answers: Iterable[_Answer],
    enough_skips: int,
    asked: int,
) -> Unresolved | None:
    if tied:
        between = " and ".join(label for label in labels if label in tied)
        if asked >= MAX_ASKED:
            return Unresolved(item_id, part, "ignored", f"still a tie of {between} after {asked} rounds", asked)
        return Unresolved(item_id, part, "tie", f"a tie of {between}", asked)
    skips = len(_votes(answers))
    if skips >= enough_skips:
        who = "1 person, the only one there is" if skips == 1 else f"{skips} people"
        return Unresolved(item_id, part, "ignored", f"skipped by {who}", asked)
    return None
