"""Texts of items that are read only when one is needed: what caches hold of them is found by content hash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from al_pipeline.records import content_hash


class ItemTexts(Sequence[str]):
    """The texts of items, in order; `read` returns them, and is called for the first that is needed.

    `hashes`: their content hashes.
    """

    def __init__(self, hashes: Sequence[str], read: Callable[[], Sequence[str]]) -> None:
        self.hashes = hashes
        self._read = read
        self._texts: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.hashes)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...

    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if self._texts is None:
            self._texts = self._read()
            if len(self._texts) != len(self.hashes):
                raise ValueError(f"{len(self._texts)} texts for {len(self.hashes)} content hashes")
        return self._texts[place]

    def some(self, rows: Sequence[int]) -> ItemTexts:
        """Those of some rows."""
        return ItemTexts([self.hashes[row] for row in rows], lambda: [self[row] for row in rows])


def content_hashes(texts: Sequence[str]) -> Sequence[str]:
    """The content hash of each text, (n,); those of items are not computed again."""
    return texts.hashes if isinstance(texts, ItemTexts) else [content_hash(text) for text in texts]
