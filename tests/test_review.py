"""Reviews: what is chosen and shown, and that rulings count, survive, can be revoked, and give error rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from annotating import leave
from harness import Played, answer_all, change_params, go_on, small_workspace
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.annotation.active_events import active
from al_pipeline.annotation.review import (
    Candidate,
    checked_answers,
    choose,
    rulings,
    sample_drawn,
    sample_of,
    shown_answers,
)
from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import read_labeled
from al_pipeline.errors import LabelStudioDown, NothingToDo, UnexpectedChange, UsageError
from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.payloads import choice_result
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.connect import connect
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history
from al_pipeline.operations.intervene import amend, rollback
from al_pipeline.operations.report import report_data
from al_pipeline.operations.review import ReviewReport, review
from al_pipeline.operations.review_figures import figures_of, read_reviews, review_figures
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import Options, tick
from al_pipeline.params import CHECKED, parse_params, recorded
from al_pipeline.records import Event, PlannedTask, Selection, content_hash, is_of_review
from al_pipeline.reporting.page import render
from al_pipeline.workspace.trust import template
from al_pipeline.workspace.workspace import Workspace, open_workspace

CHIEF, DEPUTY, ANN = "chief@example.org", "deputy@example.org", "ann@example.org"
OTHER = {"ham": "spam", "spam": "ham"}
REVIEWS = 2
"""The number of the review project at the simulated oracle."""


def event(kind: str, who: str, label: str | None, item: str = "a", key: str = "", number: int = 0) -> Event:
    key = key or f"w:0000:{item}#u.{who}"
    return Event(f"{kind} {who} {label} {key} {number}", kind, item, f"hash {item}", "pool", 0, key, who, label)  # type: ignore[arg-type]


def ruling(who: str, label: str | None, item: str = "a", number: int = 1) -> Event:
    return event("adjudicate", who, label, item, f"w.review:{number:06d}:{item}#r.{who}", number)


# Pure ---------------------------------------------------------------------------------------------------------------


candidate_lists = st.lists(
    st.builds(
        Candidate,
        st.integers(0, 999).map(str),
        st.integers(0, 999).map(str),
        st.sampled_from(["pool", "test"]),
        st.floats(0, 1),
        st.none() | st.floats(0, 1),
        st.floats(0, 1),
    ),
    max_size=30,
    unique_by=lambda one: one.item_id,
)


@given(candidate_lists, st.integers(0, 20), st.randoms(use_true_random=False))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_a_review_takes_those_most_in_doubt_and_the_sample_in_turn(found: Any, size: int, draw: Any) -> None:
    sample = draw.sample([one.item_id for one in found], len(found) // 2)
    chosen = choose(found, sample, size)
    ids = [one.candidate.item_id for one in chosen]
    assert len(ids) == len(set(ids)) <= size
    of_sample = [one for one in chosen if one.reason == "sample"]
    doubted = [one for one in chosen if one.reason != "sample"]
    assert {one.candidate.item_id for one in of_sample} <= set(sample) and all(one.score == 0 for one in of_sample)
    assert all(one.score == one.candidate.doubt()[0] >= 0.1 for one in doubted)
    left = [one for one in found if one.item_id not in ids]
    if len(chosen) < size:
        assert not set(sample) - set(ids), "there was room"
        assert all(one.doubt()[0] < 0.1 for one in left)
    elif doubted:
        assert max((one.doubt()[0] for one in left), default=0) <= min(one.score for one in doubted)
    assert set(choose(list(reversed(found)), sample, size)) == set(chosen), "the order of the candidates is nothing"


def test_what_reviewers_see_names_nobody() -> None:
    about = [
        event("import", "import", "ham", key="import:x"),
        event("label", "ann", "ham"),
        event("skip", "bob", None),
        ruling(CHIEF, "spam"),
    ]
    assert shown_answers(about) == {"A": "ham", "B": "(skipped)"}
    assert shown_answers(about[:1]) == {"imported": "ham"}
    assert shown_answers([]) == {}


def test_the_newest_ruling_is_the_ruling() -> None:
    votes = [event("label", "ann", "ham"), event("label", "bob", "ham", number=1)]
    (only,) = rulings([*votes, ruling(CHIEF, "spam"), ruling(DEPUTY, "ham", number=2)])
    assert (only.label, only.by, only.given, only.independent) == ("ham", DEPUTY, "ham", True)
    assert only.contradicts == ("spam",), "two reviewers differ, and it is told"
    assert rulings([*votes, ruling(CHIEF, None)]) == [], "a review without a ruling"
    gold = event("gold", "boss", "spam", key="gold:a")
    assert rulings([*votes, gold, ruling(CHIEF, "ham")])[0].contradicts == ("spam",)


def test_answers_drawn_at_random_give_the_error_rate_of_a_person() -> None:
    events = [
        event("label", "ann", "ham"),
        event("label", "bob", "spam"),
        event("label", CHIEF, "ham"),
        ruling(CHIEF, "spam"),
        event("label", "ann", "ham", "b"),
        event("label", "bob", "ham", "b"),
        ruling(CHIEF, "ham", "b"),
        event("label", "ann", "ham", "c"),
        ruling(CHIEF, "spam", "c"),
    ]
    found = {one.item_id: one for one in rulings(events)}
    reasons = {"a": {"sample"}, "b": {sample_of("bob")}, "c": {"conflict"}}
    assert checked_answers(events, found, reasons) == {"ann": (1, 1), "bob": (0, 2)}, "chosen for doubt, or one's own"


def test_a_ruling_belongs_to_no_round() -> None:
    votes = [event("label", "ann", "ham"), ruling(CHIEF, "spam")]
    assert [Selection(round=0).matches(one) for one in votes] == [True, False]
    assert [Selection(item="a").matches(one) for one in votes] == [True, True]


def test_a_reviewer_cannot_check_oneself() -> None:
    own = [event("label", CHIEF, "ham"), ruling(CHIEF, "ham")]
    assert not rulings(own)[0].independent
    assert rulings([*own, event("label", "ann", "ham")])[0].independent


def test_error_rates_are_of_the_labels_that_the_consensus_gave() -> None:
    """A tie that the people's error rates decided is a label like others, also once it has been ruled on."""
    known = [f"known-{number}" for number in range(12)]
    votes = [
        event("label", who, "ham" if who != "bob" or place % 2 else "spam", item)
        for place, item in enumerate(known)
        for who in ("ann", "bob", "carl")
    ]
    votes += [event("label", "ann", "ham", "b"), event("label", "bob", "spam", "b"), ruling(CHIEF, "spam", "b")]
    text = template("params.yaml").replace("consensus: majority", "consensus: dawid_skene")
    found = figures_of(parse_params(text), votes, [task_of("b")], dict)
    assert (found.rates["pool"].labels, found.changed) == (13, 1)
    found = figures_of(parse_params(template("params.yaml")), votes, [task_of("b")], dict)
    assert (found.rates["pool"].labels, found.changed) == (12, 0), "of a tie without a label no ruling changes one"


def task_of(item: str) -> PlannedTask:
    key = f"w.review:000001:{item}"
    return PlannedTask(key, item, content_hash(item), "pool", 0, 0, 0.0, "sample", 1.0)


def test_the_part_of_the_sample_that_was_drawn() -> None:
    assert sample_drawn(["a", "b", "c", "d"], {"c", "a"}) == ["a", "b", "c"] and sample_drawn(["a"], set()) == []


def test_parameters_at_their_defaults_leave_records_as_they_were() -> None:
    params = parse_params(template("params.yaml"))
    assert params.quality == CHECKED and not params.reviewers
    assert not {"quality", "reviewers"} & recorded(params).keys()
    changed = parse_params(template("params.yaml").replace("reviewers: []", "reviewers: [chief@example.org]"))
    assert recorded(changed)["reviewers"] == ["chief@example.org"]


# On real git and DVC ------------------------------------------------------------------------------------------------

pytestmark: list[Any] = []


def reviewed(workspace: Workspace, oracle: Any, **how: Any) -> ReviewReport:
    with open_dvc(workspace.layout) as dvc:
        return review(workspace, dvc, lambda: oracle, **how)


def rule(oracle: SimulatedOracle, labels: dict[str, str], who: str = CHIEF) -> dict[str, int]:
    """Answer every review task with the label of `labels`; annotation ids by item."""
    return {
        item: oracle.answer(key, who, labels[item], REVIEWS)
        for key in oracle.queue(who, REVIEWS)
        if (item := key.rsplit(":", 1)[1])
    }


@pytest.fixture
def world(twice: Played, tmp_path: Path) -> tuple[Workspace, SimulatedOracle, dict[str, str]]:
    """Two published rounds, with reviewers; round 2 is open."""
    workspace, oracle, truth = go_on(twice, tmp_path)
    change_params(
        workspace, {"reviewers: []": f"reviewers: [{CHIEF}, {DEPUTY}]", "review_sample: 50": "review_sample: 6"}
    )
    return open_workspace(workspace.layout.root), oracle, dict(truth)


def close_round(workspace: Workspace, oracle: SimulatedOracle, truth: dict[str, str]) -> None:
    answer_all(oracle, truth)
    tick(open_workspace(workspace.layout.root), lambda: oracle)


@pytest.mark.slow
def test_a_review_from_the_first_task_to_the_revoked_ruling(world: Any) -> None:
    workspace, oracle, truth = world
    layout = workspace.layout
    first = reviewed(workspace, oracle, size=8)
    assert first.waiting == sum(first.added.values()) == 8 and first.added["sample"] >= 4
    shown = [task.data for task in oracle.projects[REVIEWS].tasks.values()]
    assert all(data["al_score"] == 0 and data["al_answers"] for data in shown)
    assert not {"strategy", "reason", "al_strategy"} & {key for data in shown for key in data}
    assert Git(layout.root).changed([layout.rounds]) == [], "plan and project are committed"
    again = reviewed(workspace, oracle, size=8)
    assert not again.added and again.waiting == 8 and len(oracle.projects[REVIEWS].tasks) == 8

    labels = {row.item_id: row.label for row in (*read_labeled(layout.labeled), *read_labeled(layout.test_labels))}
    tasks = read_reviews(layout)
    wrong = next(task.item_id for task in tasks if task.part == "pool")
    numbers = rule(oracle, {**labels, wrong: OTHER[labels[wrong]]})
    stranger = oracle.queue("stranger@example.org", REVIEWS)
    assert stranger == []
    found = reviewed(workspace, oracle, size=8)
    assert found.pulled == 8 and found.figures.ruled == 8 and found.figures.changed == 1
    assert {e.type for e in read_events(layout.inbox_events) if is_of_review(e.annotation_key)} == {"adjudicate"}
    rate = found.figures.rates["pool"]
    assert rate.reviewed and rate.rate.low is not None and rate.rate.low <= rate.wrong / rate.reviewed

    oracle.edit(numbers[wrong], OTHER[labels[wrong]], project_id=REVIEWS)  # the same again, as another version
    close_round(workspace, oracle, truth)
    assert {row.item_id: row.label for row in read_labeled(layout.labeled)}[wrong] == OTHER[labels[wrong]]
    said = status(workspace, ask=False)
    assert said.review is not None and said.review.ruled == 8 and said.to_json()["review"]["rates"]["pool"]["labels"]

    of_test = next(task.item_id for task in tasks if task.part == "test")
    oracle.edit(numbers[of_test], OTHER[labels[of_test]], project_id=REVIEWS)
    close_round(workspace, oracle, truth)
    record = read_history(layout, Git(layout.root)).rounds[-1]
    assert record.review is not None and record.review.rulings == 8 and record.review.test.labels
    report = report_data(workspace)
    assert report.recomputed and report.test_version.startswith(record.hashes["test_labels"][:8])
    assert len({row.metrics.items for row in report.history}) == 1, "one test set for the whole curve"
    page = render(report)
    assert "Reviewed labels" in page and f"version {report.test_version}" in page and "measured anew" in page
    assert read_history(layout, Git(layout.root)).rounds[0].review is None

    with open_dvc(layout) as dvc:
        rollback(workspace, dvc, 1, labels=True, model=False, params=False, reason="")
    close_round(workspace, oracle, truth)
    assert {row.item_id: row.label for row in read_labeled(layout.labeled)}[wrong] == OTHER[labels[wrong]], "it stays"

    with open_dvc(layout) as dvc:
        amend(workspace, dvc, "revoke", Selection(annotator=CHIEF, item=wrong), "")
    tick(open_workspace(layout.root), lambda: oracle)
    assert {row.item_id: row.label for row in read_labeled(layout.labeled)}[wrong] == labels[wrong]
    assert review_figures(workspace).ruled == 7
    with open_dvc(layout) as dvc:
        rollback(workspace, dvc, 1, labels=True, model=False, params=False, reason="")
    tick(open_workspace(layout.root), lambda: oracle)
    assert {row.item_id: row.label for row in read_labeled(layout.labeled)}[wrong] == labels[wrong], "still revoked"


@pytest.mark.slow
def test_only_reviewers_rule_and_a_removed_one_keeps_what_was_ruled(world: Any) -> None:
    workspace, oracle, _ = world
    layout = workspace.layout
    reviewed(workspace, oracle, size=4)
    keys = oracle.queue(CHIEF, REVIEWS)
    oracle.answer(keys[0], ANN, "ham", REVIEWS)  # an annotator, who is no reviewer
    oracle.skip(keys[1], CHIEF, REVIEWS)
    oracle.answer(keys[2], DEPUTY, "spam", REVIEWS)
    found = reviewed(workspace, oracle, size=4)
    assert found.refused == {"annotator not allowed": 1} and found.figures.ruled == 1 and found.figures.without == 1
    assert found.waiting == 4 and sum(found.added.values()) == 3, "the refused one and two new ones, not the skip"
    skipped = keys[1].rsplit(":", 1)[1]
    assert skipped not in {key.rsplit(":", 1)[1] for key in oracle.queue(CHIEF, REVIEWS)}
    change_params(workspace, {f"reviewers: [{CHIEF}, {DEPUTY}]": f"reviewers: [{CHIEF}]"})
    workspace = open_workspace(layout.root)
    assert reviewed(workspace, oracle).figures.ruled == 1
    counted = active(read_events(layout.events, layout.inbox_events))
    assert [one.by for one in rulings(counted)] == [DEPUTY]


@pytest.mark.slow
def test_a_tick_pulls_rulings_and_fills_up_if_it_should(world: Any) -> None:
    workspace, oracle, _ = world
    layout = workspace.layout
    tick(workspace, lambda: oracle)
    assert list(oracle.projects) == [1], "no review project unless somebody asks for a review"
    change_params(workspace, {"review_each_tick: false": "review_each_tick: true", "review_size: 20": "review_size: 3"})
    workspace = open_workspace(layout.root)
    assert tick(workspace, lambda: oracle).changed and len(oracle.queue(CHIEF, REVIEWS)) == 3
    assert not tick(workspace, lambda: oracle).changed, "a second tick finds nothing to do"
    oracle.answer(oracle.queue(CHIEF, REVIEWS)[0], CHIEF, "ham", REVIEWS)
    assert tick(workspace, lambda: oracle).changed
    assert review_figures(workspace).ruled == 1 and len(oracle.queue(CHIEF, REVIEWS)) == 3
    del oracle.projects[REVIEWS]
    report = tick(workspace, lambda: oracle)
    assert any("rulings were not pulled" in warning for warning in report.warnings), "rounds go on"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "moment"), [("ensure_project", "after"), ("import_tasks", "before"), ("import_tasks", "after")]
)
def test_a_review_that_is_interrupted_is_finished_by_the_next(world: Any, call: str, moment: str) -> None:
    workspace, oracle, _ = world
    seen = []

    def strike(name: str, when: str) -> None:
        if (name, when) == (call, moment) and not seen:
            seen.append(name)
            raise KeyboardInterrupt

    oracle.fault = strike
    with pytest.raises(KeyboardInterrupt):
        reviewed(workspace, oracle, size=5)
    oracle.fault = None
    found = reviewed(workspace, oracle, size=5)
    assert found.waiting == 5 and len(oracle.queue(CHIEF, REVIEWS)) == 5 and len(oracle.projects) == REVIEWS
    assert len({task.push_key for task in read_reviews(workspace.layout)}) == 5


@pytest.mark.slow
def test_what_cannot_be_reviewed_says_why(world: Any) -> None:
    workspace, oracle, _ = world
    layout = workspace.layout
    with pytest.raises(NothingToDo, match="no answer of 'nobody@example.org' to review"):
        reviewed(workspace, oracle, annotator="nobody@example.org")
    found = reviewed(workspace, oracle, annotator=ANN.upper(), size=3)
    assert found.added == {f"sample of {ANN}": 3}
    (first, *_), before = oracle.queue(CHIEF, REVIEWS), found.figures.people
    oracle.answer(first, CHIEF, "ham", REVIEWS)
    (person,) = reviewed(workspace, oracle).figures.people
    assert not before and (person.annotator, person.reviewed) == (ANN, 1) and person.rate.low is not None
    oracle.fault = lambda name, when: (_ for _ in ()).throw(LabelStudioDown("down"))
    with pytest.raises(LabelStudioDown):
        reviewed(workspace, oracle)
    oracle.fault = None
    path = min(layout.reviews.glob("*.jsonl"))
    text = path.read_text()
    path.write_text(text.replace(f"sample of {ANN}", "conflict"))
    with pytest.raises(UnexpectedChange, match="must not be edited"):
        reviewed(workspace, oracle)
    path.write_text(json.dumps({"item_id": 1}))
    with pytest.raises(UnexpectedChange, match=r"rounds/reviews/000001.jsonl:1 is not a task"):
        read_reviews(layout)
    path.write_text(text)
    change_params(workspace, {f"reviewers: [{CHIEF}, {DEPUTY}]": "reviewers: []"})
    with pytest.raises(UsageError, match="nobody is a reviewer"):
        reviewed(open_workspace(layout.root), oracle)
    assert Options()  # ticks go on without reviewers
    tick(open_workspace(layout.root), lambda: oracle)


# On a real Label Studio ---------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.slow
def test_a_reviewer_at_a_real_label_studio(label_studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token of their own, and with a comment; a stranger's ruling is refused."""
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", label_studio.token)
    chief, ann = "chief.review@example.com", "ann.review@example.com"
    changes = {
        "test_size: 12": "test_size: 0",
        "seed_size: 10": "seed_size: 12",
        "reviewers: []": f"reviewers: [{chief}]",
    }
    workspace, truth = small_workspace(tmp_path, 30, changes)
    tokens = {who: {"Authorization": f"Token {label_studio.invite(who)}"} for who in (chief, ann)}
    try:
        tick(workspace, lambda: connect(workspace))
        project = read_json(workspace.layout.project)["project_id"]
        with httpx.Client(base_url=label_studio.url, headers=tokens[ann], timeout=60, trust_env=False) as http:
            rows = http.get("/api/tasks", params={"project": project, "page_size": 100}).json()["tasks"]
            for row in rows:
                content = {"result": choice_result(truth[row["data"]["item_id"]]), "lead_time": 4.0}
                http.post(f"/api/tasks/{row['id']}/annotations/", json=content).raise_for_status()
        workspace = open_workspace(workspace.layout.root)
        tick(workspace, lambda: connect(workspace))
        with open_dvc(workspace.layout) as dvc:
            found = review(workspace, dvc, lambda: connect(workspace), size=3)
        reviews = read_json(workspace.layout.review_project)["project_id"]
        assert found.waiting == 3 and found.page == f"{label_studio.url}/projects/{reviews}/data" and reviews != project

        ruled = {}
        with httpx.Client(base_url=label_studio.url, headers=tokens[chief], timeout=60, trust_env=False) as http:
            config = http.get(f"/api/projects/{reviews}/").json()
            assert "<Table" in config["label_config"] and config["maximum_annotations"] == 1
            for number in range(2):
                task = http.get(f"/api/projects/{reviews}/next").json()
                label = truth[task["data"]["item_id"]]
                assert task["data"]["al_answers"] == {"A": label} and not task["predictions"]
                said = {
                    "from_name": "al_comment",
                    "to_name": "text",
                    "type": "textarea",
                    "value": {"text": ["It is", "so"]},
                }
                result = [*choice_result(OTHER[label]), *([said] if number else [])]
                http.post(f"/api/tasks/{task['id']}/annotations/", json={"result": result}).raise_for_status()
                ruled[task["data"]["item_id"]] = OTHER[label]
        with httpx.Client(base_url=label_studio.url, headers=tokens[ann], timeout=60, trust_env=False) as http:
            task = http.get(f"/api/projects/{reviews}/next").json()
            content = {"result": choice_result("ham")}
            http.post(f"/api/tasks/{task['id']}/annotations/", json=content).raise_for_status()
        with open_dvc(workspace.layout) as dvc:
            found = review(workspace, dvc, lambda: connect(workspace), size=3)
        assert found.pulled == 2 and found.refused == {"annotator not allowed": 1} and found.figures.changed == 2
        events = [event for event in read_events(workspace.layout.inbox_events) if event.type == "adjudicate"]
        assert {event.item_id: event.label for event in events} == ruled
        assert [event.reason for event in events] == [None, "It is so"] and events[0].annotator == chief
        assert events[0].created_at and len(found.added) == 1 and found.waiting == 3
    finally:
        leave(label_studio, workspace)
