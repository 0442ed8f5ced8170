"""Sites of any module, and running it on component sums without changing it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastapd import metrics, ops
from fastapd.components import Components, LayerShape
from fastapd.experiments.residual_mlp import ResidualMLP
from fastapd.experiments.tms import TMS
from fastapd.model import ComponentModel, Linear, TransposedLinear, find_sites


def _mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def _tms(n_instances: int = 2) -> TMS:
    target = TMS(n_instances, 5, 2).double()
    nn.init.normal_(target.linear1.weight)
    nn.init.normal_(target.b_final)
    return target.requires_grad_(False)


def _svd_model(target: nn.Module, patterns: list[str], n_components: int = 6, rank: int = 2) -> ComponentModel:
    """Components that sum exactly to the target: the rank-one terms of each matrix."""
    sites = find_sites(target, patterns)
    factors = {s.name: metrics.svd_factors(s.weight, n_components, rank) for s in sites if s.tied_to is None}
    ties = {s.name: s.tied_to for s in sites if s.tied_to is not None}
    return ComponentModel(target, sites, Components.from_factors(factors, ties))


def _random_model(target: nn.Module, patterns: list[str], n_components: int = 4) -> ComponentModel:
    sites = find_sites(target, patterns)
    shapes = {s.name: s.shape for s in sites}
    n_instances = sites[0].weight.shape[0]
    dtype = sites[0].weight.dtype
    return ComponentModel(target, sites, Components(shapes, n_components, 2, n_instances, 2.0, dtype=dtype))


# ---- sites


def test_find_sites_matches_names_in_the_targets_order():
    target = ResidualMLP(2, 5, 7, 3, n_layers=2)
    expected = ["layers.0.mlp_in", "layers.0.mlp_out", "layers.1.mlp_in", "layers.1.mlp_out"]
    assert [s.name for s in find_sites(target, ["layers.*.mlp_*"])] == expected
    assert [s.name for s in find_sites(target, ["layers.1.*", "*mlp_in", "*.mlp_*"])] == expected  # each once
    assert [s.name for s in find_sites(target, ["*.1.mlp_out", "layers.0.mlp_in"])] == [expected[0], expected[3]]
    site = find_sites(target, ["layers.0.mlp_in"])[0]
    assert site.module is target.layers[0].mlp_in
    assert site.shape == LayerShape(7, 3, None) and site.weight.shape == (2, 7, 3)


def test_find_sites_gives_linear_weights_in_y_is_xW_orientation():
    target = _mlp()
    site = find_sites(target, ["0"])[0]
    assert site.shape == LayerShape(4, 6, None)
    assert torch.equal(site.weight, target[0].weight.detach().T[None])
    assert not site.weight.requires_grad


def test_find_sites_finds_ties():
    assert [s.tied_to for s in find_sites(_tms(), ["linear*"])] == [None, "linear1"]
    alone = find_sites(_tms(), ["linear2"])[0]  # the decoder without its owner is a layer of its own
    assert alone.tied_to is None and alone.shape == LayerShape(2, 5, None)


def test_find_sites_refuses_what_cannot_be_decomposed():
    target = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    with pytest.raises(TypeError, match=r"^find_sites: 1 must be one of .*torch\.Linear.*, got Conv1d$"):
        find_sites(target, ["*"])

    class Special(nn.Linear):  # may compute something else
        pass

    with pytest.raises(TypeError, match=r"got Special$"):
        find_sites(nn.Sequential(Special(2, 2)), ["0"])


def test_find_sites_without_a_match_lists_the_names():
    with pytest.raises(ValueError, match=r"^find_sites: pattern 'lin' must match a module, the target has 0, 1, 2$"):
        find_sites(_mlp(), ["0", "lin"])


def test_find_sites_refuses_different_numbers_of_instances():
    target = nn.Sequential(Linear(2, 3, 3), Linear(3, 3, 3))
    with pytest.raises(ValueError, match=r"^find_sites: all sites must have the same n_instances"):
        find_sites(target, ["0", "1"])


# ---- running on components


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["float32", "float64"])
@pytest.mark.parametrize("leading", [(), (5,), (5, 2), (5, 2, 3)])
def test_model_faithful_components_reproduce_a_biased_mlp(leading, dtype, limit):
    target = _mlp(dtype)
    x = torch.randn(*leading, 4, dtype=dtype)
    model = _svd_model(target, ["0", "2"])
    wanted = target(x).detach()
    rows = x.numel() // 4
    everything = ops.batch_topk(torch.zeros(1, rows, 6, dtype=dtype), rows * 6)
    for active in (None, everything, everything.mask, everything.mask.to(dtype)):
        output = model.forward(x, active).output
        assert output.shape == wanted.shape
        assert (output - wanted).abs().max() <= limit
    assert (model.record_target(x).output - wanted).abs().max() <= limit


def test_model_faithful_components_reproduce_tms():
    target = _tms()
    model = _svd_model(target, ["linear*"], n_components=3)
    x = torch.rand(2, 7, 5, dtype=torch.float64)
    everything = ops.batch_topk(torch.zeros(2, 7, 3, dtype=torch.float64), 21)
    for active in (None, everything, torch.ones(2, 7, 3, dtype=torch.float64)):
        assert (model.forward(x, active).output - target(x)).abs().max() < 1e-13


def test_model_selection_and_masks_agree():
    model = _random_model(_mlp(), ["0", "2"])
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    selection = ops.batch_topk(torch.rand(1, 10, 4, dtype=torch.float64), 13)
    by_selection = model.forward(x, selection)
    assert (by_selection.output - model.forward(x).output).abs().max() > 1e-3  # the mask matters
    for mask in (selection.mask, selection.mask.double()):
        by_mask = model.forward(x, mask)
        for field in ("inputs", "outputs"):
            for name in ("0", "2"):
                torch.testing.assert_close(getattr(by_mask, field)[name], getattr(by_selection, field)[name])
        torch.testing.assert_close(by_mask.output, by_selection.output)


def test_model_weights_of_a_mask_scale_components():
    target = nn.Sequential(nn.Linear(4, 3)).double()
    model = _random_model(target, ["0"])
    x, mask = torch.randn(5, 4, dtype=torch.float64), torch.rand(1, 5, 4, dtype=torch.float64)
    parts = model.components.parts("0")[0]
    expected = torch.einsum("bi,bc,cio->bo", x, mask[0], parts) + target[0].bias
    torch.testing.assert_close(model.forward(x, mask).output, expected)


def test_model_without_active_components_leaves_the_bias():
    target = nn.Sequential(nn.Linear(4, 3)).double()
    model = _random_model(target, ["0"])
    nothing = ops.batch_topk(torch.zeros(1, 5, 4, dtype=torch.float64), 0)
    output = model.forward(torch.randn(5, 4, dtype=torch.float64), nothing).output
    assert torch.equal(output, target[0].bias.expand(5, 3))


def test_model_records_inputs_and_outputs_before_the_bias():
    target = _mlp()
    model = _random_model(target, ["0", "2"])
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    record = model.record_target(x)
    hidden = torch.tanh(target[0](x)).reshape(1, 10, 6)
    torch.testing.assert_close(record.inputs["0"], x.reshape(1, 10, 4))
    torch.testing.assert_close(record.inputs["2"], hidden)
    torch.testing.assert_close(record.outputs["2"], hidden @ target[2].weight.T)
    full = model.forward(x)
    torch.testing.assert_close(full.outputs["0"], x.reshape(1, 10, 4) @ model.components.weight("0"))
    assert not record.output.requires_grad and full.output.requires_grad


def test_model_n_params_counts_tied_matrices_as_often_as_used():
    assert _random_model(_tms(), ["linear*"]).n_params == 20
    assert _random_model(_tms(), ["linear1"]).n_params == 10
    assert _random_model(_mlp(), ["0", "2"]).n_params == 4 * 6 + 6 * 3


# ---- the target stays as it was


class _Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("inside the target")


def test_model_restores_the_target_even_when_it_raises():
    target = nn.Sequential(nn.Linear(4, 3), _Raises()).double()
    model = _random_model(target, ["0"])
    x = torch.randn(5, 4, dtype=torch.float64)
    wanted = target[0](x)
    for run in (model.forward, model.record_target):
        with pytest.raises(RuntimeError, match="inside the target"):
            run(x)
        assert "forward" not in vars(target[0])
        assert torch.equal(target[0](x), wanted)


def test_model_restores_the_target_after_a_run():
    target = _tms()
    x = torch.rand(2, 3, 5, dtype=torch.float64)
    wanted, state = target(x), {name: t.clone() for name, t in target.state_dict().items()}
    model = _random_model(target, ["linear*"])
    model.forward(x)
    model.record_target(x, differentiable=True)
    assert not any("forward" in vars(module) for module in target.modules())
    assert torch.equal(target(x), wanted)
    assert all(torch.equal(t, state[name]) for name, t in target.state_dict().items())


def test_model_keeps_a_forward_that_others_put_there():
    target = nn.Sequential(nn.Linear(4, 3)).double()

    def patched(x):
        return x

    target[0].forward = patched
    model = _random_model(target, ["0"])
    model.forward(torch.randn(5, 4, dtype=torch.float64))
    assert target[0].forward is patched


@pytest.mark.parametrize("requires_grad", [True, False])
def test_model_gives_no_gradients_to_the_sites_parameters(requires_grad):
    target = _mlp().requires_grad_(requires_grad)
    model = _random_model(target, ["0", "2"])
    x = torch.randn(5, 4, dtype=torch.float64)
    model.forward(x).output.square().sum().backward()
    model.record_target(x, differentiable=True).output.sum().backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.requires_grad is requires_grad for p in target.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.components.parameters())


def test_model_gradients_of_the_output_reach_the_recorded_outputs():
    target = _mlp()
    model = _random_model(target, ["0", "2"])
    record = model.record_target(torch.randn(5, 4, dtype=torch.float64), differentiable=True)
    gradient = torch.autograd.grad(record.output[:, 1].sum(), record.outputs["2"])[0]
    expected = torch.zeros(1, 5, 3, dtype=torch.float64)
    expected[..., 1] = 1
    assert torch.equal(gradient, expected)


def test_model_refuses_components_that_do_not_fit():
    target = _tms()
    sites = find_sites(target, ["linear*"])
    shapes = {s.name: s.shape for s in sites}
    wrong = [
        Components({"linear1": shapes["linear1"]}, 3, n_instances=2),
        Components({**shapes, "linear2": LayerShape(2, 5)}, 3, n_instances=2),
        Components({"linear1": LayerShape(5, 3), "linear2": LayerShape(3, 5, "linear1")}, 3, n_instances=2),
        Components(shapes, 3, n_instances=1),
    ]
    for components in wrong:
        with pytest.raises(ValueError, match=r"^ComponentModel: components must have a layer linear\d \(2, \d, \d\)"):
            ComponentModel(target, sites, components)
    ComponentModel(target, sites, Components(shapes, 3, n_instances=2))


def test_transposed_linear_registers_its_matrix_once():
    target = _tms()
    assert [name for name, _ in target.named_parameters()] == ["b_final", "linear1.weight"]
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    assert torch.equal(TransposedLinear(target.linear1)(x), x @ target.linear1.weight.mT)
