"""What a model says of random items with known labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class LabelledPredictions:
    """The predictions for n labelled items."""

    classes: tuple[str, ...]
    predicted: NDArray[np.intp]
    truth: NDArray[np.intp]
    confidence: NDArray[np.float64]
    """The probability of the predicted class."""

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """Whether each prediction is the label."""
        return np.asarray(self.predicted == self.truth)

    @property
    def confusion(self) -> NDArray[np.float64]:
        """(C, C): rows are true classes, columns predicted ones."""
        count = len(self.classes)
        cells = np.bincount(self.truth * count + self.predicted, minlength=count * count)
        return cells.reshape(count, count).astype(np.float64)


def of_labelled(labels: Sequence[str], classes: Sequence[str], proba: ArrayLike) -> LabelledPredictions:
    """The predictions for those of n items that have a label; `labels` (n,) are empty for others, `proba` is (n, C)."""
    rows = [row for row, label in enumerate(labels) if label]
    index = {label: place for place, label in enumerate(classes)}
    truth = np.array([index[labels[row]] for row in rows], np.intp)
    known = np.asarray(proba, np.float64).reshape(len(labels), len(classes))[rows]
    predicted = known.argmax(axis=1) if rows else np.zeros(0, np.intp)
    return LabelledPredictions(tuple(classes), predicted, truth, known[np.arange(len(rows)), predicted])
