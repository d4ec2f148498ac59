"""Each annotator's error rates, estimated without known answers, by expectation maximisation (Dawid & Skene 1979).

Deterministic: it starts from the share of answers for each class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from al_pipeline.annotation.vote_arrays import Flags, Floats, Indices, VoteArrays

PRIOR = 1.0
"""Answers that are added to each row of a matrix: half of them right, the other half equally among the other classes.

With few answers a row stays near them, and no probability is 0.
"""
FEWEST_PEOPLE = 3
"""Nothing can be told of fewer annotators who share items."""
ACCURACY = 0.85
"""Accuracy of an annotator of whom nothing is known."""
TEAM_ANSWERS = 10.0
"""Answers with this accuracy that are added to the team's, for each class."""
TEAM_ERRORS = 1.0
"""Errors of each kind that are added to the team's: with few answers, errors fall equally on the other classes."""
OWN_ANSWERS = 10.0
"""Answers with the team's accuracy that are added to each annotator's, for the accuracy over all classes."""
OWN_OF_CLASS = 40.0
"""Answers like the team's with that accuracy that are added to each annotator's, for each class."""
MODEL_PRECISION = 20.0
"""How firmly the model's probabilities are believed as they are: the precision of the exponent's prior, around 1."""
MOST_STEPS = 200
TOLERANCE = 1e-5

_BLOCK = 4_000_000
"""Number of cells of a dense table in memory at a time."""
_CACHED = 200_000
"""Number of cells of a dense table that stay in the processor's cache."""
_SMALLEST = 1e-6


class ErrorRates(NamedTuple):
    """The result of `dawid_skene` and `posterior_classes`."""

    priors: Floats
    """(C,) shares of the classes."""
    rates: Floats
    """(A, C, C) probability that an annotator gives the class of the column to an item of the class of the row."""
    answers: Floats
    """(A, C) expected number of an annotator's answers to items of each class."""
    posteriors: Floats
    """(n, C) probability of each class, by item of `items`."""
    items: Indices
    """(n,) numbers of the items that were used."""


def dawid_skene(votes: VoteArrays, prior: float = PRIOR) -> ErrorRates:
    """Estimate shares of classes, error rates and true classes from the items with two votes or more.

    One vote says nothing about the accuracy of whoever gave it.
    """
    votes = votes.where(votes.shared)
    people, classes = len(votes.annotators), len(votes.classes)
    items, row = np.unique(votes.item, return_inverse=True)
    cells = _cells(votes, row, len(items))
    added = prior_answers(classes, prior)
    posteriors = _shares(row, votes.label, len(items), classes)

    def maximise(posteriors: Floats) -> tuple[Floats, Floats, Floats]:
        given = _given(cells, posteriors, people)
        totals = (given + added).sum(axis=2, keepdims=True)
        rates = np.divide(given + added, totals, out=np.full(given.shape, 1 / classes), where=totals > 0)
        counts = posteriors.sum(axis=0)
        return counts / max(1.0, counts.sum()), rates, given.sum(axis=2)

    def expect(priors: Floats, rates: Floats) -> Floats:
        return _expect(cells, _log(priors), rates)

    return ErrorRates(*_iterate(posteriors, maximise, expect), items)


def posterior_classes(votes: VoteArrays, items: int, model: Floats | None = None) -> ErrorRates:
    """The probability of each class for all `items`, with error rates that few answers suffice for.

    `model` (items, C): a model's probabilities, made without the votes; rows of NaN where there are none. They are the
    prior of an item's class, raised to a power that the votes determine; other items have the shares of the classes.

    An annotator's rates are drawn towards the team's with the annotator's own accuracy, and the team's towards
    ACCURACY. All votes enter, also those on items without another one: whether an item gets another vote can depend on
    the first one (adaptive overlap), and shared items alone would then tell of the wrong people. With fewer than three
    sources (annotators who share items, and the model) all annotators have the team's rates: of two who differ, it
    cannot be told who is wrong.
    """
    people, classes = len(votes.annotators), len(votes.classes)
    cells = _cells(votes, votes.item, items)
    known = has_probabilities(items, model)
    told = known.copy()
    told[votes.item[votes.shared]] = True
    base = np.zeros((items, classes))
    if model is not None:
        base[known] = _log(np.maximum(model[known], _SMALLEST))
    sources = len(np.unique(votes.annotator[told[votes.item]])) + bool(known.any())
    apart = sources >= FEWEST_PEOPLE
    power = 1.0

    def maximise(posteriors: Floats) -> tuple[Floats, Floats, Floats]:
        nonlocal power
        power = _power(base[known], posteriors[known], power)
        given = _given(cells, posteriors, people)
        counts = posteriors.sum(axis=0) + 1
        return counts / counts.sum(), _drawn(given, apart), given.sum(axis=2)

    def expect(priors: Floats, rates: Floats) -> Floats:
        return _expect(cells, np.where(known[:, None], power * base, _log(priors)), rates)

    start = _shares(votes.item, votes.label, items, classes, ACCURACY)
    start = np.where(known[:, None], _softmax(_log(start) + base), start)
    return ErrorRates(*_iterate(start, maximise, expect), np.arange(items))


def has_probabilities(items: int, model: Floats | None) -> Flags:
    """(items,) whether the model has probabilities for an item."""
    return np.zeros(items, np.bool_) if model is None else np.asarray(np.isfinite(model).all(axis=1))


def prior_answers(classes: int, prior: float = PRIOR) -> Floats:
    """(C, C) the answers that are added to counts by true class and class given, see PRIOR."""
    return prior * _symmetric(classes, 0.5)


def _symmetric(classes: int, accuracy: float) -> Floats:
    """(C, C) the rates of somebody with this accuracy in each class, whose errors fall equally on the others."""
    rates = np.full((classes, classes), (1 - accuracy) / max(1, classes - 1))
    np.fill_diagonal(rates, accuracy if classes > 1 else 1.0)
    return rates


def _drawn(given: Floats, apart: bool) -> Floats:
    """(A, C, C) rates from expected answers by annotator, true class and class given, drawn towards the team's."""
    classes = given.shape[1]
    pooled = given.sum(axis=0)
    team = pooled + TEAM_ANSWERS * _symmetric(classes, ACCURACY)
    wrong = pooled + TEAM_ERRORS
    np.fill_diagonal(wrong, 0)
    usual = np.clip(np.diag(team) / team.sum(axis=1), _SMALLEST, 1 - _SMALLEST)
    team = wrong / np.maximum(_SMALLEST, wrong.sum(axis=1, keepdims=True)) * (1 - usual)[:, None]
    np.fill_diagonal(team, usual)
    if not apart or classes < 2:
        return np.broadcast_to(team, given.shape).copy()
    seen, right = given.sum(axis=2), np.diagonal(given, axis1=1, axis2=2)
    expected = (seen @ usual + OWN_ANSWERS * usual.mean()) / (seen.sum(axis=1) + OWN_ANSWERS)
    own = (right.sum(axis=1) + OWN_ANSWERS * expected) / (seen.sum(axis=1) + OWN_ANSWERS)
    odds = np.log(usual / (1 - usual)) + (_logit(own) - _logit(expected))[:, None]
    diagonal = 1 / (1 + np.exp(-odds))
    drawn = team * ((1 - diagonal) / (1 - usual))[:, :, None]
    drawn[:, np.arange(classes), np.arange(classes)] = diagonal
    return np.asarray((given + OWN_OF_CLASS * drawn) / (seen + OWN_OF_CLASS)[:, :, None])


def _logit(shares: Floats) -> Floats:
    shares = np.clip(shares, _SMALLEST, 1 - _SMALLEST)
    return np.asarray(np.log(shares / (1 - shares)))


def _power(base: Floats, posteriors: Floats, power: float) -> float:
    """One step of Newton's method towards the exponent of the model's probabilities that fits `posteriors` best."""
    if not len(base):
        return power
    slope, curvature = MODEL_PRECISION * (1 - power), MODEL_PRECISION
    for start, end in _blocks(*base.shape):
        logs, shares = base[start:end], _softmax(power * base[start:end])
        mean = (shares * logs).sum(axis=1)
        slope += float((posteriors[start:end] * logs).sum() - mean.sum())
        curvature += float((shares * logs**2).sum() - (mean**2).sum())
    return float(np.clip(power + slope / curvature, 0.0, 3.0))


def _iterate(
    posteriors: Floats,
    maximise: Callable[[Floats], tuple[Floats, Floats, Floats]],
    expect: Callable[[Floats, Floats], Floats],
) -> tuple[Floats, Floats, Floats, Floats]:
    """Alternate the two steps until the rates stay: shares of classes, rates, answers, posteriors."""
    priors, rates, answers = maximise(posteriors)
    for _ in range(MOST_STEPS):
        posteriors = expect(priors, rates)
        before = rates
        priors, rates, answers = maximise(posteriors)
        if np.abs(rates - before).max(initial=0) < TOLERANCE:
            break
    return priors, rates, answers, posteriors


def _cells(votes: VoteArrays, row: Indices, rows: int) -> csr_matrix:
    """(rows, A * C) which annotator gave which class."""
    column = votes.annotator * len(votes.classes) + votes.label
    return csr_matrix((np.ones(len(row)), (row, column)), (rows, len(votes.annotators) * len(votes.classes)))


def _shares(row: Indices, label: Indices, rows: int, classes: int, certain: float = 1.0) -> Floats:
    """(rows, C) the share of each class in an item's votes; `certain`: how much of it is believed."""
    counts = np.bincount(row * classes + label, minlength=rows * classes).reshape(-1, classes).astype(np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, 1 / max(1, classes)), where=totals > 0)
    return np.asarray(certain * shares + (1 - certain) / max(1, classes))


def _given(cells: csr_matrix, posteriors: Floats, people: int) -> Floats:
    """(A, C, C) the expected answers by annotator, true class and class given."""
    classes = posteriors.shape[1]
    return np.asarray((cells.T @ posteriors).reshape(people, classes, classes).transpose(0, 2, 1))


def _expect(cells: csr_matrix, base: Floats, rates: Floats) -> Floats:
    """(n, C) the posteriors, a block of items at a time. `base`: logarithms of priors, (C,) or (n, C)."""
    people, classes, _ = rates.shape
    by_cell = _log(rates).transpose(0, 2, 1).reshape(people * classes, classes)
    posteriors = np.empty((cells.shape[0], classes))
    step = max(1, _CACHED // max(1, classes))
    for start in range(0, len(posteriors), step):
        block = cells[start : start + step] @ by_cell
        block += base if base.ndim == 1 else base[start : start + step]
        block -= block.max(axis=1, keepdims=True)
        np.exp(block, out=block)
        np.divide(block, block.sum(axis=1, keepdims=True), out=posteriors[start : start + step])
    return posteriors


def _blocks(rows: int, classes: int) -> list[tuple[int, int]]:
    step = max(1, _BLOCK // max(1, classes))
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def _log(values: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(values, 1e-300)))


def _softmax(logits: Floats) -> Floats:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))
