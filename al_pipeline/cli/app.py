"""`al`: the Typer application, its global options and groups, and the entry point. Nothing heavy is imported here."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from al_pipeline.cli import (
    data,
    drift,
    errors,
    gold,
    history,
    interventions,
    labels,
    labelstudio,
    live,
    machine,
    notify,
    quality,
    review,
    rounds,
    schema,
    serve,
    servers,
    simulate,
    stopping,
    streams,
    traffic,
    workspace,
)
from al_pipeline.cli.options import Invocation
from al_pipeline.cli.output import echo
from al_pipeline.flows.local_server import server_gone
from al_pipeline.logs import VARIABLE, Level, show
from al_pipeline.workspace.home import own_environment, restrict_umask

_WORKSPACE, _DATA, _ROUNDS, _MODEL, _SERVERS = "Workspace", "Data and labels", "Rounds", "Model", "Servers"
"""The groups of commands in `al --help`."""

READ_ONLY = frozenset(
    {
        "status",
        "rounds",
        "doctor",
        "diff",
        "log",
        "quality",
        "check-plugin",
        "predict",
        "drift",
        "workspaces",
        "watch",
    }
)
"""Commands that only show something: they fail if their output cannot be written. The exit code of any other command
says whether its work was done, even if the output was lost."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="\n\n".join(
        (
            "Active learning for text classification, in rounds: a model selects texts, people label them in Label "
            "Studio, and every round can be reproduced.",
            "To start a project: [bold]al init spam --labels ham,spam[/], then inside it [bold]al ingest "
            "mails.csv[/], [bold]al up[/] (or your own Label Studio), and [bold]al round[/] whenever people have "
            "labelled items.",
            "Exit codes: 0 success, 1 bug, 2 wrong input, 3 nothing to do, 4 workspace busy, 5 external failure (try "
            "again), 6 manual action required.",
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
        Path | None, typer.Option("--workspace", "-C", help="Workspace to work in. Default: the current folder.")
    ] = None,
    log_level: Annotated[
        Level | None,
        typer.Option(envvar=VARIABLE, case_sensitive=False, help="Show the log on standard error, from this level."),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    Invocation.folder = workspace
    if log_level is not None:
        os.environ[VARIABLE] = log_level  # for the processes that it starts, too
        show(log_level)
    Invocation.read_only = context.invoked_subcommand in READ_ONLY or not {"-h", "--help"}.isdisjoint(sys.argv)


COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    _WORKSPACE: {
        "init": workspace.init,
        "doctor": workspace.doctor,
        "upgrade": workspace.upgrade,
        "workspaces": machine.workspaces,
        "destroy": machine.destroy,
        "trust": workspace.trust,
    },
    _DATA: {
        "ingest": data.ingest,
        "export": data.export,
        "quality": quality.quality,
        "review": review.review,
        "log": history.log,
    },
    _ROUNDS: {
        "round": rounds.run_round,
        "live": live.live,
        "watch": live.watch,
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
        "drift": drift.drift,
        "serve": serve.serve,
        "certify": stopping.certify,
        "finish": stopping.finish,
        "approve": interventions.approve,
        "check-plugin": workspace.check_plugin,
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
app.add_typer(gold.app, name="gold", rich_help_panel=_DATA)
app.add_typer(schema.app, name="schema", rich_help_panel=_DATA)
app.add_typer(traffic.app, name="traffic", rich_help_panel=_MODEL)
app.add_typer(workspace.remote, name="remote", rich_help_panel=_WORKSPACE)
app.add_typer(servers.schedule, name="schedule", rich_help_panel=_SERVERS)
app.add_typer(notify.app, name="notify", rich_help_panel=_SERVERS)


def main() -> None:
    """The entry point: errors become one message and an exit code, never a traceback."""
    gc.set_threshold(50_000, 20, 20)  # imported objects stay; collecting them takes a tenth of the time
    restrict_umask()
    os.environ.update(own_environment())
    if sys.getfilesystemencoding() != "utf-8":  # libraries pass paths on as UTF-8, whatever the locale
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ)
    streams.guard()
    _leave_out_what_serves_no_command()
    Invocation.read_only = True
    code = errors.after_output(errors.run(_narrowed(_called(sys.argv[1:]))))
    if server_gone():  # Prefect's client would try for minutes to reach it
        os._exit(code)
    gc.freeze()  # no collection at exit either
    sys.exit(code)


def _called(words: Sequence[str]) -> str | None:
    """The first word that is neither a global option nor its value: the command, if the command line is valid."""
    rest = iter(words)
    for word in rest:
        name, _, value = word.partition("=")
        if name not in ("-C", "--workspace", "--log-level"):
            return word
        if not value:
            next(rest, None)
    return None


def _narrowed(name: str | None) -> typer.Typer:
    """The application with only the command or group `name`; with all of them if there is none of that name.

    Typer builds every registered command. That takes a tenth of the processor time of `al status`, and no command
    prints anything about another.
    """
    narrow = copy.copy(app)
    narrow.registered_commands = [one for one in app.registered_commands if one.name == name]
    narrow.registered_groups = [one for one in app.registered_groups if one.name == name]
    return narrow if narrow.registered_commands or narrow.registered_groups else app


def _leave_out_what_serves_no_command() -> None:
    """Keep libraries from loading what no command needs.

    These are pydantic's search for plugins, which reads the metadata of all packages even if plugins are off, and
    httpx's own command line (click, pygments and a Markdown parser), which `import httpx` loads.
    """
    if os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__") == "__all__":
        loader = sys.modules.setdefault("pydantic.plugin._loader", ModuleType("pydantic.plugin._loader"))
        loader.__dict__.setdefault("get_plugins", tuple)
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    with contextlib.suppress(ImportError):  # a typer without these internals converts all values itself
        from al_pipeline.cli.values import convert_plain_values

        convert_plain_values()


if __name__ == "__main__":
    main()
