"""Schatten sums from the lengths of columns, S_cm = |a_cm|^2 |b_cm|^2, with their gradients: no row knows another.

    factored   with counts: lengths, powers and gradients of BLOCK_ROWS rows of one instance, in one program
    norms      with a mask: squared lengths; a program owns BLOCK_ROWS rows
    powers     a program owns BLOCK_BATCH samples' powers of BLOCK_COMPONENTS components, with the gradient of their
               mask and their share in that of S
    spread     the gradients of the factors, from all shares; a program owns BLOCK_ROWS rows

Lengths, powers and sums are accumulated in float64. No program adds to what another writes: each leaves its part of the
sum, which one program an instance adds in order. It is the sum over singular values only where columns of A and rows
of B are orthogonal, or there is one of each: else `_svd_core` has that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from fastapd.kernels._float64 import _float64, _power, _slope, _unused_term
from fastapd.kernels._launch import annotated

# ----------------------------------------------------------------------------------------------------------------- rows


@triton.jit
def _rows_of(tile, rank, BLOCK_ROWS: tl.constexpr):
    """The rows [C * m] of a tile, their components and their places there; one division is in 64 bits."""
    first = tile.to(tl.int64) * BLOCK_ROWS
    c = first // rank
    within = (first - c * rank).to(tl.int32) + tl.arange(0, BLOCK_ROWS)
    return first + tl.arange(0, BLOCK_ROWS), c + within // rank, (within % rank).to(tl.int64)


@triton.jit
def _row_norms(p_rows, m_r, d, stride_d, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The squared lengths of rows, in float64."""
    acc = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float64)
    for start in range(0, d, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        m_f = m_r[:, None] & (o_d < d)[None, :]
        b_f = _float64(tl.load(p_rows[:, None] + o_d[None, :] * stride_d, mask=m_f, other=0.0))
        acc += b_f * b_f
    return tl.sum(acc, 1)


@triton.jit
def _scale_rows(
    p_rows, grad_ptr, o_r, weight, m_read, m_write, d, stride_d,
    ACCUMULATE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows o_r of a gradient [.., d]: weight times the rows where they are read, zero elsewhere; or added to it."""
    for start in range(0, d, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = (o_d < d)[None, :]
        b_f = tl.load(p_rows[:, None] + o_d[None, :] * stride_d, mask=m_read[:, None] & m_d, other=0.0)
        b_grad = weight[:, None] * _float64(b_f)
        p_grad, m_grad = grad_ptr + o_r[:, None] * d + o_d[None, :], m_write[:, None] & m_d
        if ACCUMULATE:
            b_grad += _float64(tl.load(p_grad, mask=m_grad, other=0.0))
        tl.store(p_grad, b_grad.to(tl.float32).to(grad_ptr.dtype.element_ty), mask=m_grad)


# ---------------------------------------------------------------------------------------------------------- with counts


def _rows_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    """The factors are read for their lengths and, with gradients, once more."""
    n = args["n_instances"] * args["n_rows"] * (args["d_in"] + args["d_out"])
    passes = (1, 2, 3)[args["HAS_GRAD"] + args["ACCUMULATE"]]
    return 2.0 * passes * n, float(passes * n * args["at_ptr"].element_size())


@triton.jit(launch_metadata=annotated(_rows_flops))
def _factored_schatten_kernel(
    at_ptr,  # [I, C, m, d_in]
    b_ptr,  # [I, C, m, d_out]
    counts_ptr,  # [I, C], integers
    partial_ptr,  # [I, tiles], float64: each program's part of the sum
    grad_at_ptr,  # [I, C, m, d_in], contiguous; anything if not HAS_GRAD, as the next
    grad_b_ptr,  # [I, C, m, d_out], contiguous
    n_instances,
    n_rows,  # C * m
    rank,
    d_in,
    d_out,
    n_tiles,
    stride_at_i,
    stride_at_c,
    stride_at_m,
    stride_at_d,
    stride_b_i,
    stride_b_c,
    stride_b_m,
    stride_b_d,
    stride_n_i,
    stride_n_c,
    p: tl.float64,
    eps: tl.float64,
    batch: tl.int64,
    scale: tl.float64,
    HAS_GRAD: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p, eps = tl.full((), p, tl.float64), tl.full((), eps, tl.float64)
    pid = tl.program_id(0)
    instance = (pid // n_tiles).to(tl.int64)
    o_r, o_c, o_m = _rows_of(pid % n_tiles, rank, BLOCK_ROWS)
    m_r = o_r < n_rows
    count = tl.load(counts_ptr + instance * stride_n_i + o_c * stride_n_c, mask=m_r, other=0).to(tl.int64)
    used = m_r & (count != 0)
    weight = count.to(tl.float64)
    p_a = at_ptr + instance * stride_at_i + o_c * stride_at_c + o_m * stride_at_m
    p_b = b_ptr + instance * stride_b_i + o_c * stride_b_c + o_m * stride_b_m
    norm_a = _row_norms(p_a, used, d_in, stride_at_d, BLOCK_ROWS, BLOCK_D)
    norm_b = _row_norms(p_b, used, d_out, stride_b_d, BLOCK_ROWS, BLOCK_D)
    base = norm_a * norm_b + eps
    value = _power(base, p * 0.5)
    term = tl.where(used, weight * value, 0.0) + tl.where(m_r, _unused_term(count, batch, p, eps), 0.0)
    tl.store(partial_ptr + pid, tl.sum(term, 0))
    if HAS_GRAD:
        slope = 2.0 * (weight * scale) * _slope(base, value, p)
        m_w = used if ACCUMULATE else m_r
        o_r += instance * n_rows
        to_a, to_b = tl.where(used, slope * norm_b, 0.0), tl.where(used, slope * norm_a, 0.0)
        _scale_rows(p_a, grad_at_ptr, o_r, to_a, used, m_w, d_in, stride_at_d, ACCUMULATE, BLOCK_D)
        _scale_rows(p_b, grad_b_ptr, o_r, to_b, used, m_w, d_out, stride_b_d, ACCUMULATE, BLOCK_D)


# ---------------------------------------------------------------------------------------------------------- with a mask


def _norms_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    n = args["n_instances"] * args["n_rows"] * (args["d_in"] + args["d_out"])
    return 2.0 * n, float(n * args["at_ptr"].element_size())


@triton.jit(launch_metadata=annotated(_norms_flops))
def _norms_kernel(
    at_ptr,  # [I, C, m, d_in]
    b_ptr,  # [I, C, m, d_out]
    norms_ptr,  # [2, I, C * m], float64: squared lengths of the rows of At, and of B
    n_instances,
    n_rows,
    rank,
    d_in,
    d_out,
    n_tiles,
    stride_at_i,
    stride_at_c,
    stride_at_m,
    stride_at_d,
    stride_b_i,
    stride_b_c,
    stride_b_m,
    stride_b_d,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    instance = (pid // n_tiles).to(tl.int64)
    o_r, o_c, o_m = _rows_of(pid % n_tiles, rank, BLOCK_ROWS)
    m_r = o_r < n_rows
    p_a = at_ptr + instance * stride_at_i + o_c * stride_at_c + o_m * stride_at_m
    p_b = b_ptr + instance * stride_b_i + o_c * stride_b_c + o_m * stride_b_m
    p_norms = norms_ptr + instance * n_rows + o_r
    tl.store(p_norms, _row_norms(p_a, m_r, d_in, stride_at_d, BLOCK_ROWS, BLOCK_D), mask=m_r)
    p_norms += (tl.zeros((), tl.int64) + n_instances) * n_rows
    tl.store(p_norms, _row_norms(p_b, m_r, d_out, stride_b_d, BLOCK_ROWS, BLOCK_D), mask=m_r)


def _powers_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    """A power and its slope for each sample and row, in about 60 operations; the mask is read, its gradient written."""
    n = args["n_instances"] * args["batch"] * args["n_components"]
    return 60.0 * n * args["rank"], float((1 + args["HAS_GRAD"]) * n * args["mask_ptr"].element_size())


@triton.jit(launch_metadata=annotated(_powers_flops))
def _powers_schatten_kernel(
    norms_ptr,  # [2, I, C * m], float64
    mask_ptr,  # [I, b, C]
    grad_mask_ptr,  # [I, b, C], contiguous; anything if not HAS_GRAD, as the next
    to_s_ptr,  # [I, batch tiles, C, m], float64: each program's share in the gradient of S
    partial_ptr,  # [I, batch tiles, component tiles], float64: each program's part of the sum
    n_instances,
    batch,
    n_components,
    rank,
    n_batch_tiles,
    n_component_tiles,
    stride_m_i,
    stride_m_b,
    stride_m_c,
    p: tl.float64,
    eps: tl.float64,
    HAS_GRAD: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_COMPONENTS: tl.constexpr,
):
    p, eps = tl.full((), p, tl.float64), tl.full((), eps, tl.float64)
    pid = tl.program_id(0)
    tile_b = pid // n_component_tiles  # of [I, batch tiles]
    instance = (tile_b // n_batch_tiles).to(tl.int64)
    o_b = (tile_b % n_batch_tiles).to(tl.int64) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    o_c = (pid % n_component_tiles).to(tl.int64) * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
    m_b, m_c = o_b < batch, o_c < n_components
    m_bc = m_b[:, None] & m_c[None, :]
    p_mask = mask_ptr + instance * stride_m_i + o_b[:, None] * stride_m_b + o_c[None, :] * stride_m_c
    b_mask = _float64(tl.load(p_mask, mask=m_bc, other=0.0))
    total = tl.zeros((BLOCK_BATCH, BLOCK_COMPONENTS), dtype=tl.float64)
    to_mask = tl.zeros((BLOCK_BATCH, BLOCK_COMPONENTS), dtype=tl.float64)
    n_all = (tl.zeros((), tl.int64) + n_instances) * n_components * rank
    for k in range(0, rank):
        p_norms = norms_ptr + (instance * n_components + o_c) * rank + k
        S = tl.load(p_norms, mask=m_c, other=0.0) * tl.load(p_norms + n_all, mask=m_c, other=0.0)
        base = b_mask * S[None, :] + eps
        value = _power(base, p * 0.5)
        total += value
        if HAS_GRAD:
            slope = _slope(base, value, p)
            to_mask += S[None, :] * slope
            to_s = tl.sum(tl.where(m_bc, b_mask * slope, 0.0), 0)
            p_s = to_s_ptr + (tile_b.to(tl.int64) * n_components + o_c) * rank + k
            tl.store(p_s, to_s, mask=m_c)
    tl.store(partial_ptr + pid, tl.sum(tl.sum(tl.where(m_bc, total, 0.0), 1), 0))
    if HAS_GRAD:
        p_grad = grad_mask_ptr + (instance * batch + o_b[:, None]) * n_components + o_c[None, :]
        tl.store(p_grad, to_mask.to(tl.float32).to(grad_mask_ptr.dtype.element_ty), mask=m_bc)


def _spread_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    n = args["n_instances"] * args["n_rows"]
    moved = 2 * (args["d_in"] + args["d_out"]) * args["at_ptr"].element_size() + 8 * args["n_batch_tiles"]
    return float(n * (args["d_in"] + args["d_out"])), float(n * moved)


@triton.jit(launch_metadata=annotated(_spread_flops))
def _spread_schatten_kernel(
    at_ptr,  # [I, C, m, d_in]
    b_ptr,  # [I, C, m, d_out]
    norms_ptr,  # [2, I, C * m], float64
    to_s_ptr,  # [I, batch tiles, C * m], float64
    grad_at_ptr,  # [I, C, m, d_in], contiguous
    grad_b_ptr,  # [I, C, m, d_out], contiguous
    n_instances,
    n_rows,
    rank,
    d_in,
    d_out,
    n_tiles,
    n_batch_tiles,
    stride_at_i,
    stride_at_c,
    stride_at_m,
    stride_at_d,
    stride_b_i,
    stride_b_c,
    stride_b_m,
    stride_b_d,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    instance = (pid // n_tiles).to(tl.int64)
    o_r, o_c, o_m = _rows_of(pid % n_tiles, rank, BLOCK_ROWS)
    m_r = o_r < n_rows
    to_s = tl.zeros((BLOCK_ROWS,), dtype=tl.float64)
    for tile in range(0, n_batch_tiles):
        to_s += tl.load(to_s_ptr + (instance * n_batch_tiles + tile) * n_rows + o_r, mask=m_r, other=0.0)
    p_a = at_ptr + instance * stride_at_i + o_c * stride_at_c + o_m * stride_at_m
    p_b = b_ptr + instance * stride_b_i + o_c * stride_b_c + o_m * stride_b_m
    o_r += instance * n_rows
    norm_a = tl.load(norms_ptr + o_r, mask=m_r, other=0.0)
    norm_b = tl.load(norms_ptr + (tl.zeros((), tl.int64) + n_instances) * n_rows + o_r, mask=m_r, other=0.0)
    _scale_rows(p_a, grad_at_ptr, o_r, 2.0 * to_s * norm_b, m_r, m_r, d_in, stride_at_d, False, BLOCK_D)
    _scale_rows(p_b, grad_b_ptr, o_r, 2.0 * to_s * norm_a, m_r, m_r, d_out, stride_b_d, False, BLOCK_D)
