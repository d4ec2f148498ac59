"""Commands that run rounds and show them: round, status, rounds, report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from al_pipeline.cli.options import Json, current_workspace
from al_pipeline.cli.output import discard, echo, escape, format_time, print_json, print_step, print_table
from al_pipeline.errors import NothingToDo

_SOURCES_SHOWN = 10


def run_round(
    close_now: Annotated[
        bool, typer.Option("--close-now", help="Close the open round with the answers there are.")
    ] = False,
    accept_vanished: Annotated[
        bool, typer.Option("--accept-vanished", help="Believe Label Studio although many answers vanished.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(help="How many items the batch asks about, if this tick selects one.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Which query strategy selects that batch. Default: as params.yaml says.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run one tick: pull answers, close and build the round if it is full, push the next questions.

    Safe to repeat and to interrupt. Runs as a flow where the workspace's Prefect server is up, else in this process. \
Ends with 3 where there was nothing to do: no new answer, or a pause.
    """
    from al_pipeline.flows.local_server import run_tick
    from al_pipeline.operations.tick import Options
    from al_pipeline.params import check_overrides

    workspace = current_workspace()
    check_overrides(size, strategy)
    options = Options(close_now, accept_vanished, size, strategy)
    report = run_tick(workspace, options, discard if as_json else print_step)
    if as_json:
        seconds: dict[str, float] = {}
        for name, took in report.steps:  # a tick that publishes pushes twice
            seconds[name] = seconds.get(name, 0.0) + took
        print_json(asdict(report) | {"steps": seconds})
        raise typer.Exit(0 if report.changed else NothingToDo.exit_code)
    for number in report.published:
        echo(f"[green]Published round-{number:04d}.[/] [bold]al report[/] shows it.")
    for reason, count in report.refused.items():
        echo(f"[yellow]Refused {count}:[/] {escape(reason)}")
    for warning in report.warnings:
        echo(f"[yellow]{escape(warning)}[/]")
    where = "No round is open" if report.round is None else f"Round {report.round} is {report.state}"
    echo(f"{where}: {escape(report.waits_for)}.")
    if not report.changed:
        raise typer.Exit(NothingToDo.exit_code)


def status(as_json: Json = False) -> None:
    """Show the round, how much is labelled, what was refused and why, and what comes next."""
    from al_pipeline.operations.status import status as read

    workspace = current_workspace()
    found = read(workspace)
    if as_json:
        return print_json(found)
    number = "no round yet" if found["round"] is None else f"round {found['round']}"
    echo(
        f"[bold]{number}[/], {found['state']}"
        + (f": {found['settled']} of {found['tasks']} tasks settled" if found["tasks"] else "")
    )
    print_table(
        ("pool", "labelled", "pending", "ignored", "unlabelled", "test set", "labelled of it"),
        [[f"{found[k]:,}" for k in ("pool", "labelled", "pending", "ignored", "unlabelled", "test", "test_labelled")]],
    )
    if found["labels"]:
        echo("labels: " + ", ".join(f"{escape(name)} {count:,}" for name, count in found["labels"].items()))
    if found["promoted"]:
        score = found["metrics"].get("macro_f1")
        echo(
            f"promoted model: [bold]{found['promoted']}[/]"
            + (f"; latest macro-F1 {score:.3f}" if score is not None else "")
        )
    if found["running"] and found["running"]["whole"]["answered"]:
        echo(f"running accuracy: {_running_accuracy(found['running'])}")
    if found["saved"]:
        echo(escape(found["saved"]["sentence"]))
    if found["asked_by"]:
        echo(f"asked by {escape(found['asked_by']['strategy'])}: {escape(found['asked_by']['reason'])}")
    for reason, count in found["refused"].items():
        echo(f"[yellow]refused {count}:[/] {escape(reason)}")
    sources = found.get("sources", [])
    for one in sources[:_SOURCES_SHOWN]:
        since = format_time(workspace.params.schedule.timezone, one["since"])
        told = f"{one['message']} (since {since})" if one["state"] == "failing" else one["message"]
        echo(f"[yellow]ingest.sources:[/] {escape(one['file'])} {escape(told)}")
    if (more := len(sources) - _SOURCES_SHOWN) > 0:
        echo(f"[yellow]ingest.sources:[/] and {more:,} more; `al status --json` names them")
    for name in ("schema_problem", "paused", "held"):
        if found[name]:
            echo(f"[yellow]{name.replace('_', ' ')}:[/] {escape(found[name])}")
    if found["busy"]:
        busy = found["busy"]
        echo(f"[yellow]busy:[/] {escape(busy.get('purpose', ''))} since {escape(busy.get('since', ''))}")
    if found["tasks"]:
        since = found["answered_since"]
        waiting = f", {since} since the last look (`al round` pulls them)" if since else ", all of them pulled"
        echo(f"answers: {found['answered']} of {found['tasks']} tasks answered{'' if since is None else waiting}")
    if found["label_studio"] and found["label_studio"]["state"] != "up":
        echo(f"[yellow]Label Studio is {found['label_studio']['state']}:[/] {escape(found['label_studio']['detail'])}")
    if found["label_studio_page"]:
        echo(f'annotators: {escape(found["label_studio_page"])}, then the button "Label All Tasks"')
    elif found["label_studio_url"]:
        echo(f"Label Studio: {escape(found['label_studio_url'])}")
    if found["prefect_url"]:
        echo(f"Prefect: {escape(found['prefect_url'])}")
    if found["next_run"]:
        echo(f"next tick by itself: {format_time(workspace.params.schedule.timezone, found['next_run'])}")
    echo(f"next: {escape(found['next'])}")


def _running_accuracy(found: dict[str, Any]) -> str:
    """The running accuracy in words: over the newest rounds, or over all where those have no answer."""
    one = found["recent"] if found["recent"]["answered"] else found["whole"]
    return (
        f"[bold]{one['accuracy']:.3f}[/] ({one['low']:.3f}–{one['high']:.3f}), rounds {one['first_round']} to "
        f"{one['last_round']}: {one['right']} right of {one['answered']} answered ({one['asked']} random questions "
        "asked), predicted before they were learnt"
    )


def rounds(as_json: Json = False) -> None:
    """List the published rounds with their metrics and decisions."""
    from al_pipeline.operations.status import rounds as read

    found = read(current_workspace())
    if as_json:
        return print_json({"rounds": found})
    if not found:
        return echo("No round is published yet; [bold]al status[/] says what the first one waits for.")

    def figure(row: dict[str, Any], name: str) -> str:
        estimate = row["metrics"][name]
        if estimate["value"] is None:
            return "–"
        return f"{estimate['value']:.3f} ({estimate['low']:.3f}–{estimate['high']:.3f})"

    print_table(
        ("round", "labelled", "macro-F1", "accuracy", "average precision", "decision"),
        [
            [
                str(row["round"]),
                f"{row['labelled']:,}",
                *(figure(row, n) for n in ("macro_f1", "accuracy", "average_precision")),
                "; ".join([row["verdict"], *row["interventions"]]),
            ]
            for row in found
        ],
    )


def report(
    number: Annotated[str | None, typer.Argument(metavar="ROUND", help="7 or round-0007. Default: the latest.")] = None,
    as_json: Json = False,
) -> None:
    """Render a round's report: one HTML page that opens offline."""
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.report import write_report

    path = write_report(current_workspace(), None if number is None else round_number(number))
    if as_json:
        return print_json({"report": str(path)})
    echo(f"Report: [bold]{escape(path)}[/]")
