"""A process that works on one piece after another, and ends when it can no longer: the parent starts another."""

from __future__ import annotations

import functools
import importlib
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from bench._gpu import tree


def main(connection: Connection, settings: dict[str, Any]) -> None:
    """Says what it is, then answers (name, function, arguments) with (name, result) until nothing more is asked.

    Args:
        connection: To the parent.
        settings: "rehearsal", "checks" (whether results have to repeat to the bit), "log" (where what is printed goes)
            and "plant" (an op that is to be wrong, to see that it is found).
    """
    os.setsid()  # so that what it starts ends with it
    log = os.open(settings["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if settings["checks"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or the library's sums may change with streams
    tree.make_importable()
    import torch

    from bench import harness
    from bench._gpu import card as cards
    from fastapd import testing

    card = cards.Rehearsal() if settings["rehearsal"] else cards.Card()
    if settings["rehearsal"]:
        harness.COMPILER = "eager"
    elif settings["checks"]:  # several of these share the processors
        torch.set_num_threads(2)
    if settings["plant"]:
        _plant(settings["plant"])
    connection.send(("ready", {"facts": card.facts(), "ops": list(testing.OPS)}))
    while True:
        try:
            name, function, arguments = connection.recv()
        except EOFError:
            return
        result = _work(card, function, arguments)
        connection.send((name, result))
        if result.get("broken"):
            return


def _work(card: Any, path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The result of a function, or how it failed."""
    from bench._gpu import checks, contenders

    module, name = path.split(":")
    if "given" in arguments:
        arguments["given"] = {**arguments["given"], "until": time.monotonic() + arguments.pop("seconds")}
    result: dict[str, Any]
    try:
        with card.backend():
            result = getattr(importlib.import_module(module), name)(card, **arguments)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        if type(error).__name__ == "Skipped":  # pytest's: what does not fit
            result = {"notes": [{"contender": "", "why": f"left out: {error}"}], "left_out": str(error)}
        else:
            result = {"failures": [checks.said(error)]}
    contenders.forget()
    card.tidy()
    result["broken"] = bool(result.get("broken")) or not card.healthy()
    return result


def _plant(op: str) -> None:
    """Makes an op's fastest backend wrong by one percent, or by one where it returns integers."""
    from bench._gpu.checks import backends_of
    from fastapd import backends

    load, path = backends._load, backends.TABLE[op][backends_of(op)[0]]

    def wrong(t: Any) -> Any:
        return t * 1.01 if t.is_floating_point() else t.flip(-1)

    def wrong_in_place(t: Any) -> None:
        t.mul_(1.01)

    def planted(wanted: str) -> Any:
        right = load(wanted)
        if wanted != path:
            return right

        @functools.wraps(right)
        def run(*args: Any) -> Any:
            found = right(*args)
            if found is None:  # it writes into its arguments
                return wrong_in_place(args[0])
            return type(found)(wrong(t) for t in found) if isinstance(found, (tuple, list)) else wrong(found)

        return run

    backends._load = planted  # type: ignore[assignment]
