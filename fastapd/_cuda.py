"""Whether the CUDA kernels of `fastapd._C_cuda` run on a device, and how they are started: by name, on its stream.

Nothing is started before somebody asks: the first question about a device is answered by a kernel that does nothing.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from fastapd import _native

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def no_device() -> str:
    """Why no device can be used, in CUDA's words; empty if one can. The module is there."""
    module: Any = _native.load("_C_cuda").module
    return module.unavailable_reason() or ""


def is_emulated() -> bool:
    """Whether the module runs on the CPU and takes CPU tensors: tests load such a one in the place of the real one."""
    module: Any = _native.load("_C_cuda").module
    return module is not None and module.memory == "cpu"


def _stream(on: Tensor) -> int:
    return torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else 0


@functools.cache
def device_reasons(index: int) -> tuple[str, ...]:
    """Why kernels cannot run on a CUDA device, found out once by starting one there.

    Warns, once, where torch uses the card and this module cannot: it was built for other cards, say.
    """
    module: Any = _native.load("_C_cuda").module
    try:
        module.start_nothing(index, torch.cuda.current_stream(index).cuda_stream)
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(index)
        archs = ", ".join(f"sm_{a}" for a in _native.build_info().get("cuda_archs", []))
        reason = (
            f"fastapd._C_cuda, built for {archs}, runs no kernel on cuda:{index} of compute capability "
            f"{major}.{minor}: {error}"
        )
        warnings.warn(f"{reason}; falling back to the next backend", RuntimeWarning, stacklevel=2)
        return (reason,)
    return ()


def call(op: str, on: Tensor, *args: Any) -> None:
    """Starts the op's kernels for the dtype and on the device and current stream of the tensor `on`.

    Raises:
        RuntimeError: With the op's name and what CUDA says about the start.
    """
    module: Any = _native.load("_C_cuda").module
    getattr(module, f"{op}_{_NAMES[on.dtype]}")(on.device.index or 0, _stream(on), *args)


def partial_sums(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised memory for sums in what kernels compute in: float64 for float64, float32 for all else."""
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


@functools.cache
def card(index: int | None) -> tuple[int, int]:
    """How many multiprocessors a CUDA device has, and how many bytes of shared memory a block may have on it; an H200's
    for None."""
    if index is None:
        return 132, 227 << 10
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin
