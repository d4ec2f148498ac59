"""Gold: known labels, who answered them how, the plans that ask them, and answers that are held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from annotating import leave
from harness import Played, answer_all, change_params, go_on, small_workspace
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.annotation.aggregation import fold
from al_pipeline.annotation.gold import (
    FIRST,
    GOLD,
    REASON,
    TRAIN,
    answers_to_gold,
    choose_gold,
    gold_items,
    gold_key,
    is_below,
    mixed_in,
    right_and_all,
    unexpired,
)
from al_pipeline.data.ledger import add_to_inbox, read_events
from al_pipeline.data.outputs import read_labeled, read_unresolved
from al_pipeline.data.pool import read_ids
from al_pipeline.errors import BadInput, NothingToDo
from al_pipeline.evaluation.online import wilson
from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.payloads import choice_result
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.notifications.messages import Answer
from al_pipeline.operations.connect import connect
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.gold import add, add_reviewed, held_answers, remove
from al_pipeline.operations.gold_list import gold_list
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.intervene import amend
from al_pipeline.operations.quality import quality
from al_pipeline.operations.review import review
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import tick
from al_pipeline.records import ClassChange, Event, LabelIntervention, PlannedTask, Selection
from al_pipeline.rounds.interventions import Intervention, control_event
from al_pipeline.workspace.workspace import Workspace, open_workspace

ANN, EVE, CHIEF = "ann@example.org", "eve@example.org", "chief@example.org"
OTHER = {"ham": "spam", "spam": "ham"}


def event(kind: str, who: str, label: str | None, item: str = "a", key: str = "", **more: Any) -> Event:
    key = key or f"w:0001:{item}#u.{who}"
    return Event(f"{kind} {who} {label} {key} {more}", kind, item, f"hash {item}", "pool", 1, key, who, label, **more)  # type: ignore[arg-type]


def gold(label: str, item: str = "a", **more: Any) -> Event:
    return event("gold", "boss", label, item, f"gold:hash {item}", **more)


def task(item: str, rank: int = 0, strategy: str = "margin") -> PlannedTask:
    return PlannedTask(f"w:0001:{item}", item, f"hash {item}", "pool", 1, rank, 0.1 * rank, strategy, 1.0)


# Pure ---------------------------------------------------------------------------------------------------------------


def test_gold_is_no_part_of_the_labelled_set_unless_told() -> None:
    answers = [event("label", "ann", "ham"), event("label", "ann", "ham", "b")]
    apart = fold([*answers, gold("spam")], ["ham", "spam"])
    assert [row.item_id for row in apart.labeled] == ["b"]
    assert [(row.item_id, row.kind, row.reason) for row in apart.unresolved] == [("a", "ignored", REASON)]
    trained = fold([*answers, gold("spam", origin=TRAIN)], ["ham", "spam"])
    assert {row.item_id: row.label for row in trained.labeled} == {"a": "spam", "b": "ham"}
    gone = event("delete", "boss", None, "a", "gold:hash a")
    assert fold([*answers, gold("spam"), gone], ["ham", "spam"]).unresolved == ()


def test_a_ruling_that_contradicts_gold_is_the_known_label_if_it_is_newer() -> None:
    ruling = event("adjudicate", CHIEF, "ham", "a", "w.review:000001:a#r.chief")
    assert gold_items([gold("spam"), ruling])["a"].label == "ham"
    assert gold_items([ruling, gold("spam")])["a"].label == "spam"


def test_first_answers_to_gold_tasks_count() -> None:
    keys = {"w:0001:a", "w:0002:a"}
    events = [
        event("label", "ann", "spam", key="w:0000:a#u.ann"),  # before it was gold
        event("label", "ann", "ham"),
        event("supersede", "ann", "spam"),
        event("label", "ann", "ham", key="w:0002:a#u.ann"),
        event("skip", "bob", None),
    ]
    known = gold_items([gold("spam")])
    seen = answers_to_gold(events, keys)
    assert right_and_all(seen, known) == {"ann": (1, 1)}
    assert unexpired(known, seen, ["ann", "bob"]) == {"a": 1} and unexpired(known, seen, ["ann"]) == {}
    assert unexpired(known, [], []) == {"a": 0} and right_and_all(seen, {}) == {}


@given(st.integers(0, 30), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_gold_is_spread_and_the_order_of_the_others_stays(others: int, many: int, first: int) -> None:
    tasks, mixed = [task(f"t{n}", n) for n in range(others)], [task(f"g{n}", n, GOLD) for n in range(many)]
    first = min(first, many)
    plan = mixed_in(tasks, mixed, first)
    assert [one for one in plan if one.strategy != GOLD] == tasks
    assert [one for one in plan if one.strategy == GOLD] == mixed
    assert sum(one.strategy == GOLD for one in plan[: 2 * first]) >= min(first, many)
    if not first and others >= 2 * many:
        places = [place for place, one in enumerate(plan) if one.strategy == GOLD]
        assert all(b - a > 1 for a, b in zip(places, places[1:], strict=False)), "never two in a row"


def test_gold_that_few_have_seen_comes_first() -> None:
    known = gold_items([gold("spam", item) for item in "abc"])
    assert [one.item_id for one in choose_gold(known, {"a": 2, "b": 0, "c": 1}, 2, "s")] == ["b", "c"]
    assert choose_gold(known, {"a": 0, "b": 0}, 5, "s") == choose_gold(known, {"b": 0, "a": 0}, 5, "s")


LABELS = ("ham", "spam")


def a_hold(gold_says: str = "spam") -> list[Event]:
    """Eve answers six gold items with ham, and x and y; the close of her round holds x and y."""
    items = [f"g{number}" for number in range(6)]
    known = [gold(gold_says, item) for item in items]
    to_gold = [event("label", EVE, "ham", item) for item in items]
    others = [event("label", EVE, "spam", item) for item in "xy"]
    asked = LabelIntervention("hold", bound=0.7, gold=tuple(one.event_id for one in to_gold))
    targets = tuple(one.event_id for one in others)
    hold = Event("h", "quarantine", "", "", "pool", -1, "hold:h", "al-pipeline", intervention=asked, targets=targets)
    return [*known, *to_gold, *others, hold]


def control(kind: str, number: int, **values: Any) -> Event:
    return control_event(Intervention(number, kind, 1, "me", "2026-01-01", "", labels=True, **values))  # type: ignore[arg-type]


def labelled(events: list[Event]) -> set[str]:
    return {row.item_id for row in fold(events, LABELS).labeled}


def test_a_hold_stands_while_gold_says_so() -> None:
    """Nothing about it is decided once: known labels that turn out wrong let the answers count again."""
    events = a_hold()
    assert labelled(events) == set() and labelled(a_hold("ham")) == {"x", "y"}
    ruled = [event("adjudicate", CHIEF, "ham", f"g{number}", f"w.review:000001:g{number}#r.c") for number in range(4)]
    assert labelled([*events, *ruled[:1]]) == set() and labelled([*events, *ruled]) == {"x", "y"}
    gone = [event("delete", "boss", None, f"g{number}", f"gold:hash g{number}") for number in range(2)]
    assert labelled([*events, *gone]) >= {"x", "y"}, "too few answers to gold are left"
    later = event("label", EVE, "ham", "z")
    assert labelled([*events, later]) == {"z"}, "the next close decides on later answers"
    assert msgspec.json.decode(msgspec.json.encode(events[-1].to_row()), type=Event) == events[-1]
    assert "gold" not in LabelIntervention("undo", undoes=1).to_row()


def test_a_hold_beside_other_interventions() -> None:
    events = a_hold()
    restored = control("restore", 1, selection=Selection(item="x"))
    assert labelled([*events, restored]) == {"x"}
    assert labelled([*events, restored, control("undo", 2, undoes=1)]) == set()
    revoked = control("revoke", 3, selection=Selection(annotator=EVE))
    ruled = [event("adjudicate", CHIEF, "ham", f"g{number}", f"w.review:000001:g{number}#r.c") for number in range(6)]
    assert labelled([*events, revoked, *ruled]) == set(), "what was revoked while it was held stays out"
    both = [*events, revoked, control("restore", 4, selection=Selection(item="y"))]
    assert labelled(both) == {"y"}
    change = ClassChange("rename", LABELS, ("spam",), ("junk",))
    renamed = [*events, control("schema", 5, change=change)]
    assert {row.item_id for row in fold(renamed, ("ham", "junk")).labeled} == set(), "the known labels follow"


@given(st.integers(FIRST, 300), st.data(), st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_below_the_bound_is_below_it_with_the_whole_interval(answers: int, data: Any, bound: float) -> None:
    right = data.draw(st.integers(0, answers))
    _, high = wilson(right, answers, 0.95)
    assert high is not None
    assert is_below(right, answers, bound) == (high < bound) or abs(high - bound) < 1e-9
    assert not is_below(0, FIRST - 1, 1.0)


# On real git and DVC ------------------------------------------------------------------------------------------------


@pytest.fixture
def world(once: Played, tmp_path: Path) -> tuple[Workspace, SimulatedOracle, dict[str, str]]:
    """One published round, and gold in each later one; round 1 is open."""
    workspace, oracle, truth = go_on(once, tmp_path)
    change_params(workspace, {"gold_share: 0.0": "gold_share: 0.25", "hold: false": "hold: true"})
    return open_workspace(workspace.layout.root), oracle, dict(truth)


def write_gold(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer(oracle: SimulatedOracle, workspace: Workspace, truth: dict[str, str], who: str, right: bool) -> set[str]:
    """Answer the whole queue; the items answered."""
    keys = oracle.queue(who)
    for key in keys:
        label = truth[key.rsplit(":", 1)[1]]
        oracle.answer(key, who, label if right else OTHER[label])
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    return {key.rsplit(":", 1)[1] for key in keys}


@pytest.mark.slow
def test_gold_from_a_file_to_answers_that_are_held(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, oracle, truth = world
    told: list[str] = []

    def send(_: Any, messages: Any) -> list[Answer]:
        told.extend(one.title for one in messages["AL_NOTIFY_URLS:1"])
        return [Answer("AL_NOTIFY_URLS:1", "JSON", one.key, True, "delivered") for one in messages["AL_NOTIFY_URLS:1"]]

    monkeypatch.setenv("AL_NOTIFY_URLS", "json://127.0.0.1:9")
    monkeypatch.setattr("al_pipeline.integrations.notification_services.send", send)
    layout = workspace.layout
    labelled = {row.item_id for row in read_labeled(layout.labeled)}
    free = [item for item in read_ids([layout.pool]).ids() if item not in labelled][-12:]
    rows = [{"id": item, "label": truth[item]} for item in free]
    rows.append({"text": "a gold text that the pool has not seen", "label": "spam"})
    with open_dvc(layout) as dvc:
        assert add(workspace, dvc, write_gold(tmp_path / "gold.jsonl", rows)).gold == 13
        assert add(workspace, dvc, tmp_path / "gold.jsonl").known == 13, "twice is as good as once"
        (new,) = [
            one.item_id for one in gold_items(read_events(layout.inbox_events)).values() if one.item_id not in free
        ]
    truth[new] = "spam"

    answer(oracle, workspace, truth, ANN, right=True)
    unresolved = {row.item_id: row.reason for row in read_unresolved(layout.unresolved)}
    assert {item for item, reason in unresolved.items() if reason == REASON} == {*free, new}
    plan = read_plan(Git(layout.root), 2)
    asked = [one for one in plan if one.strategy == GOLD]
    assert len(asked) >= FIRST and sum(one.strategy == GOLD for one in plan[: 2 * FIRST]) >= FIRST
    sent = {one.data["item_id"]: one.data for one in oracle.projects[1].tasks.values() if one.data["al_round"] == 2}
    ordinary, hidden = sent[next(one.item_id for one in plan if one.strategy != GOLD)], sent[asked[0].item_id]
    assert ordinary.keys() == hidden.keys() and hidden["al_part"] == "pool", "nothing tells it from others"
    scores = [one.score for one in plan if one.part == "pool" and one.strategy != GOLD]
    assert all(min(scores) <= one.score <= max(scores) for one in asked)

    said = answer(oracle, workspace, truth, EVE, right=False)  # everything wrong, gold too
    tick(open_workspace(layout.root), lambda: oracle)
    assert [one for one in told if "gold" in one] == [f"workspace: {EVE} is below the bound on gold"], "once"
    found = status(workspace, ask=False)
    assert found.gold is not None and found.gold.items == 13
    (below,) = found.gold.below
    assert below.startswith(f"{EVE} gave the known label to 0 of {len(asked)} gold items")
    person = next(one for one in quality(workspace).people if one.name == EVE)
    assert person.gold.value == 0 and person.gold_answers == len(asked) and person.gold.high < 0.7
    held = {one.item_id for one in held_answers(read_events(layout.events))}
    assert held == said - {one.item_id for one in asked}, "of the round in which they fell below"
    assert not held & {row.item_id for row in read_labeled(layout.labeled)}

    change_params(workspace, {"reviewers: []": f"reviewers: [{CHIEF}]"})
    workspace = open_workspace(layout.root)
    with open_dvc(layout) as dvc:
        assert review(workspace, dvc, lambda: oracle, size=6).added.get("held", 0) >= 3
        amend(workspace, dvc, "restore", Selection(annotator=EVE), "they were right")
    tick(open_workspace(layout.root), lambda: oracle)
    assert not held_answers(read_events(layout.events)), "it can be taken back"
    assert held & {row.item_id for row in read_labeled(layout.labeled)}

    with open_dvc(layout) as dvc:
        assert remove(workspace, dvc, [asked[0].item_id]) == 1
        with pytest.raises(BadInput, match="not gold"):
            remove(workspace, dvc, [asked[0].item_id])
        assert add(workspace, dvc, tmp_path / "gold.jsonl").gold == 1, "removed, and gold again"
    items, people = gold_list(workspace)
    assert len(items) == 13 and people is not None and people.people[0].annotator == EVE


@pytest.mark.slow
def test_gold_that_cannot_be_is_refused_before_anything_is_written(world: Any, tmp_path: Path) -> None:
    workspace, oracle, truth = world
    layout = workspace.layout
    path = tmp_path / "gold.jsonl"
    item = next(iter(read_ids([layout.pool]).ids()))
    tested = next(iter(read_ids([layout.test]).ids()))
    cases = [
        ([{"text": "x", "label": "eggs"}], "no classes of schema.labels in params.yaml: 'eggs' \\(line 1\\)"),
        ([{"id": "no such item", "label": "ham"}], "name no item of the pool by its id: line 1"),
        ([{"id": tested, "label": "ham"}], "name no item of the pool by its id"),
        ([{"id": item, "label": "ham"}, {"id": item, "label": "spam"}], "line 2: the same item has the label 'ham'"),
        ([{"label": "ham"}], "line 1 has a label, but neither 'text' nor 'id'"),
        ([{"id": item, "label": ""}], "line 1 has no label; nothing was added"),
        ([{"text": "x", "label": "ham"}, {"text": "y", "label": None}], "line 2 has no label; nothing was added"),
    ]
    with open_dvc(layout) as dvc:
        for rows, says in cases:
            with pytest.raises(BadInput, match=says):
                add(workspace, dvc, write_gold(path, rows))
        with pytest.raises(NothingToDo, match="has a ruling yet"):
            add_reviewed(workspace, dvc)
    assert not gold_items(read_events(layout.events, layout.inbox_events))
    answer_all(oracle, truth)
    tick(open_workspace(layout.root), lambda: oracle)
    assert all(one.strategy != GOLD for one in read_plan(Git(layout.root), 2)), "without gold a plan is as before"


@pytest.mark.slow
def test_no_test_set_is_drawn_from_gold(tmp_path: Path) -> None:
    workspace, _ = small_workspace(tmp_path, changes={"test_size: 12": "test_size: 0"})
    layout, oracle = workspace.layout, SimulatedOracle()
    tick(workspace, lambda: oracle)
    change_params(workspace, {"test_size: 0": "test_size: 12"})
    rows = [{"text": f"gold text number {number}", "label": "spam"} for number in range(20)]
    with open_dvc(layout) as dvc:
        found = add(open_workspace(layout.root), dvc, write_gold(tmp_path / "gold.jsonl", rows))
    assert found.gold == 20 and not list(read_ids([layout.test, layout.inbox_test]).ids())


@pytest.mark.server
@pytest.mark.slow
def test_gold_in_a_real_label_studio_looks_like_any_task(
    label_studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two people with their own tokens: nothing that Label Studio serves them tells gold, and they are judged by it."""
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", label_studio.token)
    careful, careless, absent = (f"{name}.gold@example.com" for name in ("ann", "eve", "zoe"))
    changes = {"test_size: 12": "test_size: 0", "seed_size: 10": "seed_size: 6", "overlap: 1 ": "overlap: 3 "}
    people = {"annotators: []": f"annotators: [{careful}, {careless}, {absent}]", "gold_share: 0.0": "gold_share: 0.5"}
    workspace, truth = small_workspace(tmp_path, 30, {**changes, **people})
    keys = read_ids([workspace.layout.inbox_pool])
    rows = list(zip(keys.ids(), keys.hashes(), strict=True))[:8]
    known = [Event(item, "gold", item, text, "pool", -1, gold_key(text), "boss", truth[item]) for item, text in rows]
    add_to_inbox(workspace.layout.inbox_events, known)
    tick(workspace, lambda: connect(workspace))
    project = read_json(workspace.layout.project)["project_id"]
    tokens = {who: label_studio.invite(who) for who in (careful, careless)}

    def serve(who: str, right: bool) -> list[dict[str, Any]]:
        """Answer what this person is served; the tasks as Label Studio served them."""
        served: list[dict[str, Any]] = []
        login = {"Authorization": f"Token {tokens[who]}"}
        with httpx.Client(base_url=label_studio.url, headers=login, timeout=60, trust_env=False) as http:
            while (reply := http.get(f"/api/projects/{project}/next")).status_code == 200:
                task = reply.json()
                label = truth[task["data"]["item_id"]]
                content = {"result": choice_result(label if right else OTHER[label]), "lead_time": 4.0}
                http.post(f"/api/tasks/{task['id']}/annotations/", json=content).raise_for_status()
                served.append(task)
        return served

    plan = {task.item_id: task for task in read_plan(Git(workspace.layout.root), 0)}
    gold_of_round = {item for item, task in plan.items() if task.strategy == GOLD}
    assert gold_of_round == {item for item, _ in rows} and len(plan) > 8
    for who, right in ((careful, True), (careless, False)):
        served = serve(who, right)
        assert {task["data"]["item_id"] for task in served} == plan.keys()
        shapes = {
            task["data"]["item_id"] in gold_of_round: (
                sorted(task), sorted(task["data"]), task["data"]["al_part"], task["data"]["al_round"], task["overlap"]
            )
            for task in served
        }  # fmt: skip
        assert shapes[True] == shapes[False] and "gold" not in json.dumps(served)
        assert any(task["data"]["item_id"] in gold_of_round for task in served[:2]), "among a person's first tasks"
    tick(open_workspace(workspace.layout.root), lambda: connect(workspace))
    found = status(open_workspace(workspace.layout.root), ask=False).gold
    assert found is not None
    assert {one.annotator: (one.right, one.answers) for one in found.people} == {careful: (8, 8), careless: (0, 8)}
    (below,) = found.below
    assert below.startswith(f"{careless} gave the known label to 0 of 8 gold items") and found.left == 8
    leave(label_studio, workspace)
