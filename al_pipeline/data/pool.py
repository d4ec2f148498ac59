"""The Parquet parts of the pool and the test set. Append-only: a part is never rewritten."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from al_pipeline.errors import BadInput
from al_pipeline.files import replacing
from al_pipeline.records import Item

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

COLUMNS = ("item_id", "content_hash", "text", "metadata")
PART_SUFFIX = ".parquet"

_GROUP_ROWS = 4096
_GROUP_CHARACTERS = 16 * 1024 * 1024


class ItemKeys(Struct, frozen=True):
    """Ids and content hashes of items, in (part, row) order, without texts: about 60 bytes an item."""

    item_ids: pa.ChunkedArray
    """Strings, shape (n,)."""
    content_hashes: npt.NDArray[np.uint8]
    """SHA-256 digests, shape (n, 32)."""

    def __len__(self) -> int:
        return len(self.content_hashes)

    def ids(self) -> Iterator[str]:
        """Iterate over the ids."""
        for chunk in self.item_ids.chunks:
            yield from chunk.to_pylist()

    def hashes(self) -> Iterator[str]:
        """Iterate over the content hashes in hex."""
        for row in self.content_hashes:
            yield row.tobytes().hex()


def write_items(path: Path, batches: Iterable[Iterable[Item] | pa.RecordBatch], *, draft: bool = False) -> int:
    """Write one part atomically and return its number of items. The bytes depend on the items, not on the batches.

    Arrow batches have the columns of `item_batch`. `draft`: write it fast and large, to be read again and deleted.
    """
    import pyarrow.parquet as pq

    count = 0
    form: dict[str, Any] = {"compression": "none", "use_dictionary": False} if draft else {"compression": "zstd"}
    with replacing(path) as temporary, pq.ParquetWriter(temporary, _schema(), **form) as writer:
        for group in _groups(batches):
            writer.write_table(group, row_group_size=len(group))
            count += len(group)
    return count


def item_batch(
    item_ids: Sequence[str], content_hashes: Sequence[str], texts: Sequence[str], metadata: Sequence[str]
) -> pa.RecordBatch:
    """Items by column, (n,) each."""
    import pyarrow as pa

    from al_pipeline.data.parquet import strings

    columns = [strings(column) for column in (item_ids, content_hashes, texts, metadata)]
    return pa.RecordBatch.from_arrays(columns, schema=_schema())


def list_parts(folders: Iterable[Path]) -> list[Path]:
    """The parts in `folders`, in the order given and by name; a part may be given in a folder's place."""
    return [part for folder in folders for part in _parts_of(folder)]


def _parts_of(folder: Path) -> list[Path]:
    if folder.suffix == PART_SUFFIX:
        return [folder]
    return [part for part in sorted(folder.glob(f"*{PART_SUFFIX}")) if part.name[0] != "."]


def iter_batches(
    folders: Iterable[Path], columns: Sequence[str] = COLUMNS, batch_rows: int = 1000
) -> Iterator[pa.RecordBatch]:
    """All items in (part, row) order as Arrow batches of at most `batch_rows`. Raises BadInput on a damaged part."""
    for part in list_parts(folders):
        with _opened(part) as file:
            yield from _guarded(part, file.iter_batches(batch_size=batch_rows, columns=list(columns)))


def iter_chosen(folders: Iterable[Path], chosen: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    """The items for which `chosen`, (n,) in (part, row) order, is true, as Arrow batches."""
    from al_pipeline.data.parquet import integers

    start = 0
    for batch in iter_batches(folders):
        yield batch.take(integers(chosen[start : start + len(batch)].nonzero()[0]))
        start += len(batch)


def iter_items(folders: Iterable[Path], batch_rows: int = 1000) -> Iterator[list[Item]]:
    """All items in (part, row) order, at most `batch_rows` at a time. Raises BadInput on a damaged part."""
    for batch in iter_batches(folders, COLUMNS, batch_rows):
        yield _items(batch)


def count_items(folders: Iterable[Path]) -> int:
    """The number of items, from the parts' metadata."""
    total = 0
    for part in list_parts(folders):
        with _opened(part) as file:
            total += file.metadata.num_rows
    return total


def text_bytes(folders: Iterable[Path]) -> int:
    """The number of bytes of all texts, from the parts' metadata."""
    total = 0
    for part in list_parts(folders):
        with _opened(part) as file:
            column, groups = file.schema_arrow.names.index("text"), range(file.metadata.num_row_groups)
            total += sum(file.metadata.row_group(group).column(column).total_uncompressed_size for group in groups)
    return total


def columns_of(item: Item) -> dict[str, Any]:
    """An item's metadata: the user's other columns. Raises BadInput if they are not a JSON object."""
    try:
        found = json.loads(item.metadata)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadInput(
            f"the metadata of item {item.item_id} is not a JSON object: another program wrote that part of the pool; "
            "restore it with `dvc checkout`"
        )
    return found


def read_ids(folders: Iterable[Path]) -> ItemKeys:
    """Ids and content hashes of all items. Raises BadInput on a damaged part."""
    import numpy as np
    import pyarrow as pa

    ids: list[pa.Array] = []
    digests = bytearray()
    for batch in iter_batches(folders, ("item_id", "content_hash"), 50_000):
        # a copy: a column of a batch keeps the whole batch's buffers alive
        ids.append(pa.concat_arrays([batch.column("item_id"), pa.nulls(0, pa.string())]))
        digests += _digests(batch.column("content_hash").to_pylist())
    return ItemKeys(pa.chunked_array(ids, pa.string()), np.frombuffer(digests, np.uint8).reshape(-1, 32))


def iter_digests(folders: Iterable[Path]) -> Iterator[npt.NDArray[np.uint8]]:
    """The content hashes of all items as bytes, (n, 32) a part. Raises BadInput on a damaged part."""
    import numpy as np

    for batch in iter_batches(folders, ("content_hash",), 50_000):
        yield np.frombuffer(_digests(batch.column("content_hash").to_pylist()), np.uint8).reshape(-1, 32)


def iter_texts(folders: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Content hash and text of all items. Raises BadInput on a damaged part."""
    for batch in iter_batches(folders, ("content_hash", "text")):
        yield from zip(batch.column("content_hash").to_pylist(), batch.column("text").to_pylist(), strict=True)


def iter_keys(
    folders: Iterable[Path], batch_rows: int
) -> Iterator[tuple[list[str], list[str], Callable[[], list[str]]]]:
    """Ids and content hashes of all items, in batches as those of `iter_batches`, and a function that reads the texts.

    The function may be called until the next batch is taken. Texts of batches for which it is not called are not read,
    but for those between batches for which it is. Raises BadInput on a damaged part.
    """
    for part in list_parts(folders):
        texts, start = _TextsOf(part, batch_rows), 0
        for batch in iter_batches([part], ("item_id", "content_hash"), batch_rows):
            yield (
                batch.column("item_id").to_pylist(),
                batch.column("content_hash").to_pylist(),
                partial(texts.read, start, len(batch)),
            )
            start += len(batch)


class _TextsOf:
    """The texts of a part, read in increasing order."""

    def __init__(self, part: Path, batch_rows: int) -> None:
        self._batches = iter_batches([part], ("text",), batch_rows)
        self._held: list[str] = []
        self._start = 0
        """The row of the first text held."""

    def read(self, start: int, count: int) -> list[str]:
        """The texts of `count` rows from row `start` on, which is no less than in earlier calls."""
        while self._start + len(self._held) < start + count:
            if self._start + len(self._held) <= start:
                self._start, self._held = self._start + len(self._held), []
            self._held += next(self._batches).column("text").to_pylist()
        return self._held[start - self._start : start - self._start + count]


def _digests(hashes: Sequence[str]) -> bytes:
    """Content hashes in hex, concatenated as bytes. Raises BadInput if one is not a SHA-256."""
    try:
        if all(len(found) == 64 for found in hashes):
            return bytes.fromhex("".join(hashes))
    except ValueError:
        pass
    raise BadInput(
        "the pool contains a content hash that is not a SHA-256: another program wrote that part; restore it with "
        "`dvc checkout`"
    )


def hashes_of(folders: Iterable[Path], ids: Collection[str]) -> dict[str, str]:
    """The content hashes of those of `ids` that exist, by id. Raises BadInput on a damaged part."""
    import pyarrow.compute as pc

    from al_pipeline.data.parquet import strings

    found: dict[str, str] = {}
    wanted = strings(sorted(set(ids)))
    for batch in iter_batches(folders, ("item_id", "content_hash"), 50_000):
        some = batch.filter(pc.is_in(batch.column("item_id"), value_set=wanted))
        hashes = some.column("content_hash").to_pylist()
        _digests(hashes)
        found |= zip(some.column("item_id").to_pylist(), hashes, strict=True)
    return found


class OpenIds(Collection[str]):
    """The ids in `folders` except the closed ones. Each iteration reads the files again; no id is kept in memory."""

    def __init__(self, folders: Iterable[Path], closed: Collection[str]) -> None:
        from al_pipeline.data.parquet import strings

        self._folders = list(folders)
        self._closed = strings(sorted(closed))
        self._length = sum(len(ids) for ids in self._batches())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(ids.to_pylist() for ids in self._batches())

    def __contains__(self, item_id: object) -> bool:
        return any(item_id == known for known in self)

    def intersection(self, ids: Iterable[str], /) -> set[str]:
        """Those of `ids` that are open."""
        import pyarrow.compute as pc

        from al_pipeline.data.parquet import strings

        wanted = strings(sorted(set(ids)))
        return {
            name for open_ in self._batches() for name in open_.filter(pc.is_in(open_, value_set=wanted)).to_pylist()
        }

    def _batches(self) -> Iterator[pa.Array]:
        import pyarrow.compute as pc

        for batch in iter_batches(self._folders, ("item_id",), 10_000):
            ids = batch.column("item_id")
            yield ids.filter(pc.invert(pc.is_in(ids, value_set=self._closed)))


def fetch(folders: Iterable[Path], ids: Collection[str]) -> dict[str, Item]:
    """Those of `ids` that exist, by id. Reads texts only from row groups that hold one. Raises BadInput on damage."""
    found: dict[str, Item] = {}
    wanted = sorted(set(ids))
    for part in list_parts(folders):
        if len(found) == len(wanted):
            break
        found |= _fetch(part, wanted)
    return found


def _fetch(part: Path, ids: Sequence[str]) -> dict[str, Item]:
    """The items of one part with these ids, by id."""
    import pyarrow.compute as pc

    from al_pipeline.data.parquet import strings

    found: dict[str, Item] = {}
    wanted = strings(ids)
    with _opened(part) as file:
        for group in range(file.metadata.num_row_groups):
            known = _guard(part, lambda g=group, f=file: f.read_row_group(g, columns=["item_id"]))
            rows = pc.indices_nonzero(pc.is_in(known.column("item_id"), value_set=wanted))
            if len(rows) == 0:
                continue
            table = _guard(part, lambda g=group, f=file: f.read_row_group(g, columns=list(COLUMNS)))
            for batch in map(_validated, table.take(rows).to_batches()):
                found.update((item.item_id, item) for item in _items(batch))
    return found


def find(folders: Iterable[Path], item_id: str) -> tuple[Path, Item] | None:
    """The item with this id and its part; None if there is none. Raises BadInput on a damaged part."""
    for part in list_parts(folders):
        if item_id in (found := _fetch(part, [item_id])):
            return part, found[item_id]
    return None


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in COLUMNS])


def _groups(batches: Iterable[Iterable[Item] | pa.RecordBatch]) -> Iterator[pa.Table]:
    """Row groups that depend on the items alone, not on the batches."""
    import numpy as np
    import pyarrow as pa

    group: list[pa.RecordBatch] = []
    rows, characters = 0, 0
    for batch in batches:
        columns = batch if isinstance(batch, pa.RecordBatch) else _batch_of(batch)
        ends, start = np.cumsum(_characters(columns)), 0
        while start < len(ends):
            before = int(ends[start - 1]) if start else 0
            full = int(np.searchsorted(ends, before + _GROUP_CHARACTERS - characters))
            stop = min(len(ends), start + _GROUP_ROWS - rows, full + 1)
            group.append(columns.slice(start, stop - start))
            rows, characters = rows + stop - start, characters + int(ends[stop - 1]) - before
            if rows >= _GROUP_ROWS or characters >= _GROUP_CHARACTERS:
                yield _table(group)
                group, rows, characters = [], 0, 0
            start = stop
    if group:
        yield _table(group)


def _characters(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """The number of characters of each item's text and metadata, shape (n,)."""
    import numpy as np
    import pyarrow.compute as pc

    lengths = (pc.utf8_length(batch.column(name)) for name in ("text", "metadata"))
    return sum(
        (np.frombuffer(found.buffers()[1], np.int32, len(found)).astype(np.int64) for found in lengths),
        start=np.zeros(batch.num_rows, np.int64),
    )


def _batch_of(items: Iterable[Item]) -> pa.RecordBatch:
    rows = [(item.item_id, item.content_hash, item.text, item.metadata) for item in items]
    return item_batch(*(zip(*rows, strict=True) if rows else ((), (), (), ())))


def _table(batches: Sequence[pa.RecordBatch]) -> pa.Table:
    """One table without chunks."""
    import pyarrow as pa

    columns = [pa.concat_arrays([batch.column(name) for batch in batches]) for name in COLUMNS]
    return pa.Table.from_arrays(columns, schema=_schema())


def _items(batch: pa.RecordBatch) -> list[Item]:
    columns = [batch.column(name).to_pylist() for name in COLUMNS]
    return [Item(*row) for row in zip(*columns, strict=True)]


def _opened(part: Path) -> Any:
    import pyarrow.parquet as pq

    file = _guard(part, lambda: pq.ParquetFile(part, pre_buffer=False))  # else it keeps what it has read
    if missing := [name for name in COLUMNS if file.schema_arrow.names.count(name) != 1]:
        file.close()
        raise _damaged(part, ValueError(f"it has no column `{missing[0]}`, or several"))
    if wrong := [name for name in COLUMNS if file.schema_arrow.field(name) != _schema().field(name)]:
        file.close()
        raise _damaged(part, ValueError(f"its column `{wrong[0]}` is not text, or may be null"))
    return file


def _guard(part: Path, call: Any) -> Any:
    import pyarrow as pa

    try:
        return call()
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _damaged(part, error) from None


def _guarded(part: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    while (batch := _guard(part, lambda: _validated(next(batches, None)))) is not None:
        yield batch


def _validated(batch: pa.RecordBatch | None) -> pa.RecordBatch | None:
    """The batch, after a check that its texts are UTF-8, so that converting them to `str` cannot fail."""
    if batch is not None:
        batch.validate(full=True)
    return batch


def _damaged(part: Path, error: Exception) -> BadInput:
    return BadInput(f"{part} is damaged ({error}); if it is published, remove it and run `dvc checkout {part.parent}`")
