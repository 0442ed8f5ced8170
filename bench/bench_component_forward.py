"""y_b = sum over the selected components of (x_b A_c) B_c: the masked forward of one layer.

`component_forward/<case>` starts from the selection, in the form each contender works on: a mask for those that compute
every component, the selected samples of each component for the others. `torch` pads those to the longest group and runs
two batched GEMMs, which is the strongest plain form where few components are on; `torch_dense` is two GEMMs around a
multiplication by the mask, and `torch_embedding_bag` the library's routine for rank one. `masked_forward/<case>` starts
from the scores, so that making the index counts too.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import plain, upstream
from bench.cases import MANY, RESIDUAL, TMS_5_2, TMS_40_10, VERY_MANY, Layer, Problem, problem
from bench.harness import (
    BOTH,
    FORWARD,
    Answer,
    Contender,
    chosen,
    compete,
    compiled,
    cpu_backends,
    grid,
    instances_first,
    lacks_memory,
    reference_in_float64,
    same,
    skip_if_refused,
    transposed,
)
from fastapd.ops import batch_topk, component_forward_selected
from fastapd.reference import component_forward as reference

OP = "component_forward_selected"
CASES = (
    Layer("tms_5-2", TMS_5_2),
    Layer("tms_40-10", TMS_40_10),
    Layer("resid_in_b2048", RESIDUAL, 0),
    Layer("resid_out_b2048", RESIDUAL, 1),
    Layer("c1000_256x256_m4", MANY),
    Layer("c10000_256x256_m1", VERY_MANY),
)
SMALL = CASES[:2]


def _directions(layer: Layer) -> tuple[str, ...]:
    """The backward pass of the research formulation at the large sizes takes seconds and gigabytes."""
    return (FORWARD, BOTH) if layer in (*SMALL, CASES[2]) else (FORWARD,)


def upstream_bytes(layer: Layer, direction: str) -> int:
    case = layer.case
    return (6 if direction == FORWARD else 12) * case.n_instances * case.batch * case.n_components * layer.shape[1]


def inputs_of(p: Problem, i: int) -> tuple[Tensor, Tensor, Tensor]:
    return p.xs[i], p.Ats[i], p.Bs[i]


def _cotangent(p: Problem, i: int) -> Tensor:
    shape = (p.case.n_instances, p.case.batch, p.Bs[i].shape[-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(p.case.device)


def _theirs(p: Problem, i: int, function: Any) -> Contender:
    """A contender on the research code's layout."""
    x, At, B = inputs_of(p, i)
    leaves = (x.transpose(0, 1).contiguous(), At.mT.contiguous(), B)
    cotangent = _cotangent(p, i).transpose(0, 1).contiguous()
    return Contender(function, leaves, cotangent, instances_first, (instances_first, same, same))


def _house(p: Problem, i: int, function: Any) -> Contender:
    """A contender on the house layout."""
    return Contender(function, inputs_of(p, i), _cotangent(p, i), same, (same, transposed, same))


# ------------------------------------------------------------------------------------------------ given the selection


def _upstream(p: Problem, i: int) -> Contender:
    mask = p.selection.mask.transpose(0, 1).contiguous()
    return _theirs(p, i, lambda x, A, B: upstream.component_forward(x, A, B, mask))


def _torch(p: Problem, i: int) -> Contender:
    rows = plain.topk_rows(p.scores, p.case.n_pairs)
    return _house(p, i, lambda x, At, B: plain.forward_rows(x, At, B, rows))


def _torch_dense(p: Problem, i: int) -> Contender:
    mask = p.selection.mask.float()
    return _house(p, i, lambda x, At, B: plain.forward_dense(x, At, B, mask))


def _torch_compile(p: Problem, i: int) -> Contender:
    """Of the stronger form: dense for few components, by rows for many."""
    if p.case.n_components <= 50:
        mask = p.selection.mask.float()
        dense = compiled(plain.forward_dense, p.case.device)
        return _house(p, i, lambda x, At, B: dense(x, At, B, mask))
    rows = plain.topk_rows(p.scores, p.case.n_pairs)
    by_rows = compiled(plain.forward_rows, p.case.device)
    return _house(p, i, lambda x, At, B: by_rows(x, At, B, rows))


def _torch_embedding_bag(p: Problem, i: int) -> Contender:
    if p.case.rank != 1 or p.case.n_instances != 1:
        pytest.skip("embedding_bag sums rows: rank one and one instance only")
    selection = p.selection
    component, bags = selection.component[0].long(), selection.sample_offsets[0, :-1]
    samples = torch.arange(p.case.batch, device=p.case.device)
    sample = torch.repeat_interleave(samples, selection.sample_offsets[0].diff())
    return _house(p, i, lambda x, At, B: plain.forward_bags(x, At, B, sample, component, bags))


def ours(p: Problem, i: int) -> Contender:
    return _house(p, i, lambda x, At, B: component_forward_selected(x, At.mT, B, p.selection))


@functools.lru_cache(maxsize=1)
def expected(layer: Layer, direction: str) -> Answer:
    """The reference a few samples at a time: it computes every component."""
    p, i = problem(layer.case), layer.index
    x, At, B = inputs_of(p, i)
    if direction == BOTH:
        mask = p.selection.mask.double()
        function = lambda x, A, B: reference.component_forward(x, A, B, mask)  # noqa: E731
        return reference_in_float64(function, (x, At.mT, B), _cotangent(p, i))
    A, B, mask = At.mT.double(), B.double(), p.selection.mask
    chunks = [slice(b, b + 64) for b in range(0, p.case.batch, 64)]
    return [torch.cat([reference.component_forward(x[:, c].double(), A, B, mask[:, c].double()) for c in chunks], 1)]


CONTENDERS = {
    "upstream": _upstream,
    "torch": _torch,
    "torch_dense": _torch_dense,
    "torch_compile": _torch_compile,
    "torch_embedding_bag": _torch_embedding_bag,
}


def _names(layer: Layer) -> tuple[str, ...]:
    few = tuple(name for name in CONTENDERS if name != "torch_embedding_bag" or layer.case.rank == 1)
    backends = cpu_backends(OP)
    return (*few, *(b for b in backends if layer in SMALL or b != "reference"))


@grid(_names, CASES, _directions, compiled=lambda layer, direction: direction == FORWARD)
def bench_component_forward(benchmark: Any, contender: str, case: Layer, direction: str) -> None:
    if contender == "upstream" and (reason := lacks_memory(upstream_bytes(case, direction))) is not None:
        pytest.skip(reason)
    p, i = problem(case.case), case.index
    x, At, B = inputs_of(p, i)
    args = (x, At.mT, B, *p.selection)
    skip_if_refused(OP, contender, args)
    flops, n_bytes = work(p, case, direction)
    candidate = CONTENDERS.get(contender, ours)(p, i)
    compete(
        benchmark, "component_forward", contender, direction, case, candidate, expected(case, direction),
        chosen(OP, args), flops, n_bytes,
    )  # fmt: skip


def work(p: Problem, layer: Layer, direction: str) -> tuple[int, int]:
    """Flops of the selected pairs, and bytes of inputs and outputs."""
    case, (d_in, d_out) = layer.case, layer.shape
    flops = 2 * case.n_instances * case.n_pairs * case.rank * (d_in + d_out)
    used = min(case.n_components, case.n_pairs) / case.n_components  # of the factors, at most
    x, At, B = inputs_of(p, layer.index)
    touched = int(x.nbytes + used * (At.nbytes + B.nbytes) + 4 * case.n_instances * case.batch * d_out)
    return (flops, touched) if direction == FORWARD else (3 * flops, 3 * touched)


# -------------------------------------------------------------------------------------------------- given the scores


def _upstream_from_scores(p: Problem, i: int) -> Contender:
    scores = p.scores.transpose(0, 1).contiguous()

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return upstream.component_forward(x, A, B, upstream.topk_mask(scores, p.case.topk))

    return _theirs(p, i, function)


def _torch_from_scores(p: Problem, i: int) -> Contender:
    def function(x: Tensor, At: Tensor, B: Tensor) -> Tensor:
        return plain.forward_rows(x, At, B, plain.topk_rows(p.scores, p.case.n_pairs))

    return _house(p, i, function)


def _torch_dense_from_scores(p: Problem, i: int) -> Contender:
    def function(x: Tensor, At: Tensor, B: Tensor) -> Tensor:
        return plain.forward_dense(x, At, B, plain.topk_mask(p.scores, p.case.n_pairs).float())

    return _house(p, i, function)


def _fastapd_from_scores(p: Problem, i: int) -> Contender:
    def function(x: Tensor, At: Tensor, B: Tensor) -> Tensor:
        return component_forward_selected(x, At.mT, B, batch_topk(p.scores, p.case.n_pairs))

    return _house(p, i, function)


FROM_SCORES = {
    "upstream": _upstream_from_scores,
    "torch": _torch_from_scores,
    "torch_dense": _torch_dense_from_scores,
    "fastapd": _fastapd_from_scores,
}


@grid(lambda layer: tuple(FROM_SCORES), CASES[1:], lambda layer: (FORWARD,))
def bench_masked_forward(benchmark: Any, contender: str, case: Layer, direction: str) -> None:
    if contender == "upstream" and (reason := lacks_memory(upstream_bytes(case, direction))) is not None:
        pytest.skip(reason)
    p, i = problem(case.case), case.index
    flops, n_bytes = work(p, case, direction)
    candidate = FROM_SCORES[contender](p, i)
    n_bytes += 2 * p.scores.nbytes
    compete(
        benchmark, "masked_forward", contender, direction, case, candidate, expected(case, direction), "fastapd",
        flops, n_bytes,
    )  # fmt: skip
