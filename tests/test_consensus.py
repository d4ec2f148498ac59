"""The consensus of votes: labels, their confidence, and who is how often right."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from al_pipeline.annotation.consensus import METHODS, TIE, consensus, consensus_of
from al_pipeline.annotation.crowdlab import crowdlab
from al_pipeline.annotation.dawid_skene import ACCURACY
from al_pipeline.annotation.vote_arrays import Floats, Indices, VoteArrays, to_arrays
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.linear import fit_head
from al_pipeline.params import ConsensusName
from benchmarks.annotators import simulate

CLASSES = ("a", "b", "c")
ALL: tuple[ConsensusName, ...] = (*METHODS, "auto")

rows = st.lists(
    st.tuples(
        st.sampled_from(["i1", "i2", "i3", "i4"]), st.sampled_from(["p", "q", "r", "s"]), st.sampled_from(CLASSES)
    ),
    max_size=16,
    unique_by=lambda row: row[:2],
)


def crowd(
    accuracy: Sequence[float], classes: int = 3, items: int = 600, overlap: int = 2, seed: int = 0, sharp: float = 1.0
) -> tuple[VoteArrays, Indices, Floats]:
    """Votes, true classes, and the probabilities of a model: true ones, raised to the power `sharp`."""
    votes, truth = simulate(accuracy, classes, items, overlap, seed)
    draw = np.random.default_rng(seed + 1000)
    proba = draw.dirichlet(np.full(classes, 0.3), items)
    named = (draw.random((items, 1)) > proba.cumsum(axis=1)).sum(axis=1).clip(0, classes - 1)
    every = np.arange(items)
    proba[every, named], proba[every, truth] = proba[every, truth], proba[every, named].copy()
    proba = np.maximum(proba, 1e-6) ** sharp
    return votes.arrays, truth, proba / proba.sum(axis=1, keepdims=True)


def ids(count: int) -> list[str]:
    return [f"i{number:06d}" for number in range(count)]


@given(rows=rows, order=st.randoms(), method=st.sampled_from(ALL), with_model=st.booleans())
def test_the_order_of_the_votes_changes_nothing(
    rows: list[tuple[str, str, str]], order: Any, method: ConsensusName, with_model: bool
) -> None:
    proba = {"i1": [0.7, 0.2, 0.1], "i3": [0.1, 0.1, 0.8], "i9": [1.0, 0.0, 0.0]} if with_model else None
    found = consensus(rows, CLASSES, method, proba)
    mixed = list(rows)
    order.shuffle(mixed)
    again = consensus(mixed, CLASSES, method, proba)
    assert found.items == again.items and found.annotators == again.annotators and found.method == again.method
    for one, other in zip(found, again, strict=True):
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            assert one.tobytes() == other.tobytes()
    assert np.isfinite(found.posteriors).all() and ((found.confidence > 0) & (found.confidence <= 1)).all()
    assert ((found.quality >= 0) & (found.quality <= 1)).all()
    np.testing.assert_allclose(found.posteriors.sum(axis=1), 1)


@given(rows=rows)
def test_majority_is_the_class_with_the_most_votes(rows: list[tuple[str, str, str]]) -> None:
    found = consensus(rows, CLASSES, "majority")
    for place, item in enumerate(found.items):
        counts = Counter(row[2] for row in rows if row[0] == item).most_common()
        tied = len(counts) > 1 and counts[0][1] == counts[1][1]
        assert found.of(place)[0] == (None if tied else counts[0][0])


@pytest.mark.parametrize("method", ALL)
def test_a_single_vote_is_believed_as_much_as_somebody_unknown(method: ConsensusName) -> None:
    found = consensus([("i", "p", "a")], ("a", "b"), method)
    assert found.of(0) == ("a", pytest.approx(ACCURACY, abs=0.08))
    assert found.quality == pytest.approx([ACCURACY], abs=0.08)


@pytest.mark.parametrize("method", METHODS)
def test_of_two_people_who_differ_neither_is_right(method: ConsensusName) -> None:
    rows = [(f"i{n}", who, "ab"[(n + (who == "q" and n < 10)) % 2]) for n in range(40) for who in "pq"]
    found = consensus(rows, ("a", "b"), method)
    assert found.quality[0] == pytest.approx(found.quality[1], abs=1e-9)
    differ = [place for place, item in enumerate(found.items) if int(item[1:]) < 10]
    assert (found.label[differ] == TIE).all() or found.confidence[differ].max() < 0.6


def test_nothing_gives_nothing() -> None:
    for method in ALL:
        found = consensus([], CLASSES, method)
        assert found.items == () and len(found.label) == 0 and len(found.quality) == 0
    alone = consensus_of(to_arrays([("i1", "p", "a")], ("a", "b"), ["i1", "i2"])[0], ["i1", "i2"], "dawid_skene")
    assert alone.of(1)[0] is None


def test_two_votes_of_one_person_and_unknown_classes_are_errors() -> None:
    with pytest.raises(ValueError, match="two votes on one item"):
        consensus([("i", "p", "a"), ("i", "p", "b")], CLASSES)
    with pytest.raises(ValueError, match="'z'"):
        consensus([("i", "p", "z")], CLASSES)


@pytest.mark.parametrize("method", ["dawid_skene", "auto"])
def test_careful_people_outweigh_careless_ones(method: ConsensusName) -> None:
    votes, truth, _ = crowd([0.97, 0.95, 0.55, 0.5, 0.5], items=800, overlap=3)
    found = consensus_of(votes, ids(800), method)
    plain = consensus_of(votes, ids(800), "majority")
    assert (found.label == truth).mean() > (plain.label == truth).mean() + 0.03
    assert found.quality == pytest.approx([0.97, 0.95, 0.55, 0.5, 0.5], abs=0.08)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharp", [0.5, 1.0, 2.0])
def test_confidence_is_the_share_that_is_right(method: ConsensusName, sharp: float) -> None:
    votes, truth, model = crowd([0.9, 0.85, 0.8, 0.75, 0.7], items=3000, overlap=2, sharp=sharp)
    found = consensus_of(votes, ids(3000), method, model)
    for low, high in ((0.4, 0.8), (0.8, 0.95), (0.95, 1.0)):
        these = (found.label != TIE) & (found.confidence > low) & (found.confidence <= high)
        if these.sum() > 100:
            assert found.confidence[these].mean() == pytest.approx((found.label == truth)[these].mean(), abs=0.05)


def test_two_votes_and_the_model_are_no_worse_than_three_votes() -> None:
    three, truth, model = crowd([0.85] * 6, items=3000, overlap=3)
    two = three.where(np.arange(len(three.item)) % 3 != 2)
    plain = consensus_of(three, ids(3000), "majority")
    found = consensus_of(two, ids(3000), "auto", model)
    assert (found.label == truth).mean() >= (plain.label == truth).mean() - 0.005


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["majority", "dawid_skene"])
def test_who_is_asked_again_may_depend_on_the_first_answer(method: ConsensusName, seed: int) -> None:
    """With adaptive overlap, shared items are those whose first answers were doubted, by person and by class."""
    accuracy = [0.72, 0.83, 0.91, 0.75, 0.95, 0.77]
    three, truth, _ = crowd(accuracy, 2, 450, 3, seed)
    place = np.random.default_rng(seed).permuted(np.tile(np.arange(3), (450, 1)), axis=1).ravel()
    counts = np.zeros(450, np.int64)
    for size in range(50, 451, 100):
        counts[:size] = np.maximum(counts[:size], 1)
        for _ in range(3):
            votes = three.where(place < counts[three.item])
            found = consensus_of(votes, ids(450), method)
            more = (found.confidence < 0.9) & (counts < 3) & (counts > 0) & (np.arange(450) >= size - 100)
            counts += more
    right = found.label == truth
    assert right.mean() > 0.86 and found.confidence.mean() == pytest.approx(right.mean(), abs=0.07)
    if method == "dawid_skene":
        assert found.quality == pytest.approx(accuracy, abs=0.2)


def test_a_hundred_thousand_votes_take_seconds() -> None:
    votes, truth, model = crowd(np.linspace(0.7, 0.95, 20).tolist(), 5, 33_334, 3)
    for method in METHODS:
        before = time.process_time()
        found = consensus_of(votes, ids(33_334), method, model)
        assert time.process_time() - before < 8 and (found.label == truth).mean() > 0.9


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_count_as_far_as_they_are_sure(classes: int) -> None:
    draw = np.random.default_rng(0)
    dense = draw.normal(size=(40, 6)).astype(np.float32)
    names = [str(number) for number in range(classes)]
    labels = [names[number % classes] for number in range(40)]
    plain = fit_head(FeatureMatrix(dense), labels, names, 0, calibrate=True)
    equal = fit_head(FeatureMatrix(dense), labels, names, 0, calibrate=True, weights=np.full(40, 0.7))
    proba = plain.predict_proba(FeatureMatrix(dense))
    np.testing.assert_allclose(equal.predict_proba(FeatureMatrix(dense)), proba, atol=1e-6)
    weights = np.where(np.arange(40) < 20, 1.0, 1e-9)
    half = fit_head(FeatureMatrix(dense), labels, names, 0, calibrate=False, weights=weights)
    alone = fit_head(FeatureMatrix(dense[:20]), labels[:20], names, 0, calibrate=False, strength=6.0)
    found = half.predict_proba(FeatureMatrix(dense)) - alone.predict_proba(FeatureMatrix(dense))
    assert np.abs(found).max() < 0.05, "twice the weight of half of the labels"


# Other libraries -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_cleanlab_has_the_same_posteriors() -> None:
    reason = "!! NOT TESTED: cleanlab is not installed; `make setup` installs it"
    multiannotator = pytest.importorskip("cleanlab.multiannotator", reason=reason)
    votes, _, model = crowd([0.95, 0.8, 0.7, 0.6], items=300, overlap=3)
    kept = votes.where((votes.item % 3 != 0) | (np.arange(len(votes.item)) % 3 == 0))
    table = np.full((300, 4), np.nan)
    table[kept.item, kept.annotator] = kept.label
    theirs = multiannotator.get_label_quality_multiannotator(
        table, model, consensus_method="majority_vote", return_weights=True, verbose=False
    )
    ours = crowdlab(kept, 300, model)
    assert ours.model_weight == pytest.approx(theirs["model_weight"])
    np.testing.assert_allclose(ours.weights, theirs["annotator_weight"])
    quality = theirs["label_quality"]
    label = quality["consensus_label"].to_numpy()
    np.testing.assert_allclose(ours.posteriors[np.arange(300), label], quality["consensus_quality_score"].to_numpy())
