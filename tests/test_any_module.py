"""`decompose` of modules that nobody prepared for it: what they take and return, where they are, what is refused."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastapd import APD, DivergedError, Optimiser, _plan, attributions, decompose
from fastapd.components import Components
from fastapd.decomposition import Decomposition
from fastapd.evaluation import evaluate
from fastapd.model import ComponentModel, find_sites

OPTIMISER = Optimiser(lr=1e-2, schedule="cosine")


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))


class _Language(nn.Module):
    """Tokens to logits through attention; what it returns is up to `wrap`."""

    def __init__(self, wrap: Any = lambda y: y) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp, self.head = nn.Linear(8, 8), nn.Linear(8, 9)
        self.wrap = wrap

    def forward(self, tokens: Tensor, scale: Tensor | None = None, unused: str = "") -> Any:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x)[0]
        y = self.head(torch.relu(self.mlp(x)))
        return self.wrap(y if scale is None else y * scale)


def _tokens() -> Tensor:
    return torch.randint(0, 9, (4, 5))


def _decompose(model: nn.Module, data: Any, targets: Any = ("mlp",), C: Any = 4, **settings: Any) -> Decomposition:
    settings = {"steps": 4, "log_every": 2, "method": APD(topk=1.0), "device": "cpu"} | settings
    return decompose(model, data, targets, C, **settings)


def _timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


# ---- ten lines


class Wave(nn.Module):
    """A nonlinearity that no list has."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.7 * x) + 0.1 * torch.sin(3 * x)


def test_decompose_of_six_layers_with_mixed_nonlinearities_needs_no_settings():
    widths, acts = (6, 10, 8, 10, 8, 10, 4), (nn.ReLU(), nn.GELU(), Wave(), nn.Tanh(), nn.SiLU(), nn.Dropout(0.5))
    layers = [layer for k, act in enumerate(acts) for layer in (nn.Linear(widths[k], widths[k + 1]), act)]
    model = nn.Sequential(*layers)
    data = [torch.rand(64, 6) for _ in range(8)]
    result = decompose(model, data, targets=["[02468]", "10"], C=8, steps=400, device="cpu")
    assert len(result.model.sites) == 6
    assert "Wave" in result.model.plan(data[0]).reason or "mul" in result.model.plan(data[0]).reason
    assert result.score(data[0])["faithfulness_error"] < 1e-2
    torch.testing.assert_close(result(data[0]), model.eval()(data[0]).detach(), rtol=1e-2, atol=1e-2)


# ---- what models take and return


class _Output(NamedTuple):
    logits: Tensor
    other: Tensor


@pytest.mark.parametrize(
    "wrap, output",
    [
        (lambda y: {"logits": y, "loss": 1.0}, None),
        (lambda y: UserDict(logits=y), None),
        (lambda y: _Output(y, y * 2), None),
        (lambda y: (y * 2, [y]), lambda out: out[1][0]),
        (lambda y: {"logits": y * 2, "y": y}, lambda out: out["y"]),
    ],
)
def test_decompose_takes_the_output_from_what_the_model_returns(wrap, output):
    model = _Language()
    data = [_tokens() for _ in range(3)]
    expected = _decompose(model, data).history
    model.wrap = wrap
    assert _timeless(_decompose(model, data, output=output).history) == _timeless(expected)


def test_decompose_says_what_the_model_returns_that_is_no_tensor():
    for wrap, name in ((lambda y: (y, y), "tuple"), (lambda y: {"y": y}, "dict"), (lambda y: None, "NoneType")):
        with pytest.raises(TypeError, match=rf"^decompose: model must return a tensor or .*, got {name}; pass output="):
            _decompose(_Language(wrap), [_tokens()])
    with pytest.raises(TypeError, match=r"^decompose: output must return a tensor, got list$"):
        _decompose(_Language(), [_tokens()], output=lambda y: [y])
    with pytest.raises(ValueError, match=r"^decompose: model must return the batch of 4 on its first axis, got shape"):
        _decompose(_Language(lambda y: y.transpose(0, 1)), [_tokens()])


def test_decompose_takes_arguments_by_name():
    model, data = _Language(), [_tokens() for _ in range(3)]
    expected = _timeless(_decompose(model, data).history)
    for wrap in (dict, UserDict):
        named = [wrap(tokens=t, unused="not a tensor") for t in data]
        assert _timeless(_decompose(model, named).history) == expected
    twice = [{"tokens": t, "scale": torch.full((1,), 2.0, dtype=torch.float64)} for t in data]
    assert _timeless(_decompose(model, twice).history) != expected  # in the model's dtype, or it would raise
    assert _timeless(_decompose(model, [({"tokens": t}, "label") for t in data]).history) == expected
    with pytest.raises(TypeError, match=r"^decompose: data must yield tensors for the exact selection, got a dict"):
        _decompose(model, [{"tokens": data[0]}], method=APD(topk=1.0, selection="exact"))


def test_decomposition_of_a_sequence_model_runs_with_chosen_components():
    model, x = _Language(), _tokens()
    result = _decompose(model, [x], ["mlp", "embed"])
    mask = torch.zeros(1, 20, 4)
    mask[..., [1, 3]] = 1
    for inputs in (x, {"tokens": x}):
        torch.testing.assert_close(result(inputs, [1, 3]), result(x, mask))
    assert (result(x, [1]) - result(x, [1, 3])).abs().max() > 1e-6


@pytest.mark.parametrize("distance", ["mse", "kl", "callable"])
@pytest.mark.parametrize("attribution", ["gradient", "activation", "ablation"])
def test_decompose_of_sequences_lowers_the_loss(distance, attribution):
    own = None
    if distance == "callable":
        own = lambda y, wanted: (y - wanted).abs().mean((-2, -1))  # noqa: E731
    method = APD(topk=2.0, distance="kl" if distance == "kl" else "mse", attribution=attribution, simplicity=0.0)
    torch.manual_seed(1)
    model, data = _Language(), [_tokens() for _ in range(3)]
    settings = {"method": method, "distance": own, "optimiser": OPTIMISER, "steps": 60}
    history = _decompose(model, data, ["mlp", "embed", "head"], 6, **settings).history
    assert history[-1]["total"] < 0.7 * history[0]["total"]


def test_kl_of_sequences_is_the_mean_over_positions():
    model = _Language()
    result = _decompose(model, [_tokens()], method=APD(topk=1.0, distance="kl"), steps=1)
    x = _tokens()
    step, masked = result.select(x)
    p, q = model.eval()(x).detach().double().softmax(-1), masked.output.double().softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(step.terms["minimality"].squeeze().double(), expected, rtol=1e-4, atol=1e-8)


def test_decompose_of_a_model_with_one_number_an_element():
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1), nn.Linear(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).squeeze(-1)

    history = _decompose(Squeezed(), [torch.randn(7, 4)], ["inner.0"], optimiser=OPTIMISER, steps=30).history
    assert history[-1]["faithfulness"] < history[0]["faithfulness"]


def test_decompose_of_an_embedding_alone():
    history = _decompose(_Language(), [_tokens()], ["embed"], optimiser=OPTIMISER, steps=30).history
    assert history[-1]["faithfulness"] < history[0]["faithfulness"]


# ---- estimates


def test_decompose_by_probes_says_so():
    method = APD(topk=1.0, attribution_probes=3)
    data = [_tokens() for _ in range(3)]
    model = _Language()
    result = _decompose(model, data, method=method)
    assert [row["attribution_probes"] for row in result.history] == [3, 3, 3]
    assert _timeless(_decompose(model, data, method=method).history) == _timeless(result.history)
    assert _timeless(_decompose(model, data, method=method, seed=1).history) != _timeless(result.history)
    text = "\n".join(_plan.describe(result.model, data[0], method))
    assert "an unbiased estimate from 3 random directions over 40 outputs a sample reaches" in text
    exact = "\n".join(_plan.describe(result.model, data[0]))
    # 20 samples, 8 wide and three times that in between, 4 components, 4 bytes each
    assert "exact, 40 vector-Jacobian products, one for each of 40 outputs a sample reaches" in exact
    assert f"40 at once, about {40 * 20 * (8 + 4 + 3 * 8) * 4 / 1e6:.3g} MB held" in exact
    chain = _decompose(_mlp(), [torch.randn(8, 4)], ["0", "2"], method=method)
    assert "attribution_probes" not in chain.history[0]  # tangents are exact and cheaper


def test_decompose_by_probes_computes_the_largest_of_every_sample_when_asked():
    estimated = APD(topk=1.0, attribution_probes=2)
    refined = APD(topk=1.0, attribution_probes=2, attribution_refined=2)
    everything = APD(topk=1.0, attribution_probes=2, attribution_refined=9)
    data = [_tokens() for _ in range(8)]
    result = _decompose(_Language(), data, method=refined)
    assert [row["attribution_refined"] for row in result.history] == [2, 2, 2]
    assert "estimated by 2 random directions, 2 of a sample refined, p 0.9" in repr(result)
    positions = data[0].shape[1]
    text = result.plan(data[0])
    assert f"the 2 largest of each sample, exactly, by {2 * positions} directional derivatives" in text
    agree = {}
    for name, method in (("estimated", estimated), ("refined", refined), ("everything", everything)):
        same = [evaluate(result.model, method, x).mask == evaluate(result.model, APD(topk=1.0), x).mask for x in data]
        agree[name] = torch.stack(same).double().mean().item()
    assert agree["estimated"] < agree["refined"] <= agree["everything"] == 1.0
    half = _decompose(_Language().half(), data, method=refined)
    assert math.isfinite(half.history[-1]["total"])


# ---- dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_are_decomposed_in_float32(dtype):
    torch.manual_seed(2)
    model, data = _Language().to(dtype), [_tokens() for _ in range(3)]
    before = copy.deepcopy(model.state_dict())
    settings = {"method": APD(topk=2.0, distance="kl", simplicity=0.0), "optimiser": OPTIMISER, "steps": 60}
    result = _decompose(model, data, ["mlp", "embed", "head"], 6, **settings)
    assert all(p.dtype == torch.float32 for p in result.model.components.parameters())
    assert all(t.dtype == dtype and torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert result.history[-1]["total"] < 0.7 * result.history[0]["total"]
    assert _decompose(_mlp().to(dtype), [torch.randn(8, 4)], ["0", "2"]).history[-1]["total"] < math.inf


def test_small_gradients_do_not_vanish_in_float16():
    """Of a mean over many outputs: a millionth of an error is less than float16 can hold."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 64))
    half = copy.deepcopy(wide).half()
    wide.load_state_dict(half.state_dict())
    sites = {name: find_sites(target, ["0"]) for name, target in (("half", half), ("wide", wide))}
    components = Components({"0": sites["wide"][0].shape}, 3, 2)
    x = torch.randn(512, 4).half()
    found = []
    for name, target in (("half", half), ("wide", wide)):
        model = ComponentModel(target, sites[name], components)
        output = model.forward(x if name == "half" else x.float()).output
        assert output.dtype == torch.float32
        found.append(torch.autograd.grad((output * 1e-4).square().mean(), list(components.parameters())))
    for a, b in zip(*found, strict=True):
        assert b.abs().max() < 1e-7
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


def test_half_overflow_is_no_silence():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 3)).half()
    with torch.no_grad():
        model[2].weight.fill_(6e4)
        model[0].weight.fill_(10)
    with pytest.raises(DivergedError, match=r"at step 0: .*; nothing was trained yet"):
        _decompose(model, [torch.full((5, 4), 2.0)], ["0"])


def test_decompose_device_of_the_model_stays():
    model = _mlp()
    result = _decompose(model, [torch.randn(8, 4)], ["0"], device="cpu")
    assert result.model.target is model
    assert _decompose(model, [torch.randn(8, 4)], ["0"], device=torch.device("cpu")).model.target is model
    with pytest.raises(ValueError, match=r"^decompose: device must be 'auto' or a device of torch's, got 'gpu'"):
        _decompose(model, [torch.randn(8, 4)], ["0"], device="gpu")
    if not torch.cuda.is_available():
        assert _decompose(model, [torch.randn(8, 4)], ["0"], device="auto").model.target is model
        with pytest.raises(ValueError, match=r"^decompose: device must be one that there is, got 'cuda'"):
            _decompose(model, [torch.randn(8, 4)], ["0"], device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_decompose_device_auto_takes_the_gpu_with_a_copy():
    model = _mlp()
    result = _decompose(model, [torch.randn(8, 4)], ["0"], device="auto")
    assert result(torch.randn(8, 4)).is_cuda
    assert result.model.target is not model and next(model.parameters()).device.type == "cpu"
    assert all(p.is_cuda for p in (*result.model.target.parameters(), *result.model.components.parameters()))
    on_gpu = copy.deepcopy(model).cuda()
    assert _decompose(on_gpu, [torch.randn(8, 4)], ["0"], device="auto").model.target is on_gpu


def test_decompose_of_frozen_parameters_is_that_of_others():
    model, data = _mlp(), [torch.randn(8, 4)]
    expected = _timeless(_decompose(model, data, ["0", "2"]).history)
    assert _timeless(_decompose(model.requires_grad_(False), data, ["0", "2"]).history) == expected


# ---- refusals


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"targets": ["mlpp"]}, ValueError, r"pattern 'mlpp' must match a module, the target has embed, attention"),
        ({"targets": []}, ValueError, r"patterns must name at least one module, got none"),
        ({"targets": ["attention"]}, TypeError, r"attention must be one of .*, got MultiheadAttention"),
        ({"C": 0}, ValueError, r"^decompose: C must be a whole number of at least 1, got 0"),
        ({"C": 2.5}, ValueError, r"^decompose: C must be a whole number of at least 1, got 2\.5"),
        ({"rank": 0}, ValueError, r"^decompose: rank must be a whole number of at least 1, got 0"),
        ({"log_every": 0}, ValueError, r"^decompose: log_every must be a whole number of at least 1, got 0"),
        ({"method": APD(topk=5.0)}, ValueError, r"^decompose: method.topk must be at most 4, got 5"),
        ({"data": []}, ValueError, r"^decompose: data must yield batches, got none"),
        ({"data": torch.zeros(8, 5)}, TypeError, r"^decompose: data must be batches .*, got a Tensor; pass \[data\]"),
        ({"data": {"tokens": 1}}, TypeError, r"^decompose: data must be batches .*, got a dict; pass \[data\]"),
        ({"data": [3.0]}, TypeError, r"^decompose: data must yield tensors, tuples .*, got float"),
        ({"data": [{}]}, TypeError, r"^decompose: data must yield tensors, got a dict of nothing"),
        ({"data": [torch.rand(4, 5)], "targets": ["embed"]}, TypeError, r"^decompose: data must give embed whole num"),
    ],
)
def test_decompose_refuses(arguments, error, match):
    settings: dict[str, Any] = {"data": [_tokens()], "targets": ["mlp"], "C": 4} | arguments
    with pytest.raises(error, match=match):
        _decompose(_Language(), settings.pop("data"), settings.pop("targets"), settings.pop("C"), **settings)


def test_decompose_refuses_data_of_the_wrong_width_or_kind_by_the_layers_name():
    with pytest.raises(ValueError, match=r"^decompose: data must give 0 inputs of width 4, got shape \[8, 5\]"):
        _decompose(_mlp(), [torch.randn(8, 5)], ["0", "2"])
    with pytest.raises(TypeError, match=r"^decompose: data must give 0 floating-point inputs, got torch\.int64"):
        _decompose(_mlp(), [torch.ones(8, 4, dtype=torch.int64)], ["0", "2"])


def test_decompose_says_that_a_batch_has_nan():
    x = torch.randn(8, 4)
    x[3, 1] = math.nan
    with pytest.raises(DivergedError, match=r"the loss is nan at step 2: .*; its batch has NaN or infinite values"):
        _decompose(_mlp(), [torch.randn(8, 4), torch.randn(8, 4), x], ["0"])
    with pytest.raises(DivergedError, match=r"at step 2: .*; lower the lr, and see that the data since step 0 is"):
        _decompose(_mlp(), [torch.randn(8, 4), x, torch.randn(8, 4)], ["0"])


def test_decompose_refuses_a_model_without_values_or_of_batch_statistics():
    with torch.device("meta"):
        model = _mlp()
    with pytest.raises(ValueError, match=r"^decompose: model must have values, got 0 on the meta device"):
        _decompose(model, [torch.randn(8, 4)], ["0"])
    mixing = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match=r"^decompose: model must not mix the samples of a batch, got 1, a BatchNorm"):
        _decompose(mixing, [torch.randn(8, 4)], ["0"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_decompose_of_weights_that_are_computed():
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)).double()
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)).double()
    for model in (new, old):
        result = _decompose(model, [torch.randn(8, 4)], ["0", "2"], optimiser=OPTIMISER, steps=40)
        assert result.model.mixed is None
        assert result.history[-1]["faithfulness"] < 0.5 * result.history[0]["faithfulness"]


def test_decompose_of_a_compiled_model_is_that_of_the_model():
    model, data = _mlp(), [torch.randn(8, 4)]
    compiled: Any = torch.compile(model)
    result = _decompose(compiled, data, ["0", "2"])
    assert result.model.target is model
    assert _timeless(result.history) == _timeless(_decompose(model, data, ["0", "2"]).history)


def test_decompose_refuses_outputs_without_gradients_or_fractions():
    with pytest.raises(ValueError, match=r"^decompose: model must let gradients through from mlp to what it returns"):
        _decompose(_Language(lambda y: y.detach()), [_tokens()])
    with pytest.raises(TypeError, match=r"^decompose: model must return floating-point numbers, got torch\.int64"):
        _decompose(_Language(lambda y: y.argmax(-1)), [_tokens()])


def test_decompose_says_that_exact_attributions_of_long_sequences_are_many(monkeypatch):
    monkeypatch.setattr(attributions, "MANY", 39)
    with pytest.warns(UserWarning, match=r"^decompose: exact attributions take 40 vector-Jacobian products a step"):
        _decompose(_Language(), [_tokens()], steps=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"topk": None, "lp_sparsity": 1e-3},
        {"attribution_model": "components"},
        {"selection": "sample", "topk": 2.0},
        {"distil_from_target": True},
        {"output_reconstruction": 1.0, "activation_reconstruction": 1.0},
        {"attribution_norm": True},
        {"unit_norm": True},
        {"schatten": "exact"},
    ],
    ids=str,
)
def test_decompose_of_sequences_with_every_choice_becomes_more_faithful(changes):
    torch.manual_seed(3)
    method = APD(topk=1.0, simplicity=1e-3).model_copy(update=changes)
    data = [_tokens() for _ in range(3)]
    settings = {"method": method, "optimiser": OPTIMISER, "steps": 60, "log_every": 60}
    history = _decompose(_Language(), data, ["mlp", "embed", "head"], 6, **settings).history
    assert history[-1]["faithfulness"] < 0.7 * history[0]["faithfulness"]
    assert all(math.isfinite(value) for value in history[-1].values() if isinstance(value, float))


def test_lp_weights_are_taken_over_all_outputs_that_a_sample_reaches():
    model = _decompose(_Language(), [_tokens()], steps=1).model
    x = _tokens()
    step = evaluate(model, APD(topk=None, lp_sparsity=1.0, lp_p=2.0), x)
    expected = step.attributions / (5 * 9)  # positions, and logits of each
    torch.testing.assert_close(step.terms["lp_sparsity"], expected.sum(-1).mean(-1))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_decompose_without_a_step_says_what_a_step_would_take(schedule):
    model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))
    optimiser = Optimiser(lr=1e-3, schedule=schedule)
    result = decompose(model, [torch.rand(16, 5)], ["0", "2"], 4, steps=0, optimiser=optimiser)
    assert [row["step"] for row in result.history] == [0]
    text = result.plan(torch.rand(16, 5))
    assert "sizes          1 instances, batch 16, C 4" in text
    assert "GFLOP a batch" in text
