"""Pull answers from Label Studio into the inbox.

They are compared with what the ledger and the inbox hold (`annotation.changes`). The inbox is written before the
cursor, and an event's id is a hash of its content, so that a pull can be killed at any point and repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from al_pipeline.annotation.changes import AnnotationDiff, Judge, KnownAnswers
from al_pipeline.data.ledger import add_to_inbox, read_events, read_refused
from al_pipeline.errors import VanishedAnswers
from al_pipeline.files import read_json, write_json
from al_pipeline.integrations.label_studio.parsers import TIME_FORMAT, parse_annotation, shows_plan
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.logs import get_logger
from al_pipeline.params import Schema
from al_pipeline.records import Annotation, Answer, AnsweredTask, PlannedTask, RefusalReason
from al_pipeline.workspace.layout import Layout

_logger = get_logger(__name__)

OVERLAP = timedelta(minutes=10)
"""How far a pull looks back before the newest change seen: a change is timestamped before it is committed."""


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to pull, and which answers to accept."""

    project: ProjectRef
    plans: Mapping[str, PlannedTask]
    """Every task ever planned, by push key."""
    schema: Schema
    allow: Collection[str]
    """Annotators whose answers are accepted; empty: everybody."""
    observed_at: str
    """Time of the pull by our clock, as ISO 8601 in UTC."""
    max_vanished: int
    """How many known answers may be missing."""
    accept_vanished: bool = False
    """Accept more missing answers than that."""
    full: bool = False
    """Read all answers again, and find deleted tasks too."""


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a pull added: events by type, refused answers by reason, and the cursor of the next pull."""

    events: Counter[str]
    refused: Counter[str]
    cursor: str | None


def pull(layout: Layout, oracle: Oracle, request: PullRequest) -> PullReport:
    """Append to the inbox all changes of answers in Label Studio that are not recorded yet.

    Answers to abandoned rounds are recorded like all others; each fold decides whether they count. Raises
    VanishedAnswers, with nothing appended, if more known answers are missing than the request allows.
    """
    cursor = None if request.full else _cursor(read_json(layout.pull_state, {}), request)
    diff = _open_diff(layout, request)
    newest = _compare(diff, oracle, request, cursor)
    if diff.vanished > request.max_vanished and not request.accept_vanished:
        raise VanishedAnswers(
            f"{diff.vanished} known answers have disappeared from Label Studio, more than label_studio.max_vanished "
            f"({request.max_vanished}) in params.yaml allows; nothing was recorded. If people deleted them on "
            "purpose: `al round --accept-vanished`"
        )
    events = diff.events()
    add_to_inbox(layout.inbox_events, events, diff.refused, ledger=layout.events)
    following = _following(cursor, newest, request.observed_at)
    if following is not None:
        uid, classes = request.project.project_uid, request.schema.labels
        write_json(layout.pull_state, {"project_uid": uid, "cursor": following, "classes": classes})
    report = PullReport(
        events=Counter(event.type for event in events),
        refused=Counter(str(row["reason"]) for row in diff.refused),
        cursor=following,
    )
    _logger.info("answers: %s", ", ".join(f"{count} {kind}" for kind, count in report.events.items()) or "none new")
    for reason, count in report.refused.items():
        _logger.warning("%d answers were refused: %s", count, reason)
    return report


def _open_diff(layout: Layout, request: PullRequest) -> AnnotationDiff:
    """An empty diff against what the ledger and the inbox hold."""
    ledger, uid = (layout.events, layout.inbox_events), request.project.project_uid
    return AnnotationDiff(
        project_uid=uid,
        plans=request.plans,
        schema_version=request.schema.version,
        judge=_judge(request.schema, request.allow),
        observed_at=request.observed_at,
        known=KnownAnswers(read_events(*ledger), read_refused(*ledger), uid),
    )


def _compare(diff: AnnotationDiff, oracle: Oracle, request: PullRequest, cursor: str | None) -> str:
    """Add what changed since `cursor` to `diff`; return the time of the newest change."""
    newest, project = "", request.project
    for task in oracle.answered(project, cursor):
        diff.add(task)
        newest = max(newest, task.updated_at)
    if keys := diff.keys_with_losses():
        for task in oracle.answered_by_key(project, keys):
            diff.add_copy(task)
    diff.record_losses()
    if request.full:
        diff.record_gone_tasks({state.push_key for state in oracle.task_states(project)})
    return newest


def _judge(schema: Schema, allow: Collection[str]) -> Judge:
    """Return a function that accepts an answer if its annotator is allowed, the text is ours and the label a class."""
    allowed = frozenset(address.strip().lower() for address in allow)

    def judge(task: AnsweredTask, plan: PlannedTask, annotation: Annotation) -> Answer | RefusalReason:
        if allowed and annotation.annotator not in allowed:
            return "annotator not allowed"
        if not shows_plan(task.data, plan, schema):
            return "changed text"
        return parse_annotation(annotation.result, annotation.was_cancelled, schema)

    return judge


def _cursor(state: Any, request: PullRequest) -> str | None:
    """The cursor of the last pull of this project; None (read everything) if there is no usable one.

    None too if the classes have changed since: answers refused for an unknown class may count now.
    """
    if not isinstance(state, Mapping) or state.get("project_uid") != request.project.project_uid:
        return None
    cursor = state.get("cursor")
    is_usable = isinstance(cursor, str) and _moment(cursor) is not None
    return cursor if is_usable and state.get("classes") == list(request.schema.labels) else None


def _following(cursor: str | None, newest: str, observed_at: str) -> str | None:
    """The cursor of the next pull: OVERLAP before the newest change seen, by the server's clock.

    It is capped by our own clock: one change stamped in the future would hide all later ones.
    """
    seen = _moment(newest)
    if seen is None:
        return cursor
    ours = datetime.fromisoformat(observed_at)
    ours = ours if ours.tzinfo else ours.replace(tzinfo=UTC)
    return (min(seen, ours).astimezone(UTC) - OVERLAP).strftime(TIME_FORMAT)


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text.endswith("Z") else None
    except ValueError:
        return None
