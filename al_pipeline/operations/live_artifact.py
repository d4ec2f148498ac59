"""The state of `al live` as an artifact in Prefect, which its page shows. What Prefect does never delays the loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from al_pipeline.errors import AlError
from al_pipeline.live.state import LiveState
from al_pipeline.live.watch import for_prefect
from al_pipeline.logs import get_logger
from al_pipeline.servers import PrefectApi, Server, prefect_elsewhere, prefect_status, read_deployment, write_table
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)

SECONDS = 30.0
"""Between two updates, at least; after failures up to `MOST_SECONDS`."""
MOST_SECONDS = 600.0


class LiveArtifact:
    """Sends the newest state that it was offered, in a thread of its own. One artifact for a run of `al live`."""

    def __init__(self, workspace: Workspace, seconds: float = SECONDS) -> None:
        self._workspace, self._seconds = workspace, seconds
        self._newest: LiveState | None = None
        self._offered, self._ends = threading.Event(), threading.Event()
        self._artifact: str | None = None
        self._thread = threading.Thread(target=self._run, name="al-live-artifact", daemon=True)

    def offer(self, state: LiveState) -> None:
        """Have this state shown, unless a newer one comes before the next update. Returns at once."""
        self._newest = state
        self._offered.set()

    def _run(self) -> None:
        pause = self._seconds
        while not self._ends.is_set():
            self._offered.wait()
            self._offered.clear()
            state = self._newest
            if state is None or self._ends.is_set():
                continue
            try:
                self._send(state)
                pause = self._seconds
            except AlError as error:
                _logger.info("live: Prefect did not take the artifact: %s", error)
                pause = min(MOST_SECONDS, 2 * pause)
            except Exception:
                _logger.exception("live: the artifact for Prefect failed")
                pause = MOST_SECONDS
            self._ends.wait(pause)

    def _send(self, state: LiveState) -> None:
        server = _server(self._workspace)
        if server is None:
            return
        opened = "no round is open" if state.round is None else f"round {state.round} is open"
        description = f"{state.workspace}, live: {opened}; {state.health}"
        rows = [*for_prefect(state)]
        self._artifact = write_table(
            self._workspace, server, artifact_key(self._workspace), rows, description, self._artifact
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send states while the context lasts."""
        self._thread.start()
        try:
            yield
        finally:
            self._ends.set()
            self._offered.set()
            self._thread.join(1)  # a request in flight is not waited for


def artifact_key(workspace: Workspace) -> str:
    """The key of the artifact: one for each workspace, for ever."""
    return f"live-{workspace.id}"


def _server(workspace: Workspace) -> Server | PrefectApi | None:
    """The workspace's own Prefect server, or the one where its ticks are deployed; None if neither answers."""
    if own := prefect_status(workspace):
        return own
    other = prefect_elsewhere()
    return other if other is not None and read_deployment(workspace, other) is not None else None
