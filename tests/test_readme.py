"""The README tells the truth: its example runs as printed, its tables are those of the committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_example_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = re.search(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    names: dict = {}
    torch.manual_seed(0)
    exec(found.group(1), names)  # noqa: S102  the README's own text
    assert names["y"].shape == (256, 8)
    assert (tmp_path / "runs" / "mlp" / "components.safetensors").exists()
    history = names["pd"].history
    assert history[-1]["total"] < history[0]["total"]


def test_readme_tables_are_those_of_the_committed_results():
    check = [sys.executable, "-P", str(ROOT / "bench" / "readme.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command", ["make demo", "make test", "fastapd run", "fastapd plan", "fastapd info", "fastapd demo"]
)
def test_readme_commands_exist(command):
    from fastapd import cli

    assert command in README
    if command.startswith("make"):
        assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()
    else:
        assert command in cli.HELP
