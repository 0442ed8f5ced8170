"""Runs an experiment from its config to its report, in a run directory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastapd import backends, plots, report
from fastapd import config as configs
from fastapd._random import stream
from fastapd._rundir import RunDirectory, environment
from fastapd.components import Components
from fastapd.config import RunConfig
from fastapd.decomposition import Decomposition
from fastapd.evaluation import Step, evaluate, select
from fastapd.experiments import family
from fastapd.experiments._check import Check
from fastapd.model import ComponentModel, find_sites
from fastapd.training import decompose


class Outcome(NamedTuple):
    """A finished run."""

    directory: Path
    check: Check
    decomposition: Decomposition


@torch.no_grad()
def self_check(model: ComponentModel, config: RunConfig, x: torch.Tensor) -> str:
    """One batch through the backends in use and through the plain PyTorch reference; says how far they are apart.

    Compared by norm: attributions, what every site computes from the selected components, and the terms of the loss.

    Raises:
        RuntimeError: If they differ by more than rounding can explain.
    """

    def compute() -> tuple[Step, dict[str, torch.Tensor]]:
        step = evaluate(model, config.method, x)
        return step, model.forward(x, step.selection, step.always_on).outputs

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny))

    step, outputs = compute()
    with backends.use_backend("reference"):
        oracle, oracle_outputs = compute()
    errors = {"attributions": apart(step.attributions, oracle.attributions)}
    different = int((step.mask != oracle.mask).sum())
    if different == 0:
        errors["selected outputs"] = max(apart(outputs[name], oracle_outputs[name]) for name in outputs)
        errors["losses"] = max((apart(step.terms[name], oracle.terms[name]) for name in oracle.terms), default=0.0)
    limit = 1e-4 if x.dtype == torch.float32 else 1e-9
    said = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    said += ", selections equal" if different == 0 else f", {different} pairs selected differently"
    if any(not error <= limit for error in errors.values()):
        raise RuntimeError(f"self-check: backends must agree with the reference to {limit:.0e}, got {said}")
    # Rounding may select differently above; on the very same scores the choice is exact.
    if oracle.selection is not None:
        ranked = oracle.attributions[..., : oracle.selection.n_components]
        wrong = int((select(ranked, config.method, x).mask != oracle.selection.mask).sum())
        if wrong:
            raise RuntimeError(f"self-check: backends must agree with the reference, got {wrong} wrong pairs selected")
    return f"backends against the reference: {said}"


def run_experiment(
    config: RunConfig,
    out: str | Path | None = None,
    default_name: str | None = None,
    progress: bool = False,
    echo: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Trains the target, decomposes it, checks the result, and writes pictures and a report.

    Args:
        config: The experiment's settings.
        out: The run directory, which must not hold anything; None for `runs/<default_name>`.
        default_name: None for the experiment's name.
        progress: Whether to show progress bars.
        echo: Receives every line meant for a person.

    Raises:
        ConfigError: If the experiment's family cannot be run, or not on this machine as the settings say.
        FileExistsError: If `out` is taken.
        DivergedError: If a loss becomes NaN or infinite.
    """
    experiment = family(config)
    device = _device(config)
    started = time.perf_counter()
    done, phase = 0, "training the target"
    with RunDirectory.create(out, default_name or config.experiment) as run:
        run.write_text("fastapd.yaml", configs.dump(config))
        surroundings = environment()
        run.write_json("env.json", surroundings)
        run.set_status("running", 0, config.steps, phase)
        echo(f"run directory  {run.path}")
        try:
            target, known = experiment.train_target(config, progress)
            target = target.to(device)
            echo(
                f"target         {config.experiment}, {config.n_instances} instances, loss "
                f"{min(known['loss']):.1e} to {max(known['loss']):.1e}; smallest feature norm "
                f"{min(known['smallest_feature_norm']):.2f} ({time.perf_counter() - started:.0f} s)"
            )
            sites = find_sites(target, experiment.LAYERS)
            first = sites[0].weight
            components = Components(
                {site.name: site.shape for site in sites},
                config.n_components,
                config.rank,
                config.n_instances,
                config.init_scale,
                stream(config.seed, "components"),
                dtype=first.dtype,
                device=device,
            )
            initial = Components.from_factors(
                {name: components.factors(name) for name in components.multiplicity},
                {name: layer.tied_to for name, layer in components.layers.items() if layer.tied_to},
            )
            run.save_tensors("initial.safetensors", initial.export())
            probe = next(experiment.data(config, "self-check", config.batch)).to(device, first.dtype)
            echo(f"self-check     {self_check(ComponentModel(target, sites, components), config, probe)}")
            phase = "decomposing"
            echo(f"decomposing    {config.steps} steps of batch {config.batch}, C {config.n_components}")
            decomposition = decompose(
                target,
                experiment.data(config, "decomposition", config.batch),
                experiment.LAYERS,
                config.n_components,
                method=config.method,
                optimiser=config.optimiser,
                steps=config.steps,
                init=components,
                device=device,
                out=run,
                log_every=config.log_every,
                progress=progress,
                cuda_graph=config.cuda_graph,
            )
            done, phase = config.steps, "writing the report"
            seconds = time.perf_counter() - started
            echo(f"decomposed     {seconds:.0f} s since the start; loss {decomposition.history[-1]['total']:.3e}\n")
            check = experiment.check(config, decomposition, initial)
            _write(run, config, check, decomposition, surroundings, seconds)
            run.set_status("finished", done, config.steps, f"recovered {check.recovered} of {check.n} instances")
        except KeyboardInterrupt:
            if phase != "decomposing":  # the loop has said so itself
                run.set_status("interrupted", done, config.steps, f"stopped by the user while {phase}")
            raise
        except BaseException as error:
            if phase != "decomposing":
                run.set_status("failed", done, config.steps, f"while {phase}: {type(error).__name__}: {error}")
            raise
    return Outcome(run.path, check, decomposition)


def _device(config: RunConfig) -> torch.device:
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise configs.ConfigError("config: device must be available, got cuda and torch sees no CUDA device")
    if config.cuda_graph and not there:
        raise configs.ConfigError("config: cuda_graph must be false on a CPU, got True and torch sees no CUDA device")
    if config.device == "auto":
        return torch.device("cuda" if there else "cpu")
    return torch.device(config.device)


def _write(
    run: RunDirectory,
    config: RunConfig,
    check: Check,
    decomposition: Decomposition,
    surroundings: dict,
    seconds: float,
) -> None:
    pictures = []
    figures = {
        **check.figures,
        "losses": ("The terms of the loss over training.", plots.loss_curves(decomposition.history)),
    }
    for name, (caption, figure) in figures.items():
        pictures.append((caption, plots.save(figure, run.path / "figures" / f"{name}.png")))
    for name, tensors in check.tensors.items():
        run.save_tensors(f"eval/{name}.safetensors", tensors)
    found = {
        "experiment": config.experiment,
        "seed": config.seed,
        "recovered": check.recovered,
        "n": check.n,
        "seconds": round(seconds, 1),
        "columns": check.columns,
        "rows": check.rows,
    }
    run.write_json("result.json", {**found, "instances": check.values})
    method, optimiser = config.method, config.optimiser
    report.write_report(
        run.path / "report.html",
        title=f"fastapd: {config.experiment}",
        summary=[
            ("recovered", f"{check.recovered} of {check.n} instances"),
            (
                "settings",
                f"C {config.n_components}, rank {config.rank or 'full'}, batch {config.batch}, {config.steps} steps",
            ),
            ("selection", f"{method.selection} top-k {method.topk:g}, {method.attribution} attributions of the target"),
            (
                "loss",
                f"faithfulness {method.faithfulness:g}, minimality {method.minimality:g}, "
                f"simplicity {method.simplicity:g} with p {method.p:g}",
            ),
            ("optimiser", f"AdamW, lr {optimiser.lr:g} {optimiser.schedule}, warm-up {optimiser.warmup:.0%}"),
            ("seed", str(config.seed)),
            ("time", f"{seconds:.0f} s on {surroundings['cpu']}, {surroundings['torch_threads']} threads"),
            ("versions", f"fastapd {surroundings['fastapd']}, torch {surroundings['torch']}, {config.dtype}"),
        ],
        table=report.Table(check.columns, check.rows),
        notes=[check.rule, "Every figure on this page was computed in this run, except the published values."],
        figures=pictures,
        published=check.published,
    )
