"""How much each component matters on each input: attributions [n_instances, batch, n_components], larger is more."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fastapd.components import Components
from fastapd.model import ComponentModel, Record
from fastapd.ops import attribution_reduce


def output_gradients(record: Record) -> dict[str, Float[Tensor, "I b o d_out"]]:
    """Gradients of every output by the outputs of every site: one batched vector-Jacobian product a site.

    g_l[n, b, o, :] = d output[n, b, o] / d y_l[n, b, :]

    Args:
        record: From `ComponentModel.record_target(x, differentiable=True)`; samples must not depend on each other.

    Returns:
        For each site the gradients [n_instances, batch, n_outputs, d_out].
    """
    output, sites = record.output, list(record.outputs)
    n_outputs = output.shape[-1]
    # One-hot directions over the outputs: sample b only reaches its own row, so summing over samples mixes nothing.
    directions = torch.eye(n_outputs, dtype=output.dtype, device=output.device)
    directions = directions.view(n_outputs, *[1] * (output.dim() - 1), n_outputs).expand(n_outputs, *output.shape)
    wanted = [record.outputs[name] for name in sites]
    gradients = torch.autograd.grad(output, wanted, directions, is_grads_batched=True)
    return {name: g.permute(1, 2, 0, 3) for name, g in zip(sites, gradients, strict=True)}


@torch.no_grad()
def gradient_attributions(model: ComponentModel, record: Record) -> Float[Tensor, "I b C"]:
    """First-order effect of each component's weights on the outputs, from the target model.

    a_bc = sum_o ( sum_l <df_o/dW_l, P_c,l> )^2

    Args:
        model: The target and its components.
        record: From `model.record_target(x, differentiable=True)`.

    Returns:
        Attributions [n_instances, batch, n_components]; no gradient flows through them.

    Source: Braun et al. 2025, appendix A.1, without its square root and 1/n_outputs, which do not change the order;
        `calc_grad_attributions` of ApolloResearch/apd.
    """
    with torch.enable_grad():
        gradients = output_gradients(record)
    names = [site.name for site in model.sites]
    factors = [model.components.factors(name) for name in names]
    return attribution_reduce(
        [record.inputs[name] for name in names],
        [gradients[name].detach() for name in names],
        [A for A, _ in factors],
        [B for _, B in factors],
    )


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
        A, B = components.factors(name)
        u = torch.einsum("nbi,ncim->nbcm", x, A)
        length = torch.einsum("nbcm,ncmk,nbck->nbc", u, B @ B.mT, u)
        total = length if total is None else total + length
    assert total is not None
    return total
