"""Samples into streams of fixed length, and streams to data-parallel ranks.

Which samples share a stream depends on their lengths alone, never on the number of ranks: only the dealing knows of ranks.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

from llava_mcore.geometry import round_up

# Length at which attention costs a decoder as much as its linear layers do (about 12 times the width, here that of a 7B model).
# It only weighs the dealing: a wrong guess costs some balance and changes no number.
ATTENTION_LENGTH = 12 * 4096

Stream = list[int]


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


def deal(streams: Sequence[Stream], lengths: Sequence[int], size: int, micro_batch_size: int) -> list[list[Stream]]:
    """Deals streams to data-parallel ranks.

    Every rank gets the same number, a multiple of ``micro_batch_size`` and not zero; empty streams fill up. The costliest go
    first, to the rank with the least to do, and stay in that order, so that ranks also keep pace within a step.

    Args:
        streams: indices of the samples of each stream.
        lengths: tokens of each sample.
        size: number of ranks.
        micro_batch_size: streams of one forward pass.

    Returns:
        For every rank its streams.
    """
    per_rank = max(1, round_up(len(streams), size * micro_batch_size) // (size * micro_batch_size)) * micro_batch_size
    filled = [*streams, *([[]] * (per_rank * size - len(streams)))]
    costs = [sum(lengths[index] + lengths[index] ** 2 / ATTENTION_LENGTH for index in stream) for stream in filled]
    ranks: list[list[Stream]] = [[] for _ in range(size)]
    loads = [(0.0, rank) for rank in range(size)]
    for number in sorted(range(len(filled)), key=lambda number: (-costs[number], number)):
        load, rank = heapq.heappop(loads)
        ranks[rank].append(list(filled[number]))
        if len(ranks[rank]) < per_rank:
            heapq.heappush(loads, (load + costs[number], rank))
    return ranks
