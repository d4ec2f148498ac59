"""`al doctor`: each finding provoked once, on a workspace with a published round; nothing is changed by looking."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import Played, change_params, settle

from al_pipeline.cli import app as cli
from al_pipeline.errors import LabelStudioDown, WrongProject
from al_pipeline.files import read_json, sha256_tree, write_json
from al_pipeline.integrations.dvc.settings import change_config
from al_pipeline.integrations.git import Git
from al_pipeline.operations.checks import machine, services
from al_pipeline.operations.checks.finding import Finding
from al_pipeline.operations.doctor import examine
from al_pipeline.servers.process import free_port
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.workspace import LAYOUT_VERSION, Workspace, open_workspace

pytestmark = pytest.mark.slow

About = namedtuple("About", "version user clock_ahead")


class Studio:
    """A Label Studio that is well, as the doctor sees it."""

    url = "http://localhost:8080"

    def __init__(self, **changes: object) -> None:
        self.changes = {"version": "1.23.2", "user": "ann@example.org", "clock_ahead": 0.5, **changes}

    def about(self) -> About:
        return About(**self.changes)  # type: ignore[arg-type]

    def check(self, *_: object) -> None:
        return None

    def close(self) -> None:
        return None


@pytest.fixture(scope="session")
def published(once: Played) -> Path:
    """A workspace with one published round, and its remote; tests work on copies."""
    return once[0]


@pytest.fixture
def workspace(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    root = tmp_path / "copy/workspace"
    shutil.copytree(published, tmp_path / "copy", symlinks=True)
    config = root / ".dvc/config"
    text = config.read_text(encoding="utf-8").replace(str(published / "remote"), str(tmp_path / "copy/remote"))
    assert str(tmp_path) in text
    (root / ".dvc/config.local").write_text(text, encoding="utf-8")
    monkeypatch.setattr(services, "connect", lambda _: Studio())
    return open_workspace(settle(root))


def ill(workspace: Workspace) -> dict[str, Finding]:
    """The findings that are not well, by check."""
    findings = examine(open_workspace(workspace.layout.root))
    assert all(finding.message for finding in findings)
    return {finding.check: finding for finding in findings if finding.level != "ok"}


def test_a_workspace_in_order_is_well_and_left_as_it_was(workspace: Workspace) -> None:
    def everything() -> tuple[str, ...]:
        root = workspace.layout.root
        names = ("data", "models", "rounds", "params.yaml", "dvc.lock", ".git/refs", ".dvc/config")
        return tuple(sha256_tree(root / name) for name in names)

    before = everything()
    findings = examine(workspace)
    assert [finding for finding in findings if finding.level != "ok"] == []
    checks = [finding.check for finding in findings]
    assert checks == [
        "versions", "parameters", "git", "identity", "secrets", "data", "remote", "encoder", "engine", "Label Studio",
        "clock", "project", "schedule", "notifications", "disk", "lock",
    ]  # fmt: skip
    assert everything() == before
    assert Git(workspace.layout.root).run("status", "--porcelain").stdout == ""


def bad_parameter(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    change_params(workspace, {"quorum: 0.9": "quorum: 9"})


def detached(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    Git(workspace.layout.root).run("checkout", "--quiet", "--detach")


def no_tag(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    Git(workspace.layout.root).run("tag", "--delete", "round-0000")


def with_origin(workspace: Workspace) -> tuple[Git, Path]:
    """A git remote that has all there is."""
    git, origin = Git(workspace.layout.root), workspace.layout.root.parent / "origin.git"
    subprocess.run(["git", "init", "-q", "--bare", "--initial-branch=main", str(origin)], check=True)
    git.run("remote", "add", "origin", str(origin))
    git.run("push", "--quiet", "--tags", "origin", "main")
    return git, origin


def by_hand(place: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=place, check=True, capture_output=True)


def another_tag_there(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    _, origin = with_origin(workspace)
    by_hand(origin, "tag", "-f", "-a", "-m", "by hand", "round-0000", "round-0000^{commit}")


def tag_of_another_commit_there(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    _, origin = with_origin(workspace)
    by_hand(origin, "tag", "-f", "round-0000", "main~1")


def no_tag_there(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    _, origin = with_origin(workspace)
    by_hand(origin, "tag", "-d", "round-0000")


def behind_there(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    _, origin = with_origin(workspace)
    by_hand(origin, "update-ref", "refs/heads/main", "main~1")


def no_branch_there(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    _, origin = with_origin(workspace)
    by_hand(origin, "update-ref", "-d", "refs/heads/main")


def newer_there(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    with_origin(workspace)
    root = workspace.layout.root
    by_hand(root, "commit", "-q", "--allow-empty", "-m", "newer")
    by_hand(root, "push", "-q", "origin", "main")
    by_hand(root, "reset", "-q", "--soft", "HEAD~1")


def never_seen_there(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    _, origin = with_origin(workspace)
    by_hand(origin, "update-ref", "refs/heads/main", new_commit(origin, "main"))


def apart(workspace: Workspace, patch: pytest.MonkeyPatch) -> None:
    newer_there(workspace, patch)
    by_hand(workspace.layout.root, "commit", "-q", "--allow-empty", "-m", "another")


def new_commit(repository: Path, parent: str) -> str:
    """A commit on `parent` that no branch names."""
    command = ["git", "commit-tree", "-p", parent, "-m", "newer", f"{parent}^{{tree}}"]
    return subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout.strip()


def no_origin(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    _, origin = with_origin(workspace)
    shutil.rmtree(origin)


def tag_of_another_commit(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    by_hand(workspace.layout.root, "tag", "-f", "-a", "-m", "x", "round-0000", "HEAD~1")


def ignored(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    with workspace.layout.git_ignore.open("a") as file:
        file.write("*.dvc\n")


def loose(workspace: Workspace, name: str) -> Path:
    """The file of the git object that HEAD has at `name`."""
    digest = Git(workspace.layout.root).run("rev-parse", f"HEAD:{name}").stdout.strip()
    path = workspace.layout.root / ".git/objects" / digest[:2] / digest[2:]
    path.chmod(0o600)
    return path


def emptied_blob(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    loose(workspace, "rounds/metrics.csv").write_bytes(b"")


def emptied_old_blob(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    """Of an older commit: no round needs it today, and a rollback would."""
    git = Git(workspace.layout.root)
    first = git.run("rev-list", "--max-parents=0", "HEAD").stdout.strip()
    digest = git.run("rev-parse", f"{first}:rounds/project.json").stdout.strip()
    assert digest != git.run("rev-parse", "HEAD:rounds/project.json").stdout.strip()
    path = workspace.layout.root / ".git/objects" / digest[:2] / digest[2:]
    path.chmod(0o600)
    path.write_bytes(b"")


def lost_tree(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    loose(workspace, "rounds/0000").unlink()


def cut_pack(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    git = Git(workspace.layout.root)
    git.run("repack", "-a", "-d", "-q")
    (pack,) = (git.root / ".git/objects/pack").glob("*.pack")
    pack.chmod(0o600)
    pack.write_bytes(pack.read_bytes()[: pack.stat().st_size // 2])


def copied_folder(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    found = read_json(workspace.layout.clone)
    first = workspace.layout.root.parent / "first"
    write_json(first / ".al/clone.json", found)
    place = {**found["place"], "path": str(first), "inodes": [1, 2]}
    write_json(workspace.layout.clone, {**found, "place": place})


def no_identity(_: Workspace, patch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL", "EMAIL"):
        patch.delenv(name, raising=False)


def edited_ledger(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    part = next(workspace.layout.events.glob("part-*.jsonl"))
    text = part.read_bytes().replace(b'"spam"', b'"ham"', 1)
    part.unlink()
    part.write_bytes(text)


def edited_record(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    write_json(workspace.layout.record(0), {**read_json(workspace.layout.record(0)), "round": 7})


def lost_object(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    for path in (workspace.layout.root.parent / "remote/files").rglob("*"):
        if path.is_file():
            path.unlink()


def unwritable_remote(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    remote = workspace.layout.root.parent / "remote"
    shutil.rmtree(remote)
    remote.write_text("a file where a folder should be", encoding="utf-8")


def no_plugin(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    assert find_spec("dvc_gs") is None
    change_config(workspace.layout.root / ".dvc/config.local", {'remote "store"': {"url": "gs://bucket/al"}}, 0o600)


def another_engine(workspace: Workspace, patch: pytest.MonkeyPatch) -> None:
    other = {**read_json(workspace.layout.engine), "threads": 64}
    patch.setattr("al_pipeline.workspace.fingerprint.current_engine", lambda *_: other)
    patch.setattr(machine, "current_engine", lambda *_: other)


def no_label_studio(_: Workspace, patch: pytest.MonkeyPatch) -> None:
    patch.undo()


def dead_label_studio(_: Workspace, patch: pytest.MonkeyPatch) -> None:
    def down(_: Workspace) -> Studio:
        raise LabelStudioDown("Label Studio at http://localhost:8080 gives no answer; is it running?")

    patch.setattr(services, "connect", down)


def old_label_studio(_: Workspace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(services, "connect", lambda _: Studio(version="1.13.1"))


def wrong_clock(_: Workspace, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(services, "connect", lambda _: Studio(clock_ahead=-3600.0))


def foreign_project(_: Workspace, patch: pytest.MonkeyPatch) -> None:
    def check(*_: object) -> None:
        raise WrongProject("project 1 belongs to another clone; `al adopt` takes it over")

    studio = Studio()
    patch.setattr(studio, "check", check)
    patch.setattr(services, "connect", lambda _: studio)


def low_disk(_: Workspace, patch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    patch.setattr(machine.shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**6, 10**6))


def wrong_version(_: Workspace, patch: pytest.MonkeyPatch) -> None:
    whole = machine.version
    patch.setattr(machine, "version", lambda name: "0.1" if name == "dvc" else whole(name))


def another_encoder(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    change_params(workspace, {"kind: tfidf": "kind: encoder"})
    write_json(workspace.layout.encoder / "source.json", {"source": "another/encoder"})


def no_cluster(workspace: Workspace, patch: pytest.MonkeyPatch) -> None:
    change_params(workspace, {"runner: local": "runner: dask"})
    Git(workspace.layout.root).commit("A cluster", [workspace.layout.params])
    patch.setenv("DASK_SCHEDULER_ADDRESS", f"tcp://127.0.0.1:{free_port()}")


def unnamed_cluster(workspace: Workspace, patch: pytest.MonkeyPatch) -> None:
    no_cluster(workspace, patch)
    patch.delenv("DASK_SCHEDULER_ADDRESS")


def dead_prefect_elsewhere(_: Workspace, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")


def no_schema_match(workspace: Workspace, _: pytest.MonkeyPatch) -> None:
    change_params(workspace, {'    - "ham"\n': '    - "ham"\n    - yes\n'})


PROVOKED: list[tuple[Callable[[Workspace, pytest.MonkeyPatch], None], str, str, str]] = [
    (bad_parameter, "parameters", "error", "round.quorum: got 9"),
    (no_schema_match, "parameters", "error", 'put it in "quotes"'),
    (detached, "git", "error", "HEAD is detached"),
    (no_tag, "git", "warning", "tags are missing: round-0000"),
    (another_tag_there, "git", "error", "round-0000 differs from the one on origin (of the same commit)"),
    (tag_of_another_commit_there, "git", "error", "round-0000 differs from the one on origin (of the commit "),
    (no_tag_there, "git", "warning", "origin lacks round-0000"),
    (behind_there, "git", "warning", "origin lacks 1 commit of main"),
    (no_branch_there, "git", "warning", "origin has no branch main"),
    (newer_there, "git", "warning", "origin has 1 commit of main that is not in this branch"),
    (never_seen_there, "git", "warning", "origin has commits of main that are not here"),
    (apart, "git", "warning", "have diverged: 1 commit here, 1 commit there"),
    (no_origin, "git", "warning", "the git remote origin cannot be read"),
    (tag_of_another_commit, "git", "error", "published that round"),
    (ignored, "git", "error", "git ignores data/pool.dvc"),
    (emptied_blob, "git", "error", "rounds/metrics.csv"),
    (emptied_old_blob, "git", "error", "git has lost objects"),
    (copied_folder, "identity", "error", "is a copy of the workspace at"),
    (no_identity, "git", "warning", "git has no user name"),
    (edited_ledger, "data", "error", "data/events"),
    (edited_record, "data", "error", "rounds/0000/round.json"),
    (lost_object, "remote", "error", "has nothing of what the last commit names"),
    (unwritable_remote, "remote", "error", "cannot be written to"),
    (no_plugin, "remote", "error", "pip install 'al-pipeline[gs]'"),
    (another_engine, "engine", "warning", "threads: was"),
    (no_cluster, "cluster", "error", "cannot be reached: Connection refused"),
    (unnamed_cluster, "cluster", "error", "DASK_SCHEDULER_ADDRESS does not say where"),
    (dead_prefect_elsewhere, "schedule", "warning", "it is not known whether ticks run"),
    (no_label_studio, "Label Studio", "error", "al labelstudio start"),
    (dead_label_studio, "Label Studio", "error", "is it running?"),
    (old_label_studio, "Label Studio", "warning", "1.13.1 is older"),
    (wrong_clock, "clock", "warning", "differs by -3600 s"),
    (foreign_project, "Label Studio", "error", "al adopt"),
    (low_disk, "disk", "warning", "1.0 MB free"),
    (wrong_version, "versions", "error", "dvc 0.1 is installed"),
    (another_encoder, "encoder", "warning", "has another/encoder"),
]


@pytest.mark.parametrize(("provoke", "check", "level", "says"), PROVOKED, ids=[case[0].__name__ for case in PROVOKED])
def test_each_finding_is_provoked_once(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    provoke: Callable[[Workspace, pytest.MonkeyPatch], None],
    check: str,
    level: str,
    says: str,
) -> None:
    provoke(workspace, monkeypatch)
    found = ill(workspace)
    assert check in found
    assert found[check].level == level
    assert says in found[check].message
    repaired = f"{found[check].message} {found[check].fix}"
    assert found[check].fix or "`" in repaired or ":" in repaired, "it says what to do"
    others = {name for name, finding in found.items() if finding.level == "error"} - {check}
    assert not others or provoke in (no_schema_match, another_encoder), f"only this is ill, not {others}"


@pytest.mark.parametrize("provoke", [lost_tree, cut_pack])
def test_objects_that_all_depends_on_are_named(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, provoke: Callable[[Workspace, pytest.MonkeyPatch], None]
) -> None:
    """No check is left out for it, none ends in a traceback, and none says that anything is in order for lack of it."""
    provoke(workspace, monkeypatch)
    findings = examine(open_workspace(workspace.layout.root))
    ills = [finding for finding in findings if finding.check == "git" and finding.level == "error"]
    assert ills and ("rounds/0000 (object " if provoke is lost_tree else "pack") in ills[0].message, ills
    assert not [finding for finding in findings if finding.check == "git" and finding.level == "ok"]
    assert {"disk", "lock", "Label Studio"} <= {finding.check for finding in findings}


def test_a_git_remote_that_has_all_is_well(workspace: Workspace) -> None:
    with_origin(workspace)
    (finding,) = (finding for finding in examine(workspace) if finding.check == "git")
    assert finding.level == "ok" and finding.message == "branch main and 1 rounds' tags, as on origin"


def test_who_holds_the_lock_is_said(workspace: Workspace) -> None:
    with locked(workspace.layout.lock, "a long tick"):
        (finding,) = (finding for finding in examine(workspace) if finding.check == "lock")
    assert f"held by a long tick (process {os.getpid()})" in finding.message
    write_json(
        workspace.layout.lock, {"pid": 2**22 + 1, "host": socket.gethostname(), "purpose": "killed", "since": "2026"}
    )
    (finding,) = (finding for finding in examine(workspace) if finding.check == "lock")
    assert finding.message == "free"


@pytest.mark.parametrize(("provoke", "code"), [(None, 0), (low_disk, 0), (detached, 6)])
def test_the_exit_code_says_whether_a_person_is_needed(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    provoke: Callable[[Workspace, pytest.MonkeyPatch], None] | None,
    code: int,
) -> None:
    if provoke:
        provoke(workspace, monkeypatch)
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["al", "-C", str(workspace.layout.root), "doctor", *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code
        said = capsys.readouterr().out
        if more:
            found = json.loads(said)
            assert found["ok"] == (code == 0)
            assert all(finding.keys() == {"check", "level", "message", "fix"} for finding in found["findings"])
        else:
            assert ("✗" in said) == (code == 6) and "✓" in said


def test_a_workspace_without_a_commit_says_to_finish_it(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    shutil.copy(Path(__file__).parents[1] / "params.yaml", tmp_path)
    write_json(tmp_path / "al-workspace.json", {"layout": LAYOUT_VERSION, "workspace_id": "0" * 12})
    findings = {finding.check: finding for finding in examine(open_workspace(tmp_path))}
    assert "run `al init` again" in findings["git"].fix
