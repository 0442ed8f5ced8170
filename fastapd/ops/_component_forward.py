"""y_b = sum over components of s_bc (x_b A_c) B_c, without building a component's weights or outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd import _native
from fastapd.backends import choose
from fastapd.ops import _check
from fastapd.ops._batch_topk import Selection
from fastapd.ops._op import define, no_double_backward, outside_autocast, with_instances

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


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


def _check_selected(
    x: Tensor, A: Tensor, B: Tensor, selection: Selection, op: str = "component_forward_selected"
) -> bool:
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


def _run_backward(
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    u: Tensor,
    selection: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    accumulate: bool,
) -> None:
    """Lets `csrc/cpu/component_forward.cpp` fill the gradients of x, At and B that are given, or add to the last two.

    The selection and the gradients are contiguous.
    """
    native: Any = _native.load("_C").module
    grad_y, x, At, B, u = grad_y.contiguous(), x.contiguous(), A.mT.contiguous(), B.contiguous(), u.contiguous()
    addresses = [t.data_ptr() for t in selection]
    grad_u = torch.empty_like(u)
    to = [0 if t is None else t.data_ptr() for t in gradients]
    run = (
        native.component_forward_selected_backward_float32
        if x.dtype == torch.float32
        else native.component_forward_selected_backward_float64
    )
    inputs = grad_y.data_ptr(), x.data_ptr(), At.data_ptr(), B.data_ptr(), u.data_ptr()
    sizes, threads = _sizes(x, B, u.shape[1]), torch.get_num_threads()
    run(*inputs, addresses, grad_u.data_ptr(), *to, accumulate, sizes, threads)


def cpu_forward_selected_backward(
    grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, u: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates the gradients that are needed and fills them."""
    *selection, need_x, need_A, need_B = rest
    grad_x, grad_At, grad_B = outputs = _backward_fake(grad_y, x, A, B, u, *rest)
    needed = (grad_x if need_x else None, grad_At if need_A else None, grad_B if need_B else None)
    _run_backward(grad_y, x, A, B, u, tuple(t.contiguous() for t in selection), needed, False)
    return outputs


def cpu_forward_selected_accumulate(grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, u: Tensor, *rest: Any) -> Tensor:
    """Adds to the gradients of the factors, which are contiguous, and allocates that of x if it is needed."""
    *selection, need_x, grad_At, grad_B = rest
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    needed = (grad_x if need_x else None, grad_At, grad_B)
    _run_backward(grad_y, x, A, B, u, tuple(t.contiguous() for t in selection), needed, True)
    return grad_x


def outputs(x: Tensor, B: Tensor, n_pairs: int) -> tuple[Tensor, Tensor]:
    """y [I, b, d_out] and u [I, K, m], with nothing in them."""
    return x.new_empty(x.shape[0], x.shape[1], B.shape[3]), x.new_empty(x.shape[0], n_pairs, B.shape[2])


def _selected_fake(x: Tensor, A: Tensor, B: Tensor, *selection: Tensor) -> tuple[Tensor, Tensor]:
    _check_selected(x, A, B, Selection(*selection))
    return outputs(x, B, selection[0].shape[1])


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
    ctx.set_materialize_grads(False)  # u has no gradient to make zeros for
    ctx.save_for_backward(*inputs[:3], u, *inputs[3:])


def _selected_backward(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 8
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


# ------------------------------------------------------------------------ gradients added to buffers, for training


def _check_accumulate(
    grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, u: Tensor, selection: Selection, grad_At: Tensor, grad_B: Tensor
) -> None:
    op = "component_forward_selected_accumulate"
    if not _check_selected(x, A, B, selection, op):
        raise ValueError(f"{op}: A must have a leading n_instances, got {_check.shape(A)}")
    _check.tensors(op, A=A, grad_y=grad_y, u=u, grad_At=grad_At, grad_B=grad_B)
    n_instances, n_components, d_in, rank = A.shape
    shapes = {
        "grad_y": (grad_y, (n_instances, x.shape[1], B.shape[3])),
        "u": (u, (n_instances, selection.sample.shape[1], rank)),
        "grad_At": (grad_At, (n_instances, n_components, rank, d_in)),
        "grad_B": (grad_B, tuple(B.shape)),
    }
    for name, (t, wanted) in shapes.items():
        if tuple(t.shape) != wanted:
            raise ValueError(f"{op}: {name} must have shape [{', '.join(map(str, wanted))}], got {_check.shape(t)}")
    for name, t in (("grad_At", grad_At), ("grad_B", grad_B)):
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(t.stride())}")


def _accumulate_fake(grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, u: Tensor, *rest: Any) -> Tensor:
    *selection, need_x, grad_At, grad_B = rest
    _check_accumulate(grad_y, x, A, B, u, Selection(*selection), grad_At, grad_B)
    return x.new_empty(x.shape if need_x else (0,))


_component_forward_selected_accumulate = define(
    "component_forward_selected_accumulate",
    f"(Tensor grad_y, Tensor x, Tensor A, Tensor B, Tensor u, {_SELECTION}, bool need_x, Tensor(a!) grad_At, "
    "Tensor(b!) grad_B) -> Tensor",
    _accumulate_fake,
)


def component_forward_selected_accumulate(
    grad_y: Float[Tensor, "I b d_out"],
    x: Float[Tensor, "I b d_in"],
    A: Float[Tensor, "I C d_in m"],
    B: Float[Tensor, "I C m d_out"],
    u: Float[Tensor, "I K m"],
    selection: Selection,
    need_x: bool,
    grad_At: Float[Tensor, "I C m d_in"],
    grad_B: Float[Tensor, "I C m d_out"],
) -> Tensor:
    """The backward pass of `component_forward_selected`, its factor gradients added to what is in two buffers.

    Args:
        grad_y: The gradient of its output.
        x, A, B, selection: Its arguments, with their leading n_instances.
        u: x_b A_c of the selected pairs in component-major order, the second output of its torch op.
        need_x: Whether the gradient of x is wanted.
        grad_At, grad_B: Contiguous buffers that do not overlap; changed in place, except for components that no sample
            selected, which are neither read nor written.

    Returns:
        The gradient of x, or an empty tensor.

    Gradient: none.
    """
    _check_accumulate(grad_y, x, A, B, u, selection, grad_At, grad_B)
    return _component_forward_selected_accumulate(grad_y, x, A, B, u, *selection, need_x, grad_At, grad_B)


class _IntoGradients(torch.autograd.Function):
    """Runs the backends without the torch ops between, which a step of a small model would feel."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, At, B, selection, grad_At, grad_B = args
        inputs = (x, At.mT, B, *selection)
        y, u = outside_autocast(choose("component_forward_selected", inputs), *inputs)
        ctx.save_for_backward(x, At, B)
        ctx.rest = u, selection, grad_At, grad_B
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        op = "component_forward_selected_accumulate"
        no_double_backward(op)
        x, At, B = ctx.saved_tensors
        u, selection, grad_At, grad_B = ctx.rest
        need_x = ctx.needs_input_grad[0]
        inputs = (*grads, x, At.mT, B, u, *selection, need_x, grad_At, grad_B)
        grad_x = outside_autocast(choose(op, inputs), *inputs)
        return grad_x if need_x else None, None, None, None, None, None


def forward_selected_into_gradients(
    x: Float[Tensor, "I b d_in"],
    At: Float[Tensor, "I C m d_in"],
    B: Float[Tensor, "I C m d_out"],
    selection: Selection,
    grad_At: Float[Tensor, "I C m d_in"],
    grad_B: Float[Tensor, "I C m d_out"],
) -> Float[Tensor, "I b d_out"]:
    """`component_forward_selected` for the training step: its backward pass adds the factor gradients to two buffers.

    Args:
        x: Inputs [n_instances, batch, d_in].
        At, B: The factors in the house layout: leaves that require gradients, or views of them. A tied layer takes its
            owner's B and At, and the owner's two buffers in the same order.
        selection: As returned by `batch_topk` or `sample_topk`.
        grad_At, grad_B: Contiguous buffers of the factors' shapes. Every backward pass adds to them, so that a graph
            that is kept and run twice adds twice; components that no sample selected are left alone.

    Returns:
        The layer's outputs. Autograd brings x its gradient, and the factors none: theirs is in the buffers.

    Raises:
        ValueError: If shapes do not match or a buffer is not contiguous.
    """
    sample, offsets, component, sample_offsets, position = selection
    n_instances, batch, d_in = x.shape
    _, n_components, rank, d_out = shape_B = B.shape
    pairs = sample.shape
    if not (
        At.shape == (n_instances, n_components, rank, d_in) == grad_At.shape
        and shape_B == (n_instances, n_components, rank, d_out) == grad_B.shape
        and pairs == component.shape == position.shape
        and offsets.shape == (n_instances, n_components + 1)
        and sample_offsets.shape == (n_instances, batch + 1)
        and sample.dtype == component.dtype == position.dtype == torch.int32
        and offsets.dtype == sample_offsets.dtype == torch.int64
        and x.dtype == At.dtype == B.dtype == grad_At.dtype == grad_B.dtype
        and grad_At.is_contiguous()
        and grad_B.is_contiguous()
    ):
        grad_y, u = x.new_empty(n_instances, batch, d_out), x.new_empty(n_instances, pairs[-1], rank)
        _check_accumulate(grad_y, x, At.mT, B, u, selection, grad_At, grad_B)
    return _IntoGradients.apply(x, At, B, selection, grad_At, grad_B)
