"""What `al live` shows of itself after each step: one JSON file that pages and terminals read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from al_pipeline.files import write_bytes
from al_pipeline.live.plan import is_running
from al_pipeline.workspace.layout import Layout

SILENT_SECONDS = 120.0
"""A state older than this shows that the process hangs, or that a tick takes long."""


class Interval(Struct, frozen=True):
    """A share with its interval, and the number of answers that it is from."""

    value: float | None
    low: float | None
    high: float | None
    answers: int


TEST, RUNNING = "test accuracy", "running accuracy"
"""The measures of the learning curve."""


class CurvePoint(Struct, frozen=True):
    """A point of the learning curve: of a published round, or of the open one."""

    labels: int
    value: float
    low: float | None
    high: float | None
    what: str
    """The measure: TEST of published rounds, or RUNNING, which grows while people answer."""
    round: int


class ClassState(Struct, frozen=True):
    """One class: its labels, and the mean uncertainty of the items that the model takes for it."""

    name: str
    labels: int
    predicted: int
    uncertainty: float | None


class PersonState(Struct, frozen=True):
    """A person who answered in this round; `seconds_ago`: since the last answer."""

    name: str
    answers: int
    seconds_ago: float
    at_work: bool


class QueueEntry(Struct, frozen=True):
    """An open question."""

    item_id: str
    kind: str
    """planned, chosen or random."""
    model: str
    """The digest of the model that asked it."""
    answers_known: int
    score: float
    seconds: float
    """Since it was asked."""
    text: str = ""
    """The start of the text that people see, on one line."""
    predicted: str | None = None
    """What the model that asked took it for."""
    confidence: float | None = None


class StopProposal(Struct, frozen=True):
    """Whether further labels still change the model's predictions."""

    agreement: float | None
    """Cohen's kappa with its own earlier predictions; None while there are too few labels for it."""
    proposed: bool
    sentence: str


class LiveState(Struct, frozen=True, kw_only=True):
    """The state of `al live` at `time` (seconds since 1970)."""

    time: float
    started: float
    pid: int
    workspace: str
    health: str
    """`up`, or what is wrong, or what it does."""
    waits_for: str
    round: int | None
    round_size: int
    settled: int
    labels: int
    """Labelled items of the pool, by the answers so far."""
    test_labels: int
    labels_per_hour: float
    """From the answers of the last ten minutes."""
    running: Interval | None
    """The accuracy of the models on the random share, before they knew the answers."""
    curve: tuple[CurvePoint, ...]
    classes: tuple[ClassState, ...]
    people: tuple[PersonState, ...]
    stop: StopProposal
    queue: tuple[QueueEntry, ...]
    model: str
    model_labels: int
    """The number of labels that the newest model knows."""
    stale: int
    """Open questions that an earlier model chose."""
    label_studio_page: str | None
    page: str | None = None
    """The address of the page of `al live`, without its token, if it serves one."""


def state_file(layout: Layout) -> Path:
    """Where the state is written."""
    return layout.live / "state.json"


def write_state(layout: Layout, state: LiveState) -> None:
    """Replace the state, readable by this user alone."""
    write_bytes(state_file(layout), msgspec.json.encode(state), 0o600)


def read_state(layout: Layout) -> LiveState | None:
    """The last state; None if there is none that this version can read."""
    try:
        return msgspec.json.decode(state_file(layout).read_bytes(), type=LiveState)
    except (OSError, msgspec.DecodeError, ValueError):
        return None


def sentence_of(layout: Layout, now: float) -> str | None:
    """What `al live` does, in a sentence; None if it does not run."""
    if not is_running(layout):
        return None
    state = read_state(layout)
    if state is None:
        return "starting"
    if now - state.time > SILENT_SECONDS:
        return f"it has not said anything for {now - state.time:.0f} s; {state.health}"
    if state.health != "up":
        return state.health
    asked = f"{len(state.queue)} questions open, {state.stale} of them by an earlier model"
    return f"{asked}; the newest model knows {state.model_labels:,} labels"


def to_row(state: LiveState) -> dict[str, Any]:
    """The state as a JSON object."""
    row: dict[str, Any] = msgspec.to_builtins(state)
    return row
