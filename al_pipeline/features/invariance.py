"""Test whether a text's vector depends on the other texts of its batch on this machine.

Libraries choose kernels by the shape of a product and by the processor, and guarantee nothing. `Encoder` lets a text's
own length alone decide the shapes, but only a run can show whether that suffices on a machine and at a precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from al_pipeline.features.encoder import Encoder, Vectors

_LENGTHS = (16, 128)
"""Lengths to test, limited by the encoder's `max_tokens`."""


def find_dependence(encoder: Encoder, lengths: Sequence[int] = _LENGTHS) -> list[str]:
    """Descriptions of the batches in which a text's vector differs; empty if there are none.

    Texts of each length are encoded together, alone, in part, among texts of all lengths, in another order and with
    another number of threads, and the bytes are compared. Takes about a second for a small encoder that is already
    loaded.
    """
    found = []
    for length in sorted({min(length, encoder.max_tokens) for length in lengths}):
        tokens = _tokens(encoder, length)
        expected = _on_threads(encoder, 1).encode_tokens(tokens)
        for batching, rows, vectors in _batchings(encoder, tokens):
            differs = (vectors.view(np.uint32) != expected[rows].view(np.uint32)).any(axis=1)
            if differs.any():
                most = float(np.abs(vectors - expected[rows]).max())
                found.append(f"{batching}, {length} tokens: {differs.sum()} of {len(rows)} differ, by up to {most:.1g}")
    return found


def _batchings(encoder: Encoder, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[str, NDArray[np.intp], Vectors]]:
    """Different ways to batch the texts: a description, the rows of the texts, and their vectors."""
    one, two = _on_threads(encoder, 1), _on_threads(encoder, 2)
    rng = np.random.default_rng(0)
    others = [_text(encoder, size, rng) for size in range(1, encoder.max_tokens + 1, max(1, encoder.max_tokens // 16))]
    all_rows = np.arange(len(tokens))
    half = max(1, encoder.batch_texts(len(tokens[0])) // 2)
    for batching, rows, company, by in (
        ("in reverse order", all_rows[::-1], [], two),
        ("in a batch not full", all_rows[1 : 1 + half], [], one),
        ("among other lengths", all_rows[: 2 * half], others, two),
        ("alone", all_rows[:1], [], one),
    ):
        yield batching, rows, by.encode_tokens([*(tokens[row] for row in rows), *company])[: len(rows)]


def _tokens(encoder: Encoder, length: int) -> list[list[int]]:
    """Random texts that fill one batch and part of the next; the first is the longest, most are a little shorter."""
    rng = np.random.default_rng(length)
    count = encoder.batch_texts(length) + max(1, encoder.batch_texts(length) // 4)
    shortest = max(1, length - 15)
    return [
        _text(encoder, size, rng)
        for size in [length, *rng.integers(shortest, length + 1, count - 2).tolist(), shortest]
    ]


def _text(encoder: Encoder, length: int, rng: Generator) -> list[int]:
    found: list[int] = rng.integers(0, encoder.vocabulary, length).tolist()
    return found


def _on_threads(encoder: Encoder, threads: int) -> Encoder:
    """The same encoder, with shared weights, at another number of threads."""
    other = copy(encoder)
    other.threads = threads
    return other
