"""The cache of vectors: what is stored comes back, nothing is encoded twice, damage only costs time."""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from al_pipeline.features import shards
from al_pipeline.features.cache import FeatureCache, ensure
from al_pipeline.features.shards import HashIndex
from al_pipeline.files import replacing
from al_pipeline.records import content_hash

Vectors = NDArray[np.float32]


def vector(text: str) -> Vectors:
    """A vector that only this text has."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)[:6].astype(np.float32)


class CountingEncoder:
    """Knows what it was asked; fails when a text tells it to."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.fail_at: int | None = None

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Vectors:
        if self.fail_at is not None and len(self.seen) + len(texts) > self.fail_at:
            raise KeyboardInterrupt
        self.seen += texts
        if progress:
            progress(len(texts))
        return np.stack([vector(text) for text in texts])


def named(texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(content_hash(text), text) for text in texts]


def check(cache: FeatureCache, texts: Sequence[str]) -> None:
    np.testing.assert_array_equal(cache.get([content_hash(t) for t in texts]), np.stack([vector(t) for t in texts]))


TEXTS = [f"text {number}" for number in range(25)]


def test_what_is_stored_comes_back_in_the_order_asked(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    cache = FeatureCache(tmp_path / "new")
    assert ensure(cache, iter(named(TEXTS)), lambda: encoder, chunk=4) == 25
    check(cache, TEXTS[::-1] + TEXTS[:3])
    check(FeatureCache(tmp_path / "new"), TEXTS)
    assert len(FeatureCache(tmp_path / "new")) == 25


def test_nothing_is_encoded_twice(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    ensure(FeatureCache(tmp_path), named(TEXTS[:10] * 2), lambda: encoder, chunk=3)
    ensure(FeatureCache(tmp_path), named(TEXTS), lambda: encoder, chunk=3)
    assert sorted(encoder.seen) == sorted(TEXTS)


def test_a_full_cache_makes_no_encoder(tmp_path: Path) -> None:
    ensure(FeatureCache(tmp_path), named(TEXTS), CountingEncoder)

    def refuse() -> CountingEncoder:
        raise AssertionError("made an encoder for nothing")

    assert ensure(FeatureCache(tmp_path), named(TEXTS), refuse) == 0


def test_a_kill_loses_at_most_one_chunk(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    encoder.fail_at = 13
    with pytest.raises(KeyboardInterrupt):
        ensure(FeatureCache(tmp_path), named(TEXTS), lambda: encoder, chunk=5)
    assert len(FeatureCache(tmp_path)) == 10
    encoder.fail_at = None
    ensure(FeatureCache(tmp_path), named(TEXTS), lambda: encoder, chunk=5)
    assert sorted(encoder.seen) == sorted(TEXTS)
    check(FeatureCache(tmp_path), TEXTS)


@pytest.mark.parametrize("damage", ["empty", "torn", "longer", "flipped", "header", "garbage"])
def test_a_damaged_shard_is_encoded_again(tmp_path: Path, damage: str) -> None:
    ensure(FeatureCache(tmp_path), named(TEXTS), CountingEncoder, chunk=5)
    victim = min(tmp_path.glob("[!.]*"))
    data = bytearray(victim.read_bytes())
    if damage == "flipped":
        data[-200] ^= 1
    if damage == "header":
        data[0] ^= 0xFF
    changed = {"empty": b"", "torn": data[:-7], "longer": data + b"0", "garbage": b"\xff" * len(data)}
    victim.write_bytes(changed.get(damage, bytes(data)))
    encoder = CountingEncoder()
    cache = FeatureCache(tmp_path)
    assert ensure(cache, named(TEXTS), lambda: encoder) == 5
    assert len(encoder.seen) == 5
    check(cache, TEXTS)
    check(FeatureCache(tmp_path), TEXTS)


def test_leftovers_of_a_killed_writer_are_no_shards_and_go(tmp_path: Path) -> None:
    (tmp_path / ".al-tmp-x.safetensors").write_bytes(b"half")
    cache = FeatureCache(tmp_path)
    with replacing(tmp_path / "y.safetensors") as written:  # by another process
        ensure(cache, named(TEXTS), CountingEncoder)
        assert [path.name for path in tmp_path.glob(".al-tmp-*")] == [written.name]
        written.write_bytes(b"not a shard")
    check(cache, TEXTS)


def test_adding_again_changes_nothing(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    hashes = [content_hash(text) for text in TEXTS]
    vectors = np.stack([vector(text) for text in TEXTS])
    cache.add(hashes[:5], vectors[:5])
    before = sorted(path.name for path in tmp_path.iterdir())
    cache.add(hashes[:5], vectors[:5])
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    other = FeatureCache(tmp_path)
    cache.add(hashes, vectors)
    other.add(hashes, vectors)  # does not know of the other's shard
    check(FeatureCache(tmp_path), TEXTS)
    assert len(FeatureCache(tmp_path).missing(hashes)) == 0


def test_unknown_hash_and_wrong_hash(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    assert cache.get([]).shape == (0, 0)
    with pytest.raises(KeyError, match="no vector for"):
        cache.get([content_hash("never seen")])
    for wrong in ("short", " " * 64, "g" * 64):
        with pytest.raises(ValueError):
            cache.missing([wrong])
    with pytest.raises(ValueError, match="1 hashes for 2 vectors"):
        cache.add([content_hash("a")], np.zeros((2, 3), np.float32))


def test_streaming_equals_getting(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    ensure(cache, named(TEXTS), CountingEncoder, chunk=4)
    hashes = [content_hash(text) for text in TEXTS]
    batches = list(cache.stream(hashes, 7))
    assert [len(batch) for batch in batches] == [7, 7, 7, 4]
    np.testing.assert_array_equal(np.concatenate(batches), cache.get(hashes))


def test_hashes_that_begin_alike_are_told_apart() -> None:
    digests = np.zeros((4, 32), np.uint8)
    digests[:, -1] = [3, 1, 2, 9]
    index = HashIndex(np.zeros(3, np.uint64), np.array([0, 1, 2], np.int32), 10)
    found = index.find(digests[[2, 0, 3, 1]], lambda rows: digests[rows - 10])
    np.testing.assert_array_equal(found, [12, 10, -1, 11])


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(TEXTS), max_size=12), max_size=5), st.integers(min_value=1, max_value=6))
def test_any_history_encodes_each_text_once(
    tmp_path_factory: pytest.TempPathFactory, history: list[list[str]], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    encoder = CountingEncoder()
    for texts in history:
        cache = FeatureCache(folder)
        ensure(cache, named(texts), lambda: encoder, chunk=chunk)
        if texts:
            check(cache, texts)
    assert sorted(encoder.seen) == sorted({text for texts in history for text in texts})


def test_progress_is_shown_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensure(FeatureCache(tmp_path / "quiet"), named(TEXTS), CountingEncoder)
    assert capsys.readouterr() == ("", "")
    ensure(FeatureCache(tmp_path / "loud"), named(TEXTS), CountingEncoder, progress=True, total=25)
    out, err = capsys.readouterr()
    assert out == ""
    assert "25/25" in err


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    history=st.lists(st.lists(st.sampled_from(TEXTS), max_size=9), max_size=6),
    loss=st.lists(st.sampled_from(["shard", "index", "garbage", "torn index", "foreign index"]), max_size=4),
)
def test_index_files_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, history: list[list[str]], loss: list[str]
) -> None:
    """Whatever is lost or damaged between openings, each text has its vector, and only lost ones are encoded again."""
    monkeypatch.setattr(shards, "INDEXED", 3)
    folder = tmp_path_factory.mktemp("cache")
    for number, texts in enumerate(history):
        cache, encoder = FeatureCache(folder), CountingEncoder()
        known = len(cache)
        ensure(cache, named(texts), lambda encoder=encoder: encoder, chunk=2)
        assert len(cache) == known + len(encoder.seen)
        for opened in (cache, FeatureCache(folder)):
            if texts:
                check(opened, texts)
            assert opened.missing([content_hash("unknown")]) == [content_hash("unknown")]
        if number < len(loss):
            spoil(folder, loss[number])


def spoil(folder: Path, loss: str) -> None:
    indexes, files = sorted(folder.glob(".index-*")), sorted(folder.glob("[!.]*"))
    if loss == "shard" and files:
        files[0].unlink()
    elif loss == "foreign index" and files:
        (folder / ".index-x.safetensors").write_bytes(files[0].read_bytes())
    elif indexes:
        data = indexes[0].read_bytes()
        indexes[0].write_bytes({"torn index": data[:-3], "garbage": b"x" * len(data)}.get(loss, b""))


def test_a_cache_with_index_files_takes_no_memory_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """80,000 rows whose digests alone are 2.6 MB, in 40 shards, all in index files."""
    monkeypatch.setattr(shards, "INDEXED", 4)
    rng = np.random.default_rng(0)
    names = [row.tobytes().hex() for row in rng.integers(0, 256, (80_000, 32), np.uint8)]
    cache = FeatureCache(tmp_path)
    for start in range(0, len(names), 2000):
        cache.add(names[start : start + 2000], np.full((2000, 2), start, np.float32))
    tracemalloc.start()
    cache = FeatureCache(tmp_path)
    assert cache.get([names[1], names[-1], names[40_000]])[:, 0].tolist() == [0, 78_000, 40_000]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600_000
    assert len(list(tmp_path.glob(".index-*"))) == 10


def test_what_a_process_wrote_is_not_checked_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path)
    ensure(cache, named(TEXTS), CountingEncoder)
    time.sleep(0.1)
    cache.remember_written()
    monkeypatch.setattr(shards, "_checksum", lambda _: pytest.fail("it was read"))
    check(FeatureCache(tmp_path), TEXTS)


def test_a_million_rows_stay_light(tmp_path: Path) -> None:
    """The index of many hashes costs a few dozen bytes each, and finding them all takes well under a second."""
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (200_000, 32), np.uint8)
    cache = FeatureCache(tmp_path)
    hashes = [row.tobytes().hex() for row in digests]
    cache.add(hashes, np.arange(400_000, dtype=np.float32).reshape(-1, 2))
    np.testing.assert_array_equal(cache.get(hashes[::-1])[:, 0], np.arange(400_000, dtype=np.float32)[-2::-2])


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, al_pipeline.features.cache, al_pipeline.features.encoder, al_pipeline.features.tfidf\n"
        "import al_pipeline.models.linear, al_pipeline.models.text_model\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'scipy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_cache_of_more_files_than_a_process_may_open_is_read(tmp_path: Path) -> None:
    """As far as the system allows: the usual limit of 1,024 is that of four million items."""
    cache = FeatureCache(tmp_path)
    for number in range(60):
        cache.add([content_hash(str(number))], np.ones((1, 4), np.float32))
    del cache
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert len(FeatureCache(tmp_path)) == 60
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
