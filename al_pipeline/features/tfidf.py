"""TF-IDF of word 1-grams and 2-grams with sublinear term frequency and rows of unit length.

tf = 1 + ln(count), idf = 1 + ln((1 + n) / (1 + df)), as in scikit-learn's TfidfVectorizer (a test compares the two),
without its import time.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import BadInput
from al_pipeline.files import json_line, read_json, write_bytes, write_text
from al_pipeline.records import composed
from al_pipeline.threads import one_thread

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

TERMS_FILE = "tfidf.json"
IDF_FILE = "tfidf.safetensors"
FORMAT = "al-tfidf/1"

_WORD = re.compile(r"\b\w\w+\b")
_RUN = re.compile(r"\w+")
_BLANKED = {code: " " for code in range(128) if not re.match(r"\w", chr(code))}
"""Characters of ASCII that are in no word, for `str.translate`."""
MAX_CHARACTERS = 10_000
"""Longer texts are truncated."""
_COMPONENTS = 128
_LSA_TEXTS = 2000
"""Number of texts from which the components are computed; the cost is cubic, about a second here."""
_MIN_VARIANCE = 1e-6
"""A component with less variance, relative to the largest, is rounding error."""


class Rows(Protocol):
    """A cache of rows, see `terms`."""

    def of(self, texts: Sequence[str], width: int, compute: Callable[[Sequence[str]], csr_matrix]) -> csr_matrix:
        """The rows of `texts`, (n, width), in order; `compute` returns those not cached yet."""
        ...

    def ensure(self, texts: Sequence[str], compute: Callable[[Sequence[str]], csr_matrix]) -> None:
        """Store the rows of `texts` that are not cached yet."""
        ...

    def remember_written(self) -> None:
        """Spare the next process a check of what this one wrote."""
        ...


@dataclass(frozen=True)
class Tfidf:
    """A fitted vocabulary: its sorted terms and their inverse document frequencies (v,)."""

    terms: tuple[str, ...]
    idf: NDArray[np.float32]
    components: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """The `lsa_components` of the fit's texts. Not saved: the weights of a fitted head contain them."""

    rows: Rows | None = field(default=None, compare=False, repr=False)
    """The cache of rows, if there is one."""

    @cached_property
    def _lookup(self) -> _Lookup:
        return _Lookup.of(self.terms)

    def transform(self, texts: Sequence[str]) -> csr_matrix:
        """TF-IDF rows of unit length, (n, v) float32; a text without a known term gives a row of zeros."""
        return self._compute(texts) if self.rows is None else self.rows.of(texts, len(self.terms), self._compute)

    def prepare(self, texts: Sequence[str]) -> None:
        """Fill the cache of rows for `texts`, if there is one."""
        if self.rows is not None:
            self.rows.ensure(texts, self._compute)

    def remember_written(self) -> None:
        """Spare the next process a check of the cached rows that this one wrote."""
        if self.rows is not None:
            self.rows.remember_written()

    def _compute(self, texts: Sequence[str]) -> csr_matrix:
        from scipy.sparse import csr_matrix

        rows, columns, counts = self._lookup.count(texts)
        weights = (1 + np.log(counts.astype(np.float64))) * self.idf.astype(np.float64)[columns]
        norms = np.sqrt(np.bincount(rows, weights * weights, len(texts)))
        weights /= norms[rows]
        bounds = np.searchsorted(rows, np.arange(len(texts) + 1))
        return csr_matrix((weights.astype(np.float32), columns, bounds), (len(texts), len(self.terms)))

    def save(self, folder: Path) -> None:
        """Write `tfidf.json` and `tfidf.safetensors`; equal vocabularies give equal bytes."""
        from safetensors.numpy import save

        write_text(folder / TERMS_FILE, json_line({"format": FORMAT, "terms": list(self.terms)}))
        write_bytes(folder / IDF_FILE, save({"idf": self.idf}))


@dataclass(frozen=True)
class _Lookup:
    """The columns of terms, for many texts at once: words as numbers, pairs of neighbouring words as one number.

    It takes a third of the time of looking up each term as text.
    """

    words: dict[str, int]
    """The number of each word that occurs in a term."""
    columns: NDArray[np.int32]
    """The column of each word (w,); -1 for one that is no term by itself."""
    pairs: NDArray[np.int64]
    """Each pair of words as `first * w + second`, (p,), in increasing order."""
    pair_columns: NDArray[np.int32]
    """The column of each pair, (p,)."""

    @classmethod
    def of(cls, terms: Sequence[str]) -> _Lookup:
        """The lookup of these terms, whose columns are their positions."""
        parts = [term.split(" ") for term in terms]
        words = {word: number for number, word in enumerate(dict.fromkeys(chain.from_iterable(parts)))}
        columns = np.full(len(words) + 1, -1, np.int32)  # the last one is that of all unknown words
        pairs, places = [], []
        for column, found in enumerate(parts):
            if len(found) == 1:
                columns[words[found[0]]] = column
            else:
                pairs.append(words[found[0]] * len(words) + words[found[1]])
                places.append(column)
        order = np.argsort(np.array(pairs, np.int64))
        return cls(words, columns, np.array(pairs, np.int64)[order], np.array(places, np.int32)[order])

    def count(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """How often each text has each term: texts, columns and counts, (m,) each, in order of text and column."""
        found = [_runs(text) for text in texts]
        words = list(chain.from_iterable(found))
        rows = np.repeat(np.arange(len(texts)), np.fromiter(map(len, found), np.int64, len(found)))
        numbers = np.fromiter(map(self.words.get, words, repeat(-1)), np.int64, len(words))
        is_word = np.fromiter(map(len, words), np.int64, len(words)) > 1
        rows, numbers = rows[is_word], numbers[is_word]
        single = self.columns[numbers]
        is_single = single >= 0
        first, second = numbers[:-1], numbers[1:]
        is_pair = (first >= 0) & (second >= 0) & (rows[:-1] == rows[1:])
        keys = first[is_pair] * len(self.words) + second[is_pair]
        at = np.searchsorted(self.pairs, keys)
        at[at == len(self.pairs)] = 0
        known = self.pairs[at] == keys if len(self.pairs) else np.zeros(len(keys), np.bool_)
        width = max(1, len(self.columns) + len(self.pairs))
        places = np.concatenate(
            [
                rows[is_single] * width + single[is_single],
                rows[:-1][is_pair][known] * width + self.pair_columns[at[known]],
            ]
        )
        terms, counts = np.unique(places, return_counts=True)
        return terms // width, (terms % width).astype(np.int32), counts


def load_tfidf(folder: Path) -> Tfidf:
    """Load what `Tfidf.save` wrote. Raises BadInput if it is damaged or of another format."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    card = read_json(folder / TERMS_FILE)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise BadInput(f"{folder / TERMS_FILE} is not a vocabulary that this engine reads ({FORMAT})")
    try:
        idf = load((folder / IDF_FILE).read_bytes())["idf"]
    except (OSError, SafetensorError, KeyError) as error:
        raise BadInput(f"{folder / IDF_FILE} cannot be read: {error}") from error
    if idf.shape != (len(card["terms"]),):
        raise BadInput(f"{folder} has {len(card['terms'])} terms, but document frequencies of shape {idf.shape}")
    return Tfidf(tuple(card["terms"]), idf)


def fit(texts: Iterable[str], max_terms: int = 50_000, sample: int = 10_000, min_df: int = 2) -> Tfidf:
    """The vocabulary of a bounded sample of `texts`: the most frequent terms among those in at least `min_df` texts.

    The sample holds the texts with the smallest hashes, so that it depends on neither order nor seed, and a growing
    pool changes it little. Ties in frequency go to the term that sorts first.
    """
    chosen = _sample(texts, sample)
    frequency: Counter[str] = Counter()
    for text in chosen:
        frequency.update(set(_terms(text)))
    common = ((term, count) for term, count in frequency.items() if count >= min_df)
    kept = sorted(heapq.nsmallest(max_terms, common, key=lambda pair: (-pair[1], pair[0])))
    counts = np.array([count for _, count in kept], np.float64)
    idf = 1 + np.log((1 + len(chosen)) / (1 + counts))
    fitted = Tfidf(tuple(term for term, _ in kept), idf.astype(np.float32))
    return replace(fitted, components=lsa_components(fitted.transform(chosen[:_LSA_TEXTS])))


def lsa_components(rows: csr_matrix) -> NDArray[np.float32] | None:
    """The principal directions of the texts in term space, (v, k); None if there are too few texts.

    Latent semantic analysis (Deerwester et al. 1990). `rows` (n, v) are texts without labels. Terms that occur in the
    same texts share components, so a label is informative about terms that no labelled text has. Scaled so that the
    texts' mean square length in them is 1. None if the texts have no terms.
    """
    from scipy.linalg import eigh

    count = rows.shape[0]
    with one_thread():  # with more threads the order of summation would differ
        likeness = (rows @ rows.T).toarray().astype(np.float64)
        if not likeness.any():
            return None
        spread, turn = eigh(likeness, subset_by_index=(max(0, count - _COMPONENTS), count - 1))
        strong = spread > _MIN_VARIANCE * spread[-1]
        spread, turn = spread[strong], turn[:, strong]
        # Unit directions are rows^T turn / sqrt(spread), and in them the texts have the square lengths of `spread`.
        found = np.asarray(rows.T @ (turn / np.sqrt(spread))) * np.sqrt(count / spread.sum())
    return np.ascontiguousarray(found, np.float32)


def _sample(texts: Iterable[str], size: int) -> list[str]:
    """The `size` distinct texts with the smallest hashes; no more are held in memory."""
    kept: dict[int, str] = {}
    largest: list[int] = []
    for text in texts:
        text = text[:MAX_CHARACTERS]
        key = int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        if key in kept or (len(kept) == size and key > -largest[0]):
            continue
        kept[key] = text
        heapq.heappush(largest, -key)
        if len(kept) > size:
            del kept[-heapq.heappop(largest)]
    return [kept[key] for key in sorted(kept)]


def _terms(text: str) -> list[str]:
    """Lower-case words of at least two characters, and all pairs of neighbouring words."""
    words = _words(text)
    return words + [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]


def _words(text: str) -> list[str]:
    return _WORD.findall(_read_part(text).lower())


def _runs(text: str) -> list[str]:
    """The words of `_words`, in order, and perhaps some of a single character; faster for ASCII text."""
    text = _read_part(text).lower()
    return text.translate(_BLANKED).split() if text.isascii() else _RUN.findall(text)


def _read_part(text: str) -> str:
    """What is read of a text: it depends on the content hash alone, by which rows are cached."""
    return composed(text).strip()[:MAX_CHARACTERS]
