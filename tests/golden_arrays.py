"""Reads the arrays of tests/golden, and compares with them by norm: 1e-9 in float64, 1e-5 in float32; masks equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class Arrays:
    """One golden file: inputs in a dtype, and results in float64."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.file, self.dtype = np.load(GOLDEN / f"{name}.npz"), dtype

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.file[key]).to(self.dtype)

    def names(self, prefix: str) -> list[str]:
        return [key[len(prefix) :] for key in self.file if key.startswith(prefix)]

    def assert_close(self, value: Tensor, key: str) -> None:
        truth = self.file[key].astype(np.float64)
        found = value.detach().double().numpy()
        assert found.shape == truth.shape, f"{key}: {found.shape} is not {truth.shape}"
        error = np.linalg.norm(found - truth) / max(np.linalg.norm(truth), 1e-300)
        assert error <= TOLERANCE[self.dtype], f"{key}: relative error {error:.2e}"

    def assert_mask(self, mask: Tensor, key: str) -> None:
        assert np.array_equal(mask.numpy(), self.file[key]), key


def batch_second(t: Tensor) -> Tensor:
    """Between the research code's [batch, n_instances, ..] and ours."""
    return t.transpose(0, 1).contiguous()
