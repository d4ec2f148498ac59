"""What a ref names is on disk before the ref is: the calls of whole rounds, replayed as a disk without power sees them.

The model is stricter than a journaling file system: bytes are kept once an fsync of the file came after the last
write, a name once an fsync of its folder came after it was made.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from harness import tools_first
from tracing import FILES, WRITES, Call, read_calls, trace

from al_pipeline.files import sync_names
from al_pipeline.integrations.git import Git
from al_pipeline.workspace.layout import Layout

ROUNDS = """
import sys
from pathlib import Path
from harness import play, small_workspace
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.ask import ask
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_plans
from al_pipeline.operations.intervene import rollback
from al_pipeline.operations.tick import tick
workspace, truth = small_workspace(Path(sys.argv[1]))
oracle = SimulatedOracle()
assert play(workspace, oracle, truth, 2).published == (1,)

def some_answers():
    for key in oracle.queue("ann@example.org")[:2]:
        oracle.answer(key, "ann@example.org", truth[key.rsplit(":", 1)[1]])
    return tick(workspace, lambda: oracle).published

asked = {task.item_id for task in read_plans(Git(workspace.layout.root)).values()}
assert some_answers() == ()
with open_dvc(workspace.layout) as dvc:
    ask(workspace, dvc, [min(truth.keys() - asked)], "why not")
    rollback(workspace, dvc, 0, labels=True, model=True, params=False, reason="bad labels")
assert tick(workspace, lambda: oracle).published == (2,)
assert some_answers() == ()
"""
"""Two rounds; some answers, which are pulled into the inbox; two interventions, of which the rollback closes the open
round; and some more answers, which stay in the inbox."""


@dataclass
class Disk:
    """What a disk keeps when the power goes, after each call."""

    kept: set[str] = field(default_factory=set)
    """Files whose bytes it keeps."""
    unnamed: set[str] = field(default_factory=set)
    """Files and folders whose names it may forget."""

    def apply(self, call: Call) -> None:
        """Carry out one call."""
        match call.name, call.paths:
            case (("open" | "openat" | "creat"), (path,)):
                if "O_CREAT" in call.words or call.name == "creat":
                    self.unnamed.add(path)
                if "O_CREAT" in call.words or "O_TRUNC" in call.words:
                    self.kept.discard(path)
            case (("write" | "pwrite64" | "writev" | "pwritev" | "sendfile" | "ftruncate" | "truncate"), (path, *_)):
                self.kept.discard(path)
            case "ioctl", (path, *_) if "FICLONE" in call.words:
                self.kept.discard(path)
            case "copy_file_range", (_, path):
                self.kept.discard(path)
            case (("fsync" | "fdatasync"), (path,)):
                self.kept.add(path)
                self.unnamed = {name for name in self.unnamed if os.path.dirname(name) != path}
            case (("rename" | "renameat" | "renameat2"), (before, after)):
                self._move(before, after)
            case (("link" | "linkat"), (before, after)):
                self.unnamed.add(after)
                if before in self.kept:
                    self.kept.add(after)
            case (("mkdir" | "mkdirat" | "symlink" | "symlinkat"), (*_, path)):
                self.unnamed.add(path)
            case (("unlink" | "unlinkat" | "rmdir"), (path,)):
                self.kept.discard(path)
                self.unnamed.discard(path)

    def _move(self, before: str, after: str) -> None:
        for names in (self.kept, self.unnamed):
            names.difference_update([name for name in names if name == after or name.startswith(f"{after}/")])
            moved = [name for name in names if name == before or name.startswith(f"{before}/")]
            names.difference_update(moved)
            names.update(after + name.removeprefix(before) for name in moved)
        self.unnamed.add(after)

    def names(self, path: str) -> bool:
        """Whether a path leads to what it led to."""
        return not any(str(one) in self.unnamed for one in (Path(path), *Path(path).parents))

    def lacks(self, paths: Iterable[Path], *, by_name: bool = True) -> list[str]:
        """Those of `paths` that may be lost, or torn."""
        found = map(str, paths)
        return sorted(path for path in found if path not in self.kept or (by_name and not self.names(path)))


def objects_of(git: Git, commit: str) -> list[str]:
    """The objects that the records of a commit name, by digest."""
    found, names = [], git.run("ls-tree", "-r", "--name-only", commit).stdout.splitlines()
    for name in names:
        if name == "dvc.lock" or name.endswith(".dvc"):
            record = yaml.safe_load(git.show(commit, name) or "{}")
            stages = record.get("stages", {}).values() if name == "dvc.lock" else [record]
            outs = [out for stage in stages for out in stage.get("outs", ())]
            found += [out["md5"] for out in outs if out["path"] not in names]  # else git keeps it
    listings = [stored(git.root / ".dvc/cache", one) for one in found if one.endswith(".dir")]
    return found + [entry["md5"] for listing in listings for entry in json.loads(listing.read_text("utf-8"))]


def stored(store: Path, digest: str) -> Path:
    return store / "files/md5" / digest[:2] / digest[2:]


@pytest.mark.slow
def test_no_ref_outlives_what_it_names(tmp_path: Path) -> None:
    folder, log = Path(os.path.realpath(tmp_path)) / "w", tmp_path / "log"
    tests = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    script = [sys.executable, "-c", ROUNDS, str(folder)]
    done = trace(script, log, (*FILES, *WRITES), tmp_path, {**tools_first(), **tests})
    assert done.returncode == 0, done.stderr
    root, remote = folder / "workspace", folder / "remote"
    git, inside = Git(root), folder / "workspace/.git"
    commits = git.run("rev-list", "--reverse", "HEAD").stdout.split()
    tags = {f"{inside}/refs/tags/{name}": name for name in git.tags()}
    assert sorted(tags.values()) == ["round-0000", "round-0001", "round-0002"]
    layout = Layout(root)

    def loose(*words: str) -> list[Path]:
        named = git.run("rev-list", "--objects", "--no-object-names", *words).stdout.split()
        return [inside / "objects" / name[:2] / name[2:] for name in named]

    disk, seen, lost, looked = Disk(), [], [], 0
    pulled, parts, pulls, consumed = set[Path](), set[Path](), 0, 0
    for call in read_calls(log):
        path = Path(call.paths[-1]) if call.paths else Path()
        if path.parent == layout.inbox_events and path.suffix == ".jsonl":
            if call.name == "rename":
                pulled.add(path)
            elif call.name == "unlink" and path in pulled:  # the ledger has its answers
                consumed += 1
                lost += disk.lacks(parts)
                pulled.remove(path)
        elif call.name == "rename" and path == layout.pull_state:  # they are not pulled again
            pulls += len(pulled)
            lost += disk.lacks(pulled)
        elif call.name == "rename" and path.parent == layout.events:
            parts.add(path)
        ref = call.paths[-1] if call.name == "rename" else ""
        if ref == f"{inside}/refs/heads/main":
            seen.append(commits[len(seen)])
            objects = objects_of(git, seen[-1])
            data = [stored(store, one) for one in objects for store in (remote, root / ".dvc/cache")]
            changed = git.run("show", "--format=", "--name-only", "--diff-filter=AM", seen[-1]).stdout.splitlines()
            looked += len(data)
            lost += disk.lacks([*data, *(root / name for name in changed)])
            lost += disk.lacks(loose(seen[-1]), by_name=False)
            lost += disk.lacks([Path(f"{ref}.lock")], by_name=False)
        elif ref in tags:
            commit = git.tags()[tags.pop(ref)]
            assert seen[-1] == commit
            lost += disk.lacks([*loose(commit), inside / "index", inside / "HEAD", inside / "refs/heads/main"])
            lost += disk.lacks([*loose(Path(ref).name, "--not", commit), inside / "config"])
            lost += disk.lacks([Path(f"{ref}.lock")], by_name=False)
        disk.apply(call)
    assert seen == commits and not tags and looked > 40
    assert lost == []
    assert pulls > 3 and consumed == 3 and len(pulled) == 1 and disk.lacks(pulled) == []
    at_last = [inside / "refs/tags" / name for name in git.tags()]
    assert disk.lacks([*at_last, inside / "refs/heads/main", inside / "index"]) == []


def test_the_model_forgets_what_was_not_synced() -> None:
    """Else the test above shows nothing."""

    def after(*calls: tuple[str, tuple[str, ...], str]) -> list[str]:
        disk = Disk()
        for name, paths, words in calls:
            disk.apply(Call(name, paths, words))
        return disk.lacks([Path("/a/b")])

    made = ("openat", ("/a/.t",), "O_WRONLY|O_CREAT")
    write, sync, move = ("write", ("/a/.t",), ""), ("fsync", ("/a/.t",), ""), ("rename", ("/a/.t", "/a/b"), "")
    names = ("fsync", ("/a",), "")
    assert after(made, write, sync, move, names) == []
    assert after(("mkdir", ("/a",), ""), made, write, sync, move, names) == ["/a/b"], "its folder's own name"
    assert after(("mkdir", ("/a",), ""), made, write, sync, move, names, ("fsync", ("/",), "")) == []
    for order in ([made, write, move, names], [made, sync, write, move, names], [made, write, sync, move]):
        assert after(*order) == ["/a/b"]
    assert after(made, write, sync, move, names, ("openat", ("/a/b",), "O_WRONLY|O_TRUNC")) == ["/a/b"]
    copied = ("copy_file_range", ("/x", "/a/b"), "")
    assert after(made, write, sync, move, names, copied) == ["/a/b"]


def test_calls_are_read_as_strace_writes_them(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        '7 openat(AT_FDCWD</w>, "a", O_RDONLY) = 3</w/a>\n'
        "7 fsync(3</w/a> <unfinished ...>\n"
        '8 rename("x y", "/z") = -1 ENOENT (No such file or directory)\n'
        "7 <... fsync resumed>)              = 0\n"
        '7 link("t/1", "t/2") = 0\n'
        '8 renameat2(AT_FDCWD</v>, "p", 5</u>, "q", RENAME_NOREPLACE) = 0\n'
        "8 copy_file_range(4</u/in>, NULL, 5</u/out>, NULL, 10, 0) = 10\n"
        "8 +++ exited with 0 +++\n"
    )
    assert [(call.name, call.paths) for call in read_calls(log)] == [
        ("openat", ("/w/a",)),
        ("fsync", ("/w/a",)),
        ("link", ("/w/t/1", "/w/t/2")),
        ("renameat2", ("/v/p", "/u/q")),
        ("copy_file_range", ("/u/in", "/u/out")),
    ]


def test_a_folder_that_cannot_be_read_ends_the_way_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of ours was made in it. (Root may read every folder, so that it is said here.)"""
    asked: list[str] = []

    def refuse(folder: str) -> None:
        asked.append(folder)
        if folder == os.path.realpath(tmp_path):
            raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr("al_pipeline.files.sync", refuse)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").touch()
    sync_names([tmp_path / "a/b/c", tmp_path / "a/d"])
    real = os.path.realpath(tmp_path)
    assert asked == [f"{real}/a/b", f"{real}/a", real]
