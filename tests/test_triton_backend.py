"""When the Triton backend runs and when not, where it keeps its kernels, and how they multiply; without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import stat
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastapd
from fastapd import _env, _precision, _triton, backends, ops

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
A, B = torch.rand(2, 3, 4, 2), torch.rand(2, 3, 2, 5)


def on_cuda(dtype: torch.dtype = torch.float32, index: int = 0) -> Any:
    """What the backend looks at of a tensor that is on a card."""
    return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype, is_floating_point=lambda: True)


@pytest.fixture
def card(monkeypatch):
    """`card(capability)`: as if torch had one, on which every kernel starts; forgotten after the test."""
    started: list[int] = []

    def pretend(capability: tuple[int, int], failing: Exception | None = None) -> list[int]:
        def start(index: int) -> None:
            started.append(index)
            if failing is not None:
                raise failing

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(importlib.import_module("fastapd.kernels._launch"), "start_nothing", start)
        monkeypatch.setattr(_triton, "use_private_cache", lambda: Path())
        return started

    _triton.device_reasons.cache_clear()
    yield pretend
    _triton.device_reasons.cache_clear()


# ------------------------------------------------------------------------------------------------------------- reasons


@needs_triton
def test_triton_runs_where_a_card_starts_a_kernel_and_asks_once(card):
    started = card((9, 0))
    for _ in range(3):
        assert backends._triton_reasons([on_cuda()]) == []
    assert started == [0]
    assert backends._triton_reasons([on_cuda(index=1)]) == []
    assert started == [0, 1]


@needs_triton
def test_triton_refuses_an_old_card_without_trying_it(card):
    started = card((7, 5))
    assert backends._triton_reasons([on_cuda()]) == ["cuda:0 has compute capability 7.5, below 8.0"]
    assert started == []


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_triton_refuses_dtypes(card, dtype):
    card((8, 0))
    wanted = f"the Triton kernels take float32, float16 and bfloat16, not {dtype}"
    assert backends._triton_reasons([on_cuda(dtype)]) == [wanted]


@needs_triton
def test_triton_that_cannot_compile_warns_once_and_is_a_reason(card):
    started = card((9, 0), RuntimeError("Failed to find C compiler. Please specify via CC\nenvironment variable"))
    reason = "Triton is installed but runs no kernel on cuda:0: RuntimeError: Failed to find C compiler. Please specify"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert backends._triton_reasons([on_cuda()]) == [f"{reason} via CC"]
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert str(warning.message) == f"{reason} via CC; falling back to the next backend"
    assert started == [0]


@needs_triton
def test_triton_with_a_broken_cache_says_so(card, monkeypatch):
    card((9, 0))

    def broken() -> Path:
        raise _triton.CacheError("no folder for compiled kernels can be used; set TRITON_CACHE_DIR to one: /a: full")

    monkeypatch.setattr(_triton, "use_private_cache", broken)
    with pytest.warns(RuntimeWarning, match="set TRITON_CACHE_DIR to one: /a: full; falling back"):
        (reason,) = backends._triton_reasons([on_cuda()])
    assert "CacheError: no folder for compiled kernels can be used" in reason


@needs_triton
def test_triton_forced_on_the_cpu_says_that_there_is_no_driver(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, why in ((False, "this torch was built without CUDA"), (True, "torch finds no CUDA driver or no card")):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda built=built: built)
        wanted = rf"triton: the tensors are on cpu, not on a CUDA device \({why}\); "
        with backends.use_backend("triton"), pytest.raises(NotImplementedError, match=wanted):
            ops.component_sum(A, B)


def test_triton_missing_is_a_reason(monkeypatch):
    monkeypatch.setattr(_triton, "missing", lambda: "triton is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is merely absent is no warning
        assert backends._triton_reasons([on_cuda()]) == ["triton is not installed"]
        assert ops.component_sum(A, B).shape == (2, 4, 5)


def test_triton_is_not_asked_about_tensors_on_the_cpu(monkeypatch):
    def asked(tensors: Any) -> list[str]:
        raise AssertionError("a step of a small model would feel it")

    monkeypatch.setitem(backends._REASONS, "triton", asked)
    monkeypatch.setitem(backends._REASONS, "cuda", asked)
    assert ops.component_sum(A, B).shape == (2, 4, 5)
    assert ops.batch_topk(torch.rand(6, 3), 4).n_pairs == 4


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def homes(monkeypatch, tmp_path):
    """A user's cache and temporary files under tmp_path, and no TRITON_CACHE_DIR."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_cache_is_the_users_alone(homes):
    path = _triton.use_private_cache()
    assert path == homes / "home" / "cache" / "fastapd" / "triton"
    assert mode(path) == mode(path.parent) == 0o700
    assert os.environ["TRITON_CACHE_DIR"] == str(path)
    assert _triton.use_private_cache() == path  # now because the variable says so


def test_cache_takes_back_what_others_may_write(homes):
    path = homes / "home" / "cache" / "fastapd" / "triton"
    path.mkdir(parents=True)
    for folder in (path, path.parent):
        folder.chmod(0o777)
    assert _triton.use_private_cache() == path
    assert mode(path) == mode(path.parent) == 0o700


@pytest.mark.parametrize("wrong", ["a file", "a link", "another user's"])
def test_cache_falls_back_to_temporary_files(homes, monkeypatch, wrong):
    mine = homes / "home" / "cache" / "fastapd"
    mine.parent.mkdir(parents=True)
    if wrong == "a file":
        mine.write_text("")
    elif wrong == "a link":
        (homes / "elsewhere").mkdir()
        mine.symlink_to(homes / "elsewhere")
    else:
        lstat = os.lstat

        def foreign(path: Any) -> os.stat_result:
            found = list(lstat(path))
            found[stat.ST_UID] += 1 if str(path) == str(mine) else 0
            return os.stat_result(found)

        monkeypatch.setattr(os, "lstat", foreign)
    path = _triton.use_private_cache()
    assert path == homes / "tmp" / f"fastapd-{os.getuid()}" / "triton"
    assert mode(path) == mode(path.parent) == 0o700
    assert not (homes / "elsewhere" / "triton").exists()


def test_cache_that_cannot_be_had_says_why(homes):
    (homes / "home").write_text("")
    (homes / "tmp" / f"fastapd-{os.getuid()}").write_text("")
    with pytest.raises(
        _triton.CacheError, match="no folder for compiled kernels can be used; set TRITON_CACHE_DIR"
    ) as e:
        _triton.use_private_cache()
    assert str(homes / "home" / "cache" / "fastapd") in str(e.value)
    assert str(homes / "tmp") in str(e.value)
    assert os.environ["TRITON_CACHE_DIR"] == ""


def test_cache_of_the_user_is_used_or_refused(homes, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(homes / "own" / "kernels"))
    assert _triton.use_private_cache() == homes / "own" / "kernels"
    (homes / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(homes / "file"))
    with pytest.raises(_triton.CacheError, match="TRITON_CACHE_DIR must be a folder that can be written to, got /"):
        _triton.use_private_cache()


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.setattr(_precision, "_chosen", None)
    monkeypatch.delenv("FASTAPD_PRECISION", raising=False)
    return monkeypatch


def test_precision_is_tf32x3_unless_set(unset):
    assert _precision.precision() == "tf32x3"
    with fastapd.use_precision("ieee"):
        with fastapd.use_precision("tf32"):
            assert _precision.precision() == "tf32"
        assert _precision.precision() == "ieee"
    assert _precision.precision() == "tf32x3"
    fastapd.use_precision("tf32")
    assert _precision.precision() == "tf32"


def test_precision_comes_from_the_environment(unset):
    unset.setenv("FASTAPD_PRECISION", "ieee")
    assert _precision.precision() == "ieee"
    unset.setattr(_precision, "_chosen", None)
    unset.setenv("FASTAPD_PRECISION", "bf16")
    with pytest.raises(_env.SettingError, match=r"^FASTAPD_PRECISION must be ieee, tf32x3 or tf32, got 'bf16'$"):
        _precision.precision()


def test_precision_refuses_unknown_names(unset):
    with pytest.raises(ValueError, match=r"^use_precision: name must be one of ieee, tf32x3, tf32, got 'high'$"):
        fastapd.use_precision("high")


@needs_triton
def test_precision_of_products_goes_by_dtype(unset):
    from fastapd.kernels._launch import dot_precision

    wanted = {"ieee": ("ieee", "ieee"), "tf32x3": ("tf32x3", "tf32"), "tf32": ("tf32", "tf32")}
    for name, (single, half) in wanted.items():
        with fastapd.use_precision(name):
            assert dot_precision(torch.float32) == single
            assert dot_precision(torch.float16) == dot_precision(torch.bfloat16) == half


# -------------------------------------------------------------------------------------------------------------- launch


@needs_triton
def test_launch_refuses_more_programs_than_a_grid_holds():
    from fastapd.kernels._launch import launch

    with pytest.raises(ValueError, match=r"^op: the problem must fit into 2\*\*31 - 1 programs, got 2147483648; split"):
        launch("op", None, 2**31, A)
    launch("op", None, 0, A)  # nothing is started


@needs_triton
def test_launch_names_the_kernel_that_cannot_be_built():
    from fastapd.kernels import _launch
    from triton.runtime.errors import OutOfResources

    class Kernel:
        __name__ = "_some_kernel"

        def __getitem__(self, grid: Any) -> Any:
            def start(*args: Any, **config: Any) -> None:
                raise OutOfResources(300000, 232448, "shared memory")

            return start

    wanted = (
        "^op: the Triton kernel _some_kernel cannot be built for compute capability 9.0, got OutOfResources: .*300000"
    )
    with pytest.raises(RuntimeError, match=wanted):
        _launch.launch("op", Kernel(), 1, A)


def configurations(n: int, precision: str, capability: tuple[int, int]) -> list[dict[str, int]]:
    from fastapd.kernels import attribution_reduce, attribution_tangent, component_forward, component_sum, unit_norm

    return [
        component_forward.project_config(n, 4, capability),
        component_forward.combine_config(n, 4, capability),
        component_forward.outer_config(n, 4, capability),
        component_sum.sum_config(n, n, capability),
        attribution_reduce.reduce_config(n, n, False, precision, capability),
        attribution_tangent.rows_config(n, (16, 64), precision, capability),
        attribution_tangent.barrier_config(n, n, "gated", precision, capability),
        unit_norm.row_config(n),
    ]


@needs_triton
@pytest.mark.parametrize("n", [1, 7, 64, 1000])
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_launch_configurations_are_data(n, precision, capability):
    """The same call takes the same kernel in every process: nothing is timed, nothing is remembered."""
    found = configurations(n, precision, capability)
    assert configurations(n, precision, capability) == found
    for config in found:
        for name, value in config.items():
            assert value > 0
            assert not name.startswith("BLOCK") or value & (value - 1) == 0, (name, value)
