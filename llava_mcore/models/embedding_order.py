"""Which row of the tower's features each embedding is, for one medium and for all of a micro-batch.

Features are arranged by one index. Where a grid is interpolated or pooled over the borders of tiles, further rows are made first,
each of four rows of features.

Shape suffixes: E embeddings, M further rows, K the rows of features each is made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llava_mcore.geometry import SINGLE, Geometry, Shape

# What an embedding is that is no row of features; further rows are counted down from the last.
NEWLINE, FASTER, FURTHER = -1, -2, -3
NO_TAPS = np.empty((0, 4), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Layout:
    """One medium.

    Attributes:
        strides: of each tile, by which its features are pooled; 1: not at all.
        index_E: int64, what each embedding is: a row of the tiles' features, one after another, or ``NEWLINE``, ``FASTER``, or
            ``FURTHER - m`` for the further row m.
        taps_MK: int64, the rows of features that each further row is made of.
        weights_MK: float32, their weights; None: the largest counts.
    """

    strides: tuple[int, ...]
    index_E: np.ndarray
    taps_MK: np.ndarray
    weights_MK: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Arrangement:
    """All media of a micro-batch.

    Attributes:
        strides: of each tile.
        seconds: when each tile is shown, nan for pictures; empty where the model does not look at it.
        rows: of features each tile becomes.
        index_E: int64, rows of [features; one newline for each use; one faster token for each use; further rows].
        newlines: uses of the newline.
        fasters: uses of the faster token.
        taps_MK: as in ``Layout``, with rows of all features.
        weights_MK: likewise.
    """

    strides: tuple[int, ...]
    seconds: tuple[float, ...]
    rows: tuple[int, ...]
    index_E: np.ndarray
    newlines: int
    fasters: int
    taps_MK: np.ndarray
    weights_MK: np.ndarray | None


def arrange(geometry: Geometry, shapes: Sequence[Shape]) -> Arrangement:
    """Tiles and arrangement of the media of a micro-batch, in order.

    Raises:
        ValueError: the model looks at the times of frames, and a clip has none.
    """
    layouts = [layout(geometry, shape._replace(seconds=())) for shape in shapes]
    seconds: list[float] = []
    for shape in shapes if geometry.has_time else ():
        if len(shape.seconds) != shape.frames:
            raise ValueError(f"a clip of {shape.frames} frames has {len(shape.seconds)} times")
        seconds += shape.seconds or [math.nan] * geometry.tiles(shape)
    strides = tuple(stride for one in layouts for stride in one.strides)
    index, taps = [np.empty(0, dtype=np.int64)], [NO_TAPS]
    features = made = 0
    for one in layouts:
        places = one.index_E
        index.append(np.where(places >= 0, places + features, np.where(places <= FURTHER, places - made, places)))
        taps.append(one.taps_MK + features)
        features += sum(map(geometry.rows, one.strides))
        made += len(one.taps_MK)
    index_E = np.concatenate(index)
    newline, faster, further = index_E == NEWLINE, index_E == FASTER, index_E <= FURTHER
    newlines, fasters = int(newline.sum()), int(faster.sum())
    index_E[further] = features + newlines + fasters + (FURTHER - index_E[further])
    index_E[newline] = features + np.arange(newlines)
    index_E[faster] = features + newlines + np.arange(fasters)
    weights = [one.weights_MK for one in layouts if one.weights_MK is not None]
    return Arrangement(
        strides,
        tuple(seconds),
        tuple(map(geometry.rows, strides)),
        index_E,
        newlines,
        fasters,
        np.concatenate(taps),
        np.concatenate(weights) if weights else None,
    )


@lru_cache(maxsize=1024)
def layout(geometry: Geometry, shape: Shape) -> Layout:
    """Tiles and arrangement of one medium."""
    if shape.frames:
        return _clip(geometry, shape)
    anyres, rows = geometry.anyres, geometry.rows(1)
    if shape == SINGLE or anyres is None:
        index = np.arange(rows, dtype=np.int64)
        newline = anyres is not None and anyres.merge == "unpad"
        return Layout((1,), np.append(index, NEWLINE) if newline else index, NO_TAPS)
    cut, side = geometry.cut(shape), geometry.side
    strides = (1,) * geometry.tiles(shape)
    first = rows if anyres.base else 0
    base = np.arange(first, dtype=np.int64)
    if anyres.merge == "flat":
        return Layout(strides, np.arange(len(strides) * rows, dtype=np.int64), NO_TAPS)
    y, x = np.arange(cut.rows * side)[:, None], np.arange(cut.columns * side)[None]
    grid = first + (y // side * cut.columns + x // side) * rows + y % side * side + x % side
    if anyres.merge == "spatial":
        return Layout(strides, np.concatenate([base, grid.ravel()]), NO_TAPS)
    if anyres.merge == "maxpool2x2":
        down, across = grid.shape[0] // 2, grid.shape[1] // 2
        windows = grid[: 2 * down, : 2 * across].reshape(down, 2, across, 2).swapaxes(1, 2).reshape(-1, 4)
        return Layout(strides, np.concatenate([base, FURTHER - np.arange(len(windows))]), windows)
    top, left, height, width = geometry.unpadded(shape, cut)
    grid = grid[top : top + height, left : left + width]
    taps, weights = NO_TAPS, None
    if geometry.shrunk(height, width) != (height, width):
        height, width = geometry.shrunk(height, width)
        taps, weights = _bilinear(grid, height, width)
        grid = FURTHER - np.arange(height * width).reshape(height, width)
    lines = np.concatenate([grid, np.full((len(grid), 1), NEWLINE)], axis=1)
    return Layout(strides, np.concatenate([base, lines.ravel()]), taps, weights)


def _clip(geometry: Geometry, shape: Shape) -> Layout:
    strides = geometry.strides(shape)
    parts, first = [], 0
    for stride in strides:
        rows, side = geometry.rows(stride), geometry.pooled_side(stride)
        places = np.arange(first, first + rows, dtype=np.int64)
        if geometry.video.newline == "grid":
            places = np.concatenate([places.reshape(side, side), np.full((side, 1), NEWLINE)], axis=1).ravel()
        ends = [NEWLINE] * (geometry.video.newline == "frame") + [FASTER] * geometry.has_faster
        parts.append(np.concatenate([places, np.array(ends, dtype=np.int64)]))
        first += rows
    if geometry.video.newline == "one_token":
        parts.append(np.array([NEWLINE], dtype=np.int64))
    return Layout(strides, np.concatenate(parts), NO_TAPS)


def _bilinear(grid: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The four neighbours of each point of a smaller grid and their weights, in float32 and unaligned corners as torch's."""

    def along(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scale = np.float32(size) / np.float32(target)
        place = np.maximum(scale * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), np.float32(0))
        low = place.astype(np.int64)
        return low, np.minimum(low + 1, size - 1), place - low.astype(np.float32)

    (top, bottom, down), (left, right, across) = along(grid.shape[0], height), along(grid.shape[1], width)
    taps = [grid[np.ix_(y, x)].ravel() for y in (top, bottom) for x in (left, right)]
    weights = [np.outer(b, a).ravel() for b in (1 - down, down) for a in (1 - across, across)]
    return np.stack(taps, axis=1), np.stack(weights, axis=1)
