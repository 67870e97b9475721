"""Published weights on disk, read when asked for and written as they come: safetensors and bin files, alone or with an index."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llava_mcore.conversion.families import ConversionError
from llava_mcore.conversion.torch_files import BinReader, read_exactly, require_index

SINGLE = "model.safetensors"
SHARD = "model-{number:05d}-of-{count:05d}.safetensors"
INDEX = f"{SINGLE}.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # "5GB" as Hugging Face counts
# What a folder of weights is known by, the first that is there: a file, or an index of several.
WHOLE_FILES = (SINGLE, "pytorch_model.bin", "mm_projector.bin", "adapter_model.bin")
INDEXES = (INDEX, "pytorch_model.bin.index.json")

# safetensors' names of types, the widest first: the format keeps tensors aligned by writing wide types first.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Info:
    """What is known of a tensor before it is read, and the file it lies in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class Reader(Protocol):
    """Tensors by name."""

    infos: dict[str, Info]

    def read(self, name: str) -> torch.Tensor:
        """One of them, in memory of its own."""

    def close(self) -> None:
        """Closes the files."""


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor as ``dtype``; integers and None leave it as it is."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def content(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, for files and checksums; a view of a contiguous tensor."""
    return memoryview(raw(tensor).numpy().data)


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of the tensor's bytes, as zlib has it."""
    return zlib.crc32(content(tensor))


class SafetensorsReader:
    """Tensors of safetensors files. Nothing but the headers is read until asked for.

    The format: eight bytes with the length of a JSON header, the header, the tensors one after another
    (https://github.com/huggingface/safetensors, "Format"). It has no checksums: a flipped bit in a tensor cannot be seen.

    Args:
        files: the files, each with the names the index promises in it (None: no index).

    Raises:
        ConversionError: naming the file that is cut short, damaged or does not match the index.
    """

    def __init__(self, files: Mapping[Path, set[str] | None]) -> None:
        self._places: dict[str, tuple[int, int]] = {}  # descriptor, offset
        self._descriptors: list[int] = []
        self.infos: dict[str, Info] = {}
        try:
            for file, expected in files.items():
                self._open(file, expected)
        except BaseException:
            self.close()
            raise

    def _open(self, file: Path, expected: set[str] | None) -> None:
        descriptor = os.open(file, os.O_RDONLY)
        self._descriptors.append(descriptor)
        found = {}
        try:
            for name, info, offset in _parse_header(file, descriptor):
                found[name] = info
                self._places[name] = (descriptor, offset)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(f"{file}: cut short or damaged ({error}); fetch it again") from None
        require_index(file, set(found), expected)
        self.infos |= found

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        info, (descriptor, offset) = self.infos[name], self._places[name]
        try:
            return read_exactly(descriptor, offset, info.nbytes).view(info.dtype).reshape(info.shape)
        except EOFError as error:
            raise ConversionError(f"{info.file}: cut short while it was read, at {name} ({error})") from None

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def _parse_header(file: Path, descriptor: int) -> Iterator[tuple[str, Info, int]]:
    """Every tensor's name, info and offset in the file; together they fill it to the last byte."""
    size = os.fstat(descriptor).st_size
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
    if length > size - 8:
        raise ValueError(f"its header should have {length} bytes, the file has {size}")
    header = json.loads(os.pread(descriptor, length, 8), object_pairs_hook=lambda pairs: _unique(file, pairs))
    header.pop("__metadata__", None)
    end = 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if about["dtype"] not in DTYPES:
            raise ConversionError(f"{file}: {name} has type {about['dtype']}; known are {', '.join(DTYPES)}")
        info = Info(tuple(about["shape"]), DTYPES[about["dtype"]], str(file))
        start, stop = about["data_offsets"]
        if start != end or stop - start != info.nbytes:
            raise ValueError(f"{name} lies from {start} to {stop}, which does not fit its shape or its neighbours")
        yield name, info, 8 + length + start
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"its tensors end at byte {8 + length + end}, the file at {size}")


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConversionError(f"{file}: two tensors for one name: {twice}")
    return dict(pairs)


class TorchReader:
    """Tensors of ``torch.save`` files; the arguments are those of :class:`SafetensorsReader`."""

    def __init__(self, files: Mapping[Path, set[str] | None]) -> None:
        self._bins = BinReader(files)
        self.infos = {name: Info(s.shape, s.dtype, str(file)) for name, (file, s) in self._bins.stored.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, its bytes compared with the checksum in the file."""
        return self._bins.read(name).contiguous()

    def close(self) -> None:
        """Closes the files."""
        self._bins.close()


def open_weights(path: Path) -> Reader:
    """The weights of a folder, or of one file.

    Args:
        path: a ``.safetensors`` or ``.bin`` file, or a folder that holds one of ``WHOLE_FILES`` or ``INDEXES``.

    Raises:
        ConversionError: naming the file that is missing, damaged or does not match the index.
    """
    files: dict[Path, set[str] | None]
    if path.is_file():
        files = {path: None}
    else:
        whole = [path / name for name in WHOLE_FILES if (path / name).is_file()]
        index = [path / name for name in INDEXES if (path / name).is_file()]
        if not whole and not index:
            raise ConversionError(f"{path}: holds no weights: none of {', '.join((*WHOLE_FILES, *INDEXES))} is there")
        # safetensors first, as transformers does where both are there
        safe = [file for file in (*whole, *index) if SINGLE in file.name]
        chosen = (safe or [*whole, *index])[0]
        files = _promised(chosen) if chosen in index else {chosen: None}
    kinds = {file.suffix for file in files}
    if kinds == {".safetensors"}:
        return SafetensorsReader(files)
    if kinds <= {".bin", ".pt", ".pth"}:
        return TorchReader(files)
    raise ConversionError(f"{path}: files of type {', '.join(sorted(kinds))}; known are .safetensors and .bin")


def _promised(index: Path) -> dict[Path, set[str] | None]:
    """The files an index names, with the names it promises in each."""
    layout: dict[Path, set[str] | None] = {}
    try:
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if Path(file).name != file:
                raise ConversionError(f"{index}: {name} lies in {file!r}, which is not a file name beside the index")
            names = layout.setdefault(index.parent / file, set())
            assert names is not None
            names.add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{index}: not an index of weights ({type(error).__name__}: {error})") from None
    missing = sorted(file.name for file in layout if not file.is_file())
    if missing:
        raise ConversionError(f"{index}: names files that are not there: {', '.join(missing)}; fetch them again")
    return layout


def shard_plan(infos: Mapping[str, Info], max_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names, in order, each file at most ``max_bytes`` unless one tensor alone is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {SHARD.format(number=i + 1, count=len(shards)): names for i, names in enumerate(shards)}


def lay_out(folder: Path, infos: Mapping[str, Info], shards: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, int]]:
    """Creates safetensors files with their headers and room for their tensors, and the index of several as transformers has it.

    Args:
        folder: where the files go.
        infos: shape and type of every tensor.
        shards: file name -> tensor names.

    Returns:
        for every tensor the name of its file and its offset in it.
    """
    places = {}
    for file, names in shards.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in sorted(names, key=lambda name: -infos[name].dtype.itemsize):
            info, offsets[name] = infos[name], end
            end += info.nbytes
            header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offsets[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            start = out.tell()
            out.truncate(start + end)
        places.update({name: (file, start + offset) for name, offset in offsets.items()})
    if len(shards) > 1:
        total = sum(info.nbytes for info in infos.values())
        count = sum(math.prod(info.shape) for info in infos.values())
        index = {
            "metadata": {"total_parameters": count, "total_size": total},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return places


def put(folder: Path, places: Mapping[str, tuple[str, int]], tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Writes tensors to the places of :func:`lay_out`, as they come; several processes may, each some of them.

    Returns:
        the CRC-32 of each.
    """
    sums = {}
    descriptors: dict[str, int] = {}
    with ExitStack() as stack:
        for name, tensor in tensors:
            file, offset = places[name]
            if file not in descriptors:
                descriptors[file] = os.open(folder / file, os.O_WRONLY)
                stack.callback(os.close, descriptors[file])
            left = content(tensor)
            sums[name] = zlib.crc32(left)
            while left:
                written = os.pwrite(descriptors[file], left, offset)
                left, offset = left[written:], offset + written
    return sums
