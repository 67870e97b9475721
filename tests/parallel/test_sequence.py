from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_mcore.parallel.sequence import Chunk, partition

SIZES = st.integers(1, 9)
LENGTHS = st.lists(st.integers(0, 60), max_size=40)


def fill(lengths: list[int], size: int) -> list[int]:
    """A last sample that makes the stream divide, as the padding tail does."""
    return [*lengths, -sum(lengths) % size]


def work(lengths: list[int], size: int) -> list[int]:
    """Keys that each rank's queries see, all together."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    split = partition(lengths, size)
    return [int((positions[split.index(rank)] + 1).sum()) for rank in range(size)]


@given(LENGTHS, SIZES)
def test_every_token_once_and_as_many_on_each_rank(lengths: list[int], size: int) -> None:
    lengths = fill(lengths, size)
    split = partition(lengths, size)
    parts = [split.index(rank) for rank in range(size)]
    assert all(part.dtype == np.int64 and len(part) == sum(lengths) // size == split.tokens_per_rank for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(sum(lengths)))


@given(LENGTHS, SIZES)
def test_chunks_are_what_the_index_says_and_even(lengths: list[int], size: int) -> None:
    lengths = fill(lengths, size)
    split = partition(lengths, size)
    for rank in range(size):
        chunks = split.chunks[rank]
        spans = [split.sample_starts[chunk.sample] + chunk.start + np.arange(chunk.length) for chunk in chunks]
        assert np.array_equal(np.concatenate([np.zeros(0, np.int64), *spans]), split.index(rank))
        for sample, length in enumerate(lengths):
            held = [chunk for chunk in chunks if chunk.sample == sample]
            assert all(chunk.length > 0 for chunk in held) and len(held) <= 2
            # Two chunks, each of the even share or one more.
            assert 0 <= sum(chunk.length for chunk in held) - 2 * (length // (2 * size)) <= 2


@given(LENGTHS, SIZES)
def test_no_rank_is_ever_more_than_a_token_ahead(lengths: list[int], size: int) -> None:
    lengths = fill(lengths, size)
    split = partition(lengths, size)
    held = np.zeros((size, len(lengths)), int)
    for rank, chunks in enumerate(split.chunks):
        for chunk in chunks:
            held[rank, chunk.sample] += chunk.length
    totals = held.cumsum(1)
    assert (totals.max(0) - totals.min(0)).max() <= 1


def test_zig_zag() -> None:
    split = partition([8, 1, 3], 2)
    assert split.chunks[0] == (Chunk(0, 0, 2), Chunk(0, 6, 2), Chunk(1, 0, 1), Chunk(2, 0, 1))
    assert split.chunks[1] == (Chunk(0, 2, 4), Chunk(2, 1, 2))
    assert split.index(0).tolist() == [0, 1, 6, 7, 8, 9]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_causal_work_is_even(size: int) -> None:
    for lengths in ([4096], [2047, 2049], [700, 1300, 5, 1, 90, 2000]):
        lengths = fill(lengths, size)
        each = work(lengths, size)
        # A rank may have an extra token in each sample, of at most that sample's length in work.
        assert max(each) / np.mean(each) < 1.01, (lengths, each)
    # Cut from front to back instead, the last rank would do nearly twice its share.
    positions = np.arange(4096) + 1
    assert positions[-4096 // size :].sum() / (positions.sum() / size) > 1.49


@given(LENGTHS)
def test_one_rank_holds_the_stream(lengths: list[int]) -> None:
    split = partition(lengths, 1)
    assert np.array_equal(split.index(0), np.arange(sum(lengths)))
    assert split.chunks[0] == tuple(Chunk(sample, 0, length) for sample, length in enumerate(lengths) if length)


def test_the_same_split_is_the_same_object() -> None:
    assert partition([5, 3], 2) is partition((5, 3), 2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="7 tokens do not divide over 2 context-parallel ranks"):
        partition([3, 4], 2)
    with pytest.raises(ValueError, match="not 0"):
        partition([3, 4], 0)
    with pytest.raises(ValueError, match="not -1"):
        partition([3, -1], 2)
