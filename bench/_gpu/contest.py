"""Contenders of one problem: each is checked, then all are timed in turns, eagerly and as CUDA graphs.

Eager calls follow each other without a pause, so that a call that is shorter than its launches is timed by its
launches. So do the replays of a graph, which leaves those out; where nothing else is said, inputs of a call may then
still be in the L2 cache, and the time of a replay after that was overwritten is kept beside it as `cold_seconds`. A
round is a few calls of every contender, one contender after another; what counts is the median of the rounds.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

from bench._gpu import constants as limits
from bench._gpu.card import Call, Card, precision
from bench._gpu.checks import said
from fastapd import backends

ROUND_SECONDS, EAGER_SECONDS, GRAPH_SECONDS = 0.01, 0.25, 0.15
"""Of one contender: a round, all rounds of eager calls, all rounds of replays."""

ROUNDS = (3, 15)
"""The least and the most."""

SLOW_SECONDS = 0.5
"""A call that takes longer is timed twice, and not captured."""

COLD_CALLS = 11

MODES = ("tf32", "ieee")
"""What a contender's name may begin with: how float32 matrices are multiplied."""

TF32_TOLERANCE = 5e-3


@dataclass
class Candidate:
    """A contender, ready to run.

    Attributes:
        call: What is timed.
        check: Of what a call returned, asserts that it is right and returns its largest relative error.
        mark: What of fastapd it is: "chosen", "forced" or "".
        capture: Makes a replay in another way than by capturing the call; or why there is none.
        check_replay: As `check`, for a result that was replayed several times.
    """

    call: Call
    check: Callable[[Any], float]
    mark: str = ""
    capture: Callable[[], Call] | str | None = None
    check_replay: Callable[[Any], float] | None = None


class Work(NamedTuple):
    """Of a formula: flops, the bytes that have to be read and written, and of which kind the flops are."""

    flops: float
    n_bytes: float
    kind: str = "float32"


@dataclass
class _Runner:
    """A contender that was found right."""

    name: str
    candidate: Candidate
    info: dict[str, Any]
    once: float
    times: list[float] = field(default_factory=list)
    replay: Call | None = None
    replayed: list[float] = field(default_factory=list)
    per_round: tuple[int, int] = (1, 1)


class Contest(NamedTuple):
    """What is known of a problem before anybody runs.

    Attributes:
        group, direction: As in the benchmarks of the CPU: "<op>/<case>", and "forward", "forward_backward" or "step".
        work: Of the formula in this direction.
        constants, l2_bytes: Of the card.
        withheld: Of a contender's name and mark, why it is not timed: a check of what it runs on failed; else "".
        until: When there is no time left, by the monotonic clock.
        info: For every row.
    """

    group: str
    direction: str
    work: Work
    constants: Mapping[str, float]
    l2_bytes: int
    withheld: Callable[[str], str]
    until: float
    info: Mapping[str, Any] = {}


def mode_and_base(name: str) -> tuple[str, str]:
    """How matrices are multiplied, "" for the defaults, and the contender's name without it."""
    first, _, rest = name.partition(" ")
    return (first, rest) if first in MODES and rest else ("", name)


@contextlib.contextmanager
def _as_named(card: Card, name: str) -> Iterator[None]:
    """The backend and the precision that a contender's name says."""
    mode, base = mode_and_base(name)
    with card.backend(*([base] if base in backends.BACKENDS else [])), precision(mode):
        yield


def run(card: Card, contest: Contest, makers: Mapping[str, Callable[[], Candidate]]) -> dict[str, Any]:
    """Checks and times the contenders.

    Returns:
        "rows" as pytest-benchmark keeps them, "notes" on who did not run and why, "failures" of what is wrong, and
        whether the device is "broken".
    """
    out: dict[str, Any] = {"rows": [], "notes": [], "failures": [], "broken": False}
    ready: list[_Runner] = []
    for name, make in makers.items():
        if reason := contest.withheld(name):
            _note(out, contest, name, f"withheld: {reason}")
            continue
        if time.monotonic() > contest.until:
            _note(out, contest, name, "left out: no time left")
            continue
        try:
            with _as_named(card, name):
                ready.append(_prepare(card, contest, name, make))
        except pytest.skip.Exception as error:
            _note(out, contest, name, f"left out: {error}")
        except torch.cuda.OutOfMemoryError:
            _note(out, contest, name, "left out: does not fit into the card's memory")
        except Exception as error:
            _note(out, contest, name, f"failed: {said(error)}")
            out["failures"].append(f"{contest.group} {contest.direction}, {name}: {said(error)}")
        if not card.healthy():
            out["broken"] = True
            break
        card.tidy()
    if not out["broken"]:
        gc.collect()
        gc.disable()
        try:
            _time(card, contest, ready)
            _capture(card, contest, ready, out)
            _time_replays(card, contest, ready)
        finally:
            gc.enable()
    out["rows"] = [row for runner in ready for row in _rows(contest, runner)]
    return out


def _note(out: dict[str, Any], contest: Contest, name: str, why: str) -> None:
    out["notes"].append({"group": contest.group, "direction": contest.direction, "contender": name, "why": why})


def _prepare(card: Card, contest: Contest, name: str, make: Callable[[], Candidate]) -> _Runner:
    """Makes a contender, checks its first call and watches the memory of its second."""
    before = card.held()
    candidate = make()
    error = candidate.check(candidate.call())
    card.tidy()
    held = card.held()
    peak = card.peak(candidate.call)
    info = {"contender": name, "fastapd": candidate.mark, "error": error, "peak_bytes": max(peak - held, 0)}
    info["held_bytes"] = max(peak - before, 0)
    return _Runner(name, candidate, info, card.seconds(candidate.call))


def _plan(once: float, total: float) -> tuple[int, int]:
    """Calls in a round, and rounds."""
    if once > SLOW_SECONDS:
        return 1, 2
    calls = max(1, min(1000, round(ROUND_SECONDS / max(once, 1e-7))))
    return calls, max(ROUNDS[0], min(ROUNDS[1], round(total / (calls * max(once, 1e-7)))))


def _time(card: Card, contest: Contest, ready: Sequence[_Runner]) -> None:
    plans = {r.name: _plan(r.once, EAGER_SECONDS) for r in ready}
    for number in range(max((rounds for _, rounds in plans.values()), default=0)):
        for r in ready:
            calls, rounds = plans[r.name]
            calls = card.often(calls)
            if number >= card.often(rounds) or (number >= 2 and time.monotonic() > contest.until):
                continue
            with _as_named(card, r.name):
                r.times.append(card.seconds(r.candidate.call, calls))
            r.per_round = calls, r.per_round[1]


def _capture(card: Card, contest: Contest, ready: Sequence[_Runner], out: dict[str, Any]) -> None:
    """Captures whom it can, and checks what a replay finds."""
    for r in ready:
        how = r.candidate.capture
        room = card.memory_bytes() / 4
        why = how if isinstance(how, str) else ""
        if not why and r.once > SLOW_SECONDS and not card.rehearsal:
            why = f"a call takes {r.once:.1f} s, and its launches next to nothing of it"
        if not why and not callable(how) and r.info["peak_bytes"] > room and not card.rehearsal:
            why = f"its graph would hold {r.info['peak_bytes'] / 2**30:.1f} GiB"
        if not why and time.monotonic() > contest.until:
            why = "no time left"
        if why:
            _note(out, contest, r.name, f"not captured: {why}")
            continue
        try:
            with _as_named(card, r.name):
                if callable(how):
                    r.replay = how()
                else:
                    r.replay, found = card.captured(r.candidate.call)
                    r.replay()
                    card.wait()
                    (r.candidate.check_replay or r.candidate.check)(found)
        except AssertionError as error:
            r.replay = None
            out["failures"].append(f"{contest.group} {contest.direction}, {r.name} as a graph: {said(error)}")
        except Exception as error:
            r.replay = None
            _note(out, contest, r.name, f"not captured: {said(error)}")
            if r.candidate.mark == "chosen":
                out["failures"].append(f"{contest.group} {contest.direction}, {r.name} as a graph: {said(error)}")
        if not card.healthy():
            out["broken"] = True
            return


def _time_replays(card: Card, contest: Contest, ready: Sequence[_Runner]) -> None:
    captured = [r for r in ready if r.replay is not None]
    plans = {}
    for r in captured:
        assert r.replay is not None
        plans[r.name] = _plan(card.seconds(r.replay, card.often(3)), GRAPH_SECONDS)
    for number in range(max((rounds for _, rounds in plans.values()), default=0)):
        for r in captured:
            assert r.replay is not None
            calls, rounds = plans[r.name]
            calls = card.often(calls)
            if number >= card.often(rounds) or (number >= 2 and time.monotonic() > contest.until):
                continue
            r.replayed.append(card.seconds(r.replay, calls))
            r.per_round = r.per_round[0], calls
    for r in captured:
        assert r.replay is not None
        if time.monotonic() < contest.until:
            r.info["cold_seconds"] = card.cold_seconds(r.replay, card.often(COLD_CALLS))


def _rows(contest: Contest, r: _Runner) -> Iterator[dict[str, Any]]:
    """In the form of pytest-benchmark, as far as `bench/results.py` reads it."""
    mode, _ = mode_and_base(r.name)
    kind = "tf32" if mode == "tf32" and contest.work.kind == "float32" else contest.work.kind
    floor = limits.floor(contest.constants, contest.l2_bytes, contest.work.flops, contest.work.n_bytes, kind)
    common = {"flops": contest.work.flops, "bytes": contest.work.n_bytes, "kind": kind}
    common |= {"floor_seconds": floor.seconds, "floor_bound": floor.bound, "dtype": "float32", **contest.info}
    cold = r.info.pop("cold_seconds", None)
    for times, captured in ((r.times, False), (r.replayed, True)):
        if not times:
            continue
        direction = f"{contest.direction} captured" if captured else contest.direction
        info = {**r.info, **common, "direction": direction}
        if captured:
            info |= {"cold_seconds": cold}
            info.pop("peak_bytes"), info.pop("held_bytes")
        yield {
            "group": contest.group,
            "name": f"{r.name} {contest.group} {direction}",
            "params": None,
            "extra_info": info,
            "stats": _stats(times, r.per_round[1 if captured else 0]),
        }


def _stats(times: Sequence[float], iterations: int) -> dict[str, Any]:
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
        "mean": statistics.fmean(times),
        "q1": quarters[0],
        "q3": quarters[2],
        "iqr": quarters[2] - quarters[0],
        "rounds": len(times),
        "iterations": iterations,
    }
