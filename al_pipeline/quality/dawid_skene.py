"""Each annotator's error rates, estimated without known answers, by expectation maximisation (Dawid & Skene 1979).

Deterministic: it starts from the share of answers for each class. Only items with answers of two people or more enter,
since one answer says nothing about the accuracy of whoever gave it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from al_pipeline.evaluation.figures import Estimate
from al_pipeline.quality.agreement import CONFIDENCE, NO_OVERLAP
from al_pipeline.quality.answers import Floats, Indices, Votes

PRIOR = 1.0
"""Answers that are added to each row of a matrix: half of them right, the other half equally among the other classes.

With few answers a row stays near them, and no probability is 0.
"""
FEWEST_PEOPLE = 3
"""Nothing can be told of fewer annotators who share items."""
MOST_STEPS = 200
TOLERANCE = 1e-5

_BLOCK = 4_000_000
"""Number of cells of a dense table in memory at a time."""


class ErrorRates(NamedTuple):
    """The result of `dawid_skene`."""

    priors: Floats
    """(C,) shares of the classes."""
    rates: Floats
    """(A, C, C) probability that an annotator gives the class of the column to an item of the class of the row."""
    answers: Floats
    """(A, C) expected number of an annotator's answers to items of each class."""
    posteriors: Floats
    """(n, C) probability of each class, by item of `items`."""
    items: Indices
    """(n,) the items with two answers or more."""


def dawid_skene(votes: Votes, prior: float = PRIOR) -> ErrorRates:
    """Estimate shares of classes, error rates and true classes from `votes` without skips."""
    votes = _overlapping(votes)
    people, classes = len(votes.annotators), len(votes.classes)
    items, row = np.unique(votes.item, return_inverse=True)
    column = votes.annotator * classes + votes.label
    cells = csr_matrix((np.ones(len(row)), (row, column)), (len(items), people * classes))
    added = prior_answers(classes, prior)
    answers = np.bincount(row * classes + votes.label, minlength=len(items) * classes).reshape(-1, classes)
    posteriors = answers / answers.sum(axis=1, keepdims=True) if len(items) else np.empty((0, classes))
    priors, rates, given = _maximise(cells, posteriors, added, people)
    for _ in range(MOST_STEPS):
        posteriors = _expect(cells, priors, rates)
        before = rates
        priors, rates, given = _maximise(cells, posteriors, added, people)
        if np.abs(rates - before).max(initial=0) < TOLERANCE:
            break
    return ErrorRates(priors, rates, given, posteriors, items)


def prior_answers(classes: int, prior: float = PRIOR) -> Floats:
    """(C, C) the answers that are added to counts by true class and class given, see PRIOR."""
    added = np.full((classes, classes), prior / 2 / max(1, classes - 1))
    np.fill_diagonal(added, prior / 2 if classes > 1 else prior)
    return added


def _overlapping(votes: Votes) -> Votes:
    """The answers to items with two or more."""
    return votes.where(np.bincount(votes.item)[votes.item] > 1) if len(votes.item) else votes


def _maximise(cells: csr_matrix, posteriors: Floats, added: Floats, people: int) -> tuple[Floats, Floats, Floats]:
    """Shares of classes (C,), error rates (A, C, C), and expected answers by annotator and class (A, C)."""
    classes = posteriors.shape[1]
    given = (cells.T @ posteriors).reshape(people, classes, classes).transpose(0, 2, 1)
    totals = (given + added).sum(axis=2, keepdims=True)
    rates = np.divide(given + added, totals, out=np.full(given.shape, 1 / classes), where=totals > 0)
    counts = posteriors.sum(axis=0)
    return counts / max(1.0, counts.sum()), rates, given.sum(axis=2)


def _expect(cells: csr_matrix, priors: Floats, rates: Floats) -> Floats:
    """(n, C) the posteriors, a block of items at a time."""
    people, classes, _ = rates.shape
    by_cell = _log(rates).transpose(0, 2, 1).reshape(people * classes, classes)
    step = max(1, _BLOCK // classes)
    blocks = [
        _softmax(cells[start : start + step] @ by_cell + _log(priors)) for start in range(0, cells.shape[0], step)
    ]
    return np.concatenate(blocks) if blocks else np.empty((0, classes))


def _log(values: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(values, 1e-300)))


def _softmax(logits: Floats) -> Floats:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def enough_people(found: ErrorRates) -> bool:
    """Whether the rates mean anything: of two people who differ, it cannot be told who is wrong."""
    return int((found.answers.sum(axis=1) > 0).sum()) >= FEWEST_PEOPLE


def accuracies(votes: Votes, found: ErrorRates) -> list[Estimate]:
    """Each annotator's accuracy on the items that others answered too, with the interval of its posterior.

    The true class is unknown: it has the probabilities that the others' answers give it, t for the annotator's label.
    An annotator with accuracy p, whose errors fall equally on the other classes, gives that label with probability
    p t + (1 - p) (1 - t) / (C - 1). The posterior of p is their product over all answers, with a uniform prior.
    """
    votes = _overlapping(votes)
    classes = len(votes.classes)
    if not enough_people(found):
        reason = NO_OVERLAP if not len(found.items) else "fewer than three people share items"
        return [Estimate(value=None, reason=reason)] * len(votes.annotators)
    if classes < 2:
        return [Estimate(value=None, reason="there is a single class")] * len(votes.annotators)
    grid = (np.arange(400) + 0.5) / 400
    row = np.searchsorted(found.items, votes.item)
    estimates = []
    for person in range(len(votes.annotators)):
        mine = np.flatnonzero(votes.annotator == person)
        if not len(mine):
            estimates.append(Estimate(value=None, reason=NO_OVERLAP))
            continue
        likelihood = np.zeros(len(grid))
        for start in range(0, len(mine), 10_000):
            some = mine[start : start + 10_000]
            label = votes.label[some]
            own = found.rates[person][:, label].T
            others = found.posteriors[row[some]] / np.maximum(own, 1e-300)
            certain = others[np.arange(len(some)), label] / others.sum(axis=1)
            likelihood += np.log(np.outer(certain, grid) + np.outer((1 - certain) / (classes - 1), 1 - grid)).sum(
                axis=0
            )
        weights = np.exp(likelihood - likelihood.max())
        below = np.cumsum(weights) / weights.sum()
        low, high = (float(grid[np.searchsorted(below, part)]) for part in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        value = float(grid @ weights / weights.sum())
        estimates.append(Estimate(value=value, low=min(low, value), high=max(high, value)))
    return estimates
