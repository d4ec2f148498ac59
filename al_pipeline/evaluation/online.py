"""Prequential accuracy: the model's accuracy on the random slice of each batch, before it was trained on it.

The slice is a simple random sample of the unlabelled items, and the model that chose the batch was not trained on its
labels: the estimate is unbiased and needs no test set (prequential evaluation, Dawid 1984). It averages over a sequence
of models, each trained on more labels; `recent` covers only the newest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

from al_pipeline.evaluation.figures import Accuracy, Control, Estimate, Running

RECENT = 100
"""Minimum number of answered items in `recent`, which consists of complete rounds."""


class Forecast(Struct, frozen=True):
    """An item of a random slice: its round, the model's prediction before labelling, and the label."""

    round: int
    predicted: str
    label: str | None
    """None if nobody answered, or if the annotations give no label."""


class Saved(Struct, frozen=True):
    """The score of a model trained on the random labels alone, and how many labels the rounds needed to reach it."""

    random_labels: int
    macro_f1: float
    """Score of the control: the same classifier trained on the random labels alone."""
    labels: int | None
    """Number of labels in the first round with at least that score; None if no round has it."""
    at_most: bool
    """Whether the first round already reached it, so that fewer labels may have sufficed."""
    random_hours: float | None = None
    """Hours of answering that the random labels took; None if no answer has a time."""
    hours: float | None = None
    """Hours that the rounds' `labels` took."""
    relabels: bool = False
    """Whether labels were asked again in these rounds: further answers, which `labels` does not count."""

    def sentence(self) -> str:
        """A sentence for the report."""
        took = "" if self.random_hours is None else f" ({_hours(self.random_hours)})"
        reached = f"{self.random_labels} random labels{took} alone reach macro-F1 {self.macro_f1:.3f}"
        if self.labels is None:
            return f"{reached}; no round is as good yet"
        if self.at_most and self.labels >= self.random_labels:  # the first round's size would look like a loss
            return f"{reached}: too few to tell what the rounds saved"
        took = "" if self.hours is None else f" ({_hours(self.hours)})"
        further = ", without the answers to labels that were asked again" if self.relabels else ""
        labels = f"{'at most ' if self.at_most else ''}{self.labels}{took}"
        return f"{reached}; the rounds were as good with {labels}{further}"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def labels_saved(
    rounds: Sequence[tuple[int, float | None]],
    control: Control | None,
    seconds: Sequence[float | None] | None = None,
    random_seconds: float | None = None,
    relabels: bool = False,
) -> Saved | None:
    """The number of labels with which the rounds reached the control's score; None if the control has none.

    `rounds`: labels and macro-F1 of each round, oldest first; `control`: that of the newest round. Both were measured
    on the same test set. Nothing is interpolated or extrapolated. `seconds`: what the labels of each round and those
    before took; `random_seconds`: what a random label takes; `relabels`: whether labels were asked again.
    """
    target = None if control is None else control.macro_f1.value
    if control is None or target is None:
        return None
    there = next((number for number, (_, score) in enumerate(rounds) if score is not None and score >= target), None)
    labels = None if there is None else rounds[there][0]
    took = None if there is None or seconds is None else seconds[there]
    random_hours = None if random_seconds is None or took is None else random_seconds * control.labels / 3600
    hours = None if random_hours is None or took is None else took / 3600
    return Saved(control.labels, target, labels, there == 0, random_hours, hours, relabels)


def running_accuracy(forecasts: Sequence[Forecast], confidence: float = 0.95) -> Running | None:
    """The running accuracy; None if no slice has been predicted yet.

    Unanswered items do not enter the accuracy but are counted in `asked`: if they are many, the estimate may be biased,
    since people may skip hard items.
    """
    if not forecasts:
        return None
    rounds = sorted({one.round for one in forecasts}, reverse=True)
    newest: list[Forecast] = []
    for number in rounds:
        newest += [one for one in forecasts if one.round == number]
        if sum(one.label is not None for one in newest) >= RECENT:
            break
    return Running(whole=_accuracy(forecasts, confidence), recent=_accuracy(newest, confidence))


def _accuracy(forecasts: Sequence[Forecast], confidence: float) -> Accuracy:
    numbers = [one.round for one in forecasts]
    answered = [one for one in forecasts if one.label is not None]
    right = sum(one.predicted == one.label for one in answered)
    low, high = wilson(right, len(answered), confidence)
    value = right / len(answered) if answered else None
    return Accuracy(
        first_round=min(numbers),
        last_round=max(numbers),
        asked=len(forecasts),
        answered=len(answered),
        right=right,
        accuracy=value,
        low=low,
        high=high,
    )


def weighted_accuracy(right: Sequence[bool], weights: Sequence[float], confidence: float) -> Estimate:
    """The share of `weights` that belongs to `right`, (n,) each; its interval is for the effective number of items."""
    total = sum(weights)
    if not total:
        return Estimate(value=None, reason="no item is labelled")
    value = sum(weight for hit, weight in zip(right, weights, strict=True) if hit) / total
    effective = total**2 / sum(weight**2 for weight in weights)
    low, high = wilson(value * effective, effective, confidence)
    return Estimate(value=value, low=low, high=high)


def wilson(successes: float, trials: float, confidence: float) -> tuple[float | None, float | None]:
    """Wilson's score interval of a proportion (Wilson 1927); (None, None) without a trial.

    The numbers may be effective ones, and so fractions.
    """
    if trials == 0:
        return None, None
    from statistics import NormalDist  # imports `decimal` and `fractions`, which a tick without news does not need

    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
