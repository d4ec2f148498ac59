"""DVC's process: one for many commands, in its own process group that a later tick can find and end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from al_pipeline.errors import AlError, RepositoryError
from al_pipeline.files import read_object
from al_pipeline.integrations import forks
from al_pipeline.integrations import processes as child
from al_pipeline.integrations.dvc.remotes import explained
from al_pipeline.integrations.git import NOT_OURS, Git
from al_pipeline.logs import get_logger
from al_pipeline.sanitize import redact
from al_pipeline.workspace.home import SECRET_VARIABLES, dvc_state, fork_servers, own_environment, private_folder
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import check_dvc

_logger = get_logger(__name__)

TRANSFER_TIMEOUT = 6 * 3600.0
TIMEOUT = 600.0
"""Seconds until a command is given up; the first for one that transfers data."""
_SECOND_LOOK = 0.5
_ID = re.compile(r"[0-9a-f]{12}\Z")
_ADVERTISEMENT = "Having any troubles? "
_WORKER = "al_pipeline.integrations.dvc.worker"


@dataclass
class DvcProcess:
    """The process that runs DVC's commands at `root`. A context manager; it starts with the first command."""

    root: Path
    state: Path | None
    """The file that records the process (`pid`, `started`), so that a later tick can end it. None for callers that read
    without the workspace's lock: they must not overwrite what a tick recorded."""
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    check: Callable[[Path], None] = check_dvc
    """Checks the files that configure DVC before each command; raises if it must not run."""
    _process: subprocess.Popen[str] | forks.Fork | None = None
    _output: IO[bytes] | None = None
    _paced: list[str] = field(default_factory=list)
    """The last command with stages, without them; see `pacing`."""
    _ahead: tuple[str, ...] = ()
    """The stages that it was given and not asked for yet, if no other command has ended it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        self._ahead = ()
        if self._process is not None:
            child.end_group(self._process.pid)
            with contextlib.suppress(BrokenPipeError):
                self._process.__exit__(None, None, None)
            self._process = None
            if self.state is not None:
                self.state.unlink(missing_ok=True)
        if self._output is not None:
            self._output.close()
            self._output = None

    def end_previous(self) -> None:
        """End a DVC process (and its stage) that a killed tick left, and repair git's index and DVC's locks.

        Call only while holding the workspace's lock.
        """
        if self.state is not None:
            child.end_remembered(self.state)
        Git(self.root).plain_index()
        self._clear_dead_lock()

    def _clear_dead_lock(self) -> None:
        """Remove DVC's lock file (`rwlock`) if no live process can hold a lock.

        DVC writes it in place, so a kill or a full disk truncates it, and then DVC cannot read it. DVC also considers
        a lock held while its pid exists: for a zombie that nothing reaps (in a container without an init process), or
        an unrelated process that got the pid after a reboot. Two checks, because a live process may be writing the file
        during the first.
        """
        path = self.root / ".dvc/tmp/rwlock"
        if _is_dead(path):
            time.sleep(_SECOND_LOOK)
            if _is_dead(path):
                _logger.warning("removing the entries of a process that has ended from DVC's lock file: %s", path)
                path.unlink(missing_ok=True)

    def expect_stages(self) -> None:
        """Start DVC's process and the stage server without waiting: each spends about a second on imports."""
        if self._process is not None:
            return
        with contextlib.suppress(AlError):  # raised again by the first command
            self.check(self.root)
            self._start("--stages")

    def _run_script(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a Python script that uses DVC's modules, in the repository."""
        words = [sys.executable, "-P", "-c", script, *arguments]
        servers, environment = self._fork_servers(), self._environment()
        return forks.run(words, forks.DVC, servers, cwd=self.root, env=environment, timeout=TIMEOUT)

    def _ask(self, what: str, name: str, fix: str = "", **more: Any) -> dict[str, Any]:
        """Send the request `what` to `objects.serve` in DVC's process. Raises RepositoryError if it fails."""
        reply, said = self._exchange({"do": what, "notes": str(self._notes), **more}, TRANSFER_TIMEOUT)
        if not isinstance(reply, dict) or "error" in reply:
            why = redact(str(reply["error"])) if isinstance(reply, dict) else said
            raise RepositoryError(explained(why) or f"dvc {name} failed: {why}{fix}")
        return reply

    def _checked(self, arguments: list[str], name: str, timeout: float = TIMEOUT, fix: str = "") -> None:
        code, said = self._command(arguments, timeout)
        if code:
            raise RepositoryError(explained(said) or f"dvc {name} failed ({code}): {said}{fix}")

    def _json(self, arguments: list[str], name: str, timeout: float) -> dict[str, object]:
        code, said = self._command(arguments, timeout)
        line = next((line for line in reversed(said.splitlines()) if line.startswith("{")), None)
        if code or line is None:
            raise RepositoryError(explained(said) or f"dvc {name} failed ({code}): {said}")
        found: dict[str, object] = json.loads(line)
        return found

    def _command(self, arguments: list[str], timeout: float) -> tuple[int, str]:
        """Run a DVC command; return its exit code and the last lines of its output."""
        code, said = self._exchange(arguments, timeout)
        return (code if isinstance(code, int) else 1), said

    def _exchange(self, request: list[str] | dict[str, Any], timeout: float) -> tuple[Any, str]:
        """Send a request to DVC's process; return the reply and the last lines of output.

        Raises RepositoryError if the process ends or times out.
        """
        self.check(self.root)
        self._ahead = ()
        process = self._start()
        begin, start = self.log.stat().st_size, time.perf_counter()
        command = " ".join(request[:3]) if isinstance(request, list) else str(next(iter(request.values())))
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            ready = forks.readable(process.stdout, timeout)
            reply = process.stdout.readline() if ready else None
        except BrokenPipeError:
            reply = ""
        with self.log.open("rb") as log:
            log.seek(begin)
            said = log.read().decode("utf-8", "replace").strip()
        said = "\n".join(line for line in said.splitlines() if line and not line.startswith(_ADVERTISEMENT))
        said = redact("\n".join(said.splitlines()[-15:]))
        _logger.debug("dvc %s took %.3f s", command, time.perf_counter() - start)
        if reply:
            return json.loads(reply), said
        self.close()
        why = "ended unexpectedly" if reply == "" else f"did not end within {timeout:.0f} s and was stopped"
        raise RepositoryError(
            f"the DVC process {why} at `dvc {command}` (its log is {self.log}); nothing is lost, the next `al round` "
            f"continues: {said}"
        )

    def _start(self, *options: str) -> subprocess.Popen[str] | forks.Fork:
        if self._process is not None:
            return self._process
        private_folder(self.log.parent)
        self._output = os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab")
        self._process = forks.popen(
            [sys.executable, "-P", "-m", _WORKER, *options],  # -P: see STAGE_ENVIRONMENT
            forks.DVC,
            self._fork_servers(),
            cwd=self.root,
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            encoding="utf-8",
            start_new_session=True,
        )
        if self.state is not None:
            child.remember(self.state, self._process.pid)
        return self._process

    def _state_folder(self) -> Path:
        """This workspace's folder for DVC's state; one shared folder for repositories that are no workspace (yet)."""
        return dvc_state(self._workspace_id() or "dvc-only")

    def _workspace_id(self) -> str | None:
        name = read_object(self.root / Layout().marker).get("workspace_id")
        return name if isinstance(name, str) and _ID.match(name) else None

    def _fork_servers(self) -> Path | None:
        """The folder of the workspace's fork servers; None for a repository that is no workspace."""
        name = self._workspace_id()
        return fork_servers(name) if name else None

    def _environment(self) -> dict[str, str]:
        """The environment of DVC's processes: our programs first on the PATH, state in a private folder."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        state = Path(self.environment.get("DVC_SITE_CACHE_DIR") or self._state_folder())
        ours = {
            "PATH": path,
            "DVC_NO_ANALYTICS": "1",
            "NO_COLOR": "1",
            **self.environment,
            "DVC_SITE_CACHE_DIR": str(private_folder(state)),
        }
        return {**_inherited(), **own_environment(), **ours}

    @property
    def _notes(self) -> Path:
        return self.root / ".al/verified"


def _is_dead(path: Path) -> bool:
    """Whether DVC's lock file is truncated, or names holders none of which is alive."""
    try:
        written = path.stat().st_mtime
        held = json.loads(path.read_text(encoding="utf-8"))
        entries = [*held.get("write", {}).values(), *itertools.chain.from_iterable(held.get("read", {}).values())]
        holders = {int(entry["pid"]) for entry in entries if entry}
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError, TypeError, KeyError):
        return True
    return bool(holders) and not any(child.lives(pid, before=written) for pid in holders)


def _inherited() -> dict[str, str]:
    """Our environment without what DVC and its stages must not see: git's variables, and our secrets."""
    hidden = (*NOT_OURS, *SECRET_VARIABLES)
    return {name: value for name, value in os.environ.items() if name not in hidden}
