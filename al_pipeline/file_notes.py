"""What was learnt about files by reading them, remembered until they change."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from al_pipeline.files import SETTLED_NS, sha256_file, write_text

_FILE = "files.json"
_MOST = 5000
"""Remembered files beyond which those that are gone are forgotten."""


class FileNotes:
    """A note for each file: valid while its size, times, inode and device are the same.

    `folder` (made for its owner alone) holds the notes between processes. Without one, or where somebody else could
    have written it, nothing is remembered. Two processes that write at once cost another reading, and nothing else.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[str, list[Any]] = {} if folder is None else _load(folder)
        self._changed = False

    def known(self, key: str, mark: list[Any]) -> str | None:
        """The note for `key`, if it was made for just this `mark`."""
        known = self._known.get(key)
        return known[1] if isinstance(known, list) and len(known) == 2 and known[0] == mark else None

    def remember(self, key: str, mark: list[Any], note: str) -> None:
        """Know `note` of `key` for as long as its `mark` is this one."""
        self._known[key] = [mark, note]
        self._changed = True

    def save(self) -> None:
        """Keep the notes for other processes."""
        if self._folder is None or not self._changed:
            return
        if len(self._known) > _MOST:
            self._known = {key: known for key, known in self._known.items() if "://" in key or os.path.exists(key)}
        with contextlib.suppress(OSError):  # a place that cannot be written costs another reading, and nothing else
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            write_text(self._folder / _FILE, json.dumps(self._known, sort_keys=True), 0o600)
        self._changed = False

    def sha256(self, path: Path) -> str:
        """The SHA-256 of a file's content, in hex. Raises OSError where it cannot be read."""
        key, mark = os.path.abspath(path), file_mark(path)
        if (known := self.known(key, mark)) is not None:
            return known
        found = sha256_file(path)
        if file_mark(path) == mark and settled(mark):
            self.remember(key, mark, found)
        return found


def file_mark(path: Path) -> list[int]:
    """What changes with a file's content: size, times of change (of content and of inode, ns), inode and device."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def settled(mark: list[int]) -> bool:
    """Whether the file changed so long ago that another change would give it another mark."""
    return time.time_ns() - max(mark[1], mark[2]) > SETTLED_NS


def _load(folder: Path) -> dict[str, list[Any]]:
    """What is remembered in `folder`; nothing where somebody else could have written it."""
    try:
        handle = os.open(folder / _FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return {}
    with os.fdopen(handle, encoding="utf-8") as file:
        ours = all(
            found.st_uid == os.geteuid() and not found.st_mode & 0o022
            for found in (os.fstat(file.fileno()), folder.stat(follow_symlinks=False))
        )
        try:
            known = json.load(file) if ours else {}
        except (ValueError, RecursionError):
            return {}
    return known if isinstance(known, dict) else {}
