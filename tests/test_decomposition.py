"""The result: running chosen components, scores that need no training, and what is saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastapd import APD, Decomposition, metrics, ops
from fastapd._rundir import RunDirectory, load_metadata, load_tensors
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


@pytest.mark.parametrize("active", [[], [2], [3, 0], [0, 1, 2, 3], (1, 1)])
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
        assert scores["full_mse"][n] == pytest.approx(float((found(x) - target(x))[n].square().mean()))
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


# ---- files


def test_decomposition_save_writes_components_and_target(tmp_path):
    target = _tms()
    found = _of(target, ["linear*"])
    with RunDirectory.create(tmp_path / "run", "run") as run:
        found.save(run)
    path = tmp_path / "run" / "components.safetensors"
    held = load_tensors(path)
    assert set(held) == {"linear1.A", "linear1.B"}
    assert load_metadata(path) == {"format": "fastapd-components-1", "ties": "linear2=linear1"}
    again = Components.from_factors({"linear1": (held["linear1.A"], held["linear1.B"])}, {"linear2": "linear1"})
    x = torch.rand(2, 8, 5, dtype=torch.float64)
    model = ComponentModel(target, found.model.sites, again)
    assert torch.equal(Decomposition(model, METHOD)(x), found(x))
    state = load_tensors(tmp_path / "run" / "target.safetensors")
    assert load_metadata(tmp_path / "run" / "target.safetensors") == {"format": "fastapd-target-1"}
    assert set(state) == {"linear1.weight", "b_final"}
    assert all(torch.equal(t, state[name]) for name, t in target.state_dict().items())


def test_decomposition_save_without_ties_says_none(tmp_path):
    found = _of(nn.Sequential(nn.Linear(5, 4)).double(), ["0"])
    with RunDirectory.create(tmp_path / "run", "run") as run:
        found.save(run)
    assert load_metadata(tmp_path / "run" / "components.safetensors")["ties"] == ""


def test_decomposition_repr_says_its_sizes():
    found = _of(_tms(), ["linear*"])
    wanted = "Decomposition(n_instances=2, n_components=4, rank=2, layers: linear1 [5, 2], linear2 [2, 5] tied)"
    assert repr(found) == wanted
    assert found.history == []
