"""The device that encodes texts and fine-tunes: the CPU, or a GPU that torch can use.

A device is a string, which is recorded and compared: `cpu`, or the kind of GPU, its model, its software, and `bfloat16`
if it multiplies that, as in `cuda: NVIDIA H200, CUDA 13.0, bfloat16`.

Importing this module does not import torch, and neither does finding out that a machine without a driver has no GPU.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import TYPE_CHECKING

from al_pipeline.errors import BadParams, EngineChanged
from al_pipeline.params import DeviceName, Features
from al_pipeline.records import CPU

if TYPE_CHECKING:
    import torch

_GPUS: tuple[DeviceName, ...] = ("cuda", "mps")
"""The kinds of GPU, in the order in which `auto` prefers them."""
_CUDA_DRIVER = "libcuda.so.1"


def device_of(features: Features) -> str:
    """The device that computes with these features on this machine. Raises BadParams if there is no such device."""
    return find_device(features.device) if features.uses_encoder else CPU


def find_device(name: DeviceName) -> str:
    """The device of this machine that `features.device` names. Raises BadParams if there is none."""
    kinds = _GPUS if name == "auto" else (name,)
    found = next((gpu for kind in kinds if kind in _GPUS and (gpu := _gpu(kind))), CPU)
    if name in _GPUS and found == CPU:
        raise BadParams(
            f"features.device is {name}, and there is no such device here: {_missing(name)}. "
            "Or set it to auto or cpu in params.yaml"
        )
    return found


def device_like(recorded: str) -> str:
    """The device here for what was computed on `recorded`: the CPU for the CPU, else a GPU if there is one."""
    return CPU if recorded == CPU else find_device("auto")


def use_device(device: str) -> torch.device:
    """Prepare torch to compute on `device` with deterministic kernels, in the precision that was asked for.

    Call it before anything else computes on a GPU in this process. The CPU needs no preparation. Raises EngineChanged
    if this machine has another device.
    """
    import torch

    kind = device.partition(":")[0]
    if device == CPU:
        return torch.device(kind)
    # The size of cuBLAS's workspace decides which of its algorithms are possible, and some sizes are not deterministic.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    here = _gpu(kind) if kind in _GPUS else None
    if here != device:
        raise EngineChanged(
            f"engine.json records the device {device}, and this machine has {here or 'no such device'}; `al round` "
            "restarts the build with the device that is here"
        )
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")  # no TF32, in which float32 products have 10 bits of precision
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(kind)


@cache
def _gpu(kind: str) -> str | None:
    """This machine's GPU of a kind; None if torch finds none."""
    if not _is_possible(kind):
        return None
    import platform

    import torch

    if kind == "mps":
        return f"mps: Apple silicon, macOS {platform.mac_ver()[0]}" if torch.backends.mps.is_available() else None
    if not torch.cuda.is_available():
        return None
    half = ", bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    return f"cuda: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}{half}"


def _is_possible(kind: str) -> bool:
    """Whether a GPU of this kind may be here; where not, importing torch, which takes a second, is unnecessary."""
    if kind == "mps":
        return sys.platform == "darwin"
    import ctypes

    try:
        ctypes.CDLL(_CUDA_DRIVER)
    except OSError:
        return False
    return True


def _missing(kind: str) -> str:
    """Why there is no GPU of this kind, and how to get one."""
    if kind == "mps":
        return "it needs macOS on Apple silicon"
    if not _is_possible(kind):
        return f"NVIDIA's driver ({_CUDA_DRIVER}) is not installed; install it"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; https://pytorch.org/get-started has others"
    return "torch finds no GPU; `nvidia-smi` should show one, and CUDA_VISIBLE_DEVICES must not hide it"
