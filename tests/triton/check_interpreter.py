"""Every Triton kernel against the reference, in the checked interpreter; `tests/test_triton.py` runs this file.

By hand: FASTAPD_BACKEND=triton python -m pytest tests/triton/check_interpreter.py

`checked.py` turns the interpreter on, which holds for a whole process: this one. With `-m slow` come all cases.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("checked", Path(__file__).with_name("checked.py"))
assert _spec is not None
assert _spec.loader is not None
checked = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checked)  # before triton is imported

import torch

import fastapd
from fastapd import backends, testing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUICK = (
    testing.Case("few", 2, 5, 3, 2, 5, 6, n_outputs=3, k=1.5, tied=True),
    testing.Case("over", 1, 18, 17, 9, 33, 20, n_outputs=17, k=1.0),  # one more than fits a block, on every axis
)
FEW = QUICK[0]
EXACT = ("component_svdvals", "schatten", "schatten_accumulate")
FIVE = testing.Case("five", 1, 18, 5, 5, 33, 20, n_outputs=17, k=1.0)
"""In place of "over" where matrices are rotated, which takes the interpreter long: four fit a block."""
TRITON = [op for op in testing.OPS if "triton" in backends.TABLE[op]]
PROVED: set[tuple[str, str]] = set()
"""(kernel, narrowest dtype among its arguments) of every launch that was checked."""


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


every = pytest.mark.parametrize("op", TRITON)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=names)


def within(op: str, case: testing.Case) -> testing.Case:
    """A case with no more programs than the interpreter runs in seconds: its edges stay, and its ranks."""
    most = {"n_instances": 2, "batch": 40, "n_components": 5 if op in EXACT else 13}
    return dataclasses.replace(case, **{name: min(n, getattr(case, name)) for name, n in most.items()})


def pairs(op: str) -> list[Any]:
    """(op, case): two quick cases, and all others."""
    quick = (FEW, FIVE) if op in EXACT else QUICK
    others = [within(op, case) for case in testing.CASES.values()]
    if op in EXACT:
        others.append(QUICK[1])
    marked = [(case, ()) for case in quick] + [(case, pytest.mark.slow) for case in others]
    return [pytest.param(op, case, id=f"{op}-{case.name}", marks=marks) for case, marks in marked]


cases = pytest.mark.parametrize(("op", "case"), [pair for op in TRITON for pair in pairs(op)])


@pytest.fixture(autouse=True)
def on_triton_alone(poisoned_memory, chosen_backend):
    with backends.use_backend("triton"), fastapd.use_precision("ieee"):
        yield


def answer(op: str, args: Any, order: str = "forward") -> tuple[testing.Answer, list[torch.Tensor] | None]:
    """Outputs, and gradients where the op has any, from checked kernels."""
    cotangents = None
    if testing._OPS[op].differentiable:
        cotangents = testing.random_cotangents(testing.reference(op, args).outputs)
    with checked.checked(order) as launches:
        found = testing.run(op, args, cotangents)
    PROVED.update(launches)
    return found, cotangents


def assert_matches(op: str, args: Any, what: str = "triton") -> testing.Answer:
    found, cotangents = answer(op, args)
    grads = None if cotangents is None else found.grads
    testing.assert_matches_reference(op, found.outputs, args, what, grads=grads, cotangents=cotangents)
    return found


@cases
@dtypes
def test_kernels_match_the_reference(op, dtype, case):
    assert_matches(op, testing.inputs(op, case, dtype))


@pytest.mark.parametrize("order", ["reverse", pytest.param("shuffled", marks=pytest.mark.slow)])
@cases
def test_kernels_do_not_depend_on_the_order_of_programs(op, case, order):
    args = testing.inputs(op, case)
    testing.assert_bit_equal(answer(op, args, order)[0], answer(op, args)[0])


@pytest.mark.parametrize("view", testing.VIEWS)
@every
def test_kernels_take_any_strides(op, view):
    args = testing.inputs(op, FEW)
    testing.assert_bit_equal(
        answer(op, testing.map_tensors(testing.VIEWS[view], args))[0].outputs, answer(op, args)[0].outputs
    )


@every
def test_kernels_are_about_float32_in_three_products_of_tf32(op):
    with fastapd.use_precision("tf32x3"):
        assert_matches(op, testing.inputs(op, FEW), "triton in tf32x3")


@every
def test_kernels_keep_three_digits_in_tf32(op):
    args = testing.inputs(op, FEW)
    with fastapd.use_precision("tf32"):
        found, cotangents = answer(op, args)
    exact = testing.oracle(op, args, cotangents)
    for got, true in zip((*found.outputs, *found.grads), (*exact.outputs, *exact.grads), strict=True):
        assert (got.double() - true.double()).norm() <= 2e-3 * true.double().norm()


# --------------------------------------------------------------- routes that the sizes of the shared cases do not take


@dtypes
def test_large_sums_take_the_library_and_a_square_kernel(monkeypatch, dtype):
    from fastapd.kernels import component_sum

    monkeypatch.setitem(component_sum.SMALL, "entries", 0)
    monkeypatch.setattr(component_sum, "SQUARES", 64)
    for op in ("component_sum", "component_sum_loss"):
        for case in QUICK:
            assert_matches(op, testing.inputs(op, case, dtype))


@pytest.mark.parametrize("bytes_", [1 << 28, 4096])
@dtypes
def test_attributions_in_parts_of_the_batch(monkeypatch, dtype, bytes_):
    """With z formed in the kernel (few) and by the library (over), whole and a few samples at a time."""
    from fastapd.kernels import attribution_reduce

    monkeypatch.setattr(attribution_reduce, "CHUNK_BYTES", bytes_)
    for case in QUICK:
        assert_matches("attribution_reduce", testing.inputs("attribution_reduce", case, dtype))


@pytest.mark.parametrize("bytes_", [1 << 28, 1])
@dtypes
def test_tangents_barrier_by_barrier(monkeypatch, dtype, bytes_):
    """Wide barriers, whose tangents go through memory, whole and in parts of 9 samples and 9 components."""
    from fastapd.kernels import attribution_tangent

    monkeypatch.setitem(attribution_tangent.WIDEST, "ieee", 1)
    monkeypatch.setattr(attribution_tangent, "CHUNK_BYTES", bytes_)
    monkeypatch.setattr(attribution_tangent, "INNER_BYTES", bytes_)
    monkeypatch.setattr(attribution_tangent, "LEAST_PART", 9)
    for case in QUICK:
        assert_matches("attribution_tangent", testing.inputs("attribution_tangent", case, dtype))


def test_tangents_of_rows_in_parts(monkeypatch):
    from fastapd.kernels import attribution_tangent

    monkeypatch.setattr(attribution_tangent, "INNER_BYTES", 1)
    monkeypatch.setattr(attribution_tangent, "LEAST_PART", 9)
    assert_matches("attribution_tangent", testing.inputs("attribution_tangent", QUICK[1]))


def test_tangents_of_barriers_that_nothing_reaches():
    """A barrier between, and the last one, without sources: zero attributions and gradients."""
    x, A, F = torch.rand(1, 3, 4), torch.rand(1, 2, 4, 2), torch.rand(1, 2, 2, 5)
    links = [torch.rand(1, 5, 6)]
    for ends in ([0, 2], [0, 1]):
        program = ([x], [A], [F], [], links, [0], [1, 0], [], ends, [5, 6, 6])
        assert_matches("attribution_tangent", program)


def test_rows_longer_than_a_block():
    for op in ("unit_norm", "remove_along"):
        case = testing.Case("long", 1, 2, 2, 2, 1100, 1100, n_outputs=1, k=1.0)
        assert_matches(op, testing.inputs(op, case))


# ------------------------------------------------------------------------------------------------------ planted faults

PLANTED = {
    "a load without part of its mask": (
        "component_forward", "component_forward_selected",
        "mask=m_r[:, None] & m_d[None, :], other=0.0", "mask=m_r[:, None], other=0.0",
        "out-of-bounds read",
    ),
    "a mask with one row more than there is": (
        "unit_norm", "unit_norm", "m_row = o_row < n_rows", "m_row = o_row <= n_rows", "out-of-bounds (read|write)",
    ),
    "two programs that own one sample": (
        "component_forward", "component_forward_selected",
        "row = (pid // n_d_tiles).to(tl.int64)", "row = (pid // n_d_tiles // 2).to(tl.int64)",
        "write-write race",
    ),
    "a program that reads what another one writes": (
        "unit_norm", "remove_along",
        "g -= along[:, None] * tl.load(rows_ptr + o, mask=mask, other=0.0)",
        "g -= along[:, None] * tl.load(grad_ptr + o_row[:, None] * 0 + o_d[None, :], mask=mask, other=0.0)",
        "(write-read|read-write) race",
    ),
    # no faults, but wrong numbers
    "a mask that leaves out the last number of a row": (
        "attribution_tangent", "attribution_tangent", "m_k = o_k < k\n", "m_k = o_k < k - 1\n", None,
    ),
    "a mask that leaves out the last pair of a component": (
        "component_forward", "component_forward_selected",
        "m_k = o_k < end\n        o_m", "m_k = o_k < end - 1\n        o_m", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_faults_are_found(tmp_path, monkeypatch, planted):
    """The kernel's own source with one mistake in it: the lane goes red, and says what is wrong."""
    module, op, right, wrong, fault = PLANTED[planted]
    source = Path(importlib.import_module(f"fastapd.kernels.{module}").__file__).read_text()
    assert right in source, "the planted line is still there"
    file = tmp_path / f"{module}.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"fastapd.kernels.{module}_planted", file)
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    load, mine = backends._load, f"fastapd.kernels.{module}:"
    monkeypatch.setattr(
        backends, "_load", lambda path: getattr(kernels, path[len(mine) :]) if path.startswith(mine) else load(path)
    )
    args = testing.inputs(op, testing.Case("planted", 2, 19, 20, 3, 40, 35, n_outputs=3, k=2.0))
    if fault is None:
        with pytest.raises(AssertionError, match=f"^{op} on triton, "):
            assert_matches(op, args)
    else:
        with pytest.raises(Exception, match=fault):
            assert_matches(op, args)


@pytest.fixture(scope="module", autouse=True)
def say_what_was_proved():
    yield
    kernels, dtypes = {k for k, _ in PROVED}, {d for _, d in PROVED if d != "integers"}
    print(f"\ninterpreted {len(PROVED)} pairs of kernel and dtype: {len(kernels)} kernels x {len(dtypes)} dtypes")
