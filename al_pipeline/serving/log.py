"""The log of requests: one JSON object a line, without texts. Writing never delays an answer."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

_MOST_WAITING = 10_000


class RequestLog:
    """Writes lines in a thread; if they are not read fast enough, new ones are dropped and counted."""

    def __init__(self, out: TextIO | None = None) -> None:
        """`out`: None for standard error."""
        self._out = out
        self._lines: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="al-serve-log", daemon=True)
        self._thread.start()

    def write(self, event: str, **fields: Any) -> None:
        """Log an event with the time of this call."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self._lines.put_nowait({"time": now, "event": event, **fields})
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits, for a second at most."""
        try:
            self._lines.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(timeout=1)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._dropped:
                line = {**line, "dropped": self._dropped}
                self._dropped = 0
            out = self._out or sys.stderr
            try:
                out.write(json.dumps(line, ensure_ascii=True) + "\n")
                out.flush()
            except (OSError, ValueError):  # nobody reads it any more
                return
