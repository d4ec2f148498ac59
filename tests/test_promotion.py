"""The gate: its rule case by case, and how often it errs on noisy test sets."""

from types import SimpleNamespace

import numpy as np
import pytest

from al_pipeline.evaluation.figures import Decision
from al_pipeline.evaluation.promotion import decide
from al_pipeline.params import Gate

GATE = Gate(max_drop=0.02, min_test_per_class=10)
CLASSES = ("ham", "spam")


def proba(predicted: np.ndarray, classes: int = 2) -> np.ndarray:
    """Probabilities whose most likely classes are `predicted`."""
    return np.where(np.eye(classes)[predicted] > 0, 0.9, 0.1 / (classes - 1))


def flipped(truth: np.ndarray, places: slice | np.ndarray) -> np.ndarray:
    """Predictions that are wrong at these places (two classes)."""
    predicted = truth.copy()
    predicted[places] = 1 - predicted[places]
    return predicted


def verdict(old: np.ndarray | None, new: np.ndarray, truth: np.ndarray, limits=GATE, classes=CLASSES) -> Decision:
    champion = None if old is None else proba(old, len(classes))
    return decide(champion, proba(new, len(classes)), truth, classes, limits, np.random.default_rng(0))


EVEN = np.arange(300) % 2
"""150 test items of each class."""


def test_equal_models_are_promoted() -> None:
    found = verdict(flipped(EVEN, slice(20)), flipped(EVEN, slice(20)), EVEN)
    assert (found.verdict, found.provisional, found.difference, found.low, found.high) == ("promoted", False, 0, 0, 0)


def test_better_model_is_promoted_with_its_interval() -> None:
    found = verdict(flipped(EVEN, slice(60)), flipped(EVEN, slice(10)), EVEN)
    assert found.verdict == "promoted"
    assert 0.1 < found.low < found.difference < found.high < 0.25
    assert "300 test items" in found.reasons[0] and "+0.1" in found.reasons[0]


def test_clearly_worse_model_is_refused() -> None:
    found = verdict(flipped(EVEN, slice(10)), flipped(EVEN, slice(60)), EVEN)
    assert found.verdict == "refused" and found.high < 0
    assert "got worse" in " ".join(found.reasons)


def test_fall_of_the_mean_alone_is_refused_when_it_is_no_accident() -> None:
    found = verdict(flipped(EVEN, slice(20)), flipped(EVEN, slice(32)), EVEN)
    assert (found.verdict, found.difference < -0.02, found.high < 0) == ("refused", True, True)
    assert "worse by more than the 0.02 tolerated" in found.reasons[0]


def test_fall_that_could_be_chance_is_held() -> None:
    found = verdict(flipped(EVEN, slice(0, 40)), flipped(EVEN, slice(40, 90)), EVEN)
    assert found.verdict == "held" and found.difference < -0.02 and found.low < 0 < found.high
    assert "could be chance" in found.reasons[0]


def test_fall_within_the_tolerance_is_promoted_even_when_real() -> None:
    found = verdict(flipped(EVEN, slice(20)), flipped(EVEN, slice(25)), EVEN)
    assert found.verdict == "promoted" and -0.02 < found.difference < 0


# Collapse -----------------------------------------------------------------------------------------------------------
RARE = (np.arange(1000) < 12).astype(int)


def test_class_whose_recall_falls_to_nothing_is_refused_however_small_its_part() -> None:
    found = verdict(flipped(RARE, slice(4)), np.zeros(1000, dtype=int), RARE)
    assert found.verdict == "refused"
    assert found.reasons[0] == "class spam collapsed: none of its 12 test items found, 8 before"


def test_class_that_was_never_found_cannot_collapse() -> None:
    nothing = np.zeros(1000, dtype=int)
    assert verdict(nothing, nothing, RARE).verdict == "promoted"


def test_class_may_not_pay_for_the_others() -> None:
    """Macro F1 rises, one class of three gets clearly worse."""
    truth = np.arange(300) % 3
    third = np.flatnonzero(truth == 2)
    old = truth.copy()
    old[truth == 0] = np.where(np.arange(100) < 70, 1, 0)
    new = truth.copy()
    new[third[:50]] = 0
    found = verdict(old, new, truth, classes=("a", "b", "c"))
    assert found.difference > 0 and found.verdict == "refused"
    assert found.reasons[0].startswith("class c got worse: F1 -0.3")


# Little evidence ----------------------------------------------------------------------------------------------------
def test_first_model_is_promoted() -> None:
    found = verdict(None, EVEN, EVEN)
    assert found == Decision(verdict="promoted", provisional=False, reasons=("the first model",))


def test_first_model_on_a_thin_test_set_is_provisional() -> None:
    found = verdict(None, EVEN[:12], EVEN[:12])
    assert found == Decision(
        verdict="promoted", provisional=True, reasons=("the first model", "fewer than 10 test items of ham 6, spam 6")
    )


def test_first_model_that_knows_one_class_is_provisional() -> None:
    found = verdict(None, np.zeros(300, dtype=int), EVEN)
    assert found.verdict == "promoted" and found.provisional
    assert found.reasons[1] == "it finds no test item of spam"


def test_later_models_on_a_thin_test_set_are_held() -> None:
    truth = np.array([0] * 50 + [1] * 9)
    found = verdict(truth, truth, truth)
    assert found == Decision(
        verdict="held", provisional=False, reasons=("not enough evidence: fewer than 10 test items of spam 9",)
    )


@pytest.mark.parametrize(("champion", "expected"), [(None, "promoted"), (np.empty((0, 2)), "held")])
@pytest.mark.parametrize("least", [0, 10])
def test_no_test_items_at_all(champion: np.ndarray | None, expected: str, least: int) -> None:
    limits = Gate(max_drop=0.02, min_test_per_class=least)
    found = decide(champion, np.empty((0, 2)), [], CLASSES, limits, np.random.default_rng(0))
    assert (found.verdict, found.provisional) == (expected, expected == "promoted")
    assert "no labelled items" in found.reasons[-1]


def test_class_without_test_items_passes_where_none_are_wanted() -> None:
    truth = np.zeros(40, dtype=int)
    assert verdict(truth, truth, truth, Gate(max_drop=0.02, min_test_per_class=0)).verdict == "promoted"


# Laws ---------------------------------------------------------------------------------------------------------------
def noisy(truth: np.ndarray, error: float, rng: np.random.Generator) -> np.ndarray:
    return flipped(truth, rng.random(len(truth)) < error)


def share(old_error: float, new_error: float, outcome: str, runs: int = 60) -> float:
    """How often models with these true error rates get this verdict on 300 items, independent errors."""
    found = []
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        models = proba(noisy(EVEN, old_error, rng)), proba(noisy(EVEN, new_error, rng))
        found.append(decide(*models, EVEN, CLASSES, GATE, rng, bootstrap=200).verdict)
    return found.count(outcome) / runs


def test_noise_of_300_items_rarely_refuses_an_equal_model() -> None:
    """Two independent models with 10 % errors each: their difference has a standard deviation of 0.024."""
    assert share(0.1, 0.1, "refused") <= 0.1
    assert share(0.1, 0.1, "promoted") >= 0.65


def test_models_that_lost_ten_points_are_stopped() -> None:
    assert share(0.1, 0.2, "promoted") <= 0.05
    assert share(0.1, 0.2, "refused") >= 0.8


def test_exchanged_models_have_the_opposite_difference() -> None:
    old, new = flipped(EVEN, slice(30)), flipped(EVEN, slice(20, 70))
    one, other = verdict(old, new, EVEN), verdict(new, old, EVEN)
    assert one.difference == pytest.approx(-other.difference)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_same_seed_same_decision_and_a_row_of_json() -> None:
    found = verdict(flipped(EVEN, slice(10)), flipped(EVEN, slice(5, 30)), EVEN)
    assert found == verdict(flipped(EVEN, slice(10)), flipped(EVEN, slice(5, 30)), EVEN)
    row = found.to_json()
    assert row["reasons"] == list(found.reasons) and row["low"] == found.low


def test_limits_may_be_any_record_with_the_two_settings() -> None:
    limits = SimpleNamespace(max_drop=1.0, min_test_per_class=0)
    assert verdict(EVEN, flipped(EVEN, slice(100)), EVEN, limits).verdict == "promoted"


def test_models_of_other_items_or_classes_are_named() -> None:
    with pytest.raises(ValueError, match=r"300 items and 2 classes, but probabilities of shape \(299, 2\)"):
        decide(proba(EVEN[1:]), proba(EVEN), EVEN, CLASSES, GATE, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"shape \(300, 3\)"):
        decide(proba(EVEN), proba(EVEN, 3), EVEN, CLASSES, GATE, np.random.default_rng(0))
