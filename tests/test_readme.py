"""The README tells the truth: its example runs as printed, its tables are those of the committed results."""

from __future__ import annotations

import importlib.util
import re
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
    spec = importlib.util.spec_from_file_location("readme", ROOT / "bench" / "readme.py")
    assert spec is not None and spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    assert readme.render(README) == README, "run python bench/readme.py"


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
