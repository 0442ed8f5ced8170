"""The native module on other processors, without OpenMP, beside torch's own threads, after a fork, beside Python's."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from fastapd import _native, backends, testing

_spec = importlib.util.spec_from_file_location("native_build", Path(__file__).with_name("native_build.py"))
assert _spec is not None
assert _spec.loader is not None
native = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native)

LARGE = testing.Case("large", 3, 300, 300, 3, 150, 140, n_outputs=3)


@pytest.fixture
def module() -> Any:
    """The installed `_C`."""
    found = _native.load("_C")
    if found.module is None:
        pytest.skip(found.reason)
    return found.module


def python(script: str, **settings: str) -> CompletedProcess[str]:
    """Runs a script in a process of its own, that of an installed fastapd."""
    return native.run(sys.executable, "-P", "-c", script, settings=settings, timeout=120)


# ------------------------------------------------------------------------------------------------------- instructions

# What a level must not contain; and what it must, or nothing was looked at.
FORBIDDEN = {
    "baseline": re.compile(r"^v|%[yz]mm|%k[0-7]"),  # AVX on narrow registers too: its names begin with v
    "avx2": re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])\b"),
    "avx512": re.compile(r"(?!)"),
}
WANTED = {"baseline": "%xmm", "avx2": "%ymm", "avx512": "%zmm"}


def level_of(symbol: str) -> str:
    """The level by the mangled namespace; what has none runs on every processor."""
    return next((level for level in ("avx2", "avx512") if f"7fastapd{len(level)}{level}" in symbol), "baseline")


def disassembled(path: Path | str) -> Iterator[tuple[str, str]]:
    """(symbol, instruction) of a whole object or module."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"{platform.machine()} has one level only")
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not on this machine")
    done = native.run("objdump", "-d", "--no-show-raw-insn", path)
    assert done.returncode == 0, done.stderr
    symbol = ""
    for line in done.stdout.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            symbol = header[1]
        elif line.startswith(" ") and line.count("\t") == 1:
            yield symbol, line.split("\t")[1]


def test_portability_no_level_holds_instructions_of_a_higher_one(module: Any) -> None:
    seen = set()
    for symbol, instruction in disassembled(module.__file__):
        level = level_of(symbol)
        assert not FORBIDDEN[level].search(instruction), f"{symbol} ({level}) holds {instruction}"
        if WANTED[level] in instruction:
            seen.add(level)
    assert seen == set(_native.build_info()["cpu_levels"])


@pytest.fixture(scope="module")
def default_tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tree that was built as by default, and its module."""
    native.require_build_tools()
    tree = native.copy_sources(tmp_path_factory.mktemp("default") / "tree")
    return tree, native.build(tree)


@pytest.mark.slow
def test_portability_objects_of_a_level_share_no_code_with_others(default_tree: tuple[Path, Path]) -> None:
    """The linker keeps one copy of a weak symbol: a std:: function compiled for AVX-512 could run anywhere."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not on this machine")
    objects = [path for level in ("avx2", "avx512") for path in default_tree[0].glob(f"build/**/*.{level}.o")]
    assert objects or platform.machine().lower() not in ("x86_64", "amd64")
    for path in objects:
        level = path.name.split(".")[-2]
        listed = native.run("nm", "--defined-only", path).stdout.splitlines()
        weak = [line.split()[-1] for line in listed if line.split()[-2] in "VWuvw"]
        assert weak, f"nm found no kernels in {path.name}"
        # DW.ref. names a pointer to a routine of the C++ runtime: data, the same at every level
        code = [symbol for symbol in weak if not symbol.startswith("DW.ref.")]
        assert [symbol for symbol in code if level_of(symbol) != level] == []


@pytest.mark.slow
def test_portability_no_object_is_compiled_for_this_machine_or_with_fast_math(default_tree: tuple[Path, Path]) -> None:
    (graph,) = default_tree[0].glob("build/ninja-*/build.ninja")
    text = graph.read_text()
    assert "-std=c++17" in text
    # -ffast-math where the module is linked turns denormals off for the whole Python process
    for flag in ("-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-fassociative-math", "-march", "-mtune"):
        assert flag not in text


# ------------------------------------------------------------------------------------------------------------- levels


def test_portability_every_level_agrees_with_numpy_and_itself_on_two_threads(module: Any) -> None:
    done = native.drive(module.__file__, "check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"at the levels {' '.join(module.cpu_levels())}")


CAPABILITY = """
import torch
from fastapd import _native, ops
ops.batch_topk(torch.rand(6, 3), 3)
print(_native.load("_C").module.cpu_level())
"""


def test_portability_the_environment_chooses_the_level(module: Any) -> None:
    lowest, best = module.cpu_levels()[0], module.cpu_levels()[-1]
    assert python(CAPABILITY).stdout.strip() == best
    assert python(CAPABILITY, FASTAPD_CPU_CAPABILITY=lowest).stdout.strip() == lowest
    refused = python(CAPABILITY, FASTAPD_CPU_CAPABILITY="sse9")
    assert refused.returncode != 0
    names = ", ".join(module.cpu_levels())
    assert f"FASTAPD_CPU_CAPABILITY must be one of {names} on this machine, got 'sse9'" in refused.stderr


# ------------------------------------------------------------------------------------------------------------ threads


@pytest.mark.slow
def test_portability_without_openmp_the_bits_are_the_same(
    default_tree: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    def digest(module: Path, threads: int) -> dict[str, str]:
        done = native.drive(module, "digest", str(threads))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    tree = native.copy_sources(tmp_path_factory.mktemp("alone") / "tree")
    alone = native.build(tree, {"FASTAPD_THREADS": "none"})
    assert json.loads((tree / "fastapd/_build_info.json").read_text())["openmp"] is False
    wanted = digest(alone, 1)
    assert len(wanted) >= 18
    assert digest(alone, 2) == wanted
    assert digest(default_tree[1], 1) == wanted
    assert digest(default_tree[1], 2) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", [op for op in testing.OPS if "cpu" in backends.TABLE[op]])
def test_portability_the_bits_do_not_depend_on_torch_threads(module: Any, threads: Any, op: str, dtype: Any) -> None:
    args = testing.inputs(op, LARGE, dtype)
    if op == "component_sum_loss":  # its GEMM is torch's: whole numbers are summed exactly in any order
        args = testing.map_floats(lambda t: (2 * t).round(), args)
    with backends.use_backend("cpu", "reference"):
        threads(1)
        outputs = testing.run(op, args).outputs
        # the backward pass of the singular values is torch's SVD, which promises nothing about threads
        cotangents = None if op == "component_svdvals" else [torch.ones_like(o) for o in outputs]
        alone = testing.run(op, args, cotangents)
        for n in (2, 3):
            threads(n)
            testing.assert_bit_equal(list(testing.run(op, args, cotangents)), list(alone))


def test_portability_every_function_releases_the_gil(module: Any) -> None:
    done = native.drive(module.__file__, "gil")
    assert done.returncode == 0, done.stderr
    assert "without the GIL" in done.stdout


IMPORTS = """
import json, re
from pathlib import Path
from subprocess import CompletedProcess
import {first}
import {second}
from fastapd import ops
import torch
ops.batch_topk(torch.rand(3, 300, 300), 7)
runtimes = set(re.findall(r"\\S*/lib[gi]?omp\\S*", Path("/proc/self/maps").read_text()))
denormals = [5e-324 * 1.0 > 0, bool(torch.tensor(1e-40) * 1 > 0)]
print(json.dumps([sorted(runtimes), denormals]))
"""


@pytest.mark.parametrize(("first", "second"), [("torch", "fastapd.ops"), ("fastapd.ops", "torch")])
def test_portability_in_either_import_order_there_is_one_openmp_and_denormals(
    module: Any, first: str, second: str
) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system has no /proc/self/maps")
    if not module.openmp:
        pytest.skip("_C was built without OpenMP")
    done = python(IMPORTS.format(first=first, second=second), FASTAPD_BACKEND="cpu")
    assert done.returncode == 0, done.stderr
    runtimes, denormals = json.loads(done.stdout)
    assert len(runtimes) == 1
    assert denormals == [True, True]


# libgomp's threads do not survive a fork: a child of a process that has already run a parallel region, torch's or ours,
# waits for ever in its next one. So fork before the first use, or with one thread (as torch's DataLoader does), or
# spawn. A child that hangs is ended by its alarm.
FORK = """
import os, signal, sys
import torch
from fastapd import ops
scores = torch.rand(3, 300, 300)
torch.set_num_threads({threads})
if {used}:
    ops.batch_topk(scores, 12345)
child = os.fork()
if child == 0:
    signal.alarm(60)
    pairs = ops.batch_topk(scores, 12345).n_pairs
    os._exit(0 if pairs == 12345 and torch.get_num_threads() == {threads} else 1)
status = os.waitpid(child, 0)[1]
assert status == 0, status
print(ops.batch_topk(scores, 12345).n_pairs)
"""


@pytest.mark.parametrize(
    ("threads", "used"), [(1, True), (2, False)], ids=["on-one-thread", "on-two-threads-before-first-use"]
)
def test_portability_a_forked_child_works(module: Any, threads: int, used: bool) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    done = python(FORK.format(threads=threads, used=used), FASTAPD_BACKEND="cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "12345"
