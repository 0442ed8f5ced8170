"""The research code's functions on fastapd's ops: its names, signatures, shapes and hook names.

Activations are [batch, n_instances, d] or [batch, d], factors A [n_instances, C, d_in, m] and B [n_instances, C, m,
d_out] or both without the leading axis. The ops want the instances first, so everything here permutes views, and
accepts whatever modules offer `A` and `B`. What a function looks up in `spd.utils`, it looks up when it runs: a
function that somebody put there is used.

Written from the formulas of ApolloResearch/apd at commit 4e29d43, whose behaviour `AS_REFERENCE` restores where fastapd
departs from it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastapd import losses
from fastapd.attributions import REDUCTION_COST, reduced_gradients
from fastapd.ops import (
    attribution_reduce,
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

MOST_ENTRIES = 1 << 25
"""How large a tensor of gradients or of single components' effects may become before it is made in parts."""

SPARSE = 0.25
"""Below this share of active components, a mask's pairs are listed instead of multiplied by zero."""


class _Settings:
    as_reference = False


settings = _Settings()
"""Set by `patch`; read whenever a function runs."""


def _utils(name: str) -> Any:
    """A function of `spd.utils` as it is now, or ours where that package is not loaded."""
    return getattr(sys.modules.get("spd.utils"), name, None) or globals()[name]


def _constant(t: Tensor) -> Tensor:
    """A value of the target. The research code leaves it attached, so that gradients pile up in the target."""
    return t if settings.as_reference else t.detach()


def instances_first(t: Tensor) -> Tensor:
    """[batch, n_instances, d] as [n_instances, batch, d]; [batch, d] as it is."""
    return t.transpose(0, 1) if t.dim() == 3 else t


# ------------------------------------------------------------------------------------------------------ attributions


def _by_name(acts: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {key.removesuffix(suffix): t for key, t in acts.items()}


def _same_names(op: str, **layers: Mapping[str, Any]) -> None:
    (first_name, first), *rest = layers.items()
    for name, other in rest:
        if other.keys() != first.keys():
            raise ValueError(f"{op}: {name} must name the layers of {first_name}, {list(first)}, got {list(other)}")


def _output_gradients(target_out: Tensor, posts: list[Tensor]) -> Iterator[list[Tensor]]:
    """d target_out[.., o] / d posts for some outputs at a time, each [n_outputs, *post.shape]; the graph is kept."""
    n_outputs = target_out.shape[-1]
    largest = max(p.numel() for p in posts)
    at_once = max(1, min(n_outputs, MOST_ENTRIES // max(1, largest)))
    eye = torch.eye(n_outputs, dtype=target_out.dtype, device=target_out.device)
    for rows in eye.split(at_once):
        seeds = rows.view(len(rows), *[1] * (target_out.dim() - 1), n_outputs).expand(len(rows), *target_out.shape)
        try:
            found = torch.autograd.grad(target_out, posts, seeds, retain_graph=True, is_grads_batched=True)
        except (RuntimeError, NotImplementedError):  # an operation of the target that cannot be batched
            each = [torch.autograd.grad(target_out, posts, seed, retain_graph=True) for seed in seeds]
            found = [torch.stack(layer) for layer in zip(*each, strict=True)]
        yield [g.detach() for g in found]


def _samples_first(g: Tensor) -> Tensor:
    """Gradients [o, batch, (n_instances,) d] as the ops want them, [(n_instances,) batch, o, d]."""
    return g.movedim(0, 1) if g.dim() == 3 else g.permute(2, 1, 0, 3)


def factor_attributions(
    target_out: Tensor,
    pre_weight_acts: Mapping[str, Tensor],
    post_weight_acts: Mapping[str, Tensor],
    factors: Mapping[str, tuple[Tensor, Tensor]],
) -> Tensor:
    """`calc_grad_attributions` from the factors: A_c = sum_o (sum_l <x_l A_c,l , g_lo B_c,l^T>)², without A B."""
    pre, post = _by_name(pre_weight_acts, ".hook_pre"), _by_name(post_weight_acts, ".hook_post")
    _same_names("calculate_attributions", post_weight_acts=post, pre_weight_acts=pre, components=factors)
    names = list(post)
    xs = [instances_first(pre[name].detach()) for name in names]
    As, Bs = [factors[name][0] for name in names], [factors[name][1] for name in names]
    total: Tensor | None = None
    for found in _output_gradients(target_out, [post[name] for name in names]):
        gs = [_samples_first(g) for g in found]
        n_outputs, width = gs[0].shape[-2], sum(g.shape[-1] for g in gs)
        if As[0].shape[-3] * (n_outputs - width) > REDUCTION_COST * n_outputs * width:
            gs = reduced_gradients(gs)
        part = attribution_reduce(xs, gs, As, Bs)
        total = part if total is None else total + part
    assert total is not None, "a target without outputs"
    return instances_first(total)


def calc_grad_attributions(
    target_out: Tensor,
    pre_weight_acts: dict[str, Tensor],
    post_weight_acts: dict[str, Tensor],
    component_weights: dict[str, Tensor],
    C: int,
) -> Tensor:
    """First-order effect of each component, from materialised component weights.

    A_c = sum_o ( sum_l < d target_out_o / d post_l , pre_l P_c,l > )²

    Args:
        target_out: The target's output [batch, (n_instances,) n_outputs], attached to `post_weight_acts`.
        pre_weight_acts: Each layer's input [batch, (n_instances,) d_in], keys `<layer>.hook_pre`.
        post_weight_acts: Each layer's output before the bias [batch, (n_instances,) d_out], keys `<layer>.hook_post`.
        component_weights: P [(n_instances,) C, d_in, d_out] by layer.
        C: The number of components.

    Returns:
        Attributions [batch, (n_instances,) C], differentiable in the component weights alone.

    Raises:
        ValueError: If the three do not name the same layers.

    Cost: O(batch C d_in d_out) a layer. `calculate_attributions` takes the factors and costs less.
    """
    pre, post = _by_name(pre_weight_acts, ".hook_pre"), _by_name(post_weight_acts, ".hook_post")
    _same_names("calc_grad_attributions", post_weight_acts=post, pre_weight_acts=pre, component_weights=component_weights)
    names = list(post)
    acts = []
    for name in names:
        x, P = instances_first(pre[name].detach()), component_weights[name]
        acts.append(torch.einsum("...bi,...cio->...bco", x, P))
    total = target_out.new_zeros(*acts[0].shape[:-2], C)
    for found in _output_gradients(target_out, [post[name] for name in names]):
        gs = [_samples_first(g) for g in found]
        at_once = max(1, MOST_ENTRIES // max(1, math.prod(gs[0].shape[:-3]) * gs[0].shape[-2] * C))
        parts = []
        for start in range(0, gs[0].shape[-3], at_once):
            effect: Tensor | None = None
            for g, y in zip(gs, acts, strict=True):
                each = g.narrow(-3, start, min(at_once, g.shape[-3] - start))
                each = each @ y.narrow(-3, start, each.shape[-3]).mT  # [.., b, o, C]
                effect = each if effect is None else effect + each
            assert effect is not None
            parts.append(effect.square().sum(-2))
        total = total + torch.cat(parts, -2) if parts else total
    return instances_first(total)


def _factored(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The factors of every module that has component weights; None if one has them in another form."""
    modules = {name: m for name, m in model.named_modules() if hasattr(type(m), "component_weights")}
    pairs = {name: (getattr(m, "A", None), getattr(m, "B", None)) for name, m in modules.items()}
    factors = {
        name: (A, B) for name, (A, B) in pairs.items() if isinstance(A, Tensor) and isinstance(B, Tensor)
    }
    return factors if factors and len(factors) == len(pairs) else None


def _component_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.component_weights for name, m in model.named_modules() if hasattr(m, "component_weights")}


def _gradient_attributions(
    model: Any, target_out: Tensor, pre_weight_acts: dict[str, Tensor], post_weight_acts: dict[str, Tensor]
) -> Tensor:
    own = _utils("calc_grad_attributions")
    factors = _factored(model)
    if own is calc_grad_attributions and factors is not None:
        return factor_attributions(target_out, pre_weight_acts, post_weight_acts, factors)
    return own(
        target_out=target_out,
        pre_weight_acts=pre_weight_acts,
        post_weight_acts=post_weight_acts,
        component_weights=_component_weights(model),
        C=model.C,
    )


def calculate_attributions(
    model: Any,
    batch: Tensor,
    out: Tensor,
    target_out: Tensor,
    pre_weight_acts: dict[str, Tensor],
    post_weight_acts: dict[str, Tensor],
    component_acts: dict[str, Tensor],
    attribution_type: str,
) -> Tensor:
    """Attributions [batch, (n_instances,) C] of the type that is asked for, from the model's factors.

    Args:
        model: The component model.
        batch: Its input.
        out: Its output with all components on; only "ablation" looks at it.
        target_out, pre_weight_acts, post_weight_acts: As for `calc_grad_attributions`; only for "gradient".
        component_acts: As for `calc_activation_attributions`; only for "activation".
        attribution_type: "gradient", "ablation" or "activation".

    Raises:
        ValueError: If the type is another.
    """
    if attribution_type == "gradient":
        return _gradient_attributions(model, target_out, pre_weight_acts, post_weight_acts)
    if attribution_type == "ablation":
        return _utils("calc_ablation_attributions")(spd_model=model, batch=batch, out=out)
    if attribution_type == "activation":
        return _utils("calc_activation_attributions")(component_acts=component_acts)
    raise ValueError(
        "calculate_attributions: attribution_type must be 'gradient', 'ablation' or 'activation', "
        f"got {attribution_type!r}"
    )


def collect_subnetwork_attributions(
    spd_model: Any, target_model: Any, device: str, n_instances: int | None = None
) -> Tensor:
    """Gradient attributions of every single feature: of a batch whose rows are the unit vectors.

    Returns:
        [n_features, (n_instances,) C].
    """
    batch = torch.eye(spd_model.n_features, device=device)
    if n_instances is not None:
        batch = batch.unsqueeze(1).repeat(1, n_instances, 1)
    target_out, cache = target_model.run_with_cache(
        batch, names_filter=lambda key: key.endswith((".hook_pre", ".hook_post"))
    )
    pre = {key: t for key, t in cache.items() if key.endswith("hook_pre")}
    post = {key: t for key, t in cache.items() if key.endswith("hook_post")}
    return _gradient_attributions(spd_model, target_out, pre, post)


@torch.no_grad()
def calc_ablation_attributions(spd_model: Any, batch: Tensor, out: Tensor) -> Tensor:
    """How much the output changes without a component: A_c = mean_o (out - out without c)².

    The research code unpacks the model's output into three, which raises an error, or with a batch of three compares
    with a sample of it; `patch(as_reference=True)` leaves that function in its place.

    Returns:
        Attributions [batch, (n_instances,) C]; no gradient flows through them. The model's parameters are as before
        when it returns, also by an exception.
    """
    has_instances = out.dim() == 3
    found = []
    for c in range(spd_model.C):
        kept = spd_model.set_subnet_to_zero(c, has_instances)
        try:
            without = spd_model(batch)
        finally:
            spd_model.restore_subnet(c, kept, has_instances)
        found.append((out - without).square().mean(-1))
    return torch.stack(found, -1)


def calc_activation_attributions(component_acts: dict[str, Tensor]) -> Tensor:
    """What each component writes, squared and summed over layers: A_c = sum_l ‖y_c,l‖².

    Args:
        component_acts: Of every layer [batch, (n_instances,) C, d_out].

    Raises:
        ValueError: If there is no layer or one has another number of axes.
    """
    total: Tensor | None = None
    for name, acts in component_acts.items():
        if acts.dim() not in (3, 4):
            raise ValueError(
                f"calc_activation_attributions: component_acts must have 3 or 4 axes, got {acts.dim()} for {name}"
            )
        each = acts.square().sum(-1)
        total = each if total is None else total + each
    if total is None:
        raise ValueError("calc_activation_attributions: component_acts must name a layer, got none")
    return total


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
    _same_names("calc_schatten_loss", As=As, Bs=Bs)
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
    _same_names("calc_act_recon", layer_acts=layer_acts, target_post_weight_acts=target_post_weight_acts)
    total: Any = 0.0
    width = 0
    for name, acts in layer_acts.items():
        total = total + (acts - _constant(target_post_weight_acts[name])).square().sum(-1)
        width += acts.shape[-1]
    return (total / width).mean(0)


# ------------------------------------------------------------------------------------------------- methods of the models


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
        y = rows @ component_sum(A, B)
    else:
        mask = topk_mask.reshape(-1, wanted[-1]) if flat else instances_first(topk_mask)
        y = _masked(rows, A, B, mask)
    return self.hook_post(y.reshape(*x.shape[:-1], y.shape[-1]) if flat else instances_first(y))


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
