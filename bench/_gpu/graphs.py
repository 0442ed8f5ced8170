"""Graph capture: every op, and the whole training step as fastapd captures it; and that a step never waits.

An op is captured on one set of numbers and replayed on another, written into the same memory: bits as in eager mode. A
step is a step of a training, the eager one beside it on a copy of the components: losses and factors to the bit.
"""

from __future__ import annotations

from typing import Any

import torch

from bench._gpu.card import Card
from bench._gpu.checks import cotangents_of, inputs, said, to
from bench._gpu.contenders import on
from bench._gpu.repeats import one
from bench.cases import RESIDUAL, TMS_40_10, method
from fastapd import testing
from fastapd.model import ComponentModel
from fastapd.training import learning_rate, make_optimiser, train_step

NOT_CAPTURED = {"batch_topk_counts": "takes the number of pairs from the data, and so waits for the device"}
"""Ops that a graph cannot hold, as they say."""

STEPS = 8
TRAINED = {"tms_40-10": TMS_40_10, "resid": RESIDUAL}


def capture_op(card: Card, op: str) -> dict[str, Any]:
    """One op with its gradients."""
    row: dict[str, Any] = {"op": op, "backend": "fastapd", "case": one(card).name, "failed": []}
    if op in NOT_CAPTURED:
        return {"rows": [row | {"not_captured": NOT_CAPTURED[op]}], "failures": [], "broken": False}
    try:
        sets = [inputs(op, one(card), seed=seed) for seed in (0, 1)]
        static = to(card.device, list(sets[0]))
        cotangents = to(card.device, cotangents_of(op, sets[0]))
        replay, found = card.captured(lambda: testing.run(op, static, cotangents))
        other = to(card.device, list(sets[1]))
        with torch.no_grad():
            for mine, new in zip(testing.tensors_of(static), testing.tensors_of(other), strict=True):
                mine.copy_(new)
        replay()
        card.wait()
        testing.assert_bit_equal(found, testing.run(op, other, cotangents))
    except Exception as error:
        row["failed"].append(said(error))
    failures = [f"capture of {op}: {message}" for message in row["failed"]]
    return {"rows": [row], "failures": failures, "broken": not card.healthy()}


class _Schedule:
    """What `learning_rate` reads of an optimiser's settings; rates are exact in float32."""

    lr, schedule, warmup, halflife = 2.0**-8, "linear", 0.0, None


def capture_step(card: Card, name: str) -> dict[str, Any]:
    """A training with a graph beside one without; then one step during which nothing may wait."""
    steps = max(2, card.often(STEPS))
    row: dict[str, Any] = {"step": name, "steps": steps, "failed": []}
    try:
        p = on(card, TRAINED[name])
        settings = method(p.case)
        hidden = {n: torch.relu for n in p.names if n.endswith("mlp_in")} or None
        models = [ComponentModel(p.model.target, p.model.sites, p.components()) for _ in range(2)]
        optimiser = make_optimiser(models[0].components, True)
        captured = card.graphed_steps(models[1], settings, hidden)
        losses: list[list[float]] = [[], []]
        schedule: Any = _Schedule
        for index in range(steps):
            x, lr = p.x.roll(index, 1), learning_rate(index, STEPS, schedule)
            losses[0].append(train_step(models[0], settings, optimiser, lr, x, hidden).total.item())
            losses[1].append(captured(lr, x).total.item())
        row["losses"] = losses[0]
        if losses[0] != losses[1]:
            row["failed"].append(f"losses {losses[1]} with the graph, {losses[0]} without")
        different = [
            key
            for key, t in models[0].components.state_dict().items()
            if not torch.equal(t, models[1].components.state_dict()[key])
        ]
        if different:
            row["failed"].append(f"other factors after {steps} steps: {', '.join(different)}")
        with card.forbidden_to_wait():
            train_step(models[0], settings, optimiser, 0.0, p.x, hidden)
    except Exception as error:
        row["failed"].append(said(error))
    failures = [f"captured steps of {name}: {message}" for message in row["failed"]]
    return {"rows": [row], "failures": failures, "broken": not card.healthy()}
