"""Embeddings in order, against the same done step by step with torch's own views, pooling and interpolation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_mcore.geometry import SINGLE, Anyres, Frames, Geometry, Shape
from llava_mcore.models.arrangement import LearnedTokens, pool_tiles
from llava_mcore.models.embedding_order import arrange

WIDTH = 6
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
SIZES = [(640, 480), (100, 900), (900, 100), (33, 31), (1056, 220)]


def tokens_of(geometry: Geometry, dtype: torch.dtype = torch.float64) -> LearnedTokens:
    made = LearnedTokens(geometry, WIDTH, dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def with_newlines(rows_hwH: Tensor, newline_H: Tensor) -> Tensor:
    return torch.cat([rows_hwH, newline_H.expand(len(rows_hwH), 1, -1)], dim=1).flatten(0, 1)


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("merge", ["flat", "spatial", "unpad", "unpad to 2", "maxpool2x2"])
def test_pictures(side: int, size: tuple[int, int], merge: str) -> None:
    how, _, most = merge.partition(" to ")
    anyres = Anyres(GRIDS, how, max_tiles=int(most) if most else None, convention="llava")  # type: ignore[arg-type]
    geometry = Geometry(7 * side, side, anyres=anyres)
    shape, tokens = Shape(*size), tokens_of(geometry, torch.float32)
    cut, count = geometry.cut(shape), geometry.tiles(shape)
    tiles = torch.randn(count, side * side, WIDTH)
    found = tokens(torch.cat([tiles[:1], tiles]).flatten(0, 1), arrange(geometry, [SINGLE, shape]))
    found = found[geometry.embeddings(SINGLE) :]

    grid = tiles[1:].view(cut.rows, cut.columns, side, side, WIDTH).permute(0, 2, 1, 3, 4)
    grid = grid.reshape(cut.rows * side, cut.columns * side, WIDTH)
    if how == "flat":
        expected = tiles[1:].flatten(0, 1)
    elif how == "spatial":
        expected = grid.flatten(0, 1)
    elif how == "maxpool2x2":
        expected = F.max_pool2d(grid.permute(2, 0, 1), 2).flatten(1).t()
    else:
        height, width = grid.shape[:2]
        if size[0] / size[1] > width / height:
            margin = (height - int(size[1] * (width / size[0]))) // 2
            grid = grid[margin : height - margin]
        else:
            margin = (width - int(size[0] * (height / size[1]))) // 2
            grid = grid[:, margin : width - margin]
        times = (grid.shape[0] * grid.shape[1] / (int(most) * side**2)) ** 0.5 if most else 0
        if times > 1.1:
            smaller = [int(length // times) for length in grid.shape[:2]]
            grid = F.interpolate(grid.permute(2, 0, 1)[None], size=smaller, mode="bilinear")[0].permute(1, 2, 0)
        assert tokens.newline is not None
        expected = with_newlines(grid, tokens.newline)
    assert torch.allclose(found, torch.cat([tiles[0], expected]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pool", ["average", "max", "bilinear"])
@pytest.mark.parametrize("newline", ["grid", "frame", "one_token", "no_token"])
@pytest.mark.parametrize("slow_every", [None, 2])
def test_clips(pool: str, newline: str, slow_every: int | None) -> None:
    side = 9
    geometry = Geometry(63, side, video=Frames(pool, 2, newline, slow_every))  # type: ignore[arg-type]
    tokens, frames = tokens_of(geometry), torch.randn(5, side * side, WIDTH, dtype=torch.float64)
    order = arrange(geometry, [Shape(frames=3), Shape(frames=2)])
    found = tokens(pool_tiles(frames, order.strides, pool), order)

    expected = []
    for clip in (range(3), range(3, 5)):
        for place, number in enumerate(clip):
            stride = 2 if slow_every is None or place % slow_every == 0 else 4
            picture = frames[number].t().view(1, WIDTH, side, side)
            if pool == "bilinear":
                picture = F.interpolate(picture, size=[-(-side // stride)] * 2, mode="bilinear")
            else:
                picture = (F.avg_pool2d if pool == "average" else F.max_pool2d)(picture, stride)
            rows = picture[0].permute(1, 2, 0)
            expected.append(with_newlines(rows, tokens.newline) if newline == "grid" else rows.flatten(0, 1))
            expected += [tokens.newline[None]] if newline == "frame" else []
            expected += [tokens.faster[None]] if slow_every else []
        expected += [tokens.newline[None]] if newline == "one_token" else []
    assert torch.equal(found, torch.cat(expected))


def test_a_part_and_its_gradients() -> None:
    """The chosen embeddings are rows of all of them; what nothing uses gets a gradient of zero, not none."""
    geometry = Geometry(28, 4, anyres=Anyres(GRIDS, max_tiles=1), video=Frames("average", 2, slow_every=2))
    tokens = tokens_of(geometry)
    order = arrange(geometry, [Shape(640, 480), SINGLE])
    features = torch.randn(sum(order.rows), WIDTH, dtype=torch.float64, requires_grad=True)
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(order.index_E))[:7])
    assert torch.equal(tokens(features, order, chosen), tokens(features, order)[chosen])
    assert torch.autograd.gradcheck(lambda rows, newline: _with(tokens, newline)(rows, order), (features, tokens.newline))
    assert tokens.newline is not None and tokens.faster is not None
    tokens.zero_grad()
    tokens(features, order).sum().backward()
    assert tokens.newline.grad is not None and (tokens.newline.grad == order.newlines).all()
    assert tokens.faster.grad is not None and not tokens.faster.grad.any()
    empty = tokens(features[:0], arrange(geometry, []))
    assert empty.shape == (0, WIDTH)


def _with(tokens: LearnedTokens, newline: Tensor) -> LearnedTokens:
    other = LearnedTokens(replace(Geometry(28, 4), anyres=Anyres(GRIDS)), WIDTH, torch.float64)
    del other.newline
    other.newline, other.faster = newline, tokens.faster  # type: ignore[assignment]
    return other


def test_times_of_frames() -> None:
    """A gate of zero changes nothing, to the last bit; an open one adds one vector to all embeddings of a frame and no other."""
    video = Frames("average", 2, "frame", time_period=100.0)
    geometry, untold = (Geometry(28, 4, video=each) for each in (video, replace(video, time_period=None)))
    clip = Shape(frames=3, seconds=(0.0, 0.5, 7.25))
    order = arrange(geometry, [SINGLE, clip, SINGLE])
    features, told = torch.randn(sum(order.rows), WIDTH), tokens_of(geometry, torch.float32)
    plain = LearnedTokens(untold, WIDTH, torch.float32)
    assert told.time_gate is not None
    told.time_gate.data.zero_()
    plain.load_state_dict({"newline": told.newline})
    expected = plain(features, arrange(untold, [SINGLE, clip._replace(seconds=()), SINGLE]))
    assert torch.equal(told(features, order), expected)

    told.time_gate.data.fill_(2.0)
    added = told(features, order) - expected
    picture, frame = 16, 4
    assert not added[:picture].any() and not added[-picture:].any()
    for number, time in enumerate(clip.seconds):
        rows = added[picture + number * (frame + 1) :][: frame + 1]
        angles = torch.tensor([time, time * 100**-0.5, time / 100])
        wanted = 2 * torch.cat([angles.cos(), angles.sin()])
        assert torch.allclose(rows[:frame], wanted.expand(frame, -1), atol=1e-6) and not rows[frame].any()
    told(features, order).sum().backward()
    assert told.time_gate.grad is not None and told.time_gate.grad.any()
    with pytest.raises(ValueError, match="a clip of 3 frames has 0 times"):
        arrange(geometry, [Shape(frames=3)])
