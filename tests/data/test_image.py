from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_mcore.data.errors import SampleError
from llava_mcore.data.image import open_rgb, picture_info, preprocess

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIZES = [(1, 1), (1, 1000), (1000, 1), (37, 500), (500, 37), (28, 28), (29, 28), (336, 337), (640, 427), (101, 99)]
MODES = ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F"]

Pixels = np.ndarray[Any, Any]


def picture_of(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    if mode in ("I;16", "I", "F"):
        values = rng.integers(0, 65536, (height, width))
        return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    if mode in ("RGBA", "LA"):
        return Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA").convert(mode)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def clip() -> Callable[[Any, int], Pixels]:
    transformers_clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")

    def process(image: Image.Image, size: int) -> Pixels:
        processor = transformers_clip.CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=list(MEAN), image_std=list(STD)
        )
        return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])

    return process


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [28, 224])
def test_square_is_bit_equal_to_transformers(clip: Callable[[Any, int], Pixels], size: tuple[int, int], side: int) -> None:
    image = picture_of("RGB", *size)
    ours = preprocess(open_rgb(encoded(image, "PNG")), "square", side, MEAN, STD)
    theirs = clip(image, side)
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == (3, side, side)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_bit_equal_to_transformers(clip: Callable[[Any, int], Pixels], mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "F", "I") else "PNG"
    data = encoded(picture_of(mode, 61, 43), kind)
    theirs = clip(Image.open(io.BytesIO(data)), 56)
    assert np.array_equal(preprocess(open_rgb(data), "square", 56, MEAN, STD), theirs)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_and_webp(clip: Callable[[Any, int], Pixels], mode: str) -> None:
    for kind in ("JPEG", "WEBP") if mode == "RGB" else ("JPEG",):
        data = encoded(picture_of(mode, 61, 43), kind)
        assert np.array_equal(preprocess(open_rgb(data), "square", 56, MEAN, STD), clip(Image.open(io.BytesIO(data)), 56))


def test_palette_with_transparency(clip: Callable[[Any, int], Pixels]) -> None:
    data = encoded(picture_of("P", 61, 43), "PNG", transparency=3)
    assert np.array_equal(preprocess(open_rgb(data), "square", 56, MEAN, STD), clip(Image.open(io.BytesIO(data)), 56))


@pytest.mark.parametrize("size", SIZES)
def test_pad_is_llavas_expand2square_before_transformers(clip: Callable[[Any, int], Pixels], size: tuple[int, int]) -> None:
    image = picture_of("RGB", *size)
    width, height = size
    background = tuple(int(channel * 255) for channel in MEAN)
    if width == height:
        square = image
    elif width > height:
        square = Image.new("RGB", (width, width), background)
        square.paste(image, (0, (width - height) // 2))
    else:
        square = Image.new("RGB", (height, height), background)
        square.paste(image, ((height - width) // 2, 0))
    assert background == (122, 116, 104)
    assert np.array_equal(preprocess(image, "pad", 56, MEAN, STD), clip(square, 56))


def test_picture_info_reads_the_header_only(picture: Callable[..., bytes]) -> None:
    assert picture_info(picture(21, 34, "PNG")[:200]) == ("PNG", 21, 34)
    assert picture_info(picture(21, 34, "JPEG")) == ("JPEG", 21, 34)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_picture(picture: Callable[..., bytes], kind: str, share: float) -> None:
    data = picture(64, 64, kind)
    with pytest.raises(SampleError, match="picture"):
        open_rgb(data[: int(len(data) * share)])


def test_garbage_and_wrong_kinds() -> None:
    for data in (b"", b"not a picture", b"\x00" * 1000, b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        with pytest.raises(SampleError, match="not a readable picture"):
            open_rgb(data)


def test_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(SampleError, match="too large|limit"):
        open_rgb(bomb)


def test_between_pillows_limits_is_refused_too() -> None:
    data = encoded(Image.new("1", (10_000, 10_000)), "PNG")
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(SampleError, match="10000 x 10000"):
        open_rgb(data)


def test_strip_that_would_become_a_giant() -> None:
    strip = Image.new("RGB", (1, 2000))
    with pytest.raises(SampleError, match="data.image_mode=pad"):
        preprocess(strip, "square", 336, MEAN, STD)
    assert preprocess(strip, "pad", 28, MEAN, STD).shape == (3, 28, 28)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="pad, square and stretch are known"):
        preprocess(Image.new("RGB", (4, 4)), "squeeze", 28, MEAN, STD)
