"""Registers torch ops whose implementation is chosen per call; shared by the op files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import maybe_current_level

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


def _eager(
    name: str,
    op: Callable[..., Any],
    run: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    gradient: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """The op without torch's dispatcher where nobody looks at it, which halves the cost of a small call.

    Whoever compiles, traces, profiles, fakes, transforms or subclasses tensors gets `torch.ops.fastapd.<name>`.
    """
    function: Any = None
    if gradient is not None:
        assert setup_context is not None

        def forward(ctx: Any, *args: Any) -> Any:  # with setup_context apart, torch inspects signatures at every call
            outputs = run(*args)
            setup_context(ctx, args, outputs)
            return outputs

        members = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
        function = type(name, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or maybe_current_level() is not None
            or torch._C._get_tracing_state() is not None
            or _profiler_enabled()
        ):
            return op(*args)
        differentiable = False
        for a in args:
            for t in a if isinstance(a, list) else (a,):
                if isinstance(t, Tensor):
                    if type(t) not in PLAIN or t.device.type not in ("cpu", "cuda"):
                        return op(*args)
                    differentiable |= t.requires_grad
        if not differentiable or not torch.is_grad_enabled():
            return run(*args)
        return op(*args) if function is None else function.apply(*args)

    return call


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
        The op, callable; one of plain tensors is called without torch's dispatcher where that makes no difference.
    """

    def run(*args: Any) -> Any:
        return outside_autocast(backends.choose(name, args), *args)

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
        takes_lists = any(isinstance(a.type, torch.ListType) for a in op._schema.arguments)
        own = None if takes_lists or backward is None else gradient  # autograd.Function does not look into lists
        return _eager(name, op, run, setup_context, own)

    def run_in_place(*args: Any) -> Any:
        result = run(*args)
        torch.autograd.graph.increment_version([args[i] for i in written])
        return result

    def refuse_gradients(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise NotImplementedError(f"{name}: is not differentiable; detach its inputs")
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*args)
        torch.autograd.graph.increment_version([args[i] for i in written])
        return result

    # torch takes no formula for an op that writes into its arguments, and would treat its outputs as constants
    _LIBRARY.impl(name, refuse_gradients, "Autograd")
    return _eager(name, op, run_in_place, None, None)


def no_double_backward(op: str) -> None:
    """Refuses to build a graph of a backward pass whose own derivative nobody computes; call it in such a backward."""
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: a second derivative is not computed; call backward without create_graph=True")


def with_instances(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors with a leading instance axis of size one."""
    return tuple(t.unsqueeze(0) for t in tensors)
