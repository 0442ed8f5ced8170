"""a_bc = |g_J t_J|^2 on a GPU, t_j = sum_k s_k F_kj + sum_i (g_i t_i) L_ij: the tangent form of attributions.

Everything about a pair (b, c) is a row: s_k is x_b A_c (made for all components at once by the library's GEMM) or x_b
itself, F_kj belongs to the component, L_ij to nobody. So for one component and BLOCK_B samples every term is one
product of tiles on tensor cores, and rows of one component share F.

    rows      one program does a tile of rows from the first barrier to the last, with all its tangents in registers:
              nothing but the attributions is written. For barriers of up to WIDEST numbers.
    barrier   one barrier for a tile of rows and BLOCK_W of its width (all of it where lengths are summed). Gated
              tangents go through memory between barriers, for a part of the batch and of the components at a time, so
              that they stay in the L2 cache.

Both sum in float32. The backward pass runs the second kernel forward, then backward with links transposed: what flows
into the last barrier is 2 a g (g t), into an earlier one g_i sum_j flow_j L_ij^T; the gradients of F and A follow from
flows by plain products, which are the library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastapd.kernels import _launch
from fastapd.kernels._launch import annotated, block, cdiv, dot_precision, launch
from fastapd.kernels._walk import first_steps, picked, rows_dense
from torch import Tensor

WIDEST = {"ieee": 64, "tf32": 128, "tf32x3": 128}
"""The widest barrier whose tangents stay in registers, which products without tensor cores need for themselves."""

CHUNK_BYTES = 1 << 25
"""Of the tangents between barriers: about half of an L2 cache."""

LEAST_PART = 64
"""Samples and components that a part has at least."""

INNER_BYTES = 1 << 28
"""Of u = x A of one part of the batch where no tangents are written."""


@triton.jit
def _add_products(
    acc,  # [BLOCK_B, BLOCK_W]
    p_lefts,  # for each product where its rows begin; the numbers of a row are next to each other
    p_rights,  # and where its columns begin; likewise
    left_strides,  # from row to row
    right_strides,
    ks,
    firsts,  # the first step of each
    n_steps,
    o_b,
    o_w,
    m_b,
    m_w,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + the sum of rows times matrices."""
    for step in range(0, n_steps):
        begin, k, p_left, p_right, stride_left, stride_right = picked(
            (firsts, ks, p_lefts, p_rights, left_strides, right_strides), firsts, step
        )
        o_k = (step - begin) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
        m_k = o_k < k
        p_left += o_b[:, None] * stride_left + o_k[None, :]
        p_right += o_k[:, None] * stride_right + o_w[None, :]
        b_left = tl.load(p_left, mask=m_b[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        b_right = tl.load(p_right, mask=m_k[:, None] & m_w[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(b_left, b_right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _add_link(
    acc,  # [BLOCK_B, BLOCK_W]
    tangent,  # [BLOCK_B, BLOCK_V]
    p_link,  # [1, BLOCK_W]: where columns begin
    m_w,
    width,
    stride,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + tangent times link, whose left width is whole in registers."""
    o_v = tl.arange(0, BLOCK_V).to(tl.int64)
    b_link = tl.load(p_link + o_v[:, None] * stride, mask=(o_v < width)[:, None] & m_w[None, :], other=0.0)
    return tl.dot(tangent, b_link.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def _indices(BLOCK: tl.constexpr):
    return tl.arange(0, BLOCK).to(tl.int64)


@triton.jit
def _zeros(BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr):
    return tl.zeros((BLOCK_B, BLOCK_W), dtype=tl.float32)


# ----------------------------------------------------------------------------------------------------- a tile of rows


def _rows_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    pairs = args["n_instances"] * args["batch"] * args["n_components"]
    each = sum(F.shape[-2] * F.shape[-1] for F in args["Fs"]) + sum(L.shape[-2] * L.shape[-1] for L in args["links"])
    tensors = (*args["sources"], *args["Fs"], *args["gates"], *args["links"])
    return 2.0 * pairs * each, float(sum(t.numel() * t.element_size() for t in tensors) + 4 * pairs)


@triton.jit(launch_metadata=annotated(_rows_flops))
def _rows_kernel(
    sources,  # for each term its s [I, b, C, K]
    Fs,  # and its F [I, C, K, W]; terms are in the order of their barriers
    gates,  # for each gate [I, b, W]
    links,  # for each link [I or 1, W, W']
    out_ptr,  # [I, b, C]
    n_instances,
    batch,
    n_components,
    n_b_tiles,
    ks,  # K of each term
    firsts,  # the first step of each term among those of its barrier
    steps,  # of each barrier
    widths,  # of each barrier
    source_strides,  # of I, b and C; 0 for C where all components share it
    F_strides,  # of I, C and K
    gate_strides,
    link_strides,  # that of I is 0 where all instances share it
    stride_out_i,
    stride_out_b,
    stride_out_c,
    TERM_BARRIER: tl.constexpr,
    GATE_OF: tl.constexpr,  # for each barrier the number of its gate, or -1
    LINK_FROM: tl.constexpr,
    LINK_TO: tl.constexpr,
    BLOCK_WS: tl.constexpr,  # for each barrier
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    c = (pid % n_components).to(tl.int64)
    o_b = (pid // n_components % n_b_tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    instance = (pid // n_components // n_b_tiles).to(tl.int64)
    m_b = o_b < batch
    tangents = ()
    squares = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for j in tl.static_range(len(BLOCK_WS)):
        o_w = _indices(BLOCK_WS[j])
        m_w = o_w < widths[j]
        acc = _zeros(BLOCK_B, BLOCK_WS[j])
        p_lefts, p_rights, left_strides, right_strides, own_ks, own_firsts = (), (), (), (), (), ()
        for t in tl.static_range(len(TERM_BARRIER)):
            if TERM_BARRIER[t] == j:
                p_lefts = p_lefts + (sources[t] + instance * source_strides[t][0] + c * source_strides[t][2],)
                p_rights = p_rights + (Fs[t] + instance * F_strides[t][0] + c * F_strides[t][1],)
                left_strides = left_strides + (source_strides[t][1],)
                right_strides = right_strides + (F_strides[t][2],)
                own_ks, own_firsts = own_ks + (ks[t],), own_firsts + (firsts[t],)
        if len(p_lefts) > 0:
            acc = _add_products(
                acc, p_lefts, p_rights, left_strides, right_strides, own_ks, own_firsts, steps[j], o_b, o_w, m_b, m_w,
                BLOCK_K, PRECISION,
            )  # fmt: skip
        for n in tl.static_range(len(LINK_TO)):
            if LINK_TO[n] == j:
                p_l = links[n] + instance * link_strides[n][0] + o_w[None, :] * link_strides[n][2]
                acc = _add_link(
                    acc, tangents[LINK_FROM[n]], p_l, m_w, widths[LINK_FROM[n]], link_strides[n][1],
                    BLOCK_WS[LINK_FROM[n]], PRECISION,
                )  # fmt: skip
        if GATE_OF[j] >= 0:
            p_g = gates[GATE_OF[j]] + instance * gate_strides[GATE_OF[j]][0]
            p_g += o_b[:, None] * gate_strides[GATE_OF[j]][1] + o_w[None, :] * gate_strides[GATE_OF[j]][2]
            acc *= tl.load(p_g, mask=m_b[:, None] & m_w[None, :], other=0.0).to(tl.float32)
        if j == len(BLOCK_WS) - 1:
            squares = tl.sum(acc * acc, 1)
        tangents = tangents + (acc,)
    p_out = out_ptr + instance * stride_out_i + o_b * stride_out_b + c * stride_out_c
    tl.store(p_out, squares.to(out_ptr.dtype.element_ty), mask=m_b)


# -------------------------------------------------------------------------------------------------------- one barrier


def _barrier_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    pairs = args["n_instances"] * args["batch"] * args["n_components"]
    each = sum(args["ks"]) * args["width"]
    tensors = (*args["rows"], *args["matrices"])
    written = pairs * (1 if args["LEAVE"] == "squares" else args["width"])
    return 2.0 * pairs * each, float(sum(t.numel() * t.element_size() for t in tensors) + 4 * written)


@triton.jit(launch_metadata=annotated(_barrier_flops))
def _barrier_kernel(
    rows,  # for each product its left side [I, b, C, K], float32
    matrices,  # and its right side [I, C, K, W], float32
    gate_ptr,  # [I, b, W]
    grad_ptr,  # [I, b, C]: of the attributions
    out_ptr,  # [I, b, C], or [I, b, C, W]
    n_instances,
    batch,
    n_components,
    n_b_tiles,
    n_w_tiles,
    width,
    ks,
    firsts,  # the first step of each product
    n_steps,
    row_strides,  # of I, b and C
    matrix_strides,  # of I, C and K
    gate_strides,
    grad_strides,
    out_strides,  # of I, b, C and W
    HAS_GATE: tl.constexpr,
    LEAVE: tl.constexpr,  # "gated": g t, "squares": |g t|^2 over the width, "flow": 2 a g (g t)
    BLOCK_B: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    first = pid % n_w_tiles
    b_tile = pid // n_w_tiles % n_b_tiles
    owner = (pid // n_w_tiles // n_b_tiles).to(tl.int64)  # of [I, C]
    instance, c = owner // n_components, owner % n_components
    o_b = b_tile.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < batch
    last = first + 1
    if LEAVE == "squares":  # n_w_tiles is 1: one program goes through the whole width
        last = (width + BLOCK_W - 1) // BLOCK_W
    p_lefts, p_rights, left_strides, right_strides = (), (), (), ()
    for n in tl.static_range(len(rows)):
        p_lefts = p_lefts + (rows[n] + instance * row_strides[n][0] + c * row_strides[n][2],)
        p_rights = p_rights + (matrices[n] + instance * matrix_strides[n][0] + c * matrix_strides[n][1],)
        left_strides, right_strides = left_strides + (row_strides[n][1],), right_strides + (matrix_strides[n][2],)
    squares = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for w_tile in range(first, last):
        o_w = w_tile * BLOCK_W + tl.arange(0, BLOCK_W).to(tl.int64)
        m_w = o_w < width
        m_out = m_b[:, None] & m_w[None, :]
        acc = tl.zeros((BLOCK_B, BLOCK_W), dtype=tl.float32)
        acc = _add_products(
            acc, p_lefts, p_rights, left_strides, right_strides, ks, firsts, n_steps, o_b, o_w, m_b, m_w,
            BLOCK_K, PRECISION,
        )  # fmt: skip
        if HAS_GATE:
            p_g = gate_ptr + instance * gate_strides[0] + o_b[:, None] * gate_strides[1]
            gate = tl.load(p_g + o_w[None, :] * gate_strides[2], mask=m_out, other=0.0).to(tl.float32)
            acc *= gate
            if LEAVE == "flow":
                acc *= gate
        if LEAVE == "squares":
            squares += tl.sum(acc * acc, 1)
        else:
            if LEAVE == "flow":
                p_a = grad_ptr + instance * grad_strides[0] + o_b * grad_strides[1] + c * grad_strides[2]
                acc *= 2 * tl.load(p_a, mask=m_b, other=0.0).to(tl.float32)[:, None]
            p_out = out_ptr + instance * out_strides[0] + o_b[:, None] * out_strides[1] + c * out_strides[2]
            tl.store(p_out + o_w[None, :] * out_strides[3], acc.to(out_ptr.dtype.element_ty), mask=m_out)
    if LEAVE == "squares":
        p_out = out_ptr + instance * out_strides[0] + o_b * out_strides[1] + c * out_strides[2]
        tl.store(p_out, squares.to(out_ptr.dtype.element_ty), mask=m_b)


# ------------------------------------------------------------------------------------------------------ configurations


def rows_config(batch: int, blocks: Sequence[int], precision: str, capability: tuple[int, int]) -> dict[str, int]:
    """As many samples as leave the tangents of two barriers in registers: 8192 sums on 8 warps; without tensor cores,
    whose factors then take registers too, a quarter of that."""
    slow = precision == "ieee"
    block_b = block(batch, 16, max(16, min(64, (1024 if slow else 4096) // max(blocks))))
    return {
        "BLOCK_B": block_b,
        "BLOCK_K": 16 if slow or max(blocks) > 64 else 32,
        "num_warps": 8 if block_b * max(blocks) >= 2048 else 4,
        "num_stages": 2,
        "maxnreg": 255,
    }


def barrier_config(batch: int, width: int, leave: str, precision: str, capability: tuple[int, int]) -> dict[str, int]:
    """Tiles of a plain GEMM: 64 samples by 128 of the width on Hopper, half of that before and without tensor cores."""
    slow = precision == "ieee"
    narrow = slow or capability < (9, 0)
    block_b, block_w = block(batch, 16, 32 if slow else 64), block(width, 16, 64 if narrow else 128)
    return {
        "BLOCK_B": block_b,
        "BLOCK_W": block_w,
        "BLOCK_K": 16 if narrow or leave == "squares" else 32,
        "num_warps": 8 if block_b * block_w >= 2048 else 4,
        "num_stages": 3,
        "maxnreg": 255,
    }


# ------------------------------------------------------------------------------------------------------------- programs


class _Program(NamedTuple):
    """The arguments of both ops, named; lefts, terms, gated and ends say by number what belongs where."""

    xs: list[Tensor]
    As: list[Tensor]
    Fs: list[Tensor]
    gates: list[Tensor]
    links: list[Tensor]
    lefts: list[int]
    terms: list[int]
    gated: list[int]
    ends: list[int]
    widths: list[int]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """n_instances, batch and n_components."""
        return self.xs[0].shape[0], self.xs[0].shape[1], self.Fs[0].shape[1]

    def gate(self, j: int) -> Tensor | None:
        return self.gates[self.gated.index(j)] if j in self.gated else None

    def part(self, samples: slice, components: slice) -> _Program:
        """The same for a part of the batch and of the components."""
        return self._replace(
            xs=[x[:, samples] for x in self.xs],
            As=[A[:, components] for A in self.As],
            Fs=[F[:, components] for F in self.Fs],
            gates=[g[:, samples] for g in self.gates],
        )

    def sources(self) -> list[Tensor]:
        """Every s_k as [I, b, C, K]: the inputs, which all components share, then u = x A."""
        _, _, n_components = self.sizes
        shared = [rows_dense(x).unsqueeze(2).expand(-1, -1, n_components, -1) for x in self.xs]
        return shared + [_inner(self.xs[k], A) for k, A in zip(self.lefts, self.As, strict=True)]


def _inner(x: Tensor, A: Tensor) -> Tensor:
    """u = x_b A_c of all components, [I, b, C, m], in one product."""
    n_instances, n_components, width, rank = A.shape
    At = A.mT.reshape(n_instances, n_components * rank, width)
    return torch.bmm(x, At.mT).view(n_instances, x.shape[1], n_components, rank)


def _of_instances(L: Tensor) -> tuple[int, ...]:
    """The strides of a link; that of the instances is 0 where they share it."""
    return (0 if L.shape[0] == 1 else L.stride(0), *L.stride()[1:])


def _run_rows(op: str, p: _Program, out: Tensor) -> None:
    n_instances, batch, n_components = p.sizes
    blocks = tuple(block(w) for w in p.widths)
    precision = dot_precision(out.dtype)
    config = rows_config(batch, blocks, precision, _launch.capability(out))
    n_b_tiles = cdiv(batch, config["BLOCK_B"])
    made = p.sources()
    terms = sorted(zip(p.terms[1::2], p.terms[::2], p.Fs, strict=True), key=lambda term: term[0])
    sources, Fs = tuple(made[k] for _, k, _ in terms), tuple(rows_dense(F) for _, _, F in terms)
    walks = [
        first_steps([made[k].shape[3] for barrier, k, _ in terms if barrier == j], config["BLOCK_K"])
        for j in range(len(blocks))
    ]
    launch(
        op, _rows_kernel, n_instances * n_b_tiles * n_components, out,
        sources, Fs, tuple(p.gates), tuple(p.links), out, n_instances, batch, n_components, n_b_tiles,
        tuple(s.shape[3] for s in sources), tuple(f for firsts, _ in walks for f in firsts),
        tuple(steps for _, steps in walks), tuple(p.widths),
        tuple(s.stride()[:3] for s in sources), tuple(F.stride()[:3] for F in Fs),
        tuple(g.stride() for g in p.gates), tuple(_of_instances(L) for L in p.links), *out.stride(),
        TERM_BARRIER=tuple(barrier for barrier, _, _ in terms),
        GATE_OF=tuple(p.gated.index(j) if j in p.gated else -1 for j in range(len(blocks))),
        LINK_FROM=tuple(p.ends[::2]), LINK_TO=tuple(p.ends[1::2]), BLOCK_WS=blocks, PRECISION=precision, **config,
    )  # fmt: skip


def _barrier(
    op: str,
    products: list[tuple[Tensor, Tensor]],
    gate: Tensor | None,
    grad: Tensor | None,
    out: Tensor,
    leave: str,
    dtype: torch.dtype,
    width: int,
) -> None:
    """One barrier of a part: rows [I, b, C, K] times matrices [I, C, K, W], summed, gated, into `out`."""
    if not products:  # nothing arrives
        out.zero_()
        return
    n_instances, batch, n_components = out.shape[:3]
    precision = dot_precision(dtype)
    config = barrier_config(batch, width, leave, precision, _launch.capability(out))
    n_b_tiles = cdiv(batch, config["BLOCK_B"])
    n_w_tiles = 1 if leave == "squares" else cdiv(width, config["BLOCK_W"])
    left, right = (tuple(side) for side in zip(*products, strict=True))
    ks, none = tuple(r.shape[3] for r in left), (0, 0, 0)
    launch(
        op, _barrier_kernel, n_instances * n_components * n_b_tiles * n_w_tiles, out,
        left, right, out if gate is None else gate, out if grad is None else grad, out,
        n_instances, batch, n_components, n_b_tiles, n_w_tiles, width, ks,
        *first_steps(ks, config["BLOCK_K"]), tuple(r.stride()[:3] for r in left), tuple(m.stride()[:3] for m in right),
        none if gate is None else gate.stride(), none if grad is None else grad.stride(), out.stride(),
        HAS_GATE=gate is not None, LEAVE=leave, PRECISION=precision, **config,
    )  # fmt: skip


class _Part:
    """A part of the batch and of the components, with its tangents and flows in memory."""

    def __init__(self, op: str, p: _Program) -> None:
        self.op, self.p, self.dtype = op, p, p.xs[0].dtype
        self.sources = [s.float() for s in p.sources()]
        self.Fs = [rows_dense(F.float()) for F in p.Fs]

    def _links(self, transposed: bool = False) -> Iterator[tuple[int, int, Tensor]]:
        """Every link with its ends, as if each component had it."""
        for start, end, L in zip(self.p.ends[::2], self.p.ends[1::2], self.p.links, strict=True):
            matrix = rows_dense((L.mT if transposed else L).float())
            shape = (*self.p.sizes[::2], *matrix.shape[1:])
            yield start, end, matrix.unsqueeze(1).expand(shape)

    def _empty(self, j: int) -> Tensor:
        return self.p.xs[0].new_empty(*self.p.sizes, self.p.widths[j], dtype=torch.float32)

    def _into(self, j: int, tangents: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        terms = zip(self.p.terms[::2], self.p.terms[1::2], self.Fs, strict=True)
        own = [(self.sources[k], F) for k, barrier, F in terms if barrier == j]
        return own + [(tangents[i], L) for i, end, L in self._links() if end == j]

    def tangents(self) -> list[Tensor]:
        """The gated tangents of all barriers but the last, [I, b, C, W]."""
        found: list[Tensor] = []
        for j in range(len(self.p.widths) - 1):
            out = self._empty(j)
            _barrier(self.op, self._into(j, found), self.p.gate(j), None, out, "gated", self.dtype, self.p.widths[j])
            found.append(out)
        return found

    def attributions(self, out: Tensor) -> None:
        last = len(self.p.widths) - 1
        into = self._into(last, self.tangents())
        _barrier(self.op, into, self.p.gate(last), None, out, "squares", self.dtype, self.p.widths[last])

    def flows(self, grad: Tensor) -> list[Tensor]:
        """The gradients of the sum of grad a by every tangent, [I, b, C, W]."""
        last = len(self.p.widths) - 1
        into, flows = self._into(last, self.tangents()), [self._empty(j) for j in range(last + 1)]
        _barrier(self.op, into, self.p.gate(last), grad, flows[last], "flow", self.dtype, self.p.widths[last])
        for i in reversed(range(last)):
            back = [(flows[end], L) for start, end, L in self._links(transposed=True) if start == i]
            _barrier(self.op, back, self.p.gate(i), None, flows[i], "gated", self.dtype, self.p.widths[i])
        return flows

    def add_gradients(self, flows: list[Tensor], grad_At: list[Tensor], grad_F: list[Tensor]) -> None:
        """To those of every At and F of the part's components, in float32."""
        p, n_inputs = self.p, len(self.p.xs)
        xs = [x.float() for x in p.xs]
        to_left: list[Tensor | None] = [None] * len(p.As)
        for t, (k, j) in enumerate(zip(p.terms[::2], p.terms[1::2], strict=True)):
            if k < n_inputs:
                grad_F[t] += torch.einsum("nbk,nbcw->nckw", xs[k], flows[j])
                continue
            grad_F[t] += torch.einsum("nbcm,nbcw->ncmw", self.sources[k], flows[j])
            more = torch.einsum("nbcw,ncmw->nbcm", flows[j], self.Fs[t])
            known = to_left[k - n_inputs]
            to_left[k - n_inputs] = more if known is None else known + more
        for n, du in enumerate(to_left):
            if du is not None:
                grad_At[n] += torch.einsum("nbcm,nbi->ncmi", du, xs[p.lefts[n]])


def _parts(p: _Program, numbers: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """The batch and the components in parts that hold so many float32 numbers for each pair: first fewer components,
    then fewer samples. The same for the same sizes."""
    n_instances, batch, n_components = p.sizes
    pairs = max(1, limit // (4 * max(1, numbers * n_instances)))
    components = min(n_components, max(LEAST_PART, pairs // max(1, batch)))
    samples = min(batch, max(LEAST_PART, pairs // max(1, components)))
    for c in range(0, n_components, max(components, 1)):
        for b in range(0, batch, max(samples, 1)):
            yield slice(b, min(b + samples, batch)), slice(c, min(c + components, n_components))


def attribution_tangent(*program: list) -> Tensor:
    """Attributions [I, b, C]."""
    op, p = "attribution_tangent", _Program(*program)
    out = p.xs[0].new_empty(p.sizes)
    inner = sum(A.shape[3] for A in p.As)
    if max(p.widths) <= WIDEST[dot_precision(out.dtype)]:
        for samples, components in _parts(p, inner, INNER_BYTES):
            _run_rows(op, p.part(samples, components), out[:, samples, components])
        return out
    for samples, components in _parts(p, inner + sum(p.widths[:-1]), CHUNK_BYTES):
        _Part(op, p.part(samples, components)).attributions(out[:, samples, components])
    return out


def attribution_tangent_backward(grad: Tensor, *program: list) -> list[Tensor]:
    """Gradients of every At, then of every F, recomputing the tangents part by part."""
    op, p = "attribution_tangent_backward", _Program(*program)
    grad_At = [A.new_zeros(A.mT.shape, dtype=torch.float32) for A in p.As]
    grad_F = [F.new_zeros(F.shape, dtype=torch.float32) for F in p.Fs]
    numbers = 2 * sum(p.widths) + 2 * sum(A.shape[3] for A in p.As)
    for samples, components in _parts(p, numbers, INNER_BYTES):
        part = _Part(op, p.part(samples, components))
        flows = part.flows(grad[:, samples, components])
        to_A, to_F = ([t[:, components] for t in ts] for ts in (grad_At, grad_F))
        part.add_gradients(flows, to_A, to_F)
    return [t.to(grad.dtype) for t in (*grad_At, *grad_F)]
