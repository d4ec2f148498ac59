"""The plans of reviews: which item was put before the reviewers, in which review and why. They come from git."""

from __future__ import annotations

import re

import msgspec

from al_pipeline.errors import UnexpectedChange
from al_pipeline.records import PlannedTask, is_of_review, review_workspace

_FILE = re.compile(r"(\d{6})\.jsonl")
_TASK = msgspec.json.Decoder(PlannedTask)


def review_number(file_name: str) -> int | None:
    """The number of the review whose plan has this file name; None if it is no plan."""
    found = _FILE.fullmatch(file_name)
    return int(found[1]) if found else None


def review_key(workspace_id: str, number: int, item_id: str) -> str:
    """The permanent name of one task of a review; it tells from a round's tasks."""
    return f"{review_workspace(workspace_id)}:{number:06d}:{item_id}"


def parse_review(text: str, number: int) -> list[PlannedTask]:
    """The tasks of review `number`. Raises UnexpectedChange, naming the line, if the engine cannot have written it."""
    tasks = []
    for place, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        try:
            task = _TASK.decode(line)
            end = f":{number:06d}:{task.item_id}"
            right = is_of_review(task.push_key) and task.push_key.endswith(end) and task.push_key.isprintable()
        except (msgspec.DecodeError, ValueError, RecursionError):
            right = False
        if not right:
            raise UnexpectedChange(
                f"rounds/reviews/{number:06d}.jsonl:{place} is not a task of that review. Was it edited by hand, or "
                "written by a newer engine? `git log -p` shows by whom, and `git revert` undoes the commit"
            )
        tasks.append(task)
    return tasks
