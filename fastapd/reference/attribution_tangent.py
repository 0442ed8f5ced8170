"""a_bc = |g_J t_J|^2, t_j = sum_k s_k F_kj + sum_i (g_i t_i) L_ij: the tangent form of attributions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""How many elements of all tangents `[b, C, width]` are held at once."""


class _Program(NamedTuple):
    """The arguments of both ops, named; lefts, terms, gated and ends say by number what belongs where."""

    xs: list[Tensor]
    As: list[Tensor]
    Fs: list[Tensor]
    gates: list[Tensor]
    links: list[Tensor]
    lefts: list[int]
    terms: list[int]
    gated: list[int]
    ends: list[int]
    widths: list[int]

    def into(self, j: int) -> list[tuple[int, Tensor]]:
        """What sources send to barrier j: their number and the matrix."""
        pairs = zip(self.terms[::2], self.terms[1::2], self.Fs, strict=True)
        return [(source, F) for source, barrier, F in pairs if barrier == j]

    def links_between(self) -> list[tuple[int, int, Tensor]]:
        return list(zip(self.ends[::2], self.ends[1::2], (L.unsqueeze(1) for L in self.links), strict=True))

    def gate(self, j: int, chunk: slice) -> Tensor | None:
        return self.gates[self.gated.index(j)][:, chunk].unsqueeze(1) if j in self.gated else None

    def chunks(self) -> list[slice]:
        n_instances, batch, _ = self.xs[0].shape
        per_sample = n_instances * self.Fs[0].shape[1] * (sum(self.widths) + sum(A.shape[-1] for A in self.As))
        step = max(1, CHUNK_ELEMENTS // max(1, per_sample))
        return [slice(b, min(b + step, batch)) for b in range(0, batch, step)]

    def run(self, chunk: slice) -> tuple[list[Tensor], list[Tensor]]:
        """The sources' rows and the gated tangents of all barriers on a chunk of the batch, [I, C, b, width]."""
        xs = [x[:, chunk].unsqueeze(1) for x in self.xs]  # [I, 1, b, width]
        sources = [*xs, *(xs[k] @ A for k, A in zip(self.lefts, self.As, strict=True))]
        tangents: list[Tensor] = []
        for j, width in enumerate(self.widths):
            t = xs[0].new_zeros(xs[0].shape[0], self.Fs[0].shape[1], xs[0].shape[2], width)
            for source, F in self.into(j):
                t = t + sources[source] @ F
            for start, end, L in self.links_between():
                if end == j:
                    t = t + tangents[start] @ L
            gate = self.gate(j, chunk)
            tangents.append(t if gate is None else t * gate)
        return sources, tangents


def attribution_tangent(*program: list) -> Tensor:
    p = _Program(*program)
    n_instances, batch, _ = p.xs[0].shape
    out = p.xs[0].new_empty(n_instances, batch, p.Fs[0].shape[1])
    for chunk in p.chunks():
        out[:, chunk] = p.run(chunk)[1][-1].square().sum(-1).mT
    return out


def attribution_tangent_backward(grad: Tensor, *program: list) -> list[Tensor]:
    """Gradients of every At, then of every F, recomputing the tangents chunk by chunk."""
    p = _Program(*program)
    grad_A = [torch.zeros_like(A, memory_format=torch.contiguous_format) for A in p.As]
    grad_F = [torch.zeros_like(F, memory_format=torch.contiguous_format) for F in p.Fs]
    for chunk in p.chunks():
        sources, tangents = p.run(chunk)
        flows = [torch.zeros_like(t) for t in tangents]  # gradients by the gated tangents, then by the tangents
        flows[-1] = 2 * tangents[-1] * grad[:, chunk].mT.unsqueeze(-1)
        for j in reversed(range(len(p.widths))):
            for start, end, L in p.links_between():
                if start == j:
                    flows[j] = flows[j] + flows[end] @ L.mT
            gate = p.gate(j, chunk)
            flows[j] = flows[j] if gate is None else flows[j] * gate
        to_left = [torch.zeros_like(u) for u in sources[len(p.xs) :]]
        for k, (source, barrier) in enumerate(zip(p.terms[::2], p.terms[1::2], strict=True)):
            grad_F[k] += sources[source].mT @ flows[barrier]
            if source >= len(p.xs):
                to_left[source - len(p.xs)] += flows[barrier] @ p.Fs[k].mT
        for k, (source, du) in enumerate(zip(p.lefts, to_left, strict=True)):
            grad_A[k] += sources[source].mT @ du
    return [t.mT.contiguous() for t in grad_A] + grad_F
