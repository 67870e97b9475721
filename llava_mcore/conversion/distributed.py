"""Distributed checkpoints (``torch_dist``) read and written tensor by tensor, by one process or several, without a process group.

The format is that of torch.distributed.checkpoint (torch/distributed/checkpoint/filesystem.py) as Megatron-Core uses it: each
``.distcp`` file is one ``torch.save`` after another, ``.metadata`` says which tensor's part lies where, ``common.pt`` holds what
is not sharded, and ``metadata.json``, written last, says that all is there.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from llava_mcore.conversion.families import OUR_PREFIXES, ConversionError
from llava_mcore.conversion.torch_files import Archive, Stored, read_metadata
from llava_mcore.conversion.weights import Info

METADATA = ".metadata"
COMPLETE = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
# False: both halves of a gated MLP lie under one key, as the trainer's model has them.
COMMON = {"content_metadata": {"singleton_local_shards": False}}


class Written(NamedTuple):
    """Where one tensor was written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    length: int


def write_part(folder: Path, number: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[Written]:
    """Writes one ``.distcp`` file, tensor by tensor as they come.

    Args:
        folder: weights/.
        number: of the file; each process has its own.
        tensors: key and whole tensor.
    """
    name = f"__{number}_0.distcp"
    written = []
    with (folder / name).open("wb") as out:
        for key, tensor in tensors:
            if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
                tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save writes whole storages
            offset = out.tell()
            torch.save(tensor, out)
            written.append(Written(key, tuple(tensor.shape), tensor.dtype, name, offset, out.tell() - offset))
    return written


def finish(folder: Path, written: Iterable[Written]) -> None:
    """Writes what makes the parts a checkpoint that loads under any layout; ``metadata.json`` comes last."""
    tensors: dict[str, STORAGE_TYPES] = {}
    places = {}
    for part in sorted(written):
        start = torch.Size([0] * len(part.shape))
        chunk = ChunkStorageMetadata(offsets=start, sizes=torch.Size(part.shape))
        tensors[part.key] = TensorStorageMetadata(TensorProperties(dtype=part.dtype), torch.Size(part.shape), [chunk])
        places[MetadataIndex(part.key, start)] = _StorageInfo(part.file, part.offset, part.length)
    metadata = Metadata(state_dict_metadata=tensors, storage_data=places, version=CURRENT_DCP_VERSION)
    with (folder / METADATA).open("wb") as out:
        pickle.dump(metadata, out)
    torch.save(COMMON, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(COMPLETE), encoding="utf-8")


class DistributedReader:
    """The model's tensors of a distributed checkpoint, saved from any layout. Those of the optimizer are neither listed nor read.

    Args:
        folder: weights/.

    Raises:
        ConversionError: naming the file that is missing, cut short or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._descriptors: dict[str, int] = {}
        stored = read_metadata(self.path / METADATA)
        self._places: dict[tuple[str, torch.Size], _StorageInfo] = {
            (index.fqn, index.offset): place for index, place in (stored.storage_data or {}).items() if index.offset is not None
        }
        self._chunks: dict[str, Sequence[ChunkStorageMetadata]] = {}
        self.infos: dict[str, Info] = {}
        for key, tensor in stored.state_dict_metadata.items():
            if isinstance(tensor, TensorStorageMetadata) and key.startswith(OUR_PREFIXES):
                self.infos[key] = Info(tuple(tensor.size), tensor.properties.dtype, str(folder))
                self._chunks[key] = tensor.chunks
        self._require_files()

    def _require_files(self) -> None:
        ends: dict[str, tuple[int, str]] = {}
        for key in self.infos:
            covered = sum(math.prod(chunk.sizes) for chunk in self._chunks[key])
            if covered != math.prod(self.infos[key].shape):
                raise ConversionError(f"{self.path / METADATA}: the parts of {key} do not add up to its shape")
            for chunk in self._chunks[key]:
                place = self._places.get((key, chunk.offsets))
                if place is None:
                    raise ConversionError(f"{self.path / METADATA}: does not say where {key} lies")
                if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
                    raise ConversionError(
                        f"{self.path / METADATA}: {key} lies in {place.relative_path!r}, which is not read here"
                    )
                ends[place.relative_path] = max(ends.get(place.relative_path, (0, "")), (place.offset + place.length, key))
        for name, (end, key) in ends.items():
            file = self.path / name
            if not file.is_file():
                raise ConversionError(f"{file}: missing; {key} lies in it. Copy the checkpoint again")
            if file.stat().st_size < end:
                raise ConversionError(
                    f"{file}: cut short: {key} should end at byte {end:,}, the file at {file.stat().st_size:,}; copy it again"
                )

    def _archive(self, key: str, chunk: ChunkStorageMetadata) -> tuple[Archive, Stored]:
        place = self._places[key, chunk.offsets]
        if place.relative_path not in self._descriptors:
            self._descriptors[place.relative_path] = os.open(self.path / place.relative_path, os.O_RDONLY)
        archive = Archive(self._descriptors[place.relative_path], place.offset, place.length)
        if not isinstance(archive.content, Stored):
            raise ConversionError("not one tensor")
        return archive, archive.content

    def read(self, key: str) -> torch.Tensor:
        """One whole tensor, in memory of its own; the bytes of each part are compared with their checksum.

        Raises:
            ConversionError: naming the file and the tensor.
        """
        info = self.infos[key]
        whole = None
        for chunk in self._chunks[key]:
            try:
                archive, stored = self._archive(key, chunk)
                part = archive.read(stored)
                if part.dtype != info.dtype or part.numel() != math.prod(chunk.sizes):
                    raise ConversionError(f"{part.dtype} {list(part.shape)} instead of {info.dtype} {list(chunk.sizes)}")
            except ConversionError as error:
                raise ConversionError(f"{self.path / self._places[key, chunk.offsets].relative_path}: {key}: {error}") from None
            if len(self._chunks[key]) == 1:
                return part.reshape(info.shape).contiguous()
            whole = torch.empty(info.shape, dtype=info.dtype) if whole is None else whole
            window = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[window] = part.reshape(tuple(chunk.sizes))
        assert whole is not None
        return whole

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
