"""Forward and backward of a step's micro-batches through Megatron-Core's schedules, on any layout.

Shape suffixes: T tokens of a micro-batch, V vocabulary, Q positions that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn

from llava_mcore.data.loader import Batch
from llava_mcore.models.llava import LlavaModel
from llava_mcore.parallel.groups import Groups
from llava_mcore.settings.schema import ParallelSettings


def distribute(model: LlavaModel, parallel: ParallelSettings, groups: Groups) -> DistributedDataParallel:
    """Wraps the model for data parallelism: float32 gradients, and no gradient buffer for what is frozen."""
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=True,
        ),
        model,
        pg_collection=groups.mcore,
    )
    ddp.config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        ddp.config.no_sync_func = ddp.no_sync
    return ddp


def forward_backward(
    model: DistributedDataParallel, batches: Sequence[Batch], groups: Groups, device: torch.device, **schedule: Any
) -> list[Tensor]:
    """One optimizer step's gradients, summed over its micro-batches and ranks and divided by the tokens that have a label.

    The loss of a micro-batch is a sum over tokens; the schedule divides by the count over all ranks and micro-batches, so uneven
    masks change nothing.

    Args:
        model: wrapped by :func:`distribute`; the gradients are left in its buffers.
        batches: this rank's micro-batches, of one length.
        groups: process groups.
        device: where the model is.
        schedule: further arguments of Megatron-Core's schedule.

    Returns:
        on the last stage the loss sum of each micro-batch, elsewhere an empty list.
    """
    return _schedule(model, batches, partial(_loss_step, device=device), groups, **schedule)


@torch.no_grad()
def forward_logits(
    model: nn.Module, batches: Sequence[Batch], positions: Sequence[Sequence[int]], groups: Groups, device: torch.device
) -> list[Tensor]:
    """Logits at chosen positions, without gradients.

    Args:
        model: wrapped or not.
        batches: this rank's micro-batches, of one length.
        positions: for each micro-batch the tokens whose logits are wanted.
        groups: process groups.
        device: where the model is.

    Returns:
        on the last stage logits [Q, vocab_size] in float32 of each micro-batch, on all its tensor-parallel ranks; elsewhere an
        empty list.
    """
    asked = iter(positions)
    step = partial(_logits_step, asked=asked, device=device)
    return _schedule(model, batches, step, groups, forward_only=True, collect_non_loss_data=True)


def _schedule(model: nn.Module, batches: Sequence[Batch], step: Any, groups: Groups, **options: Any) -> list[Tensor]:
    lengths = {len(batch.input_ids_T) for batch in batches}
    if len(lengths) != 1:
        raise ValueError(f"micro-batches of one step must have one length, got {sorted(lengths)}")
    run = get_forward_backward_func(groups.pp.size(), None)
    return run(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=lengths.pop(),
        micro_batch_size=1,
        p2p_communicator=P2PCommunicator(groups.pp, _unwrapped(model).config),
        pg_collection=groups.mcore,
        **options,
    )


def _loss_step(batches: Iterator[Batch], model: nn.Module, *, device: torch.device) -> tuple[Tensor, Any]:
    """One micro-batch in the form the schedules call: the output, and the function that makes it a loss."""
    batch = next(batches)
    loss_T = _apply(model, batch, device, batch.labels_T)
    return loss_T, partial(_loss_sum, batch.loss_tokens)


def _loss_sum(tokens: int, loss_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, the number of tokens it is to be divided by, and the sum for the log."""
    total = loss_T.sum()
    return total, torch.tensor(tokens, dtype=torch.int, device=total.device), total.detach()


def _logits_step(
    batches: Iterator[Batch], model: nn.Module, *, asked: Iterator[Sequence[int]], device: torch.device
) -> tuple[Tensor, Any]:
    logits_TV = _apply(model, next(batches), device, None)
    positions_Q = torch.tensor(list(next(asked)), dtype=torch.int64, device=device)
    return logits_TV, partial(_chosen_logits, _unwrapped(model), positions_Q)


def _chosen_logits(model: LlavaModel, positions_Q: Tensor, logits_TV: Tensor, non_loss_data: bool) -> Tensor:
    return model.full_logits(logits_TV[positions_Q]).float()


def _apply(model: nn.Module, batch: Batch, device: torch.device, labels_T: Tensor | None) -> Tensor:
    return model(
        batch.input_ids_T.to(device, non_blocking=True),
        batch.position_ids_T.to(device, non_blocking=True),
        batch.sample_lengths,
        batch.pixel_values_NCHW.to(device, non_blocking=True),
        batch.image_index_E.to(device, non_blocking=True),
        None if labels_T is None else labels_T.to(device, non_blocking=True),
    )


def _unwrapped(model: nn.Module) -> LlavaModel:
    return model.module if isinstance(model, DistributedDataParallel) else model  # type: ignore[return-value]
