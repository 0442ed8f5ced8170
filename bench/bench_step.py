"""One whole training step of the published toy-model experiments, optimiser included.

`upstream` is the research code's step, `fastapd` ours as it chooses its backends, `fastapd_reference` the same step
with every op in plain PyTorch. `torch` is put together from the strongest plain forms, and `torch_tangent` takes the
attributions that are written by hand for this architecture. All start from the same target, components and batch. The
learning rate is zero while they are timed: AdamW does the same work, and every round sees the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from bench import plain, upstream
from bench.cases import TMS_5_2, TMS_5_2_SMALL, TMS_40_10, Case, Problem, problem
from bench.harness import assert_agrees, grid, measure
from fastapd import backends
from fastapd.components import Components
from fastapd.config import APD
from fastapd.experiments import tms
from fastapd.model import ComponentModel
from fastapd.training import make_optimiser, train_step

CASES = (TMS_5_2_SMALL, TMS_5_2, TMS_40_10)
TERMS = {"faithfulness": "param_match", "minimality": "topk_recon", "simplicity": "schatten"}
"""What the research code calls a term."""

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


class Found(NamedTuple):
    """What a step must agree on: the total and the terms, the mask, the gradients of A and B."""

    losses: list[Tensor]
    mask: Tensor
    grads: list[Tensor]


class Runner(NamedTuple):
    call: Callable[[], Any]
    found: Callable[[Any], Found]
    """Of what the call returned, before the next."""


def _method(case: Case) -> APD:
    """The published coefficients."""
    (config,) = [c for c in tms.defaults() if case.name.startswith(c.experiment + "_")]
    assert (config.method.topk, config.method.p) == (case.topk, case.p), "cases.py follows the published settings"
    return config.method


def _gradient(t: Tensor) -> Tensor:
    assert t.grad is not None
    return t.grad


def _upstream(p: Problem, method: APD) -> Runner:
    bias = p.model.target.get_parameter("b_final").squeeze(1)
    coefficients = {theirs: getattr(method, ours) for ours, theirs in TERMS.items()}
    step = upstream.TMSStep(
        p.weights[0], bias, p.Ats[0].mT, p.Bs[0], topk=method.topk, p=method.p, coefficients=coefficients, lr=0.0
    )
    x = p.x.transpose(0, 1).contiguous()

    def found(result: upstream.Result) -> Found:
        losses = [result.total, *(result.terms[name] for name in TERMS.values())]
        return Found(losses, result.mask.transpose(0, 1), [_gradient(step.A), _gradient(step.B)])

    return Runner(lambda: step(x), found)


def _torch(p: Problem, method: APD, tangent: bool) -> Runner:
    coefficients = (method.faithfulness, method.minimality, method.simplicity)
    bias = p.model.target.get_parameter("b_final")
    step = plain.TMSStep(p.weights[0], bias, p.Ats[0], p.Bs[0], p.case.n_pairs, method.p, coefficients, tangent)

    def found(result: Any) -> Found:
        total, terms, rows = result
        mask = plain.mask_of_rows(rows, p.case.batch)
        return Found([total, *terms], mask, [_gradient(step.At).mT, _gradient(step.B)])

    return Runner(lambda: step(p.x), found)


def _fastapd(p: Problem, method: APD) -> Runner:
    components = Components.from_factors({"linear1": (p.Ats[0].mT, p.Bs[0])}, ties={"linear2": "linear1"})
    model, optimiser = ComponentModel(p.model.target, p.model.sites, components), make_optimiser(components)

    def found(step: Any) -> Found:
        losses = [step.total, *(step.terms[name] for name in TERMS)]
        grads = [_gradient(components.At["linear1"]).mT, _gradient(components.B["linear1"])]
        return Found(losses, step.mask, grads)

    return Runner(lambda: train_step(model, method, optimiser, 0.0, p.x), found)


CONTENDERS: dict[str, Callable[[Problem, APD], Runner]] = {
    "upstream": _upstream,
    "torch": lambda p, method: _torch(p, method, tangent=False),
    "torch_tangent": lambda p, method: _torch(p, method, tangent=True),
    "fastapd": _fastapd,
    "fastapd_reference": _fastapd,
}

_expected: dict[Case, Found] = {}


def _assert_same(what: str, found: Found, expected: Found) -> None:
    """The same losses, mask and gradients as the research code, so that the two can be compared by time."""
    for name, ours, theirs in zip(("total", *TERMS), found.losses, expected.losses, strict=True):
        assert_agrees(f"{what}, {name}", [ours.detach()], [theirs.detach()], LOSS_TOLERANCE)
    assert_agrees(f"{what}, mask", [found.mask], [expected.mask])
    for name, ours, theirs in zip("AB", found.grads, expected.grads, strict=True):
        assert_agrees(f"{what}, gradient of {name}", [ours], [theirs], GRADIENT_TOLERANCE)


@grid(lambda case: tuple(CONTENDERS), CASES, lambda case: ("step",))
def bench_step(benchmark: Any, contender: str, case: Case, direction: str) -> None:
    p, method = problem(case), _method(case)
    if case not in _expected:
        first = _upstream(p, method)
        _expected[case] = first.found(first.call())
    runner = CONTENDERS[contender](p, method)
    with backends.use_backend("reference" if contender == "fastapd_reference" else "auto"):
        started = time.process_time()
        result = runner.call()
        seconds = time.process_time() - started
        _assert_same(f"step of {contender} on {case.name}", runner.found(result), _expected[case])
        del result
        mark = {"fastapd": "chosen", "fastapd_reference": "forced"}.get(contender, "")
        info = {"contender": contender, "direction": direction, "fastapd": mark}
        measure(benchmark, f"step/{case.name}", runner.call, seconds, **info)
