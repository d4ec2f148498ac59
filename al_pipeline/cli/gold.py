"""`al gold`: items whose right label is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from al_pipeline.cli.options import Encoding, InputFormat, Json, TextColumn, current_workspace
from al_pipeline.cli.output import echo, escape, print_head, print_json
from al_pipeline.errors import UsageError

app = typer.Typer(
    no_args_is_help=True,
    help="Items with known labels, asked among all others to measure how accurate each annotator is.",
)

Train = Annotated[
    bool, typer.Option("--train", help="Also train on these labels. Without it, gold is never trained on.")
]


@app.command()
def add(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="CSV, JSONL, Parquet or XLSX with texts (or ids) and labels; - reads standard input."
        ),
    ] = None,
    reviewed: Annotated[
        bool, typer.Option("--reviewed", help="Take the pool's items with an undisputed ruling of a reviewer.")
    ] = False,
    text_column: TextColumn = "text",
    id_column: Annotated[str, typer.Option(help="Column with ids of items, for rows without a text.")] = "id",
    label_column: Annotated[str, typer.Option(help="Column with the right label.")] = "label",
    train: Train = False,
    input_format: InputFormat = None,
    encoding: Encoding = None,
    as_json: Json = False,
) -> None:
    """Make items gold: asked like any other item, but with a known right label.

    With `quality.gold_share: 0.1` in params.yaml, every later round has one gold task for ten others, spread over the \
queue, and five more among its first tasks while somebody has answered fewer than five. Nothing in Label Studio \
tells them from others. New texts enter the pool. Gold is never in the test set and, without --train, never trained \
on. Once everybody has answered an item, it is not asked again. `al quality` shows each annotator's accuracy on gold; \
`al status` names those below `quality.min_gold`, whose later answers `quality.hold: true` holds for review.
    """
    from al_pipeline.operations.gold import add as add_gold
    from al_pipeline.operations.gold import add_reviewed
    from al_pipeline.operations.intervene import dvc_for_intervention

    if (file is None) != reviewed:
        raise UsageError("give a file, or --reviewed")
    workspace = current_workspace()
    with dvc_for_intervention(workspace) as dvc:
        if file is None:
            found = add_reviewed(workspace, dvc, train=train)
        else:
            found = add_gold(
                workspace,
                dvc,
                file,
                text_column=text_column,
                id_column=id_column,
                label_column=label_column,
                train=train,
                format=input_format,
                encoding=encoding,
            )
    if as_json:
        return print_json({"gold": found.gold, "known": found.known, "labelled": found.labelled})
    echo(f"[green]{found.gold:,} items are gold[/] from the next round on; {found.known:,} were already")
    if found.labelled:
        echo(f"[yellow]{found.labelled:,} of them had a label, which is no longer trained on;[/] --train keeps it")
    if not workspace.params.quality.gold_share:
        echo("[yellow]quality.gold_share in params.yaml is 0, so no round asks them;[/] 0.1 is usual")


@app.command()
def remove(
    items: Annotated[list[str], typer.Argument(metavar="ITEM", help="Ids of gold items.")], as_json: Json = False
) -> None:
    """Let items be gold no longer. Their answers then count like all others, from the next round on."""
    from al_pipeline.operations.gold import remove as remove_gold
    from al_pipeline.operations.intervene import dvc_for_intervention

    workspace = current_workspace()
    with dvc_for_intervention(workspace) as dvc:
        count = remove_gold(workspace, dvc, items)
    if as_json:
        return print_json({"removed": count})
    echo(f"[green]{count:,} items are no longer gold.[/]")


@app.command("list")
def show(as_json: Json = False) -> None:
    """List the gold items with their labels, and each annotator's accuracy on them."""
    from al_pipeline.operations.gold_list import gold_list

    items, found = gold_list(current_workspace())
    if as_json:
        return print_json({"items": items, "people": [] if found is None else found.to_json()["people"]})
    rows = [[one["item"], one["label"], "yes" if one["train"] else "", f"{one['answers']:,}"] for one in items]
    print_head(("item", "label", "trained on", "answers"), rows, most=40)
    for one in () if found is None else found.people:
        echo(f"{escape(one.annotator)} {escape(one.sentence())}")
    if not rows:
        echo("There is no gold; `al gold add FILE` makes items gold.")
