"""Every Triton kernel against the reference, in the checked interpreter; `tests/test_triton.py` runs this file.

By hand: FASTAPD_BACKEND=triton python -m pytest tests/triton/check_interpreter.py

`checked.py` turns the interpreter on, which holds for a whole process: this one. With `-m slow` come all cases, all of
`tests/ops` is run by the lane itself.
"""

from __future__ import annotations

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
QUICK = ("odd", "rank1")
TRITON = [op for op in testing.OPS if "triton" in backends.TABLE[op]]
PROVED: set[tuple[str, str]] = set()
"""(kernel, narrowest dtype among its arguments) of every launch that was checked."""


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


every = pytest.mark.parametrize("op", TRITON)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=names)
cases = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in testing.CASES]
)


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
@every
def test_kernels_match_the_reference(op, dtype, case):
    assert_matches(op, testing.inputs(op, case, dtype))


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@cases
@every
def test_kernels_do_not_depend_on_the_order_of_programs(op, case, order):
    args = testing.inputs(op, case)
    testing.assert_bit_equal(answer(op, args, order)[0], answer(op, args)[0])


@pytest.mark.parametrize("view", testing.VIEWS)
@every
def test_kernels_take_any_strides(op, view):
    args = testing.inputs(op, "odd")
    testing.assert_bit_equal(
        answer(op, testing.map_tensors(testing.VIEWS[view], args))[0].outputs, answer(op, args)[0].outputs
    )


@every
def test_kernels_are_about_float32_in_three_products_of_tf32(op):
    with fastapd.use_precision("tf32x3"):
        assert_matches(op, testing.inputs(op, "odd"), "triton in tf32x3")


@every
def test_kernels_keep_three_digits_in_tf32(op):
    args = testing.inputs(op, "odd")
    with fastapd.use_precision("tf32"):
        found, cotangents = answer(op, args)
    exact = testing.oracle(op, args, cotangents)
    for got, true in zip((*found.outputs, *found.grads), (*exact.outputs, *exact.grads), strict=True):
        assert (got.double() - true.double()).norm() <= 2e-3 * true.double().norm()


@pytest.fixture(scope="module", autouse=True)
def say_what_was_proved():
    yield
    kernels, dtypes = {k for k, _ in PROVED}, {d for _, d in PROVED if d != "integers"}
    print(f"\ninterpreted {len(PROVED)} pairs of kernel and dtype: {len(kernels)} kernels x {len(dtypes)} dtypes")
