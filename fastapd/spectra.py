"""What components read and write: their singular vectors and values; and how alike two decompositions are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastapd._masks import refuse
from fastapd.model import ComponentModel
from fastapd.ops import component_svdvals

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Directions(NamedTuple):
    """What every component of a layer reads and writes: `x P_c = Σ_i (x · read_ci) values_ci write_ci`.

    r is min(rank, d_in, d_out). The largest entry of each read direction is positive, which fixes the signs.

    Attributes:
        values: Singular values [n_instances, C, r], descending.
        read: Orthonormal read directions [n_instances, C, d_in, r], a column for each value.
        write: Orthonormal write directions [n_instances, C, d_out, r], a column for each value.
    """

    values: Float[Tensor, "I C r"]
    read: Float[Tensor, "I C d_in r"]
    write: Float[Tensor, "I C d_out r"]


class Matching(NamedTuple):
    """Which component of another decomposition is which of this.

    Attributes:
        assignment: For every component the other's [n_instances, C], each at most once; -1 where none is left.
        similarity: Their cosine [n_instances, C]; 0 where none is left.
    """

    assignment: Int[Tensor, "I C"]
    similarity: Float[Tensor, "I C"]


class Spectra:
    """The part of a `Decomposition` that looks at the components themselves."""

    model: ComponentModel

    @torch.no_grad()
    def directions(self, layer: str) -> Directions:
        """Singular values and vectors of every component of a layer, from QR of its factors.

        `A = Q R`, `Bᵀ = Q' R'`, `R R'ᵀ = U S Vᵀ`; read = Q U, write = Q' V.

        Args:
            layer: A decomposed layer.

        Returns:
            `Directions(values, read, write)` in the orientation y = x W, whatever way the target stores W.

        Raises:
            ValueError: The layer is not a decomposed one.

        Numerics: directions of equal values are any basis of their plane; those of value 0 say nothing.
        Cost: O(C m² (d_in + d_out) + C m³); no matrix of the layer's size is made.
        """
        self._known(layer)
        A, B = (t if t.dtype == torch.float64 else t.float() for t in self.model.components.factors(layer))
        Qa, Ra = torch.linalg.qr(A)
        Qb, Rb = torch.linalg.qr(B.mT)
        U, S, Vh = torch.linalg.svd(Ra @ Rb.mT, full_matrices=False)
        read, write = Qa @ U, Qb @ Vh.mT
        largest = read.gather(-2, read.abs().argmax(-2, keepdim=True))  # [I, C, 1, r]
        sign = torch.where(largest < 0, -1.0, 1.0).to(read)
        return Directions(S, read * sign, write * sign)

    @torch.no_grad()
    def spectra(self) -> dict[str, Float[Tensor, "I C m"]]:
        """The singular values of every component in every layer.

        Returns:
            For each layer [n_instances, C, rank], descending; zeros stand for directions that a component lacks.
        """
        names = [site.name for site in self.model.sites]
        return {name: component_svdvals(*self.model.components.factors(name)).detach() for name in names}

    def effective_rank(self) -> dict[str, Float[Tensor, "I C"]]:
        """How many directions a component uses: `exp(−Σ_i q_i ln q_i)` with `q_i = σ_i / Σ_j σ_j`.

        1 for rank one, r for r equal singular values, 0 for a component that is zero.

        Returns:
            For each layer [n_instances, C], float64.

        Source: Roy & Vetterli 2007, "The effective rank".
        """
        return {name: effective_rank(values) for name, values in self.spectra().items()}

    @torch.no_grad()
    def similarity(self, other: Spectra) -> Float[Tensor, "I C D"]:
        """Cosines between the components of two decompositions, over all layers.

        `cos[c, d] = Σ_l ⟨P_c,l, Q_d,l⟩ / √(Σ_l ‖P_c,l‖² · Σ_l ‖Q_d,l‖²)`, 0 where a component is zero.

        Args:
            other: A decomposition with the same layers and n_instances; its target may have other weights.

        Returns:
            [n_instances, C, the other's C], float64.

        Raises:
            ValueError: The layers or n_instances differ.
            TypeError: `other` is no decomposition.

        Cost: through Gram matrices of the factors, never a matrix of a layer's size.
        """
        if not isinstance(other, Spectra):
            raise TypeError(refuse("other", "be a Decomposition", type(other).__name__))
        mine, its = self.model.components, other.model.components
        shapes = {n: (s.d_in, s.d_out) for n, s in mine.layers.items()}
        others = {n: (s.d_in, s.d_out) for n, s in its.layers.items()}
        if shapes != others or mine.n_instances != its.n_instances:
            wanted = f"have the layers {mine.extra_repr()}"
            raise ValueError(refuse("other", wanted, its.extra_repr()))
        inner = own = theirs = torch.zeros(())
        for name in shapes:
            P, Q = mine.factors(name), tuple(t.to(mine.factors(name)[0].device) for t in its.factors(name))
            inner = inner + torch.stack([_inner(P, Q, c) for c in range(mine.n_components)], 1)
            own, theirs = own + _squares(*P), theirs + _squares(*Q)
        scale = (own[:, :, None] * theirs[:, None]).sqrt()
        return torch.where(scale > 0, inner / scale, torch.zeros_like(inner))

    def match(self, other: Spectra) -> Matching:
        """The other decomposition's counterpart of every component: the assignment with the largest sum of cosines.

        Args:
            other: As for `similarity`.

        Returns:
            `Matching(assignment, similarity)`; components beyond the other's number have -1.

        Raises:
            As `similarity`.
        """
        from scipy.optimize import linear_sum_assignment

        cosines = self.similarity(other)
        assignment = torch.full(cosines.shape[:2], -1, dtype=torch.int64)
        values = torch.zeros(cosines.shape[:2], dtype=torch.float64)
        for i, matrix in enumerate(cosines.cpu().nan_to_num(0.0, 0.0, 0.0)):
            rows, columns = (torch.as_tensor(t) for t in linear_sum_assignment(matrix.numpy(), maximize=True))
            assignment[i, rows], values[i, rows] = columns, matrix[rows, columns]
        return Matching(assignment.to(cosines.device), values.to(cosines.device))

    def _known(self, layer: str) -> None:
        if layer not in self.model.components.layers:
            names = ", ".join(self.model.components.layers)
            raise ValueError(refuse("layer", f"be one of {names}", repr(layer)[:80]))


def effective_rank(values: Float[Tensor, "*k m"]) -> Float[Tensor, " *k"]:
    """exp of the entropy of singular values over their sum; 0 where all are zero. Float64."""
    values = values.double()
    total = values.sum(-1, keepdim=True)
    q = torch.where(total > 0, values / total, torch.zeros_like(values))
    rank = torch.special.entr(q).sum(-1).exp()
    return torch.where(total[..., 0] > 0, rank, torch.zeros_like(rank))


def _squares(A: Tensor, B: Tensor) -> Float[Tensor, "I C"]:
    """‖A_c B_c‖²."""
    A, B = A.double(), B.double()
    return ((A.mT @ A) * (B @ B.mT)).sum((-2, -1)).clamp(min=0)


def _inner(P: tuple[Tensor, ...], Q: tuple[Tensor, ...], c: int) -> Float[Tensor, "I D"]:
    """⟨A_c B_c, A'_d B'_d⟩ = Σ (A_cᵀ A'_d) ∘ (B_c B'_dᵀ) for every d."""
    (A, B), (A2, B2) = P, Q
    left = torch.einsum("nim,ndik->ndmk", A[:, c].double(), A2.double())
    return (left * torch.einsum("nmo,ndko->ndmk", B[:, c].double(), B2.double())).sum((-2, -1))
