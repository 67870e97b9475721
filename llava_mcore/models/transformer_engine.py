"""Layers of Transformer Engine, under the names and calls of the torch ones. Importing this needs Transformer Engine.

Written for Transformer Engine 2.11.0 and Megatron-Core 0.16.1. Their own Python runs in tests/te, over kernels by definition; the
kernels have not run yet: ``bash tests/gpu/run.sh`` runs these layers on a GPU and compares them with the torch ones.

Over context-parallel ranks Transformer Engine attends by exchanges of its own (``dot_product_attention/context_parallel.py``):
``p2p`` sends keys and values around a ring, ``a2a`` gives each rank whole samples for its share of the heads (DeepSpeed-Ulysses,
Jacobs et al., 2023, https://arxiv.org/abs/2309.14509). Its ``all_gather`` and its ``a2a+p2p`` take no packed samples, so they are
not offered. The two count on samples of a multiple of twice the ranks. parallel/sequence.py makes ours such by padding each at
its end; as no token sees what comes after it, padding may pass for a part of the sample, and no kernel has to leave out holes.
Its ``a2a`` reads the boundaries of the samples back to the host, one by one and in every layer, so that many short samples are
better served by ``p2p``.

Shape suffixes: S stream (or patches), B rows of a batch, N query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from llava_mcore.models.attention import PackedSamples
from llava_mcore.models.config import DTYPES
from llava_mcore.settings.schema import Settings

if not HAVE_TE:  # Megatron-Core puts mock objects in the place of its classes
    raise ImportError("Transformer Engine is not installed; see precision.backend in the README, or set precision.backend=torch")

from transformer_engine.pytorch import UserBufferQuantizationMode, initialize_ub  # noqa: E402


class PackedTEAttention(TEDotProductAttention):
    """Transformer Engine's attention within each packed sample.

    Megatron-Core would have the whole layer in its packed ("thd") form, and then turns queries and keys by a walk over the
    samples that copies their boundaries to the host, twice a layer. Here only the attention itself is: the layer around it
    sees a stream [S, 1, ...] whose rotary angles were looked up by position id (models/language.py), exact for any packing.
    """

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSamples | None = None,
    ) -> Tensor:
        """Returns [S, B, N*D]. With ``packed_seq_params``, B is 1 and each sample attends within itself.

        Over context-parallel ranks S are this rank's tokens, and the lengths those of the whole, padded samples.
        """
        if packed_seq_params is None:
            return super().forward(query_SBND, key_SBGD, value_SBGD, attention_mask, attn_mask_type, attention_bias)
        output = super().forward(
            query_SBND[:, 0],
            key_SBGD[:, 0],
            value_SBGD[:, 0],
            attention_mask,
            attn_mask_type,
            attention_bias,
            packed_seq_params.as_thd(query_SBND.device),
        )
        return output.reshape(output.shape[0], 1, -1)


def reserve_user_buffers(settings: Settings) -> None:
    """Memory through which tensor-parallel ranks exchange parts of a product while the next part is computed; collective.

    Once in a process, before the first step (``parallel.tp_comm_overlap``). Every micro-batch has to fill it.
    """
    precision = settings.precision
    modes = [UserBufferQuantizationMode.NONE]
    if precision.fp8 and "language_model" in precision.fp8_modules:
        modes.append(UserBufferQuantizationMode.FP8)  # beside the other, of layers that stay in bfloat16
    tokens = settings.data.sequence_length * settings.train.micro_batch_size // settings.parallel.context
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    shape = [tokens, settings.model.language.hidden_size]
    dtype = DTYPES[settings.train.dtype]
    initialize_ub(shape, settings.parallel.tensor, quantization_modes=modes, dtype=dtype, bootstrap_backend=backend)


NORM, COLUMN, NORM_COLUMN, ROW = TENorm, TEColumnParallelLinear, TELayerNormColumnParallelLinear, TERowParallelLinear
