"""The only importer of the compiled modules `fastapd._C` and `fastapd._C_cuda`; keeps the reason when one is missing.

torch is imported first: it brings its own libgomp, and a module built with OpenMP that is imported afterwards shares
that runtime and obeys `torch.set_num_threads`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch  # noqa: F401  (see above)

from fastapd import _env


class Native(NamedTuple):
    """A compiled module, or None and why it is missing."""

    module: ModuleType | None
    reason: str


def build_info() -> dict:
    """What `setup.py` noted when it built (or did not build) the native modules; empty when it left no note."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.cache
def load(name: str) -> Native:
    """Imports `fastapd.<name>` once. A module that is absent is silent; one that is present but broken warns once."""
    if importlib.util.find_spec(f"fastapd.{name}") is None:
        return Native(None, f"fastapd.{name} was not built: {build_info().get(name) or 'no build note was left'}")
    try:
        module = importlib.import_module(f"fastapd.{name}")
        if name == "_C":
            _set_cpu_level(module)
        return Native(module, "")
    except ImportError as error:
        reason = f"fastapd.{name} is installed but cannot be imported: {error}"
        warnings.warn(f"{reason}; falling back to the next backend", RuntimeWarning, stacklevel=2)
        return Native(None, reason)


def _set_cpu_level(module: ModuleType) -> None:
    wanted = _env.cpu_capability()
    if wanted is None:
        return
    if wanted not in module.cpu_levels():
        raise _env.SettingError(
            f"FASTAPD_CPU_CAPABILITY must be one of {', '.join(module.cpu_levels())} on this machine, got {wanted!r}"
        )
    module.set_cpu_level(wanted)
