"""What a name on the command line stands for: files of each kind, folders, standard input; and what is refused."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from al_pipeline.data import inputs as module
from al_pipeline.data.inputs import Source, check_encoding, open_inputs
from al_pipeline.data.table_rows import BadRow, Row
from al_pipeline.data.tables import read_table
from al_pipeline.errors import BadInput, UsageError


def rows_of(path: Path | Source, *required: str, **options: Any) -> list[Row | BadRow]:
    return [row for batch in read_table(path, required, **options) for row in batch]


def texts(path: Path | Source, **options: Any) -> list[Any]:
    return [row.values["text"] if isinstance(row, Row) else row.reason for row in rows_of(path, "text", **options)]


def workbook(path: Path, *rows: list[Any], **sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    assert book.active is not None
    for row in rows:
        book.active.append(row)
    for name, more in sheets.items():
        sheet = book.create_sheet(name)
        for row in more:
            sheet.append(row)
    book.save(path)
    return path


# gzip --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content"), [("a.csv.gz", "id,text\n1,Grüße\n"), ("a.jsonl.gz", '{"text": "Grüße"}\n')]
)
def test_gzip_is_unpacked_on_the_way(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) + gzip.compress(b""))
    told: list[tuple[int, int]] = []
    assert texts(path, progress=lambda done, total: told.append((done, total))) == ["Grüße"]
    assert told[-1] == (path.stat().st_size,) * 2
    path.rename(tmp_path / "no-suffix")
    assert texts(tmp_path / "no-suffix") == ["Grüße"], "known by its content"


def test_a_gzip_file_that_is_cut_off_or_damaged_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    whole = gzip.compress(b"text\n" + os.urandom(50_000).hex().encode() + b"\nrow\n" * 1000)
    for damaged in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:30],
        whole[:5000] + b"\0" * 50 + whole[5050:],
        whole + b"x",
    ):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="truncated or damaged"):
            next(read_table(path, ["text"]))


@pytest.mark.parametrize("line", [b"0" * 1_000_000, b"x\n" * 500_000])
def test_a_gzip_bomb_fills_neither_memory_nor_disk(
    tmp_path: Path, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALL", 1_000_000)
    path = tmp_path / "bomb.csv.gz"
    with gzip.open(path, "wb") as out:
        out.write(b"text\n")
        for _ in range(60):
            out.write(line)
    with pytest.raises(BadInput, match="unpacks to more than 200 times its size.*gunzip"):
        next(read_table(path, ["text"]))


def test_compressed_files_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(__file__, "a.csv")
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), table)
    for content, complaint in (
        (gzip.compress(out.getvalue()), "tar archive"),
        (gzip.compress(gzip.compress(b"text\na\n")), "unpack it first"),
        (gzip.compress(table.getvalue()), "unpack it first"),
        (gzip.compress(b""), "empty after unpacking"),
        (b"BZh91AY&SY", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd\0", "zstd"),
        (b"\xd0\xcf\x11\xe0\xa1", "old or protected Excel workbook"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=complaint):
            rows_of(path, "text")


# XLSX --------------------------------------------------------------------------------------------------------------
def test_rows_of_a_workbook(tmp_path: Path) -> None:
    path = workbook(
        tmp_path / "a.xlsx",
        ["id", "text", "day", "n"],
        [1, "Grüße 🎈", datetime.datetime(2026, 1, 2), 1.5],
        [],
        [2, "=1+1", None, None],
        [3.0, "last", None, True],
    )
    rows = rows_of(path, "text")
    assert [(row.number, row.unit) for row in rows] == [(2, "row"), (4, "row"), (5, "row")]
    first = rows[0]
    assert isinstance(first, Row)
    assert first.values == {"id": 1, "text": "Grüße 🎈", "day": "2026-01-02T00:00:00", "n": 1.5}
    json.dumps([dict(row.values) for row in rows if isinstance(row, Row)], allow_nan=False)
    assert texts(path, keep=["text"])[-1] == "last"


def test_what_a_workbook_gets_wrong_costs_its_row_alone(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", ["text", "n"], ["#N/A", 1], ["fine", 2], ["wide", 3, "stray"], ["end", 4])
    assert texts(path) == ["a value that cannot be read", "fine", "wrong number of fields", "end"]


def test_the_first_sheet_that_holds_something_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    notes: list[str] = []
    path = workbook(tmp_path / "a.xlsx", Mails=[["text"], ["hello"]], More=[["text"], ["bye"]])
    assert texts(path, on_note=notes.append) == ["hello"]
    assert notes == [f"{path}: sheet Mails (not read: More)"]


def test_workbooks_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = workbook(tmp_path / "good.xlsx", ["text"], ["hello"]).read_bytes()
    path = tmp_path / "a.xlsx"
    for content, complaint in (
        (good[:-200], "damaged ZIP archive"),
        (good[:3000] + b"\0" * 200 + good[3200:], "cannot be read as a workbook|damaged"),
        (workbook(tmp_path / "empty.xlsx").read_bytes(), "no sheet with a table"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=complaint):
            rows_of(path, "text")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mails.csv", "text\nhello\n")
    with pytest.raises(BadInput, match="is a ZIP archive"):
        rows_of(path, "text")
    path.write_bytes(good)
    with pytest.raises(BadInput, match="no column `body`"):
        rows_of(path, "body")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(BadInput, match=r"pip install 'al-pipeline\[xlsx\]'"):
        rows_of(path, "text")


def test_a_workbook_that_unpacks_into_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", ["text"], ["hello"])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/more.xml", b"\0" * 80_000_000)
    with pytest.raises(BadInput, match="too much for a workbook"):
        rows_of(path, "text")


# Folders, standard input, odd files --------------------------------------------------------------------------------
def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", "c.csv.gz", "._b.csv", ".#a.jsonl", "~$x.xlsx", "notes.pdf", "a.csv~"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub.csv").mkdir()
    with open_inputs([tmp_path], encoding="latin1") as found:
        assert [source.path.name for source in found.sources] == ["a.jsonl", "b.csv", "c.csv.gz"]
        assert {source.encoding for source in found.sources} == {"iso8859-1"}
        (note,) = found.notes
    assert "2 entries not read" in note and "notes.pdf" in note and "sub.csv" in note
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no file to read"), open_inputs([tmp_path / "empty"]):
        pass


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def pipe(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    return pipe


@pytest.mark.parametrize(
    "content",
    [
        b"text\nhello\n",
        b'{"text": "hello"}\n',
        gzip.compress(b"text\nhello\n", mtime=0),
        "text\nhello\n".encode("utf-16"),
    ],
)
def test_standard_input_is_kept_for_this_user_alone_and_no_longer_than_needed(piped: Any, content: bytes) -> None:
    piped(content)
    with open_inputs([Path("-")]) as found:
        (source,) = found.sources
        assert str(source) == "standard input"
        assert stat.S_IMODE(source.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(source.path.parent.stat().st_mode) == 0o700
        assert texts(source) == ["hello"]
    assert not source.path.parent.exists()


def test_standard_input_in_the_format_and_encoding_that_are_named(piped: Any) -> None:
    piped("text;n\ncafé;1\n".encode("cp850"))
    with open_inputs([Path("-")], "csv", "cp850") as found:
        assert texts(found.sources[0]) == ["café"]
    piped(b"")
    with open_inputs([Path("-")]) as found, pytest.raises(BadInput, match="standard input is empty"):
        rows_of(found.sources[0])
    with pytest.raises(UsageError, match="read only once"), open_inputs([Path("-"), Path("-")]):
        pass
    with pytest.raises(UsageError, match="unknown format 'xml'"), open_inputs([Path("-")], "xml"):
        pass
    with pytest.raises(UsageError, match="unknown encoding 'klingon'"), open_inputs([Path("a")], None, "klingon"):
        pass


def test_a_pipe_that_would_fill_the_disk_is_refused(
    piped: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    piped(b"x" * 3_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=module._SPARE_BYTES + 500_000))
    with pytest.raises(BadInput, match="no room for standard input"), open_inputs([Path("-")]):
        pass
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.csv"
    os.mkfifo(fifo)
    loop = tmp_path / "loop.csv"
    loop.symlink_to(loop)
    gone = tmp_path / "gone.csv"
    gone.symlink_to(tmp_path / "nothing")
    for path, complaint in (
        (fifo, "not a regular file; pipe it in with `-`"),
        (Path("/dev/zero"), "not a regular file"),
        (loop, "cannot be read: Too many levels of symbolic links"),
        (gone, "does not exist"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(BadInput, match=complaint):
            next(read_table(path, ["text"]))


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.csv"))
    path.write_text("text\nhello\n")
    assert texts(path) == ["hello"]
    path.write_text("")
    with pytest.raises(BadInput, match="is empty") as complaint:
        rows_of(path)
    str(complaint.value).encode()


def test_encodings_that_may_be_named() -> None:
    assert check_encoding(None) is None
    assert check_encoding("") is None
    assert check_encoding("UTF8+latin1") == "utf-8-sig+iso8859-1"
    for name in ("nope", "cp1252+utf-8", "utf-8+nope", "utf-8+cp1252+cp1250", "hex"):
        with pytest.raises(UsageError, match="unknown encoding"):
            check_encoding(name)


def test_memory_stays_flat(tmp_path: Path) -> None:
    path = tmp_path / "big.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(b"text\n")
        for n in range(20_000):
            out.write(f"{n} {'Grüße aus Köln, ' * 100}\n".encode("cp1252"))
    script = (
        "import resource, sys, chardet; from pathlib import Path; from al_pipeline.data.tables import read_table\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(sum(len(batch) for batch in read_table(Path(sys.argv[1]), ['text'])))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 20_000
    assert grown < 150, "megabytes; the file unpacks into 32"


def test_an_encoding_that_only_a_mark_could_tell_apart_is_refused_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,n\nhello,1\n")
    for encoding in ("utf-16", "utf-32"):
        with (
            pytest.raises(BadInput, match="omit --encoding"),
            open_inputs([tmp_path / "a.csv"], encoding=encoding) as found,
        ):
            rows_of(found.sources[0], "text")
