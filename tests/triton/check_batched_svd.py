"""How exact the Triton kernels of Schatten sums and singular values are, and what their components keep to themselves,
in the checked interpreter; `tests/test_triton.py` runs this file.

By hand: FASTAPD_BACKEND=triton python -m pytest tests/triton/check_batched_svd.py

The cases and the bounds are those of tests/ops/test_batched_svd_accuracy.py for float32. Ranks that fill a block of
threads and rows that take many steps, which no case there has, are here, too. With `-m slow` come all of them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_here = Path(__file__).parent
checked = _load("checked", _here / "checked.py")  # before triton is imported

import numpy as np
import torch
from fastapd.kernels import batched_svd as kernels
from torch import Tensor

from fastapd import backends, ops, testing
from fastapd.ops._batched_svd import schatten_accumulate
from fastapd.reference import batched_svd as reference

accuracy = _load("accuracy", _here.parent / "ops" / "test_batched_svd_accuracy.py")

COUNTS = torch.tensor([2, 1, 5])
LONG = ("rank_above_d_out", "rank_above_d_in", "rank_above_both", "combined_columns")  # of many columns
either = pytest.mark.parametrize("exact", [True, False], ids=["exact", "factored"])


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


# of the edges that show nothing more than others do, or take long, some only with the slow ones
edges = pytest.mark.parametrize("edge", [slow(e) if e in LONG[:3] else e for e in accuracy.EDGES])
few_edges = pytest.mark.parametrize(
    "edge",
    [
        e if e in ("one_dimension", "zero_component", "zero_B", "everything_cancels") else slow(e)
        for e in accuracy.EDGES
    ],
)


@pytest.fixture(autouse=True)
def on_triton_alone(poisoned_memory: None, chosen_backend: None) -> Iterator[None]:
    with backends.use_backend("triton"):
        yield


def of_sum(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, order: str = "forward"
) -> tuple[Tensor, Tensor, Tensor]:
    """The exact sum and its gradients by A and B."""
    A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
    with checked.checked(order):
        total = ops.schatten(A, B, counts, p, eps)
    return total.detach(), *torch.autograd.grad(total.sum(), (A, B))


def of_values(A: Tensor, B: Tensor, order: str = "forward") -> Tensor:
    with checked.checked(order):
        return ops.component_svdvals(A, B)


def largest(A: Tensor, B: Tensor) -> float:
    """The largest singular value of all products."""
    return float(accuracy.values_of(A.double().numpy() @ B.double().numpy(), 1).max())


def assert_exact(A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, least: float = 0.0) -> None:
    """Within 1e-6 of the sum and 1e-5 of its gradients.

    Args:
        least: What a gradient is at least compared with, in units of the other factor's length.
    """
    total, grad_A, grad_B = of_sum(A, B, counts, p, eps)
    wanted, wanted_A, wanted_B = accuracy.analytic(A, B, counts, p, eps)
    assert abs(total.item() - wanted) <= 1e-6 * wanted
    size_A, size_B = (float(t.double().norm()) or 1.0 for t in (A, B))
    assert accuracy.relative(grad_A, wanted_A, least * size_B) <= 1e-5
    assert accuracy.relative(grad_B, wanted_B, least * size_A) <= 1e-5


# ---------------------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("p", [0.9, slow(1.0), slow(0.5), slow(2.0)])
@edges
def test_sum_and_gradient_are_those_of_the_products(edge, p):
    A, B = accuracy.edge_factors(edge, torch.float32)
    scale = largest(A, B)
    size = math.prod(float(t.double().norm()) or 1.0 for t in (A, B))
    if scale < 1e-9 * size:  # zero, or rounding: the factors set the scale
        scale = size
    eps = accuracy.EPS_REL * scale**2
    assert_exact(A, B, COUNTS, p, eps, least=eps ** (p / 2 - 0.5) * p)


@edges
def test_values_are_those_of_the_products(edge):
    A, B = accuracy.edge_factors(edge, torch.float32)
    a, b = A.double().numpy(), B.double().numpy()
    wanted, found = accuracy.values_of(a @ b, A.shape[-1]), of_values(A, B)
    assert (found >= 0).all() and (found.diff(dim=-1) <= 0).all(), "descending"
    error = np.abs(found.double().numpy() - wanted)
    if edge == "everything_cancels":  # the largest value is rounding
        assert (error <= 1e-15 * (np.linalg.norm(a, axis=(1, 2)) * np.linalg.norm(b, axis=(1, 2)))[:, None]).all()
    else:
        assert (error <= 1e-6 * wanted[:, :1]).all()


@pytest.mark.parametrize("eps", [0.0, slow(1e-16), slow(1e-8)])
@few_edges
def test_sums_of_edges_are_finite(edge, eps):
    A, B = accuracy.edge_factors(edge, torch.float32)
    for p in (0.5,) if eps == 0 else (1e-3, 0.5, 0.9, 1.0, 1.5, 2.0, 2.5):
        for t in of_sum(A, B, COUNTS, p, eps):
            assert t.isfinite().all()


@pytest.mark.parametrize("edge", ["duplicate_columns", "cancelling_pair", *map(slow, LONG)])
def test_gradients_of_dependent_columns_at_the_smallest_eps(edge):
    """With a Gram matrix in float64 the smallest values would be 1e-8 of the largest: gradients of order one."""
    A, B = accuracy.edge_factors(edge, torch.float32)
    assert_exact(A, B, COUNTS, 0.9, 1e-16 * largest(A, B) ** 2)


# ----------------------------------------------------------------------------------------------------- ill-conditioned


@pytest.mark.parametrize("eps_rel", [1e-10, slow(1e-6)])
@pytest.mark.parametrize("p", [0.9, slow(1.0)])
@pytest.mark.parametrize("m", [slow(1), 4, 8, slow(16)])
@pytest.mark.parametrize("condition", [slow(1e1), slow(1e3), slow(1e5), 1e7])
def test_sum_reaches_its_accuracy(condition, m, p, eps_rel):
    A, B = accuracy.conditioned(np.random.default_rng(11), condition, m)
    assert_exact(A, B, torch.tensor([1, 3, 2]), p, eps_rel)


@pytest.mark.parametrize("m", [2, 8, slow(16)])
@pytest.mark.parametrize("condition", [1e5, slow(1e7)])
def test_values_resolve_what_float32_factors_hold(condition, m):
    A, B = accuracy.conditioned(np.random.default_rng(13), condition, m)
    wanted = accuracy.values_of(A.double().numpy() @ B.double().numpy(), m)
    np.testing.assert_allclose(of_values(A, B).numpy(), wanted, rtol=2e-7)


@pytest.mark.parametrize("m", [17, slow(33), slow(50), slow(64)])
def test_sum_of_many_columns(m):
    """More than a tile of a Gram matrix, and more than a thread's share of columns, some of them dependent."""
    rng = np.random.default_rng(m)
    A = torch.tensor(rng.normal(size=(1, m + 9, m)), dtype=torch.float32)
    B = torch.tensor(rng.normal(size=(1, m, m - 5)), dtype=torch.float32)
    A[:, :, 3] = A[:, :, m - 1]
    assert_exact(A, B, torch.tensor([3]), 0.9, 1e-10 * largest(A, B) ** 2)


@pytest.mark.parametrize("d", [300, slow(1500)])
def test_sum_of_long_columns(d):
    """Many steps along the columns, and several programs for their gradients."""
    rng = np.random.default_rng(d)
    A = torch.tensor(rng.normal(size=(1, d, 3)), dtype=torch.float32)
    B = torch.tensor(rng.normal(size=(1, 3, d + 1)), dtype=torch.float32)
    A[:, :, 1] = A[:, :, 2]
    assert_exact(A, B, torch.tensor([3]), 0.9, 1e-16 * largest(A, B) ** 2)


def test_values_of_dependent_columns_are_rounding():
    """A column is three times another, exactly; sums of their products, rounded to float64, are not three times others.

    Of those sums components here would have a smallest value of about 1e-9 of the largest.
    """
    rng = np.random.default_rng(300)
    A = torch.tensor(rng.normal(size=(16, 300, 3)), dtype=torch.float32)
    B = torch.tensor(rng.normal(size=(16, 3, 7)), dtype=torch.float32)
    A.view(torch.int32)[:, :, 2] &= -4  # so that three times it has no more bits
    A[:, :, 1] = 3 * A[:, :, 2]
    values = of_values(A, B)
    assert (values[:, 2] <= 1e-15 * values[:, 0]).all()


def test_ranks_that_the_exact_forms_do_not_take():
    A, B = torch.zeros(1, 2, 3, kernels.MOST_RANK + 1), torch.zeros(1, 2, kernels.MOST_RANK + 1, 4)
    counts = torch.ones(1, 2, dtype=torch.int64)
    reason = "triton: the Triton kernels take ranks up to 64, not 65"
    for run in (lambda: ops.component_svdvals(A, B), lambda: ops.schatten(A, B, counts, 0.9)):
        with pytest.raises(NotImplementedError, match=reason):
            run()
    gradients = torch.zeros_like(A.mT).contiguous(), torch.zeros_like(B)
    with pytest.raises(NotImplementedError, match=reason):
        schatten_accumulate(A, B, counts, 0.9, 1e-16, 7, True, 1.0, *gradients)
    found = schatten_accumulate(A, B, counts, 1.0, 1.0, 7, False, 1.0, *gradients)
    assert found.item() == 7 * 2 * 65
    assert ops.schatten_factored(A, B, counts, 1.0, 1.0).item() == 2 * 65


# --------------------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("scale_B", [1e-30, slow(1e-10), slow(1.0), slow(1e18), 1e30])
@pytest.mark.parametrize("scale_A", [1e-30, slow(1e-10), slow(1.0), slow(1e18), 1e30])
def test_sum_at_any_scale(scale_A, scale_B):
    A, B = (t.float() for t in accuracy.edge_factors("plain", torch.float64))
    A, B = A * scale_A, B * scale_B
    eps = 1e-10 * (scale_A * scale_B) ** 2
    total, *grads = of_sum(A, B, COUNTS, 0.9, eps)
    wanted, *wanted_grads = accuracy.analytic(A, B, COUNTS, 0.9, eps)
    representable = 1e-37 < wanted < 3e38
    assert abs(total.item() - wanted) <= 1e-6 * wanted if representable else wanted > 1 or total < 1e-36
    for got, true in zip(grads, wanted_grads, strict=True):
        sound = (np.abs(true) <= 3e38) & (np.abs(true) >= 1e-37)
        np.testing.assert_allclose(got.double().numpy()[sound], true[sound], rtol=1e-5)
        assert got[torch.tensor(np.abs(true) <= 3e38)].isfinite().all()


def test_sum_of_columns_of_every_scale():
    """Each product of a column and a row is of order one, whatever they are."""
    rng = np.random.default_rng(7)
    scale = 10.0 ** np.array([30, -30, 15, -15, 0])
    A = torch.tensor(rng.normal(size=(3, 9, 5)) * scale, dtype=torch.float32)
    B = torch.tensor(rng.normal(size=(3, 5, 7)) / scale[:, None], dtype=torch.float32)
    total, *grads = of_sum(A, B, COUNTS, 0.9, 1e-10)
    wanted, *wanted_grads = accuracy.analytic(A, B, COUNTS, 0.9, 1e-10)
    assert abs(total.item() - wanted) <= 1e-6 * wanted
    for got, true, axis in zip(grads, wanted_grads, (-2, -1), strict=True):  # by the column of a factor
        error = np.linalg.norm(got.double().numpy() - true, axis=axis)
        assert (error <= 1e-5 * np.linalg.norm(true, axis=axis)).all()


# --------------------------------------------------------------------------------------- what components have in common


def collection() -> tuple[Tensor, Tensor, Tensor]:
    """Components that need few sweeps or many, counts of their number."""
    names = ("plain", "duplicate_columns")
    A, B = (torch.cat(ts) for ts in zip(*(accuracy.edge_factors(n, torch.float32) for n in names), strict=True))
    hard, easy = accuracy.conditioned(np.random.default_rng(17), 1e7, 4)
    A, B = torch.cat([A, hard[:, :9]]), torch.cat([B, easy[..., :7]])
    return A, B, torch.arange(1, len(A) + 1)


def test_a_component_does_not_depend_on_its_neighbours_nor_on_the_order_of_programs():
    A, B, counts = collection()
    together, values = of_sum(A, B, counts, 0.9, 1e-8), of_values(A, B)
    order = torch.tensor(np.random.default_rng(0).permutation(len(A)))
    turned = of_sum(A[order], B[order], counts[order], 0.9, 1e-8, "shuffled")
    testing.assert_bit_equal(turned[1:], [t[order] for t in together[1:]])
    testing.assert_bit_equal(of_values(A[order], B[order], "shuffled"), values[order])
    for c in (4, len(A) - 1):
        alone = of_sum(A[c : c + 1], B[c : c + 1], counts[c : c + 1], 0.9, 1e-8)
        testing.assert_bit_equal(alone[1:], [t[c : c + 1] for t in together[1:]])
        testing.assert_bit_equal(of_values(A[c : c + 1], B[c : c + 1]), values[c : c + 1])


@pytest.mark.parametrize("where, value", [("A", math.nan), ("B", math.inf), slow("B", math.nan), slow("A", -math.inf)])
def test_nan_stays_in_its_component(where, value):
    A, B, counts = collection()
    A, B, counts = (t[:8].unflatten(0, (2, 4)) for t in (A, B, counts))
    total, *grads = of_sum(A, B, counts, 0.9, 1e-8)
    values = of_values(A, B)
    (A if where == "A" else B)[1, 3, 2, 1] = value
    (found, *found_grads), found_values = of_sum(A, B, counts, 0.9, 1e-8), of_values(A, B)
    assert found_values[1, 3].isnan().all() and not found[1].isfinite()
    testing.assert_bit_equal(found[0], total[0])
    rest = torch.arange(len(A[0])) != 3
    for got, clean in ((found_values, values), *zip(found_grads, grads, strict=True)):
        assert not got[1, 3].isfinite().any()
        testing.assert_bit_equal((got[0], got[1, rest]), (clean[0], clean[1, rest]))


@pytest.mark.parametrize("value", [math.nan, slow(1e30)])
@either
def test_unused_components_are_nothing_whatever_they_hold(exact, value):
    A, B, counts = collection()
    A, B, counts = A[None], B[None], counts[None].clone()
    unused = [0, 4, 7]
    counts[0, unused] = 0
    public = ops.schatten if exact else ops.schatten_factored
    grads = [torch.randn(t.shape) for t in (A.mT, B)]

    def answers() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (A, B)]
        buffers = [t.clone() for t in grads]
        with checked.checked():
            total = public(*leaves, counts, 0.9, 1e-8, 40)
            added = schatten_accumulate(A, B, counts, 0.9, 1e-8, 40, exact, 0.7, *buffers)
        return [total.detach(), added, *torch.autograd.grad(total.sum(), leaves), *buffers]

    clean = answers()
    A[0, unused], B[0, unused] = value, value
    for t in grads:
        t[0, unused] = math.nan  # neither read nor written
    found = answers()
    for t in found[2:4]:
        assert not t[0, unused].any()
    for t in (*found[4:], *clean[4:]):
        t[0, unused] = 0
    testing.assert_bit_equal(found, clean)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("batch", [slow(-1), 40])
@either
def test_accumulate_adds_the_gradients_of_the_sum(exact, batch):
    A, B, counts = (t[None] for t in collection())
    grads = [torch.randn(t.shape) for t in (A.mT, B)]
    found = [t.clone() for t in grads]
    form = kernels.schatten if exact else kernels.schatten_factored
    with checked.checked():
        added = schatten_accumulate(A, B, counts, 0.9, 1e-8, batch, exact, -0.7, *found)
        total, *own = form(A, B, counts, 0.9, 1e-8, batch, True)
    testing.assert_bit_equal(added, total)
    wanted = (reference.schatten if exact else reference.schatten_factored)(A, B, counts, 0.9, 1e-8, batch, False)[0]
    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=0)
    for got, had, grad in zip(found, grads, own, strict=True):
        size = float(grad.abs().max())
        torch.testing.assert_close(got, had - 0.7 * grad, rtol=1e-6, atol=3e-7 * size)


# ------------------------------------------------------------------------------------------------------- powers, masks


def assert_masked_matches(args: tuple) -> None:
    """The same bits in two orders of programs, and close to the reference's own formulas in float64.

    Not those of autograd, which has NaN for the slope of a root at zero.
    """
    answers = []
    for order in ("forward", "shuffled"):
        with checked.checked(order):
            answers.append(torch.ops.fastapd.schatten_factored_masked(*args, True))
    testing.assert_bit_equal(*answers)
    wanted = reference.schatten_factored_masked(*(t.double() for t in args[:3]), *args[3:], True)
    for got, true in zip(answers[0], wanted, strict=True):
        size = float(true.nan_to_num().abs().max())
        torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-7 * size, equal_nan=True)


@pytest.mark.parametrize("p", [slow(1e-3), 1.5, 2.0, slow(3.0), 4.0, slow(6.0)])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_masks_of_any_sign_and_exponent(p, eps):
    """A negative base has a power where p / 2 is whole, and none elsewhere; zero to the zeroth is one."""
    case = testing.Case("signs", 2, 9, 5, 3, 6, 7, n_outputs=1)
    A, B, mask, *_ = testing.inputs("schatten_factored_masked", case)
    mask[:, ::2] -= 0.5
    mask[:, 1] = 0
    if p / 2 != p // 2:
        mask.abs_()
    assert_masked_matches((A, B, mask, p, eps))


def test_masks_in_many_tiles(monkeypatch):
    """Samples and components in several tiles each, the last of them partly filled."""
    small = {"BLOCK_BATCH": 16, "BLOCK_COMPONENTS": 4, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(kernels, "powers_config", lambda *_: small)
    case = testing.Case("tiles", 2, 37, 11, 3, 6, 7, n_outputs=1)
    args = testing.inputs("schatten_factored_masked", case)
    args[0][1, 4, 2, 1] = math.nan
    assert_masked_matches(args)


@pytest.mark.parametrize("p", [0.5, slow(1.0), 2.0])
@either
def test_sums_of_zeros_have_a_finite_gradient(exact, p):
    A, B = accuracy.edge_factors("zero_columns", torch.float32)
    A[2], B[2] = 0, 0
    public = ops.schatten if exact else ops.schatten_factored
    A.requires_grad_(), B.requires_grad_()
    with checked.checked():
        total = public(A, B, COUNTS, p, 0.0, 5)
        grads = torch.autograd.grad(total, (A, B))
    assert total.isfinite() and all(t.isfinite().all() for t in grads)
    wanted = (reference.schatten if exact else reference.schatten_factored)(
        *(t.detach()[None] for t in (A, B, COUNTS)), p, 0.0, 5, False
    )[0]
    torch.testing.assert_close(total.detach(), wanted[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("empty", ["n_instances", "batch", "n_components", "rank", "d_in", "d_out"])
@pytest.mark.parametrize("op", [op for op in testing.OPS if "schatten" in op or "svdvals" in op])
def test_empty_axes_are_defined(op, empty):
    sizes = {"n_instances": 2, "batch": 3, "n_components": 3, "rank": 2, "d_in": 4, "d_out": 5} | {empty: 0}
    args = testing.inputs(op, testing.Case("", n_outputs=0, k=0.0 if empty == "n_components" else 1.0, **sizes))
    cotangents = None
    if testing._OPS[op].differentiable:
        cotangents = [torch.ones_like(t) for t in testing.reference(op, args).outputs]
    with checked.checked():
        found = testing.run(op, args, cotangents)
    grads = None if cotangents is None else found.grads
    testing.assert_matches_reference(op, found.outputs, args, "triton", grads=grads, cotangents=cotangents)


# -------------------------------------------------------------------------------------------------------------- sweeps


def test_jacobi_ends_before_its_last_sweep(monkeypatch):
    """What takes the most sweeps, columns of a factor that is shorter than they are many, needs fewer than it may."""
    rng = np.random.default_rng(3)
    A = torch.tensor(rng.normal(size=(2, 3, 8)), dtype=torch.float32)
    B = torch.tensor(rng.normal(size=(2, 8, 9)), dtype=torch.float32)
    enough = of_values(A, B)
    monkeypatch.setattr(kernels, "SWEEPS", 15)
    testing.assert_bit_equal(of_values(A, B), enough)
