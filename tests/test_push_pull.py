"""Push and pull: each task once, each answer once, nothing believed unchecked, whatever crashes or is lost."""

from __future__ import annotations

import json
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from annotating import ANN, BOB, SCHEMA, Rig, ServerRig, SimulatedRig, planned, shown, tasks_of
from fault_proxy import AFTER, Fault, FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.annotation.aggregation import fold
from al_pipeline.annotation.changes import state_digest
from al_pipeline.data.ledger import append_inbox, read_events, read_refused
from al_pipeline.errors import BadInput, LabelStudioDown, LabelStudioRefused, VanishedAnswers
from al_pipeline.files import read_json, write_json
from al_pipeline.integrations.label_studio.parsers import parse_annotation, raw_result
from al_pipeline.integrations.label_studio.payloads import choice_result
from al_pipeline.integrations.oracle import ProjectRef, ProjectSpec
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import pull as pulling
from al_pipeline.operations.pull import PullReport, PullRequest, pull
from al_pipeline.operations.push import MAX_REQUEST_BYTES, Landmark, PushReport, RetirePolicy, push, retire
from al_pipeline.params import Schema
from al_pipeline.records import Answer, Event, Task
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

NOW = "2099-01-01T00:00:00Z"


def no_wait(_: float) -> None:
    """A test has no time to sleep."""


class Campaign:
    """A workspace with its project, its plans, and people who answer; `pull` and `push` with the usual arguments."""

    def __init__(self, rig: Rig, root: Path) -> None:
        self.rig = rig
        self.workspace = Workspace(Layout(root), uuid.uuid4().hex[:12])
        self.ref: ProjectRef = rig.oracle.ensure_project(ProjectSpec(self.workspace.id, "clone-1", SCHEMA))
        self.tasks: list[Task] = []

    def plan(self, count: int, number: int = 1, part: Any = "pool") -> list[str]:
        tasks = tasks_of(self.workspace.id, number, count, part)
        self.tasks += tasks
        return [task.plan.push_key for task in tasks]

    def push(self, **more: Any) -> PushReport:
        plan = [task.plan for task in self.tasks]
        return push(self.rig.oracle, self.ref, plan, shown(self.tasks), sleep=no_wait, **more)

    def pull(self, **more: Any) -> PullReport:
        plans = {task.plan.push_key: task.plan for task in self.tasks}
        usual = PullRequest(self.ref, plans, SCHEMA, allow=[], observed_at=NOW, max_vanished=3)
        return pull(self.workspace.layout, self.rig.oracle, replace(usual, **more))

    def events(self) -> list[Event]:
        return read_events(self.workspace.layout.events, self.workspace.layout.inbox_events)

    def refused(self) -> list[Mapping[str, Any]]:
        return read_refused(self.workspace.layout.events, self.workspace.layout.inbox_events)

    def close(self) -> None:
        """What closing a round does to the inbox."""
        for path in append_inbox(self.workspace.layout.inbox_events, self.workspace.layout.events):
            path.unlink()

    def labels(self) -> dict[str, str]:
        return {item.item_id: item.label for item in fold(self.events(), SCHEMA.labels).labeled}

    # In these words, so that each test reads as a story.
    def answer(self, key: str, who: str, label: Any) -> int:
        return self.rig.answer(self.ref, key, who, label)

    def skip(self, key: str, who: str) -> int:
        return self.rig.skip(self.ref, key, who)

    def edit(self, annotation: int, label: Any, cancelled: bool = False) -> None:
        self.rig.edit(self.ref, annotation, label, cancelled)

    def delete(self, annotation: int) -> None:
        self.rig.delete_annotation(self.ref, annotation)


@pytest.fixture
def simulated(tmp_path: Path) -> Campaign:
    return Campaign(SimulatedRig(), tmp_path)


@pytest.fixture(params=["simulated", pytest.param("label_studio", marks=pytest.mark.server)])
def campaign(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Campaign]:
    if request.param == "simulated":
        yield Campaign(SimulatedRig(), tmp_path)
        return
    from al_pipeline.integrations.label_studio.client import LabelStudioOracle

    server = request.getfixturevalue("label_studio")
    with LabelStudioOracle(server.url, server.token) as oracle, ServerRig(server, oracle) as people:
        yield Campaign(people, tmp_path)


def twin(campaign: Campaign) -> SimulatedOracle:
    assert isinstance(campaign.rig.oracle, SimulatedOracle)
    return campaign.rig.oracle


def held(campaign: Campaign) -> list[str | None]:
    """The keys of the tasks that are in the queue or were answered; retired copies are neither."""
    states = campaign.rig.oracle.task_states(campaign.ref)
    return [state.push_key for state in states if state.annotations or not state.is_labeled]


def striking(*calls: tuple[str, str], error: Exception | None = None) -> Callable[[str, str], None]:
    """A fault hook that raises at each of `calls`, in that order, once each."""
    left = list(calls)

    def strike(call: str, moment: str) -> None:
        if left and left[0] == (call, moment):
            left.pop(0)
            raise error or LabelStudioDown("struck")

    return strike


# Push ------------------------------------------------------------------------------------------------


def test_a_push_sends_each_task_once_in_plan_order(campaign: Campaign) -> None:
    keys = campaign.plan(7)
    assert campaign.push(chunk=3) == PushReport(present=0, sent=7, duplicates_retired=0)
    assert campaign.push(chunk=3) == PushReport(present=7, sent=0, duplicates_retired=0)
    assert held(campaign) == keys


def test_tasks_that_are_there_are_not_read_again(simulated: Campaign) -> None:
    simulated.plan(3)
    simulated.push()
    plan = [task.plan for task in simulated.tasks]
    report = push(simulated.rig.oracle, simulated.ref, plan, lambda _: pytest.fail("the pool was read"), sleep=no_wait)
    assert report == PushReport(present=3, sent=0, duplicates_retired=0)


def test_what_is_missing_is_sent(campaign: Campaign) -> None:
    keys = campaign.plan(4)
    campaign.rig.oracle.import_tasks(campaign.ref, campaign.tasks[1:3])
    assert campaign.push() == PushReport(present=2, sent=2, duplicates_retired=0)
    assert sorted(map(str, held(campaign))) == keys


@pytest.mark.parametrize("there", ["as known", "deleted", "another task", "unknown"])
def test_the_server_searches_only_after_the_round_before_while_that_is_as_known(
    campaign: Campaign, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of the plan that is there is found in each case, a lower id included, and none is sent twice."""
    campaign.plan(2, 1)
    early = campaign.push()
    last = campaign.tasks[-1].plan
    number = early.task_ids[last.push_key]
    campaign.tasks = []
    keys = campaign.plan(3, 2)
    campaign.rig.oracle.import_tasks(campaign.ref, campaign.tasks[:2])
    if there == "deleted":
        campaign.rig.delete_task(campaign.ref, last.push_key)
    elif there == "unknown":
        number += 1  # that of the first task of the plan
    landmark = Landmark(number, "another" if there == "another task" else last.item_id)
    assert campaign.push(landmark=landmark) == PushReport(present=2, sent=1, duplicates_retired=0)
    seen: list[tuple[int | None, int]] = []
    oracle, real = campaign.rig.oracle, type(campaign.rig.oracle).task_states

    def task_states(ref: ProjectRef, round: int | None = None, first: int = 0) -> Any:
        seen.append((round, first))
        return real(oracle, ref, round, first)  # type: ignore[arg-type]

    monkeypatch.setattr(oracle, "task_states", task_states)
    assert campaign.push(landmark=landmark) == PushReport(present=3, sent=0, duplicates_retired=0)
    assert seen == [(None, number), *([] if there == "as known" else [(2, 0)])]
    monkeypatch.undo()
    assert sorted(map(str, held(campaign)))[-3:] == keys


def test_duplicates_leave_the_queue_and_none_is_deleted(campaign: Campaign) -> None:
    keys = campaign.plan(3)
    campaign.push()
    campaign.answer(keys[0], ANN, "ham")
    campaign.skip(keys[1], ANN)
    campaign.rig.oracle.import_tasks(campaign.ref, campaign.tasks)
    assert campaign.push() == PushReport(present=3, sent=0, duplicates_retired=3)
    assert campaign.push() == PushReport(present=3, sent=0, duplicates_retired=0)
    states = list(campaign.rig.oracle.task_states(campaign.ref))
    assert [(state.push_key, state.annotations, state.cancelled, state.is_labeled) for state in states] == [
        (keys[0], 1, 0, True),
        (keys[1], 0, 1, False),
        (keys[2], 0, 0, False),
        *((key, 0, 0, True) for key in keys),
    ]


def test_an_answer_to_a_retired_copy_counts_and_none_lands_on_another_task(simulated: Campaign) -> None:
    """Somebody had the second copy open when it left the queue; its number is not given to the next task."""
    keys = simulated.plan(2)
    simulated.push()
    twin(simulated).import_tasks(simulated.ref, simulated.tasks[1:])
    shown = max(twin(simulated).projects[1].tasks)
    assert simulated.push().duplicates_retired == 1
    new = simulated.plan(1, number=2)
    simulated.push()
    twin(simulated)._annotate(twin(simulated).projects[1].tasks[shown], ANN, "spam", cancelled=False)
    simulated.pull(audit=True)
    assert [(event.annotation_key.rpartition("#")[0], event.label) for event in simulated.events()] == [
        (keys[1], "spam")
    ]
    assert simulated.push().duplicates_retired == 1, "now the answered copy is the one that stays"
    assert twin(simulated).queue(BOB) == [keys[0], *new]


def test_a_task_of_which_only_a_retired_copy_is_left_is_sent_again(simulated: Campaign) -> None:
    keys = simulated.plan(1)
    simulated.push()
    twin(simulated).import_tasks(simulated.ref, simulated.tasks)
    simulated.push()
    twin(simulated).delete_task(keys[0])
    assert simulated.push() == PushReport(present=0, sent=1, duplicates_retired=0)
    assert twin(simulated).queue(ANN) == keys


def test_of_two_answered_copies_both_answers_count(simulated: Campaign) -> None:
    (key,) = simulated.plan(1)
    simulated.push()
    twin(simulated).import_tasks(simulated.ref, simulated.tasks)
    for task, who, label in zip(twin(simulated).projects[1].tasks.values(), (ANN, BOB), ("ham", "spam"), strict=True):
        twin(simulated)._annotate(task, who, label, cancelled=False)
    assert simulated.push() == PushReport(present=1, sent=0, duplicates_retired=0)
    simulated.pull()
    assert Counter((event.annotator, event.label) for event in simulated.events()) == {
        (ANN, "ham"): 1,
        (BOB, "spam"): 1,
    }


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_lost_requests_and_replies_leave_each_task_once(simulated: Campaign, moment: str, times: int) -> None:
    keys = simulated.plan(7)
    twin(simulated).fault = striking(*[("import_tasks", moment)] * times)
    report = simulated.push(chunk=3)
    assert held(simulated) == keys
    assert report.sent == 7


@pytest.mark.parametrize("call", ["task_states", "import_tasks"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_push_killed_at_any_call_is_finished_by_the_next(simulated: Campaign, call: str, moment: str) -> None:
    keys = simulated.plan(5)
    for passed in range(4):
        twin(simulated).fault = dying_after(passed, call, moment)
        with pytest.raises((KeyboardInterrupt, StopIteration)):
            simulated.push(chunk=2)
            raise StopIteration
    twin(simulated).fault = None
    simulated.push(chunk=2)
    assert held(simulated) == keys


def dying_after(passed: int, call: str, moment: str) -> Callable[[str, str], None]:
    left = [passed]

    def strike(now: str, when: str) -> None:
        if (now, when) == (call, moment):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1

    return strike


def test_a_request_that_commits_late_leaves_each_task_once(simulated: Campaign) -> None:
    """The reply times out, the server commits after we looked and sent again."""
    keys = simulated.plan(3)
    oracle = twin(simulated)
    late: list[Task] = []
    send = oracle.import_tasks

    def timing_out(ref: ProjectRef, tasks: Any) -> None:
        if not late:
            late.extend(tasks)
            raise LabelStudioDown("no reply in time")
        send(ref, late)
        send(ref, tasks)

    oracle.import_tasks = timing_out  # type: ignore[method-assign]
    assert simulated.push().duplicates_retired == 3
    assert held(simulated) == keys


def test_attempts_are_bounded_and_a_refusal_ends_at_once(simulated: Campaign) -> None:
    simulated.plan(2)
    calls: list[str] = []

    def count(call: str, moment: str) -> None:
        if call == "import_tasks":
            calls.append(moment)
            raise error

    twin(simulated).fault = count
    error: Exception = LabelStudioDown("down")
    with pytest.raises(LabelStudioDown):
        simulated.push()
    assert len(calls) == 4
    calls.clear()
    error = LabelStudioRefused("not valid")
    with pytest.raises(LabelStudioRefused):
        simulated.push()
    assert len(calls) == 1


def test_requests_are_bounded_in_bytes(simulated: Campaign) -> None:
    simulated.plan(5)
    simulated.tasks = [replace(task, fields={"text": "ü" * 300_000}) for task in simulated.tasks]
    sizes: list[int] = []
    send = twin(simulated).import_tasks

    def measuring(ref: ProjectRef, tasks: Any) -> None:
        sizes.append(len(tasks))
        send(ref, tasks)

    twin(simulated).import_tasks = measuring  # type: ignore[method-assign]
    simulated.push()
    assert sizes == [MAX_REQUEST_BYTES // (300_000 * len("\\u00fc"))] * 2 + [1]


def test_a_plan_that_names_a_task_twice_is_refused(simulated: Campaign) -> None:
    simulated.plan(1)
    simulated.plan(1)
    with pytest.raises(BadInput, match="twice"):
        simulated.push()


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["import_tasks"]), st.sampled_from(["before", "after"])), max_size=3), st.data()
)
def test_whatever_is_there_and_whatever_fails_each_task_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, faults: list[tuple[str, str]], data: st.DataObject
) -> None:
    campaign = Campaign(SimulatedRig(), tmp_path_factory.mktemp("push"))
    keys = campaign.plan(6)
    there = data.draw(st.lists(st.sampled_from(campaign.tasks), max_size=9))
    twin(campaign).import_tasks(campaign.ref, there)
    for key in (
        data.draw(st.lists(st.sampled_from(sorted({t.plan.push_key for t in there})), max_size=3)) if there else []
    ):
        campaign.answer(key, ANN, "ham")
    answered = sum(state.annotations for state in twin(campaign).task_states(campaign.ref))
    twin(campaign).fault = striking(*faults)
    campaign.push(chunk=data.draw(st.integers(1, 6)))
    queue = {key for who in (ANN, BOB, "new@example.com") for key in twin(campaign).queue(who)}
    states = list(twin(campaign).task_states(campaign.ref))
    done = {state.push_key for state in states if state.annotations}
    assert queue | done == set(keys)
    waiting = Counter(state.push_key for state in twin(campaign).open_tasks(campaign.ref))
    assert max(waiting.values(), default=1) == 1 and not done & set(waiting)
    assert len(states) >= len(there), "nothing is deleted"
    assert sum(state.annotations for state in twin(campaign).task_states(campaign.ref)) == answered


@pytest.mark.server
@pytest.mark.parametrize("fault", [*AFTER, "502_before", "429_before"])
def test_a_bad_network_before_the_real_server_leaves_each_task_once(
    label_studio: Any, tmp_path: Path, fault: Fault
) -> None:
    from al_pipeline.integrations.label_studio.client import LabelStudioOracle

    with (
        FaultProxy(label_studio.url) as proxy,
        LabelStudioOracle(proxy.url, label_studio.token) as oracle,
        ServerRig(label_studio, oracle) as people,
    ):
        campaign = Campaign(people, tmp_path)
        keys = campaign.plan(10)
        proxy.strike(fault, times=3)
        campaign.push(chunk=4)
        assert proxy.struck == 3
        assert held(campaign) == keys


def test_open_pool_tasks_of_earlier_rounds_are_retired(campaign: Campaign) -> None:
    old, test, new = campaign.plan(4, 1), campaign.plan(2, 2, "test"), campaign.plan(2, 3)
    campaign.push()
    campaign.answer(old[0], ANN, "ham")
    campaign.skip(old[1], ANN)
    assert retire(campaign.rig.oracle, campaign.ref, RetirePolicy(3)) == 3
    assert retire(campaign.rig.oracle, campaign.ref, RetirePolicy(3)) == 0
    open_keys = [state.push_key for state in campaign.rig.oracle.task_states(campaign.ref) if not state.is_labeled]
    assert open_keys == test + new


def test_another_overlap_brings_no_settled_task_back(campaign: Campaign) -> None:
    """Label Studio opens every task again, retired and answered ones, when the project's overlap changes."""
    old, test, new = campaign.plan(2, 1), campaign.plan(2, 2, "test"), campaign.plan(2, 3)
    campaign.push()
    campaign.answer(old[0], ANN, "ham")
    campaign.answer(test[0], ANN, "ham")
    campaign.answer(new[0], ANN, "ham")
    assert retire(campaign.rig.oracle, campaign.ref, RetirePolicy(3, overlaps={1: 1, 2: 1})) == 1

    def open_keys(overlap: int) -> list[str | None]:
        campaign.rig.oracle.ensure_project(ProjectSpec(campaign.workspace.id, "clone-1", SCHEMA, overlap), campaign.ref)
        retire(campaign.rig.oracle, campaign.ref, RetirePolicy(3, overlaps={1: 1, 2: 1}))
        return [state.push_key for state in campaign.rig.oracle.open_tasks(campaign.ref)]

    assert open_keys(2) == [test[1], *new], "what this round asks wants a second answer; nothing else comes back"
    assert open_keys(1) == [test[1], new[1]]


def test_a_half_answered_task_stays_in_the_queue(simulated: Campaign) -> None:
    keys = simulated.plan(2)
    twin(simulated).projects[1].overlap = 2
    simulated.push()
    simulated.answer(keys[0], ANN, "ham")
    assert retire(simulated.rig.oracle, simulated.ref, RetirePolicy(2)) == 1
    assert twin(simulated).queue(BOB) == [keys[0]]


# Pull ------------------------------------------------------------------------------------------------


def test_answers_and_skips_become_events_once(campaign: Campaign) -> None:
    keys = campaign.plan(4)
    campaign.push()
    campaign.answer(keys[0], ANN, "spam")
    campaign.skip(keys[1], BOB)
    assert campaign.pull().events == {"label": 1, "skip": 1}
    label, skip = campaign.events()
    assert (label.type, label.label, label.annotator, label.item_id, label.round) == ("label", "spam", ANN, "item-0", 1)
    assert (skip.type, skip.label, skip.annotator) == ("skip", None, BOB)
    assert label.annotation_key.rpartition("#")[0] == keys[0]
    before = campaign.events()
    for again in ({}, {"audit": True}, {"observed_at": "2100-01-01T00:00:00+00:00"}):
        report = campaign.pull(**again)
        assert (report.events, report.refused) == ({}, {})
    campaign.close()
    campaign.workspace.layout.pull_state.unlink()
    assert campaign.pull().events == {}
    assert campaign.events() == before


def test_an_edit_supersedes_and_a_deletion_deletes(campaign: Campaign) -> None:
    keys = campaign.plan(2)
    campaign.push()
    annotation = campaign.answer(keys[0], ANN, "spam")
    campaign.pull()
    campaign.edit(annotation, "ham")
    assert campaign.pull().events == {"supersede": 1}
    campaign.edit(annotation, [], cancelled=True)
    assert campaign.pull().events == {"supersede": 1}
    assert campaign.labels() == {}
    campaign.edit(annotation, "ham")
    assert campaign.pull().events == {"supersede": 1}
    assert campaign.labels() == {"item-0": "ham"}
    campaign.close()
    campaign.delete(annotation)
    assert campaign.pull().events == {"delete": 1}
    assert campaign.labels() == {}
    events = campaign.events()
    assert [event.previous for event in events] == [None, *(event.event_id for event in events[:-1])]
    assert campaign.pull().events == campaign.pull(audit=True).events == {}


def test_a_changed_mind_between_two_pulls_is_seen_as_it_ended(campaign: Campaign) -> None:
    keys = campaign.plan(1)
    campaign.push()
    gone = campaign.answer(keys[0], ANN, "spam")
    campaign.delete(gone)
    campaign.answer(keys[0], ANN, "ham")
    assert campaign.pull().events == {"label": 1}
    assert campaign.labels() == {"item-0": "ham"}


def test_an_annotation_that_comes_back_counts_again(simulated: Campaign) -> None:
    (key,) = simulated.plan(1)
    simulated.push()
    annotation = simulated.answer(key, ANN, "spam")
    simulated.pull()
    for _ in range(2):
        was = twin(simulated).delete_annotation(annotation)
        assert simulated.pull().events == {"delete": 1}
        assert simulated.labels() == {}
        twin(simulated).restore_annotation(key, was)
        assert simulated.pull().events == {"label": 1}
        assert simulated.labels() == {"item-0": "spam"}
        assert simulated.pull(audit=True).events == {}
    assert len({event.event_id for event in simulated.events()}) == 5


def test_a_server_restored_to_an_earlier_state_is_followed(simulated: Campaign) -> None:
    (key,) = simulated.plan(1)
    simulated.push()
    annotation = simulated.answer(key, ANN, "spam")
    simulated.pull()
    was = twin(simulated).projects[1].tasks[1].annotations[annotation]
    simulated.edit(annotation, "ham")
    simulated.pull()
    twin(simulated).restore_annotation(key, was)
    assert simulated.pull().events == {"supersede": 1}
    assert simulated.labels() == {"item-0": "spam"}
    assert simulated.pull().events == {}


def result(**changes: Any) -> list[dict[str, Any]]:
    return [{**choice_result("ham")[0], **changes}]


COMMENT = {"from_name": "why", "to_name": "text", "type": "textarea", "value": {"text": ["not sure"]}}

UNBELIEVABLE: list[tuple[Any, str]] = [
    (choice_result("eggs"), "unknown label"),
    (choice_result("Ham"), "unknown label"),
    (result(from_name="other"), "wrong from_name"),
    ([], "empty result"),
    (result(value={"choices": []}), "empty result"),
    (result(value={"choices": ["ham", "spam"]}), "several choices"),
    ([*choice_result("ham"), *choice_result("ham")], "several choices"),
    ([*choice_result("ham"), {"value": None}], "malformed"),
    ([COMMENT], "empty result"),
    (result(value={}), "malformed"),
    (result(value={"choices": "ham"}), "malformed"),
    (result(value={"choices": [{"ham": 1}]}), "malformed"),
    ([{"value": None}], "malformed"),
]


def test_answers_that_cannot_be_believed_are_kept_aside_until_they_are_mended(campaign: Campaign) -> None:
    keys = campaign.plan(len(UNBELIEVABLE))
    campaign.push()
    made = [campaign.answer(key, ANN, raw) for key, (raw, _) in zip(keys, UNBELIEVABLE, strict=True)]
    report = campaign.pull()
    assert report.events == {}
    kept = {row["push_key"]: (json.loads(row["result"]), row["reason"]) for row in campaign.refused()}
    assert kept == dict(zip(keys, UNBELIEVABLE, strict=True))
    assert report.refused == Counter(reason for _, reason in UNBELIEVABLE)
    assert campaign.pull(audit=True).refused == {}
    campaign.close()
    campaign.edit(made[0], "ham")
    report = campaign.pull()
    assert (report.events, report.refused) == ({"label": 1}, {})


@pytest.mark.parametrize("raw", [[*choice_result("ham"), COMMENT], [COMMENT, *choice_result("ham")]])
def test_a_comment_beside_the_choice_does_not_matter(campaign: Campaign, raw: list[dict[str, Any]]) -> None:
    (key,) = campaign.plan(1)
    campaign.push()
    campaign.answer(key, ANN, raw)
    assert (campaign.pull().events, campaign.refused()) == ({"label": 1}, [])
    assert campaign.labels() == {"item-0": "ham"}


def test_an_answer_edited_into_nonsense_no_longer_counts_and_a_mended_one_does(campaign: Campaign) -> None:
    keys = campaign.plan(1)
    campaign.push()
    annotation = campaign.answer(keys[0], ANN, "ham")
    campaign.pull()
    campaign.edit(annotation, choice_result("eggs"))
    report = campaign.pull()
    assert (report.events, report.refused) == ({"delete": 1}, {"unknown label": 1})
    assert campaign.labels() == {}
    assert campaign.pull(audit=True).events == {}
    campaign.edit(annotation, "spam")
    assert campaign.pull().events == {"label": 1}
    assert campaign.labels() == {"item-0": "spam"}


def test_an_answer_on_changed_text_is_refused_and_one_from_before_stands(campaign: Campaign) -> None:
    keys = campaign.plan(2)
    campaign.push()
    first = campaign.answer(keys[0], ANN, "ham")
    campaign.pull()
    for key in keys:
        campaign.rig.edit_data(campaign.ref, key, text="Something else.")
    assert campaign.pull().events == {}
    campaign.edit(first, "spam")
    campaign.answer(keys[1], ANN, "spam")
    report = campaign.pull()
    assert (report.events, report.refused) == ({}, {"changed text": 2})
    assert campaign.labels() == {"item-0": "ham"}


def test_a_column_that_people_added_to_a_task_changes_nothing(campaign: Campaign) -> None:
    keys = campaign.plan(1)
    campaign.push()
    campaign.rig.edit_data(campaign.ref, keys[0], note="look twice")
    campaign.answer(keys[0], ANN, "ham")
    assert campaign.pull().events == {"label": 1}


@pytest.mark.parametrize("change", [{"item_id": "item-1"}, {"shown_hash": None}, {"text": 7}])
def test_a_task_whose_keys_were_edited_is_not_believed(simulated: Campaign, change: dict[str, Any]) -> None:
    keys = simulated.plan(2)
    simulated.push()
    simulated.rig.edit_data(simulated.ref, keys[0], **change)
    simulated.answer(keys[0], ANN, "ham")
    assert simulated.pull().refused == {"changed text": 1}


def test_only_people_on_the_list_are_believed_where_there_is_one(campaign: Campaign) -> None:
    keys = campaign.plan(2)
    campaign.push()
    campaign.answer(keys[0], ANN, "ham")
    campaign.answer(keys[1], BOB, "ham")
    report = campaign.pull(allow=[" Ann@Example.com"])
    assert (report.events, report.refused) == ({"label": 1}, {"annotator not allowed": 1})
    assert campaign.pull(allow=[ANN, BOB], audit=True).events == {"label": 1}


def test_tasks_that_are_not_ours_give_no_labels(campaign: Campaign) -> None:
    campaign.plan(1)
    campaign.push()
    stranger = Task(planned("another", 1, "x"), {"text": "?"})
    campaign.rig.oracle.import_tasks(campaign.ref, [stranger])
    campaign.answer(stranger.plan.push_key, ANN, "ham")
    report = campaign.pull()
    assert (report.events, report.refused) == ({}, {"task not ours": 1})


def test_a_deleted_task_voids_no_answer(campaign: Campaign) -> None:
    keys = campaign.plan(2)
    campaign.push()
    campaign.answer(keys[0], ANN, "ham")
    campaign.pull()
    campaign.rig.delete_task(campaign.ref, keys[0])
    assert campaign.pull().events == {}
    assert campaign.pull(audit=True).events == {"task_gone": 1}
    assert campaign.pull(audit=True).events == {}
    assert campaign.labels() == {"item-0": "ham"}


def test_a_deleted_task_that_is_sent_again_voids_no_answer(campaign: Campaign) -> None:
    """Its key and (on SQLite) its very id are there again; only its time of creation tells."""
    keys = campaign.plan(1)
    campaign.push()
    campaign.answer(keys[0], ANN, "ham")
    campaign.pull()
    campaign.rig.delete_task(campaign.ref, keys[0])
    campaign.push()
    assert campaign.pull().events == {"task_gone": 1}
    assert campaign.labels() == {"item-0": "ham"}
    campaign.answer(keys[0], ANN, "spam")
    assert campaign.pull().events == {"label": 1}
    assert campaign.labels() == {"item-0": "spam"}
    assert campaign.pull(audit=True).events == {}


def test_a_reused_id_mixes_nothing_up(simulated: Campaign) -> None:
    keys = simulated.plan(1)
    simulated.push()
    simulated.answer(keys[0], ANN, "ham")
    simulated.pull()
    simulated.rig.delete_task(simulated.ref, keys[0])
    simulated.tasks = tasks_of(simulated.workspace.id, 2, 2)[1:]
    simulated.push()
    assert list(twin(simulated).projects[1].tasks) == [1]
    simulated.answer(simulated.tasks[0].plan.push_key, BOB, "spam")
    assert simulated.pull().events == {"label": 1}
    assert simulated.labels() == {"item-0": "ham", "item-1": "spam"}


def test_an_answer_on_another_copy_of_its_task_has_not_vanished(simulated: Campaign) -> None:
    (key,) = simulated.plan(1)
    simulated.push()
    simulated.answer(key, ANN, "ham")
    simulated.pull()
    twin(simulated).pass_time(3600)  # beyond the window that every pull looks back over
    twin(simulated).import_tasks(simulated.ref, simulated.tasks)
    assert simulated.pull().events == {}
    twin(simulated).projects[1].tasks[2].updated_at = twin(simulated).pass_time(60)
    changed_since = read_json(simulated.workspace.layout.pull_state)["cursor"]
    assert [task.task_id for task in twin(simulated).answered(simulated.ref, changed_since)] == [2]
    assert simulated.pull().events == {}


def test_too_many_vanished_answers_stop_the_pull_with_nothing_recorded(campaign: Campaign) -> None:
    keys = campaign.plan(4)
    campaign.push()
    annotations = [campaign.answer(key, ANN, "ham") for key in keys[:3]]
    campaign.pull()
    before, cursor = campaign.events(), read_json(campaign.workspace.layout.pull_state)
    campaign.answer(keys[3], ANN, "ham")
    campaign.delete(annotations[0])
    campaign.delete(annotations[1])
    with pytest.raises(VanishedAnswers, match="2 known answers.*al round --accept-vanished"):
        campaign.pull(max_vanished=1)
    assert campaign.events() == before
    assert read_json(campaign.workspace.layout.pull_state) == cursor
    assert campaign.pull(max_vanished=1, accept_vanished=True).events == {"delete": 2, "label": 1}
    assert campaign.pull(max_vanished=0, audit=True).events == {}


def test_an_emptied_project_stops_the_pull(simulated: Campaign) -> None:
    keys = simulated.plan(3)
    simulated.push()
    for key in keys:
        simulated.answer(key, ANN, "ham")
    simulated.pull()
    twin(simulated).projects[1].tasks.clear()
    with pytest.raises(VanishedAnswers, match="3 known answers"):
        simulated.pull(max_vanished=2, audit=True)
    assert simulated.pull(max_vanished=2, audit=True, accept_vanished=True).events == {"task_gone": 3}
    assert len(simulated.labels()) == 3


def test_another_project_voids_nothing_of_the_old_one(simulated: Campaign) -> None:
    (key,) = simulated.plan(1)
    simulated.push()
    simulated.answer(key, ANN, "ham")
    simulated.pull()
    del twin(simulated).projects[1]
    simulated.ref = twin(simulated).ensure_project(ProjectSpec(simulated.workspace.id, "clone-1", SCHEMA))
    simulated.push()
    twin(simulated)._last_annotation = 0  # another server counts from one again
    simulated.answer(key, BOB, "ham")
    assert simulated.pull(max_vanished=0, audit=True).events == {"label": 1}
    assert [event.type for event in simulated.events()] == ["label", "label"]


@pytest.mark.parametrize("who", [BOB, ANN])
def test_a_number_that_a_restored_server_gives_again_is_another_answer(simulated: Campaign, who: str) -> None:
    """To somebody else, or to the same person at another time: one answer vanished and one is new."""
    keys = simulated.plan(3)
    simulated.push()
    saved = twin(simulated).backup()
    number = simulated.answer(keys[0], ANN, "ham")
    simulated.pull()
    twin(simulated).restore_backup(saved)
    assert simulated.answer(keys[0], who, "spam") == number
    with pytest.raises(VanishedAnswers, match="1 known answers"):
        simulated.pull(max_vanished=0)
    assert simulated.pull(max_vanished=1).events == {"label": 1, "delete": 1}
    assert simulated.labels() == {"item-0": "spam"}
    assert {event.annotator for event in simulated.events() if event.type == "label"} == {ANN, who}
    simulated.close()
    assert simulated.pull(audit=True, max_vanished=0).events == {}
    simulated.edit(number, "ham")
    assert simulated.pull(max_vanished=0).events == {"supersede": 1}


def test_many_numbers_given_to_others_stop_the_pull(simulated: Campaign) -> None:
    keys = simulated.plan(5)
    simulated.push()
    saved = twin(simulated).backup()
    for key in keys:
        simulated.answer(key, ANN, "ham")
    simulated.pull()
    before = simulated.events()
    twin(simulated).restore_backup(saved)
    for key in keys:
        simulated.answer(key, BOB, "ham")
    with pytest.raises(VanishedAnswers, match="5 known answers"):
        simulated.pull()
    assert simulated.events() == before
    twin(simulated).restore_backup(saved)
    for key in reversed(keys):  # the same numbers on other tasks
        simulated.answer(key, ANN, "spam")
    with pytest.raises(VanishedAnswers, match="5 known answers"):
        simulated.pull()


def test_an_answer_that_comes_back_under_its_number_is_the_one_that_it_was(simulated: Campaign) -> None:
    (key,) = simulated.plan(1)
    simulated.push()
    saved = twin(simulated).backup()
    simulated.answer(key, ANN, "ham")
    simulated.pull()
    later = twin(simulated).backup()
    twin(simulated).restore_backup(saved)
    simulated.answer(key, BOB, "spam")
    simulated.pull()
    twin(simulated).restore_backup(later)
    assert simulated.pull(audit=True).events == {"label": 1, "delete": 1}
    assert simulated.labels() == {"item-0": "ham"}
    assert len({event.annotation_key for event in simulated.events()}) == 2


def test_answers_that_earlier_versions_recorded_are_known_again(simulated: Campaign) -> None:
    """Under names that end with the server's number, and ids that say nothing of who answered when."""
    keys = simulated.plan(3)
    simulated.push()
    numbers = [simulated.answer(key, ANN, raw) for key, raw in zip(keys, ["ham", "ham", "eggs"], strict=True)]
    simulated.pull()
    held = {key: task for task in twin(simulated).answered(simulated.ref, None) if (key := task.push_key)}
    for path in simulated.workspace.layout.inbox_events.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            key = row["annotation_key"].rpartition("#")[0] if "annotation_key" in row else row["push_key"]
            [annotation] = held[key].annotations
            old = state_digest(simulated.ref.project_uid, held[key], annotation, with_author=False)
            if "annotation_key" in row:
                name = f"{key}#{simulated.ref.project_uid}.{annotation.annotation_id}"
                row.update(event_id=old, annotation_key=name)
            else:
                row.update(refused_id=old)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = simulated.pull(audit=True, max_vanished=0)
    assert (report.events, report.refused) == ({}, {})
    simulated.edit(numbers[0], "spam")
    assert simulated.pull(max_vanished=0).events == {"supersede": 1}
    assert len({event.annotation_key for event in simulated.events()}) == 2
    simulated.delete(numbers[1])
    assert simulated.pull().events == {"delete": 1}
    assert simulated.labels() == {"item-0": "spam"}


def test_answers_on_a_task_that_is_gone_again_are_counted_as_gone_again(simulated: Campaign) -> None:
    (key,) = simulated.plan(1)
    simulated.push()
    for number, who in enumerate((ANN, BOB), start=1):
        simulated.answer(key, who, "ham")
        simulated.pull()
        simulated.rig.delete_task(simulated.ref, key)
        with pytest.raises(VanishedAnswers, match="1 known answers"):
            simulated.pull(audit=True, max_vanished=0)
        assert simulated.pull(audit=True).events == {"task_gone": 1}
        assert simulated.pull(audit=True, max_vanished=0).events == {}
        assert len([event for event in simulated.events() if event.type == "task_gone"]) == number
        simulated.push()
    assert simulated.labels() == {"item-0": "ham"}


@pytest.mark.parametrize("broken", ["add_to_inbox", "write_text"])
def test_a_pull_killed_before_the_inbox_or_the_cursor_is_made_good_by_the_next(
    simulated: Campaign, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    keys = simulated.plan(2)
    simulated.push()
    simulated.answer(keys[0], ANN, "ham")
    simulated.answer(keys[1], ANN, [])

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pulling, broken, crash)
    with pytest.raises(KeyboardInterrupt):
        simulated.pull()
    monkeypatch.undo()
    simulated.pull()
    assert [event.label for event in simulated.events()] == ["ham"]
    assert [row["reason"] for row in simulated.refused()] == ["empty result"]


@pytest.mark.parametrize("state", [None, [], {}, {"project_uid": "x"}, {"cursor": "2099"}, {"cursor": 7}])
def test_a_lost_or_foreign_cursor_costs_a_full_pull(simulated: Campaign, state: Any) -> None:
    (key,) = simulated.plan(1)
    simulated.push()
    if isinstance(state, dict) and "cursor" in state:
        state = {"project_uid": simulated.ref.project_uid, **state}
    write_json(simulated.workspace.layout.pull_state, state)
    simulated.answer(key, ANN, "ham")
    assert simulated.pull().events == {"label": 1}


def test_the_cursor_stays_behind_both_clocks(simulated: Campaign) -> None:
    (key,) = simulated.plan(1)
    simulated.push()
    simulated.answer(key, ANN, "ham")
    assert simulated.pull(observed_at="2099-01-01T00:00:00+00:00").cursor == "2025-12-31T23:50:02.000000Z"
    slow = simulated.pull(observed_at="2025-06-01T12:00:00", audit=True)
    assert slow.cursor == "2025-06-01T11:50:00.000000Z"


def test_events_stand_in_the_order_in_which_people_answered(simulated: Campaign) -> None:
    keys = simulated.plan(3)
    simulated.push()
    for key in reversed(keys):
        simulated.answer(key, ANN, "ham")
    simulated.pull()
    assert [event.item_id for event in simulated.events()] == ["item-2", "item-1", "item-0"]


def test_a_shown_guess_is_recorded_with_what_became_of_it(simulated: Campaign) -> None:
    simulated.plan(2)
    simulated.tasks[0] = replace(simulated.tasks[0], guess=("ham", 0.9))
    simulated.push()
    simulated.answer(simulated.tasks[0].plan.push_key, ANN, result(origin="prediction"))
    simulated.answer(simulated.tasks[1].plan.push_key, ANN, result(origin={"any": "thing"}))
    simulated.pull()
    assert [(e.prelabel_shown, e.origin) for e in simulated.events()] == [(True, "prediction"), (False, None)]


# Whatever people and scripts put into a result --------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.sampled_from(["ham", "label", "\ud800", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from_name", "value", "choices", "origin", "x"]), inner, max_size=3)
    ),
    max_leaves=10,
)
near_misses = st.fixed_dictionaries(
    {
        "from_name": st.just("label") | json_values,
        "value": st.fixed_dictionaries({"choices": json_values}) | json_values,
    }
)
results = json_values | st.lists(near_misses | json_values, max_size=3)


def is_clear(raw: Any) -> bool:
    """Whether a raw result says `ham`, and nothing else, to the question that we asked."""
    return (
        isinstance(raw, list)
        and len(raw) == 1
        and isinstance(raw[0], dict)
        and raw[0].get("from_name") == "label"
        and isinstance(raw[0].get("value"), dict)
        and raw[0]["value"].get("choices") == ["ham"]
    )


@settings(max_examples=400, derandomize=True, deadline=None)
@given(results)
def test_only_a_clear_answer_is_believed(raw: Any) -> None:
    believed = isinstance(parse_annotation(raw_result(raw), False, SCHEMA), Answer)
    assert believed == is_clear(raw)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(results, st.booleans())
def test_no_result_raises_and_only_a_clear_answer_is_believed(
    tmp_path_factory: pytest.TempPathFactory, raw: Any, cancelled: bool
) -> None:
    campaign = Campaign(SimulatedRig(), tmp_path_factory.getbasetemp() / uuid.uuid4().hex)
    (key,) = campaign.plan(1)
    campaign.push()
    annotation = campaign.answer(key, ANN, "spam")
    campaign.edit(annotation, [raw] if isinstance(raw, str) else raw, cancelled)
    report = campaign.pull()
    clear = is_clear(raw)
    expected = {"skip": 1} if cancelled else {"label": 1} if clear else {}
    assert report.events == expected
    assert sum(report.refused.values()) == (0 if expected else 1)
    assert campaign.labels() == ({"item-0": "ham"} if clear and not cancelled else {})
    assert (campaign.pull().events, campaign.pull().refused) == ({}, {})


@settings(max_examples=50, derandomize=True)
@given(st.sampled_from(["ham", "spam", "a b", "ünï"]), st.sampled_from(["manual", "prediction", "prediction-changed"]))
def test_every_class_of_the_schema_is_believed(label: str, origin: str) -> None:
    schema = Schema(version=1, question="?", labels=["ham", "spam", "a b", "ünï"], fields=["text"])
    assert parse_annotation(result(value={"choices": [label]}, origin=origin), False, schema) == Answer(label, origin)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_answer_is_compared_in_one_form_of_unicode(form):
    schema = replace(SCHEMA, labels=["Café", "other"])
    label = unicodedata.normalize(form, "Café")
    assert parse_annotation(result(value={"choices": [label]}), False, schema) == Answer("Café", None)


acts = st.lists(
    st.tuples(st.sampled_from(["ham", "spam", "skip", "junk", "edit", "delete", "pull", "close"]), st.integers(0, 2)),
    max_size=25,
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(acts)
def test_after_a_pull_the_labels_are_what_label_studio_holds(
    tmp_path_factory: pytest.TempPathFactory, story: list[tuple[str, int]]
) -> None:
    """Whatever people did, and whenever we looked: one annotator, whose newest answer to each item is the label."""
    campaign = Campaign(SimulatedRig(), tmp_path_factory.getbasetemp() / uuid.uuid4().hex)
    keys = campaign.plan(3)
    campaign.push()
    newest: dict[str, int] = {}
    for act, number in story:
        key = keys[number]
        known = newest.get(key)
        if act == "pull":
            campaign.pull(max_vanished=99)
        elif act == "close":
            campaign.close()
        elif act == "delete":
            if known is not None:
                campaign.delete(newest.pop(key))
        elif known is None:
            if act == "skip":
                newest[key] = campaign.skip(key, ANN)
            else:
                newest[key] = campaign.answer(key, ANN, [] if act == "junk" else "ham" if act == "edit" else act)
        else:
            campaign.edit(known, [] if act in ("skip", "junk") else "spam" if act == "edit" else act, act == "skip")
    campaign.pull(max_vanished=99)
    expected = {}
    for task in twin(campaign).projects[1].tasks.values():
        for annotation in task.annotations.values():
            answer = parse_annotation(annotation.result, annotation.was_cancelled, SCHEMA)
            if isinstance(answer, Answer) and answer.label is not None:
                expected[task.data["item_id"]] = answer.label
    assert campaign.labels() == expected
