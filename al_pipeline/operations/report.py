"""Render the report of a round, on demand, from published data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
from msgspec.structs import asdict, replace

from al_pipeline.annotation.active_events import active
from al_pipeline.cron import check_timezone
from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import Predictions, parse_predictions
from al_pipeline.data.pool import fetch
from al_pipeline.data.served import without_requests
from al_pipeline.errors import NothingToDo
from al_pipeline.evaluation.comparison import aligned
from al_pipeline.evaluation.metrics import evaluate
from al_pipeline.files import write_text
from al_pipeline.integrations.git import Git
from al_pipeline.operations.connect import task_pages
from al_pipeline.operations.history import History, events_known, labels_saved_by, read_history, read_live, read_plan
from al_pipeline.operations.quality import gold_keys_of, quality_of
from al_pipeline.operations.review_figures import error_rate_sentence
from al_pipeline.operations.round_tasks import asked_items, count_answers
from al_pipeline.operations.status import pool_counts, round_rows, status, test_version
from al_pipeline.quality.error_rate import ErrorRate
from al_pipeline.records import Part, round_name
from al_pipeline.reporting.page import render
from al_pipeline.reporting.view_model import AskedItem, LabelMix, Mistake, ReportData, RoundRow
from al_pipeline.rounds.manifests import Engine, LiveQuestion, Params, Reviewed, RoundRecord, parse_histogram
from al_pipeline.workspace.workspace import Workspace

MISTAKES = 25


def write_report(workspace: Workspace, number: int | None = None) -> Path:
    """Render the report of round `number` (default: the latest published) to `reports/`; returns its path."""
    data = report_data(workspace, number)
    path = workspace.layout.reports / f"{round_name(data.round)}.html"
    write_text(path, render(data))
    return path


def report_data(workspace: Workspace, number: int | None = None) -> ReportData:
    """Collect the data of a round's report. Raises NothingToDo if the round is not published."""
    git = Git(workspace.layout.root)
    history = read_history(workspace.layout, git)
    if not history.rounds:
        raise NothingToDo("no round is published yet; `al status` says what the first one waits for")
    record = history.rounds[-1] if number is None else history.record(number)
    revision = round_name(record.round) if round_name(record.round) in git.tags() else "HEAD"
    zone, schema = _zone(record.params), record.params.schema_
    histogram = parse_histogram(git.show(revision, "rounds/histogram.json") or "{}")
    predictions = parse_predictions(git.show(revision, "rounds/predictions.csv") or "item_id,label\n")
    if record.traffic is not None:
        predictions = without_requests(predictions, workspace.layout.test)
    rows = [row for row in round_rows(history) if row.number <= record.round]
    newest = _on_newest_labels(git, rows, predictions, record)
    reviewed = record.review
    report = ReportData(
        title=workspace.layout.root.name,
        question=schema.question,
        classes=schema.labels,
        round=record.round,
        state="published",
        labels=record.counts.labelled,
        date=_date(record.closed_at, zone),
        history=tuple(replace(row, date=_date(row.closed_at, zone)) for row in newest or rows),
        recomputed=newest is not None,
        reviewed=() if reviewed is None else _review_sentences(reviewed),
        test_version="" if reviewed is None else f"{test_version(record)}, {reviewed.test_rulings} of them reviewed",
        metrics=record.metrics,
        decision=record.decision,
        pool=pool_counts(record.counts),
        mix=LabelMix(record.counts.labels, record.counts.test_labels),
        histogram=histogram if histogram.edges else None,
        mistakes=_mistakes(workspace, predictions),
        params_digest=record.hashes["params"][:12],
        engine=_engine(record.engine),
        confidence=record.params.evaluate.confidence,
        running=record.running,
        traffic=record.traffic,
        saved=labels_saved_by(history, record.round),
        cost=record.cost,
        outlook=record.outlook,
        asked_because=_asked_because(history, record.round),
        links=task_pages(workspace, record.round),
    )
    return _with_answers(report, workspace, git, history, record, revision)


def _with_answers(
    report: ReportData, workspace: Workspace, git: Git, history: History, record: RoundRecord, revision: str
) -> ReportData:
    """Add to the report what was asked and answered, and what comes next."""
    plan = read_plan(git, record.round, revision)
    ledger = read_events(workspace.layout.events)
    known = active(ledger[: events_known(record, ledger)])
    waiting, latest = 0, history.rounds[-1].round
    budget: tuple[str, ...] = ()
    proposal = drift = ""
    next_step = f"This is history; the latest round is {latest}."
    if record.round == latest:
        now = status(workspace, ask=False)
        waiting, next_step = now.tasks - now.settled, now.next
        budget = tuple(one.sentence for one in now.budget)
        proposal = now.proposal.sentence() if now.proposal else ""
        drift = now.drift.sentence() if now.drift else ""
    return replace(
        report,
        asked=_with_models(asked_items(workspace, record, plan, known), read_live(git, record.round, revision)),
        answers=count_answers(record, plan, known, ledger, waiting),
        quality=quality_of(known, record.params.schema_.labels, None, gold_keys_of(git, revision)),
        next_step=next_step,
        budget=budget,
        proposal=proposal,
        drift=drift,
    )


def _with_models(asked: tuple[AskedItem, ...], live: Sequence[LiveQuestion]) -> tuple[AskedItem, ...]:
    """The items with the models that asked them live."""
    by_item = {question.task.item_id: question for question in live if question.kind != "planned"}
    return tuple(
        replace(one, strategy=f"{one.strategy}, live: model {found.model[:8]}, which knew {found.events:,} answers")
        if (found := by_item.get(one.item_id)) is not None and found.model
        else one
        for one in asked
    )


def _review_sentences(found: Reviewed) -> tuple[str, ...]:
    """What reviewers had found when the round was published."""
    rates: dict[Part, ErrorRate] = {
        "pool": ErrorRate(**asdict(found.pool)),
        "test": ErrorRate(**asdict(found.test)),
    }
    sentences = [error_rate_sentence(part, rate) for part, rate in rates.items() if rate.labels]
    return (*sentences, f"{found.rulings} labels have a ruling, {found.test_rulings} of them in the test set")


def _on_newest_labels(
    git: Git, rows: Sequence[RoundRow], newest: Predictions, record: RoundRecord
) -> list[RoundRow] | None:
    """The rounds with the metrics of their models on the test labels of `newest`; None if no review changed any.

    Of each round all items are used that it predicted and that have a label now, so that the curve is of one test set.
    Rounds with other classes stay as they were measured.
    """
    if record.review is None or not record.review.test_rulings:
        return None
    label_of = dict(zip(newest.item_ids, newest.labels, strict=True))
    earlier = {row.number: _predictions_then(git, row.number) for row in rows if row.number < record.round}
    before = {number: found for number, found in earlier.items() if set(found.classes) == set(newest.classes)}
    if not any(
        label and label_of.get(item, label) != label
        for found in before.values()
        for item, label in zip(found.item_ids, found.labels, strict=True)
    ):
        return None
    params, recomputed = record.params, []
    for row in rows:
        found = before.get(row.number)
        places = [] if found is None else [place for place, item in enumerate(found.item_ids) if item in label_of]
        if found is not None and places:
            truth = [newest.classes.index(label_of[found.item_ids[place]]) for place in places]
            row = replace(
                row,
                metrics=evaluate(
                    aligned(found, places, newest.classes),
                    np.array(truth, dtype=np.intp),
                    newest.classes,
                    np.random.default_rng([params.seed, 0xE7A1]),
                    params.evaluate.bootstrap,
                    params.evaluate.confidence,
                ),
            )
        recomputed.append(row)
    return recomputed


def _predictions_then(git: Git, number: int) -> Predictions:
    """The predictions of a round's model for all test items; none if the round has no tag."""
    tag = round_name(number)
    text = git.show(tag, "rounds/predictions.csv") if tag in git.tags() else None
    return parse_predictions(text or "item_id,label\n", unlabelled=True)


def _engine(engine: Engine) -> Mapping[str, str]:
    return {"version": engine.version, "sources": engine.sources[:12], **engine.packages}


def _asked_because(history: History, number: int) -> str:
    """Which strategy chose the batch of round `number`, and why, from the record of the previous build."""
    before = [record for record in history.rounds if record.round < number]
    record = before[-1] if before else history.genesis
    choice = record.next_batch if record else None
    return f"{choice.strategy}: {choice.reason}" if choice else ""


def _mistakes(workspace: Workspace, predictions: Predictions) -> tuple[Mistake, ...]:
    best = predictions.proba.argmax(axis=1) if len(predictions.item_ids) else []
    wrong = [
        (float(predictions.proba[row, column]), item, label, predictions.classes[column])
        for row, (item, label, column) in enumerate(zip(predictions.item_ids, predictions.labels, best, strict=True))
        if predictions.classes[column] != label
    ]
    wrong = sorted(wrong, reverse=True)[:MISTAKES]
    items = fetch([workspace.layout.test], [item for _, item, _, _ in wrong])
    return tuple(
        Mistake(item, items[item].text if item in items else "", label, predicted, probability)
        for probability, item, label, predicted in wrong
    )


def _zone(params: Params) -> tzinfo:
    """The time zone of a round's schedule; UTC if it names none or an unknown one."""
    schedule = params.schedule
    name = schedule.get("timezone") if isinstance(schedule, dict) else None
    try:
        return ZoneInfo(check_timezone(name)) if isinstance(name, str) and name != "UTC" else UTC
    except ValueError:
        return UTC


def _date(closed: float | None, zone: tzinfo) -> str | None:
    return datetime.fromtimestamp(closed, zone).strftime("%Y-%m-%d %H:%M %Z") if closed else None
