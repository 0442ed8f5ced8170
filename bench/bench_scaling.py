"""How the time of a training step grows, and what a second thread brings.

`scaling/<size>` runs the step of a residual MLP over a decade of one size with the others fixed; the slope is fitted in
`bench/goals.py`. `threads/<case>` runs the same step on one and on two threads, by wall time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.bench_step import CASES, CONTENDERS
from bench.cases import RESIDUAL_M4, Case, problem
from bench.harness import measure, watch

SIZES = {
    "n_components": (32, 64, 130, 320),
    "batch": (256, 512, 1024, 2560),
    "steps": (2, 5, 10, 20),
}
_CASE = replace(RESIDUAL_M4, name="resid_m4")


def _call(size: str, value: int) -> Callable[[], Any]:
    if size == "steps":
        step = CONTENDERS["fastapd"](problem(_CASE)).call
        return lambda: [step() for _ in range(value)]
    if size == "batch":
        case = replace(_CASE, name=f"resid_m4_b{value}", batch=value)
    else:
        case = replace(_CASE, name=f"resid_m4_c{value}", n_components=value)
    return CONTENDERS["fastapd"](problem(case)).call


@pytest.mark.parametrize(("size", "value"), [(size, value) for size, values in SIZES.items() for value in values])
def bench_scaling(benchmark: Any, size: str, value: int) -> None:
    call = _call(size, value)
    _, seen = watch(call)
    info = {"contender": f"fastapd_{value}", "direction": "scaling", "fastapd": "", "size": value}
    measure(benchmark, f"scaling/{size}", call, seen, **info)


@pytest.mark.benchmark(timer=time.perf_counter)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_threads(benchmark: Any, case: Case, threads: int) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one processor")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call = CONTENDERS["fastapd"](problem(case)).call
        _, seen = watch(call)
        name = {1: "one_thread", 2: "two_threads"}[threads]
        info = {"contender": name, "direction": "threads", "fastapd": "", "timer": "wall"}
        measure(benchmark, f"threads/{case.name}", call, seen, **info)
    finally:
        torch.set_num_threads(before)
