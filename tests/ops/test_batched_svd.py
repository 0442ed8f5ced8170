"""Schatten sums, exact and from column lengths, and singular values: what the four ops of the stem have in common.

How exact the exact ones are is in test_batched_svd_accuracy.py.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.autograd import gradcheck

from fastapd import backends, ops, testing
from fastapd.ops._batched_svd import schatten_accumulate

EXACT, COUNTS, MASKED, VALUES = OPS = ("schatten", "schatten_factored", "schatten_factored_masked", "component_svdvals")
TINY = testing.Case("tiny", 2, 3, 2, 2, 3, 2, n_outputs=0)
# each op shares its components among threads
LARGE = testing.Case("large", 2, 100, 40, 8, 64, 48, n_outputs=0, k=3.0)
every = pytest.mark.parametrize("op, backend", testing.pairs(*OPS), indirect=["backend"])
sums = pytest.mark.parametrize("op, backend", testing.pairs(EXACT, COUNTS, MASKED), indirect=["backend"])
counted = pytest.mark.parametrize("op, backend", testing.pairs(EXACT, COUNTS), indirect=["backend"])
factored = pytest.mark.parametrize("op, backend", testing.pairs(COUNTS, MASKED), indirect=["backend"])


into = pytest.mark.parametrize("_, backend", testing.pairs("schatten_accumulate"), indirect=["backend"])
either = pytest.mark.parametrize("exact", [True, False], ids=["exact", "factored"])


def with_gradients(op: str, args: tuple) -> testing.Answer:
    return testing.run(op, args, testing.random_cotangents(testing.run(op, args).outputs))


def of_floats(op: str, args: tuple):
    """The public op as a function of its differentiable arguments, and those as leaves."""
    n, public = (3, COUNTS) if op == MASKED else (2, op)
    return lambda *floats: getattr(ops, public)(*floats, *args[n:]), [t.detach().requires_grad_() for t in args[:n]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
@every
def test_schatten_matches_the_reference(op, backend, case, dtype):
    args = testing.inputs(op, case, dtype)
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [1e-3, 0.5, 1, 1.5, 2, 3.0])
@sums
def test_schatten_takes_any_p(op, backend, p, dtype):
    A, B, weights, _, eps, *batch = testing.inputs(op, "odd", dtype)
    args = (A, B, weights, p, eps, *batch)
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_schatten_takes_half_precision(op, dtype):
    args = testing.inputs(op, "single", dtype)
    if op != VALUES:
        A, B, weights, p, _, *batch = args
        args = (A, B, weights, p, 1e-4, *batch)
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    outputs, grads = testing.run(op, args, cotangents)
    assert {t.dtype for t in (*outputs, *grads)} == {dtype}
    testing.assert_matches_reference(op, outputs, args, "auto", grads=grads, cotangents=cotangents)
    with backends.use_backend("cpu"), pytest.raises(NotImplementedError, match=f"^{op}: no backend can run"):
        testing.run(op, args)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
@counted
def test_schatten_takes_counts_of_any_integer(op, backend, dtype):
    A, B, counts, p, eps, batch = testing.inputs(op, "tms")
    counts[0, 2] = 0
    wanted = with_gradients(op, (A, B, counts, p, eps, batch))
    testing.assert_bit_equal(with_gradients(op, (A, B, counts.to(dtype), p, eps, batch)), wanted)


@every
def test_schatten_passes_gradcheck(op, backend):
    function, floats = of_floats(op, testing.inputs(op, TINY, torch.float64))
    assert gradcheck(function, floats)


@every
def test_schatten_refuses_a_second_derivative(op, backend):
    function, floats = of_floats(op, testing.inputs(op, TINY, torch.float64))
    name = COUNTS if op == MASKED else op
    wanted = f"{name}: a second derivative is not computed; call backward without create_graph=True"
    with pytest.raises(NotImplementedError, match=re.escape(wanted) + "$"):
        torch.autograd.grad(function(*floats).sum(), floats, create_graph=True)
    with pytest.raises(NotImplementedError, match=re.escape(wanted) + "$"):
        gradcheck(lambda *t: torch.autograd.grad(function(*t).sum(), t, create_graph=True), floats)


@every
def test_schatten_gradient_goes_only_where_asked(op, backend):
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


@every
def test_schatten_passes_opcheck(op, backend):
    args = testing.inputs(op, TINY, torch.float64)
    _, floats = of_floats(op, args)
    torch_op = getattr(torch.ops.fastapd, op)
    if op == VALUES:
        torch.library.opcheck(torch_op, floats)
    else:
        torch.library.opcheck(torch_op, (*floats, *args[len(floats) :], True))
        torch.library.opcheck(torch_op, (*args, False))


@pytest.mark.parametrize("op", OPS)
def test_schatten_compiles_to_one_graph(op):
    args = testing.inputs(op, "rank1")
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    wanted = testing.run(op, args, cotangents)
    function, floats = of_floats(op, args)
    total = torch.compile(function, fullgraph=True, backend="aot_eager")(*floats)
    total.backward(*cotangents)
    testing.assert_bit_equal([total, *(t.grad for t in floats)], [*wanted.outputs, *wanted.grads])


@every
def test_schatten_needs_no_instance_axis(op, backend):
    args = testing.inputs(op, "odd", torch.float64)
    one = testing.map_tensors(lambda t: t[0], args)
    cotangents = testing.random_cotangents(testing.run(op, one).outputs)
    outputs, grads = testing.run(op, one, cotangents)
    assert outputs[0].shape == (args[0].shape[1::2] if op == VALUES else ())
    testing.assert_matches_reference(op, outputs, one, backend, grads=grads, cotangents=cotangents)
    first = testing.run(op, testing.map_tensors(lambda t: t[:1], args), [c.unsqueeze(0) for c in cotangents])
    testing.assert_bit_equal((outputs, grads), testing.map_tensors(lambda t: t[0], tuple(first)))


@pytest.mark.parametrize("view", testing.VIEWS)
@every
def test_schatten_takes_any_strides(op, backend, view):
    args = testing.inputs(op, "odd")
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    found = testing.run(op, testing.map_tensors(testing.VIEWS[view], args), cotangents)
    # the order of a sum over an axis may follow the strides: equal within the tolerance, not in every bit
    testing.assert_matches_reference(op, found.outputs, args, backend, grads=found.grads, cotangents=cotangents)


@every
def test_schatten_takes_expanded_tensors(op, backend):
    expanded = testing.map_tensors(lambda t: t[:1].expand(3, *t.shape[1:]), testing.inputs(op, "odd"))
    dense = testing.map_tensors(lambda t: t.clone(memory_format=torch.contiguous_format), expanded)
    cotangents = [t.new_ones(()).expand_as(t) for t in testing.run(op, expanded).outputs]
    outputs, grads = testing.run(op, expanded, cotangents)
    testing.assert_matches_reference(op, outputs, dense, backend, grads=grads, cotangents=cotangents)


@every
def test_schatten_leaves_its_inputs_alone(op, backend):
    args = testing.inputs(op, "tms_40")
    before = testing.map_tensors(torch.clone, args)
    with_gradients(op, args)
    testing.assert_bit_equal(args, before)


@every
def test_schatten_repeats_bit_for_bit(op, backend, repeats):
    args = testing.inputs(op, "odd")
    first = with_gradients(op, args)
    for _ in range(repeats):
        testing.assert_bit_equal(with_gradients(op, args), first)


@pytest.mark.parametrize("empty", ["n_instances", "batch", "n_components", "rank", "d_in", "d_out"])
@every
def test_schatten_of_empty_axes_is_defined(op, backend, empty):
    sizes = {"n_instances": 2, "batch": 3, "n_components": 3, "rank": 2, "d_in": 4, "d_out": 5} | {empty: 0}
    k = 0.0 if empty == "n_components" else 1.0
    args = testing.inputs(op, testing.Case("", n_outputs=0, k=k, **sizes), torch.float64)
    cotangents = [torch.ones_like(t) for t in testing.run(op, args).outputs]
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every
def test_schatten_keeps_a_nan_in_its_component(op, backend, value):
    args = testing.inputs(op, "odd")
    clean = with_gradients(op, args)
    args[0][0, 3, 2, 1] = value
    (found,), grads = with_gradients(op, args)
    if op == VALUES:
        assert found[0, 3].isnan().all()
        found[0, 3] = clean.outputs[0][0, 3]
    else:
        assert not found[0].isfinite()
        found[0] = clean.outputs[0][0]
    testing.assert_bit_equal(found, clean.outputs[0])
    for grad, wanted in zip(grads[:2], clean.grads, strict=False):
        assert not grad[0, 3].isfinite().all()
        grad[0, 3] = wanted[0, 3]
        testing.assert_bit_equal(grad, wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@counted
def test_schatten_of_an_unused_component_is_nothing_whatever_it_holds(op, backend, value):
    A, B, counts, *rest = testing.inputs(op, "odd")
    counts[0, 3], counts[1, :] = 0, 0
    clean = with_gradients(op, (A, B, counts, *rest))
    A[0, 3], B[0, 3, 1] = value, value
    A[1, 5], B[1, 6] = value, value
    found = with_gradients(op, (A, B, counts, *rest))
    testing.assert_bit_equal(found, clean)
    assert found.outputs[0].isfinite().all()
    for grad in found.grads:
        assert not grad[0, 3].any() and not grad[1].any()


@pytest.mark.parametrize("eps", [0.0, 1e-16])
@pytest.mark.parametrize("p", [0.5, 0.9, 1.0, 2.0])
@sums
def test_schatten_of_a_zero_component_has_a_finite_gradient(op, backend, p, eps):
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


SCALES = [1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e30]


@pytest.mark.parametrize("scale_B", SCALES)
@pytest.mark.parametrize("scale_A", SCALES)
@sums
def test_schatten_at_any_scale_that_float64_can_represent(op, backend, scale_A, scale_B):
    A, B, weights, p, eps, *_ = testing.inputs(op, "rank1" if op == EXACT else "odd")
    args = (A * scale_A, B * scale_B, weights, p, eps)
    cotangents = [t.new_ones(t.shape) for t in testing.run(op, args).outputs]
    exact = testing.oracle(op, args, cotangents)
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend)
    for got, wanted in zip(grads, exact.grads, strict=True):
        sound = (wanted.abs() <= 3e38) & (wanted.abs() >= 1e-37)  # neither infinite nor denormal in float32
        assert sound.any() or wanted.abs().max() > 3e38 or wanted.abs().max() < 1e-37
        torch.testing.assert_close(got[sound].double(), wanted[sound], rtol=1e-5, atol=0)
        assert got[wanted.abs() <= 3e38].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_schatten_is_independent_of_threads(backend, op, dtype, threads):
    args = testing.inputs(op, LARGE, dtype)
    threads(1)
    alone = with_gradients(op, args)
    for n in (2, 3):
        threads(n)
        testing.assert_bit_equal(with_gradients(op, args), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
def test_schatten_at_every_level(cpu_level, op, dtype):
    for case in ("tms", "odd", "wide"):
        args = testing.inputs(op, case, dtype)
        cotangents = testing.random_cotangents(testing.run(op, args).outputs)
        outputs, grads = testing.run(op, args, cotangents)
        testing.assert_matches_reference(op, outputs, args, f"cpu {cpu_level}", grads=grads, cotangents=cotangents)


@sums
def test_schatten_does_not_depend_on_the_order_of_components(op, backend):
    A, B, weights, p, eps, *batch = testing.inputs(op, "odd", torch.float64)
    turned = (A.flip(1), B.flip(1), weights.flip(-1), p, eps, *batch)
    public = ops.schatten if op == EXACT else ops.schatten_factored
    torch.testing.assert_close(public(*turned), public(A, B, weights, p, eps, *batch), rtol=1e-13, atol=0)


def test_schatten_of_counts_is_that_of_the_mask_they_count():
    x, A, B, selection = testing.inputs("component_forward_selected", "resid", torch.float64)
    mask = selection.mask.double()
    torch.testing.assert_close(
        ops.schatten_factored(A, B, selection.counts, 0.9, 1e-8, x.shape[1]),
        ops.schatten_factored(A, B, mask, 0.9, 1e-8),
        rtol=1e-13,
        atol=0,
    )


@counted
def test_schatten_adds_the_constant_of_unused_components_when_asked(op, backend):
    A, B, counts, p, _, batch = testing.inputs(op, "tms", torch.float64)
    unused = batch * A.shape[1] - counts.sum(-1)
    public = getattr(ops, op)
    with_constant, without = public(A, B, counts, p, 1e-4, batch), public(A, B, counts, p, 1e-4)
    torch.testing.assert_close(with_constant - without, unused.double() * 3 * 1e-4 ** (p / 2), rtol=1e-9, atol=0)


@counted
def test_schatten_takes_the_largest_batch_and_exponent(op, backend):
    A, B, counts, *_ = testing.inputs(op, "odd", torch.float64)
    unused = 2.0**53 * A.shape[1] - counts.sum(-1).double()
    found = getattr(ops, op)(A, B, counts, 1.0, 1e-4, 2**53)
    torch.testing.assert_close(found, unused * 7 * 1e-2, rtol=1e-12, atol=0)
    assert getattr(ops, op)(A, B, counts, 1e308, 2.0, 37).isinf().all()
    assert not getattr(ops, op)(A / 1e3, B, counts, 1e308, 1e-4, 37).any()


def test_schatten_is_the_true_sum_for_orthogonal_factors_and_bounds_it_for_p_of_one():
    A, B, counts, *_ = testing.inputs(COUNTS, "odd", torch.float64)
    ones = torch.ones_like(counts)
    values = torch.linalg.svdvals(A @ B)
    assert (ops.schatten_factored(A, B, ones, 1.0, 0.0) >= values.sum((-1, -2)) * (1 - 1e-12)).all()
    U, s, Vh = torch.linalg.svd(torch.randn(2, 3, 6, 5, dtype=torch.float64), full_matrices=False)
    total = ops.schatten_factored(U * s.unsqueeze(-2), Vh, torch.ones(2, 3, dtype=torch.int64), 0.7, 0.0)
    torch.testing.assert_close(total, s.pow(0.7).sum((-1, -2)), rtol=1e-13, atol=0)


# ------------------------------------------------------------------------------------------------- into given gradients


def accumulated(args: tuple, exact: bool) -> tuple:
    """The arguments of `schatten_accumulate`, in one of its forms, with copies of the gradients."""
    return (*args[:6], exact, args[7], *(t.clone() for t in args[8:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
@either
@into
def test_schatten_accumulate_adds_the_gradients_of_the_sum(_, backend, case, exact, dtype):
    if dtype == torch.float16 and backend == "cpu":
        pytest.skip("float16 runs on the reference")
    args = accumulated(testing.inputs("schatten_accumulate", case, dtype), exact)
    A, B, counts, p, eps, batch, _, scale, grad_At, grad_B = args
    before, versions = [t.clone() for t in args[-2:]], [t._version for t in args[-2:]]
    found = schatten_accumulate(*args)
    leaves = [t.double().requires_grad_() for t in (A, B)]
    total = (ops.schatten if exact else ops.schatten_factored)(*leaves, counts, p, eps, batch)
    total.sum().backward()
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    if dtype == torch.float64:
        tolerance = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(found.double(), total.detach(), **tolerance)
    for got, had, leaf in ((grad_At, before[0], leaves[0].grad.mT), (grad_B, before[1], leaves[1].grad)):
        size = max(1.0, leaf.abs().max().item()) if leaf.numel() else 1.0
        torch.testing.assert_close(got.double() / size, (had.double() + scale * leaf) / size, **tolerance)
    assert all(t._version > n for t, n in zip(args[-2:], versions, strict=True))


@either
@into
def test_schatten_accumulate_leaves_gradients_of_unused_components_alone(_, backend, exact):
    args = accumulated(testing.inputs("schatten_accumulate", "odd"), exact)
    A, _, counts, *_, grad_At, grad_B = args
    counts[0, 3], counts[1] = 0, 0
    A[0, 3], grad_At[0, 3], grad_B[1, 2] = math.nan, 3.0, math.nan
    before = grad_At.clone(), grad_B.clone()
    assert schatten_accumulate(*args).isfinite().all()
    testing.assert_bit_equal((grad_At[0, 3], grad_At[1], grad_B[0, 3], grad_B[1]),
                             (before[0][0, 3], before[0][1], before[1][0, 3], before[1][1]))  # fmt: skip
    used = counts[0] > 0
    assert (grad_At[0, used] != before[0][0, used]).any((-1, -2)).all()


@either
@into
def test_schatten_accumulate_twice_adds_twice(_, backend, exact):
    args = accumulated(testing.inputs("schatten_accumulate", "tms_40", torch.float64), exact)
    before = [t.clone() for t in args[-2:]]
    first = schatten_accumulate(*args)
    once = [t.clone() for t in args[-2:]]
    testing.assert_bit_equal(schatten_accumulate(*args), first)
    for a, b, c in zip(before, once, args[-2:], strict=True):
        torch.testing.assert_close(c - b, b - a, rtol=0, atol=1e-13 * float((b - a).abs().max()))


@either
@into
def test_schatten_accumulate_through_the_dispatcher_is_the_same(_, backend, exact):
    before = testing.inputs("schatten_accumulate", "odd")
    args, others = accumulated(before, exact), accumulated(before, exact)
    with torch.no_grad():  # without a graph it goes around the dispatcher
        total = schatten_accumulate(*args)
    testing.assert_bit_equal(schatten_accumulate(*accumulated(before, exact)), total)
    testing.assert_bit_equal(torch.ops.fastapd.schatten_accumulate(*others), total)
    testing.assert_bit_equal(others[-2:], args[-2:])
    torch.library.opcheck(torch.ops.fastapd.schatten_accumulate, args)


@either
def test_schatten_accumulate_compiles_to_one_graph(exact):
    args = accumulated(testing.inputs("schatten_accumulate", "rank1"), exact)
    others = accumulated(args, exact)
    total = torch.compile(schatten_accumulate, fullgraph=True, backend="aot_eager")(*others)
    testing.assert_bit_equal((total, others[-2:]), (schatten_accumulate(*args), args[-2:]))


@either
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_schatten_accumulate_is_independent_of_threads(backend, exact, threads):
    args = testing.inputs("schatten_accumulate", LARGE)
    found = []
    for n in (1, 2, 3):
        threads(n)
        mine = accumulated(args, exact)
        found.append((schatten_accumulate(*mine), *mine[-2:]))
    testing.assert_bit_equal(found[1:], [found[0]] * 2)


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
    (ValueError, (A, B, N, 1.0, 0.0, -1), "batch must be in [0, 2**53], got -1"),
    *[(ValueError, (A, B, N, 1.0, 0.0, n), f"batch must be in [0, 2**53], got {n}") for n in (2**53 + 1, 2**62, 2**64)],
    (ValueError, (A, B, N, 1.0, 0.0, 10**400), "batch must be in [0, 2**53], got an int beyond float64"),
    (ValueError, (A, B, N, 10**400), "p must be in (0, inf), got an int beyond float64"),
    (ValueError, (A, B, N, -(10**5000)), "p must be in (0, inf), got an int beyond float64"),
    (ValueError, (A, B, N, 1.0, 10**400), "eps must be in [0, inf), got an int beyond float64"),
    (TypeError, (A, B, N.to_sparse(), 1.0), "weights must be a dense tensor, got layout torch.sparse_coo; call "
     ".to_dense()"),
    (TypeError, (A, B, M.to_sparse(), 1.0), "weights must be a dense tensor, got layout torch.sparse_coo; call "
     ".to_dense()"),
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
def test_schatten_refuses(error, arguments, message):
    with pytest.raises(error, match=re.escape(f"schatten_factored: {message}") + "$"):
        ops.schatten_factored(*arguments)


EXACT_REFUSED = [
    (TypeError, (A, B, M, 1.0), "counts must be integers, got torch.float32; a float mask goes to schatten_factored"),
    (TypeError, (A, B, N.bool(), 1.0), "counts must be integers, got torch.bool; use mask.sum(-2)"),
    (TypeError, (A, B, N.cfloat(), 1.0), "counts must be integers, got torch.complex64"),
    (TypeError, (A, B, N.to_sparse(), 1.0), "counts must be a dense tensor, got layout torch.sparse_coo; call "
     ".to_dense()"),
    (TypeError, (A, B, None, 1.0), "counts must be a torch.Tensor, got NoneType"),
    (ValueError, (A, B, N.to("meta"), 1.0), "counts must be on the device of A, cpu, got meta"),
    (ValueError, (A, B, N[0], 1.0), f"counts must have shape [.., n_components] for {FACTORS}, got [3]"),
    (ValueError, (A, B, N, 0.0), "p must be in (0, inf), got 0.0"),
    (ValueError, (A, B, N, 1.0, -1.0), "eps must be in [0, inf), got -1.0"),
    (ValueError, (A, B, N, 1.0, 0.0, 2**62), f"batch must be in [0, 2**53], got {2**62}"),
    (ValueError, (A, B[:1], N, 1.0), "A and B must share n_instances, got A [2, 3, 4, 2] and B [1, 3, 2, 5]"),
]  # fmt: skip
VALUES_REFUSED = [
    (ValueError, (A[0, 0], B), "A must have shape [n_components, d_in, rank] or [n_instances, n_components, d_in, "
     "rank], got [4, 2]"),
    (ValueError, (A, B[:, :, :1]), "A and B must share rank, got A [2, 3, 4, 2] and B [2, 3, 1, 5]"),
    (TypeError, (A, B.double()), "B must have the dtype of A, torch.float32, got torch.float64"),
    (TypeError, (A.long(), B), "A must be float32, float64, float16 or bfloat16, got torch.int64"),
    (ValueError, (A, B.to("meta")), "B must be on the device of A, cpu, got meta"),
    (TypeError, (A.to_sparse(), B), "A must be a dense tensor, got layout torch.sparse_coo; call .to_dense()"),
    (TypeError, (A, B.tolist()), "B must be a torch.Tensor, got list"),
]  # fmt: skip

G, H = torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 5)


def into_gradients(**changed) -> tuple:
    return tuple(({"A": A, "B": B, "counts": N, "p": 1.0, "eps": 0.0, "batch": -1, "exact": True, "scale": 1.0,
                   "grad_At": G, "grad_B": H} | changed).values())  # fmt: skip


ACCUMULATE_REFUSED = [
    (ValueError, {"A": A[0], "B": B[0], "counts": N[0]}, "A must have shape [n_instances, n_components, d_in, rank], "
     "got [3, 4, 2]; unsqueeze it"),
    (ValueError, {"B": B[:, :, :1]}, "A and B must share rank, got A [2, 3, 4, 2] and B [2, 3, 1, 5]"),
    (TypeError, {"counts": M}, "counts must be integers, got torch.float32"),
    (ValueError, {"counts": N[0]}, f"counts must have shape [.., n_components] for {FACTORS}, got [3]"),
    (ValueError, {"p": 0.0}, "p must be in (0, inf), got 0.0"),
    (ValueError, {"eps": -1.0}, "eps must be in [0, inf), got -1.0"),
    (TypeError, {"batch": None}, "batch must be an int, got NoneType None"),
    (ValueError, {"batch": -2}, "batch must be in [-1, 2**53], got -2"),
    (TypeError, {"scale": None}, "scale must be a float, got NoneType None"),
    (ValueError, {"grad_At": G.mT.contiguous()}, "grad_At must have shape [2, 3, 2, 4], got [2, 3, 4, 2]"),
    (ValueError, {"grad_B": H[:1]}, "grad_B must have shape [2, 3, 2, 5], got [1, 3, 2, 5]"),
    (ValueError, {"grad_At": torch.zeros(2, 3, 4, 2).mT}, "grad_At must be contiguous, got strides [24, 8, 1, 2]"),
    (ValueError, {"grad_B": torch.zeros(2, 3, 2, 9)[..., :5]}, "grad_B must be contiguous, got strides [54, 18, 9, 1]"),
    (TypeError, {"grad_At": G.double()}, "grad_At must have the dtype of A, torch.float32, got torch.float64"),
    (TypeError, {"grad_B": None}, "grad_B must be a torch.Tensor, got NoneType"),
    (ValueError, {"grad_B": H.to("meta")}, "grad_B must be on the device of A, cpu, got meta"),
    *[(NotImplementedError, {name: t.clone().requires_grad_()}, f"{name} must not require gradients, as the gradients "
       "are a result; detach it") for name, t in (("A", A), ("B", B), ("grad_At", G), ("grad_B", H))],
]  # fmt: skip


@pytest.mark.parametrize("error, changed, message", ACCUMULATE_REFUSED)
def test_schatten_accumulate_refuses(error, changed, message):
    with pytest.raises(error, match=re.escape(f"schatten_accumulate: {message}") + "$"):
        schatten_accumulate(*into_gradients(**changed))
    if error is not NotImplementedError:  # without a graph plain tensors are checked in another way
        with torch.no_grad(), pytest.raises(error, match=re.escape(f"schatten_accumulate: {message}") + "$"):
            schatten_accumulate(*into_gradients(**changed))


@pytest.mark.parametrize(
    "op, error, arguments, message",
    [(op, *row) for op, rows in ((EXACT, EXACT_REFUSED), (VALUES, VALUES_REFUSED)) for row in rows],
)
def test_schatten_and_svdvals_refuse(op, error, arguments, message):
    with pytest.raises(error, match=re.escape(f"{op}: {message}") + "$"):
        getattr(ops, op)(*arguments)
