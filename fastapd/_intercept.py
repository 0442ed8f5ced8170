"""For the length of a call, sites of a model compute something else; the model itself is not changed.

A module's `forward` is shadowed by one in its instance dictionary. A parameter is shadowed there by a `Matrix`, a
tensor whose products with other tensors are computed by the site; what else is done with it is refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastapd._sites import Site


class Role(NamedTuple):
    """How a call uses a site's matrix W: y = x W, or x W^T if transposed, or the rows of it whose numbers are given."""

    transposed: bool = False
    ids: bool = False


PLAIN = Role()

Layer = Callable[[Site, Tensor, Role], Tensor]
"""(site, input, role) -> output, of the input's leading shape."""


@contextlib.contextmanager
def replaced(sites: Sequence[Site], layer: Layer) -> Iterator[None]:
    """For the length of a with block, each site computes `layer(site, x, role)`."""
    own: list[tuple[dict[str, Any], str, Any]] = []  # what others put there; usually nothing
    try:
        for site in sites:
            at, name = vars(site.module), site.attribute if site.is_parameter else "forward"
            own.append((at, name, at.get(name)))
            at[name] = Matrix.of(site, layer) if site.is_parameter else _forward(site, layer)
        yield
    finally:
        for at, name, before in own:
            at.pop(name, None)
            if before is not None:
                at[name] = before


def _forward(site: Site, layer: Layer) -> Callable[..., Tensor]:
    role = Role(ids=True) if site.adapter.ids else PLAIN

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())  # by whatever name
        return layer(site, x, role)

    return forward


@contextlib.contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """For the length of a with block, none of the modules is in training mode: no dropout, no running statistics."""
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class Matrix(Tensor):
    """Stands for a parameter while the model runs."""

    site: Site
    layer: Layer
    flipped: bool

    @staticmethod
    def of(site: Site, layer: Layer, flipped: bool = False) -> Matrix:
        held = site.adapter.held(site.module).detach()
        new = torch.Tensor._make_subclass(Matrix, held.mT if flipped else held)
        new.site, new.layer, new.flipped = site, layer, flipped
        return new

    def __rmatmul__(self, other: Any) -> Tensor:  # python asks this first for x @ W
        if (y := _product(other, self)) is NotImplemented:
            raise self._refusal("@")
        return y

    def _refusal(self, use: str) -> ValueError:
        # no TypeError, which torch would take for an operand that another class may know
        return ValueError(
            f"decompose: {self.site.name} must be used as the matrix of a product x W, got {use}; decompose another "
            "parameter, or let a module of its own hold this product"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        args = tuple(args)
        if name == "__get__" or name in _QUESTIONS:
            if (owner := getattr(getattr(func, "__self__", None), "__name__", "")) in ("T", "mT", "H", "mH"):
                return _flip(args[0])
            if owner in _QUESTIONS or name != "__get__":
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            name = owner
        handler = _HANDLERS.get(name)
        found = NotImplemented
        if handler is not None:
            try:
                bound = inspect.signature(handler).bind(*args, **kwargs)
            except TypeError:  # arguments that the handler does not know
                bound = None
            found = NotImplemented if bound is None else handler(*bound.args, **bound.kwargs)
        if found is NotImplemented:
            raise next(a for a in _flat(args, kwargs) if isinstance(a, Matrix))._refusal(name)
        return found


def _flat(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    for a in (*args, *kwargs.values()):
        if isinstance(a, (tuple, list)):
            yield from _flat(a, {})
        else:
            yield a


def _flip(m: Matrix) -> Matrix:
    return Matrix.of(m.site, m.layer, not m.flipped)


def _product(x: Any, m: Any) -> Any:
    """x m for a plain x."""
    if not isinstance(m, Matrix) or isinstance(x, Matrix) or not isinstance(x, Tensor) or x.dim() == 0:
        return NotImplemented
    return m.layer(m.site, x, Role(transposed=m.flipped))


def _matmul(input: Any, other: Any) -> Any:
    return _product(input, other)


def _right_matmul(m: Any, x: Any) -> Any:  # Tensor.__rmatmul__(m, x) is x m
    return _product(x, m)


def _mm(input: Any, mat2: Any) -> Any:
    return _product(input, mat2)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, Matrix) or isinstance(bias, Matrix):
        return NotImplemented
    y = _product(input, _flip(weight))
    return y if bias is None or y is NotImplemented else y + bias


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(input, Matrix) or beta != 1 or alpha != 1:
        return NotImplemented
    y = _product(mat1, mat2)
    return y if y is NotImplemented else input + y


def _transpose(m: Matrix, dim0: int, dim1: int) -> Any:
    return _flip(m) if {dim0 % 2, dim1 % 2} == {0, 1} else m


def _permute(m: Matrix, *dims: Any, **kwargs: Any) -> Any:
    dims = kwargs.get("dims", dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims)
    return _transpose(m, *dims) if dims[0] % 2 == 1 else m


def _same(m: Matrix, *args: Any, **kwargs: Any) -> Any:
    return m  # its dtype and place are the site's own matter


def _embedding(input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **kw: Any) -> Any:
    if not isinstance(weight, Matrix) or weight.flipped or max_norm is not None or isinstance(input, Matrix):
        return NotImplemented
    return weight.layer(weight.site, input, Role(ids=True))


def _getitem(m: Matrix, index: Any) -> Any:
    if isinstance(index, tuple) and len(index) in (1, 2) and index[1:] in ((), (slice(None),), (...,)):
        index = index[0]  # all of each row
    if not isinstance(index, Tensor) or index.dtype == torch.bool or index.is_floating_point():
        return NotImplemented
    return _embedding(index, m)


def _einsum(equation: Any, *operands: Any) -> Any:
    if not isinstance(equation, str):
        return NotImplemented
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    before, arrow, after = equation.replace(" ", "").partition("->")
    terms = before.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2:
        return NotImplemented
    (m, t), (x, s) = sorted(zip(operands, terms, strict=True), key=lambda pair: not isinstance(pair[0], Matrix))
    if not isinstance(m, Matrix) or isinstance(x, Matrix) or len(set(t)) != 2 or len(t) != 2 or "." in t:
        return NotImplemented
    summed = [k for k in t if k in s]
    made = t.replace(summed[0], "") if len(summed) == 1 else ""
    if not made or summed[0] in after or len(set(s.replace(".", ""))) != len(s.replace(".", "")):
        return NotImplemented
    kept = s.replace(summed[0], "")
    if sorted(after) != sorted(kept + made):
        return NotImplemented
    rows = torch.einsum(f"{s}->{kept}{summed[0]}", x)
    y = _product(rows, m if t[0] == summed[0] else _flip(m))
    return y if y is NotImplemented else torch.einsum(f"{kept}{made}->{after}", y)


_QUESTIONS = frozenset(
    "shape dtype device ndim requires_grad is_cuda is_leaf layout size dim numel is_floating_point is_complex __len__ "
    "is_meta is_sparse is_quantized is_nested names __repr__ element_size itemsize nelement ndimension is_contiguous "
    "stride is_mkldnn".split()
)
_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("matmul", "__matmul__"), _matmul),
    "__rmatmul__": _right_matmul,
    "mm": _mm,
    "linear": _linear,
    "addmm": _addmm,
    "einsum": _einsum,
    "embedding": _embedding,
    "__getitem__": _getitem,
    "t": lambda m: _flip(m),
    "adjoint": lambda m: _flip(m),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    **dict.fromkeys(
        ("detach", "contiguous", "to", "type_as", "float", "double", "half", "bfloat16", "clone", "data"), _same
    ),
}
