"""Simulated live questions: as stale as those of `al live`, measured like batches, compared with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from test_replay import asking, corpus, logistic
from test_simulation import params, write_corpus
from typer.testing import CliRunner

from al_pipeline.cli.app import app
from al_pipeline.errors import UsageError
from al_pipeline.evaluation.savings import fewer_labels
from al_pipeline.live.asker import Asker
from al_pipeline.records import RANDOM, RANDOM_SLICE
from al_pipeline.simulation.corpus import read_corpus
from al_pipeline.simulation.live import LiveWork, live_arms, replay_live
from al_pipeline.simulation.page import live_table, render, summary
from al_pipeline.simulation.replay import Curve, replay
from al_pipeline.simulation.simulate import Options, simulate


def live_curve(seed: int = 0, people: int = 1, strategy: str = "margin", flip: bool = False) -> Curve:
    data, vectors = corpus(400)
    if flip:  # other labels of the test set
        data.truth[data.test] = 1 - data.truth[data.test]
    config, fit = asking(strategy, seed), logistic(data, vectors)
    features = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)[data.pool]
    work = LiveWork(people, 0.95)
    return replay_live(data, config, 3, fit, features, work, lambda: replay(data, config, 0, fit))


def asked(curve: Curve) -> list[str]:
    return [query.item_id for point in curve.points for query in point.queries]


@pytest.mark.parametrize("people", [1, 3])
def test_a_question_knows_all_answers_but_the_newest(people: int, monkeypatch: pytest.MonkeyPatch) -> None:
    knew: dict[str, int] = {}
    ask = Asker.ask

    def watched(asker: Asker, *given: Any) -> Any:
        chosen = ask(asker, *given)
        if chosen is not None:
            knew[chosen.item_id] = asker.labels
        return chosen

    monkeypatch.setattr(Asker, "ask", watched)
    curve = live_curve(people=people)
    assert [point.labels for point in curve.points] == [20, 40, 60, 80], "measured where batches are"
    items = asked(curve)
    assert len(items) == len(set(items)) == 80, "nothing is asked twice"
    assert len(knew) == 60 + people + 2, "so many questions are open at the end"
    late = [20 + place - knew[item] for place, item in enumerate(items[20:])]
    assert min(late) >= 0
    if people == 1:
        assert sorted(late)[len(late) // 2] == 1, "one person gets the newest question, which misses one answer"
    kinds = {query.strategy for point in curve.points[1:] for query in point.queries}
    assert kinds == {"margin", RANDOM_SLICE}


def test_a_live_run_is_the_same_each_time_and_knows_no_test_label() -> None:
    data, vectors = corpus(400)
    batches = replay(data, asking(), 3, logistic(data, vectors))
    first = live_curve()
    assert first == live_curve() and asked(first) != asked(live_curve(seed=1))
    assert first.points[0] == batches.points[0], "they share the seed round"
    assert asked(first) == asked(live_curve(flip=True))
    assert asked(live_curve(strategy="auto")) == asked(first), "what has no score of its own asks by margin"
    assert live_arms(["random", "auto", "entropy"]) == {"auto": "margin, live", "entropy": "entropy, live"}


def test_fewer_labels_have_an_interval_and_nothing_is_extrapolated() -> None:
    budgets, rng = (20, 40, 60, 80), np.random.default_rng
    slow = np.array([[0.5, 0.6, 0.7, 0.8]] * 6) + rng(0).normal(0, 0.003, (6, 4))
    fast, full = np.hstack([slow[:, 1:], slow[:, -1:] + 0.05]), np.ones(6) * 0.8
    found = fewer_labels(budgets, fast, slow, full, rng(1), shares=(80, 90, 150))
    assert found[80].value == pytest.approx(20, abs=1.5) and found[80].low is not None
    assert found[80].low <= found[80].value <= (found[80].high or 0)
    assert found[150] == type(found[150])(None), "neither reaches it"
    same = fewer_labels(budgets, slow, slow, full, rng(1), shares=(80,))[80]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert fewer_labels(budgets, fast[:1], slow[:1], full[:1], rng(1), shares=(80,))[80].low is None


def test_al_simulate_live_says_what_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = read_corpus(write_corpus(tmp_path / "mails.csv"))
    options = {"strategies": ("margin", "auto"), "seeds": 2, "budget": 60, "batch_size": 20, "seed_size": 20}
    ours = structs.replace(params(), select=structs.replace(params().select, strategy="margin"))
    with pytest.raises(UsageError, match="do not go together"):
        simulate(texts, "m", ours, Options(**options, live=1, annotators=3), tmp_path / "out", None)
    monkeypatch.chdir(tmp_path)
    command = ["simulate", "mails.csv", "--features", "tfidf", "--strategies", "margin", "--seeds", "2", "--workers"]
    command += ["1", "--budget", "60", "--batch-size", "20", "--seed-size", "20"]
    assert CliRunner().invoke(app, [*command, "--people", "2"]).exit_code != 0
    done = CliRunner().invoke(app, [*command, "--live", "--people", "2", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["strategies"] == [RANDOM, "margin", "margin, live"]
    found = result["live"]
    assert (found["people"], found["open_questions"]) == (2, 4) and set(found["against"]) == {"margin"}
    row = found["against"]["margin"]
    assert row["live"] == "margin, live" and set(row["shares"]) == {"90", "95", "98"} and row["gain"][1] is not None
    table = live_table(result)
    assert table is not None and len(table[1]) == len(table[2][0]) and "2 people at work" in table[0]
    assert any(sentence.startswith("margin, live ") for sentence in summary(result))
    assert "Live questions" in render(result)
    plain = CliRunner().invoke(app, [*command, "--json"])
    assert "live" not in json.loads(plain.stdout), "without --live all is as before"


@pytest.mark.parametrize(
    ("fewer", "said"),
    [
        ([20.0, 5.0, 30.0], "needs 20 labels (+5 to +30) fewer than batches of 40 by auto"),
        ([-20.0, -30.0, -5.0], "needs 20 labels (+5 to +30) more than batches of 40 by auto"),
        ([10.0, -5.0, None], "saves nothing that shows against batches of 40 by auto: +10 labels (−5 to …)"),
        ([None, None, None], "cannot be compared with batches of auto"),
    ],
)
def test_the_summary_says_also_where_it_is_nothing(fewer: list[float | None], said: str) -> None:
    shares = {"90": {"batch_labels": 60.0, "live_labels": 40.0, "fewer": fewer}}
    live = {"people": 1, "open_questions": 3, "against": {"auto": {"live": "margin, live", "shares": shares}}}
    result = {"metric": "macro_f1", "metrics": {"macro_f1": {}}, "strategies": [], "settings": {"batch_size": 40}}
    assert said in summary({**result, "live": live})[0]
