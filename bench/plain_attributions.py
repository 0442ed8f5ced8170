"""The strongest plain torch forms of attributions that we know, in the layout of `bench/plain.py`.

Those that take the gradients of the outputs serve any target. The tangent forms are written by hand for one
architecture: they push every component's effect forward, so that no output needs a backward pass, and fold into the
factors whatever does not depend on the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Attributions go through the batch in pieces of this many elements: on a CPU what stays in the cache, which is their
best; on a GPU what fills it and still fits beside the inputs."""


def in_pieces(function: Callable[[slice], Tensor], batch: int, per_sample: int, device: torch.device) -> Tensor:
    """The samples' attributions, piece by piece."""
    step = max(16, CHUNK_ELEMENTS[device.type] // per_sample)
    return torch.cat([function(slice(b, b + step)) for b in range(0, batch, step)], 1)


def squared_length(effect: Tensor) -> Tensor:
    """Over the last axis, in one pass without a temporary."""
    return torch.linalg.vector_norm(effect, dim=-1).square()


def output_gradients(output: Tensor, layer_outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of every output by the layers' outputs, [I, b, n_outputs, d_out]: one pass, vectorised over outputs."""
    directions = torch.eye(output.shape[-1], device=output.device)[:, None, None].expand(-1, *output.shape)
    gradients = torch.autograd.grad(output, list(layer_outputs), directions, is_grads_batched=True)
    return [g.permute(1, 2, 0, 3) for g in gradients]


def stacked(xs: Sequence[Tensor], gs: Sequence[Tensor], Ats: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
    """All layers side by side: one product with [b, n_outputs, sum d_out]; the A_c B_c are materialised."""
    n_instances, batch, _ = xs[0].shape
    n_components = Bs[0].shape[1]
    P = [(At.mT @ B).transpose(1, 2).flatten(2) for At, B in zip(Ats, Bs, strict=True)]  # [I, d_in, C d_out]

    def of(piece: slice) -> Tensor:
        z = [(x[:, piece] @ P_l).unflatten(-1, (n_components, -1)) for x, P_l in zip(xs, P, strict=True)]
        T = torch.cat(z, -1) @ torch.cat([g[:, piece] for g in gs], -1).mT  # [I, b, C, n_outputs]
        return squared_length(T)

    return in_pieces(of, batch, n_instances * n_components * sum(B.shape[-1] for B in Bs), xs[0].device)


def factored(xs: Sequence[Tensor], gs: Sequence[Tensor], Ats: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
    """Layer by layer through the factors, (x A_c) B_c: better than the stacked form for large matrices."""
    n_instances, batch, _ = xs[0].shape
    n_components, rank = Bs[0].shape[1:3]

    def of(piece: slice) -> Tensor:
        T: Tensor | None = None
        for x, g, At, B in zip(xs, gs, Ats, Bs, strict=True):
            u = (x[:, piece] @ At.flatten(1, 2).mT).unflatten(-1, (n_components, rank))
            z = (u.transpose(1, 2) @ B).transpose(1, 2)  # [I, b, C, d_out]
            t = z @ g[:, piece].mT
            T = t if T is None else T + t
        assert T is not None
        return squared_length(T)

    return in_pieces(of, batch, n_instances * n_components * sum(B.shape[-1] for B in Bs), xs[0].device)


def tms_tangent(x: Tensor, W: Tensor, bias: Tensor, At: Tensor, B: Tensor) -> Tensor:
    """For relu(x W W^T + b) alone: a component's effect before the ReLU is x (P_c W^T + W P_c^T)."""
    n_components, n_features = At.shape[1], x.shape[-1]
    PW = At.mT @ (B @ W.mT.unsqueeze(1))
    M = (PW + PW.mT).transpose(1, 2).flatten(2)  # [I, F, C F]

    def of(piece: slice) -> Tensor:
        on = torch.baddbmm(bias, x[:, piece] @ W, W.mT) > 0
        effect = (x[:, piece] @ M).unflatten(-1, (n_components, n_features)) * on.unsqueeze(2)
        return squared_length(effect)

    return in_pieces(of, x.shape[1], len(x) * n_components * n_features, x.device)


def chain_tangent(x: Tensor, weights: Sequence[Tensor], Ats: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
    """For a chain of matrices with ReLU between: effects [C, b, d] pass each matrix, joined by the layer's own."""
    assert len(x) == 1, "written for one instance"
    n_components, rank = Bs[0].shape[1:3]

    def of(piece: slice) -> Tensor:
        h, effect = x[0, piece], x.new_empty(0)
        for i, (W, At, B) in enumerate(zip(weights, Ats, Bs, strict=True)):
            u = (h @ At[0].flatten(0, 1).mT).unflatten(-1, (n_components, rank)).transpose(0, 1)  # [C, b, m]
            if i:
                through = (effect.flatten(0, 1) @ W[0]).view(n_components, len(h), -1)
                effect = torch.baddbmm(through, u, B[0])
            else:
                effect = torch.bmm(u, B[0])
            h = h @ W[0]
            if i + 1 < len(weights):
                effect = effect * (h > 0)
                h = h.relu()
        return squared_length(effect).mT.unsqueeze(0)

    return in_pieces(of, x.shape[1], n_components * max(B.shape[-1] for B in Bs), x.device)


def residual_tangent(
    x: Tensor, W_E: Tensor, W_U: Tensor, weights: Sequence[Tensor], Ats: Sequence[Tensor], Bs: Sequence[Tensor]
) -> Tensor:
    """For a residual MLP: nothing is as wide as the stream.

    The stream before layer j is s R_j with s = [x, h_0, .., h_{j-1}] and R_j the embedding and the earlier output
    matrices on top of each other; of what a layer writes, only what later layers and the output read is wanted, Q_j.
    Both are folded into the factors once a batch. Effects are kept on the inputs of later layers and on the output.
    """
    n_layers, (n_instances, batch, _) = len(weights) // 2, x.shape
    n_components, width, n_outputs = Bs[0].shape[1], weights[0].shape[-1], W_U.shape[-1]
    inner, outer = slice(0, None, 2), slice(1, None, 2)
    W_in, W_out = weights[inner], weights[outer]
    folded = []
    for j in range(n_layers):
        R = torch.cat([W_E, *W_out[:j]], 1)  # [I, n_features + j width, d_embed]
        Q = torch.cat([*W_in[j + 1 :], W_U], -1)  # [I, d_embed, (later layers) width + n_outputs]
        RA = R @ Ats[inner][j].flatten(1, 2).mT  # [I, n_features + j width, C m]
        BQ = Bs[outer][j].flatten(1, 2) @ Q  # [I, C m, ..]
        PQ = (Ats[outer][j].mT @ BQ.unflatten(1, Bs[outer][j].shape[1:3])).transpose(1, 2).flatten(2)
        B_in, rank = Bs[inner][j], Bs[inner][j].shape[2]
        wide = R.shape[1] * width < rank * (R.shape[1] + width)  # the matrix instead of the factors: fewer flops
        if wide:
            RA = (RA.unflatten(-1, (n_components, rank)).transpose(1, 2) @ B_in).transpose(1, 2).flatten(2)
        folded.append((R @ W_in[j], RA, None if wide else B_in, W_out[j] @ Q, PQ))

    def of(piece: slice) -> Tensor:
        s, onward = x[:, piece], None
        for R_in, RA, B_in, WQ, PQ in folded:
            before = s @ R_in
            own = (s @ RA).unflatten(-1, (n_components, -1))
            if B_in is not None:
                own = (own.transpose(1, 2) @ B_in).transpose(1, 2)
            if onward is not None:
                own = own + onward[..., :width]
            h = before.relu()
            own = (own * (before > 0).unsqueeze(2)).flatten(1, 2)  # [I, b C, width]: one GEMM, not one a sample
            effect = torch.baddbmm((h @ PQ).view(n_instances, own.shape[1], -1), own, WQ)
            effect = effect.unflatten(1, (-1, n_components))
            onward = effect if onward is None else effect + onward[..., width:]
            s = torch.cat([s, h], -1)
        assert onward is not None
        return squared_length(onward)

    return in_pieces(of, batch, n_instances * n_components * (n_outputs + (n_layers - 1) * width), x.device)
