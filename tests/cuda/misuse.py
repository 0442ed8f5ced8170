"""Starts a kernel of `misuse.cu`, compiled by g++, for processes that a sanitizer watches: MODULE KERNEL FLAG."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np


def start(library: ctypes.CDLL, kernel: str, x: Any = None, out: Any = None, flag: int = 0) -> str:
    """What went wrong, or nothing."""
    library.run_misuse.restype = ctypes.c_char_p
    pointers = [ctypes.c_void_p(a.ctypes.data if a is not None else None) for a in (x, out)]
    return library.run_misuse(kernel.encode(), *pointers, flag).decode()


if __name__ == "__main__":
    print(start(ctypes.CDLL(sys.argv[1]), sys.argv[2], None, np.zeros(64, np.int32), int(sys.argv[3])) or "no error")
