"""Copies to the device: nothing on the CPU; and steps made one ahead, as they are on a GPU (whose copies tests/gpu covers)."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest
import torch

from llava_mcore.platform.copies import SideCopy, ahead, upload

CPU = torch.device("cpu")


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3)
    assert upload(tensor, CPU) is tensor
    assert SideCopy(tensor, CPU).arrived() is tensor


class Source:
    """Five items, the one after ``failing`` an error; knows how many were begun, on which threads, and whether it was closed."""

    def __init__(self, failing: int | None = None) -> None:
        self.failing = failing
        self.begun = threading.Semaphore(0)
        self.threads: set[str] = set()
        self.closed = False

    def items(self) -> Generator[int, None, None]:
        try:
            for number in range(5):
                self.begun.release()
                self.threads.add(threading.current_thread().name)
                if number == self.failing:
                    raise OSError(f"item {number} is lost")
                yield number
        finally:
            self.closed = True


def test_all_in_order_and_the_end() -> None:
    source = Source()
    assert list(ahead(source.items())) == [0, 1, 2, 3, 4]
    assert source.closed and threading.current_thread().name not in source.threads


def test_the_next_is_made_while_one_is_used_and_no_further() -> None:
    source = Source()
    for number in ahead(source.items()):
        assert source.begun.acquire(timeout=10)  # this one
        if number == 1:
            assert source.begun.acquire(timeout=10)  # the next: nobody has asked for it yet
            assert not source.begun.acquire(timeout=0.2)  # but not the one after it
            break


def test_an_error_comes_in_its_place() -> None:
    source, found = Source(failing=2), []
    with pytest.raises(OSError, match="item 2 is lost"):
        for number in ahead(source.items()):
            found.append(number)
    assert found == [0, 1] and source.closed


def test_closing_early_ends_the_thread() -> None:
    source = Source()
    items = ahead(source.items())
    assert next(items) == 0
    items.close()
    assert source.closed
    assert not [thread for thread in threading.enumerate() if thread.name in source.threads]
