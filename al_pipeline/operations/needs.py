"""What an ingest and an encoding will take, told before they begin: room on the disks, and time.

Estimates, from what can be read at once: sizes of files, counts in the pool's parts, the rate of earlier encodings.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec import Struct

from al_pipeline.data.inputs import Source, kind_of, read_head
from al_pipeline.data.pool import count_items, text_bytes
from al_pipeline.errors import NoRoom
from al_pipeline.features.device import device_of
from al_pipeline.features.encoder import USUAL_WIDTH, encoder_fingerprint, encoder_identity, usable_cpus, vector_width
from al_pipeline.file_notes import FileNotes
from al_pipeline.files import read_object
from al_pipeline.integrations.dvc.settings import object_folders
from al_pipeline.params import Features
from al_pipeline.quantities import format_duration, format_size
from al_pipeline.sanitize import counted
from al_pipeline.workspace.layout import Layout

LARGE = 3 * 10**9
"""Bytes from which users are told what will be written."""
_GROWTH = {"csv": 1.0, "jsonl": 1.0, "parquet": 1.5, "xlsx": 1.5}
"""An upper bound of the bytes of a pool part for each byte of a file of texts; it is compressed, but has hashes."""
_OF_GZIP = 2.0
_DIGEST_BYTES = 32
_TERM_BYTES = 3.0
"""Bytes of TF-IDF rows in the cache for each byte of text."""
_USUAL_RATE = (40.0, 300.0)
"""Texts of a few dozen words that a core encodes in a second, at least and at most: encoders and processors differ."""


class Encoding(Struct, frozen=True, kw_only=True):
    """The encoding that the next build begins with."""

    items: int
    """Items of pool, test set and inbox that have no vector yet, about."""
    bytes: int
    """What the caches of vectors and TF-IDF rows will grow by."""
    seconds: tuple[float, float]
    """What it will take, at least and at most."""
    measured: bool
    """Whether `seconds` follows from earlier encodings of this workspace, not from what is usual."""

    def sentence(self) -> str:
        """Describe it in one sentence without a full stop."""
        least, most = map(format_duration, self.seconds)
        took = f"about {least}" if self.measured else f"between {least} and {most} (no rate was measured here yet)"
        return (
            f"{counted(self.items, 'item')} {'is' if self.items == 1 else 'are'} not encoded yet, which takes {took} "
            f"and {format_size(self.bytes)} of disk"
        )


def next_encoding(layout: Layout, features: Features) -> Encoding:
    """What the next build will encode. Reads no text and no vector. Raises BadParams if the device is not there."""
    folders = [layout.pool, layout.test, layout.inbox_pool, layout.inbox_test]
    total, device = count_items(folders), device_of(features)
    width = vector_width(layout.encoder)
    row, name, done = 4 * (width or USUAL_WIDTH) + _DIGEST_BYTES, "", 0
    if width:
        notes = FileNotes(layout.features / ".notes")
        identity = encoder_identity(layout.encoder, features.max_tokens, notes)
        name = encoder_fingerprint(identity, features.precision, device)
        done = sum(path.stat().st_size for path in (layout.features / name).glob("[!.]*")) // row
    items = max(0, total - done)
    terms = _TERM_BYTES * text_bytes(folders) * items / max(1, total) if features.uses_tfidf else 0.0
    known = read_object(layout.encoded).get("rates")
    rate = known.get(name) if isinstance(known, dict) else None
    rates = (rate, rate) if rate else [one * usable_cpus() for one in _USUAL_RATE]
    return Encoding(
        items=items,
        bytes=int(items * row + terms),
        seconds=(items / rates[1], items / rates[0]),
        measured=bool(rate),
    )


def check_encoding(layout: Layout, features: Features) -> str | None:
    """Say what the next encoding will take, if that is much. Raises NoRoom if the disk has no room for it."""
    found = next_encoding(layout, features)
    refuse_without_room("encoding the pool", [(layout.features, found.bytes)])
    return found.sentence() if found.bytes > LARGE else None


def check_ingest(layout: Layout, sources: Sequence[Source], sizes: Sequence[int]) -> int:
    """The bytes that the items of some files will take in all, at most. Raises NoRoom if a disk has no room for them.

    They are stored in the workspace, in DVC's cache and, if that is a folder of this machine, in the DVC remote;
    and the ingest writes them twice if it draws a test set.
    """
    pool = int(sum(_part_bytes(source, size) for source, size in zip(sources, sizes, strict=True)))
    cache, remote = object_folders(layout.root)
    copies = [folder for folder in (cache, remote) if folder is not None]
    refuse_without_room("this ingest", [(layout.inbox, 2 * pool), *((folder, pool) for folder in copies)])
    return (1 + len(copies)) * pool


def refuse_without_room(what: str, needs: Iterable[tuple[Path, int]]) -> None:
    """Raise NoRoom if a disk has fewer bytes free than `needs`, given for folders, add up to there."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, wanted in needs:
        place = next(one for one in (folder, *folder.parents) if one.exists())
        device = place.stat().st_dev
        first, sum_ = disks.get(device, (place, 0))
        disks[device] = first, sum_ + wanted
    for place, wanted in disks.values():
        if wanted > (free := shutil.disk_usage(place).free):
            raise NoRoom(
                f"{what} needs about {format_size(wanted)} on the disk of {place}, where {format_size(free)} are free; "
                "nothing was written. Free some space, or move the workspace to a larger disk"
            )


def _part_bytes(source: Source, stored: int) -> float:
    """The bytes of a pool part with the rows of a file of `stored` bytes."""
    factor = _GROWTH[kind_of(source, read_head(source))]
    return stored * factor * (_OF_GZIP if source.path.suffix.lower() == ".gz" else 1.0)
