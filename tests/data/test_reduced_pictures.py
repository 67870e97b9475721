"""Pictures that are merged or pooled, in the loader: positions in the decoder, and samples that have no room for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llava_mcore.data.loader import Step, StreamLoader
from llava_mcore.data.plan import Planner
from llava_mcore.data.sample import positions_of
from llava_mcore.data.shards import ShardDataset
from llava_mcore.data.sources import open_blend
from llava_mcore.data.tokenizer import Tokenizer
from llava_mcore.geometry import SINGLE, Anyres, Frames, Geometry, Shape
from llava_mcore.settings.schema import DataSettings

IMAGE_ID = 3
DATA = DataSettings(sequence_length=384, packing_window=0, decoder="python")
POOLED = Geometry(28, 4, kept=4, square=2, in_place=True)
MERGED = Geometry(28, 4, kept=6, in_place=True)


def step(dataset: ShardDataset, tokenizer: Tokenizer, geometry: Geometry, max_positions: int | None = None) -> Step:
    """All samples of a dataset in one step."""
    data, size = replace(DATA, path=str(dataset.path)), len(dataset)
    blend = open_blend(data, tokenizer, 1, size)
    planner = Planner(blend, data, geometry, seed=1, global_batch_size=size, total_samples=size, max_positions=max_positions)
    (found,) = StreamLoader(planner, tokenizer, data, IMAGE_ID, rank=0, size=1, micro_batch_size=1)
    assert not found.bad
    return found


def walk(ids: list[int], geometry: Geometry, patches: list[int]) -> list[int]:
    """Positions token by token, for the patches that a tile's embeddings stand for."""
    found, at, number = [], 0, 0
    while number < len(ids):
        tile = ids[number : number + len(patches)]
        if tile == [IMAGE_ID] * len(patches):
            found += [at + patch for patch in patches]
            at, number = at + geometry.side**2, number + len(patches)
        else:
            found.append(at)
            at, number = at + 1, number + 1
    return found


@pytest.mark.parametrize(("geometry", "patches"), [(POOLED, [0, 2, 8, 10]), (MERGED, [0, 2, 5, 8, 10, 13])])
def test_positions_go_on_as_after_all_patches(
    dataset: ShardDataset, tokenizer: Tokenizer, geometry: Geometry, patches: list[int]
) -> None:
    pictures = 0
    for batch in step(dataset, tokenizer, geometry).batches:
        at = 0
        for length in batch.sample_lengths:
            ids = batch.input_ids_T[at : at + length].tolist()
            expected = walk(ids, geometry, patches)
            assert batch.position_ids_T[at : at + length].tolist() == expected
            pictures += (expected[-1] + 1 - length) // (16 - len(patches))
            at += length
        assert len(batch.image_index_E) == len(patches) * len(batch.pixel_values_NCHW)
    assert pictures > 10


@pytest.mark.parametrize("geometry", [POOLED, MERGED])
@pytest.mark.parametrize("newline", ["no_token", "frame", "one_token"])
def test_a_medium_takes_as_many_positions_as_if_nothing_were_merged(geometry: Geometry, newline: Any) -> None:
    geometry = replace(geometry, anyres=Anyres(((1, 2), (2, 2), (1, 3)), merge="flat"), video=Frames(newline=newline))
    random = np.random.default_rng(2)
    shapes = [
        SINGLE,
        *(Shape(*size) for size in random.integers(1, 200, (30, 2)).tolist()),
        *(Shape(frames=n) for n in range(1, 9)),
    ]
    for shape in shapes:
        steps = geometry.steps(shape)
        assert len(steps) == geometry.embeddings(shape) and min(steps) >= 1
        assert sum(steps) == replace(geometry, kept=None).embeddings(shape)
        assert sum(steps) - len(steps) == geometry.tiles(shape) * geometry.skipped


def test_counted_positions_are_as_they_were() -> None:
    for geometry in (
        Geometry(28, 4),
        replace(POOLED, in_place=False),
        Geometry(28, 4, class_token=True),
        replace(MERGED, kept=16),
    ):
        slots = np.arange(2, 2 + 2 * geometry.rows(1))
        assert positions_of(40, slots, geometry, [SINGLE] * 2).tolist() == list(range(40))


def test_a_sample_has_no_more_positions_than_the_decoder(dataset: ShardDataset, tokenizer: Tokenizer) -> None:
    """Its text is cut at the last of them; pictures that end behind it are left out by the plan and named."""
    whole, cut = (step(dataset, tokenizer, POOLED, most) for most in (None, 80))
    last = [
        int(batch.position_ids_T[at : at + length].max()) + 1
        for batch in cut.batches
        for at, length in zip(np.cumsum([0, *batch.sample_lengths]), batch.sample_lengths, strict=False)
        if batch.input_ids_T[at : at + length].any()
    ]
    assert max(last) == 80 and len(last) == cut.samples
    assert cut.left_out and cut.samples + len(cut.left_out) == whole.samples == len(dataset)
    for sample in cut.left_out:
        assert "its pictures do not fit" in sample.error and "the decoder is made for 80" in sample.error
        assert "positions=counted" in sample.error
    counted = step(dataset, tokenizer, replace(POOLED, in_place=False), 80)
    assert len(counted.left_out) < len(cut.left_out)
