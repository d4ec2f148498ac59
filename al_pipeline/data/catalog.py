"""Item ids, duplicates, and the random draw of the test set."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

from al_pipeline.records import Part, composed

ID_CHARACTERS = 200
HASH_ID_CHARACTERS = 20
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


def storable(text: str) -> bool:
    """Whether UTF-8 can encode the text; it cannot encode a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    return set(heapq.nsmallest(count, content_hashes, key=lambda digest: test_order(digest, seed)))


def test_order(digest: bytes, seed: int) -> tuple[bytes, bytes]:
    """The sort key by which test items are drawn, and later queried. `digest`: of the item's content.

    Any prefix of the test set in this order is a random sample: the one that a smaller test set would be.
    """
    return blake2b(digest, digest_size=16, key=seed.to_bytes(8, "big")).digest(), digest


class Catalog:
    """An index of all items by id and by content, numbered in order of arrival.

    It takes about 90 bytes per item; sets and dicts of strings would take several hundred.
    """

    def __init__(self) -> None:
        self._ids = bytearray()
        self._ends = array("Q", [0])
        self._hashes = bytearray()
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
        self._by_hash.insert(_hash_key(digest), number, self._hash_keys)
        self._by_id.insert(hash(encoded), number, self._id_keys)
        return number

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

    def part(self, number: int) -> Part:
        """Whether item `number` belongs to the pool or to the test set."""
        return "test" if self._test[number] else "pool"

    def move_to_test(self, number: int) -> None:
        """Move item `number` to the test set."""
        self._test[number] = 1

    def _encoded_id(self, number: int) -> bytes:
        return bytes(self._ids[self._ends[number] : self._ends[number + 1]])

    def _hash_keys(self) -> Iterator[int]:
        return (_hash_key(self.digest(number)) for number in range(len(self)))

    def _id_keys(self) -> Iterator[int]:
        return (hash(self._encoded_id(number)) for number in range(len(self)))


def _hash_key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


class _Slots:
    """A hash table (open addressing) from keys to item numbers; the caller checks candidates for true equality."""

    _EMPTY = 0xFFFFFFFF

    def __init__(self) -> None:
        self._slots = array("I", [self._EMPTY]) * 1024
        self._used = 0

    def candidates(self, key: int) -> Iterator[int]:
        """The numbers of the items that may have this key."""
        mask = len(self._slots) - 1
        slot = key & mask
        while (number := self._slots[slot]) != self._EMPTY:
            yield number
            slot = (slot + 1) & mask

    def insert(self, key: int, number: int, keys: Any) -> None:
        """Insert an item; `keys()` yields the keys of all items in order, this one included."""
        self._used += 1
        if 2 * self._used <= len(self._slots):
            self._put(key, number)
            return
        self._slots = array("I", [self._EMPTY]) * (2 * len(self._slots))
        for known, known_key in enumerate(keys()):
            self._put(known_key, known)

    def _put(self, key: int, number: int) -> None:
        slots, mask = self._slots, len(self._slots) - 1
        slot = key & mask
        while slots[slot] != self._EMPTY:
            slot = (slot + 1) & mask
        slots[slot] = number
