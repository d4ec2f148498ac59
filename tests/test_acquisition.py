"""Acquisition functions: values from the definitions, and the laws that selection relies on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from al_pipeline.active_learning.acquisition import (
    ACQUISITION,
    SAMPLE_ACQUISITION,
    bald,
    check_proba,
    check_samples,
    consensus_entropy,
    entropy,
    kl_disagreement,
    least_confidence,
    margin,
    score_bounds,
    vote_entropy,
)

DISAGREEMENTS = pytest.mark.parametrize("name", SAMPLE_ACQUISITION)
FUNCTIONS = pytest.mark.parametrize("function", ACQUISITION.values(), ids=ACQUISITION.keys())


@st.composite
def probabilities(draw: st.DrawFn, classes: tuple[int, int] = (2, 6)) -> np.ndarray:
    """(n, C) rows that sum to 1, exact zeros and equal entries among them."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(*classes)))
    counts = draw(arrays(np.int64, shape, elements=st.integers(0, 20))) + 0
    counts[counts.sum(axis=1) == 0, 0] = 1
    return counts / counts.sum(axis=1, keepdims=True)


def test_values_by_hand() -> None:
    proba = [[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.25, 0.5, 0.25]]
    assert least_confidence(proba) == pytest.approx([0.5, 0.0, 0.5])
    assert margin(proba) == pytest.approx([0.8, 0.0, 0.75])
    assert entropy(proba) == pytest.approx([1.0296530140645737, 0.0, 1.5 * np.log(2)])


def test_two_even_classes_at_the_top_have_the_highest_margin_score() -> None:
    assert margin([[0.4, 0.4, 0.2]]) == pytest.approx([1.0])


@FUNCTIONS
@given(probabilities())
@settings(max_examples=50, derandomize=True)
def test_bounds(function, proba: np.ndarray) -> None:
    """Never below a certain item's score, never above an undecided one's."""
    scores = function(proba)
    classes = proba.shape[1]
    assert (scores >= function(np.eye(1, classes))[0] - 1e-12).all()
    assert (scores <= function(np.full((1, classes), 1 / classes))[0] + 1e-12).all()


@FUNCTIONS
@given(probabilities(), st.randoms(use_true_random=False))
@settings(max_examples=50, derandomize=True)
def test_order_of_rows_and_columns_is_nothing(function, proba: np.ndarray, random) -> None:
    rows = random.sample(range(len(proba)), len(proba))
    columns = random.sample(range(proba.shape[1]), proba.shape[1])
    np.testing.assert_array_equal(function(proba)[rows], function(proba[rows][:, columns]))


@FUNCTIONS
@given(probabilities(), st.floats(0, 1))
@settings(max_examples=50, derandomize=True)
def test_moving_towards_the_even_distribution_never_lowers_the_score(function, proba: np.ndarray, step: float) -> None:
    closer = (1 - step) * proba + step / proba.shape[1]
    assert (function(closer) >= function(proba) - 1e-9).all()


@given(probabilities(classes=(2, 2)))
@settings(max_examples=100, derandomize=True)
def test_with_two_classes_all_rank_alike(proba: np.ndarray) -> None:
    proba[:, 1] = 1 - proba[:, 0]
    ranks = [np.unique(np.round(function(proba), 9), return_inverse=True)[1] for function in ACQUISITION.values()]
    for other in ranks[1:]:
        np.testing.assert_array_equal(ranks[0], other)


def test_with_three_classes_they_part() -> None:
    proba = np.array([[0.5, 0.5, 0.0], [0.45, 0.275, 0.275]])
    assert margin(proba).argmax() == 0
    assert entropy(proba).argmax() == least_confidence(proba).argmax() == 1


@FUNCTIONS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(function, bad: float) -> None:
    with pytest.raises(ValueError, match=r"row 2 .* not finite"):
        function([[0.5, 0.5], [1, 0], [bad, 0.5], [bad, bad]])


@FUNCTIONS
def test_logits_are_refused(function) -> None:
    with pytest.raises(ValueError, match=r"row 1 .* sum to 1"):
        function([[0.5, 0.5], [2.0, -1.0]])
    with pytest.raises(ValueError, match=r"row 0 .* sum to 1"):
        function([[0.5, 0.6]])


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2, 2)])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        check_proba(np.ones(shape))


@FUNCTIONS
def test_no_items_no_scores(function) -> None:
    assert function(np.empty((0, 3))).shape == (0,)


@FUNCTIONS
def test_float32_sums_are_good_enough(function) -> None:
    proba = np.random.default_rng(0).dirichlet(np.ones(50), 100).astype(np.float32)
    assert np.isfinite(function(proba)).all()


# What several models say --------------------------------------------------------------------------------------------
@st.composite
def samples(draw: st.DrawFn) -> np.ndarray:
    """(n, K, C), whose last axis sums to 1, exact zeros and equal models among them."""
    shape = (draw(st.integers(1, 8)), draw(st.integers(1, 5)), draw(st.integers(2, 5)))
    counts = draw(arrays(np.int64, shape, elements=st.integers(0, 9))) + 0
    counts[..., 0] += counts.sum(axis=2) == 0
    return counts / counts.sum(axis=2, keepdims=True)


def test_disagreement_by_hand() -> None:
    split = [[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]], [[0.75, 0.25], [0.25, 0.75]]]
    log2, unsure = np.log(2), entropy([[0.75, 0.25]])[0]
    assert vote_entropy(split) == pytest.approx([log2, 0, log2])
    assert consensus_entropy(split) == pytest.approx([log2, log2, log2])
    assert bald(split) == pytest.approx([log2, 0, log2 - unsure])
    assert kl_disagreement(split) == pytest.approx([log2, 0, 0.75 * np.log(1.5) + 0.25 * np.log(0.5)])


@given(samples())
@settings(max_examples=80, derandomize=True)
def test_bald_is_the_four_lines_of_its_definition_and_the_mean_divergence(given_: np.ndarray) -> None:
    """Mutual information of label and model: H(mean) - mean H, and the same as the mean KL from the mean."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = given_.mean(axis=1)
        total = -np.nansum(mean * np.log(mean), axis=1)
        own = -np.nansum(given_ * np.log(given_), axis=2).mean(axis=1)
    np.testing.assert_allclose(bald(given_), total - own, atol=1e-12)
    np.testing.assert_allclose(kl_disagreement(given_), bald(given_), atol=1e-12)
    np.testing.assert_allclose(consensus_entropy(given_) - own, bald(given_), atol=1e-12)


@DISAGREEMENTS
@given(samples())
@settings(max_examples=50, derandomize=True)
def test_disagreement_has_its_bounds_and_no_order_of_items_or_models(name: str, given_: np.ndarray) -> None:
    function, (_, models, classes) = SAMPLE_ACQUISITION[name], given_.shape
    low, high = score_bounds(name, classes, models)
    scores = function(given_)
    assert low == 0 and (scores >= 0).all() and (scores <= high + 1e-9).all()
    np.testing.assert_allclose(function(given_[:, ::-1]), scores, atol=1e-12)
    np.testing.assert_array_equal(function(given_[::-1]), scores[::-1])
    alone = function(given_[:, :1])
    assert alone == pytest.approx(entropy(given_[:, 0]) if name == "consensus_entropy" else 0)


@DISAGREEMENTS
def test_wrong_samples_are_named(name: str) -> None:
    function = SAMPLE_ACQUISITION[name]
    fine = np.full((3, 2, 2), 0.5)
    assert function(np.empty((0, 3, 2))).shape == (0,)
    for value, message in ((np.nan, "row 1 .* not finite"), (0.9, "row 1 .* sum to 1")):
        wrong = fine.copy()
        wrong[1, 1, 0] = value
        with pytest.raises(ValueError, match=message):
            function(wrong)
    for shape in ((2, 3), (2, 0, 3), (2, 3, 1)):
        with pytest.raises(ValueError, match="shape"):
            check_samples(np.ones(shape))


@pytest.mark.parametrize("name", ACQUISITION)
def test_bounds_of_scores_are_those_of_a_certain_and_an_undecided_item(name: str) -> None:
    function = ACQUISITION[name]
    assert score_bounds(name, 4) == pytest.approx([function(np.eye(1, 4))[0], function(np.full((1, 4), 0.25))[0]])
