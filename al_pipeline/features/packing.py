"""Texts of different lengths in one batch without padding, and the kernels that compute it on a CPU.

A packed batch is one row of a fixed number of tokens: its texts lie one after the other, and padding follows the last.
Everything but attention computes each token by itself, and attention is computed for each text at its own length.
Nothing else decides which kernels run, so that a text's states depend on neither the other texts nor its place.

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
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
_TOKENS_PER_CALL = 256
"""Approximate number of tokens whose attention is computed in one call, so that its scores stay in the CPU's cache."""
_LONGEST = 512
"""Texts of more tokens have their attention computed in blocks, since their scores would take too much memory."""
_LEAST = 4096
"""torch gives products with fewer multiplications to other kernels, counting all texts of a call."""
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

    Texts of equal length share calls; the length alone decides which kernels.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout = current_layout()
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    parts = [part[0].transpose(0, 1) for part in (query, key, value)]
    found = parts[0].new_empty(parts[0].shape)
    heads, width = found.shape[1:]
    fast = query.dtype == torch.bfloat16 and has_onednn(query.dtype)
    end = 0
    for first, end, length in layout.runs():
        by_products = fast and length <= _LONGEST and heads * length * length * width > _LEAST
        step = max(1, _TOKENS_PER_CALL // length) * length if by_products else end - first
        for start in range(first, end, step):
            some = slice(start, min(start + step, end))
            texts = [part[some].view(-1, length, heads, width).transpose(1, 2) for part in parts]
            states = (_products if by_products else _fused)(texts[0], texts[1], texts[2], options["scaling"])
            found[some].view(-1, length, heads, width).copy_(states.transpose(1, 2))
    found[end:] = 0
    return found[None], None


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """torch's attention, which computes each text and head by itself, in blocks that the length decides."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(query, key, value, scale=scale)


def _products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention by products of oneDNN, which takes half the time of the fused kernel in bfloat16."""
    import torch

    texts, heads, length, width = query.shape
    query, key, value = (part.reshape(texts * heads, length, width) for part in (query, key, value))
    scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scale)
    # torch is slow at rows of bfloat16 that are no multiple of its registers
    weights = scores.softmax(-1, None if length % 16 == 0 else torch.float32).to(query.dtype)
    return torch.bmm(weights, value).view(texts, heads, length, width)


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN, and it multiplies float32 or bfloat16 here."""
    import torch

    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not a part of torch's public interface
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def use_onednn(model: torch.nn.Module) -> None:
    """Compute linear layers without gradients by one call of oneDNN where it is fast.

    torch calls MKL in float32, which does not use AVX-512 on AMD's processors, and copies the bias first in bfloat16.
    """
    import torch

    for module in model.modules():
        if type(module) is torch.nn.Linear and has_onednn(module.weight.dtype):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    import torch

    if torch.is_grad_enabled():
        return torch.nn.functional.linear(states, module.weight, module.bias)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, module.weight, module.bias, "none", [], "")
    return found
