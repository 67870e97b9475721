"""Shards and their index.

A dataset is a folder of webdataset tars, here or behind a URL, and a folder ``index``::

    shard-00000.tar     {key}.json = {"id", "conversations", ...}, {key}.txt (a caption), {key}.jpg|png|webp, .mp4|webm|mkv,
                        .mp3|wav|flac; several have numbers, pictures and videos together: {key}.0.jpg, {key}.1.mp4
    index/meta.json     format version, shards with their sizes and numbers of samples, where they are, digest
    index/*.npy         columns, mapped into memory: one row a sample, or one a component (a member of a tar)
    index/unreadable.jsonl  media whose headers cannot be read, and why

The index gives random access to what a tar only streams. Reading is one ranged read a component, from any number of threads.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.probe import AUDIOS, PICTURES, VIDEOS
from llava_mcore.data.storage import open_storage

FORMAT_VERSION = 2
INDEX_DIR = "index"
META_FILE = "meta.json"
UNREADABLE_FILE = "unreadable.jsonl"
KINDS = {
    name: code
    for code, name in enumerate(("json", "txt", "jpg", "jpeg", "png", "webp", "mp4", "webm", "mkv", "mp3", "wav", "flac"))
}
EXTENSIONS = list(KINDS)
TEXT_KINDS = (KINDS["json"], KINDS["txt"])
# What a component is for, in the order the components of a sample lie in: 0 and 1 are texts, each alone.
PICTURE, VIDEO, AUDIO = 2, 3, 4
MAX_KEY_LENGTH = 80  # USTAR keeps 100 bytes of a name; the rest is for ".123.webp"

COLUMNS: dict[str, type] = {
    "sample_component": np.int64,  # [samples + 1] first component of each sample: JSON, caption, pictures and videos, sounds
    "sample_key": np.int64,  # [samples + 1] first byte of each sample's key in key_bytes
    "key_bytes": np.uint8,
    "component_offset": np.uint64,  # from here on one row a component; bytes
    "component_size": np.uint32,  # bytes
    "component_kind": np.uint8,  # of KINDS
    "component_crc32": np.uint32,
    "component_width": np.uint32,  # pixels; 0 where there are none, or where the header cannot be read
    "component_height": np.uint32,
    "component_frames": np.uint32,  # of a video
    "component_fps": np.float32,
    "component_vfr": np.uint8,  # 1: frames are not equally far apart
    "component_audio_samples": np.uint64,  # at 16 kHz
    "component_unreadable": np.uint8,  # 1: listed in unreadable.jsonl
}


def family(kind: int) -> int:
    """0 JSON, 1 caption, 2 picture, 3 video, 4 audio, of a code of ``KINDS``."""
    return _FAMILY[kind]


_FAMILY = [0, 1] + [
    PICTURE if name in PICTURES else VIDEO if name in VIDEOS else AUDIO if name in AUDIOS else -1 for name in EXTENSIONS[2:]
]
_NUMBERS = ("width", "height", "frames", "fps", "audio_samples")
FAMILIES = np.array(_FAMILY, dtype=np.int64)


@dataclass(frozen=True)
class Medium:
    """What the index knows of a picture, a video or a sound."""

    extension: str
    family: int  # PICTURE, VIDEO or AUDIO
    row: int  # of the component columns
    width: int  # pixels
    height: int
    frames: int
    fps: float
    vfr: bool
    audio_samples: int  # at 16 kHz
    unreadable: bool


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

    def write(self, name: str, record: dict[str, Any], media: list[tuple[str, bytes]]) -> str:
        """Appends one sample; returns the key it got: ``name`` made safe and unique.

        Args:
            name: what to call it.
            record: goes into the JSON.
            media: extension (``jpg``, ``mp4``, ``wav``, ...) and bytes of each, those of a kind in order.
        """
        base = key = safe_key(name)
        number = 1
        while key in self._keys:
            number += 1
            key = f"{base[: MAX_KEY_LENGTH - 12]}-{number}"
        self._keys.add(key)
        members: dict[str, Any] = {"__key__": key, "json": json.dumps(record, ensure_ascii=False).encode()}
        kinds = [KINDS.get(extension, 0) for extension, _ in media]
        sounds = [family(kind) == AUDIO for kind in kinds]
        for place, (extension, data) in enumerate(media):
            if kinds[place] in TEXT_KINDS:
                raise ValueError(f"{extension!r} is no extension of a medium in a shard")
            same = [number for number, is_sound in enumerate(sounds) if is_sound == sounds[place]]
            members[extension if len(same) == 1 else f"{same.index(place)}.{extension}"] = data
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


class ShardDataset:
    """Random access to the samples of a folder of shards.

    Args:
        path: the dataset: a folder with an index, and with the shards unless the index says where else they are.

    Raises:
        DatasetError: there is no index, or a shard is missing or not as long as it was when it was indexed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.columns, meta = _load_index(self.path)
        self.digest: str = meta["digest"]
        self.shards: list[str] = [shard["name"] for shard in meta["shards"]]
        self.shard_sizes: list[int] = [shard["samples"] for shard in meta["shards"]]
        self.ignored_members: dict[str, int] = meta["ignored_members"]
        self.unreadable: int = meta["unreadable"]
        """Media whose headers cannot be read."""
        self._shard_end = np.cumsum(self.shard_sizes)
        self._storage = open_storage(meta["root"] or str(self.path))
        self._check_shards(meta["shards"])

    def _check_shards(self, shards: list[dict[str, Any]]) -> None:
        sizes = self._storage.sizes()
        for shard in shards:
            size = sizes.get(shard["name"])
            if size is None:
                raise self._storage.missing(shard["name"])
            if size != shard["bytes"]:
                raise DatasetError(
                    f"shard {self._storage.path(shard['name'])} has {size} bytes, but {shard['bytes']} were indexed: it is "
                    f"truncated or was replaced; copy it again, or run `prepare_data.py index {self.path}`"
                )

    def __len__(self) -> int:
        return len(self.columns["sample_component"]) - 1

    def __reduce__(self) -> tuple[type[ShardDataset], tuple[Path]]:
        return ShardDataset, (self.path,)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")

    def key(self, index: int) -> str:
        """Key of a sample."""
        self._check_index(index)
        first, last = self.columns["sample_key"][index : index + 2]
        return self.columns["key_bytes"][first:last].tobytes().decode()

    def shard(self, index: int) -> str:
        """File name of the shard a sample lies in."""
        self._check_index(index)
        return self.shards[int(np.searchsorted(self._shard_end, index, side="right"))]

    def name(self, index: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.shard(index)}: {self.key(index)}"

    def rows(self, index: int) -> range:
        """Rows of a sample's components."""
        self._check_index(index)
        first, last = self.columns["sample_component"][index : index + 2]
        return range(int(first), int(last))

    def media(self, index: int) -> list[Medium]:
        """Pictures and videos of a sample in the order of their numbers, then its sounds."""
        columns = self.columns
        found = []
        for row in self.rows(index):
            kind = int(columns["component_kind"][row])
            if kind not in TEXT_KINDS:
                numbers = {name: columns[f"component_{name}"][row].item() for name in _NUMBERS}
                flags = {name: bool(columns[f"component_{name}"][row]) for name in ("vfr", "unreadable")}
                found.append(Medium(EXTENSIONS[kind], family(kind), row, **numbers, **flags))
        return found

    def num_pictures(self, index: int) -> int:
        """Pictures of a sample."""
        return sum(medium.family == PICTURE for medium in self.media(index))

    def picture_sizes(self, index: int) -> list[tuple[int, int]]:
        """Width and height of each picture of a sample; (0, 0) where the header cannot be read."""
        return [(medium.width, medium.height) for medium in self.media(index) if medium.family == PICTURE]

    def unreadable_reasons(self) -> dict[int, str]:
        """For every sample with a medium whose header cannot be read: which, and why."""
        found = {}
        for line in (self.path / INDEX_DIR / UNREADABLE_FILE).read_text(encoding="utf-8").splitlines():
            said = json.loads(line)
            found[int(said["sample"])] = f".{said['kind']} at byte {said['offset']}: {said['reason']}"
        return found

    def read_record(self, index: int) -> dict[str, Any]:
        """The JSON of a sample. One without conversations but with a caption (``.txt``) gets a conversation of it.

        Raises:
            SampleError: it has neither, or it is broken.
        """
        rows = {int(self.columns["component_kind"][row]): row for row in self.rows(index)}
        record: Any = {}
        try:
            if (row := rows.get(KINDS["json"])) is not None:
                record = json.loads(self._read(index, row))
                if not isinstance(record, dict):
                    raise SampleError("its .json is not an object")
            if (row := rows.get(KINDS["txt"])) is not None and "conversations" not in record:
                question = "<image>" * self.num_pictures(index)
                turns = [("human", question), ("gpt", self._read(index, row).decode().strip())]
                record["conversations"] = [{"from": who, "value": text} for who, text in turns]
            elif KINDS["json"] not in rows:
                raise SampleError("has no .json")
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            kind = "txt" if isinstance(record, dict) and record else "json"
            raise SampleError(f"its .{kind} is not {kind.upper()} ({error})") from error
        return record

    def read_medium(self, index: int, medium: Medium) -> bytes:
        """One encoded medium of a sample.

        Raises:
            SampleError: bytes have changed since they were indexed.
        """
        return self._read(index, medium.row)

    def read_pictures(self, index: int) -> list[bytes]:
        """The encoded pictures of a sample, in order; errors as in ``read_medium``."""
        return [self._read(index, medium.row) for medium in self.media(index) if medium.family == PICTURE]

    def read(self, index: int) -> RawSample:
        """A whole sample."""
        return RawSample(self.key(index), self.read_record(index), self.read_pictures(index), self.shard(index))

    def offset(self, index: int) -> int:
        """Byte of its shard at which a sample's first component begins."""
        rows = self.rows(index)
        return int(self.columns["component_offset"][rows.start : rows.stop].min()) if rows else 0

    def _read(self, index: int, row: int) -> bytes:
        offset, size = int(self.columns["component_offset"][row]), int(self.columns["component_size"][row])
        shard = self.shard(index)
        data = self._storage.read(shard, offset, size)
        if len(data) < size:
            raise DatasetError(
                f"shard {self._storage.path(shard)} ends before sample {self.key(index)}: it was truncated while in use"
            )
        if zlib.crc32(data) != self.columns["component_crc32"][row]:
            raise SampleError("its bytes on disk differ from those that were indexed (crc32)")
        return data


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
        if len(columns["sample_component"]) != meta["samples"] + 1 or lengths != {meta["components"]} or "root" not in meta:
            raise ValueError("columns and meta.json disagree")
    except DatasetError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"the index of {path} is damaged ({error}); {fix}") from error
    return columns, meta
