"""The gate: does the new model (challenger) replace the promoted one (champion)?

The challenger is trained on more labels, so it is promoted unless there is evidence against it. In this order:

1. **No champion**: promoted. Provisional (decided again with more evidence) if a class has fewer than
   `min_test_per_class` test items, or if the model finds no test item of some class.
2. **Too few test items** of some class of the schema: held.
3. **A class collapsed**: refused. Its recall fell to 0 from above 0, or its F1 fell by more than `max_drop` even at the
   upper end of its paired interval (with a Bonferroni-corrected confidence).
4. **Macro F1 fell by more than `max_drop`**: refused if the upper end of the paired interval is below 0 (the drop is
   significant), else held.
5. Otherwise promoted, also after a drop within `max_drop`.

**A promoted model that speaks another schema** is compared in the classes that both know: a renamed class is the same,
merged ones are added up, and the parts of a split class are one, for both models. How well the parts are told apart
nothing can compare; the new model has only to have their test items (step 2).

Comparing the lower end with `-max_drop` instead would refuse models for noise: with 300 test items the interval of two
equally good models is often wider than any sensible `max_drop`. A significant drop within `max_drop` is tolerated by
definition of the setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from msgspec.structs import replace
from numpy.random import Generator
from numpy.typing import ArrayLike

from al_pipeline.active_learning.acquisition import check_proba
from al_pipeline.evaluation.comparison import group_names
from al_pipeline.evaluation.figures import Decision
from al_pipeline.evaluation.metrics import (
    ClassCounts,
    Floats,
    Indices,
    check_truth,
    class_counts,
    f1_scores,
    interval,
    macro_f1_scores,
    resamples,
)


class Limits(Protocol):
    """The `gate` section of `params.yaml`."""

    @property
    def max_drop(self) -> float:
        """The largest tolerated drop of F1."""

    @property
    def min_test_per_class(self) -> int:
        """The models are not compared if some class has fewer test items than this."""


def decide(
    champion: ArrayLike | None,
    challenger: ArrayLike,
    truth: ArrayLike,
    classes: Sequence[str],
    limits: Limits,
    rng: Generator,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    groups: Sequence[int] | None = None,
) -> Decision:
    """Decide by the rules above. `champion`, `challenger`: class probabilities (n, C) for the same n test items.

    `groups` (C,): if the champion speaks another schema, the group of each class in which both can be compared (see
    `comparison.common_groups`); its probabilities are then those of the groups (n, G). Raises ValueError if the shapes
    do not fit `truth` (n,) and `classes`.
    """
    actual = check_truth(truth, len(classes))
    new = _predictions(challenger, len(actual), classes)
    thin = _too_few(np.bincount(actual, minlength=len(classes)), classes, limits.min_test_per_class)
    if champion is None:
        return _first_model(actual, new, classes, thin)
    if thin:
        return Decision(verdict="held", provisional=False, reasons=(f"not enough evidence: {thin}",))
    if groups is not None:
        if len({*groups}) < 2:
            said = "not enough evidence: the promoted model knows none of the present classes apart"
            return Decision(verdict="held", provisional=False, reasons=(said,))
        names = group_names(classes, groups)
        table = np.eye(len(names))[np.asarray(groups)]
        actual, new = np.asarray(groups)[actual], _predictions(np.asarray(challenger) @ table, len(actual), names)
        classes = names
    old = _predictions(champion, len(actual), classes)
    found = _compared(actual, old, new, classes, limits.max_drop, rng, bootstrap, confidence)
    if groups is not None and len(classes) < len(groups):
        said = f"compared in the classes {', '.join(classes)}, which both models know"
        found = replace(found, reasons=(*found.reasons, said))
    return found


def both(first: Decision, second: Decision, name: str) -> Decision:
    """The decision if two test sets have to allow the promotion: the stricter one of both.

    `name`: what the second one is called in its reasons. The differences are those of the first.
    """
    said = tuple(f"{name}: {reason}" for reason in second.reasons)
    strictness = ("promoted", "held", "refused")
    verdict = max(first.verdict, second.verdict, key=strictness.index)
    provisional = verdict == "promoted" and (first.provisional or second.provisional)
    return replace(first, verdict=verdict, provisional=provisional, reasons=(*first.reasons, *said))


def _first_model(actual: Indices, new: Indices, classes: Sequence[str], thin: str) -> Decision:
    """Step 1 of the rule. `thin`: the classes with too few test items, as a sentence; empty if there are none."""
    found = class_counts(np.ones((1, len(actual))), actual, new, len(classes))
    unfound = "" if thin else _never_found(found, classes)
    said = tuple(reason for reason in ("the first model", thin, unfound) if reason)
    return Decision(verdict="promoted", provisional=bool(thin or unfound), reasons=said)


def _compared(
    actual: Indices,
    old: Indices,
    new: Indices,
    classes: Sequence[str],
    max_drop: float,
    rng: Generator,
    bootstrap: int,
    confidence: float,
) -> Decision:
    """Steps 3 to 5 of the rule. `old`, `new`: predicted classes (n,) of champion and challenger."""
    once = np.ones((1, len(actual)))
    before, after = (class_counts(once, actual, predicted, len(classes)) for predicted in (old, new))
    pairs = [
        (class_counts(weights, actual, new, len(classes)), class_counts(weights, actual, old, len(classes)))
        for weights in resamples(len(actual), bootstrap, rng)
    ]
    difference = float((macro_f1_scores(after) - macro_f1_scores(before))[0])
    macro_draws = np.concatenate([macro_f1_scores(a) - macro_f1_scores(b) for a, b in pairs])
    low, high = interval(macro_draws, confidence) or (difference, difference)
    class_draws = np.concatenate([f1_scores(a) - f1_scores(b) for a, b in pairs])
    change = (
        f"macro-F1 {difference:+.3f} against the promoted model "
        f"({confidence:.0%} interval {low:+.3f} to {high:+.3f}, {len(actual)} test items)"
    )
    collapsed = _collapsed(before, after, class_draws, classes, max_drop, confidence)
    verdict, reasons = _judge(difference, high, collapsed, change, max_drop)
    return Decision(verdict=verdict, provisional=False, reasons=reasons, difference=difference, low=low, high=high)


def _judge(
    difference: float, high: float, collapsed: Sequence[str], change: str, max_drop: float
) -> tuple[str, tuple[str, ...]]:
    """The verdict by steps 3 to 5, and its reasons. `high`: upper end of the paired interval; `change`: a sentence."""
    if collapsed:
        return "refused", (*collapsed, change)
    if difference >= -max_drop:
        return "promoted", (change,)
    if high < 0:
        return "refused", (f"{change}: worse by more than the {max_drop:g} tolerated",)
    return "held", (f"{change}: looks worse than the {max_drop:g} tolerated, but could be chance",)


def _predictions(proba: ArrayLike, items: int, classes: Sequence[str]) -> Indices:
    if items == 0:
        return np.empty(0, dtype=np.intp)
    checked = check_proba(proba)
    if checked.shape != (items, len(classes)):
        raise ValueError(f"{items} items and {len(classes)} classes, but probabilities of shape {checked.shape}")
    return np.asarray(checked.argmax(axis=1))


def _too_few(support: Indices, classes: Sequence[str], least: int) -> str:
    if support.sum() == 0:
        return "the test set has no labelled items"
    few = [f"{label} {count}" for label, count in zip(classes, support, strict=True) if count < least]
    return f"fewer than {least} test items of {', '.join(few)}" if few else ""


def _never_found(counts: ClassCounts, classes: Sequence[str]) -> str:
    silent = [label for c, label in enumerate(classes) if counts.support[0, c] > 0 and counts.hits[0, c] == 0]
    return f"it finds no test item of {', '.join(silent)}" if silent else ""


def _collapsed(
    before: ClassCounts, after: ClassCounts, draws: Floats, classes: Sequence[str], max_drop: float, confidence: float
) -> list[str]:
    """A sentence for each class that collapsed. `draws`: differences of F1 (b, C)."""
    fall = f1_scores(after)[0] - f1_scores(before)[0]
    shared = 1 - (1 - confidence) / len(classes)
    reasons = []
    for c, label in enumerate(classes):
        found = int(before.hits[0, c])
        if found > 0 and after.hits[0, c] == 0:
            reasons.append(
                f"class {label} collapsed: none of its {int(before.support[0, c])} test items found, {found} before"
            )
            continue
        ends = interval(draws[:, c], shared)
        if ends is not None and fall[c] < -max_drop and ends[1] < -max_drop:
            reasons.append(f"class {label} got worse: F1 {fall[c]:+.3f} (interval {ends[0]:+.3f} to {ends[1]:+.3f})")
    return reasons
