"""Metrics on the test set, with bootstrap intervals, from predicted probabilities and true classes.

Every interval is a percentile bootstrap (Efron & Tibshirani 1993, chapter 13) over test items. A resample is a row of
weights (how often each item was drawn), so that a metric of all resamples takes a few matrix products. An undefined
metric is None, with the reason; NaN never leaves this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from al_pipeline.active_learning.acquisition import check_proba
from al_pipeline.evaluation.figures import FIGURES, ClassMetrics, Estimate, Metrics

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

CALIBRATION_BINS = 15
"""Equal-width bins of the calibration error, as in Guo et al. 2017."""

_BLOCK = 4_000_000
"""Number of weights in memory at a time (32 MB)."""
_SMALLEST = float(np.finfo(np.float64).eps)
_EMPTY = "the test set has no labelled items"
_UNDEFINED = "needs test items of the class and of another one"


class ClassCounts(NamedTuple):
    """Weighted counts of b resamples, each (b, C): true positives, support, predicted as the class."""

    hits: Floats
    support: Floats
    predicted: Floats


def evaluate(
    proba: ArrayLike,
    truth: ArrayLike,
    classes: Sequence[str],
    rng: Generator,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    positive: str | None = None,
) -> Metrics:
    """All metrics of `proba` (n, C) against `truth` (n,), indices into `classes`.

    The prediction is the most likely class, the first of equals. F1 = 2 hits / (support + predicted). Macro F1 is the
    mean over the classes present in the truth (of each resample). Log loss is in nats, with probabilities clipped at
    2.2e-16. Calibration error: ECE, Guo et al. 2017 (arXiv:1706.04599), equation 3. Resampling adds noise to every bin,
    so the interval of the calibration error is biased upwards and may exclude its value.

    Average precision is the step-wise sum of (recall gained) * precision over the distinct scores. With two classes it
    is that of `positive`, or by default of the class with fewer test items (the later in `classes` of equals); with
    more, the mean over the classes present.

    `bootstrap` = 0 gives no intervals. An interval omits resamples in which the metric is undefined; it is None if
    these are the majority. Raises ValueError on shapes that do not fit or an unknown class.
    """
    classes = tuple(classes)
    truth = check_truth(truth, len(classes))
    proba = np.empty((0, len(classes))) if len(truth) == 0 else check_proba(proba)
    if proba.shape != (len(truth), len(classes)):
        raise ValueError(f"{len(truth)} items and {len(classes)} classes, but probabilities of shape {proba.shape}")
    target = _target(truth, classes, positive)
    values, draws = _with_resamples(_all_figures(proba, truth, target), len(truth), bootstrap, rng)

    def estimate(column: int, undefined: str) -> Estimate:
        return _estimate(float(values[column]), draws[:, column], confidence, undefined if len(truth) else _EMPTY)

    cells = np.bincount(truth * len(classes) + proba.argmax(axis=1), minlength=len(classes) ** 2)
    confusion = cells.reshape(len(classes), -1)
    return Metrics(
        items=len(truth),
        bootstrap=bootstrap,
        confidence=confidence,
        classes=classes,
        averaged=tuple(classes[c] for c in np.unique(truth)),
        average_precision_of="macro" if target is None else classes[target],
        per_class={label: _class_metrics(c, label, confusion, estimate) for c, label in enumerate(classes)},
        confusion=tuple(tuple(int(count) for count in counts) for counts in confusion),
        **{name: estimate(column, _UNDEFINED) for column, name in enumerate(FIGURES)},
    )


def differences(
    before: ArrayLike,
    after: ArrayLike,
    truth: ArrayLike,
    classes: Sequence[str],
    rng: Generator,
    bootstrap: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """Each overall metric of `after` minus that of `before`, probabilities (n, C) for the same n items.

    The intervals are paired: both models are measured on the same resamples.
    """
    truth = check_truth(truth, len(classes))
    if len(truth) == 0:
        return {name: Estimate(value=None, reason=_EMPTY) for name in FIGURES}
    target = _target(truth, classes, None)
    old, new = (_all_figures(check_proba(proba), truth, target) for proba in (before, after))

    def moved(weights: Floats) -> Floats:
        return (new(weights) - old(weights))[:, : len(FIGURES)]

    values, draws = _with_resamples(moved, len(truth), bootstrap, rng)
    return {
        name: _estimate(float(values[column]), draws[:, column], confidence, _UNDEFINED)
        for column, name in enumerate(FIGURES)
    }


def check_truth(truth: ArrayLike, classes: int) -> Indices:
    """`truth` as class indices (n,). Raises ValueError on anything else."""
    checked = np.asarray(truth)
    if checked.size == 0:
        return np.empty(0, dtype=np.intp)
    if checked.ndim != 1 or not np.issubdtype(checked.dtype, np.integer):
        raise ValueError(
            f"the truth must be a 1-D array of class indices, got {checked.dtype} of shape {checked.shape}"
        )
    if checked.min() < 0 or checked.max() >= classes:
        raise ValueError(
            f"the truth has classes {checked.min()} to {checked.max()}, but there are only {classes} classes"
        )
    return checked.astype(np.intp)


def resamples(n: int, bootstrap: int, rng: Generator) -> Iterator[Floats]:
    """Bootstrap resamples of n > 0 items as weights: blocks (b, n) of how often each item was drawn; rows sum to n."""
    block = max(1, _BLOCK // n)
    for start in range(0, bootstrap, block):
        size = min(block, bootstrap - start)
        drawn = rng.integers(0, n, size=(size, n)) + np.arange(size)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def class_counts(weights: Floats, truth: Indices, predicted: Indices, classes: int) -> ClassCounts:
    """The counts behind precision, recall and F1 of each class, in each of the resamples `weights` (b, n)."""
    is_true, is_predicted = np.eye(classes)[truth], np.eye(classes)[predicted]
    return ClassCounts(weights @ (is_true * is_predicted), weights @ is_true, weights @ is_predicted)


def f1_scores(counts: ClassCounts) -> Floats:
    """F1 (b, C) = 2 hits / (support + predicted); NaN for a class without test items."""
    f1 = _ratio(2 * counts.hits, counts.support + counts.predicted)
    return np.where(counts.support > 0, f1, np.nan)


def macro_f1_scores(counts: ClassCounts) -> Floats:
    """Mean F1 (b,) over the classes present in each resample's truth."""
    present = counts.support > 0
    return _ratio(np.where(present, f1_scores(counts), 0.0).sum(axis=1), present.sum(axis=1).astype(np.float64))


def interval(draws: Floats, confidence: float) -> tuple[float, float] | None:
    """The percentile interval of the finite draws; None if they are fewer than half."""
    defined = draws[np.isfinite(draws)]
    if len(defined) == 0 or 2 * len(defined) < len(draws):
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _with_resamples(
    compute: Callable[[Floats], Floats], items: int, bootstrap: int, rng: Generator
) -> tuple[Floats, Floats]:
    """What `compute` gives for all items (m,), and for each resample (b, m)."""
    values = compute(np.ones((1, items)))[0]
    blocks = map(compute, resamples(items, bootstrap, rng)) if items else ()
    return values, np.concatenate([np.empty((0, len(values))), *blocks])


def _class_metrics(c: int, label: str, confusion: Indices, estimate: Callable[[int, str], Estimate]) -> ClassMetrics:
    """The metrics of class `c`; `estimate` gets a column of `_all_figures`, and the reason if it is undefined there."""
    precision, recall, f1 = (len(FIGURES) + kind * len(confusion) + c for kind in range(3))
    return ClassMetrics(
        support=int(confusion[c].sum()),
        predicted=int(confusion[:, c].sum()),
        precision=estimate(precision, f"no item was predicted as {label}"),
        recall=estimate(recall, f"no test item is {label}"),
        f1=estimate(f1, f"no test item is {label}"),
    )


def _all_figures(proba: Floats, truth: Indices, target: int | None) -> Callable[[Floats], Floats]:
    """A function of weights (b, n) returning columns (b, 5 + 3C): `FIGURES`, then each class's precision, recall, F1.

    NaN marks an undefined metric.
    """
    classes = proba.shape[1]
    predicted = proba.argmax(axis=1)
    right = (predicted == truth).astype(np.float64)
    loss = -np.log(np.maximum(proba[np.arange(len(truth)), truth], _SMALLEST))
    sure = proba.max(axis=1)
    bins = np.clip(np.ceil(sure * CALIBRATION_BINS).astype(np.intp) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.eye(CALIBRATION_BINS)[bins] * (right - sure)[:, None]
    targets = np.unique(truth).tolist() if target is None else [target]
    curves = [_average_precision(proba[:, c], truth == c) for c in targets]

    def compute(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        counts = class_counts(weights, truth, predicted, classes)
        precisions = np.array([curve(weights) for curve in curves]).reshape(len(curves), len(weights))
        known = np.isfinite(precisions)
        return np.column_stack(
            [
                _ratio(weights @ right, total),
                macro_f1_scores(counts),
                _ratio(np.where(known, precisions, 0.0).sum(axis=0), known.sum(axis=0).astype(np.float64)),
                _ratio(weights @ loss, total),
                _ratio(np.abs(weights @ gaps).sum(axis=1), total),
                _ratio(counts.hits, counts.predicted),
                _ratio(counts.hits, counts.support),
                f1_scores(counts),
            ]
        )

    return compute


def _average_precision(scores: Floats, is_positive: NDArray[np.bool_]) -> Callable[[Floats], Floats]:
    """A function of weights (b, n) returning average precision (b,). Ties count together; NaN with only one class."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=np.nan) != 0)  # NaN: the last item ends a group too
    positive = is_positive[order].astype(np.float64)

    def compute(weights: Floats) -> Floats:
        ranked = weights[:, order]
        hits = np.cumsum(ranked * positive, axis=1)[:, ends]
        found = np.cumsum(ranked, axis=1)[:, ends]
        gained = np.diff(hits, axis=1, prepend=0.0)
        precision = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
        total, everything = weights @ is_positive, weights.sum(axis=1)
        both = (total > 0) & (total < everything)
        return np.where(both, _ratio((gained * precision).sum(axis=1), total), np.nan)

    return compute


def _target(truth: Indices, classes: Sequence[str], positive: str | None) -> int | None:
    """The class whose average precision is reported; None for the mean over the classes present in the truth."""
    if positive is not None:
        if positive not in classes:
            raise ValueError(f"unknown class {positive!r}; choose from {', '.join(classes)}")
        return list(classes).index(positive)
    if len(classes) > 2:
        return None
    first, second = np.bincount(truth, minlength=2)
    return 0 if first < second else 1


def _ratio(above: Floats, below: Floats) -> Floats:
    """`above / below`; NaN if `below` is 0."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _estimate(value: float, draws: Floats, confidence: float, undefined: str) -> Estimate:
    if not np.isfinite(value):
        return Estimate(value=None, reason=undefined)
    ends = interval(draws, confidence)
    if ends is None:
        return Estimate(value=value, reason="no interval: not defined in most resamples" if len(draws) else None)
    return Estimate(value=value, low=ends[0], high=ends[1])
