"""The public names, pinned, and what importing them costs."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys

import pytest
from torch import nn

import fastapd
from fastapd import functional, ops
from fastapd import nn as layers

NAMES = [
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
OPS = [
    "Selection",
    "TangentBarrier",
    "TangentSource",
    "attribution_reduce",
    "attribution_tangent",
    "batch_topk",
    "component_forward",
    "component_forward_selected",
    "component_sum",
    "component_sum_loss",
    "component_svdvals",
    "sample_topk",
    "schatten",
    "schatten_factored",
]
FUNCTIONAL = [
    "ablation_attributions",
    "act_recon_loss",
    "activation_attributions",
    "batch_topk_mask",
    "component_sum",
    "component_weights",
    "faithfulness_loss",
    "grad_attributions",
    "lp_sparsity_loss",
    "lp_weights",
    "lr_schedule",
    "masked_linear",
    "output_gradients",
    "param_match_loss",
    "recon_kl",
    "recon_mse",
    "schatten_loss",
    "tangent_gradient_",
    "topk_mask",
    "unit_norm_",
]
DECOMPOSITION = [
    "ablate",
    "ablation_losses",
    "attributions",
    "directions",
    "edited",
    "effective_rank",
    "forward",
    "from_factors",
    "from_matrices",
    "from_svd",
    "last_batch",
    "load",
    "made",
    "match",
    "metrics",
    "parts",
    "path_effect",
    "plan",
    "save",
    "score",
    "select",
    "similarity",
    "spectra",
    "state_dict",
]
DROP_IN = [
    "Config",
    "ResidualMLPTaskConfig",
    "TMSTaskConfig",
    "load_components",
    "load_target",
    "optimize",
    "patch",
    "unpatch",
]
TRACKERS = ["Row", "Sink", "numbers", "tensorboard", "wandb"]
LAYERS = ["LinearComponents", "TransposedLinearComponents"]
HEAVY = ("torch", "matplotlib", "triton", "numpy", "scipy", "pydantic", "yaml", "safetensors", "tqdm", "tyro",
         "jaxtyping")  # fmt: skip


def _new_modules(*statements: str) -> list[set[str]]:
    """In a fresh interpreter, the modules that each statement adds."""
    code = f"""
import json, sys
found = []
for statement in {statements!r}:
    before = set(sys.modules)
    exec(statement)
    found.append(sorted(set(sys.modules) - before))
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [set(modules) for modules in json.loads(done.stdout)]


def test_public_names_are_pinned():
    assert fastapd.__all__ == NAMES == dir(fastapd)
    assert ops.__all__ == OPS
    public = {name for name in vars(ops) if not name.startswith("_")}
    assert [name for name in dir(fastapd.Decomposition) if not name.startswith("_")] == DECOMPOSITION
    assert importlib.import_module("fastapd.compat.apd").__all__ == DROP_IN
    assert fastapd.trackers.__all__ == TRACKERS
    assert public == set(OPS)
    assert functional.__all__ == FUNCTIONAL
    assert {name for name in vars(functional) if not name.startswith("_")} == set(FUNCTIONAL)
    assert layers.__all__ == LAYERS


def test_public_names_resolve():
    for name in NAMES:
        assert getattr(fastapd, name) is not None
    for name in OPS:
        assert getattr(ops, name).__module__.startswith("fastapd.ops.")
    for name in set(FUNCTIONAL) - {"component_sum"}:
        assert getattr(functional, name).__module__.startswith("fastapd.functional.")
    assert functional.component_sum is ops.component_sum
    for name in LAYERS:
        assert getattr(layers, name).__module__ == "fastapd.nn"
    namespace: dict[str, object] = {}
    exec("from fastapd import *", namespace)  # noqa: S102
    assert set(NAMES) <= set(namespace)


def test_public_names_are_those_of_their_modules():
    from fastapd.backends import explain, use_backend
    from fastapd.components import Components
    from fastapd.config import APD, Optimiser, RunConfig
    from fastapd.decomposition import Decomposition
    from fastapd.training import DivergedError, decompose

    for value in (explain, use_backend, Components, APD, Optimiser, RunConfig, Decomposition, DivergedError, decompose):
        assert getattr(fastapd, value.__name__) is value
    assert fastapd.ops is ops
    assert fastapd.functional is functional
    assert fastapd.nn is layers


@pytest.mark.parametrize("name", ["Decompose", "experiments_", "_nothing"])
def test_public_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"^module 'fastapd' has no attribute '{name}'$"):
        getattr(fastapd, name)
    assert not hasattr(ops, name)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "__version__"])
def test_public_names_have_docstrings(name):
    value = getattr(fastapd, name)
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own and own.strip().splitlines()[0].rstrip().endswith(tuple(".:;"))
    for method, member in vars(value).items() if inspect.isclass(value) else ():
        if not method.startswith("_") and inspect.isfunction(member) and not hasattr(nn.Module, method):
            assert member.__doc__, f"{name}.{method}"


@pytest.mark.parametrize("name", OPS)
def test_ops_docstrings_say_what_goes_in_and_out(name):
    op = getattr(ops, name)
    doc = inspect.getdoc(op)
    assert doc
    if inspect.isclass(op):
        assert "Attributes:" in doc
        for field in op._fields:
            assert f"\n    {field}: " in doc
        return
    for section in ("Args", "Returns", "Raises"):
        assert f"\n{section}:\n" in doc, section
    for argument in inspect.signature(op).parameters:
        assert argument in doc.split("\nArgs:\n")[1].split("\nReturns:\n")[0], argument


def test_decompose_docstring_names_every_argument():
    doc = inspect.getdoc(fastapd.decompose)
    for argument in inspect.signature(fastapd.decompose).parameters:
        assert f"\n    {argument}: " in doc, argument
    assert "\nReturns:\n" in doc and "\nRaises:\n" in doc


def test_import_loads_nothing_heavy():
    (new,) = _new_modules("import fastapd")
    assert new.isdisjoint(HEAVY)
    assert {name for name in new if name.partition(".")[0] == "fastapd"} == {"fastapd"}


def test_import_after_torch_adds_a_handful():
    _, new = _new_modules("import torch", "import fastapd")
    assert len(new) <= 5, sorted(new)


def test_import_of_what_a_step_runs_on_needs_torch_alone():
    """A GPU machine without the package's other dependencies runs the ops, the model and their losses."""
    rest = ("import fastapd.ops", "import fastapd.evaluation", "import fastapd.attributions, fastapd.components",
            "import fastapd.functional, fastapd.nn")  # fmt: skip
    _, *found = _new_modules("import torch", *rest, "import fastapd; fastapd.decompose")
    for new in found:
        assert new.isdisjoint(set(HEAVY) - {"torch", "numpy"})


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert fastapd.__version__ == version("fastapd")
