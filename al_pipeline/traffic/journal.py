"""Journals: lines that reach the operating system before an answer goes out. Each belongs to one process.

A journal is locked (flock) as long as its writer lives; whoever gets the lock may turn it into a segment. Lines after
the last line feed are those of a writer that was killed, and are ignored.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX, SUFFIX = "journal-", ".jsonl"
MOST_BYTES = 8 * 2**20
"""Size from which a journal is ended, so that it becomes a segment."""
MOST_SECONDS = 3600.0
"""Age from which it is."""
_STALE_SECONDS = 24 * 3600
"""On a file system without locks, a journal that is unchanged for so long has no writer."""


class Journal:
    """The journal of this process. Not safe for use by several threads at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle = -1
        self._begun, self._size = 0.0, 0

    def append(self, data: bytes) -> None:
        """Write whole lines; all of them, or none. They survive the end of this process, not a power cut.

        Raises OSError if the disk takes nothing more.
        """
        if self._handle < 0:
            self._open()
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._handle, view) :]
        except OSError:
            try:
                os.ftruncate(self._handle, self._size)
            except OSError:  # what is torn must stay the last of its file
                self.end()
            raise
        self._size += len(data)
        if self._size >= MOST_BYTES:
            self.end()

    def end_if_old(self) -> None:
        """End the journal if it is older than MOST_SECONDS."""
        if self._handle >= 0 and time.monotonic() - self._begun > MOST_SECONDS:
            self.end()

    def end(self) -> None:
        """End the journal; the next line begins another one."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _open(self) -> None:
        name = f"{PREFIX}{time.time_ns() // 1000:016d}-{secrets.token_hex(6)}{SUFFIX}"
        self._handle = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._begun, self._size = time.monotonic(), 0


def identity(path: Path) -> str:
    """What a journal and its segment have in common: the last part of their names."""
    return path.stem.rpartition("-")[2]


def lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a journal, without their line feeds; none if it is gone."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1]
    except FileNotFoundError:
        return


@contextlib.contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Whether the journal has no writer any more; while in this context nobody else takes it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = os.fstat(handle).st_mtime < time.time() - _STALE_SECONDS
        try:
            free = free and os.path.samestat(os.stat(path), os.fstat(handle))
        except FileNotFoundError:  # somebody else was faster
            free = False
        yield free
    finally:
        os.close(handle)
