"""One writer per workspace: `flock` on this host; a lock recorded by another host is never taken over automatically.

`flock` alone decides if no other kernel can hold the lock: the record was written under the running kernel (containers
restart under new host names), or the file system is local to this machine.

`filelock`, which guards the start of servers, is not used: it neither records the holder nor detects other hosts, the
record must be written through the handle that holds the lock, and its import would add 60 ms to every tick.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from al_pipeline.errors import Locked
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.identity import boot_id

LIVE_STEP = "a step of al live"
"""The purpose of a lock that is held for a moment, again and again: whoever finds it taken waits."""
_LIVE_SECONDS = 30.0
_NOTE_SECONDS = 0.1
"""Who has just taken the lock writes its record within this time."""
_RETRY_SECONDS = 0.01

_LOCAL = frozenset(
    {
        "apfs", "aufs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "fuse.fuse-overlayfs", "fuseblk",
        "hfs", "jfs", "ntfs", "ntfs3", "overlay", "ramfs", "reiserfs", "tmpfs", "ufs", "vfat", "xfs", "zfs",
    }
)  # fmt: skip
"""File systems that only one kernel mounts at a time. Others (NFS, SMB, 9p, FUSE) may be shared between machines."""


@contextmanager
def locked(path: Path, purpose: str) -> Iterator[None]:
    """Hold the workspace's lock. If it is taken, raises Locked at once, naming the holder and the time.

    Only a step of `al live` is waited for.
    """
    private_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)  # a link could lead to any file
    try:
        _take(handle, path)
        previous = holder(path)
        if previous and previous.get("host") != socket.gethostname() and not _is_ours(previous, path):
            raise Locked(
                f"this workspace was locked on another machine: {_describe(previous)}. If you are sure that it has "
                f"ended, delete {path}"
            )
        _write(handle, _owner(purpose))
        try:
            yield
        finally:
            _write(handle, {})
    finally:
        os.close(handle)


def _take(handle: int, path: Path) -> None:
    """Take the lock, or raise Locked."""
    begin = time.monotonic()
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = holder(path)
        limit = _LIVE_SECONDS if found.get("purpose") == LIVE_STEP else 0.0 if found else _NOTE_SECONDS
        if time.monotonic() - begin >= limit:
            raise Locked(f"this workspace is busy: {_describe(found)}; try again when it has ended")
        time.sleep(_RETRY_SECONDS)


def holder(path: Path) -> dict[str, Any]:
    """The record of the lock's holder; empty if nobody holds it, or its process on this host is gone.

    For display only: `flock` decides who may work.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    if found.get("host") != socket.gethostname():
        return found
    from psutil import pid_exists

    return found if isinstance(found.get("pid"), int) and pid_exists(found["pid"]) else {}


def _owner(purpose: str) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": boot_id(),
        "purpose": purpose,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _is_ours(previous: dict[str, Any], path: Path) -> bool:
    """Whether our `flock` would have failed if the process that wrote the record still ran."""
    return (bool(boot_id()) and previous.get("boot") == boot_id()) or _file_system(path) in _LOCAL


def _file_system(path: Path) -> str:
    """The type of the file system that holds `path`; empty if unknown."""
    from psutil import disk_partitions

    place = path.resolve()
    mounted = [part for part in disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    return max(mounted, key=lambda part: len(part.mountpoint)).fstype if mounted else ""


def _write(handle: int, value: dict[str, Any]) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(value).encode(), 0)


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "held by an unknown process"
    purpose, pid, host, since = (owner.get(name, "unknown") for name in ("purpose", "pid", "host", "since"))
    return f"{purpose}, process {pid} on {host}, since {since}"
