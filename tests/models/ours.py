"""What the tests run on the ranks: the model under one layout, its results put together as one process would have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from llava_mcore.data.loader import Batch
from llava_mcore.models.llava import LlavaModel
from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.groups import Groups
from llava_mcore.settings.schema import ModelSettings, ParallelSettings
from llava_mcore.training.checkpoint import load_model, model_state
from llava_mcore.training.checkpoint_folder import read_model_settings
from llava_mcore.training.engine import distribute, forward_backward, forward_logits

CPU = torch.device("cpu")


def build(settings: ModelSettings, parallel: dict[str, Any]) -> tuple[LlavaModel, ParallelSettings, Groups]:
    """A float32 model of this layout."""
    layout = ParallelSettings(**parallel)
    groups = process_groups.build(layout)
    return LlavaModel(settings, layout, "float32", groups), layout, groups


def shards(model: LlavaModel, groups: Groups, values: dict[torch.nn.Parameter, torch.Tensor]) -> list[tuple]:
    """``values`` of this rank's parameters as (name in the checkpoint, whole shape, offset, tensor)."""
    kept = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in kept:
        parameter.data = values[parameter]
    state = model_state(model, groups)
    apply_factories(state)
    found = [
        (shard.key, tuple(shard.global_shape), tuple(shard.global_offset), shard.data.detach().clone())
        for shard in nested_values(state)
        if isinstance(shard, ShardedTensor)
    ]
    for parameter, data in kept.items():
        parameter.data = data
    return found


def assemble(parts: list[tuple]) -> dict[str, torch.Tensor]:
    """Whole tensors from the shards of all ranks; copies must be equal to the last bit, and nothing may be missing."""
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, tensor in parts:
        target = whole.setdefault(key, torch.full(shape, float("nan")))
        window = tuple(slice(at, at + size) for at, size in zip(offset, tensor.shape, strict=True))
        seen = target[window]
        assert seen.isnan().all() or torch.equal(seen, tensor), f"{key}: copies differ by {(seen - tensor).abs().max()}"
        target[window] = tensor
    for key, tensor in whole.items():
        assert not tensor.isnan().any(), f"{key}: not whole"
    return whole


def run_layout(checkpoint: Path, parallel: dict[str, Any], batches: list[Batch]) -> dict[str, Any]:
    """Loss, logits and gradients of ``batches``, which are dealt over the data-parallel ranks in turn."""
    settings = read_model_settings(checkpoint)
    model, layout, groups = build(settings, parallel)
    load_model(checkpoint, model, groups)
    size = groups.dp.size()
    mine = batches[groups.dp.rank() :: size]
    ddp = distribute(model, layout, groups)
    ddp.zero_grad_buffer()
    losses = forward_backward(ddp, mine, groups, CPU, force_all_reduce=True)
    logits = forward_logits(ddp, mine, [range(len(batch.input_ids_T)) for batch in mine], groups, CPU)
    total = sum(losses, torch.zeros(()))
    if groups.is_last_stage:
        dist.all_reduce(total, group=groups.dp)
    return {
        "dp": groups.dp.rank(),
        "loss": float(total) / sum(batch.loss_tokens for batch in batches),
        "logits": logits,
        "last": groups.is_last_stage,
        "gradients": shards(model, groups, {parameter: parameter.main_grad for parameter in model.parameters()}),
    }
