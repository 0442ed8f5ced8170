"""How `csrc/cuda/component_forward.cu` is started: its arrays, its workspace and which of its routes is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastapd import _cuda
from fastapd._precision import precision
from fastapd.ops._component_forward import _backward_fake, _sizes, outputs

TENSOR_CORES = {"pairs": 64, "rank": 16}
"""Pairs a component, on average, and rank from which Triton's kernels come first.

A pass over K pairs does K / C times half a flop a byte of the factors. Beyond twelve, without tensor cores, time goes
into arithmetic; far beyond, Triton's products of 16 pairs by 16 ranks on tensor cores are worth their rounding up. Not
where the precision is ieee: then Triton has no tensor cores either.
"""

EXPANDED = {"times_fewer": 2, "saved_bytes": 8 << 20, "bytes": 32 << 20}
"""When the CUDA kernels sum a sample's rows by way of the outputs of its pairs, and how much of these they hold.

Without, every pair reads all ranks of its component: K m rows. With, components are read once and one row a pair is
written and read: C m + 2 K rows. The second way is taken where it moves so many times fewer bytes, and so many fewer,
which is what its second launch costs; as many columns at a time as hold so many bytes, which stay in the L2 cache.
"""


def expanded_columns(n_instances: int, n_components: int, rank: int, n_pairs: int, d: int, size: int) -> int:
    """How many of d columns of the pairs' outputs are made at once, numbers of so many bytes; 0 for none."""
    row = n_instances * d * size
    without, expanded = n_pairs * rank * row, (n_components * rank + 2 * n_pairs) * row
    if without < EXPANDED["times_fewer"] * expanded or without - expanded < EXPANDED["saved_bytes"]:
        return 0
    return min(d, max(1, EXPANDED["bytes"] // (128 * n_instances * n_pairs * size)) * 128)


class _Pairs:
    """What every call of the CUDA kernels needs: the selection's lists, contiguous, the sizes, and room for outputs."""

    def __init__(self, x: Tensor, B: Tensor, selection: Sequence[Tensor]) -> None:
        self.lists = [t.contiguous() for t in selection]
        self.sizes = _sizes(x, B, self.lists[0].shape[1])

    def outputs(self, x: Tensor, d: int) -> tuple[Tensor, int]:
        """Workspace for sums of d columns and how many columns it holds, 0 for none."""
        n_instances, _, n_components, rank, _, _, n_pairs = self.sizes
        size = 8 if x.dtype == torch.float64 else 4
        columns = expanded_columns(n_instances, n_components, rank, n_pairs, d, size)
        return _cuda.partial_sums(x, n_instances, n_pairs if columns else 0, columns), columns


def forward_selected(x: Tensor, A: Tensor, B: Tensor, *selection: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates the outputs and lets `csrc/cuda/component_forward.cu` fill them."""
    x, At, B = x.contiguous(), A.mT.contiguous(), B.contiguous()
    pairs = _Pairs(x, B, selection)
    y, u = outputs(x, B, pairs.lists[0].shape[1])
    z, columns = pairs.outputs(x, B.shape[3])
    arrays = [t.data_ptr() for t in (x, At, B, *pairs.lists, u, y, z)]
    _cuda.call("component_forward_selected", x, *arrays, columns, *pairs.sizes)
    return y, u


def _backward(
    op: str,
    grad_y: Tensor,
    layer: tuple[Tensor, Tensor, Tensor, Tensor],
    selection: Sequence[Tensor],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Lets `csrc/cuda/component_forward.cu` fill, or add to, the gradients of x, At and B that are given."""
    x, A, B, u = layer
    grad_y, x, At, B, u = grad_y.contiguous(), x.contiguous(), A.mT.contiguous(), B.contiguous(), u.contiguous()
    pairs = _Pairs(x, B, selection)
    grad_u = torch.empty_like(u)
    z, columns = pairs.outputs(x, x.shape[2]) if gradients[0] is not None else (x.new_empty(0), 0)
    arrays = [t.data_ptr() for t in (grad_y, x, At, B, u, *pairs.lists, grad_u)]
    to = [0 if t is None else t.data_ptr() for t in gradients]
    _cuda.call(op, x, *arrays, *to, z.data_ptr(), columns, *pairs.sizes)


def forward_selected_backward(
    grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, u: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates the gradients that are needed and fills them."""
    *selection, need_x, need_A, need_B = rest
    grad_x, grad_At, grad_B = outputs = _backward_fake(grad_y, x, A, B, u, *rest)
    needed = (grad_x if need_x else None, grad_At if need_A else None, grad_B if need_B else None)
    _backward("component_forward_selected_backward", grad_y, (x, A, B, u), selection, needed)
    return outputs


def forward_selected_accumulate(grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, u: Tensor, *rest: Any) -> Tensor:
    """Adds to the gradients of the factors, which are contiguous, and allocates that of x if it is needed."""
    *selection, need_x, grad_At, grad_B = rest
    grad_x = x.new_empty(x.shape if need_x else (0,))
    needed = (grad_x if need_x else None, grad_At, grad_B)
    _backward("component_forward_selected_accumulate", grad_y, (x, A, B, u), selection, needed)
    return grad_x


def triton_first(x: Tensor, A: Tensor, B: Tensor, sample: Tensor, *rest: Any) -> str:
    """Why Triton comes before CUDA C++ for these sizes of the forward pass, or nothing."""
    rank, pairs = A.shape[3], sample.shape[1] // max(1, A.shape[1])
    if precision() == "ieee" or rank < TENSOR_CORES["rank"] or pairs < TENSOR_CORES["pairs"]:
        return ""
    return f"of arithmetic: {pairs} pairs a component of rank {rank}"


def triton_first_backward(grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, u: Tensor, *rest: Any) -> str:
    """The same for the backward passes."""
    return triton_first(x, A, B, *rest)
