"""Forward and backward of a step's micro-batches through Megatron-Core's schedules, on any layout.

Shape suffixes: T tokens of a micro-batch, V vocabulary, Q positions that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn

from llava_mcore.data.conversation import IGNORE
from llava_mcore.data.loader import Batch
from llava_mcore.models.llava import LlavaModel, ModelParts
from llava_mcore.parallel import sequence
from llava_mcore.parallel.encoder import reduce_gradients
from llava_mcore.parallel.groups import Groups
from llava_mcore.platform.copies import upload
from llava_mcore.settings.schema import ParallelSettings


def distribute(model: ModelParts, parallel: ParallelSettings, groups: Groups) -> list[DistributedDataParallel]:
    """Wraps each part of the model for data parallelism: float32 gradients, and no gradient buffer for what is frozen."""
    parts = [
        DistributedDataParallel(
            part.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                use_distributed_optimizer=True,
                fp8_param_gather=part.config.fp8_param,
            ),
            part,
            disable_bucketing=number > 0,
            pg_collection=groups.mcore,
        )
        for number, part in enumerate(model)
    ]
    for part in parts:
        part.config.finalize_model_grads_func = partial(_finalize_gradients, groups=groups)
        if parallel.overlap_grad_reduce:
            part.config.no_sync_func = [other.no_sync for other in parts] if len(parts) > 1 else part.no_sync
    return parts


def _finalize_gradients(model: Sequence[nn.Module], *arguments: Any, groups: Groups, **options: Any) -> None:
    """Megatron-Core's reductions, and the sum over the pictures that were dealt over tensor-parallel ranks."""
    finalize_model_grads(model, *arguments, **options)
    if groups.tower.tp is not groups.tp:
        for part in map(_unwrapped, model):
            reduce_gradients(part.encoder_parameters(), groups.tp)


def forward_backward(
    model: Sequence[DistributedDataParallel], batches: Sequence[Batch], groups: Groups, device: torch.device, **schedule: Any
) -> list[Tensor]:
    """One optimizer step's gradients, summed over its micro-batches and ranks and divided by the tokens that have a label.

    The loss of a micro-batch is a sum over tokens; the schedule divides by the count over all ranks and micro-batches, so uneven
    masks change nothing.

    Args:
        model: wrapped by :func:`distribute`; the gradients are left in its buffers.
        batches: this rank's micro-batches, of one length; with an interleaved pipeline a multiple of its stages.
        groups: process groups.
        device: where the model is.
        schedule: further arguments of Megatron-Core's schedule.

    Returns:
        on the last stage the loss sum of each micro-batch, elsewhere an empty list.
    """
    return _schedule(model, batches, partial(_loss_step, device=device), groups, **schedule)


@torch.no_grad()
def forward_logits(
    model: ModelParts, batches: Sequence[Batch], positions: Sequence[Sequence[int]], groups: Groups, device: torch.device
) -> list[Tensor]:
    """Logits at chosen positions, without gradients; for layouts without context parallelism or an interleaved pipeline.

    Args:
        model: one part, not wrapped.
        batches: this rank's micro-batches, of one length.
        positions: for each micro-batch the tokens whose logits are wanted.
        groups: process groups.
        device: where the model is.

    Returns:
        on the last stage logits [Q, vocab_size] in float32 of each micro-batch, on all its tensor-parallel ranks; elsewhere an
        empty list.
    """
    if groups.cp.size() > 1 or len(model) > 1:
        raise ValueError("logits need parallel.context=1 and parallel.virtual_pipeline=1; load the weights in such a layout")
    asked = iter(positions)
    step = partial(_logits_step, asked=asked, device=device)
    return _schedule(model, batches, step, groups, forward_only=True, collect_non_loss_data=True)


def padded_tokens(model: LlavaModel, batches: Sequence[Batch]) -> int | None:
    """Tokens of each of a step's micro-batches after padding for Transformer Engine's exchange; None where there is none.

    All get as many as the longest needs: the stages of a pipeline hand on tensors of one shape.
    """
    multiple, ranks = model.stream_multiple, model.groups.cp.size()
    return max(sequence.padded_tokens(batch.sample_lengths, ranks, multiple) for batch in batches) if multiple else None


def _schedule(model: Iterable[nn.Module], batches: Sequence[Batch], step: Any, groups: Groups, **options: Any) -> list[Tensor]:
    lengths = {len(batch.input_ids_T) for batch in batches}
    if len(lengths) != 1:
        raise ValueError(f"micro-batches of one step must have one length, got {sorted(lengths)}")
    parts = list(model)
    length, first = lengths.pop(), _unwrapped(parts[0])
    padded_to = padded_tokens(first, batches)
    # What stages hand on is counted before it is divided over ranks.
    ranks = groups.cp.size() * (groups.tp.size() if first.config.sequence_parallel else 1)
    run = get_forward_backward_func(groups.pp.size(), len(parts) if len(parts) > 1 else None)
    return run(
        forward_step_func=partial(step, padded_to=padded_to),
        data_iterator=[iter(batches) for _ in parts],
        model=parts,
        num_microbatches=len(batches),
        seq_length=(padded_to or length) + ranks * first.carried_rows(length),
        micro_batch_size=1,
        p2p_communicator=P2PCommunicator(groups.pp, first.config),
        pg_collection=groups.mcore,
        **options,
    )


def _loss_step(batches: Iterator[Batch], model: nn.Module, *, device: torch.device, padded_to: int | None) -> tuple[Tensor, Any]:
    """One micro-batch in the form the schedules call: the output, and the function that makes it a loss."""
    batch = next(batches)
    loss_T = _apply(model, batch, device, batch.labelled(), batch.labels_T, padded_to)
    return loss_T, partial(_loss_sum, _own_loss_tokens(batch, _unwrapped(model), padded_to))


def _own_loss_tokens(batch: Batch, model: LlavaModel, padded_to: int | None) -> int:
    """Tokens with a label among those this context-parallel rank holds."""
    cp = model.groups.cp
    if cp.size() == 1:
        return batch.loss_tokens
    own_C = model.split(batch.sample_lengths, padded_to).tokens(cp.rank())
    return int((F.pad(batch.labels_T, (0, 1), value=IGNORE)[own_C] != IGNORE).sum())


def _loss_sum(tokens: int, loss_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, the number of tokens it is to be divided by, and the sum for the log."""
    total = loss_T.sum()
    return total, torch.tensor(tokens, dtype=torch.int, device=total.device), total.detach()


def _logits_step(
    batches: Iterator[Batch], model: nn.Module, *, asked: Iterator[Sequence[int]], device: torch.device, padded_to: int | None
) -> tuple[Tensor, Any]:
    logits_QV = _apply(model, next(batches), device, torch.tensor(list(next(asked)), dtype=torch.int64), None, padded_to)
    return logits_QV, partial(_full_logits, _unwrapped(model))


def _full_logits(model: LlavaModel, logits_QV: Tensor, non_loss_data: bool) -> Tensor:
    return model.full_logits(logits_QV).float()


def _apply(
    model: nn.Module, batch: Batch, device: torch.device, asked_Q: Tensor, labels_T: Tensor | None, padded_to: int | None
) -> Tensor:
    return model(
        upload(batch.input_ids_T, device),
        upload(batch.position_ids_T, device),
        batch.sample_lengths,
        upload(batch.pixel_values_NCHW, device),
        batch.image_index_E,
        asked_Q,
        None if labels_T is None else upload(labels_T, device),
        batch.shapes,
        padded_to,
    )


def _unwrapped(model: nn.Module) -> LlavaModel:
    return model.module if isinstance(model, DistributedDataParallel) else model  # type: ignore[return-value]
