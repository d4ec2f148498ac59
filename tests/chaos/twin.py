"""The simulated Label Studio in a process of its own: it outlives its clients, as a server does."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Self

from al_pipeline.integrations.oracle import PageEdit, ProjectRef, ProjectSpec, ignore
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.records import AnsweredTask, Task, TaskState, TaskTotals, TaskVersion

LATENCY = 0.02
"""Seconds that each call takes, before and after it is carried out, so that a kill can happen during it."""


class TwinServer:
    """Serves a SimulatedOracle at a socket, one call at a time; a call is carried out even if its caller dies."""

    def __init__(self, oracle: SimulatedOracle) -> None:
        self.oracle = oracle
        self.lock = threading.Lock()
        """Held during each call; hold it to inspect the oracle."""
        self._folder = Path(tempfile.mkdtemp(prefix="al-twin-"))
        self.address = self._folder / "socket"
        self._listener = Listener(str(self.address), "AF_UNIX")
        self._ended = False
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, then close: a thread still in `accept` could get the next twin's connections."""
        self._ended = True
        with contextlib.suppress(OSError):
            Client(str(self.address), "AF_UNIX").close()
        self._thread.join()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # the caller has gone already
                continue
            if self._ended:
                connection.close()
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with connection, contextlib.suppress(EOFError, OSError):
            while True:
                name, arguments = connection.recv()
                connection.send(self._call(name, arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        time.sleep(LATENCY)
        with self.lock:
            try:
                found = getattr(self.oracle, name)(*arguments)
                reply = True, list(found) if isinstance(found, Iterator) else found
            except Exception as error:
                reply = False, error
        time.sleep(LATENCY)
        return reply


class TwinOracle:
    """An Oracle that calls a TwinServer."""

    def __init__(self, address: str) -> None:
        self._connection = Client(address, "AF_UNIX")

    def _ask(self, name: str, *arguments: Any) -> Any:
        self._connection.send((name, arguments))
        well, found = self._connection.recv()
        if not well:
            raise found
        return found

    def ensure_project(
        self, spec: ProjectSpec, known: ProjectRef | None = None, on_page_edit: Callable[[PageEdit], None] = ignore
    ) -> ProjectRef:
        """See Oracle."""
        found: ProjectRef = self._ask("ensure_project", spec, known)
        return found

    def check(self, ref: ProjectRef, workspace_id: str, clone_id: str | None = None) -> None:
        """See Oracle."""
        self._ask("check", ref, workspace_id, clone_id)

    def adopt(self, ref: ProjectRef, workspace_id: str, clone_id: str) -> None:
        """See Oracle."""
        self._ask("adopt", ref, workspace_id, clone_id)

    def task_states(self, ref: ProjectRef, round: int | None = None, first: int = 0) -> Iterator[TaskState]:
        """See Oracle."""
        return iter(self._ask("task_states", ref, round, first))

    def open_tasks(self, ref: ProjectRef) -> Iterator[TaskState]:
        """See Oracle."""
        return iter(self._ask("open_tasks", ref))

    def import_tasks(self, ref: ProjectRef, tasks: Sequence[Task]) -> None:
        """See Oracle."""
        self._ask("import_tasks", ref, tasks)

    def changed(self, ref: ProjectRef, since: str) -> Mapping[int, TaskVersion]:
        """See Oracle."""
        found: Mapping[int, TaskVersion] = self._ask("changed", ref, since)
        return found

    def answered(self, ref: ProjectRef, since: str | None) -> Iterator[AnsweredTask]:
        """See Oracle."""
        return iter(self._ask("answered", ref, since))

    def answered_after(self, ref: ProjectRef, task_id: int, before: str, limit: int) -> Iterator[AnsweredTask]:
        """See Oracle."""
        return iter(self._ask("answered_after", ref, task_id, before, limit))

    def answered_by_key(self, ref: ProjectRef, push_keys: Collection[str]) -> Iterator[AnsweredTask]:
        """See Oracle."""
        return iter(self._ask("answered_by_key", ref, sorted(push_keys)))

    def totals(self, ref: ProjectRef, before: str) -> TaskTotals:
        """See Oracle."""
        found: TaskTotals = self._ask("totals", ref, before)
        return found

    def accounts(self) -> Mapping[int, str]:
        """See Oracle."""
        found: Mapping[int, str] = self._ask("accounts")
        return found

    def ask_more(self, ref: ProjectRef, answers: Mapping[int, int]) -> None:
        """See Oracle."""
        self._ask("ask_more", ref, dict(answers))

    def serve_newest(self, ref: ProjectRef, newest: bool) -> None:
        """See Oracle."""
        self._ask("serve_newest", ref, newest)

    def retire(self, ref: ProjectRef, task_ids: Sequence[int]) -> None:
        """See Oracle."""
        self._ask("retire", ref, task_ids)

    def close(self) -> None:
        """See Oracle."""
        self._connection.close()
