"""One rank of a model replica reads the data; the others get what they need from it.

So a picture is decoded once a replica, and an error in the data stops every rank with the same message instead of leaving the
others waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llava_mcore.parallel.groups import Groups

T = TypeVar("T")


def from_first(value: T | None, group: dist.ProcessGroup | None) -> T:
    """A picklable value of the group's first rank, on all of its ranks."""
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]  # type: ignore[return-value]


def share_steps(steps: Iterator[Any] | None, groups: Groups, device: torch.device) -> Generator[Any, None, None]:
    """Iterates over the steps that the replica's first rank reads, on all of its ranks.

    Pixels go to the first pipeline stage only; elsewhere ``pixel_values_NCHW`` is an empty tensor.

    Args:
        steps: the loader's iterator on the first rank of the replica, None elsewhere.
        groups: process groups.
        device: where pixels are received.

    Raises:
        whatever the loader of any replica raised, on every rank.
    """
    while True:
        kind, step, pixels = _next(steps) if steps is not None else ("", None, [])
        if steps is not None:
            kind, step = _with_first_error(kind, step, groups.dp)
        payload: Any
        kind, payload, shapes = from_first((kind, step, [tensor.shape for tensor in pixels]), groups.replica)
        if kind == "end":
            return
        if kind == "error":
            raise payload
        if groups.is_first_stage:
            for number, (batch, shape) in enumerate(zip(payload.batches, shapes, strict=True)):
                here = pixels[number].to(device) if steps is not None else torch.empty(shape, device=device)
                if groups.encoders.size() > 1:
                    dist.broadcast(here, group=groups.encoders, group_src=0)
                batch.pixel_values_NCHW = here
        yield payload


def _with_first_error(kind: str, payload: Any, readers: dist.ProcessGroup) -> tuple[str, Any]:
    """What one reader has got, or the error that another has met: each replica reads other pictures, and all must stop."""
    if readers.size() == 1:
        return kind, payload
    errors: list[Exception | None] = [None] * readers.size()
    dist.all_gather_object(errors, payload if kind == "error" else None, group=readers)
    error = next((error for error in errors if error is not None), None)
    return (kind, payload) if error is None else ("error", error)


def _next(steps: Iterator[Any]) -> tuple[str, Any, list[Tensor]]:
    """The next step without its pixels, and the pixels (float32) of each of its batches."""
    try:
        step = next(steps)
    except StopIteration:
        return "end", None, []
    except Exception as error:
        return "error", error, []
    pixels = [batch.pixel_values_NCHW for batch in step.batches]
    for batch in step.batches:
        batch.pixel_values_NCHW = batch.pixel_values_NCHW[:0]
    return "step", step, pixels
