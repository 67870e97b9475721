"""The one place that says what a layer is made of: portable torch norms and attention around Megatron-Core's parallel linears, or
the layers of Transformer Engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from llava_mcore.models.attention import PackedAttention

# On disk the norms carry the names they have where they are fused into the linear that follows (Transformer Engine), so that
# a checkpoint does not depend on the layers it was trained with.
ATTENTION_NORM_NAME = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
MLP_NORM_NAME = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


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


class Router(TopKRouter):
    """Megatron-Core's router, whose product needs Transformer Engine: where that is not installed, a name is missing there."""

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002 (Megatron-Core's name)
        """Tokens [S, B, H] to a score for each expert [S, B, E], float32."""
        return F.linear(input.float(), self.weight.float())


@dataclass(frozen=True)
class Parts:
    """The modules that layers are put together from."""

    norm: type
    column: type
    row: type
    attention: type
    norm_column: type | None = None  # a norm and the linear that follows it in one, where there is such a module


TORCH = Parts(norm=Norm, column=ColumnParallelLinear, row=RowParallelLinear, attention=PackedAttention)


def parts_of(config: TransformerConfig) -> Parts:
    """The parts of the backend that ``config.transformer_impl`` names.

    Attention is the portable one under Transformer Engine too where it was asked for (``AttnBackend.local``) and where
    context-parallel ranks exchange keys and values by our own schemes (models/context_attention.py).
    """
    if config.transformer_impl != "transformer_engine":
        return TORCH
    from llava_mcore.models import transformer_engine as te

    exchanges = config.context_parallel_size > 1 and config.cp_comm_type is None
    portable = config.attention_backend == AttnBackend.local or exchanges
    return Parts(
        norm=te.NORM,
        column=te.COLUMN,
        row=te.ROW,
        attention=PackedAttention if portable else te.PackedTEAttention,
        norm_column=te.NORM_COLUMN,
    )


def mlp_submodules(parts: Parts = TORCH) -> MLPSubmodules:
    """Column-parallel into the MLP, row-parallel out of it; no norm."""
    return MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)


def layer_spec(config: TransformerConfig, mask: AttnMaskType, parts: Parts = TORCH) -> ModuleSpec:
    """A pre-norm transformer layer whose samples attend causally (decoder) or fully (``no_mask``, tower)."""
    head_norm = parts.norm if config.qk_layernorm else None
    fused = parts.norm_column is not None
    norm, into = (IdentityOp, parts.norm_column) if fused else (parts.norm, parts.column)
    mlp_norm, mlp = norm, ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=into, linear_fc2=parts.row))
    if config.num_moe_experts is not None:  # the router reads the normalised tokens too, so its norm stands alone
        experts = ModuleSpec(module=SequentialMLP, submodules=mlp_submodules(parts))
        mlp_norm, mlp = parts.norm, ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=Router))
    alone = ({} if norm is IdentityOp else ATTENTION_NORM_NAME) | ({} if mlp_norm is IdentityOp else MLP_NORM_NAME)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=into,
                    core_attention=parts.attention,
                    linear_proj=parts.row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=mlp_norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=alone,
        ),
    )


def block_spec(config: TransformerConfig, mask: AttnMaskType, num_layers: int) -> TransformerBlockSubmodules:
    """``num_layers`` layers (those of this stage) and a final norm."""
    parts = parts_of(config)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config, mask, parts)] * num_layers, layer_norm=parts.norm)


def unmark_unsplit(model: nn.Module) -> None:
    """Takes the mark of split weights off linears that stand whole on each rank.

    Transformer Engine marks those of every parallel linear, whatever the size of its group; marked, the copies of a tower that is
    whole on each tensor-parallel rank would each enter the gradient norm. (An expert's linears are split though Transformer
    Engine is told of no group: Megatron-Core communicates for them.)
    """
    for module in model.modules():
        group = getattr(module, "_tp_group", None)
        if group is not None and group.size() == 1:
            for parameter in module.parameters(recurse=False):
                if hasattr(parameter, "tensor_model_parallel"):
                    parameter.tensor_model_parallel = False
