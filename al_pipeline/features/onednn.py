"""Linear layers by oneDNN, with weights in the order that its kernels read, and GELU in the same call.

Modules, weights and what hooks them stay transformers' own; only the `forward` of some is replaced, for batches without
gradients.

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 64 * 2**20
_LARGEST_KEPT = 32 * 2**20


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN, and it multiplies float32 or bfloat16 here."""
    import torch

    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")):
        return False  # they are not a part of torch's public interface
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def use_onednn(model: torch.nn.Module, rows: int) -> dict[torch.nn.Module, Product]:
    """Compute linear layers without gradients by one call of oneDNN where it is fast; the product of each such layer.

    torch calls MKL in float32, which does not use AVX-512 on AMD's processors, and copies the bias first in bfloat16.
    `rows`: the number of rows of most batches, for which the weights are arranged.
    """
    import torch

    products: dict[torch.nn.Module, Product] = {}
    for module in model.modules():
        if type(module) is torch.nn.Linear and has_onednn(module.weight.dtype):
            products[module] = Product([module], rows)
            module.forward = partial(_linear, module, products[module])  # type: ignore[method-assign]
    return products


def _linear(module: torch.nn.Linear, product: Product, states: torch.Tensor) -> torch.Tensor:
    import torch

    if torch.is_grad_enabled():
        return torch.nn.functional.linear(states, module.weight, module.bias)
    return product(states)


class Product:
    """One or several linear layers of the same input as one product; their outputs lie side by side.

    It keeps the weights as oneDNN arranges them, and arranges them again after they have changed.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear], rows: int) -> None:
        self._layers, self._rows = layers, rows
        self._made: tuple[Any, ...] = ([], [], None, None)

    def __call__(self, states: torch.Tensor, then: str = "none") -> torch.Tensor:
        """The outputs for `states`, (..., inputs), followed by the function `then`: "none" or "gelu"."""
        import torch

        weight, bias = self._arranged()
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, then, [], "none")
        return found

    def _arranged(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        import torch

        parts = [part for layer in self._layers for part in (layer.weight, layer.bias) if part is not None]
        now = [(id(part), part._version) for part in parts]
        known, _, weight, bias = self._made  # the parts are kept, so that no other tensor gets their ids
        if known != now:
            whole = torch.cat([layer.weight.detach() for layer in self._layers])
            weight = torch.ops.mkldnn._reorder_linear_weight(whole, self._rows)
            biases = [layer.bias.detach() for layer in self._layers if layer.bias is not None]
            bias = torch.cat(biases) if biases else None
            self._made = now, parts, weight, bias
        return weight, bias


def keep_memory() -> None:
    """Let the C library keep memory that was freed, up to 64 MiB a thread, for the next batch.

    Otherwise glibc returns it to the system after each operation, which then has to be given it again, page by page:
    a tenth of the time of a batch. Other C libraries are left as they are.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
