"""The K largest of batch * n_components scores of each instance.

`torch_scatter` (topk and scatter) and `torch_kthvalue` (a threshold, inexact under ties) end at a mask, as the research
code does; `torch_rows` goes on to the samples of each component, which a sparse forward needs. fastapd returns the
pairs in both orders. `fastapd_warm` is given the threshold of the call before, as in training; its floor is two reads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import plain, upstream
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
from fastapd._random import stream
from fastapd.ops import Selection, batch_topk
from fastapd.reference import batch_topk as reference

OP = "batch_topk"


class Scores(NamedTuple):
    """Sizes of a problem: K of batch * n_components scores in each instance."""

    name: str
    n_instances: int
    batch: int
    n_components: int
    n_pairs: int
    device: str = "cpu"


CASES = (
    Scores("tms_5-2_b2048", 12, 2048, 5, 432),
    Scores("tms_40-10_b2048", 3, 2048, 50, 2048),
    Scores("n10k_k432", 1, 2048, 5, 432),
    Scores("n82k_k4096", 1, 2048, 40, 4096),
    Scores("n266k_k2621", 1, 2048, 130, 2621),
    Scores("n2m_k16384", 1, 2048, 1000, 16384),
    Scores("n10m_k16384", 1, 1024, 10000, 16384),
)


@functools.lru_cache(maxsize=1)
def scores_of(case: Scores) -> Tensor:
    """Squares of drawn numbers, which attributions resemble."""
    shape = (case.n_instances, case.batch, case.n_components)
    generator = stream(0, f"bench {case.name}")
    if case.device != "cpu":  # where they are many, and the CPU slow
        generator = torch.Generator(case.device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=case.device).square_()


def _upstream(case: Scores) -> Contender:
    theirs = scores_of(case).transpose(0, 1).contiguous()
    topk = (case.n_pairs + 0.5) / case.batch  # of which int(topk * batch) is n_pairs again
    return Contender(lambda s: upstream.topk_mask(s, topk), (theirs,), output=instances_first)


def _mask(form: Callable[[Tensor, int], Tensor]) -> Callable[[Scores], Contender]:
    return lambda case: Contender(lambda s: form(s, case.n_pairs), (scores_of(case),))


def _torch_rows(case: Scores) -> Contender:
    return Contender(
        lambda s: plain.topk_rows(s, case.n_pairs),
        (scores_of(case),),
        output=lambda rows: plain.mask_of_rows(rows, case.batch),
    )


def ours(case: Scores) -> Contender:
    return Contender(lambda s: batch_topk(s, case.n_pairs), (scores_of(case),), output=lambda selection: selection.mask)


def _fastapd_warm(case: Scores) -> Contender:
    if "hint" not in inspect.signature(batch_topk).parameters:
        pytest.skip("batch_topk takes no hint in this version")
    hint = torch.full((case.n_instances,), torch.nan, device=case.device)
    warm: Callable[..., Selection] = functools.partial(batch_topk, hint=hint)  # type: ignore[call-arg]
    warm(scores_of(case), case.n_pairs)
    return Contender(lambda s: warm(s, case.n_pairs), (scores_of(case),), output=lambda selection: selection.mask)


@functools.lru_cache(maxsize=1)
def expected(case: Scores) -> Answer:
    return [Selection(*reference.batch_topk(scores_of(case), case.n_pairs)).mask]


CONTENDERS = {
    "upstream": _upstream,
    "torch_scatter": _mask(plain.topk_mask),
    "torch_kthvalue": _mask(plain.kthvalue_mask),
    "torch_rows": _torch_rows,
    "fastapd_warm": _fastapd_warm,
}


@grid(lambda case: (*CONTENDERS, *cpu_backends(OP)), CASES, lambda case: (FORWARD,))
def bench_batch_topk(benchmark: Any, contender: str, case: Scores, direction: str) -> None:
    args = (scores_of(case), case.n_pairs)
    skip_if_refused(OP, contender, args)
    compete(
        benchmark,
        "batch_topk",
        contender,
        direction,
        case,
        CONTENDERS.get(contender, ours)(case),
        expected(case),
        chosen(OP, args),
        flops=0,
        n_bytes=2 * scores_of(case).nbytes,
    )
