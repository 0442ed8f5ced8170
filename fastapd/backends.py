"""Who can run an op on these inputs, in which order, and why not.

`choose` walks the op's row of `TABLE` and takes the first backend whose list of reasons to refuse is empty. A user may
restrict the walk with `use_backend` or the environment variable `FASTAPD_BACKEND`; then a refusal is an error that
lists every reason. A backend that does not exist for an op is absent from its row.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastapd import _cuda, _env, _native, _triton

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""All backends, fastest first: CUDA C++, Triton, CPU C++, plain PyTorch."""

TABLE: dict[str, dict[str, str]] = {
    "component_sum": {
        "triton": "fastapd.kernels.component_sum:component_sum",
        "reference": "fastapd.reference.component_sum:component_sum",
    },
    "component_sum_loss": {
        "cuda": "fastapd.ops._component_sum:cuda_component_sum_loss",
        "triton": "fastapd.kernels.component_sum:component_sum_loss",
        "cpu": "fastapd.ops._component_sum:cpu_component_sum_loss",
        "reference": "fastapd.reference.component_sum:component_sum_loss",
    },
    "component_forward": {
        "reference": "fastapd.reference.component_forward:component_forward",
    },
    "component_forward_selected": {
        "cuda": "fastapd.ops._component_forward_cuda:forward_selected",
        "triton": "fastapd.kernels.component_forward:component_forward_selected",
        "cpu": "fastapd.ops._component_forward:cpu_forward_selected",
        "reference": "fastapd.reference.component_forward:component_forward_selected",
    },
    "component_forward_selected_backward": {
        "cuda": "fastapd.ops._component_forward_cuda:forward_selected_backward",
        "triton": "fastapd.kernels.component_forward:component_forward_selected_backward",
        "cpu": "fastapd.ops._component_forward:cpu_forward_selected_backward",
        "reference": "fastapd.reference.component_forward:component_forward_selected_backward",
    },
    "component_forward_selected_accumulate": {
        "cuda": "fastapd.ops._component_forward_cuda:forward_selected_accumulate",
        "triton": "fastapd.kernels.component_forward:component_forward_selected_accumulate",
        "cpu": "fastapd.ops._component_forward:cpu_forward_selected_accumulate",
        "reference": "fastapd.reference.component_forward:component_forward_selected_accumulate",
    },
    "attribution_reduce": {
        "cuda": "fastapd.ops._attribution_reduce_cuda:attribution_reduce",
        "triton": "fastapd.kernels.attribution_reduce:attribution_reduce",
        "cpu": "fastapd.ops._attribution_reduce:cpu_attribution_reduce",
        "reference": "fastapd.reference.attribution_reduce:attribution_reduce",
    },
    "attribution_reduce_backward": {
        "cuda": "fastapd.ops._attribution_reduce_cuda:attribution_reduce_backward",
        "triton": "fastapd.kernels.attribution_reduce:attribution_reduce_backward",
        "cpu": "fastapd.ops._attribution_reduce:cpu_attribution_reduce_backward",
        "reference": "fastapd.reference.attribution_reduce:attribution_reduce_backward",
    },
    "attribution_tangent": {
        "triton": "fastapd.kernels.attribution_tangent:attribution_tangent",
        "cpu": "fastapd.ops._attribution_tangent:cpu_attribution_tangent",
        "reference": "fastapd.reference.attribution_tangent:attribution_tangent",
    },
    "attribution_tangent_backward": {
        "triton": "fastapd.kernels.attribution_tangent:attribution_tangent_backward",
        "cpu": "fastapd.ops._attribution_tangent:cpu_attribution_tangent_backward",
        "reference": "fastapd.reference.attribution_tangent:attribution_tangent_backward",
    },
    "batch_topk": {
        "cuda": "fastapd.ops._batch_topk:cuda_batch_topk",
        "triton": "fastapd.kernels.batch_topk:batch_topk",
        "cpu": "fastapd.ops._batch_topk:cpu_batch_topk",
        "reference": "fastapd.reference.batch_topk:batch_topk",
    },
    "batch_topk_warm": {
        "cuda": "fastapd.ops._batch_topk:cuda_batch_topk_warm",
        "triton": "fastapd.kernels.batch_topk:batch_topk_warm",
        "cpu": "fastapd.ops._batch_topk:cpu_batch_topk_warm",
        "reference": "fastapd.reference.batch_topk:batch_topk_warm",
    },
    "batch_topk_counts": {
        "cuda": "fastapd.ops._batch_topk:cuda_batch_topk_counts",
        "triton": "fastapd.kernels.batch_topk:batch_topk_counts",
        "cpu": "fastapd.ops._batch_topk:cpu_batch_topk_counts",
        "reference": "fastapd.reference.batch_topk:batch_topk_counts",
    },
    "sample_topk": {
        "cuda": "fastapd.ops._batch_topk:cuda_sample_topk",
        "triton": "fastapd.kernels.batch_topk:sample_topk",
        "cpu": "fastapd.ops._batch_topk:cpu_sample_topk",
        "reference": "fastapd.reference.batch_topk:sample_topk",
    },
    "component_svdvals": {
        "cuda": "fastapd.ops._batched_svd_cuda:cuda_component_svdvals",
        "triton": "fastapd.kernels.batched_svd:component_svdvals",
        "cpu": "fastapd.ops._batched_svd:cpu_component_svdvals",
        "reference": "fastapd.reference.batched_svd:component_svdvals",
    },
    "schatten": {
        "cuda": "fastapd.ops._batched_svd_cuda:cuda_schatten",
        "triton": "fastapd.kernels.batched_svd:schatten",
        "cpu": "fastapd.ops._batched_svd:cpu_schatten",
        "reference": "fastapd.reference.batched_svd:schatten",
    },
    "schatten_factored": {
        "cuda": "fastapd.ops._batched_svd_cuda:cuda_schatten_factored",
        "triton": "fastapd.kernels.batched_svd:schatten_factored",
        "cpu": "fastapd.ops._batched_svd:cpu_schatten_factored",
        "reference": "fastapd.reference.batched_svd:schatten_factored",
    },
    "schatten_accumulate": {
        "cuda": "fastapd.ops._batched_svd_cuda:cuda_schatten_accumulate",
        "triton": "fastapd.kernels.batched_svd:schatten_accumulate",
        "cpu": "fastapd.ops._batched_svd:cpu_schatten_accumulate",
        "reference": "fastapd.reference.batched_svd:schatten_accumulate",
    },
    "schatten_factored_masked": {
        "cuda": "fastapd.ops._batched_svd_cuda:cuda_schatten_factored_masked",
        "triton": "fastapd.kernels.batched_svd:schatten_factored_masked",
        "cpu": "fastapd.ops._batched_svd:cpu_schatten_factored_masked",
        "reference": "fastapd.reference.batched_svd:schatten_factored_masked",
    },
    "thin_product": {
        "cpu": "fastapd.ops._thin_product:cpu_thin_product",
        "reference": "fastapd.reference.thin_product:thin_product",
    },
    "unit_norm": {
        "cuda": "fastapd.ops._unit_norm:cuda_unit_norm",
        "triton": "fastapd.kernels.unit_norm:unit_norm",
        "cpu": "fastapd.ops._unit_norm:cpu_unit_norm",
        "reference": "fastapd.reference.unit_norm:unit_norm",
    },
    "remove_along": {
        "cuda": "fastapd.ops._unit_norm:cuda_remove_along",
        "triton": "fastapd.kernels.unit_norm:remove_along",
        "cpu": "fastapd.ops._unit_norm:cpu_remove_along",
        "reference": "fastapd.reference.unit_norm:remove_along",
    },
}

_CPU_ROWS = {op: [b for b in row if b not in ("cuda", "triton")] for op, row in TABLE.items()}
"""What `choose` walks for tensors on the CPU when nothing is forced."""

LIMITS: dict[tuple[str, str], str] = {
    ("attribution_reduce", "cpu"): "fastapd.ops._attribution_reduce:cpu_limits",
    ("attribution_reduce_backward", "cpu"): "fastapd.ops._attribution_reduce:cpu_backward_limits",
    ("component_svdvals", "cuda"): "fastapd.ops._batched_svd_cuda:limits",
    ("schatten", "cuda"): "fastapd.ops._batched_svd_cuda:limits",
    ("schatten_accumulate", "cuda"): "fastapd.ops._batched_svd_cuda:accumulate_limits",
    ("attribution_reduce", "cuda"): "fastapd.ops._attribution_reduce_cuda:limits",
    ("attribution_reduce_backward", "cuda"): "fastapd.ops._attribution_reduce_cuda:backward_limits",
    ("component_svdvals", "triton"): "fastapd.kernels.batched_svd:limits",
    ("schatten", "triton"): "fastapd.kernels.batched_svd:limits",
    ("schatten_accumulate", "triton"): "fastapd.kernels.batched_svd:accumulate_limits",
}
"""Where a backend runs an op at some sizes only: a function of the op's arguments that returns reasons to refuse."""

PREFERRED: dict[tuple[str, str], str] = {
    ("component_forward_selected", "triton"): "fastapd.ops._component_forward_cuda:triton_first",
    ("component_forward_selected_backward", "triton"): "fastapd.ops._component_forward_cuda:triton_first_backward",
    ("component_forward_selected_accumulate", "triton"): "fastapd.ops._component_forward_cuda:triton_first_backward",
    ("attribution_reduce", "triton"): "fastapd.ops._attribution_reduce_cuda:triton_first",
    ("attribution_reduce_backward", "triton"): "fastapd.ops._attribution_reduce_cuda:triton_first_backward",
    ("component_sum_loss", "triton"): "fastapd.kernels.component_sum:preferred",
}
"""Where a backend that can run comes before the others of its row at some sizes: a function of the op's arguments that
returns why, or "". Nothing is timed: rows and preferences follow the floors, bytes and launches, and then what
`make gpu` has measured."""


def _cuda_reasons(tensors: list[Tensor]) -> list[str]:
    native = _native.load("_C_cuda")
    if native.module is None:
        return [native.reason]
    first, wanted = tensors[0], "cuda" in (forced_backends() or ())
    if first.device.type == "cuda" and not _cuda.is_emulated():
        return list(_cuda.device_reasons(first.device.index))
    # As Triton's interpreter: for CPU tensors when it is asked for by name.
    if first.device.type == "cpu" and wanted and _cuda.is_emulated():
        return []
    why = f" ({no_device})" if wanted and (no_device := _cuda.no_device()) else ""
    return [f"the tensors are on {first.device}, not on a CUDA device{why}"]


# what the CPU kernels read as numbers, and whatever is no number to them: indices, counts, masks
_CPU_DTYPES = {torch.float32, torch.float64, torch.int32, torch.int64, torch.bool}


def _cpu_reasons(tensors: list[Tensor]) -> list[str]:
    native = _native.load("_C")
    if native.module is None:
        return [native.reason]
    reasons = []
    for t in tensors:
        if t.is_cpu and t.dtype in _CPU_DTYPES:  # nearly always; the rest costs several times as much
            continue
        if t.device.type != "cpu":
            reasons.append(f"the tensors are on {t.device}, not on the CPU")
            break
        if t.is_floating_point() and t.dtype not in (torch.float32, torch.float64):
            reasons.append(f"the CPU kernels take float32 and float64, not {t.dtype}")
            break
    return reasons


def _triton_reasons(tensors: list[Tensor]) -> list[str]:
    if missing := _triton.missing():
        return [missing]
    first, wanted = tensors[0], "triton" in (forced_backends() or ())
    if first.device.type == "cuda":
        reasons = list(_triton.device_reasons(first.device.index))
    # Triton's interpreter serves tests: it runs on CPU tensors when Triton is asked for by name, never by itself.
    elif first.device.type == "cpu" and wanted and _env.triton_interprets():
        reasons = []
    else:
        why = f" ({no_cuda})" if wanted and (no_cuda := _triton.no_cuda()) else ""
        reasons = [f"the tensors are on {first.device}, not on a CUDA device{why}"]
    for t in tensors:
        if t.is_floating_point() and t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            reasons.append(f"the Triton kernels take float32, float16 and bfloat16, not {t.dtype}")
            break
    return reasons


_REASONS: dict[str, Callable[[list[Tensor]], list[str]]] = {
    "cuda": _cuda_reasons,
    "triton": _triton_reasons,
    "cpu": _cpu_reasons,
    "reference": lambda tensors: [],
}


@functools.cache
def _load(path: str) -> Callable[..., Any]:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _reasons(op: str, backend: str, args: tuple[Any, ...], tensors: list[Tensor]) -> list[str]:
    reasons = _REASONS[backend](tensors)
    if not reasons and (op, backend) in LIMITS:
        reasons = _load(LIMITS[op, backend])(*args)
    return reasons


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found.extend(t for t in a if isinstance(t, Tensor))
    return found


def explain(op: str, *args: Any) -> dict[str, list[str]]:
    """For each backend, fastest first, why it would refuse `op` on these arguments; an empty list means it would run.

    A backend without an implementation says so. `choose` takes the first backend with an empty list.
    """
    if op not in TABLE:
        raise ValueError(f"explain: op must be one of {', '.join(TABLE)}, got {op!r}")
    tensors = _tensors(args)
    missing = ["has no implementation of this op"]
    return {b: _reasons(op, b, args, tensors) if b in TABLE[op] else missing for b in BACKENDS}


def _walk(op: str, args: tuple[Any, ...], tensors: list[Tensor]) -> tuple[list[str], str]:
    """The backends of an op in the order in which they are tried for these arguments, and why one came to the front."""
    row = list(TABLE[op])
    for name, backend in PREFERRED:
        if name == op and not _reasons(op, backend, args, tensors) and (why := _load(PREFERRED[op, backend])(*args)):
            return [backend, *(b for b in row if b != backend)], why
    return row, ""


def order(op: str, *args: Any) -> tuple[tuple[str, ...], str]:
    """The backends in the order in which `choose` tries them on these arguments when none is forced, and, where the
    size has brought one to the front of the table's row, why."""
    names, why = _walk(op, args, _tensors(args))
    return tuple(names), why


_forced: tuple[str, ...] | None = None
_environment_read = False


class use_backend:
    """Restricts every op to the named backends, in that order, until it is left or replaced.

    Works as a statement, `fastapd.use_backend("cpu", "reference")`, and as a context manager that restores what was
    set before. `use_backend("auto")` lifts the restriction. The setting is global to the process, as autograd runs
    backward passes on threads of its own.

    Args:
        *names: One or more of "cuda", "triton", "cpu", "reference"; or "auto" alone.

    Raises:
        ValueError: If a name is unknown. The ops themselves raise NotImplementedError when every named backend refuses.
    """

    def __init__(self, *names: str) -> None:
        global _forced
        unknown = [n for n in names if n not in BACKENDS]
        if not names or (unknown and names != ("auto",)):
            raise ValueError(f"use_backend: names must be 'auto' or from {', '.join(BACKENDS)}, got {names!r}")
        self._before = forced_backends()
        _forced = None if names == ("auto",) else names

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self._before


def forced_backends() -> tuple[str, ...] | None:
    """The backends that ops are restricted to, or None."""
    global _forced, _environment_read
    if not _environment_read:
        _environment_read = True
        _forced = _env.backend()
    return _forced


def choose(op: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that runs `op` on these arguments: the first backend with no reason to refuse.

    Raises:
        NotImplementedError: If every backend that may run refuses; the message lists each one's reasons.
    """
    row = TABLE[op]
    forced = forced_backends()
    tensors = [a for a in args if isinstance(a, Tensor)]
    if len(tensors) < len(args):  # lists of tensors, or numbers
        tensors = _tensors(args)
    # a step of a small model on the CPU would feel the reasons of backends that never take its tensors
    wanted = forced or (_CPU_ROWS[op] if tensors and tensors[0].is_cpu else _walk(op, args, tensors)[0])
    for backend in wanted:
        if backend in row and not _reasons(op, backend, args, tensors):
            return _load(row[backend])
    why_not = explain(op, *args)
    reasons = "; ".join(f"{b}: {', '.join(why_not[b]) or 'not among the forced backends'}" for b in BACKENDS)
    only = f" (forced to {', '.join(forced)})" if forced else ""
    raise NotImplementedError(f"{op}: no backend can run on these inputs{only}: {reasons}")
