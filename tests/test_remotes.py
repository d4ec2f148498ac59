"""Kinds of DVC remotes: each has an extra, and one that cannot be used here is refused with what to install."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from al_pipeline.errors import BadInput, RepositoryError
from al_pipeline.integrations.dvc import remotes
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.dvc.settings import change_config
from al_pipeline.integrations.git import Git
from al_pipeline.operations.init import init

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_table_holds_every_remote_that_dvc_knows() -> None:
    from dvc.config_schema import REMOTE_SCHEMAS
    from dvc_objects.fs import known_implementations

    assert {*remotes.EXTRAS, "http", "https"} == {*REMOTE_SCHEMAS} - {"", "remote"}
    for scheme, extra in remotes.EXTRAS.items():
        assert known_implementations[scheme]["class"].partition(".")[0] == f"dvc_{extra}"


@pytest.mark.parametrize("extra", sorted(set(remotes.EXTRAS.values())))
def test_each_has_an_extra_that_installs_the_plugin(extra: str) -> None:
    assert [Requirement(line).name for line in PROJECT["optional-dependencies"][extra]] == [f"dvc-{extra}"]


@pytest.mark.parametrize("scheme", [*remotes.EXTRAS, "S3"])
def test_init_refuses_a_remote_whose_plugin_is_not_installed(
    tmp_path: Path, al_home: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(remotes, "find_spec", lambda _: None)
    extra = remotes.EXTRAS[scheme.lower()]
    with pytest.raises(BadInput, match=rf"pip install 'al-pipeline\[{extra}\]'"):
        init(tmp_path / "new/w", ["a", "b"], remote=f"{scheme}://place/al")
    assert not (tmp_path / "new").exists() and not al_home.exists()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s4://bucket/al", "does not support remotes at s4://; use s3://"),
        ("file:///data/al", "the path of a folder"),
        ("remote://mine/al", "does not support remotes at remote://"),
        ("s3://", "has no bucket or host"),
        ("s3:///al", "has no bucket or host"),
        ("s3:/bucket/al", "write s3://"),
        ("ssh:host/al", "write ssh://"),
        ("http://[al", "cannot be read"),
    ],
)
def test_init_refuses_an_address_that_dvc_does_not_know(tmp_path: Path, address: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        init(tmp_path / "w", ["a", "b"], remote=address)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("address", ["folder", "/a/folder", "~/x", "a:b", "/odd/s3://x", "https://host/al"])
def test_folders_and_what_dvc_brings_itself_pass(address: str) -> None:
    remotes.check_address(address)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dvc") / "repository"
    root.mkdir()
    git = Git(root)
    git.init()
    (root / "source").write_text("the source\n", encoding="utf-8")
    (root / ".gitignore").write_text("/source\n/.al\n", encoding="utf-8")
    with at(root) as dvc:
        dvc.init("../remote")
        dvc.add(root / "source")
    git.commit("Begin", [root / name for name in (".dvc", "source.dvc", ".gitignore")])
    return root


def at(root: Path) -> Dvc:
    return Dvc(root, root / ".al/dvc.json", root / ".al/logs/dvc.log", check=lambda _: None)


def not_installed() -> str:
    """A scheme whose plugin this environment lacks."""
    return next(scheme for scheme, extra in remotes.EXTRAS.items() if find_spec(f"dvc_{extra}") is None)


NEEDS_THE_REMOTE: list[Callable[[Dvc], object]] = [
    Dvc.push,
    Dvc.pull,
    Dvc.verify_remote,
    Dvc.check_writable,
    Dvc.absent_folder,
    lambda dvc: dvc.repair_remote(["HEAD"]),
    lambda dvc: dvc.get("source", "HEAD", dvc.root / "got"),
]


def test_whatever_needs_the_remote_says_what_to_install(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "repository"
    shutil.copytree(made, root)
    shutil.rmtree(root / ".dvc/cache")
    (root / "source").unlink()
    scheme = not_installed()
    for url, says in (
        (f"{scheme}://bucket/al", rf"pip install 'al-pipeline\[{remotes.EXTRAS[scheme]}\]'"),
        ("s4://bucket/al", r"does not support remotes at s4://; use s3://.*dvc remote modify"),
    ):
        change_config(root / ".dvc/config.local", {'remote "store"': {"url": url}}, 0o600)
        with at(root) as dvc:
            for act in NEEDS_THE_REMOTE:
                with pytest.raises(RepositoryError, match=says):
                    act(dvc)
            assert dvc.recorded("source.dvc"), "what needs no remote works"


def test_a_plugin_without_the_library_that_it_stands_on_is_said_too() -> None:
    from dvc_objects.fs.errors import RemoteMissingDepsError

    error = RemoteMissingDepsError(object(), "s3", "s3://bucket/al", ["s3fs"])
    printed = f"ERROR: URL '{error.url}' is supported but requires these missing dependencies: ['s3fs']. To install"
    for said in (str(error), printed):
        assert "pip install 'al-pipeline[s3]'" in (remotes.explained(said) or "")
    assert remotes.explained("the bucket requires a password") is None
