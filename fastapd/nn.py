"""Layers made of components, for models that are built of them rather than decomposed by `fastapd.decompose`.

Axes are those of `fastapd.functional`: inputs [.., (n_instances,) d_in], masks [.., (n_instances,) n_components].
Parameters are stored as `At` [(n_instances,) n_components, rank, d_in] and `B` [(n_instances,) n_components, rank,
d_out], on which the operations run without a copy; `A` is the transposed view.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastapd import functional
from fastapd.ops import Selection, _check, component_sum

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["LinearComponents", "TransposedLinearComponents"]


class _ComponentLayer(nn.Module):
    """What a layer and its transpose share: everything that follows from A, B and a bias."""

    d_in: int
    d_out: int
    n_components: int
    rank: int
    n_instances: int | None
    bias: nn.Parameter | None

    def factors(self) -> tuple[Float[Tensor, "*I C d_in m"], Float[Tensor, "*I C m d_out"]]:
        """(A, B), as parameters or views of them."""
        raise NotImplementedError

    @property
    def weight(self) -> Float[Tensor, "*I d_in d_out"]:
        """The sum of the components, y = x W orientation: the transpose of what `nn.Linear` calls its weight."""
        return component_sum(*self.factors())

    def component_weights(self) -> Float[Tensor, "*I C d_in d_out"]:
        """Every component's own matrix A_c B_c; n_components times the layer's size, for analysis."""
        return functional.component_weights(*self.factors())

    def forward(
        self,
        x: Float[Tensor, "*b *I d_in"],
        mask: Bool[Tensor, "*b *I C"] | Float[Tensor, "*b *I C"] | Selection | None = None,
    ) -> Float[Tensor, "*b *I d_out"]:
        """y_b = sum_c mask_bc (x_b A_c) B_c + bias, as `fastapd.functional.masked_linear`.

        Args:
            x: Inputs [.., d_in], or [.., n_instances, d_in] if the layer has instances.
            mask: Weights [.., (n_instances,) n_components], bool or of the dtype of x; a `Selection`; None for all on.

        Returns:
            Outputs [.., (n_instances,) d_out].

        Raises:
            ValueError: If a shape does not match.
            TypeError: If a dtype does not.
        """
        return functional.masked_linear(x, *self.factors(), mask, self.bias)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An `nn.Linear` that computes what this layer does with all components on; its parameters are copies.

        Raises:
            ValueError: If the layer has instances.
        """
        if self.n_instances is not None:
            raise ValueError(
                f"{type(self).__name__}.to_linear: n_instances must be None, got {self.n_instances}; "
                "an nn.Linear holds one matrix"
            )
        W = self.weight
        linear = nn.Linear(self.d_in, self.d_out, self.bias is not None, device=W.device, dtype=W.dtype)
        linear.weight.copy_(W.mT)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear

    def extra_repr(self) -> str:
        sizes = f"{self.d_in}, {self.d_out}, C={self.n_components}, rank={self.rank}"
        return f"{sizes}, n_instances={self.n_instances}, bias={self.bias is not None}"


class LinearComponents(_ComponentLayer):
    """A linear layer y = x W + bias whose matrix is a sum of components, W = sum_c A_c B_c.

    Args:
        d_in, d_out: Width of inputs and outputs.
        C: Number of components.
        rank: m of each; None for min(d_in, d_out).
        n_instances: Independent copies side by side; None for a layer without that axis.
        bias: Whether to add one, zero at first. It belongs to no component and is never masked.
        init_scale: Multiplies the initial standard deviation, which is that of `fastapd.Components`:
            sqrt(2 / ((C + n_instances) d_in m)) for A and sqrt(2 / ((C + n_instances) m d_out)) for B.
        generator: The source of randomness; None for torch's default.
        dtype, device: As everywhere in torch.

    Attributes:
        At: [(n_instances,) n_components, rank, d_in].
        B: [(n_instances,) n_components, rank, d_out].

    Raises:
        ValueError: If a size is below 1.
        TypeError: If a size is not an int.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        C: int,
        rank: int | None = None,
        n_instances: int | None = None,
        bias: bool = False,
        init_scale: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_in": d_in, "d_out": d_out, "C": C, "rank": rank, "n_instances": n_instances}
        for name, value in sizes.items():
            if value is not None or name not in ("rank", "n_instances"):
                _check.whole("LinearComponents", name, value, 1, 2**31 - 1, "[1, 2**31)")
        self.d_in, self.d_out, self.n_components, self.n_instances = d_in, d_out, C, n_instances
        self.rank = rank = min(d_in, d_out) if rank is None else rank
        own = () if n_instances is None else (n_instances,)
        factors = []
        for width in (d_in, d_out):
            # Drawn on the generator's device, so that a seed means the same numbers wherever the layer lives.
            at = generator.device if generator is not None else device
            values = torch.randn(*own, C, rank, width, generator=generator, dtype=dtype, device=at)
            values = values * (init_scale * math.sqrt(2 / ((C + (n_instances or 1)) * width * rank)))
            factors.append(nn.Parameter(values.to(device) if device is not None else values))
        self.At, self.B = factors
        self.bias = nn.Parameter(torch.zeros(*own, d_out, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, bias: Tensor | None = None) -> LinearComponents:
        """A layer of given components: A [(n_instances,) C, d_in, m] and B [(n_instances,) C, m, d_out], copied.

        Raises:
            ValueError: If shapes or devices do not match, or one is empty.
            TypeError: If a dtype is not floating or the dtypes differ.
        """
        op = "LinearComponents.from_factors"
        instances = _check.factors(op, A, B)
        if 0 in A.shape or 0 in B.shape:
            raise ValueError(f"{op}: A and B must not be empty, got A {_check.shape(A)} and B {_check.shape(B)}")
        n_instances = A.shape[0] if instances else None
        C, d_in, rank = A.shape[-3:]
        layer = cls(d_in, B.shape[-1], C, rank, n_instances, bias is not None, dtype=A.dtype, device=A.device)
        with torch.no_grad():
            layer.A.copy_(A)
            layer.B.copy_(B)
            if bias is not None:
                assert layer.bias is not None
                _check.tensors(op, A=A, bias=bias)
                if bias.shape != layer.bias.shape:
                    raise ValueError(f"{op}: bias must have shape {_check.shape(layer.bias)}, got {_check.shape(bias)}")
                layer.bias.copy_(bias)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        C: int,
        rank: int | None = None,
        init_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> LinearComponents:
        """Components for an `nn.Linear`: its sizes, dtype and device, and a copy of its bias that is not trained.

        The components are drawn as in the constructor. Their sum is not the layer's weight: training against
        `faithfulness_loss(layer.A, layer.B, linear.weight.mT)` makes it so.

        Args:
            linear: Left as it is.
            C: Number of components.
            rank: m of each; None for min(d_in, d_out).
            init_scale: As in the constructor.
            generator: As in the constructor.

        Raises:
            TypeError: If linear is not an `nn.Linear`.
            ValueError: If a size is below 1.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"LinearComponents.from_linear: linear must be an nn.Linear, got {type(linear).__name__}")
        bias, W = linear.bias is not None, linear.weight
        layer = cls(
            linear.in_features, linear.out_features, C, rank, None, bias, init_scale, generator, W.dtype, W.device
        )
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
            layer.bias.requires_grad_(False)
        return layer

    @property
    def A(self) -> Float[Tensor, "*I C d_in m"]:
        """The left factors: the transposed view of the parameter `At`."""
        return self.At.mT

    def factors(self) -> tuple[Float[Tensor, "*I C d_in m"], Float[Tensor, "*I C m d_out"]]:
        """(A, B): a view of the parameter `At`, and the parameter B."""
        return self.A, self.B

    def transposed(self, bias: bool = False) -> TransposedLinearComponents:
        """The layer y = x W^T with the same components: the tied decoder of a toy model of superposition.

        Args:
            bias: Whether the new layer adds one of its own, zero at first.
        """
        return TransposedLinearComponents(self, bias)

    @torch.no_grad()
    def normalise_(self) -> None:
        """Scales every column of A to unit length over d_in, in place; a zero column stays zero."""
        functional.unit_norm_(self.A)

    @torch.no_grad()
    def tangent_gradients_(self) -> None:
        """Removes from the gradient of A its part along each (unit) column; does nothing where there is none."""
        if self.At.grad is not None:
            functional.tangent_gradient_(self.At.grad.mT, self.A)


class TransposedLinearComponents(_ComponentLayer):
    """y = x W^T + bias with the components of another layer: A_c of this one is B_c^T of that, B_c is A_c^T.

    It holds no factors: its own state is its bias, and `.to(dtype)` moves the factors only where the owner is moved as
    well, as it is when both are in one model.

    Args:
        owner: The layer whose components it uses.
        bias: Whether to add one, zero at first.
    """

    def __init__(self, owner: LinearComponents, bias: bool = False) -> None:
        super().__init__()
        if not isinstance(owner, LinearComponents):
            raise TypeError(f"TransposedLinearComponents: owner must be a LinearComponents, got {type(owner).__name__}")
        self._owner = [owner]  # in a list, so that the parameters are not registered twice
        self.d_in, self.d_out, self.n_components, self.rank = owner.d_out, owner.d_in, owner.n_components, owner.rank
        self.n_instances = owner.n_instances
        self.bias = nn.Parameter(owner.At.detach().new_zeros(*owner.At.shape[:-3], owner.d_in)) if bias else None

    @property
    def owner(self) -> LinearComponents:
        """The layer whose components these are."""
        return self._owner[0]

    @property
    def A(self) -> Float[Tensor, "*I C d_in m"]:
        """The owner's B, transposed."""
        return self.owner.B.mT

    @property
    def B(self) -> Float[Tensor, "*I C m d_out"]:
        """The owner's A, transposed."""
        return self.owner.At

    def factors(self) -> tuple[Float[Tensor, "*I C d_in m"], Float[Tensor, "*I C m d_out"]]:
        """(A, B), views of the owner's."""
        return self.A, self.B
