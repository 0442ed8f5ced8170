"""Determinism: the same bits a thousand times, also while another stream works, on side streams and other devices.

Values and gradients of an op on the backend that fastapd chooses by itself. Results are compared on the device, and
read once at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench._gpu.card import Card
from bench._gpu.checks import SMALL, cotangents_of, inputs, said, to
from fastapd import testing

REPEATS, UNDER_LOAD = 1000, 200
LOAD_EVERY = 5
"""Repeats for each piece of work that the other stream is given."""

CASE = "tms_40"

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def one(card: Card) -> testing.Case:
    return SMALL[0] if card.rehearsal else testing.CASES[CASE]


def _bits(found: testing.Answer) -> list[Tensor]:
    tensors = (t.detach().contiguous().reshape(-1) for ts in found for t in ts)
    return [t.view(_WORDS[t.element_size()]) for t in tensors]


def _different(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Whether any bit differs, on the device."""
    parts = [(a != b).any() for a, b in zip(first, second, strict=True)]
    return torch.stack(parts).any()


def determinism(card: Card, op: str, quick: bool, seconds: float) -> dict[str, Any]:
    """All of this for one op."""
    until = time.monotonic() + seconds
    row: dict[str, Any] = {"op": op, "backend": "fastapd", "case": one(card).name, "failed": []}
    try:
        args = inputs(op, one(card))
        there, cotangents = to(card.device, list(args)), to(card.device, cotangents_of(op, args))
        call = lambda: testing.run(op, there, cotangents)  # noqa: E731
        first = _bits(call())
        wanted = REPEATS // 10 if quick else REPEATS
        row["repeats"], row["different"] = _repeat(card, call, first, card.often(wanted), until, load=False)
        wanted = UNDER_LOAD // 10 if quick else UNDER_LOAD
        loaded = _repeat(card, call, first, card.often(wanted), until, load=True)
        row["repeats_under_load"], row["different_under_load"] = loaded
        row["failed"] += [f"{row[k]} {k} of the first result" for k in ("different", "different_under_load") if row[k]]
        row["failed"] += _on_a_side_stream(card, op, there, cotangents, first)
        row["failed"] += _on_another_device(card, op, there, cotangents, first)
    except Exception as error:
        row["failed"].append(said(error))
    failures = [f"{op}: {message}" for message in row["failed"]]
    return {"rows": [row], "failures": failures, "broken": not card.healthy()}


def _repeat(
    card: Card, call: Callable[[], Any], first: list[Tensor], n: int, until: float, load: bool
) -> tuple[int, int]:
    """How often it ran, and how often other bits came out."""
    wrong, done = torch.zeros((), dtype=torch.int64, device=card.device), 0
    while done < n and time.monotonic() < until:
        if load and done % LOAD_EVERY == 0:
            card.load()
        wrong += _different(_bits(call()), first)
        done += 1
    card.wait()
    return done, int(wrong)


def _on_a_side_stream(
    card: Card, op: str, args: Any, cotangents: list[Tensor] | None, first: list[Tensor]
) -> list[str]:
    """Inputs that a busy side stream is still to write: whoever works on another stream reads what was there before."""
    buffers = testing.map_tensors(lambda t: torch.zeros_like(t), args)
    pairs = list(zip(testing.tensors_of(buffers), testing.tensors_of(args), strict=True))
    with card.side_stream():
        card.delay()
        for empty, full in pairs:
            empty.copy_(full)
        found = _bits(testing.run(op, buffers, cotangents))
    return ["on a side stream it does not wait for its inputs"] if bool(_different(found, first)) else []


def _on_another_device(
    card: Card, op: str, args: Any, cotangents: list[Tensor] | None, first: list[Tensor]
) -> list[str]:
    """Tensors of a device that is not the current one."""
    other = card.second()
    if other is None:
        return []
    found = [t.to(card.device) for t in _bits(testing.run(op, to(other, args), to(other, cotangents)))]
    return [f"other bits on {other}"] if bool(_different(found, first)) else []
