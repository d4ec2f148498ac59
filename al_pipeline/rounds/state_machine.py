"""The round's state machine as a pure, total function: from the facts to the next step, or the reason to wait.

Facts are read from disk, git and Label Studio; no state is kept here. A tick takes one step, then reads the facts
again.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal

from msgspec import Struct

State = Literal["empty", "planned", "open", "closed", "built", "decided", "published", "exhausted"]


class Step(StrEnum):
    """What a tick can do next. Each step is a Prefect task."""

    INGEST = "ingest"
    CONNECT = "connect"
    RETIRE = "retire"
    PUSH = "push"
    PULL = "pull"
    AUDIT = "audit"
    CLOSE = "close"
    ENCODER = "encoder"
    ENCODE = "encode"
    LABEL = "label"
    TRAIN = "train"
    EVALUATE = "evaluate"
    SCORE = "score"
    SELECT = "select"
    DECIDE = "decide"
    PUBLISH = "publish"
    TAG = "tag"
    SYNC = "sync"


BUILD = (Step.ENCODER, Step.ENCODE, Step.LABEL, Step.TRAIN, Step.EVALUATE, Step.SCORE, Step.SELECT)
"""The steps of a build: two that provide the features, which rounds share, then those of `dvc.yaml`, in its order."""


class Wait(Struct, frozen=True):
    """No step is possible now; `reason` says what the round waits for."""

    reason: str


class Facts(Struct, frozen=True):
    """What a tick has read. `done`: the steps that this tick has already taken for the current round."""

    items: int
    """Number of items in the pool and its inbox."""
    incoming: int
    """Of `items`, those still in the inbox."""
    planned: int | None
    """The round whose plan is committed and whose record is not; None before the first build."""
    untagged: int | None = None
    """A round with a committed record but no tag."""
    unsynced: bool = False
    """Whether the git remote lacks commits or tags (False without a git remote)."""
    tasks: int = 0
    settled: int = 0
    """Of `tasks`, those answered or given up."""
    asked_again: int = 0
    """Of `tasks`, those whose answers do not make their label sure enough: another person is asked."""
    brought: int = 0
    """Number of labels that the user supplied, if round 0 can be built from them alone."""
    new_labels: int = 0
    """Number of items with an answer in the inbox."""
    budget: str = ""
    """Which limits of the budget are reached, as a sentence; empty if none is: nothing new is asked past it."""
    stopped: str = ""
    """Why nothing new is asked although the budget has room; empty if the round goes on."""
    room: int | None = None
    """How many more answers the budget has room for; None without a budget."""
    age_days: float = 0.0
    """Days since the round opened."""
    close_requested: bool = False
    amend: bool = False
    """Whether an intervention about labels waits to be carried out."""
    amending: bool = False
    """Whether the current build carries one out."""
    live: bool = False
    """Whether questions are asked live: the queue must not be empty for a moment."""
    paused: str = ""
    """Who paused the ticks, and why; empty if they are not paused."""
    closed: bool = False
    """Whether the inbox has been moved into the ledger while the round it leads to is not committed yet."""
    built: frozenset[Step] = frozenset()
    """Steps of the build that have finished with exactly these inputs."""
    decided: bool = False
    done: frozenset[Step] = frozenset()


class Closing(Struct, frozen=True):
    """When a round closes (`round` in `params.yaml`): at the quorum, or after the deadline with enough labels."""

    quorum: float
    deadline_days: float
    min_labels: int


def next_step(facts: Facts, rule: Closing) -> Step | Wait:
    """The step to take now, or the reason to wait. Total: defined for every combination of facts."""
    if facts.untagged is not None:
        return Step.TAG
    if facts.unsynced and Step.SYNC not in facts.done:
        return Step.SYNC
    if facts.amend:
        return Step.CLOSE
    if facts.paused and not facts.amending:
        return Wait(f"{facts.paused}; `al resume` ends the pause")
    if facts.closed:
        return next((step for step in BUILD if step not in facts.built), Step.PUBLISH if facts.decided else Step.DECIDE)
    if facts.planned is None:
        if Step.INGEST not in facts.done:
            return Step.INGEST
        return Step.CLOSE if facts.items else Wait("there is nothing to ask about; `al ingest FILE` adds items")
    if facts.brought:
        return Step.CLOSE
    queue = (Step.PUSH, Step.RETIRE) if facts.live else (Step.RETIRE, Step.PUSH)
    for step in (Step.CONNECT, *queue, Step.PULL, Step.INGEST):
        if step not in facts.done and not (step is Step.PUSH and (facts.budget or facts.stopped)):
            return step
    if close_reason(facts, rule) is None:
        return Wait(waiting_for(facts, rule))
    return Step.AUDIT if Step.AUDIT not in facts.done else Step.CLOSE


def close_reason(facts: Facts, rule: Closing) -> str | None:
    """Why an open round closes now; None if it stays open. Without new items or answers it never closes."""
    if facts.brought:
        return f"{facts.brought:,} labels were brought along"
    if facts.tasks == 0:
        if facts.incoming:
            return f"{facts.incoming} new items came in"
        return f"{facts.new_labels} late answers came in" if facts.new_labels else None
    if facts.settled >= needed(facts.tasks, rule.quorum):
        return f"{facts.settled} of {facts.tasks} tasks are settled"
    ended = facts.budget or facts.stopped
    if ended and facts.new_labels >= max(rule.min_labels, 1):
        return f"{ended}, and {facts.settled} of {facts.tasks} tasks are settled"
    if facts.close_requested and facts.new_labels:
        return f"asked to, with {facts.settled} of {facts.tasks} tasks settled"
    if facts.age_days >= rule.deadline_days and facts.new_labels >= max(rule.min_labels, 1):
        return f"the deadline of {rule.deadline_days:g} days has passed with {facts.new_labels} new labels"
    return None


def waiting_for(facts: Facts, rule: Closing) -> str:
    """What an open round waits for, in words."""
    if facts.tasks == 0:
        return "every item in the pool is labelled or ignored; `al ingest FILE` adds new ones"
    if facts.budget or facts.stopped:
        closes = "; `al round --close-now` closes the round with the answers that there are" if facts.new_labels else ""
        goes_on = "a higher `budget`" if facts.budget else "`stop.action: propose`"
        return f"{facts.budget or facts.stopped}, so nothing new is asked; {goes_on} in params.yaml goes on{closes}"
    missing = needed(facts.tasks, rule.quorum) - facts.settled
    again = f" ({facts.asked_again} by another person)" if facts.asked_again else ""
    text = f"{missing} more of {facts.tasks} tasks to be answered in Label Studio{again}"
    if facts.room is not None and facts.room < missing:
        text = f"{text} (the budget has room for {facts.room:,} more answers)"
    if facts.age_days >= rule.deadline_days:
        return f"{text}; the deadline has passed, but there are only {facts.new_labels} of {rule.min_labels} new labels"
    return f"{text}, or {rule.deadline_days - facts.age_days:.1f} days"


def needed(tasks: int, quorum: float) -> int:
    """Number of settled tasks that make the quorum: at least one, at most all."""
    return min(tasks, max(1, math.ceil(quorum * tasks - 1e-9)))


def state(facts: Facts) -> State:
    """The state of the current round, in one word."""
    if facts.closed:
        if facts.decided:
            return "decided"
        return "built" if facts.built.issuperset(BUILD) else "closed"
    if facts.planned is None:
        return "empty" if facts.items == 0 else "planned"
    if facts.brought:
        return "planned"
    if facts.tasks == 0:
        return "exhausted"
    return "open"
