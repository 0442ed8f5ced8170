"""Sorts a sample-major list of pairs by component, stably: the component-major list, offsets of both, the positions.

    partition  (long lists) a program owns one slice of an instance's pairs and one range of components; places of the
               slice's pairs in the range come next to each other, where a table of the counts of all says
    split      a program owns BLOCK_C components, an equal share of the samples' offsets and one of the padding

The table of ranges is counted by the kernels that write the list, with atomics on integers. All counts are int32, so
the lists are the same in every run.

Each range costs a look at all pairs and each component one at its range's pairs: the work is that of the pairs times
the root of the components. A radix sort looks a few times at each pair and is the better choice where that product is
no longer small beside the scores, which are read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from fastapd.kernels._launch import annotated
from fastapd.kernels._topk_keys import _ones, _wanted

# -------------------------------------------------------------------------------------------------- the table of ranges


@triton.jit
def _count_in_range(ranges_ptr, outer, place, component, m, slice_pairs, n_slices, n_ranges, RANGE_SHIFT: tl.constexpr):
    """One more for the slice of the sample-major list and the range of components that each pair is in."""
    where = place // slice_pairs * n_ranges + (component >> RANGE_SHIFT)
    one = tl.full(where.shape, 1, tl.int32)
    tl.atomic_add(ranges_ptr + outer * n_slices * n_ranges + where, one, mask=m, sem="relaxed")


@triton.jit
def _pairs_before(ranges_ptr, n_slices, n_ranges, chosen, slice, BLOCK: tl.constexpr):
    """How many pairs are in ranges before the chosen, or in it and in slices before one."""
    acc = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n_slices * n_ranges, BLOCK):
        o = start + tl.arange(0, BLOCK)
        o_range = o % n_ranges
        m = (o < n_slices * n_ranges) & ((o_range < chosen) | ((o_range == chosen) & (o // n_ranges < slice)))
        acc += tl.load(ranges_ptr + o, mask=m, other=0)
    return tl.sum(acc)


# -------------------------------------------------------------------------------------------------- partition and split


@triton.jit
def _ranks(m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many of m [ROWS, COLUMNS] are set in each row up to each column, int32.

    Bits of 32 columns are counted in a word, which leaves a scan little to do.
    """
    lane = tl.arange(0, 32)[None, None, :]
    words = tl.sum(tl.reshape(m.to(tl.int32), (ROWS, COLUMNS // 32, 32)) << lane, 2)
    ones = _ones(words.to(tl.uint32, bitcast=True))
    upto = (words[:, :, None] & ~(-2 << lane)).to(tl.uint32, bitcast=True)
    return tl.reshape((tl.cumsum(ones, 1) - ones)[:, :, None] + _ones(upto), (ROWS, COLUMNS))


def _group_cost(args: Mapping[str, Any]) -> tuple[float, float]:
    return 0.0, 28.0 * args["n_instances"] * args["n_pairs"]


@triton.jit(launch_metadata=annotated(_group_cost))
def _partition_topk_kernel(
    counts_ptr,  # [I], int64
    component_ptr,  # [I, K], sample-major
    ranges_ptr,  # [I, slices, ranges]
    places_ptr,  # [I, K]: filled with places in the sample-major list, by range of components and in order
    n_instances,
    n_pairs,
    slice_pairs,
    n_slices,
    n_ranges,
    HAS_COUNTS: tl.constexpr,
    RANGE_SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program looks through one slice of an instance's pairs for one range of components."""
    pid = tl.program_id(0)
    chosen = pid % n_ranges
    slice = pid // n_ranges % n_slices
    instance = (pid // n_ranges // n_slices).to(tl.int64)
    before = _pairs_before(ranges_ptr + instance * n_slices * n_ranges, n_slices, n_ranges, chosen, slice, 1024)
    begin = slice * slice_pairs
    end = tl.minimum(begin + slice_pairs, _wanted(counts_ptr, instance, n_pairs, HAS_COUNTS))
    for at in range(begin, end, BLOCK):
        o = at + tl.arange(0, BLOCK)
        c = tl.load(component_ptr + instance * n_pairs + o, mask=o < end, other=-1)
        m = (c >> RANGE_SHIFT) == chosen
        place = before + tl.reshape(_ranks(m[None, :], 1, BLOCK), (BLOCK,)) - 1
        tl.store(places_ptr + instance * n_pairs + place, o, mask=m)
        before += tl.sum(m.to(tl.int32))


@triton.jit
def _places(places_ptr, at, end, PARTITIONED: tl.constexpr, BLOCK: tl.constexpr):
    """Places of BLOCK pairs in the sample-major list, -1 from the end on."""
    place = at + tl.arange(0, BLOCK)
    m = place < end
    if PARTITIONED:
        place = tl.load(places_ptr + place, mask=m, other=0)
    return tl.where(m, place, -1)


@triton.jit(launch_metadata=annotated(_group_cost))
def _split_topk_kernel(
    counts_ptr,  # [I], int64
    component_ptr,  # [I, K], sample-major
    row_ptr,  # [I, K], sample-major
    ranges_ptr,  # [I, slices, ranges]
    places_ptr,  # [I, K]
    sample_ptr,  # [I, K], component-major
    offsets_ptr,  # [I, C + 1]
    sample_offsets_ptr,  # [I, b + 1]
    position_ptr,  # [I, K]
    n_instances,
    batch,
    n_components,
    n_pairs,
    n_splits,
    n_slices,
    n_ranges,
    HAS_COUNTS: tl.constexpr,
    PARTITIONED: tl.constexpr,
    RANGE_SHIFT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """A program owns BLOCK_C components, an equal share of the samples' offsets and one of the padding.

    It looks for its components' pairs among all of the instance, or among those of the range that it is in; first to
    count them, then to place them: a pair's rank is the number of pairs with its component up to it.
    """
    pid = tl.program_id(0)
    split = pid % n_splits
    instance = (pid // n_splits).to(tl.int64)
    component_ptr += instance * n_pairs
    row_ptr += instance * n_pairs
    places_ptr += instance * n_pairs
    sample_ptr += instance * n_pairs
    position_ptr += instance * n_pairs
    offsets_ptr += instance * (n_components + 1)
    sample_offsets_ptr += instance * (batch + 1)
    wanted = _wanted(counts_ptr, instance, n_pairs, HAS_COUNTS)
    begin = pid * 0
    end = begin + wanted
    if PARTITIONED:
        ranges_ptr += instance * n_slices * n_ranges
        chosen = (split * BLOCK_C) >> RANGE_SHIFT
        begin = _pairs_before(ranges_ptr, n_slices, n_ranges, chosen, 0, 1024)
        end = _pairs_before(ranges_ptr, n_slices, n_ranges, chosen + 1, 0, 1024)
    first_c = split * BLOCK_C
    o_c = first_c + tl.arange(0, BLOCK_C)
    less = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK_C,), tl.int32)
    for at in range(begin, end, BLOCK):
        place = _places(places_ptr, at, end, PARTITIONED, BLOCK)
        c = tl.load(component_ptr + place, mask=place >= 0, other=-1)
        less += ((c >= 0) & (c < first_c)).to(tl.int32)
        count += tl.sum((c[None, :] == o_c[:, None]).to(tl.int32), 1)
    offset = begin + tl.sum(less) + tl.cumsum(count, 0) - count
    tl.store(offsets_ptr + o_c, offset.to(tl.int64), mask=o_c < n_components)
    if split == 0:
        tl.store(offsets_ptr + n_components, wanted)
        tl.store(sample_offsets_ptr + batch, wanted)
    if tl.sum(count) > 0:
        for at in range(begin, end, BLOCK):
            place = _places(places_ptr, at, end, PARTITIONED, BLOCK)
            c = tl.load(component_ptr + place, mask=place >= 0, other=-1)
            same = c[None, :] == o_c[:, None]
            upto = offset[:, None] + _ranks(same, BLOCK_C, BLOCK) - 1
            major = tl.sum(tl.where(same, upto, 0), 0)
            m = (c >= first_c) & (c < first_c + BLOCK_C)
            tl.store(position_ptr + place, major, mask=m)
            tl.store(sample_ptr + major, tl.load(row_ptr + place, mask=m, other=0), mask=m)
            offset += tl.sum(same.to(tl.int32), 1)
    share = (batch + n_splits - 1) // n_splits
    last = tl.minimum((split + 1) * share, batch)
    for start in range(split * share, last, BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B)
        low = tl.zeros((BLOCK_B,), tl.int32)
        high = low + wanted
        for _ in range(STEPS):
            middle = low + (high - low) // 2
            m = low < high
            row = tl.load(row_ptr + middle, mask=m, other=0)
            low = tl.where(m & (row < o_b), middle + 1, low)
            high = tl.where(m & (row >= o_b), middle, high)
        tl.store(sample_offsets_ptr + o_b, low.to(tl.int64), mask=o_b < last)
    if HAS_COUNTS:
        for start in range(wanted + split * BLOCK_B, n_pairs, n_splits * BLOCK_B):
            o = start + tl.arange(0, BLOCK_B)
            zero = tl.zeros((BLOCK_B,), tl.int32)
            tl.store(component_ptr + o, zero, mask=o < n_pairs)
            tl.store(position_ptr + o, zero, mask=o < n_pairs)
            tl.store(sample_ptr + o, zero, mask=o < n_pairs)
