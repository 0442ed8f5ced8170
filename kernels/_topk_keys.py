"""Scores as integers in the contract's order, alone or with their flat index, and what top-k kernels do with a block.

A key is int32: NaN, however its bits are, is the highest, and zeros of both signs are one. A pair is a key and a flat
index in int64. Nothing here owns a tile: each function is of a block that its caller has in registers, and all counts
are int32, so that no order of programs changes them. An instance has fewer than 2**31 scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

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


# ----------------------------------------------------------------------------------------------------------------- keys


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


# -------------------------------------------------------------------------------------------------------- bits and bins


@triton.jit
def _ones(words):
    """How many bits of each uint32 are set, int32."""
    n = words - ((words >> 1) & 0x55555555)
    n = (n & 0x33333333) + ((n >> 2) & 0x33333333)
    n = (n + (n >> 4)) & 0x0F0F0F0F
    return (tl.mul(n, 0x01010101, sanitize_overflow=False) >> 24).to(tl.int32)


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


# ---------------------------------------------------------------------------------------------------------------- pairs


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


# ----------------------------------------------------------------------------------------------------------------- cost


def _bytes_of_scores(args: Mapping[str, Any], instances: int, each: int) -> float:
    return float(instances * each * args["scores_ptr"].element_size())
