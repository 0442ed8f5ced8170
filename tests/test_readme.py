"""The README tells the truth: its example runs as printed, its tables are those of the committed results."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastapd
from fastapd.components import LayerShape

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
    pd, model, x = names["pd"], names["model"], names["x"]
    assert pd.history[-1]["total"] < 0.5 * pd.history[0]["total"]
    torch.testing.assert_close(pd(x), model(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(names["y"], pd(x, active=[3, 17]))
    scores = pd.metrics()
    assert scores["faithfulness"] < 0.1
    assert scores["reconstruction"] < scores["baselines"]["random"]["reconstruction"]
    edited = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    edited.load_state_dict(names["weights"])
    torch.testing.assert_close(edited[0].weight, model[0].weight - 2 * pd.parts("0")[0, 3].mT)


def test_readme_loop_runs_as_printed():
    found = re.search(r"<!-- loop -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))

    def data():
        while True:
            yield torch.rand(256, 8) * (torch.rand(256, 8) < 0.1)

    names: dict = {"torch": torch, "model": model, "data": data}
    exec(found.group(1), names)  # noqa: S102  the README's own text
    layer, W = names["layer"], names["W"]
    start = names["LinearComponents"].from_linear(model[0], C=16, rank=2)
    error, before = ((part.weight - W).norm() / W.norm() for part in (layer, start))
    assert error < 0.5 * before
    assert all(p.grad is None for p in model.parameters())


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


@pytest.mark.parametrize("name", ["mathematics.md", "gotchas.md", "tutorial.md"])
def test_docs_name_what_exists(name):
    """Whatever the documents call by a dotted name, or pass to `APD`, is there."""
    from fastapd import config

    text = (ROOT / "docs" / name).read_text()
    found = set(re.findall(r"\b((?:fastapd|functional|metrics)(?:\.[A-Za-z_]\w*)+)", text))
    assert found
    for dotted in found:
        value: object = fastapd
        for part in dotted.removeprefix("fastapd.").split(".") if dotted != "fastapd" else []:
            value = getattr(value, part) if hasattr(value, part) else importlib.import_module(f"fastapd.{part}")
    for call in re.findall(r"APD\(([^)]*)\)", text):
        for argument in re.findall(r"(\w+)=", call):
            assert argument in config.APD.model_fields, argument
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link


def test_gotchas_say_what_the_code_does():
    """Those that a few lines can show."""
    from fastapd import functional as F

    square = torch.randn(4, 4)
    A, B = square[None], torch.eye(4)[None]
    assert F.faithfulness_loss(A, B, square) == 0 < F.faithfulness_loss(A, B, square.mT)  # and no error
    assert F.recon_mse(torch.zeros(2, 6, 3), torch.zeros(2, 6, 3)).shape == (6,)
    assert not F.batch_topk_mask(torch.rand(4, 5), 0.2).any()
    with fastapd.use_backend("cpu"), pytest.raises(NotImplementedError, match="has no implementation of this op"):
        F.component_sum(A, B)
    with fastapd.use_backend("cpu", "reference"):
        F.component_sum(A, B)
    zero = torch.zeros(1, 4, 2, requires_grad=True)
    x, g = torch.randn(3, 4), torch.randn(3, 2, 5)
    F.grad_attributions(x, g, zero, torch.randn(1, 2, 5), norm=True).sum().backward()
    assert zero.grad is not None and zero.grad.isnan().any()
    step0 = [fastapd.functional.lr_schedule(s, 100, 1e-3, "cosine", 0.05) for s in (0, 1)]
    assert step0[0] == 0 < step0[1]
    components = fastapd.Components({"mlp_in": LayerShape(1000, 50)}, 130, 50, 1, 2.0)
    jump = 1 / components.factors("mlp_in")[0].norm(dim=-2)
    assert 27 < jump.mean() < 30


def test_a_sample_may_have_many_components_or_none():
    scores = torch.tensor([[3.0, 2.0], [0.5, 0.1]])
    assert fastapd.functional.batch_topk_mask(scores, 1.0).sum(-1).tolist() == [2, 0]


def test_readme_guide_to_the_drop_in_has_the_committed_figures():
    script = (
        f"import json, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom bench import drop_in\n"
        "kept = json.loads(drop_in.RESULTS.read_text())\ntext = drop_in.GUIDE.read_text()\n"
        "assert kept['rows'].keys() == drop_in.RUNS.keys()\nassert drop_in.guide(text, kept) == text"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
