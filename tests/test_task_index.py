"""Laws of the audit's checks: when they find nothing, what was not read is what it was when it was last read."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from annotating import ANN, BOB, SCHEMA, tasks_of
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.annotation.task_index import TaskIndex, version_of, without_account
from al_pipeline.integrations.oracle import ProjectRef, ProjectSpec
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.records import AnsweredTask, TaskVersion

HOUR, OVERLAP = 3600.0, 600.0
TRACED = ("answer", "skip", "edit", "delete", "delete_task", "push", "copy", "retire", "back_up", "restore_backup")
"""What people do in Label Studio, and what an administrator does with its backups."""


class Server:
    """A Label Studio where hours pass between any two steps, and what pulls and audits have read of it."""

    def __init__(self) -> None:
        self.oracle = SimulatedOracle()
        self.ref: ProjectRef = self.oracle.ensure_project(ProjectSpec("w", "c", SCHEMA))
        self.sent = 0
        self.saved = self.oracle.backup()
        self.read: dict[int, AnsweredTask] = {}
        """Every task as it was when it was last read."""
        self.known: set[tuple[int, str]] = set()
        """Every task that was read since all were, by id and creation time."""
        self.cursor = self.audited = ""
        self.index: TaskIndex | None = None

    @property
    def tasks(self) -> dict[int, AnsweredTask]:
        """What it holds now."""
        return {task.task_id: task for task in self.oracle.answered(self.ref, None)}

    def changed(self, since: str) -> dict[int, AnsweredTask]:
        return {task.task_id: task for task in self.oracle.answered(self.ref, since)}

    def step(self, name: str, salt: int) -> None:
        self.draw = random.Random(salt)
        getattr(self, name)()
        self.oracle.pass_time(HOUR)

    # People ----------------------------------------------------------------------------------------------------------

    def push(self) -> None:
        self.sent += 1
        self.oracle.import_tasks(self.ref, tasks_of("w", self.sent, self.draw.randint(1, 3)))

    def copy(self) -> None:
        self.oracle.import_tasks(self.ref, tasks_of("w", self.draw.randint(0, self.sent), 1))

    def answer(self, cancelled: bool = False) -> None:
        if held := self.oracle.projects[1].tasks:
            task = held[self.draw.choice(sorted(held))]
            self.oracle._annotate(task, self.draw.choice((ANN, BOB)), self.draw.choice(("ham", "spam")), cancelled)

    def skip(self) -> None:
        self.answer(cancelled=True)

    def annotations(self) -> list[int]:
        return sorted(number for task in self.oracle.projects[1].tasks.values() for number in task.annotations)

    def edit(self) -> None:
        if found := self.annotations():
            self.oracle.edit(self.draw.choice(found), self.draw.choice(("ham", "spam")), self.draw.random() < 0.3)

    def delete(self) -> None:
        if found := self.annotations():
            self.oracle.delete_annotation(self.draw.choice(found))

    def delete_task(self) -> None:
        if held := self.oracle.projects[1].tasks:
            del held[self.draw.choice(sorted(held))]

    def retire(self) -> None:
        self.oracle.retire(self.ref, sorted(self.oracle.projects[1].tasks)[:1])

    def back_up(self) -> None:
        self.saved = self.oracle.backup()

    def restore_backup(self) -> None:
        self.oracle.restore_backup(self.saved)

    # We --------------------------------------------------------------------------------------------------------------

    def pull(self) -> None:
        """Read what is not as it was read; the index is given up where what changed contradicts it."""
        if self.index is None:
            return
        listed = self.oracle.changed(self.ref, self.cursor)
        assert listed == {number: version_of(task) for number, task in self.changed(self.cursor).items()}
        if self.index.missing(self.cursor, listed) or self.index.replaced(listed):
            changed, self.index = self.changed(self.cursor), None
            self._remember(changed)
        else:
            first = self.index.first_change(listed)
            changed = {} if first is None else self.changed(first)
            self._remember(changed)
            self.index = self.index.with_read({number: version_of(task) for number, task in changed.items()})
            assert {one: self.read[one] for one in listed} == self.changed(self.cursor)
        self.cursor = self._following(self.changed(self.cursor))

    def audit(self) -> None:
        """Compare; where nothing differs, everything must be as it was read. Else read everything."""
        changed = self.changed(self.audited)
        found = {number: version_of(task) for number, task in changed.items()}
        if self.index is not None and not (
            self.index.missing(self.audited, found)
            or self.index.replaced(found)
            or self.index.differing(found, self.oracle.totals(self.ref, self.audited))
        ):
            self._remember(changed)
            self.index = self.index.with_read(found)
            assert self.read == self.tasks
            assert self.known == {(number, task.created_at) for number, task in self.tasks.items()}
            assert self.index.tasks == {number: version_of(task) for number, task in self.tasks.items()}
        else:
            self.read, self.known = {}, set()
            self._remember(self.tasks)
            self.index = TaskIndex({number: version_of(task) for number, task in self.read.items()})
        self.cursor = self.audited = self._following(self.read)

    def _remember(self, read: Mapping[int, AnsweredTask]) -> None:
        self.read.update(read)
        self.known |= {(number, task.created_at) for number, task in read.items()}

    def _following(self, read: Mapping[int, AnsweredTask]) -> str:
        """The cursor, ten minutes before the newest change."""
        newest = max((task.updated_at for task in read.values()), default="")
        if not newest:
            return self.cursor
        now, self.oracle._now = self.oracle._now, SimulatedOracle()._now.fromisoformat(newest)
        before = self.oracle.pass_time(-OVERLAP)
        self.oracle._now = now
        return before


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_what_an_audit_does_not_read_is_as_it_was_read(first: int) -> None:
    for seed in range(first, first + 100):
        draw, server = random.Random(seed), Server()
        names = draw.choices((*TRACED, "pull", "pull", "audit"), k=draw.randint(3, 30))
        for name in ("push", "audit", *names, "audit"):
            server.step(name, draw.randrange(10**6))


def begun(answered: int = 2) -> tuple[Server, list[int]]:
    """A server with four tasks, some of them answered, that was audited; and its annotations."""
    server = Server()
    server.oracle.import_tasks(server.ref, tasks_of("w", 1, 4))
    made = []
    for number in range(answered):
        server.oracle.pass_time(HOUR)
        made.append(server.oracle.answer(f"w:0001:item-{number}", ANN, "ham"))
    server.step("audit", 0)
    return server, made


def differing(server: Server) -> str | None:
    assert server.index is not None
    changed = server.changed(server.audited)
    return server.index.differing(changed, server.oracle.totals(server.ref, server.audited))


def test_a_restored_backup_is_found_by_the_time_of_the_newest_change_that_it_took_back() -> None:
    """An edit is taken back, and the answer that was lost has been given again: all counts are as they were."""
    server, (first, _) = begun()
    saved = server.oracle.backup()
    server.oracle.edit(first, "spam")
    server.oracle.pass_time(HOUR)
    server.oracle.answer("w:0001:item-2", ANN, "ham")
    server.step("audit", 0)
    server.oracle.restore_backup(saved)
    server.oracle.answer("w:0001:item-2", ANN, "ham")
    assert differing(server) is not None


def test_answers_that_are_added_or_removed_without_a_trace_are_found_by_their_number() -> None:
    server, (first, _) = begun()
    held = server.oracle.projects[1].tasks
    taken = held[1].annotations.pop(first)
    assert differing(server) is not None
    held[3].annotations[first] = taken
    assert differing(server) is None, "one fewer and one more: for the rolling check"
    index, there = server.index, {number: version_of(task) for number, task in server.tasks.items()}
    assert index is not None and index.unlike(0, there, server.changed(server.audited), is_last=True) == [1, 3]


def test_an_audit_without_changes_reads_only_what_the_cursor_looks_back_over() -> None:
    server = Server()
    for number in range(30):
        server.step("push", number)
    server.step("audit", 0)
    index = server.index
    assert index is not None and len(index.tasks) >= 30
    assert len(server.changed(server.audited)) == index.changed_since(server.audited) <= 3


indices = st.dictionaries(
    st.integers(1, 12),
    st.builds(TaskVersion, st.just("a"), st.sampled_from(("b", "c")), st.integers(0, 2)),
    max_size=8,
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(indices, indices, st.integers(1, 4))
def test_the_rolling_check_finds_every_difference_once_it_has_come_round(
    known: dict[int, TaskVersion], there: dict[int, TaskVersion], size: int
) -> None:
    """Whatever was changed, and however well the totals hide it."""
    index, after, found = TaskIndex(known), 0, set[int]()
    for _ in range(len(known) + len(there) + 1):
        section = dict(sorted((number, task) for number, task in there.items() if number > after)[:size])
        is_last = len(section) < size
        found |= set(index.unlike(after, section, (), is_last=is_last))
        if is_last:
            break
        after = max(section)
    assert found == {number for number in {*known, *there} if known.get(number) != there.get(number)}


@given(indices)
def test_an_index_is_read_back_as_it_was_written_and_nothing_else_is(tasks: dict[int, TaskVersion]) -> None:
    index = TaskIndex(tasks)
    assert TaskIndex.from_rows(index.to_rows()) == index


@pytest.mark.parametrize("rows", [None, {}, "x", [1], [[1, "a", "b"]], [["1", "a", "b", 0]], [[1, None, "b", 0]]])
def test_no_other_json_is_an_index(rows: Any) -> None:
    assert TaskIndex.from_rows(rows) is None


@pytest.mark.parametrize(
    ("annotators", "accounts", "expected"),
    [
        ({ANN}, {1: ANN, 2: BOB}, []),
        ({ANN, BOB}, {1: ANN}, [BOB]),
        ({"user:unknown"}, {}, []),
        ({"user:7"}, {1: ANN}, []),
        ({"user:7"}, {7: ANN}, ["user:7"]),
        ({"user:7"}, {7: "user:7"}, []),
    ],
)
def test_whose_answers_would_come_under_another_name(
    annotators: set[str], accounts: dict[int, str], expected: list[str]
) -> None:
    assert without_account(annotators, accounts) == expected
