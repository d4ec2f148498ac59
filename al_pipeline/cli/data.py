"""Commands that move texts and labels in and out: ingest, predict, export."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from al_pipeline.cli import streams
from al_pipeline.cli.options import Encoding, InputFormat, Json, current_workspace
from al_pipeline.cli.output import echo, escape, print_json, progress_bar, warn, write_csv, write_json
from al_pipeline.errors import UsageError


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
    workspace = current_workspace()
    report, redrawn = None, None
    with progress_bar("reading", not as_json) as advance, locked(workspace.layout.lock, "al ingest"):
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
        return print_json({**found, "before_first_model": first, "test_redrawn": redrawn})
    for line in report.lines() if report else ():
        echo(escape(line))
    if redrawn is not None:
        echo(f"The test set was drawn again from all items: {redrawn:,} of them.")
    if first:
        echo(escape(first))


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
    workspace = current_workspace()
    wanted = None if number is None else round_number(number)
    with open_inputs(files or [], input_format, encoding) as inputs:
        form = output_format(form, out, inputs.sources)
        if as_json and form == "csv" and out is None:
            raise UsageError("--json and --format csv exclude each other; --out FILE takes the rows")
        for note in inputs.notes:
            warn(note)
        given = (
            typed_texts(texts) if texts else read_texts(inputs.sources, text_column, id_column, warn, columns=columns)
        )
        rows = run(workspace, given, wanted)
        if form == "csv":
            names = columns_in(inputs.sources) if columns else []
            lines = csv_lines(rows, classes_of(workspace, wanted), names, id_column)
        else:
            lines = map(json_line, rows)
        write = write_json if form == "jsonl" else write_csv
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
        print_json({"out": str(out), "rows": count})


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

    done = run(current_workspace(), out, form, None if number is None else round_number(number), test=test, force=force)
    if done.waiting:
        warn(f"{done.waiting} interventions on labels are not in {done.round} yet; `al round` carries them out")
    if as_json:
        return print_json(asdict(done))
    echo(f"{done.rows:,} labels of {done.round} written to {escape(done.out)}")
