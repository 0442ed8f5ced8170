"""How much each component matters on each sample, twice.

`attribution_reduce/<case>` is the op: the inputs of the layers and the gradients of all outputs are given, by sample.
`gradient_attributions/<case>` is what a training step asks for: from the target and a batch, recording and output
gradients included. There `torch_tangent` is written by hand for the one architecture: it pushes every component's
effect forward through the target's linear maps, so that no output needs a backward pass. Only the Lp form
differentiates attributions: its cases have the gradients of all factors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bench import plain_attributions, plain_step, upstream
from bench.cases import (
    MLP_128,
    MLP_128_LP,
    MLP_256,
    RESIDUAL_LP,
    RESIDUAL_M1,
    RESIDUAL_M4,
    RESIDUAL_SMALL,
    TMS_5_2,
    TMS_5_2_SMALL,
    TMS_40_10,
    Case,
    Problem,
    problem,
)
from bench.harness import (
    BOTH,
    FORWARD,
    TIGHT_TOLERANCE,
    Answer,
    Contender,
    chosen,
    compete,
    compiled,
    cpu_backends,
    grid,
    instances_first,
    reference_in_float64,
    same,
    skip_if_refused,
    transposed,
)
from fastapd.attributions import gradient_attributions
from fastapd.model import ComponentModel
from fastapd.ops import attribution_reduce
from fastapd.reference import attribution_reduce as reference

OP = "attribution_reduce"
OP_CASES = (TMS_5_2_SMALL, TMS_5_2, TMS_40_10, RESIDUAL_SMALL)
LP_CASES = (TMS_5_2_SMALL, MLP_128_LP, RESIDUAL_LP)
CASES = (TMS_5_2, TMS_40_10, RESIDUAL_SMALL, RESIDUAL_M4, RESIDUAL_M1, MLP_128, MLP_256)


def _cotangent(case: Case) -> Tensor:
    shape = (case.n_instances, case.batch, case.n_components)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(case.device)


def reverse_flops(case: Case) -> int:
    """Of the reverse form: z = (x A) B, then z . g for every output; the squares are left out."""
    per_pair = sum(2 * case.rank * (i + o) + 2 * o * case.n_features for i, o in case.layers)
    return case.n_instances * case.batch * case.n_components * per_pair


def tangent_flops(case: Case) -> int:
    """Of pushing effects forward, where everything that is the same for all samples is folded and costs nothing."""
    if case.target == "mlp":
        inner, own = case.width**2 * (case.n_layers - 1), case.rank * case.width * case.n_layers
        return 2 * case.batch * case.n_components * (inner + own)
    if case.target == "tms":
        return 2 * case.n_instances * case.batch * case.n_components * case.n_features**2
    later = [case.n_features + case.width * (case.n_layers - 1 - j) for j in range(case.n_layers)]
    stream = [case.n_features + case.width * j for j in range(case.n_layers)]
    per_pair = sum(
        2 * case.width * onward + min(case.rank * (entering + case.width), entering * case.width)
        for onward, entering in zip(later, stream, strict=True)
    )
    return 2 * case.batch * case.n_components * per_pair


def _own_factors(p: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """At and B of the layers that are not tied to another."""
    n = 1 if p.case.tied else len(p.names)
    return p.Ats[:n], p.Bs[:n]


def _layers(p: Problem, factors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """First and second factors of all layers, from those of the untied ones."""
    n = len(factors) // 2
    first, second = list(factors[:n]), list(factors[n:])
    return (first, second) if not p.case.tied else (first + [t.mT for t in second], second + [t.mT for t in first])


@functools.lru_cache(maxsize=1)
def expected(case: Case, with_gradients: bool) -> Answer:
    """Of the factors A and B of the untied layers, from a target in float64, a few samples at a time."""
    p = problem(case)
    Ats, Bs = _own_factors(p)
    leaves, n = (*(At.mT for At in Ats), *Bs), 0
    outputs, grads = [], [torch.zeros_like(t, dtype=torch.float64) for t in leaves]
    for xs, gs in p.in_float64():
        cotangent = _cotangent(case)[:, n : n + xs[0].shape[1]] if with_gradients else None

        def function(*factors: Tensor, xs: list[Tensor] = xs, gs: list[Tensor] = gs) -> Tensor:
            return reference.attribution_reduce(xs, gs, *_layers(p, factors))

        if with_gradients:
            out, *parts = reference_in_float64(function, leaves, cotangent)
            for total, part in zip(grads, parts, strict=True):
                total += part
        else:
            out = function(*(t.double() for t in leaves))
        outputs.append(out)
        n += xs[0].shape[1]
    return [torch.cat(outputs, 1), *grads]


# ---------------------------------------------------------------------------------------------- the op, gradients given


def op_args(p: Problem) -> tuple[Any, ...]:
    return p.xs, p.gs, [At.mT for At in p.Ats], p.Bs


def _upstream(p: Problem) -> Contender:
    inputs = {name: x.transpose(0, 1).contiguous() for name, x in zip(p.names, p.xs, strict=True)}
    gradients = [
        {name: g[:, :, o].transpose(0, 1).contiguous() for name, g in zip(p.names, p.gs, strict=True)}
        for o in range(p.case.n_features)
    ]

    def function(*factors: Tensor) -> Tensor:
        As, Bs = factors[: len(inputs)], factors[len(inputs) :]
        weights = {name: upstream.component_weights(A, B) for name, A, B in zip(inputs, As, Bs, strict=True)}
        return upstream.reduce_attributions(gradients, upstream.component_acts(inputs, weights))

    return Contender(function, (*(At.mT.contiguous() for At in p.Ats), *p.Bs), output=instances_first)


def _house(p: Problem, form: Any) -> Contender:
    """A contender on the house layout."""
    n = len(p.xs)
    return Contender(lambda *f: form(p.xs, p.gs, f[:n], f[n:]), (*p.Ats, *p.Bs))


def ours(p: Problem) -> Contender:
    return _house(p, lambda xs, gs, Ats, Bs: attribution_reduce(xs, gs, [At.mT for At in Ats], Bs))


CONTENDERS = {
    "upstream": _upstream,
    "torch": lambda p: _house(p, plain_attributions.stacked),
    "torch_factored": lambda p: _house(p, plain_attributions.factored),
}


@grid(lambda case: (*CONTENDERS, *cpu_backends(OP)), OP_CASES, lambda case: (FORWARD,))
def bench_attribution_reduce(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p = problem(case)
    skip_if_refused(OP, contender, op_args(p))
    compete(
        benchmark,
        "attribution_reduce",
        contender,
        direction,
        case,
        CONTENDERS.get(contender, ours)(p),
        expected(case, False),
        chosen(OP, op_args(p)),
        flops=reverse_flops(case),
        n_bytes=sum(t.nbytes for t in (*p.xs, *p.gs, *p.Ats, *p.Bs)),
        output_tolerance=TIGHT_TOLERANCE,
    )


# ------------------------------------------------------------------------- what a step asks for, from target and batch


def _upstream_from_target(p: Problem) -> Contender:
    x, case = p.x.transpose(0, 1).contiguous(), p.case
    targets = {name: W.clone().requires_grad_() for name, W in zip(p.names, p.weights, strict=True)}
    if case.target == "tms":
        network = upstream.tms(p.model.target.get_parameter("b_final").squeeze(1))
    elif case.target == "mlp":
        network = upstream.mlp(case.n_layers)
    else:
        ends = [p.model.target.get_buffer(name) for name in ("W_E", "W_U")]
        network = upstream.residual_mlp(*ends, case.n_layers)

    @torch.enable_grad()  # factors are parameters there: the graph is built although top-k training never uses it
    def function(*factors: Tensor) -> Tensor:
        factors = tuple(t.requires_grad_() for t in factors)
        target = upstream.run_target(network, x, targets)
        weights = {
            name: upstream.component_weights(A, B) for name, A, B in zip(p.names, *_layers(p, factors), strict=True)
        }
        return upstream.gradient_attributions(target, weights)

    Ats, Bs = _own_factors(p)
    leaves = (*(At.mT.contiguous() for At in Ats), *Bs)
    cotangent = _cotangent(case).transpose(0, 1).contiguous()
    return Contender(function, leaves, cotangent, instances_first, [same] * len(leaves))


def _from_target(p: Problem, form: plain_step.Attributions) -> Contender:
    """A contender on the house layout, differentiable by autograd."""
    Ats, Bs = _own_factors(p)

    def function(*factors: Tensor) -> Tensor:
        first, second = list(factors[: len(Ats)]), list(factors[len(Ats) :])
        return form(p.x, *((first + second, second + first) if p.case.tied else (first, second)))

    grads = [transposed] * len(Ats) + [same] * len(Bs)
    return Contender(function, (*Ats, *Bs), _cotangent(p.case), same, grads)


def _fastapd_from_target(p: Problem) -> Contender:
    components = p.components()
    model = ComponentModel(p.model.target, p.model.sites, components)
    leaves = (*components.At.values(), *components.B.values())
    n = len(components.At)
    return Contender(
        lambda: gradient_attributions(model, model.record_target(p.x, differentiable=True)),
        leaves,
        _cotangent(p.case),
        same,
        [transposed] * n + [same] * n,
        bound=True,
    )


FROM_TARGET = {
    "upstream": _upstream_from_target,
    "torch": lambda p: _from_target(p, plain_step.reverse_attributions(p)),
    "torch_tangent": lambda p: _from_target(p, plain_step.tangent_attributions(p)),
    "torch_compile": lambda p: _from_target(p, compiled(plain_step.tangent_attributions(p), p.case.device)),
    "fastapd": _fastapd_from_target,
}


def _bench_from_target(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p = problem(case)
    flops = min(reverse_flops(case), tangent_flops(case))
    compete(
        benchmark,
        "gradient_attributions",
        contender,
        direction,
        case,
        FROM_TARGET[contender](p),
        expected(case, direction == BOTH),
        "fastapd",
        flops=flops if direction == FORWARD else 3 * flops,
        n_bytes=sum(t.nbytes for t in (p.x, *p.Ats, *p.Bs, *p.weights)),
        output_tolerance=TIGHT_TOLERANCE,
    )


@grid(lambda case: tuple(FROM_TARGET), CASES, lambda case: (FORWARD,))
def bench_gradient_attributions(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    _bench_from_target(benchmark, contender, case, direction)


@grid(
    lambda case: tuple(FROM_TARGET),
    LP_CASES,
    lambda case: (BOTH,),
    compiled=lambda case, direction: case is not TMS_5_2_SMALL,
)
def bench_lp_attributions(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    _bench_from_target(benchmark, contender, case, direction)
