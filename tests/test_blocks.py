"""Rows in blocks: the same rows, pool files and rejects as row by row, for any bytes in a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ingest import make_workspace

from al_pipeline.data import text_lines, text_tables, typed_tables
from al_pipeline.data.catalog import Catalog, item_id_from, item_ids_from
from al_pipeline.data.json_columns import json_objects
from al_pipeline.data.table_rows import BadRow, Block, Row
from al_pipeline.data.tables import read_blocks, read_table
from al_pipeline.errors import BadInput
from al_pipeline.files import read_jsonl
from al_pipeline.operations import ingest as module
from al_pipeline.operations.ingest import ingest
from al_pipeline.records import content_hash

ODD = [
    "", " ", "a", "b", "é", "e\u0301", "\ufeff", "x\0y", "x\ny", "x\r\ny", "x\ry", 'say "no"', "a,b", "a;b", "\u2028",
    "\x0c", "\ud800", "{", "}", "]},{", "%s", "long " * 40, "日本", "\x1c",
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.text(max_size=4),
    st.integers(-3, 10**20),
    st.sampled_from([1.0, 2.5, -0.0, 1e300, None, True, False, [1, {"a": 1}], {"b": [], "a": {"c": "é"}}, {}]),
)
IDS = st.one_of(
    st.sampled_from(["1", "2", " 2 ", "x" * 201, "a\nb", "\ud800", "", None, 3, 3.0, 1.5, True]), st.text(max_size=3)
)
LABELS = st.sampled_from(["positive", "negative", " positive", "", None, "else", 1.0])
ROWS = st.lists(
    st.fixed_dictionaries({"text": VALUES}, optional={"id": IDS, "label": LABELS, "more": VALUES, "%s": VALUES}),
    max_size=60,
)
CLEAN = st.lists(
    st.fixed_dictionaries({"id": st.integers(0, 10**6), "text": st.text("abé", min_size=1), "more": VALUES}),
    min_size=20,
    max_size=60,
)


def jsonl_of(rows: list[dict[str, Any]], spoilt: list[str]) -> bytes:
    lines = [json.dumps(row, ensure_ascii=bool(number % 2)) for number, row in enumerate(rows)]
    for number, text in enumerate(spoilt):
        lines.insert(number * 7 % (len(lines) + 1), text)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def csv_of(rows: list[dict[str, Any]], spoilt: list[str], end: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", "text", "label", "more", "%s"], lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    lines = out.getvalue().split(end)
    for number, text in enumerate(spoilt):
        lines.insert(1 + number * 7 % len(lines), text)
    return end.join(lines).encode("utf-8", "surrogatepass")


def row_by_row(read: Any) -> Any:
    """`read_blocks` without blocks."""

    def rows(*given: Any, **options: Any) -> Iterator[Row | BadRow]:
        for piece in read(*given, **options):
            yield from piece.rows() if isinstance(piece, Block) else (piece,)

    return rows


def taken_in(root: Path, file: Path, **options: Any) -> tuple[Any, ...]:
    """Everything an ingest tells and leaves, twice."""
    workspace = make_workspace(root, test_size=3)
    reports = []
    for _ in range(2):
        try:
            reports.append(ingest(workspace, [file], **options).to_json())
        except BadInput as error:
            reports.append({"error": str(error)})
    left = {
        str(path.relative_to(root)): path.read_bytes() for path in sorted((root / "data").rglob("*")) if path.is_file()
    }
    rejects = [list(read_jsonl(path)) for path in sorted(workspace.layout.rejects.glob("*"))]
    told = [{**report, "rejects_file": bool(report.get("rejects_file"))} for report in reports]
    return told, left, rejects


def check_same(folder: Path, data: bytes, name: str, block: int, **options: Any) -> None:
    """Ingest `data` in blocks of about `block` characters, and row by row, each parsed by itself; compare."""
    file = folder / name
    file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lines, "BLOCK_CHARACTERS", block)
        patch.setattr(typed_tables, "_BLOCK_ROWS", block)
        patch.setattr(module, "_FEW_ROWS", 2)
        in_blocks = taken_in(folder / "blocks", file, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_blocks", row_by_row(module.read_blocks))
        patch.setattr(text_tables, "_parsed_lines", lambda lines: [None] * len(lines))
        patch.setattr(text_tables, "_parsed", lambda lines, *_: ([], lines, False))
        assert in_blocks == taken_in(folder / "rows", file, **options)


BLOCKS = st.sampled_from([1, 7, 40, 1000])
OPTIONS = st.sampled_from([{}, {"label_column": "label"}, {"corrections": True}, {"test": True}, {"id_column": "more"}])


SPOILT_LINES = ['{"text": "x"', "", "[1]", '{"a":1,"a":2}', "\x0c", '{"a":[{}', "{}]}", "{}"]
SPOILT_RECORDS = ["", "a", '1,"x', '1,"x"y,,,', "\x0c", '2,"a ""b"" c",,,', ",,,,,,"]


@settings(deadline=None, max_examples=25)
@given(st.one_of(ROWS, CLEAN), st.lists(st.sampled_from(SPOILT_LINES), max_size=3), BLOCKS, OPTIONS)
def test_jsonl_in_blocks_gives_the_same_pool_and_rejects(tmp_path_factory, rows, spoilt, block, options):
    check_same(tmp_path_factory.mktemp("x"), jsonl_of(rows, spoilt), "a.jsonl", block, **options)


@settings(deadline=None, max_examples=25)
@given(
    st.one_of(ROWS, CLEAN),
    st.lists(st.sampled_from(SPOILT_RECORDS), max_size=3),
    st.sampled_from(["\n", "\r\n", "\r"]),
    BLOCKS,
    OPTIONS,
)
def test_csv_in_blocks_gives_the_same_pool_and_rejects(tmp_path_factory, rows, spoilt, end, block, options):
    check_same(tmp_path_factory.mktemp("x"), csv_of(rows, spoilt, end), "a.csv", block, **options)


CELLS = st.tuples(st.none() | st.text(max_size=3), st.sampled_from([*ODD, None]), st.floats())


@settings(deadline=None, max_examples=25)
@given(st.lists(CELLS, min_size=1, max_size=60), BLOCKS, OPTIONS.filter(lambda options: "label_column" not in options))
def test_parquet_in_blocks_gives_the_same_pool_and_rejects(tmp_path_factory, rows, block, options):
    out = io.BytesIO()
    ids, texts, more = (list(column) for column in zip(*rows, strict=True))
    raw = [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
    columns = {
        "id": pa.array(ids, pa.string()),
        "text": pa.array(raw, pa.binary()).view(pa.string()),
        "more": pa.array(more),
    }
    pq.write_table(pa.table(columns), out)
    check_same(tmp_path_factory.mktemp("x"), out.getvalue(), "a.parquet", block, **options)


@given(st.lists(st.one_of(IDS, st.floats(), st.integers(-(10**210), 10**210)), max_size=8))
def test_ids_of_a_column_are_those_of_its_values(values):
    hashes = [content_hash(str(number)) for number in range(len(values))]
    try:
        expected = list(map(item_id_from, values, hashes))
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)):
            item_ids_from(values, hashes)
    else:
        assert item_ids_from(values, hashes) == expected


@given(st.lists(st.tuples(VALUES, st.one_of(st.floats(), st.none())), min_size=1, max_size=5), st.text(max_size=3))
def test_json_of_columns_is_that_of_its_rows(rows, name):
    first, second = zip(*rows, strict=True)
    columns = {name: first, '%d"': second}
    try:
        expected = [
            json.dumps(
                {key: column[row] for key, column in columns.items()},
                sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"),
            )
            for row in range(len(rows))
        ]  # fmt: skip
        "".join(expected).encode()
    except ValueError:
        with pytest.raises(ValueError):
            json_objects(columns, len(rows))
    else:
        assert json_objects(columns, len(rows)) == expected


@given(st.lists(st.lists(st.integers(0, 400), unique=True, max_size=60), max_size=8))
def test_the_catalogue_takes_many_as_it_takes_one(batches):
    many, one = Catalog(), Catalog()
    for batch in batches:
        digests = [bytes.fromhex(content_hash(str(number))) for number in batch]
        found = [one.find_content(digest) for digest in digests]
        assert many.find_contents(b"".join(digests)).tolist() == [-1 if number is None else number for number in found]
        assert many.has_any_id([str(number) for number in batch]) == any(number is not None for number in found)
        new = [(str(n), digest) for n, digest, known in zip(batch, digests, found, strict=True) if known is None]
        assert many.add_many([item for item, _ in new], b"".join(digest for _, digest in new), "test") == len(one)
        for item, digest in new:
            one.add(item, digest, "test")
    assert list(many.digests(0)) == list(one.digests(0)) == [one.digest(number) for number in range(len(one))]
    assert [many.item_id(n) for n in range(len(many))] == [one.item_id(n) for n in range(len(one))]
    assert many.in_test(0, len(many)).all() and len(many.in_test(0, len(many))) == len(one)


def test_clean_rows_come_in_blocks(tmp_path):
    rows = [{"id": f"m{n}", "text": f"text {n}"} for n in range(2500)]
    (tmp_path / "a.jsonl").write_bytes(jsonl_of(rows, []))
    (tmp_path / "a.csv").write_bytes(csv_of(rows, [], "\r\n"))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        (block,) = read_blocks(path, ["text"])
        assert isinstance(block, Block) and len(block) == 2500
        assert list(block.rows()) == [row for batch in read_table(path) for row in batch]
        assert block.part(3, 5).row(1) == block.row(4)
