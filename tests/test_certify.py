"""Certificates: they are wrong in at most their stated share, however often one looks; and `al certify`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import Played, answer_all, change_params, copy_workspace, go_on, play
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from typer.testing import CliRunner

from al_pipeline.cli.app import app
from al_pipeline.data.pool import read_ids, write_items
from al_pipeline.errors import NothingToDo, UsageError
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.certify import ask_test_items, labelled_predictions
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history, read_plan
from al_pipeline.operations.planning import next_test_items
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import tick
from al_pipeline.records import Item
from al_pipeline.stopping.certificate import certify, log_capital, lower_bound
from al_pipeline.stopping.proposal import Gain, propose
from al_pipeline.stopping.stability import cohens_kappa
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import open_workspace

CLASSES = ("ham", "spam")
GOOD = [[480, 5], [6, 109]]


@pytest.mark.parametrize(("hits", "trials", "share"), [(9, 10, 0.5), (95, 100, 0.9), (3, 10, 0.6), (40, 40, 0.97)])
def test_the_capital_is_the_mean_likelihood_ratio(hits: int, trials: int, share: float) -> None:
    def ratio(other: float) -> float:
        return (other / share) ** hits * ((1 - other) / (1 - share)) ** (trials - hits)  # type: ignore[no-any-return]

    whole, _ = quad(ratio, share, 1)
    assert log_capital(hits, trials, share) == pytest.approx(math.log(whole / (1 - share)), abs=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_looking_at_every_label_is_wrong_in_no_more_than_the_stated_share(share: float) -> None:
    rng = np.random.default_rng(1)
    looks, wrong, runs = np.unique(np.geomspace(1, 2000, 80).astype(int)), 0, 200
    for _ in range(runs):
        hits = np.cumsum(rng.random(2000) < share)
        wrong += any(log_capital(float(hits[n - 1]), float(n), share) >= math.log(20) for n in looks)
    assert wrong <= 18, "20 of 200 have a probability of 1 % at a share of 5 %; 10 are expected at most"


def test_a_fair_game_pays_nothing_on_average() -> None:
    """The expected capital after n labels is at most 1, computed over all outcomes."""
    for share in (0.3, 0.9):
        for trials in (1, 7, 60):
            expected = sum(
                math.comb(trials, hits) * share**hits * (1 - share) ** (trials - hits)
                * math.exp(log_capital(hits, trials, share))
                for hits in range(trials + 1)
            )  # fmt: skip
            assert expected <= 1 + 1e-9
            assert expected > 0.3, "and little is wasted"


@given(st.integers(0, 400), st.integers(0, 400), st.floats(0.5, 30))
def test_a_bound_is_below_the_share_and_falls_with_the_evidence_needed(hits: int, misses: int, evidence: float) -> None:
    trials = hits + misses
    low = lower_bound(hits, trials, evidence)
    assert 0 <= low <= (hits / trials if trials else 0)
    assert lower_bound(hits, trials, evidence + 1) <= low
    assert lower_bound(hits + 1, trials + 1, evidence) >= low - 1e-9


@given(st.lists(st.lists(st.integers(0, 200), min_size=3, max_size=3), min_size=3, max_size=3))
def test_metrics_are_those_of_the_confusion_matrix(rows: list[list[int]]) -> None:
    counts, names = np.array(rows, float), ("a", "b", "c")
    hits, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    for place, name in enumerate(names):
        for kind, below in (("recall", true), ("precision", predicted)):
            found = certify(rows, names, f"{kind}:{name}", 0.5).value
            assert found == (pytest.approx(hits[place] / below[place]) if below[place] else None)
        both = true[place] + predicted[place]
        assert certify(rows, names, f"f1:{name}", 0.5).value == (
            pytest.approx(2 * hits[place] / both) if both else None
        )
    if (true + predicted).all():
        found = certify(rows, names, "macro_f1", 0.5).value
        assert found == pytest.approx(float(np.mean(2 * hits / (true + predicted))))


@given(st.floats(0.5, 0.99), st.integers(1, 40))
def test_labels_that_are_lacking_certify_it(target: float, model: int) -> None:
    for metric in ("accuracy", "macro_f1", "recall:spam"):
        found = certify(GOOD, CLASSES, metric, target, model=model)
        assert found.certified == (found.lacking == 0) == (found.low >= target)
        if found.lacking:
            more = np.array(GOOD) * (1 + found.lacking / 600)
            assert certify(more, CLASSES, metric, target, model=model).certified
        elif found.lacking is None:
            assert found.value is not None
            assert found.value <= target


def test_later_models_need_more() -> None:
    assert certify(GOOD, CLASSES, "accuracy", 0.95, model=1).certified
    assert not certify(GOOD, CLASSES, "accuracy", 0.95, model=10).certified


@pytest.mark.parametrize(
    ("metric", "target", "confusion", "reason"),
    [
        ("accuracy", 0.9, [[0, 0], [0, 0]], "no random item is labelled yet"),
        ("macro_f1", 0.9, [[9, 0], [0, 0]], "no random item of class spam is labelled yet"),
        ("recall:spam", 0.9, [[9, 0], [0, 0]], "no random item that it is measured on is labelled yet"),
        ("accuracy", 0.99, GOOD, "no more than the target of 0.99"),
        ("accuracy", 0.9816, GOOD, "too close to the target"),
        ("accuracy", 0.97, GOOD, "further random labels are lacking"),
    ],
)
def test_the_reason_is_said(metric: str, target: float, confusion: Any, reason: str) -> None:
    found = certify(confusion, CLASSES, metric, target)
    assert not found.certified
    assert reason in found.sentence()


@pytest.mark.parametrize(
    ("metric", "target", "confidence", "message"),
    [
        ("acuracy", 0.9, 0.95, "'acuracy' is no metric"),
        ("recall", 0.9, 0.95, "'recall' is no metric"),
        ("recall:eggs", 0.9, 0.95, "no class 'eggs'; the classes are ham, spam"),
        ("accuracy", 1.0, 0.95, "target must be above 0 and below 1"),
        ("accuracy", 0.9, 1.0, "confidence must be above 0 and below 1"),
        ("accuracy", math.nan, 0.95, "target must be"),
    ],
)
def test_what_cannot_be_certified_is_refused(metric: str, target: float, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify(GOOD, CLASSES, metric, target, confidence)


def call(root: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["-C", str(root), "certify", *words])


def test_al_certify_and_the_labels_it_asks_for(twice: Played, tmp_path: Path) -> None:
    workspace, _, _ = go_on(twice, tmp_path)
    root, git = workspace.layout.root, Git(workspace.layout.root)
    metrics = read_history(workspace.layout, git).rounds[-1].metrics
    found = call(root, "--target", "0.9999", "--round", "1", "--json")
    assert found.exit_code == 6
    shown = json.loads(found.stdout)
    assert shown["labels"] == metrics.items
    assert shown["value"] == pytest.approx(metrics.accuracy.value)
    assert shown["models"] == 2
    passed = call(root, "--target", "0.01", "--round", "1")
    assert passed.exit_code == 0, passed.output
    assert "certified: accuracy is at least 0.01" in passed.stdout
    for words, message in (
        (("--target", "1.5"), "the target must be above 0 and below 1"),
        (("--target", "0.5", "--metric", "recall:eggs"), "there is no class 'eggs'"),
        (("--target", "0.5", "--ask"), "leave out --round"),
    ):
        refused = call(root, *words, "--round", "1").exception
        assert isinstance(refused, UsageError)
        assert message in str(refused)


def test_requests_that_are_labelled_after_a_model_was_published_are_no_random_labels_for_it(tmp_path: Path) -> None:
    """An older model whose round had no labelled request: its record has no figures of requests."""
    about = json.dumps({"source": "traffic", "traffic": {"policy": "test", "times": 1, "propensity": 1.0}})
    items = [Item("a", "0" * 64, "a"), Item("b", "1" * 64, "b"), Item("r", "2" * 64, "r", about)]
    write_items(Layout(tmp_path).test / "part-000001.parquet", [items])
    rows = {
        "round-0000": "item_id,label,ham,spam\na,ham,0.9,0.1\nb,,0.9,0.1\nr,,0.1,0.9\n",
        "HEAD": "item_id,label,ham,spam\na,ham,0.8,0.2\nb,spam,0.8,0.2\nr,spam,0.2,0.8\n",
    }
    git: Any = SimpleNamespace(root=tmp_path, tags=lambda: ["round-0000"], show=lambda name, _: rows[name])
    record: Any = SimpleNamespace(round=0, traffic=None)
    assert labelled_predictions(git, record).confusion.tolist() == [[1, 0], [1, 0]]


def test_requested_test_items_are_asked_with_the_next_round(
    template: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    workspace, truth, oracle = copy_workspace(template, tmp_path), template[1], SimulatedOracle()
    change_params(workspace, {"test_tasks: 40": "test_tasks: 2"})
    workspace, git = open_workspace(workspace.layout.root), Git(workspace.layout.root)

    def test_items(number: int) -> list[str]:
        return [task.item_id for task in read_plan(git, number) if task.part == "test"]

    def ask(count: int) -> int:
        with open_dvc(workspace.layout) as dvc:
            return ask_test_items(workspace, dvc, count, "to certify")

    play(workspace, oracle, truth, 0)
    assert len(test_items(0)) == 2
    expected = next_test_items(workspace, git, 0, frozenset(), 5)
    assert ask(5) == 5
    play(workspace, oracle, truth, 1)
    assert sorted(test_items(1)) == sorted(expected)
    rest = ask(10_000)
    assert rest == sum(1 for _ in read_ids([workspace.layout.test]).ids()) - 7
    with pytest.raises(NothingToDo, match="wait for the next round already"):
        ask(1)
    play(workspace, oracle, truth, 1)
    assert len(test_items(2)) == rest
    assert not {*test_items(2)} & {*test_items(1), *test_items(0)}
    with pytest.raises(NothingToDo, match="all test items were asked"):
        ask(1)


# The proposal to stop -----------------------------------------------------------------------------------------------
def test_kappa_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(5)
    for classes in (2, 5):
        first, second = rng.integers(0, classes, (2, 300))
        second = np.where(rng.random(300) < 0.7, first, second)
        assert cohens_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    assert cohens_kappa(["a", "a"], ["a", "a"]) == 1.0
    with pytest.raises(ValueError, match="cannot be compared"):
        cohens_kappa([], [])


@pytest.mark.parametrize(
    ("agreements", "low", "target", "stop"),
    [
        ([], None, 0.0, None),
        ([0.999, 0.999], 0.5, 0.0, None),
        ([None, 0.999, 0.999], 0.5, 0.0, None),
        ([0.5, 0.98, 0.99, 1.0], 0.5, 0.0, True),
        ([0.99, 0.99, 0.98], 0.5, 0.0, False),
        ([0.5, 0.5, 0.5], 0.91, 0.9, True),
        ([], 0.89, 0.9, False),
    ],
)
def test_what_is_proposed(agreements: list[float | None], low: float | None, target: float, stop: bool | None) -> None:
    found = propose(agreements, 3, 0.99, low, target)
    assert (None if found is None else found.stop) is stop


@given(
    st.floats(-0.1, 0.1), st.floats(0, 0.1), st.floats(0, 0.1), st.integers(0, 10**6), st.floats(0, 10),
    st.integers(1, 1000),
)  # fmt: skip
def test_a_batch_is_left_only_if_it_is_not_worth_its_labels_at_best(
    change: float, below: float, above: float, predictions: int, price: float, labels: int
) -> None:
    gain = Gain(labels, change, change - below, change + above, 0.95, predictions, price)
    best, worst = ((change + end) * predictions * price for end in (above, -below))
    assert (gain.pays is False) == (best < labels)
    assert (gain.pays is True) == (worst >= labels)
    found = propose([], 3, 0.99, None, 0, gain)
    assert found is not None and found.stop == (best < labels)


def test_a_price_of_errors_weighs_what_the_next_batch_brings(twice: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(twice, tmp_path)
    root = workspace.layout.root
    play(workspace, oracle, truth, 1)
    said = status(open_workspace(root), ask=False).proposal
    assert said is None or "more labels" not in said.sentence(), "errors have no price by default"
    change_params(workspace, {"error_price: 0  ": "error_price: 0.1  ", "predictions: 0  ": "predictions: 1  "})
    found = status(open_workspace(root), ask=False).proposal
    assert found is not None and found.stop, "one prediction is not worth a label"
    assert "more labels are expected to change the accuracy by" in found.sentence()
    assert found.sentence().endswith("in 1 predictions, at 0.1 labels each: not worth it, even at best")


def test_a_pause_asks_nothing_new_until_it_is_taken_back(twice: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(twice, tmp_path)
    record = read_history(workspace.layout, Git(workspace.layout.root)).rounds[-1]
    assert record.agreement is not None
    change_params(workspace, {"patience: 3": "patience: 1", "agreement: 0.99": "agreement: 0.0001"})
    if record.agreement < 0.0001:
        change_params(workspace, {"target: 0  ": "target: 0.000001  "})
    workspace = open_workspace(workspace.layout.root)
    found = status(workspace, ask=False)
    assert found.proposal is not None and found.proposal.stop
    assert "stop: " in found.proposal.sentence()
    change_params(workspace, {"action: propose": "action: pause"})
    workspace = open_workspace(workspace.layout.root)
    answered = answer_all(oracle, truth)
    report = tick(workspace, lambda: oracle)
    assert report.published == (2,), "what was answered is not lost"
    assert answered and not oracle.queue("ann@example.org"), "and nothing new is asked"
    said = status(open_workspace(workspace.layout.root), ask=False).next
    assert "nothing new is asked; `stop.action: propose` in params.yaml goes on" in said
    change_params(workspace, {"action: pause": "action: propose"})
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    assert oracle.queue("ann@example.org")
