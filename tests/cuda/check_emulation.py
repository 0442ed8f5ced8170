"""What the emulation of CUDA itself does right, and what it finds: the kernels of `misuse.cu`, on plain memory."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent


def load(name: str) -> Any:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulated, misuse = load("emulated"), load("misuse")
start = misuse.start


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("misuse")
    return {s: emulated.library(HERE / "misuse.cu", folder / f"{s or 'plain'}.so", s) for s in emulated.SANITIZERS}


@pytest.fixture
def plain(libraries: dict[str, Path]) -> Any:
    library = ctypes.CDLL(str(libraries[""]))
    yield library
    library.fastapd_emulation_order(0)


@pytest.mark.parametrize("order", [0, 1, 12345])
def test_emulation_computes_what_a_card_would(plain, order):
    plain.fastapd_emulation_order(order)
    x, sums = np.random.default_rng(0).integers(0, 99, 192).astype("f4"), np.zeros(3, "f4")
    assert start(plain, "sums_of_blocks", x, sums) == ""
    np.testing.assert_array_equal(sums, x.reshape(3, 64).sum(1))

    lane, found = np.arange(32), np.zeros((32, 9), "i4")
    assert start(plain, "collectives", None, found) == ""
    ballot = sum(1 << i for i in range(0, 32, 3))
    bits = [32 - int(i).bit_length() for i in lane]  # leading zeros
    first = [(int(i) & -int(i)).bit_length() for i in lane]
    wanted = [
        np.full(32, 5), lane // 8 * 8 + 3, lane ^ 6, np.where(lane < 30, lane + 2, lane),
        np.where(lane % 16 < 14, lane + 2, lane), np.where(lane >= 3, lane - 3, lane),
        np.full(32, np.uint32(ballot).astype("i4")), np.full(32, 1), 11 + np.array(bits) + np.array(first),
    ]  # fmt: skip
    np.testing.assert_array_equal(found, np.stack(wanted, 1))

    counted = np.array([0, 0, 99, 0], "u4")
    assert start(plain, "counts", None, counted) == ""
    assert counted.tolist() == [192, 63, 0, 0xFFFFFFFF]

    x = np.arange(64, dtype="f4")
    assert start(plain, "reversed", None, x) == ""
    np.testing.assert_array_equal(x, np.arange(63, -1, -1))

    fresh = np.zeros(128, "f4")
    assert start(plain, "shared_is_fresh", None, fresh) == ""
    assert np.isnan(fresh).all(), "one block's shared memory says nothing to the next"


ON = "block 0 cannot go on: "
STUCK = {
    "half_of_the_block_at_a_barrier": f"{ON}32 of its 64 threads have returned, 32 wait at __syncthreads",
    "some_lanes_leave": f"{ON}16 of its 32 threads have returned, 16 wait at __syncwarp",
    "two_collectives_at_once": "block 0, thread 1: a shuffle while other lanes of the warp wait at a ballot",
    "part_of_a_warp": "block 0, thread 0: a collective of a part of a warp, which is not emulated",
    "too_much_shared_memory": "block 0, thread 0: 262144 bytes of shared memory, more than a card has",
    "half_a_warp": "a launch of 16 threads with 0 bytes of shared memory, which is no whole number of warps or more "
    "than a card has",
}


@pytest.mark.parametrize("kernel", STUCK)
def test_emulation_ends_a_launch_that_would_hang_or_be_undefined(plain, kernel):
    assert start(plain, kernel, None, np.zeros(64, "i4")) == f"misuse: {STUCK[kernel]}"
    x, sums = np.ones(192, "f4"), np.zeros(3, "f4")
    assert start(plain, "sums_of_blocks", x, sums) == "", "the next launch is none the worse"
    assert sums.tolist() == [64, 64, 64]


FOUND = {
    "address": {"reversed": "AddressSanitizer: use-after-poison"},
    "thread": {k: "ThreadSanitizer: data race" for k in ("handed_over", "from_all_blocks", "used_twice")},
}


@pytest.mark.parametrize("sanitizer, kernel", [(s, kernel) for s, kernels in FOUND.items() for kernel in kernels])
def test_emulation_shows_sanitizers_what_is_wrong_and_nothing_else(libraries, sanitizer, kernel):
    right, wrong = ("0", "1") if sanitizer == "address" else ("1", "0")
    for flag in (right, wrong):
        command = [sys.executable, "-P", misuse.__file__, str(libraries[sanitizer]), kernel, flag]
        env = emulated.preloaded(sanitizer)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        if flag == right:
            assert (done.returncode, done.stdout) == (0, "no error\n"), done.stderr
        else:
            assert done.returncode != 0
            assert FOUND[sanitizer][kernel] in done.stderr
            assert "misuse.cu:" in done.stderr
