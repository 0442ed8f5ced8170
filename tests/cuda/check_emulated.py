"""Every CUDA kernel against the reference, compiled for the CPU; `tests/test_cuda.py` runs this file.

By hand: FASTAPD_EMULATED_CUDA=1 python -m pytest tests/cuda/check_emulated.py

`check_sanitizers.py` runs the cases of QUICK again on kernels that are compiled with sanitizers. Most cases that all
backends share are marked slow: `make test-all`.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

from fastapd import _native, backends, ops, testing
from fastapd.ops import _attribution_reduce_cuda, _component_forward_cuda, _topk_plan

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
QUICK = (
    testing.Case("few", 2, 5, 3, 2, 5, 6, n_outputs=3, k=1.5, tied=True),
    testing.Case("over", 1, 18, 17, 9, 33, 20, n_outputs=17, k=1.0),  # one more than fits a warp, on every axis
    testing.Case("tiles", 2, 3, 2, 2, 131, 67, n_outputs=2, k=1.0),  # several blocks an instance, the last one not full
)
CUDA = [op for op in testing.OPS if "cuda" in backends.TABLE[op]]
module: Any = _native.load("_C_cuda").module
PROVED: set[tuple[str, torch.dtype]] = set()


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LONG = ("component_svdvals", "schatten", "schatten_accumulate")
"""Those that rotate, which takes long at a rank of 9."""


def both(op: str, case: testing.Case) -> Any:
    quick = (case in QUICK and (case.name != "over" or op not in LONG)) or case.name == "odd"
    return pytest.param(op, case, id=f"{op}-{case.name}", marks=() if quick else pytest.mark.slow)


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=names)
every = pytest.mark.parametrize(
    "op, case", [both(op, case) for op in CUDA for case in (*QUICK, *testing.CASES.values())]
)


@pytest.fixture(autouse=True)
def on_cuda_alone(poisoned_memory: None, chosen_backend: None) -> Iterator[None]:
    with backends.use_backend("cuda"):
        yield


def answer(op: str, args: Any) -> tuple[testing.Answer, list[torch.Tensor] | None]:
    """Outputs, and gradients where the op has any; what has no CUDA kernel is left to the reference."""
    cotangents = None
    if testing._OPS[op].differentiable:
        cotangents = testing.random_cotangents(testing.reference(op, args).outputs)
    before = module.controls.fastapd_emulation_launches()
    outputs = testing.run(op, args).outputs  # by a CUDA kernel or not at all
    empty = not any(t.numel() for t in outputs) or not all(t.numel() for t in testing.tensors_of(args))
    assert empty or module.controls.fastapd_emulation_launches() > before, "no kernel was started"
    if cotangents is None:
        return testing.Answer(outputs, []), None
    with backends.use_backend("cuda", "reference"):
        return testing.run(op, args, cotangents), cotangents


def assert_matches(op: str, args: Any) -> testing.Answer:
    found, cotangents = answer(op, args)
    grads = None if cotangents is None else found.grads
    testing.assert_matches_reference(op, found.outputs, args, "cuda", grads=grads, cotangents=cotangents)
    PROVED.add((op, next(t.dtype for t in testing.tensors_of(args) if t.is_floating_point())))
    return found


@dtypes
@every
def test_kernels_match_the_reference(op, dtype, case):
    assert_matches(op, testing.inputs(op, case, dtype))


@pytest.fixture
def order() -> Iterator[Any]:
    """`order(n)`: in which order blocks and threads run; 0 forward, 1 backward, else mixed by this seed."""
    yield module.controls.fastapd_emulation_order
    module.controls.fastapd_emulation_order(0)


@every
def test_kernels_do_not_depend_on_the_order_of_threads(op, case, order):
    args = testing.inputs(op, case)
    forward = answer(op, args)[0]
    for other in (1, 7, 1000003):
        order(other)
        testing.assert_bit_equal(answer(op, args)[0], forward)


# --------------------------------------------------------------- routes that the sizes of the shared cases do not take


@dtypes
def test_rows_of_any_size_and_scale(dtype):
    """Longer than a block, and with squares beyond the dtype's range, which are done again in double."""
    limits = torch.finfo(dtype)
    for d in (1, 31, 32, 33, 300):
        rows = testing.inputs("unit_norm", testing.Case("", 1, 1, 7, 5, d, 1, n_outputs=1), dtype)[0]
        for row, scale in enumerate(
            (limits.max / 8, limits.tiny * 8, limits.smallest_normal, 0.0, torch.nan, torch.inf)
        ):
            rows[0, row] *= scale
        assert_matches("unit_norm", (rows,))


def test_calls_go_to_their_device_and_stream_and_leave_the_current_device_alone():
    rows, controls = torch.ones(3, 4), module.controls
    controls.fastapd_emulation_stream_of_last.restype = ctypes.c_uint64
    for device, stream in ((1, 0x7F0012345678), (0, 5)):
        module.unit_norm_float32(device, stream, rows.data_ptr(), 3, 4)
        assert controls.fastapd_emulation_device_of_last() == device
        assert controls.fastapd_emulation_stream_of_last() == stream
        assert controls.fastapd_emulation_current_device() == 0
    with pytest.raises(RuntimeError, match=r"^unit_norm: the problem must fit"):
        module.unit_norm_float32(1, 0, 0, 1 << 40, 1)
    assert controls.fastapd_emulation_current_device() == 0, "also after an error"


def longest(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape).flatten(1).sort().values.view(shape)


TOPK_SCORES = {
    "random": torch.randn,
    "few values": lambda shape: torch.randint(-2, 3, shape).float(),
    "all equal": lambda shape: torch.zeros(shape).copysign(torch.randn(shape)),  # -0 and 0
    "mostly zero": lambda shape: torch.rand(shape) * (torch.rand(shape) < 0.01),
    "NaN": lambda shape: torch.randn(shape).masked_fill(torch.rand(shape) < 0.04, -torch.nan),
    "infinite": lambda shape: torch.randn(shape).masked_fill(torch.rand(shape) < 0.04, torch.inf).log(),
    "of every scale": lambda shape: torch.randn(shape).mul(30).exp(),
    "denormal": lambda shape: torch.randint(-9, 9, shape) * 1e-45,
    "the last": longest,
}
FEW_TOPK = {"DIRECT": 0, "SAMPLES": ((1 << 31, 64),), "PART": 256}
MANY_TOPK = {"DIRECT": 0, "SAMPLES": ((1 << 31, 256),), "WORDS": 0, "LEAST": 32, "SEGMENT": 0, "LISTED": 0}
TOPK_ROUTES = {
    "direct": ({}, (2, 37, 13), (1, 40, 480, 481)),
    "few": (FEW_TOPK, (2, 71, 23), (1, 40, 200)),
    "many": (MANY_TOPK, (2, 230, 11), (20,)),
    "many, not stored": (MANY_TOPK, (1, 230, 11), (400, 2530)),
}


@pytest.fixture
def topk_sizes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`topk_sizes(route)`: as if the route's scores were as many as those that take it; returns their shape and Ks."""

    def lower(route: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        constants, shape, ks = TOPK_ROUTES[route]
        for name, value in constants.items():
            monkeypatch.setattr(_topk_plan, name, value)
        n_scores = shape[1] * shape[2]
        for k in ks:
            plan = _topk_plan.plan(shape, k, False, 132, 227 << 10)
            assert (plan.few, plan.samples == 0) == (int(not route.startswith("many")), route == "direct")
            assert plan.n_parts > 1 or route == "direct"
            assert (plan.room == 0) == (route == "many, not stored")
            assert n_scores % plan.part_scores != 0 or route == "direct", "the last part is not full"
        return shape, ks

    return lower


QUICK_KINDS = {torch.float32: 3, torch.bfloat16: 1, torch.float64: 0, torch.float16: 0}


def topk_kinds(routes: Iterable[Any], quick: Sequence[str]) -> pytest.MarkDecorator:
    """`route, dtype, kind`: in every run the first of the quick kinds, as many as the dtype has; the rest is slow."""
    return pytest.mark.parametrize(
        "route, dtype, kind",
        [
            pytest.param(
                route, dtype, kind, id=f"{route}-{names(dtype)}-{kind}",
                marks=() if kind in quick[: QUICK_KINDS[dtype]] else pytest.mark.slow,
            )
            for route in routes for dtype in DTYPES for kind in TOPK_SCORES
        ],
    )  # fmt: skip


@topk_kinds(TOPK_ROUTES, ("few values", "NaN", "of every scale"))
def test_topk_takes_every_route(route, dtype, kind, topk_sizes):
    shape, ks = topk_sizes(route)
    scores = TOPK_SCORES[kind](shape).to(dtype)
    for k in ks:
        assert_matches("batch_topk_warm", (scores, torch.full(shape[:1], torch.nan, dtype=dtype), k))
    assert_matches("batch_topk_counts", (scores, torch.tensor([ks[-1], 0][: shape[0]])))


@pytest.mark.parametrize("kind", ["few values", pytest.param("random", marks=pytest.mark.slow)])
@pytest.mark.parametrize("route", ["few", "many"])
def test_topk_does_not_depend_on_the_order_of_threads(route, kind, topk_sizes, order):
    shape, ks = topk_sizes(route)
    args = TOPK_SCORES[kind](shape), ks[-1]
    forward = answer("batch_topk", args)[0]
    for other in (1, 7, 1000003):
        order(other)
        testing.assert_bit_equal(answer("batch_topk", args)[0], forward)


def places_of_samples(n_samples: int, n_scores: int) -> torch.Tensor:
    """`place_of_sample` of csrc/cuda/topk_floor.h."""
    found = []
    for i in range(n_samples):
        begin, end = i * n_scores // n_samples, (i + 1) * n_scores // n_samples
        noise = i * 0x45D9F3B & 0xFFFFFFFF
        noise = (noise ^ noise >> 16) * 0x45D9F3B & 0xFFFFFFFF
        noise ^= noise >> 16
        found.append(begin + (noise * (end - begin) >> 32))
    return torch.tensor(found)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=names)
@pytest.mark.parametrize("wrong", ["too_few", "too_many"])
@pytest.mark.parametrize("route", ["few", "many"])
def test_topk_is_exact_where_the_sample_is_misleading(route, wrong, dtype, topk_sizes):
    """The sample has the largest scores, and fewer than K survive; or the smallest, and more than there is room for."""
    shape, _ = topk_sizes(route)
    n_scores, k = shape[1] * shape[2], 80 if route == "few" else 250
    plan = _topk_plan.plan(shape, k, dtype == torch.float64, 132, 227 << 10)
    expected = k * plan.samples / n_scores
    rank = int(expected + 6 * expected**0.5 + 4)
    sampled = places_of_samples(plan.samples, n_scores)
    scores = torch.rand(shape[0], n_scores, dtype=dtype)
    scores[:, sampled] += 2 if wrong == "too_few" else -2
    survivors = rank if wrong == "too_few" else n_scores - plan.samples + rank
    floor = scores[:, sampled].sort(descending=True).values[:, rank - 1 : rank]
    assert (scores >= floor).sum(1).tolist() == [survivors] * shape[0]
    assert survivors < k if wrong == "too_few" else survivors > (plan.room if plan.few else plan.listed)
    assert_matches("batch_topk_warm", (scores.view(shape), scores[:, 0].clone(), k))


def test_topk_reads_again_what_a_segment_has_no_room_for(topk_sizes):
    shape, _ = topk_sizes("many")
    k = 20
    plan = _topk_plan.plan(shape, k, False, 132, 227 << 10)
    assert k > plan.room > 0
    assert plan.part_scores > plan.room
    scores = torch.rand(shape).flatten(1)
    for at in (0, plan.part_scores * 3, scores.shape[1] - plan.part_scores):  # a part with more than it has room for
        some = scores.clone()
        some[:, at : at + plan.part_scores] += 1
        assert_matches("batch_topk", (some.view(shape), k))


SAMPLE_ROUTES = {"small": (2, 37, 13), "rows": (2, 37, 70), "long": (2, 3, 1100)}


@topk_kinds(SAMPLE_ROUTES, ("few values", "NaN", "of every scale"))
def test_sample_topk_takes_every_route(route, dtype, kind, monkeypatch):
    shape = SAMPLE_ROUTES[route]
    monkeypatch.setattr(_topk_plan, "SMALL", 500)
    small, _ = _topk_plan.sample_plan(shape, 3, False, module.sample_topk_row)
    assert bool(small) == (route == "small")
    assert (shape[2] > module.sample_topk_row) == (route == "long")
    scores = TOPK_SCORES[kind](shape).to(dtype)
    for k in (1, 3, shape[2]):
        assert_matches("sample_topk", (scores, k))


FORWARD = ("component_forward_selected", "component_forward_selected_accumulate")
FORWARD_SIZES = (  # what makes the project and outer passes take 4 pairs and 1 rank, 4 and 4, 8 and 8, 4 and 4 at once
    testing.Case("rank 1, many components", 1, 30, 1100, 1, 5, 129, n_outputs=0, k=3.0),
    testing.Case("rank below 8", 1, 17, 3, 7, 40, 130, n_outputs=0, k=1.5),
    testing.Case("rank beyond 8 and a warp", 2, 13, 2, 35, 34, 130, n_outputs=0, k=1.5),
    testing.Case("hardly any pairs", 1, 9, 40, 17, 37, 40, n_outputs=0, k=1.0),
)
forward_ops = pytest.mark.parametrize("op", FORWARD)


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are summed by way of the outputs of their pairs, 128 columns at a time."""
    monkeypatch.setattr(_component_forward_cuda, "EXPANDED", {"times_fewer": 0, "saved_bytes": -1 << 60, "bytes": 0})


@pytest.mark.parametrize("case", FORWARD_SIZES, ids=lambda case: case.name)
@dtypes
@forward_ops
def test_forward_takes_every_route(op, dtype, case):
    assert_matches(op, testing.inputs(op, case, dtype))


@pytest.mark.parametrize("case", FORWARD_SIZES[1:], ids=lambda case: case.name)
@dtypes
@forward_ops
def test_forward_by_way_of_pairs(op, dtype, case, expanded):
    assert_matches(op, testing.inputs(op, case, dtype))


@forward_ops
def test_forward_by_way_of_pairs_does_not_depend_on_the_order_of_threads(op, expanded, order):
    args = testing.inputs(op, FORWARD_SIZES[2])
    forward = answer(op, args)[0]
    for other in (1, 7):
        order(other)
        testing.assert_bit_equal(answer(op, args)[0], forward)


@pytest.mark.parametrize("way", ["direct", "by way of pairs"])
def test_forward_of_uneven_and_padded_selections(way, request):
    """One component takes nearly all, others nothing, whatever they hold; and lists of exact k, which end before their
    memory does."""
    if way != "direct":
        request.getfixturevalue("expanded")
    x, A, B, _ = testing.inputs("component_forward_selected", testing.Case("", 2, 70, 40, 9, 20, 140, n_outputs=0))
    scores = torch.rand(2, 70, 40)
    scores[:, :, 33] += 1
    scores[:, ::9, 3] += 1
    scores[:, :, 0] = -1  # where reads of what is not there would end up
    with backends.use_backend("reference"):
        uneven = ops.batch_topk(scores, 80)
        padded = ops.batch_topk(scores, torch.tensor([75, 4]))
    assert padded.offsets[:, -1].tolist() == [75, 4]
    assert padded.sample.shape[1] > 4
    assert_matches("component_forward_selected", (x, A, B, padded))
    A[:, 0], B[:, 0] = torch.inf, torch.nan
    assert_matches("component_forward_selected", (x, A, B, uneven))


LARGE_TILES = testing.Case("large tiles", 1, 2, 67, 3, 18, 21, n_outputs=131)  # two of 64 components, of 128 outputs


@dtypes
def test_attribution_in_large_tiles(dtype):
    assert_matches("attribution_reduce", testing.inputs("attribution_reduce", LARGE_TILES, dtype))


def test_attribution_in_large_tiles_does_not_depend_on_the_order_of_threads(order):
    args = testing.inputs("attribution_reduce", LARGE_TILES)
    forward = answer("attribution_reduce", args)[0]
    order(1)
    testing.assert_bit_equal(answer("attribution_reduce", args)[0], forward)


@pytest.mark.parametrize("folded", [0, 8], ids=["library", "folded"])
def test_attribution_in_parts_of_the_batch(folded, monkeypatch):
    """Of one sample each; z by the library, and by the kernel."""
    monkeypatch.setattr(_attribution_reduce_cuda, "CHUNK_BYTES", 1)
    monkeypatch.setattr(_attribution_reduce_cuda, "FOLDED", folded)
    before = module.controls.fastapd_emulation_launches()
    args = testing.inputs("attribution_reduce", testing.Case("", 2, 7, 5, 3, 18, 21, n_outputs=3, tied=True))
    assert_matches("attribution_reduce", args)
    assert module.controls.fastapd_emulation_launches() - before == 3 * 7, "forward twice, and backward"


def test_attribution_that_is_infinite_is_no_nan():
    """Tiles are wider than what there is of outputs: 0 times infinity is none of them."""
    ones = torch.ones(1, 2, 1)
    A, B, g = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1), torch.ones(1, 2, 5, 1)
    A[0, 1] = torch.inf
    found = ops.attribution_reduce([ones], [g], [A], [B])
    assert found.tolist() == [[[5, torch.inf, 5]] * 2]


def test_attribution_of_many_layers_is_left_to_others():
    most = module.attribution_reduce_layers
    layer = testing.inputs("attribution_reduce", "single")
    for n, refused in ((most, False), (most + 1, True)):
        args = tuple([part[0]] * n for part in layer)
        if refused:
            with pytest.raises(NotImplementedError, match=f"the CUDA kernel takes up to {most} layers, not {n}"):
                ops.attribution_reduce(*args)
        with backends.use_backend("cuda", "reference"):
            testing.assert_matches_reference("attribution_reduce", ops.attribution_reduce(*args), args, "cuda")


def test_an_unknown_device_is_an_error_with_the_name_of_the_op():
    with pytest.raises(RuntimeError, match=r"^unit_norm: invalid device ordinal$"):
        module.unit_norm_float32(2, 0, 0, 0, 0)


def test_calls_let_other_threads_of_python_run():
    rows, began, ended = torch.ones(4000, 64), [], []

    def call() -> None:
        began.append(True)
        module.unit_norm_float32(0, 0, rows.data_ptr(), 4000, 64)
        ended.append(True)

    thread, seen = threading.Thread(target=call), 0
    thread.start()
    while not ended:
        seen += bool(began)
        time.sleep(0)
    thread.join()
    assert seen > 50, "a few between the note and the call, thousands during it"


def test_more_blocks_than_a_grid_holds_are_refused():
    with pytest.raises(RuntimeError, match=r"^unit_norm: the problem must fit into 2\*\*31 - 1 blocks, got \d+; split"):
        module.unit_norm_float32(0, 0, 0, 1 << 40, 1)


def test_every_function_of_the_module_is_a_row_of_the_table():
    bound = {name.removesuffix("_float32") for name in dir(module) if name.endswith("_float32")}
    assert bound == {op for op, row in backends.TABLE.items() if "cuda" in row}


@pytest.fixture(scope="module", autouse=True)
def say_what_was_proved() -> Iterator[None]:
    yield
    n_dtypes = len({dtype for _, dtype in PROVED})
    blocks = module.controls.fastapd_emulation_blocks()
    print(f"\nemulated {len(PROVED)} pairs of op and dtype: {len(CUDA)} ops x {n_dtypes} dtypes, {blocks} blocks")
