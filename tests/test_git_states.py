"""git in every state that people bring it into: refused in one sentence, or read for what it is; nothing is lost."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import Played, go_on

from al_pipeline.cli import app as cli
from al_pipeline.errors import BadInput, ManualActionRequired, RepositoryError, UnexpectedChange
from al_pipeline.integrations.git import Git
from al_pipeline.operations.checkout import (
    bring_in_line,
    check_not_ignored,
    check_ready,
    check_tags,
    converted,
    git_files,
    keep_bytes,
    put_back_converted,
    with_verification,
)
from al_pipeline.operations.checks.repository import check_git_remote
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.publish import sync
from al_pipeline.operations.publish import tag as tag_round
from al_pipeline.workspace.layout import Layout, is_ours

PLAN = "rounds/0001/plan.jsonl"


def raw(root: Path, *arguments: str, check: bool = True, env: dict[str, str] | None = None) -> str:
    """git as the user runs it."""
    environment = {**os.environ, **(env or {})}
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=root, check=check, capture_output=True, text=True, timeout=60, env=environment
    ).stdout.strip()


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def git(tmp_path: Path) -> Git:
    """The git half of a workspace: a plan and a record, two branches that cannot be merged without a hand."""
    root = tmp_path / "workspace"
    root.mkdir()
    git = Git(root)
    git.init()
    for name in ("params.yaml", "engine.json", "rounds/project.json", "rounds/0000/plan.jsonl", PLAN):
        write(root, name, f"{name} 1\n")
    layout = Layout(root)
    git.commit("Begin", [layout.params, *layout.owned])
    raw(root, "switch", "-qc", "other")
    write(root, "params.yaml", "theirs\n")
    raw(root, "commit", "-qam", "Theirs")
    raw(root, "switch", "-q", "main")
    write(root, "params.yaml", "ours\n")
    raw(root, "commit", "-qam", "Ours")
    return git


# What a person is in the middle of ----------------------------------------------------------------------------------

NO_EDITOR = {"GIT_EDITOR": "true", "GIT_SEQUENCE_EDITOR": "true"}


def merging(root: Path) -> None:
    raw(root, "merge", "other", check=False)


def merging_without_conflict(root: Path) -> None:
    raw(root, "merge", "--no-commit", "--no-ff", "-s", "ours", "other")


def picking(root: Path) -> None:
    raw(root, "cherry-pick", "other", check=False)


def picking_without_conflict(root: Path) -> None:
    raw(root, "cherry-pick", "other", check=False)
    raw(root, "add", "params.yaml")


def picking_several(root: Path) -> None:
    for text in ("2", "3"):
        raw(root, "update-ref", "refs/heads/other", raw(root, "commit-tree", "-p", "other", "-m", text, "main^{tree}"))
    raw(root, "cherry-pick", "other~2", "other~1", "other", check=False)
    raw(root, "checkout", "--ours", "params.yaml")
    raw(root, "add", "params.yaml")
    raw(root, "commit", "--allow-empty", "-qm", "By hand")


def reverting(root: Path) -> None:
    raw(root, "revert", "--no-edit", "HEAD~1", check=False)
    raw(root, "revert", "--no-commit", "HEAD", check=False)


def rebasing(root: Path) -> None:
    raw(root, "rebase", "--merge", "other", check=False, env=NO_EDITOR)


def rebasing_by_apply(root: Path) -> None:
    raw(root, "rebase", "--apply", "other", check=False, env=NO_EDITOR)


def editing_in_a_rebase(root: Path) -> None:
    raw(root, "rebase", "-i", "HEAD~1", env={"GIT_SEQUENCE_EDITOR": "sed -i s/^pick/edit/", "GIT_EDITOR": "true"})


def applying_mail(root: Path) -> None:
    mail = write(root.parent, "mail", raw(root, "format-patch", "-1", "other", "--stdout") + "\n")
    raw(root, "am", str(mail), check=False)


def bisecting(root: Path) -> None:
    raw(root, "bisect", "start")


def detached(root: Path) -> None:
    raw(root, "checkout", "-q", "--detach")


def stash_conflict(root: Path) -> None:
    write(root, "params.yaml", "stashed\n")
    raw(root, "stash")
    write(root, "params.yaml", "others\n")
    raw(root, "commit", "-qam", "Others")
    raw(root, "stash", "pop", check=False)


STATES: list[tuple[Callable[[Path], None], str]] = [
    (merging, "a merge is in progress.*`git merge --continue` or `--abort`"),
    (merging_without_conflict, "a merge is in progress"),
    (picking, "a cherry-pick is in progress"),
    (picking_without_conflict, "a cherry-pick is in progress"),
    (picking_several, "a cherry-pick.* is in progress"),
    (reverting, "a revert is in progress"),
    (rebasing, "a rebase is in progress.*`git rebase --continue`"),
    (rebasing_by_apply, "a rebase is in progress"),
    (editing_in_a_rebase, "a rebase is in progress"),
    (applying_mail, "`git am` is in progress.*`git am --continue`"),
    (bisecting, "a bisection is in progress.*`git bisect reset`"),
    (detached, "HEAD is detached: `git switch main`"),
    (stash_conflict, r"unmerged files: params\.yaml.*`git add`"),
]


@pytest.mark.parametrize("linked", [False, True], ids=["main tree", "linked tree"])
@pytest.mark.parametrize(("begin", "says"), STATES, ids=[state[0].__name__ for state in STATES])
def test_in_the_middle_of_a_persons_work_nothing_is_staged(
    git: Git, tmp_path: Path, begin: Callable[[Path], None], says: str, linked: bool
) -> None:
    root = git.root
    if linked:
        raw(root, "switch", "-qc", "elsewhere")
        root = tmp_path / "linked"
        raw(git.root, "worktree", "add", "-q", str(root), "main")
    begin(root)
    here, layout = Git(root), Layout(root)
    write(root, PLAN, "changed by us\n")
    write(root, "rounds/0002/plan.jsonl", "new\n")
    before = raw(root, "status", "--porcelain"), raw(root, "ls-files", "--stage"), here.head()
    with pytest.raises(ManualActionRequired, match=says):
        check_ready(layout, here)
    with pytest.raises(UnexpectedChange, match=says):
        here.commit("Ours", layout.owned)
    assert (raw(root, "status", "--porcelain"), raw(root, "ls-files", "--stage"), here.head()) == before


def test_what_somebody_staged_of_ours_and_changed_again_is_not_lost(git: Git) -> None:
    write(git.root, PLAN, "staged\n")
    raw(git.root, "add", PLAN)
    write(git.root, PLAN, "and changed\n")
    with pytest.raises(UnexpectedChange, match=r"staged, and changed again since: rounds/0001/plan\.jsonl"):
        git.commit("Ours", Layout(git.root).owned)
    assert raw(git.root, "show", f":{PLAN}") == "staged"


def test_what_a_killed_commit_staged_is_taken_out_again(git: Git) -> None:
    layout = Layout(git.root)
    write(git.root, PLAN, "ours\n")
    write(git.root, "rounds/0001/round.json", "{}\n")
    raw(git.root, "add", "rounds")
    write(git.root, "theirs", "staged by a person\n")
    raw(git.root, "add", "theirs")
    git.unstage(layout.owned)
    assert raw(git.root, "diff", "--cached", "--name-only") == "theirs"
    assert (git.root / PLAN).read_text() == "ours\n"
    write(git.root, PLAN, "and built anew\n")
    git.commit("Ours", layout.owned)
    assert raw(git.root, "show", f"HEAD:{PLAN}") == "and built anew"
    assert raw(git.root, "status", "--porcelain") == "A  theirs"


def test_a_commit_that_fails_leaves_nothing_staged(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    write(git.root, PLAN, "ours\n")
    write(git.root, "rounds/0002/plan.jsonl", "new\n")
    monkeypatch.setattr(Git, "check_idle", lambda _: None)  # a person began a merge just now
    merging_without_conflict(git.root)
    with pytest.raises(RepositoryError, match="partial commit during a merge"):
        git.commit("Ours", Layout(git.root).owned)
    raw(git.root, "commit", "-qm", "Their merge")
    assert raw(git.root, "show", "--format=", "--name-only", "-m", "HEAD", "--", "rounds") == ""
    assert (git.root / PLAN).read_text() == "ours\n"


@pytest.mark.parametrize("order", [("--no-assume-unchanged", "--assume-unchanged"), ("", "--skip-worktree")])
def test_files_that_git_is_told_not_to_look_at_are_named(git: Git, order: tuple[str, str]) -> None:
    raw(git.root, "update-index", order[1], PLAN)
    with pytest.raises(ManualActionRequired, match=rf"to ignore changes of {PLAN}: `git sparse-checkout disable`"):
        check_ready(Layout(git.root), git)


# Which commit a round is ---------------------------------------------------------------------------------------------


def record(git: Git, number: int, text: str | None = None) -> Path:
    return write(git.root, f"rounds/{number:04d}/round.json", text or f"{number}\n")


def test_a_round_that_a_merge_brought_is_found(git: Git) -> None:
    merging_without_conflict(git.root)
    record(git, 1)
    raw(git.root, "add", "rounds")
    raw(git.root, "commit", "-qm", "A merge that took our staged files")
    assert git.brought("rounds/0001/round.json") == git.head()


def test_a_round_from_a_merged_branch_is_the_commit_of_that_branch(git: Git) -> None:
    raw(git.root, "switch", "-qc", "rounds")
    record(git, 1)
    made = git.commit("Round 1", Layout(git.root).owned)
    raw(git.root, "switch", "-q", "main")
    raw(git.root, "merge", "-q", "--no-ff", "-m", "Merge", "rounds")
    record(git, 2)
    git.commit("Round 2", Layout(git.root).owned)
    assert git.brought("rounds/0001/round.json") == made


def test_a_round_in_a_criss_cross_history_is_found(git: Git) -> None:
    raw(git.root, "switch", "-qc", "rounds")
    record(git, 1)
    made = git.commit("Round 1", Layout(git.root).owned)
    raw(git.root, "switch", "-q", "main")
    raw(git.root, "commit", "-q", "--allow-empty", "-m", "Meanwhile")
    raw(git.root, "tag", "start")
    raw(git.root, "merge", "-q", "--no-ff", "-m", "One way", "rounds")
    one = raw(git.root, "rev-parse", "main")
    raw(git.root, "switch", "-q", "rounds")
    raw(git.root, "merge", "-q", "--no-ff", "-m", "The other way", "start")
    raw(git.root, "switch", "-q", "main")
    raw(git.root, "merge", "-q", "--no-ff", "-m", "Both", "rounds")
    assert one != git.head() and git.brought("rounds/0001/round.json") == made


def histories(git: Git) -> None:
    """Rounds in one line, from a merged branch, by a merge itself, and twice: on both of two branches."""
    for number in (10, 11):
        record(git, number)
        git.commit(f"Round {number}", Layout(git.root).owned)
    raw(git.root, "switch", "-qc", "side")
    for number in (12, 13):
        record(git, number)
        git.commit(f"Round {number}", Layout(git.root).owned)
    raw(git.root, "switch", "-q", "main")
    record(git, 13)
    git.commit("Round 13, here too", Layout(git.root).owned)
    raw(git.root, "merge", "-q", "--no-ff", "--no-commit", "side")
    record(git, 14)
    raw(git.root, "add", "rounds")
    raw(git.root, "commit", "-qm", "A merge with a round")
    record(git, 15)
    git.commit("Round 15", Layout(git.root).owned)


def test_one_call_finds_the_commits_of_all_rounds(git: Git) -> None:
    histories(git)
    found = git.newcomers("rounds")
    names = [f"rounds/{number:04d}/round.json" for number in (10, 11, 12, 14, 15)]
    assert {name: found[name] for name in names} == {name: git.brought(name) for name in names}
    assert found.keys() == set(git.files("HEAD", "rounds"))


def test_doctor_asks_git_as_often_for_many_rounds_as_for_few(git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    histories(git)

    def look(numbers: Sequence[int]) -> int:
        for number in numbers:
            git.tag(f"round-{number:04d}", "x", git.brought(f"rounds/{number:04d}/round.json"))
        time.sleep(0.1)  # answers are kept for a repository that just now changed by nobody
        calls = 0
        run = Git.run

        def counted(self: Git, *words: str, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            return run(self, *words, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Git, "run", counted)
            findings = list(check_git_remote(Git(git.root), git.tags()))
        assert [finding.level for finding in findings] == ["ok"]
        return calls

    assert look([10]) == look([11, 12, 14, 15])
    assert look([13]) <= look([10]) + 1, "a round that came twice is asked for by itself"


def test_a_tag_at_another_commit_than_its_round_is_named(git: Git) -> None:
    histories(git)
    git.tag("round-0011", "x", git.brought("rounds/0012/round.json"))
    (finding, _) = check_git_remote(git, git.tags())
    assert finding.level == "error"
    assert f"but {git.brought('rounds/0011/round.json')[:12]} published that round" in finding.message
    assert "`git tag -d round-0011`" in finding.fix


def test_a_round_that_no_commit_brought_is_said_so(git: Git) -> None:
    with pytest.raises(ManualActionRequired, match=r"no commit in the history of main added rounds/0009/round\.json"):
        git.brought("rounds/0009/round.json")


def rewritten(git: Git) -> None:
    raw(git.root, "commit", "-q", "--amend", "-m", "Round 1, amended")


def older(git: Git) -> None:
    raw(git.root, "reset", "-q", "--hard", "HEAD~1")


@pytest.mark.parametrize(
    ("change", "says", "way"),
    [
        (rewritten, "rebased or amended.*`git merge -s ours round-0001`", ["-s", "ours", "round-0001"]),
        (older, "an older state.*`git merge round-0001`", ["round-0001"]),
    ],
)
def test_a_tag_that_fell_out_of_history_is_named_and_the_way_back_works(
    git: Git, change: Callable[[Git], None], says: str, way: list[str]
) -> None:
    layout = Layout(git.root)
    record(git, 1)
    git.tag("round-0001", "One", git.commit("Round 1", layout.owned))
    check_ready(layout, git)
    raw(git.root, "tag", "round-and-about", "other")
    change(git)
    with pytest.raises(ManualActionRequired, match=f"round-0001 is not in the history of main: .*{says}"):
        check_ready(layout, git)
    raw(git.root, "merge", "-q", "--no-edit", *way)
    check_ready(layout, git)
    assert (git.root / "rounds/0001/round.json").read_text() == "1\n"


def test_a_tag_with_the_name_of_a_round_to_come_is_named() -> None:
    check_tags([0, 1], ["round-0000", "round-0001", "v1", "round-2", "rollback-0009-to-0005"])
    with pytest.raises(ManualActionRequired, match="the tag round-0002 .*`git tag -d round-0002`"):
        check_tags([0, 1], ["round-0000", "round-0002"])


# Tags ----------------------------------------------------------------------------------------------------------------


def test_a_tag_is_the_same_object_wherever_and_whenever_it_is_made(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git.tag("round-0001", "One: 8 labelled")
    made = raw(git.root, "rev-parse", "round-0001")
    assert raw(git.root, "cat-file", "-t", made) == "tag" and raw(git.root, "tag", "-n", "-l") != ""
    raw(git.root, "tag", "-d", "round-0001")
    for name, value in {"GIT_COMMITTER_NAME": "Bob", "GIT_COMMITTER_DATE": "2001-01-01T00:00:00"}.items():
        monkeypatch.setenv(name, value)
    raw(git.root, "config", "i18n.commitEncoding", "latin1")
    raw(git.root, "config", "core.commentChar", "O")
    git.tag("round-0001", "One: 8 labelled")
    assert raw(git.root, "rev-parse", "round-0001") == made
    raw(tmp_path, "clone", "-q", "--no-tags", str(git.root), "clone")
    clone = Git(tmp_path / "clone")
    clone.tag("round-0001", "One: 8 labelled", str(git.head()))
    assert raw(clone.root, "rev-parse", "round-0001") == made
    assert raw(clone.root, "fsck", "--strict") == ""


@pytest.fixture
def bare(git: Git, tmp_path: Path) -> Path:
    place = tmp_path / "bare.git"
    raw(tmp_path, "init", "-q", "--bare", "--initial-branch=main", str(place))
    raw(git.root, "remote", "add", "origin", str(place))
    (git.root / ".al").mkdir()
    return place


def test_only_tags_that_the_remote_lacks_are_pushed_and_another_is_named(git: Git, bare: Path) -> None:
    layout = Layout(git.root)
    git.tag("round-0000", "Zero", "HEAD~1")
    git.tag("round-0001", "One")
    raw(git.root, "push", "-q", "origin", "main")
    raw(bare, "tag", "-a", "-m", "made by hand", "round-0000", "main~1")
    raw(git.root, "push", "-q", "origin", "other")
    raw(bare, "tag", "round-0001", "other")
    theirs = raw(bare, "rev-parse", "round-0000", "round-0001")
    write(git.root, PLAN, "more\n")
    git.commit("More", layout.owned)
    git.tag("round-0002", "Two")
    said = sync(git, layout)
    assert raw(bare, "rev-parse", "main", "round-0002^{commit}").split() == [git.head()] * 2
    assert raw(bare, "rev-parse", "round-0000", "round-0001") == theirs, "neither was overwritten"
    assert len(said) == 2 and "round-0000 differs from the one on origin (of the same commit)" in said[0]
    assert f"(of the commit {raw(git.root, 'rev-parse', 'other')[:12]})" in said[1]
    raw(git.root, "tag", "-d", "round-0000")
    raw(git.root, "fetch", "-q", "origin", "tag", "round-0000")
    assert len(sync(git, layout)) == 1, "the way out that it names works"


def test_the_remotes_tags_are_fetched_before_one_is_made(git: Git, bare: Path, tmp_path: Path) -> None:
    layout = Layout(git.root)
    raw(git.root, "tag", "-a", "-m", "As an older engine made it", "round-0001")
    raw(git.root, "push", "-q", "--tags", "origin", "main")
    theirs = raw(bare, "rev-parse", "round-0001")
    raw(tmp_path, "clone", "-q", "--no-tags", str(bare), "clone")
    clone = Git(tmp_path / "clone")
    assert clone.tags() == {}
    assert clone.fetch_tags("origin", "round-*") == {}
    assert raw(clone.root, "rev-parse", "round-0001") == theirs
    raw(git.root, "tag", "-d", "round-0001")
    tag_round(git, layout, 1) if (git.root / "rounds/0001/round.json").exists() else git.fetch_tags("origin", "round-*")
    assert raw(git.root, "rev-parse", "round-0001") == theirs
    raw(clone.root, "tag", "-f", "-a", "-m", "moved", "round-0001", "HEAD~1")
    assert clone.fetch_tags("origin", "round-*") == {"round-0001": theirs}, "named, and left as it is"


# Clones that lack something ----------------------------------------------------------------------------------------


CLONES = {
    "depth": (["--depth=1"], "shallow clone.*`git fetch --unshallow --tags`"),
    "since": (["--shallow-exclude=other"], "shallow clone"),
    "blobless": (["--filter=blob:none"], "partial clone.*`git clone ADDRESS`"),
    "treeless": (["--filter=tree:0"], "partial clone"),
    "sized": (["--filter=blob:limit=1k"], "partial clone"),
}


@pytest.mark.parametrize(("options", "says"), CLONES.values(), ids=CLONES)
def test_a_clone_without_all_of_history_is_refused_and_the_command_mends_it(
    git: Git, bare: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    git.tag("round-0000", "Zero", "HEAD~1")
    raw(git.root, "push", "-q", "--tags", "origin", "main", "other")
    for name in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        raw(bare, "config", name, "true")
    raw(tmp_path, "clone", "-q", *options, f"file://{bare}", "clone")
    clone = Git(tmp_path / "clone")
    with pytest.raises(ManualActionRequired, match=says) as refused:
        check_ready(Layout(clone.root), clone)
    command = next(word for word in str(refused.value).split("`") if word.startswith("git fetch"))
    subprocess.run(["sh", "-c", command], cwd=clone.root, check=False, timeout=60, capture_output=True)
    check_ready(Layout(clone.root), clone)
    shutil.rmtree(bare)
    assert clone.brought(PLAN) and clone.check_objects() == []
    assert clone.show("HEAD~1", PLAN) == f"{PLAN} 1\n"


def test_grafts_and_replacements_change_no_history(git: Git) -> None:
    first = git.brought(PLAN)
    write(git.root, ".git/info/grafts", f"{git.head()}\n")
    raw(git.root, "replace", str(git.head()), "other")
    assert git.brought(PLAN) == first
    assert git.show("HEAD", "params.yaml") == "ours\n"


# What git has lost ---------------------------------------------------------------------------------------------------


def damage(git: Git, digest: str, how: str) -> None:
    """Damage one object of a repository, loose or in a pack."""
    objects = git.root / ".git/objects"
    for pack in objects.glob("pack/*.pack"):
        moved = pack.rename(git.root.parent / pack.name)
        for side in objects.glob("pack/*"):
            side.unlink()
        with moved.open("rb") as feed:
            subprocess.run(["git", "unpack-objects", "-q"], cwd=git.root, stdin=feed, check=True)
    path = objects / digest[:2] / digest[2:]
    path.chmod(0o600)
    match how:
        case "deleted":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "zeroed":
            path.write_bytes(bytes(path.stat().st_size))
        case "cut":
            path.write_bytes(path.read_bytes()[:-4])
        case "another's":
            other = raw(git.root, "hash-object", "-w", str(write(git.root.parent, "x", "forged\n")))
            path.write_bytes((objects / other[:2] / other[2:]).read_bytes())


DAMAGES = ["deleted", "empty", "zeroed", "cut", "another's"]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("packed", [False, True], ids=["loose", "packed"])
def test_a_lost_file_is_an_error_that_names_it(git: Git, how: str, packed: bool) -> None:
    digest = raw(git.root, "rev-parse", f"HEAD:{PLAN}")
    if packed:
        raw(git.root, "gc", "-q")
    damage(git, digest, how)
    with pytest.raises(RepositoryError, match=f"git has lost {PLAN} of HEAD.*{digest}"):
        git.show("HEAD", PLAN)
    with pytest.raises(RepositoryError, match=f"git has lost {PLAN} of HEAD.*{digest}"):
        git.read("HEAD", ["params.yaml", "nowhere", PLAN, "engine.json"])
    assert git.read("HEAD", ["params.yaml", "nowhere"]) == {"params.yaml": "ours\n"}
    assert git.show("HEAD", "nowhere") is None and git.show("HEAD", "rounds") is None
    assert PLAN in git.files("HEAD", "rounds") and PLAN in git.modes("HEAD")
    assert git.check_objects() != []


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("what", ["rounds", "rounds/0001", ""])
def test_a_lost_folder_is_an_error_that_names_it(git: Git, how: str, what: str) -> None:
    digest = raw(git.root, "rev-parse", f"HEAD:{what}" if what else "HEAD^{tree}")
    damage(git, digest, how)
    named = rf"{what} at HEAD|{digest}|HEAD"
    for read in (
        lambda: git.show("HEAD", PLAN),
        lambda: git.read("HEAD", [PLAN]),
        lambda: git.files("HEAD", "rounds"),
        lambda: git.modes("HEAD"),
        lambda: git.commit("Ours", [write(git.root, PLAN, "changed\n")]),
    ):
        with pytest.raises(RepositoryError, match=named):
            read()
    assert git.check_objects() != []


@pytest.mark.parametrize("how", DAMAGES)
def test_a_lost_commit_is_no_missing_commit(git: Git, how: str) -> None:
    head = str(git.head())
    git.tag("round-0001", "One")
    damage(git, head, how)
    for read in (git.head, git.commit_time, lambda: git.modes("HEAD"), lambda: git.brought(PLAN)):
        with pytest.raises(RepositoryError):
            read()
    with pytest.raises((RepositoryError, ManualActionRequired)):
        check_ready(Layout(git.root), git)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_lost_tag_is_no_missing_tag(git: Git, how: str) -> None:
    git.tag("round-0001", "One")
    damage(git, raw(git.root, "rev-parse", "round-0001"), how)
    with pytest.raises(RepositoryError):
        git.tags()


@pytest.mark.parametrize("content", [b"", bytes(41), b"nonsense\n"])
def test_a_broken_tag_is_named_with_its_file(git: Git, content: bytes) -> None:
    git.tag("round-0001", "One")
    (git.root / ".git/refs/tags/round-0001").write_bytes(content)
    with pytest.raises(RepositoryError, match=r"cannot read refs/tags/round-0001: delete .*\.git/refs/tags/round-0001"):
        git.tags()


def test_a_revision_that_git_does_not_know_is_said_so(git: Git) -> None:
    with pytest.raises(RepositoryError, match="git has no round-0007 here: `git fetch --tags`"):
        git.show("round-0007", PLAN)


def test_bytes_come_back_as_they_were_stored(git: Git) -> None:
    text = 'a\r\nb\rc\n\x00\x85\u2028"ü"\n\n'
    git.commit("Odd", [write(git.root, PLAN, text), write(git.root, "rounds/0001/round.json", "\r\n")])
    assert git.show("HEAD", PLAN) == text
    assert git.read("HEAD", [PLAN, "rounds/0001/round.json", "engine.json"]) == {
        PLAN: text,
        "rounds/0001/round.json": "\r\n",
        "engine.json": "engine.json 1\n",
    }
    git.commit("Not UTF-8", [git.root / PLAN]) if (git.root / PLAN).write_bytes(b"\xff\xfe\n") else None
    assert git.blob("HEAD", PLAN) == b"\xff\xfe\n"


# A git that fails ----------------------------------------------------------------------------------------------------


def empty_ref(root: Path) -> None:
    (root / ".git/refs/heads/main").write_text("")


def zeroed_ref(root: Path) -> None:
    (root / ".git/refs/heads/main").write_bytes(bytes(41))


def odd_ref(root: Path) -> None:
    (root / ".git/refs/heads/main").write_text("not a commit\n")


def lost_ref(root: Path) -> None:
    (root / ".git/refs/heads/main").unlink()


def lost_ref_and_log(root: Path) -> None:
    lost_ref(root)
    shutil.rmtree(root / ".git/logs")


def lost_refs(root: Path) -> None:
    shutil.rmtree(root / ".git/refs")
    (root / ".git/refs").mkdir()


def empty_head(root: Path) -> None:
    (root / ".git/HEAD").write_text("")


def lost_head(root: Path) -> None:
    (root / ".git/HEAD").unlink()


def torn_settings(root: Path) -> None:
    (root / ".git/config").write_text("[core\n\tbare = ")


def another_format(root: Path) -> None:
    raw(root, "config", "core.repositoryFormatVersion", "99")


def lost_git(root: Path) -> None:
    shutil.rmtree(root / ".git")


def ref_to_nowhere(root: Path) -> None:
    (root / ".git/refs/heads/main").write_text("1" * 40 + "\n")


def orphan(root: Path) -> None:
    raw(root, "switch", "-q", "--orphan", "fresh")


def foreign_owner(_: Path) -> None:
    os.environ["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"


FAILURES: list[tuple[Callable[[Path], None], str]] = [
    (empty_ref, "cannot read refs/heads/main: .*broken ref.*update-ref refs/heads/main [0-9a-f]{40}`"),
    (zeroed_ref, "refs/heads/main"),
    (odd_ref, "refs/heads/main"),
    (lost_ref, "refs/heads/main points to no commit.*update-ref refs/heads/main [0-9a-f]{40}`"),
    (lost_ref_and_log, "refs/heads/main points to no commit.*update-ref refs/heads/main COMMIT`"),
    (lost_refs, "points to no commit|not a git repository"),
    (empty_head, "not a git repository|HEAD"),
    (lost_head, "not a git repository"),
    (torn_settings, "bad config"),
    (another_format, "version.* 99"),
    (lost_git, "not a git repository"),
    (ref_to_nowhere, "1111111|refs/heads/main"),
    (orphan, "refs/heads/fresh points to no commit"),
    (foreign_owner, "dubious ownership.*safe.directory"),
]


def contents(root: Path) -> dict[str, str]:
    """Every file below `root` with a digest."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(("fail", "says"), FAILURES, ids=[failure[0].__name__ for failure in FAILURES])
def test_a_git_that_fails_is_never_a_repository_without_a_commit(
    git: Git, fail: Callable[[Path], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from al_pipeline.operations.init import init
    from al_pipeline.workspace.workspace import LAYOUT_VERSION

    write(git.root, "al-workspace.json", f'{{"layout": {LAYOUT_VERSION}, "workspace_id": "0123456789ab"}}')
    git.commit("Marker", [git.root / "al-workspace.json"])
    monkeypatch.delenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", raising=False)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "0")
    fail(git.root)
    with pytest.raises(RepositoryError, match=says) as failed:
        git.head()
    assert "al init" not in str(failed.value)
    with pytest.raises(RepositoryError, match=says):
        check_ready(Layout(git.root), git)
    before = contents(git.root)
    with pytest.raises((RepositoryError, BadInput)) as refused:
        init(git.root, ["other", "labels"])
    assert contents(git.root) == before, "a refused init changes no byte"
    assert "Traceback" not in str(refused.value)


def test_before_the_first_commit_there_is_none_and_nothing_fails(tmp_path: Path) -> None:
    git = Git(tmp_path)
    git.init()
    assert git.head() is None and git.branch() == "main" and git.tags() == {}
    write(tmp_path, "a", "1\n")
    raw(tmp_path, "add", "a")
    assert git.head() is None, "a killed init may have staged"
    tree = raw(tmp_path, "write-tree")
    raw(tmp_path, "commit-tree", "-m", "Killed before the branch knew it", tree)
    assert git.head() is None


# What the user has git ignore ----------------------------------------------------------------------------------------

PATTERNS = [
    "*.jsonl",
    "*.json",
    "*.csv",
    "*.lock",
    "rounds/",
    "rounds",
    "*.dvc",
    ".dvc",
    "data",
    "*",
    "engine*",
    "plan.*",
]


@pytest.mark.parametrize("place", ["global", "exclude", "parent"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_the_user_ignores_is_committed_where_it_is_ours(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, place: str
) -> None:
    root, layout = git.root, Layout(git.root)
    if place == "global":
        settings = write(tmp_path, "gitconfig", f"[core]\n\texcludesFile = {write(tmp_path, 'ignore', pattern)}\n")
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    else:
        write(root, ".git/info/exclude" if place == "exclude" else ".gitignore", f"{pattern}\n")
    ours = {
        "rounds/0002/plan.jsonl", "rounds/0001/round.json", "rounds/predictions.csv", "rounds/metrics.json",
        "rounds/overrides.json", "rounds/interventions/000001.json", "dvc.lock", "data/pool.dvc", "models/encoder.dvc",
    }  # fmt: skip
    for name in ours:
        write(root, name, f"{name}\n")
    assert set(git.changed(layout.owned)) == ours
    git.commit("Ours", layout.owned)
    assert ours <= set(git.files("HEAD", ".")) or ours <= set(git.modes("HEAD"))
    assert git.changed(layout.owned) == []


def test_what_is_ignored_and_not_ours_is_left_alone(git: Git) -> None:
    layout = Layout(git.root)
    write(git.root, ".git/info/exclude", ".DS_Store\n*.swp\n*~\n")
    for name in ("rounds/.DS_Store", "rounds/0001/.plan.jsonl.swp", "rounds/0001/plan.jsonl~", "data/pool/x.swp"):
        write(git.root, name, "x")
        assert not is_ours(name)
    assert git.changed(layout.owned) == []
    write(git.root, "rounds/notes.txt", "not ignored, and nobody's")
    assert git.changed(layout.owned) == ["rounds/notes.txt"]


LAST = ["*.dvc", "dvc.lock", "*.lock", "data/", "/models", "*", "dvc.yaml", "data/pool.dvc"]


@pytest.mark.parametrize("place", [".gitignore", "data/.gitignore", "models/.gitignore"])
@pytest.mark.parametrize("pattern", LAST)
def test_a_line_behind_ours_that_hides_a_file_from_dvc_is_named(git: Git, pattern: str, place: str) -> None:
    layout = Layout(git.root)
    for path, text in git_files(layout, "", "").items():
        path.write_text(text)
    check_not_ignored(layout, git)
    before = (git.root / place).read_text() if (git.root / place).exists() else ""
    write(git.root, place, f"{before}\n{pattern}\n")
    hidden = raw(git.root, "check-ignore", "--no-index", *(str(path) for path in layout.of_dvc), check=False)
    if not hidden:  # as git says itself; `dvc.lock` in data/ is no file of ours
        check_not_ignored(layout, git)
        return
    line = len((git.root / place).read_text().splitlines())
    with pytest.raises(ManualActionRequired, match=re.escape(f"`{place}:{line}: {pattern}`")) as said:
        check_not_ignored(layout, git)
    assert str(said.value).startswith("git ignores ")
    for name in git.ignored(layout.of_dvc):
        assert any(name in line for line in hidden.splitlines())
    write(git.root, place, before)
    check_not_ignored(layout, git)


def test_what_is_ignored_before_our_lines_or_elsewhere_hides_nothing_from_dvc(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(git.root)
    settings = write(tmp_path, "gitconfig", f"[core]\n\texcludesFile = {write(tmp_path, 'ignore', '*')}\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    write(git.root, ".git/info/exclude", "*.dvc\n")
    for path, text in git_files(layout, "*.lock\n*.dvc\n", "").items():
        path.write_text(text)
    check_not_ignored(layout, git)
    write(git.root, ".gitignore", layout.git_ignore.read_text() + "*.dvc\n!*.dvc\n# dvc.lock\nrounds/\n")
    check_not_ignored(layout, git)


# What git converts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", ["", "* text=auto eol=crlf", "* ident", "* filter=rot", "*.json text"])
@pytest.mark.parametrize("eol", ["lf", "crlf"])
@pytest.mark.parametrize("safe", ["true", "warn", "false"])
@pytest.mark.parametrize("auto", ["true", "input", "false"])
def test_bytes_survive_every_conversion_that_is_set(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto: str, safe: str, eol: str, attributes: str
) -> None:
    settings = write(
        tmp_path,
        "gitconfig",
        f"[core]\n\tautocrlf = {auto}\n\tsafecrlf = {safe}\n\teol = {eol}\n"
        f"\tattributesFile = {write(tmp_path, 'attributes', attributes + chr(10))}\n"
        '[filter "rot"]\n\tclean = tr a-z b-za\n\tsmudge = tr b-za a-z\n\trequired = true\n',
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    root, layout = git.root, Layout(git.root)
    for path, text in git_files(layout, "", "").items():
        path.write_text(text)
    texts = {PLAN: "a\nb\n", "rounds/0002/plan.jsonl": "a\r\nb\n", "rounds/metrics.json": "$Id$\r\n", "dvc.lock": "x\n"}
    for name, text in texts.items():
        write(root, name, text)
    git.commit("Ours", [*layout.owned, layout.git_ignore, layout.git_attributes])
    for name, text in texts.items():
        assert git.blob("HEAD", name) == text.encode()
    assert git.changed(layout.tracked) == []
    assert raw(root, "status", "--porcelain") == "", "and as the user sees it"
    raw(tmp_path, "clone", "-q", str(root), "theirs")
    git.tag("round-0001", "One")
    git.clone(tmp_path / "ours", "round-0001")
    for name, text in texts.items():
        assert (tmp_path / "theirs" / name).read_bytes() == text.encode(), "a clone that the user makes"
        assert (tmp_path / "ours" / name).read_bytes() == text.encode()


def test_a_clone_that_git_converted_is_not_accused_and_put_right(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a workspace of an engine that knew no `.gitattributes` looks in a clone made under `core.autocrlf`."""
    settings = write(tmp_path, "gitconfig", "[core]\n\tautocrlf = true\n\tsafecrlf = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    raw(tmp_path, "clone", "-q", str(git.root), "clone")
    clone = Git(tmp_path / "clone")
    layout = Layout(clone.root)
    assert layout.engine.read_bytes() == b"engine.json 1\r\n"
    os.utime(clone.root / PLAN)
    assert "engine.json" in converted(layout, clone)
    edited = write(clone.root, "rounds/0000/plan.jsonl", "edited by hand\r\n")
    done = put_back_converted(layout, clone)
    assert {"engine.json", "params.yaml", PLAN} <= set(done)
    assert layout.engine.read_bytes() == b"engine.json 1\n"
    assert edited.read_bytes() == b"edited by hand\r\n", "an edit is no conversion"
    assert keep_bytes(layout, clone) == [".gitattributes", ".gitignore"]
    assert keep_bytes(layout, clone) == []
    assert clone.changed(layout.tracked) == ["rounds/0000/plan.jsonl"]


def test_dvcs_own_files_that_an_older_engine_left_converted_are_put_right(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It turned conversion off and put back its own files alone; git notices the others when it next reads them."""
    settings = write(tmp_path, "gitconfig", "[core]\n\tautocrlf = true\n")
    texts = {".dvcignore": "# patterns\n*.tmp\n", ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n"}
    git.commit("DVC's", [write(git.root, name, text) for name, text in texts.items()])
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    raw(tmp_path, "clone", "-q", str(git.root), "clone")
    clone = Git(tmp_path / "clone")
    layout = Layout(clone.root)
    put_back_converted(layout, clone)
    keep_bytes(layout, clone)
    for name, text in texts.items():
        write(clone.root, name, text.replace("\n", "\r\n"))
    write(clone.root, ".dvc/config.local", "password = x\n")
    assert raw(clone.root, "status", "--porcelain").split() == ["M", ".dvc/.gitignore", "M", ".dvcignore"]
    assert put_back_converted(layout, clone) == sorted(texts)
    for name, text in texts.items():
        assert (clone.root / name).read_bytes() == text.encode()
    assert raw(clone.root, "status", "--porcelain") == ""
    assert put_back_converted(layout, clone) == []


def test_a_workspace_of_an_older_engine_has_dvc_verify_from_now_on(git: Git) -> None:
    """A `dvc pull` by hand, here and in each later clone."""
    layout = Layout(git.root)
    keep_bytes(layout, git)
    config = layout.root / ".dvc/config"
    old = (
        "[core]\n    remote = store\n['remote \"store\"']\n    url = /r\n# mine\n['remote \"b\"']\n    verify = false\n"
    )
    git.commit("Old", [write(git.root, ".dvc/config", old)])
    write(git.root, ".dvc/config", old + "# being edited\n")
    assert bring_in_line(layout, git) == []
    write(git.root, ".dvc/config", old)
    assert bring_in_line(layout, git) == [".dvc/config"]
    wanted = old.replace("    url = /r", "    verify = true\n    url = /r")
    assert config.read_text() == wanted == git.show("HEAD", ".dvc/config")
    assert bring_in_line(layout, git) == [], "what says something of it stays"

    git.commit("Old again", [write(git.root, ".dvc/config", old)])
    write(git.root, ".dvc/config", wanted)
    assert bring_in_line(layout, git) == [".dvc/config"], "killed before its commit"
    accepted = old + "    keyfile = /k\n"
    git.commit("Accepted by `al trust`, by its content", [write(git.root, ".dvc/config", accepted)])
    assert bring_in_line(layout, git) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("[core]\n    remote = store\n", None),
        ("['remote \"a\"']\n\tverify=true\n", None),
        ('[remote "a"]\nurl = x', '[remote "a"]\n    verify = true\nurl = x\n'),
        (
            "['remote \"a\"']\n['remote \"b\"']",
            "['remote \"a\"']\n    verify = true\n['remote \"b\"']\n    verify = true\n",
        ),
        ("[core]\nverify = x\n['remote \"a\"']\n", "[core]\nverify = x\n['remote \"a\"']\n    verify = true\n"),
    ],
)
def test_verification_is_said_of_each_remote_that_says_nothing(before: str, after: str | None) -> None:
    assert with_verification(before) == (before if after is None else after)


def test_a_conversion_that_nothing_turns_off_is_refused_before_it_is_stored(git: Git) -> None:
    write(git.root, ".git/info/attributes", "*.jsonl filter=rot\n")
    raw(git.root, "config", "filter.rot.clean", "tr a-z b-za")
    head = git.head()
    with pytest.raises(RepositoryError, match=rf"git would not store {PLAN} unchanged: `git check-attr --all {PLAN}`"):
        git.commit("Ours", [write(git.root, PLAN, "abc\n")])
    assert git.head() == head and raw(git.root, "diff", "--cached", "--name-only") == ""


def test_lines_of_the_users_own_stay_and_an_edit_is_waited_for(git: Git) -> None:
    layout = Layout(git.root)
    layout.git_ignore.write_text("/mine\n")
    git.commit("Mine", [layout.git_ignore])
    layout.git_attributes.write_text("*.md text\n")
    assert keep_bytes(layout, git) == [], "somebody is editing one of them"
    git.commit("Mine too", [layout.git_attributes])
    keep_bytes(layout, git)
    assert layout.git_ignore.read_text().startswith("/mine\n")
    assert layout.git_attributes.read_text().startswith("*.md text\n")
    assert git.changed(layout.tracked) == []


# Whole commands ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_command_touches_a_repository_in_the_middle_of_a_persons_work(
    once: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor a clone without all of history. One without tags gets them, fetched or made again as the same objects."""
    root = go_on(once, tmp_path)[0].layout.root
    monkeypatch.setenv("COLUMNS", "1000")
    item = next(iter(set(once[1]) - {task.item_id for task in read_plan(Git(root), 1)}))
    commands = (["round"], ["rollback", "0"], ["ask", item], ["pause"], ["approve"], ["adopt"])

    def al(place: Path, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["al", "-C", str(place), *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return stop.value.code, capsys.readouterr().err

    def state(place: Path) -> tuple[str, ...]:
        asked = (["status", "--porcelain"], ["ls-files", "--stage"], ["for-each-ref"], ["log", "-1", "--format=%H"])
        return tuple(raw(place, *words) for words in asked)

    raw(root, "switch", "-qc", "other")
    write(root, "notes", "theirs\n")
    raw(root, "add", "notes")
    raw(root, "commit", "-qm", "Theirs")
    raw(root, "switch", "-q", "main")
    write(root, "notes", "ours\n")
    raw(root, "add", "notes")
    raw(root, "commit", "-qm", "Ours")
    raw(tmp_path, "clone", "-q", "--depth=1", f"file://{root}", "shallow")
    for begin, says, end in (
        (merging, "a merge is in progress", ["merge", "--abort"]),
        (rebasing, "a rebase is in progress", ["rebase", "--abort"]),
        (None, "is a shallow clone, .*`git fetch --unshallow --tags`", None),
    ):
        place = root if begin else tmp_path / "shallow"
        if begin:
            begin(root)
        before = state(place)
        for words in commands:
            code, said = al(place, *words)
            assert code == 6 and re.search(f"Error: [^\n]*{says}[^\n]*\n\\Z", said), (words, said)
            assert said.count("Error") == 1 and state(place) == before, words
        if end:
            raw(root, *end)

    raw(tmp_path, "clone", "-q", "--no-tags", f"file://{root}", "without")
    place = tmp_path / "without"
    tags = raw(root, "for-each-ref", "refs/tags")
    before = state(place)
    code, said = al(place, "rollback", "0")
    assert code == 3 and "round-0000 has no tag yet; `al round` creates it" in said and state(place) == before
    for words in (["adopt"], ["round"]):
        assert al(place, *words)[0] == 5, "Label Studio is not known here"
        assert raw(place, "for-each-ref", "refs/tags") == tags
        raw(place, "tag", "-d", "round-0000")
