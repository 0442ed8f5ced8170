"""`optimize` on fastapd against the research code's own: the same losses, files and calls from the same seed."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from fastapd.compat import _apd_optimize

TOPK: dict[str, Any] = {"topk": 1.3, "topk_recon_coeff": 1.0, "schatten_coeff": 0.7, "schatten_pnorm": 0.9}
LP: dict[str, Any] = {"lp_sparsity_coeff": 0.7, "pnorm": 0.9, "schatten_coeff": 0.1, "schatten_pnorm": 1.0}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "tms-topk": ("tms", {**TOPK, "lr_warmup_pct": 0.1}),
    "tms-topk-cosine-unit-norm": ("tms", {**TOPK, "lr_schedule": "cosine", "unit_norm_matrices": True}),
    "tms-sample-distil": ("tms", {**TOPK, "topk": 2.0, "batch_topk": False, "distil_from_target": True}),
    "tms-lp": ("tms", {**LP, "unit_norm_matrices": True, "lr_schedule": "linear"}),
    "tms-lp-activation": ("tms", {**LP, "attribution_type": "activation", "out_recon_coeff": 0.5}),
    "tms-topk-and-lp": ("tms", {**TOPK, **LP}),
    "tms-act-recon": ("tms", {**TOPK, "act_recon_coeff": 1.0, "param_match_coeff": None, "topk_recon_coeff": 0.0}),
    "mlp-topk": ("mlp", {**TOPK, "act_recon_coeff": 1.0, "unit_norm_matrices": True}),
    "mlp-lp": ("mlp", {**LP, "lr_schedule": "exponential", "lr_exponential_halflife": 20.0}),
}  # fmt: skip


def _refuse(*_: Any) -> Any:
    raise _apd_optimize.NotKnownError("this is a test")


def _pair(spd: Any, kind: str) -> tuple[Any, Any]:
    return spd.tms() if kind == "tms" else spd.mlp(C=6)


def _task(kind: str) -> str:
    return "tms" if kind == "tms" else "residual_mlp"


def _numbers(line: str) -> list[float]:
    return [float(t) for t in re.findall(r"[-+]?(?:\d+\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+|nan)", line)]


def _close(ours: list[str], theirs: list[str], relative: float) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.partition(":")[0] == b.partition(":")[0]
        assert _numbers(a) == pytest.approx(_numbers(b), rel=relative, abs=1e-12), (a, b)


@pytest.mark.parametrize("name", RUNS)
def test_optimize_prints_the_losses_of_the_research_code_over_50_steps(spd, patched, name):
    kind, settings = RUNS[name]
    pair, config = _pair(spd, kind), spd.config(_task(kind), **settings)
    # A sample without active inputs has equal attributions, among which top-k of the sample is free to choose.
    active = "exactly_two_active" if "sample" in name else "at_least_zero_active"
    theirs = spd.run(pair, kind, config, active)
    wanted = {n: p.detach().clone() for n, p in spd.model.named_parameters()}
    with patched(), warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = spd.run(pair, kind, config, active)
    _close(ours, theirs, 1e-4)
    for parameter_name, parameter in spd.model.named_parameters():
        apart = (parameter - wanted[parameter_name]).norm() / wanted[parameter_name].norm().clamp_min(1e-9)
        assert apart < 1e-3, parameter_name
        assert parameter.is_contiguous()
        assert parameter.grad is None
    assert spd.model.linear2.original_A is spd.model.linear1.A if kind == "tms" else True


def test_optimize_writes_plots_and_logs_when_the_research_code_does(spd, patched, tmp_path):
    config = spd.config(
        "tms", **{**TOPK, "steps": 7, "print_freq": 3, "image_freq": 2, "save_freq": 3, "image_on_first_step": False}
    )
    found = []
    for folder in ("theirs", "ours"):
        (tmp_path / folder).mkdir()
        calls: list[Any] = []

        def plot(calls: list[Any] = calls, **arguments: Any) -> dict[str, Any]:
            model, mask = arguments["model"], arguments["topk_mask"]
            calls.append(
                (arguments["step"], sorted(arguments), mask, arguments["batch"].sum(), model.linear1.A.sum().item())
            )
            torch.rand(3)  # plots may draw
            return {}

        with patched() if folder == "ours" else warnings.catch_warnings():
            lines = spd.run(spd.tms(), "tms", config, plot_results_fn=plot, out_dir=tmp_path / folder)
        files = {p.name: torch.load(p, weights_only=True) for p in sorted((tmp_path / folder).iterdir())}
        found.append((lines, calls, files))
    (their_lines, their_calls, their_files), (our_lines, our_calls, our_files) = found
    _close([line.replace("/ours/", "/theirs/") for line in our_lines], their_lines, 1e-4)
    assert [c[:2] for c in our_calls] == [c[:2] for c in their_calls]
    assert [c[0] for c in our_calls] == [2, 4, 6]
    for (*_, mask, batch, weight), (*_, other_mask, other_batch, other_weight) in zip(
        our_calls, their_calls, strict=True
    ):
        assert torch.equal(mask, other_mask)
        assert batch == other_batch
        assert weight == pytest.approx(other_weight, rel=1e-4)
    assert our_files.keys() == their_files.keys() == {f"spd_model_{n}.pth" for n in (3, 6, 7)}
    for name, state in our_files.items():
        assert list(state) == list(their_files[name])
        for key, value in state.items():
            assert value.shape == their_files[name][key].shape
            assert value.is_contiguous()
            assert torch.allclose(value, their_files[name][key], rtol=1e-4, atol=1e-5)


def test_optimize_goes_around_a_loader_that_ends(spd, patched):
    config = spd.config("tms", **TOPK, steps=5)
    data = [(torch.rand(32, 2, 5), None) for _ in range(2)]
    runs = []
    for on in (False, True):
        model, target = spd.tms()
        lines: list[str] = []
        with patched() if on else warnings.catch_warnings(), pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(spd.modules["run_spd"].tqdm, "write", lines.append)
            spd.optimize(model, config, "cpu", data, target, ["linear1", "linear2"])
        runs.append(lines)
    _close(runs[1], runs[0], 1e-4)
    assert [line for line in runs[1] if "Epoch" in line] == [f"Epoch {i} finished, starting new epoch" for i in (0, 1)]


def test_optimize_leaves_the_target_without_gradients(spd, patched):
    model, target = spd.tms()
    config, loader = spd.config("tms", **TOPK, steps=3), spd.loader("tms", 2, 32, "at_least_zero_active")
    arguments = (model, config, "cpu", loader, target, ["linear1", "linear2"])
    with patched():
        spd.optimize(*arguments)
    assert all(p.grad is None for p in target.parameters())
    with patched(as_reference=True):
        spd.optimize(*arguments)
    assert target.linear1.weight.grad is not None


def test_optimize_runs_ablation_attributions_which_the_research_code_cannot(spd, patched, monkeypatch):
    config = spd.config("tms", **TOPK, attribution_type="ablation", steps=3)
    pair = spd.tms()
    with pytest.raises(ValueError, match="too many values"):
        spd.run(pair, "tms", config)
    with patched(as_reference=True), pytest.raises(ValueError, match="too many values"):
        spd.run(pair, "tms", config)
    with patched():
        known = spd.run(pair, "tms", config)
        monkeypatch.setattr(_apd_optimize, "method_of", _refuse)
        _close(spd.run(pair, "tms", config), known, 1e-4)


def test_optimize_counts_active_inputs_exactly(spd, patched):
    config = spd.config("tms", **TOPK, exact_topk=True, steps=0 + 1, batch_size=49)
    batch = torch.zeros(49, 1, 5)
    batch[0, 0, 0] = 1.0
    assert int(float(torch.tensor(1) / 49) * 49) == 0  # what the research code makes of it
    masks = []
    for flags in ({}, {"as_reference": True}):
        model, target = spd.tms(n=1)

        def plot(topk_mask: Any, **_: Any) -> dict[str, Any]:
            masks.append(int(topk_mask.sum()))
            return {}

        with patched(**flags):
            spd.optimize(
                model, config.model_copy(update={"image_freq": 1}), "cpu", [(batch, batch)], target,
                ["linear1", "linear2"], plot,
            )  # fmt: skip
    assert masks == [1, 1, 0, 0]


def test_optimize_keeps_a_zero_column_zero(spd, patched):
    config = spd.config("tms", **TOPK, unit_norm_matrices=True, steps=2)
    for flags, finite in (({}, True), ({"as_reference": True}, False)):
        pair = spd.tms()
        pair[0].linear1.A.data[0, 0, :, 0] = 0
        with patched(**flags):
            spd.run(pair, "tms", config)
        assert bool(spd.model.linear1.A.isfinite().all()) is finite


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model, target: setattr(model.b_final, "requires_grad", True), "b_final is trained as well"),
        (lambda model, target: model.b_final.data.add_(1), "b_final is not the target's"),
        (
            lambda model, target: target.linear1.hook_post.add_hook(lambda t, hook: None),
            "hooked into linear1.hook_post",
        ),
    ],
)
def test_optimize_takes_another_step_where_the_models_are_not_as_expected(spd, patched, caplog, change, why):
    pair, config = spd.tms(), spd.config("tms", **TOPK, steps=10)
    change(*pair)
    theirs = spd.run(pair, "tms", config)
    with patched(), caplog.at_level("DEBUG", "fastapd"):
        ours = spd.run(pair, "tms", config)
    assert why in caplog.text
    _close(ours, theirs, 1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_optimize_of_any_model_prints_the_losses_of_the_research_code(spd, patched, monkeypatch, name):
    kind, settings = RUNS[name]
    pair, config = _pair(spd, kind), spd.config(_task(kind), **settings)
    active = "exactly_two_active" if "sample" in name else "at_least_zero_active"
    theirs = spd.run(pair, kind, config, active)
    monkeypatch.setattr(_apd_optimize, "components_of", _refuse)
    with patched():
        ours = spd.run(pair, kind, config, active)
    _close(ours, theirs, 1e-4)
    assert all(p.grad is None for p in spd.target.parameters())


def test_optimize_of_any_model_computes_what_it_does_not_print_no_more_than_needed(spd, patched, monkeypatch):
    """The same parameters come out whether or not steps are printed."""
    monkeypatch.setattr(_apd_optimize, "method_of", _refuse)
    for settings in (RUNS["tms-topk"][1], RUNS["tms-lp"][1], RUNS["tms-act-recon"][1]):
        found = []
        for print_freq in (1, 1000):
            with patched():
                spd.run(spd.tms(), "tms", spd.config("tms", **{**settings, "print_freq": print_freq, "steps": 10}))
            found.append(spd.model.linear1.A.detach().clone())
        assert torch.equal(*found)


def test_optimize_uses_a_loss_that_somebody_else_put_there(spd, patched, monkeypatch):
    with patched():
        own = spd.modules["run_spd"].calc_schatten_loss
        calls = []
        monkeypatch.setattr(spd.modules["run_spd"], "calc_schatten_loss", lambda **k: calls.append(1) or own(**k))
        spd.run(spd.tms(), "tms", spd.config("tms", **TOPK, steps=2))
        assert len(calls) == 3
        monkeypatch.undo()


@pytest.mark.parametrize("layers", [0, 2])
def test_optimize_trains_hidden_layers_and_the_gelu_of_a_residual_mlp(spd, patched, layers):
    pair = spd.tms(hidden=layers) if layers else spd.mlp(C=6, n=2, act="gelu", bias=False)
    kind = "tms" if layers else "mlp"
    config = spd.config(_task(kind), **TOPK, steps=20)
    theirs = spd.run(pair, kind, config)
    with patched(), warnings.catch_warnings():
        warnings.simplefilter("error")
        _close(spd.run(pair, kind, config), theirs, 1e-4)


def test_optimize_restores_the_layout_after_an_interruption(spd, patched):
    pair, config = spd.tms(), spd.config("tms", **TOPK, image_freq=1)

    def plot(step: int, **_: Any) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with patched(), pytest.raises(KeyboardInterrupt):
        spd.run(pair, "tms", config, plot_results_fn=plot)
    assert spd.model.linear1.A.is_contiguous()
    assert not torch.equal(spd.model.linear1.A, pair[0].linear1.A)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**TOPK, "exact_topk": True}, "exact_topk must be false without batch_topk and one instance, got True"),
        ({"schatten_coeff": 1.0, "schatten_pnorm": 0.9}, "topk must be given, or lp_sparsity_coeff, with schatten"),
    ],
)
def test_optimize_refuses_settings_that_contradict_each_other(spd, patched, settings, said):
    with patched(), pytest.raises(ValueError, match=said):
        spd.run(spd.tms(), "tms", spd.config("tms", **settings))


class _Wandb:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((step, values))

    def save(self, path: str, base_path: Any, policy: str) -> None:
        self.told.append((path.rpartition("/")[2], policy))

    @staticmethod
    def Image(figure: Any) -> Any:
        return ("image", figure)


@pytest.mark.parametrize("project", [None, "a project"])
def test_optimize_tells_wandb_the_same_and_only_if_there_is_a_project(spd, patched, monkeypatch, tmp_path, project):
    settings = {**TOPK, "steps": 4, "print_freq": 2, "image_freq": 4, "save_freq": 2, "wandb_project": project}
    config, told = spd.config("tms", **settings), []
    for on in (False, True):
        wandb = _Wandb()
        monkeypatch.setattr(spd.modules["run_spd"], "wandb", wandb)
        with patched() if on else warnings.catch_warnings():
            spd.run(spd.tms(), "tms", config, plot_results_fn=lambda **_: {"a": 1}, out_dir=tmp_path)
        told.append(wandb.told)
    theirs, ours = told
    assert len(ours) == len(theirs) == (9 if project else 0)
    for (what, values), (their_what, their_values) in zip(ours, theirs, strict=True):
        assert what == their_what
        if not isinstance(their_values, dict):
            assert values == their_values
            continue
        assert list(values) == list(their_values)
        for key, value in their_values.items():
            same = value if value is None or isinstance(value, tuple) else pytest.approx(float(value), rel=1e-4)
            assert (values[key] if same is value else float(values[key])) == same, key


def _own_models(spd: Any) -> tuple[Any, Any]:
    """A model that a user of the research code might write: two layers, nonlinear, without an axis of instances."""
    layers, base, hooks = (spd.modules["models.components"], spd.modules["models.base"], spd.modules["hooks"])

    class Mixin:
        def forward(self: Any, x: Any, topk_mask: Any = None) -> Any:
            return torch.tanh(self.second(torch.relu(self.first(x, topk_mask=topk_mask)), topk_mask=topk_mask))

    class OwnTarget(Mixin, hooks.HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layers.Linear(5, 4), layers.Linear(4, 3)
            self.setup()

    class OwnModel(Mixin, base.SPDModel):
        def __init__(self) -> None:
            super().__init__()
            self.C = 6
            self.first, self.second = layers.LinearComponent(5, 4, C=6, m=2), layers.LinearComponent(4, 3, C=6, m=2)
            self.setup()

    return OwnModel(), OwnTarget()


@pytest.mark.parametrize("name", ["tms-topk", "tms-sample-distil", "tms-lp", "tms-act-recon", "tms-topk-and-lp"])
def test_optimize_of_a_users_own_model_without_instances(spd, patched, name):
    config = spd.config("tms", **{**RUNS[name][1], "unit_norm_matrices": True})
    data = [(torch.rand(32, 5) * (torch.rand(32, 5) < 0.5) + 0.01, None) for _ in range(60)]
    runs = []
    for on in (False, True):
        torch.manual_seed(0)
        model, target = _own_models(spd)
        lines: list[str] = []
        with patched() if on else warnings.catch_warnings(), pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(spd.modules["run_spd"].tqdm, "write", lines.append)
            spd.optimize(model, config, "cpu", data, target, ["first", "second"])
        runs.append((lines, model))
    (theirs, their_model), (ours, our_model) = runs
    _close(ours, theirs, 1e-4)
    for (key, a), b in zip(our_model.named_parameters(), their_model.parameters(), strict=True):
        assert (a - b).norm() < 1e-3 * b.norm(), key
