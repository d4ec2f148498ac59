"""`al labels`: which answers count. Both commands select answers in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.interventions import carry_out
from al_pipeline.cli.options import DryRun, Json, Reason, current_workspace

if TYPE_CHECKING:
    from al_pipeline.rounds.interventions import Kind

app = typer.Typer(
    no_args_is_help=True,
    help="Exclude single answers from the labelled set, or include them again; nothing is deleted.",
)

Annotator = Annotated[str | None, typer.Option(help="Only answers by this annotator (e-mail address).")]
OfRound = Annotated[str | None, typer.Option("--round", help="Only answers to tasks of this round.")]
Since = Annotated[str | None, typer.Option(help="Only answers given or changed since this time (UTC).")]
Item = Annotated[str | None, typer.Option(help="Only answers about this item.")]
Label = Annotated[str | None, typer.Option(help="Only answers with this label.")]


@app.command()
def revoke(
    annotator: Annotator = None,
    number: OfRound = None,
    since: Since = None,
    item: Item = None,
    label: Label = None,
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Quarantine answers: they are kept but no longer count. An answer must meet all conditions given."""
    _amend("revoke", annotator, number, since, item, label, reason, dry_run, as_json)


@app.command()
def restore(
    annotator: Annotator = None,
    number: OfRound = None,
    since: Since = None,
    item: Item = None,
    label: Label = None,
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Let quarantined answers count again. An answer must meet all conditions given."""
    _amend("restore", annotator, number, since, item, label, reason, dry_run, as_json)


def _amend(
    kind: Kind,
    annotator: str | None,
    number: str | None,
    since: str | None,
    item: str | None,
    label: str | None,
    reason: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.intervene import amend, dvc_for_intervention
    from al_pipeline.records import Selection

    workspace = current_workspace()
    who = None if annotator is None else annotator.strip().lower()
    selection = Selection(who, None if number is None else round_number(number), item, since, label)
    with dvc_for_intervention(workspace, dry_run=dry_run) as dvc:
        change = amend(workspace, dvc, kind, selection, reason, dry_run=dry_run)
    carry_out(workspace, change, dry_run, as_json)
