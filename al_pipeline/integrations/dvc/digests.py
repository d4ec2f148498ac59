"""What the bytes of files are, as DVC names them: read once, remembered until the file changes, and then on disk.

DVC's own notes are no proof: whatever it has fetched it knows by the name that it asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from al_pipeline.file_notes import FileNotes, file_mark, settled
from al_pipeline.files import sync, sync_names

_md5 = partial(hashlib.md5, usedforsecurity=False)


class Digests:
    """MD5 digests of files and folders. Use as a context manager: what was read is remembered at its end.

    `folder` (made for its owner alone) holds what is remembered, see `FileNotes`. Without one, or where it is not this
    user's, everything is read. A file is remembered only once its bytes and its name are on disk (fsync): what was
    published from it outlives a power cut.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._notes = FileNotes()
        self._read: dict[str, Path] = {}
        """One file of each folder in which something was read."""

    def __enter__(self) -> Self:
        self._notes = FileNotes(self._folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sync_names(self._read.values())
        self._notes.save()

    def file(self, path: Path) -> str:
        """The digest of a file's bytes. Raises OSError where it cannot be read."""
        key = os.path.abspath(path)
        before = file_mark(path)
        if (known := self.known(key, before)) is not None:
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, _md5).hexdigest()
            sync(file.fileno())
        self._read[os.path.dirname(os.path.realpath(path))] = path
        if file_mark(path) == before and settled(before):
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
        return self._notes.known(key, mark)

    def remember(self, key: str, mark: list[Any], digest: str) -> None:
        """Know `key` by `digest` for as long as its `mark` is this one."""
        self._notes.remember(key, mark, digest)


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
