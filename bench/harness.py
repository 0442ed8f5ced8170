"""How a contender is checked and timed: the same for every op."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import machine
from fastapd import backends

FORWARD, BOTH = "forward", "forward_backward"

TOLERANCE, TIGHT_TOLERANCE = 1e-5, 1e-6
"""Largest ‖t − t64‖ / ‖t64‖ of an output or a gradient in float32, t64 from the reference in float64; the second is for
attributions and for exact Schatten sums."""


SLOW_SECONDS, SLOW_TOTAL_SECONDS = 0.1, 1.0
"""A call that takes longer than the first is timed one by one: twice, and on for the second in all."""


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
        leaves: What it is differentiated by; copied, unless they are bound to the function already.
        cotangent: The gradient of its output.
        output, grads: From its layout to [n_instances, batch, ..] and A [n_instances, C, d_in, m].
        bound: Whether the function knows its leaves and takes none.
        rounding: How much more it may be off than the tolerances; only for baselines that add up badly in float32.
    """

    function: Callable[..., Any]
    leaves: Sequence[Tensor]
    cotangent: Tensor | None = None
    output: Callable[[Any], Tensor] = same
    grads: Sequence[Callable[[Tensor], Tensor]] = field(default_factory=list)
    bound: bool = False
    rounding: float = 1
    adds: ClassVar[bool] = False
    """Whether every call adds its gradients to those of the calls before."""

    def __post_init__(self) -> None:
        if not self.bound:
            self.leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in self.leaves]

    def call(self, direction: str) -> Callable[[], Any]:
        """What is timed: forward without a graph, or forward and the gradients of all leaves."""
        given = () if self.bound else self.leaves
        if direction == FORWARD or not self.leaves:

            def forward() -> tuple[Any]:
                with torch.no_grad():
                    return (self.function(*given),)

            return forward
        for t in self.leaves:
            t.requires_grad_()

        def both() -> tuple[Any, ...]:
            out = self.function(*given)
            return out, *torch.autograd.grad(out, self.leaves, self.cotangent)

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


def assert_close(what: str, ours: Tensor, exact: Tensor, tolerance: float) -> None:
    """Masks are equal; the others are close by norm."""
    assert ours.shape == exact.shape, f"{what}: shape {list(ours.shape)}, not {list(exact.shape)}"
    if exact.dtype == torch.bool:
        assert torch.equal(ours, exact), f"{what}: {int((ours != exact).sum())} of {exact.numel()} entries differ"
        return
    error = ((ours.double() - exact.double()).norm() / exact.double().norm()).item()
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


def assert_agrees(
    what: str, contender: Contender, result: tuple[Any, ...], expected: Answer, output_tolerance: float
) -> None:
    """The output and the gradients of a contender against the reference."""
    for i, (ours, exact) in enumerate(zip(contender.canonical(result), expected[: len(result)], strict=True)):
        tolerance = (TOLERANCE if i else output_tolerance) * contender.rounding
        assert_close(f"{what}, {f'gradient {i}' if i else 'output'}", ours, exact, tolerance)


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
    contenders: Callable[[Any], Sequence[str]],
    cases: Sequence[Any],
    directions: Callable[[Any], Sequence[str]],
    compiled: Callable[[Any, str], bool] = lambda case, direction: True,
) -> pytest.MarkDecorator:
    """Parametrises a benchmark: ids [contender-case-float32-direction], contenders that compete next to each other.

    Args:
        contenders: Of a case.
        cases: What has a name and sizes.
        directions: Of a case.
        compiled: Whether "torch_compile" is among the contenders of a case and direction: compiling takes its time.
    """
    rows = [
        pytest.param(contender, case, direction, id=f"{contender}-{case.name}-float32-{direction}")
        for case in cases
        for direction in directions(case)
        for contender in contenders(case)
        if contender != "torch_compile" or compiled(case, direction)
    ]
    return pytest.mark.parametrize(("contender", "case", "direction"), rows)


# -------------------------------------------------------------------------------------------------------------- gates


def lacks_memory(n_bytes: int) -> str | None:
    """Why a contender that needs so much is left out, None if there is enough."""
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError, StopIteration):  # it counts what caches would give back
            lines = Path("/proc/meminfo").read_text().splitlines()
            available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (ValueError, OSError):
        return None
    allowed = min(available, float(os.environ.get("FASTAPD_BENCH_MEMORY", "inf")))
    if n_bytes <= allowed:
        return None
    return f"it holds about {n_bytes / 2**30:.1f} GiB at once and {allowed / 2**30:.1f} GiB may be used"


COMPILER = "inductor"
"""What torch.compile hands a graph to; the rehearsal of `bench/gpu.py` leaves it as it is, with "eager"."""


@functools.lru_cache(maxsize=1)
def cannot_compile(device: str = "cpu") -> str | None:
    """Why torch.compile cannot be timed here, None if it can: on a CPU it needs a C++ compiler."""
    try:
        torch.compile(lambda x: (x + 1).sum(), dynamic=False, backend=COMPILER)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the compiler or its driver raise
        return f"torch.compile fails here: {str(error).splitlines()[0]}"
    return None


def compiled(function: Callable[..., Any], device: str = "cpu") -> Callable[..., Any]:
    """torch.compile of a function of fixed shapes; skips with the reason where that cannot be had."""
    if (reason := cannot_compile(device)) is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend=COMPILER)


# --------------------------------------------------------------------------------------------------------- measurement


class Seen(NamedTuple):
    """What one call took and held.

    Attributes:
        seconds: CPU time, the watching included.
        peak_bytes: The most that torch's allocator held at once beyond what was there before; native scratch memory is
            not seen. None if unknown.
        resident_bytes: By how much the memory of the process grew at most, native scratch included. Freed memory is
            given back first; what the C library keeps all the same can be used again unseen, so that this may be less
            than what was held. None where the system does not say.
    """

    seconds: float
    peak_bytes: int | None
    resident_bytes: int | None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def watch(call: Callable[[], Any]) -> tuple[Any, Seen]:
    """The result of one call, and what it took."""
    from torch.profiler import ProfilerActivity, profile

    before: int | None = None
    with contextlib.suppress(OSError, AttributeError, StopIteration):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident
        before = _status("VmRSS")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        started = time.process_time()
        result = call()
        seconds = time.process_time() - started
    resident = None if before is None else max(_status("VmHWM") - before, 0)
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None:
        return result, Seen(seconds, None, resident)
    held = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, Seen(seconds, peak or None, resident)  # nothing at all: another thread worked, which is not seen


def measure(benchmark: Any, group: str, call: Callable[[], Any], seen: Seen, **info: Any) -> None:
    """Times a call that was found to agree.

    Args:
        group: "<op>/<case>".
        call: What is timed.
        seen: What one call took.
        info: For `extra_info`: contender, direction, fastapd (what of fastapd it is: "chosen", "forced" or ""), flops
            and bytes of the formula, the same for all contenders, so that they are rates of useful work.
    """
    benchmark.group = group
    memory = {k: v for k, v in seen._asdict().items() if k != "seconds" and v is not None}
    benchmark.extra_info.update({"threads": torch.get_num_threads(), "dtype": "float32", **info, **memory})
    if seen.seconds > SLOW_SECONDS:
        benchmark.pedantic(call, rounds=max(2, math.ceil(SLOW_TOTAL_SECONDS / seen.seconds)), iterations=1)
    else:
        benchmark(call)


def compete(
    benchmark: Any,
    op: str,
    name: str,
    direction: str,
    case: Any,
    contender: Contender,
    expected: Answer | None,
    default: str,
    flops: int,
    n_bytes: int,
    output_tolerance: float = TOLERANCE,
) -> None:
    """Checks one contender against the reference in float64, then times it.

    Args:
        op: The stem.
        name: The contender's.
        case: What has a name.
        expected: Output and gradients; the latter are left out for the forward direction. None for what is no
            contender but a bound, the library's share of the work.
        default: The backend that fastapd takes here by itself, or "fastapd" if the contender names none.
        flops, n_bytes: Of the formula in this direction.
        output_tolerance: Of the output; that of gradients is always the same.
    """
    with with_backend(name):
        call = contender.call(direction)
        if name == "torch_compile":
            call()
        result, seen = watch(call)
        if expected is not None:
            assert_agrees(f"{op} by {name} on {case.name}", contender, result, expected, output_tolerance)
        del result
        ours = "chosen" if name == default else "forced" if name in backends.BACKENDS else ""
        info = {"contender": name, "direction": direction, "fastapd": ours, "flops": flops, "bytes": n_bytes}
        info["floor_seconds"] = machine.floor_seconds(flops, n_bytes)
        measure(benchmark, f"{op}/{case.name}", call, seen, **info)
