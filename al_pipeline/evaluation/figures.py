"""Metrics of a model and the decision on it, as stored in a round's record.

Each part of a record is validated once, on reading; keys that a newer engine added are kept.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints

FIGURES = ("accuracy", "macro_f1", "average_precision", "log_loss", "calibration_error")
"""The metrics of a whole test set, each an `Estimate` of `Metrics`."""

Count = Annotated[int, Field(ge=0, le=10**12)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
Texts = Annotated[tuple[Text, ...], Strict(False)]  # JSON has lists
Word = Annotated[str, StringConstraints(pattern=r"^[a-z ]{1,40}$")]


class Part(BaseModel):
    """A validated, immutable part of a record. Unknown keys of its JSON object are kept."""

    # defer_build: build each validator on first use, not for every part of a record at import
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, defer_build=True, frozen=True)

    def to_row(self) -> dict[str, Any]:
        """This part as a JSON object without unset defaults, keys sorted."""
        row: dict[str, Any] = _in_order(self.model_dump(mode="json", by_alias=True, exclude_unset=True))
        return row


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(one) for one in value] if isinstance(value, list) else value


class Estimate(Part):
    """A metric with its interval. `value` is None if it is undefined, with the reason."""

    value: Number | None
    low: Number | None = None
    high: Number | None = None
    reason: Text | None = None


class ClassMetrics(Part):
    """Metrics of one class against the rest. `support`: its test items; `predicted`: items predicted as this class."""

    support: Count
    predicted: Count
    precision: Estimate
    recall: Estimate
    f1: Estimate


class Metrics(Part):
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
    confusion: Annotated[tuple[Annotated[tuple[Count, ...], Strict(False)], ...], Strict(False)]
    """Rows: true class; columns: predicted class; both in the order of `classes`."""

    def model_post_init(self, _: Any) -> None:
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
        return [{"metric": name, "label": label, **estimate.model_dump()} for name, label, estimate in figures]


class Control(Part):
    """The same classifier on the random labels alone, measured on the same test set."""

    labels: Count
    macro_f1: Estimate


class Accuracy(Part):
    """Of `asked` items, `answered` have a label; `right` of these equal the prediction. With Wilson's interval."""

    first_round: Count
    last_round: Count
    asked: Count
    answered: Count
    right: Count
    accuracy: Share | None
    low: Share | None
    high: Share | None

    def model_post_init(self, _: Any) -> None:
        if self.answered and None in (self.accuracy, self.low, self.high):
            raise ValueError("accuracy, low and high are required if anything was answered")


class Running(Part):
    """The running accuracy over all rounds (`whole`) and over the newest ones (`recent`)."""

    whole: Accuracy
    recent: Accuracy


class Decision(Part):
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
