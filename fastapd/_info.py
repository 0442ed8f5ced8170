"""What `fastapd info` prints: versions, devices, native modules, and who would run each op, with reasons."""

from __future__ import annotations

from typing import Any

import torch

import fastapd
from fastapd import _native, _triton, backends
from fastapd._precision import precision
from fastapd._rundir import environment

CHOICE = f"chosen per call: the first of {', '.join(backends.BACKENDS)} that can run, unless a reason is given"


def _examples(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Small float32 arguments for every row of the backend table."""
    x, A, B = (torch.zeros(1, *s, device=device) for s in ((4, 3), (2, 3, 2), (2, 2, 5)))
    g, W, mask, counts = (torch.zeros(1, *s, device=device) for s in ((4, 5, 5), (3, 5), (4, 2), (2,)))
    u, grad_y = torch.zeros(1, 3, 2, device=device), torch.zeros(1, 4, 5, device=device)
    tangents = [x], [A], [B], [grad_y], [torch.zeros(1, 5, 3, device=device)], [0], [1, 0], [0], [0, 1], [5, 3]
    selection = tuple(torch.zeros(1, n, dtype=torch.int32, device=device) for n in (3, 3, 3, 5, 3))
    return {
        "component_sum": (A, B),
        "component_sum_loss": (A, B, W),
        "component_forward": (x, A, B, mask),
        "component_forward_selected": (x, A, B, *selection),
        "component_forward_selected_backward": (grad_y, x, A, B, u, *selection, True, True, True),
        "component_forward_selected_accumulate": (grad_y, x, A, B, u, *selection, True, A.mT.contiguous(), B),
        "attribution_reduce": ([x], [g], [A], [B]),
        "attribution_reduce_backward": (mask, [x], [g], [A], [B]),
        "attribution_tangent": tangents,
        "attribution_tangent_backward": (mask, *tangents),
        "batch_topk": (mask, 3),
        "batch_topk_warm": (mask, counts[:, 0], 3),
        "batch_topk_counts": (mask, counts[:, 0].long(), 3),
        "sample_topk": (mask, 1),
        "component_svdvals": (A, B),
        "schatten": (A, B, counts.long(), 1.0, 1e-16, 4, True),
        "schatten_factored": (A, B, counts.long(), 1.0, 1e-16, 4, True),
        "schatten_accumulate": (A, B, counts.long(), 1.0, 1e-16, 4, False, 1.0, A.mT.contiguous(), B),
        "schatten_factored_masked": (A, B, mask, 1.0, 1e-16, True),
        "thin_product": (x, W, grad_y, 1.0, False),
        "unit_norm": (x,),
        "remove_along": (x, torch.zeros_like(x)),
    }


def lines() -> list[str]:
    """The report, line by line."""
    env, info = environment(), _native.build_info()
    out = [
        f"fastapd {fastapd.__version__}",
        f"  python {env['python']}, torch {env['torch']}, numpy {env['numpy']}, triton {env['triton'] or 'absent'}",
        f"  {env['cpu']}, {env['torch_threads']} threads, OMP_WAIT_POLICY {env['omp_wait_policy'] or 'unset'}",
        f"  CUDA devices: {', '.join(env['cuda_devices']) or 'none that torch can use'}",
        "",
        "native modules",
    ]
    cpu = _native.load("_C")
    if cpu.module is None:
        out.append(f"  _C       absent; ops run on the reference backend. {cpu.reason}")
    else:
        levels = ", ".join(cpu.module.cpu_levels())
        threads = "OpenMP" if cpu.module.openmp else "one thread"
        out.append(f"  _C       {info.get('compiler', '')}, {threads}, runs at {cpu.module.cpu_level()} of {levels}")
    cuda = _native.load("_C_cuda")
    if cuda.module is None:
        out.append(f"  _C_cuda  absent. {cuda.reason}")
    else:
        archs = ", ".join(f"sm_{a}" for a in info.get("cuda_archs", []))
        found = cuda.module.unavailable_reason() or f"{cuda.module.device_count()} devices"
        n_ops = sum("cuda" in row for row in backends.TABLE.values())
        kernels = f"kernels for {n_ops} of {len(backends.TABLE)} operations"
        out.append(f"  _C_cuda  nvcc {info.get('cuda')}, {archs} and PTX of the newest, {kernels}; {found}")
    out.append(f"  triton   {_triton_line(env['triton'])}")
    forced = backends.forced_backends()
    out += ["", f"backends  {'forced to ' + ', '.join(forced) if forced else CHOICE}"]
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    for device in devices:
        out.append(f"  float32 tensors on {device}")
        for op, args in _examples(device).items():
            out += _explained(op, args, forced)
    return out


def _triton_line(version: str | None) -> str:
    """Whether Triton's kernels run here, and how they multiply."""
    if version is None:
        return f"absent. {_triton.missing()}"
    here = _triton.no_cuda()
    for index in range(0 if here else torch.cuda.device_count()):
        reasons = _triton.device_reasons(index)
        here += f"{'; ' if here else ''}cuda:{index} {', '.join(reasons) or 'runs kernels'}"
    n_ops = sum("triton" in row for row in backends.TABLE.values())
    return f"{version}, kernels for {n_ops} of {len(backends.TABLE)} operations, products in {precision()}; {here}"


def _explained(op: str, args: tuple[Any, ...], forced: tuple[str, ...] | None) -> list[str]:
    reasons = backends.explain(op, *args)
    order, first = (forced, "") if forced else backends.order(op, *args)
    runs = next((b for b in order if not reasons[b]), "nothing")
    why_not = [f"{b}: {'; '.join(reasons[b])}" for b in backends.BACKENDS if reasons[b] and b in backends.TABLE[op]]
    absent = [b for b in backends.BACKENDS if b not in backends.TABLE[op]]
    if absent:
        why_not.append(f"{', '.join(absent)}: no implementation")
    said = [f"first because {first}"] if first else []
    said += [f"not {reason}" for reason in why_not]
    return [f"    {op:38s} {runs:10s} {'; '.join(said)}".rstrip()]
