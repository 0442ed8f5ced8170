"""Taking components away: every way to ablate by hand, the order of their losses, and the paths of an effect."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastapd import APD, Decomposition, ops
from fastapd.experiments.tms import TMS
from fastapd.interventions import HOW, ascend

C = 4


def _linear(n_in: int = 5, n_out: int = 3) -> Decomposition:
    target = nn.Sequential(nn.Linear(n_in, n_out)).double().requires_grad_(False)
    return Decomposition.from_matrices(target, {"0": torch.randn(C, n_in, n_out)})


def _mlp() -> Decomposition:
    target = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).double().requires_grad_(False)
    P = {"0": torch.randn(C, 5, 6) / 2, "2": torch.randn(C, 6, 3) / 2}
    return Decomposition.from_matrices(target, P, method=APD(topk=1.5))


def _tms() -> Decomposition:
    target = TMS(3, 5, 2).double().requires_grad_(False)
    nn.init.normal_(target.linear1.weight)
    P = target.linear1.weight[:, None] / C + torch.randn(3, C, 5, 2).double() / 2
    ties = {"linear2": "linear1"}
    return Decomposition.from_matrices(target, {"linear1": P}, method=APD(topk=1.2), ties=ties)


def _x(found: Decomposition, batch: int = 7) -> Tensor:
    lead = (found.model.components.n_instances, batch) if found.model.components.n_instances > 1 else (batch,)
    return torch.rand(*lead, 5).double()


# ---- every way by hand


def _contributions(found: Decomposition, x: Tensor) -> Tensor:
    """x P_c of a target with one layer and no instances, [b, C, d_out]."""
    return torch.einsum("bi,cio->bco", x, found.parts("0")[0])


def test_ablate_zero_is_running_the_rest():
    for found in (_mlp(), _tms()):
        x = _x(found)
        for residual in (False, True):
            assert torch.equal(found.ablate(x, [0, 2], residual=residual), found(x, [0, 2], residual=residual))
            dropped = found.ablate(x, drop=[1, 3], residual=residual)
            torch.testing.assert_close(dropped, found(x, [0, 2], residual=residual))
        torch.testing.assert_close(found.ablate(x, drop=[], residual=True), found(x))
        assert not found.ablate(x, [0]).requires_grad
        selection = ops.batch_topk(found.attributions(x), 9)
        torch.testing.assert_close(found.ablate(x, selection), found(x, selection))
        torch.testing.assert_close(found.ablate(x, drop=selection), found(x, ~selection.mask))


def test_ablate_mean_by_hand():
    found = _linear()
    x, reference = torch.randn(7, 5).double(), torch.randn(9, 5).double()
    mask = torch.rand(7, C).double()
    for other in (None, reference):
        mean = _contributions(found, x if other is None else other).mean(0)  # [C, o]
        bias = found.model.target[0].bias
        wanted = torch.einsum("bc,bco->bo", mask, _contributions(found, x)) + (1 - mask) @ mean + bias
        torch.testing.assert_close(found.ablate(x, mask, how="mean", reference=other), wanted)
    torch.testing.assert_close(found.ablate(x, range(C), how="mean"), found(x, range(C)))
    # mean contributions are those of the target: a later layer's mean is taken over what it sees unablated
    deep = _mlp()
    hidden = nn.functional.gelu(deep.model.target[0](x))
    first = x @ deep.parts("0")[0, 1] + x.mean(0) @ deep.parts("0")[0, [0, 2, 3]].sum(0) + deep.model.target[0].bias
    now = nn.functional.gelu(first)
    wanted = now @ deep.parts("2")[0, 1] + hidden.mean(0) @ deep.parts("2")[0, [0, 2, 3]].sum(0)
    torch.testing.assert_close(deep.ablate(x, [1], how="mean"), wanted + deep.model.target[2].bias)


def test_ablate_resample_takes_another_sample():
    found = _linear()
    x = torch.randn(7, 5).double()
    y = _contributions(found, x)
    kept = y[:, [0, 3]].sum(1)
    gone = found.ablate(x, [0, 3], how="resample", seed=1) - kept - found.model.target[0].bias
    candidates = y[:, [1, 2]].sum(1)
    distance = (gone[:, None] - candidates[None]).norm(dim=-1)  # [b, b']
    chosen = distance.argmin(1)
    assert distance.gather(1, chosen[:, None]).max() < 1e-13
    assert (chosen != torch.arange(7)).all()
    again = [found.ablate(x, [0, 3], how="resample", seed=seed) for seed in (1, 2)]
    assert torch.equal(again[0] - kept - found.model.target[0].bias, gone) and not torch.equal(*again)
    one = torch.randn(1, 5).double()
    wanted = kept + _contributions(found, one)[:, [1, 2]].sum(1) + found.model.target[0].bias
    torch.testing.assert_close(found.ablate(x, [0, 3], how="resample", reference=one), wanted)
    with pytest.raises(ValueError, match=r"^Decomposition: x must have at least two samples to resample from, got 1"):
        found.ablate(one, [0], how="resample")


def test_ablate_resample_takes_the_same_sample_in_every_layer():
    """Each layer writes what it wrote on the other sample, of the target itself; the stream beside them is its own."""
    found = _residual()
    t, x = found.model.target, torch.randn(7, 5).double()
    first, second = found.parts("a")[0].sum(0), found.parts("b")[0].sum(0)
    h = x + t.a(x).relu()
    wrote = (x @ first + t.a.bias).relu() + (h @ second + t.b.bias).relu()  # of the sample that stands in
    candidates = x[:, None] + wrote[None]  # [b, b', 5]
    candidates = candidates.tanh() + t.c(candidates).sum(-1, keepdim=True)
    for keep in ([], {"a": [], "b": []}):
        distance = (found.ablate(x, keep, how="resample")[:, None] - candidates).norm(dim=-1)
        chosen = distance.argmin(1)
        assert distance.gather(1, chosen[:, None]).max() < 1e-13 and (chosen != torch.arange(7)).all()


def test_ablate_half_and_partial_draw_weights_of_the_inactive_ones():
    target = nn.Sequential(nn.Linear(C, C, bias=False)).double().requires_grad_(False)
    P = torch.diag_embed(torch.eye(C))  # component c writes input c to output c: the output is the weights
    found = Decomposition.from_matrices(target, {"0": P})
    x = torch.ones(4000, C).double()
    for how in ("half", "partial"):
        r = found.ablate(x, [2], how=how)
        assert (r[:, 2] == 1).all()
        rest = r[:, [0, 1, 3]]
        assert rest.mean().item() == pytest.approx(0.5, abs=0.02)
        assert rest.var().item() == pytest.approx(1 / 4 if how == "half" else 1 / 12, abs=0.01)
        assert rest.min() >= 0 and rest.max() <= 1 and ((rest == 0) | (rest == 1)).all().item() is (how == "half")
        assert torch.equal(found.ablate(x, [2], how=how), r)
        assert not torch.equal(found.ablate(x, [2], how=how, seed=1), r)
        # a weight g keeps g of a component for sure: g + (1 − g) r
        g = torch.tensor([0.25, 1.0, 0.5, 0.0])
        r = found.ablate(x, g, how=how)
        everything = found.ablate(x, [], how=how)
        torch.testing.assert_close(r, g + (1 - g) * everything)


@pytest.mark.parametrize("per_layer", [False, True])
def test_ablate_draws_one_weight_for_all_layers_or_one_each(per_layer):
    target = nn.Sequential(nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)).double().requires_grad_(False)
    P = torch.diag_embed(torch.eye(C))
    found = Decomposition.from_matrices(target, {"0": P, "1": P})
    x = torch.ones(50, C).double()
    r = found.ablate(x, {"0": []} | {"1": range(C)}, how="partial", per_layer=per_layer)
    both = found.ablate(x, [], how="partial", per_layer=per_layer)
    same = torch.allclose(both, r**2)
    assert same is not per_layer


# ---- the worst weights


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("make", [_mlp, _tms])
def test_ablate_adversarial_is_worse_than_partial_and_unmasked(make, residual):
    found = make()
    x = _x(found, 16)
    rows = found.model.to_instances
    target = rows(found(x))
    mask = found.select(x)[0].mask

    def loss(output: Tensor) -> Tensor:
        return (rows(output) - target).square().mean((-2, -1))

    options = {"residual": residual, "seed": 3}
    adversarial = loss(found.ablate(x, mask, how="adversarial", **options))
    partial = loss(found.ablate(x, mask, how="partial", **options))
    zero = loss(found.ablate(x, mask, how="zero", **options))
    unmasked = loss(found(x, range(C), residual=residual))
    assert (adversarial > partial).all() and (adversarial >= zero).all() and (adversarial >= unmasked).all()
    if residual:
        assert (partial > unmasked).all() and unmasked.max() < 1e-24
    few = loss(found.ablate(x, mask, how="adversarial", steps=0, **options))
    assert (few >= torch.stack([partial, zero, unmasked]).amax(0) * (1 - 1e-12)).all()
    assert (adversarial >= few).all()
    # nothing to choose: the output of the kept ones
    torch.testing.assert_close(found.ablate(x, range(C), how="adversarial", **options), found(x, range(C), residual))


def test_ablate_adversarial_finds_the_worst_corner_of_a_linear_layer():
    """The distance is convex in the weights, so its maximum is at a corner, which a search can try one by one."""
    target = nn.Sequential(nn.Linear(5, 1)).double().requires_grad_(False)
    found = Decomposition.from_matrices(target, {"0": torch.randn(C, 5, 1)})
    x = torch.randn(6, 5).double()
    got = found.ablate(x, [1], how="adversarial", residual=True, steps=30)
    y = _contributions(found, x)[..., 0]  # [b, C]
    missing = y[:, [0, 2, 3]]
    worst = torch.maximum(missing.clamp(min=0).sum(1), -missing.clamp(max=0).sum(1))
    torch.testing.assert_close((target(x) - got)[:, 0].abs(), worst)


def test_ablate_adversarial_climbs():
    """Past the worst of where it starts, though a model may start at a summit."""
    higher = 0
    for _ in range(5):
        found = _tms()
        x = _x(found, 16)
        far = [
            (found.ablate(x, [1], how="adversarial", residual=True, steps=steps) - found(x)).square().mean((-2, -1))
            for steps in (0, 1, 20)
        ]
        assert (far[1] >= far[0]).all() and (far[2] >= far[1]).all()
        higher += int((far[2] > 1.01 * far[0]).sum())
    assert higher > 5


def test_ascend_keeps_the_best_it_saw():
    """A loss whose gradient leads away from its largest value: the start stays the answer."""
    draw = {"": torch.tensor([0.5, 0.2]).double().view(2, 1, 1)}
    seen = []

    def loss(weights):
        (r,) = weights.values()
        seen.append(r.detach().clone())
        return torch.where(r > 0.45, 1.0 - r, torch.where(r < 0.1, 0.1 - r, r - 5)).sum((-1, -2))

    best = ascend(loss, draw, steps=10, step_size=0.05)
    values = torch.stack([loss({"": r}) for r in list(seen)])  # [tries, I]
    assert len(values) == 3 + 11
    assert torch.equal(loss(best), values.amax(0))
    assert all(((r >= 0) & (r <= 1)).all() for r in seen)


def test_ablate_adversarial_raises_any_distance():
    found = _tms()
    x = _x(found)
    by_hand = lambda a, b: (a - b).abs().amax((-2, -1))  # noqa: E731
    target = found(x)
    far = [
        by_hand(found.ablate(x, [0], how="adversarial", distance=d, residual=True), target).sum()
        for d in (by_hand, lambda a, b: by_hand(a, b).sum(), lambda a, b: -by_hand(a, b))
    ]
    assert far[0] > far[2] and far[1] > far[2]
    assert all(p.grad is None for p in found.model.components.parameters())


# ---- the table


@pytest.mark.parametrize("make", [_mlp, _tms])
def test_ablation_losses_are_those_of_ablate(make):
    found = make()
    x = _x(found, 12)
    rows, target = found.model.to_instances, found.model.to_instances(found(x))
    mask = found.select(x)[0].mask
    losses = found.ablation_losses(x, steps=3)
    assert list(losses) == ["unmasked", *HOW]
    n = found.model.components.n_instances

    def value(output: Tensor) -> list[float]:
        return (rows(output) - target).square().mean((-2, -1)).tolist()

    def held(value: float | list[float]) -> list[float]:
        assert isinstance(value, float) is (n == 1)
        return [value] if isinstance(value, float) else value

    assert held(losses["unmasked"]) == pytest.approx(value(found(x, range(C))))
    for how in HOW:
        assert list(losses[how]) == ["scrubbed", "anti-scrubbed"]
        assert held(losses[how]["scrubbed"]) == pytest.approx(value(found.ablate(x, mask, how=how, steps=3)))
        if how not in ("half", "partial"):
            anti = found.ablate(x, drop=mask, how=how, steps=3)
            assert held(losses[how]["anti-scrubbed"]) == pytest.approx(value(anti))
    alone = found.ablation_losses(x, [1], how=["half"], residual=True)
    assert list(alone) == ["unmasked", "half"] and max(held(alone["unmasked"])) < 1e-24
    assert held(alone["half"]["scrubbed"]) == pytest.approx(value(found.ablate(x, [1], how="half", residual=True)))


@pytest.mark.parametrize("how", ["half", "partial"])
def test_ablation_losses_anti_scrub_as_the_paper_does(how):
    """The active ones are off and the others have the weights of the draw; the output is the weights."""
    target = nn.Sequential(nn.Linear(C, C, bias=False)).double().requires_grad_(False)
    nn.init.eye_(target[0].weight)
    found = Decomposition.from_matrices(target, {"0": torch.diag_embed(torch.eye(C))})
    x, seen = torch.ones(2000, C).double(), []

    def distance(output: Tensor, of_target: Tensor) -> Tensor:
        seen.append(output[0])
        return (output - of_target).square().mean((-2, -1))

    losses = found.ablation_losses(x, [1], how=[how], distance=distance)
    _, scrubbed, anti = seen
    assert (scrubbed[:, 1] == 1).all() and (anti[:, 1] == 0).all()
    rest = [0, 2, 3]
    assert torch.equal(scrubbed[:, rest], anti[:, rest])
    assert anti[:, rest].mean().item() == pytest.approx(0.5, abs=0.02)
    assert losses[how]["anti-scrubbed"] == pytest.approx(losses[how]["scrubbed"] + 1 / C)


def test_ablation_losses_tell_components_that_matter():
    """One component an input: the inactive ones do not matter however they are ablated, the active one does."""
    target = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C)).double().requires_grad_(False)
    nn.init.eye_(target[0].weight), nn.init.eye_(target[2].weight)
    nn.init.zeros_(target[0].bias), nn.init.zeros_(target[2].bias)
    P = torch.diag_embed(torch.eye(C))
    found = Decomposition.from_matrices(target, {"0": P, "2": P})
    losses = found.ablation_losses(torch.eye(C).double().repeat(3, 1))
    for how in ("zero", "half", "partial", "adversarial"):
        assert losses[how]["scrubbed"] == 0.0 and losses[how]["anti-scrubbed"] > 0.05
    # another sample's component writes where this one is silent: resampling is no way to scrub here
    assert losses["unmasked"] == 0.0 and losses["resample"]["scrubbed"] > 0.05


# ---- paths


class _Residual(nn.Module):
    """Two MLP layers beside a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.a(x).relu()
        h = h + self.b(h).relu()
        return h.tanh() + self.c(h).sum(-1, keepdim=True)


def _residual() -> Decomposition:
    target = _Residual().double().requires_grad_(False)
    P = {"a": torch.randn(C, 5, 5) / 3, "b": torch.randn(C, 5, 5) / 3}
    return Decomposition.from_matrices(target, P)


def test_path_effect_by_hand():
    found = _residual()
    t, x = found.model.target, torch.randn(7, 5).double()
    gone = {name: found.parts(name)[0, [1, 3]].sum(0) for name in "ab"}
    h0 = x + t.a(x).relu()
    h = x + (t.a(x) - x @ gone["a"]).relu()  # without the components in a

    def end(h: Tensor, wrote: Tensor) -> Tensor:
        out = h + wrote.relu()
        return out.tanh() + t.c(out).sum(-1, keepdim=True)

    f = t(x)
    effect = found.path_effect(x, [1, 3], "a")
    torch.testing.assert_close(effect.total, f - end(h, t.b(h)))
    torch.testing.assert_close(effect.direct, f - end(h, t.b(h0)))
    torch.testing.assert_close(effect.indirect, end(h, t.b(h0)) - end(h, t.b(h)))
    effect = found.path_effect(x, [1, 3], "b")  # the last decomposed layer has direct effects alone
    torch.testing.assert_close(effect.total, f - end(h0, t.b(h0) - h0 @ gone["b"]))
    assert effect.indirect.abs().max() < 1e-14 and effect.direct.abs().max() > 1e-2
    effect = found.path_effect(x, [1, 3])
    torch.testing.assert_close(effect.total, f - end(h, t.b(h) - h @ gone["b"]))
    torch.testing.assert_close(effect.direct, f - end(h, t.b(h0) - h0 @ gone["b"]))
    by_name = found.path_effect(x, {"a": [1, 3]})
    assert torch.equal(by_name.total, found.path_effect(x, [1, 3], "a").total)


def test_path_effect_total_is_direct_and_indirect():
    for found in (_residual(), _mlp(), _tms()):
        x = _x(found)
        mask = torch.rand(*x.shape[:-1], C).double()
        for components in ([0], [1, 2], mask, mask > 0.5):
            for layer in (None, found.model.sites[0].name, found.model.sites[-1].name):
                effect = found.path_effect(x, components, layer)
                assert effect.total.shape == found(x).shape
                scale = effect.total.abs().max() + effect.direct.abs().max()
                assert (effect.direct + effect.indirect - effect.total).abs().max() <= 4e-16 * scale
                layers = {site.name: components for site in found.model.sites if layer in (None, site.name)}
                wanted = found(x) - found.ablate(x, drop=layers, residual=True)
                torch.testing.assert_close(effect.total, wanted)


def test_path_effect_of_a_chain_goes_through_its_layers():
    found = _mlp()
    effect = found.path_effect(torch.randn(7, 5).double(), [0], "0")
    assert effect.direct.abs().max() == 0 and effect.total.abs().max() > 1e-3
    nothing = found.path_effect(torch.randn(7, 5).double(), [])
    assert nothing.total.abs().max() < 1e-15


# ---- what is refused


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "keep or drop must be given, and not both, got neither; keep=[] ablates all components"),
        ({"keep": [0], "drop": [1]}, ValueError, "keep or drop must be given, and not both, got both"),
        ({"keep": [4]}, ValueError, "keep must be in [0, 4), got [4]"),
        ({"drop": [1, 1]}, ValueError, "drop must name each component once, got [1] more than once"),
        ({"keep": torch.tensor([0, 0, 2.0, 1])}, ValueError, "keep must have weights in [0, 1], got 0 to 2"),
        ({"keep": torch.tensor([0, 0, math.nan, 1])}, ValueError, "keep must be a mask of finite weights"),
        ({"keep": {"3": [0]}}, ValueError, "keep must name layers among 0, 2, got ['3']"),
        ({"keep": [0], "how": "median"}, ValueError, "how must be one of zero, mean, resample, half, partial, adv"),
        ({"keep": [0], "how": "adversarial", "steps": -1}, ValueError, "steps and step_size must be at least 0 and"),
        ({"keep": [0], "how": "adversarial", "step_size": 0}, ValueError, "steps and step_size must be at least 0 and"),
    ],
)
def test_ablate_refuses(arguments, error, message):
    with pytest.raises(error) as caught:
        _mlp().ablate(torch.randn(7, 5).double(), **arguments)
    assert str(caught.value).startswith(f"Decomposition: {message}")


def test_path_effect_refuses():
    found, x = _mlp(), torch.randn(7, 5).double()
    for arguments, message in (
        (([0], "1"), "layer must be one of 0, 2, got '1'"),
        (({"0": [0]}, "0"), "layer must be None when components is a mapping, got '0'"),
        ((None,), "components must be given, got None"),
        (([7],), r"components must be in \[0, 4\), got \[7\]"),
    ):
        with pytest.raises(ValueError, match=f"^Decomposition: {message}$"):
            found.path_effect(x, *arguments)


class _Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().mean(1))


def test_ablate_of_layers_with_different_samples():
    """Positions are samples of the first layer, whole sequences of the second."""
    target = _Pooled().double().requires_grad_(False)
    found = Decomposition.from_matrices(target, {"a": torch.randn(C, 5, 4), "b": torch.randn(C, 4, 3)})
    x = torch.randn(6, 7, 5).double()
    torch.testing.assert_close(found(x, range(C), residual=True), target(x))
    with pytest.raises(
        ValueError, match=r"^Decomposition: x must give every layer the same samples, got 42 samples in a"
    ):
        found.ablate(x, [0], how="partial")
    mask = {"a": torch.rand(6, 7, C), "b": torch.rand(6, C)}
    y = torch.einsum("bpi,bpc,cio->bpo", x, mask["a"].double(), found.parts("a")[0]) + target.a.bias
    wanted = torch.einsum("bi,bc,cio->bo", y.relu().mean(1), mask["b"].double(), found.parts("b")[0]) + target.b.bias
    torch.testing.assert_close(found(x, mask), wanted)
    for how in HOW:
        assert found.ablate(x, [0], how=how, per_layer=True, steps=2).shape == (6, 3)
