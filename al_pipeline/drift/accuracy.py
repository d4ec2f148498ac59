"""Accuracy without labels: confidence-based performance estimation (CBPE; Guillory et al. 2021).

Of texts that are predicted with a calibrated probability of 0.9, nine in ten are predicted correctly; so the expected
accuracy is the mean of the probabilities. This holds as long as the calibration does: it cannot show that the meaning
of the classes has changed, nor that the model is too sure of texts of a kind that it has never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from al_pipeline.drift.permutations import Floats
from al_pipeline.evaluation.figures import Estimate

LEAST_LABELS = 30
"""Labelled test items without which no accuracy is estimated."""
_PRIOR = np.array([0.0, 1.0])
_PRIOR_SPREAD = np.array([1.0, 0.5])
_Z = 1.96
_STEPS = 50


@dataclass(frozen=True)
class Calibration:
    """P(correct) as a logistic function of the logit of the largest probability (Platt 1999), fitted on random labels.

    The prior says that the probabilities are calibrated as they are.
    """

    coefficients: Floats
    """Intercept and slope, (2,)."""
    covariance: Floats
    """Of the coefficients, by Laplace's approximation, (2, 2)."""
    labels: int


def calibrate(proba: NDArray[np.floating], truth: NDArray[np.intp]) -> Calibration:
    """Fit it on probabilities (n, C) of items that the model was not trained on, and their classes (n,) as indices."""
    design, right = _design(proba), (proba.argmax(axis=1) == truth).astype(np.float64)
    precision, coefficients = np.diag(_PRIOR_SPREAD**-2), _PRIOR.copy()
    for _ in range(_STEPS):
        expected = _sigmoid(design @ coefficients)
        gradient = design.T @ (right - expected) - precision @ (coefficients - _PRIOR)
        curvature = (design * (expected * (1 - expected))[:, None]).T @ design + precision
        step = np.linalg.solve(curvature, gradient)
        coefficients = coefficients + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-9:
            break
    return Calibration(coefficients, np.linalg.inv(curvature), len(truth))


def estimated_accuracy(proba: NDArray[np.floating], calibration: Calibration) -> Estimate:
    """The expected accuracy on texts with probabilities (n, C), and a 95 % interval for their true accuracy.

    The interval covers the calibration's own error, and that these are n texts and not all that could have come.
    """
    if calibration.labels < LEAST_LABELS:
        return Estimate(
            value=None,
            reason=f"{calibration.labels} test items are labelled; calibration needs {LEAST_LABELS} random labels",
        )
    design = _design(proba)
    expected = _sigmoid(design @ calibration.coefficients)
    slope = (design * (expected * (1 - expected))[:, None]).mean(axis=0)
    variance = slope @ calibration.covariance @ slope + (expected * (1 - expected)).sum() / len(expected) ** 2
    value, margin = float(expected.mean()), _Z * float(np.sqrt(variance))
    return Estimate(value=value, low=max(0.0, value - margin), high=min(1.0, value + margin))


def _design(proba: NDArray[np.floating]) -> Floats:
    """A column of ones, and the logit of the largest probability, (n, 2)."""
    top = np.clip(proba.max(axis=1).astype(np.float64), 1e-6, 1 - 1e-6)
    return np.stack([np.ones(len(top)), np.log(top / (1 - top))], axis=1)


def _sigmoid(values: Floats) -> Floats:
    found: Floats = 1 / (1 + np.exp(-np.clip(values, -500, 500)))
    return found
