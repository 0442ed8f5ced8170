"""The sizes and random arguments that tests and benchmarks give the ops; `fastapd.testing` puts them to use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastapd import ops
from fastapd.reference import batch_topk as reference_topk

P, EPS = 0.9, 1e-16
"""The exponent and the epsilon of the Schatten cases."""


@dataclass(frozen=True)
class Case:
    """The sizes of one layer and its batch; the attributions get a second layer back from d_out.

    Attributes:
        n_outputs: How many outputs of the target the attributions sum over.
        k: How many components each sample selects on average.
        tied: Whether the second layer is the first with the roles of A and B swapped.
    """

    name: str
    n_instances: int
    batch: int
    n_components: int
    rank: int
    d_in: int
    d_out: int
    n_outputs: int
    k: float = 1.0
    tied: bool = False

    @property
    def n_pairs(self) -> int:
        return int(self.k * self.batch)


CASES = {
    case.name: case
    for case in (
        Case("tms", 12, 256, 5, 3, 5, 2, n_outputs=5, tied=True),
        Case("tms_40", 3, 128, 40, 11, 40, 10, n_outputs=40, tied=True),
        Case("resid", 1, 64, 30, 6, 50, 20, n_outputs=50, k=1.28),
        Case("odd", 2, 37, 13, 7, 17, 1, n_outputs=3, k=2.5),
        Case("rank1", 2, 29, 7, 1, 11, 19, n_outputs=6, k=1.5),
        Case("single", 2, 16, 1, 5, 6, 9, n_outputs=2, k=0.5),
        Case("empty_batch", 2, 0, 4, 3, 5, 6, n_outputs=2),
        Case("wide", 1, 33, 6, 5, 131, 100, n_outputs=3, k=2.0),
    )
}


class Source:
    """Random tensors: drawn in float64 on the CPU, so that a seed means the same numbers in every dtype and place."""

    def __init__(self, dtype: torch.dtype, seed: int, device: str | torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def put(self, drawn: Tensor) -> Tensor:
        return drawn.to(self.device, self.dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.put(scale * torch.randn(shape, generator=self.generator, dtype=torch.float64))

    def uniform(self, *shape: int) -> Tensor:
        return self.put(torch.rand(shape, generator=self.generator, dtype=torch.float64))

    def inputs(self, case: Case, d_in: int) -> Tensor:
        """Activations [I, b, d_in] of which about half are zero, as after a ReLU."""
        return self.normal(case.n_instances, case.batch, d_in).relu_()

    def factors(self, case: Case, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
        """A [I, C, d_in, m], the transposed view of the house layout, and B [I, C, m, d_out]."""
        leading = (case.n_instances, case.n_components, case.rank)
        At = self.normal(*leading, d_in, scale=max(1, d_in) ** -0.5)
        return At.mT, self.normal(*leading, d_out, scale=max(1, case.rank) ** -0.5)

    def scores(self, case: Case) -> Tensor:
        shape = (case.n_instances, case.batch, case.n_components)
        return self.put(torch.randn(shape, generator=self.generator, dtype=torch.float64).square_())


def sum_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    return source.factors(case, case.d_in, case.d_out)


def loss_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    A, B = source.factors(case, case.d_in, case.d_out)
    return A, B, source.normal(case.n_instances, case.d_in, case.d_out)


def forward_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    A, B = source.factors(case, case.d_in, case.d_out)
    mask = source.uniform(case.n_instances, case.batch, case.n_components)
    return source.inputs(case, case.d_in), A, B, mask


def selected_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    A, B = source.factors(case, case.d_in, case.d_out)
    selection = ops.Selection(*reference_topk.batch_topk(source.scores(case), case.n_pairs))
    return source.inputs(case, case.d_in), A, B, selection


def accumulated_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    x, A, B, selection = selected_inputs(case, source)
    grad_y = source.normal(case.n_instances, case.batch, case.d_out)
    u = source.normal(case.n_instances, case.n_pairs, case.rank)
    return grad_y, x, A, B, u, selection, source.normal(*A.mT.shape), source.normal(*B.shape)


def attribution_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    A, B = source.factors(case, case.d_in, case.d_out)
    second = (B.mT, A.mT) if case.tied else source.factors(case, case.d_out, case.d_in)
    xs = [source.inputs(case, case.d_in), source.inputs(case, case.d_out)]
    # behind the last layer the gradients of a linear output are the same for all samples
    g_batch = case.batch if case.tied else 1
    gs = [
        source.normal(case.n_instances, case.batch, case.n_outputs, case.d_out),
        source.normal(case.n_instances, g_batch, case.n_outputs, case.d_in),
    ]
    return xs, gs, [A, second[0]], [B, second[1]]


def tangent_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    """The two layers as a network with a nonlinearity between them, and the second layer's input once more by itself.

    Barrier 0 is the nonlinearity, barrier 1 the output, which the first layer reaches around the nonlinearity, too.
    """
    first, second = source.factors(case, case.d_in, case.d_out), source.factors(case, case.d_out, case.n_outputs)
    leading = (case.n_instances, case.n_components)
    around = source.normal(*leading, case.rank, case.n_outputs, scale=max(1, case.rank) ** -0.5)
    product = source.normal(*leading, case.d_out, case.n_outputs, scale=max(1, case.d_out) ** -0.5)
    gated = [0, 1] if case.tied else [0]  # tied as toy models of superposition are, which end in a nonlinearity
    widths = [case.d_out, case.n_outputs]
    gates = [source.uniform(case.n_instances, case.batch, widths[j]) for j in gated]
    instances = case.n_instances if case.tied else 1
    link = source.normal(instances, case.d_out, case.n_outputs, scale=max(1, case.d_out) ** -0.5)
    xs = [source.inputs(case, case.d_in), source.inputs(case, case.d_out)]
    terms = [2, 0, 2, 1, 3, 1, 1, 1]
    Fs = [first[1], around, second[1], product]
    return xs, [first[0], second[0]], Fs, gates, [link], [0, 1], terms, gated, [0, 1], widths


def batch_topk_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    return source.scores(case), case.n_pairs


def batch_topk_warm_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    return source.scores(case), 4 * source.uniform(case.n_instances), case.n_pairs  # hints on both sides


def batch_topk_counts_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    most = case.batch * case.n_components
    counts = [(case.n_pairs * (i + 2)) % (most + 1) for i in range(case.n_instances)]  # another number each
    return source.scores(case), torch.tensor(counts, dtype=torch.int64, device=source.device)


def sample_topk_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    return source.scores(case), min(2, case.n_components)


def schatten_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    *_, A, B, selection = selected_inputs(case, source)
    return A, B, selection.counts, P, EPS, case.batch


def schatten_accumulate_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    A, B, counts, p, eps, batch = schatten_inputs(case, source)
    return A, B, counts, p, eps, batch, True, 0.7, source.normal(*A.mT.shape), source.normal(*B.shape)


def schatten_masked_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    _, A, B, mask = forward_inputs(case, source)
    return A, B, mask, P, EPS


def product_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    x, W = source.inputs(case, case.d_in), source.normal(case.n_instances, case.d_in, case.d_out)
    return x, W, source.normal(case.n_instances, case.batch, case.d_out), 0.7, True


def rows_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    return (source.factors(case, case.d_in, case.d_out)[0].mT,)


def along_inputs(case: Case, source: Source) -> tuple[Any, ...]:
    (rows,) = rows_inputs(case, source)
    return source.normal(*rows.shape), rows
