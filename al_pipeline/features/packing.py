"""Texts of different lengths in one batch without padding, and the kernels that compute it on a CPU.

A packed batch is one row of a fixed number of tokens: its texts lie one after the other, and padding follows the last.
Everything but attention computes each token by itself, and attention is computed for each text at its own length.
Nothing else decides which kernels run, so that a text's states depend on neither the other texts nor its place.

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

import platform
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

POSITIONS_AFTER_PADDING = {"bert": False, "distilbert": False, "roberta": True, "xlm-roberta": True}
"""Transformers (`model_type`) in which only attention relates tokens, and all tokens of a text attend to each other.
Whether the first position is the number after the padding token's, else 0.
"""
_ATTENTION = "al_sdpa"
"""The name under which `_attend` is registered with transformers."""
_local = threading.local()


@dataclass(frozen=True)
class Layout:
    """Where texts of these lengths lie in a packed batch of `rows` tokens."""

    lengths: tuple[int, ...]
    rows: int
    positions: NDArray[np.int64] = field(init=False)
    """The position of each token in its text, (rows,); 0 for padding."""

    def __post_init__(self) -> None:
        positions = np.zeros(self.rows, np.int64)
        for start, end in self.spans():
            positions[start:end] = np.arange(end - start)
        object.__setattr__(self, "positions", positions)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Start and end of each text."""
        end = 0
        for length in self.lengths:
            yield end, (end := end + length)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Start, end and text length of each run of texts of equal length."""
        end = 0
        for length, texts in groupby(self.lengths):
            yield end, (end := end + length * len(list(texts))), length


def pack(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Divide texts, named by their place in `lengths`, into batches of at most `rows` tokens.

    The longest come first; what room they leave goes to the shortest. No text may be longer than `rows`.
    """
    texts = deque(sorted(range(len(lengths)), key=lambda text: -lengths[text]))
    while texts:
        batch: list[int] = []
        free = rows
        for end, take in ((0, texts.popleft), (-1, texts.pop)):
            while texts and lengths[texts[end]] <= free:
                batch.append(take())
                free -= lengths[batch[-1]]
        yield batch


@contextmanager
def packed(layout: Layout) -> Iterator[None]:
    """In this context and thread, transformers' batches are packed, with this layout."""
    _local.layout = layout
    try:
        yield
    finally:
        _local.layout = None


def current_layout() -> Layout | None:
    """The layout of the batch that this thread computes; None if it is not packed."""
    return getattr(_local, "layout", None)


def register_attention() -> str:
    """Register attention that knows packed batches with transformers, and return its name.

    In other batches it is transformers' SDPA attention with a mask in every batch: without padding in a batch,
    transformers omits the mask and torch chooses another kernel, so a text's vector would depend on the other texts.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(*args: Any, **options: Any) -> Any:
        if current_layout() is not None:
            return None
        return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, mask)
    return _ATTENTION


def _attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any) -> Any:
    """Attention of each text of a batch to itself: (1, heads, rows, width) to (1, rows, heads, width), and no weights.

    Texts of equal length share a call. torch computes each text and head of a call by itself, in blocks that the
    length decides.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout = current_layout()
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    parts = [part[0].transpose(0, 1) for part in (query, key, value)]
    found = parts[0].new_empty(parts[0].shape)
    heads, width = found.shape[1:]
    end = 0
    for start, end, length in layout.runs():
        texts = [part[start:end].view(-1, length, heads, width).transpose(1, 2) for part in parts]
        states = scaled_dot_product_attention(texts[0], texts[1], texts[2], scale=options.get("scaling"))
        found[start:end] = states.transpose(1, 2).flatten(0, 1)
    found[end:] = 0
    return found[None], None


def use_onednn(model: torch.nn.Module) -> None:
    """Compute linear layers without gradients by one call of oneDNN, on processors of the x86 family that support it.

    torch calls MKL in float32, which does not use AVX-512 on AMD's processors, and copies the bias first in bfloat16.
    """
    import torch

    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if type(module) is torch.nn.Linear and (
            module.weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    import torch

    if torch.is_grad_enabled():
        return torch.nn.functional.linear(states, module.weight, module.bias)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, module.weight, module.bias, "none", [], "")
    return found
