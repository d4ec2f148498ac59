"""Taking users' files in: whole or not at all, twice is as good as once, and every refusal has its reason."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import small_workspace
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline import files
from al_pipeline.annotation.aggregation import fold
from al_pipeline.data.ledger import append_part, read_events
from al_pipeline.data.pool import iter_items
from al_pipeline.errors import AlError, BadInput, UnusableFile
from al_pipeline.files import read_jsonl
from al_pipeline.operations import ingest as module
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.ingestion import intake
from al_pipeline.operations.ingestion import rejects as rejecting
from al_pipeline.operations.ingestion.report import IngestReport
from al_pipeline.operations.ingestion.staging import finish_ingest
from al_pipeline.operations.status import status
from al_pipeline.records import Event, Item, content_hash
from al_pipeline.workspace.workspace import LAYOUT_VERSION, Workspace, open_workspace

TEMPLATE = (Path(__file__).parents[1] / "params.yaml").read_text()


def make_workspace(root: Path, test_size: int = 0) -> Workspace:
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(TEMPLATE.replace("test_size: 500", f"test_size: {test_size}"))
    (root / "al-workspace.json").write_text(f'{{"layout": {LAYOUT_VERSION}, "workspace_id": "0123456789ab"}}')
    return open_workspace(root)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "ws")


@pytest.fixture
def drawing(tmp_path: Path) -> Workspace:
    """A workspace that draws a test set of 5."""
    return make_workspace(tmp_path / "ws", test_size=5)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pool(workspace: Workspace) -> list[Item]:
    return [item for batch in iter_items([workspace.layout.pool, workspace.layout.inbox_pool]) for item in batch]


def test_set(workspace: Workspace) -> list[Item]:
    return [item for batch in iter_items([workspace.layout.test, workspace.layout.inbox_test]) for item in batch]


test_set.__test__ = False  # type: ignore[attr-defined]


def events(workspace: Workspace) -> list[Event]:
    return read_events(workspace.layout.events, workspace.layout.inbox_events)


def labels(workspace: Workspace) -> dict[str, str]:
    folded = fold(events(workspace), ["ham", "spam"])
    return {row.item_id: row.label for row in (*folded.labeled, *folded.test)}


def snapshot(workspace: Workspace) -> dict[str, str]:
    """Every file below `data/`, by digest."""
    root = workspace.layout.root
    found = sorted(path for path in (root / "data").rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def rejects(report: IngestReport) -> list[dict[str, Any]]:
    assert report.rejects_file is not None
    return read_jsonl(report.rejects_file)


def close(workspace: Workspace) -> None:
    """What closing a round does to the inbox, as far as ingest can tell."""
    layout = workspace.layout
    for inbox, target in ((layout.inbox_pool, layout.pool), (layout.inbox_test, layout.test)):
        target.mkdir(parents=True, exist_ok=True)
        for part in sorted(inbox.glob("*.parquet")):
            part.replace(target / f"part-{len(list(target.iterdir())) + 1:06d}.parquet")
    append_part(layout.events, read_events(layout.inbox_events))
    for path in layout.inbox_events.glob("*.jsonl"):
        path.unlink()


# Items -------------------------------------------------------------------------------------------------------------
def test_rows_become_items_in_the_inbox_alone(workspace, tmp_path):
    file = write(tmp_path / "a.csv", "id,text,from,n", "a,first,me,1", "b, second ,you,2", ",third,,")
    report = ingest(workspace, [file])
    assert (report.rows, report.added, report.test_added, report.duplicates) == (3, 3, 0, 0)
    first, second, third = pool(workspace)
    assert first == Item("a", content_hash("first"), "first", '{"from":"me","n":"1"}')
    assert second.text == " second "
    assert third.item_id == content_hash("third")[:20]
    assert set(snapshot(workspace)) == {"data/inbox/pool/part-000001.parquet"}


def test_json_values_are_kept_in_the_metadata(workspace, tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "x", "id": 7, "tags": ["ä", 1], "deep": {"b": null, "a": 1.5}}')
    ingest(workspace, [file])
    assert pool(workspace)[0].item_id == "7"
    assert pool(workspace)[0].metadata == '{"deep":{"a":1.5,"b":null},"tags":["ä",1]}'


def test_columns_can_be_named(workspace, tmp_path):
    file = write(tmp_path / "a.csv", "key;id;body;class", "k1;1;hello;ham")
    ingest(workspace, [file], text_column="body", id_column="key", label_column="class")
    assert pool(workspace) == [Item("k1", content_hash("hello"), "hello", '{"id":"1"}')]
    assert labels(workspace) == {"k1": "ham"}


def test_the_same_content_is_taken_once(workspace, tmp_path):
    file = write(tmp_path / "a.csv", "id,text", "a,same", "b,same", "c,  same ", "d,cafe\u0301", "e,caf\u00e9")
    report = ingest(workspace, [file])
    assert (report.added, report.duplicates, dict(report.rejected)) == (2, 3, {})
    assert [item.item_id for item in pool(workspace)] == ["a", "d"]


@pytest.mark.parametrize("closed", [False, True])
def test_twice_is_as_good_as_once(drawing, tmp_path, closed):
    rows = [f"{n},text {n},{'ham' if n % 2 else 'spam'}" for n in range(100)]
    file = write(tmp_path / "a.csv", "id,text,label", *rows, "1,other text,ham", "x,y,z,w")
    first = ingest(drawing, [file], label_column="label")
    if closed:
        close(drawing)
    before = snapshot(drawing)
    again = ingest(drawing, [file], label_column="label")
    assert snapshot(drawing) == before
    assert (first.added, first.test_added, first.labels) == (95, 5, 100)
    assert (again.added, again.test_added, again.labels, again.duplicates) == (0, 0, 0, 100)
    assert again.rejected == first.rejected
    assert again.rejects_file == first.rejects_file


def test_later_files_add_to_what_is_there(workspace, tmp_path):
    one, two = write(tmp_path / "a.csv", "id,text", "a,1", "b,2"), write(tmp_path / "b.csv", "text", "2", "3")
    ingest(workspace, [one])
    report = ingest(workspace, [two])
    assert (report.added, report.duplicates) == (1, 1)
    assert [path.name for path in sorted(workspace.layout.inbox_pool.iterdir())] == [
        "part-000001.parquet",
        "part-000002.parquet",
    ]
    assert [item.text for item in pool(workspace)] == ["1", "2", "3"]


def test_several_files_and_formats_at_once(workspace, tmp_path):
    one = write(tmp_path / "a.csv", "text", "1", "2")
    two = write(tmp_path / "b.jsonl", '{"text": "2"}', '{"text": "3"}')
    told: list[tuple[int, int]] = []
    report = ingest(workspace, [one, two], progress=lambda done, total: told.append((done, total)))
    assert (report.rows, report.added, report.duplicates) == (4, 3, 1)
    total = one.stat().st_size + two.stat().st_size
    assert told[-1] == (total, total)
    assert told == sorted(told)


# Refusals ----------------------------------------------------------------------------------------------------------
def test_each_refusal_has_its_reason_and_its_place(workspace, tmp_path):
    half = '"\\ud800"'
    lines = [
        ('{"text": "good", "id": "g"}', None),
        ('{"text": "other", "id": "g"}', "the id belongs to another text"),
        ('{"text": ""}', "no text"),
        ('{"text": " \\n "}', "no text"),
        ('{"text": null}', "no text"),
        ('{"body": "x"}', "no text"),
        ('{"text": 5}', "the text is not a string"),
        (f'{{"text": {half}}}', "the text holds half a surrogate pair, which UTF-8 cannot store"),
        (f'{{"text": "a", "m": {half}}}', "the other columns hold half a surrogate pair, which UTF-8 cannot store"),
        (f'{{"text": "a", {half}: 1}}', "the other columns hold half a surrogate pair, which UTF-8 cannot store"),
        ('{"text": "b", "m": 1e999}', "the other columns cannot be kept as JSON"),
        (
            json.dumps({"text": "c", "m": "x" * 1_000_001}),
            "the other columns hold more than 1,000,000 characters",
        ),
        (
            json.dumps({"text": "x" * 200_001}),
            "the text is longer than 200,000 characters (ingest.max_characters)",
        ),
        ('{"text": "d", "id": [1]}', "the id is neither a string nor a whole number"),
        ('{"text": "e", "id": "a\\u0000b"}', "the id holds characters that cannot be printed"),
        (json.dumps({"text": "f", "id": "x" * 201}), "the id is longer than 200 characters"),
        ("{", "not valid JSON"),
        ('{"text": "=HYPERLINK(\\"http://x\\")"}', None),
    ]
    report = ingest(workspace, [write(tmp_path / "mails.jsonl", *(line for line, _ in lines))])
    expected = [(number, reason) for number, (_, reason) in enumerate(lines, start=1) if reason]
    assert [(row["line"], row["reason"]) for row in rejects(report)] == expected
    assert sum(report.rejected.values()) == len(expected)
    assert report.rows == report.added + report.duplicates + len(expected)
    assert {row["file"] for row in rejects(report)} == {"mails.jsonl"}
    assert report.rejects_file.parent == workspace.layout.rejects
    assert [item.text for item in pool(workspace)] == ["good", '=HYPERLINK("http://x")']


def test_a_refused_row_takes_neither_id_nor_content(workspace, tmp_path):
    too_long = json.dumps({"text": "taken", "id": "i", "m": "x" * 1_000_001})
    file = write(tmp_path / "a.jsonl", too_long, '{"text": "taken", "id": "i"}')
    report = ingest(workspace, [file])
    assert (report.added, sum(report.rejected.values())) == (1, 1)


def test_nul_is_kept_in_the_pool(workspace, tmp_path):
    ingest(workspace, [write(tmp_path / "a.csv", "text", "a\0b")])
    assert pool(workspace)[0].text == "a\0b"


def test_a_file_that_is_wrong_changes_nothing(workspace, tmp_path):
    good = write(tmp_path / "good.csv", "text", "a", '"bad" row')
    for bad in (tmp_path / "missing.csv", tmp_path, write(tmp_path / "b.csv", "body", "x"), Path("a\0b")):
        with pytest.raises(BadInput):
            ingest(workspace, [good, bad])
        assert snapshot(workspace) == {}
    with pytest.raises(BadInput, match="no column `nope`; it has: text"):
        ingest(workspace, [good], label_column="nope")
    with pytest.raises(BadInput, match="three different columns"):
        ingest(workspace, [good], label_column="text")
    with pytest.raises(BadInput, match="at least one file"):
        ingest(workspace, [])


# The test set ------------------------------------------------------------------------------------------------------
def test_the_first_ingest_draws_the_test_set(drawing, tmp_path):
    file = write(tmp_path / "a.csv", "id,text", *(f"{n},text {n}" for n in range(50)))
    report = ingest(drawing, [file])
    assert (report.added, report.test_added, report.drawn, report.notes) == (45, 5, True, ())
    drawn = {item.content_hash for item in test_set(drawing)}
    assert len(drawn) == 5
    assert drawn.isdisjoint(item.content_hash for item in pool(drawing))
    later = ingest(drawing, [write(tmp_path / "b.csv", "text", *(f"more {n}" for n in range(50)))])
    assert (later.added, later.test_added, later.drawn) == (50, 0, False)


@pytest.mark.slow
def test_the_status_counts_a_test_set_that_no_tick_has_taken_in(tmp_path):
    workspace, _ = small_workspace(tmp_path)
    found = status(workspace, ask=False)
    assert (found.pool, found.test, found.test_labelled) == (68, 12, 0)
    ingest(workspace, [write(tmp_path / "more.csv", "text", "one more", "and another")], test=True)
    assert status(workspace, ask=False).test == 14


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_the_draw_does_not_depend_on_the_order_of_rows_or_files(tmp_path_factory, rng: random.Random, cuts: int):
    rows = [f"{n},text {n}" for n in range(60)]
    drawn = []
    for shuffled in (rows, rng.sample(rows, len(rows))):
        folder = tmp_path_factory.mktemp("draw")
        space = make_workspace(folder / "ws", test_size=7)
        size = -(-len(rows) // cuts)
        parts = [shuffled[start : start + size] for start in range(0, len(rows), size)]
        ingest(space, [write(folder / f"{n}.csv", "id,text", *part) for n, part in enumerate(parts)])
        drawn.append({item.item_id for item in test_set(space)})
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 7


def test_the_draw_takes_at_most_a_fifth(drawing, tmp_path):
    report = ingest(drawing, [write(tmp_path / "a.csv", "text", *(f"text {n}" for n in range(10)))])
    assert (report.added, report.test_added) == (8, 2)
    assert "at most a fifth of 10 new items" in report.notes[0]


def test_too_few_items_leave_the_draw_to_the_next_ingest(drawing, tmp_path):
    report = ingest(drawing, [write(tmp_path / "a.csv", "text", "a", "b")])
    assert (report.added, report.drawn) == (2, False)
    assert "too few" in report.notes[0]
    assert ingest(drawing, [write(tmp_path / "b.csv", "text", *(f"text {n}" for n in range(50)))]).test_added == 5


def test_a_given_test_set_is_not_drawn_and_is_disjoint_from_the_pool(drawing, tmp_path):
    given_set = write(tmp_path / "test.csv", "id,text,label", "t1,one,ham", "t2,two,spam")
    report = ingest(drawing, [given_set], label_column="label", test=True)
    assert (report.added, report.test_added, report.drawn, report.labels) == (0, 2, False, 2)
    assert {event.part for event in events(drawing)} == {"test"}
    rows = ["t1,one", *(f"p{n},text {n}" for n in range(50))]
    report = ingest(drawing, [write(tmp_path / "pool.csv", "id,text", *rows)])
    assert (report.added, report.test_added, report.duplicates) == (50, 0, 1)
    more = write(tmp_path / "more.csv", "id,text,label", "x,text 3,ham", "t1,one,ham", "t3,three,ham")
    report = ingest(drawing, [more], label_column="label", test=True)
    assert (report.test_added, report.duplicates, report.labels) == (1, 1, 1)
    assert report.rejected == {"the same text is in the pool": 1}
    assert [item.item_id for item in test_set(drawing)] == ["t1", "t2", "t3"]


# Labels ------------------------------------------------------------------------------------------------------------
def test_labels_become_import_events(drawing, tmp_path):
    rows = [f"{n},text {n},{'ham' if n % 3 else ''}" for n in range(30)]
    report = ingest(drawing, [write(tmp_path / "a.csv", "id,text,label", *rows)], label_column="label")
    assert report.labels == 20 == len(events(drawing))
    in_test = {item.item_id for item in test_set(drawing)}
    for event in events(drawing):
        assert (event.type, event.round, event.annotator, event.label) == ("import", -1, "import", "ham")
        assert event.annotation_key == f"import:{event.content_hash}"
        assert event.part == ("test" if event.item_id in in_test else "pool")
        assert event.origin == "a.csv"
    assert set(labels(drawing)) == {str(n) for n in range(30) if n % 3}
    assert "label" not in pool(drawing)[0].metadata


def test_a_label_that_is_no_class_costs_the_label_alone(workspace, tmp_path):
    rows = ["a,1,ham", "b,2,eggs", "c,3, spam ", "d,4,HAM", "e,5,"]
    report = ingest(workspace, [write(tmp_path / "a.csv", "id,text,label", *rows)], label_column="label")
    assert (report.added, report.labels, sum(report.rejected.values())) == (5, 2, 0)
    assert report.labels_rejected == {"the label is not one of schema.labels in params.yaml": 2}
    assert [(row["line"], row["detail"]) for row in rejects(report)] == [(3, "eggs"), (5, "HAM")]
    assert labels(workspace) == {"a": "ham", "c": "spam"}


@pytest.mark.parametrize("value", ["true", "[1]", "1.5", "7", '{"a": 1}'])
def test_a_label_that_is_no_name_costs_the_label_alone(workspace, tmp_path, value):
    file = write(tmp_path / "a.jsonl", f'{{"text": "a", "label": {value}}}', '{"text": "b", "label": "ham"}')
    report = ingest(workspace, [file], label_column="label")
    assert (report.added, report.labels, sum(report.labels_rejected.values())) == (2, 1, 1)


@pytest.mark.parametrize("closed", [False, True])
def test_labels_can_come_later_change_and_change_back(workspace, tmp_path, closed):
    def say(label: str | None) -> IngestReport:
        column = "text" if label is None else "text,label"
        row = "hello" if label is None else f"hello,{label}"
        report = ingest(workspace, [write(tmp_path / "a.csv", column, row)], label_column=label and "label")
        if closed:
            close(workspace)
        return report

    item_id = content_hash("hello")[:20]
    say(None)
    for label in ("ham", "spam", "ham"):
        assert say(label).labels == 1
        assert labels(workspace) == {item_id: label}
        assert say(label).labels == 0
    assert len({event.event_id for event in events(workspace)}) == 3


def test_labels_that_contradict_each_other_in_one_ingest_are_not_taken(workspace, tmp_path):
    file = write(tmp_path / "a.csv", "text,label", "x,ham", "x,spam", "x,ham", "y,ham", "y,ham")
    for _ in range(2):
        report = ingest(workspace, [file], label_column="label")
        assert report.labels_rejected == {"the same text has another label in an earlier row; neither is taken": 2}
        assert labels(workspace) == {content_hash("y")[:20]: "ham"}


def test_a_label_for_a_known_text_goes_to_the_item_that_is_there(workspace, tmp_path):
    ingest(workspace, [write(tmp_path / "a.csv", "id,text", "mine,hello")])
    ingest(workspace, [write(tmp_path / "b.csv", "id,text,label", "other,hello,spam")], label_column="label")
    assert labels(workspace) == {"mine": "spam"}


# Crashes -----------------------------------------------------------------------------------------------------------
class Killed(BaseException):
    """A kill: no `except Exception` sees it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Kill at the `stop`-th call that changes the disk: before it happens, and then every later one, as a kill does."""
    counter = itertools.count()

    def guard(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            if next(counter) >= stop:
                raise Killed
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    for name in ("replace", "rename", "unlink", "mkdir", "chmod"):
        guard(Path, name)
    guard(shutil, "rmtree")
    guard(files.os, "fsync")


def test_a_kill_at_any_write_and_the_same_command_give_the_same_result(tmp_path, monkeypatch):
    first = write(tmp_path / "a.csv", "id,text,label", *(f"{n},text {n},ham" for n in range(10)))
    second = write(tmp_path / "b.csv", "id,text,label", *(f"{n},text {n},spam" for n in range(5, 40)), "x,y")

    monkeypatch.setattr(files.os, "fsync", lambda handle: None)
    ingest(make_workspace(tmp_path / "start", test_size=0), [first], label_column="label")
    make_workspace(tmp_path / "start", test_size=4)

    def fresh(name: str) -> Workspace:
        return open_workspace(shutil.copytree(tmp_path / "start", tmp_path / name))

    whole = fresh("whole")
    before = snapshot(whole)
    ingest(whole, [second], label_column="label")
    after = snapshot(whole)
    visible = {name for name in after if not name.startswith("data/rejects/")}
    assert {Path(name).parent.name for name in visible} == {"pool", "test", "events", "inbox"}
    kills = 0
    for stop in itertools.count():
        space = fresh(f"killed-{stop}")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, stop)
            try:
                ingest(space, [second], label_column="label")
                break
            except Killed:
                kills += 1
        finish_ingest(space.layout)
        settled = {name: digest for name, digest in snapshot(space).items() if not name.startswith("data/rejects/")}
        assert settled in (before, {name: after[name] for name in visible}), "all or nothing"
        ingest(space, [second], label_column="label")
        assert snapshot(space) == after, f"killed at write {stop}"
        shutil.rmtree(space.layout.root)
    assert kills > 20


def test_a_full_disk_leaves_nothing_half_done(workspace, tmp_path, monkeypatch):
    file = write(tmp_path / "a.csv", "text", "a", "b")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_items", full)
        with pytest.raises(OSError, match="No space"):
            ingest(workspace, [file])
    assert snapshot(workspace) == {}
    assert ingest(workspace, [file]).added == 2


def test_finishing_where_nothing_was_begun_does_nothing(workspace):
    assert finish_ingest(workspace.layout) is False
    assert snapshot(workspace) == {}


# Words -------------------------------------------------------------------------------------------------------------
def test_the_report_in_words_and_as_json(drawing, tmp_path):
    rows = [f"{n},text {n},ham" for n in range(20)]
    file = write(tmp_path / "a.csv", "id,text,label", *rows, "1,else,ham", "z,zed,eggs")
    report = ingest(drawing, [file], label_column="label")
    said = "\n".join(report.lines())
    assert "22 rows: 17 new in the pool, 4 drawn at random as the test set, 0 duplicates, 1 rejected" in said
    assert "20 labels imported" in said
    assert "rejected, 1: the id belongs to another text" in said
    assert "label not used, 1: the label is not one of schema.labels" in said
    assert str(report.rejects_file) in said
    row = json.loads(json.dumps(report.to_json()))
    assert (row["added"], row["test_added"], row["test_drawn"], row["labels"]) == (17, 4, True, 20)
    assert row["rejected"] == {"the id belongs to another text": 1}


# Laws --------------------------------------------------------------------------------------------------------------
pieces = st.sampled_from(
    [b"a", b"b", b"ham", b"spam", b"eggs", b",", b'"', b"\n", b"\r\n", b"\0", b"\xff", b"\xed\xa0\x80", b"=1+1",
     b'{"text":"', b'"}', b'","id":"', b'","label":"', b"\\ud800", b"{", b"[", b"1", b" "]
)  # fmt: skip
junk = st.one_of(st.binary(max_size=40), st.lists(pieces, max_size=40).map(b"".join))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(junk, st.sampled_from([".csv", ".jsonl", ".parquet"])), min_size=1, max_size=2), st.booleans()
)
def test_any_bytes_are_taken_or_refused_and_twice_is_as_good_as_once(tmp_path_factory, contents, given_test):
    folder = tmp_path_factory.mktemp("junk")
    space = make_workspace(folder / "ws", test_size=1)
    names = []
    for number, (content, suffix) in enumerate(contents):
        names.append(folder / f"{number}{suffix}")
        names[-1].write_bytes((b"id,text,label\n" if suffix == ".csv" else b"") + content)
    try:
        report = ingest(space, names, label_column="label", test=given_test)
    except AlError:
        assert snapshot(space) == {}
        return
    items = [*pool(space), *test_set(space)]
    assert report.rows == report.added + report.test_added + report.duplicates + sum(report.rejected.values())
    assert len(items) == report.added + report.test_added
    assert len({item.item_id for item in items}) == len({item.content_hash for item in items}) == len(items)
    assert all(item.content_hash == content_hash(item.text) and json.loads(item.metadata) is not None for item in items)
    refusals = sum(report.rejected.values()) + sum(report.labels_rejected.values())
    assert refusals == (len(rejects(report)) if report.rejects_file else 0)
    assert set(labels(space)) <= {item.item_id for item in items}
    before = snapshot(space)
    ingest(space, names, label_column="label", test=given_test)
    assert snapshot(space) == before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """200,000 rows of 1,000 characters (200 MB) in a process of its own: it never holds a good part of them."""
    workspace = make_workspace(tmp_path / "ws", test_size=500)
    with (tmp_path / "big.csv").open("w") as out:
        out.write("id,text,label\n")
        out.writelines(f'{n},"{n} {"some words, " * 90}",ham\n' for n in range(200_000))
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from al_pipeline.operations.ingest import ingest; from al_pipeline.workspace.workspace import open_workspace\n"
        "import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "report = ingest(open_workspace(Path(sys.argv[1])), [Path(sys.argv[2])])\n"
        "print(report.added, report.test_added, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", script, str(workspace.layout.root), str(tmp_path / "big.csv")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    added, test_added, kilobytes = map(int, done.stdout.split())
    assert (added, test_added) == (199_500, 500)
    assert kilobytes < 160_000


# Encodings and other forms of a file ------------------------------------------------------------------------------
def test_a_file_that_is_not_utf_8_loses_no_row_or_is_refused_whole(workspace, tmp_path):
    """Otherwise exactly the rows with accents would be missing, and pool and test set be biased."""
    rows = [
        "id,text",
        *(f"{n},the café on Zülpicher Straße {n}" if n % 50 == 0 else f"{n},plain {n}" for n in range(1000)),
    ]
    file = tmp_path / "a.csv"
    file.write_bytes("\n".join(rows).encode("cp1252"))
    report = ingest(workspace, [file])
    assert (report.added, report.rejected) == (1000, {})
    assert "read as cp1252" in report.notes[0]
    assert sum("café" in item.text for item in pool(workspace)) == 20

    before = snapshot(workspace)
    odd = ["id,text", *(f"x{n},grün {n}" for n in range(900)), *(f"x{n},naïve {n}" for n in range(900, 1000))]
    file.write_bytes("\n".join(odd[:901]).encode() + b"\n" + "\n".join(odd[901:]).encode("cp1252"))
    with pytest.raises(UnusableFile, match=r"100 of 1,000 rows .*`--encoding utf-8\+cp1252`"):
        ingest(workspace, [file])
    assert snapshot(workspace) == before
    assert ingest(workspace, [file], encoding="utf-8+cp1252").added == 1000


def test_every_kind_of_file_brings_the_same_items(tmp_path):
    rows = [{"id": f"m{n}", "text": f"Grüße {n}"} for n in range(30)]
    lines = ["id,text", *(f"{row['id']},{row['text']}" for row in rows)]
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.csv").write_bytes("\n".join(lines).encode("utf-16"))
    (folder / "b.csv.gz").write_bytes(gzip.compress(b"sep=,\n" + "\n".join(lines).encode()))
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    book = openpyxl.Workbook()
    for line in lines:
        book.active.append(line.split(","))
    book.save(folder / "e.xlsx")
    (folder / "._f.csv").write_bytes(b"\0\x05\x16\x07")
    found = []
    for place in [*sorted(folder.glob("[a-e]*")), folder]:
        space = make_workspace(tmp_path / f"ws-{place.name}")
        assert ingest(space, [place]).added == 30
        found.append(pool(space))
    assert all(items == found[0] for items in found)


def test_the_rejects_say_whether_they_count_lines_or_rows(workspace, tmp_path):
    pq.write_table(pa.table({"text": ["one", " "]}), tmp_path / "a.parquet")
    write(tmp_path / "b.csv", "text", '"two', 'lines"', '" "')
    report = ingest(workspace, [tmp_path / "a.parquet", tmp_path / "b.csv"])
    assert [{k: row[k] for k in row if k in ("file", "line", "row")} for row in rejects(report)] == [
        {"file": "a.parquet", "row": 2},
        {"file": "b.csv", "line": 4},
    ]


def test_rejects_are_bounded(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(rejecting, "_MOST", 3)
    report = ingest(workspace, [write(tmp_path / "a.csv", "id,text", *["x"] * 10)])
    assert report.rejected == {"wrong number of fields": 10}
    assert len(rejects(report)) == 3
    assert report.notes == ("the rejects file has the first 3 of 10 rejects",)


# Ids and labels -----------------------------------------------------------------------------------------------------
def test_a_whole_number_with_a_fraction_of_zero_is_that_number(tmp_path):
    """pandas makes floats of a column of whole numbers in which one is missing."""
    space = make_workspace(tmp_path / "ws")
    space.layout.params.write_text(space.layout.params.read_text().replace("- ham\n    - spam", '- "0"\n    - "1"'))
    space = open_workspace(space.layout.root)
    frame = {"id": [1.0, None, 3.0, 2.5], "text": ["a", "b", "c", "d"], "label": [1.0, None, 0.0, 1.0]}
    pq.write_table(pa.table(frame), tmp_path / "a.parquet")
    report = ingest(space, [tmp_path / "a.parquet"], label_column="label")
    assert report.rejected == {"the id is neither a string nor a whole number": 1}
    assert [item.item_id for item in pool(space)] == ["1", content_hash("b")[:20], "3"]
    assert {event.item_id: event.label for event in events(space)} == {"1": "1", "3": "0"}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("schema", ["NFC", "NFD"])
def test_labels_are_compared_in_one_form_of_unicode(tmp_path, form, schema):
    space = make_workspace(tmp_path / "ws")
    text = space.layout.params.read_text().replace("- ham", f"- {unicodedata.normalize(schema, 'Café')}")
    space.layout.params.write_text(text)
    space = open_workspace(space.layout.root)
    assert space.params.schema_.labels == ["Café", "spam"]
    file = write(tmp_path / "a.csv", "id,text,label", f"x,hello,{unicodedata.normalize(form, 'Café')}")
    report = ingest(space, [file], label_column="label")
    assert (report.labels, report.labels_rejected) == (1, {})
    assert [event.label for event in events(space)] == ["Café"]


def test_texts_that_were_cut_off_are_told_from_others_that_differ(workspace, tmp_path):
    ingest(workspace, [write(tmp_path / "a.csv", "id,text", "a,the beg", "b,whole", "c,also the beg ", "d,same")])
    close(workspace)
    ingest(workspace, [write(tmp_path / "b.csv", "id,text", "e,in the in")])
    again = write(
        tmp_path / "c.csv", "id,text", "a,the beginning", "b,other", "c,also the beginning", "d,same", "e,in the inbox",
        "f,twice here", "f,twice here and longer",
    )  # fmt: skip
    before = snapshot(workspace)
    report = ingest(workspace, [again])
    assert report.rejected == {intake.ANOTHER_TEXT: 5}
    assert report.notes == (
        "3 texts with known ids continue the text in the pool, which was cut off: was its file read while it was being "
        "copied?",
        "5 texts differ from the known one with the same id; the same command with --corrections replaces the known "
        "text by the new one",
    )
    assert [item.text for item in pool(workspace)] == [
        "the beg",
        "whole",
        "also the beg ",
        "same",
        "in the in",
        "twice here",
    ]
    assert before.items() <= snapshot(workspace).items()
