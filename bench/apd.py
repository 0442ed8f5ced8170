"""The research code itself as a contender: its own `optimize` loop, driven one step at a time on our batch and weights.

FASTAPD_APD_REPO names a checkout of ApolloResearch/apd (commit 4e29d43 is the one we know); einops has to be
installed. Nothing of it is copied or changed. What it imports and a step does not use is replaced while it is loaded:
wandb, dotenv, and its logger, which would write into the checkout. Its loop runs in a thread of its own and takes a
batch when we ask for a step; its progress bar is left out.
"""

from __future__ import annotations

import importlib
import os
import queue
import sys
import threading
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench.cases import Problem, method

NEVER = 10**9
TINY = 1e-30
"""The learning rate: it has to be positive there, and this one changes no float32 parameter of ours."""


def repository() -> str | None:
    return os.environ.get("FASTAPD_APD_REPO")


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    return module


class _Quiet:
    """tqdm without a bar, and a logger that says nothing."""

    def __init__(self, items: Any = (), **_: Any) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)

    @staticmethod
    def write(*_: Any, **__: Any) -> None:
        pass

    info = warning = debug = error = write


def _load() -> dict[str, types.ModuleType]:
    """The modules of the checkout that a step needs."""
    root = repository()
    assert root is not None, "FASTAPD_APD_REPO"
    stubs = {
        "wandb": _module("wandb", Api=None, log=_Quiet.write, Image=None, save=_Quiet.write),
        "wandb.apis": _module("wandb.apis"),
        "wandb.apis.public": _module("wandb.apis.public", Run=object, File=object),
        "dotenv": _module("dotenv", load_dotenv=_Quiet.write),
        "spd.log": _module("spd.log", logger=_Quiet()),
    }
    names = ["run_spd", "utils", "experiments.tms.models", "experiments.resid_mlp.models"]
    before = {name: sys.modules.get(name) for name in stubs}
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, root)
    sys.modules.update(stubs)
    try:
        modules = {name: importlib.import_module(f"spd.{name}") for name in names}
    finally:
        sys.path.remove(root)
        sys.dont_write_bytecode = bytecode
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    modules["run_spd"].__dict__["tqdm"] = _Quiet
    return modules


def why_not() -> str | None:
    """The reason why the research code cannot run here, None if it can."""
    root = repository()
    if root is None:
        return "FASTAPD_APD_REPO names no checkout of ApolloResearch/apd"
    try:
        _modules()
    except ImportError as error:
        return f"the checkout that FASTAPD_APD_REPO names cannot be imported: {error}"
    return None


_loaded: dict[str, types.ModuleType] = {}


def _modules() -> dict[str, types.ModuleType]:
    if not _loaded:
        _loaded.update(_load())
    return _loaded


class Found(NamedTuple):
    """What a step found: its losses by name, attributions and mask [b, n, C], and gradients by parameter."""

    terms: dict[str, Tensor]
    attributions: Tensor
    mask: Tensor
    gradients: dict[str, Tensor]


class _Stop(Exception):
    pass


class Step:
    """One step of the research code's loop at a time.

    Args:
        p: A TMS or a residual MLP; target and components of the research code get its numbers.
    """

    def __init__(self, p: Problem) -> None:
        self.modules = _modules()
        self.target, self.model, task = self._models(p)
        self._fill(p)
        settings = method(p.case)
        config = self.modules["run_spd"].Config(
            topk=p.case.topk, batch_topk=True, batch_size=p.case.batch, steps=NEVER, print_freq=NEVER, lr=TINY,
            param_match_coeff=settings.faithfulness, topk_recon_coeff=settings.minimality,
            act_recon_coeff=settings.activation_reconstruction or None, schatten_coeff=settings.simplicity,
            schatten_pnorm=settings.p, C=p.case.n_components, m=p.case.rank, unit_norm_matrices=settings.unit_norm,
            task_config={"feature_probability": 0.5, "pretrained_model_path": "wandb:none", **task},
        )  # fmt: skip
        self._asked: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(config, p.names), daemon=True)
        self._thread.start()
        self._wait()

    def _models(self, p: Problem) -> tuple[Any, Any, dict[str, Any]]:
        case = p.case
        if case.target == "tms":
            models = self.modules["experiments.tms.models"]
            sizes = {"n_instances": case.n_instances, "n_features": case.n_features, "n_hidden": case.width}
            sizes |= {"n_hidden_layers": 0, "device": "cpu"}
            target = models.TMSModel(models.TMSModelConfig(**sizes))
            components = {"C": case.n_components, "m": case.rank, "bias_val": 0.0}
            model = models.TMSSPDModel(models.TMSSPDModelConfig(**sizes, **components))
            model.b_final.requires_grad = False
            return target, model, {"task_name": "tms", "train_bias": False, "bias_val": 0.0}
        models = self.modules["experiments.resid_mlp.models"]
        sizes = {"n_instances": case.n_instances, "n_features": case.n_features, "d_embed": case.d_embed}
        sizes |= {"d_mlp": case.width, "n_layers": case.n_layers, "act_fn_name": "relu", "apply_output_act_fn": False}
        sizes |= {"in_bias": False, "out_bias": False, "init_scale": 1.0}
        target = models.ResidualMLPModel(models.ResidualMLPConfig(**sizes))
        components = {"C": case.n_components, "m": case.rank}
        model = models.ResidualMLPSPDModel(models.ResidualMLPSPDConfig(**sizes, **components))
        model.W_E.requires_grad = model.W_U.requires_grad = False
        return target, model, {"task_name": "residual_mlp"}

    @torch.no_grad()
    def _fill(self, p: Problem) -> None:
        """The numbers of our problem."""
        for name, W, At, B in zip(p.names, p.weights, p.Ats, p.Bs, strict=True):
            if p.case.tied and name == "linear2":
                continue
            self.target.get_submodule(name).weight.copy_(W)
            self.model.get_submodule(name).A.copy_(At.mT)
            self.model.get_submodule(name).B.copy_(B)
        for model in (self.target, self.model):
            if p.case.tied:
                model.b_final.copy_(p.model.target.get_parameter("b_final").squeeze(1))
            else:
                model.W_E.copy_(p.model.target.get_buffer("W_E"))
                model.W_U.copy_(p.model.target.get_buffer("W_U"))

    def _run(self, config: Any, names: list[str]) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps the number by thread
        try:
            self.modules["run_spd"].optimize(self.model, config, "cpu", self, self.target, names)
        except _Stop:
            self._done.put(None)
        except BaseException as error:
            self._done.put(error)

    def __iter__(self) -> Any:
        """The loop's data: it comes for the next batch when a step is over."""
        while True:
            self._done.put(None)
            x = self._asked.get()
            if x is None:
                raise _Stop
            yield x, None

    def _wait(self) -> None:
        if (error := self._done.get()) is not None:
            raise error

    def __call__(self, x: Tensor) -> None:
        self._asked.put(x)
        self._wait()

    def look(self, x: Tensor) -> Found:
        """A step that is looked into."""
        run = self.modules["run_spd"].__dict__
        terms: dict[str, Tensor] = {}
        kept: dict[str, Any] = {}
        names = {
            "calc_param_match_loss": "param_match",
            "calc_act_recon": "act_recon",
            "calc_schatten_loss": "schatten",
            "calc_recon_mse": "topk_recon",  # after the one of all components, which it overwrites
            "calculate_attributions": "attributions",
            "calc_topk_mask": "mask",
        }
        own = {name: run[name] for name in names}

        def watched(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                result = own[name](*args, **kwargs)
                (kept if names[name] in ("attributions", "mask") else terms)[names[name]] = result.detach()
                return result

            return call

        def before_update(*_: Any) -> None:
            kept["gradients"] = {
                name: t.grad.clone() for name, t in self.model.named_parameters() if t.grad is not None
            }

        handle = register_optimizer_step_pre_hook(before_update)
        run.update({name: watched(name) for name in names})
        try:
            self(x)
        finally:
            handle.remove()
            run.update(own)
        return Found(terms, kept["attributions"], kept["mask"], kept["gradients"])

    def close(self) -> None:
        self._asked.put(None)
        self._wait()
        self._thread.join()
