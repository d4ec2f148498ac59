"""Adaptive overlap, and labels by consensus, in whole rounds: who is asked again, and what is published."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from harness import change_params, small_workspace
from msgspec.structs import replace
from test_quality import leave

from al_pipeline.annotation.aggregation import fold, fold_by
from al_pipeline.annotation.confidence import ConsensusRule, in_full
from al_pipeline.annotation.overlap import Overlap, wanted_answers
from al_pipeline.annotation.tasks import standing
from al_pipeline.data.ledger import append_forecasts, append_part, read_forecasts
from al_pipeline.data.outputs import read_labeled, write_labeled
from al_pipeline.errors import BadInput, BadParams
from al_pipeline.files import read_json, sha256_file
from al_pipeline.integrations.label_studio.payloads import choice_result
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import publish
from al_pipeline.operations.close import first_forecasts
from al_pipeline.operations.connect import connect
from al_pipeline.operations.facts import open_dvc, read_facts
from al_pipeline.operations.history import History
from al_pipeline.operations.intervene import rollback
from al_pipeline.operations.overlap import forecasts_at_close, within_room
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import TickReport, tick
from al_pipeline.params import parse_params, recorded
from al_pipeline.records import Event, LabeledItem, ModelForecast, PlannedTask, push_key
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import template
from al_pipeline.workspace.workspace import open_workspace

LABELS = ("ham", "spam")
RULE = ConsensusRule("auto")
PEOPLE = ("ann@example.org", "bob@example.org", "cid@example.org", "dan@example.org")
ASK = Overlap(1, 3, 0.9)


def task(item: str = "a", number: int = 1, **more: Any) -> PlannedTask:
    key = push_key("ws", number, item)
    return PlannedTask(key, item, f"text of {item}", "pool", number, 0, 0.5, "margin", 1.0, **more)


def said(who: str, label: str | None, item: str = "a", number: int = 1, kind: Any = None, part: Any = "pool") -> Event:
    key = f"{push_key('ws', number, item)}#{who}.1"
    kind = kind or ("skip" if label is None else "label")
    return Event(f"{who} {item} {number} {label}", kind, item, f"text of {item}", part, number, key, who, label)


def careful(items: int = 60, people: Sequence[str] = ("ann", "bob", "cid")) -> list[Event]:
    """Answers of people who agree, to items of an earlier round: the accuracy of everybody is known to be high."""
    return [
        said(who, LABELS[number % 2], f"old {number:03d}", 0)
        for number in range(items)
        for who in people[number % 2 : number % 2 + 2]
    ]


def wanted(
    events: Sequence[Event],
    everybody: int | None = None,
    overlap: Overlap = ASK,
    rule: ConsensusRule = RULE,
) -> dict[str, int]:
    return wanted_answers([task()], events, LABELS, rule, overlap, everybody)


def test_an_unsure_label_wants_one_person_more_and_a_sure_one_nobody() -> None:
    key = task().push_key
    assert wanted([said("ann", "spam"), said("bob", "ham", "b")]) == {key: 2}, "nothing is known of ann"
    assert wanted([*careful(), said("ann", "spam")]) == {}
    assert wanted([*careful(), said("ann", "spam"), said("bob", "ham")]) == {key: 3}
    assert wanted([*careful(), said("ann", "spam"), said("bob", "ham"), said("cid", "ham")]) == {}
    assert wanted([]) == {}, "an unanswered task is open as it is"


def test_a_model_that_differs_makes_a_label_unsure() -> None:
    events = [*careful(), *(said("dan", LABELS[n % 2], f"old {n:03d}", 0) for n in range(20)), said("ann", "spam")]
    told = {f"old {number:03d}": {LABELS[number % 2]: 0.9} for number in range(60)}
    assert wanted(events, rule=ConsensusRule("auto", {**told, "a": {"spam": 0.8}})) == {}
    assert wanted(events, rule=ConsensusRule("auto", {**told, "a": {"ham": 0.999}})) == {task().push_key: 2}


@pytest.mark.parametrize(
    ("more", "everybody", "overlap"),
    [
        ([], 1, ASK),
        ([], None, Overlap(1, 1, 0.9)),
        ([], None, Overlap(1, 3, 0.0)),
        ([said("bob", "spam", kind="adjudicate")], None, ASK),
        ([said("bob", None), said("cid", None)], 9, ASK),
        ([said("bob", None)], 2, ASK),
        ([said("bob", "ham"), said("cid", "spam"), said("dan", "ham")], 9, Overlap(1, 3, 0.999)),
    ],
    ids=["nobody else", "at most one", "off", "ruled", "skipped", "the other one skipped", "three people"],
)
def test_nobody_is_asked_where_it_is_of_no_use(more: list[Event], everybody: int | None, overlap: Overlap) -> None:
    events = [said("ann", "spam"), *more]
    assert wanted(events, everybody=everybody, overlap=overlap) == {}
    assert standing([task()], events, 1, everybody)[task().push_key] == "answered"


def test_one_person_alone_is_not_waited_for() -> None:
    assert wanted([said("ann", "spam")]) == {}
    assert wanted([said("ann", "spam")], everybody=2) == {task().push_key: 2}


def test_a_task_that_wants_more_is_open() -> None:
    events = [said("ann", "spam")]
    assert standing([task()], events, 1, 2, {task().push_key: 2}) == {task().push_key: "open"}
    assert standing([task()], [*events, said("bob", "ham")], 1, 2, {}) == {task().push_key: "answered"}


# The fold ------------------------------------------------------------------------------------------------------------


def rows(events: Sequence[Event], rule: ConsensusRule | None = RULE) -> dict[str, LabeledItem]:
    found = fold(events, LABELS, rule=rule)
    return {row.item_id: row for row in (*found.labeled, *found.test)}


def test_binding_answers_win_and_are_certain() -> None:
    votes = [said("ann", "spam"), said("bob", "spam"), said("cid", "spam")]
    for kind in ("adjudicate", "gold"):
        row = rows([*careful(), *votes, said("boss", "ham", kind=kind)])["a"]
        assert (row.label, row.confidence) == ("ham", 1.0)
    imported = Event("i", "import", "z", "text", "pool", -1, "import:z", "import", "ham")
    assert rows([imported])["z"].confidence == 1.0
    person = replace(said("ann", "spam", "z"), content_hash="text")
    assert rows([imported, person])["z"].label == "spam", "a person outweighs the import"


def test_a_model_may_decide_between_people_and_not_against_all_of_them() -> None:
    told = {f"old {number:03d}": {LABELS[number % 2]: 0.95} for number in range(60)}
    rule = ConsensusRule("auto", {**told, "a": {"ham": 0.95}})
    row = rows([*careful(), said("ann", "spam"), said("bob", "ham")], rule)["a"]
    assert row.label == "ham" and row.agreement == 0.5 and row.confidence is not None and row.confidence > 0.8
    row = rows([*careful(), said("ann", "spam")], ConsensusRule("auto", {**told, "a": {"ham": 0.9999}}))["a"]
    assert row.label == "spam" and row.confidence is not None and row.confidence < 0.5


def test_only_as_many_are_asked_again_as_the_budget_has_room_for() -> None:
    more = {"b": 2, "a": 3, "c": 2}
    assert within_room(more, None) == more
    assert list(within_room(more, 2)) == ["b", "a"] and within_room(more, 0) == {}


def test_a_forecast_that_breaks_a_tie_is_not_measured_by_it(tmp_path: Path) -> None:
    """The running accuracy is that of people's labels, not of those that the forecast itself has decided."""
    root = tmp_path / "ws"
    layout = Layout(root)
    text = template("params.yaml").replace("consensus: majority", "consensus: crowdlab")
    params = parse_params(text, "params.yaml")
    first, second = params.schema_.labels[:2]
    people = [said("ann", first), said("bob", second)]
    layout.events.mkdir(parents=True)
    append_part(layout.events, people)
    forecasts = {"a": ModelForecast({first: 0.9})}
    decided = fold_by(params, people, lambda: forecasts).labeled
    assert [row.label for row in decided] == [first], "the forecast breaks the tie"
    plan = {"k": replace(task(predicted=first, confidence=0.9), strategy="random_slice")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "read_plans", lambda _: plan)
        running = publish._running(layout, decided, None, SimpleNamespace(abandoned={}, rounds=()), params, 1)  # type: ignore[arg-type]
    assert running is None or running.whole.answered == 0


def test_forecasts_have_no_influence_on_the_test_set() -> None:
    events = [*careful(), said("ann", "spam", "t", part="test"), said("bob", "ham", "t2", part="test")]
    events += [said("cid", "spam", "t2", part="test"), said("ann", "spam")]
    told = {f"old {number:03d}": {LABELS[number % 3 % 2]: 0.99} for number in range(60)}
    told |= {"t": {"ham": 0.999}, "t2": {"ham": 0.999}, "a": {"ham": 0.9}}
    plain, with_model = fold(events, LABELS, rule=RULE), fold(events, LABELS, rule=ConsensusRule("auto", told))
    assert plain.test == with_model.test and plain.labeled != with_model.labeled
    assert [row for row in plain.unresolved if row.part == "test"] == [
        row for row in with_model.unresolved if row.part == "test"
    ]


def test_the_majority_with_confidence_has_the_labels_of_the_majority() -> None:
    events = [*careful(), said("ann", "spam"), said("bob", "ham"), said("cid", "ham"), said("ann", "ham", "b")]
    plain, sure = rows(events, None), rows(events, ConsensusRule("majority"))
    assert {item: (row.label, row.agreement, row.answers, row.round) for item, row in plain.items()} == {
        item: (row.label, row.agreement, row.answers, row.round) for item, row in sure.items()
    }
    assert all(row.confidence is None for row in plain.values())
    assert all(row.confidence is not None for row in sure.values())


# Files ---------------------------------------------------------------------------------------------------------------


def test_labels_without_confidence_have_the_bytes_of_before(tmp_path: Path) -> None:
    row = LabeledItem("a", "text", "ham", 1.0, 1, 0)
    write_labeled(tmp_path / "plain", [row])
    assert read_labeled(tmp_path / "plain") == [row]
    columns = ["item_id", "content_hash", "label", "agreement", "answers", "round"]
    assert pq.read_schema(tmp_path / "plain").names == columns
    sure = replace(row, confidence=0.75)
    write_labeled(tmp_path / "sure", [sure])
    assert read_labeled(tmp_path / "sure") == [sure]
    assert pq.read_schema(tmp_path / "sure").names == [*columns, "confidence"]
    assert "proba" not in task().to_row(), "nor has a plan another key"
    row_of_params = recorded(parse_params(template("params.yaml")))
    assert "labels" not in row_of_params and "max_overlap" not in row_of_params["round"], "nor a record"


def test_forecasts_are_those_of_the_first_choice(tmp_path: Path) -> None:
    plans = [
        task("a", 3, predicted="spam", confidence=0.9),
        task("a", 1, predicted="ham", confidence=0.7),
        task("b", 0),
        task("b", 2, predicted="ham", confidence=0.7),
        task("c", 2, predicted="ham", confidence=0.7, proba=(("ham", 0.7), ("spam", 0.3))),
    ]
    found = first_forecasts(plans, {2: 7})
    assert found == {
        "a": ModelForecast({"ham": 0.7}), "c": ModelForecast({"ham": 0.7, "spam": 0.3}, 7)
    }, "b's second choice may know its answer"  # fmt: skip
    for _ in range(2):
        append_forecasts(tmp_path, found)
    later = ModelForecast({"spam": 1.0}, 9)
    append_forecasts(tmp_path, {"a": later, "d": later})
    assert len(list(tmp_path.iterdir())) == 2
    assert read_forecasts(tmp_path) == {**found, "d": later}
    (tmp_path / "forecasts-000009.jsonl").write_text('{"item_id": "e", "proba": {"ham": 2}}\n')
    with pytest.raises(BadInput, match="forecasts-000009.jsonl:1"):
        read_forecasts(tmp_path)
    (tmp_path / "forecasts-000009.jsonl").write_text('{"item_id": "e", "proba": {"ham": 1}, "known": -1}\n')
    with pytest.raises(BadInput, match="`known` must be a number of events"):
        read_forecasts(tmp_path)


def test_the_open_round_and_its_close_agree_about_forecasts(tmp_path: Path) -> None:
    """`a` was asked first without a model, and nobody answered: its later forecast takes no part, now or later."""
    later = [task(item, 1, predicted="ham", confidence=0.9) for item in "abc"]
    append_forecasts(tmp_path / "data/events", {"c": ModelForecast({"spam": 0.6}, 3)})
    history = History("HEAD", None, (), 1, ())
    found = forecasts_at_close(Layout(tmp_path), history, lambda: [task("a", 0), *later])
    assert found == {"b": ModelForecast({"ham": 0.9}), "c": ModelForecast({"spam": 0.6}, 3)}
    assert first_forecasts([task("a", 0), *later], {}).keys() == {"b", "c"}


def test_a_forecast_of_an_older_schema_is_spread_over_the_new_classes() -> None:
    full = in_full({"a": {"ham": 0.8}, "b": {"gone": 1.0}, "c": {"ham": 0.5, "gone": 0.3}}, ("ham", "spam", "new"))
    assert full["a"] == pytest.approx([0.8, 0.1, 0.1])
    assert "b" not in full
    assert full["c"] == pytest.approx([0.5 / 0.7, 0.1 / 0.7, 0.1 / 0.7])


def test_parameters_that_contradict_each_other() -> None:
    text = template("params.yaml").replace("min_confidence: 0 ", "min_confidence: 0.9 ")
    assert parse_params(text).labels.have_confidence
    with pytest.raises(BadParams, match=r"round.max_overlap 3 is below round.overlap 5"):
        parse_params(text.replace("overlap: 1 ", "overlap: 5 "))
    weighed = text.replace("weigh_by_confidence: false ", "weigh_by_confidence: true ")
    assert parse_params(weighed).train.weigh_by_confidence
    with pytest.raises(BadParams, match=r"train.weigh_by_confidence needs confidences"):
        parse_params(weighed.replace("min_confidence: 0.9 ", "min_confidence: 0 "))
    with pytest.raises(BadParams, match=r"train.weigh_by_confidence needs train.model head"):
        parse_params(weighed.replace("model: head ", "model: centroid "))
    with pytest.raises(BadParams, match=r"labels.consensus"):
        parse_params(template("params.yaml").replace("consensus: majority ", "consensus: mean "))


# Rounds --------------------------------------------------------------------------------------------------------------

ADAPTIVE = {
    "consensus: majority ": "consensus: auto ",
    "min_confidence: 0 ": "min_confidence: 0.9 ",
    "quorum: 0.9 ": "quorum: 1.0 ",
    "test_size: 12": "test_size: 6",
}


class Team:
    """A workspace whose people answer what the fake of Label Studio asks them, one now and then wrongly."""

    def __init__(self, folder: Path) -> None:
        self.workspace, self.truth = small_workspace(folder, 40, ADAPTIVE)
        self.oracle = SimulatedOracle()

    def tick(self, **more: Any) -> TickReport:
        self.workspace = open_workspace(self.workspace.layout.root)
        return tick(self.workspace, lambda: self.oracle, **more)

    def answer(self, key: str, who: int) -> None:
        item = key.rsplit(":", 1)[1]
        wrong = who == 3 and sum(map(ord, item)) % 3 == 0
        right = self.truth[item]
        self.oracle.answer(key, PEOPLE[who], right if not wrong else ("ham" if right == "spam" else "spam"))

    def held(self) -> Counter[str]:
        return Counter(
            str(held.data["push_key"]) for held in self.oracle.projects[1].tasks.values() for _ in held.annotations
        )


@pytest.mark.slow
def test_a_round_asks_again_while_labels_are_unsure(tmp_path: Path) -> None:
    team = Team(tmp_path)
    team.tick()
    first = team.oracle.queue(PEOPLE[0])
    for number, key in enumerate(first):
        team.answer(key, number % 4)
    assert not any(team.oracle.queue(who) for who in PEOPLE), "everybody has answered what was asked"
    report = team.tick()
    assert report.round == 0 and not report.published, "labels of unknown people are not sure enough"
    facts, _ = read_facts(team.workspace)
    assert facts.asked_again == len(first) and facts.settled == 0
    assert f"{len(first)} by another person" in status(team.workspace, ask=False).next
    again = {who: team.oracle.queue(who) for who in PEOPLE}
    assert set().union(*again.values()) == set(first)
    assert first[0] not in again[PEOPLE[0]], "never the same person"
    before = [(one.task_id, one.updated_at) for one in team.oracle.projects[1].tasks.values()]
    assert not team.tick().changed
    assert [(one.task_id, one.updated_at) for one in team.oracle.projects[1].tasks.values()] == before, "asked once"
    rounds = 0
    while not (report := team.tick()).published:
        rounds += 1
        for who in range(4):
            for key in team.oracle.queue(PEOPLE[who]):
                if key in team.oracle.queue(PEOPLE[who]):
                    team.answer(key, who)
        assert rounds < 30
    labeled = read_labeled(team.workspace.layout.labeled)
    assert all(row.confidence is not None and row.answers <= 3 for row in labeled)
    most = max(team.held().values())
    assert most <= 4 and sum(team.held().values()) < 3 * len(first), "fewer answers than three for each"
    record = read_json(team.workspace.layout.record(0))
    assert record["params"]["labels"] == {"consensus": "auto", "min_confidence": 0.9}
    assert record["answers"]["answered"] == record["answers"]["tasks"]

    plan = list(map(json.loads, team.workspace.layout.plan(1).read_text("utf-8").splitlines()))
    asked = [row for row in plan if row["part"] == "pool"]
    assert all(abs(sum(share for _, share in row["proba"]) - 1) < 0.02 for row in asked)
    assert all("proba" not in row for row in plan if row["part"] == "test")
    while not (report := team.tick()).published:
        for who in range(4):
            for key in team.oracle.queue(PEOPLE[who]):
                if key in team.oracle.queue(PEOPLE[who]):
                    team.answer(key, who)
    forecasts = read_forecasts(team.workspace.layout.events)
    assert forecasts.keys() == {row["item_id"] for row in asked}
    assert [one.difference for one in reproduce(team.workspace, [1])] == [None]

    labels = sha256_file(team.workspace.layout.labeled)
    with open_dvc(team.workspace.layout) as dvc:
        rollback(team.workspace, dvc, 0, labels=True, model=False, params=False, reason="a test")
    team.tick()
    assert (
        read_labeled(team.workspace.layout.labeled) == labeled and sha256_file(team.workspace.layout.labeled) != labels
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_while_tasks_are_asked_again_does_no_harm(tmp_path: Path, moment: str) -> None:
    team = Team(tmp_path)
    team.tick()
    for number, key in enumerate(team.oracle.queue(PEOPLE[0])):
        team.answer(key, number % 2)

    def kill(call: str, when: str) -> None:
        if (call, when) == ("ask_more", moment):
            raise KeyboardInterrupt

    team.oracle.fault = kill
    with pytest.raises(KeyboardInterrupt):
        team.tick()
    team.oracle.fault = None
    team.tick()
    tasks = team.oracle.projects[1].tasks.values()
    assert {one.overlap for one in tasks} == {2} and all(len(one.annotations) == 1 for one in tasks)
    if moment == "before":
        return
    assert len(team.oracle.queue(PEOPLE[2])) == len(tasks)
    given = team.held().total()
    change_params(team.workspace, {"labels: 0 ": f"labels: {given} ", "min_labels: 1\n": "min_labels: 99\n"})
    report = team.tick()
    assert f"the budget of labels ({given} of {given}) is spent" in report.waits_for
    assert team.oracle.queue(PEOPLE[2]) == [], "a budget that was lowered withdraws what was asked again"
    change_params(team.workspace, {f"labels: {given} ": f"labels: {given + 3} "})
    team.tick()
    assert len(team.oracle.queue(PEOPLE[2])) == 3, "and a higher one asks it anew"
    change_params(team.workspace, {f"labels: {given + 3} ": f"labels: {given + 1} "})
    team.tick()
    assert len(team.oracle.queue(PEOPLE[2])) == 1


@pytest.mark.server
@pytest.mark.slow
def test_people_in_a_real_label_studio_are_asked_again(
    label_studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with their own token; the queue is what Label Studio serves them."""
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", label_studio.token)
    people = [f"{name}.overlap@example.com" for name in ("ann", "bob", "cid")]
    changes = {**ADAPTIVE, "test_size: 12": "test_size: 0", "seed_size: 10": "seed_size: 4"}
    workspace, truth = small_workspace(tmp_path, 30, {**changes, "annotators: []": f"annotators: {people}"})
    tick(workspace, lambda: connect(workspace))
    project = read_json(workspace.layout.project)["project_id"]
    tokens = {who: label_studio.invite(who) for who in people}

    def serve(who: str, wrong: Collection[str] = ()) -> list[str]:
        """Answer all that this person is served; return the items."""
        done = []
        login = {"Authorization": f"Token {tokens[who]}"}
        with httpx.Client(base_url=label_studio.url, headers=login, timeout=60, trust_env=False) as http:
            while (reply := http.get(f"/api/projects/{project}/next")).status_code == 200:
                row = reply.json()
                item = row["data"]["item_id"]
                label = truth[item] if item not in wrong else {"ham": "spam", "spam": "ham"}[truth[item]]
                content = {"result": choice_result(label), "lead_time": 4.0}
                http.post(f"/api/tasks/{row['id']}/annotations/", json=content).raise_for_status()
                done.append(item)
            assert reply.status_code == 404
        return done

    def again() -> TickReport:
        return tick(open_workspace(workspace.layout.root), lambda: connect(workspace))

    items = serve(people[0])
    assert len(items) == 4 and serve(people[1]) == []
    assert not again().published and not again().changed, "asked again, once"
    assert serve(people[0]) == [], "never the same person"
    assert sorted(serve(people[1], wrong=items[:1])) == sorted(items) and serve(people[2]) == []
    assert not again().published
    assert serve(people[0]) == serve(people[1]) == []
    assert serve(people[2])[:1] == items[:1], "two people differ"
    assert again().published == (0,)
    rows = {row.item_id: row for row in read_labeled(workspace.layout.labeled)}
    assert {item: row.label for item, row in rows.items()} == {item: truth[item] for item in items}
    assert rows[items[0]].answers == 3 and all(row.confidence is not None for row in rows.values())
    leave(label_studio, workspace)
