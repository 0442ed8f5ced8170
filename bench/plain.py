"""The strongest plain torch forms that we know: what a careful user gets without native code, the second baseline.

Layout and storage are fastapd's own: activations [I, b, ..], factors At [I, C, m, d_in] and B [I, C, m, d_out].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 19
"""What stays in the cache: attributions go through the batch in pieces of this many elements, which is their best."""

EPS = 1e-16


def component_sum_loss(At: Tensor, B: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the sum to a target, [I]: one GEMM over all ranks side by side, starting from the target."""
    residual = torch.baddbmm(target, At.flatten(1, 2).mT, B.flatten(1, 2), beta=-1)
    return residual.square().sum((-2, -1))


# ----------------------------------------------------------------------------------------------------------- selection


def topk_mask(scores: Tensor, n_pairs: int) -> Tensor:
    """True at the n_pairs largest of each instance, [I, b, C]."""
    flat = scores.flatten(1)
    kept = flat.topk(n_pairs, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True).view_as(scores)


def kthvalue_mask(scores: Tensor, n_pairs: int) -> Tensor:
    """The same by a threshold; under ties it keeps more."""
    flat = scores.flatten(1)
    return (flat >= flat.kthvalue(flat.shape[1] - n_pairs + 1, keepdim=True).values).view_as(scores)


def topk_rows(scores: Tensor, n_pairs: int) -> Tensor:
    """The selected samples of each component, [I, C, longest group]; shorter groups are filled up with `batch`."""
    n_instances, batch, n_components = scores.shape
    kept = scores.flatten(1).topk(n_pairs, sorted=False).indices
    by_component = (kept % n_components * batch + kept // n_components).sort(1).values
    component = by_component // batch
    edges = torch.arange(n_components + 1).mul(batch).expand(n_instances, -1).contiguous()
    offsets = torch.searchsorted(by_component, edges)
    width = int(offsets.diff(dim=1).max())
    slot = torch.arange(n_pairs) - offsets.gather(1, component)
    rows = torch.full((n_instances, n_components * width), batch)
    return rows.scatter_(1, component * width + slot, by_component % batch).view(n_instances, n_components, width)


def mask_of_rows(rows: Tensor, batch: int) -> Tensor:
    """The bool mask [I, b, C] of `topk_rows`."""
    n_instances, n_components, _ = rows.shape
    mask = torch.zeros(n_instances, n_components, batch + 1, dtype=torch.bool)
    return mask.scatter_(2, rows, True)[..., :batch].mT


def counts_of_rows(rows: Tensor, batch: int) -> Tensor:
    """How many samples selected each component, [I, C]."""
    return (rows < batch).sum(-1)


# ------------------------------------------------------------------------------------------------------ masked forward


def forward_dense(x: Tensor, At: Tensor, B: Tensor, mask: Tensor) -> Tensor:
    """Two GEMMs around a multiplication by the float mask [I, b, C]; every component is computed."""
    u = torch.bmm(x, At.flatten(1, 2).mT).unflatten(-1, B.shape[1:3])
    return torch.bmm((u * mask.unsqueeze(-1)).flatten(2), B.flatten(1, 2))


def forward_rows(x: Tensor, At: Tensor, B: Tensor, rows: Tensor) -> Tensor:
    """Two batched GEMMs over the selected samples of each component, padded to the longest group."""
    n_instances, batch, d_in = x.shape
    n_components, width = rows.shape[1:]
    padded = torch.cat([x, x.new_zeros(n_instances, 1, d_in)], 1).flatten(0, 1)  # row `batch` is thrown away
    row = (rows + torch.arange(n_instances)[:, None, None] * (batch + 1)).flatten()
    xs = padded.index_select(0, row).view(n_instances * n_components, width, d_in)
    y = torch.bmm(torch.bmm(xs, At.flatten(0, 1).mT), B.flatten(0, 1)).flatten(0, 1)
    out = y.new_zeros(len(padded), B.shape[-1]).index_add(0, row, y)
    return out.view(n_instances, batch + 1, -1)[:, :batch]


# ---------------------------------------------------------------------------------------------------------- simplicity


def schatten(At: Tensor, B: Tensor, counts: Tensor, batch: int, p: float) -> Tensor:
    """By counts [I, C], so that no [b, C, m] tensor is needed; [I]."""
    S = At.square().sum(-1) * B.square().sum(-1)
    on = (counts * (S + EPS).pow(p / 2).sum(-1)).sum(-1)
    return on + (batch - counts).sum(-1) * (At.shape[-2] * EPS ** (p / 2))


# -------------------------------------------------------------------------------------------------------- attributions


def _pieces(batch: int, per_sample: int) -> list[slice]:
    step = max(64, CHUNK_ELEMENTS // per_sample)
    return [slice(b, b + step) for b in range(0, batch, step)]


def output_gradients(output: Tensor, layer_outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of every output by the layers' outputs, [I, b, n_outputs, d_out]: one pass, vectorised over outputs."""
    directions = torch.eye(output.shape[-1])[:, None, None].expand(-1, *output.shape)
    gradients = torch.autograd.grad(output, list(layer_outputs), directions, is_grads_batched=True)
    return [g.permute(1, 2, 0, 3) for g in gradients]


def attributions_stacked(
    xs: Sequence[Tensor], gs: Sequence[Tensor], Ats: Sequence[Tensor], Bs: Sequence[Tensor]
) -> Tensor:
    """All layers side by side: one product with [b, n_outputs, sum d_out]; the A_c B_c are materialised."""
    n_instances, batch, _ = xs[0].shape
    n_components = Bs[0].shape[1]
    P = [(At.mT @ B).transpose(1, 2).flatten(2) for At, B in zip(Ats, Bs, strict=True)]  # [I, d_in, C d_out]
    out = []
    for piece in _pieces(batch, n_instances * n_components * sum(B.shape[-1] for B in Bs)):
        z = [(x[:, piece] @ P_l).unflatten(-1, (n_components, -1)) for x, P_l in zip(xs, P, strict=True)]
        T = torch.cat(z, -1) @ torch.cat([g[:, piece] for g in gs], -1).mT  # [I, b, C, n_outputs]
        out.append(T.square().sum(-1))
    return torch.cat(out, 1)


def attributions_factored(
    xs: Sequence[Tensor], gs: Sequence[Tensor], Ats: Sequence[Tensor], Bs: Sequence[Tensor]
) -> Tensor:
    """Layer by layer through the factors, (x A_c) B_c: better than the stacked form for large matrices."""
    n_instances, batch, _ = xs[0].shape
    n_components, rank = Bs[0].shape[1:3]
    out = []
    for piece in _pieces(batch, n_instances * n_components * sum(B.shape[-1] for B in Bs)):
        T: Tensor | None = None
        for x, g, At, B in zip(xs, gs, Ats, Bs, strict=True):
            u = (x[:, piece] @ At.flatten(1, 2).mT).unflatten(-1, (n_components, rank))
            z = (u.transpose(1, 2) @ B).transpose(1, 2)  # [I, b, C, d_out]
            t = z @ g[:, piece].mT
            T = t if T is None else T + t
        assert T is not None
        out.append(T.square().sum(-1))
    return torch.cat(out, 1)


def tms_attributions(x: Tensor, W: Tensor, bias: Tensor, At: Tensor, B: Tensor) -> Tensor:
    """For relu(x W W^T + b) alone: a component's effect before the ReLU is x (P_c W^T + W P_c^T)."""
    n_components, n_features = At.shape[1], x.shape[-1]
    PW = At.mT @ (B @ W.mT.unsqueeze(1))
    M = (PW + PW.mT).transpose(1, 2).flatten(2)  # [I, F, C F]
    out = []
    for piece in _pieces(x.shape[1], len(x) * n_components * n_features):
        on = torch.baddbmm(bias, x[:, piece] @ W, W.mT) > 0
        effect = (x[:, piece] @ M).unflatten(-1, (n_components, n_features)) * on.unsqueeze(2)
        out.append(effect.square_().sum(-1))
    return torch.cat(out, 1)


def residual_attributions(
    x: Tensor, W_E: Tensor, W_U: Tensor, weights: Sequence[Tensor], Ats: Sequence[Tensor], Bs: Sequence[Tensor]
) -> Tensor:
    """For a residual MLP of one ReLU layer: effects of the output matrix are h P_c W_U, the others pass the slope."""
    (W_in, W_out), (At_in, At_out), (B_in, B_out) = weights, Ats, Bs
    n_components, n_outputs = At_in.shape[1], W_U.shape[-1]
    PU = (At_out.mT @ (B_out @ W_U.unsqueeze(1))).transpose(1, 2).flatten(2)  # [I, d_mlp, C n_outputs]
    onward = (W_out @ W_U).unsqueeze(1)  # [I, 1, d_mlp, n_outputs]
    out = []
    for piece in _pieces(x.shape[1], len(x) * n_components * n_outputs):
        r = x[:, piece] @ W_E
        h = r @ W_in
        u = (r @ At_in.flatten(1, 2).mT).unflatten(-1, (n_components, -1)).transpose(1, 2)
        z = (u @ B_in).transpose(1, 2) * (h > 0).unsqueeze(2)  # [I, b, C, d_mlp]
        effect = z @ onward + (h.relu() @ PU).unflatten(-1, (n_components, n_outputs))
        out.append(effect.square_().sum(-1))
    return torch.cat(out, 1)


# ------------------------------------------------------------------------------------------------------- the whole step


class TMSStep:
    """One training step on a toy model of superposition from the forms above, with a fused optimiser.

    Args:
        W, bias: Of the target, [I, n_features, n_hidden] and [I, 1, n_features].
        At, B: Initial factors of the first layer; the second has them with roles swapped.
        n_pairs: Selected pairs of each instance.
        p: Exponent of the Schatten term.
        coefficients: Of faithfulness, minimality and simplicity.
        tangent: Attributions written by hand for this architecture, rather than from autograd.
    """

    def __init__(
        self,
        W: Tensor,
        bias: Tensor,
        At: Tensor,
        B: Tensor,
        n_pairs: int,
        p: float,
        coefficients: tuple[float, float, float],
        tangent: bool,
    ) -> None:
        self.W, self.bias = W.detach().clone(), bias.detach().clone()
        self.At = At.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        self.B = B.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        self.n_pairs, self.p, self.coefficients, self.tangent = n_pairs, p, coefficients, tangent
        self.optimiser = torch.optim.AdamW([self.At, self.B], lr=0.0, weight_decay=0.0, fused=True)

    def _attributions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The target's output and the attributions."""
        W, bias, At, B = self.W, self.bias, self.At.detach(), self.B.detach()
        if self.tangent:
            output = torch.baddbmm(bias, x @ W, W.mT).relu()
            return output, tms_attributions(x, W, bias, At, B)
        hidden = (x @ W).requires_grad_()
        before = hidden @ W.mT
        output = (before + bias).relu()
        gradients = output_gradients(output, [hidden, before])
        with torch.no_grad():
            return output.detach(), attributions_stacked([x, hidden.detach()], gradients, [At, B], [B, At])

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The total, the three terms and the rows of the selection."""
        self.optimiser.zero_grad(set_to_none=True)
        batch, At, B = x.shape[1], self.At, self.B
        output, scores = self._attributions(x)
        rows = topk_rows(scores, self.n_pairs)
        masked = forward_rows(forward_rows(x, At, B, rows), B, At, rows)
        n_params = self.W[0].numel()  # both layers double the sum and the count alike
        terms = [
            component_sum_loss(At, B, self.W) / n_params,
            ((masked + self.bias).relu() - output).square().mean((-2, -1)),
            schatten(At, B, counts_of_rows(rows, batch), batch, self.p) / (n_params * batch),
        ]
        total = sum((c * term.mean() for c, term in zip(self.coefficients, terms, strict=True)), x.new_zeros(()))
        total.backward()
        self.optimiser.step()
        return total, terms, rows
