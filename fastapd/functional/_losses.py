"""The losses of the weights: faithfulness and simplicity; and the sparsity of the Lp form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastapd import losses
from fastapd.functional import _arguments
from fastapd.functional._arguments import Layers
from fastapd.ops import _check, component_sum_loss, schatten, schatten_factored

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def faithfulness_loss(A: Layers, B: Layers, weights: Layers, n_params: int | None = None) -> Float[Tensor, "*I"]:
    """How far the components are from summing to the target's weights; also called `param_match_loss`.

    L = sum_l ‖sum_c A_lc B_lc − W_l‖² / n_params

    Args:
        A: Layers: left factors [(n_instances,) n_components, d_in, rank].
        B: Layers: right factors [(n_instances,) n_components, rank, d_out].
        weights: Layers: the target's matrices [(n_instances,) d_in, d_out], y = x W orientation: the transpose of
            `nn.Linear.weight`.
        n_params: What to divide by; None for the entries of all weights of one instance. A tied matrix that is listed
            twice counts twice in both.

    Returns:
        A scalar, or [n_instances].

    Raises:
        ValueError: If shapes, layers or devices do not match, or n_params is not positive.
        TypeError: If a dtype is not floating or the dtypes differ.

    Gradient: in A, B and weights.
    Source: Braun et al. 2025, section 2; `calc_param_match_loss` of ApolloResearch/apd.
    """
    op = "faithfulness_loss"
    labels, (As, Bs, Ws) = _arguments.layers(op, A=A, B=B, weights=weights)
    _arguments.factors(op, labels, As, Bs)
    for label, a, b, W in zip(labels, As, Bs, Ws, strict=True):
        _check.tensors(op, **{f"A{label}": a, f"weights{label}": W})
        wanted = (*a.shape[:-3], a.shape[-2], b.shape[-1])
        if tuple(W.shape) != wanted:
            hint = ""
            if W.dim() >= 2 and tuple(W.mT.shape) == wanted:
                hint = "; transpose it, as nn.Linear stores [d_out, d_in]"
            raise ValueError(
                f"{op}: weights{label} must have the shape of the components' sum, {_arguments.size(wanted)}, "
                f"got {_check.shape(W)}{hint}"
            )
    if n_params is None:
        n_params = max(sum(math.prod(W.shape[-2:]) for W in Ws), 1)
    else:
        _arguments.positive(op, "n_params", n_params)
    total = torch.stack([component_sum_loss(a, b, W)[0] for a, b, W in zip(As, Bs, Ws, strict=True)]).sum(0)
    return total / n_params


param_match_loss = faithfulness_loss


def schatten_loss(
    A: Layers,
    B: Layers,
    mask: Bool[Tensor, "b *I C"] | Float[Tensor, "b *I C"],
    p: float,
    n_params: int,
    eps: float = 1e-16,
    exact: bool = False,
) -> Float[Tensor, "*I"]:
    """How much rank the active components carry: the simplicity loss.

    L = 1/(n_params batch) sum_l sum_b sum_c sum_i ( mask_bc ‖a_lci‖² ‖b_lci‖² + eps )^{p/2}

    and with exact, on the active components, singular values of A_lc B_lc for ‖a_lci‖ ‖b_lci‖.

    Args:
        A: Layers: left factors [(n_instances,) n_components, d_in, rank].
        B: Layers: right factors [(n_instances,) n_components, rank, d_out].
        mask: [batch, (n_instances,) n_components]: bool, which components are on; or weights of the dtype of A, which
            stand inside the power as in the research code's Lp form.
        p: The exponent, in (0, inf).
        n_params: Entries of all decomposed matrices of one instance; tied ones count as often as they are listed.
        eps: Inside the power. What it contributes where nothing is on, eps^{p/2} an entry, is in the loss.
        exact: True Schatten quasi-norms; only with a bool mask.

    Returns:
        A scalar, or [n_instances]; 0 for an empty batch.

    Raises:
        ValueError: If shapes, layers or devices do not match, or p, eps or n_params is out of range.
        TypeError: If a dtype is not floating or the dtypes differ, or exact is asked for with a float mask.

    Numerics: in float64 inside; factored, an upper bound of the exact loss for p <= 1, tight when the a_i and the b_i
        are orthogonal.
    Gradient: in A and B, and in a float mask; a second derivative is refused.
    Cost: with a bool mask by counts of samples, without a tensor [batch, n_components, rank].
    Source: Braun et al. 2025, section 2 (exact) and appendix (factored); `calc_schatten_loss` of ApolloResearch/apd.
    """
    op = "schatten_loss"
    labels, (As, Bs) = _arguments.layers(op, A=A, B=B)
    instances = _arguments.factors(op, labels, As, Bs)
    _check.exponent(op, p)
    _check.epsilon(op, eps)
    _arguments.positive(op, "n_params", n_params)
    own = As[0].shape[:-2]  # [(n_instances,) n_components]
    axes = "[batch, n_instances, n_components]" if instances else "[batch, n_components]"
    sizes = (mask.shape[0] if isinstance(mask, Tensor) and mask.dim() else "batch", *own)
    _arguments.mask(op, mask, sizes, axes, f"A{labels[0]}", As[0])
    if exact and mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool when exact is true, got {mask.dtype}")
    batch = mask.shape[0]
    op_of = schatten if exact else schatten_factored
    if mask.dtype == torch.bool:
        counts = mask.sum(0)  # [(n_instances,) n_components]
        terms = [op_of(a, b, counts, p, eps, batch) for a, b in zip(As, Bs, strict=True)]
    else:
        weights = _arguments.instances_first(mask, instances)
        terms = [schatten_factored(a, b, weights, p, eps) for a, b in zip(As, Bs, strict=True)]
    return torch.stack(terms).sum(0) / (n_params * max(batch, 1))


def lp_weights(
    attributions: Float[Tensor, "b *I C"], n_outputs: int, p: float, eps: float = 1e-16
) -> Float[Tensor, "b *I C"]:
    """The Lp form's weight of every component on every sample.

    w_bc = (|a_bc| / n_outputs + eps)^{p/2}

    Args:
        attributions: [batch, (n_instances,) n_components], sums of squares as `grad_attributions` gives them.
        n_outputs: Of the target.
        p: The exponent, in (0, inf).
        eps: Inside the power; bounds the slope near zero, which still reaches (p/2) eps^{p/2-1} / n_outputs.

    Returns:
        Weights of the shape of attributions.

    Raises:
        ValueError: If the shape is wrong or n_outputs, p or eps is out of range.
        TypeError: If attributions are not floating.

    Gradient: in attributions; zero at an attribution of exactly zero, as torch differentiates |a|.
    Source: `calc_lp_sparsity_loss` of ApolloResearch/apd.
    """
    return _lp_weights("lp_weights", attributions, n_outputs, p, eps)


def lp_sparsity_loss(
    attributions: Float[Tensor, "b *I C"], n_outputs: int, p: float, eps: float = 1e-16
) -> Float[Tensor, "*I"]:
    """How many components the batch needs, in the Lp form.

    L = mean_b sum_c (|a_bc| / n_outputs + eps)^{p/2}

    Args:
        attributions: [batch, (n_instances,) n_components], sums of squares as `grad_attributions` gives them.
        n_outputs: Of the target.
        p: The exponent, in (0, inf).
        eps: Inside the power.

    Returns:
        A scalar, or [n_instances]; 0 for an empty batch.

    Raises:
        ValueError: If the shape is wrong or n_outputs, p or eps is out of range.
        TypeError: If attributions are not floating.

    Gradient: in attributions.
    Source: Braun et al. 2025, appendix (Lp form); `calc_lp_sparsity_loss` of ApolloResearch/apd.
    """
    weights = _lp_weights("lp_sparsity_loss", attributions, n_outputs, p, eps)
    return weights.sum(-1).sum(0) / max(weights.shape[0], 1)


def _lp_weights(op: str, attributions: Tensor, n_outputs: int, p: float, eps: float) -> Tensor:
    _arguments.optional_instances(op, "attributions", attributions, "n_components")
    _check.whole(op, "n_outputs", n_outputs, 1, 2**53, "[1, 2**53]")
    _check.exponent(op, p)
    _check.epsilon(op, eps)
    return losses.lp_weights(attributions, n_outputs, p, eps)
