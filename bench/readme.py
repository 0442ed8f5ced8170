"""Writes the README's tables from committed results, so that no figure there is typed by hand.

    python bench/readme.py                          rewrites the tables from bench/results
    python bench/readme.py --demo RUN [RUN ...]     first keeps the outcome of demo runs as bench/results/demo.json
    python bench/readme.py --check                  only says whether the tables are those of bench/results

A test holds the README against what this prints.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder above is not on the path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import goals, results, tables
from bench._gpu import goals as gpu_goals

ROOT = Path(__file__).parent.parent


STEPS = {
    "step/tms_5-2_b256": "TMS 5-2, 12 instances, batch 256 (the demo)",
    "step/tms_5-2_b2048": "TMS 5-2, 12 instances, batch 2048",
    "step/tms_40-10_b2048": "TMS 40-10, 3 instances, C 50, batch 2048",
    "step/resid_b256": "residual MLP, 1 layer, C 130, rank 50, batch 256",
    "step/resid_b2048": "residual MLP, 1 layer, C 130, rank 50, batch 2048",
    "step/resid_m4_b256": "residual MLP, 1 layer, C 130, rank 4, batch 256",
    "step/resid2_b2048": "residual MLP, 2 layers, C 200, rank 25, batch 2048",
}


def _machine(found: dict[str, Any], path: Path) -> list[str]:
    machine = found["machine_info"]
    return [
        f"CPU time of one thread, {machine['dtype']}, {machine['cpu']['brand_raw']}, torch {machine['torch']};",
        "ratios within one run, on the same inputs. The research formulation is our rewriting of what the APD",
        f"repository computes (`bench/upstream.py`). From `bench/results/{path.name}`.",
    ]


def bench_table() -> str:
    """Whole training steps beside the research code's formulation and plain torch."""
    path = results.latest()
    assert path is not None, "results are committed"
    found = results.load(path)
    table = results.table(results.rows(found))
    rows, near = [], {n.group: n for n in goals.faithfulness_of_upstream(table)}
    for group, name in STEPS.items():
        contenders = table.get((group, "step"), {})
        mine, theirs, plain = (
            results.ours(contenders),
            *(results.baseline(contenders, n) for n in ("upstream", "torch")),
        )
        if mine is None or plain is None:
            continue
        times = [results.seconds(row.median) if row else "-" for row in (theirs, plain, mine)]
        against = f"{theirs.median / mine.median:.1f}x" if theirs else "-"
        rows.append(f"| {name} | {' | '.join(times)} | {against} | {plain.median / mine.median:.2f}x |")
    lines = [
        "| whole training step | research formulation | strongest plain torch | fastapd | against the research "
        "formulation | against plain torch |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *_machine(found, path),
        "Agreement of losses, attributions, masks and gradients is asserted first. Plain torch is the fastest",
        "formulation we know, written by hand for each model.",
    ]
    if near:
        low, high = min(n.ratio for n in near.values()), max(n.ratio for n in near.values())
        lines += [
            f"The APD repository's own code, run beside it: our rewriting takes {low:.2f} to {high:.2f} of its time."
        ]
    return "\n".join(lines)


def goals_table() -> str:
    """Every goal of the CPU path and how it came out, for results that have been held against them."""
    path = results.latest()
    assert path is not None, "results are committed"
    found = results.load(path)
    if "constants" not in found["machine_info"]:
        return "The kept results are older than the goals."
    table = results.table(results.rows(found))
    lines = [[*line[:4], line[4] or "-"] for line in tables.goal_lines(table)]
    shown = [
        "| what | against | goal | measured | |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(l)} |" for l in lines),
    ]
    return "\n".join([*shown, "", *_machine(found, path)])


NO_GPU = "No GPU figure has been measured yet; `make gpu`, on a machine with CUDA, measures all of them."

GPU_STEPS = {
    **STEPS,
    "step/s2_b512": "MLP, 4 layers of 512, C 2000, rank 4, batch 512",
    "step/s2_b4096": "MLP, 4 layers of 512, C 2000, rank 4, batch 4096",
}


def _step_cells(known: gpu_goals.Group) -> list[str] | None:
    """The times of a step's contenders and the ratios of ours, in its better way; None if ours was not measured."""
    name = known.ours()
    mine = known.seconds(name) if name else None
    if name is None or mine is None:
        return None
    research, torch = known.eager.get("upstream"), known.best(known.torch())
    eager, captured = known.eager.get(name), known.captured.get(name)
    times = [row.median if row else None for row in (research, eager, captured)]
    times.insert(1, torch)
    cells = [results.seconds(t) if t is not None else "-" for t in times]
    ratios = [t / mine if t is not None else None for t in (times[0], torch)]
    return [*cells, *(f"{ratio:.1f}x" if ratio is not None else "-" for ratio in ratios)]


def gpu_table() -> str:
    """Training steps and goals on a card, or that nothing was measured there."""
    path = results.latest(device="cuda")
    if path is None:
        return NO_GPU
    found = results.load(path)
    machine, table = found["machine_info"], results.table(results.rows(found))
    rows = []
    for group, what in GPU_STEPS.items():
        known = gpu_goals.Group(table.get((group, "step"), {}), table.get((group, "step captured"), {}), {})
        if (cells := _step_cells(known)) is not None:
            rows.append(f"| {what} | {' | '.join(cells)} |")
    gpu, constants = machine["gpu"], machine["constants"]
    goal_lines = gpu_goals.lines(gpu_goals.outcomes(table, constants, gpu["name"]))
    checked = sum(row["checked"] for row in found["equivalence"])
    failed = len(found["failures"])
    left_out = len(found["left_out"])
    lines = [
        "| whole training step | research formulation | strongest plain torch | fastapd | as a CUDA graph | against "
        "the research formulation | against plain torch |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "| what | against | goal | measured | |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(line)} |" for line in goal_lines),
        "",
        f"Median times by CUDA events, {machine['dtype']} ({machine['precision']}), {gpu['name']}, torch "
        f"{machine['torch']}, triton {machine['triton']};",
        f"{checked} checks of equivalence, {failed} failures, {left_out} pieces left out. From "
        f"`bench/results/{path.name}`.",
    ]
    return "\n".join(lines)


def demo_table() -> str:
    """What the demo ended with, and how often it recovered."""
    demo = json.loads((results.RESULTS / "demo.json").read_text())
    first = demo["runs"][0]
    widths = [max(len(str(r[i])) for r in [first["columns"], *first["rows"]]) for i in range(len(first["columns"]))]

    def line(cells: list[str]) -> str:
        head, *rest = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join([head, *rest]).rstrip()

    rates = ", ".join(f"{run['recovered']} of {run['n']} (seed {run['seed']})" for run in demo["runs"])
    threads = f"{demo['threads']} thread{'s' if demo['threads'] > 1 else ''}"
    seconds = "/".join(f"{run['seconds']:.0f}" for run in demo["runs"])
    return "\n".join(
        [
            "```",
            *(line(row) for row in [first["columns"], *first["rows"]]),
            "",
            f"recovered {first['recovered']} of {first['n']} instances",
            "```",
            "",
            f"Recovered {rates}, in {seconds} s on {demo['machine']} ({threads}, float32, torch {demo['torch']}).",
        ]
    )


def collect_demo(runs: list[Path]) -> None:
    """Keeps the tables of demo runs, and the machine they ran on."""
    kept: list[dict[str, Any]] = []
    environment: dict[str, Any] = {}
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        environment = json.loads((run / "env.json").read_text())
        kept.append({key: result[key] for key in ("seed", "recovered", "n", "seconds", "columns", "rows")})
    kept.sort(key=lambda run: run["seed"])
    out = {
        "machine": environment["cpu"],
        "threads": environment["torch_threads"],
        "torch": environment["torch"],
        "fastapd": environment["fastapd"],
        "runs": kept,
    }
    (results.RESULTS / "demo.json").write_text(json.dumps(out, indent=1) + "\n")


def render(text: str) -> str:
    """The README with its tables filled in."""
    filled = {"demo": demo_table(), "bench": bench_table(), "goals": goals_table(), "gpu": gpu_table()}
    for name, table in filled.items():
        text = re.sub(
            rf"<!-- {name} -->.*?<!-- /{name} -->",
            lambda _, name=name, table=table: f"<!-- {name} -->\n{table}\n<!-- /{name} -->",
            text,
            flags=re.DOTALL,
        )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", nargs="+", type=Path, metavar="RUN", help="run directories of `fastapd demo`")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is another one")
    options = parser.parse_args()
    if options.demo:
        collect_demo(options.demo)
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if not options.check:
        readme.write_text(after)
    elif after != before:
        print("the tables of README.md are not those of bench/results: run python bench/readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
