"""Puts fastapd's functions in the place of the research code's, everywhere it has them, and takes them back.

The research code imports its functions by name, so that replacing an attribute of the module that defines it is not
enough: every `spd.*` module that is loaded, and the script, is searched for globals that *are* the old object. Modules
that are imported later find the new one at its source.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

from fastapd.compat import _apd_functions as ours

_MODULES = ("spd.utils", "spd.run_spd", "spd.models.components", "spd.models.base")

_FUNCTIONS = {
    "spd.utils": (
        "calc_grad_attributions",
        "collect_subnetwork_attributions",
        "calc_ablation_attributions",
        "calc_activation_attributions",
        "calculate_attributions",
        "calc_topk_mask",
        "calc_recon_mse",
    ),
    "spd.run_spd": (
        "calc_schatten_loss",
        "calc_param_match_loss",
        "calc_lp_sparsity_loss",
        "calc_act_recon",
        "optimize",
    ),
}
"""By the module that defines them. `run_spd_forward_pass` stays: all it does is call these."""

_WEIGHT = property(ours.component_layer_weight)
_METHODS: dict[tuple[str, str, str], Any] = {
    ("spd.models.components", "LinearComponent", "forward"): ours.component_layer,
    ("spd.models.components", "LinearComponent", "weight"): _WEIGHT,
    ("spd.models.components", "TransposedLinearComponent", "weight"): _WEIGHT,
    ("spd.models.base", "SPDModel", "set_As_to_unit_norm"): ours.set_As_to_unit_norm,
}

_LEFT_AS_REFERENCE = ("optimize", "calc_ablation_attributions", "set_As_to_unit_norm")
"""What `as_reference` does not replace, because the research code's own is what has to be reproduced."""


class _Active(NamedTuple):
    as_reference: bool
    functions: list[tuple[Any, Any]]
    """(old, new)."""
    methods: list[tuple[type, str, Any]]
    """Class, attribute and what was there."""


_active: _Active | None = None


def _where(spec: Any) -> str:
    return next(iter(spec.submodule_search_locations or [spec.origin or "?"]))


def _find() -> None:
    """Refuses where `spd` is missing or another package of that name; reads files, runs nothing of it."""
    try:
        spec = importlib.util.find_spec("spd")
    except ValueError:  # a stand-in in sys.modules
        spec = None
    if spec is None:
        raise ImportError(
            "patch: spd, the package of ApolloResearch/apd, must be installed, got no such package; "
            "install it or put a checkout on the path, or use fastapd.compat.apd.optimize, which does without"
        )
    folder = Path(_where(spec))
    expected = folder / "models" / "base.py", folder / "module_utils.py", folder / "run_spd.py", folder / "utils.py"
    if all(path.is_file() for path in expected) and "def calculate_attributions" in expected[-1].read_text("utf-8"):
        return
    successor = (folder / "models" / "component_model.py").exists() or (folder / "configs.py").exists()
    other = "goodfire-ai/spd, its successor of the same import name" if successor else "another package of that name"
    raise ImportError(f"patch: spd must be the package of ApolloResearch/apd, got {other} at {folder}")


def _load() -> dict[str, ModuleType]:
    _find()
    return {name: importlib.import_module(name) for name in _MODULES}


def _rebind(pairs: list[tuple[Any, Any]]) -> None:
    """In `spd.*` and the script, every global that is one object becomes the other."""
    by_id = {id(old): new for old, new in pairs}
    for name, module in list(sys.modules.items()):
        if not (name in ("spd", "__main__") or name.startswith("spd.")) or not isinstance(module, ModuleType):
            continue
        for key, value in list(vars(module).items()):
            if id(value) in by_id:
                setattr(module, key, by_id[id(value)])


def is_active() -> bool:
    """Whether the research code runs on fastapd."""
    return _active is not None


def replaced_elsewhere() -> list[str]:
    """Functions that the loop calls and that somebody has replaced after us."""
    if _active is None:
        return []
    run_spd, utils = sys.modules["spd.run_spd"], sys.modules["spd.utils"]
    news = {new.__name__: new for _, new in _active.functions}
    found = []
    for name, new in news.items():
        for module in (run_spd, utils):
            if getattr(module, name, new) is not new:
                found.append(f"{module.__name__}.{name}")
    return found


class Patch:
    """What `patch` returns: as a context manager it leaves things as they were before that call."""

    def __init__(self, before: bool | None) -> None:
        self._before = before

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            unpatch()
        else:
            patch(self._before)


def _function(modules: dict[str, ModuleType], module: str, name: str, new: Any) -> Any:
    """The research code's own function, if it is the one that is meant."""
    old = getattr(modules[module], name, None)
    if old is None or list(inspect.signature(old).parameters) != list(inspect.signature(new).parameters):
        raise ImportError(
            f"patch: {module}.{name} must be that of ApolloResearch/apd at commit 4e29d43, "
            f"{name}{inspect.signature(new)}, got {'nothing' if old is None else inspect.signature(old)}"
        )
    return old


def _class(modules: dict[str, ModuleType], module: str, owner: str, name: str) -> type:
    cls = getattr(modules[module], owner, None)
    if not isinstance(cls, type) or name not in vars(cls):
        raise ImportError(f"patch: {module}.{owner} must have {name}, as ApolloResearch/apd does, got none")
    return cls


def patch(as_reference: bool = False) -> Patch:
    """Makes an installed ApolloResearch/apd run on fastapd, with no other change; `unpatch()` restores it.

    Call it before or after importing `spd`. Functions keep their names, signatures and shapes; `optimize` keeps what it
    writes, prints and plots, and the order in which it draws random numbers.

    Args:
        as_reference: Whether to reproduce what the research code gets wrong at commit 4e29d43: ablation attributions
            that raise, exact top-k that loses a pair to rounding, gradients that pile up in the target, NaN where a
            column of A is zero. `optimize` is then its own loop, over the functions here.

    Returns:
        A context manager: `with patch(): ...` leaves everything as it was before.

    Raises:
        ImportError: If `spd` is not installed, or is another package of that name.
    """
    global _active
    before = None if _active is None else _active.as_reference
    if before == as_reference:
        return Patch(before)
    from fastapd.compat._apd_optimize import optimize

    unpatch()
    modules = _load()
    left = _LEFT_AS_REFERENCE if as_reference else ()
    functions, methods = [], []
    for module, names in _FUNCTIONS.items():
        for name in names:
            new = optimize if name == "optimize" else getattr(ours, name)
            old = _function(modules, module, name, new)
            if name not in left:
                functions.append((old, new))
    for module, owner, name in _METHODS:
        cls = _class(modules, module, owner, name)
        if name not in left:
            methods.append((cls, name, vars(cls)[name]))
    # nothing is refused from here on
    _active = _Active(as_reference, functions, methods)
    ours.settings.as_reference = as_reference
    _rebind(functions)
    for (module, owner, name), new in _METHODS.items():
        if name not in left:
            setattr(getattr(modules[module], owner), name, new)
    return Patch(before)


def unpatch() -> None:
    """Puts the research code's own functions back, also into modules that were imported in between."""
    global _active
    if _active is None:
        return
    _rebind([(new, old) for old, new in _active.functions])
    for cls, name, old in _active.methods:
        setattr(cls, name, old)
    _active = None
    ours.settings.as_reference = False
