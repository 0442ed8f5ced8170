"""Registers torch ops whose implementation is chosen per call; shared by the op files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled

from fastapd import backends

_LIBRARY = torch.library.Library("fastapd", "DEF")


def outside_autocast(function: Callable[..., Any], *args: Any) -> Any:
    """An op computes in the dtype of its arguments, as its fake says; a GEMM under autocast would not."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)
    return function(*args)


PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that hold numbers and nothing else: no fakes, no subclasses."""


def call(name: str, *args: Any) -> Any:
    """What `torch.ops.fastapd.<name>` does on plain tensors under no_grad, without the cost of torch's dispatcher."""
    return outside_autocast(backends.choose(name, args), *args)


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines `torch.ops.fastapd.<name>`: schema, fake, autograd, and an implementation that asks `backends.choose`.

    Args:
        name: The op's name, a row of `backends.TABLE`.
        schema: Its torch schema without the name, e.g. "(Tensor A, Tensor B) -> Tensor".
        fake: Shapes and dtypes of the outputs; runs the same check as the public op.
        setup_context: What to keep for the backward pass, as in `torch.library.register_autograd`.
        backward: The gradient; an op without one, such as one that writes into its arguments, refuses inputs that
            require gradients.

    Returns:
        The op, callable.
    """

    def run(*args: Any) -> Any:
        return call(name, *args)

    def gradient(ctx: Any, *grads: Tensor) -> Any:
        if backward is None:
            raise NotImplementedError(f"{name}: is not differentiable; detach its inputs")
        return outside_autocast(backward, ctx, *grads)

    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    qualified = f"fastapd::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    op = getattr(torch.ops.fastapd, name).default
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        torch.library.register_autograd(qualified, gradient, setup_context=setup_context, lib=_LIBRARY)
        return op

    def refuse_gradients(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise NotImplementedError(f"{name}: is not differentiable; detach its inputs")
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*args)
        torch.autograd.graph.increment_version([args[i] for i in written])
        return result

    # torch takes no formula for an op that writes into its arguments, and would treat its outputs as constants
    _LIBRARY.impl(name, refuse_gradients, "Autograd")
    return op


def no_double_backward(op: str) -> None:
    """Refuses to build a graph of a backward pass whose own derivative nobody computes; call it in such a backward."""
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: a second derivative is not computed; call backward without create_graph=True")


def with_instances(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors with a leading instance axis of size one."""
    return tuple(t.unsqueeze(0) for t in tensors)


def constant(op: Any, *args: Any) -> Any:
    """Calls an op without a gradient: its implementation at once, where nothing is there to see torch's op.

    The dispatcher costs a call some 10 µs, as much as a small op itself. It stays where somebody needs it: compilers,
    tracers, profilers, function transforms, and tensors and modes that bring dispatch rules of their own.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or _profiler_enabled()
    ):
        return op(*args)
    for a in args:
        if isinstance(a, Tensor) and (type(a) is not Tensor or a.is_meta):
            return op(*args)
    return outside_autocast(backends.choose(op.name().removeprefix("fastapd::"), args), *args)
