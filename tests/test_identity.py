"""A clone is bound to its place: a copied or restored folder does not write where its original writes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import require
from harness import Played, answer_all, copy_workspace, go_on, results, tools_first
from msgspec.structs import replace

from al_pipeline.cli import app as cli
from al_pipeline.errors import (
    BadInput,
    CopiedWorkspace,
    LabelStudioDown,
    ManualActionRequired,
    NothingToDo,
    WrongProject,
)
from al_pipeline.files import read_json, write_json
from al_pipeline.integrations import processes as child
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.projects import find_mark
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import connect
from al_pipeline.operations.facts import open_dvc, read_facts
from al_pipeline.operations.intervene import pause
from al_pipeline.operations.tick import tick
from al_pipeline.operations.upgrade import upgrade
from al_pipeline.workspace import identity
from al_pipeline.workspace.identity import Place, bind, check_identity, compare, here, identify, refuse_copy
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace, open_workspace

# What the evidence says ----------------------------------------------------------------------------------------------

BOUND = Place("machine", "boot", "/home/me/spam", "/me/spam", 7, (11, 12))

REBOOTED = {"boot": "later", "device": 9}
ELSEWHERE = {"machine": "other", "boot": "other", "device": 3}
CONTAINER = {"machine": "", "path": "/workspace"}
MOVED = {"path": "/home/me/ham", "inside": "/me/ham"}
ANEW = {"inodes": (21, 22)}
"""The folder was made anew."""

TABLE: dict[str, tuple[dict[str, Any], dict[str, Any], identity.Original, identity.Verdict]] = {
    # name: (changes of BOUND when it was bound, changes of that since then, what lies at the first path, verdict)
    "nothing": ({}, {}, "gone", "same"),
    "a reboot": ({}, REBOOTED, "gone", "same"),
    "a new machine id": ({}, {"machine": "other"}, "gone", "same"),
    "a machine id that is gone, after a reboot": ({}, {"machine": "", **REBOOTED}, "gone", "same"),
    "its disk in another machine, or NFS": ({}, ELSEWHERE, "gone", "same"),
    "a container, started anew": ({**CONTAINER, "inside": "/srv/spam"}, REBOOTED, "gone", "same"),
    "a container, after the host": ({}, CONTAINER, "gone", "same"),
    "a container, after the host and a reboot": ({}, {**CONTAINER, **REBOOTED}, "gone", "same"),
    "the host, after a container and a reboot": (
        CONTAINER,
        {"machine": "machine", "path": "/home/me/spam", **REBOOTED},
        "gone",
        "same",
    ),
    "its file system mounted elsewhere": ({}, {"path": "/mnt/spam", **REBOOTED}, "gone", "same"),
    "moved": ({}, MOVED, "gone", "same"),
    "moved, then rebooted": ({}, {**MOVED, **REBOOTED}, "gone", "same"),
    "moved in a container without an id": ({"machine": ""}, MOVED, "gone", "same"),
    "moved in a container, then rebooted": ({"machine": ""}, {**MOVED, **REBOOTED}, "gone", "unsure"),
    "moved with its disk": ({}, {**MOVED, **ELSEWHERE}, "gone", "unsure"),
    "moved, and the first place cannot be looked at": ({}, MOVED, "unknown", "unsure"),
    "moved, and a backup restored in its place": ({}, MOVED, "there", "copy"),
    "a snapshot of the file system, mounted elsewhere": ({}, {"path": "/snap/spam", "device": 8}, "there", "copy"),
    "restored in place": ({}, ANEW, "gone", "same"),
    "restored in place on a new disk": ({}, {**ANEW, **REBOOTED}, "gone", "same"),
    "restored in place in a container": ({"machine": ""}, ANEW, "gone", "same"),
    "another volume in a container": ({"machine": ""}, {**ANEW, "device": 8}, "gone", "unsure"),
    "restored in a container, after a reboot": ({"machine": ""}, {**ANEW, **REBOOTED}, "gone", "unsure"),
    "another folder mounted in a container": (
        {**CONTAINER, "inside": "/srv/a"},
        {**ANEW, "inside": "/srv/b"},
        "gone",
        "unsure",
    ),
    "restored on another machine": ({}, {**ANEW, **ELSEWHERE}, "gone", "unsure"),
    "on machines without ids": ({"machine": "", "boot": ""}, {**ANEW, **ELSEWHERE}, "gone", "unsure"),
    "where nothing is known of the machine": ({"machine": "", "boot": ""}, ANEW, "gone", "unsure"),
    "copied": ({}, {**ANEW, **MOVED}, "there", "copy"),
    "moved to another disk, or copied": ({}, {**ANEW, **MOVED, "device": 8}, "gone", "unsure"),
    "copied to another machine": ({}, {**ANEW, **MOVED, **ELSEWHERE}, "gone", "unsure"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_what_is_the_same_and_what_a_copy(name: str) -> None:
    bound, since, original, verdict = TABLE[name]
    then = replace(BOUND, **bound)
    assert compare(then, replace(then, **since), original) == verdict


# On real folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def workspace(template: Any, tmp_path: Path) -> Workspace:
    return copy_workspace(template, tmp_path)


def verdict(root: Path) -> str:
    return identify(Layout(root)).verdict


def copied(root: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", str(root), str(to)], check=True)
    return to


def test_a_new_workspace_is_bound_and_a_copy_is_not_taken_for_it(workspace: Workspace, tmp_path: Path) -> None:
    root = workspace.layout.root
    assert read_json(workspace.layout.clone)["place"]["path"] == str(root.resolve())
    assert verdict(root) == "same"
    for command in (["cp", "-r"], ["cp", "-a"], ["cp", "-rl"]):  # -l: the files are hard links, the folders are not
        place = tmp_path / command[1]
        subprocess.run([*command, str(root), str(place)], check=True)
        found = identify(Layout(place))
        assert found.verdict == "copy" and f"{place} is a copy of the workspace at {root}" in found.problem
        assert "`al adopt`" in found.problem
    link = tmp_path / "link"
    link.symlink_to(root)
    assert verdict(link) == "same"


def test_a_moved_workspace_is_the_same_and_is_bound_anew(workspace: Workspace, tmp_path: Path) -> None:
    moved = workspace.layout.root.rename(tmp_path / "moved")
    assert verdict(moved) == "same"
    check_identity(Layout(moved))
    assert read_json(Layout(moved).clone)["place"]["path"] == str(moved)
    assert verdict(copied(moved, tmp_path / "copied")) == "copy"


def test_a_copy_whose_original_is_gone_asks(workspace: Workspace, tmp_path: Path) -> None:
    """Nobody can tell it from a copy of a workspace that lies on a disk which is not mounted just now."""
    root = copied(workspace.layout.root, tmp_path / "copied")
    shutil.rmtree(workspace.layout.root)
    assert verdict(root) == "unsure"
    with pytest.raises(CopiedWorkspace, match="may be a copy of the workspace that was at .*`al adopt`"):
        check_identity(Layout(root))


def test_a_backup_restored_in_place_is_the_same(workspace: Workspace, tmp_path: Path) -> None:
    root = workspace.layout.root
    backup = copied(root, tmp_path / "backup")
    kept = root.rename(tmp_path / "kept")
    copied(backup, root)
    assert verdict(root) == "same"
    check_identity(Layout(root))
    assert verdict(kept) == "copy", "one of the two writes"
    assert verdict(backup) == "copy"


def test_a_place_that_cannot_be_looked_at_is_not_taken_for_gone(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = workspace.layout.root
    moved = root.rename(tmp_path / "moved")
    stat = Path.stat

    def locked(path: Path, **more: Any) -> os.stat_result:
        if path == root:
            raise PermissionError(13, "Permission denied")
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", locked)
    assert verdict(moved) == "unsure"


def test_a_renamed_machine_and_another_kernel_are_no_copy(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_in_container", lambda _: False)
    monkeypatch.setattr(identity, "_machine", lambda: "another")
    monkeypatch.setattr(identity, "boot_id", lambda: "another")
    assert verdict(workspace.layout.root) == "same"
    check_identity(workspace.layout)
    assert read_json(workspace.layout.clone)["place"]["machine"] == "another"


def test_another_file_system(workspace: Workspace, other_disk: Path) -> None:
    target = other_disk / "workspace"
    assert verdict(copied(workspace.layout.root, target)) == "copy"
    shutil.rmtree(workspace.layout.root)
    assert verdict(target) == "unsure"


def test_mounts(workspace: Workspace, tmp_path: Path) -> None:
    """The same folder at another mount point is the same; another folder at the same mount point is not."""
    place, root = tmp_path / "mounted", workspace.layout.root
    place.mkdir()
    (tmp_path / "other").mkdir()
    copied(root, tmp_path / "other/copy")
    look = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path\nfrom al_pipeline.workspace.identity import check_identity, identify\n"
        "from al_pipeline.workspace.layout import Layout\n"
        "layout = Layout(Path(sys.argv[1]))\n"
        "print(identify(layout).verdict)\n"
        "if len(sys.argv) > 2: check_identity(layout)\n"
    )
    script = (
        'mount --bind "$1" "$3" && "$4" -c "$5" "$3" && umount "$3" || exit 9\n'
        'mount --bind "$1" "$3" && mount -t tmpfs none "$6" && "$4" -c "$5" "$3" bind && umount "$3" || exit 9\n'
        'mount --bind "$2" "$3" && "$4" -c "$5" "$3"'
    )
    words = [str(root), str(tmp_path / "other/copy"), str(place), sys.executable, look, str(root.parent)]
    found = subprocess.run(["unshare", "--mount", "sh", "-c", script, "sh", *words], capture_output=True, text=True)
    require(found.returncode not in (1, 9, 126, 127) or "rmitted" not in found.stderr, "no right to mount")
    # Both places visible; the first one hidden, as in a container; then the copy at the mount point that was bound.
    assert found.stdout.split() == ["same", "same", "unsure"], found.stderr


def test_a_workspace_of_an_earlier_version_is_bound_by_a_tick_and_by_an_upgrade(
    workspace: Workspace, tmp_path: Path
) -> None:
    known = read_json(workspace.layout.clone)["clone_id"]
    for step in (
        lambda: tick(workspace, SimulatedOracle),
        lambda: upgrade(workspace.layout.root),
    ):
        write_json(workspace.layout.clone, {"clone_id": known})
        step()
        found = read_json(workspace.layout.clone)
        assert found["clone_id"] == known and found["place"]["path"] == str(workspace.layout.root.resolve())
    place = copied(workspace.layout.root, tmp_path / "copied")
    upgrade(place)
    assert verdict(place) == "copy", "an upgrade makes no copy an original"


def test_a_damaged_record_is_said_so(workspace: Workspace) -> None:
    known = read_json(workspace.layout.clone)
    write_json(workspace.layout.clone, {**known, "place": {**known["place"], "inodes": 3}})
    with pytest.raises(BadInput, match=r"clone\.json is damaged; delete it, then `al adopt`"):
        check_identity(workspace.layout)


def test_no_secret_of_the_machine_is_written_down(workspace: Workspace) -> None:
    place = Path("/etc/machine-id")
    require(place.exists(), "this machine has no id")
    assert place.read_text().strip() not in workspace.layout.clone.read_text()


# What a copy may do --------------------------------------------------------------------------------------------------


def al(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(root), *words]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)


def state(workspace: Workspace) -> tuple[Any, ...]:
    layout, git = workspace.layout, Git(workspace.layout.root)
    return git.head(), git.tags(), git.changed(layout.tracked), layout.clone.read_bytes()


def test_a_copy_reads_and_does_not_write_until_it_is_adopted(
    once: Played, undisturbed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, oracle, truth = go_on(once, tmp_path)
    answer_all(oracle, truth)
    second = open_workspace(copied(first.layout.root, tmp_path / "second"))
    monkeypatch.setattr(connect, "connect", lambda *_: copy.copy(oracle))
    before, tasks = state(second), copy.deepcopy(oracle.projects)
    with pytest.raises(CopiedWorkspace, match="is a copy of the workspace at .*`al adopt`"):
        tick(second, lambda: oracle)
    with open_dvc(second.layout) as dvc, pytest.raises(CopiedWorkspace):
        pause(second, dvc, "")
    with pytest.raises(CopiedWorkspace):
        connect.reset_page(second)
    for words in (
        ["up"],
        ["down"],
        ["schedule", "apply"],
        ["schedule", "--off"],
        ["labelstudio", "stop"],
        ["destroy", "--yes", "--force"],
    ):
        done = al(second.layout.root, *words)
        assert done.returncode == 6 and "is a copy of" in done.stderr, (words, done)
    for words in (["status"], ["log", "mail-000"], ["report"], ["rounds"], ["diff", "0", "0"]):
        done = al(second.layout.root, *words)
        assert done.returncode == 0, (words, done)
    found = json.loads(al(second.layout.root, "doctor", "--json").stdout)["findings"]
    (finding,) = (one for one in found if one["check"] == "identity")
    assert finding["level"] == "error" and "`al adopt`" in finding["message"]
    assert state(second) == before and oracle.projects == tasks

    done = connect.adopt(second)
    assert done.copy and done.project == 1
    second = open_workspace(second.layout.root)
    mark = find_mark(oracle.projects[1].description)
    assert mark is not None and mark.clone_id == second.clone_id != first.clone_id
    assert tick(second, lambda: oracle).published == (1,)
    assert results(second, 1) == results(undisturbed, 1)
    with pytest.raises(WrongProject, match="another clone.*`al adopt`"):
        tick(first, lambda: oracle)
    assert not connect.adopt(first).copy, "as any other clone"


def test_a_copy_made_in_the_middle_of_a_build_publishes_nothing(
    started: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    def until_publish(name: str, action: Callable[[], Any], /) -> Any:
        if name == "publish" and layout.record(0).exists():
            raise Stop
        return action()

    workspace, oracle, truth = go_on(started, tmp_path)
    layout = workspace.layout
    answer_all(oracle, truth)
    with pytest.raises(Stop):
        tick(workspace, lambda: oracle, run=until_publish)
    second = open_workspace(copied(layout.root, tmp_path / "second"))
    before = state(second)

    def refuse(name: str, _: Callable[[], Any], /) -> Any:
        raise AssertionError(f"the step {name} was taken")

    with pytest.raises(CopiedWorkspace):
        tick(second, lambda: oracle, run=refuse)
    assert state(second) == before

    def down(*_: object) -> Any:
        raise LabelStudioDown("no reply")

    monkeypatch.setattr(connect, "connect", down)
    with pytest.raises(LabelStudioDown):
        connect.adopt(second)
    with pytest.raises(CopiedWorkspace, match="adoption is not complete; `al adopt`"):
        tick(open_workspace(second.layout.root), lambda: oracle, run=refuse)
    refuse_copy(second.layout)  # `al up` works, which may be what it waits for
    monkeypatch.setattr(connect, "connect", lambda *_: oracle)
    assert connect.adopt(open_workspace(second.layout.root)).copy
    assert tick(open_workspace(second.layout.root), lambda: oracle).published == (0,)


def test_a_copy_does_not_end_what_runs_for_its_original(
    started: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, oracle, _ = go_on(started, tmp_path)
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        try:
            for record in (first.layout.dvc_process, first.layout.encoding):
                child.remember(record, process.pid)
            second = open_workspace(copied(first.layout.root, tmp_path / "second"))
            with pytest.raises(CopiedWorkspace):
                tick(second, lambda: oracle)
            monkeypatch.setattr(connect, "connect", lambda *_: oracle)
            connect.adopt(second)
            tick(open_workspace(second.layout.root), lambda: oracle)
            assert psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE
        finally:
            process.kill()


def test_a_copy_before_the_first_round_becomes_a_clone_of_its_own(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = open_workspace(copied(workspace.layout.root, tmp_path / "second"))
    with pytest.raises(NothingToDo):
        connect.adopt(workspace)
    done = connect.adopt(second)
    assert done == connect.Adopted(None, copy=True)
    oracle = SimulatedOracle()
    tick(workspace, lambda: oracle)
    with pytest.raises(WrongProject, match="another clone"):
        tick(open_workspace(second.layout.root), lambda: oracle)


def test_in_a_clone_a_round_is_as_old_as_the_commit_of_its_plan(
    started: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone lacks the time when the round's tasks were pushed, and HEAD may be newer than the plan."""
    first, oracle, _ = go_on(started, tmp_path)
    root, plan = first.layout.root, "rounds/0000/plan.jsonl"
    head = f"{Git(root).brought(plan)}^"
    for day, tree in ((2, "HEAD^"), (6, "HEAD")):
        dated = {**os.environ, "GIT_COMMITTER_DATE": f"2026-03-0{day}T12:00:00+01:00"}
        words = ["git", "commit-tree", f"{tree}^{{tree}}", "-p", head, "-m", "Dated"]
        head = subprocess.run(words, cwd=root, env=dated, check=True, capture_output=True, text=True).stdout.strip()
    Git(root).run("update-ref", "HEAD", head)
    assert Git(root).brought(plan) == Git(root).run("rev-parse", "HEAD^").stdout.strip()
    subprocess.run(["git", "clone", "--quiet", str(root), str(tmp_path / "clone")], check=True)
    clone = open_workspace(tmp_path / "clone")
    facts, _ = read_facts(clone, datetime(2026, 3, 7, 11, tzinfo=UTC))
    assert facts.planned == 0 and facts.age_days == 5

    monkeypatch.setattr(connect, "connect", lambda *_: oracle)
    connect.adopt(clone)
    tick(open_workspace(clone.layout.root), lambda: oracle)
    remembered = read_json(clone.layout.state(0))["opened_at"]
    assert datetime.fromtimestamp(remembered, UTC) == datetime(2026, 3, 2, 11, tzinfo=UTC)


def test_a_copy_that_is_behind_its_original_goes_on_where_that_one_is(
    template: Any, undisturbed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has answers in its inbox that its original published meanwhile: they count once."""
    first, oracle, truth = copy_workspace(template, tmp_path), SimulatedOracle(), template[1]
    root, origin = first.layout.root, tmp_path / "origin.git"
    subprocess.run(["git", "init", "-q", "--bare", "--initial-branch=main", str(origin)], check=True)
    Git(root).run("remote", "add", "origin", str(origin))
    Git(root).run("push", "-q", "-u", "origin", "main")
    tick(first, lambda: oracle)
    keys = oracle.queue("ann@example.org")
    for key in keys[: len(keys) // 2]:
        oracle.answer(key, "ann@example.org", truth[key.rsplit(":", 1)[1]])
    assert tick(first, lambda: oracle).pulled
    second = copied(root, tmp_path / "second")
    answer_all(oracle, truth)
    tick(first, lambda: oracle)
    monkeypatch.setattr(connect, "connect", lambda *_: oracle)
    with pytest.raises(
        ManualActionRequired, match="[0-9] commits? ahead of this clone.*`git pull`, then `al adopt` again"
    ):
        connect.adopt(open_workspace(second))
    for command in (["git", "pull", "-q"], ["dvc", "pull", "-q"]):
        subprocess.run(command, cwd=second, env=tools_first(), check=True)
    assert connect.adopt(open_workspace(second)).copy
    answer_all(oracle, truth)
    assert tick(open_workspace(second), lambda: oracle).published == (1,)
    assert results(open_workspace(second), 1) == results(undisturbed, 1)


def test_a_new_project_for_a_copy(workspace: Workspace, tmp_path: Path) -> None:
    oracle = SimulatedOracle()
    tick(workspace, lambda: oracle)
    second = open_workspace(copied(workspace.layout.root, tmp_path / "second"))
    assert connect.leave_project(second) == 1
    assert verdict(second.layout.root) == "same"
    assert open_workspace(second.layout.root).clone_id != workspace.clone_id


def test_what_is_the_same_is_written_once(workspace: Workspace) -> None:
    check_identity(workspace.layout)
    before = workspace.layout.clone.stat().st_mtime_ns
    for _ in range(3):
        check_identity(workspace.layout)
        bind(workspace.layout)
    assert workspace.layout.clone.stat().st_mtime_ns == before
    assert here(workspace.layout) == here(workspace.layout)


def test_the_command(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    oracle = SimulatedOracle()
    tick(workspace, lambda: oracle)
    second = copied(workspace.layout.root, tmp_path / "second")
    monkeypatch.setattr(connect, "connect", lambda *_: oracle)
    for words, copy_, says in (([], True, "This copy now has an identity of its own"), ([], False, "project 1")):
        monkeypatch.setattr(sys, "argv", ["al", "-C", str(second), "adopt", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr().out
        assert stop.value.code == 0 and says in said and ("identity" in said) == copy_
    monkeypatch.setattr(sys, "argv", ["al", "-C", str(second), "adopt", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out) == {"project_id": 1, "new_identity": False}
