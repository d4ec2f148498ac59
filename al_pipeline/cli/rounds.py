"""Commands that run rounds and show them: round, status, rounds, report."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from al_pipeline.cli.options import Json, current_workspace
from al_pipeline.cli.output import discard, echo, escape, format_time, format_times, print_json, print_step, print_table
from al_pipeline.errors import NothingToDo

if TYPE_CHECKING:
    from al_pipeline.evaluation.figures import Estimate, Running
    from al_pipeline.operations.status import Status
    from al_pipeline.operations.tick import TickReport
    from al_pipeline.workspace.workspace import Workspace

_MOST_SOURCES = 10
"""The maximum number of unreadable files of `ingest.sources` that `al status` names."""


def run_round(
    close_now: Annotated[
        bool, typer.Option("--close-now", help="Close the open round with the answers received so far.")
    ] = False,
    accept_vanished: Annotated[
        bool, typer.Option("--accept-vanished", help="Accept a large number of deleted annotations.")
    ] = False,
    size: Annotated[int | None, typer.Option(help="Size of the batch, if this tick selects one.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Query strategy for that batch. Default: the one in params.yaml.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run one tick: pull answers, close and build the round if it is complete, push the next batch.

    Safe to interrupt and to repeat. Runs as a Prefect flow if the workspace's Prefect server is up, otherwise in this \
process. Exits with 3 if there was nothing to do: no new answers, or the workspace is paused.
    """
    from al_pipeline.flows.launch import run_as_fork
    from al_pipeline.flows.local_server import run_tick
    from al_pipeline.operations.tick import Options
    from al_pipeline.params import check_overrides

    workspace = current_workspace()
    check_overrides(size, strategy)
    flags = {"--close-now": close_now, "--accept-vanished": accept_vanished, "--json": as_json}
    values = {"--size": size, "--strategy": strategy}
    given = [
        *(flag for flag, is_set in flags.items() if is_set),
        *(f"{k}={v}" for k, v in values.items() if v is not None),
    ]
    command = ("al_pipeline.cli.app", "-C", str(workspace.layout.root), "round", *given)
    if (code := run_as_fork(workspace.id, *command)) is not None:
        raise typer.Exit(code)
    options = Options(close_now, accept_vanished, size, strategy)
    report = run_tick(workspace, options, discard if as_json else print_step)
    if as_json:
        print_json(_tick_to_json(report))
    else:
        _print_tick(report, workspace)
    if not report.changed:
        raise typer.Exit(NothingToDo.exit_code)


def _tick_to_json(report: TickReport) -> dict[str, Any]:
    """The report with the seconds of each step, added up: a tick that publishes pushes twice."""
    seconds: dict[str, float] = {}
    for name, took in report.steps:
        seconds[name] = seconds.get(name, 0.0) + took
    return asdict(report) | {"steps": seconds}


def _print_tick(report: TickReport, workspace: Workspace) -> None:
    for number in report.published:
        echo(f"[green]Published round-{number:04d}.[/] [bold]al report[/] shows it.")
    for reason, count in report.refused.items():
        echo(f"[yellow]Refused {count}:[/] {escape(reason)}")
    for warning in report.warnings:
        echo(f"[yellow]{escape(warning)}[/]")
    where = "No round is open" if report.round is None else f"Round {report.round} is {report.state}"
    echo(f"{where}: {escape(_local_times(workspace, report.waits_for))}.")


def status(as_json: Json = False) -> None:
    """Show the current round, how much is labelled, which answers were refused and why, and what comes next."""
    from al_pipeline.operations.status import status as read_status

    workspace = current_workspace()
    found = read_status(workspace)
    if as_json:
        return print_json(found.to_json())
    _print_counts(found)
    _print_model(found)
    if found.review is not None:
        from al_pipeline.cli.review import print_review

        print_review(found.review)
        if found.review.waiting and found.review_page:
            echo(f"{found.review.waiting:,} tasks wait for reviewers: {escape(found.review_page)}")
    if found.gold is not None:
        echo(f"gold: {found.gold.items:,} items, {found.gold.left:,} of them not answered by everybody yet")
        for one in found.gold.below:
            echo(f"[yellow]below the bound on gold:[/] {escape(one)}")
    _print_problems(found, workspace)
    _print_servers(found)
    if found.live:
        from al_pipeline.live.page import page_of

        page = page_of(workspace)
        echo(f"live: {escape(found.live)}{f'; page: {escape(page)}' if page else ''}")
    if found.next_run:
        echo(f"next scheduled tick: {_local_time(workspace, found.next_run)}")
    echo(f"next: {escape(_local_times(workspace, found.next))}")


def _local_time(workspace: Workspace, text: str) -> str:
    """A time in the time zone of the workspace's schedule."""
    return format_time(workspace.params.schedule.timezone, text)


def _local_times(workspace: Workspace, text: str) -> str:
    """A sentence with its times in the time zone of the workspace's schedule."""
    return format_times(workspace.params.schedule.timezone, text)


def _print_counts(found: Status) -> None:
    number = "no round yet" if found.round is None else f"round {found.round}"
    settled = f": {found.settled} of {found.tasks} tasks settled" if found.tasks else ""
    echo(f"[bold]{number}[/], {found.state}{settled}")
    names = ("pool", "labelled", "pending", "ignored", "unlabelled", "test", "test_labelled")
    header = ("pool", "labelled", "pending", "ignored", "unlabelled", "test set", "test set labelled")
    print_table(header, [[f"{getattr(found, name):,}" for name in names]])
    if found.labels:
        echo("labels: " + ", ".join(f"{escape(name)} {count:,}" for name, count in found.labels.items()))


def _print_model(found: Status) -> None:
    if found.promoted:
        score = found.metrics.macro_f1.value if found.metrics else None
        of = f" (test labels {found.test_version})" if found.review is not None else ""
        latest = "" if score is None else f"; latest macro-F1 {score:.3f}{of}"
        echo(f"promoted model: [bold]{found.promoted}[/]{latest}")
    if found.promoted_classes:
        echo(f"[yellow]it has other classes than the newest round:[/] {escape(', '.join(found.promoted_classes))}")
    if found.traffic:
        echo(f"on requests: {escape(found.traffic.sentence())}")
    if found.drift:
        alarm = found.drift.look is not None and found.drift.look.alarm
        echo(f"{'[red]drift:[/]' if alarm else 'drift:'} {escape(found.drift.sentence())}")
    if found.running and found.running.whole.answered:
        echo(f"running accuracy: {_running_accuracy(found.running)}")
    if found.saved:
        echo(escape(found.saved.sentence()))
    if found.cost and found.cost.seconds is not None:
        hours, each = found.cost.seconds / 3600, found.cost.seconds / max(1, found.cost.answers)
        echo(f"time: {found.cost.answers:,} answers took {hours:.1f} h, {each:.1f} s each, without idle time")
    for one in found.budget:
        echo(f"budget: {escape(one.sentence)}")
    if found.outlook:
        echo(f"forecast: {escape(found.outlook.sentence())}")
    if found.proposal:
        echo(f"proposal: {escape(found.proposal.sentence())}")
    if found.asked_by:
        echo(f"query strategy: {escape(found.asked_by.strategy)}: {escape(found.asked_by.reason)}")


def _running_accuracy(found: Running) -> str:
    """The running accuracy in words: over the newest rounds, or over all if those have no answers."""
    one = found.recent if found.recent.answered else found.whole
    return (
        f"[bold]{one.accuracy:.3f}[/] ({one.low:.3f}–{one.high:.3f}), rounds {one.first_round} to "
        f"{one.last_round}: {one.right} of {one.answered} answers predicted correctly before the model "
        f"trained on them ({one.asked} random queries asked)"
    )


def _print_problems(found: Status, workspace: Workspace) -> None:
    for reason, count in found.refused.items():
        echo(f"[yellow]refused {count}:[/] {escape(reason)}")
    for one in found.sources[:_MOST_SOURCES]:
        since = f" (since {_local_time(workspace, one.since.isoformat())})" if one.state == "failing" else ""
        echo(f"[yellow]ingest.sources:[/] {escape(one.file)} {escape(one.message)}{escape(since)}")
    if (more := len(found.sources) - _MOST_SOURCES) > 0:
        echo(f"[yellow]ingest.sources:[/] and {more:,} more; `al status --json` lists them")
    for name, text in (("schema problem", found.schema_problem), ("paused", found.paused), ("held", found.held)):
        if text:
            echo(f"[yellow]{name}:[/] {escape(_local_times(workspace, text))}")
    if busy := found.busy:
        since = _local_times(workspace, str(busy.get("since", "")))
        echo(f"[yellow]busy:[/] {escape(busy.get('purpose', ''))} since {escape(since)}")


def _print_servers(found: Status) -> None:
    if found.tasks:
        since = found.answered_since
        waiting = f", {since} since the last pull (`al round` pulls them)" if since else ", all of them pulled"
        echo(f"answers: {found.answered} of {found.tasks} tasks answered{'' if since is None else waiting}")
    if found.label_studio and found.label_studio.state != "up":
        echo(f"[yellow]Label Studio is {found.label_studio.state}:[/] {escape(found.label_studio.detail)}")
    if found.label_studio_page:
        echo(f'annotators: {escape(found.label_studio_page)}, then the button "Label All Tasks"')
    elif found.label_studio_url:
        echo(f"Label Studio: {escape(found.label_studio_url)}")
    if found.prefect_url:
        echo(f"Prefect: {escape(found.prefect_url)}")


def rounds(as_json: Json = False) -> None:
    """List the published rounds with their metrics and promotion decisions."""
    from al_pipeline.operations.status import rounds as read_rounds

    found = read_rounds(current_workspace())
    if as_json:
        return print_json({"rounds": [row.to_json() for row in found]})
    if not found:
        return echo("No round is published yet; [bold]al status[/] says what the first one waits for.")
    names = ("macro_f1", "accuracy", "average_precision")
    print_table(
        ("round", "labelled", "macro-F1", "accuracy", "average precision", "decision"),
        [
            [
                str(row.number),
                f"{row.labels:,}",
                *(_with_interval(row.metrics.figure(name)) for name in names),
                "; ".join([row.decision.verdict, *row.interventions, *(["other classes"] if row.new_classes else [])]),
            ]
            for row in found
        ],
    )


def _with_interval(estimate: Estimate) -> str:
    if estimate.value is None:
        return "–"
    return f"{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"


def report(
    number: Annotated[str | None, typer.Argument(metavar="ROUND", help="7 or round-0007. Default: the latest.")] = None,
    as_json: Json = False,
) -> None:
    """Write the report of a round: one HTML page that opens offline."""
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.report import write_report

    path = write_report(current_workspace(), None if number is None else round_number(number))
    if as_json:
        return print_json({"report": str(path)})
    echo(f"Report: [bold]{escape(path)}[/]")
