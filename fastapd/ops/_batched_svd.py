"""How simple components are: singular values and Schatten sums from the factors, without forming A_c B_c."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastapd import _native
from fastapd.ops import _check
from fastapd.ops._op import PLAIN, define, no_double_backward, with_instances
from fastapd.reference.batched_svd import component_svdvals_backward

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# ------------------------------------------------------------------------------------------------- singular values


def _check_svdvals(A: Tensor, B: Tensor) -> bool:
    return _check.factors("component_svdvals", A, B)


def _svdvals_fake(A: Tensor, B: Tensor) -> Tensor:
    _check_svdvals(A, B)
    return A.new_empty(B.shape[:3])


def _shape(A: Tensor, B: Tensor) -> list[int]:
    n_instances, n_components, rank, d_out = B.shape
    return [n_instances, n_components, rank, A.shape[2], d_out]


def cpu_component_svdvals(A: Tensor, B: Tensor) -> Tensor:
    """Allocates the values and lets `csrc/cpu/batched_svd.cpp` fill them."""
    native: Any = _native.load("_C").module
    At, B = A.mT.contiguous(), B.contiguous()
    out = _svdvals_fake(A, B)
    run = native.component_svdvals_float32 if A.dtype == torch.float32 else native.component_svdvals_float64
    run(At.data_ptr(), B.data_ptr(), out.data_ptr(), _shape(A, B), torch.get_num_threads())
    return out


def _svdvals_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _svdvals_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    no_double_backward("component_svdvals")
    grad_At, grad_B = component_svdvals_backward(grad, *ctx.saved_tensors)
    return grad_At.mT, grad_B


_component_svdvals = define(
    "component_svdvals", "(Tensor A, Tensor B) -> Tensor", _svdvals_fake, _svdvals_setup, _svdvals_backward
)


def component_svdvals(A: Float[Tensor, "*I C d_in m"], B: Float[Tensor, "*I C m d_out"]) -> Float[Tensor, "*I C m"]:
    """The singular values of every component.

    sigma_ci = singular values of A_c B_c, descending

    Args:
        A: Left factors [.., n_components, d_in, rank], as for `component_sum`.
        B: Right factors [.., n_components, rank, d_out].

    Returns:
        [.., n_components, rank], descending; zeros stand for the directions that a component lacks.

    Raises:
        ValueError: If shapes or devices do not match.
        TypeError: If a dtype is not floating or the dtypes differ.

    Numerics: in float64 inside; |error| about 1e-15 of the largest value, and for float32 factors less than rounding
        the value to float32.
    Gradient: in A and B, without differences of singular values; a second derivative is refused.
    Cost: O(C m^2 (d_in + d_out) + C m^3); the products A_c B_c are not formed.
    """
    if _check_svdvals(A, B):
        return _component_svdvals(A, B)
    return _component_svdvals(*with_instances(A, B)).squeeze(0)


# --------------------------------------------------------------------------------------------------- Schatten sums


def _check_schatten(op: str, A: Tensor, B: Tensor, weights: Tensor, p: float, eps: float, batch: int | None) -> bool:
    """Returns whether the factors have the instance axis."""
    instances = _check.factors(op, A, B)
    _check.exponent(op, p)
    _check.epsilon(op, eps)
    factored = op == "schatten_factored"
    name, wanted = ("weights", "integer counts or a float mask") if factored else ("counts", "integers")
    if not isinstance(weights, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(weights).__name__}")
    if weights.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be {wanted}, got torch.bool; use mask.sum(-2)")
    if weights.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {weights.layout}; call .to_dense()")
    if weights.device != A.device:
        raise ValueError(f"{op}: {name} must be on the device of A, {A.device}, got {weights.device}")
    leading = tuple(A.shape[:-2])  # [.., C]
    if weights.is_floating_point():
        _check.tensors(op, A=A, weights=weights)
        if weights.dim() != len(leading) + 1 or (*weights.shape[:-2], weights.shape[-1]) != leading:
            raise ValueError(
                f"{op}: weights, a float mask, must have shape [.., batch, n_components] for A {_check.shape(A)}, "
                f"got {_check.shape(weights)}"
            )
        if batch is not None:
            raise ValueError(f"{op}: batch must be None with a float mask, which has its own batch axis, got {batch}")
    else:
        if weights.dtype.is_complex:
            raise TypeError(f"{op}: {name} must be {wanted}, got {weights.dtype}")
        if tuple(weights.shape) != leading:
            what = f"{name}, integer counts," if factored else name
            raise ValueError(
                f"{op}: {what} must have shape [.., n_components] for A {_check.shape(A)}, got {_check.shape(weights)}"
            )
        if batch is not None:
            _check.whole(op, "batch", batch, 0, 2**53, "[0, 2**53]")  # exact in float64
    return instances


def _sum_fake(op: str) -> Any:
    def fake(A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, with_grad: bool) -> tuple:
        _check_schatten(op, A, B, counts, p, eps, None if batch < 0 else batch)
        return A.new_empty(A.shape[0]), *_gradients(A, B, with_grad)

    return fake


def _gradients(A: Tensor, B: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    if not with_grad:
        return A.new_empty(0), B.new_empty(0)
    return A.new_empty(*B.shape[:3], A.shape[2]), B.new_empty(B.shape)


def _address(t: Tensor) -> int:
    return t.data_ptr() if t.numel() else 0


def _cpu_sum(exact: bool) -> Any:
    def cpu(A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, with_grad: bool) -> tuple:
        native: Any = _native.load("_C").module
        At, B, counts = A.mT.contiguous(), B.contiguous(), counts.long().contiguous()
        loss = A.new_empty(A.shape[0])
        grad_At, grad_B = _gradients(A, B, with_grad)
        run = native.schatten_float32 if A.dtype == torch.float32 else native.schatten_float64
        inputs = (At.data_ptr(), B.data_ptr(), counts.data_ptr(), p, eps, batch, exact, 1.0, False)
        outputs = (loss.data_ptr(), _address(grad_At), _address(grad_B))
        run(*inputs, *outputs, _shape(A, B), torch.get_num_threads())
        return loss, grad_At, grad_B

    return cpu


cpu_schatten = _cpu_sum(exact=True)
cpu_schatten_factored = _cpu_sum(exact=False)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros of the factors' size would be made for outputs that have no gradient
    ctx.with_grad = inputs[-1]
    ctx.save_for_backward(*output[1:])


def _sum_backward(op: str) -> Any:
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        no_double_backward(op)
        if grad is None:
            return (None,) * 7
        grad_At, grad_B = ctx.saved_tensors
        scale = grad[:, None, None, None]
        return (scale * grad_At).mT, scale * grad_B, *[None] * 5

    return backward


_SUM = (
    "(Tensor A, Tensor B, Tensor counts, float p, float eps, SymInt batch, bool with_grad) -> (Tensor, Tensor, Tensor)"
)
_schatten = define("schatten", _SUM, _sum_fake("schatten"), _setup, _sum_backward("schatten"))
_schatten_factored = define(
    "schatten_factored", _SUM, _sum_fake("schatten_factored"), _setup, _sum_backward("schatten_factored")
)


# --------------------------------------------------------------------------------------------- into given gradients


def _check_accumulate(
    A: Tensor,
    B: Tensor,
    counts: Tensor,
    p: float,
    eps: float,
    batch: int,
    scale: float,
    grad_At: Tensor,
    grad_B: Tensor,
) -> None:
    op = "schatten_accumulate"
    if not _check_schatten(op, A, B, counts, p, eps, None):
        raise ValueError(
            f"{op}: A must have shape [n_instances, n_components, d_in, rank], got {_check.shape(A)}; unsqueeze it"
        )
    if counts.is_floating_point():
        raise TypeError(f"{op}: counts must be integers, got {counts.dtype}")
    _check.whole(op, "batch", batch, -1, 2**53, "[-1, 2**53]")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a float, got {type(scale).__name__} {scale!r}")
    _check.tensors(op, A=A, grad_At=grad_At, grad_B=grad_B)
    for name, grad, factor in (("grad_At", grad_At, A.mT), ("grad_B", grad_B, B)):
        if grad.shape != factor.shape:
            raise ValueError(f"{op}: {name} must have shape {_check.shape(factor)}, got {_check.shape(grad)}")
        if not grad.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(grad.stride())}")
    for name, t in (("A", A), ("B", B), ("grad_At", grad_At), ("grad_B", grad_B)):
        _check.no_gradient(op, name, t, "as the gradients are a result")


def _is_plain(A: Any, B: Any, counts: Any, p: Any, eps: Any, batch: Any, scale: Any, grad_At: Any, grad_B: Any) -> bool:
    """Whether everything is as a training step has it on the CPU: a tenth of the time that `_check_accumulate` takes.

    Whatever is not is left to that, which finds out what is wrong, or that nothing is.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return False
    floats = (A, B, grad_At, grad_B)
    if not (all(type(t) in PLAIN and t.is_cpu and t.layout is torch.strided for t in floats) and A.dim() == 4):
        return False
    n_instances, n_components, d_in, rank = A.shape
    return (
        B.shape == grad_B.shape
        and B.shape[:3] == (n_instances, n_components, rank)
        and grad_At.shape == (n_instances, n_components, rank, d_in)
        and (A.dtype is torch.float32 or A.dtype is torch.float64)
        and B.dtype is grad_At.dtype is grad_B.dtype is A.dtype
        and grad_At.is_contiguous()
        and grad_B.is_contiguous()
        and type(counts) is Tensor
        and counts.dtype is torch.int64
        and counts.is_cpu
        and counts.layout is torch.strided
        and counts.shape == (n_instances, n_components)
        and type(p) is type(eps) is type(scale) is float
        and 0 < p < math.inf
        and 0 <= eps < math.inf
        and type(batch) is int
        and -1 <= batch <= 2**53
    )


def _accumulate_fake(A: Tensor, B: Tensor, counts: Tensor, p: float, eps: float, batch: int, *rest: Any) -> Tensor:
    _check_accumulate(A, B, counts, p, eps, batch, *rest[1:])
    return A.new_empty(A.shape[0])


def cpu_schatten_accumulate(
    A: Tensor,
    B: Tensor,
    counts: Tensor,
    p: float,
    eps: float,
    batch: int,
    exact: bool,
    scale: float,
    grad_At: Tensor,
    grad_B: Tensor,
) -> Tensor:
    """Lets `csrc/cpu/batched_svd.cpp` add to the gradients in the pass that computes them."""
    native: Any = _native.load("_C").module
    At, B, counts = A.mT.contiguous(), B.contiguous(), counts.long().contiguous()
    loss = A.new_empty(A.shape[0])
    run = native.schatten_float32 if A.dtype == torch.float32 else native.schatten_float64
    inputs = (At.data_ptr(), B.data_ptr(), counts.data_ptr(), p, eps, batch, exact, scale, True)
    outputs = (loss.data_ptr(), _address(grad_At), _address(grad_B))
    run(*inputs, *outputs, _shape(A, B), torch.get_num_threads())
    torch.autograd.graph.increment_version((grad_At, grad_B))  # which torch's own in-place operations do
    return loss


_schatten_accumulate = define(
    "schatten_accumulate",
    "(Tensor A, Tensor B, Tensor counts, float p, float eps, SymInt batch, bool exact, float scale, "
    "Tensor(a!) grad_At, Tensor(b!) grad_B) -> Tensor",
    _accumulate_fake,
)


def schatten_accumulate(
    A: Float[Tensor, "I C d_in m"],
    B: Float[Tensor, "I C m d_out"],
    counts: Int[Tensor, "I C"],
    p: float,
    eps: float,
    batch: int,
    exact: bool,
    scale: float,
    grad_At: Float[Tensor, "I C m d_in"],
    grad_B: Float[Tensor, "I C m d_out"],
) -> Float[Tensor, " I"]:
    """The sum of `schatten` or `schatten_factored` by counts, whose gradient is added to that of a training step.

    grad_At += scale * d sum / d At        grad_B += scale * d sum / d B

    Args:
        A: Left factors; any strides, fastest as the transposed view of a contiguous [I, C, m, d_in].
        B: Right factors.
        counts: How many samples use each component.
        p: The exponent, in (0, inf).
        eps: Added inside the power.
        batch: The number of samples: adds what the eps of the unused components contributes. -1 leaves it out.
        exact: Whether from singular values.
        scale: Of the gradient alone.
        grad_At: Changed in place; contiguous, as is the next.
        grad_B: Changed in place.

    Returns:
        The sum, [n_instances], not scaled.

    Raises:
        ValueError: If shapes or devices do not match, a gradient is not contiguous, or p or eps is out of range.
        TypeError: If a dtype is wrong.
        NotImplementedError: If a tensor requires gradients where they are recorded: nothing differentiates the result.

    Cost: that of `schatten` or `schatten_factored`, without temporaries of the gradients' size: these are read and
        written once, and not touched where a count is 0.
    """
    if not torch.compiler.is_compiling() and _is_plain(A, B, counts, p, eps, batch, scale, grad_At, grad_B):
        return _schatten_accumulate(A, B, counts, p, eps, batch, exact, scale, grad_At, grad_B)
    _check_accumulate(A, B, counts, p, eps, batch, scale, grad_At, grad_B)
    return _schatten_accumulate(A, B, counts, float(p), float(eps), batch, exact, float(scale), grad_At, grad_B)


# ------------------------------------------------------------------------------------------------------- float masks


def _masked_fake(A: Tensor, B: Tensor, mask: Tensor, p: float, eps: float, with_grad: bool) -> tuple[Tensor, ...]:
    _check_schatten("schatten_factored", A, B, mask, p, eps, None)
    grad_mask = mask.new_empty(mask.shape if with_grad else (0,))
    return A.new_empty(A.shape[0]), *_gradients(A, B, with_grad), grad_mask


def cpu_schatten_factored_masked(
    A: Tensor, B: Tensor, mask: Tensor, p: float, eps: float, with_grad: bool
) -> tuple[Tensor, ...]:
    """Allocates the outputs and lets `csrc/cpu/batched_svd.cpp` fill them."""
    native: Any = _native.load("_C").module
    At, B, mask = A.mT.contiguous(), B.contiguous(), mask.contiguous()
    loss, grad_At, grad_B, grad_mask = _masked_fake(A, B, mask, p, eps, with_grad)
    if grad_mask.numel() and B.shape[2] == 0:
        grad_mask.zero_()  # no rank, no gradient
    run = native.schatten_masked_float32 if A.dtype == torch.float32 else native.schatten_masked_float64
    inputs = (At.data_ptr(), B.data_ptr(), mask.data_ptr(), p, eps, mask.shape[1])
    outputs = (loss.data_ptr(), _address(grad_At), _address(grad_B), _address(grad_mask))
    run(*inputs, *outputs, _shape(A, B), torch.get_num_threads())
    return loss, grad_At, grad_B, grad_mask


def _masked_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    no_double_backward("schatten_factored")
    if grad is None:
        return (None,) * 6
    grad_At, grad_B, grad_mask = ctx.saved_tensors
    scale = grad[:, None, None]
    d_mask = scale * grad_mask if ctx.needs_input_grad[2] else None
    return (scale.unsqueeze(-1) * grad_At).mT, scale.unsqueeze(-1) * grad_B, d_mask, None, None, None


_schatten_masked = define(
    "schatten_factored_masked",
    "(Tensor A, Tensor B, Tensor mask, float p, float eps, bool with_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _masked_fake,
    _setup,
    _masked_backward,
)


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def schatten(
    A: Float[Tensor, "*I C d_in m"],
    B: Float[Tensor, "*I C m d_out"],
    counts: Int[Tensor, "*I C"],
    p: float,
    eps: float = 1e-16,
    batch: int | None = None,
) -> Float[Tensor, "*I"]:
    """Sums the Schatten-p quasi-norms of the active components, from their singular values.

    sum_c n_c sum_i (sigma_ci^2 + eps)^{p/2}  [ + (batch - n_c) m eps^{p/2} ]

    Args:
        A: Left factors [.., n_components, d_in, rank].
        B: Right factors [.., n_components, rank, d_out].
        counts: How many samples use each component, [.., n_components] integers (`Selection.counts`).
        p: The exponent, in (0, inf).
        eps: Added inside the power; keeps the slope finite at zero.
        batch: The number of samples: adds what the eps of the unused components contributes. None leaves it out.

    Returns:
        The sum, a scalar or [n_instances].

    Raises:
        ValueError: If shapes or devices do not match, or p or eps is out of range.
        TypeError: If a dtype is wrong.

    Numerics: in float64 inside; a component with count 0 contributes nothing, whatever it holds.
    Gradient: in A and B, without differences of singular values; one below 1e-16 of its component's largest counts as
        zero and adds nothing. A second derivative is refused.
    Cost: O(C m^2 (d_in + d_out) + C m^3), value and gradient in one pass.
    Source: Braun et al. 2025, simplicity loss of section 2.
    """
    if isinstance(counts, Tensor) and counts.is_floating_point():
        raise TypeError(
            f"schatten: counts must be integers, got {counts.dtype}; a float mask goes to schatten_factored"
        )
    instances = _check_schatten("schatten", A, B, counts, p, eps, batch)
    if not instances:
        A, B, counts = with_instances(A, B, counts)
    total = _schatten(A, B, counts, float(p), float(eps), -1 if batch is None else batch, _wants_grad(A, B))[0]
    return total if instances else total.squeeze(0)


def schatten_factored(
    A: Float[Tensor, "*I C d_in m"],
    B: Float[Tensor, "*I C m d_out"],
    weights: Int[Tensor, "*I C"] | Float[Tensor, "*I b C"],
    p: float,
    eps: float = 1e-16,
    batch: int | None = None,
) -> Float[Tensor, "*I"]:
    """Sums the Schatten-p quasi-norms of the active components, with ‖a_i‖‖b_i‖ in place of singular values.

    counts n_c:  sum_c n_c sum_i (S_ci + eps)^{p/2}  [ + (batch - n_c) m eps^{p/2} ]
    float mask:  sum_b sum_c sum_i (mask_bc S_ci + eps)^{p/2}          with S_ci = ‖a_ci‖² ‖b_ci‖²

    Args:
        A: Left factors [.., n_components, d_in, rank].
        B: Right factors [.., n_components, rank, d_out].
        weights: How many samples use each component, [.., n_components] integers (`Selection.counts`); or a float mask
            [.., batch, n_components], which stands inside the power.
        p: The exponent, in (0, inf).
        eps: Added inside the power; keeps the slope finite at zero.
        batch: With counts, the number of samples: adds what the eps of the unused components contributes, as the
            research code does. None leaves that constant out.

    Returns:
        The sum, a scalar or [n_instances]; divide by n_params * batch for the research code's loss.

    Raises:
        ValueError: If shapes or devices do not match, or p or eps is out of range.
        TypeError: If a dtype is wrong.

    Numerics: in float64 inside. The sum is an upper bound of the exact one for p <= 1, tight when the a_i and the b_i
        are orthogonal. A component with count 0 contributes nothing, whatever it holds.
    Gradient: in A and B, and in a float mask; a second derivative is refused.
    Cost: O(C m (d_in + d_out)) with counts; plus b C m powers with a mask, never held at once.
    Source: Braun et al. 2025, appendix (practical loss), after Giampouras et al. 2020; `calc_schatten_loss` of
        ApolloResearch/apd.
    """
    instances = _check_schatten("schatten_factored", A, B, weights, p, eps, batch)
    if not instances:
        A, B, weights = with_instances(A, B, weights)
    with_grad = _wants_grad(A, B, weights)
    if weights.is_floating_point():
        total = _schatten_masked(A, B, weights, float(p), float(eps), with_grad)[0]
    else:
        total = _schatten_factored(A, B, weights, float(p), float(eps), -1 if batch is None else batch, with_grad)[0]
    return total if instances else total.squeeze(0)
