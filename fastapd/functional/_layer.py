"""A layer as the sum of its components."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastapd.functional import _arguments
from fastapd.ops import Selection, _check, component_forward, component_forward_selected, component_sum
from fastapd.ops._op import outside_autocast

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def component_weights(
    A: Float[Tensor, "*I C d_in m"], B: Float[Tensor, "*I C m d_out"]
) -> Float[Tensor, "*I C d_in d_out"]:
    """Every component's own matrix.

    P_c = A_c B_c

    Args:
        A: Left factors [(n_instances,) n_components, d_in, rank].
        B: Right factors [(n_instances,) n_components, rank, d_out].

    Returns:
        [(n_instances,) n_components, d_in, d_out], in y = x P orientation: n_components times the layer's size, which
        is for analysis; `component_sum` adds them up without building them.

    Raises:
        ValueError: If shapes or devices do not match.
        TypeError: If a dtype is not floating or the dtypes differ.

    Gradient: in A and B.
    Source: `LinearComponent.component_weights` of ApolloResearch/apd.
    """
    _check.factors("component_weights", A, B)
    return outside_autocast(torch.matmul, A, B)


def masked_linear(
    x: Float[Tensor, "*b *I d_in"],
    A: Float[Tensor, "*I C d_in m"],
    B: Float[Tensor, "*I C m d_out"],
    mask: Bool[Tensor, "*b *I C"] | Float[Tensor, "*b *I C"] | Selection | None = None,
    bias: Float[Tensor, "*I d_out"] | None = None,
) -> Float[Tensor, "*b *I d_out"]:
    """Runs a layer on a weighted sum of its components, with weights for each sample.

    y_b = sum_c mask_bc (x_b A_c) B_c + bias

    Args:
        x: Inputs [.., d_in], or [.., n_instances, d_in] if the factors have instances; every axis before these counts
            samples, and there may be none or several (batch and position, say).
        A: Left factors [(n_instances,) n_components, d_in, rank].
        B: Right factors [(n_instances,) n_components, rank, d_out].
        mask: Weights [.., (n_instances,) n_components], bool or of the dtype of x; None for all on. Or the `Selection`
            of `fastapd.ops.batch_topk` for scores [(n_instances,) samples, n_components], instances first: then only
            the selected pairs are computed.
        bias: [d_out], or [n_instances, d_out]; never masked.

    Returns:
        Outputs [.., (n_instances,) d_out].

    Raises:
        ValueError: If shapes or devices do not match.
        TypeError: If a dtype is not floating or the dtypes differ.

    Gradient: in x, the factors, a float mask and bias; with a selection, a second derivative is refused.
    Cost: with a mask two products over all components; with None the components are summed first; with a selection of
        K pairs, samples * n_components / K times less than with a mask.
    Source: `LinearComponent.forward` of ApolloResearch/apd.
    """
    op = "masked_linear"
    instances = _check.factors(op, A, B)
    _check.tensors(op, A=A, x=x)
    if x.dim() < 1 + instances:
        wanted = "[.., n_instances, d_in]" if instances else "[.., d_in]"
        raise ValueError(f"{op}: x must have shape {wanted} like A {_check.shape(A)}, got {_check.shape(x)}")
    if instances:
        _check.same(op, "n_instances", "x", x, -2, "A", A, 0)
    _check.same(op, "d_in", "x", x, -1, "A", A, -2)
    own = A.shape[:1] if instances else ()  # n_instances, as every tensor here has it before its last axis
    lead = x.shape[: x.dim() - 1 - instances]
    n_samples = math.prod(lead)
    n_components, d_out = A.shape[-3], B.shape[-1]
    if bias is not None:
        _check.tensors(op, A=A, bias=bias)
        if tuple(bias.shape) != (*own, d_out):
            axes = "[n_instances, d_out]" if instances else "[d_out]"
            raise ValueError(
                f"{op}: bias must have shape {axes} = {_arguments.size((*own, d_out))}, got {_check.shape(bias)}"
            )
    rows = _arguments.instances_first(x.reshape(n_samples, *own, x.shape[-1]), instances)
    if mask is None:
        y = outside_autocast(torch.matmul, rows, component_sum(A, B))
    elif isinstance(mask, Selection):
        _check_selection(op, mask, tuple(own), n_samples, n_components)
        y = component_forward_selected(rows, A, B, mask)
    else:
        axes = "[.., n_instances, n_components]" if instances else "[.., n_components]"
        _arguments.mask(op, mask, (*lead, *own, n_components), axes, "x", x)
        weights = mask.reshape(n_samples, *own, n_components)
        y = component_forward(rows, A, B, _arguments.instances_first(weights, instances))
    y = _arguments.instances_first(y, instances).reshape(*lead, *own, d_out)
    return y if bias is None else y + bias


def _check_selection(op: str, selection: Selection, own: tuple[int, ...], n_samples: int, n_components: int) -> None:
    n_pairs = selection.sample.shape[-1] if isinstance(selection.sample, Tensor) and selection.sample.dim() else 0
    shapes = {"sample": n_pairs, "offsets": n_components + 1, "component": n_pairs, "sample_offsets": n_samples + 1}
    for name, t in zip(Selection._fields, selection, strict=True):
        dtype = torch.int64 if name.endswith("offsets") else torch.int32
        wanted = (*own, shapes.get(name, n_pairs))
        if not isinstance(t, Tensor) or t.dtype != dtype or tuple(t.shape) != wanted:
            got = f"{t.dtype} {_check.shape(t)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(
                f"{op}: mask.{name} must be {dtype} of shape {_arguments.size(wanted)} for {n_samples} samples and "
                f"{n_components} components, got {got}; use the result of fastapd.ops.batch_topk, instances first"
            )
