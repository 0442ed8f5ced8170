"""y_b = sum over components of s_bc (x_b A_c) B_c, without building a component's weights or outputs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastapd import _native
from fastapd.ops import _check
from fastapd.ops._batch_topk import Selection
from fastapd.ops._op import define, with_instances


def _check_layer(op: str, x: Tensor, A: Tensor, B: Tensor) -> bool:
    instances = _check.factors(op, A, B)
    _check.tensors(op, A=A, x=x)
    wanted = "[n_instances, batch, d_in]" if instances else "[batch, d_in]"
    if x.dim() != (3 if instances else 2):
        raise ValueError(f"{op}: x must have shape {wanted} like A {_check.shape(A)}, got {_check.shape(x)}")
    if instances:
        _check.same(op, "n_instances", "x", x, 0, "A", A, 0)
    _check.same(op, "d_in", "x", x, -1, "A", A, -2)
    return instances


# ---------------------------------------------------------------------------------------------- dense, float mask


def _check_dense(x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None) -> bool:
    op = "component_forward"
    instances = _check_layer(op, x, A, B)
    if mask is not None:
        _check.tensors(op, x=x, mask=mask)
        wanted = (*x.shape[:-1], A.shape[-3])
        if tuple(mask.shape) != wanted:
            raise ValueError(
                f"{op}: mask must have shape [.., batch, n_components] = [{', '.join(map(str, wanted))}], "
                f"got {_check.shape(mask)}"
            )
    return instances


def _dense_fake(x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None) -> Tensor:
    _check_dense(x, A, B, mask)
    return x.new_empty(x.shape[0], x.shape[1], B.shape[-1])


def _dense_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, A, B, mask = inputs
    ctx.masked = mask is not None
    ctx.save_for_backward(x, A, B, *([mask] if ctx.masked else []))


def _dense_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, A, B, *rest = ctx.saved_tensors
    weight = rest[0].unsqueeze(-1) if ctx.masked else None  # [I, b, C, 1]
    grad_x = grad_A = grad_B = grad_mask = None
    need_x, need_A, need_B, need_mask = ctx.needs_input_grad
    if need_x or need_A or need_mask:
        grad_v = torch.einsum("nbo,ncmo->nbcm", grad_y, B)
        grad_u = grad_v if weight is None else grad_v * weight
        if need_x:
            grad_x = torch.einsum("nbcm,ncim->nbi", grad_u, A)
        if need_A:
            grad_A = torch.einsum("nbcm,nbi->ncmi", grad_u, x).mT
        if need_mask:
            grad_mask = (grad_v * torch.einsum("nbi,ncim->nbcm", x, A)).sum(-1)
    if need_B:
        u = torch.einsum("nbi,ncim->nbcm", x, A)
        grad_B = torch.einsum("nbcm,nbo->ncmo", u if weight is None else u * weight, grad_y)
    return grad_x, grad_A, grad_B, grad_mask


_component_forward = define(
    "component_forward",
    "(Tensor x, Tensor A, Tensor B, Tensor? mask) -> Tensor",
    _dense_fake,
    _dense_setup,
    _dense_backward,
)


def component_forward(
    x: Float[Tensor, "*I b d_in"],
    A: Float[Tensor, "*I C d_in m"],
    B: Float[Tensor, "*I C m d_out"],
    mask: Float[Tensor, "*I b C"] | Bool[Tensor, "*I b C"] | None = None,
) -> Float[Tensor, "*I b d_out"]:
    """Runs a layer as the sum of its components, each weighted per sample.

    y_b = sum_c mask_bc (x_b A_c) B_c

    Args:
        x: Inputs [batch, d_in], with the leading n_instances of the factors if they have one.
        A: Left factors [.., n_components, d_in, rank].
        B: Right factors [.., n_components, rank, d_out].
        mask: Weights [.., batch, n_components]; None stands for ones, a bool mask is cast to the dtype of x.

    Returns:
        The layer's outputs [.., batch, d_out], before any bias.

    Raises:
        ValueError: If shapes or devices do not match.
        TypeError: If a dtype is not floating or the dtypes differ.

    Gradient: in all four, twice differentiable.
    Cost: two dense GEMMs over all components, 2 b C m (d_in + d_out) flops; for a sparse 0/1 mask use
        `component_forward_selected`.
    Source: `LinearComponent.forward` of ApolloResearch/apd.
    """
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and isinstance(x, Tensor):
        mask = mask.to(x.dtype)
    if _check_dense(x, A, B, mask):
        return _component_forward(x, A, B, mask)
    return _component_forward(*with_instances(x, A, B), None if mask is None else mask.unsqueeze(0)).squeeze(0)


# ------------------------------------------------------------------------------------------ sparse, from a selection


def _check_selected(x: Tensor, A: Tensor, B: Tensor, selection: Selection) -> bool:
    op = "component_forward_selected"
    instances = _check_layer(op, x, A, B)
    for name, t in zip(Selection._fields, selection, strict=True):
        wanted = torch.int64 if name.endswith("offsets") else torch.int32
        if not isinstance(t, Tensor) or t.dtype != wanted:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{op}: selection.{name} must be {wanted}, got {got}; use the result of batch_topk")
        if t.device != x.device:
            raise ValueError(f"{op}: selection.{name} must be on the device of x, {x.device}, got {t.device}")
    leading, n_pairs = tuple(x.shape[:-2]), selection.sample.shape[-1] if selection.sample.dim() else 0
    shapes = {
        "sample": (*leading, n_pairs),
        "offsets": (*leading, A.shape[-3] + 1),
        "component": (*leading, n_pairs),
        "sample_offsets": (*leading, x.shape[-2] + 1),
        "position": (*leading, n_pairs),
    }
    for name, t in zip(Selection._fields, selection, strict=True):
        if tuple(t.shape) != shapes[name]:
            raise ValueError(
                f"{op}: selection.{name} must have shape [{', '.join(map(str, shapes[name]))}] for x {_check.shape(x)} "
                f"and A {_check.shape(A)}, got {_check.shape(t)}"
            )
    return instances


def _sizes(x: Tensor, B: Tensor, n_pairs: int) -> list[int]:
    n_components, rank, d_out = B.shape[1:]
    return [x.shape[0], x.shape[1], n_components, rank, x.shape[2], d_out, n_pairs]


def cpu_forward_selected(x: Tensor, A: Tensor, B: Tensor, *selection: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates the outputs and lets `csrc/cpu/component_forward.cpp` fill them."""
    native: Any = _native.load("_C").module
    x, At, B = x.contiguous(), A.mT.contiguous(), B.contiguous()
    selection = tuple(t.contiguous() for t in selection)
    n_pairs = selection[0].shape[1]
    u = x.new_empty(x.shape[0], n_pairs, B.shape[2])
    y = x.new_empty(x.shape[0], x.shape[1], B.shape[3])
    run = (
        native.component_forward_selected_float32
        if x.dtype == torch.float32
        else native.component_forward_selected_float64
    )
    addresses = [t.data_ptr() for t in selection]
    threads = torch.get_num_threads()
    run(
        x.data_ptr(), At.data_ptr(), B.data_ptr(), addresses, u.data_ptr(), y.data_ptr(), _sizes(x, B, n_pairs), threads
    )
    return y, u


def cpu_forward_selected_backward(
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    u: Tensor,
    sample: Tensor,
    offsets: Tensor,
    component: Tensor,
    sample_offsets: Tensor,
    position: Tensor,
    need_x: bool,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates the gradients that are needed and lets `csrc/cpu/component_forward.cpp` fill them."""
    native: Any = _native.load("_C").module
    grad_y, x, At, B, u = grad_y.contiguous(), x.contiguous(), A.mT.contiguous(), B.contiguous(), u.contiguous()
    selection = [t.contiguous() for t in (sample, offsets, component, sample_offsets, position)]
    outputs = _backward_fake(grad_y, x, A, B, u, *selection, need_x, need_A, need_B)
    grad_x, grad_At, grad_B = (
        t.data_ptr() if need else 0 for t, need in zip(outputs, (need_x, need_A, need_B), strict=True)
    )
    grad_u = torch.empty_like(u)
    run = (
        native.component_forward_selected_backward_float32
        if x.dtype == torch.float32
        else native.component_forward_selected_backward_float64
    )
    inputs = [t.data_ptr() for t in (grad_y, x, At, B, u)]
    addresses = [t.data_ptr() for t in selection]
    sizes, threads = _sizes(x, B, u.shape[1]), torch.get_num_threads()
    run(*inputs, addresses, grad_u.data_ptr(), grad_x, grad_At, grad_B, sizes, threads)
    return outputs


def _selected_fake(x: Tensor, A: Tensor, B: Tensor, *selection: Tensor) -> tuple[Tensor, Tensor]:
    _check_selected(x, A, B, Selection(*selection))
    return x.new_empty(x.shape[0], x.shape[1], B.shape[3]), x.new_empty(x.shape[0], selection[0].shape[1], B.shape[2])


def _backward_fake(
    grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, u: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_A, need_B = rest[-3:]
    n_instances, n_components, rank, _ = B.shape
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty((n_instances, n_components, rank, x.shape[-1]) if need_A else (0,)),
        x.new_empty(B.shape if need_B else (0,)),
    )


_SELECTION = "Tensor sample, Tensor offsets, Tensor component, Tensor sample_offsets, Tensor position"
_component_forward_selected_backward = define(
    "component_forward_selected_backward",
    f"(Tensor grad_y, Tensor x, Tensor A, Tensor B, Tensor u, {_SELECTION}, bool need_x, bool need_A, bool need_B)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


def _selected_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, u = output
    ctx.mark_non_differentiable(u)
    ctx.save_for_backward(*inputs[:3], u, *inputs[3:])


def _selected_backward(ctx: Any, grad_y: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    need_x, need_A, need_B = ctx.needs_input_grad[:3]
    grad_x, grad_At, grad_B = _component_forward_selected_backward(grad_y, *ctx.saved_tensors, need_x, need_A, need_B)
    return grad_x if need_x else None, grad_At.mT if need_A else None, grad_B if need_B else None, *[None] * 5


_component_forward_selected = define(
    "component_forward_selected",
    f"(Tensor x, Tensor A, Tensor B, {_SELECTION}) -> (Tensor, Tensor)",
    _selected_fake,
    _selected_setup,
    _selected_backward,
)


def component_forward_selected(
    x: Float[Tensor, "*I b d_in"],
    A: Float[Tensor, "*I C d_in m"],
    B: Float[Tensor, "*I C m d_out"],
    selection: Selection,
) -> Float[Tensor, "*I b d_out"]:
    """Runs a layer as the sum of the components selected for each sample; the others are never computed.

    y_b = sum_{c selected for b} (x_b A_c) B_c

    Args:
        x: Inputs [batch, d_in], with the leading n_instances of the factors if they have one.
        A: Left factors [.., n_components, d_in, rank].
        B: Right factors [.., n_components, rank, d_out].
        selection: As returned by `batch_topk` or `sample_topk` for scores [.., batch, n_components].

    Returns:
        The layer's outputs [.., batch, d_out], before any bias; zero for a sample without components.

    Raises:
        ValueError: If shapes or devices do not match.
        TypeError: If a dtype is wrong or the selection's tensors are not those of `batch_topk`.

    Numerics: a component that is not selected cannot affect the result, whatever it holds. Deterministic; independent
        of the number of threads.
    Gradient: in x, A and B; a second derivative is refused.
    Cost: 2 K m (d_in + d_out) flops forward and twice that backward, K selected pairs: n_components * batch / K times
        less than the dense form.
    Source: the masked forward of `LinearComponent` in ApolloResearch/apd.
    """
    if not isinstance(selection, Selection):
        raise TypeError(
            f"component_forward_selected: selection must be a Selection, got {type(selection).__name__}; "
            "for a mask use component_forward"
        )
    if _check_selected(x, A, B, selection):
        return _component_forward_selected(x, A, B, *selection)[0]
    return _component_forward_selected(*with_instances(x, A, B, *selection))[0].squeeze(0)
