"""Commands about the workspace itself: init, doctor, upgrade, trust, check-plugin, adopt, remote repair."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from al_pipeline.cli.options import TEST_SIZES, Invocation, Json, Yes, current_workspace, parse_list
from al_pipeline.cli.output import echo, escape, print_json, print_table
from al_pipeline.errors import BadInput, NothingToDo, UsageError

remote = typer.Typer(no_args_is_help=True, help="The DVC remote, which stores the data of every round.")


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    labels: Annotated[str, typer.Option(help="Comma-separated classes: ham,spam (as in CSV: '\"a, b\",c')")],
    question: Annotated[str | None, typer.Option(help="Question that annotators see.")] = None,
    remote: Annotated[
        str | None,
        typer.Option(
            help="DVC remote for data and models: a folder or a URL (s3://… needs al-pipeline[s3], and so on). "
            "Default: a folder of the current user."
        ),
    ] = None,
    test_size: Annotated[
        int | None,
        typer.Option(
            min=0, help=f"Items to draw at random as the test set. {TEST_SIZES} Default: 500, at most a fifth."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a workspace: a git and DVC repository for one labelling project."""
    from al_pipeline.operations.init import init as create

    workspace = create(folder, parse_list(labels, "--labels"), question, remote, test_size)
    if as_json:
        return print_json({"workspace": str(workspace.layout.root), "workspace_id": workspace.id})
    params = workspace.params
    first = params.round.seed_size + min(params.round.test_tasks, params.ingest.test_size)
    echo(f"Created the workspace [bold]{escape(workspace.layout.root)}[/]. All settings are in its params.yaml.")
    echo(
        f"From the first file, {params.ingest.test_size:,} items (at most a fifth) become the test set (--test-size). "
        f"People label {first:,} items before the first model; if you have labels already (al ingest --label-column), "
        "a model is trained at once."
    )
    echo(f"Next: [bold]cd {escape(shell_path(folder))}[/], [bold]al ingest FILE[/], [bold]al up[/], [bold]al round[/].")


def shell_path(path: Path) -> str:
    """A path as it can be typed in a shell."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def doctor(as_json: Json = False) -> None:
    """Check everything that a round needs and say how to fix what is wrong. Changes nothing."""
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
        bool, typer.Option("--replace-dvc-yaml", help="Discard your own changes in dvc.yaml (git keeps them).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upgrade the workspace to the installed version's layout, in one commit. Your values and comments are kept."""
    from al_pipeline.operations.upgrade import upgrade as run

    done = run(Invocation.folder, replace_dvc_yaml)
    if as_json:
        return print_json(asdict(done))
    if done.before == done.after:
        return echo(f"The workspace already has layout {done.after}; nothing was changed.")
    echo(f"Upgraded from layout {done.before} to {done.after}: {', '.join(done.changed)} ({done.commit[:12]}).")


def trust(
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Show how the files that control DVC were changed, and the plug-ins in use, and allow them on this machine.

    DVC runs the commands in dvc.yaml, and a build runs the plug-ins that params.yaml names. In a workspace from \
someone else, they are someone else's code.
    """
    from al_pipeline.operations.plugins import doubtful_code
    from al_pipeline.workspace.trust import accept, accept_contents, changes, doubtful

    workspace = current_workspace()
    root = workspace.layout.root
    doubts, plugins = doubtful(root), doubtful_code(workspace)
    if not doubts and not plugins:
        raise NothingToDo("the files that control DVC and the plug-ins are unchanged or already trusted")
    for name, problem in doubts.items():
        _show_code(name, problem, changes(root, name), as_json)
    for plugin in plugins:
        _show_code(plugin.name, plugin.problem, plugin.lines, as_json)
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise UsageError(
                "there is no terminal to ask for confirmation; check the lines above, then run `al trust --yes`"
            )
        if not typer.confirm("Let them be used on this machine?"):
            raise NothingToDo("nothing was trusted")
    accept(root)
    accept_contents(plugin.claim for plugin in plugins)
    if as_json:
        return print_json({"trusted": doubts | {plugin.name: plugin.problem for plugin in plugins}})
    echo("These versions are trusted on this machine; after any change you are asked again.")


def check_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="package.module:name, or the name of an entry point.")],
    strategy: Annotated[
        bool, typer.Option("--strategy", help="It is a query strategy. Default: a model, unless params.yaml says so.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a model or a query strategy of your own against what every one must do; exit code 2 if it fails.

    It runs the code that you name, on made-up data, and writes nothing. plugins.NAME is a file in the workspace.
    """
    from al_pipeline.operations.plugins import check_plugin as run
    from al_pipeline.params import PluginKind

    workspace = current_workspace()
    is_strategy = strategy or workspace.params.select.strategy == name
    kind: PluginKind = "strategy" if is_strategy else "model"
    found = run(name, kind, workspace.layout.root)
    failed = [one for one in found if not one.ok]
    if as_json:
        checks = [{"name": one.name, "ok": one.ok, "problem": one.problem} for one in found]
        print_json({"plugin": name, "kind": kind, "ok": not failed, "checks": checks})
    else:
        rows = [["pass" if one.ok else "FAIL", escape(one.name), escape(one.problem)] for one in found]
        print_table(("", "requirement", "found"), rows)
    if failed and as_json:
        raise typer.Exit(BadInput.exit_code)
    if failed:
        raise BadInput(f"{name} fails {len(failed)} of {len(found)} requirements of a {kind}; the table says which")


def _show_code(name: str, problem: str, lines: Sequence[str], as_json: bool) -> None:
    echo(f"[bold]{escape(name)}[/] {escape(problem)}{':' if lines else ''}", err=as_json)
    for line in lines:
        echo(f"    {escape(line)}", err=as_json)


def adopt(
    new_project: Annotated[
        bool,
        typer.Option(
            "--new-project", help="Replace the old project, which is lost for good: the next round creates a new one."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make this clone the only one that writes to the Label Studio project.

    A copy of a workspace folder writes nothing until it is adopted; then it has an identity of its own. Missing data \
is fetched from the DVC remote first, and all data is checked against git.
    """
    from al_pipeline.operations.connect import adopt as adopt_project
    from al_pipeline.operations.connect import leave_project

    workspace = current_workspace()
    if new_project:
        number = leave_project(workspace)
        if as_json:
            return print_json({"left_project": number})
        return echo(f"Project {number} is no longer used; [bold]al round[/] creates a new one with the open tasks.")
    done = adopt_project(workspace)
    if as_json:
        return print_json({"project_id": done.project, "new_identity": done.copy})
    if done.copy:
        echo("This copy now has an identity of its own: it is another clone of the workspace.")
    if done.project is not None:
        echo(f"Only this clone now writes to project {done.project}.")


@remote.command("repair")
def remote_repair(as_json: Json = False) -> None:
    """Upload what the DVC remote is missing or has damaged, for the last commit and every published round.

    Each object is verified by its digest before the upload, and read back. Run it in a clone that has the data.
    """
    from al_pipeline.errors import RemoteIncomplete
    from al_pipeline.operations.remote import repair_remote

    repaired = repair_remote(current_workspace())
    if as_json:
        print_json({"ok": not repaired.defects, **repaired.to_json()})
    else:
        echo(f"{repaired.sent} objects were uploaded to the DVC remote.")
    if repaired.defects and as_json:
        raise typer.Exit(RemoteIncomplete.exit_code)
    if repaired.defects:
        raise RemoteIncomplete(
            f"the DVC remote still lacks objects that this clone does not have either: {repaired.lacking}. Try a clone "
            "that has them, or a backup of the remote"
        )
