"""Writes the README's tables from committed results, so that no figure there is typed by hand.

    python bench/readme.py                          rewrites the tables from bench/results
    python bench/readme.py --demo RUN [RUN ...]     first keeps the outcome of demo runs as bench/results/demo.json

A test holds the README against what this prints.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"

STEPS = {
    "step/tms_5-2_b256": "TMS 5-2, 12 instances, batch 256 (the demo)",
    "step/tms_5-2_b2048": "TMS 5-2, 12 instances, batch 2048",
    "step/tms_40-10_b2048": "TMS 40-10, 3 instances, C 50, batch 2048",
}


def latest() -> Path:
    """The newest results of pytest-benchmark, by the date and time inside."""
    found = [(json.loads(path.read_text())["datetime"], path) for path in RESULTS.glob("20*.json")]
    return max(found)[1]


def bench_table() -> str:
    """Whole training steps beside the research code's formulation and plain torch."""
    path = latest()
    results = json.loads(path.read_text())
    medians: dict[str, dict[str, float]] = {}
    for b in results["benchmarks"]:
        medians.setdefault(b["group"], {})[b["extra_info"]["contender"]] = b["stats"]["median"]
    machine = results["machine_info"]
    rows = []
    for group, name in STEPS.items():
        times = medians[group]
        plain = min(t for contender, t in times.items() if contender.startswith("torch"))
        ours = times["fastapd"]
        cells = (f"{t:.2f} s" if t >= 1 else f"{1e3 * t:.3g} ms" for t in (times["upstream"], plain, ours))
        rows.append(f"| {name} | {' | '.join(cells)} | {times['upstream'] / ours:.1f}x | {plain / ours:.2f}x |")
    return "\n".join(
        [
            "| whole training step | research formulation | strongest plain torch | fastapd | against the research "
            "formulation | against plain torch |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"CPU time of one thread, {machine['dtype']}, {machine['cpu']['brand_raw']}, torch {machine['torch']};",
            "same inputs, agreement of losses, masks and gradients asserted first. The research formulation is our",
            "rewriting of what the APD repository computes; plain torch is the fastest formulation we know, written by",
            "hand for this model, with tangents in place of output gradients: fastapd does not have that form yet.",
            f"From `bench/results/{path.name}`, where every operation stands too.",
        ]
    )


def demo_table() -> str:
    """What the demo ended with, and how often it recovered."""
    demo = json.loads((RESULTS / "demo.json").read_text())
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
    (RESULTS / "demo.json").write_text(json.dumps(out, indent=1) + "\n")


def render(text: str) -> str:
    """The README with its tables filled in."""
    for name, table in (("demo", demo_table()), ("bench", bench_table())):
        text = re.sub(
            rf"<!-- {name} -->.*?<!-- /{name} -->",
            lambda _, name=name, table=table: f"<!-- {name} -->\n{table}\n<!-- /{name} -->",
            text,
            flags=re.DOTALL,
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", nargs="+", type=Path, metavar="RUN", help="run directories of `fastapd demo`")
    options = parser.parse_args()
    if options.demo:
        collect_demo(options.demo)
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))


if __name__ == "__main__":
    main()
