"""Does a converted model agree with the original one? On the labels of the test set, and on a sample of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import BadInput
from al_pipeline.evaluation.metrics import ClassCounts, macro_f1_scores

LEAST_EQUAL = 0.995
"""Share of texts on which a converted model has to predict the same class."""
MOST_APART = 0.003
"""By how much its macro-F1 on the test set may differ."""
MOST_AGAIN = 0.25
"""Share of texts that may need the exact model as well; with more, the exact model alone is faster."""


@dataclass(frozen=True)
class Agreement:
    """A converted model compared with the original one."""

    texts: int
    equal: int
    """Texts with the same predicted class."""
    test: int
    """Labelled test items."""
    macro_f1: float | None
    """Of the converted model; None without labelled test items."""
    original_macro_f1: float | None
    largest_difference: float
    """Of any probability."""
    margin: float = 0.0
    """The logarithm of the ratio of the two largest probabilities below which a text is computed again, exactly."""
    again: int = 0
    """Texts that were."""

    @property
    def accepted(self) -> bool:
        """Whether the figures are good enough."""
        if self.again > MOST_AGAIN * self.texts:
            return False
        if not self.texts or self.equal < LEAST_EQUAL * self.texts:
            return False
        if self.macro_f1 is None or self.original_macro_f1 is None:
            return True
        return abs(self.macro_f1 - self.original_macro_f1) <= MOST_APART

    def sentence(self) -> str:
        """Both figures, with what is needed."""
        equal = f"{self.equal:,} of {self.texts:,} labels are equal ({self.equal / max(self.texts, 1):.1%}"
        found = f"{equal}, needed {LEAST_EQUAL:.1%})"
        if self.margin:
            share = f"{self.again / max(self.texts, 1):.1%}"
            found += f", {self.again:,} of them ({share}, at most {MOST_AGAIN:.0%}) after a second pass in float32"
        if self.macro_f1 is None or self.original_macro_f1 is None:
            return f"{found}; no test item is labelled, so macro-F1 was not compared"
        return (
            f"{found}; macro-F1 on {self.test:,} test items is {self.macro_f1:.4f}, that of the original "
            f"{self.original_macro_f1:.4f} (at most {MOST_APART} apart)"
        )

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {**asdict(self), "accepted": self.accepted}

    def check(self, name: str, runtime: str) -> None:
        """Raise BadInput, with both figures, if the conversion is not accepted."""
        if not self.texts:
            raise BadInput(
                f"{name} cannot be compared as {runtime}: there is neither a test set nor a pool here; `dvc pull`"
            )
        if not self.accepted:
            other = "onnx or torch" if runtime != "onnx" else "torch"
            raise BadInput(f"{name} is refused as {runtime}: {self.sentence()}. Set serve.runtime: {other}")


def compare(
    original: NDArray[np.float64],
    converted: NDArray[np.float64],
    truth: Sequence[str | None],
    classes: Sequence[str],
    margin: float = 0.0,
    again: int = 0,
) -> Agreement:
    """Compare probabilities (n, C) of the same texts; `truth` has the labels of those in the test set.

    `margin` and `again` are kept as `Agreement` has them.
    """
    theirs, ours = original.argmax(axis=1), converted.argmax(axis=1)
    index = {name: place for place, name in enumerate(classes)}
    known = np.array([index.get(label, -1) if label is not None else -1 for label in truth], np.intp)
    test = known >= 0
    scores = (
        [_macro_f1(found[test], known[test], len(classes)) for found in (ours, theirs)] if test.any() else [None] * 2
    )
    apart = float(np.abs(original - converted).max(initial=0.0))
    return Agreement(
        len(ours), int((ours == theirs).sum()), int(test.sum()), scores[0], scores[1], apart, margin, again
    )


def _macro_f1(found: NDArray[np.intp], truth: NDArray[np.intp], classes: int) -> float:
    hits, support, predicted = (
        np.bincount(rows, minlength=classes)[None].astype(np.float64) for rows in (truth[found == truth], truth, found)
    )
    return float(macro_f1_scores(ClassCounts(hits, support, predicted))[0])
