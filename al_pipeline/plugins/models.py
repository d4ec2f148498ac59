"""A classifier of a plug-in as an estimator: a factory of scikit-learn classifiers -> fit and predict on arrays."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from al_pipeline.errors import BadInput
from al_pipeline.models.estimators import Arrays, Estimator, Targets
from al_pipeline.models.feature_matrix import FeatureMatrix, Floats
from al_pipeline.plugins.loading import calling, load
from al_pipeline.plugins.references import Reference
from al_pipeline.plugins.storage import dump, restore
from al_pipeline.threads import one_thread

BLOCK = 256
"""Rows that are predicted together: always as many, since libraries round by the shape of what they compute."""
_MODEL = "model"


def estimator_of(reference: Reference) -> Estimator:
    """The plug-in as an estimator. Nothing of it is imported before it is fitted."""
    return Estimator(partial(_fit, reference), partial(_predict, reference), partial(_held_out, reference))


def make(reference: Reference) -> Any:
    """A new classifier. Raises BadInput if the factory fails or makes something else."""
    factory = load(reference)
    if not callable(factory):
        raise BadInput(
            f"{reference.where} is a {type(factory).__name__}; name a function without arguments (or a class) that "
            "makes a classifier"
        )
    with calling(reference, "the factory"):
        made = factory()
    for method in ("fit", "predict_proba"):
        if not callable(getattr(made, method, None)):
            raise BadInput(
                f"{reference.where} made a {type(made).__name__} without {method}; a classifier needs fit and "
                "predict_proba, as scikit-learn's have (wrap it in CalibratedClassifierCV if it has none)"
            )
    return made


def _fit(reference: Reference, features: FeatureMatrix, targets: Targets, rng: Generator) -> Arrays:
    return {_MODEL: np.frombuffer(dump(_fitted(reference, features, targets, rng), reference), np.uint8)}


def _held_out(
    reference: Reference, features: FeatureMatrix, targets: Targets, rng: Generator, others: FeatureMatrix
) -> Floats:
    """Saving and loading, which the contract says changes no bit, takes several times as long as a fit."""
    return _proba(reference, _fitted(reference, features, targets, rng), others)


def _fitted(reference: Reference, features: FeatureMatrix, targets: Targets, rng: Generator) -> Any:
    made = make(reference)
    with calling(reference, "set_params"):
        _seed(made, int(rng.integers(2**31)))
    table = _table(reference, features, made)
    with calling(reference, "fit"), one_thread():  # of the libraries too that were loaded only to make it
        made.fit(table, targets)
    _check_classes(reference, made, int(targets.max()) + 1)
    return made


def _predict(reference: Reference, arrays: Arrays, features: FeatureMatrix) -> Floats:
    if _MODEL not in arrays:
        raise BadInput(f"{reference.where}: the saved model has no part {_MODEL!r}")
    return _proba(reference, restore(arrays[_MODEL].tobytes(), reference), features)


def _proba(reference: Reference, model: Any, features: FeatureMatrix) -> Floats:
    rows, found = len(features), []
    for start in range(0, rows, BLOCK):
        taken = np.minimum(np.arange(start, start + BLOCK), rows - 1).astype(np.intp)
        table = _table(reference, features.rows(taken), model)
        with calling(reference, "predict_proba"), one_thread():
            proba = np.asarray(model.predict_proba(table), np.float64)
        _check_proba(reference, proba, len(taken))
        found.append(proba[: rows - start])
    width = len(getattr(model, "classes_", ()))
    return np.concatenate(found) if found else np.empty((0, width))


def _seed(made: Any, seed: int) -> None:
    """Set every unset `random_state`, also of classifiers inside, as scikit-learn's own ensembles do."""
    given = made.get_params(deep=True) if hasattr(made, "get_params") else {}
    unset = {
        name: seed
        for name, value in sorted(given.items())
        if value is None and (name == "random_state" or name.endswith("__random_state"))
    }
    if unset:
        made.set_params(**unset)


def _table(reference: Reference, features: FeatureMatrix, made: Any) -> Any:
    """The features as one table: an array (n, d), or a sparse matrix if TF-IDF is part of them."""
    if features.sparse is None:
        return np.asarray(features.dense, np.float64)
    if not _takes_sparse(made):
        raise BadInput(
            f"{reference.where}: {type(made).__name__} takes no sparse matrix, as features.kind "
            f"{'tfidf' if features.dense is None else 'encoder+tfidf'} gives; set features.kind: encoder, or begin a "
            "pipeline with a TruncatedSVD"
        )
    if features.dense is None:
        return features.sparse.astype(np.float64)
    from scipy.sparse import csr_matrix, hstack

    return hstack([csr_matrix(features.dense), features.sparse], format="csr", dtype=np.float64)


def _takes_sparse(made: Any) -> bool:
    """Whether a classifier (of a pipeline, its first step) says that it takes sparse matrices; others are tried."""
    from sklearn.base import BaseEstimator
    from sklearn.pipeline import Pipeline
    from sklearn.utils import get_tags

    while isinstance(made, Pipeline):
        made = made.steps[0][1]
    return bool(get_tags(made).input_tags.sparse) if isinstance(made, BaseEstimator) else True


def _check_classes(reference: Reference, model: Any, classes: int) -> None:
    known: NDArray[Any] | None = getattr(model, "classes_", None)
    if known is not None and list(known) != list(range(classes)):
        raise BadInput(
            f"{reference.where}: classes_ is {list(known)[:5]} after a fit on the classes 0 to {classes - 1}; "
            "predict_proba must have a column for each, in this order"
        )


def _check_proba(reference: Reference, proba: Floats, rows: int) -> None:
    if proba.ndim != 2 or len(proba) != rows:
        raise BadInput(
            f"{reference.where}: predict_proba gave an array of shape {proba.shape} for {rows} rows; it must give a "
            "row for each, with a column for each class"
        )
    if not np.isfinite(proba).all():
        raise BadInput(f"{reference.where}: predict_proba gave NaN or infinite values; probabilities are finite")
    if (proba < 0).any() or not np.allclose(proba.sum(axis=1), 1):
        raise BadInput(f"{reference.where}: predict_proba gave rows that are negative or do not sum to 1")
