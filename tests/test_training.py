"""The step: what it computes and what it leaves out. The loop: reproducible, restartable, honest about how it ended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastapd import APD, DivergedError, Optimiser, backends, decompose, metrics, ops
from fastapd._rundir import RunDirectory, load_tensors, read_metrics
from fastapd.components import Components
from fastapd.decomposition import Decomposition
from fastapd.evaluation import evaluate, select
from fastapd.experiments.tms import TMS, sparse_features
from fastapd.model import ComponentModel, find_sites
from fastapd.training import learning_rate, make_optimiser, train_step

METHOD = APD(topk=0.5, minimality=1.0, simplicity=0.1, p=1.0)
OPTIMISER = Optimiser(lr=1e-2, schedule="cosine", warmup=0.1)
TERMS = ("faithfulness", "minimality", "simplicity", "output_reconstruction", "activation_reconstruction")
NONE = APD(topk=0.5, **dict.fromkeys(TERMS, 0.0))


def _tms(n_instances: int = 2) -> TMS:
    """Three features in two dimensions, at 120 degrees."""
    target = TMS(n_instances, 3, 2)
    angle = torch.arange(3) * (2 * math.pi / 3)
    with torch.no_grad():
        target.linear1.weight.copy_(torch.stack([angle.cos(), angle.sin()], -1))
    return target.requires_grad_(False)


def _data(seed: int = 0, n_instances: int = 2, batch: int = 16) -> Iterator[Tensor]:
    return sparse_features(n_instances, batch, 3, 0.3, torch.Generator().manual_seed(seed))


def _model(target: nn.Module | None = None, patterns: tuple[str, ...] = ("linear*",), C: int = 3) -> ComponentModel:
    target = target or _tms()
    sites = find_sites(target, patterns)
    first = sites[0].weight
    shapes = {s.name: s.shape for s in sites}
    generator = torch.Generator().manual_seed(3)
    components = Components(shapes, C, 2, first.shape[0], generator=generator, dtype=first.dtype)
    return ComponentModel(target, sites, components)


def _decompose(target: nn.Module | None = None, data: Any = None, **settings: Any) -> Decomposition:
    settings = {
        "method": METHOD,
        "optimiser": OPTIMISER,
        "steps": 10,
        "log_every": 1,
        "rank": 2,
        "device": "cpu",
    } | settings
    return decompose(target or _tms(), _data() if data is None else data, ["linear*"], 3, **settings)


def _timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def _status(path: Path) -> dict[str, Any]:
    return json.loads((path / "status.json").read_text())


# ---- the losses of one batch


@pytest.mark.parametrize("missing", TERMS)
def test_evaluate_leaves_out_terms_of_coefficient_zero(missing):
    coefficients = {name: 0.0 if name == missing else float(i + 1) for i, name in enumerate(TERMS)}
    step = evaluate(_model(), APD(topk=0.5, **coefficients), next(_data()))
    assert set(step.terms) == set(TERMS) - {missing}
    assert all(term.shape == (2,) for term in step.terms.values())
    expected = sum(coefficients[name] * step.terms[name].mean() for name in step.terms)
    torch.testing.assert_close(step.total, expected)


def test_evaluate_without_terms_has_nothing_to_differentiate():
    model = _model()
    step = evaluate(model, NONE, next(_data()))
    assert step.terms == {} and step.total == 0 and not step.total.requires_grad
    before = model.components.export()
    train_step(model, NONE, make_optimiser(model.components), 0.1, next(_data()))
    assert all(torch.equal(t, before[name]) for name, t in model.components.export().items())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"faithfulness": 0.0},
        {"minimality": 0.0, "simplicity": 0.0},
        {"schatten": "exact"},
        {"activation_reconstruction": 0.5, "output_reconstruction": 0.7},
        {"distil_from_target": True},
        {"selection": "sample", "topk": 1.0},
        {"selection": "exact"},
        {"attribution": "activation"},
        {"attribution_model": "components"},
        {"lp_sparsity": 0.3},
        {"topk": None, "lp_sparsity": 0.3, "minimality": 0.0},
    ],
    ids=str,
)
def test_step_leaves_the_gradients_that_autograd_finds(settings, backend):
    """Terms that add their gradients by themselves, beside those that autograd brings; over what was there before."""
    method = METHOD.model_copy(update=settings)
    model, x = _model(_tms().double()), next(_data()).double()
    parameters = list(model.components.parameters())
    with backends.use_backend(*((backend,) if backend == "reference" else (backend, "reference"))):
        plain = evaluate(model, method, x)
        expected = torch.autograd.grad(plain.total, parameters, allow_unused=True, materialize_grads=True)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, math.nan)
        optimiser = make_optimiser(model.components)
        step = train_step(model, method, optimiser, 0.0, x)
    torch.testing.assert_close(step.total, plain.total, rtol=1e-12, atol=0)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


DISTANCES = {
    "a scalar": lambda f, t: (f - t).square().mean(),
    "one value for all": lambda f, t: (f - t).square().mean().reshape(1),
    "one an instance": lambda f, t: (f - t).abs().mean((-2, -1)),
}


@pytest.mark.parametrize("faithfulness", [0.0, 1.0])
@pytest.mark.parametrize("distance", DISTANCES)
def test_step_differentiates_what_a_distance_returns(distance, faithfulness):
    """Terms of all shapes count as the mean over instances, though none is ever added up for it."""
    settings = {"minimality": 3.0, "output_reconstruction": 0.7, "simplicity": 0.0, "faithfulness": faithfulness}
    method, model, x = METHOD.model_copy(update=settings), _model(_tms().double()), next(_data()).double()
    plain = evaluate(model, method, x, distance=DISTANCES[distance])
    expected = torch.autograd.grad(plain.total, list(model.components.parameters()))
    train_step(model, method, make_optimiser(model.components), 0.0, x, distance=DISTANCES[distance])
    for parameter, gradient in zip(model.components.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "method, reported, full, selected",
    [
        (NONE, False, 0, 0),
        (METHOD, False, 0, 1),
        (METHOD, True, 1, 1),
        (METHOD.model_copy(update={"minimality": 0.0}), False, 0, 0),
        (METHOD.model_copy(update={"activation_reconstruction": 1.0}), False, 0, 1),
        (METHOD.model_copy(update={"output_reconstruction": 1.0}), False, 1, 1),
        (METHOD.model_copy(update={"attribution": "activation"}), False, 1, 1),
        (METHOD.model_copy(update={"attribution": "activation", "output_reconstruction": 1.0}), False, 1, 1),
    ],
)
def test_evaluate_runs_a_forward_only_when_asked(monkeypatch, method, reported, full, selected):
    calls = []
    forward = ComponentModel.forward

    def counted(self, x, active=None, *rest, **known):
        calls.append("full" if active is None else "selected")
        return forward(self, x, active, *rest, **known)

    monkeypatch.setattr(ComponentModel, "forward", counted)
    step = evaluate(_model(), method, next(_data()), output_reconstruction=reported)
    assert (calls.count("full"), calls.count("selected")) == (full, selected)
    assert ("output_reconstruction" in step.terms) is (reported or method.output_reconstruction > 0)


def test_evaluate_reports_a_term_without_adding_it():
    model, x = _model(), next(_data())
    torch.testing.assert_close(evaluate(model, METHOD, x, output_reconstruction=True).total,
                               evaluate(model, METHOD, x).total)  # fmt: skip


def test_evaluate_of_faithful_components_and_everything_selected_is_zero():
    target = _tms().double()
    sites = find_sites(target, ["linear*"])
    factors = metrics.svd_factors(sites[0].weight, 3, 2)
    model = ComponentModel(target, sites, Components.from_factors({"linear1": factors}, {"linear2": "linear1"}))
    method = APD(topk=3.0, simplicity=0.0, output_reconstruction=1.0, activation_reconstruction=1.0)
    step = evaluate(model, method, next(_data()).double())
    assert step.selection.mask.all() and all((term < 1e-28).all() for term in step.terms.values())


def test_evaluate_of_an_empty_batch_is_finite():
    method = METHOD.model_copy(update={"output_reconstruction": 1.0, "activation_reconstruction": 1.0})
    step = evaluate(_model(), method, torch.zeros(2, 0, 3))
    assert all(term[i] == 0 for name, term in step.terms.items() if name != "faithfulness" for i in range(2))
    assert step.terms["faithfulness"].isfinite().all()


def test_evaluate_compares_the_activations_it_is_given():
    model, x = _model(), next(_data())
    method = NONE.model_copy(update={"activation_reconstruction": 1.0})
    step = evaluate(model, method, x, {"linear2": torch.relu})
    target, masked = model.record_target(x), model.forward(x, step.selection)
    error = (target.outputs["linear2"].relu() - masked.outputs["linear2"].relu()).square().sum(-1)
    torch.testing.assert_close(step.terms["activation_reconstruction"], error.mean(-1) / 3)


@pytest.mark.parametrize("shape", [(7, 4), (7, 6, 4)])
def test_evaluate_gives_one_value_an_instance_whatever_axes_the_output_has(shape):
    target = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model = _model(target, ("0", "2"))
    x = torch.randn(shape)
    method = METHOD.model_copy(update={"output_reconstruction": 1.0, "activation_reconstruction": 1.0})
    step = evaluate(model, method, x)
    assert {tuple(term.shape) for term in step.terms.values()} == {(1,)}
    error = (model.forward(x, step.selection).output - target(x)).square().mean()
    torch.testing.assert_close(step.terms["minimality"], error.reshape(1))
    scores = Decomposition(model, method).score(x)
    assert {tuple(value.shape) for value in scores.values()} == {(1,)}


def test_select_takes_pairs_of_the_batch_or_of_each_sample():
    scores = torch.rand(2, 10, 4)
    batch = select(scores, APD(topk=1.28))
    assert batch.n_pairs == 12 and torch.equal(batch.mask, ops.batch_topk(scores, 12).mask)
    sample = select(scores, APD(topk=2.0, selection="sample"))
    assert (sample.mask.sum(-1) == 2).all()
    assert not torch.equal(sample.mask, select(scores, APD(topk=2.0)).mask)


# ---- one step


@pytest.mark.parametrize("where", ["decomposed", "beside", "bias"])
def test_train_step_gives_no_gradients_to_the_target(where):
    """Whatever of the target requires gradients, decomposed or not, before or after a site, keeps none and its flag."""
    target = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    wanted = {
        "decomposed": ["2.weight"],
        "beside": ["0.weight", "0.bias", "4.weight", "4.bias"],
        "bias": ["0.bias", "2.bias", "4.bias"],
    }[where]
    for name, p in target.named_parameters():
        p.requires_grad_(name in wanted)
    before = {name: t.clone() for name, t in target.state_dict().items()}
    model = _model(target, ("2",))
    method = METHOD.model_copy(update={"output_reconstruction": 1.0, "activation_reconstruction": 1.0})
    train_step(model, method, make_optimiser(model.components), 0.1, torch.randn(16, 4))
    assert all(p.grad is None for p in target.parameters())
    assert [name for name, p in target.named_parameters() if p.requires_grad] == wanted
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())
    assert all(p.grad is not None for p in model.components.parameters())


def test_train_step_takes_an_adam_step_of_the_given_rate():
    """The first step of Adam moves every entry with a gradient by lr, against the sign of the gradient."""
    model = _model()
    before = model.components.export()
    train_step(model, METHOD, make_optimiser(model.components), 0.125, next(_data()))
    moved = model.components.export()["linear1.B"] - before["linear1.B"]
    gradient = model.components.B["linear1"].grad
    clear = gradient.abs() > 1e-4
    assert clear.sum() > clear.numel() // 2
    torch.testing.assert_close(moved[clear], -0.125 * gradient[clear].sign(), rtol=1e-3, atol=0)


def test_train_step_forgets_the_gradients_of_the_step_before():
    model, x = _model(), next(_data())
    adam = make_optimiser(model.components)
    train_step(model, METHOD, adam, 0.0, x)
    first = [p.grad.clone() for p in model.components.parameters()]
    train_step(model, METHOD, adam, 0.0, x)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.components.parameters(), first, strict=True))


def test_train_step_with_unit_norm_normalises_first_and_moves_along_the_sphere():
    model = _model()
    method = METHOD.model_copy(update={"unit_norm": True})
    train_step(model, method, make_optimiser(model.components), 0.0, next(_data()))
    A, _ = model.components.factors("linear1")
    torch.testing.assert_close(A.norm(dim=-2), torch.ones(2, 3, 2))
    grad = model.components.At["linear1"].grad.mT
    assert (grad * A).sum(-2).abs().max() < 1e-6 and grad.norm() > 1e-3


# ---- the learning rate


def test_learning_rate_warms_up_from_zero():
    settings = Optimiser(lr=2.0, warmup=0.1)
    assert [learning_rate(step, 100, settings) for step in (0, 5, 10, 99)] == [0.0, 1.0, 2.0, 2.0]
    assert learning_rate(0, 100, Optimiser(lr=2.0)) == 2.0


@pytest.mark.parametrize(
    "schedule, halflife, half",
    [("constant", None, 2.0), ("linear", None, 1.0), ("cosine", None, 2 * math.cos(math.pi / 4)),
     ("exponential", 25.0, 0.5)],
)  # fmt: skip
def test_learning_rate_schedules_by_hand(schedule, halflife, half):
    settings = Optimiser(lr=2.0, schedule=schedule, halflife=halflife)
    steps = 101 if schedule == "cosine" else 100  # cosine ends at the last step, the others one after it
    assert learning_rate(0, steps, settings) == 2.0
    assert learning_rate(50, steps, settings) == pytest.approx(half, rel=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_of_a_single_step_is_finite(schedule, warmup):
    settings = Optimiser(lr=2.0, schedule=schedule, warmup=warmup)
    assert learning_rate(0, 1, settings) == 2.0


# ---- the loop


def test_decompose_lowers_the_loss_of_tms():
    history = _decompose(steps=300, log_every=300, device="cpu").history
    assert [row["step"] for row in history] == [0, 300]
    assert history[-1]["total"] < 0.5 * history[0]["total"]
    assert history[-1]["faithfulness"] < 0.1 * history[0]["faithfulness"]


def test_decompose_of_an_mlp_without_instances_becomes_faithful():
    target = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    data = [torch.randn(16, 4) for _ in range(8)]
    method = METHOD.model_copy(update={"simplicity": 0.0, "minimality": 0.1})
    result = decompose(
        target, data, ["0", "2"], 4, method=method, optimiser=OPTIMISER, steps=300, log_every=300, device="cpu"
    )
    first, last = result.history[0]["faithfulness"], result.history[-1]["faithfulness"]
    assert last < 0.01 * first
    x = torch.randn(9, 4)
    assert (result(x) - target(x)).abs().max() < 0.1
    assert result.model.components.rank == 4  # full, for want of another


def test_decompose_is_bit_equal_for_equal_seeds():
    first, again, other = (_decompose(seed=seed) for seed in (4, 4, 5))
    assert _timeless(first.history) == _timeless(again.history)
    factors, others = first.model.components.export(), other.model.components.export()
    assert all(torch.equal(t, again.model.components.export()[name]) for name, t in factors.items())
    assert not any(torch.equal(t, others[name]) for name, t in factors.items())
    assert first.history[0]["total"] != other.history[0]["total"]


def test_decompose_history_has_every_term_and_instance():
    history = _decompose(steps=7, log_every=3).history
    assert [row["step"] for row in history] == [0, 3, 6, 7]
    for row in history:
        assert row["total"] == pytest.approx(row["faithfulness"] + row["minimality"] + 0.1 * row["simplicity"])
        for name in ("faithfulness", "minimality", "simplicity"):
            values = row[f"{name}_per_instance"]
            assert len(values) == 2 and row[name] == pytest.approx(sum(values) / 2)


def test_decompose_first_step_has_learning_rate_zero():
    lr = [row["lr"] for row in _decompose(steps=20).history]
    assert lr[0] == 0.0 and lr[1] == 0.5e-2 and lr[2] == 1e-2


def test_decompose_starts_from_given_components():
    init = _model().components
    before = init.export()
    result = _decompose(init=init, steps=5)
    assert result.model.components is init
    assert not torch.equal(init.export()["linear1.B"], before["linear1.B"])
    with pytest.raises(ValueError, match=r"^decompose: init must have C = 3 components, got 4$"):
        _decompose(init=_model(C=4).components)


def test_decompose_leaves_the_target_alone():
    target = _tms().requires_grad_(True)
    before = {name: t.clone() for name, t in target.state_dict().items()}
    _decompose(target)
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in target.parameters())


class _Counted(list):
    """Batches that can be iterated again, and how often they were."""

    started = 0

    def __iter__(self):
        self.started += 1
        return super().__iter__()


def test_decompose_restarts_data_that_ends():
    batches = [batch for batch, _ in zip(_data(), range(4), strict=False)]
    data = _Counted(batches)
    result = _decompose(data=data, steps=10)  # 11 batches
    assert data.started == 3
    repeated = _decompose(data=batches * 3, steps=10)
    assert _timeless(result.history) == _timeless(repeated.history)


@pytest.mark.parametrize("data", [list, lambda: iter([torch.zeros(2, 4, 3)] * 3)], ids=["empty", "one-shot"])
def test_decompose_refuses_data_that_cannot_go_on(data, tmp_path):
    with pytest.raises(ValueError, match=r"^decompose: data must yield batches, got none; .* can be restarted$"):
        _decompose(data=data(), out=tmp_path / "run")
    assert _status(tmp_path / "run")["state"] == "failed"


def test_decompose_takes_the_first_item_of_tuples():
    batches = [batch for batch, _ in zip(_data(), range(3), strict=False)]
    expected = _timeless(_decompose(data=batches).history)
    assert _timeless(_decompose(data=[(batch, "label") for batch in batches]).history) == expected
    assert _timeless(_decompose(data=[[batch, None] for batch in batches]).history) == expected


def test_decompose_converts_data_to_the_targets_dtype():
    result = _decompose(_tms().double())
    assert result.model.components.factors("linear1")[0].dtype == torch.float64


def test_decompose_writes_a_run_directory_given_as_a_path(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(RunDirectory, "close", lambda self, close=RunDirectory.close: (closed.append(1), close(self)))
    result = _decompose(out=tmp_path / "run", steps=5)
    assert closed, "the metrics files are left open"
    status = _status(tmp_path / "run")
    assert (status["state"], status["step"], status["steps"]) == ("finished", 5, 5)
    assert read_metrics(tmp_path / "run") == result.history
    held = load_tensors(tmp_path / "run" / "components.safetensors")
    assert all(torch.equal(t, held[name]) for name, t in result.model.components.export().items())
    with pytest.raises(FileExistsError, match="path must be missing or an empty directory"):
        _decompose(out=tmp_path / "run")


def test_decompose_leaves_a_given_run_directory_open(tmp_path):
    with RunDirectory.create(tmp_path / "run", "run") as run:
        result = _decompose(out=run, steps=2)
        run.log(result.history[-1])
    assert len(read_metrics(tmp_path / "run")) == 4


def test_decompose_refuses_before_it_claims_the_run_directory(tmp_path):
    for wrong in ({"targets": ["linaer"]}, {"C": 0}):
        arguments = {"targets": ["linear*"], "C": 3} | wrong
        with pytest.raises(ValueError):
            decompose(_tms(), _data(), **arguments, out=tmp_path / "run", steps=2)
        assert not (tmp_path / "run").exists()


def test_decompose_stops_when_a_loss_is_not_finite(tmp_path):
    data = [batch for batch, _ in zip(_data(), range(6), strict=False)]
    data[3][:] = math.nan
    with pytest.raises(
        DivergedError, match=r"^decompose: the loss is nan at step 3: .*minimality.*; its batch has NaN"
    ):
        _decompose(data=data, out=tmp_path / "run")
    status = _status(tmp_path / "run")
    assert (status["state"], status["step"]) == ("diverged", 3) and "nan" in status["message"]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert set(load_tensors(tmp_path / "run" / "components.safetensors")) == {"linear1.A", "linear1.B"}


def test_decompose_notices_a_loss_that_was_not_finite_between_two_rows(tmp_path):
    data = [batch for batch, _ in zip(_data(), range(20), strict=False)]
    data[3][:] = math.nan
    with pytest.raises(DivergedError, match="at step 10"):
        _decompose(data=data, steps=15, log_every=10, out=tmp_path / "run")
    assert _status(tmp_path / "run")["state"] == "diverged"


def test_decompose_interrupted_says_where_and_keeps_what_it_has(tmp_path):
    def data():
        for index, batch in enumerate(_data()):
            if index == 7:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        _decompose(data=data(), steps=20, out=tmp_path / "run")
    status = _status(tmp_path / "run")
    assert (status["state"], status["step"], status["steps"]) == ("interrupted", 7, 20)
    assert status["message"] == "stopped by the user at step 7 of 20"
    held = load_tensors(tmp_path / "run" / "components.safetensors")
    again = _decompose(steps=20)  # the same seed, to the end
    assert not torch.equal(held["linear1.B"], again.model.components.export()["linear1.B"])
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(7))
    assert _timeless(read_metrics(tmp_path / "run"))[:1] == _timeless(again.history)[:1]


def test_decompose_that_fails_says_why(tmp_path):
    data = [next(_data()), torch.zeros(2, 4, 9)]
    with pytest.raises(ValueError, match="linear1 inputs of width 3, got shape "):
        _decompose(data=data, out=tmp_path / "run")
    status = _status(tmp_path / "run")
    assert (status["state"], status["step"]) == ("failed", 1) and status["message"].startswith("ValueError: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": "sample", "topk": 1.0},
        {"attribution": "activation"},
        {"attribution": "activation", "selection": "sample", "topk": 2.0},
        {"output_reconstruction": 1.0, "activation_reconstruction": 1.0},
        {"topk": 0.0},
        {"topk": 3.0},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
def test_decompose_with_every_choice_becomes_more_faithful(changes):
    # simplicity off: without selected components it alone would shrink nothing, with all of them it would everything
    method = METHOD.model_copy(update={"simplicity": 0.0, **changes})
    history = _decompose(method=method, steps=60, log_every=60).history
    assert history[-1]["faithfulness"] < 0.5 * history[0]["faithfulness"]


def test_decompose_with_unit_norm_ends_with_unit_columns():
    # a constant rate: a schedule that ends at zero would leave the last step nothing to denormalise
    constant = Optimiser(lr=1e-2)
    result = _decompose(method=METHOD.model_copy(update={"unit_norm": True}), optimiser=constant, steps=30)
    A, _ = result.model.components.factors("linear1")
    torch.testing.assert_close(A.detach().norm(dim=-2), torch.ones(2, 3, 2))
    assert result.history[-1]["faithfulness"] < result.history[0]["faithfulness"]


def test_decompose_has_defaults():
    result = decompose(_tms(), _data(), ["linear*"], 3, steps=2)
    assert result.method == APD(topk=1.0)
    assert [row["step"] for row in result.history] == [0, 2]
