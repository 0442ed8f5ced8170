"""attribution_tangent: a_bc = |g_J t_J|^2, t_j = sum_k s_k F_kj + sum_i (g_i t_i) L_ij."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fastapd import backends, ops, testing
from fastapd.ops import TangentBarrier, TangentSource

OP, BACKWARD = "attribution_tangent", "attribution_tangent_backward"
each = pytest.mark.parametrize("backend", testing.cpu_backends(OP), indirect=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
TINY = testing.Case("tiny", 2, 3, 2, 2, 3, 2, n_outputs=3, tied=True)
LARGE = testing.Case("large", 2, 150, 20, 4, 30, 20, n_outputs=7)  # shares its samples and components among threads


class Program(NamedTuple):
    """A network: widths of its inputs and barriers, and by number who sends to whom; sources are inputs, then lefts."""

    inputs: tuple[int, ...]
    lefts: tuple[tuple[int, int], ...]  # input, rank
    terms: tuple[tuple[int, int], ...]  # source, barrier
    barriers: tuple[int, ...]
    gated: tuple[int, ...] = ()
    links: tuple[tuple[int, int], ...] = ()
    shared: bool = False  # links are those of one instance

    def arguments(self, n_instances: int, batch: int, n_components: int, dtype: torch.dtype = torch.float32) -> tuple:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            scale = max(1, shape[-2]) ** -0.5
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

        rows = [*self.inputs, *(rank for _, rank in self.lefts)]
        widths, linked = self.barriers, 1 if self.shared else n_instances
        xs = [normal(n_instances, batch, width) for width in self.inputs]
        As = [normal(n_instances, n_components, r, self.inputs[k]).mT for k, r in self.lefts]
        Fs = [normal(n_instances, n_components, rows[source], widths[j]) for source, j in self.terms]
        gates = [torch.rand((n_instances, batch, widths[j]), generator=generator, dtype=dtype) for j in self.gated]
        links = [normal(linked, widths[i], widths[j]) for i, j in self.links]
        lefts, (terms, ends) = [k for k, _ in self.lefts], ([n for p in t for n in p] for t in (self.terms, self.links))
        return xs, As, Fs, gates, links, lefts, terms, list(self.gated), ends, list(widths)


PROGRAMS = {
    "one factor": Program((5,), ((0, 3),), ((1, 0),), (4,)),
    "one product": Program((5,), (), ((0, 0),), (7,), (0,)),
    "ones everywhere": Program((1,), ((0, 1),), ((1, 0), (1, 1)), (1, 1), (0,), ((0, 1),)),
    # a chain whose first source reaches every barrier; widths below, at and above the vectors'
    "skips": Program(
        (5, 7, 17), ((0, 2), (1, 3), (2, 1)), ((3, 0), (3, 1), (3, 2), (4, 1), (5, 2), (1, 2)), (7, 17, 3), (0, 1),
        ((0, 1), (0, 2), (1, 2)),
    ),
    "shared links": Program((6,), ((0, 2),), ((1, 0), (0, 1)), (16, 5, 48), (0, 1, 2), ((0, 1), (1, 2)), shared=True),
    "three of one input": Program(
        (9,), ((0, 1), (0, 4), (0, 6)), ((1, 0), (2, 0), (3, 1), (0, 1)), (2, 6), (1,), ((0, 1),)
    ),
    # barrier 0 gets nothing, barrier 1 leads nowhere, left 1 reaches nothing, nothing starts from input 1
    "idle parts": Program((4, 3), ((0, 2), (1, 5)), ((2, 1), (2, 2)), (5, 6, 7), (0, 1), ((0, 2),)),
    "nothing arrives": Program((4,), ((0, 2),), ((1, 0),), (3, 5), (0, 1)),
    "wide": Program((48,), ((0, 7),), ((1, 0), (0, 1)), (48, 65), (0,), ((0, 1),), shared=True),
    "no ungated way": Program(
        (3, 4), ((1, 2),), ((0, 0), (2, 2)), (3, 4, 5, 2), (0, 1, 2, 3), ((0, 1), (1, 3), (2, 3))
    ),
}  # fmt: skip
every_program = pytest.mark.parametrize("name", PROGRAMS)
# Long sums have several components: errors are compared with the reference's own, which may be lucky on a few values.
SIZES = ((1, 1, 1), (3, 2, 1), (3, 15, 6), (1, 16, 9), (2, 17, 8), (1, 31, 7), (1, 33, 9), (1, 63, 10), (1, 64, 9),
         (2, 65, 8), (1, 130, 11), (3, 0, 2), (2, 5, 0), (0, 4, 2))  # fmt: skip


def with_gradients(args: tuple) -> testing.Answer:
    return testing.run(OP, args, testing.random_cotangents(testing.run(OP, args).outputs))


def assert_matches(args: tuple, backend: str) -> None:
    cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
    outputs, grads = testing.run(OP, args, cotangents)
    testing.assert_matches_reference(OP, outputs, args, backend, grads=grads, cotangents=cotangents)


def of_factors(args: tuple):
    """The op as a function of its factors alone, and those factors as leaves."""
    xs, As, Fs, *rest = args
    factors = [t.detach().requires_grad_() for t in (*As, *Fs)]
    n = len(As)
    return lambda *factors: testing._OPS[OP].public(xs, list(factors[:n]), list(factors[n:]), *rest), factors


@dtypes
@pytest.mark.parametrize("case", testing.CASES)
@each
def test_attribution_tangent_matches_the_reference(backend, case, dtype):
    assert_matches(testing.inputs(OP, case, dtype), backend)


@dtypes
@every_program
@each
def test_attribution_tangent_of_any_network_matches_the_reference(backend, name, dtype):
    for sizes in SIZES:
        assert_matches(PROGRAMS[name].arguments(*sizes, dtype), backend)


@dtypes
@each
def test_attribution_tangent_of_any_widths_matches_the_reference(backend, dtype):
    widths = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16, 17, 48)
    for k, width in enumerate(widths):
        second, last, rank = widths[k - 3], widths[k - 5], widths[k - 9]
        program = Program((width,), ((0, rank),), ((1, 0), (0, 1), (1, 1)), (second, last), (0, 1), ((0, 1),))
        assert_matches(program.arguments(1 + k % 2, 5 + 4 * k, 1 + k % 3, dtype), backend)


@dtypes
@pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
def test_attribution_tangent_at_every_level(cpu_level, dtype):
    for program in PROGRAMS.values():
        for sizes in ((2, 17, 3), (1, 65, 2)):
            assert_matches(program.arguments(*sizes, dtype), f"cpu {cpu_level}")
    assert_matches(testing.inputs(OP, "wide", dtype), f"cpu {cpu_level}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attribution_tangent_takes_half_precision(dtype):
    args = testing.inputs(OP, "tms_40", dtype)
    outputs, grads = with_gradients(args)
    assert {t.dtype for t in (*outputs, *grads)} == {dtype}
    testing.assert_matches_reference(OP, outputs, args, "auto")
    with backends.use_backend("cpu"), pytest.raises(NotImplementedError, match=f"^{OP}: no backend can run"):
        testing.run(OP, args)


@each
def test_attribution_tangent_is_the_directional_derivative_of_a_network(backend):
    """Of f(x) = tanh(x W + x V) U, V a component, taken by torch's forward mode from the network itself."""
    batch, d_in, d_mlp, d_out, C = 6, 4, 5, 3, 3
    x, W, U = (torch.randn(*s, dtype=torch.float64) for s in ((batch, d_in), (d_in, d_mlp), (d_mlp, d_out)))
    A, B = torch.randn(C, d_in, 2, dtype=torch.float64), torch.randn(C, 2, d_mlp, dtype=torch.float64)
    wanted = torch.empty(batch, C, dtype=torch.float64)
    for c in range(C):
        _, tangent = torch.func.jvp(lambda W: torch.tanh(x @ W) @ U, (W,), (A[c] @ B[c],))
        wanted[:, c] = tangent.square().sum(-1)
    gate = 1 - torch.tanh(x @ W).square()
    barriers = [TangentBarrier(d_mlp, gate, {1: U}), TangentBarrier(d_out, None, {})]
    factored = ops.attribution_tangent([TangentSource(x, A, {0: B})], barriers)
    torch.testing.assert_close(factored, wanted, rtol=1e-12, atol=1e-13)
    product = ops.attribution_tangent([TangentSource(x, None, {0: A @ B})], barriers)
    torch.testing.assert_close(product, wanted, rtol=1e-12, atol=1e-13)


@each
def test_attribution_tangent_is_what_attribution_reduce_computes(backend):
    """Of one linear layer whose outputs are read by a matrix: the same sum of squares, from output gradients."""
    (x,), (A,), (B, *_), *_ = PROGRAMS["one factor"].arguments(2, 9, 3, torch.float64)
    readout = torch.randn(2, 4, 6, dtype=torch.float64)
    barriers = [TangentBarrier(4, None, {1: readout}), TangentBarrier(6, None, {})]
    wanted = ops.attribution_reduce([x], [readout.mT.unsqueeze(1).expand(-1, 9, -1, -1)], [A], [B])
    found = ops.attribution_tangent([TangentSource(x, A, {0: B})], barriers)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@every_program
@each
def test_attribution_tangent_gradient_of_every_component_is_its_own(backend, name):
    """A component's gradients do not depend on how many others there are, nor on where it stands among them."""
    xs, As, Fs, *rest = args = PROGRAMS[name].arguments(2, 9, 4, torch.float64)
    (cotangent,) = testing.random_cotangents(testing.run(OP, args).outputs)
    everything = testing.run(OP, args, [cotangent])
    for c in range(4):
        part = (xs, [A[:, c : c + 1] for A in As], [F[:, c : c + 1] for F in Fs], *rest)
        alone = testing.run(OP, part, [cotangent[..., c : c + 1]])
        torch.testing.assert_close(alone.outputs[0], everything.outputs[0][..., c : c + 1], rtol=1e-12, atol=1e-13)
        for got, whole in zip(alone.grads, everything.grads, strict=True):
            torch.testing.assert_close(got, whole[:, c : c + 1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["one product", "skips", "shared links", "idle parts"])
@each
def test_attribution_tangent_passes_gradcheck(backend, name):
    function, factors = of_factors(PROGRAMS[name].arguments(2, 3, 1, torch.float64))
    assert gradcheck(function, factors, fast_mode=name != "one product")


@each
def test_attribution_tangent_refuses_a_second_derivative(backend):
    function, factors = of_factors(testing.inputs(OP, TINY, torch.float64))
    grads = torch.autograd.grad(function(*factors).sum(), factors, create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match=f"^{BACKWARD}: is not differentiable; detach its inputs$"):
            grad.sum().backward(retain_graph=True)


@each
def test_attribution_tangent_gradient_goes_only_where_asked(backend):
    args = testing.inputs(OP, TINY, torch.float64)
    function, factors = of_factors(args)
    wanted_of_all = torch.autograd.grad(function(*factors), factors, testing.random_cotangents([function(*factors)]))
    for wanted in range(2 ** len(factors)):
        function, factors = of_factors(args)
        for i, factor in enumerate(factors):
            factor.requires_grad_(bool(wanted >> i & 1))
        a = function(*factors)
        assert a.requires_grad == bool(wanted)
        if wanted:
            a.backward(*testing.random_cotangents([a]))
        for factor, grad in zip(factors, wanted_of_all, strict=True):
            assert (factor.grad is not None) == factor.requires_grad
            if factor.grad is not None:
                testing.assert_bit_equal(factor.grad, grad)


@each
def test_attribution_tangent_gradient_of_a_factor_in_two_places_adds_up(backend):
    (x,), (A,), (F, _), *_ = args = Program((5,), ((0, 2),), ((1, 0), (1, 1)), (4, 4)).arguments(2, 7, 3, torch.float64)
    args = (*args[:2], [F, F], *args[3:])
    (cotangent,) = cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
    shared = F.clone().requires_grad_()
    source = TangentSource(x, A, {0: shared, 1: shared})
    ops.attribution_tangent([source], [TangentBarrier(4, None, {}), TangentBarrier(4, None, {})]).backward(cotangent)
    _, first, second = testing.oracle(OP, args, cotangents).grads
    torch.testing.assert_close(shared.grad, first + second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["one product", "skips", "idle parts"])
@each
def test_attribution_tangent_passes_opcheck(backend, name):
    xs, As, Fs, *rest = PROGRAMS[name].arguments(2, 3, 2, torch.float64)
    As, Fs = ([t.detach().requires_grad_() for t in ts] for ts in (As, Fs))
    torch.library.opcheck(torch.ops.fastapd.attribution_tangent, (xs, As, Fs, *rest))


@each
def test_attribution_tangent_backward_passes_opcheck(backend):
    args = PROGRAMS["skips"].arguments(2, 3, 2, torch.float64)
    (a,) = testing.run(OP, args).outputs
    torch.library.opcheck(torch.ops.fastapd.attribution_tangent_backward, (torch.ones_like(a), *args))


def test_attribution_tangent_compiles_to_one_graph():
    args = testing.inputs(OP, "rank1")
    cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
    wanted = testing.run(OP, args, cotangents)
    function, factors = of_factors(args)
    a = torch.compile(function, fullgraph=True, backend="aot_eager")(*factors)
    a.backward(*cotangents)
    testing.assert_bit_equal([a, *(t.grad for t in factors)], [*wanted.outputs, *wanted.grads])


@every_program
@each
def test_attribution_tangent_needs_no_instance_axis(backend, name):
    args = PROGRAMS[name].arguments(2, 9, 3, torch.float64)
    one = testing.map_tensors(lambda t: t[0], args)
    cotangents = testing.random_cotangents(testing.run(OP, one).outputs)
    outputs, grads = testing.run(OP, one, cotangents)
    assert outputs[0].shape == (9, 3)
    testing.assert_matches_reference(OP, outputs, one, backend, grads=grads, cotangents=cotangents)
    first = testing.run(OP, testing.map_tensors(lambda t: t[:1], args), [c.unsqueeze(0) for c in cotangents])
    testing.assert_bit_equal((outputs, grads), testing.map_tensors(lambda t: t[0], tuple(first)))


@every_program
@each
def test_attribution_tangent_of_shared_links_is_that_of_their_copies(backend, name):
    xs, As, Fs, gates, links, *wiring = PROGRAMS[name].arguments(3, 17, 2)
    links = [L[:1] for L in links]
    copies = [L.expand(3, -1, -1).contiguous() for L in links]
    shared, apart = (with_gradients((xs, As, Fs, gates, given, *wiring)) for given in (links, copies))
    testing.assert_matches_reference(OP, shared.outputs, (xs, As, Fs, gates, copies, *wiring), backend)
    if backend == "cpu":  # a library GEMM may take another path
        testing.assert_bit_equal(shared, apart)


@pytest.mark.parametrize("view", testing.VIEWS)
@each
def test_attribution_tangent_takes_any_strides(backend, view):
    for args in (testing.inputs(OP, "odd"), PROGRAMS["skips"].arguments(2, 17, 3)):
        cotangents = testing.random_cotangents(testing.run(OP, args).outputs)
        wanted = testing.run(OP, args, cotangents)
        found = testing.run(OP, *testing.map_tensors(testing.VIEWS[view], (args, cotangents)))
        testing.assert_matches_reference(OP, found.outputs, args, backend, grads=found.grads, cotangents=cotangents)
        if backend == "cpu":  # a library GEMM may follow the strides: its bits may differ
            testing.assert_bit_equal(found, wanted)


@each
def test_attribution_tangent_takes_expanded_tensors(backend):
    args = PROGRAMS["skips"].arguments(3, 17, 2)
    expanded = testing.map_tensors(lambda t: t[:1].expand(3, *t.shape[1:]), args)
    dense = testing.map_tensors(lambda t: t.clone(memory_format=torch.contiguous_format), expanded)
    outputs = testing.run(OP, expanded).outputs
    cotangents = [t.new_ones(()).expand_as(t) for t in outputs]  # as the gradient of a sum is
    outputs, grads = testing.run(OP, expanded, cotangents)
    testing.assert_matches_reference(OP, outputs, dense, backend, grads=grads, cotangents=cotangents)
    if backend == "cpu":
        testing.assert_bit_equal((outputs, grads), tuple(testing.run(OP, dense, cotangents)))


@each
def test_attribution_tangent_counts_an_input_once_however_it_comes(backend):
    """Sources with the same tensor, and with copies of it."""
    (x,), As, Fs, *_ = PROGRAMS["three of one input"].arguments(2, 17, 3, torch.float64)
    barriers = [TangentBarrier(2, None, {}), TangentBarrier(6, None, {})]
    into = ({0: Fs[0]}, {0: Fs[1]}, {1: Fs[2]})
    same, copied = (
        ops.attribution_tangent([TangentSource(of(x), A, F) for A, F in zip(As, into, strict=True)], barriers)
        for of in (lambda x: x, torch.clone)
    )
    torch.testing.assert_close(same, copied, rtol=1e-14, atol=0)
    assert same.any()


@each
def test_attribution_tangent_sums_terms_before_it_squares(backend):
    (x,), (A,), (F, *_), *_ = PROGRAMS["one factor"].arguments(2, 9, 3, torch.float64)
    barriers = [TangentBarrier(4, None, {})]
    once = ops.attribution_tangent([TangentSource(x, A, {0: F})], barriers)
    twice = ops.attribution_tangent([TangentSource(x, A, {0: F}), TangentSource(x, A, {0: F})], barriers)
    cancelled = ops.attribution_tangent([TangentSource(x, A, {0: F}), TangentSource(x, None, {0: -A @ F})], barriers)
    torch.testing.assert_close(twice, 4 * once, rtol=1e-13, atol=0)
    assert (cancelled <= 1e-25 * twice.max()).all()


@each
def test_attribution_tangent_leaves_its_inputs_alone(backend):
    args = testing.inputs(OP, "tms_40")
    before = testing.map_tensors(torch.clone, args)
    with_gradients(args)
    testing.assert_bit_equal(args, before)


@every_program
@each
def test_attribution_tangent_repeats_bit_for_bit(backend, name):
    args = PROGRAMS[name].arguments(2, 33, 3)
    first = with_gradients(args)
    for _ in range(10):
        testing.assert_bit_equal(with_gradients(args), first)


@dtypes
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_attribution_tangent_is_independent_of_threads(backend, dtype, threads):
    for args in (testing.inputs(OP, LARGE, dtype), PROGRAMS["skips"].arguments(3, 300, 30, dtype)):
        threads(1)
        alone = with_gradients(args)
        for n in (2, 3):
            threads(n)
            testing.assert_bit_equal(with_gradients(args), alone)


@pytest.mark.parametrize("sample", [0, 7, 16, 32])
@each
def test_attribution_tangent_keeps_a_nan_in_its_sample(backend, sample):
    args = PROGRAMS["skips"].arguments(2, 33, 3)
    clean = testing.run(OP, args).outputs[0]
    for poisoned in (*args[0], *args[3]):
        kept = poisoned[1, sample].clone()
        poisoned[1, sample] = torch.nan
        (found,) = testing.run(OP, args).outputs
        poisoned[1, sample] = kept
        assert found[1, sample].isnan().all()
        found[1, sample] = clean[1, sample]
        testing.assert_bit_equal(found, clean)


@each
def test_attribution_tangent_keeps_a_nan_in_its_component(backend):
    for name in ("skips", "shared links", "one product"):
        args = PROGRAMS[name].arguments(2, 33, 4)
        (cotangent,) = testing.random_cotangents(testing.run(OP, args).outputs)
        clean = testing.run(OP, args, [cotangent])
        for poisoned in (*args[1], *args[2]):
            kept = poisoned[1, 2].clone()
            poisoned[1, 2] = torch.nan
            (found,), grads = testing.run(OP, args, [cotangent])
            poisoned[1, 2] = kept
            assert found[1, :, 2].isnan().all()
            found[1, :, 2] = clean.outputs[0][1, :, 2]
            testing.assert_bit_equal(found, clean.outputs[0])
            for grad, of_clean in zip(grads, clean.grads, strict=True):
                grad[1, 2] = of_clean[1, 2]
                testing.assert_bit_equal(grad, of_clean)


@each
def test_attribution_tangent_under_autocast_keeps_its_dtype(backend):
    args = testing.inputs(OP, "odd")
    wanted = testing.run(OP, args).outputs
    with torch.autocast("cpu", torch.bfloat16):
        testing.assert_bit_equal(testing.run(OP, args).outputs, wanted)


def test_attribution_tangent_takes_gradients_where_none_are_recorded():
    args = testing.inputs(OP, "odd")
    function = testing._OPS[OP].public
    wanted = function(*args)
    recorded = testing.map_tensors(lambda t: t.clone().requires_grad_(), args)
    with torch.no_grad():
        testing.assert_bit_equal(function(*recorded), wanted)
    with torch.inference_mode():
        testing.assert_bit_equal(function(*args).clone(), wanted)


@each
def test_attribution_tangent_reference_holds_no_more_than_its_chunks(backend, monkeypatch):
    """Chunks of one sample and of all: the same attributions and gradients."""
    from fastapd.reference import attribution_tangent as reference

    args = PROGRAMS["skips"].arguments(2, 9, 3, torch.float64)
    chunks = []
    for elements in (1, 500, reference.CHUNK_ELEMENTS):
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", elements)
        chunks.append(len(reference._Program(*args).chunks()))
        assert_matches(args, backend)
    assert chunks[0] == 9 and 1 < chunks[1] < 9 and chunks[2] == 1


# ------------------------------------------------------------------------------------------------------------- refusals

X = torch.zeros(2, 6, 4)
A = torch.zeros(2, 3, 4, 2)
F0, F1 = torch.zeros(2, 3, 2, 5), torch.zeros(2, 3, 4, 7)  # a left's into barrier 0, an input's into barrier 1
GATE, LINK = torch.zeros(2, 6, 5), torch.zeros(2, 5, 7)
CONSTANT = "must not require gradients, as it belongs to the target; detach it"
FLOATS = "must be float32, float64, float16 or bfloat16"
GOOD = {"x": X, "A": A, "into": {0: F0}, "other": X, "direct": {1: F1}, "gate": GATE, "onward": {1: LINK}, "last": {}}
REFUSED = [
    (ValueError, {"into": {}, "direct": {}}, "sources must reach a barrier, got none that does"),
    (ValueError, {"into": {2: F0}}, "sources[0] must reach barriers below 2, got 2"),
    (ValueError, {"direct": {-1: F1}}, "sources[1] must reach barriers below 2, got -1"),
    (ValueError, {"onward": {0: LINK}}, "barriers[0] must lead to later ones below 2, got 0"),
    (ValueError, {"last": {0: LINK}}, "barriers[1] must lead to later ones below 2, got 0"),
    (ValueError, {"onward": {2: LINK}}, "barriers[0] must lead to later ones below 2, got 2"),
    (ValueError, {"other": X[:, :5]}, "input 1 must have shape [2, 6, 4], got [2, 5, 4]"),
    (ValueError, {"other": X[:1]}, "input 1 must have shape [2, 6, 4], got [1, 6, 4]"),
    (ValueError, {"A": A[:1]}, "A of left 0 must have shape [2, 3, 4, 2], got [1, 3, 4, 2]"),
    (ValueError, {"A": A[:, :2]}, "A of left 0 must have shape [2, 3, 4, 2], got [2, 2, 4, 2]"),
    (ValueError, {"A": A[:, :, :3]}, "A of left 0 must have shape [2, 3, 4, 2], got [2, 3, 3, 2]"),
    (ValueError, {"into": {0: F0[:, :, :1]}}, "matrix into barrier 0 must have shape [2, 3, 2, 5], got [2, 3, 1, 5]"),
    (ValueError, {"into": {0: F0[..., :4]}}, "matrix into barrier 0 must have shape [2, 3, 2, 5], got [2, 3, 2, 4]"),
    (ValueError, {"into": {1: F0}}, "matrix into barrier 1 must have shape [2, 3, 2, 7], got [2, 3, 2, 5]"),
    (ValueError, {"direct": {1: F1[:, :2]}}, "matrix into barrier 1 must have shape [2, 3, 4, 7], got [2, 2, 4, 7]"),
    (ValueError, {"direct": {1: F1[:, :, :3]}}, "matrix into barrier 1 must have shape [2, 3, 4, 7], got [2, 3, 3, 7]"),
    (ValueError, {"gate": GATE[:, :5]}, "gate of barrier 0 must have shape [2, 6, 5], got [2, 5, 5]"),
    (ValueError, {"gate": GATE[:1]}, "gate of barrier 0 must have shape [2, 6, 5], got [1, 6, 5]"),
    (ValueError, {"gate": GATE[..., :4]}, "gate of barrier 0 must have shape [2, 6, 5], got [2, 6, 4]"),
    (ValueError, {"onward": {1: LINK[:, :4]}}, "link from barrier 0 to 1 must have shape [2, 5, 7], got [2, 4, 7]"),
    (ValueError, {"onward": {1: LINK[:1, :, :6]}}, "link from barrier 0 to 1 must have shape [1, 5, 7], got [1, 5, 6]"),
    (ValueError, {"onward": {1: LINK.expand(2, 2, 5, 7)[:, 0].repeat(2, 1, 1)}},
     "link from barrier 0 to 1 must have shape [2, 5, 7], got [4, 5, 7]"),
    (ValueError, {"other": X.to("meta")}, "input 1 must be on the device of sources[0].x, cpu, got meta"),
    (ValueError, {"gate": GATE.to("meta")}, "gate 0 must be on the device of sources[0].x, cpu, got meta"),
    (ValueError, {"onward": {1: LINK.to("meta")}}, "link 0 must be on the device of sources[0].x, cpu, got meta"),
    (TypeError, {"x": None}, "sources[0].x must be a torch.Tensor, got NoneType"),
    (TypeError, {"other": X.numpy()}, "sources[1].x must be a torch.Tensor, got ndarray"),
    (TypeError, {"A": A.numpy()}, "sources[0].A must be a torch.Tensor, got ndarray"),
    (TypeError, {"into": {0: F0.numpy()}}, "sources[0].into[0] must be a torch.Tensor, got ndarray"),
    (TypeError, {"gate": GATE.numpy()}, "barriers[0].gate must be a torch.Tensor, got ndarray"),
    (TypeError, {"onward": {1: None}}, "barriers[0].onward[1] must be a torch.Tensor, got NoneType"),
    (TypeError, {"A": A.double()}, "A of left 0 must have the dtype of sources[0].x, torch.float32, got torch.float64"),
    (TypeError, {"into": {0: F0.double()}},
     "matrix 0 must have the dtype of sources[0].x, torch.float32, got torch.float64"),
    (TypeError, {"gate": GATE.bool()}, f"gate 0 {FLOATS}, got torch.bool"),
    (TypeError, {"x": X.int()}, f"sources[0].x {FLOATS}, got torch.int32"),
    (NotImplementedError, {"x": X.clone().requires_grad_()}, f"sources[0].x {CONSTANT}"),
    (NotImplementedError, {"other": X.clone().requires_grad_()}, f"sources[1].x {CONSTANT}"),
    (NotImplementedError, {"gate": GATE.clone().requires_grad_()}, f"barriers[0].gate {CONSTANT}"),
    (NotImplementedError, {"onward": {1: LINK.clone().requires_grad_()}}, f"barriers[0].onward[1] {CONSTANT}"),
]  # fmt: skip


def of_parts(**p) -> Tensor:
    sources = [TangentSource(p["x"], p["A"], p["into"]), TangentSource(p["other"], None, p["direct"])]
    return ops.attribution_tangent(
        sources, [TangentBarrier(5, p["gate"], p["onward"]), TangentBarrier(7, None, p["last"])]
    )


@pytest.mark.parametrize("error, change, message", REFUSED, ids=[message[:50] for *_, message in REFUSED])
def test_attribution_tangent_refuses(error, change, message):
    assert of_parts(**GOOD).shape == (2, 6, 3)
    with pytest.raises(error, match=re.escape(f"{OP}: {message}") + "$"):
        of_parts(**GOOD | change)


@pytest.mark.parametrize("sources, barriers", [(0, 1), (1, 0), (0, 0)])
def test_attribution_tangent_refuses_an_empty_network(sources, barriers):
    given = [TangentSource(X, A, {0: F0})][:sources], [TangentBarrier(5, GATE, {})][:barriers]
    message = f"{OP}: sources and barriers must not be empty, got {sources} and {barriers}"
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        ops.attribution_tangent(*given)


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(())}, "sources[0].x must have shape [batch, width] or [n_instances, batch, width], got []"),
    ({"x": torch.zeros(1, 2, 6, 4)},
     "sources[0].x must have shape [batch, width] or [n_instances, batch, width], got [1, 2, 6, 4]"),
    ({"other": X[0]}, "sources[1].x must have shape [n_instances, batch, width] like sources[0].x [2, 6, 4], "
     "got [6, 4]"),
    ({"A": A[0]}, "sources[0].A must have shape [n_instances, n_components, width, rank] like sources[0].x [2, 6, 4], "
     "got [3, 4, 2]"),
    ({"A": torch.zeros(2)}, "sources[0].A must have shape [n_instances, n_components, width, rank] like sources[0].x "
     "[2, 6, 4], got [2]"),
    ({"into": {0: F0[0]}}, "sources[0].into[0] must have shape [n_instances, n_components, rows, width] like "
     "sources[0].x [2, 6, 4], got [3, 2, 5]"),
    ({"gate": GATE[0]}, "barriers[0].gate must have shape [n_instances, batch, width] like sources[0].x [2, 6, 4], "
     "got [6, 5]"),
    ({"onward": {1: LINK[0]}}, "barriers[0].onward[1] must have shape [n_instances or 1, rows, width] like "
     "sources[0].x [2, 6, 4], got [5, 7]"),
    ({"x": X[0], "other": X[0]}, "sources[0].A must have shape [n_components, width, rank] like sources[0].x [6, 4], "
     "got [2, 3, 4, 2]"),
])  # fmt: skip
def test_attribution_tangent_refuses_other_axes(change, message):
    with pytest.raises(ValueError, match=re.escape(f"{OP}: {message}") + "$"):
        of_parts(**GOOD | change)
