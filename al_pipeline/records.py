"""The product's terms as frozen records. CONTRIBUTING.md says what each is, where it is stored and who writes it."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import asdict

Part = Literal["pool", "test"]
"""The disjoint set that an item belongs to: the pool, which queries come from, or the test set."""

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
    "schema",
    "import",
    "correct",
]

RANDOM = "random"
"""The strategy that samples the whole batch uniformly."""
RANDOM_SLICE = "random_slice"
"""The strategy of the unbiased part of each batch: a uniform sample of all candidates."""
RELABEL = "relabel"
"""The strategy of an item that has a label and is asked again."""

NOT_ASKED = "not_asked"
"""The strategy of a task of a batch that was never asked, since its round was live and asked others instead."""

CPU = "cpu"
"""The device of what was not computed on a GPU, see `features/device.py`."""

LARGEST_NUMBER = 10**9
"""Upper bound on an event's round and lead time in seconds; larger values are corrupt."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")

_REVIEW = ".review"

INTERVENTION_FILE = r"rounds/(?:interventions|rulings)/(\d{6})\.json"
"""A pattern of the names of interventions' files. Earlier versions called them rulings; their files stay there."""


def with_present_names(row: dict[str, Any]) -> dict[str, Any]:
    """A record's fields under their present names: earlier versions called interventions rulings."""
    if "rulings" not in row or "interventions" in row:
        return row
    return {"interventions" if name == "rulings" else name: value for name, value in row.items()}


def content_hash(text: str) -> str:
    """SHA-256 (hex) of the stripped text in Unicode's NFC form; texts with the same hash are the same item."""
    return hashlib.sha256(unicodedata.normalize("NFC", text).strip().encode("utf-8", "surrogatepass")).hexdigest()


def composed(text: str) -> str:
    """The text in Unicode's NFC form, in which class names are compared: an é can be one character or two."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def shown_text(text: str) -> str:
    """The text as annotators see it: control characters (NUL breaks PostgreSQL) and lone surrogates become blanks."""
    return _CONTROL.sub(" ", text)


def push_key(workspace_id: str, round_number: int, item_id: str) -> str:
    """The permanent name of one task: `workspace:round:item_id`."""
    return f"{workspace_id}:{round_number:04d}:{item_id}"


def review_workspace(workspace_id: str) -> str:
    """The mark of a workspace's review project in Label Studio, with which the push keys of its tasks begin."""
    return f"{workspace_id}{_REVIEW}"


def is_of_review(key: str) -> bool:
    """Whether a push key, or an annotation key, is that of a task of a review: `workspace.review:number:item_id`."""
    return key.partition(":")[0].endswith(_REVIEW)


def round_name(number: int) -> str:
    """`7` -> `round-0007`: the tag of a published round."""
    return f"round-{number:04d}"


def event_digest(*facts: Any) -> str:
    """SHA-256 (hex) of an event's content, which is its id. Must not include when we observed it."""
    return hashlib.sha256(canonical(list(facts)).encode("ascii")).hexdigest()


def author_digest(annotator: str, created_at: str | None) -> str:
    """A digest of annotator and creation time, which distinguishes answers that had the same id on the server."""
    return event_digest(annotator, created_at)[:12]


def canonical(value: Any) -> str:
    """`value` as JSON text with sorted keys, in ASCII: equal values give equal text, and any text can be written."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    except RecursionError:
        return '"nested too deeply"'


def _without_empty(row: dict[str, Any], name: str) -> dict[str, Any]:
    if not row[name]:
        del row[name]
    return row


class Item(Struct, frozen=True):
    """One thing that can be labelled."""

    item_id: str
    content_hash: str
    text: str
    metadata: str = "{}"
    """The user's other columns, as one JSON object."""


class Query(Struct, frozen=True):
    """One item that the model asks about. `score`: higher = ask sooner. `probability`: of being selected.

    `predicted`, `confidence`: the prediction of the model that selected it; None if no model is trained yet. `proba`:
    see `PlannedTask`.
    """

    item_id: str
    rank: int
    score: float
    strategy: str
    probability: float
    predicted: str | None = None
    confidence: float | None = None
    proba: tuple[tuple[str, float], ...] = ()

    def to_row(self) -> dict[str, Any]:
        """This query as a JSON object, without `proba` if it has none."""
        return _without_empty(asdict(self), "proba")


class PlannedTask(Struct, frozen=True, forbid_unknown_fields=True):
    """One row of a round's plan: a query, or an item of the test set, as it will be pushed.

    `push_key` names the round that asked it first: a task that is carried over to the next round keeps its key.
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
    """The prediction of the model that selected it; never shown with the task; None for test items."""
    confidence: float | None = None
    proba: tuple[tuple[str, float], ...] = ()
    """Classes with their probabilities, by that model; the rest of the probability falls evenly on all others.

    Empty if `labels.consensus` does not use them; `predicted` and `confidence` then say as much of two classes.
    """

    def to_row(self) -> dict[str, Any]:
        """This task as a JSON object, without `proba` if it has none."""
        return _without_empty(asdict(self), "proba")

    @property
    def forecast(self) -> dict[str, float]:
        """Classes with their probabilities, as `proba`; empty if no model was trained yet."""
        if self.proba:
            return dict(self.proba)
        return {} if self.predicted is None or self.confidence is None else {self.predicted: self.confidence}

    @property
    def first_round(self) -> int:
        """The round that asked it first; earlier than `round` if an intervention closed that one and it was kept."""
        return int(self.push_key.removesuffix(f":{self.item_id}").rpartition(":")[2])


class ModelForecast(Struct, frozen=True):
    """What a model said of an item when it chose it, before anybody answered, in the classes of that time."""

    proba: Mapping[str, float]
    """Classes with their probabilities, as `PlannedTask.forecast`."""
    known: int | None = None
    """How many events of the ledger there were when the model was trained; None in rows of earlier versions."""


class Task(Struct, frozen=True):
    """A planned task with what annotators will see: `fields` maps a column's name to its (sanitised) text."""

    plan: PlannedTask
    fields: Mapping[str, str]
    guess: tuple[str, float] | None = None
    """The model's label and its probability, if annotators may see it."""
    place: int | None = None
    """Its place among the questions of a live round, of which the newest is served first; None in other rounds."""
    answers: Mapping[str, str] | None = None
    """For a reviewer: the answers of others, as rows of a table."""


class TaskState(Struct, frozen=True):
    """The state of one task in Label Studio, without its answers."""

    task_id: int
    push_key: str | None
    round: int | None
    part: Part | None
    is_labeled: bool
    annotations: int
    cancelled: int


class Annotation(Struct, frozen=True):
    """One person's annotation of one task, as Label Studio holds it now."""

    annotation_id: int
    annotator: str
    """E-mail address in lower case, or `user:<id>` if the server does not give one."""
    result: tuple[Mapping[str, Any], ...]
    was_cancelled: bool
    created_at: str
    updated_at: str
    lead_time: float | None


class AnsweredTask(Struct, frozen=True):
    """One task with all its annotations; `data` as Label Studio holds it now (people can edit it there)."""

    task_id: int
    push_key: str | None
    updated_at: str
    data: Mapping[str, Any]
    annotations: tuple[Annotation, ...]
    created_at: str = ""
    """When this copy of the task was created: an older answer belongs to another, deleted copy."""
    prelabel_shown: bool = False
    """Whether annotators see the model's guess."""
    answers: int = 0
    """Its number of answers without skips, as Label Studio counts them."""


class TaskVersion(Struct, frozen=True):
    """What tells whether a task or its answers changed since they were read: every change by people changes it."""

    created_at: str
    updated_at: str
    answers: int
    """Without skips."""


class TaskTotals(Struct, frozen=True):
    """Totals of a number of tasks in Label Studio."""

    tasks: int
    answers: int
    """Without skips."""
    newest: str | None
    """When the one that was changed last was changed; None without tasks."""


RefusalReason = Literal[
    "task not ours", "changed text", "annotator not allowed", "malformed", "empty result", "wrong from_name",
    "several choices", "unknown label",
]  # fmt: skip
"""Why an answer was refused."""


class Answer(Struct, frozen=True):
    """The checked content of an annotation; a skip has no label."""

    label: str | None
    origin: str | None
    """Whether the annotator made it or accepted the model's guess; None if Label Studio does not say."""
    comment: str | None = None
    """What a reviewer wrote about it."""


class Selection(Struct, frozen=True, forbid_unknown_fields=True):
    """The answers that a revocation or restoration selects: those that meet all given conditions."""

    annotator: str | None = None
    round: int | None = None
    item: str | None = None
    since: str | None = None
    """ISO 8601 with a zone: answers given or changed at that time or later."""
    label: str | None = None
    """The answer's present label."""

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
        """Whether `event` meets the conditions; an event without a time never meets `since`, nor a ruling `round`."""
        if self.annotator is not None and event.annotator != self.annotator:
            return False
        if self.round is not None and (event.round != self.round or is_of_review(event.annotation_key)):
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
    """Parse an ISO 8601 time; without a zone it is UTC. Raises ValueError."""
    found = datetime.fromisoformat(stamp)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


ClassName = Annotated[str, Meta(min_length=1, max_length=100)]


class ClassChange(Struct, frozen=True, forbid_unknown_fields=True):
    """A change of the list of classes: `old` classes leave it, and `new` ones take their place.

    A class in both stays, as the target of a merge does; a `new` one in `before` was a class already.
    """

    kind: Literal["rename", "merge", "split", "retire", "add"]
    before: Annotated[tuple[ClassName, ...], Meta(min_length=1, max_length=1000)]
    """All classes before the change, in order."""
    old: Annotated[tuple[ClassName, ...], Meta(max_length=1000)] = ()
    new: Annotated[tuple[ClassName, ...], Meta(max_length=1000)] = ()
    again: bool = False
    """retire: the items of the class are asked again, not ignored."""

    def __post_init__(self) -> None:
        sizes = {
            "rename": len(self.old) == len(self.new) == 1,
            "merge": len(self.old) > 1 and len(self.new) == 1,
            "split": len(self.old) == 1 and len(self.new) > 1,
            "retire": len(self.old) == 1 and not self.new,
            "add": not self.old and len(self.new) == 1,
        }
        if not sizes[self.kind]:
            raise ValueError(f"a change of kind {self.kind} has other numbers of old and new classes")
        if not set(self.old) <= set(self.before):
            raise ValueError("a class that leaves is none of those before")
        if len({*self.before}) < len(self.before) or len({*self.new}) < len(self.new):
            raise ValueError("a class is listed twice")

    def sentence(self) -> str:
        """What was done, in a few words."""
        old, new = (" and ".join(map(repr, names)) for names in (self.old, self.new))
        return {
            "rename": f"renamed the class {old} to {new}",
            "merge": f"merged the classes {old} into {new}",
            "split": f"split the class {old} into {new}",
            "retire": f"retired the class {old}",
            "add": f"added the class {new}",
        }[self.kind]

    def to_row(self) -> dict[str, Any]:
        """This change as a JSON object."""
        row = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return row if self.again else {name: value for name, value in row.items() if name != "again"}


class LabelIntervention(Struct, frozen=True, forbid_unknown_fields=True):
    """An intervention on labels, as the ledger holds it.

    It lists no events that it affects: those are derived at each fold, from its place in the ledger and the other
    interventions in force (see `annotation.active_events`). A `hold` does, in its event's `targets`, since a setting
    made it and no person's request; whether it is in force is derived, from gold.
    """

    kind: Literal["rollback", "undo", "revoke", "restore", "schema", "hold"]
    to: int | None = None
    """rollback: the round whose snapshot is restored. Rounds after it, up to the event's own, are abandoned."""
    after: str | None = None
    """rollback: the id of the last event in the snapshot's ledger; None if it had none."""
    undoes: int | None = None
    """undo: the number of the intervention that is undone."""
    selection: Selection | None = None
    """revoke, restore: the answers concerned."""
    change: ClassChange | None = None
    """schema: how the list of classes changes."""
    bound: float | None = None
    """hold: the share of right answers to gold that the annotator was below."""
    gold: tuple[str, ...] = ()
    """hold: the ids of the annotator's answers to gold, by which that was found."""

    def to_row(self) -> dict[str, Any]:
        """This intervention as a JSON object, without keys whose value is None."""
        row = {name: value for name, value in asdict(self).items() if value is not None}
        del row["gold"]
        if self.gold:
            row["gold"] = list(self.gold)
        if self.change is not None:
            row["change"] = self.change.to_row()
        if self.selection is not None:
            row["selection"] = {name: value for name, value in asdict(self.selection).items() if value is not None}
        return row

    def __post_init__(self) -> None:
        needed = {
            "rollback": self.to,
            "undo": self.undoes,
            "revoke": self.selection,
            "restore": self.selection,
            "schema": self.change,
            "hold": self.bound,
        }
        if needed[self.kind] is None:
            raise ValueError("the value that its kind requires is missing")
        if self.selection is not None and self.selection.since is not None:
            moment(self.selection.since)


class Event(Struct, frozen=True, forbid_unknown_fields=True):
    """One observed fact about an answer; never edited.

    `annotation_key` names the annotation concerned (see `annotation.changes.annotation_key`), or is
    `import:<content hash>`; for `task_gone` the push key, for quarantine, restore and schema `ruling:<number>`.
    A `supersede` without a label means that the annotator changed the answer to a skip. A `label` or `skip` whose
    `previous` is a `delete` reappeared after it had vanished. An `adjudicate` is a reviewer's ruling, its `reason` the
    comment; one without a label is a review without a ruling.
    A quarantine, restore or schema holds the person's request in `intervention`. Quarantines and restores of earlier
    versions list the ids of the affected events in `targets` instead; a hold lists those that it keeps out while it is
    in force. `targets` of a `task_gone`: the answers that its
    task had.
    A `correct` says which text a user's id stands for now: its item is that text's, `targets` are the items of all
    other texts that the id had, and `annotation_key` is `correction:<the user's id>`; the newest one counts.
    """

    event_id: str
    type: EventType
    item_id: str
    content_hash: str
    part: Part
    round: Annotated[int, Meta(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
    annotation_key: str
    annotator: str
    label: str | None = None
    schema_version: int = 1
    reason: str | None = None
    targets: tuple[str, ...] = ()
    previous: str | None = None
    lead_time: (
        Annotated[int, Meta(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
        | Annotated[float, Meta(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
        | None
    ) = None
    origin: str | None = None
    created_at: str | None = None
    updated_at: str | None = None
    observed_at: str | None = None
    prelabel_shown: bool = False
    intervention: LabelIntervention | None = None

    @property
    def push_key(self) -> str:
        """The push key of the task whose annotation is concerned; empty if there is none."""
        return self.annotation_key.rpartition("#")[0]

    @property
    def answer_name(self) -> str:
        """The annotation's name within its task: its id on the server, and the digest of its author.

        Earlier versions wrote only the id.
        """
        return self.annotation_key.rpartition("#")[2].rpartition(".")[2]

    def to_row(self) -> dict[str, Any]:
        """This event as a JSON object."""
        row = asdict(self)
        row["targets"] = list(self.targets)
        asked = row.pop("intervention")
        return row if asked is None else {**row, "intervention": asked.to_row()}


class LabeledItem(Struct, frozen=True):
    """An item with the label that we train or test on. Holds no ids or times of the server."""

    item_id: str
    content_hash: str
    label: str
    agreement: float
    """Share of the counted annotators who gave this label."""
    answers: int
    """The number of annotators whose labels were counted."""
    round: int
    """The first round whose answers made it labelled; -1 for imported labels."""
    confidence: float | None = None
    """Probability that the label is right; None if `labels` in `params.yaml` does not ask for it."""


class Unresolved(Struct, frozen=True):
    """An item whose answers give no label.

    A tie; ignored (skipped by two people or by everybody, or of a retired class); or to be asked again, since the
    class that it had was changed (`again`).
    """

    item_id: str
    part: Part
    kind: Literal["tie", "ignored", "again"]
    reason: str
    asked: int
    """The number of rounds in which it was asked."""
