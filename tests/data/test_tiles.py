"""Pictures of several tiles, from bytes to batches: pixels against transformers, lengths of the plan, and what the batch says."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from media_material import video
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from llava_mcore.data import decode
from llava_mcore.data.dali_pipelines import PixelSettings, dali_version
from llava_mcore.data.decode import Decoder, Request
from llava_mcore.data.index import build_index
from llava_mcore.data.lengths import build_lengths
from llava_mcore.data.loader import StreamLoader
from llava_mcore.data.plan import Planner
from llava_mcore.data.shards import ShardDataset, ShardWriter
from llava_mcore.data.sources import open_blend
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.geometry import SINGLE, Anyres, Frames, Geometry, Shape
from llava_mcore.settings.schema import DataSettings

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(1, 1), (1, 300), (300, 1), (28, 28), (29, 57), (640, 427), (101, 399), (56, 28), (200, 201)]
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
IMAGE_ID = 3
DATA = DataSettings(sequence_length=512, packing_window=0, decoder="python")


def encoded(width: int, height: int) -> bytes:
    random = np.random.default_rng(width * 1000 + height)
    out = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def decoded(geometry: Geometry, data: bytes, backend: Literal["auto", "python"] = "python", **request: Any) -> np.ndarray:
    with Decoder(PixelSettings(geometry.image_size, "pad", MEAN, STD), geometry=geometry, backend=backend) as decoder:
        (result,) = decoder.decode([Request("png", data, **request)])
    assert isinstance(result, np.ndarray)
    return result


@pytest.mark.parametrize("kind", ["next", "onevision"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_bit_equal_to_transformers(kind: str, size: tuple[int, int]) -> None:
    geometry = Geometry(28, 4, anyres=Anyres(GRIDS, max_tiles=None if kind == "next" else 2))
    pinpoints = [[28 * rows, 28 * columns] for rows, columns in GRIDS]
    side = {"height": 28, "width": 28}
    options = {"image_grid_pinpoints": pinpoints, "image_mean": list(MEAN), "image_std": list(STD), "size": side}
    if kind == "next":
        processor = LlavaNextImageProcessorPil(crop_size=side, **options)
    else:
        processor = LlavaOnevisionImageProcessorPil(**options)
    theirs = processor(Image.open(io.BytesIO(encoded(*size))), return_tensors="np")["pixel_values"][0]
    ours = decoded(geometry, encoded(*size), tiled=True)
    assert len(ours) == geometry.tiles(Shape(*size)) and ours.dtype == np.float32
    assert np.array_equal(ours, theirs)
    if kind == "onevision":  # one of several pictures: a single tile, padded to a square
        theirs = processor([[Image.open(io.BytesIO(encoded(*size)))] * 2], return_tensors="np")["pixel_values"][0]
        assert np.array_equal(decoded(geometry, encoded(*size))[None], theirs)


@pytest.mark.skipif(dali_version() is None, reason="DALI is not installed")
@pytest.mark.parametrize("size", SIZES)
def test_tiles_with_and_without_dali(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, within 2/255 of transformers'."""
    geometry, data = Geometry(28, 4, anyres=Anyres(GRIDS)), encoded(*size)
    with Decoder(PixelSettings(28, "pad", MEAN, STD), geometry=geometry) as decoder:
        (by_dali,) = decoder.decode([Request("png", data, tiled=True)])
        assert decoder.taken == {"picture by dali": 1}
    monkeypatch.setattr(decode, "dali_version", lambda: None)
    assert np.array_equal(by_dali, decoded(geometry, data, "auto", tiled=True))
    exact = decoded(geometry, data, tiled=True)
    assert by_dali.shape == exact.shape
    steps = np.abs(by_dali - exact) * np.array(STD).reshape(3, 1, 1) * 255
    assert steps.max() < 2.001


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, sp_file: Path) -> ShardDataset:
    """Samples of one picture of each size, of two, and of none."""
    folder = tmp_path_factory.mktemp("tiles")
    with ShardWriter(folder) as writer:
        for number, size in enumerate(SIZES):
            for count in (1, 2, 0):
                turns = [{"from": "human", "value": "<image>\n" * count + "What?"}, {"from": "gpt", "value": "It is a seven."}]
                writer.write(f"{number}-{count}", {"conversations": turns}, [("png", encoded(*size))] * count)
    build_index(folder)
    build_lengths(folder, sp_file, "vicuna_v1")
    return ShardDataset(folder)


@pytest.mark.parametrize("several", ["tiles", "single"])
def test_the_plan_counts_what_the_batch_holds(pictures: ShardDataset, tokenizer: Tokenizer, several: Any) -> None:
    geometry = Geometry(28, 4, anyres=Anyres(GRIDS, several=several))
    data = replace(DATA, path=str(pictures.path))
    blend = open_blend(data, tokenizer, 1, len(pictures))
    planner = Planner(blend, data, geometry, seed=1, global_batch_size=len(pictures), total_samples=len(pictures))
    (step,) = StreamLoader(planner, tokenizer, data, IMAGE_ID, rank=0, size=1, micro_batch_size=1)
    assert not step.bad and not step.left_out
    shapes = [shape for batch in step.batches for shape in batch.shapes]
    expected = [shape for size in SIZES for shape in [Shape(*size)] + [Shape(*size) if several == "tiles" else SINGLE] * 2]
    assert sorted(shapes) == sorted(expected)
    for batch in step.batches:
        assert sum(map(geometry.tiles, batch.shapes)) == len(batch.pixel_values_NCHW)
        assert sum(map(geometry.embeddings, batch.shapes)) == len(batch.image_index_E)
        assert (batch.input_ids_T == IMAGE_ID).nonzero()[:, 0].tolist() == sorted(batch.image_index_E.tolist())
    assert step.visual_tokens == sum(map(geometry.embeddings, shapes)) < step.real_tokens
    assert step.pictures == sum(map(geometry.tiles, shapes))


def test_a_picture_too_large_is_left_out_by_the_plan(pictures: ShardDataset, tokenizer: Tokenizer) -> None:
    data = replace(DATA, path=str(pictures.path), sequence_length=100)
    blend = open_blend(data, tokenizer, 1, len(pictures))
    geometry = Geometry(28, 4, anyres=Anyres(((3, 3),), merge="spatial"))
    planner = Planner(blend, data, geometry, seed=1, global_batch_size=len(pictures), total_samples=len(pictures))
    left_out = planner.step(0).left_out
    assert len(left_out) == 2 * len(SIZES) and all("its pictures do not fit" in why for _, why in left_out)


@pytest.mark.parametrize("period", [None, 60.0])
def test_frames_of_a_clip(clip_dataset: ShardDataset, tokenizer: Tokenizer, period: float | None) -> None:
    """Clips of one frame and of many: a newline for each, pooled frames, tiles as many as frames, and their times."""
    geometry = Geometry(28, 4, video=Frames("average", 2, "one_token", time_period=period))
    data = replace(DATA, path=str(clip_dataset.path), video_frames=6)
    blend = open_blend(data, tokenizer, 1, len(clip_dataset))
    planner = Planner(blend, data, geometry, seed=1, global_batch_size=len(clip_dataset), total_samples=len(clip_dataset))
    (step,) = StreamLoader(planner, tokenizer, data, IMAGE_ID, rank=0, size=1, micro_batch_size=1)
    assert not step.bad
    shapes = sorted(shape for batch in step.batches for shape in batch.shapes)
    seconds = ((0.0,), tuple(number / 30 for number in (1, 5, 8, 11, 15, 18))) if period else ((), ())
    assert [shape.frames for shape in shapes] == [1, 6]
    assert [shape.seconds for shape in shapes] == [pytest.approx(times) for times in seconds]
    assert step.visual_tokens == (1 * 4 + 1) + (6 * 4 + 1) and step.pictures == 7


@pytest.fixture
def clip_dataset(tmp_path: Path, sp_file: Path) -> ShardDataset:
    with ShardWriter(tmp_path / "clips") as writer:
        for frames in (1, 20):
            turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "It is a seven."}]
            writer.write(f"clip{frames}", {"conversations": turns}, [("mp4", video(frames=frames))])
    build_index(tmp_path / "clips")
    build_lengths(tmp_path / "clips", sp_file, "vicuna_v1")
    return ShardDataset(tmp_path / "clips")
