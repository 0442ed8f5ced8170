"""Singular values of A_c B_c from triangular factors, R_A and R_B of `_svd_gram`, and gradients of Schatten sums.

    values     X = R_A R_B^T = U diag(sigma) V^T by one-sided Jacobi; writes sigma, descending
    core       the same; with W = V^T R_B, Z = U^T R_A and d loss / d sigma_i = g_i sigma_i it writes
               H_A = W^T diag(g) W and H_B = Z^T diag(g) Z, and the component's part of the sum
    apply      d At = H_A At and d B = H_B B, written or added to a gradient

A core program owns COMPONENTS components with their small matrices in registers, rotates all pairs of columns j and
j ^ r in round r, and leaves a component alone once it has converged, so that none depends on its neighbours. An apply
program owns BLOCK_D columns of both gradients of one component. All is accumulated in float64.

Tiles are [row, component, column], as in `_svd_gram`. A core works on the rank padded to a power of two, a component at
a time, and is right up to `MOST_RANK` of `batched_svd`, where it fills the registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from fastapd.kernels._float64 import _float64, _power, _power_of_two, _slope, _unused_term
from fastapd.kernels._launch import annotated

# ------------------------------------------------------------------------------------------------------------ the cores


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
        # before the loop, which has few registers left
        length = sigma / tl.where(size == 0, 1.0, size)
        slope = tl.where(sigma <= rounding, 0.0, slope / tl.where(sigma <= rounding, 1.0, length * length))
        z = tl.zeros_like(x)  # Z^T diag(sigma) / size = R_A^T x
        p_a = upper_ptr + g[None, :, None] * (2 * M * M)
        for k in range(0, M):
            b_a = tl.load(p_a + k * M + o_i, mask=used[None, :, None] & (o_i >= 0), other=0.0)
            z += b_a * tl.sum(tl.where(o_i == k, x, 0.0), 0, keep_dims=True)
        tl.store(p_h + M * M, _outer_sum(z, slope, M), mask=m_h)


# -------------------------------------------------------------------------------------------------------- the gradients


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
