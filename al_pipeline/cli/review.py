"""`al review`: labels put before reviewers, and what their rulings say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import Json, current_workspace
from al_pipeline.cli.output import echo, escape, print_head, print_json

if TYPE_CHECKING:
    from al_pipeline.evaluation.figures import Estimate
    from al_pipeline.operations.review_figures import Review


def review(
    size: Annotated[
        int | None, typer.Option(help="Open tasks of reviewers to fill up to. Default: quality.review_size.", min=1)
    ] = None,
    annotator: Annotated[
        str | None, typer.Option(help="Add random answers of this person (e-mail address), as many as --size says.")
    ] = None,
    accept_vanished: Annotated[
        bool, typer.Option("--accept-vanished", help="Accept a large number of deleted rulings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pull reviewers' rulings, put further labels before them, and show the error rate of the labels.

    Reviewers work in a Label Studio project of their own, where they see the text and the answers of the annotators, \
and decide. What most deserves it comes first: disagreement, low confidence, likely errors by a model that does not \
know the label. In turn with these come items of a random sample, which give the error rate of the labelled set and of \
the test set, with its interval. The reason is in our records alone.

    A ruling overrules all answers to its item from the next round on: the newest one counts, also after a rollback, \
until `al labels revoke --item ITEM`. Only rulings of people under `reviewers` in params.yaml count. Ticks pull \
rulings too; with `quality.review_each_tick: true` they also fill up the tasks. Exits with 3 if nothing is left to \
review.
    """
    from al_pipeline.operations.connect import connect
    from al_pipeline.operations.intervene import dvc_for_intervention
    from al_pipeline.operations.review import review as put_before_reviewers

    workspace = current_workspace()
    with dvc_for_intervention(workspace) as dvc:
        found = put_before_reviewers(
            workspace, dvc, lambda: connect(workspace), size=size, annotator=annotator, accept_vanished=accept_vanished
        )
    if as_json:
        return print_json(
            {
                "pulled": found.pulled,
                "refused": dict(found.refused),
                "added": dict(found.added),
                "waiting": found.waiting,
                "page": found.page,
                "review": found.figures.to_json(),
            }
        )
    if found.pulled:
        echo(f"[green]Pulled {found.pulled:,} rulings[/]; they count from the next round on.")
    for reason, count in found.refused.items():
        echo(f"[yellow]Refused {count}:[/] {escape(reason)}")
    if found.added:
        said = ", ".join(f"{count} {escape(reason)}" for reason, count in sorted(found.added.items()))
        echo(f"[green]Added {sum(found.added.values()):,} tasks:[/] {said}")
    if found.waiting and found.page:
        echo(f'{found.waiting:,} tasks wait for reviewers: {escape(found.page)} ("Label All Tasks")')
    print_review(found.figures)


def print_review(found: Review) -> None:
    """The error rates, the rulings, and what contradicts them."""
    from al_pipeline.operations.review_figures import error_rate_sentence

    for part, rate in found.rates.items():
        if rate.labels:
            echo(escape(error_rate_sentence(part, rate)))
    if found.ruled:
        skipped = f"; {found.without:,} without a ruling" if found.without else ""
        own = f"; {found.own:,} on items that only the reviewer had answered" if found.own else ""
        echo(f"rulings: {found.ruled:,}, of which {found.changed:,} changed the label{skipped}{own}")
    people = [[one.annotator, f"{one.wrong:,} of {one.reviewed:,}", _share(one.rate)] for one in found.people]
    if people:
        echo("[bold]wrong answers[/], of those drawn at random and reviewed")
        print_head(("annotator", "wrong", "rate"), people, most=20)
    rows = [[one.item_id, one.label, one.by, ", ".join(one.contradicts)] for one in found.contradictions]
    if rows:
        echo("[yellow]rulings that other rulings or gold labels contradict[/] (the newest counts)")
        print_head(("item", "ruling", "by", "others say"), rows, most=10)


def _share(rate: Estimate) -> str:
    return f"{rate.value:.2f} ({rate.low:.2f} to {rate.high:.2f})"
