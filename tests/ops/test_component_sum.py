"""component_sum and component_sum_loss: W = sum_c A_c B_c, and its squared distance to a target."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastapd import backends, ops, testing
from fastapd.ops._component_sum import component_sum_loss_accumulate

OPS = ("component_sum", "component_sum_loss")
TINY = testing.Case("tiny", 2, 0, 3, 2, 3, 2, n_outputs=0)
both = pytest.mark.parametrize("op, backend", testing.pairs(*OPS), indirect=["backend"])


def doubles(op: str) -> list[Tensor]:
    return [t.requires_grad_() for t in testing.inputs(op, TINY, torch.float64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
@both
def test_component_sum_matches_the_reference(op, backend, case, dtype):
    args = testing.inputs(op, case, dtype)
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_component_sum_takes_half_precision(op, dtype):
    args = testing.inputs(op, "tms_40", dtype)
    for chosen in ("auto", "reference"):
        with backends.use_backend(chosen):
            outputs = testing.run(op, args).outputs
            assert {t.dtype for t in outputs} == {dtype}
            testing.assert_matches_reference(op, outputs, args, chosen)
    with backends.use_backend("cpu"), pytest.raises(NotImplementedError, match=f"^{op}: no backend can run"):
        testing.run(op, args)


# sizes around the vectors (at most 16 values) and the blocks (4096 values) of the CPU kernel
SIZES = [(1, 1), (1, 3), (3, 5), (1, 15), (4, 4), (1, 17), (63, 65), (64, 64), (1, 4097), (89, 97)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d_in, d_out", SIZES)
@pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
def test_component_sum_loss_at_every_level(cpu_level, d_in, d_out, dtype):
    args = testing.inputs("component_sum_loss", testing.Case("", 2, 0, 2, 2, d_in, d_out, n_outputs=0), dtype)
    cotangents = testing.random_cotangents(testing.run("component_sum_loss", args).outputs)
    outputs, grads = testing.run("component_sum_loss", args, cotangents)
    testing.assert_matches_reference(
        "component_sum_loss", outputs, args, f"cpu {cpu_level}", grads=grads, cotangents=cotangents
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_component_sum_loss_is_independent_of_threads(backend, dtype, threads):
    residual = testing.inputs("component_sum_loss", testing.Case("", 3, 0, 1, 1, 300, 400, n_outputs=0), dtype)[2]
    factors = [residual.new_zeros(3, 1, 300, 1), residual.new_zeros(3, 1, 1, 400)]  # no library GEMM has a say
    threads(1)
    alone = testing.run("component_sum_loss", (*factors, residual)).outputs
    for n in (2, 3):
        threads(n)
        testing.assert_bit_equal(testing.run("component_sum_loss", (*factors, residual)).outputs, alone)


@pytest.mark.parametrize("backend", testing.cpu_backends("component_sum_loss"), indirect=True)
def test_component_sum_loss_keeps_its_inputs_where_the_sum_could_be_one_of_them(backend):
    """One component of rank one and width one: W = A B, a product of two tensors of the shape of W."""
    for shape in ((1, 1, 1, 1), (2, 1, 5, 1)):
        A, B = torch.rand(shape), torch.ones(shape[0], 1, 1, 1)
        target = torch.rand(shape[0], *shape[2:])
        before = [t.clone() for t in (A, B, target)]
        loss, residual = ops.component_sum_loss(A, B, target)
        torch.testing.assert_close(residual, A[:, 0] - target, rtol=0, atol=0)
        torch.testing.assert_close(loss, residual.square().sum((1, 2)))
        testing.assert_bit_equal([A, B, target], before)


@pytest.mark.parametrize("backend", testing.cpu_backends("component_sum_loss"), indirect=True)
def test_component_sum_loss_keeps_a_nan_in_its_instance(backend):
    A, B, target = testing.inputs("component_sum_loss", "odd")
    clean = testing.run("component_sum_loss", (A, B, target)).outputs
    for place in (0, 8, 16):
        poisoned = target.clone()
        poisoned[0, place, 0] = torch.nan
        loss, residual = testing.run("component_sum_loss", (A, B, poisoned)).outputs
        assert loss[0].isnan() and residual[0, place, 0].isnan() and residual.isnan().sum() == 1
        testing.assert_bit_equal([loss[1], residual[1]], [t[1] for t in clean])


@both
def test_component_sum_passes_gradcheck(op, backend):
    assert gradcheck(getattr(ops, op), doubles(op))


@both
def test_component_sum_is_twice_differentiable(op, backend):
    assert gradgradcheck(getattr(ops, op), doubles(op))


def test_component_sum_loss_gradient_comes_from_either_output():
    args = testing.inputs("component_sum_loss", TINY, torch.float64)
    for used in (0, 1):
        exact = testing.oracle("component_sum_loss", args)
        cotangents = [torch.zeros_like(t) if i != used else torch.ones_like(t) for i, t in enumerate(exact.outputs)]
        leaves = [t.detach().requires_grad_() for t in args]
        ops.component_sum_loss(*leaves)[used].sum().backward()
        wanted = testing.oracle("component_sum_loss", args, cotangents).grads
        for leaf, grad in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-12, atol=1e-12)


def test_component_sum_gradient_goes_only_where_asked():
    A, B, target = testing.inputs("component_sum_loss", TINY)
    A.requires_grad_()
    ops.component_sum_loss(A, B, target)[0].sum().backward()
    assert A.grad is not None and B.grad is None and target.grad is None


@both
def test_component_sum_passes_opcheck(op, backend):
    torch.library.opcheck(getattr(torch.ops.fastapd, op), tuple(doubles(op)))


@pytest.mark.parametrize("op", OPS)
def test_component_sum_compiles_to_one_graph(op):
    args = testing.inputs(op, "rank1")
    wanted = testing.run(op, args, [torch.ones_like(t) for t in testing.run(op, args).outputs])
    leaves = [t.detach().requires_grad_() for t in args]
    outputs = testing.tensors_of(torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")(*leaves))
    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    testing.assert_bit_equal([*outputs, *(t.grad for t in leaves)], [*wanted.outputs, *wanted.grads])


@both
def test_component_sum_needs_no_instance_axis(op, backend):
    args = testing.inputs(op, "odd", torch.float64)
    one = testing.map_tensors(lambda t: t[0], args)
    cotangents = testing.random_cotangents(testing.run(op, one).outputs)
    outputs, grads = testing.run(op, one, cotangents)
    testing.assert_matches_reference(op, outputs, one, backend, grads=grads, cotangents=cotangents)
    first = testing.run(op, testing.map_tensors(lambda t: t[:1], args), [c.unsqueeze(0) for c in cotangents])
    testing.assert_bit_equal((outputs, grads), testing.map_tensors(lambda t: t[0], tuple(first)))


@pytest.mark.parametrize("view", testing.VIEWS)
@both
def test_component_sum_takes_any_strides(op, backend, view):
    args = testing.inputs(op, "odd")
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    found = testing.run(op, *testing.map_tensors(testing.VIEWS[view], (args, cotangents)))
    # a library GEMM may follow the strides: equal within the tolerance, not in every bit
    testing.assert_matches_reference(op, found.outputs, args, backend, grads=found.grads, cotangents=cotangents)


@both
def test_component_sum_takes_expanded_factors(op, backend):
    expanded = testing.map_tensors(lambda t: t[:1].expand(3, *t.shape[1:]), testing.inputs(op, "odd"))
    dense = testing.map_tensors(lambda t: t.clone(memory_format=torch.contiguous_format), expanded)
    outputs = testing.run(op, expanded).outputs
    cotangents = [t.new_ones(()).expand_as(t) for t in outputs]  # as the gradient of a sum is
    outputs, grads = testing.run(op, expanded, cotangents)
    testing.assert_matches_reference(op, outputs, dense, backend, grads=grads, cotangents=cotangents)


@both
def test_component_sum_leaves_its_inputs_alone(op, backend):
    args = testing.inputs(op, "tms_40")
    before = testing.map_tensors(torch.clone, args)
    outputs = testing.run(op, args).outputs
    testing.run(op, args, testing.random_cotangents(outputs))
    testing.assert_bit_equal(args, before)


@both
def test_component_sum_repeats_bit_for_bit(op, backend, repeats):
    args = testing.inputs(op, "resid")
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)
    first = testing.run(op, args, cotangents)
    for _ in range(repeats):
        testing.assert_bit_equal(testing.run(op, args, cotangents), first)


@pytest.mark.parametrize("empty", ["n_instances", "n_components", "rank", "d_in", "d_out"])
@both
def test_component_sum_of_nothing_is_zero(op, backend, empty):
    sizes = {"n_instances": 2, "n_components": 3, "rank": 2, "d_in": 4, "d_out": 5} | {empty: 0}
    args = testing.inputs(op, testing.Case("", batch=0, n_outputs=0, **sizes), torch.float64)
    cotangents = [torch.ones_like(t) for t in testing.run(op, args).outputs]
    outputs, grads = testing.run(op, args, cotangents)
    testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)


def test_component_sum_under_autocast_keeps_its_dtype():
    args = testing.inputs("component_sum_loss", "odd")
    wanted = testing.run("component_sum_loss", args).outputs
    with torch.autocast("cpu", torch.bfloat16):
        testing.assert_bit_equal(testing.run("component_sum_loss", args).outputs, wanted)


A = torch.zeros(2, 3, 4, 2)
B = torch.zeros(2, 3, 2, 5)
TARGET = torch.zeros(2, 4, 5)
FACTORS = [
    (ValueError, A[0, 0], B, "A must have shape [n_components, d_in, rank] or [n_instances, n_components, d_in, rank], "
     "got [4, 2]"),
    (ValueError, A[None], B, "A must have shape [n_components, d_in, rank] or [n_instances, n_components, d_in, rank], "
     "got [1, 2, 3, 4, 2]"),
    (ValueError, A[0], B, "B must have shape [n_components, rank, d_out] like A, got A [3, 4, 2] and B [2, 3, 2, 5]"),
    (ValueError, A, B[0], "B must have shape [n_instances, n_components, rank, d_out] like A, "
     "got A [2, 3, 4, 2] and B [3, 2, 5]"),
    (ValueError, A, B[:1], "A and B must share n_instances, got A [2, 3, 4, 2] and B [1, 3, 2, 5]"),
    (ValueError, A, B[:, :2], "A and B must share n_components, got A [2, 3, 4, 2] and B [2, 2, 2, 5]"),
    (ValueError, A, B[:, :, :1], "A and B must share rank, got A [2, 3, 4, 2] and B [2, 3, 1, 5]"),
    (TypeError, A.int(), B, "A must be float32, float64, float16 or bfloat16, got torch.int32"),
    (TypeError, A.bool(), B, "A must be float32, float64, float16 or bfloat16, got torch.bool"),
    (TypeError, A, B.cfloat(), "B must be float32, float64, float16 or bfloat16, got torch.complex64"),
    (TypeError, A.to(torch.float8_e5m2), B, "A must be float32, float64, float16 or bfloat16, got torch.float8_e5m2"),
    (TypeError, A, B.double(), "B must have the dtype of A, torch.float32, got torch.float64"),
    (TypeError, A.half(), B, "B must have the dtype of A, torch.float16, got torch.float32"),
    (ValueError, A, B.to("meta"), "B must be on the device of A, cpu, got meta"),
    (TypeError, A.numpy(), B, "A must be a torch.Tensor, got ndarray"),
    (TypeError, A.tolist(), B, "A must be a torch.Tensor, got list"),
    (TypeError, A, None, "B must be a torch.Tensor, got NoneType"),
    (TypeError, A.to_sparse(), B, "A must be a dense tensor, got layout torch.sparse_coo; call .to_dense()"),
]  # fmt: skip


@pytest.mark.parametrize("error, A, B, message", FACTORS, ids=[message[:40] for *_, message in FACTORS])
@pytest.mark.parametrize("op", OPS)
def test_component_sum_refuses_factors(op, error, A, B, message):
    arguments = (A, B, TARGET)[: 2 if op == "component_sum" else 3]
    with pytest.raises(error, match=re.escape(f"{op}: {message}") + "$"):
        getattr(ops, op)(*arguments)


@pytest.mark.parametrize(
    "error, target, message",
    [
        (ValueError, TARGET.mT, "must have the shape of the sum, [2, 4, 5], got [2, 5, 4]"),
        (ValueError, TARGET[0], "must have the shape of the sum, [2, 4, 5], got [4, 5]"),
        (TypeError, TARGET.double(), "must have the dtype of A, torch.float32, got torch.float64"),
        (TypeError, TARGET.int(), "must be float32, float64, float16 or bfloat16, got torch.int32"),
        (ValueError, TARGET.to("meta"), "must be on the device of A, cpu, got meta"),
        (TypeError, None, "must be a torch.Tensor, got NoneType"),
    ],
)
def test_component_sum_loss_refuses_a_target(error, target, message):
    with pytest.raises(error, match=re.escape(f"component_sum_loss: target {message}") + "$"):
        ops.component_sum_loss(A, B, target)


# ----------------------------------------------------------------------------------------- gradients put into buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
@pytest.mark.parametrize("backend", testing.cpu_backends("component_sum_loss"), indirect=True)
def test_component_sum_loss_accumulate_is_the_op_and_its_gradients(backend, case, dtype):
    A, B, target = testing.inputs("component_sum_loss", case, dtype)
    At, scale = A.mT.contiguous(), 0.375  # exact in every dtype
    cotangents = [torch.full((A.shape[0],), scale, dtype=dtype), torch.zeros_like(target)]
    for overwrite in (True, False):
        before = [torch.full_like(t, torch.nan) if overwrite else torch.ones_like(t) for t in (At, B)]
        buffers = [t.clone() for t in before]
        loss = component_sum_loss_accumulate(At, B, target, scale, *buffers, overwrite)
        assert not loss.requires_grad
        outputs = testing.run("component_sum_loss", (A, B, target)).outputs
        torch.testing.assert_close(loss, outputs[0], rtol=4e-6, atol=0)
        exact = testing.oracle("component_sum_loss", (A, B, target), cotangents).grads[:2]
        own = testing.reference("component_sum_loss", (A, B, target), cotangents).grads[:2]
        for got, wanted, ours, start in zip(buffers, (exact[0].mT, exact[1]), (own[0].mT, own[1]), before, strict=True):
            eps = 4 * torch.finfo(dtype).eps
            start = torch.zeros_like(got) if overwrite else start
            allowed = 2 * (ours - wanted).norm() + eps * (wanted.norm() + start.norm())
            assert (got.double() - start - wanted).norm() <= allowed


def test_component_sum_loss_accumulate_makes_no_graph_and_keeps_its_inputs():
    A, B, target = testing.inputs("component_sum_loss", "odd")
    At, B = A.mT.contiguous().requires_grad_(), B.requires_grad_()
    before = [t.detach().clone() for t in (At, B, target)]
    buffers = [torch.empty_like(t, requires_grad=False) for t in (At, B)]
    loss = component_sum_loss_accumulate(At, B, target, 1.0, *buffers, True)
    assert not any(t.requires_grad for t in (loss, *buffers)) and At.grad is None and B.grad is None
    testing.assert_bit_equal([At.detach(), B.detach(), target], before)
    loss.fill_(7)  # no view of an input
    testing.assert_bit_equal([At.detach(), B.detach(), target], before)


@pytest.mark.parametrize(
    "index, change, error, message",
    [
        (0, lambda t: t[:, :-1], ValueError, "A and B must share n_components"),
        (0, lambda t: t.mT.contiguous().mT, ValueError, "At must be contiguous, got strides [1547, 119, 1, 7]"),
        (1, lambda t: t.double(), TypeError, "B must have the dtype of A, torch.float32, got torch.float64"),
        (1, lambda t: t.mT.contiguous().mT, None, ""),  # of width one: contiguous either way
        (2, lambda t: t.mT, ValueError, "target must have the shape of the sum, [2, 17, 1], got [2, 1, 17]"),
        (3, lambda t: t[:1], ValueError, "grad_At must have shape [2, 13, 7, 17], got [1, 13, 7, 17]"),
        (3, lambda t: t[..., :1].expand_as(t), ValueError, "grad_At must be contiguous, got strides "),
        (4, lambda t: t.double(), TypeError, "grad_B must have the dtype of At, torch.float32, got torch.float64"),
    ],
)  # fmt: skip
def test_component_sum_loss_accumulate_refuses(index, change, error, message):
    A, B, target = testing.inputs("component_sum_loss", "odd")
    args = [A.mT.contiguous(), B, target, torch.zeros_like(A.mT.contiguous()), torch.zeros_like(B)]
    args[index] = change(args[index])
    call = (*args[:3], 1.0, *args[3:], True)
    if error is None:
        component_sum_loss_accumulate(*call)
        return
    with pytest.raises(error, match=re.escape(f"component_sum_loss_accumulate: {message}")):
        component_sum_loss_accumulate(*call)
