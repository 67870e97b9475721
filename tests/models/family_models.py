"""Tiny random LLaVA models of every family, of awkward sizes, saved by transformers itself.

Odd numbers of queries a group, of layers and of vocabulary; heads that aren't the width over their number; norms and biases
random too, so that none is one or zero by accident.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

LAYERS = 3
SIGLIP_PATCH = 6  # 20 pixels are three patches and two pixels that no patch sees
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 101,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 24}
# Samples are shorter and longer than 24 tokens; three frequencies, as three quarters of eight dimensions turn.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.3, 2.0],
    "long_factor": [1.5, 4.0, 7.0],
    "original_max_position_embeddings": 24,
}


def _texts() -> dict[str, PreTrainedConfig]:
    narrow = {key: value for key, value in SIZES.items() if key != "head_dim"}  # heads are eight wide
    return {
        "vicuna": LlamaConfig(**SIZES),
        "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
        "llama linear": LlamaConfig(**SIZES, rope_parameters=LINEAR),
        "mistral": MistralConfig(**SIZES, sliding_window=5),
        "qwen2": Qwen2Config(**narrow, tie_word_embeddings=True),
        "qwen2.5 yarn": Qwen2Config(**narrow, rope_parameters=YARN),
        "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
        "phi3": Phi3Config(**narrow, sliding_window=7),
        "phi4 mini": Phi3Config(
            **narrow, rope_parameters=LONGROPE, original_max_position_embeddings=24, tie_word_embeddings=True
        ),
        "siglip qwen2": Qwen2Config(**narrow, tie_word_embeddings=True),
        "mixtral": MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=3, sliding_window=None),
        "qwen3 moe": Qwen3MoeConfig(
            **SIZES, moe_intermediate_size=20, num_experts=6, num_experts_per_tok=2, tie_word_embeddings=True
        ),
    }


EXPERTS = ("mixtral", "qwen3 moe")
ALL = tuple(_texts())


def patches(name: str) -> int:
    """Embeddings of one picture."""
    return (oracle.IMAGE_SIZE // SIGLIP_PATCH) ** 2 if "siglip" in name else oracle.PATCHES


def config(name: str) -> LlavaConfig:
    """Its sizes."""
    text = _texts()[name]
    siglip = "siglip" in name
    sizes = {"hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = SiglipVisionConfig if siglip else CLIPVisionConfig
    return LlavaConfig(
        vision_config=tower(**sizes, image_size=oracle.IMAGE_SIZE, patch_size=SIGLIP_PATCH if siglip else oracle.PATCH),
        text_config=text,
        image_token_id=oracle.IMAGE_TOKEN,
        vision_feature_select_strategy="full" if siglip else "default",
        vision_feature_layer=-2,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def build(name: str) -> LlavaForConditionalGeneration:
    """The model ``name``, float32."""
    torch.manual_seed(11)
    model = LlavaForConditionalGeneration(config(name)).float()
    for key, parameter in model.named_parameters():
        centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        parameter.data.normal_(centre, 0.12)
    return model


def make(name: str, folder: Path) -> Path:
    """Saves the model ``name``."""
    build(name).save_pretrained(folder)
    return folder
