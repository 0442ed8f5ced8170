"""Kept results: pytest-benchmark's JSON as rows, grouped by what competes. Only the standard library."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).with_name("results")

Key = tuple[str, str]
"""Group and direction: "<op>/<case>", and "forward", "forward_backward", "step", .."""


class Row(NamedTuple):
    """One contender of one key."""

    group: str
    direction: str
    contender: str
    median: float
    info: dict[str, Any]


Table = dict[Key, dict[str, Row]]
"""The contenders of every key by name, in the order they ran."""


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def rows(results: dict[str, Any]) -> list[Row]:
    """Of one file."""
    return [
        Row(
            b["group"],
            b["extra_info"]["direction"],
            b["extra_info"]["contender"],
            b["stats"]["median"],
            b["extra_info"],
        )
        for b in results["benchmarks"]
    ]


def table(found: Iterable[Row]) -> Table:
    out: Table = {}
    for row in found:
        out.setdefault((row.group, row.direction), {})[row.contender] = row
    return out


def latest(but: Path | None = None, device: str = "cpu") -> Path | None:
    """The newest kept results of a kind of device by the date and time inside, other than `but`.

    Raises:
        ValueError: If there are results of a rehearsal among them, which mean nothing.
    """
    found = []
    for path in RESULTS.glob("20*.json"):
        kept = load(path)
        if kept.get("rehearsal"):
            raise ValueError(f"results: {path.name} must be of a run on a card, got a rehearsal; remove it")
        if path != but and kept["machine_info"].get("device", "cpu") == device:
            found.append((kept["datetime"], path))
    return max(found)[1] if found else None


def rounded(value: Any) -> Any:
    """Numbers with six digits, in whatever holds them."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def ours(contenders: dict[str, Row]) -> Row | None:
    """What fastapd chooses by itself."""
    return next((row for row in contenders.values() if row.info.get("fastapd") == "chosen"), None)


def strongest_torch(contenders: dict[str, Row]) -> Row | None:
    """The fastest of the plain torch forms, compiled ones and library routines among them."""
    forms = [row for name, row in contenders.items() if name.startswith("torch")]
    return min(forms, key=lambda row: row.median, default=None)


def baseline(contenders: dict[str, Row], name: str) -> Row | None:
    """A contender by name; "torch" stands for the strongest of its forms."""
    return strongest_torch(contenders) if name == "torch" else contenders.get(name)


def ratios(found: Table) -> dict[tuple[Key, str], float]:
    """How many times faster fastapd is than the research formulation ("upstream") and the strongest torch form."""
    out = {}
    for key, contenders in found.items():
        mine = ours(contenders)
        for name in ("upstream", "torch"):
            theirs = baseline(contenders, name)
            if mine is not None and theirs is not None:
                out[key, name] = theirs.median / mine.median
    return out


# ------------------------------------------------------------------------------------------------------------ in words


def seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def memory(n_bytes: float | None) -> str:
    if n_bytes is None:
        return "-"
    for unit, size in (("GiB", 30), ("MiB", 20)):
        if n_bytes >= 2**size:
            return f"{n_bytes / 2**size:.3g} {unit}"
    return f"{n_bytes / 2**10:.3g} KiB"


def aligned(lines: list[list[str]], left: int) -> list[str]:
    """Columns of equal width, the first `left` of them flush left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = [
        [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return ["  ".join(line).rstrip() for line in cells]
