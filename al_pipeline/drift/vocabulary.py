"""New words: those in more texts of the window than its share of all texts explains."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from al_pipeline.drift.permutations import Floats, Permutations, p_value

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

LEAST_TEXTS = 3
"""Words in fewer texts are left out: no permutation test could find them."""
MOST_WORDS = 20_000
MOST_CHARACTERS = 10_000
"""Longer texts are truncated."""
LEVEL = 0.05

_WORD = re.compile(r"\b\w\w+\b")


@dataclass(frozen=True)
class NewWord:
    """A word that is more frequent in the window."""

    word: str
    window: int
    """Number of the window's texts that contain it."""
    reference: int
    p: float
    """Corrected for the number of words tested."""
    rows: tuple[int, ...]
    """The window's texts with it, by position among the window's, in order."""


@dataclass(frozen=True)
class VocabularyTest:
    """Whether a word is more frequent in the window, and which ones are."""

    p: float
    tested: int
    """Number of words tested."""
    words: tuple[NewWord, ...]
    """Words with p of at most 0.05, the most significant first."""


def vocabulary_test(texts: Sequence[str], permutations: Permutations) -> VocabularyTest:
    """Test the words of texts (n,), those of the reference first.

    The statistic of a word is the logarithm of its p-value in Fisher's exact test, one-sided; that of the test is the
    largest of all words, so the p-values are corrected for their number (Westfall and Young 1993).
    """
    words, counts = _occurrences(texts)
    if not words:
        return VocabularyTest(1.0, 0, ())
    member = permutations.member
    inside = np.rint(counts.T @ member.astype(np.float32)).astype(np.intp)
    totals = np.asarray(counts.sum(axis=0)).ravel().astype(np.intp)
    strength = _strengths(totals, inside, len(member), permutations.window)
    largest = strength.max(axis=0)
    order = np.argsort(-strength[:, 0], kind="stable")  # the words are sorted
    reference, found = len(member) - permutations.window, []
    columns = counts.tocsc()
    for place in order:
        p = float((largest >= strength[place, 0]).mean())
        if p > LEVEL:
            break
        rows = np.sort(columns.indices[columns.indptr[place] : columns.indptr[place + 1]])
        own = tuple(int(row) - reference for row in rows if row >= reference)
        found.append(NewWord(words[place], len(own), int(totals[place]) - len(own), p, own))
    return VocabularyTest(p_value(largest), len(words), tuple(found))


def _occurrences(texts: Sequence[str]) -> tuple[list[str], csr_matrix]:
    """The words tested, sorted, and which texts contain which, (n, v) of 0 and 1."""
    from scipy.sparse import csr_matrix

    of_texts = [set(_WORD.findall(text[:MOST_CHARACTERS].lower())) for text in texts]
    frequency = Counter(word for own in of_texts for word in own)
    common = sorted(((-count, word) for word, count in frequency.items() if count >= LEAST_TEXTS))
    words = sorted(word for _, word in common[:MOST_WORDS])
    place = {word: column for column, word in enumerate(words)}
    columns = [[place[word] for word in own if word in place] for own in of_texts]
    bounds = np.concatenate([[0], np.cumsum([len(own) for own in columns])])
    flat = np.array([column for own in columns for column in own], np.intp)
    return words, csr_matrix((np.ones(len(flat), np.float32), flat, bounds), (len(texts), len(words)))


def _strengths(totals: NDArray[np.intp], inside: NDArray[np.intp], size: int, window: int) -> Floats:
    """-log P(at least `inside` (v, 1 + B) of a word's `totals` (v,) texts are of the window), by chance."""
    different, place = np.unique(totals, return_inverse=True)
    starts = np.concatenate([[0], np.cumsum(different + 1)])
    table = np.concatenate([_tail(int(total), size, window) for total in different])
    found: Floats = table[starts[place][:, None] + inside]
    return found


def _tail(total: int, size: int, window: int) -> Floats:
    """-log P(K >= k) for k from 0 to `total`: K of `total` texts of `size` are among the `window`."""
    from scipy.special import gammaln

    k = np.arange(total + 1)
    possible = (k <= window) & (total - k <= size - window)
    inner, outer = np.where(possible, window - k, 0), np.where(possible, size - window - total + k, 0)
    logs = -(gammaln(k + 1) + gammaln(inner + 1) + gammaln(total - k + 1) + gammaln(outer + 1))
    logs = np.where(possible, logs, -np.inf)
    tail = np.logaddexp.accumulate(logs[::-1])[::-1]
    found: Floats = tail[0] - tail
    return found
