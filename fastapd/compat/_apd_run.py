"""A run of the research code's without the research code: its configuration, its targets, its random numbers.

Random numbers are drawn in the order in which the research code's scripts draw them, from torch's own generator: the
target's initial weights (which its checkpoint then replaces), the components, the batches. The same file and seed give
the same trajectory.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fastapd.compat._apd_config import Config
from fastapd.compat._apd_files import load_target, state_of, target_path, train_config
from fastapd.compat._apd_models import TMS, NotKnownError, ResidualMLP, Target, ties
from fastapd.compat._apd_optimize import Callbacks, batches, method_of, rate_of, train
from fastapd.compat._apd_patch import is_active, patch
from fastapd.compat._apd_steps import KnownStep
from fastapd.components import Components
from fastapd.decomposition import Decomposition
from fastapd.model import ComponentModel, find_sites

_EXACTLY = {f"exactly_{word}_active": n for n, word in enumerate(("one", "two", "three", "four", "five"), 1)}
_TARGET_FILES = ("tms_train_config.yaml", "resid_mlp_train_config.yaml", "label_coeffs.json")


class Features:
    """Batches [batch, n_instances, n_features] of sparse features, drawn from torch's own generator as there.

    Args:
        config: Probability, kind of data and batch size.
        target: Its sizes; a residual MLP's features lie in [-1, 1], a toy model's in [0, 1].
        device: Where they are drawn.
        synced: Groups of features that are active together, from the target's train config.
    """

    def __init__(self, config: Config, target: Target, device: Any, synced: list[list[int]] | None = None) -> None:
        first = target.W_E if isinstance(target, ResidualMLP) else target.linear1.weight
        self.batch, self.n_instances, self.n_features = config.batch_size, first.shape[0], first.shape[1]
        self.low = -1.0 if isinstance(target, ResidualMLP) else 0.0
        self.probability = config.task_config.feature_probability
        self.kind, self.device, self.synced = config.task_config.data_generation_type, device, synced
        if (active := _EXACTLY.get(self.kind, 0)) > self.n_features:
            raise ValueError(
                f"optimize: data_generation_type must fit {self.n_features} features, got {self.kind}, {active} of them"
            )

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device) * (1.0 - self.low) + self.low

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = self._exactly(_EXACTLY[self.kind]) if self.kind in _EXACTLY else self._independently()
            yield x, x

    def _independently(self) -> Tensor:
        x = self._uniform(self.batch * self.n_instances, self.n_features)
        x = x * (torch.rand_like(x) < self.probability)
        x = x.view(self.batch, self.n_instances, self.n_features)
        for group in self.synced or []:
            members = torch.zeros(self.n_features, dtype=torch.bool, device=x.device)
            members[group] = True
            together = (x[..., group] != 0).any(-1, keepdim=True) & members
            # the research code has the ends of the range the wrong way round
            values = torch.rand(x.shape, device=self.device) * (self.low - 1.0) + 1.0
            x = torch.where(together, values, x)
        return x

    def _exactly(self, n: int) -> Tensor:
        shape = self.batch, self.n_instances, self.n_features
        order = torch.rand(shape, device=self.device).argsort(-1)[..., :n]
        return torch.zeros(shape, device=self.device).scatter_(-1, order, self._uniform(*shape[:2], n))


def _shape(target: Target, layer: str) -> tuple[int, ...]:
    return tuple(target.get_parameter(f"{layer}.weight").shape)


def initial_components(target: Target, config: Config) -> Components:
    """The components that the research code's script starts from after seeding; uses up the same random numbers."""
    if isinstance(target, TMS):
        n, n_features, n_hidden = target.linear1.weight.shape
        hidden = len(target.hidden_layers)
        for shape in [(n, n_features, n_hidden)] + [(n, n_hidden, n_hidden)] * hidden:
            nn.init.xavier_normal_(torch.empty(shape))  # the target's, which the checkpoint replaces
        rank, scale = config.m or min(n_features, n_hidden) + 1, 1.0
    else:
        n, n_features, d_embed = target.W_E.shape
        d_mlp = _shape(target, "layers.0.mlp_in")[-1]
        ends = [(n, n_features, d_embed), (n, d_embed, n_features)]
        for shape in ends + [(n, d_embed, d_mlp), (n, d_mlp, d_embed)] * len(target.layers):
            nn.init.kaiming_uniform_(torch.empty(shape))
        for shape in ends:
            nn.init.xavier_normal_(torch.empty(shape))
        rank, scale = config.m or min(d_embed, d_mlp), getattr(config.task_config, "init_scale", 1.0)
    factors = {}
    tied = ties(target.decomposed)
    for name in (name for name in target.decomposed if name not in tied):
        n, d_in, d_out = _shape(target, name)
        A, B = torch.empty(n, config.C, d_in, rank), torch.empty(n, config.C, rank, d_out)
        factors[name] = tuple(nn.init.xavier_normal_(factor, gain=scale) for factor in (A, B))
    with torch.random.fork_rng(devices=[]):
        return Components.from_factors(factors, tied)


def _seed(seed: int) -> None:
    import numpy as np

    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _claim(out: Path, config: Config, source: Path | None) -> None:
    """Writes what a run directory of the research code's holds from the start."""
    if (out / "final_config.yaml").exists():
        raise FileExistsError(f"optimize: out must be a new directory, got {str(out)!r}, which holds a run")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "final_config.yaml").open("w") as file:
        yaml.safe_dump(config.model_dump(mode="json"), file, indent=2)
    if source is not None:
        for path in (source, *(source.parent / name for name in _TARGET_FILES)):
            if path.is_file() and path.parent.resolve() != out.resolve():
                shutil.copyfile(path, out / path.name)


def _plain(
    config: Config,
    device: Any,
    data: Iterable[Any] | None,
    target: Target | None,
    plot_results_fn: Callable[..., Any] | None,
    out: Path | None,
    progress: bool,
) -> Decomposition:
    from tqdm import tqdm

    if getattr(config.task_config, "train_bias", False):
        raise NotImplementedError("optimize: task_config.train_bias must be false, as only components are trained")
    source = target_path(config) if target is None else None
    if target is None:
        target = load_target(config)
    kind = "residual_mlp" if isinstance(target, ResidualMLP) else "tms"
    if config.task_config.task_name != kind:
        raise ValueError(f"optimize: task_config.task_name must be {kind!r} for this target, got another")
    _seed(config.seed)
    components = initial_components(target, config).to(device)
    target = target.to(device)
    model = ComponentModel(target, find_sites(target, target.decomposed), components)
    try:
        method = method_of(config, components.n_instances)
    except NotKnownError as error:
        raise ValueError(f"optimize: {error}") from None
    result = Decomposition(model, method)
    synced = None if source is None else train_config(source).get("synced_inputs")
    if data is None:
        data = Features(config, target, device, synced)
    if out is not None:
        _claim(out, config, source)

    def write(line: str) -> None:
        if progress:
            tqdm.write(line)

    def log(step: int, values: dict[str, Any]) -> None:
        if result.history and result.history[-1]["step"] == step:
            result.history[-1].update({key: float(value) for key, value in values.items()})
        else:
            result.history.append({"step": step, **values})

    def save(step: int) -> None:
        assert out is not None
        torch.save(state_of(target, components), out / f"spd_model_{step}.pth")
        write(f"Saved model to {out / f'spd_model_{step}.pth'}")

    def plot(step: int, mask: Tensor | None, batch: Tensor) -> None:
        assert plot_results_fn is not None
        plot_results_fn(
            model=result, target_model=target, step=step, out_dir=out, device=device, config=config, topk_mask=mask,
            batch=batch,
        )  # fmt: skip

    callbacks = Callbacks(write, plot if plot_results_fn is not None else None, save if out is not None else None, log)
    steps = tqdm(range(config.steps + 1), ncols=0, disable=not progress)
    form = KnownStep(model, method, config)
    train(form, config, device, batches(data, write), rate_of(config), steps, callbacks)
    return result


def optimize(
    model: Any = None,
    config: Any = None,
    device: Any = "cpu",
    dataloader: Iterable[Any] | None = None,
    target_model: Any = None,
    param_names: list[str] | None = None,
    plot_results_fn: Callable[..., Any] | None = None,
    out_dir: str | Path | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
) -> Decomposition | None:
    """Runs a configuration of the research code's on fastapd, with or without the research code.

    `optimize(config)` with a `Config`, a mapping or a YAML file loads the target that it names and decomposes it.
    `optimize(model=.., config=.., device=.., dataloader=.., target_model=.., param_names=..)` with the research code's
    own models trains those in place, as `patch()` makes `spd.run_spd.optimize` do.

    Args:
        model: The research code's component model; or the configuration, as the only positional argument.
        config: A `Config`, what one is made of, or the research code's own.
        device: Where to run.
        dataloader: Batches [batch, n_instances, n_features], or tuples that begin with one; None draws them as the
            research code does.
        target_model: The research code's target; or a target from `load_target`, in place of the one that is named.
        param_names: The decomposed layers; only with the research code's models.
        plot_results_fn: Called as in the research code. Without its models `model` is the `Decomposition` so far.
        out_dir, out: The run directory, two names for one thing: `spd_model_<step>.pth`, and without the research
            code's models also `final_config.yaml` and the target's files, which the research code can load.
        progress: Whether to print losses and show a bar; only without the research code's models.

    Returns:
        The `Decomposition`, its `history` holding what was printed; None for the research code's models.

    Raises:
        ConfigError: If the configuration is not valid.
        ValueError: If the settings contradict each other or the target.
        ImportError: If models are given and the research code is not there.
        FileExistsError: If `out` already holds a run.
    """
    if config is None and not isinstance(model, nn.Module):
        model, config = None, model
    if config is None:
        raise ValueError("optimize: config must be given, got nothing")
    folder = out_dir if out is None else out
    folder = None if folder is None else Path(folder)
    if model is not None:
        missing = [n for n, v in (("dataloader", dataloader), ("target_model", target_model),
                                  ("param_names", param_names)) if v is None]  # fmt: skip
        if missing:
            raise ValueError(f"optimize: {', '.join(missing)} must be given with a model, got nothing")
        with contextlib.nullcontext() if is_active() else patch():
            run_spd: Any = importlib.import_module("spd.run_spd")
            run_spd.optimize(model, config, device, dataloader, target_model, param_names, plot_results_fn, folder)
        return None
    if isinstance(config, (str, Path)):
        config = Config.from_yaml(config)
    elif isinstance(config, Mapping):
        config = Config(**config)
    elif not isinstance(config, Config):
        config = Config(**config.model_dump(mode="json"))
    if target_model is not None and not isinstance(target_model, (TMS, ResidualMLP)):
        raise ValueError(
            f"optimize: target_model must be from load_target without a model, got {type(target_model).__name__}"
        )
    return _plain(config, device, dataloader, target_model, plot_results_fn, folder, progress)
