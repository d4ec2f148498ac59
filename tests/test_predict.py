"""`al predict`: the promoted model or a round's own, fetched once, checked by digest, on whatever rows come."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import play, small_workspace
from msgspec.structs import replace

from al_pipeline.cli import app as cli
from al_pipeline.data.pool import fetch, read_ids
from al_pipeline.errors import BadInput, NothingToDo, RepositoryError, UnexpectedChange
from al_pipeline.files import read_json, sha256_tree, write_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import predict as module
from al_pipeline.operations.guess import guess
from al_pipeline.operations.history import History, read_history
from al_pipeline.operations.predict import csv_lines, model_folder, predict, read_texts
from al_pipeline.workspace.workspace import Workspace, open_workspace

TEXTS = [("a", "win money now, free offer today"), ("b", "meeting agenda tomorrow, minutes of the call"), ("c", "?")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two published rounds, the first promoted."""
    made, truth = small_workspace(
        tmp_path_factory.mktemp("predict"), changes={"min_test_per_class: 10": "min_test_per_class: 0"}
    )
    play(made, SimulatedOracle(), truth, 2)
    return open_workspace(made.layout.root)


def history(workspace: Workspace) -> History:
    return read_history(workspace.layout, Git(workspace.layout.root))


def run(workspace: Workspace, number: int | None = None) -> list[dict[str, Any]]:
    return list(predict(workspace, iter([TEXTS[:2], TEXTS[2:]]), number))


@pytest.mark.slow
def test_the_promoted_model_answers_each_text_in_its_order(workspace: Workspace) -> None:
    promoted = history(workspace).promoted
    assert promoted is not None
    rows = run(workspace)
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [row["label"] for row in rows[:2]] == ["spam", "ham"]
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["probability"] == max(row["probabilities"].values()) == row["probabilities"][row["label"]]
        assert list(row["probabilities"]) == ["ham", "spam"]
    assert rows == run(workspace, int(promoted.removeprefix("round-")))


@pytest.mark.slow
def test_each_round_has_a_model_of_its_own(workspace: Workspace) -> None:
    assert run(workspace, 0) != run(workspace, 1)
    for number in (0, 1):
        found, folder = model_folder(workspace, number)
        assert found == number
        assert sha256_tree(folder / "model") == history(workspace).record(number).hashes["model"]
    assert Git(workspace.layout.root).run("status", "--porcelain").stdout == "", "the work tree is left alone"


@pytest.mark.slow
def test_a_model_is_fetched_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(workspace, 0)

    def no_dvc(_: Any) -> None:
        pytest.fail("fetched again")

    monkeypatch.setattr(module, "open_dvc", no_dvc)
    assert run(workspace, 0) == expected


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a changed byte", "a lost file", "a lost folder", "a lost mark", "an older mark"])
def test_a_damaged_copy_is_fetched_again(workspace: Workspace, damage: str) -> None:
    expected = run(workspace, 0)
    _, folder = model_folder(workspace, 0)
    file = max((path for path in (folder / "model").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "a changed byte":
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    elif damage == "a lost file":
        file.unlink()
    elif damage == "a lost folder":
        shutil.rmtree(folder)
    elif damage == "an older mark":
        write_json(folder / "complete.json", sha256_tree(folder / "model"))
    else:
        (folder / "complete.json").unlink()
    assert run(workspace, 0) == expected
    assert read_json(folder / "complete.json") == {part: sha256_tree(folder / part) for part in ("model", "encoder")}


@pytest.mark.slow
def test_a_model_that_is_not_the_recorded_one_is_not_used(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = history(workspace)
    record = replace(whole.rounds[0], hashes={**whole.rounds[0].hashes, "model": "0" * 64})
    monkeypatch.setattr(module, "read_history", lambda *_: replace(whole, rounds=(record,)))
    with pytest.raises(RepositoryError, match="its record has 000000000000; `al doctor`"):
        model_folder(workspace, 0)
    monkeypatch.undo()
    run(workspace, 0)


@pytest.mark.slow
def test_a_model_is_not_used_with_another_encoder(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_features", lambda _: SimpleNamespace(uses_encoder=True))
    monkeypatch.setattr("al_pipeline.features.vectors.Vectors", lambda *_: SimpleNamespace(identity="another"))
    with pytest.raises(BadInput, match="not the one that its model was fitted on"):
        run(workspace, 0)


@pytest.mark.slow
def test_a_guess_is_made_by_the_published_model_alone(workspace: Workspace) -> None:
    card = workspace.layout.model / "card.json"
    items = list(fetch([workspace.layout.pool], list(read_ids([workspace.layout.pool]).ids())[:2]).values())
    assert len(guess(workspace, items)) == 2
    whole = card.read_bytes()
    card.unlink()
    card.write_bytes(whole + b" ")
    try:
        with pytest.raises(UnexpectedChange, match="not the model of the last record"):
            guess(workspace, items)
    finally:
        card.write_bytes(whole)


@pytest.mark.slow
def test_without_a_promoted_model_it_says_how_to_take_another(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = history(workspace)
    held = tuple(replace(record, decision=replace(record.decision, verdict="held")) for record in whole.rounds)
    monkeypatch.setattr(module, "read_history", lambda *_: replace(whole, rounds=held))
    with pytest.raises(NothingToDo, match="no model is promoted yet.*--round N"):
        model_folder(workspace)
    with pytest.raises(NothingToDo, match="round-0009 is not published"):
        model_folder(workspace, 9)
    (tmp_path / "a.csv").write_text("text\nhello\n", encoding="utf-8")
    monkeypatch.setattr(
        sys,
        "argv",
        ["al", "-C", str(workspace.layout.root), "predict", str(tmp_path / "a.csv"), "-o", str(tmp_path / "o")],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to_file", [False, True])
def test_the_command_writes_one_object_a_row_and_warns_beside_it(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    to_file: bool,
) -> None:
    (tmp_path / "in.jsonl").write_text(
        '{"id": "x", "text": "win money now"}\n{broken\n{"id": "y", "text": ""}\n', "utf-8"
    )
    arguments = ["predict", str(tmp_path / "in.jsonl"), "--round", "round-0001"]
    arguments += ["--out", str(tmp_path / "out.jsonl")] if to_file else []
    monkeypatch.setattr(sys, "argv", ["al", "-C", str(workspace.layout.root), *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    said = capsys.readouterr()
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8") if to_file else said.out
    (row,) = (json.loads(line) for line in text.splitlines())
    assert (row["id"], row["label"]) == ("x", "spam")
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["row 2 is skipped", "row 3 is skipped"]


def al(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["al", "-C", str(workspace.layout.root), "predict", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["encoding", "stdin", "folder", "gzip", "xlsx", "sep="])
def test_the_command_reads_what_ingest_reads(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    plain = "id;text\nx;win money now café\n"
    file, words = tmp_path / "a.csv", [str(tmp_path / "a.csv")]
    match how:
        case "encoding":
            file.write_bytes(plain.encode("cp850"))
            words += ["--encoding", "cp850"]
        case "stdin":
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(plain.encode())))
            words = ["-", "--input-format", "csv"]
        case "folder":
            (tmp_path / "in").mkdir()
            (tmp_path / "in/a.csv").write_text(plain, encoding="utf-8")
            (tmp_path / "in/b.jsonl").write_text('{"text": "meeting agenda tomorrow"}\n', encoding="utf-8")
            words = [str(tmp_path / "in")]
        case "gzip":
            file.write_bytes(gzip.compress(plain.encode(), mtime=0))
        case "xlsx":
            book = openpyxl.Workbook()
            for row in (["id", "text"], ["x", "win money now café"]):
                book.active.append(row)
            book.save(tmp_path / "a.xlsx")
            words = [str(tmp_path / "a.xlsx")]
        case _:
            file.write_text(f"sep=;\n{plain}", encoding="utf-8")
    assert al(workspace, monkeypatch, *words, "--round", "1", "--columns") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (rows[0]["id"], rows[0]["label"]) == ("x", "spam")
    assert rows[0]["columns"]["text"] == "win money now café"
    assert [row["id"] for row in rows[1:]] == (["b.jsonl:1"] if how == "folder" else [])


@pytest.mark.slow
@pytest.mark.parametrize("to_file", [False, True])
def test_csv_keeps_the_inputs_columns_and_holds_no_formula(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    to_file: bool,
) -> None:
    rows = [
        {"id": 1.0, "text": "=cmd|'/c calc'!A1 win money now", "label": "mine", "=x": "+1"},
        {"id": "@b", "text": "meeting agenda tomorrow\nminutes", "more": [1, {"é": "\ud800"}], "none": None},
        {"text": "\ud800"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [str(tmp_path / "in.jsonl"), "--columns", "--round", "1"]
    words += ["-o", str(tmp_path / "out.csv")] if to_file else ["--format", "csv"]
    assert al(workspace, monkeypatch, *words) == 0
    said = capsys.readouterr()
    assert "row 3 is skipped: the text holds half a surrogate pair" in said.err
    content = (tmp_path / "out.csv").read_text(encoding="utf-8") if to_file else said.out
    found = list(csv.DictReader(io.StringIO(content)))
    assert list(found[0]) == [
        "text", "input_label", "'=x", "more", "none", "id", "label", "probability", "probability_ham",
        "probability_spam",
    ]  # fmt: skip
    assert [row["id"] for row in found] == ["1", "'@b"]
    assert [row["label"] for row in found] == ["spam", "ham"]
    assert (found[0]["text"], found[0]["input_label"], found[0]["'=x"]) == (f"'{rows[0]['text']}", "mine", "'+1")
    assert found[1]["text"] == "meeting agenda tomorrow\nminutes"
    assert found[1]["more"].startswith('[1, {"é": ') and found[1]["none"] == ""
    assert max(float(found[0]["probability_ham"]), float(found[0]["probability_spam"])) == float(
        found[0]["probability"]
    )
    import_back = [pair for batch in read_texts(tmp_path / "in.jsonl", "text", None, lambda _: None) for pair in batch]
    assert [pair[0] for pair in import_back] == ["1", "@b"]


@pytest.mark.slow
def test_typed_texts_and_a_table_without_rows(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert al(workspace, monkeypatch, "--text", "win money now", "--text=-meeting agenda", "--round", "1") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["id"], row["label"]) for row in rows] == [("1", "spam"), ("2", "ham")]
    (tmp_path / "a.csv").write_text("id,text\n", encoding="utf-8")
    assert al(workspace, monkeypatch, str(tmp_path / "a.csv"), "--format", "csv", "--round", "1") == 0
    assert capsys.readouterr().out == "id,label,probability,probability_ham,probability_spam\n"
    before = (tmp_path / "a.csv").read_bytes()
    for words, says in (
        ([], "name either a FILE"),
        (["a.csv", "--text", "x"], "name either a FILE"),
        (["--text", " "], "no text"),
        (["--text", "x\udcff"], "half a surrogate pair"),
        (["--text", "x", "--columns"], "leave it out with --text"),
        (["--text", "x", "--format", "xml"], "csv or jsonl, not 'xml'"),
        (["--text", "x", "--format", "csv", "--json"], "cannot be combined"),
        (["--text", "x", "-o", str(tmp_path)], "is a folder"),
        (["--text", "x", "-o", str(tmp_path / "a.parquet")], "not .parquet"),
        ([str(tmp_path / "a.csv"), "-o", str(tmp_path / "a.csv")], "is the input file"),
        ([str(tmp_path / "a.csv"), "--encoding", "klingon"], "unknown encoding"),
    ):
        assert al(workspace, monkeypatch, *words, "--round", "1") == 2, words
        said = capsys.readouterr()
        assert says in " ".join(said.err.split()), words
        assert not [line for line in said.out.splitlines() if line.startswith("id,")]
    assert (tmp_path / "a.csv").read_bytes() == before
    assert al(workspace, monkeypatch, "--text", "x", "--format", "csv", "--round", "9") == 3
    assert capsys.readouterr().out == "", "no header before the error"


def test_ids_are_those_that_ingest_gives(tmp_path: Path) -> None:
    """pandas makes floats of a column of whole numbers in which one is missing."""
    frame = {"id": [1.0, None, 3.0, 2.5], "text": ["a", "b", "c", "d"]}
    pq.write_table(pa.table(frame), tmp_path / "a.parquet")
    batches = read_texts(tmp_path / "a.parquet", "text", None, lambda _: None)
    assert [row[0] for batch in batches for row in batch] == ["1", "2", "3", "2.5"]


def test_many_rows_that_are_passed_over_are_a_few_warnings(tmp_path: Path) -> None:
    rows, warned = read(tmp_path / "a.csv", "id,text\n" + "x,\n" * 500 + "y,good\n")
    assert rows == [("y", "good")]
    assert len(warned) == 21
    assert warned[-1] == "500 rows were skipped, 480 of them not shown here"


def test_columns_of_the_input_never_hide_ours_nor_each_other() -> None:
    names = ["id", "key", "label", "input_label", "probability_a", "text"]
    row = {"id": "7", "label": "a", "probability": 0.5, "probabilities": {"a": 0.5, "b": 0.5}}
    row["columns"] = {name: name.upper() for name in names}
    header, line = csv_lines(iter([row]), ["a", "b"], names, "key")
    assert header == (
        "input_id,input_label,input_input_label,input_probability_a,text,"
        "id,label,probability,probability_a,probability_b\n"
    )
    assert line == "ID,LABEL,INPUT_LABEL,PROBABILITY_A,TEXT,7,a,0.5,0.5,0.5\n"


# Reading a user's file ----------------------------------------------------------------------------------------------


def read(path: Path, content: str, **more: Any) -> tuple[list[tuple[str, str]], list[str]]:
    path.write_text(content, encoding="utf-8")
    warned: list[str] = []
    batches: Iterator[list[tuple[str, str]]] = read_texts(path, more.get("text", "text"), more.get("id"), warned.append)
    return [pair for batch in batches for pair in batch], warned


def test_rows_of_a_csv_come_with_their_ids_or_their_numbers(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "id,text\nx,one\ny,two\n") == ([("x", "one"), ("y", "two")], [])
    assert read(tmp_path / "a.csv", "text\none\ntwo\n") == ([("2", "one"), ("3", "two")], [])
    assert read(tmp_path / "a.csv", "id,text\n,one\n") == ([("2", "one")], [])
    assert read(tmp_path / "a.csv", "n,body\n7,one\n", text="body", id="n") == ([("7", "one")], [])


def test_rows_of_jsonl_that_are_no_good_are_passed_over_with_their_place(tmp_path: Path) -> None:
    lines = [
        '{"id": 5, "text": "one"}',
        "{broken",
        '{"id": "b", "text": 7}',
        '{"id": "c"}',
        '{"id": "d", "text": "   "}',
        "[1, 2]",
        '{"id": null, "text": "two"}',
    ]
    rows, warned = read(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
    assert rows == [("5", "one"), ("7", "two")]
    assert [int(text.split()[1]) for text in warned] == [2, 3, 4, 5, 6]


def test_rows_of_a_csv_that_are_no_good_are_passed_over_with_their_place(tmp_path: Path) -> None:
    rows, warned = read(tmp_path / "a.csv", "id,text\nx,one\ny,\nz,a,b,c\nw,two\n")
    assert rows == [("x", "one"), ("w", "two")]
    assert [int(text.split()[1]) for text in warned] == [3, 4]


@pytest.mark.parametrize(("text", "more"), [("id,body\nx,one\n", {}), ("text\none\n", {"id": "key"}), ("", {})])
def test_a_file_without_the_column_is_refused(tmp_path: Path, text: str, more: dict[str, str]) -> None:
    with pytest.raises(BadInput):
        read(tmp_path / "a.csv", text, **more)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        list(read_texts(tmp_path / "never.csv", "text", None, lambda _: None))
