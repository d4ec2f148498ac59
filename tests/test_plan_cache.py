"""Plans that were parsed before are read from private files: the same rows, whatever happens to those files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from al_pipeline.operations import plan_cache
from al_pipeline.operations.plan_cache import SEGMENT, plan_rows
from al_pipeline.records import PlannedTask, push_key


@pytest.fixture(autouse=True)
def another_process() -> Iterator[None]:
    plan_cache._known.clear()
    yield
    plan_cache._known.clear()


class Repository:
    """Plans by round, and the rounds that were parsed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions: dict[int, int] = {}
        self.parsed: list[int] = []

    def plan(self, number: int) -> tuple[PlannedTask, ...]:
        item = f"item {number} {self.versions[number]} \u00e9"
        return (PlannedTask(push_key("w", number, item), item, "0" * 64, "pool", number, 0, 0.5, "random", 0.25),)

    def parse(self, numbers: Sequence[int]) -> Mapping[int, tuple[PlannedTask, ...]]:
        self.parsed += numbers
        return {number: self.plan(number) for number in numbers}

    def read(self) -> list[int]:
        """Check that all rows are right; return the rounds that were parsed for it."""
        self.parsed = []
        objects = {number: f"{number} {version}" for number, version in sorted(self.versions.items())}
        found = list(plan_rows(self.folder, objects, self.parse))
        assert found == [self.plan(number) for number in objects]
        return self.parsed

    def read_anew(self) -> list[int]:
        """The same in another process."""
        plan_cache._known.clear()
        return self.read()


def test_only_plans_after_the_last_whole_file_are_parsed_again(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "plans")
    repository.versions = dict.fromkeys(range(2 * SEGMENT + 3), 0)
    assert repository.read() == list(range(2 * SEGMENT + 3))
    assert repository.read() == []
    assert repository.read_anew() == [2 * SEGMENT, 2 * SEGMENT + 1, 2 * SEGMENT + 2]
    repository.versions[2 * SEGMENT + 3] = 0
    assert repository.read() == [2 * SEGMENT + 3]
    repository.versions[3] = 1  # another object
    assert repository.read_anew()[0] == 3
    assert 3 not in repository.read_anew()
    assert repository.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in repository.folder.iterdir()} == {0o600}


@pytest.mark.parametrize("damage", ["gone", "empty", "torn", "flipped", "another form", "another's"])
def test_what_is_damaged_or_was_not_ours_alone_is_parsed_again(tmp_path: Path, damage: str) -> None:
    repository = Repository(tmp_path / "plans")
    repository.versions = dict.fromkeys(range(SEGMENT), 0)
    repository.read()
    (path,) = repository.folder.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "another's":
        path.chmod(0o666)
    elif damage == "another form":
        plan_cache._write(path, {})
    else:
        data[-3] ^= 1
        path.write_bytes({"empty": b"", "torn": bytes(data[:-5])}.get(damage, bytes(data)))
    assert repository.read_anew() == list(range(SEGMENT))
    os.chmod(path, 0o600)
    assert repository.read_anew() == []


def test_without_a_folder_to_write_to_plans_are_parsed(tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("no folder")
    repository = Repository(tmp_path / "plans")
    repository.versions = dict.fromkeys(range(SEGMENT), 0)
    assert repository.read() == repository.read_anew() == list(range(SEGMENT))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.integers(0, 3 * SEGMENT), st.integers(0, 2), max_size=30), min_size=1, max_size=5))
def test_any_history_of_plans_is_read_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, histories: list[dict[int, int]]
) -> None:
    """Branches that have other rounds, or other plans of the same rounds, one after the other."""
    repository = Repository(tmp_path_factory.mktemp("cache") / "plans")
    for versions in histories:
        repository.versions = versions
        repository.read_anew()
        repository.read()
