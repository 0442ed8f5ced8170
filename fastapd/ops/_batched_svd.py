"""How simple components are: Schatten sums from the factors, without forming A_c B_c."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastapd.ops import _check
from fastapd.ops._op import define, with_instances
from fastapd.reference import batched_svd as reference

_OP = "schatten_factored"


def _check_schatten(A: Tensor, B: Tensor, weights: Tensor, p: float, eps: float, batch: int | None) -> bool:
    """Returns whether the factors have the instance axis."""
    instances = _check.factors(_OP, A, B)
    _check.exponent(_OP, p)
    _check.epsilon(_OP, eps)
    if not isinstance(weights, Tensor):
        raise TypeError(f"{_OP}: weights must be a torch.Tensor, got {type(weights).__name__}")
    if weights.dtype == torch.bool:
        raise TypeError(f"{_OP}: weights must be integer counts or a float mask, got torch.bool; use mask.sum(-2)")
    if weights.device != A.device:
        raise ValueError(f"{_OP}: weights must be on the device of A, {A.device}, got {weights.device}")
    leading = tuple(A.shape[:-2])  # [.., C]
    if weights.is_floating_point():
        _check.tensors(_OP, A=A, weights=weights)
        if weights.dim() != len(leading) + 1 or (*weights.shape[:-2], weights.shape[-1]) != leading:
            raise ValueError(
                f"{_OP}: weights, a float mask, must have shape [.., batch, n_components] for A {_check.shape(A)}, "
                f"got {_check.shape(weights)}"
            )
        if batch is not None:
            raise ValueError(f"{_OP}: batch must be None with a float mask, which has its own batch axis, got {batch}")
    else:
        if weights.dtype.is_complex:
            raise TypeError(f"{_OP}: weights must be integer counts or a float mask, got {weights.dtype}")
        if tuple(weights.shape) != leading:
            raise ValueError(
                f"{_OP}: weights, integer counts, must have shape [.., n_components] for A {_check.shape(A)}, "
                f"got {_check.shape(weights)}"
            )
        if batch is not None:
            _check.whole(_OP, "batch", batch, 0, 2**62, "[0, 2**62]")
    return instances


def _fake(A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int) -> Tensor:
    _check_schatten(A, B, counts, p, eps, None if batch < 0 else batch)
    return A.new_empty(A.shape[0])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.p, ctx.eps = inputs[3:5]


def _power_slope(base: Tensor, p: float) -> Tensor:
    """d/ds of s^{p/2}; zero where s is zero (only possible with eps = 0), where the one-sided slope is infinite."""
    slope = (p / 2) * base.pow(p / 2 - 1)
    return slope if p >= 2 else torch.where(base > 0, slope, torch.zeros_like(slope))


def _spread(dS: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the factors from that of S_cm = |a_cm|^2 |b_cm|^2."""
    norm_a, norm_b = A.square().sum(-2), B.square().sum(-1)  # [I, C, m]
    return 2 * (dS * norm_b).unsqueeze(-2) * A, 2 * (dS * norm_a).unsqueeze(-1) * B


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    A, B, counts = ctx.saved_tensors
    base = reference.column_products(A, B) + ctx.eps
    dS = (grad.unsqueeze(-1) * counts.to(A.dtype)).unsqueeze(-1) * _power_slope(base, ctx.p)
    return *_spread(dS, A, B), None, None, None, None


def _masked_fake(A: Tensor, B: Tensor, mask: Tensor, p: float, eps: float) -> Tensor:
    _check_schatten(A, B, mask, p, eps, None)
    return A.new_empty(A.shape[0])


def _masked_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    A, B, mask = ctx.saved_tensors
    S = reference.column_products(A, B)
    dS = torch.zeros_like(S)
    grad_mask = []
    for chunk in reference.chunks(mask, S):
        weight = mask[:, chunk].unsqueeze(-1)  # [I, b, C, 1]
        slope = _power_slope(weight * S.unsqueeze(1) + ctx.eps, ctx.p)  # [I, b, C, m]
        dS = dS + (weight * slope).sum(1)
        grad_mask.append((S.unsqueeze(1) * slope).sum(-1))
    scale = grad[:, None, None]
    d_mask = torch.cat(grad_mask, 1) * scale if grad_mask else torch.zeros_like(mask)
    return *_spread(scale * dS, A, B), d_mask if ctx.needs_input_grad[2] else None, None, None


_schatten = define(
    "schatten_factored",
    "(Tensor A, Tensor B, Tensor counts, float p, float eps, SymInt batch) -> Tensor",
    _fake,
    _setup,
    _backward,
)
_schatten_masked = define(
    "schatten_factored_masked",
    "(Tensor A, Tensor B, Tensor mask, float p, float eps) -> Tensor",
    _masked_fake,
    _setup,
    _masked_backward,
)


def schatten_factored(
    A: Float[Tensor, "*I C d_in m"],
    B: Float[Tensor, "*I C m d_out"],
    weights: Int[Tensor, "*I C"] | Float[Tensor, "*I b C"],
    p: float,
    eps: float = 1e-16,
    batch: int | None = None,
) -> Float[Tensor, "*I"]:
    """Sums the Schatten-p quasi-norms of the active components, with ‖a_i‖‖b_i‖ in place of singular values.

    counts n_c:  sum_c n_c sum_i (S_ci + eps)^{p/2}  [ + (batch - n_c) m eps^{p/2} ]
    float mask:  sum_b sum_c sum_i (mask_bc S_ci + eps)^{p/2}          with S_ci = ‖a_ci‖² ‖b_ci‖²

    Args:
        A: Left factors [.., n_components, d_in, rank].
        B: Right factors [.., n_components, rank, d_out].
        weights: How many samples use each component, [.., n_components] integers (`Selection.counts`); or a float mask
            [.., batch, n_components], which stands inside the power.
        p: The exponent, in (0, inf).
        eps: Added inside the power; keeps the slope finite at zero.
        batch: With counts, the number of samples: adds what the eps of the unused components contributes, as the
            research code does. None leaves that constant out.

    Returns:
        The sum, a scalar or [n_instances]; divide by n_params * batch for the research code's loss.

    Raises:
        ValueError: If shapes or devices do not match, or p or eps is out of range.
        TypeError: If a dtype is wrong.

    Numerics: the sum is an upper bound of the true Schatten sum for p <= 1, tight when the a_i and the b_i are
        orthogonal.
    Gradient: in A and B; in a float mask.
    Cost: O(C m (d_in + d_out)) with counts; plus b C m powers with a mask, never held at once.
    Source: Braun et al. 2025, appendix (practical loss), after Giampouras et al. 2020; `calc_schatten_loss` of
        ApolloResearch/apd.
    """
    instances = _check_schatten(A, B, weights, p, eps, batch)
    if not instances:
        A, B, weights = with_instances(A, B, weights)
    if weights.is_floating_point():
        total = _schatten_masked(A, B, weights, float(p), float(eps))
    else:
        total = _schatten(A, B, weights, float(p), float(eps), -1 if batch is None else batch)
    return total if instances else total.squeeze(0)
