"""Each term of the loss at values worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastapd import losses, metrics, ops
from fastapd.components import Components


def _t(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _diagonal(tied: bool = False) -> Components:
    """Two components of a 2 x 2 matrix: diag(1, 0) and diag(0, 3); twice, the second instance all zero."""
    A, B = torch.zeros(2, 2, 2, 1, dtype=torch.float64), torch.zeros(2, 2, 1, 2, dtype=torch.float64)
    A[0, 0, 0, 0] = B[0, 0, 0, 0] = 1
    A[0, 1, 1, 0], B[0, 1, 0, 1] = 1, 3
    return Components.from_factors({"l": (A, B)}, {"t": "l"} if tied else None)


def test_faithfulness_by_hand():
    W = _t([[[1, 1], [0, 1]], [[1, 2], [2, 4]]])
    # instance 0: diag(1, 3) - W = [[0, -1], [0, 2]]; instance 1: -W
    found = losses.faithfulness(_diagonal(), {"l": W}, 4)
    torch.testing.assert_close(found, _t([5 / 4, 25 / 4]))


def test_faithfulness_counts_a_tied_matrix_twice():
    W = _t([[[1, 1], [0, 1]], [[1, 2], [2, 4]]])
    found = losses.faithfulness(_diagonal(tied=True), {"l": W, "t": W.mT}, 8)
    torch.testing.assert_close(found, _t([10 / 8, 50 / 8]))


def test_faithfulness_sums_layers():
    A, B = torch.ones(1, 1, 2, 1, dtype=torch.float64), torch.ones(1, 1, 1, 3, dtype=torch.float64)
    given = Components.from_factors({"a": (A, B), "b": (2 * A, B)})
    zero = torch.zeros(1, 2, 3, dtype=torch.float64)
    found = losses.faithfulness(given, {"a": zero, "b": zero}, 12)
    torch.testing.assert_close(found, _t([(6 * 1 + 6 * 4) / 12]))


def test_faithfulness_is_zero_when_components_sum_to_the_weights():
    W = torch.randn(3, 5, 4, dtype=torch.float64)
    given = Components.from_factors({"l": metrics.svd_factors(W, 4, 2)})
    assert losses.faithfulness(given, {"l": W}, 20).max() < 1e-28
    assert losses.faithfulness(given, {"l": W + 1e-3}, 20).min() > 0.9e-6


def test_reconstruction_by_hand():
    output, target = _t([[[1, 2]], [[3, 0]]]), _t([[[0, 0]], [[3, 4]]])
    torch.testing.assert_close(losses.reconstruction(output, target), _t([5 / 2, 16 / 2]))


def test_reconstruction_can_be_differentiated_twice():
    output, target = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    output.requires_grad_()
    assert torch.autograd.gradcheck(losses.reconstruction, (output, target))
    assert torch.autograd.gradgradcheck(losses.reconstruction, (output, target))


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_reconstruction_without_instances_is_one_value(shape):
    output = _t([1, 2, 3, 4, 5, 6]).reshape(shape)
    found = losses.reconstruction(output, torch.zeros_like(output))
    assert found.shape == (1,)
    torch.testing.assert_close(found, _t([91 / 6]))


def test_reconstruction_is_differentiable_in_the_output_alone():
    output = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    losses.reconstruction(output, target).sum().backward()
    torch.testing.assert_close(output.grad, 2 * (output - target).detach() / 12)
    assert target.grad is None


def test_activation_reconstruction_by_hand():
    outputs = {"a": _t([[[1], [-2]]]), "b": _t([[[0, 0], [3, 0]]])}
    targets = {"a": _t([[[0], [0]]]), "b": _t([[[0, 0], [0, 0]]])}
    identity = {name: lambda t: t for name in outputs}
    # errors of the two samples: a 1 and 4, b 0 and 9; three hidden units
    torch.testing.assert_close(losses.activation_reconstruction(outputs, targets, identity), _t([(1 + 13) / 2 / 3]))
    relu = {"a": torch.relu, "b": lambda t: t}  # hides the -2
    torch.testing.assert_close(losses.activation_reconstruction(outputs, targets, relu), _t([(1 + 9) / 2 / 3]))
    only_b = {"b": lambda t: t}
    torch.testing.assert_close(losses.activation_reconstruction(outputs, targets, only_b), _t([9 / 2 / 2]))


def test_activation_reconstruction_refuses_no_site():
    message = "^activation_reconstruction: activations must name at least one site, got none$"
    with pytest.raises(ValueError, match=message):
        losses.activation_reconstruction({}, {}, {})


def _two_columns() -> Components:
    """One component of rank 2: squared norms 4 and 9 of the first column and row, zero of the second column."""
    A, B = torch.zeros(1, 1, 3, 2, dtype=torch.float64), torch.ones(1, 1, 2, 9, dtype=torch.float64)
    A[0, 0, 1, 0] = 2
    return Components.from_factors({"l": (A, B)})


@pytest.mark.parametrize("p, own, empty", [(1.0, 10.0, 8.0), (2.0, 100.0, 64.0)])
def test_simplicity_by_hand(p, own, empty):
    # (4 * 9 + 64)^(p/2) of the first, 64^(p/2) of the second; two of three samples select the component
    selection = ops.batch_topk(_t([[[3], [1], [2]]]), 2)
    found = losses.simplicity(_two_columns(), selection.counts, p, 64.0, n_params=10, batch=selection.batch)
    torch.testing.assert_close(found, _t([(2 * (own + empty) + 1 * 2 * empty) / (10 * 3)]))


def test_simplicity_counts_a_tied_matrix_twice():
    selection = ops.batch_topk(torch.rand(2, 3, 2, dtype=torch.float64), 4)
    once, twice = (
        losses.simplicity(_diagonal(tied), selection.counts, 0.9, 1e-16, 4, selection.batch) for tied in (False, True)
    )
    torch.testing.assert_close(twice, 2 * once)


def test_simplicity_punishes_rank():
    """Of two components with the same matrix norm, the one of rank 2 costs more for p < 2."""
    A = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    A[0, 0] = torch.diag(_t([2.0**0.5, 0]))
    A[0, 1] = torch.eye(2, dtype=torch.float64)
    given = Components.from_factors({"l": (A, torch.eye(2, dtype=torch.float64).expand(1, 2, 2, 2))})
    low, high = (
        losses.simplicity(given, ops.batch_topk(_t([[scores]]), 1).counts, 0.9, 1e-16, 4, 1)
        for scores in ([1, 0], [0, 1])
    )
    assert high > 1.4 * low


def test_losses_of_an_empty_batch_are_zero():
    empty = torch.zeros(2, 0, 2, dtype=torch.float64)
    selection = ops.batch_topk(empty, 0)
    assert torch.equal(
        losses.simplicity(_diagonal(), selection.counts, 0.9, 1e-16, 4, selection.batch).double(), _t([0, 0])
    )
    assert torch.equal(losses.reconstruction(empty, empty), _t([0, 0]))
    assert torch.equal(losses.reconstruction(empty[0], empty[0]), _t([0]))
    assert torch.equal(losses.kl_divergence(empty, empty), _t([0, 0]))
    assert torch.equal(losses.kl_divergence(empty[0], empty[0]), _t([0]))
    assert torch.equal(losses.lp_sparsity(losses.lp_weights(empty, 3, 0.9)), _t([0, 0]))
    found = losses.activation_reconstruction({"l": empty}, {"l": empty}, {"l": torch.relu})
    assert torch.equal(found, _t([0, 0]))


def test_losses_of_an_empty_selection_count_the_regulariser_alone():
    selection = ops.batch_topk(torch.rand(1, 3, 1, dtype=torch.float64), 0)
    found = losses.simplicity(_two_columns(), selection.counts, 1.0, 64.0, n_params=10, batch=selection.batch)
    torch.testing.assert_close(found, _t([3 * 2 * 8 / (10 * 3)]))


def test_reconstruction_is_twice_differentiable():
    output, target = (torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda y: losses.reconstruction(y, target), output.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda y: losses.reconstruction(y, target), output)


def test_kl_divergence_counts_an_impossible_output_as_nothing():
    target, output = _t([[[0.0, -torch.inf, 0.0]]]), _t([[[0.0, 1.0, 0.0]]]).requires_grad_()
    loss = losses.kl_divergence(output, target)
    q = 1 / (2 + torch.e)
    torch.testing.assert_close(loss.detach(), _t([0.5 / q]).log())
    loss.sum().backward()
    torch.testing.assert_close(output.grad, _t([[[q - 0.5, torch.e * q, q - 0.5]]]))
