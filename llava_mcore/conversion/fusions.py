"""How published tensors become one of ours, and back. Bits are moved, never computed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from llava_mcore.conversion.families import ConversionError
from llava_mcore.conversion.families import Tensor as Entry

Tensor = torch.Tensor


class Fusion(NamedTuple):
    """``join`` makes our tensor of the published parts, ``split`` the parts of our tensor."""

    join: Callable[[Sequence[Tensor], Entry], Tensor]
    split: Callable[[Tensor, Entry], list[Tensor]]


def _qkv_join(parts: Sequence[Tensor], entry: Entry) -> Tensor:
    """Rows [q...q k v] of one query group after another, as Megatron-Core's attention reads them."""
    pieces = parts if len(parts) == len(entry.pieces) else parts[0].split(entry.pieces)
    grouped = [piece.reshape(entry.groups, -1, *piece.shape[1:]) for piece in pieces]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _qkv_split(tensor: Tensor, entry: Entry) -> list[Tensor]:
    grouped = tensor.reshape(entry.groups, -1, *tensor.shape[1:])
    pieces = [part.flatten(0, 1) for part in grouped.split([rows // entry.groups for rows in entry.pieces], dim=1)]
    return pieces if len(pieces) == len(entry.part_shapes) else [torch.cat(pieces)]


def _vocab_join(parts: Sequence[Tensor], entry: Entry) -> Tensor:
    """Rows of zeros after the vocabulary, up to the padded size."""
    padded = parts[0].new_zeros(entry.shape)
    padded[: parts[0].shape[0]] = parts[0]
    return padded


FUSIONS: dict[str, Fusion] = {
    "same": Fusion(lambda parts, entry: parts[0], lambda tensor, entry: [tensor]),
    "flatten": Fusion(
        lambda parts, entry: parts[0].reshape(entry.shape), lambda tensor, entry: [tensor.reshape(entry.part_shapes[0])]
    ),
    "stack": Fusion(
        lambda parts, entry: torch.cat(list(parts)),
        lambda tensor, entry: list(tensor.split([shape[0] for shape in entry.part_shapes])),
    ),
    "experts": Fusion(
        lambda parts, entry: torch.cat(list(parts)).reshape(entry.shape),
        lambda tensor, entry: list(tensor.flatten(0, 1).split([shape[0] for shape in entry.part_shapes])),
    ),
    "vocab": Fusion(_vocab_join, lambda tensor, entry: [tensor[: entry.part_shapes[0][0]]]),
    "qkv": Fusion(_qkv_join, _qkv_split),
}


def join(parts: Sequence[Tensor], entry: Entry) -> Tensor:
    """Our tensor, contiguous, from the published parts.

    Raises:
        ConversionError: if the parts have several types.
    """
    if len({part.dtype for part in parts}) > 1:
        found = ", ".join(f"{name} ({part.dtype})" for name, part in zip(entry.names, parts, strict=True))
        raise ConversionError(f"{entry.ours}: its parts have different types: {found}; convert them to one with --dtype")
    return FUSIONS[entry.fusion].join(parts, entry).contiguous()


def split(tensor: Tensor, entry: Entry) -> list[Tensor]:
    """The published parts of our tensor, each contiguous."""
    return [part.contiguous() for part in FUSIONS[entry.fusion].split(tensor, entry)]
