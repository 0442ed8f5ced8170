"""The published experiments, one file a family: target, data, defaults, and the check of its result.

A family is a module with `LAYERS`, `defaults()`, `train_target(config, progress)`, `data(config, purpose, batch)` and
`check(config, decomposition, initial)`. The training loop knows nothing of families.
"""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType

from fastapd.config import ConfigError, RunConfig

_FAMILIES = {"tms": "fastapd.experiments.tms"}


def family(config: RunConfig) -> ModuleType:
    """The module of a config's target family.

    Raises:
        ConfigError: If the family has no runnable experiment.
    """
    if config.target.family not in _FAMILIES:
        raise ConfigError(f"config: target.family must be one of {', '.join(_FAMILIES)}, got {config.target.family}")
    return importlib.import_module(_FAMILIES[config.target.family])


def targets(config: RunConfig) -> ModuleType:
    """The module with `LAYERS` and `untrained(config)` of a config's target, whether or not it can be run."""
    return importlib.import_module(f"fastapd.experiments.{config.target.family}")


def registered() -> dict[str, RunConfig]:
    """The paper's settings of every experiment, by name."""
    modules = [importlib.import_module(path) for path in _FAMILIES.values()]
    return {config.experiment: config for module in modules for config in module.defaults()}


def get(name: str) -> RunConfig:
    """The paper's settings of one experiment.

    Raises:
        ConfigError: If there is no experiment of that name.
    """
    known = registered()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"config: experiment must be one of {', '.join(known)}, got {name!r}{hint}")
