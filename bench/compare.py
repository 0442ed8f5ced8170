"""Which ratios got worse from one run to another.

    python bench/compare.py OLD.json NEW.json [--threshold 0.15]

Compared is how many times faster fastapd is than the research code's formulation and than the strongest plain torch
form, each within its own run, so that a slower clock or machine does not matter. Exits with 1 if a ratio fell by more
than the threshold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a file: the folder above is not on the path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import results

THRESHOLD = 0.15
"""What a ratio varies by between two runs on a shared machine."""

NAMES = {"upstream": "research formulation", "torch": "strongest torch form"}


class Change(NamedTuple):
    key: results.Key
    against: str
    before: float
    after: float

    @property
    def factor(self) -> float:
        return self.after / self.before

    def __str__(self) -> str:
        group, direction = self.key
        ratio = f"{self.before:.3g}x -> {self.after:.3g}x the {NAMES[self.against]}"
        return f"{group} {direction}: {ratio} ({self.factor - 1:+.0%})"


def changes(old: results.Table, new: results.Table) -> list[Change]:
    """Every ratio that both runs have, the one that fell most first."""
    before, after = results.ratios(old), results.ratios(new)
    both = [Change(*key, before[key], after[key]) for key in before.keys() & after.keys()]
    return sorted(both, key=lambda change: (change.factor, change.key, change.against))


def worse(found: list[Change], threshold: float = THRESHOLD) -> list[Change]:
    """Those that fell by more than the threshold."""
    return [change for change in found if change.factor < 1 - threshold]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="what counts as worse (default 0.15)")
    options = parser.parse_args(argv)
    tables = [results.table(results.rows(results.load(path))) for path in (options.old, options.new)]
    found = changes(*tables)
    fell = worse(found, options.threshold)
    for change in fell:
        print(f"worse: {change}")
    for change in reversed(found):
        if change.factor > 1 / (1 - options.threshold):
            print(f"better: {change}")
    only = {"OLD": tables[0].keys() - tables[1].keys(), "NEW": tables[1].keys() - tables[0].keys()}
    for name, keys in only.items():
        if keys:
            print(f"only in {name}: {', '.join(sorted(' '.join(key) for key in keys))}")
    print(f"{len(fell)} of {len(found)} ratios fell by more than {options.threshold:.0%}")
    return 1 if fell else 0


if __name__ == "__main__":
    sys.exit(main())
