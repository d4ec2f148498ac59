"""Where a workspace stands: what is published, what is open, what comes next. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from al_pipeline.annotation.aggregation import active
from al_pipeline.data.ledger import read_events, read_refused, still_refused
from al_pipeline.errors import ServerFailed
from al_pipeline.evaluation.figures import FIGURES
from al_pipeline.files import read_object
from al_pipeline.integrations.git import Git
from al_pipeline.operations.connect import project_page, stored_project
from al_pipeline.operations.facts import closing_rule, read_facts
from al_pipeline.operations.history import History, labels_saved_by, read_history
from al_pipeline.operations.schema import schema_problem
from al_pipeline.rounds.state_machine import Facts, Wait, close_reason, next_step, state, waiting_for
from al_pipeline.servers import prefect_status, read_deployment
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.lock import holder
from al_pipeline.workspace.workspace import Workspace


def status(workspace: Workspace, *, ask: bool = True) -> dict[str, Any]:
    """The state of the workspace as one JSON object; counts come from the last commit, answers from the inbox too.

    With `ask`, Label Studio is asked what waits there, for a second at most.

    `labelled`, `pending`, `ignored` and `unlabelled` add up to `pool`.
    """
    layout = workspace.layout
    facts, history = read_facts(workspace)
    latest = history.latest
    counts = (
        latest.counts.to_row() if latest else {"labelled": 0, "pending": 0, "ignored": 0, "test": 0, "test_labelled": 0}
    )
    pool = facts.incoming + counts["pool"] if latest else facts.items
    step = next_step(facts, closing_rule(workspace))
    rows = read_refused(layout.events, layout.inbox_events)
    events = read_events(layout.events, layout.inbox_events) if rows else []
    refused = Counter(str(row["reason"]) for row in still_refused(rows, events))
    problem = schema_problem(workspace, history)
    project = stored_project(layout)
    metrics = history.rounds[-1].metrics if history.rounds else None
    return {
        "workspace": str(layout.root),
        "workspace_id": workspace.id,
        "round": facts.planned,
        "state": state(facts),
        "tasks": facts.tasks,
        "settled": facts.settled,
        "answers_in_inbox": facts.new_labels,
        **_answers(workspace, facts, ask),
        "next": step.reason if isinstance(step, Wait) else _next(facts.planned, str(step), facts, workspace),
        "pool": pool,
        "labelled": counts["labelled"],
        "pending": counts["pending"],
        "ignored": counts["ignored"],
        "unlabelled": pool - counts["labelled"] - counts["pending"] - counts["ignored"],
        "incoming": facts.incoming,
        "labels": in_order(latest.params.schema_.labels, latest.counts.labels) if latest else {},
        "test": counts["test"],
        "test_labelled": counts["test_labelled"],
        "refused": dict(sorted(refused.items())),
        "sources": _sources(layout),
        "schema_problem": None if problem is None else str(problem),
        "promoted": history.promoted,
        "held": history.holding.sentence() if history.holding else None,
        "paused": history.pausing.sentence() if history.pausing else None,
        "metrics": {name: metrics.figure(name).value for name in FIGURES if metrics},
        "running": latest.running.to_row() if latest and latest.running else None,
        "saved": _saved(history),
        "asked_by": latest.next_batch.to_row() if latest and latest.next_batch else None,
        "project_id": None if project is None else project.project_id,
        "label_studio_url": workspace.credentials().get("url"),
        "label_studio_page": project_page(workspace),
        **_prefect(workspace),
        "busy": holder(layout.lock) or None,
    }


def _sources(layout: Layout) -> list[dict[str, Any]]:
    """The files of `ingest.sources` that the last tick could not read, or not yet."""
    if not layout.ingested.exists():
        return []
    from al_pipeline.operations.sources import source_news  # with all that reads tables

    return [{**asdict(one), "since": one.since.isoformat()} for one in source_news(layout)]


def _answers(workspace: Workspace, facts: Facts, ask: bool) -> dict[str, Any]:
    """Whether Label Studio is up, how many tasks of the open round are answered, and how many of them since the last
    pull. Label Studio is asked for a second at most; None where it is not known, or did not say.
    """
    from al_pipeline.integrations.label_studio.probe import probe_server

    layout, known = workspace.layout, workspace.credentials()
    is_open = state(facts) == "open"
    answered: set[str] = set()
    seen: set[object] = set()
    if is_open:
        events = active(read_events(layout.events, layout.inbox_events))
        newest = {event.annotation_key: event for event in events if event.round == facts.planned}
        answered = {event.item_id for event in newest.values() if event.label is not None}
        refused = read_refused(layout.events, layout.inbox_events)
        seen = answered | {row.get("item_id") for row in refused if row.get("round") == facts.planned}
    pulled = len(answered)
    if "url" not in known or not ask:
        return {"label_studio": None, "answered": pulled, "answered_since": None}
    project, chosen = stored_project(layout), read_object(layout.overrides)
    kept = chosen.get("kept") or chosen.get("kept_test")  # there, they are tasks of the round that asked them first
    found = probe_server(
        known["url"],
        known.get("token"),
        None if project is None else project.project_id,
        workspace.id,
        facts.planned if is_open and not kept else None,
    )
    return {
        "label_studio": found.to_json(),
        "answered": pulled if found.answered is None else max(pulled, found.answered),
        "answered_since": None if found.answered is None else max(0, found.answered - len(seen)),
    }


def in_order(classes: Sequence[str], counts: Mapping[str, int]) -> dict[str, int]:
    """The counts in the order of the schema; classes that it lacks come last."""
    return {name: counts[name] for name in dict.fromkeys([*classes, *counts]) if name in counts}


def _saved(history: History) -> dict[str, Any] | None:
    """What the random labels alone reach, and with how many the rounds were as good."""
    saved = labels_saved_by(history, None)
    return None if saved is None else {**asdict(saved), "sentence": saved.sentence()}


def _prefect(workspace: Workspace) -> dict[str, str | None]:
    """Where the workspace's Prefect server is, and when it starts a tick by itself."""
    server = prefect_status(workspace)
    if server is None:
        return {"prefect_url": None, "next_run": None}
    try:
        deployment = read_deployment(workspace, server)
    except ServerFailed:  # it is not asked for its own sake
        deployment = None
    return {"prefect_url": server.url, "next_run": deployment.next_run if deployment else None}


def _next(planned: int | None, step: str, facts: Facts, workspace: Workspace) -> str:
    """What the next `al round` will do, in words."""
    if facts.amend:
        return f"`al round` carries out what was ruled about labels ({step})"
    if facts.closed:
        what = "the first plan" if planned is None else f"round {planned}"
        return f"`al round` goes on with the build of {what} ({step})"
    if planned is None and not facts.items:
        if workspace.params.ingest.sources:
            return "`al round` takes in the files of ingest.sources in params.yaml"
        return "`al ingest FILE` fills the pool: there is nothing to ask about yet"
    if planned is None:
        return "`al round` makes the first plan and pushes it to Label Studio"
    rule = closing_rule(workspace)
    if reason := close_reason(facts, rule):
        return f"`al round` closes round {planned}: {reason}"
    return f"round {planned} waits for {waiting_for(facts, rule)}; `al round` looks for new answers"


def rounds(workspace: Workspace) -> list[dict[str, Any]]:
    """The published rounds, oldest first, each with its labels, metrics and decision."""
    history = read_history(workspace.layout, Git(workspace.layout.root))
    return [
        {
            "round": record.round,
            "labelled": record.counts.labelled,
            "test_labelled": record.counts.test_labelled,
            "verdict": record.decision.verdict,
            "reasons": list(record.decision.reasons),
            "interventions": [intervention.summary() for intervention in record.interventions],
            "closed_at": record.closed_at,
            "metrics": {name: record.metrics.figure(name).to_row() for name in FIGURES},
        }
        for record in history.rounds
    ]
