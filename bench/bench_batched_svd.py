"""Schatten sums of one layer's components under a boolean selection.

`batched_svd/<case>` is the factored sum, which the research code computes: it starts from the mask, `torch` from the
counts, fastapd from its selection, which holds the counts. `schatten/<case>` is the exact sum, from singular values:
`torch_svdvals` takes those of the products, the library's routine, `torch_gram` those of the factors' Gram matrices.
`fastapd_step` is what a training step calls: value and gradients in one pass, these added to buffers that are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import plain, upstream
from bench.cases import RESIDUAL_SMALL, TMS_5_2, TMS_5_2_SMALL, TMS_40_10, Case, Layer, Problem, problem
from bench.harness import (
    BOTH,
    FORWARD,
    TIGHT_TOLERANCE,
    Answer,
    Contender,
    chosen,
    compete,
    compiled,
    cpu_backends,
    grid,
    reference_in_float64,
    same,
    skip_if_refused,
    transposed,
)
from fastapd._random import stream
from fastapd.ops import schatten, schatten_factored
from fastapd.ops._batched_svd import schatten_accumulate
from fastapd.reference import batched_svd as reference

EPS = 1e-16
CASES = (TMS_5_2_SMALL, TMS_5_2, TMS_40_10, RESIDUAL_SMALL)


def _ones(p: Problem) -> Tensor:
    return torch.ones(p.case.n_instances, device=p.case.device)


# ----------------------------------------------------------------------------------------------------- the factored sum


def _upstream(p: Problem) -> Contender:
    """The term of one layer, without its normalisation. It adds up millions of tiny numbers in float32."""
    mask = p.selection.mask.transpose(0, 1).contiguous()
    leaves = (p.Ats[0].mT.contiguous(), p.Bs[0])

    def function(A: Tensor, B: Tensor) -> Tensor:
        return upstream.schatten({"layer": (A, B)}, mask, p.case.p, 1) * p.case.batch

    return Contender(function, leaves, _ones(p), same, (same, same), rounding=100)


def _torch(p: Problem, compile_it: bool = False) -> Contender:
    counts, batch = p.selection.counts, p.case.batch

    def function(At: Tensor, B: Tensor) -> Tensor:
        return plain.schatten(At, B, counts, batch, p.case.p)

    form = compiled(function, p.case.device) if compile_it else function
    return Contender(form, (p.Ats[0], p.Bs[0]), _ones(p), same, (transposed, same))


def ours(p: Problem) -> Contender:
    def function(At: Tensor, B: Tensor) -> Tensor:
        return schatten_factored(At.mT, B, p.selection.counts, p.case.p, EPS, p.case.batch)

    return Contender(function, (p.Ats[0], p.Bs[0]), _ones(p), same, (transposed, same))


def factored_args(p: Problem, direction: str) -> tuple[Any, ...]:
    """What the op is given."""
    return p.Ats[0].mT, p.Bs[0], p.selection.counts, p.case.p, EPS, p.case.batch, direction == BOTH


def factored_work(p: Problem, direction: str) -> tuple[int, int]:
    """Flops and bytes: lengths of all rows, and in the second direction their multiples."""
    n_factors = p.Ats[0].numel() + p.Bs[0].numel()
    return (2 if direction == FORWARD else 4) * n_factors, (4 if direction == FORWARD else 8) * n_factors


MASK_ELEMENTS = 1 << 27
"""Of [b, C, m] in float64, up to which the oracle goes by the mask."""


@functools.lru_cache(maxsize=1)
def expected(case: Case) -> Answer:
    p = problem(case)
    mask = p.selection.mask.double() if case.batch * case.n_components * case.rank <= MASK_ELEMENTS else None

    def function(A: Tensor, B: Tensor) -> Tensor:
        if mask is None:
            return reference.schatten_factored(A, B, p.selection.counts, case.p, EPS, case.batch, False)[0]
        return reference.schatten_factored_masked(A, B, mask, case.p, EPS, False)[0]

    return reference_in_float64(function, (p.Ats[0].mT, p.Bs[0]), _ones(p))


FACTORED = {"upstream": _upstream, "torch": _torch, "torch_compile": lambda p: _torch(p, compile_it=True)}


@grid(
    lambda case: (*FACTORED, *cpu_backends("schatten_factored")),
    CASES,
    lambda case: (FORWARD, BOTH),
    compiled=lambda case, direction: direction == BOTH,
)
def bench_batched_svd(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p = problem(case)
    args = factored_args(p, direction)
    skip_if_refused("schatten_factored", contender, args)
    flops, n_bytes = factored_work(p, direction)
    compete(
        benchmark,
        "batched_svd",
        contender,
        direction,
        case,
        FACTORED.get(contender, ours)(p),
        expected(case),
        chosen("schatten_factored", args),
        flops=flops,
        n_bytes=n_bytes,
    )


# -------------------------------------------------------------------------------------------------------- the exact sum


def _drawn(name: str, n_components: int, d_in: int, d_out: int, rank: int) -> Layer:
    case = Case(name, "layer", 1, 64, n_components, rank, d_in, d_out, topk=1.0, p=0.9)
    return Layer(name, case)


EXACT_CASES = (
    _drawn("c1000_64x64_m4", 1000, 64, 64, 4),
    _drawn("c1000_64x64_m8", 1000, 64, 64, 8),
    _drawn("c1000_256x256_m4", 1000, 256, 256, 4),
    _drawn("c1000_256x256_m8", 1000, 256, 256, 8),
    _drawn("c256_256x256_m16", 256, 256, 256, 16),
    _drawn("c130_1000x50_m50", 130, 1000, 50, 50),
)


@functools.lru_cache(maxsize=1)
def factors_of(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """At [1, C, m, d_in], B [1, C, m, d_out] and counts [1, C]."""
    generator, case = stream(0, f"bench {layer.name}"), layer.case
    (d_in, d_out), shape = layer.shape, (1, case.n_components, case.rank)
    counts = torch.randint(1, case.batch, shape[:2], generator=generator)
    factors = (torch.randn(*shape, d, generator=generator).to(case.device) for d in (d_in, d_out))
    return *factors, counts.to(case.device)


def exact_form(layer: Layer, form: Any) -> Contender:
    At, B, counts = factors_of(layer)
    grads = (transposed, same)
    rounding = 100 if form is plain.svdvals_of_products else 1  # float32 throughout
    return Contender(
        lambda At, B: form(At, B, counts, layer.case.p),
        (At, B),
        torch.ones(1, device=layer.case.device),
        same,
        grads,
        rounding=rounding,
    )


@functools.lru_cache(maxsize=1)
def expected_exact(layer: Layer) -> Answer:
    At, B, counts = (t.cpu() for t in factors_of(layer))  # LAPACK's singular values, wherever the numbers are
    total, grad_At, grad_B = reference.schatten(At.double().mT, B.double(), counts, layer.case.p, EPS, -1, True)
    return [t.to(layer.case.device) for t in (total, grad_At.mT, grad_B)]


class _IntoBuffers(Contender):
    """Adds to its own buffers: those of the first call hold the gradients, later ones only cost the same."""

    adds = True

    def call(self, direction: str) -> Callable[[], Any]:
        At, B, *_ = self.leaves
        grad_At, grad_B = torch.zeros_like(At), torch.zeros_like(B)

        def both() -> tuple[Any, ...]:
            with torch.no_grad():
                return self.function(At, B, grad_At, grad_B), grad_At, grad_B

        return both


def _step(layer: Layer) -> Contender:
    At, B, counts = factors_of(layer)

    def function(At: Tensor, B: Tensor, grad_At: Tensor, grad_B: Tensor) -> Tensor:
        return schatten_accumulate(At.mT, B, counts, layer.case.p, EPS, -1, True, 1.0, grad_At, grad_B)

    return _IntoBuffers(function, (At, B), None, same, (transposed, same))


def ours_exact(layer: Layer) -> Contender:
    return exact_form(layer, lambda At, B, counts, p: schatten(At.mT, B, counts, p, EPS))


def exact_args(layer: Layer) -> tuple[Any, ...]:
    """What the op is given."""
    At, B, counts = factors_of(layer)
    return At.mT, B, counts, layer.case.p, EPS, -1, True


def exact_work(layer: Layer) -> tuple[int, int]:
    """Flops of two Gram matrices and two products with factors, where one in float64 counts twice; and bytes."""
    n_factors = layer.case.n_components * layer.case.rank * sum(layer.shape)
    return 2 * (2 * 3 * layer.case.rank * n_factors), 8 * n_factors


EXACT = {
    "torch_svdvals": lambda layer: exact_form(layer, plain.svdvals_of_products),
    "torch_gram": lambda layer: exact_form(layer, plain.schatten_exact),
    "fastapd_step": _step,
}


@grid(lambda layer: (*EXACT, *cpu_backends("schatten")), EXACT_CASES, lambda layer: (BOTH,))
def bench_schatten(benchmark: Any, contender: str, case: Layer, direction: str) -> None:
    args = exact_args(case)
    skip_if_refused("schatten", contender, args)
    flops, n_bytes = exact_work(case)
    compete(
        benchmark,
        "schatten",
        contender,
        direction,
        case,
        EXACT.get(contender, ours_exact)(case),
        expected_exact(case),
        chosen("schatten", args),
        flops=flops,
        n_bytes=n_bytes,
        output_tolerance=TIGHT_TOLERANCE,
    )
