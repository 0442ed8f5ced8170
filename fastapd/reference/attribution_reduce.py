"""a_bc = sum over outputs of (sum over layers of <x_lb A_lc, g_lbo B_lc^T>)^2, the reverse form."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23
"""How many elements of `[b, C, d_out]` and `[b, C, n_outputs]` are held at once."""


def _chunks(xs: list[Tensor], gs: list[Tensor], Bs: list[Tensor]) -> list[slice]:
    n_instances, batch, _ = xs[0].shape
    n_components = Bs[0].shape[1]
    per_sample = n_instances * n_components * (max(B.shape[-1] + B.shape[-2] for B in Bs) + gs[0].shape[-2])
    step = max(1, CHUNK_ELEMENTS // max(1, per_sample))
    return [slice(b, min(b + step, batch)) for b in range(0, batch, step)]


def _of(g: Tensor, chunk: slice) -> Tensor:
    return g if g.shape[1] == 1 else g[:, chunk]


def _products(xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor], chunk: slice) -> Tensor:
    """`T[n, b, c, o] = sum_l <component output z_lbc, g_lbo>`; layers are summed before anything is squared."""
    total: Tensor | None = None
    for x, g, A, B in zip(xs, gs, As, Bs, strict=True):
        u = torch.einsum("nbi,ncim->nbcm", x[:, chunk], A)
        z = torch.einsum("nbcm,ncmo->nbco", u, B)
        t = z @ _of(g, chunk).mT  # [I, b, C, n_outputs]
        total = t if total is None else total + t
    assert total is not None
    return total


def attribution_reduce(xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> Tensor:
    n_instances, batch, _ = xs[0].shape
    out = xs[0].new_empty(n_instances, batch, As[0].shape[1])
    for chunk in _chunks(xs, gs, Bs):
        out[:, chunk] = _products(xs, gs, As, Bs, chunk).square().sum(-1)
    return out


def attribution_reduce_backward(
    grad: Tensor, xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]
) -> list[Tensor]:
    """Gradients of every At, then of every B, recomputing the products chunk by chunk."""
    grad_At = [torch.zeros_like(A.mT, memory_format=torch.contiguous_format) for A in As]
    grad_B = [torch.zeros_like(B, memory_format=torch.contiguous_format) for B in Bs]
    for chunk in _chunks(xs, gs, Bs):
        dt = 2 * _products(xs, gs, As, Bs, chunk) * grad[:, chunk].unsqueeze(-1)  # [I, b, C, n_outputs]
        for layer, (x, g, A, B) in enumerate(zip(xs, gs, As, Bs, strict=True)):
            u = torch.einsum("nbi,ncim->nbcm", x[:, chunk], A)
            dz = dt @ _of(g, chunk)  # [I, b, C, d_out]
            du = torch.einsum("nbco,ncmo->nbcm", dz, B)
            grad_At[layer] += torch.einsum("nbi,nbcm->ncmi", x[:, chunk], du)
            grad_B[layer] += torch.einsum("nbcm,nbco->ncmo", u, dz)
    return grad_At + grad_B
