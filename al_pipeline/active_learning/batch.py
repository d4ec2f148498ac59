"""The batch of a round: the random slice, items to query again or on request, and the picks of the strategy.

`next_batch` chooses the strategy, prepares its inputs and composes the batch; the stage `select` and simulations call
it. `choose` composes a batch: the random slice first, then items to query again, then the strategy's picks. The result
depends on ids, scores and seed, not on the order of the items.

**`Query.probability`** is the probability of selection. For `random_slice`, `random` and `random_fill` it is the number
of drawn items over the number of items drawn from. The random slice is a simple random sample of *all* candidates, so
its labels allow unbiased estimates about the unlabelled pool, with weights 1 / probability. For a deterministic
selection it is 1.0, and no weighting makes such items representative.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import filterfalse, zip_longest
from typing import Protocol, runtime_checkable

import numpy as np
from msgspec import structs
from numpy.random import SeedSequence
from numpy.typing import NDArray

from al_pipeline.active_learning.choice import Choice, QueryConfig, choose_strategy
from al_pipeline.active_learning.clustering import (
    mean_direction,
    unlike,
)
from al_pipeline.active_learning.relabeling import most_asked_again, spread
from al_pipeline.active_learning.sampling import (
    at_most,
    draw,
    first_repeat,
    purpose_rng,
    round_seed,
)
from al_pipeline.active_learning.shortlist import Shortlist
from al_pipeline.active_learning.strategies import (
    STRATEGIES,
    Need,
    Strategy,
)
from al_pipeline.records import RANDOM, RANDOM_SLICE, RELABEL, Query

VectorsOf = Callable[[Sequence[str]], NDArray[np.floating]]
"""Ids -> the encoder's vectors (n, d), in order."""

ASK_AGAIN = "ask_again"
"""Strategy name of an item whose annotations are tied, or whose class is gone."""
ASKED = "asked"
"""Strategy name of an item requested with `al ask`; no estimate uses it."""
GUIDED = "guided"
"""Strategy name of an item most similar to the user's guide for a class with few labels."""
RANDOM_FILL = "random_fill"
"""Strategy name of a randomly drawn item that fills the batch if the shortlist is too short."""
COLD_CANDIDATES = 5000
"""Size of the random sample of candidates for a strategy that uses vectors and no scores, and for the pool's centre."""
GUIDED_LABELS = 10
"""A class with this many labels no longer uses its guide: the model ranks its items better."""


def next_batch(
    config: QueryConfig,
    round_number: int,
    candidates: Collection[str],
    scored: Shortlist | None,
    labels: Mapping[str, str],
    classes: Sequence[str],
    vectors: VectorsOf | None,
    first: Sequence[str] = (),
    guided: Mapping[str, Sequence[str]] | None = None,
    requested: Sequence[str] = (),
    doubted: Sequence[tuple[str, float]] = (),
) -> tuple[list[Query], Choice]:
    """The batch of a round, and the choice of its strategy.

    `scored`: the shortlist by `top_candidates` with scores and probabilities; None without a model. `labels`: the
    labelled items and their classes. `vectors`: the encoder's; None if the features have none. `candidates`, `first`
    and `requested`: as in `choose`. `guided`: for each class the ids most similar to its guide, most similar first;
    they are queried while the class has few labels (as Ein-Dor et al. 2020 seed rare classes). `doubted`: labelled
    items to ask again with the probability that their label is wrong, the highest first (`relabeling.doubtful`); they
    replace the strategy's last picks, as many as `config.relabel` allows. The random slice is as large as without
    them. Raises ValueError if the strategy needs vectors and there are none.
    """
    counts = Counter(labels.values())
    wanted = [ids for name, ids in sorted((guided or {}).items()) if counts[name] < GUIDED_LABELS]
    choice = choose_strategy(config, round_number, [counts[name] for name in classes], vectors is not None)
    seed = round_seed(config.seed, round_number, choice.strategy)
    size = config.seed_size if round_number == 0 else config.batch_size
    again = doubted[: most_asked_again(config.relabel, size, len(labels), len(classes))]
    again = again[: max(0, size - slice_size(size, config.random_share) - len({*requested, *first}))]
    queries = choose(
        candidates,
        _inputs_for(choice.strategy, config, round_number, candidates, scored, labels, classes, vectors),
        strategy=choice.strategy,
        k=size - len(again),
        random_share=_share_of_rest(config.random_share, size, len(again)),
        seed=seed,
        first=first,
        requested=requested,
        guided=[item_id for row in zip_longest(*wanted) for item_id in row if item_id is not None],
    )
    return _with_doubted(queries, again), choice


def _share_of_rest(share: float, size: int, again: int) -> float:
    """The share that gives the random slice of a batch of `size` its size, if `again` of its items are asked again."""
    return share if not again else slice_size(size, share) / max(1, size - again)


def _with_doubted(queries: Sequence[Query], again: Sequence[tuple[str, float]]) -> list[Query]:
    """The batch with the items that are asked again, spread over what comes after requests and ties."""
    if not again:
        return list(queries)
    head = [query for query in queries if query.strategy in (ASKED, ASK_AGAIN)]
    rest = [query for query in queries if query.strategy not in (ASKED, ASK_AGAIN)]
    own = [Query(item_id, -1, wrong, RELABEL, 1.0) for item_id, wrong in again]
    return [structs.replace(query, rank=rank) for rank, query in enumerate([*head, *spread(rest, own)])]


def _inputs_for(
    name: str,
    config: QueryConfig,
    round_number: int,
    candidates: Collection[str],
    scored: Shortlist | None,
    labels: Mapping[str, str],
    classes: Sequence[str],
    vectors: VectorsOf | None,
) -> Shortlist | None:
    """Only the inputs that the strategy declares, since reading vectors takes time."""
    needs = STRATEGIES[name].needs
    if not needs & {"vectors"}:
        view = scored
    elif vectors is None:
        raise ValueError(f"strategy {name!r} needs vectors, but the features have no encoder")
    else:
        if "scores" in needs:
            view = scored
        else:
            seed = round_seed(config.seed, round_number, name)
            view = Shortlist(draw(candidates, COLD_CANDIDATES, seed, "candidates"))
        if view is not None:
            open_ = _among(set(view.ids), candidates)
            view = _with_vectors(view, needs, config, open_, sorted(labels), vectors)
    if view is not None and vectors is not None and "centre" in needs:
        some = sorted(draw(candidates, COLD_CANDIDATES, round_seed(config.seed, round_number, name), "centre"))
        view = replace(view, centre=mean_direction(np.asarray(vectors(some), dtype=np.float64)))
    if view is not None and "counts" in needs:
        counts = Counter(labels.values())
        view = replace(view, counts=np.array([counts[name] for name in classes], dtype=np.intp))
    return view


def _with_vectors(
    view: Shortlist,
    needs: frozenset[Need],
    config: QueryConfig,
    candidates: AbstractSet[str],
    labeled: Sequence[str],
    vectors: VectorsOf,
) -> Shortlist:
    view = view.rows(np.array([row for row, item_id in enumerate(view.ids) if item_id in candidates], dtype=np.intp))
    own = np.asarray(vectors(view.ids), dtype=np.float64)
    distinct = config.max_similarity < 1
    known = np.asarray(vectors(labeled), dtype=np.float64) if distinct or "labeled" in needs else None
    view = replace(view, vectors=own, labeled=known)
    if distinct and known is not None:
        view = view.rows(unlike(own, known, config.max_similarity))
    return view


def slice_size(k: int, share: float) -> int:
    """The size of the random slice of k queries: k * share, rounded half up; at least 1 if k >= 2 and share > 0."""
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
    """The next batch in query order: at most k queries of distinct candidates.

    `candidates`: the ids of all unlabelled items that are not pending; iterated a few times, and held in memory only
    for a strategy that needs all of them. `shortlist`: the candidates with the highest scores; other items in it are
    ignored. `requested`: ids requested by a person; `first`: ids to query again. Both come first, as far as the random
    slice leaves room; ids that are not candidates are ignored. `guided`: ids of which the first fill up to half of the
    remaining room.

    The random slice is drawn from all candidates first, then spread over the batch: one slice item at a random position
    in each of equally long segments, so that a partly answered round keeps the share of both. `Query.score` is 0.0
    if no score is known. Raises ValueError if the strategy lacks an input, or a randomly drawn candidate occurs
    twice.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown query strategy {strategy!r}; choose from {', '.join(sorted(STRATEGIES))}")
    k = at_most(k, len(candidates))
    scores = _score_of(shortlist)

    def query(item_id: str, rule: str, probability: float) -> Query:
        return Query(item_id, -1, scores.get(item_id, 0.0), rule, probability)

    drawn = _each_once(draw(candidates, slice_size(k, random_share), seed, RANDOM_SLICE))
    named = {*drawn, *requested, *first, *guided, *(() if shortlist is None else shortlist.ids)}
    known = _among(named, candidates)
    honest = {item_id: query(item_id, RANDOM_SLICE, len(drawn) / len(candidates)) for item_id in drawn}

    wanted = frozenset(requested)
    again = {
        item_id: query(item_id, ASKED if item_id in wanted else ASK_AGAIN, 1.0)
        for item_id in [*requested, *first]
        if item_id in known
    }
    head = _head(again, honest, k - len(drawn))
    in_head = {one.item_id for one in head}
    taken = honest.keys() | in_head
    free = _Free(candidates, known, taken)
    own = _own_picks(STRATEGIES[strategy], strategy, free, shortlist, k - len(taken), seed)
    own = _make_room(own, [item_id for item_id in dict.fromkeys(guided) if item_id in free])
    rest = [honest[item_id] for item_id in drawn if item_id not in in_head]
    spread = _interleave([query(*row) for row in own], rest, seed)
    return [structs.replace(one, rank=rank) for rank, one in enumerate([*head, *spread])]


@runtime_checkable
class _Intersects(Protocol):
    """Candidates that know which of some ids are theirs, such as a set, or a file that is searched by column."""

    def intersection(self, ids: Iterable[str], /) -> AbstractSet[str]: ...


def _among(ids: set[str], candidates: Collection[str]) -> AbstractSet[str]:
    """Those of `ids` that are candidates."""
    return candidates.intersection(ids) if isinstance(candidates, _Intersects) else ids.intersection(candidates)


def _head(again: Mapping[str, Query], honest: Mapping[str, Query], room: int) -> list[Query]:
    """The queries that come first, in the order of `again`: those of the random slice, and up to `room` others."""
    others = [item_id for item_id in again if item_id not in honest][:room]
    chosen = honest.keys() | others
    return [honest.get(item_id, query) for item_id, query in again.items() if item_id in chosen]


def _each_once(candidates: list[str]) -> list[str]:
    """`candidates` unchanged. Raises ValueError on a duplicate."""
    if len(set(candidates)) < len(candidates):
        raise ValueError(f"the candidates contain an item twice: {first_repeat(candidates)!r}")
    return candidates


@dataclass(frozen=True, slots=True)
class _Free:
    """The candidates without those taken; listed only for strategies that need all of them."""

    candidates: Collection[str]
    known: AbstractSet[str]
    """Candidates that appear in any of the given lists."""
    taken: AbstractSet[str]

    def __contains__(self, item_id: str) -> bool:
        return item_id in self.known and item_id not in self.taken

    def without(self, others: AbstractSet[str]) -> Iterator[str]:
        """All free candidates except `others`, in order."""
        return filterfalse((self.taken | others).__contains__, self.candidates)


def _own_picks(
    strategy: Strategy, name: str, free: _Free, shortlist: Shortlist | None, k: int, seed: SeedSequence
) -> list[tuple[str, str, float]]:
    """The strategy's picks among the free candidates as (id, strategy name, probability), filled up at random."""
    if name == RANDOM and not isinstance(free.candidates, Sequence):  # as its `pick` does, with few ids in memory
        drawn = _each_once(draw(free.without(set()), k, seed, RANDOM))
        return [(item_id, name, len(drawn) / (len(free.candidates) - len(free.taken))) for item_id in drawn]
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
    """Replace at most half of the picks by guided ones, which come first.

    The last picks are replaced, so that the rest of a uniform draw is still uniform, with a smaller probability.
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
    """Merge both lists, each in its order, with one element of `honest` in each of equally long segments."""
    length, parts = len(ranked) + len(honest), len(honest)
    rng = purpose_rng(seed, "interleave")
    edges = [part * length // parts for part in range(parts)] + [length] if parts else []
    places = {int(rng.integers(low, high)) for low, high in zip(edges, edges[1:], strict=False)}
    ranked_left, honest_left = iter(ranked), iter(honest)
    return [next(honest_left if place in places else ranked_left) for place in range(length)]


def _score_of(shortlist: Shortlist | None) -> dict[str, float]:
    if shortlist is None or shortlist.scores is None:
        return {}
    return dict(zip(shortlist.ids, np.asarray(shortlist.scores, dtype=np.float64).tolist(), strict=True))
