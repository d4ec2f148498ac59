"""Real git and real DVC: only named paths, nothing of the user's touched, every failure said in words."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from harness import dvc_at

from al_pipeline.errors import RemoteIncomplete, RepositoryError, StageFailed, UnexpectedChange
from al_pipeline.files import read_json, write_json
from al_pipeline.integrations import git as git_package
from al_pipeline.integrations.dvc import session as dvc_module
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git, commits
from al_pipeline.integrations.git.runner import GitRunner
from al_pipeline.operations.steps import publishing
from al_pipeline.operations.steps.context import Outcome
from al_pipeline.rounds.state_machine import Facts
from al_pipeline.workspace.layout import Layout


def raw(root: Path, *arguments: str) -> str:
    """git as the user runs it."""
    return subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


@pytest.fixture
def git(tmp_path: Path) -> Git:
    """A repository with one commit: `mine`, and the user's `theirs`."""
    root = tmp_path / "repository"
    root.mkdir()
    git = Git(root)
    git.init()
    (root / "mine").write_text("1\n", encoding="utf-8")
    (root / "theirs").write_text("1\n", encoding="utf-8")
    git.commit("Begin", [root / "mine", root / "theirs"])
    return git


def change(git: Git, name: str = "mine", text: str = "2\n") -> Path:
    path = git.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_init_is_harmless_where_there_is_a_repository(git: Git) -> None:
    head = git.head()
    git.init()
    assert git.head() == head
    assert git.branch() == "main"


def test_a_commit_holds_the_named_paths_and_leaves_the_users_work_as_it_was(git: Git) -> None:
    change(git)
    change(git, "theirs", "staged\n")
    raw(git.root, "add", "theirs")
    change(git, "theirs", "staged and edited\n")
    change(git, "new-staged")
    raw(git.root, "add", "new-staged")
    change(git, "untracked")
    commit = git.commit("Mine alone", [git.root / "mine"])
    assert commit == git.head()
    assert raw(git.root, "show", "--name-only", "--format=%s", commit).split() == ["Mine", "alone", "mine"]
    assert raw(git.root, "status", "--porcelain").splitlines() == ["A  new-staged", "MM theirs", "?? untracked"]
    assert raw(git.root, "show", ":theirs") == "staged"
    assert (git.root / "theirs").read_text(encoding="utf-8") == "staged and edited\n"


def test_a_commit_takes_folders_deletions_and_new_files_and_skips_what_never_was(git: Git) -> None:
    change(git, "rounds/0001/plan.jsonl")
    change(git, "rounds/0002/plan ü.jsonl")
    (git.root / "mine").unlink()
    git.commit("Folder", [git.root / "rounds", git.root / "mine", git.root / "never"])
    assert git.files("HEAD", "rounds") == ["rounds/0001/plan.jsonl", "rounds/0002/plan ü.jsonl"]
    assert git.files("HEAD", "mine") == []
    assert raw(git.root, "status", "--porcelain") == ""


def loose(git: Git) -> set[str]:
    return {path.parent.name + path.name for path in (git.root / ".git/objects").glob("??/*")}


def texts_counted() -> Iterator[str]:
    """Texts of files whose ids begin with 17: git believes that it has 256 times as many objects."""
    for number in itertools.count():
        text = f"{number}\n"
        if hashlib.sha1(f"blob {len(text)}\0{text}".encode(), usedforsecurity=False).hexdigest().startswith("17"):
            yield text


def with_many_objects(git: Git, most: int = 27) -> None:
    """Commit as many files that count. The commit's own objects may count too: their ids change with the time."""
    for text in itertools.islice(texts_counted(), most):
        change(git, f"many/{text.strip()}", text)
    git.commit("Many", [git.root / "many"])


def with_exactly(git: Git, number: int) -> None:
    """So many objects that count, not all of them committed."""
    with_many_objects(git, number - 6)
    for text in texts_counted():
        if len(list((git.root / ".git/objects/17").iterdir())) == number:
            return
        raw(git.root, "hash-object", "-w", str(change(git, "one more", text)))


def test_loose_objects_are_packed_at_gits_own_limit_and_none_is_lost(git: Git) -> None:
    with_exactly(git, 26)
    assert not git.pack()
    with_many_objects(git, 28)
    git.tag("round-0001", "First")
    orphan = raw(git.root, "hash-object", "-w", str(change(git, "of a killed tick", "not recorded yet\n")))
    change(git, "staged")
    raw(git.root, "add", "staged")
    staged = raw(git.root, "rev-parse", ":staged")
    before = loose(git)
    assert git.pack()
    assert loose(git) == {orphan}, "it is not pruned"
    for name in before | {staged}:
        raw(git.root, "cat-file", "-e", name)
    assert git.check_objects() == []
    assert not git.pack()


def test_an_object_is_deleted_only_when_its_pack_is_on_disk(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    with_many_objects(git)
    before, calls, run = loose(git), list[str](), Git.run

    def recorded(self: Git, *arguments: str, **more: Any) -> Any:
        if arguments[0] == "prune-packed":
            assert loose(git) == before
            assert calls == ["synced"], "the names of the pack's files too"
            raise KeyboardInterrupt
        return run(self, *arguments, **more)

    def synced(files: Iterable[Path]) -> None:
        assert {path.suffix for path in files} >= {".pack", ".idx"}
        calls.append("synced")

    with monkeypatch.context() as patched:
        patched.setattr(Git, "run", recorded)
        patched.setattr(commits, "sync_names", synced)
        with pytest.raises(KeyboardInterrupt):
            git.pack()
    assert git.pack(), "a killed one is done again"
    assert loose(git) == set()
    assert git.check_objects() == []


def test_many_tags_are_put_into_one_file(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "_LOOSE_TAGS", 4)
    for number in range(3):
        git.tag(f"round-{number:04d}", f"Round {number}")
    assert not git.pack_tags()
    git.tag("round-0003", "Round 3")
    before = git.tag_objects("refs/tags")
    assert len(before) == 4
    synced: list[str] = []
    monkeypatch.setattr(Git, "_sync_inside", lambda _, names: synced.extend(names))
    assert git.pack_tags() and synced == ["packed-refs"]
    monkeypatch.undo()
    assert os.listdir(git.root / ".git/refs/tags") == []
    assert git.tag_objects("refs/tags") == before == Git(git.root).tag_objects("refs/tags")
    assert not git.pack_tags()
    git.tag("round-0000", "Round 0")
    git.tag("round-0004", "Round 4")
    assert sorted(git.tags()) == [f"round-{number:04d}" for number in range(5)]


def test_a_pack_that_fails_does_not_undo_a_published_round(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Git) -> bool:
        raise RepositoryError("git repack failed")

    monkeypatch.setattr(Git, "pack", fail)
    monkeypatch.setattr(publishing.publish, "tag", lambda *_: None)
    outcome = Outcome()
    context: Any = SimpleNamespace(git=git, layout=Layout(git.root), outcome=outcome)
    publishing.tag(context, Facts(items=1, incoming=0, planned=1, untagged=0))
    assert outcome.published == [0]
    assert "could not be packed" in outcome.warnings[0]


def test_nothing_changed_is_no_new_commit(git: Git) -> None:
    head = git.head()
    change(git, "theirs", "the user's\n")
    raw(git.root, "add", "theirs")
    assert git.commit("Again", [git.root / "mine"]) == head
    assert raw(git.root, "rev-list", "--count", "HEAD") == "1"


def test_nothing_that_exists_is_an_error(git: Git) -> None:
    with pytest.raises(RepositoryError, match="none of the paths exists"):
        git.commit("Nothing", [git.root / "never"])


def test_a_detached_head_is_refused_before_anything_is_staged(git: Git) -> None:
    raw(git.root, "checkout", "--quiet", "--detach")
    change(git)
    with pytest.raises(UnexpectedChange, match="HEAD is detached: `git switch main`"):
        git.commit("Lost", [git.root / "mine"])
    assert raw(git.root, "diff", "--cached", "--name-only") == ""
    assert git.branch() is None


def test_what_changed_is_told_by_name(git: Git) -> None:
    change(git)
    change(git, "rounds/a b.json")
    assert git.changed([git.root / "mine", git.root / "rounds", git.root / "theirs"]) == ["mine", "rounds/a b.json"]
    assert git.changed([git.root / "theirs"]) == []


def test_reading_does_not_touch_the_tree(git: Git) -> None:
    change(git)
    assert git.show("HEAD", "mine") == "1\n"
    assert git.show("HEAD", "never") is None
    assert git.commit_time() > 1_700_000_000
    assert (git.root / "mine").read_text(encoding="utf-8") == "2\n"


def test_a_tag_is_made_once_and_never_moved(git: Git) -> None:
    first = git.head()
    git.tag("round-0001", "One")
    git.tag("round-0001", "One, once more")
    assert git.tags() == {"round-0001": first}
    assert raw(git.root, "cat-file", "-t", "round-0001") == "tag"
    second = git.commit("Next", [change(git)])
    with pytest.raises(UnexpectedChange, match=f"round-0001 points to {str(first)[:12]}, not to .*{second[:12]}"):
        git.tag("round-0001", "Another")
    git.tag("round-0002", "Two", str(first))
    assert git.tags() == {"round-0001": first, "round-0002": first}


def test_the_users_hooks_and_signature_are_not_run(git: Git, tmp_path: Path) -> None:
    for hook in ("pre-commit", "commit-msg", "pre-push", "post-commit", "reference-transaction"):
        path = git.root / ".git/hooks" / hook
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ntouch {tmp_path}/hook-ran\nexit 1\n", encoding="utf-8")
        path.chmod(0o755)
    for key in ("commit.gpgsign", "tag.gpgsign", "tag.forceSignAnnotated"):
        raw(git.root, "config", key, "true")
    raw(git.root, "config", "gpg.program", "/bin/false")
    raw(git.root, "config", "core.fsmonitor", f"touch {tmp_path}/hook-ran")
    git.commit("Quietly", [change(git)])
    git.tag("round-0001", "Quietly")
    assert not (tmp_path / "hook-ran").exists()
    assert len(git.tags()) == 1


def test_without_an_identity_commits_are_als(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git.has_identity()
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL", "EMAIL"):
        monkeypatch.delenv(name, raising=False)
    assert not git.has_identity()
    git.commit("By nobody", [change(git)])
    git.tag("round-0001", "By nobody")
    assert raw(git.root, "log", "-1", "--format=%an %ae") == "al al@localhost"
    raw(git.root, "config", "user.name", "Ann")
    raw(git.root, "config", "user.email", "ann@example.org")
    git.commit("By Ann", [change(git, text="3\n")])
    assert raw(git.root, "log", "-1", "--format=%an %ae") == "Ann ann@example.org"


def test_a_lock_that_a_killed_git_left_is_removed(git: Git) -> None:
    (git.root / ".git/index.lock").touch()
    git.commit("After a kill", [change(git)])
    assert not (git.root / ".git/index.lock").exists()
    assert raw(git.root, "status", "--porcelain") == ""


def test_a_lock_of_a_living_git_is_left_alone(git: Git) -> None:
    lock = git.root / ".git/index.lock"
    lock.touch()
    living = subprocess.Popen(["git", "cat-file", "--batch"], cwd=git.root, stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 10
        while psutil.Process(living.pid).name() != "git" and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RepositoryError, match=rf"git \(process {living.pid}\) is running in .*try again"):
            git.commit("Too soon", [change(git)])
        assert lock.exists()
    finally:
        living.communicate(b"")


def test_a_push_is_all_or_nothing(git: Git, tmp_path: Path) -> None:
    bare = tmp_path / "bare.git"
    raw(git.root, "init", "--quiet", "--bare", "--initial-branch=main", str(bare))
    assert git.remote() is None
    raw(git.root, "remote", "add", "origin", str(bare))
    assert git.remote() == "origin"
    git.tag("round-0001", "One")
    git.push("origin", ["refs/heads/main", "refs/tags/round-0001"])
    assert raw(bare, "rev-parse", "main", "round-0001^{commit}").split() == [git.head()] * 2
    raw(bare, "tag", "-f", "-a", "-m", "foreign", "round-0002", "main")
    git.commit("Next", [change(git)])
    git.tag("round-0002", "Two")
    before = raw(bare, "rev-parse", "main")
    with pytest.raises(RepositoryError, match="push failed"):
        git.push("origin", ["refs/heads/main", "refs/tags/round-0002"])
    assert raw(bare, "rev-parse", "main") == before, "the branch has not moved without its tag"


def test_what_the_remote_has_and_this_clone_lacks_is_counted(git: Git, tmp_path: Path) -> None:
    assert git.lacks() == 0, "no remote"
    bare = tmp_path / "bare.git"
    raw(git.root, "init", "--quiet", "--bare", "--initial-branch=main", str(bare))
    raw(git.root, "remote", "add", "origin", str(bare))
    assert git.lacks() == 0, "no branch there"
    git.push("origin", ["refs/heads/main"])
    raw(tmp_path, "clone", "--quiet", str(bare), "other")
    other = Git(tmp_path / "other")
    for text in ("2\n", "3\n"):
        git.commit("Next", [change(git, text=text)])
    assert git.lacks() == 0, "it is ahead itself"
    git.tag("round-0001", "One")
    git.push("origin", ["refs/heads/main", "refs/tags/round-0001"])
    head = other.head()
    assert other.lacks() == 2
    assert other.head() == head and other.tags() == {}, "it only looked"
    raw(other.root, "remote", "set-url", "origin", str(tmp_path / "nowhere.git"))
    with pytest.raises(RepositoryError, match=r"git ls-remote failed \(128\).*nowhere"):
        other.lacks()


def test_the_branchs_own_remote_comes_first(git: Git, tmp_path: Path) -> None:
    raw(git.root, "remote", "add", "origin", str(tmp_path / "a.git"))
    raw(git.root, "remote", "add", "team", str(tmp_path / "b.git"))
    raw(git.root, "config", "branch.main.remote", "team")
    assert git.remote() == "team"
    raw(git.root, "config", "branch.main.remote", "gone")
    assert git.remote() == "origin"


def test_a_tag_named_as_the_branch_does_not_hide_it(git: Git, tmp_path: Path) -> None:
    raw(tmp_path, "init", "--quiet", "--bare", "bare.git")
    for name in ("origin", "team"):
        raw(git.root, "remote", "add", name, str(tmp_path / "bare.git"))
    raw(git.root, "config", "branch.main.remote", "team")
    raw(git.root, "tag", "main", "HEAD")
    assert raw(git.root, "symbolic-ref", "--short", "HEAD") == "heads/main", "git's own short name"
    assert (git.branch(), git.remote()) == ("main", "team")
    made = git.commit("Next", [change(git)])
    git.push("team", [f"refs/heads/{git.branch()}"])
    assert raw(tmp_path / "bare.git", "rev-parse", "refs/heads/main") == made


def test_a_commit_does_not_make_it_ask_for_settings_again(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    raw(git.root, "remote", "add", "origin", "nowhere.git")
    time.sleep(0.1)  # what changed just now may change again
    assert git.remote() == "origin"
    git.commit("Next", [change(git)])
    asked: list[tuple[str, ...]] = []
    run = GitRunner.run
    monkeypatch.setattr(
        GitRunner, "run", lambda self, *words, **how: (asked.append(words), run(self, *words, **how))[1]
    )
    assert git.remote() == "origin" and asked == []
    raw(git.root, "remote", "rename", "origin", "other")
    assert git.remote() is None
    raw(git.root, "switch", "--quiet", "--create", "trial")
    raw(git.root, "config", "branch.trial.remote", "other")
    assert (git.branch(), git.remote()) == ("trial", "other")


def test_a_remote_that_is_not_there_is_said_so(git: Git, tmp_path: Path) -> None:
    raw(git.root, "remote", "add", "origin", str(tmp_path / "nowhere.git"))
    with pytest.raises(RepositoryError, match=r"git push failed \(128\).*nowhere"):
        git.push("origin", ["refs/heads/main"])


def test_it_works_in_its_own_repository_when_called_from_a_hook_of_another(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    raw(other, "init", "--quiet")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    git.commit("Mine", [change(git)])
    monkeypatch.undo()
    assert raw(git.root, "rev-list", "--count", "HEAD") == "2"
    assert not (other / ".git/index").exists()


def test_no_git_and_a_git_that_hangs_are_said_so(git: Git, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "bin/git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    slow.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{slow.parent}{os.pathsep}{os.environ['PATH']}")
        with pytest.raises(RepositoryError, match="git status did not end within 0 s"):
            git.run("status", timeout=0.2)
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(RepositoryError, match="git is not installed"):
            git.run("status")


# DVC --------------------------------------------------------------------------------------------------------------

PIPELINE = """\
stages:
  good:
    cmd: cp source out
    deps: [source]
    outs: [out]
  bad:
    cmd: "echo the reason is here >&2; exit 3"
  slow:
    cmd: "sleep 300"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DVC repository and its remote; tests work on copies."""
    folder = tmp_path_factory.mktemp("dvc")
    root = folder / "repository"
    root.mkdir()
    git = Git(root)
    git.init()
    (root / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (root / "source").write_text("the source\n", encoding="utf-8")
    with dvc_at(root) as dvc:
        dvc.init("../remote")
        dvc.add(root / "source")
        dvc.repro("good")
        dvc.push()
    (root / ".gitignore").write_text("/source\n/out\n/.al\n", encoding="utf-8")
    git.commit("Begin", [root / name for name in (".dvc", "dvc.yaml", "dvc.lock", "source.dvc", ".gitignore")])
    return folder


@pytest.fixture
def dvc(made: Path, tmp_path: Path) -> Iterator[Dvc]:
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    with dvc_at(tmp_path / "copy/repository") as dvc:
        yield dvc


def running(dvc: Dvc) -> int:
    assert dvc.state is not None
    pid: int = read_json(dvc.state)["pid"]
    return pid


def forget(dvc: Dvc) -> None:
    """Lose the process as a killed tick does: nobody ends it, and what was written down stays."""
    dvc._process = None
    assert dvc._output is not None
    dvc._output.close()
    dvc._output = None


def wait_for_sleep(group: int) -> psutil.Process:
    """The `sleep` that the slow stage runs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in psutil.Process(group).children(recursive=True):
            if process.name() == "sleep":
                return process
        time.sleep(0.05)
    pytest.fail("the stage did not start")


def gone(pid: int) -> bool:
    try:
        psutil.Process(pid).wait(10)
    except psutil.NoSuchProcess:
        return True
    return not psutil.pid_exists(pid)


@pytest.mark.slow
def test_one_process_serves_many_commands_and_failures(dvc: Dvc) -> None:
    assert dvc.changed("good") == {}
    pid = running(dvc)
    with pytest.raises(StageFailed, match=r"stage bad failed; .*dvc\.log.*\n(.*\n)*the reason is here"):
        dvc.repro("bad")
    with pytest.raises(RepositoryError, match="dvc add failed.*never"):
        dvc.add(dvc.root / "never")
    (dvc.root / "source").write_text("another source\n", encoding="utf-8")
    assert dvc.changed("good") != {}
    dvc.repro("good")
    assert (dvc.root / "out").read_text(encoding="utf-8") == "another source\n"
    assert running(dvc) == pid
    dvc.close()
    assert not dvc.state.exists()
    assert gone(pid)
    assert dvc.changed("good") == {}, "closed is not for ever"


@pytest.mark.slow
def test_what_the_remote_lacks_is_named(dvc: Dvc) -> None:
    """By the first of its names: `source` has the same content."""
    dvc.verify_remote()
    assert dvc.defects_in_remote() == []
    assert dvc.check_writable() == str(dvc.root.parent / "remote")
    assert not [path for path in (dvc.root.parent / "remote").rglob("al-probe-*")]
    for path in (dvc.root.parent / "remote/files").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(RemoteIncomplete, match="lacks objects after a push: out "):
        dvc.verify_remote()
    dvc.push()
    dvc.verify_remote()


@pytest.mark.slow
def test_a_remote_that_cannot_be_written_is_said_so(dvc: Dvc, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    dvc.init(str(tmp_path / "file/remote"))
    with pytest.raises(RepositoryError, match="remote cannot be written to: .*dvc remote list"):
        dvc.check_writable()
    with pytest.raises(RepositoryError, match="dvc push failed"):
        dvc.push()


@pytest.mark.slow
def test_data_comes_back_and_edits_are_not_overwritten(dvc: Dvc, tmp_path: Path) -> None:
    (dvc.root / "source").unlink()
    (dvc.root / "out").write_text("edited by hand\n", encoding="utf-8")
    dvc.checkout("source.dvc")
    assert (dvc.root / "source").read_text(encoding="utf-8") == "the source\n"
    with pytest.raises(RepositoryError, match="dvc checkout failed"):
        dvc.checkout("out")
    assert (dvc.root / "out").read_text(encoding="utf-8") == "edited by hand\n"
    dvc.get("out", "HEAD", tmp_path / "got")
    assert (tmp_path / "got").read_text(encoding="utf-8") == "the source\n"
    shutil.rmtree(dvc.root / ".dvc/cache")
    (dvc.root / "source").unlink()
    dvc.pull("source.dvc")
    assert (dvc.root / "source").read_text(encoding="utf-8") == "the source\n"


@pytest.mark.slow
def test_a_process_killed_in_the_middle_is_said_so_and_the_next_command_works(dvc: Dvc) -> None:
    assert dvc.changed("good") == {}
    pid = running(dvc)

    def kill() -> None:
        wait_for_sleep(pid)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RepositoryError, match="the DVC process ended unexpectedly at `dvc repro --single-item slow`"):
        dvc.repro("slow")
    killer.join()
    assert not [p for p in psutil.process_iter(["name", "cwd"]) if p.info["cwd"] == str(dvc.root)], "its stage is ended"
    assert dvc.changed("good") == {}
    assert running(dvc) != pid


@pytest.mark.slow
def test_a_command_that_takes_too_long_is_ended_with_its_stage(dvc: Dvc, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dvc.changed("good") == {}
    pid = running(dvc)
    monkeypatch.setattr(dvc_module, "_STAGE_TIMEOUT", 4.0)
    with pytest.raises(RepositoryError, match="did not end within 4 s and was stopped"):
        dvc.repro("slow")
    assert gone(pid)
    assert not [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(dvc.root)]
    assert dvc.changed("good") == {}


@pytest.mark.slow
def test_what_a_killed_tick_left_is_ended_first(dvc: Dvc) -> None:
    process = dvc._start()
    assert process.stdin is not None
    process.stdin.write(json.dumps(["repro", "--single-item", "slow"]) + "\n")
    process.stdin.flush()
    stage = wait_for_sleep(process.pid)
    forget(dvc)
    with dvc_at(dvc.root) as next_tick:
        next_tick.end_previous()
        process.wait(10)
        assert gone(stage.pid)
        assert not dvc.state.exists()
        next_tick.end_previous()
        assert next_tick.changed("good") == {}
    process.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("left", ["", '{"read": {"/data'])
def test_a_list_of_locks_that_a_kill_tore_is_removed(dvc: Dvc, left: str) -> None:
    """DVC itself stops at it for ever."""
    path = dvc.root / ".dvc/tmp/rwlock"
    path.write_text(left)
    with pytest.raises(RepositoryError, match="RWLock"):
        dvc.changed()
    dvc.close()
    dvc.end_previous()
    assert dvc.changed() is not None
    dvc.close()
    path.write_text('{"read": {}, "write": {}}')
    dvc.end_previous()
    assert path.exists(), "one that is whole stays: it may be that of somebody's own DVC"


@pytest.mark.slow
@pytest.mark.parametrize("holder", ["not reaped", "another by its number"])
def test_a_lock_whose_holder_ended_does_not_stop_the_next_command(dvc: Dvc, holder: str) -> None:
    """DVC asks only whether the number exists, and would wait for ever."""
    (dvc.root / "data").write_text("x")
    path = dvc.root / ".dvc/tmp/rwlock"
    with subprocess.Popen(["sleep", "300"]) as process:
        held = {"pid": process.pid, "cmd": "al"}
        write_json(path, {"read": {}, "write": {str(dvc.root / "data"): held}})
        with pytest.raises(RepositoryError, match="is busy"):
            dvc.add(dvc.root / "data")
        dvc.end_previous()
        assert path.exists(), "one that is held stays"
        if holder == "not reaped":
            process.kill()
            while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        else:
            os.utime(path, times=(time.time() - 3600, time.time() - 3600))
        dvc.close()
        dvc.end_previous()
        dvc.add(dvc.root / "data")
        process.kill()


@pytest.mark.slow
def test_a_reader_leaves_what_a_tick_wrote_down(dvc: Dvc) -> None:
    assert dvc.changed("good") == {}
    pid = running(dvc)
    with replace(dvc_at(dvc.root), state=None) as reader:
        assert reader.changed("good") == {}
        reader.end_previous()
    assert running(dvc) == pid
    assert dvc.changed("good") == {}


@pytest.mark.slow
def test_a_stage_whose_dvc_is_gone_is_found_by_its_group(dvc: Dvc) -> None:
    leader = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -c 'import time; time.sleep(300)' al_pipeline.stages.train & wait"],
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not (orphans := psutil.Process(leader.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    write_json(dvc.state, {"pid": leader.pid, "started": psutil.Process(leader.pid).create_time()})
    leader.kill()
    leader.wait()
    assert psutil.pid_exists(orphans[0].pid)
    dvc.end_previous()
    assert gone(orphans[0].pid)


def test_another_process_that_got_the_same_number_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "300"], start_new_session=True)
    try:
        dvc = dvc_at(tmp_path)
        write_json(dvc.state, {"pid": stranger.pid, "started": psutil.Process(stranger.pid).create_time() - 3600})
        dvc.end_previous()
        assert stranger.poll() is None
        assert not dvc.state.exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_git_names_nothing_of_the_user_that_resets() -> None:
    folders = [Path(str(module.__file__)).parent for module in (git_package, dvc_module)]
    modules = [module for folder in folders for module in folder.glob("*.py")]
    assert {"commits.py", "session.py", "process.py"} <= {module.name for module in modules}
    for module in modules:
        text = module.read_text(encoding="utf-8")
        for word in ('"reset"', '"clean"', '"stash"', '"gc"', '"--hard"', '"--no-verify"', '"-A"'):
            assert word not in text, f"{module} must never run {word}"


CHANGES = (
    ["tag", "--force", "one", "HEAD"],
    ["tag", "--force", "--annotate", "--message=x", "two", "HEAD"],
    ["tag", "--delete", "one"],
    ["commit", "--quiet", "--allow-empty", "--message=more"],
    ["switch", "--quiet", "--force-create", "other"],
    ["switch", "--quiet", "main"],
    ["switch", "--quiet", "--detach"],
    ["pack-refs", "--all"],
    ["remote", "add", "origin", "elsewhere"],
    ["remote", "remove", "origin"],
    ["config", "branch.main.remote", "origin"],
    ["update-ref", "refs/heads/main", "HEAD~0"],
    ["reset", "--quiet", "--soft", "HEAD~1"],
)


def answers(git: Git) -> list[object]:
    """What a tick asks of refs and settings, and of the files of HEAD."""
    found: list[object] = [git.head(), git.branch(), git.tags(), git.remote(), git.show("HEAD", "mine")]
    return [*found, git.files("HEAD", "."), git.commit_time(), git.brought("mine")]


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.0, 0.06], ids=["at once", "after a while"])
def test_answers_that_are_kept_are_those_of_the_repository_as_it_is(git: Git, pause: float) -> None:
    draw = random.Random(7)
    for number in range(25):
        change(git, text=f"{number}\n")
        raw(git.root, "commit", "--quiet", "--all", "--allow-empty", "--message=one more")
        subprocess.run(["git", *draw.choice(CHANGES)], cwd=git.root, capture_output=True, timeout=60)
        if number % 7 == 0:  # as nobody should: in place
            name = git.root / ".git/refs/heads/main"
            if name.exists():
                name.write_text(raw(git.root, "rev-parse", "HEAD~1") + "\n", encoding="utf-8")
        time.sleep(pause)
        assert answers(git) == answers(Git(git.root))
        assert answers(git) == answers(Git(git.root))


def test_git_is_asked_once_while_nothing_changes(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(0.1)
    run, asked = Git.run, []
    monkeypatch.setattr(Git, "run", lambda self, *words, **more: asked.append(words) or run(self, *words, **more))
    known = answers(git)
    count = len(asked)
    assert answers(git) == known
    assert len(asked) == count
    raw(git.root, "tag", "new")
    assert "new" in git.tags()


@pytest.mark.parametrize(
    "bad", [b"\xff\xfe", b"a: 2026-13-45\n", b"[" * 50_000, b"stages: {a: {outs: [{path: 2026-13-45}]}}\n"]
)
def test_a_record_that_is_no_yaml_is_named_in_the_work_tree_and_in_a_commit(git: Git, bad: bytes) -> None:
    path = git.root / "dvc.lock"
    path.write_bytes(bad)
    git.commit("Damaged", [path])
    for revision in (None, "HEAD"):
        with pytest.raises(UnexpectedChange, match=r"dvc\.lock is not a valid DVC file"):
            dvc_at(git.root).recorded(revision=revision)
