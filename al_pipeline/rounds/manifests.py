"""A round's record and plan, typed. They come from git, where anybody can write; each is validated once, on reading.

A record is written from the type that reads it. Keys of a newer engine are not checked, and are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from al_pipeline.errors import UnexpectedChange
from al_pipeline.evaluation.figures import (
    Control,
    Count,
    Decision,
    Estimate,
    Metrics,
    Number,
    OnTraffic,
    Part,
    Running,
    Share,
    Text,
    Texts,
)
from al_pipeline.records import NOT_ASKED, PlannedTask, canonical, with_present_names
from al_pipeline.rounds.interventions import Intervention

MAX_ROUND = 999_999
ID_CHARACTERS = 200

_P = TypeVar("_P", bound=Part)
_RoundNumber = Annotated[int, Meta(ge=0, le=MAX_ROUND)]
_Moment = Annotated[float, Meta(ge=0, le=2e11)]
_Seconds = Annotated[float, Meta(ge=0, le=1e15)]
_Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class TaskCounts(Part, frozen=True, kw_only=True):
    """The state of a round's tasks when it closed. `kept`: those of `unanswered` that stay open in the next round."""

    tasks: Count | None = None
    answered: Count
    given_up: Count
    unanswered: Count
    kept: Count = 0
    refused: dict[Text, Count]
    """Number of refused answers, by reason."""


class Counts(Part, frozen=True, kw_only=True):
    """Items and answers as of a round; `labelled`, `pending`, `ignored` and `unlabelled` add up to `pool`."""

    pool: Count
    labelled: Count
    pending: Count
    ignored: Count
    unlabelled: Count
    ties: Count | None = None
    """Items without a label because their annotators disagree."""
    test: Count
    test_labelled: Count
    events: Count | None = None
    """Number of events in the ledger; records of layout 1 lack it."""
    refused: Count
    labels: dict[Text, Count]
    """Items of the labelled set, by class."""
    test_labels: dict[Text, Count]


class Schema(Part, frozen=True, kw_only=True):
    """What annotators were asked: the question, the classes, and the columns that a task shows."""

    version: Annotated[int, Meta(ge=1, le=10**9)] = 1
    question: Text
    labels: Annotated[Texts, Meta(min_length=1)]
    fields: Texts | None = None


class RoundParams(Part, frozen=True, kw_only=True):
    """How a round queries. `overlap`: number of annotators per item."""

    overlap: Annotated[int, Meta(ge=1, le=10_000)]


class SelectParams(Part, frozen=True, kw_only=True):
    """How batches were selected. `relabel`: the largest share of labelled items that are asked again; absent: none."""

    relabel: float | Literal["auto"] = 0.0


class EvaluateParams(Part, frozen=True, kw_only=True):
    """How intervals were computed."""

    confidence: Annotated[float, Meta(gt=0, lt=1)]
    bootstrap: Count = 1000


class LabelsParams(Part, frozen=True, kw_only=True):
    """How answers became labels; absent for the majority without confidence."""

    consensus: Literal["majority", "dawid_skene", "crowdlab", "auto"] = "majority"
    min_confidence: Annotated[float, Meta(ge=0, lt=1)] = 0.0


class Params(Part, frozen=True, kw_only=True):
    """Those parameters of a round that are read later."""

    schema_: Schema = msgspec.field(name="schema")
    round: RoundParams
    evaluate: EvaluateParams
    features: dict[str, Any]
    annotators: Texts
    labels: LabelsParams | None = None
    select: SelectParams = SelectParams()
    seed: Count = 0
    schedule: Any = None


class Engine(Part, frozen=True, kw_only=True):
    """The fingerprint of the engine that built a round."""

    version: Text
    sources: Text
    packages: dict[Text, Text]


class NextBatch(Part, frozen=True, kw_only=True):
    """The strategy that chose the next round's batch, and why that strategy."""

    strategy: Text
    reason: Text


class ReviewedPart(Part, frozen=True, kw_only=True):
    """How many labels of the labelled set (or the test set) are wrong, from a random sample that was reviewed."""

    labels: Count
    sampled: Count
    reviewed: Count
    wrong: Count
    rate: Estimate


class Reviewed(Part, frozen=True, kw_only=True):
    """What reviewers had ruled when a round was published."""

    pool: ReviewedPart
    test: ReviewedPart
    rulings: Count
    test_rulings: Count
    """Of `rulings`, those on test items."""


class Cost(Part, frozen=True, kw_only=True):
    """What people's answers have cost up to a round; times are capped. Seconds are None without any time."""

    labels: Count
    """Answers with a label, of all annotators, to pool and test set."""
    answers: Count
    """The same and skips; `timed` of them have a time."""
    timed: Count
    seconds: _Seconds | None = None
    pool_seconds: _Seconds | None = None
    """Of `seconds`, those of answers to items of the pool."""
    random_seconds: _Seconds | None = None
    """Mean seconds, of all annotators together, that a randomly drawn item of the pool took."""


class Outlook(Part, frozen=True, kw_only=True):
    """What a further round is expected to bring, by the learning curve of the published rounds."""

    metric: Text
    labels: Count
    """The number of labels after it."""
    now: Share
    value: Share
    low: Share
    high: Share
    rounds: Count
    """Number of rounds that the curve has."""
    confidence: Share

    def sentence(self) -> str:
        """The forecast in words."""
        value, low, high = (end - self.now for end in (self.value, self.low, self.high))
        return (
            f"a further round, to {self.labels:,} labels, is expected to change {self.metric} by {value:+.3f} "
            f"({self.confidence:.0%} interval {low:+.3f} to {high:+.3f}), to {self.value:.3f}"
        )


class Record(Part, frozen=True, kw_only=True):
    """What was built and published in one commit. The first build, made before any annotation, has no round number."""

    round: _RoundNumber | None
    counts: Counts
    hashes: dict[Text, _Digest]
    """SHA-256 of the round's files, by their names in `Layout`."""
    params: Params
    overrides: dict[str, Any] = msgspec.field(default_factory=dict)
    """Settings of the next round's batch that override `params`."""
    engine: Engine
    metrics: Metrics
    build: Text | None = None
    """The digest of the build's inputs."""
    project: dict[str, Any] | None = None
    """The Label Studio project, as in `Layout.project`."""
    promoted_before: Text | None = None
    """The tag of the round whose model was promoted before this one was decided on."""
    reason: str | None = None
    """Why the round was closed."""
    opened_at: _Moment | None = None
    closed_at: _Moment | None
    """Unix times in seconds."""
    seconds: dict[Text, Number] = msgspec.field(default_factory=dict)
    """Duration of each step of the build, in seconds."""
    parent: Annotated[str, Meta(pattern=r"\A[0-9a-f]{40,64}\Z")] | None
    running: Running | None = None
    control: Control | None = None
    next_batch: NextBatch | None = None
    traffic: OnTraffic | None = None
    """None without labelled test items from requests; the record then has no such key."""
    review: Reviewed | None = None
    """None before the first review; the record then has no such key."""
    cost: Cost | None = None
    outlook: Outlook | None = None
    agreement: Number | None = None
    """Cohen's kappa of this model's predictions for the test items and those of the round before. None without such.

    Without `cost`, `outlook` or `agreement` the record has no such key either.
    """
    interventions: tuple[Intervention, ...] = ()
    """The interventions about labels that this round carried out."""

    def __post_init__(self) -> None:
        if missing := {"model", "params"} - self.hashes.keys():
            raise ValueError(f"hashes: {min(missing)} is missing")

    def to_json(self) -> dict[str, Any]:
        """This record as the JSON object that is written, with unset defaults."""
        row = {**super().to_json(), "interventions": [one.to_row() for one in self.interventions]}
        rare = ("traffic", "review", "cost", "outlook", "agreement")
        later = {name for name in rare if getattr(self, name) is None}
        return {name: value for name, value in row.items() if name not in later}


class RoundRecord(Record, frozen=True, kw_only=True):
    """The record of a published round."""

    round: _RoundNumber
    decision: Decision
    answers: TaskCounts


class Histogram(Part, frozen=True, kw_only=True):
    """Histogram of the model's uncertainty about the unlabelled pool; both fields are empty if nothing was scored."""

    edges: tuple[Number, ...] = ()
    """Bin edges, strictly increasing; one more than `counts`."""
    counts: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        if self.edges and (len(self.edges) != len(self.counts) + 1 or tuple(sorted(set(self.edges))) != self.edges):
            raise ValueError("edges must rise, and be one more than counts")


class LiveQuestion(Struct, frozen=True, forbid_unknown_fields=True):
    """One row of a round's live plan: a task, what asked it, and what that knew."""

    task: PlannedTask
    kind: Literal["planned", "chosen", "random"]
    """planned: a task of the round's batch; chosen: by the live model's score; random: of the random share."""
    model: Annotated[str, Meta(pattern=r"\A(?:[0-9a-f]{16})?\Z")]
    """The digest of the model that asked it; empty for `planned`."""
    events: Count
    """The number of events, of ledger and inbox, that this model knew: the first ones."""
    known: Annotated[str, Meta(pattern=r"\A(?:[0-9a-f]{16})?\Z")]
    """A digest of the ids of these events."""
    asked_at: _Moment

    def to_line(self) -> str:
        """This question as a line of `live.jsonl`, with its end."""
        row = {name: getattr(self, name) for name in ("kind", "model", "events", "known", "asked_at")}
        return canonical({"task": self.task.to_row(), **row}) + "\n"


_RECORD = re.compile(r"rounds/(\d{4,6})/round\.json")
_PLAN = re.compile(r"rounds/(\d{4,6})/plan\.jsonl")
_LIVE = re.compile(r"rounds/(\d{4,6})/live\.jsonl")
_ASKED_IN = re.compile(r":([0-9]{4}|[1-9][0-9]{4,5})\Z")
"""Matches the round in a push key stripped of its item id: the round in which the item was first queried."""
_TYPES: Mapping[str, tuple[type, ...]] = {
    "push_key": (str,),
    "item_id": (str,),
    "content_hash": (str,),
    "part": (str,),
    "round": (int,),
    "rank": (int,),
    "score": (float, int),
    "strategy": (str,),
    "probability": (float, int),
    "predicted": (str, type(None)),
    "confidence": (float, type(None)),
    "proba": (list,),
}

_TASK = msgspec.json.Decoder(PlannedTask)
_LIVE_ROW = msgspec.json.Decoder(LiveQuestion)
_REQUIRED = _TYPES.keys() - {"predicted", "confidence", "proba"}


def record_number(path: str) -> int | None:
    """The number of the round whose record a repository file is; None if it is another file."""
    found = _RECORD.fullmatch(path)
    return int(found[1]) if found else None


def plan_number(path: str) -> int | None:
    """The number of the round whose plan a repository file is; None if it is another file."""
    found = _PLAN.fullmatch(path)
    return int(found[1]) if found else None


def live_number(path: str) -> int | None:
    """The number of the round whose live plan a repository file is; None if it is another file."""
    found = _LIVE.fullmatch(path)
    return int(found[1]) if found else None


def parse_genesis(text: str, path: str) -> Record:
    """Parse the record of the first build, in `genesis.json`.

    Raises UnexpectedChange, naming what is wrong, if the engine cannot have written it.
    """
    record = _parsed(text, path, Record)
    if record.round is not None:
        raise _foreign(path, f"round: got {record.round}, but the first build has none")
    return record


@lru_cache(maxsize=4096)
def parse_record(text: str, path: str) -> RoundRecord:
    """Parse a `round.json`. Raises UnexpectedChange, naming what is wrong, if the engine cannot have written it."""
    record = _parsed(text, path, RoundRecord)
    if record.round != (number := record_number(path)):
        raise _foreign(path, f"round: got {record.round}, but the folder is that of {number}")
    return record


def parse_histogram(text: str) -> Histogram:
    """Parse `rounds/histogram.json`. Raises UnexpectedChange if the engine cannot have written it."""
    return _parsed(text, "rounds/histogram.json", Histogram)


def parse_plan(text: str, number: int) -> list[PlannedTask]:
    """Parse round `number`'s `plan.jsonl`. Raises UnexpectedChange, naming the line, if the engine did not write it."""
    return list(_plan(text, number))


@lru_cache(maxsize=4096)
def _plan(text: str, number: int) -> tuple[PlannedTask, ...]:
    """The tasks of a plan, parsed once: a published plan never changes, and a tick reads all of them several times."""
    path = f"rounds/{number:04d}/plan.jsonl"
    return tuple(_task(line, f"{path}:{place}", number) for place, line in enumerate(text.split("\n"), 1) if line)


@lru_cache(maxsize=4)
def parse_live(text: str, number: int) -> tuple[LiveQuestion, ...]:
    """Parse round `number`'s `live.jsonl`. Raises UnexpectedChange, naming the line, if the engine did not write it.

    A last line without its end is left out: the process that wrote it was killed, before it asked the question.
    """
    path, found, keys = f"rounds/{number:04d}/live.jsonl", [], set()
    for place, line in enumerate(text[: text.rfind("\n") + 1].split("\n"), 1):
        if not line:
            continue
        try:
            question = _LIVE_ROW.decode(line)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise _foreign(f"{path}:{place}", str(error)) from None
        task = _checked(question.task, f"{path}:{place}", number)
        if task.push_key in keys:
            raise _foreign(f"{path}:{place}", "the task is asked twice")
        keys.add(task.push_key)
        found.append(question)
    return tuple(found)


def tasks_of_live(plan: Sequence[PlannedTask], asked: Sequence[LiveQuestion]) -> tuple[PlannedTask, ...]:
    """All tasks of a live round: those of its batch that were not asked, marked so, then those asked."""
    keys = {question.task.push_key for question in asked}
    left = (replace(task, strategy=NOT_ASKED) for task in plan if task.push_key not in keys)
    return (*left, *(question.task for question in asked))


def _task(line: str, place: str, number: int) -> PlannedTask:
    try:
        task = _TASK.decode(line)
    except (msgspec.DecodeError, ValueError, RecursionError):
        row = _object(line, place)
        if not _REQUIRED <= row.keys() <= _TYPES.keys():
            raise _foreign(place, f"must contain {', '.join(_TYPES)}, and nothing else") from None
        wrong = [name for name in row if type(row[name]) not in _TYPES[name]] or ["part"]
        wrong = ["proba"] if wrong == ["part"] and row["part"] in ("pool", "test") else wrong
        found = row["part"] if wrong == ["part"] else type(row[wrong[0]]).__name__
        raise _foreign(place, f"{wrong[0]}: got {found}") from None
    return _checked(task, place, number)


def _checked(task: PlannedTask, place: str, number: int) -> PlannedTask:
    """`task`, if it can be one of round `number`. Raises UnexpectedChange, naming the `place`, if not."""
    item, key = task.item_id, task.push_key
    if not item.isprintable() or not 1 <= len(item) <= ID_CHARACTERS:
        raise _foreign(place, "item_id: must be 1 to 200 printable characters")
    asked = _ASKED_IN.search(key.removesuffix(f":{item}"))
    named = key.endswith(f":{item}") and asked is not None and int(asked[1]) <= number
    if task.round != number or not named:
        raise _foreign(place, f"round and push_key must be those of round {number} (or an earlier one) and of the item")
    if not key.isprintable() or not task.strategy.isprintable():
        raise _foreign(place, "push_key and strategy must be printable")
    if not 0 <= task.rank <= 10**9:
        raise _foreign(place, "rank must be a place in the plan")
    if len(task.predicted or "") > ID_CHARACTERS or not 0 <= (task.confidence or 0.0) <= 1:
        raise _foreign(place, "predicted must be a label, and confidence between 0 and 1")
    if any(len(name) > ID_CHARACTERS or not 0 <= share <= 1 for name, share in task.proba):
        raise _foreign(place, "proba must be labels with probabilities between 0 and 1")
    return task


def _parsed(text: str, path: str, kind: type[_P]) -> _P:
    row = with_present_names(_object(text, path))
    try:
        return kind.from_row(row)
    except RecursionError:
        raise _foreign(path, "is nested too deeply") from None
    except ValueError as error:
        raise _foreign(path, str(error)) from None


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _foreign(place, "is not JSON") from None
    if not isinstance(row, dict):
        raise _foreign(place, "is not a JSON object")
    return row


def _foreign(place: str, problem: str) -> UnexpectedChange:
    return UnexpectedChange(
        f"{place} is not a valid record: {problem}. Was it edited by hand, or written by a newer engine? `git log -p` "
        "shows by whom, and `git revert` undoes the commit"
    )
