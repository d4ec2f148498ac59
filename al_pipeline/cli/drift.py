"""`al drift`: whether new texts differ from the pool."""

from __future__ import annotations

import re
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import Encoding, IdColumn, InputFormat, Json, TextColumn, current_workspace
from al_pipeline.cli.output import echo, escape, print_json, print_table, warn
from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from al_pipeline.operations.drift import FileDrift

ALARM = 6
"""The exit code if the texts differ."""
_SHOWN = 100
_SECONDS = {"d": 86_400, "h": 3600, "m": 60}

Files = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[FILE]",
        help="CSV, JSONL, Parquet or XLSX, a folder of them, or - for standard input. Default: the requests that "
        "`serve.log` has kept.",
    ),
]


def drift(
    files: Files = None,
    since: Annotated[
        str | None,
        typer.Option(help="Only requests kept since then: 7d, 12h, 30m, or a time such as 2026-11-30T08:00."),
    ] = None,
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    encoding: Encoding = None,
    input_format: InputFormat = None,
    as_json: Json = False,
) -> None:
    """Compare new texts with the pool: what is new in them, and how accurate the promoted model probably is on them.

    Exits with 0 if they do not differ and with 6 if they do; if nothing has changed, that happens in 3 % of calls at \
most.
    """
    from al_pipeline.data.inputs import open_inputs
    from al_pipeline.operations.drift import drift as measure
    from al_pipeline.operations.drift import kept_requests
    from al_pipeline.operations.predict import read_texts

    workspace = current_workspace()
    if not files:
        kept = kept_requests(workspace, 0.0 if since is None else _moment(since))
        return _show(measure(workspace, kept, store=False), as_json)
    if since is not None:
        raise UsageError("--since is for kept requests; leave it out with a file")
    with open_inputs(files, input_format, encoding) as inputs:
        for note in inputs.notes:
            warn(note)
        found = measure(workspace, read_texts(inputs.sources, text_column, id_column, warn), store=True)
    _show(found, as_json)


def _moment(text: str) -> float:
    """A time as seconds since 1970: so many days, hours or minutes ago, or in ISO 8601, by this machine's clock."""
    if ago := re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([dhm])", text.strip(), re.ASCII):
        return time.time() - float(ago[1]) * _SECONDS[ago[2]]
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(f"--since {text!r} is no time; write 7d, 12h, 30m, or 2026-11-30T08:00") from None


def _show(found: FileDrift, as_json: bool) -> None:
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)
    if found.drift.alarm:
        raise typer.Exit(ALARM)


def _print(found: FileDrift) -> None:
    one = found.drift
    more = "" if one.window == found.distinct else f", a random sample of {found.distinct:,}"
    echo(
        f"[bold]{one.window:,} texts[/]{more} ({found.rows:,} rows) compared with {one.reference:,} of the pool, by "
        f"the model of {found.round}"
    )
    if one.alarm:
        echo(f"[red]They differ[/] by {', '.join(one.found)}.")
    else:
        echo("[green]No difference was found.[/]")
    _print_tests(found)
    _print_classes(found)
    _print_new(found)
    accuracy = one.accuracy
    if accuracy.value is None:
        echo(f"estimated accuracy: none, since {escape(accuracy.reason)}")
    else:
        echo(
            f"estimated accuracy without labels: [bold]{accuracy.value:.3f}[/] ({accuracy.low:.3f}–{accuracy.high:.3f})"
        )
    if found.on_requests is not None:
        echo(f"with labels: {escape(found.on_requests.sentence())}")


def _print_tests(found: FileDrift) -> None:
    one, auc = found.drift, found.drift.domain
    told = {"domain classifier": f"AUC {auc.auc:.3f} (0.5 is chance), p {auc.auc_p:.3f} of the AUC alone"}
    told["vocabulary"] = f"{len(one.vocabulary.words):,} of {one.vocabulary.tested:,} words are more frequent"
    rows = [[name, f"{p:.3f}", told.get(name, "")] for name, p in one.p_values.items()]
    print_table(("test", "p", "found"), rows)
    if one.classes is None:
        echo("Predicted classes were not compared: the test set is too small.")


def _print_classes(found: FileDrift) -> None:
    shift = found.drift.classes
    if shift is None:
        return
    sizes = max(1, sum(shift.reference)), max(1, sum(shift.window))
    rows = [
        [escape(name), f"{theirs / sizes[0]:.1%}", f"{mine / sizes[1]:.1%}"]
        for name, theirs, mine in zip(found.drift.names, shift.reference, shift.window, strict=True)
    ]
    print_table(("predicted class", "test set", "these texts"), rows)


def _print_new(found: FileDrift) -> None:
    one = found.drift
    words = one.words()
    if words:
        print_table(
            ("new word", "these texts", "pool", "example"),
            [
                [escape(word.word), f"{word.window:,}", f"{word.reference:,}", _shown(one.examples(word)[0]["text"])]
                for word in words
            ],
        )
    if "domain classifier" in one.found:
        print_table(("least like the pool", "text"), [[escape(row["id"]), _shown(row["text"])] for row in one.newest()])


def _shown(text: str) -> str:
    return escape(" ".join(text.split())[:_SHOWN])
