"""Which items of the rest of a pool a model may label: a confidence for each class, from which on errors are bounded.

For each class and each of the thresholds GRID, random items that the model assigns to the class with at least that
confidence are tested as in `certificate`: is the share that is right at least 1 - bound? The threshold of a class is
the lowest one that passes. All classes and thresholds share the probability of error (Bonferroni), so with the stated
confidence all bounds hold together. This is threshold-based auto-labelling (Vishwakarma et al. 2023, Promises and
pitfalls of threshold-based auto-labeling) with bounds that hold however often one looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from al_pipeline.stopping.certificate import MOST_LABELS, log_capital, lower_bound

GRID = (0.0, 0.6, 0.75, 0.85, 0.92, 0.96, 0.98)
"""Thresholds of the confidence, fixed in advance."""


class Rule(Struct, frozen=True):
    """From which confidence on the model's answers of one class are taken."""

    label: str
    threshold: float | None
    """None: the bound could not be shown for this class, at no threshold."""
    tested: int
    """Random items of the class above the threshold; without a threshold, all that were assigned to the class."""
    wrong: int
    error: float | None
    """The bound on their error rate that was shown; None without a threshold."""
    lacking: int | None
    """About how many further random labels show the bound at some threshold; 0 with a threshold, None if no number."""


def rules(
    predicted: NDArray[np.intp],
    confidence: NDArray[np.float64],
    is_right: NDArray[np.bool_],
    classes: Sequence[str],
    bound: float,
    level: float = 0.95,
    model: int = 1,
) -> tuple[Rule, ...]:
    """A rule for each class, from n random labelled items: their predicted classes, confidences and whether right.

    `bound`: the error rate allowed; `level`: the probability that all bounds hold; `model`: as for `certify`. Raises
    ValueError unless `bound` and `level` are in (0, 1).
    """
    for name, value in (("bound", bound), ("confidence", level)):
        if not 0 < value < 1:
            raise ValueError(f"the {name} must be above 0 and below 1, not {value:g}")
    evidence = math.log(model * (model + 1) * len(classes) * len(GRID) / (1 - level))
    return tuple(
        _rule(label, confidence[predicted == place], is_right[predicted == place], bound, evidence, len(predicted))
        for place, label in enumerate(classes)
    )


def accepted(predicted: str, confidence: float, by_class: dict[str, Rule]) -> bool:
    """Whether the model's answer for an item is taken."""
    threshold = by_class[predicted].threshold
    return threshold is not None and confidence >= threshold


def _rule(
    label: str,
    confidence: NDArray[np.float64],
    is_right: NDArray[np.bool_],
    bound: float,
    evidence: float,
    labels: int,
) -> Rule:
    lacking: list[int] = []
    for threshold in GRID:
        above = confidence >= threshold
        trials, hits = int(above.sum()), int(is_right[above].sum())
        if log_capital(hits, trials, 1 - bound) >= evidence:
            error = 1 - lower_bound(hits, trials, evidence)
            return Rule(label, threshold, trials, trials - hits, min(error, bound), 0)
        if (more := _lacking(hits, trials, bound, evidence, labels)) is not None:
            lacking.append(more)
    return Rule(label, None, len(is_right), int((~is_right).sum()), None, min(lacking, default=None))


def _lacking(hits: int, trials: int, bound: float, evidence: float, labels: int) -> int | None:
    """The labels that are lacking if further ones fall as those so far; None if no number up to MOST_LABELS does."""
    if not trials or hits / trials <= 1 - bound:
        return None
    low, high = 0.0, labels / 8
    while log_capital(hits * (1 + high / labels), trials * (1 + high / labels), 1 - bound) < evidence:
        low, high = high, 2 * high
        if high > MOST_LABELS:
            return None
    while high - low > max(1.0, high / 200):
        middle = (low + high) / 2
        grown = 1 + middle / labels
        is_enough = log_capital(hits * grown, trials * grown, 1 - bound) >= evidence
        low, high = (low, middle) if is_enough else (middle, high)
    return math.ceil(high)
