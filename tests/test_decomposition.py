"""The result: running chosen components, scores that need no training, and making one by hand."""

from __future__ import annotations

import inspect
import json
import math
import re

import pytest
import torch
from torch import Tensor, nn

from fastapd import APD, Decomposition, metrics, ops
from fastapd.components import Components
from fastapd.experiments.tms import TMS
from fastapd.model import ComponentModel, Linear, find_sites

METHOD = APD(topk=1.0)


def _tms(n_instances: int = 2) -> TMS:
    target = TMS(n_instances, 5, 2).double()
    nn.init.normal_(target.linear1.weight)
    nn.init.normal_(target.b_final, std=0.1)
    return target.requires_grad_(False)


def _of(target: nn.Module, patterns: list[str], method: APD = METHOD, factors=None, C: int = 4) -> Decomposition:
    """`target` with random components, or with `factors(weight)` of each untied layer."""
    sites = find_sites(target, patterns)
    n_instances = sites[0].weight.shape[0]
    if factors is None:
        components = Components({s.name: s.shape for s in sites}, C, 2, n_instances, 2.0, dtype=torch.float64)
    else:
        given = {s.name: factors(s.weight) for s in sites if s.tied_to is None}
        components = Components.from_factors(given, {s.name: s.tied_to for s in sites if s.tied_to})
    return Decomposition(ComponentModel(target, sites, components), method)


# ---- running it


@pytest.mark.parametrize("active", [[], [2], [3, 0], range(4), (1,), {2, 1}])
def test_decomposition_runs_the_listed_components(active):
    target = nn.Sequential(Linear(3, 5, 4)).double()
    found = _of(target, ["0"])
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    by_hand = sum((x @ found.parts("0")[:, c] for c in set(active)), torch.zeros(3, 6, 4, dtype=torch.float64))
    torch.testing.assert_close(found(x, active), by_hand)
    mask = torch.zeros(3, 6, 4, dtype=torch.float64)
    mask[..., list(active)] = 1
    torch.testing.assert_close(found(x, mask), by_hand)
    torch.testing.assert_close(found(x, ops.batch_topk(mask, int(mask[0].sum()))), by_hand)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
def test_decomposition_runs_the_listed_components_of_a_target_without_instances(leading):
    target = nn.Sequential(nn.Linear(5, 4)).double()
    found = _of(target, ["0"])
    x = torch.randn(*leading, 5, dtype=torch.float64)
    by_hand = x @ found.parts("0")[0, [1, 3]].sum(0) + target[0].bias.detach()
    torch.testing.assert_close(found(x, [1, 3]), by_hand)


def test_decomposition_with_all_svd_components_on_is_the_target():
    for target, patterns, x in (
        (_tms(), ["linear*"], torch.rand(2, 7, 5, dtype=torch.float64)),
        (nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).double(), ["0", "2"], torch.randn(7, 5).double()),
    ):
        found = _of(target, patterns, factors=lambda W: metrics.svd_factors(W, 6, 2))
        for active in (None, range(6)):
            output = found(x, active)
            assert (output - target(x)).abs().max() < 1e-13 and not output.requires_grad
        assert (found(x, range(1, 6)) - target(x)).abs().max() > 1e-3


@pytest.mark.parametrize("active, wrong", [([4], "[4]"), ([0, -1, 9], "[-1, 9]")])
def test_decomposition_refuses_indices_out_of_range(active, wrong):
    found = _of(_tms(), ["linear*"])
    with pytest.raises(ValueError) as caught:
        found(torch.rand(2, 3, 5, dtype=torch.float64), active)
    assert str(caught.value) == f"Decomposition: active must be in [0, 4), got {wrong}"


def test_decomposition_parts_are_detached():
    found = _of(_tms(), ["linear*"])
    parts = found.parts("linear1")
    assert parts.shape == (2, 4, 5, 2) and not parts.requires_grad
    assert torch.equal(parts, found.model.components.parts("linear1"))


def test_decomposition_select_is_the_methods_selection():
    found = _of(_tms(), ["linear*"], APD(topk=1.5))
    x = torch.rand(2, 8, 5, dtype=torch.float64)
    step, masked = found.select(x)
    assert torch.equal(step.mask, ops.batch_topk(step.attributions, 12).mask)
    torch.testing.assert_close(masked.output, found(x, step.selection))
    assert not masked.output.requires_grad


# ---- scores


KEYS = {"faithfulness_error", "topk_mse", "full_mse", "l0", "alive"}


def test_decomposition_scores_by_hand():
    target = _tms()
    found = _of(target, ["linear*"], APD(topk=1.5))
    x = torch.rand(2, 8, 5, dtype=torch.float64)
    scores = found.score(x)
    assert set(scores) == KEYS and all(value.shape == (2,) for value in scores.values())
    mask = found.select(x)[0].mask
    W, W_sum = target.linear1.weight, found.parts("linear1").sum(1)
    for n in range(2):
        assert scores["full_mse"][n] == pytest.approx(float((found(x, range(4)) - target(x))[n].square().mean()))
        assert scores["topk_mse"][n] == pytest.approx(float((found(x, mask) - target(x))[n].square().mean()))
        # both layers have the same error, so the tie cancels
        assert scores["faithfulness_error"][n] == pytest.approx(float((W_sum - W)[n].norm() / W[n].norm()))
        assert scores["l0"][n] == 12 / 8
        assert scores["alive"][n] == int(mask[n].any(0).sum())


def test_decomposition_scores_of_copies():
    """W/C, C times: faithful with all on, useless with one."""
    found = _of(_tms(), ["linear*"], APD(topk=1.0), lambda W: metrics.copies_factors(W, 5, 2))
    scores = found.score(torch.rand(2, 16, 5, dtype=torch.float64))
    assert scores["full_mse"].max() < 1e-28 and scores["faithfulness_error"].max() < 1e-14
    assert scores["topk_mse"].min() > 1e-3
    assert scores["l0"].tolist() == [1.0, 1.0]


def test_decomposition_scores_without_instances():
    target = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    found = _of(target, ["0", "2"], factors=lambda W: metrics.svd_factors(W, 4, 2))
    scores = found.score(torch.randn(6, 5, dtype=torch.float64))
    assert set(scores) == KEYS and all(value.shape == (1,) for value in scores.values())
    assert scores["full_mse"] < 1e-28


def test_decomposition_scores_leave_no_gradients():
    found = _of(_tms().requires_grad_(True), ["linear*"])
    scores = found.score(torch.rand(2, 8, 5, dtype=torch.float64))
    assert not any(value.requires_grad for value in scores.values())
    assert all(p.grad is None for p in (*found.model.components.parameters(), *found.model.target.parameters()))


# ---- the ways to say what runs


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).double().requires_grad_(False)


def _masked(found: Decomposition, x: Tensor, weights: dict[str, Tensor], residual: bool = False) -> Tensor:
    """`_mlp` by hand: x Σ_c s_c P_c + b in each layer, weights [.., C] with the axes of x."""
    target = found.model.target
    for name in ("0", "2"):
        P, module = found.parts(name)[0], target.get_submodule(name)
        assert isinstance(module, nn.Linear)
        y = torch.einsum("...i,...c,cio->...o", x, weights[name].to(x).expand(*x.shape[:-1], -1), P)
        if residual:
            y = y + x @ (module.weight.mT - P.sum(0))
        x = y + module.bias
        x = nn.functional.gelu(x) if name == "0" else x
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decomposition_with_all_on_is_the_model_however_unfaithful(dtype):
    for target, patterns, x in (
        (_tms(3), ["linear*"], torch.rand(3, 7, 5)),
        (_mlp(), ["0", "2"], torch.randn(2, 7, 5)),
    ):
        target, x = target.to(dtype), x.to(dtype)
        found = _of(target, patterns, factors=lambda W: (torch.randn(len(W), 4, W.shape[1], 2).to(W),
                                                         torch.randn(len(W), 4, 2, W.shape[2]).to(W)))  # fmt: skip
        assert float(found.score(x)["faithfulness_error"].min()) > 0.1
        tolerance = {"rtol": 0, "atol": 1e-13 if dtype == torch.float64 else 1e-5}
        torch.testing.assert_close(found(x), target(x), **tolerance)
        torch.testing.assert_close(found(x, range(4), residual=True), target(x), **tolerance)
        assert (found(x, range(4)) - found(x)).abs().max() > 1e-2
        assert torch.equal(found(x, residual=False), found.model.forward(x).output)
        assert not found(x).requires_grad


@pytest.mark.parametrize("residual", [False, True])
def test_decomposition_takes_masks_of_every_shape(residual):
    found = _of(_mlp(), ["0", "2"])
    x = torch.randn(2, 7, 5).double()
    for shape in [(4,), (2, 7, 4), (2, 1, 4), (1, 7, 4), (1, 1, 4), (1, 14, 4)]:
        mask = torch.rand(shape).double() * 2 - 0.5
        by_hand = mask.view(2, 7, 4) if shape == (1, 14, 4) else mask
        wanted = _masked(found, x, {"0": by_hand, "2": by_hand}, residual)
        torch.testing.assert_close(found(x, mask, residual), wanted)
        wanted = _masked(found, x, {"0": by_hand > 0.5, "2": by_hand > 0.5}, residual)
        torch.testing.assert_close(found(x, mask > 0.5, residual), wanted)


def test_decomposition_takes_masks_of_instances():
    target = nn.Sequential(Linear(3, 5, 4)).double()
    found = _of(target, ["0"])
    x, parts = torch.randn(3, 6, 5).double(), found.parts("0")
    for shape in [(3, 6, 4), (3, 1, 4), (1, 6, 4), (4,)]:
        mask = torch.rand(shape).double()
        weights = mask.expand(3, 6, 4)
        torch.testing.assert_close(found(x, mask), torch.einsum("nbi,nbc,ncio->nbo", x, weights, parts))
        missing = target[0].weight.detach() - parts.sum(1)
        wanted = torch.einsum("nbi,nbc,ncio->nbo", x, weights, parts) + x @ missing
        torch.testing.assert_close(found(x, mask, residual=True), wanted)


def test_decomposition_takes_what_runs_by_layer():
    found = _of(_mlp(), ["0", "2"])
    x = torch.randn(7, 5).double()
    on, off, mask = torch.ones(4), torch.zeros(4), torch.rand(7, 4).double()
    few = torch.tensor([0.0, 1, 0, 1])
    run = lambda a, b, residual=False: _masked(found, x, {"0": a, "2": b}, residual)  # noqa: E731
    torch.testing.assert_close(found(x, {"0": [1, 3], "2": mask}), run(few, mask))
    torch.testing.assert_close(found(x, {"0": [], "2": [0, 1, 2, 3]}), run(off, on))
    # a layer that is not named is the target's own, unless the residual is ruled out
    own = found.model.target[0](x)
    wanted = nn.functional.gelu(own) @ found.parts("2")[0, [1, 3]].sum(0) + found.model.target[2].bias
    torch.testing.assert_close(found(x, {"2": [1, 3]}), wanted)
    torch.testing.assert_close(found(x, {"0": None, "2": [1, 3]}), wanted)
    torch.testing.assert_close(found(x, {"2": [1, 3]}, residual=False), run(on, few))
    torch.testing.assert_close(found(x, {"2": [1, 3]}, residual=True), run(on, few, True))
    selection = ops.sample_topk(mask[None], 2)
    torch.testing.assert_close(found(x, {"0": selection, "2": few}), run(selection.mask[0], few))
    torch.testing.assert_close(found(x, selection, residual=True), run(selection.mask[0], selection.mask[0], True))


def test_decomposition_selection_without_the_always_on_component_runs_it_too():
    found = _of(_mlp(), ["0", "2"], APD(topk=1.0, distil_from_target=True))
    x = torch.randn(7, 5).double()
    step, masked = found.select(x)
    assert step.selection.n_components == 3
    for residual in (False, True):
        weights = step.mask[0]
        wanted = _masked(found, x, {"0": weights, "2": weights}, residual)
        torch.testing.assert_close(found(x, step.selection, residual=residual), wanted)
    torch.testing.assert_close(found(x, step.selection), masked.output)


def test_decomposition_forward_is_differentiable():
    found = _of(_mlp(), ["0", "2"])
    x, mask = torch.randn(3, 5).double().requires_grad_(), torch.rand(3, 4).double().requires_grad_()
    constant = torch.rand(4).double().requires_grad_()
    for weights, residual in ((mask, False), (mask, True), (constant, False), (constant, True)):
        run = lambda x, w, residual=residual: found.forward(x, w, residual)  # noqa: E731
        assert torch.autograd.gradcheck(run, (x, weights))
    found.forward(x, mask).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in found.model.components.parameters())
    assert not found(x, mask).requires_grad
    # the target itself does not depend on its components
    before = [p.grad.clone() for p in found.model.components.parameters()]
    found.forward(x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(found.model.components.parameters(), before, strict=True))


NAN = torch.tensor([0.0, 1.0, math.nan, 0.0])


@pytest.mark.parametrize(
    "active, error, message",
    [
        ([1, 2, 1], ValueError, "active must name each component once, got [1] more than once"),
        ([1.0], TypeError, "active must hold whole numbers, got 1.0; for a mask pass a bool or float tensor"),
        ([True, False, True, True], TypeError, "active must hold whole numbers, got True; for a mask pass"),
        (3, TypeError, "active must be indices of components, a Selection or a mask, got 3; put a single index"),
        (torch.ones(3), ValueError, "active must be a mask whose last axis has the 4 components, got shape [3]"),
        (torch.ones(6, 4), ValueError, "active must have shape [4] or [7, 4] or [1, 7, 4] in layer 0, got [6, 4]"),
        (torch.ones(2, 4, dtype=torch.int64), TypeError, "active must be a mask of bools or floats, or have one axis"),
        (NAN, ValueError, "active must be a mask of finite weights, got NaN or infinity"),
        ({"1": [0]}, ValueError, "active must name layers among 0, 2, got ['1']"),
        ({"2": [4]}, ValueError, "active['2'] must be in [0, 4), got [4]"),
        (torch.tensor([0, 4]), ValueError, "active must be in [0, 4), got [4]"),
        ("03", TypeError, "active must hold whole numbers, got '0'"),
    ],
)
def test_decomposition_refuses_what_cannot_run(active, error, message):
    found = _of(_mlp(), ["0", "2"])
    with pytest.raises(error) as caught:
        found(torch.randn(7, 5).double(), active)
    assert str(caught.value).startswith(f"Decomposition: {message}")


def test_decomposition_refuses_a_selection_of_others():
    found = _of(_mlp(), ["0", "2"])
    x = torch.randn(7, 5).double()
    with pytest.raises(ValueError, match=r"^Decomposition: active must select among 4 components, got 3$"):
        found(x, ops.sample_topk(torch.rand(1, 7, 3), 1))
    with pytest.raises(ValueError, match=r"^Decomposition: active must have shape .* got \[1, 6, 4\]$"):
        found(x, ops.sample_topk(torch.rand(1, 6, 4), 1))
    with pytest.raises(TypeError, match=r"^Decomposition: residual must be True, False or None, got 'yes'$"):
        found(x, [1], residual="yes")


# ---- making one by hand


def _five() -> tuple[nn.Module, Tensor]:
    """The matrix 5 I, which carries three unit features 120 degrees apart."""
    target = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        target[0].weight.copy_(5 * torch.eye(2))
    angles = torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3)
    return target.requires_grad_(False), torch.stack([angles.cos(), angles.sin()], -1)


@pytest.mark.parametrize("gain, faithfulness, each", [(5.0, 0.5, 0.0), (10 / 3, 0.0, 1 / 3)])
def test_decomposition_from_factors_three_pieces_of_a_2x2_matrix(gain, faithfulness, each):
    """Three rank-ones of gain 5 sum to 7.5 I; those of gain 10/3 are faithful, and each feature then lacks a third."""
    target, e = _five()
    found = Decomposition.from_factors(target, {"0": (e[:, :, None], gain * e[:, None])}, APD(topk=1.0))
    scores = found.score(e)
    assert float(scores["faithfulness_error"]) == pytest.approx(faithfulness, abs=1e-14)
    for c in range(3):
        output = found(e[c], [c])
        assert float((output - target(e[c])).norm() / target(e[c]).norm()) == pytest.approx(each, abs=1e-14)
    assert found.select(e)[0].mask[0].equal(torch.eye(3, dtype=torch.bool))
    # squared error a sample is (5 each)², over two outputs
    assert float(scores["topk_mse"]) == pytest.approx((5 * each) ** 2 / 2, abs=1e-14)
    whole = Decomposition.from_matrices(target, {"0": 5 * torch.eye(2, dtype=torch.float64)[None]})
    assert whole.model.components.rank == 2 and float(whole.score(e)["faithfulness_error"]) < 1e-15
    assert (whole(e, [0]) - target(e)).abs().max() < 1e-14


def test_decomposition_from_factors_pads_ranks_and_casts():
    target = _mlp()
    A0, B0, A2, B2 = torch.randn(4, 5, 1), torch.randn(4, 1, 6), torch.randn(4, 6, 3), torch.randn(4, 3, 3)
    found = Decomposition.from_factors(target, {"0": (A0, B0), "2": (A2.numpy(), B2.numpy())})
    assert found.model.components.rank == 3 and found.parts("0").dtype == torch.float64
    torch.testing.assert_close(found.parts("0")[0], (A0.double() @ B0.double()))
    torch.testing.assert_close(found.parts("2")[0], (A2.double() @ B2.double()))
    assert found.method == APD(topk=1.0)


def test_decomposition_from_matrices_is_their_nearest_of_a_rank():
    target, P = _tms(), torch.randn(2, 3, 5, 2).double()
    found = Decomposition.from_matrices(target, {"linear1": P}, ties={"linear2": "linear1"})
    torch.testing.assert_close(found.parts("linear1"), P)
    torch.testing.assert_close(found.parts("linear2"), P.mT)
    found = Decomposition.from_matrices(target, {"linear1": P}, rank=1, ties={"linear2": "linear1"})
    U, S, Vh = torch.linalg.svd(P, full_matrices=False)
    torch.testing.assert_close(found.parts("linear1"), S[..., :1, None] * U[..., :1] @ Vh[..., :1, :])
    rank_one = torch.randn(4, 5, 1) @ torch.randn(4, 1, 6)
    assert Decomposition.from_matrices(_mlp(), {"0": rank_one}).model.components.rank == 1


def test_decomposition_from_svd():
    target = _tms()
    found = Decomposition.from_svd(target, ["linear*"], 2)
    torch.testing.assert_close(found.parts("linear1"), metrics.svd_parts(target.linear1.weight, 2))
    x = torch.rand(2, 7, 5).double()
    torch.testing.assert_close(found(x, [0, 1]), target(x))
    assert (found(x, [0]) - target(x)).abs().max() > 1e-3
    assert "SVD" in repr(found)


E = torch.eye(5, dtype=torch.float64)


@pytest.mark.parametrize(
    "factors, ties, error, message",
    [
        ({}, None, ValueError, "factors must map at least one layer to a pair (A, B), got {}"),
        ({"1x": (E, E)}, None, ValueError, "model must have a layer '1x', got Sequential with 0, 1, 2"),
        ({"0": E}, None, TypeError, "factors['0'] must be a pair (A, B), got Tensor"),
        (
            {"0": (torch.ones(4, 6, 2), torch.ones(4, 2, 5))}, None, ValueError,
            "factors['0'] must have shapes [C, 5, m] and [C, m, 6], got [1, 4, 6, 2] and [1, 4, 2, 5]; y = x W",
        ),
        ({"0": (torch.ones(4, 5, 2), torch.ones(4, 3, 6))}, None, ValueError, "factors['0'] must have shapes"),
        ({"0": (torch.ones(4, 5, 2) * math.nan, torch.ones(4, 2, 6))}, None, ValueError, "factors['0'] must be finite"),
        ({"0": (torch.ones(4, 5, 2).long(), torch.ones(4, 2, 6))}, None, TypeError, "factors['0'] must be floating"),
        (
            {"0": (torch.ones(4, 5, 2), torch.ones(4, 2, 6)), "2": (torch.ones(3, 6, 2), torch.ones(3, 2, 3))}, None,
            ValueError, "factors must have the same number of components in every layer, got 3 in 2 and 4 in 0",
        ),
        (
            {"0": (torch.ones(4, 5, 2), torch.ones(4, 2, 6))}, {"2": "0"}, ValueError,
            "ties must name for each tied layer the one that holds its matrix, got '0' for 2, which is tied to None",
        ),
    ],
)  # fmt: skip
def test_decomposition_from_factors_refuses(factors, ties, error, message):
    with pytest.raises(error) as caught:
        Decomposition.from_factors(_mlp(), factors, ties=ties)
    assert str(caught.value).startswith(f"Decomposition: {message}")


def test_decomposition_from_factors_of_a_tied_target_wants_its_ties():
    target = _tms()
    factors = {"linear1": (torch.ones(2, 3, 5, 1), torch.ones(2, 3, 1, 2))}
    found = Decomposition.from_factors(target, factors, ties={"linear2": "linear1"})
    assert torch.equal(found.parts("linear2"), found.parts("linear1").mT)
    alone = Decomposition.from_factors(target, factors)  # the decoder stays as it is
    assert [site.name for site in alone.model.sites] == ["linear1"]


# ---- numbers beside their baselines


def test_decomposition_metrics_by_hand():
    target = _tms()
    found = _of(target, ["linear*"], APD(topk=1.5))
    x = torch.rand(2, 8, 5).double()
    numbers = found.metrics(x)
    scores, mask = found.score(x), found.select(x)[0].mask
    assert list(numbers) == [
        "faithfulness", "reconstruction", "reconstruction_all", "l0", "alive", "effective_rank", "active_set_bits",
        "baselines",
    ]  # fmt: skip
    for name, other in (("faithfulness", "faithfulness_error"), ("reconstruction", "topk_mse"),
                        ("reconstruction_all", "full_mse"), ("l0", "l0"), ("alive", "alive")):  # fmt: skip
        assert numbers[name] == pytest.approx(scores[other].tolist())
    q = mask.double().mean(1)
    bits = -(q * q.log2()).nan_to_num() - ((1 - q) * (1 - q).log2()).nan_to_num()
    assert numbers["active_set_bits"] == pytest.approx(bits.sum(-1).tolist())
    ranks = found.effective_rank()["linear1"]
    assert numbers["effective_rank"] == pytest.approx(ranks.mean(-1).tolist())
    assert list(numbers["baselines"]) == ["random", "svd", "copies"]
    svd = _of(target, ["linear*"], APD(topk=1.5), lambda W: metrics.svd_factors(W, 4, 2))
    assert numbers["baselines"]["svd"]["reconstruction"] == pytest.approx(svd.score(x)["topk_mse"].tolist())
    assert max(numbers["baselines"]["copies"]["faithfulness"]) < 1e-14
    assert min(numbers["baselines"]["random"]["faithfulness"]) > 0.1
    assert json.loads(json.dumps(numbers)) == numbers


def test_decomposition_metrics_without_instances_are_floats():
    found = _of(_mlp(), ["0", "2"])
    found.last_batch = torch.randn(7, 5).double()
    numbers = found.metrics()
    assert all(isinstance(value, float) for name, value in numbers.items() if name != "baselines")
    assert numbers == found.metrics(found.last_batch)
    assert list(found.metrics(baselines=["svd"])["baselines"]) == ["svd"]
    assert "baselines" not in found.metrics(baselines=False)
    with pytest.raises(
        ValueError, match=r"^Decomposition: baselines must be among random, svd, copies, got \['nmf'\]$"
    ):
        found.metrics(baselines=["nmf"])
    found.last_batch = None
    with pytest.raises(ValueError, match=r"^Decomposition: x must be given unless .* as decompose was given$"):
        found.metrics()


def test_decomposition_attributions_are_the_methods():
    for kind in ("gradient", "activation", "ablation"):
        found = _of(_mlp(), ["0", "2"], APD(topk=1.0, attribution=kind))
        x = torch.randn(7, 5).double()
        assert torch.equal(found.attributions(x), found.select(x)[0].attributions)
        assert not found.attributions(x).requires_grad


# ---- what it says of itself


def test_decomposition_docstrings_name_every_argument():
    public = {n: getattr(Decomposition, n) for n in dir(Decomposition) if not n.startswith("_")} | {
        "__call__": Decomposition.__call__
    }
    methods = {name: value for name, value in public.items() if callable(value)}
    assert len(methods) >= 20
    for name, method in methods.items():
        doc = inspect.getdoc(method)
        assert doc, name
        for argument in inspect.signature(method).parameters:
            assert argument == "self" or re.search(rf"\b{argument}\b", doc), f"{name}: {argument}"


def test_decomposition_repr_says_what_it_is():
    target, e = _five()
    found = Decomposition.from_factors(target, {"0": (e[:, :, None], 5 * e[:, None])}, APD(topk=1.3, p=0.5))
    assert repr(found).splitlines() == [
        "Decomposition of Sequential: C = 3, rank 1",
        "  layers        0 [2, 2]",
        "  method        top-k 1.3 by batch, gradient attributions, p 0.5",
        "  made by       given factors",
        "  faithfulness  0.5, relative error of the components' sum",
    ]
    found = _of(_tms(), ["linear*"])
    found.history = [{"step": 0}, {"step": 300}]
    lines = repr(found).splitlines()
    assert lines[0] == "Decomposition of TMS: C = 4, rank 2, 2 instances"
    assert lines[1] == "  layers        linear1 [5, 2], linear2 [2, 5] tied to linear1"
    assert lines[3] == "  made by       training, 300 steps"
    deep = nn.Sequential(*[nn.Linear(2, 2) for _ in range(30)])
    lines = repr(Decomposition.from_svd(deep, ["*"], 2)).splitlines()
    assert lines[1].endswith("3 [2, 2] and 26 more") and len(lines) <= 8
