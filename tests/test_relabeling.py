"""Labels that are asked again: the probability that a label is wrong, and the batch that asks for another answer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import SeedSequence

from al_pipeline.active_learning.batch import next_batch
from al_pipeline.active_learning.choice import QueryConfig
from al_pipeline.active_learning.relabeling import (
    AUTO_SHARE,
    WRONG,
    Labeled,
    doubtful,
    label_risks,
    most_asked_again,
    spread,
)
from al_pipeline.active_learning.shortlist import Shortlist
from al_pipeline.annotation.aggregation import MAX_ASKED, MAX_RELABELED, fold, most_asked
from al_pipeline.annotation.answered import answered_items
from al_pipeline.annotation.votes import times_asked
from al_pipeline.errors import BadParams
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.held_out import tempered_held_out_proba
from al_pipeline.params import parse_params, recorded
from al_pipeline.records import RANDOM_SLICE, RELABEL, Event, LabelIntervention, Query, Selection
from al_pipeline.workspace.trust import template

SEED = SeedSequence(3)


def distributions(items: int, classes: int) -> st.SearchStrategy[np.ndarray]:
    rows = st.lists(st.floats(0.01, 1), min_size=classes, max_size=classes)
    return st.lists(rows, min_size=items, max_size=items).map(
        lambda found: np.array(found) / np.array(found).sum(axis=1, keepdims=True)
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    items, classes = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    counts = st.lists(st.integers(0, 3), min_size=classes, max_size=classes)
    answers = np.array(draw(st.lists(counts, min_size=items, max_size=items)))
    labels = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=items, max_size=items)))
    return answers, draw(distributions(items, classes)), labels


# The probability ----------------------------------------------------------------------------------------------------
@given(cases())
def test_risks_are_probabilities_and_follow_the_order_of_the_items(case: tuple) -> None:
    answers, proba, labels = case
    found = label_risks(answers, proba, labels)
    assert ((found.wrong >= 0) & (found.wrong <= 1)).all() and 0.5 <= found.accuracy <= 0.995
    order = np.random.default_rng(0).permutation(len(labels))
    moved = label_risks(answers[order], proba[order], labels[order])
    assert moved.wrong == pytest.approx(found.wrong[order], abs=1e-9)
    assert moved.accuracy == pytest.approx(found.accuracy, abs=1e-9)


@given(cases())
def test_the_names_of_classes_do_not_matter(case: tuple) -> None:
    answers, proba, labels = case
    turned = (labels + 1) % answers.shape[1]
    moved = label_risks(np.roll(answers, 1, axis=1), np.roll(proba, 1, axis=1), turned)
    assert moved.wrong == pytest.approx(label_risks(answers, proba, labels).wrong, abs=1e-9)


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(1, 3), st.floats(0.02, 0.6))
def test_a_label_is_safer_the_more_people_gave_it_and_the_more_the_model_agrees(
    classes: int, people: int, share: float
) -> None:
    """In a company of many answers, so that one item's hardly change the estimated accuracy."""
    others = np.tile(np.eye(classes) * 2, (40, 1))
    flat = np.full((len(others), classes), 1 / classes)
    own = np.arange(len(others)) % classes

    def risk(count: int, certainty: float) -> float:
        answers = np.vstack([others, np.eye(classes)[0] * count])
        row = np.full(classes, (1 - certainty) / (classes - 1))
        row[0] = certainty
        return float(label_risks(answers, np.vstack([flat, row]), [*own, 0]).wrong[-1])

    assert risk(people + 1, share) < risk(people, share)
    assert risk(people, share + 0.3) < risk(people, share)


def test_by_hand_one_answer_against_a_sure_model() -> None:
    """a = 0.8 in the first step: 0.8 * 0.1 against 0.2 * 0.9, so that the label is wrong with 0.18 / 0.26."""
    many = np.tile([[8, 2], [2, 8]], (200, 1))  # keeps the estimate at 0.8
    flat = np.full((400, 2), 0.5)
    found = label_risks(np.vstack([many, [1, 0]]), np.vstack([flat, [0.1, 0.9]]), [0, 1] * 200 + [0])
    assert found.accuracy == pytest.approx(0.8, abs=0.005)
    assert found.wrong[-1] == pytest.approx(0.18 / 0.26, abs=0.01)


@pytest.mark.parametrize("accuracy", [0.65, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_accuracy_of_people_is_found(accuracy: float, classes: int) -> None:
    rng = np.random.default_rng(5)
    truth = rng.integers(classes, size=600)
    proba = np.full((600, classes), 0.3 / (classes - 1))
    predicted = np.where(rng.random(600) < 0.7, truth, (truth + rng.integers(1, classes, 600)) % classes)
    proba[np.arange(600), predicted] = 0.7
    answers = np.zeros((600, classes))
    for _ in range(2):
        wrong = rng.random(600) >= accuracy
        answers[np.arange(600), (truth + wrong * rng.integers(1, classes, 600)) % classes] += 1
    assert label_risks(answers, proba, answers.argmax(axis=1)).accuracy == pytest.approx(accuracy, abs=0.06)


def test_the_estimate_is_no_worse_where_only_doubtful_items_were_asked_again() -> None:
    """What was asked again depends on what is known, so the likelihood needs no correction for it."""
    rng = np.random.default_rng(1)
    truth = rng.integers(3, size=900)
    proba = rng.dirichlet(np.ones(3), 900)
    truth = np.array([rng.choice(3, p=row) for row in proba])
    answers = np.zeros((900, 3))

    def ask(rows: np.ndarray) -> np.ndarray:
        wrong = rng.random(len(rows)) < 0.25
        given = (truth[rows] + wrong * rng.integers(1, 3, len(rows))) % 3
        answers[rows, given] += 1
        return given

    labels = ask(np.arange(900))
    risks = label_risks(answers, proba, labels)
    ask(np.argsort(-risks.wrong)[:300])
    assert label_risks(answers, proba, answers.argmax(axis=1)).accuracy == pytest.approx(0.75, abs=0.04)
    wrong = answers.argmax(axis=1) != truth
    found = label_risks(answers, proba, answers.argmax(axis=1)).wrong
    assert found.mean() == pytest.approx(wrong.mean(), abs=0.03), "calibrated on the whole"
    assert found[wrong].mean() > found[~wrong].mean() + 0.2


def test_people_who_agree_where_they_were_doubted_are_doubted_less() -> None:
    """Two people, two classes: a model that is wrong in 10 of 60 items, and second answers to these alone."""
    proba = np.tile([0.6, 0.4], (60, 1))
    proba[:10] = [0.1, 0.9]
    labels = np.zeros(60, int)
    once = np.tile([1.0, 0.0], (60, 1))
    agreed, apart = once.copy(), once.copy()
    agreed[:8, 0] += 1
    apart[:8, 1] += 1
    before, after, contradicted = (label_risks(answers, proba, labels).wrong[9] for answers in (once, agreed, apart))
    assert before > WRONG > after, "nothing like it is asked again"
    assert contradicted > 0.95 * before


@pytest.mark.parametrize(
    ("answers", "proba", "labels", "message"),
    [
        ([[1, 0]], [[0.5, 0.5], [0.5, 0.5]], [0], "do not match"),
        ([[1, 0]], [[0.5, 0.6]], [0], "sum to 1"),
        ([[1, 0]], [[0.5, 0.5]], [2], "classes from 0 to 1"),
        ([[-1, 0]], [[0.5, 0.5]], [0], "not negative"),
        ([[np.nan, 0]], [[0.5, 0.5]], [0], "finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(answers: list, proba: list, labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_risks(answers, proba, labels)


# The choice ---------------------------------------------------------------------------------------------------------
def labelled(wrong: list[bool], open_: list[bool] | None = None) -> tuple[Labeled, np.ndarray]:
    """Items of one answer each, that the model contradicts where `wrong`."""
    proba = np.array([[0.05, 0.95] if one else [0.95, 0.05] for one in wrong])
    ids = [f"item-{number}" for number in range(len(wrong))]
    return Labeled(ids, [[1, 0]] * len(wrong), [0] * len(wrong), open_ or [True] * len(wrong)), proba


def test_only_doubtful_items_that_somebody_is_left_for_are_asked_again_and_never_too_many() -> None:
    known, proba = labelled([True, False] * 10, [True] * 18 + [False] * 2)  # 10 labels for each class
    found = doubtful(known, proba, 0.25, 20, SEED)
    assert len(found) == 5 and {name for name, _ in found} < {f"item-{number}" for number in range(0, 18, 2)}
    assert all(risk >= WRONG for _, risk in found)
    assert len(doubtful(known, proba, 1.0, 20, SEED)) == 9
    assert len(doubtful(known, proba, "auto", 10, SEED)) == 5
    assert doubtful(known, proba, 0.0, 20, SEED) == []
    assert doubtful(*labelled([False] * 4), 1.0, 20, SEED) == []


def test_the_order_of_the_items_does_not_matter() -> None:
    known, proba = labelled([True] * 12)
    turned = Labeled(known.ids[::-1], known.answers, known.labels, known.open)
    assert doubtful(known, proba, 0.5, 10, SEED) == doubtful(turned, proba, 0.5, 10, SEED)


@pytest.mark.parametrize(
    ("relabel", "size", "most"), [(0, 40, 0), (0.1, 40, 4), (0.5, 3, 2), (1, 7, 7), ("auto", 40, 20)]
)
def test_a_share_is_rounded_half_up(relabel: float, size: int, most: int) -> None:
    assert most_asked_again(relabel, size, 40, 4) == most and AUTO_SHARE == 0.5
    with pytest.raises(ValueError, match="between 0 and 1"):
        most_asked_again(1.5, size, 40, 4)


def test_auto_asks_little_again_while_classes_have_few_labels() -> None:
    assert [most_asked_again("auto", 40, labels, 20) for labels in (40, 100, 200, 400)] == [4, 10, 20, 20]


def test_two_lists_are_spread_evenly() -> None:
    def queries(name: str, count: int) -> list[Query]:
        return [Query(f"{name}{number}", number, 0.0, name, 1.0) for number in range(count)]

    found = [query.item_id for query in spread(queries("a", 6), queries("b", 2))]
    assert [name for name in found if name[0] == "a"] == [f"a{number}" for number in range(6)]
    assert Counter(name[0] for name in found[:4]) == {"a": 3, "b": 1}


# The batch ----------------------------------------------------------------------------------------------------------
def batch(relabel: float | str, doubted: list[tuple[str, float]], **other) -> list[Query]:
    ids = [f"new-{number:02d}" for number in range(60)]
    labels = {f"item-{number}": "ab"[number % 2] for number in range(10)}
    scored = Shortlist(ids, np.linspace(1, 0, 60), np.tile([0.5, 0.5], (60, 1)))
    config = QueryConfig(1, 20, "margin", 20, 0.1, 100, relabel=relabel)
    queries, _ = next_batch(config, 2, ids, scored, labels, ["a", "b"], None, doubted=doubted, **other)
    return queries


DOUBTED = [(f"item-{number}", 0.9 - number / 100) for number in range(10)]


def test_without_the_setting_or_a_doubt_the_batch_is_that_of_before() -> None:
    plain = batch(0.0, [])
    assert batch(0.0, DOUBTED) == plain == batch("auto", [])


def test_doubted_items_take_places_of_the_strategy_and_leave_the_random_slice_alone() -> None:
    plain, found = batch(0.0, []), batch(0.25, DOUBTED)
    again = [query for query in found if query.strategy == RELABEL]
    assert [(query.item_id, query.score) for query in again] == DOUBTED[:5] and {q.probability for q in again} == {1.0}
    assert [query.rank for query in found] == list(range(20))
    drawn = [{query for query in queries if query.strategy == RANDOM_SLICE} for queries in (plain, found)]
    assert len(drawn[0]) == len(drawn[1]) == 2
    assert {(q.item_id, q.probability) for q in drawn[0]} == {(q.item_id, q.probability) for q in drawn[1]}
    picked = [query.item_id for query in found if query.strategy == "margin"]
    assert (
        picked == [query.item_id for query in plain if query.strategy == "margin"][: len(picked)] and len(picked) == 13
    )
    assert {query.strategy for query in found[:8]} >= {RELABEL, "margin"}, "a partly answered round has both"


def test_requests_and_ties_come_before_doubts() -> None:
    found = batch(1.0, DOUBTED, requested=["new-50"], first=["new-40", "new-41"])
    assert [query.item_id for query in found[:3]] == ["new-50", "new-40", "new-41"]
    assert len(found) == 20 and sum(query.strategy == RELABEL for query in found) == 10
    assert sum(query.strategy == RANDOM_SLICE for query in found) == 2


# The answers --------------------------------------------------------------------------------------------------------
def said(
    who: str, label: str | None, item: str = "a", at: int = 0, kind: str | None = None, part: str = "pool"
) -> Event:
    kind = kind or ("skip" if label is None else "label")
    key = f"ws:{at:04d}:{item}#{who}"
    return Event(f"{kind} {key} {label}", kind, item, "hash", part, at, key, who, label)  # type: ignore[arg-type]


def test_who_may_be_asked_is_somebody_who_has_not_voted() -> None:
    events = [
        said("ann", "ham"),
        said("bob", "ham", "b"),
        said("ann", "spam", "b"),
        said("ann", "ham", "t", part="test"),
    ]
    found = answered_items(events, ["ham", "spam"], 5)
    assert {item: (dict(one.votes), one.open) for item, one in found.items()} == {
        "a": ({"ham": 1}, True),
        "b": ({"ham": 1, "spam": 1}, False),
    }
    assert answered_items(events, ["ham", "spam"], 5, everybody=3)["b"].open
    assert not answered_items(events, ["ham", "spam"], 1)["a"].open, "asked in as many rounds as are allowed"
    alone = [said("ann", "ham"), said("ann", "spam", "b")]
    assert not any(one.open for one in answered_items(alone, ["ham", "spam"], 5).values())


def test_a_skip_is_a_vote_and_a_second_answer_of_one_person_replaces_the_first() -> None:
    skipped = [said("ann", "ham"), said("bob", None)]
    assert not answered_items(skipped, ["ham", "spam"], 5)["a"].open
    changed = [said("ann", "ham"), said("ann", "spam", at=1), said("bob", "ham", "b")]
    found = answered_items(changed, ["ham", "spam"], 5)["a"]
    assert (dict(found.votes), found.open) == ({"spam": 1}, True)


@pytest.mark.parametrize("kind", ["adjudicate", "gold"])
def test_what_is_settled_imported_or_revoked_is_not_asked_again(kind: str) -> None:
    settled = [said("ann", "ham"), said("eve", "spam", kind=kind)]
    imported = [said("import", "ham", "i", kind="import"), said("bob", "ham", "b")]
    assert answered_items([*settled, *imported], ["ham", "spam"], 5).keys() == {"b"}
    told = Event(
        "q", "quarantine", "", "", "pool", 1, "ruling:1", "eve",
        intervention=LabelIntervention("revoke", selection=Selection(annotator="bob")),
    )  # fmt: skip
    assert answered_items([*imported, told], ["ham", "spam"], 5) == {}


def test_two_people_who_differ_are_not_given_up_where_labels_are_asked_again() -> None:
    """One answer in each of two rounds is a tie that nobody was asked about yet."""
    events = [said("ann", "ham"), said("bob", "spam", at=1)]
    asked = times_asked(events)
    assert [row.kind for row in fold(events, ["ham", "spam"], 9, asked).unresolved] == ["ignored"]
    [row] = fold(events, ["ham", "spam"], 9, asked, most_asked=most_asked(True)).unresolved
    assert row.kind == "tie"
    assert (most_asked(False), most_asked(True)) == (MAX_ASKED, MAX_RELABELED)


# The model ----------------------------------------------------------------------------------------------------------
def test_held_out_probabilities_contradict_planted_errors() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(80) % 2
    dense = rng.normal(size=(80, 6)) / 2 + 3 * np.eye(6)[truth]
    features = FeatureMatrix((dense / np.linalg.norm(dense, axis=1, keepdims=True)).astype(np.float32))
    labels = [("ham", "spam")[one] for one in truth]
    labels[3], labels[10] = "ham", "spam"
    for classifier in ("head", "centroid"):
        proba = tempered_held_out_proba(features, labels, ("ham", "spam", "eggs"), 1, classifier)
        assert proba is not None and proba.shape == (80, 3) and proba.sum(axis=1) == pytest.approx(np.ones(80))
        own = proba[np.arange(80), [("ham", "spam").index(label) for label in labels]]
        assert set(np.argsort(own)[:2]) == {3, 10}
        again = tempered_held_out_proba(features, labels, ("ham", "spam", "eggs"), 1, classifier)
        assert again is not None and again.tobytes() == proba.tobytes()
    assert tempered_held_out_proba(features.rows(np.arange(12)), labels[:12], ("ham", "spam"), 1) is None
    assert tempered_held_out_proba(features, ["ham"] * 80, ("ham", "spam"), 1) is None
    alone = tempered_held_out_proba(features, ["eggs", *labels[1:]], ("ham", "spam", "eggs"), 1)
    assert alone is not None and alone[0] == pytest.approx([1 / 3] * 3), "no other label of its class"


# The setting --------------------------------------------------------------------------------------------------------
def test_a_rounds_record_names_the_setting_only_where_it_is_used() -> None:
    text = template("params.yaml")
    plain, used = parse_params(text), parse_params(text.replace("relabel: 0 ", "relabel: auto "))
    assert plain.select.relabel == 0 and "relabel" not in recorded(plain)["select"]
    assert used.select.relabel == "auto" == recorded(used)["select"]["relabel"]
    for wrong in ("2", "often", "-0.1"):
        with pytest.raises(BadParams, match=r"select.relabel: .* number, 0 to 1 or 'auto' alone"):
            parse_params(text.replace("relabel: 0 ", f"relabel: {wrong} "))
