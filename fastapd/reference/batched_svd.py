"""Singular values of the components A_c B_c and Schatten sums with their gradients, from the factors, in float64.

Every sum here has the gradient of its value as a further output, computed in the same pass; `with_grad` asks for it,
otherwise it comes back empty. Gradients of A are of At, [I, C, m, d_in].
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23
"""How many elements of `[b, C, m]` the float-mask form holds at once."""


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A = Q_A R_A and B^T = Q_B R_B, and the core X = R_A R_B^T with the singular values of A B; all in float64.

    LAPACK's SVD refuses the whole batch over one value that is not finite: such a core comes back as zeros, and the
    last result, [I, C, 1], is NaN for its component and zero for the others.
    """
    Q_A, R_A = torch.linalg.qr(A.double())
    Q_B, R_B = torch.linalg.qr(B.double().mT)
    X = R_A @ R_B.mT
    sound = X.isfinite().flatten(-2).all(-1)
    poison = torch.zeros_like(sound, dtype=X.dtype).masked_fill(~sound, torch.nan).unsqueeze(-1)
    return Q_A, R_A, Q_B, R_B, X.masked_fill(~sound[..., None, None], 0), poison


def component_svdvals(A: Tensor, B: Tensor) -> Tensor:
    """Descending, padded with zeros to the rank."""
    *_, X, poison = _core(A, B)
    values = torch.linalg.svdvals(X)
    values = torch.nn.functional.pad(values, (0, A.shape[-1] - values.shape[-1]))
    return (values + poison).to(A.dtype)


def component_svdvals_backward(grad: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """`dP = U diag(grad) V^T` carried to the factors; `(grad_At, grad_B)`."""
    return _factor_gradients(A, B, lambda sigma: grad[..., : sigma.shape[-1]].double())


def _factor_gradients(A: Tensor, B: Tensor, weight) -> tuple[Tensor, Tensor]:
    """Gradients of the factors when d loss / d sigma is `weight(sigma)`: no differences of singular values occur."""
    Q_A, R_A, Q_B, R_B, X, poison = _core(A, B)
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    K = (U * weight(sigma).unsqueeze(-2)) @ Vh + poison.unsqueeze(-1)  # [I, C, k_A, k_B]
    grad_A = Q_A @ (K @ R_B)
    grad_Bt = Q_B @ (K.mT @ R_A)
    return grad_A.mT.to(A.dtype).contiguous(), grad_Bt.mT.to(B.dtype).contiguous()


def _slope(base: Tensor, p: float) -> Tensor:
    """d/ds of s^{p/2}; zero where s is zero (only possible with eps = 0), where the slope of a root is infinite."""
    slope = (p / 2) * base.pow(p / 2 - 1)
    return slope if p >= 2 else torch.where(base == 0, torch.zeros_like(slope), slope)


def _weighted(counts: Tensor, values: Tensor) -> Tensor:
    """counts * values, where an unused component contributes nothing, whatever it holds."""
    while counts.dim() < values.dim():
        counts = counts.unsqueeze(-1)
    return torch.where(counts == 0, torch.zeros_like(values), counts.to(values.dtype) * values)


def _off(counts: Tensor, rank: int, p: float, eps: float, batch: int) -> Tensor:
    """What the eps of the unused (sample, component) pairs contributes."""
    off = torch.full((), eps, dtype=torch.float64, device=counts.device).pow(p / 2)
    unused = batch - counts.double()
    return torch.where(unused == 0, 0, unused * (rank * off)).sum(-1)  # none of an infinite power is nothing


def schatten(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The exact sum, from singular values."""
    sigma = component_svdvals(A.double(), B.double())  # [I, C, m]
    total = _weighted(counts, (sigma.square() + eps).pow(p / 2).sum(-1)).sum(-1)
    if batch >= 0:
        total = total + _off(counts, A.shape[-1], p, eps, batch)
    if not with_grad:
        return total.to(A.dtype), A.new_empty(0), B.new_empty(0)

    def weight(sigma: Tensor) -> Tensor:
        """Zero for values that are zero but for rounding; with eps = 0 the slope there would be anything."""
        rounding = 1e-16 * sigma[..., :1]
        return torch.where(sigma <= rounding, 0, 2 * sigma * _slope(sigma.square() + eps, p))

    grad_At, grad_B = _factor_gradients(A, B, weight)
    return total.to(A.dtype), _weighted(counts, grad_At), _weighted(counts, grad_B)


def _norms(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Squared lengths of the columns of A and the rows of B, [I, C, m]."""
    return A.double().square().sum(-2), B.double().square().sum(-1)


def _spread(dS: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the factors from that of S_cm = |a_cm|^2 |b_cm|^2."""
    norm_a, norm_b = _norms(A, B)
    grad_At = 2 * (dS * norm_b).unsqueeze(-1) * A.mT.double()
    grad_B = 2 * (dS * norm_a).unsqueeze(-1) * B.double()
    return grad_At.to(A.dtype), grad_B.to(B.dtype)


def schatten_factored(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with |a_i|^2 |b_i|^2 in place of squared singular values."""
    norm_a, norm_b = _norms(A, B)
    base = norm_a * norm_b + eps
    total = _weighted(counts, base.pow(p / 2).sum(-1)).sum(-1)
    if batch >= 0:
        total = total + _off(counts, A.shape[-1], p, eps, batch)
    if not with_grad:
        return total.to(A.dtype), A.new_empty(0), B.new_empty(0)
    grad_At, grad_B = _spread(_slope(base, p), A, B)
    return total.to(A.dtype), _weighted(counts, grad_At), _weighted(counts, grad_B)


def schatten_accumulate(
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
    """Either sum, with `scale` times its gradients added in place."""
    total, to_At, to_B = (schatten if exact else schatten_factored)(A, B, counts, p, eps, batch, True)
    grad_At.add_(to_At, alpha=scale)
    grad_B.add_(to_B, alpha=scale)
    return total


def schatten_factored_masked(
    A: Tensor, B: Tensor, mask: Tensor, p: float, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sum_b sum_c sum_m (mask_bc S_cm + eps)^{p/2}`, a bounded number of samples at a time."""
    norm_a, norm_b = _norms(A, B)
    S = norm_a * norm_b
    total, dS = S.new_zeros(A.shape[0]), torch.zeros_like(S)
    grad_mask = torch.empty_like(mask, memory_format=torch.contiguous_format) if with_grad else mask.new_empty(0)
    step = max(1, CHUNK_ELEMENTS // max(1, S.numel()))
    for first in range(0, mask.shape[1], step):
        chunk = slice(first, first + step)
        weight = mask[:, chunk].double().unsqueeze(-1)  # [I, b, C, 1]
        base = weight * S.unsqueeze(1) + eps
        total = total + base.pow(p / 2).sum((-3, -2, -1))
        if with_grad:
            slope = _slope(base, p)
            dS = dS + (weight * slope).sum(1)
            grad_mask[:, chunk] = (S.unsqueeze(1) * slope).sum(-1).to(mask.dtype)
    if not with_grad:
        return total.to(A.dtype), A.new_empty(0), B.new_empty(0), grad_mask
    grad_At, grad_B = _spread(dS, A, B)
    return total.to(A.dtype), grad_At, grad_B, grad_mask
