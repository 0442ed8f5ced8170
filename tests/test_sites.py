"""What can be decomposed besides linear layers, and that it computes what the model does, without changing it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fastapd import APD, _intercept, metrics, ops
from fastapd._refined import refined
from fastapd.attributions import activation_attributions, gradient_attributions
from fastapd.components import Components, LayerShape
from fastapd.model import ComponentModel, find_sites
from fastapd.training import make_optimiser, train_step

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
VOCABULARY, WIDTH, POSITIONS = 7, 6, 3


class Conv1D(nn.Module):
    """y = x W + b, with the names that the layer of GPT-2 has."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.4)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class Attention(nn.Module):
    """One head, so that positions depend on each other."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        return x + F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=self.causal)


class Transformer(nn.Module):
    """Embedding, attention, an MLP of Conv1D layers, normalisation, a head that may share the embedding's matrix."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = Attention()
        self.up, self.down = Conv1D(5, WIDTH), Conv1D(WIDTH, 5)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.attention(self.embed(ids))
        return self.head(self.norm(x + self.drop(self.down(F.gelu(self.up(x))))))


USES: dict[str, Any] = {
    "@": lambda x, W, b: x @ W + b,
    "matmul": lambda x, W, b: torch.matmul(x, W) + b,
    "method": lambda x, W, b: x.matmul(W) + b,
    "linear": lambda x, W, b: F.linear(x, W.T, b),
    "linear of a transpose": lambda x, W, b: F.linear(x, W.transpose(-1, -2).contiguous(), b),
    "addmm": lambda x, W, b: torch.addmm(b, x.flatten(0, -2), W).unflatten(0, x.shape[:-1]),
    "einsum": lambda x, W, b: torch.einsum("...i,io->...o", x, W) + b,
    "einsum of the matrix first": lambda x, W, b: torch.einsum("io, bpi -> bpo", W, x) + b,
    "einsum in another order": lambda x, W, b: torch.einsum("bpi,io->opb", x, W).permute(2, 1, 0) + b,
    "einsum of a transpose": lambda x, W, b: torch.einsum("bpi,oi->bpo", x, W.T) + b,
    "data": lambda x, W, b: x @ W.data + b,
    "cast": lambda x, W, b: x @ W.to(x.dtype).permute(1, 0).t() + b,
    "mm": lambda x, W, b: torch.mm(x.reshape(-1, W.shape[0]), W).view(*x.shape[:-1], W.size(1)) + b,
}


class Matrices(nn.Module):
    """An MLP whose matrices are parameters, used in one of the ways there are."""

    def __init__(self, use: str = "@") -> None:
        super().__init__()
        self.W_in, self.W_out = nn.Parameter(torch.randn(WIDTH, 5) * 0.4), nn.Parameter(torch.randn(5, WIDTH) * 0.4)
        self.b_in = nn.Parameter(torch.randn(5))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(USES[self.use](x, self.W_in, self.b_in))
        return USES[self.use](hidden, self.W_out, torch.zeros(WIDTH, dtype=x.dtype)).softmax(-1)


class Twice(nn.Module):
    """The same layer on what it wrote before, with another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.other(torch.tanh(self.layer(x)))))


class Same(nn.Module):
    """Two layers of one matrix, in the same orientation, and a parameter used both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight
        self.W = nn.Parameter(torch.randn(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.tanh(self.a(x)))
        return torch.relu(x @ self.W) @ self.W.T


class Lookup(nn.Module):
    """Rows of a parameter by number, in both ways of writing it, and the same matrix to read out."""

    def __init__(self) -> None:
        super().__init__()
        self.W_E, self.W_pos = nn.Parameter(torch.randn(VOCABULARY, WIDTH)), nn.Parameter(torch.randn(POSITIONS, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.W_E[ids] + self.W_pos)
        x = x.cumsum(1) * self.W_E[ids, :] + F.embedding(ids, self.W_E)
        return x @ self.W_E.T


def _ids(batch: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, POSITIONS))


def _floats(batch: int = 2) -> Tensor:
    return torch.randn(batch, POSITIONS, WIDTH, dtype=torch.float64)


CASES: dict[str, tuple[Any, list[str], Any]] = {
    "attention": (Attention, ["q", "k", "v"], _floats),
    "attention to all": (lambda: Attention(False), ["v", "q"], _floats),
    "conv1d": (Transformer, ["up", "down"], _ids),
    "embedding": (Transformer, ["embed", "attention.v"], _ids),
    "head": (Transformer, ["head", "down"], _ids),
    "tied head": (lambda: Transformer(True), ["embed", "head", "up"], _ids),
    "half of a tie": (lambda: Transformer(True), ["head"], _ids),
    "twice": (Twice, ["layer", "other"], _floats),
    "same matrix": (Same, ["a", "b"], _floats),
    "lookup": (Lookup, ["W_E"], _ids),
    "both ways": (Same, ["W"], _floats),
    **{f"parameter by {use}": (lambda use=use: Matrices(use), ["W_*"], _floats) for use in USES},
}


def _case(name: str) -> tuple[nn.Module, list[str], Tensor]:
    make, patterns, data = CASES[name]
    target = make().double()
    return target, patterns, data()


def _model(target: nn.Module, patterns: list[str], n_components: int = 4, **settings: Any) -> ComponentModel:
    sites = find_sites(target, patterns)
    shapes = {s.name: s.shape for s in sites}
    components = Components(shapes, n_components, 2, 1, 3.0, dtype=torch.float64)
    return ComponentModel(target, sites, components, **settings)


def _state(target: nn.Module) -> dict[str, Any]:
    """All that a call might change."""
    return {
        "tensors": {name: t.clone() for name, t in (*target.named_parameters(), *target.named_buffers())},
        "places": {name: (t.data_ptr(), t.requires_grad) for name, t in target.named_parameters()},
        "grads": {name: None if t.grad is None else t.grad.clone() for name, t in target.named_parameters()},
        "attributes": {
            name: {k: v for k, v in vars(m).items() if k not in ("_parameters", "_buffers", "_modules")}
            for name, m in target.named_modules()
        },
    }


def _assert_same_state(target: nn.Module, before: dict[str, Any]) -> None:
    after = _state(target)
    assert all(torch.equal(t, before["tensors"][name]) for name, t in after["tensors"].items())
    for part in ("places", "attributes"):
        assert after[part] == before[part]
    for name, grad in after["grads"].items():
        assert grad is None if before["grads"][name] is None else torch.equal(grad, before["grads"][name])


# ---- it computes what the model does


@pytest.mark.parametrize("name", CASES)
def test_sites_faithful_components_reproduce_the_model(name):
    target, patterns, x = _case(name)
    wanted = target.eval()(x).detach()
    sites = find_sites(target, patterns)
    C = 2 * max(VOCABULARY, WIDTH)
    factors = {s.name: metrics.svd_factors(s.weight, C, 1) for s in sites if s.tied_to is None}
    shapes = {s.name: s.shape for s in sites}
    ties = Components(shapes, 1, 1).ties
    model = ComponentModel(target, sites, Components.from_factors(factors, ties))
    n = 2 * POSITIONS
    everything = ops.batch_topk(torch.zeros(1, n, C, dtype=torch.float64), n * C)
    for active in (None, everything, everything.mask, torch.ones(1, 1, C, dtype=torch.float64)):
        torch.testing.assert_close(model.forward(x, active).output, wanted, **CLOSE)
    torch.testing.assert_close(model.record_target(x).output, wanted, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_sites_selection_and_mask_agree_and_so_do_their_gradients(name):
    target, patterns, x = _case(name)
    model = _model(target, patterns)
    selection = ops.batch_topk(torch.rand(1, 2 * POSITIONS, 4, dtype=torch.float64), 13)
    parameters = list(model.components.parameters())
    outputs, gradients = [], []
    for active, accumulate in ((selection, False), (selection.mask.double(), False), (selection, True)):
        for p in parameters:
            p.grad = torch.zeros_like(p)
        output = model.forward(x, active, accumulate=accumulate).output
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append([p.grad.clone() for p in parameters])  # type: ignore[union-attr]
    assert (outputs[0] - model.forward(x).output).abs().max() > 1e-6  # the mask matters
    for k in (1, 2):
        torch.testing.assert_close(outputs[k], outputs[0], **CLOSE)
        for a, b in zip(gradients[k], gradients[0], strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_sites_gradient_of_the_output_follows_finite_differences(name):
    """Of the component model by its factors, through every use of a matrix."""
    target, patterns, x = _case(name)
    model = _model(target, patterns, 2)
    mask = torch.rand(1, 2 * POSITIONS, 2, dtype=torch.float64)
    parameter = next(iter(model.components.parameters()))
    (gradient,) = torch.autograd.grad(model.forward(x, mask).output.sin().sum(), parameter)
    direction, h = torch.randn_like(parameter), 1e-6
    values = []
    with torch.no_grad():
        for step in (h, -2 * h):
            parameter += step * direction
            values.append(model.forward(x, mask).output.sin().sum())
    torch.testing.assert_close((values[0] - values[1]) / (2 * h), (gradient * direction).sum(), rtol=1e-5, atol=1e-7)


# ---- attributions by the definition


def _by_definition(model: ComponentModel, x: Tensor) -> Tensor:
    """sum_o ( sum_uses <df_o / d(matrix of that use on that sample), P_c> )^2, by a Jacobian of every sample's own.

    Every use of a matrix is given a perturbation of its own on every sample, added to what the site writes:
    y_s = x_s (W + E_s) has the derivative x_s^T g, so that the Jacobian by E_s at 0 is that by the matrix on s alone.
    """
    model.target.eval()
    record = model.record_target(x)
    keys = list(record.inputs)
    parts = {key: _part(model, record, key) for key in keys}  # [C, d_in, d_out], d_in of the recorded inputs
    zeros = {key: torch.zeros(rows.shape[1], parts[key].shape[1], parts[key].shape[2], dtype=torch.float64)
             for key, rows in record.inputs.items()}  # fmt: skip

    def run(perturbed: dict[str, Tensor]) -> Tensor:
        return _perturbed(model, record, x, perturbed)

    jacobian = jacrev(run)(zeros)  # [batch, .., o, samples, d_in, d_out]
    n_samples = record.inputs[keys[0]].shape[1]
    total = torch.zeros(n_samples, model.components.n_components, dtype=torch.float64)
    each = n_samples // x.shape[0]
    for s in range(n_samples):
        for c in range(model.components.n_components):
            inner = sum((jacobian[key].flatten(1, -4)[s // each, :, s] * parts[key][c]).sum((-2, -1)) for key in keys)
            assert isinstance(inner, Tensor)
            total[s, c] = inner.square().sum()
    return total


def _part(model: ComponentModel, record: Any, key: str) -> Tensor:
    use = record.uses.get(key)
    P = model.components.parts(key if use is None else use.site)[0].detach()
    if use is None:
        return P
    P = P.mT if use.transposed else P
    return P if use.ids is None else P[:, use.ids]


def _perturbed(model: ComponentModel, record: Any, x: Tensor, perturbed: dict[str, Tensor]) -> Tensor:
    """The target, by hooks of its own and functional calls, none of the code that is tested."""
    seen: dict[str, int] = {}

    def layer(site: Any, rows_in: Tensor, role: Any = _intercept.PLAIN) -> Tensor:
        seen[site.name] = seen.get(site.name, 0) + 1
        key = site.name if seen[site.name] == 1 else f"{site.name}#{seen[site.name]}"
        W = site.weight[0]
        W = W.mT if role.transposed else W
        if role.ids:
            rows = F.one_hot(rows_in.reshape(-1), W.shape[0]).double()[:, record.uses[key].ids]
            y = W[rows_in.reshape(-1)] + torch.einsum("si,sio->so", rows, perturbed[key])
            return y.reshape(*rows_in.shape, -1)
        rows = rows_in.reshape(-1, rows_in.shape[-1])
        y = rows @ W + torch.einsum("si,sio->so", rows, perturbed[key])
        y = y.reshape(*rows_in.shape[:-1], -1)
        bias = None if site.is_parameter else site.adapter.bias(site.module)
        return y if bias is None else y + bias

    with _intercept.replaced(model.sites, layer):
        return model.target(x)


@pytest.mark.parametrize("name", [name for name in CASES if "parameter" not in name or name.endswith("by @")])
def test_sites_gradient_attributions_follow_the_definition(name):
    target, patterns, x = _case(name)
    model = _model(target, patterns)
    found = gradient_attributions(model, model.record_target(x, differentiable=True)).detach()
    expected = _by_definition(model, x)
    assert found.shape == (1, *expected.shape) and expected.abs().max() > 1e-8
    torch.testing.assert_close(found[0], expected, **CLOSE)


def test_sites_attributions_of_a_module_that_runs_twice_are_those_of_the_jacobian_by_its_weight():
    """With a single position a sample's attribution needs no copies: the Jacobian by the shared weight is enough."""
    target = Twice().double()
    model = _model(target, ["layer"])
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    found = gradient_attributions(model, model.record_target(x, differentiable=True)).detach()
    parts = model.components.parts("layer")[0].detach()
    for b in range(3):
        weight = {"layer.weight": target.layer.weight.detach()}
        jacobian = jacrev(lambda w, b=b: functional_call(target, w, x[b : b + 1]))(weight)["layer.weight"][0]
        expected = torch.einsum("oji,cij->co", jacobian, parts).square().sum(-1)
        torch.testing.assert_close(found[0, b], expected, **CLOSE)


def test_sites_attributions_of_a_tied_embedding_are_those_of_the_jacobian_by_the_shared_matrix():
    target = Transformer(True).double().eval()
    model = _model(target, ["embed", "head"])
    x = torch.tensor([[3], [5]])  # one position: a sample is all that its batch element has
    found = gradient_attributions(model, model.record_target(x, differentiable=True)).detach()
    parts = model.components.parts("embed")[0].detach()
    for b in range(2):
        weights = {"embed.weight": target.embed.weight.detach()}  # functional_call keeps the tie
        jacobian = jacrev(lambda w, b=b: functional_call(target, w, x[b : b + 1]))(weights)["embed.weight"][0, 0]
        expected = torch.einsum("ovd,cvd->co", jacobian, parts).square().sum(-1)
        torch.testing.assert_close(found[0, b], expected, **CLOSE)


@pytest.mark.parametrize("name", ["embedding", "tied head", "twice", "both ways", "lookup"])
def test_sites_activation_attributions_follow_the_definition(name):
    target, patterns, x = _case(name)
    model = _model(target, patterns)
    record = model.forward(x)
    expected = sum(
        torch.einsum("si,cio->sco", rows[0], _part(model, record, key)).square().sum(-1)
        for key, rows in record.inputs.items()
    )
    torch.testing.assert_close(activation_attributions(model.components, record)[0].detach(), expected, **CLOSE)


# ---- ties


def test_sites_that_share_a_matrix_are_tied():
    sites = find_sites(Transformer(True), ["head", "embed"])
    assert [s.shape for s in sites] == [
        LayerShape(VOCABULARY, WIDTH),
        LayerShape(WIDTH, VOCABULARY, "embed", True),
    ]
    sites = find_sites(Same(), ["a", "b", "W"])
    assert [s.shape for s in sites if s.tied_to] == [LayerShape(WIDTH, WIDTH, "a", False)]
    model = _model(Same().double(), ["a", "b"])
    assert model.n_params == 2 * WIDTH * WIDTH and model.components.multiplicity == {"a": 2}
    assert model.components.ties == {"b": "=a"}
    assert torch.equal(model.components.weight("a"), model.components.weight("b"))
    again = Components.from_factors({"a": model.components.factors("a")}, model.components.ties)
    assert again.layers == model.components.layers


def test_sites_write_the_state_of_a_model():
    target = Transformer(True).double()
    for name, expected in (("embed", "embed.weight"), ("head", "head.weight"), ("up", "up.weight")):
        (site,) = find_sites(target, [name])
        state = site.state(site.weight)
        assert list(state) == [expected] and torch.equal(state[expected], target.state_dict()[expected])
    (site,) = find_sites(Matrices().double(), ["W_in"])
    assert list(site.state(site.weight)) == ["W_in"]


# ---- the model is never modified


class _Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("inside the model")


@pytest.mark.parametrize("name", CASES)
def test_sites_leave_the_model_as_it_was(name):
    target, patterns, x = _case(name)
    target.train()
    next(target.parameters()).requires_grad_(False)
    for p in target.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    calls = []
    next(target.modules()).register_forward_hook(lambda *_: calls.append(1))
    before = _state(target)
    model = _model(target, patterns)
    step = train_step(model, APD(topk=1.0, distance="kl"), make_optimiser(model.components), 0.1, x)
    assert step.total.isfinite()
    _assert_same_state(target, before)
    assert calls, "hooks run"
    assert all(m.training for m in target.modules())


@pytest.mark.parametrize("target", [nn.Sequential(nn.Linear(4, 4), nn.Dropout(), _Raises()), Matrices("@")])
def test_sites_leave_the_model_as_it_was_when_it_raises(target):
    target = copy.deepcopy(target).double().train()
    wrong = torch.randn(2, 4, dtype=torch.float64)
    model = _model(target, ["0"] if isinstance(target, nn.Sequential) else ["W_*"])
    before = _state(target)
    for run in (model.forward, lambda x: model.record_target(x, differentiable=True)):
        with pytest.raises((RuntimeError, ValueError), match=r"inside the model|width 6"):
            run(wrong)
        _assert_same_state(target, before)


def test_sites_run_in_evaluation_mode_and_leave_running_statistics_alone():
    target = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 2))
    target = target.double().train()
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    model = _model(target, ["0", "3"])
    before = _state(target)
    outputs = [model.record_target(x).output for _ in range(2)]
    assert torch.equal(*outputs)
    _assert_same_state(target, before)
    assert target.training and target[1].num_batches_tracked == 0
    torch.testing.assert_close(outputs[0], copy.deepcopy(target).eval()(x).detach(), **CLOSE)


# ---- refusals


class _Holds(nn.Module):
    def __init__(self, use: Any, *shape: int) -> None:
        super().__init__()
        self.W, self.use = nn.Parameter(torch.randn(*(shape or (4, 4)))), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@pytest.mark.parametrize(
    "use, name",
    [
        (lambda m, x: x * m.W, "mul"),
        (lambda m, x: x @ torch.softmax(m.W, -1), "softmax"),
        (lambda m, x: x @ (m.W + 1), "add"),
        (lambda m, x: m.W @ x, "matmul"),
        (lambda m, x: x @ m.W[:2].T, "__getitem__"),
        (lambda m, x: torch.einsum("bi,io,io->bo", x, m.W, m.W), "einsum"),
        (lambda m, x: torch.einsum("bi,io->b", x, m.W), "einsum"),
        (lambda m, x: torch.addmm(x, x, m.W, alpha=2), "addmm"),
        (lambda m, x: x @ m.W.reshape(4, 4), "reshape"),
    ],
)
def test_sites_refuse_a_use_of_a_parameter_that_is_no_product(use, name):
    model = _model(_Holds(use).double(), ["W"])
    with pytest.raises(
        ValueError, match=rf"^decompose: W must be used as the matrix of a product x W, got _*\w*{name}"
    ):
        model.record_target(torch.randn(4, 4, dtype=torch.float64))


@pytest.mark.filterwarnings(
    "ignore:Lazy modules", "ignore::DeprecationWarning", "ignore:torch.quantize", "ignore:Complex"
)
def test_sites_refuse_what_they_cannot_be():
    def refused(target: nn.Module, pattern: str, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            find_sites(target, [pattern])

    refused(_Holds(None, 2, 4, 3), "W", TypeError, r"^find_sites: W must be a matrix, one matrix for .*\[2, 4, 3\]$")
    refused(_Holds(None, 4), "W", TypeError, r"^find_sites: W must be a matrix, got shape \[4\]$")
    refused(nn.Sequential(nn.LazyLinear(3)), "0", ValueError, r"^find_sites: 0 must have a shape, .*; run the model on")
    refused(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), "0", TypeError, r"^find_sites: 0 must not have a max_norm")
    refused(
        nn.Sequential(nn.Linear(2, 2).to(torch.complex64)), "0", TypeError, r"^find_sites: 0 .* got torch.complex64"
    )
    refused(
        nn.Sequential(nn.MultiheadAttention(4, 2)), "0.out_proj", TypeError, r"got NonDynamicallyQuantizableLinear$"
    )
    refused(nn.Linear(2, 2), "weight", ValueError, r"^find_sites: the target must not be a single layer itself")
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear})
    refused(quantised, "0", TypeError, r"got torch\.ao\..*dynamic.*\.Linear$")


def test_sites_a_weight_by_its_own_name_is_the_layer():
    target = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert [s.name for s in find_sites(target, ["*.weight"])] == ["0", "2"]
    assert [s.name for s in find_sites(target, "2")] == ["2"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sites_a_parametrised_layer_is_one_by_its_weight():
    target = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)).double()
    model = _model(target, ["0", "2"])
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(model.record_target(x).output, target(x).detach(), **CLOSE)
    assert model.sites[0].state(model.sites[0].weight) == {}
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3))).double()  # its weight is in float32 until it has run
    torch.testing.assert_close(_model(old, ["0"]).record_target(x).output, old(x).detach(), **CLOSE)


def test_sites_refuse_inputs_that_do_not_fit():
    model = _model(nn.Sequential(nn.Linear(4, 3)).double(), ["0"])
    with pytest.raises(ValueError, match=r"^decompose: data must give 0 inputs of width 4, got shape \[2, 5\]"):
        model.record_target(torch.randn(2, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"^decompose: data must give 0 floating-point inputs, got torch\.int64"):
        model.record_target(torch.ones(2, 4, dtype=torch.int64))
    model = _model(Transformer().double(), ["embed"])
    with pytest.raises(TypeError, match=r"^decompose: data must give embed whole numbers, got torch\.float64"):
        model.record_target(torch.randn(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^decompose: data must give embed numbers in \[0, 7\), got 0 to 9"):
        model.record_target(torch.tensor([[0, 9, 1]]))


def test_sites_that_do_not_run_or_see_other_samples_are_named():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).softmax(-1).mean(1))

    x = torch.randn(2, 3, 4, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"^decompose: targets must run when the model does, got unused, which did not"
    ):
        _model(Odd().double(), ["a", "unused"]).record_target(x)
    with pytest.raises(
        ValueError, match=r"^decompose: targets must all see the same number of samples, got a: 6, b: 2"
    ):
        _model(Odd().double(), ["a", "b"]).record_target(x)


def test_sites_of_a_module_under_two_names_are_one():
    shared = nn.Linear(4, 4)
    target = nn.Sequential(shared, nn.Tanh(), shared).double()
    (site,) = find_sites(target, ["0", "2"])
    assert site.name == "0"
    record = _model(target, ["2"]).record_target(torch.randn(3, 4, dtype=torch.float64))
    assert list(record.inputs) == ["0", "0#2"] and math.isfinite(record.output.sum())


@pytest.mark.parametrize("name", ["embedding", "tied head", "twice", "both ways", "attention"])
def test_sites_attributions_are_differentiable_in_the_components(name):
    """As the Lp form needs them: by finite differences, through every use of a matrix."""
    target, patterns, x = _case(name)
    model = _model(target, patterns, 2)
    weights = torch.rand(1, 2 * POSITIONS, 2, dtype=torch.float64)

    def value() -> Tensor:
        return (gradient_attributions(model, model.record_target(x, differentiable=True)) * weights).sum()

    for parameter in model.components.parameters():
        (gradient,) = torch.autograd.grad(value(), parameter)
        direction, h = torch.randn_like(parameter), 1e-6
        values = []
        with torch.no_grad():
            for step in (h, -2 * h, h):
                parameter += step * direction
                values.append(value())
        expected = (values[0] - values[1]) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-7)


# ---- estimates whose largest are computed


@pytest.mark.parametrize("name", CASES)
def test_sites_refined_attributions_of_all_components_are_the_exact_ones(name):
    target, patterns, x = _case(name)
    model = _model(target, patterns)
    exact = gradient_attributions(model, model.record_target(x, differentiable=True)).detach()
    found = refined(model, x, torch.zeros_like(exact), 99)
    torch.testing.assert_close(found, exact, **CLOSE)
    of_sums = gradient_attributions(model, model.record_target(x, True, of_components=True)).detach()
    torch.testing.assert_close(refined(model, x, torch.rand_like(exact), 4, of_components=True), of_sums, **CLOSE)
    assert name != "attention" or not torch.allclose(of_sums, exact)


@pytest.mark.parametrize("name", CASES)
def test_sites_refined_attributions_are_exact_for_the_largest_and_bound_the_others(name):
    target, patterns, x = _case(name)
    model = _model(target, patterns)
    exact = gradient_attributions(model, model.record_target(x, differentiable=True)).detach()
    estimate = exact * torch.rand_like(exact).add(0.5)
    found = refined(model, x, estimate, 2)
    chosen = estimate.topk(2, -1).indices
    computed = exact.gather(-1, chosen)
    torch.testing.assert_close(found.gather(-1, chosen), computed, **CLOSE)
    others = torch.ones_like(exact, dtype=torch.bool).scatter(-1, chosen, False)
    bounded = torch.minimum(estimate, found.gather(-1, chosen).amin(-1, keepdim=True))
    assert torch.equal(found[others], bounded[others]) and others.any()


class Thresholded(torch.autograd.Function):
    """Without a derivative in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (ctx.saved_tensors[0] > 0)


class WithoutForwardMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Thresholded.apply(self.a(x)))


def test_sites_refined_attributions_refuse_what_has_no_forward_mode():
    model = _model(WithoutForwardMode().double(), ["a", "b"])
    x = torch.randn(3, 5, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"^decompose: method\.attribution_refined must be left out for this"):
        refined(model, x, torch.rand(1, 3, model.components.n_components, dtype=torch.float64), 1)


class PositionsFirst(nn.Module):
    """Its layers see [position, batch, width], as recurrent networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.transpose(0, 1)).sin()
        return self.b(h - h.mean(0)).transpose(0, 1)


def test_sites_refined_attributions_refuse_layers_without_the_batch_first():
    model = _model(PositionsFirst().double(), ["a", "b"])
    x = torch.randn(3, 3, 5, dtype=torch.float64)  # as many positions as elements
    with pytest.raises(NotImplementedError, match=r"got layers that do not have the batch on their first axis"):
        refined(model, x, torch.rand(1, 9, model.components.n_components, dtype=torch.float64), 1)
