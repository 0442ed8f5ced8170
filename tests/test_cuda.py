"""The CUDA kernels without a GPU: lanes in processes of their own, which `conftest.py` starts beside other tests.

    cuda emulated     tests/cuda/check_emulat*.py: the .cu files compiled by g++, every kernel against the reference,
                      and the emulation on kernels that are wrong on purpose
    cuda sanitizers   tests/cuda/check_sanitizers.py: the same under the address and thread sanitizers, and with
                      mistakes in the kernels

and here: what nvcc made for cards that are not there, and what the module says on a machine without a driver.
`make test-all` adds the tests of tests/ops on emulated kernels and more planted errors.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastapd import _cuda, _info, _native, backends, testing, use_precision
from fastapd.ops import _component_forward_cuda, _topk_plan

TESTS = Path(__file__).parent
NATIVE = _native.load("_C_cuda")
needs_nvcc = pytest.mark.skipif(NATIVE.module is None, reason=NATIVE.reason)
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on this machine")
CUDA = [op for op, row in backends.TABLE.items() if "cuda" in row]


def load(name: str) -> Any:
    """A module of tests/cuda, which is no package."""
    spec = importlib.util.spec_from_file_location(name, TESTS / "cuda" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_gxx
@pytest.mark.parametrize("lane", ["cuda emulated", "cuda sanitizers"])
def test_cuda_lane(lanes, lane):
    for sanitizer in ("address", "thread"):
        try:
            load("emulated").preloaded(sanitizer)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    code, printed = lanes.result(lane)
    assert code == 0, printed[-8000:]
    assert re.search(r"^emulated .*\d+ blocks", printed, re.MULTILINE)
    assert "skipped" not in printed.splitlines()[-1], printed


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize("lane", ["cuda ops", "cuda in every case", "cuda sanitizers in full"])
def test_cuda_in_full(lanes, lane):
    """What the lanes above leave out: the tests of the ops, cases of thousands of blocks, ranks that fill one, every
    edge on every route, and more mistakes."""
    code, printed = lanes.result(lane)
    assert code == 0, printed[-8000:]
    assert re.search(r"\d+ passed", printed)
    assert lane != "cuda ops" or "skipped" not in printed.splitlines()[-1], printed
    print(printed)


# --------------------------------------------------------------------------------------------------- what nvcc has made


@pytest.fixture(scope="module")
def resources() -> Any:
    module = load("resources")
    if module.cuobjdump() is None:
        pytest.skip("cuobjdump, which comes with Triton, is not on this machine")
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is not on this machine")
    return module


@needs_nvcc
def test_cuda_kernels_need_no_more_than_a_card_has(resources):
    """No spills, no float atomics, no fast math; and the figures that are kept, for the nvcc that they are of."""
    found, nvcc = resources.figures(NATIVE.module), _native.build_info()["cuda"]
    assert resources.wrong(found, resources.ptx(NATIVE.module)) == []
    assert resources.changed(found, nvcc) == [], "python tests/cuda/resources.py --write, and look at what has changed"
    archs = {name.split(" | ")[0] for name in found}
    assert archs == {f"sm_{arch}" for arch in _native.build_info()["cuda_archs"]}
    kernels = {name.split(" | ")[1] for name in found}
    assert len(kernels) * len(archs) == len(found), "every kernel for every architecture"


def test_cuda_figures_that_are_wrong_are_found(resources, tmp_path, monkeypatch):
    sound = {"sm_90 | k<float>": {"registers": 40, "stack": 0, "shared": 32}}
    assert resources.wrong(sound, ".entry k\n atom.global.add.u32 %r1;\n add.rn.f32 %f1;") == []
    for row, message in (
        ({"stack": 8}, "8 bytes of stack"), ({"registers": 255}, "255 registers"), ({"shared": 50000}, "50000 bytes"),
    ):  # fmt: skip
        (line,) = resources.wrong({"sm_90 | k<float>": {**sound["sm_90 | k<float>"], **row}}, "")
        assert line.startswith("sm_90 | k<float>: ")
        assert message in line
    for code in ("red.global.add.f32 [%rd1], %f2;", "atom.shared.add.f64 %d1;", "div.full.f32 %f1;", "sqrt.approx.f32"):
        (line,) = resources.wrong(sound, f".entry k\n {code}")
        assert line.startswith("k: ")
    monkeypatch.setattr(resources, "RESOURCES", tmp_path / "resources.json")
    resources.write(sound, "13.0")
    assert resources.changed(sound, "13.0") == []
    more = {"sm_90 | k<float>": {"registers": 41, "stack": 0, "shared": 32}, "sm_90 | new": sound["sm_90 | k<float>"]}
    assert len(resources.changed(more, "13.0")) == 2
    assert resources.changed({}, "13.0") == ["sm_90 | k<float>: is no more"]
    assert resources.changed(more, "12.8") == []  # another compiler's figures are its own


# ------------------------------------------------------------------------------------------- without a driver or a card


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
@pytest.mark.parametrize("op", [op for op in CUDA if op in testing.OPS])
def test_cuda_forced_without_a_driver_says_so(op):
    module: Any = NATIVE.module
    assert module.device_count() == 0
    why = re.escape(module.unavailable_reason())
    args = testing.inputs(op, "odd")
    wanted = rf"^{op}: .*\(forced to cuda\): cuda: the tensors are on cpu, not on a CUDA device \({why}\); "
    with backends.use_backend("cuda"), pytest.raises(NotImplementedError, match=wanted):
        testing.run(op, args)


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_cuda_errors_carry_the_name_of_the_op():
    """Every bound function, straight from the module: the device cannot be made current."""
    module: Any = NATIVE.module
    for name in dir(module):
        if name.endswith(tuple(_cuda._NAMES.values())):
            n_arguments = len(re.findall(r"arg\d+", getattr(module, name).__doc__.split("->")[0]))
            with pytest.raises(RuntimeError, match=f"^{name.rpartition('_')[0]}: {module.unavailable_reason()}$"):
                getattr(module, name)(*[0] * n_arguments)


# ---------------------------------------------------------------------------------------------------- who runs, and why


def on_cuda(index: int = 0) -> Any:
    """What the backend looks at of a tensor that is on a card."""
    return SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32, is_floating_point=lambda: True)


@pytest.fixture
def card(monkeypatch):
    """`card(failing)`: as if torch had a card of capability 7.5, on which a kernel starts or does not."""
    started: list[int] = []

    def pretend(failing: str = "") -> list[int]:
        def start(index: int, stream: int) -> None:
            started.append(index)
            if failing:
                raise RuntimeError(failing)

        module = SimpleNamespace(memory="cuda", start_nothing=start, unavailable_reason=lambda: None)
        monkeypatch.setattr(_native, "load", lambda name: _native.Native(module, ""))  # type: ignore[arg-type]
        monkeypatch.setattr(_native, "build_info", lambda: {"cuda_archs": ["80", "90"]})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
        return started

    _cuda.device_reasons.cache_clear()
    yield pretend
    _cuda.device_reasons.cache_clear()


def test_cuda_runs_where_a_kernel_starts_and_asks_once(card):
    started = card()
    for _ in range(3):
        assert backends._cuda_reasons([on_cuda()]) == []
    assert backends._cuda_reasons([on_cuda(1)]) == []
    assert started == [0, 1]


def test_cuda_that_was_built_for_other_cards_warns_once_and_is_a_reason(card):
    card("start_nothing: no kernel image is available for execution on the device")
    reason = (
        "fastapd._C_cuda, built for sm_80, sm_90, runs no kernel on cuda:0 of compute capability 7.5: start_nothing: "
        "no kernel image is available for execution on the device"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert backends._cuda_reasons([on_cuda()]) == [reason]
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert str(warning.message) == f"{reason}; falling back to the next backend"


def test_cuda_missing_is_a_reason_and_no_warning(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda name: _native.Native(None, "fastapd._C_cuda was not built: no nvcc"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends._cuda_reasons([on_cuda()]) == ["fastapd._C_cuda was not built: no nvcc"]


def test_cuda_calls_have_the_dtype_the_device_and_the_current_stream(monkeypatch):
    said: list[Any] = []
    module = SimpleNamespace(some_op_bfloat16=lambda *args: said.append(args))
    monkeypatch.setattr(_native, "load", lambda name: _native.Native(module, ""))  # type: ignore[arg-type]
    streams = {torch.device("cuda", 3): SimpleNamespace(cuda_stream=77)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device])
    on: Any = SimpleNamespace(device=torch.device("cuda", 3), dtype=torch.bfloat16, is_cuda=True)
    _cuda.call("some_op", on, 1, 2)
    assert said == [(3, 77, 1, 2)]


@pytest.fixture
def everybody_runs(monkeypatch):
    """As on a card, for the order alone: nobody refuses."""
    monkeypatch.setattr(backends, "_reasons", lambda *args: [])


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_cuda_gives_way_to_a_single_launch(everybody_runs):
    small, large = (torch.zeros(1, 2, n, 2) for n in (8, 200))
    for A, first in ((small, "triton"), (large, "cuda")):
        args = A, A.mT, torch.zeros(1, A.shape[2], A.shape[2])
        names, why = backends.order("component_sum_loss", *args)
        assert names[0] == first
        assert bool(why) == (first == "triton")
        assert sorted(names) == sorted(backends.TABLE["component_sum_loss"])
        (line,) = _info._explained("component_sum_loss", args, None)
        assert line.split()[:2] == ["component_sum_loss", first]
        assert ("first because small: " in line) == (first == "triton")
        (line,) = _info._explained("component_sum_loss", args, ("cuda", "triton"))
        assert line.split()[1] == "cuda", "the order is the user's"
    assert backends.order("unit_norm", small) == (tuple(backends.TABLE["unit_norm"]), "")


# Reference sizes of a masked pass, K pairs of C components: (C, rank, K, d)
FORWARD_SIZES = {
    "toy": (40, 11, 4096, 10),
    "few large components": (130, 50, 2621, 1000),
    "many small components": (2000, 4, 65536, 512),
    "very many of rank 1": (100_000, 1, 320_000, 1024),
}


@pytest.mark.parametrize("name, columns", [("toy", 0), ("few large components", 1000), ("many small components", 0),
                                           ("very many of rank 1", 0)])  # fmt: skip
def test_cuda_sums_samples_by_way_of_pairs_where_that_moves_less(name, columns):
    C, rank, K, d = FORWARD_SIZES[name]
    assert _component_forward_cuda.expanded_columns(1, C, rank, K, d, 4) == columns


def test_cuda_holds_a_bounded_part_of_what_pairs_give():
    columns = _component_forward_cuda.expanded_columns(1, 2000, 50, 65536, 4096, 4)
    assert 0 < columns < 4096
    assert columns % 128 == 0
    assert columns * 65536 * 4 <= _component_forward_cuda.EXPANDED["bytes"]
    assert _component_forward_cuda.expanded_columns(1, 2000, 50, 1 << 26, 4096, 4) == 128, "and never none"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("rank, per_component, first", [(50, 20, "cuda"), (1, 200, "cuda"), (50, 200, "triton")])
def test_cuda_gives_way_to_tensor_cores_where_arithmetic_is_the_floor(everybody_runs, rank, per_component, first):
    case = testing.Case("", 1, per_component, 2, rank, 3, 4, n_outputs=0, k=2.0)
    x, A, B, selection = testing.inputs("component_forward_selected", case)
    args = x, A, B, *selection
    rest = testing.inputs("component_forward_selected_accumulate", case)
    backward = (*rest[:5], *selection, True, *rest[6:])
    for op, given in (("", args), ("_backward", backward), ("_accumulate", backward)):
        names, why = backends.order(f"component_forward_selected{op}", *given)
        assert names[0] == first
        assert bool(why) == (first == "triton")
        with use_precision("ieee"):  # which leaves tensor cores alone
            assert backends.order(f"component_forward_selected{op}", *given)[0][0] == "cuda"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize(
    "sizes, first", [((2048, 40, 11, 40, 10, 40), "cuda"), ((4096, 2000, 4, 8, 512, 512), "triton")]
)
def test_cuda_gives_way_to_tensor_cores_where_attributions_are_arithmetic(everybody_runs, sizes, first):
    batch, C, rank, d_in, d_out, n_outputs = sizes
    on = {"device": "meta"}  # sizes are all that is asked for
    A, B = torch.empty(1, C, d_in, rank, **on), torch.empty(1, C, rank, d_out, **on)
    layer = [torch.empty(1, batch, d_in, **on)], [torch.empty(1, batch, n_outputs, d_out, **on)], [A], [B]
    for op, args in (("", layer), ("_backward", (torch.empty(1, batch, C, **on), *layer))):
        names, why = backends.order(f"attribution_reduce{op}", *args)
        assert names[0] == first
        assert bool(why) == (first == "triton")
        with use_precision("ieee"):
            assert backends.order(f"attribution_reduce{op}", *args)[0][0] == "cuda"


def test_cuda_preferences_name_functions_that_exist():
    for op, backend in backends.PREFERRED:
        assert backend in backends.TABLE[op]
        if backend != "triton" or importlib.util.find_spec("triton"):
            assert callable(backends._load(backends.PREFERRED[op, backend]))


H200, A100, L40 = (132, 227 << 10), (108, 163 << 10), (142, 99 << 10)


def test_cuda_plans_of_topk_fit_the_cards_and_the_kernels():
    """What csrc/cuda/batch_topk.cu takes for granted, for all sizes."""
    sizes = [1, 2, 31, 33, 100, 500, 1000, 4096, 30000, 100000]
    routes = set()
    for batch, n_components, n_instances, card in itertools.product(sizes, sizes, (1, 3, 500), (H200, A100, L40)):
        n_scores = batch * n_components
        if n_scores >= 2**31:
            continue
        for k, of_double in itertools.product({1, batch, n_scores // 8, n_scores // 3, n_scores}, (False, True)):
            if not 0 < k <= n_scores:
                continue
            p = _topk_plan.plan((n_instances, batch, n_components), k, of_double, *card)
            routes.add((p.few, p.samples == 0, p.room == 0))
            assert p.samples == 0 if p.few and p.n_parts == 1 else p.samples > 0
            assert p.n_parts * p.part_scores >= n_scores
            if p.few:
                flats, words = (0 if p.samples == 0 else 4), n_components * -(-batch // 32)
                n_bytes = ((8 if of_double else 4) + flats) * p.room + 4 * k + 8 * words
                assert n_bytes + 2 * 3 * 32 * 8 + 4 * 257 + 1024 + 16 <= card[1]
                assert p.threads % 32 == 0
                assert 64 <= p.threads <= 1024
                assert p.room >= max(k, p.samples)
                if p.samples:
                    assert p.n_parts <= min(256, p.threads)
                    assert p.part_scores % p.threads == 0
                    assert p.part_scores <= p.room
            else:
                assert p.n_parts % 32 == 0
                assert p.part_scores % 32 == 0
                assert p.samples * (8 if of_double else 4) <= 32 << 10
                assert p.listed <= n_scores
    assert routes == {(1, True, False), (1, False, False), (0, False, False), (0, False, True)}


@needs_nvcc
def test_cuda_has_a_line_in_info():
    (line,) = [line for line in _info.lines() if line.startswith("  _C_cuda")]
    archs = ", ".join(f"sm_{arch}" for arch in _native.build_info()["cuda_archs"])
    assert f"{archs} and PTX of the newest, kernels for {len(CUDA)} of {len(backends.TABLE)} operations; " in line
