"""Sizes to tiles and counts: transformers' processors, LLaVA's published numbers, and what comes of absurd sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from llava_mcore.geometry import SINGLE, Anyres, Frames, Geometry, Shape
from llava_mcore.models.embedding_order import arrange, layout

NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
GRIDS = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
NEXT = Geometry(336, 24, anyres=Anyres(NEXT_GRIDS))
ONEVISION = Geometry(384, 27, anyres=Anyres(GRIDS, max_tiles=9, several="single"), video=Frames("bilinear", 2, "one_token"))
ABSURD = [(1, 1), (1, 10_000), (10_000, 1), (2, 3), (10_000, 10_000)]


def sizes(count: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(3)
    return [*ABSURD, (336, 336), (672, 336), (1056, 220), *map(tuple, random.integers(1, 3000, (count, 2)).tolist())]


def processor(kind: type, images: Any, **values: Any) -> Any:
    """A processor without a tokenizer: counting needs none."""
    made = object.__new__(kind)
    made.__dict__.update(image_processor=images, vision_feature_select_strategy="default", **values)
    return made


def test_counts_are_the_processors() -> None:
    of_next = processor(LlavaNextProcessor, LlavaNextImageProcessorPil(), patch_size=14, num_additional_image_tokens=1)
    of_onevision = processor(
        LlavaOnevisionProcessor, LlavaOnevisionImageProcessorPil(), num_image_tokens=729, vision_aspect_ratio="anyres_max_9"
    )
    for width, height in sizes(2000):
        counted = NEXT.embeddings(NEXT.picture(width, height, several=False))
        assert counted == of_next._get_number_of_features(height, width, 336, 336) - 1, (width, height)
        counted = ONEVISION.embeddings(ONEVISION.picture(width, height, several=False))
        assert counted == of_onevision._get_number_of_features(height, width, 384, 384), (width, height)
    clips = of_onevision._get_num_multimodal_tokens(video_sizes=[(frames, 1, 1) for frames in range(1, 40)])
    assert clips.num_video_tokens == [ONEVISION.embeddings(Shape(frames=frames)) for frames in range(1, 40)]


@pytest.mark.parametrize("geometry", [NEXT, ONEVISION])
def test_grids_are_those_of_transformers(geometry: Geometry) -> None:
    assert geometry.anyres is not None
    size = geometry.image_size
    pinpoints = [[rows * size, columns * size] for rows, columns in geometry.anyres.grids]
    for width, height in sizes(1000):
        cut = geometry.cut(Shape(width, height))
        assert (cut.rows * size, cut.columns * size) == select_best_resolution((height, width), pinpoints), (width, height)
        assert 1 <= cut.width <= cut.columns * size and 1 <= cut.height <= cut.rows * size


@pytest.mark.parametrize(
    ("geometry", "size", "count"),
    [
        (NEXT, (640, 480), 2340),
        (NEXT, (336, 336), 1176),
        (NEXT, (1000, 300), 2182),
        (NEXT, (800, 1200), 2160),
        (ONEVISION, (640, 480), 2929),
        (ONEVISION, (800, 1200), 8721),
        (ONEVISION, (1344, 1008), 7309),
    ],
)
def test_published_counts(geometry: Geometry, size: tuple[int, int], count: int) -> None:
    assert geometry.embeddings(geometry.picture(*size, several=False)) == count


@pytest.mark.parametrize("merge", ["flat", "spatial", "unpad", "maxpool2x2"])
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("convention", ["hf", "llava"])
@pytest.mark.parametrize("side", [24, 27])
def test_the_index_has_as_many_as_are_counted(merge: Any, base: bool, convention: Any, side: int) -> None:
    geometry = Geometry(14 * side, side, anyres=Anyres(NEXT_GRIDS, merge, base, 3 if merge == "unpad" else None, convention))
    for width, height in sizes(40):
        shape = geometry.picture(width, height, several=False)
        order = arrange(geometry, [shape, SINGLE, shape])
        each = geometry.embeddings(shape)
        assert len(order.index_E) == 2 * each + geometry.embeddings(SINGLE)
        assert each >= 1 and len(order.strides) == 2 * geometry.tiles(shape) + 1
        # Every use of a learned token and every further row has a place, and only one.
        features = sum(order.rows)
        rest = order.index_E[order.index_E >= features]
        assert sorted(rest.tolist()) == list(range(features, features + order.newlines + order.fasters + len(order.taps_MK)))
        assert not len(order.taps_MK) or order.taps_MK.max() < features


def test_conventions_differ_where_rounding_does() -> None:
    """The published code cuts 14 rows of 1056 x 220 pixels where transformers keeps 16."""
    rows = {}
    for convention in ("hf", "llava"):
        geometry = Geometry(336, 24, anyres=Anyres(((1, 3), (2, 2)), convention=convention))  # type: ignore[arg-type]
        shape = Shape(1056, 220)
        rows[convention] = geometry.unpadded(shape, geometry.cut(shape))[2]
    assert rows == {"hf": 16, "llava": 14}


def test_a_sliver_keeps_an_embedding() -> None:
    """The margins of a sliver cover the whole grid: the small whole picture remains, or without it the middle."""
    assert NEXT.embeddings(NEXT.picture(10_000, 1, several=False)) == 576
    assert NEXT.embeddings(NEXT.picture(1, 10_000, several=False)) == 576 + 24  # newlines of empty rows, as in transformers
    alone = Geometry(336, 24, anyres=Anyres(NEXT_GRIDS, base=False))
    assert alone.embeddings(alone.picture(10_000, 1, several=False)) == 2 * (48 + 1)


def test_several_pictures() -> None:
    assert NEXT.picture(640, 480, several=True) == Shape(640, 480)
    assert ONEVISION.picture(640, 480, several=True) == SINGLE
    assert ONEVISION.embeddings(SINGLE) == 730 and ONEVISION.tiles(SINGLE) == 1


@pytest.mark.parametrize(
    ("video", "one", "three"),
    [
        (Frames(), 576, 3 * 576),
        (Frames("average", 2), 144, 3 * 144),
        (Frames("average", 2, "grid"), 12 * 13, 3 * 12 * 13),
        (Frames("max", 2, "frame"), 145, 3 * 145),
        (Frames("bilinear", 2, "one_token"), 145, 3 * 144 + 1),
        (Frames("average", 5), 16, 3 * 16),
        (Frames("bilinear", 5), 25, 3 * 25),
        (Frames("average", 2, "grid", slow_every=2), 157, 157 + 43 + 157),
        (Frames("average", 2, "grid", slow_every=10), 157, 157 + 43 + 43),
    ],
)
def test_clips(video: Frames, one: int, three: int) -> None:
    geometry = Geometry(336, 24, video=video)
    for frames, count in ((1, one), (3, three)):
        shape = Shape(frames=frames)
        assert geometry.embeddings(shape) == len(layout(geometry, shape).index_E) == count
        assert geometry.tiles(shape) == frames
