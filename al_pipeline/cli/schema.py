"""`al schema`: change the classes while answers use them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.interventions import print_published, print_unfinished, publish_change
from al_pipeline.cli.options import DryRun, Json, Reason, current_workspace, parse_list
from al_pipeline.cli.output import echo, escape, print_json, print_table
from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from al_pipeline.operations.class_changes import Effect

app = typer.Typer(
    no_args_is_help=True,
    help="Change the classes while answers use them: rename, merge, split, retire, add.\n\n"
    "Answers are mapped by each fold and never edited, so that [bold]al schema undo[/] takes the last change back. "
    "params.yaml, Label Studio and the open tasks follow, and a round is published with the change at once.",
)

_INTO = "INTO"


@app.command()
def rename(
    old: Annotated[str, typer.Argument(metavar="OLD", help="The class.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Give a class another name; its answers, description and hotkey stay.

    Example: [bold]al schema rename spam junk[/]
    """
    _change("rename", [old], [new], reason, dry_run, as_json)


@app.command()
def merge(
    words: Annotated[
        list[str], typer.Argument(metavar="A,B INTO C", help="The classes, the word INTO, the class that they become.")
    ],
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make one class of several, such as a new one or one of them.

    Two people who said A and B then agree. Example: [bold]al schema merge spam,fraud INTO unwanted[/]. A name with a \
comma or a blank is quoted: [bold]al schema merge '"good, not great",good' INTO good[/]
    """
    old, new = _sides(words, "al schema merge A,B INTO C")
    if len(new) != 1:
        raise UsageError("a merge leads to one class: `al schema merge A,B INTO C`")
    _change("merge", old, new, reason, dry_run, as_json)


@app.command()
def split(
    words: Annotated[
        list[str], typer.Argument(metavar="A INTO B,C", help="The class, the word INTO, the classes that replace it.")
    ],
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Replace a class by several, new or existing ones; its items lose their label and are asked again.

    They come first in the next batches, those of which the model is least certain at the head. Items of the test set \
are asked again too. Example: [bold]al schema split misc INTO travel,food[/]
    """
    old, new = _sides(words, "al schema split A INTO B,C")
    if len(old) != 1:
        raise UsageError("one class is split at a time: `al schema split A INTO B,C`")
    _change("split", old, new, reason, dry_run, as_json)


@app.command()
def retire(
    name: Annotated[str, typer.Argument(metavar="A", help="The class.")],
    ask_again: Annotated[
        bool, typer.Option("--ask-again", help="Ask its items again, to be sorted into the other classes.")
    ] = False,
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Take a class out of use. Its items lose their label and are ignored: they fit no other class.

    With [bold]--ask-again[/] they are asked again instead. Example: [bold]al schema retire misc[/]
    """
    _change("retire", [name], [], reason, dry_run, as_json, again=ask_again)


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="D", help="The new class.")],
    reason: Reason = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Add a class, at the end of the list. Answers given so far stay as they are.

    Example: [bold]al schema add fraud[/]
    """
    _change("add", [], [name], reason, dry_run, as_json)


@app.command()
def undo(reason: Reason = "", dry_run: DryRun = False, as_json: Json = False) -> None:
    """Undo the newest change of the classes that is in force.

    Earlier answers say again what they said. Answers given since are mapped back; those that cannot be, such as ones \
with a merged class, are asked again.
    """
    from al_pipeline.operations.class_changes import undo_change
    from al_pipeline.operations.intervene import dvc_for_intervention

    workspace = current_workspace()
    with dvc_for_intervention(workspace, dry_run=dry_run) as dvc:
        effect = undo_change(workspace, dvc, reason, dry_run=dry_run)
    _carry_out(effect, dry_run, as_json)


def _sides(words: Sequence[str], usage: str) -> tuple[list[str], list[str]]:
    """The classes before and after the word INTO. Raises UsageError if it is missing or there twice."""
    at = [place for place, word in enumerate(words) if word == _INTO]
    at = at or [place for place, word in enumerate(words) if word.upper() == _INTO]
    if len(at) != 1:
        raise UsageError(f"the word INTO must be there once: `{usage}`")
    old, new = (
        [name for word in part for name in parse_list(word, "the classes") if name]
        for part in (words[: at[0]], words[at[0] + 1 :])
    )
    if not old or not new:
        raise UsageError(f"a class is missing: `{usage}`")
    return old, new


def _change(
    kind: str,
    old: Sequence[str],
    new: Sequence[str],
    reason: str,
    dry_run: bool,
    as_json: bool,
    *,
    again: bool = False,
) -> None:
    from al_pipeline.operations.class_changes import Asked, change_classes
    from al_pipeline.operations.intervene import dvc_for_intervention

    workspace = current_workspace()
    with dvc_for_intervention(workspace, dry_run=dry_run) as dvc:
        asked = Asked(kind, tuple(old), tuple(new), again)
        effect = change_classes(workspace, dvc, asked, reason, dry_run=dry_run)
    _carry_out(effect, dry_run, as_json)


def _carry_out(effect: Effect, dry_run: bool, as_json: bool) -> None:
    """Show a change and run the tick that carries it out."""
    if not as_json:
        _print(effect)
    if dry_run:
        return print_json({**effect.to_json(), "dry_run": True}) if as_json else echo("Nothing was changed.")
    published, unfinished = publish_change(current_workspace(), effect.change, as_json)
    if as_json:
        outcome = {"dry_run": False, "published": list(published), "unfinished": unfinished}
        return print_json({**effect.to_json(), **outcome})
    print_published(published)
    print_unfinished(unfinished)


def _print(effect: Effect) -> None:
    echo(escape(effect.change.intervention.sentence()))
    names = dict.fromkeys([*effect.classes[0], *effect.classes[1]])
    rows = [[name, *(_count(counts, name) for counts in (*effect.labels, *effect.test))] for name in names]
    print_table(("class", "labels before", "after", "test set before", "after"), rows)
    for counts, what in ((effect.asked_again, "asked again"), (effect.ignored, "ignored from now on")):
        if total := sum(counts.values()):
            of_test = f", {counts['test']:,} of them in the test set" if counts.get("test") else ""
            lose = "item loses its label and is" if total == 1 else "items lose their label and are"
            echo(f"{total:,} {lose} {what}{of_test}.")
    if effect.tasks[0]:
        echo(f"The open round closes; {effect.tasks[1]:,} of its {effect.tasks[0]:,} tasks stay in the queue.")


def _count(counts: Mapping[str, int], name: str) -> str:
    return f"{counts[name]:,}" if name in counts else ""
