"""batch_topk and sample_topk: exact selections, ties by the lowest flat index, against numpy."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastapd import backends, ops, testing

OPS = ("batch_topk", "sample_topk")
both = pytest.mark.parametrize("op, backend", testing.pairs(*OPS), indirect=["backend"])
each = pytest.mark.parametrize("backend", testing.cpu_backends("batch_topk"), indirect=True)


def order(scores: np.ndarray) -> np.ndarray:
    """Indices by (NaN first, then -value, then index): a stable sort; -0 and +0 are equal."""
    nan = np.isnan(scores)
    return np.lexsort((np.where(nan, 0, -scores), ~nan))


def chosen(op: str, scores: Tensor, k: int) -> np.ndarray:
    """The mask of one instance, [b, C], from numpy."""
    values = scores.double().numpy()
    mask = np.zeros(values.shape, bool)
    if op == "batch_topk":
        mask.flat[order(values.ravel())[:k]] = True
    else:
        for row, kept in zip(values, mask, strict=True):
            kept[order(row)[:k]] = True
    return mask


def assert_lists(selection: ops.Selection, mask: np.ndarray) -> None:
    """All five lists of a selection are those of the mask [b, C]."""
    component_major = [(s, c) for c in range(mask.shape[1]) for s in range(mask.shape[0]) if mask[s, c]]
    sample_major = sorted(component_major)
    wanted = {
        "sample": [s for s, _ in component_major],
        "offsets": [0, *np.cumsum(mask.sum(0)).tolist()],
        "component": [c for _, c in sample_major],
        "sample_offsets": [0, *np.cumsum(mask.sum(1)).tolist()],
        "position": [component_major.index(pair) for pair in sample_major],
    }
    for name, values in wanted.items():
        dtype = torch.int64 if name.endswith("offsets") else torch.int32
        assert getattr(selection, name).dtype == dtype
        assert getattr(selection, name).tolist() == values, name


def assert_selects(op: str, scores: Tensor, k: int) -> None:
    """The op's selection of scores [I, b, C] is numpy's, in its mask and in its lists."""
    found = getattr(ops, op)(scores, k)
    for i, one in enumerate(scores):
        mask = chosen(op, one, k)
        assert np.array_equal(found.mask[i].numpy(), mask)
        if mask.size < 5000:
            assert_lists(ops.Selection(*(t[i] for t in found)), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
@both
def test_batch_topk_matches_the_reference_and_numpy(op, backend, case, dtype):
    scores, k = testing.inputs(op, case, dtype)
    testing.assert_matches_reference(op, testing.run(op, (scores, k)).outputs, (scores, k), backend)
    most = scores.shape[2] if op == "sample_topk" else scores[0].numel()
    for kept in {0, k, most // 2, most}:
        assert_selects(op, scores, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_batch_topk_takes_half_precision(op, dtype):
    scores, k = testing.inputs(op, "tms_40", dtype)
    assert_selects(op, scores, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@both
def test_batch_topk_breaks_ties_by_the_lowest_index(op, backend, dtype):
    for values in (torch.zeros(2, 7, 9), (torch.rand(2, 7, 9) < 0.5), torch.randint(0, 3, (2, 7, 9))):
        scores = values.to(dtype)
        for k in range(0, 10 if op == "sample_topk" else 64):
            assert_selects(op, scores, k)


@both
def test_batch_topk_orders_special_values(op, backend):
    for dtype, tiny in ((torch.float32, 1e-45), (torch.float64, 5e-324)):
        top = torch.finfo(dtype).max
        row = [0.0, -tiny, torch.inf, -0.0, tiny, torch.nan, -torch.inf, top, 2 * tiny, -torch.nan, 0.0, -top, 1.0]
        scores = torch.tensor([[row, row[::-1]]], dtype=dtype)
        assert scores[0, 0, 4] > 0
        for k in range(14 if op == "sample_topk" else 27):
            assert_selects(op, scores, k)


def test_batch_topk_agrees_with_numpy_on_any_scores():
    hypothesis = pytest.importorskip("hypothesis", reason="property tests need hypothesis")
    st = hypothesis.strategies
    special = [0.0, -0.0, 1e-45, -1e-45, 3e-45, 5e-324, 1.0, 1 + 2**-23, -1.0, 3e38, np.inf, -np.inf, np.nan]
    number = st.sampled_from(special) | st.floats(width=32)

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
    @hypothesis.given(data=st.data(), shape=st.tuples(st.integers(1, 2), st.integers(0, 6), st.integers(1, 6)))
    def agree(data: Any, shape: tuple[int, ...]) -> None:
        n = int(np.prod(shape))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        # few different values make ties
        pool = data.draw(st.lists(number, min_size=1, max_size=4))
        values = data.draw(st.lists(st.sampled_from(pool), min_size=n, max_size=n))
        scores = torch.tensor(values, dtype=dtype).reshape(shape)
        for op, most in (("batch_topk", shape[1] * shape[2]), ("sample_topk", shape[2])):
            k = data.draw(st.integers(0, most))
            for backend in testing.cpu_backends(op):
                if backends.explain(op, scores, k)[backend]:
                    continue
                with backends.use_backend(backend):
                    assert_selects(op, scores, k)

    agree()


@each
def test_batch_topk_selection_describes_itself(backend):
    scores = torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.3, 0.7]])
    found = ops.batch_topk(scores, 3)  # worked by hand: (0, 1), (1, 0), (1, 2)
    assert (found.n_pairs, found.n_components, found.batch) == (3, 3, 2)
    assert found.sample.tolist() == [1, 0, 1]
    assert found.offsets.tolist() == [0, 1, 2, 3]
    assert found.component.tolist() == [1, 0, 2]
    assert found.sample_offsets.tolist() == [0, 1, 3]
    assert found.position.tolist() == [1, 0, 2]
    assert found.counts.tolist() == [1, 1, 1]
    assert found.mask.tolist() == [[False, True, False], [True, False, True]]


@both
def test_batch_topk_passes_opcheck(op, backend):
    scores, k = testing.inputs(op, "odd")
    torch.library.opcheck(getattr(torch.ops.fastapd, op), (scores, k))


@pytest.mark.parametrize("op", OPS)
def test_batch_topk_compiles_to_one_graph(op):
    scores, k = testing.inputs(op, "rank1")
    compiled = torch.compile(lambda s: getattr(ops, op)(s, k), fullgraph=True, backend="aot_eager")
    found, wanted = compiled(scores), getattr(ops, op)(scores, k)
    testing.assert_bit_equal(list(found), list(wanted))
    mask = torch.compile(lambda s: getattr(ops, op)(s, k).mask, fullgraph=True, backend="aot_eager")
    testing.assert_bit_equal(mask(scores), wanted.mask)


def test_batch_topk_compiles_with_a_changing_batch():
    compiled = torch.compile(lambda s: ops.batch_topk(s, s.shape[0]), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 8, 13):
        scores = torch.rand(batch, 4)
        testing.assert_bit_equal(list(compiled(scores)), list(ops.batch_topk(scores, batch)))


@both
def test_batch_topk_needs_no_instance_axis(op, backend):
    scores, k = testing.inputs(op, "odd")
    found, one = getattr(ops, op)(scores, k), getattr(ops, op)(scores[1], k)
    testing.assert_bit_equal(list(one), [t[1] for t in found])
    testing.assert_bit_equal([one.mask, one.counts], [found.mask[1], found.counts[1]])


@pytest.mark.parametrize("view", testing.VIEWS)
@both
def test_batch_topk_takes_any_strides(op, backend, view):
    scores, k = testing.inputs(op, "odd")
    testing.assert_bit_equal(
        testing.run(op, (testing.VIEWS[view](scores), k)).outputs, testing.run(op, (scores, k)).outputs
    )
    expanded = scores[:, :1].expand_as(scores)
    testing.assert_bit_equal(testing.run(op, (expanded, k)).outputs, testing.run(op, (expanded.clone(), k)).outputs)


@both
def test_batch_topk_leaves_its_inputs_alone(op, backend):
    scores, k = testing.inputs(op, "tms_40")
    before = scores.clone()
    testing.run(op, (scores, k))
    testing.assert_bit_equal(scores, before)


@both
def test_batch_topk_repeats_bit_for_bit(op, backend):
    args = testing.inputs(op, "tms_40")
    first = testing.run(op, args).outputs
    for _ in range(20):
        testing.assert_bit_equal(testing.run(op, args).outputs, first)


@both
def test_batch_topk_is_a_constant(op, backend):
    scores, k = testing.inputs(op, "odd")
    found = getattr(ops, op)(scores.requires_grad_(), k)
    assert not any(t.requires_grad for t in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_batch_topk_is_independent_of_threads(backend, dtype, threads):
    scores = torch.randint(0, 1000, (3, 300, 300)).to(dtype)  # shares its instances among threads; many ties
    threads(1)
    alone = ops.batch_topk(scores, 700)
    for n in (2, 3):
        threads(n)
        testing.assert_bit_equal(list(ops.batch_topk(scores, 700)), list(alone))
    assert np.array_equal(alone.mask[2].numpy(), chosen("batch_topk", scores[2], 700))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
def test_batch_topk_at_every_level(cpu_level, dtype):
    for case in ("tms", "tms_40", "odd"):
        scores, k = testing.inputs("batch_topk", case, dtype)
        assert_selects("batch_topk", scores, k)
        assert_selects("batch_topk", scores.round(), k)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@both
def test_batch_topk_of_nothing_is_empty(op, backend, shape):
    found = getattr(ops, op)(torch.zeros(shape), 0)
    n_instances, batch, n_components = shape
    assert found.sample.shape == found.component.shape == found.position.shape == (n_instances, 0)
    testing.assert_bit_equal(found.offsets, torch.zeros(n_instances, n_components + 1, dtype=torch.int64))
    testing.assert_bit_equal(found.sample_offsets, torch.zeros(n_instances, batch + 1, dtype=torch.int64))
    assert found.mask.shape == shape and not found.mask.any()


S = torch.zeros(2, 6, 3)
AXES = "[batch, n_components] or [n_instances, batch, n_components]"
FLOATS = "must be float32, float64, float16 or bfloat16"
HUGE = torch.zeros(1, 1).expand(2**16, 2**15)
BOTH_REFUSE = [
    (ValueError, S[0, 0], 1, f"scores must have shape {AXES}, got [3]"),
    (ValueError, S[None], 1, f"scores must have shape {AXES}, got [1, 2, 6, 3]"),
    (TypeError, S.long(), 1, f"scores {FLOATS}, got torch.int64"),
    (TypeError, S.bool(), 1, f"scores {FLOATS}, got torch.bool"),
    (TypeError, S.cfloat(), 1, f"scores {FLOATS}, got torch.complex64"),
    (TypeError, S.numpy(), 1, "scores must be a torch.Tensor, got ndarray"),
    (TypeError, None, 1, "scores must be a torch.Tensor, got NoneType"),
    (TypeError, S, 2.0, "{k} must be an int, got float 2.0"),
    (TypeError, S, True, "{k} must be an int, got bool True"),
    (TypeError, S, None, "{k} must be an int, got NoneType None"),
    (TypeError, S, torch.tensor(2), "{k} must be an int, got Tensor tensor(2)"),
    (ValueError, HUGE, 1, "scores must have fewer than 2**31 entries an instance, got [65536, 32768]"),
]


@pytest.mark.parametrize("error, scores, k, message", BOTH_REFUSE, ids=[message[:40] for *_, message in BOTH_REFUSE])
@pytest.mark.parametrize("op", OPS)
def test_batch_topk_refuses(op, error, scores, k, message):
    message = message.format(k="K" if op == "batch_topk" else "k")
    with pytest.raises(error, match=re.escape(f"{op}: {message}") + "$"):
        getattr(ops, op)(scores, k)


@pytest.mark.parametrize(
    "op, k, message",
    [
        ("batch_topk", -1, "K must be in [0, batch * n_components=18], got -1"),
        ("batch_topk", 19, "K must be in [0, batch * n_components=18], got 19"),
        ("sample_topk", -1, "k must be in [0, n_components=3], got -1"),
        ("sample_topk", 4, "k must be in [0, n_components=3], got 4"),
    ],
)
def test_batch_topk_refuses_a_count_out_of_range(op, k, message):
    with pytest.raises(ValueError, match=re.escape(f"{op}: {message}") + "$"):
        getattr(ops, op)(S, k)


def ties_to_the_highest_index(right, scores, k):
    flipped = right(scores.flip(1, 2), k)
    mask = ops.Selection(*flipped).mask.flip(1, 2)
    return right(mask.float(), int(mask[0].sum()))


@both
def test_batch_topk_planted_error_is_found(op, backend, plant):
    scores = torch.randint(0, 3, (2, 8, 6)).float()
    plant(op, backend, ties_to_the_highest_index)
    with pytest.raises(AssertionError, match=f"^{op} on {backend}"):
        testing.assert_matches_reference(op, testing.run(op, (scores, 2)).outputs, (scores, 2), backend)
