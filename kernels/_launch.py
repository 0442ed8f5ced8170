"""How every kernel is started: its grid, its card's capability, the precision of its products. Nothing here computes.

Configurations are data: every kernel's file has a pure function of shapes, dtype and capability that returns block
sizes, warps and stages. Nothing is timed at run time, so that the same call takes the same kernel in every process.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from fastapd._precision import precision

ASSUMED_CAPABILITY = (9, 0)
"""Of what is no card: the interpreter, or a compilation for one that is not there."""


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability(t: Tensor) -> tuple[int, int]:
    """The compute capability of the card that a tensor is on."""
    return _capability(t.device.index) if t.is_cuda else ASSUMED_CAPABILITY


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(t: Tensor) -> int:
    """How many multiprocessors the card has that a tensor is on: 132 for what is no card."""
    return _processors(t.device.index) if t.is_cuda else 132


def dot_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of products of such numbers: float16 and bfloat16 lose nothing in tf32."""
    chosen = precision()
    return chosen if dtype == torch.float32 or chosen == "ieee" else "tf32"


def block(n: int, least: int = 16, most: int = 128) -> int:
    """The power of two that holds n, within limits."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def launch(op: str, kernel: Any, n_programs: int, on: Tensor, *args: Any, **config: Any) -> None:
    """Starts a kernel of so many programs, in one row, on the current stream of the card that `on` is on.

    Args:
        op: For messages.
        kernel: The kernel.
        n_programs: None are started for 0.
        on: Any tensor of the call.
        args: Of the kernel, in order.
        config: Constants of the kernel, warps and stages.

    Raises:
        ValueError: If there are more programs than a grid holds.
        RuntimeError: If the kernel cannot be compiled for this card.
    """
    if n_programs == 0:
        return
    if n_programs >= 2**31:
        raise ValueError(f"{op}: the problem must fit into 2**31 - 1 programs, got {n_programs}; split the batch")
    try:
        with torch.cuda.device_of(on):
            kernel[(n_programs,)](*args, **config, enable_fp_fusion=True)  # explicit, as its default changes
    except (CompilationError, OutOfResources, PTXASError) as error:
        major, minor = capability(on)
        said = str(error).strip().splitlines()
        what = said[-1 if isinstance(error, CompilationError) else 0]  # the source comes first, then what is wrong
        raise RuntimeError(
            f"{op}: the Triton kernel {kernel.__name__} cannot be built for compute capability {major}.{minor}, "
            f"got {type(error).__name__}: {what}; use fastapd.use_backend('reference')"
        ) from error


def annotated(formula: Any) -> Any:
    """For `triton.jit(launch_metadata=...)`: names a launch for profilers, with its flops and bytes.

    Args:
        formula: Of the arguments of a launch by name, (flops, bytes).
    """

    def metadata(grid: Any, kernel: Any, args: Mapping[str, Any]) -> dict[str, Any]:
        flops, n_bytes = formula(args)
        return {"name": kernel.name, "flops32": flops, "bytes": n_bytes}

    return metadata


@triton.jit
def _nothing_kernel():
    pass


def start_nothing(index: int) -> None:
    """Compiles a kernel that does nothing and starts it on a device; raises whatever is wrong."""
    kernel: Any = _nothing_kernel
    with torch.cuda.device(index):
        kernel[(1,)](enable_fp_fusion=True)
