"""Two models side by side: what moved is what `evaluate` says of each, and equal models do not differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.evaluation.comparison import compare, shared
from al_pipeline.evaluation.metrics import Floats, differences, evaluate

CLASSES = ("eggs", "ham", "spam")
FIGURES = ("accuracy", "macro_f1", "average_precision", "log_loss", "calibration_error")


@dataclass(frozen=True)
class Model:
    item_ids: tuple[str, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    proba: Floats


def model(seed: int, items: int = 40, classes: tuple[str, ...] = CLASSES, first: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    names = tuple(f"item-{number}" for number in range(first, first + items))
    labels = tuple(classes[number % len(classes)] for number in range(first, first + items))
    return Model(names, labels, classes, rng.dirichlet(np.ones(len(classes)), items))


@given(st.integers(0, 1000), st.integers(0, 1000))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_difference_is_that_of_the_values_and_turns_with_the_order(one: int, other: int) -> None:
    truth = np.arange(30) % 3
    a, b = model(one, 30).proba, model(other, 30).proba
    found = differences(a, b, truth, CLASSES, np.random.default_rng(1), 100)
    back = differences(b, a, truth, CLASSES, np.random.default_rng(1), 100)
    values = [evaluate(proba, truth, CLASSES, np.random.default_rng(1), 0) for proba in (a, b)]
    for name in FIGURES:
        before, after = (getattr(metrics, name).value for metrics in values)
        assert found[name].value == pytest.approx(after - before)
        low, high = found[name].low, found[name].high
        assert low is not None and high is not None and low <= high
        assert (back[name].low, back[name].high) == pytest.approx((-high, -low))


def test_equal_models_do_not_differ_at_all() -> None:
    found = compare(model(3), model(3), np.random.default_rng(0), 100)
    assert found.items == 40 and found.flips == ()
    for estimate in found.differences.values():
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


def test_only_shared_items_count_with_the_later_labels_and_flips_are_named() -> None:
    before, after = model(1, 20), model(2, 20, first=10)
    assert shared(before, after) == (list(range(10, 20)), list(range(10)))
    found = compare(before, after, np.random.default_rng(0), 100)
    assert found.items == 10
    old, new = before.proba.argmax(axis=1), after.proba.argmax(axis=1)
    expected = {f"item-{10 + n}": (CLASSES[old[10 + n]], CLASSES[new[n]]) for n in range(10) if old[10 + n] != new[n]}
    assert {flip.item_id: (flip.before, flip.after) for flip in found.flips} == expected
    for flip in found.flips:
        assert flip.label == after.labels[after.item_ids.index(flip.item_id)]
        assert flip.after_probability == after.proba[after.item_ids.index(flip.item_id)].max()


def test_a_class_that_came_later_had_no_chance_before() -> None:
    before = model(1, 30, CLASSES[1:])
    after = model(2, 30)
    found = compare(before, after, np.random.default_rng(0), 100)
    assert found.items == 30
    assert all(flip.before != "eggs" for flip in found.flips)
    assert found.differences["accuracy"].value is not None


def test_without_a_shared_item_there_is_a_reason() -> None:
    found = compare(model(1, 5), model(2, 5, first=50), np.random.default_rng(0), 100)
    assert (found.items, found.flips) == (0, ())
    assert {(e.value, e.reason) for e in found.differences.values()} == {(None, "the test set has no labelled items")}
