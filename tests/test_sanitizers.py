"""The CPU kernels under the address, undefined-behaviour and thread sanitizers, and proofs that each lane goes red.

The driver (native_driver.py) calls every bound function on arrays of exactly the right size. Leaks are not looked for:
Python itself leaks at exit.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

_spec = importlib.util.spec_from_file_location("native_build", Path(__file__).with_name("native_build.py"))
assert _spec is not None
assert _spec.loader is not None
native = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native)

MEMORY = {"FASTAPD_SANITIZE": "address,undefined", "FASTAPD_THREADS": "openmp"}
RACES = {"FASTAPD_SANITIZE": "thread", "FASTAPD_THREADS": "std"}


def library(name: str) -> str:
    """The path of one of g++'s libraries; skips where it is not installed."""
    path = native.run("g++", f"-print-file-name={name}").stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ has no {name} on this machine")
    return path


def drive_memory(module: Path, *arguments: str) -> CompletedProcess[str]:
    # fresh memory is filled with NaN, so that a value that was never written shows
    asan = "detect_leaks=0:allocator_may_return_null=1:max_malloc_fill_size=1073741824:malloc_fill_byte=255"
    preload = f"{library('libasan.so')} {library('libstdc++.so')}"
    settings = {"LD_PRELOAD": preload, "ASAN_OPTIONS": asan, "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}
    return native.drive(module, "check", *arguments, settings=settings)


def drive_races(module: Path) -> CompletedProcess[str]:
    settings = {"LD_PRELOAD": library("libtsan.so"), "TSAN_OPTIONS": "exitcode=66:history_size=4"}
    done = native.drive(module, "parallel", "4", settings=settings)
    if "FATAL: ThreadSanitizer" in done.stderr:  # such as an address-space layout that it does not know
        pytest.skip(done.stderr.strip().splitlines()[0])
    return done


@pytest.fixture(scope="module")
def memory_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native.require_build_tools()
    library("libasan.so")
    return native.copy_sources(tmp_path_factory.mktemp("memory") / "tree")


@pytest.fixture(scope="module")
def race_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native.require_build_tools()
    library("libtsan.so")
    return native.copy_sources(tmp_path_factory.mktemp("races") / "tree")


@pytest.fixture(scope="module")
def sound(memory_tree: Path) -> Path:
    """Built before anything is planted in the tree."""
    module = native.build(memory_tree, MEMORY)
    return module.rename(memory_tree / f"sound-{module.name}")


@pytest.mark.slow
def test_sanitizers_find_no_memory_error(sound: Path) -> None:
    done = drive_memory(sound)
    assert done.returncode == 0, done.stderr
    assert "calls at the levels baseline" in done.stdout


# file, what is right, what is wrong, the function that shows it, what the sanitizer says
PLANTED = {
    "tail-of-sum-loss": (
        "component_sum.cpp",
        "for (; i < n; ++i) {",
        "for (; i <= n; ++i) {",
        "component_sum_loss_float32",
        "heap-buffer-overflow",
    ),
    "tail-of-outer": (
        "component_forward.cpp",
        "part.store(row + v * kLanes<T>, value);",
        "part.store(row + v * kLanes<T> + 1, value);",
        "component_forward_selected_backward_float64",
        "heap-buffer-overflow",
    ),
    "workspace-of-attribution": (
        "attribution_reduce.cpp",
        "work(entries * kLanes<T>);",
        "work(entries * kLanes<T> - 1);",
        "attribution_reduce_float32",
        "heap-buffer-overflow",
    ),
    "workspace-of-tangents": (
        "attribution_tangent.cpp",
        "(layout.given + layout.projected + layout.tangents) * kBlock<T>);",
        "(layout.given + layout.projected + layout.tangents) * kBlock<T> - 1);",
        "attribution_tangent_float32",
        "heap-buffer-overflow",
    ),
    "sums-of-tangents": (
        "attribution_tangent.cpp",
        "kBlock<T> +\n                            sizes.size);",
        "kBlock<T> +\n                            sizes.size - 1);",
        "attribution_tangent_backward_float64",
        "heap-buffer-overflow",
    ),
    "workspace-of-topk": (
        "batch_topk.cpp",
        "const Workspace<U> keys(k);",
        "const Workspace<U> keys(k - 1);",
        "batch_topk_float64",
        "heap-buffer-overflow",
    ),
    "largest-of-factor": (
        "batched_svd.cpp",
        "for (int64_t i = 0; i < n; ++i) {\n    const double v",
        "for (int64_t i = 0; i <= n; ++i) {\n    const double v",
        "component_svdvals_float64",
        "heap-buffer-overflow",
    ),
    "panels-of-product": (
        "thin_product.cpp",
        "(p.k < longest ? p.k : longest) * panels * full);",
        "(p.k < longest ? p.k : longest) * panels * full - 1);",
        "thin_product_float32",
        "heap-buffer-overflow",
    ),
    "tail-of-rows": (
        "unit_norm.cpp",
        "for (; i < d; ++i) g[i] -=",
        "for (; i <= d; ++i) g[i] -=",
        "remove_along_float64",
        "heap-buffer-overflow",
    ),
    "misaligned-norms": (
        "batched_svd.cpp",
        "double* norms = sums + groups;",
        "double* norms = reinterpret_cast<double*>(reinterpret_cast<float*>(sums + groups) + 1);",
        "schatten_masked_float32",
        "misaligned address",
    ),
}


@pytest.fixture(scope="module")
def planted(memory_tree: Path, sound: Path) -> Path:
    """One build with every planted bug: each is in a function of its own."""
    for file, right, wrong, _, _ in PLANTED.values():
        native.patch(memory_tree / "csrc/cpu" / file, right, wrong)
    return native.build(memory_tree, MEMORY)


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_sanitizers_find_a_planted_memory_error(planted: Path, bug: str) -> None:
    file, _, _, function, message = PLANTED[bug]
    done = drive_memory(planted, function)
    assert done.returncode != 0
    assert message in done.stderr
    assert f"csrc/cpu/{file}:" in done.stderr


@pytest.mark.slow
def test_sanitizers_find_no_race_until_one_is_planted(race_tree: Path) -> None:
    done = drive_races(native.build(race_tree, RACES))
    assert done.returncode == 0, done.stderr
    assert "calls with 4 threads" in done.stdout
    assert "WARNING: ThreadSanitizer" not in done.stderr

    # one accumulator for all threads in one kernel
    kernel = race_tree / "csrc/cpu/component_sum.cpp"
    right = kernel.read_text()
    native.patch(
        kernel, "  parallel_for(n_instances, 1, worth", "  double total;\n  parallel_for(n_instances, 1, worth"
    )
    native.patch(kernel, "[=](int64_t begin", "[&](int64_t begin")
    native.patch(kernel, "      double total = 0;\n      for", "      total = 0;\n      for")
    done = drive_races(native.build(race_tree, RACES))
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    kernel.write_text(right)

    # a shared counter in the parallel loop: the report names every loop that threads really shared
    line = "for (int64_t p = next++; p < pieces; p = next++) body("
    planted = line.replace("body(", "++planted, body(")
    loop = race_tree / "csrc/cpu/parallel.h"
    native.patch(loop, line, planted)
    native.patch(loop, "std::vector<std::thread> team;", "std::vector<std::thread> team;\n    static int64_t planted;")
    done = drive_races(native.build(race_tree, RACES))
    assert done.returncode != 0
    racing = set(re.findall(r"parallel_for<fastapd::baseline::(?:\(anonymous namespace\)::)?(\w+<\w+)", done.stderr))
    names = "component_sum_loss batch_topk list_above attribution_reduce attribution_reduce_backward "
    names += "attribution_tangent attribution_tangent_backward component_svdvals schatten schatten_masked "
    names += "project accumulate outer thin_product unit_norm remove_along"
    assert racing == {f"{name}<{dtype}" for name in names.split() for dtype in ("float", "double")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"FASTAPD_SANITIZE": "address,memory"},
            "FASTAPD_SANITIZE must be from address, undefined, thread, joined by commas, got 'memory'",
        ),
        ({"FASTAPD_SANITIZE": "address,thread"}, "-fsanitize=address,thread must work with g++, got: "),
        ({"FASTAPD_THREADS": "tbb"}, "FASTAPD_THREADS must be auto, openmp, std or none, got 'tbb'"),
    ],
    ids=["unknown-sanitizer", "two-sanitizers-that-exclude-each-other", "unknown-threads"],
)
def test_sanitizers_refuse_settings_that_cannot_be_met(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    native.require_build_tools()
    tree = native.copy_sources(tmp_path / "tree")
    settings = {"CXX": "g++", "FASTAPD_CUDA": "0", **settings}
    done = native.run(sys.executable, "setup.py", "build_ext", "--inplace", settings=settings, cwd=tree)
    assert done.returncode != 0
    assert f"build: {message}" in done.stderr
    assert not (tree / "fastapd/_build_info.json").exists()
