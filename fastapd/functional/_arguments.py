"""What the functions share: the layers of an argument, checks in the research code's axes, and the way to ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastapd.ops import _check

Layers: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""One tensor for each layer: a tensor if there is one layer, a list, or a mapping by name."""


def instances_first(t: Tensor, instances: bool) -> Tensor:
    """[batch, n_instances, ...] as [n_instances, batch, ...], or the other way round; a view."""
    return t.transpose(0, 1) if instances else t


def size(axes: Sequence[Any]) -> str:
    return "[" + ", ".join(map(str, axes)) + "]"


def layers(op: str, **arguments: Any) -> tuple[list[str], list[list[Tensor]]]:
    """The layers of every argument, in the order of the first one's.

    Returns:
        For each layer what a message adds to an argument's name, and for each argument its tensors.
    """
    first_name, first = next(iter(arguments.items()))
    if isinstance(first, Tensor):
        labels, keys = [""], None
    elif isinstance(first, Mapping):
        keys = list(first)
        labels = [f"[{key!r}]" for key in keys]
    elif isinstance(first, (list, tuple)):
        keys = list(range(len(first)))
        labels = [f"[{i}]" for i in keys]
    else:
        raise TypeError(f"{op}: {first_name} must be a tensor, a list or a mapping of them, got {type(first).__name__}")
    if not labels:
        raise ValueError(f"{op}: {first_name} must have at least one layer, got none")
    found = []
    for name, given in arguments.items():
        if isinstance(first, Tensor):
            if not isinstance(given, Tensor):
                raise TypeError(f"{op}: {name} must be a torch.Tensor like {first_name}, got {type(given).__name__}")
            found.append([given])
            continue
        kind = Mapping if isinstance(first, Mapping) else (list, tuple)
        if not isinstance(given, kind):
            wanted = "a mapping" if kind is Mapping else "a list"
            raise TypeError(f"{op}: {name} must be {wanted} like {first_name}, got {type(given).__name__}")
        assert keys is not None
        if kind is Mapping and set(given) != set(keys):
            raise ValueError(f"{op}: {name} must have the layers of {first_name}, {keys}, got {list(given)}")
        if len(given) != len(keys):
            raise ValueError(f"{op}: {name} must have one tensor for each of the {len(keys)} layers, got {len(given)}")
        found.append([given[key] for key in keys])
    return labels, found


def factors(op: str, labels: Sequence[str], As: Sequence[Tensor], Bs: Sequence[Tensor]) -> bool:
    """The factors of every layer multiply, and agree in instances and components; returns whether they have instances.

    All are of one dtype on one device.
    """
    instances = False
    for label, A, B in zip(labels, As, Bs, strict=True):
        instances = _check.factors(op, A, B, (f"A{label}", f"B{label}"))
        if A is not As[0]:
            _check.tensors(op, **{f"A{labels[0]}": As[0], f"A{label}": A})
        if A.dim() != As[0].dim() or A.shape[:-2] != As[0].shape[:-2]:
            axes = "n_instances and n_components" if As[0].dim() == 4 else "n_components"
            raise ValueError(
                f"{op}: A{label} must have the {axes} of A{labels[0]} {_check.shape(As[0])}, got {_check.shape(A)}"
            )
    return instances


def samples(op: str, name: str, t: Tensor, axes: str, instances: bool, like: str, A: Tensor) -> None:
    """`t` is [batch, (n_instances,) axes] as the factors `A` have instances or not, and of their dtype and device."""
    _check.tensors(op, **{like: A, name: t})
    n = axes.count(",") + 1
    if t.dim() != n + 1 + instances:
        wanted = f"[batch, n_instances, {axes}]" if instances else f"[batch, {axes}]"
        raise ValueError(f"{op}: {name} must have shape {wanted} like {like} {_check.shape(A)}, got {_check.shape(t)}")
    if instances:
        _check.same(op, "n_instances", name, t, 1, like, A, 0)


def optional_instances(op: str, name: str, t: Any, axis: str) -> bool:
    """`t` is [batch, axis] or [batch, n_instances, axis]; returns whether it has instances."""
    _check.tensors(op, **{name: t})
    if t.dim() not in (2, 3):
        raise ValueError(
            f"{op}: {name} must have shape [batch, {axis}] or [batch, n_instances, {axis}], got {_check.shape(t)}"
        )
    return t.dim() == 3


def mask(op: str, given: Any, wanted: Sequence[Any], axes: str, like: str, t: Tensor) -> None:
    """The mask is bool or of the dtype of `t`, on its device, and has the wanted shape."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{op}: mask must be a torch.Tensor, got {type(given).__name__}")
    if given.dtype != torch.bool:
        if given.dtype not in _check.FLOATS:
            raise TypeError(f"{op}: mask must be bool or of the dtype of {like}, {t.dtype}, got {given.dtype}")
        _check.tensors(op, **{like: t, "mask": given})
    elif given.device != t.device:
        raise ValueError(f"{op}: mask must be on the device of {like}, {t.device}, got {given.device}")
    if tuple(given.shape) != tuple(wanted):
        raise ValueError(f"{op}: mask must have shape {axes} = {size(wanted)}, got {_check.shape(given)}")


def number(op: str, name: str, value: Any, low: float, high: float, range_text: str) -> None:
    """`value` is an int or a float (no bool) in [low, high]; NaN is in no range."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__} {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in {range_text}, got {value}")


def positive(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__} {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{op}: {name} must be in (0, inf), got {value}")
