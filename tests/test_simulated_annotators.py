"""Simulated annotators who make mistakes: how often and how they err, and what simulations with them say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_simulation import params, work_of, write_corpus

from al_pipeline.active_learning.choice import QueryConfig
from al_pipeline.cli.simulate import _parse_relabel
from al_pipeline.errors import UsageError
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.params import Labels
from al_pipeline.records import RELABEL, Query
from al_pipeline.simulation.annotators import (
    KINDS,
    Team,
    TeamLabels,
    TrueLabels,
    draw_answers,
    error_rates,
    nearest_classes,
)
from al_pipeline.simulation.corpus import LabeledTexts, read_corpus
from al_pipeline.simulation.page import render, summary, team_table
from al_pipeline.simulation.replay import Corpus, replay
from al_pipeline.simulation.runs import parse_arm, prepare, simulate_run
from al_pipeline.simulation.simulate import Options, Simulation, simulate

TEAMS = st.builds(
    Team, annotators=st.integers(1, 8), noise=st.floats(0, 0.45), kind=st.sampled_from(KINDS)
)  # fmt: skip


# The answers --------------------------------------------------------------------------------------------------------
@given(TEAMS, st.integers(2, 6))
def test_the_mean_rate_is_the_teams_and_nobody_is_worse_than_a_guess(team: Team, classes: int) -> None:
    rates = error_rates(team, classes)
    assert rates.shape == (team.annotators,) and rates.mean() == pytest.approx(team.noise)
    assert ((rates >= 0) & (rates <= max(team.noise, (classes - 1) / classes) + 1e-9)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_answers_are_wrong_as_asked_and_the_same_each_time(kind: Any) -> None:
    team, truth = Team(annotators=5, noise=0.2, kind=kind), np.arange(4000) % 4
    near = np.array([1, 0, 3, 2])
    found = draw_answers(team, truth, 4, 7, near)
    assert found.tobytes() == draw_answers(team, truth, 4, 7, near).tobytes()
    assert found.tobytes() != draw_answers(team, truth, 4, 8, near).tobytes()
    wrong = found != truth[:, None]
    assert wrong.mean(axis=0) == pytest.approx(error_rates(team, 4), abs=0.03)
    shares = np.bincount(((found - truth[:, None]) % 4)[wrong], minlength=4) / wrong.sum()
    if kind == "confusable":
        assert (found[wrong] == near[truth][:, None].repeat(5, 1)[wrong]).all()
    else:
        assert shares[1:] == pytest.approx([1 / 3] * 3, abs=0.03)
    if kind == "careless-person":
        assert wrong.mean(axis=0).argmax() == 0 and wrong[:, 1:].mean() < 0.1


def test_without_noise_everybody_is_right_and_two_classes_have_one_error() -> None:
    truth = np.arange(50) % 2
    for kind in KINDS:
        assert (truth == draw_answers(Team(annotators=3, noise=0.0, kind=kind), truth, 2, 1, np.array([1, 0])).T).all()
    assert set(np.unique(draw_answers(Team(annotators=3, noise=0.4), truth, 2, 1))) == {0, 1}
    with pytest.raises(ValueError, match="which are near"):
        draw_answers(Team(annotators=3, noise=0.4, kind="confusable"), truth, 2, 1)


def test_the_nearest_class_is_that_of_the_nearest_centroid() -> None:
    corners = np.array([[1, 0, 0], [0.9, 0.4, 0], [0, 0, 1], [0, 0.5, 0.9]], np.float32)
    truth = np.arange(40) % 4
    dense = corners[truth] + np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32) / 50
    assert nearest_classes(FeatureMatrix(dense), truth, 4).tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize(
    ("team", "message"),
    [
        (Team(annotators=0, noise=0.1), "--annotators must be at least 1"),
        (Team(annotators=3, noise=0.5), r"--noise 0.5 must be at least 0 and below 0.50.*guesses among 2 classes"),
        (Team(annotators=3, noise=-0.1), "at least 0"),
        (Team(annotators=3, noise=float("nan")), "at least 0"),
        (Team(annotators=3, noise=0.1, kind="odd"), "unknown kind of noise 'odd'; choose from uniform"),  # type: ignore[arg-type]
    ],
)
def test_a_team_that_cannot_be_is_refused(team: Team, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        team.check(2)


# The labels ---------------------------------------------------------------------------------------------------------
def asked(*items: str) -> list[Query]:
    return [Query(item, rank, 0.0, "margin", 1.0) for rank, item in enumerate(items)]


def test_answers_become_labels_by_the_products_fold_and_do_not_depend_on_what_else_is_asked() -> None:
    rng = np.random.default_rng(2)
    given_ = {f"i{n}": [("ham", "spam")[one] for one in rng.integers(2, size=4)] for n in range(30)}
    one, other = (TeamLabels(given_, ["ham", "spam"], 3, False, 5) for _ in range(2))
    one.ask(asked(*given_), 0, {})
    other.ask(asked("i7", "i3"), 0, {})
    assert other.labels == {item: one.labels[item] for item in ("i7", "i3")} and other.answers == 6
    for item, label in one.labels.items():
        said = [given_[item][person] for person in one.asked(item)]
        assert len(said) == 3 and said.count(label) >= 2
    assert one.answers == 90 and not one.ties and not one.ignored


def test_two_who_differ_are_a_tie_and_who_is_asked_again_repeats_the_answer() -> None:
    labeling = TeamLabels({"a": ["ham", "spam"], "b": ["ham", "ham"]}, ["ham", "spam"], 2, True, 1)
    labeling.ask(asked("a", "b"), 0, {})
    assert list(labeling.ties) == ["a"] and labeling.labels == {"b": "ham"}
    labeling.ask(asked("a"), 1, {})
    assert list(labeling.ties) == ["a"] and labeling.answers == 6
    assert not labeling.answered()["b"].open, "both have answered"


def test_a_consensus_with_the_models_forecast_decides_where_it_is_set() -> None:
    given_ = {f"i{n}": ["ham", "ham", "ham"] for n in range(20)} | {"a": ["ham", "spam", "spam"]}
    forecasts = {item: {"ham": 0.95, "spam": 0.05} for item in given_}
    labels = []
    for method in (Labels(), Labels(consensus="dawid_skene")):
        labeling = TeamLabels(given_, ["ham", "spam"], 2, False, 3, method)
        labeling.ask(asked(*given_), 0, forecasts)
        assert len(labeling.asked("a")) == 2
        labels.append(labeling.labels.get("a", "tie"))
    assert labels[1] != "tie"


def test_the_truth_needs_no_second_answer() -> None:
    labeling = TrueLabels({"a": "ham", "b": "spam"})
    labeling.ask(asked("b"), 0, {})
    assert (labeling.labels, labeling.answers, labeling.answered()) == ({"b": "spam"}, 1, {})


def test_doubtful_labels_are_asked_again_in_a_replay_and_more_of_them_become_right() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(400) < 0.5).astype(np.intp)
    vectors = rng.normal(size=(400, 5)) / 2 + 3 * np.eye(5)[truth]
    corpus = Corpus([f"item-{n}" for n in range(400)], truth, np.arange(300), np.arange(300, 400), ("ham", "spam"))
    answers = draw_answers(Team(annotators=4, noise=0.25), truth, 2, 1)
    given_ = {name: [corpus.classes[one] for one in answers[row]] for row, name in enumerate(corpus.item_ids)}

    def proba(rows: np.ndarray) -> np.ndarray:
        sure = np.clip((vectors[rows, 1] - vectors[rows, 0]) / 6 + 0.5, 0.02, 0.98)
        return np.column_stack([1 - sure, sure])

    right = {}
    for relabel in (0.0, 0.5):
        config = QueryConfig(1, 20, "margin", 20, 0.1, 100, relabel=relabel)
        labeling = TeamLabels(given_, corpus.classes, 1, bool(relabel), 1)
        curve = replay(corpus, config, 6, lambda _: proba, labeling=labeling, held_out=proba)
        again = [sum(query.strategy == RELABEL for query in point.queries) for point in curve.points]
        assert [point.answers for point in curve.points] == list(range(20, 141, 20))
        assert again[0] == 0 and all(count <= 10 for count in again) and bool(sum(again)) == bool(relabel)
        right[relabel] = curve.points[-1].right
        assert right[relabel] == np.mean(
            [labeling.labels[name] == corpus.classes[truth[int(name[5:])]] for name in labeling.labels]
        )
    assert right[0.5] > right[0.0] + 0.04


# The simulation -----------------------------------------------------------------------------------------------------
@pytest.fixture
def texts(tmp_path: Path) -> LabeledTexts:
    return read_corpus(write_corpus(tmp_path / "mails.csv"))


def run(texts: LabeledTexts, out: Path, **other: Any) -> Simulation:
    options = {"seeds": 2, "budget": 60, "batch_size": 20, "seed_size": 20, "annotators": 4, "noise": 0.25, **other}
    return simulate(texts, "mails", params(), Options(**{"strategies": ("margin",), **options}), out, None)


def test_the_name_of_a_run_says_how_answers_are_spent() -> None:
    assert parse_arm("margin") == ("margin", 1, 0.0)
    assert parse_arm("margin, without names, overlap 3") == ("margin, without names", 3, 0.0)
    assert parse_arm("random, relabel auto") == ("random", 1, "auto")
    assert parse_arm("random, relabel 0.25") == ("random", 1, 0.25)


def test_arms_are_compared_at_equal_numbers_of_answers(texts: LabeledTexts, tmp_path: Path) -> None:
    done = run(texts, tmp_path / "out", overlap=3, relabel="auto")
    result = json.loads((done.folder / "result.json").read_text(encoding="utf-8"))
    assert result == json.loads(json.dumps(done.result))
    arms = [
        "random",
        "margin",
        "random, overlap 3",
        "margin, overlap 3",
        "random, relabel auto",
        "margin, relabel auto",
    ]
    assert result["strategies"] == arms and result["unit"] == "answers" and result["budgets"] == [20, 40, 60]
    team = result["team"]
    assert (team["annotators"], team["noise"], team["kind"]) == (4, 0.25, "uniform") and team["arms"].keys() == set(
        arms
    )
    assert team["arms"]["margin"]["labels"] == 60 and team["arms"]["margin, overlap 3"]["labels"] < 22
    assert team["arms"]["margin, overlap 3"]["right"] > team["arms"]["margin"]["right"] + 0.05
    assert team["gains"].keys() == set(arms[2:])
    for arm, gain in team["gains"].items():
        assert gain["plain"] == arm.split(",")[0] and gain["answers"] == 60
        value, low, high = gain["end"]
        assert low <= value <= high
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert page == render(done.result) and "Several answers per item" in page and ">Answers needed<" in page
    assert "4 simulated annotators, 25 % of their answers wrong" in page
    assert not re.search(r"\d labels\b", page.partition("<svg")[2].partition("</svg>")[0])
    assert len([line for line in summary(done.result) if "against one answer per item, at 60 answers" in line]) == 4
    table = team_table(done.result)
    assert table is not None and [row[0] for row in table[2]] == arms
    again = run(texts, tmp_path / "out", overlap=3, relabel="auto")
    assert again.done == 0 and again.result == done.result
    assert run(texts, tmp_path / "out", overlap=3, relabel="auto", noise=0.1).folder != done.folder


def test_without_annotators_nothing_is_said_of_them(texts: LabeledTexts, tmp_path: Path) -> None:
    done = run(texts, tmp_path / "out", annotators=None)
    assert "team" not in done.result and done.result["unit"] == "labels" and team_table(done.result) is None
    assert "Several answers per item" not in render(done.result)


def test_a_run_with_overlap_has_the_answers_of_one_without(texts: LabeledTexts) -> None:
    from dataclasses import replace

    work = replace(work_of(texts), team=Team(annotators=3, noise=0.2, kind="confusable"))
    curves = [simulate_run(work, prepare(work, 1), arm, 1) for arm in ("random", "random, overlap 2")]
    assert [[point.answers for point in curve.points] for curve in curves] == [[20, 40, 60]] * 2
    first = [{query.item_id for query in curve.points[0].queries} for curve in curves]
    assert first[1] < first[0], "the same sample, half as many"


def test_a_share_is_read_from_the_command_line() -> None:
    assert [_parse_relabel(text) for text in ("auto", "0.25", "0")] == ["auto", 0.25, 0.0]
    with pytest.raises(UsageError, match="--relabel takes a share from 0 to 1, or auto, got 'half'"):
        _parse_relabel("half")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"annotators": None, "overlap": 2}, "give --annotators too"),
        ({"annotators": None, "relabel": "auto"}, "give --annotators too"),
        ({"overlap": 5}, "--overlap 5 needs as many --annotators, got 4"),
        ({"relabel": 1.5}, "--relabel takes a share from 0 to 1, or auto, got 1.5"),
        ({"annotators": 1, "relabel": 0.5}, "--relabel needs --annotators 2 or more"),
        ({"noise": 0.6}, "--noise 0.6 must be"),
        ({"noise_kind": "odd"}, "unknown kind of noise 'odd'"),
    ],
)
def test_options_that_do_not_fit_are_named(texts: LabeledTexts, tmp_path: Path, other: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(texts, tmp_path, **other)
