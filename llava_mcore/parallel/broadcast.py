"""One rank of a model replica reads the data; the others get what they need from it.

So a picture is decoded once a replica, and an error in the data stops every rank with the same message instead of leaving the
others waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llava_mcore.parallel.groups import Groups
from llava_mcore.platform.copies import SideCopy, ahead

T = TypeVar("T")


def from_first(value: T | None, group: dist.ProcessGroup | None) -> T:
    """A picklable value of the group's first rank, on all of its ranks."""
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]  # type: ignore[return-value]


def share_steps(steps: Iterator[Any] | None, groups: Groups, device: torch.device) -> Generator[Any, None, None]:
    """Iterates over the steps that the replica's first rank reads, on all of its ranks.

    Pixels go to the first pipeline stage only; elsewhere ``pixel_values_NCHW`` is an empty tensor. To a GPU the next step's are
    copied while a step is computed.

    Args:
        steps: the loader's iterator on the first rank of the replica, None elsewhere.
        groups: process groups.
        device: where pixels are received.

    Raises:
        whatever the loader of any replica raised, on every rank.
    """
    reading = None if steps is None else _copied(steps, device)
    if reading is not None and device.type == "cuda":
        reading = ahead(reading)
    while True:
        kind, step, pixels = _next(reading) if reading is not None else ("", None, [])
        if reading is not None:
            kind, step = _with_first_error(kind, step, groups.dp)
        payload: Any
        kind, payload, shapes = from_first((kind, step, [copy.tensor.shape for copy in pixels]), groups.replica)
        if kind == "end":
            return
        if kind == "error":
            raise payload
        if groups.is_first_stage:
            for number, (batch, shape) in enumerate(zip(payload.batches, shapes, strict=True)):
                here = pixels[number].arrived() if reading is not None else torch.empty(shape, device=device)
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


def _copied(steps: Iterator[Any], device: torch.device) -> Generator[tuple[Any, list[SideCopy]], None, None]:
    """The steps without their pixels, and the pixels (float32) of each of their batches, on their way to the device."""
    for step in steps:
        pixels = [SideCopy(batch.pixel_values_NCHW, device) for batch in step.batches]
        for batch in step.batches:
            batch.pixel_values_NCHW = batch.pixel_values_NCHW[:0]
        yield step, pixels


def _next(reading: Iterator[tuple[Any, list[SideCopy]]]) -> tuple[str, Any, list[SideCopy]]:
    """What comes next: a step and its pixels, the end, or an error in its place."""
    try:
        return "step", *next(reading)
    except StopIteration:
        return "end", None, []
    except Exception as error:
        return "error", error, []
