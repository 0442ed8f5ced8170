"""Which components are on: top-k of a batch, and of each sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastapd.functional import _arguments
from fastapd.ops import _check, batch_topk, sample_topk

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def batch_topk_mask(scores: Float[Tensor, "b *I C"], k: float) -> Bool[Tensor, "b *I C"]:
    """Marks the largest scores of a whole batch, k per sample on average.

    mask[b, c]  iff  scores[b, c] is among the int(k * batch) largest of the batch, in each instance for itself

    Args:
        scores: [batch, n_components] or [batch, n_instances, n_components]; any strides.
        k: Components per sample on average, a real number in [0, n_components]. `int(k * batch)` is rounded down: with
            a small batch, k = 0.2 may keep nothing.

    Returns:
        A bool mask of the shape of scores; `.to(x.dtype)` makes weights of it.

    Raises:
        ValueError: If k is out of range or the shape is wrong.
        TypeError: If k is no number or scores are not floating.

    Numerics: exact. Ties go to the lowest sample, then the lowest component; -0 equals +0; NaN counts as largest.
    Gradient: none; the mask is a constant.
    Source: Braun et al. 2025, section 2.2; `calc_topk_mask(batch_topk=True)` of ApolloResearch/apd, which
        leaves ties to `torch.topk`.
    """
    op = "batch_topk_mask"
    instances = _arguments.optional_instances(op, "scores", scores, "n_components")
    n_components = scores.shape[-1]
    _arguments.number(op, "k", k, 0, n_components, f"[0, n_components={n_components}]")
    _few_enough(op, scores)
    selection = batch_topk(_arguments.instances_first(scores, instances), int(k * scores.shape[0]))
    return _arguments.instances_first(selection.mask, instances)


def topk_mask(scores: Float[Tensor, "b *I C"], k: int) -> Bool[Tensor, "b *I C"]:
    """Marks the k largest scores of every sample.

    mask[b, c]  iff  scores[b, c] is among the k largest of scores[b]

    Args:
        scores: [batch, n_components] or [batch, n_instances, n_components]; any strides.
        k: Components of each sample, a whole number in [0, n_components].

    Returns:
        A bool mask of the shape of scores.

    Raises:
        ValueError: If k is out of range or the shape is wrong.
        TypeError: If k is not an int or scores are not floating.

    Numerics: exact. Ties go to the lowest component; -0 equals +0; NaN counts as largest.
    Gradient: none; the mask is a constant.
    Source: `calc_topk_mask(batch_topk=False)` of ApolloResearch/apd.
    """
    op = "topk_mask"
    instances = _arguments.optional_instances(op, "scores", scores, "n_components")
    n_components = scores.shape[-1]
    _check.whole(op, "k", k, 0, n_components, f"[0, n_components={n_components}]")
    _few_enough(op, scores)
    return _arguments.instances_first(sample_topk(_arguments.instances_first(scores, instances), k).mask, instances)


def _few_enough(op: str, scores: Tensor) -> None:
    if scores.shape[0] * scores.shape[-1] >= 2**31:
        raise ValueError(f"{op}: scores must have fewer than 2**31 entries an instance, got {_check.shape(scores)}")
