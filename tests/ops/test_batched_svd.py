"""schatten_factored: sums of ‖a_i‖^p ‖b_i‖^p from the factors, with counts and with a float mask."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastapd import ops, testing

COUNTS, MASKED = "schatten_factored", "schatten_factored_masked"
TINY = testing.Case("tiny", 2, 3, 2, 2, 3, 2, n_outputs=0)
both = pytest.mark.parametrize("op, backend", testing.pairs(COUNTS, MASKED), indirect=["backend"])


def with_gradients(op: str, args: tuple) -> testing.Answer:
    return testing.run(op, args, testing.random_cotangents(testing.run(op, args).outputs))


def of_floats(op: str, args: tuple):
    """The public op as a function of its differentiable arguments, and those as leaves."""
    n = 2 if op == COUNTS else 3
    return lambda *floats: ops.schatten_factored(*floats, *args[n:]), [t.detach().requires_grad_() for t in args[:n]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
@both
def test_schatten_factored_matches_the_reference(op, backend, case, dtype):
    args = testing.inputs(op, case, dtype)
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [1e-3, 0.5, 1, 1.5, 2, 3.0])
@both
def test_schatten_factored_takes_any_p(op, backend, p, dtype):
    A, B, weights, _, eps, *batch = testing.inputs(op, "odd", dtype)
    args = (A, B, weights, p, eps, *batch)
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@both
def test_schatten_factored_takes_half_precision(op, backend, dtype):
    A, B, weights, p, _, *batch = testing.inputs(op, "single", dtype)
    args = (A, B, weights, p, 1e-4, *batch)
    testing.assert_matches_reference(op, testing.run(op, args).outputs, args, backend)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_schatten_factored_takes_counts_of_any_integer(dtype):
    A, B, counts, p, eps, batch = testing.inputs(COUNTS, "tms")
    testing.assert_bit_equal(
        ops.schatten_factored(A, B, counts.to(dtype), p, eps, batch), ops.schatten_factored(A, B, counts, p, eps, batch)
    )


@both
def test_schatten_factored_passes_gradcheck(op, backend):
    function, floats = of_floats(op, testing.inputs(op, TINY, torch.float64))
    assert gradcheck(function, floats)


@both
def test_schatten_factored_is_twice_differentiable(op, backend):
    function, floats = of_floats(op, testing.inputs(op, TINY, torch.float64))
    assert gradgradcheck(function, floats)


@both
def test_schatten_factored_gradient_goes_only_where_asked(op, backend):
    args = testing.inputs(op, "odd", torch.float64)
    everything = with_gradients(op, args).grads
    for wanted in range(1, 2 ** len(everything)):
        function, floats = of_floats(op, args)
        for i, t in enumerate(floats):
            t.requires_grad_(bool(wanted >> i & 1))
        total = function(*floats)
        total.backward(*testing.random_cotangents([total]))
        for t, grad in zip(floats, everything, strict=True):
            assert (t.grad is not None) == t.requires_grad
            if t.grad is not None:
                testing.assert_bit_equal(t.grad, grad)


@both
def test_schatten_factored_passes_opcheck(op, backend):
    args = testing.inputs(op, TINY, torch.float64)
    _, floats = of_floats(op, args)
    torch.library.opcheck(getattr(torch.ops.fastapd, op), (*floats, *args[len(floats) :]))


@pytest.mark.parametrize("op", [COUNTS, MASKED])
def test_schatten_factored_compiles_to_one_graph(op):
    args = testing.inputs(op, "rank1")
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    wanted = testing.run(op, args, cotangents)
    function, floats = of_floats(op, args)
    total = torch.compile(function, fullgraph=True, backend="aot_eager")(*floats)
    total.backward(*cotangents)
    testing.assert_bit_equal([total, *(t.grad for t in floats)], [*wanted.outputs, *wanted.grads])


@both
def test_schatten_factored_needs_no_instance_axis(op, backend):
    args = testing.inputs(op, "odd", torch.float64)
    one = testing.map_tensors(lambda t: t[0], args)
    cotangents = testing.random_cotangents(testing.run(op, one).outputs)
    outputs, grads = testing.run(op, one, cotangents)
    assert outputs[0].shape == ()
    testing.assert_matches_reference(op, outputs, one, backend, grads=grads, cotangents=cotangents)
    first = testing.run(op, testing.map_tensors(lambda t: t[:1], args), [c.unsqueeze(0) for c in cotangents])
    testing.assert_bit_equal((outputs, grads), testing.map_tensors(lambda t: t[0], tuple(first)))


@pytest.mark.parametrize("view", testing.VIEWS)
@both
def test_schatten_factored_takes_any_strides(op, backend, view):
    args = testing.inputs(op, "odd")
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    found = testing.run(op, testing.map_tensors(testing.VIEWS[view], args), cotangents)
    # the order of a sum over an axis may follow the strides: equal within the tolerance, not in every bit
    testing.assert_matches_reference(op, found.outputs, args, backend, grads=found.grads, cotangents=cotangents)


@both
def test_schatten_factored_takes_expanded_tensors(op, backend):
    expanded = testing.map_tensors(lambda t: t[:1].expand(3, *t.shape[1:]), testing.inputs(op, "odd"))
    dense = testing.map_tensors(lambda t: t.clone(memory_format=torch.contiguous_format), expanded)
    cotangents = [t.new_ones(()).expand_as(t) for t in testing.run(op, expanded).outputs]
    outputs, grads = testing.run(op, expanded, cotangents)
    testing.assert_matches_reference(op, outputs, dense, backend, grads=grads, cotangents=cotangents)


@both
def test_schatten_factored_leaves_its_inputs_alone(op, backend):
    args = testing.inputs(op, "tms_40")
    before = testing.map_tensors(torch.clone, args)
    with_gradients(op, args)
    testing.assert_bit_equal(args, before)


@both
def test_schatten_factored_repeats_bit_for_bit(op, backend):
    args = testing.inputs(op, "odd")
    first = with_gradients(op, args)
    for _ in range(20):
        testing.assert_bit_equal(with_gradients(op, args), first)


@pytest.mark.parametrize("empty", ["n_instances", "batch", "n_components", "rank", "d_in", "d_out"])
@both
def test_schatten_factored_of_empty_axes_is_defined(op, backend, empty):
    sizes = {"n_instances": 2, "batch": 3, "n_components": 3, "rank": 2, "d_in": 4, "d_out": 5} | {empty: 0}
    k = 0.0 if empty == "n_components" else 1.0
    args = testing.inputs(op, testing.Case("", n_outputs=0, k=k, **sizes), torch.float64)
    cotangents = [torch.ones_like(t) for t in testing.run(op, args).outputs]
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)


@both
def test_schatten_factored_propagates_nan_to_its_instance(op, backend):
    args = testing.inputs(op, "odd")
    clean = testing.run(op, args).outputs[0]
    args[0][0, 3, 2, 1] = torch.nan
    found = testing.run(op, args).outputs[0]
    assert found[0].isnan()
    testing.assert_bit_equal(found[1], clean[1])


@pytest.mark.parametrize("eps", [0.0, 1e-16])
@pytest.mark.parametrize("p", [0.5, 0.9, 1.0, 2.0])
@both
def test_schatten_factored_of_a_zero_component_has_a_finite_gradient(op, backend, p, eps):
    A, B, weights, *_ = testing.inputs(op, "odd", torch.float64)
    A[:, 2], B[:, 2] = 0, 0
    A[:, 3] = 0
    if op == MASKED:
        weights[:, 5] = 0
    function, floats = of_floats(op, (A, B, weights, p, eps))
    total = function(*floats)
    assert total.isfinite().all()
    for grad in torch.autograd.grad(total.sum(), floats):
        assert grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1e4, 1e9])
@both
def test_schatten_factored_at_scales_whose_fourth_power_is_representable(op, backend, scale):
    A, B, weights, p, eps, *_ = testing.inputs(op, "odd")
    args = (A * scale, B, weights, p, eps)
    testing.assert_matches_reference(op, testing.run(op, args).outputs, args, backend)


@pytest.mark.xfail(strict=True, reason="|a|^2 |b|^2 overflows in float32 where its power p / 2 would be representable")
@both
def test_schatten_factored_at_any_scale_that_float64_can_represent(op, backend):
    A, B, weights, p, eps, *_ = testing.inputs(op, "odd")
    args = (A * 1e12, B * 1e12, weights, p, eps)
    testing.assert_matches_reference(op, testing.run(op, args).outputs, args, backend)


@both
def test_schatten_factored_does_not_depend_on_the_order_of_components(op, backend):
    A, B, weights, p, eps, *batch = testing.inputs(op, "odd", torch.float64)
    turned = (A.flip(1), B.flip(1), weights.flip(-1), p, eps, *batch)
    wanted = ops.schatten_factored(A, B, weights, p, eps, *batch)
    torch.testing.assert_close(ops.schatten_factored(*turned), wanted, rtol=1e-13, atol=0)


def test_schatten_factored_of_counts_is_that_of_the_mask_they_count():
    x, A, B, selection = testing.inputs("component_forward_selected", "resid", torch.float64)
    mask = selection.mask.double()
    torch.testing.assert_close(
        ops.schatten_factored(A, B, selection.counts, 0.9, 1e-8, x.shape[1]),
        ops.schatten_factored(A, B, mask, 0.9, 1e-8),
        rtol=1e-13,
        atol=0,
    )


def test_schatten_factored_adds_the_constant_of_unused_components_when_asked():
    A, B, counts, p, _, batch = testing.inputs(COUNTS, "tms", torch.float64)
    unused = batch * A.shape[1] - counts.sum(-1)
    with_constant = ops.schatten_factored(A, B, counts, p, 1e-4, batch)
    without = ops.schatten_factored(A, B, counts, p, 1e-4)
    torch.testing.assert_close(with_constant - without, unused.double() * 3 * 1e-4 ** (p / 2), rtol=1e-9, atol=0)


def test_schatten_factored_is_the_true_sum_for_orthogonal_factors_and_bounds_it_for_p_of_one():
    A, B, counts, *_ = testing.inputs(COUNTS, "odd", torch.float64)
    ones = torch.ones_like(counts)
    values = torch.linalg.svdvals(A @ B)
    assert (ops.schatten_factored(A, B, ones, 1.0, 0.0) >= values.sum((-1, -2)) * (1 - 1e-12)).all()
    U, s, Vh = torch.linalg.svd(torch.randn(2, 3, 6, 5, dtype=torch.float64), full_matrices=False)
    total = ops.schatten_factored(U * s.unsqueeze(-2), Vh, torch.ones(2, 3, dtype=torch.int64), 0.7, 0.0)
    torch.testing.assert_close(total, s.pow(0.7).sum((-1, -2)), rtol=1e-13, atol=0)


A = torch.zeros(2, 3, 4, 2)
B = torch.zeros(2, 3, 2, 5)
N = torch.zeros(2, 3, dtype=torch.int64)
M = torch.zeros(2, 6, 3)
FACTORS = "A [2, 3, 4, 2]"
REFUSED = [
    (ValueError, (A[0, 0], B, N, 1.0), "A must have shape [n_components, d_in, rank] or [n_instances, n_components, "
     "d_in, rank], got [4, 2]"),
    (ValueError, (A, B[:, :2], N, 1.0), "A and B must share n_components, got A [2, 3, 4, 2] and B [2, 2, 2, 5]"),
    (TypeError, (A, B.double(), N, 1.0), "B must have the dtype of A, torch.float32, got torch.float64"),
    (TypeError, (A.int(), B, N, 1.0), "A must be float32, float64, float16 or bfloat16, got torch.int32"),
    (ValueError, (A, B.to("meta"), N, 1.0), "B must be on the device of A, cpu, got meta"),
    (TypeError, (A, None, N, 1.0), "B must be a torch.Tensor, got NoneType"),
    *[(ValueError, (A, B, w, p), f"p must be in (0, inf), got {p}")
      for w in (N, M) for p in (0, 0.0, -1.0, math.inf, -math.inf, math.nan)],
    (TypeError, (A, B, N, True), "p must be a float, got bool True"),
    (TypeError, (A, B, N, "1"), "p must be a float, got str '1'"),
    (TypeError, (A, B, N, None), "p must be a float, got NoneType None"),
    *[(ValueError, (A, B, N, 1.0, eps), f"eps must be in [0, inf), got {eps}") for eps in (-1e-9, math.inf, math.nan)],
    (TypeError, (A, B, N, 1.0, None), "eps must be a float, got NoneType None"),
    (ValueError, (A, B, M, 1.0, 0.0, 6), "batch must be None with a float mask, which has its own batch axis, got 6"),
    (ValueError, (A, B, N, 1.0, 0.0, -1), "batch must be in [0, 2**62], got -1"),
    (TypeError, (A, B, N, 1.0, 0.0, 6.0), "batch must be an int, got float 6.0"),
    (TypeError, (A, B, N, 1.0, 0.0, True), "batch must be an int, got bool True"),
    (TypeError, (A, B, N.bool(), 1.0), "weights must be integer counts or a float mask, got torch.bool; use "
     "mask.sum(-2)"),
    (TypeError, (A, B, N.cfloat(), 1.0), "weights must be integer counts or a float mask, got torch.complex64"),
    (TypeError, (A, B, [1], 1.0), "weights must be a torch.Tensor, got list"),
    (ValueError, (A, B, N.to("meta"), 1.0), "weights must be on the device of A, cpu, got meta"),
    (ValueError, (A, B, M.to("meta"), 1.0), "weights must be on the device of A, cpu, got meta"),
    (ValueError, (A, B, N[0], 1.0), f"weights, integer counts, must have shape [.., n_components] for {FACTORS}, "
     "got [3]"),
    (ValueError, (A, B, M[0], 1.0), f"weights, a float mask, must have shape [.., batch, n_components] for {FACTORS}, "
     "got [6, 3]"),
    (ValueError, (A, B, M[..., :2], 1.0), "weights, a float mask, must have shape [.., batch, n_components] for "
     f"{FACTORS}, got [2, 6, 2]"),
    (TypeError, (A, B, M.double(), 1.0), "weights must have the dtype of A, torch.float32, got torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize("error, arguments, message", REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_schatten_factored_refuses(error, arguments, message):
    with pytest.raises(error, match=re.escape(f"schatten_factored: {message}") + "$"):
        ops.schatten_factored(*arguments)


def epsilon_outside_the_power(right, A, B, weights, p, eps, *batch):
    return right(A, B, weights, p, 0.0, *batch) + eps ** (p / 2)


@both
def test_schatten_factored_planted_error_is_found(op, backend, plant):
    A, B, weights, p, _, *batch = testing.inputs(op, "odd")
    args = (A, B, weights, p, 1e-2, *batch)
    plant(op, backend, epsilon_outside_the_power)
    with pytest.raises(AssertionError, match=f"^{op} on {backend}"):
        testing.assert_matches_reference(op, testing.run(op, args).outputs, args, backend)
