"""Whatever git is set to on a machine, a workspace goes through its rounds: on real git, with hostile settings."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from harness import play, small_workspace

from al_pipeline.errors import RepositoryError
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.init import init
from al_pipeline.operations.intervene import rollback
from al_pipeline.workspace.workspace import open_workspace

HOSTILE = """\
[color]
    ui = always
[column]
    ui = always
[core]
    splitIndex = true
    commentChar = r
    pager = false
    preferSymlinkRefs = true
    excludesFile = {folder}/ignored
    attributesFile = {folder}/attributes
[index]
    version = 4
    skipHash = true
[feature]
    manyFiles = true
[init]
    defaultObjectFormat = sha256
    defaultBranch = other
[log]
    showSignature = true
    follow = true
    date = relative
[format]
    pretty = oneline
[commit]
    template = /nonexistent
    cleanup = scissors
    verbose = true
    gpgSign = true
[tag]
    gpgSign = true
    forceSignAnnotated = true
    sort = -creatordate
[gpg]
    program = false
[push]
    followTags = true
    default = nothing
    gpgSign = if-asked
[fetch]
    prune = true
    pruneTags = true
[status]
    branch = true
    showUntrackedFiles = no
    relativePaths = true
    renames = copies
[diff]
    orderFile = /nonexistent
    noprefix = true
    renames = copies
    external = false
[i18n]
    commitEncoding = latin1
    logOutputEncoding = utf-16
[submodule]
    recurse = true
[user]
    useConfigOnly = true
    name = Only A Name
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's settings that change what git prints or does, and half an identity."""
    path = tmp_path / "gitconfig"
    path.write_text(HOSTILE.format(folder=tmp_path), encoding="utf-8")
    (tmp_path / "attributes").write_text("*.json filter=none diff=none text eol=crlf\n", encoding="utf-8")
    (tmp_path / "ignored").write_text("engine.json\n*.jsonl\n*.csv\n*.lock\n*.dvc\n", encoding="utf-8")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(path))
    for name in [name for name in os.environ if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_AUTHOR_DATE", "never")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    monkeypatch.setenv("GIT_DEFAULT_HASH", "sha256")
    monkeypatch.setenv("GIT_TRACE", "1")
    return path


@pytest.mark.slow
def test_rounds_and_a_rollback_under_hostile_settings(tmp_path: Path, hostile: Path) -> None:
    workspace, truth = small_workspace(tmp_path)
    git = Git(workspace.layout.root)
    subprocess.run(["git", "init", "--bare", "--quiet", "--object-format=sha1", tmp_path / "bare"], check=True)
    git.run("remote", "add", "origin", str(tmp_path / "bare"))
    oracle = SimulatedOracle()
    play(workspace, oracle, truth, 2)
    # by hand, with the settings of the user: the index takes the form that DVC cannot read
    git_by_hand = ["git", "-C", str(git.root), "update-index", "--split-index"]
    subprocess.run(git_by_hand, check=True, capture_output=True)
    with open_dvc(workspace.layout) as dvc:
        rollback(open_workspace(git.root), dvc, 0, labels=True, model=False, params=False, reason="back")
    play(open_workspace(git.root), oracle, truth, 1)
    assert {"round-0000", "round-0001"} <= set(git.tags())
    assert git.remote_has_tag("round-0001")
    assert git.lacks() == 0
    assert "round-0001" in git.tags(), "the fetch pruned no tag"
    assert git.run("log", "-1", "--format=%an <%ae>|%cn").stdout.strip() == "Only A Name <al@localhost>|Only A Name"


@pytest.mark.parametrize(
    ("settings", "environment", "author", "own"),
    [
        ("", {}, "al <al@localhost>", False),
        ("name = Ann", {}, "Ann <al@localhost>", False),
        ("email = a@b", {}, "al <a@b>", False),
        ("name = Ann\n    email = a@b", {}, "Ann <a@b>", True),
        ("name = <>\n    email = ' '", {}, "al <al@localhost>", False),
        ("", {"GIT_AUTHOR_NAME": "Env"}, "Env <al@localhost>", False),
        ("", {"GIT_COMMITTER_EMAIL": "c@d"}, "al <al@localhost>", False),
        ("useConfigOnly = true\n    email = a@b", {"GIT_AUTHOR_NAME": "Env"}, "Env <a@b>", False),
    ],
)
def test_half_an_identity_is_completed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: str,
    environment: dict[str, str],
    author: str,
    own: bool,
) -> None:
    (tmp_path / "config").write_text(f"[user]\n    {settings}\n", encoding="utf-8")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    for role in ("AUTHOR", "COMMITTER"):
        for part in ("NAME", "EMAIL"):
            monkeypatch.delenv(f"GIT_{role}_{part}")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    git = Git(tmp_path / "r")
    git.root.mkdir()
    git.init()
    (git.root / "x").write_text("x", encoding="utf-8")
    git.commit("One", [git.root / "x"])
    git.tag("round-0000", "round-0000: one")
    assert git.run("log", "-1", "--format=%an <%ae>").stdout.strip() == author
    assert git.has_identity() is own


def test_a_dead_lock_of_a_linked_work_tree_is_cleared(tmp_path: Path) -> None:
    main = Git(tmp_path / "main")
    main.root.mkdir()
    main.init()
    (main.root / "x").write_text("x", encoding="utf-8")
    main.commit("One", [main.root / "x"])
    main.run("worktree", "add", "-b", "other", str(tmp_path / "linked"))
    lock = tmp_path / "main/.git/worktrees/linked/index.lock"
    lock.touch()
    linked = Git(tmp_path / "linked")
    (linked.root / "x").write_text("y", encoding="utf-8")
    ended = subprocess.Popen(["git", "--version"], cwd=linked.root, stdout=subprocess.PIPE)
    assert ended.stdout is not None and ended.stdout.read()
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert linked.commit("Two", [linked.root / "x"]) == linked.head(), "a git that has ended holds no lock"
    assert not lock.exists()
    ended.communicate()


@pytest.mark.parametrize("form", [["--split-index"], ["--index-version", "4"]])
def test_an_index_that_dvc_cannot_read_is_made_plain(tmp_path: Path, form: list[str]) -> None:
    root = init(tmp_path / "w", ["a", "b"]).layout.root
    subprocess.run(["git", "update-index", *form], cwd=root, check=True)
    (root / "data/x").write_text("x", encoding="utf-8")
    with Dvc(root, root / ".al/dvc.json", root / ".al/logs/dvc.log") as dvc:
        dvc.end_previous()
        dvc.add(root / "data/x")
    assert (root / ".git/index").read_bytes()[:8] == b"DIRC\0\0\0\2"


def test_a_repository_that_dvc_cannot_read_is_refused_and_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "w"
    root.mkdir()
    subprocess.run(["git", "init", "--quiet", "--object-format=sha256"], cwd=root, check=True)
    with pytest.raises(RepositoryError, match="object format sha256, which DVC cannot read"):
        init(root, ["a", "b"])
    assert [path.name for path in root.iterdir()] == [".git"]
