"""The K largest of batch * n_components scores, as a grouped selection; ties go to the lowest flat index."""

from __future__ import annotations

import torch
from torch import Tensor

Grouped = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""sample [I, K], offsets [I, C+1], component [I, K], sample_offsets [I, b+1], position [I, K]."""


def batch_topk(scores: Tensor, n_pairs: int) -> Grouped:
    """A stable descending sort has the contract's order: NaN first, -0 equal to +0, equal scores by flat index."""
    _, batch, n_components = scores.shape
    order = scores.flatten(1).sort(dim=-1, descending=True, stable=True).indices
    flat = order[:, :n_pairs].sort(dim=-1).values  # sample-major: sample, then component
    return _grouped(flat, batch, n_components)


def batch_topk_warm(scores: Tensor, hint: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    """`batch_topk`, which needs no hint, and each instance's smallest selected score: the hint if there is none."""
    ordered = scores.flatten(1).sort(dim=-1, descending=True, stable=True).values
    return *batch_topk(scores, n_pairs), ordered[:, n_pairs - 1] + 0.0 if n_pairs else hint.clone()


def batch_topk_counts(scores: Tensor, counts: Tensor, capacity: int) -> Grouped:
    """Every instance's own number of pairs, at most `capacity`; the lists end in zeros."""
    parts = [batch_topk(scores[i : i + 1], int(n)) for i, n in enumerate(counts.tolist())]

    def padded(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (0, capacity - t.shape[1]))

    lists = ((padded(p[0]), p[1], padded(p[2]), p[3], padded(p[4])) for p in parts)
    empty = batch_topk(scores[:0], capacity) if not parts else None
    sample, offsets, component, sample_offsets, position = (
        (torch.cat(column) for column in zip(*lists, strict=True)) if empty is None else empty
    )
    return sample, offsets, component, sample_offsets, position


def sample_topk(scores: Tensor, k: int) -> Grouped:
    """The k largest of each sample; equal scores by component."""
    _, batch, n_components = scores.shape
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values  # [I, b, k]
    first = torch.arange(batch, device=scores.device).unsqueeze(-1) * n_components  # [b, 1]
    return _grouped((order + first).flatten(1), batch, n_components)


def _grouped(flat: Tensor, batch: int, n_components: int) -> Grouped:
    """From flat indices in ascending order, [I, K], to both orders of the selection."""
    device = flat.device
    sample = flat.div(max(n_components, 1), rounding_mode="floor")
    component = flat - sample * n_components
    # component-major order: a stable sort by component keeps the samples ascending
    by_component = component.sort(dim=-1, stable=True)
    place = torch.arange(flat.shape[1], device=device).expand_as(flat)
    position = torch.empty_like(flat).scatter_(1, by_component.indices, place)
    edges_c = torch.arange(n_components + 1, device=device).expand(flat.shape[0], -1).contiguous()
    edges_s = torch.arange(batch + 1, device=device).expand(flat.shape[0], -1).contiguous()
    offsets = torch.searchsorted(by_component.values.contiguous(), edges_c)
    sample_offsets = torch.searchsorted(sample.contiguous(), edges_s)
    major = sample.gather(1, by_component.indices)
    return major.int(), offsets, component.int(), sample_offsets, position.int()
