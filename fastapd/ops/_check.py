"""The house's argument checks: `<op>: <argument> must <condition>, got <what arrived>[; <what to do>]`.

Each op file has one check built from these. The public op and its fake both call it: in eager mode a fake never runs,
so a check that lives only there would let a wrong shape read out of bounds.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def shape(t: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in t.shape) + "]"


def tensors(op: str, **arguments: Any) -> None:
    """Every argument is a tensor of one floating dtype on one device."""
    first_name, first = "", None
    for name, t in arguments.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {t.layout}; call .to_dense()")
        if t.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {t.dtype}")
        if unpack_dual(t).tangent is not None:  # no op has a forward-mode formula: torch would make the result constant
            raise NotImplementedError(f"{op}: {name} must not carry a tangent, as forward-mode AD is not supported")
        if first is None:
            first_name, first = name, t
        elif t.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {t.dtype}")
        elif t.device != first.device:
            raise ValueError(f"{op}: {name} must be on the device of {first_name}, {first.device}, got {t.device}")


def rank(op: str, name: str, t: Tensor, axes: str, n_instances: int | None = None, optional: bool = True) -> bool:
    """`t` has the named axes, with or without a leading n_instances; returns whether it has that axis.

    Args:
        axes: The trailing axes, e.g. "n_components, d_in, rank".
        n_instances: The size that a leading axis must have; None when this argument decides it.
        optional: Whether the leading axis may be missing.
    """
    n = axes.count(",") + 1
    wanted = f"[n_instances, {axes}]" if not optional else f"[{axes}] or [n_instances, {axes}]"
    if t.dim() != n + 1 and not (optional and t.dim() == n):
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {shape(t)}")
    instances = t.dim() == n + 1
    if instances and n_instances is not None and t.shape[0] != n_instances:
        raise ValueError(f"{op}: {name} must have n_instances {n_instances}, got {shape(t)}")
    return instances


def same(op: str, axis: str, first_name: str, first: Tensor, a: int, second_name: str, second: Tensor, b: int) -> None:
    """Axis `a` of the first argument equals axis `b` of the second."""
    if first.shape[a] != second.shape[b]:
        raise ValueError(
            f"{op}: {first_name} and {second_name} must share {axis}, "
            f"got {first_name} {shape(first)} and {second_name} {shape(second)}"
        )


def factors(op: str, A: Any, B: Any, names: tuple[str, str] = ("A", "B")) -> bool:
    """A [.., C, d_in, m] and B [.., C, m, d_out] multiply; returns whether they have the instance axis."""
    a, b = names
    tensors(op, **{a: A, b: B})
    instances = rank(op, a, A, "n_components, d_in, rank")
    if B.dim() != A.dim():
        raise ValueError(
            f"{op}: {b} must have shape {'[n_instances, ' if instances else '['}n_components, rank, d_out] "
            f"like {a}, got {a} {shape(A)} and {b} {shape(B)}"
        )
    if instances:
        same(op, "n_instances", a, A, 0, b, B, 0)
    same(op, "n_components", a, A, -3, b, B, -3)
    same(op, "rank", a, A, -1, b, B, -2)
    return instances


def _shown(value: Any) -> Any:
    """What a message says about a number: an int may have more digits than Python prints."""
    return "an int beyond float64" if isinstance(value, int) and abs(value) > sys.float_info.max else value


def whole(op: str, name: str, value: Any, low: int, high: int, range_text: str) -> None:
    """`value` is an int (not a bool) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__} {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in {range_text}, got {_shown(value)}")


def exponent(op: str, p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{op}: p must be a float, got {type(p).__name__} {p!r}")
    if not (0 < p <= sys.float_info.max):
        raise ValueError(f"{op}: p must be in (0, inf), got {_shown(p)}")


def epsilon(op: str, eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__} {eps!r}")
    if not (0 <= eps <= sys.float_info.max):
        raise ValueError(f"{op}: eps must be in [0, inf), got {_shown(eps)}")


def no_gradient(op: str, name: str, t: Tensor, why: str) -> None:
    """Refuses a gradient that nobody computes, instead of returning a silent zero."""
    if torch.is_grad_enabled() and t.requires_grad:
        raise NotImplementedError(f"{op}: {name} must not require gradients, {why}; detach it")
