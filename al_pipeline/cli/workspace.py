"""Commands about the workspace itself: make it, check it, upgrade it, trust it, adopt it, remove it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import DryRun, Invocation, Json, current_workspace, parse_list
from al_pipeline.cli.output import echo, escape, format_size, print_json, print_table, spinner
from al_pipeline.errors import NothingToDo, UsageError

if TYPE_CHECKING:
    from al_pipeline.operations.machine import Destruction

remote = typer.Typer(no_args_is_help=True, help="The DVC remote, where the data of every round are kept.")


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    labels: Annotated[str, typer.Option(help="The classes, divided by commas: ham,spam (as in CSV: '\"a, b\",c')")],
    question: Annotated[str | None, typer.Option(help="What annotators are asked.")] = None,
    remote: Annotated[
        str | None,
        typer.Option(
            help="Where DVC keeps data and models: a folder, or an address (s3://… needs al-pipeline[s3], and so on). "
            "Default: a folder of this user."
        ),
    ] = None,
    test_size: Annotated[
        int | None,
        typer.Option(min=0, help="Items set aside at random to measure on. Default: 500, at most a fifth."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a workspace: a git and DVC repository that holds one labelling project."""
    from al_pipeline.operations.init import init as make

    workspace = make(folder, parse_list(labels, "--labels"), question, remote, test_size)
    if as_json:
        return print_json({"workspace": str(workspace.layout.root), "workspace_id": workspace.id})
    asked = workspace.params
    echo(f"Made the workspace [bold]{escape(workspace.layout.root)}[/]. Every knob is in its params.yaml.")
    echo(
        f"The first file brings a test set of {asked.ingest.test_size:,} items, at most a fifth (--test-size). Before "
        f"the first model people label {asked.round.seed_size + min(asked.round.test_tasks, asked.ingest.test_size):,} "
        "items; labels that you have already (al ingest --label-column) make a model at once."
    )
    echo(f"Next: [bold]cd {escape(shell_path(folder))}[/], [bold]al ingest FILE[/], [bold]al up[/], [bold]al round[/].")


def shell_path(path: Path) -> str:
    """A path as a shell takes it."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def doctor(as_json: Json = False) -> None:
    """Check everything that a round needs, and say how to fix what is wrong. Changes nothing."""
    from al_pipeline.operations.doctor import examine

    findings = examine(current_workspace())
    broken = [finding for finding in findings if finding.level == "error"]
    if as_json:
        print_json({"ok": not broken, "findings": [finding.to_row() for finding in findings]})
    else:
        marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}
        for finding in findings:
            echo(f"{marks[finding.level]} [bold]{finding.check}[/]: {escape(finding.message)}")
            if finding.fix:
                echo(f"    → {escape(finding.fix)}")
    if broken:
        raise typer.Exit(6)


def upgrade(
    replace_dvc_yaml: Annotated[
        bool, typer.Option("--replace-dvc-yaml", help="Give up changes of your own in dvc.yaml (git keeps them).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Carry the workspace to this engine's layout, in one commit. Your values and comments stay."""
    from al_pipeline.operations.upgrade import upgrade as run

    done = run(Invocation.folder, replace_dvc_yaml)
    if as_json:
        return print_json(asdict(done))
    if done.before == done.after:
        return echo(f"The workspace has layout {done.after} already; nothing was changed.")
    echo(f"Carried from layout {done.before} to {done.after}: {', '.join(done.changed)} ({done.commit[:12]}).")


def trust(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; needed where nobody is there to answer.")] = False,
    as_json: Json = False,
) -> None:
    """Show what differs in the files that steer DVC, and let DVC use them as they are on this machine.

    DVC runs the commands of dvc.yaml. In a workspace that came from somebody else they are somebody else's program.
    """
    from al_pipeline.workspace.trust import accept, changes, doubtful

    root = current_workspace().layout.root
    doubts = doubtful(root)
    if not doubts:
        raise NothingToDo("the files that steer DVC are this engine's own, or trusted already")
    for name, problem in doubts.items():
        echo(f"[bold]{escape(name)}[/] {escape(problem)}:", err=as_json)
        for line in changes(root, name):
            echo(f"    {escape(line)}", err=as_json)
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise UsageError("nobody is here to ask; look at the lines above, then `al trust --yes`")
        if not typer.confirm("Let DVC use them on this machine?"):
            raise NothingToDo("nothing was trusted")
    accept(root)
    if as_json:
        return print_json({"trusted": doubts})
    echo("Trusted on this machine, as they are now; a change asks again.")


def adopt(
    new_project: Annotated[
        bool,
        typer.Option("--new-project", help="The project is gone for good: the next round makes a new one."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make this clone the one that writes to the Label Studio project; the other clones become read-only towards it.

    A copy of a workspace's folder, which writes nothing before, gets an identity of its own by it. Data that it \
lacks are fetched from the DVC remote first, and all are compared with git's records.
    """
    from al_pipeline.operations.connect import adopt as take
    from al_pipeline.operations.connect import leave_project

    workspace = current_workspace()
    if new_project:
        number = leave_project(workspace)
        if as_json:
            return print_json({"left_project": number})
        return echo(f"Project {number} is left; [bold]al round[/] makes a new one and asks again what is open.")
    done = take(workspace)
    if as_json:
        return print_json({"project_id": done.project, "copy": done.copy})
    if done.copy:
        echo("This copy has an identity of its own now: it is another clone of the workspace.")
    if done.project is not None:
        echo(f"This clone now writes to project {done.project}; the other clones are read-only towards it.")


def workspaces(as_json: Json = False) -> None:
    """List what workspaces left on this machine: servers, databases, caches, credentials. `al destroy` removes it."""
    from al_pipeline.operations.machine import workspaces as look
    from al_pipeline.workspace.home import al_home

    found = [left.to_json() for left in look()]
    if as_json:
        return print_json({"home": str(al_home()), "workspaces": found})
    if not found:
        return echo(f"No workspace left anything in {escape(al_home())}.")
    print_table(
        ("name", "id", "state", "size", "servers", "path"),
        [
            [
                row["name"] or "?",
                row["workspace_id"],
                row["state"],
                "–" if row["bytes"] is None else format_size(row["bytes"]),
                ", ".join(
                    f"{one['service']} {one['address'].rpartition('//')[2]}".strip()
                    for one in row["services"]
                    if one["state"] == "running"
                ),
                row["problem"] or row["path"] or "unknown until its next `al round`",
            ]
            for row in found
        ],
    )
    echo(f"[dim]in {escape(al_home())}; `al destroy ID` removes what one of them left[/]")


def destroy(
    wanted: Annotated[
        str | None,
        typer.Argument(
            metavar="WORKSPACE", help="Id, path or name, as in `al workspaces`. Default: the one around you."
        ),
    ] = None,
    with_folder: Annotated[
        bool, typer.Option("--with-folder", help="The workspace's folder too, and the data of its rounds.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Even where answers that were not pulled are lost.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; needed where nobody is there to answer.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove what a workspace left on this machine: servers, their databases, caches, credentials, the schedule.

    The workspace's folder stays, with git and DVC and the data of its rounds, unless --with-folder is given. Works \
for a workspace whose folder is gone. Safe to interrupt and repeat.
    """
    from al_pipeline.operations.machine import destroy as remove
    from al_pipeline.operations.machine import find, plan

    left = find(wanted, Invocation.folder)
    planned = plan(left, with_folder)
    if not as_json:
        _print_destruction(planned)
    if dry_run:
        return print_json({**planned.to_json(), "dry_run": True}) if as_json else echo("Nothing was changed.")
    if planned.goes and not yes and (force or not planned.losses):
        if as_json or not sys.stdin.isatty():
            raise UsageError("nobody is here to ask; `--dry-run` shows what goes, `--yes` removes it")
        if not typer.confirm("Remove it for good?"):
            raise NothingToDo("nothing was removed")
    with spinner(not as_json) as say:
        done = remove(left, with_folder, force, say)
    if as_json:
        return print_json({**done.to_json(), "dry_run": False})
    echo(f"Removed {format_size(sum(size for _, _, size in done.goes))}.")
    if left.present and not with_folder and any(Path(path).name == "label-studio" for path, _, _ in done.goes):
        echo("To go on with the workspace: [bold]al up[/], then [bold]al adopt --new-project[/].")


def _print_destruction(planned: Destruction) -> None:
    named = f"{planned.left.name} ({planned.left.workspace_id})" if planned.left.name else planned.left.workspace_id
    echo(f"[bold]{escape(named)}[/], {planned.left.state}")
    if planned.left.state == "gone":
        places = ", ".join(map(str, planned.left.places))
        echo(f"[yellow]Its folder is not at {escape(places)}:[/] deleted, moved, or on a disk that is not mounted?")
    for path, what, size in planned.goes:
        echo(f"[red]goes[/]   {escape(path)}: {escape(what)}, {format_size(size)}")
    for path, what in planned.stays:
        echo(f"[green]stays[/]  {escape(path)}: {escape(what)}")
    for loss in planned.losses:
        echo(f"[yellow]lost for good:[/] {escape(loss)}")


@remote.command("repair")
def remote_repair(as_json: Json = False) -> None:
    """Send the DVC remote what it lacks, or holds other bytes of, of the last commit and of every published round.

    Each object is proved by its digest before it is sent, and read back. Run it in a clone that has the data.
    """
    from al_pipeline.errors import RemoteIncomplete
    from al_pipeline.integrations.dvc.session import told
    from al_pipeline.operations.remote import repair_remote

    repaired = repair_remote(current_workspace())
    if as_json:
        print_json({"ok": not repaired.wrong, **repaired.to_json()})
    else:
        echo(f"{repaired.sent} objects were sent to the DVC remote.")
    if repaired.wrong and as_json:
        raise typer.Exit(RemoteIncomplete.exit_code)
    if repaired.wrong:
        raise RemoteIncomplete(
            f"the DVC remote still lacks what this clone does not have either: {told(repaired.wrong)}. Try a clone "
            "that "
            "has it, or a backup of the remote"
        )
