"""Start a process as a fork of one that has imported already what it needs (`fork_server`), if such a process runs.

DVC and the stages import for two to four seconds of processor time; a fork starts in a hundredth of a second. `al up`
runs a fork server for the ticks of its workspace. A process starts as usual if none answers, or if a fork would differ:
other code, other packages, or other values of variables that are read during imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import al_pipeline
from al_pipeline.errors import AlError
from al_pipeline.logs import get_logger, shown
from al_pipeline.workspace.home import check_private

_logger = get_logger(__name__)

FOLDER = "AL_FORK_SERVERS"
"""Environment variable: the folder of all fork servers, in place of that in the workspace's home."""
SERVER = "al_pipeline.integrations.fork_server"
DVC, FLOWS = "dvc", "flows"
"""A workspace's fork servers: the one for DVC and the stages, and the one for flow runs."""
FLOW_ENGINE = "al_pipeline.flows.engine"
"""What the forks of `FLOWS` run: named, not imported, by those who start it and those who ask it."""

READ_AT_IMPORT = (
    *("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "GLIBC_", "OMP_", "OPENBLAS_", "MKL_", "NPY_", "ARROW_", "OPENSSL_"),
    *("FSSPEC_", "HF_HUB_", "TRANSFORMERS_", "TORCH_", "CUDA_", "AL_LOG_LEVEL"),
)
"""Beginnings of the names of environment variables that count while a process starts and imports."""
HEADER = struct.Struct("=I")
"""The size of a request, in bytes; with it come the three standard files."""

_SECONDS = 10.0
_LIMITS = tuple(sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}))


class State:
    """What is known of this process."""

    forked: bool = False
    """Whether a fork server made it: it ends without what Python does at exit."""


def popen(words: Sequence[str], name: str, servers: Path | None, **given: Any) -> subprocess.Popen[Any] | Fork:
    """`subprocess.Popen(words, **given)`, as a fork if the server `name` in the folder `servers` can make it.

    `words` are a Python's, as in `[sys.executable, "-P", "-m", module, ...]`. `given` as `Fork` takes it.
    """
    folder = os.environ.get(FOLDER) or servers
    if name and folder is not None and list(words[:2]) == [sys.executable, "-P"] and words[2] in ("-m", "-c"):
        try:
            return Fork(Path(folder) / name, words, **given)
        except FileNotFoundError:  # no server
            pass
        except (OSError, AlError, ValueError) as error:
            _logger.debug("no fork of %s: %s", shown(words[2:]), error)
    return subprocess.Popen(words, **given)


def run(
    words: Sequence[str], name: str, servers: Path | None, *, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a process like `popen`, without input; return its exit code and output. Raises TimeoutExpired."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        with popen(words, name, servers, cwd=cwd, env=env, start_new_session=True, **files) as process:
            try:
                process.wait(timeout)
            except BaseException:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return subprocess.CompletedProcess(words, process.wait(), *texts)


class Fork:
    """A process that a fork server forked; what is used of `subprocess.Popen`.

    It leads a session and a process group of its own, and has the arguments, environment, folder, standard files, umask
    and resource limits that the process would have. Raises OSError if no server answers, or it cannot make this fork.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        *,
        cwd: Path | str,
        env: Mapping[str, str],
        start_new_session: bool,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        encoding: str | None = None,
        tied: bool = False,
    ) -> None:
        """`tied`: the fork is killed as soon as this process ends."""
        assert start_new_session, "a fork leads its own session: its parent is in another one"
        self.args = words
        self.returncode: int | None = None
        self.stdin: IO[Any] | None = None
        self.stdout: IO[Any] | None = None
        self._link = connect(folder)
        request = {
            "words": list(words[2:]),
            "folder": str(cwd),
            "environment": dict(env),
            "umask": _umask(),
            "nice": os.nice(0),
            "limits": {str(name): resource.getrlimit(name) for name in _LIMITS},
            "place": place(),
            "tied": tied,
        }
        try:
            with contextlib.ExitStack() as ours:
                files = [self._file(number, one, encoding, ours) for number, one in enumerate((stdin, stdout, stderr))]
                text = json.dumps(request).encode()
                socket.send_fds(self._link, [HEADER.pack(len(text))], files)
                self._link.sendall(text)
            self._heard = self._link.makefile("r", encoding="ascii")
            answer = self._heard.readline()
            if not answer.strip().isdecimal():
                raise OSError(f"the fork server did not take it: {answer.strip() or 'no answer'}")
            self.pid = int(answer)
            self._link.sendall(b"go\n")
            self._link.settimeout(None)
        except BaseException:
            self._close()
            self._link.close()
            raise
        _logger.debug("%s is fork %d of the server in %s", shown(words[2:]), self.pid, folder)

    def _file(self, number: int, given: int | IO[Any] | None, encoding: str | None, ours: contextlib.ExitStack) -> int:
        """The file descriptor that the fork gets; the other end of a pipe becomes `stdin` or `stdout`."""
        if given == subprocess.PIPE:
            out, into = os.pipe()
            ours.callback(os.close, out if number == 0 else into)
            if number == 0:
                self.stdin = os.fdopen(into, "w", encoding=encoding)
                return out
            self.stdout = os.fdopen(out, encoding=encoding)
            return into
        if given == subprocess.DEVNULL:
            null = os.open(os.devnull, os.O_RDWR)
            ours.callback(os.close, null)
            return null
        return number if given is None else given if isinstance(given, int) else given.fileno()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal. Raises TimeoutExpired."""
        if self.returncode is None:
            if not readable(self._link, timeout):
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
            told = ""
            with contextlib.suppress(ConnectionResetError):  # it was killed before it read that it may go
                told = self._heard.readline()  # nothing from a process that was killed
            self._heard.close()
            self._link.close()
            deadline = time.monotonic() + _SECONDS
            with contextlib.suppress(ProcessLookupError):
                while time.monotonic() < deadline:  # until it is gone: it holds files and locks
                    os.kill(self.pid, 0)
                    time.sleep(0.001)
            self.returncode = int(told or -signal.SIGKILL)
        return self.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._close()
        finally:
            self.wait()

    def _close(self) -> None:
        with contextlib.ExitStack() as both:
            for stream in (self.stdout, self.stdin):
                if stream is not None:
                    both.callback(stream.close)


def readable(file: Any, timeout: float | None) -> bool:
    """Whether `file` can be read, or has ended, within `timeout` seconds. `select` takes no numbers above 1,023."""
    with selectors.PollSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        return bool(selector.select(timeout))


def connect(folder: Path) -> socket.socket:
    """A connection with the fork server in `folder`.

    Raises OSError if none answers, UnsafeFolder if others can write to `folder`.
    """
    check_private(folder)
    link = socket.socket(socket.AF_UNIX)
    try:
        link.settimeout(_SECONDS)
        with address(folder) as name:
            link.connect(name)
        if (owner := peer(link)) not in (None, os.geteuid()):
            raise PermissionError(f"the fork server in {folder} belongs to user {owner}")
    except BaseException:
        link.close()
        raise
    return link


@contextlib.contextmanager
def address(folder: Path) -> Iterator[str]:
    """The path of the socket in `folder`; a shorter name of it if it is too long for the kernel (108 bytes)."""
    if not os.path.isdir("/proc/self/fd"):
        yield str(folder / "socket")
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}/socket"
    finally:
        os.close(handle)


def place() -> list[Any]:
    """What a fork shares with its server, and not with its client: interpreter, package, groups, root, namespaces."""
    spaces = [f"/proc/self/ns/{name}" for name in ("mnt", "net", "pid", "user", "ipc", "uts")]
    found = [os.stat(path) for path in ("/", *filter(os.path.exists, spaces))]
    same = [[one.st_dev, one.st_ino] for one in found]
    return [sys.executable, str(Path(al_pipeline.__file__).parent), os.getegid(), sorted(os.getgroups()), same]


def read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that count while a process starts and imports."""
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def peer(link: socket.socket) -> int | None:
    """The user at the other end; None where the system does not say (there, only the folder's permissions protect)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    return int(struct.unpack("=iII", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
