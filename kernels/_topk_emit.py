"""Top-k of many scores, its second half: the threshold, and every part's pairs in the sample-major list.

    narrow     (many survivors) a program owns one part of an instance; it puts those of its survivors that are in the
               threshold's bin in the instance's list, and counts them and those above it
    emit       a program owns one part; it bisects the list by itself, counts in it how many pairs earlier parts have,
               and writes its own part's pairs

The list has no fixed order and is only counted, in int32, so a selection is the same in every run. If all keys of the
threshold's bin are equal, which is known, no list is needed.

Where fewer than K scores survive, or the list overflows, `emit` bisects the scores themselves, every program all of
them: exact, but a thousand times slower. A sample's floor has that happen once in 1e8 times (`_topk_collect`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from fastapd.kernels._launch import annotated
from fastapd.kernels._topk_group import _count_in_range
from fastapd.kernels._topk_keys import (
    BINS,
    HIGHEST,
    NOTHING,
    STATE,
    _bin,
    _bytes_of_scores,
    _flat_of,
    _kept,
    _key_of,
    _score,
    _surviving,
    _threshold,
    _wanted,
)

# --------------------------------------------------------------------------------------------------------------- narrow


def _narrow_cost(args: Mapping[str, Any]) -> tuple[float, float]:
    return 0.0, 8.0 * args["n_instances"] * args["n_pairs"]


@triton.jit(launch_metadata=annotated(_narrow_cost))
def _narrow_topk_kernel(
    scores_ptr,  # [I, N], contiguous
    counts_ptr,  # [I], int64
    state_ptr,  # [I, STATE + BINS]
    list_ptr,  # [I, listed]: filled
    segments_ptr,  # [I, parts, capacity]
    table_ptr,  # [3, I, parts]: survivors; those above the threshold's bin; those in it
    n_instances,
    n_scores,
    n_pairs,
    n_parts,
    part_scores,
    listed,
    capacity,
    HAS_COUNTS: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns one part of an instance's scores."""
    pid = tl.program_id(0)
    part = (pid % n_parts).to(tl.int64)
    instance = (pid // n_parts).to(tl.int64)
    scores_ptr += instance * n_scores
    state_ptr += instance * (STATE + BINS)
    floor_key, floor_flat = tl.load(state_ptr), tl.load(state_ptr + 1)
    centre = tl.load(state_ptr + 5).to(tl.float32, bitcast=True)
    inverse = tl.load(state_ptr + 6).to(tl.float32, bitcast=True)
    histogram = tl.load(state_ptr + STATE + tl.arange(0, BINS))  # bin 0 is empty
    reach = tl.sum(histogram) - tl.cumsum(histogram, 0) + histogram  # how many are in a bin or above it
    enough = reach >= _wanted(counts_ptr, instance, n_pairs, HAS_COUNTS)
    bin_of_threshold = tl.maximum(tl.sum(enough.to(tl.int32)) - 1, 0)  # 0, where nobody is, if there are too few
    part_of_all = instance * n_parts + part
    kept_ptr = segments_ptr + part_of_all * capacity
    begin = part * part_scores
    end = tl.minimum(begin + part_scores, n_scores)
    fits = part_of_all < 0
    if STORED:
        survivors = tl.load(table_ptr + part_of_all).to(tl.int64)
        fits = survivors <= capacity
        begin, end = tl.where(fits, 0, begin), tl.where(fits, survivors, end)
    n_above, n_in = pid * 0, pid * 0
    least, most = pid * 0 + HIGHEST, pid * 0 + NOTHING
    for at in range(begin, end, BLOCK):
        pair = _kept(scores_ptr, kept_ptr, fits, at, end, STORED, BLOCK)
        key = _surviving(pair, floor_key, floor_flat)
        o_bin = _bin(key, centre, inverse)
        m = (o_bin == bin_of_threshold) & (o_bin > 0)
        n = tl.sum(m.to(tl.int32))
        n_above += tl.sum((o_bin > bin_of_threshold).to(tl.int32))
        n_in += n
        if n > 0:
            place = tl.atomic_add(state_ptr + 2, n, sem="relaxed") + tl.cumsum(m.to(tl.int32), 0) - 1
            least = tl.minimum(least, tl.min(tl.where(m, key, HIGHEST)))
            most = tl.maximum(most, tl.max(tl.where(m, key, NOTHING)))
            m = m & (place < listed)
            tl.store(list_ptr + instance * listed + place, pair, mask=m)
    if n_in > 0:
        tl.atomic_min(state_ptr + 3, least, sem="relaxed")
        tl.atomic_max(state_ptr + 4, most, sem="relaxed")
    all_parts = (instance * 0 + n_instances) * n_parts
    tl.store(table_ptr + all_parts + part_of_all, n_above)
    tl.store(table_ptr + 2 * all_parts + part_of_all, n_in)


# ----------------------------------------------------------------------------------------------------------------- emit


def _emit_cost(args: Mapping[str, Any]) -> tuple[float, float]:
    again = 0.0 if args["STORED"] else _bytes_of_scores(args, args["n_instances"], args["n_scores"])
    return 0.0, again + 16.0 * args["n_instances"] * args["n_pairs"]


@triton.jit(launch_metadata=annotated(_emit_cost))
def _emit_topk_kernel(
    scores_ptr,  # [I, N], contiguous
    counts_ptr,  # [I], int64
    state_ptr,  # [I, STATE + BINS]
    list_ptr,  # [I, listed]
    segments_ptr,  # [I, parts, capacity]
    table_ptr,  # [3, I, parts]
    component_ptr,  # [I, K]
    row_ptr,  # [I, K]
    ranges_ptr,  # [I / per, slices, ranges]
    threshold_ptr,  # [I]
    n_instances,
    n_scores,
    n_pairs,
    n_components,
    n_parts,
    part_scores,
    listed,
    capacity,
    per,  # so many instances are the rows of one in the lists that are grouped
    slice_pairs,
    n_slices,
    n_ranges,
    HAS_COUNTS: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    FEW: tl.constexpr,
    STORED: tl.constexpr,
    RANGE_SHIFT: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns one part of an instance's scores.

    `over` are scores above the threshold, `tied` those equal to it, `quota` how many of the tied are selected.
    """
    pid = tl.program_id(0)
    part = (pid % n_parts).to(tl.int64)
    instance = (pid // n_parts).to(tl.int64)
    part_of_all = instance * n_parts + part
    scores_ptr += instance * n_scores
    state_ptr += instance * (STATE + BINS)
    kept_ptr = list_ptr + instance * listed
    wanted = _wanted(counts_ptr, instance, n_pairs, HAS_COUNTS)
    begin = part * part_scores
    end = tl.minimum(begin + part_scores, n_scores)

    # which keys have the threshold among them, and how many are above all of those
    n_listed = tl.load(state_ptr + 2)
    over, over_before, tied_before = pid * 0, pid * 0, pid * 0
    all_tie = pid < 0
    if not FEW:
        o_part = tl.arange(0, BLOCK_PARTS)
        p_table = table_ptr + (n_instances + instance) * n_parts + o_part
        b_above = tl.load(p_table, mask=o_part < n_parts, other=0)
        p_table += (instance * 0 + n_instances) * n_parts
        b_in = tl.load(p_table, mask=o_part < part, other=0)
        over = tl.sum(b_above)
        over_before = tl.sum(tl.where(o_part < part, b_above, 0))
        tied_before = tl.sum(b_in)
        all_tie = tl.load(state_ptr + 3) == tl.load(state_ptr + 4)
    sound = (over + n_listed >= wanted) & ((n_listed <= listed) | all_tie)
    if sound & all_tie:
        threshold = tl.load(state_ptr + 3)
        least = threshold
    else:
        tied_before = pid * 0
        over = tl.where(sound, over, 0)
        over_before = tl.where(sound, over_before, 0)
        length = tl.where(sound, n_listed, n_scores).to(tl.int64)
        need = wanted - over
        start = length * 0
        if sound & (length <= BLOCK_LIST):
            pair = _kept(scores_ptr, kept_ptr, True, start, length, True, BLOCK_LIST)
            key, flat = _key_of(pair), _flat_of(pair)
            threshold = _threshold(key, need)
            least = threshold
            if HAS_THRESHOLD:
                least = tl.min(tl.where(key >= threshold, key, HIGHEST))
            m_over, m_tied, earlier = key > threshold, key == threshold, flat < begin
            over += tl.sum(m_over.to(tl.int32))
            over_before += tl.sum((m_over & earlier).to(tl.int32))
            tied_before += tl.sum((m_tied & earlier).to(tl.int32))
        else:
            low, high = pid * 0 + HIGHEST, pid * 0 + NOTHING
            for at in range(start, length, BLOCK_LIST):
                key = _key_of(_kept(scores_ptr, kept_ptr, sound, at, length, True, BLOCK_LIST))
                low = tl.minimum(low, tl.min(tl.where(key == NOTHING, HIGHEST, key)))
                high = tl.maximum(high, tl.max(key))
            while low < high:  # as in `_threshold`
                middle = (low | high) - ((low ^ high) >> 1)
                n = pid * 0
                for at in range(start, length, BLOCK_LIST):
                    key = _key_of(_kept(scores_ptr, kept_ptr, sound, at, length, True, BLOCK_LIST))
                    n += tl.sum((key >= middle).to(tl.int32))
                low = tl.where(n >= need, middle, low)
                high = tl.where(n > need, high, tl.where(n == need, middle, middle - 1))
            threshold = low
            least = pid * 0 + HIGHEST
            for at in range(start, length, BLOCK_LIST):
                pair = _kept(scores_ptr, kept_ptr, sound, at, length, True, BLOCK_LIST)
                key, flat = _key_of(pair), _flat_of(pair)
                least = tl.minimum(least, tl.min(tl.where(key >= threshold, key, HIGHEST)))
                m_over, m_tied, earlier = key > threshold, key == threshold, flat < begin
                over += tl.sum(m_over.to(tl.int32))
                over_before += tl.sum((m_over & earlier).to(tl.int32))
                tied_before += tl.sum((m_tied & earlier).to(tl.int32))
    quota = wanted - over
    if HAS_THRESHOLD:
        if part == 0:
            tl.store(threshold_ptr + instance, _score(least).to(threshold_ptr.dtype.element_ty))

    # the pairs of this part, in order
    fits = sound
    if STORED:
        survivors = n_listed.to(tl.int64)
        room = listed
        if not FEW:
            survivors = tl.load(table_ptr + part_of_all).to(tl.int64)
            room = capacity
            kept_ptr = segments_ptr + part_of_all * capacity
        fits = sound & (survivors <= room)
        begin, end = tl.where(fits, 0, begin), tl.where(fits, survivors, end)
    first_row = (instance % per).to(tl.int32)
    outer = instance // per
    for at in range(begin, end, BLOCK):
        pair = _kept(scores_ptr, kept_ptr, fits, at, end, STORED, BLOCK)
        key, flat = _key_of(pair), _flat_of(pair)
        m_over, m_tied = key > threshold, key == threshold
        both = m_over.to(tl.int32) + (m_tied.to(tl.int32) << 16)  # at most 2**13 of each
        upto = tl.cumsum(both, 0)
        tied_upto = tied_before + (upto >> 16)
        m = m_over | (m_tied & (tied_upto <= quota))
        place = over_before + (upto & 0xFFFF) + tl.minimum(tied_upto, quota) - 1
        b_c = flat % n_components
        tl.store(component_ptr + instance * n_pairs + place, b_c, mask=m)
        tl.store(row_ptr + instance * n_pairs + place, first_row + flat // n_components, mask=m)
        if HAS_RANGES:
            in_instance = first_row * n_pairs + place  # fewer than 2**31
            _count_in_range(ranges_ptr, outer, in_instance, b_c, m, slice_pairs, n_slices, n_ranges, RANGE_SHIFT)
        n = tl.sum(both)
        over_before += n & 0xFFFF
        tied_before += n >> 16
