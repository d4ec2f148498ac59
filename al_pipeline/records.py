"""The words of the product, as frozen records. What each is, where it lies and who writes it: CONTRIBUTING.md."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

Part = Literal["pool", "test"]
"""Which of the two disjoint sets an item belongs to: the pool that may be asked, or the test set."""

EventType = Literal[
    "label",
    "skip",
    "supersede",
    "delete",
    "task_gone",
    "adjudicate",
    "gold",
    "quarantine",
    "restore",
    "import",
    "correct",
]

RANDOM = "random"
"""The strategy that draws all of a batch uniformly."""
RANDOM_SLICE = "random_slice"
"""The strategy of the uniform sample of all candidates that rides in each batch: the honest part."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def content_hash(text: str) -> str:
    """What makes two texts the same item: SHA-256 (hex) of the stripped text in Unicode's NFC form."""
    return hashlib.sha256(unicodedata.normalize("NFC", text).strip().encode("utf-8", "surrogatepass")).hexdigest()


def composed(text: str) -> str:
    """The text in Unicode's NFC form, in which names of classes are compared: an é can be one character or two."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def shown_text(text: str) -> str:
    """The text as annotators see it: control characters (NUL breaks PostgreSQL) and lone surrogates become blanks."""
    return _CONTROL.sub(" ", text)


def push_key(workspace_id: str, round_number: int, item_id: str) -> str:
    """The name of one task, the same for ever: `workspace:round:item_id`."""
    return f"{workspace_id}:{round_number:04d}:{item_id}"


def round_name(number: int) -> str:
    """`7` -> `round-0007`: the tag of a published round."""
    return f"round-{number:04d}"


def event_digest(*facts: Any) -> str:
    """SHA-256 (hex) of what an event says: the id under which it is known. Holds nothing of when we saw it."""
    return hashlib.sha256(canonical(list(facts)).encode("ascii")).hexdigest()


def author_digest(annotator: str, created_at: str | None) -> str:
    """What tells an answer from others that bore its number on the server: a digest of annotator and creation time."""
    return event_digest(annotator, created_at)[:12]


def canonical(value: Any) -> str:
    """`value` as JSON text with sorted keys, in ASCII: equal values give equal text, and any text can be written."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    except RecursionError:
        return '"nested too deeply"'


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that can be labelled."""

    item_id: str
    content_hash: str
    text: str
    metadata: str = "{}"
    """The user's other columns, as one JSON object."""


@dataclass(frozen=True, slots=True)
class Query:
    """One item that the model asks about. `score`: higher = ask sooner. `probability`: of its being selected.

    `predicted`: what the model that chose it would answer, with its `confidence`; None while it has learnt nothing.
    """

    item_id: str
    rank: int
    score: float
    strategy: str
    probability: float
    predicted: str | None = None
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One row of a round's plan: a query, or an item of the test set, as it will be pushed.

    `push_key` is that of the round that asked it first: a task that is kept for the next round keeps its name.
    """

    push_key: str
    item_id: str
    content_hash: str
    part: Part
    round: int
    rank: int
    score: float
    strategy: str
    probability: float
    predicted: str | None = None
    """What the model that chose it would answer; never shown with the task, and no test item has one."""
    confidence: float | None = None

    @property
    def first_round(self) -> int:
        """The round that asked it first; another than `round` where an intervention closed that one and it was kept."""
        return int(self.push_key.removesuffix(f":{self.item_id}").rpartition(":")[2])


@dataclass(frozen=True, slots=True)
class Task:
    """A planned task with what annotators will see: `fields` maps a column's name to its (sanitised) text."""

    plan: PlannedTask
    fields: Mapping[str, str]
    guess: tuple[str, float] | None = None
    """The model's label and its probability, where annotators may see it."""


@dataclass(frozen=True, slots=True)
class TaskState:
    """What Label Studio says of one task, without its answers."""

    task_id: int
    push_key: str | None
    round: int | None
    part: Part | None
    is_labeled: bool
    annotations: int
    cancelled: int


@dataclass(frozen=True, slots=True)
class Annotation:
    """What one person said of one task, as Label Studio holds it now."""

    annotation_id: int
    annotator: str
    """E-mail address in lower case, or `user:<id>` where the server does not tell."""
    result: tuple[Mapping[str, Any], ...]
    was_cancelled: bool
    created_at: str
    updated_at: str
    lead_time: float | None


@dataclass(frozen=True, slots=True)
class AnsweredTask:
    """One task with all its annotations; `data` as Label Studio holds it now (people can edit it there)."""

    task_id: int
    push_key: str | None
    updated_at: str
    data: Mapping[str, Any]
    annotations: tuple[Annotation, ...]
    created_at: str = ""
    """When this copy of the task was made: an answer older than it was given to another, deleted copy."""
    prelabel_shown: bool = False
    """Whether annotators see the model's guess."""


RefusalReason = Literal[
    "task not ours", "changed text", "annotator not allowed", "malformed", "empty result", "wrong from_name",
    "several choices", "unknown label",
]  # fmt: skip
"""Why an answer was not taken."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an annotation says, once it is checked; a skip has no label."""

    label: str | None
    origin: str | None
    """Whether the annotator made it or took over the model's guess, where Label Studio says so."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which answers a revocation or restoration speaks of: those that meet every condition that is given."""

    annotator: str | None = None
    round: int | None = None
    item: str | None = None
    since: str | None = None
    """ISO 8601 with a zone: answers given or changed at that time or later."""
    label: str | None = None
    """The class that an answer says now."""

    def __str__(self) -> str:
        said = [
            f"annotator {self.annotator}" if self.annotator is not None else "",
            round_name(self.round) if self.round is not None else "",
            f"item {self.item}" if self.item is not None else "",
            f"since {self.since}" if self.since is not None else "",
            f"label {self.label}" if self.label is not None else "",
        ]
        return ", ".join(filter(None, said))

    def matches(self, event: Event) -> bool:
        """Whether `event` meets the conditions; one whose time nobody knows is never `since`."""
        if self.annotator is not None and event.annotator != self.annotator:
            return False
        if self.round is not None and event.round != self.round:
            return False
        if self.item is not None and event.item_id != self.item:
            return False
        if self.label is not None and event.label != composed(self.label):
            return False
        if self.since is None:
            return True
        stamp = event.updated_at or event.created_at or event.observed_at
        return stamp is not None and moment(stamp) >= moment(self.since)


def moment(stamp: str) -> datetime:
    """An ISO 8601 time with its zone (UTC where it names none). Raises ValueError."""
    found = datetime.fromisoformat(stamp)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class LabelIntervention:
    """What a person asks of the labels, as the ledger holds it.

    It lists no events. Which ones it speaks of is derived at each fold, from its place in the ledger and from the other
    interventions in force (see `labels.active`).
    """

    kind: Literal["rollback", "undo", "revoke", "restore"]
    to: int | None = None
    """rollback: the round whose snapshot is gone back to. Rounds after it, up to the event's own, are abandoned."""
    after: str | None = None
    """rollback: the id of the last event in the snapshot's ledger; None where it had none."""
    undoes: int | None = None
    """undo: the number of the intervention that is taken back."""
    selection: Selection | None = None
    """revoke, restore: which answers."""

    def to_row(self) -> dict[str, Any]:
        """This intervention as a JSON object, without what is None."""
        row = {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) is not None}
        if self.selection is not None:
            given = {name: getattr(self.selection, name) for name in self.selection.__slots__}
            row["selection"] = {name: value for name, value in given.items() if value is not None}
        return row

    @staticmethod
    def from_row(row: Any) -> LabelIntervention:
        """The intervention that `to_row` wrote. Raises ValueError, TypeError or AttributeError on anything else."""
        if unknown := sorted(set(row) - {field.name for field in fields(LabelIntervention)}):
            raise ValueError(f"unknown key {unknown[0]!r}")
        given = row.get("selection")
        asked = LabelIntervention(**{**row, "selection": None if given is None else Selection(**given)})
        needed = {"rollback": "to", "undo": "undoes", "revoke": "selection", "restore": "selection"}
        if asked.kind not in needed or getattr(asked, needed[asked.kind]) is None:
            raise ValueError("it does not say what it asks for")
        numbers = (asked.to, asked.undoes, asked.selection.round if asked.selection else None)
        if not all(value is None or type(value) is int for value in numbers):
            raise TypeError("a number is none")
        chosen = asked.selection or Selection()
        texts = (asked.after, chosen.annotator, chosen.item, chosen.label)
        if not all(isinstance(text, str | None) for text in texts):
            raise TypeError("a text is none")
        if asked.selection is not None and asked.selection.since is not None:
            moment(asked.selection.since)
        return asked


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that we were told about an answer; never edited.

    `annotation_key` names the annotation that it speaks of (see `annotation.changes.annotation_key`), or is
    `import:<content hash>`; for `task_gone` the push key, for a quarantine or restore `intervention:<number>`.
    A `supersede` without a label took the answer back by skipping. A `label` or `skip` whose `previous` is a `delete`
    came back after it had vanished.
    A quarantine or restore says in `intervention` what a person asked for. Those of earlier versions list the ids of
    the events that they speak of in `targets` instead. `targets` of a `task_gone`: the answers that its task had.
    A `correct` says which text a user's id stands for now: its item is that text's, `targets` are the items of all
    other texts that the id had, and `annotation_key` is `correction:<the user's id>`; the newest one counts.
    """

    event_id: str
    type: EventType
    item_id: str
    content_hash: str
    part: Part
    round: int
    annotation_key: str
    annotator: str
    label: str | None = None
    schema_version: int = 1
    reason: str | None = None
    targets: tuple[str, ...] = ()
    previous: str | None = None
    lead_time: float | None = None
    origin: str | None = None
    created_at: str | None = None
    updated_at: str | None = None
    observed_at: str | None = None
    prelabel_shown: bool = False
    intervention: LabelIntervention | None = None

    @property
    def push_key(self) -> str:
        """The push key of the task whose annotation it speaks of; empty where it speaks of none."""
        return self.annotation_key.rpartition("#")[0]

    @property
    def answer_name(self) -> str:
        """What tells the annotation from others of its task: its number on the server, and the digest of its author.

        Earlier versions wrote the number alone.
        """
        return self.annotation_key.rpartition("#")[2].rpartition(".")[2]

    def to_row(self) -> dict[str, Any]:
        """This event as a JSON object."""
        row = {name: getattr(self, name) for name in self.__slots__}  # asdict copies deeply, ten times as slow
        row["targets"] = list(self.targets)
        asked = row.pop("intervention")
        return row if asked is None else {**row, "intervention": asked.to_row()}

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Event:
        """The event that `to_row` wrote; keys of a newer engine are refused by name."""
        values = {**row, "targets": tuple(row.get("targets", ()))}
        if isinstance(label := row.get("label"), str):
            values["label"] = composed(label)
        if row.get("intervention") is not None:
            values["intervention"] = LabelIntervention.from_row(row["intervention"])
        return Event(**values)


@dataclass(frozen=True, slots=True)
class LabeledItem:
    """An item with the label that we train (or test) on. Holds nothing of the server's: no ids, no times."""

    item_id: str
    content_hash: str
    label: str
    agreement: float
    """Share of the counted annotators who gave this label."""
    answers: int
    """How many annotators' labels were counted."""
    round: int
    """The first round whose answers made it labelled; -1 for imported labels."""


@dataclass(frozen=True, slots=True)
class Unresolved:
    """An item whose answers give no label: a tie, or ignored (skipped by two people or by everybody)."""

    item_id: str
    part: Part
    kind: Literal["tie", "ignored"]
    reason: str
    asked: int
    """In how many rounds it was asked."""
