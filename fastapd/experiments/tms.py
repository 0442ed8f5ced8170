"""Toy models of superposition: x' = ReLU(x W W^T + b) with more features than hidden dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastapd.config import APD, Optimiser, RunConfig, TMSTarget
from fastapd.model import Linear, TransposedLinear

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


def data(config: RunConfig, seed: int) -> Iterator[Tensor]:
    """Batches for the decomposition, [n_instances, batch, n_features]."""
    target = config.target
    assert isinstance(target, TMSTarget)
    generator = torch.Generator().manual_seed(seed)
    return sparse_features(
        config.n_instances, config.batch, target.n_features, target.feature_probability, generator
    )


def train_target(config: RunConfig, progress: bool = False) -> tuple[TMS, dict[str, Any]]:
    """Trains the target from the run's seed, all instances at once: AdamW, linear decay of the learning rate to zero.

    Returns:
        The frozen target and what is known of it: the loss of the last step and, for each instance, the smallest
        norm of a feature's direction (a feature that was given up has a norm near 0).
    """
    settings = config.target
    assert isinstance(settings, TMSTarget)
    generator = torch.Generator().manual_seed(config.seed)
    target = TMS(config.n_instances, settings.n_features, settings.n_hidden)
    with torch.no_grad():
        # Xavier normal as torch computes it for a 3-D tensor: both fans are multiplied by the trailing width.
        std = math.sqrt(2 / ((settings.n_features + config.n_instances) * settings.n_hidden))
        target.linear1.weight.copy_(torch.randn(target.linear1.weight.shape, generator=generator) * std)
    batches = sparse_features(
        config.n_instances, settings.batch, settings.n_features, settings.feature_probability, generator
    )
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
