"""Edited weights: an ordinary state dict that runs as the components that were scaled or left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastapd import Decomposition
from fastapd.components import Components
from fastapd.experiments.tms import TMS
from fastapd.model import ComponentModel, find_sites


def _tms(n_instances: int = 2) -> TMS:
    target = TMS(n_instances, 5, 2).double()
    nn.init.normal_(target.linear1.weight)
    nn.init.normal_(target.b_final, std=0.1)
    return target.requires_grad_(False)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).double().requires_grad_(False)


def _random(target: nn.Module, patterns: list[str]) -> Decomposition:
    """`target` with four random components of rank 2."""
    sites = find_sites(target, patterns)
    shapes = {site.name: site.shape for site in sites}
    components = Components(shapes, 4, 2, sites[0].weight.shape[0], 2.0, dtype=torch.float64)
    return Decomposition(ComponentModel(target, sites, components))


def test_state_dict_without_edits_is_the_targets():
    for target, patterns in ((_tms(), ["linear*"]), (_mlp(), ["0", "2"])):
        state = _random(target, patterns).state_dict()
        own = target.state_dict()
        assert list(state) == list(own)
        for name, t in own.items():
            torch.testing.assert_close(state[name], t, rtol=0, atol=0)
            assert state[name].data_ptr() != t.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_state_dict_runs_as_the_masks_do(dtype):
    target = _mlp().to(dtype)
    P = {"0": torch.randn(4, 5, 6) * 0.3, "2": torch.randn(4, 6, 3) * 0.3}
    found = Decomposition.from_matrices(target, P)
    x = torch.randn(7, 5, dtype=dtype)
    before = {name: t.clone() for name, t in target.state_dict().items()}

    def run(**edit):
        fresh = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).to(dtype)
        state = found.state_dict(**edit)
        assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
            name: (t.shape, t.dtype) for name, t in fresh.state_dict().items()
        }
        fresh.load_state_dict(state, strict=True)
        assert torch.equal(fresh(x), found.edited(**edit)(x))
        return fresh(x).detach()

    turned = torch.tensor([1.0, 0.5, 1.0, -1.0])
    torch.testing.assert_close(run(scale={3: -1.0, 1: 0.5}), found(x, turned, residual=True))
    torch.testing.assert_close(run(scale={3: -1.0, 1: 0.5}, residual=False), found(x, turned))
    torch.testing.assert_close(run(only=[1, 2]), found(x, [1, 2], residual=True))
    torch.testing.assert_close(run(only=[1, 2], residual=False), found(x, [1, 2]))
    weights = torch.tensor([0.0, 2.0, 1.0, 0.0])
    torch.testing.assert_close(run(only=[1, 2], scale={1: 2}), found(x, weights, residual=True))
    torch.testing.assert_close(run(scale={"2": {3: -1.0, 1: 0.5}}), found(x, {"2": turned}, residual=True))
    torch.testing.assert_close(run(only={"2": [1]}), found(x, {"2": [1]}, residual=True))
    torch.testing.assert_close(found.state_dict({2: 0.0})["0.weight"], before["0.weight"] - P["0"][2].to(dtype).mT)
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())


def test_state_dict_of_instances_and_a_tied_layer():
    target = _tms()
    found = _random(target, ["linear*"])
    x = torch.rand(2, 7, 5).double()
    other = found.edited({1: -1.0})
    assert isinstance(other, TMS) and other.linear2.owner is other.linear1
    torch.testing.assert_close(other.linear1.weight, target.linear1.weight - 2 * found.parts("linear1")[:, 1])
    weights = torch.tensor([1.0, -1.0, 1.0, 1.0])
    torch.testing.assert_close(other(x), found(x, weights, residual=True))
    with pytest.raises(ValueError, match=r"^Decomposition: scale must name layers among linear1, got \['linear2'\]$"):
        found.edited({"linear2": {1: 0.0}})


class _Shared(nn.Module):
    """An unembedding that shares its matrix with the embedding, which is no decomposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.unembed = nn.Linear(4, 9, bias=False)
        self.embed = nn.Embedding(9, 4)
        self.embed.weight = self.unembed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.unembed(self.embed(x))


def test_state_dict_edits_what_shares_the_matrix():
    target = _Shared().requires_grad_(False)
    found = Decomposition.from_matrices(target, {"unembed": torch.randn(3, 4, 9)})
    state = found.state_dict({0: 0.0})
    assert set(state) == {"unembed.weight", "embed.weight"}
    torch.testing.assert_close(state["unembed.weight"], target.unembed.weight - found.parts("unembed")[0, 0].mT)
    assert torch.equal(state["embed.weight"], state["unembed.weight"])
    other = found.edited({0: 0.0})
    assert torch.equal(other.unembed.weight, state["unembed.weight"]) and other.embed.weight is other.unembed.weight
    twice = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    twice[1].weight = twice[0].weight
    P = torch.randn(2, 4, 4)
    with pytest.raises(ValueError, match=r"factors must be given once for layers that share a matrix, got 1, which is"):
        Decomposition.from_matrices(twice, {"0": P, "1": P})
    both = Decomposition.from_matrices(twice, {"0": P}, ties={"1": "0"})
    assert [site.name for site in both.model.sites] == ["0", "1"]
    state = both.state_dict({0: 0.0})
    assert torch.equal(state["0.weight"], state["1.weight"])
    torch.testing.assert_close(state["0.weight"], twice[0].weight.detach() - P[0].mT)


@pytest.mark.parametrize(
    "edit, error, message",
    [
        ({"scale": {4: 0.0}}, ValueError, "scale must be in [0, 4), got [4]"),
        ({"scale": {1: math.nan}}, ValueError, "scale[1] must be finite, got nan"),
        ({"scale": {1: "2"}}, TypeError, "scale[1] must be a number, got str"),
        ({"scale": [1, 2]}, TypeError, "scale must map components to factors, got list"),
        ({"scale": {"1": {0: 0.0}}}, ValueError, "scale must name layers among 0, 2, got ['1']"),
        ({"scale": {"0": {9: 0.0}}}, ValueError, "scale['0'] must be in [0, 4), got [9]"),
        ({"only": []}, ValueError, "only must name at least one component, got none; to edit nothing leave it out"),
        ({"only": [1, 1]}, ValueError, "only must name each component once"),
        ({"only": [-1]}, ValueError, "only must be in [0, 4), got [-1]"),
        ({"only": [1], "scale": {2: 0.5}}, ValueError, "scale must name components that only keeps, got 2"),
    ],
)
def test_state_dict_refuses(edit, error, message):
    with pytest.raises(error) as caught:
        _random(_mlp(), ["0", "2"]).state_dict(**edit)
    assert str(caught.value).startswith(f"Decomposition: {message}")


class _Renaming(nn.Module):
    """Its state dict has other names than its modules, as those of wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        return self.wrapped(x)

    def state_dict(self, *args, **kwargs):
        return {name.removeprefix("wrapped."): t for name, t in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict({f"wrapped.{k}": t for k, t in state_dict.items()}, strict, assign)


def test_edits_of_a_model_whose_state_dict_has_other_names():
    model = _Renaming()
    pd = Decomposition.from_svd(model, ["wrapped.*[02]"], 3)
    state = pd.state_dict(scale={1: 0.0})
    assert list(state) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    expected = model.wrapped[0].weight - pd.parts("wrapped.0")[0, 1].mT
    torch.testing.assert_close(state["0.weight"], expected.detach(), rtol=1e-5, atol=1e-6)
    x = torch.randn(5, 4)
    found = pd.edited(scale={1: 0.0})(x).detach()
    torch.testing.assert_close(found, pd(x, active=[0, 2], residual=True), rtol=1e-5, atol=1e-6)
    assert (found - model(x)).abs().max() > 1e-2
    model.state_dict = lambda *args, **kwargs: {"0.bias": model.wrapped[0].bias}
    with pytest.raises(ValueError, match=r"the target must have wrapped\.0\.weight in its state dict, got a state"):
        pd.state_dict()
