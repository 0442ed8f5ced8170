"""What `fastapd plan` prints: which formulation a step's attributions take, what was weighed, and what it costs."""

from __future__ import annotations

import torch

from fastapd import attributions, backends
from fastapd._random import stream
from fastapd._refined import passes
from fastapd.components import Components
from fastapd.config import APD, RunConfig
from fastapd.experiments import targets
from fastapd.model import ComponentModel, Inputs, Record, find_sites
from fastapd.planning import ONES, Form, SiteChoice
from fastapd.report import format_table


def lines(config: RunConfig) -> list[str]:
    """The plan of a run's training step, line by line; the target need not be trained for it."""
    family = targets(config)
    target = family.untrained(config).to(getattr(torch, config.dtype))
    sites = find_sites(target, family.LAYERS)
    shapes = {site.name: site.shape for site in sites}
    generator = stream(config.seed, "components")
    components = Components(shapes, config.n_components, config.rank, config.n_instances, generator=generator)
    model = ComponentModel(target, sites, components.to(getattr(torch, config.dtype)))
    # What a value is does not matter, as long as nothing is empty: widths decide.
    x = torch.rand(config.n_instances, config.batch, config.target.n_features, dtype=getattr(torch, config.dtype))
    return describe(model, x, config.method)


def describe(model: ComponentModel, x: Inputs, method: APD | None = None) -> list[str]:
    """The plan for a batch like x, line by line.

    Args:
        model: A target with its components.
        x: A batch; values do not matter, sizes do.
        method: Whether gradients may be estimated; None for exact ones.
    """
    plan, components = model.plan(x), model.components
    layers = ", ".join(f"{s.name} {list(s.weight.shape[1:])}" for s in model.sites)
    record = model.record_target(x, differentiable=plan.form == "reverse")
    samples = next(iter(record.inputs.values())).shape[1]
    out = [
        f"target         {type(model.target).__name__}: {layers}",
        f"sizes          {components.n_instances} instances, batch {samples}, C {components.n_components}, "
        f"rank {components.rank}",
        f"attributions   {plan.form} form. {plan.reason[0].upper()}{plan.reason[1:]}.",
    ]
    op = "attribution_tangent" if plan.form == "tangent" else "attribution_reduce"
    forced = backends.forced_backends()
    out.append(
        f"op             {op}{f', forced to {chr(44).join(forced)}' if forced else ''} (`fastapd info` explains)"
    )
    if plan.form == "reverse":
        out.append(f"gradients      {_route(record, method, components.n_components)}")
        if method is not None and method.attribution_refined is not None and "estimate" in out[-1]:
            n = min(method.attribution_refined, components.n_components)
            by = f"{passes(model, x, samples, n)} directional derivatives"
            out.append(f"refined        the {n} largest of each sample, exactly, by {by}")
    if plan.costs:
        rows = [
            (form, f"{cost.flops / 1e9:.3g}", f"{cost.n_bytes / 1e6:.3g}", "chosen" if form == plan.form else "")
            for form, cost in plan.costs.items()
        ]
        out += ["", format_table(("form", "GFLOP a batch", "MB held", ""), rows)]
    if plan.sites:
        found = record.found
        assert found is not None
        form = model.form(found)
        widths = [value.shape[-1] for value in found.values]
        rows = [(s.name, _start(model, s, widths), _products(s), _ends(model, form, s)) for s in plan.sites]
        out += ["", format_table(("site", "tangents start from", "by", "and reach"), rows)]
        out += ["", f"between        {_links(model, form)}"]
    return out


def _route(record: Record, method: APD | None, n_components: int) -> str:
    way = attributions.route(record, None if method is None else method.attribution_probes, n_components)
    which = "before the last, wide matrix, of the same length" if way.narrowed else "of the target"
    outputs = f"{way.n_outputs} outputs a sample reaches, {which}"
    if way.estimate:
        how = f"an unbiased estimate from {way.n_directions} random directions over {outputs}"
    else:
        how = f"exact, {way.n_directions} vector-Jacobian products, one for each of {outputs}"
    return f"{how}; {way.chunk} at once, about {way.n_bytes / 1e6:.3g} MB held"


def _start(model: ComponentModel, site: SiteChoice, widths: list[int]) -> str:
    assert not isinstance(model.chain, str)
    names = ["ones [1]" if k == ONES else f"{_value(model, k)} [{widths[k]}]" for k in site.head]
    return " and ".join(names) + (", folded into A" if site.folded else "")


def _value(model: ComponentModel, number: int) -> str:
    assert not isinstance(model.chain, str)
    step = model.chain.steps[number]
    if step.kind == "input":
        return "the input"
    if step.kind != "elementwise":
        return f"{step.name}'s output"
    before = model.chain.steps[step.sources[0]]
    while before.kind == "shift":
        before = model.chain.steps[before.sources[0]]
    return f"{step.name} after {before.name}"


def _products(site: SiteChoice) -> str:
    return "A B, one product" if site.product else "A, then B"


def _barrier(model: ComponentModel, form: Form, j: int) -> str:
    if j == len(form.widths) - 1:
        return f"the output [{form.widths[j]}]"
    return f"{_value(model, form.barriers[j])} [{form.widths[j]}]"


def _ends(model: ComponentModel, form: Form, site: SiteChoice) -> str:
    tails = form.tails[site.name].items()
    return ", ".join(_barrier(model, form, j) + ("" if m is None else ", folded into B") for j, m in tails)


def _links(model: ComponentModel, form: Form) -> str:
    if not form.links:
        return "no nonlinearity before the output"
    return "; ".join(f"{_barrier(model, form, i)} to {_barrier(model, form, j)}" for i, j in sorted(form.links))
