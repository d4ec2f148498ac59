"""Request items for the next batch by id. The request is an intervention, so that it is recorded and reproducible."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from al_pipeline.annotation.active_events import superseded
from al_pipeline.annotation.aggregation import fold_by
from al_pipeline.data.ledger import read_events, read_forecasts
from al_pipeline.data.pool import hashes_of
from al_pipeline.errors import BadInput, NothingToDo
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.operations.history import History, read_plans, rounds_of
from al_pipeline.operations.intervene import commit_intervention, locked_for_intervention, new_intervention
from al_pipeline.rounds.interventions import MAX_ITEMS, Intervention, asked_for
from al_pipeline.workspace.workspace import Workspace


def ask(workspace: Workspace, dvc: Dvc, items: Sequence[str], reason: str) -> Intervention:
    """Request that the next selected batch contain the pool items `items`, ahead of all other queries.

    Items that do not fit are deferred to the following batch. Raises BadInput if an item cannot be asked or there are
    more than MAX_ITEMS, NothingToDo if all of them are waiting already.
    """
    wanted = list(dict.fromkeys(item.strip() for item in items))
    if len(wanted) > MAX_ITEMS:
        raise BadInput(f"{len(wanted):,} items are too many; at most {MAX_ITEMS:,} at a time")
    with locked_for_intervention(workspace, dvc, "al ask") as (git, history):
        _check(workspace, git, history, wanted)
        waiting = asked_for(history.interventions, rounds_of(read_plans(git).values()))
        if not (new := [item for item in wanted if item not in waiting]):
            raise NothingToDo("these items already wait for the next batch")
        intervention = new_intervention(history, git, "ask", reason, items=tuple(new))
        commit_intervention(workspace.layout, git, intervention)
        return intervention


def _check(workspace: Workspace, git: Git, history: History, wanted: Sequence[str]) -> None:
    layout, params = workspace.layout, workspace.params
    pool = hashes_of([layout.pool, layout.inbox_pool], wanted)
    test = hashes_of([layout.test, layout.inbox_test], wanted)
    events = read_events(layout.events, layout.inbox_events)
    corrected = superseded(events)
    folded = fold_by(params, events, partial(read_forecasts, layout.events))
    labelled = {row.item_id: row.label for row in folded.labeled}
    open_tasks = {task.item_id for task in history.open_tasks()}
    for item in wanted:
        if item in test:
            raise BadInput(f"{item!r} belongs to the test set, which is used for evaluation and never queried")
        if item not in pool:
            raise BadInput(f"the pool has no item {item!r}; give the ids of items, as in `al log ITEM`")
        if item in corrected:
            raise BadInput(f"the text of {item!r} was corrected; ask for {corrected[item]!r}, which has the new one")
        if item in labelled:
            raise BadInput(
                f"{item!r} already has the label {labelled[item]!r}; after `al labels revoke --item {item}` and a "
                "round it can be asked again"
            )
        if item in open_tasks:
            raise BadInput(f"{item!r} is already asked in round {history.planned}, which is open")
