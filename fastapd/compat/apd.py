"""The research code of APD (ApolloResearch/apd, import name `spd`) on fastapd, with it and without it.

With it: `patch()` makes the installed package run on fastapd, `unpatch()` takes that back.

    import fastapd.compat.apd as apd
    apd.patch()
    from spd.run_spd import Config, optimize    # as before

Without it: its configurations, targets and checkpoints are read and run here.

    from fastapd.compat.apd import Config, optimize
    decomposition = optimize(Config.from_yaml("tms_topk_config.yaml"), out="out/tms")

docs/drop-in.md says what is the same and what is not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapd.compat._apd_config import Config as Config
    from fastapd.compat._apd_config import ResidualMLPTaskConfig as ResidualMLPTaskConfig
    from fastapd.compat._apd_config import TMSTaskConfig as TMSTaskConfig
    from fastapd.compat._apd_files import load_components as load_components
    from fastapd.compat._apd_files import load_target as load_target
    from fastapd.compat._apd_patch import patch as patch
    from fastapd.compat._apd_patch import unpatch as unpatch
    from fastapd.compat._apd_run import optimize as optimize

_WHERE = {
    "Config": "_apd_config",
    "ResidualMLPTaskConfig": "_apd_config",
    "TMSTaskConfig": "_apd_config",
    "load_components": "_apd_files",
    "load_target": "_apd_files",
    "optimize": "_apd_run",
    "patch": "_apd_patch",
    "unpatch": "_apd_patch",
}

__all__ = [
    "Config",
    "ResidualMLPTaskConfig",
    "TMSTaskConfig",
    "load_components",
    "load_target",
    "optimize",
    "patch",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fastapd.compat.apd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastapd.compat.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
