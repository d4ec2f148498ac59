"""A cache of what was computed from files, valid until they change."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from al_pipeline.files import SETTLED_NS, sha256_file, write_text

_FILE = "files.json"
_MOST = 5000
"""If there are more notes than this, those of missing files are dropped on saving."""


class FileNotes:
    """A note for each file, valid while its size, times, inode and device are the same.

    `folder` (created private) keeps the notes between processes. Without one, or if somebody else could have written
    it, none are loaded. If two processes save at once, the only cost is that files are read again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[str, list[Any]] = {} if folder is None else _load(folder)
        self._changed = False

    def known(self, key: str, mark: list[Any]) -> str | None:
        """The note for `key` with exactly this `mark`; else None."""
        known = self._known.get(key)
        return known[1] if isinstance(known, list) and len(known) == 2 and known[0] == mark else None

    def remember(self, key: str, mark: list[Any], note: str) -> None:
        """Store `note` for `key`, valid while its `mark` is unchanged."""
        self._known[key] = [mark, note]
        self._changed = True

    def save(self) -> None:
        """Save changed notes to `folder`, for other processes."""
        if self._folder is None or not self._changed:
            return
        if len(self._known) > _MOST:
            self._known = {key: known for key, known in self._known.items() if "://" in key or os.path.exists(key)}
        with contextlib.suppress(OSError):  # if it cannot be written, files are only read again
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            write_text(self._folder / _FILE, json.dumps(self._known, sort_keys=True), 0o600)
        self._changed = False

    def of(self, path: Path, read: Callable[[Path], str]) -> str:
        """The note for a file: the remembered one, else what `read` returns. Raises OSError if it cannot be read."""
        key, mark = os.path.abspath(path), file_mark(path)
        if (known := self.known(key, mark)) is not None:
            return known
        found = read(path)
        if file_mark(path) == mark and settled(mark):
            self.remember(key, mark, found)
        return found

    def sha256(self, path: Path) -> str:
        """The SHA-256 of a file's content, in hex. Raises OSError if it cannot be read."""
        return self.of(path, sha256_file)


def file_mark(path: Path) -> list[int]:
    """Values that change with a file's content: size, times of change (content and inode, ns), inode and device."""
    return mark_of(path.stat())


def mark_of(found: os.stat_result) -> list[int]:
    """The same, given what `stat` found."""
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def settled(mark: list[int]) -> bool:
    """Whether the file changed so long ago that another change would change its mark."""
    return time.time_ns() - max(mark[1], mark[2]) > SETTLED_NS


def _load(folder: Path) -> dict[str, list[Any]]:
    """The notes in `folder`; empty if there are none or somebody else could have written them."""
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
