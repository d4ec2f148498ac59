"""The pool as an idea: what an id is, what is the same item, which items become the test set."""

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
"""At most one new item in so many becomes a test item."""


def item_id_from(value: Any, content_hash: str) -> str:
    """The id of an item: the user's, or the first 20 hex digits of its content's hash where there is none.

    Raises ValueError with the reason where the user's is neither a whole number nor 1 to 200 printable characters.
    """
    value = _whole(value)
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
    """The text of an item. Raises ValueError with the reason and, as a second argument, what is special here."""
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
    """The name of a class that a user's cell holds, in Unicode's NFC form; None where it holds none.

    A column of whole numbers in which some are missing comes as floats: 1.0 is the class `1`. Raises ValueError with
    the reason where the cell holds anything else than a string or a whole number.
    """
    value = _whole(value)
    if value is None:
        return None
    if isinstance(value, int):
        value = str(value) if abs(value) < 10**ID_CHARACTERS else "9" * (ID_CHARACTERS + 1)
    if not isinstance(value, str):
        raise ValueError("the label is neither a string nor a whole number")
    return composed(value).strip() or None


def storable(text: str) -> bool:
    """Whether UTF-8 has bytes for it: half a surrogate pair has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole(value: Any) -> Any:
    """A float without a fraction as the whole number that it is; a truth value is no number."""
    if isinstance(value, bool):
        return float("nan")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def drawn_size(wanted: int, items: int) -> int:
    """How many of `items` new items become the test set: what is wanted, but at most a fifth."""
    return min(wanted, items // TEST_SHARE)


def draw_test(content_hashes: Iterable[bytes], count: int, seed: int) -> set[bytes]:
    """A random sample of items that depends on the seed and on which items there are, not on their order.

    Those with the smallest keyed hash (BLAKE2b of the content's digest, keyed by the seed) are drawn.
    """
    return set(heapq.nsmallest(count, content_hashes, key=lambda digest: test_order(digest, seed)))


def test_order(digest: bytes, seed: int) -> tuple[bytes, bytes]:
    """Where an item of this content stands in the order in which test items are drawn, and later asked.

    Any prefix of the test set in this order is itself a random sample, the one that a smaller test set would be.
    """
    return blake2b(digest, digest_size=16, key=seed.to_bytes(8, "big")).digest(), digest


class Catalog:
    """The items that are known, without their texts: found by id or by content, numbered in the order they came.

    About 90 bytes an item, where sets and dicts of strings would take several hundred.
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
        """How many of them belong to the test set."""
        return self._test.count(1)

    def add(self, item_id: str, digest: bytes, part: Part) -> int:
        """Take in an item that neither `find_content` nor `find_id` knows; returns its number."""
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
        """The number of the item with this content (SHA-256, 32 bytes)."""
        return next((n for n in self._by_hash.candidates(_hash_key(digest)) if self.digest(n) == digest), None)

    def find_id(self, item_id: str) -> int | None:
        """The number of the item with this id."""
        encoded = item_id.encode()
        return next((n for n in self._by_id.candidates(hash(encoded)) if self._encoded_id(n) == encoded), None)

    def item_id(self, number: int) -> str:
        """The id of item `number`."""
        return self._encoded_id(number).decode()

    def digest(self, number: int) -> bytes:
        """The SHA-256 of the content of item `number`, 32 bytes."""
        return bytes(self._hashes[32 * number : 32 * number + 32])

    def part(self, number: int) -> Part:
        """Where item `number` belongs."""
        return "test" if self._test[number] else "pool"

    def move_to_test(self, number: int) -> None:
        """Item `number` was drawn for the test set."""
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
    """A hash table from keys to item numbers by open addressing; its caller tells equal items from equal keys."""

    _EMPTY = 0xFFFFFFFF

    def __init__(self) -> None:
        self._slots = array("I", [self._EMPTY]) * 1024
        self._used = 0

    def candidates(self, key: int) -> Iterator[int]:
        """The numbers of items that may have this key."""
        mask = len(self._slots) - 1
        slot = key & mask
        while (number := self._slots[slot]) != self._EMPTY:
            yield number
            slot = (slot + 1) & mask

    def insert(self, key: int, number: int, keys: Any) -> None:
        """Remember an item; `keys()` gives the keys of all items in their order, this one included."""
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
