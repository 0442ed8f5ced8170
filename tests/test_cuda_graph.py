"""Training steps as a CUDA graph: that they can be one, that it changes no number, and what is refused.

No card is needed. `emulated_cuda.py` stands for it: a capture that runs nothing and refuses whatever waits for the
device, and replays that run nothing but what was captured. Here the native kernels stand for those of the card;
`triton/check_cuda_graph.py` has the same with the Triton kernels, in the lane of their interpreter.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastapd import APD, DivergedError, Optimiser, _cuda_graph, _native, backends, decompose
from fastapd._cuda_graph import WARMUP, GraphedSteps
from fastapd._rundir import read_metrics
from fastapd.components import Components
from fastapd.model import ComponentModel
from fastapd.training import _sent, learning_rate, make_optimiser, train_step, update


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulated, cases = _load("emulated_cuda"), _load("graph_cases")

HAS_KERNELS = _native.load("_C").module is not None
# tms with every method, the other targets with one for each path that a step can take
PAIRS = [("tms", name) for name in cases.METHODS if HAS_KERNELS or name != "exact schatten"]
PAIRS += [(t, m) for t in cases.TARGETS if t != "tms" for m in ("batch", "lp", "hidden", "components")]
SCHEDULE = Optimiser(lr=2e-2, schedule="cosine", warmup=0.1)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An emulated card; holds the graphs that were captured."""
    return emulated.installed(monkeypatch)


@dataclasses.dataclass
class Run:
    """What a training left behind."""

    losses: list[dict[str, list[float]]]
    model: ComponentModel
    optimiser: torch.optim.Optimizer
    places: list[list[int]]
    """The addresses, after each step, of what outlives a step."""

    def numbers(self) -> dict[str, Tensor]:
        parameters = dict(self.model.components.named_parameters())
        found = {name: p.detach() for name, p in parameters.items()}
        for name, p in parameters.items():
            assert p.grad is not None
            found[f"{name} gradient"] = p.grad
            found |= {f"{name} {key}": t for key, t in self.optimiser.state[p].items()}
        if self.model._threshold is not None:
            found["threshold"] = self.model._threshold
        return found


def _run(
    target: str, method: str, graph: bool, steps: int = 12, change: Callable[[int, ComponentModel], None] | None = None
) -> Run:
    model, data = cases.model(target), cases.batches(target)
    optimiser = make_optimiser(model.components, capturable=True)
    graphed = GraphedSteps(model, cases.method(method), optimiser)
    run = Run([], model, optimiser, [])
    for index in range(steps):
        if change is not None:
            change(index, model)
        lr, x = learning_rate(index, steps, SCHEDULE), next(data)
        step = graphed(lr, x) if graph else train_step(model, cases.method(method), optimiser, lr, x)
        run.losses.append({name: term.tolist() for name, term in step.terms.items()} | {"total": [step.total.item()]})
        run.places.append([t.data_ptr() for t in run.numbers().values()])
    return run


def _assert_same(run: Run, wanted: Run) -> None:
    """Bit for bit: a graph does the same operations on the same numbers."""
    assert run.losses == wanted.losses
    found, right = run.numbers(), wanted.numbers()
    assert found.keys() == right.keys()
    for name, t in right.items():
        torch.testing.assert_close(
            found[name], t, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert all(places == run.places[1] for places in run.places[1:]), "what outlives a step must stay where it is"


# ------------------------------------------------------------------------------------ a step as a card would see it


class _OnDevice(TorchDispatchMode):
    """Every tensor is on the meta device, which has no numbers: reading one is an error, as is memory of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastapd":  # the reference itself, not the fake of the op
            run = backends.choose(func._schema.name.removeprefix("fastapd::"), args)
            with self:
                return run(*args)
        with self:
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        assert not emulated.waits(func, args), f"{func} waits for the device"
        found = func(*args, **kwargs)
        for t in emulated._tensors((args, kwargs, found)):
            assert t.device.type == "meta", f"{func} has a tensor on {t.device}"
        return found


def _step_on_device(target: str, method: APD) -> None:
    with torch.device("meta"):
        model, x = cases.model(target), torch.empty(cases.TARGETS[target][2])
    model._chain_checked = True  # the first step compares numbers, on purpose
    optimiser: Any = types.SimpleNamespace(step=lambda: None, param_groups=[])  # AdamW takes no tensors of meta
    with backends.use_backend("reference"):
        update(model, method, optimiser, x)
        with _OnDevice():
            update(model, method, optimiser, x)


@pytest.mark.parametrize(("target", "method"), [pair for pair in PAIRS if pair[1] != "exact schatten"])
def test_step_neither_waits_for_the_device_nor_leaves_it(target, method):
    """With the reference of every op, so that its host's code is looked at, too."""
    _step_on_device(target, cases.method(method))


@pytest.mark.parametrize("target", ["tms", "no chain"])
def test_step_with_reduced_gradients_does_not_wait_either(target, monkeypatch):
    monkeypatch.setattr("fastapd.attributions.REDUCTION_COST", -1)
    monkeypatch.setattr(ComponentModel, "chain", "not a chain today")
    _step_on_device(target, cases.method("batch"))


@pytest.mark.parametrize("changes", [{"selection": "exact"}, {"schatten": "exact"}], ids=str)
def test_step_that_waits_is_seen_to(changes):
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError), match=r"waits|meta"):
        _step_on_device("tms", cases.method("batch").model_copy(update=changes))


@pytest.mark.parametrize("target", cases.TARGETS)
def test_targets_take_the_form_that_is_meant(target):
    model, x = cases.model(target), next(cases.batches(target))
    assert model.plan(x).form == cases.TARGETS[target][3]


def test_a_target_that_is_no_chain_runs_once_before_its_components(monkeypatch):
    """Asking for its plan does not run it again."""
    model, x = cases.model("no chain"), next(cases.batches("no chain"))
    optimiser = make_optimiser(model.components)
    train_step(model, cases.method("batch"), optimiser, 0.1, x)
    calls = []
    monkeypatch.setattr(model.target[1], "forward", lambda h: calls.append(1) or nn.functional.layer_norm(h, (5,)))
    train_step(model, cases.method("batch"), optimiser, 0.1, x)
    assert len(calls) == 2  # for the target, and for the selected components


# ------------------------------------------------------------------------------------------------------- the emulation

READS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.sum()),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "cpu": lambda t: t.cpu(),
    "equal": lambda t: torch.equal(t, t),
    "allclose": lambda t: torch.allclose(t, t),
    "nonzero": lambda t: t.nonzero(),
    "masked_select": lambda t: t.masked_select(t > 0),
    "index": lambda t: t[t > 0],
    "index_put": lambda t: t.index_put_((t > 0,), t.new_zeros(())),
    "unique": lambda t: t.unique(),
    "repeat_interleave": lambda t: torch.repeat_interleave(t, torch.ones_like(t, dtype=torch.int64)),
    "svdvals": lambda t: torch.linalg.svdvals(t[None]),
    "inv": lambda t: torch.linalg.inv(t[:1, None]),
    "cholesky": lambda t: torch.linalg.cholesky(t[:1, None].exp()),
    "tensor": lambda t: torch.tensor([1.0, 2.0]),
}


@pytest.mark.parametrize("read", READS)
def test_emulated_capture_refuses_what_waits(graphs, read):
    graph, t = torch.cuda.CUDAGraph(), torch.randn(3)
    with pytest.raises(RuntimeError, match="operation failed due to a previous error") as caught:
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            READS[read](t)
    assert emulated.CAPTURING in str(caught.value.__context__)


def test_emulated_capture_runs_nothing_and_a_replay_all_of_it(graphs):
    graph, a, b = torch.cuda.CUDAGraph(), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        c = (a + b).view(2, 1)
        a.mul_(c.squeeze(1))
    assert a.tolist() == [1, 2] and c.isnan().all()
    for wanted in ([4, 12], [28, 192]):
        graph.replay()
        assert a.tolist() == wanted
    b.zero_()  # is read when the graph runs
    graph.replay()
    assert a.tolist() == [28 * 28, 192 * 192]
    del b
    with pytest.raises(AssertionError, match=emulated.FREED):
        graph.replay()


# ------------------------------------------------------------------------------------------------ replays are the steps


@pytest.mark.parametrize(("target", "method"), PAIRS)
def test_replayed_steps_are_those_without_a_graph(graphs, target, method):
    run = _run(target, method, graph=True)
    assert [graph.replayed for graph in graphs] == [12 - WARMUP]
    _assert_same(run, _run(target, method, graph=False))


@pytest.mark.parametrize("target", ["tms", "residual"])
def test_thirty_replayed_steps_are_those_without_a_graph(graphs, target):
    run = _run(target, "batch", graph=True, steps=30)
    _assert_same(run, _run(target, "batch", graph=False, steps=30))
    assert len({tuple(row["minimality"]) for row in run.losses}) == 30  # every batch is another one


def test_replayed_steps_of_the_reference_are_those_without_a_graph(graphs):
    with backends.use_backend("reference"):
        _assert_same(_run("tms", "batch", graph=True), _run("tms", "batch", graph=False))


def test_a_step_of_the_graph_returns_the_same_tensors_every_time(graphs):
    model, data = cases.model("tms"), cases.batches("tms")
    steps = GraphedSteps(model, cases.method("batch"), make_optimiser(model.components, capturable=True))
    eager, first = [steps(0.1, next(data)) for _ in range(WARMUP)], steps(0.1, next(data))
    before, kept = first.total.item(), eager[-1].total.item()
    second = steps(0.1, next(data))
    assert second is first and not any(t.requires_grad for t in (*first.terms.values(), first.attributions))
    assert first.total.item() != before and eager[-1].total.item() == kept
    counts = first.counts
    assert counts.sum() == 2 * cases.BATCH and torch.equal(first.mask.sum(1), counts)


# what goes wrong if it is forgotten; each turns `_assert_same` red


def _number_as_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr


def _batch_that_is_not_copied(self: GraphedSteps, x: Tensor) -> None:
    self._stream = self._stream or torch.cuda.Stream(x.device)
    self._x = x


def _hint_made_every_step(self: ComponentModel, attributions: Tensor) -> Tensor:
    self._threshold = attributions.new_full(attributions.shape[:1], math.nan)
    return self._threshold


def _gradients_made_every_step(self: Components, name: str) -> tuple[Tensor, Tensor]:
    for parameter in self.stored(name):
        parameter.grad = torch.empty_like(parameter)
    At, B = self.stored(name)
    assert At.grad is not None
    assert B.grad is not None
    return At.grad, B.grad


PLANTED = {
    "the learning rate is a Python number": (_cuda_graph, "set_learning_rate", _number_as_learning_rate),
    "the batch is not copied": (GraphedSteps, "_take", _batch_that_is_not_copied),
    "the hint is made anew": (ComponentModel, "threshold", _hint_made_every_step),
    "the gradients are made anew": (Components, "gradients", _gradients_made_every_step),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_seen(graphs, monkeypatch, mistake):
    wanted = _run("tms", "batch", graph=False)
    monkeypatch.setattr(*PLANTED[mistake])
    with pytest.raises(AssertionError):
        _assert_same(_run("tms", "batch", graph=True), wanted)


def test_a_graph_keeps_what_others_let_go_of(graphs):
    def let_go(index: int, model: ComponentModel) -> None:
        if index == WARMUP + 2:
            model._form, model._threshold, model._form_of = None, None, []
            for p in model.components.parameters():
                p.grad = None

    model, data = cases.model("residual"), cases.batches("residual")
    steps = GraphedSteps(model, cases.method("batch"), make_optimiser(model.components, capturable=True))
    losses = []
    for index in range(12):
        let_go(index, model)
        losses.append(steps(learning_rate(index, 12, SCHEDULE), next(data)).total.item())
    assert losses == [row["total"][0] for row in _run("residual", "batch", graph=False).losses]


@pytest.mark.parametrize("how", ["in place", "replaced", "buffer"])
@pytest.mark.parametrize("target", ["tms", "residual"])
def test_a_target_that_changes_is_captured_anew(graphs, target, how):
    """Its products, folded into the graph, would be those of the old one."""

    def change(index: int, model: ComponentModel) -> None:
        if index != WARMUP + 2:
            return
        name = "linear1.weight" if target == "tms" else "layers.0.mlp_in.weight"
        module = model.target.get_submodule(name.rpartition(".")[0])
        if how == "buffer" and target == "residual":
            model.target.W_U.mul_(2)
        elif how == "replaced":
            module.weight = nn.Parameter(module.weight * 2, requires_grad=False)
        else:
            module.weight.mul_(2)

    run = _run(target, "batch", True, 12, change)
    assert [graph.replayed for graph in graphs] == [2, 12 - 2 * WARMUP - 2]
    wanted = _run(target, "batch", False, 12, change)
    assert run.losses == wanted.losses
    unchanged = _run(target, "batch", False, 12)
    assert run.losses[WARMUP + 2] != unchanged.losses[WARMUP + 2]


# ---------------------------------------------------------------------------------------------------- decompose(..)

METHOD = APD(topk=0.5, minimality=1.0, simplicity=0.1, p=1.0)
EXACT = Optimiser(lr=2**-6, schedule="linear")
"""Rates that float32 holds exactly, over a power of two of steps: on the device they are float32."""


def _decompose(graph: bool, data: Any = None, target: nn.Module | None = None, **settings: Any) -> Any:
    model = cases.model("tms")
    settings = {
        "method": METHOD,
        "optimiser": EXACT,
        "steps": 32,
        "log_every": 1,
        "rank": 2,
        "seed": 3,
        "device": "cpu",
    } | settings
    data = cases.batches("tms") if data is None else data
    return decompose(target or model.target, data, ["linear*"], 4, cuda_graph=graph, **settings)


def _timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_decompose_with_a_graph_gives_the_same_history_and_components(graphs):
    with_graph = _decompose(True)
    assert [graph.replayed for graph in graphs] == [32 - WARMUP]
    without = _decompose(False)
    assert _timeless(with_graph.history) == _timeless(without.history)
    factors = with_graph.model.components.export()
    assert all(torch.equal(t, factors[name]) for name, t in without.model.components.export().items())


def test_decompose_with_a_graph_reads_losses_only_at_rows(graphs, monkeypatch):
    reads = []
    item = Tensor.item
    monkeypatch.setattr(Tensor, "item", lambda self: reads.append(1) or item(self))
    _decompose(True, log_every=10, steps=4)
    first = len(reads)
    _decompose(True, log_every=10, steps=9)
    assert len(reads) == 2 * first  # rows 0 and the last, however many steps lie between


@pytest.mark.parametrize("steps", [1, WARMUP, WARMUP + 1])
def test_decompose_with_a_graph_may_end_before_there_is_one(graphs, steps):
    history = _decompose(True, steps=steps).history
    assert [row["step"] for row in history] == list(range(steps + 1))
    assert len(graphs) == (steps > WARMUP)


def test_decompose_with_a_graph_writes_what_it_did_when_interrupted(graphs, tmp_path):
    def data() -> Iterator[Tensor]:
        for index, batch in enumerate(cases.batches("tms")):
            if index == 7:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        _decompose(True, data(), out=tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("interrupted", 7)
    assert _timeless(read_metrics(tmp_path / "run")) == _timeless(_decompose(False).history[:7])


def test_decompose_with_a_graph_stops_when_a_loss_is_not_finite(graphs, tmp_path):
    data = [batch for batch, _ in zip(cases.batches("tms"), range(9), strict=False)]
    data[6][:] = math.nan
    with pytest.raises(DivergedError, match=r"^decompose: the loss is nan at step 6: "):
        _decompose(True, data, out=tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("diverged", 6)


def test_decompose_interrupted_in_the_capture_is_interrupted(graphs):
    calls = []

    def distance(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == WARMUP + 1:
            raise KeyboardInterrupt
        return (output - target).square().mean((-2, -1))

    with pytest.raises(KeyboardInterrupt):
        _decompose(True, distance=distance)


# ------------------------------------------------------------------------------------------------- what is refused


def test_decompose_refuses_a_graph_on_the_cpu(tmp_path):
    with pytest.raises(ValueError, match=r"^decompose: cuda_graph must be False for a target on cpu, got True$"):
        _decompose(True, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_decompose_refuses_a_graph_of_float64(graphs):
    with pytest.raises(ValueError, match=r"^decompose: cuda_graph must be False for a target of torch\.float64, got "):
        _decompose(True, target=cases.model("tms").target.double())


def test_decompose_refuses_a_graph_of_the_exact_selection(graphs):
    exact = METHOD.model_copy(update={"selection": "exact"})
    with pytest.raises(ValueError, match=r"^decompose: cuda_graph must be False for exact selection, got True; it "):
        _decompose(True, method=exact)
    _decompose(True, method=exact.model_copy(update={"topk": None}), steps=5)  # nothing is selected there


def test_decompose_refuses_a_graph_of_what_is_read_or_drawn_at_every_step(graphs):
    tokens = torch.randint(0, 5, (8,))
    embedding = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3))
    with pytest.raises(
        ValueError, match=r"^decompose: cuda_graph must be False for an embedding, got True; which rows"
    ):
        decompose(embedding, [tokens], ["0"], 3, steps=5, device="cpu", cuda_graph=True)
    no_chain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Softmax(-1))
    probes = METHOD.model_copy(update={"attribution_probes": 2})
    with pytest.raises(ValueError, match=r"^decompose: cuda_graph must be False for random directions, got True; they"):
        decompose(no_chain, [torch.rand(8, 4)], ["0"], 3, method=probes, device="cpu", cuda_graph=True)
    with pytest.raises(ValueError, match=r"^decompose: data must yield tensors with cuda_graph=True, got a dict"):
        decompose(no_chain, [{"input": torch.rand(8, 4)}], ["0"], 3, steps=5, device="cpu", cuda_graph=True)


@pytest.mark.skipif(not HAS_KERNELS, reason="no kernel is built")
def test_decompose_refuses_a_graph_of_singular_values_that_no_kernel_takes(graphs):
    exact = METHOD.model_copy(update={"schatten": "exact"})
    _decompose(True, method=exact, steps=5)
    message = (
        r"^decompose: cuda_graph must be False for exact Schatten sums of linear1, rank 2, torch\.float32, got True: "
    )
    with backends.use_backend("reference"), pytest.raises(NotImplementedError, match=message):
        _decompose(True, method=exact)
    with (
        backends.use_backend("cuda", "reference"),
        pytest.raises(NotImplementedError, match=r"cuda: .*; reference: its SVD waits for the device$"),
    ):
        _decompose(True, method=exact)
    with backends.use_backend("reference"):  # without the term nothing decomposes
        _decompose(True, method=exact.model_copy(update={"simplicity": 0.0}), steps=5)


@pytest.mark.parametrize("at", [1, WARMUP, WARMUP + 2])
def test_decompose_refuses_a_batch_of_another_shape(graphs, at):
    data = [batch for batch, _ in zip(cases.batches("tms"), range(9), strict=False)]
    data[at] = data[at][:, :3]
    message = (
        "decompose: data must yield batches of one shape with cuda_graph=True, got [2, 3, 5] after [2, 4, 5]; leave "
        "out what is left of an epoch"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _decompose(True, data)
    _decompose(False, data)


def test_decompose_names_what_breaks_a_capture(graphs, monkeypatch):
    monkeypatch.setattr(_cuda_graph, "_NOT_OWN", (*_cuda_graph._NOT_OWN, emulated.__file__))

    def distance(output: Tensor, target: Tensor) -> Tensor:
        scale = target.abs().max().item()
        return (output - target).square().mean((-2, -1)) / scale

    with pytest.raises(NotImplementedError) as caught:
        _decompose(True, distance=distance)
    message = str(caught.value)
    assert message.startswith(
        "decompose: cuda_graph must be False for a step that cannot be captured, got True and RuntimeError in distance "
        f"at {__file__}:"
    )
    assert f"(scale = target.abs().max().item()): {emulated.CAPTURING}" in message
    assert "\n" not in message
    assert len(_decompose(False, distance=distance, steps=6).history) == 7


def test_decompose_names_what_waits_for_the_device(graphs, monkeypatch):
    """Where torch notices, before the capture."""
    mode = ["off"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)

    def distance(output: Tensor, target: Tensor) -> Tensor:
        if mode[-1] == "warn":
            warnings.warn(
                "called a synchronizing CUDA operation (Triggered internally at Functions.cpp:1.)", stacklevel=1
            )
        return (output - target).square().mean((-2, -1))

    with pytest.raises(NotImplementedError) as caught:
        _decompose(True, distance=distance)
    message = str(caught.value)
    assert message.startswith(
        "decompose: cuda_graph must be False for a step that waits for the device, got True and a wait in distance at "
        f"{__file__}:"
    )
    assert "(warnings.warn(" in message
    assert mode == ["off", "warn", "off"] and not graphs
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        mode[:] = ["off"]

        def other(output: Tensor, target: Tensor) -> Tensor:
            warnings.warn("something else", stacklevel=1)
            return (output - target).square().mean((-2, -1))

        _decompose(True, distance=other, steps=WARMUP)
    assert [str(w.message) for w in others] == ["something else"] * (WARMUP + 1)


def test_batches_of_the_host_are_sent_by_way_of_pinned_memory_of_our_own(monkeypatch):
    """A copy that nobody waits for must not read what its owner may overwrite."""
    pinned = []
    empty = torch.empty

    def noted(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        pinned.append(pin_memory)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", noted)
    like: Any = types.SimpleNamespace(is_cuda=True, dtype=torch.float64, device=torch.device("cpu"))
    x = torch.rand(3, 4)
    sent = _sent(x, like)
    assert pinned == [True] and torch.equal(sent, x.double())
    like.dtype = x.dtype
    assert _sent(x, like).data_ptr() != x.data_ptr()


def test_optimiser_of_a_graph_has_its_rate_on_the_device():
    components = cases.model("tms").components
    (group,) = make_optimiser(components, capturable=True).param_groups
    assert (group["fused"], group["capturable"], group["lr"].dtype) == (True, True, torch.float32)
    (group,) = make_optimiser(components).param_groups
    assert (group["fused"], group["capturable"], group["lr"]) == (True, False, 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("target", cases.TARGETS)
def test_a_card_gives_the_same_history_with_a_graph(target):
    def run(graph: bool) -> Any:
        model = cases.model(target)
        data, patterns = cases.batches(target), cases.TARGETS[target][1]
        settings = {"method": METHOD, "optimiser": SCHEDULE, "steps": 32, "log_every": 1, "rank": 2}
        return decompose(model.target.to("cuda"), data, patterns, 4, cuda_graph=graph, **settings)

    with_graph, without = run(True), run(False)
    assert _timeless(with_graph.history) == _timeless(without.history)
    factors = with_graph.model.components.export()
    assert all(torch.equal(t, factors[name]) for name, t in without.model.components.export().items())
