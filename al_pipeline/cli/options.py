"""Options that several commands share, the global options, and how their values are parsed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from al_pipeline.workspace.workspace import Workspace

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Reason = Annotated[str, typer.Option(help="Reason, recorded in git.")]
Encoding = Annotated[
    str | None,
    typer.Option(help="Encoding of the input: cp1252, gb18030, utf-16, … Default: detected; refused if unclear."),
]
InputFormat = Annotated[
    str | None,
    typer.Option("--input-format", help="csv, jsonl, parquet or xlsx. Default: detected from content and name."),
]
TEST_SIZES = "Labelled, 200 of them measure an accuracy of 90 % to ±4 points, 500 to ±3, 2,000 to ±1."
"""What the size of a test set buys, as half the width of the interval that `evaluate` gives."""
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change without changing anything.")]
TextColumn = Annotated[str, typer.Option(help="Column with the text.")]
IdColumn = Annotated[str | None, typer.Option(help="Column with your ids. Default: `id`, if there is one.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation; required without a terminal.")]


class Invocation:
    """The global options of this call of `al`."""

    folder: Path | None = None
    """The workspace that `-C` names; None: the one that contains the current folder."""
    read_only: bool = True
    """Whether the command only shows something; it then fails if its output cannot be written."""


def current_workspace() -> Workspace:
    """The workspace that the command works in. Raises NotAWorkspace."""
    from al_pipeline.workspace.workspace import open_workspace

    return open_workspace(Invocation.folder)


def original_workspace() -> Workspace:
    """The same, unless it is a copy, which would share its servers with the original. Raises CopiedWorkspace too."""
    from al_pipeline.workspace.identity import refuse_copy

    workspace = current_workspace()
    refuse_copy(workspace.layout)
    return workspace


def parse_list(text: str, option: str) -> list[str]:
    """The comma-separated values of an option; as in CSV, a value that contains commas is in double quotes.

    Raises UsageError.
    """
    import csv

    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UsageError(f"{option} {text!r} is not a comma-separated list of names: {error}") from None
    return [part.strip() for part in rows[0]] if rows else []
