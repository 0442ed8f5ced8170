"""Top-k of many scores, its first half: a floor that at least K scores come before, and the survivors, those before it.

    sample     a program owns an instance; it takes a score of each of SAMPLES stretches, and from them the floor
    collect    a program owns one part of an instance and reads it once, TILE scores at a time. Few survivors go to one
               list an instance, in any order; many to a segment of the part's own, in flat order, and into bins

No two scores have the same place, so however many tie and whatever their distribution, the survivors are about as many
as the sample says. Fewer than K survive with a probability of about 1e-8: six standard deviations and four scores of
the sample are allowed for. `_topk_emit` has what is done then. A segment that overflows has only its own part read
again.

Bins are short floating-point numbers, of the distance to where the sample has the threshold: they are finest there, and
the threshold's has some thousandths of the survivors. They are counted in int32, with atomics on integers. The floor's
rank in the sample and a key's bin are found in float32: they decide what is kept, not what is selected.

For scores that fit a program's registers `_topk_small` is the right choice. Where K is a large part of the scores, so
are the survivors: `plan` in `batch_topk` then keeps no segments, and only bins are counted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from fastapd.kernels._launch import annotated
from fastapd.kernels._topk_keys import (
    BINS,
    HIGHEST,
    NOTHING,
    STATE,
    _bin,
    _bytes_of_scores,
    _kept,
    _key,
    _ones,
    _pair,
    _score,
    _scores,
    _surviving,
    _threshold,
    _wanted,
)

INFINITE = tl.constexpr(0x7F800000)
"""The key of infinity."""

SMALLEST = tl.constexpr(2.0**-126)
LARGEST = tl.constexpr(2.0**126)
"""Limits of the scale of bins, and of their centre."""


# --------------------------------------------------------------------------------------------------------------- sample


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


# -------------------------------------------------------------------------------------------------------------- collect


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
