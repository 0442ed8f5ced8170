"""`pytest bench --benchmark-only`: CPU time on one thread, one table of ratios, and results that can be kept.

The machine is usually shared, so what is read is the CPU time of the process, and what is quoted is a ratio within one
run. With `--save-results`, or FASTAPD_BENCH_SAVE=1, the run is written to
`bench/results/<date>-<commit>-<machine>.json` in pytest-benchmark's format, without the single timings and without
anything that names a host, a user or a path. At the end stand the goals, met or missed, and what got worse since the
latest kept run.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from bench import machine, results, tables

torch.set_num_threads(1)

MAX_SECONDS = "0.5"  # for one benchmark, unless its rounds are slow


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("benchmark").addoption(
        "--save-results",
        action="store_true",
        default=os.environ.get("FASTAPD_BENCH_SAVE") == "1",
        help="Write bench/results/<date>-<commit>-<machine>.json; also with FASTAPD_BENCH_SAVE=1.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Our defaults, where the command line leaves pytest-benchmark's; its own table gives way to the one below."""
    option = config.option
    given = [str(arg).split("=")[0] for arg in config.invocation_params.args]
    if "--benchmark-timer" not in given:
        option.benchmark_timer = "time.process_time"
    if "--benchmark-max-time" not in given:
        option.benchmark_max_time = MAX_SECONDS
    option.benchmark_quiet = not option.benchmark_verbose


# ------------------------------------------------------------------------------------------------ where it was measured


def _triton_version() -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _quantity(config: pytest.Config) -> str:
    """What the numbers are."""
    timer, threads = str(config._benchmarksession.options["timer"]), torch.get_num_threads()  # type: ignore[attr-defined]
    what = "CPU time" if "process_time" in timer else f"wall time by {timer}"
    return f"{what}, {'one thread' if threads == 1 else f'{threads} threads'}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keeps what a time depends on, and nothing that names a machine or a person."""
    from fastapd import _native

    cpu = machine_info.get("cpu") or {}
    native = _native.load("_C").module
    kept = {
        "cpu": {"brand_raw": cpu.get("brand_raw") or platform.machine(), "count": os.cpu_count()},
        "machine": platform.machine(),
        "system": platform.system(),
        "python_version": platform.python_version(),
        "python_implementation": platform.python_implementation(),
        "python_implementation_version": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "triton": _triton_version(),
        "fastapd_cpu_level": native.cpu_level() if native is not None else None,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "timer": str(config._benchmarksession.options["timer"]),  # type: ignore[attr-defined]
        "quantity": _quantity(config),
        "constants": machine.constants(),
    }
    machine_info.clear()
    machine_info.update(kept)


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """The commit, its time and whether the checkout differs from it."""
    for key in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[key]


def _machine_name(machine_info: dict[str, Any]) -> str:
    """FASTAPD_BENCH_MACHINE, or the processor's name without its maker, and its cores: epyc-2core."""
    brand = re.sub(
        r"\(.*?\)|@.*|\b(amd|intel|apple|cpu|processor|\d+-core)\b", " ", machine_info["cpu"]["brand_raw"].lower()
    )
    brand = "-".join(re.findall(r"[a-z0-9]+", brand)) or machine_info["machine"]
    return os.environ.get("FASTAPD_BENCH_MACHINE") or f"{brand}-{machine_info['cpu']['count']}core"


# ---------------------------------------------------------------------------------------------------------- the results

_SAVED = pytest.StashKey[Path]()


def _timed(config: pytest.Config) -> list[Any]:
    """What was timed; a benchmark that failed is not among it, and costs the others nothing."""
    return [b for b in config._benchmarksession.benchmarks if not b.has_error]  # type: ignore[attr-defined]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the results after pytest-benchmark has collected them."""
    config = session.config
    timed = _timed(config)
    if not config.getoption("save_results") or not timed:
        return
    machine_info = config._benchmarksession.get_machine_info()  # type: ignore[attr-defined]
    commit_info = config.hook.pytest_benchmark_generate_commit_info(config=config)
    config.hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit_info)
    output = config.hook.pytest_benchmark_generate_json(
        config=config, benchmarks=timed, include_data=False, machine_info=machine_info, commit_info=commit_info
    )
    for row in output["benchmarks"]:
        row["params"] = None  # they are in the name; the cases are described in bench/cases.py
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = results.RESULTS / f"{today}-{commit_info['id'][:7]}-{_machine_name(machine_info)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results.rounded(output), indent=1) + "\n")
    config.stash[_SAVED] = path


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    timed = _timed(config)
    if not timed:
        return
    now = results.table(
        results.Row(b.group, b.extra_info["direction"], b.extra_info["contender"], b.stats.median, b.extra_info)
        for b in timed
    )
    saved = config.stash.get(_SAVED, None)
    earlier = results.latest(but=saved)
    before = {} if earlier is None else results.table(results.rows(results.load(earlier)))
    write = terminalreporter.write_line
    terminalreporter.section(f"{_quantity(config)}, float32")
    write(tables.CONTENDERS_TEXT)
    if earlier is not None:
        write(f"before: vs upstream in {earlier.name}")
    for line in tables.contenders(now, before):
        write(line)
    terminalreporter.section("goals")
    for line in tables.summary(now, machine.constants()):
        write(line)
    if earlier is not None:
        write("")
        for line in tables.comparison(earlier.name, before, now):
            write(line)
    if saved is not None:
        write("")
        write(f"wrote bench/results/{saved.name}")
