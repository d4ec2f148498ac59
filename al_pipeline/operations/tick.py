"""One tick: look at the facts, do the next steps that can be done, end. Twice is as good as once.

The CLI, the Prefect flow and the tests all call `tick`; the flow passes a `run` that makes each step a task of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from al_pipeline.annotation.aggregation import fold, standing, superseded, times_asked, worth_asking
from al_pipeline.data.ledger import read_events, read_refused, still_refused
from al_pipeline.data.pool import columns_of, fetch
from al_pipeline.errors import ManualActionRequired, NothingToDo, RepositoryError, UnexpectedChange
from al_pipeline.files import bound_log, read_json, read_object, remove_leftovers, write_json, write_text
from al_pipeline.integrations import processes as child
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.operations import build, publish
from al_pipeline.operations.checkout import (
    bring_in_line,
    check_not_ignored,
    check_ready,
)
from al_pipeline.operations.close import (
    carry_out,
    close,
    override,
)
from al_pipeline.operations.connect import ensure_project, stored_project
from al_pipeline.operations.facts import check_owned, closing_rule, facts_at, open_dvc, opened_at
from al_pipeline.operations.history import History, read_history, read_plan, read_plans, rounds_of
from al_pipeline.operations.intervene import check_snapshot, finish_intervention
from al_pipeline.operations.pull import pull
from al_pipeline.operations.push import push, retire
from al_pipeline.operations.schema import check_schema, published_labels, schema_news
from al_pipeline.records import PlannedTask, Task, shown_text
from al_pipeline.rounds.interventions import Intervention, asked_for
from al_pipeline.rounds.state_machine import BUILD, Facts, State, Step, Wait, close_reason, next_step, state
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.identity import check_identity
from al_pipeline.workspace.layout import STAGES, Layout
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.workspace import Workspace


class Runner(Protocol):
    """Takes a step: calls `action`, under the name `name`."""

    def __call__(self, name: str, action: Callable[[], Any], /) -> Any: ...


def call(name: str, action: Callable[[], Any], /) -> Any:
    """The runner of the CLI and the tests: just take the step."""
    return action()


@dataclass(frozen=True, slots=True)
class Options:
    """What may be asked of one tick beyond the ordinary."""

    close_now: bool = False
    accept_vanished: bool = False
    size: int | None = None
    strategy: str | None = None
    """Of the batch that this tick selects; None: as `params.yaml` says. Checked before by `params.check_overrides`."""

    @property
    def overrides(self) -> dict[str, Any]:
        """What is asked of the batch, as `rounds/overrides.json` holds it."""
        return {name: value for name in ("size", "strategy") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class TickReport:
    """What a tick did, and what the round waits for."""

    round: int | None
    state: State
    waits_for: str
    steps: tuple[tuple[str, float], ...]
    """The steps taken, with their seconds."""
    published: tuple[int, ...]
    """Rounds whose tags this tick made."""
    pulled: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    changed: bool = True
    """Whether anything came of it: an answer, a task, a step of a build; not where it only looked and waits."""


@dataclass
class _Session:
    """What one tick has at hand; nothing in it outlives the tick."""

    workspace: Workspace
    git: Git
    dvc: Dvc
    make_oracle: Callable[[], Oracle]
    options: Options
    now: Callable[[], datetime]
    on_progress: Callable[[str], None]
    history: History
    done: set[Step] = field(default_factory=set)
    taken: set[tuple[Step, Facts, str]] = field(default_factory=set)
    """Each step with the facts that led to it: one that changes nothing would be taken for ever."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings that the next batch is still to get."""
    selected: int = 0
    """Items in the batch that this tick selected with the settings asked for."""
    oracle: Oracle | None = None
    project: ProjectRef | None = None
    pulled: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    changed: bool = False
    """Whether a step that often only looks has changed something."""
    _plans: tuple[str | None, dict[str, PlannedTask]] | None = None

    def plans(self) -> dict[str, PlannedTask]:
        """Every task that was ever planned, by its push key; read once for each commit."""
        head = self.git.head()
        if self._plans is None or self._plans[0] != head:
            self._plans = head, read_plans(self.git)
        return self._plans[1]

    @property
    def layout(self) -> Layout:
        return self.workspace.layout

    def begin(self, step: Step, facts: Facts) -> None:
        """Note that `step` is taken on `facts`; raises ManualActionRequired where it was already in this tick."""
        known = replace(facts, age_days=0.0, done=frozenset())
        entry = (step, known, build.build_key(self.layout) if facts.closed else "")
        if entry in self.taken:
            seen = ", ".join(f"{name} {value}" for name, value in _changed_facts(known).items())
            raise ManualActionRequired(
                f"the step `{step}` was taken, and all is as it was before ({seen}); it was stopped, since it would go "
                "on for ever. `al doctor` looks for the reason; if it finds none, please report this sentence"
            )
        self.taken.add(entry)

    def again(self, *steps: Step) -> None:
        """Let `steps` be taken once more, for another reason than before."""
        self.done -= set(steps)
        self.taken = {entry for entry in self.taken if entry[0] not in steps}

    def close(self) -> None:
        if self.oracle is not None:
            self.oracle.close()


def _changed_facts(facts: Facts) -> dict[str, Any]:
    """What of `facts` is not as in an empty workspace, for a message."""
    row = asdict(facts)
    plain = asdict(Facts(items=0, incoming=0, planned=None))
    return {
        name: "/".join(sorted(map(str, value))) if name == "built" else value
        for name, value in row.items()
        if value != plain[name]
    }


def tick(
    workspace: Workspace,
    make_oracle: Callable[[], Oracle],
    *,
    run: Runner = call,
    options: Options | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    on_progress: Callable[[str], None] = lambda _: None,
    purpose: str = "a tick",
) -> TickReport:
    """Do what can be done for the open round, then end. Raises AlError; what was done until then stays done.

    `make_oracle` connects to Label Studio and is called only by a tick that needs it; `on_progress` gets a line of
    progress; `purpose` is what those who come meanwhile are told. Raises NothingToDo after a tick that had settings for
    a batch and selected none.
    """
    layout = workspace.layout
    with locked(layout.lock, purpose), open_dvc(layout) as dvc:
        check_identity(layout)
        dvc.end_previous()
        private_folder(layout.inbox)
        dvc.keep_state_private()
        workspace.make_home()
        child.end_remembered(layout.encoding)
        _tidy(workspace)
        git = Git(layout.root)
        check_ready(layout, git)
        check_not_ignored(layout, git)
        finish_intervention(layout, git)
        options = options or Options()
        session = _Session(workspace, git, dvc, make_oracle, options, now, on_progress, read_history(layout, git))
        session.overrides = options.overrides
        check_owned(workspace, git, dvc, session.history, now())
        check_schema(workspace, session.history)
        if news := schema_news(workspace, session.history):
            session.warnings.append(news)
        _override(session)
        steps: list[tuple[str, float]] = []
        published: list[int] = []
        rule = closing_rule(workspace)
        with closing(session):
            while not isinstance(step := next_step(facts := _facts(session), rule), Wait):
                on_progress(_announce(step, facts))
                session.begin(step, facts)
                begin = time.perf_counter()
                run(str(step), partial(_take, step, session, facts))
                seconds = time.perf_counter() - begin
                steps.append((str(step), seconds))
                session.done.add(step)
                if step in BUILD:
                    build.record_built(layout, step, seconds)
                elif step is Step.TAG and facts.untagged is not None:
                    published.append(facts.untagged)
        if session.options.overrides and not session.selected:
            raise NothingToDo(
                f"this tick selected no batch, so that {' and '.join(session.options.overrides)} had no effect: "
                f"{step.reason}. Give it to the tick that closes the round (`--close-now` closes it with the answers "
                "there are)"
            )
        if session.options.close_now and not published and Step.CLOSE not in session.done:
            session.warnings.append(
                f"nothing was closed: {facts.paused or 'there are no new answers to close it with'}"
            )
        return TickReport(
            session.history.planned,
            state(facts),
            step.reason,
            tuple(steps),
            tuple(published),
            session.pulled,
            session.refused,
            tuple(session.warnings),
            changed=session.changed or any(name not in _LOOKS for name, _ in steps),
        )


_LOOKS = frozenset({Step.INGEST, Step.CONNECT, Step.RETIRE, Step.PUSH, Step.PULL, Step.AUDIT, Step.SYNC})
"""Steps of every tick, which mostly find nothing to do."""


def _facts(session: _Session) -> Facts:
    found = facts_at(session.workspace, session.git, session.history, session.now())
    closed = found.closed
    if closed and build.refresh_engine(session.layout):
        session.on_progress("this engine is not the one that the build began with: the build starts over")
        found = facts_at(session.workspace, session.git, session.history, session.now())
    return replace(
        found,
        done=frozenset(session.done),
        close_requested=session.options.close_now,
        unsynced=publish.unsynced(session.git, session.layout),
    )


def _take(step: Step, session: _Session, facts: Facts) -> Any:
    layout, workspace, planned = session.layout, session.workspace, facts.planned
    match step:
        case Step.INGEST:
            from al_pipeline.operations.sources import ingest_sources

            added, problems = ingest_sources(workspace, session.now().timestamp())
            session.warnings += problems
            session.changed |= added > 0
            return added
        case Step.CONNECT:
            return _connect(session)
        case Step.RETIRE | Step.PUSH | Step.PULL | Step.AUDIT:
            assert planned is not None
            return _with_label_studio(step, session, planned)
        case Step.CLOSE:
            return _close(session, facts)
        case Step.DECIDE:
            return publish.decide_and_plan(
                workspace,
                session.git,
                session.history,
                planned,
                build.build_key(layout),
                _round_facts(session, planned),
            )
        case Step.PUBLISH:
            return _publish(session, planned)
        case Step.TAG:
            assert facts.untagged is not None
            return publish.tag(session.git, layout, facts.untagged)
        case Step.SYNC:
            return _sync(session)
        case _:
            return build.run_step(step, layout, workspace.params.features, session.dvc)


def _close(session: _Session, facts: Facts) -> None:
    """Close the open round. Interventions that wait are carried out by it, and then are why it closes."""
    layout, planned, interventions = session.layout, facts.planned, session.history.waiting
    if planned is None:
        why = "the first build"
    else:
        why = (
            "; ".join(r.sentence() for r in interventions) or close_reason(facts, closing_rule(session.workspace)) or ""
        )
    for intervention in interventions:
        if intervention.params_from is not None and (
            text := session.git.show(intervention.params_from, layout.params.name)
        ):
            write_text(layout.params, text)
    session.workspace = replace(session.workspace)  # which reads its parameters anew
    check_snapshot(session.workspace, session.git, session.dvc, interventions)
    _remember(layout, planned, closed_at=session.now().timestamp(), reason=why)
    plans = session.plans().values()
    corrected = superseded(read_events(layout.events, layout.inbox_events))
    asked = [item for item in asked_for(session.history.interventions, rounds_of(plans)) if item not in corrected]
    kept = _kept(session, planned, interventions) if planned is not None and interventions else []
    if kept:
        session.on_progress(f"round {planned}: {len(kept)} open tasks stay in the queue")
    overrides, session.overrides = session.overrides, {}
    close(layout, session.dvc, 0 if planned is None else planned + 1, overrides, interventions, plans, asked, kept)


def _kept(session: _Session, planned: int, interventions: Sequence[Intervention]) -> list[PlannedTask]:
    """The open tasks of round `planned` that the next one asks on, since nothing but `interventions` closes this one.

    None where the tasks show other fields, or offer other classes, than the schema that holds now.
    """
    layout, params, latest = session.layout, session.workspace.params, session.history.latest
    before = latest["params"]["schema"] if latest else {}
    if (before.get("labels"), before.get("fields")) != (params.schema_.labels, params.schema_.fields):
        return []
    events = read_events(layout.events, layout.inbox_events)
    refused = still_refused(read_refused(layout.events, layout.inbox_events), events)
    events += carry_out(interventions, layout.events)
    everybody = len(params.annotators) or None
    return worth_asking(
        read_plan(session.git, planned),
        events,
        fold(events, params.schema_.labels, everybody, times_asked(events)),
        params.round.overlap,
        everybody,
        {str(row.get("push_key")) for row in refused},
        {item for intervention in session.history.interventions for item in intervention.items},
    )


def _sync(session: _Session) -> None:
    """Push to the git remote. It may be out of reach: that must not keep people from labelling."""
    try:
        session.warnings += publish.sync(session.git, session.layout)
        session.changed = True
    except RepositoryError as error:
        session.warnings.append(f"the git remote lacks the newest rounds; the next tick tries again: {error}")


def _connect(session: _Session) -> None:
    """Find or make our project. A new one is committed at once: the work tree stays clean while people label."""
    layout, workspace = session.layout, session.workspace
    known = stored_project(layout)
    version = workspace.params.schema_.version
    session.oracle = session.make_oracle()
    session.project = ensure_project(
        workspace,
        session.oracle,
        known,
        published_labels(session.history),
        lambda edit: session.warnings.append(edit.sentence(version)),
    )
    session.changed |= known != session.project
    if known != session.project:
        write_json(layout.project, asdict(session.project))
    if session.git.changed([layout.project]):
        session.git.commit(f"Use Label Studio's project {session.project.project_id}", [layout.project])
        session.again(Step.SYNC)
    if bring_in_line(layout, session.git):
        session.again(Step.SYNC)


def _with_label_studio(step: Step, session: _Session, planned: int) -> None:
    layout, workspace = session.layout, session.workspace
    if session.oracle is None or session.project is None:
        _connect(session)
    assert session.oracle is not None and session.project is not None
    if step is Step.RETIRE:
        overlaps = {record["round"]: record["params"]["round"]["overlap"] for record in session.history.rounds}
        rounds = {key: task.round for key, task in session.plans().items()}
        corrected = superseded(read_events(layout.events, layout.inbox_events))
        void = {key for key, task in session.plans().items() if task.item_id in corrected}
        retired = retire(session.oracle, session.project, planned, session.history.abandoned, overlaps, rounds, void)
        session.changed |= retired > 0
    elif step is Step.PUSH:
        corrected = superseded(read_events(layout.events, layout.inbox_events))
        plan = [task for task in read_plan(session.git, planned) if task.item_id not in corrected]
        pushed = push(session.oracle, session.project, tasks_of(workspace, plan))
        session.changed |= pushed.sent > 0
        numbers = {task.item_id: pushed.task_ids[task.push_key] for task in plan if task.push_key in pushed.task_ids}
        tasks = {"project_uid": session.project.project_uid, "numbers": numbers}
        if read_object(layout.state(planned)).get("tasks") != tasks:
            _remember(layout, planned, tasks=tasks)
        if "opened_at" not in read_object(layout.state(planned)):
            elsewhere = pushed.present and not pushed.sent  # another clone opened it
            now = opened_at(layout, session.git, planned) if elsewhere else session.now().timestamp()
            _remember(layout, planned, opened_at=now)
    else:
        report = pull(
            workspace,
            session.oracle,
            session.project,
            session.plans(),
            workspace.params.schema_,
            workspace.params.annotators,
            session.now().isoformat(timespec="seconds"),
            workspace.params.label_studio.max_vanished,
            accept_vanished=session.options.accept_vanished,
            full=step is Step.AUDIT,
        )
        session.changed |= bool(report.events or report.refused)
        for kind, count in report.events.items():
            session.pulled[kind] = session.pulled.get(kind, 0) + count
        for reason, count in report.refused.items():
            session.refused[reason] = session.refused.get(reason, 0) + count


def tasks_of(workspace: Workspace, plan: list[PlannedTask]) -> list[Task]:
    """The planned tasks with what annotators will see of them."""
    from al_pipeline.operations.guess import guess

    layout, params = workspace.layout, workspace.params
    items = fetch([layout.pool, layout.test], [task.item_id for task in plan])
    if missing := [task.item_id for task in plan if task.item_id not in items]:
        raise UnexpectedChange(f"the plan asks about items that the pool does not hold: {', '.join(missing[:3])}")
    queried = [items[task.item_id] for task in plan if task.part == "pool"]
    guesses = guess(workspace, queried) if params.label_studio.show_guess else {}
    tasks = []
    for planned in plan:
        item = items[planned.item_id]
        columns = {"text": item.text, **{k: str(v) for k, v in columns_of(item).items()}}
        fields = {name: shown_text(columns.get(name, "")) for name in params.schema_.fields}
        tasks.append(Task(planned, fields, guesses.get(planned.item_id)))
    return tasks


def _publish(session: _Session, planned: int | None) -> None:
    layout = session.layout
    sources = [f"{path.relative_to(layout.root)}.dvc" for path in layout.sources]
    if changed := {*session.dvc.changed(*STAGES, *sources), *session.dvc.unlike(), *session.dvc.unlike(*sources)}:
        if Step.PUBLISH in session.done:
            raise UnexpectedChange(f"changed again and again while the round was built: {', '.join(sorted(changed))}")
        build.forget_built(layout)
        (layout.genesis if planned is None else layout.record(planned)).unlink(missing_ok=True)
        session.again(*BUILD, Step.DECIDE, Step.PUBLISH)
        session.done.add(Step.PUBLISH)
        session.on_progress("an output of the build is not what its record says: the build starts over")
        return
    publish.publish(session.workspace, session.git, session.dvc, planned)
    build.forget_built(layout)
    layout.closing.unlink(missing_ok=True)
    session.history = read_history(layout, session.git)
    session.done -= {Step.RETIRE, Step.PUSH, Step.SYNC}
    _count_selected(session)


def _round_facts(session: _Session, planned: int | None) -> dict[str, Any]:
    """What the record of a round says beside the results: times, answers, why it closed."""
    layout = session.layout
    remembered = read_object(_state_file(layout, planned))
    facts: dict[str, Any] = {
        "opened_at": remembered.get("opened_at"),
        "closed_at": remembered.get("closed_at"),
        "reason": remembered.get("reason"),
        "seconds": build.build_seconds(layout),
        "project": read_json(layout.project) or None,
        "interventions": [intervention.to_row() for intervention in session.history.waiting],
    }
    if planned is not None:
        events = read_events(layout.events)
        tasks = read_plan(session.git, planned)
        params = session.workspace.params
        found = standing(tasks, events, params.round.overlap, len(params.annotators) or None)
        facts["answers"] = {
            "tasks": len(tasks),
            "answered": sum(value == "answered" for value in found.values()),
            "given_up": sum(value == "given_up" for value in found.values()),
            "unanswered": sum(value == "open" for value in found.values()),
            "kept": len(publish.kept_tasks(layout, session.git, planned + 1)),
            "refused": dict(
                Counter(
                    str(row["reason"])
                    for row in still_refused(read_refused(layout.events), events)
                    if row.get("round") == planned
                )
            ),
        }
    return facts


def _override(session: _Session) -> None:
    """Give a build that an earlier tick left the settings asked for; the batch is not selected before it is published.

    A later close takes what is left of them.
    """
    if session.overrides and facts_at(session.workspace, session.git, session.history, session.now()).closed:
        override(session.layout, session.overrides)
        session.overrides = {}


def _count_selected(session: _Session) -> None:
    """Remember how many items the plan just published asks about as asked for; say where the strategy had no say."""
    record, wanted = session.history.latest, session.options.overrides
    if not wanted or record is None or record["overrides"] != wanted:
        return
    plan = read_plan(session.git, session.history.planned or 0)
    session.selected += sum(task.part == "pool" and task.first_round == task.round for task in plan)
    if "strategy" in wanted and not record["counts"]["labelled"]:
        session.warnings.append(
            f"the batch was drawn without a model, not by {wanted['strategy']}: there are no labels yet"
        )


def _remember(layout: Layout, planned: int | None, **values: Any) -> None:
    path = _state_file(layout, planned)
    write_json(path, {**read_object(path), **values})


def _state_file(layout: Layout, planned: int | None) -> Path:
    return layout.private / "rounds/genesis.json" if planned is None else layout.state(planned)


def _tidy(workspace: Workspace) -> None:
    layout = workspace.layout
    for log in (*layout.logs.glob("*.log"), *workspace.home.glob("*/server.log")):
        bound_log(log)
    remove_leftovers(
        layout.root,
        layout.private,
        layout.rounds,
        layout.root / "data",
        layout.events,
        layout.pool,
        layout.test,
        layout.inbox_events,
    )


def _announce(step: Step, facts: Facts) -> str:
    number = facts.untagged if step is Step.TAG else facts.planned
    return f"{'first build' if number is None else f'round {number}'}: {step}"
