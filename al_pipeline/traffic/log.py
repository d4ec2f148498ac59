"""The log of a server: each answer waits until its line has reached the operating system, but never for long.

One thread writes, another one turns journals into segments and deletes what is too old. What cannot be written (the
disk is full, the writer is behind, the redaction fails) is answered all the same, and counted.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from al_pipeline.errors import AlError
from al_pipeline.logs import get_logger
from al_pipeline.params import ServeLog
from al_pipeline.traffic.journal import Journal
from al_pipeline.traffic.rows import LoggedRequest, to_line
from al_pipeline.traffic.store import TrafficStore
from al_pipeline.workspace.home import private_folder

_logger = get_logger(__name__)

Redact = Callable[[str], str | None]
"""Changes a text before it is written; None: it is not written at all."""

_PATIENCE = 1.0
"""Seconds that an answer waits for its line at most; after that none waits until the writer goes on."""
_MOST_WAITING = 32 * 2**20
"""Characters of texts that may wait for the writer."""
_AT_ONCE = 4 * 2**20
_AGAIN = 5.0
"""Seconds after a failure within which the disk is not tried again."""
_TIDY_SECONDS = 60.0
_POLL_SECONDS = 1.0
_REPORT_SECONDS = 10.0
_TRIES = 3
"""How often the journal is ended after ids were named for deletion: the first time may come between two lines."""


class Reason(Enum):
    """Why texts were answered without being logged."""

    BEHIND = "the writer is behind"
    DISK = "the disk takes nothing"
    REDACTION = "the redaction failed"
    TEXT = "the text cannot be stored"
    WITHHELD = "the redaction withheld it"
    ENDED = "the server is ending"


class _State(Enum):
    WAITING, WRITING, DONE, GIVEN_UP = range(4)


class _Entry:
    """A request that waits for the writer."""

    __slots__ = ("future", "loop", "request", "size", "state")

    def __init__(self, request: LoggedRequest) -> None:
        self.request = request
        self.size = sum(map(len, request.texts))
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.state = _State.WAITING


class Counts(NamedTuple):
    """How many texts were logged, and how many were answered without."""

    logged: int
    unlogged: Mapping[str, int]
    """By the name of a `Reason`, in lower case."""


class TrafficLog:
    """The log of one server. `record` is called on the server's event loop; `close` at its end, from any thread."""

    def __init__(
        self,
        folder: Path,
        settings: ServeLog,
        redact: Redact | None = None,
        report: Callable[[Mapping[str, int]], None] = lambda _: None,
        patience: float = _PATIENCE,
    ) -> None:
        """`report` gets, at most every ten seconds, the texts by reason that were answered without being logged.

        Raises UnsafeFolder if others could read or write the log.
        """
        self._settings, self._redact, self._report, self._patience = settings, redact, report, patience
        self._store = TrafficStore(private_folder(folder))
        self._journal = Journal(self._store.folder)
        self._random = random.SystemRandom()
        self._changed = threading.Condition()
        self._queue: deque[_Entry] = deque()
        self._size, self._logged, self._broken_until = 0, 0, 0.0
        self._unlogged: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._closed, self._stuck, self._woken, self._to_end = False, False, False, False
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write, name="al-serve-traffic", daemon=True)
        self._files = threading.Thread(target=self._tidy, name="al-serve-traffic-files", daemon=True)
        self._writer.start()
        self._files.start()

    @property
    def share(self) -> float:
        """The share of requests that is logged."""
        return self._settings.share

    def drawn(self) -> bool:
        """Whether the next request belongs to the random share that is logged."""
        return self._random.random() < self.share

    def counts(self) -> Counts:
        """What was logged so far."""
        with self._changed:
            return Counts(self._logged, {reason.name.lower(): self._unlogged[reason.name.lower()] for reason in Reason})

    async def record(self, request: LoggedRequest) -> None:
        """Log a request: when this returns, its line has reached the operating system, or it is counted as unlogged.

        Never raises, and never waits longer than `patience` seconds.
        """
        entry = _Entry(request)
        with self._changed:
            if self._closed:
                return self._miss(entry, Reason.ENDED)
            if time.monotonic() < self._broken_until:
                return self._miss(entry, Reason.DISK)
            if self._stuck or (self._queue and self._size + entry.size > _MOST_WAITING):
                return self._miss(entry, Reason.BEHIND)
            self._queue.append(entry)
            self._size += entry.size
            self._changed.notify()
        try:
            async with asyncio.timeout(self._patience):
                await entry.future
        except TimeoutError:
            with self._changed:
                self._stuck = entry.state is not _State.DONE
                if entry.state is _State.WAITING:
                    entry.state = _State.GIVEN_UP
                    self._miss(entry, Reason.BEHIND)

    def close(self) -> None:
        """Write what waits, and turn the journal into a segment; for some seconds at most."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._writer.join(timeout=5)
        self._ended.set()
        self._files.join(timeout=10)
        self._tell()

    def _miss(self, entry: _Entry, reason: Reason, texts: int | None = None) -> None:
        """Count texts as unlogged; with the lock held."""
        self._unlogged[reason.name.lower()] += len(entry.request.texts) if texts is None else texts

    # The thread that writes ----------------------------------------------------------------------------------------
    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed and not self._woken:
                    self._changed.wait()
                entries = self._next()
                to_end, self._to_end, self._woken = self._to_end, False, False
                if not entries and self._closed:
                    break
            if entries:
                self._append(entries)
            with self._changed:
                self._stuck = False
            if to_end:
                self._journal.end()
            else:
                self._journal.end_if_old()
        self._journal.end()

    def _next(self) -> list[_Entry]:
        found: list[_Entry] = []
        size = 0
        while self._queue and size < _AT_ONCE:
            entry = self._queue.popleft()
            self._size -= entry.size
            if entry.state is _State.WAITING:
                entry.state = _State.WRITING
                found.append(entry)
                size += entry.size
        return found

    def _append(self, entries: Sequence[_Entry]) -> None:
        lines: list[bytes] = []
        written: list[tuple[_Entry, int]] = []
        for entry in entries:
            request, reason = self._redacted(entry.request)
            line = None
            if request is not None and request.texts:
                try:
                    line = to_line(request)
                except Exception:  # half a surrogate pair
                    reason = Reason.TEXT
            with self._changed:
                if reason is not None:
                    kept = 0 if line is None or request is None else len(request.texts)
                    self._miss(entry, reason, len(entry.request.texts) - kept)
            if line is not None and request is not None:
                lines.append(line)
                written.append((entry, len(request.texts)))
        try:
            if lines:
                self._journal.append(b"".join(lines))
            with self._changed:
                self._logged += sum(texts for _, texts in written)
        except OSError as error:
            _logger.error("the log of requests cannot be written: %s", error.strerror)
            with self._changed:
                self._broken_until = time.monotonic() + _AGAIN
                for entry, texts in written:
                    self._miss(entry, Reason.DISK, texts)
        with self._changed:
            for entry in entries:
                entry.state = _State.DONE
        for loop in {entry.loop for entry in entries}:
            own = [entry.future for entry in entries if entry.loop is loop]
            try:
                loop.call_soon_threadsafe(_settle, own)
            except RuntimeError:  # the loop has ended
                continue

    def _redacted(self, request: LoggedRequest) -> tuple[LoggedRequest | None, Reason | None]:
        """The request as it may be written, and why texts of it are missing."""
        if self._redact is None:
            return request, None
        try:
            found = [self._redact(text) for text in request.texts]
        except Exception as error:  # whatever it is; its words may quote the text
            _logger.error("serve.log.redact raised %s", type(error).__name__)
            return None, Reason.REDACTION
        if not all(text is None or isinstance(text, str) for text in found):
            return None, Reason.REDACTION
        kept = [place for place, text in enumerate(found) if text is not None]
        changed = replace(
            request,
            texts=tuple(text for text in found if text is not None),
            places=tuple(request.places[place] for place in kept),
            proba=tuple(request.proba[place] for place in kept),
            redacted=tuple(found[place] != request.texts[place] for place in kept),
        )
        return changed, Reason.WITHHELD if len(kept) < len(found) else None

    # The thread that keeps the files ---------------------------------------------------------------------------------
    def _tidy(self) -> None:
        next_tidy = next_report = 0.0
        deleting, tries = frozenset[str](), 0
        while True:
            ended = self._ended.wait(_POLL_SECONDS)
            now = time.monotonic()
            try:
                asked = self._store.deleting()
                tries = _TRIES if asked - deleting else tries
                deleting = asked
                if tries:
                    self._end_journal(at_once=True)
                if ended or tries or now >= next_tidy:
                    self._end_journal(at_once=False)
                    self._store.convert()
                    self._store.retain(self._settings.days, int(self._settings.max_mb * 1e6))
                    next_tidy, tries = now + _TIDY_SECONDS, max(tries - 1, 0)
            except (AlError, OSError) as error:
                _logger.error("the log of requests cannot be put in order: %s", error)
                next_tidy = now + _TIDY_SECONDS
            if now >= next_report and self._tell():
                next_report = now + _REPORT_SECONDS
            if ended:
                return

    def _end_journal(self, at_once: bool) -> None:
        """Have the writer end its journal: now, or only if it is old."""
        with self._changed:
            self._woken, self._to_end = True, self._to_end or at_once
            self._changed.notify()

    def _tell(self) -> bool:
        """Report what was not logged since the last call; return whether there was any."""
        with self._changed:
            news = self._unlogged - self._told
            self._told = Counter(self._unlogged)
        if news:
            self._report(news)
        return bool(news)


def _settle(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
