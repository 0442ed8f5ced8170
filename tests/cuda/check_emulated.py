"""Every CUDA kernel against the reference, compiled for the CPU; `tests/test_cuda.py` runs this file.

By hand: FASTAPD_EMULATED_CUDA=1 python -m pytest tests/cuda/check_emulated.py

`check_sanitizers.py` runs the cases of QUICK again on kernels that are compiled with sanitizers. Cases of thousands of
blocks are marked slow: `make test-all`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastapd import _native, backends, ops, testing
from fastapd.ops import _attribution_reduce_cuda, _component_forward_cuda

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


LONG = ("component_forward_selected", "component_forward_selected_accumulate", "attribution_reduce")
LONG_CASES = ("tms", "tms_40", "resid", "wide")


def both(op: str, case: testing.Case) -> Any:
    slow = op in LONG and case.name in LONG_CASES
    return pytest.param(op, case, id=f"{op}-{case.name}", marks=pytest.mark.slow if slow else ())


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
        module.unit_norm_float32(1, 0, 0, 0, 0)


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
