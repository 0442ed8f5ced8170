"""Training steps as one CUDA graph: captured once, then replayed without running any Python of the step.

A graph is a list of kernels with the addresses that they read and write. So it stands on three things, which `update`
of the training module keeps: no step waits for the device, sizes do not depend on data, and what outlives a step stays
where it is. Batches are copied into one buffer, and the learning rate is a number on the device.

The first steps run as always, on a stream of their own: they allocate what outlives a step, compile kernels, and let
the libraries set themselves up. Then one step is captured, which runs nothing, and replayed in its own place; so every
step is a step of the training, and a graph changes no number.
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastapd import backends
from fastapd.evaluation import Activations, Distance, Step
from fastapd.model import ComponentModel, Inputs, version
from fastapd.training import set_learning_rate, update

if TYPE_CHECKING:
    from fastapd.config import APD

WARMUP = 3
"""Steps before one is captured; in the last of them torch is asked to notice whatever waits for the device."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _is_cuda(t: Tensor) -> bool:
    return t.is_cuda


def refuse(model: ComponentModel, method: APD) -> None:
    """Raises for what is known not to be capturable before a step has run.

    Raises:
        ValueError: If the target is not on a CUDA device, in float64, or selects as many pairs as inputs are active.
        NotImplementedError: If no backend takes exact Schatten sums of the components without waiting for the device.
    """
    first = model.sites[0].weight
    must = "decompose: cuda_graph must be False for"
    if not _is_cuda(first):
        raise ValueError(f"{must} a target on {first.device}, got True")
    if first.dtype not in DTYPES:
        raise ValueError(f"{must} a target of {first.dtype}, got True; its kernels take float32, float16 and bfloat16")
    if method.topk is not None and method.selection == "exact":
        raise ValueError(f"{must} exact selection, got True; it reads how many inputs are active")
    if ids := [site.name for site in model.sites if site.adapter.ids]:
        raise ValueError(f"{must} an embedding, got True; which rows of {ids[0]} occur is read from the data")
    if method.attribution_probes is not None and isinstance(model.chain, str):
        raise ValueError(f"{must} random directions, got True; they are drawn anew, on the CPU, at every step")
    if method.simplicity and method.schatten == "exact":
        for name in model.components.multiplicity:
            if reasons := _why_no_kernel(model, method, name):
                sizes = f"rank {model.components.rank}, {first.dtype}"
                raise NotImplementedError(f"{must} exact Schatten sums of {name}, {sizes}, got True: {reasons}")


def _why_no_kernel(model: ComponentModel, method: APD, name: str) -> str:
    """Why exact Schatten sums of a layer would fall to the reference, whose SVD waits to look for errors."""
    components = model.components
    A, B = (t.detach() for t in components.factors(name))
    counts = torch.zeros(B.shape[:2], dtype=torch.int64, device=B.device)
    arguments = A, B, counts, method.p, method.eps, 1, True, 1.0, *components.gradients(name)
    why_not = backends.explain("schatten_accumulate", *arguments)
    allowed = backends.forced_backends() or backends.BACKENDS
    if any(not why_not[backend] for backend in allowed if backend != "reference"):
        return ""
    reasons = [f"{b}: {', '.join(why_not[b])}" for b in allowed if b != "reference"]
    return "; ".join([*reasons, "reference: its SVD waits for the device"])


class GraphedSteps:
    """Steps of one training, called as `train_step` is with a learning rate and a batch.

    Args:
        model, method, optimiser, activations, distance: As for `train_step`; the optimiser is capturable.

    A step of the graph returns the same tensors every time: the next step overwrites them. If a parameter or a buffer
    of the target is replaced or written to in between, the next steps run as always and one is captured anew, since
    parts of the graph stand on products of the target's matrices. What is written behind torch's back, through
    `.data`, is not seen, here as in steps without a graph.
    """

    def __init__(
        self,
        model: ComponentModel,
        method: APD,
        optimiser: torch.optim.Optimizer,
        activations: Activations | None = None,
        distance: Distance | None = None,
    ) -> None:
        self.model, self.optimiser = model, optimiser
        self._arguments = model, method, optimiser
        self._callables = activations, distance
        self._left = WARMUP
        self._x: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: Step | None = None
        self._target: list[tuple[dict[str, Any], str, Tensor, int]] = []
        self._held: Any = None

    def __call__(self, lr: float, x: Inputs) -> Step:
        """One step.

        Raises:
            ValueError: If the batch has another shape than the first one.
            NotImplementedError: If the step cannot be captured, with what it does and where, as far as torch says.
        """
        self._take(x)
        assert self._x is not None
        set_learning_rate(self.optimiser, lr)
        if self._graph is not None and any(held.get(n) is not t or version(t) != v for held, n, t, v in self._target):
            torch.cuda.synchronize(self._x.device)  # the graph may still be running
            self._graph, self._left = None, WARMUP
        if self._graph is None and self._left > 0:
            self._left -= 1
            return self._eager(last=self._left == 0)
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._found is not None
        self._graph.replay()
        return self._found

    def _take(self, x: Inputs) -> None:
        """Copies a batch to where all steps read it."""
        if not isinstance(x, Tensor):
            raise ValueError("decompose: data must yield tensors with cuda_graph=True, got a dict")
        if self._x is None:
            self._x = torch.empty_like(x, memory_format=torch.contiguous_format)
            self._stream = torch.cuda.Stream(x.device)
        if x.shape != self._x.shape:
            raise ValueError(
                f"decompose: data must yield batches of one shape with cuda_graph=True, got {list(x.shape)} after "
                f"{list(self._x.shape)}; leave out what is left of an epoch"
            )
        self._x.copy_(x)

    def _update(self) -> Step:
        assert self._x is not None
        return update(*self._arguments, self._x, *self._callables)

    def _eager(self, last: bool) -> Step:
        """A step as always, on the stream of the capture, where libraries then have their memory."""
        assert self._stream is not None
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), _no_waiting() if last else contextlib.nullcontext():
                return self._update()
        finally:  # who fails saves what there is
            current.wait_stream(self._stream)

    def _capture(self) -> None:
        graph, first = torch.cuda.CUDAGraph(), None
        try:
            # other threads, those that load data, may do what they like meanwhile
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    step = self._update()
                except BaseException as error:
                    first = error  # ending a broken capture is an error of its own
                    raise
        except Exception as error:
            if first is not None and not isinstance(first, Exception):  # the user's interruption
                raise first from None
            cause = first or error
            lines = str(cause).strip().splitlines() or [""]
            raise NotImplementedError(
                f"decompose: cuda_graph must be False for a step that cannot be captured, got True and "
                f"{type(cause).__name__} {_place(traceback.extract_tb(cause.__traceback__))}: {lines[0]}"
            ) from error
        terms = {name: term.detach() for name, term in step.terms.items()}
        self._found = step._replace(terms=terms, attributions=step.attributions.detach())
        self._graph = graph
        self._target = _tensors_of(self.model.target)
        # What lies outside of the graph's own memory must not go away, even if somebody else lets go of it.
        self._held = self.model.kept(), [p.grad for p in self.model.components.parameters()]


def _tensors_of(target: nn.Module) -> list[tuple[dict[str, Any], str, Tensor, int]]:
    """Parameters and buffers, where each is registered, and how often it was written to."""
    found = []
    for module in target.modules():
        for held in (module._parameters, module._buffers):
            found += [(held, name, t, version(t)) for name, t in held.items() if t is not None]
    return found


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """A with block after which an error says where it waited for the device, as far as torch noticed.

    Torch only warns, and goes on: in its strict mode it would also stop the threads that load data.
    """
    found: list[str] = []
    me, before, show = threading.get_ident(), torch.cuda.get_sync_debug_mode(), warnings.showwarning

    def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if _WAITED not in str(message):
            show(message, category, filename, lineno, *rest)
        elif threading.get_ident() == me:
            found.append(_place(traceback.extract_stack()[:-1]))

    with warnings.catch_warnings():
        warnings.filterwarnings("always", f".*{_WAITED}")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if found:
        raise NotImplementedError(
            f"decompose: cuda_graph must be False for a step that waits for the device, got True and a wait {found[0]}"
        )


_WAITED = "called a synchronizing CUDA operation"
_NOT_OWN = os.path.dirname(torch.__file__) + os.sep, warnings.formatwarning.__code__.co_filename


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The last line of a stack that is not torch's."""
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_OWN)]
    if not own:
        return "at a place unknown"
    return f"in {own[-1].name} at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})"
