"""Groups and neighbours of vectors: what strategies that look at features are made of. Arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]
Vectors = NDArray[Any]

_ITERATIONS = 30
_BLOCK = 2048
"""Rows whose distances to all others are held at a time."""


def k_means(vectors: Vectors, k: int, rng: Generator, iterations: int = _ITERATIONS) -> tuple[Positions, Floats]:
    """K-means (Lloyd 1982) from k-means++ seeds (Arthur & Vassilvitskii 2007): clusters (n,) and centres (k', d).

    k' is k, or less where there are not as many different vectors. Ends when nothing moves, else after `iterations`.
    """
    points: Floats = np.asarray(vectors, dtype=np.float64)
    if len(points) == 0 or k <= 0:
        return np.zeros(len(points), dtype=np.intp), np.zeros((0, points.shape[1] if points.ndim == 2 else 0))
    centres = _seeds(points, min(k, len(points)), rng)
    clusters = _closest(points, centres)
    for _ in range(iterations):
        sizes = np.bincount(clusters, minlength=len(centres))
        order = np.argsort(clusters, kind="stable")
        filled = np.flatnonzero(sizes)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])[filled]
        centres[filled] = np.add.reduceat(points[order], starts) / sizes[filled, None]
        moved = _closest(points, centres)
        if np.array_equal(moved, clusters):
            break
        clusters = moved
    return clusters, centres


def _seeds(points: Floats, k: int, rng: Generator) -> Floats:
    """Rows drawn one by one, each with a chance in proportion to its squared distance from those drawn before."""
    chosen = [int(rng.integers(len(points)))]
    distance = _squared(points, points[chosen])[:, 0]
    while len(chosen) < k:
        distance[chosen] = 0.0
        total = float(distance.sum())
        if total <= 0:
            break
        row = int(np.searchsorted(np.cumsum(distance), rng.random() * total, side="right"))
        row = min(row, len(points) - 1)
        chosen.append(row)
        distance = np.minimum(distance, _squared(points, points[[row]])[:, 0])
    return points[chosen].copy()


def _closest(points: Floats, centres: Floats) -> Positions:
    return np.concatenate(
        [_squared(points[start : start + _BLOCK], centres).argmin(axis=1) for start in range(0, len(points), _BLOCK)]
    )


def _squared(points: Floats, others: Floats) -> Floats:
    """Squared distances (n, m); rounding never takes them below zero."""
    product = points @ others.T
    distance = (points**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)[None, :] - 2 * product
    return np.asarray(np.maximum(distance, 0.0), dtype=np.float64)


def neighbour_distance(vectors: Vectors, neighbours: int) -> Floats:
    """Mean distance of each row to its nearest `neighbours` other rows (to all where there are fewer), (n,)."""
    points: Floats = np.asarray(vectors, dtype=np.float64)
    count = min(neighbours, len(points) - 1)
    if count <= 0:
        return np.zeros(len(points))
    means = []
    for start in range(0, len(points), _BLOCK):
        block = _squared(points[start : start + _BLOCK], points)
        block[np.arange(len(block)), np.arange(start, start + len(block))] = np.inf
        means.append(np.sqrt(np.partition(block, count - 1, axis=1)[:, :count]).mean(axis=1))
    return np.concatenate(means)


def spread_over(clusters: Positions, scores: Floats, priority: Floats, k: int) -> Positions:
    """At most k rows, one of each cluster in turn: the clusters by falling `priority`, in each the best scored first.

    Equal priorities and scores go by the clusters' and the rows' own order. `priority` has an entry for each cluster.
    """
    if len(clusters) == 0 or k <= 0:
        return np.empty(0, dtype=np.intp)
    order = np.lexsort((np.arange(len(clusters)), -scores, clusters))
    sizes = np.bincount(clusters, minlength=len(priority))
    starts = np.cumsum(sizes) - sizes
    turn = np.empty(len(clusters), dtype=np.intp)
    turn[order] = np.arange(len(clusters)) - starts[clusters[order]]
    chosen: Positions = np.lexsort((clusters, -priority[clusters], turn))[:k]
    return chosen


def unlike(vectors: Vectors, known: Vectors, most: float) -> Positions:
    """Rows, in their order, whose cosine with every row of `known` and every row kept before is below `most`."""
    points, others = _unit(vectors), _unit(known)
    fresh = np.ones(len(points), dtype=bool)
    if len(others):
        for start in range(0, len(points), _BLOCK):
            fresh[start : start + _BLOCK] = (points[start : start + _BLOCK] @ others.T).max(axis=1) < most
    kept = []
    for row in range(len(points)):
        if fresh[row]:
            kept.append(row)
            fresh[row + 1 :] &= points[row + 1 :] @ points[row] < most
    return np.array(kept, dtype=np.intp)


def _unit(vectors: Vectors) -> Floats:
    points: Floats = np.asarray(vectors, dtype=np.float64)
    length = np.linalg.norm(points, axis=1, keepdims=True)
    unit: Floats = np.divide(points, length, out=np.zeros_like(points), where=length > 0)
    return unit
