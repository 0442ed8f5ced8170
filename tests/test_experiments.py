"""The published experiments: settings, targets, the check of a result, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastapd import config as configs
from fastapd import metrics
from fastapd._rundir import load_metadata, load_tensors, read_metrics
from fastapd.components import Components
from fastapd.config import ConfigError, ResidualMLPTarget, RunConfig
from fastapd.decomposition import Decomposition
from fastapd.experiments import family, get, registered, tms
from fastapd.experiments._run import Outcome, run_experiment, self_check
from fastapd.model import ComponentModel, find_sites

TIE = {"linear2": "linear1"}


def _small(name: str = "tms_5-2", target: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    values = get(name).model_dump()
    values |= {"n_instances": 2, "steps": 30, "batch": 32, "log_every": 10, "eval_batch": 256, "device": "cpu"}
    values["target"] |= {"steps": 50, "batch": 64} | (target or {})
    return configs.parse(values | changes)


# ---- settings


NOT_IN_THE_PAPER = {
    "distil_from_target": False,
    "attribution_model": "target",
    "attribution_norm": False,
    "attribution_probes": None,
    "attribution_refined": None,
    "schatten": "factored",
    "lp_sparsity": 0.0,
    "lp_p": 0.9,
    "distance": "mse",
    "reference_exact_count": False,
}
"""What the method has besides and these experiments do not use."""

PAPER = {
    "tms_5-2": {
        "experiment": "tms_5-2",
        "seed": 0,
        "n_instances": 12,
        "n_components": 5,
        "rank": 3,
        "steps": 20_000,
        "batch": 2048,
        "init_scale": 1.0,
        "optimiser": {"lr": 3e-2, "schedule": "constant", "warmup": 0.05, "halflife": None},
        "method": {
            "topk": 0.211,
            "selection": "batch",
            "attribution": "gradient",
            "faithfulness": 1.0,
            "minimality": 1.0,
            "simplicity": 0.7,
            "p": 1.0,
            "output_reconstruction": 0.0,
            "activation_reconstruction": 0.0,
            "unit_norm": False,
            "eps": 1e-16,
            **NOT_IN_THE_PAPER,
        },
        "target": {
            "family": "tms",
            "n_features": 5,
            "n_hidden": 2,
            "feature_probability": 0.05,
            "steps": 5000,
            "batch": 1024,
            "lr": 5e-3,
        },
        "log_every": 100,
        "eval_batch": 4096,
        "device": "auto",
        "dtype": "float32",
        "cuda_graph": False,
    },
    "tms_40-10": {
        "experiment": "tms_40-10",
        "seed": 0,
        "n_instances": 3,
        "n_components": 50,
        "rank": 11,
        "steps": 20_000,
        "batch": 2048,
        "init_scale": 1.0,
        "optimiser": {"lr": 1e-3, "schedule": "cosine", "warmup": 0.05, "halflife": None},
        "method": {
            "topk": 1.0,
            "selection": "batch",
            "attribution": "gradient",
            "faithfulness": 1.0,
            "minimality": 10.0,
            "simplicity": 20.0,
            "p": 0.9,
            "output_reconstruction": 0.0,
            "activation_reconstruction": 0.0,
            "unit_norm": False,
            "eps": 1e-16,
            **NOT_IN_THE_PAPER,
        },
        "target": {
            "family": "tms",
            "n_features": 40,
            "n_hidden": 10,
            "feature_probability": 0.05,
            "steps": 2000,
            "batch": 2048,
            "lr": 5e-3,
        },
        "log_every": 100,
        "eval_batch": 4096,
        "device": "auto",
        "dtype": "float32",
        "cuda_graph": False,
    },
}


def test_experiments_are_the_papers():
    assert {name: config.model_dump() for name, config in registered().items()} == PAPER
    assert tms.PUBLISHED == {"tms_5-2": (0.998, 0.893), "tms_40-10": (0.996, 0.935)}
    assert all(get(name) == config for name, config in registered().items())


@pytest.mark.parametrize(
    "name, hint",
    [("tms_5_2", "; did you mean tms_5-2?"), ("tms40-10", "; did you mean tms_40-10?"), ("", ""), ("mnist", "")],
)
def test_experiments_unknown_name_is_refused_with_a_suggestion(name, hint):
    with pytest.raises(ConfigError) as caught:
        get(name)
    assert str(caught.value) == f"config: experiment must be one of tms_5-2, tms_40-10, got {name!r}{hint}"


def test_experiments_family_without_an_experiment_is_refused(tmp_path):
    target = {"n_features": 5, "d_embed": 7, "d_mlp": 3, "n_layers": 1, "feature_probability": 0.1}
    config = get("tms_5-2").model_copy(update={"target": ResidualMLPTarget(**target, steps=1, batch=1, lr=1e-3)})
    with pytest.raises(ConfigError, match=r"^config: target\.family must be one of tms, got residual_mlp$"):
        family(config)
    with pytest.raises(ConfigError):
        run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- the target and its data


def test_tms_target_is_deterministic_in_the_seed():
    (first, known), (again, known_again) = (tms.train_target(_small(seed=3)) for _ in range(2))
    other, _ = tms.train_target(_small(seed=4))
    for name, t in first.state_dict().items():
        assert torch.equal(t, again.state_dict()[name])
        assert not torch.equal(t, other.state_dict()[name])
    assert known == known_again
    assert not any(p.requires_grad for p in first.parameters())


def test_tms_target_starts_from_the_seed_too():
    """With next to no training, what differs between seeds is the start."""
    first, again, other = (
        tms.train_target(_small(seed=seed, target={"steps": 1, "lr": 1e-9}))[0].linear1.weight for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and (first - other).abs().max() > 0.1
    expected = math.sqrt(2 / ((5 + 300) * 2))  # Xavier over [n_instances, n_features, n_hidden]
    wide = tms.train_target(_small(n_instances=300, target={"steps": 1, "lr": 1e-9, "batch": 1}))[0].linear1.weight
    assert abs(wide.std() / expected - 1) < 5 / math.sqrt(2 * wide.numel())


def test_tms_target_learns_every_feature():
    few = {"n_features": 3, "batch": 512}  # five features in the plane need thousands of steps
    target, known = tms.train_target(_small(target=few | {"steps": 500}, n_instances=3))
    norms = target.linear1.weight.norm(dim=-1)
    assert norms.shape == (3, 3) and norms.min() > 0.6 and norms.max() < 2
    assert known["smallest_feature_norm"] == norms.min(-1).values.tolist()
    _, before = tms.train_target(_small(target=few | {"steps": 1}, n_instances=3))
    assert len(known["loss"]) == 3 and max(known["loss"]) < 0.3 * min(before["loss"])


def test_tms_target_has_the_runs_dtype():
    target, _ = tms.train_target(_small(dtype="float64", target={"steps": 1}))
    assert {t.dtype for t in target.state_dict().values()} == {torch.float64}


def test_tms_target_computes_relu_of_the_gram_matrix():
    target = tms.TMS(2, 5, 3)
    torch.nn.init.normal_(target.linear1.weight)
    torch.nn.init.normal_(target.b_final)
    x, W = torch.rand(2, 4, 5), target.linear1.weight
    torch.testing.assert_close(target(x), (x @ W @ W.mT + target.b_final).relu())


def test_tms_data_are_sparse_and_independent_by_purpose():
    config = _small(target={"feature_probability": 0.2})
    x = next(tms.data(config, "decomposition", 2000))
    assert x.shape == (2, 2000, 5) and x.min() == 0 and x.max() < 1
    share = (x > 0).double().mean()
    assert abs(share - 0.2) < 5 * math.sqrt(0.2 * 0.8 / x.numel())
    assert abs(x[x > 0].mean() - 0.5) < 5 * math.sqrt(1 / 12 / int((x > 0).sum()))
    assert not torch.equal(x[0], x[1])
    assert torch.equal(x, next(tms.data(config, "decomposition", 2000)))
    assert not torch.equal(x, next(tms.data(config, "evaluation", 2000)))
    assert not torch.equal(
        x, next(tms.data(_small(seed=1, target={"feature_probability": 0.2}), "decomposition", 2000))
    )


# ---- the check of a result


def _pentagons(n_instances: int = 2) -> tms.TMS:
    """Five unit directions in the plane, 72 degrees apart, each instance turned by another angle."""
    target = tms.TMS(n_instances, 5, 2)
    angle = torch.arange(5) * (2 * math.pi / 5) + torch.arange(n_instances)[:, None]
    with torch.no_grad():
        target.linear1.weight.copy_(torch.stack([angle.cos(), angle.sin()], -1))
        target.b_final.fill_(-0.35)
    return target.requires_grad_(False)


def _one_feature_each(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A_c = e_c, B_c = W_c: component c is feature c alone."""
    n, F, _ = weight.shape
    A = torch.eye(F).view(1, F, F, 1).expand(n, F, F, 1)
    return torch.cat([A, torch.zeros_like(A)], -1), torch.stack([weight, torch.zeros_like(weight)], 2)


def _check(factors: tuple[Tensor, Tensor], config: RunConfig):
    target = _pentagons(config.n_instances)
    sites = find_sites(target, tms.LAYERS)
    model = ComponentModel(target, sites, Components.from_factors({"linear1": factors}, TIE))
    shapes = {site.name: site.shape for site in sites}
    initial = Components(shapes, 5, 2, config.n_instances, generator=torch.Generator().manual_seed(0))
    return tms.check(config, Decomposition(model, config.method), initial)


def test_check_of_one_component_a_feature_says_recovered():
    config = _small(rank=2)
    check = _check(_one_feature_each(_pentagons().linear1.weight), config)
    assert (check.recovered, check.n) == (2, 2)
    assert check.values["recovered"] == [True, True]
    assert check.values["unique"] == [5, 5] and check.values["dead"] == [0, 0]
    for name, expected in (("mmcs", 1), ("ml2r", 1), ("leak", 0), ("faithfulness_error", 0), ("full_mse", 0)):
        assert check.values[name] == pytest.approx([expected] * 2, abs=1e-6), name
    assert check.values["l0"] == pytest.approx([int(0.211 * 256) / 256] * 2)
    labels = [row[0] for row in check.rows]
    assert labels == [
        "random init (median)", "SVD of W (median)", "W/5, 5 times (median)",
        "fastapd (median of 2)", labels[4], labels[5], "published (APD paper)",
    ]  # fmt: skip
    assert labels[4].startswith("fastapd, best (instance ") and labels[5].startswith("fastapd, worst (instance ")
    assert {len(row) for row in check.rows} == {len(check.columns)}
    row = dict(zip(check.columns, check.rows[3], strict=True))
    assert (row["MMCS"], row["ML2R"], row["leak"], row["unique"]) == ("1.000", "1.000", "0.000", "5/5")
    assert check.rows[-1][1:3] == ["0.998", "0.893"]
    assert [name for name, *_ in check.published] == ["MMCS", "ML2R"]
    assert set(check.figures) == {"polygons", "recovery"}


def test_check_of_copies_says_not_recovered():
    check = _check(metrics.copies_factors(_pentagons().linear1.weight, 5, 2), _small(rank=2))
    assert (check.recovered, check.n) == (0, 2)
    assert check.values["mmcs"] == pytest.approx([1, 1])  # the metric that copies fool
    assert check.values["unique"] == [1, 1]
    assert check.values["leak"] == pytest.approx([0.8, 0.8])
    # as a result and as a baseline, the copies get the same row
    rows = {row[0]: row[1:6] for row in check.rows}
    assert rows["W/5, 5 times (median)"] == rows["fastapd (median of 2)"]


def test_check_counts_instances_one_by_one():
    weight = _pentagons().linear1.weight
    pairs = zip(_one_feature_each(weight), metrics.copies_factors(weight, 5, 2), strict=True)
    check = _check(tuple(torch.stack([good[0], bad[1]]) for good, bad in pairs), _small(rank=2))
    assert (check.recovered, check.n, check.values["recovered"]) == (1, 2, [True, False])
    assert [row[0] for row in check.rows[4:6]] == ["fastapd, best (instance 0)", "fastapd, worst (instance 1)"]
    assert check.rows[4][4] == "5/5" and check.rows[5][4] == "1/5"


def test_check_rule_states_the_thresholds_in_force():
    limits = metrics.RECOVERED
    for words in (f"MMCS > {limits.mmcs:g}", f"leak < {limits.leak:g}", f"ML2R >= {limits.ml2r:g}",
                  f"faithfulness error <= {limits.faithfulness_error:g}"):  # fmt: skip
        assert words in tms.RULE


def test_check_evaluates_on_samples_that_training_never_saw():
    config = _small(rank=2)
    check = _check(_one_feature_each(_pentagons().linear1.weight), config)
    x = check.tensors["attributions"]["x"]
    assert x.shape == (2, 256, 5)
    assert torch.equal(x, next(tms.data(config, "evaluation", 256)))
    # one active feature a sample: its own component has nearly all the attribution
    one_hot = check.tensors["one_hot"]["attributions"]
    assert torch.equal(one_hot.argmax(-1), torch.arange(5).expand(2, 5))


# ---- the self-check of backends


def _self_check(config: RunConfig | None = None) -> str:
    config = config or _small(rank=2)
    target = _pentagons().to(getattr(torch, config.dtype))
    sites = find_sites(target, tms.LAYERS)
    dtype = sites[0].weight.dtype
    components = Components({s.name: s.shape for s in sites}, 5, 2, 2, dtype=dtype)
    return self_check(ComponentModel(target, sites, components), config, torch.rand(2, 32, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_self_check_of_working_backends_says_how_near_they_are(dtype):
    assert "attributions" in _self_check(_small(rank=2, dtype=dtype))


def _scaled(right, *args):
    out = right(*args)
    return out * 1.001


def _nan(right, *args):
    return right(*args) * math.nan


def _scaled_pair(right, *args):
    y, u = right(*args)
    return y * 1.001, u


def _first_pairs(right, scores, n_pairs):
    ramp = torch.arange(scores[0].numel(), 0, -1, dtype=scores.dtype).view(scores.shape[1:]).expand_as(scores)
    return right(ramp, n_pairs)


@pytest.mark.parametrize(
    "op, wrong",
    [
        ("attribution_tangent", _scaled),
        ("attribution_tangent", _nan),
        ("component_forward_selected", _scaled_pair),
        ("batch_topk", _first_pairs),
    ],
    ids=["attributions-scaled", "attributions-nan", "forward-scaled", "selection-wrong"],
)
def test_self_check_refuses_a_backend_that_is_wrong(plant, op, wrong):
    if _native_missing():
        pytest.skip("without the native module there is nothing to compare")
    plant(op, "cpu", wrong)
    with pytest.raises(RuntimeError, match=r"^self-check: backends must agree with the reference"):
        _self_check()


def _native_missing() -> bool:
    from fastapd import _native

    return _native.load("_C").module is None


# ---- a whole run


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[Outcome, RunConfig, list[str]]:
    config, said = _small(), []
    done = run_experiment(config, tmp_path_factory.mktemp("runs") / "run", echo=said.append)
    return done, config, said


def test_run_experiment_leaves_every_file(outcome):
    done, config, said = outcome
    assert {str(p.relative_to(done.directory)) for p in done.directory.rglob("*") if p.is_file()} == {
        "fastapd.yaml", "env.json", "status.json", "metrics.jsonl", "metrics.csv", "result.json", "report.html",
        "target.safetensors", "components.safetensors", "initial.safetensors",
        "eval/attributions.safetensors", "eval/one_hot.safetensors", "eval/recovery.safetensors",
        "figures/polygons.png", "figures/recovery.png", "figures/losses.png",
    }  # fmt: skip
    assert configs.load(done.directory / "fastapd.yaml") == config
    status = json.loads((done.directory / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("finished", 30, 30)
    assert status["message"] == f"recovered {done.check.recovered} of 2 instances"
    assert json.loads((done.directory / "env.json").read_text())["torch"] == torch.__version__
    for name in ("polygons", "recovery", "losses"):
        assert (done.directory / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (done.directory / "report.html").read_text()
    assert "tms_5-2" in page and "W/5, 5 times (median)" in page and "0.893" in page
    assert any(line.startswith("self-check ") for line in said)


def test_run_experiment_metrics_agree_in_both_files(outcome):
    rows = read_metrics(outcome[0].directory)
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    assert rows == outcome[0].decomposition.history
    with (outcome[0].directory / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["total"]) for row in table] == [row["total"] for row in rows]


def test_run_experiment_numbers_follow_from_the_saved_tensors(outcome):
    """Everything in result.json again, from files alone and without the model."""
    path: Path = outcome[0].directory
    held = json.loads((path / "result.json").read_text())
    result, count = held["instances"], held["recovered"]
    target, held = load_tensors(path / "target.safetensors"), load_tensors(path / "components.safetensors")
    W, b, parts = target["linear1.weight"], target["b_final"], held["linear1.A"] @ held["linear1.B"]
    assert load_metadata(path / "components.safetensors")["ties"] == "linear2=linear1"
    found = metrics.feature_recovery(W, parts)
    for name in ("mmcs", "ml2r", "leak", "faithfulness_error"):
        assert result[name] == pytest.approx(getattr(found, name).tolist(), rel=1e-5, abs=1e-7), name
    for name in ("unique", "dead"):
        assert result[name] == getattr(found, name).tolist()
    assert result["recovered"] == metrics.recovered(found).tolist()
    assert count == sum(result["recovered"])

    kept = load_tensors(path / "eval" / "attributions.safetensors")
    x, mask = kept["x"], kept["mask"].float()

    def run(weights: Tensor) -> Tensor:
        """With the components of each sample, weights [I, b, C]."""
        hidden = torch.einsum("nbf,nbc,ncfh->nbh", x, weights, parts)
        return (torch.einsum("nbh,nbc,ncfh->nbf", hidden, weights, parts) + b).relu()

    wanted = (x @ W @ W.mT + b).relu()
    for name, weights in (("topk_mse", mask), ("full_mse", torch.ones_like(mask))):
        assert result[name] == pytest.approx((run(weights) - wanted).square().mean((1, 2)).tolist(), rel=1e-4)
    assert result["l0"] == mask.sum((1, 2)).div(256).tolist()
    assert result["alive"] == mask.any(1).sum(-1).tolist()
    recovery = load_tensors(path / "eval" / "recovery.safetensors")
    torch.testing.assert_close(recovery["cosine"], metrics.mmcs_ml2r(W, parts).cosine, rtol=1e-5, atol=1e-7)
    assert torch.equal(recovery["assignment"], found.assignment)


def test_run_experiment_baselines_follow_from_the_saved_tensors(outcome):
    path: Path = outcome[0].directory
    baselines = json.loads((path / "result.json").read_text())["instances"]["baselines"]
    W, start = load_tensors(path / "target.safetensors")["linear1.weight"], load_tensors(path / "initial.safetensors")
    parts = {
        "random init": start["linear1.A"] @ start["linear1.B"],
        "SVD of W": metrics.svd_parts(W, 5),
        "W/5, 5 times": metrics.copies_parts(W, 5),
    }
    assert set(baselines) == set(parts)
    for name, P in parts.items():
        found = metrics.feature_recovery(W, P)
        for key, values in baselines[name].items():
            assert values == pytest.approx(getattr(found, key).tolist(), rel=1e-4, abs=1e-5), (name, key)
    trained = load_tensors(path / "components.safetensors")
    assert not torch.equal(trained["linear1.A"], start["linear1.A"])


def test_run_experiment_is_reproducible(outcome, tmp_path):
    done, config, _ = outcome
    again = run_experiment(config, tmp_path / "run")
    for name in ("target", "initial", "components"):
        first, second = (load_tensors(d / f"{name}.safetensors") for d in (done.directory, again.directory))
        assert all(torch.equal(t, second[key]) for key, t in first.items()), name
    first, second = (json.loads((d / "result.json").read_text()) for d in (done.directory, again.directory))
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_run_experiment_of_more_features_draws_no_polygons(tmp_path):
    config = _small("tms_40-10", target={"n_features": 6, "n_hidden": 3, "steps": 5}, n_components=4, rank=2,
                    n_instances=1, steps=2, experiment="six")  # fmt: skip
    done = run_experiment(config, tmp_path / "run")
    assert {p.name for p in (done.directory / "figures").iterdir()} == {"recovery.png", "losses.png"}
    assert done.check.recovered == 0 and done.check.published == []  # 4 components cannot be 6 features
    assert not any("published" in row[0] for row in done.check.rows)


def test_run_experiment_refuses_a_directory_in_use(outcome):
    done, config, _ = outcome
    before = (done.directory / "status.json").read_text()
    with pytest.raises(FileExistsError):
        run_experiment(config, done.directory)
    assert (done.directory / "status.json").read_text() == before


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_run_experiment_hands_on_whether_steps_are_a_graph(tmp_path, monkeypatch, cuda_graph):
    found = {}

    def stop(*args, **settings):
        found.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastapd.experiments._run.decompose", stop)
    monkeypatch.setattr("fastapd.experiments._run._device", lambda config: torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(_small(device="auto", cuda_graph=cuda_graph), tmp_path / "run")
    assert found["cuda_graph"] is cuda_graph


@pytest.mark.parametrize(
    "error, state", [(KeyboardInterrupt(), "interrupted"), (RuntimeError("no"), "failed")], ids=["interrupt", "error"]
)
def test_run_experiment_stopped_while_training_the_target_says_so(tmp_path, monkeypatch, error, state):
    def stop(config, progress=False):
        raise error

    monkeypatch.setattr(tms, "train_target", stop)
    with pytest.raises(type(error)):
        run_experiment(_small(), tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == (state, 0) and "training the target" in status["message"]


def test_run_experiment_stopped_while_writing_the_report_says_so(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tms, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(_small(), tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("interrupted", 30, 30)
    assert "writing the report" in status["message"]
    assert (tmp_path / "run" / "components.safetensors").exists()


def test_run_experiment_stopped_while_decomposing_says_so(tmp_path, monkeypatch):
    def data(config, purpose, batch, real=tms.data):
        for index, x in enumerate(real(config, purpose, batch)):
            if purpose == "decomposition" and index == 4:
                raise KeyboardInterrupt
            yield x

    monkeypatch.setattr(tms, "data", data)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(_small(), tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("interrupted", 4)
    assert (tmp_path / "run" / "components.safetensors").exists()
