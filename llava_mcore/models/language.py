"""The decoder: Megatron-Core's ``GPTModel`` with rotary positions that follow the packed samples and a loss that ignores padding.

Shape suffixes: B rows (always 1: streams are laid end to end), T tokens of a micro-batch, V vocabulary (a tensor-parallel
rank's part of it), D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from llava_mcore.models.layers import block_spec, parts_of
from llava_mcore.settings.schema import LanguageSettings

IGNORED = -100


class RotaryEmbedding(nn.Module):
    """Angles of the rotary embedding (Su et al., 2021) at given positions.

    Megatron-Core's own either counts from the start of the stream or walks over the packed samples one by one; looking the
    angles up by position is exact for any packing and one operation. It takes the place of the multimodal rotary embedding,
    the one Megatron-Core hands position ids to.
    """

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        # Computed in float32 on the CPU, so that every device rounds alike.
        exponents_D = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        self.register_buffer("frequencies_D", 1.0 / (base**exponents_D), persistent=False)

    def forward(self, position_ids_BT: Tensor, _section: Any = None, cp_group: Any = None) -> Tensor:
        """Position ids [1, T] to angles [T, 1, 1, D], float32."""
        angles_TD = torch.outer(position_ids_BT[0].float(), self.frequencies_D)  # type: ignore[arg-type]
        return torch.cat([angles_TD, angles_TD], dim=-1)[:, None, None, :]


class LanguageModel(GPTModel):
    """A Llama-style decoder (Touvron et al., 2023), or the part of it that one pipeline stage holds.

    Args:
        config: Megatron-Core's configuration (``models.config.decoder_config``).
        language: sizes of the decoder.
        groups: process groups.
        pre_process: whether this stage holds the embedding.
        post_process: whether this stage holds the final norm and the head.
        vp_stage: which of its parts of an interleaved pipeline this is; None where there is only one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageSettings,
        groups: ProcessGroupCollection,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        num_layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
        super().__init__(
            config,
            block_spec(AttnMaskType.causal, num_layers, parts_of(config)),
            language.padded_vocab_size,
            language.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=language.tie_word_embeddings,
            position_embedding_type="mrope",
            # Image embeddings are spliced in before the stream is split over the tensor-parallel ranks.
            scatter_embedding_sequence_parallel=False,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        self.rotary_pos_emb = RotaryEmbedding(language.head_dim, language.rotary_base)
        rows = language.padded_vocab_size // groups.tp.size()
        self.real_rows = min(max(language.vocab_size - groups.tp.rank() * rows, 0), rows)

    def mask_padded_vocabulary(self, logits: Tensor) -> Tensor:
        """Takes the rows that only pad the vocabulary out of the softmax, in place: [..., V] to the same."""
        if self.real_rows < logits.shape[-1]:
            logits[..., self.real_rows :] = float("-inf")
        return logits

    def compute_language_model_loss(self, labels_BT: Tensor, logits_TBV: Tensor) -> Tensor:
        """Cross entropy of each token [1, T], float32; zero where the label is -100."""
        loss_BT = super().compute_language_model_loss(labels_BT.clamp(min=0), self.mask_padded_vocabulary(logits_TBV))
        return loss_BT * (labels_BT != IGNORED)
