"""Forks in place of processes: they are alike, end alike, and a real process starts where a fork would differ."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import al_pipeline
from al_pipeline.files import read_json
from al_pipeline.integrations import forks
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.init import init
from al_pipeline.servers.fork_server import MODULES
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT
from al_pipeline.workspace.workspace import Workspace

pytestmark = pytest.mark.slow

WHO = (
    "import os, sys, resource; print(sys.argv, os.environ.get('SEEN'), os.getcwd(), oct(os.umask(0)), "
    "resource.getrlimit(resource.RLIMIT_NOFILE), os.getpid() == os.getsid(0), sys.stdin.read(), os.nice(0)); "
    "print('said', file=sys.stderr); sys.exit(3)"
)
"""Prints what a process has from the one that started it."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fork server that imports nothing but a stage, named `some`."""
    folder = tmp_path_factory.mktemp("servers")
    server = start(folder / "some", "al_pipeline.stages.label")
    yield folder
    server.kill()
    server.wait()


def start(folder: Path, *modules: str, **more: Any) -> subprocess.Popen[bytes]:
    folder.mkdir(mode=0o700, exist_ok=True)
    command = [sys.executable, "-P", "-m", forks.SERVER, str(folder), *modules]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, stderr=log, **more)
    wait_for(lambda: answers(folder))
    return server


def answers(folder: Path) -> bool:
    try:
        with forks.connect(folder):
            return True
    except OSError:
        return False


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def servers_of_the_run(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the fork servers that this run of the tests has; here it is not used."""
    folder = Path(os.environ[forks.FOLDER])
    monkeypatch.delenv(forks.FOLDER)
    return folder


def started(folder: Path, script: str, **more: Any) -> forks.Fork | subprocess.Popen[Any]:
    given = {"cwd": Path.cwd(), "env": dict(os.environ), "start_new_session": True, "stdin": subprocess.DEVNULL} | more
    return forks.popen([sys.executable, "-P", "-c", script, "an argument"], "some", folder, **given)


def test_a_fork_is_as_the_process_would_be(servers: Path, tmp_path: Path) -> None:
    told = []
    before = os.umask(0o027)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = 200 + psutil.Process().num_fds()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
        for folder in (servers, tmp_path / "no server"):
            with (tmp_path / "said").open("w+") as said:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "encoding": "utf-8"}
                with started(folder, WHO, cwd=tmp_path, env={**os.environ, "SEEN": "ä"}, **pipes) as process:
                    assert isinstance(process, forks.Fork) == (folder == servers)
                    assert process.stdin is not None and process.stdout is not None
                    process.stdin.write("asked\n")
                    process.stdin.close()
                    told.append((process.stdout.read(), process.wait(60)))
                said.seek(0)
                assert said.read() == "said\n"
    finally:
        os.umask(before)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert told[0] == told[1] and told[0][1] == 3
    assert f"({allowed}, " in told[0][0] and "0o27" in told[0][0] and "asked" in told[0][0]


def test_its_end_is_told(servers: Path) -> None:
    def ends(script: str) -> tuple[int, str]:
        done = forks.run(
            [sys.executable, "-P", "-c", script], "some", servers, cwd=Path.cwd(), env=dict(os.environ), timeout=60
        )
        return done.returncode, done.stderr

    assert ends("pass") == (0, "")
    assert ends("import sys; sys.exit('said')") == (1, "said\n")
    assert ends("import os; os.kill(os.getpid(), 9)") == (-signal.SIGKILL, "")
    code, said = ends("raise ValueError('why')")
    assert code == 1 and said.endswith("ValueError: why\n")
    with pytest.raises(subprocess.TimeoutExpired):
        forks.run(
            [sys.executable, "-P", "-c", "import time; time.sleep(600)"],
            "some",
            servers,
            cwd=Path.cwd(),
            env=dict(os.environ),
            timeout=0.5,
        )
    process = started(servers, "import time; time.sleep(600)")
    assert isinstance(process, forks.Fork)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL and not psutil.pid_exists(process.pid)


def test_a_tied_one_ends_with_the_process_that_asked_for_it(servers: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from al_pipeline.integrations import forks; "
        "words = [sys.executable, '-P', '-c', 'import time; time.sleep(600)']; "
        f"fork = forks.Fork(Path({str(servers / 'some')!r}), words, cwd='/', env=os.environ, start_new_session=True, "
        "tied=%s); print(fork.pid, flush=True); fork.wait()"
    )
    for tied in (True, False):
        with subprocess.Popen([sys.executable, "-c", script % tied], stdout=subprocess.PIPE, text=True) as asking:
            assert asking.stdout is not None
            fork = psutil.Process(int(asking.stdout.readline()))
            asking.kill()
        if tied:
            fork.wait(60)
        else:
            time.sleep(1)
            fork.kill()


def test_one_that_is_killed_before_it_begins_has_ended() -> None:
    """What a process was sent and did not read resets the connection, in place of ending it."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours, theirs = socket.socketpair()
    ours.sendall(b"go\n")
    theirs.close()
    fork = forks.Fork.__new__(forks.Fork)
    fork.args, fork.pid, fork.returncode, fork._link, fork._heard = [], gone.pid, None, ours, ours.makefile("r")
    assert fork.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("name", ["PYTHONPATH", "LD_PRELOAD", "OMP_NUM_THREADS", "LC_ALL", "AL_LOG_LEVEL"])
def test_another_environment_starts_a_process(servers: Path, name: str) -> None:
    before = logged(servers)
    with started(servers, "pass", env={**os.environ, name: ""}) as process:
        assert isinstance(process, subprocess.Popen)
    (line,) = logged(servers)[len(before) :]
    assert line.endswith(f": refused, so that a process starts: it has other values of {name}")
    with started(servers, "pass", env={**os.environ, "ANY_OTHER": "1"}) as process:
        assert isinstance(process, forks.Fork)
    assert len(logged(servers)) == len(before) + 1, "what is taken is not logged"


def logged(folder: Path) -> list[str]:
    """The lines of the log of the server `some`."""
    return (folder / "some/server.log").read_text(encoding="utf-8").splitlines()


def test_a_server_that_others_could_replace_is_not_asked(servers: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "some").symlink_to(servers / "some")
    with started(shared, "pass") as process:
        assert isinstance(process, subprocess.Popen)


def test_a_server_that_does_not_answer_costs_seconds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_SECONDS", 0.5)
    server = start(tmp_path / "some")
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with started(tmp_path, "pass") as process:
            assert isinstance(process, subprocess.Popen)
    finally:
        server.kill()
        server.wait()
    with started(tmp_path, "pass") as process:  # its socket is still there
        assert isinstance(process, subprocess.Popen)


def test_new_code_is_forked_only_once_it_is_imported(tmp_path: Path) -> None:
    package = tmp_path / "code/al_pipeline"
    package.parent.mkdir()
    shutil.copytree(Path(al_pipeline.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    server = start(tmp_path / "some", env=environment)
    client = (
        "import os, sys; from pathlib import Path; from al_pipeline.integrations import forks; "
        f"p = forks.popen([sys.executable, '-P', '-c', 'import al_pipeline; print(al_pipeline.NEW)'], 'some', "
        f"Path({str(tmp_path)!r}), cwd='/', env=dict(os.environ), start_new_session=True); "
        "p.wait(); print(type(p).__name__, flush=True)"
    )

    def told() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-P", "-c", client], env=environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout.split()

    with (package / "__init__.py").open("a") as module:
        module.write("\nNEW = 1\n")
    assert told() == ["1", "Popen"], "the server has the code of before"
    wait_for(lambda: answers(tmp_path / "some"))
    assert told() == ["1", "Fork"]
    assert server.poll() is None
    (tmp_path / "some/socket").unlink()
    assert server.wait(60) == 0, "it ends when its socket is removed"
    said = [line.partition("INFO: ")[2].partition(",")[0] for line in logged(tmp_path) if "INFO" in line]
    assert said == ["starts", "starts again: code or packages have changed", "starts", "ends: its socket was removed"]


@pytest.fixture
def dvc(tmp_path: Path) -> Dvc:
    workspace: Workspace = init(tmp_path / "w", ["a", "b"])
    return open_dvc(workspace.layout)


def test_dvc_is_a_fork_that_ends_with_its_session(
    dvc: Dvc, monkeypatch: pytest.MonkeyPatch, servers_of_the_run: Path
) -> None:
    wait_for(lambda: answers(servers_of_the_run / "dvc"))
    monkeypatch.setenv(forks.FOLDER, str(servers_of_the_run))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # as an encoder sets it, and no import reads it
    with dvc:
        dvc.changed()
        assert isinstance(dvc._process, forks.Fork)
        pid = dvc._process.pid
        assert dvc.state is not None and read_json(dvc.state)["pid"] == os.getpgid(pid) == os.getsid(pid) == pid
        assert psutil.Process(pid).cwd() == str(dvc.root)
    assert not psutil.pid_exists(pid)


def test_a_fork_for_stages_finds_everything_prepared(tmp_path: Path) -> None:
    """What the server has not prepared, each tick would do again."""
    code = """
import sys
from al_pipeline import stages
from al_pipeline.integrations import forks
from al_pipeline.integrations.dvc import worker
from al_pipeline.workspace import fingerprint

names, known = set(sys.modules), fingerprint._engine.cache_info().currsize
stages.prepare()
worker.prepare()
print(forks.State.forked, known, sorted(set(sys.modules) - names))
"""
    server = start(tmp_path / "dvc", *MODULES, env={**os.environ, **STAGE_ENVIRONMENT})
    try:
        done = forks.run([sys.executable, "-P", "-c", code], "dvc", tmp_path, cwd=tmp_path, env=os.environ, timeout=60)
    finally:
        server.kill()
        server.wait()
    assert done.stdout == "True 1 []\n", done.stderr


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process has more open files than `select` can number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        yield
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_process_with_many_open_files_can_fork_and_run_dvc(tmp_path: Path, servers: Path) -> None:
    code = "print('done')"
    done = forks.run([sys.executable, "-P", "-c", code], "some", servers, cwd=tmp_path, env=os.environ, timeout=60)
    assert done.stdout == "done\n"
    with open_dvc(init(tmp_path / "w", ["ham", "spam"], remote=str(tmp_path / "remote")).layout) as dvc:
        assert dvc.changed(), "no stage has run yet"
