"""Proof that nothing was lost and nothing came twice: an order-free digest of the samples of every epoch.

Each rank adds up what it really trained on; the sum over all ranks, whatever their number was on the way, must be that of the
dataset. A sample that failed, or that the plan left out, is accounted for too: it was somebody's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_mcore.data.order import Order, key, splitmix64

_MASK = 0xFFFFFFFFFFFFFFFF
Epoch = tuple[int, int]  # number of the dataset, and of its epoch


class Account:
    """For every epoch that is not over: how many samples, and the sum (modulo 2**64) and xor of their hashes."""

    def __init__(self, state: dict[str, list[int]] | None = None) -> None:
        self._sums: dict[Epoch, tuple[int, int, int]] = {}
        for name, (count, total, xor) in (state or {}).items():
            source, epoch = name.split(":")
            self._sums[int(source), int(epoch)] = (count, total, xor)

    def add(self, source: int, epoch: int, indices: Sequence[int] | np.ndarray) -> None:
        """Counts samples of one epoch."""
        hashes = _hashes(source, epoch, np.asarray(indices, dtype=np.int64))
        if len(hashes):
            self._put((source, epoch), len(hashes), int(hashes.sum(dtype=np.uint64)), int(np.bitwise_xor.reduce(hashes)))

    def merge(self, other: Account) -> None:
        """Adds what another rank, or an earlier step, counted."""
        for epoch, sums in other._sums.items():
            self._put(epoch, *sums)

    def state_dict(self) -> dict[str, list[int]]:
        """What ``Account`` is made of again; fit for JSON."""
        return {f"{source}:{epoch}": list(sums) for (source, epoch), sums in sorted(self._sums.items())}

    def close(self, source: int, epoch: int, order: Order) -> str | None:
        """Compares an epoch that is over with the dataset and forgets it; returns what is wrong, if anything is."""
        counted = self._sums.pop((source, epoch), (0, 0, 0))
        expected = Account()
        for indices in order.members():
            expected.add(source, epoch, indices)
        if counted == expected._sums[source, epoch]:
            return None
        return f"{counted[0]:,} samples were seen where the dataset has {order.size:,}" + (
            ", and they are not the same" if counted[0] == order.size else ""
        )

    def _put(self, epoch: Epoch, count: int, total: int, xor: int) -> None:
        before = self._sums.get(epoch, (0, 0, 0))
        self._sums[epoch] = (before[0] + count, (before[1] + total) & _MASK, before[2] ^ xor)


def _hashes(source: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    return splitmix64(splitmix64(indices.astype(np.uint64) + key(source, epoch)))
