"""`pytest bench --benchmark-only`: CPU time on one thread, one table of ratios, and results that can be kept.

The machine is usually shared, so what is read is the CPU time of the process, and what is quoted is a ratio within one
run. With `--save-results`, or FASTAPD_BENCH_SAVE=1, the run is written to
`bench/results/<date>-<commit>-<machine>.json` in pytest-benchmark's format, without the single timings and without
anything that names a host, a user or a path.
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

torch.set_num_threads(1)

RESULTS = Path(__file__).with_name("results")
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


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the results after pytest-benchmark has collected them."""
    config = session.config
    benchmarks = config._benchmarksession.benchmarks  # type: ignore[attr-defined]
    if not config.getoption("save_results") or not benchmarks:
        return
    machine_info = config._benchmarksession.get_machine_info()  # type: ignore[attr-defined]
    commit_info = config.hook.pytest_benchmark_generate_commit_info(config=config)
    config.hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit_info)
    output = config.hook.pytest_benchmark_generate_json(
        config=config, benchmarks=benchmarks, include_data=False, machine_info=machine_info, commit_info=commit_info
    )
    for row in output["benchmarks"]:
        row["params"] = None  # they are in the name; the cases are described in bench/cases.py
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = RESULTS / f"{today}-{commit_info['id'][:7]}-{_machine_name(machine_info)}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(_rounded(output), indent=1) + "\n")
    config.stash[_SAVED] = path


_SAVED = pytest.StashKey[Path]()


# ------------------------------------------------------------------------------------------------------------ the table

Key = tuple[str, str]
"""Group and direction."""


def _medians(rows: list[tuple[Key, str, float]]) -> dict[Key, dict[str, float]]:
    table: dict[Key, dict[str, float]] = {}
    for key, contender, median in rows:
        table.setdefault(key, {})[contender] = median
    return table


def _previous() -> tuple[str, dict[Key, dict[str, float]]]:
    """The latest kept results: their name and medians."""
    kept = [(json.loads(path.read_text()), path.name) for path in RESULTS.glob("*.json")]
    if not kept:
        return "", {}
    latest, name = max(kept, key=lambda pair: pair[0]["datetime"])
    rows = []
    for row in latest["benchmarks"]:
        info = row["extra_info"]
        rows.append(((row["group"], info["direction"]), info["contender"], row["stats"]["median"]))
    return name, _medians(rows)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _memory(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "-"
    return f"{n_bytes / 2**20:.3g} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.3g} KiB"


def _ratio(baseline: float | None, median: float) -> str:
    return f"{baseline / median:.2f}" if baseline else "-"


def _baselines(medians: dict[str, float]) -> tuple[float | None, float | None]:
    """The research formulation, and the fastest of the plain torch forms."""
    return medians.get("upstream"), min((t for name, t in medians.items() if name.startswith("torch")), default=None)


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ran = [b for b in config._benchmarksession.benchmarks if not b.has_error]  # type: ignore[attr-defined]
    if not ran:
        return
    now = _medians([((b.group, b.extra_info["direction"]), b.extra_info["contender"], b.stats.median) for b in ran])
    infos = {((b.group, b.extra_info["direction"]), b.extra_info["contender"]): b.extra_info for b in ran}
    saved = config.stash.get(_SAVED, None)
    before_name, before = ("", {}) if saved else _previous()
    header = ["", "", "", "median", "vs upstream", "vs torch", *(["before"] if before else []), "peak"]
    lines: list[list[str]] = []
    for key, medians in now.items():
        upstream, torch_form = _baselines(medians)
        for i, (contender, median) in enumerate(medians.items()):
            mark = {"chosen": "> ", "forced": "+ "}.get(infos[key, contender]["fastapd"], "  ")
            line = [*(key if i == 0 else ("", "")), mark + contender, _time(median)]
            line += [_ratio(upstream, median), _ratio(torch_form, median)]
            if before:
                was = before.get(key, {})
                line.append(_ratio(_baselines(was)[0], was[contender]) if contender in was else "-")
            line.append(_memory(infos[key, contender].get("peak_bytes")))
            lines.append(line)
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    write = terminalreporter.write_line
    terminalreporter.section(f"{_quantity(config)}, float32")
    write("median of the rounds; 'vs' is how many times faster than the research code's formulation (upstream) and")
    write("than the fastest plain torch form; peak is what torch's allocator held at most beyond the inputs.")
    write("> is what fastapd chooses by itself, + another of its backends, forced.")
    if before:
        write(f"before: vs upstream in {before_name}")
    for line in [header, *lines]:
        if line[0]:
            write("")
        cells = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        write("  ".join(cells).rstrip())
    if saved:
        write("")
        write(f"wrote bench/results/{saved.name}")
