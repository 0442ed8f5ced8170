"""The command line: what each command prints, how it refuses, and its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from fastapd import __version__, _native, backends, cli
from fastapd import config as configs
from fastapd._rundir import read_metrics
from fastapd.experiments import get

TINY = ["--steps", "5", "--n-instances", "2", "--batch", "32", "--target.steps", "5"]


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """Runs without --out write below the current directory; `main` sets an environment variable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def _command(*args: str) -> list[str]:
    return [sys.executable, "-m", "fastapd", *args]


def _environment(**changes: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("FASTAPD_")} | changes


def _fastapd(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*args), env=_environment(**environment), capture_output=True, text=True, timeout=120)


def _main(args: list[str]) -> int:
    """The exit status of a command, whether it returns it or exits as argument parsers do."""
    threads = torch.get_num_threads()  # which a command may change
    try:
        return cli.main(args)
    except SystemExit as exit:
        assert isinstance(exit.code, int)
        return exit.code
    finally:
        torch.set_num_threads(threads)


def _file(path: Path, text: str = "", **changes: object) -> Path:
    values = get("tms_5-2").model_dump()
    values |= {"n_instances": 2, "steps": 5, "batch": 32, "device": "cpu"} | changes
    values["target"]["steps"] = 5
    path.write_text(yaml.safe_dump(values) + text)
    return path


# ---- no command, help, unknown commands


def test_cli_without_a_command_prints_help_and_exits_2():
    done = _fastapd()
    assert (done.returncode, done.stdout, done.stderr) == (2, cli.HELP, "")


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_cli_help_exits_0(flag, capsys):
    assert _main([flag]) == 0
    out = capsys.readouterr().out
    assert out == cli.HELP
    for command in ("demo", "run", "plan", "info"):
        assert f"  fastapd {command} " in out


def test_cli_version(capsys):
    assert _main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastapd {__version__}\n"


def test_cli_unknown_command_exits_2(capsys):
    assert _main(["frobnicate"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fastapd: command must be one of demo, run, plan, info, got 'frobnicate'\n")
    assert cli.HELP in printed.err


@pytest.mark.parametrize("args", [["demo", "--help"], ["run", "--help"], ["run", "tms_5-2", "--help"], ["info", "-h"],
                                  ["plan", "--help"], ["plan", "tms_5-2", "--help"]])  # fmt: skip
def test_cli_every_command_has_help(args, capsys):
    assert _main(args) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: fastapd") and printed.err == ""


@pytest.mark.parametrize(
    "args",
    [
        ["demo", "--nope"],
        ["demo", "--steps", "many"],
        ["run", "tms_5-2", "--nope", "1"],
        ["info", "now"],
        ["plan", "tms_5-2", "--nope", "1"],
        ["plan", "tms_5-2", "--batch", "many"],
    ],
)
def test_cli_wrong_options_exit_2(args, capsys):
    assert _main(args) == 2
    assert "fastapd" in capsys.readouterr().err


# ---- info


def test_cli_info_lists_every_op(capsys):
    assert _main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"fastapd {__version__}"
    assert any(torch.__version__ in line for line in lines)
    cpu = "reference" if _native.load("_C").module is None else "cpu"
    on_cpu = lines[lines.index("  float32 tensors on cpu") + 1 :][: len(backends.TABLE)]  # a GPU has its own part
    found = {line.split()[0]: line for line in on_cpu}
    for op, row in backends.TABLE.items():
        _, runs, *why = found[op].split(maxsplit=2)
        assert runs == (cpu if "cpu" in row else "reference")
        for backend in backends.BACKENDS:
            assert backend == runs or backend == "reference" or backend in " ".join(why)


def test_cli_info_says_what_is_forced(capsys):
    with backends.use_backend("reference"):
        assert _main(["info"]) == 0
    out = capsys.readouterr().out
    assert "forced to reference" in out and "attribution_reduce                     reference" in out


# ---- plan


def _rows(out: str, first: str) -> dict[str, list[str]]:
    """The rows of the table whose head starts with a word, by their first column."""
    table = out.split(f"\n{first} ")[1].split("\n\n")[0].splitlines()[2:]
    return {row.split()[0]: row.split()[1:] for row in table}


def test_cli_plan_says_form_costs_and_sites(capsys):
    assert _main(["plan", "tms_5-2", "--n-instances", "2"]) == 0
    out = capsys.readouterr().out
    assert "target         TMS: linear1 [5, 2], linear2 [2, 5]\n" in out
    assert "sizes          2 instances, batch 2048, C 5, rank 3\n" in out
    assert "attributions   tangent form. A chain of linear maps and nonlinearities" in out
    assert "op             attribution_tangent (`fastapd info` explains)\n" in out
    costs = _rows(out, "form")
    assert list(costs) == ["tangent", "reverse"] and costs["tangent"][-1] == "chosen" and len(costs["reverse"]) == 2
    # one product of 5 x 5 for each sample and component, 3 * 5 * (5 * 5 + 2 * 5) once for every instance and component,
    # and folding W once more; reverse: 5 outputs through two layers of 10 entries, then 2 * 3 * 7 + 5 * 7 a component
    folding, products = 2 * 5 * 3 * 2 * 5 * 2, 2 * 2 * 5 * 3 * 25
    assert float(costs["tangent"][0]) == pytest.approx(2 * (2 * 2048 * 5 * 25 + products + folding) / 1e9, rel=5e-3)
    assert float(costs["reverse"][0]) == pytest.approx(2 * 2 * 2048 * (5 * 20 + 5 * (42 + 35)) / 1e9, rel=5e-3)
    assert float(costs["reverse"][1]) == pytest.approx(2 * 2048 * 5 * 7 * 4 / 1e6, rel=5e-3)
    sites = _rows(out, "site")
    assert list(sites) == ["linear1", "linear2"]
    assert " ".join(sites["linear1"]) == "the input [5] A B, one product the output [5], folded into B"
    assert " ".join(sites["linear2"]) == "the input [5], folded into A A B, one product the output [5]"
    assert out.endswith("\nbetween        no nonlinearity before the output\n")


def test_cli_plan_of_a_file(tmp_path, capsys):
    target = {"family": "residual_mlp", "n_features": 30, "d_embed": 20, "d_mlp": 10, "n_layers": 2}
    path = _file(tmp_path / "mine.yaml")
    values = yaml.safe_load(path.read_text())
    values["target"] = target | {k: values["target"][k] for k in ("feature_probability", "steps", "batch", "lr")}
    path.write_text(yaml.safe_dump(values | {"experiment": "mine", "n_instances": 1, "n_components": 20, "rank": 4}))
    assert _main(["plan", str(path), "--batch", "256"]) == 0
    out = capsys.readouterr().out
    assert "target         ResidualMLP: layers.0.mlp_in [20, 10], layers.0.mlp_out [10, 20]," in out
    assert "sizes          1 instances, batch 256, C 20, rank 4\n" in out
    assert _rows(out, "form")["tangent"][-1] == "chosen"
    sites = _rows(out, "site")
    assert list(sites) == [f"layers.{k}.mlp_{end}" for k in (0, 1) for end in ("in", "out")]
    last = "relu after layers.1.mlp_in [10] A, then B the output [20], folded into B"
    assert " ".join(sites["layers.1.mlp_out"]) == last
    assert "\nbetween        relu after layers.0.mlp_in [10] to relu after layers.1.mlp_in [10]; " in out
    assert not (tmp_path / "runs").exists()


def test_cli_plan_says_what_is_forced(capsys):
    with backends.use_backend("reference"):
        assert _main(["plan", "tms_5-2"]) == 0
    assert "op             attribution_tangent, forced to reference (`fastapd info`" in capsys.readouterr().out


def test_cli_plan_without_a_name_lists_the_experiments(capsys):
    assert _main(["plan"]) == 2
    out = capsys.readouterr().out
    assert out.startswith("usage: fastapd plan NAME|FILE") and "tms_5-2" in out and "tms_40-10" in out


def test_cli_plan_of_a_wrong_name_or_value_exits_2(capsys):
    err = _refusal(["plan", "nope"], capsys)
    assert err == "fastapd: config: experiment must be one of tms_5-2, tms_40-10, got 'nope'\n"
    assert "did you mean tms_5-2?" in _refusal(["plan", "tms5-2"], capsys)
    assert "nowhere.yaml" in _refusal(["plan", "nowhere.yaml"], capsys)
    assert _main(["plan", "tms_5-2", "--batch", "0"]) == 2
    assert "batch must be >= 1, got 0" in capsys.readouterr().err


# ---- demo and run


def test_cli_demo_that_recovers_nothing_exits_1(tmp_path, capsys):
    assert _main(["demo", "--steps", "5", "--instances", "2", "--out", str(tmp_path / "run")]) == 1
    out = capsys.readouterr().out
    assert "recovered 0 of 2 instances" in out
    for words in ("random init (median)", "SVD of W (median)", "W/5, 5 times (median)", "published (APD paper)"):
        assert words in out
    assert f"run directory  {tmp_path / 'run'}" in out
    assert (tmp_path / "run" / "report.html").exists()
    config = configs.load(tmp_path / "run" / "fastapd.yaml")
    assert (config.steps, config.n_instances, config.batch, config.optimiser.schedule) == (5, 2, 256, "cosine")


def test_cli_run_by_name(tmp_path, capsys):
    args = ["--out", str(tmp_path / "run"), "--seed", "3", "--method.topk", "0.5", "--no-progress"]
    assert _main(["run", "tms_5-2", *TINY, *args]) == 1
    out = capsys.readouterr().out
    assert "seed 3" in out and "recovered 0 of 2 instances" in out
    assert ("CPU kernels" if _native.load("_C").module else "plain PyTorch reference") in out
    config = configs.load(tmp_path / "run" / "fastapd.yaml")
    expected = get("tms_5-2").model_dump() | {"seed": 3, "steps": 5, "n_instances": 2, "batch": 32}
    expected["method"]["topk"], expected["target"]["steps"] = 0.5, 5
    assert config.model_dump() == expected
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def test_cli_run_names_directories_after_the_experiment(tmp_path, capsys):
    (tmp_path / "runs" / "tms_5-2").mkdir(parents=True)  # a run of before
    assert _main(["run", "tms_5-2", *TINY]) == 1
    assert (tmp_path / "runs" / "tms_5-2-2" / "result.json").exists()
    assert "runs/tms_5-2-2" in capsys.readouterr().out


def test_cli_run_by_file(tmp_path, capsys):
    path = _file(tmp_path / "mine.yaml", experiment="mine", optimiser={"lr": 0.5})
    path.write_text(path.read_text().replace("lr: 0.5", "lr: 1e-3"))  # text to yaml.safe_load
    assert _main(["run", str(path), "--steps", "3"]) == 1
    config = configs.load(tmp_path / "runs" / "mine" / "fastapd.yaml")
    assert (config.optimiser.lr, config.steps, config.n_instances) == (1e-3, 3, 2)
    assert read_metrics(tmp_path / "runs" / "mine")[-1]["step"] == 3
    assert "recovered 0 of 2 instances" in capsys.readouterr().out


def test_cli_run_says_which_backend_is_forced(capsys):
    with backends.use_backend("reference"):
        assert _main(["run", "tms_5-2", *TINY]) == 1
    assert "backend        plain PyTorch reference" in capsys.readouterr().out


def test_cli_run_without_a_name_lists_the_experiments(capsys):
    assert _main(["run"]) == 2
    out = capsys.readouterr().out
    assert "tms_5-2" in out and "tms_40-10" in out


def _refusal(args: list[str], capsys) -> str:
    """What a command that exits with 2 says on stderr: a few lines, none of them of a traceback."""
    assert _main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastapd: ") and "Traceback" not in err and err.count("\n") <= 2
    return err


def test_cli_run_of_an_unknown_name_exits_2(tmp_path, capsys):
    err = _refusal(["run", "nope"], capsys)
    assert err == "fastapd: config: experiment must be one of tms_5-2, tms_40-10, got 'nope'\n"
    assert "did you mean tms_5-2?" in _refusal(["run", "tms5-2"], capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "text, message",
    [("stepz: 3\n", "config: stepz is not a known key; did you mean 'steps'?"), ("steps: 7\n", "'steps'")],
    ids=["unknown", "duplicate"],
)
def test_cli_run_of_a_file_with_a_wrong_key_exits_2(tmp_path, capsys, text, message):
    err = _refusal(["run", str(_file(tmp_path / "mine.yaml", text))], capsys)
    assert message in err and "mine.yaml" in err


def test_cli_run_of_a_missing_file_exits_2(tmp_path, capsys):
    assert "nowhere.yaml" in _refusal(["run", "nowhere.yaml"], capsys)


def test_cli_run_with_a_value_out_of_range_exits_2(tmp_path, capsys):
    assert _main(["run", "tms_5-2", "--method.p", "0"]) == 2
    assert "method.p must be > 0" in capsys.readouterr().err
    assert _main(["demo", "--instances", "0"]) == 2
    assert "n_instances must be >= 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_cli_run_with_a_graph_where_there_is_no_card_exits_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = ["run", "tms_5-2", *TINY, "--cuda-graph"]
    assert "config: cuda_graph must be false on a CPU, got True and torch sees no CUDA device" in _refusal(run, capsys)
    assert "config: cuda_graph must be false when device is 'cpu', got True" in _refusal(
        [*run, "--device", "cpu"], capsys
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [["demo"], ["run", "tms_5-2"]])
def test_cli_out_that_is_not_empty_exits_2(tmp_path, capsys, command):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    err = _refusal([*command, "--out", str(tmp_path / "full")], capsys)
    assert "path must be missing or an empty directory" in err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


# ---- interrupts and the environment


def _interrupted(process: subprocess.Popen[str], ready: Path) -> str:
    """Sends SIGINT once `ready` is there; what the process then had to say."""
    try:
        deadline = time.monotonic() + 100
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        return process.communicate(timeout=100)[1]
    finally:
        process.kill()


def test_cli_interrupt_exits_130_and_says_how_far_it_came(tmp_path):
    steps = 10_000_000
    args = ["run", "tms_5-2", *TINY, "--steps", str(steps), "--log-every", "20", "--out", "run"]
    process = subprocess.Popen(
        _command(*args), env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a run in the background ignores it
    )  # fmt: skip
    err = _interrupted(process, tmp_path / "run" / "metrics.jsonl")
    assert process.returncode == 130, err
    assert "fastapd: interrupted" in err and "Traceback" not in err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "interrupted" and status["steps"] == steps
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert last <= status["step"] <= last + 20
    assert status["message"] == f"stopped by the user at step {status['step']} of {steps}"
    assert (tmp_path / "run" / "components.safetensors").exists()


def test_cli_unknown_backend_in_the_environment_exits_2():
    done = _fastapd("info", FASTAPD_BACKEND="nonsense")
    assert done.returncode == 2
    assert done.stderr == (
        "fastapd: FASTAPD_BACKEND must be auto or a comma-separated list of cuda, triton, cpu, reference, "
        "got 'nonsense'\n"
    )


@pytest.mark.parametrize("command", [["demo"], ["run", "tms_5-2"]])
def test_cli_unknown_backend_is_noticed_before_anything_is_written(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("FASTAPD_BACKEND", "cpu,nonsense")
    monkeypatch.setattr(backends, "_environment_read", False)
    assert "got 'cpu,nonsense'" in _refusal(command, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(_native.load("_C").module is None, reason="no native module has levels")
def test_cli_unknown_instruction_set_in_the_environment_exits_2():
    done = _fastapd("info", FASTAPD_CPU_CAPABILITY="nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("fastapd: FASTAPD_CPU_CAPABILITY must be one of baseline")


def test_cli_a_backend_that_cannot_run_exits_2(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with backends.use_backend("cuda"):
        err = _refusal(["run", "tms_5-2", *TINY], capsys)
    assert "no backend can run on these inputs (forced to cuda)" in err


@pytest.mark.parametrize("before, after", [(None, "passive"), ("active", "active")])
def test_cli_threads_sleep_unless_the_user_says_otherwise(monkeypatch, capsys, before, after):
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    assert _main(["--help"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == after


def test_cli_refuses_a_run_without_threads(tmp_path, capsys):
    assert _main(["demo", "--threads", "0", "--out", str(tmp_path / "run")]) == 2
    assert "config: threads must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
