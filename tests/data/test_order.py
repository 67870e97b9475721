from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mcore.data.order import Order, Strategy

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
STRATEGIES = st.one_of(
    st.just("all"),
    st.builds("{}:{}".format, st.sampled_from(["first", "end", "random"]), st.integers(1, 200)),
    st.builds("{}:{}%".format, st.sampled_from(["first", "end", "random"]), st.integers(1, 100)),
)


@given(SHARDS, st.integers(0, 2**64 - 1), st.booleans(), st.integers(1, 5), STRATEGIES)
@settings(max_examples=200, deadline=None)
def test_every_epoch_holds_every_member_once(sizes: list[int], seed: int, shuffle: bool, window: int, strategy: str) -> None:
    order = Order(sizes, seed, shuffle, window, strategy)
    members = sorted(np.concatenate(list(order.members())).tolist())
    assert len(members) == order.size == Strategy.parse(strategy).count(sum(sizes)) == len(set(members))
    epochs, indices = order.at(np.arange(3 * order.size))
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(order.size)]
    for epoch in range(3):
        assert sorted(indices[epoch * order.size : (epoch + 1) * order.size].tolist()) == members


@given(SHARDS, st.integers(0, 1000), STRATEGIES, st.data())
@settings(max_examples=100, deadline=None)
def test_random_access_equals_reading_through(sizes: list[int], seed: int, strategy: str, data: st.DataObject) -> None:
    order = Order(sizes, seed, True, 3, strategy)
    _, through = order.at(np.arange(3 * order.size))
    scattered = np.array(data.draw(st.lists(st.integers(0, 3 * order.size - 1), max_size=30)), dtype=np.int64)
    assert Order(sizes, seed, True, 3, strategy).at(scattered)[1].tolist() == through[scattered].tolist()


def test_without_shuffle() -> None:
    epochs, indices = Order([2, 0, 3], 3, shuffle=False).at(np.arange(12))
    assert indices.tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]
    assert epochs.tolist() == [0] * 5 + [1] * 5 + [2] * 2


@pytest.mark.parametrize(
    ("strategy", "members"),
    [
        ("all", range(10)),
        ("first:3", range(3)),
        ("end:3", range(7, 10)),
        ("first:25%", range(3)),  # LLaVA-NeXT rounds up
        ("end:100%", range(10)),
        ("first:99", range(10)),
    ],
)
def test_strategies(strategy: str, members: range) -> None:
    order = Order([4, 6], 0, strategy=strategy)
    assert np.concatenate(list(order.members())).tolist() == list(members)


def test_a_random_choice_is_fixed_and_spread_over_the_shards() -> None:
    chosen = np.concatenate(list(Order([100] * 10, 5, strategy="random:25%").members()))
    assert np.bincount(chosen // 100).tolist() == [25] * 10
    assert chosen.tolist() == np.concatenate(list(Order([100] * 10, 5, strategy="random:25%").members())).tolist()
    assert chosen.tolist() != np.concatenate(list(Order([100] * 10, 6, strategy="random:25%").members())).tolist()


@pytest.mark.parametrize("strategy", ["", "some", "first", "first:-1", "random:2.5", "end:101%", "first:x", "all:3"])
def test_no_strategy(strategy: str) -> None:
    with pytest.raises(ValueError, match="no sampling strategy"):
        Order([10], 0, strategy=strategy)


def test_epochs_and_seeds_differ() -> None:
    orders = [Order([100], seed).at(np.arange(100) + 100 * epoch)[1].tolist() for seed in range(5) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert list(range(100)) not in orders


def test_samples_land_everywhere_alike() -> None:
    """Where sample 0 stands, over many epochs: no place is favoured (chi-squared, 15 degrees of freedom)."""
    size, epochs = 16, 4000
    _, indices = Order([size], 11).at(np.arange(size * epochs))
    places = np.argwhere(indices.reshape(epochs, size) == 0)[:, 1]
    counts = np.bincount(places, minlength=size)
    chi = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert chi < 45  # the chance of more is 1 in 10,000


def test_small_permutations_all_occur() -> None:
    _, indices = Order([4], 0).at(np.arange(4 * 3000))
    assert {tuple(row) for row in indices.reshape(-1, 4).tolist()} == set(itertools.permutations(range(4)))


def test_neighbours_are_torn_apart() -> None:
    _, indices = Order([1000] * 10, 5).at(np.arange(10_000))
    assert (np.abs(np.diff(indices)) <= 1).mean() < 0.002
    assert abs(np.corrcoef(np.arange(10_000), indices)[0, 1]) < 0.05


def test_only_a_window_of_shards_is_read_at_a_time() -> None:
    _, indices = Order([100] * 64, 1, window_shards=4).at(np.arange(6400))
    shards = (indices // 100).reshape(16, 400)
    assert all(len(set(window)) == 4 for window in shards.tolist())
    assert all(len(set(window[:100])) == 4 for window in shards.tolist()), "samples of a window are not mixed"


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="negative"):
        Order([5], 0).at(np.array([-1]))
    for sizes, strategy in (([], "all"), ([0, 0], "all"), ([5], "first:0")):
        with pytest.raises(ValueError, match="no samples"):
            Order(sizes, 0, strategy=strategy)
