"""Every environment variable that fastapd reads at run time, in one place."""

from __future__ import annotations

import os


class SettingError(ValueError):
    """An environment variable that cannot be used."""


_BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")


def backend() -> tuple[str, ...] | None:
    """`FASTAPD_BACKEND`: the backends that may run, in order (`cpu` or `cpu,reference`); None for `auto`."""
    value = os.environ.get("FASTAPD_BACKEND", "auto").strip()
    names = tuple(name.strip() for name in value.split(","))
    unknown = [name for name in names if name not in _BACKENDS]
    if unknown or ("auto" in names and len(names) > 1):
        raise SettingError(
            f"FASTAPD_BACKEND must be auto or a comma-separated list of {', '.join(_BACKENDS[1:])}, got {value!r}"
        )
    return None if names == ("auto",) else names


def cpu_capability() -> str | None:
    """`FASTAPD_CPU_CAPABILITY`: the instruction-set level of the CPU kernels; None for the best there is."""
    return os.environ.get("FASTAPD_CPU_CAPABILITY") or None


def precision() -> str:
    """`FASTAPD_PRECISION`: how GPU kernels multiply float32 matrices, `ieee`, `tf32x3` or `tf32`."""
    value = os.environ.get("FASTAPD_PRECISION") or "tf32x3"
    if value not in ("ieee", "tf32x3", "tf32"):
        raise SettingError(f"FASTAPD_PRECISION must be ieee, tf32x3 or tf32, got {value!r}")
    return value


def triton_cache() -> str | None:
    """`TRITON_CACHE_DIR`: where the user wants compiled Triton kernels; None to let fastapd choose."""
    return os.environ.get("TRITON_CACHE_DIR") or None


def set_triton_cache(path: str) -> None:
    """Where Triton, which looks at the same variable, keeps compiled kernels from now on."""
    os.environ["TRITON_CACHE_DIR"] = path


def cache_home() -> str:
    """`XDG_CACHE_HOME`: the user's folder for caches."""
    return os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")


def triton_interprets() -> bool:
    """`TRITON_INTERPRET`: whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
