"""component_forward and component_forward_selected: y_b = sum_c s_bc (x_b A_c) B_c, dense and from a selection."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastapd import backends, ops, testing
from fastapd.ops._component_forward import component_forward_selected_accumulate, forward_selected_into_gradients

DENSE, SELECTED = "component_forward", "component_forward_selected"
ACCUMULATE = "component_forward_selected_accumulate"
BACKWARD = "component_forward_selected_backward"
TINY = testing.Case("tiny", 2, 4, 3, 2, 3, 2, n_outputs=0, k=1.5)
# every walk of the CPU kernel shares its work among threads from this size on
LARGE = testing.Case("large", 2, 400, 40, 8, 64, 48, n_outputs=0, k=3.0)
both = pytest.mark.parametrize("op, backend", testing.pairs(DENSE, SELECTED), indirect=["backend"])
selected = pytest.mark.parametrize("backend", testing.cpu_backends(SELECTED), indirect=True)


def doubles(op: str) -> tuple:
    return testing.map_floats(lambda t: t.detach().requires_grad_(), testing.inputs(op, TINY, torch.float64))


def select(scores: torch.Tensor, K: int) -> ops.Selection:
    """A selection is an argument here, whoever makes it."""
    with backends.use_backend("reference"):
        return ops.batch_topk(scores, K)


def with_gradients(op: str, args: tuple) -> testing.Answer:
    return testing.run(op, args, testing.random_cotangents(testing.run(op, args).outputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
@both
def test_component_forward_matches_the_reference(op, backend, case, dtype):
    args = testing.inputs(op, case, dtype)
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
def test_component_forward_without_a_mask_matches_the_reference(case, dtype):
    args = testing.inputs(DENSE, case, dtype)[:3]
    cotangents = testing.random_cotangents(testing.run(DENSE, args).outputs)
    outputs, grads = testing.run(DENSE, args, cotangents)
    testing.assert_matches_reference(DENSE, outputs, args, "auto", grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [DENSE, SELECTED])
def test_component_forward_takes_half_precision(op, dtype):
    args = testing.inputs(op, "tms_40", dtype)
    outputs, grads = with_gradients(op, args)
    assert {t.dtype for t in (*outputs, *grads)} == {dtype}
    testing.assert_matches_reference(op, outputs, args, "auto")


def test_component_forward_takes_a_bool_mask():
    x, A, B, mask = testing.inputs(DENSE, "odd")
    testing.assert_bit_equal(
        ops.component_forward(x, A, B, mask > 0.5), ops.component_forward(x, A, B, (mask > 0.5).float())
    )


@both
def test_component_forward_passes_gradcheck(op, backend):
    x, A, B, last = doubles(op)
    if op == DENSE:
        assert gradcheck(ops.component_forward, (x, A, B, last))
        assert gradcheck(ops.component_forward, (x, A, B))
    else:
        assert gradcheck(lambda *floats: ops.component_forward_selected(*floats, last), (x, A, B))


def test_component_forward_is_twice_differentiable():
    args = doubles(DENSE)
    assert gradgradcheck(ops.component_forward, args)
    assert gradgradcheck(ops.component_forward, args[:3])


@selected
def test_component_forward_selected_refuses_a_second_derivative(backend):
    x, A, B, selection = doubles(SELECTED)
    y = ops.component_forward_selected(x, A, B, selection)
    (grad_A,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"^{BACKWARD}: is not differentiable; detach its inputs$"):
        grad_A.sum().backward()


@pytest.mark.parametrize("wanted", range(8))
@both
def test_component_forward_gradient_goes_only_where_asked(op, backend, wanted):
    args = testing.inputs(op, "odd", torch.float64)
    everything = with_gradients(op, args)
    leaves = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(args[:3])]
    y = getattr(ops, op)(*leaves, args[3])
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(*testing.random_cotangents([y]))
    for leaf, grad in zip(leaves, everything.grads, strict=False):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-13, atol=1e-13)


@both
def test_component_forward_passes_opcheck(op, backend):
    torch.library.opcheck(getattr(torch.ops.fastapd, op), tuple(testing.tensors_of(doubles(op))))


@selected
def test_component_forward_selected_backward_passes_opcheck(backend):
    x, A, B, selection = testing.inputs(SELECTED, TINY, torch.float64)
    y, u = torch.ops.fastapd.component_forward_selected(x, A, B, *selection)
    op = torch.ops.fastapd.component_forward_selected_backward
    for needed in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        torch.library.opcheck(op, (torch.ones_like(y), x, A, B, u, *selection, *needed))


def test_component_forward_compiles_to_one_graph():
    for op in (DENSE, SELECTED):
        args = testing.inputs(op, "rank1")
        cotangents = testing.random_cotangents(testing.run(op, args).outputs)
        wanted = testing.run(op, args, cotangents)
        leaves = testing.map_floats(lambda t: t.detach().requires_grad_(), args)
        y = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")(*leaves)
        y.backward(*cotangents)
        grads = [t.grad for t in testing.tensors_of(leaves) if t.is_floating_point()]
        testing.assert_bit_equal([y, *grads], [*wanted.outputs, *wanted.grads])


@both
def test_component_forward_needs_no_instance_axis(op, backend):
    args = testing.inputs(op, "odd", torch.float64)
    one = testing.map_tensors(lambda t: t[0], args)
    cotangents = testing.random_cotangents(testing.run(op, one).outputs)
    outputs, grads = testing.run(op, one, cotangents)
    testing.assert_matches_reference(op, outputs, one, backend, grads=grads, cotangents=cotangents)
    first = testing.run(op, testing.map_tensors(lambda t: t[:1], args), [c.unsqueeze(0) for c in cotangents])
    testing.assert_bit_equal((outputs, grads), testing.map_tensors(lambda t: t[0], tuple(first)))


@pytest.mark.parametrize("view", testing.VIEWS)
@both
def test_component_forward_takes_any_strides(op, backend, view):
    args = testing.inputs(op, "odd")
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    wanted = testing.run(op, args, cotangents)
    found = testing.run(op, *testing.map_tensors(testing.VIEWS[view], (args, cotangents)))
    testing.assert_matches_reference(op, found.outputs, args, backend, grads=found.grads, cotangents=cotangents)
    if backend == "cpu":  # a library GEMM may follow the strides: its bits may differ
        testing.assert_bit_equal(found, wanted)


@both
def test_component_forward_takes_expanded_tensors(op, backend):
    expanded = testing.map_tensors(lambda t: t[:1].expand(3, *t.shape[1:]), testing.inputs(op, "odd"))
    dense = testing.map_tensors(lambda t: t.clone(memory_format=torch.contiguous_format), expanded)
    outputs = testing.run(op, expanded).outputs
    cotangents = [t.new_ones(()).expand_as(t) for t in outputs]  # as the gradient of a sum is
    outputs, grads = testing.run(op, expanded, cotangents)
    testing.assert_matches_reference(op, outputs, dense, backend, grads=grads, cotangents=cotangents)
    if backend == "cpu":
        testing.assert_bit_equal((outputs, grads), tuple(testing.run(op, dense, cotangents)))


@both
def test_component_forward_leaves_its_inputs_alone(op, backend):
    args = testing.inputs(op, "tms_40")
    before = testing.map_tensors(torch.clone, args)
    with_gradients(op, args)
    testing.assert_bit_equal(args, before)


@both
def test_component_forward_repeats_bit_for_bit(op, backend, repeats):
    args = testing.inputs(op, "resid")
    first = with_gradients(op, args)
    for _ in range(repeats):
        testing.assert_bit_equal(with_gradients(op, args), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_component_forward_selected_is_independent_of_threads(backend, dtype, threads):
    args = testing.inputs(SELECTED, LARGE, dtype)
    threads(1)
    alone = with_gradients(SELECTED, args)
    for n in (2, 3):
        threads(n)
        testing.assert_bit_equal(with_gradients(SELECTED, args), alone)


@pytest.mark.usefixtures("several_threads")
@both
def test_component_forward_serves_several_python_threads(op, backend):
    problems = [testing.inputs(op, "tms_40", seed=seed) for seed in range(4)]
    alone = [with_gradients(op, args) for args in problems]
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(lambda i: with_gradients(op, problems[i % 4]), range(20))):
            testing.assert_bit_equal(found, alone[i % 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["tms", "odd", "wide", "resid"])
@pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
def test_component_forward_selected_at_every_level(cpu_level, case, dtype):
    args = testing.inputs(SELECTED, case, dtype)
    cotangents = testing.random_cotangents(testing.run(SELECTED, args).outputs)
    outputs, grads = testing.run(SELECTED, args, cotangents)
    testing.assert_matches_reference(SELECTED, outputs, args, f"cpu {cpu_level}", grads=grads, cotangents=cotangents)


@selected
def test_component_forward_selected_of_nothing_is_zero(backend):
    x, A, B, _ = testing.inputs(SELECTED, "odd")
    nothing = select(x.new_ones(*x.shape[:2], A.shape[1]), 0)
    y, grads = with_gradients(SELECTED, (x, A, B, nothing))
    for t in (*y, *grads):
        testing.assert_bit_equal(t, torch.zeros_like(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["tms", "odd", "single", "wide"])
@selected
def test_component_forward_selected_of_everything_is_the_dense_form(backend, case, dtype):
    x, A, B, _ = testing.inputs(SELECTED, case, dtype)
    batch, n_components = x.shape[1], A.shape[1]
    everything = select(x.new_ones(*x.shape[:2], n_components), batch * n_components)
    cotangents = testing.random_cotangents(testing.reference(DENSE, (x, A, B)).outputs)
    outputs, grads = testing.run(SELECTED, (x, A, B, everything), cotangents)
    testing.assert_matches_reference(DENSE, outputs, (x, A, B), backend, grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("case", ["tms", "odd", "resid"])
@selected
def test_component_forward_selected_is_the_masked_dense_form(backend, case):
    x, A, B, selection = testing.inputs(SELECTED, case, torch.float64)
    dense = (x, A, B, selection.mask.double())
    cotangents = testing.random_cotangents(testing.reference(DENSE, dense).outputs)
    outputs, grads = testing.run(SELECTED, (x, A, B, selection), cotangents)
    exact = testing.oracle(DENSE, dense, cotangents)
    for got, wanted in zip((*outputs, *grads), (*exact.outputs, *exact.grads[:3]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("empty", ["n_instances", "batch", "n_components", "rank", "d_in", "d_out"])
@both
def test_component_forward_of_empty_axes_is_zero(op, backend, empty):
    sizes = {"n_instances": 2, "batch": 3, "n_components": 3, "rank": 2, "d_in": 4, "d_out": 5} | {empty: 0}
    k = 0.0 if empty == "n_components" else 1.0
    args = testing.inputs(op, testing.Case("", n_outputs=0, k=k, **sizes), torch.float64)
    cotangents = [torch.ones_like(t) for t in testing.run(op, args).outputs]
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@selected
def test_component_forward_selected_never_reads_an_unselected_component(backend, dtype):
    x, A, B, selection = testing.inputs(SELECTED, "odd", dtype)
    scores = selection.mask.to(dtype)
    scores[..., 4] = -1  # nobody selects component 4
    selection = select(scores, 20)
    assert not selection.counts[:, 4].any()
    clean = with_gradients(SELECTED, (x, A, B, selection))
    for poison in (torch.nan, torch.inf):
        A[:, 4], B[:, 4] = poison, poison
        found = with_gradients(SELECTED, (x, A, B, selection))
        testing.assert_bit_equal(found, clean)
        assert not found.grads[1][:, 4].any() and not found.grads[2][:, 4].any()


@pytest.mark.parametrize("sample", [0, 14, 28])
@both
def test_component_forward_keeps_a_nan_in_its_sample(op, backend, sample):
    args = testing.inputs(op, "rank1")
    sample %= args[0].shape[1]
    clean = testing.run(op, args).outputs[0]
    args[0][1, sample, 3] = torch.nan
    if op == SELECTED:  # where nothing is selected, nothing can be NaN
        mask = args[3].mask
        mask[:, sample] = True
        args = (*args[:3], select(mask.float(), int(mask[1].sum())))
        x = torch.where(args[0].isnan(), 1.0, args[0])
        clean = testing.run(op, (x, *args[1:])).outputs[0]
    found = testing.run(op, args).outputs[0]
    assert found[1, sample].isnan().all()
    found[1, sample] = clean[1, sample]
    testing.assert_bit_equal(found, clean)


@both
def test_component_forward_under_autocast_keeps_its_dtype(op, backend):
    args = testing.inputs(op, "odd")
    wanted = testing.run(op, args).outputs
    with torch.autocast("cpu", torch.bfloat16):
        testing.assert_bit_equal(testing.run(op, args).outputs, wanted)


A = torch.zeros(2, 3, 4, 2)
B = torch.zeros(2, 3, 2, 5)
X = torch.zeros(2, 6, 4)
MASK = torch.zeros(2, 6, 3)
SELECTION = ops.batch_topk(MASK, 7)
LAYER = [
    (ValueError, (X, A[0, 0], B), "A must have shape [n_components, d_in, rank] or [n_instances, n_components, d_in, "
     "rank], got [4, 2]"),
    (ValueError, (X, A, B[0]), "B must have shape [n_instances, n_components, rank, d_out] like A, "
     "got A [2, 3, 4, 2] and B [3, 2, 5]"),
    (ValueError, (X, A, B[:, :2]), "A and B must share n_components, got A [2, 3, 4, 2] and B [2, 2, 2, 5]"),
    (ValueError, (X, A, B[:, :, :1]), "A and B must share rank, got A [2, 3, 4, 2] and B [2, 3, 1, 5]"),
    (ValueError, (X[0], A, B), "x must have shape [n_instances, batch, d_in] like A [2, 3, 4, 2], got [6, 4]"),
    (ValueError, (X, A[0], B[0]), "x must have shape [batch, d_in] like A [3, 4, 2], got [2, 6, 4]"),
    (ValueError, (X[:1], A, B), "x and A must share n_instances, got x [1, 6, 4] and A [2, 3, 4, 2]"),
    (ValueError, (X[..., :3], A, B), "x and A must share d_in, got x [2, 6, 3] and A [2, 3, 4, 2]"),
    (TypeError, (X.half(), A, B), "x must have the dtype of A, torch.float32, got torch.float16"),
    (TypeError, (X, A.double(), B), "B must have the dtype of A, torch.float64, got torch.float32"),
    (TypeError, (X.long(), A, B), "x must be float32, float64, float16 or bfloat16, got torch.int64"),
    (TypeError, (X, A.cfloat(), B), "A must be float32, float64, float16 or bfloat16, got torch.complex64"),
    (ValueError, (X.to("meta"), A, B), "x must be on the device of A, cpu, got meta"),
    (ValueError, (X, A, B.to("meta")), "B must be on the device of A, cpu, got meta"),
    (TypeError, (None, A, B), "x must be a torch.Tensor, got NoneType"),
    (TypeError, (X, A.numpy(), B), "A must be a torch.Tensor, got ndarray"),
]  # fmt: skip


@pytest.mark.parametrize("error, layer, message", LAYER, ids=[message[:40] for *_, message in LAYER])
@pytest.mark.parametrize("op", [DENSE, SELECTED])
def test_component_forward_refuses_a_layer(op, error, layer, message):
    with pytest.raises(error, match=re.escape(f"{op}: {message}") + "$"):
        getattr(ops, op)(*layer, MASK if op == DENSE else SELECTION)


@pytest.mark.parametrize(
    "error, mask, message",
    [
        (ValueError, MASK[:, :5], "must have shape [.., batch, n_components] = [2, 6, 3], got [2, 5, 3]"),
        (ValueError, MASK[0], "must have shape [.., batch, n_components] = [2, 6, 3], got [6, 3]"),
        (ValueError, MASK[0].bool(), "must have shape [.., batch, n_components] = [2, 6, 3], got [6, 3]"),
        (TypeError, MASK.double(), "must have the dtype of x, torch.float32, got torch.float64"),
        (TypeError, MASK.long(), "must be float32, float64, float16 or bfloat16, got torch.int64"),
        (ValueError, MASK.to("meta"), "must be on the device of x, cpu, got meta"),
        (TypeError, MASK.tolist(), "must be a torch.Tensor, got list"),
    ],
)
def test_component_forward_refuses_a_mask(error, mask, message):
    with pytest.raises(error, match=re.escape(f"component_forward: mask {message}") + "$"):
        ops.component_forward(X, A, B, mask)


ADVICE = "; use the result of batch_topk"


@pytest.mark.parametrize(
    "error, name, change, message",
    [
        (TypeError, "sample", lambda t: t.long(), f"must be torch.int32, got torch.int64{ADVICE}"),
        (TypeError, "offsets", lambda t: t.int(), f"must be torch.int64, got torch.int32{ADVICE}"),
        (TypeError, "component", lambda t: t.float(), f"must be torch.int32, got torch.float32{ADVICE}"),
        (TypeError, "sample_offsets", lambda t: t.tolist(), f"must be torch.int64, got list{ADVICE}"),
        (TypeError, "position", lambda t: None, f"must be torch.int32, got NoneType{ADVICE}"),
        (ValueError, "component", lambda t: t.to("meta"), "must be on the device of x, cpu, got meta"),
        (ValueError, "offsets", lambda t: t[:, :-1], "must have shape [2, 4] for {x_A}, got [2, 3]"),
        (ValueError, "sample_offsets", lambda t: t[:, 1:], "must have shape [2, 7] for {x_A}, got [2, 6]"),
        (ValueError, "component", lambda t: t[:, :-1], "must have shape [2, 7] for {x_A}, got [2, 6]"),
        (ValueError, "position", lambda t: t[0], "must have shape [2, 7] for {x_A}, got [7]"),
        (ValueError, "sample", lambda t: t[0], "must have shape [2, 7] for {x_A}, got [7]"),
        (ValueError, "sample", lambda t: t[0, 0], "must have shape [2, 0] for {x_A}, got []"),
    ],
)
def test_component_forward_selected_refuses_a_selection(error, name, change, message):
    message = message.format(x_A="x [2, 6, 4] and A [2, 3, 4, 2]")
    with pytest.raises(error, match=re.escape(f"component_forward_selected: selection.{name} {message}") + "$"):
        ops.component_forward_selected(X, A, B, SELECTION._replace(**{name: change(getattr(SELECTION, name))}))


def test_component_forward_selected_refuses_the_selection_of_other_sizes():
    wanted = "selection.sample_offsets must have shape [2, 6] for x [2, 5, 4] and A [2, 3, 4, 2], got [2, 7]"
    with pytest.raises(ValueError, match=re.escape(f"{SELECTED}: {wanted}") + "$"):
        ops.component_forward_selected(X[:, :5], A, B, SELECTION)
    for other in (SELECTION.mask, tuple(SELECTION), None):
        wanted = f"selection must be a Selection, got {type(other).__name__}; for a mask use component_forward"
        with pytest.raises(TypeError, match=re.escape(f"{SELECTED}: {wanted}") + "$"):
            ops.component_forward_selected(X, A, B, other)


def test_component_forward_selected_checks_where_the_public_op_does_not_run():
    """torch.ops.fastapd is what a compiled graph calls: its fake holds the same checks."""
    with pytest.raises(ValueError, match="x and A must share d_in"):
        torch.ops.fastapd.component_forward_selected(*(t.to("meta") for t in (X[..., :3], A, B, *SELECTION)))


# ----------------------------------------------------------------------------------------- gradients added to buffers


def layer(case: str | testing.Case, dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of `forward_selected_into_gradients`: x and the factors want gradients, the buffers hold something."""
    x, A, B, selection = testing.inputs(SELECTED, case, dtype)
    leaves = [t.contiguous().requires_grad_() for t in (x, A.mT, B)]
    return *leaves, selection, *(torch.rand_like(t, requires_grad=False) for t in leaves[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
@selected
def test_component_forward_accumulate_matches_the_reference(backend, case, dtype):
    args = testing.inputs(ACCUMULATE, case, dtype)
    testing.assert_matches_reference(ACCUMULATE, testing.run(ACCUMULATE, args).outputs, args, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["tms", "odd", "wide", "resid", "rank1"])
@pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
def test_component_forward_accumulate_at_every_level(cpu_level, case, dtype):
    args = testing.inputs(ACCUMULATE, case, dtype)
    testing.assert_matches_reference(ACCUMULATE, testing.run(ACCUMULATE, args).outputs, args, f"cpu {cpu_level}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_component_forward_accumulate_is_independent_of_threads(backend, dtype, threads):
    args = testing.inputs(ACCUMULATE, LARGE, dtype)
    threads(1)
    alone = testing.run(ACCUMULATE, args).outputs
    for n in (2, 3):
        threads(n)
        testing.assert_bit_equal(testing.run(ACCUMULATE, args).outputs, alone)


@selected
def test_component_forward_accumulate_passes_opcheck(backend):
    grad_y, x, A, B, u, selection, *buffers = testing.inputs(ACCUMULATE, TINY, torch.float64)
    op = torch.ops.fastapd.component_forward_selected_accumulate
    for need_x in (True, False):
        torch.library.opcheck(op, (grad_y, x, A, B, u, *selection, need_x, *buffers))


@selected
def test_component_forward_accumulate_counts_as_a_write(backend):
    grad_y, x, A, B, u, selection, *buffers = testing.inputs(ACCUMULATE, "odd")
    tensors = grad_y, x, A, B, u, *buffers
    before = [t._version for t in tensors]
    grad_x = component_forward_selected_accumulate(grad_y, x, A, B, u, selection, False, *buffers)
    assert grad_x.shape == (0,)
    changed = [t._version > version for t, version in zip(tensors, before, strict=True)]
    assert changed == [False] * 5 + [True] * 2


@selected
def test_component_forward_accumulate_refuses_to_be_differentiated(backend):
    args = testing.inputs(ACCUMULATE, "odd")
    for i in (0, 1, 2, 3, 4, 6, 7):
        wrong = [t.detach().requires_grad_() if j == i else t for j, t in enumerate(args)]
        with pytest.raises(NotImplementedError, match=f"^{ACCUMULATE}: is not differentiable; detach its inputs$"):
            component_forward_selected_accumulate(*wrong[:6], True, *wrong[6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["tms", "odd", "resid", "rank1", "empty_batch"])
@selected
def test_component_forward_into_gradients_is_the_op_and_its_gradients(backend, case, dtype):
    x, At, B, selection, grad_At, grad_B = args = layer(case, dtype)
    before = grad_At.clone(), grad_B.clone()
    y = forward_selected_into_gradients(*args)
    (cotangent,) = testing.random_cotangents([y])
    y.backward(cotangent)
    assert At.grad is None and B.grad is None
    (wanted,), (grad_x, grad_A, grad_of_B) = testing.run(SELECTED, (x, At.mT, B, selection), [cotangent])
    testing.assert_bit_equal(y, wanted)
    testing.assert_bit_equal(x.grad, grad_x)
    torch.testing.assert_close(grad_At, before[0] + grad_A.mT, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_B, before[1] + grad_of_B, rtol=1e-6, atol=1e-6)


@selected
def test_component_forward_into_gradients_leaves_components_without_samples_alone(backend):
    x, At, B, selection, grad_At, grad_B = layer("odd")
    scores = selection.mask.float()
    scores[..., 4] = -1  # nobody selects component 4
    selection = select(scores, 20)
    for poison in (torch.nan, torch.inf):
        for t in (At, B, grad_At, grad_B):
            t.data[:, 4] = poison
        forward_selected_into_gradients(x, At, B, selection, grad_At, grad_B).sum().backward()
        for t in (grad_At, grad_B):
            testing.assert_bit_equal(t[:, 4], torch.full_like(t[:, 4], poison))
            assert t[:, :4].isfinite().all() and t[:, 5:].isfinite().all()


@selected
def test_component_forward_into_gradients_of_a_tied_pair(backend):
    """The second layer is the first with the roles of its factors, and of their buffers, swapped."""
    x, At, B, selection, grad_At, grad_B = layer("odd", torch.float64)
    before = grad_At.clone(), grad_B.clone()
    cotangent = torch.rand_like(x)
    hidden = ops.component_forward_selected(x, At.mT, B, selection).relu()
    wanted = torch.autograd.grad(ops.component_forward_selected(hidden, B.mT, At, selection), (At, B, x), cotangent)
    hidden = forward_selected_into_gradients(x, At, B, selection, grad_At, grad_B).relu()
    y = forward_selected_into_gradients(hidden, B, At, selection, grad_B, grad_At)
    y.backward(cotangent, inputs=[At, B, x])
    found = grad_At - before[0], grad_B - before[1], x.grad
    for got, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@selected
def test_component_forward_into_gradients_needs_no_gradient_of_x(backend):
    x, At, B, selection, *buffers = layer("odd", torch.float64)
    copies = [t.clone() for t in buffers]
    forward_selected_into_gradients(x, At, B, selection, *buffers).sum().backward()
    forward_selected_into_gradients(x.detach(), At, B, selection, *copies).sum().backward()
    testing.assert_bit_equal(buffers, copies)
    with torch.no_grad():
        assert not forward_selected_into_gradients(x, At, B, selection, *buffers).requires_grad
    testing.assert_bit_equal(buffers, copies)


@selected
def test_component_forward_into_gradients_refuses_a_second_derivative(backend):
    x, *rest = layer("odd", torch.float64)
    y = forward_selected_into_gradients(x, *rest)
    with pytest.raises(NotImplementedError, match=f"^{ACCUMULATE}: a second derivative is not computed"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@selected
def test_component_forward_into_gradients_notices_a_changed_input(backend):
    x, At, *rest = layer("odd")
    y = forward_selected_into_gradients(x, At, *rest)
    with torch.no_grad():
        At.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


WRONG = [
    ("x", lambda t: t[..., :-1], ValueError, "x and A must share d_in"),
    ("x", lambda t: t.double(), TypeError, "x must have the dtype of A, torch.float32, got torch.float64"),
    ("At", lambda t: t[:, :-1], ValueError, "A and B must share n_components"),
    ("At", lambda t: t.mT, ValueError, "A and B must share rank"),
    ("At", lambda t: t[:1], ValueError, "A and B must share n_instances"),
    ("B", lambda t: t[:, :, :-1], ValueError, "A and B must share rank"),
    ("B", lambda t: t.half(), TypeError, "B must have the dtype of A, torch.float32, got torch.float16"),
    ("grad_At", lambda t: t.mT, ValueError, "grad_At must have shape [2, 13, 7, 17], got [2, 13, 17, 7]"),
    ("grad_At", lambda t: t[:1], ValueError, "grad_At must have shape [2, 13, 7, 17], got [1, 13, 7, 17]"),
    ("grad_At", lambda t: t.mT.contiguous().mT, ValueError, "grad_At must be contiguous, got strides "),
    ("grad_At", lambda t: t.double(), TypeError, "grad_At must have the dtype of A, torch.float32, got torch.float64"),
    ("grad_B", lambda t: t[..., :0], ValueError, "grad_B must have shape [2, 13, 7, 1], got [2, 13, 7, 0]"),
    ("grad_B", lambda t: t[:, :, :1].expand_as(t), ValueError, "grad_B must be contiguous, got strides [91, 7, 0, 1]"),
    ("sample", lambda t: t[:, 1:], ValueError, "selection.component must have shape"),
    ("sample", lambda t: t.long(), TypeError, "selection.sample must be torch.int32, got torch.int64"),
    ("offsets", lambda t: t[:, 1:], ValueError, "selection.offsets must have shape"),
    ("offsets", lambda t: t.int(), TypeError, "selection.offsets must be torch.int64, got torch.int32"),
    ("component", lambda t: t.int()[..., :-1], ValueError, "selection.component must have shape"),
    ("sample_offsets", lambda t: t[:, 1:], ValueError, "selection.sample_offsets must have shape"),
    ("position", lambda t: t.float(), TypeError, "selection.position must be torch.int32, got torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, error, message", WRONG, ids=[f"{name}-{text[:40]}" for name, *_, text in WRONG])
def test_component_forward_into_gradients_refuses(name, change, error, message):
    x, At, B, selection, grad_At, grad_B = layer("odd")
    args = {"x": x, "At": At, "B": B, "selection": selection, "grad_At": grad_At, "grad_B": grad_B}
    if name in args:
        args[name] = change(args[name])
    else:
        args["selection"] = selection._replace(**{name: change(getattr(selection, name))})
    before = grad_At.clone(), grad_B.clone()
    with pytest.raises(error, match=f"^{ACCUMULATE}: {re.escape(message)}"):
        forward_selected_into_gradients(**args)
    testing.assert_bit_equal([grad_At, grad_B], before)


@pytest.mark.parametrize("index, name", [(0, "grad_y"), (4, "u"), (6, "grad_At"), (7, "grad_B")])
def test_component_forward_accumulate_refuses_shapes(index, name):
    args = list(testing.inputs(ACCUMULATE, "odd"))
    args[index] = args[index][:, 1:]
    with pytest.raises(ValueError, match=rf"^{ACCUMULATE}: {name} must have shape \["):
        component_forward_selected_accumulate(*args[:6], True, *args[6:])


def test_component_forward_accumulate_refuses_factors_without_instances():
    grad_y, x, A, B, u, selection, *buffers = testing.inputs(ACCUMULATE, "odd")
    one = ops.Selection(*(t[0] for t in selection))
    with pytest.raises(ValueError, match=rf"^{ACCUMULATE}: A must have a leading n_instances, got \[13, 17, 7\]$"):
        component_forward_selected_accumulate(grad_y, x[0], A[0], B[0], u, one, True, *buffers)
