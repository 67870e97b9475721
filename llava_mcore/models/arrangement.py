"""From the features of tiles to the embeddings of pictures and clips, in the order that ``embedding_order`` says.

Shape suffixes: n or m tiles, P features of each, s of them along a side, F features of all, R of all after pooling, E embeddings,
M further rows, K features each is made of, H width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mcore.geometry import Geometry
from llava_mcore.models.embedding_order import Arrangement


def pool_tiles(features_nPH: Tensor, strides: Sequence[int], how: str) -> Tensor:
    """Features of tiles, each pooled along both sides, as rows [R, H] tile after tile.

    Args:
        features_nPH: of tiles, P a square.
        strides: of each tile; 1: left as it is; none given: all are.
        how: "average" or "max" of whole windows, or "bilinear" to the rounded-up size, as LLaVA-OneVision does.
    """
    if all(stride == 1 for stride in strides):
        return features_nPH.flatten(0, 1)
    parts, numbers = [], []
    side = round(features_nPH.shape[1] ** 0.5)
    for stride in sorted(set(strides)):
        tiles = [number for number, own in enumerate(strides) if own == stride]
        part_mPH = features_nPH if len(tiles) == len(strides) else features_nPH[tiles]
        if stride > 1:
            grid_mHss = part_mPH.transpose(1, 2).unflatten(2, (side, side))
            part_mPH = _pool(grid_mHss, stride, how).flatten(2).transpose(1, 2)
        parts.append(part_mPH)
        numbers += tiles
    if len(parts) == 1:
        return parts[0].flatten(0, 1)
    rows = [row_PH for part_mPH in parts for row_PH in part_mPH.unbind()]
    return torch.cat([rows[place] for place in np.argsort(numbers).tolist()])


def _pool(grid_mHss: Tensor, stride: int, how: str) -> Tensor:
    if how == "average":
        return F.avg_pool2d(grid_mHss, stride)
    if how == "max":
        return F.max_pool2d(grid_mHss, stride)
    size = [-(-side // stride) for side in grid_mHss.shape[2:]]
    return F.interpolate(grid_mHss, size=size, mode="bilinear")


class LearnedTokens(nn.Module):
    """Puts embeddings in order, with what is learned to stand between rows and frames.

    Args:
        geometry: says which tokens there are.
        width: of the decoder.
        dtype: of the tokens.
    """

    def __init__(self, geometry: Geometry, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.newline = nn.Parameter(torch.empty(width, dtype=dtype)) if geometry.has_newline else None
        self.faster = nn.Parameter(torch.empty(width, dtype=dtype)) if geometry.has_faster else None

    def forward(self, features_FH: Tensor, order: Arrangement, chosen_e: Tensor | None = None) -> Tensor:
        """Embeddings [E, H]: rows of features, further rows made of them, and learned tokens.

        Args:
            features_FH: of all tiles of the micro-batch.
            order: host-known.
            chosen_e: int64 on the host, the embeddings that are wanted; None: all.
        """
        device, dtype = features_FH.device, features_FH.dtype
        rows = [features_FH]
        for token_H, uses in ((self.newline, order.newlines), (self.faster, order.fasters)):
            if token_H is not None:
                # A row for each use, so that gradients are summed in one order on every device; none is a gradient of zero.
                rows.append(token_H.to(dtype).expand(uses, -1))
        if len(order.taps_MK):
            taps_MK = torch.from_numpy(order.taps_MK).to(device, non_blocking=True)
            if order.weights_MK is None:
                rows.append(features_FH[taps_MK].amax(dim=1))
            else:
                weights_MK = torch.from_numpy(order.weights_MK).to(device, non_blocking=True)
                rows.append(_weighted(features_FH, taps_MK, weights_MK).to(dtype))
        index_E = torch.from_numpy(order.index_E)
        index_E = index_E if chosen_e is None else index_E[chosen_e]
        return torch.cat(rows).index_select(0, index_E.to(device, non_blocking=True))


def _weighted(features_FH: Tensor, taps_MK: Tensor, weights_MK: Tensor) -> Tensor:
    """Further rows [M, H], one of their K after another: all at once would hold K times the rows."""
    made_MH = features_FH[taps_MK[:, 0]] * weights_MK[:, :1]
    for k in range(1, taps_MK.shape[1]):
        made_MH = made_MH + features_FH[taps_MK[:, k]] * weights_MK[:, k : k + 1]
    return made_MH
