"""Committees and posteriors: the same whatever the order of reading, and as wide as the formulas say."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.random import SeedSequence
from scipy.sparse import csr_matrix

from al_pipeline.active_learning.acquisition import bald
from al_pipeline.models import ensembles as ensemble
from al_pipeline.models.ensembles import SIZES, draw_heads, sample_proba
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.linear import STRENGTH, Head, fit_head

KINDS = pytest.mark.parametrize("kind", sorted(SIZES))
CLASSES = ("a", "b", "c")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clouds(n: int, classes: int = 3, width: int = 6, seed: int = 0) -> tuple[FeatureMatrix, list[str]]:
    """Overlapping clouds, one a class, with dense and sparse features."""
    rng = np.random.default_rng(seed)
    own = np.arange(n) % classes
    points = 2 * np.eye(classes, width)[own] + rng.normal(size=(n, width))
    words = (rng.random((n, 40)) < 0.1).astype(np.float32)
    words[:, 0] = 1
    return FeatureMatrix(unit(points), csr_matrix(unit(words))), [CLASSES[c] for c in own]


def drawn(kind: str, seed: int = 1, n: int = 30, size: int | None = None) -> tuple[tuple[Head, ...], FeatureMatrix]:
    features, labels = clouds(n)
    head = fit_head(features, labels, CLASSES, 0, calibrate=False)
    return draw_heads(kind, head, features, labels, SeedSequence(seed), size), clouds(50, seed=9)[0]


@KINDS
def test_same_seed_same_heads_and_items_are_judged_alike_in_any_part_and_order(kind: str) -> None:
    heads, others = drawn(kind)
    again, _ = drawn(kind)
    different, _ = drawn(kind, seed=2)
    whole = sample_proba(heads, others)
    assert whole.shape == (50, SIZES[kind], 3)
    np.testing.assert_array_equal(whole, sample_proba(again, others))
    assert not np.allclose(whole, sample_proba(different, others))
    order = np.random.default_rng(0).permutation(50)
    parts = [sample_proba(heads, others.rows(order[start : start + 7])) for start in range(0, 50, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[order])
    assert np.ptp(whole, axis=1).max() > 0.01, "they do not agree on everything"


@KINDS
@pytest.mark.parametrize("labels", [[], ["b"], ["b", "b", "b"]])
def test_with_fewer_than_two_classes_nobody_disagrees(kind: str, labels: list[str]) -> None:
    features = clouds(len(labels) or 1)[0].rows(np.arange(len(labels)))
    head = fit_head(features, labels, CLASSES, 0, calibrate=True)
    heads = draw_heads(kind, head, features, labels, SeedSequence(1))
    assert bald(sample_proba(heads, clouds(20)[0])).max() == 0


@KINDS
def test_an_unseen_class_stays_as_likely_as_the_head_says(kind: str) -> None:
    features, labels = clouds(20, classes=2)
    head = fit_head(features, labels, CLASSES, 0, calibrate=True)
    samples = sample_proba(draw_heads(kind, head, features, labels, SeedSequence(1)), features)
    np.testing.assert_allclose(samples[:, :, 2], head.predict_proba(features)[0, 2], rtol=1e-6)


def test_members_of_a_committee_lack_no_class_and_are_really_fitted() -> None:
    features, labels = clouds(31)
    labels = ["a"] + ["b"] * 15 + ["c"] * 15
    head = fit_head(features, labels, CLASSES, 0, calibrate=False)
    heads = draw_heads("committee", head, features, labels, SeedSequence(3))
    assert all(member.seen == CLASSES for member in heads)
    assert len({member.weights[0].tobytes() for member in heads}) == SIZES["committee"]
    right = [(sample_proba([one], features)[:, 0].argmax(axis=1) == head.predict_proba(features).argmax(axis=1)).mean()
             for one in heads]  # fmt: skip
    assert min(right) > 0.6


def hessian(rows: np.ndarray, proba: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The loss's curvature in (feature and bias) x class, written out."""
    width = rows.shape[1] * proba.shape[1]
    total = np.eye(width) / STRENGTH
    for x, p, w in zip(rows, proba, weights, strict=True):
        total += w * np.kron(np.outer(x, x), np.diag(p) - np.outer(p, p))
    return total


@pytest.mark.parametrize("labels", [2, 3, 9])
def test_the_posterior_is_laplaces_where_all_probabilities_are_alike(labels: int) -> None:
    """Fewer labels than directions, as many, more: what the inverse curvature explains of the weights is all."""
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(labels, 2)).astype(np.float32)
    features = FeatureMatrix(dense)
    names = [CLASSES[n % 3] for n in range(labels)]
    counts = {name: names.count(name) for name in CLASSES if name in names}
    seen = len(counts)
    head = Head(CLASSES, counts, (np.zeros((seen, 2), np.float32),), np.zeros(seen, np.float32), 1.0, (2,))
    heads = draw_heads("posterior", head, features, names, SeedSequence(1), size=4000)
    flat = np.array([np.vstack([one.weights[0].T, one.bias[None]]).ravel() for one in heads])
    importance = np.array([labels / (seen * counts[name]) for name in names])
    rows = np.column_stack([dense, np.ones(labels)])
    whole = hessian(rows, np.full((labels, seen), 1 / seen), importance)
    alike = flat @ np.linalg.cholesky(whole)
    assert np.abs(alike.mean(axis=0)).max() < 5 / np.sqrt(4000)
    np.testing.assert_allclose(np.cov(alike.T), np.eye(len(whole)), atol=5 * np.sqrt(2 / 4000))


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "noise", "within"), [(2, 0.3, 0.06), (2, 0.7, 0.06), (3, 0.3, 0.3), (3, 0.7, 0.3)])
def test_the_posterior_is_near_laplaces_at_a_fitted_head(classes: int, noise: float, within: float) -> None:
    """The diagonal form against the whole curvature: how unsure of which items. Of two classes it is exact."""
    rng = np.random.default_rng(1)
    own = np.arange(60) % classes
    points = unit(np.eye(classes, 4)[own] + noise * rng.normal(size=(60, 4)))
    labels = [CLASSES[c] for c in own]
    features = FeatureMatrix(points)
    head = fit_head(features, labels, CLASSES[:classes], 0, calibrate=False)
    heads = draw_heads("posterior", head, features, labels, SeedSequence(1), size=4000)
    others = FeatureMatrix(unit(rng.normal(size=(40, 4))))
    gap = np.eye(classes)[0] - np.eye(classes)[1]
    gaps = np.array([one.logits(others) @ gap for one in heads]).std(axis=0)
    rows = np.column_stack([points, np.ones(60)])
    covariance = np.linalg.inv(hessian(rows, head.predict_proba(features), np.ones(60)))
    jacobian = np.kron(np.column_stack([others.dense, np.ones(40)]), gap[None]).reshape(40, -1)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", jacobian, covariance, jacobian))
    assert (np.abs(gaps / expected - 1) < within).all()


def test_the_posterior_doubts_what_is_unlike_the_labels_and_less_with_more_of_them() -> None:
    rng = np.random.default_rng(2)
    near = np.column_stack([unit(rng.normal(size=(200, 3))), np.zeros((200, 3))]).astype(np.float32)
    far = near[:, ::-1][:50]
    labels = [CLASSES[int(row[0] > 0)] for row in near]

    def doubt(count: int) -> tuple[float, float]:
        seen = FeatureMatrix(near[:count])
        head = fit_head(seen, labels[:count], CLASSES[:2], 0, calibrate=False)
        heads = draw_heads("posterior", head, seen, labels[:count], SeedSequence(1), size=200)
        known, unknown = (bald(sample_proba(heads, FeatureMatrix(rows))).mean() for rows in (near[150:], far))
        return float(known), float(unknown)

    few, many = doubt(20), doubt(150)
    assert few[1] > 1.5 * few[0] and many[1] > 3 * many[0] and many[0] < 0.6 * few[0]


def test_very_many_labels_are_stood_for_by_some(monkeypatch: pytest.MonkeyPatch) -> None:
    def spread(limit: int) -> np.ndarray:
        monkeypatch.setattr(ensemble, "_MAX_CURVATURE", limit)
        heads, others = drawn("posterior", n=300, size=300)
        return sample_proba(heads, others).std(axis=1)

    whole, some = spread(1000), spread(150)
    assert np.median(some / whole) == pytest.approx(1, abs=0.15)
