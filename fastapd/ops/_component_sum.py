"""W = sum over components of A_c B_c, and its squared distance to a target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd import _cuda, _native
from fastapd.backends import choose
from fastapd.ops import _check
from fastapd.ops._op import define, outside_autocast, with_instances
from fastapd.ops._thin_product import product, thin_product

if TYPE_CHECKING:
    from jaxtyping import Float


def _check_sum(A: Tensor, B: Tensor) -> bool:
    return _check.factors("component_sum", A, B)


def _check_loss(A: Tensor, B: Tensor, target: Tensor, op: str = "component_sum_loss") -> bool:
    instances = _check.factors(op, A, B)
    _check.tensors(op, A=A, target=target)
    wanted = (*A.shape[:-3], A.shape[-2], B.shape[-1])
    if tuple(target.shape) != wanted:
        raise ValueError(
            f"{op}: target must have the shape of the sum, [{', '.join(map(str, wanted))}], got {_check.shape(target)}"
        )
    return instances


def _flat(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A [I, d_in, C m] and B [I, C m, d_out], with concatenated ranks: views in the house layout."""
    n_instances, n_components, d_in, rank = A.shape
    At = A.mT.reshape(n_instances, n_components * rank, d_in)
    return At.mT, B.reshape(n_instances, n_components * rank, B.shape[3])


def _factor_grads(grad_W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """dA = dW B^T, dB = A^T dW for all components at once: two GEMMs over the concatenated ranks."""
    n_instances, n_components, d_in, rank = A.shape
    flat_A, flat_B = _flat(A, B)
    grad_At = product(flat_B, grad_W.mT).view(n_instances, n_components, rank, d_in)
    return grad_At.mT, product(flat_A.mT, grad_W).view(B.shape)


def _sum_fake(A: Tensor, B: Tensor) -> Tensor:
    _check_sum(A, B)
    return A.new_empty(A.shape[0], A.shape[2], B.shape[3])


def _save_factors(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sum_backward(ctx: Any, grad_W: Tensor) -> tuple[Tensor, Tensor]:
    return _factor_grads(grad_W, *ctx.saved_tensors)


_component_sum = define("component_sum", "(Tensor A, Tensor B) -> Tensor", _sum_fake, _save_factors, _sum_backward)


def component_sum(A: Float[Tensor, "*I C d_in m"], B: Float[Tensor, "*I C m d_out"]) -> Float[Tensor, "*I d_in d_out"]:
    """Sums the components of a layer.

    W = sum_c A_c B_c

    Args:
        A: Left factors [n_components, d_in, rank], with or without a leading n_instances; any strides, fastest as the
            transposed view of a contiguous [.., n_components, rank, d_in].
        B: Right factors [n_components, rank, d_out], with the same leading axis.

    Returns:
        The summed weights [d_in, d_out], y = x W orientation, with the leading axis of the inputs.

    Raises:
        ValueError: If shapes or devices do not match.
        TypeError: If a dtype is not floating or the dtypes differ.

    Gradient: in A and B, twice differentiable.
    Cost: 2 d_in C m d_out flops per instance; the products A_c B_c are never held one by one.
    Source: Braun et al. 2025, section 2; `LinearComponent.weight` of ApolloResearch/apd.
    """
    if _check_sum(A, B):
        return _component_sum(A, B)
    return _component_sum(*with_instances(A, B)).squeeze(0)


def _loss_fake(A: Tensor, B: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    _check_loss(A, B, target)
    return A.new_empty(A.shape[0]), A.new_empty(target.shape)


def cpu_component_sum_loss(A: Tensor, B: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The library's GEMM, then `csrc/cpu/component_sum.cpp` turns the sum into the residual in place."""
    native: Any = _native.load("_C").module
    residual, target = _sum_of(A, B), target.contiguous()
    loss = A.new_empty(A.shape[0])
    run = native.component_sum_loss_float32 if A.dtype == torch.float32 else native.component_sum_loss_float64
    size = target.shape[1] * target.shape[2]
    run(residual.data_ptr(), target.data_ptr(), loss.data_ptr(), A.shape[0], size, torch.get_num_threads())
    return loss, residual


def cuda_component_sum_loss(A: Tensor, B: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The library's GEMM, then `csrc/cuda/component_sum.cu` turns the sum into the residual in place."""
    native: Any = _native.load("_C_cuda").module
    residual, target = torch.bmm(*_flat(A, B)), target.contiguous()
    loss, size = A.new_empty(A.shape[0]), target.shape[1] * target.shape[2]
    partials = _cuda.partial_sums(A, A.shape[0], native.component_sum_loss_partials(size))
    arrays = [t.data_ptr() for t in (residual, target, loss, partials)]
    _cuda.call("component_sum_loss", A, *arrays, A.shape[0], size)
    return loss, residual


LANES = 16
"""Numbers in the widest vector."""


def _sum_of(A: Tensor, B: Tensor) -> Tensor:
    """The sum as one product over the concatenated ranks; its columns fill the kernel's vectors if either side does."""
    flat_A, flat_B = _flat(A, B)
    if B.shape[3] < LANES and B.shape[3] < A.shape[2]:
        return thin_product(flat_B.mT, flat_A.mT).mT.contiguous()
    return thin_product(flat_A, flat_B)


def _save_loss(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    A, B, _ = inputs
    ctx.save_for_backward(A, B, output[1])


def _loss_backward(ctx: Any, grad_loss: Tensor | None, grad_residual: Tensor | None) -> tuple[Tensor | None, ...]:
    A, B, residual = ctx.saved_tensors
    if grad_loss is None:
        grad_W = torch.zeros_like(residual) if grad_residual is None else grad_residual
    else:
        grad_W = residual * (2 * grad_loss)[:, None, None]
        if grad_residual is not None:
            grad_W = grad_W + grad_residual
    return (*_factor_grads(grad_W, A, B), -grad_W if ctx.needs_input_grad[2] else None)


_component_sum_loss = define(
    "component_sum_loss",
    "(Tensor A, Tensor B, Tensor target) -> (Tensor, Tensor)",
    _loss_fake,
    _save_loss,
    _loss_backward,
)


def component_sum_loss(
    A: Float[Tensor, "*I C d_in m"], B: Float[Tensor, "*I C m d_out"], target: Float[Tensor, "*I d_in d_out"]
) -> tuple[Float[Tensor, "*I"], Float[Tensor, "*I d_in d_out"]]:
    """How far the sum of the components is from a target matrix.

    loss = sum_io (W - W*)^2,  residual = W - W*,  W = sum_c A_c B_c

    Args:
        A: Left factors [.., n_components, d_in, rank], as for `component_sum`.
        B: Right factors [.., n_components, rank, d_out].
        target: The target weights W* [.., d_in, d_out].

    Returns:
        The squared distance, a scalar or [n_instances], not divided by anything; and the residual, shaped like target.

    Raises:
        ValueError: If shapes or devices do not match.
        TypeError: If a dtype is not floating or the dtypes differ.

    Gradient: in A, B and target, from both outputs; dA_c = 2 g R B_c^T, dB_c = 2 g A_c^T R.
    Cost: one GEMM forward, two backward; only the residual is kept.
    Source: Braun et al. 2025, faithfulness loss; `calc_param_match_loss` of ApolloResearch/apd before its 1/n_params.
    """
    if _check_loss(A, B, target):
        return _component_sum_loss(A, B, target)
    loss, residual = _component_sum_loss(*with_instances(A, B, target))
    return loss.squeeze(0), residual.squeeze(0)


def component_sum_loss_accumulate(
    At: Float[Tensor, "I C m d_in"],
    B: Float[Tensor, "I C m d_out"],
    target: Float[Tensor, "I d_in d_out"],
    scale: float,
    grad_At: Float[Tensor, "I C m d_in"],
    grad_B: Float[Tensor, "I C m d_out"],
    overwrite: bool,
) -> Float[Tensor, " I"]:
    """`component_sum_loss` for the training step: its gradients go straight into two buffers, and no graph is made.

    Args:
        At, B: The factors in the house layout, contiguous.
        target: The target weights W* [n_instances, d_in, d_out].
        scale: What the loss of every instance is multiplied by before it is differentiated.
        grad_At, grad_B: Contiguous buffers of the factors' shapes, which receive scale · dloss.
        overwrite: Whether what the buffers hold is replaced, whatever it is, or added to.

    Returns:
        The squared distance [n_instances], not multiplied by scale.

    Raises:
        ValueError: If shapes do not match or a factor or buffer is not contiguous.
    """
    n_instances, n_components, rank, d_in = shape_A = At.shape
    shape_B = B.shape
    d_out = shape_B[-1]
    ranks = n_components * rank
    if not (
        shape_B == (n_instances, n_components, rank, d_out)
        and target.shape == (n_instances, d_in, d_out)
        and grad_At.shape == shape_A
        and grad_B.shape == shape_B
        and At.dtype == B.dtype == target.dtype == grad_At.dtype == grad_B.dtype
        and At.is_contiguous()
        and B.is_contiguous()
        and grad_At.is_contiguous()
        and grad_B.is_contiguous()
    ):
        _refuse_accumulate(At, B, target, grad_At, grad_B)
    with torch.no_grad():
        inputs = At.mT, B, target
        loss, residual = outside_autocast(choose("component_sum_loss", inputs), *inputs)
        flat_At, flat_B = At.view(n_instances, ranks, d_in), B.view(n_instances, ranks, d_out)
        to_A, to_B = grad_At.view(n_instances, ranks, d_in), grad_B.view(n_instances, ranks, d_out)
        thin_product(flat_B, residual.mT, to_A, 2 * scale, not overwrite)
        thin_product(flat_At, residual, to_B, 2 * scale, not overwrite)
    return loss


def _refuse_accumulate(At: Tensor, B: Tensor, target: Tensor, grad_At: Tensor, grad_B: Tensor) -> None:
    op = "component_sum_loss_accumulate"
    _check_loss(At.mT, B, target, op)
    _check.tensors(op, At=At, grad_At=grad_At, grad_B=grad_B)
    for name, t, like in (("grad_At", grad_At, At), ("grad_B", grad_B, B)):
        if t.shape != like.shape:
            raise ValueError(f"{op}: {name} must have shape {_check.shape(like)}, got {_check.shape(t)}")
    for name, t in (("At", At), ("B", B), ("grad_At", grad_At), ("grad_B", grad_B)):
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(t.stride())}")
