"""Item ids, duplicates, and the random draw of the test set."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from al_pipeline.records import Part, composed
from al_pipeline.sanitize import storable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Positions = NDArray[np.intp]

ID_CHARACTERS = 200
HASH_ID_CHARACTERS = 20
_BLOCK_BYTES = 32 * 8192
_INSERTED = 65_536
"""Number of items that are indexed at once."""
TEST_SHARE = 5
"""At most one in this many new items is drawn for the test set."""


def item_id_from(value: Any, content_hash: str) -> str:
    """The id of an item: the user's, or else the first 20 hex digits of its content hash.

    Raises ValueError with the reason if the user's id is neither an integer nor 1 to 200 printable characters.
    """
    value = _as_integer(value)
    if isinstance(value, int):
        value = str(value) if abs(value) < 10**ID_CHARACTERS else "9" * (ID_CHARACTERS + 1)
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise ValueError("the id is neither a string nor a whole number")
    value = value.strip()
    if len(value) > ID_CHARACTERS:
        raise ValueError(f"the id is longer than {ID_CHARACTERS} characters")
    if not value.isprintable():
        raise ValueError("the id holds characters that cannot be printed")
    return value or content_hash[:HASH_ID_CHARACTERS]


def item_ids_from(values: Sequence[Any], content_hashes: Sequence[str]) -> list[str]:
    """`item_id_from` of each value, (n,)."""
    if set(map(type, values)) == {str}:
        ids = list(map(str.strip, values))
        if all(ids) and max(map(len, ids)) <= ID_CHARACTERS and "".join(ids).isprintable():
            return ids
    return list(map(item_id_from, values, content_hashes))


def text_from(value: Any, longest: int) -> str:
    """The text of an item. Raises ValueError with the reason and, as second argument, the detail of this case."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("no text", "")
    if not isinstance(value, str):
        raise ValueError("the text is not a string", type(value).__name__)
    if len(value) > longest:
        raise ValueError(f"the text is longer than {longest:,} characters (ingest.max_characters)", f"{len(value):,}")
    if not storable(value):
        raise ValueError("the text holds half a surrogate pair, which UTF-8 cannot store", "")
    return value


def label_from(value: Any) -> str | None:
    """The class name in a user's cell, NFC-normalised; None for an empty cell.

    A column of integers with missing values arrives as floats: 1.0 is the class `1`. Raises ValueError with the reason
    if the cell is neither a string nor an integer.
    """
    value = _as_integer(value)
    if value is None:
        return None
    if isinstance(value, int):
        value = str(value) if abs(value) < 10**ID_CHARACTERS else "9" * (ID_CHARACTERS + 1)
    if not isinstance(value, str):
        raise ValueError("the label is neither a string nor a whole number")
    return composed(value).strip() or None


def _as_integer(value: Any) -> Any:
    """A float without a fraction as an integer, a boolean as NaN (it is neither an id nor a label); else unchanged."""
    if isinstance(value, bool):
        return float("nan")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def drawn_size(wanted: int, items: int) -> int:
    """The number of new items to draw for the test set: `wanted`, but at most a fifth of `items`."""
    return min(wanted, items // TEST_SHARE)


def draw_test(content_hashes: Iterable[bytes], count: int, seed: int) -> set[bytes]:
    """A random sample of `count` items that depends on the seed and on the set of items, not on their order.

    It takes the items with the smallest keyed hash (BLAKE2b of the content digest, keyed by the seed).
    """
    return {digest for _, digest in heapq.nsmallest(count, _ordered(content_hashes, seed))}


def test_order(digest: bytes, seed: int) -> tuple[bytes, bytes]:
    """The sort key by which test items are drawn, and later queried. `digest`: of the item's content.

    Any prefix of the test set in this order is a random sample: the one that a smaller test set would be.
    """
    return next(_ordered([digest], seed))


def _ordered(digests: Iterable[bytes], seed: int) -> Iterator[tuple[bytes, bytes]]:
    """The keyed hash of each digest, with the digest."""
    key = seed.to_bytes(8, "big")
    for digest in digests:
        yield blake2b(digest, digest_size=16, key=key).digest(), digest


class Catalog:
    """An index of all items by id and by content, numbered in order of arrival.

    It takes about 90 bytes per item; sets and dicts of strings would take several hundred.
    """

    def __init__(self) -> None:
        self._ids = bytearray()
        self._ends = array("Q", [0])
        self._hashes = bytearray()
        self._id_keys = array("q")
        self._test = bytearray()
        self._by_hash = _Slots()
        self._by_id = _Slots()

    def __len__(self) -> int:
        return len(self._test)

    @property
    def test_items(self) -> int:
        """The number of items in the test set."""
        return self._test.count(1)

    def add(self, item_id: str, digest: bytes, part: Part) -> int:
        """Add an item that neither `find_content` nor `find_id` finds; returns its number."""
        number = len(self._test)
        encoded = item_id.encode()
        self._ids += encoded
        self._ends.append(len(self._ids))
        self._hashes += digest
        self._test.append(part == "test")
        self._id_keys.append(hash(encoded))
        if not (self._by_hash.insert(_hash_key(digest), number) and self._by_id.insert(self._id_keys[-1], number)):
            self._by_hash.insert_many(self._content_keys, number, number + 1)
            self._by_id.insert_many(self._id_keys_of, number, number + 1)
        return number

    def add_many(self, item_ids: Sequence[str], digests: bytes, part: Part) -> int:
        """Add new items with different ids and contents; `digests`: 32 bytes for each. Returns the first's number."""
        import numpy as np

        first = len(self._test)
        encoded = list(map(str.encode, item_ids))
        lengths = np.fromiter(map(len, encoded), np.uint64, len(encoded))
        self._ends.frombytes((np.cumsum(lengths, dtype=np.uint64) + np.uint64(len(self._ids))).tobytes())
        self._ids += b"".join(encoded)
        self._id_keys.extend(map(hash, encoded))
        self._hashes += digests
        self._test += bytes([part == "test"]) * len(encoded)
        self._by_hash.insert_many(self._content_keys, first, len(self._test))
        self._by_id.insert_many(self._id_keys_of, first, len(self._test))
        return first

    def find_contents(self, digests: bytes) -> NDArray[np.int64]:
        """The number of the item with each content (SHA-256, 32 bytes each), shape (n,); -1 if there is none."""
        import numpy as np

        wanted, known = (np.frombuffer(found, np.uint64).reshape(-1, 4) for found in (digests, self._hashes))

        def equal(rows: Positions, numbers: Positions) -> NDArray[np.bool_]:
            same: NDArray[np.bool_] = (wanted[rows] == known[numbers]).all(axis=1)
            return same

        return self._by_hash.find_many(_hash_keys(digests), equal)

    def has_any_id(self, item_ids: Sequence[str]) -> bool:
        """Whether there is an item with one of these ids."""
        import numpy as np

        keys = np.fromiter(map(hash, map(str.encode, item_ids)), np.int64, len(item_ids))
        known = self._known_id_keys()
        same_key = self._by_id.find_many(keys, lambda rows, numbers: keys[rows] == known[numbers]) >= 0
        return any(self.find_id(item_ids[row]) is not None for row in np.flatnonzero(same_key))

    def in_test(self, first: int, last: int) -> NDArray[np.bool_]:
        """Whether items `first` to before `last` belong to the test set, shape (last - first,)."""
        import numpy as np

        return np.frombuffer(self._test[first:last], np.bool_)

    def find_content(self, digest: bytes) -> int | None:
        """The number of the item with this content (SHA-256, 32 bytes); None if there is none."""
        return next((n for n in self._by_hash.candidates(_hash_key(digest)) if self.digest(n) == digest), None)

    def find_id(self, item_id: str) -> int | None:
        """The number of the item with this id; None if there is none."""
        encoded = item_id.encode()
        return next((n for n in self._by_id.candidates(hash(encoded)) if self._encoded_id(n) == encoded), None)

    def item_id(self, number: int) -> str:
        """The id of item `number`."""
        return self._encoded_id(number).decode()

    def digest(self, number: int) -> bytes:
        """The SHA-256 of the content of item `number`, 32 bytes."""
        return bytes(self._hashes[32 * number : 32 * number + 32])

    def digests(self, first: int) -> Iterator[bytes]:
        """The digests of the items from number `first` on, copied a block at a time."""
        for begin in range(32 * first, len(self._hashes), _BLOCK_BYTES):
            held = bytes(self._hashes[begin : begin + _BLOCK_BYTES])
            yield from (held[start : start + 32] for start in range(0, len(held), 32))

    def part(self, number: int) -> Part:
        """Whether item `number` belongs to the pool or to the test set."""
        return "test" if self._test[number] else "pool"

    def move_to_test(self, number: int) -> None:
        """Move item `number` to the test set."""
        self._test[number] = 1

    def _known_id_keys(self) -> NDArray[np.int64]:
        """The hash of each item's id; must not outlive the caller, since the items could not grow."""
        import numpy as np

        return np.frombuffer(self._id_keys, np.int64)

    def _content_keys(self, first: int, stop: int) -> NDArray[np.int64]:
        """The key of each item's content, from number `first` to before `stop`."""
        return _hash_keys(self._hashes[32 * first : 32 * stop])

    def _id_keys_of(self, first: int, stop: int) -> NDArray[np.int64]:
        """The key of each item's id, from number `first` to before `stop`."""
        import numpy as np

        return np.array(self._known_id_keys()[first:stop])

    def _encoded_id(self, number: int) -> bytes:
        return bytes(self._ids[self._ends[number] : self._ends[number + 1]])


def _hash_key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _hash_keys(digests: bytes | bytearray) -> NDArray[np.int64]:
    """The last bits of `_hash_key` for each digest, shape (n,)."""
    import numpy as np

    return np.frombuffer(digests, ">i8")[::4].astype(np.int64)


class _Slots:
    """A hash table (open addressing) from keys to item numbers; the caller checks candidates for true equality."""

    _EMPTY = 0xFFFFFFFF

    def __init__(self) -> None:
        self._slots = array("I", [self._EMPTY]) * 1024

    def candidates(self, key: int) -> Iterator[int]:
        """The numbers of the items that may have this key."""
        mask = len(self._slots) - 1
        slot = key & mask
        while (number := self._slots[slot]) != self._EMPTY:
            yield number
            slot = (slot + 1) & mask

    def find_many(
        self, keys: NDArray[np.int64], equal: Callable[[Positions, Positions], NDArray[np.bool_]]
    ) -> NDArray[np.int64]:
        """The item of each key, shape (n,); -1 if there is none.

        `equal(rows, numbers)` says for pairs of a key's position and a candidate's number whether they are the same.
        """
        import numpy as np

        slots = np.frombuffer(self._slots, np.uint32)
        found = np.full(len(keys), -1, dtype=np.int64)
        rows, places = np.arange(len(keys)), keys & (len(slots) - 1)
        while len(rows):
            numbers = slots[places].astype(np.int64)
            used = numbers != self._EMPTY
            rows, places, numbers = rows[used], places[used], numbers[used]
            same = equal(rows, numbers)
            found[rows[same]] = numbers[same]
            rows, places = rows[~same], (places[~same] + 1) & (len(slots) - 1)
        return found

    def insert(self, key: int, number: int) -> bool:
        """Insert an item; False, and nothing is done, if `insert_many` must make the table larger."""
        if 2 * (number + 1) > len(self._slots):
            return False
        slots, mask = self._slots, len(self._slots) - 1
        slot = key & mask
        while slots[slot] != self._EMPTY:
            slot = (slot + 1) & mask
        slots[slot] = number
        return True

    def insert_many(self, keys_of: Callable[[int, int], NDArray[np.int64]], first: int, stop: int) -> None:
        """Insert the items from number `first` to `stop`, the number of all; `keys_of` returns the keys of a range."""
        if 2 * stop > len(self._slots):
            size = len(self._slots)
            while 2 * stop > size:
                size *= 2
            self._slots = array("I", [self._EMPTY]) * size
            first = 0
        for start in range(first, stop, _INSERTED):
            self._insert(keys_of(start, min(stop, start + _INSERTED)), start)

    def _insert(self, keys: NDArray[np.int64], first: int) -> None:
        import numpy as np

        slots = np.frombuffer(self._slots, np.uint32)
        numbers = np.arange(first, first + len(keys), dtype=np.uint32)
        places = keys & (len(slots) - 1)
        while len(numbers):
            free = slots[places] == self._EMPTY
            slots[places[free]] = numbers[free]  # of several numbers in one place the last stays
            left = slots[places] != numbers
            numbers, places = numbers[left], (places[left] + 1) & (len(slots) - 1)
