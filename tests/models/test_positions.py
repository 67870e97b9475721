"""Positions of merged patches: carried from stage to stage, and whole forward passes against transformers' decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from test_merging import by_hand

from llava_mcore.conversion.convert import load_hf_into
from llava_mcore.conversion.hf_config import to_settings
from llava_mcore.conversion.layouts import CONFIG, Source, recognise
from llava_mcore.data.conversation import IGNORE
from llava_mcore.data.loader import Piece, lay_out
from llava_mcore.data.sample import positions_of
from llava_mcore.geometry import SINGLE, Shape
from llava_mcore.models.llava import build_model
from llava_mcore.models.positions import append, rows_for, stand, take_off
from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.groups import Groups
from llava_mcore.platform import device
from llava_mcore.settings.schema import ModelSettings, ParallelSettings, Pooling, TokenMerging
from llava_mcore.settings.visual import AnyresSettings, VideoSettings
from llava_mcore.training.checkpoint import model_state
from llava_mcore.training.engine import forward_logits

CPU = torch.device("cpu")
SIDE = oracle.IMAGE_SIZE // oracle.PATCH
REDUCTIONS: dict[str, dict[str, Any]] = {
    "picture": {"token_merging": TokenMerging(ratio=0.5)},
    "before, blocks": {"token_merging": TokenMerging(ratio=0.4, where="before", order="blocks")},
    "window": {"token_merging": TokenMerging(ratio=0.5, scope="window")},
    "nothing merged": {"token_merging": TokenMerging(ratio=0.0)},
    "counted": {"token_merging": TokenMerging(ratio=0.5, positions="counted")},
    "average": {"pooling": Pooling(kind="average", where="after")},
    "max counted": {"pooling": Pooling(kind="max", positions="counted")},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [3, 20, 4096])
def test_numbers_are_carried_bit_for_bit(dtype: torch.dtype, width: int) -> None:
    """Every number of 20 bits, of which many are no number as a bfloat16."""
    numbers = torch.arange(2**20)[:: 1 if width == 4096 else 977]
    rows = rows_for(len(numbers), width, dtype)
    hidden = torch.randn(5, 1, width, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    carrying = append(hidden, numbers, rows)
    assert carrying.shape == (5 + rows, 1, width) and carrying.dtype == dtype
    arrived = carrying.detach().clone().requires_grad_()
    found, carried = take_off(arrived, rows, len(numbers))
    assert torch.equal(found, hidden) and torch.equal(carried, numbers)
    found.square().sum().backward()
    assert arrived.grad is not None and (arrived.grad[5:] == 0).all() and (arrived.grad[:5] != 0).any()
    carrying.backward(arrived.grad)
    assert torch.equal(hidden.grad, arrived.grad[:5])  # type: ignore[arg-type]


def test_without_pictures_nothing_is_carried() -> None:
    hidden = torch.ones(4, 1, 8)
    found, numbers = take_off(append(hidden, torch.zeros(0, dtype=torch.int64), 1), 1, 0)
    assert torch.equal(found, hidden) and numbers.tolist() == []


def test_a_patch_stands_where_it_would() -> None:
    """Two pictures of nine patches, of which three are left each, with text before, between and behind."""
    positions = torch.tensor([0, 1, 4, 7, 10, 11, 12, 15, 18, 21])
    places = torch.tensor([1, 2, 3, 6, 7, 8])
    found = stand(positions, places, torch.tensor([0, 1, 8, 2, 3, 4]), 3)
    assert found.tolist() == [0, 1, 2, 9, 10, 11, 14, 15, 16, 21]


# ---- against transformers ----


@pytest.fixture(scope="module")
def groups():
    device.start()
    yield process_groups.build(ParallelSettings())
    process_groups.destroy()
    device.stop()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.make_model(tmp_path_factory.mktemp("positions") / "hf")


def survivors(features_PH: torch.Tensor, projector: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """Of one picture the patches that are left and their values, patch by patch."""
    values, pooling = features_PH.double().numpy(), projector.get("pooling")
    grid = np.arange(SIDE**2).reshape(SIDE, SIDE)
    corners = [int(grid[row, column]) for row in range(0, SIDE, 2) for column in range(0, SIDE, 2)]
    if pooling is not None:
        squares = [values[[corner, corner + 1, corner + SIDE, corner + SIDE + 1]] for corner in corners]
        return corners, np.stack([square.mean(axis=0) if pooling.kind == "average" else square.max(axis=0) for square in squares])
    merging: TokenMerging = projector["token_merging"]
    ones = np.ones(SIDE**2)
    if merging.scope == "window":
        left, made = [], []
        for corner in corners:
            places = np.array([corner, corner + 1, corner + SIDE, corner + SIDE + 1])
            inside, each, _ = by_hand(values[places], ones[:4], [1, 2, 3], [0], int(4 * merging.ratio))
            left += places[inside].tolist()
            made.append(each)
        return left, np.concatenate(made)
    others = [patch for patch in range(SIDE**2) if patch not in corners]
    found, made_, _ = by_hand(values, ones, others, corners, int(SIDE**2 * merging.ratio))
    if merging.order == "blocks":
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        likeness = {patch: max(float(unit[patch] @ unit[corner]) for corner in corners) for patch in others}
        rank = {patch: (patch in corners, -likeness.get(patch, 0.0), patch) for patch in found.tolist()}
        order = sorted(range(len(found)), key=lambda number: rank[int(found[number])])
        found, made_ = found[order], made_[order]
    return found.tolist(), made_


@torch.no_grad()
def expected(
    folder: Path, sample: oracle.Sample, projector: dict[str, Any], newline: torch.Tensor | None = None, every: int = 1
) -> torch.Tensor:
    """Logits [L, V] of transformers' decoder, embeddings and positions made one by one; a newline ends each ``every`` tiles."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    reduction = projector.get("token_merging") or projector["pooling"]
    project = model.model.multi_modal_projector
    pictures: list[tuple[list[int], torch.Tensor] | None] = []  # what the places of embeddings are for; None: a newline
    for count, pixels in enumerate(sample.pixels, 1):
        features = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        if reduction.where == "before":
            left, values = survivors(features, projector)
            pictures.append((left, project(torch.from_numpy(values).float())))
        else:
            left, values = survivors(project(features), projector)
            pictures.append((left, torch.from_numpy(values).float()))
        if newline is not None and count % every == 0:
            pictures.append(None)
    rows, positions, at, number = [], [], 0, 0
    ids = sample.input_ids_L.tolist()
    while number < len(ids):
        if ids[number] == oracle.IMAGE_TOKEN and (picture := pictures.pop(0)) is not None:
            left, values = picture
            rows += list(values)
            kept = reduction.positions == "kept"
            positions += [at + (patch if kept else place) for place, patch in enumerate(left)]
            at += SIDE**2 if kept else len(left)
            number += len(left)
        else:
            is_text = ids[number] != oracle.IMAGE_TOKEN
            rows.append(model.get_input_embeddings().weight[ids[number]] if is_text else newline)
            positions.append(at)
            at, number = at + 1, number + 1
    assert not pictures
    # A mask of its own: transformers takes positions that do not go on by one for packed samples.
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None]
    embeddings, places = torch.stack(rows)[None], torch.tensor(positions)[None]
    output = model.model.language_model(inputs_embeds=embeddings, position_ids=places, attention_mask=mask, use_cache=False)
    return model.lm_head(output.last_hidden_state[0])


def worst_of(
    groups: Groups, hf: Path, name: str, samples: list[oracle.Sample], shapes: list[list[Shape]], every: int = 1, **changes: Any
) -> float:
    """Largest difference of any sample's logits over their largest value; ``changes`` are of the model's settings."""
    settings: ModelSettings = to_settings(recognise(Source(hf)).config, hf / CONFIG)
    projector = dataclasses.replace(settings.projector, **REDUCTIONS[name])
    settings = dataclasses.replace(settings, projector=projector, **changes)
    pieces = []
    for sample, media in zip(samples, shapes, strict=True):
        ids = sample.input_ids_L.numpy()
        slots = np.flatnonzero(ids == oracle.IMAGE_TOKEN)
        positions = positions_of(len(ids), slots, settings.geometry, media)
        pieces.append(Piece(ids, np.full_like(ids, IGNORE), slots, sample.pixels.numpy(), media, positions))
    total = sum(len(piece.input_ids_L) for piece in pieces)
    model = build_model(settings, ParallelSettings(), "float32", groups).eval()
    newline = next(iter(model)).learned_tokens.newline
    if newline is not None:
        torch.nn.init.normal_(newline)
    load_hf_into(model_state(model, groups), hf)
    batch = lay_out([pieces], total + 3, oracle.IMAGE_SIZE)
    (logits,) = forward_logits(model, [batch], [range(total)], groups, CPU)
    at, worst = 0, 0.0
    for sample in samples:
        theirs = expected(hf, sample, REDUCTIONS[name], newline, every)
        worst = max(worst, float((logits[at : at + len(theirs)] - theirs).abs().max() / theirs.abs().max()))
        at += len(theirs)
    print(f"\n{name}: {worst:.1e}")
    return worst


@pytest.mark.parametrize("name", REDUCTIONS)
def test_equals_transformers_decoder(groups: Groups, hf: Path, name: str) -> None:
    reduction = REDUCTIONS[name].get("token_merging") or REDUCTIONS[name]["pooling"]
    made = oracle.make_samples(reduction.kept(SIDE))
    samples = [made[number] for number in (1, 2, 3, 4)]  # text around one picture, between two, of none, behind two
    assert worst_of(groups, hf, name, samples, [[SINGLE] * len(sample.pixels) for sample in samples]) < 1e-5


def sample_of(tiles: int, embeddings: int) -> oracle.Sample:
    """One medium between two words and three."""
    ids = torch.tensor([20, 21, *[oracle.IMAGE_TOKEN] * embeddings, 30, 31, 32])
    pixels = torch.randn(tiles, 3, oracle.IMAGE_SIZE, oracle.IMAGE_SIZE, generator=torch.Generator().manual_seed(tiles))
    return oracle.Sample(ids, torch.full_like(ids, IGNORE), pixels)


@pytest.mark.parametrize("name", ["picture", "before, blocks", "counted", "average"])
def test_frames_and_tiles_are_merged_each_alone(groups: Groups, hf: Path, name: str) -> None:
    reduction = REDUCTIONS[name].get("token_merging") or REDUCTIONS[name]["pooling"]
    each = reduction.kept(SIDE)
    clip = [[Shape(frames=3)]]
    by_frame = worst_of(groups, hf, name, [sample_of(3, 3 * each + 3)], clip, video=VideoSettings(newline="frame"))
    by_clip = worst_of(groups, hf, name, [sample_of(3, 3 * each + 1)], clip, 3, video=VideoSettings(newline="one_token"))
    wide = [[Shape(2 * oracle.IMAGE_SIZE, oracle.IMAGE_SIZE)]]
    anyres = AnyresSettings(grids=[(1, 2)], merge="flat")
    assert max(by_frame, by_clip, worst_of(groups, hf, name, [sample_of(3, 3 * each)], wide, anyres=anyres)) < 1e-5
