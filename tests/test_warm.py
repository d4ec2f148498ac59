"""Forks that stand for DVC's process: what they are, how they end, and when a real one starts in their place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from warm import WARM, Fork

from al_pipeline.files import read_json
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.init import init
from al_pipeline.workspace.workspace import Workspace


@pytest.fixture
def dvc(tmp_path: Path) -> Dvc:
    workspace: Workspace = init(tmp_path / "w", ["a", "b"])
    return open_dvc(workspace.layout)


def script(dvc: Dvc, text: str) -> Any:
    words = [sys.executable, "-P", "-c", text, "an argument"]
    return WARM.run(words, cwd=dvc.root, env=dvc._environment(), stdin=subprocess.DEVNULL, timeout=60)


def test_it_is_as_the_real_one_and_ends_with_its_session(dvc: Dvc, monkeypatch: pytest.MonkeyPatch) -> None:
    with dvc:
        dvc.changed()
        assert isinstance(dvc._process, Fork)
        pid = dvc._process.pid
        assert dvc.state is not None and read_json(dvc.state)["pid"] == os.getpgid(pid) == os.getsid(pid) == pid
        assert psutil.Process(pid).cwd() == str(dvc.root)
    assert not psutil.pid_exists(pid)
    monkeypatch.setenv("PYTHONPATH", str(dvc.root))
    with dvc:
        dvc.changed()
        assert isinstance(dvc._process, subprocess.Popen), "it imports under another environment"


def test_a_script_gets_its_arguments_and_its_end_is_told(dvc: Dvc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEN", "here")
    done = script(dvc, "import os, sys; print(sys.argv, os.environ['SEEN'], os.getcwd()); sys.exit(3)")
    assert (done.returncode, done.stdout, done.stderr) == (3, f"['-c', 'an argument'] here {dvc.root}\n", "")
    done = script(dvc, "raise ValueError('why')")
    assert done.returncode == 1 and done.stderr.endswith("ValueError: why\n")
    done = script(dvc, "import os; os.kill(os.getpid(), 9)")
    assert done.returncode == -signal.SIGKILL
    assert script(dvc, "import sys; sys.exit('said')").stderr == "said\n"
