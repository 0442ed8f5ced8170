"""Which components run in each layer, as people say it: indices, a selection or a mask; and running the target so.

A layer with the target's matrix W and components P_c, on which a sample has weights s_c, computes
`Σ_c s_c x P_c`, and with the residual `x (W − Σ_c P_c) + Σ_c s_c x P_c = x W + Σ_c (s_c − 1) x P_c`. The last form is
what is computed: with every weight 1 it is the target itself, to the bit, however far the components are from W.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastapd.model import Call, ComponentModel
from fastapd.ops import Selection, component_forward, component_forward_selected, component_sum


def refuse(argument: str, condition: str, got: object, hint: str = "") -> str:
    """An error text in the house's words."""
    return f"Decomposition: {argument} must {condition}, got {got}{'; ' if hint else ''}{hint}"


def indices(given: Any, n_components: int, argument: str) -> list[int]:
    """Component numbers, checked: whole numbers in [0, C), each once."""
    if isinstance(given, Tensor):
        given = given.tolist()
    try:
        found = sorted(given) if isinstance(given, Set) else list(given)
    except TypeError:
        condition = "be indices of components, a Selection or a mask"
        raise TypeError(refuse(argument, condition, repr(given)[:80], "put a single index into a list")) from None
    for c in found:
        if isinstance(c, bool) or not hasattr(c, "__index__"):
            hint = "for a mask pass a bool or float tensor"
            raise TypeError(refuse(argument, "hold whole numbers", repr(c)[:80], hint))
    found = [int(c.__index__()) for c in found]
    wrong = [c for c in found if not 0 <= c < n_components]
    if wrong:
        raise ValueError(refuse(argument, f"be in [0, {n_components})", wrong))
    twice = sorted({c for c in found if found.count(c) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise ValueError(refuse(argument, "name each component once", f"{twice} more than once"))
    return found


class Layer(NamedTuple):
    """What runs in one layer."""

    active: Selection | Tensor | None
    """The components: a selection; weights [.., C], bool or float, whose other axes a site's input decides; None: all,
    with weight one."""
    residual: bool
    """Whether W minus the sum of the components runs too."""
    argument: str
    """What the caller calls it, for errors that only a site's input brings to light."""


def one(given: Any, n_components: int, always_on: int, argument: str) -> Selection | Tensor | None:
    """What one layer was given, as a selection or weights."""
    if given is None:
        return None
    if isinstance(given, Selection):
        if given.n_components not in (n_components, n_components - always_on):
            raise ValueError(refuse(argument, f"select among {n_components} components", given.n_components))
        return given
    if type(given).__module__ == "numpy" and hasattr(given, "__array__"):
        given = torch.as_tensor(given)
    if isinstance(given, Tensor) and (given.dtype == torch.bool or given.is_floating_point()):
        if given.dim() == 0 or given.shape[-1] != n_components:
            condition = f"be a mask whose last axis has the {n_components} components"
            raise ValueError(refuse(argument, condition, f"shape {list(given.shape)}"))
        if given.is_floating_point() and not bool(given.detach().isfinite().all()):
            raise ValueError(refuse(argument, "be a mask of finite weights", "NaN or infinity"))
        return given
    if isinstance(given, Tensor) and (given.dim() != 1 or given.is_complex()):
        condition = "be a mask of bools or floats, or have one axis of indices"
        raise TypeError(refuse(argument, condition, f"{given.dtype} of shape {list(given.shape)}"))
    weights = torch.zeros(n_components, dtype=torch.bool)
    weights[indices(given, n_components, argument)] = True
    return weights


def parse(model: ComponentModel, given: Any, residual: bool | None, always_on: int, argument: str) -> dict[str, Layer]:
    """What runs in every layer.

    Args:
        model: The target and its components.
        given: What the caller gave for all layers, or a mapping from layer names to that; layers that it does not name
            are as those given None.
        residual: None for a residual exactly where a layer was given None: such a layer is the target's own.
        always_on: How many components at the end a selection may leave out; they then run on every sample.
        argument: What the caller calls it.
    """
    if residual is not None and not isinstance(residual, bool):
        raise TypeError(refuse("residual", "be True, False or None", repr(residual)[:80]))
    names, n_components = [site.name for site in model.sites], model.components.n_components
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(refuse(argument, f"name layers among {', '.join(names)}", unknown))
    found = {}
    for name in names:
        its, said = (given.get(name), f"{argument}[{name!r}]") if isinstance(given, Mapping) else (given, argument)
        active = one(its, n_components, always_on, said)
        found[name] = Layer(active, active is None if residual is None else residual, said)
    return found


def dense(active: Selection | Tensor, call: Call, n_components: int, argument: str) -> Tensor:
    """The weights of a layer's components [I, b, C], or [I, 1, C] where they are the same for all samples.

    Args:
        active: The layer's selection or weights.
        call: The layer's input.
        n_components: C; components that a selection leaves out run on every sample.
        argument: What the caller calls the weights.
    """
    rows, shape = call.rows, call.shape
    n_instances, batch = rows.shape[:2]
    if isinstance(active, Selection):
        mask = active.mask if active.offsets.dim() == 2 else active.mask[None]
        active = torch.nn.functional.pad(mask, (0, n_components - mask.shape[-1]), value=True)
    given = active.to(rows.device, rows.dtype)
    if given.dim() == 1:
        return given.expand(n_instances, 1, -1)
    samples = [tuple(shape if call.use.ids is not None else shape[:-1])]
    samples.append((n_instances, batch))
    for axes in samples:
        if given.dim() == len(axes) + 1 and all(n in (1, m) for n, m in zip(given.shape, axes, strict=False)):
            constant = all(n == 1 for n in given.shape[1:-1]) and given.shape[0] in (1, n_instances)
            if constant and (n_instances > 1 or given.shape[0] == 1):
                return given.reshape(-1, 1, n_components).expand(n_instances, 1, -1)
            return given.expand(*axes, -1).reshape(n_instances, batch, -1)
    wanted = " or ".join(dict.fromkeys(str([*axes, n_components]) for axes in samples))
    condition = f"have shape {[n_components]} or {wanted} in layer {call.use.site}"
    raise ValueError(refuse(argument, condition, list(given.shape)))


def compute(model: ComponentModel, call: Call, layer: Layer) -> Tensor:
    """What a layer writes [I, b, d_out], before its bias, when only some of its components run."""
    rows, (A, B) = call.rows, call.factors(model.components)
    active, residual, name = layer.active, layer.residual, call.use.site
    if active is None:
        return rows @ call.matrix(model.weight(name) if residual else model.components.weight(name))
    if isinstance(active, Selection) and active.offsets.dim() == 2 and active.batch == rows.shape[1]:
        ranked = active.n_components
        y = component_forward_selected(rows, A[:, :ranked], B[:, :ranked], active)
        rest = component_sum(A[:, ranked:], B[:, ranked:]) if ranked < A.shape[1] else None
        if residual:
            missing = call.matrix(model.weight(name) - model.components.weight(name))
            rest = missing if rest is None else rest + missing
        return y if rest is None else y + rows @ rest
    mask = dense(active, call, A.shape[1], layer.argument)
    if residual:
        mask = mask - 1
    if mask.shape[1] == 1 != rows.shape[1]:
        y = rows @ weighted_sum(A, B, mask[:, 0])
    else:
        y = component_forward(rows, A, B, mask)
    return y + rows @ call.matrix(model.weight(name)) if residual else y


def weighted_sum(A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
    """Σ_c s_c A_c B_c [I, d_in, d_out], for weights [I, C]; a component of weight 0 is not computed."""
    if not weights.requires_grad:
        used = (weights != 0).any(0)
        A, B, weights = A[:, used], B[:, used], weights[:, used]
    if not A.shape[1]:
        return A.new_zeros(A.shape[0], A.shape[2], B.shape[3])
    return component_sum(A * weights[..., None, None], B)


def run(model: ComponentModel, x: Any, layers: Mapping[str, Layer]) -> Tensor:
    """The target's output when each layer runs as said, differentiable in x, weights and components."""
    return model.run(x, lambda call: compute(model, call, layers[call.use.site]))


@torch.no_grad()
def observe(model: ComponentModel, x: Any) -> tuple[Tensor, dict[str, Call]]:
    """The target's own output, and by its key every product with a decomposed matrix."""
    seen: dict[str, Call] = {}

    def write(call: Call) -> Tensor:
        seen[call.key] = call
        return call.rows @ call.matrix(model.weight(call.use.site))

    return model.run(x, write), seen
