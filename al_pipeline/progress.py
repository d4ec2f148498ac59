"""The progress of a long stage: its process, which has no terminal, writes a file; the waiting process shows a bar."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from al_pipeline.errors import AlError
from al_pipeline.files import read_object, write_json

_LOOK_SECONDS = 0.5
_STEPS = 200
"""The number of steps that are written; a count, so that stages need not read a clock."""


def progress_reporter(path: Path, what: str) -> Callable[[int, int], None]:
    """A callback `(done, total)` that writes the progress of `what` to `path` at each of `_STEPS` steps."""
    last = -1

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        now = done * _STEPS // max(1, total)
        if now != last:
            last = now
            write_json(path, {"what": what, "done": done, "total": total})

    return on_progress


@contextmanager
def shown(path: Path, show: bool | None = None) -> Iterator[None]:
    """Show a bar with the time left on stderr once progress is written to `path` (`show` None: only on a terminal)."""
    path.unlink(missing_ok=True)
    if show is False or (show is None and not sys.stderr.isatty()):
        yield
        return
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    ended = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), speed_estimate_period=180)
    task = bar.add_task("", total=None)

    def look() -> None:
        with suppress(AlError, KeyError, LiveError):  # the caller may have a live display already, which stays
            if found := read_object(path):
                bar.update(task, description=found["what"], completed=found["done"], total=found["total"])
                bar.start()

    def watch() -> None:
        while not ended.wait(_LOOK_SECONDS):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        look()
        bar.stop()
        path.unlink(missing_ok=True)
