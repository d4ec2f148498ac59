"""`al`: parses, calls one operation, prints. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from al_pipeline.cli import streams
from al_pipeline.errors import AlError, ExternalServiceError, Locked, NothingToDo, UsageError
from al_pipeline.sanitize import printable
from al_pipeline.workspace.home import own_environment, restrict_umask

if TYPE_CHECKING:
    from al_pipeline.integrations.dvc.session import Dvc
    from al_pipeline.operations.machine import Destruction
    from al_pipeline.operations.reproduce import Reproduction
    from al_pipeline.operations.rule import Change
    from al_pipeline.operations.schedule import Standing
    from al_pipeline.operations.tick import Options, TickReport
    from al_pipeline.params import Params
    from al_pipeline.rounds.interventions import Intervention, Kind
    from al_pipeline.simulation.simulate import Simulation
    from al_pipeline.workspace.layout import Layout
    from al_pipeline.workspace.workspace import Workspace

_WORKSPACE, _DATA, _ROUNDS, _MODEL, _SERVERS = "Workspace", "Data and labels", "Rounds", "Model", "Servers"
"""The groups of commands in `al --help`."""

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
labelstudio = typer.Typer(
    no_args_is_help=True,
    help="A Label Studio on this machine for those who have none of their own, or the address of yours.",
)
app.add_typer(labelstudio, name="labelstudio", rich_help_panel=_SERVERS)
labels_app = typer.Typer(
    no_args_is_help=True, help="Take single answers out of the labelled set, or back into it; nothing is deleted."
)
app.add_typer(labels_app, name="labels", rich_help_panel=_DATA)
remote_app = typer.Typer(no_args_is_help=True, help="The DVC remote, where the data of every round are kept.")
app.add_typer(remote_app, name="remote", rich_help_panel=_WORKSPACE)
schedule = typer.Typer()
app.add_typer(schedule, name="schedule", rich_help_panel=_SERVERS)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
Reason = Annotated[str, typer.Option(help="Why; kept for ever.")]
Encoding = Annotated[
    str | None, typer.Option(help="Of the file: cp1252, gb18030, utf-16, … Default: found out, or refused.")
]
InputFormat = Annotated[
    str | None,
    typer.Option("--input-format", help="csv, jsonl, parquet or xlsx. Default: by the content and the name."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")]


_SOURCES_SHOWN = 10


class _Chosen:
    """Where `al` works: the folder that `-C` names, else the current one."""

    folder: Path | None = None

    shows: bool = True
    """Whether the command does nothing but show: then it failed where its output could not be written."""


_SHOW = frozenset({"status", "rounds", "doctor", "diff", "log", "predict", "workspaces"})
"""Commands whose output is all that they do. Of the others the exit code speaks of what was done, whether or not
somebody could be told of it."""


class _Prefect:
    """What became of the Prefect server that a round was shown to."""

    gone: bool = False


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _say(f"al {version('al-pipeline')}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    workspace: Annotated[
        Path | None, typer.Option("--workspace", "-C", help="Work in this workspace instead of the current folder.")
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    _Chosen.folder = workspace
    _Chosen.shows = context.invoked_subcommand in _SHOW or not {"-h", "--help"}.isdisjoint(sys.argv)


@app.command(rich_help_panel=_WORKSPACE)
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

    workspace = make(folder, _listed(labels, "--labels"), question, remote, test_size)
    if as_json:
        return _print_json({"workspace": str(workspace.layout.root), "workspace_id": workspace.id})
    asked = workspace.params
    _say(f"Made the workspace [bold]{_safe(workspace.layout.root)}[/]. Every knob is in its params.yaml.")
    _say(
        f"The first file brings a test set of {asked.ingest.test_size:,} items, at most a fifth (--test-size). Before "
        f"the first model people label {asked.round.seed_size + min(asked.round.test_tasks, asked.ingest.test_size):,} "
        "items; labels that you have already (al ingest --label-column) make a model at once."
    )
    _say(f"Next: [bold]cd {_safe(_typed(folder))}[/], [bold]al ingest FILE[/], [bold]al up[/], [bold]al round[/].")


@app.command(rich_help_panel=_WORKSPACE)
def doctor(as_json: Json = False) -> None:
    """Check everything that a round needs, and say how to fix what is wrong. Changes nothing."""
    from al_pipeline.operations.doctor import examine

    findings = examine(_workspace())
    broken = [finding for finding in findings if finding.level == "error"]
    if as_json:
        _print_json({"ok": not broken, "findings": [finding.to_row() for finding in findings]})
    else:
        marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}
        for finding in findings:
            _say(f"{marks[finding.level]} [bold]{finding.check}[/]: {_safe(finding.message)}")
            if finding.fix:
                _say(f"    → {_safe(finding.fix)}")
    if broken:
        raise typer.Exit(6)


@app.command(rich_help_panel=_DATA)
def ingest(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="CSV, JSONL, Parquet or XLSX, a folder of them, or - for standard input."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Your ids. Default: `id`, if there is such a column.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Labels that you already have.")] = None,
    test: Annotated[
        bool, typer.Option("--test", help="These items are the test set: measured on, never asked.")
    ] = False,
    test_size: Annotated[
        int | None,
        typer.Option(min=0, help="Items drawn at random as the test set. Default: ingest.test_size of params.yaml."),
    ] = None,
    redraw: Annotated[
        bool,
        typer.Option("--redraw-test", help="Draw the test set again from all files, until the first round begins."),
    ] = False,
    corrections: Annotated[
        bool,
        typer.Option(
            "--corrections",
            help="A text that differs from the one known under its id takes its place, as item ID~2; the old one is "
            "asked no more and its labels do not count. Without this, such texts are counted and rejected.",
        ),
    ] = False,
    encoding: Encoding = None,
    input_format: InputFormat = None,
    as_json: Json = False,
) -> None:
    """Add items to the pool. What is there already is not added twice; a bad row goes to a rejects file."""
    from al_pipeline.operations.ingest import before_first_model, redraw_test
    from al_pipeline.operations.ingest import ingest as take
    from al_pipeline.workspace.lock import locked

    if not files and not redraw:
        raise UsageError("name at least one FILE: CSV, JSONL or Parquet")
    workspace = _workspace()
    report, redrawn = None, None
    with _progress("reading", not as_json) as advance, locked(workspace.layout.lock, "al ingest"):
        if files or not redraw:
            report = take(
                workspace,
                files or [],
                text_column=text_column,
                id_column=id_column,
                label_column=label_column,
                test=test,
                test_size=None if redraw else test_size,
                corrections=corrections,
                format=input_format,
                encoding=encoding,
                progress=advance,
            )
        if redraw:
            redrawn = redraw_test(workspace, test_size)
        first = before_first_model(workspace)
    if as_json:
        found = {} if report is None else report.to_json()
        return _print_json({**found, "before_first_model": first, "test_redrawn": redrawn})
    for line in report.lines() if report else ():
        _say(_safe(line))
    if redrawn is not None:
        _say(f"The test set was drawn again from all items: {redrawn:,} of them.")
    if first:
        _say(_safe(first))


@app.command(name="round", rich_help_panel=_ROUNDS)
def round_(
    close_now: Annotated[
        bool, typer.Option("--close-now", help="Close the open round with the answers there are.")
    ] = False,
    accept_vanished: Annotated[
        bool, typer.Option("--accept-vanished", help="Believe Label Studio although many answers vanished.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(help="How many items the batch asks about, if this tick selects one.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Which query strategy selects that batch. Default: as params.yaml says.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run one tick: pull answers, close and build the round if it is full, push the next questions.

    Safe to repeat and to interrupt. Runs as a flow where the workspace's Prefect server is up, else in this process. \
Ends with 3 where there was nothing to do: no new answer, or a pause.
    """
    from al_pipeline.operations.tick import Options
    from al_pipeline.params import check_overrides

    workspace = _workspace()
    check_overrides(size, strategy)
    report = _tick(workspace, Options(close_now, accept_vanished, size, strategy), as_json)
    if as_json:
        seconds: dict[str, float] = {}
        for name, took in report.steps:  # a tick that publishes pushes twice
            seconds[name] = seconds.get(name, 0.0) + took
        _print_json(asdict(report) | {"steps": seconds})
        raise typer.Exit(0 if report.changed else NothingToDo.exit_code)
    for number in report.published:
        _say(f"[green]Published round-{number:04d}.[/] [bold]al report[/] shows it.")
    for reason, count in report.refused.items():
        _say(f"[yellow]Refused {count}:[/] {_safe(reason)}")
    for warning in report.warnings:
        _say(f"[yellow]{_safe(warning)}[/]")
    where = "No round is open" if report.round is None else f"Round {report.round} is {report.state}"
    _say(f"{where}: {_safe(report.waits_for)}.")
    if not report.changed:
        raise typer.Exit(NothingToDo.exit_code)


@app.command(rich_help_panel=_ROUNDS)
def status(as_json: Json = False) -> None:
    """Show the round, how much is labelled, what was refused and why, and what comes next."""
    from al_pipeline.operations.status import status as read

    workspace = _workspace()
    found = read(workspace)
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
    if found["running"] and found["running"]["whole"]["answered"]:
        _say(f"running accuracy: {_running(found['running'])}")
    if found["saved"]:
        _say(_safe(found["saved"]["sentence"]))
    if found["asked_by"]:
        _say(f"asked by {_safe(found['asked_by']['strategy'])}: {_safe(found['asked_by']['reason'])}")
    for reason, count in found["refused"].items():
        _say(f"[yellow]refused {count}:[/] {_safe(reason)}")
    sources = found.get("sources", [])
    for one in sources[:_SOURCES_SHOWN]:
        since = _time_in(workspace.params.schedule.timezone, one["since"])
        told = f"{one['message']} (since {since})" if one["state"] == "failing" else one["message"]
        _say(f"[yellow]ingest.sources:[/] {_safe(one['file'])} {_safe(told)}")
    if (more := len(sources) - _SOURCES_SHOWN) > 0:
        _say(f"[yellow]ingest.sources:[/] and {more:,} more; `al status --json` names them")
    for name in ("schema_problem", "paused", "held"):
        if found[name]:
            _say(f"[yellow]{name.replace('_', ' ')}:[/] {_safe(found[name])}")
    if found["busy"]:
        _say(
            f"[yellow]busy:[/] {_safe(found['busy'].get('purpose', ''))} since {_safe(found['busy'].get('since', ''))}"
        )
    if found["tasks"]:
        since = found["answered_since"]
        waiting = f", {since} since the last look (`al round` pulls them)" if since else ", all of them pulled"
        _say(f"answers: {found['answered']} of {found['tasks']} tasks answered{'' if since is None else waiting}")
    if found["label_studio"] and found["label_studio"]["state"] != "up":
        _say(f"[yellow]Label Studio is {found['label_studio']['state']}:[/] {_safe(found['label_studio']['detail'])}")
    if found["label_studio_page"]:
        _say(f'annotators: {_safe(found["label_studio_page"])}, then the button "Label All Tasks"')
    elif found["label_studio_url"]:
        _say(f"Label Studio: {_safe(found['label_studio_url'])}")
    if found["prefect_url"]:
        _say(f"Prefect: {_safe(found['prefect_url'])}")
    if found["next_run"]:
        _say(f"next tick by itself: {_time_in(workspace.params.schedule.timezone, found['next_run'])}")
    _say(f"next: {_safe(found['next'])}")


@app.command(rich_help_panel=_ROUNDS)
def rounds(as_json: Json = False) -> None:
    """List the published rounds with their metrics and decisions."""
    from al_pipeline.operations.status import rounds as read

    found = read(_workspace())
    if as_json:
        return _print_json({"rounds": found})
    if not found:
        return _say("No round is published yet; [bold]al status[/] says what the first one waits for.")

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
                "; ".join([row["verdict"], *row["interventions"]]),
            ]
            for row in found
        ],
    )


@app.command(rich_help_panel=_ROUNDS)
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


@app.command(rich_help_panel=_MODEL)
def simulate(
    corpus: Annotated[
        Path,
        typer.Argument(metavar="CORPUS", help="CSV, JSONL, Parquet or XLSX with texts and labels, a folder, or -."),
    ],
    strategies: Annotated[str, typer.Option(help="Query strategies, divided by commas.")] = "random,margin,auto",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with its own test set and seed round.")] = 10,
    budget: Annotated[int, typer.Option(min=1, help="Labels that each run may spend.")] = 1000,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Labels a round. Default: select.batch_size of params.yaml.")
    ] = None,
    seed_size: Annotated[
        int | None, typer.Option(min=1, help="Labels of the seed round. Default: round.seed_size of params.yaml.")
    ] = None,
    cold_start: Annotated[
        str | None, typer.Option(help="Who asks the seed round. Default: select.cold_start of params.yaml.")
    ] = None,
    guide: Annotated[
        list[str] | None,
        typer.Option(help='What a rare class is found by: spam="free money,act now"; once for each class.'),
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="encoder, tfidf or encoder+tfidf. Default: features.kind of params.yaml.")
    ] = None,
    test_size: Annotated[
        int | None, typer.Option(min=1, help="Texts of a test set, at most a fifth. Default: a fifth, 5,000 at most.")
    ] = None,
    limit: Annotated[int, typer.Option(min=50, help="Of a larger corpus take so many texts, at random.")] = 20_000,
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="The column that holds the label.")] = "label",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes, one core each. Default: as many as there are cores.")
    ] = None,
    encoding: Encoding = None,
    input_format: InputFormat = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the results. Default: simulations/, in a workspace its reports/."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show on a labelled corpus how many labels active learning would have saved, before anything is spent.

    The rounds run by the functions that the stages call, in this process: no git, no Label Studio, no Prefect.

    Inside a workspace its params.yaml counts, else the template's. Run again, it does what is missing.
    """
    from al_pipeline.simulation.corpus import read_corpus
    from al_pipeline.simulation.simulate import Options, corpus_vectors, with_features
    from al_pipeline.simulation.simulate import simulate as run
    from al_pipeline.workspace.home import al_home

    layout, params = _simulated_project()
    if features is not None:
        params = with_features(params, features)
    with _progress("reading", not as_json) as advance:
        texts = read_corpus(
            corpus,
            text_column,
            label_column,
            limit,
            params.seed,
            params.schema_.labels,
            advance,
            max_characters=params.ingest.max_characters,
            format=input_format,
            encoding=encoding,
            on_note=_warn,
        )
    if out is None:
        out = Path("simulations") if layout is None else layout.reports / "simulations"
    options = Options(
        strategies=tuple(name.strip() for name in strategies.split(",") if name.strip()),
        seeds=seeds,
        budget=budget,
        batch_size=batch_size,
        seed_size=seed_size,
        cold_start=cold_start,
        guide=_guide(guide) if guide else None,
        test_size=test_size,
        workers=workers or _cores(),
    )
    vectors = corpus_vectors(texts, params.features, al_home() / "simulate", layout)
    with _progress("simulating", not as_json) as advance:
        done = run(
            texts, "stdin" if str(corpus) == "-" else corpus.resolve().stem, params, options, out, vectors, advance
        )
    if as_json:
        return _print_json({**done.result, "folder": str(done.folder), "report": str(done.folder / "report.html")})
    _say_simulation(done)


@app.command(rich_help_panel=_MODEL)
def predict(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="CSV, JSONL, Parquet or XLSX, a folder of them, or - for standard input."),
    ] = None,
    texts: Annotated[
        list[str] | None, typer.Option("--text", help="Predict this text instead of a file's; may be given again.")
    ] = None,
    number: Annotated[
        str | None, typer.Option("--round", help="Take this round's model, not the promoted one.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Your ids. Default: `id`, if there is such a column.")] = None,
    columns: Annotated[bool, typer.Option("--columns", help="Keep the input's columns in the output.")] = False,
    encoding: Encoding = None,
    input_format: InputFormat = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write here instead of standard output.")] = None,
    form: Annotated[
        str | None, typer.Option("--format", metavar="csv|jsonl", help="Default: by the suffix of --out, else jsonl.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="With --out, print one JSON object: out, rows. Without, rows are JSON anyway."),
    ] = False,
) -> None:
    """Predict with the promoted model: id, label, its probability, and that of each class, a row or JSON object each.

    A row without a text is passed over, with a warning. Output is UTF-8; in CSV, what a spreadsheet would take for a \
formula gets a ' in front.
    """
    from al_pipeline.data.inputs import open_inputs
    from al_pipeline.files import json_line, replacing
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.predict import classes_of, columns_in, csv_lines, output_format, read_texts, typed_texts
    from al_pipeline.operations.predict import predict as run

    if bool(files) == bool(texts):
        raise UsageError("name either a FILE (CSV, JSONL, Parquet or XLSX; - for standard input) or a --text, not both")
    if texts and columns:
        raise UsageError("a --text has no columns to keep; leave --columns out")
    workspace = _workspace()
    wanted = None if number is None else round_number(number)
    with open_inputs(files or [], input_format, encoding) as inputs:
        form = output_format(form, out, inputs.sources)
        if as_json and form == "csv" and out is None:
            raise UsageError("--json and --format csv exclude each other; --out FILE takes the rows")
        for note in inputs.notes:
            _warn(note)
        given = (
            typed_texts(texts) if texts else read_texts(inputs.sources, text_column, id_column, _warn, columns=columns)
        )
        rows = run(workspace, given, wanted)
        if form == "csv":
            names = columns_in(inputs.sources) if columns else []
            lines = csv_lines(rows, classes_of(workspace, wanted), names, id_column)
        else:
            lines = map(json_line, rows)
        write = _write_json if form == "jsonl" else _write_csv
        if out is None:
            for line in lines:
                write(line, sys.stdout)
                if streams.lost(sys.stdout):  # nobody reads on: what is left need not be predicted
                    break
            return
        count = -1 if form == "csv" else 0  # but for the header
        with (
            replacing(out) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as target,
        ):
            for line in lines:
                write(line, target)
                count += 1
    if as_json:
        _print_json({"out": str(out), "rows": count})


@app.command(rich_help_panel=_DATA)
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; with `datasets`, the folder.")],
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="csv|jsonl|parquet|datasets", help="Default: by the suffix of --out."),
    ] = None,
    number: Annotated[str | None, typer.Option("--round", help="As of this round. Default: the latest.")] = None,
    test: Annotated[bool, typer.Option("--test", help="The test set's labels too, and a column `part`.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write the published labels: item, text, label, who gave it, agreement, round. `datasets` is for Hugging Face."""
    from al_pipeline.operations.export import export as run
    from al_pipeline.operations.history import round_number

    done = run(_workspace(), out, form, None if number is None else round_number(number), test=test, force=force)
    if done.waiting:
        _warn(f"{done.waiting} interventions on labels are not in {done.round} yet; `al round` carries them out")
    if as_json:
        return _print_json(asdict(done))
    _say(f"{done.rows:,} labels of {done.round} written to {_safe(done.out)}")


@app.command(rich_help_panel=_ROUNDS)
def reproduce(
    number: Annotated[str | None, typer.Argument(metavar="ROUND", help="7 or round-0007. Default: the latest.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every published round, one after the other.")] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="recorded|PATH",
            help="Where another engine made the round: install that one in an environment of its own and run under it. "
            "PATH: its sources, a checkout or wheel, where they are not the ones that run now.",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far a metric may move where another engine makes the round again.")
    ] = 0.02,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the clones for a look, until the next call.")] = False,
    as_json: Json = False,
) -> None:
    """Make published rounds again in a fresh clone, from the DVC remote alone, and compare every byte.

    Touches nothing in the workspace. Ends with 6 where a round came out different, naming the stage and the first \
cause (data, features, parameters, engine), and with 5 where the remote lacks something.
    """
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.reproduce import failure
    from al_pipeline.operations.reproduce import reproduce as run

    if number is not None and everything:
        raise UsageError("either one ROUND or `--all`, not both")
    numbers = None if everything else [] if number is None else [round_number(number)]
    made = []
    with _waiting(not as_json) as say:
        for one in run(_workspace(), numbers, engine=engine, tolerance=tolerance, keep=keep, say=say):
            made.append(one)
            if not as_json:
                _show_reproduction(one, details=not everything or one.difference is not None)
    error = failure(made)
    if as_json:
        _print_json({"ok": error is None, "rounds": [{**asdict(one), "ok": one.difference is None} for one in made]})
        raise typer.Exit(error.exit_code if error else 0)
    if error:
        raise error


def _show_reproduction(one: Reproduction, details: bool) -> None:
    equal = sum(not output.unlike for output in one.outputs)
    how = f"{equal} of {len(one.outputs)} outputs equal to the byte"
    if one.compared == "metrics":
        how = "metrics compared, not bytes, since another engine made it"
    mark = "[green]✓[/]" if one.difference is None else "[red]✗[/]"
    _say(f"{mark} [bold]round-{one.round:04d}[/], made again in a fresh clone: {how} ({one.seconds:.1f} s)")
    if one.engine:
        _say(f"    engine: {_safe(one.engine)}")
        _say("    `--engine recorded` installs the one that made it in an environment of its own and compares bytes")
    if details and one.figures:
        _table(
            ("metric", "recorded", "made again", ""),
            [
                [f.name, *("–" if v is None else f"{v:.4f}" for v in (f.recorded, f.made)), "" if f.near else "moved"]
                for f in one.figures
            ],
        )
    if details and one.outputs:
        _table(
            ("output", "stage", "made again (SHA-256)", ""),
            [
                [o.name, o.stage, o.sha256[:16], f"unlike {', '.join(o.unlike)}" if o.unlike else "equal"]
                for o in one.outputs
            ],
        )
    if one.difference is not None:
        where = f"stage {one.difference.stage}" if one.difference.stage else "before any stage"
        _say(f"    [red]{where}, cause: {one.difference.cause}.[/] {_safe(one.difference.what)}")
    if one.folder:
        _say(f"    the clone lies in {_safe(one.folder)} until the next `al reproduce`")


@app.command(rich_help_panel=_ROUNDS)
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A round: 7 or round-0007.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    as_json: Json = False,
) -> None:
    """Compare two published rounds: labels and who gave them, parameters, metrics with intervals, predictions."""
    from al_pipeline.operations.diff import diff as compare
    from al_pipeline.operations.history import round_number

    found = compare(_workspace(), round_number(before), round_number(after))
    if as_json:
        return _print_json(found.to_json())
    kinds = {kind: sum(change.kind == kind for change in found.labels) for kind in ("added", "changed", "removed")}
    _say("[bold]labels[/]: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    rows = [
        [
            change.kind,
            change.item_id,
            f"{change.before or '–'} → {change.after or '–'}",
            ", ".join(change.annotators),
            ", ".join("imported" if number < 0 else str(number) for number in change.rounds),
            "; ".join(dict.fromkeys(change.events)),
        ]
        for change in found.labels
    ]
    _shortened(("", "item", "label", "by", "asked in round", "what was said"), rows)
    _say(f"[bold]parameters[/]: {len(found.params)} changed")
    _shortened(("key", "before", "after"), [[key, str(old), str(new)] for key, (old, new) in found.params.items()])
    _say(f"[bold]metrics[/]; the difference is on the {found.models.items} test items that both models saw")

    def figure(estimate: Any, form: str = ".3f") -> str:
        value, low, high = (estimate[name] for name in ("value", "low", "high"))
        if value is None:
            return "–"
        return f"{value:{form}}" + ("" if low is None else f" ({low:{form}} to {high:{form}})")

    _table(
        ("metric", "before", "after", "difference"),
        [
            [name, figure(old), figure(new), figure(asdict(found.models.differences[name]), "+.3f")]
            for name, (old, new) in found.metrics.items()
        ],
    )
    _say(f"[bold]predictions[/]: {len(found.models.flips)} test items flipped")
    _shortened(
        ("item", "label", "before", "after"),
        [
            [
                flip.item_id,
                flip.label,
                f"{flip.before} {flip.before_probability:.2f}",
                f"{flip.after} {flip.after_probability:.2f}",
            ]
            for flip in found.models.flips
        ],
    )


def _shortened(header: tuple[str, ...], rows: list[list[str]], most: int = 20) -> None:
    if rows:
        _table(header, rows[:most])
    if len(rows) > most:
        _say(f"[dim]… and {len(rows) - most} more; `--json` lists all[/]")


_SHOWN = (
    *("file", "rank", "score", "strategy", "probability", "agreement", "answers", "kind", "reason", "result"),
    *("updated_at", "in"),
)
"""What `al log` shows of an entry; `--json` has all."""


@app.command(rich_help_panel=_DATA)
def log(
    item: Annotated[str, typer.Argument(metavar="ITEM", help="The item's id.")],
    as_json: Json = False,
) -> None:
    """Show everything that ever happened to an item: taken in, asked, answered, labelled, predicted, and by whom."""
    from al_pipeline.operations.log import log as read

    found = read(_workspace(), item)
    if as_json:
        return _print_json(asdict(found))
    text = " ".join((found.text or "").split())
    _say(f"[bold]{_safe(found.item_id)}[/] ({found.part or 'no longer there'}): {_safe(text[:300])}")
    rows = []
    for entry in found.entries:
        told = entry.details
        what = " ".join(str(word) for word in (entry.what, told.get("label")) if word is not None)
        rest = [
            f"{name.replace('_', ' ')} {f'{told[name]:.3g}' if isinstance(told[name], float) else told[name]}"
            for name in _SHOWN
            if told.get(name) is not None
        ]
        known = "" if entry.what == "ingested" else "open"  # what no published round knows yet
        number = known if entry.round is None else str(entry.round)
        rows.append([number, what, str(told.get("annotator") or ""), ", ".join(rest)])
    _table(("round", "what", "by", "details"), rows)


@app.command(rich_help_panel=_WORKSPACE)
def upgrade(
    replace_dvc_yaml: Annotated[
        bool, typer.Option("--replace-dvc-yaml", help="Give up changes of your own in dvc.yaml (git keeps them).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Carry the workspace to this engine's layout, in one commit. Your values and comments stay."""
    from al_pipeline.operations.upgrade import upgrade as run

    done = run(_Chosen.folder, replace_dvc_yaml)
    if as_json:
        return _print_json(asdict(done))
    if done.before == done.after:
        return _say(f"The workspace has layout {done.after} already; nothing was changed.")
    _say(f"Carried from layout {done.before} to {done.after}: {', '.join(done.changed)} ({done.commit[:12]}).")


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
    workspace = _original() if changes else _workspace()
    if changes:
        before = workspace.layout.params.read_bytes()
        committed = change_schedule(workspace, cron, timezone, active)
        changed = before != workspace.layout.params.read_bytes()
        if not as_json:
            done = "and committed" if committed else "not committed: it has other changes, the next round commits it"
            _say(f"params.yaml is changed, {done}." if changed else "params.yaml says so already.")
        workspace = _workspace()
        if prefect_status(workspace):
            _offer_to_prefect(workspace)
    found = look_at_schedule(workspace)
    if as_json:
        return _print_json(found.to_json())
    _show_schedule(found)


@schedule.command("apply")
def schedule_apply(as_json: Json = False) -> None:
    """Tell the workspace's Prefect server of the schedule in params.yaml, and that ticks run in this clone."""
    from al_pipeline.operations.schedule import look_at_schedule

    workspace = _original()
    changed = _tell_prefect(workspace, take_over=True)
    found = look_at_schedule(workspace)
    if as_json:
        return _print_json({"changed": changed, **found.to_json()})
    _say("Prefect was told." if changed else "Prefect knew already.")
    _show_schedule(found)


def _show_schedule(found: Standing) -> None:
    wanted = found.wanted
    _say(f"schedule: [bold]{_safe(wanted.cron)}[/] {_safe(wanted.timezone)}{'' if wanted.active else ', off'}")
    if found.server is None:
        return _say("The workspace's own Prefect server is not up, so nothing runs by itself: [bold]al up[/]")
    if found.deployment is None:
        return _say("[yellow]Prefect was never told of it:[/] [bold]al schedule apply[/]")
    for difference in found.differs:
        _say(f"[yellow]{_safe(difference)}:[/] [bold]al schedule apply[/], or change params.yaml")
    if not found.worker:
        _say("[yellow]No worker takes the runs that are due:[/] [bold]al up[/] starts it")
    elif found.next_run:
        _say(f"next tick by itself: {_time_in(wanted.timezone, found.next_run)}")


@app.command(rich_help_panel=_SERVERS)
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

    workspace = _original()
    _ = workspace.params  # what is wrong in it is told before anything starts
    workspace.make_home()
    elsewhere = label_studio_elsewhere(workspace)
    with _waiting(not as_json) as say:
        studio = elsewhere or start_label_studio(workspace, say).url
        prefect = prefect_status(workspace) or start_prefect(workspace, say)
        say("telling Prefect of the schedule")
        _offer_to_prefect(workspace)
        start_worker(workspace, say)
    rows, found = services(workspace), look_at_schedule(workspace)
    if as_json:
        return _print_json(
            {
                "label_studio_url": studio,
                "prefect_url": prefect.url,
                "services": [row.to_json() for row in rows],
                "schedule": found.to_json(),
            }
        )
    _table(
        ("service", "state", "address", "process", "log"),
        [[row.service, row.state, row.address, str(row.pid or ""), row.log or ""] for row in rows],
    )
    _say(f"[dim]logs lie in {_safe(workspace.home)}[/]")
    if not elsewhere:
        _login(workspace, studio)
    _say(f"Prefect's page asks for what stands in {_safe(password_file(workspace))}, readable by you alone")
    _show_schedule(found)


@app.command(rich_help_panel=_SERVERS)
def down(as_json: Json = False) -> None:
    """Stop what `al up` started, and a scheduled tick that runs just now; the next one finishes its job."""
    from al_pipeline.servers import stop_label_studio, stop_prefect, stop_worker

    workspace = _original()
    stopped = {}
    for name, stop in (("worker", stop_worker), ("Prefect", stop_prefect), ("Label Studio", stop_label_studio)):
        stopped[name] = stop(workspace)
        if not as_json:
            _say(f"{name}: {'stopped' if stopped[name] else 'was not running'}")
    if as_json:
        _print_json({"stopped": stopped})


@app.command(rich_help_panel=_WORKSPACE)
def workspaces(as_json: Json = False) -> None:
    """List what workspaces left on this machine: servers, databases, caches, credentials. `al destroy` removes it."""
    from al_pipeline.operations.machine import workspaces as look
    from al_pipeline.workspace.home import al_home

    found = [left.to_json() for left in look()]
    if as_json:
        return _print_json({"home": str(al_home()), "workspaces": found})
    if not found:
        return _say(f"No workspace left anything in {_safe(al_home())}.")
    _table(
        ("name", "id", "state", "size", "servers", "path"),
        [
            [
                row["name"] or "?",
                row["workspace_id"],
                row["state"],
                "–" if row["bytes"] is None else _size(row["bytes"]),
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
    _say(f"[dim]in {_safe(al_home())}; `al destroy ID` removes what one of them left[/]")


@app.command(rich_help_panel=_WORKSPACE)
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

    left = find(wanted, _Chosen.folder)
    planned = plan(left, with_folder)
    if not as_json:
        _show_destruction(planned)
    if dry_run:
        return _print_json({**planned.to_json(), "dry_run": True}) if as_json else _say("Nothing was changed.")
    if planned.goes and not yes and (force or not planned.losses):
        if as_json or not sys.stdin.isatty():
            raise UsageError("nobody is here to ask; `--dry-run` shows what goes, `--yes` removes it")
        if not typer.confirm("Remove it for good?"):
            raise NothingToDo("nothing was removed")
    with _waiting(not as_json) as say:
        done = remove(left, with_folder, force, say)
    if as_json:
        return _print_json({**done.to_json(), "dry_run": False})
    _say(f"Removed {_size(sum(size for _, _, size in done.goes))}.")
    if left.present and not with_folder and any(Path(path).name == "label-studio" for path, _, _ in done.goes):
        _say("To go on with the workspace: [bold]al up[/], then [bold]al adopt --new-project[/].")


def _show_destruction(planned: Destruction) -> None:
    named = f"{planned.left.name} ({planned.left.workspace_id})" if planned.left.name else planned.left.workspace_id
    _say(f"[bold]{_safe(named)}[/], {planned.left.state}")
    if planned.left.state == "gone":
        places = ", ".join(map(str, planned.left.places))
        _say(f"[yellow]Its folder is not at {_safe(places)}:[/] deleted, moved, or on a disk that is not mounted?")
    for path, what, size in planned.goes:
        _say(f"[red]goes[/]   {_safe(path)}: {_safe(what)}, {_size(size)}")
    for path, what in planned.stays:
        _say(f"[green]stays[/]  {_safe(path)}: {_safe(what)}")
    for loss in planned.losses:
        _say(f"[yellow]lost for good:[/] {_safe(loss)}")


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GB" if count >= 2**30 else f"{count / 2**20:,.1f} MB"


@remote_app.command("repair")
def remote_repair(as_json: Json = False) -> None:
    """Send the DVC remote what it lacks, or holds other bytes of, of the last commit and of every published round.

    Each object is proved by its digest before it is sent, and read back. Run it in a clone that has the data.
    """
    from al_pipeline.errors import RemoteIncomplete
    from al_pipeline.integrations.dvc.session import told
    from al_pipeline.operations.remote import repair_remote

    repaired = repair_remote(_workspace())
    if as_json:
        _print_json({"ok": not repaired.wrong, **repaired.to_json()})
    else:
        _say(f"{repaired.sent} objects were sent to the DVC remote.")
    if repaired.wrong and as_json:
        raise typer.Exit(RemoteIncomplete.exit_code)
    if repaired.wrong:
        raise RemoteIncomplete(
            f"the DVC remote still lacks what this clone does not have either: {told(repaired.wrong)}. Try a clone "
            "that "
            "has it, or a backup of the remote"
        )


@app.command(rich_help_panel=_WORKSPACE)
def trust(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; needed where nobody is there to answer.")] = False,
    as_json: Json = False,
) -> None:
    """Show what differs in the files that steer DVC, and let DVC use them as they are on this machine.

    DVC runs the commands of dvc.yaml. In a workspace that came from somebody else they are somebody else's program.
    """
    from al_pipeline.workspace.trust import accept, changes, doubtful

    root = _workspace().layout.root
    doubts = doubtful(root)
    if not doubts:
        raise NothingToDo("the files that steer DVC are this engine's own, or trusted already")
    for name, problem in doubts.items():
        _say(f"[bold]{_safe(name)}[/] {_safe(problem)}:", err=as_json)
        for line in changes(root, name):
            _say(f"    {_safe(line)}", err=as_json)
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise UsageError("nobody is here to ask; look at the lines above, then `al trust --yes`")
        if not typer.confirm("Let DVC use them on this machine?"):
            raise NothingToDo("nothing was trusted")
    accept(root)
    if as_json:
        return _print_json({"trusted": doubts})
    _say("Trusted on this machine, as they are now; a change asks again.")


@app.command(rich_help_panel=_ROUNDS)
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

    workspace = _workspace()
    if undo == (number is not None):
        raise UsageError("name the round to go back to (`al rounds` lists them), or --undo")
    if undo and (labels or model or params):
        raise UsageError(
            "`--undo` takes back all that the rollback did; give it without --labels, --model and --params"
        )
    both = not labels and not model
    with _desk(workspace, dry_run) as dvc:
        if number is None:
            change = take_back(workspace, dvc, reason, dry_run=dry_run)
        else:
            change = go_back(
                workspace, dvc, round_number(number), labels=labels or both, model=model or both, params=params,
                reason=reason, dry_run=dry_run,
            )  # fmt: skip
    _carry_out(workspace, change, dry_run, as_json)


def _amending(kind: Kind) -> Callable[..., None]:
    """The command that revokes or restores; both select alike."""

    def command(
        annotator: Annotated[str | None, typer.Option(help="Only what this person answered (e-mail address).")] = None,
        number: Annotated[str | None, typer.Option("--round", help="Only answers to tasks of this round.")] = None,
        since: Annotated[str | None, typer.Option(help="Only answers given or changed since then (UTC).")] = None,
        item: Annotated[str | None, typer.Option(help="Only answers about this item.")] = None,
        label: Annotated[str | None, typer.Option(help="Only answers that say this class.")] = None,
        reason: Reason = "",
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        from al_pipeline.operations.history import round_number
        from al_pipeline.operations.rule import amend
        from al_pipeline.records import Selection

        workspace = _workspace()
        who = None if annotator is None else annotator.strip().lower()
        selection = Selection(who, None if number is None else round_number(number), item, since, label)
        with _desk(workspace, dry_run) as dvc:
            change = amend(workspace, dvc, kind, selection, reason, dry_run=dry_run)
        _carry_out(workspace, change, dry_run, as_json)

    return command


labels_app.command(
    "revoke", help="Quarantine answers: they are kept but no longer count. Conditions together narrow it down."
)(_amending("revoke"))
labels_app.command("restore", help="Let quarantined answers count again. Conditions together narrow it down.")(
    _amending("restore")
)


@app.command(rich_help_panel=_MODEL)
def approve(
    number: Annotated[str | None, typer.Argument(metavar="ROUND", help="Default: the newest round.")] = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Promote a round's model although it was held or refused, and let later models be promoted again."""
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.rule import approve as rule

    workspace = _workspace()
    with _desk(workspace) as dvc:
        _ruled(rule(workspace, dvc, None if number is None else round_number(number), reason), as_json)


@app.command(rich_help_panel=_ROUNDS)
def ask(
    items: Annotated[list[str], typer.Argument(metavar="ITEM", help="Ids of items of the pool.")],
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Put items into the next batch, before those that the strategy chooses."""
    from al_pipeline.operations.ask import ask as put

    workspace = _workspace()
    with _desk(workspace) as dvc:
        _ruled(put(workspace, dvc, items, reason), as_json)


@app.command(rich_help_panel=_ROUNDS)
def pause(reason: Annotated[str, typer.Option(help="Why; shown to all.")] = "", as_json: Json = False) -> None:
    """Have every tick do nothing, by hand or by schedule, until `al resume`. A rollback still works."""
    from al_pipeline.operations.rule import pause as rule

    workspace = _workspace()
    with _desk(workspace) as dvc:
        _ruled(rule(workspace, dvc, reason), as_json)


@app.command(rich_help_panel=_ROUNDS)
def resume(reason: Reason = "", as_json: Json = False) -> None:
    """Have ticks work again after `al pause`."""
    from al_pipeline.operations.rule import resume as rule

    workspace = _workspace()
    with _desk(workspace) as dvc:
        _ruled(rule(workspace, dvc, reason), as_json)


@app.command(rich_help_panel=_SERVERS)
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

    workspace = _workspace()
    if new_project:
        number = leave_project(workspace)
        if as_json:
            return _print_json({"left_project": number})
        return _say(f"Project {number} is left; [bold]al round[/] makes a new one and asks again what is open.")
    done = take(workspace)
    if as_json:
        return _print_json({"project_id": done.project, "copy": done.copy})
    if done.copy:
        _say("This copy has an identity of its own now: it is another clone of the workspace.")
    if done.project is not None:
        _say(f"This clone now writes to project {done.project}; the other clones are read-only towards it.")


@labelstudio.command("start")
def labelstudio_start(as_json: Json = False) -> None:
    """Start Label Studio for this workspace (the first start installs it, a few minutes)."""
    from al_pipeline.servers import start_label_studio

    workspace = _original()
    with _waiting(not as_json) as say:
        studio = start_label_studio(workspace, say)
    if as_json:
        return _print_json({"label_studio_url": studio.url})
    _login(workspace, studio.url)


@labelstudio.command("stop")
def labelstudio_stop(as_json: Json = False) -> None:
    """Stop this workspace's Label Studio; everything in it is kept."""
    from al_pipeline.servers import stop_label_studio

    stopped = stop_label_studio(_original())
    if as_json:
        return _print_json({"stopped": stopped})
    _say("Stopped." if stopped else "It was not running.")


@labelstudio.command("invite")
def labelstudio_invite(email: Annotated[str, typer.Argument(metavar="EMAIL")], as_json: Json = False) -> None:
    """Make an account for an annotator and print its password, once."""
    from al_pipeline.operations.connect import project_page
    from al_pipeline.servers import invite

    workspace = _original()
    invited = invite(workspace, email)
    page = project_page(workspace)
    if as_json:
        return _print_json({"email": email, "password": invited.password, "token": invited.token, "page": page})
    url = _safe(page or workspace.credentials().get("url", ""))
    _say(f"{_safe(email)} can log in at {url} with the password {_safe(invited.password)}")
    where = "there" if page else "on the project's page, which `al status` shows once `al round` has made it"
    _say(f'and begins {where} with the button "Label All Tasks".')


@labelstudio.command("reset")
def labelstudio_reset(as_json: Json = False) -> None:
    """Have the project's page offer the classes of params.yaml alone; answers with others stay, and are not counted."""
    from al_pipeline.operations.connect import reset_page

    taken_out = reset_page(_workspace())
    if as_json:
        return _print_json({"taken_out": list(taken_out)})
    named = ", ".join(map(repr, taken_out))
    _say(f"Taken out of the page: {_safe(named)}." if taken_out else "The page offers the classes of params.yaml.")


@labelstudio.command("password")
def labelstudio_password(email: Annotated[str, typer.Argument(metavar="EMAIL")], as_json: Json = False) -> None:
    """Give an annotator who lost it a new password, printed once; what they annotated stays theirs."""
    from al_pipeline.servers import reset_password

    password = reset_password(_original(), email)
    if as_json:
        return _print_json({"email": email, "password": password})
    _say(f"{_safe(email)} can log in with the password {_safe(password)}; the old one is void")


@labelstudio.command("connect")
def labelstudio_connect(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Your own Label Studio, such as https://labels.example.org")
    ],
    as_json: Json = False,
) -> None:
    """Use your own Label Studio. The token is read from AL_LABEL_STUDIO_TOKEN, else from standard input."""
    from al_pipeline.operations.connect import connect_to

    workspace = _workspace()
    about = connect_to(workspace, url, os.environ.get("AL_LABEL_STUDIO_TOKEN") or _read_token())
    if as_json:
        return _print_json({"label_studio_url": url, "version": about.version, "user": about.user})
    _say(f"Connected to {_safe(url)} (Label Studio {_safe(about.version)}) as {_safe(about.user)}.")
    _say(f"The token lies in {_safe(workspace.credentials_file)}, readable by you alone.")


_MENDABLE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "fix its rights",
    errno.EPERM: "fix its rights",
    errno.EIO: "look after the disk",
    errno.EISDIR: "a folder lies where a file belongs, move it away",
    errno.ENOTDIR: "a file lies where a folder belongs, move it away",
    errno.ELOOP: "links lead round in a circle, fix them",
    errno.ENAMETOOLONG: "give a shorter name",
}
"""Errors of the operating system that are the machine's and not ours, and how to fix them."""

_INTERRUPTED = 130
_BROKEN_PIPE = 141
_WIDE = 10_000
"""Columns of a table that goes into a file or a pipe."""


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
    _Chosen.shows = True
    code = _run()
    if problem := streams.lost(sys.stdout):
        code = _not_shown(problem, code)
    streams.lost(sys.stderr)
    if _Prefect.gone:  # its client would try for minutes to tell a server that is not there
        os._exit(code)
    sys.exit(code)


def _not_shown(problem: OSError, code: int) -> int:
    """The exit code of a command whose output was lost: of what it did, unless showing is all that it does."""
    if problem.errno == errno.EPIPE:
        return _BROKEN_PIPE if code == 0 and _Chosen.shows else code
    done = "" if code or _Chosen.shows else "; what was asked for is done all the same"
    _warn(f"standard output could not be written ({problem.strerror}){done}")
    return ExternalServiceError.exit_code if code == 0 and _Chosen.shows else code


def _run() -> int:
    """Parse, run one command, report its error; the exit code."""
    try:
        code = app(standalone_mode=False) or 0
    except AlError as error:
        return _report(error)
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
        return _report(
            ExternalServiceError(f"{what}; {_MENDABLE[error.errno]}, then try again: what was half done is finished")
        )
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _usage(error)
    if code == _INTERRUPTED:
        _say("Interrupted; the next `al round` goes on where this one was.", err=True)
    return int(code)


def _report(error: AlError) -> int:
    if "--json" in sys.argv:
        name = next(cls.__name__ for cls in type(error).__mro__ if not cls.__name__.startswith("_"))
        _print_json({"error": name, "message": str(error), "exit_code": error.exit_code})
    kind = "[yellow]Nothing done:[/]" if isinstance(error, NothingToDo) else "[red]Error:[/]"
    _say(f"{kind} {_safe(error)}", err=True)
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


def _tick(workspace: Workspace, options: Options, as_json: bool) -> TickReport:
    """One tick: as a flow run where the workspace's Prefect server is up, else in this process, saying so."""
    from al_pipeline.servers import prefect_environment

    say = _whisper if as_json else lambda line: _say(f"[dim]{_safe(line)}[/]", err=True)
    if environment := prefect_environment(workspace):
        return _round_as_flow(workspace, environment, options, say)
    from al_pipeline.operations.connect import connect
    from al_pipeline.operations.tick import tick

    say("the workspace's Prefect server is not up: the round runs in this process")
    return tick(workspace, lambda: connect(workspace), options=options, say=say)


@contextmanager
def _desk(workspace: Workspace, dry_run: bool = False) -> Iterator[Dvc]:
    """DVC for an intervention, which is refused where another clone runs the ticks that would carry it out."""
    from al_pipeline.operations.connect import refuse_elsewhere
    from al_pipeline.operations.facts import open_dvc

    if not dry_run:
        refuse_elsewhere(workspace)
    with open_dvc(workspace.layout) as dvc:
        yield dvc


def _carry_out(workspace: Workspace, change: Change, dry_run: bool, as_json: bool) -> None:
    """Show an intervention, and run the tick that carries it out where it changes labels.

    What Label Studio is owed (open tasks of the abandoned round, the new batch) may wait for a later tick.
    """
    if not as_json:
        _show_change(change)
    if dry_run:
        if as_json:
            return _print_json({**change.to_json(), "dry_run": True})
        return _say("Nothing was changed.")
    published: tuple[int, ...] = ()
    owed = ""
    if change.intervention.labels:
        from al_pipeline.operations.tick import Options

        try:
            published = _tick(workspace, Options(), as_json).published
        except (ExternalServiceError, Locked) as error:
            owed = str(error)
        from al_pipeline.integrations.git import Git
        from al_pipeline.operations.history import read_history

        done = read_history(workspace.layout, Git(workspace.layout.root))
        if any(intervention.number == change.intervention.number for intervention in done.waiting):
            raise ExternalServiceError(f"the intervention is made; the next `al round` carries it out. {owed}".rstrip())
        published = published or tuple(r["round"] for r in done.rounds[-1:])
    if as_json:
        return _print_json({**change.to_json(), "dry_run": False, "published": list(published), "owed": owed})
    for number in published:
        _say(f"[green]Published round-{number:04d}[/] with these labels. [bold]al report[/] shows it.")
    if not change.intervention.labels:
        _say(f"[green]Done:[/] the model of {change.served[1] or 'no round'} is served.")
    if change.intervention.hold:
        _say("New models are held until [bold]al approve[/].")
    if owed:
        _say(f"[yellow]What Label Studio is owed waits for the next `al round`:[/] {_safe(owed)}")


def _show_change(change: Change) -> None:
    def count(rows: tuple[tuple[int, str, int], ...]) -> list[list[str]]:
        return [["imported" if n < 0 else f"round-{n:04d}", who, f"{many:,}"] for n, who, many in rows]

    for title, rows in (("Answers that no longer count", change.leaving), ("Answers that count again", change.coming)):
        if rows:
            _say(f"[bold]{title}[/]")
            _table(("round", "annotator", "answers"), count(rows))
    found = change.to_json()
    table = [["labelled items", f"{change.labels[0]:,}", f"{change.labels[1]:,}"]]
    table += [["model served", str(change.served[0] or "none"), str(change.served[1] or "none")]]
    of_the_newest = change.intervention.labels and change.intervention.kind == "rollback"
    whose = "of the newest model" if of_the_newest else "of the model served"
    for name, before in found["metrics_before"].items():
        after = found["metrics_after"].get(name)
        if change.metrics[0] is not change.metrics[1]:
            table += [[f"{name.replace('_', ' ')} {whose}", _figure(before), _figure(after)]]
    _table(("", "now", "then"), table)
    _say(f"{change.changed:,} labels change" + (f"; parameters: {', '.join(change.params)}" if change.params else ""))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _ruled(intervention: Intervention, as_json: bool) -> None:
    if as_json:
        return _print_json({"intervention": intervention.to_row()})
    _say(f"[green]Intervention {intervention.number}[/]: {_safe(intervention.sentence())}.")


def _round_as_flow(workspace: Workspace, environment: dict[str, str], options: Options, say: Any) -> TickReport:
    _speak_to_prefect(workspace, environment)
    say(f"as a flow run at {environment['PREFECT_UI_URL']}")
    from al_pipeline.flows.rounds import run_round
    from al_pipeline.servers import prefect_environment

    try:
        return run_round(options, say)
    finally:
        _Prefect.gone = not prefect_environment(workspace)


def _speak_to_prefect(workspace: Workspace, environment: dict[str, str]) -> None:
    """Set what Prefect reads when it is imported."""
    os.environ.update(environment)
    os.environ["AL_WORKSPACE"] = str(workspace.layout.root)
    # Prefect obeys `.env`, `prefect.toml` and `pyproject.toml` of the current folder, which may be anybody's.
    os.chdir(workspace.home)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # the run's log lies on the server
    os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")  # 14 s: somebody waits


def _tell_prefect(workspace: Workspace, take_over: bool) -> bool:
    """Bring the schedule to the workspace's own Prefect server; whether that changed anything."""
    from al_pipeline.servers import prefect_environment

    environment = prefect_environment(workspace)
    if not environment:
        raise NothingToDo(
            "the workspace's own Prefect server is not up; `al up` starts it and tells it of the schedule "
            "(a Prefect of your team's is told by `prefect deploy`: see prefect.yaml)"
        )
    _speak_to_prefect(workspace, environment)
    from al_pipeline.flows.deployments import apply

    return apply(workspace, take_over=take_over)


def _offer_to_prefect(workspace: Workspace) -> None:
    """Bring the schedule to the workspace's own Prefect server, if its ticks do not run in another clone."""
    try:
        _tell_prefect(workspace, take_over=False)
    except UsageError as error:  # that clone's ticks go on: the two share their servers
        _warn(str(error))


def _running(found: dict[str, Any]) -> str:
    """The running accuracy in words: over the newest rounds, or over all where those have no answer."""
    one = found["recent"] if found["recent"]["answered"] else found["whole"]
    return (
        f"[bold]{one['accuracy']:.3f}[/] ({one['low']:.3f}–{one['high']:.3f}), rounds {one['first_round']} to "
        f"{one['last_round']}: {one['right']} right of {one['answered']} answered ({one['asked']} random questions "
        "asked), predicted before they were learnt"
    )


def _simulated_project() -> tuple[Layout | None, Params]:
    """The workspace around us, if there is one, and the parameters that a simulation goes by."""
    from al_pipeline.params import parse_params
    from al_pipeline.workspace.trust import template
    from al_pipeline.workspace.workspace import in_workspace

    if _Chosen.folder is None and not in_workspace():
        return None, parse_params(template("params.yaml"))
    workspace = _workspace()
    return workspace.layout, workspace.params


def _listed(text: str, option: str) -> list[str]:
    """What stands between the commas of an option; a part with commas of its own in double quotes, as in CSV.

    Raises UsageError.
    """
    import csv

    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UsageError(f"{option} {text!r} is no list of names divided by commas: {error}") from None
    return [part.strip() for part in rows[0]] if rows else []


def _typed(path: Path) -> str:
    """A path as a shell takes it."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _guide(words: list[str]) -> dict[str, list[str]]:
    """`spam=free money,act now` as the words by class. Raises UsageError."""
    found = {}
    for word in words:
        name, _, phrases = word.partition("=")
        found[name.strip()] = [phrase for phrase in _listed(phrases, "--guide") if phrase]
        if not name.strip() or not found[name.strip()]:
            raise UsageError(f"--guide {word!r} is not of the form CLASS=words,more words")
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say_simulation(done: Simulation) -> None:
    from al_pipeline.simulation.page import summary, table

    for name, header, rows in table(done.result):
        _say(f"[bold]{_safe(name)}[/]")
        _table(header, rows)
    for sentence in summary(done.result):
        _say(_safe(sentence))
    for warning in done.result["warnings"]:
        _say(f"[yellow]{_safe(warning)}[/]")
    _say(f"Report: [bold]{_safe(done.folder / 'report.html')}[/]")


def _workspace() -> Workspace:
    from al_pipeline.workspace.workspace import open_workspace

    return open_workspace(_Chosen.folder)


def _original() -> Workspace:
    """The same for a command that acts on servers, which a copy of the folder would share with its original."""
    from al_pipeline.workspace.identity import refuse_copy

    workspace = _workspace()
    refuse_copy(workspace.layout)
    return workspace


def _time_in(zone: str, text: str) -> str:
    """A time in UTC as clocks have it in the time zone of the schedule."""
    from datetime import datetime
    from zoneinfo import ZoneInfo

    return f"{datetime.fromisoformat(text).astimezone(ZoneInfo(zone)):%a %Y-%m-%d %H:%M %Z}"


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
    """Write JSON as UTF-8; what a terminal would obey, and what UTF-8 has no bytes for, as escapes: the value stays."""
    streams.utf8(out)  # type: ignore[arg-type]
    out.write("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def _write_csv(line: str, out: IO[str]) -> None:
    """Write CSV as UTF-8; a terminal gets blanks for what it would obey, a file or a pipe every character."""
    streams.utf8(out)  # type: ignore[arg-type]
    out.write("".join(c if c.isprintable() or c == "\n" else " " for c in line) if out.isatty() else line)


def _table(header: tuple[str, ...], rows: list[list[str]]) -> None:
    """Show a table: in whole lines where no terminal is, one line a cell where the terminal is too narrow for words."""
    from rich.console import Console
    from rich.table import Table

    whole = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE
    console = Console(highlight=False, width=whole)
    widths = _column_widths([*zip(header, *rows, strict=True)], console.width)
    if widths is not None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name, width in zip(header, widths, strict=True):
            table.add_column(name, width=width)
        for row in rows:
            table.add_row(*map(_safe, row))
        return console.print(table)
    for row in rows:
        for name, cell in zip(header, row, strict=True):
            if cell:
                _say(f"[dim]{_safe(name)}:[/] {_safe(cell)}" if name else _safe(cell))


def _column_widths(columns: list[tuple[str, ...]], room: int) -> list[int] | None:
    """How wide each column is, so that all fit into `room` and no word is cut; None where they cannot.

    As few as possible, the widest, are broken into lines.
    """
    from rich.cells import cell_len

    lines = [[line for cell in column for line in printable(cell).split("\n")] for column in columns]
    widths = [max(map(cell_len, column)) for column in lines]
    words = [max((cell_len(word) for line in column for word in line.split()), default=0) for column in lines]
    room -= 2 * (len(columns) - 1)
    for place in sorted(range(len(columns)), key=lambda place: words[place] - widths[place]):
        excess = sum(widths) - room
        if excess > 0:
            widths[place] = max(words[place], widths[place] - excess)
    return widths if sum(widths) <= room else None


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
