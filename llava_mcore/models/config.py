"""From our settings to Megatron-Core's ``TransformerConfig``, in one place.

``TransformerConfig`` has some 240 fields; each model sets the few that define it and every other keeps Megatron-Core's default.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig

from llava_mcore.models.backend import precision_fields
from llava_mcore.models.rotary import attention_factor
from llava_mcore.settings.schema import LanguageSettings, ModelSettings, ParallelSettings, PrecisionSettings, TrainSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
# Runs on any machine, and also where no gradient buffers were made (training.engine.distribute).
PORTABLE = PrecisionSettings(backend="torch", attention="sdpa", gradient_accumulation_fusion=False)


class Recompute(NamedTuple):
    """Which activations are computed again in the backward pass instead of being kept. The loss stays the same to the bit.

    Attributes:
        granularity: "none", "selective" or "full" (all but each layer's input).
        modules: what selective recomputes of a layer: "core_attn", "mlp".
        within: whose layers: "language_model", "vision_tower".
    """

    granularity: str = "none"
    modules: tuple[str, ...] = ("core_attn",)
    within: tuple[str, ...] = ("language_model",)

    @classmethod
    def of(cls, train: TrainSettings) -> Recompute:
        """What the settings of a run ask for."""
        return cls(train.recompute, tuple(train.recompute_modules), tuple(train.recompute_in))

    def fields(self, module: str) -> dict[str, Any]:
        """What ``TransformerConfig`` is told for one module."""
        if self.granularity == "none" or module not in self.within:
            return {}
        if self.granularity == "selective":
            # Megatron-Core's recomputed MLP loops for ever over a bias, which the tower's has.
            modules = [name for name in self.modules if name != "mlp" or module == "language_model"]
            return {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


KEEP_ALL = Recompute()


def _config(dtype: torch.dtype, tensor: int, precision: PrecisionSettings, module: str, **fields: Any) -> TransformerConfig:
    """What tower, projector and decoder have in common; ``precision`` is resolved (``models.backend.resolve``)."""
    return TransformerConfig(
        tensor_model_parallel_size=tensor,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights come from a checkpoint or from models/initialize.py, the same for every layout.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **precision_fields(precision, module),
        **fields,
    )


def layers_of_chunks(parallel: ParallelSettings, num_layers: int) -> list[int]:
    """Decoder layers of each part of the pipeline, in decoder order; part k stands on stage k % pipeline.

    Raises:
        ValueError: for ``auto``, which ``training.pipeline_split`` turns into a list first.
    """
    if parallel.pipeline_split == "auto":
        raise ValueError("parallel.pipeline_split=auto must be resolved before a model is built")
    if isinstance(parallel.pipeline_split, list):
        return parallel.pipeline_split
    return [num_layers // parallel.chunks] * parallel.chunks


def _pipeline_layout(parallel: ParallelSettings, num_layers: int) -> list[list[str]] | None:
    """Megatron-Core's description of which stage holds what."""
    if parallel.pipeline == 1:
        return None
    rows = [["decoder"] * count for count in layers_of_chunks(parallel, num_layers)]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    return rows


def decoder_config(
    model: ModelSettings,
    parallel: ParallelSettings,
    dtype: torch.dtype,
    recompute: Recompute = KEEP_ALL,
    precision: PrecisionSettings = PORTABLE,
) -> TransformerConfig:
    """A Llama-style decoder: RMSNorm, SwiGLU, grouped queries, no biases but those its settings ask for."""
    language = model.language
    recomputed = recompute.fields("language_model")
    if language.num_experts is not None and "recompute_modules" in recomputed:  # Megatron-Core's "mlp" leaves out experts
        recomputed["recompute_modules"] = ["moe" if name == "mlp" else name for name in recomputed["recompute_modules"]]
    config = _config(
        dtype,
        parallel.tensor,
        precision,
        "language_model",
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_model_parallel_layout=_pipeline_layout(parallel, language.num_layers),
        context_parallel_size=parallel.context,
        cp_comm_type=parallel.te_exchange,
        tp_comm_overlap=parallel.tp_comm_overlap,
        pipeline_dtype=dtype,
        # An output is freed once it is handed to the transport. Gloo still reads it then, where transfers are not waited for.
        deallocate_pipeline_outputs=parallel.virtual_pipeline == 1 or torch.cuda.is_available(),
        # Between two stages an interleaved pipeline sends activations and gradients both ways at once; in one batch of transfers
        # Megatron-Core would pair them wrongly, one by one it does not.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
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
        bias_activation_fusion=True,  # keeps the gate's input for the backward pass and computes the rest again
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        qk_layernorm=language.qk_norm,
        window_size=None if language.sliding_window is None else (language.sliding_window - 1, 0),
        **_expert_fields(language, parallel),
        **recomputed,
        # Handed to our own rotary embedding (models/rotary.py), which has no use for it.
        mrope_section=[language.rotary_dim // 2],
    )
    _scale_rotary(config, language)
    return config


def _expert_fields(language: LanguageSettings, parallel: ParallelSettings) -> dict[str, Any]:
    """A mixture of experts in place of the MLP (Shazeer et al., 2017), where the decoder has one; no token is dropped."""
    if language.num_experts is None:
        return {}
    return {
        "num_moe_experts": language.num_experts,
        "moe_ffn_hidden_size": language.ffn_hidden_size,
        "moe_router_topk": language.experts_per_token,
        # The softmax over the chosen experts alone is the one over all, made to add up to one.
        "moe_router_pre_softmax": not language.normalize_expert_weights,
        "moe_router_dtype": "fp32",  # of the weights with which expert outputs are added up; scores: layers.Router
        "moe_router_load_balancing_type": "aux_loss" if language.router_aux_loss else "none",
        "moe_aux_loss_coeff": language.router_aux_loss,
        # Sending each token only where it goes needs CUDA streams in Megatron-Core; gathering all of them does not.
        "moe_token_dispatcher_type": "alltoall" if torch.cuda.is_available() else "allgather",
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.tensor,
    }


def _scale_rotary(config: TransformerConfig, language: LanguageSettings) -> None:
    """Has Megatron-Core multiply turned queries and keys by a factor, where there is one.

    Its formula for YaRN, (0.1 mscale ln(scaling) + 1) / (0.1 mscale_all_dim ln(scaling) + 1), is the factor for these values. The
    fused rotary kernel knows no factor.
    """
    factor = attention_factor(language)
    if factor != 1.0:
        config.apply_rope_fusion = False
        config.yarn_rotary_scaling_factor = math.e
        config.yarn_mscale, config.yarn_mscale_all_dim = 10 * (factor - 1), 0.0


def _encoder_tensor(parallel: ParallelSettings) -> int:
    """Tensor-parallel size of tower and projector."""
    return parallel.tensor if parallel.encoder == "tensor_parallel" else 1


def tower_config(
    model: ModelSettings,
    parallel: ParallelSettings,
    dtype: torch.dtype,
    recompute: Recompute = KEEP_ALL,
    precision: PrecisionSettings = PORTABLE,
) -> TransformerConfig:
    """The tower: LayerNorm, biases everywhere. It stands whole on the first stage."""
    vision = model.vision
    return _config(
        dtype,
        _encoder_tensor(parallel),
        precision,
        "vision_tower",
        num_layers=vision.used_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_eps,
        activation_func=ACTIVATIONS[vision.activation],
        **recompute.fields("vision_tower"),
        bias_activation_fusion=False,
        add_bias_linear=True,
    )


def projector_config(
    model: ModelSettings, parallel: ParallelSettings, dtype: torch.dtype, precision: PrecisionSettings = PORTABLE
) -> TransformerConfig:
    """The projector: as wide as the decoder, exact (erf) GELU."""
    return _config(
        dtype,
        _encoder_tensor(parallel),
        precision,
        "projector",
        num_layers=1,
        hidden_size=model.language.hidden_size,
        ffn_hidden_size=model.language.hidden_size,
        num_attention_heads=_encoder_tensor(parallel),  # it has none, but they must be divisible
        activation_func=F.gelu,
        bias_activation_fusion=False,  # it would be the tanh approximation
        add_bias_linear=True,
    )
