"""How a packed stream is split over the ranks of a context-parallel group.

Every sample is cut into twice as many chunks as there are ranks, and rank r takes chunk r from the front and chunk r from the
back: a token's causal work grows with its position, so an early and a late chunk together weigh the same on every rank (the
zig-zag order of Megatron-LM, https://github.com/NVIDIA/Megatron-LM). Nothing is padded: chunks may differ by a token.

The kernels of Transformer Engine's exchange want chunks of equal size. For them every sample is first padded to a multiple of
twice the ranks; the order is then their own (``thd_get_partitioned_indices`` in ``common/fused_attn/context_parallel.cu``).
Padding stands behind the tokens of its sample, where none of them sees it in a causal decoder.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import lcm

import numpy as np

from llava_mcore.geometry import round_up
from llava_mcore.settings.schema import ParallelSettings, PrecisionSettings


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
        sample_lengths: tokens of each sample in the order of the stream, with the padding that was put in.
        unpadded_lengths: the same without it; 0 for a last one that is nothing but padding.
    """

    size: int
    chunks: tuple[tuple[Chunk, ...], ...]
    sample_lengths: tuple[int, ...]
    unpadded_lengths: tuple[int, ...]

    @functools.cached_property
    def sample_starts(self) -> tuple[int, ...]:
        """Where each sample begins in the stream."""
        return tuple(accumulate(self.sample_lengths, initial=0))[:-1]

    @property
    def tokens_per_rank(self) -> int:
        """Tokens that each rank holds."""
        return sum(self.sample_lengths) // self.size

    def tokens(self, rank: int) -> np.ndarray:
        """Which tokens of the stream that came in a rank holds: int64 [T / size], one past the last where only padding stands."""
        index = self.index(rank)
        return index if self.sample_lengths == self.unpadded_lengths else self._token_at[index]

    @functools.cached_property
    def _token_at(self) -> np.ndarray:
        token_at = np.full(sum(self.sample_lengths), sum(self.unpadded_lengths), np.int64)
        token = 0
        for start, length in zip(self.sample_starts, self.unpadded_lengths, strict=True):
            token_at[start : start + length] = np.arange(token, token + length)
            token += length
        return token_at

    def index(self, rank: int) -> np.ndarray:
        """Positions in the (padded) stream of a rank's tokens: int64 [T / size], ascending."""
        starts = self.sample_starts
        spans = [np.arange(chunk.length) + (starts[chunk.sample] + chunk.start) for chunk in self.chunks[rank]]
        return np.concatenate(spans) if spans else np.zeros(0, np.int64)


def stream_multiple(parallel: ParallelSettings, precision: PrecisionSettings) -> int | None:
    """What the tokens of a micro-batch are padded to a multiple of for Transformer Engine's exchange; None: they are not padded.

    >>> stream_multiple(ParallelSettings(tensor=4, context=2, context_exchange="p2p"), PrecisionSettings())
    8
    """
    if parallel.te_exchange is None:
        return None
    rows = precision.fp8_multiple if precision.fp8 and "language_model" in precision.fp8_modules else 1
    return lcm(2 * parallel.context, parallel.context * (parallel.tensor if parallel.sequence_parallel else 1) * rows)


def padded_tokens(sample_lengths: Sequence[int], size: int, multiple: int) -> int:
    """Tokens of a stream that is padded for Transformer Engine's exchange over ``size`` ranks.

    Args:
        sample_lengths: tokens of each sample; each is padded to a multiple of ``2 * size``.
        size: number of ranks.
        multiple: what their sum is padded to one of (:func:`stream_multiple`).

    >>> padded_tokens([5, 8, 1], 2, 8)
    24
    """
    return round_up(sum(round_up(length, 2 * size) for length in sample_lengths), multiple)


def partition(sample_lengths: Sequence[int], size: int, padded_to: int | None = None) -> Partition:
    """Splits a stream over ``size`` ranks, zig-zag within each sample, into equal parts.

    A sample of 2 * size * q + x tokens gives every chunk q tokens; the other x go, two a rank at most, to the ranks that have the
    fewest tokens so far. So the ranks never differ by more than a token, and end equal. Recent splits are remembered.

    Args:
        sample_lengths: tokens of each sample (the stream's padding tail included, as a sample of its own).
        size: number of ranks.
        padded_to: tokens after every sample is padded to a multiple of ``2 * size`` and the rest is put at the end, at least
            :func:`padded_tokens`; None: nothing is padded, and the tokens are a multiple of ``size``.

    Raises:
        ValueError: the stream cannot be split evenly, or a number makes no sense.
    """
    return _partition(tuple(sample_lengths), size, padded_to)


@functools.lru_cache(maxsize=64)
def _partition(unpadded: tuple[int, ...], size: int, padded_to: int | None) -> Partition:
    if size < 1:
        raise ValueError(f"a stream is split over 1 rank or more, not {size}")
    if any(length < 0 for length in unpadded):
        raise ValueError(f"sample lengths are 0 or more, not {min(unpadded)}")
    lengths = unpadded
    if padded_to is not None:
        lengths = _padded(unpadded, 2 * size, padded_to)
        unpadded += (0,) * (len(lengths) - len(unpadded))
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
    return Partition(size, tuple(map(tuple, chunks)), lengths, unpadded)


def _padded(lengths: tuple[int, ...], multiple: int, padded_to: int) -> tuple[int, ...]:
    """Each sample's tokens with its padding, and a last sample of padding where ``padded_to`` has room for one."""
    lengths = tuple(round_up(length, multiple) for length in lengths)
    rest = padded_to - sum(lengths)
    if rest < 0 or rest % multiple:
        raise ValueError(
            f"{sum(lengths)} tokens, padded to a multiple of {multiple} in each sample, cannot become {padded_to}: make that "
            f"a larger multiple of {multiple}"
        )
    return (*lengths, rest) if rest else lengths


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
