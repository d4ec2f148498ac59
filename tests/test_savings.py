"""What curves say: area, labels needed, savings with their interval, wins; and nothing beyond what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from al_pipeline.evaluation.savings import RANDOM, area, compare, labels_needed, mean_interval

BUDGETS = np.array([20.0, 40.0, 60.0, 80.0])


def compared(own: np.ndarray, random: np.ndarray, full: float = 1.0, bootstrap: int = 200):
    full_scores = np.full(len(own), full)
    rng = np.random.default_rng(0)
    return compare([20, 40, 60, 80], {RANDOM: random, "own": own}, full_scores, rng, bootstrap=bootstrap)


def curves(rng: np.random.Generator, seeds: int, rise: float) -> np.ndarray:
    return np.clip(0.5 + rise * (BUDGETS - 20) / 60 + rng.normal(0, 0.01, (seeds, 4)), 0, 1)


def test_area_is_the_mean_height_and_passes_over_what_is_not_defined() -> None:
    table = np.array([[0.5] * 4, [0.2, 0.4, 0.6, 0.8], [0.2, np.nan, 0.6, 0.8], [np.nan] * 4])
    assert area(BUDGETS, table)[:3] == pytest.approx([0.5, 0.5, 0.5])
    assert np.isnan(area(BUDGETS, table)[3])
    uneven = area(np.array([0.0, 10.0, 100.0]), np.array([[0.0, 1.0, 1.0]]))
    assert uneven == pytest.approx([(5 + 90) / 100])


def test_labels_needed_lie_on_the_line_between_two_budgets_and_nowhere_else() -> None:
    table = np.array([[0.5, 0.6, 0.8, 0.9], [0.9, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [np.nan, 0.8, 0.8, 0.8]])
    found = labels_needed(BUDGETS, table, np.array([0.7, 0.7, 0.7, 0.7]))
    assert found.tolist() == pytest.approx([50.0, 20.0, np.inf, 40.0])


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=100, derandomize=True)
def test_a_higher_target_never_needs_fewer_labels(curve: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    table = np.array([curve, curve])
    fewer, more = labels_needed(BUDGETS, table, np.array([low, high]))
    assert fewer <= more
    assert np.isinf(more) or BUDGETS[0] <= more <= BUDGETS[-1]


def test_a_strategy_is_no_better_than_itself() -> None:
    table = curves(np.random.default_rng(1), 8, 0.5)
    found = compared(table, table)
    one = found.arms["own"].savings[90]
    assert (one.saving.value, one.saving.low, one.saving.high) == (1.0, 1.0, 1.0)
    assert found.arms["own"].gain.value == 0.0
    assert found.arms["own"].wins == {RANDOM: 0}
    assert found.arms["own"].below_random == ()


def test_a_saving_is_randoms_labels_over_ours_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(2)
    own, random = curves(rng, 10, 1.5), curves(rng, 10, 0.5)
    found = compared(own, random).arms["own"]
    saved = found.savings[90]
    assert saved.labels == pytest.approx(20 + 60 * 0.4 / 1.5, abs=3)
    assert saved.random_labels == pytest.approx(68, abs=3)
    assert saved.saving.value == saved.random_labels / saved.labels
    assert saved.saving.low < saved.saving.value < saved.saving.high
    assert saved.saving.low > 1 and saved.at_least is None
    assert found.wins == {RANDOM: 10} and found.gain.low > 0


def test_what_is_not_reached_has_no_number_and_nothing_is_extrapolated() -> None:
    rng = np.random.default_rng(3)
    good, bad = curves(rng, 6, 1.5), curves(rng, 6, 0.1)
    ahead = compared(good, bad).arms["own"].savings[95]
    assert ahead.saving.value is ahead.saving.low is ahead.random_labels is None
    assert ahead.at_least == pytest.approx(80 / ahead.labels)
    behind = compared(bad, good).arms["own"].savings[95]
    assert behind.saving.value is behind.labels is behind.at_least is None


@pytest.mark.slow
def test_below_random_is_told_only_beyond_doubt() -> None:
    rng = np.random.default_rng(4)
    random = curves(rng, 10, 0.5)
    worse = random.copy()
    worse[:, 2] -= 0.2 + rng.normal(0, 0.01, 10)
    found = compared(worse, random).arms
    assert found["own"].below_random == (60,)
    assert found[RANDOM].below_random == ()
    falsely = sum(
        bool(compared(curves(rng, 10, 0.5), curves(rng, 10, 0.5)).arms["own"].below_random) for _ in range(100)
    )
    assert falsely <= 10  # 2.5 expected: one side of 5 %, corrected for the four budgets


def test_mean_interval_is_students() -> None:
    values = np.array([0.5, 0.6, 0.9, np.nan])
    found = mean_interval(values, 0.9)
    low, high = stats.t.interval(0.9, 2, loc=2 / 3, scale=stats.sem([0.5, 0.6, 0.9]))
    assert (found.value, found.low, found.high) == pytest.approx((2 / 3, low, high))
    assert mean_interval(np.array([0.5]), 0.9).low is None
    assert mean_interval(np.array([np.nan]), 0.9).value is None


def test_one_seed_has_figures_and_no_intervals() -> None:
    rng = np.random.default_rng(5)
    found = compared(curves(rng, 1, 1.5), curves(rng, 1, 0.5)).arms["own"]
    assert found.savings[90].saving.value is not None
    assert found.savings[90].saving.low is found.area.low is found.gain.low is None


def test_wrong_tables_are_named() -> None:
    rng = np.random.default_rng(0)
    table = np.zeros((2, 4))
    with pytest.raises(ValueError, match="has no random arm"):
        compare([20, 40, 60, 80], {"own": table}, np.ones(2), rng)
    with pytest.raises(ValueError, match="must have the same shape"):
        compare([20, 40, 60, 80], {RANDOM: table, "own": table[:1]}, np.ones(2), rng)
