"""Whether Triton kernels can run here and where they are kept; keeps the reason when they cannot.

A kernel is compiled when it is first called, which takes more than a card: Triton, a driver, a C compiler for the code
that starts kernels, and a folder to keep them in. So the first question about a device is answered by compiling a
kernel that does nothing and starting it there. Nothing is imported, compiled or written before somebody asks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import stat
import tempfile
import warnings
from pathlib import Path

import torch

from fastapd import _env

LOWEST_CAPABILITY = (8, 0)


class CacheError(RuntimeError):
    """No folder for compiled kernels can be used."""


@functools.cache
def missing() -> str:
    """Why Triton cannot be imported; empty if it seems that it can."""
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def no_cuda() -> str:
    """Why torch has no CUDA device; empty if it has one."""
    if torch.cuda.is_available():
        return ""
    if not torch.backends.cuda.is_built():
        return "this torch was built without CUDA"
    return "torch finds no CUDA driver or no card"


@functools.cache
def device_reasons(index: int) -> tuple[str, ...]:
    """Why kernels cannot run on a CUDA device, found out once by compiling one and starting it there.

    Warns, once, where a card would do and the installation does not.
    """
    capability = torch.cuda.get_device_capability(index)
    if capability < LOWEST_CAPABILITY:
        return (f"cuda:{index} has compute capability {capability[0]}.{capability[1]}, below 8.0",)
    try:
        use_private_cache()
        importlib.import_module("fastapd.kernels._launch").start_nothing(index)
    except Exception as error:  # whatever Triton, its compilers or the driver raise
        lines = str(error).strip().splitlines() or [""]
        reason = f"Triton is installed but runs no kernel on cuda:{index}: {type(error).__name__}: {lines[0]}"
        warnings.warn(f"{reason}; falling back to the next backend", RuntimeWarning, stacklevel=2)
        return (reason,)
    return ()


def use_private_cache() -> Path:
    """Has Triton keep its kernels in a folder that is the user's alone, unless `TRITON_CACHE_DIR` names one.

    Compiled kernels are programs: whoever can write into the folder runs code as the user. It is `fastapd/triton` in
    the user's cache, or, where there is no home to write to, `fastapd-<uid>/triton` among the temporary files.

    Raises:
        CacheError: If no folder can be used, with what is wrong with each.
    """
    if (given := _env.triton_cache()) is not None:
        try:
            path = Path(given)
            path.mkdir(parents=True, exist_ok=True)
            _assert_writable(path)
        except OSError as error:
            raise CacheError(
                f"TRITON_CACHE_DIR must be a folder that can be written to, got {given}: {error}"
            ) from None
        return path
    user = os.getuid() if hasattr(os, "getuid") else "user"
    found = []
    for parent in (Path(_env.cache_home()) / "fastapd", Path(tempfile.gettempdir()) / f"fastapd-{user}"):
        try:
            parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _assert_private(parent)
            path = parent / "triton"
            path.mkdir(exist_ok=True, mode=0o700)
            _assert_private(path)
            _assert_writable(path)
        except OSError as error:
            found.append(f"{parent}: {error}")
            continue
        _env.set_triton_cache(str(path))
        return path
    raise CacheError(f"no folder for compiled kernels can be used; set TRITON_CACHE_DIR to one: {'; '.join(found)}")


def _assert_private(path: Path) -> None:
    """The folder is the user's and nobody else writes to it; what others may do is taken back where that is allowed."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise OSError("it is no folder of its own")
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise OSError(f"it belongs to user {found.st_uid}")
    if found.st_mode & 0o022:
        os.chmod(path, 0o700)


def _assert_writable(path: Path) -> None:
    with tempfile.TemporaryFile(dir=path):
        pass
