"""Parse Label Studio's replies into records, and annotations into answers.

People can edit tasks and annotations there, and Label Studio validates nothing. A reply of an unexpected form raises
LabelStudioDown, or a TypeError, LookupError or ValueError that `transport` turns into it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from msgspec import Struct

from al_pipeline.errors import LabelStudioDown
from al_pipeline.integrations.label_studio.payloads import (
    COMMENT,
    CONTROL,
    RESERVED,
    data_key,
    shown_fields,
    shown_hash,
)
from al_pipeline.params import Schema
from al_pipeline.records import (
    Annotation,
    Answer,
    AnsweredTask,
    Part,
    PlannedTask,
    RefusalReason,
    TaskState,
    TaskTotals,
    TaskVersion,
    composed,
    shown_text,
)

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
"""The format of Label Studio's times in our records: UTC with microseconds, so that text order is time order."""

LONGEST_COMMENT = 2000
"""Characters of a reviewer's comment that are kept; Label Studio has the rest."""

_ORIGINS = frozenset({"manual", "prediction", "prediction-changed"})


# What an annotation says -----------------------------------------------------------------------------------------


def parse_annotation(
    result: Sequence[Any], was_cancelled: bool, schema: Schema, former: Collection[str] = ()
) -> Answer | RefusalReason:
    """The answer in a raw result, or why it is refused. Never raises: `result` may hold any JSON values.

    `former`: classes that the schema no longer has, but that a page opened earlier may still offer. Values of other
    controls are ignored and stay in Label Studio, except for a reviewer's comment.
    """
    comment = _comment(result)
    if was_cancelled:
        return Answer(label=None, origin=None, comment=comment)
    entry = _choice_entry(result)
    if isinstance(entry, str):
        return entry
    value = entry.get("value")
    choices = value.get("choices") if isinstance(value, Mapping) else None
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return "malformed"
    if not choices:
        return "empty result"
    if len(choices) > 1:
        return "several choices"
    label = composed(choices[0])
    if label not in schema.labels and label not in former:
        return "unknown label"
    origin = entry.get("origin")
    return Answer(label, origin if isinstance(origin, str) and origin in _ORIGINS else None, comment)


def _comment(result: Sequence[Any]) -> str | None:
    """The comment in a raw result, shortened; None without one. Typed and not added, it is an entry of its own too."""
    said: list[str] = []
    for entry in result:
        if isinstance(entry, Mapping) and entry.get("from_name") == COMMENT and entry.get("type") == "textarea":
            value = entry.get("value")
            lines = value.get("text") if isinstance(value, Mapping) else None
            said += [line for line in (lines if isinstance(lines, list) else [lines]) if isinstance(line, str)]
    text = " ".join(shown_text(" ".join(said)).split())[:LONGEST_COMMENT]
    return text or None


def _choice_entry(result: Sequence[Any]) -> Mapping[str, Any] | RefusalReason:
    """The one entry of a raw result that answers our question, or why there is none."""
    if not result:
        return "empty result"
    if not all(isinstance(entry, Mapping) and isinstance(entry.get("from_name"), str) for entry in result):
        return "malformed"
    chosen: list[Mapping[str, Any]] = [entry for entry in result if entry["from_name"] == CONTROL]
    if not chosen:
        only_comments = all(entry.get("type") == "textarea" for entry in result)
        return "empty result" if only_comments else "wrong from_name"
    return chosen[0] if len(chosen) == 1 else "several choices"


def shows_plan(data: Mapping[str, Any], plan: PlannedTask, schema: Schema) -> bool:
    """Whether a task still shows what we sent; fields that people added are ignored."""
    recorded = data.get("shown_hash")
    if data.get("item_id") != plan.item_id:
        return False
    if shown_hash(shown_fields(data)) == recorded:
        return True
    asked = {data_key(name) for name in schema.fields} - RESERVED
    return shown_hash({key: value for key, value in data.items() if key in asked}) == recorded


# Tasks ------------------------------------------------------------------------------------------------------------


def parse_task_states(content: Any) -> list[TaskState]:
    """The task states in one page of a task listing."""
    return [_parse_task_state(row) for row in _task_rows(content)]


def parse_answered_tasks(content: Any, email_of: Callable[[int], str]) -> list[AnsweredTask]:
    """The tasks with their annotations in one page of a listing; `email_of` maps a user's id to the address."""
    return [_parse_answered_task(row, email_of) for row in _task_rows(content)]


class ListedVersion(NamedTuple):
    """A task's id and version."""

    task_id: int
    version: TaskVersion


def parse_task_versions(content: Any) -> list[ListedVersion]:
    """The tasks' versions in one page of a listing."""
    return [ListedVersion(parse_id(row.get("id")), _version(row)) for row in _task_rows(content)]


def parse_task_totals(content: Any) -> TaskTotals:
    """The totals in one page of a task listing that is ordered by the time of change, newest first."""
    rows = _task_rows(content)
    return TaskTotals(
        tasks=_whole_number(content.get("total"), "a number of tasks"),
        answers=_whole_number(content.get("total_annotations"), "a number of answers"),
        newest=_time(rows[0].get("updated_at")) if rows else None,
    )


def task_state(
    task_id: int, data: Mapping[str, Any], *, is_labeled: bool, annotations: int, cancelled: int
) -> TaskState:
    """A task's state. Anybody may have edited its data: values of the wrong type count as absent."""
    number = data.get("al_round")
    return TaskState(
        task_id=task_id,
        push_key=_push_key(data),
        round=number if type(number) is int else None,
        part=_part(data.get("al_part")),
        is_labeled=is_labeled,
        annotations=annotations,
        cancelled=cancelled,
    )


def answered_task(
    task_id: int,
    data: Mapping[str, Any],
    annotations: Sequence[Annotation],
    *,
    created_at: str,
    updated_at: str,
    answers: int,
) -> AnsweredTask:
    """A task with its annotations; push key and `prelabel_shown` come from its data."""
    return AnsweredTask(
        task_id=task_id,
        push_key=_push_key(data),
        updated_at=updated_at,
        data=data,
        annotations=tuple(annotations),
        created_at=created_at,
        prelabel_shown=data.get("al_prelabel") is True,
        answers=answers,
    )


def raw_result(value: Any) -> tuple[Any, ...]:
    """A result as a tuple; one that is not a list, which the server allows, is wrapped as `malformed`."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else ({"malformed": value},)


def _task_rows(content: Any) -> list[Mapping[str, Any]]:
    return _objects(content["tasks"])


def _parse_task_state(row: Mapping[str, Any]) -> TaskState:
    return task_state(
        parse_id(row.get("id")),
        _data(row),
        is_labeled=bool(row.get("is_labeled")),
        annotations=_whole_number(row.get("total_annotations"), "a number of answers"),
        cancelled=_whole_number(row.get("cancelled_annotations"), "a number of skips"),
    )


def _parse_answered_task(row: Mapping[str, Any], email_of: Callable[[int], str]) -> AnsweredTask:
    version = _version(row)
    return answered_task(
        parse_id(row.get("id")),
        _data(row),
        [_parse_annotation_row(annotation, email_of) for annotation in row.get("annotations") or ()],
        created_at=version.created_at,
        updated_at=version.updated_at,
        answers=version.answers,
    )


def _version(row: Mapping[str, Any]) -> TaskVersion:
    return TaskVersion(
        _time(row.get("created_at")),
        _time(row.get("updated_at")),
        _whole_number(row.get("total_annotations"), "a number of answers"),
    )


def _parse_annotation_row(row: Any, email_of: Callable[[int], str]) -> Annotation:
    if not isinstance(row, Mapping):
        raise LabelStudioDown("Label Studio sent an annotation that is not an object")
    lead_time = row.get("lead_time")
    return Annotation(
        annotation_id=_whole_number(row.get("id"), "an annotation's id"),
        annotator=_annotator(row.get("completed_by"), email_of),
        result=raw_result(row.get("result")),
        was_cancelled=row.get("was_cancelled") is True,
        created_at=_time(row.get("created_at")),
        updated_at=_time(row.get("updated_at")),
        lead_time=float(lead_time) if isinstance(lead_time, int | float) else None,
    )


def _annotator(completed_by: Any, email_of: Callable[[int], str]) -> str:
    number = completed_by.get("id") if isinstance(completed_by, Mapping) else completed_by
    return email_of(number) if type(number) is int else "user:unknown"


def _data(row: Mapping[str, Any]) -> dict[str, Any]:
    data = row.get("data")
    if not isinstance(data, Mapping):
        raise LabelStudioDown("Label Studio sent a task without data")
    return dict(data)


def _push_key(data: Mapping[str, Any]) -> str | None:
    key = data.get("push_key")
    return key if isinstance(key, str) else None


def _part(value: Any) -> Part | None:
    if value == "pool":
        return "pool"
    return "test" if value == "test" else None


# Projects and users -------------------------------------------------------------------------------------------------


class ProjectSettings(Struct, frozen=True):
    """The settings of a project that we manage, under their names in Label Studio's API."""

    title: str | None
    description: str | None
    label_config: str
    maximum_annotations: int | None
    show_collab_predictions: bool | None
    labels: frozenset[str]
    """The classes that it offers."""
    sampling: str | None = None
    """The order in which tasks are served."""
    model_version: str | None = None
    """The version of the predictions that decide that order, if they do."""


def parse_project(content: Any) -> ProjectSettings:
    """The settings in a project's JSON."""
    found = _object(content)
    if found.get("id") is None or found.get("label_config") is None:
        raise KeyError("no project")
    asked = (found.get("parsed_label_config") or {}).get(CONTROL, {}).get("labels", [])
    return ProjectSettings(
        title=parse_text(found.get("title")),
        description=parse_text(found.get("description")),
        label_config=found["label_config"],
        maximum_annotations=found.get("maximum_annotations"),
        show_collab_predictions=found.get("show_collab_predictions"),
        labels=frozenset(composed(label) for label in asked if isinstance(label, str)),
        sampling=parse_text(found.get("sampling")),
        model_version=parse_text(found.get("model_version")),
    )


def parse_users(content: Any) -> dict[int, str]:
    """The e-mail address of every user, by id; see `parse_user`."""
    return dict(parse_user(row.get("id"), row.get("email")) for row in _objects(content))


def parse_user(number: Any, email: Any) -> tuple[int, str]:
    """A user's id, and the e-mail address in lower case, or `user:<id>` if there is none."""
    return parse_id(number), shown_text(parse_text(email) or "").strip().lower() or f"user:{number}"


# Values -----------------------------------------------------------------------------------------------------------


def parse_id(value: Any) -> int:
    """An id. Raises LabelStudioDown if it is not an integer."""
    return _whole_number(value, "an id")


def parse_text(value: Any) -> str | None:
    """Text or None. Raises LabelStudioDown for anything else."""
    if value is not None and not isinstance(value, str):
        raise LabelStudioDown("Label Studio sent a value that is not text where text is required")
    return value


def _whole_number(value: Any, what: str) -> int:
    if type(value) is not int:
        raise LabelStudioDown(f"Label Studio sent {what} that is not a whole number")
    return value


def _time(value: Any) -> str:
    """A server's time in TIME_FORMAT. Raises LabelStudioDown if it is not one."""
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise LabelStudioDown("Label Studio sent an invalid time") from None
    return moment.astimezone(UTC).strftime(TIME_FORMAT)


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return value


def _objects(values: Any) -> list[Mapping[str, Any]]:
    if not isinstance(values, list):
        raise TypeError("not a list")
    return [_object(value) for value in values]
