"""Classifiers on frozen features: the linear head, and plug-in estimators.

A plug-in estimator is two functions on arrays in the table `ESTIMATORS`, under the name that `train.model` uses. Like
the head, it then has features, classes without labels, calibration, saving and loading, committees, rounds and
simulations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from al_pipeline.errors import BadInput
from al_pipeline.models.calibration import calibration_folds, fit_temperature
from al_pipeline.models.feature_matrix import FeatureMatrix, Floats, row_products
from al_pipeline.models.linear import Head, fit_head
from al_pipeline.models.names import fit_head_with_names
from al_pipeline.models.probabilities import count_classes, over_all_classes, softmax
from al_pipeline.threads import one_thread

HEAD = "head"

Arrays = Mapping[str, NDArray[Any]]
Targets = NDArray[np.intp]

_LEAST = 1e-12
"""Floor of probabilities under a logarithm."""
SHARPNESS = 10.0
"""Scale of the cosines in `centroid`, before calibration."""


@dataclass(frozen=True, slots=True)
class Estimator:
    """A classifier as two deterministic functions: equal arguments give equal bytes.

    `fit(features, targets, rng)`: n rows of features and their classes (n,), from 0 to C - 1, C >= 2, all of which
    occur. Returns the parameters as arrays by name; these are saved.
    `predict(arrays, features)`: class probabilities (m, C) of m rows; each row sums to 1 and must not depend on the
    other rows. Use `row_products`: the rounding of `@` depends on the number of rows.
    `held_out(features, targets, rng, others)`: the same bytes as `predict(fit(features, targets, rng), others)`, for an
    estimator that takes long to make arrays of its parameters. Calibration needs the probabilities alone.
    """

    fit: Callable[[FeatureMatrix, Targets, Generator], Arrays]
    predict: Callable[[Arrays, FeatureMatrix], Floats]
    held_out: Callable[[FeatureMatrix, Targets, Generator, FeatureMatrix], Floats] | None = None


@dataclass(frozen=True)
class Estimate:
    """A fitted plug-in estimator. With labels of fewer than two classes it has no parameters."""

    name: str
    classes: tuple[str, ...]
    """The schema's classes, in its order: the columns of the probabilities."""
    counts: Mapping[str, int]
    """Number of labels of each class that has some, in the schema's order."""
    arrays: Arrays
    widths: tuple[int, ...]
    """Widths of the feature blocks; empty if it has no parameters."""
    temperature: float = 1.0

    @property
    def seen(self) -> tuple[str, ...]:
        """Classes that had labels."""
        return tuple(self.counts)

    def predict_proba(self, features: FeatureMatrix) -> Floats:
        """Class probabilities (n, C), columns in the schema's order; rows sum to 1.

        Raises BadInput if the features have other widths, or if the estimator returns invalid probabilities.
        """
        if not self.widths:
            return over_all_classes(np.ones((len(features), len(self.seen))), self.classes, self.counts)
        if features.widths != self.widths:
            raise BadInput(
                f"the model was fitted on features of widths {self.widths}, but got widths {features.widths} (another "
                "encoder or vocabulary)"
            )
        logits = _log(_predict(self.name, self.arrays, features, len(self.seen)))
        return over_all_classes(softmax(logits / self.temperature), self.classes, self.counts)


def fit_classifier(
    name: str,
    features: FeatureMatrix,
    labels: Sequence[str],
    classes: Sequence[str],
    seed: int,
    calibrate: bool,
    prototypes: NDArray[np.float32] | None = None,
    name_weight: float | None = None,
    weights: Floats | None = None,
) -> Head | Estimate:
    """Fit the classifier that `train.model` names, from scratch. Raises BadInput if a label is not a class.

    `prototypes`, `name_weight`: what the head knows from the names of the classes, as in `fit_head_with_names`; other
    classifiers do not use them. `weights` (n,): those of the labels, for a head without names.
    """
    if name == HEAD and prototypes is not None:
        return fit_head_with_names(features, labels, classes, seed, calibrate, prototypes, name_weight)
    if name == HEAD:
        return fit_head(features, labels, classes, seed, calibrate, weights=weights)
    counts, targets = count_classes(labels, classes)
    if len(features) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(features)} rows of features")
    if len(counts) < 2:
        return Estimate(name, tuple(classes), counts, {}, ())
    with one_thread():
        arrays = _fit(name, features, targets, seed)
        temperature = _temperature(name, features, targets, seed) if calibrate else 1.0
    return Estimate(name, tuple(classes), counts, arrays, features.widths, temperature)


def _fit(name: str, features: FeatureMatrix, targets: Targets, seed: int) -> Arrays:
    arrays = ESTIMATORS[name].fit(features, targets, _rng(seed))
    return {key: np.ascontiguousarray(value) for key, value in arrays.items()}


def _rng(seed: int) -> Generator:
    return np.random.default_rng([seed, 0xE57])


def _predict(name: str, arrays: Arrays, features: FeatureMatrix, classes: int) -> Floats:
    """Class probabilities (n, classes). Raises BadInput if the estimator returns anything else."""
    return _checked(name, ESTIMATORS[name].predict(arrays, features), len(features), classes)


def _held_out(
    name: str, features: FeatureMatrix, targets: Targets, seed: int, others: FeatureMatrix, classes: int
) -> Floats:
    """Class probabilities (m, classes) of `others` by a fit that is not kept. Raises BadInput as `_predict` does."""
    own = ESTIMATORS[name].held_out
    if own is None:
        return _predict(name, _fit(name, features, targets, seed), others, classes)
    return _checked(name, own(features, targets, _rng(seed), others), len(others), classes)


def _checked(name: str, given: Floats, rows: int, classes: int) -> Floats:
    proba = np.asarray(given, np.float64)
    if proba.shape != (rows, classes):
        raise BadInput(
            f"estimator {name!r} gave probabilities of shape {proba.shape} for {rows} texts and {classes} classes; fix "
            "it in al_pipeline/models/estimators.py"
        )
    if not ((proba >= 0).all() and np.allclose(proba.sum(axis=1), 1)):
        raise BadInput(f"estimator {name!r} gave rows that are not probabilities; fix it in {__name__}")
    return proba


def _temperature(name: str, features: FeatureMatrix, targets: Targets, seed: int) -> float:
    """The temperature by cross-validation: fitted on the held-out predictions of all folds."""
    held_out = []
    for train, test, known in calibration_folds(targets, seed):
        own = np.searchsorted(known, targets[train])
        proba = _held_out(name, features.rows(train), own, seed, features.rows(test), len(known))
        held_out.append((_log(proba), np.searchsorted(known, targets[test])))
    return fit_temperature(held_out)


def _log(proba: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(proba, _LEAST)), np.float64)


# Estimators ---------------------------------------------------------------------------------------------------------
def _fit_centroid(features: FeatureMatrix, targets: Targets, rng: Generator) -> Arrays:
    """The nearest-centroid classifier (Rocchio 1971): the normalised mean of each class."""
    own = np.eye(int(targets.max()) + 1)[targets]
    means = [np.asarray(block.T @ own).T for block in features.blocks]
    return {
        f"means.{number}": part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), _LEAST)
        for number, part in enumerate(means)
    }


def _predict_centroid(arrays: Arrays, features: FeatureMatrix) -> Floats:
    cosines = [row_products(block, arrays[f"means.{number}"]) for number, block in enumerate(features.blocks)]
    return softmax(SHARPNESS * np.sum(cosines, axis=0))


ESTIMATORS: dict[str, Estimator] = {
    "centroid": Estimator(_fit_centroid, _predict_centroid),
}
"""All plug-in estimators, by their names in `params.yaml`."""
