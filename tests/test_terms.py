"""The cache of TF-IDF's vocabulary and rows: the bytes of a computation, for the price of a look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from harness import answer_all, play, small_workspace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from al_pipeline.data import pool
from al_pipeline.data.pool import write_items
from al_pipeline.features.terms import GROWTH, TermCache, fitted_parts
from al_pipeline.features.tfidf import Tfidf, _terms, fit
from al_pipeline.files import sha256_tree
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.tick import tick
from al_pipeline.records import Item, content_hash
from al_pipeline.stages import score, train
from al_pipeline.workspace.fingerprint import write_engine

TEXTS = [f"word{number % 7} other{number % 3} word{number % 5} and {'ß' * (number % 4)} more" for number in range(40)]
STRANGE = [
    "",
    " ",
    "\udcff lone",
    "nul \0 byte",
    "line\nbreak",
    "word1 " * 5000,
    "e\u0301 decomposed",
    "\u00e9 composed",
]


def cached(folder: Path, texts: Sequence[str] = TEXTS) -> Tfidf:
    return TermCache(folder, "an engine").vocabulary("a pool", lambda: texts)


def refuse() -> Iterable[str]:
    raise AssertionError("the texts were read")


def assert_same_rows(one: Tfidf, other: Tfidf, texts: Sequence[str]) -> None:
    mine, theirs = one.transform(texts), other.transform(texts)
    assert mine.shape == theirs.shape
    for name in ("data", "indices", "indptr"):
        found, wanted = getattr(mine, name), getattr(theirs, name)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_a_cached_vocabulary_is_the_fitted_one_and_no_text_is_read_for_it(tmp_path: Path) -> None:
    first = cached(tmp_path)
    again = TermCache(tmp_path, "an engine").vocabulary("a pool", refuse)
    plain = fit(TEXTS)
    for found in (first, again):
        assert found.terms == plain.terms
        np.testing.assert_array_equal(found.idf, plain.idf)
        assert found.components is not None and plain.components is not None
        np.testing.assert_array_equal(found.components, plain.components)
    assert cached(tmp_path / "none", []).terms == ()
    assert TermCache(tmp_path / "none", "an engine").vocabulary("a pool", refuse).components is None


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(TEXTS + STRANGE), max_size=12), max_size=5))
def test_cached_rows_have_the_bytes_of_computed_ones(
    tmp_path_factory: pytest.TempPathFactory, history: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("terms")
    for texts in history:
        assert_same_rows(cached(folder), fit(TEXTS), texts)


def test_texts_of_the_same_content_hash_have_the_same_row() -> None:
    """Composed or decomposed, with or without blanks around: rows are cached by content hash."""
    fitted = fit([*TEXTS, "caf\u00e9 noir", "caf\u00e9 blanc"])
    for texts in (["caf\u00e9 noir", " cafe\u0301 noir\n"], ["word1", f"{' ' * 20_000}word1"]):
        assert len(set(map(content_hash, texts))) == 1
        one, other = fitted.transform(texts[:1]), fitted.transform(texts[1:])
        assert one.nnz
        np.testing.assert_array_equal(one.toarray(), other.toarray())


def test_a_row_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = Tfidf._compute

    def compute(self: Tfidf, texts: Sequence[str]) -> object:
        seen.extend(texts)
        return real(self, texts)

    vocabulary = cached(tmp_path)
    monkeypatch.setattr(Tfidf, "_compute", compute)
    for texts in (TEXTS[:10] * 2, TEXTS[5:15], TEXTS):
        vocabulary.transform(texts)
        cached(tmp_path).transform(texts[::-1])
    assert sorted(seen) == sorted(set(TEXTS))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text("ab1_ .\u00e9\u00df\u0130\n'\u0301", max_size=30), max_size=8))
def test_terms_are_counted_as_one_by_one(texts: list[str]) -> None:
    fitted = fit([*texts, *texts[::2], "ab b1 ab b1", "ab b1 _a"], min_df=1)
    rows = fitted.transform([*texts, *STRANGE])
    for row, text in enumerate([*texts, *STRANGE]):
        known = Counter(term for term in _terms(text) if term in fitted.terms)
        assert [fitted.terms[column] for column in rows[row].indices] == sorted(known)
        weights = {
            term: (1 + np.log(count)) * float(fitted.idf[fitted.terms.index(term)]) for term, count in known.items()
        }
        length = np.sqrt(sum(weight**2 for weight in weights.values()))
        np.testing.assert_allclose(rows[row].data, [weights[term] / length for term in sorted(known)], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tfidf", "encoder+tfidf"])
def test_no_tick_but_the_one_that_encodes_computes_rows(tmp_path: Path, kind: str) -> None:
    workspace, truth = small_workspace(tmp_path, changes={"kind: encoder+tfidf": f"kind: {kind}"})
    layout, oracle = workspace.layout, SimulatedOracle()
    seen: list[list[str]] = []

    def run(name: str, action: Callable[[], object]) -> None:
        action()
        if name in ("encode", "score"):
            seen.append(sorted(path.name for path in layout.terms.glob("*/[!.]*")))

    tick(workspace, lambda: oracle, run=run)
    answer_all(oracle, truth)
    tick(workspace, lambda: oracle, run=run)
    assert seen[0] and [one == seen[0] for one in seen] == [True] * len(seen), seen


def test_another_engine_another_pool_or_another_vocabulary_shares_nothing(tmp_path: Path) -> None:
    cached(tmp_path).transform(TEXTS)
    with pytest.raises(AssertionError, match="were read"):
        TermCache(tmp_path, "another engine").vocabulary("a pool", refuse)
    with pytest.raises(AssertionError, match="were read"):
        TermCache(tmp_path, "an engine").vocabulary("another pool", refuse)
    other = TermCache(tmp_path, "an engine").vocabulary("another pool", lambda: TEXTS[:20])
    assert_same_rows(other, fit(TEXTS[:20]), TEXTS)


@pytest.mark.parametrize("damage", ["empty", "torn", "flipped"])
def test_what_is_damaged_is_computed_again(tmp_path: Path, damage: str) -> None:
    cached(tmp_path).transform(TEXTS)
    victims = [path for path in tmp_path.rglob("*.safetensors")]
    assert len(victims) == 2, "a vocabulary and a shard of rows"
    for victim in victims:
        data = bytearray(victim.read_bytes())
        data[-9] ^= 1
        victim.write_bytes({"empty": b"", "torn": bytes(data[:-7])}.get(damage, bytes(data)))
    assert_same_rows(cached(tmp_path), fit(TEXTS), TEXTS)


def test_old_vocabularies_and_their_rows_are_deleted(tmp_path: Path) -> None:
    for number in range(6):
        found = TermCache(tmp_path, "an engine").vocabulary(f"pool {number}", lambda n=number: TEXTS[: 20 + n])
        found.transform(TEXTS)
    assert len(list(tmp_path.glob("vocabulary-*"))) == len(list(tmp_path.glob("rows-*"))) == 3
    TermCache(tmp_path, "an engine").vocabulary("pool 5", refuse)


@given(st.lists(st.integers(min_value=0, max_value=1000), max_size=30))
def test_the_vocabulary_follows_the_pool_by_a_quarter(sizes: list[int]) -> None:
    parts = fitted_parts(sizes)
    fitted, total = sum(sizes[:parts]), sum(sizes)
    assert total < GROWTH * fitted or parts == len(sizes), "it lags behind by less than a quarter"
    assert fitted_parts(sizes[:parts]) == parts, "what it was fitted on is a state of the pool's own past"
    assert all(fitted_parts(sizes[:count]) <= fitted_parts(sizes[: count + 1]) for count in range(len(sizes)))


@pytest.mark.slow
def test_a_round_with_the_cache_has_the_bytes_of_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two grown pools, the rounds of one with its cache deleted before each stage."""
    workspace, truth = small_workspace(tmp_path)
    play(workspace, SimulatedOracle(), truth, 1)
    layout = workspace.layout
    extra = [Item(f"x{number}", content_hash(f"new text {number}"), f"new text {number}") for number in range(7)]
    write_items(layout.pool / "part-000002.parquet", [extra])
    write_engine(layout.engine)
    outputs = (layout.model, layout.scores, layout.histogram)

    def build(cold: bool) -> list[str]:
        for stage in (train, score):
            if cold:
                for path in sorted(layout.terms.rglob("*"), reverse=True):
                    path.unlink() if path.is_file() else path.rmdir()
            stage.main(layout)
        return [sha256_tree(path) for path in outputs]

    cold = build(cold=True)
    assert cold == build(cold=False) == build(cold=False)

    def read(*_: object) -> NoReturn:
        raise AssertionError("texts were read, although what is computed from them is cached")

    monkeypatch.setattr(train, "fetch", read)
    monkeypatch.setattr(pool._TextsOf, "read", read)
    assert cold == build(cold=False)
