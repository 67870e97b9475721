"""The decoder: Megatron-Core's ``GPTModel`` with rotary positions that follow the packed samples and a loss that ignores padding.

Shape suffixes: B rows (always 1: streams are laid end to end), T tokens of a micro-batch, V vocabulary (a tensor-parallel
rank's part of it).
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from llava_mcore.models.layers import block_spec
from llava_mcore.models.rotary import RotaryEmbedding
from llava_mcore.settings.schema import LanguageSettings

IGNORED = -100


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
            block_spec(config, AttnMaskType.causal, num_layers),
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
        self.rotary_pos_emb = RotaryEmbedding(language)
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
