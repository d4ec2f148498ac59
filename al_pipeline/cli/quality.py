"""`al quality`: how good the labels are, and how each annotator works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import Json, current_workspace
from al_pipeline.cli.output import echo, escape, print_head, print_json, print_table

if TYPE_CHECKING:
    from al_pipeline.evaluation.figures import Estimate
    from al_pipeline.quality.agreement import Agreement
    from al_pipeline.quality.assessment import Confusion, Quality


def quality(
    number: Annotated[
        str | None, typer.Option("--round", help="Only answers to tasks of this round: 7 or round-0007.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how good the labels are: agreement, each annotator's accuracy and speed, and who or what needs attention.

    Compares the answers of people who labelled the same items, those pulled since the last round included.
    """
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.quality import quality as measure

    found = measure(current_workspace(), None if number is None else round_number(number))
    if as_json:
        return print_json(found.to_json())
    _print_project(found)
    _print_people(found)
    _print_confusions(found)
    _print_remarks(found)


def _print_project(found: Quality) -> None:
    echo(
        f"[bold]{found.answers:,} answers[/] and {found.skips:,} skips by {len(found.people):,} people; "
        f"{found.shared:,} of {found.items:,} items have answers of two or more"
    )
    if found.guess_shown:
        echo(
            f"[yellow]{found.guess_shown:,} answers were given with the model's guess shown:[/] people agree more then"
        )
    rows = [["all", *_agreement(found.agreement)]]
    if len(found.rounds) > 1:
        rows += [[f"round {one.round}", *_agreement(one.agreement)] for one in found.rounds]
    rows += [
        [f"class {name}", "", "", "", _estimate(one), ""]
        for name, one in zip(found.classes, found.agreement.classes, strict=True)
        if one.value is not None and len(found.classes) > 2
    ]
    header = ("agreement", "items", "answers", "equal answers", "Krippendorff's alpha", "Fleiss' kappa")
    print_head(header, rows, most=40)
    if (reason := found.agreement.alpha.reason) is not None:
        echo(f"Agreement is not defined: {escape(reason)}.")


def _agreement(one: Agreement) -> list[str]:
    return [f"{one.items:,}", f"{one.answers:,}", *(_estimate(value) for value in (one.share, one.alpha, one.kappa))]


def _print_people(found: Quality) -> None:
    cap = "" if found.cap_seconds is None else f"; an answer counts for {found.cap_seconds:.0f} s at most"
    echo(f"[bold]annotators[/]: median seconds of an answer{cap}")
    has_gold = any(one.gold_answers for one in found.people)
    rows = [
        [
            one.name,
            f"{one.answers:,}",
            f"{one.skips:,}",
            "–" if one.seconds is None else f"{one.seconds:.1f}",
            f"{one.compared:,}",
            _estimate(one.agreement),
            _estimate(one.accuracy),
            *([f"{_estimate(one.gold)} of {one.gold_answers}" if one.gold_answers else "–"] if has_gold else []),
        ]
        for one in found.people
    ]
    header = ("annotator", "answers", "skips", "seconds", "compared", "agrees with the others", "estimated accuracy")
    print_table((*header, "right on gold") if has_gold else header, rows)
    pairs = [
        [one.first, one.second, f"{one.items:,}", _estimate(one.kappa)]
        for one in sorted(found.pairs, key=lambda one: (one.kappa.value is None, one.kappa.value))
    ]
    if pairs:
        echo("[bold]pairs of annotators[/], the lowest kappa first")
        print_head(("", "", "items of both", "Cohen's kappa"), pairs, most=10)


def _print_confusions(found: Quality) -> None:
    rows = [
        [
            f"{one.first} – {one.second}",
            f"{one.wrong:,} of {one.answers:,}",
            _estimate(one.rate),
            f"{one.people}",
            _cause(one),
        ]
        for one in found.confusions
    ]
    if rows:
        echo("[bold]confused classes[/]: by several people (guideline), or only by those who are named (training)")
        print_head(("classes", "answers", "rate", "people", "cause"), rows, most=10)


def _cause(one: Confusion) -> str:
    return one.cause + (f": {', '.join(one.annotators)}" if one.annotators else "")


def _print_remarks(found: Quality) -> None:
    for one in found.remarks:
        echo(f"[yellow]{escape(one.annotator)}[/] {escape(one.evidence)}")
    if found.note:
        echo(f"Nobody is named: {escape(found.note)}.")
    elif not found.remarks:
        echo("Nobody stands out.")


def _estimate(estimate: Estimate) -> str:
    if estimate.value is None:
        return "–"
    ends = "" if estimate.low is None else f" ({estimate.low:.2f} to {estimate.high:.2f})"
    return f"{estimate.value:.2f}{ends}"
