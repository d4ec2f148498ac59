"""A flow run, as Prefect's worker starts it: a fork of a process that has imported its engine, if one runs.

    python -P -m al_pipeline.flows.launch

Prefect and the tick import for two seconds of processor time. Without such a process, this one becomes the engine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from al_pipeline.errors import AlError
from al_pipeline.files import read_object
from al_pipeline.integrations import forks
from al_pipeline.workspace.home import fork_servers
from al_pipeline.workspace.layout import Layout

NAME = "flows"
"""The fork server's name."""
ENGINE = "al_pipeline.flows.engine"


def main() -> None:
    """Run the flow run that `PREFECT__FLOW_RUN_ID` names; end as it ends."""
    fork = _fork()
    if fork is None:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "prefect.engine"])

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(fork.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):  # Prefect cancels a run so
        signal.signal(number, pass_on)
    with fork:
        code = fork.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _fork() -> forks.Fork | None:
    """The engine in a fork of the workspace's fork server; None if it cannot make one."""
    root = Path(os.environ.get("AL_WORKSPACE", "."))
    name = read_object(root / Layout().marker).get("workspace_id")
    folder = Path(os.environ.get(forks.FOLDER) or fork_servers(str(name)))
    words = [sys.executable, "-P", "-m", ENGINE]
    try:
        return forks.Fork(folder / NAME, words, cwd=Path.cwd(), env=os.environ, start_new_session=True, tied=True)
    except (OSError, AlError, ValueError):
        return None


if __name__ == "__main__":
    main()
