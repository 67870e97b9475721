"""Tensors on disk, read when asked for and written as they come: safetensors folders and distributed checkpoints."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException

from llava_mcore.conversion.families import OUR_PREFIXES, ConversionError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{number:05d}-of-{count:05d}.safetensors"
MAX_SHARD_BYTES = 5_000_000_000  # "5GB" as Hugging Face counts

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


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor as ``dtype``; integers and None leave it as it is."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class SafetensorsReader:
    """Tensors of one safetensors file, or of a folder with one file or several and an index. Nothing is read until asked for.

    Args:
        path: a file, or a folder that holds ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        ConversionError: naming the file that is missing, cut short or does not match the index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()
        self.infos: dict[str, Info] = {}
        try:
            for file, expected in self._layout().items():
                self._open(file, expected)
        except BaseException:
            self._stack.close()
            raise

    def _layout(self) -> dict[Path, set[str] | None]:
        """Files with the names the index promises in each, None where there is no index."""
        if self.path.is_file():
            return {self.path: None}
        if (self.path / SINGLE).is_file():
            return {self.path / SINGLE: None}
        index = self.path / INDEX
        if not index.is_file():
            bins = sorted(file.name for file in self.path.glob("*.bin")) if self.path.is_dir() else []
            hint = f"; it has {bins[0]}, but only safetensors are read" if bins else ""
            raise ConversionError(f"{self.path}: neither {SINGLE} nor {INDEX} is there{hint}")
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            layout: dict[Path, set[str] | None] = {}
            for name, file in weight_map.items():
                if Path(file).name != file:
                    raise ConversionError(f"{index}: {name} lies in {file!r}, which is not a file name beside the index")
                names = layout.setdefault(self.path / file, set())
                assert names is not None
                names.add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(f"{index}: not a safetensors index ({type(error).__name__}: {error})") from None
        missing = [file.name for file in layout if not file.is_file()]
        if missing:
            raise ConversionError(f"{index}: names files that are not there: {', '.join(sorted(missing))}; fetch them again")
        return layout

    def _open(self, file: Path, expected: set[str] | None) -> None:
        try:
            handle = self._stack.enter_context(safe_open(str(file), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{file}: cut short or damaged ({error}); fetch it again") from None
        self._files[file] = handle
        names = set(handle.keys())
        if expected is not None and names != expected:
            absent, extra = sorted(expected - names), sorted(names - expected)
            says = [f"does not hold {absent[0]} ({len(absent)} such)"] if absent else []
            says += [f"holds {extra[0]} ({len(extra)} such), which the index does not place there"] if extra else []
            raise ConversionError(f"{file}: " + " and ".join(says) + f"; {INDEX} and the file are not of one checkpoint")
        for name in sorted(names):
            part = handle.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ConversionError(f"{file}: {name} has type {part.get_dtype()}; known are {', '.join(DTYPES)}")
            self.infos[name] = Info(tuple(part.get_shape()), DTYPES[part.get_dtype()], str(file))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file where the platform can."""
        tensor: torch.Tensor = self._files[Path(self.infos[name].file)].get_tensor(name)
        return tensor

    def close(self) -> None:
        """Closes the files."""
        self._stack.close()
        self._files.clear()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def shard_plan(infos: dict[str, Info], max_bytes: int) -> dict[str, list[str]]:
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


def write_file(file: Path, infos: dict[str, Info], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes one safetensors file, tensor by tensor as they come.

    Args:
        file: the file to write.
        infos: shape and type of every tensor, which are known before the first is there.
        tensors: name and tensor, in any order.
    """
    ordered = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    offsets: dict[str, int] = {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        info, offsets[name] = infos[name], end
        end += info.nbytes
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = set()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        start = out.tell()
        out.truncate(start + end)
        for name, tensor in tensors:
            info = infos[name]
            if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                raise ConversionError(f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {info.dtype} {info.shape}")
            out.seek(start + offsets[name])
            out.write(raw(tensor.cpu()).numpy().data)
            written.add(name)
    if written != set(infos):
        raise ConversionError(f"{file}: tensors were not supplied: {', '.join(sorted(set(infos) - written))}")


def write_folder(
    folder: Path, infos: dict[str, Info], tensors: Iterator[tuple[str, torch.Tensor]], max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes tensors, which come in the order of ``infos``, as one file or as shards with an index."""
    shards = shard_plan(infos, max_bytes)
    for file, names in shards.items():
        part = {name: infos[name] for name in names}
        # zip stops at the last name without drawing one tensor more, as range is its first argument.
        write_file(folder / file, part, (pair for _, pair in zip(range(len(names)), tensors, strict=False)))
    if len(shards) > 1:
        total = sum(info.nbytes for info in infos.values())
        count = sum(math.prod(info.shape) for info in infos.values())
        index = {
            "metadata": {"total_parameters": count, "total_size": total},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _last_line(error: BaseException) -> str:
    """What went wrong, without the traceback that torch puts into the messages of its checkpoint errors."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if len(lines) > 1 else f"{type(error).__name__}: {error}"


class DistributedReader:
    """The model's tensors of a distributed checkpoint. Those of the optimizer are neither listed nor read.

    ``llava_mcore.platform.device.start()`` must have been called.
    """

    def __init__(self, folder: str | Path) -> None:
        from megatron.core import dist_checkpointing

        self.path = Path(folder)
        try:
            stored = dist_checkpointing.load_tensors_metadata(str(folder))
        except (Exception, CheckpointException) as error:  # many kinds for a damaged folder; torch's is no Exception
            raise ConversionError(f"{folder}: not a readable distributed checkpoint ({_last_line(error)})") from None
        self.infos = {
            key: Info(tuple(tensor.global_shape), tensor.dtype, str(folder))
            for key, tensor in stored.items()
            if key.startswith(OUR_PREFIXES)
        }

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors by key; only their bytes are read."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing import ShardedTensor

        wanted = {}
        for key in keys:
            info = self.infos[key]
            wanted[key] = ShardedTensor.from_rank_offsets(key, torch.empty(info.shape, dtype=info.dtype), replica_id=0)
        try:
            loaded = dist_checkpointing.load(wanted, str(self.path), validate_access_integrity=False)
        except (Exception, CheckpointException) as error:
            raise ConversionError(f"{self.path}: cannot read {', '.join(wanted)[:200]} ({_last_line(error)})") from None
        return {key: loaded[key] for key in wanted}

    def close(self) -> None:
        """Nothing is kept open."""


def save_distributed(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Saves whole tensors as a distributed checkpoint that loads under any layout.

    Megatron-Core wants all of them at once, so they are in memory together; those that were not fused stay mapped from
    their files until they are written.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    state: dict[str, Any] = {key: ShardedTensor.from_rank_offsets(key, tensor, replica_id=0) for key, tensor in tensors}
    folder.mkdir(parents=True, exist_ok=True)
    # False: both halves of a gated MLP lie under one key, as the trainer's model has them.
    try:
        dist_checkpointing.save(state, str(folder), content_metadata={"singleton_local_shards": False})
    except (Exception, CheckpointException) as error:  # the writers are processes of their own, which hand over whatever they met
        raise ConversionError(f"{folder}: cannot be written ({_last_line(error)}); is the disk full?") from error
