"""From the features of tiles to the embeddings of pictures and clips, in the order that ``embedding_order`` says.

Shape suffixes: n or m tiles, P features of each, s of them along a side, F features of all, R of all after pooling, E embeddings,
M further rows, K features each is made of, N all tiles, H width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_mcore.geometry import Geometry
from llava_mcore.models.embedding_order import Arrangement
from llava_mcore.platform.copies import upload


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
        self.time_gate = nn.Parameter(torch.zeros(width, dtype=dtype)) if geometry.has_time else None
        self._period = geometry.video.time_period

    def forward(self, features_FH: Tensor, order: Arrangement, chosen_e: Tensor | None = None) -> Tensor:
        """Embeddings [E, H]: rows of features, further rows made of them, and learned tokens.

        Args:
            features_FH: of all tiles of the micro-batch.
            order: host-known.
            chosen_e: int64 on the host, the embeddings that are wanted; None: all.
        """
        device, dtype = features_FH.device, features_FH.dtype
        if self.time_gate is not None and self._period is not None:
            table_NH = upload(sinusoids(order.seconds, self.time_gate.shape[0], self._period).to(dtype), device)
            each = upload(torch.tensor(order.rows, dtype=torch.int64), device)
            times_FH = table_NH.repeat_interleave(each, dim=0, output_size=len(features_FH))
            features_FH = features_FH + self.time_gate.to(dtype) * times_FH
        rows = [features_FH]
        for token_H, uses in ((self.newline, order.newlines), (self.faster, order.fasters)):
            if token_H is not None:
                # A row for each use, so that gradients are summed in one order on every device; none is a gradient of zero.
                rows.append(token_H.to(dtype).expand(uses, -1))
        if len(order.taps_MK):
            taps_MK = upload(torch.from_numpy(order.taps_MK), device)
            if order.weights_MK is None:
                rows.append(features_FH[taps_MK].amax(dim=1))
            else:
                weights_MK = upload(torch.from_numpy(order.weights_MK), device)
                rows.append(_weighted(features_FH, taps_MK, weights_MK).to(dtype))
        index_E = torch.from_numpy(order.index_E)
        index_E = index_E if chosen_e is None else index_E[chosen_e]
        return torch.cat(rows).index_select(0, upload(index_E, device))


def sinusoids(seconds: Sequence[float], width: int, period: float) -> Tensor:
    """Cosines and sines of times [N, H], float32: frequencies from 1 to 1 / ``period`` radians a second in equal ratios (as of
    positions in Vaswani et al., 2017); zeros where the time is nan.
    """
    half = width // 2
    frequencies = np.power(period, -np.arange(half) / max(1, half - 1))
    angles = np.array(seconds, dtype=np.float64).reshape(-1, 1) * frequencies
    table = np.zeros((len(seconds), width), dtype=np.float32)
    table[:, : 2 * half] = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return torch.from_numpy(np.nan_to_num(table))


def _weighted(features_FH: Tensor, taps_MK: Tensor, weights_MK: Tensor) -> Tensor:
    """Further rows [M, H], one of their K after another: all at once would hold K times the rows."""
    made_MH = features_FH[taps_MK[:, 0]] * weights_MK[:, :1]
    for k in range(1, taps_MK.shape[1]):
        made_MH = made_MH + features_FH[taps_MK[:, k]] * weights_MK[:, k : k + 1]
    return made_MH
