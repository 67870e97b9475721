"""From the host to the device without either waiting for the other; on the CPU nothing is copied and nothing runs aside.

Not run on a GPU yet; ``bash tests/gpu/run.sh`` tests it there.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``, copied on the current stream.

    From memory that is not pinned, a copy of more than 64 KiB would have the host wait until the GPU has come that far.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class SideCopy:
    """A copy that runs on a stream of its own, beside what the device computes.

    Attributes:
        tensor: the copy, not to be read before :meth:`arrived`; on the CPU the tensor itself.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        if device.type != "cuda":
            self.tensor, self._done = tensor.to(device), None
            return
        stream = _side_stream(device)
        with torch.cuda.stream(stream):
            self.tensor = upload(tensor, device)
            self._done = stream.record_event()

    def arrived(self) -> Tensor:
        """The copy, for what is launched on the current stream from now on: that waits for it, the host does not."""
        if self._done is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self._done)
            self.tensor.record_stream(stream)  # its memory belongs to the side stream, which must not give it away meanwhile
        return self.tensor


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items, each made on a thread while the one before it is used: one stands ready at most.

    An error comes in the place of the item it belongs to. Closing waits for the item that is being made.
    """
    end = object()
    with closing(items), ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]  # not the end
