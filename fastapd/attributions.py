"""How much each component matters on each input: attributions [n_instances, batch, n_components], larger is more."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastapd import planning
from fastapd.components import Components
from fastapd.model import ComponentModel, Inputs, Record, factors
from fastapd.ops import attribution_reduce

if TYPE_CHECKING:
    from jaxtyping import Float


CHUNK_BYTES = 1 << 28
"""How much the gradients of the outputs that are taken at once may hold."""

TEMPORARIES = 3
"""So many gradients as wide as the widest site live beside those that are kept: a GELU's derivative takes three."""


MANY = 4096
"""Vector-Jacobian products a step, beyond which it is said that there is another way."""


@functools.cache
def _say_many(n: int) -> None:  # once for each number
    warnings.warn(
        f"decompose: exact attributions take {n} vector-Jacobian products a step, one for each output that a sample "
        "reaches; APD(attribution_probes=16) estimates them from 16, and inputs without positions have fewer",
        stacklevel=2,
    )


class Route(NamedTuple):
    """How the gradients of a target are taken that are not found by tangents.

    Attributes:
        n_outputs: Of one sample of the batch: all positions of a sequence that may depend on each other.
        n_directions: Vector-Jacobian products: as many as outputs, or as there are probes.
        chunk: How many of them at once.
        n_bytes: What their gradients hold, about, as far as the sites' widths tell. Where attributions are
            differentiated, those of all chunks are kept for it.
        narrowed: Whether the outputs are those before the last, wide matrix, of the same length.
        estimate: Whether the directions are random, and the attributions an unbiased estimate.
    """

    n_outputs: int
    n_directions: int
    chunk: int
    n_bytes: int
    narrowed: bool
    estimate: bool


def route(record: Record, probes: int | None = None, n_components: int = 0) -> Route:
    """How gradients of a record's outputs are taken.

    Args:
        record: From `ComponentModel.record_target(x, differentiable=True)`.
        probes: So many random directions may stand for all outputs, if that is fewer.
        n_components: That the gradients are multiplied with.
    """
    output = _measured(record)
    n_outputs = math.prod(output.shape[_axes(record) :])
    estimate = probes is not None and probes < n_outputs
    n_directions = probes if estimate and probes is not None else n_outputs
    some = next(iter(record.outputs.values()))
    widths = [y.shape[-1] for y in record.outputs.values()]
    inputs = [rows.shape[-1] for key, rows in record.inputs.items() if key not in record.uses]
    width = sum(widths) + n_components + TEMPORARIES * max([*widths, *inputs])
    each = some.shape[:2].numel() * width * some.element_size()
    chunk = max(1, min(n_directions, CHUNK_BYTES // max(each, 1)))
    return Route(n_outputs, n_directions, chunk, chunk * each, record.measured is not None, estimate)


def _measured(record: Record) -> Tensor:
    return record.output if record.measured is None else record.measured


def _axes(record: Record) -> int:
    return record.output.dim() - 1 if record.axes is None else record.axes


def n_outputs(record: Record) -> int:
    """How many outputs a sample reaches: those of its sequence where positions may depend on each other."""
    return math.prod(record.output.shape[_axes(record) :])


def output_gradients(record: Record) -> dict[str, Float[Tensor, "I b o d_out"]]:
    """Gradients of every output by the outputs of every site: one batched vector-Jacobian product a site.

    g_l[n, b, o, :] = d output[n, b's, o] / d y_l[n, b, :]

    Args:
        record: From `ComponentModel.record_target(x, differentiable=True)`.

    Returns:
        For each site the gradients [n_instances, batch, n_outputs, d_out], where outputs are those of b itself, or of
        all positions of its sequence if they may depend on each other.
    """
    output = record.output
    gradients = _gradients(record, output, _one_hot(output, _axes(record), slice(None)), keep=False)
    return {name: g.permute(1, 2, 0, 3) for name, g in zip(record.outputs, gradients, strict=True)}


def rows_of_jacobian(output: Float[Tensor, "... o"], wanted: Sequence[Tensor], **settings: bool) -> Sequence[Tensor]:
    """For each wanted tensor, the gradients of every output of each sample by it: [n_outputs, *its shape].

    Args:
        output: Its last axis holds the outputs; samples must not depend on each other.
        wanted: What it is differentiated by.
        settings: For `torch.autograd.grad`.
    """
    directions = _one_hot(output, output.dim() - 1, slice(None))
    return torch.autograd.grad(output, wanted, directions, is_grads_batched=True, **settings)


def _one_hot(output: Tensor, axes: int, chunk: slice) -> Tensor:
    """Directions over the outputs of each sample: a sample only reaches its own, so summing over them mixes nothing."""
    shape = output.shape[axes:]
    n_outputs = math.prod(shape)
    numbers = range(n_outputs)[chunk]
    directions = torch.zeros(len(numbers), n_outputs, dtype=output.dtype, device=output.device)
    directions.diagonal(numbers.start).fill_(1)
    return directions.view(-1, *[1] * axes, *shape).expand(-1, *output.shape)


def _random(output: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Directions of independent signs: the mean of v v^T is the identity."""
    signs = torch.randint(0, 2, (count, *output.shape), generator=generator, device=generator.device, dtype=torch.int8)
    return signs.to(output.device, output.dtype) * 2 - 1


def _gradients(record: Record, output: Tensor, directions: Tensor, keep: bool, batched: bool = True) -> list[Tensor]:
    """Of the sum over outputs, weighted by each direction, by what every site writes: [directions, I, b, d_out]."""
    wanted, n = list(record.outputs.values()), directions.shape[0]
    if batched:
        found = torch.autograd.grad(
            output, wanted, directions, retain_graph=keep, is_grads_batched=True, allow_unused=True
        )
    else:
        each = [
            torch.autograd.grad(output, wanted, v, retain_graph=keep or k + 1 < n, allow_unused=True)
            for k, v in enumerate(directions)
        ]
        found = [None if gs[0] is None else torch.stack(gs) for gs in zip(*each, strict=True)]
    return [
        y.new_zeros(1, *y.shape).expand(n, *y.shape) if g is None else g for g, y in zip(found, wanted, strict=True)
    ]


def _gradients_of(
    model: ComponentModel, record: Record, output: Tensor, directions: Tensor, keep: bool
) -> list[Tensor]:
    """All directions at once, or one after the other where something in the target has no batched derivative."""
    if record.axes is None or model.batched_gradients:
        return _gradients(record, output, directions, keep)
    if model.batched_gradients is None:
        try:
            found = _gradients(record, output, directions, keep=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            model.batched_gradients = False
        else:
            model.batched_gradients = True
            return found
    return _gradients(record, output, directions, keep, batched=False)


def gradient_attributions(
    model: ComponentModel, record: Record, norm: bool = False, probes: int | None = None
) -> Float[Tensor, "I b C"]:
    """First-order effect of each component's weights on the outputs.

    a_bc = sum_o ( sum_l <df_o/dW_l, P_c,l> )^2          with norm: sqrt(a_bc / n_outputs)

    Outputs o are all that sample b reaches: where positions of a sequence depend on each other, those of all positions.
    A matrix that is used several times, because layers are tied or run again, is summed over inside the square.

    Args:
        model: The target and its components.
        record: From `model.record_target(x, differentiable=True)`: where activations and gradients are taken, which
            count as constants.
        norm: The paper's form, which ranks components the same; its slope at zero is infinite.
        probes: So many random directions v in {-1, 1}^o stand for all outputs where that is fewer and no plan spares
            the gradients: a_bc is then the mean over v of ( sum_l <d(v f)/dW_l, P_c,l> )^2, an unbiased estimate. The
            model's generator `probes` draws them.

    Returns:
        Attributions [n_instances, batch, n_components], differentiable in the components.

    Source: Braun et al. 2025, appendix A.1; `calc_grad_attributions` of ApolloResearch/apd has no square root and no
        1/n_outputs.
    """
    squares = _gradient_squares(model, record, probes)
    return (squares / n_outputs(record)).sqrt() if norm else squares


def _gradient_squares(model: ComponentModel, record: Record, probes: int | None) -> Float[Tensor, "I b C"]:
    if record.found is not None and (plan := model.plan(record.found.values[0])).form == "tangent":
        assert not isinstance(model.chain, str)
        model.estimated = False
        rows = model.sites[0].to_instances
        return planning.attributions(plan, model.form(record.found), model.chain, record.found, model.components, rows)
    names = list(record.outputs)
    pairs = [factors(model.components, record, name) for name in names]
    arguments = [record.inputs[name] for name in names], [A for A, _ in pairs], [B for _, B in pairs]
    output, axes = _measured(record), _axes(record)
    way = route(record, probes, model.components.n_components)
    model.estimated = way.estimate
    if not output.requires_grad:
        raise ValueError(
            f"decompose: model must let gradients through from {names[0]} to what it returns, got an output without; "
            "it may run under no_grad, or return what it has detached"
        )
    if way.n_directions > MANY and not way.estimate:
        _say_many(way.n_directions)
    total: Tensor | None = None
    for first in range(0, way.n_directions, way.chunk):
        last = min(first + way.chunk, way.n_directions)
        if way.estimate:
            directions = _random(output, last - first, model.probe_generator())
        else:
            directions = _one_hot(output, axes, slice(first, last))
        gradients = _gradients_of(model, record, output, directions, keep=last < way.n_directions)
        gs = [g.detach().permute(1, 2, 0, 3) for g in gradients]  # [I, b, directions, d_out]
        n_directions, width = gs[0].shape[2], sum(g.shape[3] for g in gs)
        if model.components.n_components * (n_directions - width) > REDUCTION_COST * n_directions * width:
            gs = reduced_gradients(gs)
        xs, As, Bs = arguments
        part = attribution_reduce(xs, gs, As, Bs)
        total = part if total is None else total + part
        del gradients, gs  # or two chunks would be held
    if total is None:  # no outputs
        return record.inputs[names[0]].new_zeros(*record.inputs[names[0]].shape[:2], model.components.n_components)
    return total / way.n_directions if way.estimate else total


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
    model: ComponentModel, x: Inputs, output: Tensor, as_reference: bool = False
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
    n_components = model.components.n_components
    some = next(iter(model.components.B.values()))
    output = model.to_instances(output)
    batch = output.shape[1]
    found = []
    for c in range(n_components):
        mask = some.new_ones(model.components.n_instances, 1, n_components)
        mask[:, :, c].zero_()  # a number to be assigned would first become a tensor
        record = model.forward(x, mask)
        without = model.to_instances(record.output)
        if (samples := next(iter(record.inputs.values())).shape[1]) != batch:
            raise ValueError(
                f"decompose: attribution must not be 'ablation' where samples and outputs are not one to one, got "
                f"{samples} samples and {batch} outputs; take 'gradient'"
            )
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
        length = squared_lengths(x, *factors(components, record, name))
        total = length if total is None else total + length
    assert total is not None
    return total


def squared_lengths(
    x: Float[Tensor, "I b d_in"], A: Float[Tensor, "I C d_in m"], B: Float[Tensor, "I C m d_out"]
) -> Float[Tensor, "I b C"]:
    """‖x_b A_c B_c‖² of every sample and component of one layer."""
    u = torch.einsum("nbi,ncim->nbcm", x, A)
    return torch.einsum("nbcm,ncmk,nbck->nbc", u, B @ B.mT, u)
