"""What an experiment says of a result: the table with its baselines, and what the run directory keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Check:
    """The check of one result.

    Attributes:
        columns, rows: The table: baselines first, then the result, then published values.
        recovered, n: How many of the n instances fulfil `rule`.
        rule: The rule in words.
        published: (quantity, as published, here).
        figures: Caption and figure by name.
        values: Every number behind the table, for `result.json`.
        tensors: By file name, what pictures need; for `eval/`.
    """

    columns: list[str]
    rows: list[list[str]]
    recovered: int
    n: int
    rule: str
    published: list[tuple[str, str, str]] = field(default_factory=list)
    figures: dict[str, tuple[str, Figure]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
