from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from llava_mcore.data.errors import DatasetError, SampleError
from llava_mcore.data.index import build_index
from llava_mcore.data.shards import COLUMNS, ShardDataset, ShardWriter, safe_key

Picture = Callable[..., bytes]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def record(number: int = 0) -> bytes:
    return json.dumps({"id": number, "conversations": []}).encode()


def test_reads_what_was_written(dataset: ShardDataset, sample: Callable[..., Any]) -> None:
    assert len(dataset) == 53 and len(dataset.shards) == 6
    for index in (0, 1, 2, 9, 10, 52):
        name, written, pictures = sample(index, index % 3)
        read = dataset.read(index)
        assert read.key == safe_key(name) == f"sample_{index}"
        assert read.record == written == dataset.read_record(index)
        assert read.pictures == [data for _, data in pictures]
        assert read.shard == f"shard-{index // 10:05d}.tar" == dataset.shard(index)
        assert dataset.num_pictures(index) == index % 3
        assert dataset.picture_sizes(index) == [(20 + index % 5, 30)] * (index % 3)
    with pytest.raises(IndexError):
        dataset.read(53)


def test_webdataset_reads_the_same(dataset: ShardDataset) -> None:
    urls = [str(dataset.path / shard) for shard in dataset.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [dataset.key(index) for index in range(len(dataset))]
    for index, sample in enumerate(theirs):
        ours = dataset.read(index)
        assert json.loads(sample["json"]) == ours.record
        names = ["png"] if len(ours.pictures) == 1 else [f"{place}.png" for place in range(len(ours.pictures))]
        assert [sample[name] for name in names] == ours.pictures


def test_more_than_ten_pictures_keep_their_order(tmp_path: Path, picture: Picture) -> None:
    pictures = [picture(4 + place, 4, "PNG") for place in range(12)]
    with ShardWriter(tmp_path) as writer:
        writer.write("many", {"id": 0}, [("png", data) for data in pictures])
    build_index(tmp_path)
    assert ShardDataset(tmp_path).read(0).pictures == pictures


def test_keys_are_safe_and_unique(tmp_path: Path, picture: Picture) -> None:
    names = ["GCC_train_00.1", "00453/004539375", "GCC_train_00.1", "", "é.b", "x" * 300, "x" * 300]
    with ShardWriter(tmp_path) as writer:
        keys = [writer.write(name, {"id": name}, [("png", picture())]) for name in names]
    build_index(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert len(set(keys)) == len(keys) == len(dataset)
    assert keys[:3] == ["GCC_train_00_1", "00453_004539375", "GCC_train_00_1-2"]
    assert [dataset.key(index) for index in range(len(dataset))] == keys
    assert [dataset.read_record(index)["id"] for index in range(len(dataset))] == names


def test_index_of_shards_from_elsewhere(tmp_path: Path, picture: Picture) -> None:
    jpeg = picture(7, 9, "JPEG")
    write_tar(
        tmp_path / "b.tar",
        {
            "./dir/one.jpg": jpeg,  # pictures before the JSON, a folder in the name, upper case, and kinds not read
            "./dir/one.json": record(1),
            "./dir/one.txt": b"caption",
            "./dir/two.1.JPEG": jpeg,
            "./dir/two.0.webp": picture(5, 6, "WEBP"),
            "./dir/two.mp4": b"film",
            "./dir/two.json": record(2),
            "./dir/two.gif": b"GIF8",
            "./dir/two.1.json": b"{}",
            "readme": b"no sample",
        },
    )
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "zero", "json": {"id": 0}, "png": picture(8, 8)})
    build_index(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert [dataset.key(index) for index in range(3)] == ["zero", "./dir/one", "./dir/two"]
    assert [dataset.read_record(index)["id"] for index in range(3)] == [0, 1, 2]
    assert dataset.picture_sizes(1) == [(7, 9)] and dataset.picture_sizes(2) == [(5, 6), (7, 9)]
    assert dataset.ignored_members == {"gif": 1, "1.json": 1}
    assert [medium.extension for medium in dataset.media(2)] == ["webp", "mp4", "jpeg"]
    assert dataset.media(2)[1].unreadable and dataset.unreadable == 1
    assert "film" not in dataset.unreadable_reasons()[2] and ".mp4 at byte" in dataset.unreadable_reasons()[2]


def test_pax_and_gnu_names(tmp_path: Path) -> None:
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as tar:
            info = tarfile.TarInfo("é" * 120 + ".json")
            info.size = len(record(number))
            tar.addfile(info, io.BytesIO(record(number)))
    build_index(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert [dataset.read_record(index)["id"] for index in range(2)] == [0, 1]
    assert dataset.key(0) == "é" * 120


def test_samples_without_json_or_with_a_broken_one(tmp_path: Path, picture: Picture) -> None:
    broken = {"b.json": b"{broken", "c.json": b"[1]", "d.json": b"\xff\xfe{}"}
    write_tar(tmp_path / "x.tar", {"a.png": picture(), **broken, "e.json": record(4), "e.png": b"no picture"})
    build_index(tmp_path)
    dataset = ShardDataset(tmp_path)
    for index, reason in enumerate(["has no .json", "is not JSON", "not an object", "is not JSON"]):
        with pytest.raises(SampleError, match=reason):
            dataset.read_record(index)
    assert dataset.read(4).pictures == [b"no picture"] and dataset.picture_sizes(4) == [(0, 0)]


def test_two_members_for_one_place(tmp_path: Path, picture: Picture) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": picture(), "a.jpg": picture(kind="JPEG"), "a.json": record()})
    with pytest.raises(DatasetError, match=r"x.tar: sample a has two members"):
        build_index(tmp_path)


@pytest.fixture
def small(tmp_path: Path, sample: Callable[..., Any]) -> Path:
    with ShardWriter(tmp_path / "small", 4) as writer:
        for number in range(10):
            writer.write(*sample(number, 1))
    build_index(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("cut", [1, 1024, 12_000, 20_000])
def test_truncated_shard_is_named_when_opened(small: Path, cut: int) -> None:
    shard = small / "shard-00001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-cut])
    with pytest.raises(DatasetError, match=r"shard-00001.tar has \d+ bytes, but \d+ were indexed.*prepare_data.py index"):
        ShardDataset(small)


def test_truncated_shard_is_named_when_indexed(small: Path) -> None:
    shard = small / "shard-00001.tar"
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        ends = [info.offset_data + (info.size + 511) // 512 * 512 for info in tar]
    for cut in (100, 700, ends[0], ends[2] - 100, ends[2] - 512, ends[-1], ends[-1] + 300):
        shard.write_bytes(data[:cut])
        with pytest.raises(DatasetError, match="shard-00001.tar"):
            build_index(small)
    shard.write_bytes(data)
    build_index(small)
    assert len(ShardDataset(small)) == 10


def test_missing_shard_and_missing_index(small: Path, tmp_path: Path) -> None:
    (small / "shard-00002.tar").unlink()
    with pytest.raises(DatasetError, match=r"shard-00002.tar is missing"):
        ShardDataset(small)
    (small / "index" / "meta.json").unlink()
    with pytest.raises(DatasetError, match=r"has no index.*prepare_data.py index"):
        ShardDataset(small)
    with pytest.raises(DatasetError, match="data.path"):
        ShardDataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no .*tar"):
        build_index(tmp_path / "empty")


@pytest.mark.parametrize("column", sorted(COLUMNS))
def test_damaged_index(small: Path, column: str) -> None:
    file = small / "index" / f"{column}.npy"
    whole = file.read_bytes()
    for content in (whole[:50], b"", whole[:-8]):
        file.write_bytes(content)
        with pytest.raises(DatasetError, match="prepare_data.py index"):
            ShardDataset(small)
    file.unlink()
    with pytest.raises(DatasetError, match="prepare_data.py index"):
        ShardDataset(small)


def test_other_format_of_the_index(small: Path) -> None:
    meta = json.loads((small / "index" / "meta.json").read_text())
    (small / "index" / "meta.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(DatasetError, match="format 99"):
        ShardDataset(small)


def test_bit_rot_is_seen(small: Path) -> None:
    dataset = ShardDataset(small)
    shard = small / "shard-00000.tar"
    data = bytearray(shard.read_bytes())
    at = data.find(dataset.read(0).pictures[0])
    data[at + 100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SampleError, match="crc32"):
        ShardDataset(small).read(0)
    assert ShardDataset(small).read_record(0)["id"] == 0


def test_shard_truncated_while_in_use(small: Path) -> None:
    dataset = ShardDataset(small)
    (small / "shard-00000.tar").write_bytes(b"")
    with pytest.raises(DatasetError, match="truncated while in use"):
        dataset.read(0)


def test_digest_tells_contents_apart(small: Path, tmp_path: Path, sample: Callable[..., Any]) -> None:
    def digest(change: int) -> str:
        folder = tmp_path / str(change)
        with ShardWriter(folder, 4) as writer:
            for number in range(10):
                name, written, pictures = sample(number, 1)
                writer.write(name, written | ({"more": 1} if number == change else {}), pictures)
        build_index(folder)
        return ShardDataset(folder).digest

    same = ShardDataset(small).digest
    assert digest(99) == same
    assert len({same, digest(0), digest(9)}) == 3


def test_pickle_and_threads(dataset: ShardDataset) -> None:
    again = pickle.loads(pickle.dumps(dataset))
    order = np.random.default_rng(0).integers(0, 53, 500).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(again.read, order))
    assert [sample.record["id"] for sample in read] == order


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_mcore.data.storage.OPEN_FILES", 3)
    with ShardWriter(tmp_path, 1) as writer:
        for number in range(20):
            writer.write(str(number), {"id": number}, [])
    build_index(tmp_path)
    dataset = ShardDataset(tmp_path)
    opened = list(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").is_dir() else []
    with ThreadPoolExecutor(8) as pool:
        assert [r["id"] for r in pool.map(dataset.read_record, list(range(20)) * 20)] == list(range(20)) * 20
    if opened:
        assert len(list(Path("/proc/self/fd").iterdir())) <= len(opened) + 4
