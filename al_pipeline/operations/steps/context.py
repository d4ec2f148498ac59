"""The state that the steps of one tick share; it lasts no longer than the tick."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict, replace

from al_pipeline.errors import ManualActionRequired
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.operations import build
from al_pipeline.operations.history import History, read_history, read_plans
from al_pipeline.operations.overlap import forecasts_at_close
from al_pipeline.records import ModelForecast, PlannedTask, TaskState
from al_pipeline.rounds.state_machine import Facts, Step
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.operations.encoding import ShardRunner


@dataclass
class Outcome:
    """What a tick has done, for its report."""

    steps: list[tuple[Step, float]] = field(default_factory=list)
    """The steps taken, each with its duration in seconds."""
    published: list[int] = field(default_factory=list)
    pulled: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    selected: int = 0
    """Number of items in a batch that this tick selected with the requested settings."""
    overrides_given: bool = False
    """Whether the requested settings were applied to a batch."""
    changed: bool = False
    """Whether a step that often only checks has changed something."""


class TakenSteps:
    """The steps that a tick has taken, in `done` for the current round; detects steps that would repeat for ever."""

    def __init__(self, layout: Layout) -> None:
        self.done: set[Step] = set()
        self._layout = layout
        self._reasons: set[tuple[Step, Facts, str]] = set()

    def begin(self, step: Step, facts: Facts) -> None:
        """Record that `step` is taken on `facts`. Raises ManualActionRequired if this tick already took it on them."""
        known = replace(facts, age_days=0.0, done=frozenset())
        reason = (step, known, build.build_key(self._layout) if facts.closed else "")
        if reason in self._reasons:
            seen = ", ".join(f"{name} {value}" for name, value in _changed_facts(known).items())
            raise ManualActionRequired(
                f"the step `{step}` changed nothing ({seen}), so the tick was stopped: it would repeat the step for "
                "ever. Run `al doctor` to find the reason; if it finds none, please report this message"
            )
        self._reasons.add(reason)

    def again(self, *steps: Step) -> None:
        """Allow `steps` to be taken again, whatever the facts."""
        self.done -= set(steps)
        self._reasons = {reason for reason in self._reasons if reason[0] not in steps}


@dataclass
class Context:
    """What the steps of one tick work with. A step that changes `workspace` or `history` has it read again."""

    workspace: Workspace
    git: Git
    dvc: Dvc
    history: History
    connect: Callable[[], Oracle]
    """Opens a Label Studio client; called only by a tick that needs one."""
    now: Callable[[], datetime]
    on_progress: Callable[[str], None]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the caller requests for the batch that this tick selects (`size`, `strategy`)."""
    accept_vanished: bool = False
    run_shards: ShardRunner | None = None
    """What carries shards of texts to the cluster of `engine.runner`; None without Prefect."""
    outcome: Outcome = field(default_factory=Outcome)
    queue_is_empty: bool = False
    """Whether the last push found no task that Label Studio still asks for."""
    states: Mapping[str, TaskState] = field(default_factory=dict)
    """The round's tasks as the last push found them in Label Studio, by push key."""
    taken: TakenSteps = field(init=False)
    _project: tuple[Oracle, ProjectRef] | None = None
    _plans: tuple[str | None, dict[str, PlannedTask]] | None = None

    def __post_init__(self) -> None:
        self.taken = TakenSteps(self.layout)

    @property
    def layout(self) -> Layout:
        return self.workspace.layout

    @property
    def project(self) -> tuple[Oracle, ProjectRef]:
        """The Label Studio client and the workspace's project; available after Step.CONNECT."""
        assert self._project is not None
        return self._project

    def connected(self, oracle: Oracle, project: ProjectRef) -> None:
        """Set what `project` returns."""
        self._project = oracle, project

    def take_overrides(self) -> dict[str, Any]:
        """Return the requested settings on the first call, then nothing: they are for one batch."""
        given, self.outcome.overrides_given = self.outcome.overrides_given, True
        return {} if given else dict(self.overrides)

    def plans(self) -> dict[str, PlannedTask]:
        """Every task ever planned, by push key; read once per commit."""
        head = self.git.head()
        if self._plans is None or self._plans[0] != head:
            self._plans = head, read_plans(self.git)
        return self._plans[1]

    def forecasts_at_close(self) -> dict[str, ModelForecast]:
        """The forecasts that the ledger has once the open round is closed."""
        return forecasts_at_close(self.layout, self.history, lambda: self.plans().values())

    def forget_plans(self) -> None:
        """Have `plans` read again: a live plan has grown."""
        self._plans = None

    def read_history_again(self) -> None:
        """Update `history` after publishing."""
        self.history = read_history(self.layout, self.git)


def _changed_facts(facts: Facts) -> dict[str, Any]:
    """The facts that differ from those of an empty workspace, for a message."""
    row = asdict(facts)
    plain = asdict(Facts(items=0, incoming=0, planned=None))
    return {
        name: "/".join(sorted(map(str, value))) if name == "built" else value
        for name, value in row.items()
        if value != plain[name]
    }
