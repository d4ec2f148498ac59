"""Content digests of files as DVC computes them, cached until a file changes; files with a cached digest are on disk.

DVC's own state proves nothing: it records what it has fetched under the digest that it asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from al_pipeline.file_notes import FileNotes, mark_of
from al_pipeline.files import sync, sync_names

_md5 = partial(hashlib.md5, usedforsecurity=False)
OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?\Z")
"""A digest, which is the name of an object in the cache or a remote."""


class Digests:
    """MD5 digests of files and folders. Use as a context manager: the cache is saved at its end.

    `folder` (created private) holds the cache, see `FileNotes`. Without one, or if it is not this user's, everything is
    read. A digest is cached only once the file's bytes and name are on disk (fsync), so that what was published from it
    survives a power cut.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._notes = FileNotes()
        self._read: dict[str, Path] = {}
        """One file of each folder in which a file was read."""

    def __enter__(self) -> Self:
        self._notes = FileNotes(self._folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sync_names(self._read.values())
        self._notes.save()

    def file(self, path: Path) -> str:
        """The digest of a file's bytes. Raises OSError if it cannot be read."""
        return self._notes.of(path, self._read_file)

    def _read_file(self, path: Path) -> str:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, _md5).hexdigest()
            sync(file.fileno())
        self._read[os.path.dirname(os.path.realpath(path))] = path
        return digest

    def listing(self, folder: Path) -> list[dict[str, str]]:
        """The files below `folder` with their digests, as DVC lists them."""
        return [
            {"md5": self._of_entry(entry), "relpath": name} for name, entry in sorted(_files(folder), key=itemgetter(0))
        ]

    def _of_entry(self, entry: os.DirEntry[str]) -> str:
        known = self._notes.known(os.path.abspath(entry.path), mark_of(entry.stat()))
        return self.file(Path(entry.path)) if known is None else known

    def of(self, path: Path) -> str | None:
        """The DVC digest of a file or folder; None if it does not exist."""
        if path.is_file():
            return self.file(path)
        return listing_digest(self.listing(path)) if path.is_dir() else None

    def known(self, key: str, mark: list[Any]) -> str | None:
        """The digest cached for `key` with exactly this `mark`; else None."""
        return self._notes.known(key, mark)

    def remember(self, key: str, mark: list[Any], digest: str) -> None:
        """Cache `digest` for `key`, valid while its `mark` is unchanged."""
        self._notes.remember(key, mark, digest)


def _files(folder: Path | str, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files below a folder with their relative paths; links to files count, those to folders are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, f"{name}/")
            elif entry.is_file():
                yield name, entry


def digest(path: Path) -> str | None:
    """The DVC digest of a file or folder, always read from its bytes; None if it does not exist."""
    with Digests() as digests:
        return digests.of(path)


def listing_bytes(listing: list[dict[str, str]]) -> bytes:
    """The content of the DVC object that lists a folder's files."""
    return json.dumps(listing, sort_keys=True).encode()


def listing_digest(listing: list[dict[str, str]]) -> str:
    """The digest of that object, which is its name."""
    return _md5(listing_bytes(listing)).hexdigest() + ".dir"


def holds(data: bytes, digest: str) -> bool:
    """Whether `data` is the content of the object named `digest`."""
    return _md5(data).hexdigest() == digest.removesuffix(".dir")


def parse_listing(data: bytes) -> dict[str, str]:
    """The digest of each file of a folder, by its path below it. Raises ValueError for anything else.

    `data`: the content of the object that lists them, which anybody who can write to a remote may have written.
    """
    found: dict[str, str] = {}
    listing = json.loads(data)
    for entry in listing if isinstance(listing, list) else [None]:
        name = entry.get("relpath") if isinstance(entry, dict) else None
        digest = entry.get("md5") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(digest, str) or not OBJECT.match(digest):
            raise ValueError(f"not a listing of files: {entry!r}")
        if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
            raise ValueError(f"a path outside the folder: {name!r}")
        found[name] = digest
    return found
