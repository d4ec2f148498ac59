"""Interventions: a person's decisions about rounds, labels and models. Their files are never edited.

An intervention is made while a round is open: after the record of the previous round and before the open round's own.
One that changes labels is carried out by the tick that closes the open round; the others take effect at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from al_pipeline.annotation.active_events import intervention_key
from al_pipeline.errors import BadInput
from al_pipeline.records import (
    INTERVENTION_FILE,
    ClassChange,
    Event,
    EventType,
    LabelIntervention,
    Selection,
    event_digest,
    moment,
    round_name,
)
from al_pipeline.validation import first_problem

Kind = Literal["rollback", "undo", "revoke", "restore", "schema", "approve", "pause", "resume", "ask"]

MAX_ITEMS = 10_000
"""Maximum number of items that one intervention may name."""

_RoundNumber = Annotated[int, Meta(ge=0, lt=10**6)]
_TAG = re.compile(r"round-\d{4,6}")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_FILE = re.compile(INTERVENTION_FILE)


class Intervention(Struct, frozen=True, forbid_unknown_fields=True):
    """One decision of a person."""

    number: int
    kind: Kind
    round: _RoundNumber
    """The round that was open when it was made."""
    by: str
    at: str
    reason: str
    labels: bool = False
    """Whether it changes the labelled set."""
    to: _RoundNumber | None = None
    """rollback: the round whose snapshot is restored."""
    parts: int | None = None
    """rollback: the number of the last ledger part in that snapshot."""
    undoes: int | None = None
    selection: Selection | None = None
    serves: str | None = None
    """The tag of the round whose model is promoted from now on; None: no change."""
    hold: bool | None = None
    """Whether later models wait for an approval; None: no change."""
    params_from: str | None = None
    """The git revision from which `params.yaml` is restored."""
    before: Mapping[str, Any] | None = None
    """rollback, schema: the state that an undo restores (`serves`, `hold`, `head`)."""
    items: Annotated[tuple[str, ...], Meta(max_length=MAX_ITEMS)] = ()
    """ask: the items of the pool to put into the next batch."""
    change: ClassChange | None = None
    """schema: how the list of classes changes, in `params.yaml` too, by the same commit."""
    classes_from: str | None = None
    """The git revision whose classes `params.yaml` gets back, by the same commit."""

    def to_row(self) -> dict[str, Any]:
        """This intervention as a JSON object."""
        row: dict[str, Any] = msgspec.to_builtins(self)
        if self.selection is not None and self.selection.label is None:  # as earlier versions wrote it
            del row["selection"]["label"]
        if self.change is not None:
            row["change"] = self.change.to_row()
        later = {"items": self.items, "change": self.change, "classes_from": self.classes_from}
        return {name: value for name, value in row.items() if name not in later or later[name]}

    @property
    def changes_classes(self) -> bool:
        """Whether the commit of this intervention changes the classes in `params.yaml`."""
        return self.change is not None or self.classes_from is not None

    def __post_init__(self) -> None:
        """Revisions become arguments of git, and tags become folder names, so arbitrary strings would be unsafe."""
        before = self.before or {}
        for tag in (self.serves, before.get("serves")):
            if tag is not None and not _TAG.fullmatch(tag):
                raise ValueError(f"{tag!r} is not the name of a round")
        for revision in (self.params_from, self.classes_from, before.get("head")):
            if revision is not None and not (_TAG.fullmatch(revision) or _COMMIT.fullmatch(revision)):
                raise ValueError(f"{revision!r} is not a revision")
        if type(before.get("hold")) not in (bool, NoneType):
            raise TypeError("hold must be true, false or null")
        if self.selection is not None and self.selection.since is not None:
            moment(self.selection.since)
        if (self.kind == "schema") != (self.change is not None):
            raise ValueError("an intervention of kind schema has a change of classes, and no other kind has one")

    def summary(self) -> str:
        """What was decided, in a few words."""
        named = [*self.items[:3], *([f"{len(self.items) - 3} more"] if len(self.items) > 3 else [])]
        return {
            "rollback": f"rolled back to {round_name(self.to or 0)}",
            "undo": f"took intervention {self.undoes} back",
            "revoke": f"revoked answers ({self.selection})",
            "restore": f"restored answers ({self.selection})",
            "approve": f"approved the model of {self.serves}",
            "pause": "paused",
            "resume": "resumed",
            "schema": self.change.sentence() if self.change else "",
            "ask": f"asked for {', '.join(named)}",
        }[self.kind]

    def sentence(self) -> str:
        """What was decided, by whom and why."""
        return f"{self.summary()} by {self.by} at {self.at}" + (f": {self.reason}" if self.reason else "")


def intervention_number(path: str) -> int | None:
    """The number of the intervention that a repository file holds; None if it holds none."""
    found = _FILE.fullmatch(path)
    return int(found[1]) if found else None


def read_intervention(text: str, path: str) -> Intervention:
    """Parse the intervention in a repository file. Raises BadInput if it is invalid or its number is not the file's."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    intervention = parse_intervention(row, path)
    if intervention.number != intervention_number(path):
        raise BadInput(
            f"{path} contains intervention {intervention.number}, whose number does not match; `git log -p {path}` "
            "shows who wrote it"
        )
    return intervention


def parse_intervention(row: Any, place: str) -> Intervention:
    """Parse an intervention that `to_row` wrote. Raises BadInput, naming `place`, if it is invalid."""
    try:
        return msgspec.convert(row, Intervention)
    except (msgspec.ValidationError, RecursionError) as error:
        problem = first_problem(Intervention, row) or error
        raise BadInput(f"{place} is not a valid intervention ({problem}); was it written by a newer engine?") from None


def in_effect(interventions: Sequence[Intervention]) -> list[Intervention]:
    """The interventions in effect, in order, without those about labels that a later one cancelled.

    An undo cancels the intervention that it names. A rollback cancels all interventions about labels, including undos,
    that were made after its snapshot. The newest decides: a cancelled undo or rollback cancels nothing.
    """
    gone: set[int] = set()
    standing = []
    for place in range(len(interventions) - 1, -1, -1):
        intervention = interventions[place]
        if intervention.number in gone:
            continue
        if intervention.kind == "undo" and intervention.undoes is not None:
            gone.add(intervention.undoes)
        if intervention.kind == "rollback" and intervention.labels and intervention.to is not None:
            gone |= {older.number for older in interventions[:place] if older.labels and older.round > intervention.to}
        standing.append(intervention)
    return standing[::-1]


def undoable(interventions: Sequence[Intervention]) -> Intervention | None:
    """The newest rollback in effect that was not undone; None if there is none."""
    undone = {intervention.undoes for intervention in interventions if intervention.kind == "undo"}
    standing = [r for r in in_effect(interventions) if r.kind == "rollback" and r.number not in undone]
    return standing[-1] if standing else None


def class_changes(interventions: Sequence[Intervention]) -> list[Intervention]:
    """The changes of classes in force, oldest first."""
    return [intervention for intervention in in_effect(interventions) if intervention.kind == "schema"]


def abandoned(interventions: Sequence[Intervention]) -> dict[int, int]:
    """The rounds whose annotations, even later ones, do not count, each with the number of its rollback."""
    found: dict[int, int] = {}
    for intervention in in_effect(interventions):
        if intervention.kind == "rollback" and intervention.labels and intervention.to is not None:
            found |= dict.fromkeys(range(intervention.to + 1, intervention.round + 1), intervention.number)
    return found


def holding(interventions: Sequence[Intervention]) -> Intervention | None:
    """The intervention because of which new models wait for an approval; None if they do not."""
    newest = next((intervention for intervention in reversed(interventions) if intervention.hold is not None), None)
    return newest if newest is not None and newest.hold else None


def pausing(interventions: Sequence[Intervention]) -> Intervention | None:
    """The intervention that paused the ticks; None if they are not paused."""
    newest = next(
        (intervention for intervention in reversed(interventions) if intervention.kind in ("pause", "resume")), None
    )
    return newest if newest is not None and newest.kind == "pause" else None


def waiting(interventions: Iterable[Intervention], carried_out: Collection[int]) -> list[Intervention]:
    """The interventions about labels that no published round has carried out yet, in order."""
    return [
        intervention for intervention in interventions if intervention.labels and intervention.number not in carried_out
    ]


def asked_for(interventions: Iterable[Intervention], planned: Mapping[str, int]) -> list[str]:
    """The items requested by `ask` interventions and not planned since, in the order of the requests.

    `planned`: the newest round whose plan has the item, by item id. Items for which a batch had no room stay requested.
    """
    wanted = [
        (item, intervention.round)
        for intervention in interventions
        if intervention.kind == "ask"
        for item in intervention.items
    ]
    return list(dict.fromkeys(item for item, number in wanted if planned.get(item, -1) <= number))


def promoted(interventions: Sequence[Intervention], rounds: Sequence[tuple[int, bool]]) -> str | None:
    """The tag of the round whose model is promoted; None if there is none.

    `rounds`: each published round's number and whether its record says promoted. The newest decision counts; an
    intervention precedes the record of the round that was open when it was made.
    """
    words = [((number, 1, 0), round_name(number)) for number, yes in rounds if yes]
    words += [((r.round, 0, r.number), r.serves) for r in interventions if r.serves is not None]
    return max(words)[1] if words else None


def control_event(intervention: Intervention, snapshot_end: str | None = None) -> Event:
    """The ledger event of an intervention about labels. It holds what was requested, not the events concerned.

    `snapshot_end`: for a rollback, the id of the last event in its snapshot.
    """
    if intervention.kind == "rollback":
        asked = LabelIntervention("rollback", to=intervention.to or 0, after=snapshot_end)
    elif intervention.kind == "undo":
        asked = LabelIntervention("undo", undoes=intervention.undoes or 0)
    elif intervention.change is not None:
        asked = LabelIntervention("schema", change=intervention.change)
    else:
        kind: Literal["revoke", "restore"] = "restore" if intervention.kind == "restore" else "revoke"
        asked = LabelIntervention(kind, selection=intervention.selection or Selection())
    types: dict[Kind, EventType] = {"restore": "restore", "schema": "schema"}
    return Event(
        event_id=event_digest("ruling", intervention.number, asked.to_row()),
        type=types.get(intervention.kind, "quarantine"),
        item_id="",
        content_hash="",
        part="pool",
        round=intervention.round,
        annotation_key=intervention_key(intervention.number),
        annotator=intervention.by,
        reason=intervention.sentence(),
        observed_at=intervention.at,
        intervention=asked,
    )
