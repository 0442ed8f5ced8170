"""y_b = sum over the components selected for b of (x_b A_c) B_c on a GPU, and its gradients, from a grouped selection.

With K pairs of sample and component, everything is one of three passes over the pairs, none of which forms a
component's weights or outputs, and none of which adds to memory that another program writes:

    project   v[k] = rows[sample of k] F_c^T       component-major; forward u = x At^T, backward grad_u = grad_y B^T
    combine   out_b = sum over b's pairs v[k] F_c  sample-major; forward y from u and B, backward grad_x from grad_u, At
    outer     G_c (+)= sum over c's pairs v[k]^T rows[sample of k]     component-major; grad_B, and grad_At

A project program owns BLOCK_PAIRS pairs of one component. Components have any number of pairs, so tile t belongs to the
last component c with offsets[c] // BLOCK_PAIRS + c <= t: these starts leave every component room for its tiles, and the
grid has the size K // BLOCK_PAIRS + C whatever was selected, which a captured graph needs. A combine program owns one
sample and BLOCK_D of its outputs; an outer program owns BLOCK_RANK rows and BLOCK_D columns of one component's
gradient. Sums are in float32, in an order that the grid fixes.

Where most components are on for most samples (K above an eighth of batch * C), two dense GEMMs are the better choice.
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


def _pair_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    """Two flops for each pair, rank and entry of a row; the rows, the factors and v are read or written once."""
    pairs, entries = args["n_pairs"] * args["n_instances"], args["rank"] * args["d"]
    size = args["factor_ptr"].element_size()
    moved = pairs * (args["d"] + args["rank"]) + args["n_instances"] * args["n_components"] * entries
    return 2.0 * pairs * entries, float(moved * size)


@triton.jit(launch_metadata=annotated(_pair_flops))
def _project_kernel(
    rows_ptr,  # [I, b, d]
    factor_ptr,  # [I, C, m, d]
    sample_ptr,  # [I, K], component-major
    offsets_ptr,  # [I, C + 1]
    v_ptr,  # [I, K, m], contiguous
    n_instances,
    n_pairs,
    n_components,
    d,
    rank,
    n_tiles,
    n_rank_tiles,
    stride_rows_i,
    stride_rows_b,
    stride_rows_d,
    stride_f_i,
    stride_f_c,
    stride_f_m,
    stride_f_d,
    SEARCH_STEPS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = (pid // n_rank_tiles) % n_tiles
    instance = (pid // n_rank_tiles // n_tiles).to(tl.int64)
    offsets_ptr += instance * (n_components + 1)
    c = tile * 0
    high = c + n_components - 1
    for _ in range(SEARCH_STEPS):
        middle = (c + high + 1) // 2
        starts_later = tl.load(offsets_ptr + middle) // BLOCK_PAIRS + middle > tile
        c = tl.where(starts_later, c, middle)
        high = tl.where(starts_later, middle - 1, high)
    begin, end = tl.load(offsets_ptr + c), tl.load(offsets_ptr + c + 1)
    first = begin + (tile - begin // BLOCK_PAIRS - c) * BLOCK_PAIRS
    if first < end:
        o_k = first + tl.arange(0, BLOCK_PAIRS)
        m_k = o_k < end
        o_m = (pid % n_rank_tiles).to(tl.int64) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        m_m = o_m < rank
        o_s = tl.load(sample_ptr + instance * n_pairs + o_k, mask=m_k, other=0).to(tl.int64)
        p_rows = rows_ptr + instance * stride_rows_i + o_s[:, None] * stride_rows_b
        p_f = factor_ptr + instance * stride_f_i + c.to(tl.int64) * stride_f_c + o_m[None, :] * stride_f_m
        acc = tl.zeros((BLOCK_PAIRS, BLOCK_RANK), dtype=tl.float32)
        for start in range(0, d, BLOCK_D):
            o_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            m_d = o_d < d
            b_rows = tl.load(p_rows + o_d[None, :] * stride_rows_d, mask=m_k[:, None] & m_d[None, :], other=0.0)
            b_f = tl.load(p_f + o_d[:, None] * stride_f_d, mask=m_d[:, None] & m_m[None, :], other=0.0)
            acc = tl.dot(b_rows.to(tl.float32), b_f.to(tl.float32), acc, input_precision=PRECISION)
        p_v = v_ptr + (instance * n_pairs + o_k[:, None]) * rank + o_m[None, :]
        tl.store(p_v, acc.to(v_ptr.dtype.element_ty), mask=m_k[:, None] & m_m[None, :])


@triton.jit(launch_metadata=annotated(_pair_flops))
def _combine_kernel(
    v_ptr,  # [I, K, m], component-major, contiguous
    factor_ptr,  # [I, C, m, d]
    component_ptr,  # [I, K], sample-major
    position_ptr,  # [I, K], from sample-major to component-major
    sample_offsets_ptr,  # [I, b + 1]
    out_ptr,  # [I, b, d], contiguous
    n_instances,
    n_pairs,
    n_components,
    batch,
    d,
    rank,
    n_d_tiles,
    stride_f_i,
    stride_f_c,
    stride_f_m,
    stride_f_d,
    PAIRS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // n_d_tiles).to(tl.int64)  # of [I, b]
    instance, b = row // batch, row % batch
    o_d = (pid % n_d_tiles).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d
    o_r = tl.arange(0, PAIRS * BLOCK_RANK)
    begin = tl.load(sample_offsets_ptr + instance * (batch + 1) + b)
    end = tl.load(sample_offsets_ptr + instance * (batch + 1) + b + 1)
    acc = tl.zeros((PAIRS * BLOCK_RANK, BLOCK_D), dtype=tl.float32)
    for first in range(begin, end, PAIRS):
        o_k = first + o_r // BLOCK_RANK
        m_k = o_k < end
        o_c = tl.load(component_ptr + instance * n_pairs + o_k, mask=m_k, other=0).to(tl.int64)
        o_v = tl.load(position_ptr + instance * n_pairs + o_k, mask=m_k, other=0).to(tl.int64)
        for start in range(0, rank, BLOCK_RANK):
            o_m = start + (o_r % BLOCK_RANK).to(tl.int64)
            m_r = m_k & (o_m < rank)
            b_v = tl.load(v_ptr + (instance * n_pairs + o_v) * rank + o_m, mask=m_r, other=0.0).to(tl.float32)
            p_f = factor_ptr + instance * stride_f_i + o_c[:, None] * stride_f_c + o_m[:, None] * stride_f_m
            b_f = tl.load(p_f + o_d[None, :] * stride_f_d, mask=m_r[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            acc += b_v[:, None] * b_f
    tl.store(out_ptr + row * d + o_d, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=m_d)


@triton.jit(launch_metadata=annotated(_pair_flops))
def _outer_kernel(
    v_ptr,  # [I, K, m], component-major, contiguous
    rows_ptr,  # [I, b, d]
    sample_ptr,  # [I, K], component-major
    offsets_ptr,  # [I, C + 1]
    factor_ptr,  # the gradient [I, C, m, d], contiguous
    n_instances,
    n_pairs,
    n_components,
    d,
    rank,
    n_d_tiles,
    n_rank_tiles,
    stride_rows_i,
    stride_rows_b,
    stride_rows_d,
    ACCUMULATE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    o_d = (pid % n_d_tiles).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_m = (pid // n_d_tiles % n_rank_tiles).to(tl.int64) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    m_d, m_m = o_d < d, o_m < rank
    owner = (pid // n_d_tiles // n_rank_tiles).to(tl.int64)  # of [I, C]
    instance, c = owner // n_components, owner % n_components
    begin = tl.load(offsets_ptr + instance * (n_components + 1) + c)
    end = tl.load(offsets_ptr + instance * (n_components + 1) + c + 1)
    if (begin < end) | (not ACCUMULATE):
        acc = tl.zeros((BLOCK_RANK, BLOCK_D), dtype=tl.float32)
        for first in range(begin, end, BLOCK_PAIRS):
            o_k = first + tl.arange(0, BLOCK_PAIRS)
            m_k = o_k < end
            o_s = tl.load(sample_ptr + instance * n_pairs + o_k, mask=m_k, other=0).to(tl.int64)
            p_v = v_ptr + (instance * n_pairs + o_k[None, :]) * rank + o_m[:, None]
            b_v = tl.load(p_v, mask=m_k[None, :] & m_m[:, None], other=0.0)
            p_rows = rows_ptr + instance * stride_rows_i + o_s[:, None] * stride_rows_b + o_d[None, :] * stride_rows_d
            b_rows = tl.load(p_rows, mask=m_k[:, None] & m_d[None, :], other=0.0)
            acc = tl.dot(b_v.to(tl.float32), b_rows.to(tl.float32), acc, input_precision=PRECISION)
        p_out = factor_ptr + (owner * rank + o_m[:, None]) * d + o_d[None, :]
        m_out = m_m[:, None] & m_d[None, :]
        if ACCUMULATE:
            acc += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
        tl.store(p_out, acc.to(factor_ptr.dtype.element_ty), mask=m_out)


def project_config(d: int, rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """16 pairs, the least that a tensor-core product takes, since a component has few; all of the rank up to 64.

    A thread holds 32 entries of a factor: their addresses fill twice as many registers.
    """
    block_rank, block_d = block(rank, 16, 64), block(d, 16, 64)
    warps = 4 if block_rank * block_d > 2048 else 2
    return {"BLOCK_PAIRS": 16, "BLOCK_RANK": block_rank, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 3}


def combine_config(d: int, rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """16 rows of factors in flight, 64 where one component fills them; 1024 sums a warp at most."""
    block_rank = block(rank, 1, 64)
    pairs = max(1, 16 // block_rank)
    block_d = min(block(d, 16, 256), 8192 // (pairs * block_rank))
    warps = max(1, min(8, pairs * block_rank * block_d // 1024))
    blocks = {"PAIRS": pairs, "BLOCK_RANK": block_rank, "BLOCK_D": block_d}
    return {**blocks, "num_warps": warps, "num_stages": 2, "maxnreg": 255}  # or ptxas spills for more warps at once


def outer_config(d: int, rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """32 pairs at once: most components need one round. A thread has 16 sums at most."""
    block_rank, block_d = block(rank, 16, 64), block(d, 16, 64)
    warps = 8 if block_rank * block_d > 2048 else 4
    return {"BLOCK_PAIRS": 32, "BLOCK_RANK": block_rank, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}


class _Pairs:
    """A selection's lists, contiguous, and the sizes that go with them."""

    def __init__(self, op: str, batch: int, *selection: Tensor) -> None:
        self.sample, self.offsets, self.component, self.sample_offsets, self.position = (
            t.contiguous() for t in selection
        )
        self.op, self.batch = op, batch
        self.n_instances, self.n_pairs = self.sample.shape
        self.n_components = self.offsets.shape[1] - 1

    def project(self, rows: Tensor, factor: Tensor, v: Tensor) -> None:
        """v[k] = rows[sample of k] F_c^T for rows [I, b, d] and F [I, C, m, d]."""
        rank, d = factor.shape[2:]
        config = project_config(d, rank, _launch.capability(rows))
        n_tiles = self.n_pairs // config["BLOCK_PAIRS"] + self.n_components
        n_rank_tiles = cdiv(rank, config["BLOCK_RANK"])
        launch(
            self.op, _project_kernel, self.n_instances * n_tiles * n_rank_tiles if self.n_pairs else 0, rows,
            rows, factor, self.sample, self.offsets, v,
            self.n_instances, self.n_pairs, self.n_components, d, rank, n_tiles, n_rank_tiles,
            *rows.stride(), *factor.stride(),
            SEARCH_STEPS=self.n_components.bit_length(), PRECISION=dot_precision(rows.dtype), **config,
        )  # fmt: skip

    def combine(self, v: Tensor, factor: Tensor, out: Tensor) -> None:
        """out_b = sum over b's pairs v[k] F_c."""
        rank, d = factor.shape[2:]
        config = combine_config(d, rank, _launch.capability(v))
        n_d_tiles = cdiv(d, config["BLOCK_D"])
        launch(
            self.op, _combine_kernel, self.n_instances * self.batch * n_d_tiles, v,
            v, factor, self.component, self.position, self.sample_offsets, out,
            self.n_instances, self.n_pairs, self.n_components, self.batch, d, rank, n_d_tiles,
            *factor.stride(), **config,
        )  # fmt: skip

    def outer(self, v: Tensor, rows: Tensor, gradient: Tensor, accumulate: bool) -> None:
        """G_c (+)= sum over c's pairs v[k]^T rows[sample of k], G [I, C, m, d]."""
        rank, d = gradient.shape[2:]
        config = outer_config(d, rank, _launch.capability(v))
        n_d_tiles, n_rank_tiles = cdiv(d, config["BLOCK_D"]), cdiv(rank, config["BLOCK_RANK"])
        launch(
            self.op, _outer_kernel, self.n_instances * self.n_components * n_d_tiles * n_rank_tiles, v,
            v, rows, self.sample, self.offsets, gradient,
            self.n_instances, self.n_pairs, self.n_components, d, rank, n_d_tiles, n_rank_tiles,
            *rows.stride(), ACCUMULATE=accumulate, PRECISION=dot_precision(rows.dtype), **config,
        )  # fmt: skip


def component_forward_selected(x: Tensor, A: Tensor, B: Tensor, *selection: Tensor) -> tuple[Tensor, Tensor]:
    """y [I, b, d_out] and u = x_b A_c of the pairs, [I, K, m]."""
    pairs = _Pairs("component_forward_selected", x.shape[1], *selection)
    u = x.new_empty(x.shape[0], pairs.n_pairs, B.shape[2])
    y = x.new_empty(x.shape[0], x.shape[1], B.shape[3])
    pairs.project(x, A.mT, u)
    pairs.combine(u, B, y)
    return y, u


def _backward(
    pairs: _Pairs,
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    u: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    accumulate: bool,
) -> None:
    """Fills the gradients of x, At and B that are given, or adds to the last two."""
    grad_x, grad_At, grad_B = gradients
    if grad_B is not None:
        pairs.outer(u.contiguous(), grad_y, grad_B, accumulate)
    if grad_x is None and grad_At is None:
        return
    grad_u = u.new_empty(u.shape, dtype=torch.float32)
    pairs.project(grad_y, B, grad_u)
    if grad_At is not None:
        pairs.outer(grad_u, x, grad_At, accumulate)
    if grad_x is not None:
        pairs.combine(grad_u, A.mT, grad_x)


def component_forward_selected_backward(
    grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, u: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, At and B; one that is not needed comes back empty."""
    *selection, need_x, need_A, need_B = rest
    pairs = _Pairs("component_forward_selected_backward", x.shape[1], *selection)
    n_instances, n_components, rank, _ = B.shape
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_At = x.new_empty((n_instances, n_components, rank, x.shape[2]) if need_A else (0,))
    grad_B = x.new_empty(B.shape if need_B else (0,))
    needed = (grad_x if need_x else None, grad_At if need_A else None, grad_B if need_B else None)
    _backward(pairs, grad_y, x, A, B, u, needed, False)
    return grad_x, grad_At, grad_B


def component_forward_selected_accumulate(
    grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, u: Tensor, *rest: Any
) -> Tensor:
    """The gradient of x, or an empty tensor; those of the factors are added to what is in the buffers."""
    *selection, need_x, grad_At, grad_B = rest
    pairs = _Pairs("component_forward_selected_accumulate", x.shape[1], *selection)
    grad_x = x.new_empty(x.shape if need_x else (0,))
    _backward(pairs, grad_y, x, A, B, u, (grad_x if need_x else None, grad_At, grad_B), True)
    return grad_x
