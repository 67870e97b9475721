"""How a packed stream is split over the ranks of a context-parallel group.

Every sample is cut into twice as many chunks as there are ranks, and rank r takes chunk r from the front and chunk r from the
back: a token's causal work grows with its position, so an early and a late chunk together weigh the same on every rank (the
zig-zag order of Megatron-LM, https://github.com/NVIDIA/Megatron-LM). Nothing is padded: chunks may differ by a token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sample."""

    sample: int
    start: int  # first token, counted from the sample's first
    length: int


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: ``partition`` gives one object for one split
class Partition:
    """Which rank holds which tokens of a stream.

    Attributes:
        size: number of ranks.
        chunks: those of each rank, in the order of the stream, which is the order in which the rank keeps them. Empty ones are
            left out, and two that touch are one.
        sample_lengths: tokens of each sample in the order of the stream.
    """

    size: int
    chunks: tuple[tuple[Chunk, ...], ...]
    sample_lengths: tuple[int, ...]

    @functools.cached_property
    def sample_starts(self) -> tuple[int, ...]:
        """Where each sample begins in the stream."""
        return tuple(accumulate(self.sample_lengths, initial=0))[:-1]

    @property
    def tokens_per_rank(self) -> int:
        """Tokens that each rank holds."""
        return sum(self.sample_lengths) // self.size

    def index(self, rank: int) -> np.ndarray:
        """Positions in the stream of a rank's tokens: int64 [T / size], ascending."""
        starts = self.sample_starts
        spans = [np.arange(chunk.length) + (starts[chunk.sample] + chunk.start) for chunk in self.chunks[rank]]
        return np.concatenate(spans) if spans else np.zeros(0, np.int64)


def partition(sample_lengths: Sequence[int], size: int) -> Partition:
    """Splits a stream over ``size`` ranks, zig-zag within each sample, into equal parts without padding.

    A sample of 2 * size * q + x tokens gives every chunk q tokens; the other x go, two a rank at most, to the ranks that have the
    fewest tokens so far. So the ranks never differ by more than a token, and end equal. Recent splits are remembered.

    Args:
        sample_lengths: tokens of each sample (padding included, as samples of its own); their sum is a multiple of ``size``.
        size: number of ranks.

    Raises:
        ValueError: the stream cannot be split evenly, or a number makes no sense.
    """
    return _partition(tuple(sample_lengths), size)


@functools.lru_cache(maxsize=64)
def _partition(lengths: tuple[int, ...], size: int) -> Partition:
    if size < 1:
        raise ValueError(f"a stream is split over 1 rank or more, not {size}")
    if any(length < 0 for length in lengths):
        raise ValueError(f"sample lengths are 0 or more, not {min(lengths)}")
    if sum(lengths) % size:
        raise ValueError(
            f"{sum(lengths)} tokens do not divide over {size} context-parallel ranks: make their number a multiple of {size}"
        )
    counts = [0] * size
    chunks: list[list[Chunk]] = [[] for _ in range(size)]
    for sample, length in enumerate(lengths):
        sizes = _chunk_sizes(length, counts)
        starts = list(accumulate(sizes, initial=0))
        for rank in range(size):
            early, late = rank, 2 * size - 1 - rank
            counts[rank] += sizes[early] + sizes[late]
            if starts[early + 1] == starts[late]:
                pieces = [(starts[early], sizes[early] + sizes[late])]
            else:
                pieces = [(starts[early], sizes[early]), (starts[late], sizes[late])]
            chunks[rank] += [Chunk(sample, start, tokens) for start, tokens in pieces if tokens]
    return Partition(size, tuple(map(tuple, chunks)), lengths)


def _chunk_sizes(length: int, counts: list[int]) -> list[int]:
    """Tokens of each of a sample's chunks, front to back; ``counts``, what each rank has so far, differ by one at most."""
    ranks = range(len(counts))
    each, extra = divmod(length, 2 * len(counts))
    sizes = [each] * (2 * len(counts))
    # One token for each rank that is behind, which makes all equal; then one for every rank; then for those that have room.
    behind = [rank for rank in ranks if counts[rank] == min(counts)]
    ahead = [rank for rank in ranks if counts[rank] > min(counts)]
    for rank in [*behind, *ranks, *ahead][:extra]:
        sizes[rank if sizes[rank] == each else -1 - rank] += 1
    return sizes
