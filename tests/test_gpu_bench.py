"""`bench/gpu.py` without a GPU: its rehearsal goes through every path on the CPU, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastapd import APD, backends, testing

ROOT = Path(__file__).parent.parent

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")

BARE = """
import sys
from importlib.machinery import PathFinder

GONE = {"hypothesis", "jaxtyping", "jinja2", "matplotlib", "pydantic", "pytest_benchmark", "safetensors", "scipy",
        "tqdm", "tyro", "yaml"}


class Bare:
    invalidate_caches = PathFinder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in GONE else PathFinder.find_spec(name, path, target)


def editable(finder):
    return "ditable" in getattr(finder, "__name__", type(finder).__name__)


sys.meta_path[:] = [Bare if f is PathFinder else f for f in sys.meta_path if not editable(f)]
"""
"""A Python that has torch, numpy, triton and pytest alone, and in which fastapd is not installed."""


def _gpu(*options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTAPD_", "TRITON_", "PYTEST_"))}
    env |= {"OMP_WAIT_POLICY": "passive"} | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-P", str(ROOT / "bench" / "gpu.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=1500)


def _rehearse(folder: Path, *options: str, path: Path | None = None) -> tuple[subprocess.CompletedProcess[str], dict]:
    out = folder / "rehearsal.json"
    done = _gpu("--rehearse", "--out", str(out), *options, path=path)
    assert out.is_file(), done.stdout + done.stderr
    return done, json.loads(out.read_text())


def _python(script: str, given: str = "", *arguments: str) -> str:
    """What a script prints that imports from the checkout."""
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


KEYS = {
    "schema", "rehearsal", "quick", "datetime", "seconds", "runs", "commit_info", "machine_info", "items", "build",
    "equivalence", "determinism", "capture", "benchmarks", "notes", "goals", "failures", "left_out",
}  # fmt: skip
CONSTANTS = {
    "memory_gbs", "l2_gbs", "fp32_tflops", "tf32_tflops", "bf16_tflops", "fp64_tflops", "fp32_vector_tflops",
    "fp64_vector_tflops", "launch_seconds", "graph_launch_seconds",
}  # fmt: skip


def _assert_schema(found: dict[str, Any]) -> None:
    assert set(found) == KEYS
    assert (found["schema"], found["rehearsal"]) == ("fastapd-gpu-1", True)
    assert {"id", "time", "dirty"} == set(found["commit_info"])
    machine = found["machine_info"]
    assert set(machine["constants"]) == CONSTANTS
    assert {"device", "gpu", "torch", "triton", "cpu", "dtype", "precision", "python_version"} <= set(machine)
    assert {item["status"] for item in found["items"]} <= {"done", "failed", "left out"}
    names = {item["name"] for item in found["items"]}
    for key in ("equivalence", "determinism", "capture", "benchmarks", "notes"):
        assert {entry["item"] for entry in found[key]} <= names
    for row in found["benchmarks"]:
        assert {"group", "name", "stats", "extra_info", "params", "item"} == set(row)
        assert row["stats"]["min"] <= row["stats"]["median"] <= row["stats"]["max"]
        info = {"contender", "direction", "fastapd", "flops", "bytes", "kind", "floor_seconds", "floor_bound", "error"}
        info |= {"l2", "precision", "dtype"}
        info |= (
            {"cold_seconds"} if row["extra_info"]["direction"].endswith("captured") else {"peak_bytes", "held_bytes"}
        )
        assert info <= set(row["extra_info"])


@needs_triton
def test_gpu_rehearsal_needs_torch_numpy_triton_and_pytest_alone(tmp_path):
    """One piece of every section, in a Python that has nothing else; what it writes is what a card's run would."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    only = (
        "build,constants,equivalence/component_sum,determinism/component_sum,capture/component_sum,"
        "capture/step/tms_40-10,timing/component_sum/tms_40-10,timing/batch_topk/n1m_k10000,timing/step/tms_5-2_b2048,"
        "timing/batched_svd/s1,timing/unit_norm/s1"
    )
    done, found = _rehearse(tmp_path, "--only", only, path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    _assert_schema(found)
    assert [item["name"] for item in found["items"]] == [
        "build", "constants", "equivalence/component_sum/float32", "capture/step/tms_40-10",
        "determinism/component_sum", "capture/component_sum", "equivalence/component_sum/bfloat16",
        "equivalence/component_sum/float16", "equivalence/component_sum/float64", "timing/batch_topk/n1m_k10000",
        "timing/step/tms_5-2_b2048", "timing/component_sum/tms_40-10", "timing/batched_svd/s1", "timing/unit_norm/s1",
    ]  # fmt: skip
    assert found["build"]["status"] == 0
    assert found["build"]["_C"] == "FASTAPD_CPU=0"
    assert {(row["backend"], row["dtype"]) for row in found["equivalence"]} == {
        (backend, dtype)
        for backend in ("triton", "reference")
        for dtype in ("float32", "float16", "bfloat16", "float64")
    }
    assert all(row["failed"] == 0 for row in found["equivalence"])
    contenders = {row["extra_info"]["contender"] for row in found["benchmarks"]}
    expected = "upstream torch torch_tangent torch_sort torch_compile gemms fastapd_step fastapd_warm triton".split()
    assert {*expected, "tf32 torch", "tf32 fastapd"} <= contenders
    chosen = {row["extra_info"]["contender"] for row in found["benchmarks"] if row["extra_info"]["fastapd"] == "chosen"}
    assert chosen == {"triton", "fastapd"}
    assert "this was a rehearsal: no figure in it means anything" in done.stdout
    assert not found["failures"] and not found["left_out"]
    assert not any(goal["counted"] for goal in found["goals"])
    # the file is one that the comparison of two runs reads
    compare = [sys.executable, "-P", str(ROOT / "bench" / "compare.py"), *[str(tmp_path / "rehearsal.json")] * 2]
    compared = subprocess.run(compare, capture_output=True, text=True, check=False)
    assert compared.returncode == 0, compared.stderr
    assert re.match(r"0 of [1-9]\d* ratios fell", compared.stdout.splitlines()[-1])


@needs_triton
def test_gpu_run_prints_no_speed_of_what_is_wrong(tmp_path):
    only = "equivalence/component_sum_loss/float32,timing/component_sum/tms_40-10"
    done, found = _rehearse(tmp_path, "--plant", "component_sum_loss", "--only", only)
    assert done.returncode == 1
    rows = {row["backend"]: row for row in found["equivalence"]}
    assert rows["triton"]["failed"] > 0
    assert rows["triton"]["messages"][0].startswith("few ieee: component_sum_loss on triton, outputs[0]: max error ")
    assert rows["reference"]["failed"] == 0
    timed = {row["extra_info"]["contender"] for row in found["benchmarks"]}
    assert timed == {"upstream", "torch", "tf32 torch", "gemms", "tf32 gemms", "reference"}
    withheld = {note["contender"] for note in found["notes"] if note["why"].startswith("withheld: ")}
    assert withheld == {"triton", "fastapd_step", "tf32 fastapd_step"}
    table = done.stdout.partition("component_sum/tms_40-10 forward_backward\n")[2]
    for name in ("triton", "fastapd_step"):
        assert f"    {name}: withheld: a check of component_sum_loss on triton failed\n" in table
        assert f"+ {name} " not in table
        assert f"> {name} " not in table


def test_gpu_run_lists_what_it_has_no_time_for(tmp_path):
    done, found = _rehearse(tmp_path, "--seconds", "1", "--only", "build,constants,timing/step")
    assert done.returncode == 0
    assert [item["status"] for item in found["items"]] == ["left out"] * len(found["items"])
    assert [left["name"] for left in found["left_out"]] == [item["name"] for item in found["items"]]
    assert "left out: timing/step/tms_40-10_b2048: no time left" in done.stdout.splitlines()
    assert len(found["left_out"]) == 9


def test_gpu_run_without_torch_says_so(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE.replace('"tqdm",', '"torch", "tqdm",'))
    done = _gpu("--out", str(tmp_path / "out"), path=tmp_path)
    assert done.stdout.startswith("gpu: torch is not installed for python")
    assert done.returncode == (1 if shutil.which("nvidia-smi") else 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_gpu_run_without_a_card_says_so_and_does_nothing(tmp_path):
    done = _gpu("--out", str(tmp_path))
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"gpu: torch {torch.__version__} finds no CUDA device, so nothing was measured; ")
    assert not list(tmp_path.iterdir())


CARD = """
import contextlib, json, types
import torch

missing = [name for name in (
    "init", "get_device_properties", "mem_get_info", "device_count", "memory_reserved", "memory_allocated", "Stream",
    "synchronize", "Event", "reset_peak_memory_stats", "max_memory_allocated", "empty_cache", "stream", "graph",
    "current_stream", "CUDAGraph", "_sleep", "set_sync_debug_mode", "OutOfMemoryError", "is_available",
) if not hasattr(torch.cuda, name)]
assert not missing, missing
asked = []


class Event:
    def __init__(self, enable_timing): assert enable_timing
    def record(self): asked.append("record")
    def synchronize(self): pass
    def elapsed_time(self, end): return 3000.0


class Stream:
    def wait_stream(self, other): asked.append("wait_stream")
    def synchronize(self): pass


class Graph:
    def replay(self): asked.append("replay")


properties = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=1 << 37, L2_cache_size=50 << 20
)
stand_ins = {
    "init": lambda: None, "get_device_properties": lambda i: properties, "mem_get_info": lambda: (1 << 36, 1 << 37),
    "device_count": lambda: 2, "memory_reserved": lambda: 5, "memory_allocated": lambda: 3, "synchronize": lambda: None,
    "Event": Event, "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: 7, "Stream": Stream,
    "empty_cache": lambda: None, "stream": lambda s: contextlib.nullcontext(), "current_stream": Stream,
    "CUDAGraph": Graph, "graph": lambda g: contextlib.nullcontext(), "_sleep": asked.append,
    "set_sync_debug_mode": asked.append,
}
for name, stand_in in stand_ins.items():
    setattr(torch.cuda, name, stand_in)

from bench._gpu import card as cards
from bench._gpu.card import Card
cards.LOAD_SIZE = 4
Card.device = "cpu"
card = Card()
facts = card.facts()
assert (facts["device"], facts["gpu"]["name"], facts["gpu"]["l2_bytes"]) == ("cuda", "NVIDIA H200", 50 << 20)
json.dumps(facts)
assert card.memory_bytes() == (1 << 36) + 2
assert card.second() == "cuda:1" and card.healthy() and card.often(7) == 7
calls = []
assert card.seconds(lambda: calls.append(1), 4) == 3.0 / 4 and len(calls) == 4
assert card.cold_seconds(lambda: calls.append(1), 3) == 3.0 and len(calls) == 7
assert card.held() == 3 and card.peak(lambda: calls.append(1)) == 7 and len(calls) == 8
replay, result = card.captured(lambda: len(calls))
replay()
assert result == 8 and asked[-1] == "replay"


def refused():
    raise ValueError("no")


try:
    card.captured(refused)
except ValueError as error:
    assert str(error) == "no"
with card.side_stream():
    card.delay()
card.load()
with card.forbidden_to_wait():
    assert asked[-1] == "error"
assert asked[-1] == "default"
card.wait()
card.tidy()
with card.backend("reference"), card.backend():
    print("sound")
"""


def test_card_asks_of_torch_what_there_is():
    """With stand-ins for the parts of torch.cuda that need a card; that they exist is looked up in torch itself."""
    assert _python(CARD) == "sound\n"


# ------------------------------------------------------------------------------------------- processes that go astray

ASTRAY = """
import os, time


def dies(card):
    print("about to die", flush=True)
    os._exit(3)


def hangs(card):
    time.sleep(600)


def fails(card):
    raise ValueError("of no use")


def fine(card):
    return {"rows": [{"said": "fine"}]}
"""

TEAM = """
import sys
sys.path.insert(0, sys.argv[1])
import json
from bench._gpu.items import Item
from bench._gpu.parent import Clock, Options, Team


class Quick(Item):
    hard_seconds = 3.0


if __name__ == "__main__":
    items = [Quick(f"capture/{name}", f"astray:{name}", {}, 0.1) for name in ("dies", "fine", "hangs", "fails")]
    late = Item("capture/late", "astray:fine", {}, 1e6)
    found = []
    with Team(1, Options(300, rehearsal=True), Clock(300), checks=True) as team:
        done = lambda item, result: found.append([item.name, result])
        team.work([*items, late], lambda item: {}, done, lambda item: None)
    print(json.dumps(found))
"""


@needs_triton
@pytest.mark.slow
def test_gpu_run_goes_on_when_a_process_dies_or_hangs(tmp_path):
    (tmp_path / "astray.py").write_text(ASTRAY)
    script = tmp_path / "team.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{TEAM}")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-P", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(json.loads(done.stdout))
    assert found["capture/dies"]["failures"] == ["the process ended: about to die (exit status 3)"]
    assert found["capture/fine"]["rows"] == [{"said": "fine"}]
    assert found["capture/hangs"]["failures"] == ["stopped after 3 s: it hangs or is far too slow"]
    assert found["capture/fails"]["failures"] == ["ValueError: of no use (astray.py:15)"]
    assert found["capture/late"] == {"left_out": "no time left"}


@needs_triton
@pytest.mark.slow
def test_gpu_rehearsal_of_everything(tmp_path):
    """And then a run that resumes it, which has nothing left to do."""
    done, found = _rehearse(tmp_path, "--seconds", "1400")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    _assert_schema(found)
    assert not found["left_out"]
    checked = {row["op"] for row in found["equivalence"]}
    assert checked == set(testing.OPS)
    assert {(row["op"], row["backend"]) for row in found["equivalence"]} == {
        (op, backend) for op in testing.OPS for backend in backends.TABLE[op] if backend not in ("cpu", "cuda")
    }, "what runs in a rehearsal: CUDA C++ needs a card"
    assert {goal["what"] for goal in found["goals"] if goal["value"] is None} == set()
    print(done.stdout[-3000:])
    earlier = tmp_path / "rehearsal.json"
    again = _gpu("--rehearse", "--resume", str(earlier), "--out", str(tmp_path / "again.json"), "--seconds", "100")
    assert again.returncode == 0, again.stdout + again.stderr
    resumed = json.loads((tmp_path / "again.json").read_text())
    assert resumed["benchmarks"] == found["benchmarks"]
    assert len(resumed["runs"]) == 1
    assert not resumed["left_out"]


# ------------------------------------------------------------------------------------------------ goals and the README


def _row(group: str, contender: str, median: float, direction: str, mark: str = "", **info: Any) -> dict[str, Any]:
    info |= {"contender": contender, "direction": direction, "fastapd": mark}
    return {"group": group, "extra_info": info, "stats": {"median": median}}


GOALS = """
import json
from bench import results
from bench._gpu import goals
given = json.load(sys.stdin)
table = results.table(results.rows(given))
for o in goals.outcomes(table, given["constants"], given["card"]):
    print(json.dumps([f"{o.goal.what} | {o.goal.against}", o.value, o.met, o.verdict]))
"""


def _outcomes(rows: list[dict[str, Any]], card: str = "NVIDIA H200") -> dict[str, list[Any]]:
    constants = {"tf32_tflops": 300.0, "memory_gbs": 4000.0}
    printed = _python(GOALS, json.dumps({"benchmarks": rows, "constants": constants, "card": card}))
    found = [json.loads(line) for line in printed.splitlines()]
    return {what: rest for what, *rest in found}


def test_gpu_goals_count_on_their_card_alone():
    rows = [
        _row("step/tms_40-10_b2048", "upstream", 6e-3, "step"),
        _row("step/tms_40-10_b2048", "fastapd", 3e-3, "step", "chosen"),
        _row("step/tms_40-10_b2048", "fastapd", 1e-4, "step captured", "chosen"),
    ]
    what = "step TMS 40-10, captured | eager research formulation"
    assert _outcomes(rows)[what] == [pytest.approx(60), True, "met"]
    assert _outcomes(rows, "NVIDIA H100")[what] == [pytest.approx(60), False, "met; not counted: no H200"]
    assert _outcomes(rows)["step TMS 40-10, captured | the clock"] == [1e-4, True, "met"]
    assert _outcomes(rows[:2])[what] == [None, False, "not measured"]


def test_gpu_goals_take_the_better_way_of_each_and_the_worst_group():
    def topk(case: str, theirs: float, ours: float) -> list[dict[str, Any]]:
        group = f"batch_topk/{case}"
        return [
            _row(group, "torch_scatter", theirs, "forward"),
            _row(group, "torch_scatter", theirs / 2, "forward captured"),
            _row(group, "triton", ours, "forward", "chosen"),
        ]

    what = "top-k, N >= 1M | torch.topk and scatter"
    rows = topk("n1m_k10000", 12.0, 1.0) + topk("n10m_k65536", 8.0, 1.0)
    value, met, verdict = _outcomes(rows)[what]
    assert (value, met) == (4.0, False)
    assert verdict == "missed by a factor of 1.25, not measured in n100m_k320000 (worst: n10m_k65536)"
    assert _outcomes(
        [*topk("n1m_k10000", 12.0, 1.0), *topk("n10m_k65536", 10.0, 1.0), *topk("n100m_k320000", 14.0, 1.0)]
    )[what] == [5.0, True, "met (worst: n10m_k65536)"]


def test_gpu_goals_of_rates_memory_and_bytes():
    attribution = {"flops": 6e13, "peak_bytes": 110, "jacobian_bytes": 90, "scores_bytes": 10}
    rows = [
        _row("attribution_reduce/s2_b4096", "triton", 1.0, "forward", "chosen", **attribution),
        _row("attribution_reduce/s2_b4096", "tf32 triton", 0.5, "forward", "forced", **attribution),
        _row("gradient_attributions/s2_b512", "fastapd", 1.0, "forward", "chosen", **attribution),
        _row("schatten/c4000_256x256_m8", "fastapd_step", 1e-3, "forward_backward", "forced", n_bytes=2e9),
        _row("step/resid_b2048", "upstream", 1.0, "step", held_bytes=1000),
        _row("step/resid_b2048", "fastapd", 1.0, "step", "chosen", held_bytes=100),
    ]
    found = {what: value for what, (value, *_) in _outcomes(rows).items()}
    assert found["attribution, reverse form, S2 | tensor rate, three products"] == pytest.approx(0.6)
    assert found["attribution, reverse form, S2, tf32 | tensor rate"] == pytest.approx(0.4)
    assert found["attribution of a step: peak memory | Jacobian and scores"] == pytest.approx(1.1)
    assert found["exact Schatten, m 8 | its bytes"] == pytest.approx(2.0)
    assert found["step residual, b 2048: peak memory | eager research formulation"] == pytest.approx(10.0)


README = """
from pathlib import Path
from bench import readme, results
results.RESULTS = Path(sys.argv[1])
print(readme.gpu_table())
"""


def _kept(folder: Path, **more: Any) -> None:
    rows = [
        _row("step/tms_40-10_b2048", "upstream", 6e-3, "step"),
        _row("step/tms_40-10_b2048", "torch_tangent", 1e-3, "step"),
        _row("step/tms_40-10_b2048", "fastapd", 3e-3, "step", "chosen"),
        _row("step/tms_40-10_b2048", "fastapd", 1e-4, "step captured", "chosen"),
    ]
    machine = {"device": "cuda", "gpu": {"name": "NVIDIA H200"}, "torch": "2.11.0", "triton": "3.6.0"}
    machine |= {"dtype": "float32", "precision": "tf32x3", "constants": {"tf32_tflops": 300.0, "memory_gbs": 4000.0}}
    found = {"datetime": "2027-01-01", "rehearsal": False, "machine_info": machine, "benchmarks": rows}
    found |= {"equivalence": [{"checked": 7}], "failures": [], "left_out": []} | more
    (folder / "2027-01-01-abc-h200.json").write_text(json.dumps(found))


def test_readme_says_that_no_gpu_figure_was_measured_while_there_is_none(tmp_path):
    line = "No GPU figure has been measured yet; `make gpu`, on a machine with CUDA, measures all of them."
    assert _python(README, "", str(tmp_path)) == f"{line}\n"


def test_readme_has_the_figures_of_the_card(tmp_path):
    _kept(tmp_path)
    lines = _python(README, "", str(tmp_path)).splitlines()
    assert "| TMS 40-10, 3 instances, C 50, batch 2048 | 6 ms | 1 ms | 3 ms | 100 µs | 60.0x | 10.0x |" in lines
    assert "| step TMS 40-10, captured | the clock | <= 150 µs | 100 µs | met |" in lines
    assert (
        "7 checks of equivalence, 0 failures, 0 pieces left out. From `bench/results/2027-01-01-abc-h200.json`."
        in lines
    )


def test_readme_refuses_a_rehearsal(tmp_path):
    _kept(tmp_path, rehearsal=True)
    script = README.replace(
        "print(readme", "import pytest\nwith pytest.raises(ValueError, match='got a rehearsal'): (readme"
    )
    _python(script, "", str(tmp_path))


def test_results_of_a_card_are_not_taken_for_those_of_the_cpu(tmp_path):
    _kept(tmp_path)
    found = _python(README.replace("readme.gpu_table()", "results.latest()"), "", str(tmp_path))
    assert found == "None\n"


# ----------------------------------------------------------------------------- the benchmarks' own targets and settings


def _targets() -> Any:
    spec = importlib.util.spec_from_file_location("bench_targets", ROOT / "bench" / "targets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_targets"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def test_method_of_the_benchmarks_has_the_fields_and_defaults_of_apd():
    method = _targets().Method
    fields = {f.name: f.default for f in dataclasses.fields(method)}
    assert list(fields) == list(APD.model_fields)
    assert fields.pop("topk") is dataclasses.MISSING
    assert APD.model_fields["topk"].is_required()
    assert fields == {name: f.default for name, f in APD.model_fields.items() if name != "topk"}


def test_settings_of_the_benchmarks_are_the_published_ones():
    from fastapd.experiments import tms

    published = {config.experiment: config.method.model_dump() for config in tms.defaults()}
    assert {name: dataclasses.asdict(m) for name, m in _targets().PUBLISHED.items()} == published


def test_targets_of_the_benchmarks_are_those_of_the_experiments():
    from fastapd.experiments import residual_mlp, tms

    ours = _targets()
    for mine, theirs, width in (
        (ours.TMS(2, 5, 2), tms.TMS(2, 5, 2), 5),
        (ours.ResidualMLP(1, 6, 5, 4, 2), residual_mlp.ResidualMLP(1, 6, 5, 4, 2), 6),
    ):
        for t in mine.state_dict().values():
            t.normal_()
        theirs.load_state_dict(mine.state_dict())
        x = torch.randn(next(iter(mine.state_dict().values())).shape[0], 7, width)
        assert torch.equal(mine(x), theirs(x))
        assert [name for name, _ in mine.named_modules()] == [name for name, _ in theirs.named_modules()]
    seed = torch.Generator().manual_seed
    assert torch.equal(
        ours.sparse_features(2, 9, 5, 0.3, seed(1), -1.0), next(tms.sparse_features(2, 9, 5, 0.3, seed(1), -1.0))
    )
