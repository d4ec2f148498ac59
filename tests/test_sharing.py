"""The team's cache of vectors on the DVC remote: encoded once, and nothing in it that the key did not seal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import prepared
from embedded import s3_server
from harness import Killed, copy_workspace, killing, small_workspace
from test_clusters import Bytes, shard_names, vectors_in
from test_s3 import change_remote, client

from al_pipeline.data.pool import iter_digests
from al_pipeline.errors import UsageError
from al_pipeline.features.shards import digest_rows, read_shard, shard_bytes, shard_name
from al_pipeline.features.sharing import seal, unsealed
from al_pipeline.integrations.dvc.settings import change_config
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import build, sharing
from al_pipeline.operations.checks import data as checks
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.sharing import KEY, SharedVectors, shared_vectors
from al_pipeline.operations.tick import tick
from al_pipeline.records import content_hash
from al_pipeline.rounds.state_machine import Step
from al_pipeline.workspace.workspace import Workspace, open_workspace

SECRET = "a key of the team, for tests alone"
MODULE = "al_pipeline.stages.encode"


def shard(fill: float = 0.5) -> bytes:
    return shard_bytes({"hashes": digest_rows([content_hash("a")]), "vectors": np.full((1, 3), fill, np.float32)})


def test_only_the_key_opens_what_it_sealed() -> None:
    key, data = SECRET.encode(), shard()
    name, sealed = shard_name(data), seal(key, "f1", data)
    assert unsealed(key, "f1", name, sealed) == data
    assert unsealed(b"another key", "f1", name, sealed) is None
    assert unsealed(key, "f2", name, sealed) is None, "vectors of another processor"
    assert unsealed(key, "f1", shard_name(shard(0.25)), sealed) is None, "under another name"
    assert unsealed(key, "f1", name, b"") is None
    for place in range(0, len(sealed), 7):
        changed = bytearray(sealed)
        changed[place] ^= 1
        assert unsealed(key, "f1", name, bytes(changed)) is None
    for odd in (b"no shard", shard(np.nan)):
        assert unsealed(key, "f1", shard_name(odd), seal(key, "f1", odd)) is None


def test_a_short_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = None
    monkeypatch.delenv(KEY, raising=False)
    assert shared_vectors(nothing, nothing, nothing, print) is None
    monkeypatch.setenv(KEY, "hunter2")
    with pytest.raises(UsageError, match=f"{KEY} has 7 characters.*openssl rand") as told:
        shared_vectors(nothing, nothing, nothing, print)
    assert "hunter2" not in str(told.value)


@pytest.fixture(scope="module")
def unencoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A small workspace whose first build has reached the encoding of its texts."""

    def make(folder: Path) -> dict[str, str]:
        workspace, truth = small_workspace(folder, 80, {"kind: encoder+tfidf": "kind: encoder"})
        with pytest.raises(Killed):
            tick(workspace, SimulatedOracle, run=killing("encode", "before"))
        return truth

    return prepared(tmp_path_factory, "unencoded-small", make)


@contextmanager
def shared_by(workspace: Workspace, key: str = SECRET) -> Iterator[tuple[SharedVectors, list[str]]]:
    warnings: list[str] = []
    with open_dvc(workspace.layout) as dvc:
        yield (
            SharedVectors(workspace.layout, workspace.params.features, dvc, key.encode(), warnings.append),
            warnings,
        )


def encoded(workspace: Workspace, key: str = SECRET) -> list[str]:
    """Encode with the shared cache; return the warnings."""
    with shared_by(workspace, key) as (shared, warnings):
        build.encode(workspace.layout, workspace.params.features, shared=shared)
    return warnings


def clones(unencoded: tuple[Path, Mapping[str, str]], folder: Path, count: int, url: str = "") -> list[Workspace]:
    """Copies of a workspace with one remote."""
    made = []
    for number in range(count):
        (folder / str(number)).mkdir()
        workspace = copy_workspace(unencoded, folder / str(number))
        settings = {'remote "store"': {"url": url or str(folder / "remote")}}
        change_config(workspace.layout.root / ".dvc/config", settings, 0o644)
        made.append(workspace)
    return made


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to make this process unable to encode anything that is missing."""

    def refuse() -> None:
        real = build._run_encoder

        def run(layout: Any, engine: Any, module: str) -> None:
            before = {path.name for path in layout.features.glob("*/*.safetensors")}
            real(layout, engine, module)
            assert {path.name for path in layout.features.glob("*/*.safetensors")} == before, "it encoded something"

        monkeypatch.setattr(build, "_run_encoder", run)

    return refuse


@pytest.mark.slow
def test_a_team_encodes_once(
    unencoded: tuple[Path, dict[str, str]], tmp_path: Path, no_encoder: Callable[[], None]
) -> None:
    first, second, third = clones(unencoded, tmp_path, 3)
    assert encoded(first) == []
    expected, names = vectors_in(first), shard_names(first)
    assert len(expected) == 80 and names
    [folder] = (tmp_path / "remote/vectors").iterdir()
    assert {path.name for path in folder.iterdir()} == names
    no_encoder()
    assert encoded(second) == []
    assert (vectors_in(second), shard_names(second)) == (expected, names)
    assert {path.name for path in folder.iterdir()} == names, "nothing is sent twice"
    assert not (second.layout.private / "sharing").exists()

    leftover = third.layout.private / "sharing"  # of a killed tick
    leftover.mkdir(mode=0o700)
    (leftover / "half.safetensors").write_bytes(b"half")
    assert encoded(third) == []
    assert vectors_in(third) == expected and not leftover.exists()


@pytest.mark.slow
def test_a_fetch_reads_the_pool_once_and_ends_when_nothing_is_missing(
    unencoded: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = clones(unencoded, tmp_path, 2)
    build.encode(first.layout, first.params.features)
    expected, [whole] = vectors_in(first), list(first.layout.features.glob("*/[!.]*.safetensors"))
    tensors = read_shard(whole)
    assert tensors is not None
    rows = {name: np.array(tensor) for name, tensor in tensors.tensors.items()}
    whole.unlink()
    for start in range(0, 80, 10):
        data = shard_bytes({name: tensor[start : start + 10] for name, tensor in rows.items()})
        (whole.parent / shard_name(data)).write_bytes(data)
    strange = shard_bytes({"hashes": rows["hashes"][:, ::-1].copy(), "vectors": rows["vectors"]})
    names = {path.name for path in whole.parent.glob("[!.]*.safetensors")}
    assert len(names) == 8
    with shared_by(first, SECRET) as (shared, _):
        shared.send()
    [folder] = (tmp_path / "remote/vectors").iterdir()
    (folder / f"{'f' * 32}.safetensors").write_bytes(seal(SECRET.encode(), folder.name, strange))  # sorts last
    reads: list[object] = []
    monkeypatch.setattr(sharing, "_AT_ONCE", 1)
    monkeypatch.setattr(sharing, "iter_digests", lambda folders: reads.append(folders) or iter_digests(folders))
    with shared_by(second, SECRET) as (shared, warnings):
        shared.fetch()
        assert len(reads) == 1 and warnings == [], "the last file was not asked for"
        assert (vectors_in(second), shard_names(second)) == (expected, names)
        shared.fetch()
    assert len(reads) == 2 and warnings == []


@pytest.mark.slow
def test_doctor_says_whether_the_key_fits(
    unencoded: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [workspace] = clones(unencoded, tmp_path, 1)

    def found(key: str) -> list[tuple[str, str]]:
        monkeypatch.setenv(KEY, key)
        with open_dvc(workspace.layout) as dvc:
            return [(one.level, one.message) for one in checks._shared_vectors(workspace, dvc)]

    assert found("") == []
    [(level, said)] = found(SECRET)
    assert level == "ok" and "no vectors of this encoder yet" in said
    assert encoded(workspace) == []
    assert [level for level, _ in found(SECRET)] == ["ok"]
    [(level, said)] = found("")
    assert level == "warning" and "AL_VECTORS_KEY is not set" in said
    [(level, said)] = found("another key, of another team, for tests")
    assert level == "error" and "did not seal" in said
    [(level, said)] = found("short")
    assert level == "error" and "5 characters" in said


@pytest.mark.slow
def test_a_stranger_cannot_change_a_vector(unencoded: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    first, second = clones(unencoded, tmp_path, 2)
    assert encoded(first) == []
    expected = vectors_in(first)
    [folder] = (tmp_path / "remote/vectors").iterdir()
    [stored] = folder.iterdir()
    hashes = digest_rows([name.hex() for name in expected])
    forged = shard_bytes({"hashes": hashes, "vectors": np.zeros((len(hashes), 384), np.float32)})
    stored.write_bytes(seal(b"guessed", folder.name, forged))
    (folder / shard_name(forged)).write_bytes(seal(b"guessed", folder.name, forged))
    (folder / "notes.txt").write_text("not ours")
    (folder / f"{'0' * 32}.safetensors").write_bytes(b"")
    [warning] = encoded(second)
    assert warning.startswith("3 files of the team's vectors are damaged or not sealed with this AL_VECTORS_KEY")
    assert vectors_in(second) == expected, "encoded here"
    first_warning = encoded_again(second, "another key, of another team, for tests")
    assert all("not sealed" in line for line in first_warning)
    assert vectors_in(second) == expected


def encoded_again(workspace: Workspace, key: str) -> list[str]:
    shutil.rmtree(workspace.layout.features)
    workspace.layout.encoded.unlink()
    return encoded(workspace, key)


@pytest.mark.slow
def test_a_remote_that_fails_costs_time_alone(unencoded: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    [workspace] = clones(unencoded, tmp_path, 1, "s3://al-nowhere/team")
    change_remote(workspace.layout.root, {"endpointurl": "http://127.0.0.1:9"})
    warnings = encoded(workspace)
    assert [line.split(" could not be ")[1].split(",")[0].split(";")[0] for line in warnings] == ["fetched", "stored"]
    assert len(vectors_in(workspace)) == 80


@pytest.mark.slow
@pytest.mark.server
def test_it_is_the_same_on_s3(
    unencoded: tuple[Path, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_encoder: Callable[[], None],
) -> None:
    """By the steps of a tick, which take the key from the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv(KEY, SECRET)
    results: list[Bytes] = []
    with s3_server() as server:
        s3 = client(server)
        s3.create_bucket(Bucket="al-vectors")
        for workspace in clones(unencoded, tmp_path, 2, "s3://al-vectors/team"):
            access = {"access_key_id": "al", "secret_access_key": "not-for-git-1234", "endpointurl": server}
            change_remote(workspace.layout.root, access)
            workspace = open_workspace(workspace.layout.root)
            warnings: list[str] = []
            with open_dvc(workspace.layout) as dvc:
                build.run_step(Step.ENCODE, workspace.layout, workspace.params, dvc, warn=warnings.append)
            assert warnings == []
            results.append(vectors_in(workspace))
            no_encoder()
        keys = [one["Key"] for one in s3.list_objects_v2(Bucket="al-vectors")["Contents"]]
        s3.close()
    assert results[0] == results[1] and len(results[0]) == 80
    assert len(keys) == 1 and keys[0].startswith("team/vectors/")
