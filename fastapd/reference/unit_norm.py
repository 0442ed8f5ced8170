"""Rows of unit length, and gradients without their part along a row; both in place."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_norm(rows: Tensor) -> None:
    if rows.numel() == 0:
        return
    largest = rows.abs().amax(-1, keepdim=True)  # divided by it, rows of any size have squares
    rows.div_(torch.where((largest > 0) & largest.isfinite(), largest, 1))
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rows.div_(torch.where(norm > 0, norm, 1))


def remove_along(grad: Tensor, rows: Tensor) -> None:
    grad.sub_((grad * rows).sum(-1, keepdim=True) * rows)
