"""W = sum over components of A_c B_c and its squared distance to a target: the faithfulness term of one layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bench import plain, upstream
from bench.cases import RESIDUAL, TMS_5_2, TMS_40_10, Case, Problem, problem
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
from fastapd.ops import component_sum_loss
from fastapd.reference import component_sum as reference

OP = "component_sum_loss"
CASES = (TMS_5_2, TMS_40_10, RESIDUAL)  # the batch does not enter


def _ones(p: Problem) -> Tensor:
    return torch.ones(p.case.n_instances)


def _upstream(p: Problem) -> Contender:
    leaves = (p.Ats[0].mT.contiguous(), p.Bs[0])
    target = {"layer": p.weights[0]}
    return Contender(
        lambda A, B: upstream.param_match({"layer": (A, B)}, target, 1), leaves, _ones(p), same, (same, same)
    )


def _torch(p: Problem) -> Contender:
    leaves = (p.Ats[0], p.Bs[0])
    return Contender(
        lambda At, B: plain.component_sum_loss(At, B, p.weights[0]), leaves, _ones(p), same, (transposed, same)
    )


def _fastapd(p: Problem) -> Contender:
    leaves = (p.Ats[0], p.Bs[0])
    return Contender(
        lambda At, B: component_sum_loss(At.mT, B, p.weights[0])[0], leaves, _ones(p), same, (transposed, same)
    )


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> Answer:
    p = problem(case)
    target = p.weights[0].double()
    leaves = (p.Ats[0].mT, p.Bs[0])
    return reference_in_float64(lambda A, B: reference.component_sum_loss(A, B, target)[0], leaves, _ones(p))


CONTENDERS = {"upstream": _upstream, "torch": _torch}


@grid(lambda case: (*CONTENDERS, *cpu_backends(OP)), CASES, lambda case: (FORWARD, BOTH))
def bench_component_sum(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p = problem(case)
    args = (p.Ats[0].mT, p.Bs[0], p.weights[0])
    skip_if_refused(OP, contender, args)
    gemm = 2 * p.weights[0].numel() * case.n_components * case.rank
    touched = p.Ats[0].nbytes + p.Bs[0].nbytes
    compete(
        benchmark,
        "component_sum",
        contender,
        direction,
        case,
        CONTENDERS.get(contender, _fastapd)(p),
        _expected(case),
        chosen(OP, args),
        flops=gemm if direction == FORWARD else 3 * gemm,
        n_bytes=(touched if direction == FORWARD else 3 * touched) + p.weights[0].nbytes,
    )
