"""Compiles the launches that the library would make on a card that is not there, and reads what the binaries need.

    python tests/triton/compiled.py --sm 80 90 100 [--full] [--write]

The launchers of `kernels/` run on tensors that have a shape and no memory, so whatever they decide here they decide
without looking at numbers. In place of a launch each kernel is compiled for the card, and its registers, stack and
shared memory are read from the binary: no spills, within the card's limits, no atomics on floats, no float64 where none
is meant, tensor cores where a product asks for them. The figures are kept in `resources.json` beside this file, which
`--write` replaces; a figure that changes is an error until it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
_FRESH = tempfile.TemporaryDirectory(prefix="fastapd-compiled-")
os.environ["TRITON_CACHE_DIR"] = _FRESH.name

import torch
import triton
from fastapd.kernels import _launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastapd
from fastapd import _cases, backends, testing

RESOURCES = Path(__file__).with_name("resources.json")
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that a block of threads may have."""
REGISTERS = 65536
FLOAT64 = ("_svd", "_schatten", "_norms")
"""Parts of the names of kernels that compute in float64."""
ATOMIC = ("_topk",)
"""Parts of the names of kernels that count with integer atomics."""
TENSOR_CORES = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", re.MULTILINE)

S1 = testing.Case("S1", 1, 2048, 130, 50, 1000, 50, n_outputs=100, k=1.28)
S2 = testing.Case("S2", 1, 4096, 2000, 4, 512, 512, n_outputs=512, k=16.0)
S3 = testing.Case("S3", 1, 10_000, 100_000, 1, 1024, 1024, n_outputs=1000, k=32.0)
TMS = testing.Case("TMS 40-10", 3, 2048, 50, 10, 40, 10, n_outputs=40, k=1.0, tied=True)
ODD = testing.CASES["odd"]
ALL = (S1, S2, S3, TMS, ODD)
QUICK = [((S2, ODD), (torch.float32,), "tf32x3"), ((ODD,), (torch.bfloat16,), "tf32x3")]
FULL = [
    (ALL, (torch.float32, torch.bfloat16), "tf32x3"),
    ((ODD,), (torch.float16,), "tf32x3"),
    ((ODD,), (torch.float32,), "ieee"),
    ((ODD,), (torch.float32,), "tf32"),
]
"""Cases, dtypes and precisions."""


class Shapes(_cases.Source):
    """Arguments without numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, 0, "meta")

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def uniform(self, *shape: int) -> Tensor:
        return self.normal(*shape)

    def scores(self, case: testing.Case) -> Tensor:
        return self.normal(case.n_instances, case.batch, case.n_components)


def calls(op: str, case: testing.Case, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of an op of the table as its backends take them."""
    source = Shapes(dtype)
    forward = op.removesuffix("_backward")
    if forward == "thin_product":
        case = replace(case, rank=max(case.rank, 1))
    args = testing._OPS[forward].inputs(case, source)
    if forward.startswith("component_forward_selected"):
        if op == "component_forward_selected_accumulate":
            grad_y, x, A, B, u, selection, grad_At, grad_B = args
            return grad_y, x, A, B, u, *selection, True, grad_At, grad_B
        x, A, B, selection = args
        if op == forward:
            return x, A, B, *selection
        grad_y, u = source.normal(*x.shape[:2], B.shape[3]), source.normal(x.shape[0], case.n_pairs, case.rank)
        return grad_y, x, A, B, u, *selection, True, True, True
    if op == "batch_topk_counts":
        return *args, case.n_pairs
    if op in ("schatten", "schatten_factored"):
        A, B, counts, p, eps, *batch = args
        return A, B, counts, p, eps, batch[0] if batch and batch[0] is not None else -1, True
    if op == "schatten_factored_masked":
        return *args, True
    if op != forward:  # attributions
        return source.scores(case), *args
    return args


class _Card:
    """A driver that knows what to compile for and nothing else."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def _cuobjdump(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        done = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout + done.stderr)
    assert found is not None, done.stdout + done.stderr
    return dict(zip(("registers", "stack", "static_shared", "local"), map(int, found.groups()), strict=True))


def _read(kernel: Any, name: str) -> dict[str, Any]:
    """What a compiled kernel needs."""
    ptx = kernel.asm["ptx"]
    return {
        "kernel": name,
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        **_cuobjdump(kernel.asm["cubin"]),
        "tensor_cores": len(TENSOR_CORES.findall(ptx)),
        "trap": "trap;" in ptx,  # what is left of a kernel that asks for more than a card has
        "atomics": len(re.findall(r"\b(?:atom|red)\.[\w.:]*global", ptx)),
        "float_atomics": len(re.findall(r"\b(?:atom|red)\.[\w.:]*\.(?:f16|f32|f64|bf16)", ptx)),
        "float64": len(re.findall(r"\b(?:add|mul|fma|div|sqrt)\.(?:rn\.)?f64", ptx)),
        "products": "tt.dot" in kernel.asm["ttir"],
    }


@contextlib.contextmanager
def compile_only(sm: int) -> Iterator[list[dict[str, Any]]]:
    """For the length of a with block, launches compile for a card of that capability; yields what they need, each
    binary once."""
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    run, assumed = JITFunction.run, _launch.ASSUMED_CAPABILITY

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found.append(_read(kernel, self.__name__))
        return kernel

    JITFunction.run = compile_it
    driver.set_active(_Card(sm))
    _launch.ASSUMED_CAPABILITY = divmod(sm, 10)
    try:
        yield found
    finally:
        JITFunction.run, _launch.ASSUMED_CAPABILITY = run, assumed
        driver._active = None


def wrong(row: dict[str, Any], sm: int, precision: str) -> list[str]:
    """What a card would not take, or not do well."""
    name, out = row["kernel"], []
    if row["stack"] or row["local"]:
        out.append(f"spills {row['stack'] + row['local']} bytes")
    if row["shared"] > SHARED_LIMIT[sm]:
        out.append(f"{row['shared']} bytes of shared memory, of {SHARED_LIMIT[sm]}")
    if row["registers"] * row["warps"] * 32 > REGISTERS:
        out.append(f"{row['registers']} registers in each of {row['warps']} warps' threads")
    if row["float_atomics"] or (row["atomics"] and not any(part in name for part in ATOMIC)):
        out.append(f"{row['atomics']} atomics")
    if row["float64"] and not any(part in name for part in FLOAT64):
        out.append(f"{row['float64']} operations in float64")
    if row["trap"]:
        out.append("compiled to a trap")
    if row["products"] and precision != "ieee" and not row["tensor_cores"] and not row["float64"]:
        out.append("no tensor cores")
    return out


def rows(sm: int, cases: tuple[testing.Case, ...], dtypes: tuple[torch.dtype, ...], precision: str) -> list[dict]:
    """Every op of the table that has a Triton kernel, compiled for one card."""
    out = []
    for op, row in backends.TABLE.items():
        for case in cases if "triton" in row else ():
            for dtype in dtypes:
                args = calls(op, case, dtype)
                if (op, "triton") in backends.LIMITS and backends._load(backends.LIMITS[op, "triton"])(*args):
                    continue
                with compile_only(sm) as found, fastapd.use_precision(precision), torch.no_grad():
                    backends._load(row["triton"])(*args)
                where = {
                    "op": op,
                    "case": case.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "sm": sm,
                    "precision": precision,
                }
                out += [{**where, **r, "wrong": wrong(r, sm, precision)} for r in found]
    return out


KEY = ("op", "case", "dtype", "sm", "precision")
FIGURES = ("warps", "registers", "stack", "shared", "tensor_cores", "atomics")


def _key(row: dict[str, Any]) -> str:
    return " | ".join(str(row[k]) for k in KEY)


def _keyed(found: list[dict]) -> dict[str, dict[str, list[int]]]:
    """FIGURES by what is called and by kernel; of several binaries of one kernel each has its place."""
    out: dict[str, dict[str, list[int]]] = {}
    for row in found:
        kernels, kernel, n = out.setdefault(_key(row), {}), row["kernel"], 1
        while (name := kernel if n == 1 else f"{kernel} #{n}") in kernels:
            n += 1
        kernels[name] = [row[f] for f in FIGURES]
    return out


def compared(found: list[dict]) -> list[str]:
    """Where figures differ from those that are kept, for the version of Triton that these are of."""
    kept = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {"triton": triton.__version__, "figures": {}}
    if kept["triton"] != triton.__version__:
        return []
    out = []
    for called, kernels in _keyed(found).items():
        before = kept["figures"].get(called, {})
        out += [f"{called} | {kernel}: kept, but not compiled" for kernel in before if kernel not in kernels]
        for kernel, figures in kernels.items():
            if kernel not in before:
                out.append(f"{called} | {kernel}: not among the kept figures")
            elif before[kernel] != figures:
                pairs = zip(FIGURES, before[kernel], figures, strict=True)
                out.append(f"{called} | {kernel}: {', '.join(f'{n} {a} -> {b}' for n, a, b in pairs if a != b)}")
    return out


def write(found: list[dict]) -> None:
    lines = (f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in sorted(_keyed(found).items()))
    head = f'{{"triton": "{triton.__version__}", "each kernel": {json.dumps(FIGURES)}, "figures": {{\n'
    RESOURCES.write_text(head + ",\n".join(lines) + "\n}}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="compile every Triton kernel for cards that are not there")
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--full", action="store_true", help="all cases, dtypes and precisions")
    parser.add_argument("--write", action="store_true", help="replace the kept figures")
    parser.add_argument("--out", type=Path, help="where to leave the rows as JSON, for whoever started this")
    given = parser.parse_args()
    found: list[dict] = []
    for sm in given.sm:
        for cases, dtypes, precision in FULL if given.full else QUICK:
            found += rows(sm, cases, dtypes, precision)
    bad = [f"{_key(r)} | {r['kernel']}: {'; '.join(r['wrong'])}" for r in found if r["wrong"]]
    if given.write:
        write(found)
    changed = compared(found)
    kernels, dtypes = {r["kernel"] for r in found}, {r["dtype"] for r in found}
    print(
        f"compiled {len(found)} binaries: {len(kernels)} kernels x {len(dtypes)} dtypes x {len(given.sm)} "
        f"architectures ({', '.join(f'sm_{sm}' for sm in given.sm)}), Triton {triton.__version__}"
    )
    if given.out:
        given.out.write_text(json.dumps(found))
    for line in (*(f"wrong: {b}" for b in bad), *(f"changed: {c}" for c in changed)):
        print(line)
    return 1 if bad or changed else 0


if __name__ == "__main__":
    sys.exit(main())
