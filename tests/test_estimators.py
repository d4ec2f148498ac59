"""Estimators of one's own: whatever stands in the table keeps the laws, and a whole project runs on it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from harness import play, small_workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from test_models import CLASSES, check_probabilities, corpus, features

from al_pipeline.active_learning.acquisition import bald
from al_pipeline.errors import BadInput
from al_pipeline.features.tfidf import fit
from al_pipeline.files import read_json, sha256_tree
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.models.ensembles import SIZES, draw_heads, sample_proba
from al_pipeline.models.estimators import ESTIMATORS, HEAD, Arrays, Estimate, Estimator, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.text_model import fit_text_model, load_text_model
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.params import FINETUNED, ModelName
from al_pipeline.workspace.workspace import open_workspace

EACH = pytest.mark.parametrize("name", sorted(ESTIMATORS))


def test_the_parameters_know_every_model() -> None:
    assert sorted(get_args(ModelName)) == sorted([HEAD, FINETUNED, *ESTIMATORS])


@EACH
@settings(max_examples=25)
@given(
    labels=st.lists(st.integers(0, 3), max_size=25),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
    seed=st.integers(0, 99),
    calibrate=st.booleans(),
)
def test_any_labels_give_probabilities(name: str, labels: list[int], scale: float, seed: int, calibrate: bool) -> None:
    names = ["a", "b", "c", "d"]
    rng = np.random.default_rng(seed)

    def some(rows: int) -> FeatureMatrix:
        sparse = csr_matrix((rng.random((rows, 7)) < 0.3).astype(np.float32))
        return FeatureMatrix((scale * rng.normal(size=(rows, 5))).astype(np.float32), sparse)

    fitted = fit_classifier(name, some(len(labels)), [names[label] for label in labels], names, seed, calibrate)
    assert fitted.seen == tuple(label for number, label in enumerate(names) if number in labels)
    check_probabilities(fitted.predict_proba(some(6)), 6, 4)


@EACH
def test_it_learns_is_saved_whole_and_comes_out_the_same(name: str, tmp_path: Path) -> None:
    texts, vectors, labels = corpus(60, CLASSES)
    for place in ("one", "two"):
        model = fit_text_model(
            texts, vectors, labels, CLASSES, features("encoder+tfidf"), fit(texts), 7, True, control=[*range(0, 60, 2)],
            classifier=name,
        )  # fmt: skip
        model.save(tmp_path / place)
    assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "two")
    assert read_json(tmp_path / "one/card.json")["estimator"] == name
    others, other_vectors, truth = corpus(60, CLASSES, seed=1)
    proba = model.predict_proba(others, other_vectors)
    assert np.mean([CLASSES[row.argmax()] == label for row, label in zip(proba, truth, strict=True)]) > 0.8
    loaded = load_text_model(tmp_path / "one")
    np.testing.assert_array_equal(loaded.predict_proba(others, other_vectors), proba)
    control = loaded.as_control()
    assert control is not None and sum(control.counts.values()) == 30


@EACH
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_both_kinds_of_samples_are_fits_on_resampled_labels(name: str, kind: str) -> None:
    _, vectors, labels = corpus(30, CLASSES)
    matrix = FeatureMatrix(vectors)
    fitted = fit_classifier(name, matrix, labels, CLASSES, 7, True)
    members = draw_heads(kind, fitted, matrix, labels, SeedSequence(1))  # type: ignore[arg-type]
    assert len(members) == SIZES[kind]  # type: ignore[index]
    assert all(isinstance(one, Estimate) and one.name == name for one in members)
    samples = sample_proba(members, matrix)
    assert bald(samples).max() > 0
    again = draw_heads(kind, fitted, matrix, labels, SeedSequence(1))  # type: ignore[arg-type]
    np.testing.assert_array_equal(sample_proba(again, matrix), samples)


def _fit_nothing(features: FeatureMatrix, targets: NDArray[np.intp], rng: Generator) -> Arrays:
    return {"classes": np.array([targets.max() + 1])}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda arrays, features: np.ones((len(features), 1)), r"of shape \(30, 1\) for 30 texts and 3 classes"),
        (lambda arrays, features: np.ones((len(features), 3)), "not probabilities"),
        (lambda arrays, features: np.full((len(features), 3), np.nan), "not probabilities"),
        (lambda arrays, features: np.tile([2.0, -0.5, -0.5], (len(features), 1)), "not probabilities"),
    ],
)
def test_an_estimator_that_gives_no_probabilities_is_named(
    monkeypatch: pytest.MonkeyPatch, wrong: object, says: str
) -> None:
    monkeypatch.setitem(ESTIMATORS, "mine", Estimator(_fit_nothing, wrong))  # type: ignore[arg-type]
    _, vectors, labels = corpus(30, CLASSES)
    with pytest.raises(BadInput, match=f"estimator 'mine' gave .*{says}"):
        fit_classifier("mine", FeatureMatrix(vectors), labels, CLASSES, 7, False).predict_proba(FeatureMatrix(vectors))


def test_a_model_of_an_estimator_that_is_gone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, vectors, labels = corpus(30, CLASSES)
    with monkeypatch.context() as patch:
        patch.setitem(ESTIMATORS, "mine", ESTIMATORS["centroid"])
        model = fit_text_model(texts, vectors, labels, CLASSES, features("encoder"), None, 7, True, classifier="mine")
        model.save(tmp_path)
    with pytest.raises(BadInput, match="the estimator 'mine', which al_pipeline.models.estimators.py does not have"):
        load_text_model(tmp_path)


@pytest.mark.slow
def test_a_project_runs_on_it_and_comes_out_again(tmp_path: Path) -> None:
    workspace, truth = small_workspace(
        tmp_path, 60, {"model: head": "model: centroid", "strategy: auto": "strategy: bald"}
    )
    play(workspace, SimulatedOracle(), truth, 2)
    layout = open_workspace(workspace.layout.root).layout
    assert read_json(layout.model / "card.json")["estimator"] == "centroid"
    assert read_json(layout.record(1))["metrics"]["macro_f1"]["value"] > 0.7
    assert [one.difference for one in reproduce(open_workspace(layout.root), [1])] == [None]
