"""How much each component matters on each sample: by gradient, by activation, by ablation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd.attributions import rows_of_jacobian, squared_lengths
from fastapd.functional import _arguments
from fastapd.functional._arguments import Layers
from fastapd.ops import _check, attribution_reduce
from fastapd.ops._op import outside_autocast, with_instances

if TYPE_CHECKING:
    from jaxtyping import Float


def output_gradients(output: Float[Tensor, "b *I o"], layer_outputs: Layers, retain_graph: bool = False) -> Any:
    """Gradients of every output of a network by the outputs of its layers, for each sample.

    g_l[b, o, :] = d output[b, o] / d y_l[b, :]

    Args:
        output: The target's outputs [batch, (n_instances,) n_outputs], with a graph; samples must not depend on each
            other (no batch normalisation over the batch).
        layer_outputs: Layers: what each decomposed layer put out on the way, [batch, (n_instances,) d_out], before the
            bias or after it.
        retain_graph: Whether output can be differentiated once more.

    Returns:
        A tensor, list or dict with the same layers, [batch, (n_instances,) n_outputs, d_out], without a graph.

    Raises:
        ValueError: If a shape does not match, or output does not depend on a layer.
        TypeError: If a dtype is not floating.

    Cost: one batched backward pass of n_outputs directions. `torch.compile` does not trace `torch.autograd.grad` unless
        it is told to: call this outside of what is compiled.
    Source: `calc_grad_attributions` of ApolloResearch/apd, which runs one backward pass for each output.
    """
    op = "output_gradients"
    labels, (ys,) = _arguments.layers(op, layer_outputs=layer_outputs)
    _check.tensors(op, output=output)
    if output.dim() < 1 or output.shape[-1] == 0:
        raise ValueError(
            f"{op}: output must have shape [batch, (n_instances,) n_outputs] with at least one output, "
            f"got {_check.shape(output)}"
        )
    for label, y in zip(labels, ys, strict=True):
        name = f"layer_outputs{label}"
        _check.tensors(op, **{name: y})
        if y.shape[:-1] != output.shape[:-1] or y.dim() != output.dim():
            raise ValueError(
                f"{op}: {name} must have the samples of output, {_arguments.size([*output.shape[:-1], 'd_out'])}, "
                f"got {_check.shape(y)}"
            )
        if not (y.requires_grad and output.requires_grad):
            raise ValueError(
                f"{op}: {name} must be in the graph of output, got a tensor without gradients; "
                "run the network under torch.enable_grad() and call .requires_grad_() on the first layer's output"
            )
    rows = rows_of_jacobian(output, ys, allow_unused=True, retain_graph=retain_graph)
    found = []
    for label, g in zip(labels, rows, strict=True):
        if g is None:
            raise ValueError(f"{op}: output must depend on layer_outputs{label}, got one that does not")
        found.append(g.detach().movedim(0, -2))  # [batch, (n_instances,) n_outputs, d_out]
    if isinstance(layer_outputs, Tensor):
        return found[0]
    if isinstance(layer_outputs, Mapping):
        return dict(zip(layer_outputs, found, strict=True))
    return found


def grad_attributions(xs: Layers, gs: Layers, A: Layers, B: Layers, norm: bool = False) -> Float[Tensor, "b *I C"]:
    """First-order effect of each component's weights on the outputs of the target.

    a_bc = sum_o ( sum_l <x_lb A_lc , g_lbo B_lc^T> )^2 = sum_o ( sum_l <df_o/dW_l , P_lc> )^2
    with norm: sqrt(a_bc / n_outputs)

    Args:
        xs: Layers: inputs in the target's forward pass [batch, (n_instances,) d_in].
        gs: Layers: gradients of every output by the layer's outputs [batch, (n_instances,) n_outputs, d_out], as
            `output_gradients` gives them; a batch axis of one stands for gradients that all samples share.
        A: Layers: left factors [(n_instances,) n_components, d_in, rank].
        B: Layers: right factors [(n_instances,) n_components, rank, d_out].
        norm: The paper's form, which ranks components the same; its slope at zero is infinite.

    Returns:
        Attributions [batch, (n_instances,) n_components], >= 0.

    Raises:
        ValueError: If shapes, layers or devices do not match.
        TypeError: If a dtype is not floating or the dtypes differ.
        NotImplementedError: If xs or gs require gradients: they are constants of the target.

    Numerics: layers are summed before the square, so layers of opposite sign cancel.
    Gradient: in A and B; a second derivative is refused.
    Source: Braun et al. 2025, appendix A.1 (with norm); `calc_grad_attributions` of ApolloResearch/apd (without).
    """
    op = "grad_attributions"
    labels, (As, Bs, inputs, gradients) = _arguments.layers(op, A=A, B=B, xs=xs, gs=gs)
    instances = _arguments.factors(op, labels, As, Bs)
    for label, a, b, x, g in zip(labels, As, Bs, inputs, gradients, strict=True):
        name_x, name_g, name_A, name_B = (f"{name}{label}" for name in ("xs", "gs", "A", "B"))
        _arguments.samples(op, name_x, x, "d_in", instances, name_A, a)
        _arguments.samples(op, name_g, g, "n_outputs, d_out", instances, name_A, a)
        _check.same(op, "d_in", name_x, x, -1, name_A, a, -2)
        _check.same(op, "d_out", name_g, g, -1, name_B, b, -1)
        _check.same(op, "batch", f"xs{labels[0]}", inputs[0], 0, name_x, x, 0)
        if g.shape[0] != 1:
            _check.same(op, "batch", name_x, x, 0, name_g, g, 0)
        _check.same(op, "n_outputs", f"gs{labels[0]}", gradients[0], -2, name_g, g, -2)
        for name, t in ((name_x, x), (name_g, g)):
            _check.no_gradient(op, name, t, "as it belongs to the target")
    squares = attribution_reduce(
        [_arguments.instances_first(x, instances) for x in inputs],
        [_arguments.instances_first(g, instances) for g in gradients],
        As,
        Bs,
    )
    squares = _arguments.instances_first(squares, instances)
    return (squares / max(gradients[0].shape[-2], 1)).sqrt() if norm else squares


def activation_attributions(xs: Layers, A: Layers, B: Layers) -> Float[Tensor, "b *I C"]:
    """Squared length of what each component writes, summed over layers.

    a_bc = sum_l ‖x_lb A_lc B_lc‖²

    Args:
        xs: Layers: inputs [batch, (n_instances,) d_in]; in the research code those of the component model's forward
            pass with all components on.
        A: Layers: left factors [(n_instances,) n_components, d_in, rank].
        B: Layers: right factors [(n_instances,) n_components, rank, d_out].

    Returns:
        Attributions [batch, (n_instances,) n_components].

    Raises:
        ValueError: If shapes, layers or devices do not match.
        TypeError: If a dtype is not floating or the dtypes differ.

    Numerics: through the Gram matrices B_c B_c^T, so a component that writes almost nothing may come out a rounding
        error below zero.
    Gradient: in xs, A and B.
    Cost: no [batch, n_components, d_out] is built.
    Source: `calc_activation_attributions` of ApolloResearch/apd.
    """
    op = "activation_attributions"
    labels, (As, Bs, inputs) = _arguments.layers(op, A=A, B=B, xs=xs)
    instances = _arguments.factors(op, labels, As, Bs)
    total: Tensor | None = None
    for label, a, b, x in zip(labels, As, Bs, inputs, strict=True):
        _arguments.samples(op, f"xs{label}", x, "d_in", instances, f"A{label}", a)
        _check.same(op, "d_in", f"xs{label}", x, -1, f"A{label}", a, -2)
        _check.same(op, "batch", f"xs{labels[0]}", inputs[0], 0, f"xs{label}", x, 0)
        if instances:
            each = outside_autocast(squared_lengths, x.transpose(0, 1), a, b).transpose(0, 1)
        else:
            each = outside_autocast(squared_lengths, *with_instances(x, a, b)).squeeze(0)
        total = each if total is None else total + each
    assert total is not None, "there is at least one layer"
    return total


@torch.no_grad()
def ablation_attributions(
    forward: Callable[[Tensor], Tensor], output: Float[Tensor, "b *I o"], n_components: int
) -> Float[Tensor, "b *I C"]:
    """How much the output changes without a component.

    a_bc = mean_o ( output_bo − forward(all but c)_bo )²

    Args:
        forward: From a mask [batch, (n_instances,) n_components] of the dtype of output, ones and zeros, to the
            component model's outputs on the same samples.
        output: Those with all components on, [batch, (n_instances,) n_outputs].
        n_components: C.

    Returns:
        Attributions [batch, (n_instances,) n_components], without a graph.

    Raises:
        ValueError: If a shape is wrong, or forward returns another one.
        TypeError: If output is not floating, n_components is not an int, or forward returns no tensor.

    Cost: n_components calls of forward.
    Source: `calc_ablation_attributions` of ApolloResearch/apd, as it is meant: at commit 4e29d43 it raises an error.
    """
    op = "ablation_attributions"
    _arguments.optional_instances(op, "output", output, "n_outputs")
    _check.whole(op, "n_components", n_components, 0, 2**31 - 1, "[0, 2**31)")
    found = []
    for c in range(n_components):
        mask = output.new_ones(*output.shape[:-1], n_components)  # a fresh one, as forward may keep it
        mask[..., c].zero_()
        without = forward(mask)
        if not isinstance(without, Tensor):
            raise TypeError(f"{op}: forward must return a torch.Tensor, got {type(without).__name__}")
        if without.shape != output.shape:
            raise ValueError(
                f"{op}: forward must return the shape of output, {_check.shape(output)}, got {_check.shape(without)}"
            )
        found.append((output - without).square().sum(-1) / max(output.shape[-1], 1))
    return torch.stack(found, -1) if found else output.new_zeros(*output.shape[:-1], 0)
