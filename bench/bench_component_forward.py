"""y_b = sum over the selected components of (x_b A_c) B_c: the masked forward of one layer.

The selection is given, in the form each contender works on: a mask for those that compute every component, the selected
samples of each component for the others. `torch` pads those to the longest group and runs two batched GEMMs, which is
the strongest plain form where few components are on; `torch_dense` is two GEMMs around a multiplication by the mask.
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
    instances_first,
    reference_in_float64,
    same,
    skip_if_refused,
    transposed,
)
from fastapd.ops import component_forward_selected
from fastapd.reference import component_forward as reference

OP = "component_forward_selected"


def _cotangent(p: Problem) -> Tensor:
    shape = (p.case.n_instances, p.case.batch, p.Bs[0].shape[-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _upstream(p: Problem) -> Contender:
    mask = p.selection.mask.transpose(0, 1).contiguous()
    x = p.xs[0].transpose(0, 1).contiguous()
    return Contender(
        lambda x, A, B: upstream.component_forward(x, A, B, mask),
        (x, p.Ats[0].mT.contiguous(), p.Bs[0]),
        _cotangent(p).transpose(0, 1).contiguous(),
        instances_first,
        (instances_first, same, same),
    )


def _house(p: Problem, function: Any) -> Contender:
    """A contender on the house layout."""
    return Contender(function, (p.xs[0], p.Ats[0], p.Bs[0]), _cotangent(p), same, (same, transposed, same))


def _torch(p: Problem) -> Contender:
    rows = plain.topk_rows(p.scores, p.case.n_pairs)
    return _house(p, lambda x, At, B: plain.forward_rows(x, At, B, rows))


def _torch_dense(p: Problem) -> Contender:
    mask = p.selection.mask.float()
    return _house(p, lambda x, At, B: plain.forward_dense(x, At, B, mask))


def _fastapd(p: Problem) -> Contender:
    return _house(p, lambda x, At, B: component_forward_selected(x, At.mT, B, p.selection))


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> Answer:
    p = problem(case)
    mask = p.selection.mask.double()
    leaves = (p.xs[0], p.Ats[0].mT, p.Bs[0])
    return reference_in_float64(lambda x, A, B: reference.component_forward(x, A, B, mask), leaves, _cotangent(p))


CONTENDERS = {"upstream": _upstream, "torch": _torch, "torch_dense": _torch_dense}


@grid(lambda case: (*CONTENDERS, *cpu_backends(OP)), CASES, lambda case: (FORWARD, BOTH))
def bench_component_forward(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p = problem(case)
    args = (p.xs[0], p.Ats[0].mT, p.Bs[0], *p.selection)
    skip_if_refused(OP, contender, args)
    d_in, d_out = case.layers[0]
    flops = 2 * case.n_instances * case.n_pairs * case.rank * (d_in + d_out)  # of the selected pairs
    y_bytes = 4 * case.n_instances * case.batch * d_out
    touched = p.xs[0].nbytes + p.Ats[0].nbytes + p.Bs[0].nbytes + y_bytes
    compete(
        benchmark,
        "component_forward",
        contender,
        direction,
        case,
        CONTENDERS.get(contender, _fastapd)(p),
        _expected(case),
        chosen(OP, args),
        flops=flops if direction == FORWARD else 3 * flops,
        n_bytes=touched if direction == FORWARD else 3 * touched,
    )
