"""Commands about published rounds: reproduce one, compare two, show an item's history."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import Json, current_workspace
from al_pipeline.cli.output import echo, escape, print_head, print_json, print_table, spinner
from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from al_pipeline.evaluation.figures import Estimate
    from al_pipeline.operations.diff import Diff
    from al_pipeline.operations.log import Entry
    from al_pipeline.operations.reproduction.result import Reproduction


def reproduce(
    number: Annotated[str | None, typer.Argument(metavar="ROUND", help="7 or round-0007. Default: the latest.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every published round, one after another.")] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="recorded|PATH",
            help="If another engine version built the round, `recorded` installs that version in an environment of its "
            "own and uses it. PATH: its sources, a checkout or a wheel, if they are not the ones running now.",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Allowed change of a metric if another engine version rebuilds the round.")
    ] = 0.02,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the clones for inspection until the next call.")] = False,
    as_json: Json = False,
) -> None:
    """Rebuild published rounds in a fresh clone, from the DVC remote alone, and compare every byte.

    Changes nothing in the workspace. Exits with 6 if a round differs, naming the stage and the first cause (data, \
features, parameters, engine), and with 5 if objects are missing from the remote.
    """
    from al_pipeline.operations.history import round_number
    from al_pipeline.operations.reproduce import failure
    from al_pipeline.operations.reproduce import reproduce as run

    if number is not None and everything:
        raise UsageError("name either a ROUND or `--all`, not both")
    numbers = None if everything else [] if number is None else [round_number(number)]
    made = []
    with spinner(not as_json) as on_progress:
        for one in run(
            current_workspace(), numbers, engine=engine, tolerance=tolerance, keep=keep, on_progress=on_progress
        ):
            made.append(one)
            if not as_json:
                _print_reproduction(one, details=not everything or one.difference is not None)
    error = failure(made)
    if as_json:
        print_json({"ok": error is None, "rounds": [{**asdict(one), "ok": one.difference is None} for one in made]})
        raise typer.Exit(error.exit_code if error else 0)
    if error:
        raise error


def _print_reproduction(one: Reproduction, details: bool) -> None:
    equal = sum(not output.different for output in one.outputs)
    how = f"{equal} of {len(one.outputs)} outputs byte-identical"
    if one.compared == "metrics":
        how = "metrics compared, not bytes, because another engine version built it"
    mark = "[green]✓[/]" if one.difference is None else "[red]✗[/]"
    echo(f"{mark} [bold]round-{one.round:04d}[/], rebuilt in a fresh clone: {how} ({one.seconds:.1f} s)")
    if one.engine:
        echo(f"    engine: {escape(one.engine)}")
        echo("    `--engine recorded` installs the version that built it in its own environment and compares bytes")
    if details and one.metrics:
        print_table(
            ("metric", "recorded", "rebuilt", ""),
            [
                [m.name, _shown(m.recorded), _shown(m.reproduced), "" if m.within_tolerance else "changed"]
                for m in one.metrics
            ],
        )
    if details and one.outputs:
        print_table(
            ("output", "stage", "rebuilt (SHA-256)", ""),
            [
                [o.name, o.stage, o.sha256[:16], f"differs from {', '.join(o.different)}" if o.different else "equal"]
                for o in one.outputs
            ],
        )
    if one.difference is not None:
        where = f"stage {one.difference.stage}" if one.difference.stage else "before any stage"
        echo(f"    [red]{where}, cause: {one.difference.cause}.[/] {escape(one.difference.message)}")
    if one.folder:
        echo(f"    the clone is in {escape(one.folder)} until the next `al reproduce`")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A round: 7 or round-0007.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another round.")],
    as_json: Json = False,
) -> None:
    """Compare two published rounds: labels and annotators, parameters, metrics with intervals, predictions."""
    from al_pipeline.operations.diff import diff as compare
    from al_pipeline.operations.history import round_number

    found = compare(current_workspace(), round_number(before), round_number(after))
    if as_json:
        return print_json(found.to_json())
    _print_label_changes(found)
    echo(f"[bold]parameters[/]: {len(found.params)} changed")
    print_head(("key", "before", "after"), [[key, str(old), str(new)] for key, (old, new) in found.params.items()])
    _print_model_changes(found)


def _print_label_changes(found: Diff) -> None:
    kinds = {kind: sum(change.kind == kind for change in found.labels) for kind in ("added", "changed", "removed")}
    echo("[bold]labels[/]: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    rows = [
        [
            change.kind,
            change.item_id,
            f"{change.before or '–'} → {change.after or '–'}",
            ", ".join(change.annotators),
            ", ".join("imported" if number < 0 else str(number) for number in change.rounds),
            "; ".join(dict.fromkeys(change.events)),
        ]
        for change in found.labels
    ]
    print_head(("", "item", "label", "by", "asked in round", "events"), rows)


def _print_model_changes(found: Diff) -> None:
    echo(f"[bold]metrics[/]; differences are on the {found.models.items} test items scored by both models")
    rows = [
        [name, _estimate(old), _estimate(new), _estimate(found.models.differences[name], "+.3f")]
        for name, (old, new) in found.metrics.items()
    ]
    print_table(("metric", "before", "after", "difference"), rows)
    echo(f"[bold]predictions[/]: {len(found.models.flips)} test items flipped")
    rows = [
        [
            flip.item_id,
            flip.label,
            f"{flip.before} {flip.before_probability:.2f}",
            f"{flip.after} {flip.after_probability:.2f}",
        ]
        for flip in found.models.flips
    ]
    print_head(("item", "label", "before", "after"), rows)


def _estimate(estimate: Estimate, form: str = ".3f") -> str:
    if estimate.value is None:
        return "–"
    ends = "" if estimate.low is None else f" ({estimate.low:{form}} to {estimate.high:{form}})"
    return f"{estimate.value:{form}}{ends}"


_DETAILS = (
    *(
        "file",
        "rank",
        "score",
        "strategy",
        "probability",
        "live",
        "model",
        "answers_known",
        "asked_at",
        "agreement",
        "answers",
        "kind",
        "reason",
        "result",
    ),
    *("updated_at", "in"),
)
"""The details of an entry that `al log` shows; `--json` has all."""


def log(
    item: Annotated[str, typer.Argument(metavar="ITEM", help="Item id.")],
    as_json: Json = False,
) -> None:
    """Show the whole history of an item: ingested, asked, answered, labelled, predicted, and by whom."""
    from al_pipeline.operations.log import log as read_log

    found = read_log(current_workspace(), item)
    if as_json:
        return print_json(asdict(found))
    text = " ".join((found.text or "").split())
    echo(f"[bold]{escape(found.item_id)}[/] ({found.part or 'no longer in the data'}): {escape(text[:300])}")
    print_table(("round", "what", "by", "details"), [_entry(entry) for entry in found.entries])


def _entry(entry: Entry) -> list[str]:
    """An entry of an item's history as a row: round, what, by whom, details."""
    details = entry.details
    what = " ".join(str(word) for word in (entry.what, details.get("label")) if word is not None)
    shown = [
        f"{name.replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name in _DETAILS
        if (value := details.get(name)) is not None
    ]
    unpublished = "" if entry.what == "ingested" else "open"
    number = unpublished if entry.round is None else str(entry.round)
    return [number, what, str(details.get("annotator") or ""), ", ".join(shown)]
