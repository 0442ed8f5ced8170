"""Every test starts from the same seeds, the same backend and poisoned memory, and leaves nothing of its own behind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastapd import _native, backends, testing, use_precision


@functools.cache
def _load(name: str) -> Any:
    """A module of tests/triton or tests/cuda, which are no packages: `triton/checked`, say."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if _setting := os.environ.get("FASTAPD_EMULATED_CUDA"):  # before anybody asks for the module
    _load("cuda/emulated").install(_setting)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer: an output that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # the fill only happens in this mode
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(autouse=True)
def chosen_backend() -> Iterator[None]:
    """Tests begin with `auto`, whatever FASTAPD_BACKEND says, and what they force does not outlive them."""
    before = backends._forced, backends._environment_read
    backends._forced, backends._environment_read = None, True
    yield
    backends._forced, backends._environment_read = before


def _few(case: testing.Case) -> testing.Case:
    """A case for the interpreter, which runs a hundred programs a second: fewer of all that they are counted by."""
    most = {"n_instances": 2, "batch": 9, "n_components": 7, "rank": 3, "n_outputs": 4}
    return dataclasses.replace(case, **{name: min(n, getattr(case, name)) for name, n in most.items()})


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend named by the parameter, forced for the test.

    Triton's kernels run in the checked interpreter, at a few samples and components of every case; check_interpreter.py
    takes more of them.
    """
    if request.param == "cpu" and (reason := _native.load("_C").reason):
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        stack.enter_context(backends.use_backend(request.param))
        if request.param == "triton":
            for name, case in testing.CASES.items():
                monkeypatch.setitem(testing.CASES, name, _few(case))
            stack.enter_context(use_precision("ieee"))
            stack.enter_context(_load("triton/checked").checked())
        yield request.param


@pytest.fixture
def repeats(backend: str) -> int:
    """How often an answer is asked for again; the interpreter runs its programs one by one, always in one order."""
    return 2 if backend == "triton" else 100


@pytest.fixture
def several_threads(backend: str) -> None:
    """For tests that call a backend from several Python threads."""
    if backend == "triton":
        pytest.skip("Triton's interpreter keeps what it is doing in globals: one thread")


HERE = Path(__file__).parent
CHECK = ["-m", "pytest", "-q", "-s", "-rs", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
INTERPRET = {"TRITON_INTERPRET": "1"}
FAR = [*CHECK[:-2], str(HERE / "ops" / "test_contracts.py"), "-k", "triton and more_elements"]
CUDA = str(HERE / "cuda")
OPS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "ops"), "-k"]
PARTS = ("component", "attribution", "topk", "svd or schatten", "thin or norm or along")
COMPILED = str(HERE / "triton" / "compiled.py")
COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "cuda emulated": ([*CHECK, CUDA, "-k", "check_emulat"], {"FASTAPD_EMULATED_CUDA": "1"}),
    "cuda sanitizers": ([*CHECK, CUDA, "-k", "check_sanitizers"], {}),
    "triton interpreter": ([*CHECK, str(HERE / "triton")], INTERPRET),
    "triton far": (FAR, INTERPRET),
    **{f"triton sm_{sm}": ([COMPILED, "--sm", str(sm)], {}) for sm in (80, 90, 100)},
    "triton ops contract": ([*OPS, "triton and contract and not more_elements"], INTERPRET),
    **{f"triton ops {part}": ([*OPS, f"triton and ({part}) and not contract"], INTERPRET) for part in PARTS},
    "triton interpreter in full": ([*CHECK, str(HERE / "triton"), "-m", "slow"], INTERPRET),
    "cuda ops": ([*OPS, "cuda"], {"FASTAPD_EMULATED_CUDA": "1"}),
    "cuda in every case": ([*CHECK, CUDA, "-k", "check_emulated", "-m", "slow"], {"FASTAPD_EMULATED_CUDA": "1"}),
    "cuda sanitizers in full": ([*CHECK, CUDA, "-k", "check_sanitizers", "-m", "slow"], {}),
    **{f"triton sm_{sm} in full": ([COMPILED, "--sm", str(sm), "--full"], {}) for sm in (80, 90, 100)},
}
"""What a lane runs with this Python, and with which settings."""
LIMIT = 3600
"""Seconds that a lane may take."""


class Lanes:
    """Proofs of the GPU kernels in processes of their own, two at a time, which run beside other tests."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._done: dict[str, Future[tuple[int, str]]] = {}
        self._running: set[subprocess.Popen[str]] = set()
        self.said: list[str] = []

    def start(self, names: Iterable[str]) -> None:
        for name in names:
            self._done[name] = self._pool.submit(self._run, name, *COMMANDS[name])

    def _run(self, name: str, command: list[str], settings: dict[str, str]) -> tuple[int, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTAPD_", "TRITON_", "PYTEST_"))}
        env |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", **settings}
        running = subprocess.Popen(
            [sys.executable, "-P", *command], cwd=HERE.parent, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._running.add(running)
        try:
            printed, _ = running.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            running.kill()
            printed = f"{running.communicate()[0]}\nnot done after {LIMIT} seconds"
        self._running.discard(running)
        counts = [line for line in printed.splitlines() if line.startswith(("interpreted", "compiled", "emulated"))]
        self.said += [f"{name.split()[0]} {line}" for line in counts]
        return running.returncode, printed

    def result(self, name: str) -> tuple[int, str]:
        """The exit status of a lane and what it printed, once it has ended."""
        return self._done[name].result()

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for running in tuple(self._running):
            running.kill()


LANES = Lanes()


def _awaited(item: pytest.Item) -> str | None:
    """The lane that a test waits for."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("lane") if callspec is not None and "lanes" in item.fixturenames else None  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever waits for a lane comes last."""
    items.sort(key=lambda item: _awaited(item) is not None)


@pytest.fixture(scope="session", autouse=True)
def lanes(request: pytest.FixtureRequest) -> Iterator[Lanes]:
    """The lanes that tests wait for, started with the first test."""
    awaited = {_awaited(item) for item in request.session.items}
    LANES.start(name for name in COMMANDS if name in awaited)
    yield LANES
    LANES.stop()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in LANES.said:
        terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[Any]:
    """A test that hands float64 to the Triton kernels, which refuse it, is skipped with that reason."""
    try:
        return (yield)
    except Exception as error:  # torch and pytest.raises wrap what a backend says
        callspec = getattr(pyfuncitem, "callspec", None)
        refused = "the Triton kernels take float32, float16 and bfloat16, not torch.float64"
        if callspec is not None and callspec.params.get("backend") == "triton" and refused in str(error):
            pytest.skip(refused)
        raise


@pytest.fixture
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction-set level named by the parameter, for the CPU kernels of the test."""
    native: Any = _native.load("_C").module
    if native is None or request.param not in native.cpu_levels():
        pytest.skip(_native.load("_C").reason or f"this build or processor has no level {request.param}")
    before = native.cpu_level()
    native.set_cpu_level(request.param)
    with backends.use_backend("cpu", "reference"):
        yield request.param
    native.set_cpu_level(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Callable[..., Any]], None]:
    """`plant(op, backend, wrong)` puts `wrong(right, *args)` in the place of a backend's function."""
    load = backends._load

    def plant(op: str, backend: str, wrong: Callable[..., Any]) -> None:
        path = backends.TABLE[op][backend]
        right = load(path)
        found = {path: lambda *args: wrong(right, *args)}
        monkeypatch.setattr(backends, "_load", lambda p: found.get(p) or load(p))

    return plant
