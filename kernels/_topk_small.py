"""Top-k kernels that have all of the scores they compare in registers: of small instances, and of samples.

    small      a program owns an instance and writes all lists
    rows       a program owns BLOCK_B samples and writes their part of the sample-major list, which `_topk_group` sorts

Keys are bisected, int32; scores above the threshold and those equal to it are counted as two halves of an int32, which
holds fewer than 2**15 of each. Not for more scores than a program's registers hold, `SMALL` of an instance and `ROW`
of a sample in `batch_topk`: beyond, `_topk_collect` reads them in parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from fastapd.kernels._launch import annotated
from fastapd.kernels._topk_group import _count_in_range
from fastapd.kernels._topk_keys import HIGHEST, NOTHING, _bytes_of_scores, _key, _score, _threshold, _wanted

# ---------------------------------------------------------------------------------------------------------------- small


def _small_cost(args: Mapping[str, Any]) -> tuple[float, float]:
    read = _bytes_of_scores(args, args["n_instances"], args["batch"] * args["n_components"])
    return 0.0, read + 12.0 * args["n_instances"] * args["n_pairs"]


@triton.jit
def _pairs_of_rows(
    scores_ptr, at, batch, n_components, threshold, quota, before, TILE_B: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Which scores of TILE_B samples are selected, their places in the sample-major list, each sample's first place
    there, and `before`, scores above the threshold and 2**16 times those equal to it, brought up to date."""
    o_b, o_c = at + tl.arange(0, TILE_B), tl.arange(0, BLOCK_C)
    m = (o_b < batch)[:, None] & (o_c < n_components)[None, :]
    x = tl.load(scores_ptr + o_b[:, None] * n_components + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    key = tl.where(m, _key(x), NOTHING)
    above, tie = key > threshold, key == threshold
    both = above.to(tl.int32) + (tie.to(tl.int32) << 16)
    in_row = tl.sum(both, 1)
    first = before + tl.cumsum(in_row, 0) - in_row
    upto = first[:, None] + tl.cumsum(both, 1)
    selected = above | (tie & ((upto >> 16) <= quota))
    place = (upto & 0xFFFF) + tl.minimum(upto >> 16, quota) - 1
    begin = (first & 0xFFFF) + tl.minimum(first >> 16, quota)
    return selected, place, begin, before + tl.sum(in_row)


@triton.jit(launch_metadata=annotated(_small_cost))
def _small_topk_kernel(
    scores_ptr,  # [I, b, C], contiguous
    counts_ptr,  # [I], int64
    sample_ptr,  # [I, K]
    offsets_ptr,  # [I, C + 1]
    component_ptr,  # [I, K]
    sample_offsets_ptr,  # [I, b + 1]
    position_ptr,  # [I, K]
    threshold_ptr,  # [I]
    n_instances,
    batch,
    n_components,
    n_pairs,
    HAS_COUNTS: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns an instance. It goes through the samples twice: to count each component's pairs, then to place
    them in both lists."""
    instance = tl.program_id(0).to(tl.int64)
    scores_ptr += instance * batch * n_components
    o = tl.arange(0, BLOCK)
    x = tl.load(scores_ptr + o, mask=o < batch * n_components, other=0.0).to(tl.float32)
    key = tl.where(o < batch * n_components, _key(x), NOTHING)
    wanted = _wanted(counts_ptr, instance, n_pairs, HAS_COUNTS)
    threshold = _threshold(key, wanted)
    quota = wanted - tl.sum((key > threshold).to(tl.int32))
    if HAS_THRESHOLD:
        least = _score(tl.min(tl.where(key >= threshold, key, HIGHEST)))
        tl.store(threshold_ptr + instance, least.to(threshold_ptr.dtype.element_ty))
    o_c = tl.arange(0, BLOCK_C)
    count = tl.zeros((BLOCK_C,), tl.int32)
    before = wanted * 0
    for at in range(0, batch, TILE_B):
        found = _pairs_of_rows(scores_ptr, at, batch, n_components, threshold, quota, before, TILE_B, BLOCK_C)
        before = found[3]
        count += tl.sum(found[0].to(tl.int32), 0)
    offset = tl.cumsum(count, 0) - count
    tl.store(offsets_ptr + instance * (n_components + 1) + o_c, offset.to(tl.int64), mask=o_c < n_components)
    tl.store(offsets_ptr + instance * (n_components + 1) + n_components, wanted)
    tl.store(sample_offsets_ptr + instance * (batch + 1) + batch, wanted)
    before = wanted * 0
    for at in range(0, batch, TILE_B):
        found = _pairs_of_rows(scores_ptr, at, batch, n_components, threshold, quota, before, TILE_B, BLOCK_C)
        selected, place, begin, before = found[0], found[1], found[2], found[3]
        one = selected.to(tl.int32)
        major = offset[None, :] + tl.cumsum(one, 0) - 1
        offset += tl.sum(one, 0)
        o_b = at + tl.arange(0, TILE_B)
        tl.store(component_ptr + instance * n_pairs + place, o_c[None, :] + tl.zeros_like(place), mask=selected)
        tl.store(position_ptr + instance * n_pairs + place, major, mask=selected)
        tl.store(sample_ptr + instance * n_pairs + major, o_b[:, None] + tl.zeros_like(place), mask=selected)
        tl.store(sample_offsets_ptr + instance * (batch + 1) + o_b, begin.to(tl.int64), mask=o_b < batch)
    if HAS_COUNTS:
        for at in range(wanted, n_pairs, BLOCK):
            zero = tl.zeros((BLOCK,), tl.int32)
            tl.store(component_ptr + instance * n_pairs + at + o, zero, mask=at + o < n_pairs)
            tl.store(position_ptr + instance * n_pairs + at + o, zero, mask=at + o < n_pairs)
            tl.store(sample_ptr + instance * n_pairs + at + o, zero, mask=at + o < n_pairs)


# ----------------------------------------------------------------------------------------------------------------- rows


@triton.jit
def _row_thresholds(key, k):
    """`_threshold` of each row of [rows, columns]."""
    low, high = tl.min(tl.where(key == NOTHING, HIGHEST, key), 1), tl.max(key, 1)
    while tl.sum((low < high).to(tl.int32)) > 0:
        middle = (low | high) - ((low ^ high) >> 1)
        n = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        low = tl.where(n >= k, middle, low)
        high = tl.where(n > k, high, tl.where(n == k, middle, middle - 1))
    return low


def _rows_cost(args: Mapping[str, Any]) -> tuple[float, float]:
    return 0.0, _bytes_of_scores(args, args["n_rows"], args["n_components"]) + 8.0 * args["n_rows"] * args["k"]


@triton.jit(launch_metadata=annotated(_rows_cost))
def _rows_topk_kernel(
    scores_ptr,  # [I, b, C], contiguous
    component_ptr,  # [I, K]
    row_ptr,  # [I, K]
    ranges_ptr,  # [I, slices, ranges]
    n_rows,  # I * b
    batch,
    n_components,
    k,
    slice_pairs,
    n_slices,
    n_ranges,
    HAS_RANGES: tl.constexpr,
    RANGE_SHIFT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program owns BLOCK_B samples, of one instance or two."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_c = tl.arange(0, BLOCK_C)
    m_row = o_row < n_rows
    m = m_row[:, None] & (o_c < n_components)[None, :]
    x = tl.load(scores_ptr + o_row[:, None] * n_components + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    key = tl.where(m, _key(x), NOTHING)
    threshold = _row_thresholds(key, k)[:, None]
    above, tie = key > threshold, key == threshold
    both = above.to(tl.int32) + (tie.to(tl.int32) << 16)
    upto = tl.cumsum(both, 1)
    quota = (k - (tl.sum(both, 1) & 0xFFFF))[:, None]
    selected = above | (tie & ((upto >> 16) <= quota))
    place = (upto & 0xFFFF) + tl.minimum(upto >> 16, quota) - 1
    p_out = (o_row * k)[:, None] + place
    b_c = o_c[None, :] + tl.zeros_like(upto)
    b_s = (o_row % batch).to(tl.int32)[:, None] + tl.zeros_like(upto)
    tl.store(component_ptr + p_out, b_c, mask=selected)
    tl.store(row_ptr + p_out, b_s, mask=selected)
    if HAS_RANGES:
        outer = (o_row // batch)[:, None]
        in_instance = b_s * k + place
        _count_in_range(ranges_ptr, outer, in_instance, b_c, selected, slice_pairs, n_slices, n_ranges, RANGE_SHIFT)
