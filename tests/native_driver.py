"""Runs every function of a compiled `_C`, given by its path, on numpy arrays of exactly the right size.

    python native_driver.py MODULE check [FUNCTION]  awkward sizes at every level with 1 and 2 threads, against numpy
    python native_driver.py MODULE parallel THREADS  sizes that are shared among threads, two Python threads at a time
    python native_driver.py MODULE digest THREADS    a hash of all outputs of each function, level by level, as JSON
    python native_driver.py MODULE gil               another Python thread runs during every function

No torch here, so that it starts quickly under a sanitizer, whose allocator guards the end of each array. An array
without entries has the address 0, as torch's have. A function that this file does not drive is an error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
DTYPES = ("float32", "float64")


class Job(NamedTuple):
    """One call: `prepare(threads)` gives its arguments and its outputs, poisoned; `expected` what they should be.

    An expected value comes with the size of the terms it is a sum of, or with 0 where it must be equal.
    """

    function: str
    label: str
    prepare: Callable[[int], tuple[tuple, list[Array]]]
    expected: Callable[[], list[tuple[Array, float]]]


def address(a: Array) -> int:
    assert a.flags.c_contiguous
    return a.ctypes.data if a.size else 0


def poisoned(dtype: str, *shape: int) -> Array:
    wrong = np.nan if dtype.startswith("float") else np.iinfo(dtype).max
    return np.full(shape, wrong, dtype)


def sized(value: Array, terms: Any = None) -> tuple[Array, float]:
    return value, float(np.max(np.abs(value if terms is None else terms), initial=1e-300))


def sums(formula: str, *arrays: Array) -> Array:
    return np.einsum(formula, *(np.asarray(a, np.float64) for a in arrays), optimize=True)


class Source:
    """Random arrays of one dtype, each a block of memory of its own."""

    def __init__(self, seed: int, dtype: str) -> None:
        self.rng, self.dtype = np.random.default_rng(seed), dtype

    def normal(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape).astype(self.dtype)

    def uniform(self, *shape: int) -> Array:
        return self.rng.random(shape).astype(self.dtype)

    def name(self, function: str) -> str:
        return f"{function}_{self.dtype}"


# ---------------------------------------------------------------------------------------------------------- selections


def grouped(mask: Array, capacity: int) -> list[Array]:
    """Both orders of a selection [I, b, C], padded with zeros to `capacity` pairs."""
    I, b, C = mask.shape
    sample, component, position = (np.zeros((I, capacity), np.int32) for _ in range(3))
    offsets, sample_offsets = np.zeros((I, C + 1), np.int64), np.zeros((I, b + 1), np.int64)
    for i in range(I):
        of_sample, of_component = np.nonzero(mask[i])
        by_component = np.lexsort((of_sample, of_component))
        n = len(of_sample)
        sample[i, :n], component[i, :n] = of_sample[by_component], of_component
        position[i, by_component] = np.arange(n)
        offsets[i, 1:], sample_offsets[i, 1:] = mask[i].sum(0).cumsum(), mask[i].sum(1).cumsum()
    return [sample, offsets, component, sample_offsets, position]


def largest(scores: Array, wanted: int) -> Array:
    """Which of scores [n] are the `wanted` largest: NaN first, then by value, then by index."""
    nan = np.isnan(scores)
    order = np.lexsort((np.arange(scores.size), -np.where(nan, 0, scores), ~nan))
    mask = np.zeros(scores.size, bool)
    mask[order[:wanted]] = True
    return mask


def batch_topk(
    source: Source,
    I: int,
    b: int,
    C: int,
    kind: str,
    K: int | list[int] | None = None,
    k: int = -1,
    hint: float | None = None,
) -> Job:
    """K of each instance or k of each sample; with a hint, the same for every instance, the thresholds as well."""
    scores = source.normal(I, b, C)
    if kind == "ties":
        scores = np.round(scores)
    if kind == "special":
        tiny = float(np.finfo(source.dtype).smallest_subnormal)
        values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, tiny, 3 * tiny, -tiny, 1.0], source.dtype)
        scores = values[source.rng.integers(len(values), size=(I, b, C))]
    if K is None:
        counts, each, capacity = None, [k * b] * I, k * b
    elif isinstance(K, int):
        counts, each, capacity = None, [K] * I, K
    else:
        counts, each, capacity = np.array(K, np.int64), K, max(K)

    def prepare(threads: int) -> tuple[tuple, list[Array]]:
        shapes = (("int32", capacity), ("int64", C + 1), ("int32", capacity), ("int64", b + 1), ("int32", capacity))
        out = [poisoned(dtype, I, n) for dtype, n in shapes]
        thresholds = np.full(I, hint, source.dtype)  # NaN for None
        at_counts = 0 if counts is None else address(counts)
        at_thresholds = 0 if hint is None else address(thresholds)
        args = (address(scores), [address(o) for o in out], I, b, C, capacity, at_counts, k, at_thresholds, threads)
        return args, out if hint is None else [*out, thresholds]

    def expected() -> list[tuple[Array, float]]:
        if k >= 0:
            mask = np.stack([[largest(row, k) for row in of] for of in scores]) if scores.size else scores > 0
        else:
            mask = np.stack([largest(of.ravel(), n).reshape(b, C) for of, n in zip(scores, each, strict=True)])
        lists = grouped(mask.reshape(I, b, C), capacity)
        if hint is not None:
            chosen = (of[kept.reshape(b, C)] for of, kept in zip(scores, mask, strict=True))
            # fmin looks past NaN, so NaN is the threshold only when there is nothing else
            lists.append(np.array([np.fmin.reduce(c) + 0.0 if c.size else hint for c in chosen], source.dtype))
        return [(o, 0.0) for o in lists]

    return Job(source.name("batch_topk"), f"{I} {b} {C} {kind} K={K} k={k} hint={hint}", prepare, expected)


def forward_jobs(
    source: Source, I: int, b: int, C: int, m: int, d_in: int, d_out: int, selected: float, padding: int = 0
) -> Iterator[Job]:
    x, At, B = source.normal(I, b, d_in), source.normal(I, C, m, d_in), source.normal(I, C, m, d_out)
    grad_y = source.normal(I, b, d_out)
    mask = source.rng.random((I, b, C)) < selected
    K = int(mask.sum((1, 2)).max(initial=0)) + padding
    selection = grouped(mask, K)
    sizes, addresses = [I, b, C, m, d_in, d_out, K], [address(s) for s in selection]
    valid = np.arange(K) < selection[1][:, -1:]  # [I, K]

    def pairs(values: Array) -> Array:
        """values [I, b, C, m] of the selected pairs, in component-major order; NaN in the padding, as it is unused."""
        out = np.full((I, K, m), np.nan)
        for i in range(I):
            component = np.repeat(np.arange(C), np.diff(selection[1][i]))
            out[i, valid[i]] = values[i, selection[0][i, valid[i]], component]
        return out

    u64 = sums("ibd,icrd->ibcr", x, At) * mask[..., None]
    g64 = sums("ibd,icrd->ibcr", grad_y, B) * mask[..., None]
    u_size = sums("ibd,icrd->ibcr", abs(x), abs(At)).max(initial=1e-300)
    g_size = sums("ibd,icrd->ibcr", abs(grad_y), abs(B)).max(initial=1e-300)
    label = f"{I} {b} {C} {m} {d_in} {d_out} {selected} {padding}"

    def forward(threads: int) -> tuple[tuple, list[Array]]:
        u, y = poisoned(source.dtype, I, K, m), poisoned(source.dtype, I, b, d_out)
        return (*map(address, (x, At, B)), addresses, address(u), address(y), sizes, threads), [u, y]

    def forward_expected() -> list[tuple[Array, float]]:
        y = sums("ibcr,icro->ibo", u64, B)
        return [(pairs(u64), u_size), sized(y, sums("ibcr,icro->ibo", abs(u64) + u_size, abs(B)))]

    yield Job(source.name("component_forward_selected"), label, forward, forward_expected)
    u = pairs(u64).astype(source.dtype)
    other = Source(K, source.dtype)  # which leaves the numbers of the jobs that follow as they are
    before = [other.normal(*factor.shape) for factor in (At, B)]  # what gradients are added to
    for factor in before:
        factor[~mask.any(1)] = np.nan  # of components without pairs
    for need_x, need_A, need_B, add in ((1, 1, 1, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 1, 1, 1)):

        def backward(
            threads: int, needs: tuple = (need_x, need_A, need_B), add: bool = bool(add)
        ) -> tuple[tuple, list[Array]]:
            grad_u = poisoned(source.dtype, I, K, m)
            out = [poisoned(source.dtype, *array.shape) for array in (x, At, B)]
            if add:
                out[1:] = [array.copy() for array in before]
            to = [address(o) if need else 0 for o, need in zip(out, needs, strict=True)]
            args = (*map(address, (grad_y, x, At, B, u)), addresses, address(grad_u), *to, add, sizes, threads)
            return args, [grad_u, *(o for o, need in zip(out, needs, strict=True) if need)]

        def backward_expected(
            needs: tuple = (need_x, need_A, need_B), add: bool = bool(add)
        ) -> list[tuple[Array, float]]:
            values = [
                sized(sums("ibcr,icrd->ibd", g64, At), sums("ibcr,icrd->ibd", abs(g64) + g_size, abs(At))),
                sized(sums("ibcr,ibd->icrd", g64, x), sums("ibcr,ibd->icrd", abs(g64) + g_size, abs(x))),
                sized(sums("ibcr,ibd->icrd", u64, grad_y), sums("ibcr,ibd->icrd", abs(u64) + u_size, abs(grad_y))),
            ]
            if add:
                values[1:] = [(v + b64, size + 4) for (v, size), b64 in zip(values[1:], before, strict=True)]
            wanted = d_in > 0 and ((needs[0] and I * b > 0) or (needs[1] and At.size > 0))
            through = pairs(g64) if wanted else np.full((I, K, m), np.nan)
            return [(through, g_size), *(v for v, need in zip(values, needs, strict=True) if need)]

        yield Job(source.name("component_forward_selected_backward"), label, backward, backward_expected)


# -------------------------------------------------------------------------------------------------------- attributions


def attribution_jobs(
    source: Source, I: int, b: int, C: int, o: int, layers: Sequence[tuple[int, int, int]], gradient: str = "dense"
) -> Iterator[Job]:
    """Layers are (d_in, d_out, rank); `gradient` is dense, shared by all samples, or strided (outputs first)."""
    xs = [source.normal(I, b, d_in) for d_in, _, _ in layers]
    Ats = [source.normal(I, C, m, d_in) for d_in, _, m in layers]
    Bs = [source.normal(I, C, m, d_out) for _, d_out, m in layers]
    stored = {"dense": (I, b, o), "shared": (I, 1, o), "strided": (o, b, I)}[gradient]
    memory = [source.normal(*stored, d_out) for _, d_out, _ in layers]
    gs = [g.transpose(2, 1, 0, 3) if gradient == "strided" else g for g in memory]
    grad = source.normal(I, b, C)
    arguments = []
    for x, g, held, At, B, (d_in, d_out, m) in zip(xs, gs, memory, Ats, Bs, layers, strict=True):
        strides = [s // g.itemsize for s in g.strides[:3]]
        strides[1] = 0 if gradient == "shared" else strides[1]
        arguments.append([*map(address, (x, held, At, B)), d_in, d_out, m, *strides])
    label = f"{I} {b} {C} {o} {list(layers)} {gradient}"
    full = [np.broadcast_to(g, (I, b, *g.shape[2:])) for g in gs]

    def inner(absolute: bool) -> Array:
        """sum over layers of <x A_c, g B_c^T>, or of the absolute values, [I, b, C, o]."""
        total = np.zeros((I, b, C, o))
        for layer in zip(xs, full, Ats, Bs, strict=True):
            x, g, At, B = (abs(a) for a in layer) if absolute else layer
            total += sums("ibcr,icrd,ibod->ibco", sums("ibd,icrd->ibcr", x, At), B, g)
        return total

    def forward(threads: int) -> tuple[tuple, list[Array]]:
        out = poisoned(source.dtype, I, b, C)
        return (arguments, address(out), I, b, C, o, threads), [out]

    def forward_expected() -> list[tuple[Array, float]]:
        return [sized(np.square(inner(False)).sum(-1), np.square(inner(True)).sum(-1))]

    yield Job(source.name("attribution_reduce"), label, forward, forward_expected)

    def backward(threads: int) -> tuple[tuple, list[Array]]:
        to_A = [poisoned(source.dtype, *At.shape) for At in Ats]
        to_B = [poisoned(source.dtype, *B.shape) for B in Bs]
        addresses = [address(a) for a in to_A], [address(a) for a in to_B]
        return (arguments, address(grad), *addresses, I, b, C, o, threads), to_A + to_B

    def backward_expected() -> list[tuple[Array, float]]:
        parts = []
        for absolute in (False, True):
            d = 2 * inner(absolute) * (abs(grad) if absolute else grad)[..., None]  # [I, b, C, o]
            to_A, to_B = [], []
            for layer in zip(xs, full, Ats, Bs, strict=True):
                x, g, At, B = (abs(a) for a in layer) if absolute else layer
                step = sums("ibco,ibod->ibcd", d, g)
                to_A.append(sums("ibcd,icrd,ibx->icrx", step, B, x))
                to_B.append(sums("ibcr,ibcd->icrd", sums("ibd,icrd->ibcr", x, At), step))
            parts.append(to_A + to_B)
        return [sized(*pair) for pair in zip(*parts, strict=True)]

    yield Job(source.name("attribution_reduce_backward"), label, backward, backward_expected)


class Network(NamedTuple):
    """The arguments of `TangentArguments`, which only a loaded module can make."""

    inputs: list
    lefts: list
    terms: list
    barriers: list
    links: list
    sizes: tuple[int, int, int]


class Wiring(NamedTuple):
    """Widths of inputs and barriers; lefts (input, rank), terms (source, barrier), links (from, to) by number."""

    inputs: tuple[int, ...]
    lefts: tuple[tuple[int, int], ...]
    terms: tuple[tuple[int, int], ...]
    barriers: tuple[int, ...]
    gated: tuple[int, ...] = ()
    links: tuple[tuple[int, int], ...] = ()


def tangent_jobs(source: Source, I: int, b: int, C: int, wiring: Wiring, shared: bool = False) -> Iterator[Job]:
    """`shared`: the instances have the links in common."""
    widths = wiring.barriers
    rows = [*wiring.inputs, *(rank for _, rank in wiring.lefts)]
    xs = [source.normal(I, b, width) for width in wiring.inputs]
    Ats = [source.normal(I, C, rank, wiring.inputs[k]) for k, rank in wiring.lefts]
    Fs = [source.normal(I, C, rows[k], widths[j]) for k, j in wiring.terms]
    gates = {j: source.normal(I, b, widths[j]) for j in wiring.gated}
    links = [source.normal(1 if shared else I, widths[i], widths[j]) for i, j in wiring.links]
    grad = source.normal(I, b, C)
    network = Network(
        [(address(x), x.shape[2]) for x in xs],
        [(address(At), k, rank) for At, (k, rank) in zip(Ats, wiring.lefts, strict=True)],
        [(address(F), k, j) for F, (k, j) in zip(Fs, wiring.terms, strict=True)],
        [(address(gates[j]) if j in gates else 0, width) for j, width in enumerate(widths)],
        [
            (address(L), i, j, 0 if shared else L.shape[1] * L.shape[2])
            for L, (i, j) in zip(links, wiring.links, strict=True)
        ],
        (I, b, C),
    )
    label = f"{I} {b} {C} {tuple(wiring)} {shared}"

    def tangents(absolute: bool) -> tuple[list[Array], list[Array], list[Array], list[Array], list[Array]]:
        """Rows of all sources, gated tangents of all barriers, and the F, gates and links that they came from."""
        of = np.abs if absolute else np.asarray
        full = [np.broadcast_to(of(L), (I, *L.shape[1:])) for L in links]
        shut = [of(gates[j])[:, :, None] if j in gates else np.ones((I, b, 1, 1)) for j in range(len(widths))]
        found = [np.broadcast_to(of(x)[:, :, None], (I, b, C, x.shape[2])).astype(np.float64) for x in xs]
        found += [sums("ibd,icrd->ibcr", of(xs[k]), of(At)) for At, (k, _) in zip(Ats, wiring.lefts, strict=True)]
        out: list[Array] = []
        for j, width in enumerate(widths):
            t = np.zeros((I, b, C, width))
            for F, (k, to) in zip(Fs, wiring.terms, strict=True):
                if to == j:
                    t += sums("ibcr,icro->ibco", found[k], of(F))
            for L, (start, to) in zip(full, wiring.links, strict=True):
                if to == j:
                    t += sums("ibcr,iro->ibco", out[start], L)
            out.append(t * shut[j])
        return found, out, [of(F) for F in Fs], shut, full

    def forward(threads: int) -> tuple[tuple, list[Array]]:
        out = poisoned(source.dtype, I, b, C)
        return (network, address(out), threads), [out]

    def forward_expected() -> list[tuple[Array, float]]:
        return [sized(*(np.square(tangents(absolute)[1][-1]).sum(-1) for absolute in (False, True)))]

    yield Job(source.name("attribution_tangent"), label, forward, forward_expected)

    def backward(threads: int) -> tuple[tuple, list[Array]]:
        to_A, to_F = ([poisoned(source.dtype, *t.shape) for t in part] for part in (Ats, Fs))
        addresses = [address(t) for t in to_A], [address(t) for t in to_F]
        return (network, address(grad), *addresses, threads), to_A + to_F

    def backward_expected() -> list[tuple[Array, float]]:
        parts = []
        for absolute in (False, True):
            found, t, F, shut, full = tangents(absolute)
            flows = [np.zeros_like(a) for a in t]  # gradients by the tangents before their gates
            flows[-1] = 2 * t[-1] * (abs(grad) if absolute else grad)[..., None] * shut[-1]
            for j in reversed(range(len(widths) - 1)):
                for L, (start, to) in zip(full, wiring.links, strict=True):
                    if start == j:
                        flows[j] += sums("ibco,iro->ibcr", flows[to], L)
                flows[j] *= shut[j]
            to_F = [sums("ibcr,ibco->icro", found[k], flows[j]) for k, j in wiring.terms]
            to_A = []
            for n, (k, rank) in enumerate(wiring.lefts):
                du = np.zeros((I, b, C, rank))
                for f, (number, j) in zip(F, wiring.terms, strict=True):
                    if number == len(xs) + n:
                        du += sums("ibco,icro->ibcr", flows[j], f)
                to_A.append(sums("ibcr,ibd->icrd", du, abs(xs[k]) if absolute else xs[k]))
            parts.append(to_A + to_F)
        return [sized(*pair) for pair in zip(*parts, strict=True)]

    yield Job(source.name("attribution_tangent_backward"), label, backward, backward_expected)


CHAIN = Wiring(
    (5, 7), ((0, 2), (1, 3)), ((2, 0), (2, 1), (2, 2), (3, 2), (1, 1)), (7, 17, 3), (0, 1), ((0, 1), (0, 2), (1, 2))
)
# barrier 0 gets nothing, barrier 1 leads nowhere, left 1 reaches nothing
IDLE = Wiring((4, 3), ((0, 2), (1, 5)), ((2, 1), (2, 2)), (5, 6, 7), (0, 1, 2), ((0, 2),))


# ---------------------------------------------------------------------------------------------- sums, singular values


def sum_loss(source: Source, I: int, n: int) -> Job:
    total, target = source.normal(I, n), source.normal(I, n)

    def prepare(threads: int) -> tuple[tuple, list[Array]]:
        residual, loss = total.copy(), poisoned(source.dtype, I)
        return (address(residual), address(target), address(loss), I, n, threads), [residual, loss]

    def expected() -> list[tuple[Array, float]]:
        residual = total.astype(np.float64) - target
        return [sized(residual, abs(total) + abs(target)), sized(np.square(residual).sum(1))]

    return Job(source.name("component_sum_loss"), f"{I} {n}", prepare, expected)


def svd_jobs(source: Source, I: int, C: int, m: int, d_in: int, d_out: int, b: int) -> Iterator[Job]:
    At, B = source.normal(I, C, m, d_in), source.normal(I, C, m, d_out)
    if m > 1:
        At[:, ::2, 1] = At[:, ::2, 0]  # in every other component a dependent column
    counts = source.rng.integers(0, b + 1, (I, C))
    mask = source.uniform(I, b, C) * (source.rng.random((I, b, C)) < 0.7).astype(source.dtype)
    sizes, label = [I, C, m, d_in, d_out], f"{I} {C} {m} {d_in} {d_out} {b}"
    product = sums("icrd,icro->icdo", At, B)
    rank = min(m, d_in, d_out)

    def decomposed() -> tuple[Array, Array, Array]:
        if product.size == 0:
            return np.zeros((I, C, d_in, rank)), np.zeros((I, C, rank)), np.zeros((I, C, rank, d_out))
        U, sigma, Vt = np.linalg.svd(product, full_matrices=False)
        return U[..., :rank], sigma[..., :rank], Vt[..., :rank, :]

    def values(threads: int) -> tuple[tuple, list[Array]]:
        out = poisoned(source.dtype, I, C, m)
        return (address(At), address(B), address(out), sizes, threads), [out]

    def values_expected() -> list[tuple[Array, float]]:
        return [sized(np.pad(decomposed()[1], ((0, 0), (0, 0), (0, m - rank))))]

    yield Job(source.name("component_svdvals"), label, values, values_expected)
    norms = np.square(At.astype(np.float64)).sum(-1), np.square(B.astype(np.float64)).sum(-1)
    eps = 1e-3

    def slope(base: Array, p: float) -> Array:
        return p / 2 * base ** (p / 2 - 1)

    there = [source.normal(*f.shape) for f in (At, B)]  # what gradients are added to
    for exact, p, batch, gradients, scale, accumulate in (
        (1, 0.9, b, 1, 1.0, 0),
        (1, 2.0, -1, 1, 1.5, 0),
        (1, 0.9, b, 1, 0.5, 1),
        (1, 1.0, b, 0, 1.0, 0),
        (0, 0.9, -1, 1, 1.0, 0),
        (0, 0.9, b, 1, 0.5, 1),
        (0, 4.0, b, 0, 1.0, 0),
    ):

        def sum_of(
            threads: int,
            exact: int = exact,
            p: float = p,
            batch: int = batch,
            gradients: int = gradients,
            scale: float = scale,
            accumulate: int = accumulate,
        ) -> tuple[tuple, list[Array]]:
            loss, grads = poisoned(source.dtype, I), [poisoned(source.dtype, *f.shape) for f in (At, B)]
            if accumulate:
                grads = [t.copy() for t in there]
            to = [address(g) if gradients else 0 for g in grads]
            how = (p, eps, batch, bool(exact), scale, bool(accumulate))
            args = (*map(address, (At, B, counts)), *how, address(loss), *to, sizes, threads)
            return args, [loss, *(grads if gradients else [])]

        def sum_expected(
            exact: int = exact,
            p: float = p,
            batch: int = batch,
            gradients: int = gradients,
            scale: float = scale,
            accumulate: int = accumulate,
        ) -> list[tuple[Array, float]]:
            U, sigma, Vt = decomposed()
            squares = np.pad(np.square(sigma), ((0, 0), (0, 0), (0, m - rank))) if exact else norms[0] * norms[1]
            loss = (counts * ((squares + eps) ** (p / 2)).sum(-1)).sum(-1)
            if batch >= 0:
                loss = loss + (batch - counts).sum(-1) * m * eps ** (p / 2)
            if not gradients:
                return [sized(loss)]
            if exact:
                step = 2 * sigma * slope(np.square(sigma) + eps, p) * counts[..., None]
                G = sums("icdk,ick,icko->icdo", U, step, Vt)
                grads = [sums("icdo,icro->icrd", G, B), sums("icdo,icrd->icro", G, At)]
            else:
                step = 2 * slope(squares + eps, p) * counts[..., None]
                grads = [(step * norms[1 - j])[..., None] * f for j, f in enumerate((At, B))]
            return [sized(loss), *(sized(scale * g + accumulate * t) for g, t in zip(grads, there, strict=True))]

        yield Job(source.name("schatten"), f"{label} {exact} {p} {batch} {accumulate}", sum_of, sum_expected)

    for p, gradients in ((0.9, 1), (2.0, 0)):

        def masked(threads: int, p: float = p, gradients: int = gradients) -> tuple[tuple, list[Array]]:
            loss, grads = poisoned(source.dtype, I), [poisoned(source.dtype, *f.shape) for f in (At, B, mask)]
            if m == 0:
                grads[2][...] = 0  # without ranks the kernel has nothing to write there; the caller does
            to = [address(g) if gradients else 0 for g in grads]
            args = (*map(address, (At, B, mask)), p, eps, b, address(loss), *to, sizes, threads)
            return args, [loss, *(grads if gradients else [])]

        def masked_expected(p: float = p, gradients: int = gradients) -> list[tuple[Array, float]]:
            S = norms[0] * norms[1]  # [I, C, m]
            weight = mask.astype(np.float64)[..., None]  # [I, b, C, 1]
            base = weight * S[:, None] + eps
            loss = (base ** (p / 2)).sum((1, 2, 3))
            if not gradients:
                return [sized(loss)]
            step = 2 * (weight * slope(base, p)).sum(1)
            factors = [sized((step * norms[1 - j])[..., None] * f) for j, f in enumerate((At, B))]
            return [sized(loss), *factors, sized((S[:, None] * slope(base, p)).sum(-1))]

        yield Job(source.name("schatten_masked"), f"{label} {p}", masked, masked_expected)


# ------------------------------------------------------------------------------------------------------ products, rows


def thin_product(
    source: Source, I: int, m: int, n: int, k: int, layout: str = "rows", alpha: float = 0.7, add: bool = False
) -> Job:
    """Factors stored by `rows` or by `columns`, or `shared`: one A, by columns, for all instances."""
    stored = {"rows": (I, m, k), "columns": (I, k, m), "shared": (1, k, m)}[layout]
    in_A, in_B = source.normal(*stored), source.normal(*((I, n, k) if layout == "columns" else (I, k, n)))
    A = in_A if layout == "rows" else np.broadcast_to(in_A.transpose(0, 2, 1), (I, m, k))
    B = in_B.transpose(0, 2, 1) if layout == "columns" else in_B
    before = source.normal(I, m, n)
    sizes = [I, m, n, k, *(s // A.itemsize for s in A.strides), *(s // B.itemsize for s in B.strides)]

    def prepare(threads: int) -> tuple[tuple, list[Array]]:
        out = before.copy() if add else poisoned(source.dtype, I, m, n)
        return (address(in_A), address(in_B), address(out), alpha, add, sizes, threads), [out]

    def expected() -> list[tuple[Array, float]]:
        product, terms = (alpha * sums("imk,ikn->imn", *factors) for factors in ((A, B), (abs(A), abs(B))))
        return [sized(product + add * before, terms + add * abs(before))]

    return Job(source.name("thin_product"), f"{I} {m} {n} {k} {layout} {alpha} {add}", prepare, expected)


def rows_jobs(source: Source, n: int, d: int, special: bool = False) -> Iterator[Job]:
    """`special`: rows at the ends of the dtype, of zeros, and with a NaN or infinities, by turns."""
    rows, grad, limits = source.normal(n, d), source.normal(n, d), np.finfo(source.dtype)
    if special and d:
        for r in range(n):
            scale = (1.0, limits.max / 4, float(limits.smallest_subnormal) * 4, 0.0)[r % 4]
            rows[r] = np.clip(rows[r], -3, 3) * scale
        rows[5::6, 0], rows[8::9, -1], rows[16::18, d // 2] = np.nan, np.inf, -np.inf
    label = f"{n} {d} {special}"

    def norm(threads: int) -> tuple[tuple, list[Array]]:
        out = rows.copy()
        return (address(out), n, d, threads), [out]

    def norm_expected() -> list[tuple[Array, float]]:
        r64 = rows.astype(np.float64)
        largest = np.abs(r64).max(1, keepdims=True, initial=0)
        with np.errstate(invalid="ignore", over="ignore"):  # beside infinities
            scaled = r64 / np.where(np.isfinite(largest) & (largest > 0), largest, 1)
            size = np.sqrt(np.square(scaled).sum(1, keepdims=True))
            return [(np.where(np.isnan(size), r64, scaled / np.where(size > 0, size, 1)), 1.0)]

    yield Job(source.name("unit_norm"), label, norm, norm_expected)
    if special:
        return

    def along(threads: int) -> tuple[tuple, list[Array]]:
        out = grad.copy()
        return (address(out), address(rows), n, d, threads), [out]

    def along_expected() -> list[tuple[Array, float]]:
        parts = [sums("nd,nd,ne->ne", *three) for three in ((grad, rows, rows), (abs(grad), abs(rows), abs(rows)))]
        return [sized(grad - parts[0], abs(grad) + parts[1])]

    yield Job(source.name("remove_along"), label, along, along_expected)


# ---------------------------------------------------------------------------------------------------------- the sizes


def awkward_jobs(dtype: str) -> Iterator[Job]:
    """Empty, one, primes, and one less and one more than each block that a kernel works in."""
    source = Source(0, dtype)
    for I, n in ((0, 5), (1, 0), (1, 1), (2, 7), (2, 15), (1, 16), (3, 17), (1, 4095), (2, 4096), (2, 4097), (1, 8201)):
        yield sum_loss(source, I, n)

    for kind in ("normal", "ties", "special"):
        for I, b, C in ((1, 1, 1), (2, 7, 5), (1, 37, 13), (3, 16, 64)):
            for K in {0, 1, b * C // 3, b * C}:
                yield batch_topk(source, I, b, C, kind, K)
            for k in {0, 1, C // 2, C}:
                yield batch_topk(source, I, b, C, kind, k=k)
        for hint in (np.nan, np.inf, -1.0, 0.0, 0.5, 9.0):
            yield batch_topk(source, 2, 37, 13, kind, 50, hint=hint)
            yield batch_topk(source, 3, 11, 7, kind, [0, 77, 20], hint=hint)
            yield batch_topk(source, 1, 67, 65, kind, 500, hint=hint)  # enough to sample from, in blocks and beyond
        yield batch_topk(source, 3, 11, 7, kind, [0, 77, 20])
        yield batch_topk(source, 2, 11, 7, kind, [5, 0])
    for I, b, C in ((2, 0, 5), (2, 5, 0), (1, 0, 0)):
        yield batch_topk(source, I, b, C, "normal", 0)
        yield batch_topk(source, I, b, C, "normal", k=0)

    widths = ((1, 1), (2, 3), (15, 16), (17, 31), (32, 33), (63, 64), (65, 67), (129, 5), (3, 127))
    for n, (d_in, d_out) in enumerate(widths):
        yield from forward_jobs(source, 1 + n % 2, 5 + n, 3, 1 + n % 6, d_in, d_out, 0.5, padding=n % 3)
    for I, b, C, m, d_in, d_out in ((0, 3, 2, 2, 3, 3), (1, 0, 3, 2, 5, 4), (2, 3, 0, 2, 5, 4), (2, 3, 2, 0, 5, 4)):
        yield from forward_jobs(source, I, b, C, m, d_in, d_out, 0.5)
    for d_in, d_out in ((0, 4), (4, 0), (0, 0)):
        yield from forward_jobs(source, 2, 3, 2, 3, d_in, d_out, 0.7)
    yield from forward_jobs(source, 2, 7, 5, 3, 11, 13, 0.0)
    yield from forward_jobs(source, 2, 7, 5, 3, 11, 13, 0.0, padding=4)
    yield from forward_jobs(source, 2, 9, 5, 9, 7, 3, 1.0)

    for b in (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33):
        gradient = ("dense", "shared", "strided")[b % 3]
        yield from attribution_jobs(source, 1 + b % 2, b, 3, 1 + b % 6, [(5, 3, 2), (3, 5, 7)], gradient)
    for o in (0, 1, 4, 5):
        yield from attribution_jobs(source, 2, 6, 2, o, [(3, 2, 1)])
    for layer in ((0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 1, 5), (131, 67, 3)):
        yield from attribution_jobs(source, 2, 19, 3, 3, [layer, (2, 3, 2)])
    yield from attribution_jobs(source, 2, 5, 0, 2, [(3, 2, 1)])
    yield from attribution_jobs(source, 0, 5, 2, 2, [(3, 2, 1)], "shared")

    for b in (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65):
        yield from tangent_jobs(source, 1 + b % 2, b, 3, IDLE if b % 3 == 2 else CHAIN, shared=b % 4 > 1)
    for d_in, m, middle, d_out in ((1, 1, 1, 1), (3, 2, 5, 4), (6, 7, 7, 6), (17, 5, 16, 9), (131, 3, 33, 67)):
        wiring = Wiring((d_in,), ((0, m),), ((1, 0), (0, 1), (1, 1)), (middle, d_out), (0,), ((0, 1),))
        yield from tangent_jobs(source, 2, 19, 3, wiring)
    for d_in, m, middle, d_out in ((0, 3, 2, 2), (3, 0, 2, 2), (3, 2, 0, 2), (3, 2, 2, 0), (0, 0, 0, 0)):
        wiring = Wiring((d_in,), ((0, m),), ((1, 0), (0, 0), (1, 1)), (middle, d_out), (0, 1), ((0, 1),))
        yield from tangent_jobs(source, 2, 9, 2, wiring)
    yield from tangent_jobs(source, 2, 5, 0, CHAIN)
    yield from tangent_jobs(source, 0, 5, 2, CHAIN, shared=True)
    yield from tangent_jobs(source, 1, 5, 2, Wiring((4,), (), ((0, 0),), (3,)))

    for C, m, d_in, d_out, b in (
        (1, 1, 1, 1, 1), (3, 2, 3, 5, 4), (5, 3, 8, 7, 3), (2, 4, 15, 17, 2), (2, 7, 3, 2, 5), (3, 5, 1, 9, 3),
        (2, 16, 33, 31, 2), (9, 27, 31, 600, 2), (0, 3, 4, 5, 2), (2, 0, 4, 5, 2),
        (2, 3, 0, 5, 2), (2, 3, 4, 0, 2), (3, 2, 4, 5, 0),
    ):  # fmt: skip
        yield from svd_jobs(source, 1 + C % 2, C, m, d_in, d_out, b)
    yield from svd_jobs(source, 0, 2, 3, 4, 5, 2)

    edges = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 67)
    for at, n in enumerate(edges):
        layout, add = ("rows", "columns", "shared")[at % 3], at % 2 == 1
        yield thin_product(source, 1 + at % 3, edges[at - 5], n, edges[at - 11], layout, 1.0 if at % 4 else -2.5, add)
    for I, m, n, k in ((1, 481, 3, 5), (2, 5, 130, 33), (1, 3, 17, 513), (2, 2, 65, 1100)):  # jobs, panels, stretches
        yield thin_product(source, I, m, n, k)
        yield thin_product(source, I, m, n, k, "columns", add=True)
    for add in (False, True):
        for I, m, n, k in ((0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 30, 5, 0), (0, 0, 0, 0)):
            yield thin_product(source, I, m, n, k, "shared" if I else "rows", add=add)

    for n, d in enumerate((1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 67)):
        yield from rows_jobs(source, n, d)
        yield from rows_jobs(source, 37, d, special=True)
    yield from rows_jobs(source, 5, 0)
    yield from rows_jobs(source, 65, 3)


def parallel_jobs(dtype: str) -> Iterator[Job]:
    """Enough work, and enough pieces of it, that every walk of every kernel is shared among threads."""
    source = Source(1, dtype)
    yield sum_loss(source, 3, 90001)
    yield batch_topk(source, 3, 300, 300, "ties", 12345)
    yield batch_topk(source, 3, 300, 300, "normal", 12345, hint=1.0)
    yield batch_topk(source, 1, 600, 700, "normal", 12345)  # one instance, shared
    yield batch_topk(source, 1, 600, 700, "ties", 300000, hint=0.0)
    yield batch_topk(source, 3, 300, 300, "ties", k=37)
    yield from forward_jobs(source, 2, 300, 100, 5, 67, 45, 0.03, padding=3)
    yield from attribution_jobs(source, 3, 100, 30, 5, [(67, 45, 3), (45, 67, 3)])
    wiring = Wiring((67,), ((0, 3), (0, 2)), ((1, 0), (2, 1), (0, 1)), (45, 20), (0,), ((0, 1),))
    yield from tangent_jobs(source, 3, 300, 30, wiring, shared=True)
    yield from svd_jobs(source, 2, 100, 5, 129, 67, 20)
    yield thin_product(source, 3, 1000, 37, 515, "columns")
    yield thin_product(source, 2, 700, 130, 33, "shared", add=True)
    yield from rows_jobs(source, 3001, 131)


# ------------------------------------------------------------------------------------------------------------- running


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(module: Any, job: Job, threads: int) -> tuple[list, list[Array]]:
    args, outputs = job.prepare(threads)
    return [module.TangentArguments(*a) if isinstance(a, Network) else a for a in args], outputs


def call(module: Any, job: Job, threads: int) -> list[Array]:
    args, outputs = prepared(module, job, threads)
    getattr(module, job.function)(*args)
    return outputs


def compare(job: Job, outputs: list[Array], expected: list[tuple[Array, float]], where: str) -> None:
    for n, (got, (want, size)) in enumerate(zip(outputs, expected, strict=True)):
        place = f"{job.function}({job.label}) output {n}, {where}"
        assert got.shape == want.shape, f"{place}: {got.shape}, not {want.shape}"
        tolerance = 2000 * float(np.finfo(got.dtype).eps) * size if size else 0
        with np.errstate(invalid="ignore"):  # of infinities
            near = abs(got.astype(np.float64) - want) <= tolerance
        unlike = ~(near | (got == want) | (np.isnan(got) & np.isnan(want)))
        if unlike.any():
            first = tuple(np.argwhere(unlike)[0])
            raise AssertionError(f"{place}: {got[first]} at {first}, not {want[first]}; {unlike.sum()} such entries")


def same_bits(a: list[Array], b: list[Array]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def driven(module: ModuleType, jobs: list[Job]) -> list[Job]:
    bound = {name for name in dir(module) if name.endswith(DTYPES)}
    assert {job.function for job in jobs} == bound, "native_driver.py must drive every function that is bound"
    return jobs


def check(module: Any, only: str = "") -> None:
    jobs = driven(module, [job for dtype in DTYPES for job in (*awkward_jobs(dtype), *parallel_jobs(dtype))])
    calls = 0
    for job in jobs:
        if only and job.function != only:
            continue
        expected = job.expected()
        for level in module.cpu_levels():
            module.set_cpu_level(level)
            outputs = call(module, job, 1)
            compare(job, outputs, expected, f"{level}, 1 thread")
            assert same_bits(outputs, call(module, job, 2)), f"{job.function}({job.label}), {level}: 2 threads differ"
            calls += 2
    if not only:
        no_memory(module)
    print(f"{calls} calls at the levels {' '.join(module.cpu_levels())}")


def no_memory(module: Any) -> None:
    """A workspace that cannot be had is a MemoryError, also when several threads ask for it."""
    one = np.ones((70, 1, 1))
    at = address(one)
    layer = [[*[at] * 4, 1, 1, 1, 0, 0, 0]]  # the strides let one number stand for 2**55
    network = module.TangentArguments([(at, 2**50)], [], [(at, 0, 0)], [(0, 1)], [], (1, 70, 1))
    calls = {
        "attribution_reduce_float64": (layer, at, 1, 70, 1, 2**55, 2),
        "attribution_tangent_float64": (network, at, 2),
        "attribution_tangent_backward_float64": (network, at, [], [at], 2),
    }
    for level in module.cpu_levels():
        module.set_cpu_level(level)
        for function, args in calls.items():
            try:
                getattr(module, function)(*args)
            except MemoryError:
                continue
            raise AssertionError(f"{function}, {level}: no MemoryError")


def parallel(module: Any, threads: str) -> None:
    """Two Python threads at a time call the same function on the same inputs."""
    jobs = driven(module, [job for dtype in DTYPES for job in parallel_jobs(dtype)])
    for job in jobs:
        results: list[list[Array]] = []

        def once(job: Job = job, results: list = results) -> None:
            results.append(call(module, job, int(threads)))

        callers = [threading.Thread(target=once) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(results) == 2, f"{job.function}({job.label}): a call failed"
        expected = job.expected()
        for outputs in results:
            compare(job, outputs, expected, f"{threads} threads")
    print(f"{2 * len(jobs)} calls with {threads} threads")


def digest(module: Any, threads: str) -> None:
    jobs = driven(module, [job for dtype in DTYPES for job in (*awkward_jobs(dtype), *parallel_jobs(dtype))])
    hashes: dict[str, Any] = {}
    for level in module.cpu_levels():
        module.set_cpu_level(level)
        for job in jobs:
            of = hashes.setdefault(f"{job.function} {level}", hashlib.sha256())
            for output in call(module, job, int(threads)):
                of.update(output.tobytes())
    print(json.dumps({name: of.hexdigest() for name, of in hashes.items()}))


def gil(module: Any) -> None:
    """With a switch interval of hours, another Python thread can only run when the call gives up the GIL."""
    jobs = driven(module, [job for dtype in DTYPES for job in parallel_jobs(dtype)])
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0)

    sys.setswitchinterval(1e4)
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for job in jobs:
            args, _outputs = prepared(module, job, 1)
            function, before = getattr(module, job.function), ticks[0]
            for _ in range(3000):  # the other thread may be slow to wake up; the calls take a second or more in all
                function(*args)
                if ticks[0] > before:
                    break
            assert ticks[0] > before, f"{job.function} holds the GIL"
    finally:
        done.set()
        thread.join()
    print(f"{len(jobs)} calls without the GIL")


if __name__ == "__main__":
    path, mode, *rest = sys.argv[1:]
    {"check": check, "parallel": parallel, "digest": digest, "gil": gil}[mode](load(path), *rest)
