"""One whole training step of the published experiments, optimiser included.

`upstream` is the research code's step in our words, `apd` that code itself, `fastapd` ours as it chooses its backends,
`fastapd_reference` the same step with every op in plain PyTorch. `torch` is put together from the strongest plain
forms, `torch_tangent` takes the attributions that are written by hand for the architecture, `torch_compile` compiles
those. All start from the same target, components and batch. The learning rate is zero while they are timed: AdamW does
the same work, and every round sees the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import apd, plain, plain_step, upstream
from bench.cases import (
    RESIDUAL,
    RESIDUAL_2,
    RESIDUAL_M4,
    RESIDUAL_SMALL,
    TMS_5_2,
    TMS_5_2_SMALL,
    TMS_40_10,
    Case,
    Problem,
    method,
    problem,
)
from bench.harness import TIGHT_TOLERANCE, TOLERANCE, assert_close, compiled, grid, lacks_memory, measure, watch
from fastapd import backends
from fastapd.model import ComponentModel
from fastapd.training import make_optimiser, train_step

CASES = (TMS_5_2_SMALL, TMS_5_2, TMS_40_10, RESIDUAL_SMALL, RESIDUAL_M4, RESIDUAL, RESIDUAL_2)
TERMS = {
    "faithfulness": "param_match",
    "minimality": "topk_recon",
    "simplicity": "schatten",
    "activation_reconstruction": "act_recon",
}
"""What the research code calls a term."""


class Found(NamedTuple):
    """What a step must agree on, in the house layout: terms, attributions, mask, gradients of every A and B."""

    terms: list[Tensor]
    attributions: Tensor
    mask: Tensor
    grads: list[Tensor]


class Runner(NamedTuple):
    call: Callable[[], Any]
    found: Callable[[Any], Found]
    """Of what the call returned, before the next."""
    close: Callable[[], None] = lambda: None


def _terms(case: Case) -> list[str]:
    return [name for name in TERMS if getattr(method(case), name)]


def _gradient(t: Tensor) -> Tensor:
    assert t.grad is not None
    return t.grad.clone()


def _upstream(p: Problem) -> Runner:
    case, settings, target = p.case, method(p.case), p.model.target
    if case.tied:
        networks = [upstream.tms(target.get_parameter("b_final").squeeze(1).clone()) for _ in range(2)]
        ties = {"linear2": "linear1"}
    elif case.target == "mlp":
        networks, ties = [upstream.mlp(case.n_layers)] * 2, {}
    else:
        fixed = [target.get_buffer("W_E"), target.get_buffer("W_U")]
        own = [t.clone().requires_grad_() for t in fixed]  # parameters of the target, which the research code leaves on
        networks = [upstream.residual_mlp(*ends, case.n_layers) for ends in (own, fixed)]
        ties = {}
    kept = [i for i, name in enumerate(p.names) if name not in ties]
    step = upstream.Step(
        networks[0],
        networks[1],
        {p.names[i]: p.weights[i] for i in kept},
        {p.names[i]: (p.Ats[i].mT, p.Bs[i]) for i in kept},
        ties,
        {theirs: getattr(settings, ours) for ours, theirs in TERMS.items()},
        topk=case.topk,
        p=case.p,
        lr=0.0,
        unit_norm=settings.unit_norm,
    )
    x = p.x.transpose(0, 1).contiguous()

    def found(result: upstream.Result) -> Found:
        losses = [result.terms[TERMS[name]].detach() for name in _terms(case)]
        grads = [_gradient(t) for pair in step.own.values() for t in pair]
        return Found(losses, result.attributions.detach().transpose(0, 1), result.mask.transpose(0, 1), grads)

    return Runner(lambda: step(x), found)


def _apd(p: Problem) -> Runner:
    if (reason := apd.why_not()) is not None:
        pytest.skip(reason)
    step = apd.Step(p)
    x = p.x.transpose(0, 1).contiguous()

    def found(_: Any) -> Found:
        look = step.look(x)
        grads = [look.gradients[f"{name}.{factor}"] for name in p.names for factor in "AB" if name != "linear2"]
        losses = [look.terms[TERMS[name]] for name in _terms(p.case)]
        return Found(losses, look.attributions.transpose(0, 1), look.mask.transpose(0, 1), grads)

    return Runner(lambda: step(x), found, step.close)


def _torch(p: Problem, attributions: plain_step.Attributions) -> Runner:
    step = plain_step.Step(p, attributions)

    def found(result: Any) -> Found:
        _, terms, scores, rows = result
        grads = [g for At, B in zip(step.At, step.B, strict=True) for g in (_gradient(At).mT, _gradient(B))]
        return Found([t.detach() for t in terms], scores, plain.mask_of_rows(rows, p.case.batch), grads)

    return Runner(lambda: step(p.x), found)


def _torch_compile(p: Problem) -> Runner:
    runner = _torch(p, compiled(plain_step.tangent_attributions(p), p.case.device))
    runner.call()
    return runner


def _fastapd(p: Problem) -> Runner:
    components, settings = p.components(), method(p.case)
    model, optimiser = ComponentModel(p.model.target, p.model.sites, components), make_optimiser(components)
    hidden = {name: torch.relu for name in p.names if name.endswith("mlp_in")}

    def found(step: Any) -> Found:
        grads = [g for key in components.At for g in (_gradient(components.At[key]).mT, _gradient(components.B[key]))]
        return Found([step.terms[n].detach() for n in _terms(p.case)], step.attributions.detach(), step.mask, grads)

    return Runner(lambda: train_step(model, settings, optimiser, 0.0, p.x, hidden or None), found)


CONTENDERS: dict[str, Callable[[Problem], Runner]] = {
    "upstream": _upstream,
    "apd": _apd,
    "torch": lambda p: _torch(p, plain_step.reverse_attributions(p)),
    "torch_tangent": lambda p: _torch(p, plain_step.tangent_attributions(p)),
    "torch_compile": _torch_compile,
    "fastapd": _fastapd,
    "fastapd_reference": _fastapd,
}

FEW = ("upstream", "apd", "torch_tangent", "fastapd")
"""Of the large cases, where the others would take minutes and gigabytes to come last."""


def contenders(case: Case) -> tuple[str, ...]:
    names = FEW if case in (RESIDUAL, RESIDUAL_2) else tuple(CONTENDERS)
    return tuple(name for name in names if name != "fastapd_reference" or case.tied)


def needs_bytes(contender: str, case: Case) -> int:
    """About what a step of the research code holds; the others need little."""
    return case.upstream_bytes if contender in ("upstream", "apd") else 0


_first: dict[Case, Found] = {}
"""The research formulation's result, or that of plain torch where the former does not fit into memory."""


def _expected(case: Case, p: Problem) -> Found:
    if case not in _first:
        name = "upstream" if lacks_memory(needs_bytes("upstream", case)) is None else "torch_tangent"
        runner = CONTENDERS[name](p)
        _first.clear()
        _first[case] = runner.found(runner.call())
    return _first[case]


def _assert_same(what: str, case: Case, found: Found, expected: Found) -> None:
    """The same losses, attributions, mask and gradients as the research code, so that times can be compared."""
    for name, ours, theirs in zip(_terms(case), found.terms, expected.terms, strict=True):
        assert_close(f"{what}, {name}", ours.flatten(), theirs.flatten(), TOLERANCE)
    assert_close(f"{what}, attributions", found.attributions, expected.attributions, TIGHT_TOLERANCE)
    assert_close(f"{what}, mask", found.mask, expected.mask, 0)
    for i, (ours, theirs) in enumerate(zip(found.grads, expected.grads, strict=True)):
        assert_close(f"{what}, gradient of {'AB'[i % 2]} {i // 2}", ours, theirs, TOLERANCE)


@grid(contenders, CASES, lambda case: ("step",))
def bench_step(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    if (reason := lacks_memory(needs_bytes(contender, case))) is not None:
        pytest.skip(reason)
    p = problem(case)
    runner = CONTENDERS[contender](p)
    try:
        with backends.use_backend("reference" if contender == "fastapd_reference" else "auto"):
            result, seen = watch(runner.call)
            found = runner.found(result)
            del result
            if contender == "upstream":
                _first.clear()
                _first[case] = found
            _assert_same(f"step of {contender} on {case.name}", case, found, _expected(case, p))
            mark = {"fastapd": "chosen", "fastapd_reference": "forced"}.get(contender, "")
            info = {"contender": contender, "direction": direction, "fastapd": mark}
            measure(benchmark, f"step/{case.name}", runner.call, seen, **info)
    finally:
        runner.close()
