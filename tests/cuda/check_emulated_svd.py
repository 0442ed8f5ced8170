"""Singular values and Schatten sums on emulated CUDA kernels: every route at small sizes, and how exact each is.

By hand: FASTAPD_EMULATED_CUDA=1 python -m pytest tests/cuda/check_emulated_svd.py

The cases and the bounds of accuracy are those of tests/ops/test_batched_svd_accuracy.py, here on the route by blocks as
well, which only ranks above 32 take by themselves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastapd import _native, backends, ops, testing
from fastapd.ops import _batched_svd_cuda
from fastapd.ops._batched_svd import schatten_accumulate

module: Any = _native.load("_C_cuda").module
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EXACT = ("schatten", "component_svdvals")
COUNTS = torch.tensor([2, 1, 5])


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


accuracy = _load(Path(__file__).parents[1] / "ops" / "test_batched_svd_accuracy.py")


def slow(*values: Any, id: str | None = None) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def on_cuda_alone(poisoned_memory: None, chosen_backend: None) -> Iterator[None]:
    with backends.use_backend("cuda"):
        yield


@pytest.fixture
def order() -> Iterator[Any]:
    yield module.controls.fastapd_emulation_order
    module.controls.fastapd_emulation_order(0)


@pytest.fixture(params=["warp", "block"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who decomposes a component: groups of lanes, as for all of these sizes, or a block, as for ranks above 32."""
    if request.param == "block":
        monkeypatch.setattr(_batched_svd_cuda, "MOST_IN_WARP", 0)
    return request.param


def assert_matches(op: str, args: Any) -> None:
    """Outputs and gradients against the reference; what has no CUDA kernel is left to the reference."""
    cotangents = testing.random_cotangents(testing.reference(op, args).outputs)
    before = module.controls.fastapd_emulation_launches()
    with backends.use_backend("cuda", "reference"):
        found = testing.run(op, args, cotangents)
    assert module.controls.fastapd_emulation_launches() >= before + 2
    testing.assert_matches_reference(op, found.outputs, args, "cuda", grads=found.grads, cotangents=cotangents)


def sized(m: int, d_in: int, d_out: int, dtype: torch.dtype, n_components: int = 3) -> tuple[Tensor, Tensor]:
    """A [1, C, d_in, m] and B [1, C, m, d_out]."""
    case = testing.Case("", 1, 7, n_components, m, d_in, d_out, n_outputs=0, k=1.5)
    return testing.inputs("component_svdvals", case, dtype)[:2]


# ---------------------------------------------------------------------------------------------------- sizes and routes

# rank, d_in, d_out, components: what fills and overfills a tile of a Gram matrix, groups of lanes, a warp's registers,
# the rows of a step of the gradient, its columns of one block, and the lanes of a column
SIZES = [
    (1, 3, 70, 40), (4, 33, 5, 9), (5, 40, 12, 5), (8, 9, 300, 5), (9, 20, 17, 3), (17, 25, 20, 2),
    slow(16, 40, 17, 3), slow(32, 40, 33, 3),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, *(slow(d) for d in DTYPES[1:])], ids=names)
@pytest.mark.parametrize("m, d_in, d_out, n_components", SIZES)
@pytest.mark.parametrize("op", EXACT)
def test_svd_of_ranks_in_a_warp(op, m, d_in, d_out, n_components, dtype):
    A, B = sized(m, d_in, d_out, dtype, n_components)
    counts = torch.arange(n_components).unsqueeze(0) % 4
    assert_matches(op, (A, B) if op == "component_svdvals" else (A, B, counts, 0.9, 1e-8, 7))


BLOCKS = [(33, 40, 35, torch.float32), slow(65, 20, 66, torch.float64), slow(128, 30, 129, torch.float32)]


@pytest.mark.parametrize("m, d_in, d_out, dtype", BLOCKS)
def test_svd_of_ranks_in_a_block(m, d_in, d_out, dtype):
    """An odd rank and an even one, and the largest; what takes no time with an unused component beside it."""
    assert m > _batched_svd_cuda.MOST_IN_WARP
    A, B = sized(m, d_in, d_out, dtype, 2)
    assert_matches("schatten", (A, B, torch.tensor([[0, 3]]), 0.9, 1e-8, 7))


def test_svd_values_of_ranks_in_a_block():
    assert_matches("component_svdvals", sized(33, 40, 5, torch.float32, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("op", [*EXACT, "schatten_accumulate"])
def test_svd_of_small_ranks_in_a_block(op, dtype, monkeypatch):
    monkeypatch.setattr(_batched_svd_cuda, "MOST_IN_WARP", 0)
    args = testing.inputs(op, testing.Case("", 2, 5, 3, 3, 7, 6, n_outputs=0, k=1.5), dtype)
    cotangents = None if op == "schatten_accumulate" else testing.random_cotangents(testing.run(op, args).outputs)
    with backends.use_backend("cuda", "reference"):
        found = testing.run(op, args, cotangents)
    grads = None if cotangents is None else found.grads
    testing.assert_matches_reference(op, found.outputs, args, "cuda", grads=grads, cotangents=cotangents)


@pytest.mark.parametrize("case", [(2, 37, 70, 3, 9, 6), (1, 16, 64, 1, 5, 4), (1, 17, 65, 2, 40, 300)])
@pytest.mark.parametrize("op", ["schatten_factored", "schatten_factored_masked"])
def test_svd_of_lengths_at_any_size(op, case):
    """Samples and components that fill their tiles, or not."""
    assert_matches(op, testing.inputs(op, testing.Case("", *case, n_outputs=0, k=1.5)))


def test_svd_of_ranks_beyond_a_block_is_left_to_others():
    A, B = sized(129, 5, 4, torch.float32)
    why = "cuda: the CUDA kernels take ranks up to 128, not 129;"
    with pytest.raises(NotImplementedError, match=why):
        ops.component_svdvals(A, B)
    with pytest.raises(NotImplementedError, match=why):
        ops.schatten(A, B, COUNTS.unsqueeze(0), 0.9)
    args = (A, B, COUNTS.unsqueeze(0), 0.9, 1e-8, -1)
    buffers = torch.zeros_like(A.mT, memory_format=torch.contiguous_format), torch.zeros_like(B)
    with pytest.raises(NotImplementedError, match=why):
        schatten_accumulate(*args, True, 1.0, *buffers)
    assert schatten_accumulate(*args, False, 1.0, *buffers).isfinite().all()
    assert_matches("schatten_factored", args[:5])


# -------------------------------------------------------------------------------------------------------- accuracy

FEW = ("duplicate_columns", "everything_cancels", "graded_columns", "rank_above_both", "zero_component", "zero_A")
edges = pytest.mark.parametrize("edge", [e if e in FEW else slow(e) for e in accuracy.EDGES])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize("p", [0.9, slow(0.5), slow(1.0), slow(2.0)])
@edges
def test_svd_of_edges_is_that_of_the_products(edge, p, dtype, tolerance, route):
    """As in the tests of the op, whose function it calls."""
    accuracy.test_schatten_and_its_gradient_are_those_of_the_products(None, edge, p, dtype, tolerance)
    accuracy.test_component_svdvals_are_those_of_the_products(None, edge, dtype)


@pytest.mark.parametrize("m", [slow(4), 8, slow(16)])
@pytest.mark.parametrize("condition", [slow(1e1), slow(1e3), slow(1e5), 1e7])
def test_svd_of_conditioned_factors(condition, m, route):
    accuracy.test_schatten_in_float32_reaches_its_accuracy(None, condition, m, 0.9, 1e-10)


@pytest.mark.parametrize("m", [slow(2), 8, slow(16)])
@pytest.mark.parametrize("condition", [slow(1e5), slow(1e9), 1e12])
def test_svd_resolves_small_values(condition, m, route):
    accuracy.test_component_svdvals_resolve_small_values(None, condition, m)


@pytest.mark.parametrize("size", [1e-310, slow(5e-324), slow(1e-300), 1.6e308])
def test_svd_at_the_ends_of_float64(size, route):
    accuracy.test_component_svdvals_at_the_ends_of_float64(None, size)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_svd_keeps_a_nan_in_its_component(value, route):
    A, B = sized(3, 7, 6, torch.float32, 5)
    counts = torch.tensor([[1, 2, 3, 0, 1]])

    def of(A: Tensor) -> tuple[Tensor, ...]:
        leaves = A.clone().requires_grad_(), B.clone().requires_grad_()
        total = ops.schatten(*leaves, counts, 0.9)
        return ops.component_svdvals(A, B), total.detach(), *torch.autograd.grad(total.sum(), leaves)

    clean = of(A)
    A[0, 3, 2, 1] = value  # not used
    found = of(A)
    assert found[0][0, 3].isnan().all()
    testing.assert_bit_equal(found[1:], clean[1:])
    A[0, 1, 4, 0] = value
    found = of(A)
    assert found[0][0, 1].isnan().all()
    assert found[1].isnan().all()
    for got, wanted in zip(found[2:], clean[2:], strict=True):
        assert got[0, 1].isnan().all()
        testing.assert_bit_equal(got[0, [0, 2, 3, 4]], wanted[0, [0, 2, 3, 4]])


# ------------------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("op", ["schatten", slow("component_svdvals")])
def test_svd_does_not_depend_on_the_order_of_threads(op, order, route):
    args = testing.inputs(op, testing.Case("", 2, 9, 3, 5, 17, 11, n_outputs=0, k=1.5))
    cotangents = None if op == "component_svdvals" else testing.random_cotangents(testing.run(op, args).outputs)
    forward = testing.run(op, args, cotangents)
    for other in (1, 7, 1000003):
        order(other)
        testing.assert_bit_equal(testing.run(op, args, cotangents), forward)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float64)], ids=names)
def test_svd_of_a_component_does_not_depend_on_its_neighbours(dtype, route):
    """A warp decomposes several, which need few sweeps or many."""
    rng = np.random.default_rng(17)
    edges = ("plain", "duplicate_columns", "zero_columns", "graded_columns")
    parts = [accuracy.edge_factors(edge, dtype) for edge in edges]
    for condition in (1e2, 1e10):
        A, B = accuracy.conditioned(rng, condition, 4)
        parts.append((A[:, :9].to(dtype), B[..., :7].to(dtype)))
    A, B = (torch.cat(ts) for ts in zip(*parts, strict=True))
    counts = torch.arange(1, len(A) + 1)
    together = accuracy.loss_and_gradients(A, B, counts, 0.9, 1e-8)
    turn = torch.tensor(rng.permutation(len(A)))
    turned = accuracy.loss_and_gradients(A[turn], B[turn], counts[turn], 0.9, 1e-8)
    testing.assert_bit_equal(turned[1:], [t[turn] for t in together[1:]])
    testing.assert_bit_equal(ops.component_svdvals(A[turn], B[turn]), ops.component_svdvals(A, B)[turn])


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "factored"])
@pytest.mark.parametrize("view", testing.VIEWS)
def test_svd_takes_any_strides(view, exact):
    args = testing.inputs("schatten_accumulate", testing.Case("", 2, 9, 3, 5, 17, 11, n_outputs=0, k=1.5))
    args = (*args[:6], exact, *args[7:])
    found = testing.run("schatten_accumulate", (*testing.map_tensors(testing.VIEWS[view], args[:3]), *args[3:]))
    testing.assert_bit_equal(found, testing.run("schatten_accumulate", args))
    testing.assert_matches_reference("schatten_accumulate", found.outputs, args, "cuda")


@pytest.fixture(scope="module", autouse=True)
def say_what_was_run() -> Iterator[None]:
    yield
    print(f"\nemulated decompositions: {module.controls.fastapd_emulation_blocks()} blocks so far")
