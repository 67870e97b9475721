"""The order of a dataset's samples, as a function of seed and position alone.

A keyed Feistel network permutes the shards of every epoch anew, and another the samples of each window of a few shards. So any
position can be asked for by itself, with memory for the shards only, and what is read next lies in few files.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_ALL_BITS = 0xFFFFFFFFFFFFFFFF

# What a key is for: the same seed never keys two permutations alike.
_SHARDS, _SAMPLES, _CHOICE, STREAMS = range(1, 5)

_STRATEGY = re.compile(r"(first|end|random):(\d+(?:\.\d+)?)(%?)")


def splitmix64(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): every bit of the uint64 input moves every bit of the output."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def key(*parts: int) -> np.ndarray:
    """A 64-bit key, uint64 [1], of any numbers: another number anywhere, another key."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = splitmix64(state + np.uint64((part + _GOLDEN) & _ALL_BITS))
    return state


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _encipher(value: np.ndarray, round_keys: list[np.ndarray], bits: int) -> np.ndarray:
    """One pass over a domain of 2**bits: halves (as even as they get) take turns at being xor-ed with a hash of the other."""
    low_bits = (bits + 1) // 2
    low_mask, high_mask = _mask(low_bits), _mask(bits - low_bits)
    low, high = value & low_mask, value >> np.uint64(low_bits)
    for number, round_key in enumerate(round_keys):
        if number % 2:
            high = high ^ (splitmix64(low + round_key) & high_mask)
        else:
            low = low ^ (splitmix64(high + round_key) & low_mask)
    return (high << np.uint64(low_bits)) | low


def permute(places: np.ndarray, size: int, permutation_key: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0..size-1 sends each place (int64). Values outside walk on along their cycle until inside."""
    bits = (size - 1).bit_length()
    keys = [splitmix64(permutation_key + np.uint64((n + 1) * _GOLDEN & _ALL_BITS)) for n in range(ROUNDS)]
    value = _encipher(places.astype(np.uint64), keys, bits)
    outside = np.flatnonzero(value >= size)
    while len(outside):
        value[outside] = _encipher(value[outside], keys, bits)
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


@dataclass(frozen=True)
class Strategy:
    """Which samples of a dataset take part: LLaVA-NeXT's ``sampling_strategy``."""

    kind: str  # all, first, end or random
    amount: Fraction
    percent: bool

    @staticmethod
    def parse(text: str) -> Strategy:
        """Reads ``all``, ``first:N``, ``end:N`` or ``random:N``, where N may be a share such as ``12.5%``.

        Raises:
            ValueError: it is none of these.
        """
        if text == "all":
            return Strategy("all", Fraction(100), True)
        match = _STRATEGY.fullmatch(text)
        if match is None or (not match[3] and "." in match[2]) or (match[3] and Fraction(match[2]) > 100):
            raise ValueError(
                f"{text!r} is no sampling strategy: all, first:N, end:N and random:N are, N being a count or a share (20%)"
            )
        return Strategy(match[1], Fraction(match[2]), bool(match[3]))

    def count(self, samples: int) -> int:
        """Samples taken of so many: shares are rounded up, as LLaVA-NeXT does; a count beyond what there is takes all."""
        return min(samples, math.ceil(self.amount * samples / 100) if self.percent else int(self.amount))


class Order:
    """The endless order of one dataset: epoch after epoch, each a new permutation of the samples that take part.

    Args:
        shard_sizes: samples of each shard.
        seed: another seed, another order.
        shuffle: permute; otherwise every epoch runs through the shards as they lie.
        window_shards: shards whose samples are mixed with each other.
        strategy: which samples take part. ``random`` takes a fixed choice, spread evenly over the shards.
    """

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, shuffle: bool = True, window_shards: int = 16, strategy: str = "all"
    ) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        self._seed, self._shuffle, self._window_shards = seed, shuffle, window_shards
        chosen = Strategy.parse(strategy)
        samples = int(self._first[-1])
        self.size = chosen.count(samples)
        """Samples of an epoch."""
        if self.size < 1:
            raise ValueError(f"there is no order of no samples: {strategy!r} of {samples}")
        self._random = chosen.kind == "random"
        # Where the part that is taken begins and ends in every shard.
        if self._random:
            cumulated = [self.size * int(end) // samples for end in self._first]
            self._counts = np.diff(np.array(cumulated, dtype=np.int64))
            self._skipped = np.zeros_like(self._counts)
        else:
            begin = samples - self.size if chosen.kind == "end" else 0
            ends = np.clip(self._first, begin, begin + self.size)
            self._counts = np.diff(ends)
            self._skipped = ends[:-1] - self._first[:-1]
        self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which samples stand at positions of the order.

        Args:
            positions: int64, from 0.

        Returns:
            Epochs and indices of the samples, int64 like ``positions``.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"position {positions.min()} is negative")
        epochs, offsets = np.divmod(positions, self.size)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            indices[here] = self._within(epoch, offsets[here])
        return epochs, indices

    def members(self) -> Iterator[np.ndarray]:
        """The indices of all samples that take part, shard after shard; counted from the shards, not through the order."""
        for shard in np.flatnonzero(self._counts).tolist():
            yield self._sample(np.full(self._counts[shard], shard), np.arange(self._counts[shard], dtype=np.int64))

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order, and where each begins in it."""
        shards = np.arange(len(self._sizes), dtype=np.int64)
        if self._shuffle:
            shards = permute(shards, len(shards), key(self._seed, _SHARDS, epoch))
        return shards, np.concatenate([[0], np.cumsum(self._counts[shards])])

    def _within(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        shards, begins = self._epoch(epoch)
        if self._shuffle:
            offsets = offsets.copy()
            edges = begins[np.minimum(np.arange(0, len(shards) + self._window_shards, self._window_shards), len(shards))]
            windows = np.searchsorted(edges, offsets, side="right") - 1
            for window in np.unique(windows).tolist():
                here = np.flatnonzero(windows == window)
                begin, size = int(edges[window]), int(edges[window + 1] - edges[window])
                offsets[here] = begin + permute(offsets[here] - begin, size, key(self._seed, _SAMPLES, epoch, window))
        places = np.searchsorted(begins, offsets, side="right") - 1
        return self._sample(shards[places], offsets - begins[places])

    def _sample(self, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The index of the n-th sample taken from each shard."""
        if self._random:
            numbers = numbers.copy()
            for shard in np.unique(shards).tolist():
                here = np.flatnonzero(shards == shard)
                numbers[here] = permute(numbers[here], int(self._sizes[shard]), key(self._seed, _CHOICE, shard))
        return self._first[shards] + self._skipped[shards] + numbers
