"""The one place that says what a layer is made of: portable torch norms and attention around Megatron-Core's parallel linears."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from llava_mcore.models.attention import PackedAttention

# On disk the norms carry the names they have where they are fused into the linear that follows (Transformer Engine), so that
# a checkpoint does not depend on the layers it was trained with.
CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class Norm(nn.Module):
    """LayerNorm or RMSNorm of torch, as ``config.normalization`` says.

    Megatron-Core's own wrapper refuses sequence parallelism; all it takes is to mark the weights, whose gradients are then
    summed over the tensor-parallel ranks, each of which saw a part of the stream.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = (
            nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype)) if config.normalization == "LayerNorm" else None
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        if self.bias is not None:
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.shape, self.weight, self.eps)


def mlp_submodules() -> MLPSubmodules:
    """Column-parallel into the MLP, row-parallel out of it."""
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def layer_spec(mask: AttnMaskType) -> ModuleSpec:
    """A pre-norm transformer layer whose samples attend causally (decoder) or fully (``no_mask``, tower)."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, core_attention=PackedAttention, linear_proj=RowParallelLinear
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp_submodules()),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=CHECKPOINT_NAMES,
        ),
    )


def block_spec(mask: AttnMaskType, num_layers: int) -> TransformerBlockSubmodules:
    """``num_layers`` layers (those of this stage) and a final norm."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(mask)] * num_layers, layer_norm=Norm)
