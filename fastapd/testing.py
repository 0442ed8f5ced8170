"""Cases, inputs and tolerances shared by tests/ and bench/: what an op is given, and when its answer is close enough.

The oracle is the reference in float64 on the same numbers. Its gradients come from autograd through the reference, not
from the formulas in `fastapd.ops`, so those are tested too; singular values come from the products, which neither
backend forms. Arguments of an op are those of its public function; second forms of a public function
(`schatten_factored` with a mask, `batch_topk` with a tensor or a hint) go by the names of their torch ops; the hint
that comes back is then an output. The network that `attribution_tangent` takes comes flat, as its torch op takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastapd import _cases, _cuda, _env, backends, ops
from fastapd._cases import CASES as CASES
from fastapd._cases import EPS as EPS
from fastapd._cases import Case as Case
from fastapd._cases import P as P
from fastapd.ops._batched_svd import schatten_accumulate
from fastapd.ops._component_forward import component_forward_selected_accumulate
from fastapd.ops._thin_product import thin_product
from fastapd.ops._unit_norm import remove_along, unit_norm
from fastapd.reference import attribution_reduce as reference_attribution
from fastapd.reference import attribution_tangent as reference_tangent
from fastapd.reference import batch_topk as reference_topk
from fastapd.reference import batched_svd as reference_svd
from fastapd.reference import component_forward as reference_forward
from fastapd.reference import component_sum as reference_sum
from fastapd.reference import thin_product as reference_product
from fastapd.reference import unit_norm as reference_norm


class _Op(NamedTuple):
    public: Callable[..., Any]
    reference: Callable[..., Any]  # of arguments that have the instance axis
    inputs: Callable[[Case, _cases.Source], tuple[Any, ...]]
    differentiable: tuple[int, ...]  # which arguments have gradients
    n_terms: Callable[..., int]  # of the arguments: how many additions a value or gradient goes through


def _reference_forward(x: Tensor, A: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    return reference_forward.component_forward(x, A, B, mask)


def _reference_selected(x: Tensor, A: Tensor, B: Tensor, selection: ops.Selection) -> Tensor:
    return reference_forward.component_forward_selected(x, A, B, *selection)[0]


def _accumulated(
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    u: Tensor,
    selection: ops.Selection,
    grad_At: Tensor,
    grad_B: Tensor,
) -> tuple[Tensor, ...]:
    """The op writes into its last two arguments: here into copies, which are outputs."""
    buffers = [t.clone(memory_format=torch.contiguous_format) for t in (grad_At, grad_B)]
    return component_forward_selected_accumulate(grad_y, x, A, B, u, selection, True, *buffers), *buffers


def _reference_accumulated(
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    u: Tensor,
    selection: ops.Selection,
    grad_At: Tensor,
    grad_B: Tensor,
) -> tuple[Tensor, ...]:
    buffers = grad_At.clone(), grad_B.clone()
    run = reference_forward.component_forward_selected_accumulate
    return run(grad_y, x, A, B, u, *selection, True, *buffers), *buffers


def _topk_warm(scores: Tensor, hint: Tensor, K: int) -> tuple[Tensor, ...]:
    hint = hint.clone()
    return *ops.batch_topk(scores, K, hint), hint


def _tangent(
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
) -> Tensor:
    """The public function takes named parts of a network; here they come flat, as the torch op takes them."""
    into: list[dict[int, Tensor]] = [{} for _ in (*xs, *As)]
    for F, number, barrier in zip(Fs, terms[::2], terms[1::2], strict=True):
        into[number][barrier] = F
    inputs = [ops.TangentSource(x, None, into[k]) for k, x in enumerate(xs) if into[k] or k not in lefts]
    factored = zip(lefts, As, into[len(xs) :], strict=True)
    sources = [*inputs, *(ops.TangentSource(xs[k], A, reached) for k, A, reached in factored)]
    gate = dict(zip(gated, gates, strict=True))
    onward: list[dict[int, Tensor]] = [{} for _ in widths]
    for L, start, end in zip(links, ends[::2], ends[1::2], strict=True):
        onward[start][end] = L
    barriers = [ops.TangentBarrier(width, gate.get(j), onward[j]) for j, width in enumerate(widths)]
    return ops.attribution_tangent(sources, barriers)


def _reference_topk_counts(scores: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    return reference_topk.batch_topk_counts(scores, counts, max(counts.tolist(), default=0))


def _reference_factored(A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int | None = None) -> Tensor:
    return reference_svd.schatten_factored(A, B, counts, p, eps, -1 if batch is None else batch, False)[0]


def _reference_masked(A: Tensor, B: Tensor, mask: Tensor, p: float, eps: float) -> Tensor:
    return reference_svd.schatten_factored_masked(A, B, mask, p, eps, False)[0]


def _svdvals_of_products(A: Tensor, B: Tensor) -> Tensor:
    """Not the reference's route: the products are formed. In float64, as both backends are inside."""
    values = torch.linalg.svdvals(A.double() @ B.double())[..., : A.shape[-1]]
    return torch.nn.functional.pad(values, (0, A.shape[-1] - values.shape[-1])).to(A.dtype)


def _schatten_of_products(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int | None = None
) -> Tensor:
    sums = (_svdvals_of_products(A.double(), B.double()).square() + eps).pow(p / 2).sum(-1)
    total = (counts * sums).sum(-1)
    if batch is not None:
        total = total + (batch - counts).sum(-1).double() * A.shape[-1] * eps ** (p / 2)
    return total.to(A.dtype)


def _schatten_accumulate(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, exact: bool, scale: float, *grads: Tensor
) -> tuple[Tensor, ...]:
    """With copies of the gradients, which are outputs here."""
    grad_At, grad_B = (t.clone(memory_format=torch.contiguous_format) for t in grads)
    return schatten_accumulate(A, B, counts, p, eps, batch, exact, scale, grad_At, grad_B), grad_At, grad_B


def _reference_accumulate(
    A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, exact: bool, scale: float, *grads: Tensor
) -> tuple[Tensor, ...]:
    total_of = _schatten_of_products if exact else _reference_factored
    with torch.enable_grad():
        A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
        total = total_of(A, B, counts, p, eps, batch if batch >= 0 else None)
        to_A, to_B = torch.autograd.grad(total.sum(), (A, B))
    return total.detach(), grads[0] + scale * to_A.mT, grads[1] + scale * to_B


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _product(A: Tensor, B: Tensor, out: Tensor, alpha: float, accumulate: bool) -> Tensor:
    return thin_product(A, B, _copy(out), alpha, accumulate)


def _reference_product(A: Tensor, B: Tensor, out: Tensor, alpha: float, accumulate: bool) -> Tensor:
    out = _copy(out)
    reference_product.thin_product(A, B, out, alpha, accumulate)
    return out


def _unit_norm(rows: Tensor) -> Tensor:
    return unit_norm(_copy(rows))


def _reference_unit_norm(rows: Tensor) -> Tensor:
    rows = _copy(rows)
    reference_norm.unit_norm(rows)
    return rows


def _remove_along(grad: Tensor, rows: Tensor) -> Tensor:
    return remove_along(_copy(grad), rows.contiguous())


def _reference_remove_along(grad: Tensor, rows: Tensor) -> Tensor:
    grad = _copy(grad)
    reference_norm.remove_along(grad, rows)
    return grad


def _terms_factors(A: Tensor, B: Tensor, *rest: Any) -> int:
    return A.shape[-3] * A.shape[-1] + A.shape[-2] + B.shape[-1]


def _terms_loss(A: Tensor, B: Tensor, target: Tensor) -> int:
    return _terms_factors(A, B) + A.shape[-2] * B.shape[-1]


def _terms_svd(A: Tensor, B: Tensor, *rest: Any) -> int:
    return 16 * (A.shape[-2] + B.shape[-1]) * A.shape[-1]  # two factorisations, a product and the sweeps


def _terms_masked(A: Tensor, B: Tensor, mask: Tensor, *rest: Any) -> int:
    return _terms_factors(A, B) + mask.shape[-2] * mask.shape[-1] * A.shape[-1]


def _terms_none(*args: Any) -> int:
    return 0


def _terms_forward(x: Tensor, A: Tensor, B: Tensor, *rest: Any) -> int:
    return _terms_factors(A, B) + x.shape[-2]


def _terms_accumulated(grad_y: Tensor, *layer: Any) -> int:
    return _terms_forward(*layer) + grad_y.shape[-1]


def _terms_tangent(xs: list[Tensor], As: list[Tensor], *rest: Any) -> int:
    widths = rest[-1]
    return xs[0].shape[-2] + sum(t.shape[-1] for t in (*xs, *As)) + 2 * sum(widths)


def _terms_attribution(xs: list[Tensor], gs: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> int:
    return sum(sum(t.shape[-2:]) for t in (*xs, *gs)) + sum(A.shape[-1] for A in As)


def _terms_product(A: Tensor, *rest: Any) -> int:
    return A.shape[-1] + 2


def _terms_rows(rows: Tensor, *rest: Any) -> int:
    return rows.shape[-1] + 2


# fmt: off
_OPS = {
    "component_sum": _Op(
        ops.component_sum, reference_sum.component_sum, _cases.sum_inputs, (0, 1), _terms_factors),
    "component_sum_loss": _Op(
        ops.component_sum_loss, reference_sum.component_sum_loss, _cases.loss_inputs, (0, 1, 2), _terms_loss),
    "component_forward": _Op(
        ops.component_forward, _reference_forward, _cases.forward_inputs, (0, 1, 2, 3), _terms_forward),
    "component_forward_selected": _Op(
        ops.component_forward_selected, _reference_selected, _cases.selected_inputs, (0, 1, 2), _terms_forward),
    "component_forward_selected_accumulate": _Op(
        _accumulated, _reference_accumulated, _cases.accumulated_inputs, (), _terms_accumulated),
    "attribution_reduce": _Op(
        ops.attribution_reduce, reference_attribution.attribution_reduce, _cases.attribution_inputs, (2, 3),
        _terms_attribution),
    "attribution_tangent": _Op(
        _tangent, reference_tangent.attribution_tangent, _cases.tangent_inputs, (1, 2), _terms_tangent),
    "batch_topk": _Op(
        ops.batch_topk, reference_topk.batch_topk, _cases.batch_topk_inputs, (), _terms_none),
    "batch_topk_warm": _Op(
        _topk_warm, reference_topk.batch_topk_warm, _cases.batch_topk_warm_inputs, (), _terms_none),
    "batch_topk_counts": _Op(
        ops.batch_topk, _reference_topk_counts, _cases.batch_topk_counts_inputs, (), _terms_none),
    "sample_topk": _Op(
        ops.sample_topk, reference_topk.sample_topk, _cases.sample_topk_inputs, (), _terms_none),
    "schatten_factored": _Op(
        ops.schatten_factored, _reference_factored, _cases.schatten_inputs, (0, 1), _terms_factors),
    "schatten_factored_masked": _Op(
        ops.schatten_factored, _reference_masked, _cases.schatten_masked_inputs, (0, 1, 2), _terms_masked),
    "schatten_accumulate": _Op(
        _schatten_accumulate, _reference_accumulate, _cases.schatten_accumulate_inputs, (), _terms_svd),
    "component_svdvals": _Op(
        ops.component_svdvals, _svdvals_of_products, _cases.sum_inputs, (0, 1), _terms_svd),
    "schatten": _Op(
        ops.schatten, _schatten_of_products, _cases.schatten_inputs, (0, 1), _terms_svd),
    "thin_product": _Op(
        _product, _reference_product, _cases.product_inputs, (), _terms_product),
    "unit_norm": _Op(
        _unit_norm, _reference_unit_norm, _cases.rows_inputs, (), _terms_rows),
    "remove_along": _Op(
        _remove_along, _reference_remove_along, _cases.along_inputs, (), _terms_rows),
}
# fmt: on

OPS = tuple(_OPS)
"""The names that `inputs`, `run` and the rest take: the public ops, the second forms of two of them, and the ops that
write into their arguments, given as they are with those arguments copied."""


def cpu_backends(op: str) -> list[str]:
    """The backends that exist for an op and run on CPU tensors: Triton's and CUDA's where they are emulated."""
    emulated = {"triton": _env.triton_interprets(), "cuda": _cuda.is_emulated()}
    return [b for b in backends.TABLE[op] if emulated.get(b, True)]


def pairs(*names: str) -> list[tuple[str, str]]:
    """Each of the ops with each of its CPU backends."""
    return [(op, backend) for op in names for backend in cpu_backends(op)]


def inputs(
    op: str,
    case: str | Case,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[Any, ...]:
    """The arguments of the op's public function for a case, factors in the house layout."""
    case = CASES[case] if isinstance(case, str) else case
    return _OPS[op].inputs(case, _cases.Source(dtype, seed, device))


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    return []


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest with every tensor replaced by the function of it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, ops.Selection):
        return ops.Selection(*(function(t) for t in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, v) for v in value)
    return value


def map_floats(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    return map_tensors(lambda t: function(t) if t.is_floating_point() else t, value)


class Answer(NamedTuple):
    """What an op returned, as a list of tensors, and the gradients of its differentiable arguments."""

    outputs: list[Tensor]
    grads: list[Tensor]


def _answer(function: Callable[..., Any], op: str, args: Sequence[Any], cotangents: list[Tensor] | None) -> Answer:
    if cotangents is None:
        with torch.no_grad():
            return Answer(tensors_of(function(*args)), [])
    where = _OPS[op].differentiable
    args = [map_tensors(lambda t: t.detach().requires_grad_(), a) if i in where else a for i, a in enumerate(args)]
    leaves = [t for i in where if i < len(args) for t in tensors_of(args[i])]
    outputs = tensors_of(function(*args))
    roots = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not leaves or not roots:
        return Answer([o.detach() for o in outputs], [torch.zeros_like(t) for t in leaves])
    grads = torch.autograd.grad(
        [o for o, _ in roots], leaves, [c for _, c in roots], allow_unused=True, materialize_grads=True
    )
    return Answer([o.detach() for o in outputs], list(grads))


def run(op: str, args: Sequence[Any], cotangents: list[Tensor] | None = None) -> Answer:
    """Calls the op's public function; with cotangents, one for each output, the gradients as well."""
    return _answer(_OPS[op].public, op, args, cotangents)


def random_cotangents(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    return [d.to(o.device, o.dtype) for d, o in zip(drawn, outputs, strict=True)]


def reference(op: str, args: Sequence[Any], cotangents: list[Tensor] | None = None) -> Answer:
    """The reference at the dtype of the arguments, called directly and differentiated by autograd."""

    def function(*args: Any) -> Any:
        widest = 3 if "topk" in op or op == "thin_product" else 4
        if max(t.dim() for t in tensors_of(args)) == widest:
            return _OPS[op].reference(*args)
        outputs = _OPS[op].reference(*map_tensors(lambda t: t.unsqueeze(0), list(args)))
        return map_tensors(lambda t: t.squeeze(0), outputs)

    return _answer(function, op, args, cotangents)


def oracle(op: str, args: Sequence[Any], cotangents: list[Tensor] | None = None) -> Answer:
    """The reference in float64."""
    return reference(op, *map_floats(Tensor.double, (list(args), cotangents)))


def _sums_of_magnitudes(op: str, args: Sequence[Any], cotangents: list[Tensor] | None) -> Answer:
    """Σ|terms| of every value: the oracle on absolute values, where nothing cancels."""
    args, cotangents = map_floats(lambda t: t.double().abs(), (list(args), cotangents))
    if op == "component_sum_loss":  # which subtracts its target
        args = (*args[:2], -args[2])
    if op == "thin_product":
        args = (*args[:3], abs(args[3]), args[4])
    found = reference(op, args, cotangents)
    outputs, grads = ([t.abs() for t in ts] for ts in found)
    if op == "component_svdvals":
        outputs = [_largest(t, -1) for t in outputs]
    if op in ("component_svdvals", "schatten"):
        grads = [_largest(t, -2, -1) for t in grads]
    if op == "remove_along":  # which subtracts from its gradient
        outputs = [2 * args[0] - t for t in found.outputs]
    if op == "schatten_accumulate":
        outputs[1:] = [_largest(t, -2, -1) for t in outputs[1:]]
    return Answer(outputs, grads)


def _largest(t: Tensor, *axes: int) -> Tensor:
    """Rotations mix the entries of a component: each is then known as well as the largest."""
    return t.amax(axes, keepdim=True).expand_as(t) if t.numel() else t


def _assert_close(what: str, got: Tensor, exact: Tensor, own: Tensor, bound: Tensor | None) -> None:
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, not {list(exact.shape)}"
    assert got.dtype == own.dtype, f"{what}: dtype {got.dtype}, not {own.dtype}"
    if not got.is_floating_point():
        assert torch.equal(got, own), f"{what}: {int((got != own).sum())} of {got.numel()} integers differ"
        return
    limits = torch.finfo(got.dtype)
    wide = got.double()
    assert torch.equal(wide.isnan(), exact.isnan()), f"{what}: NaN where the oracle has none, or none where it has"
    assert torch.equal(wide[exact.isinf()], exact[exact.isinf()]), f"{what}: infinities differ"
    sound = exact.abs() <= limits.max  # what float64 can represent and this dtype too
    assert wide[sound].isfinite().all(), f"{what}: not finite where the oracle is"
    error, own_error, exact = (wide - exact)[sound].abs(), (own.double() - exact)[sound].abs(), exact[sound]
    if error.numel() == 0:
        return
    if bound is not None:
        over = ~(error <= bound[sound])
        assert not over.any(), f"{what}: {int(over.sum())} values beyond the bound, worst error {error.max():.3e}"
        return
    for name, size in (("max", lambda t: t.max().item()), ("rms", lambda t: t.square().mean().sqrt().item())):
        allowed = 2 * size(own_error) + 4 * limits.eps * size(exact.abs())
        assert size(error) <= allowed, (
            f"{what}: {name} error {size(error):.3e}, allowed {allowed:.3e}; the reference's own {size(own_error):.3e}"
        )


def _assert_parallel(what: str, got: Tensor, exact: Tensor, own: Tensor) -> None:
    """Gradients point the same way; one that is zero is exactly zero."""
    got, exact, own, eps = got.double(), exact.double(), own.double(), torch.finfo(got.dtype).eps
    if not exact.any() or not exact.isfinite().all():
        assert exact.any() or not got.any(), f"{what}: the gradient is zero, got up to {got.abs().max():.3e}"
        return

    def turn(t: Tensor) -> float:  # 1 - cosine, without cancellation
        return (t / t.norm() - exact / exact.norm()).square().sum().item() / 2

    allowed = 2 * turn(own) + (32 * eps) ** 2 + 1e-14
    assert turn(got) <= allowed, f"{what}: 1 - cosine {turn(got):.3e}, allowed {allowed:.3e}"


def assert_matches_reference(
    op: str,
    outputs: Any,
    args: Sequence[Any],
    backend: str,
    *,
    grads: Sequence[Tensor] | None = None,
    cotangents: list[Tensor] | None = None,
) -> None:
    """Holds a backend's answer against the reference in float64.

    Integers are equal. In float64 an error is at most 8 eps n Σ|terms|, value by value. Below, its maximum and its root
    mean square are at most twice those of the reference at that dtype, plus 4 eps of the maximum and the root mean
    square of the values. NaN and infinity stand where the oracle has them, and nowhere else where the dtype can
    represent the result. Gradients are held to the same and to their direction.

    Args:
        outputs: What the op returned: a tensor, or a nest of them.
        args: The arguments it was given.
        backend: Named in the message.
        grads: The gradients of the differentiable arguments, in order.
        cotangents: The gradients of the outputs that they came from.

    Raises:
        AssertionError: With the op, the backend, the value that differs and by how much.
    """
    exact, own = oracle(op, args, cotangents), reference(op, args, cotangents)
    found = Answer(tensors_of(outputs), list(grads or []))
    bounds: Answer | None = None
    if any(t.dtype == torch.float64 for t in found.outputs):
        factor = 8 * torch.finfo(torch.float64).eps * _OPS[op].n_terms(*args)
        bounds = Answer(*([factor * t for t in ts] for ts in _sums_of_magnitudes(op, args, cotangents)))
    for kind in ("outputs", "grads") if grads is not None else ("outputs",):
        three = [getattr(answer, kind) for answer in (found, exact, own)]
        assert len(three[0]) == len(three[1]), f"{op} on {backend}: {len(three[0])} {kind}, not {len(three[1])}"
        for i, (got, true, ours) in enumerate(zip(*three, strict=True)):
            what = f"{op} on {backend}, {kind}[{i}]"
            _assert_close(what, got, true, ours, None if bounds is None else getattr(bounds, kind)[i])
            if kind == "grads":
                _assert_parallel(what, got, true, ours)


def assert_bit_equal(got: Any, wanted: Any) -> None:
    """Two nests of tensors hold the same bits, NaN and the sign of zero included."""
    ours, theirs = tensors_of(got), tensors_of(wanted)
    assert len(ours) == len(theirs), f"{len(ours)} tensors, not {len(theirs)}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"tensor {i}: {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        assert torch.equal(*bits), f"tensor {i}: {int((bits[0] != bits[1]).sum())} bytes differ"


def _strided(t: Tensor) -> Tensor:
    return t.new_empty(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)


def _sliced(t: Tensor) -> Tensor:
    larger = t.new_empty([n + 3 for n in t.shape])
    return larger[tuple(slice(1, 1 + n) for n in t.shape)].copy_(t)


def _offset(t: Tensor) -> Tensor:
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


VIEWS = {"strided": _strided, "sliced": _sliced, "offset": _offset, "transposed": _transposed}
"""The same values in other places: every second element, a window, one element off alignment, the other order."""
