"""Every test starts from the same seeds, the same backend and poisoned memory, and leaves nothing of its own behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastapd import _native, backends


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


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend named by the parameter, forced for the test."""
    if request.param == "cpu" and (reason := _native.load("_C").reason):
        pytest.skip(reason)
    with backends.use_backend(request.param):
        yield request.param


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
