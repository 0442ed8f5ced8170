"""attribution_reduce: a_bc = sum_o (sum_l <x_lb A_lc, g_lbo B_lc^T>)^2."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import gradcheck

from fastapd import backends, ops, testing
from fastapd.ops._attribution_reduce import CPU_LIMIT

OP, BACKWARD = "attribution_reduce", "attribution_reduce_backward"
TINY = testing.Case("tiny", 2, 3, 3, 2, 3, 2, n_outputs=2)
# shares its samples among threads
LARGE = testing.Case("large", 2, 150, 20, 4, 30, 20, n_outputs=7)
# more components than the backward kernel sums gradients of at once, with and without a remainder
MANY = testing.Case("many", 2, 9, 43, 4, 40, 24, n_outputs=3)
ONE = testing.Case("one", 2, 21, 1, 3, 7, 5, n_outputs=2)
ONE_OF_ALL = testing.Case("one of all", 1, 1, 1, 1, 1, 1, n_outputs=1)
each = pytest.mark.parametrize("backend", testing.cpu_backends(OP), indirect=True)


def with_gradients(args: tuple) -> testing.Answer:
    return testing.run(OP, args, testing.random_cotangents(testing.run(OP, args).outputs))


def of_factors(args: tuple):
    """The op as a function of its factors alone, and those factors as leaves."""
    xs, gs, As, Bs = args
    n = len(xs)
    factors = [t.detach().requires_grad_() for t in (*As, *Bs)]
    return lambda *factors: ops.attribution_reduce(xs, gs, factors[:n], factors[n:]), factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
@each
def test_attribution_reduce_matches_the_reference(backend, case, dtype):
    args = testing.inputs(OP, case, dtype)
    cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
    outputs, grads = testing.run(OP, args, cotangents)
    testing.assert_matches_reference(OP, outputs, args, backend, grads=grads, cotangents=cotangents)


@each
def test_attribution_reduce_of_one_layer_matches_the_reference(backend):
    for shared in (False, True):
        xs, gs, As, Bs = (ts[:1] for ts in testing.inputs(OP, "wide"))
        args = (xs, [gs[0][:, :1]] if shared else gs, As, Bs)
        testing.assert_matches_reference(OP, testing.run(OP, args).outputs, args, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attribution_reduce_takes_half_precision(dtype):
    args = testing.inputs(OP, "tms_40", dtype)
    outputs, grads = with_gradients(args)
    assert {t.dtype for t in (*outputs, *grads)} == {dtype}
    testing.assert_matches_reference(OP, outputs, args, "auto")
    with backends.use_backend("cpu"), pytest.raises(NotImplementedError, match=f"^{OP}: no backend can run"):
        testing.run(OP, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", [MANY, ONE, ONE_OF_ALL, LARGE], ids=lambda case: case.name)
@each
def test_attribution_reduce_gradient_of_few_and_of_many_components(backend, case, shared, dtype):
    xs, gs, As, Bs = testing.inputs(OP, case, dtype)
    args = (xs, [g[:, :1] for g in gs] if shared else gs, As, Bs)
    cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
    outputs, grads = testing.run(OP, args, cotangents)
    testing.assert_matches_reference(OP, outputs, args, backend, grads=grads, cotangents=cotangents)


@each
def test_attribution_reduce_gradient_of_every_component_is_its_own(backend):
    """A component's gradients do not depend on how many others there are, nor on where it stands among them."""
    xs, gs, As, Bs = testing.inputs(OP, MANY, torch.float64)
    (cotangent,) = testing.random_cotangents(testing.run(OP, (xs, gs, As, Bs)).outputs)
    _, everything = testing.run(OP, (xs, gs, As, Bs), [cotangent])
    for c in (0, 1, 9, 10, 11, 41, 42):
        part = (xs, gs, [A[:, c : c + 1] for A in As], [B[:, c : c + 1] for B in Bs])
        for got, whole in zip(testing.run(OP, part, [cotangent[..., c : c + 1]]).grads, everything, strict=True):
            torch.testing.assert_close(got, whole[:, c : c + 1], rtol=1e-12, atol=1e-12)


@each
def test_attribution_reduce_passes_gradcheck(backend):
    function, factors = of_factors(testing.inputs(OP, TINY, torch.float64))
    assert gradcheck(function, factors)


@each
def test_attribution_reduce_refuses_a_second_derivative(backend):
    function, factors = of_factors(testing.inputs(OP, TINY, torch.float64))
    grads = torch.autograd.grad(function(*factors).sum(), factors, create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match=f"^{BACKWARD}: is not differentiable; detach its inputs$"):
            grad.sum().backward(retain_graph=True)


@each
def test_attribution_reduce_gradient_of_tied_layers_adds_up(backend):
    xs, gs, As, Bs = args = testing.inputs(OP, "tms", torch.float64)
    cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
    At, B = As[0].mT.clone().requires_grad_(), Bs[0].clone().requires_grad_()
    ops.attribution_reduce(xs, gs, [At.mT, B.mT], [B, At]).backward(cotangents[0])
    dA, dA2, dB, dB2 = testing.oracle(OP, args, cotangents).grads
    torch.testing.assert_close(At.grad, dA.mT + dB2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B.grad, dB + dA2.mT, rtol=1e-12, atol=1e-12)


@each
def test_attribution_reduce_gradient_goes_only_where_asked(backend):
    args = testing.inputs(OP, "odd", torch.float64)
    everything = with_gradients(args).grads
    for wanted in range(16):
        function, factors = of_factors(args)
        for i, factor in enumerate(factors):
            factor.requires_grad_(bool(wanted >> i & 1))
        a = function(*factors)
        assert a.requires_grad == bool(wanted)
        if wanted:
            a.backward(*testing.random_cotangents([a]))
        for factor, grad in zip(factors, everything, strict=True):
            assert (factor.grad is not None) == factor.requires_grad
            if factor.grad is not None:
                testing.assert_bit_equal(factor.grad, grad)


@each
def test_attribution_reduce_passes_opcheck(backend):
    xs, gs, As, Bs = testing.inputs(OP, TINY, torch.float64)
    As, Bs = ([t.requires_grad_() for t in ts] for ts in (As, Bs))
    torch.library.opcheck(torch.ops.fastapd.attribution_reduce, (xs, gs, As, Bs))


@each
def test_attribution_reduce_backward_passes_opcheck(backend):
    args = testing.inputs(OP, TINY, torch.float64)
    (a,) = testing.run(OP, args).outputs
    torch.library.opcheck(torch.ops.fastapd.attribution_reduce_backward, (torch.ones_like(a), *args))


def test_attribution_reduce_compiles_to_one_graph():
    args = testing.inputs(OP, "rank1")
    cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
    wanted = testing.run(OP, args, cotangents)
    function, factors = of_factors(args)
    a = torch.compile(function, fullgraph=True, backend="aot_eager")(*factors)
    a.backward(*cotangents)
    testing.assert_bit_equal([a, *(t.grad for t in factors)], [*wanted.outputs, *wanted.grads])


@each
def test_attribution_reduce_needs_no_instance_axis(backend):
    args = testing.inputs(OP, "odd", torch.float64)
    one = testing.map_tensors(lambda t: t[0], args)
    cotangents = testing.random_cotangents(testing.run(OP, one).outputs)
    outputs, grads = testing.run(OP, one, cotangents)
    testing.assert_matches_reference(OP, outputs, one, backend, grads=grads, cotangents=cotangents)
    first = testing.run(OP, testing.map_tensors(lambda t: t[:1], args), [c.unsqueeze(0) for c in cotangents])
    testing.assert_bit_equal((outputs, grads), testing.map_tensors(lambda t: t[0], tuple(first)))


@pytest.mark.parametrize("view", testing.VIEWS)
@each
def test_attribution_reduce_takes_any_strides(backend, view):
    args = testing.inputs(OP, "odd")
    cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
    wanted = testing.run(OP, args, cotangents)
    found = testing.run(OP, *testing.map_tensors(testing.VIEWS[view], (args, cotangents)))
    testing.assert_matches_reference(OP, found.outputs, args, backend, grads=found.grads, cotangents=cotangents)
    if backend == "cpu":  # a library GEMM may follow the strides: its bits may differ
        testing.assert_bit_equal(found, wanted)


@pytest.mark.parametrize("axes", [(1, 0, 2, 3), (2, 0, 1, 3), (2, 1, 0, 3), (0, 2, 1, 3), (3, 0, 1, 2), (0, 3, 2, 1)])
@each
def test_attribution_reduce_walks_gradients_in_any_layout(backend, axes):
    """Gradients are often stacked by output: the kernel walks three of their axes by stride instead of copying."""
    for case in ("tms", "odd", "single"):
        xs, gs, As, Bs = args = testing.inputs(OP, case)
        back = [axes.index(i) for i in range(4)]
        turned = [g.permute(axes).contiguous().permute(back) for g in gs]
        cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
        found = testing.run(OP, (xs, turned, As, Bs), cotangents)
        testing.assert_matches_reference(OP, found.outputs, args, backend, grads=found.grads, cotangents=cotangents)
        if backend == "cpu":
            testing.assert_bit_equal(found, testing.run(OP, args, cotangents))


@each
def test_attribution_reduce_takes_gradients_expanded_along_any_axis(backend):
    xs, gs, As, Bs = testing.inputs(OP, "odd")
    for axis in range(4):
        expanded = [g.narrow(axis, 0, 1).expand_as(g) for g in gs]
        dense = (xs, [g.contiguous() for g in expanded], As, Bs)
        cotangents = testing.random_cotangents(testing.run(OP, dense).outputs)
        found = testing.run(OP, (xs, expanded, As, Bs), cotangents)
        testing.assert_matches_reference(OP, found.outputs, dense, backend, grads=found.grads, cotangents=cotangents)
        if backend == "cpu":
            testing.assert_bit_equal(found, testing.run(OP, dense, cotangents))


@each
def test_attribution_reduce_takes_expanded_tensors(backend):
    expanded = testing.map_tensors(lambda t: t[:1].expand(3, *t.shape[1:]), testing.inputs(OP, "odd"))
    dense = testing.map_tensors(lambda t: t.clone(memory_format=torch.contiguous_format), expanded)
    outputs = testing.run(OP, expanded).outputs
    cotangents = [t.new_ones(()).expand_as(t) for t in outputs]  # as the gradient of a sum is
    outputs, grads = testing.run(OP, expanded, cotangents)
    testing.assert_matches_reference(OP, outputs, dense, backend, grads=grads, cotangents=cotangents)
    if backend == "cpu":
        testing.assert_bit_equal((outputs, grads), tuple(testing.run(OP, dense, cotangents)))


@each
def test_attribution_reduce_shares_gradients_of_a_batch_axis_of_one(backend):
    xs, gs, As, Bs = testing.inputs(OP, "resid")
    assert gs[1].shape[1] == 1
    spread = [gs[0], gs[1].expand(-1, xs[0].shape[1], -1, -1)]
    shared, each = with_gradients((xs, gs, As, Bs)), with_gradients((xs, spread, As, Bs))
    testing.assert_bit_equal(shared.outputs, each.outputs)
    if backend == "cpu":
        testing.assert_bit_equal(shared.grads, each.grads)
    for got, wanted in zip(shared.grads, each.grads, strict=True):
        torch.testing.assert_close(got, wanted)


@each
def test_attribution_reduce_sums_layers_before_it_squares(backend):
    xs, gs, As, Bs = testing.inputs(OP, "odd", torch.float64)
    opposite = ([xs[0]] * 2, [gs[0]] * 2, [As[0], -As[0]], [Bs[0]] * 2)
    cancelled = ops.attribution_reduce(*opposite)
    twice = ops.attribution_reduce(*opposite[:2], [As[0]] * 2, opposite[3])
    once = ops.attribution_reduce(*(ts[:1] for ts in (xs, gs, As, Bs)))
    assert (cancelled <= 1e-25 * twice.max()).all()
    torch.testing.assert_close(twice, 4 * once, rtol=1e-13, atol=0)


@each
def test_attribution_reduce_leaves_its_inputs_alone(backend):
    args = testing.inputs(OP, "tms_40")
    before = testing.map_tensors(torch.clone, args)
    with_gradients(args)
    testing.assert_bit_equal(args, before)


@each
def test_attribution_reduce_repeats_bit_for_bit(backend, repeats):
    args = testing.inputs(OP, "odd")
    first = with_gradients(args)
    for _ in range(repeats):
        testing.assert_bit_equal(with_gradients(args), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_attribution_reduce_is_independent_of_threads(backend, dtype, threads):
    args = testing.inputs(OP, LARGE, dtype)
    threads(1)
    alone = with_gradients(args)
    for n in (2, 3):
        threads(n)
        testing.assert_bit_equal(with_gradients(args), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["tms", "odd", "wide", "resid"])
@pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
def test_attribution_reduce_at_every_level(cpu_level, case, dtype):
    args = testing.inputs(OP, case, dtype)
    cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
    outputs, grads = testing.run(OP, args, cotangents)
    testing.assert_matches_reference(OP, outputs, args, f"cpu {cpu_level}", grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("empty", ["n_instances", "batch", "n_components", "rank", "d_in", "d_out", "n_outputs"])
@each
def test_attribution_reduce_of_empty_axes_is_zero(backend, empty):
    sizes = {"n_instances": 2, "batch": 3, "n_components": 3, "rank": 2, "d_in": 4, "d_out": 5, "n_outputs": 2}
    args = testing.inputs(OP, testing.Case("", **sizes | {empty: 0}), torch.float64)
    cotangents = [torch.ones_like(t) for t in testing.run(OP, args).outputs]
    outputs, grads = testing.run(OP, args, cotangents)
    testing.assert_matches_reference(OP, outputs, args, backend, grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("sample", [0, 14, 28])
@each
def test_attribution_reduce_keeps_a_nan_in_its_sample(backend, sample):
    xs, gs, As, Bs = testing.inputs(OP, "rank1")
    sample %= xs[0].shape[1]
    clean = ops.attribution_reduce(xs, gs, As, Bs)
    for poisoned in (xs, gs):
        kept = poisoned[0][1, sample].clone()
        poisoned[0][1, sample] = torch.nan
        found = ops.attribution_reduce(xs, gs, As, Bs)
        poisoned[0][1, sample] = kept
        assert found[1, sample].isnan().all()
        found[1, sample] = clean[1, sample]
        testing.assert_bit_equal(found, clean)


@each
def test_attribution_reduce_keeps_a_nan_in_its_component(backend):
    xs, gs, As, Bs = testing.inputs(OP, "odd")
    clean = ops.attribution_reduce(xs, gs, As, Bs)
    Bs[1][0, 5] = torch.nan
    found = ops.attribution_reduce(xs, gs, As, Bs)
    assert found[0, :, 5].isnan().all()
    found[0, :, 5] = clean[0, :, 5]
    testing.assert_bit_equal(found, clean)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_attribution_reduce_beyond_the_cpu_limit_takes_the_reference(backend):
    d_out = 64
    n_outputs = CPU_LIMIT // d_out + 1
    args = [torch.randn(1, 2, 3)], [torch.randn(1, 1, n_outputs, d_out)], [torch.randn(1, 2, 3, 1)], [
        torch.randn(1, 2, 1, d_out)
    ]  # fmt: skip
    reason = f"the CPU kernel takes n_outputs * sum of d_out up to {CPU_LIMIT}, not {n_outputs} * {d_out}"
    assert backends.explain(OP, *args)["cpu"] == [f"{reason}; beyond, GEMMs are better"]
    assert not backends.explain(OP, *args)["reference"]
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        ops.attribution_reduce(*args)
    grad = torch.ones(1, 2, 2)
    assert backends.explain(BACKWARD, grad, *args)["cpu"] == [f"{reason}; beyond, GEMMs are better"]
    cotangents = testing.random_cotangents([grad])
    with backends.use_backend("auto"):
        outputs, grads = testing.run(OP, args, cotangents)
        testing.assert_matches_reference(OP, outputs, args, "auto", grads=grads, cotangents=cotangents)
    within = (args[0], [args[1][0][:, :, :-1]], *args[2:])
    outputs, grads = testing.run(OP, within, cotangents)
    testing.assert_matches_reference(OP, outputs, within, backend, grads=grads, cotangents=cotangents)


@each
def test_attribution_reduce_under_autocast_keeps_its_dtype(backend):
    args = testing.inputs(OP, "odd")
    wanted = testing.run(OP, args).outputs
    with torch.autocast("cpu", torch.bfloat16):
        testing.assert_bit_equal(testing.run(OP, args).outputs, wanted)


def test_attribution_reduce_takes_gradients_where_none_are_recorded():
    xs, gs, As, Bs = testing.inputs(OP, "odd")
    wanted = ops.attribution_reduce(xs, gs, As, Bs)
    with torch.no_grad():
        testing.assert_bit_equal(ops.attribution_reduce([x.clone().requires_grad_() for x in xs], gs, As, Bs), wanted)
    with torch.inference_mode():
        testing.assert_bit_equal(ops.attribution_reduce(xs, gs, As, Bs).clone(), wanted)


A = torch.zeros(2, 3, 4, 2)
B = torch.zeros(2, 3, 2, 5)
X = torch.zeros(2, 6, 4)
G = torch.zeros(2, 6, 7, 5)
RECORDED = torch.zeros(2, 6, 4, requires_grad=True)
CONSTANT = "must not require gradients, as it belongs to the target; detach it"
FLOATS = "must be float32, float64, float16 or bfloat16"
REFUSED = [
    (ValueError, [X], [G, G], [A], [B], "xs, gs, As and Bs must have one tensor for each layer, got 1, 2, 1 and 1"),
    (ValueError, [X], [G], [A], [], "xs, gs, As and Bs must have one tensor for each layer, got 1, 1, 1 and 0"),
    (ValueError, [], [], [], [], "xs, gs, As and Bs must have one tensor for each layer, got 0, 0, 0 and 0"),
    (TypeError, None, [G], [A], [B], "xs must be a list of tensors, one a layer, got NoneType"),
    (TypeError, [X], [G], A, [B], "As must be a list of tensors, one a layer, got Tensor"),
    (TypeError, [None], [G], [A], [B], "xs[0] must be a torch.Tensor, got NoneType"),
    (TypeError, [X], [G.numpy()], [A], [B], "gs[0] must be a torch.Tensor, got ndarray"),
    (ValueError, [X[0]], [G], [A], [B], "xs[0] must have shape [n_instances, batch, d_in] like As[0] [2, 3, 4, 2], "
     "got [6, 4]"),
    (ValueError, [X], [G[0]], [A], [B], "gs[0] must have shape [n_instances, batch or 1, n_outputs, d_out] like As[0] "
     "[2, 3, 4, 2], got [6, 7, 5]"),
    (ValueError, [X], [G], [A[0]], [B[0]], "xs[0] must have shape [batch, d_in] like As[0] [3, 4, 2], got [2, 6, 4]"),
    (ValueError, [X], [G], [A[0, 0]], [B], "As[0] must have shape [n_components, d_in, rank] or [n_instances, "
     "n_components, d_in, rank], got [4, 2]"),
    (ValueError, [X], [G], [A], [B[:, :2]], "As[0] and Bs[0] must share n_components, got As[0] [2, 3, 4, 2] and "
     "Bs[0] [2, 2, 2, 5]"),
    (ValueError, [X], [G], [A], [B[:, :, :1]], "As[0] and Bs[0] must share rank, got As[0] [2, 3, 4, 2] and Bs[0] "
     "[2, 3, 1, 5]"),
    (ValueError, [X[:1]], [G], [A], [B], "xs[0] and As[0] must share n_instances, got xs[0] [1, 6, 4] and As[0] "
     "[2, 3, 4, 2]"),
    (ValueError, [X], [G[:1]], [A], [B], "gs[0] and As[0] must share n_instances, got gs[0] [1, 6, 7, 5] and As[0] "
     "[2, 3, 4, 2]"),
    (ValueError, [X[..., :3]], [G], [A], [B], "xs[0] and As[0] must share d_in, got xs[0] [2, 6, 3] and As[0] "
     "[2, 3, 4, 2]"),
    (ValueError, [X], [G[..., :4]], [A], [B], "gs[0] and Bs[0] must share d_out, got gs[0] [2, 6, 7, 4] and Bs[0] "
     "[2, 3, 2, 5]"),
    (ValueError, [X], [G[:, :5]], [A], [B], "xs[0] and gs[0] must share batch, got xs[0] [2, 6, 4] and gs[0] "
     "[2, 5, 7, 5]"),
    (ValueError, [X, X], [G, G], [A, A[:, :2]], [B, B[:, :2]], "As[1] must have the n_components of As[0] [2, 3, 4, 2],"
     " got [2, 2, 4, 2]"),
    (ValueError, [X, X[0]], [G, G[0]], [A, A[0]], [B, B[0]], "As[1] must have the n_components of As[0] [2, 3, 4, 2], "
     "got [3, 4, 2]"),
    (ValueError, [X, X[:, :5]], [G, G[:, :5]], [A, A], [B, B], "xs[0] and xs[1] must share batch, got xs[0] [2, 6, 4] "
     "and xs[1] [2, 5, 4]"),
    (ValueError, [X, X], [G, G[:, :, :6]], [A, A], [B, B], "gs[0] and gs[1] must share n_outputs, got gs[0] "
     "[2, 6, 7, 5] and gs[1] [2, 6, 6, 5]"),
    (TypeError, [X], [G.double()], [A], [B], "gs[0] must have the dtype of As[0], torch.float32, got torch.float64"),
    (TypeError, [X, X.double()], [G, G.double()], [A, A.double()], [B, B.double()], "As[1] must have the dtype of "
     "As[0], torch.float32, got torch.float64"),
    (TypeError, [X.int()], [G], [A], [B], f"xs[0] {FLOATS}, got torch.int32"),
    (TypeError, [X], [G.cfloat()], [A], [B], f"gs[0] {FLOATS}, got torch.complex64"),
    (ValueError, [X], [G.to("meta")], [A], [B], "gs[0] must be on the device of As[0], cpu, got meta"),
    (ValueError, [X, X.to("meta")], [G, G.to("meta")], [A, A.to("meta")], [B, B.to("meta")], "As[1] must be on the "
     "device of As[0], cpu, got meta"),
    (NotImplementedError, [RECORDED], [G], [A], [B], f"xs[0] {CONSTANT}"),
    (NotImplementedError, [X, RECORDED], [G, G], [A, A], [B, B], f"xs[1] {CONSTANT}"),
    (NotImplementedError, [X], [G.clone().requires_grad_()], [A], [B], f"gs[0] {CONSTANT}"),
]  # fmt: skip


@pytest.mark.parametrize("error, xs, gs, As, Bs, message", REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_attribution_reduce_refuses(error, xs, gs, As, Bs, message):
    with pytest.raises(error, match=re.escape(f"{OP}: {message}") + "$"):
        ops.attribution_reduce(xs, gs, As, Bs)
