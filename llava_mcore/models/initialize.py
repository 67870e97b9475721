"""Random weights that do not depend on the layout: each tensor is a function of the seed and its name in the checkpoint.

Every rank draws the whole tensor and keeps its part, so a model starts from the same numbers on one process and on a thousand.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from llava_mcore.models.fp8_weights import unquantized
from llava_mcore.models.llava import ModelParts
from llava_mcore.settings.schema import ModelSettings

LEARNED_TOKENS = "learned_tokens."


def initialize(model: ModelParts, seed: int, metadata: dict, only: str = "") -> None:
    """Fills every parameter in place.

    Matrices and embeddings of tower and decoder are normal with ``init_std``; norms one and zero; biases zero; the projector
    is uniform in +-1/sqrt(inputs), weights and biases, as torch initialises a linear layer and as LLaVA starts it; learned tokens
    are normal with 1/sqrt(width), the gate of times is zero.

    Args:
        model: the parts of the model this rank holds (``models.llava.build_model``).
        seed: same seed, same weights, whatever the layout.
        metadata: of the sharded state dict (``training.checkpoint.sharding_metadata``).
        only: what the names of those begin with that are filled.
    """
    with unquantized(model), torch.no_grad():
        for chunk in model:
            state = chunk.sharded_state_dict(metadata=metadata)
            apply_factories(state)  # a gated MLP is stored as two tensors, which are views of the one parameter
            for shard in nested_values(state):
                if isinstance(shard, ShardedTensor) and shard.key.startswith(only):
                    whole = draw(shard.key, shard.global_shape, chunk.settings, seed)
                    shard.data.copy_(whole[shard.global_slice()].reshape(shard.data.shape))


def draw(name: str, shape: tuple[int, ...], model: ModelSettings, seed: int) -> Tensor:
    """The whole tensor ``name``, float32."""
    whole = torch.zeros(shape)
    if "layer_norm_weight" in name or "layernorm.weight" in name:
        return whole.fill_(1.0)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big"))
    if name.startswith("projector."):
        inputs = model.language.hidden_size if "linear_fc2" in name else model.vision.hidden_size
        return whole.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    if name == LEARNED_TOKENS + "time_gate":
        return whole
    if name.startswith(LEARNED_TOKENS):  # as in LLaVA-NeXT and LLaVA-Video
        return whole.normal_(0.0, model.language.hidden_size**-0.5, generator=generator)
    if name.endswith("bias"):
        return whole
    whole.normal_(0.0, model.init_std, generator=generator)
    if "word_embeddings" in name or "output_layer" in name:
        whole[model.language.vocab_size :] = 0.0
    return whole
