"""What Label Studio's tasks were when they were last read, so that an audit need not read all of them again.

Every change that people make to a task or its answers, in the page or through the API, moves the task's `updated_at`.
A pull lists the tasks changed since a time, and reads those that are not as the index has them; an audit has to find
the changes that do not show in that way. The checks here compare the index with what was listed and with totals, which
cost the server next to nothing:

- `missing`: a task that the index says was changed since that time is not among those read. It was deleted, or the
  server went back to a backup.
- `replaced`: a task has another creation time. It was deleted, and the server gave its id to a later one.
- `differing`: the totals of all tasks not read (how many, their answers, the newest change) are not the index's. Tasks
  were deleted; answers were added, removed or moved without a trace; or a backup was restored. A restored backup
  changes the newest time that it affects, unless that task was changed again and therefore read.

None of them sees a change that keeps the task's time and both totals: made in the database itself, an edit; or two
that cancel out, such as an answer removed and another added. The rolling check, which reads some other tasks at each
audit, finds those within a bounded number of audits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from al_pipeline.records import AnsweredTask, TaskTotals, TaskVersion

_NUMBERED_ACCOUNT = re.compile(r"user:(\d+)")


class TaskIndex(Struct, frozen=True):
    """All tasks of our project, by id, as they were when they were last read."""

    tasks: Mapping[int, TaskVersion]

    def with_read(self, read: Mapping[int, TaskVersion]) -> TaskIndex:
        """The index after `read`."""
        return TaskIndex({**self.tasks, **read}) if read else self

    def changed_since(self, since: str) -> int:
        """How many tasks were changed at or after `since`."""
        return sum(task.updated_at >= since for task in self.tasks.values())

    def missing(self, since: str, changed: Collection[int]) -> list[int]:
        """Tasks changed at or after `since` that are not among those that the server says were `changed` since."""
        return [number for number, task in self.tasks.items() if task.updated_at >= since and number not in changed]

    def first_change(self, listed: Mapping[int, TaskVersion]) -> str | None:
        """The earliest time of change among the tasks `listed` that are not as they were read; None if all are."""
        return min((task.updated_at for one, task in listed.items() if self.tasks.get(one) != task), default=None)

    def replaced(self, read: Mapping[int, TaskVersion]) -> list[int]:
        """Ids under which another task was read."""
        known = self.tasks
        return [one for one, task in read.items() if one in known and known[one].created_at != task.created_at]

    def differing(self, changed: Collection[int], rest: TaskTotals) -> str | None:
        """How the tasks not `changed` differ from `rest`, their totals on the server; None if they do not."""
        known = self._totals(changed)
        if known == rest:
            return None
        return (
            f"{rest.tasks} tasks with {rest.answers} answers, the last changed at {rest.newest}, where "
            f"{known.tasks} with {known.answers} at {known.newest} were known"
        )

    def unlike(
        self, after: int, section: Mapping[int, TaskVersion], changed: Collection[int], *, is_last: bool
    ) -> list[int]:
        """Tasks that differ from `section`: those that the server has after id `after`, up to its highest id.

        With `is_last` it has none after them. Those `changed` meanwhile may differ.
        """
        end = max(section, default=after)
        known = {number for number in self.tasks if number > after and (is_last or number <= end)}
        read = known | section.keys()
        return sorted(one for one in read if one not in changed and self.tasks.get(one) != section.get(one))

    def _totals(self, without: Collection[int]) -> TaskTotals:
        tasks = [task for number, task in self.tasks.items() if number not in without]
        newest = max((task.updated_at for task in tasks), default=None)
        return TaskTotals(len(tasks), sum(task.answers for task in tasks), newest)

    def to_rows(self) -> list[list[Any]]:
        """The index as JSON."""
        return [[number, task.created_at, task.updated_at, task.answers] for number, task in self.tasks.items()]

    @staticmethod
    def from_rows(rows: Any) -> TaskIndex | None:
        """The index that `to_rows` wrote; None for anything else."""
        try:
            found = msgspec.convert(rows, list[tuple[int, str, str, int]])
        except msgspec.ValidationError:
            return None
        return TaskIndex({number: TaskVersion(made, changed, answers) for number, made, changed, answers in found})


def version_of(task: AnsweredTask) -> TaskVersion:
    """What the index keeps of a task."""
    return TaskVersion(task.created_at, task.updated_at, task.answers)


def without_account(annotators: Iterable[str], accounts: Mapping[int, str]) -> list[str]:
    """Annotators of whom the server would give their answers under another name now.

    Their account got another address, was deleted, or is back. `user:unknown` has none.
    """
    names = set(accounts.values())
    return sorted(name for name in annotators if name not in names and not _has_no_address(name, accounts))


def _has_no_address(annotator: str, accounts: Mapping[int, str]) -> bool:
    number = _NUMBERED_ACCOUNT.fullmatch(annotator)
    return annotator == "user:unknown" or (number is not None and int(number[1]) not in accounts)
