"""Start a flow run as a fork of a process that has imported Prefect's engine (see `integrations.forks`), if one runs.

    python -P -m al_pipeline.flows.launch

is what Prefect's worker starts. Prefect and the tick import for two seconds of processor time. Without a fork server,
this process becomes the engine. A manual `al round` asks the same server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from al_pipeline.errors import AlError
from al_pipeline.files import read_object
from al_pipeline.integrations import forks
from al_pipeline.workspace.home import fork_servers
from al_pipeline.workspace.layout import Layout

_UNCATCHABLE = (signal.SIGKILL, signal.SIGSTOP)
_END_SECONDS = 30.0
"""How long a fork may take to end after Ctrl-C.

The interrupt is an exception at any instruction. If that is one where Prefect has just taken a lock, the lock stays
taken, and Prefect waits for it without end when it reports the interrupt.
"""


def main() -> None:
    """Run the flow run that `PREFECT__FLOW_RUN_ID` names; end as it ends."""
    root = Path(os.environ.get("AL_WORKSPACE", "."))
    code = run_as_fork(str(read_object(root / Layout().marker).get("workspace_id")), forks.FLOW_ENGINE)
    if code is None:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "prefect.engine"])
    sys.exit(code)


def run_as_fork(workspace_id: str, module: str, *arguments: str) -> int | None:
    """Run `python -m module arguments` as a fork, and return its exit code; None if no fork server can make one."""
    fork = None if forks.State.forked else _fork(workspace_id, module, *arguments)
    return None if fork is None else _follow(fork)


def _fork(workspace_id: str, module: str, *arguments: str) -> forks.Fork | None:
    words = [sys.executable, "-P", "-m", module, *arguments]
    try:
        folder = Path(os.environ.get(forks.FOLDER) or fork_servers(workspace_id))
        server = folder / forks.FLOWS
        return forks.Fork(server, words, cwd=Path.cwd(), env=os.environ, start_new_session=True, tied=True)
    except (OSError, AlError, ValueError):
        return None


def _follow(fork: forks.Fork) -> int:
    """Pass signals on to the fork and wait for its exit code. What ends the fork by a signal ends this process, too.

    A fork that goes on after Ctrl-C is killed, as a tick may be at any time; the code is then that of an interrupt.
    """
    overdue = threading.Event()

    def end() -> None:
        overdue.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(fork.pid, signal.SIGKILL)

    timer = threading.Timer(_END_SECONDS, end)
    timer.daemon = True

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(fork.pid, number)
        if number == signal.SIGINT and timer.ident is None:
            timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):  # Prefect's cancellation, and Ctrl-C
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a process that runs in the background
            signal.signal(number, pass_on)
    with fork:
        code = fork.wait()
    timer.cancel()
    if overdue.is_set() and code == -signal.SIGKILL:
        return 128 + signal.SIGINT
    if code < 0:
        if -code not in _UNCATCHABLE:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    main()
