"""Sums of several products as one walk: step by step through the first, then through the second, and so on.

A loop for each product would be compiled once for each, with pointers and accumulators of its own; one loop that picks
its operands by the number of the step is small however many products there are. What is picked are scalars.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from fastapd.kernels._launch import cdiv
from torch import Tensor


@triton.jit
def picked(columns, firsts, step):
    """Of each tuple of scalars, one for every product, that of the last whose first step is not beyond `step`."""
    found = ()
    for column in tl.static_range(len(columns)):
        one = columns[column][0]
        for n in tl.static_range(1, len(firsts)):
            one = tl.where(step >= firsts[n], columns[column][n], one)
        found = found + (one,)
    return found


def first_steps(sizes: Sequence[int], block: int) -> tuple[tuple[int, ...], int]:
    """The first step of every product of so many numbers, taken `block` at a time, and the number of all steps."""
    firsts, steps = [], 0
    for size in sizes:
        firsts.append(steps)
        steps += cdiv(size, block)
    return tuple(firsts), steps


def rows_dense(t: Tensor) -> Tensor:
    """The same numbers with those of the last axis side by side, as kernels rely on; other axes as they are."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()
