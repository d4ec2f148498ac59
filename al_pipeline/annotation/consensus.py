"""The consensus of the votes on each item: its class, the probability that this is right, and who is how often right.

Pure, and independent of the order of the votes. A model's probabilities may take part; they must have been made before
anybody voted on the item.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from al_pipeline.annotation.crowdlab import crowdlab
from al_pipeline.annotation.dawid_skene import (
    ACCURACY,
    FEWEST_PEOPLE,
    MOST_STEPS,
    TOLERANCE,
    has_probabilities,
    posterior_classes,
)
from al_pipeline.annotation.vote_arrays import Flags, Floats, Indices, VoteArrays, to_arrays
from al_pipeline.params import ConsensusName

Method = Literal["majority", "dawid_skene", "crowdlab"]
METHODS: tuple[Method, ...] = get_args(Method)

TIE = -1
"""The class of an item whose most probable classes are equally probable, and of one without votes."""
ANSWERS = 10.0
"""Answers with ACCURACY that are added to those of the majority."""
EQUAL = 1e-9
"""Probabilities that differ by less are equal."""


class Consensus(NamedTuple):
    """The result of `consensus_of`: n items, A annotators, C classes."""

    method: Method
    items: tuple[str, ...]
    """Their ids, in the order of the arrays."""
    classes: tuple[str, ...]
    label: Indices
    """(n,) numbers of classes, or TIE. A class that nobody gave is no label, however probable."""
    confidence: Floats
    """(n,) the probability that the label is right; of a tie, that of each of its classes."""
    posteriors: Floats
    """(n, C)"""
    annotators: tuple[str, ...]
    quality: Floats
    """(A,) the estimated share of an annotator's answers that are right."""

    given: Flags
    """(n, C) whether somebody gave the class."""

    def of(self, place: int) -> tuple[str | None, float]:
        """The class of the item at `place`, None if there is none, and its confidence."""
        label = int(self.label[place])
        return None if label == TIE else self.classes[label], float(self.confidence[place])


def consensus(
    votes: Iterable[tuple[str, str, str]],
    classes: Sequence[str],
    method: ConsensusName = "auto",
    proba: Mapping[str, Sequence[float]] | None = None,
) -> Consensus:
    """The consensus of votes (item, annotator, class), at most one for each item and annotator.

    `proba`: a model's probability of each class, by item id; items without votes and items that it lacks are allowed.
    Raises ValueError for a class that is unknown, or two votes of one annotator on an item.
    """
    arrays, items = to_arrays(votes, classes)
    model = None
    if proba:
        nothing = [np.nan] * len(classes)
        model = np.array([proba.get(item, nothing) for item in items], np.float64).reshape(-1, len(classes))
    return consensus_of(arrays, items, method, model)


def consensus_of(
    votes: VoteArrays, items: Sequence[str], method: ConsensusName = "auto", model: Floats | None = None
) -> Consensus:
    """The same for arrays. `model` (n, C): probabilities by item; rows of NaN where there are none."""
    if model is not None and np.isnan(model).all():
        model = None
    used = choose(votes, model) if method == "auto" else method
    given = np.zeros((len(items), len(votes.classes)), np.bool_)
    given[votes.item, votes.label] = True
    if used == "majority":
        posteriors, quality = _majority(votes, len(items))
        label, confidence = _best(given, posteriors)
    else:
        found = posterior_classes(votes, len(items), model)
        posteriors, weights = found.posteriors, found.answers + found.priors
        quality = np.asarray((weights * np.diagonal(found.rates, axis1=1, axis2=2)).sum(axis=1) / weights.sum(axis=1))
        label, confidence = _best(given, posteriors)
        if used == "crowdlab":  # its shares are no probabilities, so only the label is taken from it
            label, _ = _best(given, crowdlab(votes, len(items), model).posteriors)
            own = posteriors[np.arange(len(items)), np.maximum(label, 0)] if posteriors.size else confidence
            confidence = np.where(label == TIE, confidence, own)
    return Consensus(used, tuple(items), votes.classes, label, confidence, posteriors, votes.annotators, quality, given)


def tied_classes(found: Consensus, place: int) -> tuple[str, ...]:
    """The classes between which the item at `place` is tied."""
    shares = np.where(found.given[place], found.posteriors[place], 0.0)
    chosen = np.flatnonzero((shares > shares.max() - EQUAL) & found.given[place])
    if len(chosen) < 2:  # a tie of CROWDLAB's shares, not of the probabilities
        chosen = np.flatnonzero(found.given[place])
    return tuple(found.classes[number] for number in chosen)


def choose(votes: VoteArrays, model: Floats | None) -> Method:
    """The method that `auto` takes: error rates where they can be told, that is with three sources, else the majority.

    Sources are annotators who share items, and the model if it has probabilities for some of the items with votes.
    """
    told = votes.shared if model is None else votes.shared | has_probabilities(len(model), model)[votes.item]
    people = len(np.unique(votes.annotator[told]))
    return "dawid_skene" if people + (model is not None) >= FEWEST_PEOPLE else "majority"


def _best(given: Flags, posteriors: Floats) -> tuple[Indices, Floats]:
    """The most probable of the classes that were given for each item, or TIE, and its probability."""
    shares = np.where(given, posteriors, 0.0)
    most = shares.max(axis=1, initial=0.0)
    alone = ((shares > most[:, None] - EQUAL) & given).sum(axis=1) == 1
    label = np.where(alone, shares.argmax(axis=1) if shares.size else 0, TIE)
    return np.asarray(label, np.int64), np.asarray(most)


def _majority(votes: VoteArrays, items: int) -> tuple[Floats, Floats]:
    """The probability of each class if all annotators are right equally often, and how often that is.

    The most probable class is the one with the most votes. The accuracy is the one that explains best how people agree.
    """
    classes = len(votes.classes)
    counts = np.bincount(votes.item * classes + votes.label, minlength=items * classes).reshape(-1, classes)
    accuracy = _equal_accuracy(counts[counts.sum(axis=1) > 1]) if classes > 1 else 1.0
    shares = _as_accurate(counts, accuracy)
    return shares, np.full(len(votes.annotators), accuracy)


def _as_accurate(counts: Indices, accuracy: float) -> Floats:
    """(n, C) the probability of each class, given counts (n, C) of votes that are right as often as `accuracy`."""
    others = max(1, counts.shape[1] - 1)
    logits = counts * np.log(accuracy * others / max(1e-9, 1 - accuracy))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True, initial=0))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def _equal_accuracy(counts: Indices) -> float:
    """The accuracy that all annotators have together, by expectation maximisation on items with several votes."""
    accuracy, total = ACCURACY, float(counts.sum())
    for _ in range(MOST_STEPS):
        right = float((_as_accurate(counts, accuracy) * counts).sum())
        before, accuracy = accuracy, (right + ACCURACY * ANSWERS) / (total + ANSWERS)
        accuracy = min(max(accuracy, 1 / counts.shape[1] + 1e-3), 0.999)
        if abs(accuracy - before) < TOLERANCE:
            break
    return accuracy
