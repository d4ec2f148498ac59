"""`al certify`: what random labels prove about a model."""

from __future__ import annotations

from typing import Annotated

import typer
from msgspec.structs import asdict

from al_pipeline.cli.options import Json, Reason, current_workspace
from al_pipeline.cli.output import echo, escape, print_json
from al_pipeline.errors import UsageError


def certify(
    target: Annotated[float, typer.Option(help="The value that the metric has to reach: above 0, below 1.")],
    metric: Annotated[
        str, typer.Option(help="accuracy, macro_f1, recall:CLASS, precision:CLASS or f1:CLASS.")
    ] = "accuracy",
    confidence: Annotated[float, typer.Option(help="1 minus the probability of a wrong certificate.")] = 0.95,
    number: Annotated[
        str | None, typer.Option("--round", help="The model of this round: 7 or round-0007. Default: the promoted one.")
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Ask as many random test items as are lacking, with the next round.")
    ] = False,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Certify that a model reaches a target, by random labels alone, or say how many are lacking.

    Uses the labels of the test set, drawn at random and never trained on. The certificate stays valid however \
often you look, add labels and look again, and whichever of the published models you look at: the probability that any \
certificate of the workspace is wrong is at most 1 - confidence. That costs labels: the bound lies below the interval \
of the report. It speaks of texts like those of the pool. Macro-F1 is bounded by way of each class, so it needs many \
labels where classes are many or rare.

    Exits with 0 if certified, 1 if not.
    """
    from al_pipeline.operations.certify import ask_lacking
    from al_pipeline.operations.certify import certify as certify_model
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.intervene import dvc_for_intervention

    workspace = current_workspace()
    if ask:
        if number is not None:
            raise UsageError("--ask is for the promoted model; leave out --round")
        with dvc_for_intervention(workspace) as dvc:
            asked = ask_lacking(workspace, dvc, metric, target, confidence, reason or f"certify {metric} {target:g}")
        if as_json:
            return print_json({"asked": asked})
        echo(f"{asked:,} random test items are asked with the next round, besides those that the open round asks")
        return
    found = certify_model(workspace, metric, target, confidence, None if number is None else round_number(number))
    certificate = found.certificate
    if as_json:
        print_json({"round": found.round, "waiting": found.waiting, "unasked": found.unasked, **asdict(certificate)})
    else:
        color = "green" if certificate.certified else "yellow"
        echo(f"{found.round}: [{color}]{escape(certificate.sentence())}[/]")
        if certificate.lacking and found.waiting:
            echo(f"{found.waiting:,} test items are asked in the open round")
        if certificate.lacking and certificate.lacking > found.waiting:
            where = f"{found.unasked:,} test items were never asked; --ask asks those that are lacking"
            echo(where if found.unasked else "all test items were asked; `al ingest FILE --test` adds others")
    if not certificate.certified:
        raise typer.Exit(1)
