"""Which (sample, component) pairs are kept: the K largest scores of a batch, or the k largest of each sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastapd import _native
from fastapd.ops import _check
from fastapd.ops._op import define, with_instances


class Selection(NamedTuple):
    """K selected (sample, component) pairs, listed in both orders; with a leading n_instances if the scores had one.

    Attributes:
        sample: [K] int32, the sample of each pair; sorted by component, then sample.
        offsets: [n_components + 1] int64; component c owns the pairs offsets[c] .. offsets[c + 1] of `sample`.
        component: [K] int32, the component of each pair; sorted by sample, then component.
        sample_offsets: [batch + 1] int64; sample b owns the pairs sample_offsets[b] .. sample_offsets[b + 1].
        position: [K] int32, where each pair of the sample-major list stands in the component-major list.
    """

    sample: Tensor
    offsets: Tensor
    component: Tensor
    sample_offsets: Tensor
    position: Tensor

    @property
    def n_pairs(self) -> int:
        return self.sample.shape[-1]

    @property
    def n_components(self) -> int:
        return self.offsets.shape[-1] - 1

    @property
    def batch(self) -> int:
        return self.sample_offsets.shape[-1] - 1

    @property
    def counts(self) -> Tensor:
        """How many samples selected each component, [n_components] int64."""
        return self.offsets.diff(dim=-1)

    @property
    def mask(self) -> Tensor:
        """The selection as a bool tensor [batch, n_components]."""
        row = self.sample.gather(-1, self.position.long()).long()  # sample of each pair, sample-major
        flat = row * self.n_components + self.component.long()
        # Beyond an instance's own number of pairs (exact k) the lists are padding: it goes to one entry too many.
        size = self.batch * self.n_components
        place = torch.arange(self.n_pairs, device=self.sample.device)
        flat = torch.where(place < self.offsets[..., -1:], flat, size)
        leading = self.sample.shape[:-1]
        mask = torch.zeros(*leading, size + 1, dtype=torch.bool, device=self.sample.device)
        return mask.scatter_(-1, flat, True)[..., :size].view(*leading, self.batch, self.n_components)


def _check_topk(op: str, scores: Tensor, k: int, per_sample: bool) -> bool:
    _check.tensors(op, scores=scores)
    instances = _check.rank(op, "scores", scores, "batch, n_components")
    batch, n_components = scores.shape[-2:]
    if per_sample:
        _check.whole(op, "k", k, 0, n_components, f"[0, n_components={n_components}]")
    else:
        _check.whole(op, "K", k, 0, batch * n_components, f"[0, batch * n_components={batch * n_components}]")
    if batch * n_components >= 2**31:
        raise ValueError(f"{op}: scores must have fewer than 2**31 entries an instance, got {_check.shape(scores)}")
    return instances


def _grouped_fake(scores: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    n_instances, batch, n_components = scores.shape
    return (
        scores.new_empty(n_instances, n_pairs, dtype=torch.int32),
        scores.new_empty(n_instances, n_components + 1, dtype=torch.int64),
        scores.new_empty(n_instances, n_pairs, dtype=torch.int32),
        scores.new_empty(n_instances, batch + 1, dtype=torch.int64),
        scores.new_empty(n_instances, n_pairs, dtype=torch.int32),
    )


def _cpu_select(scores: Tensor, capacity: int, counts: Tensor | None, k: int) -> tuple[Tensor, ...]:
    """Allocates the selection and lets `csrc/cpu/batch_topk.cpp` fill it."""
    scores = scores.contiguous()
    out = _grouped_fake(scores, capacity)
    native: Any = _native.load("_C").module
    run = native.batch_topk_float32 if scores.dtype == torch.float32 else native.batch_topk_float64
    to, limits = [t.data_ptr() for t in out], 0 if counts is None else counts.data_ptr()
    run(scores.data_ptr(), to, *scores.shape, capacity, limits, k, 0, torch.get_num_threads())
    return out


def cpu_batch_topk(scores: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    return _cpu_select(scores, n_pairs, None, -1)


def cpu_sample_topk(scores: Tensor, k: int) -> tuple[Tensor, ...]:
    return _cpu_select(scores, k * scores.shape[1], None, k)


def cpu_batch_topk_counts(scores: Tensor, counts: Tensor, capacity: int) -> tuple[Tensor, ...]:
    return _cpu_select(scores, capacity, counts.contiguous(), -1)


def _batch_fake(scores: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    _check_topk("batch_topk", scores, n_pairs, per_sample=False)
    return _grouped_fake(scores, n_pairs)


def _check_counts(scores: Tensor, counts: Tensor) -> None:
    op = "batch_topk"
    if counts.layout != torch.strided:
        raise TypeError(f"{op}: K must be a dense tensor, got layout {counts.layout}; call .to_dense()")
    if counts.dtype != torch.int64:
        raise TypeError(f"{op}: K must be an int or an int64 tensor, got {counts.dtype}")
    if counts.device != scores.device:
        raise ValueError(f"{op}: K must be on the device of scores, {scores.device}, got {counts.device}")
    if counts.shape != scores.shape[:1]:
        raise ValueError(
            f"{op}: K, a tensor, must have shape [n_instances] for scores {_check.shape(scores)}, "
            f"got {_check.shape(counts)}"
        )


def _counts_fake(scores: Tensor, counts: Tensor, capacity: int) -> tuple[Tensor, ...]:
    _check_topk("batch_topk", scores, capacity, per_sample=False)
    _check_counts(scores, counts)
    return _grouped_fake(scores, capacity)


def _sample_fake(scores: Tensor, k: int) -> tuple[Tensor, ...]:
    _check_topk("sample_topk", scores, k, per_sample=True)
    return _grouped_fake(scores, k * scores.shape[1])


_OUT = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_batch_topk = define("batch_topk", f"(Tensor scores, SymInt n_pairs) -> {_OUT}", _batch_fake)
_batch_topk_counts = define(
    "batch_topk_counts", f"(Tensor scores, Tensor counts, SymInt capacity) -> {_OUT}", _counts_fake
)
_sample_topk = define("sample_topk", f"(Tensor scores, SymInt k) -> {_OUT}", _sample_fake)


def batch_topk(scores: Float[Tensor, "*I b C"], K: int | Int[Tensor, " I"]) -> Selection:
    """Selects the K largest of all scores of a batch, exactly.

    (b, c) is selected  iff  scores[b, c] is among the K largest of scores.flatten()

    Args:
        scores: [batch, n_components], with or without a leading n_instances; any strides. Each instance selects for
            itself.
        K: How many pairs to keep, in [0, batch * n_components]; for a mean of k per sample, `int(k * batch)`. An int64
            tensor [n_instances] gives every instance its own number (exact k): its values are read, which waits for
            the device, and the selection's lists are as long as the largest.

    Returns:
        The `Selection`; `selection.mask` is the bool [.., batch, n_components].

    Raises:
        ValueError: If K is out of range or a shape or device is wrong.
        TypeError: If K is neither an int nor an int64 tensor, or scores is not floating.

    Numerics: exact. Ties go to the lowest flat index (sample-major); -0 equals +0; NaN counts as largest.
    Gradient: none; the selection is a constant.
    Cost: two reads of the scores and O(K) on the CPU backend; a full sort on the reference.
    Source: Braun et al. 2025, section 2.2 (batch top-k); `calc_topk_mask(batch_topk=True)` of ApolloResearch/apd.
    """
    if isinstance(K, Tensor):
        return _batch_topk_each(scores, K)
    instances = _check_topk("batch_topk", scores, K, per_sample=False)
    scores = scores.detach()
    if instances:
        return Selection(*_batch_topk(scores, K))
    return Selection(*(t.squeeze(0) for t in _batch_topk(*with_instances(scores), K)))


def _batch_topk_each(scores: Tensor, counts: Tensor) -> Selection:
    """`batch_topk` with every instance's own K."""
    op = "batch_topk"
    if not _check_topk(op, scores, 0, per_sample=False):
        raise ValueError(f"{op}: scores must have a leading n_instances when K is a tensor, got {_check.shape(scores)}")
    _check_counts(scores, counts)
    values = counts.tolist()
    for value in values:
        _check_topk(op, scores, value, per_sample=False)
    return Selection(*_batch_topk_counts(scores.detach(), counts, max(values, default=0)))


def sample_topk(scores: Float[Tensor, "*I b C"], k: int) -> Selection:
    """Selects the k largest scores of every sample, exactly.

    (b, c) is selected  iff  scores[b, c] is among the k largest of scores[b]

    Args:
        scores: [batch, n_components], with or without a leading n_instances; any strides.
        k: How many components each sample keeps, in [0, n_components].

    Returns:
        The `Selection`, with k * batch pairs.

    Raises:
        ValueError: If k is out of range or the shape is wrong.
        TypeError: If k is not an int or scores is not floating.

    Numerics: exact. Ties go to the lowest component; -0 equals +0; NaN counts as largest.
    Gradient: none; the selection is a constant.
    Source: `calc_topk_mask(batch_topk=False)` of ApolloResearch/apd.
    """
    instances = _check_topk("sample_topk", scores, k, per_sample=True)
    scores = scores.detach()
    if instances:
        return Selection(*_sample_topk(scores, k))
    return Selection(*(t.squeeze(0) for t in _sample_topk(*with_instances(scores), k)))
