"""The research code's attributions on fastapd's ops.

They take whatever modules offer `A` and `B`. What a function looks up in `spd.utils`, it looks up when it runs, so that
a function that somebody put there is used.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastapd.attributions import REDUCTION_COST, reduced_gradients
from fastapd.compat._apd_common import instances_first, same_names
from fastapd.ops import attribution_reduce

MOST_ENTRIES = 1 << 25
"""How large a tensor of gradients or of single components' effects may become before it is made in parts."""


def _utils(name: str) -> Any:
    """A function of `spd.utils` as it is now, or ours where that package is not loaded."""
    return getattr(sys.modules.get("spd.utils"), name, None) or globals()[name]


def _by_name(acts: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {key.removesuffix(suffix): t for key, t in acts.items()}


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


def _component_acts(x: Tensor, P: Tensor) -> Tensor:
    """What every component writes, [.., b, C, d_out]."""
    return torch.einsum("...bi,...cio->...bco", x, P)


def _squares(gs: list[Tensor], acts: list[Tensor]) -> Tensor:
    """sum_o (sum_l <g_lo, y_lc>)², [.., b, C], some samples at a time."""
    batch, n_outputs = acts[0].shape[-3], gs[0].shape[-2]
    at_once = max(1, MOST_ENTRIES // max(1, math.prod(acts[0].shape[:-3]) * n_outputs * acts[0].shape[-2]))
    parts = []
    for start in range(0, batch, at_once):
        n = min(at_once, batch - start)
        effect: Tensor | None = None
        for g, y in zip(gs, acts, strict=True):
            each = g.narrow(-3, start, n) @ y.narrow(-3, start, n).mT  # [.., n, o, C]
            effect = each if effect is None else effect + each
        assert effect is not None
        parts.append(effect.square().sum(-2))
    return torch.cat(parts, -2) if parts else acts[0].new_zeros(acts[0].shape[:-1])


def factor_attributions(
    target_out: Tensor,
    pre_weight_acts: Mapping[str, Tensor],
    post_weight_acts: Mapping[str, Tensor],
    factors: Mapping[str, tuple[Tensor, Tensor]],
) -> Tensor:
    """`calc_grad_attributions` from the factors: A_c = sum_o (sum_l <x_l A_c,l , g_lo B_c,l^T>)², without A B."""
    pre, post = _by_name(pre_weight_acts, ".hook_pre"), _by_name(post_weight_acts, ".hook_post")
    same_names("calculate_attributions", post_weight_acts=post, pre_weight_acts=pre, components=factors)
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
    same_names(
        "calc_grad_attributions", post_weight_acts=post, pre_weight_acts=pre, component_weights=component_weights
    )
    names = list(post)
    acts = [_component_acts(instances_first(pre[name].detach()), component_weights[name]) for name in names]
    total = target_out.new_zeros(*acts[0].shape[:-2], C)
    for found in _output_gradients(target_out, [post[name] for name in names]):
        total = total + _squares([_samples_first(g) for g in found], acts)
    return instances_first(total)


def _factored(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The factors of every module that has component weights; None if one has them in another form."""
    modules = {name: m for name, m in model.named_modules() if hasattr(type(m), "component_weights")}
    pairs = {name: (getattr(m, "A", None), getattr(m, "B", None)) for name, m in modules.items()}
    factors = {name: (A, B) for name, (A, B) in pairs.items() if isinstance(A, Tensor) and isinstance(B, Tensor)}
    return factors if factors and len(factors) == len(pairs) else None


def _component_weights(model: nn.Module) -> dict[str, Tensor]:
    modules: list[tuple[str, Any]] = list(model.named_modules())
    return {name: m.component_weights for name, m in modules if hasattr(m, "component_weights")}


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
