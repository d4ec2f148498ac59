"""One contract for both oracles: the simulated one always, a real Label Studio under the marker `server`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
from annotating import ANN, BOB, SCHEMA, Rig, ServerRig, SimulatedRig, planned, tasks_of
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.annotation.task_index import version_of
from al_pipeline.errors import BadInput, LabelStudioDown, WrongProject
from al_pipeline.integrations.label_studio.label_config import label_config
from al_pipeline.integrations.label_studio.payloads import (
    RESERVED,
    choice_result,
    data_key,
    shown_fields,
    shown_hash,
    task_json,
)
from al_pipeline.integrations.label_studio.projects import ProjectMark, find_mark, project_title, with_mark
from al_pipeline.integrations.oracle import Oracle, PageEdit, ProjectRef, ProjectSpec
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.params import Schema
from al_pipeline.records import AnsweredTask, Task


@pytest.fixture(params=["simulated", pytest.param("label_studio", marks=pytest.mark.server)])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    if request.param == "simulated":
        yield SimulatedRig()
        return
    from al_pipeline.integrations.label_studio.client import LabelStudioOracle

    server = request.getfixturevalue("label_studio")
    with (
        LabelStudioOracle(server.url, server.token) as oracle,
        ServerRig(server, oracle) as people,
    ):
        yield people


@pytest.fixture
def workspace_id() -> str:
    return uuid.uuid4().hex[:12]


@pytest.fixture
def ref(rig: Rig, workspace_id: str) -> ProjectRef:
    return rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-1", SCHEMA))


def answered_by_id(oracle: Oracle, ref: ProjectRef) -> dict[int, AnsweredTask]:
    return {task.task_id: task for task in oracle.answered(ref, None)}


def answered(oracle: Oracle, ref: ProjectRef, since: str | None = None) -> dict[str | None, AnsweredTask]:
    return {task.push_key: task for task in oracle.answered(ref, since) if task.annotations or since}


# Whose project it is ------------------------------------------------------------


def test_a_project_is_made_once(rig: Rig, workspace_id: str) -> None:
    ref = rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-1", SCHEMA))
    assert rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-1", SCHEMA), ref) == ref
    found_by_its_mark = rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-1", SCHEMA))
    assert found_by_its_mark == ref
    rig.oracle.check(ref, workspace_id, "clone-1")


def title_of(rig: Rig, ref: ProjectRef) -> str:
    if isinstance(rig, SimulatedRig):
        return rig.oracle.projects[ref.project_id].title
    return str(rig._client.projects.get(ref.project_id).title)  # type: ignore[attr-defined]


def retitle(rig: Rig, ref: ProjectRef, title: str) -> None:
    if isinstance(rig, SimulatedRig):
        rig.oracle.projects[ref.project_id].title = title
    else:
        rig._client.projects.update(ref.project_id, title=title)  # type: ignore[attr-defined]


def test_a_project_is_called_by_name_and_question_and_found_by_its_mark(rig: Rig, workspace_id: str) -> None:
    def ensure(known: ProjectRef | None, name: str, clone: str = "clone-1") -> ProjectRef:
        title = project_title(name, "Is <b>it</b> spam? 👩‍👩‍👧\x1b[2J", workspace_id)
        return rig.oracle.ensure_project(ProjectSpec(workspace_id, clone, SCHEMA, title=title), known)

    ref = ensure(None, "mails")
    end = f"({workspace_id[:6]})"
    assert title_of(rig, ref) == f"mails: Is <b>it</b> spam? 👩‍👩‍👧 [2J {end}"
    retitle(rig, ref, f"al {workspace_id}")  # as an earlier version called it
    with pytest.raises(WrongProject):
        ensure(ref, "other", "clone-2")
    assert title_of(rig, ref) == f"al {workspace_id}", "a clone that may not write renames nothing"
    assert ensure(None, "mails") == ensure(ref, "mails") == ref
    assert title_of(rig, ref).startswith("mails: ")
    ensure(ref, "renamed")
    assert title_of(rig, ref).startswith("renamed: "), "the folder's name, or the question, has changed"
    retitle(rig, ref, "A person's own")
    assert ensure(ref, "mails") == ensure(None, "mails") == ref
    assert title_of(rig, ref) == "A person's own"


def test_a_missing_project_is_never_made_anew_where_we_know_one(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    rig.delete_project(ref)
    with pytest.raises(WrongProject, match="deleted, or this is another server"):
        rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-1", SCHEMA), ref)
    with pytest.raises(WrongProject, match="deleted, or this is another server"):
        rig.oracle.check(ref, workspace_id)
    for read in (rig.oracle.task_states(ref), rig.oracle.answered(ref, None), rig.oracle.answered_by_key(ref, ["a"])):
        with pytest.raises(WrongProject):
            list(read)


def test_a_project_of_another_workspace_is_refused(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    with pytest.raises(WrongProject, match=workspace_id):
        rig.oracle.check(ref, "another")
    with pytest.raises(WrongProject, match="not to workspace"):
        rig.oracle.check(ProjectRef(ref.project_id, "another-uid"), workspace_id)
    with pytest.raises(WrongProject):
        rig.oracle.adopt(ref, "another", "clone-1")


def test_a_second_clone_may_read_and_writes_once_it_has_adopted(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    rig.oracle.check(ref, workspace_id)
    with pytest.raises(WrongProject, match="al adopt"):
        rig.oracle.check(ref, workspace_id, "clone-2")
    with pytest.raises(WrongProject, match="al adopt"):
        rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-2", SCHEMA), ref)
    rig.oracle.adopt(ref, workspace_id, "clone-2")
    rig.oracle.check(ref, workspace_id, "clone-2")
    with pytest.raises(WrongProject, match="al adopt"):
        rig.oracle.check(ref, workspace_id, "clone-1")


# The schema ------------------------------------------------------------


def changed(**changes: Any) -> Schema:
    return replace(SCHEMA, **changes)


def test_a_class_can_be_added_and_the_question_changed(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    tasks = tasks_of(workspace_id, 1, 1)
    rig.oracle.import_tasks(ref, tasks)
    rig.answer(ref, tasks[0].plan.push_key, ANN, "ham")
    wider = changed(version=2, labels=["ham", "spam", "other"], question="And now?")
    assert rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-1", wider, 2), ref) == ref


def offered(rig: Rig, ref: ProjectRef) -> list[str]:
    """The classes that the project's page offers."""
    if isinstance(rig.oracle, SimulatedOracle):
        return list(rig.oracle.projects[ref.project_id].labels)
    config = rig._client.projects.get(ref.project_id).label_config  # type: ignore[attr-defined]
    return [choice.get("value", "") for choice in ElementTree.fromstring(config).iter("Choice")]


def edit_page(rig: Rig, ref: ProjectRef, *labels: str) -> None:
    """Somebody changes the classes in the project's page."""
    if isinstance(rig.oracle, SimulatedOracle):
        rig.oracle.projects[ref.project_id].labels = list(labels)
        return
    config = label_config(changed(labels=list(labels)))
    rig._client.projects.update(ref.project_id, label_config=config)  # type: ignore[attr-defined]


def test_a_class_that_params_yaml_no_longer_has_leaves_the_page(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    edits: list[PageEdit] = []
    other = changed(version=2, labels=["ham", "eggs"])
    rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-1", other, published=SCHEMA.labels), ref, edits.append)
    assert (offered(rig, ref), edits) == (["ham", "eggs"], [])


def test_what_somebody_added_in_the_page_stays_and_what_they_removed_is_put_back(
    rig: Rig, ref: ProjectRef, workspace_id: str
) -> None:
    """Answers may name it: a project that lacked it would show them without their choice."""
    edits: list[PageEdit] = []
    edit_page(rig, ref, "spam", "eggs")
    for _ in range(2):
        rig.oracle.ensure_project(
            ProjectSpec(workspace_id, "clone-1", SCHEMA, published=SCHEMA.labels), ref, edits.append
        )
    assert edits == [PageEdit(("eggs",), ("ham",)), PageEdit(("eggs",), ())]
    assert offered(rig, ref) == ["ham", "spam", "eggs"]
    adopted = changed(version=2, labels=["ham", "eggs", "spam"])
    rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-1", adopted, published=SCHEMA.labels), ref, edits.append)
    assert (offered(rig, ref), len(edits)) == (["ham", "eggs", "spam"], 2)


# Tasks ------------------------------------------------------------


def test_tasks_come_back_as_they_were_sent_in_their_order(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    nasty = "<script>alert(1)</script> \U0001f600 \u202eabc\u202c  $text {{x}} \t\n \x00\ud800 end"
    tasks = [
        *tasks_of(workspace_id, 7, 3),
        Task(planned(workspace_id, 8, "Ünïcode, [id]: #7", "test"), {"text": nasty}),
    ]
    rig.oracle.import_tasks(ref, tasks)
    states = list(rig.oracle.task_states(ref))
    assert [state.push_key for state in states] == [task.plan.push_key for task in tasks]
    assert [state.task_id for state in states] == sorted(state.task_id for state in states)
    assert [(state.round, state.part, state.is_labeled) for state in states] == [(7, "pool", False)] * 3 + [
        (8, "test", False)
    ]
    assert [state.push_key for state in rig.oracle.task_states(ref, 8)] == [tasks[3].plan.push_key]
    assert list(rig.oracle.task_states(ref, 9)) == []
    for task, held in zip(tasks, rig.oracle.answered_by_key(ref, {task.plan.push_key for task in tasks}), strict=True):
        assert held.data == task_json(task)["data"]
        assert held.data["shown_hash"] == shown_hash(shown_fields(held.data))


def test_the_server_never_notices_a_duplicate(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    tasks = tasks_of(workspace_id, 1, 2)
    rig.oracle.import_tasks(ref, tasks)
    rig.oracle.import_tasks(ref, tasks)
    assert len(list(rig.oracle.task_states(ref, 1))) == 4


def test_a_deleted_id_may_be_handed_out_again(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    first, second = tasks_of(workspace_id, 1, 2)
    rig.oracle.import_tasks(ref, [first])
    (before,) = rig.oracle.task_states(ref)
    rig.delete_task(ref, first.plan.push_key)
    rig.oracle.import_tasks(ref, [second])
    (after,) = rig.oracle.task_states(ref)
    assert after.task_id == before.task_id  # SQLite's way; whoever keys by it believes the wrong answer
    assert after.push_key != before.push_key


def test_answers_and_skips_are_seen(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    tasks = tasks_of(workspace_id, 1, 3)
    keys = [task.plan.push_key for task in tasks]
    rig.oracle.import_tasks(ref, tasks)
    labeled = rig.answer(ref, keys[0], ANN, "spam")
    skipped = rig.skip(ref, keys[1], BOB)
    found = answered(rig.oracle, ref)
    assert set(found) == set(keys[:2])
    (label,), (skip,) = found[keys[0]].annotations, found[keys[1]].annotations
    assert (label.annotation_id, label.annotator, label.was_cancelled) == (labeled, ANN, False)
    assert [dict(entry) for entry in label.result] == choice_result("spam")
    assert (skip.annotation_id, skip.annotator, skip.was_cancelled, skip.result) == (skipped, BOB, True, ())
    assert found[keys[0]].created_at <= label.created_at <= label.updated_at <= found[keys[0]].updated_at
    states = {state.push_key: state for state in rig.oracle.task_states(ref)}
    assert [(states[key].is_labeled, states[key].annotations, states[key].cancelled) for key in keys] == [
        (True, 1, 0),
        (False, 0, 1),
        (False, 0, 0),
    ]


def test_only_what_was_touched_since_comes_back(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    tasks = tasks_of(workspace_id, 1, 2)
    rig.oracle.import_tasks(ref, tasks)
    first = rig.answer(ref, tasks[0].plan.push_key, ANN, "ham")
    rig.answer(ref, tasks[1].plan.push_key, ANN, "ham")
    since = answered(rig.oracle, ref)[tasks[1].plan.push_key].updated_at
    assert set(answered(rig.oracle, ref, since)) == {tasks[1].plan.push_key}
    rig.edit(ref, first, "spam")
    edited = answered(rig.oracle, ref, since)[tasks[0].plan.push_key]
    assert edited.annotations[0].result[0]["value"]["choices"] == ["spam"]
    rig.delete_annotation(ref, first)
    assert answered(rig.oracle, ref, edited.updated_at)[tasks[0].plan.push_key].annotations == ()


def test_a_change_of_an_answer_changes_the_version_of_its_task(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    tasks = tasks_of(workspace_id, 1, 2)
    rig.oracle.import_tasks(ref, tasks)
    key, start = tasks[0].plan.push_key, "2000-01-01T00:00:00.000000Z"
    since = min(version.updated_at for version in rig.oracle.changed(ref, start).values())
    seen = []

    def look() -> None:
        seen.append(rig.oracle.changed(ref, since))
        assert seen[-1] == {task.task_id: version_of(task) for task in answered(rig.oracle, ref, since).values()}

    look()
    number = rig.answer(ref, key, ANN, "ham")
    look()
    rig.edit(ref, number, "spam")
    look()
    rig.delete_annotation(ref, number)
    look()
    (changed,) = [one for one, task in answered_by_id(rig.oracle, ref).items() if task.push_key == key]
    assert len({versions[changed] for versions in seen}) == len(seen)
    assert len({versions[one] for versions in seen for one in versions if one != changed}) == 1
    newest = seen[-1][changed].updated_at
    assert list(rig.oracle.changed(ref, newest)) == [changed]


@pytest.mark.parametrize("result", [[], choice_result("eggs"), [{"value": None}], [{"from_name": "x", "value": [1]}]])
def test_any_answer_is_taken(rig: Rig, ref: ProjectRef, workspace_id: str, result: Any) -> None:
    tasks = tasks_of(workspace_id, 1, 1)
    rig.oracle.import_tasks(ref, tasks)
    rig.answer(ref, tasks[0].plan.push_key, ANN, result)
    (task,) = answered(rig.oracle, ref).values()
    assert [dict(entry) for entry in task.annotations[0].result] == result


def test_open_tasks_are_those_that_may_still_be_served(rig: Rig, ref: ProjectRef, workspace_id: str) -> None:
    tasks = tasks_of(workspace_id, 1, 4)
    keys = [task.plan.push_key for task in tasks]
    rig.oracle.import_tasks(ref, tasks)
    rig.answer(ref, keys[0], ANN, "ham")
    rig.skip(ref, keys[1], ANN)
    rig.oracle.retire(ref, [next(s.task_id for s in rig.oracle.task_states(ref) if s.push_key == keys[2])])
    assert [(state.push_key, state.cancelled) for state in rig.oracle.open_tasks(ref)] == [(keys[1], 1), (keys[3], 0)]


def test_a_retired_task_leaves_the_queue_and_can_still_be_answered(
    rig: Rig, ref: ProjectRef, workspace_id: str
) -> None:
    tasks = tasks_of(workspace_id, 1, 3)
    rig.oracle.import_tasks(ref, tasks)
    ids = [state.task_id for state in rig.oracle.task_states(ref)]
    rig.oracle.retire(ref, [ids[0], 10**9])
    assert [state.is_labeled for state in rig.oracle.task_states(ref)] == [True, False, False]
    assert rig.served(ref) == tasks[1].plan.push_key
    rig.answer(ref, tasks[0].plan.push_key, ANN, "ham")
    assert set(answered(rig.oracle, ref)) == {tasks[0].plan.push_key}


def test_live_questions_are_served_newest_first_until_they_are_not(
    rig: Rig, ref: ProjectRef, workspace_id: str
) -> None:
    older, *live = tasks_of(workspace_id, 3, 4)
    rig.oracle.import_tasks(ref, [older])
    for place, task in enumerate(live, 1):
        rig.oracle.import_tasks(ref, [replace(task, place=place)])
    rig.oracle.serve_newest(ref, True)
    rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-1", SCHEMA), ref)  # a tick in between
    rig.answer(ref, live[-1].plan.push_key, BOB, "spam")
    assert rig.served(ref) == live[-2].plan.push_key
    rig.oracle.serve_newest(ref, True)
    rig.oracle.retire(ref, [one.task_id for one in rig.oracle.open_tasks(ref) if one.push_key == rig.served(ref)])
    rig.oracle.serve_newest(ref, False)
    rig.oracle.serve_newest(ref, False)
    assert rig.served(ref) == older.plan.push_key
    assert not any(one.prelabel_shown for one in rig.oracle.answered(ref, None))


def test_overlap_asks_for_several_people(rig: Rig, workspace_id: str) -> None:
    ref = rig.oracle.ensure_project(ProjectSpec(workspace_id, "clone-1", SCHEMA, 2))
    tasks = tasks_of(workspace_id, 1, 1)
    rig.oracle.import_tasks(ref, tasks)
    key = tasks[0].plan.push_key
    for who, settled in ((ANN, False), (ANN, False), (BOB, True)):
        rig.answer(ref, key, who, "ham")
        assert [state.is_labeled for state in rig.oracle.task_states(ref)] == [settled]


# The twin and the words alone ------------------------------------------------------------


def test_the_twin_is_an_oracle() -> None:
    assert isinstance(SimulatedOracle(), Oracle)


@pytest.mark.parametrize(("moment", "tasks"), [("before", 0), ("after", 2)])
def test_a_fault_of_the_twin_strikes_before_or_after_the_work(moment: str, tasks: int) -> None:
    oracle = SimulatedOracle()
    ref = oracle.ensure_project(ProjectSpec("w", "c", SCHEMA))

    def strike(call: str, now: str) -> None:
        if (call, now) == ("import_tasks", moment):
            raise LabelStudioDown("struck")

    oracle.fault = strike
    with pytest.raises(LabelStudioDown):
        oracle.import_tasks(ref, tasks_of("w", 1, 2))
    assert len(list(oracle.task_states(ref))) == tasks


def test_the_twin_serves_in_order_and_a_skipped_task_to_others() -> None:
    rig = SimulatedRig()
    ref = rig.oracle.ensure_project(ProjectSpec("w", "c", SCHEMA))
    tasks = tasks_of("w", 1, 3)
    keys = [task.plan.push_key for task in tasks]
    rig.oracle.import_tasks(ref, tasks)
    rig.skip(ref, keys[0], ANN)
    rig.answer(ref, keys[1], ANN, "ham")
    assert rig.oracle.queue(ANN) == [keys[2]]
    assert rig.oracle.queue(BOB) == [keys[0], keys[2]]


def test_two_projects_with_our_mark_are_told_apart_by_a_person() -> None:
    oracle = SimulatedOracle()
    ref = oracle.ensure_project(ProjectSpec("w", "c", SCHEMA))
    oracle.projects[9] = oracle.projects[ref.project_id]
    with pytest.raises(WrongProject, match="projects 1, 9"):
        oracle.ensure_project(ProjectSpec("w", "c", SCHEMA))
    assert oracle.ensure_project(ProjectSpec("w", "c", SCHEMA), ref) == ref


def test_the_task_json_is_exactly_this() -> None:
    plan = planned("w0rkspace", 7, "mail-1", rank=3)
    task = Task(plan, {"text": "Buy now\x00!", "Subject line": "<b>sale</b>", "label": "gold"})
    assert task_json(task) == {
        "data": {
            "text": "Buy now !",
            "shown_Subject_line_dc0192": "<b>sale</b>",
            "shown_label_1aca80": "gold",
            "item_id": "mail-1",
            "al_round": 7,
            "al_part": "pool",
            "al_rank": 3,
            "al_score": 0.5,
            "push_key": "w0rkspace:0007:mail-1",
            "shown_hash": "2c9adc9c993b14621973e6b784df11215db58b03035bed9ca6a4eb58d3cf92e0",
        }
    }


def test_the_guess_is_sent_where_there_is_one() -> None:
    task = Task(planned("w", 7, "a"), {"text": "t"}, guess=("spam", 0.75))
    sent = task_json(task)
    assert sent["data"]["al_prelabel"] is True
    assert sent["predictions"] == [
        {
            "model_version": "round-0007",
            "score": 0.75,
            "result": [
                {"from_name": "label", "to_name": "text", "type": "choices", "value": {"choices": ["spam"]}},
            ],
        }
    ]


@pytest.mark.parametrize("bad", [{"push_key": "w:1:\x00"}, {"push_key": "\ud800"}, {"score": float("nan")}])
def test_a_task_that_would_not_come_back_as_it_went_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="'a'"):
        task_json(Task(replace(planned("w", 1, "a"), **bad), {"text": "t"}))


@settings(max_examples=100, derandomize=True)
@given(st.lists(st.text(st.characters(), min_size=1, max_size=12), unique=True, max_size=5))
def test_every_field_name_has_a_plain_key_of_its_own(names: list[str]) -> None:
    keys = [data_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(key.replace("_", "a").isalnum() and key.isascii() and key not in RESERVED for key in keys)


def test_other_text_in_a_description_stays() -> None:
    ours, theirs = ProjectMark("w", "c2", "p"), ProjectMark("w", "c1", "p")
    assert find_mark(with_mark(f"Our mails.\n{theirs}\nAsk Eve.", ours)) == ours
    assert with_mark(f"Our mails.\n{theirs}\nAsk Eve.", ours) == f"Our mails.\n{ours}\nAsk Eve."
    assert find_mark(with_mark("Our mails.", ours)) == ours
    assert with_mark(None, ours) == str(ours)
    assert find_mark(None) is None and find_mark("al-workspace:w") is None
