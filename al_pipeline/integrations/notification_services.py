"""Services that carry messages to people: e-mail, chat, webhooks, by Apprise.

Apprise runs in a process of its own (`apprise_process`): its import takes half a second, which a tick with nothing to
tell must not spend; a service that hangs is ended with the process; and what Apprise logs stays there, since it may
show parts of an address, which are secrets.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping

from al_pipeline.integrations.processes import end_group
from al_pipeline.logs import get_logger, without_secrets
from al_pipeline.notifications.messages import NO_ANSWER, Answer, Message
from al_pipeline.sanitize import one_line
from al_pipeline.workspace.home import SECRET_VARIABLES

_logger = get_logger(__name__)

SECONDS = 30.0
"""The time that all services have together."""
PAUSE = 2.0
"""Seconds after which a message is sent once more to a service that refused it at once."""


def send(
    services: Mapping[str, str], messages: Mapping[str, Iterable[Message]], seconds: float = SECONDS
) -> list[Answer]:
    """Give each service (address by name) its messages; a service without messages is only looked at.

    Returns an answer for each of them, in the order given. Never raises because of a service; takes `seconds` at most.
    """
    asked = {
        name: [{"key": one.key, "title": one.title, "body": one.body} for one in messages.get(name, ())]
        for name in services
    }
    found = {(one.service, one.key): one for one in _run(services, asked, seconds)}
    answers = []
    for name, rows in asked.items():
        keys: list[str | None] = [row["key"] for row in rows]
        for key in keys or [None]:
            known = found.get((name, key), Answer(name, None, key, False, NO_ANSWER))
            answers.append(known)
            if key is not None:
                _logger.info("notification service %s: %s", name, known.answer)
    return answers


def _run(services: Mapping[str, str], messages: Mapping[str, list[dict[str, str]]], seconds: float) -> Iterable[Answer]:
    """The answers that came in time."""
    environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
    asked = json.dumps({"services": dict(services), "messages": messages, "seconds": seconds, "pause": PAUSE})
    command = [sys.executable, "-P", "-m", "al_pipeline.integrations.apprise_process"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        text=True,
        encoding="utf-8",
    ) as process:
        try:
            lines, _ = process.communicate(asked, seconds)
        except subprocess.TimeoutExpired as error:
            end_group(process.pid)
            lines, _ = process.communicate()
            partial = error.stdout or b""
            lines = lines or (partial.decode("utf-8", "replace") if isinstance(partial, bytes) else partial)
        finally:
            end_group(process.pid)
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            answer = one_line(without_secrets(str(row["answer"])))
            yield Answer(str(row["service"]), row["kind"], row["key"], row["delivered"] is True, answer)
