"""The Gram matrices of a component's factors and their triangular factors, in twice float64's precision.

    gram       G_A = A^T A and G_B = B B^T; a program owns a [BLOCK_RANK, BLOCK_RANK] tile of one component's G_A and
               the same of its G_B
    factor     G = R^T R; a program owns MATRICES of them, in registers

The product of two float32 numbers is exact in float64, so only sums round, and two numbers hold each: a Gram matrix
squares the condition number, and in float64 alone the second of two equal columns would leave a pivot of about 1e-16
and with it a singular value, about 1e-9 to 1e-8 of the largest, that is not there.

Tiles of `factor` are [row, matrix, column], so that a thread holds whole columns of small matrices and sums over rows
need no other thread, as long as there is a column for each thread of a block. It is right up to `MOST_RANK` of
`batched_svd`, where a matrix fills the registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from fastapd.kernels._float64 import _power_of_two
from fastapd.kernels._launch import annotated

# ------------------------------------------------------------------------------------------------------------ the Grams


@triton.jit
def _gram_tile(
    f_ptr, out_ptr, o_i, o_j, mirrored, rank, d, stride_m, stride_d,
    RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Entries o_i, o_j of f f^T [RANK, RANK], and o_j, o_i if mirrored, to out: rounded, then what rounding lost."""
    high = tl.full((BLOCK_RANK, BLOCK_RANK, BLOCK_D), 0.0, tl.float64)
    low = high
    m_i, m_j = o_i < rank, o_j < rank
    for start in range(0, d, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = (o_d < d)[None, None, :]
        p_d = f_ptr + o_d[None, None, :] * stride_d
        b_i = tl.load(p_d + o_i[:, None, None] * stride_m, mask=m_i[:, None, None] & m_d, other=0.0)
        b_j = tl.load(p_d + o_j[None, :, None] * stride_m, mask=m_j[None, :, None] & m_d, other=0.0)
        term = b_i.to(tl.float32).to(tl.float64) * b_j.to(tl.float32).to(tl.float64)
        before = high
        high = before + term
        part = high - before
        low += (before - (high - part)) + (term - part)
    # Rounded to multiples of one unit, numbers add up without error in any order; so do the rests to those of another.
    unit = _power_of_two(tl.max(tl.abs(high), 2, keep_dims=True)) * (4 * BLOCK_D)
    first = (high + unit) - unit
    rest = high - first
    unit *= 4.0 * BLOCK_D / 2**53
    second = (rest + unit) - unit
    low = tl.sum((rest - second) + low, 2)
    large, small = tl.sum(first, 2), tl.sum(second, 2)
    high = large + small
    low += small - (high - large)  # exact, as large is a multiple of the unit of small
    total = high + low
    low -= total - high
    p_out = out_ptr + o_i[:, None] * RANK + o_j[None, :]
    tl.store(p_out, total)
    tl.store(p_out + RANK * RANK, low)
    if mirrored:
        p_out = out_ptr + o_j[None, :] * RANK + o_i[:, None]
        tl.store(p_out, total)
        tl.store(p_out + RANK * RANK, low)


def _gram_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    """A product and an addition in seven operations for each pair of rows and column."""
    n, rank, d = args["n_groups"], args["rank"], args["d_in"] + args["d_out"]
    return 8.0 * n * rank * rank * d, float(n * (rank * d * args["at_ptr"].element_size() + 32 * rank * rank))


@triton.jit(launch_metadata=annotated(_gram_flops))
def _gram_svd_kernel(
    at_ptr,  # [I, C, m, d_in]
    b_ptr,  # [I, C, m, d_out]
    counts_ptr,  # [I, C], integers; anything if not HAS_COUNTS
    gram_ptr,  # [I, C, 2, 2, RANK, RANK], float64: by factor, rounded entries and what rounding lost
    n_groups,  # I * C
    n_components,
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
    HAS_COUNTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    g = (pid // n_tiles).to(tl.int64)
    instance, c = g // n_components, g % n_components
    count = tl.full((), 1, tl.int64)
    if HAS_COUNTS:
        count = tl.load(counts_ptr + instance * stride_n_i + c * stride_n_c).to(tl.int64)
    if count != 0:
        tile = pid % n_tiles  # of those on and above the diagonal, by columns; at most 4 columns
        column = (tile >= 1).to(tl.int64) + (tile >= 3).to(tl.int64) + (tile >= 6).to(tl.int64)
        row = tile - column * (column + 1) // 2
        o_i, o_j = row * BLOCK_RANK + tl.arange(0, BLOCK_RANK), column * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        mirrored = row != column
        out_ptr = gram_ptr + g * (4 * RANK * RANK)
        f_ptr = at_ptr + instance * stride_at_i + c * stride_at_c
        _gram_tile(f_ptr, out_ptr, o_i, o_j, mirrored, rank, d_in, stride_at_m, stride_at_d, RANK, BLOCK_RANK, BLOCK_D)
        f_ptr, out_ptr = b_ptr + instance * stride_b_i + c * stride_b_c, out_ptr + 2 * RANK * RANK
        _gram_tile(f_ptr, out_ptr, o_i, o_j, mirrored, rank, d_out, stride_b_m, stride_b_d, RANK, BLOCK_RANK, BLOCK_D)


# --------------------------------------------------------------------------------------------------- triangular factors


def _factor_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    n, m = args["n_matrices"], args["M"]
    return 27.0 * n * m**3, 24.0 * n * m * m


@triton.jit(launch_metadata=annotated(_factor_flops))
def _factor_svd_kernel(
    gram_ptr,  # [I, C, 2, 2, M, M], float64
    counts_ptr,  # [I, C], integers; anything if not HAS_COUNTS
    upper_ptr,  # [I, C, 2, M, M], float64: R_A and R_B, zero for unused components, NaN for what is not finite
    n_matrices,  # 2 I C
    n_components,
    stride_n_i,
    stride_n_c,
    HAS_COUNTS: tl.constexpr,
    M: tl.constexpr,
    MATRICES: tl.constexpr,
):
    """G = R^T R in twice float64's precision.

    What is left of a column below 1e-15 of its length is rounding: it adds no direction, and a row of R is zero. What
    the rounding of a product loses is exact from the 26 leading bits and the rest of its factors, which are cut apart
    by a mask: a fused multiply-add would undo the usual product. The loop is written out, without helpers: it is the
    longest in the interpreter.
    """
    q = tl.program_id(0).to(tl.int64) * MATRICES + tl.arange(0, MATRICES)
    used = q < n_matrices
    if HAS_COUNTS:
        g = q // 2
        p_n = counts_ptr + g // n_components * stride_n_i + g % n_components * stride_n_c
        used = tl.load(p_n, mask=used, other=0) != 0
    o_i, o_j = tl.arange(0, M)[:, None, None], tl.arange(0, M)[None, None, :]
    m_g = used[None, :, None] & (o_i >= 0) & (o_j >= 0)
    p_gram = gram_ptr + q[None, :, None] * (2 * M * M) + o_i * M + o_j
    high, low = tl.load(p_gram, mask=m_g, other=0.0), tl.load(p_gram + M * M, mask=m_g, other=0.0)
    sick = tl.sum(tl.sum(high * 0.0, 2, keep_dims=True), 0, keep_dims=True)  # zero, or NaN
    # Powers of two near the lengths of columns are taken out: pivots begin in [1, 4), and are less where they cancel.
    lengths = tl.sum(tl.where(o_i == o_j, high, 0.0), 0, keep_dims=True)
    exponent = ((lengths.to(tl.int64, bitcast=True) >> 52) - 1023) >> 1
    size = ((1023 + exponent) << 52).to(tl.float64, bitcast=True)
    scale = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    high, low = high * scale, low * scale
    scale = tl.trans(scale, (2, 1, 0))
    high, low = high * scale, low * scale
    p_upper, m_upper = upper_ptr + q[None, :, None] * (M * M) + o_j, (q < n_matrices)[None, :, None] & (o_j >= 0)
    for k in range(0, M):
        both = tl.join(tl.where(o_i == k, high, 0.0), tl.where(o_i == k, low, 0.0))  # summed together, they wait once
        row, row_low = tl.split(tl.sum(both, 0, keep_dims=True))
        both = tl.join(tl.where(o_j == k, row, 0.0), tl.where(o_j == k, row_low, 0.0))
        pivot, pivot_low = tl.split(tl.sum(both, 2, keep_dims=True))
        independent = pivot > 2e-30
        pivot = tl.where(independent, pivot, 1.0)
        inverse = tl.where(independent, 1.0 / pivot, 0.0)
        # ratio + ratio_low = row / pivot
        ratio = row * inverse
        back = ratio * pivot
        ratio_1 = (ratio.to(tl.int64, bitcast=True) & -0x8000000).to(tl.float64, bitcast=True)
        pivot_1 = (pivot.to(tl.int64, bitcast=True) & -0x8000000).to(tl.float64, bitcast=True)
        ratio_2, pivot_2 = ratio - ratio_1, pivot - pivot_1
        lost = ((ratio_1 * pivot_1 - back) + ratio_1 * pivot_2 + ratio_2 * pivot_1) + ratio_2 * pivot_2
        ratio_low = (((row - back) - lost) + (row_low - ratio * pivot_low)) * inverse
        # high + low -= column * ratio
        column, column_low = tl.trans(row, (2, 1, 0)), tl.trans(row_low, (2, 1, 0))
        step = column * ratio
        column_1 = (column.to(tl.int64, bitcast=True) & -0x8000000).to(tl.float64, bitcast=True)
        column_2 = column - column_1
        lost = ((column_1 * ratio_1 - step) + column_1 * ratio_2 + column_2 * ratio_1) + column_2 * ratio_2
        lost += column * ratio_low + column_low * ratio
        rest = high - step
        part = rest - high
        low += ((high - (rest - part)) - (step + part)) - lost
        high = rest + low
        part = high - rest
        low = (rest - (high - part)) + (low - part)
        row = tl.where(independent & (o_j >= k), row / tl.sqrt(pivot) * size, 0.0)
        tl.store(p_upper + k * M, row + sick, mask=m_upper)
