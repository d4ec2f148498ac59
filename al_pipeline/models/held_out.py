"""Probabilities of labelled texts by a model that was fitted without them: cross-validation of the classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from al_pipeline.models.calibration import FOLDS, MIN_CALIBRATION, fit_temperature, stratified_folds
from al_pipeline.models.estimators import HEAD, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix, Floats
from al_pipeline.models.probabilities import softmax


def held_out_proba(
    features: FeatureMatrix,
    labels: Sequence[str],
    classes: Sequence[str],
    seed: int,
    calibrate: bool,
    classifier: str = HEAD,
    prototypes: NDArray[np.float32] | None = None,
) -> Floats:
    """Class probabilities (n, C) of each labelled row, by a classifier fitted on the other folds.

    NaN in the rows whose class no other fold has: nothing can be said about their labels. `classifier`, `prototypes`:
    as in `fit_text_model`. Raises BadInput if a label is not a class.
    """
    places = {name: place for place, name in enumerate(classes)}
    targets = np.array([places.get(label, len(classes)) for label in labels], dtype=np.intp)
    proba = np.full((len(labels), len(classes)), np.nan)
    for train, test in stratified_folds(targets, FOLDS, seed):
        known = np.isin(targets[test], targets[train])
        if not known.any():
            continue
        fitted = fit_classifier(
            classifier, features.rows(train), [labels[row] for row in train], classes, seed, calibrate, prototypes
        )
        proba[test[known]] = fitted.predict_proba(features.rows(test[known]))
    return proba


def tempered_held_out_proba(
    features: FeatureMatrix,
    labels: Sequence[str],
    classes: Sequence[str],
    seed: int,
    classifier: str = HEAD,
    prototypes: NDArray[np.float32] | None = None,
) -> Floats | None:
    """`held_out_proba` of uncalibrated fits, with one temperature for all rows; uniform where that says nothing.

    None if there are too few labels to tell anything: fewer than MIN_CALIBRATION, or of a single class.
    """
    if len(labels) < MIN_CALIBRATION or len(set(labels)) < 2:
        return None
    proba = held_out_proba(features, labels, classes, seed, False, classifier, prototypes)
    told: NDArray[np.bool_] = np.isfinite(proba.sum(axis=1))
    logits = np.log(np.maximum(np.where(told[:, None], proba, 1 / len(classes)), 1e-300))
    targets = np.array([classes.index(label) for label in labels], np.intp)
    return softmax(logits / fit_temperature([(logits[told], targets[told])]))
