"""Weights that are kept in FP8 (``precision.fp8_param_gather``) take and give their values in bfloat16.

The optimizer trains a float32 copy of each. An FP8 weight keeps three or four bits of a number, so neither that copy nor a
checkpoint may be made from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import nn


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """For as long as weights are filled, a bfloat16 parameter stands in the place of each FP8 one, which then takes its values.

    Some are filled by halves (a gated MLP), of which an FP8 weight has only copies. The bfloat16 values stay on the host, where
    the optimizer finds them for its float32 copies (``Megatron-Core: optimizer/distrib_optimizer.py``) and lets go of them; those
    of frozen weights stay for checkpoints.
    """
    places = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if is_float8tensor(weight)
    ]
    for module, name, weight in places:
        stand_in = nn.Parameter(_values(weight).to(weight.device), requires_grad=weight.requires_grad)
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module, name, weight in places:
            filled = getattr(module, name).detach()
            with torch.no_grad():
                weight.copy_(filled)
            weight._high_precision_init_val = filled.cpu()  # type: ignore[attr-defined]
            setattr(module, name, weight)


def give_values(weights: dict[str, Any], optimizer_state: dict[str, Any]) -> None:
    """Puts into the sharded ``weights`` of a checkpoint, in the place of FP8 ones, what they stand for.

    Args:
        weights: of ``training.checkpoint.model_state``.
        optimizer_state: of the optimizer, its float32 copies whole.
    """
    quantized = [shard for shard in nested_values(weights) if is_float8tensor(getattr(shard, "data", None))]
    if not quantized:
        return
    for shard in quantized:
        shard.data = _values(shard.data)
    for state in (weights, optimizer_state):
        apply_factories(state)  # experts have one name, and are told apart by where they lie in the whole
    copies = {(s.key, s.global_offset): s.data for s in nested_values(optimizer_state) if isinstance(s, ShardedTensor)}
    for shard in nested_values(weights):
        trained = copies.get((f"optimizer.state.param.{shard.key}", shard.global_offset))
        if trained is not None:
            shard.data = trained.to(shard.dtype)


def _values(weight: torch.Tensor) -> torch.Tensor:
    kept = getattr(weight, "_high_precision_init_val", None)
    return dequantize_fp8_tensor(weight) if kept is None else kept
