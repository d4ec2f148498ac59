"""The engine's fingerprint: it covers what stages run, and says what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_imports import modules, ours

import al_pipeline
from al_pipeline.errors import EngineChanged
from al_pipeline.files import read_json, write_json
from al_pipeline.workspace import fingerprint as engine
from al_pipeline.workspace.fingerprint import MODULES, PACKAGES, check_engine, current_engine, difference, write_engine
from al_pipeline.workspace.layout import STAGES


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    current_engine.cache_clear()
    yield
    current_engine.cache_clear()


def closure(starts: list[str]) -> set[str]:
    """Every module of ours that `starts` import, and the packages that lie above them."""
    found: set[str] = set()
    queue = list(starts)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        queue += ours(name)
        parents = name.split(".")[:-1]
        queue += [".".join(parents[: depth + 1]) for depth in range(len(parents))]
    return found


def test_the_fingerprint_covers_exactly_what_stages_import() -> None:
    package = Path(al_pipeline.__file__).parent
    names = closure([f"stages.{stage}" for stage in STAGES]) | {"al_pipeline"}
    assert sorted(MODULES) == sorted(modules()[name].relative_to(package).as_posix() for name in names)


def test_the_modules_stand_in_one_order_and_once() -> None:
    assert list(MODULES) == sorted(set(MODULES))
    assert list(PACKAGES) == sorted(set(PACKAGES))


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's sources, as the package that the fingerprint reads."""
    target = tmp_path / "al_pipeline"
    shutil.copytree(Path(al_pipeline.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(al_pipeline, "__file__", str(target / "__init__.py"))
    return target


@pytest.mark.parametrize("module", MODULES)
def test_one_byte_of_a_module_changes_the_fingerprint(copied: Path, module: str) -> None:
    before = current_engine()["sources"]
    with (copied / module).open("ab") as file:
        file.write(b"#")
    current_engine.cache_clear()
    assert current_engine()["sources"] != before


def test_other_modules_do_not_change_the_fingerprint(copied: Path) -> None:
    before = current_engine()
    (copied / "cli/app.py").write_text("", encoding="utf-8")
    current_engine.cache_clear()
    assert current_engine() == before


def test_the_fingerprint_is_json_and_comes_out_the_same_twice(tmp_path: Path) -> None:
    write_engine(tmp_path / "engine.json")
    first = (tmp_path / "engine.json").read_bytes()
    current_engine.cache_clear()
    write_json(tmp_path / "engine.json", current_engine())
    assert (tmp_path / "engine.json").read_bytes() == first
    assert json.loads(first) == current_engine()
    assert set(current_engine()) == {"version", "sources", "python", "packages", "machine", "cpu", "blas", "threads"}


def test_an_equal_record_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    write_engine(path)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    write_engine(path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    write_json(path, {**current_engine(), "version": "0"})
    write_engine(path)
    assert read_json(path) == current_engine()


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version": lambda found: found.update(version="0.0.1"),
    "torch": lambda found: found["packages"].update(torch="1.0"),
    "cpu": lambda found: found.update(cpu=["avx"]),
    "threads": lambda found: found.update(threads=64),
    "python": lambda found: found.pop("python"),
    "numpy": lambda found: found["packages"].pop("numpy"),
    "colour": lambda found: found.update(colour="green"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_engine_is_refused_by_name(tmp_path: Path, key: str) -> None:
    other = json.loads(json.dumps(current_engine()))
    CHANGES[key](other)
    write_json(tmp_path / "engine.json", other)
    with pytest.raises(EngineChanged, match=rf"\b{key}: was .*, is .*`al round`") as caught:
        check_engine(tmp_path / "engine.json")
    assert str(caught.value).count(": was ") == 1


def test_this_engine_is_let_through(tmp_path: Path) -> None:
    write_engine(tmp_path / "engine.json")
    check_engine(tmp_path / "engine.json")
    assert difference(read_json(tmp_path / "engine.json")) == ""


def test_no_record_is_another_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineChanged, match="absent"):
        check_engine(tmp_path / "engine.json")


def test_a_package_that_is_not_installed_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PACKAGES", ("al-no-such-package",))
    assert current_engine()["packages"] == {"al-no-such-package": "absent"}
