"""The LLaVA model (Liu et al., 2023): tower, projector, splice by index, decoder. Reads like one device; groups do the rest.

Shape suffixes: T tokens of a micro-batch (all its streams end to end), C those of one context-parallel rank, S those of one
sequence-parallel rank, E image embeddings, Q tokens whose loss or logits are wanted (e and q those among this rank's tokens), N
tiles: pictures, parts of pictures, frames (n those this rank encodes), P patches of one, F features of all tiles (f of those that
this rank encodes), H width of the decoder, V vocabulary (a tensor-parallel rank's part), R rows of position ids (one, or a second
with sample lengths), r rows that carry numbers of patches behind the hidden states.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
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
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from llava_mcore.geometry import SINGLE, Shape
from llava_mcore.models import positions
from llava_mcore.models.arrangement import LearnedTokens, pool_tiles
from llava_mcore.models.attention import PackedSamples
from llava_mcore.models.backend import resolve_here
from llava_mcore.models.config import DTYPES, KEEP_ALL, PORTABLE, Recompute, decoder_config, projector_config, tower_config
from llava_mcore.models.embedding_order import Arrangement, arrange
from llava_mcore.models.language import LanguageModel
from llava_mcore.models.layers import mlp_submodules, parts_of, unmark_unsplit
from llava_mcore.models.reduction.picture import reduce_grid
from llava_mcore.models.vision import VisionTower
from llava_mcore.parallel.encoder import deal, gather_embeddings, gather_numbers
from llava_mcore.parallel.groups import Groups
from llava_mcore.parallel.sequence import Partition, padded_tokens, partition, stream_multiple
from llava_mcore.platform.copies import upload
from llava_mcore.settings.schema import ModelSettings, ParallelSettings, PrecisionSettings


def mark_partitioned(model: torch.nn.Module) -> None:
    """Marks which parameters are split over tensor-parallel ranks, and which are copies.

    Megatron-Core marks weights only where it initialises them itself, and biases even where the group is of one rank (an encoder
    that is whole on every rank). Wrongly marked, parameters are counted once too often or too seldom in the gradient norm.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear)):
            split = module.tp_group.size() > 1
            if module.weight is not None:
                dim = 1 if isinstance(module, RowParallelLinear) else 0
                set_tensor_model_parallel_attributes(module.weight, is_parallel=split, dim=dim, stride=1)
            if isinstance(module, ColumnParallelLinear) and module.bias is not None:
                module.bias.tensor_model_parallel = split
        if isinstance(module, SequentialMLP):
            # Experts have an optimizer of their own where they are split over expert-parallel ranks. Let it be so always, that a
            # run resumes at any number of these.
            for parameter in module.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
    unmark_unsplit(model)


class ModelParts(torch.nn.ModuleList):
    """The parts of the model that one rank holds: one, or several of an interleaved pipeline."""

    @property
    def settings(self) -> ModelSettings:
        """Sizes of the whole model."""
        return next(iter(self)).settings

    def __iter__(self) -> Iterator[LlavaModel]:
        return super().__iter__()  # type: ignore[return-value]


def build_model(
    model: ModelSettings,
    parallel: ParallelSettings,
    dtype: str,
    groups: Groups,
    recompute: Recompute = KEEP_ALL,
    precision: PrecisionSettings = PORTABLE,
) -> ModelParts:
    """What one rank holds of the model; the arguments are those of :class:`LlavaModel`."""
    return ModelParts(
        LlavaModel(model, parallel, dtype, groups, recompute, vp_stage, precision)
        for vp_stage in range(parallel.virtual_pipeline)
    )


class LlavaModel(MegatronModule):
    """Vision tower, projector and decoder, or the part of them that one rank holds.

    The first stage holds the tower, the projector, the token embedding and its share of the decoder; the last stage the head.

    Args:
        model: sizes.
        parallel: the layout.
        dtype: "float32" or "bfloat16", of weights and activations.
        groups: process groups of this rank.
        recompute: which activations are computed again in the backward pass.
        vp_stage: which of its parts of an interleaved pipeline this is.
        precision: layers, attention and FP8.
    """

    def __init__(
        self,
        model: ModelSettings,
        parallel: ParallelSettings,
        dtype: str,
        groups: Groups,
        recompute: Recompute = KEEP_ALL,
        vp_stage: int = 0,
        precision: PrecisionSettings = PORTABLE,
    ) -> None:
        precision = resolve_here(precision, dtype)
        config = decoder_config(model, parallel, DTYPES[dtype], recompute, precision)
        super().__init__(config)
        self.settings, self.parallel = model, parallel
        self.stream_multiple = stream_multiple(parallel, precision)
        self.groups = groups
        self.tp_group = groups.tp
        self.vp_stage = vp_stage if parallel.virtual_pipeline > 1 else None
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = groups.is_first_stage and vp_stage == 0
        self.post_process = groups.is_last_stage and vp_stage == parallel.virtual_pipeline - 1
        self.share_embeddings_and_output_weights = model.language.tie_word_embeddings
        if self.pre_process:
            seeing = tower_config(model, parallel, DTYPES[dtype], recompute, precision)
            self.vision_tower = VisionTower(seeing, model.vision, groups.tower)
            affine = model.projector.type == "linear"
            into = projector_config(model, parallel, DTYPES[dtype], precision)
            with get_fp8_context(into, is_init=True):
                self.projector = MultimodalProjector(
                    into,
                    # Transformer Engine's linear cannot gather its output.
                    MLPSubmodules(linear_fc1=ColumnParallelLinear) if affine else mlp_submodules(parts_of(into)),
                    "affine" if affine else "mlp",
                    model.feature_size,
                    tp_group=groups.tower.tp,
                )
            self.learned_tokens = LearnedTokens(model.geometry, model.language.hidden_size, DTYPES[dtype])
        self.geometry = model.geometry
        self.positions_move = model.positions_move
        self.carries = self.positions_move and groups.pp.size() > 1
        self.received: Tensor | None = None
        self.language_model = LanguageModel(
            config, model.language, groups.mcore, self.pre_process, self.post_process, self.vp_stage
        )
        mark_partitioned(self)

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """Takes the output of the previous pipeline stage; Megatron-Core's schedules call this."""
        if not self.carries or self.pre_process:
            self.language_model.set_input_tensor(input_tensor)
        else:
            (self.received,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]

    def carried_rows(self, tokens: int) -> int:
        """Rows behind the hidden states of a micro-batch of ``tokens`` that one pipeline stage hands to the next."""
        return positions.rows_for(tokens, self.config.hidden_size, self.config.params_dtype) if self.carries else 0

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The weight the first and the last stage both hold where the head is tied; Megatron-Core sums its gradients."""
        return self.language_model.shared_embedding_or_output_weight()

    def encoder_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters of tower and projector, where this part holds them."""
        return [*self.vision_tower.parameters(), *self.projector.parameters()] if self.pre_process else []

    def encode_images(
        self,
        pixel_values_NChw: Tensor,
        shapes: Sequence[Shape] = (),
        chosen_e: Tensor | None = None,
        each: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Decoder embeddings of pictures and clips, one after another.

        Args:
            pixel_values_NChw: their tiles; N may be 0.
            shapes: of the media; none given: every tile is a picture.
            chosen_e: on the host, the embeddings that are wanted; None: all.
            each: embeddings of a tile, where all become as many, which a schedule of merging changes (None: as the settings have
                it in the end).

        Returns:
            the wanted embeddings [e, H]; and where patches are merged and keep their positions the patch of its tile that each of
            all features stands for, int64 [F].
        """
        if self.geometry.plain:
            each = self.settings.embeddings_per_image if each is None else each
            image_EH, patches_E = self._encode_dealt(pixel_values_NChw, None, [each] * len(pixel_values_NChw), each)
            chosen = image_EH if chosen_e is None else image_EH[upload(chosen_e, image_EH.device)]
            return chosen, patches_E
        order = self._arranged(shapes or (SINGLE,) * len(pixel_values_NChw), each)
        features_FH, patches_F = self._encode_dealt(pixel_values_NChw, order.strides, order.rows, each)
        return self.learned_tokens(features_FH, order, chosen_e), patches_F

    def _arranged(self, shapes: Sequence[Shape], each: int | None) -> Arrangement:
        """How embeddings are made of features, of which a tile has ``each`` where all are reduced alike."""
        return arrange(self.geometry if each is None else dataclasses.replace(self.geometry, kept=each), shapes)

    def _encode_dealt(
        self, pixel_values_NChw: Tensor, strides: Sequence[int] | None, rows: Sequence[int], each: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Features [F, H] of all tiles, dealt over the ranks that encode, and the patches of merged ones, int64 [F].

        ``strides`` and ``rows`` are as in ``Arrangement``.
        """
        if self.parallel.encoder == "tensor_parallel" or self.groups.encoders.size() == 1:
            return self._encode(pixel_values_NChw, strides, each)
        # Tiles are of one size, so each costs the same.
        dealt = deal((1.0,) * len(pixel_values_NChw), self.groups.encoders.size())
        own = list(dealt[self.groups.encoders.rank()])
        own_fH, patches_f = self._encode(
            pixel_values_NChw[own], None if strides is None else [strides[tile] for tile in own], each
        )
        if not rows:
            return own_fH, patches_f
        features_FH = gather_embeddings(own_fH, dealt, rows, self.groups.encoders, self.groups.cp)
        return features_FH, None if patches_f is None else gather_numbers(patches_f, dealt, rows, self.groups.encoders)

    def _encode(
        self, pixel_values_nChw: Tensor, strides: Sequence[int] | None = None, each: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What this rank encodes itself: features [f, H], and the patches [f] of merged ones whose positions are kept, int64."""
        if pixel_values_nChw.shape[0] == 0:
            # Megatron-Core's layers cannot run on nothing. A blank picture that goes nowhere gives every parameter its (zero)
            # gradient and keeps every collective in step with the other ranks.
            size = self.settings.vision.image_size
            blank_fH, patches_f = self._encode(pixel_values_nChw.new_zeros(1, 3, size, size), each=each)
            return blank_fH[:0], None if patches_f is None else patches_f[:0]
        tower_trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with contextlib.nullcontext() if tower_trains else torch.no_grad():  # a frozen tower stores no activations
            features_nPW, left_nP = self.vision_tower(pixel_values_nChw)
        reduction, video = self.settings.projector.reduction, self.settings.video
        if (video.pool_at == "before_projector") if reduction is None else (reduction.where == "before"):
            fewer_fW, patches_f = self._fewer(features_nPW, strides, each)
            features_fH = self._project(fewer_fW)
        else:
            projected_nPH = self._project(features_nPW.flatten(0, 1)).unflatten(0, features_nPW.shape[:2])
            features_fH, patches_f = self._fewer(projected_nPH, strides, each)
        if not self.positions_move:
            return features_fH, None
        return features_fH, patches_f if left_nP is None else left_nP.flatten()

    def _project(self, features_FW: Tensor) -> Tensor:
        with get_fp8_context(self.projector.config):
            return self.projector(features_FW)

    def _fewer(self, features_nPW: Tensor, strides: Sequence[int] | None, each: int | None) -> tuple[Tensor, Tensor | None]:
        """Rows [f, W] of tiles: merged or pooled all alike, or each by its stride, or as they are; and the patches they are."""
        reduction = self.settings.projector.reduction
        if reduction is None:
            return pool_tiles(features_nPW, strides or (), self.settings.video.pool), None
        kept = self.settings.embeddings_per_image if each is None else each
        fewer_nKW, patches_nK = reduce_grid(features_nPW, self.settings.vision.side, kept, reduction)
        return fewer_nKW.flatten(0, 1), None if patches_nK is None else patches_nK.flatten()

    def embed(
        self,
        input_ids_C: Tensor,
        pixel_values_NChw: Tensor,
        shapes: Sequence[Shape],
        places_e: Tensor,
        chosen_e: Tensor | None,
        each: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Token and image embeddings in their places, [S, 1, H], and the patches [F] of merged ones, as of ``encode_images``.

        Args:
            input_ids_C: of this context-parallel rank.
            pixel_values_NChw: of the whole stream.
            shapes: of its media.
            places_e: where the image embeddings go among this rank's tokens.
            chosen_e: which of all E they are, on the host (None: all).
            each: as in ``encode_images``.

        Every tensor-parallel rank computes all C tokens here and keeps its own part, so the gradient of the embeddings is
        complete on each of them.
        """
        text_C1H = self.language_model.embedding(input_ids=input_ids_C[None], position_ids=None)
        image_eH, patches_F = self.encode_images(pixel_values_NChw, shapes, chosen_e, each)
        hidden_C1H = text_C1H.index_copy(0, places_e, image_eH[:, None])
        if self.config.sequence_parallel:
            hidden_C1H = scatter_to_sequence_parallel_region(hidden_C1H, group=self.groups.tp)
        return hidden_C1H, patches_F

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        sample_lengths: list[int],
        pixel_values_NChw: Tensor,
        image_index_E: Tensor,
        asked_Q: Tensor,
        labels_T: Tensor | None = None,
        shapes: Sequence[Shape] = (),
        padded_to: int | None = None,
    ) -> Tensor:
        """One micro-batch through the part of the model this rank holds.

        Args:
            input_ids_T: int64; the ids at image embeddings are overwritten by them.
            position_ids_T: int64, from 0 in each sample; where pictures are reduced those of ``geometry.Geometry.steps``.
            sample_lengths: tokens of each sample in order, padding included; sums to T.
            pixel_values_NChw: normalised pixels of the tiles of all media; N may be 0. Only the first stage looks at them.
            image_index_E: int64, where in the stream each image embedding goes; on the host, like ``asked_Q``.
            asked_Q: int64, the tokens whose loss or logits are wanted.
            labels_T: int64, already shifted; anything where nothing is asked.
            shapes: of the media, in order, on all stages; none given: every tile is a picture.
            padded_to: tokens after padding for Transformer Engine's exchange, the same for all micro-batches of a step (None: as
                many as this one needs).

        Returns:
            on the last stage the loss of each token [C] in float32 (0 where it is not asked for), or without labels the logits
            [Q, V] of those among the asked tokens that this rank holds; on other stages the activations [S, 1, H], or with
            ``carried_rows`` behind them [S + r, 1, H]. C is T where there is no context parallelism; with it the tokens are those
            of :meth:`split`.
        """
        device = input_ids_T.device
        shapes = shapes or (SINGLE,) * len(pixel_values_NChw)
        each = self._features_each(len(image_index_E), shapes)
        samples = PackedSamples(sample_lengths=sample_lengths)
        own_C = None
        places_e, chosen_e = image_index_E, None  # of the image embeddings: here all
        if self.groups.cp.size() > 1:
            split = self.split(sample_lengths, padded_to)
            samples = PackedSamples(sample_lengths=list(split.sample_lengths), partition=split)
            samples.cp_group, samples.exchange = self.groups.cp, self.parallel.context_exchange
            own_C = torch.from_numpy(split.tokens(self.groups.cp.rank()))
            places_e, chosen_e = _places_among(own_C, image_index_E, len(input_ids_T))
            asked_Q, _ = _places_among(own_C, asked_Q, len(input_ids_T))
            own_C = upload(own_C, device)
            input_ids_T = _taken(input_ids_T, own_C)
            labels_T = None if labels_T is None else _taken(labels_T, own_C)
        samples.asked = upload(asked_Q, device)
        hidden_S1H, patches_F, rows = None, None, self.carried_rows(len(position_ids_T))
        merged_F = self._features_among(image_index_E, shapes, each) if self.positions_move else image_index_E
        if self.pre_process:
            places_e = upload(places_e, device)
            hidden_S1H, patches_F = self.embed(input_ids_T, pixel_values_NChw, shapes, places_e, chosen_e, each)
        elif self.received is not None:
            received_S1H, patches_F = positions.take_off(self.received, rows, len(merged_F))
            self.received = None
            self.language_model.set_input_tensor(received_S1H)
        output = self.language_model(
            input_ids=None,
            position_ids=self._positions(position_ids_T, sample_lengths, merged_F, patches_F, each, own_C),
            attention_mask=None,
            decoder_input=hidden_S1H,
            labels=None if labels_T is None else labels_T[None],
            packed_seq_params=samples,
        )
        if self.post_process:
            return output[0]
        if rows and patches_F is not None:
            output = positions.append(output, patches_F, rows)
        # A stage in which nothing is trained still hands its output on through the schedule's backward pass.
        return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()

    def split(self, sample_lengths: Sequence[int], padded_to: int | None = None) -> Partition:
        """Which context-parallel rank holds which tokens of a micro-batch; the arguments are those of ``forward``."""
        size = self.groups.cp.size()
        if self.stream_multiple is None:
            return partition(sample_lengths, size)
        return partition(sample_lengths, size, padded_to or padded_tokens(sample_lengths, size, self.stream_multiple))

    def _positions(
        self,
        position_ids_T: Tensor,
        sample_lengths: list[int],
        merged_F: Tensor,
        patches_F: Tensor | None,
        each: int | None,
        own_C: Tensor | None,
    ) -> Tensor:
        """Position ids [R, C] of this rank's tokens; features stand at ``merged_F``, for ``patches_F`` where these are kept."""
        position_ids_RT = position_ids_T[None]
        if self.language_model.rotary_pos_emb.needs_lengths:
            position_ids_RT = torch.stack([position_ids_T, _length_of_each(sample_lengths, position_ids_T)])
        if patches_F is not None and each:
            merged_F = upload(merged_F, position_ids_T.device)
            position_ids_RT = torch.cat([positions.stand(position_ids_T, merged_F, patches_F, each)[None], position_ids_RT[1:]])
        return position_ids_RT if own_C is None else _taken(position_ids_RT, own_C)

    def _features_each(self, places: int, shapes: Sequence[Shape]) -> int | None:
        """Features of each tile where all have as many: the loader decides, and its placeholders say."""
        geometry = self.geometry
        tiles = sum(map(geometry.tiles, shapes))
        if not tiles and places and self.positions_move:
            raise ValueError(f"{places} places for the embeddings of merged pictures, but no shapes of these")
        if not tiles or not (geometry.plain or geometry.kept):
            return None
        learned = 0 if geometry.plain else sum(map(geometry.embeddings, shapes)) - tiles * geometry.rows(1)
        if (places - learned) % tiles:
            raise ValueError(f"{places - learned} places for the embeddings of {tiles} pictures: each needs as many")
        return (places - learned) // tiles

    def _features_among(self, image_index_E: Tensor, shapes: Sequence[Shape], each: int | None) -> Tensor:
        """Where in the stream the embeddings go that are features and not learned tokens, [F], on the host."""
        if self.geometry.plain:
            return image_index_E
        order = self._arranged(shapes, each)
        return image_index_E[torch.from_numpy(order.index_E < sum(order.rows))]

    def full_logits(self, logits_QV: Tensor) -> Tensor:
        """One rank's part of the logits to all of them, [Q, vocab_size]; on the last stage only."""
        return gather_from_tensor_model_parallel_region(logits_QV, group=self.groups.tp)[:, : self.settings.language.vocab_size]


def _length_of_each(sample_lengths: list[int], position_ids_T: Tensor) -> Tensor:
    """For each token the positions of the whole sample it belongs to, int64 [T]."""
    tokens = upload(torch.tensor(sample_lengths), position_ids_T.device)
    positions_of_each = position_ids_T[tokens.cumsum(0) - 1] + 1
    return positions_of_each.repeat_interleave(tokens, output_size=len(position_ids_T))


def _taken(tensor_RT: Tensor, own_C: Tensor) -> Tensor:
    """A rank's tokens, of rows or a single one; 0 where it holds padding, which is the token past the last."""
    return F.pad(tensor_RT, (0, 1))[..., own_C]


def _places_among(own_C: Tensor, index_Q: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Where those of the stream's tokens ``index_Q`` that are among this rank's ``own_C`` lie there, and which they are."""
    place_of_T = torch.full((total + 1,), -1, dtype=torch.int64)  # and the place of padding
    place_of_T[own_C] = torch.arange(len(own_C))
    places_Q = place_of_T[index_Q]
    chosen_q = (places_Q >= 0).nonzero()[:, 0]
    return places_Q[chosen_q], chosen_q
