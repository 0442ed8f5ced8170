"""What every problem does with its contenders: sizes, agreement, who is withheld and who does not fit.

Names of contenders are those of the CPU's benchmarks: `upstream` is the research code's formulation, names that begin
with "torch" are plain torch, compiled torch and library routines, names of backends are fastapd's ops, and `fastapd` is
what a user calls. "tf32" before a name multiplies float32 matrices in TF32, "ieee" in float32; without it libraries use
float32 and fastapd's kernels three products in TF32, which is about as exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import (
    bench_attribution_reduce,
    bench_batch_topk,
    bench_batched_svd,
    bench_component_forward,
    bench_component_sum,
)
from bench._gpu.card import Card
from bench._gpu.checks import backends_of, could_choose, relative_error
from bench._gpu.contest import TF32_TOLERANCE, Candidate, Contest, Work, mode_and_base
from bench.cases import Case, Problem, problem
from bench.harness import TOLERANCE, Contender
from fastapd import backends

Settings = Mapping[str, Any]
"""What the parent says: "constants", "l2_bytes", "until", "quick", and "red", pairs of op and backend that failed."""

WAITS = "it reads the longest group from the device"
"""Why the padded forms of plain torch are not captured."""

Makers = dict[str, Callable[[], Candidate]]


def tiny(case: Case) -> Case:
    """The same problem, small enough for the interpreter."""
    sparse = case.target not in ("mlp", "layer")  # few features are on there, and where none is, all scores are equal
    small = replace(
        case,
        n_instances=1,
        batch=12 if sparse else 6,
        n_components=min(case.n_components, 4),
        rank=min(case.rank, 3),
        n_features=min(case.n_features, 24 if sparse else 6),
        width=min(case.width, 4 if sparse else 6),
        d_embed=min(case.d_embed, 8),
    )
    return small if case.tied else replace(small, topk=0.2 if case.d_embed else 1.5)


def on(card: Card, case: Case) -> Problem:
    """A problem's numbers, on the card."""
    return problem(sized(card, case))


def sized(card: Card, case: Case) -> Case:
    return replace(tiny(case) if card.rehearsal else case, device=card.device)


def forget() -> None:
    """Lets go of the numbers that are kept for the next contender of the same problem."""
    for kept in (
        problem, bench_attribution_reduce.expected, bench_batch_topk.expected, bench_batch_topk.scores_of,
        bench_batched_svd.expected, bench_batched_svd.expected_exact, bench_batched_svd.factors_of,
        bench_component_forward.expected, bench_component_sum.expected,
    ):  # fmt: skip
        kept.cache_clear()


def contest(
    card: Card, group: str, direction: str, work: Work, ops: Sequence[str], given: Settings, **info: Any
) -> Contest:
    """What is known of a problem; `ops` are those that fastapd's contenders stand on."""
    red = {tuple(pair) for pair in given["red"]}

    def withheld(name: str) -> str:
        _, base = mode_and_base(name)
        if not base.startswith("fastapd") and base not in backends.BACKENDS:
            return ""
        own = [("step", "")] if group.startswith("step/") else []
        for op in ops:
            choices = could_choose(op)
            own += [(op, name) for name in ([base] if base in backends.BACKENDS else choices)]
            own += [(op, "fastapd")] if base not in backends.BACKENDS or base in choices else []
        wrong = [f"{op} on {backend}".removesuffix(" on ") for op, backend in own if (op, backend) in red]
        return f"a check of {', '.join(wrong)} failed" if wrong else ""

    return Contest(
        group, direction, work, given["constants"], given["l2_bytes"], withheld, given["until"],
        {"precision": "tf32x3", "l2": "warm", **info},
    )  # fmt: skip


def candidate(
    name: str, contender: Contender, direction: str, expected: list[Tensor] | None, default: str
) -> Candidate:
    """A contender of an op: its result is held against the reference in float64.

    Args:
        expected: None for a bound, which computes something else.
        default: The backend that fastapd chooses, or "fastapd".
    """
    mode, base = mode_and_base(name)
    tolerance = (TF32_TOLERANCE if mode == "tf32" else TOLERANCE) * contender.rounding

    def check(result: tuple[Any, ...], only: int | None = None) -> float:
        if expected is None:
            return 0.0
        worst = 0.0
        found = contender.canonical(result)[:only]
        for i, (got, exact) in enumerate(zip(found, expected[: len(found)], strict=True)):
            what = f"gradient {i}" if i else "output"
            assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, not {list(exact.shape)}"
            if exact.dtype == torch.bool:
                assert torch.equal(got, exact), f"{what}: {int((got != exact).sum())} of {exact.numel()} entries differ"
                continue
            error = relative_error(got, exact)
            assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"
            worst = max(worst, error)
        return worst

    mark = "chosen" if name == default else "forced" if base in backends.BACKENDS or base.startswith("fastapd") else ""
    again = (lambda result: check(result, 1)) if contender.adds else None
    return Candidate(contender.call(direction), check, mark, check_replay=again)


def house(op: str, given: Settings) -> tuple[str, ...]:
    """fastapd's own contenders of an op; the reference last, which is plain torch too."""
    names = backends_of(op)
    return tuple(names if not given["quick"] else names[:1])


def few(given: Settings, *names: str) -> tuple[str, ...]:
    """Contenders that a quick run leaves out."""
    return () if given["quick"] else names


def skip_refused(op: str, name: str, args: tuple[Any, ...]) -> None:
    _, base = mode_and_base(name)
    if base in backends.BACKENDS and (reasons := backends.explain(op, *args)[base]):
        pytest.skip(f"{base}: {'; '.join(reasons)}")


def needs(card: Card, n_bytes: float) -> None:
    """Skips what cannot fit, before it has tried."""
    if n_bytes > card.memory_bytes() and not card.rehearsal:
        room = card.memory_bytes() / 2**30
        pytest.skip(f"it holds about {n_bytes / 2**30:.0f} GiB at once, and {room:.0f} GiB are free")


def each(names: Sequence[str], make: Callable[[str], Candidate]) -> Makers:
    return {name: lambda name=name: make(name) for name in names}
