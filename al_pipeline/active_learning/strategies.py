"""Query strategies: arrays of a shortlist in, positions of the selected items out.

A strategy is a function on arrays in the table `STRATEGIES`. It declares its inputs and the acquisition function that
scores the pool for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import SeedSequence

from al_pipeline.active_learning.acquisition import ACQUISITION, SAMPLE_ACQUISITION, Acquisition
from al_pipeline.active_learning.clustering import (
    herd,
    k_center,
    k_means,
    neighbour_distance,
    seeds_of_products,
    spread_over,
    unit_rows,
)
from al_pipeline.active_learning.sampling import (
    Floats,
    Positions,
    keyed_hashes,
    purpose_rng,
    sample,
    top_k,
)
from al_pipeline.active_learning.shortlist import Shortlist

Need = Literal["scores", "proba", "vectors", "labeled", "counts", "centre"]
Samples = Literal["committee", "posterior"]
"""The sampled models: a committee fitted on resampled labels, or draws from the posterior of the fitted head."""

MAX_CLUSTERS = 500
RARE = 1 / 2
"""A class with less than this part of an equal share of the labels is searched."""
HERD_CANDIDATES = 400
"""The minimum number of candidates of herding."""
HERD_ROWS = 2000
"""The maximum number of items that herding compares with one another."""
TYPICAL_NEIGHBOURS = 20
DENSITY_POWER = 1.0
"""Exponent of the similarity (beta in the paper)."""
POWER = 1.0
"""Exponent of the score (beta in the paper); 0 is a uniform draw from the shortlist."""


class Picked(NamedTuple):
    """A strategy's selection: positions (b,) in query order, and selection probabilities (b,) (see `batch`)."""

    positions: Positions
    probability: Floats


@dataclass(frozen=True, slots=True)
class Strategy:
    """One query strategy.

    `pick(view, k, seed)` gets rows sorted by id, so that the result depends on the set alone, and 1 <= k <= rows. The
    rows are the shortlist; a random sample of the candidates if it needs vectors and no scores; all candidates (ids
    alone) if it needs nothing.
    """

    pick: Callable[[Shortlist, int, SeedSequence], Picked]
    needs: frozenset[Need]
    acquisition: str | None = None
    """The acquisition function that computes the scores."""
    samples: Samples | None = None
    """The sampled models whose probabilities (n, K, C) are scored; None for the model's own (n, C)."""


def _pick_random(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    return Picked(sample(view.ids, k, seed, "random"), np.full(k, k / max(1, len(view.ids))))


def _pick_top(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    assert view.scores is not None  # declared in `needs`, checked by `choose`
    return Picked(top_k(view.scores, view.ids, k, seed), np.ones(k))


def _pick_kmeans(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """K-means sampling: the item nearest to each of k centres, the largest cluster first (Kang, Ryu & Kwon 2004)."""
    assert view.vectors is not None
    clusters, centres = k_means(view.vectors, k, purpose_rng(seed, "kmeans"))
    distance = np.linalg.norm(view.vectors - centres[clusters], axis=1)
    sizes = np.bincount(clusters, minlength=len(centres))
    return Picked(spread_over(clusters, -distance, sizes.astype(np.float64), k), np.ones(k))


def _pick_typiclust(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """TypiClust: the most typical item of each large cluster without labels (Hacohen, Dekel & Weinshall 2022).

    The number of clusters is that of labels and picks together, at most 500. Typicality is the inverse of the mean
    distance to the 20 nearest neighbours in the cluster (arXiv:2202.02794, section 2).
    """
    assert view.vectors is not None and view.labeled is not None
    known = view.labeled.reshape(-1, view.vectors.shape[1])
    everything = np.concatenate([view.vectors, known])
    clusters, centres = k_means(everything, min(len(known) + k, MAX_CLUSTERS), purpose_rng(seed, "typiclust"))
    own, labeled = clusters[: len(view.ids)], np.bincount(clusters[len(view.ids) :], minlength=len(centres))
    sizes = np.bincount(own, minlength=len(centres))
    typicality = np.zeros(len(view.ids))
    for cluster in np.unique(own):
        rows = np.flatnonzero(own == cluster)
        typicality[rows] = -neighbour_distance(view.vectors[rows], TYPICAL_NEIGHBOURS)
    return Picked(spread_over(own, typicality, sizes - float(len(view.ids)) * labeled, k), np.ones(k))


def _pick_cluster_margin(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Cluster-margin: of the 10 k smallest margins, the smallest in each of k clusters.

    Margin sampling before clustering is from Citovsky et al. 2021 (arXiv:2107.14263), k-means over the most informative
    items from Zhdanov 2019 (arXiv:1901.05954).
    """
    assert view.vectors is not None and view.scores is not None
    unsure = np.sort(top_k(view.scores, view.ids, 10 * k, seed))
    few = view.rows(unsure)
    assert few.vectors is not None and few.scores is not None
    clusters, _ = k_means(few.vectors, k, purpose_rng(seed, "cluster_margin"))
    ranks = np.empty(len(unsure))
    ranks[top_k(few.scores, few.ids, len(unsure), seed)] = -np.arange(len(unsure), dtype=np.float64)
    best = np.full(int(clusters.max(initial=0)) + 1, -np.inf)
    np.maximum.at(best, clusters, ranks)
    return Picked(unsure[spread_over(clusters, ranks, best, k)], np.ones(k))


def _pick_herding(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Uncertainty herding: items that cover the uncertainty of the shortlist best (Bae, Oliveira & Sutherland 2025).

    The margin of each item is weighted by its distance from labels and picks, and each pick takes the most of what is
    left (arXiv:2412.20644). With few labels the batch is representative, with many uncertain: the radius of an item's
    coverage is the distance between labels. Candidates are the smallest margins, ten times the batch.
    """
    assert view.vectors is not None and view.scores is not None and view.labeled is not None
    order = top_k(view.scores, view.ids, len(view.ids), seed)
    picked = np.empty(k, dtype=np.intp)
    parts = -(-len(order) // HERD_ROWS)
    for part in range(parts):  # a large shortlist is dealt into parts, so that memory is bounded
        rows, size = order[part::parts], len(range(part, k, parts))
        leading = np.arange(min(len(rows), max(HERD_CANDIDATES, 10 * size)))
        picked[part::parts] = rows[herd(view.scores[rows], view.vectors[rows], view.labeled, leading, size)]
    return Picked(picked, np.ones(k))


def _pick_class_balanced(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Class-balanced sampling: each pick is the most uncertain item predicted as the class with the fewest labels.

    Picks count as labels of their predicted class (a greedy variant of Bengar et al. 2022, arXiv:2110.04543, who solve
    for the quotas of a batch). Ties between classes go to the first of the schema.
    """
    assert view.scores is not None and view.proba is not None and view.counts is not None
    order = top_k(view.scores, view.ids, len(view.ids), seed)
    waiting: dict[int, list[int]] = {}
    for row in order.tolist():
        waiting.setdefault(int(view.proba[row].argmax()), []).append(row)
    counts = np.array(view.counts, dtype=np.int64)
    picked: list[int] = []
    while len(picked) < k:
        poorest = min(waiting, key=lambda c: (counts[c], c))
        picked.append(waiting[poorest].pop(0))
        counts[poorest] += 1
        if not waiting[poorest]:
            del waiting[poorest]
    return Picked(np.array(picked, dtype=np.intp), np.ones(k))


def _pick_relevance(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Relevance sampling for the rarest classes in half of the batch; uncertainty herding in the rest.

    Each relevance pick is the item with the highest probability of the class with the fewest labels (at least one), and
    counts as one of its labels (Lewis & Gale 1994, section 3, for a single class). If every class has at least half
    of an equal share of the labels, the batch is all herding.
    """
    assert view.counts is not None
    picked = likely_of_the_rarest(view, k // 2, seed) if is_unbalanced(view.counts.tolist(), RARE) else []
    rest = np.setdiff1d(np.arange(len(view.ids)), picked)
    left = view.rows(rest)
    if picked:  # they cover their surroundings
        assert view.vectors is not None and view.labeled is not None
        left = replace(left, labeled=np.concatenate([view.labeled, view.vectors[picked]]))
    others = rest[_pick_herding(left, k - len(picked), seed).positions]
    return Picked(np.concatenate([np.array(picked, dtype=np.intp), others]), np.ones(k))


def likely_of_the_rarest(view: Shortlist, k: int, seed: SeedSequence) -> list[int]:
    """k rows, each the likeliest of the class with the fewest labels, of which it then counts as one."""
    assert view.proba is not None and view.counts is not None
    counts = np.array(view.counts, dtype=np.int64)
    seen = np.flatnonzero(counts)
    free = np.ones(len(view.ids), dtype=np.bool_)
    ties = np.argsort(sample(view.ids, len(view.ids), seed, "relevance"))
    picked: list[int] = []
    for _ in range(k):
        poorest = seen[counts[seen].argmin()]
        order = np.lexsort((ties, np.where(free, -view.proba[:, poorest], np.inf)))
        picked.append(int(order[0]))
        free[picked[-1]] = False
        counts[poorest] += 1
    return picked


def is_unbalanced(counts: Sequence[int], part: float) -> bool:
    """Whether a class with labels has less than `part` of an equal share of them; `counts` (C,): labels by class."""
    return len(counts) * min((count for count in counts if count), default=0) < part * sum(counts)


def _pick_badge(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """BADGE: k-means++ seeds of the gradient embeddings under the predicted labels (Ash et al. 2020).

    The gradient of item i in the last layer is (p_i - onehot(argmax p_i)) (x) h_i, with h its vector and a 1 for the
    bias (arXiv:1906.03671, section 3). The outer products are not materialised, and the longest is the first seed, as
    in the authors' code. It is applied to the shortlist (the smallest margins), not to the pool.
    """
    assert view.proba is not None and view.vectors is not None
    errors = np.array(view.proba, dtype=np.float64)
    errors[np.arange(len(errors)), errors.argmax(axis=1)] -= 1.0
    seen = np.column_stack([view.vectors, np.ones(len(errors))])
    return Picked(seeds_of_products(errors, seen, k, purpose_rng(seed, "badge")), np.ones(k))


def _pick_core_set(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Core-set: each pick is the farthest from all labels and picks (Sener & Savarese 2018, arXiv:1708.00489).

    This is their greedy k-center, without the mixed integer programme. Without labels the first pick is random.
    """
    assert view.vectors is not None and view.labeled is not None
    first = int(sample(view.ids, 1, seed, "core_set")[0])
    return Picked(k_center(view.vectors, view.labeled, k, first), np.ones(k))


def _pick_density(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Information density: uncertainty times mean similarity to the pool (Settles & Craven 2008, section 3.4).

    Similarity is the cosine, so its mean over the pool is a product with the mean unit vector, and the cost is linear.
    Negative similarities count as 0.
    """
    assert view.vectors is not None and view.scores is not None and view.centre is not None
    likeness = np.maximum(unit_rows(view.vectors) @ view.centre, 0.0)
    return Picked(top_k(view.scores * likeness**DENSITY_POWER, view.ids, k, seed), np.ones(k))


def _pick_power(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Power sampling: sampling without replacement, proportional to a power of the scores (Kirsch et al. 2023).

    The k largest values of `POWER * log(score)` plus Gumbel noise (arXiv:2106.12059). The noise depends on seed and id
    alone. Items with a score of zero come last.
    """
    assert view.scores is not None
    uniform = (keyed_hashes(view.ids, seed, "power").astype(np.float64) + 0.5) / 2.0**64
    noise = -np.log(-np.log(np.clip(uniform, 1e-18, 1 - 2.0**-53)))
    positive = view.scores > 0
    logs = np.log(view.scores, out=np.full(len(noise), -np.inf), where=positive)
    return Picked(top_k(POWER * logs + noise, view.ids, k, seed), np.ones(k))


STRATEGIES: dict[str, Strategy] = {
    "random": Strategy(_pick_random, frozenset()),
    "least_confidence": Strategy(_pick_top, frozenset({"scores"}), "least_confidence"),
    "margin": Strategy(_pick_top, frozenset({"scores"}), "margin"),
    "entropy": Strategy(_pick_top, frozenset({"scores"}), "entropy"),
    "cluster_margin": Strategy(_pick_cluster_margin, frozenset({"scores", "vectors"}), "margin"),
    "herding": Strategy(_pick_herding, frozenset({"scores", "vectors", "labeled"}), "margin"),
    "class_balanced": Strategy(_pick_class_balanced, frozenset({"scores", "proba", "counts"}), "margin"),
    "relevance": Strategy(_pick_relevance, frozenset({"scores", "proba", "vectors", "labeled", "counts"}), "margin"),
    "badge": Strategy(_pick_badge, frozenset({"scores", "proba", "vectors"}), "margin"),
    "density": Strategy(_pick_density, frozenset({"scores", "vectors", "centre"}), "margin"),
    "vote_entropy": Strategy(_pick_top, frozenset({"scores"}), "vote_entropy", "committee"),
    "consensus_entropy": Strategy(_pick_top, frozenset({"scores"}), "consensus_entropy", "committee"),
    "kl_disagreement": Strategy(_pick_top, frozenset({"scores"}), "kl_disagreement", "committee"),
    "bald": Strategy(_pick_top, frozenset({"scores"}), "bald", "posterior"),
    "power_bald": Strategy(_pick_power, frozenset({"scores"}), "bald", "posterior"),
    "core_set": Strategy(_pick_core_set, frozenset({"vectors", "labeled"})),
    "kmeans": Strategy(_pick_kmeans, frozenset({"vectors"})),
    "typiclust": Strategy(_pick_typiclust, frozenset({"vectors", "labeled"})),
}
"""All query strategies, by their names in `params.yaml`; `auto` selects one of them for each round."""

COLD_STARTS = tuple(name for name, strategy in STRATEGIES.items() if not strategy.needs & {"scores", "proba"})
"""Strategies that need no model."""


class Scoring(NamedTuple):
    """How the pool is scored for a strategy: the acquisition function and the sampled models (n, K, C), if any.

    `samples` is None if the function takes the model's own probabilities (n, C).
    """

    acquisition: str
    samples: Samples | None

    @property
    def function(self) -> Acquisition:
        """Probabilities (n, C), or samples (n, K, C), -> scores (n,)."""
        return (ACQUISITION if self.samples is None else SAMPLE_ACQUISITION)[self.acquisition]


def scoring_of(strategy: str) -> Scoring:
    """How the pool is scored for a strategy; by margin for `auto` and for strategies without scores."""
    known = STRATEGIES.get(strategy)
    if known is None or known.acquisition is None:
        return Scoring("margin", None)
    return Scoring(known.acquisition, known.samples)
