"""Pure arithmetic of pictures and clips: from a size to tiles, grids and the exact number of embeddings.

One truth for both sides: the loader writes as many placeholders as are counted here, the decoder cuts the tiles named here, and
the model arranges its features accordingly and never counts anything. No torch.

A picture is one tile (``data.image_mode``), or several (LLaVA-NeXT's anyres: Liu et al., 2024): a small one of the whole, then a
grid of tiles of it, whose features are put together again. A clip is a tile a frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple


def num_patches(image_size: int, patch_size: int) -> int:
    """Whole patches of a square picture of ``image_size`` pixels cut into squares of ``patch_size`` pixels.

    Pixels that fill no patch, at the right and below, are not seen (384 pixels in patches of 14 are 27 x 27 patches), as in the
    convolution of the published towers.
    """
    return (image_size // patch_size) ** 2


def num_image_embeddings(image_size: int, patch_size: int, select_feature: str) -> int:
    """Decoder embeddings one tile becomes: its patches, plus the class token for ``cls_patch``."""
    return num_patches(image_size, patch_size) + (1 if select_feature == "cls_patch" else 0)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


class Shape(NamedTuple):
    """What counts of a medium: nothing of a picture of one tile, pixels of one of several, frames of a clip.

    ``seconds`` are the times of the frames, where the model looks at them; no count depends on them.
    """

    width: int = 0
    height: int = 0
    frames: int = 0
    seconds: tuple[float, ...] = ()


SINGLE = Shape()


class Cut(NamedTuple):
    """How a picture is cut: tiles of the grid, and the pixels it is resized to, centred on the grid with black around it."""

    rows: int
    columns: int
    width: int
    height: int


@dataclass(frozen=True)
class Anyres:
    """Pictures of several tiles; the names are those of ``model.anyres``."""

    grids: tuple[tuple[int, int], ...]  # rows and columns of tiles
    merge: Literal["flat", "spatial", "unpad", "maxpool2x2"] = "unpad"
    base: bool = True
    max_tiles: int | None = None
    convention: Literal["hf", "llava"] = "hf"
    several: Literal["tiles", "single"] = "tiles"


@dataclass(frozen=True)
class Frames:
    """Clips; the names are those of ``model.video``."""

    pool: Literal["none", "average", "max", "bilinear"] = "none"
    stride: int = 1
    newline: Literal["grid", "frame", "one_token", "no_token"] = "no_token"
    slow_every: int | None = None
    time_period: float | None = None


@dataclass(frozen=True)
class Geometry:
    """What a model makes of pictures and clips.

    Attributes:
        image_size: side of a tile, in pixels.
        side: patches along it.
        class_token: whether the class token's feature is kept, before the patches'.
        anyres: how pictures are cut; None: they are one tile.
        video: how frames are pooled and told apart.
        kept: features of a tile where it is merged or pooled as a whole; None: its patches, and the class token's.
        square: side of the squares of patches that are pooled there, 1 where they are merged.
        in_place: what is left there keeps the positions of its patches in the decoder, where each patch has one; otherwise
            positions are counted.
    """

    image_size: int
    side: int
    class_token: bool = False
    anyres: Anyres | None = None
    video: Frames = Frames()
    kept: int | None = None
    square: int = 1
    in_place: bool = False

    @property
    def plain(self) -> bool:
        """Whether every tile's features are embeddings as they are, tile after tile."""
        learned = self.has_newline or self.has_faster or self.has_time
        return not learned and self.anyres is None and self.video.pool == "none"

    @property
    def has_newline(self) -> bool:
        """Whether a newline is learned."""
        return (self.anyres is not None and self.anyres.merge == "unpad") or self.video.newline != "no_token"

    @property
    def has_faster(self) -> bool:
        """Whether a token that ends frames is learned."""
        return self.video.slow_every is not None

    @property
    def has_time(self) -> bool:
        """Whether frames are told their time."""
        return self.video.time_period is not None

    def picture(self, width: int, height: int, several: bool) -> Shape:
        """The shape of a picture of so many pixels, in a sample with ``several`` or alone."""
        if self.anyres is None or (several and self.anyres.several == "single"):
            return SINGLE
        return Shape(width, height)

    def tiles(self, shape: Shape) -> int:
        """Pictures through the tower."""
        if shape.frames:
            return shape.frames
        if shape == SINGLE or self.anyres is None:
            return 1
        cut = self.cut(shape)
        return cut.rows * cut.columns + self.anyres.base

    def embeddings(self, shape: Shape) -> int:
        """Places in the stream: as many as ``models.embedding_order`` puts in order."""
        if shape.frames:
            per_clip = {"grid": 0, "frame": 0, "one_token": 1, "no_token": 0}[self.video.newline]
            return sum(self._frame_places(stride) for stride in self.strides(shape)) + per_clip
        anyres = self.anyres
        if shape == SINGLE or anyres is None:
            return self.rows(1) + (anyres is not None and anyres.merge == "unpad")
        cut, base = self.cut(shape), self.rows(1) if anyres.base else 0
        if anyres.merge == "maxpool2x2":
            return base + (cut.rows * self.side // 2) * (cut.columns * self.side // 2)
        if anyres.merge == "flat":
            return self.tiles(shape) * self.rows(1)
        if anyres.merge == "spatial":
            return base + cut.rows * cut.columns * self.side**2
        height, width = self.shrunk(*self.unpadded(shape, cut)[2:])
        return base + height * (width + 1)

    def rows(self, stride: int) -> int:
        """Rows of features of one tile, pooled by ``stride``."""
        if self.kept is not None:
            return self.kept
        return self.pooled_side(stride) ** 2 + self.class_token

    @property
    def skipped(self) -> int:
        """Positions in the decoder that a tile takes beside those of its embeddings."""
        return self.side**2 + self.class_token - self.kept if self.kept is not None and self.in_place else 0

    def offsets(self) -> tuple[int, ...]:
        """Positions of a tile's embeddings and of what follows them, from its first, ascending; 0, 1, ... where they are counted.

        Which patches merging leaves is known to the model alone: here they are spread evenly.
        """
        kept, whole = self.rows(1), self.side**2 + self.class_token
        if self.kept is None or not self.in_place:
            return tuple(range(kept + 1))
        if self.square == 1:
            return tuple(number * whole // kept for number in range(kept + 1))
        starts = range(0, self.side, self.square)
        return (*(row * self.side + column for row in starts for column in starts), whole)

    def steps(self, shape: Shape) -> tuple[int, ...]:
        """Positions in the decoder that each embedding of a medium takes, in order; a learned token takes one."""
        if not self.skipped:
            return (1,) * self.embeddings(shape)
        offsets = self.offsets()
        tile = tuple(end - start for start, end in zip(offsets, offsets[1:], strict=False))
        if not shape.frames:
            return tile * self.tiles(shape)
        frame = (*tile, 1) if self.video.newline == "frame" else tile
        return frame * shape.frames + (1,) * (self.video.newline == "one_token")

    def pooled_side(self, stride: int) -> int:
        """Patches along a tile's side after pooling: whole windows, or rounded up where it is interpolated."""
        return -(-self.side // stride) if self.video.pool == "bilinear" else self.side // stride

    def cut(self, shape: Shape) -> Cut:
        """How a picture of several tiles is cut."""
        assert self.anyres is not None
        return _cut(shape.width, shape.height, self.image_size, self.anyres.grids)

    def strides(self, shape: Shape) -> tuple[int, ...]:
        """Of each frame of a clip."""
        slow = self.video.stride if self.video.pool != "none" else 1
        every = self.video.slow_every
        return tuple(slow if every is None or frame % every == 0 else 2 * slow for frame in range(shape.frames))

    def _frame_places(self, stride: int) -> int:
        """Embeddings of one frame, with what ends its rows and itself."""
        side = self.pooled_side(stride)
        newlines = {"grid": side, "frame": 1, "one_token": 0, "no_token": 0}[self.video.newline]
        return self.rows(stride) + newlines + self.has_faster

    def unpadded(self, shape: Shape, cut: Cut) -> tuple[int, int, int, int]:
        """Of the grid of features what the picture covers: top, left, height, width.

        ``hf`` rounds a length to 7 digits before it is cut to whole patches, ``llava`` does not.
        """
        assert self.anyres is not None
        height, width = cut.rows * self.side, cut.columns * self.side
        digits = 7 if self.anyres.convention == "hf" else 17
        if shape.width / shape.height > width / height:
            margin = (height - int(round(shape.height * (width / shape.width), digits))) // 2
            # Without a picture of the whole, one that is all margin would have no embedding.
            margin = margin if self.anyres.base else min(margin, (height - 1) // 2)
            return margin, 0, height - 2 * margin, width
        margin = (width - int(round(shape.width * (height / shape.height), digits))) // 2
        margin = margin if self.anyres.base else min(margin, (width - 1) // 2)
        return 0, margin, height, width - 2 * margin

    def shrunk(self, height: int, width: int) -> tuple[int, int]:
        """The grid after ``anyres_max_N``: at most about N tiles of features (LLaVA-OneVision)."""
        if self.anyres is None or self.anyres.max_tiles is None:
            return height, width
        ratio = math.sqrt(height * width / (self.anyres.max_tiles * self.side**2))
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)


@lru_cache(maxsize=4096)
def _cut(width: int, height: int, tile: int, grids: tuple[tuple[int, int], ...]) -> Cut:
    """The grid that shows most of the picture's own pixels, then that wastes least; the first among equals (LLaVA-NeXT)."""

    def fitness(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * tile / width, rows * tile / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - rows * columns * tile * tile

    rows, columns = max(grids, key=fitness)
    across, down = columns * tile / width, rows * tile / height
    if across < down:
        return Cut(rows, columns, columns * tile, min(math.ceil(height * across), rows * tile))
    return Cut(rows, columns, min(math.ceil(width * down), columns * tile), rows * tile)
