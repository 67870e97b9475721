"""Shards and their index.

A dataset is a folder of webdataset tars and a folder ``index`` beside them::

    shard-00000.tar     {key}.jpg|png|webp or {key}.0.jpg, {key}.1.png, ...; {key}.json = {"id", "conversations", ...}
    index/meta.json     format version, shards with their sizes and numbers of samples, digest
    index/*.npy         columns, mapped into memory: one row a sample, or one a component (the JSON or a picture)

The index gives random access to what a tar only streams. Reading is one ``pread`` a component, from any number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.image import picture_info

FORMAT_VERSION = 1
INDEX_DIR = "index"
META_FILE = "meta.json"
KINDS = {"json": 0, "jpg": 1, "jpeg": 1, "png": 2, "webp": 3}
JSON_KIND = KINDS["json"]
OPEN_FILES = 64
MAX_KEY_LENGTH = 80  # USTAR keeps 100 bytes of a name; the rest is for ".123.webp"

COLUMNS: dict[str, type] = {
    "sample_component": np.int64,  # [samples + 1] first component of each sample; a sample's JSON comes before its pictures
    "sample_key": np.int64,  # [samples + 1] first byte of each sample's key in key_bytes
    "key_bytes": np.uint8,
    "component_offset": np.int64,  # from here on one row a component
    "component_size": np.int64,
    "component_kind": np.uint8,
    "component_crc32": np.uint32,
    "component_width": np.uint32,  # pixels; 0 for JSON and for a picture whose header cannot be read
    "component_height": np.uint32,
}

_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # webdataset's rule: the key ends at the first dot of the basename
_FIELD = re.compile(r"(?:(\d+)\.)?([a-z0-9]+)")


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies on disk."""

    key: str
    record: dict[str, Any]
    pictures: list[bytes]
    shard: str


def safe_key(name: str) -> str:
    """A key that webdataset reads back as it was written: no dot (it would end there), no slash, not too long."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_KEY_LENGTH] or "_"


class ShardWriter:
    """Writes samples into numbered tars of a folder. Use as a context manager, then call ``build_index``.

    Args:
        folder: where the tars go.
        samples_per_shard: samples in each, but the last.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._per_shard = samples_per_shard
        self._count = 0
        self._keys: set[str] = set()
        self._file: BinaryIO | None = None
        self._tar: Any = None

    def write(self, name: str, record: dict[str, Any], pictures: list[tuple[str, bytes]]) -> str:
        """Appends one sample; returns the key it got: ``name`` made safe and unique.

        Args:
            name: what to call it.
            record: goes into the JSON.
            pictures: extension (``jpg``, ``png``, ``webp``) and bytes of each, in order.
        """
        base = key = safe_key(name)
        number = 1
        while key in self._keys:
            number += 1
            key = f"{base[: MAX_KEY_LENGTH - 12]}-{number}"
        self._keys.add(key)
        members: dict[str, Any] = {"__key__": key, "json": json.dumps(record, ensure_ascii=False).encode()}
        for place, (extension, data) in enumerate(pictures):
            if KINDS.get(extension, JSON_KIND) == JSON_KIND:
                raise ValueError(f"{extension!r} is no picture extension of a shard")
            members[extension if len(pictures) == 1 else f"{place}.{extension}"] = data
        if self._count % self._per_shard == 0:
            self._next()
        self._tar.write(members)
        self._count += 1
        return key

    def _next(self) -> None:
        from webdataset.writer import TarWriter  # imports torch, and takes a second

        self.close()
        self._file = open(self._folder / f"shard-{self._count // self._per_shard:05d}.tar", "wb")
        # A fixed time makes the same samples give the same bytes.
        self._tar = TarWriter(self._file, encoder=False, mtime=0.0)

    def close(self) -> None:
        """Ends the last tar."""
        if self._file is not None:
            self._tar.close()
            self._file.close()
            self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Member:
    key: str
    place: int
    extension: str
    offset: int
    size: int


def _members(path: Path, ignored: Counter[str]) -> Iterator[list[_Member]]:
    """The members of each sample of one tar: those that stand together and share a key."""
    group: list[_Member] = []
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = info.offset_data + (info.size + 511) // 512 * 512
                name = _MEMBER.fullmatch(info.name) if info.isreg() else None
                if name is None:
                    continue
                if group and group[0].key != name[1]:
                    yield group
                    group = []
                field = _FIELD.fullmatch(name[2].lower())
                if field is None or field[2] not in KINDS or (field[1] and field[2] == "json"):
                    ignored[name[2].lower()] += 1
                    continue
                group.append(_Member(name[1], int(field[1] or 0), field[2], info.offset_data, info.size))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DatasetError(f"{path} is no readable tar ({error}); copy it again from its source") from error
    if path.stat().st_size < end + 512:
        raise DatasetError(f"{path} is truncated: it has no end-of-archive block; copy it again from its source")
    if group:
        yield group


class _Columns:
    """The columns of an index while it is built."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = {name: [] for name in COLUMNS if name != "key_bytes"}
        self._rows["sample_component"].append(0)
        self._rows["sample_key"].append(0)
        self._keys = bytearray()

    def add(self, group: list[_Member], file: BinaryIO, path: Path) -> None:
        """Appends one sample."""
        group.sort(key=lambda member: (KINDS[member.extension] != JSON_KIND, member.place))
        places = [(KINDS[member.extension] == JSON_KIND, member.place) for member in group]
        if len(set(places)) != len(places):
            raise DatasetError(f"{path}: sample {group[0].key} has two members for one place; give its pictures numbers")
        for member in group:
            file.seek(member.offset)
            data = file.read(member.size)
            width = height = 0
            if KINDS[member.extension] != JSON_KIND:
                try:
                    _, width, height = picture_info(data)
                except SampleError:
                    pass  # stays 0 x 0; lint names it, and the loader skips it by name
            row = (member.offset, member.size, KINDS[member.extension], zlib.crc32(data), width, height)
            for name, value in zip([name for name in COLUMNS if name.startswith("component_")], row, strict=True):
                self._rows[name].append(value)
        self._rows["sample_component"].append(len(self._rows["component_offset"]))
        self._keys += group[0].key.encode()
        self._rows["sample_key"].append(len(self._keys))

    def arrays(self) -> dict[str, np.ndarray]:
        """All columns."""
        rows: dict[str, np.ndarray] = {name: np.asarray(values, dtype=COLUMNS[name]) for name, values in self._rows.items()}
        return rows | {"key_bytes": np.frombuffer(bytes(self._keys), dtype=np.uint8)}


def build_index(folder: str | Path, progress: Callable[[int], None] | None = None) -> Path:
    """Builds (or builds anew) the index of the ``*.tar`` files of a folder, whoever wrote them with webdataset.

    Args:
        folder: the dataset.
        progress: called with the bytes of every shard that is done.

    Returns:
        The folder of the index, which appears only when it is complete.

    Raises:
        DatasetError: there is no shard or no sample, or a shard is damaged.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DatasetError(f"no *.tar in {folder}; write shards there with `prepare_data.py shard`")
    columns = _Columns()
    ignored: Counter[str] = Counter()
    described: list[dict[str, Any]] = []
    for path in shards:
        samples = 0
        with open(path, "rb") as file:
            for group in _members(path, ignored):
                columns.add(group, file, path)
                samples += 1
        described.append({"name": path.name, "bytes": path.stat().st_size, "samples": samples})
        if progress is not None:
            progress(path.stat().st_size)
    arrays = columns.arrays()
    total = sum(shard["samples"] for shard in described)
    if not total:
        raise DatasetError(f"no sample in the {len(shards)} shards of {folder}")
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, described]).encode())
    for name in COLUMNS:
        digest.update(arrays[name].tobytes())
    meta = {
        "format": FORMAT_VERSION,
        "samples": total,
        "components": len(arrays["component_offset"]),
        "shards": described,
        "ignored_members": dict(ignored),
        "digest": digest.hexdigest(),
    }
    _publish(folder, arrays, meta)
    return folder / INDEX_DIR


def _publish(folder: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Writes an index aside and moves it into place."""
    aside = folder / f".{INDEX_DIR}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, array in arrays.items():
        np.save(aside / f"{name}.npy", array)
    (aside / META_FILE).write_text(json.dumps(meta, indent=1))
    shutil.rmtree(folder / INDEX_DIR, ignore_errors=True)
    os.replace(aside, folder / INDEX_DIR)


class _OpenFile:
    """A file descriptor that closes when its last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardDataset:
    """Random access to the samples of a folder of shards.

    Args:
        path: the dataset.

    Raises:
        DatasetError: there is no index, or a shard is missing or not as long as it was when it was indexed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._columns, meta = _load_index(self.path)
        self.digest: str = meta["digest"]
        self.shards: list[str] = [shard["name"] for shard in meta["shards"]]
        self.ignored_members: dict[str, int] = meta["ignored_members"]
        self._shard_end = np.cumsum([shard["samples"] for shard in meta["shards"]])
        for shard in meta["shards"]:
            self._check_shard(shard["name"], shard["bytes"])
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def _check_shard(self, name: str, size: int) -> None:
        file = self.path / name
        if not file.is_file():
            raise DatasetError(f"shard {file} is missing; copy it again, or run `prepare_data.py index {self.path}` without it")
        if file.stat().st_size != size:
            raise DatasetError(
                f"shard {file} has {file.stat().st_size} bytes, but {size} were indexed: it is truncated or was replaced; "
                f"copy it again, or run `prepare_data.py index {self.path}`"
            )

    def __len__(self) -> int:
        return len(self._columns["sample_component"]) - 1

    def __reduce__(self) -> tuple[type[ShardDataset], tuple[Path]]:
        return ShardDataset, (self.path,)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")

    def key(self, index: int) -> str:
        """Key of a sample."""
        self._check_index(index)
        first, last = self._columns["sample_key"][index : index + 2]
        return self._columns["key_bytes"][first:last].tobytes().decode()

    def shard(self, index: int) -> str:
        """File name of the shard a sample lies in."""
        self._check_index(index)
        return self.shards[int(np.searchsorted(self._shard_end, index, side="right"))]

    def name(self, index: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.shard(index)}: {self.key(index)}"

    def _components(self, index: int) -> tuple[int | None, range]:
        """Rows of the JSON (None if the sample has none) and of the pictures."""
        self._check_index(index)
        first, last = (int(row) for row in self._columns["sample_component"][index : index + 2])
        if first < last and self._columns["component_kind"][first] == JSON_KIND:
            return first, range(first + 1, last)
        return None, range(first, last)

    def num_pictures(self, index: int) -> int:
        """Pictures of a sample."""
        return len(self._components(index)[1])

    def picture_sizes(self, index: int) -> list[tuple[int, int]]:
        """Width and height of each picture of a sample; (0, 0) where the header cannot be read."""
        width, height = self._columns["component_width"], self._columns["component_height"]
        return [(int(width[row]), int(height[row])) for row in self._components(index)[1]]

    def read_record(self, index: int) -> dict[str, Any]:
        """The JSON of a sample.

        Raises:
            SampleError: it has none, or it is broken.
        """
        row, _ = self._components(index)
        if row is None:
            raise SampleError("has no .json")
        try:
            record = json.loads(self._read(index, row))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SampleError(f"its .json is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise SampleError("its .json is not an object")
        return record

    def read_pictures(self, index: int) -> list[bytes]:
        """The encoded pictures of a sample, in order.

        Raises:
            SampleError: bytes have changed since they were indexed.
        """
        return [self._read(index, row) for row in self._components(index)[1]]

    def read(self, index: int) -> RawSample:
        """A whole sample."""
        return RawSample(self.key(index), self.read_record(index), self.read_pictures(index), self.shard(index))

    def _read(self, index: int, row: int) -> bytes:
        offset, size = int(self._columns["component_offset"][row]), int(self._columns["component_size"][row])
        shard = self.shard(index)
        file = self._file(shard)
        parts = []
        while size:  # one pread gives at most 2 GiB
            part = os.pread(file.fd, size, offset)
            if not part:
                raise DatasetError(
                    f"shard {self.path / shard} ends before sample {self.key(index)}: it was truncated while in use"
                )
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if zlib.crc32(data) != self._columns["component_crc32"][row]:
            raise SampleError("its bytes on disk differ from those that were indexed (crc32)")
        return data

    def _file(self, shard: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _OpenFile(self.path / shard)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(shard)
            return file


def _load_index(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns and meta of a dataset's index."""
    if not path.is_dir():
        raise DatasetError(f"no dataset at {path}: no such folder; check data.path")
    index = path / INDEX_DIR
    fix = f"run `prepare_data.py index {path}`"
    if not (index / META_FILE).is_file():
        raise DatasetError(f"{path} has no index ({INDEX_DIR}/{META_FILE}); {fix}")
    try:
        meta = json.loads((index / META_FILE).read_text())
        if meta["format"] != FORMAT_VERSION:
            raise DatasetError(f"the index of {path} has format {meta['format']}, but {FORMAT_VERSION} is read here; {fix}")
        columns = {}
        for name, dtype in COLUMNS.items():
            file = index / f"{name}.npy"
            try:
                columns[name] = np.load(file, mmap_mode="r")
            except ValueError:  # an empty column cannot be mapped
                columns[name] = np.load(file)
            if columns[name].dtype != dtype:
                raise ValueError(f"{name} holds {columns[name].dtype}")
        lengths = {len(columns[name]) for name in COLUMNS if name.startswith("component_")}
        if len(columns["sample_component"]) != meta["samples"] + 1 or lengths != {meta["components"]}:
            raise ValueError("columns and meta.json disagree")
    except DatasetError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"the index of {path} is damaged ({error}); {fix}") from error
    return columns, meta
