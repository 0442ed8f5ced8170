"""Steps of Triton kernels as a CUDA graph, in the interpreter; `tests/test_triton.py` runs this file.

By hand: TRITON_INTERPRET=1 python -m pytest -s tests/triton/check_cuda_graph.py

What CUDA would choose where no native kernel is built: Triton, and the reference where Triton has nothing. The last
test counts what one step asks the device for, at the published sizes.
"""

from __future__ import annotations

import collections
import importlib.util
import os
from pathlib import Path
from typing import Any

assert os.environ.get("TRITON_INTERPRET") == "1", "the interpreter is chosen when triton is imported"

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import fastapd
from fastapd import APD, _cuda_graph, backends
from fastapd._cuda_graph import GraphedSteps
from fastapd.components import Components
from fastapd.experiments.residual_mlp import ResidualMLP
from fastapd.experiments.tms import TMS
from fastapd.model import ComponentModel, find_sites
from fastapd.training import make_optimiser, train_step


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulated, cases = _load("emulated_cuda"), _load("graph_cases")
STEPS = 3
QUICK = [("tms", "batch"), ("no chain", "lp")]
SLOW = [("tms", name) for name in cases.METHODS if ("tms", name) not in QUICK]
SLOW += [("residual", "batch"), ("sequential", "batch"), ("few outputs", "batch")]
PAIRS = [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]


@pytest.fixture(autouse=True)
def as_on_cuda(chosen_backend):
    with backends.use_backend("triton", "reference"), fastapd.use_precision("ieee"):
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(_cuda_graph, "WARMUP", 1)  # nothing has to be set up here, and a step takes its time
    return emulated.installed(monkeypatch)


def _losses(model: ComponentModel, method: APD, batches: list[Tensor], graph: bool) -> list[dict[str, list[float]]]:
    optimiser = make_optimiser(model.components, capturable=True)
    graphed = GraphedSteps(model, method, optimiser)
    found = []
    for index, x in enumerate(batches):
        lr = 0.02 / (1 + index)
        step = graphed(lr, x) if graph else train_step(model, method, optimiser, lr, x)
        found.append({name: term.tolist() for name, term in step.terms.items()})
    return found


@pytest.mark.parametrize(("target", "method"), PAIRS)
def test_replayed_steps_are_those_without_a_graph(graphs, target, method):
    batches = [x for x, _ in zip(cases.batches(target), range(STEPS), strict=False)]
    captured, eager = cases.model(target), cases.model(target)
    wanted = _losses(eager, cases.method(method), batches, graph=False)
    assert _losses(captured, cases.method(method), batches, graph=True) == wanted
    (graph,) = graphs
    assert graph.replayed == STEPS - 1
    assert any(node.name.startswith("triton ") for node in graph.nodes)
    right = dict(eager.components.named_parameters())
    for name, p in captured.components.named_parameters():
        assert torch.equal(p, right[name]), name


# ------------------------------------------------------------------------------------ what one step asks the device for

PUBLISHED: dict[str, tuple[Any, tuple[int, ...], int, int, APD, int]] = {
    "TMS 5-2": (lambda: TMS(12, 5, 2), (12, 2048, 5), 5, 3, APD(topk=0.211, simplicity=0.7, p=1.0), 60),
    "TMS 40-10": (
        *(lambda: TMS(3, 40, 10), (3, 2048, 40), 50, 11),
        *(APD(topk=1.0, minimality=10.0, simplicity=20.0, p=0.9), 60),
    ),
    "residual MLP": (
        *(lambda: ResidualMLP(1, 100, 1000, 50, 1), (1, 2048, 100), 130, 50),
        *(APD(topk=1.28, simplicity=10.0, p=0.9, activation_reconstruction=1.0, unit_norm=True), 100),
    ),
}
"""Target, batch, C, rank and method of the published steps, and how many operations one may take at most."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_of_one_step(monkeypatch, name):
    """Counted, not timed: at about 3 us each, a step of the TMS has to stay below 50 for its goal of 150 us.

    What is launched depends on sizes alone, so at these the kernels are not run: their outputs hold anything.
    """
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *args, **kwargs: None)
    graphs = emulated.installed(monkeypatch)
    monkeypatch.setattr(_cuda_graph, "WARMUP", 1)
    make, batch, C, rank, method, most = PUBLISHED[name]
    target = make().requires_grad_(False)
    sites = find_sites(target, ["linear*" if isinstance(target, TMS) else "layers.*.mlp_*"])
    components = Components({site.name: site.shape for site in sites}, C, rank, batch[0])
    model = ComponentModel(target, sites, components)
    hidden = {site.name: torch.relu for site in sites if site.name.endswith("mlp_in")}
    steps = GraphedSteps(model, method, make_optimiser(components, capturable=True), hidden or None)
    for _ in range(2):
        steps(0.01, torch.rand(batch))
    (graph,) = graphs
    assert 15 < len(graph.nodes) <= most
    kernels = sum(node.name.startswith("triton ") for node in graph.nodes)
    form = model.plan(torch.rand(batch)).form
    print(f"\n{name}, attributions in {form} form: {len(graph.nodes)} operations, {kernels} of them Triton's")
    counts = collections.Counter((node.place, node.name) for node in graph.nodes)
    for (place, operation), n in counts.items():
        print(f"  {n:3d}  {place:48s} {operation}")
