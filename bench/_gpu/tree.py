"""fastapd as it lies in the checkout: importable without being installed, built in place, named by its commit."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def make_importable() -> None:
    """Puts the checkout on the path and maps `kernels` to `fastapd.kernels`, which an installation does by itself."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    package = importlib.import_module("fastapd")
    folder = ROOT / "kernels"
    spec = importlib.util.find_spec("fastapd.kernels")
    if spec is not None and spec.origin and Path(spec.origin).resolve().parent == folder:
        return
    spec = importlib.util.spec_from_file_location(
        "fastapd.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastapd.kernels"] = module
    spec.loader.exec_module(module)
    package.kernels = module  # type: ignore[attr-defined]  # as importing it would have left it


def commit(given: str | None) -> dict[str, Any]:
    """The commit of the checkout, its time and whether files differ from it; where there is no git, what was given."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    identity = given or git("rev-parse", "HEAD")
    if not identity:
        return {"id": "unknown", "time": None, "dirty": None}
    same = identity == git("rev-parse", "HEAD")
    return {
        "id": identity,
        "time": git("log", "-1", "--format=%cI") or None if same else None,
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")) if same else None,
    }


def smi() -> dict[str, Any]:
    """Driver, clocks in MHz, power in W and temperature, where nvidia-smi is there."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        values = [value.strip() for value in done.stdout.strip().split(",")]
        names = ("driver", "sm_mhz", "memory_mhz", "max_sm_mhz", "power_w", "power_limit_w", "temperature_c")
        if done.returncode == 0 and len(values) == len(names):
            return dict(zip(names, values, strict=True))
    return {}


def build(rehearsal: bool, limit: float) -> dict[str, Any]:
    """Builds the native modules in place, without a network and without installing anything.

    What is written, git ignores: `build/`, `fastapd/_C*.so`, `fastapd/_build_info.json`. A rehearsal goes the same way
    with both modules switched off and a compiler that is none, into a folder of its own.

    Returns:
        The command, its seconds and exit status, and for each module "built" or why it is not.
    """
    command, settings = [sys.executable, "setup.py", "-q", "build_ext"], dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        info = ROOT / "fastapd" / "_build_info.json"
        if rehearsal:
            command += ["--build-lib", f"{folder}/lib", "--build-temp", f"{folder}/temp"]
            settings |= {"FASTAPD_CPU": "0", "FASTAPD_CUDA": "0", "CXX": "false"}
            info = Path(folder, "lib", "fastapd", "_build_info.json")
        else:
            command += ["--inplace"]
        started = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=limit, check=False
            )
            status, said = done.returncode, (done.stdout + done.stderr).strip()
        except subprocess.TimeoutExpired:
            status, said = -1, f"stopped after {limit:.0f} s"
        out: dict[str, Any] = {"seconds": time.monotonic() - started, "status": status}
        notes = json.loads(info.read_text()) if status == 0 and info.is_file() else {}
    last = said.splitlines()[-1] if said else "no output"
    for module in ("_C", "_C_cuda"):
        out[module] = (notes.get(module) or "built") if notes else f"not built: {last}"
    out |= {key: notes[key] for key in ("compiler", "cuda", "cpu_levels", "cuda_archs", "openmp") if key in notes}
    return out
