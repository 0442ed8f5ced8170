"""The functions in the research code's signatures against its formulas, written out here: no package is needed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastapd.compat import _apd_attributions, _apd_common
from fastapd.compat import _apd_functions as apd


def _close(ours: Tensor, wanted: Tensor) -> None:
    assert ours.shape == wanted.shape
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6 * float(wanted.detach().abs().max() + 1))


class _Hook(nn.Identity):
    """A hook point."""


class _Layer(nn.Module):
    """Components of one layer, as the research code's modules offer them."""

    def __init__(self, *shape: int, d_in: int, m: int, d_out: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(*shape, d_in, m)), nn.Parameter(torch.randn(*shape, m, d_out))
        self.hook_pre, self.hook_component_acts, self.hook_post = _Hook(), _Hook(), _Hook()

    @property
    def component_weights(self) -> Tensor:
        return self.A @ self.B


class _Model(nn.Module):
    """Two layers, x W1 -> tanh -> W2, with or without instances."""

    def __init__(self, n: tuple[int, ...]) -> None:
        super().__init__()
        self.C = 6
        self.first = _Layer(*n, 6, d_in=5, m=2, d_out=4)
        self.second = _Layer(*n, 6, d_in=4, m=2, d_out=3)


def _acts(n: tuple[int, ...]) -> dict[str, Any]:
    x, W1, W2 = torch.randn(7, *n, 5), torch.randn(*n, 5, 4), torch.randn(*n, 4, 3)
    post1 = torch.einsum("b...i,...io->b...o", x, W1).requires_grad_()
    pre2 = torch.tanh(post1)
    post2 = torch.einsum("b...i,...io->b...o", pre2, W2)
    return {
        "target_out": torch.relu(post2),
        "pre_weight_acts": {"first.hook_pre": x, "second.hook_pre": pre2},
        "post_weight_acts": {"first.hook_post": post1, "second.hook_post": post2},
    }


@pytest.mark.parametrize("n", [(), (3,)])
def test_gradient_attributions_by_factors_and_by_weights(n):
    acts, model = _acts(n), _Model(n)
    wanted: Any = 0.0
    for o in range(3):
        effect: Any = 0.0
        for name in ("first", "second"):
            post, pre = acts["post_weight_acts"][f"{name}.hook_post"], acts["pre_weight_acts"][f"{name}.hook_pre"]
            (g,) = torch.autograd.grad(acts["target_out"][..., o].sum(), post, retain_graph=True)
            P = model.get_submodule(name).component_weights
            effect = effect + torch.einsum("b...i,...cio,b...o->b...c", pre.detach(), P, g)
        wanted = wanted + effect**2
    weights = {name: model.get_submodule(name).component_weights for name in ("first", "second")}
    _close(apd.calc_grad_attributions(**acts, component_weights=weights, C=6), wanted)
    none: dict[str, Any] = {"batch": None, "out": None, "component_acts": {}}
    ours = _apd_attributions.calculate_attributions(model, **none, **acts, attribution_type="gradient")
    _close(ours, wanted)
    leaves = list(model.parameters())
    cotangent = torch.rand_like(wanted)
    for a, b in zip(torch.autograd.grad(ours, leaves, cotangent), torch.autograd.grad(wanted, leaves, cotangent),
                    strict=True):  # fmt: skip
        _close(a, b)
    with pytest.raises(ValueError, match=r"component_weights must name the layers of post_weight_acts"):
        apd.calc_grad_attributions(**acts, component_weights={"first": weights["first"]}, C=6)


def test_activation_attributions():
    acts = {"a": torch.randn(5, 6, 3), "b": torch.randn(5, 6, 2)}
    _close(apd.calc_activation_attributions(acts), sum((t**2).sum(-1) for t in acts.values()))  # type: ignore[arg-type]
    for wrong, said in (({}, "must name a layer, got none"), ({"a": torch.zeros(3)}, "3 or 4 axes, got 1 for a")):
        with pytest.raises(ValueError, match=said):
            apd.calc_activation_attributions(wrong)


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (4, 2, 2, 3)])
def test_topk_masks(shape):
    scores = torch.randn(shape)
    batch = apd.calc_topk_mask(scores, 1.3, batch_topk=True)
    sample = apd.calc_topk_mask(scores, 2, batch_topk=False)
    for mask in (batch, sample):
        assert mask.shape == scores.shape
        assert mask.dtype is torch.bool
    assert (batch.sum((0, -1)) == 5).all()
    assert (sample.sum(-1) == 2).all()
    for index in itertools.product(*(range(n) for n in shape[1:-1])):
        at = (slice(None), *index)
        assert scores[at][batch[at]].min() > scores[at][~batch[at]].max()
    kept, left = scores.masked_fill(~sample, torch.inf), scores.masked_fill(sample, -torch.inf)
    assert (kept.amin(-1) > left.amax(-1)).all()


def test_topk_counts_a_float32_quotient_as_what_it_came_from(monkeypatch):
    quotient = (torch.tensor(1) / 49).item()
    assert int(quotient * 49) == 0
    assert int(apd.calc_topk_mask(torch.rand(49, 3), quotient, True).sum()) == 1
    monkeypatch.setattr(_apd_common.settings, "as_reference", True)
    assert int(apd.calc_topk_mask(torch.rand(49, 3), quotient, True).sum()) == 0


@pytest.mark.parametrize("n", [(), (3,)])
@pytest.mark.parametrize("of", [torch.bool, torch.float32])
def test_losses(n, of):
    model = _Model(n)
    As = {name: model.get_submodule(name).A for name in ("first", "second")}
    Bs = {name: model.get_submodule(name).B for name in ("first", "second")}
    mask = torch.rand(7, *n, 6)
    mask = mask > 0.5 if of is torch.bool else mask
    wanted: Any = 0.0
    for name, A in As.items():
        S = A.square().sum(-2) * Bs[name].square().sum(-1)
        wanted = wanted + ((S * mask[..., None] + 1e-16) ** 0.45).sum((0, -2, -1))
    _close(apd.calc_schatten_loss(As, Bs, mask, 0.9, 11, "cpu"), wanted / 11 / 7)
    target = nn.ModuleDict({"first": nn.Module()})
    target["first"].weight = nn.Parameter(torch.randn(*n, 5, 4))
    apart = (As["first"] @ Bs["first"]).sum(-3) - target["first"].weight
    found = apd.calc_param_match_loss(["first"], target, model, 20, "cpu")
    _close(found, (apart**2).sum((-2, -1)) / 20)
    found.sum().backward()
    assert target["first"].weight.grad is None
    a, b = torch.randn(7, *n, 4), torch.randn(7, *n, 4)
    error = (a - b) ** 2
    _close(apd.calc_recon_mse(a, b, bool(n)), error.mean((0, 2)) if n else error.mean())
    _close(apd.calc_act_recon({"x": a, "y": b}, {"x": b, "y": b}), (error.sum(-1) / 8).mean(0))
    scores = torch.rand(7, *n, 6)
    _close(apd.calc_lp_sparsity_loss(a, scores, 0.9), (scores / 4 + 1e-16) ** 0.45)


@pytest.mark.parametrize("n", [(), (3,)])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("kind", ["none", "sparse", "dense", "float"])
def test_layers(n, batch, kind):
    layer = _Layer(*n, 6, d_in=5, m=2, d_out=4)
    x, scores = torch.randn(batch, *n, 5), torch.rand(batch, *n, 6)
    mask = {"none": None, "sparse": scores < 0.1, "dense": scores < 0.8, "float": scores}[kind]
    weights = torch.ones_like(scores) if mask is None else mask.to(x.dtype)
    each = torch.einsum("b...i,...cim,...cmo->b...co", x, layer.A, layer.B) * weights[..., None]
    _close(apd.component_layer(layer, x, mask), each.sum(-2))
    seen = []
    handle = layer.hook_component_acts.register_forward_hook(lambda m, i, o: seen.append(o))
    _close(apd.component_layer(layer, x, mask), each.sum(-2))
    _close(seen[0], each)
    handle.remove()
    _close(apd.component_layer_weight(layer), (layer.A @ layer.B).sum(-3))
