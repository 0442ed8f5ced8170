"""The factored Schatten sum of one layer's components under a boolean selection.

The research code starts from the mask, `torch` from the counts, fastapd from its selection, which holds the counts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bench import plain, upstream
from bench.cases import CASES, Case, Problem, problem
from bench.harness import (
    BOTH,
    FORWARD,
    Answer,
    Contender,
    chosen,
    compete,
    cpu_backends,
    grid,
    reference_in_float64,
    same,
    skip_if_refused,
    transposed,
)
from fastapd.ops import schatten_factored
from fastapd.reference import batched_svd as reference

OP = "schatten_factored"
EPS = 1e-16


def _ones(p: Problem) -> Tensor:
    return torch.ones(p.case.n_instances)


def _upstream(p: Problem) -> Contender:
    """The term of one layer, without its normalisation."""
    mask = p.selection.mask.transpose(0, 1).contiguous()
    leaves = (p.Ats[0].mT.contiguous(), p.Bs[0])

    def function(A: Tensor, B: Tensor) -> Tensor:
        return upstream.schatten({"layer": (A, B)}, mask, p.case.p, 1) * p.case.batch

    return Contender(function, leaves, _ones(p), same, (same, same))


def _torch(p: Problem) -> Contender:
    counts, batch = p.selection.counts, p.case.batch

    def function(At: Tensor, B: Tensor) -> Tensor:
        return plain.schatten(At, B, counts, batch, p.case.p)

    return Contender(function, (p.Ats[0], p.Bs[0]), _ones(p), same, (transposed, same))


def _fastapd(p: Problem) -> Contender:
    def function(At: Tensor, B: Tensor) -> Tensor:
        return schatten_factored(At.mT, B, p.selection.counts, p.case.p, EPS, p.case.batch)

    return Contender(function, (p.Ats[0], p.Bs[0]), _ones(p), same, (transposed, same))


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> Answer:
    p = problem(case)
    mask = p.selection.mask.double()

    def function(A: Tensor, B: Tensor) -> Tensor:
        return reference.schatten_factored_masked(A, B, mask, case.p, EPS, False)[0]

    return reference_in_float64(function, (p.Ats[0].mT, p.Bs[0]), _ones(p))


CONTENDERS = {"upstream": _upstream, "torch": _torch}


@grid(lambda case: (*CONTENDERS, *cpu_backends(OP)), CASES, lambda case: (FORWARD, BOTH))
def bench_batched_svd(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p = problem(case)
    args = (p.Ats[0].mT, p.Bs[0], p.selection.counts, case.p, EPS, case.batch, direction == BOTH)
    skip_if_refused(OP, contender, args)
    n_factors = p.Ats[0].numel() + p.Bs[0].numel()
    compete(
        benchmark,
        "batched_svd",
        contender,
        direction,
        case,
        CONTENDERS.get(contender, _fastapd)(p),
        _expected(case),
        chosen(OP, args),
        flops=(2 if direction == FORWARD else 4) * n_factors,
        n_bytes=(4 if direction == FORWARD else 8) * n_factors,
    )
