"""The research code's `optimize` against itself under `fastapd.compat.apd.patch()`, in one run on one thread.

    FASTAPD_APD_REPO=<checkout of ApolloResearch/apd> python bench/drop_in.py [case ...] [--steps N] [--save]

`--save` keeps the figures in `bench/results/drop_in.json` and writes them into the table of `docs/drop-in.md`.

Both start from the same models and seed, and what they print at the first and the last step is asserted to agree before
a ratio is printed. A step is the CPU time between two batches that the loop asks for; the median leaves out the first
step, which plans, and those that print. Steps that print cost more under the patch, as only they run all components.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from bench import apd


@dataclass(frozen=True)
class Run:
    """A published setting: the sizes, what is optimised, and the goal of the ratio."""

    kind: str
    goal: float
    batch: int
    config: dict[str, Any]
    m: int | None = None


_RESIDUAL = {
    "C": 130, "topk": 1.28, "topk_recon_coeff": 1.0, "act_recon_coeff": 1.0, "schatten_coeff": 10.0,
    "schatten_pnorm": 0.9, "lr": 1e-3, "lr_warmup_pct": 0.01, "lr_schedule": "cosine", "unit_norm_matrices": True,
}  # fmt: skip
RUNS = {
    "tms_40-10": Run("tms", 12, 2048, {
        "C": 40, "topk": 2.0, "topk_recon_coeff": 10.0, "schatten_coeff": 15.0, "schatten_pnorm": 0.9, "lr": 1e-3,
        "lr_schedule": "cosine",
    }),
    "resid_m50": Run("residual_mlp", 12, 256, _RESIDUAL),
    "resid_m4": Run("residual_mlp", 40, 256, _RESIDUAL, m=4),
}  # fmt: skip
"""The configurations that the research code's repository holds, and its residual MLP with components of rank 4."""


def _pair(modules: dict[str, Any], run: Run) -> tuple[Any, Any, list[str]]:
    """(component model, target, names of the decomposed layers), initialised as the research code does."""
    torch.manual_seed(0)
    if run.kind == "tms":
        models = modules["experiments.tms.models"]
        sizes = {"n_instances": 3, "n_features": 40, "n_hidden": 10, "n_hidden_layers": 0, "device": "cpu"}
        target = models.TMSModel(models.TMSModelConfig(**sizes))
        model = models.TMSSPDModel(models.TMSSPDModelConfig(**sizes, C=run.config["C"], m=run.m, bias_val=0.0))
        model.b_final.requires_grad = False
        return model, target, ["linear1", "linear2"]
    models = modules["experiments.resid_mlp.models"]
    sizes = {
        "n_instances": 1, "n_features": 100, "d_embed": 1000, "d_mlp": 50, "n_layers": 1, "act_fn_name": "relu",
        "apply_output_act_fn": False, "in_bias": False, "out_bias": False,
    }  # fmt: skip
    target = models.ResidualMLPModel(models.ResidualMLPConfig(**sizes))
    target.W_E.data /= target.W_E.data.norm(dim=-1, keepdim=True)
    target.W_U.data.copy_(target.W_E.data.mT)
    model = models.ResidualMLPSPDModel(models.ResidualMLPSPDConfig(**sizes, init_scale=2.0, C=run.config["C"], m=run.m))
    for name in ("W_E", "W_U"):
        model.get_parameter(name).data.copy_(target.get_parameter(name).data)
        model.get_parameter(name).requires_grad = False
    return model, target, ["layers.0.mlp_in", "layers.0.mlp_out"]


class _Clock:
    """Batches of a run, and when they were asked for."""

    def __init__(self, run: Run) -> None:
        self.run, self.times = run, []
        sizes = (run.batch, 3, 40) if run.kind == "tms" else (run.batch, 1, 100)
        self.sizes, self.probability = sizes, 0.05 if run.kind == "tms" else 0.01
        self.low = 0.0 if run.kind == "tms" else -1.0

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        while True:
            self.times.append(time.process_time())
            x = torch.rand(self.sizes, generator=generator) * (1 - self.low) + self.low
            yield x * (torch.rand(self.sizes, generator=generator) < self.probability), None

    def step_seconds(self) -> float:
        """Of the median step; what follows the last request is not a step."""
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return statistics.median(steps[1:])


class _Lines:
    """What stands for tqdm: no bar, and lines that are kept."""

    kept: list[str] = []  # noqa: RUF012

    def __init__(self, items: Any, **_: Any) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)

    @classmethod
    def write(cls, line: str) -> None:
        cls.kept.append(line)


def _time(modules: dict[str, Any], run: Run, pair: tuple[Any, Any, list[str]], steps: int) -> tuple[float, list[str]]:
    model, target, names = copy.deepcopy(pair)
    task = {"task_name": run.kind, "feature_probability": 0.05, "pretrained_model_path": "wandb:none"}
    task |= {"train_bias": False, "bias_val": 0.0} if run.kind == "tms" else {}
    config = modules["run_spd"].Config(
        batch_size=run.batch, steps=steps, print_freq=steps, m=run.m, task_config=task, **run.config
    )
    clock = _Clock(run)
    _Lines.kept = []
    modules["run_spd"].tqdm = _Lines
    modules["run_spd"].optimize(model, config, "cpu", clock, target, names)
    return clock.step_seconds(), _Lines.kept


def _numbers(lines: list[str]) -> list[float]:
    return [float(n) for line in lines for n in re.findall(r"-?\d+\.\d+(?:e[-+]?\d+)?", line)]


RESULTS, GUIDE = (Path(__file__).parent.parent / name for name in ("bench/results/drop_in.json", "docs/drop-in.md"))
TITLES = {
    "tms_40-10": "TMS 40-10, n 3, C 40, batch 2048",
    "resid_m50": "residual MLP, 1 layer, C 130, m 50, batch 256",
    "resid_m4": "the same, m 4",
}


def table(kept: dict[str, Any]) -> str:
    """What the guide says of kept results."""
    lines = [
        f"On one thread of an {kept['machine']} (float32, torch {kept['torch']}), in CPU time of the median step:",
        "",
    ]
    lines += ["| setting | research code | patched | ratio | goal |", "|---|---|---|---|---|"]
    for name, row in kept["rows"].items():
        theirs, ours = row["research_code_ms"], row["patched_ms"]
        lines.append(f"| {TITLES[name]} | {theirs:.0f} ms | {ours:.3g} ms | {theirs / ours:.3g}x | {row['goal']:g}x |")
    return "\n".join(lines)


def guide(text: str, kept: dict[str, Any]) -> str:
    """The guide's text with the table of these results."""
    begin, end = "<!-- speed -->\n", "\n<!-- /speed -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{table(kept)}{end}{rest.partition(end)[2]}"


def save(rows: dict[str, Any]) -> None:
    from fastapd._rundir import environment

    found = environment()
    kept = {"machine": found["cpu"], "threads": 1, "torch": torch.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    GUIDE.write_text(guide(GUIDE.read_text(), kept))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(RUNS)}; all without one")
    parser.add_argument("--steps", type=int, default=6, help="steps of the research code; fastapd takes as many")
    parser.add_argument(
        "--save", action="store_true", help="keep the figures, of all cases, and write them into the guide"
    )
    arguments = parser.parse_args()
    if arguments.save and arguments.cases:
        parser.error("--save keeps all cases; name none")
    if unknown := set(arguments.cases) - RUNS.keys():
        parser.error(f"cases must be of {', '.join(RUNS)}, got {', '.join(sorted(unknown))}")
    if (reason := apd.why_not()) is not None:
        print(f"drop_in: nothing was run: {reason}")
        return 0
    from fastapd.compat import apd as compat

    torch.set_num_threads(1)
    modules = apd._modules()
    rows: dict[str, Any] = {}
    print(f"{'case':12} {'research code':>14} {'patched':>10} {'ratio':>8} {'goal':>6}   losses apart")
    for name in arguments.cases or RUNS:
        run = RUNS[name]
        pair = _pair(modules, run)
        theirs, their_lines = _time(modules, run, pair, arguments.steps)
        with compat.patch():
            ours, our_lines = _time(modules, run, pair, arguments.steps)
        a, b = _numbers(our_lines), _numbers(their_lines)
        assert len(a) == len(b) > 0, "both print the same terms"
        apart = max(abs(x - y) / max(abs(y), 1e-12) for x, y in zip(a, b, strict=True))
        assert apart < 1e-4, f"{name}: losses are {apart:.1e} apart"
        ratio = f"{theirs / ours:.1f}x"
        rows[name] = {"research_code_ms": theirs * 1e3, "patched_ms": ours * 1e3, "goal": run.goal, "apart": apart}
        print(f"{name:12} {theirs * 1e3:11.0f} ms {ours * 1e3:7.1f} ms {ratio:>8} {run.goal:5.0f}x   {apart:.0e}")
    if arguments.save:
        save(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
