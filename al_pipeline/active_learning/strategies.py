"""Query strategies: which unlabelled items to ask about next, in which order, with which probability.

A strategy is one function on arrays in the table `STRATEGIES`; it declares what it needs to see. `choose` makes a
batch with it: the random slice first, then items to ask again, then the strategy's own picks. All of it is a function
of ids, scores and seed, never of the order in which items come. `next_batch` is what a round does: it names the
strategy, lets it see what it needs, and chooses; the stage `select` and a simulation both call it.

**What `Query.probability` says.** For `random_slice`, `random` and `random_fill` it is drawn / drawn from: the chance
that this draw took this item, equal for all the items it could take. The random slice is a simple random sample of
*all* candidates, so that its answers alone estimate anything about the unlabelled pool, each with weight
1 / probability. For a deterministic choice it is 1.0: given these scores and this seed the item was certain to be
asked (and the others certain not to be). Such rows say nothing about the pool, and no weight makes them do so.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import ArrayLike, NDArray

from al_pipeline.active_learning.acquisition import ApproximateMargins, margin
from al_pipeline.active_learning.clustering import (
    k_center,
    k_means,
    mean_direction,
    neighbour_distance,
    seeds_of_products,
    spread_over,
    unit_rows,
    unlike,
)
from al_pipeline.records import RANDOM, RANDOM_SLICE, Query

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]
Need = Literal["scores", "proba", "vectors", "labeled", "counts", "centre"]
Samples = Literal["committee", "posterior"]
"""Who else judges an item: heads fitted on resampled labels, or drawn around the fitted one."""
VectorsOf = Callable[[Sequence[str]], NDArray[np.floating]]
"""Ids -> the encoder's vectors (n, d), in their order."""

ASK_AGAIN = "ask_again"
"""Items whose answers were tied."""
ASKED = "asked"
"""The rule of an item that a person wanted in the batch (`al ask`): no draw, and no estimate rests on it."""
GUIDED = "guided"
"""Nearest to what the user gave for a class that has few labels."""
RANDOM_FILL = "random_fill"
"""Drawn at random because the shortlist was shorter than the batch."""

COLD_CANDIDATES = 5000
"""A strategy that goes by vectors alone looks at so many candidates, drawn at random: memory does not grow.

The centre of the pool is that of as many.
"""
MAX_CLUSTERS = 500
GUIDED_LABELS = 10
"""Labels of a class from which its guide is no longer followed: the model knows it better."""
TYPICAL_NEIGHBOURS = 20
DENSITY_POWER = 1.0
"""How much similarity counts beside uncertainty (beta in the paper)."""
_BLOCK = 10_000
"""Ids that are held at a time."""
_GLANCE = 8000
_OPEN = 256
"""So many items are looked at together, and get their exact scores together."""
_PLACE = 1e-6
"""How far rounding may move the place of a score."""
POWER = 1.0
"""How much a score counts beside chance (beta in the paper); 0 is a uniform draw from the shortlist."""


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The items that a strategy looks at, row by row: ids (s,), scores (s,), proba (s, C), vectors (s, d).

    Beside them, what is labelled already: its vectors, `labeled` (m, d), and how many of each class, `counts` (C,); and
    `centre` (d,), the mean of the candidates' vectors at unit length.
    """

    ids: Sequence[str]
    scores: Floats | None = None
    proba: Floats | None = None
    vectors: Floats | None = None
    labeled: Floats | None = None
    counts: Positions | None = None
    centre: Floats | None = None

    def __post_init__(self) -> None:
        if len(set(self.ids)) < len(self.ids):
            raise ValueError(f"the shortlist names an item twice: {_first_repeat(self.ids)!r}")
        for need in ("scores", "proba", "vectors"):
            values = getattr(self, need)
            if values is None:
                continue
            if len(values) != len(self.ids):
                raise ValueError(f"the shortlist has {len(self.ids)} ids and {len(values)} rows of {need}")
            finite = np.isfinite(values).all(axis=tuple(range(1, np.ndim(values))))
            if not finite.all():
                raise ValueError(f"{need} of item {self.ids[int(np.argmin(finite))]!r} are not finite")

    def rows(self, positions: Positions) -> Shortlist:
        """The same, for some rows in the order given."""
        return replace(
            self,
            ids=[self.ids[position] for position in positions],
            **{
                need: np.asarray(values)[positions]
                for need in ("scores", "proba", "vectors")
                if (values := getattr(self, need)) is not None
            },
        )


class Picked(NamedTuple):
    """A strategy's answer: positions (b,) in the order to ask, and the probability (b,) of each (see the module)."""

    positions: Positions
    probability: Floats


@dataclass(frozen=True, slots=True)
class Strategy:
    """One query strategy.

    `pick(view, k, seed)` gets rows sorted by id, so that a function of arrays is a function of the set, and from one
    pick to make to as many as there are rows. It sees the shortlist; a sample of the candidates if it needs vectors and
    no scores; every candidate (ids alone) if it needs nothing.
    """

    pick: Callable[[Shortlist, int, SeedSequence], Picked]
    needs: frozenset[Need]
    acquisition: str | None = None
    """Which acquisition function makes the scores."""
    samples: Samples | None = None
    """Whose samples (n, K, C) the acquisition function is of; None where it is of the model's own probabilities."""


def round_seed(project_seed: int, round_number: int, strategy: str) -> SeedSequence:
    """The seed of one round's choice, so that a repeated build picks the same batch."""
    return SeedSequence([project_seed, round_number, zlib.crc32(strategy.encode())])


def _rng(seed: SeedSequence, purpose: str) -> np.random.Generator:
    return np.random.default_rng([*seed.generate_state(4), zlib.crc32(purpose.encode())])


def top_k(scores: ArrayLike, ids: Sequence[str], k: int, seed: SeedSequence) -> Positions:
    """Positions of the k highest scores, best first; equal scores in the order of a hash of (seed, id).

    Fewer than k rows give them all. Raises ValueError on a NaN (infinities are in order) and on a negative k.
    """
    values: Floats = np.asarray(scores, dtype=np.float64)
    if values.shape != (len(ids),):
        raise ValueError(f"there are {len(ids)} ids and scores of shape {values.shape}")
    if np.isnan(values).any():
        raise ValueError(f"the score of item {ids[int(np.argmax(np.isnan(values)))]!r} is NaN")
    k = _batch(k, len(ids))
    if k == 0:
        return np.empty(0, dtype=np.intp)
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    contenders = np.flatnonzero(values >= threshold)
    found, names = values[contenders], [ids[position] for position in contenders]
    keys = np.zeros(len(contenders), dtype=np.uint64)
    if len(tied := _tied(found)):
        keys[tied] = _hashes([names[row] for row in tied], seed, "ties")
    return contenders[_lexsort(keys, -found, names)[:k]]


def _tied(values: Floats) -> Positions:
    """Where a value stands that comes more than once."""
    order = np.argsort(values)
    same = values[order][1:] == values[order][:-1]
    return order[np.append(same, False) | np.append(False, same)] if same.any() else order[:0]


def sample(ids: Sequence[str], k: int, seed: SeedSequence, purpose: str = "sample") -> Positions:
    """Positions of a uniform random sample of k of the ids, in random order; all of them where there are fewer.

    The k smallest hashes of (seed, purpose, id): no order of the ids, and no release of a random generator, changes it.
    """
    k = _batch(k, len(ids))
    if k == 0:
        return np.empty(0, dtype=np.intp)
    keys = _hashes(ids, seed, purpose)
    if k < len(ids):
        threshold = np.partition(keys, k)[k]
        contenders = np.flatnonzero(keys <= threshold)
    else:
        contenders = np.arange(len(ids))
    tied = [ids[position] for position in contenders]
    return contenders[_lexsort(keys[contenders], np.zeros(len(contenders)), tied)[:k]]


def draw(ids: Iterable[str], k: int, seed: SeedSequence, purpose: str = "sample") -> list[str]:
    """The ids that `sample` takes, in its order, of a pool that comes one by one: no more than a block is held."""
    kept: list[str] = []
    keys = np.empty(0, dtype=np.uint64)
    if k == 0:
        return kept
    for block in _blocks(ids):
        fresh = _hashes(block, seed, purpose)
        near = np.arange(len(block)) if len(kept) < k else np.flatnonzero(fresh <= keys[-1])
        names, both = kept + [block[row] for row in near], np.concatenate([keys, fresh[near]])
        order = _lexsort(both, np.zeros(len(both)), names)[: _batch(k, len(names))]
        kept, keys = [names[row] for row in order], both[order]
    return kept


def _blocks(ids: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(ids)
    while block := list(islice(rest, _BLOCK)):
        yield block


def _pick_random(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    return Picked(sample(view.ids, k, seed, "random"), np.full(k, k / max(1, len(view.ids))))


def _pick_top(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    assert view.scores is not None  # declared in `needs`, checked by `choose`
    return Picked(top_k(view.scores, view.ids, k, seed), np.ones(k))


def _pick_kmeans(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """K-means sampling: the item nearest to each of k centres, the largest cluster first (Kang, Ryu & Kwon 2004)."""
    assert view.vectors is not None
    clusters, centres = k_means(view.vectors, k, _rng(seed, "kmeans"))
    distance = np.linalg.norm(view.vectors - centres[clusters], axis=1)
    sizes = np.bincount(clusters, minlength=len(centres))
    return Picked(spread_over(clusters, -distance, sizes.astype(np.float64), k), np.ones(k))


def _pick_typiclust(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """TypiClust: the most typical item of each large cluster without labels (Hacohen, Dekel & Weinshall 2022).

    As many clusters as there are labels and picks together, at most 500. Typicality is one over the mean distance to
    the 20 nearest of the same cluster (arXiv:2202.02794, section 2).
    """
    assert view.vectors is not None and view.labeled is not None
    known = view.labeled.reshape(-1, view.vectors.shape[1])
    everything = np.concatenate([view.vectors, known])
    clusters, centres = k_means(everything, min(len(known) + k, MAX_CLUSTERS), _rng(seed, "typiclust"))
    own, labeled = clusters[: len(view.ids)], np.bincount(clusters[len(view.ids) :], minlength=len(centres))
    sizes = np.bincount(own, minlength=len(centres))
    typicality = np.zeros(len(view.ids))
    for cluster in np.unique(own):
        rows = np.flatnonzero(own == cluster)
        typicality[rows] = -neighbour_distance(view.vectors[rows], TYPICAL_NEIGHBOURS)
    return Picked(spread_over(own, typicality, sizes - float(len(view.ids)) * labeled, k), np.ones(k))


def _pick_cluster_margin(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Cluster-margin: of the 10 k smallest margins, the smallest in each of k clusters.

    The margin before the clusters is from Citovsky et al. 2021 (arXiv:2107.14263), k-means over the most informative
    ones from Zhdanov 2019 (arXiv:1901.05954).
    """
    assert view.vectors is not None and view.scores is not None
    unsure = np.sort(top_k(view.scores, view.ids, 10 * k, seed))
    few = view.rows(unsure)
    assert few.vectors is not None and few.scores is not None
    clusters, _ = k_means(few.vectors, k, _rng(seed, "cluster_margin"))
    ranks = np.empty(len(unsure))
    ranks[top_k(few.scores, few.ids, len(unsure), seed)] = -np.arange(len(unsure), dtype=np.float64)
    best = np.full(int(clusters.max(initial=0)) + 1, -np.inf)
    np.maximum.at(best, clusters, ranks)
    return Picked(unsure[spread_over(clusters, ranks, best, k)], np.ones(k))


def _pick_class_balanced(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Class-balanced quotas: each pick is the most uncertain item of the predicted class that has the fewest labels.

    Picks count as labels of the class that is predicted (after Bengar et al. 2022, arXiv:2110.04543, who solve for
    the quotas of a batch; here they fill up one by one). Of equally poor classes the first of the schema.
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
    """Relevance sampling for the classes with few labels, in half of the batch; cluster-margin in the rest.

    Each of those picks is the item that is most probably of the class with the fewest labels, of those that have any
    (Lewis & Gale 1994, section 3, who search for one class), and counts as one of its labels. Where no class has less
    than half of an equal share of the labels, the whole batch is cluster-margin's.
    """
    assert view.proba is not None and view.counts is not None
    counts = np.array(view.counts, dtype=np.int64)
    seen = np.flatnonzero(counts)
    free = np.ones(len(view.ids), dtype=np.bool_)
    picked: list[int] = []
    if is_unbalanced(counts.tolist()):
        ties = np.argsort(sample(view.ids, len(view.ids), seed, "relevance"))
        for _ in range(k // 2):
            poorest = seen[counts[seen].argmin()]
            order = np.lexsort((ties, np.where(free, -view.proba[:, poorest], np.inf)))
            picked.append(int(order[0]))
            free[picked[-1]] = False
            counts[poorest] += 1
    rest = np.flatnonzero(free)
    others = rest[_pick_cluster_margin(view.rows(rest), k - len(picked), seed).positions]
    return Picked(np.concatenate([np.array(picked, dtype=np.intp), others]), np.ones(k))


def is_unbalanced(counts: Sequence[int]) -> bool:
    """Whether a class that has labels, of `counts` (C,), has less than half of an equal share of them."""
    return 2 * len(counts) * min((count for count in counts if count), default=0) < sum(counts)


def _pick_badge(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """BADGE: k-means++ seeds of the gradients that the items' likeliest labels would give (Ash et al. 2020).

    The gradient of item i in the last layer is (p_i - onehot(argmax p_i)) (x) h_i, with h its vector and a 1 for the
    bias (arXiv:1906.03671, section 3); no gradient is made, and the longest comes first, as in the authors' code. Here
    of the smallest margins: of the shortlist, that is, not of the pool.
    """
    assert view.proba is not None and view.vectors is not None
    errors = np.array(view.proba, dtype=np.float64)
    errors[np.arange(len(errors)), errors.argmax(axis=1)] -= 1.0
    seen = np.column_stack([view.vectors, np.ones(len(errors))])
    return Picked(seeds_of_products(errors, seen, k, _rng(seed, "badge")), np.ones(k))


def _pick_core_set(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Core-set: each pick is the farthest from all labels and picks (Sener & Savarese 2018, arXiv:1708.00489).

    Their greedy k-center, without the mixed integer programme after it. The first pick without labels is random.
    """
    assert view.vectors is not None and view.labeled is not None
    first = int(sample(view.ids, 1, seed, "core_set")[0])
    return Picked(k_center(view.vectors, view.labeled, k, first), np.ones(k))


def _pick_density(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Information density: uncertainty times mean similarity to the pool (Settles & Craven 2008, section 3.4).

    Similarity is the cosine, so that its mean over the pool is the cosine with one vector, and the cost linear; what
    points away from the pool has none.
    """
    assert view.vectors is not None and view.scores is not None and view.centre is not None
    likeness = np.maximum(unit_rows(view.vectors) @ view.centre, 0.0)
    return Picked(top_k(view.scores * likeness**DENSITY_POWER, view.ids, k, seed), np.ones(k))


def _pick_power(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """Power sampling: a draw without replacement, by the scores' power (Kirsch et al. 2023, arXiv:2106.12059).

    The k largest of `POWER * log(score)` with Gumbel noise, which an item keeps whatever stands beside it. Items with a
    score of zero come last.
    """
    assert view.scores is not None
    uniform = (_hashes(view.ids, seed, "power").astype(np.float64) + 0.5) / 2.0**64
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
    "class_balanced": Strategy(_pick_class_balanced, frozenset({"scores", "proba", "counts"}), "margin"),
    "relevance": Strategy(_pick_relevance, frozenset({"scores", "proba", "vectors", "counts"}), "margin"),
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
"""Every query strategy, by the name that `params.yaml` uses, except `auto`, which names one of them for each round."""

COLD_STARTS = tuple(name for name, strategy in STRATEGIES.items() if not strategy.needs & {"scores", "proba"})
"""Those that can ask before there is a model."""
AUTO = "auto"
FEW_LABELS = 500
"""Up to so many labels `auto` spreads a batch over clusters; with more, the margin alone tells enough."""


class Choice(NamedTuple):
    """The strategy of one round, and why it is this one."""

    strategy: str
    reason: str


@dataclass(frozen=True, slots=True)
class Asking:
    """How a project asks: its seed, and what `params.yaml` says in `round` and `select`."""

    seed: int
    seed_size: int
    strategy: str
    batch_size: int
    random_share: float
    shortlist: int
    cold_start: str = "random"
    max_similarity: float = 1.0
    guide: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Words, phrases or whole texts that a class is found by."""


def choose_strategy(asking: Asking, round_number: int, counts: Sequence[int], has_vectors: bool) -> Choice:
    """Which strategy asks the batch of a round, by the labels of each class that there are, `counts` (C,).

    Before the first label it is `cold_start`; `auto` goes by what is known of the project, and never reads a score.
    While all labels are of one class it searches: every other round what is least like all that was asked, since a
    rare class is often odd, and at random in between, since an odd item is often no more than that.
    """
    seen, labels = sum(count > 0 for count in counts), sum(counts)
    if labels == 0:
        return Choice(asking.cold_start, "there is no label yet")
    if asking.strategy != AUTO:
        return Choice(asking.strategy, "params.yaml names it")
    if seen < 2:
        alone = f"of {len(counts)} classes only {seen} was seen: a model cannot tell anything apart"
        if has_vectors and round_number % 2 == 1:
            return Choice("core_set", f"{alone}, so that what is least like the labelled is looked at")
        return Choice("random", alone)
    missing = f", {len(counts) - seen} of {len(counts)} classes unseen" if seen < len(counts) else ""
    fewest = min(count for count in counts if count)
    if is_unbalanced(counts):
        few = f"{labels} labels, only {fewest} of the poorest class{missing}: half of a batch looks for such classes"
        return Choice("relevance" if has_vectors else "class_balanced", few)
    if not has_vectors:
        return Choice("margin", "the features have no encoder, so that nothing tells how the pool is spread")
    if labels < FEW_LABELS:
        return Choice("cluster_margin", f"{labels} labels, fewer than {FEW_LABELS}{missing}: a batch is spread")
    return Choice("margin", f"{labels} labels: the margin alone tells enough")


def acquisition_of(strategy: str) -> str:
    """The acquisition function that scores the pool for a strategy; margin, where the strategy has none of its own."""
    return (STRATEGIES[strategy].acquisition if strategy in STRATEGIES else None) or "margin"


def samples_of(strategy: str) -> Samples | None:
    """Whose samples score the pool for a strategy; None where the model's own probabilities do."""
    return STRATEGIES[strategy].samples if strategy in STRATEGIES else None


def ensemble_seed(project_seed: int, round_number: int, strategy: str) -> SeedSequence:
    """The seed of the models that `samples_of` names, for the batch of one round."""
    return SeedSequence([*round_seed(project_seed, round_number, strategy).generate_state(4), zlib.crc32(b"ensemble")])


class TopK:
    """The best of a pool that comes part by part: what `top_candidates` keeps of the whole, and a row of figures of
    each.

    It holds no more than twice as many, and one part. What scores lower than all that are kept is passed over unseen.
    """

    def __init__(self, shortlist: int, batch_size: int, project_seed: int, columns: int = 0) -> None:
        self._keep = (shortlist, batch_size, project_seed)
        self._size = max(shortlist, 2 * batch_size)
        self._least = -np.inf
        self._ids: list[str] = []
        self._scores: list[Floats] = [np.empty(0)]
        self._rows: list[Floats] = [np.empty((0, columns))]

    @property
    def least(self) -> float:
        """What scores lower is not kept, whatever else comes."""
        return self._least

    def add(self, ids: Sequence[str], scores: Floats, rows: Floats | None = None) -> None:
        """Look at another part: ids, scores (n,), and figures (n, columns) where there are some."""
        near = np.flatnonzero(~(scores < self._least))  # a NaN stays, to be named
        if len(near) == 0:
            return
        self._ids += ids if len(near) == len(ids) else [ids[row] for row in near]
        self._scores.append(scores[near])
        self._rows.append(np.empty((len(near), 0)) if rows is None else rows[near])
        if len(self._ids) > 2 * self._size:
            self._cut()

    def kept(self) -> tuple[list[str], Floats, Floats]:
        """Ids, scores and figures, best first."""
        self._cut()
        return list(self._ids), self._scores[0], self._rows[0]

    def _cut(self) -> None:
        scores, rows = np.concatenate(self._scores), np.concatenate(self._rows)
        best = top_candidates(self._ids, scores, *self._keep)
        self._ids, self._scores, self._rows = [self._ids[row] for row in best], [scores[best]], [rows[best]]
        if len(best) >= self._size:
            self._least = float(self._scores[0][-1])


class ScoreSummary(NamedTuple):
    """The best (ids, scores, probabilities, best first), items in each bin of scores, items by likeliest class."""

    kept: tuple[list[str], Floats, Floats]
    counts: NDArray[np.int64]
    predicted: NDArray[np.int64]


class ApproximateScorer(Protocol):
    """A head that sees at a glance who is no candidate; both go by what it made of the features, (seen, n) a block."""

    def glance(self, columns: Sequence[NDArray[np.float32]]) -> ApproximateMargins:
        """Margins in single precision."""
        ...

    def exact(self, columns: Sequence[NDArray[np.float32]]) -> Floats:
        """Probabilities (n, C)."""
        ...


class ScoreAccumulator:
    """What is told of a pool that comes part by part: the best, how scores are spread, which classes are likely."""

    def __init__(self, best: TopK, bounds: tuple[float, float], bins: int, classes: int) -> None:
        self._best = best
        self._low, self._scale = bounds[0], bins / (bounds[1] - bounds[0])
        self.edges: Floats = np.linspace(*bounds, bins + 1, dtype=np.float64)
        """Of equally wide bins; what lies beyond counts in the outermost."""
        self._counts = np.zeros(bins, dtype=np.int64)
        self._predicted = np.zeros(classes, dtype=np.int64)
        self._unseen = _Buffer()
        self._open = _Buffer()
        self._head: ApproximateScorer | None = None

    def add(self, ids: Sequence[str], scores: Floats, proba: Floats) -> None:
        """Take a part into account: ids, scores (n,), probabilities (n, C)."""
        bins = np.searchsorted(self.edges[1:-1], scores, side="right")
        self._counts += np.bincount(bins, minlength=len(self._counts))
        self._predicted += np.bincount(proba.argmax(axis=1), minlength=len(self._predicted))
        self._best.add(ids, scores, proba)

    def look(self, ids: Sequence[str], columns: Sequence[NDArray[np.float32]], head: ApproximateScorer) -> None:
        """Take a part into account by its margins, to the bit as `add` would. All parts come from the same head.

        Exact scores are made only for what may be among the best, and where a glance leaves open which bin or class it
        counts in. Parts wait until there are enough for either: a step costs as much for few items as for many.
        """
        self._head = head
        self._unseen.add(ids, columns)
        if len(self._unseen) >= _GLANCE:
            self._glance(head)
        if len(self._open) >= _OPEN:
            self._settle(head)

    def result(self) -> ScoreSummary:
        """Of all parts so far."""
        if self._head is not None:
            self._glance(self._head)
            self._settle(self._head)
        return ScoreSummary(self._best.kept(), self._counts.copy(), self._predicted.copy())

    def _glance(self, head: ApproximateScorer) -> None:
        """Count what is plain; put aside what is not."""
        if len(self._unseen) == 0:
            return
        ids, columns = self._unseen.take()
        glance = head.glance(columns)
        places = (glance.scores - np.float32(self._low)) * np.float32(self._scale)  # in bins
        edges = np.clip(np.rint(places), 1, len(self._counts) - 1)  # the nearest that parts two bins
        plain = np.abs(places - edges) > (glance.slack + _PLACE) * self._scale
        # compared so that a NaN is not plain
        plain &= glance.scores < np.float32(min(self._best.least, 1.0) - glance.slack - _PLACE)
        open_ = np.flatnonzero(~plain)
        if len(open_) < len(plain):
            bins = np.clip(places[plain], 0, len(self._counts) - 1).astype(np.intp)
            self._counts += np.bincount(bins, minlength=len(self._counts))
            likely = np.array([np.count_nonzero(row) for row in glance.likeliest])
            self._predicted += likely - glance.likeliest[:, open_].sum(axis=1)
        if len(open_):
            self._open.add([ids[row] for row in open_], [part[:, open_] for part in columns])

    def _settle(self, head: ApproximateScorer) -> None:
        """Take into account what was put aside."""
        if len(self._open) == 0:
            return
        ids, columns = self._open.take()
        proba = head.exact(columns)
        self.add(ids, margin(proba), proba)


class _Buffer:
    """Items that wait, with what the head made of their features, (seen, n) a block."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._parts: list[Sequence[NDArray[np.float32]]] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Sequence[str], columns: Sequence[NDArray[np.float32]]) -> None:
        self._ids += ids
        self._parts.append(columns)

    def take(self) -> tuple[list[str], list[NDArray[np.float32]]]:
        """All of them; nobody waits any more."""
        ids, columns = self._ids, [np.concatenate(blocks, axis=1) for blocks in zip(*self._parts, strict=True)]
        self._ids, self._parts = [], []
        return ids, columns


def top_candidates(
    ids: Sequence[str], scores: ArrayLike, shortlist: int, batch_size: int, project_seed: int
) -> Positions:
    """Positions of the candidates that go on the shortlist, best first: `shortlist` of them, or two batches if more."""
    return top_k(scores, ids, max(shortlist, 2 * batch_size), round_seed(project_seed, 0, "score"))


def next_batch(
    asking: Asking,
    round_number: int,
    candidates: Collection[str],
    scored: Shortlist | None,
    labels: Mapping[str, str],
    classes: Sequence[str],
    vectors: VectorsOf | None,
    first: Sequence[str] = (),
    guided: Mapping[str, Sequence[str]] | None = None,
    requested: Sequence[str] = (),
) -> tuple[list[Query], Choice]:
    """The batch of a round, and which strategy chose it.

    `scored`: the shortlist by `top_candidates` with its scores and probabilities, None where no model scored.
    `labels`: the labelled items and their classes. `vectors`: the encoder's, None where the features have none.
    `candidates`, `first` and `requested` are those of `choose`. `guided`: for a class the ids nearest to its guide,
    best first; they are asked as long as the class has few labels (Ein-Dor et al. 2020 seed rare classes so).
    """
    counts = Counter(labels.values())
    wanted = [ids for name, ids in sorted((guided or {}).items()) if counts[name] < GUIDED_LABELS]
    choice = choose_strategy(asking, round_number, [counts[name] for name in classes], vectors is not None)
    seed = round_seed(asking.seed, round_number, choice.strategy)
    queries = choose(
        candidates,
        _what_it_needs(choice.strategy, asking, round_number, candidates, scored, labels, classes, vectors),
        strategy=choice.strategy,
        k=asking.seed_size if round_number == 0 else asking.batch_size,
        random_share=asking.random_share,
        seed=seed,
        first=first,
        requested=requested,
        guided=[item_id for row in zip_longest(*wanted) for item_id in row if item_id is not None],
    )
    return queries, choice


def _what_it_needs(
    name: str,
    asking: Asking,
    round_number: int,
    candidates: Collection[str],
    scored: Shortlist | None,
    labels: Mapping[str, str],
    classes: Sequence[str],
    vectors: VectorsOf | None,
) -> Shortlist | None:
    """What the strategy declares, and no more: vectors cost time."""
    needs = STRATEGIES[name].needs
    if not needs & {"vectors"}:
        view = scored
    elif vectors is None:
        raise ValueError(f"strategy {name!r} needs vectors, and the features have no encoder")
    else:
        if "scores" in needs:
            view = scored
        else:
            seed = round_seed(asking.seed, round_number, name)
            view = Shortlist(draw(candidates, COLD_CANDIDATES, seed, "candidates"))
        if view is not None:
            open_ = set(view.ids).intersection(candidates)
            view = _with_vectors(view, needs, asking, open_, sorted(labels), vectors)
    if view is not None and vectors is not None and "centre" in needs:
        some = sorted(draw(candidates, COLD_CANDIDATES, round_seed(asking.seed, round_number, name), "centre"))
        view = replace(view, centre=mean_direction(np.asarray(vectors(some), dtype=np.float64)))
    if view is not None and "counts" in needs:
        counts = Counter(labels.values())
        view = replace(view, counts=np.array([counts[name] for name in classes], dtype=np.intp))
    return view


def _with_vectors(
    view: Shortlist,
    needs: frozenset[Need],
    asking: Asking,
    candidates: AbstractSet[str],
    labeled: Sequence[str],
    vectors: VectorsOf,
) -> Shortlist:
    view = view.rows(np.array([row for row, item_id in enumerate(view.ids) if item_id in candidates], dtype=np.intp))
    own = np.asarray(vectors(view.ids), dtype=np.float64)
    distinct = asking.max_similarity < 1
    known = np.asarray(vectors(labeled), dtype=np.float64) if distinct or "labeled" in needs else None
    view = replace(view, vectors=own, labeled=known)
    if distinct and known is not None:
        view = view.rows(unlike(own, known, asking.max_similarity))
    return view


def slice_size(k: int, share: float) -> int:
    """How many of k queries are the random slice: k * share rounded (half up), at least 1 of 2 or more if share > 0."""
    if not 0 <= share <= 1:
        raise ValueError(f"the random share must lie between 0 and 1, got {share}")
    least = 1 if share > 0 and k >= 2 else 0
    return min(k, max(least, math.floor(k * share + 0.5)))


def choose(
    candidates: Collection[str],
    shortlist: Shortlist | None,
    *,
    strategy: str,
    k: int,
    random_share: float,
    seed: SeedSequence,
    first: Sequence[str] = (),
    guided: Sequence[str] = (),
    requested: Sequence[str] = (),
) -> list[Query]:
    """The next batch, in the order to ask: at most k queries, each of another candidate.

    `candidates`: the ids of all unlabelled items that are not pending; gone through a few times, never held, except
    for a strategy that has to see all of them. `shortlist`: what is known of the best scored
    of them (others in it are passed over). `requested`: ids that a person wants asked, and `first`: ids to ask again;
    they come at the head, as far as the random slice leaves room, those that are no candidates left out. `guided`: ids
    of which the first take half of what room is left.

    The random slice is drawn from all candidates before anything else, then spread: one slice item at a seeded place
    in each of equally long stretches, so that a round answered in part keeps its share of both. `Query.score` is 0.0
    where none is known. Raises ValueError on a strategy without what it needs, and on a candidate that
    comes twice where that would tell: in what is drawn at random. Elsewhere it is asked once.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"no query strategy {strategy!r}; there are {', '.join(sorted(STRATEGIES))}")
    k = _batch(k, len(candidates))
    scores = _score_of(shortlist)

    def query(item_id: str, rule: str, probability: float) -> Query:
        return Query(item_id, -1, scores.get(item_id, 0.0), rule, probability)

    drawn = _each_once(draw(candidates, slice_size(k, random_share), seed, RANDOM_SLICE))
    named = {*drawn, *requested, *first, *guided, *(() if shortlist is None else shortlist.ids)}
    known = named.intersection(candidates)
    honest = {item_id: query(item_id, RANDOM_SLICE, len(drawn) / len(candidates)) for item_id in drawn}

    wanted = frozenset(requested)
    again = [item_id for item_id in dict.fromkeys([*requested, *first]) if item_id in known]
    room = k - len(drawn)
    fresh_again = set([item_id for item_id in again if item_id not in honest][:room])
    head = [
        honest.get(item_id) or query(item_id, ASKED if item_id in wanted else ASK_AGAIN, 1.0)
        for item_id in again
        if item_id in honest or item_id in fresh_again
    ]
    taken = honest.keys() | fresh_again
    free = _Free(candidates, known, taken)
    own = _own_picks(STRATEGIES[strategy], strategy, free, shortlist, room - len(fresh_again), seed)
    own = _make_room(own, [item_id for item_id in dict.fromkeys(guided) if item_id in free])
    in_head = {one.item_id for one in head}
    spread = _interleave(
        [query(*row) for row in own], [honest[item_id] for item_id in drawn if item_id not in in_head], seed
    )
    return [replace(one, rank=rank) for rank, one in enumerate([*head, *spread])]


def _each_once(candidates: list[str]) -> list[str]:
    """The same, some of the candidates or all. Raises ValueError where one comes twice."""
    if len(set(candidates)) < len(candidates):
        raise ValueError(f"the candidates name an item twice: {_first_repeat(candidates)!r}")
    return candidates


@dataclass(frozen=True, slots=True)
class _Free:
    """Candidates without those that are taken. They are listed only for who has to see all: a pool is large."""

    candidates: Collection[str]
    known: AbstractSet[str]
    """Those of the candidates that anything names."""
    taken: AbstractSet[str]

    def __contains__(self, item_id: str) -> bool:
        return item_id in self.known and item_id not in self.taken

    def without(self, others: AbstractSet[str]) -> Iterator[str]:
        """All of them but these, in their order."""
        return (item_id for item_id in self.candidates if item_id not in self.taken and item_id not in others)


def _own_picks(
    strategy: Strategy, name: str, free: _Free, shortlist: Shortlist | None, k: int, seed: SeedSequence
) -> list[tuple[str, str, float]]:
    """The strategy's picks among the free ones, filled up at random where its shortlist is too short."""
    if not strategy.needs:
        view = Shortlist(_each_once(sorted(free.without(set()))))
    elif shortlist is None:
        raise ValueError(f"strategy {name!r} needs a shortlist with {', '.join(sorted(strategy.needs))}")
    else:
        missing = sorted(need for need in strategy.needs if getattr(shortlist, need) is None)
        if missing:
            raise ValueError(f"strategy {name!r} needs {', '.join(missing)}, which the shortlist lacks")
        rows = [position for position, item_id in enumerate(shortlist.ids) if item_id in free]
        view = shortlist.rows(np.array(sorted(rows, key=lambda row: shortlist.ids[row]), dtype=np.intp))
    chosen: list[tuple[str, str, float]] = []
    if room := min(k, len(view.ids)):
        picked = strategy.pick(view, room, seed)
        chosen = [(view.ids[position], name, float(chance)) for position, chance in zip(*picked, strict=True)]
    left = k - len(chosen)
    if left <= 0:
        return chosen
    rest = free.without({item_id for item_id, _, _ in chosen})
    fill = _each_once(draw(rest, left, seed, RANDOM_FILL))
    others = len(free.candidates) - len(free.taken) - len(chosen)
    return chosen + [(item_id, RANDOM_FILL, len(fill) / others) for item_id in fill]


def _make_room(own: list[tuple[str, str, float]], guided: Sequence[str]) -> list[tuple[str, str, float]]:
    """At most half of the picks give way to guided ones, which come first.

    The last ones give way, so that what is left of a uniform draw still is one; its probability shrinks with it.
    """
    size = min(len(guided), len(own) // 2)
    kept = own[: len(own) - size]
    ids = {item_id for item_id, _, _ in kept}
    search = [item_id for item_id in guided if item_id not in ids][:size]
    spare = [row for row in own[len(kept) :] if row[0] not in search][: size - len(search)]
    share = len(kept) / max(1, len(own))
    rows = [(name, rule, chance * share if rule == RANDOM else chance) for name, rule, chance in kept]
    rows += [(name, RANDOM_FILL if rule == RANDOM else rule, chance) for name, rule, chance in spare]
    return [(item_id, GUIDED, 1.0) for item_id in search] + rows


def _interleave(ranked: list[Query], honest: list[Query], seed: SeedSequence) -> list[Query]:
    """Both in their own order, one of `honest` in each of as many equally long stretches."""
    length, parts = len(ranked) + len(honest), len(honest)
    rng = _rng(seed, "interleave")
    edges = [part * length // parts for part in range(parts)] + [length] if parts else []
    places = {int(rng.integers(low, high)) for low, high in zip(edges, edges[1:], strict=False)}
    ranked_left, honest_left = iter(ranked), iter(honest)
    return [next(honest_left if place in places else ranked_left) for place in range(length)]


def _score_of(shortlist: Shortlist | None) -> dict[str, float]:
    if shortlist is None or shortlist.scores is None:
        return {}
    return dict(zip(shortlist.ids, np.asarray(shortlist.scores, dtype=np.float64).tolist(), strict=True))


def _hashes(ids: Sequence[str], seed: SeedSequence, purpose: str) -> NDArray[np.uint64]:
    """A 64-bit keyed hash (BLAKE2b) of each id: (n,), independent from purpose to purpose."""
    key = seed.generate_state(8, np.uint32).astype("<u4").tobytes()
    person = zlib.crc32(purpose.encode()).to_bytes(8, "little")
    keyed = hashlib.blake2b(digest_size=8, key=key, person=person)

    def digest(item_id: str) -> bytes:
        one = keyed.copy()
        one.update(item_id.encode("utf-8", "surrogatepass"))
        return one.digest()

    return np.frombuffer(b"".join(map(digest, ids)), dtype="<u8").astype(np.uint64)


def _lexsort(keys: NDArray[np.uint64], primary: Floats, ids: Sequence[str]) -> Positions:
    """Order by `primary`, then `keys`, then id (two ids with one hash are unlikely, not impossible)."""
    order: Positions = np.lexsort((keys, primary))
    same = (primary[order][1:] == primary[order][:-1]) & (keys[order][1:] == keys[order][:-1])
    if same.any():
        return np.array(sorted(range(len(ids)), key=lambda i: (primary[i], int(keys[i]), ids[i])), dtype=np.intp)
    return order


def _batch(k: int, available: int) -> int:
    if k < 0:
        raise ValueError(f"cannot choose {k} items")
    return min(k, available)


def _first_repeat(ids: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(item_id for item_id in ids if item_id in seen or seen.add(item_id))  # type: ignore[func-returns-value]
