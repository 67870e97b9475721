"""Where shards lie: a local folder, or any URL that fsspec opens. Ranged reads only, from any number of threads."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_mcore.data.errors import DatasetError

OPEN_FILES = 64
READ_AHEAD = 8 << 20  # bytes of one request while a remote shard is read from end to end


class Storage(ABC):
    """The shards of one dataset."""

    root: str

    @abstractmethod
    def shards(self) -> list[str]:
        """Names of the tars, sorted."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every tar."""

    @abstractmethod
    def stamp(self, name: str) -> dict[str, Any]:
        """``bytes`` of a shard and what else tells that it was replaced.

        Raises:
            DatasetError: it is not there.
        """

    @abstractmethod
    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a shard; fewer where it ends."""

    @abstractmethod
    def sequential(self, name: str) -> Any:
        """Context manager of a function (offset, size) -> bytes for reading a shard from end to end."""

    def path(self, name: str) -> str:
        """A shard's full name, for messages."""
        return f"{self.root.rstrip('/')}/{name}"

    def missing(self, name: str) -> DatasetError:
        return DatasetError(
            f"shard {self.path(name)} is missing; copy it again, or run `prepare_data.py index {self.root}` without it"
        )


def open_storage(root: str) -> Storage:
    """The storage a path or URL names.

    Raises:
        DatasetError: there is no such folder, or what the URL needs is not installed.
    """
    if "://" not in root:
        return LocalStorage(root)
    return RemoteStorage(root)


class _OpenFile:
    """A file descriptor that closes when its last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def read(self, offset: int, size: int) -> bytes:
        """All of a range; one pread gives at most 2 GiB."""
        data = os.pread(self.fd, size, offset)
        if len(data) == size or not data:
            return data
        parts = [data]
        while (size := size - len(data)) and data:
            offset += len(data)
            data = os.pread(self.fd, size, offset)
            parts.append(data)
        return b"".join(parts)


class LocalStorage(Storage):
    """A folder of this machine."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def shards(self) -> list[str]:
        return sorted(path.name for path in Path(self.root).glob("*.tar"))

    def sizes(self) -> dict[str, int]:
        with os.scandir(self.root) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".tar")}

    def stamp(self, name: str) -> dict[str, Any]:
        try:
            stat = os.stat(os.path.join(self.root, name))
        except OSError as error:
            raise self.missing(name) from error
        return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}

    def read(self, name: str, offset: int, size: int) -> bytes:
        return self._file(name).read(offset, size)

    @contextmanager
    def sequential(self, name: str) -> Iterator[Callable[[int, int], bytes]]:
        yield _OpenFile(Path(self.root) / name).read

    def _file(self, name: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = _OpenFile(Path(self.root) / name)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(name)
            return file


class RemoteStorage(Storage):
    """A folder behind a URL: ``s3://bucket/shards``, ``https://...``, ``memory://...``."""

    def __init__(self, root: str) -> None:
        import fsspec

        self.root = root.rstrip("/")
        try:
            self._files, self._folder = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise DatasetError(f"{root} cannot be opened ({error})") from error

    def shards(self) -> list[str]:
        return sorted(self.sizes())

    def sizes(self) -> dict[str, int]:
        try:
            found = self._files.ls(self._folder, detail=True)
        except OSError as error:
            raise DatasetError(f"no dataset at {self.root} ({type(error).__name__}: {error})") from error
        return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in found if entry["name"].endswith(".tar")}

    def stamp(self, name: str) -> dict[str, Any]:
        try:
            info = self._files.info(f"{self._folder}/{name}")
        except OSError as error:
            raise self.missing(name) from error
        return {"bytes": info["size"]} | {
            tag: str(info[tag]) for tag in ("ETag", "etag", "mtime", "LastModified") if info.get(tag)
        }

    def read(self, name: str, offset: int, size: int) -> bytes:
        return self._files.cat_file(f"{self._folder}/{name}", start=offset, end=offset + size) if size else b""

    @contextmanager
    def sequential(self, name: str) -> Iterator[Callable[[int, int], bytes]]:
        with self._files.open(f"{self._folder}/{name}", "rb", block_size=READ_AHEAD, cache_type="readahead") as file:

            def read(offset: int, size: int) -> bytes:
                file.seek(offset)
                return file.read(size)

            yield read
