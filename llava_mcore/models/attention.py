"""Portable core attention: packed samples on torch's scaled_dot_product_attention, on any device, without Transformer Engine.

Shape suffixes: S stream (or patches), B rows of a batch, N query heads, G key/value heads, D width of a head, L one sample or the
queries of a part of it, K the keys of that part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from torch import Tensor, cat, nn

from llava_mcore.models.context_attention import context_attention
from llava_mcore.models.flash import flash_attention
from llava_mcore.parallel.sequence import Partition
from llava_mcore.platform.copies import upload

LEAST_BLOCK = 128  # queries that are worked on at once in a sliding window, at least


@dataclass
class PackedSamples(PackedSeqParams):
    """Where samples begin and end in a stream, known on the host so that no kernel launch waits for the device.

    ``qkv_format`` stays "sbhd": rotary positions come from the position ids (models/language.py) and not from Megatron-Core's
    walk over ``cu_seqlens``, which copies them to the host in every layer.
    """

    qkv_format: str = "sbhd"
    sample_lengths: list[int] = field(default_factory=list)
    partition: Partition | None = None  # of the samples over the ranks of cp_group
    exchange: str = "all_gather"  # how those ranks see each other's keys and values
    asked: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # this rank's tokens whose logits are wanted
    device_ends: Tensor | None = None  # of ends()

    def ends(self, device: torch.device) -> Tensor:
        """Where samples begin and end, [samples + 1], int32; copied to ``device`` once a micro-batch, not once a layer."""
        if self.device_ends is None:
            ends = torch.tensor([0, *accumulate(self.sample_lengths)], dtype=torch.int32)
            self.device_ends = upload(ends, device)
        return self.device_ends

    def as_thd(self, device: torch.device) -> PackedSeqParams:
        """The same in the form Transformer Engine's attention takes."""
        ends, longest = self.ends(device), max(self.sample_lengths)
        return PackedSeqParams("thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest)


class PackedAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v within each sample; causal, perhaps within a sliding window, or full; grouped queries allowed.

    The signature is the one Megatron-Core's ``SelfAttention`` builds and calls.

    Args:
        config: supplies a scale override (``softmax_scale``), the window (``window_size``) and whether packed samples go through
            one flash-attention kernel (``attention_backend``) or one by one through torch's attention; dropout must be off.
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
        # Megatron-Core counts what is seen to the left of a token.
        self.window = config.window_size[0] + 1 if self.causal and config.window_size else None
        self.flash = config.attention_backend == AttnBackend.flash

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
        # The value is a view of queries, keys and values together, which would all be kept for the backward pass.
        value_SBGD = value_SBGD.contiguous()
        if packed_seq_params is None:
            return self._attend(query_SBND, key_SBGD, value_SBGD).flatten(2)
        if packed_seq_params.partition is not None:
            return self._attend_over_ranks(query_SBND, key_SBGD, value_SBGD, packed_seq_params.partition, packed_seq_params)
        lengths = packed_seq_params.sample_lengths
        if self.flash:
            output_SND = flash_attention(
                query_SBND[:, 0],
                key_SBGD[:, 0],
                value_SBGD[:, 0],
                packed_seq_params.ends(query_SBND.device),
                max(lengths),
                self.causal,
                self.softmax_scale,
                self.window,
            )
            return output_SND[:, None].flatten(2)
        pieces = [
            self._attend(query_LBND, key_LBGD, value_LBGD)
            for query_LBND, key_LBGD, value_LBGD in zip(
                query_SBND.split(lengths), key_SBGD.split(lengths), value_SBGD.split(lengths), strict=True
            )
        ]
        return cat(pieces).flatten(2)

    def _attend_over_ranks(
        self, query_S1ND: Tensor, key_S1GD: Tensor, value_S1GD: Tensor, partition: Partition, samples: PackedSamples
    ) -> Tensor:
        """The same where each context-parallel rank holds a part of every sample."""
        if not self.causal:
            raise ValueError("context parallelism is for the causal decoder")
        scale = self.softmax_scale or query_S1ND.shape[-1] ** -0.5
        output_SND = context_attention(
            query_S1ND[:, 0], key_S1GD[:, 0], value_S1GD[:, 0], partition, samples.cp_group, samples.exchange, scale, self.window
        )
        return output_SND[:, None].flatten(2)

    def _attend(self, query_LBND: Tensor, key_LBGD: Tensor, value_LBGD: Tensor) -> Tensor:
        """One attention over whole samples: [L, B, N, D] from [L, B, N|G, D]."""
        length = query_LBND.shape[0]
        if self.window is None or length <= self.window:
            return self._product(query_LBND, key_LBGD, value_LBGD, is_causal=self.causal)
        # So many queries at a time that most keys they are held against are seen.
        step = max(self.window, LEAST_BLOCK)
        pieces = []
        for start in range(0, length, step):
            first, end = max(0, start - self.window + 1), min(start + step, length)
            rows, keys = slice(start, end), slice(first, end)
            distance = torch.arange(start, end, device=query_LBND.device)[:, None] - torch.arange(
                first, end, device=query_LBND.device
            )
            seen = (distance >= 0) & (distance < self.window)
            pieces.append(self._product(query_LBND[rows], key_LBGD[keys], value_LBGD[keys], attn_mask=seen))
        return cat(pieces)

    def _product(self, query_LBND: Tensor, key_KBGD: Tensor, value_KBGD: Tensor, **who_sees: Any) -> Tensor:
        output_BNLD = F.scaled_dot_product_attention(
            query_LBND.permute(1, 2, 0, 3),
            key_KBGD.permute(1, 2, 0, 3),
            value_KBGD.permute(1, 2, 0, 3),
            scale=self.softmax_scale,
            enable_gqa=query_LBND.shape[2] != key_KBGD.shape[2],
            **who_sees,
        )
        return output_BNLD.permute(2, 0, 1, 3)
