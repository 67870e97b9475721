from __future__ import annotations

import numpy as np
import pytest

from llava_mcore.data.packing import Cost, deal, pack


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    streams: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [stream for stream, room in enumerate(rooms) if room >= lengths[index]]
        if fitting:
            stream = min(fitting, key=lambda stream: rooms[stream])
        else:
            stream = len(streams)
            streams.append([])
            rooms.append(capacity)
        streams[stream].append(index)
        rooms[stream] -= lengths[index]
    return sorted(sorted(stream) for stream in streams)


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_naive_algorithm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 101, rng.integers(0, 200)).tolist()
    assert pack(lengths, 100) == naive_best_fit_decreasing(lengths, 100)


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_once_and_none_too_many(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 4097, 1000).tolist()
    streams = pack(lengths, 4096)
    assert sorted(index for stream in streams for index in stream) == list(range(1000))
    assert all(0 < sum(lengths[index] for index in stream) <= 4096 for stream in streams)


def test_waste_on_a_realistic_mix() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(576 + rng.lognormal(np.log(220), 0.75, 4096), 1, 4096).astype(int).tolist()
    streams = pack(lengths, 4096)
    assert 1 - sum(lengths) / (len(streams) * 4096) < 0.05


def test_what_does_not_fit_is_refused() -> None:
    for lengths in ([5, 11], [5, 0]):
        with pytest.raises(ValueError, match="sample 1 of"):
            pack(lengths, 10)
    assert pack([], 10) == []


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_dealing_loses_nothing_and_is_even(size: int, micro_batch_size: int, count: int) -> None:
    lengths = np.random.default_rng(count).integers(1, 1000, 2 * count).tolist()
    streams = [[2 * number, 2 * number + 1] for number in range(count)]
    ranks = deal(streams, [Cost().of(length, 0) for length in lengths], size, micro_batch_size)
    assert len(ranks) == size
    counts = {len(rank) for rank in ranks}
    assert len(counts) == 1 and counts.pop() % micro_batch_size == 0
    assert sorted(stream for rank in ranks for stream in rank if stream) == streams
    empty = sum(not stream for rank in ranks for stream in rank)
    assert empty < size * micro_batch_size or count == 0


def test_dealing_is_balanced() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 32_768, 64).tolist()
    costs = [Cost(picture=300.0).of(length, number % 5) for number, length in enumerate(lengths)]
    ranks = deal([[number] for number in range(64)], costs, 8, 1)
    sums = [sum(costs[i] for stream in rank for i in stream) for rank in ranks]
    assert max(sums) / (sum(sums) / 8) < 1.002
    assert all(rank == sorted(rank, key=lambda stream: -costs[stream[0]]) for rank in ranks)


def test_swaps_find_what_the_greedy_rule_misses() -> None:
    """The costliest first, to whoever has least, makes 23 and 19."""
    costs = [9.0, 9.0, 7.0, 7.0, 7.0, 3.0]
    ranks = deal([[number] for number in range(6)], costs, 2, 1)
    assert [sum(costs[stream[0]] for stream in rank) for rank in ranks] == [21, 21]
    # Nothing to gain: one stream outweighs all others together.
    assert deal([[0], [1], [2], [3]], [100.0, 1.0, 1.0, 1.0], 2, 1) == [[[0], [3]], [[1], [2]]]
