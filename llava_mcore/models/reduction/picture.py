"""Merging and pooling of a picture's grid of features, before or after the projector.

Shape suffixes: N pictures, P patches in raster order, K embeddings that are left, H width (of tower or decoder), h w a grid, s a
side of a pooled square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_mcore.models.reduction.matching import grid_sides, match, merge
from llava_mcore.settings.reduction import Pooling, TokenMerging


def merge_grid(features_NPH: Tensor, side: int, kept: int, merging: TokenMerging) -> Tensor:
    """The features [N, K, H] that are left when those that look alike are merged; with K = P the features themselves.

    Args:
        features_NPH: of pictures of ``side`` x ``side`` patches.
        side: patches along a side.
        kept: K, at least one for each whole window.
        merging: window and order.
    """
    pictures, patches = features_NPH.shape[:2]
    if kept == patches:
        return features_NPH
    sources_S, targets_D = grid_sides(side, merging.window, features_NPH.device)
    slot_NP = match(features_NPH, sources_S, targets_D, patches - kept, blocks=merging.order == "blocks")
    sizes_NP = torch.ones(pictures, patches, device=features_NPH.device)
    return merge(features_NPH, sizes_NP, slot_NP, kept)[0]


def pool_grid(features_NPH: Tensor, side: int, pooling: Pooling) -> Tensor:
    """One embedding for each square of patches, in raster order.

    Returns:
        [N, (side/s)^2, H], for ``pixel_shuffle`` [N, (side/s)^2, s*s*H] with the patches of a square in raster order (as in
        Idefics3 and InternVL).
    """
    s = pooling.stride
    squares_NhswsH = features_NPH.unflatten(1, (side // s, s, side // s, s))
    if pooling.kind == "average":
        return squares_NhswsH.mean(dim=(2, 4)).flatten(1, 2)
    if pooling.kind == "max":
        return squares_NhswsH.amax(dim=(2, 4)).flatten(1, 2)
    return squares_NhswsH.transpose(2, 3).flatten(3).flatten(1, 2)


def reduce_grid(features_NPH: Tensor, side: int, kept: int, reduction: TokenMerging | Pooling) -> Tensor:
    """Merging or pooling, as the settings say, to ``kept`` embeddings of each picture.

    Raises:
        ValueError: the batch has places for another number than pooling makes.
    """
    if isinstance(reduction, TokenMerging):
        return merge_grid(features_NPH, side, kept, reduction)
    if kept != reduction.kept(side):
        raise ValueError(f"a picture is pooled to {reduction.kept(side)} embeddings, the batch has places for {kept}")
    return pool_grid(features_NPH, side, reduction)
