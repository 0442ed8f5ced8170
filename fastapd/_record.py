"""What passes through the sites of a target in one run, and what computes in their place.

A *use* is one product with a site's matrix. Most sites have one, x W; tied roles, layers that run again, transposes and
looked-up rows are told apart here, so that attributions sum over all of them inside the square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastapd._intercept import PLAIN, Role
from fastapd._sites import Site
from fastapd.components import Components
from fastapd.planning import Values


class Use(NamedTuple):
    """One product with a site's matrix, where it is more than the site's only one.

    Attributes:
        site: The name of the site.
        transposed: Whether it is a product with the transpose.
        ids: For rows that were looked up: which occur, in order; the recorded inputs are one-hot among these.
        at: For rows that were looked up: their numbers, one a sample.
    """

    site: str
    transposed: bool = False
    ids: Tensor | None = None
    at: Tensor | None = None


class Call(NamedTuple):
    """One product with a decomposed matrix, in one run of the target.

    Attributes:
        key: The site's name; `name#2`, `name#3` and so on where the same run comes back to it.
        use: Which matrix, and how.
        rows: The input [n_instances, batch, d].
        shape: Of the input as the target hands it over: of numbers to be looked up, or of vectors.
    """

    key: str
    use: Use
    rows: Tensor
    shape: torch.Size

    def factors(self, components: Components) -> tuple[Tensor, Tensor]:
        """The factors [I, C, d, m], [I, C, m, e] that `rows` are multiplied by."""
        return of_use(components, self.use)

    def matrix(self, weight: Tensor) -> Tensor:
        """Of a matrix of the site's shape [I, d_in, d_out], what `rows` are multiplied by."""
        weight = weight.mT if self.use.transposed else weight
        return weight if self.use.ids is None else weight.index_select(1, self.use.ids)


Inputs = Tensor | Mapping[str, Any]
"""What a target is called with: one tensor, or its arguments by name."""


def leading(x: Inputs) -> Tensor:
    """The tensor whose first axis is the batch: the first of those given."""
    if isinstance(x, Tensor):
        return x
    for value in x.values():
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"decompose: data must yield tensors, got a dict of {', '.join(map(str, x)) or 'nothing'}")


class Record(NamedTuple):
    """What passed through the sites: the target's output, and each site's inputs and outputs before the bias.

    A site that runs again in the same call, or is used in another way than once as x W, is recorded under its name
    with `#2`, `#3` and so on, and `uses` says what that was.

    Attributes:
        found: Where the target is a chain, the values of all its steps and the matrices of the sites.
        uses: What is not its site's plain product x W, by the keys of `inputs` and `outputs`.
        axes: How many leading axes of the output count samples that do not depend on each other; None for all but
            the last.
        measured: In place of the output where only the lengths of its gradients matter: narrower, of equal lengths.
    """

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    found: Values | None = None
    uses: Mapping[str, Use] = MappingProxyType({})
    axes: int | None = None
    measured: Tensor | None = None


def factors(components: Components, record: Record, key: str) -> tuple[Tensor, Tensor]:
    """The factors [I, C, d, m], [I, C, m, e] that one recorded product is made with; of looked-up rows, the rows."""
    use = record.uses.get(key)
    return components.factors(key) if use is None else of_use(components, use)


def of_use(components: Components, use: Use) -> tuple[Tensor, Tensor]:
    A, B = components.factors(use.site)
    if use.transposed:
        A, B = B.mT, A.mT
    return A if use.ids is None else A.index_select(2, use.ids), B


def applied(use: Use, rows: Tensor, W: Tensor) -> Tensor:
    if use.at is not None:
        return W.index_select(1, use.at)
    return rows @ (W.mT if use.transposed else W)


class Pass:
    """Takes the place of the sites in one run of the target.

    Args:
        components: Of which only the layers' shapes are read.
        mixed: The components' dtype and the target's, if they differ.
        compute: (key, use or None for a plain one, rows [I, b, d_in]) -> [I, b, d_out].
    """

    def __init__(
        self,
        components: Components,
        mixed: tuple[torch.dtype, torch.dtype] | None,
        compute: Callable[[str, Use | None, Tensor], Tensor],
    ) -> None:
        self._layers, self._mixed, self._compute = components.layers, mixed, compute
        self.same_samples = True  # whether all sites must see the same number of samples
        self.scale: list[Tensor] = []  # by which gradients in half precision are larger than they are
        self.begin()

    def begin(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.uses: dict[str, Use] = {}
        self.shape = torch.Size()  # of the input, as the target hands it over, of the site that is computing

    def __call__(self, site: Site, x: Tensor, role: Role = PLAIN) -> Tensor:
        self.shape = x.shape
        if role is not PLAIN or site.name in self.inputs:
            return self._unusual(site, x, role)
        self._check(site, x, False)
        y = site.from_instances(self._product(site.name, None, site.to_instances(x)), x)
        return y if self._mixed is None else y.to(self._mixed[1])

    def _product(self, key: str, use: Use | None, rows: Tensor) -> Tensor:
        """Computes and records; in the components' dtype, whatever the target's is."""
        if self._mixed is None:
            y = self._compute(key, use, rows)
            self.inputs[key], self.outputs[key] = rows, y
            return y
        rows = rows.to(self._mixed[0])
        self.inputs[key] = rows
        y = self._compute(key, use, ScaledGradient.apply(rows, self.scale, "up") if self.scale else rows)
        self.outputs[key] = y
        return ScaledGradient.apply(y, self.scale, "down") if self.scale else y

    def _check(self, site: Site, x: Tensor, transposed: bool) -> None:
        layer = self._layers[site.name]
        width = layer.d_out if transposed else layer.d_in
        if x.shape[-1] != width:
            raise ValueError(
                f"decompose: data must give {site.name} inputs of width {width}, got shape {list(x.shape)}; "
                "the last axis is the one that is multiplied"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"decompose: data must give {site.name} floating-point inputs, got {x.dtype}; "
                "only an embedding takes whole numbers"
            )

    def _unusual(self, site: Site, x: Tensor, role: Role) -> Tensor:
        count = 1 + sum((self.uses[key].site if key in self.uses else key) == site.name for key in self.inputs)
        key = site.name if count == 1 else f"{site.name}#{count}"
        if not role.ids:
            self._check(site, x, role.transposed)
            self.uses[key] = Use(site.name, role.transposed)
            y = self._product(key, self.uses[key], site.to_instances(x))
            y = y.reshape(*x.shape[:-1], y.shape[-1]) if site.is_parameter else site.from_instances(y, x)
            return y if self._mixed is None else y.to(self._mixed[1])
        if x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"decompose: data must give {site.name} whole numbers, got {x.dtype}")
        at = x.reshape(-1)
        n = self._layers[site.name].d_in
        ids, inverse = torch.unique(at, return_inverse=True)
        if at.numel() and not 0 <= int(ids[0]) <= int(ids[-1]) < n:
            raise ValueError(
                f"decompose: data must give {site.name} numbers in [0, {n}), got {int(ids[0])} to {int(ids[-1])}"
            )
        self.uses[key] = Use(site.name, False, ids, at)
        weight = site.weight
        rows = torch.zeros(at.shape[0], ids.shape[0], dtype=weight.dtype, device=weight.device)
        rows.scatter_(1, inverse[:, None], 1)
        y = self._product(key, self.uses[key], rows[None])
        return y.reshape(*x.shape, y.shape[-1]).to(weight.dtype)


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is brought to where float16 has room, or back from there.

    Args:
        x: Any values in float32.
        scale: One number, by which gradients are larger than they are while they pass through the target.
        what: "begin" chooses the scale, so that the largest gradient is 1; "up" multiplies by it; "down" divides.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: list[Tensor], what: str) -> Tensor:
        ctx.scale, ctx.what = scale, what
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (g,) = grads
        if ctx.what == "begin":
            largest = g.abs().amax() if g.numel() else g.new_zeros(())
            ctx.scale[0] = torch.where(largest > 0, 1 / largest.clamp(1e-30, 1e30), 1.0)
        return g / ctx.scale[0] if ctx.what == "down" else g * ctx.scale[0], None, None
