"""Another engine in an environment of its own: only the recorded one will do, and what cannot be had is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from own_package import PLUG, pip, project

from al_pipeline.errors import BadInput, NothingToDo
from al_pipeline.integrations import environment
from al_pipeline.integrations.environment import recorded_engine
from al_pipeline.workspace.fingerprint import current_engine
from al_pipeline.workspace.home import al_home

ROOT = Path(__file__).parents[1]


def recorded(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(current_engine())), **changes}


def refuse(_: str) -> None:
    pytest.fail("nothing is to be installed")


@pytest.mark.parametrize(("key", "value"), [("python", "3.1.4"), ("machine", "abacus"), ("cpu", []), ("threads", 64)])
def test_what_comes_with_the_machine_cannot_be_installed(key: str, value: Any) -> None:
    with pytest.raises(NothingToDo, match=rf"cannot be installed here \({key}: was .*, is .*leave `--engine` out"):
        recorded_engine(recorded(**{key: value}), None, refuse)
    assert not (al_home() / "engines").exists()


def test_other_sources_must_be_given() -> None:
    with pytest.raises(NothingToDo, match="made by other sources of al-pipeline .*`--engine PATH`"):
        recorded_engine(recorded(sources="0" * 64), None, refuse)
    with pytest.raises(BadInput, match="neither a checkout nor a wheel"):
        recorded_engine(recorded(sources="0" * 64), Path("never"), refuse)


def test_a_record_of_an_engine_that_counted_other_packages_names_no_stranger() -> None:
    packages = {**current_engine()["packages"], "pandas": "2.3.1"}
    with pytest.raises(NothingToDo, match="other sources"):
        recorded_engine(recorded(sources="0" * 64, packages=packages), None, refuse)


@pytest.mark.slow
def test_sources_that_are_given_are_taken_where_they_are_the_recorded_ones(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".*", "demo*", "build", "tests", "benchmarks", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    with (checkout / "al_pipeline/evaluation/metrics.py").open("a") as file:
        file.write("OLDER = 1\n")
    before = sorted(path.name for path in checkout.iterdir())
    look = (
        "import json; from al_pipeline.workspace.fingerprint import current_engine; print(json.dumps(current_engine()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", look],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    wanted = json.loads(done.stdout)
    assert wanted["sources"] != current_engine()["sources"]
    told: list[str] = []
    engine = recorded_engine(wanted, checkout, told.append)
    assert engine.python.exists() and len(told) == 1
    assert sorted(path.name for path in checkout.iterdir()) == before, "nothing is built in the checkout"
    assert recorded_engine(wanted, checkout, refuse) == engine, "made once"
    with pytest.raises(BadInput, match="differ from the recorded engine: sources: was 0000"):
        recorded_engine(recorded(sources="0" * 64), checkout, told.append)


def test_a_record_cannot_have_pip_do_anything_else() -> None:
    for name, version in (("--index-url=https://x", "1"), ("al-plug-test", "1 --pre"), ("../here", "1"), ("a", "@ x")):
        with pytest.raises(BadInput, match="invalid package of a plug-in"):
            recorded_engine(recorded(), None, refuse, {name: version})
    assert not (al_home() / "engines").exists()


@pytest.mark.slow
def test_what_is_installed_for_development_is_shared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip("install", "--no-deps", "--no-build-isolation", "--prefix", tmp_path / "site", "-e", project(tmp_path / "p"))
    [site] = (tmp_path / "site").glob("lib/python*/site-packages")
    here = environment._site_packages()
    monkeypatch.setattr(environment, "_site_packages", lambda: [*here, str(site)])
    engine = recorded_engine(recorded(), None, lambda _: None)
    code = f"import {PLUG}, importlib.metadata as m; print(m.version('al-plug-test'), {PLUG}.__file__)"
    found = subprocess.run(
        [engine.python, "-c", code],
        env={**os.environ, **engine.environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert found.stdout.split() == ["1.0.0", str(tmp_path / f"p/src/{PLUG}/__init__.py")]
