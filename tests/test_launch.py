"""A flow run starts as a fork of the process that has imported Prefect's engine, and ends as the engine would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from al_pipeline.flows import launch
from al_pipeline.integrations import forks

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-P", "-m", "al_pipeline.flows.launch"]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a fork server that has imported the engine, as `al up` starts one."""
    folder = tmp_path_factory.mktemp("servers")
    (folder / forks.FLOWS).mkdir(mode=0o700)
    command = [sys.executable, "-P", "-m", forks.SERVER, str(folder / forks.FLOWS), forks.FLOW_ENGINE]
    background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]  # as after `al up &`
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(background, stderr=log, env={**os.environ, "PREFECT_HOME": str(folder / "prefect")})
    deadline = time.monotonic() + 120
    while not (folder / forks.FLOWS / "socket").exists():
        assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)
    yield folder
    server.kill()
    server.wait()


def environment(servers: Path | None, home: Path, **more: str) -> dict[str, str]:
    ours = {forks.FOLDER: str(servers or home / "none"), "PREFECT_HOME": str(home), "AL_WORKSPACE": str(home)}
    return {**os.environ, **ours, **more}


def run(servers: Path | None, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A flow run as Prefect's worker starts it."""
    given = environment(servers, home, **more)
    return subprocess.run(COMMAND, env=given, cwd=home, capture_output=True, text=True, timeout=300, check=False)


def works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd() == str(folder)
    except psutil.Error:
        return False


def test_it_ends_as_the_engine_ends(servers: Path, tmp_path: Path) -> None:
    as_fork, as_process = (run(folder, tmp_path, PREFECT__FLOW_RUN_ID="none") for folder in (servers, None))
    assert as_fork.returncode == as_process.returncode == 1
    for done in (as_fork, as_process):
        assert "Invalid flow run id" in done.stderr, done.stderr
    assert "other" not in (servers / "log").read_text(), "the fork was made"


def test_its_settings_are_those_of_its_environment(servers: Path, tmp_path: Path) -> None:
    """Prefect reads them when it is imported, which happened in the server, for another Prefect."""
    where = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    identity = "00000000-0000-0000-0000-000000000001"
    done = run(servers, tmp_path, PREFECT__FLOW_RUN_ID=identity, **where, PREFECT_LOGGING_LEVEL="DEBUG")
    assert done.returncode == 1
    assert identity in done.stderr and "Connection refused" in done.stderr, "by the settings of the server it asks none"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_reaches_the_fork(servers: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A server that never answers keeps the run waiting."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        where = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_API_REQUEST_TIMEOUT": "600"}
        given = environment(servers, tmp_path, PREFECT__FLOW_RUN_ID="00000000-0000-0000-0000-000000000001", **where)
        with subprocess.Popen(COMMAND, env=given, cwd=tmp_path, stderr=subprocess.DEVNULL) as launched:
            silent.settimeout(120)
            connection, _ = silent.accept()
            [fork] = [
                one
                for one in psutil.process_iter(["cwd", "pid"])
                if one.info["cwd"] == str(tmp_path) and one.pid != launched.pid
            ]
            launched.send_signal(number)
            fork.wait(60)
            connection.close()
            assert launched.wait(60) != 0


def test_a_fork_that_goes_on_after_an_interrupt_is_killed(
    servers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose interrupt came when Prefect had just taken a lock."""
    monkeypatch.setattr(launch, "_END_SECONDS", 1)
    note = tmp_path / "note"
    code = "import pathlib, signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    code += "pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    words = [sys.executable, "-P", "-c", code, str(note)]
    fork = forks.Fork(servers / forks.FLOWS, words, cwd=tmp_path, env=os.environ, start_new_session=True, tied=True)

    def interrupt() -> None:
        while not note.exists():
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        assert launch._follow(fork) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not psutil.pid_exists(fork.pid)
