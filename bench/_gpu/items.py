"""What there is to do, in order, each piece with the seconds it is expected to take on an H200.

A piece runs in a process of its own kind, so a kernel that hangs or writes where it must not costs that piece alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SECTIONS = ("build", "constants", "equivalence", "determinism", "capture", "timing")

SLACK_SECONDS = 45.0
"""Over its own limit, after which a piece is stopped from outside."""


@dataclass(frozen=True)
class Item:
    """A piece of work.

    Attributes:
        name: "<section>/..".
        function: "<module>:<name>", called with the card and the arguments.
        seconds: Expected; it is not begun with less time left.
        soft_seconds: After which it begins nothing new.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 5.0

    @property
    def section(self) -> str:
        return self.name.partition("/")[0]

    @property
    def soft_seconds(self) -> float:
        return max(20.0, 3 * self.seconds)

    @property
    def hard_seconds(self) -> float:
        return self.soft_seconds + SLACK_SECONDS


HEAVY = {
    "batch_topk": 25.0, "batch_topk_warm": 25.0, "batch_topk_counts": 25.0, "sample_topk": 20.0,
    "component_svdvals": 25.0, "schatten": 30.0, "schatten_accumulate": 30.0, "attribution_tangent": 40.0,
    "attribution_reduce": 30.0,
}  # fmt: skip
"""Ops whose kernels take long to compile."""

LIGHT = 12.0


def checks(ops: Sequence[str]) -> list[Item]:
    """Equivalence in float32, determinism and capture of every op, then equivalence in the other dtypes.

    Of each kind, what takes longest comes first, as several processes share them.
    """

    def equivalence(dtype: str, part: float) -> list[Item]:
        slowest = sorted(ops, key=lambda op: -HEAVY.get(op, LIGHT))
        function = "bench._gpu.checks:equivalence"
        return [
            Item(f"equivalence/{op}/{dtype}", function, {"op": op, "dtype": dtype}, part * HEAVY.get(op, LIGHT))
            for op in slowest
        ]

    repeats = [Item(f"determinism/{op}", "bench._gpu.repeats:determinism", {"op": op}, 5.0) for op in ops]
    steps = [
        Item(f"capture/step/{n}", "bench._gpu.graphs:capture_step", {"name": n}, 8.0) for n in ("tms_40-10", "resid")
    ]
    graphs = [Item(f"capture/{op}", "bench._gpu.graphs:capture_op", {"op": op}, 2.0) for op in ops]
    others = [*equivalence("bfloat16", 0.5), *equivalence("float16", 0.5), *equivalence("float64", 0.2)]
    return [*equivalence("float32", 1.0), *steps, *repeats, *graphs, *others]


OPS, STEP = "bench._gpu.problems_ops", "bench._gpu.problems_step"


def _timing(problem: str, seconds: float, module: str, function: str, **arguments: Any) -> Item:
    return Item(f"timing/{problem}", f"{module}:{function}", arguments, seconds)


def _forward(name: str, direction: str, seconds: float) -> Item:
    arguments = {"name": name, "direction": direction}
    return _timing(f"component_forward/{name}/{direction}", seconds, OPS, "component_forward", **arguments)


def _attributions(name: str, seconds: float, direction: str = "forward") -> Item:
    arguments = {"name": name, "direction": direction}
    return _timing(f"gradient_attributions/{name}/{direction}", seconds, STEP, "gradient_attributions", **arguments)


def timing() -> list[Item]:
    """Problems, those that goals are about first."""

    def simple(function: str, group: str, sizes: dict[str, float], module: str = OPS) -> list[Item]:
        return [_timing(f"{group}/{name}", seconds, module, function, name=name) for name, seconds in sizes.items()]

    step = simple("step", "step", {"tms_40-10_b2048": 22, "resid_b2048": 25}, STEP)
    more_steps = simple(
        "step", "step",
        {"tms_5-2_b2048": 6, "resid_m4_b256": 8, "resid2_b2048": 12, "s2_b512": 20, "s2_b4096": 12}, STEP,
    )  # fmt: skip
    reduce = simple(
        "attribution_reduce", "attribution_reduce",
        {"resid_b2048": 18, "s2_b512": 12, "s2_b4096": 14, "tms_40-10_b2048": 6, "s3_b64": 8}, STEP,
    )  # fmt: skip
    topk = simple(
        "batch_topk", "batch_topk",
        {"n1m_k10000": 5, "n10m_k65536": 5, "n100m_k320000": 7, "n82k_k4096": 5, "n1000m_k320000": 9,
         "n266k_k2621": 4, "n10k_k432": 4},
    )  # fmt: skip
    exact = simple(
        "schatten", "schatten",
        {"c4000_256x256_m8": 7, "c2000_256x256_m16": 8, "c1000_256x256_m32": 9, "c4000_256x256_m4": 6,
         "c1000_64x64_m4": 12, "c130_1000x50_m50": 6, "c100000_1024x1024_m1": 10},
    )  # fmt: skip
    masked = simple("masked_forward", "masked_forward", {"s1_in": 5, "s2": 6, "c10000_256x256_m1": 5, "s3": 10})
    forward = [
        _forward("s1_in", "forward", 10), _forward("s2", "forward", 6), _forward("s3", "forward", 9),
        _forward("s1_in", "forward_backward", 6), _forward("s2", "forward_backward", 7),
        _forward("tms_40-10", "forward_backward", 5), _forward("s1_out", "forward", 5),
        _forward("c10000_256x256_m1", "forward", 5),
    ]  # fmt: skip
    sums = simple("component_sum", "component_sum", {"s1_in": 10, "s2": 5, "tms_40-10": 5, "s1_out": 4, "s3": 7})
    factored = simple("schatten_factored", "batched_svd", {"s1": 9, "s2": 5, "tms_40-10": 4, "s3": 6})
    rows = [
        _timing(f"{op}/{name}", seconds, OPS, "unit_length", name=name, op=op)
        for name, seconds in (("s1", 8.0), ("s3", 4.0))
        for op in ("unit_norm", "remove_along")
    ]
    attributions = [
        _attributions("tms_40-10_b2048", 18), _attributions("resid_b2048", 18), _attributions("s2_b512", 12),
        _attributions("mlp_3x128_c200_b256", 8, "forward_backward"),
    ]  # fmt: skip
    lists = [step, attributions[:3], reduce[:3], topk[:3], exact[:3], masked[:3], sums[:1], more_steps]
    rest = [reduce[3:], topk[3:], exact[3:], masked[3:], forward, sums[1:], factored, rows, attributions[3:]]
    return [item for part in (*lists, *rest) for item in part]


QUICK = ("step/tms_40-10_b2048", "attribution_reduce/tms_40-10_b2048", "batch_topk/n1m_k10000",
         "schatten/c4000_256x256_m8", "masked_forward/s1_in", "component_sum/s1_in", "batched_svd/s1",
         "unit_norm/s1", "gradient_attributions/tms_40-10_b2048/forward")  # fmt: skip
"""Problems of a quick run."""


def plan(ops: Sequence[str], quick: bool) -> list[Item]:
    """Everything but the build, in order."""
    constants = Item("constants", "bench._gpu.constants:measure", {}, 8.0)
    timed = [item for item in timing() if not quick or item.name.removeprefix("timing/") in QUICK]
    checked = checks(ops)
    if quick:
        checked = [item for item in checked if item.section != "equivalence" or item.name.endswith("/float32")]
    return [constants, *checked, *timed]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name, or what stands in front of one of its slashes, matches one of the patterns; none match all."""
    parts = name.split("/")
    fronts = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return not patterns or any(fnmatch.fnmatchcase(front, pattern) for front in fronts for pattern in patterns)
