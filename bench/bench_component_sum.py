"""W = sum over components of A_c B_c and its squared distance to a target: the faithfulness term of one layer.

`gemms` is no contender but a bound: the matrix products of value and gradient alone, by the library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import plain, upstream
from bench.cases import MANY, RESIDUAL_SMALL, TMS_5_2, TMS_40_10, Layer, Problem, problem
from bench.harness import (
    BOTH,
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
from fastapd.ops import component_sum_loss
from fastapd.ops._component_sum import component_sum_loss_accumulate
from fastapd.reference import component_sum as reference

OP = "component_sum_loss"
CASES = (
    Layer("tms_5-2", TMS_5_2),
    Layer("tms_40-10", TMS_40_10),
    Layer("resid_in", RESIDUAL_SMALL, 0),
    Layer("resid_out", RESIDUAL_SMALL, 1),
    Layer("c1000_256x256_m4", MANY),
)


def _ones(p: Problem) -> Tensor:
    return torch.ones(p.case.n_instances, device=p.case.device)


def _upstream(p: Problem, i: int) -> Contender:
    leaves = (p.Ats[i].mT.contiguous(), p.Bs[i])
    target = {"layer": p.weights[i]}
    return Contender(
        lambda A, B: upstream.param_match({"layer": (A, B)}, target, 1), leaves, _ones(p), same, (same, same)
    )


def _house(p: Problem, i: int, form: Any) -> Contender:
    W, leaves = p.weights[i], (p.Ats[i], p.Bs[i])
    return Contender(lambda At, B: form(At, B, W), leaves, _ones(p), same, (transposed, same))


def _gemms(p: Problem, i: int) -> Contender:
    """W = At^T B, then the two products of a residual of its size with the factors."""
    At, B, R = p.Ats[i].flatten(1, 2), p.Bs[i].flatten(1, 2), p.weights[i]
    W, dAt, dB = torch.empty_like(R), torch.empty_like(At), torch.empty_like(B)

    def function() -> Tensor:
        torch.bmm(At.mT, B, out=W)
        torch.bmm(B, R.mT, out=dAt)
        return torch.bmm(At, R, out=dB)

    return Contender(function, ())


class _IntoBuffers(Contender):
    """What a training step calls: value and gradients at once, the latter written to buffers that are there."""

    def call(self, direction: str) -> Callable[[], Any]:
        At, B, *_ = self.leaves
        grad_At, grad_B = torch.empty_like(At), torch.empty_like(B)
        return lambda: (self.function(At, B, grad_At, grad_B), grad_At, grad_B)


def _step(p: Problem, i: int) -> Contender:
    def function(At: Tensor, B: Tensor, grad_At: Tensor, grad_B: Tensor) -> Tensor:
        return component_sum_loss_accumulate(At, B, p.weights[i], 1.0, grad_At, grad_B, True)

    return _IntoBuffers(function, (p.Ats[i], p.Bs[i]), None, same, (transposed, same))


CONTENDERS = {
    "upstream": _upstream,
    "torch": lambda p, i: _house(p, i, plain.component_sum_loss),
    "torch_compile": lambda p, i: _house(p, i, compiled(plain.component_sum_loss, p.case.device)),
    "gemms": _gemms,
    "fastapd_step": _step,
}


def ours(p: Problem, i: int) -> Contender:
    return _house(p, i, lambda At, B, W: component_sum_loss(At.mT, B, W)[0])


@functools.lru_cache(maxsize=1)
def expected(layer: Layer) -> Answer:
    p, i = problem(layer.case), layer.index
    target = p.weights[i].double()
    leaves = (p.Ats[i].mT, p.Bs[i])
    return reference_in_float64(lambda A, B: reference.component_sum_loss(A, B, target)[0], leaves, _ones(p))


def work(p: Problem, i: int) -> tuple[int, int]:
    """Flops of value and gradients, three products, and bytes of inputs and gradients."""
    gemm = 2 * p.case.n_instances * p.weights[i][0].numel() * p.case.n_components * p.case.rank
    return 3 * gemm, 2 * (p.Ats[i].nbytes + p.Bs[i].nbytes) + p.weights[i].nbytes


@grid(
    lambda layer: (*CONTENDERS, *cpu_backends(OP)),
    CASES,
    lambda layer: (BOTH,),
    compiled=lambda layer, direction: layer in CASES[1:3],
)
def bench_component_sum(benchmark: Any, contender: str, case: Layer, direction: str) -> None:
    p, i = problem(case.case), case.index
    args = (p.Ats[i].mT, p.Bs[i], p.weights[i])
    skip_if_refused(OP, contender, args)
    flops, n_bytes = work(p, i)
    bound = contender == "gemms"
    compete(
        benchmark,
        "component_sum",
        contender,
        direction,
        case,
        CONTENDERS.get(contender, ours)(p, i),
        None if bound else expected(case),
        chosen(OP, args),
        flops,
        n_bytes,
    )
