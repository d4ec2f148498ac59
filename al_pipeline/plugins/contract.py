"""What every model and every query strategy must do, built in or a plug-in: checked on made-up data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from al_pipeline.active_learning.batch import choose
from al_pipeline.active_learning.sampling import round_seed
from al_pipeline.active_learning.shortlist import Shortlist
from al_pipeline.active_learning.strategies import STRATEGIES, scoring_of
from al_pipeline.errors import AlError
from al_pipeline.models.estimators import Estimate, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix, Floats
from al_pipeline.models.linear import Head
from al_pipeline.models.text_model import fit_text_model, load_text_model
from al_pipeline.params import Features
from al_pipeline.threads import one_thread

CLASSES = ("ham", "news", "spam")
_WIDTH, _EACH, _SEED = 64, 20, 7
_FEATURES = Features(kind="encoder", encoder="-", max_tokens=8, precision="float32")
_POOL = 40
_LEAST_RIGHT = 0.8


@dataclass(frozen=True, slots=True)
class Checked:
    """One requirement, and what was found instead; empty if it holds."""

    name: str
    problem: str

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return not self.problem


class _Broken(Exception):
    """A requirement that does not hold; its text says what was found."""


def check_model(name: str) -> Iterator[Checked]:
    """Check the model that `train.model` names so; one of a plug-in must be in use (`plugins.use`)."""
    yield from _checked(
        name,
        {
            "probabilities are finite and sum to 1": _probabilities,
            "columns are in the order of the classes": _order,
            "equal seeds give equal bytes": _same_bytes,
            "no state between calls": _no_state,
            "a text's probabilities do not depend on the others": _alone,
            "few labels": _few_labels,
            "a class without labels": _missing_class,
            "saved and loaded, it predicts the same bytes": _saved,
        },
    )


def check_strategy(name: str) -> Iterator[Checked]:
    """Check the strategy that `select.strategy` names so; one of a plug-in must be in use."""
    yield from _checked(
        name,
        {
            "scores are finite": _finite_scores,
            "it selects k different items": _distinct,
            "equal seeds select the same items": _same_items,
            "no state between calls": _no_memory,
            "a pool smaller than the batch": _small_pool,
            "no label yet, or one": _no_labels,
            "items with equal scores": _ties,
        },
    )


def _checked(name: str, checks: dict[str, Callable[[str], None]]) -> Iterator[Checked]:
    for what, check in checks.items():
        problem = ""
        try:
            with one_thread():
                check(name)
        except _Broken as error:
            problem = str(error)
        except AlError as error:
            problem = str(error)
        except ValueError as error:
            problem = f"ValueError: {error}"
        yield Checked(what, problem)


def _require(holds: object, problem: str) -> None:
    if not holds:
        raise _Broken(problem)


# Models -------------------------------------------------------------------------------------------------------------
def _data(each: int = _EACH, seed: int = 0) -> tuple[FeatureMatrix, list[str]]:
    """Vectors of unit length around one centre for each class, and their classes."""
    rng = np.random.default_rng([_SEED, seed])
    labels = [name for _ in range(each) for name in CLASSES]
    centres = np.eye(_WIDTH)[: len(CLASSES)]
    vectors = centres[[CLASSES.index(label) for label in labels]] + 0.08 * rng.standard_normal((len(labels), _WIDTH))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return FeatureMatrix(unit.astype(np.float32)), labels


def _fitted(name: str, each: int = _EACH, seed: int = 0) -> Head | Estimate:
    features, labels = _data(each, seed)
    return fit_classifier(name, features, labels, CLASSES, _SEED, calibrate=False)


def _bytes(model: Head | Estimate) -> list[bytes]:
    if isinstance(model, Head):
        return [part.tobytes() for part in (*model.weights, model.bias)]
    return [model.arrays[key].tobytes() for key in sorted(model.arrays)]


def _probabilities(name: str) -> None:
    proba = _fitted(name).predict_proba(_data(50, 1)[0])
    _require(proba.shape == (150, len(CLASSES)), f"an array of shape {proba.shape} for 150 texts and 3 classes")
    _require(np.isfinite(proba).all(), "some are NaN or infinite")
    _require(np.allclose(proba.sum(axis=1), 1) and (proba > 0).all(), "rows are negative or do not sum to 1")


def _order(name: str) -> None:
    features, labels = _data(50, 1)
    found = _fitted(name).predict_proba(features).argmax(axis=1)
    right = float(np.mean([CLASSES[column] == label for column, label in zip(found, labels, strict=True)]))
    _require(right >= _LEAST_RIGHT, f"{right:.0%} of texts that are easy to separate get their class")


def _same_bytes(name: str) -> None:
    first = _bytes(_fitted(name))
    np.random.random(3)  # noqa: NPY002 - a model that draws from the global generator gets other numbers now
    _require(_bytes(_fitted(name)) == first, "two fits differ; set random_state, use no clock and no global generator")


def _no_state(name: str) -> None:
    features, first = _data(10, 1)[0], _fitted(name)
    before = first.predict_proba(features)
    other = _fitted(name, each=8, seed=2)
    other.predict_proba(features)
    _require(np.array_equal(first.predict_proba(features), before), "predictions change after another fit")
    _require(_bytes(_fitted(name)) == _bytes(first), "a fit depends on earlier ones; make a new classifier each time")


def _alone(name: str) -> None:
    features, model = _data(12, 1)[0], _fitted(name)
    together = model.predict_proba(features)
    rows = np.arange(len(features))[::-3].astype(np.intp)
    _require(
        np.array_equal(model.predict_proba(features.rows(rows)), together[rows]),
        "a text in another batch gets other probabilities, if only in the last digits",
    )
    one = np.array([5], np.intp)
    _require(np.array_equal(model.predict_proba(features.rows(one)), together[one]), "alone it gets others")


def _few_labels(name: str) -> None:
    features, labels = _data(1)
    for count in (1, 2, 3):
        few = features.rows(np.arange(count))
        model = fit_classifier(name, few, labels[:count], CLASSES, _SEED, calibrate=True)
        proba = model.predict_proba(_data(4, 1)[0])
        _require(np.isfinite(proba).all() and np.allclose(proba.sum(axis=1), 1), f"none with {count} labels")


def _missing_class(name: str) -> None:
    features, labels = _data()
    rows = np.flatnonzero(np.array(labels) != CLASSES[1])
    known = [labels[row] for row in rows]
    proba = fit_classifier(name, features.rows(rows), known, CLASSES, _SEED, calibrate=False).predict_proba(features)
    _require(proba.shape[1] == len(CLASSES), f"{proba.shape[1]} columns for 3 classes")
    of_known = proba[rows].argmax(axis=1)
    right = float(np.mean([CLASSES[column] == label for column, label in zip(of_known, known, strict=True)]))
    _require(right >= _LEAST_RIGHT, f"without labels of one class, {right:.0%} of the others get theirs")


def _saved(name: str) -> None:
    features, labels = _data()
    vectors, others = features.dense, _data(10, 1)[0].dense
    assert vectors is not None and others is not None
    texts, unknown = [f"text {row}" for row in range(len(vectors))], [f"other {row}" for row in range(len(others))]
    model = fit_text_model(
        texts=texts, vectors=vectors, labels=labels, classes=CLASSES, features=_FEATURES, tfidf=None, seed=_SEED,
        calibrate=True, classifier=name,
    )  # fmt: skip
    before = model.predict_proba(unknown, others)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        loaded = load_text_model(Path(folder) / "model")
    _require(np.array_equal(loaded.predict_proba(unknown, others), before), "the loaded model predicts other bytes")


# Strategies ---------------------------------------------------------------------------------------------------------
def _view(name: str, rows: int = _POOL, labelled: int = 6, equal: bool = False, seed: int = 0) -> Shortlist:
    """A shortlist with everything that a strategy can need; scores are those of its acquisition function."""
    rng = np.random.default_rng([_SEED, rows, seed])
    vectors = rng.standard_normal((rows, _WIDTH))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    proba = np.full((rows, len(CLASSES)), 1 / len(CLASSES)) if equal else rng.dirichlet(np.ones(len(CLASSES)), rows)
    scoring = scoring_of(name)
    samples: Floats = proba if scoring.samples is None else _samples(proba, rng)
    known = np.eye(_WIDTH)[:labelled] if labelled else np.empty((0, _WIDTH))
    counts: NDArray[np.intp] = np.array([labelled - labelled // 2, labelled // 2, 0], np.intp)
    return Shortlist(
        ids=[f"item-{row:03d}" for row in range(rows)],
        scores=scoring.function(samples),
        proba=proba,
        vectors=vectors,
        labeled=known,
        counts=counts,
        centre=vectors.mean(axis=0),
    )


def _samples(proba: Floats, rng: np.random.Generator) -> Floats:
    drawn = np.stack([proba + 0.1 * rng.random(proba.shape) for _ in range(4)], axis=1)
    return np.asarray(drawn / drawn.sum(axis=2, keepdims=True), np.float64)


def _picked(name: str, view: Shortlist, k: int, round_number: int = 1) -> list[str]:
    """The ids that a batch of k would take, in order."""
    found = STRATEGIES[name].pick(view, min(k, len(view.ids)), round_seed(_SEED, round_number, name))
    return [view.ids[position] for position in found.positions.tolist()]


def _finite_scores(name: str) -> None:
    scores = _view(name).scores
    _require(scores is not None and np.isfinite(scores).all(), "some are NaN or infinite")


def _distinct(name: str) -> None:
    for k in (1, 5, 10):
        found = _picked(name, _view(name), k)
        _require(len(found) == k == len(set(found)), f"{len(set(found))} different items for k = {k}")


def _same_items(name: str) -> None:
    view = _view(name)
    first = _picked(name, view, 10)
    np.random.random(3)  # noqa: NPY002 - a strategy that draws from the global generator gets other numbers now
    _require(_picked(name, view, 10) == first, "two calls differ; draw from the seed that the strategy gets")


def _no_memory(name: str) -> None:
    view = _view(name)
    first = _picked(name, view, 10)
    _picked(name, _view(name, rows=25, seed=1), 10, round_number=2)
    _require(_picked(name, _view(name), 10) == first, "a call depends on earlier ones")


def _small_pool(name: str) -> None:
    for rows in (1, 3):
        view = _view(name, rows)
        batch = choose(list(view.ids), view, strategy=name, k=10, random_share=0.0, seed=round_seed(_SEED, 1, name))
        _require({query.item_id for query in batch} == set(view.ids), f"{len(batch)} of {rows} items are selected")


def _no_labels(name: str) -> None:
    for labelled in (0, 1):
        found = _picked(name, _view(name, labelled=labelled), 5)
        _require(len(set(found)) == 5, f"{len(set(found))} items for k = 5 with {labelled} labels")


def _ties(name: str) -> None:
    found = _picked(name, _view(name, equal=True), 10)
    _require(len(set(found)) == 10, f"{len(set(found))} items for k = 10")
