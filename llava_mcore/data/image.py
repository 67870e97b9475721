"""Pictures: from the bytes of a file to what the vision tower sees.

With ``resize_exactly``, ``preprocess`` gives the very numbers of transformers' ``CLIPImageProcessor`` (Pillow backend), which is
what published LLaVA checkpoints were trained behind; with ``resize_fast`` each pixel is within 2/255 of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from llava_mcore.data.errors import SampleError
from llava_mcore.data.probe import MAX_PIXELS
from llava_mcore.geometry import Cut

# `square` enlarges before it crops, and a strip of 1 x 100,000 would become a giant.
MAX_RESIZED_PIXELS = 2 * MAX_PIXELS

# From uint8 [height, width, 3] to another width and height, cubic and with antialiasing.
Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def resize_exactly(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """As transformers resizes: by Pillow."""
    return np.asarray(Image.fromarray(pixels).resize(size, resample=Image.Resampling.BICUBIC))


def resize_fast(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """By torch, which uses the CPU's vector instructions: five times as fast, and at most two of 255 steps from Pillow's."""
    import torch  # takes seconds, and not all that reads pictures resizes them

    (height, width), (to_width, to_height) = pixels.shape[:2], size
    grid = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)[None]
    # Both round between their two passes, so that the order counts. Torch goes first along rows; Pillow (13) goes first along
    # columns where that takes away more than twice as many pixels.
    by_columns = height > to_height and height - to_height > 2 * (width - to_width)
    for step in ((to_height, width), (to_height, to_width)) if by_columns else ((to_height, to_width),):
        grid = torch.nn.functional.interpolate(grid, size=step, mode="bicubic", antialias=True)
    return grid[0].permute(1, 2, 0).numpy()


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


def _pad_to_square(pixels: np.ndarray, mean: Sequence[float]) -> np.ndarray:
    """LLaVA's expand2square: centred on a square of the mean colour."""
    height, width = pixels.shape[:2]
    if width == height:
        return pixels
    side = max(width, height)
    square = np.full((side, side, 3), [int(255 * channel) for channel in mean], dtype=np.uint8)
    left, top = (side - width) // 2, (side - height) // 2
    square[top : top + height, left : left + width] = pixels
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


def preprocess(
    image: Image.Image | np.ndarray,
    mode: str,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize: Resize = resize_exactly,
) -> np.ndarray:
    """Resizes, crops and normalises.

    Args:
        image: an RGB picture, or its pixels, uint8 [height, width, 3].
        mode: ``square`` resizes the short side to ``image_size`` and cuts out the middle; ``pad`` first fills up to a square;
            ``stretch`` resizes both sides, as SigLIP's processor does.
        image_size: side of the result.
        mean: per channel, subtracted after scaling to 0..1.
        std: per channel, divided by.
        resize: exactly or fast.

    Returns:
        float32 array [3, image_size, image_size].
    """
    pixels = np.asarray(image)
    if mode == "pad":
        pixels = _pad_to_square(pixels, mean)
    elif mode not in ("square", "stretch"):
        raise ValueError(f"unknown image mode {mode!r}: pad, square and stretch are known")
    height, width = pixels.shape[:2]
    size = (image_size, image_size) if mode == "stretch" else resized(width, height, image_size)
    left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    return _normalise(resize(pixels, size)[top : top + image_size, left : left + image_size], mean, std)


def preprocess_tiles(
    image: Image.Image | np.ndarray,
    cut: Cut,
    base: bool,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize: Resize = resize_exactly,
) -> np.ndarray:
    """Cuts a picture into tiles, as LLaVA-NeXT does, and normalises them.

    Args:
        image: an RGB picture, or its pixels, uint8 [height, width, 3].
        cut: the grid, from ``geometry``.
        base: whether the whole picture, resized to a tile whatever its sides, comes first.
        image_size: side of a tile.
        mean: per channel, subtracted after scaling to 0..1.
        std: per channel, divided by.
        resize: exactly or fast.

    Returns:
        float32 array [tiles, 3, image_size, image_size], the grid row by row.
    """
    pixels = np.asarray(image)
    tiles = [resize(pixels, (image_size, image_size))] if base else []
    height, width = cut.rows * image_size, cut.columns * image_size
    left, top = (width - cut.width) // 2, (height - cut.height) // 2
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    canvas[top : top + cut.height, left : left + cut.width] = resize(pixels, (cut.width, cut.height))
    for top in range(0, height, image_size):
        for left in range(0, width, image_size):
            tiles.append(canvas[top : top + image_size, left : left + image_size])
    return np.stack([_normalise(tile, mean, std) for tile in tiles])


def _normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised pixels, float32 [3, h, w], of uint8 [h, w, 3]."""
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
