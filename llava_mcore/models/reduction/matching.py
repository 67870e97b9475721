"""Merging of tokens that look alike, for a whole batch of pictures at once and differentiable in what is merged.

Tokens are divided into sources and targets. Each source has one best target by cosine similarity; the ``merged`` sources with the
best of these are averaged into their targets (bipartite soft matching; Bolya et al., 2023). How many are merged is known on the
host, so no shape waits for the device. Of sources with equal similarities the earlier is merged.

Shape suffixes: N pictures, T tokens of a picture, S sources, D targets, M merged sources, K tokens that are left, H width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_mcore.platform.copies import upload


@lru_cache(maxsize=8)
def _grid_sides(side: int, window: int) -> tuple[Tensor, Tensor]:
    """Places of sources and targets in a grid: targets are the upper left of each whole window."""
    corner = torch.zeros(side, side, dtype=torch.bool)
    whole = side // window * window
    corner[:whole:window, :whole:window] = True
    return (~corner.flatten()).nonzero()[:, 0], corner.flatten().nonzero()[:, 0]


def grid_sides(side: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of sources [S] and of targets [D] in a picture of ``side`` x ``side`` patches, in raster order (ToMeSD)."""
    sources_S, targets_D = _grid_sides(side, window)
    return upload(sources_S, device), upload(targets_D, device)


def alternating_sides(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of sources, every second token from the first on, and of targets, those between them (ToMe)."""
    return torch.arange(0, tokens, 2, device=device), torch.arange(1, tokens, 2, device=device)


@torch.no_grad()
def match(
    metric_NTC: Tensor, sources_S: Tensor, targets_D: Tensor, merged: int, *, protect_first: bool = False, blocks: bool = False
) -> tuple[Tensor, Tensor]:
    """Which of the K = T - ``merged`` tokens that are left each token goes to, int64 [N, T], and which are left, int64 [N, K].

    Args:
        metric_NTC: what similarity is taken of, of any width.
        sources_S: places of those that may be merged.
        targets_D: places of those that stay; with the sources all T.
        merged: how many sources are merged.
        protect_first: the first source, a class token, is not merged.
        blocks: what is left is ordered as in ToMeSD, the sources from the likest to the least like and then the targets;
            otherwise it stands as it stood among all T.
    """
    metric_NTC = F.normalize(metric_NTC.float(), dim=-1)
    scores_NSD = metric_NTC[:, sources_S] @ metric_NTC[:, targets_D].transpose(1, 2)
    best_NS, target_NS = scores_NSD.max(dim=-1)
    if protect_first:
        best_NS[:, 0] = -torch.inf
    ranked_NS = best_NS.argsort(dim=1, descending=True, stable=True)
    merged_NM = ranked_NS[:, :merged]
    into_NM = targets_D[target_NS.gather(1, merged_NM)]
    kept_NK = torch.cat([sources_S[ranked_NS[:, merged:]], targets_D.expand(len(ranked_NS), -1)], dim=1)
    if not blocks:
        kept_NK = kept_NK.sort(dim=1).values
    slot_NT = torch.empty(metric_NTC.shape[:2], dtype=torch.int64, device=metric_NTC.device)
    slot_NT.scatter_(1, kept_NK, torch.arange(kept_NK.shape[1], device=slot_NT.device).expand_as(kept_NK))
    return slot_NT.scatter_(1, sources_S[merged_NM], slot_NT.gather(1, into_NM)), kept_NK


def merge(tokens_NTH: Tensor, sizes_NT: Tensor, slot_NT: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The mean of the tokens of each slot, weighted by their sizes, [N, K, H], and the summed sizes [N, K] float32.

    A product with the matrix of weights: forward and backward it is deterministic on every device, as adding by index is not.

    Args:
        tokens_NTH: in the type they are wanted in.
        sizes_NT: patches that each stands for, float32.
        slot_NT: where each goes (:func:`match`).
        kept: K.
    """
    slots_K1 = torch.arange(kept, device=slot_NT.device)[:, None]
    weights_NKT = (slot_NT[:, None] == slots_K1) * sizes_NT[:, None]
    sizes_NK = weights_NKT.sum(dim=-1)
    return (weights_NKT / sizes_NK[..., None]).to(tokens_NTH.dtype) @ tokens_NTH, sizes_NK
