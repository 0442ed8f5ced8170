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

from fastapd import backends

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
    files = [str(path) for path in sorted(HERE.glob("check_emulated*.py"))]
    command = ["-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", *files, "-k", what]
    env = emulated.preloaded(sanitizer) | {"FASTAPD_EMULATED_CUDA": str(module)}
    return subprocess.run(
        [sys.executable, "-P", *command], cwd=emulated.ROOT, env=env, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_the_kernels(build, sanitizer):
    routes = "svd_of_lengths or large_tiles and float32"
    if sanitizer == "address":
        routes = "any_size or reads_again or svd_of_lengths or by_way and (hardly or beyond and float32)"
    routes = f"{routes} or every_route and float32 and few or small_ranks_in_a_block and float32"
    done = check(build.module(sanitizer), sanitizer, f"(match and (few or tiles) or {routes}) and not order")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = re.search(r"^emulated (.*)$", done.stdout, re.MULTILINE)
    assert found is not None
    print(f"\nemulated under the {sanitizer} sanitizer: {found[1]}")


# file, what is right, what is wrong, the op or the tests that show it, its kernel, what the sanitizer says
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
        "room-of-the-list": (
            "topk_many.cu",
            "if (in && place < listed) {",
            "if (in && place <= listed) {",
            "misleading and many and too_many and float32",
            "narrow_kernel<float>",
            "use-after-poison",
        ),
        "offsets-of-components": (
            "topk.h",
            "c <= n_components; c += size)",
            "c <= n_components + 1; c += size)",
            "batch_topk",
            "few_kernel<float>",
            "heap-buffer-overflow",
        ),
        "columns-of-factors": (
            "batched_svd.cu",
            "x[q] = i < d ?",
            "x[q] = i <= d ?",
            "schatten",
            "apply_kernel<float>",
            "heap-buffer-overflow",
        ),
        "room-of-a-core": (
            "svd_core.cu",
            "3 * M * kStride<M> + 3 * M;",
            "3 * M * kStride<M> + 2 * M;",
            "ranks_in_a_warp and schatten",
            "core_in_warp_kernel",
            "use-after-poison",
        ),
        "tail-of-samples": (
            "schatten_factored.cu",
            "component < n_components ?",
            "component <= n_components ?",
            "schatten_factored_masked",
            "powers_kernel<float>",
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
        "parts-before-they-are-counted": (
            "batch_topk.cu",
            "    if (rank == 0) starts[n_parts] = n;\n    __syncthreads();\n",
            "    if (rank == 0) starts[n_parts] = n;\n",
            "topk_takes and few-float32-NaN",
            "few_kernel<float>",
            "data race",
        ),
        "pairs-before-they-are-chosen": (
            "topk.h",
            "i += size) words[i] = 0;\n  __syncthreads();\n",
            "i += size) words[i] = 0;\n",
            "batch_topk",
            "few_kernel<float>",
            "data race",
        ),
        "pivots-of-other-lanes": (
            "svd_core.cu",
            "[] { __syncwarp(); }",
            "[] {}",
            "schatten",
            "core_in_warp_kernel<4>",
            "data race",
        ),
        "pairs-of-two-rounds": (
            "svd_core.cu",
            "      if (lane == 0) large[warp] = any;\n      __syncthreads();\n",
            "      if (lane == 0) large[warp] = any;\n",
            "small_ranks_in_a_block and float32",
            "core_in_block_kernel",
            "data race",
        ),
        "matrix-of-the-step-before": (
            "batched_svd.cu",
            "    __syncthreads();  // all have read what was here\n",
            "",
            "ranks_in_a_warp and schatten and 9-20-17",
            "apply_kernel<float>",
            "data race",
        ),
    },
}


IN_EVERY_RUN = (  # each in one file: a header would compile them all again
    "tail-of-residual", "columns-of-factors", "tile-that-is-still-read", "parts-before-they-are-counted",
)  # fmt: skip
bugs = [
    pytest.param(sanitizer, bug, marks=() if bug in IN_EVERY_RUN else pytest.mark.slow)
    for sanitizer, found in PLANTED.items()
    for bug in found
]


@pytest.mark.parametrize("sanitizer, bug", bugs)
def test_sanitizers_find_a_planted_error(build, sanitizer, bug):
    file, right, wrong, op, kernel, message = PLANTED[sanitizer][bug]
    module = build.module(sanitizer, {file: (right, wrong)})
    done = check(module, sanitizer, f"match and {op}- and float32 and tiles" if op in backends.TABLE else op)
    assert done.returncode != 0, done.stdout
    said = done.stdout + done.stderr
    assert message in said, said[-3000:]
    assert kernel in said
