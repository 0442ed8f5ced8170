"""The research code's functions on fastapd's ops: its names, signatures, shapes and hook names.

Activations are [batch, n_instances, d] or [batch, d], factors A [n_instances, C, d_in, m] and B [n_instances, C, m,
d_out] or both without the leading axis. The ops want the instances first, so everything here permutes views.

Written from the formulas of ApolloResearch/apd at commit 4e29d43, whose behaviour `settings.as_reference` restores
where fastapd departs from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastapd import losses
from fastapd.compat._apd_attributions import calc_ablation_attributions as calc_ablation_attributions
from fastapd.compat._apd_attributions import calc_activation_attributions as calc_activation_attributions
from fastapd.compat._apd_attributions import calc_grad_attributions as calc_grad_attributions
from fastapd.compat._apd_attributions import calculate_attributions as calculate_attributions
from fastapd.compat._apd_attributions import collect_subnetwork_attributions as collect_subnetwork_attributions
from fastapd.compat._apd_common import instances_first, same_names, settings
from fastapd.ops import (
    batch_topk,
    component_forward,
    component_forward_selected,
    component_sum,
    component_sum_loss,
    sample_topk,
    schatten_factored,
)

EPS = 1e-16
"""Inside the powers of the Schatten and Lp terms."""

SPARSE = 0.25
"""Below this share of active components, a mask's pairs are listed instead of multiplied by zero."""


def _constant(t: Tensor) -> Tensor:
    """A value of the target. The research code leaves it attached, so that gradients pile up in the target."""
    return t if settings.as_reference else t.detach()


# ----------------------------------------------------------------------------------------------------------- selection


def _pairs(topk: float, batch: int) -> int:
    """int(topk * batch); a quotient that was computed in float32 counts as the whole number it came from.

    The exact selection divides the number of active inputs by the batch in float32, and for a batch that is no power of
    two half of all quotients come back one too small. A topk that is no float32 number has not come from there.
    """
    k = topk * batch
    whole = round(k)
    of_float32 = float(torch.tensor(topk, dtype=torch.float32)) == topk
    if of_float32 and not settings.as_reference and abs(k - whole) <= 2**-23 * max(1, whole):
        return whole
    return int(k)


def calc_topk_mask(attribution_scores: Tensor, topk: float, batch_topk: bool) -> Tensor:
    """Which components are among the largest.

    Args:
        attribution_scores: [batch, ..., C].
        topk: How many of each sample; or of the batch, times the batch size.
        batch_topk: Whether the int(topk * batch) largest of the whole batch are taken, or int(topk) of each sample.

    Returns:
        A bool mask of the same shape. Equal scores: lowest index first; `torch.topk`, which the research code asks and
        which `patch(as_reference=True)` asks here, promises nothing about them.

    Raises:
        ValueError: If there are fewer components than asked for.
    """
    scores = attribution_scores.detach()
    if not scores.is_floating_point():
        scores = scores.double()
    *leading, C = scores.shape
    rows = scores.reshape(leading[0], -1, C).transpose(0, 1)  # [.., batch, C]
    if settings.as_reference:
        flat = rows.flatten(-2) if batch_topk else rows
        largest = flat.topk(_pairs(topk, leading[0]) if batch_topk else int(topk), dim=-1).indices
        mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, largest, True).view(rows.shape)
    elif batch_topk:
        mask = _batch_mask(rows, _pairs(topk, leading[0]))
    else:
        mask = sample_topk(rows, int(topk)).mask
    return mask.transpose(0, 1).reshape(scores.shape)


def _batch_mask(rows: Tensor, k: int) -> Tensor:
    return batch_topk(rows, k).mask


# -------------------------------------------------------------------------------------------------------------- losses


def calc_recon_mse(output: Tensor, labels: Tensor, has_instance_dim: bool = False) -> Tensor:
    """Mean squared error over samples and outputs: a scalar, or [n_instances].

    Args:
        output, labels: [batch, n_outputs] or [batch, n_instances, n_outputs]; no gradient flows into the labels, which
            are the target's.
        has_instance_dim: Must be true for three axes.

    Raises:
        ValueError: If there are other axes.
    """
    if output.dim() == 3 and not has_instance_dim:
        raise ValueError("calc_recon_mse: has_instance_dim must be true for outputs of 3 axes, got false")
    if output.dim() not in (2, 3):
        raise ValueError(f"calc_recon_mse: output must have 2 or 3 axes, got {output.dim()}")
    if settings.as_reference or output.shape != labels.shape:
        error = (output - _constant(labels)).square()
        return error.mean((0, 2)) if error.dim() == 3 else error.mean()
    if output.dim() == 3:
        return losses.reconstruction(instances_first(output), instances_first(labels))
    return losses.reconstruction(output.unsqueeze(0), labels.unsqueeze(0)).squeeze(0)


def calc_schatten_loss(
    As: dict[str, Tensor], Bs: dict[str, Tensor], mask: Tensor, p: float, n_params: float, device: str
) -> Tensor:
    """How much rank the active components carry.

    L = 1/(n_params batch) sum_l sum_bci ( mask_bc ‖a_ci‖² ‖b_ci‖² + 1e-16 )^{p/2}

    Args:
        As, Bs: Factors [(n_instances,) C, d_in, m] and [(n_instances,) C, m, d_out] by layer.
        mask: [batch, (n_instances,) C], bool or the float weights of the Lp form.
        p: The exponent.
        n_params: What the sum is divided by.
        device: Not used; tensors stay where they are.

    Returns:
        A scalar, or [n_instances].

    Raises:
        ValueError: If As and Bs do not name the same layers, or p is not positive.

    Cost: O(C m (d_in + d_out)) a layer for a bool mask, by the number of samples that use a component.
    """
    same_names("calc_schatten_loss", As=As, Bs=Bs)
    batch = mask.shape[0]
    total = torch.zeros(mask.shape[1:-1], device=mask.device)
    counts = None if mask.is_floating_point() else mask.bool().sum(0)
    for name, A in As.items():
        if counts is not None:
            total = total + schatten_factored(A, Bs[name], counts, p, EPS, batch)
        else:
            total = total + schatten_factored(A, Bs[name], instances_first(mask).to(A.dtype), p, EPS)
    return total / n_params / batch


def calc_param_match_loss(
    param_names: list[str], target_model: nn.Module, spd_model: nn.Module, n_params: float, device: str
) -> Tensor:
    """How far the components are from summing to the target's weights: sum_l ‖sum_c A_c B_c − W_l‖² / n_params.

    Args:
        param_names: The layers, modules of both models.
        target_model: Has `weight` [(n_instances,) d_in, d_out] there; no gradient flows into it.
        spd_model: Has `A` and `B` there, or at least `weight`.
        n_params: What the sum is divided by.
        device: Not used.
    """
    total: Any = 0.0
    for name in param_names:
        wanted = _constant(target_model.get_submodule(name).weight)  # type: ignore[arg-type]
        module: Any = spd_model.get_submodule(name)
        A, B = getattr(module, "A", None), getattr(module, "B", None)
        if isinstance(A, Tensor) and isinstance(B, Tensor) and not wanted.requires_grad:
            total = total + component_sum_loss(A, B, wanted)[0]
        else:
            total = total + (module.weight - wanted).square().sum((-2, -1))
    return total / n_params


def calc_lp_sparsity_loss(out: Tensor, attributions: Tensor, step_pnorm: float) -> Tensor:
    """The Lp form's weight of every component on every sample: (|a| / n_outputs + 1e-16)^{p/2}, [batch, .., C].

    Args:
        out: The model's output; its last axis is n_outputs.
        attributions: [batch, (n_instances,) C].
        step_pnorm: The exponent p.
    """
    return losses.lp_weights(attributions, out.shape[-1], step_pnorm, EPS)


def calc_act_recon(target_post_weight_acts: dict[str, Tensor], layer_acts: dict[str, Tensor]) -> Tensor:
    """Error of hidden activations: mean_b [ sum_l ‖h_l − h*_l‖² / sum_l d_l ], a scalar or [n_instances].

    Args:
        target_post_weight_acts: The target's [batch, (n_instances,) d_out] by layer; no gradient flows into them.
        layer_acts: The component model's.

    Raises:
        ValueError: If they do not name the same layers.
    """
    same_names("calc_act_recon", layer_acts=layer_acts, target_post_weight_acts=target_post_weight_acts)
    total: Any = 0.0
    width = 0
    for name, acts in layer_acts.items():
        total = total + (acts - _constant(target_post_weight_acts[name])).square().sum(-1)
        width += acts.shape[-1]
    return (total / width).mean(0)


# ------------------------------------------------------------------------------------------- methods of the models


def _is_watched(hook: nn.Module) -> bool:
    return bool(hook._forward_hooks or hook._forward_pre_hooks or hook._backward_hooks or hook._backward_pre_hooks)


def component_layer(self: Any, x: Tensor, topk_mask: Tensor | None = None) -> Tensor:
    """`LinearComponent.forward`: y = sum_c mask_c (x A_c) B_c, between its hook points.

    Single components' outputs [batch, (n_instances,) C, d_out] are only built when somebody hooks
    `hook_component_acts`, as `run_with_cache` does if its filter lets that name through.

    Args:
        x: [batch, .., d_in].
        topk_mask: [batch, .., C], bool or of any weights; None for all components.

    Raises:
        ValueError: If the mask does not have a weight for each sample and component.
    """
    x = self.hook_pre(x)
    A, B = self.A, self.B
    wanted = (*x.shape[:-1], A.shape[-3])
    if topk_mask is not None and tuple(topk_mask.shape) != wanted:
        raise ValueError(
            f"LinearComponent: topk_mask must have shape {list(wanted)} [batch, .., C], got {list(topk_mask.shape)}"
        )
    if _is_watched(self.hook_component_acts) or (A.dim() == 4 and x.dim() != 3):
        inner = torch.einsum("b...i,...cim->b...cm", x, A)
        if topk_mask is not None:
            inner = inner * topk_mask.unsqueeze(-1)
        acts = torch.einsum("b...cm,...cmo->b...co", inner, B)
        self.hook_component_acts(acts)
        return self.hook_post(acts.sum(-2))
    flat = A.dim() == 3 and x.dim() != 2  # samples on several axes
    rows = x.reshape(-1, x.shape[-1]) if flat else instances_first(x)
    if topk_mask is None:
        y = _all_on(rows, A, B)
    else:
        mask = topk_mask.reshape(-1, wanted[-1]) if flat else instances_first(topk_mask)
        y = _masked(rows, A, B, mask)
    return self.hook_post(y.reshape(*x.shape[:-1], y.shape[-1]) if flat else instances_first(y))


def _all_on(rows: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """By the sum of the components, unless the samples are so few that it costs more than they do."""
    d_in, d_out = A.shape[-2], B.shape[-1]
    if rows.shape[-2] * (d_in + d_out) < d_in * d_out:
        return component_forward(rows, A, B)
    return rows @ component_sum(A, B)


def _masked(rows: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype is torch.bool:
        counts = mask.sum((-2, -1))  # [.., ]
        if int(counts.sum()) < SPARSE * mask.numel():
            # the pairs of a mask are the largest of its own zeros and ones
            return component_forward_selected(rows, A, B, batch_topk(mask.to(rows.dtype), _each(counts)))
    return component_forward(rows, A, B, mask if mask.dtype is torch.bool else mask.to(rows.dtype))


def _each(counts: Tensor) -> Any:
    return counts if counts.dim() else int(counts)


def component_layer_weight(self: Any) -> Tensor:
    """`LinearComponent.weight`: sum_c A_c B_c, [(n_instances,) d_in, d_out]."""
    return component_sum(self.A, self.B)


@torch.no_grad()
def set_As_to_unit_norm(self: Any) -> None:
    """`SPDModel.set_As_to_unit_norm`: scales every column of every A to unit length; a zero column stays zero.

    The research code divides by zero there, and everything is NaN from then on; `patch(as_reference=True)` leaves its
    method in place.
    """
    for name, module in self.named_modules():
        A = getattr(module, "A", None)
        if isinstance(A, Tensor) and not self.parent_is_transposed_linear(f"{name}.A"):
            length = A.data.norm(dim=-2, keepdim=True)
            A.data.div_(torch.where(length == 0, 1.0, length))
