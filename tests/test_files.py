"""Writes happen whole or not at all; digests see names and contents."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from al_pipeline import files
from al_pipeline.files import (
    TEMPORARY_PREFIX,
    bound_log,
    json_line,
    move,
    read_json,
    read_jsonl,
    remove_leftovers,
    replacing,
    sha256_bytes,
    sha256_file,
    sha256_tree,
    temporary_folder,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
)

shared_folder = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path, error: Any) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(error if isinstance(error, type) else type(error)), replacing(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise error
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_temporary_file_lies_beside_its_target_and_keeps_its_suffix(tmp_path: Path) -> None:
    with replacing(tmp_path / "deep/er/a.parquet") as temporary:
        assert temporary.parent == tmp_path / "deep/er"
        assert temporary.suffix == ".parquet" and temporary.name.startswith(TEMPORARY_PREFIX)
        temporary.write_bytes(b"x")
        assert not (tmp_path / "deep/er/a.parquet").exists()
    assert os.listdir(tmp_path / "deep/er") == ["a.parquet"]


def test_a_failed_rename_leaves_nothing_half_done(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_text(tmp_path / "taken", "x")
    assert os.listdir(tmp_path) == ["taken"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
def test_the_mode_is_what_was_asked_for(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "a", "x", mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_a_secret_is_never_readable_by_others_on_the_way(tmp_path: Path) -> None:
    with replacing(tmp_path / "token", 0o600) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


def test_content_reaches_the_disk_before_its_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    synced: list[tuple[str, bool]] = []
    sync = files.sync

    def spy(target: Path) -> None:
        synced.append(("folder" if target.is_dir() else "file", path.exists()))
        sync(target)

    monkeypatch.setattr(files, "sync", spy)
    write_text(path, "x")
    assert synced == [("file", False), ("folder", True)]


@given(st.binary(max_size=200))
@shared_folder
def test_bytes_come_back(tmp_path: Path, data: bytes) -> None:
    write_bytes(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == data
    assert sha256_file(tmp_path / "a") == sha256_bytes(data) == sha256_tree(tmp_path / "a")


@given(VALUES)
@shared_folder
def test_json_comes_back(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert json.loads(json_line(value)) == value
    assert json_line(value).count("\n") == 1


@given(st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=4))
@shared_folder
def test_rows_come_back(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows


@given(st.dictionaries(TEXT, VALUES, max_size=4))
@shared_folder
def test_equal_values_give_equal_bytes(tmp_path: Path, value: dict[str, Any]) -> None:
    write_json(tmp_path / "a", value)
    write_json(tmp_path / "b", dict(reversed(value.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json_line(value) == json_line(dict(reversed(value.items())))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_has_no_word_for_is_never_written(tmp_path: Path, value: float) -> None:
    write_text(tmp_path / "a", "old")
    for write in (write_json, lambda path, v: write_jsonl(path, [{"a": v}])):
        with pytest.raises(ValueError, match="JSON"):
            write(tmp_path / "a", value)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_is_not_there_reads_as_the_default(tmp_path: Path) -> None:
    assert read_json(tmp_path / "a") is None
    assert read_json(tmp_path / "a", {}) == {}
    assert read_jsonl(tmp_path / "a") == []


def tree(root: Path, contents: dict[str, bytes]) -> str:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return sha256_tree(root)


@pytest.mark.parametrize(
    "other",
    [
        {"a": b"1", "b/c": b"3"},
        {"a": b"1", "b/d": b"2"},
        {"a": b"1", "bc": b"2"},
        {"a": b"2", "b/c": b"1"},
        {"a": b"1"},
        {"a": b"1", "b/c": b"2", "d": b""},
    ],
)
def test_the_digest_of_a_tree_sees_names_and_contents(tmp_path: Path, other: dict[str, bytes]) -> None:
    digest = tree(tmp_path / "one", {"a": b"1", "b/c": b"2"})
    assert tree(tmp_path / "two", other) != digest
    assert tree(tmp_path / "same", {"b/c": b"2", "a": b"1"}) == digest


def test_leftovers_of_a_killed_writer_go_and_nothing_else_does(tmp_path: Path) -> None:
    for name in (f"{TEMPORARY_PREFIX}x.json", f"{TEMPORARY_PREFIX}y", "kept.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    remove_leftovers(tmp_path, tmp_path / "not there")
    assert os.listdir(tmp_path) == ["kept.json"]


WRITER = """
import sys, time
from pathlib import Path
from al_pipeline.files import replacing, temporary_folder
with replacing(Path(sys.argv[1]) / "file") as file, temporary_folder(Path(sys.argv[1])) as folder:
    file.write_text("half")
    (folder / "inner").mkdir()
    print("writing", flush=True)
    time.sleep(600)
"""


def test_leftovers_go_when_their_writer_is_dead_and_not_before(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        remove_leftovers(tmp_path)
        assert len(os.listdir(tmp_path)) == 2
        writer.kill()
    assert len(os.listdir(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def test_without_locks_only_old_leftovers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none."""

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with replacing(tmp_path / "new") as new, temporary_folder(tmp_path) as old:
        os.utime(old, (0, 0))
        remove_leftovers(tmp_path)
        assert os.listdir(tmp_path) == [new.name]
    assert os.listdir(tmp_path) == ["new"]


def test_a_writer_whose_new_file_was_taken_for_a_leftover_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may remove leftovers between the making of a file and its lock."""
    make, made = files.tempfile.mkstemp, []

    def raced(**options: Any) -> tuple[int, str]:
        handle, name = make(**options)
        made.append(name)
        if len(made) == 1:
            os.unlink(name)
        return handle, name

    monkeypatch.setattr(files.tempfile, "mkstemp", raced)
    write_text(tmp_path / "file", "whole")
    assert len(made) == 2
    assert (tmp_path / "file").read_text(encoding="utf-8") == "whole"
    assert os.listdir(tmp_path) == ["file"]


def test_a_moved_file_is_in_one_place(tmp_path: Path) -> None:
    write_text(tmp_path / "inbox/a", "x")
    move(tmp_path / "inbox/a", tmp_path / "events/part-1")
    assert os.listdir(tmp_path / "inbox") == []
    assert (tmp_path / "events/part-1").read_text(encoding="utf-8") == "x"


def test_a_log_never_grows_without_bound_and_its_writer_need_not_know(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    bound_log(log)
    with log.open("ab", buffering=0) as writer:
        writer.write(b"early " * 20)
        bound_log(log, limit=200, keep=10)
        assert log.stat().st_size == 120
        writer.write(b"late " * 20)
        bound_log(log, limit=200, keep=10)
        assert (log.stat().st_size, (tmp_path / "server.log.old").read_bytes()) == (0, b"late late ")
        writer.write(b"after")
    assert log.read_bytes() == b"after"
