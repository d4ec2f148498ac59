"""Clustering and nearest neighbours for strategies on feature vectors. Arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]
Vectors = NDArray[Any]

_ITERATIONS = 30
_MEASURED = 1000
_SAME = 1e-9
"""Vectors with a smaller squared distance count as equal: rounding keeps those of equal vectors from 0."""
_BLOCK = 2048
"""Number of rows whose distances to all others are in memory at a time."""


def k_means(vectors: Vectors, k: int, rng: Generator, iterations: int = _ITERATIONS) -> tuple[Positions, Floats]:
    """K-means (Lloyd 1982) from k-means++ seeds (Arthur & Vassilvitskii 2007): clusters (n,) and centres (k', d).

    k' is k, or the number of distinct vectors if smaller. Stops when no assignment changes, or after `iterations`.
    """
    points: Floats = np.asarray(vectors, dtype=np.float64)
    if len(points) == 0 or k <= 0:
        return np.zeros(len(points), dtype=np.intp), np.zeros((0, points.shape[1] if points.ndim == 2 else 0))
    lengths = _sizes(points)
    centres = _seeds(points, lengths, min(k, len(points)), rng)
    clusters = _closest(points, lengths, centres)
    for _ in range(iterations):
        sizes = np.bincount(clusters, minlength=len(centres))
        order = np.argsort(clusters, kind="stable")
        filled = np.flatnonzero(sizes)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])[filled]
        centres[filled] = np.add.reduceat(points[order], starts) / sizes[filled, None]
        moved = _closest(points, lengths, centres)
        if np.array_equal(moved, clusters):
            break
        clusters = moved
    return clusters, centres


def _seeds(points: Floats, sizes: Floats, k: int, rng: Generator) -> Floats:
    """k-means++ seeds: each row is drawn with probability proportional to its squared distance from earlier ones."""
    chosen = [int(rng.integers(len(points)))]
    distance = _squared(points, sizes, points[chosen], sizes[chosen])[:, 0]
    while len(chosen) < k:
        distance[chosen] = 0.0
        total = float(distance.sum())
        if total <= 0:
            break
        row = int(np.searchsorted(np.cumsum(distance), rng.random() * total, side="right"))
        row = min(row, len(points) - 1)
        chosen.append(row)
        np.minimum(distance, _squared(points, sizes, points[[row]], sizes[[row]])[:, 0], out=distance)
    return points[chosen].copy()


def _closest(points: Floats, sizes: Floats, centres: Floats) -> Positions:
    theirs, found = _sizes(centres), np.empty(len(points), dtype=np.intp)
    for start in range(0, len(points), _BLOCK):
        part = slice(start, start + _BLOCK)
        found[part] = _squared(points[part], sizes[part], centres, theirs).argmin(axis=1)
    return found


def _squared(points: Floats, sizes: Floats, others: Floats, other_sizes: Floats) -> Floats:
    """Squared distances (n, m); rounding never takes them below zero. Sizes: by `_sizes`, once for many products."""
    distance: Floats = points @ others.T
    distance *= 2
    np.subtract(sizes[:, None] + other_sizes[None, :], distance, out=distance)
    return np.maximum(distance, 0.0, out=distance)


def _sizes(points: Vectors) -> Floats:
    """Squared lengths (n,)."""
    found = np.empty(len(points))
    for start in range(0, len(points), _BLOCK):
        block = np.asarray(points[start : start + _BLOCK], dtype=np.float64)
        np.sum(block**2, axis=1, out=found[start : start + _BLOCK])
    return found


def k_center(vectors: Vectors, known: Vectors, k: int, first: int) -> Positions:
    """At most k rows, each the farthest from all of `known` and all taken before: greedy k-center (Gonzalez 1985).

    Without `known` the first pick is row `first`; ties go to the earliest row. O(n d) per pick, in single precision:
    that finds the few rows to which the pick may be nearer than those before, and their distances are then exact.
    """
    points = np.asarray(vectors)
    others: Floats = np.asarray(known, dtype=np.float64).reshape(-1, points.shape[1])
    k = min(k, len(points))
    sizes, theirs = _sizes(points), _sizes(others)
    narrow, lengths = np.asarray(points, dtype=np.float32), sizes.astype(np.float32)
    slack = 8 * (points.shape[1] + 8) * float(np.finfo(np.float32).eps) * float(sizes.max(initial=0.0))
    distance = np.full(len(points), np.inf)

    def approach(rows: Positions, centres: Floats, squares: Floats) -> None:
        """Lower the distances of rows to those from the nearest centre."""
        for start in range(0, len(rows), _BLOCK):
            some = rows[start : start + _BLOCK]
            found = _squared(points[some].astype(np.float64), sizes[some], centres, squares).min(axis=1)
            distance[some] = np.minimum(distance[some], found)

    everything: Positions = np.arange(len(points))
    if len(others):
        approach(everything, others, theirs)
    chosen: list[int] = []
    while len(chosen) < k:
        row = first if not chosen and not len(others) else int(distance.argmax())
        near: Positions = everything
        if chosen or len(others):
            rough = narrow @ narrow[row]
            rough *= -2
            rough += lengths
            near = np.flatnonzero(rough + lengths[row] < distance + slack)
        chosen.append(row)
        approach(near, points[[row]].astype(np.float64), sizes[[row]])
        distance[chosen] = -1.0  # below the distance 0 of a duplicate, so that no row is picked twice
    return np.array(chosen, dtype=np.intp)


def product_lengths(left: Vectors, right: Vectors) -> Floats:
    """Squared lengths (n,) of all g_i = a_i (x) h_i."""
    lengths = np.einsum("ij,ij->i", left, left) * np.einsum("ij,ij->i", right, right)
    return np.asarray(lengths, dtype=np.float64)


def product_distances(left: Vectors, right: Vectors, row: int, sizes: Floats) -> Floats:
    """Squared distances (n,) of all g_i = a_i (x) h_i from that of one row, without materialising them.

    |g_i - g_j|^2 = |a_i|^2 |h_i|^2 + |a_j|^2 |h_j|^2 - 2 (a_i . a_j)(h_i . h_j), for a (n, C) and h (n, d); `sizes` are
    their `product_lengths`.
    """
    distance = sizes + sizes[row] - 2 * (left @ left[row]) * (right @ right[row])
    return np.asarray(np.maximum(distance, 0.0), dtype=np.float64)  # rounding can give negative values


def seeds_of_products(left: Vectors, right: Vectors, k: int, rng: Generator) -> Positions:
    """K-means++ seeds (Arthur & Vassilvitskii 2007) of the products a_i (x) h_i, the longest first: at most k rows.

    O(n (d + C)) per pick. If no distinct product is left, the rest is random.
    """
    k = min(k, len(left))
    distance = sizes = product_lengths(left, right)
    chosen: list[int] = []
    while len(chosen) < k:
        apart = np.flatnonzero(distance > 0)
        if len(apart) == 0:
            rest = np.setdiff1d(np.arange(len(left)), chosen)
            return np.array(chosen + rng.permutation(rest)[: k - len(chosen)].tolist(), dtype=np.intp)
        if chosen:
            upto = np.cumsum(distance[apart], dtype=np.float64)
            place = int(np.searchsorted(upto, rng.random() * upto[-1], side="right"))
            row = int(apart[min(place, len(apart) - 1)])
            distance = np.minimum(distance, product_distances(left, right, row, sizes))
        else:
            row = int(distance.argmax())
            distance = product_distances(left, right, row, sizes)
        chosen.append(row)
        distance[chosen] = 0.0
    return np.array(chosen, dtype=np.intp)


def herd(weights: Floats, vectors: Vectors, known: Vectors, candidates: Positions, k: int) -> Positions:
    """At most k of `candidates`, each the one that adds most to the weighted coverage of all rows (Bae et al. 2025).

    Uncertainty coverage is `sum_i w_i max_j exp(-|x_i - x_j|^2 / r^2)`, over j in `known` and the picks; its greedy
    maximisation is uncertainty herding (arXiv:2412.20644, section 3). The radius r is the median distance of a known
    row to the nearest other one, so that it shrinks as labels grow. The paper takes the least distance, which a single
    pair of near-duplicates sets. Ties go to the first candidate. Time O(n (m d + c (d + k))) for m known rows and c
    candidates, memory O(n c).
    """
    points: Floats = np.asarray(vectors, dtype=np.float64)
    others: Floats = np.asarray(known, dtype=np.float64).reshape(-1, points.shape[1])
    sizes, theirs = _sizes(points), _sizes(others)
    k, square = min(k, len(candidates)), _nearest_square(others, theirs)
    covered = np.exp(-_nearest(points, sizes, others, theirs) / square)
    nearness = np.exp(-_squared(points, sizes, points[candidates], sizes[candidates]) / square)
    chosen: list[int] = []
    while len(chosen) < k:
        gains = weights @ np.maximum(nearness - covered[:, None], 0.0)
        gains[chosen] = -1.0
        chosen.append(int(gains.argmax()))
        np.maximum(covered, nearness[:, chosen[-1]], out=covered)
    return np.asarray(candidates)[np.array(chosen, dtype=np.intp)]


def _nearest(points: Floats, sizes: Floats, others: Floats, theirs: Floats, least: float = -1.0) -> Floats:
    """Squared distance of each row to the nearest of `others` that is farther than `least`, (n,); infinity: none."""
    found = np.full(len(points), np.inf)
    for start in range(0, len(others), _BLOCK):
        part = slice(start, start + _BLOCK)
        distance = _squared(points, sizes, others[part], theirs[part])
        np.minimum(found, distance.min(axis=1, where=distance > least, initial=np.inf), out=found)
    return found


def _nearest_square(points: Floats, sizes: Floats) -> float:
    """The median squared distance of a row to the nearest row that is not equal to it; 1.0 if all are equal.

    Of more than 1,000 rows every n-th is measured.
    """
    some = slice(None, None, max(1, -(-len(points) // _MEASURED)))
    nearest = _nearest(points[some], sizes[some], points, sizes, _SAME)
    nearest = nearest[np.isfinite(nearest)]
    return float(np.median(nearest)) if len(nearest) else 1.0


def neighbour_distance(vectors: Vectors, neighbours: int) -> Floats:
    """Mean distance of each row to its `neighbours` nearest other rows (to all if there are fewer), (n,)."""
    points: Floats = np.asarray(vectors, dtype=np.float64)
    count = min(neighbours, len(points) - 1)
    if count <= 0:
        return np.zeros(len(points))
    means, sizes = [], _sizes(points)
    for start in range(0, len(points), _BLOCK):
        part = slice(start, start + _BLOCK)
        block = _squared(points[part], sizes[part], points, sizes)
        block[np.arange(len(block)), np.arange(start, start + len(block))] = np.inf
        block.partition(count - 1, axis=1)
        means.append(np.sqrt(block[:, :count]).mean(axis=1))
    return np.concatenate(means)


def spread_over(clusters: Positions, scores: Floats, priority: Floats, k: int) -> Positions:
    """At most k rows, one of each cluster in turn: clusters by descending `priority`, rows by descending score.

    Ties keep the order of clusters and rows. `priority` has an entry for each cluster.
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
    points, others = unit_rows(vectors), unit_rows(known)
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


def mean_direction(vectors: Vectors) -> Floats:
    """The mean (d,) of the unit rows: its product with a unit row is that row's mean cosine with all rows."""
    points: Floats = unit_rows(vectors).sum(axis=0) / max(1, len(vectors))
    return points


def unit_rows(vectors: Vectors) -> Floats:
    """The rows scaled to unit length; a row of zeros stays zero."""
    points: Floats = np.asarray(vectors, dtype=np.float64)
    length = np.linalg.norm(points, axis=1, keepdims=True)
    unit: Floats = np.divide(points, length, out=np.zeros_like(points), where=length > 0)
    return unit
