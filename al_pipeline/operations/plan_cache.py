"""Plans as they were parsed, in files of this user alone: a tick needs those of all rounds, and parses only new ones.

A file holds the rows of so many rounds in a row, each with the id of the git object that it was parsed from. A plan
whose object is another, or whose file is missing or damaged, is parsed again. The files may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from al_pipeline.errors import UnsafeFolder
from al_pipeline.files import write_bytes
from al_pipeline.records import PlannedTask
from al_pipeline.workspace.home import private_folder

SEGMENT = 16
"""Rounds in a file: of those after the last whole one, fewer than so many, the plans are parsed."""
_FORMAT = "al-plans/1"
_CHECKSUM_BYTES = 4
_MOST = 16_384
"""Plans that are kept in memory."""

Rows = tuple[PlannedTask, ...]
Parse = Callable[[Sequence[int]], Mapping[int, Rows]]


class _Segment(Struct, frozen=True):
    form: str
    plans: dict[str, Rows]
    """The rows of each plan, by the id of its object."""


_DECODER = msgspec.msgpack.Decoder(_Segment)
_known: dict[tuple[int, str], Rows] = {}


def plan_rows(folder: Path, objects: Mapping[int, str], parse: Parse) -> Iterator[Rows]:
    """The rows of the plans whose git objects are `objects`, by round number, in their order.

    `folder` has the files; `parse` returns the rows of the rounds that are in none.
    """
    if len(_known) > _MOST:
        _known.clear()
    whole = _whole_segments(objects)
    for number, rounds in whole.items():
        if any((one, objects[one]) not in _known for one in rounds):
            found = _read(folder / f"{number:06d}.msgpack")
            _known.update({(one, objects[one]): found[objects[one]] for one in rounds if objects[one] in found})
    missing = [number for number, name in objects.items() if (number, name) not in _known]
    if missing:
        parsed = parse(missing)
        _known.update({(number, objects[number]): parsed[number] for number in missing})
        for number in {one // SEGMENT for one in missing} & whole.keys():
            _write(folder / f"{number:06d}.msgpack", {objects[one]: _known[one, objects[one]] for one in whole[number]})
    return (_known[one] for one in objects.items())


def _whole_segments(numbers: Mapping[int, str]) -> dict[int, list[int]]:
    """The round numbers of each file, by its number, all of whose rounds but the first ones exist."""
    found: dict[int, list[int]] = {}
    for number in sorted(numbers):
        found.setdefault(number // SEGMENT, []).append(number)
    last = max(found, default=0)
    return {segment: rounds for segment, rounds in found.items() if segment < last or len(rounds) == SEGMENT}


def _read(path: Path) -> dict[str, Rows]:
    """The plans in a file; none if it is missing or damaged, or somebody else could have written it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle, "rb") as file:
            own = (os.fstat(file.fileno()), path.parent.stat(follow_symlinks=False))
            if any(found.st_uid != os.geteuid() or found.st_mode & 0o022 for found in own):
                return {}
            data = memoryview(file.read())
    except OSError:
        return {}
    if zlib.crc32(data[_CHECKSUM_BYTES:]).to_bytes(_CHECKSUM_BYTES, "big") != data[:_CHECKSUM_BYTES]:
        return {}
    try:
        found = _DECODER.decode(data[_CHECKSUM_BYTES:])
    except (msgspec.DecodeError, msgspec.ValidationError):
        return {}
    return found.plans if found.form == _FORMAT else {}


def _write(path: Path, plans: dict[str, Rows]) -> None:
    with contextlib.suppress(OSError, UnicodeError, UnsafeFolder):  # they are parsed again
        data = msgspec.msgpack.encode(_Segment(_FORMAT, plans))
        private_folder(path.parent)
        write_bytes(path, zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "big") + data, 0o600)
