"""Class probabilities from logits, and the classes of a labelled set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import BadInput

Floats = NDArray[np.float64]

FLOOR = 1e-9
"""Added to every probability, so that none is 0 or 1."""


def softmax(logits: Floats) -> Floats:
    """Softmax over the columns, (n, C)."""
    proba: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    proba /= proba.sum(axis=1, keepdims=True)
    return proba


def log_softmax(logits: Floats) -> Floats:
    """Logarithms of `softmax`, (n, C)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), np.float64)


def over_all_classes(proba: Floats, classes: Sequence[str], counts: Mapping[str, int]) -> Floats:
    """Extend probabilities of the seen classes, (n, seen), to all classes, (n, C), strictly between 0 and 1.

    `counts`: number of labels of each seen class. A class without labels gets 1 / (labels + classes); without any
    label the result is uniform.
    """
    seen = [classes.index(name) for name in counts]
    prior = 1 / (sum(counts.values()) + len(classes))
    extended = np.full((len(proba), len(classes)), prior)
    if seen:
        extended[:, seen] = (1 - prior * (len(classes) - len(seen))) * proba
    extended += FLOOR
    return np.asarray(extended / extended.sum(axis=1, keepdims=True), np.float64)


def count_classes(labels: Sequence[str], classes: Sequence[str]) -> tuple[dict[str, int], NDArray[np.intp]]:
    """The number of labels of each class that has some, in the order of `classes`, and each label's index in it, (n,).

    Raises BadInput if a label is not a class.
    """
    if unknown := sorted(set(labels) - set(classes)):
        raise BadInput(f"label {unknown[0]!r} is not a class in the schema ({', '.join(classes)})")
    found = Counter(labels)
    counts = {name: found[name] for name in classes if name in found}
    index = {name: place for place, name in enumerate(counts)}
    return counts, np.array([index[label] for label in labels], np.intp)


def class_weights(targets: NDArray[np.intp], classes: int) -> Floats:
    """The weight of each label in the fit, (n,): n / (classes * number of labels of its class)."""
    weights: Floats = (len(targets) / (classes * np.maximum(np.bincount(targets, minlength=classes), 1)))[targets]
    return weights
