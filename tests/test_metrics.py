"""Metrics: against scikit-learn and naive loops, the bootstrap, and what is not defined."""

import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from al_pipeline.cli.options import TEST_SIZES
from al_pipeline.evaluation.figures import Metrics
from al_pipeline.evaluation.metrics import evaluate, interval, resamples

NAMES = tuple("abcdefghijklmnopqrstuvwxyz")


def sample(n: int, classes: int, seed: int = 0, decimals: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are worth something, with equal scores where rounded, and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(classes, size=n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[truth]
    if decimals is not None:
        logits = np.round(logits, decimals)
    proba = np.exp(logits)
    return proba / proba.sum(axis=1, keepdims=True), truth


def measure(proba: np.ndarray, truth: np.ndarray, bootstrap: int = 0, seed: int = 0, **other) -> Metrics:
    return evaluate(proba, truth, NAMES[: proba.shape[1]], np.random.default_rng(seed), bootstrap, **other)


def test_what_help_says_of_the_size_of_a_test_set_is_what_is_measured() -> None:
    said = re.findall(r"(\d[\d,]*)[^,±]* to ±(\d+)", TEST_SIZES)
    assert len(said) == 3 and "90 %" in TEST_SIZES
    for words, points in said:
        size = int(words.replace(",", ""))
        truth = np.zeros(size, np.int64)
        proba = np.tile([0.9, 0.1], (size, 1))
        proba[: size // 10] = [0.1, 0.9]
        found = measure(proba, truth, bootstrap=1000).accuracy
        assert found.value == pytest.approx(0.9) and found.low is not None and found.high is not None
        assert round(50 * (found.high - found.low)) == int(points)


# Against scikit-learn -----------------------------------------------------------------------------------------------
@given(n=st.integers(2, 60), classes=st.integers(2, 5), seed=st.integers(0, 9999), rounded=st.booleans())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_figures_agree_with_scikit_learn(n: int, classes: int, seed: int, rounded: bool) -> None:
    proba, truth = sample(n, classes, seed, 0 if rounded else None)
    predicted, present = proba.argmax(axis=1), np.unique(truth)
    found = measure(proba, truth)
    assert found.accuracy.value == pytest.approx(reference.accuracy_score(truth, predicted))
    expected = reference.f1_score(truth, predicted, labels=present, average="macro", zero_division=0)
    assert found.macro_f1.value == pytest.approx(expected)
    assert found.averaged == tuple(NAMES[c] for c in present)
    assert found.log_loss.value == pytest.approx(reference.log_loss(truth, proba, labels=list(range(classes))))
    matrix = reference.confusion_matrix(truth, predicted, labels=range(classes))
    np.testing.assert_array_equal(found.confusion, matrix)
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        truth, predicted, labels=range(classes), zero_division=np.nan
    )
    for c, one in enumerate(found.per_class.values()):
        assert (one.support, one.predicted) == (support[c], (predicted == c).sum())
        assert one.precision.value == (None if np.isnan(precision[c]) else pytest.approx(precision[c]))
        assert one.recall.value == (None if np.isnan(recall[c]) else pytest.approx(recall[c]))
        assert one.f1.value == (None if support[c] == 0 else pytest.approx(f1[c]))
    if len(present) > 1:
        targets = present if classes > 2 else [NAMES.index(found.average_precision_of)]
        expected = np.mean([reference.average_precision_score(truth == c, proba[:, c]) for c in targets])
        assert found.average_precision.value == pytest.approx(expected)
        assert found.average_precision_of == ("macro" if classes > 2 else NAMES[targets[0]])


@given(n=st.integers(1, 60), classes=st.integers(2, 4), seed=st.integers(0, 9999))
@settings(max_examples=40, derandomize=True)
def test_calibration_error_agrees_with_a_loop_over_bins(n: int, classes: int, seed: int) -> None:
    proba, truth = sample(n, classes, seed)
    sure, right = proba.max(axis=1), proba.argmax(axis=1) == truth
    error = 0.0
    for low in range(15):
        inside = (sure > low / 15) & (sure <= (low + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert measure(proba, truth).calibration_error.value == pytest.approx(error)


def test_certain_and_right_is_perfect() -> None:
    found = measure(np.eye(3), np.arange(3))
    figures = (found.accuracy, found.macro_f1, found.average_precision, found.log_loss, found.calibration_error)
    assert [figure.value for figure in figures] == pytest.approx([1, 1, 1, 0, 0])


def test_certain_and_wrong_has_a_finite_log_loss() -> None:
    found = measure(np.eye(2), np.array([1, 0]))
    assert found.log_loss.value == pytest.approx(-np.log(np.finfo(float).eps))
    assert found.calibration_error.value == pytest.approx(1.0)


# Which class average precision is of --------------------------------------------------------------------------------
def test_average_precision_is_of_the_rarer_class_or_the_one_asked_for() -> None:
    proba, _ = sample(6, 2)
    assert measure(proba, np.array([0, 1, 1, 1, 1, 0])).average_precision_of == "a"
    assert measure(proba, np.array([1, 0, 0, 0, 1, 0])).average_precision_of == "b"
    assert measure(proba, np.array([1, 0, 1, 0, 1, 0])).average_precision_of == "b"
    assert measure(proba, np.array([0, 1, 1, 1, 1, 0]), positive="b").average_precision_of == "b"
    with pytest.raises(ValueError, match="unknown class 'z'; choose from a, b"):
        measure(proba, np.zeros(6, dtype=int), positive="z")


# What is not defined ------------------------------------------------------------------------------------------------
def test_empty_test_set_has_reasons_and_no_figures() -> None:
    found = evaluate([], [], ("ham", "spam"), np.random.default_rng(0))
    assert found.items == 0 and found.averaged == () and found.confusion == ((0, 0), (0, 0))
    for row in found.to_table():
        assert row["value"] is row["low"] is row["high"] is None
        assert row["reason"] == "the test set has no labelled items"


@pytest.mark.parametrize("only", [0, 1])
def test_one_class_test_set(only: int) -> None:
    proba, _ = sample(30, 2)
    found = measure(proba, np.full(30, only), bootstrap=200)
    other = found.per_class[NAMES[1 - only]]
    assert found.accuracy.value is not None and found.accuracy.low is not None
    assert found.averaged == (NAMES[only],)
    assert found.average_precision.reason == "needs test items of the class and of another one"
    assert (other.recall.value, other.recall.reason) == (None, f"no test item is {NAMES[1 - only]}")
    assert other.precision.value == 0.0


def test_class_never_predicted_has_no_precision() -> None:
    found = measure(np.tile([0.9, 0.1], (4, 1)), np.array([0, 0, 1, 1]), bootstrap=100)
    assert found.per_class["b"].precision.reason == "no item was predicted as b"
    assert (found.per_class["b"].recall.value, found.per_class["b"].f1.value) == (0.0, 0.0)


@given(n=st.integers(0, 6), classes=st.integers(2, 4), seed=st.integers(0, 999))
@settings(max_examples=60, derandomize=True)
def test_tiny_test_sets_never_say_nan(n: int, classes: int, seed: int) -> None:
    proba, truth = sample(n, classes, seed)
    found = measure(proba, truth, bootstrap=100)
    json.dumps(found.to_json(), allow_nan=False)
    for row in found.to_table():
        assert (row["value"] is None) <= (row["low"] is None and bool(row["reason"]))
        assert (row["low"] is None) == (row["high"] is None)
        if row["low"] is not None:
            assert row["low"] <= row["high"]


def test_no_interval_where_most_resamples_have_no_value() -> None:
    assert interval(np.array([1.0, np.nan, np.nan]), 0.95) is None
    assert interval(np.array([np.nan, 1.0]), 0.95) == (1.0, 1.0)
    assert interval(np.empty(0), 0.95) is None


# The bootstrap ------------------------------------------------------------------------------------------------------
def test_resamples_draw_n_of_n_with_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("al_pipeline.evaluation.metrics._BLOCK", 700)
    blocks = list(resamples(100, 50, np.random.default_rng(0)))
    assert [len(block) for block in blocks] == [7] * 7 + [1]
    weights = np.concatenate(blocks)
    assert (weights.sum(axis=1) == 100).all()
    assert (weights == 0).mean() == pytest.approx(np.exp(-1), abs=0.02)


def test_interval_is_what_scikit_learn_gives_resample_by_resample() -> None:
    proba, truth = sample(80, 3)
    predicted = proba.argmax(axis=1)
    found = measure(proba, truth, bootstrap=60)
    draws: dict[str, list[float]] = {"accuracy": [], "macro_f1": [], "average_precision": [], "log_loss": []}
    (weights,) = resamples(80, 60, np.random.default_rng(0))
    for row in weights.astype(int):
        t, q, p = (np.repeat(values, row, axis=0) for values in (truth, predicted, proba))
        present = np.unique(t)
        draws["accuracy"].append(reference.accuracy_score(t, q))
        draws["macro_f1"].append(reference.f1_score(t, q, labels=present, average="macro", zero_division=0))
        draws["average_precision"].append(
            np.mean([reference.average_precision_score(t == c, p[:, c]) for c in np.unique(truth)])
        )
        draws["log_loss"].append(reference.log_loss(t, p, labels=[0, 1, 2]))
    for name, values in draws.items():
        figure = getattr(found, name)
        assert (figure.low, figure.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975]))), name


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        truth = (np.random.default_rng(seed).random(100) < 0.8).astype(int)  # always predicted: accuracy 0.8
        figure = measure(np.tile([0.1, 0.9], (100, 1)), truth, 200, seed, confidence=0.9).accuracy
        covered += figure.low <= 0.8 <= figure.high
    assert 80 <= covered <= 99  # 90 +- 3.3 standard deviations of 3


def test_same_seed_same_metrics() -> None:
    proba, truth = sample(50, 3)
    assert measure(proba, truth, 100, seed=4) == measure(proba, truth, 100, seed=4)
    assert measure(proba, truth, 100, seed=4) != measure(proba, truth, 100, seed=5)


def test_a_thousand_resamples_take_well_under_a_second() -> None:
    proba, truth = sample(500, 2)
    began = time.process_time()
    measure(proba, truth, bootstrap=1000)
    assert time.process_time() - began < 1


# In and out ---------------------------------------------------------------------------------------------------------
def test_record_survives_json() -> None:
    proba, truth = sample(20, 3)
    found = measure(proba, truth, bootstrap=100)
    assert Metrics.from_row(json.loads(json.dumps(found.to_json()))) == found


def test_row_is_what_dvc_metrics_reads() -> None:
    """Numbers in nested objects, the class names as keys."""
    row = measure(*sample(20, 2), bootstrap=100).to_json()
    assert row["per_class"]["b"]["f1"]["value"] > 0
    assert set(row["accuracy"]) == {"value", "low", "high", "reason"}


def test_table_has_a_row_for_each_figure() -> None:
    table = measure(*sample(20, 2)).to_table()
    assert [(row["metric"], row["label"]) for row in table] == [
        *((name, "") for name in ("accuracy", "macro_f1", "average_precision", "log_loss", "calibration_error")),
        *((name, label) for label in "ab" for name in ("precision", "recall", "f1")),
    ]


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([0, 1, 2], "there are only 2 classes"),
        ([0, -1, 1], "there are only 2 classes"),
        ([0.0, 1.0, 1.0], "class indices"),
        ([0, 1], "2 items and 2 classes"),
    ],
)
def test_wrong_truth_is_named(truth: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(np.full((3, 2), 0.5), truth, ("a", "b"), np.random.default_rng(0))
