"""Triton's interpreter made strict: it fails on what would go wrong, silently or not, on a card.

Importing it turns the interpreter on for this process, so it comes before whatever imports triton. Inside `checked()`
every kernel is run program by program, in order, in reverse or shuffled, and these raise a `Fault`:

    an access outside the tensor whose pointer it started from, masked lanes aside
    two programs that write one address; a program that reads what another writes; atomics beside plain accesses
    one address twice in one store
    arithmetic on bfloat16, which the interpreter does on its bits; casts to it that the interpreter gets wrong
    products of blocks narrower than tensor cores take

Integers that overflow and `tl.device_assert` raise, too. Casts to bfloat16 round to nearest even, as cards do, and
products in tf32 and tf32x3 are rounded as tensor cores round their factors, so that a kernel's precision is real here.
What goes on between the threads of one program is not modelled.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_Builder: Any = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle
NOBODY, SEVERAL = -1, -2
SHADOWED_BYTES = 1 << 26
"""Of larger storages, which tests make of sparse files, accesses are checked for their bounds alone."""


NARROW_FIRST = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Fault(AssertionError):
    """What a kernel must not do."""


class _Shadow:
    """Who touched each two bytes of a storage in this launch."""

    def __init__(self, storage: Any) -> None:
        self.first = storage.data_ptr()
        size = -(-storage.nbytes() // 2)
        self.plain_writer, self.plain_reader, self.atomic = (np.full(size, NOBODY, np.int64) for _ in range(3))

    def touch(self, addresses: np.ndarray, kind: str, program: int) -> None:
        where = ((addresses - np.uint64(self.first)) // np.uint64(2)).astype(np.int64)

        def others(who: np.ndarray) -> np.ndarray:
            found = who[where]
            return (found != NOBODY) & (found != program)

        against = {
            "read": [(self.plain_writer, "write-read"), (self.atomic, "atomic-read")],
            "write": [
                (self.plain_writer, "write-write"),
                (self.plain_reader, "read-write"),
                (self.atomic, "atomic-write"),
            ],
            "atomic": [(self.plain_writer, "write-atomic"), (self.plain_reader, "read-atomic")],
        }
        for who, name in against[kind]:
            if (wrong := others(who)).any():
                first = int(np.argmax(wrong))
                raise Fault(
                    f"{name} race at byte {int(where[first]) * 2}: program {int(who[where[first]])} and {program}"
                )
        own = {"read": self.plain_reader, "write": self.plain_writer, "atomic": self.atomic}[kind]
        own[where] = np.where(others(own), SEVERAL, program)


class _Extent(NamedTuple):
    """The bytes that a tensor's elements span, and the record of who touched them."""

    first: int
    end: int
    shadow: _Shadow | None


class _State:
    on = False
    order = "forward"
    program = 0
    shadows: dict[int, _Shadow] = {}  # noqa: RUF012
    launches: list[tuple[str, str]] = []  # noqa: RUF012


def _extent(t: torch.Tensor) -> _Extent:
    storage = t.untyped_storage()
    shadow = None
    if 0 < storage.nbytes() <= SHADOWED_BYTES:
        shadow = _State.shadows.setdefault(storage.data_ptr(), None) or _Shadow(storage)
        _State.shadows[storage.data_ptr()] = shadow
    span = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    return _Extent(t.data_ptr(), t.data_ptr() + span * t.element_size(), shadow)


def _checked_access(kind: str, handle: Any, mask: Any) -> np.ndarray:
    shape = np.shape(handle.data)
    addresses = np.asarray(handle.data).ravel()[np.broadcast_to(np.asarray(mask.data, bool), shape).ravel()]
    if addresses.size == 0:
        return addresses
    size = max(1, handle.get_element_ty().primitive_bitwidth // 8)
    extent = handle.attr.get("extent")
    if extent is None:
        raise Fault(f"{kind} through a pointer that comes from no argument, in program {_State.program}")
    outside = (addresses < extent.first) | (addresses + np.uint64(size) > extent.end)
    if outside.any():
        far = int(addresses[outside][0]) - extent.first
        raise Fault(
            f"out-of-bounds {kind} of {size} bytes at byte {far} of {extent.end - extent.first}, in program "
            f"{_State.program}: {int(outside.sum())} of {addresses.size} lanes"
        )
    if extent.shadow is not None:
        every = addresses
        for more in range(2, size, 2):
            every = np.concatenate([every, addresses + np.uint64(more)])
        extent.shadow.touch(every, kind, _State.program)
    return addresses


def _keeping_extent(name: str) -> None:
    """A builder's method whose result points where its first pointer argument does."""
    own = getattr(_Builder, name)

    def method(self: Any, *args: Any) -> Any:
        found = own(self, *args)
        for a in args:
            if isinstance(a, _Handle) and "extent" in a.attr and isinstance(found, _Handle):
                found.attr["extent"] = a.attr["extent"]
        return found

    setattr(_Builder, name, method)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to nearest even."""
    bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded).reshape(np.shape(data))


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """Float32 numbers with 10 bits after the leading one, rounded to nearest, ties away from zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).reshape(x.shape)
    return np.where(np.isfinite(x), rounded, x)


def _tf32x3(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Leading and trailing parts apart, the product of the trailing parts left out, as Triton compiles it."""
    big_a, big_b = _to_tf32(a), _to_tf32(b)
    small_a, small_b = _to_tf32(a - big_a), _to_tf32(b - big_b)
    rest = np.matmul(small_a, big_b) + np.matmul(big_a, small_b)
    return np.where(np.isnan(rest), np.float32(0), rest) + np.matmul(big_a, big_b)


def _install() -> None:
    load, store = _Builder.create_masked_load, _Builder.create_masked_store
    rmw, cas = _Builder.create_atomic_rmw, _Builder.create_atomic_cas
    cast, binary, unary = _Builder.cast_impl, _Builder.binary_op, _Builder.unary_op

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        if _State.on:
            _checked_access("read", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _State.on:
            addresses = _checked_access("write", ptrs, mask)
            if np.unique(addresses).size != addresses.size:
                raise Fault(f"one address twice in one store, in program {_State.program}")
        return store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _State.on:
            if value.dtype.scalar.is_floating():
                raise Fault("an atomic operation on floating-point numbers, whose order is not fixed")
            _checked_access("atomic", ptr, mask)
        return rmw(self, op, ptr, value, mask, *rest)

    def create_atomic_cas(self: Any, ptr: Any, *rest: Any) -> Any:
        if _State.on:
            _checked_access("atomic", ptr, _Handle(np.ones_like(ptr.data, bool), tl.int1))
        return cas(self, ptr, *rest)

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        if dst.scalar == tl.bfloat16 and src.dtype.scalar != tl.bfloat16:
            if src.dtype.scalar != tl.float32:
                raise Fault(f"a cast from {src.dtype.scalar} to bfloat16: go through float32")
            return _Handle(_to_bfloat16(src.data), tl.bfloat16)
        if _is_bfloat16(src) and dst.scalar not in (tl.float32, tl.bfloat16):
            raise Fault(f"a cast from bfloat16 to {dst.scalar}: go through float32")
        return cast(self, src, dst)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if _is_bfloat16(left) or _is_bfloat16(right):
            raise Fault("arithmetic on bfloat16: cast to float32 first")
        return binary(self, left, right, op)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        if _is_bfloat16(arg):
            raise Fault("arithmetic on bfloat16: cast to float32 first")
        return unary(self, arg, op)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        m, k = np.shape(a.data)[-2:]
        n = np.shape(b.data)[-1]
        if a.dtype.scalar != tl.float64 and min(m, n, k) < 16:
            raise Fault(f"a product of blocks [{m}, {k}] and [{k}, {n}]: tensor cores take no side below 16")
        left, right = (cast(self, h, tl.float32).data if _is_bfloat16(h) else h.data for h in (a, b))
        if left.dtype == np.float32:
            mode = str(input_precision).rpartition(".")[2].lower()
            if mode == "tf32":
                left, right = _to_tf32(left), _to_tf32(right)
            elif mode == "tf32x3":
                return _Handle(_tf32x3(left, right) + d.data, d.dtype.scalar)
            elif mode != "ieee":
                raise Fault(f"a product in {mode}")
        return _Handle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    select = _Builder.create_select

    def create_select(self: Any, condition: Any, left: Any, right: Any) -> Any:
        found = select(self, condition, left, right)
        extents = [h.attr["extent"] for h in (left, right) if "extent" in h.attr]
        if extents:
            if len(extents) != 2 or np.size(condition.data) != 1:
                raise Fault("a choice among pointers that is none of scalars")
            found.attr["extent"] = extents[0 if np.all(condition.data) else 1]
        return found

    for name, method in list(locals().items()):
        if hasattr(_Builder, name):
            setattr(_Builder, name, method)
    for name in ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "trans", "reshape", "bitcast"):
        if hasattr(_Builder, f"create_{name}"):
            _keeping_extent(f"create_{name}")
    reduce_sum = interpreter.ReduceOps.sum

    def checked_sum(self: Any, input: Any) -> Any:  # the name is the interpreter's
        if input.dtype.scalar == tl.bfloat16:
            raise Fault("a sum of bfloat16: cast to float32 first")
        return reduce_sum(self, input)

    interpreter.ReduceOps.sum = checked_sum
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)  # device_assert, overflow

    convert = interpreter._implicit_cvt

    def implicit_cvt(arg: Any) -> Any:
        found = convert(arg)
        if _State.on and isinstance(arg, torch.Tensor):
            found.handle.attr["extent"] = _extent(arg)
        return found

    interpreter._implicit_cvt = implicit_cvt
    set_grid_idx, call = _Builder.set_grid_idx, interpreter.GridExecutor.__call__

    def in_order(self: Any, x: int, y: int, z: int) -> Any:
        number = x
        if _State.on:
            if any(n != 1 for n in self.grid_dim[1:]):
                raise Fault(f"a grid {self.grid_dim}: programs are in one row, as y and z end at 65535")
            total = self.grid_dim[0]
            if _State.order == "reverse":
                number = total - 1 - x
            elif _State.order == "shuffled":
                if x == 0:
                    _State.places = random.Random(total).sample(range(total), total)  # type: ignore[attr-defined]
                number = _State.places[x]  # type: ignore[attr-defined]
            _State.program = number
        return set_grid_idx(self, number, y, z)

    _Builder.set_grid_idx = in_order

    def executed(self: Any, *args: Any, **kwargs: Any) -> Any:
        _State.shadows = {}
        if _State.on:
            floats = {t.dtype for t in _tensors(args)}
            narrowest = next((str(d).removeprefix("torch.") for d in NARROW_FIRST if d in floats), "integers")
            _State.launches.append((self.fn.__name__, narrowest))
        return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = executed


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, tuple):
            yield from _tensors(a)


_install()


@contextlib.contextmanager
def checked(order: str = "forward") -> Iterator[list[tuple[str, str]]]:
    """For the length of a with block, kernels are checked; yields the list of launches, (kernel, narrowest dtype).

    Args:
        order: Of the programs: "forward", "reverse" or "shuffled".
    """
    before = _State.on, _State.order, _State.launches
    _State.on, _State.order, _State.launches = True, order, []
    try:
        yield _State.launches
    finally:
        _State.on, _State.order, _State.launches = before
        _State.shadows = {}
