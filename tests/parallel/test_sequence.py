from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_mcore.parallel.sequence import Chunk, padded_tokens, partition, stream_multiple
from llava_mcore.settings.schema import ParallelSettings, PrecisionSettings

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


# ---- padded for Transformer Engine's exchange ----


def transformer_engines_tokens(lengths: list[int], ranks: int, rank: int) -> list[int]:
    """Which positions of the padded stream Transformer Engine takes a rank to hold, by its kernel's words.

    "DualChunkSwap divides each sequence into (cp_size * 2) chunks and distributes 2 chunks of every sequence onto a CP rank",
    the rank's own from the front and its own from the back.
    """
    held, start = [], 0
    for length in lengths:
        assert length % (2 * ranks) == 0  # as the kernel asserts
        chunks = np.split(np.arange(start, start + length), 2 * ranks)
        held += [*chunks[rank], *chunks[-1 - rank]]
        start += length
    return [int(position) for position in held]


# What its comments on attn_forward_func_with_cp and reorder_seq_chunks_before_a2a_after_attn_thd print: for each rank the
# positions of its tokens within their sequences.
PRINTED = [
    ([8, 4], [[0, 1, 6, 7, 0, 3], [2, 3, 4, 5, 1, 2]]),
    (
        [8, 8, 8, 16],
        [
            [0, 7, 0, 7, 0, 7, 0, 1, 14, 15],
            [1, 6, 1, 6, 1, 6, 2, 3, 12, 13],
            [2, 5, 2, 5, 2, 5, 4, 5, 10, 11],
            [3, 4, 3, 4, 3, 4, 6, 7, 8, 9],
        ],
    ),
]


@pytest.mark.parametrize(("lengths", "printed"), PRINTED)
def test_transformer_engines_own_examples(lengths: list[int], printed: list[list[int]]) -> None:
    split = partition(lengths, len(printed), padded_to=sum(lengths))
    positions = np.concatenate([np.arange(length) for length in lengths])
    assert [positions[split.index(rank)].tolist() for rank in range(len(printed))] == printed


@given(LENGTHS, SIZES, st.integers(1, 5))
def test_padded_samples_lie_as_transformer_engine_expects(lengths: list[int], size: int, multiple: int) -> None:
    total = padded_tokens(lengths, size, 2 * size * multiple)
    split = partition(lengths, size, padded_to=total)
    assert sum(split.sample_lengths) == total
    for rank in range(size):
        assert split.index(rank).tolist() == transformer_engines_tokens(list(split.sample_lengths), size, rank)


@given(LENGTHS, SIZES, st.integers(1, 5))
def test_padding_stands_behind_each_sample_and_is_the_least(lengths: list[int], size: int, multiple: int) -> None:
    total = padded_tokens(lengths, size, 2 * size * multiple)
    assert total % (2 * size * multiple) == 0
    assert sum(length + 2 * size - 1 for length in lengths) + 2 * size * multiple > total
    split = partition(lengths, size, padded_to=total)
    streamed = np.full(total, -1)
    for rank in range(size):
        streamed[split.index(rank)] = split.tokens(rank)
    expected: list[int] = []
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        expected += [*range(start, start + length), *[sum(lengths)] * (-length % (2 * size))]
    assert streamed.tolist() == expected + [sum(lengths)] * (total - len(expected))


def test_streams_are_padded_to_what_exchange_sequence_parallelism_and_fp8_need() -> None:
    fp8 = PrecisionSettings(backend="transformer_engine", fp8="hybrid")
    plain = PrecisionSettings(backend="transformer_engine")
    layout = ParallelSettings(tensor=4, context=2, context_exchange="p2p")
    assert stream_multiple(layout, plain) == 8 and stream_multiple(layout, fp8) == 2 * 4 * 16
    assert stream_multiple(replace(layout, sequence=False), fp8) == 2 * 16
    assert stream_multiple(replace(layout, tensor=1), plain) == 4
    assert stream_multiple(replace(layout, context_exchange="ring"), fp8) is None


def test_without_padding_a_rank_holds_the_tokens_of_its_places() -> None:
    split = partition([8, 1, 3], 2)
    assert all(np.array_equal(split.tokens(rank), split.index(rank)) for rank in range(2))


def test_too_little_room_for_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="16 tokens, padded to a multiple of 4 in each sample, cannot become 12"):
        partition([5, 8], 2, padded_to=12)
    with pytest.raises(ValueError, match="larger multiple of 4"):
        partition([5, 8], 2, padded_to=18)


def test_the_same_split_is_the_same_object() -> None:
    assert partition([5, 3], 2) is partition((5, 3), 2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="7 tokens do not divide over 2 context-parallel ranks"):
        partition([3, 4], 2)
    with pytest.raises(ValueError, match="not 0"):
        partition([3, 4], 0)
    with pytest.raises(ValueError, match="not -1"):
        partition([3, -1], 2)
