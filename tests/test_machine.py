"""What workspaces leave on a machine is listed, and `al destroy` removes all of it and nothing else, killed or not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from annotating import ServerRig
from harness import Killed, small_workspace
from test_cli import Al, one_object
from test_cli import al as al

from al_pipeline.errors import Locked, ManualActionRequired, NothingToDo, UsageError
from al_pipeline.files import sha256_tree, write_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import machine
from al_pipeline.operations.connect import connect, stored_project
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.init import init
from al_pipeline.operations.machine import destroy, find, plan, workspaces
from al_pipeline.operations.tick import tick
from al_pipeline.servers import Stored, StoredAnswer, admin, label_studio_status, start_label_studio, stop_label_studio
from al_pipeline.servers.process import MARK
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.workspace import Workspace, open_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A new workspace with the default remote, and what servers would have left."""
    return furnished(init(tmp_path / "spam ö", ["ham", "spam"]))


def furnished(workspace: Workspace) -> Workspace:
    for name in ("label-studio/data/x", "prefect/prefect.db", "worker/server.log", "reproduce/0/a"):
        (workspace.home / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace.home / name).write_text(name)
    workspace.store_credentials("http://127.0.0.1:1", "secret")
    (workspace.home / "dvc-remote").mkdir(exist_ok=True)
    (workspace.home / "dvc-remote/object").write_text("the data of a round")
    return workspace


@pytest.fixture
def serve() -> Iterator[Callable[[Path], psutil.Process]]:
    """Starts a process that carries the mark of the server in a folder."""
    made: list[subprocess.Popen[bytes]] = []

    def start(home: Path) -> psutil.Process:
        environment = {**os.environ, MARK: str(home / "server.json")}
        made.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment))
        while True:
            found = psutil.Process(made[-1].pid)
            if found.environ().get(MARK) == environment[MARK]:
                return found
            time.sleep(0.05)

    yield start
    for one in made:
        one.kill()
        one.wait()


def left_of(workspace: Workspace) -> machine.Left:
    return next(left for left in workspaces() if left.workspace_id == workspace.id)


def test_nothing_is_listed_where_nothing_is(al: Al) -> None:
    assert one_object(al("workspaces", "--json").out)["workspaces"] == []
    said = al("workspaces")
    assert said.code == 0 and "No workspace" in said.out


def test_workspaces_are_listed_with_where_they_are_and_what_they_take(
    al: Al, workspace: Workspace, tmp_path: Path, al_home: Path, serve: Callable[[Path], psutil.Process]
) -> None:
    other = init(tmp_path / "other", ["a", "b"])
    for name in ("templates", "engines/0123456789ab", "cache", "dvc-only"):  # shared by all, nobody's
        (al_home / name).mkdir(parents=True)
    (al_home / "0123456789ab").symlink_to(tmp_path)
    rows = {row["workspace_id"]: row for row in one_object(al("workspaces", "--json").out)["workspaces"]}
    assert rows.keys() == {workspace.id, other.id}
    row = rows[workspace.id]
    assert (row["name"], row["state"], row["path"]) == ("spam ö", "stopped", str(workspace.layout.root))
    assert row["bytes"] > row["data_bytes"] > 0
    write_json(
        workspace.home / "label-studio/server.json",
        {"name": "x", "pid": serve(workspace.home / "label-studio").pid, "started": 1.0, "port": 8123,
         "url": "http://127.0.0.1:8123"},
    )  # fmt: skip
    shutil.rmtree(other.layout.root)
    rows = {row["workspace_id"]: row for row in one_object(al("workspaces", "--json").out)["workspaces"]}
    assert rows[workspace.id]["state"] == "running" and rows[other.id]["state"] == "gone"
    [studio] = [one for one in rows[workspace.id]["services"] if one["state"] == "running"]
    assert (studio["service"], studio["address"]) == ("Label Studio", "http://127.0.0.1:8123")
    said = al("workspaces").out
    assert "127.0.0.1:8123" in said and "spam ö" in said and "gone" in said


def test_a_workspace_of_an_earlier_version_is_noted_by_its_next_tick(workspace: Workspace) -> None:
    shutil.rmtree(workspace.home / "places")
    left = left_of(workspace)
    assert (left.places, left.state) == ((), "stopped"), "nobody knows where it is, so nobody says that it is gone"
    tick(workspace, SimulatedOracle)
    assert left_of(workspace).places == (workspace.layout.root,)


def test_a_folder_that_cannot_be_read_is_not_gone(workspace: Workspace) -> None:
    workspace.layout.marker.write_text("{", encoding="utf-8")
    assert left_of(workspace).state == "stopped"


def test_destroy_takes_the_machines_part_and_leaves_the_workspace(
    workspace: Workspace, al_home: Path, tmp_path: Path, serve: Callable[[Path], psutil.Process]
) -> None:
    other = furnished(init(tmp_path / "other", ["a", "b"]))
    shutil.rmtree(workspace.home / "label-studio")  # a database that can be read is another test's
    theirs, ours = serve(other.home / "prefect"), serve(workspace.home / "prefect")
    stranger = al_home / workspace.id / "notes.txt"
    stranger.write_text("mine")
    before, others = sha256_tree(workspace.layout.root), sha256_tree(other.home)
    done = destroy(left_of(workspace), False, False)
    assert done.ended == ("Prefect",) and not ours.is_running() or ours.status() == psutil.STATUS_ZOMBIE
    assert theirs.is_running() and sha256_tree(other.home) == others
    assert {entry.name for entry in workspace.home.iterdir()} == {"dvc-remote", "notes.txt", "places"}
    shutil.rmtree(workspace.layout.root / ".al/logs", ignore_errors=True)
    (workspace.layout.lock).unlink()
    assert before == sha256_tree(workspace.layout.root) or not Git(workspace.layout.root).changed(
        [workspace.layout.root]
    )
    assert {path for path, _ in done.kept} >= {str(stranger), str(workspace.layout.root)}
    with pytest.raises(NothingToDo, match="--with-folder"):
        destroy(left_of(workspace), False, False)
    stranger.unlink()
    destroy(left_of(workspace), True, False)
    assert not workspace.layout.root.exists() and workspace.id not in {entry.name for entry in al_home.iterdir()}


def test_files_that_the_user_made_stay_with_their_history(workspace: Workspace, tmp_path: Path) -> None:
    shutil.rmtree(workspace.home / "label-studio")
    root = workspace.layout.root
    for name in ("notes.md", "data/mails.csv", "models/own.bin"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("mine")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("mine")
    shutil.rmtree(root / "reports", ignore_errors=True)
    (root / "reports").symlink_to(tmp_path / "outside")
    done = destroy(left_of(workspace), True, False)
    assert {str(root / name) for name in ("notes.md", "data/mails.csv", ".git")} <= {path for path, _ in done.kept}
    assert (root / "data/mails.csv").read_text() == "mine" and (root / "models/own.bin").exists()
    assert (root / ".git/HEAD").exists() and (tmp_path / "outside/file").exists()
    assert not (root / "params.yaml").exists() and not workspace.home.exists()


@pytest.mark.parametrize("with_folder", [False, True])
def test_destroy_works_where_the_folder_is_gone(al: Al, workspace: Workspace, al_home: Path, with_folder: bool) -> None:
    shutil.rmtree(workspace.home / "label-studio")
    shutil.rmtree(workspace.layout.root)
    asked = al("destroy", workspace.id)
    assert asked.code == 2 and "no terminal to ask" in asked.err
    assert "not mounted" in asked.out and (workspace.home / "credentials.json").exists()
    more = ["--with-folder"] if with_folder else []
    shown = one_object(al("destroy", workspace.id, *more, "--dry-run", "--json").out)
    assert shown["dry_run"] and (workspace.home / "credentials.json").exists()
    done = one_object(al("destroy", str(workspace.layout.root), *more, "--yes", "--json").out)
    assert done["removed"] == shown["removed"]
    assert (al_home / workspace.id).exists() != with_folder, "the data of its rounds stay, unless asked for"


def test_destroyed_in_the_middle_it_goes_on(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_remove, root, home = machine.remove_tree, workspace.layout.root, workspace.home
    shutil.rmtree(home / "label-studio")
    shutil.copytree(root, tmp_path / "root")
    shutil.copytree(home, tmp_path / "home")
    for strike in range(1, 60):
        calls = 0

        def remove(path: Path, strike: int = strike) -> None:
            nonlocal calls
            calls += 1
            if calls != strike:
                return real_remove(path)
            with monkeypatch.context() as patch:  # it has left its place, and nothing of it is gone yet
                patch.setattr("al_pipeline.files.shutil.rmtree", lambda path: None)
                real_remove(path)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(machine, "remove_tree", remove)
            try:
                destroy(left_of(workspace), True, False)
                assert calls > 10
                return
            except Killed:
                pass
        destroy(find(workspace.id, None), True, False)
        assert not root.exists() and not home.exists(), strike
        shutil.copytree(tmp_path / "root", root)
        shutil.copytree(tmp_path / "home", home)
    raise AssertionError("it never came to its end")


def test_a_round_that_runs_is_not_disturbed(workspace: Workspace) -> None:
    before = sha256_tree(workspace.home)
    with locked(workspace.layout.lock, "a tick"), pytest.raises(Locked, match="a tick"):
        destroy(left_of(workspace), False, True)
    assert sha256_tree(workspace.home) == before


def test_clones_that_share_a_home_are_not_deleted_one_for_the_other(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.layout.root, tmp_path / "clone")
    open_workspace(tmp_path / "clone").make_home()
    left = left_of(workspace)
    assert set(left.present) == {workspace.layout.root, tmp_path / "clone"}
    with pytest.raises(UsageError, match="several clones"):
        destroy(left, True, True)
    planned = plan(left, False)
    assert {str(place) for place in left.present} <= {path for path, _ in planned.kept}


@pytest.mark.parametrize("content", [b"", b"half a database", b"SQLite format 3\0" + b"\0" * 100])
def test_a_database_that_cannot_be_read_may_hold_answers(workspace: Workspace, content: bytes) -> None:
    (workspace.home / "label-studio/data/label_studio.sqlite3").write_bytes(content)
    with pytest.raises(ManualActionRequired, match="cannot be read.*--force"):
        destroy(left_of(workspace), False, False)
    assert (workspace.home / "credentials.json").exists()
    destroy(left_of(workspace), False, True)
    assert not (workspace.home / "label-studio").exists()


def test_two_of_a_name_are_told_apart_by_id(al: Al, tmp_path: Path) -> None:
    one, two = init(tmp_path / "a/spam", ["a", "b"]), init(tmp_path / "b/spam", ["a", "b"])
    said = al("destroy", "spam", "--yes")
    assert said.code == 2 and one.id in said.err and two.id in said.err
    assert al("destroy", "spa", "--yes").code == 2
    assert al("destroy", "../..", "--yes").code == 2
    assert al("-C", str(one.layout.root), "destroy", "--yes", "--with-folder").code == 0
    assert not one.layout.root.exists() and al("destroy", "spam", "--yes", "--with-folder").code == 0
    assert workspaces() == []


@pytest.mark.server
@pytest.mark.slow
def test_answers_that_were_not_pulled_are_not_destroyed(
    al: Al, tmp_path: Path, al_home: Path, label_studio_template: None
) -> None:
    workspace, _ = small_workspace(tmp_path)
    try:
        start_label_studio(workspace, lambda _: None)
        tick(workspace, lambda: connect(workspace))
        account, server = admin(workspace), label_studio_status(workspace)
        assert account is not None and server is not None
        ref, keys = stored_project(workspace.layout), [t.push_key for t in read_plan(Git(workspace.layout.root), 0)]
        assert ref is not None

        class At:
            url, token = server.url, account.token

        with connect(workspace) as oracle, ServerRig(At, oracle) as people:
            people.answer(ref, keys[0], account.email, "ham")
            people.skip(ref, keys[1], account.email)
            said = al("-C", str(workspace.layout.root), "destroy", "--yes")
            assert said.code == 6 and f"2 answers in its Label Studio were not pulled ({account.email} 2)" in said.err
            tick(open_workspace(workspace.layout.root), lambda: connect(workspace))
            root = str(workspace.layout.root)
            assert one_object(al("-C", root, "destroy", "--dry-run", "--json").out)["losses"] == []
            answer = people.answer(ref, keys[2], account.email, "nonsense")
            tick(open_workspace(workspace.layout.root), lambda: connect(workspace))  # refused, and kept aside
            assert one_object(al("-C", root, "destroy", "--dry-run", "--json").out)["losses"] == []
            people.edit(ref, answer, "ham")
            assert "1 answers" in one_object(al("-C", root, "destroy", "--dry-run", "--json").out)["losses"][0]
            tick(open_workspace(workspace.layout.root), lambda: connect(workspace))
            people._client.projects.create(title="Somebody else's")
            assert "Somebody else" in one_object(al("-C", root, "destroy", "--dry-run", "--json").out)["losses"][0]
        inbox = one_object(al("-C", root, "destroy", "--with-folder", "--dry-run", "--json").out)["losses"]
        assert "pulled answers are not in a published round yet" in inbox[-1]
        done = one_object(al("-C", root, "destroy", "--yes", "--force", "--json").out)
        assert done["stopped"] == ["Label Studio"] and not psutil.pid_exists(server.pid)
        assert not (al_home / workspace.id / "label-studio").exists()
        assert json.loads((Path(root) / "al-workspace.json").read_text())["workspace_id"] == workspace.id
        assert one_object(al("-C", root, "status", "--json").out)["state"] == "open"
    finally:
        stop_label_studio(workspace)


def test_a_gone_workspace_s_answers_may_not_have_been_pulled(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = StoredAnswer("key", 1, "ann@example.org", datetime(2026, 1, 1, tzinfo=UTC))
    monkeypatch.setattr(machine, "stored_answers", lambda _: Stored((), (one,)))
    shutil.rmtree(workspace.layout.root)
    with pytest.raises(ManualActionRequired, match="may not have been pulled"):
        destroy(left_of(workspace), False, False)
    destroy(left_of(workspace), False, True)
