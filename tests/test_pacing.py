"""One `dvc repro` for all stages of a round: each begins when it is asked for, and anything else may come between."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import dvc_at, tools_first
from hypothesis import given
from hypothesis import strategies as st

from al_pipeline.errors import RepositoryError, StageFailed
from al_pipeline.integrations.dvc.pacing import Requests
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.dvc.worker import _plain_yaml
from al_pipeline.integrations.git import Git
from al_pipeline.workspace.layout import STAGES

PIPELINE = "stages:\n" + "".join(
    f"  {name}: {{cmd: 'sh -c \"cat {before} > {name}.out; echo {name} >> ran; test ! -e {name}.bad\"', "
    f"deps: [{before}], outs: [{name}.out]}}\n"
    for before, name in zip(("source", *(f"{one}.out" for one in STAGES)), STAGES, strict=False)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pacing") / "repository"
    root.mkdir()
    Git(root).init()
    (root / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (root / "source").write_text("the source\n", encoding="utf-8")
    with dvc_at(root) as dvc:
        dvc.init("../remote")
        dvc.add(root / "source")
    return root


@pytest.fixture
def dvc(made: Path, tmp_path: Path) -> Iterator[Dvc]:
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    with dvc_at(tmp_path / "copy") as dvc:
        yield dvc


def ran(dvc: Dvc) -> list[str]:
    path = dvc.root / "ran"
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def locked_stages(dvc: Dvc) -> list[str]:
    return [name.removesuffix(".out") for name in dvc.recorded()]


@pytest.mark.slow
def test_a_stage_begins_when_it_is_asked_for(dvc: Dvc) -> None:
    for number, stage in enumerate(STAGES, start=1):
        dvc.repro(stage)
        assert ran(dvc) == locked_stages(dvc) == list(STAGES[:number])
    assert dvc.log.read_text(encoding="utf-8").count("To track the changes with git") == 1 + 1, "`add`, and one command"
    dvc.repro("score")
    assert ran(dvc) == list(STAGES), "it is up to date"
    assert dvc.changed(*STAGES) == {}


@pytest.mark.slow
def test_stages_may_be_passed_over_and_asked_for_again(dvc: Dvc) -> None:
    dvc.repro("label")
    dvc.repro("train")
    (dvc.root / "source").write_text("another source\n", encoding="utf-8")
    dvc.repro("label")
    dvc.repro("train", force=True, run_cache=False)
    dvc.repro("train")
    dvc.repro("evaluate")
    dvc.repro("select") if (dvc.root / "score.out").exists() else dvc.repro("score")
    assert ran(dvc) == ["label", "train", "label", "train", "evaluate", "score"]
    assert (dvc.root / "score.out").read_text(encoding="utf-8") == "another source\n"


@pytest.mark.slow
def test_other_commands_come_between(dvc: Dvc) -> None:
    dvc.repro("label")
    process = dvc._process
    assert process is not None
    by_hand = subprocess.run(
        ["dvc", "status", "label"],
        cwd=dvc.root,
        env={**tools_first(), **dvc.environment},
        capture_output=True,
        text=True,
    )
    assert "up to date" in by_hand.stdout, by_hand.stderr  # a command by hand is not locked out
    dvc.repro("train")
    assert dvc.changed("label", "train") == {}
    dvc.repro("evaluate")
    assert dvc.set_aside_damaged() == []
    dvc.repro("score")
    assert ran(dvc) == list(STAGES[:4])
    assert dvc._process is process and psutil.Process(process.pid).is_running()


@pytest.mark.slow
def test_a_stage_keeps_its_paths_locked(dvc: Dvc) -> None:
    """Each path once, from before it runs until its outputs are recorded: a command by hand must not change them."""
    path = dvc.root / "dvc.yaml"
    path.write_text(PIPELINE.replace("echo label", "cp .dvc/tmp/rwlock during; echo label"), encoding="utf-8")
    for stage in STAGES[:2]:
        dvc.repro(stage)
    held = json.loads((dvc.root / "during").read_text("utf-8"))
    assert [Path(one).name for one in held["read"]] == ["source", "label.out"], "what it reads, and compares"
    assert [Path(one).name for one in held["write"]] == ["label.out"]
    process = dvc._process
    assert process is not None and held["write"][str(dvc.root / "label.out")]["pid"] == process.pid
    assert dvc.changed("label", "train") == {}
    left = json.loads((dvc.root / ".dvc/tmp/rwlock").read_text("utf-8"))
    assert not any(left.values()), "and released"


@pytest.mark.slow
def test_what_was_valid_once_is_validated_again_when_it_changes(dvc: Dvc) -> None:
    path = dvc.root / "dvc.yaml"
    for wrong, says in (("deps: [source]", "deps: source"), ("outs: [train.out]", "outs: {train.out: 1}")):
        path.write_text(PIPELINE.replace(wrong, says), encoding="utf-8")
        with pytest.raises(RepositoryError, match=r"dvc\.yaml.*validation failed"):
            dvc.changed("label")
        path.write_text(PIPELINE, encoding="utf-8")
        dvc.repro("label")


@pytest.mark.slow
def test_a_command_by_hand_that_holds_the_lock_confuses_no_reply(dvc: Dvc) -> None:
    """A build that is left needs the repository's lock once more, to release it."""
    dvc.repro("label")
    hold = (
        "import sys; from zc.lockfile import LockFile; a = LockFile(sys.argv[1]); print(flush=True); sys.stdin.read()"
    )
    lock = str(dvc.root / ".dvc/tmp/lock")
    words = [sys.executable, "-c", hold, lock]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as by_hand:
        assert by_hand.stdout is not None and by_hand.stdout.readline()
        with pytest.raises(RepositoryError, match="lock"):
            dvc.changed("label")
        assert by_hand.stdin is not None
        by_hand.stdin.close()
    assert dvc.changed("label") == {}
    assert dvc.changed("train") != {}
    dvc.repro("train")
    assert ran(dvc) == ["label", "train"]


@pytest.mark.slow
def test_a_stage_that_fails_is_the_one_that_is_named(dvc: Dvc) -> None:
    dvc.repro("label")
    (dvc.root / "train.bad").touch()
    with pytest.raises(StageFailed, match="stage train failed") as caught:
        dvc.repro("train")
    assert "select" not in str(caught.value)
    (dvc.root / "train.bad").unlink()
    for stage in STAGES:
        dvc.repro(stage)
    assert ran(dvc) == ["label", "train", *STAGES[1:]]


@pytest.mark.slow
def test_a_build_that_is_left_ends_with_its_session(dvc: Dvc) -> None:
    dvc.repro("label")
    assert dvc._process is not None
    pid = dvc._process.pid
    dvc.close()
    assert not psutil.pid_exists(pid)
    dvc.repro("train")
    assert ran(dvc) == ["label", "train"]


def test_a_request_is_read_once_and_may_be_put_back() -> None:
    requests = Requests(io.StringIO('["one"]\n{"two": 2}\n'))
    assert next(requests) == ["one"]
    requests.put_back({"again": 1})
    assert list(requests) == [{"again": 1}, {"two": 2}]


# The lock file ------------------------------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("abcxyz ABC019._-/:#éß,"), min_size=1).map(str.strip).filter(bool)
TEXT = st.text(max_size=8)
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
DATA = st.dictionaries(TEXT, st.lists(VALUES, max_size=4) | st.dictionaries(TEXT, VALUES, max_size=3), min_size=1)


def written(data: Any) -> str:
    text = io.StringIO()
    _plain_yaml().dump(data, text)
    return text.getvalue()


@given(DATA)
def test_the_lock_file_is_read_as_it_was_written(data: dict[str, Any]) -> None:
    from dvc.utils.serialize._yaml import parse_yaml

    assert parse_yaml(written(data), "dvc.lock") == data


def test_a_class_may_be_named_by_characters_that_dvc_itself_does_not_read_back() -> None:
    from dvc.utils.serialize._yaml import dumps_yaml, parse_yaml

    data = {"labels": ["a\x85b", "spam"]}
    assert parse_yaml(dumps_yaml(data), "dvc.lock") != data, "if DVC reads it back now, this writer can go"
    assert parse_yaml(written(data), "dvc.lock") == data


@given(
    st.dictionaries(st.sampled_from(["deps", "outs", "params"]), st.lists(st.dictionaries(WORDS, WORDS, min_size=1)))
)
def test_it_is_the_text_that_dvc_writes(data: dict[str, Any]) -> None:
    from dvc.utils.serialize._yaml import dumps_yaml

    assert written({"schema": "2.0", **data}) == dumps_yaml({"schema": "2.0", **data})
