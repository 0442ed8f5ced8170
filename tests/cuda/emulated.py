"""Builds `_C_cuda` for the CPU: the same bindings and the same .cu files, compiled by g++ through `emulation/`.

    FASTAPD_EMULATED_CUDA=1 python -m pytest tests/ops -k cuda       by hand: the ops' tests on the emulated kernels

`tests/conftest.py` sees the variable, builds the module, or takes the one whose path the variable gives, and puts it in
the place of the real one. The module says that its addresses are the CPU's, so the cuda backend takes CPU tensors when
it is asked for by name. Sanitizers are compiled into the kernels alone; their libraries must be preloaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).with_name("emulation")
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
SANITIZERS = {
    "": ["-O2"],
    "address": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"],
    "thread": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}
NAME = "_C_cuda" + sysconfig.get_config_var("EXT_SUFFIX")


def why_not() -> str:
    """Why nothing can be built here; empty if it can."""
    if not (ROOT / "csrc").exists():
        return "needs the checkout"
    return "" if shutil.which("g++") else "g++ is not on this machine"


def _compile(*words: str | Path) -> None:
    command = ["g++", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}:\n{done.stderr}")


def _link(sanitizer: str, objects: Sequence[Path], out: Path) -> None:
    flags = [flag for flag in SANITIZERS[sanitizer] if flag.startswith("-fsanitize")]
    _compile("-shared", *flags, *objects, "-o", out, "-pthread")


def _emulation(sanitizer: str, out: Path) -> list[str | Path]:
    """The words that compile the emulation, which sanitizers do not look into."""
    under = [f"-DFASTAPD_UNDER_{sanitizer.upper()}=1"] if sanitizer else []
    return [*FLAGS, "-O2", *under, "-c", EMULATION / "emulation.cpp", "-o", out]


def library(source: Path, out: Path, sanitizer: str = "") -> Path:
    """A shared library of one .cu file and the emulation, for ctypes."""
    objects = [out.with_suffix(".kernels.o"), out.with_suffix(".emulation.o")]
    includes = [f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"]
    _compile(*FLAGS, *includes, *SANITIZERS[sanitizer], "-x", "c++", "-c", source, "-o", objects[0])
    device = out.with_suffix(".device.o")
    _compile(*FLAGS, *includes, "-O1", "-x", "c++", "-c", ROOT / "csrc/cuda/device.cu", "-o", device)
    _compile(*_emulation(sanitizer, objects[1]))
    _link(sanitizer, [*objects, device], out)
    return out


def preloaded(sanitizer: str) -> dict[str, str]:
    """The environment of a process that loads what is compiled with a sanitizer.

    Raises:
        FileNotFoundError: If g++ has no such library here.
    """
    names = {"": [], "address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so"]}[sanitizer]
    found = [
        subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True, check=True).stdout.strip()
        for n in names
    ]
    if missing := [path for path in found if not Path(path).is_absolute()]:
        raise FileNotFoundError(f"g++ has no {missing[0]} on this machine")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTAPD_", "TRITON_", "PYTEST_"))}
    env |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return env | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=1:report_thread_leaks=0",
    }


class Build:
    """A folder of objects; what does not differ between two modules is compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._objects: dict[tuple[str, str], Path] = {}

    def _planted(self, planted: Mapping[str, tuple[str, str]]) -> Path:
        """A copy of csrc with mistakes in it."""
        csrc = Path(tempfile.mkdtemp(prefix="planted-", dir=self.folder), "csrc")
        shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cpu"))
        for name, (right, wrong) in planted.items():
            text = (csrc / "cuda" / name).read_text()
            assert text.count(right) == 1, f"{name} holds {text.count(right)} times {right!r}; adapt the test"
            (csrc / "cuda" / name).write_text(text.replace(right, wrong))
        return csrc

    def module(self, sanitizer: str = "", planted: Mapping[str, tuple[str, str]] | None = None) -> Path:
        """The path of a module whose kernels are compiled with a sanitizer.

        Args:
            sanitizer: "address", "thread" or "" for none.
            planted: By the name of a file in csrc/cuda: what is right there, once, and what is wrong.
        """
        csrc = self._planted(planted) if planted else ROOT / "csrc"
        out = Path(tempfile.mkdtemp(prefix=f"{sanitizer or 'plain'}-", dir=self.folder))
        everything = any(not name.endswith(".cu") for name in planted or ())  # a header
        flags = [*FLAGS, f"-I{EMULATION}", f"-I{csrc}"]
        objects: list[Path] = []
        jobs: list[list[str | Path]] = []

        def need(key: tuple[str, str], words: Callable[[Path], list[str | Path]], changed: bool) -> None:
            known = self._objects.get(key)
            if changed or known is None:
                known = out / f"{key[1]}.o"
                jobs.append(words(known))
                if not changed:
                    self._objects[key] = known
            objects.append(known)

        for source in sorted((csrc / "cuda").glob("*.cu")):
            changed = everything or source.name in (planted or ())
            compiled = [*flags, *SANITIZERS[sanitizer], "-x", "c++", "-c", source, "-o"]
            need((sanitizer, source.stem), lambda to, words=compiled: [*words, to], changed)
        need((sanitizer, "emulation"), lambda to: _emulation(sanitizer, to), False)
        python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
        bindings = [*flags, *python, "-O1", "-c", csrc / "bindings_cuda.cpp", "-o"]
        need(("", "bindings"), lambda to: [*bindings, to], False)  # addresses in, calls out: nothing to sanitize
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: _compile(*job), jobs))
        _link(sanitizer, objects, out / NAME)
        return out / NAME


def install(setting: str) -> ModuleType:
    """Puts an emulated module in the place of `fastapd._C_cuda`, which must not have been imported: the one of a path,
    or, for "1", one that is built first."""
    assert "fastapd._C_cuda" not in sys.modules
    with tempfile.TemporaryDirectory(prefix="fastapd-emulated-") as folder:  # once imported, it stays mapped
        path = Build(Path(folder)).module() if setting == "1" else setting
        spec = importlib.util.spec_from_file_location("fastapd._C_cuda", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.controls = ctypes.CDLL(str(path))
    assert module.memory == "cpu"
    sys.modules["fastapd._C_cuda"] = module
    return module
