"""The terms of the training loss: pure functions of tensors, one value for each instance, not yet weighted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd.components import Components
from fastapd.ops import component_sum_loss, schatten, schatten_factored
from fastapd.ops._batched_svd import schatten_accumulate
from fastapd.ops._component_sum import component_sum_loss_accumulate

if TYPE_CHECKING:
    from jaxtyping import Float


def faithfulness(components: Components, weights: Mapping[str, Tensor], n_params: int) -> Float[Tensor, " I"]:
    """How far the components are from summing to the target's weights.

    L = sum_l ‖sum_c P_c,l − W_l‖² / n_params

    Args:
        components: The components.
        weights: The target's matrices [n_instances, d_in, d_out] by layer name.
        n_params: Entries of all decomposed matrices of one instance; tied ones count as often as they are used.

    Source: Braun et al. 2025, section 2; `calc_param_match_loss` of ApolloResearch/apd.
    """
    return _sum(
        component_sum_loss(*components.factors(name), weights[name])[0] * (uses / n_params)
        for name, uses in components.multiplicity.items()
    )


@torch.no_grad()
def faithfulness_accumulate(
    components: Components, weights: Mapping[str, Tensor], n_params: int, scale: float
) -> Float[Tensor, " I"]:
    """`faithfulness` without a graph; scale times its gradient replaces what the components' gradients hold."""
    terms = []
    for name, uses in components.multiplicity.items():
        factors, gradients = components.stored(name), components.gradients(name)
        each = uses / n_params
        loss = component_sum_loss_accumulate(*factors, weights[name], scale * each, *gradients, True)
        terms.append(loss * each)
    return _sum(terms)


_squares, _squares_backward = torch.ops.aten.mse_loss.default, torch.ops.aten.mse_loss_backward.default
_NOT_REDUCED = 0


class _MeanSquaredError(torch.autograd.Function):
    """mean_bo (f − f*)² of [I, b, o], in fewer passes backward than autograd takes."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target_output: Tensor) -> Tensor:
        ctx.save_for_backward(output, target_output)
        return _squares(output, target_output, _NOT_REDUCED).mean((-2, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        output, target_output = ctx.saved_tensors
        each = (grads[0] / (output.shape[-2] * output.shape[-1]))[:, None, None].expand_as(output)
        return _squares_backward(each, output, target_output, _NOT_REDUCED), None


def reconstruction(output: Tensor, target_output: Tensor) -> Float[Tensor, " I"]:
    """Mean squared error over samples and outputs: mean_bo (f − f*)².

    Args:
        output, target_output: [n_instances, batch, n_outputs], or any shape without the instance axis.
    """
    if output.dim() != 3:
        output, target_output = output.reshape(1, -1, 1), target_output.reshape(1, -1, 1)
    if output.shape[-2] * output.shape[-1] == 0:
        return output.sum((-2, -1))  # an empty batch has no error
    return _MeanSquaredError.apply(output, target_output.detach())


def kl_divergence(output: Tensor, target_output: Tensor) -> Float[Tensor, " I"]:
    """Mean over samples of KL(softmax f* ‖ softmax f), outputs being logits, in nats.

    Args:
        output, target_output: [n_instances, batch, n_outputs], or any shape without the instance axis.
    """
    log_p = target_output.detach().log_softmax(-1)
    p = log_p.exp()
    kl = (p * torch.where(p == 0, 0, log_p - output.log_softmax(-1))).sum(-1)  # 0 log 0 is 0
    if kl.numel() == 0:
        return kl.sum(-1) if output.dim() == 3 else kl.sum().reshape(1)  # an empty batch has no error
    return kl.mean(-1) if kl.dim() == 2 and output.dim() == 3 else kl.mean().reshape(1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": reconstruction, "kl": kl_divergence}


def lp_weights(
    attributions: Float[Tensor, "I b C"], n_outputs: int, p: float, eps: float = 1e-16
) -> Float[Tensor, "I b C"]:
    """The Lp form's weight of every component on every sample: (|a| / n_outputs + eps)^{p/2}.

    Args:
        attributions: Without square root, as `gradient_attributions` gives them.
        n_outputs: Of the target.
        p: The exponent; eps stands inside the power.

    Source: `calc_lp_sparsity_loss` of ApolloResearch/apd.
    """
    return (attributions.abs() / n_outputs + eps).pow(p / 2)


def lp_sparsity(weights: Float[Tensor, "I b C"]) -> Float[Tensor, " I"]:
    """mean_b sum_c of `lp_weights`; 0 for an empty batch."""
    each = weights.sum(-1)  # [I, b]
    return each.mean(-1) if each.shape[-1] else each.sum(-1)


def activation_reconstruction(
    outputs: Mapping[str, Tensor],
    target_outputs: Mapping[str, Tensor],
    activations: Mapping[str, Callable[[Tensor], Tensor]],
) -> Float[Tensor, " I"]:
    """Error of hidden activations: mean_b [ sum_l ‖h_l − h*_l‖² / sum_l d_l ].

    Args:
        outputs, target_outputs: Site outputs [n_instances, batch, d_out], before the bias.
        activations: For each site to compare, what is applied to its output first.

    Source: `calc_act_recon` of ApolloResearch/apd.
    """
    total: Tensor | None = None
    width = 0
    for name, act in activations.items():
        hidden, wanted = act(outputs[name]), act(target_outputs[name].detach())
        error = _squares(hidden, wanted, _NOT_REDUCED).sum(-1)  # [I, b]
        total = error if total is None else total + error
        width += outputs[name].shape[-1]
    if total is None:
        raise ValueError("activation_reconstruction: activations must name at least one site, got none")
    return total.sum(-1) / max(total.shape[-1] * width, 1)  # an empty batch has no error


def simplicity(
    components: Components,
    weights: Tensor,
    p: float,
    eps: float,
    n_params: int,
    batch: int,
    exact: bool = False,
) -> Float[Tensor, " I"]:
    """How much rank the active components carry, by a Schatten sum.

    L = 1/(n_params batch) sum_l [ sum_c n_c sum_i (sigma_i² + eps)^{p/2} + (batch − n_c) m eps^{p/2} ]

    with ‖a_i‖²‖b_i‖² in place of sigma_i² unless exact; for a float mask, the weights stand inside the power.

    Args:
        components: The components.
        weights: How many samples use each component, integers [n_instances, C]; or a float mask
            [n_instances, batch, C].
        p: The exponent of the quasi-norm.
        eps: Inside the power.
        n_params: As for `faithfulness`.
        batch: The number of samples.
        exact: Singular values; only with counts.

    Source: Braun et al. 2025, section 2 (exact) and appendix (factored); `calc_schatten_loss` of ApolloResearch/apd.
    """
    some = next(iter(components.B.values()))
    if batch == 0:
        return some.new_zeros(components.n_instances)
    terms = []
    for name, uses in components.multiplicity.items():
        A, B = components.factors(name)
        if exact:
            total = schatten(A, B, weights, p, eps, batch)
        else:
            total = schatten_factored(A, B, weights, p, eps, None if weights.is_floating_point() else batch)
        terms.append(total * (uses / (n_params * batch)))
    return _sum(terms)


@torch.no_grad()
def simplicity_accumulate(
    components: Components,
    counts: Tensor,
    p: float,
    eps: float,
    n_params: int,
    batch: int,
    exact: bool,
    scale: float,
) -> Float[Tensor, " I"]:
    """`simplicity` by counts without a graph; scale times its gradient is added to the components' gradients."""
    if batch == 0:
        return next(iter(components.B.values())).new_zeros(components.n_instances)
    terms = []
    for name, uses in components.multiplicity.items():
        A, B = components.factors(name)
        each = uses / (n_params * batch)
        gradients = components.gradients(name)
        total = schatten_accumulate(A, B, counts, p, eps, batch, exact, scale * each, *gradients)
        terms.append(total * each)
    return _sum(terms)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Of at least one tensor; one is returned as it is, since every operation of a small step counts."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first
