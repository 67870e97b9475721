"""Pictures and clips a second on all cores of the CPU, against what is usually done. ``benchmarks/data.py`` runs them.

All sides give float32 tensors of 336 pixels, normalised as CLIP's, from bytes in memory or in a tar that the system has cached.
The peers resize with Pillow, ours as ``data.decoder=auto``, within 2/255 of that.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from _common import Measure, alternate
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from webdataset import WebDataset, WebLoader
from webdataset.writer import TarWriter

from llava_mcore.data.dali_pipelines import PixelSettings
from llava_mcore.data.decode import Decoder, Request
from llava_mcore.data.image import preprocess
from llava_mcore.data.video import FrameChoice

SIDE, BATCH, STEP, SHARDS = 336, 32, 96, 8
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(640, 427), (427, 640), (640, 480), (800, 600), (1024, 683), (1280, 720)]
CORES = len(os.sched_getaffinity(0))
FRAMES, WANTED = 240, 8


def photograph(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """Blotches of colour at three scales and some noise, uint8 [height, width, 3]; its JPEG is about a photograph's size."""
    picture = np.zeros((height, width, 3))
    for cells, weight in ((6, 0.5), (40, 0.3), (200, 0.2)):
        blotches = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += weight * np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(picture + random.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def jpegs(count: int) -> list[bytes]:
    """JPEGs of quality 90 and of the sizes of ``SIZES``."""
    random = np.random.default_rng(0)
    encoded = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(photograph(*SIZES[number % len(SIZES)], random)).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


def _ours(pictures: list[bytes], decoder: Decoder) -> float:
    """Pictures a second of the decoder of this project, which the loader asks for all pictures of a step at a time."""
    began = time.perf_counter()
    for first in range(0, len(pictures), STEP):
        results = decoder.decode([Request("jpg", data) for data in pictures[first : first + STEP]])
        torch.from_numpy(np.stack([result for result in results if isinstance(result, np.ndarray)]))
    return len(pictures) / (time.perf_counter() - began)


def _consumed(loader: Any, count: int) -> float:
    """Pictures a second of a loader, its start with running workers included."""
    began, seen = time.perf_counter(), 0
    for batch in loader:
        seen += len(batch)
    assert seen == count, f"{seen} of {count} pictures"
    return seen / (time.perf_counter() - began)


class LeanPillow(Dataset[torch.Tensor]):
    """Pillow's decoder and resize and float32 arithmetic, with nothing in between."""

    def __init__(self, pictures: list[bytes]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self._pictures[index])).convert("RGB")
        width, height = image.size
        scale = SIDE / min(width, height)
        image = image.resize((max(SIDE, int(width * scale)), max(SIDE, int(height * scale))), Image.Resampling.BICUBIC)
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + SIDE, top + SIDE))))
        scaled = pixels.permute(2, 0, 1).float().div_(255)
        return scaled.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


class HuggingFace:
    """Transformers' processor, as a step of a webdataset."""

    def __init__(self) -> None:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self._processor = CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD)
        )

    def __call__(self, sample: dict[str, Any]) -> torch.Tensor:
        return self._processor(sample["jpg"], return_tensors="pt")["pixel_values"][0]


def _against_loader(count: int, rounds: int, at_least: float, name: str, make: Callable[[list[bytes], Path], Any]) -> Measure:
    pictures = jpegs(count)
    with tempfile.TemporaryDirectory() as folder, Decoder(pixels(), threads=CORES) as decoder:
        loader = make(pictures, Path(folder))
        figures = alternate(lambda _: _ours(pictures, decoder), lambda _: _consumed(loader, count), rounds)
        size = sum(map(len, pictures)) / len(pictures) / 1024
        how = decoder.describe()
        note = f"{count} JPEGs of {size:.0f} KiB to {SIDE} px on {CORES} cores; {how}. Peer: {name}, {CORES} processes"
    return Measure(*figures, "pictures/s", at_least, "higher", note)


def pixels() -> PixelSettings:
    """What every side makes of a picture."""
    return PixelSettings(SIDE, "square", MEAN, STD)


def pictures_dataloader(quick: bool) -> Measure:
    """Against torch's DataLoader over Pillow."""

    def make(pictures: list[bytes], _: Path) -> Any:
        # Not forked: DALI hangs in a child that is forked after its use.
        return DataLoader(
            LeanPillow(pictures), BATCH, num_workers=CORES, multiprocessing_context="spawn", persistent_workers=True
        )

    return _against_loader(96 if quick else 768, 2 if quick else 7, 1.3, "torch DataLoader with Pillow", make)


def pictures_webdataset(quick: bool) -> Measure:
    """Against webdataset's WebLoader with transformers' processor."""

    def make(pictures: list[bytes], folder: Path) -> Any:
        for shard in range(SHARDS):
            with open(folder / f"{shard}.tar", "wb") as file, TarWriter(file, encoder=False) as tar:
                for number, data in enumerate(pictures[shard::SHARDS]):
                    tar.write({"__key__": f"{number:06d}", "jpg": data})
        shards = [str(path) for path in sorted(folder.glob("*.tar"))]
        dataset = WebDataset(shards, shardshuffle=False).decode("pil").map(HuggingFace()).batched(BATCH, collation_fn=torch.stack)
        return WebLoader(dataset, batch_size=None, num_workers=CORES, multiprocessing_context="spawn", persistent_workers=True)

    return _against_loader(
        96 if quick else 768, 2 if quick else 7, 1.8, "webdataset WebLoader with transformers' processor", make
    )


# ---- clips ----


def clip(seed: int) -> bytes:
    """8 seconds of H.264 (x264's defaults, a keyframe every 60 frames): a camera wanders over a large photograph."""
    random = np.random.default_rng(seed)
    width, height = 640, 360
    scene = photograph(2 * width, 2 * height, random).astype(np.float32)
    noise = random.normal(0, 4, (8, height, width, 3)).astype(np.float32)
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(file.name, "w", format="mp4") as output:
            stream = output.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.gop_size = 60
            for number in range(FRAMES):
                left = int(width / 2 * (1 + np.sin(number / 40 + seed)))
                top = int(height / 2 * (1 + np.cos(number / 55)))
                seen = scene[top : top + height, left : left + width] + noise[number % len(noise)]
                frame = av.VideoFrame.from_ndarray(np.clip(seen, 0, 255).astype(np.uint8), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 30)
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        return file.read()


def sequential(data: bytes) -> int:
    """The frames of a clip by reading it from its start, and their tensor. Returns its size, to send nothing back."""
    wanted = {int((part + 0.5) * FRAMES / WANTED) for part in range(WANTED)}

    def frames() -> Iterator[np.ndarray]:
        with av.open(io.BytesIO(data)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    yield preprocess(Image.fromarray(frame.to_ndarray(format="rgb24")), "square", SIDE, MEAN, STD)
                if number == max(wanted):
                    return

    return np.stack(list(frames())).size


def clips(quick: bool) -> Measure:
    """Against a sequential read with PyAV in as many processes."""
    made = [clip(seed) for seed in range(2 if quick else 4)]
    work = made * (4 if quick else 12)
    requests = [Request("mp4", data) for data in work]
    with (
        multiprocessing.get_context("spawn").Pool(CORES) as pool,
        Decoder(pixels(), FrameChoice("uniform", WANTED), threads=CORES) as decoder,
    ):

        def ours(_: int) -> float:
            began = time.perf_counter()
            for first in range(0, len(requests), STEP // WANTED):  # as a loader asks for those of a step
                results = decoder.decode(requests[first : first + STEP // WANTED])
                assert all(isinstance(result, np.ndarray) and len(result) == WANTED for result in results)
            return len(work) / (time.perf_counter() - began)

        def peer(_: int) -> float:
            began = time.perf_counter()
            assert len(set(pool.map(sequential, work, chunksize=1))) == 1
            return len(work) / (time.perf_counter() - began)

        figures = alternate(ours, peer, 2 if quick else 7)
    note = (
        f"{WANTED} of {FRAMES} frames of 640 x 360, H.264, {len(made[0]) / 1024:.0f} KiB, to {SIDE} px on {CORES} cores. "
        f"Peer: PyAV from the start to the last frame, {CORES} processes"
    )
    return Measure(*figures, "clips/s", 1.2, "higher", note)


MEASURES = {"pictures_dataloader": pictures_dataloader, "pictures_webdataset": pictures_webdataset, "clips": clips}
