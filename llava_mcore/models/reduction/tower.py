"""Merging of tokens inside the tower's layers (ToMe; Bolya et al., 2023), from the formulas.

After attention, each layer merges the pairs of tokens whose keys, averaged over the heads, are most alike. A token that stands
for s patches is one key of s equal ones: log s is added to its scores (proportional attention). Unlike in the paper's code, what
is left keeps its order, so that the decoder reads it in raster order; which tokens a layer takes for sources follows that order.

Shape suffixes: T tokens of a picture, K those that are left, N pictures, A heads of this rank, D width of a head, H width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from llava_mcore.models.attention import PackedAttention
from llava_mcore.models.reduction.matching import alternating_sides, match, merge
from llava_mcore.settings.schema import VisionSettings


class MergingAttention(PackedAttention):
    """Attention of whole pictures that adds a bias to the scores and leaves behind its keys."""

    keys_NTD: Tensor | None = None
    """Summed over this rank's heads; the layer takes them away."""

    def forward(
        self,
        query_TNAD: Tensor,
        key_TNAD: Tensor,
        value_TNAD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Returns [T, N, A*D]; the bias is [N, 1, 1, T]."""
        self.keys_NTD = key_TNAD.detach().float().sum(dim=2).transpose(0, 1)
        if attention_bias is None:
            return super().forward(query_TNAD, key_TNAD, value_TNAD, attention_mask)
        bias = attention_bias.to(query_TNAD.dtype)
        return self._product(query_TNAD, key_TNAD, value_TNAD.contiguous(), attn_mask=bias).flatten(2)


class MergingLayer(TransformerLayer):
    """A tower layer that hands on fewer tokens than it gets.

    Megatron-Core's blocks, recomputing ones too, pass a layer's second output to the next as ``context``, which a tower has no
    other use for: here it is the sizes of the tokens.

    Args:
        merged: tokens that this layer merges.
        class_token: the first token is not merged.
        proportional: sizes weigh in attention.

    Attributes:
        kept_NK: which of its tokens the last call left, int64; None: all.
    """

    def __init__(self, *arguments: Any, merged: int, class_token: bool, proportional: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kept_NK: Tensor | None = None
        self.merged, self.class_token, self.proportional = merged, class_token, proportional

    def forward(self, hidden_states: Tensor, context: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
        """[T, N, H] and sizes [N, T] (None: all one) to [K, N, H] and sizes [N, K]."""
        sizes_NT = context
        if self.proportional and sizes_NT is not None:
            options["attention_bias"] = sizes_NT.log()[:, None, None]
        hidden_TNH, _ = self._forward_attention(hidden_states, **options)
        attention = self.self_attention.core_attention
        keys_NTD, attention.keys_NTD = attention.keys_NTD, None
        self.kept_NK = None
        hidden_KNH, sizes_NK = self._merge(hidden_TNH, sizes_NT, keys_NTD) if self.merged else (hidden_TNH, sizes_NT)
        return self._forward_mlp(hidden_KNH), sizes_NK

    def _merge(self, hidden_TNH: Tensor, sizes_NT: Tensor | None, keys_NTD: Tensor) -> tuple[Tensor, Tensor]:
        tokens, pictures = hidden_TNH.shape[:2]
        if self.tp_group.size() > 1:  # each rank has some of the heads
            dist.all_reduce(keys_NTD, group=self.tp_group)
        sides = alternating_sides(tokens, hidden_TNH.device)
        slot_NT, self.kept_NK = match(keys_NTD, *sides, self.merged, protect_first=self.class_token)
        if sizes_NT is None:
            sizes_NT = torch.ones(pictures, tokens, device=hidden_TNH.device)
        hidden_NKH, sizes_NK = merge(hidden_TNH.transpose(0, 1), sizes_NT, slot_NT, tokens - self.merged)
        return hidden_NKH.transpose(0, 1).contiguous(), sizes_NK


def left_over(layers: Iterable[nn.Module], pictures: int, tokens: int, device: torch.device) -> Tensor:
    """Which of a picture's tokens the layers of a tower have left in their last call, int64 [N, K]."""
    left_NK = torch.arange(tokens, device=device).expand(pictures, -1)
    for layer in layers:
        if isinstance(layer, MergingLayer) and layer.kept_NK is not None:
            left_NK, layer.kept_NK = left_NK.gather(1, layer.kept_NK), None
    return left_NK


def with_merging(block: TransformerBlockSubmodules, vision: VisionSettings) -> TransformerBlockSubmodules:
    """A tower's layers, made to merge as the settings say; as they are where the settings say nothing."""
    if vision.token_merging is None:
        return block
    proportional, layers = vision.token_merging.proportional_attention, []
    for layer, merged in zip(block.layer_specs, vision.merged_tokens, strict=True):
        attention = layer.submodules.self_attention
        attending = replace(attention, submodules=replace(attention.submodules, core_attention=MergingAttention))
        layers.append(
            replace(
                layer,
                module=MergingLayer,
                params={"merged": merged, "class_token": vision.class_token, "proportional": proportional},
                submodules=replace(layer.submodules, self_attention=attending),
            )
        )
    return replace(block, layer_specs=layers)
