"""CROWDLAB (Goh, Tkachenko & Mueller 2022, arXiv 2210.06812): votes and a model's probabilities, as a weighted mean.

Each vote is a distribution over the classes too. A source's weight is how much fewer errors it makes, against the
consensus, than naming the most frequent class each time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from al_pipeline.annotation.dawid_skene import ACCURACY, has_probabilities
from al_pipeline.annotation.vote_arrays import Floats, Indices, VoteArrays

LEAST = 1e-6
"""The lowest weight, and the lowest share of errors that a weight is computed from."""


class Weighted(NamedTuple):
    """The result of `crowdlab`."""

    posteriors: Floats
    """(n, C) probability of each class; NaN for an item with neither votes nor probabilities."""
    weights: Floats
    """(A,) the annotators' weights."""
    model_weight: float
    certainty: float
    """Probability of the class given, in the distribution that a vote stands for."""
    agreement: Floats
    """(A,) share of other people's votes on an annotator's items that agree with the annotator's."""


def crowdlab(votes: VoteArrays, items: int, model: Floats | None = None) -> Weighted:
    """The probability of each class for all `items`. `model` (items, C): see `dawid_skene.posterior_classes`.

    Weights come from items with two votes or more. Without any, a vote is as certain as ACCURACY says, and weights come
    from all items. Annotators who share no item have the mean weight of the others.
    """
    people, classes = len(votes.annotators), len(votes.classes)
    counts = np.bincount(votes.item * classes + votes.label, minlength=items * classes).reshape(-1, classes)
    known = has_probabilities(items, model)
    proba = np.zeros((items, classes))
    if model is not None:
        proba[known] = model[known]
    answers = counts.sum(axis=1)
    consensus = _majority(counts, proba, model is not None)
    judged = answers > 1 if (answers > 1).any() else answers > 0
    certainty = ACCURACY
    agreement: Floats = np.full(people, ACCURACY)
    if (answers > 1).any():
        certainty = float((counts[judged, consensus[judged]] / answers[judged]).mean())
        agreement = _agreement(votes, counts, people)
    named = consensus[judged]
    usual = np.bincount(named, minlength=classes).argmax() if classes else 0
    errors = max(LEAST, float((named != usual).mean()) if len(named) else 1.0)
    weights = np.maximum(LEAST, 1 - (1 - agreement) / errors)
    compared = judged & known
    model_errors = float((proba[compared].argmax(axis=1) != consensus[compared]).mean()) if compared.any() else 0.0
    model_weight = (
        max(LEAST, 1 - model_errors / errors) * float(np.sqrt(answers[answers > 0].mean())) if known.any() else 0.0
    )
    given = np.bincount(votes.item * classes + votes.label, weights[votes.annotator], items * classes)
    given = given.reshape(-1, classes)
    total = given.sum(axis=1, keepdims=True)
    rest = (1 - certainty) / max(1, classes - 1)
    summed = given * certainty + (total - given) * rest + model_weight * proba
    total = total + model_weight * known[:, None]
    posteriors = np.divide(summed, total, out=np.full(summed.shape, np.nan), where=total > 0)
    return Weighted(posteriors, weights, model_weight, certainty, agreement)


def _majority(counts: Indices, proba: Floats, has_model: bool) -> Indices:
    """(n,) the class with the most votes; of equal ones the most probable, then the most frequent, then the first."""
    frequency = counts.sum(axis=0) / max(1, counts.sum())
    return np.asarray(
        (counts + 0.5 * proba + 1e-3 * frequency if has_model else counts + 0.5 * frequency).argmax(axis=1)
    )


def _agreement(votes: VoteArrays, counts: Indices, people: int) -> Floats:
    others = counts.sum(axis=1)[votes.item] - 1
    agreeing = counts[votes.item, votes.label] - 1
    met = np.bincount(votes.annotator, others, people)
    shares = np.divide(np.bincount(votes.annotator, agreeing, people), met, out=np.full(people, np.nan), where=met > 0)
    return np.where(np.isnan(shares), np.nanmean(shares), shares)
