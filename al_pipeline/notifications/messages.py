"""The messages: one for each occasion, with a key by which it is told once.

A message holds numbers, names of rounds, classes and annotators, and sentences of ours; never a text of the pool, and
never the text of an error, which may name anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from datetime import datetime

from msgspec import Struct

from al_pipeline.errors import (
    AlError,
    BadInput,
    BadParams,
    CopiedWorkspace,
    EngineChanged,
    ExternalServiceError,
    Locked,
    ManualActionRequired,
    NoRoom,
    NothingToDo,
    NotReproduced,
    RepositoryError,
    SchemaInUse,
    StageFailed,
    UnexpectedChange,
    UnsafeFolder,
    UsageError,
    VanishedAnswers,
    WrongProject,
)
from al_pipeline.params import Occasion
from al_pipeline.records import round_name
from al_pipeline.sanitize import counted, one_line, shortened

FAILURES = 3
"""Ticks in a row that an external service makes fail before a person is told: it may come back by itself."""
_LONGEST = 1000

PROBLEMS: tuple[tuple[type[Exception], str], ...] = (
    (UnexpectedChange, "files that the engine owns were changed by somebody else"),
    (UnsafeFolder, "others could change a folder whose content is trusted"),
    (WrongProject, "the project in Label Studio is not this workspace's"),
    (CopiedWorkspace, "the workspace is, or may be, a copy of another clone"),
    (VanishedAnswers, "more answers vanished from Label Studio than people plausibly deleted"),
    (SchemaInUse, "params.yaml renames or removes a class that answers use"),
    (EngineChanged, "the engine is not the one that began the build"),
    (StageFailed, "a stage of the build failed"),
    (NotReproduced, "a round that was made again differs from its record"),
    (ManualActionRequired, "going on could destroy data"),
    (BadParams, "a value in params.yaml is invalid"),
    (BadInput, "a file cannot be read"),
    (UsageError, "the workspace cannot be used as it is"),
    (NoRoom, "a disk is full"),
    (RepositoryError, "git or DVC fails"),
    (ExternalServiceError, "a service does not answer, or refuses"),
    (AlError, "the tick ended with an error"),
    (OSError, "the operating system refuses: a full disk, a missing file or a permission"),
    (Exception, "the tick ended with an unexpected error, which is a bug"),
)
"""What went wrong, by the class of the error; the first that fits. Texts of errors are not sent."""


class Message(Struct, frozen=True):
    """One thing to tell people."""

    key: str
    """What it is about; a key is told once."""
    event: Occasion
    title: str
    body: str


NO_ANSWER = "no answer in time"


class Answer(Struct, frozen=True):
    """What became of one message at one service."""

    service: str
    """The service's name here: a number, or `AL_NOTIFY_URLS:1`."""
    kind: str | None
    """What it is, such as `E-Mail`; None if Apprise has no service for its address."""
    key: str | None
    """The message; None if none was sent."""
    delivered: bool
    """Whether the service took it."""
    answer: str
    """What it said, without any part of its address."""

    @property
    def known(self) -> bool:
        """Whether the service answered at all."""
        return self.answer != NO_ANSWER


def round_full(number: int, reason: str) -> Message:
    """Round `number` was closed; `reason`: why, as `al rounds` says it."""
    return _message(
        f"round_full:{number}",
        "round_full",
        f"Round {number} is full",
        f"It was closed: {reason}. The next batch comes when the new model is trained; `al status` says how far it is.",
    )


def published(number: int, verdict: str, labelled: int, macro_f1: float | None) -> Message:
    """Round `number` was published with a new model."""
    score = "" if macro_f1 is None else f", macro-F1 {macro_f1:.3f} on the test set"
    return _message(
        f"published:{number}",
        "published",
        f"Round {number} is published",
        f"{counted(labelled, 'item')} labelled{score}; the new model is {verdict}. `al report {number}` shows the "
        "round. The next batch is in Label Studio, unless nothing is left to ask.",
    )


def held(number: int, verdict: str, reasons: Iterable[str]) -> Message:
    """The gate did not promote the model of round `number`; `reasons` are its sentences."""
    act = "`al approve` promotes it" if verdict == "held" else "The promoted model stays"
    return _message(
        f"held:{number}",
        "held",
        f"The model of {round_name(number)} is {verdict}",
        f"{'; '.join(reasons)}. {act}; `al report {number}` has the figures.",
    )


def needs_person(error: Exception, failures: int) -> Message | None:
    """A tick ended with `error`, the last of `failures` in a row; None if no person is needed (yet).

    An external service has FAILURES ticks to come back; a busy workspace and nothing to do are no failures.
    """
    if isinstance(error, Locked | NothingToDo):
        return None
    of_prefect = type(error).__module__.split(".")[0] in ("httpcore", "httpx", "prefect")
    passing = of_prefect or isinstance(error, ExternalServiceError) and not isinstance(error, NoRoom)
    if passing and failures < FAILURES:
        return None
    kind = type(error).__name__
    since = f" {failures} ticks in a row have failed." if failures > 1 else ""
    return _message(
        f"needs_person:{kind}",
        "needs_person",
        "A tick needs a person",
        f"It stopped: {'Prefect fails' if of_prefect else problem_of(error)} ({kind}).{since} `al round` there says "
        "what is wrong and how to fix it, `al doctor` checks everything else.",
    )


def problem_of(error: Exception) -> str:
    """What went wrong, in words of ours."""
    return next(sentence for kind, sentence in PROBLEMS if isinstance(error, kind))


def annotator_silent(annotator: str, last: datetime | None, days: float, waiting: int) -> Message:
    """An annotator has not answered for `days` while `waiting` tasks wait; `last`: their last answer, if any."""
    when = "never" if last is None else f"last on {last:%Y-%m-%d %H:%M} UTC"
    return _message(
        f"annotator_silent:{annotator}:{'never' if last is None else last.isoformat(timespec='seconds')}",
        "annotator_silent",
        f"{annotator} has not answered for {days:.0f} days",
        f"They answered {when}; {counted(waiting, 'task')} {'waits' if waiting == 1 else 'wait'} for them in Label "
        "Studio.",
    )


def gold_accuracy_fell(annotator: str, right: int, answered: int, high: float, bound: float) -> Message:
    """An annotator's accuracy on gold is below `bound`, with the upper end `high` of its interval below it too."""
    return _message(
        f"gold_accuracy_fell:{annotator}",
        "gold_accuracy_fell",
        f"{annotator} is below the bound on gold",
        f"{right} of {answered} answers to gold are right, at most {high:.0%} with the interval; the bound is "
        f"{bound:.0%} (quality.min_gold). `al quality` shows the evidence.",
    )


def budget_nearly_spent(what: str, spent: str, limit: str, share: float) -> Message:
    """`share` of the budget for `what` (labels, hours, money) is spent: `spent` of `limit`, in words."""
    over = share >= 1
    return _message(
        f"budget_nearly_spent:{what}:{limit}:{'all' if over else 'nearly'}",
        "budget_nearly_spent",
        f"The budget of {what} is {'spent' if over else 'nearly spent'}",
        f"{spent} of {limit} ({share:.0%}). "
        + (
            "Nothing new is asked until budget in params.yaml is raised." if over else "`al status` shows what is left."
        ),
    )


def drift_found(since: str, told: str) -> Message:
    """Kept requests differ from the pool. `since`: the first of an unbroken row of alarms; `told`: the tests."""
    return _message(
        f"drift_found:{since}",
        "drift_found",
        "Requests differ from the pool",
        f"By {told}. The model may be wrong on them: `al drift` shows what is new, and `traffic` in params.yaml takes "
        "requests into the pool.",
    )


def wanted(messages: Iterable[Message], events: Collection[str]) -> Iterator[Message]:
    """Those messages of which people want to be told."""
    return (message for message in messages if message.event in events)


def _message(key: str, event: Occasion, title: str, body: str) -> Message:
    return Message(key, event, shortened(one_line(title), 200), shortened(one_line(body), _LONGEST))
