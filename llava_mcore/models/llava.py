"""The LLaVA model (Liu et al., 2023): tower, projector, splice by index, decoder. Reads like one device; groups do the rest.

Shape suffixes: T tokens of a micro-batch (all its streams end to end), T' those of one sequence-parallel rank, E image
embeddings, N pictures, P patches, H width of the decoder, V vocabulary (one tensor-parallel rank's part).
"""

from __future__ import annotations

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from llava_mcore.models.attention import PackedSamples
from llava_mcore.models.config import DTYPES, decoder_config, projector_config, tower_config
from llava_mcore.models.language import LanguageModel
from llava_mcore.models.layers import mlp_submodules
from llava_mcore.models.vision import VisionTower
from llava_mcore.parallel.groups import Groups
from llava_mcore.settings.schema import ModelSettings, ParallelSettings


def mark_partitioned(model: torch.nn.Module) -> None:
    """Marks the weights that are split over tensor-parallel ranks.

    Megatron-Core does so only where it initialises them itself; unmarked, they pass for copies, and the gradient norm counts the
    first rank's part alone.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear)) and module.weight is not None:
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


class LlavaModel(MegatronModule):
    """Vision tower, projector and decoder, or the part of them that one rank holds.

    The first stage holds the tower, the projector, the token embedding and its share of the decoder; the last stage the head.

    Args:
        model: sizes.
        parallel: the layout.
        dtype: "float32" or "bfloat16", of weights and activations.
        groups: process groups of this rank.
    """

    def __init__(self, model: ModelSettings, parallel: ParallelSettings, dtype: str, groups: Groups) -> None:
        config = decoder_config(model, parallel, DTYPES[dtype])
        super().__init__(config)
        self.settings = model
        self.groups = groups
        self.tp_group = groups.tp
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = groups.is_first_stage, groups.is_last_stage
        self.share_embeddings_and_output_weights = model.language.tie_word_embeddings
        if self.pre_process:
            self.vision_tower = VisionTower(tower_config(model, parallel, DTYPES[dtype]), model.vision, groups.tower)
            affine = model.projector.type == "linear"
            self.projector = MultimodalProjector(
                projector_config(model, parallel, DTYPES[dtype]),
                MLPSubmodules(linear_fc1=ColumnParallelLinear) if affine else mlp_submodules(),
                "affine" if affine else "mlp",
                model.vision.hidden_size,
                tp_group=groups.tp,
            )
        self.language_model = LanguageModel(config, model.language, groups.mcore, self.pre_process, self.post_process)
        mark_partitioned(self)

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """Takes the activations of the previous pipeline stage; Megatron-Core's schedules call this."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The weight the first and the last stage both hold where the head is tied; Megatron-Core sums its gradients."""
        return self.language_model.shared_embedding_or_output_weight()

    def encode_images(self, pixel_values_NChw: Tensor) -> Tensor:
        """Pixels [N, 3, h, w] to decoder embeddings [E, H], picture after picture in raster order; N may be 0."""
        if pixel_values_NChw.shape[0] == 0:
            # Megatron-Core's layers cannot run on nothing. A blank picture that goes nowhere gives every parameter its (zero)
            # gradient and keeps every collective in step with the other ranks.
            size = self.settings.vision.image_size
            return self.encode_images(pixel_values_NChw.new_zeros(1, 3, size, size))[:0]
        features_NPH = self.vision_tower(pixel_values_NChw)
        return self.projector(features_NPH.flatten(0, 1))

    def embed(self, input_ids_T: Tensor, pixel_values_NChw: Tensor, image_index_E: Tensor) -> Tensor:
        """Token and image embeddings in their places: [T', 1, H].

        Every tensor-parallel rank computes the whole stream here and keeps its own part, so the projector's gradient is complete
        on each of them.
        """
        text_T1H = self.language_model.embedding(input_ids=input_ids_T[None], position_ids=None)
        image_EH = self.encode_images(pixel_values_NChw)
        hidden_T1H = text_T1H.index_copy(0, image_index_E, image_EH[:, None])
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(hidden_T1H, group=self.groups.tp)
        return hidden_T1H

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        sample_lengths: list[int],
        pixel_values_NChw: Tensor,
        image_index_E: Tensor,
        labels_T: Tensor | None = None,
    ) -> Tensor:
        """One micro-batch through the part of the model this rank holds.

        Args:
            input_ids_T: int64; the ids at image embeddings are overwritten by them.
            position_ids_T: int64, from 0 in each sample.
            sample_lengths: tokens of each sample in order, padding included; sums to T.
            pixel_values_NChw: normalised pixels; N may be 0.
            image_index_E: int64, where in the stream each image embedding goes.
            labels_T: int64, already shifted, -100 where nothing is predicted.

        Returns:
            on the last stage the loss of each token [T] in float32 (0 where the label is -100), or without labels the logits
            [T, V]; on other stages the activations [T', 1, H].
        """
        decoder_input = self.embed(input_ids_T, pixel_values_NChw, image_index_E) if self.pre_process else None
        output = self.language_model(
            input_ids=None,
            position_ids=position_ids_T[None],
            attention_mask=None,
            decoder_input=decoder_input,
            labels=None if labels_T is None else labels_T[None],
            packed_seq_params=PackedSamples(sample_lengths=sample_lengths),
        )
        if self.post_process:
            return output[0]
        # A stage in which nothing is trained still hands its output on through the schedule's backward pass.
        return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()

    def full_logits(self, logits_TV: Tensor) -> Tensor:
        """One rank's part of the logits to all of them, [T, vocab_size]; on the last stage only."""
        masked_TV = self.language_model.mask_padded_vocabulary(logits_TV)
        return gather_from_tensor_model_parallel_region(masked_TV, group=self.groups.tp)[:, : self.settings.language.vocab_size]
