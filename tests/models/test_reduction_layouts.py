"""Every way to make fewer embeddings of a picture: trained in every kind of layout, against one process."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import oracle
import ours
import pytest
import torch
from ranks import ranks
from test_layouts import LAYOUTS as EVERY
from test_layouts import LENGTH, TOLERANCE, difference, settings

from llava_mcore.data.loader import Batch
from llava_mcore.data.sample import positions_of
from llava_mcore.geometry import SINGLE, Shape
from llava_mcore.settings.schema import Pooling, Settings, TokenMerging, TowerMerging
from llava_mcore.settings.visual import VideoSettings

STEPS = 1
STREAMS = [[0, 1, 3], [2, 6], [4, 5], [7], [], [6, 3]]

MODES: dict[str, tuple[dict[str, Any], int]] = {  # settings, embeddings of a picture of 16 patches
    "merged after": ({"token_merging": TokenMerging(ratio=0.5)}, 8),
    "merged before, blocks": ({"token_merging": TokenMerging(ratio=0.4, where="before", order="blocks")}, 10),
    "merged within windows": ({"token_merging": TokenMerging(ratio=0.5, scope="window")}, 8),
    "merged in the tower": ({"tower": TowerMerging(tokens=3)}, 10),
    "merged in clips": ({"token_merging": TokenMerging(ratio=0.5), "video": VideoSettings(newline="frame")}, 9),
    "merged, positions counted": ({"token_merging": TokenMerging(ratio=0.5, positions="counted")}, 8),
    "averaged after": ({"pooling": Pooling(kind="average", where="after")}, 4),
    "pixel shuffle": ({"pooling": Pooling(kind="pixel_shuffle", positions="counted")}, 4),
}
LAYOUTS = ["TP2+SP", "TP2+SP encoder split", "PP2", "CP2"]
# Where the positions of what is left go to other ranks and stages in another way.
FURTHER = ["TP2", "PP2 VPP2", "CP2 ring", "PP4 no layer beside the encoder", "TP2 PP2 CP2 VPP2 ring"]
CASES = [(mode, layout) for mode in MODES for layout in LAYOUTS] + [("merged after", layout) for layout in FURTHER]


def reduced(mode: str, parallel: dict[str, Any], **train: Any) -> Settings:
    """The settings of the other layouts' tests with a reduction."""
    run, chosen = settings(parallel, **train), dict(MODES[mode][0])
    vision = dataclasses.replace(run.model.vision, token_merging=chosen.pop("tower", None))
    video = chosen.pop("video", run.model.video)
    projector = dataclasses.replace(run.model.projector, **chosen)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, vision=vision, projector=projector, video=video))


def shape_of(run: Settings) -> Shape:
    """Of every picture: one tile, or where frames are ended by a newline a clip of a frame."""
    return SINGLE if run.model.video.newline == "no_token" else Shape(frames=1)


def batches(run: Settings) -> list[Batch]:
    """With positions as of the loader."""
    geometry, shape = run.model.geometry, shape_of(run)
    each = geometry.embeddings(shape)
    found = oracle.pack(oracle.make_samples(each), STREAMS, LENGTH)
    for batch in found:
        parts, at = [], 0
        batch.shapes = [shape] * len(batch.pixel_values_NCHW)
        for length in batch.sample_lengths:
            slots = batch.image_index_E[(batch.image_index_E >= at) & (batch.image_index_E < at + length)] - at
            parts.append(positions_of(length, slots.numpy(), geometry, [shape] * (len(slots) // each)))
            at += length
        batch.position_ids_T = torch.from_numpy(np.concatenate(parts))
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """Each mode on one process."""
    found = {}
    for mode, (_, each) in MODES.items():
        run = reduced(mode, {})
        assert run.model.geometry.embeddings(shape_of(run)) == each
        (found[mode],) = ranks(1).run(ours.train, run, batches(run), STEPS)
    return found


@pytest.mark.parametrize(("mode", "layout"), CASES)
def test_equals_one_process(alone: dict[str, dict[str, Any]], mode: str, layout: str) -> None:
    run = reduced(mode, EVERY[layout][1])
    results = ranks(run.parallel.model_ranks).run(ours.train, run, batches(run), STEPS)
    worst = {
        "loss": max(difference(result["losses"], alone[mode]["losses"]) for result in results if result["last"]),
        "norm": max(difference(result["norms"], alone[mode]["norms"]) for result in results),
        "gradients": 0.0,
    }
    expected = ours.assemble(alone[mode]["gradients"])
    floor = 1e-3 * max(float(tensor.abs().max()) for tensor in expected.values())
    whole = ours.assemble([shard for result in results for shard in result["gradients"]])
    assert whole.keys() == expected.keys()
    for name, tensor in whole.items():
        gap = (tensor - expected[name]).abs().max() / expected[name].abs().max().clamp(min=floor)
        worst["gradients"] = max(worst["gradients"], float(gap))
    print(f"\n{mode} {layout}: " + ", ".join(f"{what} {value:.1e}" for what, value in worst.items()))
    assert max(worst.values()) < TOLERANCE, worst


def test_a_ratio_of_zero_changes_no_bit() -> None:
    run = settings({})
    model = dataclasses.replace(
        run.model, projector=dataclasses.replace(run.model.projector, token_merging=TokenMerging(ratio=0.0))
    )
    plain, zero = (ranks(1).run(ours.train, one, batches(one), 1)[0] for one in (run, dataclasses.replace(run, model=model)))
    assert plain["losses"] == zero["losses"] and plain["norms"] == zero["norms"]
    for (*_, one), (*_, other) in zip(plain["weights"], zero["weights"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["merged after", "merged in clips"])
def test_the_batch_says_how_many_stay(mode: str) -> None:
    """As in a schedule: the same settings, pictures of 16, 12 and 8 embeddings in turn, each run like those settings' own."""
    for each, ratio in ((16, 0.0), (12, 0.25), (8, 0.5)):
        scheduled, fixed = (reduced(mode, {}) for _ in range(2))
        scheduled.model.projector.token_merging = TokenMerging(ratio=0.5, schedule_steps=10)
        fixed.model.projector.token_merging = TokenMerging(ratio=ratio)
        assert fixed.model.embeddings_per_image == each
        losses = [ranks(1).run(ours.train, run, batches(fixed), 1)[0]["losses"] for run in (scheduled, fixed)]
        assert losses[0] == losses[1]


def test_uneven_places_are_refused() -> None:
    run = reduced("merged after", {})
    bad = batches(run)
    bad[0].image_index_E = bad[0].image_index_E[:-1]
    with pytest.raises(AssertionError, match="15 places for the embeddings of 2 pictures: each needs as many"):
        ranks(1).run(ours.train, run, bad, 1)
