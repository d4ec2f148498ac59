"""The status of a workspace: what is published, what is open, what comes next. Reads only."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct
from msgspec.structs import asdict, replace

from al_pipeline.annotation.active_events import active
from al_pipeline.data.ledger import read_events, read_refused, still_refused
from al_pipeline.data.pool import count_items
from al_pipeline.errors import BadInput, ServerFailed
from al_pipeline.evaluation.figures import FIGURES, Metrics, OnTraffic, Running
from al_pipeline.evaluation.online import Saved
from al_pipeline.files import read_object
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.prefect_settings import client_settings
from al_pipeline.live.plan import is_running
from al_pipeline.operations.connect import project_page, review_page, stored_project
from al_pipeline.operations.costs import budget_uses
from al_pipeline.operations.facts import closing_rule, read_facts
from al_pipeline.operations.history import History, labels_saved_by, read_history, same_classes
from al_pipeline.operations.proposal import proposal
from al_pipeline.operations.schema import schema_problem
from al_pipeline.records import is_of_review, round_name
from al_pipeline.reporting.view_model import PoolCounts, RoundRow
from al_pipeline.rounds.manifests import Cost, Counts, NextBatch, Outlook, Record
from al_pipeline.rounds.state_machine import Facts, State, Wait, close_reason, next_step, state, waiting_for
from al_pipeline.sanitize import redact
from al_pipeline.stopping.proposal import Proposal
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.lock import holder
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.drift.look import Looks
    from al_pipeline.integrations.label_studio.probe import ServerStatus
    from al_pipeline.operations.gold_figures import GoldStatus
    from al_pipeline.operations.ingestion.source_states import SourceNews
    from al_pipeline.operations.review_figures import Review


class BudgetUse(Struct, frozen=True):
    """One limit of the budget."""

    what: str
    """labels, hours or money."""
    spent: float | None
    """None if it is not known, since no answer has a time."""
    limit: float
    left: float | None
    sentence: str


class Status(Struct, frozen=True, kw_only=True):
    """The status of a workspace: counts as of the last commit, with the answers in the inbox."""

    workspace: str
    workspace_id: str
    round: int | None
    """The open round; None before the first plan."""
    state: State
    tasks: int
    settled: int
    answers_in_inbox: int
    label_studio: ServerStatus | None
    answered: int
    answered_since: int | None
    """Tasks answered since the last pull; None if Label Studio did not say."""
    next: str
    """What the round waits for, or what the next `al round` will do, in words."""
    pool: int
    """All items; `labelled`, `pending`, `ignored` and `unlabelled` add up to it."""
    labelled: int
    pending: int
    ignored: int
    unlabelled: int
    incoming: int
    """Items in the inbox; `unlabelled` includes them."""
    labels: Mapping[str, int]
    """Number of labelled items per class, in the schema's order."""
    test: int
    test_labelled: int
    refused: Mapping[str, int]
    """Number of answers that do not count, by reason."""
    sources: tuple[SourceNews, ...]
    """Files of `ingest.sources` that the last tick could not read, or could not read yet."""
    schema_problem: str | None
    promoted: str | None
    promoted_classes: tuple[str, ...]
    """The classes of the promoted model, if they are others than those of the newest round; else empty."""
    held: str | None
    paused: str | None
    metrics: Metrics | None
    """Of the newest round."""
    test_version: str
    """The version of the test labels that `metrics` are of."""
    traffic: OnTraffic | None
    """The newest model on test items from requests."""
    drift: Looks | None
    """What the newest look at kept requests found; None before the first."""
    running: Running | None
    saved: Saved | None
    cost: Cost | None
    """What people's answers had cost when the newest round closed."""
    budget: tuple[BudgetUse, ...]
    """The limits of the budget, with what is spent now."""
    outlook: Outlook | None
    """What a further round is expected to bring."""
    proposal: Proposal | None
    """Whether to stop asking."""
    asked_by: NextBatch | None
    project_id: int | None
    label_studio_url: str | None
    label_studio_page: str | None
    prefect_url: str | None
    next_run: str | None
    review: Review | None
    """What reviews say of the labels; None before the first one."""
    review_page: str | None
    gold: GoldStatus | None
    """None without gold items."""
    live: str | None
    """What `al live` does; None if it does not run."""
    busy: Mapping[str, Any] | None
    """The process that holds the workspace's lock, as it describes itself there."""

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        saved, metrics = self.saved, self.metrics
        return asdict(self) | {
            "label_studio": self.label_studio and self.label_studio.to_json(),
            "sources": [{**asdict(one), "since": one.since.isoformat()} for one in self.sources],
            "metrics": {name: metrics.figure(name).value for name in FIGURES} if metrics else {},
            "traffic": self.traffic and {**self.traffic.to_row(), "sentence": self.traffic.sentence()},
            "drift": self.drift and _drift_row(self.drift),
            "running": self.running and self.running.to_row(),
            "cost": self.cost and self.cost.to_row(),
            "budget": [asdict(one) for one in self.budget],
            "outlook": self.outlook and {**self.outlook.to_row(), "sentence": self.outlook.sentence()},
            "proposal": self.proposal and {**asdict(self.proposal), "sentence": self.proposal.sentence()},
            "saved": saved and {**asdict(saved), "sentence": saved.sentence()},
            "asked_by": self.asked_by and self.asked_by.to_row(),
            "review": self.review and self.review.to_json(),
            "gold": self.gold and self.gold.to_json(),
        }


def status(workspace: Workspace, *, ask: bool = True) -> Status:
    """Read the status of a workspace. With `ask`, query Label Studio for new answers, for a second at most."""
    layout = workspace.layout
    facts, history = read_facts(workspace)
    latest, project = history.latest, stored_project(layout)
    problem = schema_problem(workspace, history)
    answers, pool = _answers(workspace, facts, ask), _with_incoming(latest, facts)
    prefect_url, next_run = _prefect(workspace)
    return Status(
        workspace=str(layout.root),
        workspace_id=workspace.id,
        round=facts.planned,
        state=state(facts),
        tasks=facts.tasks,
        settled=facts.settled,
        answers_in_inbox=facts.new_labels,
        label_studio=answers.label_studio,
        answered=answers.answered,
        answered_since=answers.since,
        next=_next(facts, workspace),
        pool=pool.total,
        labelled=pool.labeled,
        pending=pool.pending,
        ignored=pool.ignored,
        unlabelled=pool.unlabeled,
        incoming=facts.incoming,
        labels=in_order(latest.params.schema_.labels, latest.counts.labels) if latest else {},
        test=(latest.counts.test if latest else count_items([layout.test])) + count_items([layout.inbox_test]),
        test_labelled=latest.counts.test_labelled if latest else 0,
        refused=_refused(layout),
        sources=_sources(layout),
        schema_problem=None if problem is None else str(problem),
        promoted=history.promoted,
        promoted_classes=_other_classes(history),
        held=history.holding.sentence() if history.holding else None,
        paused=history.pausing.sentence() if history.pausing else None,
        metrics=history.rounds[-1].metrics if history.rounds else None,
        test_version=test_version(history.rounds[-1]) if history.rounds else "",
        traffic=latest.traffic if latest else None,
        drift=_drift(layout),
        running=latest.running if latest else None,
        saved=labels_saved_by(history, None),
        cost=latest.cost if latest else None,
        budget=budget_now(workspace),
        outlook=latest.outlook if latest else None,
        proposal=proposal(history, workspace.params),
        asked_by=latest.next_batch if latest else None,
        project_id=None if project is None else project.project_id,
        label_studio_url=workspace.credentials().get("url"),
        label_studio_page=project_page(workspace),
        prefect_url=prefect_url,
        next_run=next_run,
        review=_review(workspace),
        review_page=review_page(workspace),
        gold=_gold(workspace),
        live=_live(layout),
        busy=holder(layout.lock) or None,
    )


def budget_now(workspace: Workspace) -> tuple[BudgetUse, ...]:
    """The limits of the budget, with what is spent of them, the answers in the inbox included."""
    found = budget_uses(workspace.layout, workspace.params.budget)
    return tuple(BudgetUse(one.what, one.spent, one.limit, one.left, one.sentence()) for one in found)


def pool_counts(counts: Counts) -> PoolCounts:
    """The pool counts of a record."""
    return PoolCounts(counts.labelled, counts.pending, counts.ignored, counts.unlabelled)


def _with_incoming(latest: Record | None, facts: Facts) -> PoolCounts:
    """The pool counts including the items in the inbox, none of which has been asked yet."""
    if latest is None:
        return PoolCounts(unlabeled=facts.items)
    known = pool_counts(latest.counts)
    asked = known.labeled + known.pending + known.ignored
    return replace(known, unlabeled=facts.incoming + latest.counts.pool - asked)


def _review(workspace: Workspace) -> Review | None:
    if not workspace.layout.reviews.exists():
        return None
    from al_pipeline.operations.review_figures import review_figures

    return review_figures(workspace)


def _live(layout: Layout) -> str | None:
    """See `Status.live`."""
    if not is_running(layout):
        return None
    from al_pipeline.live.state import sentence_of

    return sentence_of(layout, time.time())


def _drift(layout: Layout) -> Looks | None:
    """See `Status.drift`."""
    if not layout.drift.exists():
        return None
    from al_pipeline.drift.look import Looks  # few workspaces keep requests
    from al_pipeline.operations.drift_looks import read_looks

    try:
        return read_looks(layout)
    except BadInput as error:  # the status is useful without it
        return Looks(tried_at=layout.drift.stat().st_mtime, problem=str(error))


def _drift_row(found: Looks) -> dict[str, Any]:
    look = found.look
    row = {"tried_at": found.tried_at, "problem": found.problem, "sentence": found.sentence()}
    return row | {
        "look": look
        and {
            **asdict(look),
            "alarm": look.alarm,
            "accuracy": look.accuracy.to_row(),
            "measured": look.measured and look.measured.to_row(),
        }
    }


def _other_classes(history: History) -> tuple[str, ...]:
    """See `Status.promoted_classes`."""
    promoted = history.promoted
    record = next((one for one in reversed(history.rounds) if round_name(one.round) == promoted), None)
    if record is None or len(same_classes([record, history.rounds[-1]])) > 1:
        return ()
    return record.params.schema_.labels


def _gold(workspace: Workspace) -> GoldStatus | None:
    layout = workspace.layout
    events = read_events(layout.events, layout.inbox_events)
    if not any(event.type == "gold" for event in events):
        return None
    from al_pipeline.operations.gold_figures import gold_status
    from al_pipeline.operations.history import read_plans

    return gold_status(workspace.params, active(events), read_plans(Git(layout.root)))


def _refused(layout: Layout) -> dict[str, int]:
    """Count the refused answers that still do not count, by reason."""
    rows = read_refused(layout.events, layout.inbox_events)
    events = read_events(layout.events, layout.inbox_events) if rows else []
    return dict(sorted(Counter(str(row["reason"]) for row in still_refused(rows, events)).items()))


def _sources(layout: Layout) -> tuple[SourceNews, ...]:
    if not layout.ingested.exists():
        return ()
    from al_pipeline.operations.ingestion.source_states import source_news

    return tuple(source_news(layout))


class _Answers(NamedTuple):
    """The status of Label Studio, and how many tasks of the open round are answered: in all, since the last pull."""

    label_studio: ServerStatus | None
    answered: int
    since: int | None


def _answers(workspace: Workspace, facts: Facts, ask: bool) -> _Answers:
    """Count the answered tasks of the open round, asking Label Studio for a second at most.

    `label_studio` is None if it is not known or not asked, `since` also if it did not say.
    """
    from al_pipeline.integrations.label_studio.probe import probe_server

    layout, known = workspace.layout, workspace.credentials()
    is_open = state(facts) == "open"
    answered, seen = _pulled(layout, facts) if is_open else (0, 0)
    if "url" not in known or not ask:
        return _Answers(None, answered, None)
    project, chosen = stored_project(layout), read_object(layout.overrides)
    kept = chosen.get("kept") or chosen.get("kept_test")  # there, they count for their first round
    found = probe_server(
        known["url"],
        known.get("token"),
        None if project is None else project.project_id,
        workspace.id,
        facts.planned if is_open and not kept else None,
    )
    if found.answered is None:
        return _Answers(found, answered, None)
    return _Answers(found, max(answered, found.answered), max(0, found.answered - seen))


def _pulled(layout: Layout, facts: Facts) -> tuple[int, int]:
    """How many tasks of the open round are answered as of the last pull, without and with refused answers."""
    events = active(read_events(layout.events, layout.inbox_events))
    newest = {
        event.annotation_key: event
        for event in events
        if event.round == facts.planned and not is_of_review(event.annotation_key)
    }
    answered = {event.item_id for event in newest.values() if event.label is not None}
    rows = read_refused(layout.events, layout.inbox_events)
    refused = {row.get("item_id") for row in rows if row.get("round") == facts.planned}
    return len(answered), len(answered | refused)


def in_order(classes: Sequence[str], counts: Mapping[str, int]) -> dict[str, int]:
    """Order counts as in the schema; classes that it lacks come last."""
    return {name: counts[name] for name in dict.fromkeys([*classes, *counts]) if name in counts}


def _prefect(workspace: Workspace) -> tuple[str | None, str | None]:
    """The URL of the Prefect server (its own, else that of `client_settings`), and when the next scheduled tick is."""
    is_started = (workspace.home / "prefect").exists()
    if not is_started and client_settings() is None:  # the servers' code is not imported
        return None, None
    from al_pipeline.servers import prefect_elsewhere, prefect_status, read_deployment

    server = (prefect_status(workspace) if is_started else None) or prefect_elsewhere()
    if server is None:
        return None, None
    try:
        deployment = read_deployment(workspace, server)
    except ServerFailed:  # the status is useful without it
        deployment = None
    return redact(server.url), deployment.next_run if deployment else None


def _next(facts: Facts, workspace: Workspace) -> str:
    """Describe what the round waits for, or what the next `al round` will do."""
    rule, planned = closing_rule(workspace), facts.planned
    step = next_step(facts, rule)
    if isinstance(step, Wait):
        return step.reason
    if facts.amend:
        return f"`al round` applies the interventions on labels ({step})"
    if facts.closed:
        what = "the first plan" if planned is None else f"round {planned}"
        return f"`al round` continues the build of {what} ({step})"
    if planned is None and not facts.items:
        if workspace.params.ingest.sources:
            return "`al round` reads the files of ingest.sources in params.yaml"
        return "there is nothing to ask about yet: `al ingest FILE` adds items to the pool"
    if planned is None:
        return "`al round` makes the first plan and pushes it to Label Studio"
    if reason := close_reason(facts, rule):
        return f"`al round` closes round {planned}: {reason}"
    return f"round {planned} waits for {waiting_for(facts, rule)}; `al round` looks for new answers"


def rounds(workspace: Workspace) -> tuple[RoundRow, ...]:
    """The published rounds, oldest first."""
    return round_rows(read_history(workspace.layout, Git(workspace.layout.root)))


def test_version(record: Record) -> str:
    """The version of a round's test labels: the beginning of their digest. It changes with every label of theirs."""
    return record.hashes.get("test_labels", "")[:8]


def round_rows(history: History) -> tuple[RoundRow, ...]:
    """The rounds of a history as rows for status and report, oldest first."""
    return tuple(
        RoundRow(
            number=record.round,
            labels=record.counts.labelled,
            metrics=record.metrics,
            decision=record.decision,
            closed_at=record.closed_at,
            test_labels=record.counts.test_labelled,
            test_version=test_version(record),
            interventions=tuple(intervention.summary() for intervention in record.interventions),
            schema_version=record.params.schema_.version,
            new_classes=before is not None and len(same_classes([before, record])) == 1,
        )
        for before, record in zip([None, *history.rounds], history.rounds, strict=False)
    )
