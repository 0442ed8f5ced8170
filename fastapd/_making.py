"""Components that are handed over, not trained, fitted to a target: what `Decomposition.from_*` and `load` share."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastapd._masks import refuse
from fastapd.components import Components
from fastapd.model import ComponentModel, Site, find_sites


def sites_of(model: nn.Module, names: list[str]) -> list[Site]:
    """The sites with these very names."""
    if not isinstance(model, nn.Module):
        raise TypeError(refuse("model", "be an nn.Module", type(model).__name__))
    for name in names:
        try:
            find_sites(model, [glob.escape(name)])
        except ValueError:
            has = ", ".join(n for n, _ in model.named_modules() if n)
            raise ValueError(refuse("model", f"have a layer {name!r}", f"{type(model).__name__} with {has}")) from None
    return find_sites(model, [glob.escape(name) for name in names])


def tensor(value: Any, what: str) -> Tensor:
    """A given array as a floating tensor of finite numbers."""
    value = torch.as_tensor(value).detach()
    if not value.is_floating_point():
        raise TypeError(refuse(what, "be floating point", value.dtype))
    if not bool(value.isfinite().all()):
        raise ValueError(refuse(what, "be finite", "NaN or infinity"))
    return value


def fit(
    model: nn.Module,
    factors: Mapping[str, tuple[Any, Any]],
    ties: Mapping[str, str] | None,
    output: Callable[[Any], Tensor] | None = None,
) -> ComponentModel:
    """A model with these factors: A [C, d_in, m], B [C, m, d_out], or both with n_instances in front.

    Layers may differ in rank; the smaller ones get zero columns, which changes no component.
    """
    if not isinstance(factors, Mapping) or not factors:
        raise ValueError(refuse("factors", "map at least one layer to a pair (A, B)", repr(factors)[:80]))
    sites = {site.name: site for site in sites_of(model, [*factors, *(ties or {})])}
    tied = {name: site.tied_to for name, site in sites.items() if site.tied_to}
    if twice := [f"{name}, which is tied to {owner}" for name, owner in tied.items() if name in factors]:
        raise ValueError(refuse("factors", "be given once for layers that share a matrix", ", ".join(twice)))
    ready: dict[str, tuple[Tensor, Tensor]] = {}
    first = ""
    for name, pair in factors.items():
        W = sites[name].weight
        A, B = _pair(name, pair, W)
        first = first or name
        if A.shape[1] != ready.get(first, (A,))[0].shape[1]:
            got = f"{A.shape[1]} in {name} and {ready[first][0].shape[1]} in {first}"
            raise ValueError(refuse("factors", "have the same number of components in every layer", got))
        kept = torch.float32 if W.dtype.itemsize < 4 else W.dtype  # as components of a narrower target are trained
        ready[name] = A.to(W.device, kept), B.to(W.device, kept)
    for name, owner in (ties or {}).items():
        if tied.get(name) != owner.removeprefix("="):
            got = f"{owner!r} for {name}, which is tied to {tied.get(name)!r}"
            raise ValueError(refuse("ties", "name for each tied layer the one that holds its matrix", got))
    rank = max(A.shape[-1] for A, _ in ready.values())
    pad = torch.nn.functional.pad
    padded = {
        name: (pad(A, (0, rank - A.shape[-1])), pad(B, (0, 0, 0, rank - B.shape[-2]))) for name, (A, B) in ready.items()
    }
    components = Components.from_factors(padded, ties_of(sites.values()))
    return ComponentModel(model, list(sites.values()), components, output)


def ties_of(sites: Iterable[Site]) -> dict[str, str]:
    """For each tied site the one that holds its matrix, as `Components.from_factors` takes them."""
    return {site.name: site.tied_to if site.flipped else f"={site.tied_to}" for site in sites if site.tied_to}


def _pair(name: str, pair: Any, W: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a layer with four axes, of fitting shapes."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(refuse(f"factors[{name!r}]", "be a pair (A, B)", type(pair).__name__))
    A, B = (tensor(value, f"factors[{name!r}]") for value in pair)
    n_instances, d_in, d_out = W.shape
    A, B = (t[None] if t.dim() == 3 and n_instances == 1 else t for t in (A, B))
    fits = A.dim() == B.dim() == 4 and A.shape[:2] == B.shape[:2] and A.shape[3] == B.shape[2]
    if not fits or (A.shape[0], A.shape[2], B.shape[3]) != (n_instances, d_in, d_out) or 0 in A.shape:
        lead = "" if n_instances == 1 else f"{n_instances}, "
        hint = "y = x W, the transpose of what nn.Linear stores"
        condition = f"have shapes [{lead}C, {d_in}, m] and [{lead}C, m, {d_out}]"
        raise ValueError(refuse(f"factors[{name!r}]", condition, f"{list(A.shape)} and {list(B.shape)}", hint))
    return A, B


def split(name: str, P: Any, rank: int | None) -> tuple[Tensor, Tensor]:
    """Factors of matrices [.., C, d_in, d_out] by SVD: `A = U √S`, `B = √S Vᵀ`, the largest `rank` terms."""
    P = tensor(P, f"matrices[{name!r}]")
    if P.dim() not in (3, 4) or 0 in P.shape:
        condition = "have shape [C, d_in, d_out], or that with n_instances in front"
        raise ValueError(refuse(f"matrices[{name!r}]", condition, list(P.shape)))
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(refuse("rank", "be a whole number of at least 1, or None", repr(rank)))
    U, S, Vh = torch.linalg.svd(P.double(), full_matrices=False)
    # singular values of rounding size, for the dtype the matrices came in, are no rank
    smallest = S.amax() * max(P.shape[-2:]) * torch.finfo(P.dtype).eps
    needed = max(int((S > smallest).sum(-1).max()), 1)
    kept = min(needed if rank is None else rank, S.shape[-1])
    root = S[..., :kept].sqrt()
    return U[..., :kept] * root[..., None, :], root[..., None] * Vh[..., :kept, :]
