"""The decoder: Megatron-Core's ``GPTModel`` with rotary positions that follow the packed samples and a head that looks only where
it is asked.

Shape suffixes: T tokens of a micro-batch (of one context-parallel rank), S those of one sequence-parallel rank, Q those whose
logits are asked for, H width, V vocabulary (a tensor-parallel rank's part of it). The 1 is the number of rows:
streams are laid end to end.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from llava_mcore.models.attention import PackedSamples
from llava_mcore.models.layers import block_spec
from llava_mcore.models.rotary import RotaryEmbedding
from llava_mcore.settings.schema import LanguageSettings


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
        if post_process:
            # The head gets whole tokens instead of each rank's part of the stream, and sums the gradients of its inputs itself.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = groups.tp.size() > 1

    def _postprocess(
        self, hidden_states: Tensor, labels: Tensor | None, packed_seq_params: PackedSamples, **_unused: Any
    ) -> Tensor:
        """From the last layer [S, 1, H] to logits [1, Q, V], or with labels [1, T] to losses [1, T]; GPTModel.forward calls it.

        Most tokens of a stream (pictures, questions, padding) have no label, so the largest matrix product of the model and the
        softmax over the vocabulary are left out for them: ``packed_seq_params.asked`` says who is left.
        """
        if not self.post_process:
            return hidden_states
        hidden_T1H = hidden_states
        if self.config.sequence_parallel:
            # The head hands back whole gradients: each rank takes its part of them and nothing is summed twice.
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, tensor_parallel_output_grad=False, group=self.tp_group)
        asked_Q = packed_seq_params.asked
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_Q1V = self._mask_padded_vocabulary(self.output_layer(hidden_T1H.index_select(0, asked_Q), weight=weight)[0])
        if labels is None:
            return logits_Q1V.transpose(0, 1)
        loss_1Q = self.compute_language_model_loss(labels.index_select(1, asked_Q), logits_Q1V)
        return loss_1Q.new_zeros(labels.shape).index_copy(1, asked_Q, loss_1Q)

    def _mask_padded_vocabulary(self, logits: Tensor) -> Tensor:
        """Takes the rows that only pad the vocabulary out of the softmax, in place: [..., V] to the same."""
        if self.real_rows < logits.shape[-1]:
            logits[..., self.real_rows :] = float("-inf")
        return logits
