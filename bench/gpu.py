"""Everything that needs a GPU, in one command: build, equivalence, determinism, graph capture, and speed.

    python bench/gpu.py                     all of it, in at most 9 minutes; what there was no time for is listed
    python bench/gpu.py --resume FILE.json  what an earlier run of the same commit on the same card left out
    python bench/gpu.py --only timing/step  pieces whose names begin like this, or match a pattern; several by commas
    python bench/gpu.py --quick             a few sizes and repeats
    python bench/gpu.py --rehearse          every path of all this on a CPU, where no figure means anything

It works from a bare checkout with torch, numpy, triton and pytest alone and installs nothing. Results go to
`bench/results/<date>-<commit>-<card>.json`, from which `bench/readme.py` makes the README's table; those of quick runs
and rehearsals go to `build/gpu`. The exit status is 1 if a check failed, and of what failed no speed is measured.
Without a CUDA device it says so and does nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder above is not on the path, and this one had better not be
    sys.path[:] = [str(Path(__file__).parent.parent), *(p for p in sys.path if Path(p) != Path(__file__).parent)]

from bench import results
from bench._gpu import parent, report, tree
from bench._gpu.items import Item, matches, plan
from bench._gpu.parent import Clock, Options, Team

ROOT = Path(__file__).parent.parent
CHECKS = ("equivalence", "determinism", "capture")
CHECKS_SHARE = 0.5
"""Of all seconds, after which no more checks are begun if something is to be timed as well."""

BUILD_SECONDS = 150.0


def say(text: str = "") -> None:
    print(text, flush=True)


def why_no_card() -> str | None:
    """Why nothing can be measured here, None if something can."""
    try:
        import torch
    except ImportError:
        return f"torch is not installed for {Path(sys.executable).name}"
    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} finds no CUDA device"


class Run:
    """One run of the command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.quick = options.quick
        self.clock = Clock(options.seconds)
        self.report = report.Report(options.rehearse, options.quick, tree.commit(options.commit))
        self.path: Path | None = None
        self._begun: dict[str, float] = {}

    # ---------------------------------------------------------------------------------------------------------- pieces

    def _stamp(self) -> str:
        minutes, seconds = divmod(self.clock.elapsed(), 60)
        return f"{int(minutes)}:{seconds:04.1f}"

    def _begin(self, item: Item) -> None:
        self._begun[item.name] = time.monotonic()
        say(f"{self._stamp()}  ...   {item.name}")

    def _end(self, item: Item, result: dict[str, Any]) -> None:
        seconds = time.monotonic() - self._begun[item.name] if item.name in self._begun else 0.0
        status = self.report.add(item, result, seconds)
        mark = {"done": "ok ", "failed": "RED", "left out": " - "}[status]
        if item.name in self._begun:  # the others are listed at the end
            say(f"{self._stamp()}  {mark}   {item.name}  {seconds:.1f} s  {report.verdict(item, result, status)}")
        if item.section == "timing":
            for line in report.timing_lines(result.get("rows", []), result.get("notes", [])):
                say(line)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self.report.write(self.path, self.clock.elapsed())

    def _arguments(self, item: Item) -> dict[str, Any]:
        arguments = dict(item.arguments)
        if item.section == "equivalence" or item.section == "determinism":
            arguments |= {"quick": self.quick, "seconds": item.soft_seconds}
        if item.section == "timing":
            known = {"constants": self.report.constants, "l2_bytes": self.report.l2_bytes, "red": self.report.red}
            arguments |= {"given": {**known, "quick": self.quick}, "seconds": item.soft_seconds}
        return arguments

    # -------------------------------------------------------------------------------------------------------- sections

    def build(self) -> None:
        """Without it the kernels of Triton can be measured all the same."""
        item = Item("build", "", {}, 10.0)
        if self.clock.left() < item.seconds:
            self._end(item, {"left_out": "no time left"})
            return
        self._begin(item)
        self._end(item, tree.build(self.options.rehearse, min(BUILD_SECONDS, self.clock.left())))

    def work(self) -> None:
        """Everything there is time for."""
        options = self.options
        patterns = [p.strip() for p in options.only.split(",") if p.strip()]
        if matches("build", patterns):
            self.build()
        given = Options(options.seconds, options.rehearse, options.workers, options.plant)
        with Team(1, given, self.clock, checks=options.rehearse) as alone:
            if self.clock.left() < 1:
                say("no time is left to start anything")
                self._name()
                self._leave_out([], patterns)
                return
            first = alone.first()
            self.report.facts(first["facts"])
            self._introduce(first["facts"])
            skip = self._resume()
            items = [item for item in plan(first["ops"], self.quick) if item.name not in skip]
            wanted = [item for item in items if matches(item.name, patterns)]
            timed = [item for item in wanted if item.section == "timing"]
            checked = [item for item in wanted if item.section in CHECKS]
            constants = [item for item in items if item.section == "constants" and (timed or item in wanted)]
            self._name()
            alone.work(constants, self._arguments, self._end, self._begin)
            share = CHECKS_SHARE if timed else 1.0
            if options.rehearse:
                alone.work(checked, self._arguments, self._end, self._begin, share)
            elif checked:
                with Team(parent.n_workers(given), given, self.clock, checks=True) as several:
                    several.work(checked, self._arguments, self._end, self._begin, share)
            if timed and not self.report.constants:
                for item in timed:
                    self._end(item, {"left_out": "the card's constants are not known"})
            else:
                say(report.TABLE_TEXT if timed else "")
                alone.work(timed, self._arguments, self._end, self._begin)

    def _leave_out(self, ops: list[str], patterns: list[str]) -> None:
        for item in plan(ops, self.quick):
            if matches(item.name, patterns):
                self._end(item, {"left_out": "no time left"})

    def _introduce(self, facts: dict[str, Any]) -> None:
        gpu = facts["gpu"]
        say(f"{self._stamp()}  ok    environment  {gpu['name']}, torch {facts['torch']}, triton {facts['triton']}")
        details = {k: v for k, v in gpu.items() if k != "name"} | {k: facts[k] for k in ("python_version", "cpu")}
        say("          " + ", ".join(f"{key} {value}" for key, value in details.items()))

    def _resume(self) -> list[str]:
        if self.options.resume is None:
            return []
        names = self.report.resume(results.load(self.options.resume))
        say(f"{self._stamp()}  ok    resume  {len(names)} pieces were done before")
        return names

    def _name(self) -> None:
        """Where results go: a file, or a folder in which they get a name of their own."""
        out: Path | None = self.options.out
        if out is None:  # what is kept and shown is a whole run
            out = ROOT / "build" / "gpu" if self.options.rehearse or self.quick else results.RESULTS
        self.path = out if out.suffix == ".json" else out / self.report.default_name()

    def conclude(self) -> int:
        """The end of what is printed, and the exit status."""
        document = self.report.document
        if not self.options.rehearse:
            document["machine_info"]["gpu_after"] = tree.smi()  # clocks and temperature, to see whether they held
        if document["benchmarks"]:
            say()
            for line in report.goal_lines(self.report.outcomes()):
                say(line)
        for left_out in document["left_out"]:
            say(f"left out: {left_out['name']}: {left_out['why']}")
        for failure in document["failures"]:
            say(f"FAILED: {failure['item']}: {failure['message']}")
        self._write()
        done = [item for item in document["items"] if item["status"] == "done"]
        say()
        say(
            f"{len(done)} pieces done, {len(document['left_out'])} left out, {len(document['failures'])} failures, "
            f"{self.clock.elapsed():.0f} s"
        )
        if self.options.rehearse:
            say("this was a rehearsal: no figure in it means anything")
        if self.path is not None:
            say(f"wrote {self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path}")
        return 1 if document["failures"] else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540.0, help="when to be done (default 540)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="names of pieces, or how they begin, by commas")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where results go; a folder names them itself")
    parser.add_argument("--resume", type=Path, metavar="FILE.json", help="keep what this run did, and do the rest")
    parser.add_argument("--quick", action="store_true", help="a few sizes and repeats")
    parser.add_argument("--workers", type=int, default=0, help="processes that check at the same time")
    parser.add_argument("--commit", help="of the checkout, where there is no git")
    parser.add_argument("--rehearse", action="store_true", help="go through everything on the CPU")
    parser.add_argument("--plant", default="", metavar="OP", help="make an op wrong, to see that it is found")
    options = parser.parse_args(argv)
    if options.plant and not options.rehearse:
        parser.error("--plant is for rehearsals")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FASTAPD_PRECISION": "tf32x3"}
        os.environ.pop("FASTAPD_BACKEND", None)
    elif (reason := why_no_card()) is not None:
        say(f"gpu: {reason}, so nothing was measured; `python bench/gpu.py --rehearse` goes through it all on the CPU.")
        return 1 if shutil.which("nvidia-smi") and "not installed" in reason else 0
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    run = Run(options)
    try:
        run.work()
    except KeyboardInterrupt:
        say("stopped by the user")
    except (RuntimeError, ValueError) as error:
        say(f"gpu: {error}")
        run.report.document["failures"].append({"item": "gpu", "message": str(error)})
    return run.conclude()


if __name__ == "__main__":
    sys.exit(main())
