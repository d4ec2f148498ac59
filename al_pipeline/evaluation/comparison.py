"""Comparison of two models on their common test items: differences of metrics, and changed predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import Generator

from al_pipeline.evaluation.figures import Estimate
from al_pipeline.evaluation.metrics import Floats, differences


class Predicted(Protocol):
    """A model's probabilities (n, C) for n test items, and their labels at that time."""

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
    """A test item for which the two models predict different classes, each with its probability."""

    item_id: str
    label: str
    before: str
    before_probability: float
    after: str
    after_probability: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """`items`: number of common test items. `differences`: each metric after minus before."""

    items: int
    differences: Mapping[str, Estimate]
    flips: tuple[Flip, ...]


def shared(before: Predicted, after: Predicted) -> tuple[list[int], list[int]]:
    """The row numbers of the common items in `before` and in `after`, both in the order of `after`."""
    rows = {item: row for row, item in enumerate(before.item_ids)}
    keep = [row for row, item in enumerate(after.item_ids) if item in rows]
    return [rows[after.item_ids[row]] for row in keep], keep


def compare(
    before: Predicted, after: Predicted, rng: Generator, bootstrap: int = 1000, confidence: float = 0.95
) -> Comparison:
    """Compare two models on their common items, against the labels of `after`, which are newer.

    A class that a model does not have gets probability 0.
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
    """A model's probabilities for `rows` with a column for each of `classes`, shape (rows, classes).

    A class that the model does not have gets probability 0. Columns of removed classes are dropped,
    and the rows renormalised.
    """
    found = np.zeros((len(rows), len(classes)))
    for column, name in enumerate(model.classes):
        if name in classes:
            found[:, classes.index(name)] = model.proba[list(rows), column]
    if set(model.classes) <= set(classes):
        return found
    total = found.sum(axis=1, keepdims=True)
    return np.where(total > 0, found / np.where(total > 0, total, 1.0), 1.0 / len(classes))


def common_groups(classes: Sequence[str], related: Mapping[str, frozenset[str]]) -> list[int]:
    """The group of each of `classes` (C,), numbered from 0, in which an older model can be compared.

    `related`: the present classes that each of its classes is related to. Classes that one old class is related to
    cannot be told apart by it, and are one group.
    """
    groups = list(range(len(classes)))
    for names in related.values():
        members = [place for place, name in enumerate(classes) if name in names]
        joined = {groups[place] for place in members}
        groups = [min(joined) if group in joined else group for group in groups]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [numbers[group] for group in groups]


def group_names(classes: Sequence[str], groups: Sequence[int]) -> list[str]:
    """The names of the groups: their classes, joined by `+`."""
    return ["+".join(n for n, own in zip(classes, groups, strict=True) if own == g) for g in dict.fromkeys(groups)]


def in_groups(
    model: Predicted, rows: Sequence[int], classes: Sequence[str], related: Mapping[str, frozenset[str]]
) -> Floats:
    """An older model's probabilities for `rows` of the groups of `classes`, shape (rows, groups).

    Its classes that no present one is related to are dropped, and the rows renormalised.
    """
    groups = common_groups(classes, related)
    names = group_names(classes, groups)
    found = np.zeros((len(rows), len(names)))
    for column, name in enumerate(model.classes):
        places = {group for one, group in zip(classes, groups, strict=True) if one in related.get(name, (name,))}
        if places:
            found[:, places.pop()] += model.proba[list(rows), column]
    total = found.sum(axis=1, keepdims=True)
    return np.where(total > 0, found / np.where(total > 0, total, 1.0), 1.0 / len(names))


@dataclass(frozen=True, slots=True)
class _InGroups:
    """A model's predictions in groups of classes."""

    item_ids: tuple[str, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    proba: Floats


def in_common_classes(
    before: Predicted, after: Predicted, related: Mapping[str, frozenset[str]]
) -> tuple[Predicted, Predicted]:
    """Both models' predictions in the groups of classes that both know, see `common_groups`.

    `related`: the classes of `after` that each class of `before` is related to.
    """
    groups = common_groups(after.classes, related)
    names = group_names(after.classes, groups)
    name_of = {name: names[group] for name, group in zip(after.classes, groups, strict=True)}
    old = in_groups(before, range(len(before.item_ids)), after.classes, related)
    new = after.proba @ np.eye(len(names))[groups] if groups else after.proba
    labels = tuple(
        next((name_of[one] for one in after.classes if one in related.get(label, (label,))), label)
        for label in before.labels
    )
    return (
        _InGroups(tuple(before.item_ids), labels, tuple(names), old),
        _InGroups(tuple(after.item_ids), tuple(name_of[label] for label in after.labels), tuple(names), new),
    )
