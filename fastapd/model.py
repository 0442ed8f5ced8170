"""Runs any target with its decomposed layers replaced by masked component sums, and records what passes through them.

A *site* is a module of the target that multiplies by a matrix. `find_sites` matches modules by name; what a module type
needs to become a site is one row of `_ADAPTERS`: its matrix in y = x W orientation, its bias, and whether its inputs
already carry the instance axis. Everything else of the target runs as it is, so this is the seam for any `nn.Module`.
The target is never modified: a site's `forward` is shadowed for the length of one call. Not for several threads.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastapd._chain import Chain, NotAChainError, trace
from fastapd.components import Components, LayerShape
from fastapd.ops import Selection, component_forward, component_forward_selected, component_sum
from fastapd.ops._component_forward import forward_selected_into_gradients
from fastapd.planning import Form, Plan, Sizes, Values, choose, gated_linear_form

if TYPE_CHECKING:
    from jaxtyping import Float


class Linear(nn.Module):
    """y = x W for n_instances independent matrices W [n_instances, d_in, d_out], x [n_instances, batch, d_in]."""

    def __init__(self, n_instances: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_instances, d_in, d_out))

    def forward(self, x: Float[Tensor, "I b d_in"]) -> Float[Tensor, "I b d_out"]:
        return x @ self.weight


class TransposedLinear(nn.Module):
    """y = x W^T with the matrix of another `Linear`: the tied decoder of a toy model of superposition."""

    def __init__(self, owner: Linear) -> None:
        super().__init__()
        self._owner = [owner]  # in a list, so that the matrix is not registered twice

    @property
    def owner(self) -> Linear:
        return self._owner[0]

    def forward(self, x: Float[Tensor, "I b d_out"]) -> Float[Tensor, "I b d_in"]:
        return x @ self.owner.weight.mT


class _Adapter(NamedTuple):
    weight: Callable[[Any], Tensor]
    """The matrix as [n_instances, d_in, d_out]."""
    stored: Callable[[Tensor], Tensor] | None
    """A matrix [n_instances, d_in, d_out] as the module's own `weight` holds it; None if the module has none."""
    bias: Callable[[Any], Tensor | None]
    instances: bool
    """Whether inputs arrive as [n_instances, batch, d_in]; otherwise as [.., d_in], every row a sample."""


_ADAPTERS: dict[type[Any], _Adapter] = {
    Linear: _Adapter(lambda m: m.weight, lambda W: W, lambda m: None, True),
    TransposedLinear: _Adapter(lambda m: m.owner.weight.mT, None, lambda m: None, True),
    nn.Linear: _Adapter(lambda m: m.weight.mT.unsqueeze(0), lambda W: W[0].mT, lambda m: m.bias, False),
}


class Site(NamedTuple):
    """A decomposed layer of the target."""

    name: str
    module: nn.Module
    adapter: _Adapter
    tied_to: str | None

    @property
    def weight(self) -> Float[Tensor, "I d_in d_out"]:
        """The target's matrix, detached, in y = x W orientation."""
        return self.adapter.weight(self.module).detach()

    @property
    def shape(self) -> LayerShape:
        _, d_in, d_out = self.weight.shape
        return LayerShape(d_in, d_out, self.tied_to)

    def state(self, weight: Float[Tensor, "I d_in d_out"]) -> dict[str, Tensor]:
        """What the target's state dict holds if this is the layer's matrix; a tied layer has none there."""
        if self.adapter.stored is None:
            return {}
        own: Any = self.module.weight
        return {f"{self.name}.weight": self.adapter.stored(weight).to(own.dtype)}

    def to_instances(self, x: Tensor) -> Float[Tensor, "I b d"]:
        return x if self.adapter.instances else x.reshape(1, -1, x.shape[-1])

    def from_instances(self, y: Float[Tensor, "I b d_out"], x: Tensor) -> Tensor:
        """The layer's output as the target expects it for input x, bias added."""
        bias = self.adapter.bias(self.module)
        y = y if bias is None else y + bias.detach()
        return y if self.adapter.instances else y.reshape(*x.shape[:-1], y.shape[-1])


def find_sites(target: nn.Module, patterns: Sequence[str]) -> list[Site]:
    """The modules of `target` whose names match a pattern, as sites in the target's order.

    Args:
        target: Any module.
        patterns: fnmatch patterns over `named_modules`, e.g. ["linear1", "layers.*.mlp_in"].

    Raises:
        ValueError: If a pattern matches nothing, with the names there are.
        TypeError: If a matched module is not of a type that can be decomposed.
    """
    modules = {name: module for name, module in target.named_modules() if name}
    chosen: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(modules, pattern)
        if not matched:
            raise ValueError(
                f"find_sites: pattern {pattern!r} must match a module, the target has {', '.join(modules)}"
            )
        chosen.update(matched)
    sites = []
    owners: dict[int, str] = {}
    for name in (n for n in modules if n in chosen):
        module = modules[name]
        adapter = _ADAPTERS.get(type(module))
        if adapter is None:
            known = ", ".join(t.__module__.split(".")[0] + "." + t.__name__ for t in _ADAPTERS)
            raise TypeError(f"find_sites: {name} must be one of {known}, got {type(module).__name__}")
        tied_to = owners.get(id(module.owner)) if isinstance(module, TransposedLinear) else None
        owners[id(module)] = name
        sites.append(Site(name, module, adapter, tied_to))
    if len({s.weight.shape[0] for s in sites}) > 1:
        raise ValueError("find_sites: all sites must have the same n_instances")
    return sites


def version(t: Tensor) -> int:
    """How often a tensor was written to, as far as torch counts it."""
    return 0 if t.is_inference() else t._version


@contextlib.contextmanager
def _replaced(sites: Sequence[Site], layer: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
    """For the length of a with block, each site computes `layer(site, x)`."""
    own = [site.module.__dict__.get("forward") for site in sites]  # what others put there; usually nothing
    try:
        for site in sites:
            site.module.__dict__["forward"] = lambda x, site=site: layer(site, x)
        yield
    finally:
        for site, before in zip(sites, own, strict=True):
            site.module.__dict__.pop("forward", None)
            if before is not None:
                site.module.__dict__["forward"] = before


class Record(NamedTuple):
    """What passed through the sites: the target's output, and each site's inputs and outputs before the bias.

    Attributes:
        found: Where the target is a chain, the values of all its steps and the matrices of the sites.
    """

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    found: Values | None = None


class ComponentModel:
    """A target together with components for some of its layers.

    Args:
        target: Any module; run in evaluation mode by the caller if that matters.
        sites: From `find_sites(target, ...)`.
        components: Their components.

    Raises:
        ValueError: If the components do not fit the sites.
    """

    def __init__(self, target: nn.Module, sites: Sequence[Site], components: Components) -> None:
        for site in sites:
            if components.layers.get(site.name) != site.shape or components.n_instances != site.weight.shape[0]:
                raise ValueError(
                    f"ComponentModel: components must have a layer {site.name} {tuple(site.weight.shape)} "
                    f"[n_instances, d_in, d_out], got {components.extra_repr()}"
                )
        self.target, self.sites, self.components = target, list(sites), components
        self._threshold: Tensor | None = None
        self._by_name = {site.name: site for site in self.sites}
        self._chain_checked = False
        self._plans: dict[Any, Plan] = {}
        self._form: Form | None = None
        self._form_key: list[tuple[int, int]] = []
        self._form_of: list[Tensor] = []

    @property
    def weights(self) -> dict[str, Tensor]:
        """The target's matrices, detached, [n_instances, d_in, d_out]."""
        return {site.name: site.weight for site in self.sites}

    @property
    def n_params(self) -> int:
        """Decomposed parameters of one instance; a tied matrix counts as often as it is used."""
        return sum(math.prod(site.weight.shape[1:]) for site in self.sites)

    def to_instances(self, output: Tensor) -> Float[Tensor, "I b o"]:
        """The target's output with one axis of samples for each instance, whatever axes it has."""
        return output.reshape(self.components.n_instances, -1, output.shape[-1])

    def threshold(self, attributions: Float[Tensor, "I b C"]) -> Float[Tensor, " I"]:
        """Where the last selection from attributions like these ended, a hint for the next; NaN at first."""
        like = attributions.shape[:1], attributions.dtype, attributions.device
        known = self._threshold
        if known is None or (known.shape, known.dtype, known.device) != like:
            known = self._threshold = attributions.new_full(attributions.shape[:1], math.nan)
        return known

    def kept(self) -> tuple[Any, ...]:
        """What one step leaves for the next to read, beside parameters: the chain's form and the threshold."""
        return self._form, self._threshold

    def forward(
        self,
        x: Tensor,
        active: Selection | Tensor | None = None,
        always_on: int = 0,
        accumulate: bool = False,
        known: Values | None = None,
    ) -> Record:
        """Runs the target on component sums.

        Args:
            x: The target's input.
            active: Which components run: a `Selection`, a mask [n_instances, batch, C] of any weights, or None for all.
            always_on: With a selection, how many components at the end run on every sample; the selection is then one
                of the others alone.
            accumulate: With a selection, whether the backward pass adds the factors' gradients to those of the
                components itself, instead of handing them to autograd.
            known: From a record of the target on the same x: what comes before all sites is not computed again.

        Returns:
            The output and what passed through the sites, differentiable in the components.
        """
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def layer(site: Site, x: Tensor) -> Tensor:
            A, B = self.components.factors(site.name)
            rows = site.to_instances(x)
            if isinstance(active, Selection) and accumulate and not always_on:
                stored, gradients = self.components.stored(site.name), self.components.gradients(site.name)
                y = forward_selected_into_gradients(rows, *stored, active, *gradients)
            elif isinstance(active, Selection):
                ranked = A.shape[1] - always_on
                y = component_forward_selected(rows, A[:, :ranked], B[:, :ranked], active)
                if always_on:
                    y = y + rows @ component_sum(A[:, ranked:], B[:, ranked:])
            elif active is None:
                y = rows @ self.components.weight(site.name)
            else:
                y = component_forward(rows, A, B, active)
            inputs[site.name], outputs[site.name] = rows, y
            return site.from_instances(y, x)

        return Record(self._run(x, layer, known)[0], inputs, outputs)

    def record_target(self, x: Tensor, differentiable: bool = False, of_components: bool = False) -> Record:
        """Runs the target itself and records its sites.

        Args:
            x: The target's input.
            differentiable: Whether the output can be differentiated by the recorded site outputs. Parameters of the
                target never receive gradients.
            of_components: Record the component model with all components on instead; its weights count as constants.
        """
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}

        def layer(site: Site, x: Tensor) -> Tensor:
            rows = site.to_instances(x)
            weights[site.name] = self.components.weight(site.name).detach() if of_components else site.weight
            y = rows @ weights[site.name]
            if differentiable and not y.requires_grad:
                y.requires_grad_()
            inputs[site.name], outputs[site.name] = rows.detach(), y
            return site.from_instances(y, x)

        with torch.set_grad_enabled(differentiable):
            output, values = self._run(x, layer)
        return Record(output, inputs, outputs, None if values is None else Values(values, weights))

    def _run(
        self, x: Tensor, layer: Callable[[Site, Tensor], Tensor], known: Values | None = None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """The target's output with its sites replaced, and the values of its chain if it is one."""

        def target() -> Tensor:
            with _replaced(self.sites, layer):
                return self.target(x)

        if isinstance(self.chain, str):
            return target(), None
        expected = None if self._chain_checked else target()
        given = None if known is None else known.values
        values = self.chain.run(x, lambda name, rows: layer(self._by_name[name], rows), given)
        output = values[-1]
        if expected is not None and (reason := self.chain.irregularity(values, self.components.n_instances)):
            self.chain = reason
            return target(), None
        if expected is not None and expected.numel():
            if output.shape != expected.shape or not torch.allclose(output, expected, 1e-5, 1e-6, equal_nan=True):
                self.chain = "run by itself it gives another output than what was traced of it"
                return target(), None
            self._chain_checked = True
        return output, values

    @functools.cached_property
    def chain(self) -> Chain | str:
        """The target as a chain of linear maps and nonlinearities, or why it is none.

        Its first output is compared with the target's own. The target must not change its structure afterwards; its
        parameters may.
        """
        if len({site.adapter.instances for site in self.sites}) > 1:
            return "only some of its layers have an axis of instances"
        linears = {
            kind: (lambda m, adapter=adapter: adapter.weight(m), lambda m, adapter=adapter: adapter.bias(m))
            for kind, adapter in _ADAPTERS.items()
        }
        try:
            return trace(self.target, {site.name: site.module for site in self.sites}, linears)
        except NotAChainError as error:
            return str(error)

    def plan(self, x: Tensor) -> Plan:
        """How gradient attributions of a batch like x are computed; decided once for every shape."""
        key = (tuple(x.shape), x.dtype, x.device)
        if key not in self._plans:
            found = None if isinstance(self.chain, str) else self.record_target(x).found
            if found is None:
                reason = self.chain if isinstance(self.chain, str) else "its batch is empty"
                return Plan("reverse", f"the target is not a chain of linear maps and nonlinearities: {reason}", (), {})
            n_rows = self.sites[0].to_instances(x).shape[1]
            c = self.components
            sizes = Sizes(c.n_instances, n_rows, c.n_components, c.rank, x.element_size())
            assert not isinstance(self.chain, str)
            self._plans[key] = choose(self.form(found), self.chain, found, sizes)
        return self._plans[key]

    def form(self, found: Values) -> Form:
        """The chain's gated linear form; kept until a constant of the target changes."""
        assert not isinstance(self.chain, str)
        constants = [get() for get in self.chain.constants]  # what is computed from them is another tensor every time
        constants += found.weights.values()
        key = [(t.data_ptr(), version(t)) for t in constants]
        if key != self._form_key:
            self._form, self._form_key = gated_linear_form(self.chain, found), key
            self._form_of = constants  # kept, so that no other tensor comes to lie where one of them was
        assert self._form is not None
        return self._form
