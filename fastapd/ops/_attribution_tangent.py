"""How much each component matters on each sample, from the tangent that its weights send through the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastapd import _native
from fastapd.ops import _check
from fastapd.ops._op import define, with_instances

if TYPE_CHECKING:
    from jaxtyping import Float

_OP = "attribution_tangent"


class TangentSource(NamedTuple):
    """What sends tangents into a network: the row x_b A_c, or x_b itself where there is no A.

    Attributes:
        x: [.., batch, width].
        A: Left factors [.., n_components, width, rank], or None.
        into: For each barrier it reaches, by number, the matrices F [.., n_components, rank or width, barrier's width].
    """

    x: Tensor
    A: Tensor | None
    into: dict[int, Tensor]


class TangentBarrier(NamedTuple):
    """Where a nonlinearity stands, or the output.

    Attributes:
        width: Of the tangent there.
        gate: The nonlinearity's derivative [.., batch, width]; None for ones.
        onward: For each later barrier that the gated tangent reaches, by number, the matrix [.., width, its width].
    """

    width: int
    gate: Tensor | None
    onward: dict[int, Tensor]


def _check_flat(
    xs: Sequence[Tensor],
    As: Sequence[Tensor],
    Fs: Sequence[Tensor],
    gates: Sequence[Tensor],
    links: Sequence[Tensor],
    lefts: Sequence[int],
    terms: Sequence[int],
    gated: Sequence[int],
    ends: Sequence[int],
    widths: Sequence[int],
) -> None:
    """Shapes of a program on tensors that all have the instance axis."""
    x = xs[0]
    n_instances, batch, n_components = x.shape[0], x.shape[-2], Fs[0].shape[1]

    def expect(name: str, t: Tensor, *shape: int) -> None:
        if tuple(t.shape) != shape:
            raise ValueError(f"{_OP}: {name} must have shape {list(shape)}, got {_check.shape(t)}")

    named = {"sources[0].x": x}
    for k, t in enumerate(xs):
        expect(f"input {k}", t, n_instances, batch, t.shape[-1])
        named[f"input {k}"] = t
    sources = [t.shape[-1] for t in xs]
    for k, A in enumerate(As):
        expect(f"A of left {k}", A, n_instances, n_components, xs[lefts[k]].shape[-1], A.shape[-1])
        named[f"A of left {k}"] = A
        sources.append(A.shape[-1])
    for k, F in enumerate(Fs):
        source, barrier = terms[2 * k : 2 * k + 2]
        expect(f"matrix into barrier {barrier}", F, n_instances, n_components, sources[source], widths[barrier])
        named[f"matrix {k}"] = F
    for gate, j in zip(gates, gated, strict=True):
        expect(f"gate of barrier {j}", gate, n_instances, batch, widths[j])
        named[f"gate {j}"] = gate
    for k, L in enumerate(links):
        start, end = ends[2 * k : 2 * k + 2]
        instances = 1 if L.shape[:1] == (1,) else n_instances
        expect(f"link from barrier {start} to {end}", L, instances, widths[start], widths[end])
        named[f"link {k}"] = L
    _check.tensors(_OP, **named)


def _arguments(
    xs: list[Tensor],
    As: list[Tensor],
    Fs: list[Tensor],
    gates: list[Tensor],
    links: list[Tensor],
    lefts: list[int],
    terms: list[int],
    gated: list[int],
    ends: list[int],
    widths: list[int],
) -> tuple[Any, list[Tensor]]:
    """The kernel's description of the program, and the tensors that must outlive it."""
    native: Any = _native.load("_C").module
    xs, Fs, gates = ([t.contiguous() for t in part] for part in (xs, Fs, gates))
    Ats, links = [A.mT.contiguous() for A in As], [L.contiguous() for L in links]
    gate_at = dict(zip(gated, (g.data_ptr() for g in gates), strict=True))
    program = native.TangentArguments(
        [(x.data_ptr(), x.shape[2]) for x in xs],
        [(At.data_ptr(), k, At.shape[2]) for At, k in zip(Ats, lefts, strict=True)],
        [(F.data_ptr(), terms[2 * k], terms[2 * k + 1]) for k, F in enumerate(Fs)],
        [(gate_at.get(j, 0), width) for j, width in enumerate(widths)],
        [
            (L.data_ptr(), ends[2 * k], ends[2 * k + 1], 0 if L.shape[0] == 1 else L.shape[1] * L.shape[2])
            for k, L in enumerate(links)
        ],
        (xs[0].shape[0], xs[0].shape[1], Fs[0].shape[1]),
    )
    return program, [*xs, *Ats, *Fs, *gates, *links]


def cpu_attribution_tangent(xs: list[Tensor], As: list[Tensor], Fs: list[Tensor], *rest: Any) -> Tensor:
    """Allocates the attributions and lets `csrc/cpu/attribution_tangent.cpp` fill them."""
    native: Any = _native.load("_C").module
    program, _keep = _arguments(xs, As, Fs, *rest)
    out = xs[0].new_empty(xs[0].shape[0], xs[0].shape[1], Fs[0].shape[1])
    run = native.attribution_tangent_float32 if out.dtype == torch.float32 else native.attribution_tangent_float64
    run(program, out.data_ptr(), torch.get_num_threads())
    return out


def cpu_attribution_tangent_backward(
    grad: Tensor, xs: list[Tensor], As: list[Tensor], Fs: list[Tensor], *rest: Any
) -> list[Tensor]:
    """Allocates the factors' gradients and lets `csrc/cpu/attribution_tangent.cpp` fill them."""
    native: Any = _native.load("_C").module
    grad = grad.contiguous()
    program, _keep = _arguments(xs, As, Fs, *rest)
    out = _backward_fake(grad, xs, As, Fs, *rest)
    double = grad.dtype == torch.float64
    run = native.attribution_tangent_backward_float64 if double else native.attribution_tangent_backward_float32
    to_A, to_F = ([t.data_ptr() for t in part] for part in (out[: len(As)], out[len(As) :]))
    run(program, grad.data_ptr(), to_A, to_F, torch.get_num_threads())
    return out


def _backward_fake(grad: Tensor, xs: list[Tensor], As: list[Tensor], Fs: list[Tensor], *rest: Any) -> list[Tensor]:
    """Gradients of every At, then of every F."""
    return [A.new_empty(A.mT.shape) for A in As] + [F.new_empty(F.shape) for F in Fs]


_PROGRAM = (
    "Tensor[] xs, Tensor[] As, Tensor[] Fs, Tensor[] gates, Tensor[] links, "
    "int[] lefts, int[] terms, int[] gated, int[] ends, SymInt[] widths"
)
_attribution_tangent_backward = define(
    "attribution_tangent_backward", f"(Tensor grad, {_PROGRAM}) -> Tensor[]", _backward_fake
)


def _fake(xs: list[Tensor], As: list[Tensor], Fs: list[Tensor], *rest: Any) -> Tensor:
    _check_flat(xs, As, Fs, *rest)
    return xs[0].new_empty(xs[0].shape[0], xs[0].shape[1], Fs[0].shape[1])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tensors, ctx.numbers = inputs[:5], inputs[5:]
    ctx.lengths = [len(part) for part in tensors]
    ctx.save_for_backward(*(t for part in tensors for t in part))


def _backward(ctx: Any, grad: Tensor) -> tuple:
    saved, parts = list(ctx.saved_tensors), []
    for length in ctx.lengths:
        parts.append(saved[:length])
        saved = saved[length:]
    gradients = _attribution_tangent_backward(grad, *parts, *ctx.numbers)
    n_inputs, n_lefts, _, n_gates, n_links = ctx.lengths
    to_A, to_F = [g.mT for g in gradients[:n_lefts]], list(gradients[n_lefts:])
    numbers = (None if part else [] for part in ctx.numbers)  # an empty list of numbers passes for one of tensors
    return [None] * n_inputs, to_A, to_F, [None] * n_gates, [None] * n_links, *numbers


_attribution_tangent = define(_OP, f"({_PROGRAM}) -> Tensor", _fake, _setup, _backward)


def _flat(sources: Sequence[TangentSource], barriers: Sequence[TangentBarrier]) -> tuple[Any, ...]:
    """The op's arguments; an input that several sources share is listed once."""
    xs: list[Tensor] = []
    place: dict[int, int] = {}
    for source in sources:
        if id(source.x) not in place:
            place[id(source.x)] = len(xs)
            xs.append(source.x)
    As, lefts, Fs, terms = [], [], [], []
    for source in sources:
        number = place[id(source.x)]
        if source.A is not None:
            lefts.append(number)
            number = len(xs) + len(As)
            As.append(source.A)
        for j, F in source.into.items():
            Fs.append(F)
            terms += [number, j]
    gated = [j for j, barrier in enumerate(barriers) if barrier.gate is not None]
    gates = [barrier.gate for barrier in barriers if barrier.gate is not None]
    links = [L for barrier in barriers for L in barrier.onward.values()]
    ends = [end for i, barrier in enumerate(barriers) for j in barrier.onward for end in (i, j)]
    return xs, As, Fs, gates, links, lefts, terms, gated, ends, [barrier.width for barrier in barriers]


def _is_tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{_OP}: {name} must be a torch.Tensor, got {type(t).__name__}")


def _check_program(sources: Sequence[TangentSource], barriers: Sequence[TangentBarrier]) -> bool:
    """Returns whether the tensors have the instance axis."""
    if len(sources) == 0 or len(barriers) == 0:
        raise ValueError(f"{_OP}: sources and barriers must not be empty, got {len(sources)} and {len(barriers)}")
    if not any(source.into for source in sources):
        raise ValueError(f"{_OP}: sources must reach a barrier, got none that does")
    x = sources[0].x
    _is_tensor("sources[0].x", x)
    instances = _check.rank(_OP, "sources[0].x", x, "batch, width")

    def axes(name: str, t: Tensor, trailing: str, leading: str = "n_instances") -> None:
        _is_tensor(name, t)
        wanted = f"{leading}, {trailing}" if instances else trailing
        if t.dim() != wanted.count(",") + 1:
            like = f"like sources[0].x {_check.shape(x)}"
            raise ValueError(f"{_OP}: {name} must have shape [{wanted}] {like}, got {_check.shape(t)}")

    for k, source in enumerate(sources):
        axes(f"sources[{k}].x", source.x, "batch, width")
        if source.A is not None:
            axes(f"sources[{k}].A", source.A, "n_components, width, rank")
        for j, F in source.into.items():
            axes(f"sources[{k}].into[{j}]", F, "n_components, rows, width")
        for j in source.into:
            if not 0 <= j < len(barriers):
                raise ValueError(f"{_OP}: sources[{k}] must reach barriers below {len(barriers)}, got {j}")
        _check.no_gradient(_OP, f"sources[{k}].x", source.x, "as it belongs to the target")
    for i, barrier in enumerate(barriers):
        for j, L in barrier.onward.items():
            axes(f"barriers[{i}].onward[{j}]", L, "rows, width", "n_instances or 1")
            if not i < j < len(barriers):
                raise ValueError(f"{_OP}: barriers[{i}] must lead to later ones below {len(barriers)}, got {j}")
            _check.no_gradient(_OP, f"barriers[{i}].onward[{j}]", L, "as it belongs to the target")
        if barrier.gate is not None:
            axes(f"barriers[{i}].gate", barrier.gate, "batch, width")
            _check.no_gradient(_OP, f"barriers[{i}].gate", barrier.gate, "as it belongs to the target")
    return instances


def attribution_tangent(
    sources: Sequence[TangentSource], barriers: Sequence[TangentBarrier]
) -> Float[Tensor, "*I b C"]:
    """Attributions of a network in gated linear form, without output gradients.

    t_j = sum_k s_k F_kj + sum_{i<j} (g_i t_i) L_ij,    s_k = x_k A_k or x_k,    a_bc = sum_o ( g_J t_J )_o^2

    Every network of linear maps, sums and elementwise nonlinearities has this form: its barriers j = 1..J are its
    nonlinearities and, last, its output; g_j is the derivative of the nonlinearity on a sample, L_ij the linear path
    from one to the next, F_kj what a component's weights send there. Then t_J is the derivative of the outputs along
    the component's weights, which is what `attribution_reduce` squares, too.

    Args:
        sources: Each with inputs [.., batch, width], left factors [.., n_components, width, rank] or None, and a matrix
            for each barrier that it reaches.
        barriers: In the order of the forward pass, each with its width, its gate [.., batch, width] or None, and a
            matrix for each later barrier that it leads to; a link's leading axis may be 1 where the instances share it.

    Returns:
        Attributions [.., batch, n_components], >= 0; no square root and no division by the number of outputs.

    Raises:
        ValueError: If shapes, devices or numbers of barriers do not match.
        TypeError: If a dtype is not floating or the dtypes differ.
        NotImplementedError: If inputs, gates or links require gradients: they come from the target and are constants.

    Gradient: in every A and F, by recomputation; a second derivative is refused.
    Cost: two flops for every entry of A, F and L, for each sample and component; no [batch, C, width] is held.
    Source: forward mode of the gradient attributions of Braun et al. 2025, appendix A.1.
    """
    instances = _check_program(sources, barriers)
    flat = _flat(sources, barriers)
    if not instances:
        flat = (*(list(with_instances(*part)) for part in flat[:5]), *flat[5:])
    _check_flat(*flat)
    found = _attribution_tangent(*flat)
    return found if instances else found.squeeze(0)
