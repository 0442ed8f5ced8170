"""Sinks for the rows of metrics of a run: trackers that are installed and asked for, and never imported otherwise.

    fastapd.decompose(model, data, targets, C, track=fastapd.trackers.tensorboard("runs/mlp"))

A sink is any function of a row, `{"step": 100, "total": 0.02, "faithfulness": 1e-3, ...}`; `print` is one. One that has
a `close` is closed with the run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Row", "Sink", "numbers", "tensorboard", "wandb"]

Row = Mapping[str, Any]
Sink = Callable[[Row], object]


def numbers(row: Row) -> dict[str, float]:
    """What of a row is one number, and the entries of its lists: `minimality_per_instance/2`."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, (bool, int, float)):
            found[name] = float(value)
        elif isinstance(value, (list, tuple)) and len(value) > 1:
            found.update({f"{name}/{i}": float(v) for i, v in enumerate(value)})
    return found


def _installed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"trackers: {package} must be installed, got {error}; pip install {package}") from error


class tensorboard:
    """Writes every number of a row as a scalar of TensorBoard.

    Args:
        folder: Where its event files go.

    Raises:
        ImportError: If tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        _installed("tensorboard", "tensorboard")
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def __call__(self, row: Row) -> None:
        for name, value in numbers(row).items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class wandb:
    """Logs every number of a row to a run of Weights & Biases.

    Args:
        project: Its project.
        mode: "offline" writes to `folder` and asks for no account; "online" sends.
        folder: Where its files go; None for the working directory.
        settings: What else `wandb.init` takes: name, config, tags, ..

    Raises:
        ImportError: If wandb is not installed.
    """

    def __init__(self, project: str, mode: str = "offline", folder: str | Path | None = None, **settings: Any) -> None:
        where = None if folder is None else str(folder)
        self._run = _installed("wandb", "wandb").init(project=project, mode=mode, dir=where, **settings)

    def __call__(self, row: Row) -> None:
        values = numbers(row)
        self._run.log(values, step=int(values.pop("step")))

    def close(self) -> None:
        self._run.finish()
