"""Equivalence: every op on every backend that runs on CUDA, against the reference in float64 on the CPU.

The oracle is computed on the CPU, where the tests of the house hold it against numpy and LAPACK; what is compared is
what the device returned, copied back. In every dtype, at the cases of `fastapd.testing`, the cheap ones first:

    ieee, tf32x3    outputs and gradients within the tolerances of the house
    tf32            the largest relative error by norm is reported, and may be 5e-3
    views           the same numbers in other places, at one case
    a NaN           in one place of each argument: NaN in the result where the reference has it, and nowhere else
    ties            of the selections: zeros of both signs, equal scores, two values, NaN, denormals

Memory that an op does not write is NaN in all of it.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench._gpu.card import Card, precision
from fastapd import _env, _native, backends, testing
from fastapd.testing import Case

TF32_ERROR = 5e-3
ONE = "odd"
"""The case at which views and NaN are tried."""

SMALL = (
    Case("few", 2, 5, 3, 2, 5, 6, n_outputs=3, k=1.5, tied=True),
    Case("over", 1, 18, 17, 9, 33, 20, n_outputs=17, k=1.0),
)
"""Of a rehearsal."""

SINGULAR = ("component_svdvals", "schatten", "schatten_accumulate")
"""Ops whose oracle takes singular values of products by LAPACK, which refuses NaN; the op's own reference does not."""

MESSAGES = 4
"""How many failures of one backend are kept in full."""


def backends_of(op: str) -> list[str]:
    """Those that have the op and can run on CUDA, in the order of its row; CUDA C++ where it was built, and not in a
    rehearsal, which has Triton's interpreter alone."""
    absent = {"cpu"} | ({"cuda"} if _env.triton_interprets() or _native.load("_C_cuda").module is None else set())
    return [name for name in backends.TABLE[op] if name not in absent]


def could_choose(op: str) -> list[str]:
    """Those that fastapd chooses by itself at one size or another."""
    names = backends_of(op)
    return [name for name in names if name == names[0] or (op, name) in backends.PREFERRED]


def cases(card: Card, quick: bool) -> list[Case]:
    """Cheap ones first."""
    if card.rehearsal:
        return [SMALL[0]]
    found = sorted(testing.CASES.values(), key=lambda c: c.n_instances * c.batch * c.n_components * c.rank)
    return found[:4] if quick else [*SMALL, *found]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # the fill only happens in this mode
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def to(device: str, value: Any) -> Any:
    return testing.map_tensors(lambda t: t.to(device), value)


def inputs(op: str, case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, ...]:
    """On the CPU, from where they are sent: the same numbers on every device."""
    return testing.inputs(op, case, dtype, seed)


def cotangents_of(op: str, args: Sequence[Any]) -> list[Tensor] | None:
    """Drawn gradients of the outputs, for ops that are differentiable; on the CPU."""
    if not testing._OPS[op].differentiable:
        return None
    return testing.random_cotangents(testing.reference(op, args).outputs)


def answer(card: Card, op: str, args: Sequence[Any], cotangents: list[Tensor] | None, device: str = "") -> Any:
    """What the device returns, on the CPU."""
    device = device or card.device
    found = testing.run(op, to(device, list(args)), to(device, cotangents))
    return testing.Answer(*([t.detach().cpu() for t in ts] for ts in found))


class _Log:
    """What was checked on one backend."""

    def __init__(self, op: str, backend: str, dtype: str) -> None:
        self.row: dict[str, Any] = {"op": op, "backend": backend, "dtype": dtype, "checked": 0, "failed": 0}
        self.row |= {"messages": [], "refused": {}, "left_out": [], "tf32_error": None}

    def check(self, what: str, function: Callable[[], None]) -> bool:
        """Runs a check and keeps how it ended; False where the process had better end as well."""
        try:
            with poisoned_memory():
                function()
        except NotImplementedError as error:
            self.row["refused"].setdefault(str(error), []).append(what)
            if self.row["dtype"] == "float32":  # which every backend takes, or has to say why it is there
                self._failed(f"{what}: refused: {error}")
            return True
        except Exception as error:  # a kernel may fail in any way, and the others are of interest all the same
            self.row["checked"] += 1
            self._failed(f"{what}: {said(error)}")
            return isinstance(error, AssertionError) or "CUDA" not in str(error)
        self.row["checked"] += 1
        return True

    def _failed(self, message: str) -> None:
        self.row["failed"] += 1
        if len(self.row["messages"]) < MESSAGES:
            self.row["messages"].append(message)


def said(error: BaseException) -> str:
    """An error in one line, with the last line of ours that it passed."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if isinstance(error, AssertionError) else f"{type(error).__name__}: {lines[0]}"
    if isinstance(error, AssertionError):
        return text[:300]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in f.filename]
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return text[:300] + where


def equivalence(card: Card, op: str, dtype: str, quick: bool, seconds: float) -> dict[str, Any]:
    """One op in one dtype on every backend; stops between checks when its time is over, and says what it left out."""
    until = time.monotonic() + seconds
    kind, rows = getattr(torch, dtype), []
    for backend in backends_of(op):
        log = _Log(op, backend, dtype)
        with card.backend(backend):
            sound = True
            for what, function in _checks(card, op, backend, kind, quick, log):
                if not sound or time.monotonic() > until:
                    log.row["left_out"].append(what)
                    continue
                sound = log.check(what, function) or card.healthy()
        rows.append(log.row)
        if not sound:
            break
    return {"rows": rows, "failures": failures(rows), "broken": not card.healthy()}


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{row['op']} on {row['backend']}, {row['dtype']}: {m}" for row in rows for m in row["messages"]]


class _Check(NamedTuple):
    what: str
    function: Callable[[], None]


def _checks(card: Card, op: str, backend: str, dtype: torch.dtype, quick: bool, log: _Log) -> Iterator[_Check]:
    own = backend != "reference"
    modes = ["ieee", "tf32x3"] if own and dtype == torch.float32 else [""]
    for case in cases(card, quick):
        for mode in modes:
            what = " ".join(filter(None, (case.name, mode)))
            yield _Check(what, lambda case=case, mode=mode: _matches(card, op, case, dtype, backend, mode))
    if dtype != torch.float32:
        return
    if own:
        for case in cases(card, quick)[:3]:
            yield _Check(f"{case.name} tf32", lambda case=case: _roughly(card, op, case, log))
    one = SMALL[0] if card.rehearsal else testing.CASES[ONE]
    for name, view in testing.VIEWS.items():
        yield _Check(f"view {name}", lambda view=view: _matches(card, op, one, dtype, backend, "", view))
    args = inputs(op, one)
    for i, t in enumerate(testing.tensors_of(args)):
        if t.is_floating_point() and t.numel():
            yield _Check(f"NaN in tensor {i}", lambda i=i: _keeps_nan(card, op, one, backend, i))
    if "topk" in op:
        for name, scores in TIES.items():
            yield _Check(f"ties {name}", lambda scores=scores: _ties(card, op, one, backend, scores))


def _matches(card: Card, op: str, case: Case, dtype: torch.dtype, backend: str, mode: str, view: Any = None) -> None:
    args = inputs(op, case, dtype)
    cotangents = cotangents_of(op, args)
    there = to(card.device, list(args))
    if view is not None:
        there = testing.map_tensors(view, there)
    with precision(mode):
        found = testing.run(op, there, to(card.device, cotangents))
    outputs, grads = ([t.detach().cpu() for t in ts] for ts in found)
    testing.assert_matches_reference(
        op, outputs, args, backend, grads=None if cotangents is None else grads, cotangents=cotangents
    )


def relative_error(got: Tensor, exact: Tensor) -> float:
    """By norm; of what is zero, whether it is."""
    got, exact = got.double(), exact.double()
    scale = exact.norm().item()
    return ((got - exact).norm() / scale).item() if scale else float(got.norm() > 0)


def _roughly(card: Card, op: str, case: Case, log: _Log) -> None:
    args = inputs(op, case)
    cotangents = cotangents_of(op, args)
    with precision("tf32"):
        found = answer(card, op, args, cotangents)
    exact = testing.oracle(op, args, cotangents)
    pairs = zip((*found.outputs, *found.grads), (*exact.outputs, *exact.grads), strict=True)
    worst = max((relative_error(a, b) for a, b in pairs if a.is_floating_point() and a.numel()), default=0.0)
    log.row["tf32_error"] = max(worst, log.row["tf32_error"] or 0.0)
    assert worst <= TF32_ERROR, f"relative error {worst:.2e} in tf32, allowed {TF32_ERROR:.0e}"


def _keeps_nan(card: Card, op: str, case: Case, backend: str, which: int) -> None:
    """NaN in the first place of one tensor among the arguments."""
    args, number = inputs(op, case), iter(range(1 << 10))

    def poison(t: Tensor) -> Tensor:
        if next(number) != which:
            return t
        t = t.clone(memory_format=torch.preserve_format)
        t[(0,) * t.dim()] = torch.nan
        return t

    args = testing.map_tensors(poison, list(args))
    found = answer(card, op, args, None).outputs
    if op not in SINGULAR:
        testing.assert_matches_reference(op, found, args, backend)
        return
    with backends.use_backend("reference"):
        wanted = testing.run(op, args).outputs
    for i, (got, own) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(got.isnan(), own.isnan()), f"outputs[{i}]: NaN where the reference has none, or the reverse"
        sound = ~own.isnan()
        assert torch.allclose(got[sound], own[sound], 1e-4, 1e-5), f"outputs[{i}]: another value beside a NaN"


TIES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros of both signs": lambda s: torch.where(s > s.median(), 0.0, -0.0),
    "equal": lambda s: torch.full_like(s, 0.3),
    "two values": lambda s: (s > s.median()).to(s.dtype),
    "mostly zero": lambda s: torch.where(s > s.quantile(0.97), s, 0),
    "NaN": lambda s: torch.where(s > s.quantile(0.9), torch.nan, s),
    "denormals": lambda s: s * 1e-41,
    "infinities": lambda s: torch.where(s > s.quantile(0.9), torch.inf, torch.where(s < s.median(), -torch.inf, s)),
}


def _ties(card: Card, op: str, case: Case, backend: str, scores: Callable[[Tensor], Tensor]) -> None:
    first, *rest = inputs(op, case)
    args = (scores(first), *rest)
    testing.assert_matches_reference(op, answer(card, op, args, None).outputs, args, backend)
