"""Tests whether the encoder gives a text the same vector on this machine whatever shares its batch.

Processors choose their kernels by the shape of a product, and no library promises what they do. `Encoder` keeps every
shape the same; whether that is enough on a machine, in a precision, only running it there can tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.encoder import Encoder, Vectors, batch_rows

_LENGTHS = (16, 128)
"""Padded lengths that are tried, as far as the encoder looks at so many tokens."""


def find_dependence(encoder: Encoder, lengths: Sequence[int] = _LENGTHS) -> list[str]:
    """In what company a text got another vector than among others of its length; empty where it never did.

    Texts of each length are encoded together, alone, in part, in another order and on another number of threads, and
    the bytes compared. About a second for a small encoder, once it is loaded.
    """
    found = []
    for length in sorted({min(length, encoder.max_tokens) for length in lengths}):
        tokens = _tokens(encoder, length)
        expected = _on_threads(encoder, 1).encode_tokens(tokens)
        for company, rows, vectors in _companies(encoder, tokens):
            differs = (vectors.view(np.uint32) != expected[rows].view(np.uint32)).any(axis=1)
            if differs.any():
                most = float(np.abs(vectors - expected[rows]).max())
                found.append(f"{company}, {length} tokens: {differs.sum()} of {len(rows)} differ, by up to {most:.1g}")
    return found


def _companies(encoder: Encoder, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[str, NDArray[np.intp], Vectors]]:
    """How the texts are brought together, which of them, and what comes out."""
    one, two = _on_threads(encoder, 1), _on_threads(encoder, 2)
    everyone = np.arange(len(tokens))
    for company, rows, by in (
        ("in reverse order", everyone[::-1], two),
        ("in a batch not full", everyone[1 : 1 + max(1, batch_rows(len(tokens[0])) // 2)], one),
        ("alone", everyone[:1], one),
    ):
        yield company, rows, by.encode_tokens([tokens[row] for row in rows])


def _tokens(encoder: Encoder, length: int) -> list[list[int]]:
    """Texts that fill one batch and a part of the next; most have some padding, the first has none."""
    rng = np.random.default_rng(length)
    padded = encoder.padded_length(range(length))
    count = batch_rows(padded) + max(1, batch_rows(padded) // 4)
    shortest = max(1, padded - 15)
    sizes = [length, *rng.integers(shortest, length + 1, count - 2).tolist(), min(shortest, length)]
    return [rng.integers(0, encoder.vocabulary, size).tolist() for size in sizes]


def _on_threads(encoder: Encoder, threads: int) -> Encoder:
    """The same encoder, weights shared, on another number of threads."""
    other = copy(encoder)
    other.threads = threads
    return other
