"""Merging and pooling of a picture's grid of features, before or after the projector.

Shape suffixes: N pictures, P patches in raster order, K embeddings that are left, W windows of a picture, H width (of tower or
decoder), s patches of a square.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_mcore.models.reduction.matching import grid_sides, match, merge
from llava_mcore.settings.reduction import Pooling, TokenMerging


def merge_grid(features_NPH: Tensor, side: int, kept: int, merging: TokenMerging) -> tuple[Tensor, Tensor]:
    """What is left when features that look alike are merged, [N, K, H], and of which patches, int64 [N, K].

    With K = P it is the features themselves.

    Args:
        features_NPH: of pictures of ``side`` x ``side`` patches.
        side: patches along a side.
        kept: K, at least one for each whole window; with ``scope="window"`` as many for each.
        merging: window, scope and order.
    """
    pictures, patches = features_NPH.shape[:2]
    if kept == patches:
        return features_NPH, torch.arange(patches, device=features_NPH.device).expand(pictures, -1)
    if merging.scope == "window":  # each is a picture of its own, with one target
        windows = patches // merging.window**2
        squares_NPH = _squares(features_NPH, side, merging.window).flatten(0, 1)
        alone = dataclasses.replace(merging, scope="picture")
        each_NKH, inside_NK = merge_grid(squares_NPH, merging.window, kept // windows, alone)
        patches_1P1 = torch.arange(patches, device=features_NPH.device)[None, :, None]
        patches_WP = _squares(patches_1P1, side, merging.window)[0, ..., 0]
        patches_NK = patches_WP.repeat(pictures, 1).gather(1, inside_NK)
        return each_NKH.unflatten(0, (pictures, windows)).flatten(1, 2), patches_NK.view(pictures, kept)
    sources_S, targets_D = grid_sides(side, merging.window, features_NPH.device)
    slot_NP, patches_NK = match(features_NPH, sources_S, targets_D, patches - kept, blocks=merging.order == "blocks")
    sizes_NP = torch.ones(pictures, patches, device=features_NPH.device)
    return merge(features_NPH, sizes_NP, slot_NP, kept)[0], patches_NK


def _squares(features_NPH: Tensor, side: int, s: int) -> Tensor:
    """The patches of each square of ``s`` x ``s``, squares and patches in raster order: [N, (side/s)^2, s*s, H]."""
    return features_NPH.unflatten(1, (side // s, s, side // s, s)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def pool_grid(features_NPH: Tensor, side: int, pooling: Pooling) -> Tensor:
    """One embedding for each square of patches, in raster order.

    Returns:
        [N, (side/s)^2, H], for ``pixel_shuffle`` [N, (side/s)^2, s*s*H] with the patches of a square in raster order (as in
        Idefics3 and InternVL).
    """
    squares_NKsH = _squares(features_NPH, side, pooling.stride)
    if pooling.kind == "average":
        return squares_NKsH.mean(dim=2)
    return squares_NKsH.amax(dim=2) if pooling.kind == "max" else squares_NKsH.flatten(2)


def reduce_grid(features_NPH: Tensor, side: int, kept: int, reduction: TokenMerging | Pooling) -> tuple[Tensor, Tensor | None]:
    """Merging or pooling, as the settings say, to ``kept`` embeddings of each picture.

    Returns:
        these, and where they were merged the patch that each stands for, int64 [N, K].

    Raises:
        ValueError: the batch has places for another number than pooling makes.
    """
    if isinstance(reduction, TokenMerging):
        return merge_grid(features_NPH, side, kept, reduction)
    if kept != reduction.kept(side):
        raise ValueError(f"a picture is pooled to {reduction.kept(side)} embeddings, the batch has places for {kept}")
    return pool_grid(features_NPH, side, reduction), None
