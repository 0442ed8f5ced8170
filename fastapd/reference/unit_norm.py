"""Rows of unit length, and gradients without their part along a row; both in place."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_norm(rows: Tensor) -> None:
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rows.div_(torch.where(norm > 0, norm, torch.ones_like(norm)))


def remove_along(grad: Tensor, rows: Tensor) -> None:
    grad.sub_((grad * rows).sum(-1, keepdim=True) * rows)
