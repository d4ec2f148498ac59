"""Which answered items are asked again: those whose label is probably wrong.

The answers on an item and a model that was not trained on them say how probable each class is; how often people are
right is estimated from all answers together. A label that is wrong with at least WRONG is worth more than a first
answer to another item (measured in benchmarks/results/relabel.json, beside the score of ActiveLab, Goh & Mueller 2023,
arXiv:2301.11856, which puts unlabelled and answered items on one scale).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import ArrayLike, NDArray

from al_pipeline.active_learning.acquisition import check_proba
from al_pipeline.active_learning.sampling import top_k
from al_pipeline.records import Query

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]
Doubted = list[tuple[str, float]]
"""Ids of items and the probability that their label is wrong, the highest first."""
Relabel = float | Literal["auto"]
"""`select.relabel`: the largest share of a batch that is asked again, or AUTO_SHARE."""

WRONG = 0.25
"""The least probability of being wrong with which a label is asked again."""
AUTO_SHARE = 0.5
"""The largest share of a batch that is asked again with `auto`: without new items nothing is learnt of the pool."""
AUTO_LABELS = 10
"""With fewer labels for each class of the schema the share of `auto` is smaller in proportion: new items teach more."""
MOST_TASKS = 5
"""An item is asked in at most so many rounds."""
USUAL_ACCURACY = 0.8
USUAL_ANSWERS = 20.0
"""How often people are right before anything is known of them, and how many answers that counts for."""
CONTRADICTIONS = 2.0
"""So many contradictions as expected are supposed before anybody was asked again."""
_ACCURACIES = (0.5, 0.995)
_STEPS = 100
_TOLERANCE = 1e-6


class Risks(NamedTuple):
    """The result of `label_risks` for n items."""

    accuracy: float
    """The estimated share of answers that are right."""
    wrong: Floats
    """(n,) the probability that the item's label is wrong."""


def label_risks(answers: ArrayLike, proba: ArrayLike, labels: ArrayLike) -> Risks:
    """The probability that each item's label is wrong, by its answers and a model's probabilities.

    `answers` (n, C): how many people gave each class. `proba` (n, C): the probabilities of a model that was not trained
    on the item. `labels` (n,): the class of each label. An answer is right with one accuracy, errors fall evenly on the
    other classes, and the model's probabilities are the prior of the true class (Dawid & Skene 1979, with one parameter
    and a prior for each item). The accuracy is estimated by expectation maximisation; a Beta prior keeps it near
    USUAL_ACCURACY while there are few answers. Where people who answered the same item contradict each other less often
    than that says, all risks are lowered in proportion: a weak model takes what it does not know for errors. Raises
    ValueError for arrays that do not fit together.
    """
    prior = check_proba(proba)
    counts = np.asarray(answers, dtype=np.float64)
    given = np.asarray(labels, dtype=np.intp)
    items, classes = prior.shape
    if counts.shape != prior.shape or given.shape != (items,):
        raise ValueError(f"answers {counts.shape}, probabilities {prior.shape} and labels {given.shape} do not match")
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise ValueError("numbers of answers must be finite and not negative")
    if items and not 0 <= given.min() <= given.max() < classes:
        raise ValueError(f"labels must be classes from 0 to {classes - 1}")
    accuracy, total = USUAL_ACCURACY, counts.sum() + USUAL_ANSWERS
    logs = np.log(np.maximum(prior, 1e-300))
    shares = prior
    for _ in range(_STEPS):
        shares = _posteriors(counts, logs, accuracy)
        before = accuracy
        accuracy = float(((counts * shares).sum() + USUAL_ACCURACY * USUAL_ANSWERS) / total)
        accuracy = min(max(accuracy, _ACCURACIES[0]), _ACCURACIES[1])
        if abs(accuracy - before) < _TOLERANCE:
            break
    right = _posteriors(counts, logs, accuracy)[np.arange(items), given]
    wrong = _contradicted(counts, logs, accuracy) * np.clip(1.0 - right, 0.0, 1.0)
    return Risks(accuracy, wrong)


def _contradicted(counts: Floats, logs: Floats, accuracy: float) -> float:
    """How often people contradict each other, in proportion to what is expected; at most 1.

    Expected of an answer is what the model and another person's answer to the item say; CONTRADICTIONS are added to
    both numbers.
    """
    several = counts.sum(axis=1) > 1
    counts, logs = counts[several], logs[several]
    classes = counts.shape[1]
    others = np.maximum(1.0, counts.sum(axis=1) - 1)
    found = expected = 0.0
    for label in range(classes):
        given = counts[:, label]
        certain = _posteriors(np.eye(classes)[[label]], logs, accuracy)[:, label]
        equal = accuracy * certain + (1 - accuracy) * (1 - certain) / (classes - 1)
        # Each answer is compared with the item's others, and weighs 1 / 2: of two answers the pair weighs 1.
        found += float((given * (others - np.maximum(0, given - 1)) / others).sum()) / 2
        expected += float((given * (1 - equal)).sum()) / 2
    return min(1.0, (found + CONTRADICTIONS) / (expected + CONTRADICTIONS))


def _posteriors(counts: Floats, logs: Floats, accuracy: float) -> Floats:
    """(n, C) the probability of each class, given the answers."""
    worth = math.log(accuracy * (counts.shape[1] - 1) / (1 - accuracy))
    logits = logs + worth * counts
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def most_asked_again(relabel: Relabel, size: int, labels: int, classes: int) -> int:
    """The largest number of items that are asked again in a batch of `size`, rounded half up.

    `labels`: the number of labels so far; `classes`: that of the schema's classes.
    """
    share = AUTO_SHARE * min(1.0, labels / (AUTO_LABELS * classes)) if relabel == "auto" else float(relabel)
    if not 0 <= share <= 1:
        raise ValueError(f"the share asked again must lie between 0 and 1, got {share}")
    return min(size, math.floor(size * share + 0.5))


class Labeled(NamedTuple):
    """Labelled items with people's answers, as `doubtful` takes them."""

    ids: Sequence[str]
    answers: ArrayLike
    """(n, C) how many people gave each class."""
    labels: ArrayLike
    """(n,) the class of each label."""
    open: Sequence[bool]
    """(n,) whether another person may be asked."""


def doubtful(labeled: Labeled, proba: ArrayLike, relabel: Relabel, size: int, seed: SeedSequence) -> Doubted:
    """The items to ask again in a batch of `size`: those whose label is wrong with WRONG or more, the highest first.

    `proba` (n, C): as in `label_risks`, which takes all items, open or not.
    """
    wrong = label_risks(labeled.answers, proba, labeled.labels).wrong
    open_ = np.flatnonzero(np.asarray(labeled.open, dtype=np.bool_))
    most = most_asked_again(relabel, size, *np.shape(proba))
    best = open_[top_k(wrong[open_], [labeled.ids[row] for row in open_], most, seed)]
    return [(labeled.ids[row], float(wrong[row])) for row in best if wrong[row] >= WRONG]


def spread(queries: Sequence[Query], again: Sequence[Query]) -> list[Query]:
    """Both lists as one, each in its order and spread evenly: half of the result holds half of either."""
    placed = [((2 * place + 1) / (2 * len(rows)), row) for rows in (queries, again) for place, row in enumerate(rows)]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]
