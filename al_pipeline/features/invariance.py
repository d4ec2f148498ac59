"""Test whether a text's vector depends on the other texts of its batch on this machine.

Libraries choose kernels by the shape of a product and by the processor, and guarantee nothing. `Encoder` keeps all
shapes the same, but only a run can show whether that suffices on a machine and at a precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.encoder import Encoder, Vectors

_LENGTHS = (16, 128)
"""Padded lengths to test, limited by the encoder's `max_tokens`."""


def find_dependence(encoder: Encoder, lengths: Sequence[int] = _LENGTHS) -> list[str]:
    """Descriptions of the batches in which a text's vector differs; empty if there are none.

    Texts of each length are encoded together, alone, in part, in another order and with another number of threads, and
    the bytes are compared. Takes about a second for a small encoder that is already loaded.
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
    all_rows = np.arange(len(tokens))
    for batching, rows, by in (
        ("in reverse order", all_rows[::-1], two),
        ("in a batch not full", all_rows[1 : 1 + max(1, encoder.batch_rows(len(tokens[0])) // 2)], one),
        ("alone", all_rows[:1], one),
    ):
        yield batching, rows, by.encode_tokens([tokens[row] for row in rows])


def _tokens(encoder: Encoder, length: int) -> list[list[int]]:
    """Random texts that fill one batch and part of the next; most have some padding, the first has none."""
    rng = np.random.default_rng(length)
    padded = encoder.padded_length(range(length))
    count = encoder.batch_rows(padded) + max(1, encoder.batch_rows(padded) // 4)
    shortest = max(1, padded - 15)
    sizes = [length, *rng.integers(shortest, length + 1, count - 2).tolist(), min(shortest, length)]
    return [rng.integers(0, encoder.vocabulary, size).tolist() for size in sizes]


def _on_threads(encoder: Encoder, threads: int) -> Encoder:
    """The same encoder, with shared weights, at another number of threads."""
    other = copy(encoder)
    other.threads = threads
    return other
