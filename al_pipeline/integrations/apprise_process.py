"""The process that gives messages to services through Apprise; `notification_services` starts it.

It reads one JSON object from standard input: `services` (addresses by name), `messages` (keys, titles and bodies by
service), `seconds`, `pause`. It writes a line of JSON for each message and service as soon as that has answered, and
ends by itself after `seconds`. Addresses come by a pipe alone: no command line, no file, no log has them.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from apprise import Apprise, AppriseAsset, NotifyFormat, PersistentStoreMode

_QUICK_SECONDS = 2.0
"""A failure that comes sooner is no time-out, so the message did not arrive; it is sent once more after the pause."""
_SHORTEST_SECRET = 3
_REASONS = re.compile(
    r"(?i)connection refused|connection reset|timed out|name or service not known|temporary failure in name resolution|"
    r"no address associated with hostname|network is unreachable|no route to host|certificate verify failed|"
    r"wrong version number|authentication \w+|unexpectedly closed|(?<=\()[45]\d\d(?=,)"
)
"""Parts of an error's text that say why, and are no secret."""
_lock = threading.Lock()
_records = threading.local()


class _Collect(logging.Handler):
    """Keeps what Apprise logs in the thread that sends."""

    def emit(self, record: logging.LogRecord) -> None:
        kept: list[logging.LogRecord] | None = getattr(_records, "kept", None)
        if kept is not None:
            kept.append(record)


def main() -> None:
    """Send all messages, each service in a thread of its own."""
    asked = json.load(sys.stdin)
    signal.alarm(max(1, round(asked["seconds"])))
    logger = logging.getLogger("apprise")
    logger.handlers, logger.propagate = [_Collect()], False
    logger.setLevel(logging.DEBUG)
    asset = AppriseAsset(app_id="al-pipeline", storage_mode=PersistentStoreMode.MEMORY, secure_logging=True)
    threads = [
        threading.Thread(target=_serve, args=(asset, name, url, asked["messages"].get(name, ()), asked["pause"]))
        for name, url in asked["services"].items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _serve(asset: AppriseAsset, name: str, url: str, messages: Sequence[Mapping[str, str]], pause: float) -> None:
    """Give one service its messages; without any, only say what kind of service it is."""
    _records.kept = []
    try:
        service = Apprise.instantiate(url, asset=asset)
    except Exception as error:  # a plug-in of Apprise may do anything
        service, kind = None, type(error).__name__
    else:
        kind = str(service.service_name) if service else ""
    if service is None:
        answer = f"Apprise has no service for this address{f' ({kind})' if kind else ''}"
        keys: list[str | None] = [message["key"] for message in messages]
        for key in keys or [None]:
            _write({"service": name, "kind": None, "key": key, "delivered": False, "answer": answer})
        return
    if not messages:
        _write({"service": name, "kind": kind, "key": None, "delivered": False, "answer": ""})
    hidden = _parts(url)
    for message in messages:
        delivered, answer = _deliver(service, asset, message, hidden, pause)
        _write({"service": name, "kind": kind, "key": message["key"], "delivered": delivered, "answer": answer})


def _deliver(
    service: Any, asset: AppriseAsset, message: Mapping[str, str], hidden: Sequence[str], pause: float
) -> tuple[bool, str]:
    """Send a message, once more after a quick failure; whether the service took it, and its answer without secrets."""
    answer = ""
    for attempt in range(2):
        _records.kept = []
        begin = time.monotonic()
        sender = Apprise(asset=asset)
        sender.add(service)
        try:
            if sender.notify(title=message["title"], body=message["body"], body_format=NotifyFormat.TEXT):
                return True, "delivered"
            answer = _answer(_records.kept, hidden)
        except Exception as error:  # a plug-in of Apprise may do anything
            answer = type(error).__name__
        if attempt == 0 and time.monotonic() - begin < _QUICK_SECONDS:
            time.sleep(pause)
        else:
            break
    return False, answer


def _answer(records: Sequence[logging.LogRecord], hidden: Sequence[str]) -> str:
    """What a service answered, in Apprise's words, without any part of its address."""
    said = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    details = [record.getMessage() for record in records if record.levelno < logging.WARNING]
    reasons = dict.fromkeys(found.lower() for text in details for found in _REASONS.findall(text))
    text = " ".join(dict.fromkeys(said)) or "it did not take the message"
    for part in hidden:
        text = text.replace(part, "***")
    return " ".join(f"{text} {'(' + ', '.join(reasons) + ')' if reasons else ''}".split())[:500]


def _parts(url: str) -> list[str]:
    """The parts of an address that an answer may not show, longest first: all but its scheme."""
    rest = url.partition("://")[2] or url
    texts = {rest, unquote(rest)}
    words = {word for text in texts for word in re.split(r"[/?&=:@#,\s]+", text)}
    return sorted((word for word in words | texts if len(word) >= _SHORTEST_SECRET), key=len, reverse=True)


def _write(row: Mapping[str, Any]) -> None:
    with _lock:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
