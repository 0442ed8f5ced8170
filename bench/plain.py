"""The strongest plain torch forms that we know: what a careful user gets without native code, the second baseline.

Layout and storage are fastapd's own: activations [I, b, ..], factors At [I, C, m, d_in] and B [I, C, m, d_out].
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def sort_mask(scores: Tensor, n_pairs: int) -> Tensor:
    """The same by sorting all scores, the first of equal ones first."""
    flat = scores.flatten(1)
    kept = flat.sort(dim=1, descending=True, stable=True).indices[:, :n_pairs]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True).view_as(scores)


def topk_rows(scores: Tensor, n_pairs: int) -> Tensor:
    """The selected samples of each component, [I, C, longest group]; shorter groups are filled up with `batch`."""
    n_instances, batch, n_components = scores.shape
    kept = scores.flatten(1).topk(n_pairs, sorted=False).indices
    by_component = (kept % n_components * batch + kept // n_components).sort(1).values
    component = by_component // batch
    edges = torch.arange(n_components + 1, device=scores.device).mul(batch).expand(n_instances, -1).contiguous()
    offsets = torch.searchsorted(by_component, edges)
    width = int(offsets.diff(dim=1).max())
    slot = torch.arange(n_pairs, device=scores.device) - offsets.gather(1, component)
    rows = torch.full((n_instances, n_components * width), batch, device=scores.device)
    return rows.scatter_(1, component * width + slot, by_component % batch).view(n_instances, n_components, width)


def mask_of_rows(rows: Tensor, batch: int) -> Tensor:
    """The bool mask [I, b, C] of `topk_rows`."""
    n_instances, n_components, _ = rows.shape
    mask = torch.zeros(n_instances, n_components, batch + 1, dtype=torch.bool, device=rows.device)
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
    row = (rows + torch.arange(n_instances, device=x.device)[:, None, None] * (batch + 1)).flatten()
    xs = padded.index_select(0, row).view(n_instances * n_components, width, d_in)
    y = torch.bmm(torch.bmm(xs, At.flatten(0, 1).mT), B.flatten(0, 1)).flatten(0, 1)
    out = y.new_zeros(len(padded), B.shape[-1]).index_add(0, row, y)
    return out.view(n_instances, batch + 1, -1)[:, :batch]


def forward_bags(x: Tensor, At: Tensor, B: Tensor, sample: Tensor, component: Tensor, bags: Tensor) -> Tensor:
    """For rank one and one instance: the library's sums of weighted rows of B, one bag a sample.

    Args:
        sample, component: Of the selected pairs, sorted by sample.
        bags: Where the pairs of each sample start.
    """
    u = torch.linalg.vecdot(x[0].index_select(0, sample), At[0, :, 0].index_select(0, component))
    y = torch.nn.functional.embedding_bag(component, B[0, :, 0], bags, mode="sum", per_sample_weights=u)
    return y.unsqueeze(0)


# ---------------------------------------------------------------------------------------------------------- simplicity


def schatten(At: Tensor, B: Tensor, counts: Tensor, batch: int, p: float) -> Tensor:
    """By counts [I, C], so that no [b, C, m] tensor is needed; [I]."""
    S = At.square().sum(-1) * B.square().sum(-1)
    on = (counts * (S + EPS).pow(p / 2).sum(-1)).sum(-1)
    return on + (batch - counts).sum(-1) * (At.shape[-2] * EPS ** (p / 2))


def schatten_exact(At: Tensor, B: Tensor, counts: Tensor, p: float) -> Tensor:
    """From singular values, by the eigenvalues of one Gram matrix in the basis of the other's factor; [I].

    A_c B_c has the singular values of L^T A^T A L with B B^T = L L^T, in float64: in float32 the squares lose them.
    """
    At, B = At.double(), B.double()
    L = torch.linalg.cholesky(B @ B.mT)
    values = torch.linalg.eigvalsh(L.mT @ (At @ At.mT) @ L).clamp_min(0)
    return (counts * (values + EPS).pow(p / 2).sum(-1)).sum(-1).float()


def schatten_by_qr(At: Tensor, B: Tensor, counts: Tensor, p: float) -> Tensor:
    """The same from the singular values of R_A R_B^T, where A = Q_A R_A and B^T = Q_B R_B; in float32."""
    core = torch.linalg.qr(At.mT).R @ torch.linalg.qr(B.mT).R.mT
    values = torch.linalg.svdvals(core)
    return (counts * (values.square() + EPS).pow(p / 2).sum(-1)).sum(-1)


def svdvals_of_products(At: Tensor, B: Tensor, counts: Tensor, p: float) -> Tensor:
    """The same from the library's singular values of the products, which are formed; [I]."""
    values = torch.linalg.svdvals(At.mT @ B)[..., : B.shape[-2]]  # the others are zero but for rounding
    return (counts * (values.square() + EPS).pow(p / 2).sum(-1)).sum(-1)


# ------------------------------------------------------------------------------------------------------- unit length


def unit_norm(At: Tensor) -> Tensor:
    """Divides the rows by their lengths, in place."""
    return At.div_(torch.linalg.vector_norm(At, dim=-1, keepdim=True))


def remove_along(grad: Tensor, At: Tensor) -> Tensor:
    """Takes from every row its part along a row of unit length, in place."""
    return grad.addcmul_(torch.linalg.vecdot(grad, At).unsqueeze(-1), At, value=-1)
