"""Schatten sums of the components A_c B_c from their factors."""

from __future__ import annotations

from torch import Tensor

CHUNK_ELEMENTS = 1 << 23
"""How many elements of `[b, C, m]` the float-mask form holds at once."""


def column_products(A: Tensor, B: Tensor) -> Tensor:
    """`S[n, c, m] = |A[n, c, :, m]|^2 |B[n, c, m, :]|^2`, which stands for the squared singular values."""
    return A.square().sum(-2) * B.square().sum(-1)


def schatten_factored(A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int) -> Tensor:
    """`sum_c n_c sum_m (S_cm + eps)^{p/2} + (batch - n_c) m eps^{p/2}`; a negative batch leaves the second term out."""
    power = (column_products(A, B) + eps).pow(p / 2).sum(-1)  # [I, C]
    total = (counts.to(A.dtype) * power).sum(-1)
    if batch >= 0:
        off = batch * counts.shape[-1] - counts.sum(-1)
        total = total + off.to(A.dtype) * (A.shape[-1] * eps ** (p / 2))
    return total


def schatten_factored_masked(A: Tensor, B: Tensor, mask: Tensor, p: float, eps: float) -> Tensor:
    """`sum_b sum_c sum_m (mask_bc S_cm + eps)^{p/2}`, a bounded number of samples at a time."""
    S = column_products(A, B)
    total = A.new_zeros(A.shape[0])
    for chunk in chunks(mask, S):
        inner = mask[:, chunk].unsqueeze(-1) * S.unsqueeze(1)  # [I, b, C, m]
        total = total + (inner + eps).pow(p / 2).sum((-3, -2, -1))
    return total


def chunks(mask: Tensor, S: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, S.numel()))
    return [slice(b, min(b + step, mask.shape[1])) for b in range(0, mask.shape[1], step)]
