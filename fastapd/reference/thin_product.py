"""C = alpha A B, or C += alpha A B, by the library."""

from __future__ import annotations

import torch
from torch import Tensor


def thin_product(A: Tensor, B: Tensor, out: Tensor, alpha: float, accumulate: bool) -> None:
    torch.baddbmm(out, A, B, beta=1 if accumulate else 0, alpha=alpha, out=out)
