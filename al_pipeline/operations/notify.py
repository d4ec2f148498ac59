"""Tell people what happened in a workspace, once each. A failing service is a warning, never an error of the tick."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import get_args

import msgspec
from msgspec.structs import replace

from al_pipeline.annotation.active_events import active
from al_pipeline.annotation.gold import GOLD
from al_pipeline.annotation.tasks import standing
from al_pipeline.data.ledger import read_events
from al_pipeline.errors import AlError, BadInput, ExternalServiceError, NothingToDo, UsageError
from al_pipeline.files import write_bytes
from al_pipeline.logs import get_logger
from al_pipeline.notifications import outbox as boxes
from al_pipeline.notifications.messages import (
    Answer,
    Message,
    budget_nearly_spent,
    drift_found,
    gold_accuracy_fell,
    held,
    needs_person,
    published,
    round_full,
    wanted,
)
from al_pipeline.notifications.outbox import Outbox
from al_pipeline.notifications.silence import silent_annotators
from al_pipeline.operations.costs import budget_uses
from al_pipeline.operations.facts import opened_at
from al_pipeline.operations.gold_figures import below_bound, on_gold
from al_pipeline.operations.steps.context import Context
from al_pipeline.operations.steps.notes import recall
from al_pipeline.params import Occasion
from al_pipeline.rounds.state_machine import Facts
from al_pipeline.sanitize import one_line, shortened
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import NOTIFY_VARIABLE, Workspace

Run = Callable[[str, Callable[[], None]], object]
"""Runs an action under a name; a tick passes its own runner, which makes it a task of its own."""

_logger = get_logger(__name__)

_MOST_SERVICES = 50
_LONGEST_ADDRESS = 2000
_LONGEST_NAME = 100


@contextmanager
def failures_told(workspace: Workspace, run: Run) -> Iterator[None]:
    """Tell people if what is done inside fails and a person is needed; the error is raised again."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, NothingToDo):
            _quietly(partial(_tell_failure, workspace, error, run))
        raise


def tell_closed(context: Context, facts: Facts, run: Run) -> None:
    """Tell people that the round is full, when its build begins."""
    number = facts.planned
    if number is None or facts.amending or not _is_used(context.workspace):
        return

    def tell() -> list[str]:
        reason = str(recall(context.layout, number).get("reason") or "its answers are in")
        return _tell(context.workspace, _read(context.layout), [round_full(number, reason)], run)

    context.outcome.warnings += _quietly(tell)


def tell_outcome(context: Context, facts: Facts, run: Run) -> None:
    """Tell people what a tick that ended well has done and found."""
    if not _is_used(context.workspace):
        return

    def tell() -> list[str]:
        box = _read(context.layout)
        fine = replace(boxes.without(box, "needs_person:"), failures=0)
        if fine.since is None:
            known = [record.round for record in context.history.rounds if record.round not in context.outcome.published]
            fine = replace(fine, since=max(known, default=-1))
        if fine != box:
            _write(context.layout, fine)
        found = list(_found(context, facts, fine))
        for kind in ("gold_accuracy_fell:", "drift_found:"):
            fine = boxes.only_present(fine, kind, {message.key for message in found})
        return _tell(context.workspace, fine, found, run)

    context.outcome.warnings += _quietly(tell)


def _found(context: Context, facts: Facts, box: Outbox) -> Iterator[Message]:
    """All that there is to tell now; the outbox knows what was told."""
    if context.history.rounds and box.since is not None and (newest := context.history.rounds[-1]).round > box.since:
        verdict = newest.decision.verdict
        yield published(newest.round, verdict, newest.counts.labelled, newest.metrics.macro_f1.value)
        if verdict != "promoted":
            yield held(newest.round, verdict, newest.decision.reasons)
    if facts.tasks and facts.planned is not None and not facts.closed and not facts.paused:
        yield from _silent(context, facts.planned)
    for source in SOURCES:
        yield from source(context, facts)


def _budget(context: Context, facts: Facts) -> Iterator[Message]:
    budget = context.workspace.params.budget
    if "budget_nearly_spent" not in context.workspace.params.notify.events or not budget.is_set:
        return
    from al_pipeline.costs.budget import NEARLY, amount  # few workspaces have a budget

    for one in budget_uses(context.layout, budget):
        share = 1.0 if one.what in facts.budget else one.share
        if share >= NEARLY and one.spent is not None:
            yield budget_nearly_spent(one.what, amount(one.what, one.spent), amount(one.what, one.limit), share)


def _gold(context: Context, facts: Facts) -> Iterator[Message]:
    params, layout = context.workspace.params, context.layout
    if "gold_accuracy_fell" not in params.notify.events:
        return
    keys = frozenset(key for key, task in context.plans().items() if task.strategy == GOLD)
    if not keys:
        return
    counted = active(read_events(layout.events, layout.inbox_events))
    below = below_bound(params, counted, keys)
    for one in on_gold(counted, keys):
        if one.annotator in below:
            yield gold_accuracy_fell(one.annotator, one.right, one.answers, one.high, params.quality.min_gold)


def _drift(context: Context, facts: Facts) -> Iterator[Message]:
    if not context.layout.drift.exists():
        return
    from al_pipeline.operations.drift_looks import read_looks  # few workspaces keep requests

    found = read_looks(context.layout)
    look = None if found is None else found.look
    if look is not None and look.alarm_since is not None:
        yield drift_found(f"{look.alarm_since:.0f}", ", ".join(look.found))


SOURCES: tuple[Callable[[Context, Facts], Iterable[Message]], ...] = (_budget, _gold, _drift)
"""What else there is to tell at the end of a tick that went well."""


def _silent(context: Context, planned: int) -> Iterator[Message]:
    layout, params = context.layout, context.workspace.params
    if "annotator_silent" not in params.notify.events:
        return
    events = read_events(layout.events, layout.inbox_events)
    tasks = context.history.open_tasks()
    found = standing(tasks, events, params.round.overlap, len(params.annotators) or None)
    yield from silent_annotators(
        active(events),
        [key for key, state in found.items() if state == "open"],
        params.annotators,
        datetime.fromtimestamp(opened_at(layout, context.git, planned), UTC),
        context.now(),
        params.notify.silent_days,
        planned,
    )


def _tell_failure(workspace: Workspace, error: Exception, run: Run) -> list[str]:
    """Note the failure, and tell people of it if one is needed."""
    if not _is_used(workspace):
        return []
    box = _read(workspace.layout)
    box = replace(box, failures=box.failures + 1)
    _write(workspace.layout, box)
    message = needs_person(error, box.failures)
    return _tell(workspace, box, [message] if message else [], run)


def _tell(workspace: Workspace, box: Outbox, messages: Iterable[Message], run: Run) -> list[str]:
    """Put messages into the outbox and send what is in it; the warnings about services that failed."""
    layout, services = workspace.layout, workspace.services()
    titled = (replace(one, title=f"{_name(workspace)}: {one.title}") for one in wanted(messages, _events(workspace)))
    box = boxes.with_messages(box, titled)
    todo = boxes.to_send(box, services)
    if not todo:
        if (done := boxes.settled(box, services)) != box:
            _write(layout, done)
        return []
    box = boxes.begun(box, todo)
    _write(layout, box)
    warnings: list[str] = []

    def notify() -> None:
        from al_pipeline.integrations.notification_services import send  # most ticks have nothing to tell

        answers = send({name: services[name] for name in todo}, todo)
        got = {(one.service, one.key): one.delivered for one in answers if one.key is not None and one.known}
        _write(layout, boxes.settled(boxes.answered(box, got), services))
        warnings.extend(_warnings(answers))

    run("notify", notify)
    return warnings


def _name(workspace: Workspace) -> str:
    """The name of the workspace's folder on one line: it becomes part of a mail's subject."""
    return shortened(one_line(workspace.layout.root.name), _LONGEST_NAME)


def _events(workspace: Workspace) -> Collection[Occasion]:
    """The events that people want to be told of: all, if params.yaml itself is what is wrong."""
    try:
        return workspace.params.notify.events
    except AlError:
        return get_args(Occasion)


def _warnings(answers: Iterable[Answer]) -> Iterator[str]:
    said = dict.fromkeys((one.service, one.kind, one.answer) for one in answers if not one.delivered)
    for service, kind, answer in said:
        yield f"notification service {service}{f' ({kind})' if kind else ''} did not take a message: {answer}"


def _quietly(tell: Callable[[], list[str]]) -> list[str]:
    """Call `tell`; an error becomes a warning. What people are told must not decide whether a tick succeeds."""
    try:
        return tell()
    except Exception as error:
        said = str(error) if isinstance(error, AlError) else type(error).__name__
        _logger.warning("people could not be told: %s", said)
        return [f"people could not be told: {said}"]


def _is_used(workspace: Workspace) -> bool:
    """Whether there is a service. Costs a tick one look at the file system."""
    try:
        return bool(workspace.services())
    except AlError as error:
        _logger.warning("people could not be told: %s", error)
        return False


def _read(layout: Layout) -> Outbox:
    """The outbox; empty if there is none. Raises BadInput if it is damaged."""
    try:
        return boxes.parse(layout.outbox.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Outbox()
    except ValueError:
        raise BadInput(
            f"{layout.outbox} is damaged, so it is not known what people were told; delete it: what holds then is told "
            "again"
        ) from None


def _write(layout: Layout, box: Outbox) -> None:
    write_bytes(layout.outbox, msgspec.json.format(msgspec.json.encode(box), indent=2) + b"\n", 0o600)


# What `al notify` and `al doctor` do ---------------------------------------------------------------------------------


def add_service(workspace: Workspace, address: str) -> Answer:
    """Store a service's address, if Apprise has a service for it; nothing is sent. Raises UsageError."""
    from al_pipeline.integrations.notification_services import send

    address = address.strip()
    if not address or len(address) > _LONGEST_ADDRESS or not address.isprintable() or " " in address:
        raise UsageError(
            "the address of a service is one line without blanks, such as mailto://user:password@example.org; "
            "https://appriseit.com/services lists the services"
        )
    refuse_variable()
    services = workspace.services()
    if address in services.values():
        raise NothingToDo("this service is stored already; `al notify list` shows the services")
    if len(services) >= _MOST_SERVICES:
        raise UsageError(f"there are {_MOST_SERVICES} services already; `al notify remove NUMBER` removes one")
    number = str(max(map(int, services), default=0) + 1)
    (found,) = send({number: address}, {})
    if not found.known:
        raise ExternalServiceError("Apprise gave no answer; try again")
    if found.kind is None:
        raise UsageError(
            "Apprise has no service for this address; https://appriseit.com/services lists the services and the form "
            "of their addresses"
        )
    workspace.store_services({**services, number: address})
    return found


def remove_service(workspace: Workspace, name: str) -> None:
    """Forget a service. Raises UsageError if there is none of this name."""
    refuse_variable()
    services = workspace.services()
    if name not in services:
        raise UsageError(f"there is no service {name!r}; `al notify list` shows the services")
    workspace.store_services({number: url for number, url in services.items() if number != name})


def refuse_variable() -> None:
    """Raise UsageError if the services come from the environment: what is stored would have no effect."""
    if os.environ.get(NOTIFY_VARIABLE, "").split():
        raise UsageError(f"the services come from {NOTIFY_VARIABLE} here; unset it, or change it there")


def list_services(workspace: Workspace) -> list[Answer]:
    """What kind of service each one is; nothing is sent."""
    from al_pipeline.integrations.notification_services import send

    services = workspace.services()
    return send(services, {}) if services else []


def test_services(workspace: Workspace, service: str | None = None) -> list[Answer]:
    """Send a test message to every service, or to one. Raises NothingToDo if there is none, UsageError."""
    from al_pipeline.integrations.notification_services import send

    services = _chosen(workspace.services(), service)
    message = Message(
        "test", "needs_person", f"{_name(workspace)}: a test of al-pipeline", "Messages about this workspace arrive."
    )
    return send(services, {one: [message] for one in services})


def _chosen(services: Mapping[str, str], service: str | None) -> Mapping[str, str]:
    if not services:
        raise NothingToDo(f"there is no service; `al notify add` stores one, or set {NOTIFY_VARIABLE}")
    if service is None:
        return services
    if service not in services:
        raise UsageError(f"there is no service {service!r}; `al notify list` shows the services")
    return {service: services[service]}


def outbox_of(workspace: Workspace) -> Outbox:
    """What is to be told, and what was told. Raises BadInput if the file is damaged."""
    return _read(workspace.layout)
