"""An audit: it finds what does not show as a change of a task, and reads no more as the history grows."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from annotating import ANN, BOB, ServerRig, SimulatedRig, tasks_of
from msgspec.structs import replace
from test_push_pull import Campaign

from al_pipeline.data.ledger import append_part
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.label_studio.payloads import choice_result, task_json
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import pull as pulling
from al_pipeline.operations.push import RetirePolicy, retire
from al_pipeline.records import AnsweredTask, Task

HOUR = 3600.0


class CountingOracle(SimulatedOracle):
    """Counts the tasks that are read with their answers."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()

    def _counted(self, name: str, tasks: Iterable[AnsweredTask]) -> Iterator[AnsweredTask]:
        for task in tasks:
            self.read[name] += 1
            yield task

    def answered(self, ref: ProjectRef, since: str | None) -> Iterator[AnsweredTask]:
        return self._counted("all" if since is None else "changed", super().answered(ref, since))

    def answered_after(self, ref: ProjectRef, task_id: int, before: str, limit: int) -> Iterator[AnsweredTask]:
        return self._counted("rolling", super().answered_after(ref, task_id, before, limit))


@pytest.fixture
def oracle() -> CountingOracle:
    return CountingOracle()


@pytest.fixture
def campaign(tmp_path: Path, oracle: CountingOracle, monkeypatch: pytest.MonkeyPatch) -> Campaign:
    """Ten answered tasks, an hour between two answers; an audit has read them all, and reads three a time from now."""
    monkeypatch.setattr(pulling, "ROLLING", 3)
    rig = SimulatedRig()
    rig.oracle = oracle
    made = Campaign(rig, tmp_path)
    for key in made.plan(10):
        made.push()
        oracle.pass_time(HOUR)
        made.answer(key, ANN, "ham")
    oracle.pass_time(HOUR)
    assert made.pull(audit=True).events == {"label": 10}
    oracle.read.clear()
    return made


def test_an_audit_reads_what_is_new_and_a_few_others(campaign: Campaign, oracle: CountingOracle) -> None:
    assert campaign.pull(audit=True).events == {}
    assert oracle.read == {"changed": 1, "rolling": 3}, "the newest change is looked back over"
    oracle.pass_time(HOUR)
    new = campaign.plan(2, number=2)
    campaign.push()
    campaign.answer(new[0], BOB, "spam")
    oracle.read.clear()
    assert campaign.pull(audit=True).events == {"label": 1}
    assert oracle.read == {"changed": 3, "rolling": 3}


def test_a_pull_reads_only_what_it_has_not_read_as_it_is(campaign: Campaign, oracle: CountingOracle) -> None:
    keys = campaign.plan(5, number=2)
    campaign.push()
    campaign.pull()
    assert oracle.read == {"changed": 5}
    oracle.read.clear()
    assert campaign.pull().events == {} and oracle.read == {}
    campaign.answer(keys[3], ANN, "ham")
    assert campaign.pull().events == {"label": 1} and oracle.read == {"changed": 1}
    campaign.pull()
    assert oracle.read == {"changed": 1}


def test_a_pull_that_finds_no_change_does_not_read_what_is_known(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While ledger and inbox are the files of which the digest of all answers was noted."""
    campaign.pull()
    before = campaign.events()
    built: list[int] = []
    real = pulling.KnownAnswers

    def build(events: Any, refused: Any, uid: str) -> Any:
        built.append(len(events))
        return real(events, refused, uid)

    monkeypatch.setattr(pulling, "KnownAnswers", build)
    campaign.pull()
    assert built == []
    campaign.close()
    campaign.pull()
    assert built == [len(before)], "the files are others"
    campaign.pull()
    assert built == [len(before)]
    assert campaign.events() == before
    campaign.pull(audit=True)
    assert len(built) == 2


def test_a_change_that_is_committed_after_later_ones_were_read_is_read(
    campaign: Campaign, oracle: CountingOracle
) -> None:
    """Label Studio stamps a change before it commits it."""
    keys = campaign.plan(3, number=2)
    campaign.push()
    campaign.pull()
    before = oracle.backup()
    late = campaign.answer(keys[0], ANN, "ham")
    written = copy.deepcopy(oracle.projects)
    oracle.projects = before.projects  # not committed yet
    campaign.answer(keys[1], ANN, "spam")
    assert campaign.pull().events == {"label": 1}
    held = oracle.projects[campaign.ref.project_id].tasks
    for task in written[campaign.ref.project_id].tasks.values():
        if late in task.annotations:
            held[task.task_id] = task
    assert campaign.pull().events == {"label": 1}


def test_a_note_that_is_lost_costs_one_audit_that_reads_everything(campaign: Campaign, oracle: CountingOracle) -> None:
    campaign.workspace.layout.pull_state.unlink()
    campaign.pull(audit=True)
    assert oracle.read == {"all": 10}
    oracle.read.clear()
    campaign.pull(audit=True)
    assert oracle.read["all"] == 0


def test_a_pull_that_reads_everything_finds_no_deleted_task_and_the_next_audit_does(campaign: Campaign) -> None:
    campaign.workspace.layout.pull_state.unlink()
    campaign.rig.delete_task(campaign.ref, campaign.tasks[3].plan.push_key)
    assert campaign.pull().events == {}
    assert campaign.pull(audit=True).events == {"task_gone": 1}


def test_a_task_whose_id_was_given_to_another_is_gone(campaign: Campaign, oracle: CountingOracle) -> None:
    """As many tasks, as many answers, and the pull between has read the new one."""
    oracle.delete_task(campaign.tasks[9].plan.push_key)
    oracle.pass_time(HOUR)
    campaign.tasks[9:] = tasks_of(campaign.workspace.id, 2, 1)
    campaign.push()
    campaign.answer(campaign.tasks[9].plan.push_key, BOB, "ham")
    plans = {task.plan.push_key: task.plan for task in campaign.tasks}
    old = tasks_of(campaign.workspace.id, 1, 10)[9].plan
    assert campaign.pull().events == {"label": 1}
    assert campaign.pull(audit=True, plans={**plans, old.push_key: old}).events == {"task_gone": 1}


def test_answers_that_come_without_a_trace_are_found_at_once(campaign: Campaign, oracle: CountingOracle) -> None:
    """As Label Studio's action that copies an annotation to other tasks makes them."""
    (template,) = oracle.projects[1].tasks[1].annotations.values()
    made = replace(template, annotation_id=99, annotator=BOB)
    oracle.projects[1].tasks[5].annotations[99] = made
    assert campaign.pull().events == {}
    assert campaign.pull(audit=True).events == {"label": 1}


def test_changes_that_hide_one_another_are_found_when_the_rolling_check_comes_to_them(
    campaign: Campaign, oracle: CountingOracle
) -> None:
    """In the database itself: an answer gone and another there, and a third that says something else."""
    held = oracle.projects[1].tasks
    (number,) = held[8].annotations
    taken = held[8].annotations.pop(number)
    held[7].annotations[99] = replace(taken, annotation_id=99, annotator=BOB)
    ((other, edited),) = held[2].annotations.items()
    held[2].annotations[other] = replace(edited, result=tuple(choice_result("spam")))
    found: Counter[str] = Counter()
    for _ in range(4):  # ten tasks, three a time
        found += campaign.pull(audit=True).events
    assert found == {"supersede": 1, "delete": 1, "label": 1}


def test_the_rolling_check_comes_round_however_much_is_new(campaign: Campaign, oracle: CountingOracle) -> None:
    ((other, edited),) = oracle.projects[1].tasks[9].annotations.items()
    oracle.projects[1].tasks[9].annotations[other] = replace(edited, result=tuple(choice_result("spam")))
    found: Counter[str] = Counter()
    for number in range(2, 6):
        oracle.pass_time(HOUR)
        campaign.plan(8, number=number)
        campaign.push()
        found += campaign.pull(audit=True).events
    assert found == {"supersede": 1}


def test_answers_that_the_inbox_has_lost_are_read_again(campaign: Campaign, oracle: CountingOracle) -> None:
    """A damaged line is to be removed from it by hand."""
    before = {event.event_id for event in campaign.events()}
    (path,) = campaign.workspace.layout.inbox_events.glob("pull-*.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]), encoding="utf-8")
    assert campaign.pull().events == {"label": 1}
    assert {event.event_id for event in campaign.events()} == before
    oracle.read.clear()
    assert campaign.pull(audit=True).events == campaign.pull(audit=True).events == {}
    assert oracle.read["all"] == 10, "once"


def test_a_close_and_what_is_added_to_the_ledger_besides_answers_cost_no_full_audit(
    campaign: Campaign, oracle: CountingOracle
) -> None:
    campaign.close()
    made = replace(
        campaign.events()[0], event_id="import", type="import", annotation_key="import:x", annotator="import"
    )
    append_part(campaign.workspace.layout.events, [made])
    campaign.pull()
    campaign.pull(audit=True)
    assert oracle.read["all"] == 0


def test_another_address_of_an_account_is_another_annotator(campaign: Campaign, oracle: CountingOracle) -> None:
    held = oracle.projects[1].tasks[4].annotations
    ((number, answer),) = held.items()
    campaign.edit(number, "spam")
    oracle.pass_time(HOUR)
    campaign.pull(audit=True)
    oracle._people = {"ann@elsewhere.example"}
    for task in oracle.projects[1].tasks.values():
        for one, annotation in task.annotations.items():
            task.annotations[one] = replace(annotation, annotator="ann@elsewhere.example")
    report = campaign.pull(audit=True, max_vanished=10)
    assert report.events == {"label": 10, "delete": 10}


def test_an_answer_given_while_an_audit_reads_does_not_make_it_read_everything(
    campaign: Campaign, oracle: CountingOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle.pass_time(HOUR)
    (key,) = campaign.plan(1, number=2)
    campaign.push()
    oracle.pass_time(HOUR)
    campaign.pull(audit=True)
    oracle.pass_time(HOUR)
    oracle.read.clear()
    late = [campaign.tasks[0].plan.push_key]

    def answer(call: str, moment: str) -> None:
        if call == "totals" and late:
            oracle.answer(late.pop(), BOB, "spam")

    oracle.fault = answer
    assert campaign.pull(audit=True).events == {"label": 1}
    assert oracle.read["all"] == 0


# A real server ---------------------------------------------------------------------------------------


class Rows:
    """Counts requests, and the tasks in their replies."""

    def __init__(self, oracle: LabelStudioOracle) -> None:
        self.requests: Counter[str] = Counter()
        self.tasks = 0
        oracle._transport.http.event_hooks["response"].append(self._count)

    def _count(self, reply: httpx.Response) -> None:
        reply.read()
        self.requests[reply.request.url.path] += 1
        if reply.request.method == "GET" and reply.request.url.path == "/api/tasks/":
            self.tasks += len(reply.json()["tasks"])


def bring(people: ServerRig, ref: ProjectRef, tasks: list[Task]) -> None:
    """Import tasks with an answer each, in one request."""
    rows = [{**task_json(task), "annotations": [{"result": choice_result("ham"), "lead_time": 1.0}]} for task in tasks]
    people._client.projects.import_tasks(ref.project_id, request=rows)  # type: ignore[arg-type]


@pytest.mark.server
def test_what_a_closing_round_reads_does_not_grow_with_the_history(
    label_studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "ROLLING", 20)
    monkeypatch.setattr(pulling, "OVERLAP", timedelta(0))  # else all that this test does is new
    with LabelStudioOracle(label_studio.url, label_studio.token) as oracle, ServerRig(label_studio, oracle) as people:
        campaign, counts = Campaign(people, tmp_path), []
        for number in (1, 3, 5):
            campaign.tasks += tasks_of(campaign.workspace.id, number, 300)
            bring(people, campaign.ref, campaign.tasks[-300:])
            assert campaign.pull(audit=True).events == {"label": 300}
            keys = campaign.plan(4, number=number + 1)
            oracle.import_tasks(campaign.ref, campaign.tasks[-4:])
            for key in keys[:3]:
                campaign.answer(key, ANN, "spam")
            rows = Rows(oracle)
            assert retire(oracle, campaign.ref, RetirePolicy(number + 1)) == (number > 1)
            assert campaign.pull().events == {"label": 3}
            assert campaign.pull(audit=True).events == {}
            counts.append((rows.tasks, sum(rows.requests.values())))
            oracle._transport.http.event_hooks["response"].remove(rows._count)
        assert len({tasks for tasks, _ in counts[1:]}) == 1 and counts[2][1] == counts[1][1], counts
        assert max(tasks for tasks, _ in counts) < 60 < 300


@pytest.mark.server
def test_annotations_copied_to_other_tasks_and_deleted_in_bulk_are_found_on_a_real_server(
    label_studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "OVERLAP", timedelta(0))
    monkeypatch.setattr(pulling, "ROLLING", 1)
    with LabelStudioOracle(label_studio.url, label_studio.token) as oracle, ServerRig(label_studio, oracle) as people:
        campaign = Campaign(people, tmp_path)
        keys = campaign.plan(6)
        campaign.push()
        source = campaign.answer(keys[5], ANN, "ham")
        assert campaign.pull(audit=True).events == {"label": 1}
        ids = {state.push_key: state.task_id for state in oracle.task_states(campaign.ref)}

        def act(action: str, key: str, **more: Any) -> None:
            reply = people._http.post(
                f"{label_studio.url}/api/dm/actions/",
                params={"id": action, "project": campaign.ref.project_id},
                json={"selectedItems": {"all": False, "included": [ids[key]]}, **more},
                headers={"Authorization": f"Token {label_studio.token}"},
            )
            assert reply.is_success, reply.text

        act("propagate_annotations", keys[4], source_annotation_id=source)
        assert campaign.pull().events == {}, "it leaves no trace in the task"
        assert campaign.pull(audit=True).events == {"label": 1}
        act("delete_tasks_annotations", keys[5])
        assert campaign.pull(audit=True).events == {"delete": 1}
        act("delete_tasks", keys[4])
        assert campaign.pull(audit=True).events == {"task_gone": 1}
        assert json.loads(campaign.workspace.layout.pull_state.read_text("utf-8"))["tasks"]
