"""The Triton kernels without a GPU: lanes in processes of their own, which `conftest.py` starts beside other tests.

    interpreter   tests/triton/check_*.py: every kernel against the reference, in the checked interpreter
    far           offsets beyond 2^31, in sparse files
    sm_80, ..     tests/triton/compiled.py: what the library launches, compiled for cards that are not there

`make test` runs each at a few sizes with the installed Triton. `make test-all` adds every case, the tests of tests/ops
in the interpreter, all dtypes and precisions for all cards, and other versions of Triton.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fastapd import backends, ops

TESTS = Path(__file__).parent
LANES = TESTS / "triton"
INTERPRET = {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "passive"}
CHECK = ["-m", "pytest", "-q", "-s", "-rs", "-p", "no:cacheprovider", "-o", "python_files=check_*.py", str(LANES)]
PARTS = ("component", "attribution", "topk", "svd or schatten", "thin or norm or along")
"""Of the tests of the ops, by what their names hold."""
NEWEST, OLDEST = "3.9.0", "3.6.0"

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


def run(command: list[str], settings: Mapping[str, str], timeout: int = 1800) -> str:
    """What a command of this Python prints, with none of the caller's settings for Triton and fastapd; must succeed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTAPD_", "TRITON_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-P", *command], cwd=TESTS.parent, env=env | dict(settings), capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("lane", ["triton interpreter", "triton far", "triton sm_80", "triton sm_90", "triton sm_100"])
def test_triton_lane(lanes, lane):
    code, printed = lanes.result(lane)
    assert code == 0, printed[-8000:]
    if lane in ("triton interpreter", "triton far"):
        found = re.search(r"(\d+) passed", printed)
        assert found is not None
        assert int(found.group(1)) > 20, printed
        assert "skipped" not in printed.splitlines()[-1], printed
    else:
        assert re.search(r"^compiled \d+ binaries: \d+ kernels x 2 dtypes x 1 architectures", printed, re.MULTILINE)


def test_triton_interpreter_is_refused_where_it_is_off(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = r"triton: the tensors are on cpu, not on a CUDA device( \(.*\))?; "
    with backends.use_backend("triton"), pytest.raises(NotImplementedError, match=reason):
        ops.component_sum(torch.zeros(2, 3, 1), torch.zeros(2, 1, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "lane",
    ["triton interpreter in full", "triton sm_80 in full", "triton sm_90 in full", "triton sm_100 in full"]
    + [f"triton ops {part}" for part in ("contract", *PARTS)],
)
def test_triton_in_full(lanes, lane):
    """Tests of the ops that hand over float64 are skipped, with that reason."""
    code, printed = lanes.result(lane)
    assert code == 0, printed[-8000:]
    assert re.search(r"^compiled|\d+ passed", printed, re.MULTILINE)
    print(printed)


@pytest.fixture(scope="module")
def other_version(tmp_path_factory):
    """`other_version(version)`: a folder with that version of Triton; skips where it cannot be had."""

    def get(version: str) -> str:
        folder = tmp_path_factory.mktemp(f"triton-{version}")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            f"triton=={version}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"triton {version} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        return str(folder)

    return get


@pytest.mark.slow
def test_triton_newest_version(other_version):
    path = {"PYTHONPATH": other_version(NEWEST)}
    print(run(CHECK, INTERPRET | path))
    printed = run([str(LANES / "compiled.py"), "--sm", "80", "90", "100"], path)
    assert f"Triton {NEWEST}" in printed
    print(printed)


@pytest.mark.slow
def test_triton_oldest_version_compiles(other_version):
    """Its interpreter does not run with numpy 2.4."""
    printed = run([str(LANES / "compiled.py"), "--sm", "80", "90", "100"], {"PYTHONPATH": other_version(OLDEST)})
    assert f"Triton {OLDEST}" in printed
    print(printed)
