"""Commands by which a person intervenes: rollback, approve, ask, pause, resume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import DryRun, Json, Reason, current_workspace
from al_pipeline.cli.output import discard, echo, escape, format_score, print_json, print_step, print_table
from al_pipeline.errors import ExternalServiceError, Locked, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from al_pipeline.operations.intervene import Change
    from al_pipeline.rounds.interventions import Intervention
    from al_pipeline.workspace.workspace import Workspace


def rollback(
    number: Annotated[
        str | None, typer.Argument(metavar="ROUND", help="The round to go back to: 7 or round-0007.")
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Restore its labels: later answers no longer count.")
    ] = False,
    model: Annotated[
        bool, typer.Option("--model", help="Serve its model; new models wait for [bold]al approve[/].")
    ] = False,
    params: Annotated[bool, typer.Option("--params", help="Restore its params.yaml as well.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Undo the latest rollback.")] = False,
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Go back to the snapshot of a round: its labels, its model, or both (the default).

    Nothing is deleted. Later answers are quarantined, a new model is trained on the remaining labels, and the result \
is published as the next round; `--undo` reverts it. Open tasks stay in Label Studio: the next round keeps them and \
fills up the batch. Label Studio may be down: the next `al round` catches up.
    """
    from al_pipeline.operations import intervene as operation
    from al_pipeline.operations.history import round_number

    workspace = current_workspace()
    if undo == (number is not None):
        raise UsageError("name the round to go back to (`al rounds` lists them), or --undo")
    if undo and (labels or model or params):
        raise UsageError("`--undo` reverts everything the rollback did; omit --labels, --model and --params")
    both = not labels and not model
    with operation.dvc_for_intervention(workspace, dry_run=dry_run) as dvc:
        if number is None:
            change = operation.undo(workspace, dvc, reason, dry_run=dry_run)
        else:
            change = operation.rollback(
                workspace, dvc, round_number(number), labels=labels or both, model=model or both, params=params,
                reason=reason, dry_run=dry_run,
            )  # fmt: skip
    carry_out(workspace, change, dry_run, as_json)


def approve(
    number: Annotated[
        str | None, typer.Argument(metavar="ROUND", help="7 or round-0007. Default: the newest round.")
    ] = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Promote a round's model that was held or rejected, and let later models be promoted again."""
    from al_pipeline.operations import intervene as operation
    from al_pipeline.operations.history import round_number

    workspace = current_workspace()
    wanted = None if number is None else round_number(number)
    with operation.dvc_for_intervention(workspace) as dvc:
        done = operation.approve(workspace, dvc, wanted, reason)
    _print_intervention(done, as_json)


def ask(
    items: Annotated[list[str], typer.Argument(metavar="ITEM", help="Ids of items in the pool.")],
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Put items into the next batch, ahead of those that the query strategy selects."""
    from al_pipeline.operations.ask import ask as ask_about
    from al_pipeline.operations.intervene import dvc_for_intervention

    workspace = current_workspace()
    with dvc_for_intervention(workspace) as dvc:
        done = ask_about(workspace, dvc, items, reason)
    _print_intervention(done, as_json)


def pause(
    reason: Annotated[str, typer.Option(help="Reason, recorded in git and shown by `al status`.")] = "",
    as_json: Json = False,
) -> None:
    """Pause all ticks, manual and scheduled, until `al resume`. A rollback still works."""
    from al_pipeline.operations import intervene as operation

    workspace = current_workspace()
    with operation.dvc_for_intervention(workspace) as dvc:
        done = operation.pause(workspace, dvc, reason)
    _print_intervention(done, as_json)


def resume(reason: Reason = "", as_json: Json = False) -> None:
    """Resume ticks after `al pause`."""
    from al_pipeline.operations import intervene as operation

    workspace = current_workspace()
    with operation.dvc_for_intervention(workspace) as dvc:
        done = operation.resume(workspace, dvc, reason)
    _print_intervention(done, as_json)


def carry_out(workspace: Workspace, change: Change, dry_run: bool, as_json: bool) -> None:
    """Show an intervention and, if it changes labels, run the tick that carries it out.

    What is left to do in Label Studio (tasks of the abandoned round, the new batch) may wait for a later tick.
    """
    if not as_json:
        _print_change(change)
    if dry_run:
        return print_json({**change.to_json(), "dry_run": True}) if as_json else echo("Nothing was changed.")
    published, unfinished = publish_change(workspace, change, as_json) if change.intervention.labels else ((), "")
    if as_json:
        outcome = {"dry_run": False, "published": list(published), "unfinished": unfinished}
        return print_json({**change.to_json(), **outcome})
    print_published(published)
    if not change.intervention.labels:
        echo(f"[green]Done:[/] the model of {change.served[1] or 'no round'} is served.")
    if change.intervention.hold:
        echo("New models are held until [bold]al approve[/].")
    print_unfinished(unfinished)


def print_published(numbers: Sequence[int]) -> None:
    """Name the rounds that were published with an intervention."""
    for number in numbers:
        echo(f"[green]Published round-{number:04d}[/] with these labels. [bold]al report[/] shows it.")


def print_unfinished(reason: str) -> None:
    """Say what is left to do in Label Studio, if anything is."""
    if reason:
        echo(f"[yellow]The next `al round` finishes the work in Label Studio:[/] {escape(reason)}")


def publish_change(workspace: Workspace, change: Change, as_json: bool) -> tuple[tuple[int, ...], str]:
    """Run the tick that carries out an intervention; the rounds published with it, and why the tick ended early.

    Raises ExternalServiceError if it ended before the intervention was carried out.
    """
    from al_pipeline.flows.local_server import run_tick
    from al_pipeline.operations.intervene import published_with
    from al_pipeline.operations.tick import Options

    published: tuple[int, ...] = ()
    unfinished = ""
    try:
        published = run_tick(workspace, Options(), discard if as_json else print_step).published
    except (ExternalServiceError, Locked) as error:
        unfinished = str(error)
    newest = published_with(workspace, change.intervention, unfinished)
    return published or (() if newest is None else (newest,)), unfinished


def _print_change(change: Change) -> None:
    from al_pipeline.evaluation.figures import FIGURES

    for title, rows in (("Answers that no longer count", change.leaving), ("Answers that count again", change.coming)):
        if rows:
            echo(f"[bold]{title}[/]")
            shown = [["imported" if n < 0 else f"round-{n:04d}", who, f"{many:,}"] for n, who, many in rows]
            print_table(("round", "annotator", "answers"), shown)
    table = [["labelled items", f"{change.labels[0]:,}", f"{change.labels[1]:,}"]]
    table += [["model served", str(change.served[0] or "none"), str(change.served[1] or "none")]]
    of_the_newest = change.intervention.labels and change.intervention.kind == "rollback"
    whose = "of the newest model" if of_the_newest else "of the served model"
    before, after = change.metrics
    if before is not None and before is not after:
        for name in FIGURES:
            scores = (before.figure(name).value, after.figure(name).value if after else None)
            table += [[f"{name.replace('_', ' ')} {whose}", *map(format_score, scores)]]
    print_table(("", "before", "after"), table)
    echo(f"{change.changed:,} labels change" + (f"; parameters: {', '.join(change.params)}" if change.params else ""))


def _print_intervention(intervention: Intervention, as_json: bool) -> None:
    if as_json:
        return print_json({"intervention": intervention.to_row()})
    echo(f"[green]Intervention {intervention.number}[/]: {escape(intervention.sentence())}.")
