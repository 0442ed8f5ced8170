"""The CUDA kernels under the address, undefined-behaviour and thread sanitizers, and proofs that each lane goes red.

`check_emulated.py` runs again, at a few sizes, on kernels that are compiled for it: then on kernels with one mistake in
them. Torch's own memory is the sanitizers', too, so that every tensor ends where it ends.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

_spec = importlib.util.spec_from_file_location("emulated", HERE / "emulated.py")
assert _spec is not None
assert _spec.loader is not None
emulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulated)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return emulated.Build(tmp_path_factory.mktemp("sanitized"))


def check(module: Path, sanitizer: str, what: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", str(HERE / "check_emulated.py"), "-k", what]
    env = emulated.preloaded(sanitizer) | {"FASTAPD_EMULATED_CUDA": str(module)}
    return subprocess.run(
        [sys.executable, "-P", *command], cwd=emulated.ROOT, env=env, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_the_kernels(build, sanitizer):
    sizes = "few or tiles and not large or large and float32"
    if sanitizer == "address":
        sizes = "few or over or tiles or any_size or by_way and (hardly or beyond and float32)"
    done = check(build.module(sanitizer), sanitizer, f"({sizes}) and not order")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = re.search(r"^emulated (.*)$", done.stdout, re.MULTILINE)
    assert found is not None
    print(f"\nemulated under the {sanitizer} sanitizer: {found[1]}")


# file, what is right, what is wrong, the op that shows it, its kernel, what the sanitizer says
PLANTED = {
    "address": {
        "tail-of-residual": (
            "component_sum.cu",
            "first + kTile : n;",
            "first + kTile : n + 1;",
            "component_sum_loss",
            "residual_kernel<float>",
            "heap-buffer-overflow",
        ),
        "sums-of-warps": (
            "reduce.h",
            "for (int w = 0; w < kWarps;",
            "for (int w = 0; w <= kWarps;",
            "component_sum_loss",
            "residual_kernel<float>",
            "use-after-poison",
        ),
        "tail-of-rows": (
            "unit_norm.cu",
            "i < d; i += kWarp) g[i] =",
            "i <= d; i += kWarp) g[i] =",
            "remove_along",
            "remove_along_kernel<float>",
            "heap-buffer-overflow",
        ),
        "tail-of-a-factor": (
            "component_forward.cu",
            "first + i < n && o + at < d ?",
            "first + i < n && o + at <= d ?",
            "component_forward_selected",
            "combine_kernel<float, float>",
            "heap-buffer-overflow",
        ),
        "output-that-is-not-there": (
            "attribution_reduce.cu",
            "if (first_o + j >= n_outputs || at >= d_out)",
            "if (at >= d_out)",
            "attribution_reduce",
            "reduce_kernel<float, 32, 32>",
            "heap-buffer-overflow",
        ),
        "pair-that-is-not-there": (
            "component_forward.cu",
            "tile.first + p < tile.end ? tile.first + p : tile.end - 1;",
            "tile.first + p;",
            "component_forward_selected",
            "project_kernel<float, 4, 4>",
            "heap-buffer-overflow",
        ),
    },
    "thread": {
        "missing-barrier": (
            "reduce.h",
            "  __syncthreads();\n",
            "",
            "component_sum_loss",
            "residual_kernel<float>",
            "data race",
        ),
        "one-partial-sum-of-all-blocks": (
            "component_sum.cu",
            "partials[blockIdx.x] = sum;",
            "partials[0] = sum;",
            "component_sum_loss",
            "residual_kernel<float>",
            "data race",
        ),
        "tile-that-is-still-read": (
            "attribution_reduce.cu",
            "        __syncthreads();  // nobody reads them any more\n",
            "",
            "attribution_reduce",
            "reduce_kernel<float, 32, 32>",
            "data race",
        ),
        "tile-that-is-not-there-yet": (
            "attribution_reduce.cu",
            "        __syncthreads();  // the tiles are there\n",
            "",
            "attribution_reduce",
            "reduce_kernel<float, 32, 32>",
            "data race",
        ),
        "sample-of-another-warp": (
            "component_forward.cu",
            "y[row * d_y + first + column] =",
            "y[row / 2 * d_y + first + column] =",
            "component_forward_selected",
            "combine_kernel<float, float>",
            "data race",
        ),
        "component-of-another-warp": (
            "component_forward.cu",
            "grad + (owner * n.rank + first_rank + r) * d",
            "grad + (owner / 2 * n.rank + first_rank + r) * d",
            "component_forward_selected_accumulate",
            "outer_kernel<float, 4>",
            "data race",
        ),
        "row-of-another-warp": (
            "unit_norm.cu",
            "T* g = grad + row * d;",
            "T* g = grad + row / 2 * d;",
            "remove_along",
            "remove_along_kernel<float>",
            "data race",
        ),
    },
}


IN_EVERY_RUN = ("tail-of-residual", "tile-that-is-still-read")  # of one file: a header would compile them all again
bugs = [
    pytest.param(sanitizer, bug, marks=() if bug in IN_EVERY_RUN else pytest.mark.slow)
    for sanitizer, found in PLANTED.items()
    for bug in found
]


@pytest.mark.parametrize("sanitizer, bug", bugs)
def test_sanitizers_find_a_planted_error(build, sanitizer, bug):
    file, right, wrong, op, kernel, message = PLANTED[sanitizer][bug]
    module = build.module(sanitizer, {file: (right, wrong)})
    done = check(module, sanitizer, f"match and {op}- and float32 and tiles")
    assert done.returncode != 0, done.stdout
    said = done.stdout + done.stderr
    assert message in said, said[-3000:]
    assert kernel in said
