from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_mcore.data.conversation import Rendering, encode_conversation
from llava_mcore.data.errors import DatasetError
from llava_mcore.data.index import build_index
from llava_mcore.data.lengths import build_lengths, load_lengths, summary
from llava_mcore.data.shards import ShardDataset, ShardWriter
from llava_mcore.data.tokenizer import Tokenizer

Sample = Callable[[int, int], tuple[str, dict[str, Any], list[tuple[str, bytes]]]]


def test_lengths_are_those_of_the_encoded_samples(dataset: ShardDataset, tokenizer: Tokenizer) -> None:
    lengths = load_lengths(dataset, tokenizer, Rendering())
    for index in range(len(dataset)):
        pictures = dataset.num_pictures(index)
        tokens = encode_conversation(
            dataset.read_record(index)["conversations"],
            tokenizer,
            "vicuna_v1",
            num_images=pictures,
            image_tokens_each=16,
            image_token_id=3,
        )
        assert lengths.text[index] + 16 * pictures == len(tokens.input_ids)
        assert lengths.head[index] + 16 * pictures == (tokens.image_slots[-1] + 1 if pictures else 0)
    assert summary(lengths)["samples"] == 53 and not lengths.rejected


def test_processes_and_progress(dataset: ShardDataset, sp_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(dataset.path, tmp_path / "copy")
    build_index(tmp_path / "copy")  # which forgets lengths
    done: list[int] = []
    lengths = build_lengths(tmp_path / "copy", sp_file, "vicuna_v1", done.append, processes=2)
    assert np.array_equal(lengths.columns, load_lengths(dataset, tokenizer, Rendering()).columns)
    assert sum(done) == 53
    files = sorted(path.name for path in (tmp_path / "copy" / "index").iterdir() if "lengths" in path.name)
    assert [name.split(".")[-1] for name in files] == ["json", "npy"]


def test_what_makes_no_conversation_is_named(tmp_path: Path, sample: Sample, sp_file: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for number in range(6):
            name, record, pictures = sample(number, 1)
            if number == 1:
                pictures = [("png", b"no picture")]
            if number == 3:
                record["conversations"][0]["from"] = "nobody"
            if number == 4:
                pictures = []
            writer.write(name, record, pictures)
    build_index(tmp_path)
    lengths = build_lengths(tmp_path, sp_file, "vicuna_v1")
    assert sorted(lengths.rejected) == [1, 3, 4] and (lengths.text == 0).nonzero()[0].tolist() == [1, 3, 4]
    assert (
        "not a JPEG, PNG or WebP" in lengths.rejected[1]
        and "'nobody'" in lengths.rejected[3]
        and "0 pictures" in lengths.rejected[4]
    )


def test_missing_and_damaged_lengths_say_the_command(
    dataset: ShardDataset, sp_file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    command = f"prepare_data.py index {dataset.path} --tokenizer tok --template plain"
    with pytest.raises(DatasetError, match="no text lengths for this tokenizer and template plain") as caught:
        load_lengths(dataset, tokenizer, Rendering("plain"), "tok")
    assert command in str(caught.value)
    shutil.copytree(dataset.path, tmp_path / "copy")
    copy = ShardDataset(tmp_path / "copy")
    for pattern in ("lengths-*.npy", "lengths-*.json"):
        (file,) = (tmp_path / "copy" / "index").glob(pattern)
        whole = file.read_bytes()
        file.write_bytes(whole[:-20])
        with pytest.raises(DatasetError, match="text lengths of .* are damaged .*prepare_data.py index"):
            load_lengths(copy, tokenizer, Rendering())
        file.write_bytes(whole)
    load_lengths(copy, tokenizer, Rendering())


def test_another_tokenizer_has_other_lengths(dataset: ShardDataset, sp_file: Path, tmp_path: Path) -> None:
    from llava_mcore.data.tokenizer import load_tokenizer

    shutil.copy(sp_file, tmp_path / "tokenizer.model")
    load_lengths(dataset, load_tokenizer(tmp_path), Rendering())  # the path does not matter
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    with pytest.raises(DatasetError, match="no text lengths"):
        load_lengths(dataset, load_tokenizer(tmp_path), Rendering())
