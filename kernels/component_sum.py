"""W = sum over components of A_c B_c on a GPU, and how far W is from a target: one GEMM over the concatenated ranks.

    sum      W = At^T B, or the residual W - W* and the sum of its squares in the same pass
    squares  the sum of the squares of a residual that is already there

A sum program owns one [BLOCK_IN, BLOCK_OUT] tile of W, walks the K = C * rank rows of At [K, d_in] and B [K, d_out] and
accumulates in float32; with a target it turns the tile into the residual and leaves the sum of its squares, one number
a program, which one more program an instance adds up in order. A squares program owns BLOCK numbers.

The tile kernel is the right one for toy models, where a launch costs more than what it does. Beyond SMALL the library's
GEMM, which divides the walk over K among programs, writes the residual itself (beta = -1), and ours is what follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from fastapd.kernels import _launch
from fastapd.kernels._launch import annotated, block, cdiv, dot_precision, launch
from torch import Tensor

SMALL = {"entries": 1 << 14, "ranks": 1 << 10}
"""Entries of W and concatenated ranks up to which the tile kernel is taken."""


def _sum_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    n, k, d_in, d_out = args["n_instances"], args["n_rows"], args["d_in"], args["d_out"]
    written = 2 if args["HAS_TARGET"] else 1
    size = args["w_ptr"].element_size()
    return 2.0 * n * k * d_in * d_out, float(n * (k * (d_in + d_out) + written * d_in * d_out) * size)


@triton.jit(launch_metadata=annotated(_sum_flops))
def _sum_kernel(
    at_ptr,  # [I, K, d_in]
    b_ptr,  # [I, K, d_out]
    target_ptr,  # [I, d_in, d_out]
    w_ptr,  # [I, d_in, d_out], contiguous: W, or the residual
    partial_ptr,  # [I, tiles], float32: sums of squares
    n_instances,
    n_rows,
    d_in,
    d_out,
    n_in_tiles,
    n_out_tiles,
    stride_at_i,
    stride_at_k,
    stride_at_in,
    stride_b_i,
    stride_b_k,
    stride_b_out,
    stride_t_i,
    stride_t_in,
    stride_t_out,
    HAS_TARGET: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    o_out = (pid % n_out_tiles).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    o_in = (pid // n_out_tiles % n_in_tiles).to(tl.int64) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    instance = (pid // n_out_tiles // n_in_tiles).to(tl.int64)
    m_in, m_out = o_in < d_in, o_out < d_out
    acc = tl.zeros((BLOCK_IN, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, n_rows, BLOCK_RANK):
        o_k = start + tl.arange(0, BLOCK_RANK).to(tl.int64)
        m_k = o_k < n_rows
        p_at = at_ptr + instance * stride_at_i + o_k[None, :] * stride_at_k + o_in[:, None] * stride_at_in
        p_b = b_ptr + instance * stride_b_i + o_k[:, None] * stride_b_k + o_out[None, :] * stride_b_out
        b_at = tl.load(p_at, mask=m_in[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        b_b = tl.load(p_b, mask=m_k[:, None] & m_out[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(b_at, b_b, acc, input_precision=PRECISION)
    m_w = m_in[:, None] & m_out[None, :]
    if HAS_TARGET:
        p_t = target_ptr + instance * stride_t_i + o_in[:, None] * stride_t_in + o_out[None, :] * stride_t_out
        acc -= tl.load(p_t, mask=m_w, other=0.0).to(tl.float32)
        squares = tl.where(m_w, acc * acc, 0.0)  # beyond the edges a NaN of A or B would count
        tl.store(partial_ptr + pid, tl.sum(tl.sum(squares, 1), 0))
    tl.store(w_ptr + (instance * d_in + o_in[:, None]) * d_out + o_out[None, :], acc.to(w_ptr.dtype.element_ty), m_w)


def _square_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    n = args["n_instances"] * args["size"]
    return 2.0 * n, float(n * args["x_ptr"].element_size())


@triton.jit(launch_metadata=annotated(_square_flops))
def _square_kernel(
    x_ptr,  # [I, size], contiguous
    partial_ptr,  # [I, tiles], float32
    n_instances,
    size,
    n_tiles,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    instance = (pid // n_tiles).to(tl.int64)
    o = (pid % n_tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + instance * size + o, mask=o < size, other=0.0).to(tl.float32)
    tl.store(partial_ptr + pid, tl.sum(x * x, 0))


def _add_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    n = args["n_instances"] * args["n_partials"]
    return float(n), 4.0 * n


@triton.jit(launch_metadata=annotated(_add_flops))
def _add_kernel(
    partial_ptr,  # [I, partials], float32, contiguous
    total_ptr,  # [I]
    n_instances,
    n_partials,
    BLOCK: tl.constexpr,
):
    instance = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n_partials, BLOCK):
        o = start + tl.arange(0, BLOCK)
        acc += tl.load(partial_ptr + instance * n_partials + o, mask=o < n_partials, other=0.0)
    tl.store(total_ptr + instance, tl.sum(acc, 0).to(total_ptr.dtype.element_ty))


def sum_config(d_in: int, d_out: int, capability: tuple[int, int]) -> dict[str, int]:
    return {
        "BLOCK_IN": block(d_in, 16, 32),
        "BLOCK_OUT": block(d_out, 16, 32),
        "BLOCK_RANK": 64,
        "num_warps": 4,
        "num_stages": 3,
    }


def add_partials(op: str, partial: Tensor, total: Tensor) -> None:
    """total [I] = partial [I, n] summed in order."""
    n_instances, n = partial.shape
    config = {"BLOCK": block(n, 16, 1024), "num_warps": 4, "num_stages": 1}
    launch(op, _add_kernel, n_instances, partial, partial, total, n_instances, n, **config)


def _flat(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """At [I, C m, d_in] and B [I, C m, d_out]: views in the house layout."""
    n_instances, n_components, d_in, rank = A.shape
    rows = n_components * rank
    return A.mT.reshape(n_instances, rows, d_in), B.reshape(n_instances, rows, B.shape[3])


def _is_small(At: Tensor, B: Tensor) -> bool:
    return At.shape[2] * B.shape[2] <= SMALL["entries"] and At.shape[1] <= SMALL["ranks"]


def preferred(A: Tensor, B: Tensor, target: Tensor) -> str:
    """Why this kernel goes before one that needs the library's GEMM first, at the sizes where it does."""
    ranks = A.shape[1] * A.shape[3]
    small = target.shape[1] * target.shape[2] <= SMALL["entries"] and ranks <= SMALL["ranks"]
    return "small: the product and the residual are one launch" if small else ""


def _sum(op: str, At: Tensor, B: Tensor, target: Tensor | None, w: Tensor, total: Tensor | None) -> None:
    n_instances, n_rows, d_in = At.shape
    d_out = B.shape[2]
    config = sum_config(d_in, d_out, _launch.capability(At))
    n_in, n_out = cdiv(d_in, config["BLOCK_IN"]), cdiv(d_out, config["BLOCK_OUT"])
    several = n_in * n_out != 1
    partial = total
    if total is not None and (several or total.dtype != torch.float32):
        partial = total.new_empty(n_instances, n_in * n_out, dtype=torch.float32)
    goal = w if target is None else target
    launch(
        op, _sum_kernel, n_instances * n_in * n_out, At,
        At, B, goal, w, w if partial is None else partial, n_instances, n_rows, d_in, d_out, n_in, n_out,
        *At.stride(), *B.stride(), *goal.stride(),
        HAS_TARGET=target is not None, PRECISION=dot_precision(At.dtype), **config,
    )  # fmt: skip
    if total is not None and partial is not None and partial is not total:
        add_partials(op, partial, total)


def component_sum(A: Tensor, B: Tensor) -> Tensor:
    """W [I, d_in, d_out] for A [I, C, d_in, m] and B [I, C, m, d_out]."""
    At, flat_B = _flat(A, B)
    if not _is_small(At, flat_B):
        return torch.bmm(At.mT, flat_B)
    w = A.new_empty(A.shape[0], A.shape[2], B.shape[3])
    _sum("component_sum", At, flat_B, None, w, None)
    return w


SQUARES = 4096
"""Numbers whose squares one program adds."""


def component_sum_loss(A: Tensor, B: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`(sum_io (W - target)^2 [I], W - target)`."""
    op = "component_sum_loss"
    At, flat_B = _flat(A, B)
    loss = A.new_empty(A.shape[0])
    if _is_small(At, flat_B):
        residual = A.new_empty(target.shape)
        _sum(op, At, flat_B, target, residual, loss)
        return loss, residual
    residual = torch.baddbmm(target, At.mT, flat_B, beta=-1).contiguous()
    size = residual.shape[1] * residual.shape[2]
    n_tiles = cdiv(size, SQUARES)
    partial = A.new_empty(A.shape[0], n_tiles, dtype=torch.float32)
    launch(
        op, _square_kernel, A.shape[0] * n_tiles, residual, residual, partial, A.shape[0], size, n_tiles,
        BLOCK=SQUARES, num_warps=4, num_stages=1,
    )  # fmt: skip
    add_partials(op, partial, loss)
    return loss, residual
