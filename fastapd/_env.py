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


def triton_interprets() -> bool:
    """`TRITON_INTERPRET`: whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
