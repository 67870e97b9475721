"""Samples into streams of fixed length, and streams to data-parallel ranks.

Which samples share a stream depends on their lengths alone, never on the number of ranks: only the dealing knows of ranks.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from llava_mcore.geometry import round_up

Stream = list[int]


@dataclass(frozen=True)
class Cost:
    """What a sample costs to compute, in decoder tokens. It only weighs the dealing: a wrong guess changes no number.

    Attributes:
        attention_length: length at which attention costs a decoder as much as its linear layers; about 12 times its width, as
            by default of a 7B model.
        picture: tokens through the decoder that cost as much as one picture through the tower.
    """

    attention_length: float = 12 * 4096
    picture: float = 0.0

    def of(self, length: int, pictures: int) -> float:
        """Cost of a sample of so many tokens and pictures."""
        return length + length * length / self.attention_length + pictures * self.picture


def pack(lengths: Sequence[int], capacity: int) -> list[Stream]:
    """Best-fit decreasing: the longest sample first, each into the fullest stream that still has room.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a stream.

    Returns:
        Indices of the samples of each stream, ascending; streams in the order of their first samples.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"sample {index} of {length} tokens does not fit a stream of {capacity}")
    streams: list[Stream] = []
    rooms: list[int] = []  # the distinct amounts of room left, ascending
    with_room: dict[int, list[int]] = {}  # streams with that much room, a heap, so that ties go to the oldest
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            stream, room = len(streams), capacity
            streams.append([])
        else:
            room = rooms[at]
            stream = heapq.heappop(with_room[room])
            if not with_room[room]:
                del with_room[room], rooms[at]
        streams[stream].append(index)
        left = room - lengths[index]
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            heapq.heappush(with_room[left], stream)
    return sorted(sorted(stream) for stream in streams)


def deal(streams: Sequence[Stream], costs: Sequence[float], size: int, multiple: int) -> list[list[Stream]]:
    """Deals streams to data-parallel ranks.

    Every rank gets the same number, a multiple of ``multiple`` and not zero; empty streams fill up. The costliest go first, to
    the rank with the least to do (Graham's LPT rule); then the rank with the most to do swaps streams with others, as long as
    that makes it less. A rank's streams stand from the costliest on, so that ranks also keep pace within a step.

    Args:
        streams: indices of the samples of each stream.
        costs: of each sample.
        size: number of ranks.
        multiple: streams of one forward pass, and of as many passes as must go together.

    Returns:
        For every rank its streams.
    """
    per_rank = max(1, round_up(len(streams), size * multiple) // (size * multiple)) * multiple
    filled = [*streams, *([[]] * (per_rank * size - len(streams)))]
    sums = [sum(costs[index] for index in stream) for stream in filled]
    ranks: list[list[int]] = [[] for _ in range(size)]
    loads = [(0.0, rank) for rank in range(size)]
    for number in sorted(range(len(filled)), key=lambda number: (-sums[number], number)):
        load, rank = heapq.heappop(loads)
        ranks[rank].append(number)
        if len(ranks[rank]) < per_rank:
            heapq.heappush(loads, (load + sums[number], rank))
    _even_out(ranks, sums)
    return [[list(filled[number]) for number in sorted(rank, key=lambda number: (-sums[number], number))] for rank in ranks]


EVEN_ENOUGH = 1.001  # longest over mean


def _even_out(ranks: list[list[int]], sums: Sequence[float]) -> None:
    """Swaps streams of the rank with the most to do for lesser ones of others, those with the least to do first, in place."""
    loads = [sum(sums[number] for number in rank) for rank in ranks]
    enough = EVEN_ENOUGH * sum(loads) / len(loads)
    for _ in range(8 * len(ranks)):  # each makes the longest less; more are seldom needed
        longest = max(range(len(ranks)), key=loads.__getitem__)
        if loads[longest] <= enough or not _swap(longest, ranks, loads, sums):
            return


def _swap(longest: int, ranks: list[list[int]], loads: list[float], sums: Sequence[float]) -> bool:
    """The best swap of a rank with the first other that has any; false: there is none."""
    for other in sorted(range(len(ranks)), key=loads.__getitem__):
        gap = loads[longest] - loads[other]
        places = sorted(range(len(ranks[other])), key=lambda place: sums[ranks[other][place]])
        values = [sums[ranks[other][place]] for place in places]
        found: list[tuple[float, int, int, float]] = []
        for place, number in enumerate(ranks[longest]):
            at = bisect_left(values, sums[number] - gap / 2)  # half of the gap would make both alike
            for near in (at - 1, at):
                if 0 <= near < len(values) and 0 < sums[number] - values[near] < gap:
                    moved = sums[number] - values[near]
                    found.append((abs(moved - gap / 2), place, places[near], moved))
        if found:
            _, mine, its, moved = min(found)
            ranks[longest][mine], ranks[other][its] = ranks[other][its], ranks[longest][mine]
            loads[longest] -= moved
            loads[other] += moved
            return True
    return False
