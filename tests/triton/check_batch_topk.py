"""The routes of the Triton top-k that small cases do not take, in the checked interpreter; `tests/test_triton.py` runs
this file.

By hand: FASTAPD_BACKEND=triton python -m pytest tests/triton/check_batch_topk.py

The sizes at which a route is taken are constants of the module, lowered here, so that a few thousand scores go through
floors, lists and segments, and through what comes where those fail. Everything is held to the reference, bit by bit.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("checked", Path(__file__).with_name("checked.py"))
assert _spec is not None
assert _spec.loader is not None
checked = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checked)  # before triton is imported

import torch
from fastapd.kernels import _launch
from fastapd.kernels import batch_topk as kernels
from torch import Tensor

from fastapd import testing
from fastapd.reference import batch_topk as reference

ORDERS = ("forward", "shuffled", "reverse")
SHAPE = (1, 45, 31)
TWO = (2, 29, 31)

# Constants of the module for each route: few samples, as the scores are few.
FEW = {"SMALL": 0, "TILE": 4096, "SAMPLES": (64, 64, 64), "FEW": 1 << 20}
STORED = {**FEW, "FEW": 0, "TILE": 1024, "SEGMENT": 16, "LISTED": (1 << 10, 1 << 10)}
ROUTES: dict[str, dict[str, Any]] = {
    "few": FEW,
    "few, in one part": {**FEW, "TILE": 8192},
    "few, more than a block holds": {**FEW, "LIST_BLOCK": (256, 256)},
    "few, partitioned": {**FEW, "SPLIT": 0},
    "many": STORED,
    "many, more candidates than a block holds": {**STORED, "LIST_BLOCK": (64, 16)},
    "many, more candidates than are listed": {**STORED, "LISTED": (16, 16)},
    "many, partitioned": {**STORED, "SPLIT": 0},
}
LAUNCHES = {
    "few": ["sample", "collect", "emit", "split"],
    "few, in one part": ["sample", "collect", "emit", "split"],
    "few, partitioned": ["sample", "collect", "emit", "partition", "split"],
    "many": ["sample", "collect", "narrow", "emit", "split"],
    "many, partitioned": ["sample", "collect", "narrow", "emit", "partition", "split"],
}

TOP = torch.finfo(torch.float32).max
SPECIAL = [0.0, -1e-45, torch.inf, -0.0, 1e-45, torch.nan, -torch.inf, TOP, 3e-45, -torch.nan, -TOP, 1.0]


def specials(shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape)]


SCORES = {
    "squares": lambda shape: torch.randn(shape).square(),
    "all equal": lambda shape: torch.full(shape, 0.25),
    "two values": lambda shape: (torch.rand(shape) < 0.04).float(),
    "99 % zeros": lambda shape: torch.rand(shape) * (torch.rand(shape) < 0.01),
    "ascending": lambda shape: torch.rand(shape).flatten(1).sort().values.view(shape),
    "descending": lambda shape: torch.rand(shape).flatten(1).sort(descending=True).values.view(shape),
    "special values": specials,
    "all NaN": lambda shape: torch.full(shape, torch.nan),
    "all -inf": lambda shape: torch.full(shape, -torch.inf),
    "zeros of both signs": lambda shape: torch.zeros(shape).copysign(torch.randn(shape)),
    "denormals of both signs": lambda shape: torch.randint(-9, 9, shape) * 1e-45,
    "of every scale": lambda shape: torch.randn(shape).mul(30).exp(),
    "of 17 values": lambda shape: torch.randint(0, 17, shape).float(),
    "the first sample": lambda shape: torch.rand(shape) + 9 * (torch.arange(shape[1])[:, None] == 0),
    "the last component": lambda shape: torch.rand(shape) + 9 * (torch.arange(shape[2]) == shape[2] - 1),
}


def marked(names: Any, *quick: Any) -> Any:
    return [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in names]


orders = pytest.mark.parametrize("order", marked(ORDERS, "shuffled"))


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory):
    yield


@pytest.fixture
def take(monkeypatch):
    """`take(route)` has calls take a route, by constants of the module."""

    def take(route: str | dict[str, Any]) -> None:
        for name, value in (ROUTES[route] if isinstance(route, str) else route).items():
            monkeypatch.setattr(kernels, name, value)
        monkeypatch.setattr(_launch, "processors", lambda t: 2)

    return take


def launched(op: str, *args: Any, order: str = "forward") -> tuple[tuple[Tensor, ...], list[str]]:
    """What a checked call gives, and the names of the kernels that it started."""
    with checked.checked(order) as launches:
        found = getattr(kernels, op)(*args)
    return found, [name.removeprefix("_").removesuffix("_topk_kernel") for name, _ in launches]


def assert_matches(op: str, *args: Any, order: str = "forward") -> list[str]:
    """The five lists are the reference's, and the thresholds, any NaN being equal to any other."""
    found, names = launched(op, *args, order=order)
    wanted = getattr(reference, op)(*args)
    testing.assert_bit_equal(list(found[:5]), list(wanted[:5]))
    if len(wanted) > 5:
        assert torch.equal(found[5].isnan(), wanted[5].isnan())
        testing.assert_bit_equal(found[5].nan_to_num(7.0), wanted[5].nan_to_num(7.0))
    return names


def floors(n_scores: int, samples: int, instance: int = 0) -> Tensor:
    """Which scores of an instance the floor is taken from: the kernel's own arithmetic."""
    o = torch.arange(samples)
    begin, end = o * n_scores // samples, (o + 1) * n_scores // samples
    noise = ((o ^ (instance << 16)) & 0xFFFFFFFF) * 0x45D9F3B & 0xFFFFFFFF
    noise = (noise ^ (noise >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    noise = noise ^ (noise >> 16)
    return begin + (noise * (end - begin) >> 32)


# ---------------------------------------------------------------------------------------------------------- the routes


@pytest.mark.parametrize("route", ROUTES)
def test_topk_routes_select_what_the_reference_selects(take, route):
    """Ties, zeros and infinities of both signs, NaN and denormals; the number of launches is what it should be."""
    take(route)
    launches = assert_matches("batch_topk", SCORES["special values"](SHAPE), 60, order="shuffled")
    assert launches == LAUNCHES.get(route, launches)


@pytest.mark.parametrize("kind", marked(SCORES, "squares", "all equal", "99 % zeros"))
@pytest.mark.parametrize("route", marked(("few", "many"), "many"))
def test_topk_routes_take_scores_of_all_kinds(take, route, kind):
    take(route)
    assert_matches("batch_topk", SCORES[kind](SHAPE), 40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["squares", "special values", "of 17 values"])
@pytest.mark.parametrize("route", ROUTES)
def test_topk_routes_take_any_number(take, route, kind):
    take(route)
    scores = SCORES[kind](TWO)
    n = scores[0].numel()
    for k, order in ((1, "forward"), (n // 9, "reverse"), (n - 1, "forward"), (n, "shuffled")):
        assert_matches("batch_topk", scores, k, order=order)


@pytest.mark.parametrize("k", marked((200, 700, 1394, 1395), 700))
@pytest.mark.parametrize("kind", marked(("squares", "99 % zeros", "special values"), "squares"))
def test_topk_of_a_large_part_keeps_no_segments(take, kind, k):
    take(STORED)
    assert not kernels.plan(1, 1395, k, 2).stored
    assert_matches("batch_topk", SCORES[kind](SHAPE), k)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ["few", "many"])
def test_topk_routes_take_half_precision(take, route, dtype):
    take(route)
    scores = SCORES["squares"](TWO).to(dtype)
    assert_matches("batch_topk_warm", scores, torch.zeros(2, dtype=dtype), 60)
    assert_matches("sample_topk", scores, 3)


# ------------------------------------------------------------------------------------------------------------ failures


@orders
@pytest.mark.parametrize("route", ["few", "many"])
def test_topk_goes_on_when_the_sample_has_the_largest(take, route, order):
    """The floor is then above the threshold, with fewer survivors than K."""
    take(route)
    n, k = SHAPE[1] * SHAPE[2], 124
    scores = torch.randint(0, 9, (1, n)) / 8
    scores[0, floors(n, 64)] += 2
    assert (scores >= 2).sum() < k
    assert_matches("batch_topk_warm", scores.view(SHAPE), torch.zeros(1), k, order=order)


@orders
@pytest.mark.parametrize("route", ["few", "many", "many, more candidates than are listed"])
def test_topk_goes_on_when_the_sample_has_the_smallest(take, route, order):
    """The floor is then far below the threshold: everything survives, and lists and segments overflow."""
    take(route)
    n, k = SHAPE[1] * SHAPE[2], 3
    scores = 1 + torch.randint(0, 256, (1, n)) / 256
    scores[0, floors(n, 64)] = 0.5
    p = kernels.plan(1, n, k, 2)
    assert max(p.listed, p.capacity * p.n_parts) < n - 64 or route == "many"
    assert_matches("batch_topk", scores.view(SHAPE), k, order=order)


@pytest.mark.parametrize("route", marked(("few", "few, in one part", "many"), "many"))
def test_topk_goes_on_when_one_part_has_all(take, route):
    take(route)
    for first in (slice(0, 7), slice(-7, None)):
        scores = torch.rand(SHAPE)
        scores[0, first] += 2
        assert_matches("batch_topk", scores, 60)


# ----------------------------------------------------------------------------------------------------- the other three


@pytest.mark.parametrize("kind", marked(("squares", "all NaN", "special values", "99 % zeros"), "99 % zeros"))
@pytest.mark.parametrize("route", marked(("few", "many", "many, more candidates than a block holds"), "few", "many"))
def test_topk_finds_the_threshold_whatever_the_hint(take, route, kind):
    take(route)
    scores = SCORES[kind](TWO)
    right = reference.batch_topk_warm(scores, torch.zeros(2), 40)[5]
    for hint in (right, torch.tensor([torch.nan, -torch.inf]), torch.tensor([1e30, -1e30])):
        before = hint.clone()
        assert_matches("batch_topk_warm", scores, hint, 40)
        testing.assert_bit_equal(hint, before)
        if kind == "99 % zeros":  # in the quick lane, as no hint changes what is done
            break


def test_topk_of_nothing_gives_the_hint_back(take):
    take("few")
    hint = torch.tensor([0.5])
    found, launches = launched("batch_topk_warm", torch.rand(SHAPE), hint, 0)
    testing.assert_bit_equal(found[5], hint)
    assert found[5] is not hint
    assert launches == []


@pytest.mark.parametrize("kind", marked(SCORES, "all NaN", "all -inf", "zeros of both signs"))
def test_topk_of_small_scores_finds_the_threshold(kind):
    scores = SCORES[kind]((2, 7, 5))
    for k in (1, 17, 35):
        assert_matches("batch_topk_warm", scores, torch.zeros(2), k)


@orders
@pytest.mark.parametrize(
    "route",
    marked(("few", "few, in one part", "many", "few, partitioned", "many, partitioned"), "few", "many, partitioned"),
)
def test_topk_takes_every_instance_its_own_number(take, route, order):
    take(route)
    scores = SCORES["squares"]((2, 23, 31)).round(decimals=1)
    assert_matches("batch_topk_counts", scores, torch.tensor([7, 40]), 40, order=order)
    if order != "shuffled":
        assert_matches("batch_topk_counts", scores, torch.tensor([40, 0]), 40, order=order)


def test_topk_is_partitioned_in_slices(take, monkeypatch):
    """Several programs share the pairs of a range, as they do for long lists."""
    take("few, partitioned")
    of_sizes = kernels.grouping
    monkeypatch.setattr(kernels, "grouping", lambda *sizes: of_sizes(*sizes)._replace(n_slices=3, slice_pairs=20))
    assert_matches("batch_topk", SCORES["squares"](SHAPE), 55, order="shuffled")


@pytest.mark.slow
def test_topk_is_partitioned_step_by_step(take):
    """More pairs than a program looks at at once."""
    take("many, partitioned")
    assert_matches("batch_topk", SCORES["squares"]((1, 80, 64)), 4500, order="shuffled")


@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 300, 400), (2, 0, 4), (2, 3, 0), (2, 300, 400)])
def test_topk_of_nothing_starts_nothing(shape):
    scores, none = torch.zeros(shape), torch.zeros(shape[0])
    n_pairs = 5 if shape[0] == 0 else 0
    assert assert_matches("batch_topk", scores, n_pairs) == []
    assert assert_matches("batch_topk_warm", scores, none, n_pairs) == []
    assert assert_matches("batch_topk_counts", scores, none.long(), n_pairs) == []
    assert assert_matches("sample_topk", scores, 0) == []


SAMPLE_ROUTES = {
    "rows": {"SMALL": 0},
    "rows, partitioned": {"SMALL": 0, "SPLIT": 0},
    "select": {**FEW, "ROW": 0},
    "select, many": {**STORED, "ROW": 0, "TILE": 64},
    "select, partitioned": {**FEW, "ROW": 0, "SPLIT": 0, "TILE": 128},
}


@pytest.mark.parametrize("route", marked(SAMPLE_ROUTES, "rows, partitioned", "select", "select, many"))
def test_topk_of_samples_selects_what_the_reference_selects(take, route):
    take(SAMPLE_ROUTES[route])
    assert_matches("sample_topk", SCORES["special values"]((1, 2, 70)), 9, order="shuffled")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["squares", "special values", "of 17 values"])
@pytest.mark.parametrize("route", SAMPLE_ROUTES)
def test_topk_of_samples_takes_any_number(take, route, kind):
    take(SAMPLE_ROUTES[route])
    for k, order in ((1, "forward"), (35, "reverse"), (70, "shuffled")):
        assert_matches("sample_topk", SCORES[kind]((2, 3, 70)), k, order=order)


# --------------------------------------------------------------------------------------------------------- sizes alone


@pytest.mark.parametrize("n_instances", [1, 3, 1000])
@pytest.mark.parametrize("n_scores", [1, 17, 8191, 8193, 10**6, 10**9, 2**31 - 1])
def test_topk_plans_cover_all_scores(n_instances, n_scores):
    for share in (0, 1e-6, 1e-3, 0.1, 0.5, 1):
        k = max(1, int(share * n_scores))
        p = kernels.plan(n_instances, n_scores, k, 132)
        assert (p.n_parts - 1) * p.part_scores < n_scores <= p.n_parts * p.part_scores
        assert p.part_scores % 32 == 0
        assert p.survivors >= k
        assert 0 < p.listed <= n_scores
        assert p.few or not p.stored or p.capacity * p.n_parts >= p.survivors
        assert 8 * p.n_parts * p.capacity <= 1.51 * n_scores + 2**21


@pytest.mark.parametrize("n_pairs", [1, 4000, 10**6])
@pytest.mark.parametrize("n_components", [1, 5, 130, 2000, 10**5, 10**6])
def test_topk_groupings_cover_all_components(n_components, n_pairs):
    for n_instances in (1, 7, 1000):
        g = kernels.grouping(n_instances, n_components, n_pairs, 132)
        assert (g.n_ranges - 1) << g.shift < n_components <= g.n_ranges << g.shift
        assert (1 << g.shift) % g.block_c == 0
        assert g.slice_pairs * (g.n_slices - 1) < n_pairs <= g.slice_pairs * g.n_slices
        assert g.block * g.block_c <= 8192


def test_topk_samples_every_component():
    """At equal distances, as many as a sample has components, all would be one component's."""
    batch, n_components, samples = 4096, 2000, kernels.SAMPLES[1]
    assert batch * n_components // samples == n_components
    components = floors(batch * n_components, samples) % n_components
    assert components.unique().numel() > 0.8 * n_components * (1 - 2.71828 ** (-samples / n_components))
