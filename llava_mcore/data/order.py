"""The order of samples, as a function of seed and position alone.

A keyed Feistel network permutes the samples of every epoch anew: any position can be asked for by itself, in no time and with no
memory, so a run resumes anywhere without replaying anything.
"""

from __future__ import annotations

from typing import overload

import numpy as np

ROUNDS = 8


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of the input moves every bit of the output."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _encipher(value: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """One pass over a domain of 2**bits: halves (as even as they get) take turns at being xor-ed with a hash of the other."""
    low_bits = (bits + 1) // 2
    low_mask, high_mask = _mask(low_bits), _mask(bits - low_bits)
    low, high = value & low_mask, value >> np.uint64(low_bits)
    for number in range(ROUNDS):
        key = _mix(keys + np.uint64((number + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF))
        if number % 2:
            high ^= _mix(low + key) & high_mask
        else:
            low ^= _mix(high + key) & low_mask
    return (high << np.uint64(low_bits)) | low


def _permute(place: np.ndarray, num_samples: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0..num_samples-1 sends each place. Values outside walk on along their cycle until inside."""
    bits = (num_samples - 1).bit_length()
    value = _encipher(place, keys, bits)
    outside = np.flatnonzero(value >= num_samples)
    while len(outside):
        value[outside] = _encipher(value[outside], keys[outside], bits)
        outside = outside[value[outside] >= num_samples]
    return value


@overload
def sample_at(position: int, num_samples: int, seed: int, shuffle: bool) -> tuple[int, int]: ...
@overload
def sample_at(position: np.ndarray, num_samples: int, seed: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]: ...
def sample_at(position, num_samples, seed, shuffle):  # type: ignore[no-untyped-def]
    """Which sample stands at a position of the endless order.

    Args:
        position: one position or an array of them, from 0.
        num_samples: samples in the dataset.
        seed: another seed, another order.
        shuffle: a new permutation every epoch; otherwise every epoch runs 0, 1, 2, ...

    Returns:
        Epoch and index of the sample, as ints or int64 arrays like ``position``.
    """
    if num_samples < 1:
        raise ValueError("there is no order of no samples")
    places = np.atleast_1d(np.asarray(position, dtype=np.int64))
    if places.size and places.min() < 0:
        raise ValueError(f"position {places.min()} is negative")
    epoch, index = np.divmod(places, num_samples)
    if shuffle:
        keys = _mix(_mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)) + epoch.astype(np.uint64))
        index = _permute(index.astype(np.uint64), num_samples, keys).astype(np.int64)
    if np.ndim(position) == 0:
        return int(epoch[0]), int(index[0])
    return epoch, index
