"""What a round's record and plan must look like before they are believed: they come out of git, written by anybody.

Only what others rely on is looked at; further keys, of this engine or a newer one, pass.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from al_pipeline.errors import UnexpectedChange
from al_pipeline.records import PlannedTask
from al_pipeline.rounds.interventions import parse_intervention

MAX_ROUND = 999_999
ID_CHARACTERS = 200

_Count = Annotated[int, Field(ge=0, le=10**12)]
_Number = Annotated[float, Field(ge=-1e9, le=1e9)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Moment = Annotated[float, Field(ge=0, le=2e11)]
_Text = Annotated[str, StringConstraints(max_length=10_000)]
_Word = Annotated[str, StringConstraints(pattern=r"^[a-z ]{1,40}$")]
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Counts = dict[_Text, _Count]


class _Part(BaseModel):
    # defer_build: a validator is built when it is first asked for, not for each part of a record on its own.
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, defer_build=True)


class _Estimate(_Part):
    value: _Number | None
    low: _Number | None = None
    high: _Number | None = None
    reason: _Text | None = None


class _ClassFigures(_Part):
    precision: _Estimate
    recall: _Estimate
    f1: _Estimate
    support: _Count
    predicted: _Count


class _Metrics(_Part):
    accuracy: _Estimate
    macro_f1: _Estimate
    average_precision: _Estimate
    log_loss: _Estimate
    calibration_error: _Estimate
    average_precision_of: _Text
    items: _Count
    classes: list[_Text]
    averaged: list[_Text]
    per_class: dict[_Text, _ClassFigures]
    confusion: list[list[_Count]]

    def model_post_init(self, _: Any) -> None:
        sizes = {len(self.classes), len(self.confusion), *map(len, self.confusion)}
        if len(sizes) > 1 and self.confusion:
            raise ValueError("confusion must have a row and a column for each class")


class _TaskCounts(_Part):
    answered: _Count
    given_up: _Count
    unanswered: _Count
    kept: _Count = 0
    refused: _Counts


class _Totals(_Part):
    pool: _Count
    labelled: _Count
    pending: _Count
    ignored: _Count
    unlabelled: _Count
    test: _Count
    test_labelled: _Count
    events: _Count = 0
    refused: _Count
    labels: _Counts
    test_labels: _Counts


class _Schema(_Part):
    version: Annotated[int, Field(ge=1, le=10**9)] = 1
    question: _Text
    labels: Annotated[list[_Text], Field(min_length=1)]


class _RoundParams(_Part):
    overlap: Annotated[int, Field(ge=1, le=10_000)]


class _EvaluateParams(_Part):
    confidence: Annotated[float, Field(gt=0, lt=1)]


class _Params(_Part):
    schema_: _Schema = Field(alias="schema")
    round: _RoundParams
    evaluate: _EvaluateParams
    features: dict[str, Any]
    annotators: list[_Text]


class _Engine(_Part):
    version: _Text
    sources: _Text
    packages: dict[_Text, _Text]


class _Decision(_Part):
    verdict: _Word
    reasons: list[_Text]
    provisional: bool


class _Hashes(_Part):
    __pydantic_extra__: dict[str, _Digest]  # each of them: they name files
    model: _Digest
    params: _Digest


class _Accuracy(_Part):
    first_round: _Count
    last_round: _Count
    asked: _Count
    answered: _Count
    right: _Count
    accuracy: _Share | None
    low: _Share | None
    high: _Share | None

    def model_post_init(self, _: Any) -> None:
        if self.answered and None in (self.accuracy, self.low, self.high):
            raise ValueError("accuracy, low and high must be there where something was answered")


class _Running(_Part):
    whole: _Accuracy
    recent: _Accuracy


class _Control(_Part):
    labels: _Count
    macro_f1: _Estimate


class _Choice(_Part):
    strategy: _Text
    reason: _Text


class _Genesis(_Part):
    round: Annotated[int, Field(ge=0, le=MAX_ROUND)] | None
    counts: _Totals
    hashes: _Hashes
    params: _Params
    engine: _Engine
    metrics: _Metrics
    closed_at: _Moment | None
    parent: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40,64}$")] | None
    running: _Running | None = None
    control: _Control | None = None
    next_batch: _Choice | None = None
    interventions: list[dict[str, Any]] = Field(
        default_factory=list, validation_alias=AliasChoices("interventions", "rulings")
    )


class _Round(_Genesis):
    round: Annotated[int, Field(ge=0, le=MAX_ROUND)]
    decision: _Decision
    answers: _TaskCounts


class HistogramRow(_Part):
    """How uncertain a model was of the unlabelled pool; both empty where nothing was scored."""

    edges: list[_Number] = Field(default_factory=list)
    counts: list[_Count] = Field(default_factory=list)

    def model_post_init(self, _: Any) -> None:
        if self.edges and (len(self.edges) != len(self.counts) + 1 or sorted(set(self.edges)) != self.edges):
            raise ValueError("edges must rise, and be one more than counts")


_RECORD = re.compile(r"rounds/(\d{4,6})/round\.json")
_PLAN = re.compile(r"rounds/(\d{4,6})/plan\.jsonl")
_ASKED_IN = re.compile(r":([0-9]{4}|[1-9][0-9]{4,5})\Z")
"""The round in a push key from which the item's name was taken: the one that asked it first."""
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
}

_REQUIRED = _TYPES.keys() - {"predicted", "confidence"}


def record_number(path: str) -> int | None:
    """Which round's record a file of the repository is; None where it is another file."""
    found = _RECORD.fullmatch(path)
    return int(found[1]) if found else None


def plan_number(path: str) -> int | None:
    """Which round's plan a file of the repository is; None where it is another file."""
    found = _PLAN.fullmatch(path)
    return int(found[1]) if found else None


def parse_record(text: str, path: str) -> dict[str, Any]:
    """The record in a `round.json` or `genesis.json`. Raises UnexpectedChange, naming what is wrong, unless we wrote
    it."""
    number = record_number(path)
    row = _checked(text, path, _Genesis if number is None else _Round)
    if "rulings" in row:  # as earlier versions called them
        row["interventions"] = row.pop("rulings")
    if row["round"] != number:
        raise _foreign(path, f"round: got {row['round']}, the folder says {number}")
    for intervention in row.get("interventions", ()):
        parse_intervention(intervention, path)
    return row


def parse_histogram(text: str) -> HistogramRow:
    """The histogram in `rounds/histogram.json`. Raises UnexpectedChange unless we wrote it."""
    return HistogramRow.model_validate(_checked(text, "rounds/histogram.json", HistogramRow))


def parse_plan(text: str, number: int) -> list[PlannedTask]:
    """The tasks in round `number`'s `plan.jsonl`. Raises UnexpectedChange, naming the line, unless we wrote it."""
    path = f"rounds/{number:04d}/plan.jsonl"
    return [_task(line, f"{path}:{place}", number) for place, line in enumerate(text.split("\n"), 1) if line]


def _task(line: str, place: str, number: int) -> PlannedTask:
    row = _object(line, place)
    if not _REQUIRED <= row.keys() <= _TYPES.keys():
        raise _foreign(place, f"must hold {', '.join(_TYPES)}, and nothing else")
    if wrong := [name for name in row if type(row[name]) not in _TYPES[name]]:
        raise _foreign(place, f"{wrong[0]}: got {type(row[wrong[0]]).__name__}")
    item = row["item_id"]
    if not item.isprintable() or not 1 <= len(item) <= ID_CHARACTERS:
        raise _foreign(place, "item_id: must be 1 to 200 characters that can be printed")
    asked = _ASKED_IN.search(row["push_key"].removesuffix(f":{item}"))
    named = row["push_key"].endswith(f":{item}") and asked is not None and int(asked[1]) <= number
    if row["round"] != number or not named:
        raise _foreign(place, f"round and push_key must be those of round {number} (or an earlier one) and of the item")
    if not row["push_key"].isprintable() or not row["strategy"].isprintable() or row["part"] not in ("pool", "test"):
        raise _foreign(place, "part must be pool or test; push_key and strategy must be printable")
    numbers = (row["score"], row["probability"], row.get("confidence") or 0.0)
    if not (all(map(math.isfinite, numbers)) and 0 <= row["rank"] <= 10**9):
        raise _foreign(place, "rank, score and probability must be numbers, rank a place in the plan")
    if len(row.get("predicted") or "") > ID_CHARACTERS or not 0 <= (row.get("confidence") or 0.0) <= 1:
        raise _foreign(place, "predicted must be a label, confidence a share")
    return PlannedTask(**row)


def _checked(text: str, path: str, model: type[BaseModel]) -> dict[str, Any]:
    row = _object(text, path)
    try:
        model.model_validate(row)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise _foreign(path, "is nested too deeply") from None
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(str(step) for step in first["loc"])
        raise _foreign(path, f"{key}: {first['msg']}") from None
    return row


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _foreign(place, "is no JSON") from None
    if not isinstance(row, dict):
        raise _foreign(place, "is no JSON object")
    return row


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _foreign(place: str, problem: str) -> UnexpectedChange:
    return UnexpectedChange(
        f"{place} is not as the engine writes it: {problem}. Written by hand, or by a newer engine? `git log -p` on it "
        "shows by whom, `git revert` takes that back"
    )
