from __future__ import annotations

import itertools

import numpy as np
import pytest

from llava_mcore.data.order import sample_at


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 1000, 1024, 1025, 4999])
@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_every_epoch_is_a_permutation(num_samples: int, seed: int) -> None:
    epochs, indices = sample_at(np.arange(3 * num_samples), num_samples, seed, True)
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(num_samples)]
    for epoch in range(3):
        one = indices[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(one.tolist()) == list(range(num_samples))


def test_random_access_equals_reading_through() -> None:
    _, through = sample_at(np.arange(3000), 997, 7, True)
    assert [sample_at(position, 997, 7, True)[1] for position in range(0, 3000, 37)] == through[::37].tolist()
    scattered = np.random.default_rng(0).integers(0, 3000, 500)
    assert sample_at(scattered, 997, 7, True)[1].tolist() == through[scattered].tolist()


def test_scalars_are_ints() -> None:
    epoch, index = sample_at(12, 5, 0, True)
    assert type(epoch) is int and type(index) is int and epoch == 2


def test_without_shuffle() -> None:
    epochs, indices = sample_at(np.arange(12), 5, 3, False)
    assert indices.tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]
    assert epochs.tolist() == [0] * 5 + [1] * 5 + [2] * 2


def test_epochs_and_seeds_differ() -> None:
    orders = [sample_at(np.arange(100) + 100 * epoch, 100, seed, True)[1].tolist() for seed in range(5) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert list(range(100)) not in orders


def test_samples_land_everywhere_alike() -> None:
    """Where sample 0 stands, over many epochs: no place is favoured (chi-squared, 15 degrees of freedom)."""
    size, epochs = 16, 4000
    _, indices = sample_at(np.arange(size * epochs), size, 11, True)
    places = np.argwhere(indices.reshape(epochs, size) == 0)[:, 1]
    counts = np.bincount(places, minlength=size)
    chi = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert chi < 45  # the chance of more is 1 in 10,000


def test_small_permutations_all_occur() -> None:
    _, indices = sample_at(np.arange(4 * 3000), 4, 0, True)
    seen = {tuple(row) for row in indices.reshape(-1, 4).tolist()}
    assert seen == set(itertools.permutations(range(4)))


def test_neighbours_are_torn_apart() -> None:
    _, indices = sample_at(np.arange(10_000), 10_000, 5, True)
    steps = np.diff(indices)
    assert (np.abs(steps) <= 1).mean() < 0.002
    assert abs(np.corrcoef(np.arange(10_000), indices)[0, 1]) < 0.05


def test_huge_orders_cost_nothing() -> None:
    positions = np.array([0, 10**8, 10**12])
    epochs, indices = sample_at(positions, 10**8, 0, True)
    assert epochs.tolist() == [0, 1, 10**4] and (indices < 10**8).all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="negative"):
        sample_at(-1, 5, 0, True)
    with pytest.raises(ValueError, match="no samples"):
        sample_at(0, 0, 0, True)
