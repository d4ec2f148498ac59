"""What people who know DVC type in a workspace between ticks: plots, metrics, artifacts, and building by hand."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Played, answer_all, go_on, results, tools_first

from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.history import read_history
from al_pipeline.operations.tick import tick
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def played(
    twice: Played, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workspace, SimulatedOracle, dict[str, str]]:
    """Two published rounds, the third one open."""
    folder = tmp_path_factory.mktemp("dvc-users")
    previous, os.environ["AL_HOME"] = os.environ["AL_HOME"], str(folder / "al-home")
    found = go_on(twice, folder)
    os.environ["AL_HOME"] = previous
    return found


@pytest.fixture
def dvc(played: Played, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    root = played[0].layout.root
    monkeypatch.setenv("AL_HOME", str(root.parent / "al-home"))

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["dvc", *arguments], cwd=root, env=tools_first(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_plots_show_the_confusion_matrix_and_the_metrics(
    played: Played, dvc: Callable[..., str], tmp_path: Path
) -> None:
    for command in (["show"], ["diff", "round-0000", "round-0001"]):
        shown = json.loads(dvc("plots", *command, "--json", "-o", str(tmp_path / command[0])))["data"]
        (matrix, *_), (bars, *_) = shown["rounds/confusion.csv"], shown["rounds/metrics.csv"]
        pairs = matrix["content"]["data"]["values"]
        classes = set(played[0].params.schema_.labels)
        assert {row["actual"] for row in pairs} == classes and {row["predicted"] for row in pairs} <= classes
        encoded = json.dumps(bars["content"])
        assert '"field": "value"' in encoded and '"field": "name"' in encoded, "no text column as an axis"
        names = [row["name"] for row in bars["content"]["data"]["values"] if row["rev"] != "round-0000"]
        assert len(names) == len(set(names)) and "f1 (spam)" in names


def test_metrics_of_two_rounds_are_compared(played: Played, dvc: Callable[..., str]) -> None:
    found = json.loads(dvc("metrics", "diff", "round-0000", "round-0001", "--all", "--json"))
    history = read_history(played[0].layout, Git(played[0].layout.root))
    figure = found["rounds/metrics.json"]["macro_f1.value"]
    assert [figure["old"], figure["new"]] == [one.metrics.macro_f1.value for one in history.rounds]


def test_the_model_of_a_round_is_an_artifact(played: Played, dvc: Callable[..., str], tmp_path: Path) -> None:
    git = Git(played[0].layout.root)
    git.run("tag", "-a", "classifier@v1.0.0", "-m", "Register", "round-0001^{commit}")
    dvc("artifacts", "get", ".", "classifier", "--rev", "v1.0.0", "-o", str(tmp_path / "registered"))
    dvc("get", ".", "models/candidate", "--rev", "round-0001", "-o", str(tmp_path / "of-round"))
    registered, of_round = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("registered", "of-round")
    )
    assert registered == of_round != {}


def test_what_people_run_by_hand_changes_no_round(played: Played, dvc: Callable[..., str]) -> None:
    """`dvc repro` finds nothing to do, a forced one makes the same bytes, a checkout is undone."""
    workspace, oracle, truth = played
    git = Git(workspace.layout.root)
    assert "up to date" in dvc("repro")
    before = {name: (workspace.layout.root / name).read_bytes() for name in ("dvc.lock", "rounds/metrics.json")}
    dvc("repro", "--force", "label", "train")
    dvc("status")
    assert before == {name: (workspace.layout.root / name).read_bytes() for name in before}, "the same bytes"
    git.run("checkout", "--quiet", "round-0000", "--", "dvc.lock")
    dvc("checkout")
    git.run("checkout", "--quiet", "HEAD", "--", "dvc.lock")
    dvc("checkout")
    answer_all(oracle, truth)
    report = tick(open_workspace(workspace.layout.root), lambda: oracle)
    assert report.published == (2,) and results(workspace, 2)["model"]
