"""Exact attributions of a few components of every sample, where an estimate says which these are.

The attribution of component c on sample b is the squared length of a directional derivative: that of all outputs when
every decomposed matrix moves along P_c, felt by the rows of b alone. One derivative in forward mode gives it without
any output's gradient, and for one sample of every element of the batch at once, each with a component of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastapd.model import Call, ComponentModel, Inputs, leading
from fastapd.ops import Selection, batch_topk, component_forward_selected

if TYPE_CHECKING:
    from jaxtyping import Float


def passes(model: ComponentModel, x: Inputs, batch: int, count: int) -> int:
    """How many directional derivatives refine `count` components of each of `batch` samples."""
    return _positions(model, x, batch) * min(count, model.components.n_components)


def _positions(model: ComponentModel, x: Inputs, batch: int) -> int:
    """Samples of one element of the batch, which may depend on each other."""
    first = leading(x)
    elements = first.shape[1] if model.sites[0].adapter.instances else first.shape[0] if first.dim() else 1
    return batch // max(elements, 1)


@torch.no_grad()
def refined(
    model: ComponentModel, x: Inputs, estimate: Float[Tensor, "I b C"], count: int, of_components: bool = False
) -> Float[Tensor, "I b C"]:
    """Estimated gradient attributions, exact for the largest of every sample.

    Args:
        model: The target and its components.
        x: The target's input.
        estimate: Without square root, as random directions give them.
        count: How many components of each sample are computed; with equal estimates the first.
        of_components: Whether derivatives are taken where all components run, instead of the target's own weights.

    Returns:
        The exact attributions of those; the others' estimates, but none above its sample's smallest exact one, so that
        no estimate comes before what was computed.

    Raises:
        NotImplementedError: If something in the target has no derivative in forward mode, or its layers see the
            positions of a sequence before the batch.

    Cost: `passes` forward passes with a tangent, and one to see that positions are where they should be.
    """
    n_instances, batch, n_components = estimate.shape
    count = min(count, n_components)
    if not batch:
        return estimate
    positions = _positions(model, x, batch)
    if positions > 1:
        _check_axes(model, x, estimate, of_components)
    chosen = estimate.sort(dim=-1, descending=True, stable=True).indices[..., :count]  # [I, b, count]
    exact = torch.empty_like(chosen, dtype=estimate.dtype)
    for position in range(positions):
        for r in range(count):
            here = slice(position, None, positions)  # this position of every element of the batch
            on = torch.zeros_like(estimate)
            on[:, here].scatter_(2, chosen[:, here, r : r + 1], 1.0)
            derivative = _along(model, x, batch_topk(on, batch // positions), of_components)
            exact[:, here, r] = derivative.reshape(n_instances, batch // positions, -1).square().sum(-1)
    found = torch.minimum(estimate, exact.amin(-1, keepdim=True))
    return found.scatter_(2, chosen, exact)


def _check_axes(model: ComponentModel, x: Inputs, like: Tensor, of_components: bool) -> None:
    """The second sample must be another position of the first element: it must reach no other element's output."""
    on = torch.zeros_like(like)
    on[:, 1] = 1.0
    derivative = _along(model, x, batch_topk(on, on.shape[-1]), of_components)
    axes = 2 if model.sites[0].adapter.instances else 1
    others = derivative.narrow(axes - 1, 1, derivative.shape[axes - 1] - 1)
    if bool(others.any()):
        raise NotImplementedError(
            "decompose: method.attribution_refined must be left out for this model, got layers that do not have the "
            "batch on their first axis, or a model that mixes its elements"
        )


def _along(model: ComponentModel, x: Inputs, selection: Selection, of_components: bool) -> Tensor:
    """The derivative of the output when the matrices of every sample move along its selected components."""

    def write(call: Call) -> Tensor:
        name = call.use.site
        W = call.matrix(model.components.weight(name) if of_components else model.weight(name))
        rows, before = forward_ad.unpack_dual(call.rows)
        moved = component_forward_selected(rows, *call.factors(model.components), selection)
        return forward_ad.make_dual(rows @ W, moved if before is None else moved + before @ W)

    try:
        # the other kernels of attention have no derivative in forward mode
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            output, derivative = forward_ad.unpack_dual(model.run(x, write))
    except (NotImplementedError, RuntimeError) as error:
        if "forward" not in str(error).lower():
            raise
        raise NotImplementedError(
            f"decompose: method.attribution_refined must be left out for this model, got {error}"
        ) from error
    return torch.zeros_like(output) if derivative is None else derivative
