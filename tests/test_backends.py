"""Who runs an op, why the others do not, and what a user can force."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

import fastapd
from fastapd import _env, _native, backends, ops, testing

A = torch.rand(2, 3, 4, 2)
B = torch.rand(2, 3, 2, 5)
SCORES = torch.rand(2, 6, 3)
NATIVE = _native.load("_C")
needs_native = pytest.mark.skipif(NATIVE.module is None, reason=NATIVE.reason)


@pytest.fixture
def unread(monkeypatch):
    """As before the first op of a process: FASTAPD_BACKEND has not been read."""
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.setattr(backends, "_environment_read", False)
    return monkeypatch


# ------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("op, backend", [(op, b) for op, row in backends.TABLE.items() for b in row])
def test_backends_table_names_functions_that_exist(op, backend):
    if backend == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("triton is not installed")
    assert callable(backends._load(backends.TABLE[op][backend]))


def test_backends_table_is_that_of_the_ops():
    for op, row in backends.TABLE.items():
        assert hasattr(torch.ops.fastapd, op)
        assert list(row) == [b for b in backends.BACKENDS if b in row], "a row is in the order of BACKENDS"
        assert "reference" in row
    for op, backend in backends.LIMITS:
        assert backend in backends.TABLE[op]
        assert callable(backends._load(backends.LIMITS[op, backend]))


def test_backends_testing_covers_every_row():
    assert set(testing.OPS) == {op for op in backends.TABLE if not op.endswith("_backward")}
    for op in set(backends.TABLE) - set(testing.OPS):  # reached by the gradients of another
        assert op.removesuffix("_backward") in testing.OPS


# ------------------------------------------------------------------------------------------------ explain and choose


@needs_native
def test_backends_explain_gives_a_reason_for_each_backend():
    why = backends.explain("batch_topk", SCORES, 3)
    assert tuple(why) == backends.BACKENDS
    absent = _native.load("_C_cuda").reason
    assert why["cuda"] == [absent or "the tensors are on cpu, not on a CUDA device"]
    assert why["triton"] in (["triton is not installed"], ["the tensors are on cpu, not on a CUDA device"])
    assert why["cpu"] == why["reference"] == []
    assert fastapd.explain("batch_topk", SCORES.half(), 3)["cpu"] == [
        "the CPU kernels take float32 and float64, not torch.float16"
    ]
    assert backends.explain("batch_topk", SCORES.to("meta"), 3)["cpu"] == ["the tensors are on meta, not on the CPU"]


def test_backends_explain_looks_inside_lists():
    x, g = torch.rand(2, 6, 4, dtype=torch.float16), torch.rand(2, 6, 3, 5, dtype=torch.float16)
    why = backends.explain("attribution_reduce", [x], [g], [A.half()], [B.half()])["cpu"]
    assert why and (NATIVE.module is None or "torch.float16" in why[0])


def test_backends_explain_refuses_an_unknown_op():
    wanted = f"explain: op must be one of {', '.join(backends.TABLE)}, got 'softmax'"
    with pytest.raises(ValueError, match=re.escape(wanted) + "$"):
        backends.explain("softmax", A)


@needs_native
def test_backends_choose_takes_the_first_that_runs():
    from fastapd.ops._batch_topk import cpu_batch_topk
    from fastapd.reference.batch_topk import batch_topk

    assert backends.choose("batch_topk", (SCORES, 3)) is cpu_batch_topk
    assert backends.choose("batch_topk", (SCORES.half(), 3)) is batch_topk
    with backends.use_backend("reference", "cpu"):  # the order is the user's
        assert backends.choose("batch_topk", (SCORES, 3)) is batch_topk


def test_backends_forced_that_refuses_is_an_error_with_every_reason():
    with backends.use_backend("cpu"), pytest.raises(NotImplementedError) as caught:
        ops.component_sum(A, B)
    message = str(caught.value)
    assert message.startswith("component_sum: no backend can run on these inputs (forced to cpu): ")
    reasons = dict(part.split(": ", 1) for part in message.split(": ", 2)[2].split("; "))
    assert tuple(reasons) == backends.BACKENDS
    assert reasons["cuda"] == reasons["cpu"] == "has no implementation of this op"
    assert reasons["triton"] in ("triton is not installed", "the tensors are on cpu, not on a CUDA device")
    assert reasons["reference"] == "not among the forced backends"


@needs_native
@pytest.mark.parametrize("op", testing.OPS)
def test_backends_forced_cpu_refuses_half_precision(op):
    for dtype in (torch.float16, torch.bfloat16):
        args = testing.inputs(op, "odd", dtype)
        wanted = f"float64, not {dtype};" if "cpu" in backends.TABLE[op] else "cpu: has no implementation of this op;"
        with backends.use_backend("cpu"), pytest.raises(NotImplementedError, match=f"^{op}: .*{re.escape(wanted)}"):
            testing.run(op, args)
        with backends.use_backend("cpu", "reference"):  # falls back
            for output in testing.run(op, args).outputs:
                assert not output.is_floating_point() or output.dtype == dtype


# ------------------------------------------------------------------------------------------------------ use_backend


def test_backends_use_backend_restores_what_was_set():
    assert backends.forced_backends() is None
    with fastapd.use_backend("cpu", "reference"):
        assert backends.forced_backends() == ("cpu", "reference")
        with fastapd.use_backend("auto"):
            assert backends.forced_backends() is None
        with pytest.raises(RuntimeError, match="inside"), fastapd.use_backend("triton"):
            raise RuntimeError("inside")
        assert backends.forced_backends() == ("cpu", "reference")
    assert backends.forced_backends() is None


def test_backends_use_backend_as_a_statement_stays():
    fastapd.use_backend("reference")
    assert backends.forced_backends() == ("reference",)
    fastapd.use_backend("auto")
    assert backends.forced_backends() is None


@pytest.mark.parametrize("names", [(), ("gpu",), ("cpu", "gpu"), ("auto", "cpu"), ("CPU",)])
def test_backends_use_backend_refuses_unknown_names(names):
    wanted = f"use_backend: names must be 'auto' or from cuda, triton, cpu, reference, got {names!r}"
    with pytest.raises(ValueError, match=re.escape(wanted) + "$"):
        backends.use_backend(*names)
    assert backends.forced_backends() is None


# ------------------------------------------------------------------------------------------------------ environment


@pytest.mark.parametrize(
    "value, wanted",
    [
        (None, None),
        ("auto", None),
        (" auto ", None),
        ("cpu", ("cpu",)),
        ("cpu,reference", ("cpu", "reference")),
        (" triton , cpu ", ("triton", "cpu")),
    ],
)
def test_backends_environment_forces(unread, value, wanted):
    if value is None:
        unread.delenv("FASTAPD_BACKEND", raising=False)
    else:
        unread.setenv("FASTAPD_BACKEND", value)
    assert backends.forced_backends() == wanted
    unread.setenv("FASTAPD_BACKEND", "cuda")  # read once
    assert backends.forced_backends() == wanted


@pytest.mark.parametrize("value", ["gpu", "", "cpu,", "auto,cpu", "cpu reference"])
def test_backends_environment_refuses_unknown_names(unread, value):
    unread.setenv("FASTAPD_BACKEND", value)
    wanted = f"FASTAPD_BACKEND must be auto or a comma-separated list of cuda, triton, cpu, reference, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(wanted) + "$"):
        ops.component_sum(A, B)


def test_backends_environment_reaches_the_ops(unread):
    unread.setenv("FASTAPD_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match=r"\(forced to cuda\)"):
        ops.component_sum(A, B)


def test_backends_use_backend_returns_to_the_environment(unread):
    unread.setenv("FASTAPD_BACKEND", "reference")
    with backends.use_backend("cpu"):
        assert backends.forced_backends() == ("cpu",)
    assert backends.forced_backends() == ("reference",)


def test_backends_triton_interprets_only_where_asked(monkeypatch):
    for value, wanted in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert _env.triton_interprets() is wanted


# --------------------------------------------------------------------------------------------------- native modules


@pytest.fixture
def reloaded(monkeypatch):
    """Imports of the compiled modules start anew, and are forgotten after the test."""
    _native.load.cache_clear()
    monkeypatch.delitem(sys.modules, "fastapd._C", raising=False)
    yield monkeypatch
    monkeypatch.undo()
    _native.load.cache_clear()


def test_backends_broken_module_warns_once_and_falls_back(reloaded, tmp_path):
    (tmp_path / "_C.py").write_text("raise ImportError('undefined symbol: _ZN7fastapd')")
    reloaded.setattr(fastapd, "__path__", [str(tmp_path), *fastapd.__path__])
    importlib.invalidate_caches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = ops.batch_topk(SCORES, 3), ops.batch_topk(SCORES, 3)
    (warning,) = caught
    assert warning.category is RuntimeWarning
    reason = "fastapd._C is installed but cannot be imported: undefined symbol: _ZN7fastapd"
    assert str(warning.message) == f"{reason}; falling back to the next backend"
    testing.assert_matches_reference("batch_topk", first, (SCORES, 3), "the fallback")
    testing.assert_bit_equal(list(second), list(first))
    assert backends.explain("batch_topk", SCORES, 3)["cpu"] == [reason]
    with backends.use_backend("cpu"), pytest.raises(NotImplementedError, match=re.escape(f"cpu: {reason}; ")):
        ops.batch_topk(SCORES, 3)


def test_backends_absent_module_is_silent(reloaded):
    find_spec = importlib.util.find_spec
    reloaded.setattr(
        _native.importlib.util, "find_spec", lambda name, *a: None if name == "fastapd._C" else find_spec(name, *a)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ops.batch_topk(SCORES, 3)
    testing.assert_matches_reference("batch_topk", found, (SCORES, 3), "the fallback")
    (reason,) = backends.explain("batch_topk", SCORES, 3)["cpu"]
    assert reason.startswith("fastapd._C was not built: ")
    with backends.use_backend("cpu"), pytest.raises(NotImplementedError, match=r"cpu: fastapd\._C was not built"):
        ops.batch_topk(SCORES, 3)


CAPABILITY = """
import os, torch
from fastapd import _native, ops
scores = torch.rand(6, 3)
os.environ["FASTAPD_CPU_CAPABILITY"] = "sse9"
for _ in range(2):
    try:
        ops.batch_topk(scores, 3)
    except ValueError as error:
        print(error)
os.environ["FASTAPD_CPU_CAPABILITY"] = "baseline"
print(ops.batch_topk(scores, 3).n_pairs, _native.load("_C").module.cpu_level())
print(*_native.load("_C").module.cpu_levels())
"""


@needs_native
def test_backends_environment_sets_the_instruction_level(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTAPD_")}
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *refused, ran, levels = done.stdout.splitlines()
    names = ", ".join(levels.split())
    assert refused == [f"FASTAPD_CPU_CAPABILITY must be one of {names} on this machine, got 'sse9'"] * 2
    assert ran == "3 baseline"


@needs_native
def test_backends_level_refuses_an_unknown_name():
    before = NATIVE.module.cpu_level()
    with pytest.raises(ValueError, match="set_cpu_level: name must be one of"):
        NATIVE.module.set_cpu_level("sse9")
    assert NATIVE.module.cpu_level() == before
