"""Runs over shards that mix pictures, videos, sounds and text, with bad files of many kinds among them."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_material import encode, photo, read_barcode, silent_wav, sound, video
from PIL import Image

from llava_mcore.data import prepare
from llava_mcore.data.account import Account
from llava_mcore.data.conversation import IGNORE, encode_conversation
from llava_mcore.data.errors import DatasetError
from llava_mcore.data.index import build_index
from llava_mcore.data.lengths import build_lengths
from llava_mcore.data.loader import Step, StreamLoader
from llava_mcore.data.order import Order
from llava_mcore.data.plan import Planner
from llava_mcore.data.quarantine import BadSample
from llava_mcore.data.sample import rendering_of
from llava_mcore.data.shards import ShardDataset, ShardWriter
from llava_mcore.data.sources import open_blend
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.geometry import Geometry
from llava_mcore.settings.schema import DataSettings

IMAGE_ID = 3
EACH = 16
DATA = DataSettings(sequence_length=512, decoder="python", video_frames=4, image_mode="pad", packing_window=64)


def turns(question: str, answer: str = "It is a seven.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def load(
    folder: Path, tokenizer: Tokenizer, sp_file: Path, data: DataSettings = DATA, size: int = 1
) -> tuple[ShardDataset, list[Step]]:
    """One epoch in one step, as all ranks see it."""
    build_index(folder)
    build_lengths(folder, sp_file, rendering_of(data))
    dataset = ShardDataset(folder)
    steps = []
    for rank in range(size):
        plans = Planner(
            open_blend(replace(data, path=str(folder)), tokenizer, 1, len(dataset)),
            data,
            Geometry(112, 4),
            seed=1,
            global_batch_size=len(dataset),
            total_samples=len(dataset),
        )
        steps += list(StreamLoader(plans, tokenizer, data, IMAGE_ID, rank=rank, size=size, micro_batch_size=1))
    account = Account()
    for step in steps:
        account.merge(step.account)
    assert account.close(0, 0, Order(dataset.shard_sizes, 1)) is None
    return dataset, steps


@pytest.mark.parametrize("backend", ["python", "auto"])
def test_one_run_mixes_all(tmp_path: Path, tokenizer: Tokenizer, sp_file: Path, backend: Any) -> None:
    jpeg = encode(photo(150, 120), "JPEG")
    clip = video(frames=40, sound_seconds=0.4)
    samples = [
        ("text", "What?", []),
        ("one", "<image>", [("jpg", jpeg)]),
        ("two", "<image> and <image>", [("jpg", jpeg), ("png", encode(photo(60, 60), "PNG"))]),
        ("clip", "<video> What?", [("mp4", clip)]),
        ("short", "<video>", [("webm", video("webm", "libvpx-vp9", frames=3))]),
        ("both", "<image> then <video>", [("jpg", jpeg), ("mp4", clip)]),
        ("turned", "<video> then <image>", [("mp4", clip), ("jpg", jpeg)]),
        ("heard", "<audio> <image>", [("wav", sound("wav")), ("jpg", jpeg)]),
    ]
    with ShardWriter(tmp_path) as writer:
        for name, question, media in samples:
            writer.write(name, {"id": name, "conversations": turns(question)}, media)
    data = replace(DATA, decoder=backend)
    dataset, steps = load(tmp_path, tokenizer, sp_file, data, size=2)
    assert not any(step.bad or step.left_out for step in steps)
    assert steps[0].samples == 8 and steps[0].pictures == 0 + 1 + 2 + 4 + 3 + 5 + 5 + 1
    batches = [batch for step in steps for batch in step.batches]
    assert sum(len(batch.pixel_values_NCHW) for batch in batches) == steps[0].pictures
    assert sum(len(batch.image_index_E) for batch in batches) == steps[0].pictures * EACH
    for batch in batches:
        assert (batch.input_ids_T[batch.image_index_E] == IMAGE_ID).all()
        assert len(batch.image_index_E) == len(batch.pixel_values_NCHW) * EACH
    # Frames of the videos are the middles of four equal parts; the short one shows all it has.
    seen = Counter(frame_number(pixels, data) for batch in batches for pixels in batch.pixel_values_NCHW.numpy())
    assert Counter([5, 15, 25, 35] * 3 + [0, 1, 2]) <= seen
    report = prepare.lint_shards(tmp_path)
    assert (report.samples, report.media, report.problems) == (8, 11, [])


def test_times_of_frames(tmp_path: Path, tokenizer: Tokenizer, sp_file: Path) -> None:
    """They are counted by the index, which is told to count them, and written into the question."""
    with ShardWriter(tmp_path) as writer:
        writer.write("clip", {"conversations": turns("<video> What?")}, [("mp4", video(frames=40))])
        writer.write("text", {"conversations": turns("What?")}, [])
    told = replace(DATA, video_time_instruction=True)
    load(tmp_path, tokenizer, sp_file)
    with pytest.raises(DatasetError, match="--video-time-instruction --video-frames-by uniform --video-frames 4") as refused:
        open_blend(replace(told, path=str(tmp_path)), tokenizer, 1, 2)
    command = re.search("run `(.*)`", str(refused.value))
    assert command is not None
    asked = command[1].replace("TOKENIZER", str(sp_file)).split()
    subprocess.run([sys.executable, *asked[1:]], check=True, cwd=Path(__file__).parents[2], capture_output=True)
    _, (step,) = load(tmp_path, tokenizer, sp_file, told)
    assert not step.bad and not step.left_out
    text = tokenizer.decode([token for batch in step.batches for token in batch.input_ids_T.tolist() if token != IMAGE_ID])
    located = (
        "The video lasts for 1.33 seconds, and 4 frames are uniformly sampled from it. These frames are located at 0.17s,0.50s,"
    )
    assert text.count(located + "0.83s,1.17s.Please answer the following questions related to this video.\nWhat?") == 1
    with pytest.raises(ValueError, match="set video_frames_by to uniform, time or fps"):
        replace(told, video_frames_by="segments")


def frame_number(pixels: np.ndarray, data: DataSettings) -> int:
    """The barcode of a frame of 192 x 128 that was padded to a square; something or other for a photograph."""
    shown = (pixels.transpose(1, 2, 0) * np.array(data.image_std) + np.array(data.image_mean)) * 255
    return read_barcode(shown[len(shown) // 6 : -(len(shown) // 6)])


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to nothing in it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def mp4_without_moov() -> bytes:
    data = video(frames=10)
    return data[: data.index(b"moov") - 4]


PICTURE = encode(photo(64, 64), "JPEG", quality=95)
CONVERSATION = json.dumps({"conversations": turns("<image>")}).encode()
NOISE = encode(photo(200, 200), "PNG")

# What is planted: members of the sample, and what comes of it: "fine", what the index says, or what decoding says.
PLANTED: dict[str, tuple[dict[str, bytes], str, str]] = {
    "good": ({"jpg": PICTURE}, "fine", ""),
    "cmyk": ({"jpg": encode(photo(64, 64).convert("CMYK"), "JPEG")}, "fine", ""),
    "deep": ({"png": encode(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)), "PNG")}, "fine", ""),
    "misnamed-picture": ({"png": PICTURE}, "fine", ""),
    "zero-bytes": ({"jpg": b""}, "index", "is empty"),
    "wrong-extension": ({"jpg": sound("wav", seconds=0.1)}, "index", "not a JPEG, PNG or WebP picture: WAV file"),
    "header-cut": ({"jpg": PICTURE[:20]}, "index", "ends inside its header|broken JPEG|without a size"),
    "bomb": ({"png": png_of(20_000, 20_000)}, "index", "20000 x 20000 pixels exceeds the limit"),
    "html": ({"jpg": b"<html>not found</html>"}, "index", "text .XML or HTML"),
    "moov-less": ({"mp4": mp4_without_moov()}, "index", "no moov atom"),
    "video-cut": ({"mp4": video(frames=30, faststart=True)[:-3000]}, "index", "cut short|not a readable video"),
    "silent": ({"jpg": PICTURE, "wav": silent_wav()}, "index", "no sample|no sound|empty|holds"),
    "no-conversation": ({"jpg": PICTURE, "json": b"{}"}, "index", "no `conversations`"),
    "broken-json": ({"jpg": PICTURE, "json": b'{"conversations": ['}, "index", "is not JSON"),
    "no-answer": ({"jpg": PICTURE, "json": json.dumps({"conversations": turns("<image>")[:1]}).encode()}, "index", "no answer"),
    "no-picture": ({}, "index", "1 `<image>` in the text, but 0 pictures"),
    "picture-cut": ({"png": NOISE[: len(NOISE) // 2]}, "decoding", "corrupt or truncated"),
    "pixels-damaged": ({"png": NOISE[:2000] + b"\0" * 400 + NOISE[2400:]}, "decoding", "corrupt or truncated"),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        for name, (members, _, _) in PLANTED.items():
            for extension, data in {"json": CONVERSATION, **members}.items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("backend", ["python", "auto"])
def test_planted_bad_files(planted: Path, tokenizer: Tokenizer, sp_file: Path, backend: Any) -> None:
    """Each kind has its outcome: used, left out by the index, or masked when decoding fails; the rest is not touched."""
    assert len([name for name, (_, outcome, _) in PLANTED.items() if outcome != "fine"]) >= 12
    dataset, (step,) = load(planted, tokenizer, sp_file, replace(DATA, decoder=backend))
    left_out = {sample.key: sample for sample in step.left_out}
    bad = {sample.key: sample for sample in step.bad}
    for name, (_, outcome, reason) in PLANTED.items():
        found: dict[str, BadSample] = {"index": left_out, "decoding": bad}.get(outcome, {})
        assert (name in left_out, name in bad) == (outcome == "index", outcome == "decoding"), (
            name,
            left_out.get(name),
            bad.get(name),
        )
        if outcome != "fine":
            assert re.search(reason, found[name].error), (name, found[name].error)
    fine = [name for name, (_, outcome, _) in PLANTED.items() if outcome == "fine"]
    assert step.samples == step.pictures == len(fine) + len(bad)
    learned = sum(int((batch.labels_T != IGNORE).sum()) for batch in step.batches)
    alone = int(
        (
            encode_conversation(
                turns("<image>"), tokenizer, "vicuna_v1", num_images=1, image_tokens_each=EACH, image_token_id=IMAGE_ID
            ).labels
            != IGNORE
        ).sum()
    )
    assert learned == len(fine) * alone
    blank = sum(not pixels.any() for batch in step.batches for pixels in batch.pixel_values_NCHW)
    assert blank == len(bad)
    named = {problem.where.split(": ")[1] for problem in prepare.lint_shards(planted).problems}
    assert named == {name for name, (_, outcome, _) in PLANTED.items() if outcome != "fine"}


def test_shard_takes_videos_and_sounds(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    (media / "a.mp4").write_bytes(video(frames=10))
    (media / "b.jpg").write_bytes(PICTURE)
    (media / "c.wav").write_bytes(sound("wav", seconds=0.1))
    (media / "d.avi").write_bytes(b"x")
    (media / "e.mp4").write_bytes(mp4_without_moov())
    good = [
        {"id": "1", "image": "b.jpg", "video": "a.mp4", "audio": "c.wav", "conversations": turns("<image> <video> <audio>")},
        {"id": "2", "conversations": turns("What?")},
    ]
    bad = [
        ({"id": "3", "video": "d.avi", "conversations": turns("<video>")}, "a .avi is no video of a shard"),
        ({"id": "4", "video": "e.mp4", "conversations": turns("<video>")}, "no moov atom"),
        ({"id": "5", "video": "gone.mp4", "conversations": turns("<video>")}, "missing video"),
        ({"id": "6", "video": "a.mp4", "conversations": turns("nothing")}, "0 `<image>` or `<video>` in the text, but 1"),
        ({"id": "7", "audio": [3], "conversations": turns("nothing")}, "`audio` is neither"),
    ]
    source = tmp_path / "data.json"
    source.write_text(json.dumps([*good, *(record for record, _ in bad)]))
    report = prepare.shard(source, media, tmp_path / "shards", skip_bad=True)
    assert (report.samples, report.media) == (2, 3)
    for problem, (_, reason) in zip(report.problems, bad, strict=True):
        assert reason in problem.reason
    dataset = ShardDataset(tmp_path / "shards")
    assert [medium.extension for medium in dataset.media(0)] == ["jpg", "mp4", "wav"]
    assert [medium.frames for medium in dataset.media(0)] == [0, 10, 0] and dataset.media(0)[2].audio_samples == 1600
