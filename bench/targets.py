"""The targets and the settings of the published experiments, in torch alone.

`fastapd.experiments` and `fastapd.config` have them for users, and need pydantic; a machine with a GPU may have nothing
but torch. `tests/test_bench.py` holds what is here against them: the fields of `Method` with their defaults, the
published settings, the outputs of the targets and the batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastapd.model import Linear, TransposedLinear


@dataclass(frozen=True)
class Method:
    """What a step reads of `fastapd.APD`, which checks its values; these are ours."""

    topk: float | None
    selection: str = "batch"
    distil_from_target: bool = False
    attribution: str = "gradient"
    attribution_model: str = "target"
    attribution_probes: int | None = None
    attribution_refined: int | None = None
    attribution_norm: bool = False
    faithfulness: float = 1.0
    minimality: float = 1.0
    simplicity: float = 1.0
    p: float = 0.9
    schatten: str = "factored"
    lp_sparsity: float = 0.0
    lp_p: float = 0.9
    distance: str = "mse"
    output_reconstruction: float = 0.0
    activation_reconstruction: float = 0.0
    unit_norm: bool = False
    eps: float = 1e-16
    reference_exact_count: bool = False


PUBLISHED = {
    "tms_5-2": Method(topk=0.211, minimality=1.0, simplicity=0.7, p=1.0),
    "tms_40-10": Method(topk=1.0, minimality=10.0, simplicity=20.0, p=0.9),
}
"""Of the experiments that fastapd registers."""


class TMS(nn.Module):
    """x' = ReLU(x W W^T + b), n_instances times."""

    def __init__(self, n_instances: int, n_features: int, n_hidden: int) -> None:
        super().__init__()
        self.linear1 = Linear(n_instances, n_features, n_hidden)
        self.linear2 = TransposedLinear(self.linear1)
        self.b_final = nn.Parameter(torch.zeros(n_instances, 1, n_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear2(self.linear1(x)) + self.b_final)


class _MLP(nn.Module):
    def __init__(self, n_instances: int, d_embed: int, d_mlp: int) -> None:
        super().__init__()
        self.mlp_in = Linear(n_instances, d_embed, d_mlp)
        self.mlp_out = Linear(n_instances, d_mlp, d_embed)

    def forward(self, r: Tensor) -> Tensor:
        return self.mlp_out(torch.relu(self.mlp_in(r)))


class ResidualMLP(nn.Module):
    """r = x W_E, r += MLP_i(r) for every layer, y = r W_U; without biases."""

    W_E: Tensor
    W_U: Tensor

    def __init__(self, n_instances: int, n_features: int, d_embed: int, d_mlp: int, n_layers: int) -> None:
        super().__init__()
        self.register_buffer("W_E", torch.zeros(n_instances, n_features, d_embed))
        self.register_buffer("W_U", torch.zeros(n_instances, d_embed, n_features))
        self.layers = nn.ModuleList(_MLP(n_instances, d_embed, d_mlp) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        r = x @ self.W_E
        for layer in self.layers:
            r = r + layer(r)
        return r @ self.W_U


class Chain(nn.Module):
    """x -> relu(x W_1) -> .. -> W_n, without biases."""

    def __init__(self, n_instances: int, width: int, n_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(n_instances, width, width) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.relu(layer(x))
        return last(x)


def sparse_features(
    n_instances: int, batch: int, n_features: int, probability: float, generator: torch.Generator, low: float = 0.0
) -> Tensor:
    """A batch in which every feature is, with the given probability, uniform in [low, 1], and zero otherwise."""
    values = torch.rand(batch * n_instances, n_features, generator=generator)
    active = torch.rand(batch * n_instances, n_features, generator=generator) < probability
    x = (values * (1 - low) + low if low else values) * active
    return x.view(batch, n_instances, n_features).transpose(0, 1).contiguous()
