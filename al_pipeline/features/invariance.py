"""Test whether a text's vector depends on the other texts of its batch on this machine.

Libraries choose kernels by the shape of a product and by the processor, and guarantee nothing. `Encoder` lets a text's
own length alone decide the shapes, but only a run can show whether that suffices on a machine and at a precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.encoder import Encoder, Vectors

_LENGTHS = (16, 128)
"""Lengths to test, limited by the encoder's `max_tokens`."""


def find_dependence(encoder: Encoder, lengths: Sequence[int] = _LENGTHS) -> list[str]:
    """Descriptions of the batches in which a text's vector differs; empty if there are none.

    Texts of each length, and texts of lengths from 1 to the longest, are encoded together, alone, in part, in another
    order, among other texts and with another number of threads, and the bytes are compared. Takes about two seconds for
    a small encoder that is already loaded.
    """
    longest = encoder.max_tokens
    sizes = [size for size in range(1, longest + 1, max(1, longest // 8)) for _ in range(2)]
    mixed = _texts(encoder, sizes)
    groups = {f"{length} tokens": _tokens(encoder, length) for length in sorted({min(n, longest) for n in lengths})}
    found = []
    for name, tokens in {**groups, f"1 to {longest} tokens": mixed}.items():
        expected = _on_threads(encoder, 1).encode_tokens(tokens)
        for batching, rows, vectors in _batchings(encoder, tokens, mixed):
            differs = (vectors.view(np.uint32) != expected[rows].view(np.uint32)).any(axis=1)
            if differs.any():
                most = float(np.abs(vectors - expected[rows]).max())
                found.append(f"{batching}, {name}: {differs.sum()} of {len(rows)} differ, by up to {most:.1g}")
    return found


def _batchings(
    encoder: Encoder, tokens: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> Iterator[tuple[str, NDArray[np.intp], Vectors]]:
    """Different ways to batch the texts: a description, the rows of the texts, and their vectors."""
    one, two = _on_threads(encoder, 1), _on_threads(encoder, 2)
    rows = np.arange(len(tokens))
    for batching, some, company, by in (
        ("in reverse order", rows[::-1], [], two),
        ("in a batch not full", rows[1 : 2 + encoder.batch_texts(len(tokens[0])) // 2], [], one),
        ("among others", rows[::3], others, two),
        ("alone", rows[:1], [], one),
        ("alone", rows[-1:], [], one),
    ):
        yield batching, some, by.encode_tokens([*(tokens[row] for row in some), *company])[: len(some)]


def _tokens(encoder: Encoder, length: int) -> list[list[int]]:
    """Random texts that fill one batch and part of the next; the first is the longest, most are a little shorter."""
    count = encoder.batch_texts(length) + max(1, encoder.batch_texts(length) // 4)
    shortest = max(1, length - 15)
    sizes = np.random.default_rng(length).integers(shortest, length + 1, count - 2).tolist()
    return _texts(encoder, [length, *sizes, shortest])


def _texts(encoder: Encoder, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(0, encoder.vocabulary, length).tolist() for length in lengths]


def _on_threads(encoder: Encoder, threads: int) -> Encoder:
    """The same encoder, with shared weights, at another number of threads."""
    other = copy(encoder)
    other.threads = threads
    return other
