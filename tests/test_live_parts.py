"""The parts of live rounds: the model that is updated, the next question, the size of the queue, the plan on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from annotating import planned
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.active_learning.acquisition import margin
from al_pipeline.errors import Locked, UnexpectedChange
from al_pipeline.live.asker import Asker
from al_pipeline.live.model import BLOCK, SHORTLIST, LiveModel, Scores
from al_pipeline.live.plan import append, is_running, knowledge, remember_size, remembered_size, running
from al_pipeline.live.pool import LivePool
from al_pipeline.live.queue import draw, is_fixed, next_slot, pick
from al_pipeline.live.queue_size import AtWork, adapted, at_work, buffer_size, missing, wanted_open
from al_pipeline.models.linear import STRENGTH
from al_pipeline.models.softmax import fit_softmax
from al_pipeline.records import NOT_ASKED, RANDOM_SLICE
from al_pipeline.rounds.manifests import LiveQuestion, parse_live, tasks_of_live
from al_pipeline.workspace.layout import Layout

CLASSES = ("a", "b", "c")


def clusters(count: int, classes: int = 3, width: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unit length around a centre for each class, and the class of each."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=count)
    rows = rng.normal(size=(classes, width))[truth] + 0.7 * rng.normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), truth


def question(number: int, item: str, kind: str = "chosen", **task: object) -> LiveQuestion:
    made = replace(planned("w", number, item), **task)  # type: ignore[arg-type]
    return LiveQuestion(made, kind, "0123456789abcdef", 7, "0123456789abcdef", 1.5)  # type: ignore[arg-type]


def test_an_updated_model_is_nearly_that_of_a_fit_from_nothing() -> None:
    rows, truth = clusters(400)
    model = LiveModel(rows, CLASSES)
    for count in (2, 3, 10, 50, 51, 52, 60):
        assert model.learn({row: CLASSES[truth[row]] for row in range(count)})
    assert not model.learn({row: CLASSES[truth[row]] for row in range(60)}), "the same labels"
    weights, bias = fit_softmax([rows[:60]], truth[:60].astype(np.intp), 3, STRENGTH)
    logits = rows @ weights[0] + bias
    exact = np.exp(logits - logits.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    assert np.abs(margin(model.proba(np.arange(400))) - margin(exact)).max() < 1e-3


def test_with_many_labels_an_update_fits_the_newest_and_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MOST_FITTED": 60, "NEWEST_FITTED": 20, "LEAST_OF_CLASS": 3}.items():
        monkeypatch.setattr(f"al_pipeline.live.model.{name}", value)
    rows, truth = clusters(600)
    labels = {row: "a" if row == 7 else "bc"[truth[row] % 2] for row in range(300)}
    model, whole = LiveModel(rows, CLASSES), LiveModel(rows, CLASSES)
    for count in range(100, 301, 20):
        model.learn(dict(list(labels.items())[:count]))
    assert model.labels == 300 and sum(model.counts.values()) == 300 and model.counts["a"] == 1
    assert {7, *range(280, 300)} <= set(model._rows) and len(model._rows) <= 60 + 2 * 3
    monkeypatch.setattr("al_pipeline.live.model.MOST_FITTED", 1000)
    whole.learn(labels)
    assert len(whole._rows) == 300
    some, all_ = (one.proba(np.arange(300, 600)).argmax(axis=1) for one in (model, whole))
    assert (some == all_).mean() > 0.85


def test_labels_may_change_and_go_and_classes_come() -> None:
    rows, _ = clusters(30)
    model = LiveModel(rows, CLASSES)
    digests = []
    for labels in ({}, {0: "b"}, {0: "b", 1: "a"}, {0: "b", 1: "c"}, {0: "a", 1: "c", 9: "b"}, {1: "c"}, {}):
        model.learn(labels)
        digests.append(model.digest)
        proba = model.proba(np.arange(30))
        assert proba.shape == (30, 3) and np.allclose(proba.sum(axis=1), 1)
        assert model.is_trained == (len(set(labels.values())) > 1) and model.labels == len(labels)
    assert len(set(digests)) == len(digests) - 1, "equal labels, equal models; without any at both ends"
    again = LiveModel(rows, CLASSES)
    again.learn({})
    assert again.digest == digests[-1]


def test_scores_are_the_newest_in_the_end_and_the_likeliest_at_once() -> None:
    count = 3 * BLOCK + 5
    rows, truth = clusters(count, width=4)
    model = LiveModel(rows, CLASSES)
    model.learn({row: CLASSES[truth[row]] for row in range(20)})
    scores = Scores(model, count, "margin", np.random.default_rng(0))
    scores.refresh(np.ones(count, np.bool_))
    while scores.go_on():
        pass
    assert np.allclose(scores.values, margin(model.proba(np.arange(count))))
    model.learn({row: CLASSES[truth[row]] for row in range(40)})
    now = margin(model.proba(np.arange(count)))
    fresh = scores.refresh(np.ones(count, np.bool_))
    assert len(fresh) <= 2 * SHORTLIST and np.allclose(scores.values[fresh], now[fresh])
    assert now[fresh].max() > np.sort(now)[-50], "among the best fifty of the pool, without a pass over it"
    assert scores.left == count


def test_the_next_question_is_unlike_those_just_asked() -> None:
    rows = np.array([[1, 0], [1, 0.01], [0, 1], [1, 0]], np.float32)
    scores, free = np.array([0.9, 0.8, 0.3, 1.0]), np.array([True, True, True, False])
    assert pick(scores, free, rows, [], 0.9) == 0
    assert pick(scores, free, rows, [3], 0.9) == 2
    assert pick(scores, free, rows, [3], 1.0) == 0
    assert pick(scores, free, rows, [3, 2], 0.9) == 0, "all are alike: the best"
    assert pick(scores, np.zeros(4, np.bool_), rows, [], 0.9) is None
    assert draw(np.array([False, True, False]), np.random.default_rng(0)) == 1


def test_a_live_round_asks_in_the_pattern_of_its_batch() -> None:
    scored = {"predicted": "ham", "confidence": 0.5}
    batch = [
        planned("w", 1, "t", "test"),
        replace(planned("w", 1, "a"), **scored),
        replace(planned("w", 1, "r"), strategy=RANDOM_SLICE, **scored),
        replace(planned("w", 1, "s"), strategy="ask_again", **scored),
        planned("w", 1, "seed"),
    ]
    assert [is_fixed(task) for task in batch] == [True, False, False, True, True]
    rng, asked, kinds = np.random.default_rng(0), [], []
    for place in range(7):
        kind, task = next_slot(batch, asked, 0.0, rng)
        kinds.append(kind)
        asked.append(task.push_key if task else f"live-{place}")
    assert kinds == ["planned", "chosen", "random", "planned", "planned", "chosen", "chosen"]
    assert next_slot(batch, asked, 1.0, rng)[0] == "random"
    other_order = [task.push_key for task in (batch[0], batch[3])]
    assert next_slot(batch, [*other_order, "x", "y", "z"], 0.0, rng) == ("planned", batch[4])


@given(
    st.dictionaries(st.sampled_from("abcde"), st.floats(0, 90_000)),
    st.sets(st.integers(0, 20)),
    st.dictionaries(st.sampled_from("abcde"), st.sets(st.integers(0, 20))),
    st.integers(1, 4),
)
def test_everybody_at_work_finds_enough_questions(
    seen: dict[str, float], tasks: set[int], answered: dict[str, set[int]], least: int
) -> None:
    people = at_work(seen, 100_000, away_minutes=300)
    keys = {str(task) for task in tasks}
    by = {who: {str(task) for task in own} for who, own in answered.items()}
    new = {f"new {number}" for number in range(missing(keys, by, people, least))}
    for who in people.present:
        free = len((keys | new) - by.get(who, set())) - len(people.away)
        assert free >= max(least, len(people.present)) + 2
    assert len(keys | new) <= max(len(keys), wanted_open(people, least) + max(map(len, by.values()), default=0))


def test_a_queue_that_may_have_run_empty_gets_longer_for_a_while() -> None:
    ten = AtWork(tuple(f"p{number}" for number in range(10)), ())
    assert adapted(0, 11, 10, 4.0) == 0 and adapted(0, 10, 10, 0.9) == 0
    extra = adapted(adapted(0, 10, 10, 4.0), 8, 10, 4.0)
    assert extra == 4 and wanted_open(ten, 1, 4.0, extra) == wanted_open(ten, 1, 4.0) + 4
    assert missing(["a"] * 20, {}, ten, 1, 4.0, extra) == missing(["a"] * 20, {}, ten, 1, 4.0) + 2
    assert 0 < adapted(extra, 15, 10, 4.0) < extra and adapted(19.5, 0, 10, 4.0) == 20


def test_who_is_at_work() -> None:
    assert at_work({"ann": 990.0, "bob": 0.0, "eve": -90_000.0}, 1000.0, 5) == AtWork(("ann",), ("bob",))
    assert buffer_size(2.0, 10.0) == 30 and buffer_size(0, 10) == 0 and buffer_size(100, 1000) == 500


def test_a_plan_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rounds/0001/live.jsonl"
    append(path, [question(1, "a"), question(1, "b", "random")])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"task": {"item')
    text = path.read_text("utf-8")
    assert [one.task.item_id for one in parse_live(text, 1)] == ["a", "b"]
    append(path, [question(1, "c", "planned")])
    found = parse_live(path.read_text("utf-8"), 1)
    assert found == (question(1, "a"), question(1, "b", "random"), question(1, "c", "planned"))
    for bad in ("{}\n", text.split("\n")[0] + "\n" + text.split("\n")[0] + "\n", question(2, "a").to_line()):
        with pytest.raises(UnexpectedChange, match=r"rounds/0001/live.jsonl:\d"):
            parse_live(bad, 1)


def test_tasks_of_a_batch_that_were_not_asked_are_marked() -> None:
    batch = [planned("w", 1, "a"), planned("w", 1, "b")]
    asked = [question(1, "b", strategy="random_slice"), question(1, "c")]
    assert [(one.item_id, one.strategy) for one in tasks_of_live(batch, asked)] == [
        ("a", NOT_ASKED), ("b", "random_slice"), ("c", "margin"),
    ]  # fmt: skip


def test_one_process_asks_at_a_time(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert not is_running(layout) and remembered_size(layout) == 3
    with running(layout):
        assert is_running(layout)
        with pytest.raises(Locked, match="runs already"), running(layout):
            pass
        remember_size(layout, 7)
    assert not is_running(layout) and remembered_size(layout) == 7
    assert knowledge([]) == (0, knowledge([])[1])


def test_an_asker_never_asks_twice_nor_what_is_closed() -> None:
    rows, truth = clusters(40)
    ids = tuple(f"item-{row}" for row in range(40))
    pool = LivePool(ids, tuple(f"hash-{one}" for one in ids), rows, {one: row for row, one in enumerate(ids)})
    asker = Asker(pool, CLASSES, "auto", 1, 0.95)
    asker.learn({}, ["item-3"])
    first = asker.ask("chosen", [], 1, 0)
    assert first is not None and first.predicted is None and first.open_items == 39, "no model yet: drawn"
    asker.learn({ids[row]: CLASSES[truth[row]] for row in range(10)} | {"unknown": "a"}, ["item-20"])
    got = [asker.ask("random" if place % 3 == 0 else "chosen", ["item-11"], 1, place) for place in range(30)]
    items = [one.item_id for one in got if one is not None]
    assert len(items) == len(set(items)) == 29 and set(items) == set(ids[10:]) - {"item-20"}
    assert all(one is None or (one.predicted in CLASSES and sum(s for _, s in one.proba) > 0.97) for one in got)
    assert asker.acquisition == "margin" and [one.labels for one in asker.class_figures()] == [
        sum(truth[:10] == column) for column in range(3)
    ]
