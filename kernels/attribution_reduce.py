"""a_bc = sum over outputs of (sum over layers of <x_lb A_lc, g_lbo B_lc^T>)^2 on a GPU, the reverse form.

With u_lbc = x_lb A_lc, which the library's GEMM makes for all components at once, T[b, c, o] = sum_l <u_lbc B_lc,
g_lbo> is for every sample one GEMM over the concatenated outputs of the layers, squared and summed where it is made:
of [b, C, n_outputs], 17 GB in a middling problem, nothing is written.

Program (sample b, BLOCK_C components) owns BLOCK_C attributions. For BLOCK_O outputs at a time it walks the layers and
their d_out in steps of BLOCK_K, forms the components' outputs z = u B in registers by FOLDED multiplications a number,
multiplies by g on tensor cores, accumulates in float32, and squares only after the last layer. Programs come in groups
of GROUP samples, components outside, samples inside, so that both the gradients of a group and the factors of a tile of
components stay in the L2 cache.

Beyond rank FOLDED the multiplications that form z would cost more than the product: then the library makes z, a
bounded part of the batch at a time, and the kernel reads it. The backward pass takes T from the same kernel and leaves
the rest, plain products, to the library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from fastapd.kernels import _launch
from fastapd.kernels._launch import annotated, block, cdiv, dot_precision, launch
from fastapd.kernels._walk import first_steps, picked, rows_dense
from torch import Tensor

FOLDED = 8
"""The largest rank of all layers whose z is formed in the kernel."""

CHUNK_BYTES = 1 << 28
"""Of u, z and T of one part of the batch."""


def _flops(args: Mapping[str, Any]) -> tuple[float, float]:
    pairs = args["n_rows"] * args["n_components"]
    each = sum(2.0 * d * (args["n_outputs"] + r) for d, r in zip(args["widths"], args["ranks"], strict=True))
    tensors = (*args["us"], *args["Bs"], *args["gs"])
    return pairs * each, float(sum(t.numel() * t.element_size() for t in tensors) + 4 * pairs)


@triton.jit(launch_metadata=annotated(_flops))
def _reduce_kernel(
    us,  # for each layer u [I, b, C, m], or z [I, b, C, d_out] with rank 0; contiguous
    Bs,  # for each layer [I, C, m, d_out]
    gs,  # for each layer [I, b or 1, n_outputs, d_out]
    grad_ptr,  # [I, b, C], contiguous: of the attributions
    out_ptr,  # [I, b, C], or T [I, b, C, n_outputs] times 2 grad; contiguous
    n_rows,  # n_instances * batch
    batch,
    n_components,
    n_outputs,
    firsts,  # the first step of each layer
    n_steps,
    widths,  # d_out of each layer
    ranks,  # m of each layer, 0 where z is given
    u_sizes,  # the last axis of each u
    B_strides,  # of I, C and m
    g_strides,  # of I, b and n_outputs; that of b is 0 where all samples share g
    n_c_tiles,
    FORM_Z: tl.constexpr,
    STORE_T: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    group = pid // (GROUP * n_c_tiles)
    row = (group * GROUP + pid % GROUP).to(tl.int64)  # of [I, b]
    if row < n_rows:
        instance, b = row // batch, row % batch
        o_c = (pid // GROUP % n_c_tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < n_components
        p_us, p_bs, p_gs, c_strides, m_strides, o_strides = (), (), (), (), (), ()
        for layer in tl.static_range(len(us)):
            p_us = p_us + (us[layer] + row * n_components * u_sizes[layer],)
            p_bs = p_bs + (Bs[layer] + instance * B_strides[layer][0],)
            p_gs = p_gs + (gs[layer] + instance * g_strides[layer][0] + b * g_strides[layer][1],)
            c_strides, m_strides = c_strides + (B_strides[layer][1],), m_strides + (B_strides[layer][2],)
            o_strides = o_strides + (g_strides[layer][2],)
        attribution = tl.zeros((BLOCK_C,), dtype=tl.float32)
        for first in range(0, n_outputs, BLOCK_O):
            o_o = first + tl.arange(0, BLOCK_O).to(tl.int64)
            m_o = o_o < n_outputs
            acc = tl.zeros((BLOCK_C, BLOCK_O), dtype=tl.float32)
            for step in range(0, n_steps):
                begin, d_out, rank, u_size, p_u, p_b, p_g, stride_c, stride_m, stride_o = picked(
                    (firsts, widths, ranks, u_sizes, p_us, p_bs, p_gs, c_strides, m_strides, o_strides), firsts, step
                )
                o_k = (step - begin) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
                m_k = o_k < d_out
                m_z = m_c[:, None] & m_k[None, :]
                p_number = p_u + o_c * u_size
                if FORM_Z:
                    z = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)
                    p_row = p_b + o_c[:, None] * stride_c + o_k[None, :]
                    for _ in range(0, rank):
                        b_u = tl.load(p_number, mask=m_c, other=0.0).to(tl.float32)
                        z += b_u[:, None] * tl.load(p_row, mask=m_z, other=0.0).to(tl.float32)
                        p_number += 1
                        p_row += stride_m
                else:
                    z = tl.load(p_number[:, None] + o_k[None, :], mask=m_z, other=0.0).to(tl.float32)
                p_tile = p_g + o_o[None, :] * stride_o + o_k[:, None]
                b_g = tl.load(p_tile, mask=m_k[:, None] & m_o[None, :], other=0.0).to(tl.float32)
                acc = tl.dot(z, b_g, acc, input_precision=PRECISION)
            if STORE_T:
                scale = 2 * tl.load(grad_ptr + row * n_components + o_c, mask=m_c, other=0.0).to(tl.float32)
                p_t = out_ptr + (row * n_components + o_c[:, None]) * n_outputs + o_o[None, :]
                tl.store(p_t, (acc * scale[:, None]).to(out_ptr.dtype.element_ty), mask=m_c[:, None] & m_o[None, :])
            else:
                attribution += tl.sum(acc * acc, 1)
        if not STORE_T:
            tl.store(out_ptr + row * n_components + o_c, attribution.to(out_ptr.dtype.element_ty), mask=m_c)


def reduce_config(
    n_components: int, n_outputs: int, store: bool, precision: str, capability: tuple[int, int]
) -> dict[str, int]:
    """64 components and 128 outputs at a time; 64 before Hopper, whose products take their factors from registers.

    z, the parts of tf32x3 and the pointers of all layers compete for registers: steps of 16 leave room for them, and
    without `maxnreg` ptxas would rather spill a few than have fewer programs on a multiprocessor. Where T is stored, or
    factors are multiplied without tensor cores, tiles are smaller for the same reason.
    """
    few = store or precision == "ieee"
    block_c = block(n_components, 16, 32 if few else 64)
    block_o = block(n_outputs, 16, 128 if capability >= (9, 0) and not few else 64)
    return {
        "GROUP": 8,
        "BLOCK_C": block_c,
        "BLOCK_O": block_o,
        "BLOCK_K": 16,
        "num_warps": 8 if block_c * block_o >= 2048 else 4,
        "num_stages": 3,
        "maxnreg": 255,
    }


def _parts(n_samples: int, bytes_each: int) -> Iterator[slice]:
    """The batch in parts that hold CHUNK_BYTES; the same for the same sizes."""
    step = max(1, CHUNK_BYTES // max(1, bytes_each))
    return (slice(b, min(b + step, n_samples)) for b in range(0, n_samples, step))


def _of(g: Tensor, part: slice) -> Tensor:
    return g if g.shape[1] == 1 else g[:, part]


def _inner(x: Tensor, A: Tensor) -> Tensor:
    """u = x_b A_c of all components, [I, b, C, m], in one product."""
    n_instances, n_components, d_in, rank = A.shape
    At = A.mT.reshape(n_instances, n_components * rank, d_in)
    return torch.bmm(x, At.mT).view(n_instances, x.shape[1], n_components, rank)


def _run(
    op: str, us: Sequence[Tensor], Bs: Sequence[Tensor], gs: Sequence[Tensor], grad: Tensor | None, out: Tensor
) -> None:
    """Attributions into `out` [I, b, C], or T times twice their gradients into `out` [I, b, C, n_outputs]."""
    n_instances, batch, n_components = us[0].shape[:3]
    n_outputs = gs[0].shape[2]
    folded = _is_folded(Bs)
    left = [u if folded else torch.einsum("nbcm,ncmo->nbco", u, B).contiguous() for u, B in zip(us, Bs, strict=True)]
    Bs, gs = [rows_dense(B) for B in Bs], [rows_dense(g) for g in gs]
    precision = dot_precision(us[0].dtype)
    config = reduce_config(n_components, n_outputs, grad is not None, precision, _launch.capability(out))
    n_c_tiles = cdiv(n_components, config["BLOCK_C"])
    groups = cdiv(n_instances * batch, config["GROUP"])
    widths = tuple(B.shape[3] for B in Bs)
    launch(
        op, _reduce_kernel, groups * config["GROUP"] * n_c_tiles, out,
        tuple(left), tuple(Bs), tuple(gs), out if grad is None else grad, out,
        n_instances * batch, batch, n_components, n_outputs, *first_steps(widths, config["BLOCK_K"]), widths,
        tuple(B.shape[2] if folded else 0 for B in Bs), tuple(t.shape[3] for t in left),
        tuple(B.stride()[:3] for B in Bs),
        tuple((g.stride(0), 0 if g.shape[1] == 1 else g.stride(1), g.stride(2)) for g in gs), n_c_tiles,
        FORM_Z=folded, STORE_T=grad is not None, PRECISION=precision, **config,
    )  # fmt: skip


def _is_folded(Bs: Sequence[Tensor]) -> bool:
    return max(B.shape[2] for B in Bs) <= FOLDED


def _bytes(As: Sequence[Tensor], Bs: Sequence[Tensor], more: int) -> int:
    """Of u, z where it is made, and `more` numbers a component, for one sample of all instances."""
    numbers = sum(A.shape[3] + (0 if _is_folded(Bs) else B.shape[3]) for A, B in zip(As, Bs, strict=True))
    return 4 * As[0].shape[0] * As[0].shape[1] * (numbers + more)


def attribution_reduce(xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> Tensor:
    """Attributions [I, b, C]."""
    n_instances, batch, _ = xs[0].shape
    out = xs[0].new_empty(n_instances, batch, As[0].shape[1])
    for part in _parts(batch, _bytes(As, Bs, 0)):
        us = [_inner(x[:, part], A) for x, A in zip(xs, As, strict=True)]
        whole = part == slice(0, batch)
        found = out if whole else torch.empty_like(out[:, part], memory_format=torch.contiguous_format)
        _run("attribution_reduce", us, Bs, [_of(g, part) for g in gs], None, found)
        if not whole:
            out[:, part] = found
    return out


def attribution_reduce_backward(
    grad: Tensor, xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]
) -> list[Tensor]:
    """Gradients of every At, then of every B, recomputing T part by part of the batch."""
    op, wide = "attribution_reduce_backward", torch.float32
    n_outputs = gs[0].shape[2]
    grad_At = [A.new_zeros(A.mT.shape, dtype=wide) for A in As]
    grad_B = [B.new_zeros(B.shape, dtype=wide) for B in Bs]
    for part in _parts(xs[0].shape[1], _bytes(As, Bs, n_outputs + 2 * max(B.shape[3] for B in Bs))):
        us = [_inner(x[:, part], A) for x, A in zip(xs, As, strict=True)]
        dT = grad.new_empty(*us[0].shape[:3], n_outputs, dtype=wide)
        _run(op, us, Bs, [_of(g, part) for g in gs], grad[:, part].contiguous(), dT)
        for layer, (x, g, u, B) in enumerate(zip(xs, gs, us, Bs, strict=True)):
            g = _of(g, part).to(wide)
            dz = torch.einsum("nbco,nod->nbcd", dT, g[:, 0]) if g.shape[1] == 1 else dT @ g  # [I, b, C, d_out]
            du = torch.einsum("nbcd,ncmd->nbcm", dz, B.to(wide))
            grad_At[layer] += torch.einsum("nbcm,nbi->ncmi", du, x[:, part].to(wide))
            grad_B[layer] += torch.einsum("nbcm,nbcd->ncmd", u.to(wide), dz)
    return [t.to(grad.dtype) for t in (*grad_At, *grad_B)]
