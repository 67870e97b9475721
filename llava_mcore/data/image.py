"""Pictures: from the bytes of a file to what the vision tower sees.

``preprocess`` gives the very numbers of transformers' ``CLIPImageProcessor`` (Pillow backend), which is what published LLaVA
checkpoints were trained behind.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from llava_mcore.data.errors import SampleError
from llava_mcore.data.probe import MAX_PIXELS
from llava_mcore.geometry import Cut

# `square` enlarges before it crops, and a strip of 1 x 100,000 would become a giant.
MAX_RESIZED_PIXELS = 2 * MAX_PIXELS


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError(f"picture is too large ({error})") from error
    except Exception as error:  # Pillow's plugins raise what they like on broken bytes
        raise SampleError(f"not a readable picture ({len(data)} bytes: {type(error).__name__})") from error
    if image.width * image.height > MAX_PIXELS:
        raise SampleError(f"picture of {image.width} x {image.height} pixels exceeds the limit of {MAX_PIXELS} pixels")
    return image


def picture_info(data: bytes) -> tuple[str, int, int]:
    """Format (``JPEG``, ``PNG``, ...), width and height, from the header alone."""
    image = _open(data)
    return image.format or "", image.width, image.height


def open_rgb(data: bytes) -> Image.Image:
    """Decodes a picture to RGB.

    Like transformers (and unlike LLaVA's own ``convert("RGB")``, which shows whatever colour hides under full transparency)
    transparent pixels are laid on white. EXIF rotation is not applied, as in both. Gray of 16 bits is clipped at 255,
    as in transformers.

    Raises:
        SampleError: the bytes are no picture, are cut short, or the picture is too large.
    """
    image = _open(data)
    try:
        image.load()
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            layer = image.convert("RGBA")
            white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, layer).convert("RGB")
        return image.convert("RGB")
    except Exception as error:  # as above
        raise SampleError(f"picture is corrupt or truncated ({type(error).__name__}: {error})") from error


def _pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """LLaVA's expand2square: centred on a square of the mean colour."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def resized(width: int, height: int, image_size: int) -> tuple[int, int]:
    """Width and height after the short side has become ``image_size``; the long one is cut to whole pixels, as in transformers.

    Raises:
        SampleError: the long side would become absurd.
    """
    long = int(image_size * max(width, height) / min(width, height))
    if long * image_size > MAX_RESIZED_PIXELS:
        raise SampleError(f"picture of {width} x {height} pixels is too narrow to resize; use data.image_mode=pad")
    return (image_size, long) if width <= height else (long, image_size)


def preprocess(image: Image.Image, mode: str, image_size: int, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Resizes, crops and normalises.

    Args:
        image: an RGB picture.
        mode: ``square`` resizes the short side to ``image_size`` and cuts out the middle; ``pad`` first fills up to a square;
            ``stretch`` resizes both sides, as SigLIP's processor does.
        image_size: side of the result.
        mean: per channel, subtracted after scaling to 0..1.
        std: per channel, divided by.

    Returns:
        float32 array [3, image_size, image_size].
    """
    if mode == "pad":
        image = _pad_to_square(image, mean)
    elif mode not in ("square", "stretch"):
        raise ValueError(f"unknown image mode {mode!r}: pad, square and stretch are known")
    size = (image_size, image_size) if mode == "stretch" else resized(image.width, image.height, image_size)
    image = image.resize(size, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return _pixels(image.crop((left, top, left + image_size, top + image_size)), mean, std)


def preprocess_tiles(
    image: Image.Image, cut: Cut, base: bool, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Cuts a picture into tiles, as LLaVA-NeXT does, and normalises them.

    Args:
        image: an RGB picture.
        cut: the grid, from ``geometry``.
        base: whether the whole picture, resized to a tile whatever its sides, comes first.
        image_size: side of a tile.
        mean: per channel, subtracted after scaling to 0..1.
        std: per channel, divided by.

    Returns:
        float32 array [tiles, 3, image_size, image_size], the grid row by row.
    """
    how = Image.Resampling.BICUBIC
    tiles = [image.resize((image_size, image_size), resample=how)] if base else []
    canvas = Image.new("RGB", (cut.columns * image_size, cut.rows * image_size))
    whole = image.resize((cut.width, cut.height), resample=how)
    canvas.paste(whole, ((canvas.width - cut.width) // 2, (canvas.height - cut.height) // 2))
    for top in range(0, canvas.height, image_size):
        for left in range(0, canvas.width, image_size):
            tiles.append(canvas.crop((left, top, left + image_size, top + image_size)))
    return np.stack([_pixels(tile, mean, std) for tile in tiles])


def _pixels(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised pixels, float32 [3, h, w]."""
    pixels = np.asarray(image)
    table = _normalised(tuple(mean), tuple(std))
    result = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[:, :, channel], out=result[channel])
    return result


@lru_cache(maxsize=8)
def _normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """What each of 256 values becomes in each channel, float32 [3, 256]."""
    # The order of operations and of types is transformers', to the last bit: scale in float64, normalise in float32.
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.asarray(mean, dtype=np.float32)[:, None]) / np.asarray(std, dtype=np.float32)[:, None]
