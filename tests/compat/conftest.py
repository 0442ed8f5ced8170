"""The research code, where it is: an installed `spd` of ApolloResearch/apd, or the checkout FASTAPD_APD_REPO names.

What it imports and these tests do not need is replaced by stand-ins where it is missing: wandb, dotenv, fire. Its
logger always is, as it writes into the checkout. Nothing of it is changed on disk.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastapd.compat import apd

NAMES = (
    "run_spd", "utils", "hooks", "module_utils", "models.base", "models.components", "experiments.tms.models",
    "experiments.resid_mlp.models", "experiments.resid_mlp.resid_mlp_dataset", "plotting",
)  # fmt: skip


def _stand_in(name: str, **attributes: Any) -> None:
    if importlib.util.find_spec(name.partition(".")[0]) is None or name == "spd.log" or "." in name:
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        sys.modules.setdefault(name, module)


class _Quiet:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def load_spd() -> dict[str, types.ModuleType] | str:
    """The research code's modules by name, or why there are none."""
    root = os.environ.get("FASTAPD_APD_REPO")
    if root is not None and root not in sys.path:
        sys.path.append(root)
    if importlib.util.find_spec("spd") is None:
        return "FASTAPD_APD_REPO names no checkout of ApolloResearch/apd, and no package spd is installed"
    quiet = _Quiet()
    if importlib.util.find_spec("wandb") is None:
        _stand_in("wandb", Api=None, log=quiet.log, Image=lambda image: image, save=quiet.save, require=quiet.require)
        _stand_in("wandb.apis")
        _stand_in("wandb.apis.public", Run=object, File=object)
    _stand_in("dotenv", load_dotenv=quiet.load)
    _stand_in("fire", Fire=quiet.fire)
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        importlib.import_module("spd")
        _stand_in("spd.log", logger=quiet)
        return {name: importlib.import_module(f"spd.{name}") for name in NAMES}
    except ImportError as error:
        return f"the package spd cannot be imported: {error}"
    finally:
        sys.dont_write_bytecode = bytecode


@dataclasses.dataclass
class Spd:
    """The research code: its modules, and small pairs of its models."""

    modules: dict[str, types.ModuleType]

    def __getattr__(self, name: str) -> Any:
        """A function or class of `spd.utils` or `spd.run_spd`, as it is now."""
        for module in ("run_spd", "utils", "experiments.tms.models", "experiments.resid_mlp.models"):
            if hasattr(self.modules[module], name):
                return getattr(self.modules[module], name)
        raise AttributeError(name)

    def tms(self, C: int = 6, m: int | None = 3, n: int = 2, hidden: int = 0, seed: int = 0) -> tuple[Any, Any]:
        """(model, target) of a toy model of superposition with 5 features in 2 dimensions."""
        torch.manual_seed(seed)
        sizes = {"n_instances": n, "n_features": 5, "n_hidden": 2, "n_hidden_layers": hidden, "device": "cpu"}
        target = self.TMSModel(self.TMSModelConfig(**sizes))
        target.b_final.data.uniform_(-0.1, 0.1)
        model = self.TMSSPDModel(self.TMSSPDModelConfig(**sizes, C=C, m=m, bias_val=0.0))
        model.b_final.data.copy_(target.b_final.data)
        model.b_final.requires_grad = False
        return model, target

    def mlp(
        self, C: int = 7, m: int | None = 3, n: int = 1, layers: int = 2, bias: bool = True, act: str = "relu"
    ) -> tuple[Any, Any]:
        """(model, target) of a residual MLP with 6 features, 8 dimensions and 4 neurons a layer."""
        torch.manual_seed(1)
        sizes = {
            "n_instances": n, "n_features": 6, "d_embed": 8, "d_mlp": 4, "n_layers": layers, "act_fn_name": act,
            "apply_output_act_fn": False, "in_bias": bias, "out_bias": bias, "init_scale": 2.0,
        }  # fmt: skip
        target = self.ResidualMLPModel(self.ResidualMLPConfig(**sizes))
        model = self.ResidualMLPSPDModel(self.ResidualMLPSPDConfig(**sizes, C=C, m=m))
        with torch.no_grad():
            for name, value in target.named_parameters():
                value.normal_(0, 0.5)
                if "bias" in name or name.startswith("W_"):
                    own = model.get_parameter(name)
                    own.copy_(value)
                    own.requires_grad = False
        return model, target

    def caches(self, model: Any, target: Any, batch: torch.Tensor) -> dict[str, Any]:
        """The arguments of `calculate_attributions` but the type."""
        target_out, cache = target.run_with_cache(batch, names_filter=lambda k: k.endswith((".hook_pre", ".hook_post")))
        out, own = model.run_with_cache(
            batch, names_filter=lambda k: k.endswith((".hook_post", ".hook_component_acts"))
        )
        return {
            "model": model,
            "batch": batch,
            "out": out,
            "target_out": target_out,
            "pre_weight_acts": {k: v for k, v in cache.items() if k.endswith("hook_pre")},
            "post_weight_acts": {k: v for k, v in cache.items() if k.endswith("hook_post")},
            "component_acts": {k: v for k, v in own.items() if k.endswith("hook_component_acts")},
        }

    def config(self, kind: str, **settings: Any) -> Any:
        task = {"feature_probability": 0.3, "pretrained_model_path": "wandb:none", "task_name": kind}
        if kind == "tms":
            task |= {"train_bias": False, "bias_val": 0.0}
        common = {"C": 6, "batch_size": 32, "steps": 50, "print_freq": 1, "lr": 1e-2}
        return self.Config(**{**common, **settings}, task_config=task)

    def loader(self, kind: str, n: int, batch: int, active: str) -> Any:
        if kind == "tms":
            data = self.SparseFeatureDataset(n, 5, 0.3, "cpu", data_generation_type=active)
        else:
            data = self.modules["experiments.resid_mlp.resid_mlp_dataset"].ResidualMLPDataset(
                n, 6, 0.3, "cpu", calc_labels=False, data_generation_type=active
            )
        return self.DatasetGeneratedDataLoader(data, batch_size=batch)

    def run(
        self, pair: tuple[Any, Any], kind: str, config: Any, active: str = "at_least_zero_active", **more: Any
    ) -> list[str]:
        """`optimize` from one seed on copies of a pair; what it printed. The trained copy is `self.model`."""
        self.model, self.target = copy.deepcopy(pair)
        lines: list[str] = []
        run_spd = self.modules["run_spd"]
        own = run_spd.tqdm

        class Quiet:
            def __new__(cls, items: Any, **_: Any) -> Any:
                return items

            write = staticmethod(lines.append)

        names = [n.removesuffix(".A") for n, _ in self.model.named_parameters() if n.endswith(".A")]
        names += ["linear2"] if kind == "tms" else []
        run_spd.tqdm = Quiet
        torch.manual_seed(5)
        try:
            run_spd.optimize(
                model=self.model, config=config, device="cpu", target_model=self.target, param_names=names,
                dataloader=self.loader(kind, self.model.n_instances, config.batch_size, active), **more,
            )  # fmt: skip
        finally:
            run_spd.tqdm = own
        return lines


@pytest.fixture(scope="session")
def _modules() -> dict[str, types.ModuleType]:
    found = load_spd()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture
def spd(_modules: dict[str, types.ModuleType]) -> Iterator[Spd]:
    """The research code as it is; a test that patches it need not clean up."""
    apd.unpatch()
    yield Spd(_modules)
    apd.unpatch()


@pytest.fixture
def patched() -> Any:
    """`with patched(): ...` runs on fastapd."""

    @contextlib.contextmanager
    def on(**flags: Any) -> Iterator[None]:
        with apd.patch(**flags):
            yield

    return on
