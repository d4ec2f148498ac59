"""Metrics of a model and the decision on it, as stored in a round's record.

Each part of a record is validated once, on reading; keys that a newer engine added are kept.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from al_pipeline.validation import first_problem

FIGURES = ("accuracy", "macro_f1", "average_precision", "log_loss", "calibration_error")
"""The metrics of a whole test set, each an `Estimate` of `Metrics`."""

Count = Annotated[int, Meta(ge=0, le=10**12)]
Number = Annotated[float, Meta(ge=-1e9, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]
Text = Annotated[str, Meta(max_length=10_000)]
Texts = tuple[Text, ...]
Word = Annotated[str, Meta(pattern=r"\A[a-z ]{1,40}\Z")]


class Part(msgspec.Struct, frozen=True, dict=True):
    """An immutable part of a record. It keeps the JSON object that it was read from, with keys of a newer engine."""

    @classmethod
    def from_row(cls, row: Any) -> Self:
        """The part that a JSON object holds. Raises ValueError naming the first wrong key."""
        try:
            part = msgspec.convert(row, cls)
        except msgspec.ValidationError as error:
            raise ValueError(first_problem(cls, row) or str(error)) from None
        part._keep(row)
        return part

    def to_row(self) -> dict[str, Any]:
        """The JSON object that this part was read from, else that of `to_json`; keys sorted."""
        row: dict[str, Any] = _in_order(self.__dict__.get("row", self.to_json()))
        return row

    def to_json(self) -> dict[str, Any]:
        """This part as a JSON object with unset defaults, and with the unknown keys that it was read with."""
        own = {
            key: _plain(getattr(self, name))
            for name, key in zip(self.__struct_fields__, self.__struct_encode_fields__, strict=True)
        }
        return {**self.__dict__.get("row", {}), **own}

    def _keep(self, row: dict[str, Any]) -> None:
        self.__dict__["row"] = row
        for name, key in zip(self.__struct_fields__, self.__struct_encode_fields__, strict=True):
            value = getattr(self, name)
            if isinstance(value, Part) and key in row:
                value._keep(row[key])
            elif isinstance(value, dict):
                for inner, one in value.items():
                    if isinstance(one, Part):
                        one._keep(row[key][inner])


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(one) for one in value] if isinstance(value, list) else value


class Estimate(Part, frozen=True, kw_only=True):
    """A metric with its interval. `value` is None if it is undefined, with the reason."""

    value: Number | None
    low: Number | None = None
    high: Number | None = None
    reason: Text | None = None


class ClassMetrics(Part, frozen=True, kw_only=True):
    """Metrics of one class against the rest. `support`: its test items; `predicted`: items predicted as this class."""

    support: Count
    predicted: Count
    precision: Estimate
    recall: Estimate
    f1: Estimate


class Metrics(Part, frozen=True, kw_only=True):
    """Metrics of one model on one test set."""

    items: Count
    bootstrap: Count | None = None
    confidence: Share | None = None
    classes: Texts
    averaged: Texts
    """The classes over which macro metrics average: those present in the truth."""
    accuracy: Estimate
    macro_f1: Estimate
    average_precision: Estimate
    average_precision_of: Text
    """The class of `average_precision`, or `macro`: the mean over `averaged`, each class against the rest."""
    log_loss: Estimate
    calibration_error: Estimate
    per_class: dict[Text, ClassMetrics]
    """A mapping by class, so that `dvc metrics diff` shows the classes' names."""
    confusion: tuple[tuple[Count, ...], ...]
    """Rows: true class; columns: predicted class; both in the order of `classes`."""

    def __post_init__(self) -> None:
        sizes = {len(self.classes), len(self.confusion), *map(len, self.confusion)}
        if len(sizes) > 1 and self.confusion:
            raise ValueError("confusion must have a row and a column for each class")

    def figure(self, name: str) -> Estimate:
        """The metric of `FIGURES` with this name."""
        found: Estimate = getattr(self, name)
        return found

    def to_table(self) -> list[dict[str, Any]]:
        """One flat row per metric: `metric`, `label` (empty for all classes), `value`, `low`, `high`, `reason`."""
        figures = [(name, "", self.figure(name)) for name in FIGURES]
        for label, one in self.per_class.items():
            figures += [("precision", label, one.precision), ("recall", label, one.recall), ("f1", label, one.f1)]
        return [
            {"metric": name, "label": label, **msgspec.structs.asdict(estimate)} for name, label, estimate in figures
        ]


class Control(Part, frozen=True, kw_only=True):
    """The same classifier on the random labels alone, measured on the same test set."""

    labels: Count
    macro_f1: Estimate


class OnTraffic(Part, frozen=True, kw_only=True):
    """The model on the test items that were drawn from requests to a served model."""

    metrics: Metrics
    """Each text counts once, however often it was asked."""
    accuracy_of_requests: Estimate
    """The accuracy over requests: each text counts as often as it is expected to be asked. With Wilson's interval, for
    the number of equally weighted items that are as informative."""

    def sentence(self) -> str:
        """The figures in words."""
        one, f1 = self.accuracy_of_requests, self.metrics.macro_f1.value
        if one.value is None or one.low is None or one.high is None:
            return f"{self.metrics.items:,} labelled test items are from requests"
        score = "" if f1 is None else f"; macro-F1 {f1:.3f} with each text once"
        return (
            f"{one.value:.3f} ({one.low:.3f}–{one.high:.3f}) of the requests answered correctly, by "
            f"{self.metrics.items:,} test items from requests{score}"
        )


class Accuracy(Part, frozen=True, kw_only=True):
    """Of `asked` items, `answered` have a label; `right` of these equal the prediction. With Wilson's interval."""

    first_round: Count
    last_round: Count
    asked: Count
    answered: Count
    right: Count
    accuracy: Share | None
    low: Share | None
    high: Share | None

    def __post_init__(self) -> None:
        if self.answered and None in (self.accuracy, self.low, self.high):
            raise ValueError("accuracy, low and high are required if anything was answered")


class Running(Part, frozen=True, kw_only=True):
    """The running accuracy over all rounds (`whole`) and over the newest ones (`recent`)."""

    whole: Accuracy
    recent: Accuracy


class Decision(Part, frozen=True, kw_only=True):
    """The decision on the new model, with the reasons as sentences.

    `difference`: macro F1 of the challenger minus the champion's; `low` and `high`: its paired interval. None if the
    models were not compared.
    """

    verdict: Word
    """`promoted`, `refused` or `held`; a newer engine may write another."""
    provisional: bool
    reasons: Texts
    difference: Number | None = None
    low: Number | None = None
    high: Number | None = None
