"""fastapd: a fast engine for attribution-based parameter decomposition.

Names are loaded when they are first used, so `import fastapd` does no work; `fastapd.ops` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastapd import functional as functional
    from fastapd import nn as nn
    from fastapd import ops as ops
    from fastapd import trackers as trackers
    from fastapd._precision import use_precision as use_precision
    from fastapd.backends import explain as explain
    from fastapd.backends import use_backend as use_backend
    from fastapd.components import Components as Components
    from fastapd.config import APD as APD
    from fastapd.config import Optimiser as Optimiser
    from fastapd.config import RunConfig as RunConfig
    from fastapd.decomposition import Decomposition as Decomposition
    from fastapd.training import DivergedError as DivergedError
    from fastapd.training import decompose as decompose

_WHERE = {
    "APD": "fastapd.config",
    "Components": "fastapd.components",
    "Decomposition": "fastapd.decomposition",
    "DivergedError": "fastapd.training",
    "Optimiser": "fastapd.config",
    "RunConfig": "fastapd.config",
    "decompose": "fastapd.training",
    "explain": "fastapd.backends",
    "functional": "",
    "nn": "",
    "ops": "",
    "trackers": "",
    "use_backend": "fastapd.backends",
    "use_precision": "fastapd._precision",
}

__all__ = [
    "APD",
    "Components",
    "Decomposition",
    "DivergedError",
    "Optimiser",
    "RunConfig",
    "__version__",
    "decompose",
    "explain",
    "functional",
    "nn",
    "ops",
    "trackers",
    "use_backend",
    "use_precision",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fastapd' has no attribute {name!r}")
    if not _WHERE[name]:
        return importlib.import_module(f"fastapd.{name}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
