"""How far outputs and hidden activations are from the target's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastapd.functional import _arguments
from fastapd.functional._arguments import Layers
from fastapd.ops import _check

if TYPE_CHECKING:
    from jaxtyping import Float


def recon_mse(output: Float[Tensor, "b *I o"], target_output: Float[Tensor, "b *I o"]) -> Float[Tensor, "*I"]:
    """Mean squared error over samples and outputs.

    L = mean_bo ( f_bo − f*_bo )²

    Args:
        output: [batch, n_outputs] or [batch, n_instances, n_outputs]; flatten other axes into the batch.
        target_output: Of the same shape.

    Returns:
        A scalar, or [n_instances]; 0 for an empty batch.

    Raises:
        ValueError: If the shapes differ or are of another kind.
        TypeError: If a dtype is not floating or the dtypes differ.

    Gradient: in both; detach the target's.
    Source: `calc_recon_mse` of ApolloResearch/apd.
    """
    _check_pair("recon_mse", output, target_output)
    squares = (output - target_output).square()
    return squares.mean((0, -1)) if output.shape[0] and output.shape[-1] else squares.sum((0, -1))


def recon_kl(logits: Float[Tensor, "b *I o"], target_logits: Float[Tensor, "b *I o"]) -> Float[Tensor, "*I"]:
    """Mean over samples of the divergence of the outputs' distribution from the target's, in nats.

    L = mean_b KL( softmax f*_b ‖ softmax f_b )

    Args:
        logits: [batch, n_outputs] or [batch, n_instances, n_outputs]; flatten other axes into the batch.
        target_logits: Of the same shape. An output of probability zero (logit -inf) contributes nothing.

    Returns:
        A scalar, or [n_instances]; 0 for an empty batch.

    Raises:
        ValueError: If the shapes differ or are of another kind.
        TypeError: If a dtype is not floating or the dtypes differ.

    Gradient: in both; detach the target's.
    """
    _check_pair("recon_kl", logits, target_logits, ("logits", "target_logits"))
    log_p, log_q = target_logits.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    kl = (p * torch.where(p == 0, 0, log_p - log_q)).sum(-1)  # 0 log 0 is 0
    return kl.mean(0) if kl.shape[0] else kl.sum(0)


def act_recon_loss(acts: Layers, target_acts: Layers) -> Float[Tensor, "*I"]:
    """Error of hidden activations, over all layers together.

    L = mean_b [ sum_l ‖h_lb − h*_lb‖² / sum_l d_l ]

    Args:
        acts: Layers: [batch, n] or [batch, n_instances, n], each with its own width d_l.
        target_acts: Layers: of the same shapes.

    Returns:
        A scalar, or [n_instances]; 0 for an empty batch.

    Raises:
        ValueError: If shapes or layers do not match.
        TypeError: If a dtype is not floating or the dtypes differ.

    Gradient: in both; detach the target's.
    Source: `calc_act_recon` of ApolloResearch/apd, which compares `relu` of each `mlp_in` before its bias in the
        residual MLP and every layer as it is elsewhere: apply what you want compared first.
    """
    op = "act_recon_loss"
    labels, (ours, theirs) = _arguments.layers(op, acts=acts, target_acts=target_acts)
    total: Tensor | None = None
    width = 0
    for label, h, wanted in zip(labels, ours, theirs, strict=True):
        _check_pair(op, h, wanted, (f"acts{label}", f"target_acts{label}"), "d")
        _check.tensors(op, **{f"acts{labels[0]}": ours[0], f"acts{label}": h})
        if h.shape[:-1] != ours[0].shape[:-1]:
            raise ValueError(
                f"{op}: acts{label} must have the batch and n_instances of acts{labels[0]} {_check.shape(ours[0])}, "
                f"got {_check.shape(h)}"
            )
        each = (h - wanted).square().sum(-1)  # [batch, (n_instances)]
        total = each if total is None else total + each
        width += h.shape[-1]
    assert total is not None, "there is at least one layer"
    return total.sum(0) / max(total.shape[0] * width, 1)


def _check_pair(
    op: str,
    ours: Tensor,
    target: Tensor,
    names: tuple[str, str] = ("output", "target_output"),
    axis: str = "n_outputs",
) -> None:
    _arguments.optional_instances(op, names[0], ours, axis)
    _check.tensors(op, **dict(zip(names, (ours, target), strict=True)))
    if ours.shape != target.shape:
        raise ValueError(
            f"{op}: {names[1]} must have the shape of {names[0]}, {_check.shape(ours)}, got {_check.shape(target)}"
        )
