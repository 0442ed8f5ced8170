"""What of a model can be decomposed, and under which name: modules that multiply by a matrix, and matrices by name.

What a module type needs to become a site is an `Adapter`: its matrix in y = x W orientation, its bias, and what its
inputs look like. A matrix that a module holds without being a layer of a known type (`W_in`, `W_out`) is a site too:
`_intercept` finds the products it is used in.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fastapd.components import LayerShape

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


class Adapter(NamedTuple):
    weight: Callable[[Any], Tensor]
    """The matrix as [n_instances, d_in, d_out]."""
    held: Callable[[Any], Tensor]
    """The tensor that the matrix is a view of; two sites that hold the same one are tied."""
    stored: Callable[[Tensor], Tensor] | None
    """A matrix [n_instances, d_in, d_out] as the module's own tensor holds it; None if the module has none."""
    bias: Callable[[Any], Tensor | None]
    instances: bool = False
    """Whether inputs arrive as [n_instances, batch, d_in]; otherwise as [.., d_in], every row a sample."""
    transposed: bool = False
    """Whether the matrix is the transpose of what is held."""
    ids: bool = False
    """Whether inputs are the numbers of rows."""


def _no_bias(module: Any) -> None:
    return None


def _weight(module: Any) -> Tensor:
    return module.weight


_ADAPTERS: dict[type[Any], Adapter] = {
    Linear: Adapter(_weight, _weight, lambda W: W, _no_bias, instances=True),
    TransposedLinear: Adapter(
        lambda m: m.owner.weight.mT, lambda m: m.owner.weight, None, _no_bias, instances=True, transposed=True
    ),
    nn.Linear: Adapter(
        lambda m: m.weight.mT.unsqueeze(0), _weight, lambda W: W[0].mT, lambda m: m.bias, transposed=True
    ),
    nn.Embedding: Adapter(lambda m: m.weight.unsqueeze(0), _weight, lambda W: W[0], _no_bias, ids=True),
}
# y = x W + b with W [d_in, d_out], as Hugging Face's GPT-2 has it; known by its looks, so that nothing is imported
_CONV1D = Adapter(lambda m: m.weight.unsqueeze(0), _weight, lambda W: W[0], lambda m: m.bias)


def adapter_of(module: nn.Module) -> Adapter | None:
    """How a module is a site, or None if it is none."""
    kind = parametrize.type_before_parametrizations(module)
    if kind.__name__ == "Conv1D" and kind.__module__.split(".")[0] != "torch" and hasattr(module, "nf"):
        weight = getattr(module, "weight", None)
        return _CONV1D if isinstance(weight, Tensor) and weight.dim() == 2 else None
    return _ADAPTERS.get(kind)


def _parameter_adapter(attribute: str) -> Adapter:
    def held(module: Any) -> Tensor:
        return module._parameters[attribute]  # the attribute itself is another thing while the model runs

    return Adapter(lambda m: held(m).unsqueeze(0), held, lambda W: W[0], _no_bias)


class Site(NamedTuple):
    """A decomposed layer of the target.

    Attributes:
        tied_to: The earlier site that holds the same matrix.
        flipped: Whether this one's is the transpose of that.
        attribute: What the module holds the matrix as; "" for what it has under no name.
        is_parameter: Whether it is the parameter that was named, not the module.
    """

    name: str
    module: nn.Module
    adapter: Adapter
    tied_to: str | None
    flipped: bool = True
    attribute: str = "weight"
    is_parameter: bool = False

    @property
    def weight(self) -> Float[Tensor, "I d_in d_out"]:
        """The target's matrix, detached, in y = x W orientation."""
        return self.adapter.weight(self.module).detach()

    @property
    def dtype(self) -> torch.dtype:
        """Of the target's matrix; where that is computed from parameters it may be stale, and theirs counts."""
        held = self.adapter.held(self.module)
        if not isinstance(held, nn.Parameter):
            held = next((p for p in self.module.parameters() if p.is_floating_point()), held)
        return held.dtype

    @property
    def shape(self) -> LayerShape:
        _, d_in, d_out = self.weight.shape
        return LayerShape(d_in, d_out, self.tied_to, self.flipped)

    def state(self, weight: Float[Tensor, "I d_in d_out"]) -> dict[str, Tensor]:
        """What the target's state dict holds if this is the layer's matrix; some layers have none there."""
        own = self.module._parameters.get(self.attribute)
        if self.adapter.stored is None or own is None:
            return {}
        name = self.name if self.is_parameter else f"{self.name}.{self.attribute}"
        return {name: self.adapter.stored(weight).to(own.dtype)}

    def to_instances(self, x: Tensor) -> Float[Tensor, "I b d"]:
        return x if self.adapter.instances else x.reshape(1, -1, x.shape[-1])

    def from_instances(self, y: Float[Tensor, "I b d_out"], x: Tensor) -> Tensor:
        """The layer's output as the target expects it for input x, bias added."""
        bias = self.adapter.bias(self.module)
        y = y if bias is None else y + bias.detach()
        return y if self.adapter.instances else y.reshape(*x.shape[:-1], y.shape[-1])


NAMES_SHOWN = 60
"""So many names of modules are listed when none matches."""


def find_sites(target: nn.Module, patterns: Sequence[str] | str) -> list[Site]:
    """The modules and parameters of `target` whose names match a pattern, as sites in the target's order.

    Args:
        target: Any module.
        patterns: fnmatch patterns over `named_modules`, e.g. ["linear1", "layers.*.mlp_in"]; one that matches no
            module is compared with `named_parameters`, e.g. "blocks.*.mlp.W_in".

    Raises:
        ValueError: If a pattern matches nothing, with the names there are; if a layer has no matrix yet.
        TypeError: If what matched is not of a type that can be decomposed.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("find_sites: patterns must name at least one module, got none")
    modules = dict(target.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, module in modules.items():
        first.setdefault(id(module), name)
    named = {name: module for name, module in modules.items() if name}
    parameters = {
        f"{name}.{key}" if name else key: (first[id(module)], key)
        for name, module in modules.items()
        for key, value in module._parameters.items()
        if value is not None
    }
    chosen: set[tuple[str, str]] = set()
    for pattern in patterns:
        if matched := fnmatch.filter(named, pattern):
            chosen.update((first[id(named[name])], "") for name in matched)
        elif found := fnmatch.filter(parameters, pattern):
            chosen.update(_as_layer(modules, *parameters[name]) for name in found)
        else:
            shown = ", ".join(list(named)[:NAMES_SHOWN])
            more = f" and {len(named) - NAMES_SHOWN} more" if len(named) > NAMES_SHOWN else ""
            raise ValueError(f"find_sites: pattern {pattern!r} must match a module, the target has {shown}{more}")
    if ("", "") in chosen:
        raise ValueError("find_sites: the target must not be a single layer itself; put it into an nn.Sequential")
    sites: list[Site] = []
    owners: dict[int, Site] = {}
    for name, module in modules.items():
        for key in ("", *module._parameters):
            if (name, key) in chosen and first[id(module)] == name:
                sites.append(_site(name, module, key, owners))
    if len({s.weight.shape[0] for s in sites}) > 1:
        raise ValueError("find_sites: all sites must have the same n_instances")
    return sites


def _as_layer(modules: dict[str, nn.Module], name: str, key: str) -> tuple[str, str]:
    """The weight of a layer stands for the layer, whose bias is not decomposed."""
    return (name, "") if key == "weight" and adapter_of(modules[name]) is not None else (name, key)


def _site(name: str, module: nn.Module, key: str, owners: dict[int, Site]) -> Site:
    if key:
        name = f"{name}.{key}" if name else key
        value: Any = module._parameters[key]
        if is_lazy(value):
            raise ValueError(f"find_sites: {name} must have a shape, got an uninitialised parameter; {_RUN_ONCE}")
        if value.dim() != 2:
            reason = ", one matrix for all samples and heads" if value.dim() > 2 else ""
            raise TypeError(f"find_sites: {name} must be a matrix{reason}, got shape {list(value.shape)}")
        site = Site(name, module, _parameter_adapter(key), None, attribute=key, is_parameter=True)
    else:
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            raise ValueError(f"find_sites: {name} must have a shape, got an uninitialised {_kind(module)}; {_RUN_ONCE}")
        adapter = adapter_of(module)
        if adapter is None:
            known = ", ".join(t.__module__.split(".")[0] + "." + t.__name__ for t in _ADAPTERS)
            raise TypeError(f"find_sites: {name} must be one of {known}, Conv1D or a parameter, got {_kind(module)}")
        if adapter.ids and getattr(module, "max_norm", None) is not None:
            raise TypeError(f"find_sites: {name} must not have a max_norm, which rewrites its rows as it runs")
        site = Site(name, module, adapter, None)
    held = site.adapter.held(module)
    if not held.is_floating_point():
        raise TypeError(f"find_sites: {name} must hold real floating-point numbers, got {held.dtype}")
    owner = owners.get(id(held))
    if owner is None:
        if isinstance(held, nn.Parameter):  # anything else is made anew when asked for, and may have any id
            owners[id(held)] = site
        return site
    return site._replace(tied_to=owner.name, flipped=owner.adapter.transposed != site.adapter.transposed)


_RUN_ONCE = "run the model on a batch first"


def _kind(module: nn.Module) -> str:
    kind = type(module)
    known = {t.__name__ for t in _ADAPTERS}
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ in known else kind.__name__
