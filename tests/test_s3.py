"""A remote that is no folder: rounds on a real S3 server (moto's) on this machine, and damage in its bucket."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from configobj import ConfigObj
from embedded import s3_server
from harness import SMALL, answer_all, change_params, play, tools_first, write_pool

from al_pipeline.errors import RemoteIncomplete, RepositoryError
from al_pipeline.integrations.dvc import objects as dvc_objects
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import connect as connecting
from al_pipeline.operations.close import pull_missing_sources
from al_pipeline.operations.connect import adopt
from al_pipeline.operations.doctor import examine
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.init import init
from al_pipeline.operations.remote import repair_remote
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.tick import tick
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = [pytest.mark.slow, pytest.mark.server]

SECRET = "not-for-git-1234"
BUCKET = "al-data"


@dataclass(frozen=True)
class Published:
    """A workspace with one round published, to S3."""

    server: str
    s3: Any
    root: Path
    oracle: SimulatedOracle
    truth: Mapping[str, str]

    @property
    def workspace(self) -> Workspace:
        return open_workspace(self.root)

    def clone(self, folder: Path) -> Workspace:
        """A clone without data."""
        run(self.root, "git", "clone", "-q", str(self.root), str(folder))
        connect(folder, self.server)
        return open_workspace(folder)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server."""
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def nothing_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the user's own settings counts."""
    folder = tmp_path_factory.mktemp("s3-settings")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_") or name.lower() == "http_proxy"]:
            patch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, str(folder / "none"))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


def client(server: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=server, region_name="us-east-1", aws_access_key_id="al", aws_secret_access_key=SECRET
    )


@pytest.fixture(scope="module")
def published(server: str, nothing_of_the_users: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """Tests leave the bucket as whole as they found it."""
    folder = tmp_path_factory.mktemp("s3")
    s3 = client(server)
    s3.create_bucket(Bucket=BUCKET)
    root = folder / "workspace"
    workspace = init(root, ["ham", "spam"], remote=f"s3://{BUCKET}/team")
    connect(root, server)
    change_params(workspace, SMALL)
    truth = write_pool(folder / "pool.jsonl")
    ingest(open_workspace(root), [folder / "pool.jsonl"])
    oracle = SimulatedOracle()
    assert play(open_workspace(root), oracle, truth, 1).published == (0,)
    yield Published(server, s3, root, oracle, truth)
    s3.close()


def run(root: Path, *words: str) -> str:
    return subprocess.run(words, cwd=root, env=tools_first(), check=True, capture_output=True, text=True).stdout


def connect(root: Path, server: str) -> None:
    """Say where the server is and what opens it, on this machine alone."""
    change_remote(root, {"endpointurl": server, "access_key_id": "al", "secret_access_key": SECRET})


def change_remote(root: Path, settings: Mapping[str, str | None]) -> None:
    """What `dvc remote modify --local` does; None takes a setting away."""
    path = root / ".dvc/config.local"
    config = ConfigObj(str(path), interpolation=False, encoding="utf-8")
    remote = config.setdefault('remote "store"', {})
    for name, value in settings.items():
        if value is None:
            del remote[name]
        else:
            remote[name] = value
    config.write()
    path.chmod(0o600)


def objects(s3: Any) -> dict[str, bytes]:
    """What the bucket holds, by key."""
    found = s3.list_objects_v2(Bucket=BUCKET).get("Contents", ())
    return {one["Key"]: s3.get_object(Bucket=BUCKET, Key=one["Key"])["Body"].read() for one in found}


def key_of(digest: str) -> str:
    return f"team/files/md5/{digest[:2]}/{digest[2:]}"


def of_remote(workspace: Workspace) -> list[tuple[str, str, str]]:
    return [(one.level, one.message, one.fix) for one in examine(workspace) if one.check == "remote"]


def test_a_published_round_is_in_the_bucket_and_no_secret_in_git(published: Published) -> None:
    assert [level for level, _, _ in of_remote(published.workspace)] == ["ok"]
    told = run(published.root, "git", "log", "-p", "--all")
    assert SECRET not in told and published.server not in told
    held = objects(published.s3)
    assert all(key.startswith("team/files/md5/") for key in held), "no probe is left"
    for key, content in held.items():
        name = "".join(key.split("/")[-2:])
        assert hashlib.md5(content, usedforsecurity=False).hexdigest() == name.removesuffix(".dir")
    with open_dvc(published.workspace.layout) as dvc:
        looked, wrong = dvc.check_remote()
        recorded = {**dvc.recorded("models/candidate"), **dvc.recorded("data/pool.dvc")}
    assert looked and not wrong
    assert len(recorded) == 2 and {key_of(digest) for digest in recorded.values()} <= held.keys()


def test_a_round_on_s3_is_made_again(published: Published) -> None:
    assert [made.difference for made in reproduce(published.workspace, [0])] == [None]


def test_all_damage_is_seen_and_mended_by_a_clone_that_has_the_data(published: Published) -> None:
    s3, workspace = published.s3, published.workspace
    before = objects(s3)
    key = newest_model(workspace)
    with open_dvc(workspace.layout) as dvc:
        listing = key_of(dvc.recorded("models/candidate")["models/candidate"])
    damages = [("wrong content", bytes(len(before[key]))), ("empty", b""), ("bytes of", b"x"), ("missing", None)]
    cases = [(key, one) for one in damages] + [(listing, one) for one in (damages[0], damages[3])]
    for damaged, (what, content) in cases:
        damage(s3, damaged, bytes(len(before[damaged])) if what == "wrong content" else content)
        with open_dvc(workspace.layout) as dvc:
            _, (wrong,) = dvc.check_remote()
        assert what in wrong.why and wrong.have and wrong.at == f"s3://{BUCKET}/{damaged}"
        if damaged == key and what == "wrong content":
            ((level, message, fix),) = of_remote(workspace)
            assert level == "error" and what in message and "`al remote repair` uploads it from this clone" in fix
        repaired = repair_remote(workspace)
        assert repaired.sent == 1 and not repaired.defects
        assert objects(s3) == before


def test_of_an_object_too_large_to_read_back_only_the_size_is_compared(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3, key = published.s3, newest_model(published.workspace)
    right = objects(s3)[key]
    monkeypatch.chdir(published.root)

    def wrong(largest: int) -> list[str]:
        monkeypatch.setattr(dvc_objects, "READ_BACK", largest)
        found = dvc_objects.serve({"do": "check", "notes": str(tmp_path / str(largest))})
        return [one["why"] for one in found["defects"]]

    damage(s3, key, bytes(len(right)))
    assert wrong(len(right)) == ["wrong content"]
    assert wrong(len(right) - 1) == []
    damage(s3, key, right[:-1])
    assert wrong(len(right) - 2) == [f"{len(right) - 1:,} bytes of {len(right):,}"]
    damage(s3, key, right)


def test_a_clone_without_data_takes_no_damaged_object(published: Published, tmp_path: Path) -> None:
    s3, workspace = published.s3, published.clone(tmp_path / "clone")
    with open_dvc(workspace.layout) as dvc:
        digest = dvc.recorded("data/pool.dvc")["data/pool"]
    for key in [key_of(digest), key_of(json.loads(objects(s3)[key_of(digest)])[0]["md5"])]:
        right = objects(s3)[key]
        damage(s3, key, right[:-1] + b"!")
        with open_dvc(workspace.layout) as dvc, pytest.raises(RemoteIncomplete, match="al remote repair"):
            dvc.pull("data/pool.dvc")
        damage(s3, key, right)
    with open_dvc(workspace.layout) as dvc:
        dvc.pull("data/pool.dvc")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "s3://al-nowhere/team"}, "bucket"),
        ({"access_key_id": None, "secret_access_key": None}, "redentials"),
        ({"endpointurl": "http://127.0.0.1:9"}, "connect"),
        ({"endpointurl": "http://no-such-host.invalid"}, "connect"),
        ({"endpointurl": "not an address"}, "ndpoint"),
    ],
)
def test_a_remote_that_cannot_be_used_is_one_sentence_and_its_fault(
    server: str, nothing_of_the_users: None, tmp_path: Path, settings: Mapping[str, str | None], said: str
) -> None:
    """To whoever fetches, publishes, looks and asks; nothing is made in its place."""
    workspace = init(tmp_path / "w", ["a", "b"], remote="s3://al-elsewhere/team")
    root, layout = workspace.layout.root, workspace.layout
    connect(root, server)
    s3 = client(server)
    s3.create_bucket(Bucket="al-elsewhere")
    layout.pool.mkdir(parents=True)
    for number in range(3):
        (layout.pool / f"part-{number:06d}.parquet").write_text(str(number), encoding="utf-8")
    local = root / ".dvc/config.local"
    with open_dvc(layout) as dvc:
        dvc.add(layout.pool)
        dvc.push()
        right = local.read_bytes()
        change_remote(root, settings)
        for action in (dvc.push, dvc.verify_remote, dvc.check_writable, lambda: pull_missing_sources(layout, dvc)):
            begin = time.monotonic()
            with pytest.raises(RepositoryError) as told:
                action()
            assert time.monotonic() - begin < 120
            assert told.value.exit_code == 5 and said in str(told.value)
            assert len(str(told.value).splitlines()) == 1 and SECRET not in str(told.value)
            if action == dvc.check_writable:  # from here on as in a fresh clone
                shutil.rmtree(root / ".dvc/cache")
                shutil.rmtree(layout.pool)
        assert [level for level, _, _ in of_remote(workspace)] == ["error"]
        local.write_bytes(right)
        pull_missing_sources(layout, dvc)
        dvc.verify_remote()
    assert "al-nowhere" not in [one["Name"] for one in s3.list_buckets()["Buckets"]]
    s3.close()


@pytest.mark.parametrize("by_hand", [True, False])
def test_another_clone_goes_on(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_hand: bool
) -> None:
    """It takes the project over with the data fetched, by hand or by `al adopt`, and publishes the next round."""
    workspace, oracle = published.clone(tmp_path / "clone"), published.oracle
    root = workspace.layout.root
    run(root, "git", "remote", "remove", "origin")
    if by_hand:
        run(root, "dvc", "pull")
    monkeypatch.setattr(connecting, "connect", lambda _: oracle)
    adopt(workspace)
    with open_dvc(workspace.layout) as dvc:
        assert dvc.unlike("data/pool.dvc", "data/events.dvc", "data/test.dvc") == []
    assert "site_cache_dir" in (root / ".dvc/config.local").read_text(encoding="utf-8")
    answer_all(oracle, published.truth)
    published_now = tick(open_workspace(root), lambda: oracle).published
    assert published_now == (1,)
    assert [level for level, _, _ in of_remote(workspace)] == ["ok"]
    assert [made.difference for made in reproduce(workspace, [1])] == [None]


def newest_model(workspace: Workspace) -> str:
    """The key of the object of the candidate model's first file."""
    with open_dvc(workspace.layout) as dvc:
        listing = dvc.recorded()["models/candidate"]
    folder = workspace.layout.root / ".dvc/cache/files/md5" / listing[:2] / listing[2:]
    return key_of(json.loads(folder.read_bytes())[0]["md5"])


def damage(s3: Any, key: str, content: bytes | None) -> None:
    if content is None:
        s3.delete_object(Bucket=BUCKET, Key=key)
    else:
        s3.put_object(Bucket=BUCKET, Key=key, Body=content)
