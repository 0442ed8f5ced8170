"""The arrays of tests/golden (its README says how they were made) are reproduced by every backend.

Compared by norm, ‖x − x64‖ / ‖x64‖ against the float64 arrays: 1e-9 in float64, 1e-5 in float32; masks are equal.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastapd import losses, ops, use_backend
from fastapd.attributions import (
    ablation_attributions,
    activation_attributions,
    gradient_attributions,
    output_gradients,
)
from fastapd.components import Components
from fastapd.config import APD, Optimiser
from fastapd.evaluation import Step, evaluate, select
from fastapd.experiments.residual_mlp import ResidualMLP
from fastapd.experiments.tms import TMS, sparse_features
from fastapd.metrics import mmcs_ml2r
from fastapd.model import ComponentModel, find_sites
from fastapd.training import learning_rate, make_optimiser, train_step

_spec = importlib.util.spec_from_file_location("golden_arrays", Path(__file__).with_name("golden_arrays.py"))
assert _spec is not None
assert _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
Arrays, TOLERANCE, batch_second = golden.Arrays, golden.TOLERANCE, golden.batch_second
BACKENDS = {"reference": ("reference",), "cpu": ("cpu", "reference")}

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def residual_mlp(z: golden.Arrays, prefix: str = "target/", act: str = "relu", output_act: bool = False) -> ResidualMLP:
    names = z.names(prefix)
    n_layers = len([n for n in names if n.endswith("mlp_in.weight")])
    W_E, W_in = z[prefix + "W_E"], z[prefix + "layers.0.mlp_in.weight"]
    bias = any("bias" in n for n in names)
    target = ResidualMLP(*W_E.shape, W_in.shape[-1], n_layers, act, bias, output_act).to(z.dtype)
    state = {n: z[prefix + n].unsqueeze(1) if "bias" in n else z[prefix + n] for n in names}
    target.load_state_dict(state)
    return target.requires_grad_(False)


def tms(z: golden.Arrays) -> TMS:
    target = TMS(*z["target/linear1.weight"].shape).to(z.dtype)
    target.load_state_dict({"linear1.weight": z["target/linear1.weight"], "b_final": z["target/b_final"].unsqueeze(1)})
    return target.requires_grad_(False)


def components(z: golden.Arrays, prefix: str, ties: dict[str, str] | None = None) -> Components:
    names = [n[: -len(".A")] for n in z.names(prefix) if n.endswith(".A")]
    return Components.from_factors({n: (z[f"{prefix}{n}.A"], z[f"{prefix}{n}.B"]) for n in names}, ties)


TIE = {"linear2": "linear1"}
MODELS = {
    "attr_resid_1layer": (lambda z: residual_mlp(z), ["layers.*.mlp_*"], {}),
    "attr_resid_2layer": (lambda z: residual_mlp(z), ["layers.*.mlp_*"], {}),
    "attr_resid_2layer_bias_gelu_outact_inst3": (
        lambda z: residual_mlp(z, act="gelu", output_act=True),
        ["layers.*.mlp_*"],
        {},
    ),
    "attr_tms_tied": (tms, ["linear*"], TIE),
}


@backends
@dtypes
@pytest.mark.parametrize("name", MODELS)
def test_attributions_reproduce_the_golden_arrays(name, dtype, backend):
    z = Arrays(name, dtype)
    build, patterns, ties = MODELS[name]
    target = build(z)
    model = ComponentModel(target, find_sites(target, patterns), components(z, "spd/", ties))
    x = batch_second(z["batch"])
    with use_backend(*backend):
        record = model.record_target(x, differentiable=True)
        z.assert_close(batch_second(record.output), "f64/target_out")
        for site, g in output_gradients(record).items():
            z.assert_close(batch_second(record.inputs[site]), f"f64/pre/{site}")
            z.assert_close(batch_second(record.outputs[site]), f"f64/post/{site}")
            z.assert_close(g.permute(2, 1, 0, 3), f"f64/jac/{site}")
        attributions = gradient_attributions(model, model.record_target(x, differentiable=True))
        z.assert_close(batch_second(attributions), "f64/grad_attributions")
        full = model.forward(x)
        z.assert_close(batch_second(full.output), "f64/spd_out")
        z.assert_close(batch_second(activation_attributions(model.components, full)), "f64/activation_attributions")
        selection = ops.batch_topk(attributions, int(1.5 * x.shape[1]))
        z.assert_mask(batch_second(selection.mask), "f64/batch_topk_1.5_mask")
        z.assert_close(batch_second(model.forward(x, selection).output), "f64/spd_out_topk")
        ablation = ablation_attributions(model, x, full.output.detach())
        z.assert_close(batch_second(ablation), "f64/ablation_attributions")


@backends
@dtypes
@pytest.mark.parametrize("name", MODELS)
def test_attribution_gradients_reproduce_the_golden_arrays(name, dtype, backend):
    z = Arrays(name, dtype)
    build, patterns, ties = MODELS[name]
    target = build(z)
    model = ComponentModel(target, find_sites(target, patterns), components(z, "spd/", ties))
    record = model.record_target(batch_second(z["batch"]), differentiable=True)
    gradients = output_gradients(record)
    names = [site.name for site in model.sites]
    factors = [model.components.factors(n) for n in names]
    with use_backend(*backend):
        attributions = ops.attribution_reduce(
            [record.inputs[n] for n in names],
            [gradients[n] for n in names],
            [A for A, _ in factors],
            [B for _, B in factors],
        )
        attributions.sum().backward()
    for layer in model.components.multiplicity:
        key = layer.replace(".", "/")
        z.assert_close(model.components.At[key].grad.mT, f"f64/dsumattr/{layer}.A")
        z.assert_close(model.components.B[key].grad, f"f64/dsumattr/{layer}.B")


@backends
@dtypes
def test_attributions_without_instances_reproduce_the_golden_arrays(dtype, backend):
    z = Arrays("attr_no_instances", dtype)
    target = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 4, bias=False), nn.Sigmoid()).to(dtype)
    target.load_state_dict({"0.weight": z["W1"].mT, "2.weight": z["W2"].mT})
    given = {n: (z[f"A{i}"].unsqueeze(0), z[f"B{i}"].unsqueeze(0)) for n, i in (("0", 1), ("2", 2))}
    model = ComponentModel(target, find_sites(target, ["0", "2"]), Components.from_factors(given))
    with use_backend(*backend):
        record = model.record_target(z["x"].unsqueeze(0), differentiable=True)
        z.assert_close(record.output.squeeze(0), "f64/out")
        z.assert_close(gradient_attributions(model, record).squeeze(0), "f64/grad_attributions")
        # this file's component activations were taken from the target's inputs of both layers
        z.assert_close(activation_attributions(model.components, record).squeeze(0), "f64/activation_attributions")


@backends
@dtypes
def test_masks_reproduce_the_golden_arrays(dtype, backend):
    z = Arrays("topk_mask", dtype)
    with use_backend(*backend):
        for k in ("0.211", "1.0", "1.28", "2.5"):
            K = int(float(k) * 12)
            z.assert_mask(ops.batch_topk(z["scores"], K).mask, f"mask_batch_k{k}")
            mask = ops.batch_topk(z["scores_inst"].transpose(0, 1), K).mask
            z.assert_mask(batch_second(mask), f"mask_inst_batch_k{k}")
        for k in (1, 3):
            z.assert_mask(ops.sample_topk(z["scores"], k).mask, f"mask_sample_k{k}")
            mask = ops.sample_topk(z["scores_inst"].transpose(0, 1), k).mask
            z.assert_mask(batch_second(mask), f"mask_inst_sample_k{k}")


@backends
@dtypes
@pytest.mark.parametrize("batch", [16, 100])
def test_exact_selection_reproduces_the_golden_arrays(batch, dtype, backend):
    z = Arrays("topk_mask", dtype)
    x, scores = batch_second(z[f"exact_batch_{batch}"]), batch_second(z[f"exact_scores_{batch}"])
    exact = APD(topk=1.0, selection="exact")
    with use_backend(*backend):
        as_reference = select(scores, exact.model_copy(update={"reference_exact_count": True}), x)
        ours = select(scores, exact, x)
    z.assert_mask(batch_second(as_reference.mask), f"exact_mask_{batch}")
    assert int(as_reference.mask.sum()) == int(z.file[f"exact_mask_count_{batch}"])
    assert int(ours.mask.sum()) == int(z.file[f"exact_nonzero_count_{batch}"])


@backends
@dtypes
def test_distillation_reproduces_the_golden_arrays(dtype, backend):
    z = Arrays("topk_mask", dtype)
    scores = z["scores"].unsqueeze(0)
    with use_backend(*backend):
        selection = select(scores[..., :-1], APD(topk=1.28, distil_from_target=True))
    step = Step({}, {}, scores, selection, 1)
    z.assert_mask(step.mask.squeeze(0), "distil_mask_batch_k1.28")
    assert step.counts[0, -1] == 12


@dtypes
@pytest.mark.parametrize("p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("axis", ["noinst", "inst"])
def test_lp_sparsity_reproduces_the_golden_arrays(axis, p, dtype):
    z = Arrays("lp_sparsity", dtype)
    given = z[f"{axis}/attributions"]
    attributions = (batch_second(given) if axis == "inst" else given.unsqueeze(0)).requires_grad_()
    weights = losses.lp_weights(attributions, int(z.file["d_model_out"]), p)
    loss = losses.lp_sparsity(weights)
    loss.mean().backward()
    shaped = batch_second if axis == "inst" else (lambda t: t.squeeze(0))
    z.assert_close(shaped(weights), f"{axis}/f64/p{p}/per_k")
    z.assert_close(loss if axis == "inst" else loss.squeeze(0), f"{axis}/f64/p{p}/loss")
    z.assert_close(shaped(attributions.grad), f"{axis}/f64/p{p}/dattr")


@backends
@dtypes
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("p", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("axis", ["noinst", "inst"])
def test_factored_schatten_reproduces_the_golden_arrays(axis, p, kind, dtype, backend):
    use_backend(*backend)
    z = Arrays("schatten", dtype)
    leaves = {key: z[f"{axis}/{key}"].requires_grad_() for key in ("A/l1", "B/l1", "A/l2", "B/l2")}
    mask = z[f"{axis}/{kind}_mask"]
    if axis == "inst":
        mask = batch_second(mask)
    mask.requires_grad_()
    batch = mask.shape[-2]
    total = torch.zeros((), dtype=dtype)
    for layer in ("l1", "l2"):
        A, B = leaves[f"A/{layer}"], leaves[f"B/{layer}"]
        if kind == "bool":
            total = total + ops.schatten_factored(A, B, mask.detach().sum(-2).long(), p, 1e-16, batch)
        else:
            total = total + ops.schatten_factored(A, B, mask, p, 1e-16)
    loss = total / (int(z.file["n_params"]) * batch)
    prefix = f"{axis}/f64/p{p}/{kind}/"
    z.assert_close(loss, prefix + "loss")
    loss.mean().backward()
    for key, leaf in leaves.items():
        z.assert_close(leaf.grad, f"{prefix}d{key}")
    if kind == "float":
        z.assert_close(batch_second(mask.grad) if axis == "inst" else mask.grad, prefix + "dmask")


@backends
@dtypes
@pytest.mark.parametrize("name", ["resid", "tms"])
def test_faithfulness_reproduces_the_golden_arrays(name, dtype, backend):
    z = Arrays("param_match", dtype)
    given = components(z, f"{name}/spd/", TIE if name == "tms" else None)
    weights = {n: z[f"{name}/target/{n}.weight"] for n in given.multiplicity}
    with use_backend(*backend):
        loss = losses.faithfulness(given, weights, int(z.file[f"{name}/n_params"]))
    z.assert_close(loss, f"{name}/f64/loss")
    loss.mean().backward()
    for layer in given.multiplicity:
        key = layer.replace(".", "/")
        z.assert_close(given.At[key].grad.mT, f"{name}/f64/d/{layer}.A")
        z.assert_close(given.B[key].grad, f"{name}/f64/d/{layer}.B")


@backends
@dtypes
@pytest.mark.parametrize("p", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("axis", ["noinst", "inst"])
def test_exact_schatten_reproduces_the_golden_arrays(axis, p, dtype, backend):
    z = Arrays("schatten", dtype)
    factors = [(z[f"{axis}/A/{layer}"], z[f"{axis}/B/{layer}"]) for layer in ("l1", "l2")]
    n_components = factors[0][0].shape[-3]
    for kind, op in (("true", ops.schatten), ("factor", ops.schatten_factored)):
        found = []
        for c in range(n_components):  # the file holds the sum of each component over both layers
            one = torch.zeros(factors[0][0].shape[:-2], dtype=torch.int64)
            one[..., c] = 1
            with use_backend(*backend):
                found.append(sum(op(A, B, one, p, eps=0.0) for A, B in factors))
        key = f"{axis}/{kind}_schatten_p{p}_per_component_f64"
        if kind == "true" and p < 0.9:
            # The file took svdvals of the products, min(d_in, d_out) = 5 values of rank 4: its fifth is rounding, some
            # 1e-16, whose p-th power is 1e-8. It bounds what can be asked of the file, not of the kernel.
            truth = z.file[key]
            error = np.linalg.norm(torch.stack(found, -1).double().numpy() - truth) / np.linalg.norm(truth)
            assert error <= max(TOLERANCE[dtype], 2 * 1e-16**p / truth.min())
        else:
            z.assert_close(torch.stack(found, -1), key)


@dtypes
@pytest.mark.parametrize("axis", ["noinst", "inst"])
def test_reconstructions_reproduce_the_golden_arrays(axis, dtype):
    z = Arrays("act_recon_and_recon_mse", dtype)

    def arrays(kind: str) -> dict[str, Tensor]:
        found = {n: z[f"{axis}/{kind}/{n}"] for n in ("l1", "l2")}
        return {n: batch_second(t) if axis == "inst" else t.unsqueeze(0) for n, t in found.items()}

    outputs, targets = arrays("layer"), arrays("target")
    found = losses.activation_reconstruction(outputs, targets, {n: lambda t: t for n in outputs})
    z.assert_close(found if axis == "inst" else found.squeeze(0), f"{axis}/f64/act_recon")
    found = losses.reconstruction(outputs["l2"], targets["l2"])
    z.assert_close(found if axis == "inst" else found.squeeze(0), f"{axis}/f64/recon_mse_l2")


@dtypes
def test_unit_norm_reproduces_the_golden_arrays(dtype):
    z = Arrays("unit_norm", dtype)
    A = z["A"]
    given = Components.from_factors({"layer": (A, torch.zeros(*A.shape[:2], A.shape[3], 2, dtype=dtype))})
    given.normalise_()
    z.assert_close(given.factors("layer")[0], "f64/A_unit")
    given.At["layer"].grad = z["grad"].mT.contiguous()
    given.tangent_gradients_()
    z.assert_close(given.At["layer"].grad.mT, "f64/grad_fixed")


@pytest.mark.parametrize("warmup", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential"])
def test_schedules_reproduce_the_golden_arrays(schedule, warmup):
    z = Arrays("lr_schedule", torch.float64)
    steps, halflife = int(z.file["steps"]), float(z.file["halflife"])
    settings = Optimiser(
        lr=float(z.file["lr"]),
        schedule=schedule,
        warmup=warmup,
        halflife=halflife if schedule == "exponential" else None,
    )
    found = torch.tensor([learning_rate(step, steps, settings) for step in range(steps + 1)], dtype=torch.float64)
    z.assert_close(found, f"{schedule}/warmup{warmup}")


@dtypes
def test_recovery_metrics_reproduce_the_golden_arrays(dtype):
    # The scalars in this file are float32 results, so no precision of ours can come closer than float32's rounding.
    z = Arrays("metrics_mmcs_ml2r", dtype)
    found = mmcs_ml2r(
        z["W_target_features_x_hidden"].unsqueeze(0), z["component_weights_C_features_hidden"].unsqueeze(0)
    )
    for name in ("mmcs", "ml2r"):
        assert abs(float(getattr(found, name)) / float(z.file[name]) - 1) < 1e-7
    assert np.array_equal(found.component.squeeze(0).numpy(), z.file["argmax_component"])


def test_data_reproduces_the_golden_arrays():
    z = Arrays("datagen_torch_cpu_seed123", torch.float32)
    for kind, low in (("sparse01", 0.0), ("resid", -1.0)):
        x = next(sparse_features(2, 8, 6, 0.3, torch.Generator().manual_seed(123), low))
        assert torch.equal(batch_second(x), z[f"{kind}/at_least_zero_active"])


TRAJECTORIES = {
    "traj_tms_topk": (
        APD(topk=1.0, minimality=1.0, simplicity=0.7, p=0.9),
        ["linear*"],
        TIE,
        None,
    ),
    "traj_resid2_topk": (
        APD(topk=1.28, minimality=1.0, simplicity=5.0, p=0.9, activation_reconstruction=1.0),
        ["layers.*.mlp_*"],
        {},
        ["layers.0.mlp_in", "layers.1.mlp_in"],
    ),
    "traj_resid2_topk_unitnorm": (
        APD(topk=1.28, minimality=1.0, simplicity=5.0, p=0.9, activation_reconstruction=1.0, unit_norm=True),
        ["layers.*.mlp_*"],
        {},
        ["layers.0.mlp_in", "layers.1.mlp_in"],
    ),
}
RESIDUAL = ["layers.*.mlp_*"]
TRAJECTORIES["traj_resid2_distil_sampletopk"] = (
    APD(
        topk=2.0,
        selection="sample",
        distil_from_target=True,
        minimality=1.0,
        simplicity=5.0,
        p=0.9,
        activation_reconstruction=1.0,
    ),
    RESIDUAL,
    {},
    ["layers.0.mlp_in", "layers.1.mlp_in"],
)
TRAJECTORIES["traj_tms_lp_unitnorm"] = (
    APD(
        topk=None,
        minimality=0.0,
        output_reconstruction=1.0,
        lp_sparsity=0.5,
        lp_p=0.9,
        simplicity=0.3,
        p=1.0,
        unit_norm=True,
    ),
    ["linear*"],
    TIE,
    None,
)
TERMS = {
    "param_match": "faithfulness",
    "topk_recon": "minimality",
    "act_recon": "activation_reconstruction",
    "schatten": "simplicity",
    "out_recon": "output_reconstruction",
}


@backends
@dtypes
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectories_reproduce_the_golden_arrays(name, dtype, backend):
    z = Arrays(name, dtype)
    method, patterns, ties, relu_after = TRAJECTORIES[name]
    target = tms(z) if "tms" in name else residual_mlp(z)
    model = ComponentModel(target, find_sites(target, patterns), components(z, "init/", ties))
    activations = {site: torch.relu for site in relu_after} if relu_after else None
    settings = Optimiser(lr=1e-2, schedule="cosine", warmup=0.1)
    adam = make_optimiser(model.components)
    batches = z["batches"]
    steps = len(batches) - 1
    found: dict[str, list[Tensor]] = {key: [] for key in ("total", "attributions", "mask", *TERMS)}
    with use_backend(*backend):
        for index in range(steps + 1):
            x = batch_second(batches[index])
            with torch.no_grad():
                if method.unit_norm:
                    model.components.normalise_()  # what train_step does first; needed for the extra term below
                full = evaluate(model, method, x, activations, output_reconstruction=True).terms
            if index < steps:
                step = train_step(model, method, adam, learning_rate(index, steps, settings), x, activations)
            else:
                step = evaluate(model, method, x, activations)
            found["total"].append(step.total)
            found["attributions"].append(batch_second(step.attributions))
            found["mask"].append(batch_second(step.mask))
            for key, term in TERMS.items():
                if term in full:
                    found[key].append({**full, **step.terms}[term])
            if index == 0:
                for layer in model.components.multiplicity:
                    key = layer.replace(".", "/")
                    z.assert_close(model.components.At[key].grad.mT, f"f64/step0_grad_after_unitnorm_fix/{layer}.A")
                    z.assert_close(model.components.B[key].grad, f"f64/step0_grad_after_unitnorm_fix/{layer}.B")
    z.assert_close(torch.stack(found["total"]), "f64/total_loss")
    z.assert_close(torch.stack(found["attributions"]), "f64/attributions")
    if method.topk is not None:
        z.assert_mask(torch.stack(found["mask"]), "f64/topk_mask")
    for key, values in found.items():
        if key in TERMS and values:
            z.assert_close(torch.stack(values), f"f64/{key}")
    for layer, factor in model.components.export().items():
        z.assert_close(factor, f"f64/final/{layer}")


def test_a_wrong_number_is_caught():
    z = Arrays("unit_norm", torch.float64)
    truth = z["f64/A_unit"]
    with pytest.raises(AssertionError, match="relative error"):
        z.assert_close(truth * (1 + 1e-8), "f64/A_unit")
