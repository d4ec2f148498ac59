"""Options that several commands share, the global ones among them, and how their values are parsed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from al_pipeline.workspace.workspace import Workspace

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


class Invocation:
    """This call of `al`: its global options."""

    folder: Path | None = None
    """The workspace that `-C` names; None for the one around the current folder."""
    read_only: bool = True
    """Whether the command does nothing but show: then it failed where its output could not be written."""


def current_workspace() -> Workspace:
    """The workspace that the command works in. Raises NotAWorkspace."""
    from al_pipeline.workspace.workspace import open_workspace

    return open_workspace(Invocation.folder)


def original_workspace() -> Workspace:
    """The same for a command that acts on servers, which a copy of the folder would share with its original."""
    from al_pipeline.workspace.identity import refuse_copy

    workspace = current_workspace()
    refuse_copy(workspace.layout)
    return workspace


def parse_list(text: str, option: str) -> list[str]:
    """What stands between the commas of an option; a part with commas of its own in double quotes, as in CSV.

    Raises UsageError.
    """
    import csv

    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UsageError(f"{option} {text!r} is no list of names divided by commas: {error}") from None
    return [part.strip() for part in rows[0]] if rows else []
