"""Commands about the servers on this machine and the schedule of ticks: up, down, schedule."""

from __future__ import annotations

from collections.abc import Callable
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
    """Start what is missing on this machine: Label Studio, a Prefect server, the worker that runs scheduled ticks; \
`al live` if `live.enabled` is set in params.yaml.

    Safe to repeat: running services are left alone; one that was killed restarts at its old address with its data.
    """
    from al_pipeline.operations.schedule import read_schedule
    from al_pipeline.servers import label_studio_elsewhere, password_file, services

    workspace = original_workspace()
    _ = workspace.params  # an error in it is reported before anything starts
    workspace.make_home()
    elsewhere = label_studio_elsewhere(workspace)
    with spinner(not as_json) as on_progress:
        studio, prefect = _start_missing(workspace, elsewhere, on_progress)
    rows, found = services(workspace), read_schedule(workspace)
    page = _live_page(workspace)
    if as_json:
        addresses = {"label_studio_url": studio, "prefect_url": prefect, **({"live_page": page} if page else {})}
        return print_json({**addresses, "services": [row.to_json() for row in rows], "schedule": found.to_json()})
    print_table(
        ("service", "state", "address", "process", "log"),
        [[row.service, row.state, row.address, str(row.pid or ""), row.log or ""] for row in rows],
    )
    echo(f"[dim]logs are in {escape(workspace.home)}[/]")
    if not elsewhere:
        print_login(workspace, studio)
    echo(f"Prefect's password is in {escape(password_file(workspace))}, readable only by you")
    if page:
        echo(f"What `al live` learns: {escape(page)} (its token is secret)")
    _print_schedule(found)


def _live_page(workspace: Workspace) -> str | None:
    """The address of the page of `al live`; None if it does not run."""
    if not workspace.params.live.enabled:
        return None
    from al_pipeline.live.page import address_of, token_of
    from al_pipeline.servers import live_status

    found = live_status(workspace)
    return None if found is None else address_of(found.url, token_of(workspace))


def _start_missing(workspace: Workspace, elsewhere: str | None, on_progress: Callable[[str], None]) -> tuple[str, str]:
    """Start what is not running, except Label Studio if it is `elsewhere`; returns the addresses of both servers."""
    from al_pipeline.servers import (
        prefect_status,
        start_label_studio,
        start_live,
        start_prefect,
        start_worker,
        stop_live,
    )

    studio = elsewhere or start_label_studio(workspace, on_progress).url
    prefect = prefect_status(workspace) or start_prefect(workspace, on_progress)
    on_progress("applying the schedule in Prefect")
    _apply_unless_elsewhere(workspace)
    start_worker(workspace, on_progress)
    if workspace.params.live.enabled:
        start_live(workspace, on_progress)
    else:
        stop_live(workspace)
    return studio, prefect.url


def down(as_json: Json = False) -> None:
    """Stop what `al up` started, and a scheduled tick that is running; the next tick finishes its work."""
    from al_pipeline.servers import stop_label_studio, stop_live, stop_prefect, stop_worker

    workspace = original_workspace()
    stopped = {}
    stops = (("worker", stop_worker), ("Prefect", stop_prefect), ("Label Studio", stop_label_studio))
    for name, stop in (("live", stop_live), *stops):
        stopped[name] = stop(workspace)
        if name == "live" and not stopped[name]:
            del stopped[name]  # few workspaces have it
        elif not as_json:
            echo(f"{name}: {'stopped' if stopped[name] else 'was not running'}")
    if as_json:
        print_json({"stopped": stopped})


@schedule.callback(invoke_without_command=True)
def show_or_change_schedule(
    context: typer.Context,
    cron: Annotated[
        str | None,
        typer.Option(
            metavar="CRON", help="Minute, hour, day of the month, month, day of the week: '*/30 8-18 * * 1-5'"
        ),
    ] = None,
    timezone: Annotated[str | None, typer.Option(metavar="ZONE", help="Time zone, such as Europe/Berlin.")] = None,
    active: Annotated[bool | None, typer.Option("--on/--off", help="Turn scheduled ticks on or off.")] = None,
    as_json: Json = False,
) -> None:
    """Show the schedule of ticks, or change it in params.yaml and in the workspace's Prefect server.

    The change is committed if params.yaml has no other uncommitted changes.
    """
    if context.invoked_subcommand is not None:
        return
    from al_pipeline.operations.schedule import change_schedule, read_schedule
    from al_pipeline.servers import prefect_status

    changes = (cron, timezone, active) != (None, None, None)
    workspace = original_workspace() if changes else current_workspace()
    if changes:
        before = workspace.layout.params.read_bytes()
        committed = change_schedule(workspace, cron, timezone, active)
        changed = before != workspace.layout.params.read_bytes()
        if not as_json:
            done = "and committed" if committed else "but not committed with its other changes; the next round does"
            echo(f"params.yaml was changed, {done}." if changed else "params.yaml already has this schedule.")
        workspace = current_workspace()
        if prefect_status(workspace):
            _apply_unless_elsewhere(workspace)
    found = read_schedule(workspace)
    if as_json:
        return print_json(found.to_json())
    _print_schedule(found)


@schedule.command("apply")
def apply(as_json: Json = False) -> None:
    """Apply the schedule in params.yaml to the workspace's Prefect server, and run its ticks in this clone."""
    from al_pipeline.flows.local_server import apply_schedule
    from al_pipeline.operations.schedule import read_schedule

    workspace = original_workspace()
    changed = apply_schedule(workspace, take_over=True)
    found = read_schedule(workspace)
    if as_json:
        return print_json({"changed": changed, **found.to_json()})
    echo("The schedule was applied." if changed else "Prefect already has this schedule.")
    _print_schedule(found)


def _print_schedule(found: Standing) -> None:
    wanted = found.wanted
    echo(f"schedule: [bold]{escape(wanted.cron)}[/] {escape(wanted.timezone)}{'' if wanted.active else ', off'}")
    if found.server is None:
        return echo(
            "The workspace's Prefect server is not up, and neither PREFECT_API_URL nor Prefect's active profile names "
            "another, so no tick is scheduled: [bold]al up[/]"
        )
    if found.elsewhere:
        echo(f"on the Prefect server {escape(found.server)}, by {escape(found.source)}")
    if found.problem:
        return echo(f"[yellow]It is not known whether ticks run:[/] {escape(found.problem)}")
    if found.deployment is None:
        return echo(f"[yellow]The schedule was never applied:[/] {escape(found.fix)}")
    for difference in found.differs:
        echo(f"[yellow]{escape(difference)}:[/] {escape(found.fix)}, or change params.yaml")
    if not found.worker:
        echo(f"[yellow]No worker picks up scheduled ticks:[/] {escape(found.start_worker)} starts it")
    elif found.next_run:
        echo(f"next scheduled tick: {format_time(wanted.timezone, found.next_run)}")


def _apply_unless_elsewhere(workspace: Workspace) -> None:
    """Apply the schedule in the workspace's Prefect server, unless its ticks run in another clone."""
    from al_pipeline.flows.local_server import apply_schedule

    try:
        apply_schedule(workspace, take_over=False)
    except UsageError as error:  # the other clone keeps its ticks: the two share their servers
        warn(str(error))
