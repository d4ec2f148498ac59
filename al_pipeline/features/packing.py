"""Texts of different lengths in one batch without padding, and the layers that compute it on a CPU.

A packed batch is one row of a fixed number of tokens: its texts lie one after the other, and padding follows the last.
Everything but attention computes each token by itself, and attention is computed for each text, by kernels that its own
length decides. Nothing else decides them, so that a text's states depend on neither the other texts nor its place.

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.onednn import Product, has_onednn

if TYPE_CHECKING:
    import torch

POSITIONS_AFTER_PADDING = {"bert": False, "distilbert": False, "roberta": True, "xlm-roberta": True}
"""Transformers (`model_type`) in which only attention relates tokens, and all tokens of a text attend to each other.
Whether the first position is the number after the padding token's, else 0.
"""
_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer")
"""Classes of transformers that compute what `_layer` does, with the same names of their parts."""
_ATTENTION = "al_sdpa"
"""The name under which `_attend` is registered with transformers."""
_STEP = 16
"""Texts whose attention is computed by products are padded to a multiple of this many tokens, the registers' width."""
_SCORES_PER_CALL = 2**15
"""Approximate number of scores of a head that are computed in one call, so that they stay in the CPU's cache."""
_LONGEST = 512
"""Longer texts have their attention computed in blocks, since their scores would take too much memory."""
_LEAST = 4096
"""torch gives products with fewer multiplications to other kernels, counting all texts of a call."""
_local = threading.local()


class Call(NamedTuple):
    """Texts of one padded length whose attention is computed together."""

    start: int
    end: int
    length: int
    """Where the texts lie among the padded ones, and the padded length."""
    mask: NDArray[np.float32] | None
    """What is added to each head's scores, (texts, 1, length, length): 0, or -inf for padding; None without padding."""


class Padded(NamedTuple):
    """Texts of a packed batch padded for attention, those of equal padded length side by side."""

    taken: NDArray[np.int64]
    """The row of each padded token; for padding, that of the text's first token."""
    back: NDArray[np.int64]
    """The padded token of each row, (rows,); 0 where there is none."""
    calls: list[Call]


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

    @cached_property
    def padded(self) -> Padded:
        """The texts that are not too long for products, each padded to a multiple of 16 tokens."""
        spans: dict[int, list[tuple[int, int]]] = {}
        for start, end in self.spans():
            if end - start <= _LONGEST:
                spans.setdefault(-(-(end - start) // _STEP) * _STEP, []).append((start, end))
        taken, back = [np.empty(0, np.int64)], np.zeros(self.rows, np.int64)
        calls: list[Call] = []
        place = 0
        for length, texts in spans.items():
            some = max(1, _SCORES_PER_CALL // length**2)
            for first in range(0, len(texts), some):
                starts, ends = np.array(texts[first : first + some]).T[:, :, None]
                own = starts + np.arange(length)
                is_own = own < ends
                taken.append(np.where(is_own, own, starts).ravel())
                back[own[is_own]] = place + np.flatnonzero(is_own)
                mask = np.where(is_own, np.float32(0), np.float32(-np.inf))[:, None, None].repeat(length, 2)
                calls.append(Call(place, place := place + own.size, length, None if is_own.all() else mask))
        return Padded(np.concatenate(taken), back, calls)


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


def use_packed_layers(model: torch.nn.Module, made: Mapping[torch.nn.Module, Product], rows: int) -> None:
    """Compute the layers of BERT and RoBERTa in packed batches by fewer and larger calls, where oneDNN is fast.

    `made` are the products of the linear layers (`use_onednn`), whose arranged weights serve here too. `rows` is the
    usual number of tokens of a batch. In other batches, and with gradients, transformers computes them.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if type(module).__name__ not in _LAYERS:
            continue
        own = module.attention.self
        dense = (module.attention.output.dense, module.intermediate.dense, module.output.dense)
        if all(layer in made for layer in dense):
            products = [Product([own.query, own.key, own.value], rows), *(made[layer] for layer in dense)]
            module.forward = partial(_layer, module, module.forward, products)


def _layer(
    module: Any, usual: Callable[..., Any], products: Sequence[Product], states: Any, *more: Any, **named: Any
) -> Any:
    """What `usual`, the layer's own `forward`, computes."""
    import torch

    layout = current_layout()
    if layout is None or torch.is_grad_enabled():
        return usual(states, *more, **named)
    together, joined, widened, narrowed = products
    own, first, last = module.attention.self, module.attention.output, module.output
    parts = together(states)[0].view(layout.rows, 3, own.num_attention_heads, own.attention_head_size)
    found = attention(parts, layout, own.scaling).view(1, layout.rows, -1)
    states = first.LayerNorm(first.dropout(joined(found)) + states)
    found = _activated(module.intermediate.intermediate_act_fn, widened, states)
    return last.LayerNorm(last.dropout(narrowed(found)) + states)


def _activated(function: Any, product: Product, states: torch.Tensor) -> torch.Tensor:
    """The product, followed by an activation function."""
    from torch.nn.functional import gelu

    if getattr(function, "act", None) is gelu:
        return product(states, "gelu")
    found: torch.Tensor = function(product(states))
    return found


def _attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any) -> Any:
    """Attention in transformers' form: (batch, heads, rows, width) to (batch, rows, heads, width), and no weights."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout = current_layout()
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    states = torch.stack([part[0].transpose(0, 1) for part in (query, key, value)], 1)
    return attention(states, layout, options["scaling"])[None], None


def attention(states: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """Attention of each text of a packed batch to itself; zero for padding.

    `states` are queries, keys and values, (rows, 3, heads, width); the result is (rows, heads, width). A text's own
    length alone decides which kernels compute it, and texts share calls.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    _, _, heads, width = states.shape
    fast = states.dtype == torch.bfloat16 and has_onednn(states.dtype) and heads * _STEP**2 * width > _LEAST
    if fast and layout.padded.calls:
        found = _by_products(states, layout.padded, scale)
    else:
        found = states.new_empty((len(states), heads, width))
    for start, end, length in layout.runs():
        if (
            not fast or length > _LONGEST
        ):  # torch computes each text and head by itself, in blocks that the length decides
            query, key, value = states[start:end].view(-1, length, 3, heads, width).permute(2, 0, 3, 1, 4)
            texts = scaled_dot_product_attention(query, key, value, scale=scale)
            found[start:end].view(-1, length, heads, width).copy_(texts.transpose(1, 2))
    found[sum(layout.lengths) :] = 0
    return found


def _by_products(states: torch.Tensor, padded: Padded, scale: float) -> torch.Tensor:
    """By products of oneDNN at padded lengths, which take half the time of torch's attention in bfloat16."""
    import torch

    _, _, heads, width = states.shape
    states = states.index_select(0, torch.from_numpy(padded.taken))
    found = states.new_empty((len(states), heads, width))
    for start, end, length, mask in padded.calls:
        own = states[start:end].view(-1, length, 3, heads, width).permute(2, 0, 3, 1, 4)
        query, key, value = own.reshape(3, -1, length, width)
        scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scale)
        if mask is not None:
            scores.view(-1, heads, length, length).add_(torch.from_numpy(mask).to(scores.dtype))
        # in float32, since torch is slow at rows of bfloat16 that are no multiple of 32
        weights = scores.softmax(-1, torch.float32).to(scores.dtype)
        texts = torch.bmm(weights, value).view(-1, heads, length, width)
        found[start:end].view(-1, length, heads, width).copy_(texts.transpose(1, 2))
    return found.index_select(0, torch.from_numpy(padded.back))
