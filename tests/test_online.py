"""The running accuracy and the labels saved: what they count, their interval, that they are honest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from al_pipeline.evaluation.figures import Control, Estimate, Running
from al_pipeline.evaluation.online import RECENT, Forecast, labels_saved, running_accuracy, wilson


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([0.8, 0.95, 0.99]))
@settings(max_examples=80, derandomize=True, deadline=None)
def test_the_interval_is_wilsons(successes: int, failures: int, confidence: float) -> None:
    trials = successes + failures
    if trials == 0:
        assert wilson(0, 0, confidence) == (None, None)
        return
    theirs = binomtest(successes, trials).proportion_ci(confidence, "wilson")
    assert wilson(successes, trials, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_unanswered_items_are_counted_and_not_judged() -> None:
    found = running_accuracy([Forecast(1, "a", "a"), Forecast(1, "a", "b"), Forecast(3, "b", None)])
    assert found is not None
    whole = found.whole
    assert (whole.first_round, whole.last_round, whole.asked, whole.answered, whole.right) == (1, 3, 3, 2, 1)
    assert whole.accuracy == 0.5 and whole.low < 0.5 < whole.high
    assert running_accuracy([]) is None
    nobody = running_accuracy([Forecast(1, "a", None)])
    assert nobody is not None and nobody.whole.accuracy is nobody.recent.low is None
    assert Running.from_row(found.to_json()) == found


def test_recent_goes_back_in_whole_rounds_until_it_has_enough() -> None:
    rounds = [Forecast(number, "a", "a" if number > 2 else "b") for number in range(1, 6) for _ in range(RECENT // 2)]
    found = running_accuracy(rounds)
    assert found is not None
    assert (found.recent.first_round, found.recent.last_round, found.recent.answered) == (4, 5, RECENT)
    assert found.recent.accuracy == 1.0
    assert found.whole.accuracy == 0.6


def test_it_is_true_of_the_pool_where_the_chosen_items_are_not() -> None:
    """A model that is right nine times in ten, and asks where it is wrong: the slice tells the first."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        right = rng.random(1000) < 0.9
        drawn = rng.choice(1000, 60, replace=False)
        found = running_accuracy([Forecast(1, "a", "a" if right[item] else "b") for item in drawn])
        assert found is not None
        covered += found.whole.low <= right.mean() <= found.whole.high
    assert covered >= 180  # 190 expected, standard deviation 3


def test_labels_saved_are_those_of_a_round_that_took_place() -> None:
    rounds = [(40, 0.7), (80, None), (120, 0.8), (160, 0.9)]

    def saved(score: float | None, labels: int = 52):
        return labels_saved(rounds, Control(labels=labels, macro_f1=Estimate(value=score)))

    assert (saved(0.75).labels, saved(0.75).at_most) == (120, False)
    assert (saved(0.7).labels, saved(0.7).at_most) == (40, True)
    assert saved(0.95).labels is None
    assert saved(0.75).sentence() == "52 random labels alone reach macro-F1 0.750; the rounds were as good with 120"
    assert "at most 40" in saved(0.6).sentence() and "no round is as good yet" in saved(0.95).sentence()
    assert saved(None) is None is labels_saved(rounds, None)
    assert saved(0.6, labels=6).sentence().endswith("0.600: too few to tell what the rounds saved"), "6 against ≤ 40"
    assert saved(0.75, labels=6).sentence().endswith("with 120"), "a loss that was seen is told"
