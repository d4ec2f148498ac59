"""The quality of the labels, from the answers that count in the ledger. Reads only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from al_pipeline.annotation.active_events import active
from al_pipeline.annotation.gold import GOLD, answers_to_gold, gold_items, right_and_all
from al_pipeline.data.ledger import read_events
from al_pipeline.errors import NothingToDo
from al_pipeline.integrations.git import Git
from al_pipeline.operations.answers import answers_given
from al_pipeline.operations.close import refuse_changed
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_plans
from al_pipeline.quality.assessment import Quality, assess
from al_pipeline.records import Event, round_name
from al_pipeline.workspace.workspace import Workspace


def quality(workspace: Workspace, number: int | None = None) -> Quality:
    """The quality of all labels, those pulled since the last round included, or of the answers to one round's tasks.

    Raises NothingToDo without answers, UnexpectedChange if the ledger differs from git's record.
    """
    layout = workspace.layout
    with replace(open_dvc(layout), state=None) as dvc:
        refuse_changed(layout, dvc)
    keys = gold_keys_of(Git(layout.root))
    counted = active(read_events(layout.events, layout.inbox_events))
    found = quality_of(counted, workspace.params.schema_.labels, number, keys)
    if not found.answers and not found.skips:
        of = "" if number is None else f" to the tasks of {round_name(number)}"
        raise NothingToDo(f"nobody has given an answer{of} yet; `al round` pulls those in Label Studio")
    return found


def quality_of(
    counted: Sequence[Event], classes: Sequence[str], number: int | None = None, gold_keys: Collection[str] = ()
) -> Quality:
    """The quality of the answers in `counted`, the events that count; with `number`, of those to that round's tasks.

    `gold_keys`: the push keys of the tasks that asked gold; accuracy on gold is that of all rounds.
    """
    found = [one for one in answers_given(counted) if number is None or one[0].round == number]
    on_gold = right_and_all(answers_to_gold(counted, gold_keys), gold_items(counted)) if gold_keys else {}
    return assess([given for given, _ in found], classes, sum(shown for _, shown in found), on_gold)


def gold_keys_of(git: Git, revision: str = "HEAD") -> frozenset[str]:
    """The push keys of the tasks that asked gold."""
    return frozenset(key for key, task in read_plans(git, revision).items() if task.strategy == GOLD)
