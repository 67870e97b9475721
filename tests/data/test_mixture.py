from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mcore.data.mixture import ByEpochs, ByWeight, Interleaving, Scheduled

PARTS = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any)


def check_random_access(dealt: Interleaving, sources: int, length: int, place: int) -> np.ndarray:
    """Every source gets its numbers 0, 1, 2, ... in turn, wherever one begins to read; returns the sources."""
    which, numbers = dealt.at(np.arange(length))
    for source in range(sources):
        assert numbers[which == source].tolist() == list(range((which == source).sum()))
    assert dealt.before(place) == [int((which[:place] == source).sum()) for source in range(sources)]
    again = dealt.at(np.arange(place, length))
    assert again[0].tolist() == which[place:].tolist() and again[1].tolist() == numbers[place:].tolist()
    return which


@given(PARTS, st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_weights_hold_at_any_prefix(weights: list[int], where: float) -> None:
    length = 3 * sum(weights)
    which = check_random_access(ByWeight(weights), len(weights), length, int(where * length))
    counts = np.cumsum(which[:, None] == np.arange(len(weights)), axis=0)
    shares = np.array(weights) / sum(weights)
    assert np.abs(counts - np.arange(1, length + 1)[:, None] * shares).max() < 1


@given(PARTS, st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_epochs_are_exact(counts: list[int], where: float) -> None:
    cycle = sum(counts)
    which = check_random_access(ByEpochs(counts), len(counts), 3 * cycle, int(where * 3 * cycle))
    for begin in range(0, 3 * cycle, cycle):
        assert np.bincount(which[begin : begin + cycle], minlength=len(counts)).tolist() == counts
    seen = np.cumsum(which[:cycle, None] == np.arange(len(counts)), axis=0)
    assert np.abs(seen - np.arange(1, cycle + 1)[:, None] * np.array(counts) / cycle).max() < 1.5  # spread evenly


def test_decimal_weights_are_taken_as_written() -> None:
    which, _ = ByWeight([0.6, 0.12, 0.28]).at(np.arange(25 * 4000))
    assert np.bincount(which).tolist() == [60_000, 12_000, 28_000]


@given(
    st.lists(st.tuples(st.integers(1, 200), PARTS.filter(lambda parts: len(parts) >= 3)), min_size=1, max_size=4), st.floats(0, 1)
)
@settings(max_examples=80, deadline=None)
def test_a_schedule_goes_on_where_each_stood(parts: list[tuple[int, list[int]]], where: float) -> None:
    starts = np.concatenate([[0], np.cumsum([length for length, _ in parts])[:-1]]).tolist()
    weights = [(given + [0] * 8)[:8] for _, given in parts]
    dealt = Scheduled({start: ByWeight(given) for start, given in zip(starts, weights, strict=True)})
    length = starts[-1] + 300
    which = check_random_access(dealt, 8, length, int(where * length))
    for start, end, shares in zip(starts, [*starts[1:], length], weights, strict=True):
        assert which[start:end].tolist() == ByWeight(shares).at(np.arange(end - start))[0].tolist()


def test_what_is_refused() -> None:
    for wrong in ([], [0.0], [1, -1]):
        with pytest.raises(ValueError, match="must not be negative, nor all zero"):
            ByWeight(wrong)
        with pytest.raises(ValueError, match="must not be negative, nor all zero"):
            ByEpochs([int(part) for part in wrong])
    with pytest.raises(ValueError, match=r"repeat only after 407,809 samples.*epochs"):
        ByWeight([558129, 665298])
    with pytest.raises(ValueError, match="begins at 5"):
        Scheduled({5: ByWeight([1])})


def test_huge_positions() -> None:
    dealt = ByEpochs([10**8, 3 * 10**8, 7])
    which, numbers = dealt.at(np.array([0, 10**8, 4 * 10**8 + 6, 10**12]))
    assert (numbers >= 0).all() and set(which.tolist()) <= {0, 1, 2}
    assert dealt.before(400_000_007) == [10**8, 3 * 10**8, 7]
