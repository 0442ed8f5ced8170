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

from fastapd import ops, testing
from fastapd.reference import attribution_reduce, batch_topk, batched_svd, component_forward, component_sum

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
    for got, wanted in zip((*found[0], *found[1]), (*grad_As, *grad_Bs), strict=True):
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


@pytest.mark.parametrize("p", [0.5, 0.9, 2.0])
def test_schatten_reference_is_its_formula(rng, p):
    eps = 1e-3
    A, B = factors(rng)
    S = np.zeros((I, C, m))
    for n, c, r in indices(I, C, m):
        S[n, c, r] = sum(A[n, c, :, r] ** 2) * sum(B[n, c, r] ** 2)
    assert_equal(batched_svd.column_products(tensor(A), tensor(B)), S)
    counts = np.array([[0, 3, 4], [1, 1, 0]])
    active, constant = np.zeros(I), np.zeros(I)
    for n, c, r in indices(I, C, m):
        active[n] += counts[n, c] * (S[n, c, r] + eps) ** (p / 2)
        constant[n] += (b - counts[n, c]) * eps ** (p / 2)
    arguments = (tensor(A), tensor(B), torch.tensor(counts), p, eps)
    assert_equal(batched_svd.schatten_factored(*arguments, -1), active)
    assert_equal(batched_svd.schatten_factored(*arguments, b), active + constant)


@CHUNKED
def test_schatten_reference_with_a_mask_is_its_formula(rng, chunk_elements, monkeypatch):
    monkeypatch.setattr(batched_svd, "CHUNK_ELEMENTS", chunk_elements)
    A, B = factors(rng)
    mask, p, eps = rng.uniform(size=(I, b, C)), 0.9, 1e-3
    total = np.zeros(I)
    for n, s, c, r in indices(I, b, C, m):
        total[n] += (mask[n, s, c] * sum(A[n, c, :, r] ** 2) * sum(B[n, c, r] ** 2) + eps) ** (p / 2)
    assert_equal(batched_svd.schatten_factored_masked(tensor(A), tensor(B), tensor(mask), p, eps), total)
    # the gradients are taken in the same pieces
    leaves = [t.requires_grad_() for t in (tensor(A), tensor(B), tensor(mask))]
    got = torch.autograd.grad(ops.schatten_factored(*leaves, p, eps).sum(), leaves)
    by_autograd = torch.autograd.grad(batched_svd.schatten_factored_masked(*leaves, p, eps).sum(), leaves)
    for ours, wanted in zip(got, by_autograd, strict=True):
        assert_equal(ours, wanted.numpy())


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
    assert batched_svd.schatten_factored(A, B, counts, 2.0, 0.0, -1).tolist() == [68]
    assert batched_svd.schatten_factored(A, B, torch.tensor([[2, 0]]), 1.0, 0.0, -1).tolist() == [10]
    # one of three samples without component 0 and three without component 1: 4 eps
    assert batched_svd.schatten_factored(A, B, torch.tensor([[2, 0]]), 2.0, 0.25, 3).tolist() == [50.5 + 1]
    mask = torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])
    assert batched_svd.schatten_factored_masked(A, B, mask, 2.0, 1.0).tolist() == [26 + 10 + 1 + 19]


# -------------------------------------------------------------------------------- the assertion, and the memory


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", [op for op in testing.OPS if not op.endswith("topk")])
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
