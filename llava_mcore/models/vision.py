"""The vision tower, CLIP's (Radford et al., 2021) or SigLIP's (Zhai et al., 2023), on Megatron-Core's ``TransformerBlock``.

Shape suffixes: N pictures, C channels, h w picture size, P patches, K positions (P and the class token, where there is one), F
features that are left of them where layers merge tokens, H width of the tower.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from llava_mcore.models.backend import padded_pictures
from llava_mcore.models.layers import Norm, block_spec
from llava_mcore.models.reduction.tower import left_over, with_merging
from llava_mcore.settings.schema import VisionSettings


def resized_positions(table_KH: Tensor, positions: int, class_token: bool) -> Tensor:
    """A position table for pictures of another size.

    The rows of the patches, seen as a picture, are interpolated bicubically without aligned corners, and the class token's is
    kept: what transformers does for ``interpolate_pos_encoding``, once and for all.

    Args:
        table_KH: the table there is; its patches are a square.
        positions: rows the table is to have.
        class_token: whether the first row is that of a class token.
    """
    if len(table_KH) == positions:
        return table_KH
    kept, (old, new) = int(class_token), (isqrt(rows - class_token) for rows in (len(table_KH), positions))
    picture_1Hhw = table_KH[kept:].float().t().reshape(1, -1, old, old)
    patches_PH = F.interpolate(picture_1Hhw, size=(new, new), mode="bicubic", align_corners=False).flatten(2)[0].t()
    return torch.cat([table_KH[:kept], patches_PH.to(table_KH.dtype)])


class PatchEmbedding(nn.Module):
    """Cuts a picture into patches and projects each. A linear over flattened patches is the convolution of the published
    models with kernel and stride of one patch, and faster.

    Its weight is [H, C*p*p], the convolution's [H, C, p, p] flattened. Pixels that fill no patch are cut off, as the convolution
    does.
    """

    def __init__(self, vision: VisionSettings, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = vision.patch_size
        self.weight = nn.Parameter(torch.empty(vision.hidden_size, 3 * vision.patch_size**2, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(vision.hidden_size, dtype=dtype)) if vision.patch_bias else None

    def forward(self, pixels_NChw: Tensor) -> Tensor:
        """[N, C, h, w] to [N, P, H], patches in raster order."""
        p = self.patch_size
        n, c, h, w = pixels_NChw.shape
        rows, columns = h // p, w // p
        whole = pixels_NChw[:, :, : rows * p, : columns * p]
        patches = whole.reshape(n, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(n, rows * columns, c * p * p), self.weight, self.bias)


class VisionTower(MegatronModule):
    """Pictures to features of the selected layer.

    Only the layers up to the selected hidden state are built. The embeddings and the first norm are replicated over the
    tensor-parallel ranks, the layers are split.

    Args:
        config: Megatron-Core's configuration (``models.config.tower_config``).
        vision: sizes and the selected layer and feature.
        groups: tensor-parallel group of the tower.
    """

    def __init__(self, config: TransformerConfig, vision: VisionSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.tp_group = groups.tp  # Megatron-Core shards the checkpoint of this module by it
        self.dropped = int(vision.class_token and vision.select_feature == "patch")
        self.merges = vision.token_merging is not None
        width, dtype = vision.hidden_size, config.params_dtype
        self.patch_embedding = PatchEmbedding(vision, dtype)
        self.class_embedding = nn.Parameter(torch.empty(width, dtype=dtype)) if vision.class_token else None
        self.position_embedding = nn.Parameter(torch.empty(vision.positions, width, dtype=dtype))
        self.pre_layernorm = Norm(config, width, vision.norm_eps) if vision.pre_norm else None
        self.encoder = TransformerBlock(
            config,
            with_merging(block_spec(config, AttnMaskType.no_mask, config.num_layers), vision),
            post_layer_norm=False,
            pg_collection=groups,
        )

    def forward(self, pixels_NChw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels [N, 3, h, w] to features of the selected layer.

        Returns:
            [N, P or K, H]; and where layers merge them which of the features there would be each is, int64 [N, F], ascending.
        """
        pictures = pixels_NChw.shape[0]
        if self.config.fp8:  # its products need rows in multiples, K is odd: blank pictures make them up
            multiple = get_fp8_align_size(self.config.fp8_recipe)
            blank = padded_pictures(pictures, self.position_embedding.shape[0], multiple) - pictures
            pixels_NChw = F.pad(pixels_NChw, (0, 0, 0, 0, 0, 0, 0, blank))
        hidden_NKH = self.patch_embedding(pixels_NChw.to(self.patch_embedding.weight.dtype))
        if self.class_embedding is not None:
            hidden_NKH = torch.cat([self.class_embedding.expand(hidden_NKH.shape[0], 1, -1), hidden_NKH], dim=1)
        hidden_NKH = hidden_NKH + self.position_embedding
        if self.pre_layernorm is not None:
            hidden_NKH = self.pre_layernorm(hidden_NKH)
        hidden_FNH = self.encoder(hidden_NKH.transpose(0, 1).contiguous(), attention_mask=None)
        hidden_NFH = hidden_FNH.transpose(0, 1)[:pictures, self.dropped :]
        if not self.merges:
            return hidden_NFH, None
        left_NF = left_over(self.encoder.layers, hidden_NKH.shape[0], hidden_NKH.shape[1], hidden_NKH.device)
        return hidden_NFH, left_NF[:pictures, self.dropped :] - self.dropped
