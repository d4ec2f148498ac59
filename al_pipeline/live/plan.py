"""The live plan on disk, and whether a workspace is live.

`rounds/NNNN/live.jsonl` is append-only and flushed to disk before a question is sent: a question that Label Studio has
is always in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from al_pipeline.errors import Locked
from al_pipeline.files import make_folder, read_object, sync, write_json
from al_pipeline.records import Event
from al_pipeline.rounds.manifests import LiveQuestion
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

FIRST = 3
"""The number of questions with which a live round opens, if nothing is known of the people at work."""


def is_live(workspace: Workspace) -> bool:
    """Whether questions are asked live here: `live.enabled` is set, or `al live` runs."""
    return workspace.params.live.enabled or is_running(workspace.layout)


def is_running(layout: Layout) -> bool:
    """Whether a process holds the lock of `al live`."""
    try:
        handle = os.open(_lock(layout), os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def running(layout: Layout) -> Iterator[None]:
    """Hold the lock of `al live`: one at a time asks live questions. Raises Locked if another process holds it."""
    private_folder(layout.live)
    handle = os.open(_lock(layout), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked("`al live` runs already in this workspace; `al status` shows since when") from None
        yield
    finally:
        os.close(handle)


def _lock(layout: Layout) -> Path:
    return layout.live / "lock"


def append(path: Path, questions: Sequence[LiveQuestion]) -> None:
    """Append questions to a live plan, flushed to disk. A line that a killed process left unfinished is replaced."""
    make_folder(path.parent)
    is_new = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        os.lseek(handle, _whole(handle, os.fstat(handle).st_size), os.SEEK_SET)
        os.ftruncate(handle, os.lseek(handle, 0, os.SEEK_CUR))
        data = memoryview("".join(question.to_line() for question in questions).encode("ascii"))
        while data:
            data = data[os.write(handle, data) :]
        sync(handle)
    finally:
        os.close(handle)
    if is_new:
        sync(path.parent)


def _whole(handle: int, size: int, step: int = 65_536) -> int:
    """The length of a file without its last line, if that has no end."""
    end = size
    while end > 0:
        start = max(0, end - step)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def knowledge(events: Sequence[Event]) -> tuple[int, str]:
    """The number of the events that a model knows, and a digest of their ids, as `LiveQuestion` has them."""
    made = hashlib.sha256()
    for event in events:
        made.update(event.event_id.encode())
    return len(events), made.hexdigest()[:16]


def remember_size(layout: Layout, size: int) -> None:
    """Note how many questions are open, with which the next round opens too."""
    if remembered_size(layout) != size:
        write_json(layout.live / "queue.json", {"size": size}, 0o600)


def remembered_size(layout: Layout) -> int:
    """The noted number of open questions; FIRST without a note."""
    size = read_object(layout.live / "queue.json").get("size")
    return size if type(size) is int and 0 < size <= 10_000 else FIRST
