"""Schatten sums of the components A_c B_c with their gradients, and their singular values, on a GPU, in float64.

Exact forms, of singular values, without forming A_c B_c and without dividing by a singular value:

    gram, factor   (`_svd_gram`) Gram matrices of both factors and their triangular factors R, in twice the precision
    core           (`_svd_core`) singular values of R_A R_B^T by one-sided Jacobi; what gradients need
    apply          gradients of the factors, written or added to what is there

Rank 1 takes the factored form, which is the same sum there.

Factored forms (`_svd_factored`), of S_cm = |a_cm|^2 |b_cm|^2, where no row of the factors knows another: `factored`
with counts, in one launch; `norms`, `powers` and `spread` with a mask.

No program adds to what another writes: each leaves its part of the sum, and a program of `total` owns an instance and
adds them in order, in float64. Here are the limits, the configurations and the launches.

The exact forms take ranks up to MOST_RANK. For components of full rank in small layers, forming them may be the better
choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from fastapd.kernels import _launch
from fastapd.kernels._launch import annotated, block, cdiv, launch
from fastapd.kernels._svd_core import _apply_schatten_kernel, _core_schatten_kernel, _values_svd_kernel
from fastapd.kernels._svd_factored import (
    _factored_schatten_kernel,
    _norms_kernel,
    _powers_schatten_kernel,
    _spread_schatten_kernel,
)
from fastapd.kernels._svd_gram import _factor_svd_kernel, _gram_svd_kernel
from torch import Tensor

SWEEPS = 40
"""After so many Jacobi stops wherever it is; 5 to 15 are usual."""

MOST_RANK = 64
"""Beyond, a core program's matrices do not fit the registers of a block of threads."""


# -------------------------------------------------------------------------------------------------------------- the sum


def _total_flops(args: Mapping[str, Any]) -> tuple[float, float]:
    n = args["n_instances"] * args["n_partials"]
    return float(n), 8.0 * n


@triton.jit(launch_metadata=annotated(_total_flops))
def _total_schatten_kernel(
    partial_ptr,  # [I, partials], float64, contiguous
    total_ptr,  # [I]
    n_instances,
    n_partials,
    BLOCK: tl.constexpr,
):
    instance = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, n_partials, BLOCK):
        o = start + tl.arange(0, BLOCK).to(tl.int64)
        acc += tl.load(partial_ptr + instance * n_partials + o, mask=o < n_partials, other=0.0)
    tl.store(total_ptr + instance, tl.sum(acc, 0).to(tl.float32).to(total_ptr.dtype.element_ty))


# ------------------------------------------------------------------------------------------------------- configurations


def gram_config(d: int, rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """Tiles of 16 by 16 pairs of rows at most; 16 sums a thread, each in two numbers."""
    block_rank = block(rank, 1, 16)
    block_d = min(block(d, 16, 128), max(16, 1024 // block_rank**2))
    warps = max(1, min(8, block_rank**2 * block_d // 512))
    return {"BLOCK_RANK": block_rank, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}


def factor_config(rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """A column a thread up to rank 32, a quarter of one beyond."""
    m = block(rank, 1, MOST_RANK)
    return {"M": m, "MATRICES": max(1, 32 // m), "num_warps": 1 if m <= 16 else m // 8, "num_stages": 1}


def core_config(rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """The same."""
    m = block(rank, 1, MOST_RANK)
    return {"M": m, "COMPONENTS": max(1, 32 // m), "num_warps": 1 if m <= 16 else m // 8, "num_stages": 1}


def apply_config(d: int, rank: int, capability: tuple[int, int]) -> dict[str, int]:
    """Up to 16 sums a thread; 8 for compute capability 10, where 16 beside a gradient to add to leave the registers."""
    rows = block(rank, 1, MOST_RANK)
    block_d = block(d, 16, max(32, min(256, 2048 // rows)))
    warps = max(1, min(4, rows * block_d // (256 if capability[0] == 10 else 512)))
    return {"RANK": rows, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}


def rows_config(d: int, capability: tuple[int, int]) -> dict[str, int]:
    """Up to 8 numbers a thread and step of the walk; few rows, as every thread of a warp computes its rows' powers."""
    block_d, launched = block(d, 16, 256), {"num_warps": 2, "num_stages": 2, "maxnreg": 255}
    return {"BLOCK_ROWS": max(2, min(8, 512 // block_d)), "BLOCK_D": block_d, **launched}


def powers_config(batch: int, n_components: int, capability: tuple[int, int]) -> dict[str, int]:
    """Long columns of samples, so that few shares of gradients are kept, unless that leaves multiprocessors idle."""
    block_components = block(n_components, 1, 32)
    block_batch = 64
    while block_batch > 16 and cdiv(batch, block_batch) * cdiv(n_components, block_components) < 512:
        block_batch //= 2
    warps = max(1, min(8, block_batch * block_components // 256))
    return {
        "BLOCK_BATCH": block_batch, "BLOCK_COMPONENTS": block_components, "num_warps": warps, "num_stages": 1
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ launchers


def _total(op: str, partial: Tensor, total: Tensor) -> None:
    """total [I] = partial [I, n] summed in order."""
    n = partial.shape[1]
    config = {"BLOCK": block(n, 16, 4096), "num_warps": 8 if n > 1024 else 2, "num_stages": 1}
    launch(op, _total_schatten_kernel, partial.shape[0], partial, partial, total, partial.shape[0], n, **config)


def _triangular(op: str, A: Tensor, B: Tensor, counts: Tensor | None, m: int) -> Tensor:
    """R_A and R_B of all components, [I, C, 2, m, m]."""
    n_instances, n_components, rank, d_out = B.shape
    At, n_groups = A.mT, n_instances * n_components
    gram = A.new_empty(n_instances, n_components, 2, 2, m, m, dtype=torch.float64)
    config = gram_config(max(At.shape[3], d_out), rank, _launch.capability(A))
    n_blocks = m // config["BLOCK_RANK"]
    n_tiles = n_blocks * (n_blocks + 1) // 2
    launch(
        op, _gram_svd_kernel, n_groups * n_tiles, A,
        At, B, A if counts is None else counts, gram,
        n_groups, n_components, rank, At.shape[3], d_out, n_tiles,
        *At.stride(), *B.stride(), *((0, 0) if counts is None else counts.stride()),
        HAS_COUNTS=counts is not None, RANK=m, **config,
    )  # fmt: skip
    upper = A.new_empty(n_instances, n_components, 2, m, m, dtype=torch.float64)
    config = factor_config(rank, _launch.capability(A))
    launch(
        op, _factor_svd_kernel, cdiv(2 * n_groups, config["MATRICES"]), A,
        gram, gram if counts is None else counts, upper,
        2 * n_groups, n_components, *((0, 0) if counts is None else counts.stride()),
        HAS_COUNTS=counts is not None, **config,
    )  # fmt: skip
    return upper


def component_svdvals(A: Tensor, B: Tensor) -> Tensor:
    """Singular values [I, C, m], descending, for A [I, C, d_in, m] and B [I, C, m, d_out]."""
    op = "component_svdvals"
    values = A.new_empty(B.shape[:3])
    if values.numel() == 0:
        return values
    n_groups, rank = B.shape[0] * B.shape[1], B.shape[2]
    config = core_config(rank, _launch.capability(A))
    upper = _triangular(op, A, B, None, config["M"])
    n_programs = cdiv(n_groups, config["COMPONENTS"])
    launch(op, _values_svd_kernel, n_programs, A, upper, values, n_groups, rank, SWEEPS=SWEEPS, **config)
    return values


class _Sum:
    """A sum by counts with its gradients, which are written, added to what is there, or None."""

    def __init__(
        self, op: str, A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, scale: float,
        gradients: tuple[Tensor, Tensor] | None, accumulate: bool,
    ) -> None:  # fmt: skip
        self.op, self.A, self.B, self.counts = op, A, B, counts
        self.scalars = (p, eps, batch, scale)
        self.gradients, self.accumulate = gradients, accumulate
        self.total = A.new_empty(A.shape[0])

    def exact(self) -> Tensor:
        """From singular values."""
        op, A, B, counts = self.op, self.A, self.B, self.counts
        n_instances, n_components, rank, d_out = B.shape
        if rank <= 1:  # the only value is the product of the lengths
            return self.factored()
        At, n_groups, capability = A.mT, n_instances * n_components, _launch.capability(A)
        d_in = At.shape[3]
        config = core_config(rank, capability)
        m = config["M"]
        upper = _triangular(op, A, B, counts, m)
        partial = A.new_empty(n_instances, n_components, dtype=torch.float64)
        h = partial
        if self.gradients is not None:
            h = A.new_empty(n_instances, n_components, 2, m, m, dtype=torch.float64)
        launch(
            op, _core_schatten_kernel, cdiv(n_groups, config["COMPONENTS"]), A,
            upper, counts, h, partial, n_groups, n_components, rank, *counts.stride(), *self.scalars,
            HAS_GRAD=self.gradients is not None, SWEEPS=SWEEPS, **config,
        )  # fmt: skip
        if self.gradients is not None:
            config = apply_config(max(d_in, d_out), rank, capability)
            n_in, n_out = cdiv(d_in, config["BLOCK_D"]), cdiv(d_out, config["BLOCK_D"])
            n_tiles = max(n_in, n_out)
            launch(
                op, _apply_schatten_kernel, n_groups * n_tiles, A,
                At, B, counts, h, *self.gradients,
                n_groups, n_components, rank, d_in, d_out, n_tiles, n_in, n_out,
                *At.stride(), *B.stride(), *counts.stride(), ACCUMULATE=self.accumulate, **config,
            )  # fmt: skip
        _total(op, partial, self.total)
        return self.total

    def factored(self) -> Tensor:
        """From the lengths of columns."""
        A, B, counts = self.A, self.B, self.counts
        n_instances, n_components, rank, d_out = B.shape
        At, n_rows = A.mT, n_components * rank
        config = rows_config(max(At.shape[3], d_out), _launch.capability(A))
        n_tiles = cdiv(n_rows, config["BLOCK_ROWS"])
        partial = A.new_empty(n_instances, n_tiles, dtype=torch.float64)
        gradients = (partial, partial) if self.gradients is None else self.gradients
        launch(
            self.op, _factored_schatten_kernel, n_instances * n_tiles, A,
            At, B, counts, partial, *gradients,
            n_instances, n_rows, rank, At.shape[3], d_out, n_tiles,
            *At.stride(), *B.stride(), *counts.stride(), *self.scalars,
            HAS_GRAD=self.gradients is not None, ACCUMULATE=self.accumulate, **config,
        )  # fmt: skip
        _total(self.op, partial, self.total)
        return self.total


def _gradients(A: Tensor, B: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    if not with_grad:
        return A.new_empty(0), B.new_empty(0)
    return A.new_empty(*B.shape[:3], A.shape[2]), B.new_empty(B.shape)


def schatten(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum [I] from singular values and its gradients by At and B, which come back empty if not wanted."""
    gradients = _gradients(A, B, with_grad)
    both = gradients if with_grad else None
    return _Sum("schatten", A, B, counts, p, eps, batch, 1.0, both, False).exact(), *gradients


def schatten_factored(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the lengths of columns."""
    gradients = _gradients(A, B, with_grad)
    both = gradients if with_grad else None
    return _Sum("schatten_factored", A, B, counts, p, eps, batch, 1.0, both, False).factored(), *gradients


def schatten_accumulate(
    A: Tensor,
    B: Tensor,
    counts: Tensor,
    p: float,
    eps: float,
    batch: int,
    exact: bool,
    scale: float,
    grad_At: Tensor,
    grad_B: Tensor,
) -> Tensor:
    """Either sum, with `scale` times its gradients added to what is in the buffers."""
    whole = _Sum("schatten_accumulate", A, B, counts, p, eps, batch, scale, (grad_At, grad_B), True)
    return whole.exact() if exact else whole.factored()


def schatten_factored_masked(
    A: Tensor, B: Tensor, mask: Tensor, p: float, eps: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum from lengths with a float mask [I, b, C] inside the power; gradients by At, B and the mask."""
    op, At = "schatten_factored_masked", A.mT
    n_instances, n_components, rank, d_out = B.shape
    d_in, batch, n_rows = At.shape[3], mask.shape[1], n_components * rank
    capability = _launch.capability(A)
    total, (grad_At, grad_B) = A.new_empty(n_instances), _gradients(A, B, with_grad)
    grad_mask = mask.new_empty(mask.shape if with_grad else (0,))
    norms = A.new_empty(2, n_instances, n_rows, dtype=torch.float64)
    rows = rows_config(max(d_in, d_out), capability)
    n_tiles = cdiv(n_rows, rows["BLOCK_ROWS"])
    factors = (*At.stride(), *B.stride())
    launch(
        op, _norms_kernel, n_instances * n_tiles, A,
        At, B, norms, n_instances, n_rows, rank, d_in, d_out, n_tiles, *factors, **rows,
    )  # fmt: skip
    config = powers_config(batch, n_components, capability)
    n_batch, n_across = cdiv(batch, config["BLOCK_BATCH"]), cdiv(n_components, config["BLOCK_COMPONENTS"])
    partial = A.new_empty(n_instances, n_batch * n_across, dtype=torch.float64)
    to_s = A.new_empty(n_instances, n_batch, n_rows if with_grad else 0, dtype=torch.float64)
    launch(
        op, _powers_schatten_kernel, n_instances * n_batch * n_across, A,
        norms, mask, grad_mask, to_s, partial,
        n_instances, batch, n_components, rank, n_batch, n_across, *mask.stride(), p, eps,
        HAS_GRAD=with_grad, **config,
    )  # fmt: skip
    if with_grad:
        launch(
            op, _spread_schatten_kernel, n_instances * n_tiles, A,
            At, B, norms, to_s, grad_At, grad_B,
            n_instances, n_rows, rank, d_in, d_out, n_tiles, n_batch, *factors, **rows,
        )  # fmt: skip
    _total(op, partial, total)
    return total, grad_At, grad_B, grad_mask


def limits(A: Tensor, B: Tensor, *rest: Any) -> list[str]:
    """Why the exact forms would refuse these factors."""
    rank = B.shape[2]
    return [f"the Triton kernels take ranks up to {MOST_RANK}, not {rank}"] if rank > MOST_RANK else []


def accumulate_limits(A: Tensor, B: Tensor, *rest: Any) -> list[str]:
    """The same for `schatten_accumulate`, whose factored form takes any rank."""
    return limits(A, B) if rest[4] else []
