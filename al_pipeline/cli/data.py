"""Commands that move texts and labels in and out: ingest, predict, export."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli import streams
from al_pipeline.cli.options import TEST_SIZES, Encoding, IdColumn, InputFormat, Json, TextColumn, current_workspace
from al_pipeline.cli.output import echo, escape, print_json, progress_bar, warn, write_csv, write_json
from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from al_pipeline.operations.ingestion.report import IngestReport

Files = Annotated[
    list[Path] | None,
    typer.Argument(metavar="FILE", help="CSV, JSONL, Parquet or XLSX, a folder of them, or - for standard input."),
]

# Options of `al ingest`.
KnownLabels = Annotated[str | None, typer.Option(help="Column with labels that you already have.")]
AsTest = Annotated[
    bool, typer.Option("--test", help="Add these items to the test set: used for evaluation, never queried.")
]
TestSize = Annotated[
    int | None,
    typer.Option(
        min=0, help=f"Items to draw at random as the test set. {TEST_SIZES} Default: ingest.test_size in params.yaml."
    ),
]
Redraw = Annotated[
    bool,
    typer.Option("--redraw-test", help="Draw the test set again from all files; possible before the first round."),
]
Corrections = Annotated[
    bool,
    typer.Option(
        "--corrections",
        help=(
            "Let a text that differs from the known one with the same id replace it, as item ID~2; the old "
            "text is no longer asked and its labels do not count. Without this option, such texts are counted "
            "and rejected."
        ),
    ),
]

# Options of `al predict`.
Texts = Annotated[
    list[str] | None, typer.Option("--text", help="Predict this text instead of a file; may be repeated.")
]
Columns = Annotated[bool, typer.Option("--columns", help="Keep the input's columns in the output.")]
ModelOf = Annotated[
    str | None, typer.Option("--round", help="Use the model of this round. Default: the promoted model.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Output file. Default: standard output.")]
OutputFormat = Annotated[
    str | None, typer.Option("--format", metavar="csv|jsonl", help="Default: by the extension of --out, else jsonl.")
]
OutJson = Annotated[
    bool, typer.Option("--json", help="With --out, print one JSON object: out, rows. Without, rows are JSON anyway.")
]


def ingest(
    files: Files = None,
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    label_column: KnownLabels = None,
    test: AsTest = False,
    test_size: TestSize = None,
    redraw: Redraw = False,
    corrections: Corrections = False,
    encoding: Encoding = None,
    input_format: InputFormat = None,
    as_json: Json = False,
) -> None:
    """Add items to the pool. Known items are not added twice; bad rows go to a rejects file."""
    from al_pipeline.operations.ingest import before_first_model
    from al_pipeline.operations.ingest import ingest as ingest_files
    from al_pipeline.operations.ingestion.draw import redraw_test
    from al_pipeline.workspace.lock import locked

    if not files and not redraw:
        raise UsageError("name at least one FILE: CSV, JSONL, Parquet or XLSX")
    workspace = current_workspace()
    report, redrawn = None, None
    with progress_bar("reading", not as_json) as on_progress, locked(workspace.layout.lock, "al ingest"):
        if files or not redraw:
            report = ingest_files(
                workspace, files or [], text_column=text_column, id_column=id_column, label_column=label_column,
                test=test, test_size=None if redraw else test_size, corrections=corrections, format=input_format,
                encoding=encoding, progress=on_progress,
            )  # fmt: skip
        if redraw:
            redrawn = redraw_test(workspace, test_size)
        advice = before_first_model(workspace)
    if as_json:
        found = {} if report is None else report.to_json()
        return print_json({**found, "before_first_model": advice, "test_redrawn": redrawn})
    _print_ingested(report, redrawn, advice)


def _print_ingested(report: IngestReport | None, redrawn: int | None, advice: str | None) -> None:
    for line in report.lines() if report else ():
        echo(escape(line))
    if redrawn is not None:
        echo(f"The test set was drawn again from all items: {redrawn:,} items.")
    if advice:
        echo(escape(advice))


def predict(
    files: Files = None,
    texts: Texts = None,
    number: ModelOf = None,
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    columns: Columns = False,
    encoding: Encoding = None,
    input_format: InputFormat = None,
    out: Out = None,
    output_format: OutputFormat = None,
    as_json: OutJson = False,
) -> None:
    """Predict with the promoted model: id, label and its probability, and the probability of each class, for each text.

    Rows without a text are skipped with a warning. Output is UTF-8; in CSV, a cell that a spreadsheet would run as a \
formula gets a ' in front.
    """
    from al_pipeline.data.inputs import open_inputs
    from al_pipeline.operations import predict as operation
    from al_pipeline.operations.history import round_number

    if bool(files) == bool(texts):
        raise UsageError("name either a FILE (CSV, JSONL, Parquet or XLSX; - for standard input) or a --text")
    if texts and columns:
        raise UsageError("--columns keeps columns of a FILE; leave it out with --text")
    workspace = current_workspace()
    wanted = None if number is None else round_number(number)
    with open_inputs(files or [], input_format, encoding) as inputs:
        form = operation.output_format(output_format, out, inputs.sources)
        if as_json and form == "csv" and out is None:
            raise UsageError("--json and --format csv cannot be combined without --out FILE")
        for note in inputs.notes:
            warn(note)
        read = operation.read_texts(inputs.sources, text_column, id_column, warn, columns=columns)
        batches = operation.typed_texts(texts) if texts else read
        names = operation.columns_in(inputs.sources) if columns and form == "csv" else []
        lines = operation.predicted_lines(workspace, batches, wanted, form, names, id_column)
        if out is None:
            return _print_lines(lines, form)
        count = _write_lines(lines, form, out)
    if as_json:
        print_json({"out": str(out), "rows": count})


def _print_lines(lines: Iterable[str], form: str) -> None:
    write = write_json if form == "jsonl" else write_csv
    for line in lines:
        write(line, sys.stdout)
        if streams.lost(sys.stdout):  # the reader is gone: do not predict the rest
            break


def _write_lines(lines: Iterable[str], form: str, out: Path) -> int:
    """Write the file, whole or not at all; the number of rows, without the header."""
    from al_pipeline.files import replacing

    write = write_json if form == "jsonl" else write_csv
    count = -1 if form == "csv" else 0
    with (
        replacing(out) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as target,
    ):
        for line in lines:
            write(line, target)
            count += 1
    return count


def export(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Output file; a folder for `datasets`; a folder or .zip for a model."),
    ],
    output_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="csv|jsonl|parquet|datasets|onnx|onnx-int8|mlflow|huggingface",
            help="Default: by the extension of --out. The last four export the model, not the labels.",
        ),
    ] = None,
    number: Annotated[
        str | None,
        typer.Option("--round", help="Labels or model of this round. Default: the latest labels, the promoted model."),
    ] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Include the labels of the test set, and a column `part`.")
    ] = False,
    license_name: Annotated[
        str | None,
        typer.Option("--license", help="License that a model's card names, such as `apache-2.0`. Default: unknown."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing output.")] = False,
    as_json: Json = False,
) -> None:
    """Export the published labels: item, text, label, annotators, agreement, round, and confidence if they have one.

    `datasets` is for Hugging Face.

    The other formats export the model, with a model card; it is written only if it agrees with the original. `onnx` \
and `onnx-int8`: one graph from tokens and terms to calibrated probabilities, and a program that needs no al-pipeline. \
`mlflow`: for `mlflow.pyfunc`, without pickle. `huggingface`: for transformers, with safetensors.
    """
    from al_pipeline.operations.export import export as export_labels
    from al_pipeline.operations.history import round_number

    wanted = None if number is None else round_number(number)
    if output_format in ("onnx", "onnx-int8", "mlflow", "huggingface"):
        return _export_model(out, output_format, wanted, test, license_name, force, as_json)
    if license_name is not None:
        raise UsageError("--license is for models; leave it out with labels")
    done = export_labels(current_workspace(), out, output_format, wanted, test=test, force=force)
    if done.waiting:
        warn(f"{done.waiting} interventions on labels are not in {done.round} yet; the next `al round` applies them")
    if as_json:
        return print_json(asdict(done))
    echo(f"{done.rows:,} labels of {done.round} written to {escape(done.out)}")


def _export_model(
    out: Path, form: str, number: int | None, test: bool, license_name: str | None, force: bool, as_json: bool
) -> None:
    from al_pipeline.serving.model_export import export_model

    if test:
        raise UsageError("--test is for labels; leave it out with a model")
    more = {} if license_name is None else {"license_name": license_name}
    done = export_model(current_workspace(), out, form, number, force=force, **more)
    if as_json:
        return print_json(asdict(done))
    echo(f"The model of {done.round} was written to {escape(done.out)}: {done.agreement}")
