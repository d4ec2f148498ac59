"""Query strategies: which unlabelled items to ask about next, in which order, with which probability.

A strategy is one function on arrays in the table `STRATEGIES`; it declares what it needs to see. `choose` makes a
batch with it: the random slice first, then items to ask again, then the strategy's own picks. All of it is a function
of ids, scores and seed, never of the order in which items come.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import ArrayLike, NDArray

from al_pipeline.records import Query

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]
Need = Literal["scores", "proba", "vectors"]

RANDOM_SLICE = "random_slice"
"""The uniform sample of all candidates that rides in each batch: the honest part."""
ASK_AGAIN = "ask_again"
"""Items whose answers were tied."""
RANDOM_FILL = "random_fill"
"""Drawn at random because the shortlist was shorter than the batch."""


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The items that a strategy looks at, row by row: ids (s,), scores (s,), proba (s, C), vectors (s, d)."""

    ids: Sequence[str]
    scores: Floats | None = None
    proba: Floats | None = None
    vectors: Floats | None = None

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
        return Shortlist(
            [self.ids[position] for position in positions],
            *(None if v is None else np.asarray(v)[positions] for v in (self.scores, self.proba, self.vectors)),
        )


class Picked(NamedTuple):
    """A strategy's answer: positions (b,) in the order to ask, and the probability (b,) of each (see the module)."""

    positions: Positions
    probability: Floats


@dataclass(frozen=True, slots=True)
class Strategy:
    """One query strategy.

    `pick(view, k, seed)` gets rows sorted by id, so that a function of arrays is a function of the set, and at most
    as many picks to make as there are rows. It sees the shortlist, or every candidate (ids alone) if it needs nothing.
    """

    pick: Callable[[Shortlist, int, SeedSequence], Picked]
    needs: frozenset[Need]
    acquisition: str | None = None
    """Which acquisition function makes the scores."""


def round_seed(project_seed: int, round_number: int, strategy: str) -> SeedSequence:
    """The seed of one round's choice, so that a repeated build picks the same batch."""
    return SeedSequence([project_seed, round_number, zlib.crc32(strategy.encode())])


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
    keys = _hashes([ids[position] for position in contenders], seed, "ties")
    return contenders[_lexsort(keys, -values[contenders], [ids[position] for position in contenders])[:k]]


def sample(ids: Sequence[str], k: int, seed: SeedSequence, purpose: str = "sample") -> Positions:
    """Positions of a uniform random sample of k of the ids, in random order; all of them where there are fewer.

    The k smallest hashes of (seed, purpose, id): no order of the ids, and no release of a random generator, changes it.
    """
    k = _batch(k, len(ids))
    keys = _hashes(ids, seed, purpose)
    if k < len(ids):
        threshold = np.partition(keys, k)[k]
        contenders = np.flatnonzero(keys <= threshold)
    else:
        contenders = np.arange(len(ids))
    tied = [ids[position] for position in contenders]
    return contenders[_lexsort(keys[contenders], np.zeros(len(contenders)), tied)[:k]]


def _pick_random(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    return Picked(sample(view.ids, k, seed, "random"), np.full(k, k / max(1, len(view.ids))))


def _pick_top(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    assert view.scores is not None  # declared in `needs`, checked by `choose`
    return Picked(top_k(view.scores, view.ids, k, seed), np.ones(k))


STRATEGIES: dict[str, Strategy] = {
    "random": Strategy(_pick_random, frozenset()),
    "least_confidence": Strategy(_pick_top, frozenset({"scores"}), "least_confidence"),
    "margin": Strategy(_pick_top, frozenset({"scores"}), "margin"),
    "entropy": Strategy(_pick_top, frozenset({"scores"}), "entropy"),
}
"""Every query strategy, by the name that `params.yaml` uses."""

COLD_START = "random"
"""The strategy while there is no model to ask with."""


def slice_size(k: int, share: float) -> int:
    """How many of k queries are the random slice: k * share rounded (half up), at least 1 of 2 or more if share > 0."""
    if not 0 <= share <= 1:
        raise ValueError(f"the random share must lie between 0 and 1, got {share}")
    least = 1 if share > 0 and k >= 2 else 0
    return min(k, max(least, math.floor(k * share + 0.5)))


def choose(
    candidates: Sequence[str],
    shortlist: Shortlist | None,
    *,
    strategy: str,
    k: int,
    random_share: float,
    seed: SeedSequence,
    cold_start: bool = False,
    first: Sequence[str] = (),
) -> list[Query]:
    """The next batch, in the order to ask: at most k queries, each of another candidate.

    `candidates`: the ids of all unlabelled items that are not pending. `shortlist`: what is known of the best scored
    of them (others in it are passed over). `first`: ids to ask again; they come at the head, as far as the random
    slice leaves room, those that are no candidates left out. `cold_start`: there is no model; choose at random.

    The random slice is drawn from all candidates before anything else, then spread: one slice item at a seeded place
    in each of equally long stretches, so that a round answered in part keeps its share of both. `Query.score` is 0.0
    where none is known. Raises ValueError on a repeated candidate or a strategy without what it needs.
    """
    known = set(candidates)
    if len(known) < len(candidates):
        raise ValueError(f"the candidates name an item twice: {_first_repeat(candidates)!r}")
    name = COLD_START if cold_start else strategy
    if name not in STRATEGIES:
        raise ValueError(f"no query strategy {name!r}; there are {', '.join(sorted(STRATEGIES))}")
    k = _batch(k, len(candidates))
    scores = _score_of(shortlist)

    def query(item_id: str, rule: str, probability: float) -> Query:
        return Query(item_id, -1, scores.get(item_id, 0.0), rule, probability)

    drawn = [candidates[position] for position in sample(candidates, slice_size(k, random_share), seed, RANDOM_SLICE)]
    honest = {item_id: query(item_id, RANDOM_SLICE, len(drawn) / len(candidates)) for item_id in drawn}

    again = [item_id for item_id in dict.fromkeys(first) if item_id in known]
    room = k - len(drawn)
    fresh_again = set([item_id for item_id in again if item_id not in honest][:room])
    head = [
        honest.get(item_id) or query(item_id, ASK_AGAIN, 1.0)
        for item_id in again
        if item_id in honest or item_id in fresh_again
    ]
    taken = honest.keys() | fresh_again
    own = _own_picks(
        STRATEGIES[name], name, [c for c in candidates if c not in taken], shortlist, room - len(fresh_again), seed
    )
    in_head = {one.item_id for one in head}
    spread = _interleave(
        [query(*row) for row in own], [honest[item_id] for item_id in drawn if item_id not in in_head], seed
    )
    return [replace(one, rank=rank) for rank, one in enumerate([*head, *spread])]


def _own_picks(
    strategy: Strategy, name: str, rest: list[str], shortlist: Shortlist | None, k: int, seed: SeedSequence
) -> list[tuple[str, str, float]]:
    """The strategy's picks among `rest`, filled up at random where its shortlist is too short."""
    if not strategy.needs:
        view = Shortlist(sorted(rest))
    elif shortlist is None:
        raise ValueError(f"strategy {name!r} needs a shortlist with {', '.join(sorted(strategy.needs))}")
    else:
        missing = sorted(need for need in strategy.needs if getattr(shortlist, need) is None)
        if missing:
            raise ValueError(f"strategy {name!r} needs {', '.join(missing)}, which the shortlist lacks")
        open_items = set(rest)
        rows = [position for position, item_id in enumerate(shortlist.ids) if item_id in open_items]
        view = shortlist.rows(np.array(sorted(rows, key=lambda row: shortlist.ids[row]), dtype=np.intp))
    picked = strategy.pick(view, min(k, len(view.ids)), seed)
    chosen = [(view.ids[position], name, float(chance)) for position, chance in zip(*picked, strict=True)]
    left = k - len(chosen)
    if left <= 0:
        return chosen
    seen = {item_id for item_id, _, _ in chosen}
    others = [item_id for item_id in rest if item_id not in seen]
    fill = sample(others, left, seed, RANDOM_FILL)
    return chosen + [(others[position], RANDOM_FILL, len(fill) / len(others)) for position in fill]


def _interleave(ranked: list[Query], honest: list[Query], seed: SeedSequence) -> list[Query]:
    """Both in their own order, one of `honest` in each of as many equally long stretches."""
    length, parts = len(ranked) + len(honest), len(honest)
    rng = np.random.default_rng([*seed.generate_state(4), zlib.crc32(b"interleave")])
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
