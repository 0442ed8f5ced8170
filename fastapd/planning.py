"""Which exact formulation of the gradient attributions is the cheapest for a target, a batch and its components.

A target that is a chain (`_chain`) has a *gated linear form*: its nonlinearities, and last its output, are barriers;
from what a component's weights write, and from one barrier to a later one, lead linear paths that are the same for
every sample and are multiplied out once. Then there are these choices:

    tangent   attributions by `ops.attribution_tangent`, no output gradients at all; for every site
                head     its input itself, or, where the input is a linear image of narrower values, those values, with
                         the linear map folded into A
                factors  two products with A and B, or one with A B, summed over the sites that share input and barrier
    reverse   gradients of every output by batched vector-Jacobian products, then `ops.attribution_reduce`; for targets
              that are no chain, and where few outputs make it cheaper

All of them are exact. `Plan` holds the choice with its flops and bytes; `fastapd plan` prints it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastapd._chain import Chain
from fastapd.ops import TangentBarrier, TangentSource, attribution_tangent
from fastapd.ops._thin_product import product

if TYPE_CHECKING:
    from jaxtyping import Float

    from fastapd.components import Components

PRODUCT_ELEMENTS = 1 << 26
"""The largest product A B of all components that is worth holding."""

SITES_TO_ENUMERATE = 5
"""Up to so many sites all combinations of choices are compared; beyond, each site chooses for itself."""

Paths = dict[int, Tensor | None]
"""From the number of a value or barrier, the matrix [I or 1, width there, width here] that leads here; None is one."""


def _through(paths: Paths, matrix: Tensor) -> Paths:
    return {k: matrix if m is None else m @ matrix for k, m in paths.items()}


def _merged(a: Paths, b: Paths, like: Tensor) -> Paths:
    """The sum of two sets of paths; `like` has the width here, dtype and device."""
    out = dict(a)
    for k, m in b.items():
        if k in out:
            one = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)[None]
            own = out[k]
            out[k] = (one if own is None else own) + (one if m is None else m)
        else:
            out[k] = m
    return out


class Values(NamedTuple):
    """A chain's values on one batch, and the matrices its sites multiplied by."""

    values: list[Tensor]
    weights: dict[str, Tensor]


class Form(NamedTuple):
    """The gated linear form of a chain.

    Attributes:
        barriers: The numbers of the steps whose nonlinearities are barriers; the output is one more, unless its own
            step is the last of these.
        widths: Of all barriers.
        heads: For each site, the paths to its input from values that are not linear images of others.
        tails: For each site and barrier, the matrix from what the site writes; None is the identity.
        links: For each pair of barriers, the matrix between them.
    """

    barriers: list[int]
    widths: list[int]
    heads: dict[str, Paths]
    tails: dict[str, dict[int, Tensor | None]]
    links: dict[tuple[int, int], Tensor]


ONES = -1
"""Stands among the values of a head for a column of ones: what constants add."""


@torch.no_grad()
def gated_linear_form(chain: Chain, found: Values) -> Form:
    """Multiplies out the linear paths of a chain.

    Args:
        chain: From `_chain.trace`.
        found: Values of any batch, of which only widths are read, and the matrices of the sites.
    """
    value_paths: list[Paths] = []  # how each value follows from inputs and outputs of nonlinearities
    tangent_paths: list[dict[str | int, Tensor | None]] = []  # how its tangent follows from sites and barriers
    barriers: list[int] = []
    into: list[dict[str | int, Tensor | None]] = []  # of every barrier
    heads: dict[str, Paths] = {}
    last = len(chain.steps) - 1
    for number, step in enumerate(chain.steps):
        value = found.values[number]
        own: Paths = {}
        tangent: dict = {}
        if step.kind == "input":
            own = {number: None}
        elif step.kind == "add":
            a, b = step.sources
            own = _merged(value_paths[a], value_paths[b], value)
            tangent = _merged(tangent_paths[a], tangent_paths[b], value)  # type: ignore[arg-type]
        else:
            (source,) = step.sources
            own, tangent = value_paths[source], tangent_paths[source]
            if step.kind == "elementwise":
                if tangent:
                    into.append(tangent)
                    tangent = {len(barriers): None}
                    barriers.append(number)
                own = {number: None}
            elif step.kind in ("site", "linear"):
                matrix = found.weights[step.name] if step.kind == "site" else _batched(step.matrix().detach())  # type: ignore[misc]
                if step.kind == "site":
                    heads[step.name] = own
                elif number == last and matrix.shape[-1] > matrix.shape[-2]:
                    # lengths are all that is asked of the output, so a wide last matrix counts by its triangular factor
                    wide = matrix.mT if matrix.dtype == torch.float64 else matrix.mT.float()
                    matrix = torch.linalg.qr(wide, mode="r").R.mT.to(matrix.dtype)
                own, tangent = _through(own, matrix), _through(tangent, matrix)
            if step.kind == "site":
                tangent = {**tangent, step.name: None}
            if step.constant is not None and number != last:
                shift = _batched(step.constant().detach())
                own = _merged(own, {ONES: shift.expand(shift.shape[0], 1, value.shape[-1])}, value)
        value_paths.append(own)
        tangent_paths.append(tangent)
    if not barriers or barriers[-1] != last:
        into.append(tangent_paths[last])
    widths = [_width(paths, found, barriers, k) for k, paths in enumerate(into)]
    tails: dict[str, dict[int, Tensor | None]] = {name: {} for name in heads}
    links: dict[tuple[int, int], Tensor] = {}
    for j, paths in enumerate(into):
        for start, matrix in paths.items():
            if isinstance(start, str):
                tails[start][j] = matrix
            elif matrix is None:
                links[start, j] = torch.eye(widths[j], dtype=found.values[0].dtype, device=found.values[0].device)[None]
            else:
                links[start, j] = matrix
    return Form(barriers, widths, heads, tails, links)


def _width(paths: dict, found: Values, barriers: list[int], number: int) -> int:
    for matrix in paths.values():
        if matrix is not None:
            return matrix.shape[-1]
    step = barriers[number] if number < len(barriers) else -1
    return found.values[step].shape[-1]


def _batched(t: Tensor) -> Tensor:
    """With a leading axis of instances and an axis of rows."""
    while t.dim() < 3:
        t = t.unsqueeze(0)
    return t


class SiteChoice(NamedTuple):
    """What a plan does with one site.

    Attributes:
        name: The site.
        head: The values that its tangents start from: its input's number, or those its input is linear in.
        folded: Whether the linear map from those values to the input is folded into A.
        product: One product with A B; otherwise two, with A and with B.
    """

    name: str
    head: tuple[int, ...]
    folded: bool
    product: bool


class Cost(NamedTuple):
    """Of the attributions of one batch.

    Attributes:
        flops: Floating-point operations.
        n_bytes: The largest amount of memory held at once beyond inputs and result.
    """

    flops: int
    n_bytes: int


class Plan(NamedTuple):
    """A choice, and what was weighed.

    Attributes:
        form: "tangent" or "reverse".
        reason: Why, in words.
        sites: The choices for each site; empty in reverse form.
        costs: Of both forms, where the target is a chain.
    """

    form: str
    reason: str
    sites: tuple[SiteChoice, ...]
    costs: dict[str, Cost]


class Sizes(NamedTuple):
    """What costs depend on."""

    n_instances: int
    batch: int
    n_components: int
    rank: int
    itemsize: int


def _reverse_cost(form: Form, chain: Chain, found: Values, sizes: Sizes) -> Cost:
    """Vector-Jacobian products for every output, then the reduction."""
    rows = sizes.n_instances * sizes.batch
    n_outputs = found.values[-1].shape[-1]
    entries = sum(
        found.values[step.sources[0]].shape[-1] * found.values[k].shape[-1]
        for k, step in enumerate(chain.steps)
        if step.kind in ("site", "linear")
    )
    sites = [found.weights[name].shape for name in form.tails]
    factors = sizes.rank * sum(s[-2] + s[-1] for s in sites)
    width = sum(s[-1] for s in sites)
    flops = 2 * rows * n_outputs * entries + 2 * rows * sizes.n_components * (factors + n_outputs * width)
    return Cost(flops, rows * n_outputs * width * sizes.itemsize)


def _options(form: Form, chain: Chain) -> list[list[tuple[tuple[int, ...], bool, bool]]]:
    """For every site what it may choose: head, folded, product."""
    inputs = {step.name: step.sources[0] for step in chain.steps if step.kind == "site"}
    every = []
    for name, head in form.heads.items():
        heads: list[tuple[tuple[int, ...], bool]] = [((inputs[name],), False)]
        if list(head.items()) != [(inputs[name], None)]:
            heads.append((tuple(sorted(head)), True))
        every.append([(*h, product) for h in heads for product in (False, True)])
    return every


def _tangent_cost(form: Form, found: Values, sizes: Sizes, choice: Sequence[SiteChoice]) -> Cost | None:
    """None if a product would be too large."""
    n, C, m = sizes.n_instances, sizes.n_components, sizes.rank
    pairs = n * sizes.batch * C
    once, each, held = 0, 0, 0
    products: set[tuple[tuple[int, ...], int]] = set()
    for site in choice:
        d_in, d_out = found.weights[site.name].shape[-2:]
        width = sum(1 if k == ONES else found.values[k].shape[-1] for k in site.head)
        if site.folded:
            once += n * C * m * d_in * width
            held += n * C * m * width + n * sizes.batch * width
        if not site.product:
            each += width * m
        for j, tail in form.tails[site.name].items():
            if tail is not None:
                once += n * C * m * d_out * form.widths[j]
                held += n * C * m * form.widths[j]
            if site.product:
                size = n * C * width * form.widths[j]
                if size > PRODUCT_ELEMENTS:
                    return None
                once += size * m
                if (site.head, j) not in products:
                    held += size
                    each += width * form.widths[j]
                products.add((site.head, j))
            else:
                each += m * form.widths[j]
    each += sum(L.shape[-2] * L.shape[-1] for L in form.links.values())
    return Cost(2 * (once + each * pairs), held * sizes.itemsize)


def _best_tangent(form: Form, chain: Chain, found: Values, sizes: Sizes) -> tuple[tuple[SiteChoice, ...], Cost]:
    names = list(form.heads)
    options = _options(form, chain)
    if len(names) > SITES_TO_ENUMERATE:
        options = [[_alone(form, found, sizes, name, own)] for name, own in zip(names, options, strict=True)]
    best: tuple[tuple[SiteChoice, ...], Cost] | None = None
    for combination in itertools.product(*options):
        choice = tuple(SiteChoice(name, *own) for name, own in zip(names, combination, strict=True))
        cost = _tangent_cost(form, found, sizes, choice)
        if cost is not None and (best is None or cost.flops < best[1].flops):
            best = choice, cost
    assert best is not None, "factors are never too large"
    return best


def _alone(form: Form, found: Values, sizes: Sizes, name: str, options: list) -> tuple:
    def flops(own: tuple) -> float:
        cost = _tangent_cost(form, found, sizes, [SiteChoice(name, *own)])
        return math.inf if cost is None else cost.flops

    return min(options, key=flops)


def choose(form: Form, chain: Chain, found: Values, sizes: Sizes) -> Plan:
    """The cheapest exact formulation for a chain.

    Args:
        form: Of the chain.
        found: Its values on a batch; only widths are read.
        sizes: Of the batch and the components.
    """
    sites, tangent = _best_tangent(form, chain, found, sizes)
    costs = {"tangent": tangent, "reverse": _reverse_cost(form, chain, found, sizes)}
    if costs["reverse"].flops < tangent.flops:
        return Plan("reverse", "few outputs: their gradients cost less than tangents", (), costs)
    return Plan("tangent", "a chain of linear maps and nonlinearities: no output gradients are needed", sites, costs)


Rows = Callable[[Tensor], Tensor]
"""A value as [n_instances, batch, width]."""


def attributions(
    plan: Plan, form: Form, chain: Chain, found: Values, components: Components, rows: Rows
) -> Float[Tensor, "I b C"]:
    """Attributions by a plan in tangent form, differentiable in the components."""
    inputs: dict[tuple[int, ...], Tensor] = {}
    sources: list[TangentSource] = []
    products: dict[tuple[int, ...], dict[int, Tensor]] = {}
    for site in plan.sites:
        A, B = components.factors(site.name)
        if site.head not in inputs:
            inputs[site.head] = _head_values(site.head, found, rows)
        if site.folded:
            A = _times(A.mT, _head_matrix(form.heads[site.name], site.head, A).mT).mT
        into = {j: B if tail is None else _times(B, tail) for j, tail in form.tails[site.name].items()}
        if site.product:
            sums = products.setdefault(site.head, {})
            for j, F in into.items():
                P = _product(A, F)
                sums[j] = sums[j] + P if j in sums else P
        else:
            sources.append(TangentSource(inputs[site.head], A, into))
    sources += [TangentSource(inputs[head], None, into) for head, into in products.items()]
    barriers = []
    for j, width in enumerate(form.widths):
        gate = _gate(chain, found, form.barriers[j], rows) if j < len(form.barriers) else None
        onward = {end: L for (start, end), L in form.links.items() if start == j}
        barriers.append(TangentBarrier(width, gate, onward))
    return attribution_tangent(sources, barriers)


def _times(factor: Tensor, matrix: Tensor) -> Tensor:
    """Each component's rows [I, C, m, d] times a matrix [I or 1, d, e] that all share, as one product."""
    return _product(factor.flatten(1, 2), matrix.expand(factor.shape[0], -1, -1)).unflatten(1, factor.shape[1:3])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices with the same leading axes."""
    leading = a.shape[:-2]
    return product(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, leading)


def _head_values(head: tuple[int, ...], found: Values, rows: Rows) -> Float[Tensor, "I b width"]:
    parts = [rows(found.values[k]).detach() for k in head if k != ONES]
    if ONES in head:
        parts.insert(0, parts[0].new_ones(*parts[0].shape[:2], 1))  # it sorts first
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _head_matrix(paths: Paths, head: tuple[int, ...], A: Tensor) -> Tensor:
    """[I or 1, width of the head, d_in]."""
    blocks = []
    for k in head:
        matrix = paths[k]
        blocks.append(torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)[None] if matrix is None else matrix)
    n = max(block.shape[0] for block in blocks)
    return torch.cat([block.expand(n, -1, -1) for block in blocks], -2) if len(blocks) > 1 else blocks[0]


def _gate(chain: Chain, found: Values, number: int, rows: Rows) -> Float[Tensor, "I b width"]:
    """The derivative of a nonlinearity at its input."""
    step = chain.steps[number]
    assert step.function is not None
    if step.is_relu:
        return rows(found.values[number].detach().sign())  # of no negative numbers, in one operation
    with torch.enable_grad():
        x = found.values[step.sources[0]].detach().requires_grad_()
        y = step.function(x)
        (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return rows(slope)
