"""The sinks for metrics, where their packages are installed; and that nothing imports them otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastapd
from fastapd import trackers


def decomposed(track):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    data = [torch.rand(8, 4)]
    return fastapd.decompose(model, data, targets=["0", "2"], C=3, steps=4, log_every=2, track=track)


def test_trackers_are_any_function_of_a_row():
    rows, closed = [], []

    class Sink:
        def __call__(self, row):
            rows.append(dict(row))

        def close(self):
            closed.append(len(rows))

    assert decomposed(Sink()).history == rows
    assert closed == [3]
    assert [row["step"] for row in rows] == [0, 2, 4]


def test_trackers_are_closed_when_a_run_fails():
    closed = []

    class Sink:
        def __call__(self, row):
            raise OSError("disk full")

        def close(self):
            closed.append(True)

    with pytest.raises(OSError, match="disk full"):
        decomposed(Sink())
    assert closed == [True]


def test_trackers_get_numbers():
    row = {"step": 3, "total": 0.5, "alone_per_instance": [0.5], "per_instance": [1, 2.0], "name": "x"}
    assert trackers.numbers(row) == {"step": 3, "total": 0.5, "per_instance/0": 1.0, "per_instance/1": 2.0}


def test_trackers_are_not_imported_unless_asked_for():
    script = (
        "import sys, fastapd, fastapd.trackers, fastapd.cli, fastapd.training\n"
        "print([m for m in sys.argv[1:] if m in sys.modules])"
    )
    packages = ["wandb", "tensorboard", "transformers", "transformer_lens", "nnsight"]
    command = [sys.executable, "-P", "-c", script, *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name, arguments", [("tensorboard", ("runs",)), ("wandb", ("project",))])
def test_trackers_that_are_missing_say_so(name, arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    wanted = rf"^trackers: {name} must be installed, got .*; pip install {name}$"
    with pytest.raises(ImportError, match=wanted):
        getattr(trackers, name)(*arguments)


def test_trackers_tensorboard_holds_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = decomposed(trackers.tensorboard(tmp_path)).history
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {event.step: event.value for event in events.Scalars("total")}
    assert found == {row["step"]: pytest.approx(row["total"]) for row in history}


def test_trackers_wandb_writes_offline(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    sink = trackers.wandb("fastapd", folder=tmp_path, settings={"silent": True, "console": "off"})
    decomposed(sink)
    (file,) = tmp_path.rglob("*.wandb")
    assert b"minimality" in file.read_bytes()
