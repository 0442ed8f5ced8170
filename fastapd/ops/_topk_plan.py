"""How the CUDA kernels of top-k go through scores: pure functions of sizes, so that a captured graph fits all scores.

The routes are in `csrc/cuda/batch_topk.cu` and `csrc/cuda/sample_topk.cu`; here are the sizes at which each is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

DIRECT = 8192
"""Scores of an instance up to which a block has all of them in shared memory."""

SAMPLES = ((1 << 15, 1024), (1 << 22, 2048), (1 << 26, 2048), (1 << 31, 4096))
"""Up to how many scores a floor is taken from how many of them. Every block reads the sample, 32 bytes a score."""

FEW = 10240
"""Survivors of an instance up to which its last block has all of them in shared memory."""

WORDS = 12288
"""Words of 32 bits, one for each score, up to which that block groups pairs, too: 393216 scores."""

PART = 4096
"""Scores of a block that keeps few survivors: four a thread."""

PARTS = 256
"""The most such blocks of an instance."""

WARPS, LEAST = 32, 256
"""Warps of a block that keeps many survivors, and how many scores there are at least for each."""

STORED = 8
"""Survivors are kept if they are expected to be at most this part of the scores."""

SEGMENT = 64
"""Places that each part's segment of survivors has besides four times the mean."""

LISTED = 1 << 14
"""The least places of the list of candidates."""

SMALL = 8192
"""Scores of an instance up to which one block takes the largest of its samples in turn."""

STATIC = 4096
"""Bytes of shared memory that kernels have besides."""


class Plan(NamedTuple):
    """`TopkPlan` of csrc/cuda/ops.h."""

    few: int
    samples: int
    n_parts: int
    part_scores: int
    room: int
    listed: int
    threads: int


def _ceil(a: float, b: int) -> int:
    return math.ceil(a / b) * b


def _words(batch: int, n_components: int) -> int:
    return n_components * -(-batch // 32)


def _threads(n: int) -> int:
    """Eight numbers a thread."""
    return min(1024, max(128, (1 << (n - 1).bit_length()) // 8))


def plan(shape: Sequence[int], n_pairs: int, of_double: bool, processors: int, shared_bytes: int) -> Plan:
    """The way for scores [I, b, C].

    Six standard deviations are allowed for wherever the sample may be wrong: those of the number of the sample's scores
    that are selected, and those of the survivors that then there are.
    """
    n_instances, batch, n_components = shape
    n_scores, n_words = batch * n_components, _words(batch, n_components)
    survivor_bytes = 12 if of_double else 8

    def fits(room: int) -> bool:
        n_bytes = survivor_bytes * room + 4 * n_pairs + 8 * n_words + STATIC
        return room <= FEW and n_words <= WORDS and n_bytes <= shared_bytes

    if n_scores <= DIRECT and fits(n_scores):
        return Plan(1, 0, 1, n_scores, n_scores, 0, _threads(n_scores))
    samples = next(s for most, s in SAMPLES if n_scores < most)
    expected = n_pairs * samples / n_scores
    margin = 6 * math.sqrt(expected) + 4
    rank = min(int(expected + margin), samples)
    room = max(math.ceil((rank + 6 * math.sqrt(rank) + 10) * n_scores / samples), PART, samples)
    n_parts, threads = -(-n_scores // PART), min(1024, PART // 4)
    if rank < samples and n_parts <= min(PARTS, threads) and fits(room):
        return Plan(1, samples, n_parts, PART, room, 0, threads)

    n_blocks = max(1, min(processors // n_instances, -(-n_scores // (WARPS * LEAST))))
    n_parts = n_blocks * WARPS
    part_scores = 32 * -(-n_scores // (32 * n_parts))
    survivors = math.ceil(rank * n_scores / samples)
    stored = STORED * survivors <= n_scores
    between = rank - max(0, int(expected - margin))
    most = math.ceil((between + 6 * math.sqrt(between) + 10) * n_scores / samples)
    room = min(part_scores, _ceil(4 * survivors / n_parts + SEGMENT, 16)) if stored else 0
    return Plan(0, samples, n_parts, part_scores, room, min(n_scores, max(LISTED, most)), 0)


def sample_plan(shape: Sequence[int], k: int, of_double: bool, row: int) -> tuple[int, int]:
    """Whether one block takes an instance [b, C], for samples of at most so many scores, and its threads."""
    _, batch, n_components = shape
    threads = 32 * min(16, max(4, (1 << (batch - 1).bit_length()) // 4))
    n_bytes = (8 if of_double else 4) * threads // 32 * n_components + 4 * k * batch + 8 * _words(batch, n_components)
    small = batch * n_components <= SMALL and n_components <= row and n_bytes + STATIC <= 96 << 10
    return int(small), threads
