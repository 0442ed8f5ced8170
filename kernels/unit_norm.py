"""Rows of unit length, and gradients without their part along a row, on a GPU; both in place.

A program owns BLOCK_ROWS rows, whole, and walks them BLOCK_D numbers at a time: for the largest magnitude, by which a
row of any scale is divided before it is squared, for the length, and to write. Rows that fit into one step stay in the
cache. Sums are in float32. Reads and writes are all that counts: there is no size at which anything else is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from fastapd.kernels._launch import annotated, block, cdiv, launch
from torch import Tensor


def _flops(args: Mapping[str, Any]) -> tuple[float, float]:
    n = args["n_rows"] * args["d"]
    return 4.0 * n, 2.0 * n * args["rows_ptr"].element_size()


@triton.jit(launch_metadata=annotated(_flops))
def _unit_norm_kernel(
    rows_ptr,  # [rows, d], contiguous
    n_rows,
    d,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < n_rows
    largest = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    n_nan = tl.zeros((BLOCK_ROWS,), dtype=tl.int32)
    for start in range(0, d, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_d < d)[None, :]
        x = tl.load(rows_ptr + o_row[:, None] * d + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        n_nan += tl.sum((x != x).to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(tl.where(x == x, tl.abs(x), 0.0), 1))
    usable = (largest > 0) & (largest < float("inf")) & (n_nan == 0)
    scale = tl.where(usable, largest, 1.0)
    square = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_d < d)[None, :]
        x = tl.load(rows_ptr + o_row[:, None] * d + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], (BLOCK_ROWS, BLOCK_D)))
        square += tl.sum(x * x, 1)
    norm = tl.sqrt_rn(square)
    norm = tl.where(norm > 0, norm, 1.0)  # a row of zeros stays, and so does one with a NaN
    for start in range(0, d, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_d < d)[None, :]
        p = rows_ptr + o_row[:, None] * d + o_d[None, :]
        x = tl.load(p, mask=mask, other=0.0).to(tl.float32)
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], (BLOCK_ROWS, BLOCK_D)))
        x = tl.div_rn(x, tl.broadcast_to(norm[:, None], (BLOCK_ROWS, BLOCK_D)))
        tl.store(p, x.to(rows_ptr.dtype.element_ty), mask=mask)


def _along_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    n = args["n_rows"] * args["d"]
    return 4.0 * n, 3.0 * n * args["rows_ptr"].element_size()


@triton.jit(launch_metadata=annotated(_along_flops))
def _remove_along_kernel(
    grad_ptr,  # [rows, d], contiguous
    rows_ptr,  # [rows, d], contiguous
    n_rows,
    d,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < n_rows
    along = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_d < d)[None, :]
        o = o_row[:, None] * d + o_d[None, :]
        g = tl.load(grad_ptr + o, mask=mask, other=0.0).to(tl.float32)
        along += tl.sum(g * tl.load(rows_ptr + o, mask=mask, other=0.0).to(tl.float32), 1)
    for start in range(0, d, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_d < d)[None, :]
        o = o_row[:, None] * d + o_d[None, :]
        g = tl.load(grad_ptr + o, mask=mask, other=0.0).to(tl.float32)
        g -= along[:, None] * tl.load(rows_ptr + o, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptr + o, g.to(grad_ptr.dtype.element_ty), mask=mask)


def row_config(d: int) -> dict[str, int]:
    """1024 numbers at a time, 8 a thread. Without `maxnreg` some ptxas spill, for more warps at once."""
    block_d = block(d, 16, 1024)
    return {"BLOCK_ROWS": 1024 // block_d, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 1, "maxnreg": 255}


def _run(op: str, kernel: Any, tensors: tuple[Tensor, ...]) -> None:
    d = tensors[0].shape[-1]
    n_rows = tensors[0].numel() // max(d, 1)
    config = row_config(d)
    launch(op, kernel, cdiv(n_rows, config["BLOCK_ROWS"]), tensors[0], *tensors, n_rows, d, **config)


def unit_norm(rows: Tensor) -> None:
    """Divides every row [.., d] by its length, in place."""
    _run("unit_norm", _unit_norm_kernel, (rows,))


def remove_along(grad: Tensor, rows: Tensor) -> None:
    """grad -= (grad . row) row for every row, in place."""
    _run("remove_along", _remove_along_kernel, (grad, rows))
