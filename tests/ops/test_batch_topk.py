"""batch_topk and sample_topk: exact selections, ties by the lowest flat index, against numpy.

Behind that `batch_topk` with a hint, and with scores that no sample tells the threshold of; `batch_topk` with a tensor
(every instance's own K) is at the end, with what its padding must not do.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

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


def assert_selects_each(scores: Tensor, counts: Tensor) -> None:
    """`batch_topk` with a tensor selects what it selects of each instance alone, and pads the lists with zeros."""
    found = ops.batch_topk(scores, counts)
    assert found.n_pairs == max(counts.tolist(), default=0)
    for i, k in enumerate(counts.tolist()):
        alone = ops.batch_topk(scores[i], k)
        for name, got, wanted in zip(found._fields, found, alone, strict=True):
            n = len(wanted)
            testing.assert_bit_equal(got[i][:n], wanted)
            assert not got[i][n:].any() and (n == k or name.endswith("offsets"))
        assert np.array_equal(found.mask[i].numpy(), chosen("batch_topk", scores[i], k))
        testing.assert_bit_equal(found.counts[i], found.mask[i].sum(0))
        assert found.counts[i].sum() == k


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
    with backends.use_backend("cpu"), pytest.raises(NotImplementedError, match=f"^{op}: no backend can run"):
        getattr(ops, op)(scores, k)


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
def test_batch_topk_repeats_bit_for_bit(op, backend, repeats):
    args = testing.inputs(op, "tms_40")
    first = testing.run(op, args).outputs
    for _ in range(repeats):
        testing.assert_bit_equal(testing.run(op, args).outputs, first)


@both
def test_batch_topk_is_a_constant(op, backend):
    scores, k = testing.inputs(op, "odd")
    found = getattr(ops, op)(scores.requires_grad_(), k)
    assert not any(t.requires_grad for t in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op, k", [("batch_topk", 700), ("sample_topk", 3), ("batch_topk", torch.tensor([5, 700, 0]))])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_batch_topk_is_independent_of_threads(backend, op, k, dtype, threads):
    scores = torch.randint(0, 1000, (3, 300, 300)).to(dtype)  # shares its instances among threads; many ties
    threads(1)
    alone = getattr(ops, op)(scores, k)
    for n in (2, 3):
        threads(n)
        testing.assert_bit_equal(list(getattr(ops, op)(scores, k)), list(alone))
    if isinstance(k, int):
        assert np.array_equal(alone.mask[2].numpy(), chosen(op, scores[2], k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
def test_batch_topk_at_every_level(cpu_level, dtype):
    for case in ("tms", "tms_40", "odd"):
        scores, k = testing.inputs("batch_topk", case, dtype)
        for values in (scores, scores.round()):
            assert_selects("batch_topk", values, k)
            assert_selects("sample_topk", values, 2)
            assert_selects_each(values, torch.arange(scores.shape[0]) * k % scores[0].numel())


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
    (TypeError, S, "2", "{k} must be an int, got str '2'"),
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
        ("sample_topk", 10**400, "k must be in [0, n_components=3], got an int beyond float64"),
    ],
)
def test_batch_topk_refuses_a_count_out_of_range(op, k, message):
    with pytest.raises(ValueError, match=re.escape(f"{op}: {message}") + "$"):
        getattr(ops, op)(S, k)


def test_sample_topk_takes_no_tensor():
    wanted = "sample_topk: k must be an int, got Tensor tensor([2, 3])"
    with pytest.raises(TypeError, match=re.escape(wanted) + "$"):
        ops.sample_topk(S, torch.tensor([2, 3]))


# --------------------------------------------------------------------------------------- hints and adversarial scores


def reference_lists(scores: Tensor, k: int) -> list[Tensor]:
    with backends.use_backend("reference"):
        return list(ops.batch_topk(scores, k))


def threshold(scores: Tensor, k: int) -> Tensor:
    """The smallest selected score of each instance, from numpy."""
    flat = scores.flatten(1).numpy()
    return torch.from_numpy(np.stack([one[order(one)[k - 1]] for one in flat]) + flat.dtype.type(0))


def assert_same_threshold(got: Tensor, wanted: Tensor) -> None:
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


def sparse(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) * (torch.rand(shape) < 0.01)


# an instance whose scores are sampled from (more than 2048) and one whose are not
SHAPES = [(2, 123, 100), (3, 37, 13)]
ADVERSARIAL = {
    "all equal": lambda shape: torch.full(shape, 0.25),
    "all zero, of both signs": lambda shape: torch.zeros(shape).copysign(torch.randn(shape)),
    "all NaN": lambda shape: torch.full(shape, torch.nan),
    "all -inf": lambda shape: torch.full(shape, -torch.inf),
    "two values": lambda shape: (torch.rand(shape) < 0.04).float(),
    "99 % zeros": sparse,
    "ascending": lambda shape: torch.rand(shape).flatten(1).sort().values.view(shape),
    "descending": lambda shape: torch.rand(shape).flatten(1).sort(descending=True).values.view(shape),
    "the first sample": lambda shape: torch.rand(shape) + 9 * (torch.arange(shape[1])[:, None] == 0),
    "the last component": lambda shape: torch.rand(shape) + 9 * (torch.arange(shape[2]) == shape[2] - 1),
    "negative": lambda shape: -torch.randn(shape).square(),
    "of every scale": lambda shape: torch.randn(shape).mul(30).exp(),
    "denormal": lambda shape: torch.randint(-9, 9, shape) * 1e-45,
    "some NaN": lambda shape: torch.randn(shape).masked_fill(torch.rand(shape) < 0.04, torch.nan),
    "some infinite": lambda shape: torch.randn(shape).masked_fill(torch.rand(shape) < 0.04, torch.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
def test_batch_topk_of_adversarial_scores_with_any_hint(cpu_level, kind, shape, dtype):
    torch.manual_seed(0)
    scores = ADVERSARIAL[kind](shape).to(dtype)
    n = scores[0].numel()
    for k in (1, 3, n // 100, n // 25, n // 2, n - 1, n):
        wanted, right = ops.Selection(*reference_lists(scores, k)), threshold(scores, k)
        for i, one in enumerate(scores):
            assert np.array_equal(wanted.mask[i].numpy(), chosen("batch_topk", one, k))
        hints = [right * by for by in (1, 1.05, 0.95, 1.2, 0.5, 4, -1)]
        hints += [torch.full_like(right, value) for value in (0.0, -0.0, 1e-42, -1e30, 1e30, torch.nan, torch.inf)]
        testing.assert_bit_equal(list(ops.batch_topk(scores, k)), list(wanted))
        for hint in hints:
            testing.assert_bit_equal(list(ops.batch_topk(scores, k, hint)), list(wanted))
            assert_same_threshold(hint, right)


# A sample of n < 2^15 scores has one of each of 512 stretches of n // 512: the two below are built on that, and on the
# floor being the sample's (512 K / n + 4 sqrt(512 K / n) + 4)-th largest.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hint", [None, 0.5, 1e9, 2.5])
def test_batch_topk_goes_on_when_the_sample_misses_the_largest(dtype, hint):
    """The 511 largest are behind the last stretch: above the floor are more than 4 K + 16 (n // 512), room for which
    is made."""
    n, k = 5 * 512 - 1, 10
    scores = torch.cat([torch.rand(n - 511), 2 + torch.rand(511)]).view(1, n, 1).to(dtype)
    hints = None if hint is None else torch.tensor([hint], dtype=dtype)
    assert 4 * k + 16 * (n // 512) < 511
    testing.assert_bit_equal(list(ops.batch_topk(scores, k, hints)), reference_lists(scores, k))
    assert hints is None or torch.equal(hints, threshold(scores, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hint", [None, 0.5, 1e9])
def test_batch_topk_goes_on_when_the_sample_is_above_the_threshold(dtype, hint):
    """Equal scores in each stretch, small ones behind the last: the floor is the 417th of the 512 values, and above or
    equal to it are 4 * 417 scores, fewer than K."""
    n, k = 5 * 512 - 1, 1700
    stretches = (1 + torch.randperm(512) / 512).repeat_interleave(4)
    scores = torch.cat([stretches, torch.rand(511)]).view(1, 1, n).to(dtype)
    hints = None if hint is None else torch.tensor([hint], dtype=dtype)
    expected = k * 512 / n
    assert 4 * int(expected + 4 * expected**0.5 + 4) < k
    testing.assert_bit_equal(list(ops.batch_topk(scores, k, hints)), reference_lists(scores, k))
    assert hints is None or torch.equal(hints, threshold(scores, k))


@pytest.mark.parametrize("backend", testing.cpu_backends("batch_topk_warm"), indirect=True)
def test_batch_topk_hint_follows_the_threshold(backend):
    """One tensor through the steps of a training, for any strides and without the instance axis."""
    hint = torch.full((3, 2), torch.nan)[:, 0]
    for step in range(5):
        scores = torch.randn(3, 60, 50).square() * (1 + step)
        testing.assert_bit_equal(list(ops.batch_topk(scores, 90, hint)), list(ops.batch_topk(scores, 90)))
        assert torch.equal(hint, threshold(scores, 90))
    one = torch.tensor(torch.nan)
    testing.assert_bit_equal(list(ops.batch_topk(scores[1], 90, one)), list(ops.batch_topk(scores[1], 90)))
    assert torch.equal(one, threshold(scores, 90)[1])
    before = hint.clone()
    ops.batch_topk(scores, 0, hint)
    ops.batch_topk(scores[:, :0], 0, hint)
    assert torch.equal(hint, before)
    assert ops.batch_topk(scores[:0], 90, hint[:0]).n_pairs == 90


def test_batch_topk_with_a_hint_passes_opcheck_and_compiles_to_one_graph():
    scores, hint, k = testing.inputs("batch_topk_warm", "tms_40")
    torch.library.opcheck(torch.ops.fastapd.batch_topk_warm, (scores, hint, k))
    compiled = torch.compile(lambda s, h: ops.batch_topk(s, k, h), fullgraph=True, backend="aot_eager")
    eager, found = hint.clone(), hint.clone()
    testing.assert_bit_equal(list(compiled(scores, found)), list(ops.batch_topk(scores, k, eager)))
    testing.assert_bit_equal(found, eager)
    assert torch.equal(found, threshold(scores, k))


@pytest.mark.parametrize("op", OPS)
def test_batch_topk_is_seen_by_those_who_watch_ops(op):
    """In plain eager mode an implementation is called without torch's dispatcher; whoever listens there hears of it."""
    scores, k = testing.inputs(op, "odd")
    wanted = list(getattr(ops, op)(scores, k))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        testing.assert_bit_equal(list(getattr(ops, op)(scores, k)), wanted)
    assert f"fastapd::{op}" in {event.key for event in profiler.key_averages()}

    heard = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            heard.append(function.name())
            return function(*args, **(kwargs or {}))

    with Listener():
        testing.assert_bit_equal(list(getattr(ops, op)(scores, k)), wanted)
    assert f"fastapd::{op}" in heard
    testing.assert_bit_equal(list(torch.vmap(lambda s: getattr(ops, op)(s, k))(scores)), wanted)
    traced = make_fx(lambda s: getattr(ops, op)(s, k))(scores)
    assert any(node.target is getattr(torch.ops.fastapd, op).default for node in traced.graph.nodes)
    jit = torch.jit.trace(lambda s: getattr(ops, op)(s, k).component, (scores,), check_trace=False)
    assert f"fastapd::{op}" in {node.kind() for node in jit.graph.nodes()}


HINT = torch.zeros(2)
HINTS_REFUSED = [
    (TypeError, 1, [0.0, 0.0], "hint must be a torch.Tensor, got list"),
    (TypeError, 1, HINT.long(), f"hint {FLOATS}, got torch.int64"),
    (TypeError, 1, HINT.double(), "hint must have the dtype of scores, torch.float32, got torch.float64"),
    (ValueError, 1, HINT.to("meta"), "hint must be on the device of scores, cpu, got meta"),
    (ValueError, 1, HINT[:1], "hint must have shape [n_instances] for scores [2, 6, 3], got [1]"),
    (ValueError, 1, HINT[0], "hint must have shape [n_instances] for scores [2, 6, 3], got []"),
    (NotImplementedError, 1, torch.zeros(2, requires_grad=True), "hint must not require gradients, as it is written "
     "to; detach it"),
    (ValueError, torch.tensor([2, 3]), HINT, "hint must be None when K is a tensor, got a tensor"),
]  # fmt: skip


@pytest.mark.parametrize("error, K, hint, message", HINTS_REFUSED)
def test_batch_topk_refuses_a_hint(error, K, hint, message):
    with pytest.raises(error, match=re.escape(f"batch_topk: {message}") + "$"):
        ops.batch_topk(S, K, hint)
    if isinstance(hint, Tensor) and hint.dim() == 0:
        with pytest.raises(ValueError, match=re.escape("hint must have shape [] for scores [6, 3], got [2]") + "$"):
            ops.batch_topk(S[0], K, HINT)


# --------------------------------------------------------------------------------------------- every instance's own K


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", testing.CASES)
@each
def test_batch_topk_counts_matches_the_reference(backend, case, dtype):
    args = testing.inputs("batch_topk_counts", case, dtype)
    testing.assert_matches_reference("batch_topk_counts", testing.run("batch_topk_counts", args).outputs, args, backend)
    assert_selects_each(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", [[0, 0, 0], [42, 42, 42], [0, 42, 0], [1, 0, 41], [7, 3, 5], [42, 1, 13]], ids=str)
@each
def test_batch_topk_counts_selects_for_every_instance_its_own(backend, counts, dtype):
    scores = torch.randn(3, 7, 6, dtype=dtype)
    for values in (scores, scores.round(), torch.zeros_like(scores), scores.masked_fill(scores > 1, torch.nan)):
        assert_selects_each(values, torch.tensor(counts))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@each
def test_batch_topk_counts_of_nothing_is_empty(backend, shape):
    found = ops.batch_topk(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64))
    testing.assert_bit_equal(list(found), list(ops.batch_topk(torch.zeros(shape), 0)))
    assert found.mask.shape == shape


@each
def test_batch_topk_counts_takes_any_strides_and_passes_opcheck(backend):
    scores, counts = testing.inputs("batch_topk_counts", "tms")
    wanted = ops.batch_topk(scores, counts)
    strided = torch.stack((counts, counts + 1), dim=1)[:, 0]
    assert not strided.is_contiguous()
    for view in testing.VIEWS.values():
        testing.assert_bit_equal(list(ops.batch_topk(view(scores), strided)), list(wanted))
    testing.assert_bit_equal(
        list(ops.batch_topk(scores, counts[:1].expand_as(counts))), list(ops.batch_topk(scores, int(counts[0])))
    )
    torch.library.opcheck(torch.ops.fastapd.batch_topk_counts, (scores, counts, max(counts.tolist())))


def never_first(scores: Tensor) -> Tensor:
    """Scores by which neither sample 0 nor component 0, where the padding points, is selected."""
    scores = scores.clone()
    scores[:, 0], scores[..., 0] = -1, -1
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["tms", "odd", "rank1", "single"])
@each
def test_batch_topk_counts_padding_is_no_pair(backend, case, dtype):
    """The selected form with padded lists is the dense form with its mask, in value and gradient."""
    x, A, B, mask = testing.inputs("component_forward", case, dtype)
    _, counts = testing.inputs("batch_topk_counts", case, dtype)
    counts[0] = counts[1] // 3
    selection = ops.batch_topk(mask, counts)
    backends.use_backend(backend, "reference")  # not all have a kernel for what follows
    assert (counts < selection.n_pairs).any()
    dense = (x, A, B, selection.mask.to(dtype))
    cotangents = testing.random_cotangents(testing.reference("component_forward", dense).outputs)
    outputs, grads = testing.run("component_forward_selected", (x, A, B, selection), cotangents)
    exact = testing.oracle("component_forward", dense, cotangents)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for got, wanted in zip((*outputs, *grads), (*exact.outputs, *exact.grads[:3]), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each
def test_batch_topk_counts_padding_reads_nothing(backend, dtype):
    op = "component_forward_selected"
    x, A, B, mask = testing.inputs("component_forward", "odd", dtype)
    selection = ops.batch_topk(never_first(mask), torch.tensor([9, 31]))
    backends.use_backend(backend, "reference")  # not all have a kernel for what follows
    cotangents = testing.random_cotangents(testing.reference("component_forward", (x, A, B)).outputs)
    clean = testing.run(op, (x, A, B, selection), cotangents)
    for poison in (torch.nan, torch.inf):
        for t in (x, A, B, cotangents[0]):
            t[:, 0] = poison
        testing.assert_bit_equal(testing.run(op, (x, A, B, selection), cotangents), clean)
    assert clean.outputs[0].isfinite().all() and all(g.isfinite().all() for g in clean.grads)


@pytest.mark.parametrize("there, back", [("cpu", "reference"), ("reference", "cpu")])
def test_batch_topk_counts_padding_survives_a_change_of_backend(there, back):
    """The backend of the forward pass leaves a workspace to that of the backward pass, which may be another."""
    x, A, B, mask = testing.inputs("component_forward", "odd", torch.float64)
    if backends.explain("component_forward_selected", x, A, B)["cpu"]:
        pytest.skip("the CPU kernels are not here")
    selection = ops.batch_topk(mask, torch.tensor([9, 31]))
    leaves = [t.detach().requires_grad_() for t in (x, A, B)]
    with backends.use_backend(there):
        y = ops.component_forward_selected(*leaves, selection)
    with backends.use_backend(back):
        grads = torch.autograd.grad(y.sum(), leaves)
    exact = testing.oracle("component_forward", (x, A, B, selection.mask.double()), [torch.ones_like(y)])
    for got, wanted in zip(grads, exact.grads, strict=False):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


K = torch.tensor([2, 3])
COUNTS_REFUSED = [
    (TypeError, S, K.int(), "K must be an int or an int64 tensor, got torch.int32"),
    (TypeError, S, K.double(), "K must be an int or an int64 tensor, got torch.float64"),
    (TypeError, S, K.bool(), "K must be an int or an int64 tensor, got torch.bool"),
    (TypeError, S, K.to_sparse(), "K must be a dense tensor, got layout torch.sparse_coo; call .to_dense()"),
    (ValueError, S, K[:1], "K, a tensor, must have shape [n_instances] for scores [2, 6, 3], got [1]"),
    (ValueError, S, K[0], "K, a tensor, must have shape [n_instances] for scores [2, 6, 3], got []"),
    (ValueError, S, K[None], "K, a tensor, must have shape [n_instances] for scores [2, 6, 3], got [1, 2]"),
    (ValueError, S, K.to("meta"), "K must be on the device of scores, cpu, got meta"),
    (ValueError, S[0], K, "scores must have a leading n_instances when K is a tensor, got [6, 3]"),
    (ValueError, S, torch.tensor([2, 19]), "K must be in [0, batch * n_components=18], got 19"),
    (ValueError, S, torch.tensor([-1, 2]), "K must be in [0, batch * n_components=18], got -1"),
    (ValueError, S, torch.tensor([2**62, 2]), f"K must be in [0, batch * n_components=18], got {2**62}"),
    (TypeError, S.long(), K, f"scores {FLOATS}, got torch.int64"),
    (TypeError, None, K, "scores must be a torch.Tensor, got NoneType"),
]


@pytest.mark.parametrize("error, scores, K, message", COUNTS_REFUSED)
def test_batch_topk_counts_refuses(error, scores, K, message):
    with pytest.raises(error, match=re.escape(f"batch_topk: {message}") + "$"):
        ops.batch_topk(scores, K)


def test_batch_topk_counts_checks_where_the_public_op_does_not_run():
    for counts in (K.int(), K[:1]):
        with pytest.raises((TypeError, ValueError), match=r"^batch_topk: K"):
            torch.ops.fastapd.batch_topk_counts(S.to("meta"), counts.to("meta"), 3)
