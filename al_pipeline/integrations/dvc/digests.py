"""What the bytes of files are, as DVC names them: read once, remembered until the file changes, and then on disk.

DVC's own notes are no proof: whatever it has fetched it knows by the name that it asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from al_pipeline.files import SETTLED_NS, sync, sync_names, write_text

_FILE = "files.json"
_MOST = 5000
"""Remembered files beyond which those that are gone are forgotten."""

_md5 = partial(hashlib.md5, usedforsecurity=False)


class Digests:
    """MD5 digests of files and folders. Use as a context manager: what was read is remembered at its end.

    `folder` (made for its owner alone) holds what is remembered: which file, by size, times and inode, has which
    digest. Without one, or where it is not this user's, everything is read. A file is remembered only once its bytes
    and its name are on disk (fsync): what was published from it outlives a power cut.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        self._read: dict[str, Path] = {}
        """One file of each folder in which something was read."""

    def __enter__(self) -> Self:
        if self._folder is not None:
            self._known = _load(self._folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sync_names(self._read.values())
        if self._folder is None or not self._changed:
            return
        if len(self._known) > _MOST:
            self._known = {key: known for key, known in self._known.items() if "://" in key or os.path.exists(key)}
        with contextlib.suppress(OSError):  # a place that cannot be written costs another reading, and nothing else
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            write_text(self._folder / _FILE, json.dumps(self._known, sort_keys=True), 0o600)

    def file(self, path: Path) -> str:
        """The digest of a file's bytes. Raises OSError where it cannot be read."""
        key = os.path.abspath(path)
        before = _mark(path)
        if (known := self.known(key, before)) is not None:
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, _md5).hexdigest()
            sync(file.fileno())
        self._read[os.path.dirname(os.path.realpath(path))] = path
        if _mark(path) == before and time.time_ns() - max(before[1], before[2]) > SETTLED_NS:
            self.remember(key, before, digest)
        return digest

    def listing(self, folder: Path) -> list[dict[str, str]]:
        """The files below `folder` with their digests, as DVC lists them."""
        files = sorted((file.relative_to(folder).as_posix(), file) for file in folder.rglob("*") if file.is_file())
        return [{"md5": self.file(file), "relpath": name} for name, file in files]

    def of(self, path: Path) -> str | None:
        """The digest by which DVC knows a file or folder; None where there is nothing."""
        if path.is_file():
            return self.file(path)
        return listing_digest(self.listing(path)) if path.is_dir() else None

    def known(self, key: str, mark: list[Any]) -> str | None:
        """The digest remembered for `key`, if it was remembered for just this `mark`."""
        known = self._known.get(key)
        return known[1] if isinstance(known, list) and len(known) == 2 and known[0] == mark else None

    def remember(self, key: str, mark: list[Any], digest: str) -> None:
        """Know `key` by `digest` for as long as its `mark` is this one."""
        self._known[key] = [mark, digest]
        self._changed = True


def digest(path: Path) -> str | None:
    """The digest by which DVC knows a file or folder, from its bytes as they lie there; None where there is nothing."""
    with Digests() as digests:
        return digests.of(path)


def listing_bytes(listing: list[dict[str, str]]) -> bytes:
    """The object in which DVC keeps a folder's list of files."""
    return json.dumps(listing, sort_keys=True).encode()


def listing_digest(listing: list[dict[str, str]]) -> str:
    """The name of that object."""
    return _md5(listing_bytes(listing)).hexdigest() + ".dir"


def holds(data: bytes, digest: str) -> bool:
    """Whether `data` is the object of that name."""
    return _md5(data).hexdigest() == digest.removesuffix(".dir")


def _mark(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


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
