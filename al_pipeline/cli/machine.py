"""Commands about what workspaces store on this machine: list it, remove it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from al_pipeline.cli.options import DryRun, Invocation, Json, Yes
from al_pipeline.cli.output import echo, escape, print_json, print_table, spinner
from al_pipeline.errors import NothingToDo, UsageError
from al_pipeline.quantities import format_size

if TYPE_CHECKING:
    from al_pipeline.operations.machine import Destruction


def workspaces(as_json: Json = False) -> None:
    """List what workspaces store on this machine: servers, databases, caches, credentials. `al destroy` removes it."""
    from al_pipeline.operations.machine import workspaces as list_workspaces
    from al_pipeline.workspace.home import al_home

    found = [left.to_json() for left in list_workspaces()]
    if as_json:
        return print_json({"home": str(al_home()), "workspaces": found})
    if not found:
        return echo(f"No workspace stores anything in {escape(al_home())}.")
    print_table(
        ("name", "id", "state", "size", "servers", "path"),
        [_workspace_row(row) for row in found],
    )
    echo(f"[dim]in {escape(al_home())}; `al destroy ID` removes what a workspace stores there[/]")


def _workspace_row(row: dict[str, Any]) -> list[str]:
    running = [
        f"{one['service']} {one['address'].rpartition('//')[2]}".strip()
        for one in row["services"]
        if one["state"] == "running"
    ]
    return [
        row["name"] or "?",
        row["workspace_id"],
        row["state"],
        "–" if row["bytes"] is None else format_size(row["bytes"]),
        ", ".join(running),
        row["problem"] or row["path"] or "unknown until its next `al round`",
    ]


def destroy(
    wanted: Annotated[
        str | None,
        typer.Argument(metavar="WORKSPACE", help="Id, path or name, as in `al workspaces`. Default: the current one."),
    ] = None,
    with_folder: Annotated[
        bool, typer.Option("--with-folder", help="Delete the workspace's folder too, with the data of its rounds.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Continue even if answers that were not pulled are lost.")
    ] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove what a workspace stores on this machine: servers, databases, caches, credentials, the schedule.

    The workspace's folder, with git, DVC and the data of its rounds, is kept unless --with-folder is given. Works for \
a workspace whose folder is gone. Safe to interrupt and to repeat.
    """
    from al_pipeline.operations.machine import destroy as remove
    from al_pipeline.operations.machine import find, plan

    left = find(wanted, Invocation.folder)
    planned = plan(left, with_folder)
    if not as_json:
        _print_destruction(planned)
    if dry_run:
        return print_json({**planned.to_json(), "dry_run": True}) if as_json else echo("Nothing was changed.")
    if planned.removed and not yes and (force or not planned.losses):
        if as_json or not sys.stdin.isatty():
            raise UsageError(
                "there is no terminal to ask for confirmation; `--dry-run` shows what would be removed, `--yes` "
                "removes it"
            )
        if not typer.confirm("Remove it permanently?"):
            raise NothingToDo("nothing was removed")
    with spinner(not as_json) as on_progress:
        done = remove(left, with_folder, force, on_progress)
    if as_json:
        return print_json({**done.to_json(), "dry_run": False})
    echo(f"Removed {format_size(sum(size for _, _, size in done.removed))}.")
    if left.present and not with_folder and any(Path(path).name == "label-studio" for path, _, _ in done.removed):
        echo("To continue with the workspace: [bold]al up[/], then [bold]al adopt --new-project[/].")


def _print_destruction(planned: Destruction) -> None:
    named = f"{planned.left.name} ({planned.left.workspace_id})" if planned.left.name else planned.left.workspace_id
    echo(f"[bold]{escape(named)}[/], {planned.left.state}")
    if planned.left.state == "gone":
        places = ", ".join(map(str, planned.left.places))
        echo(f"[yellow]Its folder is not at {escape(places)}:[/] deleted, moved, or on a disk that is not mounted?")
    for path, what, size in planned.removed:
        echo(f"[red]remove[/] {escape(path)}: {escape(what)}, {format_size(size)}")
    for path, what in planned.kept:
        echo(f"[green]keep[/]   {escape(path)}: {escape(what)}")
    for loss in planned.losses:
        echo(f"[yellow]permanently lost:[/] {escape(loss)}")
