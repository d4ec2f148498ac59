"""A server as a detached process on loopback: start it once, wait until it is healthy, find it again, stop it.

A server's processes carry a mark in their environment, which their children inherit. It also identifies a process whose
parent was killed before it wrote the record; the record only stores where the server listens.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from al_pipeline.errors import BadInput, ServerFailed
from al_pipeline.files import read_json, write_json
from al_pipeline.logs import get_logger
from al_pipeline.sanitize import has_tls
from al_pipeline.workspace.home import own_environment, private_folder

_logger = get_logger(__name__)

LOOPBACK = "127.0.0.1"
MARK = "AL_SERVER"
"""Environment variable that marks the processes of one server by the path of its record."""

Progress = Callable[[str], None]

_PORT_ATTEMPTS = 4
_PORT_SECONDS = 3.0
_POLL_SECONDS = 0.2
_STOP_SECONDS = 15.0
_BUSY_SECONDS = 45.0
_INHERITED = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH")


@dataclass(frozen=True, slots=True)
class Server:
    """A started server: its process and its address."""

    name: str
    pid: int
    started: float
    """Start time of the process, in seconds since 1970; with `pid` it identifies the process uniquely."""
    port: int
    url: str


@dataclass(frozen=True)
class Service:
    """How to run one kind of server."""

    name: str
    home: Path
    """Its private folder, with record, log and data."""
    command: Callable[[int], Sequence[str]]
    """The command line, given the port. Every user of the machine can read it, so it holds no secrets."""
    environment: Callable[[int], Mapping[str, str]]
    """Variables added to the inherited ones, given the port. Only the owner can read them."""
    health: str
    """URL path that answers 200 while the server is healthy."""
    timeout: float
    """Seconds that a start may take."""

    @property
    def record(self) -> Path:
        return self.home / "server.json"

    @property
    def log(self) -> Path:
        return self.home / "server.log"


def start(service: Service, progress: Progress, ended: Callable[[], object] = lambda: None) -> Server:
    """Return the running server; if there is none, start it, on its previous port if that is free.

    `ended` is called before a start, once no process of the server is left. Raises ServerFailed with the end of the log
    if the server exits early or is not healthy in time.
    """
    private_folder(service.home)
    with exclusive(service.home / "start.lock", service.timeout):
        found = _wait_while_busy(service)
        if found is not None:
            return found
        stop(service)
        ended()
        known = remembered(service)
        port = known.port if known and _becomes_free(known.port) else free_port()
        for _ in range(_PORT_ATTEMPTS):
            pid = _spawn(service, port)
            if _wait_until_healthy(service, pid, port, progress):
                server = Server(service.name, pid, psutil.Process(pid).create_time(), port, f"http://{LOOPBACK}:{port}")
                write_json(service.record, asdict(server), mode=0o600)
                _logger.info("%s listens at %s, process %d", service.name, server.url, pid)
                return server
            _logger.warning("%s did not get port %d and uses another one", service.name, port)
            end(processes(service))
            port = free_port()
        raise ServerFailed(f"{service.name} found no free port in {_PORT_ATTEMPTS} attempts; try again")


def remembered(service: Service) -> Server | None:
    """The service's record; None if it is missing or cannot be read."""
    return recorded(service.record)


def recorded(record: Path) -> Server | None:
    """The record in a file; None if it is missing or cannot be read."""
    try:
        return Server(**read_json(record))
    except (BadInput, TypeError):
        return None


def status(service: Service) -> Server | None:
    """The server if its process lives, owns its port and is healthy, else None."""
    server = remembered(service)
    if server is None or not _alive(server):
        return None
    if server.port not in _listening(processes(service)) or not is_healthy(server.url + service.health):
        return None
    return server


def stop(service: Service) -> bool:
    """End every process of this server; False if there was none. The record keeps the port."""
    found = processes(service)
    end(found)
    if found:
        _logger.info("%s was ended: %d processes", service.name, len(found))
    return bool(found)


def processes(service: Service) -> list[psutil.Process]:
    """The live processes that carry this server's mark, recorded or not."""
    mark = str(service.record)
    return [process for process in psutil.process_iter() if carries_mark(process, mark)]


def marked() -> dict[str, list[psutil.Process]]:
    """The live processes of all servers of this user, by their mark; reads the process table once."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mark = process.environ().get(MARK)
            if mark and process.status() != psutil.STATUS_ZOMBIE:
                found.setdefault(os.path.realpath(mark), []).append(process)
    return found


def end(found: Sequence[psutil.Process]) -> None:
    """Send SIGTERM, then SIGKILL to those left. psutil compares start times, so a reused process id is never hit."""
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(found, timeout=_STOP_SECONDS)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=_STOP_SECONDS)


def is_healthy(url: str, timeout: float = 5.0) -> bool:
    """Whether `url` answers 200 within `timeout` seconds."""
    import httpx

    try:
        with httpx.Client(trust_env=False, timeout=timeout, verify=has_tls(url)) as client:
            return client.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def inherited_environment() -> dict[str, str]:
    """The few variables of this process that a server needs, without settings for other servers."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {**inherited, **own_environment(inherited)}


def port_is_free(port: int) -> bool:
    """Whether `port` can be bound on loopback and nothing answers there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) != 0


def free_port() -> int:
    """A random port that is free on loopback at present."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def exclusive(path: Path, timeout: float) -> Iterator[None]:
    """Wait for a file lock and hold it; the kernel releases it with this process. Raises ServerFailed on timeout."""
    from filelock import FileLock, Timeout  # lazy: takes 60 ms, and only starting a server needs it

    private_folder(path.parent)
    try:
        held = FileLock(path, timeout=timeout, mode=0o600, poll_interval=_POLL_SECONDS).acquire()
    except Timeout:
        raise ServerFailed(f"another process has held {path} for more than {timeout:.0f} s; try again") from None
    with held:
        yield


def last_lines(path: Path, count: int = 8) -> str:
    """The last `count` lines of a log; empty if it does not exist."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-count:])
    except FileNotFoundError:
        return ""


def _wait_while_busy(service: Service) -> Server | None:
    """The running server; one that lives but is too busy to answer gets up to _BUSY_SECONDS."""
    server = remembered(service)
    deadline = time.monotonic() + _BUSY_SECONDS
    while server is not None and _alive(server):
        found = status(service)
        if found is not None or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_SECONDS)
    return None


def _spawn(service: Service, port: int) -> int:
    environment = {**inherited_environment(), **service.environment(port), MARK: str(service.record)}
    return start_detached(service.command(port), environment, service.home, service.log)


def start_detached(command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> int:
    """Start a process in `folder` that outlives this one, and return its pid. The log of the one before is kept."""
    if log.exists():
        log.replace(log.with_suffix(".log.old"))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
    finally:
        os.close(output)
    child.returncode = 0  # suppress Popen's warning that it still runs
    return child.pid


def _has_ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _wait_until_healthy(service: Service, pid: int, port: int, progress: Progress) -> bool:
    """True once the server is healthy at `port`; False if another process took that port first."""
    begin = time.monotonic()
    reported = -10.0
    while (waited := time.monotonic() - begin) < service.timeout:
        ours = processes(service)
        # Between exec and its first instruction a process has no environment yet, so check that it lives, too.
        if pid not in {process.pid for process in ours} and _has_ended(pid):
            if not port_is_free(port):
                return False
            raise ServerFailed(f"{service.name} exited while starting; {_end_of_log(service)}")
        listening = _listening(ours)
        if listening and port not in listening:
            return False
        if port in listening and is_healthy(f"http://{LOOPBACK}:{port}{service.health}"):
            return True
        if waited - reported >= 5:
            progress(f"starting {service.name} ({waited:.0f} s)")
            reported = waited
        time.sleep(_POLL_SECONDS)
    end(processes(service))
    raise ServerFailed(f"{service.name} was not healthy after {service.timeout:.0f} s; {_end_of_log(service)}")


def _becomes_free(port: int) -> bool:
    """Whether `port` becomes free within _PORT_SECONDS: a killed process holds it until the kernel has cleaned up."""
    deadline = time.monotonic() + _PORT_SECONDS
    while not port_is_free(port):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _end_of_log(service: Service) -> str:
    return f"end of its log ({service.log}):\n{last_lines(service.log)}"


def _alive(server: Server) -> bool:
    try:
        process = psutil.Process(server.pid)
        return abs(process.create_time() - server.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def carries_mark(process: psutil.Process, mark: str) -> bool:
    """Whether a live process has this mark in its environment."""
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def _listening(found: Sequence[psutil.Process]) -> set[int]:
    """The ports on which these processes listen."""
    ports: set[int] = set()
    for process in found:
        with contextlib.suppress(psutil.Error):
            ports |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return ports
