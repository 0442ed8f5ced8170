"""The research code's two targets as fastapd runs them: same state, instances first, decomposed layers as sites.

`target_of` and `components_of` look at a pair of research models and share their memory: what is trained are the
numbers that the research model holds. Anything they do not know raises `NotKnownError`, with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastapd.components import Components, LayerShape
from fastapd.experiments import residual_mlp
from fastapd.model import ComponentModel, Linear, TransposedLinear, find_sites


class NotKnownError(ValueError):
    """A model, a configuration or a combination of them that fastapd's loop does not cover."""


class TMS(nn.Module):
    """x' = ReLU(... x W H_1 .. H_k W^T + b): a toy model of superposition, hidden layers between its two ends.

    Args:
        n_instances: Independent copies.
        n_features: Width of input and output.
        n_hidden: Width in between.
        n_hidden_layers: Matrices [n_hidden, n_hidden] in between; none of them has a nonlinearity.
    """

    def __init__(self, n_instances: int, n_features: int, n_hidden: int, n_hidden_layers: int = 0) -> None:
        super().__init__()
        self.linear1 = Linear(n_instances, n_features, n_hidden)
        self.hidden_layers = nn.ModuleList(Linear(n_instances, n_hidden, n_hidden) for _ in range(n_hidden_layers))
        self.linear2 = TransposedLinear(self.linear1)
        self.b_final = nn.Parameter(torch.zeros(n_instances, 1, n_features))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear1(x)
        for layer in self.hidden_layers:
            h = layer(h)
        return torch.relu(self.linear2(h) + self.b_final)

    @property
    def decomposed(self) -> list[str]:
        """The decomposed layers, in the research code's order."""
        return ["linear1", "linear2", *(f"hidden_layers.{i}" for i in range(len(self.hidden_layers)))]


class ResidualMLP(residual_mlp.ResidualMLP):
    """`fastapd.experiments.residual_mlp.ResidualMLP` that knows which of its layers are decomposed."""

    @property
    def decomposed(self) -> list[str]:
        """The decomposed layers, in the research code's order."""
        return [f"layers.{i}.{name}" for i in range(len(self.layers)) for name in ("mlp_in", "mlp_out")]


Target = TMS | ResidualMLP


def ties(names: Any) -> dict[str, str]:
    """Which decomposed layer is the transpose of which."""
    return {"linear2": "linear1"} if "linear2" in names else {}


def _kind(model: nn.Module) -> str:
    """The research code's class, by its qualified name."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


_TARGETS = {
    "spd.experiments.tms.models.TMSModel": "spd.experiments.tms.models.TMSSPDModel",
    "spd.experiments.resid_mlp.models.ResidualMLPModel": "spd.experiments.resid_mlp.models.ResidualMLPSPDModel",
}


def _share(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.detach(), requires_grad=False)


def _rows(t: Tensor) -> nn.Parameter:
    """A bias [n_instances, d] as [n_instances, 1, d], in the same memory."""
    return _share(t.detach().unsqueeze(1))


def target_of(model: Any) -> Target:
    """A research target in fastapd's form, sharing its memory.

    Raises:
        NotKnownError: If it is neither a `TMSModel` nor a `ResidualMLPModel`, or someone hooked into it.
    """
    kind, sizes = _kind(model), getattr(model, "config", None)
    if kind not in _TARGETS or sizes is None:
        raise NotKnownError(f"the target is a {type(model).__name__}, neither a TMSModel nor a ResidualMLPModel")
    _refuse_hooks(model)
    device = "meta"  # nothing is drawn or allocated for weights that are replaced
    with torch.device(device):
        if kind.endswith("TMSModel"):
            target: Target = TMS(sizes.n_instances, sizes.n_features, sizes.n_hidden, sizes.n_hidden_layers)
        else:
            target = ResidualMLP(
                sizes.n_instances, sizes.n_features, sizes.d_embed, sizes.d_mlp, sizes.n_layers, sizes.act_fn_name,
                output_act=sizes.apply_output_act_fn,
            )  # fmt: skip
    for name in target.decomposed:
        if name != "linear2":
            target.get_submodule(name).weight = _share(model.get_submodule(name).weight)
    if isinstance(target, TMS):
        target.b_final = _rows(model.b_final)
        return target
    target.W_E, target.W_U = model.W_E.detach(), model.W_U.detach()
    for layer, theirs in zip(target.layers, model.layers, strict=True):
        for bias in ("bias1", "bias2"):
            value = getattr(theirs, bias)
            setattr(layer, bias, None if value is None else _rows(value))
    return target


def _refuse_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise NotKnownError(f"somebody hooked into {name or 'the model'}")


def components_of(model: Any, target_model: Any, param_names: list[str]) -> tuple[ComponentModel, list[nn.Parameter]]:
    """A pair of research models as a `ComponentModel` whose parameters lie where the research model's A and B do.

    Args:
        model: The component model, on the target's device.
        target_model: The target.
        param_names: Its decomposed layers.

    Returns:
        The model, and the parameters A whose memory has a new layout; `give_back` undoes that.

    Raises:
        NotKnownError: If the two are not the research code's own, or differ in what is not decomposed.
    """
    target = target_of(target_model)
    if _kind(model) != _TARGETS[_kind(target_model)]:
        raise NotKnownError(f"the component model of a {type(target_model).__name__} is a {type(model).__name__}")
    if sorted(param_names) != sorted(target.decomposed):
        raise NotKnownError(f"param_names are {param_names}, the layers with components {target.decomposed}")
    _refuse_hooks(model)
    fixed = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] not in ("A", "B")}
    for name, value in fixed.items():
        if value.requires_grad:
            raise NotKnownError(f"{name} is trained as well")
        wanted = dict(target_model.named_parameters()).get(name)
        if wanted is None or wanted.shape != value.shape or not torch.equal(wanted, value):
            raise NotKnownError(f"{name} is not the target's")
    own = [name for name in target.decomposed if name not in ties(target.decomposed)]
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in own}
    for name, owner in ties(target.decomposed).items():
        tied: Any = model.get_submodule(name)
        if tied.original_A is not modules[owner].A or tied.original_B is not modules[owner].B:
            raise NotKnownError(f"{name} is not tied to {owner}")
    first = modules[own[0]].A
    layers = {site.name: site.shape for site in find_sites(target, target.decomposed)}
    for name, module in modules.items():
        A, B = module.A, module.B
        shape: LayerShape = layers[name]
        if not (A.requires_grad and B.requires_grad):
            raise NotKnownError(f"the components of {name} are frozen")
        if (
            A.shape != (*first.shape[:2], shape.d_in, first.shape[3])
            or A.dtype != target_model.get_submodule(name).weight.dtype
        ):
            raise NotKnownError(f"the components of {name} have another shape or dtype than the target")
    components = Components(
        layers, first.shape[1], first.shape[3], first.shape[0],
        generator=torch.Generator(),  # its own: the research code's random numbers must not be used up
        dtype=first.dtype, device=first.device,
    )  # fmt: skip
    moved = []
    for name, module in modules.items():
        At, B = components.stored(name)
        At.data = module.A.data.mT.contiguous()
        module.A.data = At.data.mT
        B.data = module.B.data = module.B.data.contiguous()
        moved.append(module.A)
    return ComponentModel(target, find_sites(target, target.decomposed), components), moved


def give_back(moved: list[nn.Parameter]) -> None:
    """Lays every A out as the research code has it."""
    for A in moved:
        A.data = A.data.contiguous()
