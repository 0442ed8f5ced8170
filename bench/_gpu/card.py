"""The device under the benchmark. `Card` is the CUDA device; `Rehearsal` takes its place on a CPU, where Triton's
interpreter runs the kernels and nothing that is timed means anything."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastapd
from bench._gpu import tree
from fastapd import _cuda_graph, backends
from fastapd.model import ComponentModel
from fastapd.training import make_optimiser

Call = Callable[[], Any]

SLEEP_CYCLES = 50_000_000
"""Some tens of milliseconds, in which whatever does not wait for a stream has long finished."""

LOAD_SIZE = 4096
"""Of the matrices that another stream multiplies."""


def _first_line(path: str, key: str) -> str | None:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return None


class Card:
    """The current CUDA device."""

    rehearsal = False
    device = "cuda"
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    default_backends: tuple[str, ...] = ("auto",)
    """What `use_backend` is told where no backend is named."""

    def __init__(self) -> None:
        torch.cuda.init()
        self._flush: Tensor | None = None
        self._load: tuple[Any, Tensor] | None = None

    # ------------------------------------------------------------------------------------------------------ what it is

    def facts(self) -> dict[str, Any]:
        """The card and what runs it, without a name of a machine or a person."""
        p = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        return {
            "device": "cuda",
            "gpu": {
                "name": p.name,
                "count": torch.cuda.device_count(),
                "capability": [p.major, p.minor],
                "processors": p.multi_processor_count,
                "memory_bytes": total,
                "free_bytes": free,
                "l2_bytes": self.l2_bytes(),
                "cuda": torch.version.cuda,
                **tree.smi(),
            },
            **software(),
        }

    def l2_bytes(self) -> int:
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 50 << 20

    def memory_bytes(self) -> int:
        """What may be taken, with what torch has cached."""
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def second(self) -> str | None:
        """Another device, if there is one."""
        return "cuda:1" if torch.cuda.device_count() > 1 else None

    def healthy(self) -> bool:
        """Whether the device still answers; an illegal access leaves a process that can do nothing more."""
        try:
            torch.cuda.synchronize()
            return float(torch.ones(2, device=self.device).sum()) == 2
        except Exception:  # whatever CUDA has become
            return False

    # ------------------------------------------------------------------------------------------------------- how often

    def often(self, n: int) -> int:
        """So many repeats."""
        return n

    def backend(self, *names: str) -> backends.use_backend:
        """These backends, or those that fastapd chooses by itself."""
        return backends.use_backend(*(names or self.default_backends))

    # ------------------------------------------------------------------------------------------------- time and memory

    def wait(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, call: Call, n: int = 1) -> float:
        """The time of one of n calls that follow each other, by CUDA events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / n

    def cold_seconds(self, call: Call, n: int) -> float:
        """The median time of a call after the L2 cache was overwritten; for calls that are launched at once."""
        if self._flush is None:
            self._flush = torch.empty(4 * self.l2_bytes(), dtype=torch.int8, device=self.device)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        torch.cuda.synchronize()
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def held(self) -> int:
        """Bytes that torch's allocator holds."""
        return torch.cuda.memory_allocated()

    def peak(self, call: Call) -> int:
        """The most that torch's allocator holds in a call; what libraries take by themselves is not seen."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def tidy(self) -> None:
        """Gives back what nobody holds."""
        self._flush = self._load = None
        torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------ graphs, streams

    def captured(self, call: Call) -> tuple[Call, Any]:
        """A graph of one call: what replays it, and what the call returned, which every replay overwrites."""
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph, result, first = torch.cuda.CUDAGraph(), None, None
        try:
            with torch.cuda.graph(graph):
                try:
                    result = call()
                except Exception as error:
                    first = error  # ending a broken capture is an error of its own, which says less
                    raise
        except Exception as error:
            raise first or error from None
        return graph.replay, result

    def graphed_steps(self, model: ComponentModel, method: Any, hidden: Any) -> Callable[[float, Tensor], Any]:
        """Training steps as fastapd captures them."""
        _cuda_graph.refuse(model, method)
        return _cuda_graph.GraphedSteps(model, method, make_optimiser(model.components, True), hidden)

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """On a stream of its own, after what was asked for before; waited for at the end."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def delay(self) -> None:
        """Keeps the current stream busy for a while, without waiting."""
        torch.cuda._sleep(SLEEP_CYCLES)

    def load(self) -> None:
        """Gives another stream some milliseconds of work, without waiting."""
        if self._load is None:
            self._load = torch.cuda.Stream(), torch.randn(LOAD_SIZE, LOAD_SIZE, device=self.device)
        stream, a = self._load
        with torch.cuda.stream(stream):
            torch.mm(a, a)

    @contextlib.contextmanager
    def forbidden_to_wait(self) -> Iterator[None]:
        """Whatever makes the host wait for the device is an error."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _resident_bytes() -> int:
    return int((_first_line("/proc/self/status", "VmRSS") or "0").split()[0]) << 10


class Rehearsal(Card):
    """A CPU that takes the same calls: Triton's interpreter, clocks for events, calls for graphs."""

    rehearsal = True
    device = "cpu"
    # the plain interpreter does arithmetic on the bits of bfloat16; the kernels take no float64
    dtypes = (torch.float32, torch.float16)
    default_backends = ("triton", "reference")

    def __init__(self) -> None:
        assert os.environ.get("TRITON_INTERPRET") == "1", "the interpreter is chosen when triton is imported"
        torch.set_num_threads(1)

    def facts(self) -> dict[str, Any]:
        gpu = {
            "name": "rehearsal",
            "count": 0,
            "capability": [9, 0],
            "processors": 132,
            "memory_bytes": 0,
            "l2_bytes": 0,
        }
        return {"device": "cuda", "gpu": {**gpu, "cuda": None}, **software()}

    def l2_bytes(self) -> int:
        return 50 << 20

    def memory_bytes(self) -> int:
        return 1 << 30

    def second(self) -> str | None:
        return "cpu"

    def healthy(self) -> bool:
        return True

    def often(self, n: int) -> int:
        return 1

    def wait(self) -> None:
        pass

    def seconds(self, call: Call, n: int = 1) -> float:
        started = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - started) / n

    def cold_seconds(self, call: Call, n: int) -> float:
        return self.seconds(call, 1)

    def held(self) -> int:
        return _resident_bytes()

    def peak(self, call: Call) -> int:
        call()
        return _resident_bytes()

    def tidy(self) -> None:
        pass

    def captured(self, call: Call) -> tuple[Call, Any]:
        result = call()

        def replay() -> None:
            fresh = call()
            for old, new in zip(_tensors(result), _tensors(fresh), strict=True):
                old.detach().copy_(new.detach())

        return replay, result

    def graphed_steps(self, model: ComponentModel, method: Any, hidden: Any) -> Callable[[float, Tensor], Any]:
        from fastapd.training import train_step

        optimiser = make_optimiser(model.components, True)
        _cuda_graph.GraphedSteps(model, method, optimiser, hidden)  # that it takes these
        return lambda lr, x: train_step(model, method, optimiser, lr, x, hidden)

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        yield

    def delay(self) -> None:
        pass

    def load(self) -> None:
        pass

    @contextlib.contextmanager
    def forbidden_to_wait(self) -> Iterator[None]:
        yield


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


# ------------------------------------------------------------------------------------------------------- its settings


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """How float32 matrices are multiplied, by our kernels and, as near as they come, by libraries.

    Args:
        name: "" for the defaults: tf32x3 of ours, float32 of the libraries; "ieee" for float32 of both, "tf32x3" for
            ours, "tf32" for both.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with fastapd.use_precision(name or "tf32x3"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def software() -> dict[str, Any]:
    """Versions, and the processor that starts the kernels."""
    import numpy

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "cpu": {
            "brand_raw": _first_line("/proc/cpuinfo", "model name") or platform.machine(),
            "count": os.cpu_count(),
        },
        "machine": platform.machine(),
        "system": platform.system(),
        "python_version": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton_version,
        "numpy": numpy.__version__,
        "dtype": "float32",
        "precision": "tf32x3",
        "timer": "CUDA events",
    }
