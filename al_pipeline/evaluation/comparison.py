"""Compares two models on the test items that both were measured on: differences of metrics, changed predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import Generator

from al_pipeline.evaluation.figures import Estimate
from al_pipeline.evaluation.metrics import Floats, differences


class Predicted(Protocol):
    """A model's probabilities (n, C) for n test items, and their labels as known then."""

    @property
    def item_ids(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def proba(self) -> Floats: ...


@dataclass(frozen=True, slots=True)
class Flip:
    """A test item that the two models give different classes, each with its probability."""

    item_id: str
    label: str
    before: str
    before_probability: float
    after: str
    after_probability: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """`items`: how many test items both models saw. `differences`: of each figure, after minus before."""

    items: int
    differences: Mapping[str, Estimate]
    flips: tuple[Flip, ...]


def shared(before: Predicted, after: Predicted) -> tuple[list[int], list[int]]:
    """The rows of the items that both saw, in the order of `after`: rows of `before`, and rows of `after`."""
    rows = {item: row for row, item in enumerate(before.item_ids)}
    keep = [row for row, item in enumerate(after.item_ids) if item in rows]
    return [rows[after.item_ids[row]] for row in keep], keep


def compare(
    before: Predicted, after: Predicted, rng: Generator, bootstrap: int = 1000, confidence: float = 0.95
) -> Comparison:
    """Both models on the items that both saw. The labels are those of `after`, the later knowledge.

    A class that one of them did not know yet has probability 0 there.
    """
    old_rows, new_rows = shared(before, after)
    classes = tuple(dict.fromkeys((*after.classes, *before.classes)))
    old = aligned(before, old_rows, classes)
    new = aligned(after, new_rows, classes)
    labels = [after.labels[row] for row in new_rows]
    truth = np.array([classes.index(label) for label in labels], dtype=np.intp)
    first, second = old.argmax(axis=1), new.argmax(axis=1)
    return Comparison(
        items=len(labels),
        differences=differences(old, new, truth, classes, rng, bootstrap, confidence),
        flips=tuple(
            Flip(
                after.item_ids[new_rows[row]],
                labels[row],
                classes[first[row]],
                float(old[row, first[row]]),
                classes[second[row]],
                float(new[row, second[row]]),
            )
            for row in np.flatnonzero(first != second)
        ),
    )


def aligned(model: Predicted, rows: Sequence[int], classes: Sequence[str]) -> Floats:
    """A model's probabilities for `rows` with a column for each of `classes`; shape (rows, classes).

    A class that the model did not know has probability 0; what it gave to a class that is no more is shared out.
    """
    found = np.zeros((len(rows), len(classes)))
    for column, name in enumerate(model.classes):
        if name in classes:
            found[:, classes.index(name)] = model.proba[list(rows), column]
    if set(model.classes) <= set(classes):
        return found
    whole = found.sum(axis=1, keepdims=True)
    return np.where(whole > 0, found / np.where(whole > 0, whole, 1.0), 1.0 / len(classes))
