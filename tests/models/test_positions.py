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
from llava_mcore.models.llava import build_model
from llava_mcore.models.positions import append, rows_for, stand, take_off
from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.groups import Groups
from llava_mcore.platform import device
from llava_mcore.settings.schema import ModelSettings, ParallelSettings, Pooling, TokenMerging
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
def expected(folder: Path, sample: oracle.Sample, projector: dict[str, Any]) -> torch.Tensor:
    """Logits [L, V] of transformers' decoder over embeddings and positions made one by one."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    reduction = projector.get("token_merging") or projector["pooling"]
    project = model.model.multi_modal_projector
    pictures = []
    for pixels in sample.pixels:
        features = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        if reduction.where == "before":
            left, values = survivors(features, projector)
            pictures.append((left, project(torch.from_numpy(values).float())))
        else:
            left, values = survivors(project(features), projector)
            pictures.append((left, torch.from_numpy(values).float()))
    rows, positions, at, number = [], [], 0, 0
    ids = sample.input_ids_L.tolist()
    while number < len(ids):
        if ids[number] == oracle.IMAGE_TOKEN:
            left, values = pictures.pop(0)
            rows += list(values)
            kept = reduction.positions == "kept"
            positions += [at + (patch if kept else place) for place, patch in enumerate(left)]
            at += SIDE**2 if kept else len(left)
            number += len(left)
        else:
            rows.append(model.get_input_embeddings().weight[ids[number]])
            positions.append(at)
            at, number = at + 1, number + 1
    assert not pictures
    # A mask of its own: transformers takes positions that do not go on by one for packed samples.
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None]
    embeddings, places = torch.stack(rows)[None], torch.tensor(positions)[None]
    output = model.model.language_model(inputs_embeds=embeddings, position_ids=places, attention_mask=mask, use_cache=False)
    return model.lm_head(output.last_hidden_state[0])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_equals_transformers_decoder(groups: Groups, hf: Path, name: str) -> None:
    settings: ModelSettings = to_settings(recognise(Source(hf)).config, hf / CONFIG)
    settings = dataclasses.replace(settings, projector=dataclasses.replace(settings.projector, **REDUCTIONS[name]))
    each = settings.embeddings_per_image
    samples = [
        oracle.make_samples(each)[number] for number in (1, 2, 3, 4)
    ]  # text around one, between two, none, pictures together
    pieces = []
    for sample in samples:
        ids = sample.input_ids_L.numpy()
        slots = np.flatnonzero(ids == oracle.IMAGE_TOKEN)
        positions = positions_of(len(ids), slots, settings.geometry)
        pieces.append(Piece(ids, np.full_like(ids, IGNORE), slots, sample.pixels.numpy(), positions_L=positions))
    total = sum(len(piece.input_ids_L) for piece in pieces)
    model = build_model(settings, ParallelSettings(), "float32", groups).eval()
    load_hf_into(model_state(model, groups), hf)
    batch = lay_out([pieces], total + 3, oracle.IMAGE_SIZE)
    (logits,) = forward_logits(model, [batch], [range(total)], groups, CPU)
    at, worst = 0, 0.0
    for sample in samples:
        theirs = expected(hf, sample, REDUCTIONS[name])
        worst = max(worst, float((logits[at : at + len(theirs)] - theirs).abs().max() / theirs.abs().max()))
        at += len(theirs)
    print(f"\n{name}: {worst:.1e}")
    assert worst < 1e-5
