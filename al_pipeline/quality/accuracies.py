"""Each annotator's accuracy with an interval, from the error rates of Dawid and Skene."""

from __future__ import annotations

import numpy as np

from al_pipeline.annotation.dawid_skene import FEWEST_PEOPLE, ErrorRates
from al_pipeline.evaluation.figures import Estimate
from al_pipeline.quality.agreement import CONFIDENCE, NO_OVERLAP
from al_pipeline.quality.answers import Votes


def enough_people(found: ErrorRates) -> bool:
    """Whether the rates mean anything: of two people who differ, it cannot be told who is wrong."""
    return int((found.answers.sum(axis=1) > 0).sum()) >= FEWEST_PEOPLE


def accuracies(votes: Votes, found: ErrorRates) -> list[Estimate]:
    """Each annotator's accuracy on the items that others answered too, with the interval of its posterior.

    The true class is unknown: it has the probabilities that the others' answers give it, t for the annotator's label.
    An annotator with accuracy p, whose errors fall equally on the other classes, gives that label with probability
    p t + (1 - p) (1 - t) / (C - 1). The posterior of p is their product over all answers, with a uniform prior.
    """
    votes = votes.where(votes.arrays.shared)
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
