"""What an ingest and an encoding will take is told before they begin, and refused if a disk has no room."""

from __future__ import annotations

import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
from harness import change_params, write_pool

from al_pipeline.errors import NoRoom, RepositoryError
from al_pipeline.features.encoder import install_encoder
from al_pipeline.integrations.dvc.settings import change_config, object_folders
from al_pipeline.operations import ingest as ingesting
from al_pipeline.operations import needs
from al_pipeline.operations.build import encode
from al_pipeline.operations.checks.data import check_encoding as finding_of
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.init import init
from al_pipeline.operations.needs import check_encoding, next_encoding, refuse_without_room
from al_pipeline.operations.sources import ingest_sources
from al_pipeline.quantities import format_duration, format_size
from al_pipeline.stages import encode as stage
from al_pipeline.workspace.workspace import Workspace, open_workspace

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Empty, with the default encoder, which is not installed in it yet."""
    return init(tmp_path / "workspace", ["ham", "spam"], remote=str(tmp_path / "remote"))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    write_pool(tmp_path / "pool.jsonl", 300)
    return tmp_path / "pool.jsonl"


def free(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """Leave so many bytes on every disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - left, left))


def test_an_ingest_without_room_is_refused_before_it_writes(
    workspace: Workspace, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_of = pool.stat().st_size
    free(monkeypatch, 4 * bytes_of - 1)  # twice for the draw of the test set, then DVC's cache and the remote
    with pytest.raises(NoRoom, match=r"this ingest needs about .* on the disk of .*, where .* are free") as error:
        ingest(workspace, [pool])
    assert error.value.exit_code == 5
    assert not any(workspace.layout.inbox.rglob("*.parquet"))
    free(monkeypatch, 4 * bytes_of)
    assert ingest(workspace, [pool]).added == 240
    written = sum(path.stat().st_size for path in workspace.layout.inbox.rglob("*.parquet"))
    assert written < bytes_of, "the estimate is an upper bound"


def test_a_source_file_without_room_is_reported_and_read_later(
    workspace: Workspace, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_params(workspace, {"sources: [] ": "sources: [incoming/*.jsonl] "})
    (workspace.layout.root / "incoming").mkdir()
    shutil.copyfile(pool, workspace.layout.root / "incoming/pool.jsonl")
    workspace, later = open_workspace(workspace.layout.root), time.time() + 120
    with monkeypatch.context() as patch:
        free(patch, 1000)
        added, lines = ingest_sources(workspace, later)
    assert added == 0
    assert any("was not ingested: this ingest needs about" in line for line in lines), lines
    assert ingest_sources(workspace, later)[0] == 300


def test_disks_are_told_apart(tmp_path: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 100)
    refuse_without_room("this", [(tmp_path / "new/folder", 90), (other_disk, 90)])
    with pytest.raises(NoRoom, match=f"about .* on the disk of {tmp_path}, where "):
        refuse_without_room("this", [(tmp_path / "new/folder", 60), (other_disk, 90), (tmp_path, 60)])


def test_a_large_ingest_says_what_the_next_build_takes(
    workspace: Workspace, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any("not encoded" in note for note in ingest(workspace, [pool]).notes)
    monkeypatch.setattr(ingesting, "LARGE", 10_000)
    write_pool(pool, 20, start=1000)
    (note,) = (note for note in ingest(workspace, [pool]).notes if "not encoded" in note)
    assert note.startswith("320 items are not encoded yet, which takes between ")
    assert note.endswith("in the next `al round` that builds")


def test_the_rate_of_an_encoding_is_remembered(
    workspace: Workspace, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real encoder; doctor first says what is usual, then what was measured."""
    layout, features = workspace.layout, workspace.params.features
    ingest(workspace, [pool])
    before = next_encoding(layout, features)
    assert (before.items, before.measured) == (300, False)
    assert before.bytes > 300 * 384 * 4
    assert before.seconds[0] < before.seconds[1]
    (finding,) = finding_of(workspace)
    assert (finding.check, finding.level) == ("encoding", "ok")
    assert finding.message.startswith("300 items are not encoded yet, which takes between ")
    free(monkeypatch, 400_000)
    (finding,) = finding_of(workspace)
    assert finding.level == "warning" and "where 0.4 MB are free" in finding.message
    monkeypatch.undo()
    for inbox, folder in ((layout.inbox_pool, layout.pool), (layout.inbox_test, layout.test)):
        folder.parent.mkdir(exist_ok=True)
        inbox.rename(folder)
    install_encoder(features.encoder, layout.encoder)
    assert next_encoding(layout, features).items == 300
    assert stage.main(layout) == 300
    write_pool(pool, 20, start=1000)
    (finding,) = finding_of(workspace)
    assert finding.message == "all items are encoded"
    ingest(workspace, [pool])
    after = next_encoding(layout, features)
    assert (after.items, after.measured) == (20, True)
    assert after.sentence().startswith("20 items are not encoded yet, which takes about ")


def test_an_encoding_without_room_is_refused_before_it_begins(
    workspace: Workspace, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, features = workspace.layout, workspace.params.features
    ingest(workspace, [pool])
    free(monkeypatch, 100_000)
    with pytest.raises(NoRoom, match="encoding the pool needs about 0.5 MB"):
        encode(layout, features)
    assert not layout.features.exists()
    free(monkeypatch, 10**9)
    assert check_encoding(layout, features) is None
    monkeypatch.setattr(needs, "LARGE", 10_000)
    assert str(check_encoding(layout, features)).startswith("300 items are not encoded yet")


def test_without_an_encoder_nothing_is_said(workspace: Workspace, pool: Path) -> None:
    change_params(workspace, {"kind: encoder+tfidf": "kind: tfidf"})
    workspace = open_workspace(workspace.layout.root)
    ingest(workspace, [pool])
    assert list(finding_of(workspace)) == []


def test_the_folders_of_dvcs_objects(workspace: Workspace, tmp_path: Path) -> None:
    root = workspace.layout.root
    assert object_folders(root) == (root / ".dvc/cache", tmp_path / "remote")
    change_config(root / ".dvc/config.local", {"cache": {"dir": "../elsewhere"}}, 0o600)
    change_config(root / ".dvc/config.local", {'remote "store"': {"url": "s3://bucket/path"}}, 0o600)
    cache, remote = object_folders(root)
    assert (cache.resolve(), remote) == (root / "elsewhere", None)
    (root / ".dvc/config.local").write_text("[core\n", encoding="utf-8")
    with pytest.raises(RepositoryError, match="cannot be read as DVC's configuration"):
        object_folders(root)


@pytest.mark.parametrize(
    ("seconds", "said"), [(5, "5 s"), (119, "119 s"), (600, "10 min"), (7200, "2 h"), (66_000, "18 h"), (3e5, "3 days")]
)
def test_durations_in_words(seconds: float, said: str) -> None:
    assert format_duration(seconds) == said


def test_sizes_in_words() -> None:
    assert (format_size(1_500_000), format_size(15_400_000_000)) == ("1.5 MB", "15.4 GB")
