"""What the method can do besides batch top-k with gradient attributions: every option against its own definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastapd import losses, ops
from fastapd.attributions import ablation_attributions, gradient_attributions
from fastapd.components import Components
from fastapd.config import APD, ConfigError, RunConfig, dump, loads, parse
from fastapd.evaluation import evaluate, select
from fastapd.experiments import get
from fastapd.experiments.tms import TMS
from fastapd.model import ComponentModel, find_sites
from fastapd.training import make_optimiser, train_step

CPU_BACKENDS = ["cpu", "reference"]


def _tms(n_instances: int = 3, C: int = 4) -> ComponentModel:
    generator = torch.Generator().manual_seed(0)
    target = TMS(n_instances, 6, 3).double()
    with torch.no_grad():
        target.linear1.weight.copy_(torch.randn(n_instances, 6, 3, generator=generator, dtype=torch.float64))
    target.requires_grad_(False)
    sites = find_sites(target, ["linear1", "linear2"])
    shapes = {site.name: site.shape for site in sites}
    components = Components(shapes, C, 2, n_instances, 3.0, generator, dtype=torch.float64)
    return ComponentModel(target, sites, components)


def _x(n_instances: int = 3, batch: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n_instances, batch, 6, generator=generator, dtype=torch.float64)
    return x * (torch.rand(x.shape, generator=generator) < 0.5)


def _with_component_weights(model: ComponentModel) -> ComponentModel:
    """A target whose matrices are the component sums."""
    target = TMS(model.components.n_instances, 6, 3).double()
    with torch.no_grad():
        target.linear1.weight.copy_(model.components.weight("linear1"))
        target.b_final.copy_(model.target.b_final)
    target.requires_grad_(False)
    return ComponentModel(target, find_sites(target, ["linear1", "linear2"]), model.components)


def test_attributions_of_the_component_model_are_those_of_a_target_with_its_weights():
    model, x = _tms(), _x()
    found = evaluate(model, APD(topk=1.0, attribution_model="components"), x).attributions
    other = _with_component_weights(model)
    wanted = gradient_attributions(other, other.record_target(x, differentiable=True))
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=0)
    of_target = evaluate(model, APD(topk=1.0), x).attributions
    assert not torch.allclose(found, of_target)


def test_attribution_norm_is_the_root_of_the_mean_over_outputs():
    model, x = _tms(), _x()
    squares = evaluate(model, APD(topk=1.0), x)
    norms = evaluate(model, APD(topk=1.0, attribution_norm=True), x)
    torch.testing.assert_close(norms.attributions, (squares.attributions / 6).sqrt())
    assert torch.equal(norms.mask, squares.mask)


def test_lp_sparsity_beside_a_selection_lowers_attributions():
    model, x = _tms(), _x()
    method = APD(topk=1.0, faithfulness=0.0, minimality=0.0, simplicity=0.0, lp_sparsity=2.0, lp_p=0.9)
    step = train_step(model, method, make_optimiser(model.components), 0.0, x)
    assert step.selection is not None
    found = [p.grad.clone() for p in model.components.parameters() if p.grad is not None]
    squares = gradient_attributions(model, model.record_target(x, differentiable=True))
    term = 2.0 * losses.lp_sparsity(losses.lp_weights(squares, 6, 0.9)).mean()
    for a, b in zip(found, torch.autograd.grad(term, list(model.components.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


def test_ablation_attributions_follow_the_definition():
    model, x = _tms(), _x()
    output = model.forward(x).output.detach()
    found = ablation_attributions(model, x, output)
    parts = model.components.parts("linear1").detach()
    for c in range(4):
        W = parts.sum(1) - parts[:, c]
        without = torch.relu(x @ W @ W.mT + model.target.b_final)
        torch.testing.assert_close(found[..., c], (output - without).square().mean(-1))
    step = evaluate(model, APD(topk=1.0, attribution="ablation"), x)
    torch.testing.assert_close(step.attributions, found)


def test_ablation_attributions_of_a_model_without_instances():
    target = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    sites = find_sites(target, ["0", "2"])
    components = Components({s.name: s.shape for s in sites}, 3, 2, dtype=torch.float64)
    model = ComponentModel(target, sites, components)
    x = torch.randn(7, 4, dtype=torch.float64)
    found = ablation_attributions(model, x, model.forward(x).output.detach())
    assert found.shape == (1, 7, 3) and (found > 0).all()


@pytest.mark.parametrize("batch, few", [(2, "not enough"), (4, "too many")])
def test_ablation_attributions_as_the_research_code_raise_unless_the_batch_is_three(batch, few):
    model, x = _tms(), _x(batch=batch)
    with pytest.raises(ValueError, match=f"ablation_attributions: {few} values to unpack"):
        ablation_attributions(model, x, model.forward(x).output, as_reference=True)


def test_ablation_attributions_as_the_research_code_compare_with_the_first_sample():
    model, x = _tms(), _x(batch=3)
    output = model.forward(x).output.detach()
    found = ablation_attributions(model, x, output, as_reference=True)
    mask = torch.ones(3, 3, 4, dtype=torch.float64)
    mask[:, :, 2] = 0
    first = model.forward(x, mask).output[:, :1]
    torch.testing.assert_close(found[..., 2], (output - first).square().mean(-1).detach())


def test_kl_divergence_is_torchs():
    output, target = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    wanted = [
        F.kl_div(o.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")
        for o, t in zip(output, target, strict=True)
    ]
    torch.testing.assert_close(losses.kl_divergence(output, target), torch.stack(wanted))
    torch.testing.assert_close(losses.kl_divergence(target, target), torch.zeros(2, dtype=torch.float64))


def test_the_distance_can_be_kl_or_a_callable():
    model, x = _tms(), _x()
    kl = evaluate(model, APD(topk=2.0, distance="kl", output_reconstruction=1.0), x)
    masked = model.forward(x, kl.selection)
    target = model.target(x)
    torch.testing.assert_close(kl.terms["minimality"], losses.kl_divergence(masked.output, target))
    torch.testing.assert_close(kl.terms["output_reconstruction"], losses.kl_divergence(model.forward(x).output, target))
    own = evaluate(model, APD(topk=2.0), x, distance=lambda f, t: (f - t).abs().mean())
    torch.testing.assert_close(own.terms["minimality"], (masked.output - target).abs().mean())
    assert own.total.requires_grad


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_exact_selection_takes_as_many_pairs_as_inputs_are_active(backend):
    from fastapd import use_backend

    model, x = _tms(), _x()
    x[1] = 0  # an instance without any
    with use_backend(backend, "reference"):
        step = evaluate(model, APD(topk=1.0, selection="exact"), x)
        step.total.backward()
    # six inputs can be active and four components exist: no more than all pairs
    wanted = (x != 0).flatten(1).sum(-1).clamp(max=11 * 4)
    assert step.mask.flatten(1).sum(-1).tolist() == wanted.tolist()
    assert step.counts.sum(-1).tolist() == wanted.tolist()
    dense = model.forward(x, step.mask.double()).output
    torch.testing.assert_close(model.forward(x, step.selection).output, dense)


def test_exact_selection_needs_the_inputs():
    with pytest.raises(ValueError, match="select: x must be given for the exact selection, got None"):
        select(torch.rand(1, 3, 2), APD(topk=1.0, selection="exact"))


def test_the_last_component_is_always_on_when_distilling():
    model, x = _tms(), _x()
    step = evaluate(model, APD(topk=1.0, distil_from_target=True), x)
    assert step.always_on == 1 and step.mask[..., -1].all()
    assert step.mask[..., :-1].flatten(1).sum(-1).tolist() == [11] * 3
    assert step.counts[:, -1].tolist() == [11] * 3
    masked = model.forward(x, step.selection, step.always_on)
    torch.testing.assert_close(masked.output, model.forward(x, step.mask.double()).output)
    torch.testing.assert_close(step.terms["minimality"], losses.reconstruction(masked.output, model.target(x)))
    step.terms["minimality"].sum().backward()
    assert model.components.At["linear1"].grad[:, -1].abs().sum() > 0


def test_the_lp_form_weighs_all_components_and_differentiates_through_attributions():
    model, x = _tms(), _x()
    method = APD(topk=None, lp_sparsity=0.5, lp_p=0.8, minimality=0.0, simplicity=0.3, output_reconstruction=1.0)
    step = evaluate(model, method, x)
    assert step.selection is None and step.mask.all() and step.counts.tolist() == [[11] * 4] * 3
    weights = losses.lp_weights(step.attributions, 6, 0.8)
    torch.testing.assert_close(step.terms["lp_sparsity"], weights.sum(-1).mean(-1))
    S = sum(
        ops.schatten_factored(*model.components.factors(name), weights, 0.9, 1e-16) for name in ("linear1", "linear2")
    )
    torch.testing.assert_close(step.terms["simplicity"], S / (model.n_params * 11))
    assert "minimality" not in step.terms
    (grad,) = torch.autograd.grad(step.terms["lp_sparsity"].sum(), model.components.At["linear1"])
    assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    "method",
    [
        APD(topk=None, lp_sparsity=0.1, minimality=0.0, simplicity=0.1, output_reconstruction=1.0, unit_norm=True),
        APD(topk=1.0, schatten="exact", simplicity=0.1),
        APD(topk=1.0, selection="exact", simplicity=0.1),
        APD(topk=1.0, distil_from_target=True, simplicity=0.1),
        APD(topk=1.0, attribution="ablation", simplicity=0.1),
        APD(topk=1.0, attribution="activation", simplicity=0.1),
        APD(topk=1.0, attribution_model="components", distance="kl", simplicity=0.1),
        APD(topk=None, attribution="activation", lp_sparsity=0.1, minimality=0.0, activation_reconstruction=1.0),
    ],
    ids=["lp", "exact_schatten", "exact_k", "distil", "ablation", "activation", "components_kl", "lp_activation"],
)
def test_every_form_trains(method):
    model = _tms()
    optimiser = make_optimiser(model.components)
    totals = [train_step(model, method, optimiser, 1e-2, _x(batch=64)).total.item() for _ in range(60)]
    assert totals[-1] < totals[0]


def test_exact_simplicity_is_that_of_the_singular_values():
    model, x = _tms(), _x()
    step = evaluate(model, APD(topk=1.0, schatten="exact", p=0.7), x)
    values = torch.linalg.svdvals(model.components.parts("linear1"))[..., :2]
    sums = (values.square() + 1e-16).pow(0.35).sum(-1)
    off = (11 - step.counts) * 2 * 1e-16**0.35
    wanted = 2 * (step.counts * sums + off).sum(-1) / (model.n_params * 11)
    torch.testing.assert_close(step.terms["simplicity"], wanted)
    factored = evaluate(model, APD(topk=1.0, p=0.7), x).terms["simplicity"]
    assert (factored >= step.terms["simplicity"]).all()


@pytest.mark.parametrize(
    "method, message",
    [
        ({"topk": None, "schatten": "exact"}, "method.schatten must be 'factored' when topk is none"),
        ({"topk": 1.5, "selection": "sample"}, "method.topk must be a whole number when selection is 'sample'"),
        ({"topk": 1, "lp_p": 0}, "method.lp_p must be > 0"),
        ({"topk": 1, "distance": "l1"}, "method.distance must be 'mse' or 'kl'"),
        ({"topk": -1}, "method.topk must be >= 0"),
    ],
)
def test_methods_that_make_no_sense_are_refused(method, message):
    with pytest.raises(ConfigError, match=f"config: {message}"):
        APD(**method)


def test_a_distilled_component_is_not_counted_by_topk():
    config = get("tms_5-2").model_dump()
    config["method"] |= {"topk": 5.0, "distil_from_target": True}
    with pytest.raises(ConfigError, match=r"method.topk must be <= n_components - 1 = 4, got 5.0"):
        RunConfig(**config)


def test_the_lp_form_can_be_written_in_a_file():
    config = get("tms_5-2").model_dump()
    config["method"] |= {"topk": None, "lp_sparsity": 7.0, "minimality": 0.0, "output_reconstruction": 1.0}
    config = RunConfig(**config)
    assert parse(loads(dump(config))) == config
