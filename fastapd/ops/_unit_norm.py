"""Rows of unit length for training with normalised columns of A; both in place and outside autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd import _cuda, _native
from fastapd.ops import _check
from fastapd.ops._op import define

if TYPE_CHECKING:
    from jaxtyping import Float


def cpu_unit_norm(rows: Tensor) -> None:
    native: Any = _native.load("_C").module
    run = native.unit_norm_float32 if rows.dtype == torch.float32 else native.unit_norm_float64
    d = rows.shape[-1]
    run(rows.data_ptr(), rows.numel() // max(d, 1), d, torch.get_num_threads())
    torch.autograd.graph.increment_version(rows)  # which torch's own in-place operations do


def cpu_remove_along(grad: Tensor, rows: Tensor) -> None:
    native: Any = _native.load("_C").module
    run = native.remove_along_float32 if rows.dtype == torch.float32 else native.remove_along_float64
    d = rows.shape[-1]
    run(grad.data_ptr(), rows.data_ptr(), rows.numel() // max(d, 1), d, torch.get_num_threads())
    torch.autograd.graph.increment_version(grad)


def cuda_unit_norm(rows: Tensor) -> None:
    d = rows.shape[-1]
    _cuda.call("unit_norm", rows, rows.data_ptr(), rows.numel() // max(d, 1), d)


def cuda_remove_along(grad: Tensor, rows: Tensor) -> None:
    d = rows.shape[-1]
    _cuda.call("remove_along", grad, grad.data_ptr(), rows.data_ptr(), rows.numel() // max(d, 1), d)


def _check_rows(op: str, **arguments: Tensor) -> None:
    _check.tensors(op, **arguments)
    shapes = [t.shape for t in arguments.values()]
    if shapes[0] != shapes[-1] or not shapes[0]:
        got = " and ".join(_check.shape(t) for t in arguments.values())
        raise ValueError(f"{op}: {' and '.join(arguments)} must have one shape [.., d], got {got}")
    for name, t in arguments.items():
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(t.stride())}")


def _norm_fake(rows: Tensor) -> None:
    _check_rows("unit_norm", rows=rows)


def _along_fake(grad: Tensor, rows: Tensor) -> None:
    _check_rows("remove_along", grad=grad, rows=rows)


_unit_norm = define("unit_norm", "(Tensor(a!) rows) -> ()", _norm_fake)
_remove_along = define("remove_along", "(Tensor(a!) grad, Tensor rows) -> ()", _along_fake)


def unit_norm(rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Divides every row by its length, in place, outside autograd; a row of zeros stays.

    Raises:
        ValueError: If rows are not contiguous.
        TypeError: If the dtype is not floating.
    """
    _check_rows("unit_norm", rows=rows)
    with torch.no_grad():
        _unit_norm(rows)
    return rows


def remove_along(grad: Float[Tensor, "... d"], rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """grad -= (grad . row) row for every row, in place, outside autograd; rows have unit length.

    Raises:
        ValueError: If shapes or devices differ or a tensor is not contiguous.
        TypeError: If dtypes differ or are not floating.
    """
    _check_rows("remove_along", grad=grad, rows=rows)
    with torch.no_grad():
        _remove_along(grad, rows)
    return grad
