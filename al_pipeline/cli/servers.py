"""Commands about the servers on this machine, and when ticks run by themselves: up, down, schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.labelstudio import print_login
from al_pipeline.cli.options import Json, current_workspace, original_workspace
from al_pipeline.cli.output import echo, escape, format_time, print_json, print_table, spinner, warn
from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from al_pipeline.operations.schedule import Standing
    from al_pipeline.workspace.workspace import Workspace

schedule = typer.Typer()


def up(as_json: Json = False) -> None:
    """Start what is missing on this machine: Label Studio, a Prefect server, the worker that runs scheduled ticks.

    Safe to repeat: what runs is left alone, what was killed comes back where it was.
    """
    from al_pipeline.operations.schedule import look_at_schedule
    from al_pipeline.servers import (
        label_studio_elsewhere,
        password_file,
        prefect_status,
        services,
        start_label_studio,
        start_prefect,
        start_worker,
    )

    workspace = original_workspace()
    _ = workspace.params  # what is wrong in it is told before anything starts
    workspace.make_home()
    elsewhere = label_studio_elsewhere(workspace)
    with spinner(not as_json) as say:
        studio = elsewhere or start_label_studio(workspace, say).url
        prefect = prefect_status(workspace) or start_prefect(workspace, say)
        say("telling Prefect of the schedule")
        _offer_to_prefect(workspace)
        start_worker(workspace, say)
    rows, found = services(workspace), look_at_schedule(workspace)
    if as_json:
        return print_json(
            {
                "label_studio_url": studio,
                "prefect_url": prefect.url,
                "services": [row.to_json() for row in rows],
                "schedule": found.to_json(),
            }
        )
    print_table(
        ("service", "state", "address", "process", "log"),
        [[row.service, row.state, row.address, str(row.pid or ""), row.log or ""] for row in rows],
    )
    echo(f"[dim]logs lie in {escape(workspace.home)}[/]")
    if not elsewhere:
        print_login(workspace, studio)
    echo(f"Prefect's page asks for what stands in {escape(password_file(workspace))}, readable by you alone")
    _print_schedule(found)


def down(as_json: Json = False) -> None:
    """Stop what `al up` started, and a scheduled tick that runs just now; the next one finishes its job."""
    from al_pipeline.servers import stop_label_studio, stop_prefect, stop_worker

    workspace = original_workspace()
    stopped = {}
    for name, stop in (("worker", stop_worker), ("Prefect", stop_prefect), ("Label Studio", stop_label_studio)):
        stopped[name] = stop(workspace)
        if not as_json:
            echo(f"{name}: {'stopped' if stopped[name] else 'was not running'}")
    if as_json:
        print_json({"stopped": stopped})


@schedule.callback(invoke_without_command=True)
def schedule_(
    context: typer.Context,
    cron: Annotated[
        str | None,
        typer.Option(
            metavar="CRON", help="Minute, hour, day of the month, month, day of the week: '*/30 8-18 * * 1-5'"
        ),
    ] = None,
    timezone: Annotated[str | None, typer.Option(metavar="ZONE", help="Such as Europe/Berlin.")] = None,
    active: Annotated[bool | None, typer.Option("--on/--off", help="Whether ticks run by themselves at all.")] = None,
    as_json: Json = False,
) -> None:
    """Show when ticks run by themselves, or change it in params.yaml and in the workspace's Prefect server.

    A change is committed, if params.yaml had no other.
    """
    if context.invoked_subcommand is not None:
        return
    from al_pipeline.operations.schedule import change_schedule, look_at_schedule
    from al_pipeline.servers import prefect_status

    changes = (cron, timezone, active) != (None, None, None)
    workspace = original_workspace() if changes else current_workspace()
    if changes:
        before = workspace.layout.params.read_bytes()
        committed = change_schedule(workspace, cron, timezone, active)
        changed = before != workspace.layout.params.read_bytes()
        if not as_json:
            done = "and committed" if committed else "not committed: it has other changes, the next round commits it"
            echo(f"params.yaml is changed, {done}." if changed else "params.yaml says so already.")
        workspace = current_workspace()
        if prefect_status(workspace):
            _offer_to_prefect(workspace)
    found = look_at_schedule(workspace)
    if as_json:
        return print_json(found.to_json())
    _print_schedule(found)


@schedule.command("apply")
def schedule_apply(as_json: Json = False) -> None:
    """Tell the workspace's Prefect server of the schedule in params.yaml, and that ticks run in this clone."""
    from al_pipeline.flows.local_server import apply_schedule
    from al_pipeline.operations.schedule import look_at_schedule

    workspace = original_workspace()
    changed = apply_schedule(workspace, take_over=True)
    found = look_at_schedule(workspace)
    if as_json:
        return print_json({"changed": changed, **found.to_json()})
    echo("Prefect was told." if changed else "Prefect knew already.")
    _print_schedule(found)


def _print_schedule(found: Standing) -> None:
    wanted = found.wanted
    echo(f"schedule: [bold]{escape(wanted.cron)}[/] {escape(wanted.timezone)}{'' if wanted.active else ', off'}")
    if found.server is None:
        return echo("The workspace's own Prefect server is not up, so nothing runs by itself: [bold]al up[/]")
    if found.deployment is None:
        return echo("[yellow]Prefect was never told of it:[/] [bold]al schedule apply[/]")
    for difference in found.differs:
        echo(f"[yellow]{escape(difference)}:[/] [bold]al schedule apply[/], or change params.yaml")
    if not found.worker:
        echo("[yellow]No worker takes the runs that are due:[/] [bold]al up[/] starts it")
    elif found.next_run:
        echo(f"next tick by itself: {format_time(wanted.timezone, found.next_run)}")


def _offer_to_prefect(workspace: Workspace) -> None:
    """Bring the schedule to the workspace's own Prefect server, if its ticks do not run in another clone."""
    from al_pipeline.flows.local_server import apply_schedule

    try:
        apply_schedule(workspace, take_over=False)
    except UsageError as error:  # that clone's ticks go on: the two share their servers
        warn(str(error))
