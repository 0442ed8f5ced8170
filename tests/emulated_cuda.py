"""A CUDA graph without a card: what a step asks of torch, of the CPU kernels and of Triton's interpreter, done again.

`installed(monkeypatch)` puts it in the place of what `fastapd._cuda_graph` calls. While a step is captured, every
operation of torch that is no view, every call of a native function and every launch of a Triton kernel is noted with
its arguments; a replay does these again, in this order, on the same memory, and runs no other Python. What a capture
on a card is, this one is too:

    it runs nothing            what was there before it is put back, what it made is overwritten with NaN
    it may not wait            an operation whose result the host must read is an error, as torch raises it
    it owns its own memory     what it made is kept; what it found is not, and a replay fails if it has gone

Natives get addresses, as on a card, and so are replayed with addresses.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from fastapd import _cuda_graph, _native, backends
from fastapd.ops import _op

CAPTURING = "CUDA error: operation not permitted when stream is capturing"
NOT_WAITED = "the default stream must wait for what a side stream does"
FREED = "the graph uses memory that was freed"

CHECKED_ALGEBRA = (
    *("_linalg_svd", "_linalg_eigh", "_linalg_eigvals", "linalg_eig", "linalg_lstsq", "_linalg_check_errors"),
    *("linalg_cholesky", "_linalg_solve_ex", "linalg_inv_ex", "linalg_lu", "linalg_ldl_factor"),
)
"""Factorisations that read back whether they worked."""


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation of torch would make the host wait for the device."""
    name = func._schema.name.removeprefix("aten::")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
        return True
    return name in CHECKED_ALGEBRA or name.startswith("lift")  # the latter: numbers of the host become a tensor


class Node(NamedTuple):
    """One thing that a graph does."""

    name: str
    place: str
    run: Callable[[], Any]


class _Outside:
    """A tensor that was there before the capture, by its memory alone."""

    def __init__(self, t: Tensor, storage: StorageWeakRef) -> None:
        self.storage, self.dtype, self.geometry = storage, t.dtype, (t.storage_offset(), t.shape, t.stride())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, FREED
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.geometry)


class _Capture(TorchDispatchMode):
    """Notes the nodes of what runs inside, and lets it run, to have outputs of the right sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.made: dict[int, Tensor] = {}
        self.found: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
        """What was there before: whether it still is, and a copy of what it held."""

    def see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata not in self.made and storage._cdata not in self.found:
            with _disable_current_modes():
                self.found[storage._cdata] = StorageWeakRef(storage), storage.clone()

    def _known(self, value: Any) -> Any:
        """Arguments as the graph keeps them: memory of its own, or where other memory is."""

        def known(t: Tensor) -> Any:
            if t.untyped_storage()._cdata in self.made:
                return t.detach()
            self.see(t)
            return _Outside(t, self.found[t.untyped_storage()._cdata][0])

        with _disable_current_modes():
            return tree_map_only(Tensor, known, value)

    def add(self, name: str, run: Callable[..., Any], *arguments: Any, outputs: list[Tensor] | None = None) -> None:
        kept = self._known(arguments)

        def again() -> None:
            fresh = run(*tree_map_only(_Outside, _Outside.tensor, kept))
            if outputs is not None:
                for out, new in zip(outputs, _tensors(fresh), strict=True):
                    out.copy_(new)

        self.nodes.append(Node(name, _place(), again))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastapd":  # those that are differentiated and take lists
            run = backends.choose(func._schema.name.removeprefix("fastapd::"), args)
            with self:
                return _op.outside_autocast(run, *args)
        with self:  # what torch puts together from others, and has not yet
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        if waits(func, args):
            raise RuntimeError(f"{CAPTURING}\n({func} in {_place()})")
        for t in _tensors((args, kwargs)):
            self.see(t)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        found = func(*args, **kwargs)
        outputs = _tensors(found)
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        new = [t for t in outputs if t.untyped_storage()._cdata not in before]
        if writes:
            assert not new, func
            self.add(str(func), lambda a, k: func(*a, **k), args, kwargs)
            return found
        for t in new:
            self.made[t.untyped_storage()._cdata] = t.detach()
        if new and "empty" not in func._schema.name:
            assert len(new) == len(outputs), func
            with _disable_current_modes():
                kept = [t.detach() for t in new]
            self.add(str(func), lambda a, k: func(*a, **k), args, kwargs, outputs=kept)
        return found

    def undo(self) -> None:
        """Nothing has run: what was there is as it was, and what is new holds anything."""
        for reference, held in self.found.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                storage.copy_(held)
        for t in self.made.values():
            t.untyped_storage().fill_(255)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]


def _place() -> str:
    """Where in fastapd an operation was asked for."""
    frame: Any = sys._getframe(1)
    while frame is not None and not any(part in frame.f_code.co_filename for part in ("/fastapd/", "/kernels/")):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


_now: list[_Capture] = []
"""The capture that is going on, if there is one."""


class _Hidden:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _NotedNative:
    """A native module whose calls are nodes."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._module, name)
        if isinstance(own, type) or not callable(own):
            return own

        def call(*args: Any) -> Any:
            if _now:
                gone = list(_now[0].found.values())

                def run(*args: Any) -> None:
                    assert not any(reference.expired() for reference, _ in gone), FREED
                    own(*args)

                _now[0].add(f"native {name}", run, *args)
            return own(*args)

        return call


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    nodes: list[Node]
    kept: dict[int, Tensor]
    replayed = 0

    def replay(self) -> None:
        self.replayed += 1
        assert not Stream.busy, NOT_WAITED
        with torch.no_grad():
            for node in self.nodes:
                node.run()


class capture:
    """Stands for `torch.cuda.graph`."""

    def __init__(self, graph: Graph, stream: Any, capture_error_mode: str) -> None:
        assert isinstance(stream, Stream)
        assert capture_error_mode == "thread_local", "or threads that load data break it"
        self.graph, self.mode = graph, _Capture()

    def __enter__(self) -> None:
        _now.append(self.mode)
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        _now.pop()
        self.mode.undo()
        self.graph.nodes, self.graph.kept = self.mode.nodes, self.mode.made
        if error[0] is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


class Stream:
    """Stands for `torch.cuda.Stream`; notes who waited for whom."""

    current: Stream
    busy: set[Stream] = set()  # noqa: RUF012
    """Those that nobody waited for yet."""

    def __init__(self, device: Any = None) -> None:
        self.device = device
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)
        self.busy.discard(other)


Stream.current = Stream("the default")


@contextlib.contextmanager
def _on_stream(stream: Stream) -> Iterator[None]:
    assert stream.waited[-1] is Stream.current, "work on a side stream must wait for what comes before"
    assert not Stream.busy, NOT_WAITED
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before
        Stream.busy.add(stream)


def _refused_in_captures(name: str) -> Callable[..., Any]:
    own = getattr(Tensor, name)

    def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _now:
            raise RuntimeError(f"{CAPTURING}\n(Tensor.{name} in {_place()})")
        return own(self, *args, **kwargs)

    return read


def installed(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Puts all of this in place for a test; returns the graphs that it makes."""
    graphs: list[Graph] = []
    Stream.busy = set()

    def new_graph() -> Graph:
        graphs.append(Graph())
        return graphs[-1]

    stand_ins = {
        "CUDAGraph": new_graph, "graph": capture, "Stream": Stream, "stream": _on_stream,
        "current_stream": lambda device=None: Stream.current, "synchronize": lambda device=None: None,
        "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: None,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(_cuda_graph, "_is_cuda", lambda t: True)
    _note_everything(monkeypatch)
    return graphs


def _note_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a capture see what does not go through torch's dispatcher."""
    load, native = _native.load, _native.load("_C")
    noted = native._replace(module=native.module and _NotedNative(native.module))
    monkeypatch.setattr(_native, "load", lambda name: noted if name == "_C" else load(name))
    # ops that see a mode take the way through the dispatcher, where the mode would not see what they do
    monkeypatch.setattr(_op, "torch", _Hidden(torch, _C=_Hidden(torch._C, _len_torch_dispatch_stack=lambda: 0)))
    address = Tensor.data_ptr

    def data_ptr(self: Tensor) -> int:
        for mode in _now:
            mode.see(self)
        return address(self)

    monkeypatch.setattr(Tensor, "data_ptr", data_ptr, raising=False)
    for name in ("tolist", "numpy", "cpu", "__array__"):  # which read memory without asking the dispatcher
        monkeypatch.setattr(Tensor, name, _refused_in_captures(name), raising=False)
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    launch = interpreter.GridExecutor.__call__

    def noted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _now:
            _now[0].add(f"triton {self.fn.__name__}", lambda *a: launch(self, *a, **kwargs), *args)
        now, _now[:] = _now[:], []  # the interpreter reads what it likes
        with _disable_current_modes():
            launch(self, *args, **kwargs)
        _now[:] = now

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted_launch)
