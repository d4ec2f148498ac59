"""Likely label errors, held-out probabilities, and the error rate from a random sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.models.calibration import FOLDS
from al_pipeline.models.estimators import HEAD, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.held_out import held_out_proba
from al_pipeline.quality.error_rate import error_rate
from al_pipeline.quality.label_errors import error_probability


def planted(
    seed: int, classes: int = 3, items: int = 600, rate: float = 0.1, sharpness: float = 2.0, overlooked: bool = False
) -> tuple[Any, Any, Any]:
    """Probabilities of a model that sees the true class with noise, labels with errors, and which are wrong."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, items)
    logits = rng.normal(0, 1, (items, classes))
    logits[np.arange(items), truth] += sharpness
    proba = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    label = truth.copy()
    chosen = rng.random(items) < rate
    if overlooked:  # only items of other classes are called the first one
        chosen &= truth > 0
        label[chosen] = 0
    else:
        label[chosen] = (truth[chosen] + rng.integers(1, classes, chosen.sum())) % classes
    return proba, label, label != truth


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Any, Any]:
    classes, items, seed = draw(st.integers(2, 5)), draw(st.integers(1, 40)), draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    proba = rng.dirichlet(np.full(classes, draw(st.sampled_from([0.05, 1.0]))), items)
    proba[rng.random(items) < 0.1] = np.nan
    return proba, rng.integers(0, draw(st.integers(1, classes)), items)


@given(labelled())
@settings(max_examples=100, derandomize=True, deadline=None)
def test_a_probability_for_every_label_in_any_order(case: tuple[Any, Any]) -> None:
    proba, label = case
    found = error_probability(proba, label)
    assert found.shape == label.shape and ((found >= 0) & (found <= 1)).all()
    assert (found[np.isnan(proba).any(axis=1)] == 0).all()
    order = np.random.default_rng(0).permutation(len(label))
    np.testing.assert_allclose(error_probability(proba[order], label[order]), found[order], atol=1e-9)


def test_of_equally_frequent_errors_the_loss_alone_decides() -> None:
    proba, label, _ = planted(1)
    found = error_probability(proba, label)
    loss = -np.log(proba[np.arange(len(label)), label])
    np.testing.assert_array_equal(np.argsort(found, kind="stable"), np.argsort(loss, kind="stable"))


def test_nothing_to_say_about_nothing_or_a_single_class() -> None:
    assert error_probability(np.empty((0, 2)), np.empty(0, int)).shape == (0,)
    assert error_probability(np.ones((3, 1)), np.zeros(3, int)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("overlooked", [False, True])
def test_planted_errors_are_found_at_least_as_well_as_by_cleanlab(overlooked: bool) -> None:
    rank = pytest.importorskip("cleanlab.rank", reason="!! NOT TESTED: cleanlab is not installed; `make setup` does")
    from sklearn.metrics import average_precision_score

    ours, theirs = [], []
    for seed in range(8):
        proba, label, wrong = planted(seed, items=1000, overlooked=overlooked)
        ours.append(average_precision_score(wrong, error_probability(proba, label)))
        theirs.append(average_precision_score(wrong, -rank.get_label_quality_scores(label, proba)))
    assert np.mean(ours) >= np.mean(theirs) - 1e-9
    if overlooked:
        assert np.mean(ours) > np.mean(theirs) + 0.02


def test_held_out_rows_do_not_know_their_own_label() -> None:
    rng = np.random.default_rng(3)
    dense = rng.normal(size=(60, 8)).astype(np.float32)
    truth = (dense[:, 0] > 0).astype(int)
    names = ["ham" if one else "spam" for one in truth]
    proba = held_out_proba(FeatureMatrix(dense), names, ["ham", "spam", "rare"], 0, False)
    assert proba.shape == (60, 3) and not np.isnan(proba).any()
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    for row in (5, 30):
        other = list(names)
        other[row] = "rare"  # the only one of its class
        changed = held_out_proba(FeatureMatrix(dense), other, ["ham", "spam", "rare"], 0, False)
        assert np.isnan(changed[row]).all(), "no other fold has its class"
    fitted = fit_classifier(HEAD, FeatureMatrix(dense), names, ["ham", "spam", "rare"], 0, False)
    known = fitted.predict_proba(FeatureMatrix(dense))
    own = np.arange(60), [0 if one == "ham" else 1 for one in names]
    assert proba[own].mean() < known[own].mean()
    assert FOLDS > 1


@given(st.integers(0, 500), st.data())
@settings(max_examples=100, derandomize=True, deadline=None)
def test_an_error_rate_has_an_interval_or_a_reason(labels: int, data: st.DataObject) -> None:
    reviewed = data.draw(st.integers(0, labels))
    wrong = data.draw(st.integers(0, reviewed))
    found = error_rate(labels, reviewed, reviewed, wrong)
    if not reviewed:
        assert found.rate.value is None and found.rate.reason
        return
    assert found.rate.value is not None and found.rate.low is not None and found.rate.high is not None
    assert 0 <= found.rate.low <= found.rate.value <= found.rate.high <= 1
    if reviewed == labels:
        assert found.rate.low == found.rate.high == wrong / labels


@pytest.mark.parametrize(("labels", "rate", "reviewed"), [(400, 0.1, 50), (2000, 0.05, 100), (100, 0.2, 60)])
def test_the_interval_covers_the_error_rate(labels: int, rate: float, reviewed: int) -> None:
    rng = np.random.default_rng(7)
    wrong = round(rate * labels)
    covered = 0
    for drawn in rng.hypergeometric(wrong, labels - wrong, reviewed, 500):
        found = error_rate(labels, reviewed, reviewed, int(drawn)).rate
        covered += found.low <= wrong / labels <= found.high  # type: ignore[operator]
    assert covered >= 0.92 * 500
