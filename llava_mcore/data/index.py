"""Building the index of a dataset: one walk over the headers of every tar, the checksums and the headers of the media.

Shards are done by several processes, each shard's part is kept until all are there, and a run that was killed goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.probe import Probe, probe
from llava_mcore.data.shards import (
    COLUMNS,
    FORMAT_VERSION,
    INDEX_DIR,
    KINDS,
    META_FILE,
    PICTURE,
    TEXT_KINDS,
    UNREADABLE_FILE,
    VIDEO,
    family,
)
from llava_mcore.data.storage import Storage, open_storage

BLOCK = 512
PARTS_DIR = f".{INDEX_DIR}.parts"
# Below this a second process takes longer to start than it saves.
SMALL = 64 << 20

_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # webdataset's rule: the key ends at the first dot of the basename
_FIELD = re.compile(r"(?:(\d+)\.)?([a-z0-9]+)")
_PAX = re.compile(rb"\d+ (path|size)=(.*)")
_COMPONENT = [name for name in COLUMNS if name.startswith("component_")]


@dataclass(frozen=True)
class Member:
    """A component of a sample as its tar holds it. ``place`` is its number among those of its kind."""

    key: str
    place: int
    extension: str
    offset: int  # bytes, of the content
    size: int  # bytes

    @property
    def rank(self) -> tuple[int, int, int]:
        """What the components of a sample are sorted by; no two may have the same."""
        what = family(KINDS[self.extension])
        return (PICTURE, self.place, what) if what in (PICTURE, VIDEO) else (what, self.place, 0)


def walk(read: Callable[[int, int], bytes], size: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size in bytes of every regular file of a tar: ustar, GNU long names and pax headers (POSIX.1-2001).

    Args:
        read: gives bytes [offset, offset + size).
        size: bytes of the tar.

    Raises:
        ValueError: it is no tar, or is cut short.
    """
    at = 0
    name: str | None = None  # of a header that only tells the next one's name or size
    length: int | None = None
    while True:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            raise ValueError("truncated: it has no end-of-archive block")
        if header[0] == 0 and not header.strip(b"\0"):
            return
        content, found = at + BLOCK, _size(header, at)
        kind = header[156:157]
        if kind in b"xL":
            said = read(content, found)
            if kind == b"L":
                name = said.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                for line in said.split(b"\n"):
                    if match := _PAX.fullmatch(line):
                        if match[1] == b"path":
                            name = match[2].decode("utf-8", "surrogateescape")
                        else:
                            length = int(match[2])
        else:
            found = found if length is None else length
            if content + found > size:
                raise ValueError("truncated: its last member is cut")
            if kind in b"0\0" and not (kind == b"\0" and header[99:100] == b"/"):
                yield name if name is not None else _name(header), content, found
            name = length = None
        at = content + (found + BLOCK - 1) // BLOCK * BLOCK


def _size(header: bytes, at: int) -> int:
    """The size a header states, once its checksum agrees."""
    try:
        stated = int(header[148:156].strip(b" \0") or b"x", 8)
        size = int.from_bytes(header[125:136]) if header[124] & 0x80 else int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise ValueError(f"no tar header at byte {at}") from None
    # Adler-32's low half is 1 + the sum of the bytes modulo 65521: the sum at the speed of C. The checksum counts as blanks.
    counted = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * 32
    if (counted - stated) % 65521:
        raise ValueError(f"the tar header at byte {at} is damaged (checksum)")
    return size


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:262] == b"ustar" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def samples(files: Iterable[tuple[str, int, int]], ignored: Counter[str]) -> Iterator[list[Member]]:
    """The members of each sample: those that stand together and share a key. Counts the kinds it leaves out in ``ignored``."""
    group: list[Member] = []
    for path, offset, size in files:
        name = _MEMBER.fullmatch(path)
        if name is None:
            continue
        if group and group[0].key != name[1]:
            yield group
            group = []
        field = _FIELD.fullmatch(name[2].lower())
        if field is None or field[2] not in KINDS or (field[1] and KINDS[field[2]] in TEXT_KINDS):
            ignored[name[2].lower()] += 1
            continue
        group.append(Member(name[1], int(field[1] or 0), field[2], offset, size))
    if group:
        yield group


class _Part:
    """The columns of one shard."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.rows: dict[str, list[Any]] = {name: [] for name in _COMPONENT}
        self.components: list[int] = []
        self.keys: list[bytes] = []
        self.unreadable: list[dict[str, Any]] = []

    def add(self, group: list[Member], read: Callable[[int, int], bytes]) -> None:
        """Appends one sample."""
        group.sort(key=lambda member: member.rank)
        if len({member.rank for member in group}) != len(group):
            raise DatasetError(f"{self.shard}: sample {group[0].key} has two members for one place; give them numbers")
        for member in group:
            if member.size >= 1 << 32:
                raise DatasetError(f"{self.shard}: {member.key}.{member.extension} has 4 GiB or more; cut it into clips")
            data = read(member.offset, member.size)
            found, bad = self._probe(member, data)
            row = (member.offset, member.size, KINDS[member.extension], zlib.crc32(data), *asdict(found).values(), bad)
            for name, value in zip(_COMPONENT, row, strict=True):
                self.rows[name].append(value)
        self.components.append(len(group))
        self.keys.append(group[0].key.encode("utf-8", "surrogateescape"))

    def _probe(self, member: Member, data: bytes) -> tuple[Probe, bool]:
        if KINDS[member.extension] in TEXT_KINDS:
            return Probe(), False
        try:
            return probe(member.extension, data), False
        except SampleError as error:  # kept, so that it has a name; nothing will be trained on it
            said = {"key": member.key, "kind": member.extension, "offset": member.offset, "reason": error.reason}
            self.unreadable.append({"shard": self.shard, "sample": len(self.components), **said})
            return Probe(), True

    def arrays(self) -> dict[str, np.ndarray]:
        """Its columns; those of samples hold counts, not sums."""
        columns: dict[str, np.ndarray] = {name: np.array(values, dtype=COLUMNS[name]) for name, values in self.rows.items()}
        columns["sample_component"] = np.array(self.components, dtype=np.int64)
        columns["sample_key"] = np.array([len(key) for key in self.keys], dtype=np.int64)
        columns["key_bytes"] = np.frombuffer(b"".join(self.keys), dtype=np.uint8)
        return columns


def _index_shard(root: str, name: str, part: Path) -> dict[str, Any]:
    """Indexes one shard into a file; returns what meta.json says of it."""
    storage = open_storage(root)
    stamp = storage.stamp(name)
    if (kept := _kept(part, stamp)) is not None:
        return kept
    columns = _Part(name)
    ignored: Counter[str] = Counter()
    with storage.sequential(name) as read:
        try:
            for group in samples(walk(read, stamp["bytes"]), ignored):
                columns.add(group, read)
        except (ValueError, OSError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{storage.path(name)} is no readable tar ({error}); copy it again from its source") from error
    described = {"name": name, **stamp, "samples": len(columns.components)}
    found = {"shard": described, "ignored": dict(ignored), "unreadable": columns.unreadable}
    aside = part.with_suffix(".partial.npz")
    arrays: dict[str, Any] = columns.arrays()
    np.savez(aside, found=np.array(json.dumps(found)), **arrays)
    os.replace(aside, part)
    return found


def _kept(part: Path, stamp: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run found in a shard that has not changed since."""
    try:
        with np.load(part) as stored:
            found = json.loads(str(stored["found"]))
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return found if {name: found["shard"].get(name) for name in stamp} == stamp else None


def build_index(
    folder: str | Path, progress: Callable[[int], None] | None = None, *, root: str | None = None, processes: int | None = None
) -> Path:
    """Builds (or builds anew) the index of the ``*.tar`` files of a folder, whoever wrote them with webdataset.

    Args:
        folder: the dataset; the index goes there.
        progress: called with the bytes of every shard that is done.
        root: where the shards are, if not in ``folder``: any URL that fsspec opens.
        processes: that share the shards; None: one a core, or this one for little data.

    Returns:
        The folder of the index, which appears only when it is complete.

    Raises:
        DatasetError: there is no shard or no sample, or a shard is damaged.
    """
    folder = Path(folder)
    storage = open_storage(root or str(folder))
    names = storage.shards()
    if not names:
        raise DatasetError(f"no *.tar in {storage.root}; write shards there with `prepare_data.py shard`")
    parts = folder / PARTS_DIR
    parts.mkdir(parents=True, exist_ok=True)
    jobs = [(storage.root, name, parts / f"{name}.npz") for name in names]
    found: dict[str, dict[str, Any]] = {}
    for done in run_parallel(_index_shard, jobs, _processes(storage, names, processes)):
        found[done["shard"]["name"]] = done
        if progress is not None:
            progress(done["shard"]["bytes"])
    _merge(folder, [found[name] for name in names], root)
    shutil.rmtree(parts)
    return folder / INDEX_DIR


def is_current(folder: str | Path, root: str | None = None) -> bool:
    """Whether a folder has an index of the very shards that are there."""
    try:
        meta = json.loads((Path(folder) / INDEX_DIR / META_FILE).read_text())
        storage = open_storage(root or str(folder))
        stamps = [{"name": name, **storage.stamp(name)} for name in storage.shards()]
        indexed = [{name: shard[name] for name in shard if name != "samples"} for shard in meta["shards"]]
        return meta["format"] == FORMAT_VERSION and meta["root"] == root and stamps == indexed
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _processes(storage: Storage, names: list[str], wanted: int | None) -> int:
    if wanted is None:
        wanted = 1 if sum(storage.stamp(name)["bytes"] for name in names[:1000]) < SMALL else len(os.sched_getaffinity(0))
    return max(1, min(wanted, len(names)))


def run_parallel(
    work: Callable[..., Any], jobs: list[tuple[Any, ...]], processes: int, start: Callable[..., None] | None = None, *of: Any
) -> Iterator[Any]:
    """Results of ``work(*job)`` in the order they come, from that many processes; ``start(*of)`` runs first in each."""
    if processes == 1:
        if start is not None:
            start(*of)
        yield from (work(*job) for job in jobs)
        return
    # Spawned, not forked: whoever calls may have threads.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start, of) as pool:
        try:
            for done in as_completed([pool.submit(work, *job) for job in jobs]):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _merge(folder: Path, found: list[dict[str, Any]], root: str | None) -> None:
    """Joins the parts of all shards and moves the index into place."""
    described = [one["shard"] for one in found]
    total = sum(shard["samples"] for shard in described)
    if not total:
        raise DatasetError(f"no sample in the {len(described)} shards of {root or folder}")
    aside = folder / f".{INDEX_DIR}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, [(s["name"], s["bytes"], s["samples"]) for s in described]]).encode())
    for name, dtype in COLUMNS.items():  # the last ones are of components
        column = np.concatenate([np.load(folder / PARTS_DIR / f"{shard['name']}.npz")[name] for shard in described])
        if name.startswith("sample_"):
            column = np.concatenate([[0], np.cumsum(column)])
        column = column.astype(dtype)
        digest.update(column.tobytes())
        np.save(aside / f"{name}.npy", column)
    ignored: Counter[str] = Counter()
    with open(aside / UNREADABLE_FILE, "w", encoding="utf-8") as file:
        first = 0
        for one in found:
            ignored.update(one["ignored"])
            for line in one["unreadable"]:
                file.write(json.dumps({**line, "sample": first + line["sample"]}) + "\n")
            first += one["shard"]["samples"]
    meta = {
        "format": FORMAT_VERSION,
        "samples": total,
        "components": len(column),
        "root": root,
        "unreadable": sum(len(one["unreadable"]) for one in found),
        "ignored_members": dict(ignored),
        "digest": digest.hexdigest(),
        "shards": described,
    }
    (aside / META_FILE).write_text(json.dumps(meta, indent=1))
    shutil.rmtree(folder / INDEX_DIR, ignore_errors=True)
    os.replace(aside, folder / INDEX_DIR)
