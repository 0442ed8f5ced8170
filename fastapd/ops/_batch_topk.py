"""Which (sample, component) pairs are kept: the K largest scores of a batch, or the k largest of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastapd import _cuda, _native
from fastapd.ops import _check, _topk_plan
from fastapd.ops._op import define, with_instances

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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


def _check_topk(op: str, scores: Tensor, k: int, per_sample: bool, hint: Tensor | None = None) -> bool:
    if hint is None:
        _check.tensors(op, scores=scores)
    else:
        _check.tensors(op, scores=scores, hint=hint)
    instances = scores.dim() == 3 or _check.rank(op, "scores", scores, "batch, n_components")
    if hint is not None:
        _check_hint(op, scores, hint)
    batch, n_components = scores.shape[-2:]
    most, axes = (n_components, "n_components") if per_sample else (batch * n_components, "batch * n_components")
    if not (type(k) is int and 0 <= k <= most):  # the message is made for those who need it
        _check.whole(op, "k" if per_sample else "K", k, 0, most, f"[0, {axes}={most}]")
    if batch * n_components >= 2**31:
        raise ValueError(f"{op}: scores must have fewer than 2**31 entries an instance, got {_check.shape(scores)}")
    return instances


def _check_hint(op: str, scores: Tensor, hint: Tensor) -> None:
    if hint.dim() != scores.dim() - 2 or (hint.dim() == 1 and hint.shape[0] != scores.shape[0]):
        wanted = "[n_instances]" if scores.dim() == 3 else "[]"
        raise ValueError(
            f"{op}: hint must have shape {wanted} for scores {_check.shape(scores)}, got {_check.shape(hint)}"
        )
    if hint.requires_grad:
        raise NotImplementedError(f"{op}: hint must not require gradients, as it is written to; detach it")


def _grouped_fake(scores: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    n_instances, batch, n_components = scores.shape
    sample = scores.new_empty(n_instances, n_pairs, dtype=torch.int32)
    offsets = scores.new_empty(n_instances, n_components + 1, dtype=torch.int64)
    sample_offsets = scores.new_empty(n_instances, batch + 1, dtype=torch.int64)
    return sample, offsets, torch.empty_like(sample), sample_offsets, torch.empty_like(sample)


def _cpu_select(
    scores: Tensor, capacity: int, counts: Tensor | None = None, k: int = -1, thresholds: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Allocates the selection and lets `csrc/cpu/batch_topk.cpp` fill it."""
    scores = scores.contiguous()
    out = _grouped_fake(scores, capacity)
    native: Any = _native.load("_C").module
    run = native.batch_topk_float32 if scores.dtype == torch.float32 else native.batch_topk_float64
    limits, hints = (0 if t is None else t.data_ptr() for t in (counts, thresholds))
    run(
        scores.data_ptr(), [t.data_ptr() for t in out], *scores.shape, capacity, limits, k, hints,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def cpu_batch_topk(scores: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    return _cpu_select(scores, n_pairs)


def cpu_batch_topk_warm(scores: Tensor, hint: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    thresholds = hint.clone()  # which is dense, as hint has one axis
    return *_cpu_select(scores, n_pairs, thresholds=thresholds), thresholds


def cpu_sample_topk(scores: Tensor, k: int) -> tuple[Tensor, ...]:
    return _cpu_select(scores, k * scores.shape[1], k=k)


def cpu_batch_topk_counts(scores: Tensor, counts: Tensor, capacity: int) -> tuple[Tensor, ...]:
    return _cpu_select(scores, capacity, counts.contiguous())


def _cuda_select(
    op: str, scores: Tensor, n_pairs: int, counts: Tensor | None = None, thresholds: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Allocates the selection and lets `csrc/cuda/batch_topk.cu` fill it."""
    out = _grouped_fake(scores, n_pairs)
    if n_pairs == 0 or scores.numel() == 0:
        return _of_nothing(out, n_pairs)
    scores = scores.contiguous()
    device = _cuda.card(scores.device.index)
    plan = _topk_plan.plan(scores.shape, n_pairs, scores.dtype == torch.float64, *device)
    native: Any = _native.load("_C_cuda").module
    n_bytes = native.batch_topk_workspace(scores.dtype == torch.float64, *scores.shape, n_pairs, *plan)
    workspace = scores.new_empty(n_bytes, dtype=torch.uint8)
    counts = None if counts is None else counts.contiguous()
    optional = (0 if t is None else t.data_ptr() for t in (counts, thresholds))
    arrays = [scores.data_ptr(), *optional, *(t.data_ptr() for t in out), workspace.data_ptr()]
    _cuda.call(op, scores, *arrays, *scores.shape, n_pairs, *plan)
    return out


def _of_nothing(lists: tuple[Tensor, ...], n_pairs: int) -> tuple[Tensor, ...]:
    """The lists of no pairs, or of no instances."""
    if n_pairs == 0:
        lists[1].zero_()
        lists[3].zero_()
    return lists


def cuda_batch_topk(scores: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    return _cuda_select("batch_topk", scores, n_pairs)


def cuda_batch_topk_warm(scores: Tensor, hint: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    """The hint is the threshold if there are no pairs, which is all that it is for."""
    if n_pairs == 0 or scores.numel() == 0:
        return *_cuda_select("batch_topk_warm", scores, n_pairs), hint.clone()
    thresholds = scores.new_empty(scores.shape[0])
    return *_cuda_select("batch_topk_warm", scores, n_pairs, thresholds=thresholds), thresholds


def cuda_batch_topk_counts(scores: Tensor, counts: Tensor, capacity: int) -> tuple[Tensor, ...]:
    return _cuda_select("batch_topk_counts", scores, capacity, counts)


def cuda_sample_topk(scores: Tensor, k: int) -> tuple[Tensor, ...]:
    """Allocates the selection and lets `csrc/cuda/sample_topk.cu` fill it."""
    n_pairs = k * scores.shape[1]
    out = _grouped_fake(scores, n_pairs)
    if n_pairs == 0 or scores.numel() == 0:
        return _of_nothing(out, n_pairs)
    scores = scores.contiguous()
    native: Any = _native.load("_C_cuda").module
    small, threads = _topk_plan.sample_plan(scores.shape, k, scores.dtype == torch.float64, native.sample_topk_row)
    n_bytes = native.sample_topk_workspace(*scores.shape, n_pairs, small)
    workspace = scores.new_empty(n_bytes, dtype=torch.uint8)
    arrays = [scores.data_ptr(), *(t.data_ptr() for t in out), workspace.data_ptr()]
    _cuda.call("sample_topk", scores, *arrays, *scores.shape, n_pairs, k, small, threads)
    return out


def _batch_fake(scores: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    _check_topk("batch_topk", scores, n_pairs, per_sample=False)
    return _grouped_fake(scores, n_pairs)


def _warm_fake(scores: Tensor, hint: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    _check_topk("batch_topk", scores, n_pairs, per_sample=False, hint=hint)
    return *_grouped_fake(scores, n_pairs), hint.clone()


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
_batch_topk_warm = define(
    "batch_topk_warm", f"(Tensor scores, Tensor hint, SymInt n_pairs) -> {_OUT[:-1]}, Tensor)", _warm_fake
)
_batch_topk_counts = define(
    "batch_topk_counts", f"(Tensor scores, Tensor counts, SymInt capacity) -> {_OUT}", _counts_fake
)
_sample_topk = define("sample_topk", f"(Tensor scores, SymInt k) -> {_OUT}", _sample_fake)


def batch_topk(
    scores: Float[Tensor, "*I b C"], K: int | Int[Tensor, " I"], hint: Float[Tensor, "*I"] | None = None
) -> Selection:
    """Selects the K largest of all scores of a batch, exactly.

    (b, c) is selected  iff  scores[b, c] is among the K largest of scores.flatten()

    Args:
        scores: [batch, n_components], with or without a leading n_instances; any strides. Each instance selects for
            itself.
        K: How many pairs to keep, in [0, batch * n_components]; for a mean of k per sample, `int(k * batch)`. An int64
            tensor [n_instances] gives every instance its own number (exact k): its values are read, which waits for
            the device, and the selection's lists are as long as the largest.
        hint: [n_instances] (or [] without that axis), of the dtype and on the device of scores: where the threshold,
            the smallest selected score, is expected; from one step of a training to the next it moves little. It is
            overwritten with the threshold found (left alone if K = 0), so that one tensor, NaN at first, serves all
            steps. What it holds never changes the selection: a good hint saves the search for a place to start (the
            reference backend has no use for one), a wrong one costs up to one more read of the scores, and NaN or an
            infinity is no hint. Not together with a tensor K.

    Returns:
        The `Selection`; `selection.mask` is the bool [.., batch, n_components].

    Raises:
        ValueError: If K is out of range or a shape or device is wrong.
        TypeError: If K is neither an int nor an int64 tensor, scores is not floating, or hint has another dtype.
        NotImplementedError: If hint requires gradients.

    Numerics: exact. Ties go to the lowest flat index (sample-major); -0 equals +0; NaN counts as largest.
    Gradient: none; the selection is a constant.
    Cost: on the CPU backend one read of the scores and O(K + batch + n_components), whatever the scores but for a
        chance below 1e-4 a call; a full sort on the reference.
    Source: Braun et al. 2025, section 2.2 (batch top-k); `calc_topk_mask(batch_topk=True)` of ApolloResearch/apd.
    """
    if isinstance(K, Tensor):
        if hint is not None:
            raise ValueError("batch_topk: hint must be None when K is a tensor, got a tensor")
        return _batch_topk_each(scores, K)
    instances = _check_topk("batch_topk", scores, K, per_sample=False, hint=hint)
    scores = scores.detach()
    if hint is None:
        return _selection(instances, _batch_topk(scores if instances else scores.unsqueeze(0), K))
    found = _batch_topk_warm(*((scores, hint) if instances else with_instances(scores, hint)), K)
    hint.copy_(found[5] if instances else found[5].squeeze(0))
    return _selection(instances, found[:5])


def _selection(instances: bool, lists: Sequence[Tensor]) -> Selection:
    return Selection(*lists) if instances else Selection(*(t.squeeze(0) for t in lists))


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
    return _selection(instances, _sample_topk(scores if instances else scores.unsqueeze(0), k))
