"""The largest of batch * n_components scores on a GPU, or of each sample's, exactly, as a grouped selection.

A selection is a threshold and a number: every score above the threshold, and of those equal to it so many, the first in
flat order. Scores are compared as `_key`s, integers in the contract's order. Where the keys of a block are in registers
`_threshold` bisects them. How the right keys get there depends on sizes alone (`plan`), so that the host never waits
and a captured graph fits all scores:

    small      one program an instance has all of its scores in registers and writes all lists
    rows       (sample_topk) a program has some samples' scores in registers and writes the sample-major list
    sample     one program an instance takes some thousand scores, one of each stretch of the instance, and from them a
               floor: a place in the order of (score, flat index) that at least K scores come before, not many more
    collect    each program reads one part of the scores, once, and keeps the survivors, those before the floor. Few are
               put in one list an instance; many in a segment of the part's own, in flat order, and are counted in bins
    narrow     (many) each program puts those of its survivors that are in the threshold's bin in the instance's list
    emit       each program bisects that list by itself, counts in it how many pairs earlier parts have, and writes its
               own part's pairs: the sample-major list
    partition  (long lists) sorts pairs by range of components
    split      sorts them by component, stably: the component-major list, both lists' offsets, and the positions

One launch up to SMALL scores, four for few survivors (FEW), five or six for many; two or three for samples. What has no
fixed order, the list, is only counted, in integers, so a selection is the same in every run.

No two scores have the same place, so however many tie and whatever their distribution, the survivors are about as many
as the sample says. Fewer than K survive with a probability of about 1e-8: six standard deviations and four scores of
the sample are allowed for. That, or a list that overflows, has `emit` bisect the scores themselves, every program all
of them: exact, but a thousand times slower. A segment that overflows has only its own part read again. A hint is not
used: it could save the launch of `sample`, a few microseconds, and would bring on the slow way whenever the threshold
moves more than was allowed for.

Bins are short floating-point numbers, of the distance to where the sample has the threshold: they are finest there, and
the threshold's has some thousandths of the survivors. If all its keys are equal, which is known, no list is needed.

Memory beyond the lists is a bit for each score and 8 bytes for each place of a segment: some percent of that of float32
scores, at most three eighths. Where K is above about an eighth of the scores no segments are kept and the scores are
read three times; where it is above a half a mask would be the better selection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastapd.kernels import _launch
from fastapd.kernels._launch import annotated, block, cdiv, launch
from torch import Tensor

SMALL = 1 << 14
"""Scores of an instance up to which one program does all."""

ROW = 1 << 13
"""Scores of a sample up to which `sample_topk` has them in registers."""

FEW = 6144
"""Expected survivors of an instance up to which all of them are listed."""

SPLIT = 1 << 22
"""Pairs times components up to which each split program looks at all pairs."""

SAMPLES = (1 << 10, 1 << 12, 1 << 13)
"""Scores that a floor is taken from: for more instances than multiprocessors, in general, and from 2**26 scores on."""

TILE = 8192
"""Scores that a collecting program reads at once."""

LISTED = (1 << 14, 1 << 20)
"""The least and the most places of the list of candidates where survivors are many."""

LIST_BLOCK = (8192, 2048)
"""Listed keys that are bisected in registers, of few survivors and of candidates; more are read again at each step."""

SEGMENT = 512
"""The least places of a segment."""

STATE = tl.constexpr(8)
"""An instance's numbers: the floor's key and flat index, how many are listed, the least and the largest key listed, and
the bits of the centre of the bins and of the inverse of their scale."""

BINS = tl.constexpr(512)
"""Bin 0 is of no survivors."""

NOTHING = tl.constexpr(-(2**31))
"""Below the key of every score."""

NO_PAIR = tl.constexpr(-(2**63))
"""A `_pair` with that key."""

HIGHEST = tl.constexpr(2**31 - 1)
"""The key of NaN; and beyond all flat indices."""

INFINITE = tl.constexpr(0x7F800000)
"""The key of infinity."""

SMALLEST = tl.constexpr(2.0**-126)
LARGEST = tl.constexpr(2.0**126)
"""Limits of the scale of bins, and of their centre."""


# ------------------------------------------------------------------------------------------------------ keys and counts


@triton.jit
def _key(x):
    """int32 in the order of float32 scores: two's complement for sign and magnitude, one key for 0 and -0, one for all
    NaN, the highest."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(x == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(x != x, HIGHEST, key)


@triton.jit
def _score(key):
    """float32 of a key."""
    bits = tl.where(key == HIGHEST, 0x7FC00000, key ^ ((key >> 31) & 0x7FFFFFFF))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _wanted(counts_ptr, instance, n_pairs, HAS_COUNTS: tl.constexpr):
    """An instance's K, int32."""
    wanted = (instance * 0).to(tl.int32) + n_pairs
    if HAS_COUNTS:
        wanted = tl.load(counts_ptr + instance).to(tl.int32)
    return wanted


@triton.jit
def _threshold(key, need):
    """A key that `need` of a block's keys reach or, where keys tie, the highest that at least so many reach.

    It need not be one of the keys. A lane that has none is NOTHING; the threshold of no keys is the highest.
    """
    low, high = tl.min(tl.where(key == NOTHING, HIGHEST, key)), tl.max(key)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean rounded up, without overflow
        n = tl.sum((key >= middle).to(tl.int32))
        low = tl.where(n >= need, middle, low)
        high = tl.where(n > need, high, tl.where(n == need, middle, middle - 1))
    return low


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


@triton.jit
def _bin(key, centre, inverse):
    """1 to BINS - 1, not falling in the key, 0 of NOTHING.

    On either side of the centre are eight octaves of the distance in 32 steps each, the last up to twice the scale.
    """
    distance = _score(key) - centre
    bits = (tl.abs(distance) * inverse).to(tl.int32, bitcast=True)
    steps = tl.minimum(tl.maximum((bits >> 18) - (120 << 5), 0), BINS // 2 - 2)
    found = tl.where(distance < 0, BINS // 2 - 1 - steps, BINS // 2 + steps)
    return tl.where(key == NOTHING, 0, tl.where(key == HIGHEST, BINS - 1, found))


@triton.jit
def _ones(words):
    """How many bits of each uint32 are set, int32."""
    n = words - ((words >> 1) & 0x55555555)
    n = (n & 0x33333333) + ((n >> 2) & 0x33333333)
    n = (n + (n >> 4)) & 0x0F0F0F0F
    return (tl.mul(n, 0x01010101, sanitize_overflow=False) >> 24).to(tl.int32)


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


@triton.jit
def _under(key):
    """The highest score with a lower key; NaN if there is none. Scores with lower keys are those not above it."""
    under = tl.maximum(key, NOTHING + 1) - 1
    return _score(tl.where(under == -1, -2, tl.minimum(under, INFINITE)))  # -1 would be -0


@triton.jit
def _first(n):
    """int32 with its first n bits set."""
    return tl.where(n < 32, ~(-1 << tl.minimum(tl.maximum(n, 0), 31)), -1)


@triton.jit
def _survivor_words(scores_ptr, floor_key, floor_flat, at, n, TILE: tl.constexpr):
    """A bit for each of TILE scores from `at` on, 32 to an int32: whether it survives and is one of n."""
    o = tl.arange(0, TILE)
    x = tl.load(scores_ptr + o, mask=o < n, other=0.0).to(tl.float32)
    # so many of the tile survive if they equal the floor; of the rest what is above it
    tied = tl.minimum(tl.maximum(floor_flat.to(tl.int64) - at + 1, 0), TILE).to(tl.int32)
    under = tl.where(o < tied, _under(floor_key), _score(tl.minimum(floor_key, INFINITE)))
    words = tl.sum(tl.reshape(tl.where(x <= under, 0, 1 << (o % 32)), (TILE // 32, 32)), 1)
    return words & _first(n - tl.arange(0, TILE // 32) * 32)


@triton.jit
def _pair(key, flat):
    """int64 of a key and a flat index, which are `_key_of` and `_flat_of` it."""
    return (key.to(tl.int64) << 32) | flat.to(tl.int64)


@triton.jit
def _key_of(pair):
    return (pair >> 32).to(tl.int32)


@triton.jit
def _flat_of(pair):
    return pair.to(tl.int32)


@triton.jit
def _surviving(pair, floor_key, floor_flat):
    """Keys, NOTHING in the place of those behind the floor."""
    key = _key_of(pair)
    return tl.where((key > floor_key) | ((key == floor_key) & (_flat_of(pair) <= floor_flat)), key, NOTHING)


@triton.jit
def _scores(scores_ptr, at, end, BLOCK: tl.constexpr):
    """Pairs of BLOCK scores of an instance, with the key NOTHING from the end on."""
    o = tl.arange(0, BLOCK)
    m = o < (end - at).to(tl.int32)
    key = _key(tl.load(scores_ptr + at + o, mask=m, other=0.0).to(tl.float32))
    return _pair(tl.where(m, key, NOTHING), (at + o.to(tl.int64)).to(tl.int32))


@triton.jit
def _kept(scores_ptr, kept_ptr, fits, at, end, STORED: tl.constexpr, BLOCK: tl.constexpr):
    """`_scores`, or, where the survivors fit into what is kept of them, those kept from `at` to `end`."""
    if STORED:
        if fits:
            o = tl.arange(0, BLOCK)
            pair = tl.load(kept_ptr + at + o, mask=o < (end - at).to(tl.int32), other=NO_PAIR)
        else:
            pair = _scores(scores_ptr, at, end, BLOCK)
    else:
        pair = _scores(scores_ptr, at, end, BLOCK)
    return pair


# ------------------------------------------------------------------------------------------------------- small and rows


def _bytes_of_scores(args: Mapping[str, Any], instances: int, each: int) -> float:
    return float(instances * each * args["scores_ptr"].element_size())


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


@triton.jit
def _count_in_range(ranges_ptr, outer, place, component, m, slice_pairs, n_slices, n_ranges, RANGE_SHIFT: tl.constexpr):
    """One more for the slice of the sample-major list and the range of components that each pair is in."""
    where = place // slice_pairs * n_ranges + (component >> RANGE_SHIFT)
    one = tl.full(where.shape, 1, tl.int32)
    tl.atomic_add(ranges_ptr + outer * n_slices * n_ranges + where, one, mask=m, sem="relaxed")


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


# --------------------------------------------------------------------------------------------- sample, collect and emit


def _sample_cost(args: Mapping[str, Any]) -> tuple[float, float]:
    return 0.0, 32.0 * args["n_instances"] * args["SAMPLES"]  # a sector each


@triton.jit(launch_metadata=annotated(_sample_cost))
def _sample_topk_kernel(
    scores_ptr,  # [I, N], contiguous
    counts_ptr,  # [I], int64
    state_ptr,  # [I, STATE + BINS]: filled
    ranges_ptr,  # [I / per, slices * ranges]: zeroed
    n_instances,
    n_scores,
    n_pairs,
    per,
    n_counters,
    HAS_COUNTS: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    FEW: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """One program owns an instance. Its sample has one score of each of SAMPLES stretches, at a place that is as good
    as random: at equal distances all might be one component's."""
    instance = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, SAMPLES).to(tl.int64)
    begin = o * n_scores // SAMPLES
    width = (o + 1) * n_scores // SAMPLES - begin
    noise = (((o ^ (instance << 16)) & 0xFFFFFFFF) * 0x45D9F3B) & 0xFFFFFFFF
    noise = ((noise ^ (noise >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    noise = noise ^ (noise >> 16)
    o_flat = begin + ((noise * width) >> 32)
    key = _key(tl.load(scores_ptr + instance * n_scores + o_flat).to(tl.float32))
    expected = _wanted(counts_ptr, instance, n_pairs, HAS_COUNTS).to(tl.float32) * SAMPLES / n_scores
    rank = (expected + 6.0 * tl.sqrt(expected) + 4.0).to(tl.int32)
    floor_key = rank * 0 + NOTHING
    floor_flat = rank * 0 + HIGHEST
    if rank < SAMPLES:
        floor_key = _threshold(key, rank)
        tie = key == floor_key
        short = rank - tl.sum((key > floor_key).to(tl.int32))
        if (tl.sum(tie.to(tl.int32)) > short) & (floor_key != HIGHEST):
            # of equal scores the first, except of NaN: -1 - flat is a key whose order is that
            floor_flat = -1 - _threshold(tl.where(tie, -1 - o_flat.to(tl.int32), NOTHING), short)
    tl.store(state_ptr + instance * (STATE + BINS), floor_key)
    tl.store(state_ptr + instance * (STATE + BINS) + 1, floor_flat)
    tl.store(state_ptr + instance * (STATE + BINS) + 2, 0)
    tl.store(state_ptr + instance * (STATE + BINS) + 3, HIGHEST)
    tl.store(state_ptr + instance * (STATE + BINS) + 4, NOTHING)
    if not FEW:
        centre = _score(_threshold(key, tl.maximum(expected.to(tl.int32), 1)))
        centre = tl.minimum(tl.maximum(tl.where(centre == centre, centre, LARGEST), -LARGEST), LARGEST)
        scale = tl.where(floor_key == NOTHING, tl.abs(centre) * 0.25, centre - _score(floor_key))
        inverse = 1.0 / tl.minimum(tl.maximum(tl.where(scale == scale, scale, LARGEST), SMALLEST), LARGEST)
        tl.store(state_ptr + instance * (STATE + BINS) + 5, centre.to(tl.int32, bitcast=True))
        tl.store(state_ptr + instance * (STATE + BINS) + 6, inverse.to(tl.int32, bitcast=True))
        tl.store(state_ptr + instance * (STATE + BINS) + STATE + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
    if HAS_RANGES:
        if instance % per == 0:
            for start in range(0, n_counters, 1024):
                o_n = start + tl.arange(0, 1024)
                p_n = ranges_ptr + instance // per * n_counters + o_n
                tl.store(p_n, tl.zeros((1024,), tl.int32), mask=o_n < n_counters)


def _collect_cost(args: Mapping[str, Any]) -> tuple[float, float]:
    return 0.0, _bytes_of_scores(args, args["n_instances"], args["n_scores"])


@triton.jit(launch_metadata=annotated(_collect_cost))
def _collect_topk_kernel(
    scores_ptr,  # [I, N], contiguous
    state_ptr,  # [I, STATE + BINS]
    list_ptr,  # [I, listed], `_pair`s; filled if FEW
    segments_ptr,  # [I, parts, capacity], `_pair`s; filled if STORED
    table_ptr,  # [3, I, parts]: survivors
    words_ptr,  # [I, parts, part_scores / 32]: a bit for each score, as this kernel goes
    n_instances,
    n_scores,
    n_parts,
    part_scores,
    listed,
    capacity,
    FEW: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns one part of an instance's scores. It goes through them tile by tile and leaves a bit for each, for
    a dozen operations a score; then through the words of bits, each thread with one of them."""
    pid = tl.program_id(0)
    part = (pid % n_parts).to(tl.int64)
    instance = (pid // n_parts).to(tl.int64)
    scores_ptr += instance * n_scores
    state_ptr += instance * (STATE + BINS)
    begin = part * part_scores
    end = tl.minimum(begin + part_scores, n_scores)
    floor_key, floor_flat = tl.load(state_ptr), tl.load(state_ptr + 1)
    room = listed
    kept_ptr = list_ptr + instance * listed
    if not FEW:
        room = capacity
        kept_ptr = segments_ptr + (instance * n_parts + part) * capacity
    survivors = pid * 0
    histogram = tl.zeros((BINS,), tl.int32)
    centre = tl.load(state_ptr + 5).to(tl.float32, bitcast=True)
    inverse = tl.load(state_ptr + 6).to(tl.float32, bitcast=True)
    if FEW or STORED:
        words_ptr += (instance * n_parts + part) * (part_scores // 32)
        for at in range(begin, end, TILE):
            o = tl.arange(0, TILE // 32)
            words = _survivor_words(scores_ptr + at, floor_key, floor_flat, at, (end - at).to(tl.int32), TILE)
            tl.store(words_ptr + (at - begin) // 32 + o, words, mask=o * 32 < end - at)
        tl.debug_barrier()  # a thread reads what another of the program has written
        n_words = (end - begin + 31) // 32
        for at in range(0, n_words, WORDS):
            o = at + tl.arange(0, WORDS)
            words = tl.load(words_ptr + o, mask=o < n_words, other=0).to(tl.uint32, bitcast=True)
            ones = _ones(words)
            n = tl.sum(ones)
            if n > 0:
                place = survivors + tl.cumsum(ones, 0) - ones
                if FEW:
                    place += tl.atomic_add(state_ptr + 2, n, sem="relaxed")
                else:
                    survivors += n
                o_flat = (begin + o * 32).to(tl.int32)
                for _ in range(tl.max(ones)):  # the first score that is left of each word
                    m = words != 0
                    some = tl.where(m, words, 1)
                    words = some & (some - 1)
                    flat = o_flat + _ones((some ^ words) - 1)
                    key = _key(tl.load(scores_ptr + flat, mask=m, other=0.0).to(tl.float32))
                    tl.store(kept_ptr + place, _pair(key, flat), mask=m & (place < room))
                    place += 1
    else:
        for at in range(begin, end, TILE):
            key = _surviving(_scores(scores_ptr, at, end, TILE), floor_key, floor_flat)
            histogram += tl.histogram(_bin(key, centre, inverse), BINS)
    if not FEW:
        if STORED:
            tl.store(table_ptr + instance * n_parts + part, survivors)
            tl.debug_barrier()
            fits = survivors <= capacity
            begin, end = tl.where(fits, 0, begin), tl.where(fits, survivors, end)
            for at in range(begin, end, BLOCK):
                pair = _kept(scores_ptr, kept_ptr, fits, at, end, True, BLOCK)
                key = _surviving(pair, floor_key, floor_flat)
                histogram += tl.histogram(_bin(key, centre, inverse), BINS)
        o_bin = tl.arange(0, BINS)
        m_bin = (o_bin > 0) & (histogram > 0)
        tl.atomic_add(state_ptr + STATE + o_bin, histogram, mask=m_bin, sem="relaxed")


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


# -------------------------------------------------------------------------------------------------- partition and split


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


# ------------------------------------------------------------------------------------------------- sizes and launches


class Plan(NamedTuple):
    """How the scores of each of several instances are gone through.

    Attributes:
        samples: Scores that the floor is taken from.
        survivors: How many scores are expected to be above it.
        n_parts: Programs for each instance.
        part_scores: Scores of each part but the last, a multiple of 32.
        few: Whether all survivors are listed.
        stored: Whether survivors are kept in flat order; if not, the scores are read again.
        listed: Places of an instance's list.
        capacity: Places of each part's segment.
        tile: Scores that a program reads at once.
    """

    samples: int
    survivors: int
    n_parts: int
    part_scores: int
    few: bool
    stored: bool
    listed: int
    capacity: int
    tile: int


def plan(n_instances: int, n_scores: int, n_pairs: int, processors: int) -> Plan:
    """A pure function of sizes.

    As far as each has a tile to read, parts are twice as many as the card has multiprocessors, for one to compute while
    another waits; of few survivors as many, as `emit` has them all in its registers. A segment has room for up to four
    times the mean, so that scores may be larger here than there.
    """
    samples = SAMPLES[0] if n_instances > processors else SAMPLES[2] if n_scores >= 1 << 26 else SAMPLES[1]
    expected = n_pairs * samples / n_scores
    rank = int(expected + 6 * math.sqrt(expected) + 4)
    survivors = min(n_scores, cdiv(rank * n_scores, samples))
    few = survivors <= FEW
    tile = TILE // 4 if few else TILE
    n_parts = max(1, min((1 if few else 2) * processors // n_instances, cdiv(n_scores, tile)))
    part_scores = 32 * cdiv(n_scores, 32 * n_parts)
    n_parts = cdiv(n_scores, part_scores)
    if few:
        most = int((rank + 6 * math.sqrt(rank) + 10) * n_scores / samples)
        listed, stored, capacity = min(n_scores, 16 * cdiv(most, 16)), n_parts == 1, 0
    else:
        listed = min(n_scores, max(LISTED[0], min(2 * survivors, LISTED[1] // n_instances)))
        stored = 8 * survivors <= n_scores
        mean = cdiv(survivors, n_parts)
        room = max(SEGMENT, min((4 if n_parts > 1 else 2) * mean, mean + part_scores // 16))
        capacity = min(part_scores, 16 * cdiv(room, 16)) if stored else 0
    return Plan(samples, survivors, n_parts, part_scores, few, stored, listed, capacity, tile)


def emit_config(p: Plan, capability: tuple[int, int]) -> dict[str, int]:
    """A list of few survivors is mostly in one block, one of candidates, some thousandths of them, too."""
    size = narrow_config(p, capability)["BLOCK"]
    block_list = block(2 * p.survivors, 64, LIST_BLOCK[0]) if p.few else LIST_BLOCK[1]
    return {
        "BLOCK_PARTS": block(p.n_parts, 16, 1 << 20),
        "BLOCK_LIST": block_list,
        "BLOCK": size,
        "num_warps": max(8, min(16, max(block_list, size) // 512)),
        "num_stages": 1,
    }


def narrow_config(p: Plan, capability: tuple[int, int]) -> dict[str, int]:
    """A segment has some hundred survivors; where scores are read again, more at once."""
    return {"BLOCK": min(1024 if p.stored else 4096, p.tile), "num_warps": 8, "num_stages": 1}


def collect_config(p: Plan, capability: tuple[int, int]) -> dict[str, int]:
    """16 scores a thread: four loads of 16 bytes are on their way at once, and a multiprocessor holds two programs."""
    warps = max(2, min(16, p.tile // 512))
    return {
        "TILE": p.tile,
        "WORDS": 32 * warps,
        "BLOCK": narrow_config(p, capability)["BLOCK"],
        "maxnreg": 64,
        "num_warps": warps,
        "num_stages": 1,
    }


def small_config(batch: int, n_components: int) -> dict[str, int]:
    """At most 32 scores a thread while the threshold is looked for, eight then."""
    size, block_c = block(batch * n_components, 64, SMALL), block(n_components, 2, SMALL)
    warps = max(4, min(16, size // 512))
    return {
        "BLOCK": size,
        "TILE_B": min(block(batch, 2, SMALL), max(1, 256 * warps // block_c)),
        "BLOCK_C": block_c,
        "num_warps": warps,
        "num_stages": 1,
    }


def rows_config(n_components: int, k: int, capability: tuple[int, int]) -> dict[str, int]:
    """16 scores a thread."""
    block_c = block(n_components, 2, ROW)
    return {
        "BLOCK_B": max(1, 2048 // block_c),
        "BLOCK_C": block_c,
        "num_warps": max(4, block_c // 512),
        "num_stages": 1,
    }


class Grouping(NamedTuple):
    """How a sample-major list is sorted by component.

    Attributes:
        partitioned: Whether pairs are first sorted by range of components.
        shift: A range has 2 ** shift components.
        n_ranges: How many they are.
        n_slices: How many programs share the pairs for each range.
        slice_pairs: Pairs of each slice but the last.
        block_c: Components of a split program.
        block: Pairs that it looks at at once.
    """

    partitioned: bool
    shift: int
    n_ranges: int
    n_slices: int
    slice_pairs: int
    block_c: int
    block: int


def grouping(n_instances: int, n_components: int, n_pairs: int, processors: int) -> Grouping:
    """A pure function of sizes: two programs a multiprocessor, and of C components about sqrt(C) ranges, as each range
    costs a look at all pairs and each of its components one at the range's pairs."""
    partitioned = n_components * n_pairs > SPLIT
    shift = (block(math.isqrt(n_components), 1, 1 << 20) - 1).bit_length()
    n_ranges = cdiv(n_components, 1 << shift)
    n_slices = max(1, min(64, cdiv(2 * processors, n_instances * n_ranges), cdiv(n_pairs, 4096)))
    slice_pairs = cdiv(n_pairs, n_slices)
    block_c = min(block(cdiv(n_components * n_instances, 2 * processors), 1, 16), 1 << shift)
    look_at = cdiv(2 * n_pairs, n_ranges) if partitioned else n_pairs
    return Grouping(
        partitioned, shift, n_ranges, n_slices, slice_pairs, block_c, block(look_at, 64, 8192 // block_c)
    )  # fmt: skip


def _lists(scores: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    """The five lists, not filled."""
    n_instances, batch, n_components = scores.shape
    sample, component, position = (scores.new_empty(n_instances, n_pairs, dtype=torch.int32) for _ in range(3))
    offsets = scores.new_empty(n_instances, n_components + 1, dtype=torch.int64)
    sample_offsets = scores.new_empty(n_instances, batch + 1, dtype=torch.int64)
    return sample, offsets, component, sample_offsets, position


def _nothing(scores: Tensor) -> tuple[Tensor, ...]:
    """The five lists of no pairs."""
    lists = _lists(scores, 0)
    lists[1].zero_()
    lists[3].zero_()
    return lists


class _Call:
    """One call's scores, contiguous, its lists and what its kernels leave for one another."""

    def __init__(self, op: str, scores: Tensor, n_pairs: int, counts: Tensor | None) -> None:
        self.op, self.scores, self.n_pairs = op, scores.contiguous(), n_pairs
        self.counts = None if counts is None else counts.contiguous()
        self.n_instances, self.batch, self.n_components = scores.shape
        self.processors = _launch.processors(scores)
        self.capability = _launch.capability(scores)
        self.lists = _lists(scores, n_pairs)
        self.sample, self.offsets, self.component, self.sample_offsets, self.position = self.lists

    def small(self, thresholds: Tensor | None) -> None:
        """All in one launch."""
        launch(
            self.op, _small_topk_kernel, self.n_instances, self.scores,
            self.scores, self._counts(), *self.lists, self.scores if thresholds is None else thresholds,
            self.n_instances, self.batch, self.n_components, self.n_pairs,
            HAS_COUNTS=self.counts is not None, HAS_THRESHOLD=thresholds is not None,
            **small_config(self.batch, self.n_components),
        )  # fmt: skip

    def _counts(self) -> Tensor:
        return self.sample if self.counts is None else self.counts

    def _group(self) -> tuple[Grouping, Tensor, Tensor, Tensor]:
        """How pairs are grouped, and memory for it: each pair's sample, the table of ranges, the partitioned places."""
        g = grouping(self.n_instances, self.n_components, self.n_pairs, self.processors)
        row = torch.empty_like(self.sample)
        if not g.partitioned:
            return g, row, row, row
        table = row.new_empty(self.n_instances, g.n_slices * g.n_ranges)
        return g, row, table, torch.empty_like(row)

    def select(self, per: int, thresholds: Tensor | None) -> None:
        """The n_pairs largest of each instance's scores or, for `per` above 1, of each of `per` rows; then groups."""
        g, row, ranges, places = self._group()
        n_instances, n_pairs = self.n_instances * per, self.n_pairs // per
        n_scores = self.batch * self.n_components // per
        p = plan(n_instances, n_scores, n_pairs, self.processors)
        counts = self._counts()
        state = row.new_empty(n_instances, STATE.value + BINS.value)
        listed = row.new_empty(n_instances, p.listed, dtype=torch.int64)
        table = state if p.few else row.new_empty(3, n_instances, p.n_parts)
        stored = not p.few and p.stored
        segments = row.new_empty(n_instances, p.n_parts, p.capacity, dtype=torch.int64) if stored else listed
        words = row.new_empty(n_instances, p.n_parts, p.part_scores // 32) if p.few or p.stored else state
        launch(
            self.op, _sample_topk_kernel, n_instances, row,
            self.scores, counts, state, ranges, n_instances, n_scores, n_pairs, per, ranges.shape[1],
            HAS_COUNTS=self.counts is not None, HAS_RANGES=g.partitioned, FEW=p.few, SAMPLES=p.samples,
            num_warps=max(4, min(16, p.samples // 512)), num_stages=1,
        )  # fmt: skip
        launch(
            self.op, _collect_topk_kernel, n_instances * p.n_parts, row,
            self.scores, state, listed, segments, table, words,
            n_instances, n_scores, p.n_parts, p.part_scores, p.listed, p.capacity,
            FEW=p.few, STORED=p.stored, **collect_config(p, self.capability),
        )  # fmt: skip
        if not p.few:
            launch(
                self.op, _narrow_topk_kernel, n_instances * p.n_parts, row,
                self.scores, counts, state, listed, segments, table,
                n_instances, n_scores, n_pairs, p.n_parts, p.part_scores, p.listed, p.capacity,
                HAS_COUNTS=self.counts is not None, STORED=p.stored, **narrow_config(p, self.capability),
            )  # fmt: skip
        launch(
            self.op, _emit_topk_kernel, n_instances * p.n_parts, row,
            self.scores, counts, state, listed, segments, table, self.component, row, ranges,
            state if thresholds is None else thresholds,
            n_instances, n_scores, n_pairs, self.n_components, p.n_parts, p.part_scores, p.listed, p.capacity,
            per, g.slice_pairs, g.n_slices, g.n_ranges,
            HAS_COUNTS=self.counts is not None, HAS_RANGES=g.partitioned, HAS_THRESHOLD=thresholds is not None,
            FEW=p.few, STORED=p.stored, RANGE_SHIFT=g.shift, **emit_config(p, self.capability),
        )  # fmt: skip
        self._grouped(g, row, ranges, places)

    def rows(self, k: int) -> None:
        """The k largest of each sample, with some samples in the registers of each program; then groups."""
        g, row, ranges, places = self._group()
        if g.partitioned:
            ranges.zero_()
        n_rows = self.n_instances * self.batch
        config = rows_config(self.n_components, k, self.capability)
        launch(
            self.op, _rows_topk_kernel, cdiv(n_rows, config["BLOCK_B"]), row,
            self.scores, self.component, row, ranges, n_rows, self.batch, self.n_components, k,
            g.slice_pairs, g.n_slices, g.n_ranges, HAS_RANGES=g.partitioned, RANGE_SHIFT=g.shift, **config,
        )  # fmt: skip
        self._grouped(g, row, ranges, places)

    def _grouped(self, g: Grouping, row: Tensor, ranges: Tensor, places: Tensor) -> None:
        counts = self._counts()
        if g.partitioned:
            launch(
                self.op, _partition_topk_kernel, self.n_instances * g.n_slices * g.n_ranges, row,
                counts, self.component, ranges, places, self.n_instances, self.n_pairs,
                g.slice_pairs, g.n_slices, g.n_ranges,
                HAS_COUNTS=self.counts is not None, RANGE_SHIFT=g.shift, BLOCK=4096, num_warps=8, num_stages=1,
            )  # fmt: skip
        n_splits = cdiv(self.n_components, g.block_c)
        launch(
            self.op, _split_topk_kernel, self.n_instances * n_splits, row,
            counts, self.component, row, ranges, places, self.sample, self.offsets, self.sample_offsets, self.position,
            self.n_instances, self.batch, self.n_components, self.n_pairs, n_splits, g.n_slices, g.n_ranges,
            HAS_COUNTS=self.counts is not None, PARTITIONED=g.partitioned, RANGE_SHIFT=g.shift,
            STEPS=self.n_pairs.bit_length(), BLOCK_C=g.block_c, BLOCK=g.block, BLOCK_B=256,
            num_warps=max(4, min(16, g.block_c * g.block // 512)), num_stages=1,
        )  # fmt: skip


def _batch_topk(
    scores: Tensor, n_pairs: int, counts: Tensor | None = None, thresholds: Tensor | None = None
) -> tuple[Tensor, ...]:
    if n_pairs == 0 or scores.numel() == 0:
        return _nothing(scores) if n_pairs == 0 else _lists(scores, n_pairs)
    call = _Call("batch_topk", scores, n_pairs, counts)
    if call.batch * call.n_components <= SMALL:
        call.small(thresholds)
    else:
        call.select(1, thresholds)
    return call.lists


def batch_topk(scores: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    """sample [I, K], offsets [I, C + 1], component [I, K], sample_offsets [I, b + 1] and position [I, K]."""
    return _batch_topk(scores, n_pairs)


def batch_topk_warm(scores: Tensor, hint: Tensor, n_pairs: int) -> tuple[Tensor, ...]:
    """The lists, and each instance's smallest selected score [I]: the hint if there is none, which is all it is for."""
    if n_pairs == 0 or scores.numel() == 0:
        return *_batch_topk(scores, n_pairs), hint.clone()
    thresholds = scores.new_empty(scores.shape[0])
    return *_batch_topk(scores, n_pairs, thresholds=thresholds), thresholds


def batch_topk_counts(scores: Tensor, counts: Tensor, capacity: int) -> tuple[Tensor, ...]:
    """The lists of `counts` [I] pairs, at most `capacity`; they end in zeros."""
    return _batch_topk(scores, capacity, counts)


def sample_topk(scores: Tensor, k: int) -> tuple[Tensor, ...]:
    """The lists of the k largest scores of each sample."""
    n_pairs = k * scores.shape[1]
    if n_pairs == 0 or scores.numel() == 0:
        return _nothing(scores)
    call = _Call("sample_topk", scores, n_pairs, None)
    if call.n_components <= ROW:
        call.rows(k)
    else:
        call.select(call.batch, None)
    return call.lists
