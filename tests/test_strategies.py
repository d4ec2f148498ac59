"""Query strategies: one contract for all in the table, and the laws of the batch."""

import hashlib
import os
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from al_pipeline.active_learning import batch as batches
from al_pipeline.active_learning import choice as choices
from al_pipeline.active_learning import sampling
from al_pipeline.active_learning import strategies as query_strategies
from al_pipeline.active_learning.acquisition import ACQUISITION, SAMPLE_ACQUISITION
from al_pipeline.active_learning.batch import ASK_AGAIN, GUIDED, RANDOM_FILL, choose, next_batch, slice_size
from al_pipeline.active_learning.choice import AUTO, QueryConfig, choose_strategy
from al_pipeline.active_learning.sampling import draw, keyed_hashes, round_seed, sample, top_k
from al_pipeline.active_learning.shortlist import ScoreAccumulator, Shortlist, TopK, top_candidates
from al_pipeline.active_learning.strategies import STRATEGIES, Need, Picked, Strategy
from al_pipeline.models import approximate
from al_pipeline.models.approximate import MarginAccumulator
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.linear import Head
from al_pipeline.params import NEEDS_ENCODER, Select, StrategyName
from al_pipeline.records import RANDOM, RANDOM_SLICE, Query

EVERY = pytest.mark.parametrize("strategy", sorted(STRATEGIES))
SEED = round_seed(1, 0, "margin")


def ids(n: int, start: int = 0) -> list[str]:
    return [f"item-{number}" for number in range(start, start + n)]


def view_of(items: list[str], seed: int = 0) -> Shortlist:
    """A shortlist with everything that a strategy may declare as needed; a row depends on its id alone."""
    rows = np.array([row_of(item, seed) for item in items]).reshape(-1, 7)
    proba = np.exp(rows[:, :3]) / np.exp(rows[:, :3]).sum(axis=1, keepdims=True)
    scores = np.round(proba.max(axis=1), 1)  # rounded: ties
    known, centre = row_of("labelled", seed)[3:][None], row_of("centre", seed)[3:]
    return Shortlist(items, scores, proba, rows[:, 3:], known, np.array([3, 0, 1]), centre)


@cache
def row_of(item: str, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *item.encode()]).normal(size=7)


def batch(strategy: str, candidates: list[str], shortlist: Shortlist | None = None, **other) -> list[Query]:
    """The batch of one call of `choose`."""
    settings_ = {"k": 8, "random_share": 0.25, "seed": round_seed(1, 1, strategy), **other}
    return choose(candidates, shortlist or view_of(candidates), strategy=strategy, **settings_)


# The table ----------------------------------------------------------------------------------------------------------
def test_params_and_table_name_the_same_strategies() -> None:
    assert set(get_args(StrategyName)) == {*STRATEGIES, AUTO}
    cold = set(get_args(get_type_hints(Select)["cold_start"]))
    assert cold == {name for name, strategy in STRATEGIES.items() if not strategy.needs & {"scores", "proba"}}
    assert {name for name, strategy in STRATEGIES.items() if "vectors" in strategy.needs} == NEEDS_ENCODER


def test_every_declared_need_is_one_that_the_contract_supplies() -> None:
    assert set(get_args(Need)) == {field.name for field in fields(Shortlist)} - {"ids"}
    assert all(getattr(view_of(ids(3)), need) is not None for need in get_args(Need))
    for name, strategy in STRATEGIES.items():
        assert strategy.needs <= set(get_args(Need)), name
        functions = ACQUISITION if strategy.samples is None else SAMPLE_ACQUISITION
        assert strategy.acquisition is None or strategy.acquisition in functions, name
        assert strategy.samples is None or "scores" in strategy.needs, name
        assert ("scores" in strategy.needs) <= (strategy.acquisition is not None), name


def test_every_strategy_that_is_written_is_in_the_table_and_cites_its_paper() -> None:
    written = {value for name, value in vars(query_strategies).items() if name.startswith("_pick_")}
    assert written == {strategy.pick for strategy in STRATEGIES.values()}
    for name, strategy in STRATEGIES.items():
        function = {**ACQUISITION, **SAMPLE_ACQUISITION}.get(strategy.acquisition or "")
        said = f"{strategy.pick.__doc__} {function.__doc__ if function else ''}"
        assert name == RANDOM or re.search(r"(19|20)\d\d", said), name
    assert {strategy.acquisition for strategy in STRATEGIES.values()} >= {*ACQUISITION, *SAMPLE_ACQUISITION}


# The contract -------------------------------------------------------------------------------------------------------
@EVERY
def test_three_rounds_with_labels_ignored_items_and_arrivals(strategy: str) -> None:
    """No labelled, ignored or pending item is ever offered; none twice; half-answered rounds proceed."""
    pool, labeled, ignored, pending = ids(60), set(), set(), set()
    for number in range(3):
        pool = pool + ids(15, start=100 * (number + 1))
        unlabeled = [item for item in pool if item not in labeled | ignored | pending]
        queries = batch(strategy, unlabeled, view_of(pool, number), seed=round_seed(1, number, strategy))
        asked = [query.item_id for query in queries]
        assert len(asked) == len(set(asked)) == 8
        assert set(asked) <= set(unlabeled)
        assert [query.rank for query in queries] == list(range(8))
        labeled |= set(asked[:3])
        ignored |= set(asked[3:4])
        pending = set(asked[4:])


@EVERY
@given(data=st.data())
@settings(max_examples=25, derandomize=True, deadline=None)
def test_order_of_pool_and_shortlist_is_nothing(strategy: str, data: st.DataObject) -> None:
    items = ids(data.draw(st.integers(1, 30)))
    view = view_of(items)
    shuffled = data.draw(st.permutations(items))
    order = np.array(data.draw(st.permutations(range(len(items)))), dtype=np.intp)
    assert batch(strategy, items, view) == batch(strategy, shuffled, view.rows(order))


@EVERY
@given(
    n=st.integers(0, 30),
    shortlisted=st.integers(0, 40),
    k=st.integers(0, 40),
    share=st.floats(0, 1),
    again=st.lists(st.integers(0, 40), max_size=8),
)
@settings(max_examples=30, derandomize=True, deadline=None)
def test_any_batch(strategy: str, n: int, shortlisted: int, k: int, share: float, again: list[int]) -> None:
    items = ids(n)
    first = [f"item-{number}" for number in again]
    queries = batch(strategy, items, view_of(ids(shortlisted)), k=k, random_share=share, first=first)
    asked = [query.item_id for query in queries]
    assert len(asked) == len(set(asked)) == min(n, k)
    assert set(asked) <= set(items)
    assert all(0 < query.probability <= 1 and np.isfinite(query.score) for query in queries)
    honest = [query for query in queries if query.strategy == RANDOM_SLICE]
    assert len(honest) == slice_size(min(n, k), share)
    assert all(query.probability == len(honest) / n for query in honest)
    assert {q.strategy for q in queries} <= {RANDOM_SLICE, ASK_AGAIN, RANDOM_FILL, strategy}


@EVERY
def test_batch_larger_than_the_pool_gives_the_pool(strategy: str) -> None:
    assert {query.item_id for query in batch(strategy, ids(5), k=50)} == set(ids(5))


@EVERY
@pytest.mark.parametrize("n", [0, 1, 7])
def test_tiny_pools(strategy: str, n: int) -> None:
    assert len(batch(strategy, ids(n))) == n


@EVERY
def test_the_shortlist_is_not_changed_and_the_seed_can_be_used_again(strategy: str) -> None:
    view = view_of(ids(20))
    before = [np.array(getattr(view, need)) for need in get_args(Need)]
    seed = round_seed(1, 1, strategy)
    assert batch(strategy, ids(20), view, seed=seed) == batch(strategy, ids(20), view, seed=seed)
    for need, values in zip(get_args(Need), before, strict=True):
        np.testing.assert_array_equal(getattr(view, need), values)


@EVERY
def test_what_is_not_finite_is_refused_by_the_items_name(strategy: str) -> None:
    for need in STRATEGIES[strategy].needs & {"scores", "proba", "vectors"}:
        wrong = np.array(getattr(view_of(ids(9)), need), dtype=float)
        wrong[4] = np.nan
        with pytest.raises(ValueError, match=f"{need} of item 'item-4' are not finite"):
            batch(strategy, ids(9), replace(view_of(ids(9)), **{need: wrong}))


@EVERY
def test_another_round_draws_another_slice(strategy: str) -> None:
    def honest(number: int) -> set[str]:
        queries = batch(strategy, ids(200), k=40, seed=round_seed(1, number, strategy))
        return {query.item_id for query in queries if query.strategy == RANDOM_SLICE}

    assert honest(1) != honest(2)


@EVERY
def test_a_strategy_without_what_it_needs_is_refused_by_name(strategy: str) -> None:
    needs = STRATEGIES[strategy].needs
    if not needs:
        assert batch(strategy, ids(9), Shortlist([]))
        return
    for missing in needs:
        with pytest.raises(ValueError, match=rf"'{strategy}' needs {missing}"):
            batch(strategy, ids(9), replace(view_of(ids(9)), **{missing: None}))
    with pytest.raises(ValueError, match=rf"'{strategy}' needs a shortlist"):
        choose(ids(9), None, strategy=strategy, k=2, random_share=0, seed=SEED)


def test_same_batch_in_a_new_process() -> None:
    """Nothing hangs on hash randomisation or on a global generator."""
    program = (
        "import sys; sys.path.insert(0, 'tests'); from test_strategies import *;"
        "print([(q.item_id, q.strategy) for s in sorted(STRATEGIES) for q in batch(s, ids(50))])"
    )
    here = str([(q.item_id, q.strategy) for s in sorted(STRATEGIES) for q in batch(s, ids(50))])
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert out.stdout.strip() == here


def test_selection_is_pinned() -> None:
    """A change of these ids changes what every workspace asks next: raise the engine's version, say it in CHANGELOG."""
    queries = batch("margin", ids(30), Shortlist(ids(30), np.zeros(30)), k=5)
    assert [query.item_id for query in queries] == ["item-26", "item-16", "item-29", "item-15", "item-7"]
    assert [query.rank for query in queries if query.strategy == RANDOM_SLICE] == [3]


# A strategy of one's own plugs in -----------------------------------------------------------------------------------
def test_a_strategy_on_vectors_plugs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def farthest_from_origin(view: Shortlist, k: int, seed: np.random.SeedSequence) -> Picked:
        return Picked(top_k(np.linalg.norm(view.vectors, axis=1), view.ids, k, seed), np.ones(k))

    monkeypatch.setitem(STRATEGIES, "far", Strategy(farthest_from_origin, frozenset({"vectors"})))
    view = view_of(ids(30))
    expected = [view.ids[row] for row in np.argsort(-np.linalg.norm(view.vectors, axis=1))[:4]]
    assert [query.item_id for query in batch("far", ids(30), view, k=4, random_share=0)] == expected


def test_the_strategy_that_the_docs_add_in_ten_lines_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING.md's example, as it stands there, passes three rounds of the contract."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 10
    more = dict(STRATEGIES)
    for module in (query_strategies, batches, choices):
        monkeypatch.setattr(module, "STRATEGIES", more)
    exec(code, vars(query_strategies) | {"STRATEGIES": more})
    test_three_rounds_with_labels_ignored_items_and_arrivals("spread")
    test_batch_larger_than_the_pool_gives_the_pool("spread")


# Top k --------------------------------------------------------------------------------------------------------------
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, -np.inf, np.inf]), max_size=30), st.integers(0, 40))
@settings(max_examples=60, derandomize=True)
def test_top_k_is_the_best_k_in_falling_order(scores: list[float], k: int) -> None:
    chosen = top_k(scores, ids(len(scores)), k, SEED)
    assert len(set(chosen.tolist())) == len(chosen) == min(k, len(scores))
    assert [scores[position] for position in chosen] == sorted(scores, reverse=True)[:k]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=30), st.integers(1, 30), st.integers(0, 29))
@settings(max_examples=60, derandomize=True)
def test_a_higher_score_never_loses_its_place(scores: list[float], k: int, which: int) -> None:
    which %= len(scores)
    raised = [score + 0.5 * (position == which) for position, score in enumerate(scores)]
    names = ids(len(scores))
    assert (which in top_k(scores, names, k, SEED)) <= (which in top_k(raised, names, k, SEED))


def test_ties_are_broken_by_the_seed_and_fairly() -> None:
    firsts = [int(top_k(np.zeros(5), ids(5), 1, round_seed(1, number, ""))[0]) for number in range(1000)]
    counts = np.bincount(firsts, minlength=5)
    assert ((counts > 150) & (counts < 250)).all()  # 200 +- 4 standard deviations of 12.6


@given(st.integers(0, 80), st.integers(0, 90), st.integers(1, 30))
@settings(max_examples=60, derandomize=True)
def test_a_draw_from_what_comes_one_by_one_is_the_sample(count: int, k: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_BLOCK", block)
        drawn = draw(iter(ids(count)), k, SEED, "purpose")
    assert drawn == [ids(count)[row] for row in sample(ids(count), k, SEED, "purpose")]


def test_two_ids_with_one_hash_are_ordered_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "keyed_hashes", lambda names, seed, purpose: np.zeros(len(names), dtype=np.uint64))
    names = ["c", "a", "d", "b"]
    assert [names[p] for p in top_k(np.zeros(4), names, 3, SEED)] == ["a", "b", "c"]
    assert [names[p] for p in sample(names, 2, SEED)] == ["a", "b"]


def test_top_k_names_the_item_whose_score_is_nan() -> None:
    with pytest.raises(ValueError, match="'item-1' is NaN"):
        top_k([0.0, np.nan], ids(2), 1, SEED)
    with pytest.raises(ValueError, match="2 ids do not match scores of shape"):
        top_k([0.0], ids(2), 1, SEED)
    with pytest.raises(ValueError, match="cannot choose -1"):
        top_k([0.0], ids(1), -1, SEED)


@given(
    scores=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), max_size=60),
    shortlist=st.integers(1, 12),
    part=st.integers(1, 20),
)
@settings(max_examples=100, derandomize=True)
def test_a_pool_read_in_parts_leaves_what_one_look_at_all_of_it_leaves(
    scores: list[float], shortlist: int, part: int
) -> None:
    names, values = ids(len(scores)), np.array(scores)
    figures = np.arange(2.0 * len(scores)).reshape(-1, 2)
    best, plain = TopK(shortlist, 2, 5, columns=2), TopK(shortlist, 2, 5)
    for start in range(0, len(scores), part):
        some = slice(start, start + part)
        best.add(names[some], values[some], figures[some])
        plain.add(names[some], values[some])
    whole = top_candidates(names, values, shortlist, 2, 5)
    kept, their_scores, their_figures = best.kept()
    assert kept == plain.kept()[0] == [names[row] for row in whole]
    np.testing.assert_array_equal(their_scores, values[whole])
    np.testing.assert_array_equal(their_figures, figures[whole])


def test_a_score_that_is_nan_is_named_in_whatever_part_it_comes() -> None:
    best = TopK(2, 1, 5)
    for number in range(4):
        best.add(ids(5, 5 * number), np.linspace(0.5, 1, 5))
    best.add(ids(1, 99), np.array([np.nan]))
    with pytest.raises(ValueError, match="'item-99' is NaN"):
        best.kept()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.0, 1e-6, 0.3, 3.0, 30.0, 1e5]),
    classes=st.integers(2, 9),
    unseen=st.integers(0, 2),
    blocks=st.integers(1, 2),
    part=st.sampled_from([7, 17, 50]),
    wait=st.integers(1, 120),
)
def test_approximate_margins_leave_to_the_bit_what_full_probabilities_leave(
    seed: int, scale: float, classes: int, unseen: int, blocks: int, part: int, wait: int
) -> None:
    """Ties, near ties, classes without labels, logits too large for single precision: the same best, the same bins."""
    rng = np.random.default_rng(seed)
    names = tuple(f"class {number}" for number in range(classes + unseen))
    seen = [names[column] for column in np.sort(rng.permutation(len(names))[:classes])]
    features = [rng.normal(size=(120, 6)).astype(np.float32) for _ in range(blocks)]
    for block in features:
        block[rng.integers(120, size=30)] = block[rng.integers(120, size=30)]  # the same text again
        block[rng.integers(120, size=5)] = 0
    weights = tuple((scale * rng.normal(size=(classes, 6))).astype(np.float32) for _ in features)
    for each in weights:
        each[0] = each[1]  # two classes that no item tells apart
    bias = rng.choice([0.0, 0.5], classes).astype(np.float32)
    shift = tuple(map(float, rng.normal(size=len(seen)))) if rng.random() < 0.7 else ()
    head = Head(names, dict.fromkeys(seen, 4), weights, bias, float(rng.choice([0.2, 1.0, 1.7])), (6,) * blocks, shift)
    full, other = (ScoreAccumulator(TopK(8, 4, 5, len(names)), (0.0, 1.0), 20, len(names)) for _ in range(2))
    quick = MarginAccumulator(other, head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximate, "_SCREENED", wait)
        patch.setattr(approximate, "_EXACT", wait // 3)
        for start in range(0, 120, part):
            own = [block[start : start + part] for block in features]
            matrix = FeatureMatrix(own[0], csr_matrix(own[1]) if blocks == 2 else None)
            some, proba = ids(len(matrix), start), head.predict_proba(matrix)
            full.add(some, ACQUISITION["margin"](proba), proba)
            quick.add_approximate(some, head.columns(matrix))
            margins = head.approximate_margins(head.columns(matrix))
            assert (np.abs(margins.scores - ACQUISITION["margin"](proba)) <= margins.slack).all()
    for one, other in zip(full.result().kept, quick.result().kept, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(full.result().counts, quick.result().counts)
    np.testing.assert_array_equal(full.result().predicted, quick.result().predicted)


def test_approximate_margins_spare_nearly_all_exact_scores() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20_000, 8)).astype(np.float32)
    weights = rng.normal(0, 2, (5, 8)).astype(np.float32)
    head = Head(tuple("abcde"), dict.fromkeys("abcde", 3), (weights,), np.zeros(5, np.float32), 1.0, (8,))
    exact: list[int] = []

    class Counted:
        approximate_margins = head.approximate_margins

        def exact(self, columns: list[np.ndarray]) -> np.ndarray:
            exact.append(columns[0].shape[1])
            return head.exact(columns)

    tally = MarginAccumulator(ScoreAccumulator(TopK(50, 10, 5, 5), (0.0, 1.0), 20, 5), Counted())
    for start in range(0, 20_000, 1000):
        tally.add_approximate(ids(1000, start), head.columns(FeatureMatrix(vectors[start : start + 1000])))
    assert tally.result().counts.sum() == 20_000
    assert 8000 <= sum(exact) < 9000  # the first step has nothing to compare with


def test_the_bins_are_those_of_numpy() -> None:
    scores = np.append(np.random.default_rng(0).random(500), np.linspace(0, 1, 21))
    tally = ScoreAccumulator(TopK(5, 1, 0, 2), (0.0, 1.0), 20, 2)
    tally.add(ids(521), scores, np.full((521, 2), 0.5))
    np.testing.assert_array_equal(tally.result().counts, np.histogram(scores, tally.edges)[0])


# The random slice ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("k", "share", "size"),
    [(40, 0.1, 4), (40, 0, 0), (40, 1, 40), (2, 0.01, 1), (1, 0.1, 0), (1, 0.5, 1), (5, 0.5, 3), (0, 0.5, 0)],
)
def test_slice_size(k: int, share: float, size: int) -> None:
    assert slice_size(k, share) == size


def test_slice_is_uniform_over_all_candidates_whatever_their_scores() -> None:
    """Each of 20 candidates is in the slice with probability 2/20, the best scored and the tied ones too."""
    counts = dict.fromkeys(ids(20), 0)
    view = Shortlist(ids(20)[:10], np.linspace(1, 0.1, 10))
    for number in range(2000):
        queries = choose(
            ids(20), view, strategy="margin", k=8, random_share=0.25, seed=round_seed(7, number, "margin"), first=ids(3)
        )
        for query in queries:
            counts[query.item_id] += query.strategy == RANDOM_SLICE
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert sum(counts.values()) == 4000
    assert chi_square < 43.8  # 0.1 % point, 19 degrees of freedom


def test_slice_weights_estimate_the_pool() -> None:
    """Weight 1 / probability over the slice alone gives the pool's mean; the strategy's picks do not."""
    truth = {item: float(number < 10) for number, item in enumerate(ids(100))}
    view = Shortlist(ids(100), np.array([truth[item] for item in ids(100)]))
    estimates, biased = [], []
    for number in range(300):
        queries = choose(ids(100), view, strategy="margin", k=20, random_share=0.5, seed=round_seed(3, number, ""))
        honest = [query for query in queries if query.strategy == RANDOM_SLICE]
        estimates.append(sum(truth[query.item_id] / query.probability for query in honest) / 100)
        biased.append(np.mean([truth[query.item_id] for query in queries]))
    assert np.mean(estimates) == pytest.approx(0.1, abs=0.02)
    assert np.mean(biased) > 0.4


@given(k=st.integers(2, 60), share=st.floats(0.05, 0.5), number=st.integers(0, 1000))
@settings(max_examples=30, derandomize=True)
def test_slice_is_spread_so_that_any_half_keeps_its_share(k: int, share: float, number: int) -> None:
    queries = choose(
        ids(200), view_of(ids(200)), strategy="margin", k=k, random_share=share, seed=round_seed(1, number, "margin")
    )
    places = [query.rank for query in queries if query.strategy == RANDOM_SLICE]
    size = slice_size(k, share)
    assert all(part * k // size <= place < -(-(part + 1) * k // size) for part, place in enumerate(places))


def test_rest_is_the_best_by_score_in_falling_order() -> None:
    scores = np.linspace(0, 1, 50)
    queries = choose(ids(50), Shortlist(ids(50), scores), strategy="margin", k=10, random_share=0.2, seed=SEED)
    own = [query for query in queries if query.strategy == "margin"]
    honest = {query.item_id for query in queries if query.strategy == RANDOM_SLICE}
    assert [query.item_id for query in own] == [item for item in reversed(ids(50)) if item not in honest][:8]
    assert all(query.probability == 1.0 and query.score == scores[int(query.item_id[5:])] for query in own)


# Random, cold start, re-asks, short shortlists ----------------------------------------------------------------------
def test_random_draws_uniformly_and_says_so() -> None:
    queries = choose(ids(40), None, strategy="random", k=10, random_share=0, seed=SEED)
    assert {(query.strategy, query.probability) for query in queries} == {("random", 10 / 40)}
    counts = dict.fromkeys(ids(10), 0)
    for number in range(1000):
        for query in choose(
            ids(10), None, strategy="random", k=3, random_share=0, seed=round_seed(1, number, "random")
        ):
            counts[query.item_id] += 1
    assert all(240 < count < 360 for count in counts.values())  # 300 +- 4 standard deviations of 14.5


def test_random_beside_a_slice_says_what_it_was_drawn_from() -> None:
    queries = choose(ids(40), None, strategy="random", k=10, random_share=0.2, seed=SEED)
    assert sorted({(q.strategy, q.probability) for q in queries}) == [("random", 8 / 38), (RANDOM_SLICE, 2 / 40)]


def test_ties_come_first_once_and_only_while_candidates() -> None:
    view = Shortlist(ids(50), np.linspace(0, 1, 50))
    first = ["item-3", "gone", "item-1", "item-3"]
    queries = choose(ids(50), view, strategy="margin", k=6, random_share=0, seed=SEED, first=first)
    assert [query.item_id for query in queries] == ["item-3", "item-1", "item-49", "item-48", "item-47", "item-46"]
    assert [query.strategy for query in queries] == [ASK_AGAIN] * 2 + ["margin"] * 4
    assert [query.score for query in queries[:2]] == [view.scores[3], view.scores[1]]


def test_ties_leave_room_for_the_slice() -> None:
    queries = choose(ids(500), view_of(ids(500)), strategy="margin", k=10, random_share=0.2, seed=SEED, first=ids(100))
    assert [query.strategy for query in queries].count(ASK_AGAIN) == 8
    assert [query.strategy for query in queries].count(RANDOM_SLICE) == 2


def test_a_short_shortlist_is_filled_up_at_random() -> None:
    queries = choose(ids(50), Shortlist(ids(3), np.ones(3)), strategy="margin", k=10, random_share=0, seed=SEED)
    assert [query.strategy for query in queries] == ["margin"] * 3 + [RANDOM_FILL] * 7
    assert {query.probability for query in queries[3:]} == {7 / 47}
    assert {query.score for query in queries[3:]} == {0.0}


class ReadOften(Collection[str]):
    """Candidates that are not in memory, as a stage has them."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._ids

    def intersection(self, ids: AbstractSet[str], /) -> set[str]:
        return set(ids).intersection(self._ids)


@given(
    st.sets(st.text(max_size=3), max_size=40), st.integers(0, 12), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 9)
)
def test_candidates_in_a_file_are_queried_like_those_in_memory(
    ids: set[str], k: int, share: float, number: int
) -> None:
    chosen = [
        choose(
            candidates, None, strategy="random", k=k, random_share=share, seed=round_seed(1, number, "random"),
            first=sorted(ids)[:2], requested=["unknown"],
        )
        for candidates in (sorted(ids), ids, ReadOften(sorted(ids, reverse=True)))
    ]  # fmt: skip
    assert chosen[0] == chosen[1] == chosen[2]


@given(st.lists(st.text(), max_size=20), st.integers(0, 9))
def test_a_keyed_hash_is_blake2b_of_each_id(ids: list[str], number: int) -> None:
    seed = round_seed(1, number, "margin")
    key, person = seed.generate_state(8, np.uint32).astype("<u4").tobytes(), zlib.crc32(b"x").to_bytes(8, "little")
    expected = [
        hashlib.blake2b(item.encode("utf-8", "surrogatepass"), digest_size=8, key=key, person=person).digest()
        for item in ids
    ]
    assert keyed_hashes(ids, seed, "x").tolist() == [int.from_bytes(digest, "little") for digest in expected]


# Refusals -----------------------------------------------------------------------------------------------------------
def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="twice: 'a'"):
        choose(["a", "b", "a"], None, strategy="random", k=1, random_share=0, seed=SEED)
    with pytest.raises(ValueError, match="candidates contain an item twice: 'a'"):
        choose(["a", "b", "a"], view_of(["a", "b"]), strategy="margin", k=3, random_share=1, seed=SEED)
    with pytest.raises(ValueError, match="unknown query strategy 'best'; choose from .*entropy"):
        choose(["a"], None, strategy="best", k=1, random_share=0, seed=SEED)
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        choose(["a"], None, strategy="random", k=1, random_share=1.5, seed=SEED)
    with pytest.raises(ValueError, match="shortlist contains an item twice: 'a'"):
        Shortlist(["a", "a"])
    with pytest.raises(ValueError, match="2 ids but 1 rows of scores"):
        Shortlist(["a", "b"], np.ones(1))
    with pytest.raises(ValueError, match="vectors of item 'b' are not finite"):
        Shortlist(["a", "b"], vectors=np.array([[0.0], [np.nan]]))


def test_a_large_pool_is_cheap() -> None:
    """One pass over 200,000 candidates, none of them compared with another."""
    items = ids(200_000)
    began = time.process_time()
    choose(items, view_of(items[:1000]), strategy="margin", k=100, random_share=0.1, seed=SEED)
    assert time.process_time() - began < 5


# Strategies on vectors ----------------------------------------------------------------------------------------------
def clouds(sizes: list[int], seed: int = 0) -> tuple[Shortlist, np.ndarray]:
    """Items in clouds far from one another, of the sizes given; the cloud of each."""
    rng = np.random.default_rng(seed)
    own = np.repeat(np.arange(len(sizes)), sizes)
    vectors = 20 * np.eye(max(len(sizes), 6))[own] + rng.normal(0, 0.1, (len(own), max(len(sizes), 6)))
    items = ids(len(own))
    order = np.argsort(items)
    proba = rng.dirichlet(np.ones(3), len(own))
    empty = np.zeros((0, vectors.shape[1]))
    view = Shortlist(items, rng.random(len(own)), proba, vectors, empty, np.zeros(3, dtype=int))
    return view.rows(order), own[order]


def picked(strategy: str, view: Shortlist, k: int) -> list[int]:
    return STRATEGIES[strategy].pick(view, k, SEED).positions.tolist()


@pytest.mark.parametrize("strategy", ["typiclust", "kmeans"])
def test_cold_start_takes_one_of_each_cloud_the_largest_first(strategy: str) -> None:
    view, own = clouds([30, 50, 20, 10])
    assert [own[row] for row in picked(strategy, view, 4)] == [1, 0, 2, 3]


def test_typiclust_takes_the_densest_spot_and_leaves_clouds_with_labels_for_last() -> None:
    view, own = clouds([30, 50])
    labeled = replace(view, labeled=np.asarray(view.vectors)[own == 1][:1])
    assert own[picked("typiclust", labeled, 1)[0]] == 0
    rows = np.flatnonzero(own == 1)
    points = np.asarray(view.vectors)[rows]
    distance = np.sort(np.linalg.norm(points[:, None] - points[None], axis=2), axis=1)[:, 1:21].mean(axis=1)
    assert picked("typiclust", view, 2)[0] == rows[distance.argmin()]


def test_cluster_margin_asks_the_least_sure_of_each_cloud() -> None:
    view, own = clouds([12, 12, 12])
    chosen = picked("cluster_margin", view, 3)
    scores = np.asarray(view.scores)
    best = {cloud: max(np.flatnonzero(own == cloud), key=lambda row: scores[row]) for cloud in range(3)}
    assert set(chosen) == set(best.values())
    assert scores[chosen].tolist() == sorted(scores[chosen], reverse=True)


def test_cluster_margin_looks_at_ten_times_the_batch_and_no_further() -> None:
    view, own = clouds([40, 1])
    far = int(np.flatnonzero(own == 1)[0])
    scores = np.asarray(view.scores).copy()
    scores[far] = -1.0
    assert far not in picked("cluster_margin", replace(view, scores=scores), 4)


def test_herding_asks_once_in_every_cloud_the_most_uncertain_cloud_first() -> None:
    view, own = clouds([30, 50, 20, 10])
    unsure = replace(view, scores=np.array([0.1, 0.2, 0.9, 0.1])[own])
    near = np.asarray(view.vectors)[own == 1][:2] + 1e-3 * np.eye(6)[:2]  # two labels, so that the radius is small
    chosen = picked("herding", replace(unsure, labeled=20 * np.eye(6)[4:]), 4)
    assert [own[row] for row in chosen] == [2, 1, 0, 3], "by uncertainty times size: 18, 10, 3, 1"
    covered = replace(unsure, labeled=np.concatenate([np.asarray(view.vectors)[own == 2], near]))
    assert 2 not in own[picked("herding", covered, 1)], "a cloud that labels cover comes last"


def test_herding_of_a_large_shortlist_deals_it_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(ids(61))
    for rows, k in ((20, 7), (20, 61), (7, 60), (60, 61)):
        monkeypatch.setattr(query_strategies, "HERD_ROWS", rows)
        chosen = picked("herding", view, k)
        assert len(set(chosen)) == k


def test_class_balanced_fills_up_the_poorest_class_by_uncertainty() -> None:
    proba = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.2, 0.8]])
    scores = np.array([0.2, 0.4, 0.6, 0.8, 0.4])
    view = Shortlist(ids(5), scores, proba, counts=np.array([4, 2]))
    assert picked("class_balanced", view, 2) == [3, 2]  # both of the class with two labels
    assert picked("class_balanced", view, 5)[2:] == [1, 4, 0]  # then in turn, the first of equals first
    assert picked("class_balanced", replace(view, counts=np.array([0, 9])), 1) == [1]


def test_badge_begins_with_the_longest_gradient_and_does_not_ask_the_same_twice() -> None:
    """Copies of one sure item and of one unsure item: the unsure one first, then the other, before any copy."""
    proba = np.array([[0.9, 0.1]] * 4 + [[0.55, 0.45]] * 4)
    vectors = np.repeat([[1.0, 0.0], [0.0, 1.0]], 4, axis=0)
    view = Shortlist(ids(8), np.ones(8), proba, vectors)
    chosen = picked("badge", view, 8)
    assert [row // 4 for row in chosen[:2]] == [1, 0] and sorted(chosen) == list(range(8))


def test_badge_asks_in_every_cloud() -> None:
    view, own = clouds([40, 40, 40, 40])
    assert set(own[picked("badge", view, 12)]) == {0, 1, 2, 3}


def test_core_set_begins_where_no_label_is() -> None:
    view, own = clouds([30, 30, 3])
    known = np.asarray(view.vectors)[own < 2][::7]
    assert own[picked("core_set", replace(view, labeled=known), 1)[0]] == 2
    assert set(own[picked("core_set", view, 3)]) == {0, 1, 2}


def test_density_prefers_the_crowd_among_equally_unsure_items() -> None:
    view, own = clouds([50, 5])
    vectors = np.asarray(view.vectors)
    centre = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0)
    crowd = replace(view, scores=np.full(55, 0.5), centre=centre)
    assert set(own[picked("density", crowd, 10)]) == {0}
    unsure = replace(crowd, scores=np.where(own == 1, 1.0, 0.05))
    assert set(own[picked("density", unsure, 5)]) == {1}, "uncertainty counts too"
    away = replace(crowd, centre=-centre)
    assert len(set(picked("density", away, 55))) == 55


def test_density_gets_the_centre_of_all_candidates_not_of_the_shortlist() -> None:
    seen: list[Shortlist] = []
    real = STRATEGIES["density"]

    def spy(view: Shortlist, k: int, seed: np.random.SeedSequence) -> Picked:
        seen.append(view)
        return real.pick(view, k, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STRATEGIES, "density", replace(real, pick=spy))
        labels = {"old-1": "a", "old-2": "b"}
        next_batch(asking("density"), 1, ids(60), view_of(ids(60)[:20]), labels, ("a", "b", "c"), vectors_of)
    points = vectors_of(ids(60))
    expected = (points / np.linalg.norm(points, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(seen[0].centre, expected)


def test_power_sampling_draws_in_proportion_to_the_score() -> None:
    scores = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    view = Shortlist(ids(5), scores)
    firsts, seconds = np.zeros(5), np.zeros(5)
    for number in range(3000):
        first, second, *_, last = STRATEGIES["power_bald"].pick(view, 5, round_seed(1, number, "power_bald")).positions
        firsts[first] += 1
        seconds[second] += 1
        assert last == 4, "no score, no chance while there are others"
    chances = np.array([0.4, 0.3, 0.2, 0.1])
    after = np.array([sum(chances[i] * chances[j] / (1 - chances[i]) for i in range(4) if i != j) for j in range(4)])
    for counts, expected in ((firsts, 3000 * chances), (seconds, 3000 * after)):
        assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3  # 0.1 % point, 3 degrees of freedom


# A round's batch ----------------------------------------------------------------------------------------------------
def asking(strategy: str, **other) -> QueryConfig:
    return QueryConfig(7, 6, strategy, 4, **{"random_share": 0.25, "shortlist": 20, **other})


def vectors_of(items) -> np.ndarray:
    return np.array([row_of(item, 0)[3:] for item in items]).reshape(len(items), 4)


ARMS = pytest.mark.parametrize("strategy", [*sorted(STRATEGIES), AUTO])


@ARMS
@pytest.mark.parametrize("cold", ["random", "typiclust", "kmeans"])
def test_three_rounds_from_nothing_with_one_class_first(strategy: str, cold: str) -> None:
    """No label, then labels of one class, then of two; items arrive, are ignored, stay unanswered."""
    pool, labels, ignored, pending = ids(40), {}, set(), set()
    for number in range(3):
        pool = pool + ids(10, start=100 * (number + 1))
        candidates = [item for item in pool if item not in labels.keys() | ignored | pending]
        scored = view_of(candidates, number) if labels else Shortlist([], *(np.zeros((0, 3)[: i + 1]) for i in (0, 1)))
        queries, choice = next_batch(
            asking(strategy, cold_start=cold), number, candidates, scored, labels, ("a", "b", "c"), vectors_of
        )
        assert choice.strategy == cold if number == 0 else choice.strategy != AUTO
        asked = [query.item_id for query in queries]
        assert len(asked) == len(set(asked)) == (6 if number == 0 else 4)
        assert set(asked) <= set(candidates)
        labels |= {item: "a" if number == 0 else "b" for item in asked[:2]}
        ignored |= set(asked[2:3])
        pending = set(asked[3:])


@ARMS
def test_a_batch_is_a_function_of_what_there_is_not_of_its_order(strategy: str) -> None:
    items, labels = ids(60), {f"old-{n}": "ab"[n % 2] for n in range(8)}
    backwards = dict(reversed(labels.items()))
    view = view_of(items)
    turned = view.rows(np.arange(60)[::-1])
    one = next_batch(asking(strategy), 2, items, view, labels, ("a", "b", "c"), vectors_of)
    assert one == next_batch(asking(strategy), 2, items[::-1], turned, backwards, ("a", "b", "c"), vectors_of)
    assert one != next_batch(asking(strategy), 3, items, view, labels, ("a", "b", "c"), vectors_of)


@ARMS
def test_vectors_are_asked_for_only_by_what_declares_them(strategy: str) -> None:
    seen: list[int] = []

    def counted(items) -> np.ndarray:
        seen.append(len(items))
        return vectors_of(items)

    labels = {"old-1": "a", "old-2": "b"}
    _, choice = next_batch(asking(strategy), 1, ids(60), view_of(ids(60)[:20]), labels, ("a", "b", "c"), counted)
    needs = STRATEGIES[choice.strategy].needs
    assert len(seen) == ("vectors" in needs) + ("labeled" in needs) + ("centre" in needs)
    if not seen:
        next_batch(asking(strategy), 1, ids(60), view_of(ids(60)[:20]), labels, ("a", "b", "c"), None)
    elif strategy != AUTO:
        with pytest.raises(ValueError, match="needs vectors"):
            next_batch(asking(strategy), 1, ids(60), view_of(ids(60)[:20]), labels, ("a", "b", "c"), None)


def test_near_duplicates_are_asked_once() -> None:
    """Neither beside one another nor after one of them was labelled; the honest slice is left alone."""
    items = ids(30)
    place = {item: number for number, item in enumerate([*items, "old"])}

    def paired(some) -> np.ndarray:  # items 2n and 2n + 1 point the same way; `old` is like items 0 and 1
        angle = np.array([(place[item] if item != "old" else 0) // 2 for item in some]) * np.pi / 15
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    view = Shortlist(items, np.linspace(1, 0, 30), np.full((30, 2), 0.5))
    labels = {"old": "a", "older": "b"}
    place["older"] = 28

    def asked(most: float) -> list[int]:
        settings_ = QueryConfig(7, 6, "cluster_margin", 10, 0.0, 30, max_similarity=most)
        queries, _ = next_batch(settings_, 1, items, view, labels, ("a", "b"), paired)
        return [place[query.item_id] for query in queries if query.strategy == "cluster_margin"]

    pairs = [number // 2 for number in asked(0.999)]
    assert len(pairs) == len(set(pairs)) == 10 and not {0, 14} & set(pairs)
    assert 0 in {number // 2 for number in asked(1.0)}


@given(st.integers(0, 4), st.lists(st.integers(0, 400), min_size=2, max_size=4), st.booleans())
@settings(max_examples=80, derandomize=True)
def test_auto_names_a_strategy_that_can_ask_and_says_why(
    round_number: int, counts: list[int], has_vectors: bool
) -> None:
    choice = choose_strategy(asking(AUTO), round_number, counts, has_vectors)
    assert choice.reason
    needs = STRATEGIES[choice.strategy].needs
    assert has_vectors or "vectors" not in needs
    assert sum(counts) or choice.strategy == "random"
    of_a_model = needs & {"scores", "proba"}
    assert sum(count > 0 for count in counts) >= 2 or not of_a_model, "a model of one class has nothing to say"


@pytest.mark.parametrize(
    ("counts", "has_vectors", "strategy"),
    [
        ((0, 0), True, "random"),
        ((9, 0), True, "random"),
        ((9, 9), True, "herding"),
        ((40, 9), True, "herding"),
        ((40, 9), False, "class_balanced"),
        ((35, 5), True, "herding"),
        ((36, 5), True, "margin"),
        ((36, 8, 8), True, "relevance"),
        ((36, 10, 10), True, "herding"),
        ((40, 1, 0), True, "relevance"),
        ((30, 30, 0), True, "herding"),
        ((300, 300), True, "margin"),
        ((900, 100), True, "margin"),
        ((900, 100, 50), True, "relevance"),
        ((9, 9), False, "margin"),
    ],
)
def test_auto_goes_by_the_labels(counts: tuple[int, ...], has_vectors: bool, strategy: str) -> None:
    assert choose_strategy(asking(AUTO), 2, counts, has_vectors).strategy == strategy


@pytest.mark.parametrize("has_vectors", [True, False])
def test_auto_searches_for_a_second_class_among_the_odd_and_at_random_by_turns(has_vectors: bool) -> None:
    found = [choose_strategy(asking(AUTO), number, (9 * number, 0), has_vectors).strategy for number in range(1, 5)]
    assert found == (["core_set", "random"] * 2 if has_vectors else ["random"] * 4)


def test_relevance_spends_half_on_the_poorest_class_that_was_seen() -> None:
    """Two likeliest items of class b until it has as many labels as c; never class d, of which nothing is known."""
    items = ids(40)
    proba = np.full((40, 4), 0.01)
    proba[:, 0] = 0.97
    proba[:6, 1], proba[6:12, 2] = np.linspace(0.9, 0.4, 6), np.linspace(0.8, 0.3, 6)
    view = replace(view_of(items), proba=proba, scores=np.arange(40) / 40, counts=np.array([50, 1, 3, 0]))
    found = STRATEGIES["relevance"].pick(view, 8, SEED).positions.tolist()
    assert len(set(found)) == 8
    assert found[:2] == [0, 1] and sorted(found[2:4]) == [2, 6], "one, then two, then three of each"
    even = replace(view, counts=np.array([9, 9, 9, 0]))
    assert STRATEGIES["relevance"].pick(even, 8, SEED).positions.tolist() == (
        STRATEGIES["herding"].pick(even, 8, SEED).positions.tolist()
    )


def test_of_two_classes_margin_asks_what_a_search_for_the_rare_one_asks() -> None:
    """While no item is likelier of the rare class than of the other the orders are equal: why auto has no search."""
    few = np.linspace(0.01, 0.49, 40)
    view = replace(view_of(ids(40)), proba=np.column_stack([1 - few, few]), scores=2 * few, counts=np.array([39, 1]))
    searched = STRATEGIES["relevance"].pick(view, 12, SEED).positions[:6].tolist()
    assert searched == STRATEGIES["margin"].pick(view, 6, SEED).positions.tolist()


def test_the_half_of_relevance_that_is_herded_keeps_away_from_the_searched_half() -> None:
    """The cloud of the searched items is covered by them, so the rest of the batch goes elsewhere."""
    view, own = clouds([20, 20, 20])
    proba = np.full((60, 3), 0.01)
    proba[:, 0] = 0.5
    proba[own == 1, 1] = 0.4
    even = replace(
        view, proba=proba / proba.sum(axis=1, keepdims=True), scores=np.ones(60), counts=np.array([90, 1, 40])
    )
    found = own[STRATEGIES["relevance"].pick(even, 4, SEED).positions]
    assert found[:2].tolist() == [1, 1] and set(found[2:]) == {0, 2}


def test_the_cold_candidates_are_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "COLD_CANDIDATES", 25)
    sizes: list[int] = []

    def counted(items) -> np.ndarray:
        sizes.append(len(items))
        return vectors_of(items)

    next_batch(asking("margin", cold_start="typiclust"), 0, ids(500), None, {}, ("a", "b"), counted)
    assert sizes == [25, 0]


# What the user gives for a rare class -------------------------------------------------------------------------------
@ARMS
def test_guided_items_take_half_of_the_batch_until_the_class_is_known(strategy: str) -> None:
    items = ids(60)
    guided = {"c": items[50:], "b": items[40:50]}

    def asked(labels: dict[str, str], number: int = 1) -> list[Query]:
        view = view_of(items[:40])
        return next_batch(
            replace(asking(strategy), batch_size=12), number, items, view, labels, "abc", vectors_of, guided=guided
        )[0]

    few = {f"old-{n}": "ab"[n % 2] for n in range(24)}
    queries = asked(few)
    found = [query.item_id for query in queries if query.strategy == GUIDED]
    assert len(queries) == len({query.item_id for query in queries}) == 12
    honest = [query for query in queries if query.strategy == RANDOM_SLICE]
    assert len(honest) == 3 and len(found) == (12 - 3) // 2
    assert set(found) <= set(guided["c"]), "b has its labels"
    expected = [item for item in guided["c"] if item not in {query.item_id for query in queries} - set(found)]
    assert found == expected[: len(found)], "the nearest first"
    many = {**few, **{f"new-{n}": "c" for n in range(10)}}
    assert GUIDED not in {query.strategy for query in asked(many)}
    assert {query.strategy for query in asked({}, 0)} == {GUIDED, RANDOM_SLICE, "random"}


def test_a_uniform_draw_beside_a_search_stays_uniform() -> None:
    """Guided or not, every item has the same chance to be drawn at random, and the batch says which."""
    drawn = dict.fromkeys(ids(20), 0)
    for number in range(2000):
        queries = choose(
            ids(20), None, strategy="random", k=6, random_share=0, seed=round_seed(5, number, "random"), guided=ids(4)
        )
        assert len(queries) == 6
        own = [query for query in queries if query.strategy == "random"]
        assert [query.probability for query in own] == pytest.approx([3 / 20] * 3)
        for query in own:
            drawn[query.item_id] += 1
    expected = sum(drawn.values()) / 20
    assert sum((count - expected) ** 2 / expected for count in drawn.values()) < 43.8  # 0.1 % point, 19 degrees
