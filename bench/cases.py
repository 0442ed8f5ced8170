"""What is timed: the paper's problems at their sizes, with the activations and gradients of a real forward pass."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastapd._random import stream
from fastapd.attributions import output_gradients
from fastapd.components import Components
from fastapd.experiments.residual_mlp import ResidualMLP
from fastapd.experiments.tms import TMS, sparse_features
from fastapd.model import ComponentModel, Record, find_sites
from fastapd.ops import Selection
from fastapd.reference import attribution_reduce as reference_attribution
from fastapd.reference import batch_topk as reference_topk


@dataclass(frozen=True)
class Case:
    """The sizes of a problem.

    Attributes:
        name: As in the benchmark's id.
        target: "tms" or "residual_mlp".
        n_features: Width of the target's inputs and outputs.
        width: Hidden dimensions of a TMS, neurons of a residual MLP.
        topk: Active components per sample, on average over the batch.
        p: Exponent of the Schatten term.
        d_embed: Width of the residual stream; 0 for a TMS.
    """

    name: str
    target: str
    n_instances: int
    batch: int
    n_components: int
    rank: int
    n_features: int
    width: int
    topk: float
    p: float
    d_embed: int = 0

    @property
    def n_pairs(self) -> int:
        return int(self.topk * self.batch)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of the decomposed layers."""
        outer = self.d_embed or self.n_features
        return [(outer, self.width), (self.width, outer)]


TMS_5_2_SMALL = Case("tms_5-2_b256", "tms", 12, 256, 5, 3, 5, 2, topk=0.211, p=1.0)
TMS_5_2 = Case("tms_5-2_b2048", "tms", 12, 2048, 5, 3, 5, 2, topk=0.211, p=1.0)
TMS_40_10 = Case("tms_40-10_b2048", "tms", 3, 2048, 50, 11, 40, 10, topk=1.0, p=0.9)
RESIDUAL = Case("resid_b256", "residual_mlp", 1, 256, 130, 50, 100, 50, topk=1.28, p=0.9, d_embed=1000)

CASES = (TMS_5_2_SMALL, TMS_5_2, TMS_40_10, RESIDUAL)


@dataclass
class Problem:
    """A case with its numbers. Lists have one entry for each decomposed layer; factors are in the house layout.

    Attributes:
        model: An untrained target and freshly initialised components.
        x: A batch of the target's inputs [I, b, n_features].
        xs: Inputs of the layers, [I, b, d_in].
        gs: Gradients of the outputs by the layers' outputs, [I, b, n_outputs, d_out], strided as `output_gradients`
            leaves them.
        Ats, Bs: The components' factors, [I, C, m, d_in] and [I, C, m, d_out].
        weights: The target's matrices [I, d_in, d_out].
        scores: Attributions [I, b, C].
        selection: Of the `n_pairs` largest.
    """

    case: Case
    model: ComponentModel
    x: Tensor
    xs: list[Tensor]
    gs: list[Tensor]
    Ats: list[Tensor]
    Bs: list[Tensor]
    weights: list[Tensor]
    scores: Tensor
    selection: Selection

    @property
    def names(self) -> list[str]:
        return [site.name for site in self.model.sites]

    def record(self) -> Record:
        return self.model.record_target(self.x, differentiable=True)


def _target(case: Case, generator: torch.Generator) -> tuple[nn.Module, list[str], Tensor]:
    """An untrained target, which of its modules are decomposed, and a batch of its inputs."""

    def normal(t: Tensor, std: float) -> None:
        t.copy_(torch.randn(t.shape, generator=generator) * std)

    if case.target == "tms":
        target = TMS(case.n_instances, case.n_features, case.width)
        probability, low, patterns = 0.05, 0.0, ["linear*"]
        normal(target.linear1.weight.data, math.sqrt(2 / ((case.n_features + case.n_instances) * case.width)))
    else:
        target = ResidualMLP(case.n_instances, case.n_features, case.d_embed, case.width, n_layers=1)
        probability, low, patterns = 0.01, -1.0, ["layers.*.mlp_*"]
        W_E = torch.randn(case.n_features, case.d_embed, generator=generator)
        W_E /= W_E.norm(dim=-1, keepdim=True)
        target.get_buffer("W_E").copy_(W_E)
        target.get_buffer("W_U").copy_(W_E.mT)
        for name, parameter in target.named_parameters():
            assert name.endswith("weight"), name
            normal(parameter.data, math.sqrt(2 / math.prod(parameter.shape[1:])))
    target.requires_grad_(False)
    x = next(sparse_features(case.n_instances, case.batch, case.n_features, probability, generator, low))
    return target, patterns, x


@functools.lru_cache(maxsize=1)
def problem(case: Case) -> Problem:
    """The numbers of a case, from a fixed seed; the last one is kept."""
    generator = stream(0, f"bench {case.name}")
    target, patterns, x = _target(case, generator)
    sites = find_sites(target, patterns)
    shapes = {site.name: site.shape for site in sites}
    components = Components(shapes, case.n_components, case.rank, case.n_instances, generator=generator)
    model = ComponentModel(target, sites, components)
    record = model.record_target(x, differentiable=True)
    gradients = output_gradients(record)
    xs = [record.inputs[site.name] for site in sites]
    gs = [gradients[site.name].detach() for site in sites]
    factors = [tuple(t.detach() for t in components.factors(site.name)) for site in sites]
    As, Bs = [A for A, _ in factors], [B for _, B in factors]
    scores = reference_attribution.attribution_reduce(xs, gs, As, Bs)
    selection = Selection(*reference_topk.batch_topk(scores, case.n_pairs))
    weights = [site.weight for site in sites]
    return Problem(case, model, x, xs, gs, [A.mT for A in As], Bs, weights, scores, selection)
