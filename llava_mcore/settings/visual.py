"""What can be set of how many embeddings a picture or a clip becomes. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from llava_mcore.geometry import Anyres, Frames
from llava_mcore.settings.rules import STRICT, Positive, fail_on


@dataclass(config=STRICT, kw_only=True)
class AnyresSettings:
    """Pictures of several tiles (LLaVA-NeXT's anyres): the whole one small, then a grid of tiles of it."""

    grids: list[tuple[Positive, Positive]] = Field(
        default=[(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)],
        description="rows and columns of tiles a picture may be cut into; the best for its size is taken, the first among equals "
        "(image_grid_pinpoints divided by the tower's image_size)",
    )
    merge: Literal["flat", "spatial", "unpad", "maxpool2x2"] = Field(
        default="unpad",
        description="embeddings tile after tile (flat), row by row over the whole grid (spatial), without the margins and with a "
        "learned newline after each row (unpad), or the largest of every 2 x 2 (maxpool2x2)",
    )
    base: bool = Field(default=True, description="the whole picture as a tile before the grid; false: nobase")
    max_tiles: Positive | None = Field(
        default=None, description="anyres_max_N: a grid of more embeddings than N tiles' is interpolated down (null: never)"
    )
    convention: Literal["hf", "llava"] = Field(
        default="hf",
        description="how a margin's length is rounded: as transformers does, or as LLaVA's own code (0.01 % of sizes differ)",
    )
    several: Literal["tiles", "single"] = Field(
        default="tiles",
        description="pictures of a sample that has several: each cut into tiles, or one tile as data.image_mode makes it",
    )

    @model_validator(mode="after")
    def _check(self) -> AnyresSettings:
        problems = []
        if not self.grids:
            problems.append("grids is empty; name at least one, as [[1, 2], [2, 1], [2, 2]], or set anyres=null")
        if self.max_tiles is not None and self.merge != "unpad":
            problems.append(f"max_tiles needs merge=unpad, not {self.merge}")
        fail_on(problems)
        return self

    @property
    def geometry(self) -> Anyres:
        """As the geometry has it."""
        grids = tuple((rows, columns) for rows, columns in self.grids)
        return Anyres(grids, self.merge, self.base, self.max_tiles, self.convention, self.several)


@dataclass(config=STRICT, kw_only=True)
class VideoSettings:
    """Frames of a clip: how they are pooled, and what is put between them."""

    pool: Literal["none", "average", "max", "bilinear"] = Field(
        default="none", description="how a frame's features are made fewer (bilinear: interpolated, as LLaVA-OneVision does)"
    )
    stride: Positive = Field(default=2, description="by how much along each side, where they are pooled")
    pool_at: Literal["before_projector", "after_projector"] = Field(
        default="after_projector", description="where (transformers' LLaVA-NeXT-Video: before)"
    )
    newline: Literal["grid", "frame", "one_token", "no_token"] = Field(
        default="no_token",
        description="the learned newline after each row of a frame, after each frame, after the clip, or nowhere",
    )
    slow_every: Positive | None = Field(
        default=None,
        description="SlowFast: every so many frames one is pooled by stride, those between by twice as much, and a learned token "
        "ends each (null: all frames alike; LLaVA-Video: 10)",
    )

    time_period: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="a sinusoid of each frame's time is added to its embeddings, through a gate that is learned from zero; its "
        "frequencies go from 1 radian a second down to one in so many seconds (null: frames are told no time)",
    )

    @model_validator(mode="after")
    def _check(self) -> VideoSettings:
        fail_on(["slow_every needs pool=average, max or bilinear"] if self.slow_every and self.pool == "none" else [])
        return self

    @property
    def geometry(self) -> Frames:
        """As the geometry has it."""
        return Frames(self.pool, self.stride, self.newline, self.slow_every, self.time_period)
