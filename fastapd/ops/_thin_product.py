"""Products of which one side is short, as layers multiplied into all components at once have; for use under no_grad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd import _native, backends
from fastapd.ops import _check
from fastapd.ops._op import define

if TYPE_CHECKING:
    from jaxtyping import Float

_OP = "thin_product"


def cpu_thin_product(A: Tensor, B: Tensor, out: Tensor, alpha: float, accumulate: bool) -> None:
    """Lets `csrc/cpu/thin_product.cpp` fill or add to `out`."""
    native: Any = _native.load("_C").module
    run = native.thin_product_float32 if A.dtype == torch.float32 else native.thin_product_float64
    sizes = [A.shape[0], A.shape[1], B.shape[2], B.shape[1], *A.stride(), *B.stride()]
    run(A.data_ptr(), B.data_ptr(), out.data_ptr(), alpha, accumulate, sizes, torch.get_num_threads())
    torch.autograd.graph.increment_version(out)  # which torch's own in-place operations do


def _check_product(A: Tensor, B: Tensor, out: Tensor | None) -> None:
    if out is None:
        _check.tensors(_OP, A=A, B=B)
    else:
        _check.tensors(_OP, A=A, B=B, out=out)
    fits = A.dim() == B.dim() == 3 and A.shape[0] == B.shape[0] and A.shape[2] == B.shape[1]
    if fits and out is not None:
        fits = out.shape == (A.shape[0], A.shape[1], B.shape[2]) and out.is_contiguous()
    if not fits:
        there = "None" if out is None else f"{_check.shape(out)} with strides {list(out.stride())}"
        raise ValueError(
            f"{_OP}: A [I, m, k], B [I, k, n] and a contiguous out [I, m, n] must fit, "
            f"got {_check.shape(A)}, {_check.shape(B)} and {there}"
        )


def _fake(A: Tensor, B: Tensor, out: Tensor, alpha: float, accumulate: bool) -> None:
    _check_product(A, B, out)


_thin_product = define(_OP, "(Tensor A, Tensor B, Tensor(a!) out, float alpha, bool accumulate) -> ()", _fake)


def thin_product(
    A: Float[Tensor, "I m k"],
    B: Float[Tensor, "I k n"],
    out: Float[Tensor, "I m n"] | None = None,
    alpha: float = 1.0,
    accumulate: bool = False,
) -> Float[Tensor, "I m n"]:
    """alpha A B, or that added to `out`; no gradient.

    Args:
        A, B: Any strides.
        out: Contiguous, changed in place; None makes it.
        alpha: A factor.
        accumulate: Whether `out` is added to; otherwise what it holds is replaced, whatever it is.

    Raises:
        ValueError: If shapes or devices do not match or out is not contiguous.
        TypeError: If a dtype is not floating or the dtypes differ.
    """
    _check_product(A, B, out)
    if out is None:
        accumulate, out = False, A.new_empty(A.shape[0], A.shape[1], B.shape[2])
    with torch.no_grad():
        forced = backends.forced_backends()
        # whoever forces a backend that has no product of its own gets the library's, as everywhere else
        if B.shape[2] <= B.shape[1] and (forced is None or any(b in backends.TABLE[_OP] for b in forced)):
            _thin_product(A, B, out, alpha, accumulate)
        elif out.is_cuda:
            torch.baddbmm(out, A, B, beta=int(accumulate), alpha=alpha, out=out)
        else:  # a wide result of a short sum is the library's, which is twice as fast when it adds as when it writes
            if not accumulate:
                out.zero_()
            torch.baddbmm(out, A, B, beta=1, alpha=alpha, out=out)
    return out


def product(A: Float[Tensor, "I m k"], B: Float[Tensor, "I k n"]) -> Float[Tensor, "I m n"]:
    """A B: by `thin_product`, unless somebody differentiates it."""
    if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad):
        return torch.bmm(A, B)
    return thin_product(A, B)
