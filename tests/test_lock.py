"""One writer per workspace: two processes, a killed holder, another host."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from al_pipeline.errors import Locked
from al_pipeline.workspace import lock as lock_module
from al_pipeline.workspace.lock import holder, locked

ROOT = Path(__file__).parents[1]
HOLD = """
import sys
from pathlib import Path
from al_pipeline.workspace.lock import locked
with locked(Path(sys.argv[1]), "a long tick"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_told_who_works_here(tmp_path: Path) -> None:
    path = tmp_path / ".al/lock"
    with other_process(path) as process:
        refusal = pytest.raises(
            Locked, match=rf"a long tick, process {process.pid} on .*, since 20\S+\+00:00; try again"
        )
        with refusal, locked(path, "another tick"):
            pytest.fail("two writers")
        assert holder(path)["pid"] == process.pid
        process.communicate("")
        assert process.returncode == 0
    with locked(path, "another tick"):
        assert holder(path)["purpose"] == "another tick"


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with other_process(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert json.loads(path.read_text(encoding="utf-8"))["pid"] == process.pid, "it had no time to clear it"
    assert holder(path) == {}, "nobody is shown as holding it"
    with locked(path, "the next tick"):
        assert holder(path)["pid"] == os.getpid()


def test_the_lock_is_not_passed_on_to_children(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "a tick"):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        with locked(path, "another tick"):
            pass
    finally:
        child.communicate(b"")


def test_it_is_not_entered_twice(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "a tick"):
        with pytest.raises(Locked), locked(path, "the same tick"):
            pass
        assert holder(path)["purpose"] == "a tick", "the refused one has not cleared it"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Locked])
def test_nobody_holds_it_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "lock"
    with pytest.raises(error), locked(path, "a tick"):
        raise error("no")
    assert json.loads(path.read_text(encoding="utf-8")) == {}
    with locked(path, "another"):
        pass
    assert json.loads(path.read_text(encoding="utf-8")) == {}


@pytest.fixture
def network_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the workspace lay where other machines can write too."""
    monkeypatch.setattr(lock_module, "_file_system", lambda _: "nfs4")


@pytest.mark.usefixtures("network_drive")
def test_another_hosts_lock_is_never_taken_and_the_way_out_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    text = json.dumps({"pid": 1, "host": "elsewhere", "purpose": "a tick", "since": "2026-01-01T00:00:00+00:00"})
    path.write_text(text, encoding="utf-8")
    for _ in range(2):
        refusal = pytest.raises(Locked, match=rf"a tick, process 1 on elsewhere, since 2026.*delete {path}")
        with refusal, locked(path, "a tick"):
            pytest.fail("two writers")
        assert path.read_text(encoding="utf-8") == text, "what it says is kept"
    assert holder(path)["host"] == "elsewhere"
    path.unlink()
    with locked(path, "a tick"):
        assert holder(path)["host"] == socket.gethostname()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[1]", b"\xff\xfe", b"{}", b'"text"', b'{"host"'])
def test_a_damaged_lock_file_is_a_free_lock(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lock"
    path.write_bytes(content)
    assert holder(path) == {}
    with locked(path, "a tick"):
        assert holder(path)["pid"] == os.getpid()


def test_a_container_that_comes_back_under_another_name_takes_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text('{"host": "elsewhere", "pid": 1}', encoding="utf-8")
    with locked(path, "a tick"):
        assert holder(path)["host"] == socket.gethostname(), "a file system of this machine: flock says it all"


@pytest.mark.usefixtures("network_drive")
def test_the_same_kernel_on_a_network_drive_takes_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    with locked(path, "a tick"):
        left = path.read_text(encoding="utf-8")
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
    path.write_text(left, encoding="utf-8")
    with locked(path, "a tick"):
        assert holder(path)["host"] == "renamed"
    path.write_text(left.replace(json.loads(left)["boot"], "another-kernel"), encoding="utf-8")
    with pytest.raises(Locked, match="locked on another machine"), locked(path, "a tick"):
        pass


def test_a_lock_that_is_held_is_refused_whatever_its_record_says(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, "a tick"):
        path.write_text('{"host": "elsewhere", "pid": 1}', encoding="utf-8")
        with pytest.raises(Locked, match="busy"), locked(path, "another"):
            pass


@pytest.mark.usefixtures("network_drive")
def test_a_record_that_lacks_words_is_still_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text('{"host": "elsewhere"}', encoding="utf-8")
    with pytest.raises(Locked, match="unknown, process unknown on elsewhere"), locked(path, "a tick"):
        pass


def test_no_lock_is_held_by_nobody(tmp_path: Path) -> None:
    assert holder(tmp_path / "lock") == {}
