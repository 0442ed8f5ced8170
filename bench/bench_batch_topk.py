"""The K largest of batch * n_components scores of each instance.

The plain torch forms `torch` (topk and scatter) and `torch_kthvalue` (a threshold, inexact under ties) end at a mask.
`torch_rows` goes on to the samples of each component, which a sparse forward needs; fastapd returns the pairs in both
orders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench import plain, upstream
from bench.cases import CASES, Case, Problem, problem
from bench.harness import (
    FORWARD,
    Answer,
    Contender,
    chosen,
    compete,
    cpu_backends,
    grid,
    instances_first,
    skip_if_refused,
)
from fastapd.ops import Selection, batch_topk
from fastapd.reference import batch_topk as reference

OP = "batch_topk"


def _upstream(p: Problem) -> Contender:
    scores = p.scores.transpose(0, 1).contiguous()
    return Contender(lambda s: upstream.topk_mask(s, p.case.topk), (scores,), output=instances_first)


def _mask(form: Callable[[Tensor, int], Tensor]) -> Callable[[Problem], Contender]:
    return lambda p: Contender(lambda s: form(s, p.case.n_pairs), (p.scores,))


def _torch_rows(p: Problem) -> Contender:
    return Contender(
        lambda s: plain.topk_rows(s, p.case.n_pairs),
        (p.scores,),
        output=lambda rows: plain.mask_of_rows(rows, p.case.batch),
    )


def _fastapd(p: Problem) -> Contender:
    return Contender(lambda s: batch_topk(s, p.case.n_pairs), (p.scores,), output=lambda selection: selection.mask)


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> Answer:
    p = problem(case)
    return [Selection(*reference.batch_topk(p.scores.double(), case.n_pairs)).mask]


CONTENDERS = {
    "upstream": _upstream,
    "torch": _mask(plain.topk_mask),
    "torch_kthvalue": _mask(plain.kthvalue_mask),
    "torch_rows": _torch_rows,
}


@grid(lambda case: (*CONTENDERS, *cpu_backends(OP)), CASES, lambda case: (FORWARD,))
def bench_batch_topk(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p = problem(case)
    args = (p.scores, case.n_pairs)
    skip_if_refused(OP, contender, args)
    compete(
        benchmark,
        "batch_topk",
        contender,
        direction,
        case,
        CONTENDERS.get(contender, _fastapd)(p),
        _expected(case),
        chosen(OP, args),
        flops=0,
        n_bytes=p.scores.nbytes + 12 * case.n_instances * case.n_pairs,
    )
