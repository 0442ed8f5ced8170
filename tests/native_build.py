"""Copies the native sources, builds `_C` from the copy and runs native_driver.py on it, for the tests that compile."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

import pytest

ROOT = Path(__file__).parents[1]
DRIVER = Path(__file__).with_name("native_driver.py")


def require_build_tools() -> None:
    """Skips where the native module cannot be built with g++."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the checkout")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on this machine")
    for module in ("ninja", "pybind11", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def run(
    *command: str | Path, settings: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: int = 600
) -> CompletedProcess[str]:
    """Runs a command with none of the caller's build, backend and thread settings but those given."""
    ours = ("CXX", "CXXFLAGS", "LDFLAGS", "LD_PRELOAD", "PYTHONPATH", "OMP_NUM_THREADS")
    env = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("FASTAPD_")}
    # waiting threads that spin would take the time of those they wait for; numpy's own threads are not the subject
    env |= {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **(settings or {})}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def copy_sources(tree: Path) -> Path:
    """What `setup.py build_ext` needs to build `_C`, and no more."""
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    for package in ("fastapd", "kernels"):
        (tree / package).mkdir()
        (tree / package / "__init__.py").touch()
    return tree


def build(tree: Path, settings: Mapping[str, str] | None = None) -> Path:
    """Builds `_C` in the tree with g++, again only what has changed, and returns its path."""
    settings = {"CXX": "g++", "FASTAPD_CUDA": "0", **(settings or {})}
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", settings=settings, cwd=tree)
    assert done.returncode == 0, f"the build failed:\n{done.stdout}\n{done.stderr}"
    (module,) = (tree / "fastapd").glob("_C.*")
    return module


def patch(path: Path, right: str, wrong: str) -> None:
    """Plants a bug; the text must be there once, or the test would prove nothing."""
    text = path.read_text()
    assert text.count(right) == 1, f"{path.name} holds {text.count(right)} times {right!r}; adapt the test"
    path.write_text(text.replace(right, wrong))


def drive(module: Path | str, *arguments: str, settings: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    return run(sys.executable, DRIVER, module, *arguments, settings=settings)
