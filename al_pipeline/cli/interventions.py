"""Commands by which a person intervenes: rollback, approve, ask, pause, resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import DryRun, Json, Reason, current_workspace
from al_pipeline.cli.output import discard, echo, escape, format_score, print_json, print_step, print_table
from al_pipeline.errors import ExternalServiceError, Locked, UsageError

if TYPE_CHECKING:
    from al_pipeline.integrations.dvc.session import Dvc
    from al_pipeline.operations.rule import Change
    from al_pipeline.rounds.interventions import Intervention
    from al_pipeline.workspace.workspace import Workspace


def rollback(
    number: Annotated[str | None, typer.Argument(metavar="ROUND", help="7 or round-0007: the last good one.")] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Its labels: later answers no longer count.")] = False,
    model: Annotated[
        bool, typer.Option("--model", help="What it served is served, and new ones wait for [bold]al approve[/].")
    ] = False,
    params: Annotated[bool, typer.Option("--params", help="Its params.yaml too.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take the newest rollback back.")] = False,
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Go back to a round's labelled snapshot: its labels, its model, or both (the default).

    Nothing is deleted. The answers given since then are quarantined, a new model is built from what is left, and the \
result is published as the next round; `--undo` takes it back. What is open in Label Studio stays there: the next \
round keeps those tasks and fills the batch up. Label Studio may be down: the next `al round` catches up.
    """
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.rule import rollback as go_back
    from al_pipeline.operations.rule import undo as take_back

    workspace = current_workspace()
    if undo == (number is not None):
        raise UsageError("name the round to go back to (`al rounds` lists them), or --undo")
    if undo and (labels or model or params):
        raise UsageError(
            "`--undo` takes back all that the rollback did; give it without --labels, --model and --params"
        )
    both = not labels and not model
    with dvc_for_intervention(workspace, dry_run) as dvc:
        if number is None:
            change = take_back(workspace, dvc, reason, dry_run=dry_run)
        else:
            change = go_back(
                workspace, dvc, round_number(number), labels=labels or both, model=model or both, params=params,
                reason=reason, dry_run=dry_run,
            )  # fmt: skip
    carry_out(workspace, change, dry_run, as_json)


def approve(
    number: Annotated[str | None, typer.Argument(metavar="ROUND", help="Default: the newest round.")] = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Promote a round's model although it was held or refused, and let later models be promoted again."""
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.rule import approve as rule

    workspace = current_workspace()
    with dvc_for_intervention(workspace) as dvc:
        _print_intervention(rule(workspace, dvc, None if number is None else round_number(number), reason), as_json)


def ask(
    items: Annotated[list[str], typer.Argument(metavar="ITEM", help="Ids of items of the pool.")],
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Put items into the next batch, before those that the strategy chooses."""
    from al_pipeline.operations.ask import ask as put

    workspace = current_workspace()
    with dvc_for_intervention(workspace) as dvc:
        _print_intervention(put(workspace, dvc, items, reason), as_json)


def pause(reason: Annotated[str, typer.Option(help="Why; shown to all.")] = "", as_json: Json = False) -> None:
    """Have every tick do nothing, by hand or by schedule, until `al resume`. A rollback still works."""
    from al_pipeline.operations.rule import pause as rule

    workspace = current_workspace()
    with dvc_for_intervention(workspace) as dvc:
        _print_intervention(rule(workspace, dvc, reason), as_json)


def resume(reason: Reason = "", as_json: Json = False) -> None:
    """Have ticks work again after `al pause`."""
    from al_pipeline.operations.rule import resume as rule

    workspace = current_workspace()
    with dvc_for_intervention(workspace) as dvc:
        _print_intervention(rule(workspace, dvc, reason), as_json)


@contextmanager
def dvc_for_intervention(workspace: Workspace, dry_run: bool = False) -> Iterator[Dvc]:
    """DVC for an intervention, which is refused where another clone runs the ticks that would carry it out."""
    from al_pipeline.operations.connect import refuse_elsewhere
    from al_pipeline.operations.facts import open_dvc

    if not dry_run:
        refuse_elsewhere(workspace)
    with open_dvc(workspace.layout) as dvc:
        yield dvc


def carry_out(workspace: Workspace, change: Change, dry_run: bool, as_json: bool) -> None:
    """Show an intervention, and run the tick that carries it out where it changes labels.

    What Label Studio is owed (open tasks of the abandoned round, the new batch) may wait for a later tick.
    """
    if not as_json:
        _print_change(change)
    if dry_run:
        if as_json:
            return print_json({**change.to_json(), "dry_run": True})
        return echo("Nothing was changed.")
    published: tuple[int, ...] = ()
    owed = ""
    if change.intervention.labels:
        from al_pipeline.flows.local_server import run_tick
        from al_pipeline.operations.tick import Options

        try:
            published = run_tick(workspace, Options(), discard if as_json else print_step).published
        except (ExternalServiceError, Locked) as error:
            owed = str(error)
        from al_pipeline.integrations.git import Git
        from al_pipeline.operations.history import read_history

        done = read_history(workspace.layout, Git(workspace.layout.root))
        if any(intervention.number == change.intervention.number for intervention in done.waiting):
            raise ExternalServiceError(f"the intervention is made; the next `al round` carries it out. {owed}".rstrip())
        published = published or tuple(r["round"] for r in done.rounds[-1:])
    if as_json:
        return print_json({**change.to_json(), "dry_run": False, "published": list(published), "owed": owed})
    for number in published:
        echo(f"[green]Published round-{number:04d}[/] with these labels. [bold]al report[/] shows it.")
    if not change.intervention.labels:
        echo(f"[green]Done:[/] the model of {change.served[1] or 'no round'} is served.")
    if change.intervention.hold:
        echo("New models are held until [bold]al approve[/].")
    if owed:
        echo(f"[yellow]What Label Studio is owed waits for the next `al round`:[/] {escape(owed)}")


def _print_change(change: Change) -> None:
    def count(rows: tuple[tuple[int, str, int], ...]) -> list[list[str]]:
        return [["imported" if n < 0 else f"round-{n:04d}", who, f"{many:,}"] for n, who, many in rows]

    for title, rows in (("Answers that no longer count", change.leaving), ("Answers that count again", change.coming)):
        if rows:
            echo(f"[bold]{title}[/]")
            print_table(("round", "annotator", "answers"), count(rows))
    found = change.to_json()
    table = [["labelled items", f"{change.labels[0]:,}", f"{change.labels[1]:,}"]]
    table += [["model served", str(change.served[0] or "none"), str(change.served[1] or "none")]]
    of_the_newest = change.intervention.labels and change.intervention.kind == "rollback"
    whose = "of the newest model" if of_the_newest else "of the model served"
    for name, before in found["metrics_before"].items():
        after = found["metrics_after"].get(name)
        if change.metrics[0] is not change.metrics[1]:
            table += [[f"{name.replace('_', ' ')} {whose}", format_score(before), format_score(after)]]
    print_table(("", "now", "then"), table)
    echo(f"{change.changed:,} labels change" + (f"; parameters: {', '.join(change.params)}" if change.params else ""))


def _print_intervention(intervention: Intervention, as_json: bool) -> None:
    if as_json:
        return print_json({"intervention": intervention.to_row()})
    echo(f"[green]Intervention {intervention.number}[/]: {escape(intervention.sentence())}.")
