"""How the GPU kernels multiply float32 matrices: the one setting that trades digits for speed."""

from __future__ import annotations

from fastapd import _env

PRECISIONS = ("ieee", "tf32x3", "tf32")

_chosen: str | None = None


class use_precision:
    """Sets how fastapd's own GPU kernels multiply float32 matrices, until it is left or replaced.

        ieee     float32 multiplications without tensor cores: what the CPU computes, for parity
        tf32x3   three tensor-core products of the leading and the trailing 11 bits, about float32; the default
        tf32     one tensor-core product of 11 bits, relative error about 5e-4

    Sums are in float32 in every mode; float16 and bfloat16 factors lose nothing in a tf32 product and take one unless
    the mode is ieee. Products that a library computes follow `torch.backends.cuda.matmul`, singular values are found
    in float64, and the CPU kernels know no other precision than that of their arguments.

    Works as a statement, `fastapd.use_precision("ieee")`, and as a context manager that restores what was set before.
    `FASTAPD_PRECISION` sets it from outside. The setting is global to the process, as autograd runs backward passes on
    threads of its own.

    Args:
        name: "ieee", "tf32x3" or "tf32".

    Raises:
        ValueError: If the name is unknown.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        if name not in PRECISIONS:
            raise ValueError(f"use_precision: name must be one of {', '.join(PRECISIONS)}, got {name!r}")
        self._before = precision()
        _chosen = name

    def __enter__(self) -> use_precision:
        return self

    def __exit__(self, *exception: object) -> None:
        global _chosen
        _chosen = self._before


def precision() -> str:
    """The precision in force."""
    global _chosen
    if _chosen is None:
        _chosen = _env.precision()
    return _chosen
