"""Token merging inside the tower: proportional attention, schedules, and a tower of several layers against its definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from test_layouts import settings

from llava_mcore.models.config import KEEP_ALL, Recompute, tower_config
from llava_mcore.models.reduction.matching import alternating_sides, match, merge
from llava_mcore.models.reduction.tower import MergingAttention
from llava_mcore.models.vision import VisionTower
from llava_mcore.parallel import groups as process_groups
from llava_mcore.platform import device
from llava_mcore.settings.schema import TowerMerging


@pytest.fixture(scope="module")
def groups():
    device.start()
    yield process_groups.build(settings({}).parallel)
    process_groups.destroy()
    device.stop()


def test_the_published_schedule() -> None:
    """Eight tokens in twelve layers, falling: the example of the paper's code."""
    merging = TowerMerging(tokens=8, inflect=-1.0)
    assert merging.merged(197, 12, True) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert TowerMerging(tokens=8, inflect=1.0).merged(197, 12, True) == [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]
    assert TowerMerging(tokens=8).merged(197, 12, True) == [8] * 12
    assert TowerMerging(tokens=30).merged(17, 3, True) == [8, 4, 2]  # half of what there is, less the class token
    assert TowerMerging(tokens=30).merged(16, 3, False) == [8, 4, 2]


def test_proportional_attention_is_attention_over_repeated_tokens(groups) -> None:
    config = tower_config(settings({}).model, settings({}).parallel, torch.float32)
    attend = MergingAttention(config, 1, AttnMaskType.no_mask, "self")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, 2, 3, 8, generator=generator) for _ in range(3))
    sizes = torch.tensor([[1, 3, 1, 2, 5, 1], [4, 1, 1, 1, 1, 2]])
    output = attend(query, key, value, None, attention_bias=sizes.float().log()[:, None, None])
    for picture in range(2):
        repeated = [part[:, picture].repeat_interleave(sizes[picture], dim=0).transpose(0, 1) for part in (key, value)]
        expected = F.scaled_dot_product_attention(query[:, picture].transpose(0, 1), *repeated)
        assert torch.allclose(output[:, picture], expected.transpose(0, 1).flatten(1), atol=1e-6)
    assert torch.equal(attend.keys_NTD, key.sum(dim=2).transpose(0, 1))


def tower_of(groups, merging: dict[str, Any] | None, recompute: Recompute = KEEP_ALL) -> VisionTower:
    run = settings({})
    vision = dataclasses.replace(run.model.vision, token_merging=None if merging is None else TowerMerging(**merging))
    model = dataclasses.replace(run.model, vision=vision)
    tower = VisionTower(tower_config(model, run.parallel, torch.float32, recompute), vision, groups.tower)
    generator = torch.Generator().manual_seed(4)
    for parameter in tower.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return tower


def pictures() -> torch.Tensor:
    size = settings({}).model.vision.image_size
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("proportional", [True, False])
def test_a_tower_is_its_definition(groups, proportional: bool) -> None:
    """Layer by layer with the weights of the tower, attention written out over repeated tokens."""
    merging = {"tokens": 3, "inflect": -0.5, "proportional_attention": proportional}
    tower = tower_of(groups, merging)
    heads, merged = tower.config.num_attention_heads, settings({}).model.vision.used_layers * [0]
    merged = TowerMerging(**merging).merged(17, len(merged), True)
    hidden = (
        torch.cat([tower.class_embedding.expand(3, 1, -1), tower.patch_embedding(pictures())], dim=1) + tower.position_embedding
    )
    hidden, sizes, patches = tower.pre_layernorm(hidden), torch.ones(3, 17), torch.arange(-1, 16).expand(3, -1)
    for layer, count in zip(tower.encoder.layers, merged, strict=True):
        mixed = layer.self_attention.linear_qkv(layer.input_layernorm(hidden))[0].unflatten(-1, (heads, 3, -1))
        query, key, value = (part.transpose(1, 2) for part in mixed.unbind(dim=3))
        scores = query @ key.transpose(2, 3) / key.shape[-1] ** 0.5
        weights = scores.exp() * (sizes[:, None, None] if proportional else 1.0)
        attended = (weights / weights.sum(dim=-1, keepdim=True) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + F.linear(attended, layer.self_attention.linear_proj.weight, layer.self_attention.linear_proj.bias)
        slot, left = match(key.mean(dim=1), *alternating_sides(hidden.shape[1], hidden.device), count, protect_first=True)
        patches = patches.gather(1, left)
        hidden, sizes = merge(hidden, sizes, slot, hidden.shape[1] - count)
        output, bias = layer.mlp(layer.pre_mlp_layernorm(hidden))
        hidden = hidden + output + bias
    found, left = tower(pictures())
    assert torch.equal(left, patches[:, 1:]) and (left.diff(dim=1) > 0).all() and (left >= 0).all()
    assert found.shape[1] == 16 - sum(merged) and sum(merged) == 6
    assert torch.allclose(found, hidden[:, 1:], atol=2e-5)
    assert sizes.sum(dim=1).tolist() == [17.0] * 3


def test_merging_no_tokens_is_the_tower_bit_for_bit(groups) -> None:
    plain, merging = tower_of(groups, None), tower_of(groups, {"tokens": 1})
    assert not torch.allclose(plain(pictures())[0].mean(dim=1), merging(pictures())[0].mean(dim=1))
    for layer in merging.encoder.layers:
        layer.merged = 0
    features, left = merging(pictures())
    assert torch.equal(plain(pictures())[0], features) and left.tolist() == [list(range(16))] * 3


@pytest.mark.parametrize(
    "recompute", [Recompute("full", within=("vision_tower",)), Recompute("selective", within=("vision_tower",))]
)
def test_recomputing_changes_nothing(groups, recompute: Recompute) -> None:
    gradients = []
    for how in (KEEP_ALL, recompute):
        tower = tower_of(groups, {"tokens": 3}, how)
        tower(pictures())[0].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-6 * float(gradient.abs().max())), name
    assert all(gradient.abs().max() > 0 for name, gradient in gradients[0].items() if "linear_qkv.bias" not in name)
