"""`al export`: the labels of a published round, in each format, whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from harness import play, small_workspace
from msgspec.structs import replace

from al_pipeline.annotation.votes import supporters
from al_pipeline.cli import app as cli
from al_pipeline.data.outputs import from_csv_cell, read_labeled
from al_pipeline.errors import BadInput, UsageError
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.export import FORMATS, Row, _check_target, _format, export, write_rows
from al_pipeline.records import Event, LabelIntervention, Selection
from al_pipeline.workspace.workspace import open_workspace

ANN, BOB = "ann@example.org", "bob@example.org"
ROWS = [
    Row("a", '=HYPERLINK("x")', "ham", (ANN, BOB), 1.0, 0, "pool"),
    Row("b", "two\nlines, é", "-spam", (BOB,), 0.5, 1, "test"),
]


def answer(key: str, person: str, label: str, kind: Any = "label", **more: Any) -> Event:
    return Event(f"{key}-{kind}", kind, "x", "", "pool", 0, key, person, label, **more)


def test_the_annotators_are_those_whose_standing_answers_give_the_label() -> None:
    said = [answer("1", BOB, "ham"), answer("2", ANN, "ham"), answer("3", "eve", "spam"), answer("4", ANN, "ham")]
    assert supporters(said, {"x": "ham"}) == {"x": (ANN, BOB)}
    edited = [*said, answer("1", BOB, "spam", "supersede")]
    assert supporters(edited, {"x": "ham"}) == {"x": (ANN,)}
    asked = LabelIntervention("revoke", selection=Selection(annotator=BOB))
    revoked = replace(answer("intervention:1", "", "", "quarantine"), item_id="", label=None, intervention=asked)
    assert supporters([*said, revoked], {"x": "ham"}) == {"x": (ANN,)}


def test_a_csv_runs_no_formula_and_loses_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", "csv", ROWS, with_part=True)
    first, second = csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text("utf-8"), newline=""))
    assert first["text"] == "'" + ROWS[0].text and first["annotators"] == f"{ANN};{BOB}"
    assert (second["text"], second["label"], second["part"]) == (ROWS[1].text, "'-spam", "test")
    assert from_csv_cell(second["label"]) == "-spam"


def test_jsonl_and_parquet_hold_the_same(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", "jsonl", ROWS, with_part=False)
    write_rows(tmp_path / "a.parquet", "parquet", ROWS, with_part=False)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert lines == pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert lines[0]["annotators"] == [ANN, BOB] and "part" not in lines[0]


def test_a_replacement_that_fails_leaves_the_last_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "set", Path.replace
    write_rows(out, "datasets", ROWS, with_part=True)
    before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fails(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no more room")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no more room"):
        write_rows(out, "datasets", ROWS[:1], with_part=False)
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_for_datasets_has_a_split_for_each_part_and_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "set"
    write_rows(out, "datasets", ROWS, with_part=True)
    header = yaml.safe_load((out / "README.md").read_text("utf-8").split("---")[1])
    splits = {one["split"]: one["path"] for one in header["configs"][0]["data_files"]}
    assert {name: [p.name for p in out.glob(path)] for name, path in splits.items()} == {
        name: [f"{name}-00000-of-00001.parquet"] for name in ("train", "test")
    }
    _check_target(out, "datasets", force=True)
    write_rows(out, "datasets", ROWS[:1], with_part=False)
    assert [path.name for path in (out / "data").iterdir()] == ["train-00000-of-00001.parquet"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"], "no leftovers"
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"thesis\.txt"):
        _check_target(out, "datasets", force=True)


def test_what_is_there_stays_without_force(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(BadInput, match="--force"):
        _check_target(tmp_path / "a.csv", "csv", force=False)
    _check_target(tmp_path / "a.csv", "csv", force=True)
    for out, form in ((tmp_path / "never/a.csv", "csv"), (tmp_path, "csv"), (tmp_path / "a.csv", "datasets")):
        with pytest.raises(BadInput):
            _check_target(out, form, force=True)


def test_the_format_comes_from_the_suffix_or_is_asked_for() -> None:
    assert [_format(Path(f"a.{form}"), None) for form in FORMATS[:3]] == list(FORMATS[:3])
    assert _format(Path("a.csv"), "datasets") == "datasets"
    for out, form in (("a", None), ("a.csv", "xml")):
        with pytest.raises(UsageError, match="csv, jsonl, parquet, datasets"):
            _format(Path(out), form)


@pytest.mark.slow
def test_the_labels_of_a_round_are_exported_whatever_is_in_the_work_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, truth = small_workspace(tmp_path, size=60)
    play(made, SimulatedOracle(), truth, 1)
    workspace = open_workspace(made.layout.root)
    wanted = {row.item_id: row.label for row in read_labeled(workspace.layout.labeled)}
    workspace.layout.labeled.unlink()
    out = tmp_path / "out.jsonl"
    done = export(workspace, out)
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert {line["item_id"]: line["label"] for line in lines} == wanted and done.rows == len(wanted)
    assert all(line["annotators"] == [ANN] and line["text"] and line["round"] == 0 for line in lines)
    capsys.readouterr()
    arguments = ["export", "--out", str(tmp_path / "set"), "--format", "datasets", "--test", "--round", "0", "--json"]
    monkeypatch.setattr(sys, "argv", ["al", "-C", str(made.layout.root), *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["rows"] == len(wanted) + 12
    assert pq.read_table(tmp_path / "set/data/test-00000-of-00001.parquet").num_rows == 12
