"""Problems of single operations: faithfulness, masked forward, top-k, simplicity, unit length.

Each function is one problem: it makes the numbers, lists the contenders, and lets `contest` check and time them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import (
    bench_batch_topk,
    bench_batched_svd,
    bench_component_forward,
    bench_component_sum,
    cases,
    plain,
)
from bench._gpu.card import Card
from bench._gpu.contenders import WAITS, Settings, candidate, contest, each, few, house, needs, sized, skip_refused
from bench._gpu.contest import Candidate, Work, mode_and_base
from bench._gpu.contest import run as compete
from bench.bench_batch_topk import Scores
from bench.cases import Case, Layer, problem
from bench.harness import BOTH, FORWARD, Contender, chosen, compiled
from fastapd.ops._unit_norm import remove_along, unit_norm

# ------------------------------------------------------------------------------------------------------- faithfulness

SUMS = {
    "tms_40-10": Layer("tms_40-10", cases.TMS_40_10),
    "s1_in": Layer("s1_in", cases.S1, 0),
    "s1_out": Layer("s1_out", cases.S1, 1),
    "s2": Layer("s2", replace(cases.S2, n_layers=1)),
    "s3": Layer("s3", cases.S3),
}


def component_sum(card: Card, name: str, given: Settings) -> dict[str, Any]:
    """Value and gradients of the squared distance to the target."""
    layer, op = SUMS[name], bench_component_sum.OP
    layer = layer._replace(case=sized(card, layer.case))
    p, i = problem(layer.case), layer.index
    args = (p.Ats[i].mT, p.Bs[i], p.weights[i])
    forms = bench_component_sum.CONTENDERS
    default = chosen(op, args)

    def make(name: str) -> Candidate:
        skip_refused(op, name, args)
        _, base = mode_and_base(name)
        expected = None if base == "gemms" else bench_component_sum.expected(layer)
        return candidate(name, forms.get(base, bench_component_sum.ours)(p, i), BOTH, expected, default)

    names = [
        "upstream",
        "torch",
        "tf32 torch",
        "gemms",
        "tf32 gemms",
        "fastapd_step",
        "tf32 fastapd_step",
        *house(op, given),
    ]
    names += few(given, "torch_compile") if name == "s1_in" else ()
    work = Work(*bench_component_sum.work(p, i))
    ops = (op, "component_sum")
    return compete(card, contest(card, f"component_sum/{name}", BOTH, work, ops, given), each(names, make))


# ----------------------------------------------------------------------------------------------------- masked forward

LAYERS = {
    "tms_40-10": Layer("tms_40-10", cases.TMS_40_10),
    "s1_in": Layer("s1_in", cases.S1, 0),
    "s1_out": Layer("s1_out", cases.S1, 1),
    "s2": Layer("s2", replace(cases.S2, n_layers=1)),
    "s3": Layer("s3", cases.S3),
    "c10000_256x256_m1": Layer("c10000_256x256_m1", cases.VERY_MANY),
}


def _forward_names(
    forms: Mapping[str, Any], layer: Layer, ours: Sequence[str], given: Settings, compile_it: bool
) -> list[str]:
    left_out = [] if layer.case.rank == 1 else ["torch_embedding_bag"]
    if not compile_it or given["quick"]:
        left_out.append("torch_compile")
    names = [n for n in forms if n not in left_out and not n.startswith("fastapd")]
    names.insert(names.index("torch_dense") + 1, "tf32 torch_dense")
    return [*names, *ours]


def component_forward(card: Card, name: str, direction: str, given: Settings) -> dict[str, Any]:
    """From the selection."""
    layer, op = LAYERS[name], bench_component_forward.OP
    layer = layer._replace(case=sized(card, layer.case))
    p, i = problem(layer.case), layer.index
    x, At, B = bench_component_forward.inputs_of(p, i)
    args = (x, At.mT, B, *p.selection)
    forms = bench_component_forward.CONTENDERS
    default = chosen(op, args)

    def make(name: str) -> Candidate:
        skip_refused(op, name, args)
        _, base = mode_and_base(name)
        if base == "upstream":
            needs(card, bench_component_forward.upstream_bytes(layer, direction))
        contender = forms.get(base, bench_component_forward.ours)(p, i)
        expected = bench_component_forward.expected(layer, direction)
        return candidate(name, contender, direction, expected, default)

    names = _forward_names(
        forms, layer, (*house(op, given), "tf32 triton"), given, name == "s1_in" and direction == FORWARD
    )
    work = Work(*bench_component_forward.work(p, layer, direction))
    ops = (op,) if direction == FORWARD else (op, "component_forward_selected_accumulate")
    return compete(card, contest(card, f"component_forward/{name}", direction, work, ops, given), each(names, make))


def masked_forward(card: Card, name: str, given: Settings) -> dict[str, Any]:
    """From the scores, so that making the index counts too."""
    layer = LAYERS[name]
    layer = layer._replace(case=sized(card, layer.case))
    p, i = problem(layer.case), layer.index
    forms = bench_component_forward.FROM_SCORES

    def make(name: str) -> Candidate:
        _, base = mode_and_base(name)
        if base == "upstream":
            needs(card, bench_component_forward.upstream_bytes(layer, FORWARD))
        expected = bench_component_forward.expected(layer, FORWARD)
        found = candidate(name, forms[base](p, i), FORWARD, expected, "fastapd")
        found.capture = WAITS if base == "torch" else None
        return found

    names = _forward_names(forms, layer, ("fastapd", "tf32 fastapd"), given, False)
    flops, n_bytes = bench_component_forward.work(p, layer, FORWARD)
    ops = (bench_component_forward.OP, "batch_topk")
    known = contest(card, f"masked_forward/{name}", FORWARD, Work(flops, n_bytes + 2 * p.scores.nbytes), ops, given)
    return compete(card, known, each(names, make))


# -------------------------------------------------------------------------------------------------------------- top-k

SCORES = {
    "n10k_k432": Scores("n10k_k432", 1, 2048, 5, 432),
    "n82k_k4096": Scores("n82k_k4096", 1, 2048, 40, 4096),
    "n266k_k2621": Scores("n266k_k2621", 1, 2048, 130, 2621),
    "n1m_k10000": Scores("n1m_k10000", 1, 1024, 1000, 10_000),
    "n10m_k65536": Scores("n10m_k65536", 1, 4096, 2500, 65_536),
    "n100m_k320000": Scores("n100m_k320000", 1, 10_000, 10_000, 320_000),
    "n1000m_k320000": Scores("n1000m_k320000", 1, 10_000, 100_000, 320_000),
}
HUGE = 1 << 28
"""Scores from which a sort or a second index of them all takes a large part of a card's memory."""


def batch_topk(card: Card, name: str, given: Settings) -> dict[str, Any]:
    """Cold, and with the threshold of the call before."""
    case = SCORES[name]._replace(device=card.device)
    if card.rehearsal:
        case = case._replace(batch=6, n_components=5, n_pairs=7)
    n = case.batch * case.n_components
    needs(card, 40.0 * n)
    scores, op = bench_batch_topk.scores_of(case), bench_batch_topk.OP
    args = (scores, case.n_pairs)
    forms = dict(bench_batch_topk.CONTENDERS)
    forms["torch_sort"] = lambda case: Contender(lambda s: plain.sort_mask(s, case.n_pairs), (scores,))
    default = chosen(op, args)

    def make(name: str) -> Candidate:
        skip_refused(op, name, args)
        contender = forms.get(name, bench_batch_topk.ours)(case)
        found = candidate(name, contender, FORWARD, bench_batch_topk.expected(case), default)
        found.capture = WAITS if name == "torch_rows" else None
        return found

    names = [
        "upstream",
        "torch_scatter",
        "torch_kthvalue",
        "torch_sort",
        "torch_rows",
        "fastapd_warm",
        *house(op, given),
    ]
    if n > HUGE:
        names = ["torch_scatter", "fastapd_warm", *house(op, given)[:1]]
    ops = (op, "batch_topk_warm")
    known = contest(card, f"batch_topk/{name}", FORWARD, Work(0, 2 * scores.nbytes), ops, given, scores=n)
    return compete(card, known, each(names, make))


# --------------------------------------------------------------------------------------------------------- simplicity

FACTORED = {"tms_40-10": cases.TMS_40_10, "s1": cases.S1, "s2": replace(cases.S2, n_layers=1), "s3": cases.S3}


def schatten_factored(card: Card, name: str, given: Settings) -> dict[str, Any]:
    """The research code's sum of one layer, with gradients."""
    case, op = sized(card, FACTORED[name]), "schatten_factored"
    p = problem(case)
    args = bench_batched_svd.factored_args(p, BOTH)
    forms = bench_batched_svd.FACTORED
    default = chosen(op, args)

    def make(name: str) -> Candidate:
        skip_refused(op, name, args)
        if name == "upstream":
            needs(card, 40.0 * case.n_instances * case.batch * case.n_components * case.rank)
        contender = forms.get(name, bench_batched_svd.ours)(p)
        return candidate(name, contender, BOTH, bench_batched_svd.expected(case), default)

    names = [n for n in forms if n != "torch_compile" or (name == "s1" and not given["quick"])]
    work = Work(*bench_batched_svd.factored_work(p, BOTH))
    known = contest(card, f"batched_svd/{name}", BOTH, work, (op,), given)
    return compete(card, known, each([*names, *house(op, given)], make))


EXACT = {
    "c1000_64x64_m4": (1000, 64, 64, 4),
    "c4000_256x256_m4": (4000, 256, 256, 4),
    "c4000_256x256_m8": (4000, 256, 256, 8),
    "c2000_256x256_m16": (2000, 256, 256, 16),
    "c1000_256x256_m32": (1000, 256, 256, 32),
    "c130_1000x50_m50": (130, 1000, 50, 50),
    "c100000_1024x1024_m1": (100_000, 1024, 1024, 1),
}
"""Components, d_in, d_out, rank; those in the goals are larger than an L2 cache."""

PRODUCTS = "c1000_64x64_m4"
"""Where singular values of the products themselves are taken: the library goes from one matrix to the next."""


def schatten(card: Card, name: str, given: Settings) -> dict[str, Any]:
    """The exact sum of one layer, with gradients."""
    n_components, d_in, d_out, rank = (min(n, 3) for n in EXACT[name]) if card.rehearsal else EXACT[name]
    case = Case(name, "layer", 1, 64, n_components, rank, d_in, d_out, topk=1.0, p=0.9, device=card.device)
    layer, op = Layer(name, case), "schatten"
    args = bench_batched_svd.exact_args(layer)
    forms = dict(bench_batched_svd.EXACT)
    forms["torch_qr"] = lambda layer: bench_batched_svd.exact_form(layer, plain.schatten_by_qr)
    default = chosen(op, args)

    def make(name: str) -> Candidate:
        skip_refused(op, name, args)
        contender = forms.get(name, bench_batched_svd.ours_exact)(layer)
        if name == "torch_qr":
            contender.rounding = 100  # float32 throughout
        found = candidate(name, contender, BOTH, bench_batched_svd.expected_exact(layer), default)
        found.capture = "its singular values wait for the device" if name.startswith("torch") else None
        return found

    names = ["torch_gram", "torch_qr", "fastapd_step", *house(op, given)[:1]]
    names = ["torch_svdvals", *names] if name == PRODUCTS and not given["quick"] else names
    flops, n_bytes = bench_batched_svd.exact_work(layer)
    known = contest(
        card, f"schatten/{name}", BOTH, Work(flops / 2, n_bytes, "float64"), (op, "schatten_accumulate"), given,
        n_bytes=n_bytes,
    )  # fmt: skip
    return compete(card, known, each(names, make))


# -------------------------------------------------------------------------------------------------------- unit length

ROWS = {"s1": (130, 50, 1000), "s3": (100_000, 1, 1024)}


def unit_length(card: Card, name: str, op: str, given: Settings) -> dict[str, Any]:
    """`unit_norm` and `remove_along`, both in place: a call changes nothing that was changed before."""
    shape = (1, *(min(n, 5) if card.rehearsal else n for n in ROWS[name]))
    generator = torch.Generator().manual_seed(0)
    rows, grad = (torch.randn(shape, generator=generator).to(card.device) for _ in range(2))
    if op == "remove_along":
        rows = plain.unit_norm(rows)
    exact = (
        (plain.unit_norm(rows.double()),) if op == "unit_norm" else (plain.remove_along(grad.double(), rows.double()),)
    )
    args = (rows,) if op == "unit_norm" else (grad, rows)
    form = plain.unit_norm if op == "unit_norm" else plain.remove_along
    public = unit_norm if op == "unit_norm" else remove_along
    default = chosen(op, args)

    def make(name: str) -> Candidate:
        skip_refused(op, name, args)
        mine = [t.clone() for t in args]
        if name == "upstream":
            function = lambda *ts: upstream_unit_length(op, *ts)  # noqa: E731
        elif name.startswith("torch"):
            function = compiled(form, card.device) if name == "torch_compile" else form
        else:
            function = public
        contender = Contender(lambda: function(*mine), ())
        return candidate(name, contender, FORWARD, list(exact), default)

    names = ["upstream", "torch", *(few(given, "torch_compile") if name == "s1" else ()), *house(op, given)]
    n_bytes = (2 if op == "unit_norm" else 3) * rows.nbytes
    work = Work((3 if op == "unit_norm" else 4) * rows.numel(), n_bytes)
    return compete(card, contest(card, f"{op}/{name}", FORWARD, work, (op,), given), each(names, make))


def upstream_unit_length(op: str, *ts: Tensor) -> Tensor:
    """The research formulation's lines, on rows."""
    if op == "unit_norm":
        (rows,) = ts
        rows /= rows.norm(p=2, dim=-1, keepdim=True)
        return rows
    grad, rows = ts
    along = torch.einsum("ncmi,ncmi->ncm", grad, rows)
    grad -= torch.einsum("ncm,ncmi->ncmi", along, rows)
    return grad
