"""A decomposition's target with other weights: components scaled or left out, as an ordinary state dict."""

from __future__ import annotations

import copy
import math
import numbers
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastapd import _masks
from fastapd._masks import refuse
from fastapd.model import ComponentModel


class Edits:
    """The part of a `Decomposition` that gives its target other weights."""

    model: ComponentModel

    @torch.no_grad()
    def state_dict(
        self,
        scale: Mapping[int, float] | Mapping[str, Mapping[int, float]] | None = None,
        only: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        residual: bool = True,
    ) -> dict[str, Any]:
        """The target's state dict with edited weights; the target itself stays as it is.

        `W'_l = W_l + Σ_c (s_c − 1) P_c,l`, and without the residual `W'_l = Σ_c s_c P_c,l`. The factor s_c is 1, or 0
        for a component that `only` leaves out, times the component's `scale`.

        Args:
            scale: Factors of components, by number: {3: -1.0} turns component 3 around, {3: 0.0} removes it. Or by
                layer, {"mlp.0": {3: -1.0}}: then other layers are not scaled.
            only: The components that stay, or by layer those that do: then other layers keep all.
            residual: Whether W minus the sum of the components stays.

        Returns:
            Keys, shapes and dtypes of `target.state_dict()`, so that `load_state_dict(state, strict=True)` takes it.
            Tensors are new. Whatever shares memory with an edited matrix gets the same new values.

        Raises:
            ValueError: A component or layer that does not exist, a component twice, a factor that is not finite, an
                empty `only`, a factor for a component that `only` leaves out, an edit by layer of a tied layer (edit
                the one that it is tied to), or two layers that share a matrix and are edited differently.
            TypeError: A component that is no whole number, or a factor that is no number.
        """
        factors = self._factors(scale, only)
        held = self.model.target.state_dict()
        edited: dict[str, Tensor] = {}
        for site in self.model.sites:
            stored = self.model.components.factors(site.name)
            s = factors[site.name].to(stored[0])
            weights = (s - 1 if residual else s).expand(self.model.components.n_instances, -1)
            W = _masks.weighted_sum(*stored, weights)
            for name, value in site.state(site.weight + W if residual else W).items():
                edited[_key(held, name, site.adapter.held(site.module))] = value
        shared: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
        for key, value in edited.items():
            place = _place(held[key])
            other, known = shared.setdefault(place, (key, value))
            if other != key and not torch.allclose(known, value, 1e-5, 1e-6):
                what = f"the factors of {key} and {other}, which are one tensor,"
                raise ValueError(
                    refuse(what, "give the same matrix", "two", "edit both alike, or decompose one of them")
                )
        new: OrderedDict[str, Any] = OrderedDict()
        for key, value in held.items():
            if not isinstance(value, Tensor):
                new[key] = copy.deepcopy(value)
                continue
            found = shared.get(_place(value), ("", None))[1]
            new[key] = (value if found is None else found).detach().clone(memory_format=torch.contiguous_format)
        metadata = getattr(held, "_metadata", None)
        if metadata is not None:  # versions of the modules, which load_state_dict looks at
            new._metadata = copy.deepcopy(metadata)  # type: ignore[attr-defined]
        return new

    def edited(
        self,
        scale: Mapping[int, float] | Mapping[str, Mapping[int, float]] | None = None,
        only: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        residual: bool = True,
    ) -> nn.Module:
        """A deep copy of the target with the weights of `state_dict(scale, only, residual)`.

        Args:
            scale, only, residual: As for `state_dict`.

        Returns:
            The copy: same class, mode, device and dtype.

        Raises:
            As `state_dict`.
        """
        state = self.state_dict(scale, only, residual)
        new = copy.deepcopy(self.model.target)
        new.load_state_dict(state, strict=True)
        return new

    def _factors(self, scale: Any, only: Any) -> dict[str, Tensor]:
        """s [C] of each layer, float64."""
        components = self.model.components
        found = {site.name: torch.ones(components.n_components, dtype=torch.float64) for site in self.model.sites}
        for name, argument, given in self._by_layer(only, "only"):
            kept = _masks.indices(given, components.n_components, argument)
            if not kept:
                hint = "to edit nothing leave it out, to remove all give each a scale of 0"
                raise ValueError(refuse(argument, "name at least one component", "none", hint))
            found[name] = torch.zeros_like(found[name]).index_fill_(0, torch.tensor(kept), 1.0)
        for name, argument, given in self._by_layer(scale, "scale"):
            if not isinstance(given, Mapping):
                raise TypeError(refuse(argument, "map components to factors", type(given).__name__))
            chosen = _masks.indices(list(given), components.n_components, argument)
            for c, factor in zip(chosen, given.values(), strict=True):
                if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
                    raise TypeError(refuse(f"{argument}[{c}]", "be a number", type(factor).__name__))
                if not math.isfinite(factor):
                    raise ValueError(refuse(f"{argument}[{c}]", "be finite", factor))
                if not found[name][c]:
                    raise ValueError(refuse(argument, "name components that only keeps", c))
                found[name][c] = float(factor)
        for site in self.model.sites:
            if site.tied_to:
                found[site.name] = found[site.tied_to]
        return found

    def _by_layer(self, given: Any, argument: str) -> list[tuple[str, str, Any]]:
        """(layer, what to call the argument, what it was given) for every layer that has a matrix of its own."""
        own = [site.name for site in self.model.sites if not site.tied_to]
        layers = isinstance(given, Mapping) and any(isinstance(key, str) for key in given)
        if argument == "only" and isinstance(given, Mapping):
            layers = True
        if given is None:
            return []
        if not layers:
            return [(name, argument, given) for name in own]
        unknown = [name for name in given if name not in own]
        if unknown:
            raise ValueError(refuse(argument, f"name layers among {', '.join(own)}", unknown))
        return [(name, f"{argument}[{name!r}]", given[name]) for name in given]


def _key(held: Mapping[str, Any], name: str, own: Tensor) -> str:
    """The key of a parameter in its model's state dict: its name, unless the model gives it another one there."""
    if name in held:
        return name
    for key, value in held.items():
        if isinstance(value, Tensor) and _place(value) == _place(own):
            return key
    raise ValueError(refuse("the target", f"have {name} in its state dict", "a state dict without it"))


def _place(t: Tensor) -> tuple[Any, ...]:
    """The same for tensors that are views of the same numbers."""
    return t.device, t.data_ptr(), t.shape, t.stride(), t.storage_offset()
