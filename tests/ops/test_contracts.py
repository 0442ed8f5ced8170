"""What holds for every op on every backend, whatever it computes: dtypes, devices, sizes, aliases, threads, modes.

Rows of `tests/README.md`. What an op computes is in test_<op>.py.
"""

from __future__ import annotations

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastapd import backends, ops, testing

each_op = pytest.mark.parametrize("op", testing.OPS)
every = pytest.mark.parametrize("op, backend", testing.pairs(*testing.OPS), indirect=["backend"])
DIFFERENTIABLE = [op for op in testing.OPS if testing._OPS[op].differentiable]
differentiable = pytest.mark.parametrize("op, backend", testing.pairs(*DIFFERENTIABLE), indirect=["backend"])
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SQUARE = testing.Case("square", 2, 4, 4, 4, 4, 4, n_outputs=4, k=2.0)


def answer(op: str, args: Any) -> testing.Answer:
    """Outputs, and gradients where the op has any."""
    outputs = testing.run(op, args).outputs
    return (
        testing.run(op, args, testing.random_cotangents(outputs))
        if op in DIFFERENTIABLE
        else testing.Answer(outputs, [])
    )


def assert_matches(op: str, args: Any, backend: str, found: testing.Answer) -> None:
    if op in DIFFERENTIABLE:
        cotangents = testing.random_cotangents(found.outputs)
        testing.assert_matches_reference(op, found.outputs, args, backend, grads=found.grads, cotangents=cotangents)
    else:
        testing.assert_matches_reference(op, found.outputs, args, backend)


def replaced(args: Any, index: int, change: Any) -> Any:
    """The arguments with their index-th tensor changed."""
    place = itertools.count()
    return testing.map_tensors(lambda t: change(t) if next(place) == index else t, args)


# ------------------------------------------------------------------------------------------------- dtypes and devices


def other_dtypes() -> list[torch.dtype]:
    found = {v for v in vars(torch).values() if isinstance(v, torch.dtype)} - set(FLOATS)

    def exists(dtype: torch.dtype) -> bool:
        try:
            torch.zeros(1).to(dtype)
        except (RuntimeError, TypeError, NotImplementedError):  # quantised types and bare bits take no values
            return False
        return True

    return sorted(filter(exists, found), key=str)


@each_op
def test_contract_dtypes_other_than_four_floats_are_refused(op):
    args = testing.inputs(op, "odd")
    dtypes = other_dtypes()
    assert {torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn} <= set(dtypes)
    for index, t in enumerate(testing.tensors_of(args)):
        for dtype in dtypes if t.is_floating_point() else ():
            counts = (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32)
            if op == "schatten_factored_masked" and index == 2 and dtype in (*counts, torch.int64):
                continue  # integers there are counts, of another shape
            if op == "component_forward" and index == 3 and dtype == torch.bool:
                continue  # a bool mask is one of its forms
            wrong = replaced(args, index, lambda t, dtype=dtype: t.to(dtype))
            with pytest.raises(TypeError, match=rf"must .*, got {re.escape(str(dtype))}"):
                testing.run(op, wrong)


@each_op
def test_contract_dtypes_that_differ_are_refused(op):
    for first, second in itertools.permutations(FLOATS, 2):
        args = testing.inputs(op, "odd", first)
        floats = [i for i, t in enumerate(testing.tensors_of(args)) if t.is_floating_point()]
        for index in floats if len(floats) > 1 else ():
            public = op.removesuffix("_masked").removesuffix("_warm")
            with pytest.raises(TypeError, match=rf"^{public}: .* must have the dtype of "):
                testing.run(op, replaced(args, index, lambda t, second=second: t.to(second)))


@each_op
def test_contract_devices_that_differ_are_refused(op):
    args = testing.inputs(op, "odd")
    n = len(testing.tensors_of(args))
    for index in range(n if n > 1 else 0):
        with pytest.raises(ValueError, match=r"must be on the device of .*, (cpu|meta), got (cpu|meta)"):
            testing.run(op, replaced(args, index, lambda t: t.to("meta")))


@each_op
def test_contract_a_device_without_a_backend_is_refused_or_only_shaped(op):
    args = testing.inputs(op, "odd")
    if op == "batch_topk_counts":  # which reads its counts
        with pytest.raises((NotImplementedError, RuntimeError)):
            testing.run(op, testing.map_tensors(lambda t: t.to("meta"), args))
        return
    found = testing.run(op, testing.map_tensors(lambda t: t.to("meta"), args)).outputs
    for got, wanted in zip(found, testing.run(op, args).outputs, strict=True):
        assert (got.shape, got.dtype, got.device.type) == (wanted.shape, wanted.dtype, "meta")


# -------------------------------------------------------------------------------------------------------------- sizes

AXES = ("n_instances", "batch", "n_components", "rank", "d_in", "d_out")


@every
def test_contract_any_axes_may_be_empty(op, backend):
    for n_empty in range(1, len(AXES) + 1):
        for empty in itertools.combinations(AXES, n_empty):
            sizes = {"n_instances": 2, "batch": 3, "n_components": 3, "rank": 2, "d_in": 4, "d_out": 5}
            case = testing.Case(" ".join(empty), **sizes | dict.fromkeys(empty, 0), n_outputs=2)
            args = testing.inputs(op, replace(case, k=0.0) if "n_components" in empty else case, torch.float64)
            assert_matches(op, args, backend, answer(op, args))


# around the lanes of a vector, 4 to 16, and what the kernels take at once
EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every
def test_contract_sizes_around_the_blocks_of_the_kernels(op, backend, dtype):
    for n, d_in in enumerate(EDGES):
        d_out, batch, rank = EDGES[n - 4], EDGES[n - 7], min(EDGES[n - 11], 9)
        args = testing.inputs(
            op, testing.Case(f"{d_in}", 1, batch, n % 6 + 1, rank, d_in, d_out, n_outputs=n % 5 + 1), dtype
        )
        assert_matches(op, args, backend, answer(op, args))


@pytest.fixture(scope="module")
def far_apart(tmp_path_factory):
    """`far_apart(t, axis)`: t with the entries of an axis 2^30 elements apart, in a sparse file of 2^32 elements."""
    path = tmp_path_factory.mktemp("sparse") / "elements"
    with open(path, "wb") as f:
        try:
            f.truncate(4 * (2**32 + 2**24))
        except OSError as error:
            pytest.skip(f"no sparse files here: {error}")
    if path.stat().st_blocks * 512 > 2**24:
        pytest.skip("files are not sparse here")
    memory = torch.from_file(str(path), shared=True, size=2**32 + 2**24, dtype=torch.float32)
    used = itertools.count(0, 2**16)

    def place(t: Tensor, axis: int) -> Tensor:
        if not t.is_floating_point() or t.dim() <= axis:  # a hint has no samples
            return t
        order = [axis, *(i for i in range(t.dim()) if i != axis)]
        moved = t.permute(order).contiguous()
        assert moved.shape[0] == 5 and moved[0].numel() < 2**16
        far = memory.as_strided(moved.shape, (2**30, *moved.stride()[1:]), next(used)).copy_(moved)
        return far.permute([order.index(i) for i in range(t.dim())])

    yield place
    os.unlink(path)


@pytest.mark.parametrize("axis", [0, 1])
@every
def test_contract_more_elements_than_an_int32_counts(op, backend, axis, far_apart):
    """Offsets up to 2^32: instances, or samples and components, lie 2^30 elements apart."""
    many = (
        {"n_instances": 5, "batch": 3, "n_components": 3}
        if axis == 0
        else {"n_instances": 1, "batch": 5, "n_components": 5}
    )
    case = testing.Case("far", **many, rank=2, d_in=7, d_out=6, n_outputs=3, k=1.0, tied=True)
    args = testing.inputs(op, case)
    if axis == 1 and op == "component_sum_loss":  # its target has neither samples nor components
        far = (*(far_apart(t, 1) for t in args[:2]), args[2])
    elif axis == 1 and op == "thin_product":  # nor has its second factor
        far = (far_apart(args[0], 1), args[1], far_apart(args[2], 1), *args[3:])
    elif axis == 1 and op == "attribution_tangent":  # its link has neither
        far = (*testing.map_tensors(lambda t: far_apart(t, 1), args[:4]), *args[4:])
    else:
        far = testing.map_tensors(lambda t: far_apart(t, axis), args)
    floats = [t for t in testing.tensors_of(far) if t.is_floating_point()]
    spans = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in floats]
    assert spans[0] > 2**31 and sum(span > 2**31 for span in spans) >= len(spans) - 1
    found = answer(op, far)
    assert_matches(op, args, backend, found)
    if backend == "cpu":
        testing.assert_bit_equal(found, answer(op, args))


# -------------------------------------------------------------------------------------------------- memory and aliases


@every
def test_contract_overlapping_views_are_read_as_their_copies(op, backend):
    args = testing.inputs(op, "odd")
    overlapping = testing.map_floats(lambda t: torch.rand(sum(t.shape)).as_strided(t.shape, (1,) * t.dim()), args)
    dense = testing.map_tensors(torch.clone, testing.map_floats(Tensor.contiguous, overlapping))
    found = testing.run(op, overlapping).outputs
    testing.assert_matches_reference(op, found, dense, backend)
    if backend == "cpu" and op != "component_sum_loss":  # whose GEMM is the library's
        testing.assert_bit_equal(found, testing.run(op, dense).outputs)


@every
def test_contract_inputs_are_unchanged(op, backend):
    args = testing.inputs(op, "odd")
    before, versions = testing.map_tensors(torch.clone, args), [t._version for t in testing.tensors_of(args)]
    answer(op, args)
    testing.assert_bit_equal(args, before)
    assert [t._version for t in testing.tensors_of(args)] == versions


@every
def test_contract_outputs_are_no_views_of_inputs(op, backend):
    args = testing.inputs(op, testing.Case("unit", 1, 1, 1, 1, 1, 1, n_outputs=1))
    before = testing.map_tensors(torch.clone, args)
    with torch.no_grad():
        for t in testing.run(op, args).outputs:
            t.fill_(7)
    testing.assert_bit_equal(args, before)


def twice(op: str) -> tuple[Any, list[Tensor]]:
    """The op as a function of fewer tensors than it has arguments, and those: square factors stand for each other."""
    At, *_ = testing.inputs("component_sum", SQUARE, torch.float64)
    t = At.contiguous()  # [2, 4, 4, 4]: A, B and, without its components, x, mask, scores and target
    counts = torch.tensor([[1, 0, 2, 3], [4, 1, 1, 0]])
    x = t[:, 0]
    with backends.use_backend("reference"):  # that of the test may have no kernel for this one
        selection = ops.batch_topk(x, 7)
    functions = {
        "component_sum": lambda t: ops.component_sum(t, t),
        "component_sum_loss": lambda t: ops.component_sum_loss(t, t, t[:, 0])[0],
        "component_forward": lambda t: ops.component_forward(t[:, 0], t, t, t[:, 0]),
        "component_forward_selected": lambda t: ops.component_forward_selected(t[:, 0], t, t, selection),
        "attribution_reduce": lambda t: ops.attribution_reduce([x, x], [t.detach()] * 2, [t, t], [t, t]),
        "attribution_tangent": lambda t: ops.attribution_tangent(
            [ops.TangentSource(x, t, {0: t, 1: t}), ops.TangentSource(x, None, {1: t})],
            [ops.TangentBarrier(4, x, {1: x}), ops.TangentBarrier(4, x, {})],
        ),
        "component_svdvals": lambda t: ops.component_svdvals(t, t),
        "schatten": lambda t: ops.schatten(t, t, counts, 0.9, 1e-8),
        "schatten_factored": lambda t: ops.schatten_factored(t, t, counts, 0.9, 1e-8),
        "schatten_factored_masked": lambda t: ops.schatten_factored(t, t, t[:, 0] ** 2, 0.9, 1e-8),
    }
    apart = {
        "component_sum": lambda a, b, c, d: ops.component_sum(a, b),
        "component_sum_loss": lambda a, b, c, d: ops.component_sum_loss(a, b, c[:, 0])[0],
        "component_forward": lambda a, b, c, d: ops.component_forward(c[:, 0], a, b, d[:, 0]),
        "component_forward_selected": lambda a, b, c, d: ops.component_forward_selected(c[:, 0], a, b, selection),
        "attribution_reduce": lambda a, b, c, d: ops.attribution_reduce(
            [x, x.clone()], [t.clone(), t.clone()], [a, c], [b, d]
        ),
        "attribution_tangent": lambda a, b, c, d: ops.attribution_tangent(
            [ops.TangentSource(x.clone(), a, {0: b, 1: c}), ops.TangentSource(x.clone(), None, {1: d})],
            [ops.TangentBarrier(4, x.clone(), {1: x.clone()}), ops.TangentBarrier(4, x.clone(), {})],
        ),
        "component_svdvals": lambda a, b, c, d: ops.component_svdvals(a, b),
        "schatten": lambda a, b, c, d: ops.schatten(a, b, counts, 0.9, 1e-8),
        "schatten_factored": lambda a, b, c, d: ops.schatten_factored(a, b, counts, 0.9, 1e-8),
        "schatten_factored_masked": lambda a, b, c, d: ops.schatten_factored(a, b, c[:, 0] ** 2, 0.9, 1e-8),
    }
    return (functions[op], apart[op]), [t.clone().requires_grad_() for _ in range(5)]


@differentiable
def test_contract_one_tensor_in_several_places(op, backend):
    (same, apart), (shared, *copies) = twice(op)
    together, alone = same(shared), apart(*copies)
    testing.assert_bit_equal(together.detach(), alone.detach())
    cotangent = torch.rand_like(together)
    together.backward(cotangent)
    alone.backward(cotangent)
    wanted = sum(t.grad for t in copies if t.grad is not None)
    torch.testing.assert_close(shared.grad, wanted, rtol=1e-12, atol=1e-12)


@differentiable
def test_contract_nan_everywhere_is_nan_everywhere(op, backend):
    args = testing.inputs(op, "odd")
    if op == "component_forward_selected":  # where nothing is selected, nothing can be NaN
        with backends.use_backend("reference"):  # that of the test may have no kernel for this one
            scores = torch.ones(2, args[0].shape[1], args[1].shape[1])
            everything = ops.batch_topk(scores, scores[0].numel())
        args = (*args[:3], everything)
    if op in ("schatten", "schatten_factored"):
        args = (*args[:2], args[2] + 1, *args[3:])
    outputs, grads = answer(op, testing.map_floats(lambda t: t.fill_(torch.nan), args))
    assert all(t.isnan().all() for t in (*outputs, *grads))


# -------------------------------------------------------------------------------------------- modes, threads, repeats


@every
def test_contract_bits_repeat(op, backend, repeats):
    args = testing.inputs(op, "rank1")
    first = answer(op, args)
    for _ in range(repeats):
        testing.assert_bit_equal(answer(op, args), first)


@pytest.mark.usefixtures("several_threads")
@every
def test_contract_bits_are_the_same_on_several_python_threads(op, backend):
    problems = [testing.inputs(op, "rank1", seed=seed) for seed in range(4)]
    alone = [answer(op, args) for args in problems]

    def twenty(i: int) -> list[testing.Answer]:
        return [answer(op, problems[i]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(twenty, range(4)), alone, strict=True):
            for one in found:
                testing.assert_bit_equal(one, wanted)


@every
def test_contract_gradients_are_recorded_only_where_asked(op, backend):
    args = testing.inputs(op, "odd")
    wanted = testing.run(op, args).outputs
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            # a leaf that wants gradients, where they are not recorded
            leaves = testing.map_floats(lambda t: t.detach().clone().requires_grad_(), args)
            found = testing._OPS[op].public(*leaves)
            assert not any(t.requires_grad for t in testing.tensors_of(found))
            testing.assert_bit_equal([t.clone() for t in testing.tensors_of(found)], wanted)


@every
def test_contract_autocast_changes_nothing(op, backend):
    args = testing.inputs(op, "odd")
    wanted = answer(op, args)
    with torch.autocast("cpu", torch.bfloat16):
        testing.assert_bit_equal(answer(op, args), wanted)


@pytest.fixture(params=["dtype", "device", "not deterministic", "denormals flushed"])
def other_defaults(request):
    """The process's defaults other than torch's own, one at a time."""
    if request.param == "dtype":
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)
    elif request.param == "device":
        with torch.device("meta"):
            yield
    elif request.param == "denormals flushed":
        torch.set_flush_denormal(True)
        yield
        torch.set_flush_denormal(False)
    else:
        torch.use_deterministic_algorithms(False)  # conftest puts it back
        yield


@pytest.fixture
def before_the_defaults(op, backend):
    args = testing.inputs(op, "odd")
    return args, testing.random_cotangents(testing.run(op, args).outputs), answer(op, args)


@every
def test_contract_defaults_of_the_process_change_nothing(op, backend, before_the_defaults, other_defaults):
    args, cotangents, wanted = before_the_defaults
    found = testing.run(op, args, cotangents if op in DIFFERENTIABLE else None)
    testing.assert_bit_equal(found, wanted)


# ------------------------------------------------------------------------------------------- subclasses and transforms


class Subclass(Tensor):
    """Does nothing, but is no plain tensor."""


@every
def test_contract_parameters_and_subclasses_are_tensors(op, backend):
    args = testing.inputs(op, "odd")
    wanted = testing.run(op, args).outputs
    parameters = testing.map_floats(lambda t: torch.nn.Parameter(t, requires_grad=op in DIFFERENTIABLE), args)
    testing.assert_bit_equal(testing.run(op, parameters).outputs, wanted)
    found = testing.run(op, testing.map_floats(lambda t: t.as_subclass(Subclass), args)).outputs
    testing.assert_bit_equal([t.as_subclass(Tensor) for t in found], wanted)


@pytest.mark.parametrize("op", [op for op in testing.OPS if op != "batch_topk_counts"])  # which reads its counts
def test_contract_fake_tensors_have_the_shapes(op):
    args = testing.inputs(op, "odd")
    with FakeTensorMode() as mode:
        found = testing.run(op, testing.map_tensors(mode.from_tensor, args)).outputs
    for got, wanted in zip(found, testing.run(op, args).outputs, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.parametrize("op, backend", testing.pairs("component_sum", "component_svdvals"), indirect=["backend"])
def test_contract_vmap_is_a_loop(op, backend):
    A, B = testing.inputs(op, "odd", torch.float64)
    torch.testing.assert_close(torch.vmap(getattr(ops, op))(A, B), getattr(ops, op)(A, B), rtol=1e-13, atol=1e-13)


@differentiable
def test_contract_forward_mode_derivatives_are_refused(op, backend):
    args = testing.inputs(op, "tms", torch.float64)
    for index, t in enumerate(testing.tensors_of(args)):
        if not t.is_floating_point():
            continue
        wrong = rf"^{op.removesuffix('_masked')}: .* must not carry a tangent, as forward-mode AD is not supported$"
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=wrong):
            testing.run(op, replaced(args, index, lambda t: torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))))


def test_contract_functional_transforms_are_right_or_refused():
    A, B = testing.inputs("component_sum", "odd", torch.float64)
    with pytest.raises(NotImplementedError, match="A must not carry a tangent"):
        torch.func.jvp(lambda a: ops.component_sum(a, B), (A,), (torch.ones_like(A),))
    try:
        found = torch.func.grad(lambda a: ops.component_sum(a, B).square().sum())(A)
    except RuntimeError as error:  # torch says that its registered ops have no functorch rule
        assert "functorch" in str(error)
    else:
        leaf = A.detach().requires_grad_()
        (wanted,) = torch.autograd.grad(ops.component_sum(leaf, B).square().sum(), leaf)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_contract_half_precision_overflows_only_where_the_result_does(dtype):
    """Inside a sum float16 would end at 65504."""
    A, B = torch.full((2, 8, 2), 200.0, dtype=dtype), torch.full((2, 2, 4), 200.0, dtype=dtype)
    A[1] = -A[1]
    testing.assert_bit_equal(ops.component_sum(A, B), torch.zeros(8, 4, dtype=dtype))
    counts = torch.tensor([3, 5])
    for op in (ops.schatten, ops.schatten_factored):  # |a|^2 |b|^2 is 5e10
        total = op(A, B, counts, 0.5, 1e-4)
        wanted = op(A.double(), B.double(), counts, 0.5, 1e-4)
        torch.testing.assert_close(total.double(), wanted, rtol=1e-2, atol=0)


def test_contract_table_names_tests_that_exist():
    tests = Path(__file__).parents[1]
    rows = [line for line in (tests / "README.md").read_text().splitlines() if line.startswith("| A")]
    assert [row.split(" | ")[0] for row in rows] == [f"| A{i:02d}" for i in range(1, 37)]
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (tests / "README.md").read_text())
    assert len(named) > 50
    for file, name in named:
        assert f"\ndef {name}(" in (tests / file).read_text(), f"{file}::{name}"
