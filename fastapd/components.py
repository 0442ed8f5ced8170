"""The factors A, B of every decomposed layer: shapes, initialisation, unit norm, views.

`P_c,l = A_c,l B_c,l` with A [n_instances, n_components, d_in, rank] and B [n_instances, n_components, rank, d_out].
Stored are `At` = A transposed, [.., rank, d_in], and B: then the sum is one GEMM without a copy, gathered rows are
contiguous, and a tied layer (whose matrix is the transpose of another's) is the same two buffers with roles swapped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastapd.ops import component_sum
from fastapd.ops._unit_norm import remove_along, unit_norm

if TYPE_CHECKING:
    from jaxtyping import Float


class LayerShape(NamedTuple):
    """What a layer's components need to know of it."""

    d_in: int
    d_out: int
    tied_to: str | None = None
    """The earlier layer whose matrix this one's is, or the transpose of it."""
    flipped: bool = True
    """Whether it is the transpose; of no meaning without a tie."""


class Components(nn.Module):
    """The trainable components of one target.

    Args:
        layers: Name and shape of every decomposed layer, in the order of the forward pass.
        n_instances: Independent copies, trained together.
        n_components: C, components of each instance; one component spans all layers.
        rank: m; None for min(d_in, d_out) of the smallest layer's widest need, i.e. the largest min(d_in, d_out).
        init_scale: Multiplies the initial standard deviation.
        generator: The source of randomness; None for torch's default.
        dtype, device: As everywhere in torch.

    Raises:
        ValueError: If there is no layer, a size is not positive or a tie does not fit.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerShape],
        n_components: int,
        rank: int | None = None,
        n_instances: int = 1,
        init_scale: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("Components: layers must not be empty, got none")
        rank = max(min(s.d_in, s.d_out) for s in layers.values()) if rank is None else rank
        for name, value in (("n_components", n_components), ("rank", rank), ("n_instances", n_instances)):
            if value < 1:
                raise ValueError(f"Components: {name} must be at least 1, got {value}")
        self.layers = dict(layers)
        self.n_instances, self.n_components, self.rank = n_instances, n_components, rank
        self.At = nn.ParameterDict()
        self.B = nn.ParameterDict()
        for name, layer in self.layers.items():
            if layer.tied_to is not None:
                self._check_tie(name, layer)
                continue
            for factors, width in ((self.At, layer.d_in), (self.B, layer.d_out)):
                # The research code's Xavier rule on a 4-D tensor: the fans are (C, n) times everything behind them.
                std = init_scale * math.sqrt(2 / ((n_components + n_instances) * width * rank))
                shape = (n_instances, n_components, rank, width)
                # Drawn on the generator's device, so that a seed means the same numbers wherever the run happens.
                at = generator.device if generator is not None else device
                values = torch.randn(shape, generator=generator, dtype=dtype, device=at) * std
                factors[_key(name)] = nn.Parameter(values.to(device) if device is not None else values)

    def _check_tie(self, name: str, layer: LayerShape) -> None:
        owner = self.layers.get(layer.tied_to or "")
        if owner is None or owner.tied_to is not None:
            raise ValueError(f"Components: {name} must be tied to an untied layer, got {layer.tied_to!r}")
        if (owner.d_in, owner.d_out) != ((layer.d_out, layer.d_in) if layer.flipped else (layer.d_in, layer.d_out)):
            relation = "be the transpose of" if layer.flipped else "have the shape of"
            raise ValueError(
                f"Components: {name} [{layer.d_in}, {layer.d_out}] must {relation} {layer.tied_to} "
                f"[{owner.d_in}, {owner.d_out}]"
            )

    @classmethod
    def from_factors(
        cls, factors: Mapping[str, tuple[Tensor, Tensor]], ties: Mapping[str, str] | None = None
    ) -> Components:
        """Components that are given, not initialised: A [I, C, d_in, m] and B [I, C, m, d_out] of each untied layer.

        Args:
            factors: The factors of the untied layers; copied.
            ties: For each tied layer the one whose transpose it is; with "=" before its name, the one it equals.

        Raises:
            ValueError: If there are no factors, a shape does not fit the first layer's, or a tie names no layer.
        """
        for name, pair in factors.items():
            if any(factor.dim() != 4 for factor in pair):
                shapes = " and ".join(str(tuple(factor.shape)) for factor in pair)
                raise ValueError(f"Components: factors of {name} must have 4 axes, got {shapes}")
        layers = {name: LayerShape(A.shape[2], B.shape[3]) for name, (A, B) in factors.items()}
        for name, tie in (ties or {}).items():
            owner = tie.removeprefix("=")
            if owner not in layers:
                raise ValueError(f"Components: {name} must be tied to an untied layer, got {owner!r}")
            d_in, d_out = layers[owner][:2]
            flipped = tie == owner
            layers[name] = LayerShape(d_out, d_in, owner) if flipped else LayerShape(d_in, d_out, owner, False)
        if not layers:
            raise ValueError("Components: factors must not be empty, got none")
        A, _ = next(iter(factors.values()))
        new = cls(layers, A.shape[1], A.shape[3], A.shape[0], dtype=A.dtype, device=A.device)
        with torch.no_grad():
            for name, (A, B) in factors.items():
                for own, given in zip(new.factors(name), (A, B), strict=True):
                    if own.shape != given.shape:
                        wanted, got = tuple(own.shape), tuple(given.shape)
                        raise ValueError(f"Components: factors of {name} must have shape {wanted}, got {got}")
                    own.copy_(given)
        return new

    @property
    def ties(self) -> dict[str, str]:
        """For each tied layer the one whose transpose it is, or "=" and the one it equals, as `from_factors` takes."""
        tied = {name: layer for name, layer in self.layers.items() if layer.tied_to is not None}
        return {name: f"{'' if layer.flipped else '='}{layer.tied_to}" for name, layer in tied.items()}

    @property
    def multiplicity(self) -> dict[str, int]:
        """For each untied layer, how often its matrix is used: itself and the layers tied to it."""
        uses = {name: 1 for name, layer in self.layers.items() if layer.tied_to is None}
        for layer in self.layers.values():
            if layer.tied_to is not None:
                uses[layer.tied_to] += 1
        return uses

    def factors(self, name: str) -> tuple[Float[Tensor, "I C d_in m"], Float[Tensor, "I C m d_out"]]:
        """(A, B) of a layer, as views."""
        At, B = self.stored(name)
        return At.mT, B

    def stored(self, name: str) -> tuple[Float[Tensor, "I C m d_in"], Float[Tensor, "I C m d_out"]]:
        """(At, B) of a layer as parameters; a tied layer's are its owner's, for a transpose with roles swapped."""
        layer = self.layers[name]
        if layer.tied_to is None:
            return self.At[_key(name)], self.B[_key(name)]
        key = _key(layer.tied_to)
        return (self.B[key], self.At[key]) if layer.flipped else (self.At[key], self.B[key])

    def gradients(self, name: str) -> tuple[Float[Tensor, "I C m d_in"], Float[Tensor, "I C m d_out"]]:
        """The gradients of `stored(name)`, made where they are missing; new ones hold anything."""
        found = []
        for parameter in self.stored(name):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
            found.append(parameter.grad)
        return found[0], found[1]

    def weight(self, name: str) -> Float[Tensor, "I d_in d_out"]:
        """The sum of a layer's components."""
        return component_sum(*self.factors(name))

    def parts(self, name: str) -> Float[Tensor, "I C d_in d_out"]:
        """Every component's own matrix; C times the size of the layer, for analysis."""
        A, B = self.factors(name)
        return A @ B

    @torch.no_grad()
    def normalise_(self) -> None:
        """Scales every column of A to unit length, over d_in; a zero column stays zero."""
        for At in self.At.values():
            unit_norm(At)

    @torch.no_grad()
    def tangent_gradients_(self) -> None:
        """Removes from the gradient of A its part along each (unit) column: g - (g . a) a."""
        for At in self.At.values():
            if At.grad is not None:
                remove_along(At.grad, At)

    def export(self) -> dict[str, Tensor]:
        """What a file holds, copied: `<layer>.A` [I, C, d_in, m], `<layer>.B` [I, C, m, d_out] of the untied layers."""
        out = {}
        for name in self.multiplicity:
            for kind, factor in zip("AB", self.factors(name), strict=True):
                out[f"{name}.{kind}"] = factor.detach().clone(memory_format=torch.contiguous_format)
        return out

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{n} [{s.d_in}, {s.d_out}]" + (" tied" if s.tied_to else "") for n, s in self.layers.items())
        return f"n_instances={self.n_instances}, n_components={self.n_components}, rank={self.rank}, layers: {sizes}"


_TAKEN = frozenset(dir(nn.ParameterDict()))


def _key(name: str) -> str:
    """A layer's name as a ParameterDict accepts it: without dots, and none of its own attributes (`keys`, `values`)."""
    key = name.replace(".", "/")
    return f"{key}/" if key in _TAKEN else key
