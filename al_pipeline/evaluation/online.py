"""Prequential accuracy: the model's accuracy on the random slice of each batch, before it was trained on it.

The slice is a simple random sample of what was unlabelled when it was drawn, and the model that chose the batch never
saw its labels: the estimate is unbiased and needs no test set (prequential evaluation, Dawid 1984). It is an average
over a sequence of models, each trained on more labels; `recent` covers the newest alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from al_pipeline.evaluation.figures import Accuracy, Control, Running

RECENT = 100
"""Least number of answered items that `recent` covers, in whole rounds."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """An item of a random slice: the round that asked it, the model's prediction before, and the label."""

    round: int
    predicted: str
    label: str | None
    """None where nobody answered, or the answers give no label."""


@dataclass(frozen=True, slots=True)
class Saved:
    """The score of a model on the random labels alone, and the labels that the rounds needed to equal it."""

    random_labels: int
    macro_f1: float
    """Of the control, the same classifier on the random labels alone."""
    labels: int | None
    """Of the first round that was as good; None where none is."""
    at_most: bool
    """That round was the first: it may have needed fewer."""

    def sentence(self) -> str:
        """It in words."""
        reached = f"{self.random_labels} random labels alone reach macro-F1 {self.macro_f1:.3f}"
        if self.labels is None:
            return f"{reached}; no round is as good yet"
        if self.at_most and self.labels >= self.random_labels:  # against the first round's size it would read as a loss
            return f"{reached}: too few to tell what the rounds saved"
        return f"{reached}; the rounds were as good with {'at most ' if self.at_most else ''}{self.labels}"


def labels_saved(rounds: Sequence[tuple[int, float | None]], control: Control | None) -> Saved | None:
    """How many labels the rounds needed for what the newest random labels reach; None without a control's score.

    `rounds`: labels and macro-F1 of each, oldest first; `control`: the newest round's. Both were measured on one test
    set, and only rounds that took place count: nothing lies between or beyond them.
    """
    target = None if control is None else control.macro_f1.value
    if control is None or target is None:
        return None
    there = next((number for number, (_, score) in enumerate(rounds) if score is not None and score >= target), None)
    labels = None if there is None else rounds[there][0]
    return Saved(control.labels, target, labels, there == 0)


def running_accuracy(forecasts: Sequence[Forecast], confidence: float = 0.95) -> Running | None:
    """The running accuracy; None before a slice was predicted.

    Unanswered items are left out and counted: where they are many, those that people skip may be the harder ones.
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


def wilson(successes: int, trials: int, confidence: float) -> tuple[float | None, float | None]:
    """Wilson's score interval of a proportion (Wilson 1927); none without a trial."""
    if trials == 0:
        return None, None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
