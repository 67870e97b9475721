"""How many embeddings a picture becomes: merging and pooling of its patches, and the arithmetic of their numbers. No torch.

Sources: token merging inside the tower (ToMe; Bolya et al., 2023), on a grid of patches (ToMeSD; Bolya and Hoffman, 2023).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llava_mcore.settings.rules import STRICT, NonNegative, Positive


@dataclass(config=STRICT, kw_only=True)
class Reduction:
    """What all ways to make fewer embeddings of a picture have."""

    positions: Literal["kept", "counted"] = Field(
        default="kept",
        description="in the decoder what is left keeps the positions of its patches (of the first of a square), and text goes on "
        "after those of all patches; or positions are counted, so that more fits in model.language.max_position_embeddings",
    )


@dataclass(config=STRICT, kw_only=True)
class TokenMerging(Reduction):
    """Patches that look alike become one, at a fixed number of embeddings a picture.

    Each window of the grid keeps its upper left patch. Of the others, those most like a kept one are averaged into it: one
    anywhere in the picture, or the one of their window. Over the picture, patches of a last row or column that fills no window
    can be merged, and keep nothing. Within windows, each loses as many patches (the ratio's, rounded down), and the embeddings
    stand window by window.
    """

    ratio: float = Field(ge=0, lt=1, description="share of a picture's patches that is merged into others")
    window: int = Field(
        default=2, ge=2, description="side of the squares of patches, of each of which one patch is merged into and stays"
    )
    scope: Literal["picture", "window"] = Field(
        default="picture", description="patches are merged over the whole picture, or as many in each window within it"
    )
    where: Literal["before", "after"] = Field(default="after", description="merge before or after the projector")
    order: Literal["raster", "blocks"] = Field(
        default="raster",
        description="of what is left: as in the picture; or as ToMeSD has it, what was not merged before what was (the positions "
        "that are kept then do not ascend)",
    )
    schedule_steps: NonNegative = Field(
        default=0,
        description="steps in which the ratio rises from 0 along a quarter of a cosine, with each window of data.packing_window; "
        "0: it is there from the start",
    )

    def kept(self, side: int, ratio: float | None = None) -> int:
        """Embeddings of a picture of ``side`` x ``side`` patches, at another ratio where one is given.

        The ratio is taken as written, in decimal, so that 0.29 of 100 patches are 29 and not 28.
        """
        share = Fraction(str(self.ratio if ratio is None else ratio))
        windows, patches = ((side // self.window) ** 2, self.window**2) if self.scope == "window" else (1, side**2)
        return windows * (patches - int(patches * share))

    def ratio_at(self, step: int) -> float:
        """The ratio of a step, counted from 0: r (1 - cos(pi/2 step/steps)), then r."""
        if step >= self.schedule_steps:
            return self.ratio
        return self.ratio * (1 - math.cos(math.pi / 2 * step / self.schedule_steps))

    def problems(self, side: int) -> list[str]:
        """What is wrong with it for pictures of ``side`` x ``side`` patches."""
        windows, patches = (side // self.window) ** 2, side**2
        if not windows:
            return [
                f"token_merging.window {self.window} is larger than the picture's {side} x {side} patches; use at most {side}"
            ]
        if self.scope == "window":
            return self._window_problems(side)
        if self.kept(side) < windows:
            most = math.floor(100 * (1 - windows / patches)) / 100
            return [
                f"token_merging.ratio {self.ratio:g} leaves {self.kept(side)} of {patches} patches, but each of the {windows} "
                f"windows of {self.window} x {self.window} keeps one; use at most {most:g}, or a larger token_merging.window"
            ]
        return []

    def _window_problems(self, side: int) -> list[str]:
        found, patches = [], self.window**2
        if side % self.window:
            fitting = ", ".join(str(n) for n in range(2, side + 1) if side % n == 0)
            found.append(
                f"token_merging.window {self.window} does not divide the picture's {side} x {side} patches; use one of {fitting} "
                f"or token_merging.scope=picture"
            )
        if self.ratio and not int(patches * Fraction(str(self.ratio))):
            least = math.ceil(100 / patches) / 100
            found.append(
                f"token_merging.ratio {self.ratio:g} merges none of the {patches} patches of a window; use at least {least:g}"
            )
        if self.order == "blocks":
            found.append(
                "token_merging.order=blocks needs token_merging.scope=picture; within windows the order is that of windows"
            )
        return found


@dataclass(config=STRICT, kw_only=True)
class Pooling(Reduction):
    """Every square of patches becomes one embedding."""

    kind: Literal["average", "max", "pixel_shuffle"] = Field(
        description="the squares' mean, their largest value in each channel, or their patches side by side into a wider projector"
    )
    stride: int = Field(default=2, ge=2, description="side of the squares, in patches")
    where: Literal["before", "after"] = Field(default="before", description="pool before or after the projector")

    def kept(self, side: int) -> int:
        """Embeddings of a picture of ``side`` x ``side`` patches."""
        return (side // self.stride) ** 2

    def problems(self, side: int) -> list[str]:
        """What is wrong with it for pictures of ``side`` x ``side`` patches."""
        found = []
        if side % self.stride:
            fitting = ", ".join(str(n) for n in range(2, side + 1) if side % n == 0)
            found.append(
                f"pooling.stride {self.stride} does not divide the picture's {side} x {side} patches; use one of {fitting}"
            )
        if self.kind == "pixel_shuffle" and self.where == "after":
            found.append("pooling.kind=pixel_shuffle widens what the projector reads; set pooling.where=before")
        return found


@dataclass(config=STRICT, kw_only=True)
class TowerMerging(Reduction):
    """In every layer of the tower, between attention and MLP, the pairs of tokens whose keys are most alike become one (ToMe)."""

    tokens: Positive = Field(description="tokens that a layer merges, in the mean over the layers; never more than half of them")
    inflect: float = Field(
        default=0.0,
        ge=-1,
        le=1,
        description="slope over the layers: -1 merges most in the first and none in the last, 0 evenly, 1 reversed",
    )
    proportional_attention: bool = Field(
        default=True,
        description="a token that stands for n patches gets n times the attention; as a tower that was trained without needs it",
    )

    def merged(self, tokens: int, layers: int, class_token: bool) -> list[int]:
        """Tokens that each layer merges, of ``tokens`` with the class token."""
        first = int(self.tokens * (1 - self.inflect))
        last = 2 * self.tokens - first
        step = (last - first) / (layers - 1) if layers > 1 else 0.0
        found = []
        for layer in range(layers):
            found.append(min(int(first + step * layer), (tokens - class_token) // 2))
            tokens -= found[-1]
        return found
