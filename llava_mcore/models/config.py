"""From our settings to Megatron-Core's ``TransformerConfig``, in one place.

``TransformerConfig`` has some 240 fields; each model sets the few that define it and every other keeps Megatron-Core's default.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from llava_mcore.settings.schema import ModelSettings, ParallelSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _config(dtype: torch.dtype, tensor: int, **fields: Any) -> TransformerConfig:
    """What tower, projector and decoder have in common."""
    return TransformerConfig(
        tensor_model_parallel_size=tensor,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights come from a checkpoint or from models/initialize.py, the same for every layout.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        attention_backend=AttnBackend.local,
        **fields,
    )


def decoder_config(model: ModelSettings, parallel: ParallelSettings, dtype: torch.dtype) -> TransformerConfig:
    """The Llama decoder: RMSNorm, SwiGLU, no biases, grouped queries."""
    language = model.language
    return _config(
        dtype,
        parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_dtype=dtype,
        deallocate_pipeline_outputs=True,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.query_groups,
        kv_channels=language.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        # Handed to our own rotary embedding (models/language.py), which has no use for it.
        mrope_section=[language.head_dim // 2],
    )


def tower_config(model: ModelSettings, parallel: ParallelSettings, dtype: torch.dtype) -> TransformerConfig:
    """The CLIP tower: LayerNorm, quick GELU, biases everywhere. It stands whole on the first stage."""
    vision = model.vision
    return _config(
        dtype,
        parallel.tensor,
        num_layers=vision.used_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_eps,
        activation_func=quick_gelu,
        add_bias_linear=True,
    )


def projector_config(model: ModelSettings, parallel: ParallelSettings, dtype: torch.dtype) -> TransformerConfig:
    """The projector: as wide as the decoder, exact (erf) GELU."""
    return _config(
        dtype,
        parallel.tensor,
        num_layers=1,
        hidden_size=model.language.hidden_size,
        ffn_hidden_size=model.language.hidden_size,
        num_attention_heads=1 if parallel.tensor == 1 else parallel.tensor,
        activation_func=F.gelu,
        add_bias_linear=True,
    )
