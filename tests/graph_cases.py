"""The targets and methods whose steps are captured, small; for the tests with and without Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastapd.components import Components
from fastapd.config import APD
from fastapd.experiments.residual_mlp import ResidualMLP
from fastapd.experiments.tms import TMS
from fastapd.model import ComponentModel, find_sites

BATCH = 4


def _chain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))


def _few_outputs() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 1))


def _no_chain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))


TARGETS: dict[str, tuple[Any, list[str], tuple[int, ...], str]] = {
    "tms": (lambda: TMS(2, 5, 2), ["linear*"], (2, BATCH, 5), "tangent"),
    "residual": (lambda: ResidualMLP(1, 6, 5, 4, 1), ["layers.*.mlp_*"], (1, BATCH, 6), "tangent"),
    "sequential": (_chain, ["0", "2"], (BATCH, 4), "tangent"),
    "few outputs": (_few_outputs, ["0"], (BATCH, 4), "reverse"),
    "no chain": (_no_chain, ["0", "2"], (BATCH, 4), "reverse"),
}
"""How each is made, what is decomposed, the shape of a batch, and how its attributions are computed."""

METHODS: dict[str, dict[str, Any]] = {
    "batch": {},
    "sample": {"selection": "sample"},
    "exact schatten": {"schatten": "exact"},
    "lp": {"topk": None, "lp_sparsity": 0.3, "output_reconstruction": 1.0},
    "activation": {"attribution": "activation"},
    "ablation": {"attribution": "ablation"},
    "components": {"attribution_model": "components"},
    "norm": {"attribution_norm": True},
    "unit norm": {"unit_norm": True},
    "distil": {"distil_from_target": True},
    "hidden": {"activation_reconstruction": 0.5, "output_reconstruction": 0.7},
    "hidden lp": {"topk": None, "lp_sparsity": 0.3, "activation_reconstruction": 0.5, "attribution": "activation"},
    "kl": {"distance": "kl"},
    "no faithfulness": {"faithfulness": 0.0},
}


def method(name: str) -> APD:
    return APD(**{"topk": 1.0, "minimality": 1.5, "simplicity": 0.7, "p": 0.9} | METHODS[name])


def model(name: str) -> ComponentModel:
    """A target of random matrices with random components, the same ones every time."""
    make, patterns, _, _ = TARGETS[name]
    torch.manual_seed(1)
    target = make().requires_grad_(False)
    for t in (*target.parameters(), *target.buffers()):
        t.normal_()
    sites = find_sites(target, patterns)
    components = Components({site.name: site.shape for site in sites}, 4, 2, sites[0].weight.shape[0])
    return ComponentModel(target, sites, components)


def batches(name: str, seed: int = 2) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(TARGETS[name][2], generator=generator)
