"""The deadline, and the processes that work: one for what is timed, several for what is only checked.

Every piece is begun only if the time it is expected to take is left, and stopped when the deadline comes; what was not
done is listed. A process that ends, hangs or reports that its device no longer answers is replaced.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from bench._gpu import child
from bench._gpu.items import Item

RESERVE_SECONDS = 4.0
"""Kept for writing the results."""

START_SECONDS = 120.0
"""In which a process has to say that it is ready."""

STARTS = 3
"""Of processes that are never ready, one after another, before the run gives up."""


@dataclass
class Options:
    """Of the command line, as far as processes need them."""

    seconds: float
    rehearsal: bool = False
    workers: int = 0
    plant: str = ""


@dataclass
class _Process:
    process: Any
    connection: Connection
    log: Path
    item: Item | None = None
    ready: bool = False
    since: float = field(default_factory=time.monotonic)


class Clock:
    """The time since the start and until the deadline."""

    def __init__(self, seconds: float) -> None:
        self.started = time.monotonic()
        self.deadline = self.started + seconds - RESERVE_SECONDS

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        return self.deadline - time.monotonic()


Done = Callable[[Item, dict[str, Any]], None]
"""Called with every piece and its result, in the order they end."""

Arguments = Callable[[Item], dict[str, Any]]
"""What a piece is called with, asked for when it begins."""


class Team:
    """Some processes that share pieces of work."""

    def __init__(self, n: int, options: Options, clock: Clock, checks: bool) -> None:
        self.n, self.options, self.clock, self.checks = n, options, clock, checks
        self.facts: dict[str, Any] | None = None
        self._context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="fastapd-gpu-")
        self._processes: list[_Process] = []
        self._started = self._failed_starts = 0
        self._deadline = clock.deadline

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error: object) -> None:
        for p in self._processes:
            self._end(p)
        self._processes = []
        self._folder.cleanup()

    def first(self) -> dict[str, Any]:
        """What a process says of the card and the ops, or how it failed to start.

        Raises:
            RuntimeError: If none starts.
        """
        while self.facts is None:
            if not self._processes:
                self._start()
            p = self._processes[0]
            if not p.connection.poll(max(0.0, min(START_SECONDS, self.clock.left()))):
                raise RuntimeError("no process was ready in time")
            self._hear(p, lambda item, result: None)
        return self.facts

    def work(
        self,
        items: Sequence[Item],
        arguments: Arguments,
        done: Done,
        begun: Callable[[Item], None],
        share: float = 1.0,
    ) -> None:
        """Lets the processes do what there is time for: until the deadline, or for this share of all seconds."""
        waiting = list(items)
        self._deadline = min(self.clock.deadline, self.clock.started + share * self.options.seconds)
        while True:
            while waiting and self._left() < waiting[0].seconds:
                done(waiting.pop(0), {"left_out": "no time left"})
            working = sum(p.item is not None for p in self._processes)
            while len(self._processes) < min(self.n, len(waiting) + working):
                self._start()
            for p in self._processes:
                if waiting and p.ready and p.item is None and self._left() >= waiting[0].seconds:
                    item = waiting.pop(0)
                    begun(item)
                    p.item, p.since = item, time.monotonic()
                    with contextlib.suppress(OSError):  # it ended meanwhile: heard below
                        p.connection.send((item.name, item.function, arguments(item)))
            busy = [p for p in self._processes if p.item is not None or not p.ready]
            if not waiting and not any(p.item for p in self._processes):
                return
            until = min([p.since + self._limit(p) for p in busy] + [self._deadline])
            heard = wait([p.connection for p in busy], timeout=max(0.0, until - time.monotonic()))
            for p in [p for p in busy if p.connection in heard]:
                self._hear(p, done)
            for p in [p for p in self._processes if p in busy and p.connection not in heard]:
                self._stop_if_late(p, done)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _limit(self, p: _Process) -> float:
        return START_SECONDS if not p.ready else p.item.hard_seconds if p.item else float("inf")

    def _hear(self, p: _Process, done: Done) -> None:
        try:
            name, result = p.connection.recv()
        except (EOFError, OSError):
            said = self._said(p)
            self._end(p)
            self._processes.remove(p)
            if p.item is not None:
                done(p.item, {"failures": [f"the process ended: {said}"]})
            elif not p.ready:
                self._did_not_start(f"a process ended before it was ready: {said}")
            return
        if name == "ready":
            p.ready, self.facts, self._failed_starts = True, result, 0
            return
        assert p.item is not None
        item, p.item = p.item, None
        done(item, result)
        if result.get("broken"):
            self._end(p)
            self._processes.remove(p)

    def _stop_if_late(self, p: _Process, done: Done) -> None:
        late, over = time.monotonic() - p.since >= self._limit(p), self._left() <= 0
        if not late and not over:
            return
        self._end(p)
        self._processes.remove(p)
        if p.item is None:
            if late:
                self._did_not_start(f"a process was not ready after {START_SECONDS:.0f} s")
        elif over:
            done(p.item, {"left_out": "stopped, as its time was over"})
        else:
            seconds = time.monotonic() - p.since
            done(p.item, {"failures": [f"stopped after {seconds:.0f} s: it hangs or is far too slow"]})

    def _did_not_start(self, why: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= STARTS:
            raise RuntimeError(why)

    def _start(self) -> None:
        log = Path(self._folder.name, f"{self._started}.log")
        self._started += 1
        settings = {
            "rehearsal": self.options.rehearsal, "checks": self.checks, "log": str(log), "plant": self.options.plant,
        }  # fmt: skip
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=child.main, args=(theirs, settings))
        process.start()
        theirs.close()
        self._processes.append(_Process(process, mine, log))

    def _end(self, p: _Process) -> None:
        """With whatever it started: it leads a group of its own."""
        p.connection.close()
        with contextlib.suppress(OSError):
            os.killpg(p.process.pid, signal.SIGKILL)
        p.process.kill()
        p.process.join(10)

    def _said(self, p: _Process) -> str:
        """The last line that a process printed."""
        p.process.join(2)
        lines = p.log.read_text(errors="replace").strip().splitlines() if p.log.is_file() else []
        return f"{lines[-1] if lines else 'it said nothing'} (exit status {p.process.exitcode})"


def n_workers(options: Options) -> int:
    """How many processes check at the same time: most of it is compiling kernels, each on one processor."""
    return 1 if options.rehearsal else options.workers or max(1, min(12, (os.cpu_count() or 1) * 3 // 4))
