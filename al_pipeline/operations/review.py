"""Reviews: put what most deserves it before the reviewers, in a project of their own, and pull their rulings.

Each review has a plan, one small file and one commit, written before anything is sent: a kill at any line leaves
either nothing or a plan whose missing tasks the next call sends. The rulings are events of the inbox, like answers; the
next close takes them along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime

from msgspec import Struct
from msgspec.structs import asdict, replace

from al_pipeline.annotation.active_events import active, corrected_items, standing_answers
from al_pipeline.annotation.answers import by_item
from al_pipeline.annotation.review import Chosen, choose, rulings, sample_of, shown_answers
from al_pipeline.data.ledger import read_events, read_refused, signature, still_refused
from al_pipeline.data.pool import columns_of, fetch
from al_pipeline.errors import ManualActionRequired, NothingToDo, UsageError
from al_pipeline.files import read_object, sha256_file, write_json, write_jsonl
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.projects import project_title
from al_pipeline.integrations.oracle import Oracle, ProjectRef, ProjectSpec
from al_pipeline.logs import get_logger
from al_pipeline.operations.close import is_closed
from al_pipeline.operations.connect import review_page, stored_review_project
from al_pipeline.operations.gold import held_answers
from al_pipeline.operations.history import History
from al_pipeline.operations.intervene import locked_for_intervention
from al_pipeline.operations.pull import PullRequest, pull
from al_pipeline.operations.push import RetirePolicy, push, retire
from al_pipeline.operations.review_candidates import candidates, of_a_person
from al_pipeline.operations.review_figures import Review, read_reviews, review_figures, sample_left
from al_pipeline.operations.schema import former_classes, published_labels
from al_pipeline.records import Event, PlannedTask, Task, event_digest, is_of_review, review_workspace, shown_text
from al_pipeline.rounds.reviews import review_key
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)


class ReviewReport(Struct, frozen=True, kw_only=True):
    """What a call of `al review` did, and what the reviews say so far."""

    pulled: int
    """New rulings, changed and withdrawn ones, and reviews without a ruling."""
    refused: Mapping[str, int]
    """Rulings that do not count, by reason."""
    added: Mapping[str, int]
    """Tasks put before the reviewers, by reason."""
    waiting: int
    """Tasks that wait for a ruling."""
    page: str | None
    figures: Review


class _Connection(Struct, frozen=True):
    """The review project, and what a pull from it is compared with."""

    oracle: Oracle
    project: ProjectRef
    observed_at: str
    accept_vanished: bool
    audit: bool


def review(
    workspace: Workspace,
    dvc: Dvc,
    make_oracle: Callable[[], Oracle],
    *,
    size: int | None = None,
    annotator: str | None = None,
    accept_vanished: bool = False,
) -> ReviewReport:
    """Pull the rulings, and fill up the reviewers' tasks to `size` (default: `quality.review_size`).

    `annotator`: add `size` random answers of this person in place of what most deserves it. Raises UsageError without
    reviewers, ManualActionRequired while a round is being built, NothingToDo if nothing can be reviewed.
    """
    params = workspace.params
    if not params.reviewers:
        raise UsageError("nobody is a reviewer; name their e-mail addresses under `reviewers` in params.yaml")
    with locked_for_intervention(workspace, dvc, "al review") as (git, history), closing(make_oracle()) as oracle:
        if workspace.layout.closing.exists() or is_closed(workspace.layout, history.planned):
            raise ManualActionRequired("a round is being built, and its labels may still change: run `al round` first")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        project = _ensure_project(workspace, git, history, oracle)
        connection = _Connection(oracle, project, now, accept_vanished, audit=True)
        pulled, refused = _pull(workspace, connection)
        added = _plan(workspace, git, history, size or params.quality.review_size, annotator)
        waiting = _push(workspace, connection)
        if not (pulled or refused or added or waiting):
            raise NothingToDo(_nothing(workspace, annotator))
        return ReviewReport(
            pulled=pulled,
            refused=refused,
            added=added,
            waiting=waiting,
            page=review_page(workspace),
            figures=review_figures(workspace),
        )


def review_in_tick(
    workspace: Workspace, git: Git, history: History, oracle: Oracle, now: datetime, *, accept_vanished: bool
) -> int:
    """Pull the rulings and, if `quality.review_each_tick` says so, fill up the reviewers' tasks.

    Does nothing without reviewers, or without a review project if none is wanted. Returns the number of new events and
    tasks.
    """
    params, known = workspace.params, stored_review_project(workspace.layout)
    wanted = params.quality.review_each_tick
    if not params.reviewers or (known is None and not wanted):
        return 0
    project = _ensure_project(workspace, git, history, oracle)
    stamp = now.isoformat(timespec="seconds")
    connection = _Connection(oracle, project, stamp, accept_vanished, audit=False)
    pulled, _ = _pull(workspace, connection)
    added: dict[str, int] = {}
    if wanted and (facts := _facts(workspace, history)) != read_object(workspace.layout.review_facts).get("facts"):
        added = _plan(workspace, git, history, params.quality.review_size, None)
        write_json(workspace.layout.review_facts, {"facts": facts})
    _push(workspace, connection)
    return pulled + sum(added.values())


def _facts(workspace: Workspace, history: History) -> str:
    """A digest of what a review is chosen by: on equal facts a tick need not look again."""
    layout, latest = workspace.layout, history.latest
    events = [[name, size] for name, size, _ in signature(layout.events, layout.inbox_events)]
    model = None if latest is None else latest.hashes.get("model")
    return event_digest(events, model, sha256_file(layout.params))


def _ensure_project(workspace: Workspace, git: Git, history: History, oracle: Oracle) -> ProjectRef:
    """Find or create the review project, and commit a new one at once."""
    layout, schema = workspace.layout, workspace.params.schema_
    known = stored_review_project(layout)
    spec = ProjectSpec(
        workspace_id=review_workspace(workspace.id),
        clone_id=workspace.clone_id,
        schema=schema,
        published=published_labels(history),
        review=True,
        title=project_title(f"Review {layout.root.name}", schema.question, workspace.id),
    )
    project = oracle.ensure_project(spec, known)
    if known != project:
        write_json(layout.review_project, asdict(project))
    if git.changed([layout.review_project]):
        git.commit(f"Use Label Studio's project {project.project_id} for reviews", [layout.review_project])
    return project


def _pull(workspace: Workspace, connection: _Connection) -> tuple[int, dict[str, int]]:
    """Pull the rulings into the inbox; the number of events, and of refused rulings by reason."""
    params = workspace.params
    report = pull(
        workspace.layout,
        connection.oracle,
        PullRequest(
            project=connection.project,
            plans={task.push_key: task for task in read_reviews(workspace.layout)},
            schema=params.schema_,
            allow=params.reviewers,
            observed_at=connection.observed_at,
            max_vanished=params.label_studio.max_vanished,
            accept_vanished=connection.accept_vanished,
            rulings=True,
            former=former_classes(workspace.layout),
            audit=connection.audit,
        ),
    )
    return report.events.total(), dict(report.refused)


def _plan(workspace: Workspace, git: Git, history: History, size: int, annotator: str | None) -> dict[str, int]:
    """Write and commit the plan of the next review, if there is something to review; its tasks by reason."""
    layout = workspace.layout
    tasks = read_reviews(layout)
    open_items = {task.item_id for task in _waiting(workspace, tasks)}
    now = standing_answers(read_events(layout.events, layout.inbox_events)).values()
    done = {event.item_id for event in now if event.type == "adjudicate"}
    closed = open_items | done
    if annotator is None:
        room = size - len(open_items)
        found = [one for one in candidates(workspace) if one.item_id not in closed] if room > 0 else []
        sample = [item for item in sample_left(workspace) if item not in closed] if room > 0 else []
        chosen = choose(found, sample, max(0, room))
    else:
        chosen = [
            Chosen(one, sample_of(annotator.strip().lower()), 0.0)
            for one in of_a_person(workspace, annotator)
            if one.item_id not in closed
        ][:size]
    if not chosen or history.planned is None:
        return {}
    number = 1 + max((task.first_round for task in tasks), default=0)
    plan = [_task(workspace, number, history.planned, rank, one) for rank, one in enumerate(chosen)]
    write_jsonl(layout.review(number), (asdict(task) for task in plan))
    git.commit(f"Review {number}: {len(plan)} labels", [layout.review(number)])
    _logger.info("review %d: %d tasks", number, len(plan))
    return dict(Counter(task.strategy for task in plan))


def _task(workspace: Workspace, number: int, planned: int, rank: int, one: Chosen) -> PlannedTask:
    return PlannedTask(
        push_key=review_key(workspace.id, number, one.candidate.item_id),
        item_id=one.candidate.item_id,
        content_hash=one.candidate.content_hash,
        part=one.candidate.part,
        round=planned,
        rank=rank,
        score=one.score,
        strategy=one.reason,
        probability=1.0,
    )


def _push(workspace: Workspace, connection: _Connection) -> int:
    """Send the tasks that wait for a ruling, and retire those about a text that was corrected; how many wait."""
    layout = workspace.layout
    counted = active(read_events(layout.events, layout.inbox_events))
    tasks = read_reviews(layout)
    corrected = corrected_items(counted)
    outdated = {task.push_key for task in tasks if task.item_id in corrected}
    plan = [task for task in _waiting(workspace, tasks) if task.push_key not in outdated]
    if outdated:
        policy = RetirePolicy(0, plans={task.push_key: task for task in tasks}, superseded=corrected)
        retire(connection.oracle, connection.project, policy)
    if plan:
        wanted, held = {task.item_id for task in plan}, held_answers(read_events(layout.events, layout.inbox_events))
        about = by_item(event for event in (*counted, *held) if event.item_id in wanted)
        push(connection.oracle, connection.project, plan, lambda some: _shown(workspace, some, about))
    return len(plan)


def _waiting(workspace: Workspace, tasks: Sequence[PlannedTask]) -> list[PlannedTask]:
    """The tasks that had neither a ruling nor a skip. Nobody is served one whose ruling was refused: it is over."""
    layout = workspace.layout
    events = read_events(layout.events, layout.inbox_events)
    over = {event.push_key for event in events if is_of_review(event.annotation_key)}
    refused = still_refused(read_refused(layout.events, layout.inbox_events), events)
    over |= {str(row.get("push_key")) for row in refused}
    return [task for task in tasks if task.push_key not in over]


def _shown(workspace: Workspace, plan: Sequence[PlannedTask], about: Mapping[str, Sequence[Event]]) -> list[Task]:
    """Add what reviewers see. Nothing sent tells why an item is reviewed."""
    layout, schema = workspace.layout, workspace.params.schema_
    items = fetch([layout.pool, layout.test], [task.item_id for task in plan])
    tasks = []
    for task in plan:
        item = items[task.item_id]
        columns = {"text": item.text, **{k: str(v) for k, v in columns_of(item).items()}}
        fields = {name: shown_text(columns.get(name, "")) for name in schema.fields}
        tasks.append(Task(replace(task, score=0.0), fields, answers=shown_answers(about.get(task.item_id, ()))))
    return tasks


def _nothing(workspace: Workspace, annotator: str | None) -> str:
    if annotator is not None:
        return f"there is no answer of {annotator!r} to review; `al quality` lists the annotators"
    ruled = rulings(active(read_events(workspace.layout.events, workspace.layout.inbox_events)))
    done = f"; {len(ruled)} labels are reviewed" if ruled else ""
    return f"no label is in doubt, and the random sample of quality.review_sample labels is reviewed{done}"
