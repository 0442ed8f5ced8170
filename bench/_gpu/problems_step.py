"""Problems of whole steps and of their attributions, which are most of a step.

Each function is one problem: it makes the numbers, lists the contenders, and lets `contest` check and time them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from bench import bench_attribution_reduce, bench_component_sum, bench_step, cases, plain_attributions
from bench._gpu.card import Card
from bench._gpu.checks import relative_error
from bench._gpu.contenders import WAITS, Settings, candidate, contest, each, few, needs, sized, skip_refused
from bench._gpu.contest import TF32_TOLERANCE, Candidate, Work, mode_and_base
from bench._gpu.contest import run as compete
from bench.cases import Case, Problem, problem
from bench.harness import BOTH, FORWARD, TOLERANCE, Contender, chosen, compiled
from fastapd.model import ComponentModel

# -------------------------------------------------------------------------------------------------------- attribution

ATTRIBUTIONS = {
    "tms_5-2_b2048": cases.TMS_5_2,
    "tms_40-10_b2048": cases.TMS_40_10,
    "resid_b2048": cases.S1,
    "resid_m4_b256": cases.RESIDUAL_M4,
    "s2_b512": cases.S2_SMALL,
    "s2_b4096": cases.S2,
    "s3_b64": cases.S3_FEW,
    "mlp_3x128_c200_b256": cases.MLP_128_LP,
}


def _jacobian_bytes(case: Case) -> int:
    return 4 * case.n_instances * case.batch * case.n_features * sum(o for _, o in case.layers)


def _upstream_acts(case: Case) -> float:
    """Of the research formulation's attributions: every component's outputs in every layer, once more in the widest,
    and every component's matrices."""
    outer = [case.n_instances * case.batch * case.n_components * o for _, o in case.layers]
    matrices = [case.n_instances * case.n_components * i * o for i, o in case.layers]
    return 4 * (sum(outer) + max(outer) + sum(matrices))


def attribution_reduce(card: Card, name: str, given: Settings) -> dict[str, Any]:
    """The op: inputs of the layers and gradients of all outputs are given, by sample."""
    case, op = sized(card, ATTRIBUTIONS[name]), bench_attribution_reduce.OP
    needs(card, 1.3 * _jacobian_bytes(case))
    p = problem(case)
    args = bench_attribution_reduce.op_args(p)
    forms = dict(bench_attribution_reduce.CONTENDERS)
    stronger = "torch" if case.tied else "torch_factored"
    forms["torch_compile"] = lambda p: _compiled_reduction(p, stronger)
    default = chosen(op, args)

    def make(name: str) -> Candidate:
        skip_refused(op, name, args)
        _, base = mode_and_base(name)
        if base == "upstream":
            needs(card, _upstream_acts(case) + _jacobian_bytes(case))
        contender = forms.get(base, bench_attribution_reduce.ours)(p)
        return candidate(name, contender, FORWARD, bench_attribution_reduce.expected(case, False), default)

    names = [
        "upstream",
        "torch",
        "torch_factored",
        "tf32 torch",
        "tf32 torch_factored",
        "triton",
        "tf32 triton",
        "ieee triton",
    ]
    if name in ("s2_b4096", "s3_b64"):
        names.remove("upstream")  # which takes many seconds there
    else:
        names += few(given, "reference")
    names += few(given, "torch_compile") if name == "resid_b2048" else ()
    n_bytes = sum(t.nbytes for t in (*p.xs, *p.gs, *p.Ats, *p.Bs))
    work = Work(bench_attribution_reduce.reverse_flops(case), n_bytes)
    known = contest(
        card, f"attribution_reduce/{name}", FORWARD, work, (op,), given, jacobian_bytes=_jacobian_bytes(case),
        scores_bytes=4 * case.n_instances * case.batch * case.n_components,
    )  # fmt: skip
    return compete(card, known, each(names, make))


def _compiled_reduction(p: Problem, form: str) -> Contender:
    function = plain_attributions.stacked if form == "torch" else plain_attributions.factored
    n, fast = len(p.xs), compiled(function, p.case.device)
    return Contender(lambda *f: fast(p.xs, p.gs, f[:n], f[n:]), (*p.Ats, *p.Bs))


def gradient_attributions(card: Card, name: str, direction: str, given: Settings) -> dict[str, Any]:
    """What a training step asks for, from the target and a batch."""
    case = sized(card, ATTRIBUTIONS[name])
    p = problem(case)
    forms = bench_attribution_reduce.FROM_TARGET

    def make(name: str) -> Candidate:
        _, base = mode_and_base(name)
        if base == "upstream":
            needs(card, (1 if direction == FORWARD else 2) * _upstream_acts(case))
        expected = bench_attribution_reduce.expected(case, direction == BOTH)
        return candidate(name, forms[base](p), direction, expected, "fastapd")

    compile_it = name in ("tms_40-10_b2048", "resid_b2048") and direction == FORWARD and not given["quick"]
    names = [n for n in forms if n != "torch_compile" or compile_it]
    names += ["tf32 torch", "tf32 torch_tangent", "tf32 fastapd"]
    flops = min(bench_attribution_reduce.reverse_flops(case), bench_attribution_reduce.tangent_flops(case))
    n_bytes = sum(t.nbytes for t in (p.x, *p.Ats, *p.Bs, *p.weights))
    work = Work(flops if direction == FORWARD else 3 * flops, n_bytes)
    known = contest(
        card, f"gradient_attributions/{name}", direction, work, ("attribution_tangent", "attribution_reduce"), given,
        jacobian_bytes=_jacobian_bytes(case), scores_bytes=4 * case.n_instances * case.batch * case.n_components,
    )  # fmt: skip
    return compete(card, known, each(names, make))


# ----------------------------------------------------------------------------------------------------- the whole step

STEPS = {
    "tms_5-2_b2048": cases.TMS_5_2,
    "tms_40-10_b2048": cases.TMS_40_10,
    "resid_b2048": cases.S1,
    "resid_m4_b256": cases.RESIDUAL_M4,
    "resid2_b2048": cases.RESIDUAL_2,
    "s2_b512": cases.S2_SMALL,
    "s2_b4096": cases.S2,
}

STEP_OPS = (
    "component_sum_loss", "component_forward_selected", "component_forward_selected_accumulate", "attribution_reduce",
    "attribution_tangent", "batch_topk", "batch_topk_warm", "schatten_factored", "schatten_accumulate", "unit_norm",
    "remove_along",
)  # fmt: skip


def step(card: Card, name: str, given: Settings) -> dict[str, Any]:
    """A training step with its optimiser, at a learning rate of zero."""
    case = sized(card, STEPS[name])
    p = problem(case)
    first: list[bench_step.Found] = []

    def make(name: str) -> Candidate:
        mode, base = mode_and_base(name)
        if base == "upstream":
            needs(card, case.upstream_bytes + _upstream_acts(case))
        runner = bench_step.CONTENDERS[base](p)
        tolerance = TF32_TOLERANCE if mode == "tf32" else 3 * TOLERANCE

        def check(result: Any) -> float:
            found = _on_the_host(runner.found(result))  # what is kept there does not count as a contender's memory
            if not first:
                first.append(found)
                return 0.0
            return _step_error(case, found, first[0], tolerance, exact_mask=mode != "tf32")

        mark = {"fastapd": "chosen", "fastapd_reference": "forced"}.get(base, "") if not mode else "forced"
        mark = mark if base.startswith("fastapd") else ""
        capture: Any = None
        if base == "fastapd":
            capture = lambda: _graphed(card, p)  # noqa: E731
        elif base == "upstream":
            capture = "its optimiser keeps its step on the host"
        elif base.startswith("torch"):
            capture = WAITS
        return Candidate(runner.call, check, mark, capture)

    names = ["upstream", "torch_tangent", "torch", "fastapd", "tf32 fastapd"]
    if case.n_features * max(o for _, o in case.layers) > 1 << 18:
        names.remove("torch")  # which would hold the gradients of all outputs
    names += few(given, "torch_compile") if name in ("tms_40-10_b2048", "resid_b2048") else ()
    n_bytes = 28 * sum(t.numel() for t in (*p.Ats, *p.Bs)) / (2 if case.tied else 1)
    flops = min(bench_attribution_reduce.reverse_flops(case), bench_attribution_reduce.tangent_flops(case))
    flops += sum(bench_component_sum.work(p, i)[0] for i in range(len(p.names))) / (2 if case.tied else 1)
    known = contest(card, f"step/{name}", "step", Work(flops, n_bytes), STEP_OPS, given)
    return compete(card, known, each(names, make))


def _graphed(card: Card, p: Problem) -> Callable[[], Any]:
    """Steps as fastapd captures them, past the capture."""
    settings = cases.method(p.case)
    model = ComponentModel(p.model.target, p.model.sites, p.components())
    hidden = {n: torch.relu for n in p.names if n.endswith("mlp_in")} or None
    take = card.graphed_steps(model, settings, hidden)
    for _ in range(card.often(5)):
        take(0.0, p.x)
    card.wait()
    return lambda: take(0.0, p.x)


def _on_the_host(found: bench_step.Found) -> bench_step.Found:
    terms, grads = ([t.cpu() for t in ts] for ts in (found.terms, found.grads))
    return bench_step.Found(terms, found.attributions.cpu(), found.mask.cpu(), grads)


FLIPS = 1e-4
"""The share of the selected pairs in which two selections may differ, whose scores differ by their rounding."""


def _step_error(
    case: Case, found: bench_step.Found, first: bench_step.Found, tolerance: float, exact_mask: bool
) -> float:
    """The largest relative error of attributions, losses and gradients against the first contender's."""
    flips = int((found.mask != first.mask).sum()) / 2
    pairs = case.n_instances * case.n_pairs
    allowed = max(2, FLIPS * pairs) if exact_mask else 0.02 * pairs + 2
    assert flips <= allowed, f"{flips:.0f} of {pairs} selected pairs are others, allowed {allowed:.0f}"
    tolerance += 4 * math.sqrt(flips / max(pairs, 1))
    names = (
        [f"term {i}" for i in range(len(found.terms))]
        + ["attributions"]
        + [f"gradient {i}" for i in range(len(found.grads))]
    )
    ours, theirs = ([t.flatten() for t in (*f.terms, f.attributions, *f.grads)] for f in (found, first))
    worst = 0.0
    for what, a, b in zip(names, ours, theirs, strict=True):
        error = relative_error(a, b)
        assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"
        worst = max(worst, error)
    return worst
