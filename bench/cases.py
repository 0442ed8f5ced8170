"""What is timed: the paper's problems at their sizes, and the shapes of the table of goals.

A `Case` is a target with components; a `Layer` is one of its decomposed matrices. Cases whose target is "layer" are a
single matrix with drawn scores, for the operations that need no network around it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.targets import PUBLISHED, TMS, Chain, Method, ResidualMLP, sparse_features
from fastapd import backends
from fastapd._random import stream
from fastapd.attributions import gradient_attributions, output_gradients
from fastapd.components import Components
from fastapd.model import ComponentModel, Record, find_sites
from fastapd.ops import Selection
from fastapd.reference import batch_topk as reference_topk

CHUNK = 64
"""Samples at a time where a result that only serves as input or oracle is computed."""


@dataclass(frozen=True)
class Case:
    """The sizes of a problem.

    Attributes:
        name: As in the benchmark's id.
        target: "tms", "residual_mlp", "mlp" (a chain of equal layers with ReLU between them) or "layer".
        n_features: Width of the target's inputs and outputs.
        width: Hidden dimensions of a TMS, neurons of each layer of a residual MLP.
        topk: Active components per sample, on average over the batch.
        p: Exponent of the Schatten term.
        d_embed: Width of the residual stream; 0 for others.
        n_layers: MLPs of a residual MLP, matrices of a chain.
        device: Where its numbers are.
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
    n_layers: int = 1
    device: str = "cpu"

    @property
    def n_pairs(self) -> int:
        return int(self.topk * self.batch)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of the decomposed layers."""
        if self.target in ("mlp", "layer"):
            return [(self.n_features, self.width)] * self.n_layers
        outer = self.d_embed or self.n_features
        return [(outer, self.width), (self.width, outer)] * self.n_layers

    @property
    def tied(self) -> bool:
        return self.target == "tms"

    @property
    def upstream_bytes(self) -> int:
        """About by how much the research code's step makes the process grow: three [b, C, d_out] of every layer
        and three more of the widest."""
        outer = [self.n_instances * self.batch * self.n_components * d_out for _, d_out in self.layers]
        return 4 * (3 * sum(outer) + 3 * max(outer))


TMS_5_2_SMALL = Case("tms_5-2_b256", "tms", 12, 256, 5, 3, 5, 2, topk=0.211, p=1.0)
TMS_5_2 = Case("tms_5-2_b2048", "tms", 12, 2048, 5, 3, 5, 2, topk=0.211, p=1.0)
TMS_40_10 = Case("tms_40-10_b2048", "tms", 3, 2048, 50, 11, 40, 10, topk=1.0, p=0.9)
RESIDUAL_SMALL = Case("resid_b256", "residual_mlp", 1, 256, 130, 50, 100, 50, topk=1.28, p=0.9, d_embed=1000)
RESIDUAL = replace(RESIDUAL_SMALL, name="resid_b2048", batch=2048)
RESIDUAL_M4 = replace(RESIDUAL_SMALL, name="resid_m4_b256", rank=4)
RESIDUAL_M1 = replace(RESIDUAL_SMALL, name="resid_m1_b256", rank=1)
RESIDUAL_LP = replace(RESIDUAL_M4, name="resid_m4_b128", batch=128)
RESIDUAL_2 = Case("resid2_b2048", "residual_mlp", 1, 2048, 200, 25, 100, 25, topk=1.28, p=0.9, d_embed=1000, n_layers=2)
MLP_128 = Case("mlp_3x128_b256", "mlp", 1, 256, 400, 2, 128, 128, topk=4.0, p=0.9, n_layers=3)
MLP_128_LP = replace(MLP_128, name="mlp_3x128_c200_b256", n_components=200)
MLP_256 = Case("mlp_3x256_b128", "mlp", 1, 128, 1000, 1, 256, 256, topk=4.0, p=0.9, n_layers=3)
MANY = Case("c1000_256x256_m4", "layer", 1, 1024, 1000, 4, 256, 256, topk=8, p=0.9)
VERY_MANY = Case("c10000_256x256_m1", "layer", 1, 512, 10000, 1, 256, 256, topk=16, p=0.9)


S1 = RESIDUAL
S2 = Case("s2_b4096", "mlp", 1, 4096, 2000, 4, 512, 512, topk=16, p=0.9, n_layers=4)
S2_SMALL = replace(S2, name="s2_b512", batch=512)
S3 = Case("s3_layer", "layer", 1, 10_000, 100_000, 1, 1024, 1024, topk=32, p=0.9)
S3_FEW = Case("s3_b64", "mlp", 1, 64, 100_000, 1, 1024, 1024, topk=32, p=0.9, n_layers=2)
"""The reference sizes of a GPU: S2 with as many samples as the research formulation has room for, S3 as one layer, and
as two for a few of its samples, of which every one costs the same."""


def method(case: Case) -> Method:
    """The published settings of a step; for the TMS fastapd's own defaults, which are those."""
    if case.tied:
        (found,) = [m for name, m in PUBLISHED.items() if case.name.startswith(name + "_")]
        assert (found.topk, found.p) == (case.topk, case.p), "cases follow the published settings"
        return found
    one = case.n_layers == 1
    return Method(
        topk=case.topk,
        minimality=1.0 if one else 2.0,
        simplicity=10.0 if one else 7.0,
        p=case.p,
        activation_reconstruction=1.0 if case.target == "residual_mlp" else 0.0,
        unit_norm=one,
    )


def _target(case: Case, generator: torch.Generator) -> tuple[nn.Module, list[str], Tensor]:
    """An untrained target, which of its modules are decomposed, and a batch of its inputs."""

    def normal(t: Tensor, std: float) -> None:
        t.copy_(torch.randn(t.shape, generator=generator) * std)

    if case.target == "tms":
        target = TMS(case.n_instances, case.n_features, case.width)
        probability, low, patterns = 0.05, 0.0, ["linear*"]
        normal(target.linear1.weight.data, math.sqrt(2 / ((case.n_features + case.n_instances) * case.width)))
    elif case.target == "residual_mlp":
        target = ResidualMLP(case.n_instances, case.n_features, case.d_embed, case.width, case.n_layers)
        probability, low, patterns = 0.01, -1.0, ["layers.*.mlp_*"]
        W_E = torch.randn(case.n_features, case.d_embed, generator=generator)
        W_E /= W_E.norm(dim=-1, keepdim=True)
        target.get_buffer("W_E").copy_(W_E)
        target.get_buffer("W_U").copy_(W_E.mT)
        for name, parameter in target.named_parameters():
            assert name.endswith("weight"), name
            normal(parameter.data, math.sqrt(2 / math.prod(parameter.shape[1:])))
    else:
        assert case.n_features == case.width, "a chain of equal layers"
        target = Chain(case.n_instances, case.width, case.n_layers)
        patterns = ["layers.*"]
        for parameter in target.parameters():
            normal(parameter.data, math.sqrt(2 / case.width))
    target.requires_grad_(False)
    if case.target in ("mlp", "layer"):
        x = torch.randn(case.n_instances, case.batch, case.n_features, generator=generator)
    else:
        x = sparse_features(case.n_instances, case.batch, case.n_features, probability, generator, low)
    return target.to(case.device), patterns, x.to(case.device)


class Problem:
    """A case with its numbers. Lists have one entry for each decomposed layer; factors are in the house layout.

    Attributes:
        model: An untrained target and freshly initialised components.
        x: A batch of the target's inputs [I, b, n_features].
        Ats, Bs: The components' factors, [I, C, m, d_in] and [I, C, m, d_out].
        weights: The target's matrices [I, d_in, d_out].
    """

    def __init__(self, case: Case) -> None:
        generator = stream(0, f"bench {case.name}")
        target, patterns, self.x = _target(case, generator)
        sites = find_sites(target, patterns)
        shapes = {site.name: site.shape for site in sites}
        scale = 2.0 if case.target == "residual_mlp" else 1.0
        sizes = case.n_components, case.rank, case.n_instances
        components = Components(shapes, *sizes, scale, generator, device=case.device)
        self.case, self.model = case, ComponentModel(target, sites, components)
        factors = [tuple(t.detach() for t in components.factors(site.name)) for site in sites]
        self.Ats: list[Tensor] = [A.mT for A, _ in factors]
        self.Bs: list[Tensor] = [B for _, B in factors]
        self.weights = [site.weight for site in sites]
        self._generator = generator

    @property
    def names(self) -> list[str]:
        return [site.name for site in self.model.sites]

    def record(self) -> Record:
        return self.model.record_target(self.x, differentiable=True)

    @functools.cached_property
    def xs(self) -> list[Tensor]:
        """Inputs of the layers, [I, b, d_in]."""
        record = self.model.record_target(self.x)
        return [record.inputs[name] for name in self.names]

    @functools.cached_property
    def gs(self) -> list[Tensor]:
        """Gradients of the outputs by the layers' outputs, [I, b, n_outputs, d_out], as `output_gradients` has them."""
        gradients = output_gradients(self.record())
        return [gradients[name].detach() for name in self.names]

    @functools.cached_property
    def scores(self) -> Tensor:
        """Attributions [I, b, C], or squares of drawn numbers for a single layer."""
        if self.case.target == "layer":
            case, generator = self.case, self._generator
            if case.device != "cpu":  # where they are many, and the CPU slow
                generator = torch.Generator(case.device).manual_seed(1)
            shape = case.n_instances, case.batch, case.n_components
            return torch.randn(shape, generator=generator, device=case.device).square_()
        with backends.use_backend(*(["auto"] if self.case.device == "cpu" else ["reference"])):
            chunks = [self.model.record_target(x, differentiable=True) for x in self.x.split(CHUNK, 1)]
            return torch.cat([gradient_attributions(self.model, record).detach() for record in chunks], 1)

    @functools.cached_property
    def selection(self) -> Selection:
        """Of the `n_pairs` largest scores."""
        return Selection(*reference_topk.batch_topk(self.scores, self.case.n_pairs))

    def components(self) -> Components:
        """A copy of the initial components, to be trained."""
        untied = [i for i, site in enumerate(self.model.sites) if site.tied_to is None]
        ties = {site.name: site.tied_to for site in self.model.sites if site.tied_to is not None}
        return Components.from_factors({self.names[i]: (self.Ats[i].mT, self.Bs[i]) for i in untied}, ties)

    def in_float64(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Inputs of the layers and output gradients of a few samples at a time, from a target in float64."""
        target = copy.deepcopy(self.model.target).double()
        sites = find_sites(target, self.names)
        shapes = {site.name: site.shape for site in sites}
        components = Components(shapes, 1, 1, self.case.n_instances, device=self.case.device)
        model = ComponentModel(target, sites, components.double())
        for x in self.x.double().split(CHUNK, 1):
            record = model.record_target(x, differentiable=True)
            with backends.use_backend("reference"):
                gradients = output_gradients(record)
            yield [record.inputs[name] for name in self.names], [gradients[name].detach() for name in self.names]


@functools.lru_cache(maxsize=1)
def problem(case: Case) -> Problem:
    """The numbers of a case, from a fixed seed; the last one is kept."""
    return Problem(case)


class Layer(NamedTuple):
    """One decomposed matrix of a case, where an operation works on a single one."""

    name: str
    case: Case
    index: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.case.layers[self.index]
