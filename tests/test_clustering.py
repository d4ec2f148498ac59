"""Groups and neighbours: checked against naive formulas and scikit-learn."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from al_pipeline.clustering import k_means, neighbour_distance, spread_over, unlike


def blobs(n: int, k: int, seed: int = 0, dimensions: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 10, (k, dimensions))
    own = rng.integers(0, k, n)
    return centres[own] + rng.normal(0, 0.3, (n, dimensions)), own


def inertia(vectors: np.ndarray, clusters: np.ndarray, centres: np.ndarray) -> float:
    return float(((vectors - centres[clusters]) ** 2).sum())


def test_k_means_finds_clusters_that_are_there_and_is_as_good_as_scikit_learns() -> None:
    vectors, own = blobs(400, 5)
    clusters, centres = k_means(vectors, 5, np.random.default_rng(1))
    assert len({(a, b) for a, b in zip(own.tolist(), clusters.tolist(), strict=True)}) == 5
    noise = np.random.default_rng(2).normal(size=(300, 6))
    ours = [inertia(noise, *k_means(noise, 10, np.random.default_rng(seed))) for seed in range(10)]
    theirs = [KMeans(10, n_init=1, random_state=seed).fit(noise).inertia_ for seed in range(10)]
    assert np.mean(ours) <= 1.03 * np.mean(theirs)
    assert np.allclose(centres[0], vectors[clusters == 0].mean(axis=0))


@given(st.integers(0, 12), st.integers(0, 15), st.integers(1, 3))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_k_means_takes_whatever_comes(n: int, k: int, different: int) -> None:
    vectors = np.arange(n)[:, None] % different * np.ones((1, 3))
    clusters, centres = k_means(vectors, k, np.random.default_rng(0))
    assert clusters.shape == (n,)
    assert len(centres) <= min(k, n, different)
    if n and k:
        assert set(clusters.tolist()) <= set(range(len(centres)))


def test_neighbour_distance_is_scikit_learns() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 4))
    distance, _ = NearestNeighbors(n_neighbors=6).fit(vectors).kneighbors(vectors)
    assert neighbour_distance(vectors, 5) == pytest.approx(distance[:, 1:].mean(axis=1), abs=1e-6)
    assert neighbour_distance(vectors[:1], 5).tolist() == [0.0]
    assert neighbour_distance(vectors[:3], 20) == pytest.approx(
        [np.mean([np.linalg.norm(vectors[i] - vectors[j]) for j in range(3) if j != i]) for i in range(3)]
    )


def test_spread_over_goes_round_the_clusters_by_priority_and_score() -> None:
    clusters = np.array([0, 0, 0, 1, 2, 2])
    scores = np.array([0.1, 0.9, 0.5, 0.2, 0.3, 0.7])
    priority = np.array([1.0, 3.0, 2.0])
    assert spread_over(clusters, scores, priority, 10).tolist() == [3, 5, 1, 4, 2, 0]
    assert spread_over(clusters, scores, priority, 2).tolist() == [3, 5]
    assert spread_over(np.array([], dtype=int), np.array([]), priority, 2).tolist() == []


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), max_size=12), st.floats(0.5, 1))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_unlike_keeps_the_first_of_what_is_alike(rows: list[tuple[int, int]], most: float) -> None:
    vectors = np.array(rows, dtype=float).reshape(-1, 2)
    known = np.array([[1.0, 1.0]])

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        length = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / length) if length else 0.0

    kept: list[int] = []
    for row, vector in enumerate(vectors):
        others = [known[0], *(vectors[k] for k in kept)]
        cosines = [cosine(vector, other) for other in others]
        if any(abs(value - most) < 1e-9 for value in cosines):
            return  # rounding decides
        if all(value < most for value in cosines):
            kept.append(row)
    assert unlike(vectors, known, most).tolist() == kept


def test_a_large_shortlist_is_cheap() -> None:
    """5,000 x 384 in 100 clusters: seconds, and no matrix of all pairs."""
    vectors = np.random.default_rng(0).normal(size=(5000, 384))
    began = time.process_time()
    k_means(vectors, 100, np.random.default_rng(0))
    assert time.process_time() - began < 20
