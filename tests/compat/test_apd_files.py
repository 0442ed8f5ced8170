"""The research code's configurations, targets and checkpoints without it, and with it the same numbers."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fastapd import APD, Decomposition, decompose
from fastapd.compat import apd
from fastapd.compat._apd_models import TMS, ResidualMLP
from fastapd.config import ConfigError
from fastapd.model import ComponentModel, find_sites

TASK: dict[str, Any] = {"task_name": "tms", "feature_probability": 0.3, "pretrained_model_path": "tms.pth",
                        "train_bias": False, "bias_val": 0.0}  # fmt: skip
BASIC: dict[str, Any] = {
    "C": 6, "m": 3, "batch_size": 40, "steps": 12, "print_freq": 4, "lr": "1e-2", "topk": 1.3,
    "topk_recon_coeff": "1e1", "schatten_coeff": "7e-1", "schatten_pnorm": 0.9, "task_config": TASK,
}  # fmt: skip


def _config(**changes: Any) -> dict[str, Any]:
    values = {**copy.deepcopy(BASIC), **changes}
    return {key: value for key, value in values.items() if value is not ...}


def _tms_state(n: int = 2, hidden: int = 0) -> dict[str, Tensor]:
    state = {"b_final": torch.randn(n, 5) * 0.1, "linear1.weight": torch.randn(n, 5, 2)}
    return state | {f"hidden_layers.{i}.weight": torch.randn(n, 2, 2) for i in range(hidden)}


def _mlp_state(n: int = 1, layers: int = 2, bias: bool = True) -> dict[str, Tensor]:
    state = {"W_E": torch.randn(n, 6, 8), "W_U": torch.randn(n, 8, 6)}
    for i in range(layers):
        state[f"layers.{i}.mlp_in.weight"] = torch.randn(n, 8, 4)
        state[f"layers.{i}.mlp_out.weight"] = torch.randn(n, 4, 8)
        if bias:
            state |= {f"layers.{i}.bias1": torch.randn(n, 4), f"layers.{i}.bias2": torch.randn(n, 8)}
    return state


def _write(
    folder: Path, kind: str, state: dict[str, Tensor], act: str = "relu", output_act: bool = False, synced: Any = None
) -> Path:
    """A target's folder as the research code's training scripts leave it."""
    path = folder / ("tms.pth" if kind == "tms" else "resid_mlp.pth")
    torch.save(state, path)
    if kind == "tms":
        sizes = {"n_instances": 2, "n_features": 5, "n_hidden": 2, "device": "cpu"}
        sizes["n_hidden_layers"] = sum("hidden_layers" in name for name in state)
        train = {"tms_model_config": sizes, "feature_probability": 0.05, "batch_size": 8, "steps": 1, "lr": 1e-3,
                 "data_generation_type": "at_least_zero_active", "synced_inputs": synced}  # fmt: skip
        (folder / "tms_train_config.yaml").write_text(yaml.safe_dump(train))
        return path
    sizes = {
        "n_instances": state["W_E"].shape[0], "n_features": 6, "d_embed": 8, "d_mlp": 4,
        "n_layers": sum("mlp_in" in name for name in state), "act_fn_name": act, "apply_output_act_fn": output_act,
        "in_bias": "layers.0.bias1" in state, "out_bias": "layers.0.bias2" in state, "init_scale": 1.0,
    }  # fmt: skip
    (folder / "resid_mlp_train_config.yaml").write_text(
        yaml.safe_dump({"resid_mlp_config": sizes, "synced_inputs": synced})
    )
    (folder / "label_coeffs.json").write_text("[[1, 1, 1, 1, 1, 1]]")
    return path


# ----------------------------------------------------------------------------------------------------- configurations


def test_config_reads_numbers_that_yaml_takes_for_text(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(_config(steps="2e4", batch_size="20_00", save_freq="20_000")))
    config = apd.Config.from_yaml(tmp_path / "c.yaml")
    assert (config.lr, config.topk_recon_coeff, config.schatten_coeff) == (1e-2, 10.0, 0.7)
    assert (config.steps, config.batch_size, config.save_freq) == (20_000, 2000, 20_000)
    assert config.task_config.task_name == "tms"
    assert config.param_match_coeff == 1.0


def test_config_reads_what_it_wrote(tmp_path):
    config = apd.Config(**_config())
    (tmp_path / "final_config.yaml").write_text(yaml.dump(config.model_dump(mode="json"), indent=2))
    assert apd.Config.from_yaml(tmp_path / "final_config.yaml").model_dump() == config.model_dump()


def test_config_brings_earlier_keys_up_to_date():
    values = _config(C=..., topk_act_recon_coeff=0.5, pnorm_end=None, spd_type="rank_one", task_config={**TASK, "k": 9})
    before = copy.deepcopy(values)
    with pytest.warns(UserWarning) as said:
        config = apd.Config(**values)
    assert (config.C, config.act_recon_coeff) == (9, 0.5)
    assert values == before  # the mapping is the caller's
    texts = [str(w.message) for w in said]
    for key in ("task_config.k is now called C", "topk_act_recon_coeff is now called act_recon_coeff",
                "pnorm_end is not used any more", "spd_type is not used any more"):  # fmt: skip
        assert any(key in text for text in texts), key


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0}, "config: lr must be > 0, got 0"),
        ({"lr": ...}, "config: lr must be given, got nothing"),
        ({"tokp": 1}, "config: tokp is not a known key; did you mean 'topk'?"),
        ({"steps": 1.5}, "config: steps must be valid"),
        ({"task_config": {**TASK, "feature_probability": 2}}, "config: task_config.feature_probability must be <= 1"),
        ({"task_config": {**TASK, "task_name": "lm"}}, "config: task_config.task_name must be 'tms' or"),
        ({"topk": 1.5, "batch_topk": False}, "config: topk must be whole without batch_topk, got 1.5"),
        ({"topk": None}, "config: topk must be given with topk_recon_coeff, got nothing"),
        ({"lp_sparsity_coeff": 1}, "config: pnorm must be given with lp_sparsity_coeff"),
        ({"schatten_pnorm": None}, "config: schatten_pnorm must be given with schatten_coeff"),
        ({"lr_schedule": "exponential"}, "config: lr_exponential_halflife must be given when"),
        ({"lr_schedule": "step"}, "config: lr_schedule must be valid"),
    ],
)
def test_config_refuses(changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        apd.Config(**_config(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"topk": 1.33}, "topk \\* batch_size is 53.2, of which 53 pairs are taken"),
        ({"topk_recon_coeff": None}, "nothing asks for few components"),
        ({"out_recon_coeff": 1}, "param_match_coeff and out_recon_coeff are both set"),
    ],
)
def test_config_warns(changes, said):
    with pytest.warns(UserWarning, match=said):
        apd.Config(**_config(**changes))


def test_config_refuses_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml must be a file, got nothing"):
        apd.Config.from_yaml(tmp_path / "none.yaml")
    for text, said in (("a: [1", "line 1 must be YAML"), ("- 1", r"must hold a mapping, got list")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            apd.Config.from_yaml(tmp_path / "c.yaml")


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("hidden", [0, 2])
def test_load_target_of_a_toy_model(tmp_path, hidden):
    state = _tms_state(hidden=hidden)
    target = apd.load_target(_write(tmp_path, "tms", state))
    assert isinstance(target, TMS)
    assert target.decomposed == ["linear1", "linear2", *(f"hidden_layers.{i}" for i in range(hidden))]
    x = torch.rand(2, 7, 5)
    h = x @ state["linear1.weight"]
    for i in range(hidden):
        h = h @ state[f"hidden_layers.{i}.weight"]
    assert torch.allclose(target(x), torch.relu(h @ state["linear1.weight"].mT + state["b_final"][:, None]), atol=1e-6)
    assert not any(p.requires_grad for p in target.parameters())


@pytest.mark.parametrize(("bias", "act", "output_act"), [(True, "relu", False), (False, "gelu", True)])
def test_load_target_of_a_residual_mlp(tmp_path, bias, act, output_act):
    state = _mlp_state(bias=bias)
    target = apd.load_target(_write(tmp_path, "mlp", state, act, output_act))
    assert isinstance(target, ResidualMLP)
    assert target.decomposed == [f"layers.{i}.{n}" for i in (0, 1) for n in ("mlp_in", "mlp_out")]
    function = torch.relu if act == "relu" else torch.nn.functional.gelu
    x = torch.rand(1, 7, 6)
    r = x @ state["W_E"]
    for i in (0, 1):
        h = r @ state[f"layers.{i}.mlp_in.weight"] + (state[f"layers.{i}.bias1"][:, None] if bias else 0)
        r = r + function(h) @ state[f"layers.{i}.mlp_out.weight"] + (state[f"layers.{i}.bias2"][:, None] if bias else 0)
    y = r @ state["W_U"]
    assert torch.allclose(target(x), function(y) if output_act else y, atol=1e-4)


def test_load_target_reads_earlier_names(tmp_path):
    state = _tms_state()
    torch.save({"W": state["linear1.weight"], "b_final": state["b_final"]}, tmp_path / "old.pth")
    target = apd.load_target(tmp_path / "old.pth")
    assert torch.equal(target.linear1.weight, state["linear1.weight"])
    mlp = _mlp_state(bias=False)
    old = {k.replace("mlp_in.weight", "linear1").replace("mlp_out.weight", "linear2"): v for k, v in mlp.items()}
    assert "layers.0.linear1" in old
    _write(tmp_path, "mlp", mlp)
    torch.save(old, tmp_path / "resid_mlp.pth")
    target = apd.load_target(tmp_path / "resid_mlp.pth")
    assert torch.equal(target.layers[1].mlp_out.weight, mlp["layers.1.mlp_out.weight"])


def test_load_target_finds_what_a_configuration_names(tmp_path, monkeypatch):
    state = _tms_state()
    (tmp_path / "deep").mkdir()
    _write(tmp_path, "tms", state)
    for folder in (tmp_path, tmp_path / "deep"):
        (folder / "c.yaml").write_text(yaml.safe_dump(_config()))
        for source in (folder / "c.yaml", str(folder / "c.yaml"), apd.Config.from_yaml(folder / "c.yaml")):
            assert torch.equal(apd.load_target(source).linear1.weight, state["linear1.weight"])
    monkeypatch.chdir(tmp_path)
    assert torch.equal(apd.load_target(_config()).linear1.weight, state["linear1.weight"])
    for path, error, said in (
        ("wandb:project/runs/abc", ValueError, "must be a local file, got 'wandb:project/runs/abc'; download"),
        ("nowhere.pth", FileNotFoundError, "must be a file, got 'nowhere.pth'"),
    ):
        with pytest.raises(error, match=said):
            apd.load_target(_config(task_config={**TASK, "pretrained_model_path": path}))


def test_load_target_refuses(tmp_path):
    torch.save({"linear1.A": torch.zeros(1, 2, 3, 1), "b_final": torch.zeros(1, 3)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="must hold a target, got components; use load_components"):
        apd.load_target(tmp_path / "a.pth")
    torch.save({"b_final": torch.zeros(1, 3)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"must hold linear1\.weight, got b_final"):
        apd.load_target(tmp_path / "b.pth")
    torch.save([1], tmp_path / "c.pth")
    with pytest.raises(ValueError, match="must hold tensors by name, got list"):
        apd.load_target(tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="must be a checkpoint of tensors"):
        apd.load_target(tmp_path / "d.pth")
    torch.save(_mlp_state(), tmp_path / "e.pth")
    with pytest.raises(FileNotFoundError, match=r"resid_mlp_train_config\.yaml must lie beside"):
        apd.load_target(tmp_path / "e.pth")
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        apd.load_target(tmp_path / "f.pth")


class _Harmful:
    def __reduce__(self) -> Any:
        return (eval, ("__import__('pathlib').Path('harm').touch()",))


def test_checkpoints_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"linear1.weight": _Harmful()}, tmp_path / "x.pth")
    for load in (apd.load_target, apd.load_components):
        with pytest.raises(ValueError, match="must be a checkpoint of tensors"):
            load(tmp_path / "x.pth")
    assert not (tmp_path / "harm").exists()


def test_load_components(tmp_path):
    A, B = torch.randn(2, 6, 5, 3), torch.randn(2, 6, 3, 2)
    for name, state in {
        "now": {"b_final": torch.zeros(2, 5), "linear1.A": A, "linear1.B": B},
        "early": {"A": A, "B": B},
        "alone": {"linear1.A": A[0], "linear1.B": B[0]},
    }.items():
        torch.save(state, tmp_path / f"{name}.pth")
        torch.manual_seed(3)
        components = apd.load_components(tmp_path / f"{name}.pth")
        drawn = torch.rand(1)
        torch.manual_seed(3)
        assert drawn == torch.rand(1)  # nobody's random numbers were used up
        for own, given in zip(components.factors("linear1"), (A, B), strict=True):
            assert torch.equal(own, given[:1] if name == "alone" else given)
        assert components.layers["linear2"].tied_to == "linear1"
    mlp = {f"layers.0.linear{i}.{k}": torch.randn(1, 4, *s) for i, k, s in
           ((1, "A", (8, 2)), (1, "B", (2, 4)), (2, "A", (4, 2)), (2, "B", (2, 8)))}  # fmt: skip
    torch.save(mlp, tmp_path / "mlp.pth")
    components = apd.load_components(tmp_path / "mlp.pth")
    assert list(components.layers) == ["layers.0.mlp_in", "layers.0.mlp_out"]
    torch.save({"linear1.A": A}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="must hold A and B of every layer, got one of linear1"):
        apd.load_components(tmp_path / "half.pth")
    torch.save({"W": A}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="must hold factors A and B, got W"):
        apd.load_components(tmp_path / "none.pth")


# --------------------------------------------------------------------------------------------------------------- runs

MLP_TASK = {"task_name": "residual_mlp", "feature_probability": 0.3, "init_scale": 2.0,
            "pretrained_model_path": "resid_mlp.pth"}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("tms", {}),
        ("tms", {"topk": None, "topk_recon_coeff": None, "lp_sparsity_coeff": 1.0, "pnorm": 0.9, "m": None,
                 "unit_norm_matrices": True, "lr_schedule": "linear"}),
        ("mlp", {"task_config": MLP_TASK, "act_recon_coeff": 1.0, "lr_schedule": "cosine", "lr_warmup_pct": 0.1}),
    ],
)  # fmt: skip
def test_optimize_runs_a_configuration_alone(tmp_path, capsys, kind, changes):
    _write(tmp_path, kind, _tms_state() if kind == "tms" else _mlp_state())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(_config(save_freq=5, steps=40, **changes)))
    result = apd.optimize(tmp_path / "c.yaml", out=tmp_path / "out", progress=False)
    assert isinstance(result, Decomposition)
    assert capsys.readouterr().out == ""
    assert [row["step"] for row in result.history] == list(range(0, 41, 4))
    assert result.history[-1]["total_loss"] < result.history[0]["total_loss"]
    assert result.history[0]["grad_norm"] > 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    own = {"tms.pth", "tms_train_config.yaml"}
    if kind == "mlp":
        own = {"resid_mlp.pth", "resid_mlp_train_config.yaml", "label_coeffs.json"}
    assert names == {"final_config.yaml", *own, *(f"spd_model_{n}.pth" for n in range(5, 41, 5))}
    components = apd.load_components(tmp_path / "out" / "spd_model_40.pth")
    for name in components.multiplicity:
        for a, b in zip(components.factors(name), result.model.components.factors(name), strict=True):
            assert torch.equal(a, b)
    again = apd.optimize(tmp_path / "out" / "final_config.yaml", progress=False)  # its target lies beside it
    assert again is not None
    assert again.history == result.history
    with pytest.raises(FileExistsError, match="out must be a new directory"):
        apd.optimize(tmp_path / "c.yaml", out=tmp_path / "out", progress=False)


def test_optimize_prints_as_the_research_code_does(tmp_path, capsys):
    _write(tmp_path, "tms", _tms_state())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(_config(steps=4)))
    apd.optimize(tmp_path / "c.yaml")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if line[0].isalpha()][:6] == [
        "Step 0", "Total loss", "lr", "param_match_loss", "out_recon_loss", "topk_recon_loss",
    ]  # fmt: skip


@pytest.mark.parametrize("generation", ["exactly_two_active", "at_least_zero_active"])
def test_optimize_takes_other_data_a_loaded_target_and_plots(tmp_path, generation):
    path = _write(tmp_path, "tms", _tms_state())
    config = apd.Config(**_config(steps=3, image_freq=2, task_config={**TASK, "data_generation_type": generation}))
    calls = []

    def plot(**arguments: Any) -> dict[str, Any]:
        calls.append((arguments["step"], tuple(arguments["topk_mask"].shape), tuple(arguments["batch"].shape)))
        return {}

    target = apd.load_target(path)
    apd.optimize(config, target_model=target, plot_results_fn=plot, progress=False)
    given = apd.optimize(
        config=config, target_model=target, dataloader=[torch.rand(8, 2, 5)], plot_results_fn=plot, progress=False
    )
    assert isinstance(given, Decomposition)
    assert calls == [(0, (40, 2, 6), (40, 2, 5)), (2, (40, 2, 6), (40, 2, 5)), (0, (8, 2, 6), (8, 2, 5)),
                     (2, (8, 2, 6), (8, 2, 5))]  # fmt: skip


def test_optimize_refuses_data_that_is_empty(tmp_path):
    target = apd.load_target(_write(tmp_path, "tms", _tms_state()))
    with pytest.raises(ValueError, match="dataloader must yield batches, got none"):
        apd.optimize(_config(), target_model=target, dataloader=[], progress=False)


def test_loaded_components_run_on_a_loaded_target(tmp_path):
    target = apd.load_target(_write(tmp_path, "tms", _tms_state()))
    torch.save({"linear1.A": torch.randn(2, 6, 5, 3), "linear1.B": torch.randn(2, 6, 3, 2)}, tmp_path / "c.pth")
    components = apd.load_components(tmp_path / "c.pth")
    model = ComponentModel(target, find_sites(target, target.decomposed), components)
    scores = Decomposition(model, APD(topk=0.5)).score(torch.rand(2, 40, 5))
    assert scores["l0"].tolist() == [0.5, 0.5]


def test_a_loaded_target_decomposes_with_fastapd_itself(tmp_path):
    target = apd.load_target(_write(tmp_path, "tms", _tms_state(hidden=1)))
    result = decompose(target, [torch.rand(2, 16, 5)], target.decomposed, C=4, rank=2, steps=2)
    assert result.model.n_params == 5 * 2 * 2 + 4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c: apd.optimize(), "optimize: config must be given"),
        (lambda c: apd.optimize(torch.nn.Linear(1, 1), c), "dataloader, target_model, param_names must be given"),
        (lambda c: apd.optimize(c, target_model=torch.nn.Linear(1, 1)), "target_model must be from load_target"),
        (lambda c: apd.optimize({**c, "exact_topk": True}, progress=False), "exact_topk needs batch_topk and one inst"),
        (lambda c: apd.optimize({**c, "task_config": {**MLP_TASK, "pretrained_model_path": "tms.pth"}}, progress=False),
         "task_config.task_name must be 'tms' for this target"),
        (lambda c: apd.optimize({**c, "task_config": {**TASK, "train_bias": True}}), "train_bias must be false"),
    ],
)  # fmt: skip
def test_optimize_refuses(tmp_path, monkeypatch, call, said):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, "tms", _tms_state())
    with pytest.raises((ValueError, NotImplementedError), match=said):
        call(_config())


# -------------------------------------------------------------------------------------------- beside the research code


@pytest.mark.parametrize("generation", ["at_least_zero_active", "exactly_one_active", "synced"])
@pytest.mark.parametrize("kind", ["tms", "mlp"])
def test_optimize_alone_gives_what_the_research_codes_script_gives(spd, tmp_path, kind, generation):
    """The script's own steps: seed, load the target, initialise the components, copy what is fixed, train."""
    synced = [[0, 1], [3, 4]] if generation == "synced" else None
    generation = generation.replace("synced", "at_least_zero_active")
    path = _write(tmp_path, kind, _tms_state(hidden=1) if kind == "tms" else _mlp_state(), synced=synced)
    task = {**(TASK if kind == "tms" else MLP_TASK), "data_generation_type": generation}
    values = _config(print_freq=1, task_config={**task, "pretrained_model_path": str(path)}, m=None)
    values |= {"lr": 1e-2, "schatten_coeff": 0.7, "topk_recon_coeff": 1.0}
    config = spd.Config(**copy.deepcopy(values))
    spd.set_seed(config.seed)
    if kind == "tms":
        target, _ = spd.TMSModel.from_pretrained(path)
        model = spd.TMSSPDModel(
            spd.TMSSPDModelConfig(**target.config.model_dump(mode="json"), C=config.C, m=config.m, bias_val=0.0)
        )
        fixed = ["b_final"]
        data = spd.SparseFeatureDataset(2, 5, 0.3, "cpu", generation, synced_inputs=synced)
        names = ["linear1", "linear2", "hidden_layers.0"]
    else:
        target, *_ = spd.ResidualMLPModel.from_pretrained(path)
        sizes = target.config.model_dump(mode="json") | {"init_scale": 2.0, "C": config.C, "m": config.m}
        model = spd.ResidualMLPSPDModel(spd.ResidualMLPSPDConfig(**sizes))
        fixed = [name for name, _ in model.named_parameters() if "bias" in name or name.startswith("W_")]
        data = spd.modules["experiments.resid_mlp.resid_mlp_dataset"].ResidualMLPDataset(
            1, 6, 0.3, "cpu", calc_labels=False, data_generation_type=generation, synced_inputs=synced
        )
        names = [f"layers.{i}.{n}" for i in (0, 1) for n in ("mlp_in", "mlp_out")]
    for name in fixed:
        model.get_parameter(name).data.copy_(target.get_parameter(name).data)
        model.get_parameter(name).requires_grad = False
    spd.optimize(
        model=model, config=config, device="cpu", target_model=target, param_names=names,
        dataloader=spd.DatasetGeneratedDataLoader(data, batch_size=config.batch_size), out_dir=tmp_path,
    )  # fmt: skip
    result = apd.optimize(apd.Config(**values), out=tmp_path / "ours", progress=False)
    assert result is not None
    theirs = torch.load(tmp_path / "spd_model_12.pth", weights_only=True)
    ours = torch.load(tmp_path / "ours" / "spd_model_12.pth", weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)
    model.load_state_dict(ours)  # their model takes our file
    if kind == "mlp":  # the toy model's from_pretrained does not take the files of its own commit
        spd.ResidualMLPSPDModel.from_pretrained(tmp_path / "ours" / "spd_model_12.pth")


def test_optimize_takes_the_research_codes_models_and_config(spd):
    model, target = spd.tms()
    other = copy.deepcopy(model)
    config = spd.config("tms", topk=1.3, topk_recon_coeff=1.0, schatten_coeff=0.7, schatten_pnorm=0.9, steps=5)
    for trained, optimize in ((model, spd.optimize), (other, apd.optimize)):
        torch.manual_seed(0)
        found = optimize(
            model=trained, config=config, device="cpu", target_model=target, param_names=["linear1", "linear2"],
            dataloader=spd.loader("tms", 2, 32, "at_least_zero_active"), plot_results_fn=None, out_dir=None,
        )  # fmt: skip
        assert found is None
    torch.testing.assert_close(other.linear1.A, model.linear1.A, rtol=1e-4, atol=1e-6)
    assert spd.modules["run_spd"].optimize.__module__ == "spd.run_spd"  # nothing stays patched


def test_config_has_the_research_codes_keys_and_defaults(spd):
    theirs, ours = spd.Config.model_fields, apd.Config.model_fields
    assert list(ours) == list(theirs)
    for name, field in theirs.items():
        assert ours[name].default == field.default, name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = _config(lr=1e-2, schatten_coeff=0.7, topk_recon_coeff=1.0)
        dumped = spd.Config(**copy.deepcopy(values)).model_dump(mode="json")
        assert apd.Config(**dumped).model_dump(mode="json") == dumped
    folder = Path(spd.modules["run_spd"].__file__).parent / "experiments"
    files = [path for path in folder.glob("*/*_config.yaml") if "sweep" not in path.name]
    for path in files:
        assert apd.Config.from_yaml(path).C == spd.Config(**yaml.safe_load(path.read_text())).C
