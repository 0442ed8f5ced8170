"""The goals of a GPU as data, each with how it is computed from a run. They count on an H200; on other cards they are
shown. A call of ours takes the time of the better of its eager form and its graph, and so does what it is held against,
but for the research formulation, which is eager."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench import results
from bench.results import Row, Table

COUNTS_ON = "H200"


class Group(NamedTuple):
    """The rows of one problem and direction by contender, eager and captured, and the constants of the card."""

    eager: dict[str, Row]
    captured: dict[str, Row]
    constants: dict[str, float]

    def seconds(self, name: str) -> float | None:
        """Of a contender, the better way."""
        return min((rows[name].median for rows in (self.eager, self.captured) if name in rows), default=None)

    def best(self, names: Sequence[str]) -> float | None:
        return min((t for name in names if (t := self.seconds(name)) is not None), default=None)

    def torch(self, mode: str = "") -> list[str]:
        """The plain torch forms of a precision."""
        return [name for name in self.eager if name.startswith(f"{mode} torch" if mode else "torch")]

    def ours(self, mode: str = "") -> str | None:
        """What fastapd chooses by itself; in another precision, the same backend."""
        row = results.ours(self.eager)
        return None if row is None else f"{mode} {row.contender}" if mode else row.contender

    def info(self, name: str, key: str) -> Any:
        row = self.eager.get(name)
        return None if row is None else row.info.get(key)


Measure = Callable[[Group], float | None]


@dataclass(frozen=True)
class Goal:
    """One row.

    Attributes:
        what, against: In words.
        bound: What the number has to reach in every group, or may be at most.
        groups: Where it is measured, "<op>/<case> <direction>".
        measure: The number of one group.
        at_most: Whether small numbers are good.
        unit: "x", "s" or "%".
    """

    what: str
    against: str
    bound: float
    groups: tuple[str, ...]
    measure: Measure
    at_most: bool = False
    unit: str = "x"

    def show(self, value: float) -> str:
        return {"s": results.seconds(value), "%": f"{value:.0%}"}.get(self.unit, f"{value:.3g}x")

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _own_seconds(g: Group) -> float | None:
    return g.seconds(name) if (name := g.ours()) else None


def _captured_seconds(g: Group) -> float | None:
    name = g.ours()
    return g.captured[name].median if name in g.captured else None


def _than_research(g: Group) -> float | None:
    research = g.eager.get("upstream")
    return _ratio(research.median if research else None, _own_seconds(g))


def _captured_than_research(g: Group) -> float | None:
    research = g.eager.get("upstream")
    return _ratio(research.median if research else None, _captured_seconds(g))


def _than(names: Callable[[Group], Sequence[str]], mode: str = "", own: str | None = None) -> Measure:
    """The best of some contenders over ours."""

    def measure(g: Group) -> float | None:
        name = own or g.ours(mode)
        return _ratio(g.best(names(g)), g.seconds(name) if name else None)

    return measure


def _tensor_share(mode: str) -> Measure:
    """Achieved flops as a share of what the library's TF32 products reach, a third of it for three products."""

    def measure(g: Group) -> float | None:
        name = g.ours(mode)
        seconds = g.seconds(name) if name else None
        if name is None or seconds is None or name not in g.eager:
            return None
        peak = g.constants["tf32_tflops"] * 1e12 / (1 if mode == "tf32" else 3)
        return g.eager[name].info["flops"] / seconds / peak

    return measure


def _jacobian(g: Group) -> float | None:
    """Peak memory of ours, over that of the Jacobian and the scores."""
    name = g.ours()
    peak = g.info(name, "peak_bytes") if name else None
    return None if name is None else _ratio(peak, g.info(name, "jacobian_bytes") + g.info(name, "scores_bytes"))


def _memory(g: Group) -> float | None:
    """What a step of the research formulation holds at most over ours, optimisers and gradients included."""
    name = g.ours()
    return _ratio(g.info("upstream", "held_bytes"), g.info(name, "held_bytes") if name else None)


def _bytes(g: Group) -> float | None:
    """Ours over the time of reading factors and writing gradients, from memory."""
    seconds = g.seconds("fastapd_step")
    n_bytes = g.info("fastapd_step", "n_bytes")
    return None if n_bytes is None else _ratio(seconds, n_bytes / (g.constants["memory_gbs"] * 1e9))


def _groups(op: str, cases: Sequence[str], direction: str) -> tuple[str, ...]:
    return tuple(f"{op}/{case} {direction}" for case in cases)


RESEARCH = "eager research formulation"
_TMS = _groups("step", ["tms_40-10_b2048"], "step")
_S1 = _groups("step", ["resid_b2048"], "step")
_RESIDUAL = _groups("step", ["resid_b2048", "resid2_b2048"], "step")
_ATTRIBUTIONS = _groups("gradient_attributions", ["tms_40-10_b2048", "resid_b2048", "s2_b512"], "forward")
_REDUCE = _groups("attribution_reduce", ["resid_b2048", "s2_b512"], "forward")
_S2 = _groups("attribution_reduce", ["s2_b4096"], "forward")
_MASKED = _groups("masked_forward", ["s1_in", "s2", "c10000_256x256_m1", "s3"], "forward")
_MASKED_THEIRS = _groups("masked_forward", ["s1_in", "s2", "c10000_256x256_m1"], "forward")
_MANY = _groups("batch_topk", ["n1m_k10000", "n10m_k65536", "n100m_k320000"], "forward")
_EXACT = ["c4000_256x256_m8", "c2000_256x256_m16", "c1000_256x256_m32"]
_FACTORED = "best factored route of cuSOLVER"


def _schatten(cases: Sequence[str]) -> tuple[str, ...]:
    return _groups("schatten", cases, "forward_backward")


GOALS: tuple[Goal, ...] = (
    Goal("step TMS 40-10, captured", "the clock", 150e-6, _TMS, _captured_seconds, at_most=True, unit="s"),
    Goal("step TMS 40-10, captured", RESEARCH, 30, _TMS, _captured_than_research),
    Goal("step residual 1 layer, b 2048", "the clock", 1.5e-3, _S1, _own_seconds, at_most=True, unit="s"),
    Goal("step residual, b 2048: peak memory", RESEARCH, 5, _RESIDUAL, _memory),
    Goal("attribution of a step", RESEARCH, 20, _ATTRIBUTIONS, _than_research),
    Goal("attribution, reverse form", "Jacobian and bmm, about float32", 1.5, (*_REDUCE, *_S2), _than(Group.torch)),
    Goal("attribution, reverse form, tf32", "Jacobian and bmm, tf32", 1.5, (*_REDUCE, *_S2),
         _than(lambda g: g.torch("tf32"), "tf32")),
    Goal("attribution, reverse form, S2", "tensor rate, three products", 0.55, _S2, _tensor_share(""), unit="%"),
    Goal("attribution, reverse form, S2, tf32", "tensor rate", 0.55, _S2, _tensor_share("tf32"), unit="%"),
    Goal("attribution of a step: peak memory", "Jacobian and scores", 1.2, _ATTRIBUTIONS, _jacobian, at_most=True),
    Goal("masked forward with its index", RESEARCH, 10, _MASKED_THEIRS, _than_research),
    Goal("masked forward with its index, C/k >= 100", "dense two-GEMM, tf32", 3, _MASKED,
         _than(lambda g: ["tf32 torch_dense"])),
    Goal("top-k, N >= 1M", "torch.topk and scatter", 5, _MANY, _than(lambda g: ["torch_scatter"])),
    Goal("exact Schatten, m 8", "its bytes", 2, _schatten(_EXACT[:1]), _bytes, at_most=True),
    Goal("exact Schatten, m 16", "its bytes", 3, _schatten(_EXACT[1:2]), _bytes, at_most=True),
    Goal("exact Schatten, m 32", "its bytes", 8, _schatten(_EXACT[2:]), _bytes, at_most=True),
    Goal("exact Schatten, C >= 1000", _FACTORED, 20, _schatten(["c1000_64x64_m4", *_EXACT]),
         _than(lambda g: ["torch_gram", "torch_qr"], own="fastapd_step")),
)  # fmt: skip


class Outcome(NamedTuple):
    """How a goal came out: the worst of its groups, where that was, and the groups without a number."""

    goal: Goal
    value: float | None
    group: str
    missing: tuple[str, ...]
    counted: bool

    @property
    def met(self) -> bool:
        return self.counted and self.value is not None and self.goal.holds(self.value) and not self.missing

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        off = self.value / self.goal.bound
        off = off if self.goal.at_most else 1 / off if off else math.inf
        text = "met" if self.goal.holds(self.value) else f"missed by a factor of {off:.3g}"
        if self.missing:
            text += f", not measured in {', '.join(self.missing)}"
        if len(self.goal.groups) > 1:
            text += f" (worst: {self.group.split('/')[1].split()[0]})"
        return text if self.counted else f"{text}; not counted: no {COUNTS_ON}"


def outcomes(found: Table, constants: dict[str, float], card: str) -> list[Outcome]:
    """Every goal in a run."""
    return [_outcome(goal, found, constants, COUNTS_ON in card) for goal in GOALS]


def _outcome(goal: Goal, found: Table, constants: dict[str, float], counted: bool) -> Outcome:
    values = {}
    for name in goal.groups:
        group, _, direction = name.partition(" ")
        known = Group(found.get((group, direction), {}), found.get((group, f"{direction} captured"), {}), constants)
        values[name] = goal.measure(known) if known.eager and constants else None
    known_values = {name: value for name, value in values.items() if value is not None}
    missing = tuple(name.split("/")[1].split()[0] for name in goal.groups if name not in known_values)
    if not known_values:
        return Outcome(goal, None, "", missing, counted)
    worst = (max if goal.at_most else min)(known_values, key=lambda name: known_values[name])
    return Outcome(goal, known_values[worst], worst, missing, counted)


def lines(found: list[Outcome]) -> list[list[str]]:
    """What, against, goal, measured, verdict."""
    out = []
    for o in found:
        sign = "<=" if o.goal.at_most else ">="
        measured = "-" if o.value is None else o.goal.show(o.value)
        out.append([o.goal.what, o.goal.against, f"{sign} {o.goal.show(o.goal.bound)}", measured, o.verdict])
    return out
