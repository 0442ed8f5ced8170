"""Rows of unit length for training with normalised columns of A; both in place and outside autograd."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastapd import _native
from fastapd.ops._op import call


def cpu_unit_norm(rows: Tensor) -> Tensor:
    native: Any = _native.load("_C").module
    run = native.unit_norm_float32 if rows.dtype == torch.float32 else native.unit_norm_float64
    d = rows.shape[-1]
    run(rows.data_ptr(), rows.numel() // max(d, 1), d, torch.get_num_threads())
    return rows


def cpu_remove_along(grad: Tensor, rows: Tensor) -> Tensor:
    native: Any = _native.load("_C").module
    run = native.remove_along_float32 if rows.dtype == torch.float32 else native.remove_along_float64
    d = rows.shape[-1]
    run(grad.data_ptr(), rows.data_ptr(), rows.numel() // max(d, 1), d, torch.get_num_threads())
    return grad


def _check_contiguous(op: str, **arguments: Tensor) -> None:
    for name, t in arguments.items():
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(t.stride())}")


def unit_norm(rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Divides every row by its length, in place; a row of zeros stays.

    Raises:
        ValueError: If rows are not contiguous.
    """
    _check_contiguous("unit_norm", rows=rows)
    with torch.no_grad():
        return call("unit_norm", rows)


def remove_along(grad: Float[Tensor, "... d"], rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """grad -= (grad . row) row for every row, in place; rows have unit length.

    Raises:
        ValueError: If shapes or dtypes differ or a tensor is not contiguous.
    """
    _check_contiguous("remove_along", grad=grad, rows=rows)
    if grad.shape != rows.shape or grad.dtype != rows.dtype:
        raise ValueError(
            f"remove_along: grad and rows must be alike, got {list(grad.shape)} {grad.dtype} and {list(rows.shape)} "
            f"{rows.dtype}"
        )
    with torch.no_grad():
        return call("remove_along", grad, rows)
