"""Stages run as forks: what a shell would have run, with its exit code, its output and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from harness import tools_first

from al_pipeline.integrations.dvc import stage_server
from al_pipeline.integrations.dvc.stage_server import StageServer, fork_stages, stage_module

STAGE = "python -m al_pipeline.stages.label"
NAME = "al_pipeline.stages.label"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tools_first()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StageServer]:
    (tmp_path / "dvc.yaml").write_text(f"stages: {{label: {{cmd: {STAGE}}}}}\n")
    server = StageServer()
    yield server
    if server._process is not None:
        server._process.kill()
        with contextlib.suppress(BrokenPipeError):
            server._process.__exit__(None, None, None)


def in_fork(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stage whose `main` is `code`, as a module that the server finds."""
    (folder / "made").mkdir(exist_ok=True)
    name = f"stage_{len(list((folder / 'made').iterdir()))}"
    (folder / f"made/{name}.py").write_text(f"import os, signal, sys, time\ndef main():\n    {code}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder / "made"))
    return name


def test_only_the_stages_of_this_python_are_forked(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stage_module(STAGE, environment) == NAME
    for other in (
        f"{STAGE} --all",
        f"nice {STAGE}",
        "python -m al_pipeline.cli",
        "python3 -m al_pipeline.stages.label",
    ):
        assert stage_module(other, environment) is None, other
    (tmp_path / "python").symlink_to(sys.executable)
    first = {**environment, "PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}"}
    assert stage_module(STAGE, first) is None, "another Python comes first: that of another engine"
    assert stage_module(STAGE, {**environment, "PATH": str(tmp_path / "nothing")}) is None
    assert stage_module(STAGE, {**environment, "PYTHONPATH": "/elsewhere"}) is None
    assert stage_module(STAGE, {**environment, "OMP_NUM_THREADS": "2"}) is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert stage_module(STAGE, {**environment, "OMP_NUM_THREADS": ""}) is None
    assert stage_module(STAGE, {k: v for k, v in environment.items() if k != "OMP_NUM_THREADS"}) is None


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('fine')", 0, "fine"),
        ("sys.exit()", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("sys.exit('BadInput: what is wrong')", 1, "BadInput: what is wrong"),
        ("raise ValueError('odd')", 1, "ValueError: odd"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.abort()", -signal.SIGABRT, ""),
        ("print(os.getcwd(), os.environ['OWN'], 'HOME' in os.environ, sys.stdin.read())", 0, "/here mine False"),
    ],
)
def test_a_fork_ends_as_the_command_would(
    code: str,
    status: int,
    said: str,
    server: StageServer,
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = in_fork(code, tmp_path, monkeypatch)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/dvc.yaml").write_text("{}")
    given = {"OWN": "mine", "PATH": environment["PATH"]}
    assert server.run(name, str(tmp_path / "here"), given) == status
    assert server.run(name, str(tmp_path / "here"), given) == status, "the server outlives the stage"
    assert said in capfd.readouterr().err


def until(found: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_stage_is_seen_by_name_and_ends_with_its_group(
    server: StageServer, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = in_fork("time.sleep(600)", tmp_path, monkeypatch)
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(server.run(name, str(tmp_path), environment)))
    waiting.start()
    until(lambda: server._process is not None)
    running = psutil.Process(server._process.pid)  # type: ignore[union-attr]
    until(lambda: [one for one in running.children() if one.name() == f"al-{name}"[:15]])
    (stage,) = running.children()
    assert os.getpgid(stage.pid) == os.getpgid(running.pid)
    assert any("al_pipeline.stages" in word for word in stage.cmdline()), "what ends orphans finds it by this"
    stage.kill()
    waiting.join(60)
    assert codes == [-signal.SIGKILL]


def test_what_is_preloaded_is_what_dvc_yaml_names(
    server: StageServer, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "dvc.yaml").write_text(
        f"stages: {{label: {{cmd: {STAGE}}}, no: {{cmd: python -m al_pipeline.stages.nothing}}}}"
    )
    assert server.run("al_pipeline.stages.nothing", str(tmp_path), environment) == 1
    assert server.run("al_pipeline.stages.nothing", str(tmp_path), environment) == 1


def test_a_server_that_was_killed_leaves_it_to_the_shell(
    server: StageServer, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = in_fork("pass", tmp_path, monkeypatch)
    assert server.run(name, str(tmp_path), environment) == 0
    assert server._process is not None
    server._process.kill()
    server._process.wait()
    with pytest.raises(OSError):
        server.run(name, str(tmp_path), environment)


def in_dvc(
    name: str, server: StageServer, folder: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[], None], list[str]]:
    """What runs the stage `name` as DVC does, and the commands that went to the shell."""
    import dvc.stage.run as runner

    in_shell: list[str] = []
    monkeypatch.setattr(runner, "_run", lambda executable, command, **given: in_shell.append(command))
    monkeypatch.setattr(stage_server, "StageServer", lambda: server)
    monkeypatch.setattr(stage_server, "stage_module", lambda command, environment: name)
    fork_stages()
    return lambda: runner._run(None, STAGE, cwd=str(folder), env=environment), in_shell


def test_a_stage_whose_server_is_killed_has_failed_and_ends(
    server: StageServer, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.stage.exceptions import StageCmdFailedError

    name = in_fork("time.sleep(600)", tmp_path, monkeypatch)
    run, in_shell = in_dvc(name, server, tmp_path, environment, monkeypatch)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            run()
        except StageCmdFailedError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: server._process is not None)
    running = psutil.Process(server._process.pid)  # type: ignore[union-attr]
    until(lambda: [one for one in running.children() if one.name() == f"al-{name}"[:15]])
    (stage,) = running.children()
    try:
        running.kill()
        waiting.join(60)
        assert not in_shell, "the same stage would run twice at once"
        assert [str(error) for error in raised] == [f"failed to run: {STAGE}, exited with {-signal.SIGKILL}"]
        until(lambda: not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            stage.kill()


def test_a_request_that_no_server_took_goes_to_the_shell(
    server: StageServer, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, in_shell = in_dvc(in_fork("pass", tmp_path, monkeypatch), server, tmp_path, environment, monkeypatch)
    run()
    assert not in_shell
    assert server._process is not None
    server._process.kill()
    server._process.wait()
    run()
    assert in_shell == [STAGE]


def test_a_server_that_ends_while_it_starts_leaves_it_to_the_shell(
    server: StageServer, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = in_fork("pass", tmp_path, monkeypatch)
    (tmp_path / "made" / f"{name}.py").write_text("import os; os._exit(0)")
    run, in_shell = in_dvc(name, server, tmp_path, environment, monkeypatch)
    run()
    assert in_shell == [STAGE]
