"""Portable core attention: packed samples on torch's scaled_dot_product_attention, on any device, without Transformer Engine.

Shape suffixes: S stream (or patches), B rows of a batch, N query heads, G key/value heads, D width of a head, L one sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, cat, nn


@dataclass
class PackedSamples(PackedSeqParams):
    """Where samples begin and end in a stream, known on the host so that no kernel launch waits for the device.

    ``qkv_format`` stays "sbhd": rotary positions come from the position ids (models/language.py) and not from Megatron-Core's
    walk over ``cu_seqlens``, which copies them to the host in every layer.
    """

    qkv_format: str = "sbhd"
    sample_lengths: list[int] = field(default_factory=list)


class PackedAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v within each sample; causal or full, grouped queries allowed.

    The signature is the one Megatron-Core's ``SelfAttention`` builds and calls.

    Args:
        config: supplies nothing but a scale override (``softmax_scale``); dropout must be off.
        attn_mask_type: ``causal`` or ``no_mask``.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(f"attention mask {attn_mask_type} is not supported, use causal or no_mask")
        if attention_dropout or config.attention_dropout:
            raise ValueError("attention dropout is not supported: LLaVA models train without it")
        self.causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale or config.softmax_scale

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSamples | None = None,
    ) -> Tensor:
        """Returns [S, B, N*D]. With ``packed_seq_params``, B is 1 and each sample attends within itself."""
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("dense masks and biases are not supported: sample boundaries say who attends to whom")
        if packed_seq_params is None:
            return self._attend(query_SBND, key_SBGD, value_SBGD).flatten(2)

        lengths = packed_seq_params.sample_lengths
        pieces = [
            self._attend(query_LBND, key_LBGD, value_LBGD)
            for query_LBND, key_LBGD, value_LBGD in zip(
                query_SBND.split(lengths), key_SBGD.split(lengths), value_SBGD.split(lengths), strict=True
            )
        ]
        return cat(pieces).flatten(2)

    def _attend(self, query_LBND: Tensor, key_LBGD: Tensor, value_LBGD: Tensor) -> Tensor:
        """One attention over whole samples: [L, B, N, D] from [L, B, N|G, D]."""
        output_BNLD = F.scaled_dot_product_attention(
            query_LBND.permute(1, 2, 0, 3),
            key_LBGD.permute(1, 2, 0, 3),
            value_LBGD.permute(1, 2, 0, 3),
            is_causal=self.causal,
            scale=self.softmax_scale,
            enable_gqa=query_LBND.shape[2] != key_LBGD.shape[2],
        )
        return output_BNLD.permute(2, 0, 1, 3)
