"""component_svdvals and the exact schatten against numpy on the products, where factors make it hard.

The gradient of sum_c n_c sum_i (sigma_ci^2 + eps)^{p/2} by the product P_c = U diag(sigma) V^T is
n_c U diag(p sigma (sigma^2 + eps)^{p/2 - 1}) V^T; here numpy forms it in float64 and carries it to the factors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastapd import backends, ops, testing

backend_of = pytest.mark.parametrize("backend", testing.cpu_backends("schatten"), indirect=True)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
EPS_REL = 1e-10
"""The smallest eps, in units of the largest squared singular value, for which gradients are promised."""


def values_of(P: np.ndarray, rank: int) -> np.ndarray:
    """Descending, cut or padded with zeros to the rank."""
    values = np.linalg.svd(P, compute_uv=False)[..., :rank]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, rank - values.shape[-1])])


def analytic(A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The sum and its gradients by A and B for [C, ..] factors, from the products in float64."""
    a, b, n = A.double().numpy(), B.double().numpy(), counts.numpy()[:, None, None]
    U, s, Vh = np.linalg.svd(a @ b, full_matrices=False)
    padded = values_of(a @ b, a.shape[-1])
    total = (counts.numpy() * ((padded**2 + eps) ** (p / 2)).sum(-1)).sum()
    dP = n * (U * (p * s * (s**2 + eps) ** (p / 2 - 1))[:, None, :]) @ Vh
    return total, dP @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ dP


def relative(got: Tensor, wanted: np.ndarray, least: float = 0.0) -> float:
    """‖got - wanted‖ / max(‖wanted‖, least)."""
    return float(np.linalg.norm(got.double().numpy() - wanted) / max(np.linalg.norm(wanted), least))


def loss_and_gradients(A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
    total = ops.schatten(A, B, counts, p, eps)
    return total.detach(), *torch.autograd.grad(total, (A, B))


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


# ------------------------------------------------------------------------------------------------------ edge cases


def plain(rng: np.random.Generator, m: int = 4, d_in: int = 9, d_out: int = 7) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(3, d_in, m)), rng.normal(size=(3, m, d_out))


def rank_above_d_out(rng):
    return plain(rng, m=7, d_in=9, d_out=4)


def rank_above_d_in(rng):
    return plain(rng, m=7, d_in=4, d_out=9)


def rank_above_both(rng):
    return plain(rng, m=11, d_in=5, d_out=3)


def one_dimension(rng):
    return plain(rng, m=3, d_in=1, d_out=1)


def duplicate_columns(rng):
    A, B = plain(rng)
    A[:, :, 2] = A[:, :, 0]
    A[1, :, 3] = A[1, :, 0]
    return A, B


def duplicate_columns_and_rows(rng):
    A, B = plain(rng)
    A[:, :, 2], B[:, 2] = A[:, :, 0], B[:, 0]
    return A, B


def combined_columns(rng):
    A, B = plain(rng, m=6)
    A[:, :, 5] = A[:, :, :5] @ rng.normal(size=5)
    B[:, 0] = B[:, 1] + B[:, 2] - 1e3 * B[:, 3]
    return A, B


def zero_columns(rng):
    A, B = plain(rng)
    A[:, :, 0], B[:, 2] = 0, 0
    A[1, :, 1:3] = 0
    return A, B


def zero_component(rng):
    A, B = plain(rng)
    A[1], B[1] = 0, 0
    return A, B


def zero_A(rng):
    A, B = plain(rng)
    return np.zeros_like(A), B


def zero_B(rng):
    A, B = plain(rng)
    return A, np.zeros_like(B)


def zero_both(rng):
    A, B = plain(rng)
    return np.zeros_like(A), np.zeros_like(B)


def repeated_values(rng):
    pairs = [(orthonormal(rng, 9, 4), orthonormal(rng, 7, 4).T) for _ in range(3)]
    A, B = (np.stack(ts) for ts in zip(*pairs, strict=True))
    A[1] *= np.array([2.0, 2.0, 1.0, 1.0])
    A[2] *= np.array([3.0, 1e-3, 1e-3, 1e-3])
    return A, B


def cancelling_pair(rng):
    A, B = plain(rng)
    A[:, :, 1], B[:, 1] = A[:, :, 0], -B[:, 0]
    return A, B


def nearly_cancelling_pair(rng):
    A, B = plain(rng)
    A[:, :, 1], B[:, 1] = A[:, :, 0], -B[:, 0] + 1e-6 * rng.normal(size=B[:, 0].shape)
    return A, B


def everything_cancels(rng):
    A, B = plain(rng)
    A[:, :, 2:], B[:, 2:] = A[:, :, :2], -B[:, :2]
    return A, B


def graded_columns(rng):
    A, B = plain(rng)
    return A * 10.0 ** -np.arange(0, 16, 4), B * 10.0 ** np.arange(0, 12, 3)[:, None]


def scale_1e_12(rng):
    A, B = plain(rng)
    return A * 1e-12, B


def scale_1e12(rng):
    A, B = plain(rng)
    return A * 1e12, B


def both_scales(rng):
    A, B = plain(rng)
    return A * 1e12, B * 1e-12


EDGES = {
    f.__name__: f
    for f in (
        plain, rank_above_d_out, rank_above_d_in, rank_above_both, one_dimension, duplicate_columns,
        duplicate_columns_and_rows, combined_columns, zero_columns, zero_component, zero_A, zero_B, zero_both,
        repeated_values, cancelling_pair, nearly_cancelling_pair, everything_cancels, graded_columns, scale_1e_12,
        scale_1e12, both_scales,
    )
}  # fmt: skip
edges = pytest.mark.parametrize("edge", EDGES)


def edge_factors(edge: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [C, d_in, m] and B [C, m, d_out]."""
    A, B = EDGES[edge](np.random.default_rng(3))
    return torch.tensor(A, dtype=dtype), torch.tensor(B, dtype=dtype)


@each_dtype
@edges
@backend_of
def test_component_svdvals_are_those_of_the_products(backend, edge, dtype):
    A, B = edge_factors(edge, dtype)
    a, b = A.double().numpy(), B.double().numpy()
    wanted, found = values_of(a @ b, A.shape[-1]), ops.component_svdvals(A, B)
    assert found.dtype == dtype and found.shape == wanted.shape
    assert (found >= 0).all() and (found.diff(dim=-1) <= 0).all(), "descending"
    error = np.abs(found.double().numpy() - wanted)
    if edge == "everything_cancels":  # the largest value is rounding
        assert (error <= 1e-15 * (np.linalg.norm(a, axis=(1, 2)) * np.linalg.norm(b, axis=(1, 2)))[:, None]).all()
    else:
        assert (error <= (1e-9 if dtype == torch.float64 else 1e-6) * wanted[:, :1]).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("p", [0.5, 0.9, 1.0, 2.0])
@edges
@backend_of
def test_schatten_and_its_gradient_are_those_of_the_products(backend, edge, p, dtype, tolerance):
    A, B = edge_factors(edge, dtype)
    counts = torch.tensor([2, 1, 5])
    size_A, size_B = (float(t.double().norm()) or 1.0 for t in (A, B))
    largest = float(values_of(A.double().numpy() @ B.double().numpy(), 1).max())
    if largest < 1e-9 * size_A * size_B:  # zero, or rounding: the factors set the scale
        largest = size_A * size_B
    eps = EPS_REL * largest**2
    total, grad_A, grad_B = loss_and_gradients(A, B, counts, p, eps)
    wanted, wanted_A, wanted_B = analytic(A, B, counts, p, eps)
    assert abs(total.item() - wanted) <= 0.1 * tolerance * wanted
    # a gradient that is zero is compared with what a component of this size could have
    least = eps ** (p / 2 - 0.5) * p
    assert relative(grad_A, wanted_A, least * size_B) <= tolerance
    assert relative(grad_B, wanted_B, least * size_A) <= tolerance


@pytest.mark.parametrize("eps", [0.0, 1e-16, 1e-8])
@each_dtype
@edges
@backend_of
def test_schatten_of_edges_is_finite(backend, edge, dtype, eps):
    A, B = edge_factors(edge, dtype)
    for p in (1e-3, 0.5, 0.9, 1.0, 1.5, 2.0, 2.5):
        for t in loss_and_gradients(A, B, torch.tensor([2, 1, 5]), p, eps):
            assert t.isfinite().all()
    values = ops.component_svdvals(A.requires_grad_(), B.requires_grad_())
    for grad in torch.autograd.grad(values.sum(), (A, B)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("edge", ["plain", "rank_above_d_out", "rank_above_d_in", "combined_columns", "scale_1e12"])
@backend_of
def test_component_svdvals_gradient_is_that_of_the_products(backend, edge, dtype, tolerance):
    """With weights w_i on values that are distinct and not zero: dP = U diag(w) V^T."""
    A, B = edge_factors(edge, dtype)
    a, b = A.double().numpy(), B.double().numpy()
    U, s, Vh = np.linalg.svd(a @ b, full_matrices=False)
    k = min(A.shape[-1], s.shape[-1])
    weight = np.where(s[:, :k] > 1e-9 * s[:, :1], np.random.default_rng(5).normal(size=k), 0)
    cotangent = torch.zeros(B.shape[:2], dtype=dtype)
    cotangent[:, :k] = torch.tensor(weight, dtype=dtype)
    dP = (U[..., :k] * cotangent[:, None, :k].double().numpy()) @ Vh[:, :k]
    A.requires_grad_(), B.requires_grad_()
    grad_A, grad_B = torch.autograd.grad(ops.component_svdvals(A, B), (A, B), cotangent)
    assert relative(grad_A, dP @ b.swapaxes(1, 2)) <= tolerance
    assert relative(grad_B, a.swapaxes(1, 2) @ dP) <= tolerance


@pytest.mark.parametrize("size", [1e-310, 5e-324, 1e-300, 1.6e308])
@backend_of
def test_component_svdvals_at_the_ends_of_float64(backend, size):
    """Denormal and nearly infinite factors, whose products are neither."""
    a, b = torch.full((1, 1, 1), size, dtype=torch.float64), torch.full((1, 1, 1), 1e-5 / size, dtype=torch.float64)
    b.clamp_(max=1e300)
    torch.testing.assert_close(ops.component_svdvals(a, b), (a * b).squeeze(-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(ops.component_svdvals(b, a), (a * b).squeeze(-1), rtol=1e-14, atol=0)


# --------------------------------------------------------------------------------------------------- ill-conditioned


def conditioned(rng: np.random.Generator, condition: float, m: int) -> tuple[Tensor, Tensor]:
    """Three components in float32 of a condition number, their factors turned by a random rotation."""
    pairs = []
    for _ in range(3):
        root = np.sqrt(np.logspace(0, -np.log10(condition), m) if m > 1 else np.ones(1))
        turn = orthonormal(rng, m, m)
        pairs.append((orthonormal(rng, 24, m) * root @ turn, turn.T @ (orthonormal(rng, 20, m) * root).T))
    A, B = (np.stack(ts) for ts in zip(*pairs, strict=True))
    return torch.tensor(A, dtype=torch.float32), torch.tensor(B, dtype=torch.float32)


@pytest.mark.parametrize("eps_rel", [1e-10, 1e-6])
@pytest.mark.parametrize("p", [0.9, 1.0])
@pytest.mark.parametrize("m", [1, 4, 8, 16])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7])
@backend_of
def test_schatten_in_float32_reaches_its_accuracy(backend, condition, m, p, eps_rel):
    A, B = conditioned(np.random.default_rng(11), condition, m)
    counts = torch.tensor([1, 3, 2])
    total, grad_A, grad_B = loss_and_gradients(A, B, counts, p, eps_rel)
    wanted, wanted_A, wanted_B = analytic(A, B, counts, p, eps_rel)
    assert abs(total.item() - wanted) <= 1e-6 * wanted
    assert relative(grad_A, wanted_A) <= 1e-5
    assert relative(grad_B, wanted_B) <= 1e-5


@pytest.mark.parametrize("m", [2, 8, 16])
@pytest.mark.parametrize("condition", [1e5, 1e9, 1e12])
@backend_of
def test_component_svdvals_resolve_small_values(backend, condition, m):
    """A Gram matrix would lose what is below 1e-8 of the largest."""
    rng = np.random.default_rng(13)
    wanted = np.logspace(0, -np.log10(condition), m)
    root = np.sqrt(wanted)
    A, B = orthonormal(rng, 24, m) * root, (orthonormal(rng, 20, m) * root).T
    found = ops.component_svdvals(torch.tensor(A)[None], torch.tensor(B)[None])[0].numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-3 if condition > 1e11 else 1e-6)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-15 * m)


@each_dtype
@pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
def test_schatten_of_a_component_does_not_depend_on_its_neighbours(cpu_level, dtype):
    """Vector lanes hold a component each, whatever it needs: few sweeps or many, or another algorithm."""
    rng = np.random.default_rng(17)
    parts = [edge_factors(edge, dtype) for edge in ("plain", "duplicate_columns", "zero_columns", "graded_columns")]
    for condition in (1e2, 1e6, 1e10):
        A, B = conditioned(rng, condition, 4)
        parts.append((A[:, :9].to(dtype), B[..., :7].to(dtype)))
    A, B = (torch.cat(ts) for ts in zip(*parts, strict=True))
    counts = torch.arange(1, len(A) + 1)
    together = loss_and_gradients(A, B, counts, 0.9, 1e-8)
    order = torch.tensor(rng.permutation(len(A)))
    turned = loss_and_gradients(A[order], B[order], counts[order], 0.9, 1e-8)
    testing.assert_bit_equal(turned[1:], [t[order] for t in together[1:]])
    values = ops.component_svdvals(A, B)
    for c in range(len(A)):
        alone = loss_and_gradients(A[c : c + 1], B[c : c + 1], counts[c : c + 1], 0.9, 1e-8)
        testing.assert_bit_equal(alone[1:], [t[c : c + 1] for t in together[1:]])
        testing.assert_bit_equal(ops.component_svdvals(A[c : c + 1], B[c : c + 1]), values[c : c + 1])


# ------------------------------------------------------------------------------------------------------- properties


def test_schatten_properties_of_any_factors():
    """Permuted components permute their values; a rotation inside a component changes nothing; the column form
    bounds the exact one for p = 1."""
    hypothesis = pytest.importorskip("hypothesis", reason="property tests need hypothesis")
    st = hypothesis.strategies
    size = st.integers(1, 6)

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
    @hypothesis.given(data=st.data(), shape=st.tuples(size, size, size, size), seed=st.integers(0, 2**32 - 1))
    def hold(data: Any, shape: tuple[int, int, int, int], seed: int) -> None:
        n_components, d_in, m, d_out = shape
        rng = np.random.default_rng(seed)
        # small integers make zero, duplicate and dependent columns common
        draw = data.draw(st.sampled_from([lambda s: rng.integers(-1, 2, s), lambda s: rng.normal(size=s)]))
        A = torch.tensor(draw((n_components, d_in, m)), dtype=torch.float64)
        B = torch.tensor(draw((n_components, m, d_out)), dtype=torch.float64)
        order = torch.tensor(data.draw(st.permutations(range(n_components))))
        counts = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n_components, max_size=n_components)))
        turn = torch.tensor(orthonormal(rng, m, m))
        for backend in testing.cpu_backends("schatten"):
            if backends.explain("component_svdvals", A, B)[backend]:
                continue
            with backends.use_backend(backend):
                values = ops.component_svdvals(A, B)
                exact = ops.schatten(A, B, counts, 1.0, 0.0)
                assert torch.equal(ops.component_svdvals(A[order], B[order]), values[order])
                turned = ops.component_svdvals(A @ turn, turn.mT @ B)
                torch.testing.assert_close(turned, values, rtol=0, atol=1e-13 * (1 + values.max().item()))
                permuted = ops.schatten(A[order], B[order], counts[order], 1.0, 0.0)
                torch.testing.assert_close(permuted, exact, rtol=1e-13, atol=0)
                assert exact <= ops.schatten_factored(A, B, counts, 1.0, 0.0) * (1 + 1e-12) + 1e-12

    hold()
