"""Groups and neighbours: checked against naive formulas and scikit-learn."""

from __future__ import annotations

import time
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from al_pipeline.active_learning.clustering import (
    herd,
    k_center,
    k_means,
    mean_direction,
    neighbour_distance,
    product_distances,
    product_lengths,
    seeds_of_products,
    spread_over,
    unit_rows,
    unlike,
)


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


@pytest.mark.slow
def test_a_large_shortlist_is_cheap() -> None:
    """5,000 x 384 in 100 clusters: seconds, and no matrix of all pairs."""
    vectors = np.random.default_rng(0).normal(size=(5000, 384))
    began = time.process_time()
    k_means(vectors, 100, np.random.default_rng(0))
    assert time.process_time() - began < 20


# Core-set -----------------------------------------------------------------------------------------------------------
@given(st.integers(1, 12), st.integers(0, 4), st.integers(0, 14), st.integers(0, 99))
@settings(max_examples=80, derandomize=True, deadline=None)
def test_k_center_is_the_farthest_first_by_brute_force(n: int, known: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, others = rng.integers(0, 4, (n, 2)).astype(float), rng.integers(0, 4, (known, 2)).astype(float)
    chosen = k_center(points, others, k, n - 1).tolist()
    assert len(chosen) == len(set(chosen)) == min(n, k)
    for place, row in enumerate(chosen):
        centres = np.concatenate([others, points[chosen[:place]]])
        if len(centres) == 0:
            assert row == n - 1
            continue
        far = np.linalg.norm(points[:, None] - centres[None], axis=2).min(axis=1)
        far[chosen[:place]] = -1
        assert far[row] == pytest.approx(far.max())


@given(st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=25, derandomize=True, deadline=None)
def test_k_center_covers_within_twice_the_best_radius(k: int, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(8, 2))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    best = min(distance[:, list(some)].min(axis=1).max() for some in combinations(range(8), k))
    assert distance[:, k_center(points, np.zeros((0, 2)), k, 0)].min(axis=1).max() <= 2 * best + 1e-9


# Gradients ----------------------------------------------------------------------------------------------------------
def explicit(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left[:, :, None] * right[:, None, :]).reshape(len(left), left.shape[1] * right.shape[1])


@given(st.integers(1, 20), st.integers(0, 22), st.integers(0, 99), st.booleans())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_seeds_of_products_are_those_of_the_explicit_gradients(n: int, k: int, seed: int, alike: bool) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(n, 3)), rng.normal(size=(n, 4))
    if alike:
        left, right = left[np.arange(n) % 3], right[np.arange(n) % 3]
    gradients, sizes = explicit(left, right), product_lengths(left, right)
    for row in range(n):
        there = ((gradients - gradients[row]) ** 2).sum(axis=1)
        np.testing.assert_allclose(product_distances(left, right, row, sizes), there, atol=1e-9)
    chosen = seeds_of_products(left, right, k, np.random.default_rng(seed)).tolist()
    assert len(chosen) == len(set(chosen)) == min(n, k)
    if alike:  # of copies, each kind is there before any of them comes twice
        assert len({row % 3 for row in chosen[:3]}) == min(3, n, len(chosen))
        return
    draw, naive = np.random.default_rng(seed), []
    distance = (gradients**2).sum(axis=1)
    while len(naive) < min(n, k):
        upto = np.cumsum(distance)
        naive.append(int(np.searchsorted(upto, draw.random() * upto[-1])) if naive else int(distance.argmax()))
        new = ((gradients - gradients[naive[-1]]) ** 2).sum(axis=1)
        distance = np.minimum(distance, new) if len(naive) > 1 else new
    assert chosen == naive


def test_gradients_that_are_all_nothing_come_at_random() -> None:
    zeros = np.zeros((6, 2))
    draws = {tuple(seeds_of_products(zeros, zeros, 3, np.random.default_rng(seed)).tolist()) for seed in range(5)}
    assert len(draws) > 1 and all(len(set(draw)) == 3 for draw in draws)


def test_the_gradients_are_never_made() -> None:
    """2,000 x (20 * 385) of them would be 123 MB."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2000, 20)), rng.normal(size=(2000, 385))
    tracemalloc.start()
    seeds_of_products(left, right, 50, rng)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


def test_the_product_with_the_mean_direction_is_the_mean_cosine() -> None:
    rng = np.random.default_rng(0)
    points, others = rng.normal(size=(9, 4)), rng.normal(size=(30, 4)) + 1
    points[0] = 0
    units = [np.linalg.norm(some, axis=1)[:, None] for some in (points, others)]
    naive = ((points @ others.T) / np.maximum(units[0] * units[1].T, 1e-30)).mean(axis=1)
    np.testing.assert_allclose(unit_rows(points) @ mean_direction(others), naive, atol=1e-12)


def squared(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared distances (n, m) by the whole formula."""
    lengths = (points**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)[None, :]
    return np.maximum(lengths - 2 * (points @ others.T), 0.0)


@given(st.integers(1, 60), st.integers(0, 4), st.integers(1, 8), st.integers(1, 20), st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_lengths_computed_once_choose_the_same_rows(
    n: int, known: int, width: int, k: int, whole: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, width)).round(0 if whole else 9)
    others = rng.normal(size=(known, width))
    distance = squared(points, others).min(axis=1) if known else np.full(n, np.inf)
    expected: list[int] = []
    while len(expected) < min(k, n):
        expected.append(int(distance.argmax()))
        distance = np.minimum(distance, squared(points, points[expected[-1:]])[:, 0])
        distance[expected] = -1.0
    assert k_center(points, others, k, 0).tolist() == expected
    apart = squared(points, points)
    np.fill_diagonal(apart, np.inf)
    count = min(k, n - 1)
    nearest = np.sqrt(np.sort(apart, axis=1)[:, :count]).mean(axis=1) if count else np.zeros(n)
    np.testing.assert_allclose(neighbour_distance(points, k), nearest, rtol=1e-6, atol=1e-6)


# Herding ------------------------------------------------------------------------------------------------------------
def coverage(weights: np.ndarray, vectors: np.ndarray, chosen: np.ndarray, radius: float) -> float:
    """Uncertainty coverage, written as in the paper."""
    if len(chosen) == 0:
        return 0.0
    nearest = np.linalg.norm(vectors[:, None] - chosen[None], axis=2).min(axis=1)
    return float((weights * np.exp(-((nearest / radius) ** 2))).sum())


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(0, 5), st.integers(0, 8))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_each_pick_of_herding_is_the_one_that_adds_most_coverage(seed: int, n: int, labels: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, known, weights = rng.normal(size=(n, 3)), rng.normal(size=(labels, 3)), rng.random(n)
    candidates = rng.permutation(n)[: max(1, n // 2)]
    chosen = herd(weights, vectors, known, candidates, k).tolist()
    assert len(chosen) == len(set(chosen)) == min(k, len(candidates)) and set(chosen) <= set(candidates.tolist())
    between = np.linalg.norm(known[:, None] - known[None], axis=2)
    between[np.diag_indices(labels)] = np.inf
    radius = float(np.sqrt(np.median(between.min(axis=1) ** 2))) if labels > 1 else 1.0
    for place, row in enumerate(chosen):
        before = np.concatenate([known, vectors[chosen[:place]]])
        left = [other for other in candidates.tolist() if other not in chosen[:place]]
        values = [coverage(weights, vectors, np.concatenate([before, vectors[[one]]]), radius) for one in left]
        mine = coverage(weights, vectors, np.concatenate([before, vectors[[row]]]), radius)
        assert mine >= max(values) - 1e-9


def test_the_radius_of_herding_ignores_duplicates_and_there_is_one_without_labels() -> None:
    """A pair of equal labels would set a radius of zero, with which nothing covers anything."""
    points = np.array([[0.0], [0.1], [1.0], [1.1]])
    twice = np.array([[5.0], [5.0], [7.0]])
    for known in (twice, twice[:2], twice[:1], twice[:0]):
        chosen = herd(np.array([1.0, 0.9, 0.8, 0.7]), points, known, np.arange(4), 2)
        assert len({int(row) // 2 for row in chosen}) == 2, "one of each pair"


def test_herding_takes_duplicates_last_and_the_first_of_equals() -> None:
    vectors = np.array([[0.0, 0], [0, 0], [9, 0], [9, 0], [0, 9]])
    assert herd(np.ones(5), vectors, np.zeros((0, 2)), np.arange(5), 5).tolist() == [0, 2, 4, 1, 3]


def test_herding_beside_many_labels_takes_little_time_and_memory() -> None:
    rng = np.random.default_rng(0)
    vectors, known = rng.normal(size=(1000, 64)), rng.normal(size=(50_000, 64))
    tracemalloc.start()
    began = time.process_time()
    assert len(herd(rng.random(1000), vectors, known, np.arange(400), 40)) == 40
    took, most = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 10
    assert most < 150 * 2**20  # the labels themselves take 24 MiB


@pytest.mark.parametrize("labelled", [0, 7])
def test_k_center_picks_as_if_all_distances_were_exact(labelled: int) -> None:
    rng = np.random.default_rng(3)
    for width, spread in ((3, 1.0), (40, 1.0), (40, 1e-3), (40, 1e3)):
        vectors = (rng.normal(size=(3000, width)) * spread + 5 * spread).astype(np.float32)
        vectors[100:200] = vectors[:100]
        known = vectors[500 : 500 + labelled]
        points = vectors.astype(np.float64)
        distance = np.full(len(points), np.inf)
        for one in known.astype(np.float64):
            distance = np.minimum(distance, ((points - one) ** 2).sum(axis=1))
        for turn, row in enumerate(k_center(vectors, known, 60, first=5)):
            if turn or labelled:
                assert distance[row] >= distance.max() - 1e-9 * spread**2
            distance = np.minimum(distance, ((points - points[row]) ** 2).sum(axis=1))
            distance[row] = -1.0
