"""Our own Parquet parts: what is written is read, in order, and equal items give equal bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.data import pool as module
from al_pipeline.data.pool import (
    OpenIds,
    count_items,
    fetch,
    hashes_of,
    item_batch,
    iter_batches,
    iter_items,
    iter_keys,
    list_parts,
    read_ids,
    text_bytes,
    write_items,
)
from al_pipeline.errors import BadInput
from al_pipeline.records import Item, content_hash


def item(number: int, text: str | None = None) -> Item:
    text = f"text {number}" if text is None else text
    return Item(f"id-{number}", content_hash(text), text, f'{{"n":{number}}}')


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=25, deadline=None)
@given(st.lists(texts, max_size=30), st.integers(1, 7))
def test_what_is_written_is_read(tmp_path_factory, contents, batch_rows):
    folder = tmp_path_factory.mktemp("items")
    written = [item(number, text) for number, text in enumerate(contents)]
    assert write_items(folder / "part-000001.parquet", [written]) == len(written)
    read = list(iter_items([folder], batch_rows))
    assert [one for batch in read for one in batch] == written
    assert all(len(batch) <= batch_rows for batch in read)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 7), st.sets(st.integers(0, 40)))
def test_texts_of_a_batch_are_read_when_they_are_asked_for(tmp_path_factory, count, batch_rows, wanted):
    folder = tmp_path_factory.mktemp("items")
    written = [item(number) for number in range(count)]
    for part, rows in enumerate((written[: count // 3], written[count // 3 :])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_GROUP_ROWS", 5)
            write_items(folder / f"part-{part:06d}.parquet", [rows])
    seen = []
    for number, (ids, hashes, read) in enumerate(iter_keys([folder], batch_rows)):
        own = written[len(seen) : len(seen) + len(ids)]
        seen += ids
        assert (ids, hashes) == ([one.item_id for one in own], [one.content_hash for one in own])
        if number in wanted:
            assert read() == read() == [one.text for one in own]
    assert seen == [one.item_id for one in written]


def test_equal_items_give_equal_bytes_however_they_are_batched(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GROUP_ROWS", 7)
    rows = [item(number) for number in range(50)]
    write_items(tmp_path / "a", [rows])
    write_items(tmp_path / "b", ([row] for row in rows))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert pq.ParquetFile(tmp_path / "a").num_row_groups == 8


def test_row_groups_are_bounded_by_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GROUP_CHARACTERS", 1000)
    write_items(tmp_path / "a", [[item(number, "x" * 600 + str(number)) for number in range(6)]])
    assert pq.ParquetFile(tmp_path / "a").num_row_groups == 3


def test_a_killed_writer_leaves_nothing_to_read(tmp_path):
    def torn():
        yield [item(1)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_items(tmp_path / "part-000001.parquet", torn())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    pool, inbox = tmp_path / "z-pool", tmp_path / "a-inbox"
    write_items(pool / "part-000002.parquet", [[item(3), item(4)]])
    write_items(pool / "part-000001.parquet", [[item(1), item(2)]])
    write_items(inbox / "part-000001.parquet", [[item(5)]])
    (pool / ".al-tmp-x.parquet").write_bytes(b"half a part")
    return [pool, inbox, tmp_path / "missing"]


def test_the_order_is_folder_part_row(folders):
    assert [one.item_id for batch in iter_items(folders) for one in batch] == [f"id-{n}" for n in range(1, 6)]
    assert len(list_parts(folders)) == 3
    assert count_items(folders) == 5


def test_ids_and_hashes_without_texts(folders):
    keys = read_ids(folders)
    assert len(keys) == 5
    assert list(keys.ids()) == [f"id-{n}" for n in range(1, 6)]
    assert list(keys.hashes()) == [item(n).content_hash for n in range(1, 6)]
    assert keys.content_hashes.shape == (5, 32)


def test_open_ids_are_read_anew_without_the_closed_ones(folders):
    found = OpenIds(folders, {"id-2", "id-5", "nobody"})
    assert list(found) == list(found) == ["id-1", "id-3", "id-4"]
    assert len(found) == 3
    assert "id-1" in found and "id-2" not in found
    assert list(OpenIds(folders, ())) == [f"id-{n}" for n in range(1, 6)]


def test_hashes_of_a_few(folders, tmp_path):
    assert hashes_of(folders, ["id-5", "nobody", "id-2"]) == {
        n: item(int(n[3:])).content_hash for n in ("id-2", "id-5")
    }
    assert hashes_of(folders, []) == {}
    write_items(tmp_path / "bad" / "part-000001.parquet", [[replace(item(1), content_hash="z" * 64)]])
    with pytest.raises(BadInput, match="not a SHA-256"):
        hashes_of([tmp_path / "bad"], ["id-1"])


def test_no_parts_are_no_items(tmp_path):
    keys = read_ids([tmp_path])
    assert (len(keys), list(keys.ids()), list(keys.hashes())) == (0, [], [])
    assert list(iter_items([tmp_path])) == []
    assert fetch([tmp_path], ["a"]) == {}


def test_fetch_finds_a_few(folders):
    assert fetch(folders, ["id-5", "id-2", "nobody", "id-2"]) == {"id-2": item(2), "id-5": item(5)}
    assert fetch(folders, []) == {}


def test_fetch_reads_only_the_row_groups_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GROUP_ROWS", 10)
    write_items(tmp_path / "part-000001.parquet", [[item(number) for number in range(100)]])
    read: list[tuple[int, list[str]]] = []
    real = pq.ParquetFile.read_row_group

    def spy(self, group, columns=None, **more):
        read.append((group, columns))
        return real(self, group, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    assert set(fetch([tmp_path], ["id-42"])) == {"id-42"}
    assert [group for group, columns in read if "text" in columns] == [4]


def test_only_the_columns_asked_for(folders):
    batch = next(iter_batches(folders, ("item_id", "text")))
    assert batch.schema.names == ["item_id", "text"]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_a_damaged_part_is_named(folders, damage):
    part = folders[0] / "part-000002.parquet"
    if damage == "truncated":
        part.write_bytes(part.read_bytes()[:-20])
    elif damage == "empty":
        part.write_bytes(b"")
    else:
        pq.write_table(pa.table({"something": ["else"]}), part)
    for read in (lambda: list(iter_items(folders)), lambda: read_ids(folders), lambda: fetch(folders, ["id-5"])):
        with pytest.raises(BadInput, match=r"part-000002\.parquet is damaged"):
            read()


def test_reading_a_part_does_not_keep_it(tmp_path):
    """200,000 items, whose part has about 10 MB."""
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(200_000)]
    blank = [""] * len(hashes)
    part = tmp_path / "part-000001.parquet"
    write_items(part, [item_batch([name[:20] for name in hashes], hashes, blank, blank)])
    before, most = pa.total_allocated_bytes(), 0
    for _ in iter_batches([tmp_path], batch_rows=4096):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < part.stat().st_size / 2


def test_the_bytes_of_all_texts(folders):
    assert 0 < text_bytes(folders[:1]) < text_bytes(folders)


@pytest.mark.slow
def test_a_million_ids_are_well_under_200_megabytes(tmp_path):
    count = 1_000_000
    names = [f"{number:020x}" for number in range(count)]
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    blank = pa.array([""]).take(pa.array([0] * count))
    schema = module._schema()
    table = pa.table({"item_id": names, "content_hash": hashes, "text": blank, "metadata": blank}, schema=schema)
    pq.write_table(table, tmp_path / "part-000001.parquet", compression="zstd")
    del table
    before = pa.total_allocated_bytes()
    keys = read_ids([tmp_path])
    assert len(keys) == count
    assert keys.content_hashes.nbytes + keys.item_ids.nbytes < 70e6
    assert pa.total_allocated_bytes() - before < 60e6, "no buffers of whole batches are kept"
