"""What this card can do at best, measured in the run that is judged by it, and the floors that follow.

A floor is the largest of three times: the flops of the formula at the rate of its precision, its bytes at the rate of
the memory or, if they fit into half of it, of the L2 cache, and one launch in a graph. Rates are in FLOP/s and bytes/s.

    float32   the better of the library's float32 products and a third of its TF32 products: what tf32x3 may reach
    tf32      the library's products in TF32
    float64   multiplications and additions outside of tensor cores
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench._gpu.card import Card, precision

REPEATS = 5
"""Of every measurement; the best counts."""


class Sizes(NamedTuple):
    """What is measured with."""

    copied_bytes: int
    l2_bytes: int
    matrix: int
    matrix_float64: int
    readers: int
    chains: int
    calls: int


ON_A_CARD = Sizes(
    copied_bytes=1 << 31, l2_bytes=16 << 20, matrix=8192, matrix_float64=6144, readers=1056, chains=2048, calls=500
)
IN_REHEARSAL = Sizes(copied_bytes=1 << 12, l2_bytes=1 << 12, matrix=16, matrix_float64=16, readers=2, chains=2, calls=2)


# The kernels' arithmetic is only there to keep the compiler from leaving it out.


@triton.jit
def _read_kernel(x_ptr, out_ptr, n_blocks, BLOCK: tl.constexpr):
    """Every program reads all of x, from a block of its own onwards."""
    pid = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(n_blocks):
        o = ((pid + i) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + o, cache_modifier=".cg")
    tl.store(out_ptr + pid, tl.sum(total))


@triton.jit
def _multiply_kernel(x_ptr, out_ptr, rounds, BLOCK: tl.constexpr):
    """Four chains of multiplications with an addition, of every element."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    a, b, c, d = x, x + 1, x + 2, x + 3
    for _ in range(rounds):
        a = a * x + x
        b = b * x + x
        c = c * x + x
        d = d * x + x
    tl.store(out_ptr + o, a + b + c + d)


def _best(card: Card, call: Callable[[], Any], n: int = 1) -> float:
    call()
    return min(card.seconds(call, n) for _ in range(card.often(REPEATS)))


def _products(card: Card, n: int, dtype: torch.dtype, mode: str = "") -> float:
    a, b = (torch.randn(n, n, device=card.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with precision(mode):
        return 2 * n**3 / _best(card, lambda: torch.mm(a, b, out=out), card.often(3))


def _vectors(card: Card, sizes: Sizes, dtype: torch.dtype) -> float:
    kernel: Any = _multiply_kernel
    block, rounds = 256, 1024 if not card.rehearsal else 2
    x = torch.zeros(sizes.chains * block, dtype=dtype, device=card.device)
    out = torch.empty_like(x)
    seconds = _best(card, lambda: kernel[(sizes.chains,)](x, out, rounds, BLOCK=block, num_warps=8))
    return sizes.chains * block * rounds * 8 / seconds


def _l2(card: Card, sizes: Sizes) -> float:
    kernel: Any = _read_kernel
    block = 4096 if not card.rehearsal else 256
    x = torch.zeros(sizes.l2_bytes // 4, device=card.device)
    out = torch.empty(sizes.readers, device=card.device)
    n_blocks = x.numel() // block
    seconds = _best(card, lambda: kernel[(sizes.readers,)](x, out, n_blocks, BLOCK=block, num_warps=8))
    return sizes.readers * x.nbytes / seconds


def measure(card: Card) -> dict[str, float]:
    """The constants by name, rates in units that a name says; launches in seconds."""
    sizes = IN_REHEARSAL if card.rehearsal else ON_A_CARD
    x = torch.zeros(sizes.copied_bytes // 8, device=card.device)
    y = torch.empty_like(x)
    out = {"memory_gbs": 2 * x.nbytes / _best(card, lambda: y.copy_(x)) / 1e9}
    del x, y
    out["l2_gbs"] = _l2(card, sizes) / 1e9
    n, wide = sizes.matrix, sizes.matrix_float64
    out["fp32_tflops"] = _products(card, n, torch.float32, "ieee") / 1e12
    out["tf32_tflops"] = _products(card, n, torch.float32, "tf32") / 1e12
    out["bf16_tflops"] = _products(card, n, torch.bfloat16) / 1e12
    out["fp64_tflops"] = _products(card, wide, torch.float64) / 1e12
    out["fp32_vector_tflops"] = _vectors(card, sizes, torch.float32) / 1e12
    out["fp64_vector_tflops"] = _vectors(card, sizes, torch.float64) / 1e12
    one = torch.zeros(1, device=card.device)
    out["launch_seconds"] = _best(card, lambda: one.add_(1), sizes.calls)
    out["graph_launch_seconds"] = _launch_in_a_graph(card, one, sizes.calls)
    return out


def _launch_in_a_graph(card: Card, one: Tensor, calls: int) -> float:
    """Of one kernel among many that a graph starts."""

    def many() -> Tensor:
        for _ in range(calls):
            one.add_(1)
        return one

    replay, _ = card.captured(many)
    return _best(card, replay, card.often(3)) / calls


class Floor(NamedTuple):
    """The least possible time, and what bounds it: "flops", "memory", "L2" or "launch"."""

    seconds: float
    bound: str


RATES = ("float32", "tf32", "float64")


def rate(constants: Mapping[str, float], kind: str) -> float:
    """FLOP/s of one of `RATES`."""
    teraflops = {
        "float32": max(constants["fp32_tflops"], constants["tf32_tflops"] / 3),
        "tf32": constants["tf32_tflops"],
        "float64": constants["fp64_vector_tflops"],
    }
    return teraflops[kind] * 1e12


def floor(constants: Mapping[str, float], l2_bytes: int, flops: float, n_bytes: float, kind: str) -> Floor:
    """Of a formula with so many flops of one kind, and bytes that have to be read or written."""
    place = "L2" if n_bytes <= l2_bytes / 2 else "memory"
    bandwidth = constants["l2_gbs" if place == "L2" else "memory_gbs"] * 1e9
    times = {
        "flops": flops / rate(constants, kind),
        place: n_bytes / bandwidth,
        "launch": constants["graph_launch_seconds"],
    }
    bound = max(times, key=lambda name: times[name])
    return Floor(times[bound], bound)
