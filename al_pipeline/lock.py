"""One writer per workspace: `flock` on this host; another host's lock is never taken by itself."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from al_pipeline.errors import Locked


@contextmanager
def locked(path: Path, purpose: str) -> Iterator[None]:
    """Hold the workspace's lock. Raises Locked, naming who holds it and since when, rather than wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(f"this workspace is busy: {_describe(holder(path))}; try again when it has ended") from None
        previous = holder(path)
        if previous and previous.get("host") != socket.gethostname():
            raise Locked(
                f"this workspace was locked on another machine: {_describe(previous)}. "
                f"When you are sure that it has ended, delete {path}"
            )
        _write(handle, _owner(purpose))
        yield
        _write(handle, {})
    except Locked:
        raise
    except BaseException:
        if holder(path).get("pid") == os.getpid():
            _write(handle, {})
        raise
    finally:
        os.close(handle)


def holder(path: Path) -> dict[str, Any]:
    """Who wrote the lock last and has not released it; empty where nobody holds it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _owner(purpose: str) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "purpose": purpose,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write(handle: int, value: dict[str, Any]) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(value).encode(), 0)


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "held by an unknown process"
    return f"{owner['purpose']}, process {owner['pid']} on {owner['host']}, since {owner['since']}"
