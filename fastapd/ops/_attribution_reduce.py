"""How much each component matters on each sample, from the target's activations and output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd import _native
from fastapd.ops import _check
from fastapd.ops._op import define, with_instances

if TYPE_CHECKING:
    from jaxtyping import Float

_OP = "attribution_reduce"

CPU_LIMIT = 8192
"""n_outputs * sum d_out beyond which the packed gradients of a block of samples leave the L2 cache."""


def _check_layers(xs: Sequence[Tensor], gs: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor]) -> bool:
    for name, layers in (("xs", xs), ("gs", gs), ("As", As), ("Bs", Bs)):
        if not isinstance(layers, (list, tuple)):
            raise TypeError(f"{_OP}: {name} must be a list of tensors, one a layer, got {type(layers).__name__}")
    if not len(xs) == len(gs) == len(As) == len(Bs) or len(xs) == 0:
        raise ValueError(
            f"{_OP}: xs, gs, As and Bs must have one tensor for each layer, "
            f"got {len(xs)}, {len(gs)}, {len(As)} and {len(Bs)}"
        )
    instances = False
    for layer, (x, g, A, B) in enumerate(zip(xs, gs, As, Bs, strict=True)):
        names = {n: f"{n}[{layer}]" for n in ("xs", "gs", "As", "Bs")}
        instances = _check.factors(_OP, A, B, (names["As"], names["Bs"]))
        _check.tensors(_OP, **{names["As"]: A, names["xs"]: x, names["gs"]: g})
        extra = 1 if instances else 0
        for name, t, axes, n in (
            (names["xs"], x, "batch, d_in", 2),
            (names["gs"], g, "batch or 1, n_outputs, d_out", 3),
        ):
            if t.dim() != n + extra:
                raise ValueError(
                    f"{_OP}: {name} must have shape {'[n_instances, ' if instances else '['}{axes}] "
                    f"like {names['As']} {_check.shape(A)}, got {_check.shape(t)}"
                )
            if instances:
                _check.same(_OP, "n_instances", name, t, 0, names["As"], A, 0)
        _check.same(_OP, "d_in", names["xs"], x, -1, names["As"], A, -2)
        _check.same(_OP, "d_out", names["gs"], g, -1, names["Bs"], B, -1)
        if g.shape[-3] != 1:
            _check.same(_OP, "batch", names["xs"], x, -2, names["gs"], g, -3)
        if layer > 0:
            _check.tensors(_OP, **{"As[0]": As[0], names["As"]: A})
            if A.dim() != As[0].dim() or A.shape[:-2] != As[0].shape[:-2]:
                raise ValueError(
                    f"{_OP}: {names['As']} must have the n_components of As[0] {_check.shape(As[0])}, "
                    f"got {_check.shape(A)}"
                )
            _check.same(_OP, "batch", "xs[0]", xs[0], -2, names["xs"], x, -2)
            _check.same(_OP, "n_outputs", "gs[0]", gs[0], -2, names["gs"], g, -2)
    return instances


def cpu_limits(xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> list[str]:
    width = sum(B.shape[-1] for B in Bs)
    if gs[0].shape[-2] * width <= CPU_LIMIT:
        return []
    return [
        f"the CPU kernel takes n_outputs * sum of d_out up to {CPU_LIMIT}, not {gs[0].shape[-2]} * {width}; "
        "beyond, GEMMs are better"
    ]


def cpu_backward_limits(
    grad: Tensor, xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]
) -> list[str]:
    return cpu_limits(xs, gs, As, Bs)


def _layers(xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> tuple[list, list]:
    """The kernel's description of the layers, and the tensors that must outlive it."""
    keep, layers = [], []
    for x, g, A, B in zip(xs, gs, As, Bs, strict=True):
        g = g if g.stride(3) == 1 else g.contiguous()  # the other strides are the kernel's to walk
        dense = [x.contiguous(), g, A.mT.contiguous(), B.contiguous()]
        keep.append(dense)
        stride_i, stride_b, stride_o, _ = g.stride()
        strides = (stride_i, 0 if g.shape[1] == 1 else stride_b, stride_o)
        layers.append([*(t.data_ptr() for t in dense), x.shape[2], B.shape[3], B.shape[2], *strides])
    return layers, keep


def cpu_attribution_reduce(xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> Tensor:
    """Allocates the attributions and lets `csrc/cpu/attribution_reduce.cpp` fill them."""
    native: Any = _native.load("_C").module
    layers, _keep = _layers(xs, gs, As, Bs)
    n_instances, batch, _ = xs[0].shape
    n_components = As[0].shape[1]
    out = xs[0].new_empty(n_instances, batch, n_components)
    run = native.attribution_reduce_float32 if out.dtype == torch.float32 else native.attribution_reduce_float64
    run(layers, out.data_ptr(), n_instances, batch, n_components, gs[0].shape[2], torch.get_num_threads())
    return out


def cpu_attribution_reduce_backward(
    grad: Tensor, xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]
) -> list[Tensor]:
    """Allocates the factors' gradients and lets `csrc/cpu/attribution_reduce.cpp` fill them."""
    native: Any = _native.load("_C").module
    grad = grad.contiguous()
    layers, _keep = _layers(xs, gs, As, Bs)
    out = _backward_fake(grad, xs, gs, As, Bs)
    double = grad.dtype == torch.float64
    run = native.attribution_reduce_backward_float64 if double else native.attribution_reduce_backward_float32
    to_A, to_B = ([t.data_ptr() for t in part] for part in (out[: len(xs)], out[len(xs) :]))
    sizes = (xs[0].shape[0], xs[0].shape[1], As[0].shape[1], gs[0].shape[2])
    run(layers, grad.data_ptr(), to_A, to_B, *sizes, torch.get_num_threads())
    return out


def _backward_fake(
    grad: Tensor, xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]
) -> list[Tensor]:
    """Gradients of every At, then of every B."""
    return [A.new_empty(A.mT.shape) for A in As] + [B.new_empty(B.shape) for B in Bs]


_attribution_reduce_backward = define(
    "attribution_reduce_backward",
    "(Tensor grad, Tensor[] xs, Tensor[] gs, Tensor[] As, Tensor[] Bs) -> Tensor[]",
    _backward_fake,
)


def _fake(xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> Tensor:
    _check_layers(xs, gs, As, Bs)
    return xs[0].new_empty(xs[0].shape[0], xs[0].shape[1], As[0].shape[1])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    xs, gs, As, Bs = inputs
    ctx.n_layers = len(xs)
    ctx.save_for_backward(*xs, *gs, *As, *Bs)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    n, saved = ctx.n_layers, ctx.saved_tensors
    xs, gs, As, Bs = (list(saved[i * n : (i + 1) * n]) for i in range(4))
    gradients = _attribution_reduce_backward(grad, xs, gs, As, Bs)
    return [None] * n, [None] * n, [g.mT for g in gradients[:n]], list(gradients[n:])


_attribution_reduce = define(
    _OP, "(Tensor[] xs, Tensor[] gs, Tensor[] As, Tensor[] Bs) -> Tensor", _fake, _setup, _backward
)


def attribution_reduce(
    xs: Sequence[Float[Tensor, "*I b d_in"]],
    gs: Sequence[Float[Tensor, "*I b_or_1 o d_out"]],
    As: Sequence[Float[Tensor, "*I C d_in m"]],
    Bs: Sequence[Float[Tensor, "*I C m d_out"]],
) -> Float[Tensor, "*I b C"]:
    """Reduces per-sample gradients to one attribution per sample and component.

    a_bc = sum_o ( sum_l <x_lb A_lc, g_lbo B_lc^T> )^2 = sum_o ( sum_l <df_o/dW_l, A_lc B_lc> )^2

    Args:
        xs: For each layer its inputs [.., batch, d_in].
        gs: For each layer the gradients of every output by the layer's outputs, [.., batch, n_outputs, d_out]; a batch
            axis of one stands for gradients that are the same for all samples.
        As: For each layer its left factors [.., n_components, d_in, rank].
        Bs: For each layer its right factors [.., n_components, rank, d_out].

    Returns:
        Attributions [.., batch, n_components], >= 0; no square root and no division by n_outputs.

    Raises:
        ValueError: If lengths, shapes or devices do not match.
        TypeError: If a dtype is not floating or the dtypes differ.
        NotImplementedError: If xs or gs require gradients: they come from the target and are constants.

    Numerics: layers are summed before the square, so layers of opposite sign cancel.
    Gradient: in As and Bs, by recomputation; a second derivative is refused.
    Cost: 2 b C d_out n_outputs flops a layer on the reference; the products A_c B_c are never built.
    Source: Braun et al. 2025, appendix A.1; `calc_grad_attributions` of ApolloResearch/apd.
    """
    instances = _check_layers(xs, gs, As, Bs)
    for name, tensors in (("xs", xs), ("gs", gs)):
        for layer, t in enumerate(tensors):
            _check.no_gradient(_OP, f"{name}[{layer}]", t, "as it belongs to the target")
    if instances:
        return _attribution_reduce(list(xs), list(gs), list(As), list(Bs))
    return _attribution_reduce(*(list(with_instances(*t)) for t in (xs, gs, As, Bs))).squeeze(0)
