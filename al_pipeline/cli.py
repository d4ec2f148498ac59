"""`al`: parses, calls one operation, prints. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from al_pipeline.errors import AlError, NothingToDo, UsageError, WorldError
from al_pipeline.plain import printable

if TYPE_CHECKING:
    from al_pipeline.operations.tick import TickReport
    from al_pipeline.workspace import Workspace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
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
labelstudio = typer.Typer(
    no_args_is_help=True,
    help="A Label Studio on this machine for those who have none of their own, or the address of yours.",
)
app.add_typer(labelstudio, name="labelstudio")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


class _Chosen:
    """Where `al` works: the folder that `-C` names, else the current one."""

    folder: Path | None = None


@app.callback()
def _main(
    workspace: Annotated[
        Path | None, typer.Option("--workspace", "-C", help="Work in this workspace instead of the current folder.")
    ] = None,
) -> None:
    _Chosen.folder = workspace


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    labels: Annotated[str, typer.Option(help="The classes, divided by commas: ham,spam")],
    question: Annotated[str | None, typer.Option(help="What annotators are asked.")] = None,
    remote: Annotated[
        str | None,
        typer.Option(
            help="Where DVC keeps data and models (s3://…, ssh://…, a folder). Default: a folder of this user."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a workspace: a git and DVC repository that holds one labelling project."""
    from al_pipeline.operations.init import init as make

    workspace = make(folder, [label.strip() for label in labels.split(",")], question, remote)
    if as_json:
        return _print_json({"workspace": str(workspace.layout.root), "workspace_id": workspace.id})
    _say(f"Made the workspace [bold]{_safe(workspace.layout.root)}[/]. Every knob is in its params.yaml.")
    _say(f"Next: [bold]cd {_safe(folder)}[/], [bold]al ingest FILE[/], [bold]al up[/], [bold]al round[/].")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check everything that a round needs, and say how to mend what is wrong. Changes nothing."""
    from al_pipeline.operations.doctor import examine

    findings = examine(_workspace())
    broken = [finding for finding in findings if finding.level == "error"]
    if as_json:
        _print_json({"ok": not broken, "findings": [finding.to_row() for finding in findings]})
    else:
        marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}
        for finding in findings:
            _say(f"{marks[finding.level]} [bold]{finding.check}[/]: {_safe(finding.message)}")
            if finding.mend:
                _say(f"    → {_safe(finding.mend)}")
    if broken:
        raise typer.Exit(6)


@app.command()
def ingest(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="CSV, JSONL or Parquet.")],
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Your ids. Default: `id`, if there is such a column.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Labels that you already have.")] = None,
    test: Annotated[
        bool, typer.Option("--test", help="These items are the test set: measured on, never asked.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add items to the pool. What is there already is not added twice; a bad row goes to a rejects file."""
    from al_pipeline.lock import locked
    from al_pipeline.operations.ingest import ingest as take

    workspace = _workspace()
    with _progress("reading", not as_json) as advance, locked(workspace.layout.lock, "al ingest"):
        report = take(
            workspace,
            files,
            text_column=text_column,
            id_column=id_column,
            label_column=label_column,
            test=test,
            progress=advance,
        )
    if as_json:
        return _print_json(report.to_json())
    for line in report.lines():
        _say(_safe(line))


@app.command(name="round")
def round_(
    close_now: Annotated[
        bool, typer.Option("--close-now", help="Close the open round with the answers there are.")
    ] = False,
    accept_vanished: Annotated[
        bool, typer.Option("--accept-vanished", help="Believe Label Studio although many answers vanished.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run one tick: pull answers, close and build the round if it is full, push the next questions.

    Safe to repeat and to interrupt. Runs as a flow where the workspace's Prefect server is up, else in this process.
    """
    from al_pipeline.servers import prefect_environment

    workspace = _workspace()
    environment = prefect_environment(workspace)
    say = _whisper if as_json else lambda line: _say(f"[dim]{_safe(line)}[/]", err=True)
    if environment:
        report = _round_as_flow(workspace, environment, close_now, accept_vanished, say)
    else:
        from al_pipeline.operations.connect import connect
        from al_pipeline.operations.tick import Options, tick

        say("the workspace's Prefect server is not up: the round runs in this process")
        report = tick(workspace, lambda: connect(workspace), options=Options(close_now, accept_vanished), say=say)
    if as_json:
        from dataclasses import asdict

        seconds: dict[str, float] = {}
        for name, took in report.steps:  # a tick that publishes pushes twice
            seconds[name] = seconds.get(name, 0.0) + took
        return _print_json(asdict(report) | {"steps": seconds})
    for number in report.published:
        _say(f"[green]Published round-{number:04d}.[/] [bold]al report[/] shows it.")
    for reason, count in report.refused.items():
        _say(f"[yellow]Refused {count}:[/] {_safe(reason)}")
    for warning in report.warnings:
        _say(f"[yellow]{_safe(warning)}[/]")
    where = "No round is open" if report.round is None else f"Round {report.round} is {report.state}"
    _say(f"{where}: {_safe(report.waits_for)}.")


@app.command()
def status(as_json: Json = False) -> None:
    """Show the round, how much is labelled, what was refused and why, and what comes next."""
    from al_pipeline.operations.status import status as read

    found = read(_workspace())
    if as_json:
        return _print_json(found)
    number = "no round yet" if found["round"] is None else f"round {found['round']}"
    _say(
        f"[bold]{number}[/], {found['state']}"
        + (f": {found['settled']} of {found['tasks']} tasks settled" if found["tasks"] else "")
    )
    _table(
        ("pool", "labelled", "pending", "ignored", "unlabelled", "test set", "labelled of it"),
        [[f"{found[k]:,}" for k in ("pool", "labelled", "pending", "ignored", "unlabelled", "test", "test_labelled")]],
    )
    if found["labels"]:
        _say("labels: " + ", ".join(f"{_safe(name)} {count:,}" for name, count in found["labels"].items()))
    if found["promoted"]:
        score = found["metrics"].get("macro_f1")
        _say(
            f"promoted model: [bold]{found['promoted']}[/]"
            + (f"; latest macro-F1 {score:.3f}" if score is not None else "")
        )
    for reason, count in found["refused"].items():
        _say(f"[yellow]refused {count}:[/] {_safe(reason)}")
    if found["busy"]:
        _say(
            f"[yellow]busy:[/] {_safe(found['busy'].get('purpose', ''))} since {_safe(found['busy'].get('since', ''))}"
        )
    for name, url in (("Label Studio", found["label_studio_url"]), ("Prefect", found["prefect_url"])):
        if url:
            _say(f"{name}: {_safe(url)}")
    _say(f"next: {_safe(found['next'])}")


@app.command()
def rounds(as_json: Json = False) -> None:
    """List the published rounds with their metrics and decisions."""
    from al_pipeline.operations.status import rounds as read

    found = read(_workspace())
    if as_json:
        return _print_json({"rounds": found})

    def figure(row: dict[str, Any], name: str) -> str:
        estimate = row["metrics"][name]
        if estimate["value"] is None:
            return "–"
        return f"{estimate['value']:.3f} ({estimate['low']:.3f}–{estimate['high']:.3f})"

    _table(
        ("round", "labelled", "macro-F1", "accuracy", "average precision", "decision"),
        [
            [
                str(row["round"]),
                f"{row['labelled']:,}",
                *(figure(row, n) for n in ("macro_f1", "accuracy", "average_precision")),
                row["verdict"],
            ]
            for row in found
        ],
    )


@app.command()
def report(
    number: Annotated[str | None, typer.Argument(metavar="ROUND", help="7 or round-0007. Default: the latest.")] = None,
    as_json: Json = False,
) -> None:
    """Render a round's report: one HTML page that opens offline."""
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.report import write_report

    path = write_report(_workspace(), None if number is None else round_number(number))
    if as_json:
        return _print_json({"report": str(path)})
    _say(f"Report: [bold]{_safe(path)}[/]")


@app.command()
def predict(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, JSONL or Parquet with the texts.")],
    number: Annotated[
        str | None, typer.Option("--round", help="Take this round's model, not the promoted one.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Your ids. Default: `id`, if there is such a column.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write here instead of standard output.")] = None,
) -> None:
    """Predict with the promoted model. Writes one JSON object a row: id, label, probability, probabilities."""
    from al_pipeline.files import json_line, replacing
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.predict import predict as run
    from al_pipeline.operations.predict import read_texts

    workspace = _workspace()
    rows = run(
        workspace, read_texts(file, text_column, id_column, _warn), None if number is None else round_number(number)
    )
    if out is None:
        for row in rows:
            _write_json(json_line(row), sys.stdout)
        return
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as target:
        for row in rows:
            _write_json(json_line(row), target)


@app.command()
def up(as_json: Json = False) -> None:
    """Start the workspace's own Label Studio and Prefect server on this machine, where they are not running."""
    from al_pipeline.servers import password_file, start_label_studio, start_prefect

    workspace = _workspace()
    with _waiting(not as_json) as say:
        studio = start_label_studio(workspace, say)
        prefect = start_prefect(workspace, say)
    if as_json:
        return _print_json({"label_studio_url": studio.url, "prefect_url": prefect.url})
    _login(workspace, studio.url)
    _say(f"Prefect: [bold]{prefect.url}[/]")
    _say(f"    its page asks for what stands in {_safe(password_file(workspace))}, readable by you alone")


@app.command()
def down() -> None:
    """Stop the workspace's own Label Studio and Prefect server."""
    from al_pipeline.servers import stop_label_studio, stop_prefect

    workspace = _workspace()
    for name, stop in (("Prefect", stop_prefect), ("Label Studio", stop_label_studio)):
        _say(f"{name}: {'stopped' if stop(workspace) else 'was not running'}")


@app.command()
def trust(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; needed where nobody is there to answer.")] = False,
) -> None:
    """Show what differs in the files that steer DVC, and let DVC use them as they are on this machine.

    DVC runs the commands of dvc.yaml. In a workspace that came from somebody else they are somebody else's program.
    """
    from al_pipeline.trust import accept, changes, doubtful

    root = _workspace().layout.root
    doubts = doubtful(root)
    if not doubts:
        raise NothingToDo("the files that steer DVC are this engine's own, or trusted already")
    for name, problem in doubts.items():
        _say(f"[bold]{_safe(name)}[/] {_safe(problem)}:")
        for line in changes(root, name):
            _say(f"    {_safe(line)}")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody is here to ask; look at the lines above, then `al trust --yes`")
        if not typer.confirm("Let DVC use them on this machine?"):
            raise NothingToDo("nothing was trusted")
    accept(root)
    _say("Trusted on this machine, as they are now; a change asks again.")


@app.command()
def adopt() -> None:
    """Make this clone the one that writes to the Label Studio project; the other clones become read-only towards it."""
    from al_pipeline.operations.connect import connect, stored_project

    workspace = _workspace()
    known = stored_project(workspace.layout)
    if known is None:
        raise NothingToDo("there is no project yet; `al round` makes one")
    connect(workspace).adopt(known, workspace.id, workspace.clone_id)
    _say(f"This clone now writes to project {known.project_id}.")


@labelstudio.command("start")
def labelstudio_start(as_json: Json = False) -> None:
    """Start Label Studio for this workspace (the first start installs it, a few minutes)."""
    from al_pipeline.servers import start_label_studio

    workspace = _workspace()
    with _waiting(not as_json) as say:
        studio = start_label_studio(workspace, say)
    if as_json:
        return _print_json({"label_studio_url": studio.url})
    _login(workspace, studio.url)


@labelstudio.command("stop")
def labelstudio_stop() -> None:
    """Stop this workspace's Label Studio; everything in it is kept."""
    from al_pipeline.servers import stop_label_studio

    _say("Stopped." if stop_label_studio(_workspace()) else "It was not running.")


@labelstudio.command("invite")
def labelstudio_invite(email: Annotated[str, typer.Argument(metavar="EMAIL")], as_json: Json = False) -> None:
    """Make an account for an annotator and print its password, once."""
    from al_pipeline.servers import invite

    workspace = _workspace()
    invited = invite(workspace, email)
    if as_json:
        return _print_json({"email": email, "password": invited.password, "token": invited.token})
    url = _safe(workspace.credentials().get("url", ""))
    _say(f"{_safe(email)} can log in at {url} with the password {_safe(invited.password)}")


@labelstudio.command("connect")
def labelstudio_connect(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Your own Label Studio, such as https://labels.example.org")
    ],
) -> None:
    """Use your own Label Studio. The token is read from AL_LABEL_STUDIO_TOKEN, else from standard input."""
    from al_pipeline.operations.connect import connect_to

    workspace = _workspace()
    about = connect_to(workspace, url, os.environ.get("AL_LABEL_STUDIO_TOKEN") or _read_token())
    _say(f"Connected to {_safe(url)} (Label Studio {_safe(about.version)}) as {_safe(about.user)}.")
    _say(f"The token lies in {_safe(workspace.credentials_file)}, readable by you alone.")


_MENDABLE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "mend its rights",
    errno.EPERM: "mend its rights",
    errno.EIO: "look after the disk",
    errno.EISDIR: "a folder lies where a file belongs, move it away",
    errno.ENOTDIR: "a file lies where a folder belongs, move it away",
    errno.ELOOP: "links lead round in a circle, mend them",
    errno.ENAMETOOLONG: "give a shorter name",
}
"""Errors of the operating system that are the machine's and not ours, and how to mend them."""

_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main() -> None:
    """The entry point: errors become one message and an exit code, never a traceback."""
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own flush at exit fails again
        code = _BROKEN_PIPE
    sys.exit(code)


def _run() -> int:
    """Parse, run one command, report its error; the exit code."""
    try:
        code = app(standalone_mode=False) or 0
    except AlError as error:
        return _report(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
        return _report(WorldError(f"{what}; {_MENDABLE[error.errno]}, then try again: what was half done is finished"))
    except SystemExit:  # how typer and rich end when nobody reads standard output any more
        return _BROKEN_PIPE
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _usage(error)
    if code == _INTERRUPTED:
        _say("Interrupted; the next `al round` goes on where this one was.", err=True)
    return int(code)


def _report(error: AlError) -> int:
    if "--json" in sys.argv:
        _print_json({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})
    _say(f"[red]{type(error).__name__}:[/] {_safe(error)}", err=True)
    return error.exit_code


def _usage(error: Any) -> int:
    """Report what typer says of a command line that it cannot parse (without any command it has printed the help)."""
    message = printable(error.format_message())
    if hasattr(error, "message"):
        error.message = printable(str(error.message))
    if "--json" in sys.argv:
        _print_json({"error": UsageError.__name__, "message": message, "exit_code": UsageError.exit_code})
    if type(error).__name__ != "NoArgsIsHelpError":
        error.show()
    return UsageError.exit_code


def _round_as_flow(
    workspace: Workspace, environment: dict[str, str], close_now: bool, accept_vanished: bool, say: Any
) -> TickReport:
    os.environ.update(environment)
    os.environ["AL_WORKSPACE"] = str(workspace.layout.root)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # the run's log lies on the server
    # Prefect obeys `.env`, `prefect.toml` and `pyproject.toml` of the current folder, which may be anybody's.
    os.chdir(workspace.home)
    say(f"as a flow run at {environment['PREFECT_UI_URL']}")
    from flows.rounds import LISTENER, al_round

    LISTENER.set(say)
    report: TickReport = al_round(close_now=close_now, accept_vanished=accept_vanished)
    return report


def _workspace() -> Workspace:
    from al_pipeline.workspace import open_workspace

    return open_workspace(_Chosen.folder)


def _login(workspace: Workspace, url: str) -> None:
    from al_pipeline.servers import admin

    account = admin(workspace)
    _say(f"Label Studio: [bold]{url}[/]")
    if account:
        _say(f"    log in as {account.email}; the password lies in {_safe(account.file)}, readable by you alone")


def _read_token() -> str:
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass("Label Studio's access token: ").strip()
    return sys.stdin.readline().strip()


def _safe(value: object) -> str:
    """Text of others, fit for a terminal: no control sequences, no markup."""
    from rich.markup import escape

    return escape(printable(str(value)))


def _say(text: str, err: bool = False) -> None:
    from rich.console import Console

    Console(stderr=err, highlight=False, soft_wrap=True).print(text)


def _warn(text: str) -> None:
    _say(f"[yellow]{_safe(text)}[/]", err=True)


def _whisper(_: str) -> None:
    return None


def _print_json(value: Any) -> None:
    _write_json(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n", sys.stdout)


def _write_json(text: str, out: IO[str]) -> None:
    """Write JSON; what a terminal would obey, and what UTF-8 has no bytes for, as escapes: the value stays the same."""
    out.write("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def _table(header: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False, header_style="dim")
    for row in rows:
        table.add_row(*map(_safe, row))
    Console(highlight=False).print(table)


@contextmanager
def _waiting(show: bool) -> Iterator[Callable[[str], None]]:
    """What a long wait is told to: one line that changes in a terminal, else each message once, without its seconds."""
    if not show:
        yield _whisper
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("") as line:
            yield lambda text: line.update(_safe(text))
    else:
        told: set[str] = set()

        def tell(text: str) -> None:
            text = re.sub(r" \(\d+ s\)$", "", text)
            if text not in told:
                told.add(text)
                _say(_safe(text), err=True)

        yield tell


@contextmanager
def _progress(what: str, show: bool) -> Iterator[Any]:
    """A progress bar on standard error, in a terminal; yields what the operation tells of (done, total)."""
    if not (show and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
