"""Every reference op against its formula written as loops over numpy arrays, and against values worked by hand.

The references are the oracle of all other tests, so what they are compared with here owes nothing to torch. At the end,
the assertion that compares with them is itself shown to fail.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fastapd import backends, ops, testing
from fastapd.reference import (
    attribution_reduce,
    attribution_tangent,
    batch_topk,
    batched_svd,
    component_forward,
    component_sum,
)

I, b, C, m, d_in, d_out = 2, 4, 3, 2, 5, 3
CHUNKED = pytest.mark.parametrize("chunk_elements", [1, 40, 1 << 23])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def tensor(array: np.ndarray) -> Tensor:
    return torch.tensor(array, dtype=torch.float64)


def assert_equal(got: Tensor, wanted: np.ndarray) -> None:
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12, atol=1e-14)


def factors(rng: np.random.Generator, rows: int = d_in, columns: int = d_out) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(I, C, rows, m)), rng.normal(size=(I, C, m, columns))


def indices(*sizes: int) -> itertools.product:
    return itertools.product(*(range(n) for n in sizes))


# ------------------------------------------------------------------------------------------------- against numpy


def test_component_sum_reference_is_its_formula(rng):
    A, B = factors(rng)
    W = np.zeros((I, d_in, d_out))
    for n, i, o, c, r in indices(I, d_in, d_out, C, m):
        W[n, i, o] += A[n, c, i, r] * B[n, c, r, o]
    assert_equal(component_sum.component_sum(tensor(A), tensor(B)), W)
    target = rng.normal(size=W.shape)
    loss, residual = component_sum.component_sum_loss(tensor(A), tensor(B), tensor(target))
    assert_equal(residual, W - target)
    flat = [(W[n].flat, target[n].flat) for n in range(I)]
    assert_equal(loss, np.array([sum((w - t) ** 2 for w, t in zip(*pair, strict=True)) for pair in flat]))


@pytest.mark.parametrize("masked", [False, True])
def test_component_forward_reference_is_its_formula(rng, masked):
    A, B = factors(rng)
    x, mask = rng.normal(size=(I, b, d_in)), rng.normal(size=(I, b, C)) if masked else np.ones((I, b, C))
    y = np.zeros((I, b, d_out))
    for n, s, c in indices(I, b, C):
        y[n, s] += mask[n, s, c] * (x[n, s] @ A[n, c] @ B[n, c])
    got = component_forward.component_forward(tensor(x), tensor(A), tensor(B), tensor(mask) if masked else None)
    assert_equal(got, y)


def selection_of(mask: np.ndarray) -> list[Tensor]:
    """The five lists of a mask [I, b, C] that selects equally many in each instance, straight from their definition."""
    lists: list[list] = [[], [], [], [], []]
    for one in mask:
        by_component = [(s, c) for c in range(mask.shape[2]) for s in range(mask.shape[1]) if one[s, c]]
        by_sample = sorted(by_component)
        lists[0].append([s for s, _ in by_component])
        lists[1].append([sum(k < c for _, k in by_component) for c in range(mask.shape[2] + 1)])
        lists[2].append([c for _, c in by_sample])
        lists[3].append([sum(k < s for k, _ in by_sample) for s in range(mask.shape[1] + 1)])
        lists[4].append([by_component.index(pair) for pair in by_sample])
    types = (torch.int32, torch.int64, torch.int32, torch.int64, torch.int32)
    return [torch.tensor(values, dtype=dtype) for values, dtype in zip(lists, types, strict=True)]


@CHUNKED
def test_component_forward_selected_reference_is_its_formula(rng, chunk_elements, monkeypatch):
    monkeypatch.setattr(component_forward, "CHUNK_ELEMENTS", chunk_elements)
    A, B = factors(rng)
    x, grad_y = rng.normal(size=(I, b, d_in)), rng.normal(size=(I, b, d_out))
    mask = np.array([[[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]], [[0, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0]]])
    selection = selection_of(mask)
    y, grad_x = np.zeros((I, b, d_out)), np.zeros_like(x)
    grad_At, grad_B = np.zeros((I, C, m, d_in)), np.zeros_like(B)
    u = np.zeros((I, 5, m))
    for n in range(I):
        for k, (c, s) in enumerate((c, s) for c, s in indices(C, b) if mask[n, s, c]):
            u[n, k] = x[n, s] @ A[n, c]
            grad_u = B[n, c] @ grad_y[n, s]
            y[n, s] += u[n, k] @ B[n, c]
            grad_x[n, s] += A[n, c] @ grad_u
            grad_At[n, c] += np.outer(grad_u, x[n, s])
            grad_B[n, c] += np.outer(u[n, k], grad_y[n, s])
    got_y, got_u = component_forward.component_forward_selected(tensor(x), tensor(A), tensor(B), *selection)
    assert_equal(got_y, y)
    assert_equal(got_u, u)
    everything = (tensor(grad_y), tensor(x), tensor(A), tensor(B), tensor(u), *selection)
    for needed in indices(2, 2, 2):
        found = component_forward.component_forward_selected_backward(*everything, *map(bool, needed))
        for got, wanted, need in zip(found, (grad_x, grad_At, grad_B), needed, strict=True):
            if need:
                assert_equal(got, wanted)
            else:
                assert got.shape == (0,)
    for need_x in (True, False):
        buffers = [tensor(rng.normal(size=a.shape)) for a in (grad_At, grad_B)]
        before = [t.numpy().copy() for t in buffers]
        found = component_forward.component_forward_selected_accumulate(*everything, need_x, *buffers)
        assert_equal(found, grad_x if need_x else np.zeros(0))
        for got, start, gradient in zip(buffers, before, (grad_At, grad_B), strict=True):
            assert_equal(got, start + gradient)


@CHUNKED
@pytest.mark.parametrize("shared", [False, True])
def test_attribution_reduce_reference_is_its_formula(rng, chunk_elements, shared, monkeypatch):
    monkeypatch.setattr(attribution_reduce, "CHUNK_ELEMENTS", chunk_elements)
    n_outputs, widths = 4, ((d_in, d_out), (d_out, 2))
    xs = [rng.normal(size=(I, b, rows)) for rows, _ in widths]
    gs = [rng.normal(size=(I, 1 if shared else b, n_outputs, columns)) for _, columns in widths]
    As, Bs = zip(*(factors(rng, *width) for width in widths), strict=True)
    grad = rng.normal(size=(I, b, C))
    a = np.zeros((I, b, C))
    grad_As, grad_Bs = [np.zeros_like(A) for A in As], [np.zeros_like(B) for B in Bs]
    for n, s, c, o in indices(I, b, C, n_outputs):
        g_of = [g[n, 0 if shared else s, o] for g in gs]
        # <df_o / dW_l, A_lc B_lc> with df_o / dW_l = x g^T
        layers = zip(xs, g_of, As, Bs, strict=True)
        inner = sum((np.outer(x[n, s], g) * (A[n, c] @ B[n, c])).sum() for x, g, A, B in layers)
        a[n, s, c] += inner**2
        for layer, (x, g) in enumerate(zip(xs, g_of, strict=True)):
            dP = 2 * inner * grad[n, s, c] * np.outer(x[n, s], g)
            grad_As[layer][n, c] += dP @ Bs[layer][n, c].T
            grad_Bs[layer][n, c] += As[layer][n, c].T @ dP
    inputs = [[tensor(t) for t in ts] for ts in (xs, gs, As, Bs)]
    assert_equal(attribution_reduce.attribution_reduce(*inputs), a)
    found = attribution_reduce.attribution_reduce_backward(tensor(grad), *inputs)
    grad_Ats = [g.swapaxes(-1, -2) for g in grad_As]
    for got, wanted in zip(found, (*grad_Ats, *grad_Bs), strict=True):
        assert got.is_contiguous()
        assert_equal(got, wanted)


@CHUNKED
@pytest.mark.parametrize("shared", [False, True])
def test_attribution_tangent_reference_is_its_formula(rng, chunk_elements, shared, monkeypatch):
    """Three barriers, the first two gated; one source with left factors, and one that is an input."""
    monkeypatch.setattr(attribution_tangent, "CHUNK_ELEMENTS", chunk_elements)
    widths, terms, pairs = (3, 2, 4), ((2, 0), (2, 2), (1, 1), (1, 2)), ((0, 1), (0, 2), (1, 2))
    xs, A = [rng.normal(size=(I, b, width)) for width in (5, 3)], rng.normal(size=(I, C, 5, m))
    rows = (5, 3, m)  # of the sources: both inputs, and x_0 A
    Fs = [rng.normal(size=(I, C, rows[source], widths[j])) for source, j in terms]
    gates = [rng.normal(size=(I, b, widths[j])) for j in (0, 1)]
    links = [rng.normal(size=(1 if shared else I, widths[i], widths[j])) for i, j in pairs]
    grad = rng.normal(size=(I, b, C))
    a = np.zeros((I, b, C))
    grad_A, grad_Fs = np.zeros_like(A), [np.zeros_like(F) for F in Fs]
    for n, s, c in indices(I, b, C):
        g = [np.diag(gate[n, s]) for gate in gates]
        L = {pair: link[0 if shared else n] for pair, link in zip(pairs, links, strict=True)}
        # the paths from each barrier to the output, multiplied out
        to_last = [g[0] @ (L[0, 2] + L[0, 1] @ g[1] @ L[1, 2]), g[1] @ L[1, 2], np.eye(4)]
        sources = [xs[0][n, s], xs[1][n, s], xs[0][n, s] @ A[n, c]]
        reached = list(zip(Fs, terms, strict=True))
        t = sum(sources[source] @ F[n, c] @ to_last[j] for F, (source, j) in reached)
        a[n, s, c] = t @ t
        for F, grad_F, (source, j) in zip(Fs, grad_Fs, terms, strict=True):
            flow = 2 * grad[n, s, c] * to_last[j] @ t
            grad_F[n, c] += np.outer(sources[source], flow)
            if source == 2:
                grad_A[n, c] += np.outer(xs[0][n, s], F[n, c] @ flow)
    numbers = [0], [n for term in terms for n in term], [0, 1], [n for pair in pairs for n in pair], list(widths)
    program = ([tensor(t) for t in ts] for ts in (xs, [A], Fs, gates, links))
    program = (*program, *numbers)
    assert_equal(attribution_tangent.attribution_tangent(*program), a)
    found = attribution_tangent.attribution_tangent_backward(tensor(grad), *program)
    for got, wanted in zip(found, (grad_A.swapaxes(-1, -2), *grad_Fs), strict=True):
        assert got.is_contiguous()
        assert_equal(got, wanted)


@pytest.mark.parametrize("k", [0, 1, 5, 12])
def test_batch_topk_reference_is_a_stable_sort(rng, k):
    for scores in (rng.normal(size=(I, b, C)), rng.integers(0, 3, size=(I, b, C)).astype(float)):
        scores[0, 1, 2] = np.nan
        scores[1, 0, 0], scores[1, 0, 1] = 0.0, -0.0
        mask = np.zeros(scores.shape, int)
        for n in range(I):
            pairs = sorted(indices(b, C), key=lambda sc: (not np.isnan(scores[n][sc]), -scores[n][sc]))
            for pair in pairs[:k]:
                mask[n][pair] = 1
        for got, wanted in zip(batch_topk.batch_topk(tensor(scores), k), selection_of(mask), strict=True):
            testing.assert_bit_equal(got, wanted)


@pytest.mark.parametrize("k", range(C + 1))
def test_sample_topk_reference_is_a_stable_sort_of_each_sample(rng, k):
    for scores in (rng.normal(size=(I, b, C)), rng.integers(0, 2, size=(I, b, C)).astype(float)):
        mask = np.zeros(scores.shape, int)
        for n, s in indices(I, b):
            for c in sorted(range(C), key=lambda c: -scores[n, s, c])[:k]:
                mask[n, s, c] = 1
        for got, wanted in zip(batch_topk.sample_topk(tensor(scores), k), selection_of(mask), strict=True):
            testing.assert_bit_equal(got, wanted)


@pytest.mark.parametrize("counts", [[2, 0, 12], [0, 0], [5], []], ids=str)
def test_batch_topk_counts_reference_is_a_stable_sort_of_each_instance(rng, counts):
    scores, capacity = rng.integers(0, 3, size=(len(counts), b, C)).astype(float), max(counts, default=0)
    found = batch_topk.batch_topk_counts(tensor(scores), torch.tensor(counts, dtype=torch.int64), capacity)
    for i, k in enumerate(counts):
        mask = np.zeros((1, b, C), int)
        for pair in sorted(indices(b, C), key=lambda sc: -scores[i][sc])[:k]:
            mask[0][pair] = 1
        for field, (got, wanted) in enumerate(zip(found, selection_of(mask), strict=True)):
            padding = wanted.new_zeros(0 if field in (1, 3) else capacity - k)
            testing.assert_bit_equal(got[i], torch.cat((wanted[0], padding)))
    assert [t.shape[0] for t in found] == [len(counts)] * 5


def test_component_svdvals_reference_is_that_of_the_products(rng):
    A, B = factors(rng)
    for rank in (m, 1):
        a, B_ = A[..., :rank], B[..., :rank, :]
        values = np.linalg.svd(a @ B_, compute_uv=False)[..., :rank]
        assert_equal(batched_svd.component_svdvals(tensor(a), tensor(B_)), values)
    wide = rng.normal(size=(I, C, 2, 5)), rng.normal(size=(I, C, 5, 3))  # rank 5 of 2 x 3 matrices
    values = np.zeros((I, C, 5))
    values[..., :2] = np.linalg.svd(wide[0] @ wide[1], compute_uv=False)
    assert_equal(batched_svd.component_svdvals(*map(tensor, wide)), values)


def dlog_of_products(A: np.ndarray, B: np.ndarray, weight) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of At and B when dP = U diag(weight(sigma)) V^T, component by component."""
    grad_At, grad_B = np.zeros(A.swapaxes(-1, -2).shape), np.zeros_like(B)
    for n, c in indices(I, C):
        U, s, Vh = np.linalg.svd(A[n, c] @ B[n, c], full_matrices=False)
        dP = sum(w * np.outer(u, v) for w, u, v in zip(weight(n, c, s), U.T, Vh, strict=True))
        grad_At[n, c], grad_B[n, c] = (dP @ B[n, c].T).T, A[n, c].T @ dP
    return grad_At, grad_B


def test_component_svdvals_reference_gradient_is_its_formula(rng):
    A, B = factors(rng)
    grad = rng.normal(size=(I, C, m))
    found = batched_svd.component_svdvals_backward(tensor(grad), tensor(A), tensor(B))
    # the product has min(d_in, d_out) = 3 values, of which the third is rounding
    wanted = dlog_of_products(A, B, lambda n, c, s: (*grad[n, c], 0.0))
    for got, formula in zip(found, wanted, strict=True):
        assert_equal(got, formula)


def test_batched_svd_reference_keeps_a_nan_in_its_component(rng):
    A, B = (tensor(t) for t in factors(rng))
    counts, grad = torch.ones(I, C, dtype=torch.int64), torch.ones(I, C, m, dtype=torch.float64)
    values = batched_svd.component_svdvals(A, B)
    gradients = batched_svd.component_svdvals_backward(grad, A, B)
    sums = batched_svd.schatten(A, B, counts, 0.9, 1e-8, -1, True)
    for bad in (np.nan, np.inf):
        A[1, 2, 0, 1] = bad
        found = batched_svd.component_svdvals(A, B)
        assert found[1, 2].isnan().all() and found.isnan().sum() == m
        assert torch.equal(found[0], values[0]) and torch.equal(found[1, :2], values[1, :2])
        total, *more = batched_svd.schatten(A, B, counts, 0.9, 1e-8, -1, True)
        assert total[1].isnan() and total[0] == sums[0][0]
        more += batched_svd.component_svdvals_backward(grad, A, B)
        for got, clean in zip(more, (*sums[1:], *gradients), strict=True):
            assert got[1, 2].isnan().all() and torch.equal(got[0], clean[0]) and torch.equal(got[1, :2], clean[1, :2])


@pytest.mark.parametrize("p", [0.5, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("exact", [False, True])
def test_schatten_reference_is_its_formula(rng, exact, p):
    eps = 1e-3
    A, B = factors(rng)
    S = np.zeros((I, C, m))
    for n, c, r in indices(I, C, m):
        S[n, c, r] = sum(A[n, c, :, r] ** 2) * sum(B[n, c, r] ** 2)
    if exact:
        S = np.linalg.svd(A @ B, compute_uv=False)[..., :m] ** 2
    counts = np.array([[0, 3, 4], [1, 1, 0]])
    active, constant = np.zeros(I), np.zeros(I)
    grad_At, grad_B = np.zeros((I, C, m, d_in)), np.zeros_like(B)
    for n, c, r in indices(I, C, m):
        active[n] += counts[n, c] * (S[n, c, r] + eps) ** (p / 2)
        constant[n] += (b - counts[n, c]) * eps ** (p / 2)
        dS = counts[n, c] * (p / 2) * (S[n, c, r] + eps) ** (p / 2 - 1)
        grad_At[n, c, r] = dS * 2 * A[n, c, :, r] * sum(B[n, c, r] ** 2)
        grad_B[n, c, r] = dS * 2 * B[n, c, r] * sum(A[n, c, :, r] ** 2)
    if exact:
        grad_At, grad_B = dlog_of_products(
            A, B, lambda n, c, s: counts[n, c] * p * s * (s**2 + eps) ** (p / 2 - 1) * (s > 1e-12)
        )
    run = batched_svd.schatten if exact else batched_svd.schatten_factored
    arguments = (tensor(A), tensor(B), torch.tensor(counts), p, eps)
    for batch, wanted in ((-1, active), (b, active + constant)):
        total, *empty = run(*arguments, batch, False)
        assert_equal(total, wanted)
        assert [t.shape for t in empty] == [(0,), (0,)]
        total, *gradients = run(*arguments, batch, True)
        assert_equal(total, wanted)
        for got, formula in zip(gradients, (grad_At, grad_B), strict=True):
            assert_equal(got, formula)


@CHUNKED
def test_schatten_reference_with_a_mask_is_its_formula(rng, chunk_elements, monkeypatch):
    monkeypatch.setattr(batched_svd, "CHUNK_ELEMENTS", chunk_elements)
    A, B = factors(rng)
    mask, p, eps = rng.uniform(size=(I, b, C)), 0.9, 1e-3
    total = np.zeros(I)
    grad_At, grad_B, grad_mask = np.zeros((I, C, m, d_in)), np.zeros_like(B), np.zeros_like(mask)
    for n, s, c, r in indices(I, b, C, m):
        norm_a, norm_b, weight = sum(A[n, c, :, r] ** 2), sum(B[n, c, r] ** 2), mask[n, s, c]
        total[n] += (weight * norm_a * norm_b + eps) ** (p / 2)
        slope = (p / 2) * (weight * norm_a * norm_b + eps) ** (p / 2 - 1)
        grad_At[n, c, r] += slope * weight * norm_b * 2 * A[n, c, :, r]
        grad_B[n, c, r] += slope * weight * norm_a * 2 * B[n, c, r]
        grad_mask[n, s, c] += slope * norm_a * norm_b
    arguments = (tensor(A), tensor(B), tensor(mask), p, eps)
    wanted = (total, grad_At, grad_B, grad_mask)
    for got, formula in zip(batched_svd.schatten_factored_masked(*arguments, True), wanted, strict=True):
        assert_equal(got, formula)
    got, *empty = batched_svd.schatten_factored_masked(*arguments, False)
    assert_equal(got, total)
    assert [t.shape for t in empty] == [(0,)] * 3
    # autograd through the same pieces agrees, and so does the op
    leaves = [t.detach().requires_grad_() for t in arguments[:3]]
    by_autograd = torch.autograd.grad(batched_svd.schatten_factored_masked(*leaves, p, eps, False)[0].sum(), leaves)
    with backends.use_backend("reference"):
        by_op = torch.autograd.grad(ops.schatten_factored(*leaves, p, eps).sum(), leaves)
    for found in (by_autograd, by_op):
        for got, formula in zip(found, (grad_At.swapaxes(-1, -2), grad_B, grad_mask), strict=True):
            assert_equal(got, formula)


# ------------------------------------------------------------------------------------------------ worked by hand

# P_0 = [[1, 2], [2, 4]] from a = (1, 2), b = (1, 2);  P_1 = [[0, 0], [3, -3]] from a = (0, 3), b = (1, -1)
A = torch.tensor([[[1.0], [2.0]], [[0.0], [3.0]]])[None]
B = torch.tensor([[[1.0, 2.0]], [[1.0, -1.0]]])[None]
X = torch.tensor([[[1.0, 1.0], [2.0, -1.0]]])


def test_component_sum_reference_by_hand():
    assert component_sum.component_sum(A, B).tolist() == [[[1, 2], [5, 1]]]
    loss, residual = component_sum.component_sum_loss(A, B, torch.ones(1, 2, 2))
    assert residual.tolist() == [[[0, 1], [4, 0]]] and loss.tolist() == [17]


def test_component_forward_reference_by_hand():
    # x_0: u = 3 and 3, outputs (3, 6) and (3, -3);  x_1: u = 0 and -3, outputs (0, 0) and (-3, 3)
    assert component_forward.component_forward(X, A, B, None).tolist() == [[[6, 3], [-3, 3]]]
    mask = torch.tensor([[[1.0, 0.0], [1.0, 0.5]]])
    assert component_forward.component_forward(X, A, B, mask).tolist() == [[[3, 6], [-1.5, 1.5]]]
    # pairs (0, 0) and (1, 1)
    selection = selection_of(np.array([[[1, 0], [0, 1]]]))
    y, u = component_forward.component_forward_selected(X, A, B, *selection)
    assert y.tolist() == [[[3, 6], [-3, 3]]] and u.tolist() == [[[3], [-3]]]


def test_attribution_reduce_reference_by_hand():
    # two outputs with gradients (1, 0) and (0, 2): products with (3, 6), (3, -3); (0, 0), (-3, 3)
    g = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    assert attribution_reduce.attribution_reduce([X], [g], [A], [B]).tolist() == [[[153, 45], [0, 45]]]
    # the same layer twice doubles what is squared; with opposite sign it cancels
    twice = attribution_reduce.attribution_reduce([X, X], [g, g], [A, A], [B, B])
    assert twice.tolist() == [[[612, 180], [0, 180]]]
    assert not attribution_reduce.attribution_reduce([X, X], [g, g], [A, -A], [B, B]).any()


def test_attribution_tangent_reference_by_hand():
    # u = x A, then t_0 = u B; the gate lets the first entry of the first sample through, and the second of the second
    one, B0, A0 = torch.ones(1, 2, 1), torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0]]]])
    gate, L = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[10.0], [100.0]]])
    run = attribution_tangent.attribution_tangent
    gated = run([one], [A0], [B0], [gate], [L], [0], [1, 0], [0], [0, 1], [2, 1])
    assert gated.tolist() == [[[30.0**2], [600.0**2]]]
    # without a gate both get through; with a second barrier's own share they cancel
    assert run([one], [A0], [B0], [], [L], [0], [1, 0], [], [0, 1], [2, 1]).tolist() == [[[630.0**2]] * 2]
    away = torch.tensor([[[[-630.0]]]])
    assert not run([one], [A0], [B0, away], [], [L], [0], [1, 0, 0, 1], [], [0, 1], [2, 1]).any()


def test_topk_reference_by_hand():
    scores = torch.tensor([[[3.0, 1.0, 2.0], [2.0, 2.0, 0.0]]])
    # 3, then of the three 2s the first two in flat order
    sample, offsets, component, sample_offsets, position = batch_topk.batch_topk(scores, 3)
    assert (sample.tolist(), offsets.tolist()) == ([[0, 1, 0]], [[0, 2, 2, 3]])
    assert (component.tolist(), sample_offsets.tolist()) == ([[0, 2, 0]], [[0, 2, 3]])
    assert position.tolist() == [[0, 2, 1]]
    assert batch_topk.sample_topk(scores, 1)[2].tolist() == [[0, 0]]
    assert batch_topk.sample_topk(scores, 2)[2].tolist() == [[0, 2, 0, 1]]


def test_schatten_reference_by_hand():
    # S_0 = 5 * 5, S_1 = 9 * 2
    counts = torch.tensor([[2, 1]])
    # components of rank one: the two forms agree
    for run in (batched_svd.schatten_factored, batched_svd.schatten):
        close = pytest.approx if run is batched_svd.schatten else lambda values: values
        assert run(A, B, counts, 2.0, 0.0, -1, False)[0].tolist() == close([68])
        assert run(A, B, torch.tensor([[2, 0]]), 1.0, 0.0, -1, False)[0].tolist() == close([10])
        # one of three samples without component 0 and three without component 1: 4 eps
        assert run(A, B, torch.tensor([[2, 0]]), 2.0, 0.25, 3, False)[0].tolist() == close([50.5 + 1])
        # d/da 2 |a|^2 |b|^2 = 4 |b|^2 a
        _, grad_At, grad_B = run(A, B, torch.tensor([[2, 0]]), 2.0, 0.0, -1, True)
        assert grad_At.flatten().tolist() == close([20, 40, 0, 0])
        assert grad_B.flatten().tolist() == close([20, 40, 0, 0])
    mask = torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])
    total, _, _, grad_mask = batched_svd.schatten_factored_masked(A, B, mask, 2.0, 1.0, True)
    assert total.tolist() == [26 + 10 + 1 + 19] and grad_mask.tolist() == [[[25, 18], [25, 18]]]


def test_component_svdvals_reference_by_hand():
    assert batched_svd.component_svdvals(A, B).flatten().tolist() == pytest.approx([5, 18**0.5])
    # [[3, 0], [0, 4]] as two columns, then as two columns that are the same
    swap = torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]])
    assert batched_svd.component_svdvals(swap, torch.eye(2)[None, None]).tolist() == [[[4, 3]]]
    twice = torch.tensor([[[[1.0, 1.0], [2.0, 2.0]]]]), torch.tensor([[[[1.0, 2.0], [1.0, 2.0]]]])
    assert batched_svd.component_svdvals(*twice)[0, 0].tolist() == pytest.approx([10, 0], abs=1e-6)


# -------------------------------------------------------------------------------- the assertion, and the memory


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", [op for op in testing.OPS if "topk" not in op])
def test_assert_matches_reference_finds_planted_errors(op, dtype):
    args = testing.inputs(op, testing.Case("small", 2, 5, 3, 2, 4, 3, n_outputs=2), dtype)
    cotangents = testing.random_cotangents(testing.reference(op, args).outputs)
    right, grads = testing.reference(op, args, cotangents)
    testing.assert_matches_reference(op, right, args, "ours", grads=grads, cotangents=cotangents)
    size = max(right[0].abs().max().item(), 1.0)

    def refused(outputs, grads=grads):
        with pytest.raises(AssertionError, match=f"^{op} on ours, "):
            testing.assert_matches_reference(op, outputs, args, "ours", grads=grads, cotangents=cotangents)

    off = right[0].clone()
    off.view(-1)[-1] += size * (1e-9 if dtype == torch.float64 else 100 * torch.finfo(dtype).eps)
    refused([off, *right[1:]])
    for value in (torch.nan, torch.inf):
        off = right[0].clone()
        off.view(-1)[0] = value
        refused([off, *right[1:]])
    refused([right[0].unsqueeze(0), *right[1:]])
    refused([right[0].float() if dtype != torch.float32 else right[0].double(), *right[1:]])
    for i, grad in enumerate(grads):
        refused(right, [*grads[:i], grad * 1.1, *grads[i + 1 :]])
        turned = grad + 0.1 * torch.randn_like(grad) * grad.abs().max()
        refused(right, [*grads[:i], turned, *grads[i + 1 :]])


def test_assert_matches_reference_counts_outputs_and_gradients():
    args = testing.inputs("component_sum_loss", "odd")
    cotangents = testing.random_cotangents(testing.reference("component_sum_loss", args).outputs)
    outputs, grads = testing.reference("component_sum_loss", args, cotangents)
    with pytest.raises(AssertionError, match="1 outputs, not 2"):
        testing.assert_matches_reference("component_sum_loss", outputs[:1], args, "ours")
    with pytest.raises(AssertionError, match="2 grads, not 3"):
        testing.assert_matches_reference(
            "component_sum_loss", outputs, args, "ours", grads=grads[:2], cotangents=cotangents
        )


@pytest.mark.parametrize("field", range(5))
def test_assert_matches_reference_finds_a_wrong_integer(field):
    scores, k = testing.inputs("batch_topk", "odd")
    found = [t.clone() for t in testing.reference("batch_topk", (scores, k)).outputs]
    testing.assert_matches_reference("batch_topk", found, (scores, k), "ours")
    found[field][0, -1] += 1
    with pytest.raises(AssertionError, match=rf"outputs\[{field}\]: 1 of .* integers differ"):
        testing.assert_matches_reference("batch_topk", found, (scores, k), "ours")


def test_assert_matches_reference_wants_zero_gradients_to_be_zero():
    x, A, B, _ = testing.inputs("component_forward_selected", "single")
    args = (x, A, B, ops.batch_topk(torch.zeros(2, 16, 1), 0))
    cotangents = [torch.ones(2, 16, 9)]
    outputs, grads = testing.run("component_forward_selected", args, cotangents)
    testing.assert_matches_reference(
        "component_forward_selected", outputs, args, "ours", grads=grads, cotangents=cotangents
    )
    with pytest.raises(AssertionError, match="component_forward_selected on ours, grads"):
        testing.assert_matches_reference(
            "component_forward_selected", outputs, args, "ours", grads=[g + 1e-30 for g in grads], cotangents=cotangents
        )


def test_assert_bit_equal_sees_every_bit():
    a = torch.tensor([0.0, torch.nan, 1.0])
    testing.assert_bit_equal(a, a.clone())
    for b in (torch.tensor([-0.0, torch.nan, 1.0]), torch.tensor([0.0, torch.nan, 1 + 2**-23]), a.double(), a[:2]):
        with pytest.raises(AssertionError):
            testing.assert_bit_equal(a, b)
    with pytest.raises(AssertionError):
        testing.assert_bit_equal([a], [a, a])


@pytest.mark.parametrize("view", testing.VIEWS)
def test_views_hold_the_same_values_elsewhere(view):
    t = torch.rand(3, 4, 5)
    other = testing.VIEWS[view](t)
    assert torch.equal(other, t)
    assert view == "offset" or not other.is_contiguous()
    assert view != "offset" or other.data_ptr() % 16


def test_cases_are_the_same_numbers_in_every_dtype():
    for op in testing.OPS:
        single, double = (testing.tensors_of(testing.inputs(op, "odd", d)) for d in (torch.float32, torch.float64))
        for a, b in zip(single, double, strict=True):
            assert torch.equal(a, b.to(a.dtype))
    A = testing.inputs("component_sum", "tms")[0]
    assert A.mT.is_contiguous() and not A.is_contiguous()


def test_memory_is_poisoned_in_tests():
    assert torch.empty(9).isnan().all() and torch.rand(3).new_empty(4).isnan().all()
    assert (torch.empty(9, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
