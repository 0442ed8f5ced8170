"""y_b = sum over components of s_bc (x_b A_c) B_c, dense and from a grouped selection."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23
"""How many elements of gathered factors the selected forms hold at once."""


def component_forward(x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None) -> Tensor:
    """The dense form: all components are computed, then weighted."""
    u = torch.einsum("nbi,ncim->nbcm", x, A)
    if mask is not None:
        u = u * mask.unsqueeze(-1)
    return torch.einsum("nbcm,ncmo->nbo", u, B)


def _component_major(sample: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The component of each pair of the component-major list, [I, K], without asking the device for the counts; and
    whether it is a pair: with exact k, lists are padded to the longest."""
    place = torch.arange(sample.shape[1], device=sample.device).expand(sample.shape)
    component = torch.searchsorted(offsets[:, 1:].contiguous(), place.contiguous(), right=True)
    real = place < offsets[:, -1:]
    return torch.where(real, component, 0), real


def _chunks(n_pairs: int, elements_per_pair: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, elements_per_pair))
    return [slice(k, min(k + step, n_pairs)) for k in range(0, n_pairs, step)]


def component_forward_selected(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    sample: Tensor,
    offsets: Tensor,
    component: Tensor,
    sample_offsets: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """The sparse form: gathers the factors of the selected pairs, a bounded number at a time; `(y, u)`."""
    n_instances, batch, _ = x.shape
    rank, d_out = B.shape[-2:]
    n_pairs = sample.shape[1]
    instance = torch.arange(n_instances, device=x.device).unsqueeze(1)  # [I, 1]
    owner, real = _component_major(sample, offsets)  # [I, K]
    y = x.new_zeros(n_instances * batch, d_out)
    u = x.new_empty(n_instances, n_pairs, rank)
    for k in _chunks(n_pairs, n_instances * rank * (A.shape[-2] + d_out)):
        s, c = sample[:, k].long(), owner[:, k]
        products = torch.einsum("nki,nkim->nkm", x[instance, s], A[instance, c])
        u[:, k] = torch.where(real[:, k, None], products, 0)
        part = torch.einsum("nkm,nkmo->nko", u[:, k], B[instance, c])
        part = torch.where(real[:, k, None], part, 0)
        y.index_add_(0, (instance * batch + s).flatten(), part.flatten(0, 1))
    return y.view(n_instances, batch, d_out), u


def component_forward_selected_backward(
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    u: Tensor,
    sample: Tensor,
    offsets: Tensor,
    component: Tensor,
    sample_offsets: Tensor,
    position: Tensor,
    need_x: bool,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `component_forward_selected`; one that is not needed comes back empty."""
    n_instances, batch, d_in = x.shape
    n_components, rank, d_out = B.shape[1:]
    instance = torch.arange(n_instances, device=x.device).unsqueeze(1)
    owner, real = _component_major(sample, offsets)
    grad_x = x.new_zeros((n_instances * batch, d_in) if need_x else (0,))
    grad_At = x.new_zeros((n_instances * n_components, rank, d_in) if need_A else (0,))
    grad_B = x.new_zeros((n_instances * n_components, rank, d_out) if need_B else (0,))
    for k in _chunks(sample.shape[1], n_instances * rank * (d_in + d_out)):
        s, c = sample[:, k].long(), owner[:, k]
        row, group = (instance * batch + s).flatten(), (instance * n_components + c).flatten()
        gy = torch.where(real[:, k, None], grad_y[instance, s], 0)
        gu = torch.where(real[:, k, None], torch.einsum("nko,nkmo->nkm", gy, B[instance, c]), 0)
        if need_x:
            part = torch.einsum("nkm,nkim->nki", gu, A[instance, c])
            grad_x.index_add_(0, row, torch.where(real[:, k, None], part, 0).flatten(0, 1))
        if need_A:
            xs = torch.where(real[:, k, None], x[instance, s], 0)
            grad_At.index_add_(0, group, torch.einsum("nkm,nki->nkmi", gu, xs).flatten(0, 1))
        if need_B:
            us = torch.where(real[:, k, None], u[:, k], 0)  # a backend may leave the padding of u unwritten
            grad_B.index_add_(0, group, torch.einsum("nkm,nko->nkmo", us, gy).flatten(0, 1))
    return (
        grad_x.view(x.shape) if need_x else grad_x,
        grad_At.view(n_instances, n_components, rank, d_in) if need_A else grad_At,
        grad_B.view(B.shape) if need_B else grad_B,
    )


def component_forward_selected_accumulate(
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    u: Tensor,
    sample: Tensor,
    offsets: Tensor,
    component: Tensor,
    sample_offsets: Tensor,
    position: Tensor,
    need_x: bool,
    grad_At: Tensor,
    grad_B: Tensor,
) -> Tensor:
    """The gradient of x, or an empty tensor; those of the factors are added to what is in the buffers."""
    selection = (sample, offsets, component, sample_offsets, position)
    grad_x, more_At, more_B = component_forward_selected_backward(grad_y, x, A, B, u, *selection, need_x, True, True)
    grad_At.add_(more_At)
    grad_B.add_(more_B)
    return grad_x
