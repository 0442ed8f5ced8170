"""How good a decomposition is: MMCS, ML2R, leak, one component per feature, and the baselines that belong beside them.

MMCS alone proves nothing (C copies of W/C score 1), so `recovered` asks for five things at once and every table shows
`svd_parts`, `copies_parts` and the run's own initial components next to the result.

All functions are pure, take any float dtype and compute in float64. The instance axis comes first; a matrix is
`[n_instances, n_features, d_hidden]` with one row per feature (`y = x W`). An instance that holds a NaN has NaN metrics
and is never recovered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

DEAD_BELOW = 1e-6  # a component is dead when its Frobenius norm is at most this share of the target's
_TIE = 1e-6  # energies this close are one value: rounding must not spread equal copies over several features


class MMCS(NamedTuple):
    """Mean max cosine similarity and mean L2 ratio of each instance, with the values per feature behind them."""

    mmcs: Float[Tensor, " I"]
    ml2r: Float[Tensor, " I"]
    cosine: Float[Tensor, "I F"]  # of the best component
    ratio: Float[Tensor, "I F"]  # that component's norm on the feature over the target's
    component: Int[Tensor, "I F"]  # the best component


class FeatureRecovery(NamedTuple):
    """What `recovered` judges, one value per instance. `assignment` is -1 for a feature that got no component."""

    mmcs: Float[Tensor, " I"]
    ml2r: Float[Tensor, " I"]
    leak: Float[Tensor, " I"]
    unique: Int[Tensor, " I"]
    dead: Int[Tensor, " I"]
    assignment: Int[Tensor, "I F"]
    faithfulness_error: Float[Tensor, " I"]


@dataclass(frozen=True)
class RecoveryThresholds:
    """The rule of "recovered"; besides these, every feature must have a component of its own (unique == F)."""

    mmcs: float = 0.98  # above
    leak: float = 0.1  # below
    ml2r: float = 0.85  # at least
    faithfulness_error: float = 1e-2  # at most


RECOVERED = RecoveryThresholds()


def mmcs_ml2r(weight: Float[Tensor, "I F H"], parts: Float[Tensor, "I C F H"]) -> MMCS:
    """Cosine and relative length of the component that points most nearly along each feature.

    `cosine[f] = max_c <P_cf, W_f> / (‖P_cf‖ ‖W_f‖)`, `ratio[f] = ‖P_c*f‖ / ‖W_f‖` for the maximising c*; `mmcs` and
    `ml2r` are their means over features.

    Args:
        weight: target [n_instances, n_features, d_hidden].
        parts: components [n_instances, n_components, n_features, d_hidden].

    Returns:
        MMCS: mmcs, ml2r [n_instances]; cosine, ratio, component [n_instances, n_features].

    Raises:
        ValueError: the shapes do not belong together.
        TypeError: an argument is not floating point.

    Numerics: a zero row has cosine 0 (and ratio 0 where the target's row is zero); ties go to the lowest component.

    Source: Braun et al. 2025, section 3.1; the published ± is the standard deviation over features of one instance.
    """
    _check("mmcs_ml2r", weight, parts)
    weight, parts = weight.double(), parts.double()
    weight_norm = weight.norm(dim=-1)  # [I, F]
    parts_norm = parts.norm(dim=-1)  # [I, C, F]
    inner = torch.einsum("icfh,ifh->icf", parts, weight)
    cosine, component = _ratio(inner, parts_norm * weight_norm[:, None]).max(dim=1)  # [I, F]
    ratio = _ratio(parts_norm.gather(1, component[:, None])[:, 0], weight_norm)
    return MMCS(cosine.mean(-1), ratio.mean(-1), cosine, ratio, component)


def projection_share(weight: Float[Tensor, "I F H"], parts: Float[Tensor, "I C F H"]) -> Float[Tensor, "I F C"]:
    """How much of each feature each component carries: `S[f, c] = <P_cf, W_f> / ‖W_f‖²`, which sums to 1 over c.

    Args:
        weight: target [n_instances, n_features, d_hidden].
        parts: components [n_instances, n_components, n_features, d_hidden].

    Returns:
        Signed shares [n_instances, n_features, n_components]; 0 on a feature whose target row is zero.

    Raises:
        ValueError: the shapes do not belong together.
        TypeError: an argument is not floating point.
    """
    _check("projection_share", weight, parts)
    weight, parts = weight.double(), parts.double()
    return _ratio(torch.einsum("icfh,ifh->ifc", parts, weight), weight.square().sum(-1)[..., None])


def feature_recovery(weight: Float[Tensor, "I F H"], parts: Float[Tensor, "I C F H"]) -> FeatureRecovery:
    """Give every feature one component and measure how much the component is about that feature alone.

    The assignment maximises the summed projection share (Hungarian). The leak of a component on feature f is
    `1 − ‖P_cf‖² / Σ_f' ‖P_cf'‖²`; an instance's leak is the maximum over its assigned components. `unique` counts the
    features whose assigned component is larger on that feature than on any other.

    Args:
        weight: target [n_instances, n_features, d_hidden].
        parts: components [n_instances, n_components, n_features, d_hidden].

    Returns:
        FeatureRecovery: one value per instance, and assignment [n_instances, n_features].

    Raises:
        ValueError: the shapes do not belong together.
        TypeError: an argument is not floating point.

    Numerics: a component whose norm is at most 1e-6 ‖W‖ is dead: it is counted, never unique, and left out of the leak
    (which is 1 when no assigned component is alive). Energies equal to 1e-6 are a tie, won by the lowest feature, so
    that equal copies of W/C are unique on one feature only.
    """
    _check("feature_recovery", weight, parts)
    similarity = mmcs_ml2r(weight, parts)
    assignment = _assign(projection_share(weight, parts))  # [I, F]
    weight, parts = weight.double(), parts.double()

    weight_norm = weight.flatten(1).norm(dim=-1)  # [I]
    energy = parts.square().sum(-1)  # [I, C, F]
    total = energy.sum(-1)  # [I, C]
    is_dead = total.sqrt() <= DEAD_BELOW * weight_norm[:, None]
    largest = (energy >= energy.amax(-1, keepdim=True) * (1 - _TIE)).to(torch.uint8).argmax(-1)  # [I, C]

    slot = assignment.clamp(min=0)
    counts = (assignment >= 0) & ~is_dead.gather(1, slot)  # [I, F]
    own = energy.gather(1, slot[:, None])[:, 0]  # [I, F]
    leak = 1 - _ratio(own, total.gather(1, slot))
    # -1 is below every leak, so the maximum sees it only where no component counts
    leak = torch.where(counts, leak, -torch.ones_like(leak)).amax(-1)
    features = torch.arange(weight.shape[1], device=weight.device)
    unique = (counts & (largest.gather(1, slot) == features)).sum(-1)

    difference = (parts.sum(1) - weight).flatten(1).norm(dim=-1)  # [I]
    return FeatureRecovery(
        mmcs=similarity.mmcs,
        ml2r=similarity.ml2r,
        leak=torch.where(leak < 0, torch.ones_like(leak), leak),
        unique=unique,
        dead=is_dead.sum(-1),
        assignment=assignment,
        faithfulness_error=_relative(difference, weight_norm),
    )


def recovered(r: FeatureRecovery, thresholds: RecoveryThresholds = RECOVERED) -> Bool[Tensor, " I"]:
    """Which instances found one clean component per feature: all five conditions at once.

    Args:
        r: the result of `feature_recovery`.
        thresholds: the limits; `unique` must equal the number of features whatever they are.

    Returns:
        Boolean [n_instances]; False where a metric is NaN.
    """
    return (
        (r.mmcs > thresholds.mmcs)
        & (r.unique == r.assignment.shape[-1])
        & (r.leak < thresholds.leak)
        & (r.ml2r >= thresholds.ml2r)
        & (r.faithfulness_error <= thresholds.faithfulness_error)
    )


def svd_parts(weight: Float[Tensor, "I F H"], n_components: int) -> Float[Tensor, "I C F H"]:
    """The baseline that knows no features: component c is the c-th rank-one term of the SVD, `σ_c u_c v_cᵀ`.

    Args:
        weight: target [n_instances, n_features, d_hidden].
        n_components: how many components; those past the last singular value are zero, and with fewer components than
            singular values the smallest terms are left out, which the faithfulness error shows.

    Returns:
        Components [n_instances, n_components, n_features, d_hidden] in the dtype of `weight`.

    Raises:
        ValueError: `weight` has the wrong shape or `n_components` is below 1.
        TypeError: `weight` is not floating point.
    """
    A, B = _svd_factors("svd_parts", weight, n_components, rank=1)
    return (A @ B).to(weight.dtype)


def svd_factors(
    weight: Float[Tensor, "I F H"], n_components: int, rank: int
) -> tuple[Float[Tensor, "I C F m"], Float[Tensor, "I C m H"]]:
    """Factors of `svd_parts`: `A_c = √σ_c u_c` in the first of the `rank` columns, zeros in the others.

    Args:
        weight: target [n_instances, n_features, d_hidden].
        n_components: how many components, as in `svd_parts`.
        rank: columns of each factor, at least 1.

    Returns:
        A [n_instances, n_components, n_features, rank] and B [n_instances, n_components, rank, d_hidden].

    Raises:
        ValueError: `weight` has the wrong shape, or `n_components` or `rank` is below 1.
        TypeError: `weight` is not floating point.
    """
    A, B = _svd_factors("svd_factors", weight, n_components, rank)
    return A.to(weight.dtype), B.to(weight.dtype)


def copies_parts(weight: Float[Tensor, "I F H"], n_components: int) -> Float[Tensor, "I C F H"]:
    """The baseline that fools MMCS: every component is `W / n_components`.

    Args:
        weight: target [n_instances, n_features, d_hidden].
        n_components: how many copies.

    Returns:
        Components [n_instances, n_components, n_features, d_hidden] in the dtype of `weight`.

    Raises:
        ValueError: `weight` has the wrong shape or `n_components` is below 1.
        TypeError: `weight` is not floating point.
    """
    _check_baseline("copies_parts", weight, n_components=n_components)
    part = (weight.double() / n_components).to(weight.dtype)
    return part[:, None].repeat(1, n_components, 1, 1)


def copies_factors(
    weight: Float[Tensor, "I F H"], n_components: int, rank: int
) -> tuple[Float[Tensor, "I C F m"], Float[Tensor, "I C m H"]]:
    """Factors of `copies_parts`, `W / C = (U √(Σ/C)) (√(Σ/C) Vᵀ)`, with zero columns up to `rank`.

    Args:
        weight: target [n_instances, n_features, d_hidden].
        n_components: how many copies.
        rank: columns of each factor, at least the numerical rank of every instance of `weight`.

    Returns:
        A [n_instances, n_components, n_features, rank] and B [n_instances, n_components, rank, d_hidden].

    Raises:
        ValueError: `rank` is too small to hold `weight`, or a shape or count is wrong.
        TypeError: `weight` is not floating point.
    """
    _check_baseline("copies_factors", weight, n_components=n_components, rank=rank)
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    # singular values of rounding size, for the dtype the weight came in, are no rank
    tolerance = S.amax(-1, keepdim=True) * max(weight.shape[1:]) * torch.finfo(weight.dtype).eps
    needed = int((S > tolerance).sum(-1).max())
    if rank < needed:
        raise ValueError(
            f"copies_factors: rank must be at least the rank of weight ({needed}), got {rank}; "
            "use copies_parts for the matrices without factors"
        )
    kept = min(rank, S.shape[-1])
    root = (S[:, :kept] / n_components).sqrt()  # [I, kept]
    A = weight.new_zeros(weight.shape[0], weight.shape[1], rank)  # [I, F, m]
    B = weight.new_zeros(weight.shape[0], rank, weight.shape[2])  # [I, m, H]
    A[..., :kept] = U[..., :kept] * root[:, None]
    B[:, :kept] = root[..., None] * Vh[:, :kept]
    return A[:, None].repeat(1, n_components, 1, 1), B[:, None].repeat(1, n_components, 1, 1)


def l0(counts: Int[Tensor, "I C"], batch: int) -> Float[Tensor, " I"]:
    """Mean number of active components per sample.

    Args:
        counts: in how many of the samples each component was active, [n_instances, n_components].
        batch: how many samples the counts are over; an empty batch has none active.

    Returns:
        Float64 [n_instances].
    """
    return counts.double().sum(-1) / max(batch, 1)


def alive(counts: Int[Tensor, "I C"]) -> Int[Tensor, " I"]:
    """How many components were active at least once.

    Args:
        counts: in how many samples each component was active, [n_instances, n_components].

    Returns:
        Int64 [n_instances].
    """
    return (counts > 0).sum(-1)


def relative_faithfulness(weights: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> Float[Tensor, " I"]:
    """Distance of the component sums from the target over all layers: `√Σ_l ‖S_l − W_l‖² / √Σ_l ‖W_l‖²`.

    Args:
        weights: target per layer, [n_instances, ...].
        sums: sum of the components per layer, same names and shapes.

    Returns:
        Float64 [n_instances]; 0 where both are zero.

    Raises:
        ValueError: the names or shapes differ, or there is no layer.
    """
    if not weights or weights.keys() != sums.keys():
        raise ValueError(
            f"relative_faithfulness: sums must have the layers of weights {sorted(weights)}, got {sorted(sums)}"
        )
    for name, weight in weights.items():
        if weight.shape != sums[name].shape:
            raise ValueError(
                f"relative_faithfulness: sums[{name!r}] must have shape {list(weight.shape)}, "
                f"got {list(sums[name].shape)}"
            )
    errors = [(sums[name].double() - w.double()).flatten(1).square().sum(-1) for name, w in weights.items()]
    scales = [w.double().flatten(1).square().sum(-1) for w in weights.values()]
    return _relative(torch.stack(errors).sum(0).sqrt(), torch.stack(scales).sum(0).sqrt())


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient, 0 over a zero denominator; a NaN on either side stays NaN."""
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


def _relative(error: Tensor, scale: Tensor) -> Tensor:
    """Relative error: 0 where there is no error, infinite where an error stands against nothing."""
    return torch.where(error == 0, torch.zeros_like(error), error / scale)


def _assign(share: Float[Tensor, "I F C"]) -> Int[Tensor, "I F"]:
    """Hungarian assignment of components to features that maximises the summed share; -1 where none is left."""
    from scipy.optimize import linear_sum_assignment

    assignment = torch.full(share.shape[:2], -1, dtype=torch.int64)
    # scipy refuses NaN; an instance that diverged still gets an assignment, its metrics say that it is worthless
    for i, matrix in enumerate(share.detach().cpu().nan_to_num(0.0, 0.0, 0.0).numpy()):
        features, components = linear_sum_assignment(matrix, maximize=True)
        assignment[i, torch.as_tensor(features)] = torch.as_tensor(components)
    return assignment.to(share.device)


def _svd_factors(op: str, weight: Tensor, n_components: int, rank: int) -> tuple[Tensor, Tensor]:
    """The SVD terms as float64 factors, zero past the last singular value."""
    _check_baseline(op, weight, n_components=n_components, rank=rank)
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    n_instances, n_features, d_hidden = weight.shape
    kept = min(n_components, S.shape[-1])
    root = S[:, :kept].sqrt()  # [I, kept]
    A = U.new_zeros(n_instances, n_components, n_features, rank)
    B = U.new_zeros(n_instances, n_components, rank, d_hidden)
    A[:, :kept, :, 0] = (U[..., :kept] * root[:, None]).mT  # [I, kept, F]
    B[:, :kept, 0] = root[..., None] * Vh[:, :kept]
    return A, B


def _check(op: str, weight: Tensor, parts: Tensor) -> None:
    _check_baseline(op, weight)
    if parts.ndim != 4 or (parts.shape[0], *parts.shape[2:]) != weight.shape or parts.shape[1] == 0:
        raise ValueError(
            f"{op}: parts must have shape [{weight.shape[0]}, n_components, {weight.shape[1]}, {weight.shape[2]}] "
            f"to match weight, got {list(parts.shape)}"
        )
    if not parts.is_floating_point():
        raise TypeError(f"{op}: parts must be floating point, got {parts.dtype}")


def _check_baseline(op: str, weight: Tensor, **at_least_one: int) -> None:
    if weight.ndim != 3 or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight must have shape [n_instances, n_features, d_hidden] and not be empty, "
            f"got {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise TypeError(f"{op}: weight must be floating point, got {weight.dtype}")
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")
