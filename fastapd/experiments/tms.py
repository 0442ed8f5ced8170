"""Toy models of superposition: x' = ReLU(x W W^T + b) with more features than hidden dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastapd import metrics
from fastapd._random import stream
from fastapd.components import Components
from fastapd.config import APD, Optimiser, RunConfig, TMSTarget
from fastapd.decomposition import Decomposition
from fastapd.experiments._check import Check
from fastapd.model import ComponentModel, Linear, TransposedLinear

if TYPE_CHECKING:
    from jaxtyping import Float

LAYERS = ("linear1", "linear2")
"""The decomposed modules; linear2 is tied to linear1 and counts as a layer of its own, as in the paper."""

PUBLISHED = {"tms_5-2": (0.998, 0.893), "tms_40-10": (0.996, 0.935)}
"""MMCS and ML2R of the APD paper, for one chosen instance."""


def defaults() -> list[RunConfig]:
    """The paper's settings of every experiment of this family."""
    return [
        RunConfig(
            experiment="tms_5-2",
            n_instances=12,
            n_components=5,
            rank=3,
            steps=20_000,
            batch=2048,
            optimiser=Optimiser(lr=3e-2, warmup=0.05),
            method=APD(topk=0.211, minimality=1.0, simplicity=0.7, p=1.0),
            target=TMSTarget(n_features=5, n_hidden=2, feature_probability=0.05, steps=5000, batch=1024, lr=5e-3),
        ),
        RunConfig(
            experiment="tms_40-10",
            n_instances=3,
            n_components=50,
            rank=11,
            steps=20_000,
            batch=2048,
            optimiser=Optimiser(lr=1e-3, schedule="cosine", warmup=0.05),
            method=APD(topk=1.0, minimality=10.0, simplicity=20.0, p=0.9),
            target=TMSTarget(n_features=40, n_hidden=10, feature_probability=0.05, steps=2000, batch=2048, lr=5e-3),
        ),
    ]


class TMS(nn.Module):
    """x' = ReLU(x W W^T + b), n_instances times; W [n_instances, n_features, n_hidden] is shared by both layers."""

    def __init__(self, n_instances: int, n_features: int, n_hidden: int) -> None:
        super().__init__()
        self.linear1 = Linear(n_instances, n_features, n_hidden)
        self.linear2 = TransposedLinear(self.linear1)
        self.b_final = nn.Parameter(torch.zeros(n_instances, 1, n_features))

    def forward(self, x: Float[Tensor, "I b F"]) -> Float[Tensor, "I b F"]:
        return torch.relu(self.linear2(self.linear1(x)) + self.b_final)


def untrained(config: RunConfig) -> TMS:
    """The target of a run, all zeros."""
    assert isinstance(config.target, TMSTarget)
    return TMS(config.n_instances, config.target.n_features, config.target.n_hidden)


def sparse_features(
    n_instances: int, batch: int, n_features: int, probability: float, generator: torch.Generator, low: float = 0.0
) -> Iterator[Float[Tensor, "I b F"]]:
    """Batches in which every feature is, with the given probability, uniform in [low, 1], and zero otherwise.

    One draw of values and one of activities a batch, over [batch * n_instances, n_features], as the research code
    draws them: the same torch CPU seed gives the same batches.
    """
    while True:
        values = torch.rand(batch * n_instances, n_features, generator=generator)
        active = torch.rand(batch * n_instances, n_features, generator=generator) < probability
        x = (values * (1 - low) + low if low else values) * active
        yield x.view(batch, n_instances, n_features).transpose(0, 1).contiguous()


def data(config: RunConfig, purpose: str, batch: int) -> Iterator[Tensor]:
    """Batches of inputs [n_instances, batch, n_features], an independent stream for each purpose of the run."""
    target = config.target
    return sparse_features(
        config.n_instances, batch, target.n_features, target.feature_probability, stream(config.seed, purpose)
    )


def train_target(config: RunConfig, progress: bool = False) -> tuple[TMS, dict[str, Any]]:
    """Trains the target from the run's seed, all instances at once: AdamW, linear decay of the learning rate to zero.

    Returns:
        The frozen target and what is known of it: the loss of the last step and, for each instance, the smallest
        norm of a feature's direction (a feature that was given up has a norm near 0).
    """
    settings = config.target
    assert isinstance(settings, TMSTarget)
    generator = stream(config.seed, "target")
    target = untrained(config)
    with torch.no_grad():
        # Xavier normal as torch computes it for a 3-D tensor: both fans are multiplied by the trailing width.
        std = math.sqrt(2 / ((settings.n_features + config.n_instances) * settings.n_hidden))
        target.linear1.weight.copy_(torch.randn(target.linear1.weight.shape, generator=generator) * std)
    batches = data(config, "target data", settings.batch)
    optimiser = torch.optim.AdamW(target.parameters(), lr=settings.lr, weight_decay=0.01, fused=True)
    steps = range(settings.steps)
    if progress:
        from tqdm import tqdm

        steps = tqdm(steps, desc="target   ", unit="step", mininterval=0.5)
    loss = torch.tensor(math.nan)
    for step in steps:
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        x = next(batches)
        loss = (target(x) - x).square().mean((-2, -1))  # [I]
        optimiser.zero_grad(set_to_none=True)
        loss.sum().backward()
        optimiser.step()
    target.requires_grad_(False)
    norms = target.linear1.weight.norm(dim=-1)  # [I, F]
    return target.to(getattr(torch, config.dtype)), {
        "loss": loss.detach().tolist(),
        "smallest_feature_norm": norms.min(-1).values.tolist(),
    }


# ------------------------------------------------------------------------------------------- the check of the result

COLUMNS = ["", "MMCS", "ML2R", "leak", "unique", "dead", "faith. error", "top-k MSE", "L0", "alive"]
RULE = "recovered: MMCS > 0.98, every feature its own component, leak < 0.1, ML2R >= 0.85, faithfulness error <= 0.01"


def _scores(decomposition: Decomposition, x: Tensor) -> tuple[metrics.FeatureRecovery, dict[str, Tensor]]:
    weight = decomposition.model.weights["linear1"]
    return metrics.feature_recovery(weight, decomposition.parts("linear1")), decomposition.score(x)


def _row(label: str, r: metrics.FeatureRecovery, s: dict[str, Tensor], n_features: int, pick: int | None) -> list[str]:
    """One row of the table: an instance, or the median over all."""

    def value(t: Tensor) -> float:
        return float(t[pick] if pick is not None else t.double().quantile(0.5))

    return [
        label,
        f"{value(r.mmcs):.3f}",
        f"{value(r.ml2r):.3f}",
        f"{value(r.leak):.3f}",
        f"{value(r.unique):g}/{n_features}",
        f"{value(r.dead):g}",
        f"{value(s['faithfulness_error']):.1e}",
        f"{value(s['topk_mse']):.1e}",
        f"{value(s['l0']):.3f}",
        f"{value(s['alive']):g}",
    ]


def baselines(decomposition: Decomposition, initial: Components) -> dict[str, Decomposition]:
    """What needs no training: the run's own initial components, the SVD of the target, and C copies of W / C."""
    model = decomposition.model
    weight, C, rank = model.weights["linear1"], model.components.n_components, model.components.rank
    ties = {name: layer.tied_to for name, layer in model.components.layers.items() if layer.tied_to}
    given = {
        "random init": initial,
        "SVD of W": Components.from_factors({"linear1": metrics.svd_factors(weight, C, rank)}, ties),
        f"W/{C}, {C} times": Components.from_factors(
            {"linear1": metrics.copies_factors(weight, C, max(rank, weight.shape[-1]))}, ties
        ),
    }
    return {
        name: Decomposition(ComponentModel(model.target, model.sites, components), decomposition.method)
        for name, components in given.items()
    }


def check(config: RunConfig, decomposition: Decomposition, initial: Components) -> Check:
    """Recovery of the features, beside the baselines and the published values; on fresh samples of the run's stream.

    Args:
        config: The run's settings.
        decomposition: Its result.
        initial: The components it started from.
    """
    from fastapd import plots

    # On the target's device and in its dtype.
    x = next(data(config, "evaluation", config.eval_batch)).to(decomposition.model.weights["linear1"])
    F, n = config.target.n_features, config.n_instances
    result, scores = _scores(decomposition, x)
    good = metrics.recovered(result)
    others = baselines(decomposition, initial)
    other_scores = {name: _scores(d, x) for name, d in others.items()}
    order = sorted(range(n), key=lambda i: (bool(good[i]), float(result.mmcs[i]), -float(result.leak[i])))
    worst, best = order[0], order[-1]
    rows = [_row(f"{name} (median)", *s, F, None) for name, s in other_scores.items()]
    rows.append(_row(f"fastapd (median of {n})", result, scores, F, None))
    rows.append(_row(f"fastapd, best (instance {best})", result, scores, F, best))
    rows.append(_row(f"fastapd, worst (instance {worst})", result, scores, F, worst))
    published = []
    if config.experiment in PUBLISHED:
        mmcs, ml2r = PUBLISHED[config.experiment]
        rows.append(["published (APD paper)", f"{mmcs:.3f}", f"{ml2r:.3f}", *["-"] * (len(COLUMNS) - 3)])
        for name, value, here in (("MMCS", mmcs, result.mmcs), ("ML2R", ml2r, result.ml2r)):
            spread = f"best {here[best]:.3f}, median {here.quantile(0.5):.3f} of {n} instances"
            published.append((name, f"{value:.3f}, one chosen instance", spread))
    weight, parts = decomposition.model.weights["linear1"], decomposition.parts("linear1")
    labels = [
        f"{kind}, instance {i}\n{'recovered' if good[i] else 'not recovered'}"
        for kind, i in (("best", best), ("worst", worst))
    ]
    shown = ([best, worst], labels) if best != worst else ([best], labels[:1])
    panels = {"fastapd, best": (weight[best], parts[best]), "fastapd, worst": (weight[worst], parts[worst])}
    panels |= {name: (weight[best], d.parts("linear1")[best]) for name, d in others.items()}
    figures = {}
    if weight.shape[-1] == 2:
        caption = "The target's feature directions, the sum of the components, and each component alone."
        figures["polygons"] = (caption, plots.polygons(weight, parts, *shown, result.assignment))
    caption = "How much of a feature's direction a component carries (1: all of it), beside what needs no training."
    figures["recovery"] = (caption, plots.recovery_heatmap(panels))
    one_hot = torch.eye(F, dtype=x.dtype, device=x.device).expand(n, F, F)
    step, _ = decomposition.select(x)
    return Check(
        columns=COLUMNS,
        rows=rows,
        recovered=int(good.sum()),
        n=n,
        rule=RULE,
        published=published,
        figures=figures,
        values={
            "recovered": good.tolist(),
            **{name: getattr(result, name).tolist() for name in ("mmcs", "ml2r", "leak", "unique", "dead")},
            **{name: value.tolist() for name, value in scores.items()},
            "baselines": {
                name: {
                    "mmcs": r.mmcs.tolist(),
                    "ml2r": r.ml2r.tolist(),
                    "leak": r.leak.tolist(),
                    "unique": r.unique.tolist(),
                }
                for name, (r, _) in other_scores.items()
            },
        },
        tensors={
            "attributions": {"x": x, "attributions": step.attributions, "mask": step.mask},
            "one_hot": {"attributions": decomposition.select(one_hot)[0].attributions},
            "recovery": {"cosine": metrics.mmcs_ml2r(weight, parts).cosine, "assignment": result.assignment},
        },
    )
