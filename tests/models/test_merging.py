"""Merging and pooling by themselves: against tomesd, transformers and torch, and against the definition written out in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llava_mcore.models.reduction.matching import alternating_sides, grid_sides, match, merge
from llava_mcore.models.reduction.picture import merge_grid, pool_grid, reduce_grid
from llava_mcore.settings.schema import Pooling, TokenMerging

GRIDS = [(8, 2, 0.5), (9, 2, 0.25), (9, 2, 0.75), (12, 3, 0.5), (6, 2, 0.75), (7, 4, 0.6)]


def features(side: int, pictures: int = 3, width: int = 10, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(pictures, side * side, width, dtype=dtype, generator=torch.Generator().manual_seed(side))


def by_hand(tokens: np.ndarray, sizes: np.ndarray, sources: list[int], targets: list[int], merged: int) -> tuple[np.ndarray, ...]:
    """One picture after the definition: survivors in raster order, their values and sizes."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    best = {source: max((float(unit[source] @ unit[target]), -target) for target in targets) for source in sources}
    gone = sorted(sources, key=lambda source: (-best[source][0], source))[:merged]
    survivors = [place for place in range(len(tokens)) if place not in gone]
    groups = {place: [place] for place in survivors}
    for source in gone:
        groups[-best[source][1]].append(source)
    values = np.stack([np.average(tokens[groups[place]], axis=0, weights=sizes[groups[place]]) for place in survivors])
    return np.array(survivors), values, np.array([sizes[groups[place]].sum() for place in survivors])


@pytest.mark.parametrize(("side", "window", "ratio"), GRIDS)
def test_merge_is_its_definition(side: int, window: int, ratio: float) -> None:
    tokens = features(side)
    sizes = torch.randint(1, 5, tokens.shape[:2], generator=torch.Generator().manual_seed(1)).float()
    sources, targets = grid_sides(side, window, tokens.device)
    kept = TokenMerging(ratio=ratio, window=window).kept(side)
    slot, left = match(tokens, sources, targets, side**2 - kept)
    values, found = merge(tokens, sizes, slot, kept)
    for picture in range(len(tokens)):
        survivors, expected, expected_sizes = by_hand(
            tokens[picture].numpy(), sizes[picture].numpy(), sources.tolist(), targets.tolist(), side**2 - kept
        )
        assert (np.diff(survivors) > 0).all() and slot[picture, survivors].tolist() == list(range(kept))
        assert left[picture].tolist() == survivors.tolist()
        assert np.allclose(values[picture], expected, atol=1e-6) and found[picture].tolist() == expected_sizes.tolist()
    assert found.sum(dim=1).tolist() == sizes.sum(dim=1).tolist()
    before, after = (tokens * sizes[..., None]).sum(dim=1), (values * found[..., None]).sum(dim=1)
    assert torch.allclose(before, after, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("side", "window", "ratio"), GRIDS)
def test_equals_tomesd(side: int, window: int, ratio: float) -> None:
    """Its order is not raster, so both are spread back over the patches. That of its targets is left to an unstable sort."""
    tomesd = pytest.importorskip("tomesd")
    tokens = features(side, dtype=torch.float32)
    merging = TokenMerging(ratio=ratio, window=window)
    kept = merging.kept(side)
    theirs, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
        tokens, side, side, window, window, side**2 - kept, no_rand=True
    )
    slot, left = match(tokens, *grid_sides(side, window, tokens.device), side**2 - kept)
    ours, _ = merge_grid(tokens, side, kept, merging)
    spread = ours.gather(1, slot[..., None].expand(-1, -1, tokens.shape[2]))
    assert ours.shape == theirs(tokens).shape
    assert torch.allclose(spread, unmerge(theirs(tokens)), atol=1e-6)
    blocks, places = merge_grid(tokens, side, kept, TokenMerging(ratio=ratio, window=window, order="blocks"))
    assert torch.equal(places.sort(dim=1).values, left)
    assert torch.allclose(blocks, ours.gather(1, slot.gather(1, places)[..., None].expand_as(ours)), atol=1e-6)
    sources = kept - (side // window) ** 2
    assert torch.allclose(blocks[:, :sources], theirs(tokens)[:, :sources], atol=1e-6)
    ends = [part[:, sources:].sort(dim=1).values for part in (blocks, theirs(tokens))]
    assert torch.allclose(*ends, atol=1e-6)
    assert not torch.allclose(blocks, ours, atol=1e-3) or not sources


def test_nothing_merged_is_the_identity_bit_for_bit() -> None:
    tokens = features(8, dtype=torch.bfloat16)
    tokens[0, 3] = -0.0
    same, patches = merge_grid(tokens, 8, 64, TokenMerging(ratio=0.0))
    assert same is tokens and patches.tolist() == [list(range(64))] * 3
    slot, left = match(tokens, *grid_sides(8, 2, tokens.device), 0)
    assert torch.equal(left, patches)
    merged, sizes = merge(tokens, torch.ones(3, 64), slot, 64)
    assert torch.equal(merged, tokens) and torch.equal(sizes, torch.ones(3, 64))


def test_equal_patches_are_merged_by_place() -> None:
    """A blank picture: every similarity is the same, and still the result is one."""
    slot, _ = match(torch.ones(2, 16, 4), *grid_sides(4, 2, torch.device("cpu")), 8)
    # Sources 1, 3, 4, 5, 6, 7, 9, 11 go to target 0; 2, 8 and 10 are targets too; 12 to 15 stay.
    assert slot.tolist() == [[0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 3, 0, 4, 5, 6, 7]] * 2


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_within_windows_each_is_merged_alone(ratio: float) -> None:
    tokens = features(6)
    merging = TokenMerging(ratio=ratio, scope="window")
    kept = merging.kept(6)
    assert kept == 36 * (1 - ratio)
    merged, patches = merge_grid(tokens, 6, kept, merging)
    for picture in range(len(tokens)):
        for number, places in enumerate(torch.arange(36).reshape(3, 2, 3, 2).transpose(1, 2).reshape(9, 4)):
            left, expected, _ = by_hand(tokens[picture, places].numpy(), np.ones(4), [1, 2, 3], [0], round(4 * ratio))
            each = kept // 9
            assert patches[picture, number * each : (number + 1) * each].tolist() == places[left].tolist()
            assert np.allclose(merged[picture, number * each : (number + 1) * each], expected, atol=1e-6)
    if ratio == 0.75:
        assert torch.allclose(merged, pool_grid(tokens, 6, Pooling(kind="average")), atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"order": "blocks"}, {"scope": "window"}])
def test_gradients_of_merging(how: dict[str, str]) -> None:
    tokens = features(4, pictures=2, width=3).requires_grad_()
    merging = TokenMerging(ratio=0.5, **how)
    assert torch.autograd.gradcheck(lambda x: merge_grid(x, 4, 8, merging)[0], (tokens,))


@pytest.mark.parametrize("kind", ["average", "max", "pixel_shuffle"])
def test_gradients_of_pooling(kind: str) -> None:
    tokens = features(4, pictures=2, width=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool_grid(x, 4, Pooling(kind=kind)), (tokens,))


@pytest.mark.parametrize("stride", [2, 3])
def test_pooling_equals_torch_and_transformers(stride: int) -> None:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    tokens = features(6, dtype=torch.float32)
    grid = tokens.transpose(1, 2).reshape(3, 10, 6, 6)
    for kind, pool in (("average", F.avg_pool2d), ("max", F.max_pool2d)):
        expected = pool(grid, stride).flatten(2).transpose(1, 2)
        assert torch.allclose(pool_grid(tokens, 6, Pooling(kind=kind, stride=stride)), expected, atol=1e-6)
    shuffled = Idefics3Connector.pixel_shuffle(None, tokens, stride)
    assert torch.equal(pool_grid(tokens, 6, Pooling(kind="pixel_shuffle", stride=stride)), shuffled)


def test_pooling_refuses_another_number_of_places() -> None:
    with pytest.raises(ValueError, match="pooled to 16 embeddings, the batch has places for 9"):
        reduce_grid(features(8), 8, 9, Pooling(kind="max"))


@pytest.mark.parametrize("tokens", [16, 17])
def test_alternating_sides_keep_the_class_token(tokens: int) -> None:
    metric = features(5)[:, :tokens]
    metric[:, 1] = metric[:, 0]  # the best pair of all, were the first token not protected
    sides = alternating_sides(tokens, metric.device)
    most = (tokens - 1) // 2
    slot, left = match(metric, *sides, most, protect_first=True)
    assert (left[:, 0] == 0).all()
    assert (slot[:, 0] == 0).all() and (slot[:, 1:] > 0).all()
    assert (match(metric, *sides, 1)[0][:, :2] == 0).all()
