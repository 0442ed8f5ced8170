"""How the CUDA kernels of singular values and Schatten sums are started: outputs, workspace, and their limits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastapd import _cuda, _native
from fastapd.ops._batched_svd import _address, _gradients, _masked_fake, _shape, _svdvals_fake

MOST_RANK = 128
"""Beyond, the core of a component does not fit the shared memory of a block."""

MOST_IN_WARP = 32
"""Up to this rank a warp decomposes a component in its registers, or several; beyond, a block does, in shared memory.
Below, tests alone send components to a block."""


def _workspace(A: Tensor, *shape: int) -> Tensor:
    return A.new_empty(shape, dtype=torch.float64)


def _decompositions(B: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the Gram matrices of all components, twice for each factor, and for the scales of the factors."""
    n_instances, n_components, rank = B.shape[:3]
    return _workspace(B, n_instances, n_components, 4, rank, rank), _workspace(B, n_instances, n_components, 2)


def cuda_component_svdvals(A: Tensor, B: Tensor) -> Tensor:
    At, B = A.mT.contiguous(), B.contiguous()
    values = torch.empty_like(_svdvals_fake(A, B), dtype=torch.float64)
    grams, scales = _decompositions(B)
    arrays = [t.data_ptr() for t in (At, B, values, grams, scales)]
    _cuda.call("component_svdvals", B, *arrays, *_shape(A, B), MOST_IN_WARP)
    return values.to(B.dtype)


def _sum(
    op: str,
    exact: bool,
    A: Tensor,
    B: Tensor,
    counts: Tensor,
    p: float,
    eps: float,
    batch: int,
    scale: float,
    accumulate: bool,
    grad_At: Tensor,
    grad_B: Tensor,
) -> Tensor:
    At, B, counts = A.mT.contiguous(), B.contiguous(), counts.long().contiguous()
    n_instances, n_components, rank = B.shape[:3]
    # The only value of rank 1 is the product of the lengths. Double has none for the squares of all of its own numbers.
    exact = exact and not (rank == 1 and B.dtype != torch.float64)
    loss = B.new_empty(n_instances)
    grams, scales = _decompositions(B) if exact else (B.new_empty(0), B.new_empty(0))
    partials = _workspace(B, n_instances, n_components, 1 if exact else rank)
    inputs = (At.data_ptr(), B.data_ptr(), counts.data_ptr(), p, eps, batch, scale, accumulate)
    outputs = (loss.data_ptr(), _address(grad_At), _address(grad_B))
    workspace = (grams.data_ptr(), scales.data_ptr(), partials.data_ptr())
    _cuda.call(op, B, exact, *inputs, *outputs, *workspace, *_shape(A, B), MOST_IN_WARP)
    return loss


def cuda_schatten(A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, with_grad: bool) -> tuple:
    gradients = _gradients(A, B, with_grad)
    return _sum("schatten", True, A, B, counts, p, eps, batch, 1.0, False, *gradients), *gradients


def cuda_schatten_factored(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, with_grad: bool
) -> tuple:
    gradients = _gradients(A, B, with_grad)
    return _sum("schatten_factored", False, A, B, counts, p, eps, batch, 1.0, False, *gradients), *gradients


def cuda_schatten_accumulate(
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
    loss = _sum("schatten_accumulate", exact, A, B, counts, p, eps, batch, scale, True, grad_At, grad_B)
    torch.autograd.graph.increment_version((grad_At, grad_B))  # which torch's own in-place operations do
    return loss


def cuda_schatten_factored_masked(
    A: Tensor, B: Tensor, mask: Tensor, p: float, eps: float, with_grad: bool
) -> tuple[Tensor, ...]:
    native: Any = _native.load("_C_cuda").module
    At, B, mask = A.mT.contiguous(), B.contiguous(), mask.contiguous()
    loss, grad_At, grad_B, grad_mask = _masked_fake(A, B, mask, p, eps, with_grad)
    n_instances, n_components, rank = B.shape[:3]
    n_batch, n_across = native.schatten_masked_parts(n_components, mask.shape[1])
    norms = _workspace(B, 2, n_instances, n_components, rank)
    to_S = _workspace(B, n_batch if with_grad else 0, n_instances, n_components, rank)
    partials = _workspace(B, n_instances, n_batch * n_across)
    inputs = (At.data_ptr(), B.data_ptr(), mask.data_ptr(), p, eps, mask.shape[1])
    outputs = (loss.data_ptr(), _address(grad_At), _address(grad_B), _address(grad_mask))
    workspace = (norms.data_ptr(), to_S.data_ptr(), partials.data_ptr())
    _cuda.call("schatten_factored_masked", B, *inputs, *outputs, *workspace, *_shape(A, B))
    return loss, grad_At, grad_B, grad_mask


def limits(A: Tensor, B: Tensor, *rest: Any) -> list[str]:
    """Why the exact forms would refuse these factors."""
    rank = B.shape[2]
    return [f"the CUDA kernels take ranks up to {MOST_RANK}, not {rank}"] if rank > MOST_RANK else []


def accumulate_limits(A: Tensor, B: Tensor, *rest: Any) -> list[str]:
    """The same for `schatten_accumulate`, whose factored form takes any rank."""
    return limits(A, B) if rest[4] else []
