"""Residual MLPs: r = x W_E, r += MLP_i(r) for every layer, y = r W_U; embeddings are fixed, MLP matrices decomposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastapd.config import ResidualMLPTarget, RunConfig
from fastapd.model import Linear

if TYPE_CHECKING:
    from jaxtyping import Float

LAYERS = ("layers.*.mlp_in", "layers.*.mlp_out")
"""The decomposed modules."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": F.gelu}


class _MLP(nn.Module):
    def __init__(self, n_instances: int, d_embed: int, d_mlp: int, act: str, bias: bool) -> None:
        super().__init__()
        self.mlp_in = Linear(n_instances, d_embed, d_mlp)
        self.mlp_out = Linear(n_instances, d_mlp, d_embed)
        self.act = ACTIVATIONS[act]
        self.bias1 = nn.Parameter(torch.zeros(n_instances, 1, d_mlp)) if bias else None
        self.bias2 = nn.Parameter(torch.zeros(n_instances, 1, d_embed)) if bias else None

    def forward(self, r: Tensor) -> Tensor:
        h = self.mlp_in(r)  # [I, b, d_mlp]
        h = self.act(h if self.bias1 is None else h + self.bias1)
        y = self.mlp_out(h)  # [I, b, d_embed]
        return y if self.bias2 is None else y + self.bias2


class ResidualMLP(nn.Module):
    """A stack of MLPs on a residual stream, n_instances times.

    Args:
        n_instances: Independent copies.
        n_features: Width of input and output.
        d_embed: Width of the residual stream.
        d_mlp: Neurons of each layer.
        n_layers: MLPs.
        act: "relu" or "gelu", after mlp_in.
        bias: Whether the MLPs have biases; they are never decomposed.
        output_act: Whether the activation is applied to the output too.
    """

    W_E: Tensor
    W_U: Tensor

    def __init__(
        self,
        n_instances: int,
        n_features: int,
        d_embed: int,
        d_mlp: int,
        n_layers: int,
        act: str = "relu",
        bias: bool = False,
        output_act: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("W_E", torch.zeros(n_instances, n_features, d_embed))
        self.register_buffer("W_U", torch.zeros(n_instances, d_embed, n_features))
        self.layers = nn.ModuleList(_MLP(n_instances, d_embed, d_mlp, act, bias) for _ in range(n_layers))
        self.output_act = ACTIVATIONS[act] if output_act else None

    def forward(self, x: Float[Tensor, "I b n_features"]) -> Float[Tensor, "I b n_features"]:
        r = x @ self.W_E  # [I, b, d_embed]
        for layer in self.layers:
            r = r + layer(r)
        y = r @ self.W_U  # [I, b, n_features]
        return y if self.output_act is None else self.output_act(y)


def untrained(config: RunConfig) -> ResidualMLP:
    """The target of a run, all zeros."""
    t = config.target
    assert isinstance(t, ResidualMLPTarget)
    return ResidualMLP(config.n_instances, t.n_features, t.d_embed, t.d_mlp, t.n_layers, t.act)
