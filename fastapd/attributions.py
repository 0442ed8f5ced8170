"""How much each component matters on each input: attributions [n_instances, batch, n_components], larger is more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastapd import planning
from fastapd.components import Components
from fastapd.model import ComponentModel, Record
from fastapd.ops import attribution_reduce

if TYPE_CHECKING:
    from jaxtyping import Float


def output_gradients(record: Record) -> dict[str, Float[Tensor, "I b o d_out"]]:
    """Gradients of every output by the outputs of every site: one batched vector-Jacobian product a site.

    g_l[n, b, o, :] = d output[n, b, o] / d y_l[n, b, :]

    Args:
        record: From `ComponentModel.record_target(x, differentiable=True)`; samples must not depend on each other.

    Returns:
        For each site the gradients [n_instances, batch, n_outputs, d_out].
    """
    gradients = rows_of_jacobian(record.output, list(record.outputs.values()))
    return {name: g.permute(1, 2, 0, 3) for name, g in zip(record.outputs, gradients, strict=True)}


def rows_of_jacobian(output: Float[Tensor, "... o"], wanted: Sequence[Tensor], **settings: bool) -> Sequence[Tensor]:
    """For each wanted tensor, the gradients of every output of each sample by it: [n_outputs, *its shape].

    Args:
        output: Its last axis holds the outputs; samples must not depend on each other.
        wanted: What it is differentiated by.
        settings: For `torch.autograd.grad`.
    """
    n_outputs = output.shape[-1]
    # One-hot directions over the outputs: sample b only reaches its own row, so summing over samples mixes nothing.
    directions = torch.eye(n_outputs, dtype=output.dtype, device=output.device)
    directions = directions.view(n_outputs, *[1] * (output.dim() - 1), n_outputs).expand(n_outputs, *output.shape)
    return torch.autograd.grad(output, wanted, directions, is_grads_batched=True, **settings)


def gradient_attributions(model: ComponentModel, record: Record, norm: bool = False) -> Float[Tensor, "I b C"]:
    """First-order effect of each component's weights on the outputs.

    a_bc = sum_o ( sum_l <df_o/dW_l, P_c,l> )^2          with norm: sqrt(a_bc / n_outputs)

    Args:
        model: The target and its components.
        record: From `model.record_target(x, differentiable=True)`: where activations and gradients are taken, which
            count as constants.
        norm: The paper's form, which ranks components the same; its slope at zero is infinite.

    Returns:
        Attributions [n_instances, batch, n_components], differentiable in the components.

    Source: Braun et al. 2025, appendix A.1; `calc_grad_attributions` of ApolloResearch/apd has no square root and no
        1/n_outputs.
    """
    squares = _gradient_squares(model, record)
    return (squares / record.output.shape[-1]).sqrt() if norm else squares


def _gradient_squares(model: ComponentModel, record: Record) -> Float[Tensor, "I b C"]:
    if record.found is not None and (plan := model.plan(record.found.values[0])).form == "tangent":
        assert not isinstance(model.chain, str)
        rows = model.sites[0].to_instances
        return planning.attributions(plan, model.form(record.found), model.chain, record.found, model.components, rows)
    gradients = {name: g.detach() for name, g in output_gradients(record).items()}
    names = [site.name for site in model.sites]
    factors = [model.components.factors(name) for name in names]
    gs = [gradients[name] for name in names]
    n_outputs, width = gs[0].shape[2], sum(g.shape[3] for g in gs)
    if model.components.n_components * (n_outputs - width) > REDUCTION_COST * n_outputs * width:
        gs = reduced_gradients(gs)
    return attribution_reduce(
        [record.inputs[name] for name in names], gs, [A for A, _ in factors], [B for _, B in factors]
    )


REDUCTION_COST = 8
"""How much dearer an operation of a small QR factorisation is than one of the attributions it saves."""


def reduced_gradients(gs: Sequence[Float[Tensor, "I b o d_out"]]) -> list[Float[Tensor, "I b r d_out"]]:
    """Fewer outputs that give the same attributions: sum_o <z, g_o>² is |G z|² = |R z|² for every z, with G = Q R.

    Args:
        gs: Gradients of every output by the layers' outputs; more outputs than the layers are wide together.

    Returns:
        r = sum d_out rows in place of the outputs.
    """
    R = torch.linalg.qr(torch.cat(list(gs), -1), mode="r").R  # [I, b, r, sum d_out]
    return list(R.split([g.shape[-1] for g in gs], -1))


@torch.no_grad()
def ablation_attributions(
    model: ComponentModel, x: Tensor, output: Tensor, as_reference: bool = False
) -> Float[Tensor, "I b C"]:
    """How much the output changes without a component: mean_o (f - f without c)^2.

    Args:
        model: The target and its components.
        x: The target's input.
        output: The component model's output with all components on, [n_instances, batch, n_outputs] or without the
            instance axis.
        as_reference: What the research code computes at commit 4e29d43, which unpacks the ablated output into three:
            an error, or with a batch of three a comparison with the first sample's output.

    Returns:
        Attributions [n_instances, batch, n_components]; no gradient flows through them.

    Raises:
        ValueError: With `as_reference`, unless the batch is three.

    Cost: one forward pass of the component model for each component.
    """
    site = model.sites[0]
    n_components = model.components.n_components
    batch = site.to_instances(x).shape[1]
    found = []
    for c in range(n_components):
        mask = site.weight.new_ones(model.components.n_instances, 1, n_components)
        mask[:, :, c].zero_()  # a number to be assigned would first become a tensor
        without = model.forward(x, mask.expand(-1, batch, -1)).output
        if as_reference:
            if batch != 3:
                few = "too many" if batch > 3 else "not enough"
                raise ValueError(
                    f"ablation_attributions: {few} values to unpack (expected 3), as the research code says"
                )
            without = without[..., :1, :]
        change = (output - without).square().mean(-1)
        found.append(change.reshape(model.components.n_instances, batch))
    return torch.stack(found, -1)


def activation_attributions(components: Components, record: Record) -> Float[Tensor, "I b C"]:
    """Squared length of what each component writes, summed over layers: sum_l ‖x_l A_c,l B_c,l‖².

    Args:
        components: The components.
        record: Of the component model with all components on, `ComponentModel.forward(x)`.

    Returns:
        Attributions [n_instances, batch, n_components], differentiable.

    Cost: through the Gram matrices B_c B_c^T, so that no [batch, C, d_out] is built.
    Source: `calc_activation_attributions` of ApolloResearch/apd.
    """
    total: Tensor | None = None
    for name, x in record.inputs.items():
        length = squared_lengths(x, *components.factors(name))
        total = length if total is None else total + length
    assert total is not None
    return total


def squared_lengths(
    x: Float[Tensor, "I b d_in"], A: Float[Tensor, "I C d_in m"], B: Float[Tensor, "I C m d_out"]
) -> Float[Tensor, "I b C"]:
    """‖x_b A_c B_c‖² of every sample and component of one layer."""
    u = torch.einsum("nbi,ncim->nbcm", x, A)
    return torch.einsum("nbcm,ncmk,nbck->nbc", u, B @ B.mT, u)
