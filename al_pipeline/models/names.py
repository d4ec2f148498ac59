"""The names and descriptions of classes as a prior of the linear head.

Each class has a prototype, the mean vector of its name, description and examples (`features/names.py`). The prior is
the centre of the L2 penalty: the weights of a class are drawn to a multiple of its prototype, not to 0. The labels thus
override the prior as they become more. The multiple, the *weight*, is chosen on held-out labels; 0 is among the choices
and is then, to the byte, the head without names.

A class without labels gets its prototype as weights, so that it can be predicted, and has as much probability as
without names where a text is as similar to its prototype as to those of other classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from al_pipeline.models.calibration import FOLDS, fit_temperature_and_shift, stratified_folds
from al_pipeline.models.feature_matrix import FeatureMatrix, Floats, row_products
from al_pipeline.models.linear import STRENGTH, Head, NamesOfHead, fit_head
from al_pipeline.models.probabilities import class_weights, count_classes, log_softmax
from al_pipeline.models.softmax import Parts, compact, fit_softmax, held_out_logits, logits_of
from al_pipeline.threads import one_thread

Prototypes = NDArray[np.float32]
"""A unit vector for each class of the schema, (C, d)."""

WEIGHTS = (0.0, 2.5, 5.0, 10.0, 20.0)
"""The choices of the weight: the logit that a cosine of 1 adds."""
_USUAL = 5.0
_DOUBT = 1.0
"""The prior on the weight, in nats: by how much names have to reduce the held-out loss to be used at all. A weight of
four times `_USUAL`, or a quarter of it, has to reduce it by half more. This matters less as labels become more."""
_MOST = 400
"""With more labels the weight is chosen on a random sample of them, to save time."""
_TEMPERATURES = np.exp(np.linspace(np.log(0.2), np.log(3.0), 15))
_BALANCE = 0.5
"""Exponent of the class weights in the held-out loss, as in the calibration."""


def fit_head_with_names(
    features: FeatureMatrix,
    labels: Sequence[str],
    classes: Sequence[str],
    seed: int,
    calibrate: bool,
    prototypes: Prototypes,
    weight: float | None = None,
) -> Head:
    """Fit a linear head that knows the names of the classes. `weight`: None to choose it on held-out labels.

    With labels of fewer than two classes it is the head without names. Raises BadInput if a label is not a class,
    ValueError if the features have no vectors, or vectors of another width than the prototypes.
    """
    if features.dense is None or features.dense.shape[1] != prototypes.shape[1]:
        raise ValueError("names need the encoder's vectors, of the width of the prototypes")
    counts, targets = count_classes(labels, classes)
    if len(counts) >= 2:
        with one_thread():
            cosines = row_products(features.dense.astype(np.float64), prototypes.astype(np.float64))
            columns = np.array([list(classes).index(name) for name in counts], np.intp)
            if weight is None:
                weight = choose_weight(features, targets, columns, cosines, seed)
            if weight > 0:
                return _fit(features, targets, columns, cosines, classes, counts, seed, calibrate, prototypes, weight)
    head = fit_head(features, labels, classes, seed, calibrate)
    return replace(head, names=NamesOfHead(0.0, None))


def _fit(
    features: FeatureMatrix,
    targets: NDArray[np.intp],
    columns: NDArray[np.intp],
    cosines: Floats,
    classes: Sequence[str],
    counts: dict[str, int],
    seed: int,
    calibrate: bool,
    prototypes: Prototypes,
    weight: float,
) -> Head:
    seen = len(counts)
    prior = _centred(cosines, weight)
    blocks, restore = compact(features, seen)
    parts = Parts(blocks)
    fit = fitted, bias = fit_softmax(parts, targets, seen, STRENGTH, prior[:, columns])
    held_out = held_out_logits(parts, targets, seen, STRENGTH, seed, fit, prior[:, columns]) if calibrate else []
    temperature, shift = fit_temperature_and_shift(held_out, targets, seen)
    logits = logits_of(blocks, fitted, bias + prior[:, columns])
    whole_bias = np.full(len(classes), _unseen_bias(logits, prior, columns))
    whole_bias[columns] = bias
    whole_bias -= weight * cosines.mean(axis=0)
    weights = []
    for number, part in enumerate(restore(fitted)):
        whole = np.zeros((len(classes), part.shape[0]))
        whole[columns] = part.T
        if number == 0:
            whole += weight * prototypes
        weights.append(np.ascontiguousarray(whole, np.float32))
    shifts = np.zeros(len(classes) if shift else 0)
    shifts[columns if shift else []] = shift
    return Head(
        tuple(classes),
        {name: counts.get(name, 0) for name in classes},
        tuple(weights),
        whole_bias.astype(np.float32),
        temperature,
        features.widths,
        tuple(shifts.tolist()),
        NamesOfHead(weight, prototypes),
    )


def choose_weight(
    features: FeatureMatrix, targets: NDArray[np.intp], columns: NDArray[np.intp], cosines: Floats, seed: int
) -> float:
    """The weight with the smallest loss on held-out stratified folds; deterministic for a seed.

    `targets` (n,): class indices from 0 to S - 1; `columns` (S,): their columns in `cosines`, (n, C). The loss of a
    weight is that with its best temperature, since a prior also makes predictions sharper.
    """
    if len(targets) > _MOST:
        rows = np.sort(np.random.default_rng([seed, 0x4A3E]).choice(len(targets), _MOST, replace=False))
        kept = np.unique(targets[rows])
        targets, columns = np.searchsorted(kept, targets[rows]), columns[kept]
        features, cosines = features.rows(rows), cosines[rows]
    importance = class_weights(targets, len(columns)) ** _BALANCE
    importance /= importance.mean()
    blocks, _ = compact(features, len(columns))
    folds = [
        fold for fold in stratified_folds(targets, FOLDS, seed) if len(fold[1]) and len(np.unique(targets[fold[0]])) > 1
    ]
    losses = []
    for weight in WEIGHTS:
        loss = _TEMPERATURES * 0.0
        for train, test in folds:
            known, own = np.unique(targets[train]), _centred(cosines, weight, train)
            offset = own[np.ix_(train, columns[known])] if weight else None
            fitted, bias = fit_softmax(
                [block[train] for block in blocks], np.searchsorted(known, targets[train]), len(known), STRENGTH, offset
            )
            logits = logits_of(blocks, fitted, bias + own[:, columns[known]])
            whole = np.array(own)
            whole[:] += _unseen_bias(logits[train], own[train], columns[known])
            whole[:, columns[known]] = logits
            rows, found = np.arange(len(test)), columns[targets[test]]
            for place, temperature in enumerate(_TEMPERATURES):
                log_proba = log_softmax(whole[test] / temperature)[rows, found]
                loss[place] -= (importance[test] * log_proba).sum()
        losses.append((loss + np.log(_TEMPERATURES) ** 2 / 2).min() + _doubt(weight))
    return WEIGHTS[int(np.argmin(losses))]


def _doubt(weight: float) -> float:
    return 0.0 if weight == 0 else _DOUBT * (1 + (float(np.log(weight / _USUAL)) / float(np.log(4))) ** 2 / 2)


def _centred(cosines: Floats, weight: float, rows: NDArray[np.intp] | slice = slice(None)) -> Floats:
    """The prior's logits, (n, C), with mean 0 over `rows` in each class: some prototypes are similar to any text."""
    return np.asarray(weight * (cosines - cosines[rows].mean(axis=0)), np.float64)


def _unseen_bias(logits: Floats, prior: Floats, columns: NDArray[np.intp]) -> float:
    """The bias of a class without labels, given the logits (n, S) of the others and all prior logits, (n, C)."""
    return float(
        (_log_sum(logits) - _log_sum(prior[:, columns])).mean() + np.log(len(columns) / (len(logits) + len(columns)))
    )


def _log_sum(logits: Floats) -> Floats:
    highest = logits.max(axis=1)
    return np.asarray(highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1)), np.float64)
