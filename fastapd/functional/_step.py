"""What a training step does besides its loss: unit columns, their gradients, the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd._schedule import scheduled
from fastapd.functional import _arguments
from fastapd.ops import _check
from fastapd.ops._unit_norm import remove_along, unit_norm

if TYPE_CHECKING:
    from jaxtyping import Float

SCHEDULES = ("constant", "linear", "cosine", "exponential")


@torch.no_grad()
def unit_norm_(A: Float[Tensor, "*I C d_in m"]) -> Float[Tensor, "*I C d_in m"]:
    """Scales every column of A to unit length, in place.

    a_ci ← a_ci / ‖a_ci‖, over d_in

    Args:
        A: Left factors [(n_instances,) n_components, d_in, rank]; fastest as the transposed view of a contiguous
            [.., rank, d_in].

    Returns:
        A itself.

    Raises:
        ValueError: If A has another number of axes.
        TypeError: If A is not floating.

    Numerics: a column of zeros stays, where the research code makes NaN.
    Gradient: none; outside autograd.
    Source: `set_As_to_unit_norm` of ApolloResearch/apd, before every step when `unit_norm_matrices`.
    """
    op = "unit_norm_"
    _check.tensors(op, A=A)
    _check.rank(op, "A", A, "n_components, d_in, rank")
    rows = A.mT
    if rows.is_contiguous():
        unit_norm(rows)
    else:
        A.copy_(unit_norm(rows.clone(memory_format=torch.contiguous_format)).mT)
    return A


@torch.no_grad()
def tangent_gradient_(grad: Float[Tensor, "*I C d_in m"], A: Float[Tensor, "*I C d_in m"]) -> Tensor:
    """Removes from the gradient of A its part along each column, in place, so that a step keeps lengths to first order.

    g_ci ← g_ci − (g_ci · a_ci) a_ci

    Args:
        grad: The gradient of A, usually `A.grad`; overwritten.
        A: Left factors [(n_instances,) n_components, d_in, rank] with columns of unit length over d_in (`unit_norm_`).

    Returns:
        grad itself.

    Raises:
        ValueError: If the shapes or devices differ.
        TypeError: If a dtype is not floating or the dtypes differ, or grad is None.

    Gradient: none; outside autograd.
    Source: `fix_normalized_adam_gradients` of ApolloResearch/apd, between backward and the optimiser's step.
    """
    op = "tangent_gradient_"
    _check.tensors(op, A=A, grad=grad)
    _check.rank(op, "A", A, "n_components, d_in, rank")
    if grad.shape != A.shape:
        raise ValueError(f"{op}: grad must have the shape of A, {_check.shape(A)}, got {_check.shape(grad)}")
    columns = A.mT.contiguous()
    rows = grad.mT
    if rows.is_contiguous():
        remove_along(rows, columns)
    else:
        grad.copy_(remove_along(rows.clone(memory_format=torch.contiguous_format), columns).mT)
    return grad


def lr_schedule(
    step: int, steps: int, lr: float, schedule: str = "constant", warmup: float = 0.0, halflife: float | None = None
) -> float:
    """The learning rate of a step: linear warm-up from zero, then the schedule over the steps that remain.

    With w = int(steps * warmup): lr step/w before w; then, with s = step − w and S = steps − w, lr times
    constant 1; linear 1 − s/S; cosine cos(½π s/(S−1)), a quarter wave; exponential 0.5^(s/halflife).

    Args:
        step: From 0 to steps; at steps, where the research code evaluates without an update, the cosine is below zero.
        steps: Optimisation steps, at least 1.
        lr: The learning rate after the warm-up.
        schedule: "constant", "linear", "cosine" or "exponential".
        warmup: Fraction of the steps, in [0, 1). Unless it is zero, the learning rate of step 0 is 0.
        halflife: Steps in which the exponential schedule halves; only for that.

    Returns:
        The learning rate.

    Raises:
        ValueError: If a number is out of range, the schedule unknown, or halflife given or missing where it should not.
        TypeError: If a number is none.

    Source: `get_lr_schedule_fn` and `get_lr_with_warmup` of ApolloResearch/apd.
    """
    op = "lr_schedule"
    _check.whole(op, "steps", steps, 1, 2**53, "[1, 2**53]")
    _check.whole(op, "step", step, 0, steps, f"[0, steps={steps}]")
    _arguments.positive(op, "lr", lr)
    _check_schedule(op, schedule, halflife)
    _arguments.number(op, "warmup", warmup, 0, 1, "[0, 1)")
    if warmup == 1:
        raise ValueError(f"{op}: warmup must be in [0, 1), got {warmup}")
    return scheduled(step, steps, lr, schedule, warmup, halflife)


def _check_schedule(op: str, schedule: Any, halflife: Any) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"{op}: schedule must be {', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}, got {schedule!r}")
    if schedule == "exponential":
        if halflife is None:
            raise ValueError(f"{op}: halflife must be given for the exponential schedule, got None")
        _arguments.positive(op, "halflife", halflife)
    elif halflife is not None:
        raise ValueError(f"{op}: halflife must be None for the {schedule} schedule, got {halflife}")
