"""Reads what the compiled CUDA kernels need of a card from the module that nvcc made; no card is needed.

    python tests/cuda/resources.py [--write]

For every kernel, dtype and architecture: registers, stack (which is where spilled registers go) and shared memory; and
the PTX is searched for float atomics. The figures are kept in `resources.json` beside this file, which `--write`
replaces; a figure that changes is an error until it is. The limits hold for every nvcc, the figures for one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fastapd import _native

RESOURCES = Path(__file__).with_name("resources.json")
STATIC_SHARED_LIMIT = 48 << 10
REGISTER_LIMIT = 255
FIGURES = ("registers", "stack", "shared")
FLOAT_ATOMICS = re.compile(r"\b(?:atom|red)\.[\w.:]*\.(?:f16|f32|f64|bf16)\w*")
FAST = re.compile(r"\b(?:div|sqrt)\.(?:approx|full)")
"""Divisions and roots of --use_fast_math, which lose digits; CUDA's own functions, such as powf, are made of others."""


def cuobjdump() -> Path | None:
    """NVIDIA's tool, which comes with Triton."""
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def _output(*command: str | Path, given: str | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, input=given).stdout


def _name(demangled: str) -> str:
    """`unit_norm_kernel<float>` of a signature."""
    name = demangled.replace("(anonymous namespace)::", "").replace("fastapd::cuda::", "")
    return re.sub(r"\(.*$", "", name).removeprefix("void ").strip()


def figures(module: ModuleType) -> dict[str, dict[str, int]]:
    """By "architecture | kernel"."""
    tool = cuobjdump()
    assert tool is not None
    assert module.__file__ is not None
    dumped = _output("c++filt", given=_output(tool, "-res-usage", module.__file__))
    out: dict[str, dict[str, int]] = {}
    arch = kernel = ""
    for line in dumped.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r" Function (.*):$", line):
            kernel = _name(found[1])
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            if not kernel:
                continue
            key = f"{arch} | {kernel}"
            assert key not in out, f"two kernels called {key}"
            out[key] = {"registers": registers, "stack": stack + local, "shared": shared}
            kernel = ""
    return out


def ptx(module: ModuleType) -> str:
    tool = cuobjdump()
    assert tool is not None
    assert module.__file__ is not None
    return _output(tool, "-ptx", module.__file__)


def wrong(found: dict[str, dict[str, int]], text: str) -> list[str]:
    """What a card would not do well, or not to the bit."""
    out = []
    for name, row in found.items():
        if row["stack"]:
            out.append(f"{name}: {row['stack']} bytes of stack: spilled registers, or an array that is indexed")
        if row["registers"] >= REGISTER_LIMIT:
            out.append(f"{name}: {row['registers']} registers, all that a thread may have")
        if row["shared"] > STATIC_SHARED_LIMIT:
            out.append(f"{name}: {row['shared']} bytes of shared memory")
    kernel = ""
    for line in text.splitlines():
        if found_entry := re.search(r"\.entry (\w+)", line):
            kernel = found_entry[1]
        if atomic := FLOAT_ATOMICS.search(line):
            out.append(f"{kernel}: {atomic[0]}: its sums depend on the order of threads")
        if fast := FAST.search(line):
            out.append(f"{kernel}: {fast[0]}: compiled with fast math")
    return out


def changed(found: dict[str, dict[str, int]], nvcc: str) -> list[str]:
    """Where figures differ from those that are kept, for the version of nvcc that these are of."""
    kept = json.loads(RESOURCES.read_text())
    if kept["nvcc"] != nvcc:
        return []
    before: dict[str, Any] = kept["figures"]
    out = [f"{name}: is no more" for name in before.keys() - found.keys()]
    for name, row in found.items():
        if name not in before:
            out.append(f"{name}: not among the kept figures")
        elif row != before[name]:
            out.append(f"{name}: {before[name]} -> {row}")
    return sorted(out)


def write(found: dict[str, dict[str, int]], nvcc: str) -> None:
    lines = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found.items()))
    RESOURCES.write_text(f'{{"nvcc": {json.dumps(nvcc)}, "figures": {{\n' + ",\n".join(lines) + "\n}}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="what the compiled CUDA kernels need of a card")
    parser.add_argument("--write", action="store_true", help="replace the kept figures")
    given = parser.parse_args()
    native = _native.load("_C_cuda")
    if native.module is None:
        print(native.reason)
        return 1
    found, nvcc = figures(native.module), _native.build_info()["cuda"]
    if given.write:
        write(found, nvcc)
    for line in (*wrong(found, ptx(native.module)), *changed(found, nvcc)):
        print(line)
    print(f"{len(found)} kernels compiled by nvcc {nvcc}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
