"""How `csrc/cuda/attribution_reduce.cu` is started: what the library makes before and after it, in which parts."""

from __future__ import annotations

import array
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastapd import _cuda, _native
from fastapd._precision import precision
from fastapd.ops._attribution_reduce import _backward_fake

FOLDED = 8
"""The largest rank of a layer whose z = u B is formed in the kernel: by as many multiplications as there are ranks, for
every number that 32 or 128 outputs share. Beyond, the library makes z."""

CHUNK_BYTES = 1 << 28
"""Of u, z, dT and dz of one part of the batch."""

TENSOR_CORES = {"flops": 2e9}
"""From how much arithmetic on Triton's kernel comes first, which has tensor cores, twice the rate of float32 or more
even where three products make one. Below, a launch costs as much, and tiles of 16 are mostly air. Never for float64,
which Triton does not take, nor in the precision ieee, where it has no tensor cores either."""


def _most_layers() -> int:
    module: Any = _native.load("_C_cuda").module
    return module.attribution_reduce_layers


def limits(xs: list[Tensor], *rest: Any) -> list[str]:
    """Reasons to refuse the forward pass."""
    most = _most_layers()
    return [] if len(xs) <= most else [f"the CUDA kernel takes up to {most} layers, not {len(xs)}"]


def backward_limits(grad: Tensor, xs: list[Tensor], *rest: Any) -> list[str]:
    """Reasons to refuse the backward pass."""
    return limits(xs)


def triton_first(xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> str:
    """Why Triton comes before CUDA C++ for these sizes, or nothing."""
    n_instances, batch, _ = xs[0].shape
    flops = 2 * n_instances * batch * As[0].shape[1] * gs[0].shape[2] * sum(B.shape[3] for B in Bs)
    return f"of arithmetic: {flops:.1e} flops" if flops >= TENSOR_CORES["flops"] and precision() != "ieee" else ""


def triton_first_backward(grad: Tensor, *layers: Any) -> str:
    """The same for the backward pass."""
    return triton_first(*layers)


def _parts(n_samples: int, bytes_each: int) -> Iterator[slice]:
    """The batch in parts that hold CHUNK_BYTES; the same for the same sizes."""
    step = max(1, CHUNK_BYTES // max(1, bytes_each))
    return (slice(b, min(b + step, n_samples)) for b in range(0, n_samples, step))


def _bytes(As: list[Tensor], Bs: list[Tensor], more: int) -> int:
    """Of u, z where it is made, and `more` numbers a component, for one sample of all instances."""
    numbers = sum(B.shape[2] + (B.shape[3] if B.shape[2] > FOLDED else 0) for B in Bs)
    return As[0].shape[0] * As[0].shape[1] * (numbers + more) * max(4, As[0].element_size())


def _inner(x: Tensor, A: Tensor) -> Tensor:
    """u = x_b A_c of all components, [I, b, C, m], in one product."""
    n_instances, n_components, d_in, rank = A.shape
    At = A.mT.reshape(n_instances, n_components * rank, d_in)
    return torch.bmm(x, At.mT).view(n_instances, x.shape[1], n_components, rank)


def _of(g: Tensor, part: slice) -> Tensor:
    return g if g.shape[1] == 1 else g[:, part]


def _run(op: str, us: list[Tensor], gs: list[Tensor], Bs: list[Tensor], out: Tensor, grad: Tensor | None) -> None:
    """Attributions into `out` [I, b, C]; or 2 grad T into `out` [I, b, C, n_outputs]."""
    keep: list[Tensor] = []
    fields: list[int] = []
    for u, g, B in zip(us, gs, Bs, strict=True):
        rank = B.shape[2]
        if rank > FOLDED:
            u, rank = torch.einsum("nbcm,ncmo->nbco", u, B), -1
        tensors = [u.contiguous(), B.contiguous(), g if g.stride(3) == 1 else g.contiguous()]
        keep += tensors
        stride_i, stride_b, stride_o, _ = tensors[2].stride()
        strides = stride_i, 0 if g.shape[1] == 1 else stride_b, stride_o
        fields += [*(t.data_ptr() for t in tensors), B.shape[3], rank, *strides]
    layers = array.array("q", fields)
    arrays = [out.data_ptr()] if grad is None else [grad.data_ptr(), out.data_ptr()]
    n_instances, batch, n_components = us[0].shape[:3]
    sizes = n_instances, batch, n_components, gs[0].shape[2]
    _cuda.call(op, us[0], layers.buffer_info()[0], len(us), *arrays, *sizes)


def attribution_reduce(xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> Tensor:
    """Attributions [I, b, C]."""
    n_instances, batch, _ = xs[0].shape
    out = xs[0].new_empty(n_instances, batch, As[0].shape[1])
    for part in _parts(batch, _bytes(As, Bs, 0)):
        us = [_inner(x[:, part], A) for x, A in zip(xs, As, strict=True)]
        whole = part == slice(0, batch)
        found = out if whole else torch.empty_like(out[:, part], memory_format=torch.contiguous_format)
        _run("attribution_reduce", us, [_of(g, part) for g in gs], Bs, found, None)
        if not whole:
            out[:, part] = found
    return out


def attribution_reduce_backward(
    grad: Tensor, xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]
) -> list[Tensor]:
    """Gradients of every At, then of every B, recomputing T part by part of the batch."""
    n_outputs = gs[0].shape[2]
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    sums = [torch.zeros_like(t, dtype=wide) for t in _backward_fake(grad, xs, gs, As, Bs)]
    to_A, to_B = sums[: len(xs)], sums[len(xs) :]
    for part in _parts(xs[0].shape[1], _bytes(As, Bs, n_outputs + 2 * max(B.shape[3] for B in Bs))):
        us = [_inner(x[:, part], A) for x, A in zip(xs, As, strict=True)]
        dT = _cuda.partial_sums(grad, *us[0].shape[:3], n_outputs)
        _run("attribution_reduce_backward", us, [_of(g, part) for g in gs], Bs, dT, grad[:, part].contiguous())
        for layer, (x, g, u, B) in enumerate(zip(xs, gs, us, Bs, strict=True)):
            g = _of(g, part).to(wide)
            dz = torch.einsum("nbco,nod->nbcd", dT, g[:, 0]) if g.shape[1] == 1 else dT @ g  # [I, b, C, d_out]
            du = torch.einsum("nbcd,ncmd->nbcm", dz, B.to(wide))
            to_A[layer] += torch.einsum("nbcm,nbi->ncmi", du, x[:, part].to(wide))
            to_B[layer] += torch.einsum("nbcm,nbcd->ncmd", u.to(wide), dz)
    return [t.to(grad.dtype) for t in sums]
