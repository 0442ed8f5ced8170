"""`patch` and `unpatch`: what is rebound where, what is restored, and which packages are refused."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fastapd.compat import _apd_functions as functions
from fastapd.compat import _apd_patch, apd
from fastapd.compat._apd_optimize import optimize

EVERYWHERE = ("run_spd", "utils", "plotting")


def _bindings(spd: Any) -> dict[tuple[str, str], Any]:
    """Every global of the loaded `spd` modules, and the methods that are replaced."""
    found = {
        (name, key): value
        for name, module in sys.modules.items()
        if name.startswith("spd") and isinstance(module, types.ModuleType)
        for key, value in vars(module).items()
    }
    for module, owner, name in _apd_patch._METHODS:
        found[owner, name] = vars(getattr(sys.modules[module], owner))[name]
    return found


def _same(a: dict[tuple[str, str], Any], b: dict[tuple[str, str], Any]) -> bool:
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)


def test_patch_rebinds_names_where_they_were_imported(spd):
    run_spd, utils, plotting = (spd.modules[name] for name in EVERYWHERE)
    old = utils.calculate_attributions
    assert run_spd.calculate_attributions is old is plotting.calculate_attributions
    apd.patch()
    for module in (run_spd, utils, plotting):
        assert module.calculate_attributions is functions.calculate_attributions
    assert run_spd.calc_topk_mask is utils.calc_topk_mask is functions.calc_topk_mask
    assert run_spd.optimize is optimize
    apd.unpatch()
    assert run_spd.calculate_attributions is old is plotting.calculate_attributions


def test_patch_rebinds_the_script_and_other_names(spd, monkeypatch):
    old = spd.modules["utils"].calc_topk_mask
    script = types.ModuleType("__main__")
    script.choose = old  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", script)
    with apd.patch():
        assert script.choose is functions.calc_topk_mask  # type: ignore[attr-defined]
    assert script.choose is old  # type: ignore[attr-defined]


def test_patch_reaches_modules_that_are_imported_later(spd, monkeypatch):
    old = spd.modules["utils"].calc_topk_mask
    monkeypatch.delitem(sys.modules, "spd.plotting")
    with apd.patch():
        later = importlib.import_module("spd.plotting")
        assert later.calc_topk_mask is functions.calc_topk_mask
    assert later.calc_topk_mask is old
    sys.modules["spd.plotting"] = spd.modules["plotting"]


def test_patch_and_unpatch_are_idempotent_and_restore_everything(spd):
    before = _bindings(spd)
    apd.unpatch()
    assert _same(_bindings(spd), before)
    apd.patch()
    patched = _bindings(spd)
    assert not _same(patched, before)
    apd.patch()
    assert _same(_bindings(spd), patched)
    apd.patch(as_reference=True)
    assert functions.settings.as_reference
    assert spd.modules["run_spd"].optimize is before["spd.run_spd", "optimize"]
    apd.patch()
    assert not functions.settings.as_reference
    assert _same(_bindings(spd), patched)
    apd.unpatch()
    apd.unpatch()
    assert _same(_bindings(spd), before)


def test_patch_as_a_context_manager_undoes_what_it_did(spd):
    before = _bindings(spd)
    with pytest.raises(KeyError), apd.patch():
        raise KeyError
    assert _same(_bindings(spd), before)
    apd.patch()
    patched = _bindings(spd)
    with apd.patch():
        pass
    assert _same(_bindings(spd), patched)
    with apd.patch(as_reference=True):
        assert functions.settings.as_reference
    assert not functions.settings.as_reference
    assert _same(_bindings(spd), patched)
    assert not _same(patched, before)


def test_patch_replaces_what_the_guide_names(spd):
    with apd.patch():
        for module, names in _apd_patch._FUNCTIONS.items():
            for name in names:
                assert getattr(sys.modules[module], name).__module__.startswith("fastapd.compat"), name


def _run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *sys.path])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def _package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "spd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


SUCCESSOR = {
    "__init__.py": "",
    "run_spd.py": "raise SystemExit('run')\n",
    "configs.py": "",
    "models/__init__.py": "",
    "models/component_model.py": "class ComponentModel: ...\n",
}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (SUCCESSOR, "got goodfire-ai/spd, its successor of the same import name at"),
        ({"__init__.py": "", "utils.py": ""}, "got another package of that name at"),
    ],
)
def test_patch_refuses_another_package_without_running_it(tmp_path, files, said):
    done = _run("import fastapd.compat.apd as apd; apd.patch()", _package(tmp_path, files))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: patch: spd must be the package of ApolloResearch/apd, ")
    assert said in last
    assert str(tmp_path) in last


def test_patch_refuses_another_commit(tmp_path):
    files = {
        "__init__.py": "",
        "module_utils.py": "",
        "models/__init__.py": "",
        "run_spd.py": "",
        "utils.py": "def calculate_attributions(): ...\ndef calc_grad_attributions(model): ...\n",
        "models/base.py": "class SPDModel: ...\n",
        "models/components.py": "class LinearComponent: ...\n",
    }
    done = _run("import fastapd.compat.apd as apd; apd.patch()", _package(tmp_path, files))
    last = done.stderr.strip().splitlines()[-1]
    assert "patch: spd.utils.calc_grad_attributions must be that of ApolloResearch/apd at commit 4e29d43" in last
    assert last.endswith("got (model)")


def test_patch_says_what_to_do_without_the_package(monkeypatch):
    monkeypatch.setattr(_apd_patch.importlib.util, "find_spec", lambda name: None)
    apd.unpatch()
    with pytest.raises(ImportError, match="must be installed, got no such package; install it"):
        apd.patch()
    apd.unpatch()


def _two_lines() -> str:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    found = re.search(r"<!-- drop-in -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert found is not None and len(found.group(1).split("\n\n")) == 2
    return found.group(1)


def test_the_readmes_two_lines_run_as_printed(spd):
    old = spd.modules["utils"].calc_grad_attributions
    try:
        exec(_two_lines(), {})  # noqa: S102  the README's own text
        assert _apd_patch.is_active()
        assert spd.modules["utils"].calc_grad_attributions is not old
    finally:
        apd.unpatch()
    assert spd.modules["utils"].calc_grad_attributions is old


def test_the_readmes_two_lines_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(_apd_patch.importlib.util, "find_spec", lambda name: None)
    apd.unpatch()
    with pytest.raises(ImportError, match=r"^patch: spd, the package of ApolloResearch/apd, must be installed"):
        exec(_two_lines(), {})  # noqa: S102  the README's own text
    apd.unpatch()


SUITE = """
import importlib.util
spec = importlib.util.spec_from_file_location("loader", {loader!r})
loader = importlib.util.module_from_spec(spec)
sys = importlib.import_module("sys")
sys.modules["loader"] = loader
spec.loader.exec_module(loader)
assert isinstance(found := loader.load_spd(), dict), found
loader.apd.patch()
import pytest
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", {tests!r}]))
"""


def test_the_research_codes_own_tests_pass_on_fastapd(spd):
    tests = Path(spd.modules["run_spd"].__file__).parent.parent / "tests"
    if not tests.is_dir():
        pytest.skip("the package spd is installed without its tests")
    done = _run(SUITE.format(loader=str(Path(__file__).parent / "conftest.py"), tests=str(tests)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
