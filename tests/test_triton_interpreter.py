"""The Triton kernels in Triton's interpreter, on the CPU: their masks, their strides and their arithmetic.

The interpreter is chosen when triton is imported, so one process of its own runs all of it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from fastapd import backends, ops

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")

SCRIPT = """
from dataclasses import replace

import torch
from fastapd import backends, ops, testing
from fastapd.testing import Case

torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True)
assert backends.forced_backends() == ("triton",)
assert not backends.explain("component_sum", torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))["triton"]
cases = [
    Case("tiny", 1, 0, 1, 1, 1, 1, n_outputs=0),
    Case("tms", 3, 0, 5, 3, 5, 2, n_outputs=0),
    Case("odd", 2, 0, 13, 7, 17, 1, n_outputs=0),
    Case("block", 1, 0, 8, 4, 32, 32, n_outputs=0),
    Case("over", 1, 0, 3, 11, 33, 65, n_outputs=0),
    *(replace(Case(f"no {axis}", 2, 0, 3, 2, 4, 5, n_outputs=0), **{axis: 0})
      for axis in ("n_instances", "n_components", "rank", "d_in", "d_out")),
]
proved = 0
for case in cases:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        args = testing.inputs("component_sum", case, dtype)
        cotangents = testing.random_cotangents(testing.reference("component_sum", args).outputs)
        outputs, grads = testing.run("component_sum", args, cotangents)
        what = f"triton, {case.name} {dtype}"
        testing.assert_matches_reference(
            "component_sum", outputs, args, what, grads=grads, cotangents=cotangents)
        proved += 1
for name, view in testing.VIEWS.items():
    args = testing.inputs("component_sum", cases[2])
    outputs = testing.run("component_sum", testing.map_tensors(view, args)).outputs
    testing.assert_bit_equal(outputs, testing.run("component_sum", args).outputs)
    proved += 1
A, B = testing.inputs("component_sum", cases[1])
testing.assert_bit_equal(ops.component_sum(A[1], B[1]), ops.component_sum(A, B)[1])
proved += 1
try:
    ops.component_sum(A.double(), B.double())
except NotImplementedError as error:
    assert "the Triton kernels take float32, float16 and bfloat16, not torch.float64" in str(error), error
    proved += 1
with backends.use_backend("auto"):  # the interpreter never runs by itself
    why = backends.explain("component_sum", A, B)["triton"]
    assert why == ["the tensors are on cpu, not on a CUDA device"], why
print("proved", proved)
"""


def test_triton_interpreter_matches_the_reference(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTAPD_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=env | {"TRITON_INTERPRET": "1", "FASTAPD_BACKEND": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["proved", "36"]
    print(done.stdout)


def test_triton_interpreter_is_refused_where_it_is_off(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = "triton: the tensors are on cpu, not on a CUDA device; "
    with backends.use_backend("triton"), pytest.raises(NotImplementedError, match=re.escape(reason)):
        ops.component_sum(torch.zeros(2, 3, 1), torch.zeros(2, 1, 4))
