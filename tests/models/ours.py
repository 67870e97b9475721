"""What the tests run on the ranks: the model under one layout, its results put together as one process would have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from llava_mcore.data.loader import Batch
from llava_mcore.models.config import Recompute
from llava_mcore.models.initialize import initialize
from llava_mcore.models.llava import ModelParts, build_model
from llava_mcore.parallel import groups as process_groups
from llava_mcore.parallel.groups import Groups
from llava_mcore.parallel.sequence import partition
from llava_mcore.settings.derive import derive
from llava_mcore.settings.schema import ModelSettings, ParallelSettings, PrecisionSettings, Settings
from llava_mcore.training.checkpoint import load_model, model_state, sharding_metadata
from llava_mcore.training.checkpoint_folder import read_model_settings
from llava_mcore.training.engine import _apply, _schedule, distribute, forward_backward, forward_logits
from llava_mcore.training.optimizer import build_optimizer, freeze

CPU = torch.device("cpu")


def build(settings: ModelSettings, parallel: dict[str, Any]) -> tuple[ModelParts, ParallelSettings, Groups]:
    """A float32 model of this layout."""
    layout = ParallelSettings(**parallel)
    groups = process_groups.build(layout)
    return build_model(settings, layout, "float32", groups, precision=PrecisionSettings()), layout, groups


def shards(model: ModelParts, groups: Groups, values: dict[torch.nn.Parameter, torch.Tensor]) -> list[tuple]:
    """``values`` of this rank's parameters as (name in the checkpoint, whole shape, place in it, tensor)."""
    kept = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in kept:
        parameter.data = values[parameter]
    state = model_state(model, groups)
    apply_factories(state)
    found = [
        (shard.key, tuple(shard.global_shape), shard.global_slice(), shard.data.detach().clone())
        for shard in nested_values(state)
        if isinstance(shard, ShardedTensor)
    ]
    for parameter, data in kept.items():
        parameter.data = data
    return found


def assemble(parts: list[tuple]) -> dict[str, torch.Tensor]:
    """Whole tensors from the shards of all ranks; copies must be equal to the last bit, and nothing may be missing."""
    whole: dict[str, torch.Tensor] = {}
    for key, shape, window, tensor in parts:
        target = whole.setdefault(key, torch.full(shape, float("nan")))
        seen = target[window]
        tensor = tensor.reshape(seen.shape)
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
    for part in ddp:
        part.zero_grad_buffer()
    losses = forward_backward(ddp, mine, groups, CPU, force_all_reduce=True)
    logits = []
    if layout.context == layout.virtual_pipeline == 1:
        logits = forward_logits(model, mine, [range(len(batch.input_ids_T)) for batch in mine], groups, CPU)
    total = sum(losses, torch.zeros(()))
    if groups.is_last_stage:
        dist.all_reduce(total, group=groups.dp)
    return {
        "dp": groups.dp.rank(),
        "tp": groups.tp.rank(),
        "loss": float(total) / sum(batch.loss_tokens for batch in batches),
        "logits": logits,
        "last": groups.is_last_stage,
        "gradients": shards(model, groups, {parameter: parameter.main_grad for parameter in model.parameters()}),
    }


def run_logits(checkpoint: Path, batches: list[Batch]) -> list[torch.Tensor]:
    """Logits of all tokens of ``batches`` in one process."""
    model, _, groups = build(read_model_settings(checkpoint), {})
    load_model(checkpoint, model, groups)
    return forward_logits(model, batches, [range(len(batch.input_ids_T)) for batch in batches], groups, CPU)


def train(settings: Settings, batches: list[Batch], steps: int) -> dict[str, Any]:
    """``steps`` optimizer steps on the same batches, from weights that are a function of the seed; the batches are dealt in turn.

    Returns:
        the mean loss and gradient norm of each step, the first step's gradients and the last weights as shards.
    """
    groups = process_groups.build(settings.parallel)
    model = build_model(settings.model, settings.parallel, "float32", groups, Recompute.of(settings.train), settings.precision)
    initialize(model, settings.train.seed, sharding_metadata(groups))
    freeze(model, settings.train.freeze, groups)
    ddp = distribute(model, settings.parallel, groups)
    derived = derive(settings, 1000, dist.get_world_size())
    optimizer, scheduler = build_optimizer(ddp, settings.train, settings.parallel, derived, groups)
    mine = batches[groups.dp.rank() :: groups.dp.size()]
    if not groups.is_first_stage:  # which alone gets pixels (parallel/broadcast.py)
        mine = [replace(batch, pixel_values_NCHW=batch.pixel_values_NCHW[:0]) for batch in mine]
    losses, norms, gradients = [], [], []
    for step in range(steps):
        for part in ddp:
            part.zero_grad_buffer()
        optimizer.zero_grad()
        total = sum(forward_backward(ddp, mine, groups, CPU, force_all_reduce=step == 0), torch.zeros(()))
        if groups.is_last_stage:
            dist.all_reduce(total, group=groups.mcore.dp_cp)
        losses.append(float(total) / sum(batch.loss_tokens for batch in batches))
        if step == 0:
            trained = {p: p.main_grad if p.requires_grad else torch.zeros_like(p) for p in model.parameters()}
            gradients = shards(model, groups, trained)
        norms.append(float(optimizer.step()[1]))
        scheduler.step(1)
    if settings.parallel.overlap_param_gather:
        for part in ddp:
            part.disable_forward_pre_hook(param_sync=True)  # what the next forward pass would have waited for
    weights = shards(model, groups, {parameter: parameter.data for parameter in model.parameters()})
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights, "last": groups.is_last_stage}


def token_losses(settings: Settings, variants: list[list[Batch]]) -> list[list[tuple]]:
    """For each variant of the batches, the losses of the tokens this rank computes: (batch, positions in the stream, losses)."""
    groups = process_groups.build(settings.parallel)
    model = build_model(settings.model, settings.parallel, "float32", groups)
    initialize(model, settings.train.seed, sharding_metadata(groups))
    found = []
    for batches in variants:
        numbers = range(groups.dp.rank(), len(batches), groups.dp.size())
        mine = [batches[number] for number in numbers]
        with torch.no_grad():
            losses = _schedule(model, mine, _token_loss_step, groups, forward_only=True, collect_non_loss_data=True)
        size, rank = groups.cp.size(), groups.cp.rank()
        own = [partition(batch.sample_lengths, size).index(rank) for batch in mine]
        found.append(list(zip(numbers, own, losses, strict=True)) if losses else [])
    return found


def _token_loss_step(batches: Iterator[Batch], model: torch.nn.Module, padded_to: int | None) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    return _apply(model, batch, CPU, batch.labelled(), batch.labels_T, padded_to), lambda loss_T, non_loss_data: loss_T.clone()
