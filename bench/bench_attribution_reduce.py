"""How much each component matters on each sample, twice.

`attribution_reduce/<case>` is the op: the inputs of the layers and the gradients of all outputs are given, by sample.
`gradient_attributions/<case>` is what a training step asks for: from the target and a batch, recording and output
gradients included. There `torch_tangent` is written by hand for the one architecture: it pushes every component's
effect forward through the target's linear maps, so that no output needs a backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bench import plain, upstream
from bench.cases import CASES, TMS_5_2, TMS_5_2_SMALL, Case, Problem, problem
from bench.harness import (
    BOTH,
    FORWARD,
    Answer,
    Contender,
    chosen,
    compete,
    cpu_backends,
    grid,
    instances_first,
    reference_in_float64,
    same,
    skip_if_refused,
    transposed,
)
from fastapd.attributions import gradient_attributions
from fastapd.ops import attribution_reduce
from fastapd.reference import attribution_reduce as reference

OP = "attribution_reduce"


def _cotangent(p: Problem) -> Tensor:
    return torch.randn(p.scores.shape, generator=torch.Generator().manual_seed(1))


def _op_args(p: Problem) -> tuple[Any, ...]:
    return p.xs, p.gs, [At.mT for At in p.Ats], p.Bs


def _flops(case: Case) -> int:
    """Of the reverse form: z = (x A) B, then z . g for every output; the squares are left out."""
    per_pair = sum(2 * case.rank * (i + o) + 2 * o * case.n_features for i, o in case.layers)
    return case.n_instances * case.batch * case.n_components * per_pair


def _directions(case: Case) -> tuple[str, ...]:
    """Only the Lp form differentiates attributions; it is timed where the research code's is quick enough."""
    return (FORWARD, BOTH) if case in (TMS_5_2, TMS_5_2_SMALL) else (FORWARD,)


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> Answer:
    p = problem(case)
    n = len(p.xs)
    xs, gs = [x.double() for x in p.xs], [g.double() for g in p.gs]

    def function(*f: Tensor) -> Tensor:
        return reference.attribution_reduce(xs, gs, list(f[:n]), list(f[n:]))

    cotangent = _cotangent(p) if BOTH in _directions(case) else None
    return reference_in_float64(function, (*(At.mT for At in p.Ats), *p.Bs), cotangent)


# ---------------------------------------------------------------------------------------------- the op, gradients given


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

    leaves = (*(At.mT.contiguous() for At in p.Ats), *p.Bs)
    cotangent = _cotangent(p).transpose(0, 1).contiguous()
    return Contender(function, leaves, cotangent, instances_first, [same] * len(leaves))


def _house(p: Problem, form: Any) -> Contender:
    """A contender on the house layout."""
    n = len(p.xs)
    grads = [transposed] * n + [same] * n
    return Contender(lambda *f: form(p.xs, p.gs, f[:n], f[n:]), (*p.Ats, *p.Bs), _cotangent(p), same, grads)


def _fastapd(p: Problem) -> Contender:
    return _house(p, lambda xs, gs, Ats, Bs: attribution_reduce(xs, gs, [At.mT for At in Ats], Bs))


CONTENDERS = {
    "upstream": _upstream,
    "torch": lambda p: _house(p, plain.attributions_stacked),
    "torch_factored": lambda p: _house(p, plain.attributions_factored),
}


@grid(lambda case: (*CONTENDERS, *cpu_backends(OP)), CASES, _directions)
def bench_attribution_reduce(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p = problem(case)
    skip_if_refused(OP, contender, _op_args(p))
    compete(
        benchmark,
        "attribution_reduce",
        contender,
        direction,
        case,
        CONTENDERS.get(contender, _fastapd)(p),
        _expected(case),
        chosen(OP, _op_args(p)),
        flops=_flops(case) if direction == FORWARD else 3 * _flops(case),
        n_bytes=sum(t.nbytes for t in (*p.xs, *p.gs, *p.Ats, *p.Bs, p.scores)),
    )


# ------------------------------------------------------------------------- what a step asks for, from target and batch


def _upstream_from_target(p: Problem) -> Contender:
    x = p.x.transpose(0, 1).contiguous()
    targets = {name: W.clone().requires_grad_() for name, W in zip(p.names, p.weights, strict=True)}
    factors = {  # parameters, so that a graph is built that top-k training never uses, as in the research code
        name: (At.mT.contiguous().requires_grad_(), B.clone().requires_grad_())
        for name, At, B in zip(p.names, p.Ats, p.Bs, strict=True)
    }

    @torch.enable_grad()
    def function() -> Tensor:
        if p.case.target == "tms":
            target = upstream.run_tms(x, targets, p.model.target.get_parameter("b_final").squeeze(1))
        else:
            W_E, W_U = p.model.target.get_buffer("W_E"), p.model.target.get_buffer("W_U")
            target = upstream.run_residual_mlp(x, W_E, W_U, targets)
        weights = {name: upstream.component_weights(A, B) for name, (A, B) in factors.items()}
        return upstream.gradient_attributions(target, weights)

    return Contender(function, (), output=instances_first)


def _torch_from_target(p: Problem) -> Contender:
    form = plain.attributions_stacked if p.case.target == "tms" else plain.attributions_factored

    def function() -> Tensor:
        with torch.enable_grad():
            record = p.record()
            gradients = plain.output_gradients(record.output, [record.outputs[name] for name in p.names])
        return form([record.inputs[name] for name in p.names], gradients, p.Ats, p.Bs)

    return Contender(function, ())


def _torch_tangent(p: Problem) -> Contender:
    target = p.model.target
    if p.case.target == "tms":
        bias = target.get_parameter("b_final")
        return Contender(lambda: plain.tms_attributions(p.x, p.weights[0], bias, p.Ats[0], p.Bs[0]), ())
    W_E, W_U = target.get_buffer("W_E"), target.get_buffer("W_U")
    return Contender(lambda: plain.residual_attributions(p.x, W_E, W_U, p.weights, p.Ats, p.Bs), ())


def _fastapd_from_target(p: Problem) -> Contender:
    return Contender(lambda: gradient_attributions(p.model, p.record()), ())


FROM_TARGET = {"upstream": _upstream_from_target, "torch": _torch_from_target, "torch_tangent": _torch_tangent}


@grid(lambda case: (*FROM_TARGET, *cpu_backends(OP)), CASES, lambda case: (FORWARD,))
def bench_gradient_attributions(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p = problem(case)
    skip_if_refused(OP, contender, _op_args(p))
    compete(
        benchmark,
        "gradient_attributions",
        contender,
        direction,
        case,
        FROM_TARGET.get(contender, _fastapd_from_target)(p),
        _expected(case),
        chosen(OP, _op_args(p)),
        flops=_flops(case),
        n_bytes=sum(t.nbytes for t in (*p.xs, *p.Ats, *p.Bs, *p.weights, p.scores)),
    )
