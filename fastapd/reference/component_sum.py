"""W = sum over components of A_c B_c."""

from __future__ import annotations

import torch
from torch import Tensor


def component_sum(A: Tensor, B: Tensor) -> Tensor:
    """`W[n, i, o] = sum_c sum_m A[n, c, i, m] B[n, c, m, o]`: one GEMM over the concatenated ranks."""
    return torch.einsum("ncim,ncmo->nio", A, B)


def component_sum_loss(A: Tensor, B: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`(sum_io (W - target)^2, W - target)`."""
    residual = component_sum(A, B) - target  # [I, d_in, d_out]
    return residual.square().sum((-2, -1)), residual
