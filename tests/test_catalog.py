"""Ids, the test draw and the catalogue of what is known: laws first."""

from __future__ import annotations

import hashlib
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.data.catalog import Catalog, draw_test, drawn_size, item_id_from

HASH = "0123456789abcdef" * 4


def digest(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


@pytest.mark.parametrize(
    ("given_id", "expected"),
    [
        ("a-1", "a-1"),
        ("  padded ", "padded"),
        (17, "17"),
        (-3, "-3"),
        ("Grüße 10", "Grüße 10"),
        ("x" * 200, "x" * 200),
        (None, HASH[:20]),
        ("", HASH[:20]),
        ("   ", HASH[:20]),
    ],
)
def test_an_id_is_the_users_or_comes_from_the_content(given_id, expected):
    assert item_id_from(given_id, HASH) == expected


@pytest.mark.parametrize("bad", ["x" * 201, "a\nb", "a\0b", "a\u2028b", "\ud800", 1.5, True, ["a"], {"a": 1}, 10**300])
def test_an_id_that_cannot_be_one_is_refused_with_the_reason(bad):
    with pytest.raises(ValueError, match="^the id "):
        item_id_from(bad, HASH)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=32, max_size=32), unique=True, max_size=60), st.integers(0, 80), st.randoms())
def test_the_draw_does_not_depend_on_the_order(hashes, count, random):
    shuffled = hashes[:]
    random.shuffle(shuffled)
    drawn = draw_test(hashes, count, seed=1)
    assert drawn == draw_test(shuffled, count, seed=1)
    assert len(drawn) == min(count, len(hashes))
    assert drawn <= set(hashes)


def test_the_draw_depends_on_the_seed_and_is_nested():
    hashes = [digest(i) for i in range(1000)]
    assert draw_test(hashes, 100, seed=1) != draw_test(hashes, 100, seed=2)
    assert draw_test(hashes, 50, seed=1) < draw_test(hashes, 100, seed=1)


def test_the_draw_is_a_fair_sample():
    """1000 of 10,000 under 20 seeds: each half of the items gets its half, within five standard deviations (67)."""
    hashes = [digest(i) for i in range(10_000)]
    lower = set(sorted(hashes)[:5000])
    for seed in range(20):
        assert abs(len(draw_test(hashes, 1000, seed) & lower) - 500) < 5 * (1000 * 0.25 * 0.9) ** 0.5


def test_a_draw_holds_only_what_it_draws():
    """10 of 50,000 digests, of which a list would take 4 MB."""
    tracemalloc.start()
    assert len(draw_test((number.to_bytes(32, "big") for number in range(50_000)), 10, seed=1)) == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(("wanted", "items", "size"), [(500, 10_000, 500), (500, 100, 20), (500, 4, 0), (0, 100, 0)])
def test_the_test_set_is_at_most_a_fifth(wanted, items, size):
    assert drawn_size(wanted, items) == size


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=3).filter(str.isprintable), st.integers(0, 40)), max_size=80))
def test_the_catalogue_finds_what_a_dict_finds(rows):
    catalog = Catalog()
    by_id: dict[str, int] = {}
    by_content: dict[bytes, int] = {}
    for item_id, content in rows:
        assert catalog.find_id(item_id) == by_id.get(item_id)
        assert catalog.find_content(digest(content)) == by_content.get(digest(content))
        if item_id not in by_id and digest(content) not in by_content:
            number = catalog.add(item_id, digest(content), "test" if content % 3 else "pool")
            by_id[item_id] = by_content[digest(content)] = number
            assert (catalog.item_id(number), catalog.digest(number)) == (item_id, digest(content))
            assert catalog.part(number) == ("test" if content % 3 else "pool")
    assert len(catalog) == len(by_id)
    assert catalog.test_items == sum(catalog.part(n) == "test" for n in range(len(catalog)))


def test_the_catalogue_tells_contents_with_the_same_key_apart():
    catalog = Catalog()
    first, second = b"k" * 8 + b"1" * 24, b"k" * 8 + b"2" * 24
    catalog.add("one", first, "pool")
    assert catalog.find_content(second) is None
    catalog.add("two", second, "pool")
    assert (catalog.find_content(first), catalog.find_content(second)) == (0, 1)


def test_the_catalogue_grows_and_stays_small():
    tracemalloc.start()
    catalog = Catalog()
    for number in range(20_000):
        catalog.add(f"item-{number:012d}", digest(number), "pool")
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert all(catalog.find_id(f"item-{n:012d}") == catalog.find_content(digest(n)) == n for n in range(0, 20_000, 97))
    assert catalog.find_id("item-1") is None
    assert size / 20_000 < 130, "bytes an item"
