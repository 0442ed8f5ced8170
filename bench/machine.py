"""What this machine can do at best on one thread, measured in the run that is judged by it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

REPEATS = 20
SIZES = (256, 512, 1024)
"""Of square matrices."""

CACHE_BYTES, MEMORY_BYTES = 4 << 20, 256 << 20
"""What is read and copied: the first fits into a last-level cache, the second does not."""


def _best(call: Callable[[], object]) -> float:
    """The least CPU time of one call."""
    call()
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


@functools.lru_cache(maxsize=1)
def constants() -> dict[str, float]:
    """Rates in GFLOP/s of matrix products and in GB/s of reading and copying, on as many threads as torch has."""
    out = {}
    for name, dtype in (("sgemm", torch.float32), ("dgemm", torch.float64)):
        rates = []
        for n in SIZES:
            a = torch.randn(n, n, dtype=dtype)
            rates.append(2 * n**3 / _best(lambda a=a: a @ a))
        out[f"{name}_gflops"] = max(rates) / 1e9
    for name, n_bytes in (("cache", CACHE_BYTES), ("memory", MEMORY_BYTES)):
        x = torch.rand(n_bytes // 4)
        y = torch.empty_like(x)
        reads = [_best(x.sum), _best(lambda x=x: torch.dot(x, x))]
        out[f"{name}_read_gbs"] = n_bytes / min(reads) / 1e9
        out[f"{name}_copy_gbs"] = 2 * n_bytes / _best(lambda x=x, y=y: y.copy_(x)) / 1e9
    return out


LARGE_BYTES = 16 << 20
"""What more is read from memory, not from a cache."""


def floor_seconds(flops: float, n_bytes: float) -> float:
    """The least time for so many float32 operations in matrix products and bytes that have to be read or written."""
    rates = constants()
    place = "memory" if n_bytes > LARGE_BYTES else "cache"
    return max(flops / (rates["sgemm_gflops"] * 1e9), n_bytes / (rates[f"{place}_read_gbs"] * 1e9))
