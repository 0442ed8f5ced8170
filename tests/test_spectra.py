"""What components read and write, from their factors, and which of one decomposition is which of another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastapd import Decomposition
from fastapd.experiments.tms import TMS


def _tms(n_instances: int = 2) -> TMS:
    target = TMS(n_instances, 5, 2).double()
    nn.init.normal_(target.linear1.weight)
    nn.init.normal_(target.b_final, std=0.1)
    return target.requires_grad_(False)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).double().requires_grad_(False)


@pytest.mark.parametrize("C, rank", [(4, 2), (3, 7)])
def test_directions_are_those_of_an_svd(C, rank):
    found = Decomposition.from_factors(_mlp(), {"0": (torch.randn(C, 5, rank), torch.randn(C, rank, 6))})
    values, read, write = found.directions("0")
    P = found.parts("0")
    r = min(rank, 5)
    assert values.shape == (1, C, r) and read.shape == (1, C, 5, r) and write.shape == (1, C, 6, r)
    torch.testing.assert_close(read * values[..., None, :] @ write.mT, P)
    torch.testing.assert_close(values, torch.linalg.svdvals(P)[..., :r])
    torch.testing.assert_close(read.mT @ read, torch.eye(r).double().expand(1, C, r, r))
    torch.testing.assert_close(write.mT @ write, torch.eye(r).double().expand(1, C, r, r))
    assert (read.gather(-2, read.abs().argmax(-2, keepdim=True)) > 0).all()
    spectrum = found.spectra()["0"]
    assert spectrum.shape == (1, C, rank)
    torch.testing.assert_close(spectrum[..., :r], values)
    assert spectrum[..., r:].abs().sum() < 1e-14
    with pytest.raises(ValueError, match=r"^Decomposition: layer must be one of 0, got 'nothing'$"):
        found.directions("nothing")


def test_effective_rank_by_hand():
    P = torch.zeros(4, 5, 6)
    P[0, 0, 0] = 3.0
    P[1, :5, :5] = 2 * torch.eye(5)
    P[2, :2, :2] = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    found = Decomposition.from_matrices(_mlp(), {"0": P}).effective_rank()["0"]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(found[0], torch.tensor([1.0, 5.0, math.exp(entropy), 0.0]).double())


def test_match_finds_a_permutation():
    target, P = _tms(), torch.randn(2, 3, 5, 2).double()
    order = torch.tensor([2, 0, 1])
    ties = {"linear2": "linear1"}
    one = Decomposition.from_matrices(target, {"linear1": P}, ties=ties)
    two = Decomposition.from_matrices(target, {"linear1": torch.cat([3 * P[:, order], P[:, :1] * 0], 1)}, ties=ties)
    similarity = one.similarity(two)
    flat = nn.functional.normalize(P.flatten(2), dim=-1)
    torch.testing.assert_close(similarity[..., :3], (flat @ flat.mT)[..., order])
    assert similarity[..., 3].abs().max() == 0
    found = one.match(two)
    assert found.assignment.tolist() == [[1, 2, 0]] * 2
    torch.testing.assert_close(found.similarity, torch.ones(2, 3).double())
    back = two.match(one).assignment
    assert back.tolist() == [[2, 0, 1, -1]] * 2
    with pytest.raises(ValueError, match=r"^Decomposition: other must have the layers"):
        one.match(Decomposition.from_svd(_mlp(), ["0"], 3))
