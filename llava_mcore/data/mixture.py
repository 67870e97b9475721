"""Which dataset each position of a run takes its sample from.

Two ways, both with random access: by weights, where every prefix of the order holds each dataset's share within one sample, and
by epochs, where a cycle holds each dataset an exact number of times.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

MAX_PERIOD = 100_000


class Interleaving(ABC):
    """Deals positions out to K sources."""

    @abstractmethod
    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position (int64), and how many earlier positions that source has."""

    @abstractmethod
    def before(self, position: int) -> list[int]:
        """How many positions before ``position`` each source has."""


class ByWeight(Interleaving):
    """Shares that hold at any prefix within one sample.

    Tijdeman's algorithm for the chairman assignment problem (Discrete Mathematics 32, 1980): of the sources that are behind far
    enough, the one whose next turn is due first. Deviations stay below 1 - 1/(2K - 2). With rational weights the pattern repeats,
    so one period of it answers for any position.

    Args:
        weights: relative, as decimal numbers are written: 0.1 is a tenth.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        if not exact or min(exact) < 0 or not sum(exact):
            raise ValueError(f"weights {list(weights)} must not be negative, nor all zero")
        shares = [weight / sum(exact) for weight in exact]
        self._period = math.lcm(*(share.denominator for share in shares))
        if self._period > MAX_PERIOD:
            raise ValueError(
                f"weights {list(weights)} repeat only after {self._period:,} samples, more than {MAX_PERIOD:,}: "
                f"round them to whole numbers with a small sum, or give data.mixture epochs in their place"
            )
        self._per_period = np.array([int(share * self._period) for share in shares], dtype=np.int64)
        self._pattern = self._one_period()
        self._rank = np.empty(self._period, dtype=np.int64)
        for source in range(len(shares)):
            here = np.flatnonzero(self._pattern == source)
            self._rank[here] = np.arange(len(here))

    def _one_period(self) -> np.ndarray:
        period = self._period
        per_period = self._per_period.tolist()
        alive = [source for source, count in enumerate(per_period) if count]
        counts = [0] * len(per_period)
        pattern = np.empty(period, dtype=np.int64)
        if len(alive) == 1:
            pattern[:] = alive[0]
            return pattern
        slack = 2 * len(alive) - 2  # deviations are compared in units of 1 / (period * slack)
        for position in range(period):
            due = None
            for source in alive:
                share, count = per_period[source], counts[source]
                if slack * (share * (position + 1) - count * period) < period:
                    continue  # not behind far enough
                turn = -((-(count * slack + slack - 1) * period) // (share * slack))
                if due is None or turn < due[0]:
                    due = (turn, source)
            assert due is not None
            pattern[position] = due[1]
            counts[due[1]] += 1
        return pattern

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        periods, places = np.divmod(positions, self._period)
        sources = self._pattern[places]
        return sources, periods * self._per_period[sources] + self._rank[places]

    def before(self, position: int) -> list[int]:
        periods, places = divmod(position, self._period)
        within = np.bincount(self._pattern[:places], minlength=len(self._per_period))
        return (periods * self._per_period + within).tolist()


class ByEpochs(Interleaving):
    """Cycles in which source k has exactly ``counts[k]`` positions, spread evenly.

    The sources are halved like a Huffman tree; at every fork the left side has ``round(n * share)`` of the first n positions,
    which is monotone on both sides, and exact at the end of a cycle.

    Args:
        counts: positions of each source in a cycle.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        if not counts or min(counts) < 0 or not sum(counts):
            raise ValueError(f"counts {list(counts)} must not be negative, nor all zero")
        self._counts = np.array(counts, dtype=np.int64)
        self._cycle = int(self._counts.sum())
        nodes: list[tuple[int, int, object]] = sorted((int(count), number, number) for number, count in enumerate(counts))
        for number in range(len(counts), 2 * len(counts) - 1):
            (low, _, right), (high, _, left) = nodes[:2]
            nodes = sorted([*nodes[2:], (low + high, number, (left, high, right))])
        self._tree = nodes[0][2]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cycles, places = np.divmod(positions, self._cycle)
        sources, ranks = np.empty_like(positions), np.empty_like(positions)

        def descend(node: object, total: int, here: np.ndarray, numbers: np.ndarray) -> None:
            if not isinstance(node, tuple):
                sources[here], ranks[here] = node, numbers
                return
            left, share, right = node
            taken = _rounded(numbers, share, total)
            goes_left = _rounded(numbers + 1, share, total) > taken
            descend(left, share, here[goes_left], taken[goes_left])
            descend(right, total - share, here[~goes_left], (numbers - taken)[~goes_left])

        descend(self._tree, self._cycle, np.arange(len(positions)), places)
        return sources, cycles * self._counts[sources] + ranks

    def before(self, position: int) -> list[int]:
        cycles, place = divmod(position, self._cycle)
        found = [0] * len(self._counts)

        def descend(node: object, total: int, number: int) -> None:
            if not isinstance(node, tuple):
                found[node] = number  # type: ignore[call-overload]
                return
            left, share, right = node
            taken = int(_rounded(np.array([number]), share, total)[0])
            descend(left, share, taken)
            descend(right, total - share, number - taken)

        descend(self._tree, self._cycle, place)
        return [cycles * int(count) + number for count, number in zip(self._counts, found, strict=True)]


def _rounded(numbers: np.ndarray, share: int, total: int) -> np.ndarray:
    """numbers * share / total, halves rounded up."""
    if not total:
        return numbers * 0
    return (2 * numbers * share + total) // (2 * total)


class Scheduled(Interleaving):
    """Weights that change at given positions; every dataset goes on where it stood.

    Args:
        parts: first position of each part (the first part's is 0) and its interleaving.
    """

    def __init__(self, parts: Mapping[int, Interleaving]) -> None:
        self._starts = sorted(parts)
        self._parts = [parts[start] for start in self._starts]
        if self._starts[0] != 0:
            raise ValueError(f"the schedule of weights begins at {self._starts[0]}, but must say what holds from 0 on")
        cursors = [np.array(self._parts[0].before(0), dtype=np.int64)]
        for part, start, end in zip(self._parts, self._starts, self._starts[1:], strict=False):
            cursors.append(cursors[-1] + np.array(part.before(end - start), dtype=np.int64))
        self._cursors = cursors

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, numbers = np.empty_like(positions), np.empty_like(positions)
        which = np.searchsorted(self._starts, positions, side="right") - 1
        for part in np.unique(which).tolist():
            here = np.flatnonzero(which == part)
            sources[here], within = self._parts[part].at(positions[here] - self._starts[part])
            numbers[here] = self._cursors[part][sources[here]] + within
        return sources, numbers

    def before(self, position: int) -> list[int]:
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        within = np.array(self._parts[part].before(position - self._starts[part]), dtype=np.int64)
        return (self._cursors[part] + within).tolist()
