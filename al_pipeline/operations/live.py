"""`al live`: the newest model asks the next question, seconds after the last answer.

A resident process keeps a short queue in Label Studio. Each step pulls what people answered, updates the live model and
asks as many questions as are missing, under the workspace's lock. Between steps a tick or an intervention can work as
ever; the next step reads again what it changed. Ticks do all else: they repair the queue, close the round, and have the
stages train from scratch, so that what is published never depends on the live model.

A question is written to the live plan and flushed before it is sent (`live.plan`). A process that is killed anywhere
begins with a tick, which sends what Label Studio lacks.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from al_pipeline.data.ledger import known_ids, merge_small_files, read_events, read_forecasts
from al_pipeline.errors import AlError, LabelStudioDown, Locked
from al_pipeline.files import read_object
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.live.plan import append, remember_size
from al_pipeline.live.queue_size import RECENT, AtWork, adapted, at_work, buffer_size, missing, wanted_open
from al_pipeline.logs import get_logger
from al_pipeline.operations.close import is_closed
from al_pipeline.operations.connect import stored_project
from al_pipeline.operations.costs import budget_reached, room_in_budget
from al_pipeline.operations.facts import closing_rule, opened_at
from al_pipeline.operations.history import History, read_history, read_plans
from al_pipeline.operations.live_rounds import commit_live, planned
from al_pipeline.operations.overlap import ask_again, forecasts_at_close, more_answers, overlap_of, within_room
from al_pipeline.operations.proposal import stopped
from al_pipeline.operations.pull import OVERLAP, PullMemory, PullReport, PullRequest, pull
from al_pipeline.operations.push import spare_copies
from al_pipeline.operations.running_fold import RunningFold
from al_pipeline.operations.schema import former_classes
from al_pipeline.operations.steps.label_studio import has_places, placed_tasks
from al_pipeline.operations.tick import TickReport, tick
from al_pipeline.records import RANDOM_SLICE, Event, PlannedTask, push_key
from al_pipeline.rounds.manifests import LiveQuestion
from al_pipeline.rounds.state_machine import Facts, close_reason
from al_pipeline.workspace.lock import LIVE_STEP, locked
from al_pipeline.workspace.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    from al_pipeline.live.asker import Asker

_logger = get_logger(__name__)

HEAL_SECONDS = 600.0
"""A tick repairs whatever differs in Label Studio at least so often."""
IDLE_SECONDS = 60.0
"""How often a tick looks whether a round has opened, while none is open."""
_MOST_WAIT = 30.0
_DEAD_SECONDS = 120.0
_LOOK_BACKS = ((timedelta(seconds=15), 0.0), (timedelta(minutes=2), 60.0), (OVERLAP, 300.0))
"""How far pulls look back, the last as far as those of ticks, and how many seconds lie between two that look so far: a
change is timestamped before it is committed, and each one listed costs the server."""
_LOCKED_WAIT = 0.2
_LEAST_PAUSE, _PAUSE_OF_GAP = 0.1, 0.3
"""Of the mean time between two answers."""
_COLLECT_SECONDS = 10.0
_BUILD_SECONDS = 15.0
"""What building a round takes, as long as none was built."""
_RATE_SECONDS = 10.0
"""The time over which the rate of answers is measured."""


class Step(Struct, frozen=True):
    """What one step did."""

    pulled: int
    """Changes of answers."""
    learnt: bool
    asked: tuple[LiveQuestion, ...]
    closes: str = ""
    """Why the round closes now; empty if it stays open."""


@dataclass
class _Round:
    """The open round, as far as it is known here."""

    number: int
    history: History
    batch: Sequence[PlannedTask]
    asked: list[LiveQuestion]
    opened: float
    last_id: int
    """The highest id of its tasks in Label Studio."""
    fold: RunningFold
    retired: frozenset[str] = frozenset()
    """Items of its batch that people were asked before it was live: a late answer may still come."""
    placed: bool = False
    """Whether this process has had Label Studio serve the newest question first."""
    more: Mapping[str, int] = field(default_factory=dict)

    @property
    def events(self) -> Sequence[Event]:
        """All events of ledger and inbox that were taken in."""
        return self.fold.events

    @property
    def settled(self) -> int:
        """The number of tasks asked that are not open."""
        return len(self.fold.standing) - len(self.fold.open_keys)

    @property
    def tasks(self) -> list[PlannedTask]:
        """The tasks asked so far."""
        return [question.task for question in self.asked]

    @property
    def open_keys(self) -> Collection[str]:
        """The push keys of the tasks that people can answer."""
        return self.fold.open_keys.keys()


class Live:
    """The resident process. `step` does one round trip; `run` repeats it until `stop`."""

    def __init__(
        self,
        workspace: Workspace,
        make_oracle: Callable[[], Oracle],
        *,
        clock: Callable[[], float] = time.time,
        on_progress: Callable[[str], None] = lambda _: None,
        run_tick: Callable[[Workspace], TickReport] | None = None,
    ) -> None:
        self.workspace = workspace
        self._make_oracle = make_oracle
        self._clock = clock
        self._on_progress = on_progress
        self._run_tick = run_tick or self._own_tick
        self._git = Git(workspace.layout.root)
        self._wake = threading.Event()
        self._ends = threading.Event()
        self._oracle: Oracle | None = None
        self._project: ProjectRef | None = None
        self._mark: tuple[Any, ...] = ()
        self._plans: dict[str, PlannedTask] = {}
        self._heal_at = 0.0
        """When the next tick is due; 0: at once."""
        self.round: _Round | None = None
        self.asker: Asker | None = None
        self._asker_of: tuple[Any, ...] = ()
        self.seen: dict[str, float] = {}
        """When each person answered last, by our clock."""
        self.answers_of: Counter[str] = Counter()
        """Answers in the open round, by person."""
        self.started = clock()
        self.health = "starting"
        self.waits_for = ""
        self.learnt_at = 0.0
        self.ticking = False
        self._stepped = clock()
        self._cycle = workspace.params.live.poll_seconds
        """The seconds from one step to the next."""
        self._collect_at = 0.0
        self._times: list[float] = []
        self._extra = 0.0
        """Questions that are open besides the usual ones, as steps were too slow."""
        self._memory = PullMemory()
        self._looks_at = [0.0] * len(_LOOK_BACKS)
        """When a pull is due that looks back so far."""
        self._former: Collection[str] = ()
        self._has_learnt = False
        """Whether the model knows the answers of the open round, as it was read last."""

    # What callers use ----------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Take the next step at once, such as when a webhook says that something changed."""
        self._wake.set()

    def stop(self) -> None:
        """End `run` after the step that it is in."""
        self._ends.set()
        self._wake.set()

    def is_alive(self) -> bool:
        """Whether `run` took a step, or failed at one, in the last minutes; a tick may take long."""
        return self._clock() - self._stepped < _DEAD_SECONDS or self.ticking

    def run(self, on_step: Callable[[Step | None], None] | None = None) -> None:
        """Take steps until `stop`. What goes wrong is shown as `health`, and tried again.

        `on_step` is called after each step, with None after one that failed.
        """
        failures, step = 0, None
        while not self._ends.is_set():
            pause, self._stepped = self._pause(), self._clock()
            try:
                step = self.step()
                failures = 0
            except Locked as error:
                pause, self.health, step = _LOCKED_WAIT, str(error), None
            except AlError as error:
                failures += 1
                pause, self.health, step = min(_MOST_WAIT, pause * 2**failures), str(error), None
                _logger.warning("live: %s", error)
                self._begin_again()
            if on_step is not None:
                on_step(step)
            self._idle(pause)
            self._cycle = min(_MOST_WAIT, 0.8 * self._cycle + 0.2 * (self._clock() - self._stepped))

    def _pause(self) -> float:
        """The seconds between two steps: the more answers come, the fewer."""
        poll = self.workspace.params.live.poll_seconds
        return min(poll, max(_LEAST_PAUSE, _PAUSE_OF_GAP / max(self.answers_per_second(), 1e-3)))

    def close(self) -> None:
        """Commit what was asked, and close the connection. The queue stays as it is."""
        with suppress(AlError), locked(self.workspace.layout.lock, LIVE_STEP):
            self._memory.note(self.workspace.layout)
            if self.round is not None:
                commit_live(self.workspace.layout, self._git, self.round.number)
        self._disconnect()

    @property
    def people(self) -> AtWork:
        """Who is at work now."""
        return at_work(self.seen, self._clock(), self.workspace.params.live.away_minutes)

    def now(self) -> float:
        """The time, in seconds since 1970."""
        return self._clock()

    def plans(self) -> Mapping[str, PlannedTask]:
        """Every task ever planned, by push key."""
        return self._plans

    def stale(self) -> int:
        """The number of open questions that an earlier model chose: tasks of the batch do not grow old."""
        if self.round is None or self.asker is None:
            return 0
        open_keys, newest = self.round.open_keys, self.asker.digest
        return sum(
            one.kind == "chosen" and one.model != newest and one.task.push_key in open_keys for one in self.round.asked
        )

    def answers_per_second(self) -> float:
        """The rate of answers in the last seconds."""
        now = self._clock()
        self._times = [one for one in self._times if now - one <= _RATE_SECONDS]
        return len(self._times) / _RATE_SECONDS

    def step(self) -> Step:
        """Pull, learn, ask what is missing; run a tick where one is due. Raises AlError, with the step undone or redone
        by the next one."""
        now = self._clock()
        if now >= self._heal_at:
            self._tick()
        with locked(self.workspace.layout.lock, LIVE_STEP):
            if not self._is_current():
                self._load()
            if self.round is None:
                return Step(0, False, ())
            report = self._pull()
            if merge_small_files(self.workspace.layout.inbox_events):
                self._memory.inbox_merged(self.workspace.layout)
            pulled = report.events.total() + report.refused.total()
            learnt, questions = False, []
            if news := bool(pulled or not self._has_learnt):
                self._take_in()
            closes = self._close_reason() or ""
            if news:
                if self._has_learnt and not closes:
                    questions = self._ask(False, at_once=True)
                learnt = self._learn()
            questions += self._ask(bool(closes))
            self.health = "up"
        if closes:
            self._on_progress(f"round {self.round.number} closes: {closes}")
            self._tick()
        return Step(pulled, learnt, tuple(questions), closes)

    # Ticks ---------------------------------------------------------------------------------------------------------

    def _own_tick(self, workspace: Workspace) -> TickReport:
        return tick(
            workspace,
            self._make_oracle,
            now=lambda: datetime.fromtimestamp(self._clock(), UTC),
            on_progress=self._on_progress,
            purpose="a tick of al live",
        )

    def _tick(self) -> None:
        """Run a tick: it repairs the queue, closes and builds the round if it is complete, and opens the next."""
        with suppress(Locked), locked(self.workspace.layout.lock, LIVE_STEP):
            self._memory.note(self.workspace.layout)
        self._memory.forget()
        self.workspace = open_workspace(self.workspace.layout.root)
        self.health, self.ticking = "a tick runs", True
        try:
            report = self._run_tick(self.workspace)
        finally:
            self.ticking = False
        self.health, self.waits_for = "up", report.waits_for
        self._mark = ()
        self._heal_at = self._clock() + (HEAL_SECONDS if report.state == "open" else IDLE_SECONDS)

    def _begin_again(self) -> None:
        """Have the next step begin with a tick, on a new connection: nothing that is known here is believed."""
        self._heal_at, self._mark, self.round = 0.0, (), None
        self._memory.forget()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._oracle is not None:
            self._oracle.close()
            self._oracle = None

    def _connected(self) -> tuple[Oracle, ProjectRef]:
        if self._oracle is None:
            self._oracle = self._make_oracle()
        if self._project is None:
            raise LabelStudioDown("the workspace has no project in Label Studio yet")
        return self._oracle, self._project

    # The open round ------------------------------------------------------------------------------------------------

    def _current_mark(self) -> tuple[Any, ...]:
        """What tells whether somebody else changed the workspace since it was read here."""
        layout = self.workspace.layout
        plan = 0 if self.round is None else _size(layout.live_plan(self.round.number))
        return self._git.head(), layout.params.stat().st_mtime_ns, layout.overrides.stat().st_mtime_ns, plan

    def _is_current(self) -> bool:
        return bool(self._mark) and self._mark == self._current_mark()

    def _load(self) -> None:
        """Read the workspace again: the open round, all plans, the pool if it changed."""
        self.workspace = open_workspace(self.workspace.layout.root)
        layout = self.workspace.layout
        history = read_history(layout, self._git)
        self._project, self._former = stored_project(layout), former_classes(layout)
        number = history.planned
        self.round = None
        if history.latest is None or number is None or is_closed(layout, number) or history.pausing or history.waiting:
            self._mark = self._current_mark()
            return
        batch = history.batch()
        if not batch or self._project is None:
            self._mark = self._current_mark()
            return
        oracle, project = self._connected()
        self._plans = read_plans(self._git)
        states = list(oracle.task_states(project, number))
        last = max((state.task_id for state in states), default=0)
        opened = opened_at(layout, self._git, number)
        if spare := spare_copies(states):
            oracle.retire(project, spare)
        asked = list(history.asked_live())
        left = {one.push_key for one in states} - {one.task.push_key for one in asked}
        retired = frozenset(self._plans[key].item_id for key in left if key in self._plans)
        fold = RunningFold(self.workspace.params, known_ids(layout.events), partial(read_forecasts, layout.events))
        fold.add_tasks([one.task for one in asked])
        self._has_learnt = False
        self.round = _Round(number, history, batch, asked, opened, last, fold, retired)
        self._open_asker(history)
        self._mark = self._current_mark()

    def _open_asker(self, history: History) -> None:
        """Open the live model, on the features of the newest published model."""
        from al_pipeline.live.asker import Asker  # imports numpy
        from al_pipeline.live.pool import open_pool

        latest, params = history.latest, self.workspace.params
        assert latest is not None
        key = (latest.hashes["model"], tuple(params.schema_.labels), params.features, params.select, params.live)
        if self.asker is not None and key == self._asker_of:
            return
        pool = open_pool(self.workspace.layout, params.features, self._on_progress)
        temperature = read_object(self.workspace.layout.model / "card.json").get("temperature")
        self.asker = Asker(
            pool,
            params.schema_.labels,
            params.select.strategy,
            params.seed,
            params.live.max_similarity,
            float(temperature) if isinstance(temperature, float) and temperature > 0 else 1.0,
        )
        self._asker_of = key

    def _pull(self) -> PullReport:
        """Record what people did since the last pull, and who did it."""
        params, (oracle, project) = self.workspace.params, self._connected()
        now = datetime.fromtimestamp(self._clock(), UTC)
        due = [place for place, at in enumerate(self._looks_at) if self._clock() >= at]
        reach = due[-1] if due else 0  # a clock that was put back
        report = pull(
            self.workspace.layout,
            oracle,
            PullRequest(
                project=project,
                plans=self._plans,
                schema=params.schema_,
                allow=params.annotators,
                observed_at=now.isoformat(timespec="seconds"),
                max_vanished=params.label_studio.max_vanished,
                former=self._former,
                look_back=_LOOK_BACKS[reach][0],
            ),
            self._memory,
        )
        for place in range(reach + 1):
            self._looks_at[place] = self._clock() + _LOOK_BACKS[place][1]
        return report

    def _take_in(self) -> None:
        """Fold what is new, and note who answered."""
        layout, params, found = self.workspace.layout, self.workspace.params, self.round
        assert found is not None
        events = read_events(layout.events, layout.inbox_events)
        if overlap_of(params).adaptive:
            forecasts = partial(forecasts_at_close, layout, found.history, self._plans.values)
            found.more = more_answers(layout, params, found.tasks, forecasts, events)
        new = found.fold.update(events, found.more)
        self._note_people(new, len(new) == len(events))
        present = max(params.live.people, len(self.people.present))
        pace = self.answers_per_second() * self._cycle
        self._extra = adapted(self._extra, len(found.open_keys), present, pace)

    def _learn(self) -> bool:
        """Update the model to all answers; return whether it changed."""
        params, found, asker = self.workspace.params, self.round, self.asker
        assert found is not None and asker is not None
        fold = found.fold
        closed = chain(fold.ignored, fold.corrected, found.retired, (one.task.item_id for one in found.asked))
        changed = asker.learn(fold.labels, closed)
        self._has_learnt = True
        if changed or not self.learnt_at:
            self.learnt_at = self._clock()
        if overlap_of(params).adaptive:
            self._ask_again()
        return changed

    def _note_people(self, new: Sequence[Event], is_all: bool) -> None:
        """Note when each person answered last. `is_all`: these are all events, not those since the last step."""
        assert self.round is not None
        if is_all:
            self.answers_of.clear()
        for event in new:
            if event.round == self.round.number and event.type in ("label", "skip"):
                self.answers_of[event.annotator] += 1
            if event.round == self.round.number and event.observed_at and "@" in event.annotator:
                with suppress(ValueError):
                    seen = datetime.fromisoformat(event.observed_at).timestamp()
                    self.seen[event.annotator] = max(seen, self.seen.get(event.annotator, 0.0))
        if not is_all:
            self._times += [self._clock()] * sum(event.type in ("label", "skip") for event in new)

    def _ask_again(self) -> None:
        """Have tasks whose labels are not sure enough answered by another person at once."""
        layout, params, found = self.workspace.layout, self.workspace.params, self.round
        assert found is not None
        oracle, project = self._connected()
        states = {one.push_key: one for one in oracle.task_states(project, found.number) if one.push_key is not None}
        more = within_room(found.more, room_in_budget(layout, params.budget))
        ask_again(oracle, project, found.tasks, states, more, found.events, overlap_of(params))

    def _close_reason(self) -> str | None:
        """Why the round closes now; None if it stays open. A tick decides; this only tells when one is due."""
        layout, params, found = self.workspace.layout, self.workspace.params, self.round
        assert found is not None
        facts = Facts(
            items=1,
            incoming=0,
            planned=found.number,
            tasks=len(found.batch),
            settled=found.settled,
            new_labels=len(found.fold.fresh),
            budget=budget_reached(layout, params.budget),
            stopped=stopped(found.history, params),
            age_days=max(0.0, self._clock() - found.opened) / 86_400,
        )
        return close_reason(facts, closing_rule(self.workspace))

    # Questions -----------------------------------------------------------------------------------------------------

    def _ask(self, closes: bool, *, at_once: bool = False) -> list[LiveQuestion]:
        """Ask as many questions as are missing; while a round `closes`, as many as are answered meanwhile.

        `at_once`: only as many as people at work may miss before the model has learnt.
        """
        found, params, people = self.round, self.workspace.params, self.people
        assert found is not None
        pace = self.answers_per_second() * self._cycle
        size = wanted_open(people, params.live.people, pace, self._extra)
        answered_by: dict[str, set[str]] = {}
        for key, who in found.fold.open_keys.items():
            for one in who:
                answered_by.setdefault(one, set()).add(key)
        count = missing(found.open_keys, answered_by, people, params.live.people, pace, self._extra)
        if at_once:
            count -= size - len(people.away) - max(params.live.people, len(people.present)) - 1
        if closes:
            latest = found.history.latest
            took = sum(latest.seconds.values()) if latest is not None and latest.seconds else _BUILD_SECONDS
            count = max(count, 0) + buffer_size(self.answers_per_second(), max(took, _BUILD_SECONDS))
        room = room_in_budget(self.workspace.layout, params.budget)
        if stopped(found.history, params):
            room = 0
        if room is not None:
            count = min(count, max(0, room - len(found.open_keys)))
        remember_size(self.workspace.layout, size)
        questions = self._next_questions(count) if count > 0 else []
        if questions:
            self._send(questions)
        return questions

    def _next_questions(self, count: int) -> list[LiveQuestion]:
        found, asker, params = self.round, self.asker, self.workspace.params
        assert found is not None and asker is not None
        tasks, open_keys = found.tasks, found.open_keys
        keys = [task.push_key for task in tasks]
        recent = [task.item_id for task in tasks if task.push_key in open_keys]
        recent += [task.item_id for task in tasks[-RECENT:]]
        events, known = found.fold.knowledge()
        drawn = sum(task.strategy == RANDOM_SLICE for task in found.batch)
        questions: list[LiveQuestion] = []
        for _ in range(count):
            place = len(keys)
            kind, task = asker.slot(found.batch, keys, params.select.random_share, found.number)
            if task is not None:
                if task.item_id in found.fold.corrected:
                    continue
                (question,) = planned(found.history, [task], self._clock())
            else:
                chosen = asker.ask(kind, recent, found.number, place)
                if chosen is None:
                    break
                is_random = kind == "random" or not asker.is_trained
                made = PlannedTask(
                    push_key(self.workspace.id, found.number, chosen.item_id),
                    chosen.item_id,
                    chosen.content_hash,
                    "pool",
                    found.number,
                    place,
                    chosen.score,
                    RANDOM_SLICE if is_random else asker.acquisition,
                    min(1.0, max(1, drawn) / chosen.open_items) if is_random else 1.0,
                    chosen.predicted,
                    chosen.confidence,
                    chosen.proba if params.labels.uses_model else (),
                )
                made_by = "random" if is_random else "chosen"
                question = LiveQuestion(made, made_by, asker.digest, events, known, self._clock())  # type: ignore[arg-type]
            questions.append(question)
            keys.append(question.task.push_key)
            recent.append(question.task.item_id)
        return questions

    def _send(self, questions: Sequence[LiveQuestion]) -> None:
        """Write questions to the live plan, then to Label Studio, and look whether each is there once.

        Raises LabelStudioDown if not; the next step begins with a tick, which finds out and repairs it.
        """
        found = self.round
        assert found is not None
        oracle, project = self._connected()
        append(self.workspace.layout.live_plan(found.number), questions)
        self._mark = self._current_mark()
        first = not found.placed
        found.placed = True
        found.asked += questions
        self._plans |= {one.task.push_key: one.task for one in questions}
        tasks = [one.task for one in questions]
        oracle.import_tasks(project, placed_tasks(self.workspace, found.asked, tasks))
        there = list(oracle.task_states(project, found.number, found.last_id + 1))
        keys = [one.push_key for one in there]
        if any(keys.count(task.push_key) != 1 for task in tasks):
            raise LabelStudioDown(
                f"Label Studio accepted {len(tasks)} questions without an error but does not list each of them once"
            )
        new = {task.push_key for task in tasks}
        late = [one.task_id for one in there if one.push_key not in new and one.push_key in self._plans]
        if late:  # a killed process had sent them, and Label Studio has stored them only now
            oracle.retire(project, late)
        found.last_id = max(one.task_id for one in there)
        found.fold.add_tasks(tasks)
        if first:
            oracle.serve_newest(project, has_places(self.workspace))

    # Between steps -------------------------------------------------------------------------------------------------

    def _idle(self, seconds: float) -> None:
        """Wait for the next step, and score the pool meanwhile."""
        end = time.monotonic() + seconds
        if time.monotonic() >= self._collect_at:
            if not self._collect_at:
                gc.collect()
                gc.freeze()  # what is there now stays; later collections are short
            self._collect_at = time.monotonic() + _COLLECT_SECONDS
            gc.collect()
        while self.asker is not None and time.monotonic() < end and not self._wake.is_set() and self.asker.go_on():
            pass
        self._wake.wait(max(0.0, end - time.monotonic()))
        self._wake.clear()


def _size(path: Any) -> int:
    try:
        return int(path.stat().st_size)
    except FileNotFoundError:
        return 0
