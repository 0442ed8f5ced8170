"""The largest of batch * n_components scores on a GPU, or of each sample's, exactly, as a grouped selection.

A selection is a threshold and a number: every score above the threshold, and of those equal to it so many, the first in
flat order. Scores are compared as keys (`_topk_keys`), integers in the contract's order. Where the keys of a block are
in registers `_threshold` bisects them. How the right keys get there depends on sizes alone (`plan`), so that the host
never waits and a captured graph fits all scores:

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

Kernels are in `_topk_small` (small, rows), `_topk_collect` (sample, collect), `_topk_emit` (narrow, emit) and
`_topk_group` (partition, split); here are the sizes at which each is taken, and the launches.

One launch up to SMALL scores, four for few survivors (FEW), five or six for many; two or three for samples. What has no
fixed order, the list, is only counted, in integers, so a selection is the same in every run. A hint is not used: it
could save the launch of `sample`, a few microseconds, and would bring on the slow way of `emit` whenever the threshold
moves more than was allowed for.

Memory beyond the lists is a bit for each score and 8 bytes for each place of a segment: some percent of that of float32
scores, at most three eighths. Where K is above about an eighth of the scores no segments are kept and the scores are
read three times; where it is above a half a mask would be the better selection.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from fastapd.kernels import _launch
from fastapd.kernels._launch import block, cdiv, launch
from fastapd.kernels._topk_collect import _collect_topk_kernel, _sample_topk_kernel
from fastapd.kernels._topk_emit import _emit_topk_kernel, _narrow_topk_kernel
from fastapd.kernels._topk_group import _partition_topk_kernel, _split_topk_kernel
from fastapd.kernels._topk_keys import BINS, STATE
from fastapd.kernels._topk_small import _rows_topk_kernel, _small_topk_kernel
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


# ---------------------------------------------------------------------------------------------------------------- sizes


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
    """At most 32 scores a thread while the threshold is looked for, eight then; all registers, or some ptxas spill."""
    size, block_c = block(batch * n_components, 64, SMALL), block(n_components, 2, SMALL)
    warps = max(4, min(16, size // 512))
    return {
        "BLOCK": size,
        "TILE_B": min(block(batch, 2, SMALL), max(1, 256 * warps // block_c)),
        "BLOCK_C": block_c,
        "num_warps": warps,
        "num_stages": 1,
        "maxnreg": min(255, 2048 // warps),
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


# ------------------------------------------------------------------------------------------------------------- launches


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
