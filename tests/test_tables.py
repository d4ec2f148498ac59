"""Users' files: a file that is wrong is a BadInput, a row that is wrong is a BadRow among good ones."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from al_pipeline.data import table_rows
from al_pipeline.data.table_rows import BadRow, Row
from al_pipeline.data.tables import check_readable, read_table
from al_pipeline.errors import BadInput


def rows_of(path: Path, *required: str, **options: Any) -> list[Row | BadRow]:
    return [row for batch in read_table(path, required, **options) for row in batch]


def read(path: Path, content: bytes | str, *required: str, **options: Any) -> list[Row | BadRow]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return rows_of(path, *required, **options)


def values(rows: list[Row | BadRow]) -> list[Any]:
    """The values of good rows; the reason where a row is bad."""
    return [dict(row.values) if isinstance(row, Row) else row.reason for row in rows]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


# CSV ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_delimiters_and_line_endings(file, delimiter, ending):
    lines = [delimiter.join(cells) for cells in (["id", "text"], ["1", '"a, b; c\td | e"'], ["2", ""])]
    assert values(read(file, ending.join(lines))) == [{"id": "1", "text": "a, b; c\td | e"}, {"id": "2", "text": ""}]


def test_the_delimiter_is_the_headers_not_the_texts(file):
    assert values(read(file, 'text;"a,b,c"\nhello, you, and me;x\n')) == [{"text": "hello, you, and me", "a,b,c": "x"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("mark", [True, False])
def test_unicode_with_and_without_a_mark(file, encoding, mark):
    marks = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff", "utf-32-be": "\ufeff"}
    text = (marks.get(encoding, "") if mark else "") + "id,text\n1,Grüße aus Köln 🎈\n"
    assert values(read(file, text.encode(encoding), "text")) == [{"id": "1", "text": "Grüße aus Köln 🎈"}]


def test_the_line_that_excel_writes_before_the_header(file):
    for first in ("sep=;", '"sep=;"', "SEP=;"):
        rows = read(file, f"{first}\r\nid;text\r\n1;a, b\r\n", "text")
        assert values(rows) == [{"id": "1", "text": "a, b"}]
        assert rows[0].number == 3
    assert values(read(file, "\ufeffsep=\t\nid\ttext\n1\ta,b\n", "text")) == [{"id": "1", "text": "a,b"}]


def test_the_delimiter_is_the_one_that_gives_the_column_that_is_wanted(file):
    assert values(read(file, "text;a,b,c\nx;1\n", "text")) == [{"text": "x", "a,b,c": "1"}]


def test_texts_of_several_lines_and_quotes(file):
    rows = read(file, 'id,text\n1,"line 1\nline ""2""\r\n\r\nline 4"\n2,5" pipe\n\n3,=HYPERLINK("x")\n')
    assert [(row.number, row.values["text"]) for row in rows] == [
        (2, 'line 1\nline "2"\r\n\r\nline 4'),
        (6, '5" pipe'),
        (8, '=HYPERLINK("x")'),
    ]


def test_bytes_that_are_not_utf_8_cost_their_row_alone(file):
    many = b"".join(b"%d,gr\xc3\xbc\xc3\x9fe\n" % n for n in range(1998))
    rows = read(file, b"id,text\n1,good\n2,caf\xe9\n3,\xed\xa0\x80\n" + many)
    assert values(rows)[:3] == [{"id": "1", "text": "good"}, *["not valid UTF-8"] * 2]
    assert len(rows) == 2001
    assert rows[1].excerpt == "2,caf \n"


def test_utf_16_that_ends_in_the_middle_of_a_character(file):
    rows = read(file, ("text\n" + "one\n" * 999 + "two").encode("utf-16")[:-1])
    assert values(rows) == [{"text": "one"}] * 999 + ["not valid UTF-16"]


def test_a_wrong_number_of_fields_costs_the_row_alone(file):
    rows = read(file, "id,text\n1\n1,a\n1,b,c\n2,d\n")
    assert values(rows) == ["wrong number of fields", {"id": "1", "text": "a"}] * 1 + [
        "wrong number of fields",
        {"id": "2", "text": "d"},
    ]
    assert rows[2].detail == "3 where the header has 2"


def test_a_stray_quote_costs_its_row_alone(file):
    rows = read(file, 'id,text\n1,"unclosed\n2,good\n3,"He said "hi" to me"\n4,"fine"\n')
    assert values(rows) == [
        "a quote inside a quoted field must be doubled",
        {"id": "2", "text": "good"},
        "a quote inside a quoted field must be doubled",
        {"id": "4", "text": "fine"},
    ]
    assert [row.number for row in rows] == [2, 3, 4, 5]


def test_a_quote_that_is_never_closed_costs_its_row_alone(file):
    rows = read(file, 'id,text\n1,"unclosed\n2,good\n3,better\n')
    assert values(rows)[1:] == [{"id": "2", "text": "good"}, {"id": "3", "text": "better"}]
    assert rows[0].reason == "a quoted field is never closed"


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_row_that_is_too_long_costs_itself_alone(file, monkeypatch, quote):
    monkeypatch.setattr(table_rows, "RECORD_LIMIT", 100)
    rows = read(file, f"id,text\n1,a\n2,{quote}{'x' * 1000}{quote}\n3,b\n")
    assert values(rows) == [
        {"id": "1", "text": "a"},
        "the row is longer than 100 characters",
        {"id": "3", "text": "b"},
    ]
    assert [row.number for row in rows] == [2, 3, 4]


def test_a_long_text_of_many_lines_is_skipped_to_its_end(file, monkeypatch):
    monkeypatch.setattr(table_rows, "RECORD_LIMIT", 100)
    rows = read(file, 'text\n"' + "ten bytes\n" * 50 + 'end"\nafter\n')
    assert values(rows) == ["the row is longer than 100 characters", {"text": "after"}]
    assert rows[1].number == 53


def test_a_quote_never_closed_in_a_long_file_costs_its_row_alone(file, monkeypatch):
    monkeypatch.setattr(table_rows, "RECORD_LIMIT", 100)
    rows = read(file, 'id,text\n0,"unclosed\n' + "".join(f"{n},text {n}\n" for n in range(1, 100)))
    assert values(rows)[0] == "the row is longer than 100 characters"
    assert values(rows)[1:] == [{"id": str(n), "text": f"text {n}"} for n in range(1, 100)]
    assert [row.number for row in rows] == list(range(2, 102))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_fifty_megabytes_in_one_text(tmp_path, suffix):
    path = tmp_path / f"big{suffix}"
    line = '"' + "x" * 50_000_000 + '"' if suffix == ".csv" else '{"text": "' + "x" * 50_000_000 + '"}'
    small = ['"a"', '"b"'] if suffix == ".csv" else ['{"text": "a"}', '{"text": "b"}']
    header = "text\n" if suffix == ".csv" else ""
    path.write_text(f"{header}{small[0]}\n{line}\n{small[1]}\n")
    tracemalloc.start()
    rows = rows_of(path, "text")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values(rows) == [{"text": "a"}, "the row is longer than 8,388,608 characters", {"text": "b"}]
    assert peak < 120e6


def test_thousands_of_columns(file):
    names = [f"c{n}" for n in range(5000)]
    rows = read(file, ",".join(["text", *names]) + "\n" + ",".join(["hello"] + ["1"] * 5000) + "\n", "text")
    assert len(rows[0].values) == 5001


def test_repeated_and_nameless_columns_get_names_of_their_own(file):
    assert values(read(file, "text,a,a,,a.2,\nx,1,2,3,4,5\n", "text")) == [
        {"text": "x", "a": "1", "a.3": "2", "column_4": "3", "a.2": "4", "column_6": "5"}
    ]


def test_a_column_that_is_needed_must_be_there_once(file):
    with pytest.raises(BadInput, match="2 columns named `text`"):
        read(file, "text,text\na,b\n", "text")
    with pytest.raises(BadInput, match="no column `text`; it has: id, body.*--text-column"):
        read(file, "id,body\n1,b\n", "text")


def test_only_the_columns_that_are_kept(file):
    assert values(read(file, "id,text,more\n1,b,c\n", "text", keep=["text", "id"])) == [{"id": "1", "text": "b"}]


def test_a_header_alone_holds_no_rows(file):
    assert read(file, "id,text\n", "text") == []


def test_nul_is_kept(file):
    assert values(read(file, "text\na\0b\n")) == [{"text": "a\0b"}]


# JSONL -------------------------------------------------------------------------------------------------------------
def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = read(path, '\ufeff{"text":"a","n":[1,{"x":null}]}\n\n{"text": "b\\u0000\\ud83d\\ude00"}', "text")
    assert values(rows) == [{"text": "a", "n": [1, {"x": None}]}, {"text": "b\0😀"}]
    assert [row.number for row in rows] == [1, 3]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"text": NaN}', "not valid JSON"),
        (b'{"text": "a", "text": "b"}', "not valid JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"n": ' + b"[" * 200_000 + b"}", "not valid JSON"),
        (b"\0\0\0", "not valid JSON"),
    ],
)
def test_a_bad_json_line_costs_itself_alone(tmp_path, line, reason):
    rows = read(tmp_path / "a.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n', "text")
    assert values(rows) == [{"text": "before"}, reason, {"text": "after"}]
    assert rows[1].number == 2
    rows[1].excerpt.encode()


def test_a_column_that_no_json_line_has(tmp_path):
    with pytest.raises(BadInput, match="no column `text`; it has: body, id"):
        read(tmp_path / "a.jsonl", '{"body": "a"}\n{"id": 1}\n', "text")


def test_a_json_list_is_no_jsonl(tmp_path):
    with pytest.raises(BadInput, match="one object per line"):
        read(tmp_path / "a.json", '[{"text": "a"}]')


def test_jsonl_is_known_by_its_content_too(tmp_path):
    assert values(read(tmp_path / "export.txt", '{"text": "a"}\n')) == [{"text": "a"}]


# Parquet -----------------------------------------------------------------------------------------------------------
def test_parquet_values_are_plain(tmp_path):
    table = pa.table(
        {
            "text": pa.array(["a", None]).dictionary_encode(),
            "day": [datetime.date(2026, 1, 2), None],
            "at": pa.array([1, 2], pa.timestamp("ns")),
            "price": [decimal.Decimal("1.50"), None],
            "share": [float("nan"), 0.5],
            "nested": [{"x": [float("inf")]}, None],
            "raw": [b"bytes", b""],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = rows_of(tmp_path / "a.parquet", "text")
    json.dumps([dict(first.values), dict(second.values)], allow_nan=False)
    assert first.values["text"] == "a"
    assert first.values["day"] == "2026-01-02"
    assert first.values["price"] == "1.50"
    assert first.values["share"] is None
    assert first.values["nested"] == {"x": [None]}
    assert first.values["raw"] == "bytes"
    assert (second.number, second.values["text"]) == (2, None)


def test_a_parquet_value_that_cannot_be_read_costs_its_row_alone(tmp_path):
    broken = pa.StringArray.from_buffers(
        3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"), None
    )
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert values(rows_of(tmp_path / "a.parquet", "text")) == [
        {"text": "a"},
        "a value that cannot be read",
        {"text": "c"},
    ]


def test_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["x"])] * 3, names=["text", "a", "a"]), path)
    assert values(rows_of(path, "text")) == [{"text": "x", "a": "x", "a.2": "x"}]
    assert values(rows_of(path, "text", keep=["text"])) == [{"text": "x"}]
    with pytest.raises(BadInput, match="no column `body`; it has: text, a, a"):
        rows_of(path, "body")


def test_parquet_batches_are_small_where_texts_are_long(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [bytes([65 + n % 26]).decode() * 500_000 + str(n) for n in range(40)]
    pq.write_table(pa.table({"text": texts}), path, compression="none", use_dictionary=False)
    assert max(len(batch) for batch in read_table(path)) <= 10


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"not parquet"])
def test_a_broken_parquet_file(tmp_path, content):
    with pytest.raises(BadInput, match="cannot be read as Parquet"):
        read(tmp_path / "a.parquet", content)


# Files -------------------------------------------------------------------------------------------------------------
def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "sheet.xlsx").write_bytes(b"PK\x03\x04rest")
    (tmp_path / "a.csv.gz").write_bytes(b"\x1f\x8brest")
    (tmp_path / "blank.csv").write_text("\n\n\n")
    for name, complaint in {
        "missing.csv": "does not exist",
        ".": "is a folder",
        "empty.csv": "is empty",
        "sheet.xlsx": "damaged ZIP archive or Excel workbook",
        "a.csv.gz": "truncated or damaged",
        "blank.csv": "only blank lines",
        "a\0b": "cannot be read",
    }.items():
        with pytest.raises(BadInput, match=complaint):
            rows_of(tmp_path / name, "text")


def test_a_file_that_may_not_be_read(file, monkeypatch):
    file.write_text("text\na\n")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(BadInput, match="Permission denied"):
        check_readable(file)


def test_progress_ends_at_the_size_of_the_file(file):
    told: list[tuple[int, int]] = []
    read(file, "text\n" + "some text\n" * 5000, progress=lambda done, total: told.append((done, total)))
    size = file.stat().st_size
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_batches_are_bounded(file):
    file.write_text("text\n" + "some text\n" * 2500)
    assert [len(batch) for batch in read_table(file)] == [1000, 1000, 500]
    assert max(len(batch) for batch in read_table(file, batch_rows=7)) == 7


# Laws --------------------------------------------------------------------------------------------------------------
fuzz = settings(max_examples=150, deadline=None)
cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@fuzz
@given(st.lists(st.tuples(cells, cells), max_size=8), st.sampled_from(",;\t|"), st.booleans())
def test_what_csv_writes_is_read(tmp_path_factory, table, delimiter, quote_all):
    out = io.StringIO()
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting)
    writer.writerows([("id", "text"), *table])
    rows = read(tmp_path_factory.mktemp("csv") / "a.csv", out.getvalue(), "id", "text")
    assert values(rows) == [{"id": a, "text": b} for a, b in table]


pieces = st.sampled_from(
    [b"text", b"id", b",", b";", b'"', b'""', b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf",
     b"\xff\xfe", b"{", b"}", b'{"text":', b"[", b"]", b":", b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"null", b"=A1"]
)  # fmt: skip
junk = st.one_of(st.binary(max_size=60), st.lists(pieces, max_size=30).map(b"".join))


@fuzz
@given(junk, st.sampled_from([".csv", ".jsonl", ".parquet", ".tsv", ".txt"]), st.sampled_from([b"", b"id,text\n"]))
@example(b'"', ".csv", b"")
@example(b"\xff\xfe\x00", ".csv", b"")
def test_any_bytes_give_rows_or_a_complaint(tmp_path_factory, content, suffix, header):
    try:
        rows = read(tmp_path_factory.mktemp("junk") / f"a{suffix}", header + content)
    except BadInput as complaint:
        assert str(complaint)
        return
    for row in rows:
        assert row.number >= 1
        if isinstance(row, BadRow):
            row.excerpt.encode()
            row.detail.encode()


@fuzz
@given(st.lists(st.one_of(junk.filter(lambda b: b'"' not in b), st.just(b'9,"open')), max_size=6))
def test_junk_between_good_rows_does_not_take_them_along(tmp_path_factory, between):
    """Good rows without quotes survive whatever stands between them, an opened quote included; else all are refused."""
    lines = [b"id,text"]
    for number, piece in enumerate(between):
        lines += [piece, f"good{number},text".encode()]
    lines += [f"more{number},grüße".encode() for number in range(5999)]
    rows = read(tmp_path_factory.mktemp("junk") / "a.csv", b"\n".join(lines) + b"\n", "text")
    found = {row.values["id"] for row in rows if isinstance(row, Row)}
    assert found >= {f"good{number}" for number in range(len(between))}
