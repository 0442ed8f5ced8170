"""Schatten sums of the components A_c B_c with their gradients, and their singular values, on a GPU, in float64.

Exact forms, of singular values, without forming A_c B_c and without dividing by a singular value:

    gram     G_A = A^T A and G_B = B B^T, summed in twice float64's precision
    core     G = R^T R in that precision, X = R_A R_B^T = U diag(sigma) V^T by one-sided Jacobi; with
             W = V^T R_B, Z = U^T R_A and d loss / d sigma_i = g_i sigma_i:  H_A = W^T diag(g) W,  H_B = Z^T diag(g) Z
    apply    d At = H_A At and d B = H_B B, written or added to a gradient

A gram program owns a [BLOCK_RANK, BLOCK_RANK] tile of one component's G_A and the same of its G_B. The product of two
float32 numbers is exact in float64, so only sums round, and two numbers hold each: a Gram matrix squares the condition
number, and in float64 alone the second of two equal columns would leave a pivot of 1e-16, a singular value of 1e-8
that is not there, to which an eps of 1e-16 gives a gradient of order one. A core program owns COMPONENTS components
with their small matrices in registers, rotates all pairs of columns j and j ^ r in round r, and leaves a component
alone once it has converged, so that none depends on its neighbours. An apply program owns BLOCK_D columns of both
gradients of one component. Rank 1 takes the factored form, which is the same sum there.

Factored forms, of S_cm = |a_cm|^2 |b_cm|^2, where no row of the factors knows another:

    factored   with counts: lengths, powers and gradients of BLOCK_ROWS rows of one instance, in one program
    norms, powers, spread   with a mask: lengths; BLOCK_BATCH samples' powers of BLOCK_COMPONENTS components, with the
               gradient of their mask and their share in that of S; the gradients of the factors

No program adds to what another writes: each leaves its part of the sum, which one program an instance adds in order.

The core kernel works on the rank padded to a power of two, a component at a time, and is right up to MOST_RANK, where
it fills the registers. For components of full rank in small layers, forming them may be the better choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from fastapd.kernels import _launch
from fastapd.kernels._launch import annotated, block, cdiv, launch
from torch import Tensor

SWEEPS = 40
"""After so many Jacobi stops wherever it is; 5 to 15 are usual."""

# ------------------------------------------------------------------------------------------------ in float64, and twice


@triton.jit
def _float64(x):
    """Of numbers in any float: bfloat16 has arithmetic through float32 alone."""
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def _power_of_two(x):
    """The largest one up to x >= 0; 0 of zero and of denormals, infinity of what is not finite."""
    return (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):
    """base^exponent in float64, as IEEE 754 has it: also of zero, and of negative numbers to whole exponents."""
    size = tl.exp(exponent * tl.log(tl.where(base == 0, 1.0, tl.abs(base))))
    at_zero = tl.where(exponent > 0, 0.0, tl.where(exponent == 0, 1.0, float("inf")))
    half = exponent * 0.5
    sign = tl.where(tl.floor(half) == half, 1.0, tl.where(tl.floor(exponent) == exponent, -1.0, float("nan")))
    return tl.where(base == 0, at_zero, tl.where(base < 0, sign * size, size))


@triton.jit
def _slope(base, value, p):
    """d/ds of s^{p/2} where that is `value`; zero at zero, where the slope of a root is infinite."""
    at_zero = tl.where(p == 2, 1.0, 0.0)
    return tl.where(base == 0, at_zero, (p * 0.5) * value / tl.where(base == 0, 1.0, base))


@triton.jit
def _unused_term(count, batch, p, eps):
    """What the eps of the samples that do not use a component contributes, for each rank: nothing if batch < 0."""
    unused = (batch - count).to(tl.float64)
    return tl.where((unused == 0) | (batch < 0), 0.0, unused * _power(eps, p * 0.5))


# ---------------------------------------------------------------------------------------------------- exact: the Grams


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


# -------------------------------------------------------------------------------------------- exact: triangular factors

# Tiles are [row, matrix, column], so that a thread holds whole columns of small matrices and sums over rows need no
# other thread, as long as there is a column for each thread of a block.


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


# ----------------------------------------------------------------------------------------------------- exact: the cores


@triton.jit
def _jacobi(x, w, active, M: tl.constexpr, HAS_W: tl.constexpr, SWEEPS: tl.constexpr):
    """x V with orthogonal columns, and w V, for x [M, .., M]; where `active` [1, .., 1] is 0 nothing is done.

    Columns below 1e-17 of the longest count as zero: what a rotation leaves of a dependent column is rounding, which
    no number of sweeps would make orthogonal. The longer of two columns goes to the left. A sweep that met no cosine
    above 1e-12 was the last, as it squares them; comparisons with NaN are false, so it never keeps a sweep going.
    """
    o_j = tl.arange(0, M)[None, None, :]
    sweep, n_active = 0, tl.max(tl.reshape(active, (x.shape[1],)), 0)
    while (sweep < SWEEPS) & (n_active > 0):
        least = 1e-34 * tl.max(tl.sum(x * x, 0, keep_dims=True), 2, keep_dims=True)
        large = tl.full((1, x.shape[1], M), 0, tl.int32)
        for r in range(1, M):
            partner = tl.broadcast_to(o_j ^ r, x.shape)
            x_other = tl.gather(x, partner, 2)
            # lengths anew, so that both columns of a pair find the same angle; summed together, the sums wait once
            cross = x * x_other
            products = tl.join(tl.join(x * x, x_other * x_other), tl.join(cross, cross))
            squares, cross = tl.split(tl.sum(products, 0, keep_dims=True))
            norms, other = tl.split(squares)
            gamma, _ = tl.split(cross)
            square, both, gap = gamma * gamma, norms * other, other - norms
            turn = (active != 0) & (square > 1e-31 * both) & (norms > least) & (other > least)
            large = tl.where(turn & (square > 1e-24 * both), 1, large)
            left = o_j < (o_j ^ r)
            size = 2.0 * gamma / tl.where(turn, tl.abs(gap) + tl.sqrt(gap * gap + 4.0 * square), 1.0)
            tangent = tl.where(turn, tl.where((gap > 0) | ((gap == 0) & left), size, -size), 0.0)
            cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            sine = cosine * tangent
            swap = turn & ((left & (gap > 0)) | ((o_j > (o_j ^ r)) & (gap < 0)))
            own, others = tl.where(swap, sine, cosine), tl.where(swap, cosine, -sine)
            x = own * x + others * x_other
            if HAS_W:
                w = own * w + others * tl.gather(w, partner, 2)
        active = tl.minimum(active, tl.max(large, 2, keep_dims=True))
        n_active = tl.max(tl.reshape(active, (x.shape[1],)), 0)
        sweep += 1
    return x, w


@triton.jit
def _decompose(upper_ptr, g, used, M: tl.constexpr, HAS_W: tl.constexpr, SWEEPS: tl.constexpr):
    """The singular values [1, .., M], in no order, of components g, and what their gradients need.

    Returns:
        sigma, NaN throughout a component that is not finite; the columns x = U diag(sigma) / size; size [1, .., 1], a
        power of two near the largest entry of R_A R_B^T, as fourth powers of factors would leave float64; and W^T.
    """
    o_i, o_j, used = tl.arange(0, M)[:, None, None], tl.arange(0, M)[None, None, :], used[None, :, None]
    p_a = upper_ptr + g[None, :, None] * (2 * M * M)
    p_b = p_a + M * M
    w = tl.load(p_b + o_i + o_j * M, mask=used & (o_i >= 0) & (o_j >= 0), other=0.0)
    x = tl.zeros_like(w)
    for k in range(0, M):
        b_a = tl.load(p_a + o_i * M + k, mask=used & (o_i >= 0), other=0.0)
        b_b = tl.load(p_b + o_j * M + k, mask=used & (o_j >= 0), other=0.0)
        x += b_a * b_b
    size = _power_of_two(tl.max(tl.max(tl.abs(x), 2, keep_dims=True), 0, keep_dims=True))
    x *= 1.0 / tl.where(size == 0, 1.0, size)
    x, w = _jacobi(x, w, used.to(tl.int32), M, HAS_W, SWEEPS)
    sigma = tl.sqrt(tl.sum(x * x, 0, keep_dims=True)) * size
    return sigma, x, size, w


@triton.jit
def _outer_sum(columns, weights, M: tl.constexpr):
    """sum_j weight_j columns_j columns_j^T, [M, .., M]."""
    o_i, o_j = tl.arange(0, M)[:, None, None], tl.arange(0, M)[None, None, :]
    total = tl.zeros_like(columns)
    for k in range(0, M):
        row = weights * tl.sum(tl.where(o_i == k, columns, 0.0), 0, keep_dims=True)
        total = tl.where(o_j == k, tl.sum(columns * row, 2, keep_dims=True), total)
    return total


def _core_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    """Of 8 sweeps: how many there are depends on the numbers."""
    n, m = args["n_groups"], args["M"]
    return float(n * m**3 * 8 * 16), float(32 * n * m * m)


@triton.jit(launch_metadata=annotated(_core_flops))
def _values_svd_kernel(
    upper_ptr,  # [I, C, 2, M, M], float64
    values_ptr,  # [I, C, m], contiguous
    n_groups,
    rank,
    M: tl.constexpr,
    COMPONENTS: tl.constexpr,
    SWEEPS: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64) * COMPONENTS + tl.arange(0, COMPONENTS)
    m_g = g < n_groups
    sigma, _, _, _ = _decompose(upper_ptr, g, m_g, M, False, SWEEPS)
    o_i, o_j = tl.arange(0, M)[:, None, None], tl.arange(0, M)[None, None, :]
    others = tl.trans(sigma, (2, 1, 0))
    # how many come before: the larger, and of equals (as NaN are) those to the left
    before = (others > sigma) | ((o_i < o_j) & ~(others < sigma))
    place = tl.sum(before.to(tl.int32), 0, keep_dims=True)
    p_out = values_ptr + g[None, :, None] * rank + place
    tl.store(p_out, sigma.to(tl.float32).to(values_ptr.dtype.element_ty), mask=m_g[None, :, None] & (place < rank))


@triton.jit(launch_metadata=annotated(_core_flops))
def _core_schatten_kernel(
    upper_ptr,  # [I, C, 2, M, M], float64
    counts_ptr,  # [I, C], integers
    h_ptr,  # [I, C, 2, M, M], float64, contiguous: H_A and H_B, of used components alone; anything if not HAS_GRAD
    partial_ptr,  # [I, C], float64: each component's part of the sum
    n_groups,
    n_components,
    rank,
    stride_n_i,
    stride_n_c,
    p: tl.float64,
    eps: tl.float64,
    batch: tl.int64,
    scale: tl.float64,
    HAS_GRAD: tl.constexpr,
    M: tl.constexpr,
    COMPONENTS: tl.constexpr,
    SWEEPS: tl.constexpr,
):
    p, eps = tl.full((), p, tl.float64), tl.full((), eps, tl.float64)
    g = tl.program_id(0).to(tl.int64) * COMPONENTS + tl.arange(0, COMPONENTS)
    m_g = g < n_groups
    p_n = counts_ptr + g // n_components * stride_n_i + g % n_components * stride_n_c
    count = tl.load(p_n, mask=m_g, other=0).to(tl.int64)
    used = m_g & (count != 0)
    weight = count.to(tl.float64)
    sigma, x, size, w = _decompose(upper_ptr, g, used, M, HAS_GRAD, SWEEPS)
    o_i, o_j = tl.arange(0, M)[:, None, None], tl.arange(0, M)[None, None, :]
    base = sigma * sigma + eps
    value = _power(base, p * 0.5)
    total = tl.sum(tl.sum(tl.where(o_j < rank, value, 0.0), 2), 0)  # [COMPONENTS]
    term = tl.where(used, weight * total, 0.0) + rank * _unused_term(count, batch, p, eps)
    tl.store(partial_ptr + g, term, mask=m_g)
    if HAS_GRAD:
        # a value that is zero but for rounding adds nothing; with eps = 0 the slope there would be anything
        rounding = 1e-16 * tl.max(sigma, 2, keep_dims=True)
        slope = 2.0 * (weight * scale)[None, :, None] * _slope(base, value, p)
        slope = tl.where(sigma <= rounding, 0.0, slope)
        m_h = used[None, :, None] & (o_i >= 0) & (o_j >= 0)
        p_h = h_ptr + g[None, :, None] * (2 * M * M) + o_i * M + o_j
        tl.store(p_h, _outer_sum(w, slope, M), mask=m_h)
        z = tl.zeros_like(x)  # Z^T diag(sigma) / size = R_A^T x
        p_a = upper_ptr + g[None, :, None] * (2 * M * M)
        for k in range(0, M):
            b_a = tl.load(p_a + k * M + o_i, mask=used[None, :, None] & (o_i >= 0), other=0.0)
            z += b_a * tl.sum(tl.where(o_i == k, x, 0.0), 0, keep_dims=True)
        length = sigma / tl.where(size == 0, 1.0, size)
        slope = tl.where(sigma <= rounding, 0.0, slope / tl.where(sigma <= rounding, 1.0, length * length))
        tl.store(p_h + M * M, _outer_sum(z, slope, M), mask=m_h)


# ------------------------------------------------------------------------------------------------- exact: the gradients


@triton.jit
def _apply_tile(
    h_ptr, f_ptr, grad_ptr, tile, used, rank, d, stride_m, stride_d,
    RANK: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns of the gradient [m, d], H f or added to it, H [RANK, RANK] symmetric; zero if the component is unused."""
    o_m = tl.arange(0, RANK).to(tl.int64)
    o_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < rank, o_d < d
    acc = tl.zeros((RANK, BLOCK_D), dtype=tl.float64)
    if used:
        for k in range(0, rank):
            b_h = tl.load(h_ptr + k * RANK + o_m)
            b_f = tl.load(f_ptr + k * stride_m + o_d * stride_d, mask=m_d, other=0.0)
            acc += b_h[:, None] * _float64(b_f)[None, :]
    p_grad, m_grad = grad_ptr + o_m[:, None] * d + o_d[None, :], m_m[:, None] & m_d[None, :]
    if ACCUMULATE:
        acc += _float64(tl.load(p_grad, mask=m_grad, other=0.0))
    tl.store(p_grad, acc.to(tl.float32).to(grad_ptr.dtype.element_ty), mask=m_grad)


def _apply_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    """Two flops for each pair of rows and column; factors are read, gradients written, or both."""
    n, rank, d = args["n_groups"], args["rank"], args["d_in"] + args["d_out"]
    passes = 3 if args["ACCUMULATE"] else 2
    moved = passes * rank * d * args["at_ptr"].element_size() + 16 * rank * rank
    return 2.0 * n * rank * rank * d, float(n * moved)


@triton.jit(launch_metadata=annotated(_apply_flops))
def _apply_schatten_kernel(
    at_ptr,  # [I, C, m, d_in]
    b_ptr,  # [I, C, m, d_out]
    counts_ptr,  # [I, C], integers
    h_ptr,  # [I, C, 2, RANK, RANK], float64
    grad_at_ptr,  # [I, C, m, d_in], contiguous
    grad_b_ptr,  # [I, C, m, d_out], contiguous
    n_groups,
    n_components,
    rank,
    d_in,
    d_out,
    n_tiles,  # of BLOCK_D columns in the wider of the two
    n_in_tiles,
    n_out_tiles,
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
    ACCUMULATE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = (pid % n_tiles).to(tl.int64)
    g = (pid // n_tiles).to(tl.int64)
    instance, c = g // n_components, g % n_components
    used = tl.load(counts_ptr + instance * stride_n_i + c * stride_n_c) != 0
    if used | (not ACCUMULATE):
        p_h = h_ptr + g * (2 * RANK * RANK)
        if tile < n_in_tiles:
            p_f, p_grad = at_ptr + instance * stride_at_i + c * stride_at_c, grad_at_ptr + g * rank * d_in
            _apply_tile(p_h, p_f, p_grad, tile, used, rank, d_in, stride_at_m, stride_at_d, RANK, ACCUMULATE, BLOCK_D)
        if tile < n_out_tiles:
            p_f, p_grad = b_ptr + instance * stride_b_i + c * stride_b_c, grad_b_ptr + g * rank * d_out
            p_h += RANK * RANK
            _apply_tile(p_h, p_f, p_grad, tile, used, rank, d_out, stride_b_m, stride_b_d, RANK, ACCUMULATE, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------- factored


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


# -------------------------------------------------------------------------------------------------------------- the sum


def _total_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    n = args["n_instances"] * args["n_partials"]
    return float(n), 8.0 * n


@triton.jit(launch_metadata=annotated(_total_flops))
def _total_schatten_kernel(
    partial_ptr,  # [I, partials], float64, contiguous
    total_ptr,  # [I]
    n_instances,
    n_partials,
    BLOCK: tl.constexpr,
):
    instance = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, n_partials, BLOCK):
        o = start + tl.arange(0, BLOCK).to(tl.int64)
        acc += tl.load(partial_ptr + instance * n_partials + o, mask=o < n_partials, other=0.0)
    tl.store(total_ptr + instance, tl.sum(acc, 0).to(tl.float32).to(total_ptr.dtype.element_ty))


# ------------------------------------------------------------------------------------------------------- configurations

MOST_RANK = 64
"""Beyond, a core program's matrices do not fit the registers of a block of threads."""


def gram_config(d: int, rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """Tiles of 16 by 16 pairs of rows at most; 16 sums a thread, each in two numbers."""
    block_rank = block(rank, 1, 16)
    block_d = min(block(d, 16, 128), max(16, 1024 // block_rank**2))
    warps = max(1, min(8, block_rank**2 * block_d // 512))
    return {"BLOCK_RANK": block_rank, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}


def factor_config(rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """A column a thread up to rank 32, a quarter of one beyond."""
    m = block(rank, 1, MOST_RANK)
    return {"M": m, "MATRICES": max(1, 32 // m), "num_warps": 1 if m <= 16 else m // 8, "num_stages": 1}


def core_config(rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """The same."""
    m = block(rank, 1, MOST_RANK)
    return {"M": m, "COMPONENTS": max(1, 32 // m), "num_warps": 1 if m <= 16 else m // 8, "num_stages": 1}


def apply_config(d: int, rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """Up to 16 sums a thread."""
    rows = block(rank, 1, MOST_RANK)
    block_d = block(d, 16, max(32, min(256, 2048 // rows)))
    return {"RANK": rows, "BLOCK_D": block_d, "num_warps": max(1, min(4, rows * block_d // 512)), "num_stages": 2}


def rows_config(d: int, capability: tuple[int, int]) -> dict[str, int]:
    """Up to 8 numbers a thread and step of the walk; few rows, as every thread of a warp computes its rows' powers."""
    block_d = block(d, 16, 256)
    return {"BLOCK_ROWS": max(2, min(8, 512 // block_d)), "BLOCK_D": block_d, "num_warps": 2, "num_stages": 2}


def powers_config(batch: int, n_components: int, capability: tuple[int, int]) -> dict[str, int]:
    """Long columns of samples, so that few shares of gradients are kept, unless that leaves multiprocessors idle."""
    block_components = block(n_components, 1, 32)
    block_batch = 64
    while block_batch > 16 and cdiv(batch, block_batch) * cdiv(n_components, block_components) < 512:
        block_batch //= 2
    warps = max(1, min(8, block_batch * block_components // 256))
    return {
        "BLOCK_BATCH": block_batch, "BLOCK_COMPONENTS": block_components, "num_warps": warps, "num_stages": 1
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ launchers


def _total(op: str, partial: Tensor, total: Tensor) -> None:
    """total [I] = partial [I, n] summed in order."""
    n = partial.shape[1]
    config = {"BLOCK": block(n, 16, 4096), "num_warps": 8 if n > 1024 else 2, "num_stages": 1}
    launch(op, _total_schatten_kernel, partial.shape[0], partial, partial, total, partial.shape[0], n, **config)


def _triangular(op: str, A: Tensor, B: Tensor, counts: Tensor | None, m: int) -> Tensor:
    """R_A and R_B of all components, [I, C, 2, m, m]."""
    n_instances, n_components, rank, d_out = B.shape
    At, n_groups = A.mT, n_instances * n_components
    gram = A.new_empty(n_instances, n_components, 2, 2, m, m, dtype=torch.float64)
    config = gram_config(max(At.shape[3], d_out), rank, _launch.capability(A))
    n_blocks = m // config["BLOCK_RANK"]
    n_tiles = n_blocks * (n_blocks + 1) // 2
    launch(
        op, _gram_svd_kernel, n_groups * n_tiles, A,
        At, B, A if counts is None else counts, gram,
        n_groups, n_components, rank, At.shape[3], d_out, n_tiles,
        *At.stride(), *B.stride(), *((0, 0) if counts is None else counts.stride()),
        HAS_COUNTS=counts is not None, RANK=m, **config,
    )  # fmt: skip
    upper = A.new_empty(n_instances, n_components, 2, m, m, dtype=torch.float64)
    config = factor_config(rank, _launch.capability(A))
    launch(
        op, _factor_svd_kernel, cdiv(2 * n_groups, config["MATRICES"]), A,
        gram, gram if counts is None else counts, upper,
        2 * n_groups, n_components, *((0, 0) if counts is None else counts.stride()),
        HAS_COUNTS=counts is not None, **config,
    )  # fmt: skip
    return upper


def component_svdvals(A: Tensor, B: Tensor) -> Tensor:
    """Singular values [I, C, m], descending, for A [I, C, d_in, m] and B [I, C, m, d_out]."""
    op = "component_svdvals"
    values = A.new_empty(B.shape[:3])
    if values.numel() == 0:
        return values
    n_groups, rank = B.shape[0] * B.shape[1], B.shape[2]
    config = core_config(rank, _launch.capability(A))
    upper = _triangular(op, A, B, None, config["M"])
    n_programs = cdiv(n_groups, config["COMPONENTS"])
    launch(op, _values_svd_kernel, n_programs, A, upper, values, n_groups, rank, SWEEPS=SWEEPS, **config)
    return values


class _Sum:
    """A sum by counts with its gradients, which are written, added to what is there, or None."""

    def __init__(
        self, op: str, A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, scale: float,
        gradients: tuple[Tensor, Tensor] | None, accumulate: bool,
    ) -> None:  # fmt: skip
        self.op, self.A, self.B, self.counts = op, A, B, counts
        self.scalars = (p, eps, batch, scale)
        self.gradients, self.accumulate = gradients, accumulate
        self.total = A.new_empty(A.shape[0])

    def exact(self) -> Tensor:
        """From singular values."""
        op, A, B, counts = self.op, self.A, self.B, self.counts
        n_instances, n_components, rank, d_out = B.shape
        if rank <= 1:  # the only value is the product of the lengths
            return self.factored()
        At, n_groups, capability = A.mT, n_instances * n_components, _launch.capability(A)
        d_in = At.shape[3]
        config = core_config(rank, capability)
        m = config["M"]
        upper = _triangular(op, A, B, counts, m)
        partial = A.new_empty(n_instances, n_components, dtype=torch.float64)
        h = partial
        if self.gradients is not None:
            h = A.new_empty(n_instances, n_components, 2, m, m, dtype=torch.float64)
        launch(
            op, _core_schatten_kernel, cdiv(n_groups, config["COMPONENTS"]), A,
            upper, counts, h, partial, n_groups, n_components, rank, *counts.stride(), *self.scalars,
            HAS_GRAD=self.gradients is not None, SWEEPS=SWEEPS, **config,
        )  # fmt: skip
        if self.gradients is not None:
            config = apply_config(max(d_in, d_out), rank, capability)
            n_in, n_out = cdiv(d_in, config["BLOCK_D"]), cdiv(d_out, config["BLOCK_D"])
            n_tiles = max(n_in, n_out)
            launch(
                op, _apply_schatten_kernel, n_groups * n_tiles, A,
                At, B, counts, h, *self.gradients,
                n_groups, n_components, rank, d_in, d_out, n_tiles, n_in, n_out,
                *At.stride(), *B.stride(), *counts.stride(), ACCUMULATE=self.accumulate, **config,
            )  # fmt: skip
        _total(op, partial, self.total)
        return self.total

    def factored(self) -> Tensor:
        """From the lengths of columns."""
        A, B, counts = self.A, self.B, self.counts
        n_instances, n_components, rank, d_out = B.shape
        At, n_rows = A.mT, n_components * rank
        config = rows_config(max(At.shape[3], d_out), _launch.capability(A))
        n_tiles = cdiv(n_rows, config["BLOCK_ROWS"])
        partial = A.new_empty(n_instances, n_tiles, dtype=torch.float64)
        gradients = (partial, partial) if self.gradients is None else self.gradients
        launch(
            self.op, _factored_schatten_kernel, n_instances * n_tiles, A,
            At, B, counts, partial, *gradients,
            n_instances, n_rows, rank, At.shape[3], d_out, n_tiles,
            *At.stride(), *B.stride(), *counts.stride(), *self.scalars,
            HAS_GRAD=self.gradients is not None, ACCUMULATE=self.accumulate, **config,
        )  # fmt: skip
        _total(self.op, partial, self.total)
        return self.total


def _gradients(A: Tensor, B: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    if not with_grad:
        return A.new_empty(0), B.new_empty(0)
    return A.new_empty(*B.shape[:3], A.shape[2]), B.new_empty(B.shape)


def schatten(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum [I] from singular values and its gradients by At and B, which come back empty if not wanted."""
    gradients = _gradients(A, B, with_grad)
    both = gradients if with_grad else None
    return _Sum("schatten", A, B, counts, p, eps, batch, 1.0, both, False).exact(), *gradients


def schatten_factored(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the lengths of columns."""
    gradients = _gradients(A, B, with_grad)
    both = gradients if with_grad else None
    return _Sum("schatten_factored", A, B, counts, p, eps, batch, 1.0, both, False).factored(), *gradients


def schatten_accumulate(
    A: Tensor,
    B: Tensor,
    counts: Tensor,
    p: float,
    eps: float,
    batch: int,
    exact: bool,
    scale: float,
    grad_At: Tensor,
    grad_B: Tensor,
) -> Tensor:
    """Either sum, with `scale` times its gradients added to what is in the buffers."""
    whole = _Sum("schatten_accumulate", A, B, counts, p, eps, batch, scale, (grad_At, grad_B), True)
    return whole.exact() if exact else whole.factored()


def schatten_factored_masked(
    A: Tensor, B: Tensor, mask: Tensor, p: float, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum from lengths with a float mask [I, b, C] inside the power; gradients by At, B and the mask."""
    op, At = "schatten_factored_masked", A.mT
    n_instances, n_components, rank, d_out = B.shape
    d_in, batch, n_rows = At.shape[3], mask.shape[1], n_components * rank
    capability = _launch.capability(A)
    total, (grad_At, grad_B) = A.new_empty(n_instances), _gradients(A, B, with_grad)
    grad_mask = mask.new_empty(mask.shape if with_grad else (0,))
    norms = A.new_empty(2, n_instances, n_rows, dtype=torch.float64)
    rows = rows_config(max(d_in, d_out), capability)
    n_tiles = cdiv(n_rows, rows["BLOCK_ROWS"])
    factors = (*At.stride(), *B.stride())
    launch(
        op, _norms_kernel, n_instances * n_tiles, A,
        At, B, norms, n_instances, n_rows, rank, d_in, d_out, n_tiles, *factors, **rows,
    )  # fmt: skip
    config = powers_config(batch, n_components, capability)
    n_batch, n_across = cdiv(batch, config["BLOCK_BATCH"]), cdiv(n_components, config["BLOCK_COMPONENTS"])
    partial = A.new_empty(n_instances, n_batch * n_across, dtype=torch.float64)
    to_s = A.new_empty(n_instances, n_batch, n_rows if with_grad else 0, dtype=torch.float64)
    launch(
        op, _powers_schatten_kernel, n_instances * n_batch * n_across, A,
        norms, mask, grad_mask, to_s, partial,
        n_instances, batch, n_components, rank, n_batch, n_across, *mask.stride(), p, eps,
        HAS_GRAD=with_grad, **config,
    )  # fmt: skip
    if with_grad:
        launch(
            op, _spread_schatten_kernel, n_instances * n_tiles, A,
            At, B, norms, to_s, grad_At, grad_B,
            n_instances, n_rows, rank, d_in, d_out, n_tiles, n_batch, *factors, **rows,
        )  # fmt: skip
    _total(op, partial, total)
    return total, grad_At, grad_B, grad_mask


def limits(A: Tensor, B: Tensor, *rest: Any) -> list[str]:
    """Why the exact forms would refuse these factors."""
    rank = B.shape[2]
    return [f"the Triton kernels take ranks up to {MOST_RANK}, not {rank}"] if rank > MOST_RANK else []


def accumulate_limits(A: Tensor, B: Tensor, *rest: Any) -> list[str]:
    """The same for `schatten_accumulate`, whose factored form takes any rank."""
    return limits(A, B) if rest[4] else []
