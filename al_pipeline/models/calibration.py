"""Calibration on held-out folds: temperature scaling (Guo et al. 2017) and a shift for each class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from al_pipeline.models.probabilities import Floats, class_weights, log_softmax

FOLDS = 5
MIN_CALIBRATION = 20
"""With fewer held-out predictions there is no calibration."""
_TEMPERATURES = (0.2, 5.0)
_SHIFT_PRIOR = 1.0
"""Precision of the Gaussian prior on log temperature and shifts (mean 0)."""
_SHIFT_BALANCE = 0.5
"""Exponent of the class weights in the calibration. 1 would predict rare classes far too often, 0 hardly ever."""


def fit_temperature_and_shift(
    held_out: Sequence[tuple[NDArray[np.intp], Floats]], targets: NDArray[np.intp], classes: int
) -> tuple[float, tuple[float, ...]]:
    """The temperature (Guo et al. 2017) and the class shifts that maximise the likelihood of held-out labels.

    `held_out`: for each fold the held-out rows and their logits (rows, classes), -inf for a class that the fold's fit
    did not know. Returns 1 and no shifts if fewer than MIN_CALIBRATION labels are held out. Unseen texts of a rare
    class score lower than those that the fit has memorised; the shift corrects that if there is evidence.
    """
    if sum(len(test) for test, _ in held_out) < MIN_CALIBRATION:
        return 1.0, ()
    from scipy.optimize import minimize

    rows = np.concatenate([test for test, _ in held_out])
    logits, found = np.concatenate([part for _, part in held_out]), targets[rows]
    importance = class_weights(targets, classes)[rows] ** _SHIFT_BALANCE
    importance /= importance.mean()
    known_logits = np.where(np.isinf(logits), 0.0, logits)

    def loss(flat: Floats) -> tuple[float, Floats]:
        """The loss and its gradient with respect to the negative log temperature and the shifts."""
        scale = math.exp(flat[0])
        log_proba = log_softmax(logits * scale + flat[1:])
        value = -(importance * log_proba[np.arange(len(found)), found]).sum() + _SHIFT_PRIOR * (flat**2).sum() / 2
        error = np.exp(log_proba)
        error[np.arange(len(found)), found] -= 1
        error *= importance[:, None]
        slopes = np.concatenate([[scale * (error * known_logits).sum()], error.sum(axis=0)]) + _SHIFT_PRIOR * flat
        return float(value), slopes

    low, high = (-math.log(value) for value in reversed(_TEMPERATURES))
    bounds = [(low, high), *[(None, None)] * classes]
    best = minimize(loss, np.zeros(classes + 1), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(np.float32(math.exp(-best[0]))), tuple(float(np.float32(value)) for value in best[1:])


def fit_temperature(held_out: Sequence[tuple[Floats, NDArray[np.intp]]]) -> float:
    """The temperature that maximises the likelihood of held-out labels (Guo et al. 2017).

    `held_out`: for each fold the logits (n, classes) and the true classes (n,). Returns 1 if fewer than
    MIN_CALIBRATION labels are held out.
    """
    if sum(len(found) for _, found in held_out) < MIN_CALIBRATION:
        return 1.0
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return sum(
            -float(log_softmax(logits / math.exp(log_temperature))[np.arange(len(found)), found].sum())
            for logits, found in held_out
        )

    low, high = (math.log(value) for value in _TEMPERATURES)
    return float(np.float32(math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)))


def calibration_folds(
    targets: NDArray[np.intp], seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]]:
    """For each fold: rows to fit on, held-out rows, and the classes of the rows to fit on.

    Held-out rows of other classes are left out. Folds with one class to fit on, or without held-out rows, are skipped.
    """
    for train, test in stratified_folds(targets, FOLDS, seed):
        known = np.unique(targets[train])
        test = test[np.isin(targets[test], known)]
        if len(known) >= 2 and len(test):
            yield train, test, known


def stratified_folds(
    targets: NDArray[np.intp], folds: int, seed: int
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Rows to fit on and held-out rows of each fold; each class is spread evenly over the folds."""
    rng = np.random.default_rng([seed, 0xF01D])
    shuffled = rng.permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    dealt = np.empty(len(targets), np.intp)
    dealt[by_class] = np.arange(len(targets)) % folds
    return [(np.flatnonzero(dealt != fold), np.flatnonzero(dealt == fold)) for fold in range(folds)]
