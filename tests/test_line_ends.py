"""Commands that read what was published, under line-end conversion: in the workspace, and in clones of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import answer_all, copy_workspace, play, tools_first

from al_pipeline.cli import app as cli
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import checkout, connect
from al_pipeline.operations.doctor import examine
from al_pipeline.operations.predict import predict
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.steps import label_studio
from al_pipeline.operations.tick import tick
from al_pipeline.workspace.workspace import open_workspace

CONVERTING = "[core]\n\tautocrlf = true\n\tsafecrlf = true\n\teol = crlf\n"


def check_what_reads(root: Path, rounds: int) -> None:
    """Doctor accuses nobody, each round comes out byte for byte, and the model answers."""
    wrong = {one.check: one.message for one in examine(open_workspace(root)) if one.level == "error"}
    assert wrong.keys() <= {"Label Studio"}, wrong
    made = list(reproduce(open_workspace(root), None))
    assert [one.round for one in made] == list(range(rounds))
    assert all(one.difference is None and one.compared == "bytes" for one in made), made
    rows = list(predict(open_workspace(root), iter([[("1", "win money now"), ("2", "minutes of the call")]])))
    assert [row["id"] for row in rows] == ["1", "2"] and {row["label"] for row in rows} <= {"ham", "spam"}
    for words in (["predict", "--text", "win money now"], ["report"]):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["al", "-C", str(root), *words])
            cli.main()
        assert stop.value.code in (0, None), words


@pytest.mark.slow
@pytest.mark.parametrize("attributes", [True, False], ids=["as made now", "as made by an earlier version"])
def test_what_reads_rounds_reads_them_whatever_git_converts(
    template: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attributes: bool
) -> None:
    settings = tmp_path / "gitconfig"
    settings.write_text(CONVERTING if attributes else "")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    workspace, oracle, truth = copy_workspace(template, tmp_path), SimulatedOracle(), template[1]
    root, git = workspace.layout.root, Git(workspace.layout.root)
    if not attributes:
        monkeypatch.setattr(label_studio, "bring_in_line", lambda *_: [])
        git.run("rm", "--quiet", ".gitattributes")
        git.run("-c", "user.name=x", "-c", "user.email=x@x", "commit", "--quiet", "--message", "As it was")
    play(workspace, oracle, truth, 1)
    settings.write_text(CONVERTING)
    check_what_reads(root, 1)

    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(root), str(clone)], check=True)
    subprocess.run(["dvc", "pull", "-q"], cwd=clone, env=tools_first(), check=True)
    text = (clone / "params.yaml").read_bytes()
    assert (b"\r\n" in text) == (not attributes), "the clone is converted where nothing keeps it from that"
    check_what_reads(clone, 1)
    assert (clone / "params.yaml").read_bytes() == text, "what reads changes nothing"

    # The clone takes the project over, and goes on.
    monkeypatch.setattr(label_studio, "bring_in_line", checkout.bring_in_line)
    second = open_workspace(clone)
    (ref,) = [number for number in oracle.projects]
    oracle.adopt(connect.stored_project(second.layout), second.id, second.clone_id)
    answer_all(oracle, truth)
    assert ref == 1 and tick(second, lambda: oracle).published == (1,)
    assert b"\r\n" not in (clone / "params.yaml").read_bytes()
    assert Git(clone).changed(second.layout.tracked) == []
    tracked = Git(clone).run("ls-files", "-z").stdout.split("\0")[:-1]
    assert not [name for name in tracked if b"\r\n" in (clone / name).read_bytes()]
    for name in tracked:
        os.utime(clone / name)
    assert Git(clone).run("status", "--porcelain").stdout == "", "git has read them all again"
    assert [one.difference for one in reproduce(open_workspace(clone), [1])] == [None]
