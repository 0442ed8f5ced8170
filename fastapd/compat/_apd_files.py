"""The research code's checkpoints: its targets and its components, in every spelling of their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastapd.compat._apd_config import Config, read_mapping
from fastapd.compat._apd_models import TMS, ResidualMLP, Target, ties
from fastapd.components import Components

_OLD_MLP = re.compile(r"(layers\.\d+)\.linear([12])(?=\.|$)")
_FACTOR = re.compile(r"(?:(?P<layer>.+)\.)?(?P<factor>[AB])")


def _read(op: str, path: Path) -> dict[str, Tensor]:
    """A state, without running what a file might hold besides tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{op}: path must be a file, got {str(path)!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of a file that is no checkpoint
        text = str(error).strip().splitlines()
        raise ValueError(f"{op}: {path} must be a checkpoint of tensors, got {text[0] if text else error!r}") from None
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{op}: {path} must hold tensors by name, got {type(state).__name__}")
    names = {1: "mlp_in", 2: "mlp_out"}
    return {_OLD_MLP.sub(lambda m: f"{m[1]}.{names[int(m[2])]}", str(name)): t for name, t in state.items()}


def _with_instances(t: Tensor, axes: int) -> Tensor:
    """A tensor of so many axes and n_instances before them, which old checkpoints may lack."""
    return t.unsqueeze(0) if t.dim() == axes else t


def train_config(path: Path) -> dict[str, Any]:
    """What is said beside a target's checkpoint of how it was trained; empty if nothing is."""
    for name in ("tms_train_config.yaml", "resid_mlp_train_config.yaml"):
        if (path.parent / name).is_file():
            return read_mapping(path.parent / name)
    return {}


def target_path(source: Config | Mapping[str, Any] | str | Path) -> Path:
    """The checkpoint of a target: of a configuration, of a file of one, or itself."""
    if isinstance(source, Mapping):
        source = Config(**source)
    if isinstance(source, Config):
        return source.target_path
    path = Path(source)
    return Config.from_yaml(path).target_path if path.suffix in (".yaml", ".yml") else path


def load_target(source: Config | Mapping[str, Any] | str | Path) -> Target:
    """A trained target of the research code, `tms.pth` or `resid_mlp.pth`, as fastapd runs it.

    Args:
        source: The checkpoint, or a configuration (or its YAML file) that names one.

    Returns:
        The target, frozen; inputs are [n_instances, batch, n_features], and `target.decomposed` names the layers that
        the research code decomposes: `fastapd.decompose(target, data, target.decomposed, C=..)`.

    Raises:
        FileNotFoundError: If the checkpoint is missing, or for a residual MLP its `resid_mlp_train_config.yaml`, which
            alone says what the activation function is.
        ValueError: If it is in wandb, or no target of the research code's.
    """
    path = target_path(source)
    state = _read("load_target", path)
    if any(_FACTOR.fullmatch(name) for name in state):
        raise ValueError(f"load_target: {path} must hold a target, got components; use load_components")
    target = _mlp(path, state) if "W_E" in state else _tms(path, state)
    return target.requires_grad_(False).eval()


def _wanted(path: Path, state: dict[str, Tensor], *names: str) -> None:
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"load_target: {path} must hold {', '.join(missing)}, got {', '.join(state) or 'nothing'}")


def _bias(t: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(_with_instances(t, 1).unsqueeze(1))


def _matrix(t: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(_with_instances(t, 2))


def _tms(path: Path, state: dict[str, Tensor]) -> TMS:
    state = {("linear1.weight" if name == "W" else name): t for name, t in state.items()}
    _wanted(path, state, "linear1.weight", "b_final")
    hidden = [name for name in state if re.fullmatch(r"hidden_layers\.\d+\.weight", name)]
    W = _with_instances(state["linear1.weight"], 2)
    n, n_features, n_hidden = W.shape
    target = TMS(n, n_features, n_hidden, len(hidden))
    target.linear1.weight = _matrix(W)
    target.b_final = _bias(state["b_final"])
    for name in hidden:
        target.get_submodule(name.removesuffix(".weight")).weight = _matrix(state[name])
    return target


def _mlp(path: Path, state: dict[str, Tensor]) -> ResidualMLP:
    state = {(f"{n}.weight" if n.endswith(("mlp_in", "mlp_out")) else n): t for n, t in state.items()}
    n_layers = len([name for name in state if re.fullmatch(r"layers\.\d+\.mlp_in\.weight", name)])
    _wanted(path, state, "W_U", "layers.0.mlp_in.weight", "layers.0.mlp_out.weight")
    beside = path.parent / "resid_mlp_train_config.yaml"
    if not beside.is_file():
        raise FileNotFoundError(
            f"load_target: resid_mlp_train_config.yaml must lie beside {path}, got nothing; it says what the "
            "network's activation function is"
        )
    sizes = read_mapping(beside).get("resid_mlp_config", {})
    act = sizes.get("act_fn_name", "relu")
    if act not in ("relu", "gelu"):
        raise ValueError(f"load_target: {beside} must have act_fn_name 'relu' or 'gelu', got {act!r}")
    W_E, W_U = (_with_instances(state[name], 2) for name in ("W_E", "W_U"))
    d_mlp = state["layers.0.mlp_in.weight"].shape[-1]
    output_act = bool(sizes.get("apply_output_act_fn", False))
    n, n_features, d_embed = W_E.shape
    target = ResidualMLP(n, n_features, d_embed, d_mlp, n_layers, act, output_act=output_act)
    target.W_E, target.W_U = W_E, W_U
    for i, layer in enumerate(target.layers):
        for name in ("mlp_in", "mlp_out"):
            layer.get_submodule(name).weight = _matrix(state[f"layers.{i}.{name}.weight"])
        for name in ("bias1", "bias2"):
            if f"layers.{i}.{name}" in state:
                setattr(layer, name, _bias(state[f"layers.{i}.{name}"]))
    return target


def load_components(path: str | Path) -> Components:
    """The components in a checkpoint of the research code, `spd_model_<step>.pth`.

    Args:
        path: The checkpoint; names of earlier versions (`A`, `layers.0.linear1.A`) are read too.

    Returns:
        The components, of the layers by the names of the target's modules; for a toy model of superposition `linear2`
        is tied to `linear1`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no components, or an A without its B.
    """
    path = Path(path)
    state = _read("load_components", path)
    found: dict[str, dict[str, Tensor]] = {}
    for name, t in state.items():
        if match := _FACTOR.fullmatch(name):
            # an early toy model of superposition had one pair of factors and no module around it
            found.setdefault(match["layer"] or "linear1", {})[match["factor"]] = _with_instances(t, 3)
    if not found:
        raise ValueError(f"load_components: {path} must hold factors A and B, got {', '.join(state) or 'nothing'}")
    if halves := [name for name, pair in found.items() if len(pair) < 2]:
        raise ValueError(f"load_components: {path} must hold A and B of every layer, got one of {', '.join(halves)}")
    with torch.random.fork_rng(devices=[]):  # making them must not use up the caller's random numbers
        return Components.from_factors(
            {name: (pair["A"], pair["B"]) for name, pair in found.items()},
            {"linear2": "linear1"} if "linear1" in found else {},
        )


def state_of(target: Target, components: Components) -> dict[str, Tensor]:
    """What the research code's component model would save: the factors, and what is copied from the target."""
    state = {name: t.detach().squeeze(1) for name, t in target.named_parameters() if not name.endswith("weight")}
    state |= {name: t.detach() for name, t in target.named_buffers()}
    owners = [name for name in target.decomposed if name not in ties(target.decomposed)]
    exported = components.export()
    return {n: t.clone() for n, t in state.items()} | {f"{n}.{k}": exported[f"{n}.{k}"] for n in owners for k in "AB"}
