"""Certificates: a model's metric is above a target, proved from random labels, however often one looks.

A share of n random items, such as accuracy, is tested by betting: the capital of a gambler who bets against "the share
is at most t" is the likelihood ratio of the outcomes, averaged over alternatives that are uniform on (t, 1). If the
share is at most t, the capital is a supermartingale, so it ever exceeds 1 / alpha with probability at most alpha
(Ville's inequality; Robbins 1970, Statistical methods related to the law of the iterated logarithm; Waudby-Smith &
Ramdas 2024, Estimating means of bounded random variables by betting). So labels may be added and looked at until the
certificate holds. The i-th published model of a workspace gets the share 1 / (i (i + 1)) of alpha: over all models and
all looks together, a wrong certificate has a probability of at most alpha.

F1 of a class is a function of one share: with J = hits / (items that are of the class or predicted as it), the Jaccard
index, F1 = 2 J / (1 + J). Macro-F1 is bounded by the mean of the classes' bounds, each at alpha / C: valid, and
conservative with many classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

METRICS = ("accuracy", "macro_f1", "recall:CLASS", "precision:CLASS", "f1:CLASS")
MOST_LABELS = 10_000_000
"""More labels than these are not proposed."""
_OF_CLASS = ("recall", "precision", "f1")
_STEPS = 60

Counts = NDArray[np.float64]


class Certificate(Struct, frozen=True, kw_only=True):
    """Whether a metric of a model is above a target, and how many random labels are lacking."""

    metric: str
    target: float
    confidence: float
    """1 minus the probability of a wrong certificate, over all models and looks."""
    models: int
    """The place of the model among the published ones, from 1."""
    labels: int
    """Random labels that it follows from."""
    value: float | None
    """The metric on these labels; None if it is not defined."""
    low: float
    """Its lower bound, with this confidence."""
    certified: bool
    lacking: int | None
    """About how many further random labels certify it, if the metric stays as measured; 0 if it is certified, None if
    no number does.
    """
    reason: str
    """Why it is not certified; empty if it is."""

    def sentence(self) -> str:
        """The result in words."""
        if self.certified:
            return (
                f"certified: {self.metric} is at least {self.target:g}, with {self.confidence:.0%} confidence "
                f"(lower bound {self.low:.4f} from {self.labels:,} random labels)"
            )
        return f"not certified: {self.reason}"


def check_metric(metric: str, classes: Sequence[str]) -> tuple[str, int | None]:
    """A metric's name and the index of its class. Raises ValueError with the reason if there is no such metric."""
    name, colon, label = metric.partition(":")
    if not colon and name in ("accuracy", "macro_f1"):
        return name, None
    if not colon or name not in _OF_CLASS:
        raise ValueError(f"{metric!r} is no metric; there are {', '.join(METRICS)}")
    if label not in classes:
        raise ValueError(f"there is no class {label!r}; the classes are {', '.join(classes)}")
    return name, list(classes).index(label)


def certify(
    confusion: Sequence[Sequence[int]] | Counts,
    classes: Sequence[str],
    metric: str,
    target: float,
    confidence: float = 0.95,
    model: int = 1,
) -> Certificate:
    """Whether `metric` is above `target`, from the confusion matrix (C, C) of random items.

    Rows are the true classes, columns the predicted ones. `model`: the place of the model among those that may have
    been looked at, from 1. Raises ValueError for an unknown metric, and unless `target` and `confidence` are in (0, 1).
    """
    if not 0 < target < 1:
        raise ValueError(f"the target must be above 0 and below 1, not {target:g}")
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence must be above 0 and below 1, not {confidence:g}")
    name, column = check_metric(metric, classes)
    counts = np.asarray(confusion, np.float64).reshape(len(classes), len(classes))
    evidence = math.log(model * (model + 1) / (1 - confidence))
    labels = int(counts.sum())
    value, low = _value(counts, name, column), _bound(counts, name, column, evidence)
    certified = low >= target
    lacking: int | None = 0
    reason = ""
    if not certified:
        lacking = _lacking(counts, name, column, evidence, target)
        reason = _reason(counts, classes, metric, value, low, target, lacking)
    return Certificate(
        metric=metric, target=target, confidence=confidence, models=model, labels=labels, value=value, low=low,
        certified=certified, lacking=lacking, reason=reason,
    )  # fmt: skip


def log_capital(hits: float, trials: float, share: float) -> float:
    """The logarithm of the capital won against "the share is at most `share`", after `hits` in `trials`."""
    from scipy.special import betaincc, betaln

    if trials <= 0 or share >= 1:
        return 0.0 if trials <= 0 else -math.inf
    misses = trials - hits
    if share <= 0:
        return math.inf if hits > 0 else 0.0
    tail = float(betaincc(hits + 1, misses + 1, share))
    if tail <= 0:
        return -math.inf
    alternatives = float(betaln(hits + 1, misses + 1)) + math.log(tail) - math.log1p(-share)
    return alternatives - hits * math.log(share) - misses * math.log1p(-share)


def lower_bound(hits: float, trials: float, evidence: float) -> float:
    """The lower bound of a share after `hits` in `trials`: what is below has lost with a log capital of `evidence`."""
    low, high = 0.0, hits / trials if trials > 0 else 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if log_capital(hits, trials, middle) >= evidence:
            low = middle
        else:
            high = middle
    return low


def _shares(counts: Counts, name: str, column: int | None) -> list[tuple[float, float]]:
    """Hits and trials of the shares of which a metric is the mean, after `_scale`."""
    if name == "accuracy":
        return [(float(counts.trace()), float(counts.sum()))]
    columns = range(len(counts)) if column is None else [column]
    found = []
    for c in columns:
        hits, true, predicted = counts[c, c], counts[c].sum(), counts[:, c].sum()
        trials = {"recall": true, "precision": predicted}.get(name, true + predicted - hits)
        found.append((float(hits), float(trials)))
    return found


def _scale(name: str) -> Callable[[float], float]:
    return (lambda share: 2 * share / (1 + share)) if name in ("f1", "macro_f1") else (lambda share: share)


def _value(counts: Counts, name: str, column: int | None) -> float | None:
    shares, scale = _shares(counts, name, column), _scale(name)
    if not all(trials for _, trials in shares):
        return None
    return sum(scale(hits / trials) for hits, trials in shares) / len(shares)


def _bound(counts: Counts, name: str, column: int | None, evidence: float) -> float:
    shares, scale = _shares(counts, name, column), _scale(name)
    each = evidence + math.log(len(shares))
    return sum(scale(lower_bound(hits, trials, each)) for hits, trials in shares) / len(shares)


def _lacking(counts: Counts, name: str, column: int | None, evidence: float, target: float) -> int | None:
    """The labels that are lacking if further ones fall as those so far; None if no number up to MOST_LABELS does."""
    labels = float(counts.sum())
    value = _value(counts, name, column)
    if value is None or value <= target:
        return None

    def enough(more: float) -> bool:
        return _bound(counts * (1 + more / labels), name, column, evidence) >= target

    low, high = 0.0, max(1.0, labels / 8)
    while not enough(high):
        low, high = high, high * 2
        if high > MOST_LABELS:
            return None
    while high - low > max(1.0, high / 200):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return math.ceil(high)


def _reason(
    counts: Counts,
    classes: Sequence[str],
    metric: str,
    value: float | None,
    low: float,
    target: float,
    lacking: int | None,
) -> str:
    if not counts.sum():
        return "no random item is labelled yet"
    if value is None:
        none = [label for c, label in enumerate(classes) if not counts[c].sum() + counts[:, c].sum()]
        named = f" of class {', '.join(none)}" if none and metric == "macro_f1" else " that it is measured on"
        return f"no random item{named} is labelled yet"
    measured = f"{metric} is {value:.4f} on {int(counts.sum()):,} random labels"
    if value <= target:
        return f"{measured}, no more than the target of {target:g}"
    if lacking is None:
        return f"{measured}, too close to the target of {target:g} for {MOST_LABELS:,} labels to prove it"
    return f"{measured}, its lower bound {low:.4f}; about {lacking:,} further random labels are lacking"
