"""What is sent to Label Studio: tasks, answers in its format, filters. `parsers` reads what it returns.

A task's data hold what annotators see, and our own keys (`RESERVED`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from al_pipeline.errors import BadInput
from al_pipeline.files import sha256_bytes
from al_pipeline.records import Task, shown_text

CONTROL = "label"
"""The name of the only question in the label config: the `from_name` of every answer that we read."""

COMMENT = "al_comment"
"""The name of the field in which a reviewer writes."""
ANSWERS = "al_answers"
"""The key of the answers that a reviewer is shown."""

LIVE = "al-live"
"""The version of the predictions that order the questions of a live round; they are empty, and never shown."""

RESERVED = frozenset(
    {
        CONTROL, ANSWERS, "item_id", "al_round", "al_part", "al_rank", "al_score", "al_strategy", "al_prelabel",
        "push_key", "shown_hash",
    }
)  # fmt: skip
"""Our own keys in a task's data; all others are what annotators see."""

PROJECT_FIELDS = (
    "id,title,description,label_config,parsed_label_config,maximum_annotations,show_collab_predictions,sampling,"
    "model_version"
)
"""The fields requested of a project: Label Studio counts all tasks and answers for some of the others."""

STATE_FIELDS = "id,data,is_labeled,total_annotations,cancelled_annotations"
"""The fields requested when only a task's state is needed."""

VERSION_FIELDS = "id,created_at,updated_at,total_annotations"
"""The fields requested when only a task's version is needed."""

TOTALS_FIELDS = "id,updated_at"
"""The fields requested when only the totals of a listing are needed, and when its first task was changed."""

ANSWER_FIELDS = (
    "id,data,annotations,updated_at,result,completed_by,was_cancelled,lead_time,created_at,total_annotations"
)
"""The fields requested for tasks with annotations. The filter also applies inside these, hence the keys of both."""

_PLAIN_KEY = re.compile(r"^[A-Za-z][A-Za-z0-9_]*$")


def data_key(name: str) -> str:
    """The key in a task's data under which a field of this name is sent.

    Label Studio parses `$key` in its config as a path, so only letters, digits and underscores are safe.
    """
    if _PLAIN_KEY.match(name) and name not in RESERVED:
        return name
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "field"
    return f"shown_{plain}_{sha256_bytes(name.encode('utf-8', 'surrogatepass'))[:6]}"


def shown_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a task's data that annotators see."""
    return {key: value for key, value in data.items() if key not in RESERVED}


def shown_hash(shown: Mapping[str, Any]) -> str:
    """The SHA-256 (hex) of the canonical JSON of the fields that annotators were shown."""
    text = json.dumps(dict(shown), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return sha256_bytes(text.encode("ascii"))


def choice_result(label: str, to_name: str = "text") -> list[dict[str, Any]]:
    """An answer or a prediction, in Label Studio's result format."""
    return [{"from_name": CONTROL, "to_name": to_name, "type": "choices", "value": {"choices": [label]}}]


def task_json(task: Task) -> dict[str, Any]:
    """The JSON of a task. Raises BadInput if its key or score could not be read back unchanged."""
    plan = task.plan
    if plan.push_key != shown_text(plan.push_key) or not math.isfinite(plan.score):
        raise BadInput(
            f"item {plan.item_id!r}: its id contains control characters, or its score {plan.score} is not finite"
        )
    shown = {data_key(name): shown_text(text) for name, text in task.fields.items()}
    data: dict[str, Any] = {
        **shown,
        "item_id": plan.item_id,
        "al_round": plan.first_round,
        "al_part": plan.part,
        "al_rank": plan.rank,
        "al_score": plan.score,
        "push_key": plan.push_key,
        "shown_hash": shown_hash(shown),
    }
    if task.answers is not None:
        data[ANSWERS] = {shown_text(who): shown_text(label) for who, label in task.answers.items()}
    if task.guess is None:
        if task.place is None:
            return {"data": data}
        return {"data": data, "predictions": [{"model_version": LIVE, "score": float(-task.place), "result": []}]}
    label, probability = task.guess
    guess = {
        "model_version": f"round-{plan.round:04d}",
        "score": probability,
        "result": choice_result(label, to_name=next(iter(shown))),
    }
    return {"data": {**data, "al_prelabel": True}, "predictions": [guess]}


def task_filter(column: str, operator: str, kind: str, value: Any) -> dict[str, Any]:
    """A condition on tasks, in the form of Label Studio's data manager; `kind` is the type of `value` there."""
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}


def task_query(filters: Sequence[Mapping[str, Any]], **more: Any) -> str:
    """The `query` of a request for the tasks that meet all of `filters`."""
    return json.dumps({"filters": {"conjunction": "and", "items": list(filters)}, **more})
