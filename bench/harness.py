"""How a contender is checked and timed: the same for every op."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import Case
from fastapd import backends

FORWARD, BOTH = "forward", "forward_backward"

TOLERANCE = 1e-5
"""Largest ‖t − t64‖ / ‖t64‖ of an output or gradient in float32, t64 from the reference in float64."""

SLOW_SECONDS, SLOW_TOTAL_SECONDS = 0.1, 1.5
"""A call that takes longer than the first is timed one by one, three times or for the second in all."""


def instances_first(t: Tensor) -> Tensor:
    """From the research code's [batch, n_instances, ..] to [n_instances, batch, ..], or back."""
    return t.transpose(0, 1)


def same(t: Tensor) -> Tensor:
    return t


def transposed(t: Tensor) -> Tensor:
    """From At to A, or back."""
    return t.mT


@dataclass
class Contender:
    """One way to compute an op.

    Attributes:
        function: Of the leaves, returns one tensor; what it needs besides is bound to it.
        leaves: What it is differentiated by.
        cotangent: The gradient of its output.
        output, grads: From its layout to [n_instances, batch, ..] and A [n_instances, C, d_in, m].
    """

    function: Callable[..., Any]
    leaves: Sequence[Tensor]
    cotangent: Tensor | None = None
    output: Callable[[Any], Tensor] = same
    grads: Sequence[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in self.leaves]

    def call(self, direction: str) -> Callable[[], Any]:
        """What is timed: forward without a graph, or forward and the gradients of all leaves."""
        if direction == FORWARD:

            def forward() -> tuple[Any]:
                with torch.no_grad():
                    return (self.function(*self.leaves),)

            return forward
        leaves = [t.requires_grad_() for t in self.leaves]

        def both() -> tuple[Any, ...]:
            out = self.function(*leaves)
            return out, *torch.autograd.grad(out, leaves, self.cotangent)

        return both

    def canonical(self, result: tuple[Any, ...]) -> list[Tensor]:
        """A result in the layout of the reference: the output, then gradients if it has them."""
        out, *grads = result
        layouts = self.grads if grads else []
        return [self.output(out).detach(), *(f(g) for f, g in zip(layouts, grads, strict=True))]


Answer = list[Tensor]
"""An output, and the gradients of the leaves where they are wanted."""


def reference_in_float64(function: Callable[..., Tensor], leaves: Sequence[Tensor], cotangent: Tensor | None) -> Answer:
    """Output and gradients of a formula of `fastapd.reference`, differentiated by autograd."""
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = function(*wide)
    if cotangent is None:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, wide, cotangent.double())]


def assert_agrees(what: str, got: Iterable[Tensor], expected: Answer, tolerance: float = TOLERANCE) -> None:
    """Masks are equal; the others are close by norm."""
    for i, (ours, exact) in enumerate(zip(got, expected, strict=True)):
        where = f"{what}, {f'gradient {i}' if i else 'output'}"
        assert ours.shape == exact.shape, f"{where}: shape {list(ours.shape)}, not {list(exact.shape)}"
        if exact.dtype == torch.bool:
            assert torch.equal(ours, exact), f"{where}: {int((ours != exact).sum())} of {exact.numel()} entries differ"
            continue
        error = ((ours.double() - exact).norm() / exact.norm()).item()
        assert error <= tolerance, f"{where}: relative error {error:.2e}, allowed {tolerance:.0e}"


def with_backend(contender: str) -> contextlib.AbstractContextManager[Any]:
    """Forces the backend a contender is named after; other contenders get what fastapd chooses."""
    return backends.use_backend(contender if contender in backends.BACKENDS else "auto")


def cpu_backends(op: str) -> list[str]:
    """fastapd's own contenders: the backends of an op that run on CPU tensors."""
    return [b for b in ("reference", "cpu") if b in backends.TABLE[op]]


def skip_if_refused(op: str, contender: str, args: tuple[Any, ...]) -> None:
    """Skips, with the reasons, a backend that refuses these sizes or was not built; other contenders always run."""
    reasons = backends.explain(op, *args).get(contender)
    if reasons:
        pytest.skip(f"{contender}: {'; '.join(reasons)}")


def chosen(op: str, args: tuple[Any, ...]) -> str:
    """The backend that fastapd takes when none is forced."""
    return next(b for b, reasons in backends.explain(op, *args).items() if not reasons)


def grid(
    contenders: Callable[[Case], Sequence[str]], cases: Sequence[Case], directions: Callable[[Case], Sequence[str]]
) -> pytest.MarkDecorator:
    """Parametrises a benchmark: ids [contender-case-float32-direction], contenders that compete next to each other."""
    rows = [
        pytest.param(contender, case, direction, id=f"{contender}-{case.name}-float32-{direction}")
        for case in cases
        for direction in directions(case)
        for contender in contenders(case)
    ]
    return pytest.mark.parametrize(("contender", "case", "direction"), rows)


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """The most that torch's allocator held at once for one call, beyond what was there before; None if unknown.

    Scratch memory of native kernels is not seen.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None:
        return None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(benchmark: Any, group: str, call: Callable[[], Any], seconds: float | None = None, **info: Any) -> None:
    """Times a call that was found to agree.

    Args:
        group: "<op>/<case>".
        call: What is timed.
        seconds: What one call took, if known.
        info: For `extra_info`: contender, direction, fastapd (what of fastapd it is: "chosen", "forced" or ""), flops
            and bytes of the formula, the same for all contenders, so that they are rates of useful work.
    """
    benchmark.group = group
    benchmark.extra_info.update(info, threads=torch.get_num_threads(), dtype="float32")
    if seconds is None:
        started = time.process_time()
        call()
        seconds = time.process_time() - started
    if (peak := peak_bytes(call)) is not None:
        benchmark.extra_info["peak_bytes"] = peak
    if seconds > SLOW_SECONDS:
        rounds = max(3, math.ceil(SLOW_TOTAL_SECONDS / seconds))
        benchmark.pedantic(call, rounds=rounds, iterations=1)
    else:
        benchmark(call)


def compete(
    benchmark: Any,
    op: str,
    name: str,
    direction: str,
    case: Case,
    contender: Contender,
    expected: Answer,
    default: str,
    flops: int,
    n_bytes: int,
) -> None:
    """Checks one contender against the reference in float64, then times it.

    Args:
        op: The stem.
        name: The contender's.
        expected: Output and gradients; the latter are left out for the forward direction.
        default: The backend that fastapd takes here by itself.
        flops, n_bytes: Of the formula in this direction.
    """
    with with_backend(name):
        call = contender.call(direction)
        started = time.process_time()
        result = call()
        seconds = time.process_time() - started
        got = contender.canonical(result)
        assert_agrees(f"{op} by {name} on {case.name}", got, expected[: len(result)])
        del result, got
        ours = "" if name not in backends.BACKENDS else "chosen" if name == default else "forced"
        info = {"contender": name, "direction": direction, "fastapd": ours, "flops": flops, "bytes": n_bytes}
        measure(benchmark, f"{op}/{case.name}", call, seconds, **info)
