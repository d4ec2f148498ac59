"""`al upgrade`: a workspace of an older engine works with this one; nothing of the user's is lost on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import answer_all, copy_workspace, play, small_workspace

from al_pipeline.cli import app as cli
from al_pipeline.errors import BadParams, Locked, NotAWorkspace, NothingToDo, UnexpectedChange
from al_pipeline.files import read_json, sha256_bytes, sha256_tree, write_json, write_text
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import upgrade as module
from al_pipeline.operations.diff import diff
from al_pipeline.operations.report import write_report
from al_pipeline.operations.status import rounds, status
from al_pipeline.operations.tick import tick
from al_pipeline.operations.upgrade import FILES, MIGRATIONS, OLD_DVC_YAML, bring_up_to_date, migrate, upgrade
from al_pipeline.params import parse_params
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.trust import template
from al_pipeline.workspace.workspace import LAYOUT_VERSION, Workspace, open_workspace

pytestmark = pytest.mark.slow

GAINED = ("  overlap: 1 ", "  calibrate: true ", "annotators: []")
"""Lines of the template that this older engine did not know."""
DVC_YAML = Path(__file__).with_name("layout_1") / "dvc.yaml"
NOT_YET = ("rounds/random.json", "rounds/control.json", "rounds/guided.json", "rounds/choice.json")
"""Files that only builds of layout 2 write."""


def make_old(workspace: Workspace) -> Path:
    """Turn a workspace into one of layout 1, as the engine of that layout would have left it."""
    root = workspace.layout.root
    text = workspace.layout.params.read_text("utf-8")
    lines = [line for line in text.split("\n") if not line.startswith(GAINED)]
    assert len(lines) == len(text.split("\n")) - len(GAINED)
    write_text(workspace.layout.params, "\n".join(lines).replace("seed_size: 10", "seed_size: 10 # ours"))
    ignore = root / ".gitignore"
    write_text(ignore, ignore.read_text("utf-8").replace("/data/rejects/\n", "") + "/notes/\n")
    write_text(workspace.layout.dvc_yaml, DVC_YAML.read_text("utf-8"))
    write_json(workspace.layout.marker, {"layout": 1, "workspace_id": workspace.id})
    for name in NOT_YET:
        (root / name).unlink(missing_ok=True)
    for path in (workspace.layout.genesis, *workspace.layout.rounds.glob("*/round.json")):
        if path.exists():
            record = read_json(path)
            counts = {key: count for key, count in record["counts"].items() if key != "events"}
            kept = {
                key: value
                for key, value in record.items()
                if key not in ("control", "next_batch", "running", "interventions")
            }
            write_json(path, {**kept, "counts": counts})
    Git(root).commit("As it was", [root / name for name in (*FILES, *NOT_YET, "al-workspace.json", "rounds")])
    return root


@pytest.fixture
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_old(copy_workspace(request.getfixturevalue("template"), tmp_path))


def test_there_is_a_migration_from_every_version() -> None:
    assert sorted(MIGRATIONS) == list(range(1, LAYOUT_VERSION))


def test_an_older_workspace_is_refused_by_name_carried_over_once_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, truth = small_workspace(tmp_path, size=40)
    oracle = SimulatedOracle()
    play(workspace, oracle, truth, 1)
    root = make_old(workspace)
    with pytest.raises(
        NotAWorkspace, match=f"has layout 1, but this engine needs layout {LAYOUT_VERSION}; `al upgrade`"
    ):
        open_workspace(root)
    git = Git(root)
    head = git.head()
    monkeypatch.setattr(sys, "argv", ["al", "-C", str(root), "upgrade", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["before"], found["after"], found["commit"]) == (1, LAYOUT_VERSION, git.head())
    assert found["changed"] == [*FILES, "al-workspace.json"]
    assert (root / "dvc.yaml").read_text("utf-8") == template("dvc.yaml")
    assert git.run("rev-list", f"{head}..HEAD").stdout.split() == [git.head()], "one commit"
    assert git.run("status", "--porcelain").stdout == ""
    text = (root / "params.yaml").read_text("utf-8")
    assert "seed_size: 10 # ours" in text and "calibrate: true " in text
    ignored = (root / ".gitignore").read_text("utf-8").splitlines()
    assert "/notes/" in ignored and set(Layout().ignored) <= set(ignored)
    assert upgrade(root / "data").before == LAYOUT_VERSION, "twice is as good as once"
    assert git.head() == found["commit"]
    answer_all(oracle, truth)
    assert tick(open_workspace(root), lambda: oracle).published == (1,)
    assert git.run("status", "--porcelain").stdout == ""
    upgraded = open_workspace(root)
    assert status(upgraded).round == 2 and len(rounds(upgraded)) == 2
    assert write_report(upgraded, 0).exists() and write_report(upgraded).exists()
    assert len(diff(upgraded, 0, 1).labels) == 8


def test_a_clone_that_git_converted_is_carried_over_without_an_edit_by_anybody(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `core.autocrlf`, by an engine that kept nothing from it; DVC's own files too."""
    git = Git(old)
    git.run("rm", "--quiet", ".gitattributes")
    git.run("commit", "--quiet", "--message", "As it was")
    (tmp_path / "gitconfig").write_text("[core]\n\tautocrlf = true\n", "utf-8")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    subprocess.run(["git", "clone", "--quiet", str(old), str(tmp_path / "clone")], check=True)
    clone = Git(tmp_path / "clone")
    tracked = clone.run("ls-files", "-z").stdout.split("\0")[:-1]
    assert all(b"\r\n" in (clone.root / name).read_bytes() for name in (*FILES, ".dvcignore", ".dvc/.gitignore"))
    assert upgrade(clone.root).after == LAYOUT_VERSION
    assert not [name for name in tracked if b"\r\n" in (clone.root / name).read_bytes()]
    assert clone.run("status", "--porcelain").stdout == ""


class Killed(BaseException):
    """Stands for a process that ends."""


@pytest.mark.parametrize("survived", range(4))
def test_killed_at_any_write_it_is_finished_by_the_next(
    old: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    left = survived

    def dies(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real(*arguments, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_text", dies(module.write_text))
        patch.setattr(module, "write_json", dies(module.write_json))
        patch.setattr(Git, "commit", dies(Git.commit))
        with pytest.raises(Killed):
            upgrade(old)
    done = upgrade(old)
    git = Git(old)
    assert done.after == LAYOUT_VERSION and git.run("status", "--porcelain").stdout == ""
    assert json.loads(str(git.show("HEAD", "al-workspace.json")))["layout"] == LAYOUT_VERSION
    assert open_workspace(old).params.round.overlap == 1


def edited(root: Path, name: str) -> None:
    path = root / name
    write_text(path, path.read_text("utf-8") + "# mine\n")


@pytest.mark.parametrize("name", [*FILES, "rounds/project.json"])
def test_a_change_that_is_not_committed_is_never_mixed_in(old: Path, name: str) -> None:
    if name == "rounds/project.json":
        write_text(old / "rounds/0000/note.txt", "mine")
        name = "rounds/0000/note.txt"
    else:
        edited(old, name)
    before = {path: (old / path).read_bytes() for path in (*FILES, "al-workspace.json")}
    with pytest.raises(UnexpectedChange, match=f"uncommitted changes in {name}.*`git checkout -- FILE`"):
        upgrade(old)
    assert {path: (old / path).read_bytes() for path in before} == before


def test_a_dvc_yaml_of_ones_own_is_kept_until_it_is_given_up(old: Path) -> None:
    edited(old, "dvc.yaml")
    mine = (old / "dvc.yaml").read_text("utf-8")
    Git(old).commit("Mine", [old / "dvc.yaml"])
    with pytest.raises(UnexpectedChange, match="dvc.yaml has changes of your own.*--replace-dvc-yaml"):
        upgrade(old)
    assert (old / "dvc.yaml").read_text("utf-8") == mine
    assert "dvc.yaml" in upgrade(old, replace_dvc_yaml=True).changed
    assert (old / "dvc.yaml").read_text("utf-8") == template("dvc.yaml")


def test_a_dvc_yaml_is_the_older_layouts_or_somebodys_own() -> None:
    older = [Path(__file__).with_name(f"layout_{number}") / "dvc.yaml" for number in range(1, LAYOUT_VERSION)]
    assert {sha256_bytes(path.read_bytes()) for path in older} == OLD_DVC_YAML
    for number, path in enumerate(older, 1):
        before = {"params.yaml": template("params.yaml"), "dvc.yaml": path.read_text("utf-8"), ".gitignore": ""}
        assert migrate(before, number)["dvc.yaml"] == template("dvc.yaml")
    assert sha256_bytes(template("dvc.yaml").encode()) not in OLD_DVC_YAML
    texts = {"params.yaml": template("params.yaml"), "dvc.yaml": template("dvc.yaml"), ".gitignore": "mine"}
    found = migrate(texts, 1)
    assert found["dvc.yaml"] == template("dvc.yaml"), "it may have been brought over by hand"
    assert found[".gitignore"].splitlines() == ["mine", *Layout().ignored]


def test_the_files_of_an_older_rounds_clone_are_brought_up_to_date_where_they_lie(old: Path) -> None:
    bring_up_to_date(Layout(old))
    assert parse_params((old / "params.yaml").read_text("utf-8")).round.overlap == 1
    assert read_json(old / "al-workspace.json")["layout"] == 1, "no workspace came of it"


def test_what_stands_in_its_way_is_said(old: Path) -> None:
    git, layout = Git(old), Layout(old)
    before = sha256_tree(old / "rounds")
    with locked(layout.lock, "a tick"), pytest.raises(Locked):
        upgrade(old)
    write_json(layout.closing, {"selects_for": 0})
    with pytest.raises(NothingToDo, match="a round is being built with the engine of the older layout"):
        upgrade(old)
    layout.closing.unlink()
    write_json(layout.overrides, {"round": 0})
    with pytest.raises(NothingToDo, match="a round is being built"):
        upgrade(old)
    layout.overrides.unlink()
    git.run("checkout", "--quiet", "--detach")
    with pytest.raises(UnexpectedChange, match="detached"):
        upgrade(old)
    git.run("checkout", "--quiet", "main")
    write_text(layout.params, layout.params.read_text("utf-8").replace("round:\n", "round: {quorum: 0.5}\nx:\n"))
    git.commit("In braces", [layout.params])
    with pytest.raises(BadParams, match="add these keys by hand: .*round.seed_size"):
        upgrade(old)
    assert sha256_tree(old / "rounds") == before
    write_json(layout.marker, {**read_json(layout.marker), "layout": LAYOUT_VERSION + 1})
    git.commit("Of the future", [layout.marker])
    for use in (open_workspace, upgrade):
        with pytest.raises(NotAWorkspace, match="install a newer engine"):
            use(old)
    write_text(layout.marker, "{}")
    with pytest.raises(NotAWorkspace, match="is damaged; `git checkout"):
        open_workspace(old)
