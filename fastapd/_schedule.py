"""The learning rate of a step, from plain numbers."""

from __future__ import annotations

import math


def scheduled(step: int, steps: int, lr: float, schedule: str, warmup: float, halflife: float | None) -> float:
    """Linear warm-up from zero over the first int(steps * warmup) steps, then the schedule over those that remain."""
    n_warmup = int(steps * warmup)
    if step < n_warmup:
        return lr * step / n_warmup
    s, S = step - n_warmup, steps - n_warmup
    if schedule == "linear":
        return lr * (1 - s / S) if S else lr
    if schedule == "cosine":
        return lr * (math.cos(0.5 * math.pi * s / (S - 1)) if S > 1 else 1.0)
    if schedule == "exponential":
        assert halflife is not None, "checked by whoever calls"
        return lr * 0.5 ** (s / halflife)
    return lr
