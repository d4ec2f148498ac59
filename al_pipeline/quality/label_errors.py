"""Likely label errors: the probability that a label is wrong, from a model that was fitted without it.

A low out-of-sample probability of the given label is the evidence (Chong, Hong & Manning 2022). What it is worth
depends on the class: people who overlook one class give another one for it. So the rates T (C, C) at which the label j
is given for the true class k are estimated with the errors, by expectation maximisation; the model's probabilities p
(n, C) of the true class stay as they are. An item with label j has the true class k with a probability proportional to
p_k T_kj.

A model that expects a class too rarely looks as if people overlooked others. So rates that differ between classes must
explain the labels better than equal rates do with the model's frequencies of classes corrected (Saerens et al. 2002).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from al_pipeline.annotation.vote_arrays import Floats, Indices

_ITERATIONS = 60
_LEAST = 1e-12
"""Floor of probabilities, so that a label that the model excludes has a finite likelihood."""
_SHRINKAGE = 3.0
"""Each row of T is estimated with this many further labels, with the rates of equally frequent errors."""
_RATE_PRIOR = (1.0, 10.0)
"""The rate of errors is estimated with this many further errors, and this many further labels."""


def error_probability(proba: Floats, given: Indices) -> Floats:
    """(n,) the probability that each label is wrong; 0 where `proba` is NaN.

    `proba` (n, C): probabilities of the classes by a model fitted without the item; `given` (n,): the labels, as
    columns. Errors that are equally frequent in all classes are assumed, with which the order is that of p alone,
    unless the labels speak against it: T has its C (C - 1) rates if they raise the log-likelihood by more than equal
    rates would by chance, namely the likelihood ratio's mean and one standard deviation more.
    """
    proba, given = np.asarray(proba, np.float64), np.asarray(given)
    found = np.zeros(len(given))
    usable = np.flatnonzero(~np.isnan(proba).any(axis=1))
    usable = usable[np.argsort(given[usable], kind="stable")]
    classes = proba.shape[1]
    if not len(usable) or classes < 2:
        return found
    p, labels = np.maximum(proba[usable], _LEAST), given[usable]
    equal, equal_likelihood = _fit(p, labels)
    _, shifted_likelihood = _fit(p, labels, shifted=True)
    differing, likelihood = _fit(p, labels, by_class=True)
    ratio, freedom = 2 * (likelihood - max(equal_likelihood, shifted_likelihood)), classes * (classes - 1)
    found[usable] = differing if ratio > freedom + (2 * freedom) ** 0.5 else equal
    return found


def error_probabilities(proba: Floats, labels: Sequence[str], classes: Sequence[str]) -> list[float]:
    """`error_probability` of labels by name; 0 for those that are no class."""
    places = {name: place for place, name in enumerate(classes)}
    given = np.array([places.get(label, -1) for label in labels], dtype=np.int64)
    found = np.zeros(len(given))
    found[given >= 0] = error_probability(proba[given >= 0], given[given >= 0])
    return [float(one) for one in found]


def _fit(p: Floats, labels: Indices, *, by_class: bool = False, shifted: bool = False) -> tuple[Floats, float]:
    """The probabilities of errors (n,), and the log-likelihood of the labels, which must be sorted.

    `by_class`: with rates for each pair of classes. `shifted`: with the frequencies of the classes in `p` corrected.
    """
    count, classes = p.shape
    rates, counts = _equal_rates(0.1, classes), np.zeros((classes, classes))
    present, starts = np.unique(labels, return_index=True)
    expected, q = p.sum(axis=0), p
    for _ in range(_ITERATIONS):
        joint = q * rates[:, labels].T
        true = joint / joint.sum(axis=1, keepdims=True)
        counts[:, present] = np.add.reduceat(true, starts, axis=0).T
        share = (count - np.trace(counts) + _RATE_PRIOR[0]) / (count + _RATE_PRIOR[1])
        rates = _equal_rates(share, classes)
        if by_class:
            rates = (counts + _SHRINKAGE * rates) / (counts.sum(axis=1, keepdims=True) + _SHRINKAGE)
        if shifted:
            q = p * (true.sum(axis=0) + 1) / (expected + 1)
            q = q / q.sum(axis=1, keepdims=True)
    joint = q * rates[:, labels].T
    total = joint.sum(axis=1)
    return 1 - joint[np.arange(count), labels] / total, float(np.log(total).sum())


def _equal_rates(share: float, classes: int) -> Floats:
    """(C, C) the rates if a share of the labels is wrong, each other class equally often."""
    rates = np.full((classes, classes), share / (classes - 1))
    np.fill_diagonal(rates, 1 - share)
    return rates
