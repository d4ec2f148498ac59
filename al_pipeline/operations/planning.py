"""Plan the tasks of a round: those kept from the round before, the selected queries, and the next test items."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence

from msgspec.structs import replace

from al_pipeline.annotation.active_events import CONTROLS, active
from al_pipeline.data.catalog import test_order
from al_pipeline.data.ledger import read_events
from al_pipeline.data.pool import fetch, read_ids
from al_pipeline.integrations.git import Git
from al_pipeline.operations.history import read_plan, read_plans
from al_pipeline.params import Params, load_overrides
from al_pipeline.records import NOT_ASKED, Event, PlannedTask, push_key
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace


def plan_tasks(workspace: Workspace, git: Git, number: int, abandoned: Collection[int]) -> list[PlannedTask]:
    """Return the tasks of round `number`: those kept from the round before, then queries interleaved with test items.

    With `quality.gold_share`, gold items are mixed in.

    Kept tasks are unchanged. The test items are the next ones that were not asked yet (except in abandoned rounds);
    `round.test_tasks` is their number including kept ones, unless `al certify --ask` requested more. The test set was
    drawn once, at random, and is asked in random order, so its labelled part is always a random sample. Round 0 is
    empty if imported labels suffice for the first model.
    """
    if number == 0 and brought_labels(workspace.layout, workspace.params):
        return []
    kept = kept_tasks(workspace.layout, git, number)
    test = _test_tasks(workspace, git, number, abandoned, kept)
    tasks = [*kept, *interleaved(test, _query_tasks(workspace, number))]
    if workspace.params.quality.gold_share:
        from al_pipeline.operations.gold import gold_tasks

        tasks = gold_tasks(workspace, number, tasks, read_plans(git))
    return [replace(task, rank=rank) for rank, task in enumerate(tasks)]


def kept_tasks(layout: Layout, git: Git, number: int) -> list[PlannedTask]:
    """The tasks that round `number` keeps from the round before, in order, as recorded when that round closed."""
    chosen = load_overrides(layout.overrides)
    wanted = {*chosen.kept, *chosen.kept_test}
    if not wanted:
        return []
    return [replace(task, round=number) for task in read_plan(git, number - 1) if task.item_id in wanted]


def interleaved(first: Sequence[PlannedTask], second: Sequence[PlannedTask]) -> list[PlannedTask]:
    """Merge two lists of tasks, each in order and spread evenly: half of the result holds half of either list."""
    placed = [
        ((2 * place + 1) / (2 * len(tasks)), task) for tasks in (first, second) for place, task in enumerate(tasks)
    ]
    return [task for _, task in sorted(placed, key=lambda pair: pair[0])]


def brought_labels(layout: Layout, params: Params) -> int:
    """The number of imported pool labels if they suffice to train a model without any answers, else 0."""
    from al_pipeline.data.outputs import read_labeled

    labels = [row.label for row in read_labeled(layout.labeled)]
    return len(labels) if len(set(labels)) > 1 and len(labels) >= params.round.min_labels else 0


def _void_tasks(events: list[Event]) -> set[str]:
    """Push keys of answered tasks none of whose answers counts any more: their test items are asked again."""
    if not any(event.type in CONTROLS for event in events):
        return set()
    heard = {event.push_key for event in events if event.type not in CONTROLS}
    return heard - {event.push_key for event in active(events)}


def _query_tasks(workspace: Workspace, number: int) -> list[PlannedTask]:
    """The queries selected for round `number` as tasks, by rank."""
    from al_pipeline.data.outputs import read_queries

    layout = workspace.layout
    queries = read_queries(layout.queries)
    items = fetch([layout.pool], [query.item_id for query in queries])
    return [
        PlannedTask(
            push_key(workspace.id, number, query.item_id),
            query.item_id,
            items[query.item_id].content_hash,
            "pool",
            number,
            query.rank,
            query.score,
            query.strategy,
            query.probability,
            query.predicted,
            query.confidence,
            query.proba,
        )
        for query in sorted(queries, key=lambda query: query.rank)
    ]


def _test_tasks(
    workspace: Workspace, git: Git, number: int, abandoned: Collection[int], kept: Sequence[PlannedTask]
) -> list[PlannedTask]:
    """The next items of the test set as tasks, up to `round.test_tasks` together with those in `kept`, or as many as
    were requested.
    """
    unasked = unasked_test_items(workspace, git, number, abandoned, {task.item_id for task in kept})
    requested = {*load_overrides(workspace.layout.overrides).ask}.intersection(item for item, _ in unasked)
    share = max(workspace.params.round.test_tasks - sum(task.part == "test" for task in kept), len(requested), 0)
    return [
        PlannedTask(push_key(workspace.id, number, item), item, content, "test", number, 0, 0.0, "test_set", 1.0)
        for item, content in heapq.nsmallest(share, unasked, key=_by_test_order(workspace))
    ]


def unasked_test_items(
    workspace: Workspace, git: Git, number: int, abandoned: Collection[int], besides: Collection[str] = ()
) -> list[tuple[str, str]]:
    """Id and content hash of the test items that are not settled and were not asked before round `number`."""
    done = _settled_items(workspace.layout) | _asked_items(workspace.layout, git, number, abandoned) | {*besides}
    known = read_ids([workspace.layout.test])
    return [found for found in zip(known.ids(), known.hashes(), strict=True) if found[0] not in done]


def next_test_items(workspace: Workspace, git: Git, number: int, abandoned: Collection[int], most: int) -> list[str]:
    """The ids of the test items that are asked next, before any that round `number` asks already; at most `most`."""
    unasked = unasked_test_items(workspace, git, number + 1, abandoned)
    return [item for item, _ in heapq.nsmallest(most, unasked, key=_by_test_order(workspace))]


def _by_test_order(workspace: Workspace) -> Callable[[tuple[str, str]], tuple[bytes, bytes]]:
    seed = workspace.params.seed
    return lambda found: test_order(bytes.fromhex(found[1]), seed)


def _settled_items(layout: Layout) -> set[str]:
    """Ids of test items that have a label or are ignored."""
    from al_pipeline.data.outputs import read_labeled, read_unresolved

    unresolved = read_unresolved(layout.unresolved)
    ignored = {row.item_id for row in unresolved if row.part == "test" and row.kind == "ignored"}
    return {row.item_id for row in read_labeled(layout.test_labels)} | ignored


def _asked_items(layout: Layout, git: Git, number: int, abandoned: Collection[int]) -> set[str]:
    """Ids of test items that were asked before round `number` and whose answers count or may still arrive."""
    void = _void_tasks(read_events(layout.events))
    return {
        task.item_id
        for task in read_plans(git).values()
        if task.part == "test" and task.round < number and task.round not in abandoned
        if task.push_key not in void and task.strategy != NOT_ASKED
    }
