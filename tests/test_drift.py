"""Drift: error rates without a difference, what a difference is found by, and the same figures from other libraries."""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import Played, go_on
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import fisher_exact, hypergeom
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from al_pipeline.cli import app as cli
from al_pipeline.cli.drift import ALARM
from al_pipeline.data.pool import iter_items, write_items
from al_pipeline.drift import domain as domain_module
from al_pipeline.drift import vocabulary as vocabulary_module
from al_pipeline.drift.accuracy import LEAST_LABELS, calibrate, estimated_accuracy
from al_pipeline.drift.assessment import CLASSES, DOMAIN, WORDS, Drift, Texts, compare, holm
from al_pipeline.drift.classes import class_test
from al_pipeline.drift.domain import RIDGE, domain_test, term_vectors
from al_pipeline.drift.look import Look, Looks
from al_pipeline.drift.permutations import p_value, permute
from al_pipeline.drift.vocabulary import vocabulary_test
from al_pipeline.errors import AlError
from al_pipeline.evaluation.figures import Estimate
from al_pipeline.features.shards import digest_rows
from al_pipeline.features.vectors import Vectors
from al_pipeline.files import write_json, write_jsonl
from al_pipeline.operations import drift as drift_operation
from al_pipeline.operations import drift_looks
from al_pipeline.operations.drift_looks import look_at_requests, main, read_looks
from al_pipeline.operations.ingestion.traffic import taken
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import TickReport, tick
from al_pipeline.operations.traffic import delete
from al_pipeline.params import parse_params
from al_pipeline.records import Item, content_hash
from al_pipeline.serving.metrics import Metrics
from al_pipeline.traffic.journal import Journal
from al_pipeline.traffic.rows import LoggedRequest, to_line
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace, open_workspace

OLD = ["meeting", "agenda", "minutes", "budget", "report", "call", "plan", "draft"]
NEW = ["turbine", "blade", "rotor", "nacelle"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def texts_of(random: np.random.Generator, count: int, new: int = 0) -> list[str]:
    """Texts of four usual words, and `new` of them with three that no other has."""
    usual = [" ".join(random.choice(OLD, 4)) for _ in range(count - new)]
    return usual + [" ".join(random.choice(NEW, 3, replace=False)) + f" {random.choice(OLD)}" for _ in range(new)]


def vectors_of(random: np.random.Generator, count: int, new: int = 0, width: int = 16) -> NDArray[Any]:
    found = random.normal(size=(count, width))
    found[count - new :, 0] += 4
    return found.astype(np.float32)


def proba_of(random: np.random.Generator, count: int) -> NDArray[Any]:
    high = random.uniform(0.5, 0.99, count)
    rows = np.stack([high, 1 - high], axis=1)
    return np.where(random.random(count)[:, None] < 0.5, rows, rows[:, ::-1])


def labels_for(random: np.random.Generator, proba: NDArray[Any]) -> NDArray[Any]:
    """Labels for which the probabilities are calibrated."""
    return (random.random(len(proba)) < proba[:, 1]).astype(np.intp)


def drift(seed: int, new: int = 0, window: int = 100, reference: int = 200, permutations: int = 99) -> Drift:
    random = rng(seed)
    test = proba_of(random, 80)
    given_texts = Texts([f"w{row}" for row in range(window)], texts_of(random, window, new), proba_of(random, window))
    vectors = np.concatenate([vectors_of(random, reference), vectors_of(random, window, new)])
    names = ("ham", "spam")
    known = [names[label] for label in labels_for(random, test)]
    return compare(texts_of(random, reference), given_texts, vectors, names, test, known, seed, permutations)


# Permutations --------------------------------------------------------------------------------------------------------
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_each_permutation_leaves_every_fold_its_share(reference: int, window: int, seed: int) -> None:
    found = permute(reference, window, 7, rng(seed))
    assert sorted(np.concatenate(found.folds)) == list(range(reference + window))
    assert found.member[:, 0].tolist() == [False] * reference + [True] * window
    for own in found.folds:
        assert len(set(found.member[own].sum(axis=0))) == 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_p_values_count_the_observed_statistic(values: list[int]) -> None:
    p = p_value(np.array(values, float))
    assert 1 / len(values) <= p <= 1
    assert round(p * len(values)) == sum(value >= values[0] for value in values)


def test_p_values_of_equal_distributions_are_no_smaller_than_they_say() -> None:
    """200 windows without a difference: each test rejects in 5 % of them, within three standard errors."""
    found = [drift(seed, window=40, reference=60, permutations=39) for seed in range(200)]
    most = 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(found))
    for name in (DOMAIN, CLASSES, WORDS):
        assert np.mean([one.p_values[name] <= 0.05 for one in found]) <= most, name
    assert np.mean([one.alarm for one in found]) <= most


# The domain classifier -----------------------------------------------------------------------------------------------
def test_scores_are_those_of_cross_validated_ridge_regression() -> None:
    vectors = vectors_of(rng(), 60, 15)
    labels = permute(40, 20, 3, rng(1))
    found = domain_module._scores(vectors.astype(float), labels, RIDGE)
    rows = vectors - vectors.mean(axis=0)
    penalty = RIDGE * np.trace(rows.T @ rows) / rows.shape[1]
    for column in range(4):
        target = labels.member[:, column] - labels.member[:, 0].mean()
        for own in labels.folds:
            others = np.setdiff1d(np.arange(60), own)
            model = Ridge(alpha=penalty, fit_intercept=False).fit(rows[others], target[others])
            assert model.predict(rows[own]) == pytest.approx(found[own, column], abs=1e-6)


def test_the_auc_is_scikit_learns() -> None:
    labels = permute(50, 30, 5, rng(2))
    scores = rng(3).normal(size=labels.member.shape)
    found, _ = domain_module._statistics(scores, labels)
    expected = [roc_auc_score(labels.member[:, one], scores[:, one]) for one in range(6)]
    assert found == pytest.approx(expected)


def test_a_tenth_of_a_new_topic_is_found_though_the_auc_is_low() -> None:
    random = rng(4)
    vectors = np.concatenate([vectors_of(random, 400), vectors_of(random, 200, 20)])
    found = domain_test(vectors, permute(400, 200, 199, random))
    assert found.p == 1 / 200
    assert found.auc < 0.6
    assert set(np.argsort(-found.scores[400:])[:10]) <= set(range(180, 200))


@pytest.mark.parametrize("vectors", [np.zeros((30, 4), np.float32), np.ones((30, 1), np.float32)])
def test_vectors_that_say_nothing_give_no_alarm(vectors: NDArray[Any]) -> None:
    assert domain_test(vectors, permute(20, 10, 99, rng())).p > 0.05


def test_texts_without_an_encoder_have_the_components_of_their_terms() -> None:
    from al_pipeline.features.tfidf import fit

    random = rng(5)
    texts = texts_of(random, 120) + texts_of(random, 60, 12)
    rows = fit(texts).transform(texts)
    assert domain_test(term_vectors(rows), permute(120, 60, 99, random)).p <= 0.05
    assert term_vectors(rows * 0).shape == (180, 1)


# Words ---------------------------------------------------------------------------------------------------------------
def test_new_words_are_named_with_the_texts_that_have_them() -> None:
    random = rng(6)
    texts = texts_of(random, 200) + texts_of(random, 100, 10)
    found = vocabulary_test(texts, permute(200, 100, 199, random))
    assert found.p == 1 / 200
    assert {one.word for one in found.words} <= set(NEW)
    assert found.words[0].reference == 0
    for one in found.words:
        assert one.window == len(one.rows)
        assert all(one.word in texts[200 + row].split() for row in one.rows)


@given(st.integers(1, 30), st.integers(1, 30), st.data())
@settings(max_examples=40, deadline=None)
def test_the_strength_of_a_word_is_fishers_exact_test(reference: int, window: int, data: st.DataObject) -> None:
    size = reference + window
    total = data.draw(st.integers(1, size))
    tail = vocabulary_module._tail(total, size, window)
    inside = data.draw(st.integers(max(0, total - reference), min(total, window)))
    table = [[inside, total - inside], [window - inside, reference - total + inside]]
    assert np.exp(-tail[inside]) == pytest.approx(fisher_exact(table, alternative="greater").pvalue, rel=1e-6)
    assert np.exp(-tail[inside]) == pytest.approx(hypergeom.sf(inside - 1, size, total, window), rel=1e-6)


def test_texts_without_words_give_no_alarm() -> None:
    assert vocabulary_test(["?", "!"] * 10, permute(10, 10, 19, rng())).p == 1


# Classes -------------------------------------------------------------------------------------------------------------
def test_other_shares_of_classes_are_found() -> None:
    reference, window = np.repeat([0, 1], [80, 20]), np.repeat([0, 1], [50, 50])
    found = class_test(reference, window, 3, 199, rng())
    assert found.p == 1 / 200
    assert found.reference == (80, 20, 0)
    assert found.window == (50, 50, 0)
    assert class_test(reference, reference, 3, 199, rng()).p == 1


# Accuracy without labels ---------------------------------------------------------------------------------------------
def test_the_estimated_accuracy_is_right_and_its_interval_holds() -> None:
    within, apart = [], []
    for seed in range(200):
        random = rng(seed)
        real = proba_of(random, 900)
        truth = labels_for(random, real)
        logit = 2 * np.log(real / (1 - real))  # a model that is too sure
        stated = 1 / (1 + np.exp(-logit))
        estimate = estimated_accuracy(stated[400:], calibrate(stated[:400], truth[:400]))
        accuracy = (stated[400:].argmax(axis=1) == truth[400:]).mean()
        assert estimate.value is not None
        assert estimate.low is not None
        assert estimate.high is not None
        within.append(estimate.low <= accuracy <= estimate.high)
        apart.append(estimate.value - accuracy)
    assert np.mean(within) >= 0.91
    assert abs(np.mean(apart)) <= 0.01


def test_few_labels_give_no_estimate_but_the_reason() -> None:
    random = rng()
    proba = proba_of(random, LEAST_LABELS - 1)
    found = estimated_accuracy(proba, calibrate(proba, labels_for(random, proba)))
    assert found.value is None
    assert found.reason is not None
    assert "29 test items" in found.reason


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_model_that_is_sure_of_everything_has_an_estimate(value: float) -> None:
    proba = np.tile([value, 1 - value], (50, 1))
    found = estimated_accuracy(proba, calibrate(proba, proba.argmax(axis=1)))
    assert found.value is not None
    assert found.value > 0.9


# All of it -----------------------------------------------------------------------------------------------------------
def test_a_difference_is_an_alarm_with_examples_and_without_an_accuracy() -> None:
    found = drift(7, new=15)
    assert set(found.found) >= {DOMAIN, WORDS}
    row = found.to_json()
    assert row["alarm"] is True
    assert all(set(one["text"].split()) & set(NEW) for one in row["new"])
    assert all(one["word"] in example["text"] for one in row["vocabulary"]["words"] for example in one["examples"])
    assert row["accuracy"]["value"] is None
    assert "may not be calibrated" in row["accuracy"]["reason"]


def test_no_difference_is_no_alarm_and_an_accuracy() -> None:
    found = drift(1)
    assert not found.alarm
    assert found.accuracy.value == pytest.approx(0.75, abs=0.1)
    assert found.to_json() == drift(1).to_json()


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1), min_size=1))
def test_holm_rejects_no_less_than_bonferroni(p_values: dict[str, float]) -> None:
    found = holm(p_values, 0.05)
    assert {name for name, p in p_values.items() if p <= 0.05 / len(p_values)} <= set(found)
    assert all(p_values[name] <= 0.05 for name in found)
    assert list(found) == sorted(found, key=lambda name: (p_values[name], name))


# al drift ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_al_drift_compares_a_file_with_the_pool(
    once: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace, _, _ = go_on(once, tmp_path)
    known = [item.text for batch in iter_items([workspace.layout.pool]) for item in batch]
    other = tmp_path / "other.jsonl"
    write_jsonl(other, ({"text": f"turbine {n} rotor blade nacelle"} for n in range(60)))

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["al", "-C", str(workspace.layout.root), "drift", *words])
        try:
            cli.app(sys.argv[1:])
        except SystemExit as ended:
            return int(ended.code or 0), capfd.readouterr().out
        except AlError as error:
            return error.exit_code, capfd.readouterr().out
        raise AssertionError("it did not end")

    code, out = run(str(other), "--json")
    row = json.loads(out)
    assert (code, row["alarm"]) == (ALARM, True)
    assert row["texts"] == {"rows": 60, "distinct": 60, "reference": len(known), "window": 60}
    assert "turbine" in {one["word"] for one in row["vocabulary"]["words"]}
    assert row["accuracy"]["value"] is None
    code, out = run(str(other))
    assert code == ALARM
    assert "They differ" in out and "nacelle" in out
    write_jsonl(other, ({"text": text} for text in known))
    code, out = run(str(other), "--json")
    assert (code, json.loads(out)["alarm"]) == (0, False), "texts of the pool are no news"

    assert run("--json")[0] == 3, "no requests are kept"
    week = 7 * 86_400
    workspace.layout.traffic.mkdir(mode=0o700, parents=True)
    journal = Journal(workspace.layout.traffic)
    for number in range(120):
        text = f"turbine {number} rotor blade nacelle" if number < 60 else known[number % len(known)]
        when = int((time.time() - (week if number < 60 else 60)) * 1e6)
        asked = LoggedRequest(when, f"r{number}", 1, "ab", "torch", 1.0, ("ham", "spam"), (text,), (0,), ((0.5, 0.5),))
        journal.append(to_line(asked))
    journal.end()
    code, out = run("--json")
    row = json.loads(out)
    assert (code, row["alarm"], row["texts"]["rows"]) == (ALARM, True, 120)
    code, out = run("--since", "1d", "--json")
    assert (code, json.loads(out)["texts"]["rows"]) == (0, 60)
    assert run("--since", "30s", "--json")[0] == 2
    assert run(str(other), "--since", "1d", "--json")[0] == 2


def a_look(**changes: Any) -> Look:
    made: dict[str, Any] = {
        "since": 0.0,
        "until": 604_800.0,
        "round": "round-0003",
        "rows": 90,
        "texts": 80,
        "found": (DOMAIN, WORDS),
        "p_values": {DOMAIN: 0.002},
        "words": ("turbine",),
        "newest": ("r1:0", "r2:0", "r2:1"),
        "accuracy": Estimate(value=None, reason="it differs"),
        "measured": Estimate(value=0.9, low=0.85, high=0.94),
    }
    return Look(**{**made, **changes})


def test_a_look_has_the_measured_accuracy_beside_the_estimated_one() -> None:
    looks = [Looks(tried_at=1.0, look=a_look()), Looks(tried_at=1.0, look=a_look(measured=None))]
    assert (
        looks[0]
        .sentence()
        .endswith(
            "new words: turbine; no estimated accuracy, since it differs; measured on labelled requests 0.900 "
            "(0.850–0.940), as of round-0003"
        )
    )
    assert "measured" not in looks[1].sentence()
    for one, there in zip(looks, (True, False), strict=True):
        text = Metrics(lambda: 0, None, lambda one=one: one).text().decode()  # type: ignore[misc]
        assert ("al_drift_measured_accuracy 0.9" in text) is there and "estimated_accuracy" not in text


def test_a_deleted_request_leaves_the_newest_look_and_takes_the_new_words_with_it(tmp_path: Path) -> None:
    workspace: Any = SimpleNamespace(layout=Layout(tmp_path))
    keep(workspace, ["a secret"], 1.0)
    drift_looks._write(workspace.layout, Looks(tried_at=1.0, look=a_look(newest=("1-0:0", "r2:0"))))
    assert delete(workspace, "1-0").texts == 1
    found = read_looks(workspace.layout)
    assert found == Looks(tried_at=1.0, look=a_look(newest=("r2:0",), words=()))
    assert "turbine" not in Looks(tried_at=1.0, look=a_look()).sentence(words=False), "as in Prefect"


def test_vectors_of_requests_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team may share the cache of vectors, and deleting a request would leave them there."""

    class Lengths:
        def encode(self, texts: Sequence[str], _: object = None) -> NDArray[np.float32]:
            return np.array([[len(text), 1] for text in texts], np.float32)

    monkeypatch.setattr(Vectors, "_encoder", lambda _: Lengths())
    (tmp_path / "encoder").mkdir()
    write_json(tmp_path / "encoder/config.json", {})
    template = Path(__file__).parents[1] / "params.yaml"
    features, cache = parse_params(template.read_text(encoding="utf-8")).features, tmp_path / "cache"
    published: Any = SimpleNamespace(folder=tmp_path, features=features, device="cpu")
    encoded = Vectors(tmp_path / "encoder", cache, features, "cpu")
    known, new = ([Item(text, content_hash(text), text) for text in texts] for texts in (["a", "bb"], ["a", "cccc"]))
    with_both = drift_operation._unstored(published, encoded, known, new, private_folder(tmp_path / "traffic"))
    assert with_both[:, 0].tolist() == [1, 2, 1, 4]
    assert encoded.missing_digests([digest_rows([content_hash(one) for one in ("a", "bb", "cccc")])]).shape[0] == 1
    assert not list((tmp_path / "traffic").iterdir())


def test_of_a_large_test_set_a_random_sample_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of a user may follow the time or the class."""
    layout = Layout(tmp_path)
    items = [Item(f"{number:02}", content_hash(f"text {number}"), f"text {number}") for number in range(40)]
    write_items(layout.test / "part-000001.parquet", [items])
    monkeypatch.setattr(drift_operation, "_MOST_TEST", 20)
    monkeypatch.setattr(drift_operation, "snapshots", lambda _: nullcontext(lambda _: {}))
    workspace: Any = SimpleNamespace(layout=layout)
    published: Any = SimpleNamespace(record=None)
    found, labels = drift_operation._test_set(workspace, published)
    smallest = sorted(items, key=lambda item: item.content_hash)[:20]
    assert {item.item_id for item in found} == {item.item_id for item in smallest}
    assert labels == [None] * 20


def keep(workspace: Workspace, texts: Sequence[str], time: float) -> None:
    """Have the log of requests hold a request for each text, as a server writes it."""
    workspace.layout.traffic.mkdir(mode=0o700, parents=True, exist_ok=True)
    journal = Journal(workspace.layout.traffic)
    for number, text in enumerate(texts):
        name, answer = f"{time:.0f}-{number}", (("ham", "spam"), (text,), (0,), ((0.5, 0.5),))
        journal.append(to_line(LoggedRequest(int(time * 1e6), name, 1, "ab", "torch", 1.0, *answer)))
    journal.end()


@pytest.mark.slow
def test_a_tick_looks_at_the_newest_requests_and_tells_what_it_found(once: Played, tmp_path: Path) -> None:
    workspace, oracle, _ = go_on(once, tmp_path)
    layout = workspace.layout
    begin, day = float(int(time.time())), 86_400.0
    known = [item.text for batch in iter_items([layout.pool]) for item in batch]
    layout.params.write_text(layout.params.read_text("utf-8").replace("  novel: 0", "  novel: 3"), "utf-8")
    named: list[str] = []

    def run(name: str, action: Callable[[], Any]) -> Any:
        named.append(name)
        return action()

    def at(when: float) -> TickReport:
        made = open_workspace(layout.root)
        return tick(made, lambda: oracle, now=lambda: datetime.fromtimestamp(when, UTC), run=run)

    assert "drift" not in at(begin).steps and status(workspace, ask=False).drift is None, "nothing was kept"
    keep(workspace, [f"turbine {n} rotor blade nacelle" for n in range(60)], begin - 3600)
    assert at(begin).warnings == () and named.count("drift") == 1
    found = read_looks(layout)
    assert found is not None and found.look is not None and found.problem == ""
    assert found.look.alarm and found.look.alarm_since == begin and "turbine" in found.look.words
    assert layout.drift.stat().st_mode & 0o777 == 0o600 and b"rotor blade" not in layout.drift.read_bytes(), "no text"
    assert "differ from the pool" in status(workspace, ask=False).to_json()["drift"]["sentence"]
    metrics = Metrics(lambda: 0, None, partial(read_looks, layout)).text().decode()
    assert "al_drift_alarm 1.0" in metrics and 'al_drift_p_value{test="vocabulary"}' in metrics

    at(begin + 60)
    assert named.count("drift") == 1, "not before a day has passed"
    assert taken(layout)["novel"] == 3, "those least like the pool are asked about"
    fresh = [item for batch in iter_items([layout.inbox_pool]) for item in batch]
    assert {json.loads(item.metadata)["traffic"]["policy"] for item in fresh} == {"novel"} and len(fresh) == 3
    at(begin + 120)
    assert taken(layout)["novel"] == 3, "once"

    main(layout.root, begin + day)
    again = read_looks(layout)
    assert again is not None and again.look == found.look and "no requests are kept" in again.problem
    keep(workspace, [f"turbine {n} rotor blade nacelle" for n in range(60, 120)], begin + 1.5 * day)
    main(layout.root, begin + 2 * day)
    again = read_looks(layout)
    assert again is not None and again.look is not None and again.look.alarm_since == begin, "one row of alarms"
    assert again.look.rows == 60, "those since the last look"
    keep(workspace, known, begin + 2.5 * day)
    main(layout.root, begin + 3 * day)
    again = read_looks(layout)
    assert again is not None and again.look is not None and again.look.alarm_since is None
    assert "do not differ from the pool" in again.sentence()

    layout.drift.write_text("{", "utf-8")
    warnings = at(begin + 4 * day).warnings
    assert warnings and all("drift.json is damaged; delete it" in warning for warning in warnings)
    assert "damaged; delete it" in status(workspace, ask=False).to_json()["drift"]["problem"]
    assert "al_serve_queue_texts" in Metrics(lambda: 0, None, partial(read_looks, layout)).text().decode()


def test_a_comparison_that_does_not_end_is_told_once_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parse_params((Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8"))
    workspace: Any = SimpleNamespace(layout=Layout(tmp_path), params=params)
    keep(workspace, ["x"], 1.0)
    monkeypatch.setattr(drift_looks, "_look", lambda layout, now: None)

    def look(when: float) -> list[str]:
        return look_at_requests(workspace, when, lambda _, action: action())

    (warning,) = look(1_000_000.0)
    assert "did not end" in warning
    assert look(1_000_060.0) == []
    assert look(999_000.0) != [], "a clock that was put back"
    found = read_looks(workspace.layout)
    assert found is not None and "no look at 1970-01-12" in found.sentence()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(drift_looks, "_write", full)
    assert look(2_000_000.0) != [], "a full disk fails no tick"
