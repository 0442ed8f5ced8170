"""The goals of the CPU path, each with how it is computed from a run: one thread, float32, ratios within one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bench import results
from bench.results import Row, Table

RESEARCH, TORCH = "research formulation", "strongest torch form"
FAITHFUL = 0.15
"""How far the research code's time may be from its formulation in our words."""

Contenders = dict[str, Row]
Measure = Callable[[Contenders], float | None]
"""A number of one group and direction, None if it was not measured."""


def times_faster(than: str, contender: str | None = None) -> Measure:
    """The time of a baseline over ours."""

    def measure(found: Contenders) -> float | None:
        mine = results.ours(found) if contender is None else found.get(contender)
        theirs = results.baseline(found, than)
        return None if mine is None or theirs is None else theirs.median / mine.median

    return measure


def times_less_memory(found: Contenders) -> float | None:
    """Peak memory of the research formulation over ours: by torch's count or by the growth of the process, which sees
    native scratch too, whichever says less."""
    mine, theirs = results.ours(found), found.get("upstream")
    if mine is None or theirs is None:
        return None
    ways = [way for way in ("peak_bytes", "resident_bytes") if mine.info.get(way) and theirs.info.get(way)]
    return min((theirs.info[way] / mine.info[way] for way in ways), default=None)


def share_of_floor(contender: str | None = None) -> Measure:
    """The least possible time by the machine's constants over ours."""

    def measure(found: Contenders) -> float | None:
        mine = results.ours(found) if contender is None else found.get(contender)
        return None if mine is None or "floor_seconds" not in mine.info else mine.info["floor_seconds"] / mine.median

    return measure


@dataclass(frozen=True)
class Goal:
    """One row.

    Attributes:
        what: In words.
        against: What it is compared with, in words.
        least: What the number has to reach in every group.
        groups: Where it is measured.
        direction: Of the groups.
        measure: The number of one group.
        percent: Whether it is shown as a percentage.
    """

    what: str
    against: str
    least: float
    groups: tuple[str, ...]
    direction: str
    measure: Measure
    percent: bool = False

    def show(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.3g}x"


def _step(what: str, least: float, case: str) -> Goal:
    return Goal(f"step {what}", RESEARCH, least, (f"step/{case}",), "step", times_faster("upstream"))


def _memory(what: str, least: float, case: str) -> Goal:
    return Goal(f"step {what}: peak memory", RESEARCH, least, (f"step/{case}",), "step", times_less_memory)


def _attribution(what: str, least: float, cases: tuple[str, ...], direction: str = "forward") -> list[Goal]:
    groups = tuple(f"gradient_attributions/{case}" for case in cases)
    return [
        Goal(f"attribution, {what}", RESEARCH, least, groups, direction, times_faster("upstream")),
        Goal(f"attribution, {what}", TORCH, 1.5, groups, direction, times_faster("torch")),
    ]


def _masked(what: str, least: float, cases: tuple[str, ...], than: str = "upstream", against: str = RESEARCH) -> Goal:
    groups = tuple(f"masked_forward/{case}" for case in cases)
    return Goal(f"masked forward with its index, {what}", against, least, groups, "forward", times_faster(than))


def _topk(what: str, least: float, cases: tuple[str, ...], warm: bool, than: str = "upstream") -> Goal:
    groups = tuple(f"batch_topk/{case}" for case in cases)
    measure = times_faster(than, "fastapd_warm" if warm else None)
    against = RESEARCH if than == "upstream" else "torch.topk and scatter"
    return Goal(f"top-k, {what}", against, least, groups, "forward", measure)


def _schatten(what: str, least: float, cases: tuple[str, ...]) -> Goal:
    groups = tuple(f"schatten/{case}" for case in cases)
    measure = times_faster("torch_svdvals", "fastapd_step")
    return Goal(
        f"exact Schatten of a step, {what}", "svdvals of the products", least, groups, "forward_backward", measure
    )


def _faithfulness(what: str, least: float, cases: tuple[str, ...], than: str, against: str, percent: bool) -> Goal:
    groups = tuple(f"component_sum/{case}" for case in cases)
    measure = times_faster(than, "fastapd_step")
    return Goal(f"faithfulness of a step, {what}", against, least, groups, "forward_backward", measure, percent)


_RESIDUAL = ("resid_in_b2048", "resid_out_b2048")
_MANY = ("c1000_256x256_m4", "c10000_256x256_m1")
_LARGE = ("n82k_k4096", "n266k_k2621", "n2m_k16384", "n10m_k16384")
_TINY_SUMS = ("tms_5-2", "tms_40-10")
_SUMS = ("resid_in", "resid_out", "c1000_256x256_m4")

GOALS: tuple[Goal, ...] = (
    _step("TMS 5-2, b 2048", 10, "tms_5-2_b2048"),
    _step("TMS 40-10, b 2048", 20, "tms_40-10_b2048"),
    _step("residual 1 layer, C 130, m 50, b 2048", 35, "resid_b2048"),
    _memory("residual 1 layer, C 130, m 50, b 2048", 5, "resid_b2048"),
    _step("residual 1 layer, C 130, m 50, b 256", 15, "resid_b256"),
    _step("residual 1 layer, C 130, m 4, b 256", 60, "resid_m4_b256"),
    _step("residual 2 layers, C 200, m 25, b 2048", 40, "resid2_b2048"),
    _memory("residual 2 layers, C 200, m 25, b 2048", 8, "resid2_b2048"),
    *_attribution("residual m 50", 20, ("resid_b256",)),
    *_attribution("residual m <= 4", 100, ("resid_m4_b256", "resid_m1_b256")),
    *_attribution("3-layer MLPs", 25, ("mlp_3x128_b256", "mlp_3x256_b128")),
    *_attribution("Lp forward+backward", 12, ("mlp_3x128_c200_b256", "resid_m4_b128"), "forward_backward"),
    _masked("residual", 60, _RESIDUAL),
    _masked("TMS 40-10", 10, ("tms_40-10",)),
    _masked("C >= 1000", 150, _MANY),
    _masked("C/k >= 100", 10, (*_RESIDUAL, *_MANY), "torch_dense", "dense two-GEMM"),
    _topk("N >= 8e4, cold", 25, _LARGE, warm=False),
    _topk("N >= 8e4, warm", 35, _LARGE, warm=True),
    _topk("N = 1e4", 5, ("n10k_k432",), warm=False, than="torch_scatter"),
    Goal(
        "top-k, warm", "two reads of the scores", 0.75, tuple(f"batch_topk/{c}" for c in ("n10k_k432", *_LARGE)),
        "forward", share_of_floor("fastapd_warm"), percent=True,
    ),
    _schatten("m <= 4, d >= 64", 400, ("c1000_64x64_m4", "c1000_256x256_m4")),
    _schatten("m 8, d >= 64", 120, ("c1000_64x64_m8", "c1000_256x256_m8")),
    _schatten("m 16, d >= 256", 300, ("c256_256x256_m16",)),
    _schatten("full rank, m 50", 3, ("c130_1000x50_m50",)),
    _faithfulness("all sizes", 1, (*_TINY_SUMS, *_SUMS), "upstream", RESEARCH, percent=False),
    _faithfulness("TMS size", 1.5, _TINY_SUMS, "upstream", RESEARCH, percent=False),
    _faithfulness("large", 0.85, _SUMS, "gemms", "its three GEMMs", percent=True),
)  # fmt: skip


class Outcome(NamedTuple):
    """How a goal came out.

    Attributes:
        value: The worst of its groups, None if none was measured.
        group: Where that was.
        missing: Groups without a number.
        floor: The share of the machine's floor that the worst group reaches, if that is known.
        faithful: The research formulation's time there over that of the research code itself, if that ran.
    """

    goal: Goal
    value: float | None
    group: str
    missing: tuple[str, ...]
    floor: float | None
    faithful: float | None

    @property
    def counts(self) -> bool:
        """Whether the formulation it is held against takes the time of the research code, as far as that is known."""
        return self.faithful is None or self.goal.against != RESEARCH or abs(self.faithful - 1) <= FAITHFUL

    @property
    def met(self) -> bool:
        return self.value is not None and self.value >= self.goal.least and not self.missing and self.counts

    @property
    def verdict(self) -> str:
        """Met, missed and by how much, or what was not measured."""
        if self.value is None:
            return "not measured"
        if self.value < self.goal.least:
            return f"missed by {1 - self.value / self.goal.least:.0%}"
        if not self.counts:
            return f"does not count: the formulation takes {self.faithful:.2f} of the research code's time"
        return f"met where measured, not in {', '.join(self.missing)}" if self.missing else "met"


def outcome(goal: Goal, found: Table) -> Outcome:
    values = {group: goal.measure(found.get((group, goal.direction), {})) for group in goal.groups}
    known = {group: value for group, value in values.items() if value is not None}
    missing = tuple(group.split("/")[1] for group in goal.groups if group not in known)
    if not known:
        return Outcome(goal, None, "", missing, None, None)
    worst = min(known, key=lambda group: known[group])
    rows = found[worst, goal.direction]
    return Outcome(goal, known[worst], worst, missing, share_of_floor()(rows), _faithful(rows))


def outcomes(found: Table) -> list[Outcome]:
    """Every goal in a run."""
    return [outcome(goal, found) for goal in (*GOALS, *_threads(found))]


# ------------------------------------------------------------------------------------- goals whose groups a run decides

SHORT_SECONDS = 5e-3
"""A step that takes less on one thread has nothing to gain from a second."""


def _threads(found: Table) -> list[Goal]:
    """Two threads beat one on every step that takes long enough, by wall time."""
    groups = tuple(
        group
        for (group, direction), rows in found.items()
        if direction == "threads" and "one_thread" in rows and rows["one_thread"].median > SHORT_SECONDS
    )

    def measure(rows: Contenders) -> float | None:
        return rows["one_thread"].median / rows["two_threads"].median if "two_threads" in rows else None

    return [Goal("two threads, steps above 5 ms", "one thread, wall time", 1.0, groups, "threads", measure)]


LINEAR = 1.1
"""The largest exponent that the noise of a shared machine makes of linear growth."""


class Slope(NamedTuple):
    """How time grows with one size: time ~ size ** exponent, fitted over `sizes`."""

    group: str
    exponent: float
    sizes: list[int]
    seconds: list[float]

    @property
    def verdict(self) -> str:
        return "linear at most" if self.exponent <= LINEAR else "more than linear"


def slopes(found: Table) -> list[Slope]:
    """Of every group that was timed at several sizes, by least squares in logarithms."""
    out = []
    for (group, direction), rows in found.items():
        if direction != "scaling" or len(rows) < 2:
            continue
        points = sorted((row.info["size"], row.median) for row in rows.values())
        x = [math.log(size) for size, _ in points]
        y = [math.log(seconds) for _, seconds in points]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        exponent = rise / sum((a - mean_x) ** 2 for a in x)
        out.append(Slope(group, exponent, [size for size, _ in points], [seconds for _, seconds in points]))
    return out


class Faithful(NamedTuple):
    """The research formulation's time over that of the research code itself."""

    group: str
    ratio: float

    @property
    def counts(self) -> bool:
        """Whether the two are close enough for the row to count."""
        return abs(self.ratio - 1) <= FAITHFUL


def _faithful(rows: Contenders) -> float | None:
    return rows["upstream"].median / rows["apd"].median if "apd" in rows and "upstream" in rows else None


def faithfulness_of_upstream(found: Table) -> list[Faithful]:
    """Where the research code itself ran."""
    known = [(group, _faithful(rows)) for (group, _), rows in found.items()]
    return [Faithful(group, ratio) for group, ratio in known if ratio is not None]
