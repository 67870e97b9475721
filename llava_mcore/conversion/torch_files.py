"""Files of ``torch.save`` and the metadata of distributed checkpoints, read without running what a pickle says.

A pickle can call any function it names. Here the names are looked up in a short table, so a file that names anything else is
refused. Tensors are not read with the pickle but later, one at a time, each from its place in the file.

The format: a zip archive whose records are stored uncompressed; ``data.pkl`` holds the structure and ``data/<key>`` the bytes of
each storage (torch/serialization.py). Every record has a CRC-32, which torch writes but does not compare; here it is compared.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from llava_mcore.conversion.families import ConversionError

LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip record: what matters are the lengths of its name and of its extra field
# storages' classes by name; their dtype is all that is wanted of them
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Stored(NamedTuple):
    """A tensor that has not been read: the key of its storage, and how it lies in it (in elements)."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: tuple[str, torch.dtype], offset: int, shape: Any, stride: Any, *_: Any) -> Stored:
    return Stored(*storage, offset, tuple(shape), tuple(stride))


_TENSORS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}
_METADATA: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: torch.strided,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    **{
        (found.__module__, found.__name__): found
        for found in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.TensorStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
            planner.SavePlan,
            planner.WriteItem,
            planner.WriteItemType,
            planner.TensorWriteData,
            planner.BytesIOWriteData,
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.IOBase, known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)  # type: ignore[arg-type]
        self.known = known

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise ConversionError(f"it calls for {module}.{name}, which no file of weights needs; it was not run")
        return self.known[module, name]

    def persistent_load(self, about: Any) -> tuple[str, torch.dtype]:
        kind, dtype, key = about[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ConversionError(f"it holds a storage of an unknown type ({dtype})")
        return key, dtype


def read_metadata(file: Path) -> metadata.Metadata:
    """``.metadata`` of a distributed checkpoint.

    Raises:
        ConversionError: the file is missing, damaged or names what it should not.
    """
    try:
        with file.open("rb") as opened:
            found = _Unpickler(opened, _METADATA).load()
    except ConversionError as error:
        raise ConversionError(f"{file}: {error}") from None
    except Exception as error:  # a damaged pickle raises anything
        raise ConversionError(f"{file}: not readable ({type(error).__name__}: {error}); copy the checkpoint again") from None
    if not isinstance(found, metadata.Metadata):
        raise ConversionError(f"{file}: not the metadata of a distributed checkpoint but {type(found).__name__}")
    return found


class _Window(io.RawIOBase):
    """A part of a file as a file, for ``zipfile``."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self.descriptor, self.start, self.length, self.at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.at)
        found = os.pread(self.descriptor, left if size < 0 else min(size, left), self.start + self.at)
        self.at += len(found)
        return found


def read_exactly(descriptor: int, start: int, length: int) -> torch.Tensor:
    """``length`` bytes of a file as a tensor [length] of uint8, in memory of its own.

    Mapping the file instead would count all that was ever read as resident memory.

    Raises:
        EOFError: the file is shorter.
    """
    found = torch.empty(length, dtype=torch.uint8)
    view = memoryview(found.numpy().data)
    done = 0
    while done < length:
        count = os.preadv(descriptor, [view[done:]], start + done)
        if not count:
            raise EOFError(f"{length - done} bytes are missing at its end")
        done += count
    return found


class Archive:
    """One ``torch.save``, alone in a file or one of many in it.

    Args:
        descriptor: of the open file; it stays the caller's.
        start: where in the file it begins, in bytes.
        length: its length in bytes.

    Raises:
        ConversionError: without the file's name, which the caller knows.
    """

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self.descriptor, self.start = descriptor, start
        try:
            archive = zipfile.ZipFile(_Window(descriptor, start, length))  # type: ignore[arg-type]
        except zipfile.BadZipFile:
            raise ConversionError(
                "cut short, damaged or of torch before 1.6 (no zip archive); fetch it again or save it with a newer torch"
            ) from None
        self.records = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
        try:
            with archive.open(self.records["data.pkl"]) as pickled:
                self.content: Any = _Unpickler(io.BytesIO(pickled.read()), _TENSORS).load()
        except ConversionError:
            raise
        except Exception as error:  # a damaged pickle raises anything
            raise ConversionError(f"damaged ({type(error).__name__}: {error}); fetch it again") from None

    def read(self, stored: Stored) -> torch.Tensor:
        """One tensor, its storage compared with its checksum.

        Raises:
            ConversionError: the bytes are not those that were written.
        """
        try:
            record = self.records[f"data/{stored.key}"]
            header = LOCAL_HEADER.unpack(os.pread(self.descriptor, LOCAL_HEADER.size, self.start + record.header_offset))
            begin = self.start + record.header_offset + LOCAL_HEADER.size + sum(header)
            storage = read_exactly(self.descriptor, begin, record.file_size)
            if zlib.crc32(storage.numpy().data) != record.CRC:
                raise ConversionError("its bytes do not have the checksum they were written with: the file is damaged")
            return torch.as_strided(storage.view(stored.dtype), stored.shape, stored.stride, stored.offset)
        except (KeyError, EOFError, struct.error, RuntimeError) as error:
            raise ConversionError(f"cut short or damaged ({type(error).__name__}: {error})") from None


def tensors_of(content: Any) -> dict[str, Stored]:
    """The tensors of a saved state dict by name, also where it lies under ``state_dict`` or ``model``; None of the rest."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ConversionError(f"holds no tensors by name but {type(content).__name__}")
    return {name: value for name, value in content.items() if isinstance(value, Stored)}


class BinReader:
    """``pytorch_model*.bin`` and the like; nothing but structure is read until asked for.

    Args:
        files: the files, each with the names the index promises in it (None: no index).

    Raises:
        ConversionError: naming the file that is damaged, does not match the index or holds a name twice.
    """

    def __init__(self, files: Mapping[Path, set[str] | None]) -> None:
        self._descriptors: list[int] = []
        self._places: dict[str, tuple[Path, Archive, Stored]] = {}
        try:
            for file, expected in files.items():
                self._open(file, expected)
        except BaseException:
            self.close()
            raise

    def _open(self, file: Path, expected: set[str] | None) -> None:
        descriptor = os.open(file, os.O_RDONLY)
        self._descriptors.append(descriptor)
        try:
            archive = Archive(descriptor, 0, os.fstat(descriptor).st_size)
            found = tensors_of(archive.content)
        except ConversionError as error:
            raise ConversionError(f"{file}: {error}") from None
        require_index(file, set(found), expected)
        for name, stored in found.items():
            if name in self._places:
                raise ConversionError(f"two tensors for one name: {name} in {self._places[name][0]} and in {file}")
            self._places[name] = (file, archive, stored)

    @property
    def stored(self) -> dict[str, tuple[Path, Stored]]:
        """Every tensor by name with the file it lies in."""
        return {name: (file, stored) for name, (file, _, stored) in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, its bytes compared with the file's checksum."""
        file, archive, stored = self._places[name]
        try:
            return archive.read(stored)
        except ConversionError as error:
            raise ConversionError(f"{file}: {name}: {error}") from None

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def require_index(file: Path, names: set[str], expected: set[str] | None) -> None:
    """Refuses a file that does not hold what its index says."""
    if expected is None or names == expected:
        return
    absent, extra = sorted(expected - names), sorted(names - expected)
    says = [f"does not hold {absent[0]} ({len(absent)} such)"] if absent else []
    says += [f"holds {extra[0]} ({len(extra)} such), which the index does not place there"] if extra else []
    raise ConversionError(f"{file}: " + " and ".join(says) + "; the index and the file are not of one checkpoint")
