"""`al certify` and `al finish`: what random labels prove about a model, and the labels that it may give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import DryRun, Json, Reason, current_workspace
from al_pipeline.cli.output import echo, escape, print_json, print_table, progress_bar
from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from al_pipeline.operations.finish import Finished

NOT_CERTIFIED = 6
"""The exit code without a certificate: a person has to decide."""


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

    Exits with 0 if certified, with 6 if not.
    """
    from msgspec.structs import asdict

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
        raise typer.Exit(NOT_CERTIFIED)


def finish(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write: .csv, .jsonl or .parquet.")] = None,
    bound: Annotated[float, typer.Option(help="The error rate that the model's labels of each class may have.")] = 0.05,
    confidence: Annotated[float, typer.Option(help="1 minus the probability that a bound is wrong.")] = 0.95,
    output_format: Annotated[
        str | None, typer.Option("--format", metavar="csv|jsonl|parquet", help="Default: by the extension of --out.")
    ] = None,
    dry_run: DryRun = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Label the rest of the pool by the promoted model, where a bound on its errors is proved, and write all labels.

    For each class, the test set's random labels show from which confidence on the model's answers are wrong in at \
most --bound. These items get the model's label; all others are left empty, for people. Each row says its source \
(`people` or `model`), the confidence and the bound.

    The model's labels are in that file alone: nothing is trained on them, and deleting it takes them back. Refused, \
with what is lacking, if the bound cannot be shown for any class (exit code 3).
    """
    from msgspec import to_builtins

    from al_pipeline.operations.finish import finish as label_rest

    if (out is None) != dry_run:
        raise UsageError("give --out FILE, or --dry-run to see what would be written")
    workspace = current_workspace()
    with progress_bar("labelling", not as_json) as on_progress:
        found = label_rest(
            workspace, out, output_format, bound=bound, confidence=confidence, force=force, progress=on_progress
        )
    if as_json:
        return print_json(to_builtins(found))
    _print_finished(found)


def _print_finished(found: Finished) -> None:
    rows = [
        [
            rule.label,
            "–" if rule.threshold is None else f"{rule.threshold:.2f}",
            f"{rule.wrong:,} of {rule.tested:,}",
            "–" if rule.error is None else f"{rule.error:.1%}",
            f"{found.by_class[rule.label]:,}",
        ]
        for rule in found.rules
    ]
    print_table(("class", "from confidence", "wrong random items", "error at most", "labels of the model"), rows)
    what = f"{found.people:,} labels of people, {found.model:,} of the model of {found.round}, {found.left:,} left open"
    echo(f"{what}; would be written with --out FILE" if found.out is None else f"{escape(found.out)}: {what}")
    for rule in found.rules:
        if rule.threshold is None:
            more = "no number of labels shows it" if rule.lacking is None else f"about {rule.lacking:,} more show it"
            echo(f"[yellow]{escape(rule.label)}[/]: the bound is not shown; {more} (random labels: `al certify --ask`)")
