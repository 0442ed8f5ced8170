"""What the functions of the research code share: which behaviour is asked for, and how its tensors lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class _Settings:
    as_reference = False


settings = _Settings()
"""Set by `patch`; read whenever a function runs."""


def instances_first(t: Tensor) -> Tensor:
    """[batch, n_instances, d] as [n_instances, batch, d]; [batch, d] as it is."""
    return t.transpose(0, 1) if t.dim() == 3 else t


def same_names(op: str, **layers: Mapping[str, Any]) -> None:
    (first_name, first), *rest = layers.items()
    for name, other in rest:
        if other.keys() != first.keys():
            raise ValueError(f"{op}: {name} must name the layers of {first_name}, {list(first)}, got {list(other)}")
