"""Building the index: tars from elsewhere, several processes, killed runs, shards behind a URL."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mcore.data import index as index_module
from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.index import PARTS_DIR, build_index, is_current, samples, walk
from llava_mcore.data.shards import COLUMNS, ShardDataset, ShardWriter

Sample = Callable[[int, int], tuple[str, dict[str, Any], list[tuple[str, bytes]]]]


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: data[offset : offset + size]


def tar_of(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


NAMES = st.text(st.sampled_from("ab./é_"), min_size=1, max_size=90).filter(
    lambda name: name.strip("/") and not name.endswith("/")
)


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=100, deadline=None)
def test_walks_as_tarfile_does(members: list[tuple[str, bytes]], form: int) -> None:
    members = [(f"{'d' * (60 * (number % 3))}/{name}", data) for number, (name, data) in enumerate(members)]
    data = tar_of(members, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(name.rstrip("/"), at, size) for name, at, size in walk(reader(data), len(data))] == expected


def test_long_ustar_names_folders_and_links() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("x" * 90 + "/" + "y" * 80, tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
    data = file.getvalue()
    assert [name for name, *_ in walk(reader(data), len(data))] == ["x" * 90 + "/" + "y" * 80]


def test_sizes_beyond_octal() -> None:
    """A member of 9 GiB, in GNU's base 256 and as a pax record; only headers are read."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.mp4")
        info.size = 9 << 30
        head = info.tobuf(form)
        whole = len(head) + info.size + 1024

        def read(offset: int, size: int, head: bytes = head, whole: int = whole) -> bytes:
            return head[offset : offset + size].ljust(min(size, whole - offset), b"\0")

        assert list(walk(read, whole)) == [("big.mp4", len(head), 9 << 30)]


@pytest.mark.parametrize("at", [0, 150, 512 + 512 + 3])
def test_damaged_headers_are_seen(at: int) -> None:
    data = bytearray(tar_of([("a.json", b"{}"), ("b.json", b"{}")]))
    data[at] ^= 0x11
    with pytest.raises(ValueError, match="damaged|no tar header"):
        list(walk(reader(bytes(data)), len(data)))


def test_keys_end_at_the_first_dot_of_the_basename() -> None:
    files = [("a.b/c.d.json", 0, 1), ("a.b/c.0.jpg", 1, 1), ("a.b/c.x.y.jpg", 2, 1), ("a.b/e.jpg", 3, 1), (".hidden.jpg", 4, 1)]
    ignored: Counter[str] = Counter()
    groups = list(samples(files, ignored))
    assert [[(member.key, member.place, member.extension) for member in group] for group in groups] == [
        [("a.b/c", 0, "jpg")],
        [("a.b/e", 0, "jpg")],
    ]
    assert ignored == {"d.json": 1, "x.y.jpg": 1}


@pytest.fixture
def folder(tmp_path: Path, sample: Sample) -> Path:
    with ShardWriter(tmp_path / "shards", 4) as writer:
        for number in range(10):
            writer.write(*sample(number, number % 3))
    return tmp_path / "shards"


def columns(path: Path) -> dict[str, list[Any]]:
    dataset = ShardDataset(path)
    return {name: dataset.columns[name].tolist() for name in COLUMNS} | {"digest": [dataset.digest]}


def test_processes_change_nothing(folder: Path) -> None:
    done: list[int] = []
    build_index(folder, done.append, processes=1)
    alone = columns(folder)
    assert sum(done) == sum(path.stat().st_size for path in folder.glob("*.tar")) and is_current(folder)
    build_index(folder, processes=2)
    assert columns(folder) == alone and not (folder / PARTS_DIR).exists()


def test_a_killed_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is not done again, but for a shard that has changed since."""
    original, done = index_module._Part.__init__, []

    def start(self: Any, shard: str) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(shard)
        original(self, shard)

    monkeypatch.setattr(index_module._Part, "__init__", start)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder)
    assert not (folder / "index").exists() and done == ["shard-00000.tar", "shard-00001.tar"]
    data = (folder / "shard-00001.tar").read_bytes()
    (folder / "shard-00001.tar").write_bytes(data)  # another time of change
    done[:] = []
    build_index(folder)
    assert done == ["shard-00001.tar", "shard-00002.tar"] and len(ShardDataset(folder)) == 10


def test_an_index_of_other_shards_is_not_current(folder: Path) -> None:
    assert not is_current(folder)
    build_index(folder)
    assert is_current(folder) and not is_current(folder, "memory://elsewhere")
    (folder / "shard-00002.tar").unlink()
    assert not is_current(folder)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_shards_behind_a_url(folder: Path, tmp_path: Path, scheme: str) -> None:
    """Ranged reads give what local ones do; the index itself is a local folder."""
    build_index(folder)
    local = ShardDataset(folder)
    root = folder.as_uri() if scheme == "file" else f"memory:/{folder}"
    if scheme == "memory":
        import fsspec

        files = fsspec.filesystem("memory")
        for path in folder.glob("*.tar"):
            files.pipe_file(f"{folder}/{path.name}", path.read_bytes())
    build_index(tmp_path / "here", root=root)
    remote = ShardDataset(tmp_path / "here")
    assert remote.digest == local.digest and is_current(tmp_path / "here", root)
    assert [remote.read(n) for n in range(10)] == [local.read(n) for n in range(10)]
    if scheme == "memory":
        files.pipe_file(f"{folder}/shard-00001.tar", b"")
        with pytest.raises(DatasetError, match=r"memory:.*shard-00001.tar has 0 bytes"):
            ShardDataset(tmp_path / "here")
        files.rm(f"{folder}/shard-00001.tar")
        with pytest.raises(DatasetError, match=r"shard-00001.tar is missing"):
            ShardDataset(tmp_path / "here")
    for wrong in ("nonsense://bucket", f"{folder.as_uri()}/nowhere"):
        with pytest.raises(DatasetError):
            build_index(tmp_path / "there", root=wrong)


def test_captions(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    """A ``.txt`` is the answer to the pictures, unless the JSON has a conversation."""
    metadata, turns = json.dumps({"url": "x"}).encode(), json.dumps({"conversations": [1]}).encode()
    members = [
        ("a.jpg", picture(kind="JPEG")),
        ("a.txt", b" a cat\n"),
        ("b.json", metadata),
        ("b.txt", "\u00e9".encode()),
        ("c.json", turns),
        ("c.txt", b"no"),
        ("d.txt", b"\xff"),
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    build_index(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert [turn["value"] for turn in dataset.read_record(0)["conversations"]] == ["<image>", "a cat"]
    assert [turn["value"] for turn in dataset.read_record(1)["conversations"]] == ["", "\u00e9"]
    assert dataset.read_record(1)["url"] == "x" and dataset.read_record(2)["conversations"] == [1]
    with pytest.raises(SampleError, match="is not"):
        dataset.read_record(3)


def test_media_of_several_kinds_are_written_and_read_back(tmp_path: Path) -> None:
    media = [("mp4", b"film"), ("jpg", b"one"), ("wav", b"sound"), ("png", b"two")]
    with ShardWriter(tmp_path) as writer:
        writer.write("all", {"id": 0}, media)
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        assert sorted(tar.getnames()) == ["all.0.mp4", "all.1.jpg", "all.2.png", "all.json", "all.wav"]
    build_index(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert [medium.extension for medium in dataset.media(0)] == ["mp4", "jpg", "png", "wav"]
    assert [dataset.read_medium(0, medium) for medium in dataset.media(0)] == [b"film", b"one", b"two", b"sound"]
    assert dataset.unreadable == 4
    assert np.array(dataset.columns["component_unreadable"]).tolist() == [0, 1, 1, 1, 1]
