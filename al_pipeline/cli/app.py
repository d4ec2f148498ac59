"""`al`: the Typer application, its global options and groups, and the entry point. Nothing heavy is imported here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from al_pipeline.cli import (
    data,
    errors,
    history,
    interventions,
    labels,
    labelstudio,
    rounds,
    servers,
    simulate,
    streams,
    workspace,
)
from al_pipeline.cli.options import Invocation
from al_pipeline.cli.output import echo
from al_pipeline.flows.local_server import server_gone
from al_pipeline.workspace.home import own_environment, restrict_umask

_WORKSPACE, _DATA, _ROUNDS, _MODEL, _SERVERS = "Workspace", "Data and labels", "Rounds", "Model", "Servers"
"""The groups of commands in `al --help`."""

READ_ONLY = frozenset({"status", "rounds", "doctor", "diff", "log", "predict", "workspaces"})
"""Commands whose output is all that they do. Of the others the exit code speaks of what was done, whether or not
somebody could be told of it."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="\n\n".join(
        (
            "Active learning in rounds: the model asks, people answer in Label Studio, every round can be made again.",
            "A project from nothing: [bold]al init spam --labels ham,spam[/], then inside it [bold]al ingest "
            "mails.csv[/], [bold]al up[/] (or your own Label Studio), and [bold]al round[/] whenever people have "
            "answered.",
            "Exit codes: 0 done, 1 a bug, 2 wrong input, 3 nothing to do, 4 the workspace is busy, 5 something outside "
            "failed (try again), 6 a person must look first.",
        )
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        echo(f"al {version('al-pipeline')}")
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    workspace: Annotated[
        Path | None, typer.Option("--workspace", "-C", help="Work in this workspace instead of the current folder.")
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    Invocation.folder = workspace
    Invocation.read_only = context.invoked_subcommand in READ_ONLY or not {"-h", "--help"}.isdisjoint(sys.argv)


COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    _WORKSPACE: {
        "init": workspace.init,
        "doctor": workspace.doctor,
        "upgrade": workspace.upgrade,
        "workspaces": workspace.workspaces,
        "destroy": workspace.destroy,
        "trust": workspace.trust,
    },
    _DATA: {
        "ingest": data.ingest,
        "export": data.export,
        "log": history.log,
    },
    _ROUNDS: {
        "round": rounds.run_round,
        "status": rounds.status,
        "rounds": rounds.rounds,
        "report": rounds.report,
        "reproduce": history.reproduce,
        "diff": history.diff,
        "rollback": interventions.rollback,
        "ask": interventions.ask,
        "pause": interventions.pause,
        "resume": interventions.resume,
    },
    _MODEL: {
        "simulate": simulate.simulate,
        "predict": data.predict,
        "approve": interventions.approve,
    },
    _SERVERS: {
        "up": servers.up,
        "down": servers.down,
        "adopt": workspace.adopt,
    },
}
"""The commands by group, as `al --help` lists them; commands with commands of their own follow."""

for group, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=group)(command)

app.add_typer(labelstudio.app, name="labelstudio", rich_help_panel=_SERVERS)
app.add_typer(labels.app, name="labels", rich_help_panel=_DATA)
app.add_typer(workspace.remote, name="remote", rich_help_panel=_WORKSPACE)
app.add_typer(servers.schedule, name="schedule", rich_help_panel=_SERVERS)


def main() -> None:
    """The entry point: errors become one message and an exit code, never a traceback."""
    restrict_umask()
    os.environ.update(own_environment())
    if sys.getfilesystemencoding() != "utf-8":  # a locale of another encoding: libraries hand paths on as UTF-8
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ)
    streams.guard()
    # What costs every command time and serves none: pydantic's search for plugins, and httpx's own command line, which
    # loads click, pygments and a Markdown parser wherever httpx is used.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    Invocation.read_only = True
    code = errors.after_output(errors.run(app))
    if server_gone():  # Prefect's client would try for minutes to reach it
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
