"""W = sum over components of A_c B_c and its squared distance to a target: the faithfulness term of one layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bench import upstream
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
from fastapd.ops import component_sum_loss
from fastapd.reference import component_sum as reference

OP = "component_sum_loss"


def _upstream(p: Problem) -> Contender:
    def function(A: Tensor, B: Tensor) -> Tensor:
        return ((upstream.weight(A, B) - p.weights[0]) ** 2).sum((-2, -1))

    return Contender(function, (p.Ats[0].mT.contiguous(), p.Bs[0]), _ones(p), grads=(same, same))


def _torch(p: Problem) -> Contender:
    """One GEMM over the concatenated ranks that starts from the target."""

    def function(At: Tensor, B: Tensor) -> Tensor:
        residual = torch.baddbmm(p.weights[0], At.flatten(1, 2).mT, B.flatten(1, 2), beta=-1)
        return residual.square().sum((-2, -1))

    return Contender(function, (p.Ats[0], p.Bs[0]), _ones(p), grads=(transposed, same))


def _fastapd(p: Problem) -> Contender:
    def function(At: Tensor, B: Tensor) -> Tensor:
        return component_sum_loss(At.mT, B, p.weights[0])[0]

    return Contender(function, (p.Ats[0], p.Bs[0]), _ones(p), grads=(transposed, same))


def _ones(p: Problem) -> Tensor:
    return torch.ones(p.case.n_instances)


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> Answer:
    p = problem(case)
    target = p.weights[0].double()
    return reference_in_float64(
        lambda A, B: reference.component_sum_loss(A, B, target)[0], (p.Ats[0].mT, p.Bs[0]), _ones(p)
    )


@grid(lambda case: ("upstream", "torch", *cpu_backends(OP)), CASES, lambda case: (FORWARD, BOTH))
def bench_component_sum(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p = problem(case)
    args = (p.Ats[0].mT, p.Bs[0], p.weights[0])
    if contender in cpu_backends(OP):
        skip_if_refused(OP, contender, args)
    make = {"upstream": _upstream, "torch": _torch}.get(contender, _fastapd)
    gemm = 2 * p.weights[0].numel() * case.n_components * case.rank
    touched = p.Ats[0].nbytes + p.Bs[0].nbytes
    compete(
        benchmark,
        "component_sum",
        contender,
        direction,
        case,
        make(p),
        _expected(case),
        chosen(OP, args),
        flops=gemm if direction == FORWARD else 3 * gemm,
        n_bytes=(touched if direction == FORWARD else 3 * touched) + p.weights[0].nbytes,
    )
