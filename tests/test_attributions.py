"""Attributions against their definitions, computed the slow way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fastapd import attributions
from fastapd.attributions import activation_attributions, gradient_attributions, output_gradients
from fastapd.components import Components
from fastapd.experiments.tms import TMS
from fastapd.model import ComponentModel, find_sites
from fastapd.ops import attribution_reduce

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def _model(target: nn.Module, patterns: list[str], n_components: int = 4, rank: int = 2) -> ComponentModel:
    sites = find_sites(target, patterns)
    n_instances = sites[0].weight.shape[0]
    shapes = {s.name: s.shape for s in sites}
    components = Components(shapes, n_components, rank, n_instances, 3.0, dtype=torch.float64)
    return ComponentModel(target, sites, components)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _tms(n_instances: int = 2) -> TMS:
    target = TMS(n_instances, 5, 3).double()
    nn.init.normal_(target.linear1.weight)
    nn.init.uniform_(target.b_final, 0, 0.5)
    return target.requires_grad_(False)


def _gradient(model: ComponentModel, x: Tensor) -> Tensor:
    return gradient_attributions(model, model.record_target(x, differentiable=True)).detach()


def _by_definition(target: nn.Sequential, parts: dict[str, Tensor], x: Tensor) -> Tensor:
    """sum_o ( sum_l <df_o/dW_l, P_c,l> )^2 of each sample, from the Jacobian by every weight."""
    weights = {f"{name}.weight": target.get_submodule(name).weight.detach() for name in parts}
    rows = []
    for sample in x:
        jacobian = jacrev(lambda w, sample=sample: functional_call(target, w, sample))(weights)  # [o, d_out, d_in]
        inner = sum(torch.einsum("oji,cij->oc", jacobian[f"{name}.weight"], P) for name, P in parts.items())
        rows.append(inner.square().sum(0))
    return torch.stack(rows)


def test_gradient_attributions_follow_the_definition_on_an_mlp():
    target = _mlp()
    model = _model(target, ["0", "2", "4"])
    x = torch.randn(6, 4, dtype=torch.float64)
    parts = {name: model.components.parts(name)[0].detach() for name in ("0", "2", "4")}
    found = _gradient(model, x)
    assert found.shape == (1, 6, 4)
    torch.testing.assert_close(found[0], _by_definition(target, parts, x), **CLOSE)


def test_gradient_attributions_take_some_layers_only():
    target = _mlp()
    model = _model(target, ["2"])
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = _by_definition(target, {"2": model.components.parts("2")[0].detach()}, x)
    torch.testing.assert_close(_gradient(model, x)[0], expected, **CLOSE)


def test_gradient_attributions_sum_layers_before_the_square():
    """Two layers in a row whose parts undo each other have no attribution; squaring first would not see it."""
    target = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    nn.init.ones_(target[0].weight)
    nn.init.ones_(target[1].weight)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    sites = find_sites(target, ["0", "1"])
    model = ComponentModel(target, sites, Components.from_factors({"0": (one, one), "1": (-one, one)}))
    x = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    assert torch.equal(_gradient(model, x), torch.zeros(1, 2, 1, dtype=torch.float64))
    model = ComponentModel(target, sites, Components.from_factors({"0": (one, one), "1": (one, one)}))
    assert torch.equal(_gradient(model, x), torch.tensor([[[16.0], [36.0]]], dtype=torch.float64))  # (2 x)^2


def test_gradient_attributions_follow_the_definition_on_tms():
    target = _tms()
    model = _model(target, ["linear*"])
    x = torch.rand(2, 6, 5, dtype=torch.float64)
    parts = model.components.parts("linear1").detach()  # [I, C, F, H]; the tied layer's are their transposes
    W = target.linear1.weight.detach()
    expected = torch.zeros(2, 6, 4, dtype=torch.float64)
    for b in range(6):
        # by the one matrix that both layers use, so that the derivative is the sum over the layers
        jacobian = jacrev(lambda w, b=b: functional_call(target, {"linear1.weight": w}, x[:, b : b + 1]))(W)
        for n in range(2):
            inner = torch.einsum("ofh,cfh->oc", jacobian[n, 0, :, n], parts[n])
            expected[n, b] = inner.square().sum(0)
    torch.testing.assert_close(_gradient(model, x), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["mlp", "tms"])
def test_attributions_of_a_sub_batch_are_the_slice(kind):
    target, patterns = (_mlp(), ["0", "2", "4"]) if kind == "mlp" else (_tms(), ["linear*"])
    x = torch.rand(*((8, 4) if kind == "mlp" else (2, 8, 5)), dtype=torch.float64)
    model = _model(target, patterns)
    some = x[..., 2:5, :]
    torch.testing.assert_close(_gradient(model, some), _gradient(model, x)[:, 2:5], **CLOSE)
    found = activation_attributions(model.components, model.forward(some))
    torch.testing.assert_close(found, activation_attributions(model.components, model.forward(x))[:, 2:5], **CLOSE)


def test_attributions_of_an_instance_do_not_depend_on_the_others():
    target = _tms(3)
    model = _model(target, ["linear*"])
    x = torch.rand(3, 6, 5, dtype=torch.float64)
    before = _gradient(model, x)
    with torch.no_grad():
        target.linear1.weight[1] *= 2
        model.components.factors("linear1")[0][1] *= 2
    after = _gradient(model, x)
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])


def test_attributions_count_leading_dimensions_as_samples():
    target = _mlp()
    model = _model(target, ["0", "2", "4"])
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(_gradient(model, x), _gradient(model, x.reshape(6, 4)), **CLOSE)


@pytest.mark.parametrize("grad", [True, False])
def test_gradient_attributions_do_not_depend_on_the_grad_mode(grad):
    model = _model(_mlp(), ["0", "4"])
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = _gradient(model, x)
    with torch.set_grad_enabled(grad):
        assert torch.equal(_gradient(model, x), expected)
    assert all(p.grad is None for p in (*model.target.parameters(), *model.components.parameters()))


def test_gradient_attributions_come_from_the_target_and_not_from_the_components():
    """Doubling one component leaves the others' attributions alone and makes its own four times as large."""
    model = _model(_mlp(), ["0", "2", "4"])
    x = torch.randn(6, 4, dtype=torch.float64)
    before = _gradient(model, x)
    with torch.no_grad():
        for name in ("0", "2", "4"):
            model.components.factors(name)[1][:, 1] *= 2
    after = _gradient(model, x)
    assert torch.equal(after[..., [0, 2, 3]], before[..., [0, 2, 3]])
    torch.testing.assert_close(after[..., 1], 4 * before[..., 1])


def test_output_gradients_are_the_jacobian_of_the_last_layers():
    target = _mlp()
    model = _model(target, ["2", "4"])
    x = torch.randn(6, 4, dtype=torch.float64)
    record = model.record_target(x, differentiable=True)
    found = output_gradients(record)
    assert {name: g.shape for name, g in found.items()} == {"2": (1, 6, 3, 6), "4": (1, 6, 3, 3)}
    torch.testing.assert_close(found["4"], torch.eye(3, dtype=torch.float64).expand(1, 6, 3, 3))
    slope = 1 - torch.tanh(record.outputs["2"].detach() + target[2].bias).square()  # [1, 6, 6]
    torch.testing.assert_close(found["2"], slope[:, :, None] * target[4].weight)


def test_activation_attributions_follow_the_definition():
    for target, patterns, x in (
        (_mlp(), ["0", "2", "4"], torch.randn(6, 4, dtype=torch.float64)),
        (_tms(), ["linear*"], torch.rand(2, 6, 5, dtype=torch.float64)),
    ):
        model = _model(target, patterns)
        record = model.forward(x)
        expected = 0
        for name in record.inputs:
            each = torch.einsum("nbi,ncio->nbco", record.inputs[name], model.components.parts(name))
            expected = expected + each.square().sum(-1)
        found = activation_attributions(model.components, record)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert found.requires_grad and (found >= 0).all()


def test_more_outputs_than_the_layers_are_wide_are_reduced(monkeypatch):
    """Through a softmax, which is no chain, so that gradients of all outputs are taken; by hand without reduction."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Linear(4, 3).double(), nn.Linear(3, 40).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.narrow(x)).softmax(-1)

    model = _model(Head(), ["narrow"], n_components=200)
    x = torch.randn(6, 4, dtype=torch.float64)
    assert model.plan(x).form == "reverse"
    seen = []
    monkeypatch.setattr(
        attributions, "attribution_reduce", lambda *args: seen.append(args[1][0].shape) or attribution_reduce(*args)
    )
    found = _gradient(model, x)
    record = model.record_target(x, differentiable=True)
    A, B = model.components.factors("narrow")
    expected = attribution_reduce([record.inputs["narrow"]], [output_gradients(record)["narrow"].detach()], [A], [B])
    torch.testing.assert_close(found, expected.detach(), **CLOSE)
    assert seen == [(1, 6, 3, 3)], "40 outputs, 3 numbers to reduce"


# ---- positions that depend on each other


class _Attention(nn.Module):
    def __init__(self, n_outputs: int = 3) -> None:
        super().__init__()
        self.v, self.k = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.head = nn.Linear(4, n_outputs).double()

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)
        return self.head((k @ k.mT).softmax(-1) @ self.v(x))


def test_gradient_attributions_in_chunks_are_those_at_once(monkeypatch):
    model = _model(_Attention(), ["v", "k"])
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = _gradient(model, x)
    whole = attributions.route(model.record_target(x, differentiable=True), None, 4)
    assert (whole.n_outputs, whole.chunk, whole.estimate) == (15, 15, False)
    monkeypatch.setattr(attributions, "CHUNK_BYTES", 4 * whole.n_bytes // 15)
    shapes = []
    monkeypatch.setattr(
        attributions,
        "attribution_reduce",
        lambda *args: shapes.append(args[1][0].shape[2]) or attribution_reduce(*args),
    )
    torch.testing.assert_close(_gradient(model, x), expected, **CLOSE)
    assert shapes == [4, 4, 4, 3]
    assert expected.abs().max() > 1e-6


def test_gradient_attributions_before_a_wide_last_layer_are_those_after_it():
    target = _Attention(50)
    model = _model(target, ["v", "k"])
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    record = model.record_target(x, differentiable=True)
    way = attributions.route(record)
    assert way.narrowed and way.n_outputs == 5 * 4
    found = gradient_attributions(model, record).detach()
    record = model.record_target(x, differentiable=True)
    expected = gradient_attributions(model, record._replace(measured=None)).detach()
    torch.testing.assert_close(found, expected, **CLOSE)
    with torch.no_grad():
        target.head.weight *= 2  # the factor of it that was kept is not used again
    torch.testing.assert_close(_gradient(model, x), 4 * expected, **CLOSE)
    bent = nn.Sequential(target, nn.Tanh())  # what follows the wide layer is not linear
    model = ComponentModel(bent, find_sites(bent, ["0.v", "0.k"]), _model(bent, ["0.v", "0.k"]).components)
    assert model.record_target(x, differentiable=True).measured is None


def test_gradient_attributions_by_probes_are_unbiased():
    model = _model(_Attention(50), ["v", "k"])
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    exact = _gradient(model, x)
    assert not model.estimated
    draws = []
    for _ in range(300):
        record = model.record_target(x, differentiable=True)
        draws.append(gradient_attributions(model, record, probes=5).detach())
    assert model.estimated
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert error.abs().max() < 5, "more standard errors than chance has"
    assert ((draws[0] - exact).abs() / exact).max() > 0.01, "an estimate is no exact value"
    record = model.record_target(x, differentiable=True)
    all_of_them = gradient_attributions(model, record, probes=12)  # no fewer than there are outputs: exact
    torch.testing.assert_close(all_of_them.detach(), exact, **CLOSE)
    assert not model.estimated


def test_gradient_attributions_by_probes_are_reproducible():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    model = _model(_Attention(), ["v"])
    found = []
    for _ in range(2):
        model.probes = torch.Generator().manual_seed(7)
        state = torch.get_rng_state()
        record = model.record_target(x, differentiable=True)
        found.append(gradient_attributions(model, record, probes=2).detach())
        assert torch.equal(state, torch.get_rng_state()), "the user's random numbers are not touched"
    assert torch.equal(*found)


def test_gradient_attributions_without_batched_derivatives_are_the_same():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 3

        @staticmethod
        def backward(ctx, grad):
            return torch.from_numpy(grad.numpy() * 3)  # a batched tensor has no memory of its own

    class Last(nn.Module):
        def __init__(self, function) -> None:
            super().__init__()
            self.inner, self.function = _Attention(), function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self.inner(x))

    x = torch.randn(2, 3, 4, dtype=torch.float64)
    model = _model(Last(Own.apply), ["inner.v"])
    plain = Last(lambda y: y * 3)
    plain.load_state_dict(model.target.state_dict())
    expected = _gradient(ComponentModel(plain, find_sites(plain, ["inner.v"]), model.components), x)
    for _ in range(2):
        torch.testing.assert_close(_gradient(model, x), expected, **CLOSE)
    assert model.batched_gradients is False


def test_ablation_attributions_follow_the_definition_for_positions():
    model = _model(_Attention(), ["v", "k"])
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    full = model.forward(x).output
    found = attributions.ablation_attributions(model, x, full.detach())
    mask = torch.ones(1, 1, 4, dtype=torch.float64)
    mask[..., 2] = 0
    expected = (full - model.forward(x, mask).output).square().mean(-1).reshape(1, 6)
    torch.testing.assert_close(found[..., 2], expected.detach(), **CLOSE)
