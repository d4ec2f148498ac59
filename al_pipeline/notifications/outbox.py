"""What is to be told to which service, and what was told: each message once.

The outbox is written before a message is sent and after each answer. A service that says no gets a message again at the
next ticks, TRIES times in all. If the process is killed before the answer is noted, or the service gives none in time,
it is not known whether the message arrived: then it is sent once more, and not again. So a kill repeats a message at
most once, and loses none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from al_pipeline.notifications.messages import Message

TRIES = 3
"""Attempts at a message that a service refuses."""
KEPT = 1000
"""The number of told keys that are kept, the newest."""
AT_ONCE = 4
"""The number of messages that a service gets in one tick, the oldest: many services take one each few seconds."""
MOST_WAITING = 100
"""The number of messages that wait for a service, the newest."""


class Delivery(Struct, frozen=True):
    """The attempts to give one message to one service."""

    begun: int = 0
    refused: int = 0
    delivered: bool = False

    @property
    def done(self) -> bool:
        """Whether there is nothing left to try."""
        return self.delivered or self.refused >= TRIES or self.begun - self.refused >= 2


class Entry(Struct, frozen=True):
    """A message that not every service has got, and the attempts by service."""

    message: Message
    deliveries: dict[str, Delivery] = {}


class Outbox(Struct, frozen=True):
    """All that is known about what people were told."""

    since: int | None = None
    """The newest round that was published when the outbox began (-1: none): nothing is told of it and of earlier ones.

    None: not known yet."""
    waiting: tuple[Entry, ...] = ()
    told: tuple[str, ...] = ()
    """Keys of the messages that are done with, oldest first."""
    failures: int = 0
    """How many ticks in a row have failed."""


def parse(text: str) -> Outbox:
    """Read an outbox. Raises ValueError if `text` is none."""
    return msgspec.json.decode(text, type=Outbox)


def with_messages(outbox: Outbox, messages: Iterable[Message]) -> Outbox:
    """Put messages into the outbox whose keys are not in it yet."""
    known = {*outbox.told, *(entry.message.key for entry in outbox.waiting)}
    new: dict[str, Entry] = {}
    for message in messages:
        if message.key not in known:
            new.setdefault(message.key, Entry(message))
    return replace(outbox, waiting=(*outbox.waiting, *new.values())[-MOST_WAITING:]) if new else outbox


def without(outbox: Outbox, prefix: str) -> Outbox:
    """Forget messages whose keys begin with `prefix`: what they say is no longer so, and would be news again."""
    return replace(
        outbox,
        waiting=tuple(entry for entry in outbox.waiting if not entry.message.key.startswith(prefix)),
        told=tuple(key for key in outbox.told if not key.startswith(prefix)),
    )


def only_present(outbox: Outbox, prefix: str, present: Collection[str]) -> Outbox:
    """Forget what was told with a key that begins with `prefix` and is not `present`: it would be news again."""
    gone = [key for key in outbox.told if key.startswith(prefix) and key not in present]
    return replace(outbox, told=tuple(key for key in outbox.told if key not in gone)) if gone else outbox


def to_send(outbox: Outbox, services: Iterable[str]) -> dict[str, list[Message]]:
    """The messages that each service is to get now: the oldest AT_ONCE that it lacks."""
    found = {
        name: [entry.message for entry in outbox.waiting if not entry.deliveries.get(name, Delivery()).done][:AT_ONCE]
        for name in services
    }
    return {name: messages for name, messages in found.items() if messages}


def begun(outbox: Outbox, sent: Mapping[str, Iterable[Message]]) -> Outbox:
    """Note, before they are sent, that the messages are on their way."""
    pairs = {(name, message.key) for name, messages in sent.items() for message in messages}
    return replace(outbox, waiting=tuple(_changed(entry, pairs, "begun") for entry in outbox.waiting))


def answered(outbox: Outbox, answers: Mapping[tuple[str, str], bool]) -> Outbox:
    """Note what the services answered, by service and key of the message: whether they took it."""
    taken = {pair for pair, yes in answers.items() if yes}
    refused = {pair for pair, yes in answers.items() if not yes}
    waiting = tuple(_changed(_changed(entry, taken, "delivered"), refused, "refused") for entry in outbox.waiting)
    return replace(outbox, waiting=waiting)


def settled(outbox: Outbox, services: Iterable[str]) -> Outbox:
    """Move messages that every service has got, or will not get, to those that were told."""
    names = list(services)
    done = [entry for entry in outbox.waiting if all(entry.deliveries.get(n, Delivery()).done for n in names)]
    if not done:
        return outbox
    keys = [entry.message.key for entry in done]
    left = tuple(entry for entry in outbox.waiting if entry.message.key not in set(keys))
    return replace(outbox, waiting=left, told=(*outbox.told, *keys)[-KEPT:])


def _changed(entry: Entry, pairs: set[tuple[str, str]], what: str) -> Entry:
    """The entry with one more attempt, refusal or delivery for the services that `pairs` names for its message."""
    named = [name for name, key in pairs if key == entry.message.key]
    if not named:
        return entry
    changed = dict(entry.deliveries)
    for name in sorted(named):
        one = changed.get(name, Delivery())
        value = True if what == "delivered" else getattr(one, what) + 1
        changed[name] = replace(one, **{what: value})
    return replace(entry, deliveries=changed)
